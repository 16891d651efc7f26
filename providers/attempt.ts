// attempt: one call of a model from its first byte to its one outcome. It keeps the promises that do not depend on who answers, so that an
// adapter only has to translate.
//
//   open ──work returns──▶ settled(completed | failed)
//     ├──abort───────────▶ settled(cancelled)      at once; the work is told by its signal and no longer listened to
//     ├──silence─────────▶ settled(timeout)
//     └──on_delta throws─▶ settled(provider_error)
//
// Invariants (numbers are those of provider.ts):
//   P1. `text` is what was handed to on_delta as text, nothing else.
//   P2. The promise resolves exactly once and never rejects.
//   P3. After it has settled nothing reaches on_delta.
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { estimateInputTokens, estimateTokens } from "./estimate.ts";
import { modelError } from "./model-error.ts";
import type { CallIo, ModelDelta, ModelError, ModelOutcome, ModelRequest, Usage } from "./provider.ts";

/** How long the other side may be silent. */
export interface Patience {
  /** From the request to the first event. A model that reasons in secret needs minutes. */
  readonly first_event_ms: number;
  /** Between two events. */
  readonly silence_ms: number;
}

/** As long as the HTTP client underneath waits for a head, so that a caller sees our code and not its own. */
export const PATIENCE_DEFAULT: Patience = { first_event_ms: 300_000, silence_ms: 120_000 };

/** Text, reasoning and arguments of one answer together. Four times what a million tokens of output come to; more is a stream gone mad. */
const ANSWER_CHARACTERS_MAX = 16 * 1024 * 1024;

/** What was delivered so far, by kind. */
export interface Delivered {
  readonly text: string;
  readonly reasoning: string;
  readonly tool_call: string;
}

export interface Attempt {
  /** Aborted as soon as nobody listens any more. */
  readonly signal: AbortSignal;
  /** True from the first event of the answer on: from then on the provider may bill. */
  readonly has_begun: boolean;
  readonly delivered: Delivered;
  /** An event of the answer has arrived, whatever is in it. */
  heard(): void;
  /** Hands on a piece of the answer. An empty one is nothing. */
  deliver(kind: ModelDelta["kind"], text: string): void;
  /** Output tokens that nobody was shown but that are billed, such as a tool's name; for the estimate. */
  countHidden(tokens: number): void;
  /** What the provider has said of its usage so far; later words replace earlier ones, class by class. */
  report(usage: Partial<Omit<Usage, "estimated">>): void;
  /** The usage known so far, with estimates for what was not reported. */
  usageSoFar(): Usage;
  failed(error: ModelError): ModelOutcome;
}

export interface AttemptContext {
  readonly provider: string;
  readonly world: World;
  readonly log: Log;
  readonly patience: Patience;
  /** Never to be seen in an error. */
  readonly secrets: readonly string[];
  /** Replaces the estimate where usage is known exactly at any moment. */
  usageOf?(): Usage;
}

/** Runs `work` as one attempt. `work` translates; what it throws is a mistake in our translation and comes out as `provider_error`. */
export function runAttempt(
  context: AttemptContext,
  request: ModelRequest,
  io: CallIo,
  work: (attempt: Attempt) => Promise<ModelOutcome>,
): Promise<ModelOutcome> {
  const { world } = context;
  const fail = (error: ModelError, usage?: Usage): ModelOutcome => ({ kind: "failed", error, ...(usage === undefined ? {} : { usage }), text: delivered.text });
  const delivered = { text: "", reasoning: "", tool_call: "" };
  if (io.signal.aborted) return Promise.resolve(fail(modelError("cancelled", "the call was cancelled before it was made")));

  return new Promise((resolve) => {
    const inner = new AbortController();
    let settled = false;
    let has_begun = false;
    let last_heard_ms = world.monotonic_ms();
    let hidden_tokens = 0;
    let reported: Partial<Omit<Usage, "estimated">> = {};
    let stopWatch: () => void = () => undefined;

    const settle = (outcome: ModelOutcome) => {
      if (settled) return;
      settled = true;
      stopWatch();
      io.signal.removeEventListener("abort", onAbort);
      inner.abort();
      resolve(outcome);
    };
    const usageSoFar = () => context.usageOf?.() ?? estimatedUsage(request, delivered, hidden_tokens, reported);
    const onAbort = () => settle(fail(modelError("cancelled", "the call was cancelled"), usageSoFar()));

    const watch = () => {
      const patience_ms = has_begun ? context.patience.silence_ms : context.patience.first_event_ms;
      const left_ms = last_heard_ms + patience_ms - world.monotonic_ms();
      if (left_ms > 0) stopWatch = world.after(left_ms, watch);
      else settle(fail(modelError("timeout", `${context.provider} was silent for ${patience_ms} ms`), usageSoFar()));
    };

    const attempt: Attempt = {
      signal: inner.signal,
      get has_begun() {
        return has_begun;
      },
      delivered,
      heard() {
        last_heard_ms = world.monotonic_ms();
        if (has_begun) return;
        has_begun = true;
        // The watch that was set for the first event may be longer than the one for silence.
        stopWatch();
        if (!settled) watch();
      },
      deliver(kind, text) {
        if (settled || text === "") return;
        if (delivered.text.length + delivered.reasoning.length + delivered.tool_call.length + text.length > ANSWER_CHARACTERS_MAX) {
          settle(fail(modelError("provider_error", `the answer is longer than ${ANSWER_CHARACTERS_MAX} characters`), usageSoFar()));
          return;
        }
        delivered[kind] += text;
        try {
          io.on_delta({ kind, text });
        } catch (error) {
          context.log.error("a listener of model deltas threw", { provider: context.provider, ...errorFields(error) });
          settle(fail(modelError("provider_error", "the listener of the answer failed"), usageSoFar()));
        }
      },
      countHidden(tokens) {
        hidden_tokens += tokens;
      },
      report(usage) {
        reported = { ...reported, ...usage };
      },
      usageSoFar,
      failed: (error) => fail(error, has_begun ? usageSoFar() : undefined),
    };

    io.signal.addEventListener("abort", onAbort, { once: true });
    io.meter?.(usageSoFar);
    watch();
    // Begun in a microtask, so that a synchronous throw is a rejection like any other.
    Promise.resolve()
      .then(() => work(attempt))
      .then(settle, (error: unknown) => {
        if (settled) return; // What an abandoned attempt still says is of no interest.
        context.log.error("a model attempt threw", { provider: context.provider, ...errorFields(withoutSecrets(error)) });
        settle(attempt.failed(modelError("provider_error", error instanceof Error ? error.message : String(error), context.secrets)));
      });

    function withoutSecrets(error: unknown): Error {
      return new Error(modelError("provider_error", error instanceof Error ? `${error.name}: ${error.message}` : String(error), context.secrets).message);
    }
  });
}

function estimatedUsage(request: ModelRequest, delivered: Delivered, hidden_tokens: number, reported: Partial<Omit<Usage, "estimated">>): Usage {
  return {
    input_tokens: reported.input_tokens ?? estimateInputTokens(request),
    cache_read_tokens: reported.cache_read_tokens ?? 0,
    cache_write_tokens: reported.cache_write_tokens ?? 0,
    // A provider's early count is behind what it has sent since, so the larger of the two.
    output_tokens: Math.max(reported.output_tokens ?? 0, estimateTokens(delivered.text) + estimateTokens(delivered.tool_call) + hidden_tokens),
    reasoning_tokens: Math.max(reported.reasoning_tokens ?? 0, estimateTokens(delivered.reasoning)),
    estimated: true,
  };
}
