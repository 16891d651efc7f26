// provider: a language model as a port. Adapters: anthropic.ts and openai.ts over the official SDKs, simulated.ts for everything
// that must run without a provider. One call is one attempt: nothing in here retries, falls back or reserves money.
//
// Promises of every adapter, each a test in test/contract/provider.test.ts:
//   P1. The `text` deltas, run together, equal the outcome's `text`, for completed and for failed calls alike.
//   P2. `call` always settles and never rejects; whatever goes wrong is a `failed` outcome with a code of MODEL_ERRORS.
//       Silence of the other side ends in `timeout`; a callback that throws ends the call as `provider_error`.
//   P3. An abort settles the call within a tick, with the code `cancelled`, the text delivered so far, and the usage known so far
//       (marked `estimated` where the provider had not yet said). After the call has settled there are no more deltas.
//   P4. No text of an error holds a key, and none is longer than ERROR_TEXT_CHARACTERS_MAX.
//   P5. One call is at most one request on the wire: the SDKs' own retries are off.
//   P6. Tool calls come in the order in which the model made them, with ids that differ within one outcome. Arguments that are not a JSON
//       object come as `invalid_args`: the host answers the model, nothing throws.
//   P7. The classes of Usage are disjoint, see there.
//   P8. A stream is `completed` only if the provider said so: a stream that merely ends is `failed` with `stream_broken`.
// Calls may overlap freely. A call may be repeated with the same `idempotency_key`; no provider promises to do it once.
import type { Json, JsonObject } from "../protocol/json.ts";

export interface ToolSpec {
  readonly name: string;
  readonly description: string;
  /** A JSON schema of type `object`. */
  readonly parameters: JsonObject;
}

export interface ToolCall {
  readonly id: string;
  readonly name: string;
  readonly args: JsonObject;
  /** What the model sent instead of a JSON object, at most INVALID_ARGS_CHARACTERS_MAX of it; `args` is then empty. */
  readonly invalid_args?: string;
}

export type ChatMessage =
  | { readonly role: "user"; readonly text: string }
  | {
      readonly role: "assistant";
      readonly text: string;
      readonly tool_calls: readonly ToolCall[];
      /** From the outcome that this message was, unchanged. See ModelOutcome. */
      readonly continuation?: Json;
    }
  | { readonly role: "tool"; readonly call_id: string; readonly name: string; readonly text: string; readonly is_error: boolean };

export interface ModelRequest {
  /** Without the provider's prefix: `claude-sonnet-4-6`, not `anthropic/claude-sonnet-4-6`. */
  readonly model: string;
  readonly instructions: string;
  readonly messages: readonly ChatMessage[];
  readonly tools: readonly ToolSpec[];
  /** Bounds everything that is billed as output: text, reasoning and tool calls. */
  readonly max_output_tokens: number;
  readonly temperature?: number;
  readonly idempotency_key: string;
}

/** A piece of what the model says. `tool_call` pieces are the raw arguments as they grow, for people who watch; only the outcome's calls count. */
export interface ModelDelta {
  readonly kind: "text" | "reasoning" | "tool_call";
  readonly text: string;
}

/**
 * Tokens of one attempt in disjoint classes: each billed token is counted in exactly one, and their sum is all that was billed.
 *   input_tokens        prompt tokens that were neither read from nor written to the provider's cache
 *   cache_read_tokens   prompt tokens read from the cache
 *   cache_write_tokens  prompt tokens written to the cache
 *   output_tokens       generated tokens that are not reasoning: text and tool calls (and reasoning, where the provider does not tell it apart)
 *   reasoning_tokens    generated tokens of reasoning, where the provider tells them apart; priced as output
 * OpenAI reports nested counts (`prompt_tokens` includes cached ones, `completion_tokens` includes reasoning): its adapter subtracts.
 */
