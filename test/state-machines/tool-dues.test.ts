// Goal: T15: a call of a tool with a price owes its budget the price exactly where it may have run, and a call of a model what its judges cost apart from
// its own; what has neither owes what it always did, so that journals of before replay.
// Method: each way in which an attempt can end, written out; then a life of a budget in which the categories sum to what is settled.
import { expect, test } from "vitest";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import type { AttemptEnd, Emitted } from "../../state-machines/definition.ts";
import { modelCallDues } from "../../state-machines/model-dues.ts";
import { coreOf } from "../../state-machines/step.ts";
import { toolCallDues } from "../../state-machines/tool-dues.ts";
import { Drive } from "./drive.ts";

const actor = { tenant: "acme", kind: "session", id: "s1" } as const;
const PRICE = { usd_micros: 250, category: "retrieval" };
const tool = (end: AttemptEnd, price: JsonObject | undefined = PRICE) =>
  toolCallDues({ actor, inst: "7:tool.0", attempt: 2, input: { name: "now", ...(price === undefined ? {} : { price }) } as unknown as Json, end });
const settles = (dues: readonly Emitted[]): JsonObject[] => dues.flatMap((one) => (one.type === "send" && one.command === "budget.settle" ? [one.body] : []));
const failed = (details?: JsonObject): AttemptEnd => ({
  kind: "failed",
  error: { code: "timeout", message: "", ...(details === undefined ? {} : { details }) },
});

test.each([
  ["done", { kind: "done", output: { text: "", is_error: false, cost_usd_micros: 250 } }, 250],
  ["failed after it was begun", failed({ cost_usd_micros: 250 }), 250],
  ["refused by the budget", failed({ cost_usd_micros: 0 }), 0],
  ["denied, or otherwise failed before it was begun", failed(), 0],
  ["stopped before it was begun", { kind: "stopped", told: { cost_usd_micros: 0 } }, 0],
  ["stopped while it ran", { kind: "stopped", told: { cost_usd_micros: 250 } }, 250],
  ["stopped where nobody knows how far it was", { kind: "stopped" }, null],
  ["lost with its worker", { kind: "lost" }, null],
] as const)("%s", (_, end, cost_usd_micros) => {
  expect(tool(end as AttemptEnd)).toEqual([
    { type: "send", to: "acme/budget/main", command: "budget.settle", body: { hold: "acme/session/s1/7:tool.0/2", cost_usd_micros, model: "tool/now" } },
  ]);
});

test("a tool without a price owes nothing, however it ends", () => {
  for (const end of [{ kind: "done", output: { text: "" } }, failed(), { kind: "stopped" }, { kind: "lost" }] as const)
    expect(toolCallDues({ actor, inst: "7:tool.0", attempt: 1, input: { name: "now" }, end: end as AttemptEnd })).toEqual([]);
});

const called = (purpose: string, cost_usd_micros: number, category?: string): JsonObject => ({
  purpose,
  model: "simulated/echo",
  usage: { input_tokens: 1 },
  cost_usd_micros,
  rate_tokens: 3,
  ...(category === undefined ? {} : { category }),
});
const model = (attempts: readonly JsonObject[]): JsonObject[] =>
  settles(modelCallDues({ actor, inst: "5:model", attempt: 1, input: {}, end: { kind: "done", output: { attempts: attempts as unknown as Json } } }));

test("what judges cost stands apart; a call without one, and one of a journal of before, says what it always said", () => {
  expect(model([called("guardrail", 7, "guardrail"), called("answer", 20, "llm"), called("guardrail", 5, "guardrail")])).toMatchObject([
    { cost_usd_micros: 32, by_category: { guardrail: 12 } },
  ]);
  for (const attempts of [[called("answer", 20, "llm")], [called("guardrail", 7), called("answer", 20)]])
    expect(model(attempts)[0]).not.toHaveProperty("by_category");
});

test("in the budget the categories sum to what is settled, and a tool that does not fit is refused like any call", () => {
  const drive = new Drive(coreOf(budgetDefinition), { tenant: "acme", kind: "budget", id: "main" });
  drive.create({}).tell("budget.configure", { level: "tenant", limit_usd_micros: 600 });
  const hold = (hold_id: string, name: string, usd_micros: number, category?: string): JsonObject =>
    drive.tell("budget.reserve", {
      hold: hold_id,
      session: "s1",
      agent: "a",
      model: name,
      amount_usd_micros: usd_micros,
      minimum_usd_micros: usd_micros,
      ...(category === undefined ? {} : { category }),
    });
  expect(hold("acme/session/s1/5:model/1", "simulated/echo", 100)).toMatchObject({ granted_usd_micros: 100 });
  for (const body of model([called("guardrail", 12, "guardrail"), called("answer", 20, "llm")])) drive.tell("budget.settle", body);
  for (const n of [0, 1]) expect(hold(`acme/session/s1/7:tool.${n}/2`, "tool/now", 250, "retrieval")).toMatchObject({ granted_usd_micros: 250 });
  expect(hold("acme/session/s1/7:tool.2/1", "tool/now", 250, "retrieval")).toMatchObject({ refused: { code: "budget_exceeded" } });
  for (const body of settles(tool({ kind: "lost" }))) drive.tell("budget.settle", body);
  drive.tell("budget.settle", { hold: "acme/session/s1/7:tool.1/2", cost_usd_micros: 250 });
  const { categories, settled_ever_usd_micros } = budgetContextOf(drive.view);
  expect(categories).toEqual({ llm: 20, guardrail: 12, retrieval: 500 });
  expect(Object.values(categories).reduce((sum, one) => sum + one, 0)).toBe(settled_ever_usd_micros);
});
