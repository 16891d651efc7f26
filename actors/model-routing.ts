// model-routing: one answer for a turn out of the models an agent may use: which is asked, how often, and which comes next.
//
//   the model ──transient, before the first token──▶ the same model again, up to TRIES_MAX, with back-off
//             ──still no answer, or a failure that repeating does not mend──▶ the next model of the chain ──▶ … ──▶ exhausted
//             ──context_overflow / content_policy──▶ the chain for that, if there is one
//
// Invariants, each a test in test/actors/model-routing.test.ts:
//   MR1. After the first delivered piece nothing is asked again: the answer is what came, or the failure is told.
//   MR2. Each call is one attempt with its own usage, cost and times, in the order in which they were made.
//   MR3. A model is tried at most TRIES_MAX times per place in a chain, a chain has at most FALLBACKS_MAX places beside the first, and chains are changed at most
//        once for each cause: the number of calls is bounded. No wait and no further call begins after ROUTE_PATIENCE_MS.
//   MR4. A provider's wish to stay away is honoured: never asked before it is over. If the wish is long and another model is there, that is asked instead.
//   MR5. An open breaker is not a call, and no try: the model is passed over, or waited for when it is the last: until it is asked or the patience is over
//        (ROUTE_PATIENCE_MS, the call's own time), however often the breaker is looked at. That is said once, in `skipped`.
//   MR6. When more than one model could have answered and none did, the error is `models_exhausted` and lists the causes; otherwise it is the model's own.
//   MR7. Whoever stops a call hears what it has used so far, the call in flight included; and the journal hears of every failure before the next try.
//   MR8. A call whose time was over is told as `timeout`, as its provider's failure; it is not asked again, nor is another model.
//   MR9. Nobody is asked before the actor's owner has looked whether it still is that (EffectScope.permitted): who stood still while it waited for
//        money or a place, and wakes, asks no provider for what another owner has long been answered.
import { assert } from "../protocol/assert.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { type BreakerBoard, verdictOf } from "../providers/breaker.ts";
import { costOf } from "../providers/prices.ts";
import { estimateInputTokens, estimateTokens } from "../providers/estimate.ts";
import { type CallIo, type ModelError, type ModelOutcome, type ModelRequest, NO_USAGE, type Provider, type Usage } from "../providers/provider.ts";
import type { CallAccount } from "./call-account.ts";
import type { ModelAttempt, SkippedModel } from "./model-attempt.ts";
import type { Payment } from "./model-money.ts";
import type { Models } from "./tenant-models.ts";
import { stoppedBy } from "./timed-calls.ts";

export const TRIES_MAX = 3;
/** As the schema of an agent's configuration has it. */
export const FALLBACKS_MAX = 5;
export const BACKOFF_MS_MIN = 500;
export const BACKOFF_MS_MAX = 8_000;
/** Taken off at random, so that workers that failed together do not come back together. */
const JITTER_SHARE = 0.25;
/** What a turn may wait for the last model it has. A provider that wants longer is down for this turn. */
const WAIT_MS_MAX = 60_000;
/** Shorter than a session's patience with a model call (ten minutes), so that a failure is told with its causes. */
export const ROUTE_PATIENCE_MS = 540_000;
assert(BACKOFF_MS_MIN * 2 ** TRIES_MAX <= BACKOFF_MS_MAX, "the cap is for longer rows of tries than ours");

export const MODELS_EXHAUSTED = "models_exhausted";

/** Other models to ask, in order. */
export interface Fallbacks {
  readonly models?: readonly string[] | undefined;
  readonly context_overflow?: readonly string[] | undefined;
  readonly content_policy?: readonly string[] | undefined;
}

export interface Route {
  readonly attempts: readonly ModelAttempt[];
  readonly skipped: readonly SkippedModel[];
  /** Whose outcome it is. */
  readonly model: string;
}

export type RouteOutcome =
  | (Route & { readonly kind: "completed"; readonly outcome: Extract<ModelOutcome, { kind: "completed" }> })
  | (Route & { readonly kind: "failed"; readonly code: string; readonly message: string; readonly transient: boolean; readonly retry_after_ms?: number });

export interface RouteDeps {
  readonly world: World;
  /** Of the attempt of the effect that this route is a part of. */
  readonly account: CallAccount;
  /** Of the tenant: which provider a model's name means, and with whose key. */
  readonly models: Models;
  readonly breakers: BreakerBoard;
  on_attempt?(attempt: ModelAttempt, ms: number): void;
  on_skipped?(skipped: SkippedModel): void;
  /** Asked before each call; what it refuses is not called. Absent: nobody counts money. */
  pay?(model: string, made: readonly ModelAttempt[]): Promise<Payment>;
  /** MR9. Absent: nobody can take the actor away. */
  permitted?(): Promise<boolean>;
}

