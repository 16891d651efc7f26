// call-model: one model call of one turn: the transcript is read from the journal, the answer streams to the token subject, and
// what it came to (text, tool calls, usage, cost) goes back into the journal.
//
// Which models are asked, and how often, is model-routing.ts. `usage` and `cost_usd_micros` of the output are those of the call that answered;
// `attempts` has every call that was made, each with its own, and `skipped` the models that were passed over. While it goes on, they stand in the
// attempt's account (call-account.ts), from where they are told when it is stopped from outside.
import { type AgentConfig, contentText, type MessageContent } from "../../protocol/commands.ts";
import { actorPath } from "../../protocol/ids.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { isPriority, type Priority, PRIORITY_DEFAULT } from "../../protocol/priority.ts";
import { CALL_TIMEOUT_MS } from "../../protocol/limits.ts";
import type { World } from "../../protocol/world.ts";
import type { BreakerBoard } from "../../providers/breaker.ts";
import type { ChatMessage, ToolCall, ToolSpec } from "../../providers/provider.ts";
import type { Providers } from "../../providers/registry.ts";
import { MODEL_PATIENCE_MS } from "../../state-machines/session-model-calls.ts";
import { BUILT_IN_TOOLS, type ToolTable } from "../../state-machines/tools.ts";
import type { ModelAttempt, SkippedModel } from "../model-attempt.ts";
import { routeModelCall } from "../model-routing.ts";
import type { TenantModels } from "../tenant-models.ts";
import type { CallAccount } from "../call-account.ts";
import type { CallPool } from "../call-pool.ts";
import type { AttemptHold, ModelMoney } from "../model-money.ts";
import { EffectFailure, type EffectScope } from "../performer.ts";
import { createTimedCalls, type TimedCalls } from "../timed-calls.ts";

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

/** Where its calls wait: as the message says that is answered, else the agent or its session. */
export async function priorityOf(
  config: AgentConfig,
  messages: readonly Pick<Position, "at" | "role">[],
  scope: Pick<EffectScope, "entries">,
): Promise<Priority> {
  const asked = messages.findLast(({ role }) => role === "user");
  const entry = asked === undefined ? undefined : (await scope.entries([asked.at])).get(asked.at);
  const said = entry?.t === "command" ? entry.body["priority"] : undefined;
  return isPriority(said) ? said : (config.priority ?? PRIORITY_DEFAULT);
}

/** A place among the calls of this process; answers how to leave it. Who has to wait says so. */
export async function enterPool(
  { world, pool, account }: { readonly world: World; readonly pool: Pick<CallPool, "enter"> | undefined; readonly account: CallAccount },
  scope: EffectScope,
  priority: Priority,
): Promise<(() => void) | undefined> {
  // Whoever waits longer is given up by the session itself.
  account.waits({ for: "place", until_ms: world.now_ms() + MODEL_PATIENCE_MS, message: "as many calls run at its worker as may run at once" });
  const leave = await pool?.enter({ tenant: scope.actor.tenant, actor: actorPath(scope.actor), priority }, scope.signal);
  account.goesOn();
  return leave;
}

function toolSpecs(names: readonly string[]): ToolSpec[] {
  const table: ToolTable = BUILT_IN_TOOLS;
  return names.flatMap((name) => {
    const tool = Object.hasOwn(table, name) ? table[name] : undefined;
    return tool === undefined ? [] : [{ name, description: tool.description, parameters: tool.parameters }];
  });
}

export interface CallModelDeps {
  readonly world: World;
  readonly providers: Providers;
  /** Absent: every tenant is served with the platform's keys. */
  readonly models?: TenantModels;
  readonly breakers: BreakerBoard;
  /** Absent: nobody counts money. */
  readonly money?: ModelMoney;
  /** Absent: as many calls at once as there are. */
  readonly pool?: Pick<CallPool, "enter">;
  /** Counts the calls of this process. Absent: nobody looks. */
  readonly model_calls?: Pick<TimedCalls, "run">;
  on_attempt?(attempt: ModelAttempt, ms: number): void;
  on_skipped?(skipped: SkippedModel): void;
}

/** A model call, with the account and the hold of the attempt that it is a part of. */
export type ModelCall = (input: never, scope: EffectScope, account: CallAccount, hold: AttemptHold) => Promise<Json>;

export function callModel({
  world,
  providers,
  models,
  breakers,
  money,
  pool,
  model_calls = createTimedCalls({ world }),
  on_attempt,
  on_skipped,
}: CallModelDeps): ModelCall {
  const deps = {
    world,
    breakers,
    ...(on_attempt === undefined ? {} : { on_attempt }),
    ...(on_skipped === undefined ? {} : { on_skipped }),
  };
  return async ({ turn, step, config_seq, messages }: Input, scope, account, hold): Promise<Json> => {
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
    const priority = await priorityOf(config, messages, scope);
    const paid = await money?.begin({ scope, config, request: wanted, hold, made: account.attempts, priority, waits: account.waits });
    if (paid?.decision !== undefined) account.note({ decision: paid.decision });
    const { model, request } = paid ?? { model: config.model, request: wanted };
    const leave = await enterPool({ world, pool, account }, scope, priority);
    // What it waited for its place is not its own time.
    const route = await model_calls
      .run(
        config.call_timeout_ms ?? CALL_TIMEOUT_MS,
        scope.signal,
        (signal) =>
          routeModelCall(
            {
              ...deps,
              models: models?.of(scope.actor.tenant) ?? providers,
              account,
              permitted: () => scope.permitted(),
              ...(paid === undefined ? {} : { pay: (name, made) => paid.pay(name, made) }),
            },
            { model, fallbacks: config.fallbacks ?? {}, attempt: scope.attempt, request },
            { signal, on_delta: ({ kind, text }) => tokens.write(kind, text) },
          ),
        ({ kind }) => kind === "failed",
      )
      .catch((error: unknown): never => {
        // It did not even end when told to: what is known of it is what it told so far.
        if (error instanceof EffectFailure) throw new EffectFailure(error.effect_error.code, error.effect_error.message, account.soFar());
        throw error;
      })
      .finally(() => leave?.());
    tokens.end();
    const last = route.attempts.at(-1);
    const told = {
      model: last?.model ?? route.model,
      attempt: scope.attempt,
      usage: (last?.usage ?? null) as Json,
      cost_usd_micros: last?.cost_usd_micros ?? null,
      price_version: last?.price_version ?? null,
      ...(last === undefined ? {} : { key_source: last.key_source }),
      attempts: [...account.attempts] as unknown as Json,
      ...(paid?.decision === undefined ? {} : { decision: paid.decision }),
      ...(route.kind === "completed" || paid?.refusal === undefined ? {} : { refusal: paid.refusal }),
      ...(paid?.rate_undecided === true ? { rate_undecided: true } : {}),
      ...(account.skipped.length === 0 ? {} : { skipped: [...account.skipped] as unknown as Json }),
    };
    if (route.kind === "failed") {
      const { code, message, transient, retry_after_ms } = route;
      throw new EffectFailure(code, message, { ...told, transient, ...(retry_after_ms === undefined ? {} : { retry_after_ms }) });
    }
    const { text, tool_calls, stop, continuation } = route.outcome;
    return { text, tool_calls: tool_calls as unknown as Json, stop, ...told, ...(continuation === undefined ? {} : { continuation }) };
  };
}
