// Goal: T13: what a level comes to is foreseen by the rule that its tenant has; the default is the one of always, each says how far it is to be trusted,
// and whatever rule there is, no call is ended that its own reservation covers (D1).
// Method: the numbers of each rule written out; every small combination against PJ1 and PJ2; and one call under each rule in the budget itself.
import { expect, test } from "vitest";
import { COST_PROJECTIONS } from "../../protocol/cost-projection.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { PERIODS } from "../../state-machines/budget-period.ts";
import { type ProjectedCall, PROJECTIONS } from "../../state-machines/budget-projection.ts";
import { coreOf } from "../../state-machines/step.ts";
import { Drive } from "./drive.ts";

const DAY_MS = 86_400_000;
const MIDNIGHT = Date.UTC(2026, 10, 21);
const call = (more: Partial<ProjectedCall>): ProjectedCall => ({
  settled_usd_micros: 0,
  others_usd_micros: 0,
  amount_usd_micros: 0,
  others: 0,
  period: "day",
  period_started_at_ms: MIDNIGHT,
  at_ms: MIDNIGHT + DAY_MS / 4,
  ...more,
});

test("the default doubles what others hold, and is believed less the more of them there are", () => {
  const { beside_twice } = PROJECTIONS;
  expect(beside_twice(call({ settled_usd_micros: 100, others_usd_micros: 30, amount_usd_micros: 7, others: 2 }))).toEqual({
    usd_micros: 167,
    confidence: 0.75,
  });
  expect(beside_twice(call({ amount_usd_micros: 7 }))).toEqual({ usd_micros: 7, confidence: 0.95 });
  expect([0, 1, 2, 3, 4, 100].map((others) => beside_twice(call({ others })).confidence)).toEqual([0.95, 0.85, 0.75, 0.65, 0.65, 0.65]);
});

test("another counts what is held once, and a third goes on as the period began", () => {
  const now = call({ settled_usd_micros: 100, others_usd_micros: 30, amount_usd_micros: 7, others: 2 });
  expect(PROJECTIONS.held(now)).toEqual({ usd_micros: 137, confidence: 0.75, rule: "held" });
  expect(PROJECTIONS.run_rate(now), "a quarter of the day came to 100").toEqual({ usd_micros: 400, confidence: 0.48, rule: "run_rate" });
  expect(PROJECTIONS.run_rate({ ...now, at_ms: MIDNIGHT + DAY_MS - 1 }), "at its end what is held is more").toMatchObject({
    usd_micros: 137,
    confidence: 0.75,
  });
  expect(PROJECTIONS.run_rate({ ...now, at_ms: MIDNIGHT + 60_000 }), "its first minute says nothing").toMatchObject({ usd_micros: 137 });
  expect(PROJECTIONS.run_rate({ ...now, period: "none" }), "without a period there is no rate").toMatchObject({ usd_micros: 137 });
});

test.each(COST_PROJECTIONS)("PJ1, PJ2: %s is whole, no less than what is settled, and no surer with more beside it", (rule) => {
  let seen = 0;
  for (const settled_usd_micros of [0, 1, 999, Number.MAX_SAFE_INTEGER])
    for (const others_usd_micros of [0, 7, Number.MAX_SAFE_INTEGER / 4])
      for (const period of PERIODS)
        for (const share of [0, 0.005, 0.3, 0.999, 1.5]) {
          const at_ms = MIDNIGHT + Math.round(share * DAY_MS);
          const found = [0, 1, 5, 5000].map((others) =>
            PROJECTIONS[rule](call({ settled_usd_micros, others_usd_micros, others, period, at_ms, amount_usd_micros: 3 })),
          );
          for (const { usd_micros, confidence } of found) {
            expect(Number.isSafeInteger(usd_micros) && usd_micros >= settled_usd_micros).toBe(true);
            expect(confidence > 0 && confidence <= 1).toBe(true);
          }
          expect(found.map((one) => one.confidence)).toEqual(found.map((one) => one.confidence).sort((a, b) => b - a));
          seen += 1;
        }
  expect(seen).toBe(240);
});

test("a tenant's rule is what its calls are decided by, is told with each decision, and ends no call that fits", () => {
  const drive = new Drive(coreOf(budgetDefinition), { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = MIDNIGHT + DAY_MS / 4;
  drive.create({}).tell("budget.configure", { level: "tenant", limit_usd_micros: 1000, period: "day" });
  const reserve = (n: number): JsonObject =>
    drive.tell("budget.reserve", {
      hold: `acme/session/s1/${n}:model/1`,
      session: "s1",
      agent: "a",
      model: "simulated/echo",
      amount_usd_micros: 300,
      minimum_usd_micros: 300,
    });
  const inputsOf = (result: JsonObject): JsonObject => (result["decision"] as JsonObject)["inputs"] as JsonObject;
  expect(inputsOf(reserve(1))["projection"]).toEqual({ usd_micros: 300, confidence: 0.95 });
  drive.tell("budget.configure", { level: "tenant", projection: "held" });
  expect(drive.told).toMatchObject([{ type: "budget.configured", projection: "held" }]);
  const second = reserve(2);
  expect(second["decision"]).toMatchObject({ kind: "continue", inputs: { projection: { usd_micros: 600, rule: "held" } } });
  drive.tell("budget.configure", { level: "tenant", projection: "beside_twice" });
  expect(reserve(3), "bleak as it is, the call fits").toMatchObject({ granted_usd_micros: 300, decision: { kind: "degrade", reason: "projected_overrun" } });
  expect(budgetContextOf(drive.view).projection).toBe("beside_twice");
});
