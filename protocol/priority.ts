// priority: the five priorities of a tenant's work, and what waiting does to them.
//
// A priority is a head start, nothing more: each step down waits AGEING_STEP_MS longer before it counts as much. So the turn of a call is one
// number that is fixed when it begins to wait, the smallest goes first, and equal ones go in the order in which they came.
//
// Invariants:
//   PR1. Of equal priority, the one that has waited longer goes first.
//   PR2. Nobody starves: whatever comes later than AGEING_SPAN_MS after a call goes behind it, whatever the priorities of both.
export const PRIORITIES = ["critical", "high", "normal", "low", "batch"] as const;
export type Priority = (typeof PRIORITIES)[number];
export const PRIORITY_DEFAULT: Priority = "normal";

/** Longer than most model calls, so that a priority means something; short enough that the least of all goes within a minute. */
export const AGEING_STEP_MS = 15_000;
export const AGEING_SPAN_MS = (PRIORITIES.length - 1) * AGEING_STEP_MS;

export function isPriority(text: unknown): text is Priority {
  return (PRIORITIES as readonly unknown[]).includes(text);
}

/** When it is whose turn: of all that wait the smallest goes first. */
export function turnAt(priority: Priority, since_ms: number): number {
  return since_ms + PRIORITIES.indexOf(priority) * AGEING_STEP_MS;
}
