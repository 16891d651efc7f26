// session-model-calls: what a session tells and counts of its model calls.
//
//   model.started ──▶ model.retrying, model.waiting … ──▶ model.completed
//                                                    └──▶ model.failed (also of a call that was stopped: then its text is superseded)
//   before the end: model.tried for each call that the effect made but the one of the end, model.skipped for each model that it passed over
//
// Invariants (of session.ts):
//   SE3. Every model.started gets exactly one end: model.completed or model.failed.
import type { ActorEvent } from "../protocol/journal.ts";
import { CALL_TIMEOUT_MS } from "../protocol/limits.ts";
import type { EffectError } from "./definition.ts";
import { modelWaits, waitOver } from "./model-wait.ts";
import type { Change } from "./session-change.ts";
import type { SessionContext, SessionUsage } from "./session-context.ts";
import type { KeySource, ModelNext, ModelOutput, ModelProgress, ModelUsage, ToldCall, ToldCalls, ToldSkip } from "./session-effects.ts";
import { FAILURE_CHARACTERS_MAX } from "./session-failure.ts";

/** The longest answers of reasoning models take minutes; past ten the call, with its wait for a place, is stuck. An agent whose calls get longer adds that. */
export const MODEL_PATIENCE_MS = 600_000;

/** What the agent's calls may take beyond what calls get anyhow. The process that makes a call ends it in time; the machine's patience is for one that does not. */
export const longerCalls = ({ config }: SessionContext): number => Math.max(0, (config?.call_timeout_ms ?? CALL_TIMEOUT_MS) - CALL_TIMEOUT_MS);

const modelOf = (context: SessionContext): string => context.config?.model ?? "";
/** turn and step of the present call, and its attempt. */
export const callOf = (context: SessionContext): { turn: number; step: number; attempt: number } => ({
  turn: context.turn,
  step: context.step,
  attempt: context.now.attempts["model"] ?? 1,
});

export function modelStarted(context: SessionContext): Change {
  return { tell: [{ type: "model.started", turn: context.turn, step: context.step, model: modelOf(context), inst: `${context.now.seq}:model` }] };
}

/** The calls that are told one by one. */
const toldOneByOne = ({ attempts }: ToldCalls): readonly ToldCall[] =>
  Array.isArray(attempts) ? (attempts as readonly ToldCall[]).filter(({ purpose }) => purpose !== undefined) : [];

const keyOf = (key_source: KeySource | undefined): { readonly key_source?: KeySource } => (key_source === undefined ? {} : { key_source });

/** Each call but the one that the end itself tells of, and each model that was passed over. */
function callsTold(context: SessionContext, told: ToldCalls): ActorEvent[] {
  const calls = toldOneByOne(told);
  const own = calls.findLast(({ purpose }) => purpose === "answer");
  const skipped = Array.isArray(told.skipped) ? (told.skipped as readonly ToldSkip[]).filter(({ purpose }) => purpose !== undefined) : [];
  return [
    ...skipped.map(({ model, code, message }): ActorEvent => ({ type: "model.skipped", ...callOf(context), model, code, message })),
    ...calls
      .filter((call) => call !== own)
      .map(
        ({ purpose = "answer", rule = null, model, outcome, code, message, usage, cost_usd_micros, price_version, key_source, try: number }): ActorEvent => ({
          type: "model.tried",
          ...callOf(context),
          try: number,
          purpose,
          ...(rule === null ? {} : { rule }),
          model,
          outcome,
          code,
          message: message === null ? null : message.slice(0, FAILURE_CHARACTERS_MAX),
          usage: usage === null ? null : { ...usage },
          cost_usd_micros,
          price_version,
          ...keyOf(key_source),
        }),
      ),
  ];
}