export interface RouteOrder {
  readonly model: string;
  readonly fallbacks: Fallbacks;
  /** The guardrail that has something judged; absent: the agent's own call. */
  readonly rule?: string;
  /** Of the effect. */
  readonly attempt: number;
  readonly request: Omit<ModelRequest, "model">;
}

const providerOf = (model: string): string => model.slice(0, Math.max(0, model.indexOf("/")));

/** How long to wait before try number `tries + 1` of a model that failed `tries` times. */
export function backoffMs(tries: number, random: number): number {
  return Math.round(Math.min(BACKOFF_MS_MIN * 2 ** (tries - 1), BACKOFF_MS_MAX) * (1 - JITTER_SHARE * random));
}

/** What to do about a trouble with the model at a place of a chain. Pure. */
export type Next =
  | { readonly kind: "again"; readonly wait_ms: number }
  | { readonly kind: "other_chain"; readonly chain: "context_overflow" | "content_policy" }
  | { readonly kind: "next" }
  | { readonly kind: "give_up" };

export interface Trouble {
  readonly code: string;
  readonly transient: boolean;
  readonly retry_after_ms?: number | undefined;
  /** Nothing was called. */
  readonly skipped?: true;
  /** Because the breaker is open. */
  readonly is_open?: true;
}

export function nextAfter(
  trouble: Trouble,
  place: { readonly tries: number; readonly has_next: boolean; readonly other_chains: ReadonlySet<string>; readonly left_ms: number },
  random: number,
): Next {
  if (trouble.code === "cancelled" || trouble.code === "script_failed" || place.left_ms <= 0) return { kind: "give_up" };
  if ((trouble.code === "context_overflow" || trouble.code === "content_policy") && place.other_chains.has(trouble.code))
    return { kind: "other_chain", chain: trouble.code };
  if (trouble.transient && place.tries < TRIES_MAX) {
    const wait_ms = Math.max(backoffMs(Math.max(place.tries, 1), random), trouble.retry_after_ms ?? 0);
    // MR4, MR5: with another model at hand nobody waits longer than a back-off would, nor for a breaker at all.
    const wait_ms_max = place.has_next ? (trouble.skipped === true ? -1 : BACKOFF_MS_MAX) : WAIT_MS_MAX;
    if (wait_ms <= wait_ms_max && wait_ms < place.left_ms) return { kind: "again", wait_ms };
  }
  return place.has_next ? { kind: "next" } : { kind: "give_up" };
}

