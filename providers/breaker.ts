// breaker: keeps us from calling a provider that is down. One per (provider, owner of the credential), so that one tenant's trouble with a key of
// its own closes no door to another.
//
//   closed ──more than half of at least 5 calls of a minute failed──▶ open ──cool-down is over──▶ half_open (one probe)
//     ▲                                                                ▲                            │       │
//     └────────────────────────────── the probe was answered ──────────┼────────────────────────────┘       │
//                                                                      └── the probe failed: twice the cool-down
//
// The state is a value and the functions are pure. Times are of a monotonic clock of one process; a board that shares states between processes
// (actors/breaker-board.ts) sends durations, never times.
//
//   B1. At most one probe is out in half_open. One that never comes back is given up after PROBE_PATIENCE_MS.
//   B2. Only what says something about the provider counts: an answer, or that there was none. A request that the provider refuses is an answer, and so
//       is its limit for our key; a call that we called off says nothing.
//   B3. The cool-down is COOLDOWN_MS_MIN after a first trip, doubles with each failed probe, and is never above COOLDOWN_MS_MAX.
//   B4. What is remembered is bounded: the calls of the last minute, at most CALLS_KEPT_MAX of them.
import { assert } from "../protocol/assert.ts";
import type { ModelErrorCode } from "./provider.ts";

/** Trips only where there is something to count: one failure of one call is bad luck. */
export const CALLS_MIN = 5;
export const FAILED_SHARE_MAX = 0.5;
export const WINDOW_MS = 60_000;
/** A provider that is called oftener than this in a minute is judged by its last calls. */
const CALLS_KEPT_MAX = 256;
/** Long enough for a provider to catch its breath, short enough that a turn may wait for it. */
export const COOLDOWN_MS_MIN = 5_000;
/** A provider that has been down for long is asked once a minute whether it is back. */
export const COOLDOWN_MS_MAX = 60_000;
/** A probe is a real call and may reason for minutes; a worker that died with it must not keep the door shut for ever. */
export const PROBE_PATIENCE_MS = 120_000;
assert(CALLS_KEPT_MAX > CALLS_MIN, "what is kept is enough to judge by");

interface Call {
  readonly at_ms: number;
  readonly failed: boolean;
}

export type BreakerState =
  | { readonly kind: "closed"; readonly recent: readonly Call[] }
  | { readonly kind: "open"; readonly since_ms: number; readonly cooldown_ms: number }
  | { readonly kind: "half_open"; readonly since_ms: number; readonly cooldown_ms: number };

export const BREAKER_CLOSED: BreakerState = { kind: "closed", recent: [] };

/** What a call says about its provider. */
export type Verdict = "answered" | "failed" | "unknown";

const FAILURES: ReadonlySet<ModelErrorCode> = new Set(["overloaded", "provider_unavailable", "stream_broken", "timeout"]);
/** `provider_error` is also what our own mistakes look like. */
const UNKNOWN: ReadonlySet<ModelErrorCode> = new Set(["cancelled", "provider_error", "provider_key_unusable", "script_failed"]);

/** B2. No code: the call was completed. */
export function verdictOf(code: ModelErrorCode | undefined): Verdict {
  if (code === undefined) return "answered";
  if (FAILURES.has(code)) return "failed";
  return UNKNOWN.has(code) ? "unknown" : "answered";
}

/** May a call be made now? `probe`: only as the one probe, which the caller must say with `probing` before it calls. */
export type Leave = { readonly kind: "free" } | { readonly kind: "probe" } | { readonly kind: "wait"; readonly retry_after_ms: number };

export function leaveToCall(state: BreakerState, now_ms: number): Leave {
  switch (state.kind) {
    case "closed":
      return { kind: "free" };
    case "open": {
      const left_ms = state.since_ms + state.cooldown_ms - now_ms;
      return left_ms <= 0 ? { kind: "probe" } : { kind: "wait", retry_after_ms: Math.ceil(left_ms) };
    }
    case "half_open": {
      const left_ms = state.since_ms + PROBE_PATIENCE_MS - now_ms; // B1
      return left_ms <= 0 ? { kind: "probe" } : { kind: "wait", retry_after_ms: COOLDOWN_MS_MIN };
    }
  }
}

/** The probe goes out. */
export function probing(state: BreakerState, now_ms: number): BreakerState {
  assert(state.kind !== "closed" && leaveToCall(state, now_ms).kind === "probe", "a probe goes out only when it is due");
  return { kind: "half_open", since_ms: now_ms, cooldown_ms: state.cooldown_ms };
}

/** An ordinary call has ended. One that ends after the breaker tripped changes nothing: the trip had its like in mind. */
export function ended(state: BreakerState, verdict: Verdict, now_ms: number): BreakerState {
  if (state.kind !== "closed" || verdict === "unknown") return state;
  const recent = [...state.recent.filter((call) => call.at_ms > now_ms - WINDOW_MS), { at_ms: now_ms, failed: verdict === "failed" }].slice(-CALLS_KEPT_MAX);
  const failures = recent.filter((call) => call.failed).length;
  const trips = verdict === "failed" && recent.length >= CALLS_MIN && failures / recent.length > FAILED_SHARE_MAX;
  return trips ? { kind: "open", since_ms: now_ms, cooldown_ms: COOLDOWN_MS_MIN } : { kind: "closed", recent };
}

/** The probe has ended. One that says nothing opens the way for the next at once. */
export function probeEnded(state: BreakerState, verdict: Verdict, now_ms: number): BreakerState {
  if (state.kind !== "half_open") return state;
  switch (verdict) {
    case "answered":
      return BREAKER_CLOSED;
    case "failed":
      return { kind: "open", since_ms: now_ms, cooldown_ms: Math.min(state.cooldown_ms * 2, COOLDOWN_MS_MAX) }; // B3
    case "unknown":
      return { kind: "open", since_ms: now_ms - state.cooldown_ms, cooldown_ms: state.cooldown_ms };
  }
}

/** Calls and failures of the last minute; nothing is counted while the breaker is not closed. */
export function countsOf(state: BreakerState, now_ms: number): { readonly calls: number; readonly failures: number } {
  const recent = state.kind === "closed" ? state.recent.filter((call) => call.at_ms > now_ms - WINDOW_MS) : [];
  return { calls: recent.length, failures: recent.filter((call) => call.failed).length };
}

// --- the board ---

export interface BreakerKey {
  readonly provider: string;
  /** Whose key is used: `platform`, or `tenant.{id}`. */
  readonly owner: string;
}

export type Admission =
  | {
      readonly kind: "admitted";
      /** Must be said once, however the call ends. */
      ended(verdict: Verdict): void;
    }
  | { readonly kind: "refused"; readonly retry_after_ms: number };

export interface BreakerReading extends BreakerKey {
  readonly state: BreakerState["kind"];
  readonly calls: number;
  readonly failures: number;
  /** Null when calls are free. */
  readonly retry_after_ms: number | null;
}

/** All breakers of a process. Calls may overlap. */
export interface BreakerBoard {
  /** Never rejects, and answers within a second: a board that cannot be asked lets calls through by what it knew last. */
  admit(key: BreakerKey): Promise<Admission>;
  readings(): readonly BreakerReading[];
}
