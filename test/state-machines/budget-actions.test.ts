// Goal: B10, AC1: an agent begins no more calls of its model or of tools in a period than it may by itself, whoever asks and whatever is repeated, and
// no fewer; whoever has no limit of them is not counted, and not kept from anything.
// Method: stories with the numbers written out; and drawn runs of askers with limits and periods of their own, beside a count of what was granted.
import { expect, test } from "vitest";
import { checkCommand } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { type BudgetPeriod, PERIODS, periodStart } from "../../state-machines/budget-period.ts";
import { coreOf } from "../../state-machines/step.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "./drive.ts";

const core = coreOf(budgetDefinition);
const T0 = Date.UTC(2026, 10, 29, 22); // a Sunday evening, two hours before the last day of the month

const fresh = (limit_usd_micros: number | null = null): Drive => {
  const drive = new Drive(core, { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = T0;
  return (drive.create({}).tell("budget.configure", { level: "tenant", limit_usd_micros }), drive);
};
const said = (drive: Drive, type: string, body: JsonObject): JsonObject => {
  if (drive.thorough) expect(checkCommand("budget", "control", type, body)).toMatchObject({ kind: "command" });
  return drive.tell(type, body);
};
const tool = (drive: Drive, n: number, limits: JsonObject, agent = "a"): JsonObject =>
  said(drive, "action.acquire", { action: `acme/session/s1/${n}:tool.0/1`, agent, kind: "tool_calls", limits: { period: "day", ...limits } });
const model = (drive: Drive, n: number, actions: JsonObject | undefined, more: JsonObject = {}): JsonObject =>
  said(drive, "budget.reserve", {
    hold: `acme/session/s1/${n}:model/1`,
    session: "s1",
    agent: "a",
    model: "simulated/echo",
    amount_usd_micros: 10,
    minimum_usd_micros: 10,
    ...(actions === undefined ? {} : { actions: { period: "day", ...actions } }),
    ...more,
  });
const refusal = (result: JsonObject): JsonObject | undefined => result["refused"] as JsonObject | undefined;

test("so many tools as the limit says, then a refusal that names the rule, its numbers and when the period ends", () => {
  const drive = fresh();
  expect(tool(drive, 1, { tool_calls: 2 })).toEqual({ granted: true, used: 1, limit: 2, period: "day" });
  expect(drive.told).toEqual([
    { type: "budget.action", action: "acme/session/s1/1:tool.0/1", agent: "a", kind: "tool_calls", used: 1, limit: 2, period: "day" },
  ]);
  expect(tool(drive, 2, { tool_calls: 2 })).toMatchObject({ granted: true });
  const details = { rule: "limits.actions.tool_calls", agent: "a", limit: 2, used: 2, period: "day", period_ends_at: "2026-11-30T00:00:00.000Z" };
  expect(refusal(tool(drive, 3, { tool_calls: 2 }))).toMatchObject({ code: "autonomy_exceeded", details });
  expect(drive.told).toEqual([{ type: "budget.refused", hold: "acme/session/s1/3:tool.0/1", code: "autonomy_exceeded", ...details }]);
  expect(refusal(tool(drive, 4, { tool_calls: 2 }, "b")), "another agent has its own").toBeUndefined();
  expect(refusal(tool(drive, 5, { tool_calls: 3 })), "a raised limit is felt at once").toBeUndefined();
  drive.later(2 * 3_600_000);
  expect(tool(drive, 6, { tool_calls: 2 })).toMatchObject({ granted: true, used: 1 });
  expect(refusal(tool(drive, 7, { tool_calls: 4, period: "month" }))?.["details"], "all periods are counted beside each other").toMatchObject({ used: 4 });
});

test("a limit of none allows nothing, and one of models says nothing of tools", () => {
  const drive = fresh();
  expect(refusal(tool(drive, 1, { tool_calls: 0 }))).toMatchObject({ code: "autonomy_exceeded" });
  for (let n = 2; n < 6; n++) expect(tool(drive, n, { model_calls: 0 })).toMatchObject({ granted: true });
});

test("a model call is counted in the step that grants its money: once for all its parts, never where it was refused", () => {
  const drive = fresh(90);
  expect(refusal(model(drive, 1, { model_calls: 2 }))).toBeUndefined();
  expect(refusal(model(drive, 1, { model_calls: 2 }, { part: 2 })), "a further part is the same call").toBeUndefined();
  expect(refusal(model(drive, 2, { model_calls: 2 }, { amount_usd_micros: 99, minimum_usd_micros: 99 }))).toMatchObject({ code: "budget_exceeded" });
  expect(refusal(model(drive, 3, { model_calls: 2 }))).toBeUndefined();
  expect(refusal(model(drive, 4, { model_calls: 2 }))).toMatchObject({ code: "autonomy_exceeded", details: { rule: "limits.actions.model_calls", used: 2 } });
  expect(budgetContextOf(drive.view).holds_open).toBe(2);
});

test("a judge that opened the hold is no action; the call it is for is", () => {
  const drive = fresh();
  expect(refusal(model(drive, 1, undefined))).toBeUndefined();
  expect(refusal(model(drive, 1, { model_calls: 1 }, { part: 2 }))).toBeUndefined();
  expect(refusal(model(drive, 2, { model_calls: 1 }))).toMatchObject({ code: "autonomy_exceeded" });
});

test("agents without a limit leave no trace in the state", () => {
  const drive = fresh();
  model(drive, 1, undefined);
  expect(budgetContextOf(drive.view)).not.toHaveProperty("actions");
});

test("drawn runs: what was granted in a period is the limit asked with at most, and nobody below it is refused", () => {
  const met = { granted: 0, refused: 0, rolled: 0 };
  for (let seed = 1; seed <= 1_000; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    let drive = fresh();
    drive.thorough = seed % 100 === 0;
    const granted: { readonly agent: string; readonly kind: string; readonly at_ms: number }[] = [];
    let day = periodStart("day", drive.at_ms);
    for (let n = 1; n <= 30; n++) {
      drive.later(pick(6) === 0 ? pick(3 * 3_600_000) : pick(60_000));
      if (periodStart("day", drive.at_ms) !== day) met.rolled++;
      day = periodStart("day", drive.at_ms);
      if (pick(10) === 0) {
        const successor = drive.copyTo(new Drive(core, drive.actor));
        Object.assign(successor, { thorough: drive.thorough, epoch: drive.epoch + 1 });
        drive = successor;
      }
      const [agent, kind, limit] = [`a${pick(2)}`, pick(2) === 0 ? "tool_calls" : "model_calls", pick(6)] as const;
      const period = PERIODS[pick(PERIODS.length)] as BudgetPeriod;
      const limits = { [kind]: limit, period };
      const result = kind === "tool_calls" ? tool(drive, n, limits, agent) : model(drive, n, limits, { agent });
      const before = granted.filter((one) => one.agent === agent && one.kind === kind && one.at_ms >= periodStart(period, drive.at_ms)).length;
      const is_granted = refusal(result) === undefined;
      if (is_granted !== before < limit) expect({ is_granted, before, limit }, `seed ${seed} step ${n}`).toBe("as the count says");
      if (is_granted) granted.push({ agent, kind, at_ms: drive.at_ms });
      met[is_granted ? "granted" : "refused"]++;
    }
  }
  for (const [name, count] of Object.entries(met)) expect(count, `the walk met ${name}`).toBeGreaterThan(500);
});