/** Asks models until one answers or none is left. Never rejects. */
export async function routeModelCall(deps: RouteDeps, order: RouteOrder, io: CallIo): Promise<RouteOutcome> {
  const { world, models, breakers, account } = deps;
  const purpose = order.rule === undefined ? "answer" : "guardrail";
  const attempts: ModelAttempt[] = [];
  const skipped: SkippedModel[] = [];
  const began_ms = world.monotonic_ms();
  const other_chains = new Map<string, readonly string[]>();
  for (const cause of ["context_overflow", "content_policy"] as const) {
    const models = order.fallbacks[cause] ?? [];
    if (models.length > 0) other_chains.set(cause, models.slice(0, FALLBACKS_MAX));
  }
  let chain: readonly string[] = [order.model, ...(order.fallbacks.models ?? []).slice(0, FALLBACKS_MAX)];
  const alternatives = chain.length > 1 || other_chains.size > 0;
  let at = 0;
  let tries = 0;
  /** How often the breaker was found open since something was called, or the place was changed. */
  let looks = 0;

  const skip = (model: string, code: string, message: string): void => {
    const one: SkippedModel = { model, code, message, purpose };
    skipped.push(one);
    account.passedOver(one);
    deps.on_skipped?.(one);
  };

  /** One place's turn: called, or passed over. */
  const ask = async (model: string): Promise<{ outcome: ModelOutcome; delivered: boolean } | (Trouble & { readonly message: string })> => {
    const resolved = await models.resolve(model);
    if (resolved.kind === "refused") {
      const { code, message, transient } = resolved.error;
      skip(model, code, message);
      return { code, message, transient, skipped: true };
    }
    const payment = await deps.pay?.(model, account.attempts);
    if (payment?.kind === "refused") {
      skip(model, payment.code, payment.message);
      return { code: payment.code, message: payment.message, transient: false, skipped: true };
    }
    if (deps.permitted !== undefined && !(await deps.permitted())) return { ...stoppedBy(io.signal), transient: false, skipped: true }; // MR9
    const admission = await breakers.admit({ provider: resolved.provider.name, owner: resolved.owner });
    if (admission.kind === "refused") {
      const message = `the circuit breaker of ${resolved.provider.name} is open`;
      if (looks === 0) skip(model, "circuit_open", message);
      return { code: "provider_unavailable", message, transient: true, retry_after_ms: admission.retry_after_ms, skipped: true, is_open: true };
    }
    const started_ms = world.now_ms();
    const from_ms = world.monotonic_ms();
    let first_token_ms: number | null = null;
    const request = { ...order.request, model: resolved.model, ...(payment === undefined ? {} : { max_output_tokens: payment.max_output_tokens }) };
    const delivered = { text: "", reasoning: "", tool_call: "" };
    let metered = false;
    let usageSoFar = (): Usage => estimatedSoFar(resolved.provider, request, delivered);
    const facts = () =>
      ({
        attempt: order.attempt,
        try: account.attempts.length + 1,
        purpose,
        rule: order.rule ?? null,
        key_source: resolved.key_source,
        started_ms,
        ended_ms: world.now_ms(),
        first_token_ms,
      }) as const;
    // MR7
    account.begun(() => {
      const error: ModelError = { ...stoppedBy(io.signal), transient: false };
      return attemptOf(model, { kind: "failed", error, usage: usageSoFar(), text: "" }, facts());
    });
    const answered = await resolved.provider.call(request, {
      signal: io.signal,
      on_delta(delta) {
        first_token_ms ??= Math.round(world.monotonic_ms() - from_ms);
        if (!metered) delivered[delta.kind] += delta.text;
        io.on_delta(delta);
      },
      meter(usage_so_far) {
        metered = true;
        usageSoFar = usage_so_far;
      },
    });
    const outcome = namedByItsStop(answered, io.signal);
    admission.ended(verdictOf(outcome.kind === "failed" ? outcome.error.code : undefined));
    const ms = world.monotonic_ms() - from_ms;
    const attempt = attemptOf(model, outcome, facts());
    attempts.push(attempt);
    account.ended(attempt);
    deps.on_attempt?.(attempt, ms);
    return { outcome, delivered: first_token_ms !== null };
  };

  for (;;) {
    const model = chain[at];
    assert(model !== undefined, "a chain is left before its end is passed");
    const asked = await ask(model);
    const is_open = !("outcome" in asked) && asked.is_open === true;
    looks = is_open ? looks + 1 : 0;
    tries += is_open ? 0 : 1;
    let trouble: Trouble & { readonly message: string };
    if ("outcome" in asked) {
      const { outcome, delivered } = asked;
      const blocked =
        outcome.kind === "completed" && !delivered && (outcome.stop === "content_filter" || outcome.stop === "refusal") && other_chains.has("content_policy");
      if (outcome.kind === "completed" && !blocked) return { kind: "completed", outcome, attempts, skipped, model };
      const error: ModelError =
        outcome.kind === "failed" ? outcome.error : { code: "content_policy", message: `the answer was withheld: ${outcome.stop}`, transient: false };
      if (delivered) return failedRoute(error, model); // MR1
      trouble = error;
    } else {
      trouble = asked;
    }
    if (io.signal.aborted) return failedRoute({ ...stoppedBy(io.signal), transient: false }, model); // MR8
    const left_ms = began_ms + ROUTE_PATIENCE_MS - world.monotonic_ms();
    const next = nextAfter(trouble, { tries, has_next: at + 1 < chain.length, other_chains: new Set(other_chains.keys()), left_ms }, world.random());
    const heard = (of: string, wait_ms: number): void => {
      const { code, message } = trouble;
      const left = [...chain.slice(at + 1), ...[...other_chains.values()].flat()];
      account.next({ model: of, try: tries + 1, wait_ms, code: trouble.is_open === true ? "circuit_open" : code, message, purpose, left });
    };
    switch (next.kind) {
      case "again":
        // A breaker that is looked at again is a wait that goes on: told once, or the journal would grow by it.
        if (looks > 1) account.waits({ for: "breaker", provider: providerOf(model), until_ms: world.now_ms() + left_ms, message: trouble.message });
        else heard(model, next.wait_ms);
        if (await waited(next.wait_ms)) break;
        return failedRoute({ ...stoppedBy(io.signal), transient: false }, model);
      case "next":
        at += 1;
        tries = 0;
        looks = 0;
        heard(chain[at] ?? model, 0);
        break;
      case "other_chain":
        chain = other_chains.get(next.chain) ?? [];
        other_chains.delete(next.chain); // MR3
        at = 0;
        tries = 0;
        looks = 0;
        heard(chain[at] ?? model, 0);
        break;
      case "give_up":
        return failedRoute(trouble, model);
    }
  }

  function failedRoute(last: Trouble & { readonly message: string }, model: string): RouteOutcome {
    const exhausted = alternatives && !io.signal.aborted && new Set([...attempts, ...skipped].map((one) => one.model)).size > 1;
    const delivered = attempts.some((attempt) => attempt.first_token_ms !== null);
    const named = exhausted && !delivered; // MR6: an answer that broke off is its own model's failure.
    return {
      kind: "failed",
      code: named ? MODELS_EXHAUSTED : last.code,
      message: named ? `no model answered: ${causesOf(attempts, skipped)}` : last.message,
      transient: last.transient,
      ...(last.retry_after_ms === undefined ? {} : { retry_after_ms: last.retry_after_ms }),
      attempts,
      skipped,
      model,
    };
  }

  /** False when the call was called off meanwhile. */
  function waited(ms: number): Promise<boolean> {
    return new Promise((resolve) => {
      const end = (): void => {
        stop();
        io.signal.removeEventListener("abort", end);
        resolve(!io.signal.aborted);
      };
      const stop = world.after(ms, end);
      io.signal.addEventListener("abort", end, { once: true });
      if (io.signal.aborted) end();
    });
  }
}

