// budget-actions: what an agent has done without a person, counted by calendar period: the calls of its models and of its tools.
//
// A limit is its agent's (`limits.actions` of its configuration) and comes with each question; the count is the budget's, one for all sessions and
// workers. All periods are counted beside each other, so sessions of an older version of the agent, with another period, see the same count.
// An attempt that was lost may have acted, so it counts, and its repeat counts anew. Pure.
//
// Invariants:
//   AC1. In the step that grants an action it is counted: no interleaving and no crash lets more begin in a period than the limit asked with.
import { type BudgetPeriod, PERIODS, periodStart } from "./budget-period.ts";

export const ACTION_KINDS = ["model_calls", "tool_calls"] as const;
export type ActionKind = (typeof ACTION_KINDS)[number];

/** How many an agent may do by itself in a period; what has no number is not limited. */
export interface ActionLimits {
  readonly model_calls?: number;
  readonly tool_calls?: number;
  readonly period: BudgetPeriod;
}

type Count = { readonly since_ms: number } & Readonly<Record<ActionKind, number>>;
/** Of one agent. */
export type ActionCounts = Readonly<Record<BudgetPeriod, Count>>;

const fresh = (period: BudgetPeriod, at_ms: number): Count => ({ since_ms: periodStart(period, at_ms), model_calls: 0, tool_calls: 0 });

/** What has been counted in the period that holds `at_ms`. */
export function actionsIn(counts: ActionCounts | undefined, period: BudgetPeriod, at_ms: number): Count {
  const count = counts?.[period];
  return count === undefined || count.since_ms !== periodStart(period, at_ms) ? fresh(period, at_ms) : count;
}

/** The counts with one more action. AC1 */
export function actionCounted(counts: ActionCounts | undefined, kind: ActionKind, at_ms: number): ActionCounts {
  const one = (period: BudgetPeriod): Count => {
    const count = actionsIn(counts, period, at_ms);
    return { ...count, [kind]: count[kind] + 1 };
  };
  return Object.fromEntries(PERIODS.map((period) => [period, one(period)])) as unknown as ActionCounts;
}
