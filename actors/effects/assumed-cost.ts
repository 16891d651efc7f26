// assumed-cost: what a model call that was lost with its worker may have cost: its whole prompt at the dearest class of input, and all the
// output it was allowed. The provider may have billed it; nobody can ask. Unknown prices give undefined.
import { type AgentConfig, contentText, type MessageContent } from "../../protocol/commands.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { estimateTokens } from "../../providers/estimate.ts";
import { costAtMost } from "../../providers/prices.ts";
import type { Running } from "../../state-machines/step.ts";
import type { EffectScope } from "../performer.ts";
import { OUTPUT_TOKENS_DEFAULT } from "./call-model.ts";

function textOf(entry: Entry | undefined): string {
  if (entry?.t === "command") return contentText(entry.body["content"] as unknown as MessageContent);
  if (entry?.t !== "done") return "";
  const output = entry.output as JsonObject;
  return `${String(output["text"] ?? "")}${output["tool_calls"] === undefined ? "" : JSON.stringify(output["tool_calls"])}`;
}

export async function assumedCost(effect: Running, scope: EffectScope): Promise<number | undefined> {
  if (effect.src !== "call_model") return undefined;
  const { config_seq, messages } = effect.input as unknown as { config_seq: number; messages: readonly { at: number }[] };
  const entries = await scope.entries([config_seq, ...messages.map((one) => one.at)]);
  const frozen = entries.get(config_seq);
  const config = frozen?.t === "done" ? ((frozen.output as JsonObject)["config"] as unknown as AgentConfig) : undefined;
  if (config === undefined) return undefined;
  const input_tokens = messages.reduce((sum, one) => sum + estimateTokens(textOf(entries.get(one.at))), estimateTokens(config.instructions));
  const cost = costAtMost(config.model, { input_tokens, max_output_tokens: config.max_output_tokens ?? OUTPUT_TOKENS_DEFAULT });
  return cost.kind === "priced" ? cost.cost_usd_micros : undefined;
}