/** Usage of one more call. What is not known counts as nothing here; projections settle it. */
function withCall(usage: SessionUsage, call: ModelUsage | null, cost_usd_micros: number | null): SessionUsage {
  return {
    input_tokens: usage.input_tokens + (call?.input_tokens ?? 0),
    output_tokens: usage.output_tokens + (call?.output_tokens ?? 0),
    cache_read_tokens: usage.cache_read_tokens + (call?.cache_read_tokens ?? 0),
    cache_write_tokens: usage.cache_write_tokens + (call?.cache_write_tokens ?? 0),
    reasoning_tokens: usage.reasoning_tokens + (call?.reasoning_tokens ?? 0),
    cost_usd_micros: usage.cost_usd_micros + (cost_usd_micros ?? 0),
    model_calls: usage.model_calls + 1,
  };
}

/** Usage of everything that was called, or of the one call that is known of. */
function withCalls(before: SessionUsage, told: ToldCalls, usage: ModelUsage | null, cost_usd_micros: number | null): SessionUsage {
  const calls = toldOneByOne(told);
  return calls.length === 0 ? withCall(before, usage, cost_usd_micros) : calls.reduce((sum, call) => withCall(sum, call.usage, call.cost_usd_micros), before);
}

const retryOver = ({ retry, ...context }: SessionContext): Partial<SessionContext> => ({
  ...(retry === undefined || retry === null ? {} : { retry: null }),
  ...waitOver(context),
});

/** A call that failed is made again, now or after a while, there or elsewhere. */
function modelRetried(context: SessionContext, { next }: ModelNext): Change {
  const { model, try: number, wait_ms, code, message } = next;
  const provider = model.slice(0, Math.max(0, model.indexOf("/")));
  return {
    context: { retry: { provider, model, try: number, wait_ms, until_ms: context.now.at_ms + wait_ms, code } },
    tell: [{ type: "model.retrying", ...callOf(context), model, try: number, wait_ms, code, message: message.slice(0, FAILURE_CHARACTERS_MAX) }],
  };
}

export const modelTold = (context: SessionContext, told: ModelProgress): Change =>
  "wait" in told ? modelWaits(context.wait, told.wait, callOf(context), context.now.at_ms) : modelRetried(context, told);

export function modelCompleted(context: SessionContext, output: ModelOutput): Change {
  const { usage, cost_usd_micros, price_version, key_source, model, stop } = output;
  const completed = { type: "model.completed", ...callOf(context), model, usage: { ...usage }, cost_usd_micros, price_version, ...keyOf(key_source), stop };
  return {
    context: { usage: withCalls(context.usage, output, usage, cost_usd_micros), at_boundary: false, ...retryOver(context) },
    tell: [...callsTold(context, output), completed],
  };
}

/** A call without an answer. What it cost stands in the error's details, when its performer knows; of one that was stopped, in the entry that did it. */
export function modelFailed(context: SessionContext, error: EffectError): Change {
  const details = (error.details ?? context.now.stopped?.["model"] ?? {}) as ToldCalls & {
    usage?: ModelUsage | null;
    cost_usd_micros?: number | null;
    price_version?: string | null;
    key_source?: KeySource;
    model?: string;
  };
  const usage = details.usage ?? null;
  const cost_usd_micros = details.cost_usd_micros ?? null;
  return {
    context: { usage: withCalls(context.usage, details, usage, cost_usd_micros), ...retryOver(context) },
    tell: [
      ...callsTold(context, details),
      {
        type: "model.failed",
        ...callOf(context),
        model: details.model ?? modelOf(context),
        code: error.code,
        message: error.message.slice(0, FAILURE_CHARACTERS_MAX),
        usage: usage === null ? null : { ...usage },
        cost_usd_micros,
        price_version: details.price_version ?? null,
        ...keyOf(details.key_source),
      },
    ],
  };
}

/** The call in flight is given up: its text is void, and the step begins anew as the next one. */
export function modelSuperseded(context: SessionContext, why: string): Change {
  const failed = modelFailed(context, { code: "cancelled", message: why });
  return { ...failed, tell: [...(failed.tell ?? []), { type: "superseded", ...callOf(context) }] };
}
