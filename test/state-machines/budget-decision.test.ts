// Goal: the decision before a call turns exactly at its edges, and never ends a call that fits.
// Method: a table around each edge; then every small combination of numbers against D1.
import { describe, expect, test } from "vitest";
import { decide, type DecisionInputs, statusOf } from "../../state-machines/budget-decision.ts";
import { periodEnd, periodStart } from "../../state-machines/budget-period.ts";

const inputs = (more: Partial<DecisionInputs>): DecisionInputs => ({
  settled_usd_micros: 0,
  reserved_usd_micros: 0,
  limit_usd_micros: 1000,
  minimum_usd_micros: 1,
  concurrency: 0,
  concurrency_max: null,
  projection: { usd_micros: 0, confidence: 0.95 },
  ...more,
});

describe("decide", () => {
  test.each<[string, Partial<DecisionInputs>, string]>([
    ["nothing used", {}, "continue"],
    ["89.9 % used", { settled_usd_micros: 899 }, "continue"],
    ["90.0 % used", { settled_usd_micros: 900 }, "degrade utilisation"],
    ["90.1 % used", { settled_usd_micros: 901 }, "degrade utilisation"],
    ["90 % used, half of it reserved", { settled_usd_micros: 450, reserved_usd_micros: 450 }, "degrade utilisation"],
    ["all but the call used", { settled_usd_micros: 999 }, "degrade utilisation"],
    ["all used", { settled_usd_micros: 1000 }, "terminate does_not_fit"],
    ["all used and the call costs nothing", { settled_usd_micros: 1000, minimum_usd_micros: 0 }, "degrade utilisation"],
    ["one less left than the call needs", { settled_usd_micros: 500, minimum_usd_micros: 501 }, "terminate does_not_fit"],
    ["as much left as the call needs", { settled_usd_micros: 500, minimum_usd_micros: 500 }, "continue"],
    ["an overrun", { settled_usd_micros: 1001, minimum_usd_micros: 0 }, "terminate does_not_fit"],
    ["a limit of 0", { limit_usd_micros: 0, minimum_usd_micros: 0 }, "terminate does_not_fit"],
    ["no limit", { limit_usd_micros: null, settled_usd_micros: 1e12, projection: { usd_micros: 2e12, confidence: 0.5 } }, "continue"],
    ["7 of 10 calls running", { concurrency: 7, concurrency_max: 10 }, "continue"],
    ["8 of 10 calls running", { concurrency: 8, concurrency_max: 10 }, "degrade concurrency"],
    ["8 of 10 calls running, no limit", { limit_usd_micros: null, concurrency: 8, concurrency_max: 10 }, "degrade concurrency"],
    ["a projection of the limit", { projection: { usd_micros: 1000, confidence: 0.9 } }, "continue"],
    ["a projection above the limit", { projection: { usd_micros: 1001, confidence: 0.9 } }, "degrade projected_overrun"],
    ["a bleak projection for a call that fits", { settled_usd_micros: 100, projection: { usd_micros: 1e9, confidence: 0.3 } }, "degrade projected_overrun"],
  ])("%s: %o → %s", (_, more, expected) => {
    const decision = decide(inputs(more));
    expect(decision.kind === "continue" ? "continue" : `${decision.kind} ${decision.reason}`).toBe(expected);
  });

  test("D1: ends a call exactly when it does not fit", () => {
    let ended = 0;
    for (let limit = 0; limit <= 6; limit++)
      for (let settled = 0; settled <= 7; settled++)
        for (let reserved = 0; reserved <= 4; reserved++)
          for (let minimum = 0; minimum <= 4; minimum++) {
            const { kind } = decide(
              inputs({
                limit_usd_micros: limit,
                settled_usd_micros: settled,
                reserved_usd_micros: reserved,
                minimum_usd_micros: minimum,
                concurrency: 9,
                concurrency_max: 10,
                projection: { usd_micros: 99, confidence: 0.3 },
              }),
            );
            const fits = limit > 0 && settled + reserved + minimum <= limit;
            expect(kind === "terminate", `${settled} + ${reserved} + ${minimum} of ${limit}`).toBe(!fits);
            if (!fits) ended++;
          }
    expect(ended).toBeGreaterThan(100);
  });
});

test.each([
  [0, 0, 10, "healthy"],
  [7, 0, 10, "healthy"],
  [799, 0, 1000, "healthy"],
  [700, 100, 1000, "warning"],
  [899, 0, 1000, "warning"],
  [0, 900, 1000, "critical"],
  [999, 0, 1000, "critical"],
  [1000, 0, 1000, "exceeded"],
  [0, 0, 0, "exceeded"],
  [5, 5, null, "healthy"],
])("%d settled and %d reserved of %s is %s", (settled_usd_micros, reserved_usd_micros, limit_usd_micros, status) => {
  expect(statusOf({ settled_usd_micros, reserved_usd_micros, limit_usd_micros })).toBe(status);
});

test.each([
  ["day", "2026-03-01T00:00:00.000Z", "2026-03-01T00:00:00.000Z", "2026-03-02T00:00:00.000Z"],
  ["day", "2026-02-28T23:59:59.999Z", "2026-02-28T00:00:00.000Z", "2026-03-01T00:00:00.000Z"],
  ["week", "2026-11-22T23:59:59.999Z", "2026-11-16T00:00:00.000Z", "2026-11-23T00:00:00.000Z"],
  ["week", "2026-11-23T00:00:00.000Z", "2026-11-23T00:00:00.000Z", "2026-11-30T00:00:00.000Z"],
  ["month", "2028-02-29T12:00:00.000Z", "2028-02-01T00:00:00.000Z", "2028-03-01T00:00:00.000Z"],
  ["month", "2026-12-31T23:59:59.999Z", "2026-12-01T00:00:00.000Z", "2027-01-01T00:00:00.000Z"],
] as const)("the %s of %s goes from %s to %s", (period, at, from, to) => {
  const at_ms = Date.parse(at);
  expect(new Date(periodStart(period, at_ms)).toISOString()).toBe(from);
  expect(new Date(periodEnd(period, at_ms) ?? 0).toISOString()).toBe(to);
});
