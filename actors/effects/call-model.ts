// call-model: one model call of one turn: the transcript is read from the journal, the answer streams to the token subject, and
// what it came to (text, tool calls, usage, cost) goes back into the journal.
import { type AgentConfig, contentText, type MessageContent } from "../../protocol/commands.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import type { World } from "../../protocol/world.ts";
import { costOf } from "../../providers/prices.ts";
import type { ChatMessage, ToolCall, ToolSpec, Usage } from "../../providers/provider.ts";
import type { Providers } from "../../providers/registry.ts";
import { BUILT_IN_TOOLS, type ToolTable } from "../../state-machines/tools.ts";
import { EffectFailure, type Performer } from "../performer.ts";

/** A message of the conversation: where it stands in the journal, and what it is. */
interface Position {
  readonly at: number;
  readonly role: "user" | "assistant" | "tool";
  readonly call_id?: string;
  readonly name?: string;
  /** A tool that failed has no output; the model hears why. */
  readonly failed?: { readonly code: string; readonly message: string };
}

interface Input {
  readonly turn: number;
  readonly step: number;
  /** The entry that holds the frozen configuration. */
  readonly config_seq: number;
  readonly messages: readonly Position[];
}

/** What an agent's model may say in one call when nobody set a bound. */
export const OUTPUT_TOKENS_DEFAULT = 4096;

const outputOf = (entry: Entry | undefined): JsonObject => (entry?.t === "done" ? (entry.output as JsonObject) : {});

function chatMessage(position: Position, entries: ReadonlyMap<number, Entry>): ChatMessage {
  const entry = entries.get(position.at);
  if (position.role === "user") {
    const content = entry?.t === "command" ? (entry.body["content"] as unknown as MessageContent) : "";
    return { role: "user", text: contentText(content) };
  }
  const output = outputOf(entry);
  if (position.role === "assistant") {
    const continuation = output["continuation"];
    return {
      role: "assistant",
      text: String(output["text"] ?? ""),
      tool_calls: (output["tool_calls"] ?? []) as unknown as readonly ToolCall[],
      ...(continuation === undefined || continuation === null ? {} : { continuation }),
    };
  }
  const { call_id = "", name = "", failed } = position;
  if (failed !== undefined) return { role: "tool", call_id, name, text: `${failed.code}: ${failed.message}`, is_error: true };
  return { role: "tool", call_id, name, text: String(output["text"] ?? ""), is_error: output["is_error"] === true };
}

function toolSpecs(names: readonly string[]): ToolSpec[] {
  const table: ToolTable = BUILT_IN_TOOLS;
  return names.flatMap((name) => {
    const tool = Object.hasOwn(table, name) ? table[name] : undefined;
    return tool === undefined ? [] : [{ name, description: tool.description, parameters: tool.parameters }];
  });
}

export interface ModelCallReport {
  readonly model: string;
  readonly outcome: string;
  readonly usage: Usage | undefined;
  readonly cost_usd_micros: number | null;
  readonly ms: number;
}

export function callModel({ world, providers, on_model }: { world: World; providers: Providers; on_model?: (report: ModelCallReport) => void }): Performer {
  return async ({ turn, step, config_seq, messages }: Input, scope): Promise<Json> => {
    const entries = await scope.entries([config_seq, ...messages.filter((one) => one.failed === undefined).map((one) => one.at)]);
    const config = outputOf(entries.get(config_seq))["config"] as unknown as AgentConfig;
    const resolved = providers.resolve(config.model);
    if (resolved.kind === "refused") throw new EffectFailure(resolved.error.code, resolved.error.message);
    const tokens = scope.tokens({ turn, step });
    const began_ms = world.now_ms();
    const outcome = await resolved.provider.call(
      {
        model: resolved.model,
        instructions: config.instructions,
        messages: messages.map((one) => chatMessage(one, entries)),
        tools: toolSpecs(config.tools),
        max_output_tokens: config.max_output_tokens ?? OUTPUT_TOKENS_DEFAULT,
        idempotency_key: scope.idempotency_key,
        ...(config.temperature === undefined ? {} : { temperature: config.temperature }),
      },
      { signal: scope.signal, on_delta: ({ kind, text }) => tokens.write(kind, text) },
    );
    tokens.end();
    const cost = outcome.usage === undefined ? undefined : costOf(config.model, outcome.usage, began_ms);
    const priced = cost?.kind === "priced" ? { cost_usd_micros: cost.cost_usd_micros, price_version: cost.price_version } : { cost_usd_micros: null, price_version: null };
    on_model?.({ model: config.model, outcome: outcome.kind === "completed" ? outcome.stop : outcome.error.code, usage: outcome.usage, cost_usd_micros: priced.cost_usd_micros, ms: world.now_ms() - began_ms });
    if (outcome.kind === "failed") {
      const { code, message, transient, retry_after_ms } = outcome.error;
      throw new EffectFailure(code, message, {
        model: config.model,
        attempt: scope.attempt,
        usage: (outcome.usage ?? null) as Json,
        transient,
        ...priced,
        ...(retry_after_ms === undefined ? {} : { retry_after_ms }),
      });
    }
    const { text, tool_calls, stop, usage, continuation } = outcome;
    return { text, tool_calls: tool_calls as unknown as Json, stop, usage: usage as unknown as Json, model: config.model, attempt: scope.attempt, ...priced, ...(continuation === undefined ? {} : { continuation }) };
  };
}
