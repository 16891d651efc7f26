// Goal: the daily report is what the budget's journal says: categories sum to the day, days to everything, and projections are judged by what came.
// Method: a budget is driven over three days; its events are folded; the sums are compared with the machine's own, the calibration with numbers
// written out.
import { expect, test } from "vitest";
import { createLedger } from "../../actors/budget-ledger.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { coreOf } from "../../state-machines/step.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "../state-machines/drive.ts";

const T0 = Date.UTC(2026, 10, 18, 12);
const fresh = (): { drive: Drive; ledger: ReturnType<typeof createLedger>; tell: (type: string, body: JsonObject) => JsonObject } => {
  const drive = new Drive(coreOf(budgetDefinition), { tenant: "acme", kind: "budget", id: "main" });
  drive.thorough = false;
  drive.at_ms = T0;
  drive.create({});
  const ledger = createLedger();
  const tell = (type: string, body: JsonObject): JsonObject => {
    const result = drive.tell(type, body);
    ledger.add({ at: new Date(drive.at_ms).toISOString(), events: drive.told });
    return result;
  };
  return { drive, ledger, tell };
};
const hold = (n: number): string => `acme/session/s${n}/1:model/1`;
const reserve = (n: number, amount: number, more: JsonObject = {}): JsonObject => ({
  hold: hold(n),
  session: `s${n}`,
  agent: "a",
  model: "simulated/echo",
  amount_usd_micros: amount,
  minimum_usd_micros: 1,
  ...more,
});

test("BL2: a projection is held against what its level had when the calls that it was about had ended", () => {
  const { tell, ledger } = fresh();
  tell("budget.configure", { level: "tenant", limit_usd_micros: 10_000, period: "month" });
  tell("budget.reserve", reserve(1, 100)); // alone: 100, confidence 0.95
  tell("budget.reserve", reserve(2, 50)); // beside 100: 50 + 200, confidence 0.85
  tell("budget.settle", { hold: hold(1), cost_usd_micros: 130 }); // an overrun: 130 came, 100 were projected
  tell("budget.reserve", reserve(3, 500)); // was not there when the second was projected, and counts with what it cost by then: nothing
  tell("budget.settle", { hold: hold(2), cost_usd_micros: 40 });
  const [day] = ledger.days();
  expect(day?.calibration).toEqual([
    { rule: "beside_twice", confidence: 0.85, projections: 1, held: 1, projected_usd_micros: 250, actual_usd_micros: 170 },
    { rule: "beside_twice", confidence: 0.95, projections: 1, held: 0, projected_usd_micros: 100, actual_usd_micros: 130 },
  ]);
  expect(day).toMatchObject({ settled: 2, settled_usd_micros: 170, overruns: 1, overrun_usd_micros: 30 });
  tell("budget.release", { hold: hold(3) });
  expect(ledger.days()[0]?.calibration.reduce((sum, { projections }) => sum + projections, 0)).toBe(3);
});

test("refusals by code, degraded calls by reason, alerts by percent and closed periods stand on their day", () => {
  const { drive, tell, ledger } = fresh();
  tell("budget.configure", { level: "tenant", limit_usd_micros: 1000, period: "day" });
  tell("budget.reserve", reserve(1, 920, { category: "retrieval" }));
  tell("budget.settle", { hold: hold(1), cost_usd_micros: null });
  tell("budget.reserve", reserve(2, 20, { degraded: { model: "simulated/script", amount_usd_micros: 10, minimum_usd_micros: 2 } }));
  tell("budget.reserve", reserve(3, 20));
  tell("budget.reserve", reserve(4, 200, { minimum_usd_micros: 150 }));
  tell("budget.settle", { hold: hold(2), cost_usd_micros: 5 });
  drive.later(13 * 3_600_000);
  tell("budget.settle", { hold: hold(3), cost_usd_micros: 7 });
  const [first, second] = ledger.days();
  expect(first).toMatchObject({
    day: "2026-11-18",
    settled_usd_micros: 925,
    assumed_usd_micros: 920,
    by_category: { retrieval: 920, llm: 5 },
    refused: { budget_exceeded: 1 },
    degraded: { utilisation: 1 },
    degraded_without_plan: 1,
    alerts: { 80: 1, 90: 1 },
    periods_closed: [],
  });
  expect(second).toMatchObject({
    day: "2026-11-19",
    settled_usd_micros: 7,
    periods_closed: [{ level: "tenant", period: "day", settled_usd_micros: 925, limit_usd_micros: 1000, categories: { retrieval: 920, llm: 5 } }],
  });
});

test("B11: what of a call's cost was spent on something else stands in its category, and more than the cost is no part of it", () => {
  const { tell, ledger } = fresh();
  tell("budget.configure", { level: "tenant", limit_usd_micros: 10_000, period: "day" });
  for (const n of [1, 2, 3, 4]) tell("budget.reserve", reserve(n, 100));
  tell("budget.settle", { hold: hold(1), cost_usd_micros: 90, by_category: { guardrail: 30 } });
  tell("budget.settle", { hold: hold(2), cost_usd_micros: 10, by_category: { guardrail: 10 } });
  tell("budget.settle", { hold: hold(3), cost_usd_micros: 10, by_category: { guardrail: 11 } });
  tell("budget.settle", { hold: hold(4), cost_usd_micros: null, by_category: { guardrail: 0 } });
  expect(ledger.days()).toMatchObject([{ settled_usd_micros: 210, by_category: { llm: 170, guardrail: 40 } }]);
});

test("BL1: over drawn lives the categories sum to the day, the days to everything ever settled, and each projection is judged once", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const draw = seededRandom(seed);
    const { drive, tell, ledger } = fresh();
    if (draw() < 0.5) tell("budget.configure", { level: "tenant", limit_usd_micros: 3000, period: "day" });
    const open: number[] = [];
    let granted = 0;
    for (let n = 1; n < 200; n++) {
      drive.later(Math.floor(draw() * 1_800_000));
      if (draw() < 0.55) {
        const category = draw() < 0.3 ? "storage" : "llm";
        if (tell("budget.reserve", reserve(n, Math.floor(draw() * 300) + 1, { category }))["granted_usd_micros"] !== undefined) {
          open.push(n);
          granted++;
        }
      } else if (open.length > 0) {
        const [one] = open.splice(Math.floor(draw() * open.length), 1) as [number];
        if (draw() < 0.2) tell("budget.release", { hold: hold(one) });
        else {
          const cost_usd_micros = draw() < 0.2 ? null : Math.floor(draw() * 320);
          // What is more than the cost is no part of it.
          const by_category = draw() < 0.3 ? { by_category: { guardrail: Math.floor(draw() * 200), llm: Math.floor(draw() * 10) } } : {};
          tell("budget.settle", { hold: hold(one), cost_usd_micros, ...by_category });
        }
      }
    }
    for (const one of open) tell("budget.settle", { hold: hold(one), cost_usd_micros: null });
    const days = ledger.days();
    for (const day of days) expect(Object.values(day.by_category).reduce((sum, one) => sum + one, 0)).toBe(day.settled_usd_micros);
    expect(days.reduce((sum, day) => sum + day.settled_usd_micros, 0)).toBe(budgetContextOf(drive.view).settled_ever_usd_micros);
    expect(
      days.flatMap((day) => day.calibration).reduce((sum, { projections }) => sum + projections, 0),
      `seed ${seed}`,
    ).toBe(granted);
    expect(days.length).toBeGreaterThan(1);
  }
});