/** A provider only sees that it was told to stop; why, the signal says. */
function namedByItsStop(outcome: ModelOutcome, signal: AbortSignal): ModelOutcome {
  if (outcome.kind !== "failed" || outcome.error.code !== "cancelled" || !signal.aborted) return outcome;
  return { ...outcome, error: { ...outcome.error, ...stoppedBy(signal) } };
}

/** What an unfinished call has used, by our own count, of a provider that keeps no meter. */
function estimatedSoFar(provider: Provider, request: ModelRequest, delivered: { text: string; reasoning: string; tool_call: string }): Usage {
  return {
    ...NO_USAGE,
    input_tokens: provider.countInputTokens?.(request) ?? estimateInputTokens(request),
    output_tokens: estimateTokens(delivered.text) + estimateTokens(delivered.tool_call),
    reasoning_tokens: estimateTokens(delivered.reasoning),
    estimated: true,
  };
}

interface Facts extends Pick<ModelAttempt, "attempt" | "try" | "purpose" | "rule" | "key_source" | "first_token_ms"> {
  readonly started_ms: number;
  readonly ended_ms: number;
}

function attemptOf(model: string, outcome: ModelOutcome, facts: Facts): ModelAttempt {
  const cost = outcome.usage === undefined ? undefined : costOf(model, outcome.usage, facts.started_ms);
  const priced = cost?.kind === "priced" ? cost : undefined;
  return {
    model,
    attempt: facts.attempt,
    try: facts.try,
    purpose: facts.purpose,
    category: facts.purpose === "guardrail" ? "guardrail" : "llm",
    rule: facts.rule,
    key_source: facts.key_source,
    outcome: outcome.kind,
    stop: outcome.kind === "completed" ? outcome.stop : null,
    code: outcome.kind === "failed" ? outcome.error.code : null,
    message: outcome.kind === "failed" ? outcome.error.message : null,
    usage: outcome.usage ?? null,
    cost_usd_micros: priced?.cost_usd_micros ?? null,
    rate_tokens: rateTokensOf(outcome.usage),
    price_version: priced?.price_version ?? null,
    started_at: timestamp(facts.started_ms),
    ended_at: timestamp(facts.ended_ms),
    first_token_ms: facts.first_token_ms,
  };
}

/** Every token of it, however it is billed. An estimate may be too low, so it is not taken for what was used. */
function rateTokensOf(usage: Usage | undefined): number | null {
  if (usage === undefined) return 0; // The provider never began.
  if (usage.estimated === true) return null;
  return usage.input_tokens + usage.output_tokens + usage.cache_read_tokens + usage.cache_write_tokens + usage.reasoning_tokens;
}

/** Each model once, with its last trouble and how often it was tried. */
function causesOf(attempts: readonly ModelAttempt[], skipped: readonly SkippedModel[]): string {
  const causes = new Map<string, { code: string; tries: number }>();
  for (const { model, code } of skipped) causes.set(model, { code, tries: 0 });
  for (const { model, code, stop } of attempts) causes.set(model, { code: code ?? stop ?? "failed", tries: (causes.get(model)?.tries ?? 0) + 1 });
  return [...causes].map(([model, { code, tries }]) => `${model} ${code}${tries > 1 ? ` (${tries} tries)` : ""}`).join(", ");
}
