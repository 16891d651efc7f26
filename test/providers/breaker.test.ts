// Goal: a provider that is down is left alone and found again, by the numbers of providers/breaker.ts (B1 to B4).
// Method: the edges by hand; then drawn histories against a model that counts by itself.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  BREAKER_CLOSED,
  type BreakerState,
  CALLS_MIN,
  COOLDOWN_MS_MAX,
  COOLDOWN_MS_MIN,
  ended,
  leaveToCall,
  PROBE_PATIENCE_MS,
  probeEnded,
  probing,
  type Verdict,
  verdictOf,
  WINDOW_MS,
} from "../../providers/breaker.ts";
import { MODEL_ERRORS, type ModelErrorCode } from "../../providers/provider.ts";

const after = (verdicts: readonly Verdict[], at_ms = 0, from: BreakerState = BREAKER_CLOSED): BreakerState =>
  verdicts.reduce((state, verdict) => ended(state, verdict, at_ms), from);
const OPEN: BreakerState = after(Array<Verdict>(CALLS_MIN).fill("failed"));

describe("closed", () => {
  test.each<[string, readonly Verdict[], BreakerState["kind"]]>([
    ["four failures of four", ["failed", "failed", "failed", "failed"], "closed"],
    ["five failures of five", ["failed", "failed", "failed", "failed", "failed"], "open"],
    ["three of six, which is half and not more", ["answered", "answered", "answered", "failed", "failed", "failed"], "closed"],
    ["four of seven, which is more than half", ["answered", "answered", "answered", "failed", "failed", "failed", "failed"], "open"],
    ["calls that say nothing do not count", ["failed", "failed", "failed", "failed", "unknown", "unknown", "unknown"], "closed"],
    ["an answer never trips, even where failures prevail", ["failed", "failed", "failed", "failed", "answered"], "closed"],
  ])("%s", (_what, verdicts, kind) => {
    expect(after(verdicts).kind).toBe(kind);
  });

  test("a failure of more than a minute ago is forgotten", () => {
    const old = after(["failed", "failed", "failed", "failed"], 0);
    expect(ended(old, "failed", WINDOW_MS - 1).kind).toBe("open");
    expect(ended(old, "failed", WINDOW_MS).kind).toBe("closed");
  });
});

describe("open and half-open", () => {
  test("calls wait for the cool-down, then one probe goes out and the others wait (B1)", () => {
    expect(leaveToCall(OPEN, COOLDOWN_MS_MIN - 1)).toEqual({ kind: "wait", retry_after_ms: 1 });
    expect(leaveToCall(OPEN, COOLDOWN_MS_MIN)).toEqual({ kind: "probe" });
    const half_open = probing(OPEN, COOLDOWN_MS_MIN);
    expect(leaveToCall(half_open, COOLDOWN_MS_MIN).kind).toBe("wait");
    expect(leaveToCall(half_open, COOLDOWN_MS_MIN + PROBE_PATIENCE_MS - 1).kind).toBe("wait");
    expect(leaveToCall(half_open, COOLDOWN_MS_MIN + PROBE_PATIENCE_MS).kind).toBe("probe");
  });

  test("a probe that is answered closes; one that fails doubles the cool-down up to its bound (B3)", () => {
    let state = OPEN;
    const cooldowns: number[] = [];
    for (let now_ms = 0, n = 0; n < 7; n++) {
      if (state.kind !== "open") throw new Error("a failed probe opens");
      cooldowns.push(state.cooldown_ms);
      now_ms += state.cooldown_ms;
      state = probeEnded(probing(state, now_ms), "failed", now_ms);
    }
    expect(cooldowns).toEqual([5_000, 10_000, 20_000, 40_000, 60_000, 60_000, 60_000]);
    expect(probeEnded(probing(OPEN, COOLDOWN_MS_MIN), "answered", COOLDOWN_MS_MIN)).toEqual(BREAKER_CLOSED);
  });

  test("a probe that says nothing leaves the way to the next at once", () => {
    const state = probeEnded(probing(OPEN, COOLDOWN_MS_MIN), "unknown", COOLDOWN_MS_MIN + 10);
    expect(leaveToCall(state, COOLDOWN_MS_MIN + 10)).toEqual({ kind: "probe" });
  });

  test("an ordinary call that ends late changes nothing", () => {
    expect(ended(OPEN, "failed", 10)).toBe(OPEN);
    expect(ended(OPEN, "answered", 10)).toBe(OPEN);
  });
});

test("only what says something about the provider counts against it (B2)", () => {
  const failures = (Object.keys(MODEL_ERRORS) as ModelErrorCode[]).filter((code) => verdictOf(code) === "failed");
  expect(failures.toSorted()).toEqual(["overloaded", "provider_unavailable", "stream_broken", "timeout"]);
  expect(verdictOf(undefined)).toBe("answered");
  for (const code of ["rate_limited", "provider_auth", "invalid_request", "context_overflow", "model_unknown"] as const)
    expect(verdictOf(code)).toBe("answered");
  expect(verdictOf("cancelled")).toBe("unknown");
});

test("in any history: at most one probe is out, cool-downs stay in their bounds, and it opens only with cause", () => {
  const step = fc.record({
    ms: fc.integer({ min: 0, max: 8_000 }),
    what: fc.constantFrom<"ask" | Verdict>("ask", "answered", "failed", "failed", "failed", "unknown"),
  });
  let opened = 0;
  let probed = 0;
  fc.assert(
    fc.property(fc.array(step, { minLength: 30, maxLength: 120 }), (steps) => {
      let state: BreakerState = BREAKER_CLOSED;
      let now_ms = 0;
      let probe_since_ms: number | undefined;
      let calls: { at_ms: number; failed: boolean }[] = [];
      for (const { ms, what } of steps) {
        now_ms += ms;
        const before: BreakerState["kind"] = state.kind;
        if (what === "ask") {
          const leave = leaveToCall(state, now_ms);
          if (leave.kind === "wait") expect(leave.retry_after_ms).toBeGreaterThan(0);
          if (leave.kind !== "probe") continue;
          expect(probe_since_ms === undefined || now_ms - probe_since_ms >= PROBE_PATIENCE_MS).toBe(true);
          state = probing(state, now_ms);
          probe_since_ms = now_ms;
          probed += 1;
        } else if (state.kind === "half_open") {
          state = probeEnded(state, what, now_ms);
          probe_since_ms = undefined;
          calls = [];
        } else {
          state = ended(state, what, now_ms);
          if (before === "closed" && what !== "unknown")
            calls = [...calls.filter((call) => call.at_ms > now_ms - WINDOW_MS), { at_ms: now_ms, failed: what === "failed" }];
          if (before === "closed" && state.kind === "open") {
            opened += 1;
            expect(calls.length).toBeGreaterThanOrEqual(CALLS_MIN);
            expect(calls.filter((call) => call.failed).length * 2).toBeGreaterThan(calls.length);
            calls = [];
          }
        }
        if (state.kind !== "closed") {
          expect(state.cooldown_ms).toBeGreaterThanOrEqual(COOLDOWN_MS_MIN);
          expect(state.cooldown_ms).toBeLessThanOrEqual(COOLDOWN_MS_MAX);
        }
      }
    }),
    { numRuns: 500 },
  );
  expect(opened).toBeGreaterThan(50);
  expect(probed).toBeGreaterThan(50);
});
