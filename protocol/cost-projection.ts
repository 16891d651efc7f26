// cost-projection: the rules by which a budget may say what a level comes to, by their names: as commands, journals and reports have them.
// What each of them computes stands in state-machines/budget-projection.ts.

/**
 * `beside_twice`  what is settled, this call, and twice what others hold beside it: whoever runs goes on running
 * `held`          what is settled, this call, and what others hold: what is known to be asked for, and no more
 * `run_rate`      as much as `held`, or what the period comes to if it goes on as it began, if that is more
 */
export const COST_PROJECTIONS = ["beside_twice", "held", "run_rate"] as const;
export type CostProjection = (typeof COST_PROJECTIONS)[number];
export const COST_PROJECTION_DEFAULT: CostProjection = "beside_twice";