export interface Usage {
  readonly input_tokens: number;
  readonly output_tokens: number;
  readonly cache_read_tokens: number;
  readonly cache_write_tokens: number;
  readonly reasoning_tokens: number;
  /** Some or all of it is our estimate (estimate.ts), because the provider had not said it when the call ended. */
  readonly estimated?: true;
}

export const NO_USAGE: Usage = { input_tokens: 0, output_tokens: 0, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };

export type StopReason = "end" | "tool_calls" | "length" | "refusal" | "content_filter";

/**
 * Code → whether the same call may succeed if it is made again later, and what it means.
 * An error that a provider invents tomorrow becomes `provider_error`: not transient, because nobody knows what a repeat would cost.
 */
export const MODEL_ERRORS = {
  rate_limited: { transient: true, meaning: "the provider counts requests or tokens and has had enough of ours" },
  overloaded: { transient: true, meaning: "the provider has too much to do for everybody" },
  provider_unavailable: { transient: true, meaning: "the provider cannot be reached or failed inside, before the first byte of an answer" },
  stream_broken: { transient: true, meaning: "the answer had begun and ended before its end" },
  timeout: { transient: true, meaning: "the provider was silent for longer than our patience" },
  model_unknown: { transient: false, meaning: "there is no such model, or not for this key" },
  context_overflow: { transient: false, meaning: "the prompt does not fit the model" },
  content_policy: { transient: false, meaning: "the provider refuses the prompt for its content" },
  provider_auth: { transient: false, meaning: "the provider refuses the key, or the account behind it is out of credit" },
  provider_key_unusable: { transient: false, meaning: "the tenant's own key for the provider cannot be opened here" },
  invalid_request: { transient: false, meaning: "the provider does not understand the request" },
  cancelled: { transient: false, meaning: "we called it off" },
  script_failed: { transient: false, meaning: "the text given to simulated/script is not a script" },
  provider_error: { transient: false, meaning: "something else" },
} as const satisfies Record<string, { transient: boolean; meaning: string }>;

export type ModelErrorCode = keyof typeof MODEL_ERRORS;

export interface ModelError {
  readonly code: ModelErrorCode;
  /** For people. Callers branch on `code` and `transient`. */
  readonly message: string;
  readonly transient: boolean;
  /** The provider's own wish for how long to stay away; absent when it had none. */
  readonly retry_after_ms?: number;
}

export type ModelOutcome =
  | {
      readonly kind: "completed";
      readonly text: string;
      readonly tool_calls: readonly ToolCall[];
      /** `tool_calls` only if there are some. With `length` the last call's arguments may be cut, and are then `invalid_args`. */
      readonly stop: StopReason;
      readonly usage: Usage;
      /**
       * Opaque data of this provider and model that the assistant's message must carry in later requests, such as signed thinking.
       * Another provider or model ignores it. Absent when text and tool calls say everything.
       */
      readonly continuation?: Json;
    }
  | {
      readonly kind: "failed";
      readonly error: ModelError;
      /** Absent when nothing was billed: the provider refused before it began. */
      readonly usage?: Usage;
      /** What was delivered before it failed. */
      readonly text: string;
    };

export interface CallIo {
  readonly signal: AbortSignal;
  /** Called in order, never after the call has settled, never with an empty text. */
  on_delta(delta: ModelDelta): void;
  /** Given once, before the request goes out: says at any time until the call has settled what an abort at that moment would tell as usage. */
  meter?(usage_so_far: () => Usage): void;
}

export interface Provider {
  /** The part of a model's name before the slash. */
  readonly name: string;
  call(request: ModelRequest, io: CallIo): Promise<ModelOutcome>;
  /** How many tokens the prompt will count as, where that is known before the call; else it is estimated. */
  countInputTokens?(request: Pick<ModelRequest, "instructions" | "messages">): number;
}

/** Enough for a provider's sentence and its request id; an HTML page of a proxy is cut. */
export const ERROR_TEXT_CHARACTERS_MAX = 500;
/** Enough to show the model what it did wrong. */
export const INVALID_ARGS_CHARACTERS_MAX = 4_000;
