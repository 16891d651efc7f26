// call-model: one model call of one turn: the transcript is read from the journal, the answer streams to the token subject, and
// what it came to (text, tool calls, usage, cost) goes back into the journal.
//
// Which models are asked, and how often, is model-routing.ts. `usage` and `cost_usd_micros` of the output are those of the call that answered;
// `attempts` has every call that was made, each with its own, and `skipped` the models that were passed over.
import { type AgentConfig, contentText, type MessageContent } from "../../protocol/commands.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import type { World } from "../../protocol/world.ts";
import type { BreakerBoard } from "../../providers/breaker.ts";
import type { ChatMessage, ToolCall, ToolSpec } from "../../providers/provider.ts";
import type { Providers } from "../../providers/registry.ts";
import { BUILT_IN_TOOLS, type ToolTable } from "../../state-machines/tools.ts";
import { type ModelAttempt, routeModelCall, type SkippedModel } from "../model-routing.ts";
import type { ModelMoney } from "../model-money.ts";
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

/** Whose keys they are that this process was given. */
const PLATFORM = "platform";

export interface CallModelDeps {
  readonly world: World;
  readonly providers: Providers;
  readonly breakers: BreakerBoard;
  /** Absent: nobody counts money. */
  readonly money?: ModelMoney;
  on_attempt?(attempt: ModelAttempt, ms: number): void;
  on_skipped?(skipped: SkippedModel): void;
}

export function callModel({ world, providers, breakers, money, on_attempt, on_skipped }: CallModelDeps): Performer {
  const deps = {
    world,
    providers,
    breakers,
    owner: PLATFORM,
    ...(on_attempt === undefined ? {} : { on_attempt }),
    ...(on_skipped === undefined ? {} : { on_skipped }),
  };
  return async ({ turn, step, config_seq, messages }: Input, scope): Promise<Json> => {
    const entries = await scope.entries([config_seq, ...messages.filter((one) => one.failed === undefined).map((one) => one.at)]);
    const config = outputOf(entries.get(config_seq))["config"] as unknown as AgentConfig;
    const tokens = scope.tokens({ turn, step });
    const wanted = {
      instructions: config.instructions,
      messages: messages.map((one) => chatMessage(one, entries)),
      tools: toolSpecs(config.tools),
      max_output_tokens: config.max_output_tokens ?? OUTPUT_TOKENS_DEFAULT,
      idempotency_key: scope.idempotency_key,
      ...(config.temperature === undefined ? {} : { temperature: config.temperature }),
    };
    const paid = await money?.begin({ scope, config, request: wanted });
    const { model, request } = paid ?? { model: config.model, request: wanted };
    const route = await routeModelCall(
      paid === undefined ? deps : { ...deps, pay: (name, made) => paid.pay(name, made) },
      { model, fallbacks: config.fallbacks ?? {}, attempt: scope.attempt, request },
      { signal: scope.signal, on_delta: ({ kind, text }) => tokens.write(kind, text) },
    );
    tokens.end();
    const last = route.attempts.at(-1);
    const told = {
      model: last?.model ?? route.model,
      attempt: scope.attempt,
      usage: (last?.usage ?? null) as Json,
      cost_usd_micros: last?.cost_usd_micros ?? null,
      price_version: last?.price_version ?? null,
      attempts: route.attempts as unknown as Json,
      ...(paid?.decision === undefined ? {} : { decision: paid.decision }),
      ...(route.kind === "completed" || paid?.refusal === undefined ? {} : { refusal: paid.refusal }),
      ...(route.skipped.length === 0 ? {} : { skipped: route.skipped as unknown as Json }),
    };
    if (route.kind === "failed") {
      const { code, message, transient, retry_after_ms } = route;
      throw new EffectFailure(code, message, { ...told, transient, ...(retry_after_ms === undefined ? {} : { retry_after_ms }) });
    }
    const { text, tool_calls, stop, continuation } = route.outcome;
    return { text, tool_calls: tool_calls as unknown as Json, stop, ...told, ...(continuation === undefined ? {} : { continuation }) };
  };
}
