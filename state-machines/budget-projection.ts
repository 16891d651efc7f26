// budget-projection: what a level may come to when a call and those that run beside it have ended: a rule by name, and how far it is to be trusted.
//
//   the tenant's rule (budget.configure {projection}), else COST_PROJECTION_DEFAULT ──▶ PROJECTIONS[rule](call) ──▶ an input of the decision
//
// A rule is a pure function. To plug in another one: its name in protocol/cost-projection.ts, its function here; without both nothing compiles. A rule
// that journals name never changes what it computes, or they would not replay: a better one gets a name of its own. How well each did is in the daily
// report (actors/budget-ledger.ts).
//
// Invariants:
//   PJ1. A projection is a whole number, at least what is settled, and a safe integer; a confidence lies between 0 and 1.
//   PJ2. With more calls beside it no rule trusts itself more.
import { COST_PROJECTION_DEFAULT, type CostProjection } from "../protocol/cost-projection.ts";
import type { BudgetPeriod } from "./budget-period.ts";
import { periodEnd } from "./budget-period.ts";

export interface Projection {
  readonly usd_micros: number;
  /** Between 0 and 1. */
  readonly confidence: number;
  /** Absent: the default one. */
  readonly rule?: CostProjection;
}

/** A call at one level, before it is granted. */
export interface ProjectedCall {
  readonly settled_usd_micros: number;
  /** What the calls beside it hold. */
  readonly others_usd_micros: number;
  readonly amount_usd_micros: number;
  /** How many run beside it. */
  readonly others: number;
  readonly period: BudgetPeriod;
  readonly period_started_at_ms: number;
  readonly at_ms: number;
}

type ProjectionRule = (call: ProjectedCall) => Projection;

const whole = (usd_micros: number): number => Math.min(Number.MAX_SAFE_INTEGER, Math.round(usd_micros));
/** The more run, the less is known. */
const confidenceBeside = (others: number): number => Math.max(30, 95 - Math.min(30, 10 * others)) / 100;
const held = ({ settled_usd_micros, amount_usd_micros, others_usd_micros }: ProjectedCall): number =>
  settled_usd_micros + amount_usd_micros + others_usd_micros;
/** The first hundredth of a period says nothing of the rest. */
const RATE_FROM = 0.01;

/** What of its period has passed, between 0 and 1; undefined where there is no period. */
function passedOf({ period, period_started_at_ms, at_ms }: ProjectedCall): number | undefined {
  const ends_ms = periodEnd(period, period_started_at_ms);
  return ends_ms === null ? undefined : Math.min(1, Math.max(0, (at_ms - period_started_at_ms) / (ends_ms - period_started_at_ms)));
}

export const PROJECTIONS: Readonly<Record<CostProjection, ProjectionRule>> = {
  beside_twice: (call) => ({ usd_micros: whole(held(call) + call.others_usd_micros), confidence: confidenceBeside(call.others) }),
  held: (call) => ({ usd_micros: whole(held(call)), confidence: confidenceBeside(call.others), rule: "held" }),
  run_rate(call) {
    const passed = passedOf(call);
    const rated = passed === undefined || passed < RATE_FROM ? 0 : call.settled_usd_micros / passed;
    // Early in a period its rate is a guess; at its end it is what was seen.
    const share = Math.round(100 * (0.3 + 0.7 * (passed ?? 1))) / 100;
    return { usd_micros: whole(Math.max(held(call), rated)), confidence: Math.min(confidenceBeside(call.others), share), rule: "run_rate" };
  },
};

export const project = (rule: CostProjection | undefined, call: ProjectedCall): Projection => PROJECTIONS[rule ?? COST_PROJECTION_DEFAULT](call);
