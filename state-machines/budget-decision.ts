// budget-decision: what a model call may do, by the numbers of the tightest level it counts in: go on, go on cheaper, or not at all.
//
//   the call does not fit ─────────────────────────────────────────────▶ terminate
//   utilisation ≥ 0.9, concurrency ≥ 0.8, or a projected overrun ──────▶ degrade
//   else ──────────────────────────────────────────────────────────────▶ continue
//
// Pure, and kept apart from the machine so that its edges stand in one table of tests.
//
// Invariants:
//   D1. `terminate` only when the call does not fit: a call that its own reservation covers is never ended here, however bleak the projection.
//   D2. No limit, no reason: without one only concurrency can degrade.
import { assert } from "../protocol/assert.ts";
import type { Projection } from "./budget-projection.ts";

export const STATUSES = ["healthy", "warning", "critical", "exceeded"] as const;
export type BudgetStatus = (typeof STATUSES)[number];

export const WARNING_AT = 0.8;
export const CRITICAL_AT = 0.9;
export const EXCEEDED_AT = 1;
/** From this share of its limit on, calls are made cheaper. */
export const DEGRADE_AT = 0.9;
/** And from this share of the calls that may run at once. */
export const DEGRADE_CONCURRENCY_AT = 0.8;

export interface Spending {
  readonly settled_usd_micros: number;
  readonly reserved_usd_micros: number;
  /** null: none. */
  readonly limit_usd_micros: number | null;
}

/** What is used of a limit, from 0; a limit of 0 is used up. */
export function utilisation({ settled_usd_micros, reserved_usd_micros, limit_usd_micros }: Spending): number {
  if (limit_usd_micros === null) return 0;
  return limit_usd_micros === 0 ? EXCEEDED_AT : (settled_usd_micros + reserved_usd_micros) / limit_usd_micros;
}

export function statusOf(spending: Spending): BudgetStatus {
  const used = utilisation(spending);
  if (used >= EXCEEDED_AT) return "exceeded";
  if (used >= CRITICAL_AT) return "critical";
  return used >= WARNING_AT ? "warning" : "healthy";
}

/** What the limit has left. Below zero after an overrun, or when the limit was lowered. */
export function headroom({ settled_usd_micros, reserved_usd_micros, limit_usd_micros }: Spending): number {
  return limit_usd_micros === null ? Number.POSITIVE_INFINITY : limit_usd_micros - settled_usd_micros - reserved_usd_micros;
}

export interface DecisionInputs extends Spending {
  /** What this call asks for at least: without it there is no call. */
  readonly minimum_usd_micros: number;
  /** Calls that run beside this one. */
  readonly concurrency: number;
  readonly concurrency_max: number | null;
  readonly projection: Projection;
}

export type DegradeReason = "utilisation" | "concurrency" | "projected_overrun";
export type Decision =
  | { readonly kind: "continue" }
  | { readonly kind: "degrade"; readonly reason: DegradeReason }
  | { readonly kind: "terminate"; readonly reason: "does_not_fit" };

export function decide(inputs: DecisionInputs): Decision {
  const { limit_usd_micros, minimum_usd_micros, concurrency, concurrency_max, projection } = inputs;
  assert(minimum_usd_micros >= 0 && concurrency >= 0, "a call asks for no negative amount");
  if (limit_usd_micros === 0 || headroom(inputs) < minimum_usd_micros) return { kind: "terminate", reason: "does_not_fit" }; // D1
  if (utilisation(inputs) >= DEGRADE_AT) return { kind: "degrade", reason: "utilisation" };
  if (concurrency_max !== null && concurrency >= DEGRADE_CONCURRENCY_AT * concurrency_max) return { kind: "degrade", reason: "concurrency" };
  if (limit_usd_micros !== null && projection.usd_micros > limit_usd_micros) return { kind: "degrade", reason: "projected_overrun" };
  return { kind: "continue" };
}
