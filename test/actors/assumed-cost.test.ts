// Goal: what a lost call may have cost is never counted too low: by the model that was being called as far as the journal knows it, else by the dearest.
// Method: an effect in the ledger, with and without what it said of itself; the simulated models' price (1 a word in, 10 a token out) and dearer ones.
import { expect, test } from "vitest";
import { assumedCost } from "../../actors/effects/assumed-cost.ts";
import { JUDGE_OUTPUT_TOKENS } from "../../actors/guardrails.ts";
import type { EffectScope } from "../../actors/performer.ts";
import { agentConfig } from "../../protocol/commands.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { costAtMost } from "../../providers/prices.ts";

const DEAR = "anthropic/claude-opus-4-1";
const MIDDLE = "anthropic/claude-sonnet-4-5";
const TOKENS = 1000;

const ask = (config: JsonObject, told?: JsonObject): Promise<number | undefined> => {
  const frozen = agentConfig.parse({ model: "simulated/echo", max_output_tokens: TOKENS, ...config });
  const entries = new Map<number, Entry>([
    [2, { t: "done", inst: "1:configuration", output: { config: frozen } as unknown as Json }],
    [3, { t: "command", type: "message.send", channel: "command", body: { content: "" } }],
  ]);
  const scope = { entries: async () => entries } as unknown as EffectScope;
  const input = { config_seq: 2, messages: [{ at: 3 }] };
  return assumedCost({ inst: "3:model", src: "call_model", input, attempt: 1, ...(told === undefined ? {} : { told }) }, scope);
};
const atMost = (model: string, max_output_tokens = TOKENS): number => {
  const cost = costAtMost(model, { input_tokens: 0, max_output_tokens });
  if (cost.kind !== "priced") throw new Error(`${model} has no price`);
  return cost.cost_usd_micros;
};

test("the models differ in price, so that what follows says something", () => {
  expect(atMost("simulated/echo")).toBeLessThan(atMost(MIDDLE));
  expect(atMost(MIDDLE)).toBeLessThan(atMost(DEAR));
});

test("an agent with one model is assumed to have called it", async () => {
  expect(await ask({})).toBe(atMost("simulated/echo"));
});

test.each([
  ["a fallback", { fallbacks: { models: [MIDDLE, DEAR] } }],
  ["a fallback for prompts that do not fit", { fallbacks: { context_overflow: [DEAR] } }],
  ["a fallback for refused prompts", { fallbacks: { content_policy: [DEAR] } }],
  ["the plan for hard times", { degrade: { model: DEAR } }],
])("the dearest that it may have called counts: %s", async (_, config) => {
  expect(await ask(config)).toBe(atMost(DEAR));
});

test("what the call said of itself counts: the model it went to, those that could follow, and what had ended", async () => {
  const config = { model: DEAR, fallbacks: { models: [MIDDLE, "simulated/echo"] } };
  const told = (next: JsonObject): JsonObject => ({ attempts: [{ cost_usd_micros: 7 }, { cost_usd_micros: null }], next: { purpose: "answer", ...next } });
  expect(await ask(config, told({ model: MIDDLE, left: ["simulated/echo"] }))).toBe(7 + atMost(MIDDLE));
  expect(await ask(config, told({ model: "simulated/echo", left: [] }))).toBe(7 + atMost("simulated/echo"));
  // What a judge's call said leaves the agent's own model open.
  expect(await ask(config, { attempts: [], next: { purpose: "guardrail", model: "simulated/echo", left: [] } })).toBe(atMost(DEAR));
});

test("judges come on top, each with what it may say", async () => {
  const guardrails = [{ name: "kind", on: "input", kind: "judge", model: MIDDLE, policy: "be kind" }];
  expect(await ask({ guardrails })).toBe(atMost("simulated/echo") + atMost(MIDDLE, JUDGE_OUTPUT_TOKENS));
});

test("a model without a price leaves those with one; with none at all nobody knows", async () => {
  expect(await ask({ model: "openai/no-such-model", fallbacks: { models: [MIDDLE] } })).toBe(atMost(MIDDLE));
  expect(await ask({ model: "openai/no-such-model" })).toBeUndefined();
});
