// assumed-cost: what a model call that was lost with its worker may have cost: its whole prompt at the dearest class of input, and all the
// output it was allowed. The provider may have billed it; nobody can ask. Unknown prices give undefined.
//
// Which model was being called stands in the journal where the call said so (it had failed before, and was tried again or elsewhere): then it is
// that one, or one that could have come after it. Else it is any that the agent could have been given. Of several the dearest counts,
// and the judges of its guardrails come on top.
import { type AgentConfig, contentText, type MessageContent } from "../../protocol/commands.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { estimateTokens } from "../../providers/estimate.ts";
import { costAtMost } from "../../providers/prices.ts";
import type { Running } from "../../state-machines/step.ts";
import type { NextCall } from "../call-account.ts";
import type { ModelAttempt } from "../model-attempt.ts";
import type { EffectScope } from "../performer.ts";
import { JUDGE_OUTPUT_TOKENS } from "../guardrails.ts";
import { OUTPUT_TOKENS_DEFAULT } from "./call-model.ts";

function textOf(entry: Entry | undefined): string {
  if (entry?.t === "command") return contentText(entry.body["content"] as unknown as MessageContent);
  if (entry?.t !== "done") return "";
  const output = entry.output as JsonObject;
  return `${String(output["text"] ?? "")}${output["tool_calls"] === undefined ? "" : JSON.stringify(output["tool_calls"])}`;
}

interface Told {
  readonly attempts: readonly Pick<ModelAttempt, "cost_usd_micros">[];
  readonly next: NextCall;
}

/** The agent's own model that may have been called when the call was lost, or any of several. */
function candidatesOf(config: AgentConfig, next: NextCall | undefined): ReadonlySet<string> {
  if (next?.purpose === "answer") return new Set([next.model, ...next.left]);
  const { models = [], context_overflow = [], content_policy = [] } = config.fallbacks ?? {};
  return new Set([config.model, ...(config.degrade?.model === undefined ? [] : [config.degrade.model]), ...models, ...context_overflow, ...content_policy]);
}

export async function assumedCost(effect: Running, scope: EffectScope): Promise<number | undefined> {
  if (effect.src !== "call_model") return undefined;
  const { config_seq, messages } = effect.input as unknown as { config_seq: number; messages: readonly { at: number }[] };
  const entries = await scope.entries([config_seq, ...messages.map((one) => one.at)]);
  const frozen = entries.get(config_seq);
  const config = frozen?.t === "done" ? ((frozen.output as JsonObject)["config"] as unknown as AgentConfig) : undefined;
  if (config === undefined) return undefined;
  const told = effect.told as unknown as Told | undefined;
  const input_tokens = messages.reduce((sum, one) => sum + estimateTokens(textOf(entries.get(one.at))), estimateTokens(config.instructions));
  const atMost = (model: string, max_output_tokens: number): number[] => {
    const cost = costAtMost(model, { input_tokens, max_output_tokens });
    return cost.kind === "priced" ? [cost.cost_usd_micros] : [];
  };
  const own = [...candidatesOf(config, told?.next)].flatMap((model) => atMost(model, config.max_output_tokens ?? OUTPUT_TOKENS_DEFAULT));
  // Its judges are asked one after another, before it and after it.
  const judges = (config.guardrails ?? []).flatMap((rule) => (rule.kind === "judge" ? atMost(rule.model, JUDGE_OUTPUT_TOKENS) : []));
  // And what ended before is known.
  const ended = (told?.attempts ?? []).map(({ cost_usd_micros }) => cost_usd_micros ?? 0);
  if (own.length + judges.length === 0) return undefined;
  return [Math.max(0, ...own), ...judges, ...ended].reduce((sum, cost) => sum + cost, 0);
}
