// model-money: asks the tenant's budget before each call of a model, and says what may then be asked of the model.
//
//   begin ──budget.reserve──▶ granted: the model as wanted, or as the agent's plan for hard times has it; with as many output tokens as are paid for
//      │                  └─▶ refused: the turn ends with the budget's own code and numbers
//      └─ pay, before every call: within what is held, or one more part for a further try
//   act ── before a tool: within what its agent may do by itself, counted in the budget
//   spend ─ before a tool that has a price: a hold of its own, settled with the commit that ends its attempt (state-machines/tool-dues.ts)
//   judge ─ the same for a call beside it, in which a guardrail has a text judged: one more part of the same hold
//
// The hold is settled by the session itself (state-machines/model-dues.ts), with the commit that ends the attempt.
//
// Invariants:
//   MM1. No provider is called before its cost at most is held. A budget that cannot be asked refuses; it never means "go on", except where an operator
//        has said that rates may stay undecided and no limit applies (undecided-rates.ts).
//   MM2. The output tokens asked of a model cost no more than what is held for them.
//   MM3. Waiting has an end: for money that others hold, a slot, a window, or a budget that moves to another owner.
//   MM5. Nothing is reserved before the budget is there. A reservation that is on its way when its call is called off may come after the settlement;
//        a budget that was there refuses it then, one that was not has refused the settlement, and would keep the hold.
//   MM4. Where the tenant has windows, each call of a model has a place in its provider's: one that fits what is held asks for its place alone.
import { assert } from "../protocol/assert.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import { MONEY_USD_MICROS_MAX } from "../protocol/commands.ts";
import { actorPath, budgetActor } from "../protocol/ids.ts";
import type { Entry } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { ROOM_PATIENCE_MS } from "../protocol/limits.ts";
import { type Priority, PRIORITY_DEFAULT } from "../protocol/priority.ts";
import type { World } from "../protocol/world.ts";
import { estimateInputTokens } from "../providers/estimate.ts";
import { affordableOutputTokens, costAtMost } from "../providers/prices.ts";
import type { ModelRequest } from "../providers/provider.ts";
import type { Providers } from "../providers/registry.ts";
import { holdId } from "../state-machines/budget-holds.ts";
import type { ModelWaitFor } from "../state-machines/model-wait.ts";
import { MODEL_PATIENCE_MS } from "../state-machines/session-model-calls.ts";
import { toolAsModel, type ToolPrice } from "../state-machines/tool-dues.ts";
import type { CallAccount } from "./call-account.ts";
import type { CallPool } from "./call-pool.ts";
import type { CommandClient } from "./client.ts";
import { EffectFailure, type EffectScope } from "./performer.ts";
import type { SlotCaller } from "./slot-caller.ts";
import type { UndecidedRates } from "./undecided-rates.ts";

type Actions = NonNullable<NonNullable<AgentConfig["limits"]>["actions"]>;
type Request = Omit<ModelRequest, "model">;

/** One call that was made, as far as money is concerned. */
interface Made {
  readonly model: string;
  readonly cost_usd_micros: number | null;
}

export type Payment =
  | { readonly kind: "paid"; readonly max_output_tokens: number }
  | { readonly kind: "refused"; readonly code: string; readonly message: string };

/** The money of one attempt of one model call. */
export interface CallMoney {
  readonly model: string;
  readonly request: Request;
  /** What was decided and by which numbers, for the journal; undefined where no limit applies. */
  readonly decision: JsonObject | undefined;
  /** The numbers of the last refusal. */
  readonly refusal: JsonObject | undefined;
  /** A call of it went on without a place in its provider's window, because the budget could not be asked. */
  readonly rate_undecided?: boolean;
  /** Before a call of `model`, after those that were made. */
  pay(model: string, made: readonly Made[]): Promise<Payment>;
}

/** The one hold of an attempt of a model call: what all its calls are paid from. */
export interface AttemptHold {
  /** Parts that were granted. */
  parts: number;
  held_usd_micros: number;
  /** Places taken in windows, by provider: each for one call. */
  readonly places: Map<string, number>;
  /** Does the tenant have windows? */
  rated: boolean;
}
export const noHold = (): AttemptHold => ({ parts: 0, held_usd_micros: 0, places: new Map(), rated: false });

interface OneCall {
  readonly scope: EffectScope;
  readonly request: Request;
  /** Absent: nothing was called in this attempt before, and nothing else will be. */
  readonly hold?: AttemptHold;
  /** The calls of this attempt that were made before. */
  readonly made?: readonly Made[];
  /** Where it waits among the tenant's own calls. */
  readonly priority?: Priority;
  /** Hears what it waits for. */
  readonly waits?: CallAccount["waits"];
}

/** An action of an agent that is no model call, and that its agent's limits count. */
interface OneAction {
  readonly scope: EffectScope;
  readonly config: AgentConfig;
}

/** A call of a tool that costs something. */
interface OneSpending extends OneAction {
  readonly name: string;
  readonly price: ToolPrice;
}

export interface ModelMoney {
  /** Decides and reserves. Throws EffectFailure when the budget refuses or cannot be asked. */
  begin(call: OneCall & { readonly config: AgentConfig }): Promise<CallMoney>;
  /** The same for a call that is no answer of the agent: nothing makes it cheaper. */
  judge(call: OneCall & { readonly model: string }): Promise<CallMoney>;
  /** Before a tool is called: nothing where its agent has no limit of that. Throws EffectFailure when the limit is reached, or nobody can count. */
  act(action: OneAction): Promise<void>;
  /** Before a tool is called that has a price: it is held. Throws EffectFailure when the budget refuses or cannot be asked. */
  spend(spending: OneSpending): Promise<void>;
}

/**
 * How long one stands in the line for a slot: a batch of work may well take minutes until its turn. Half of what a session waits for a model
 * call (MODEL_PATIENCE_MS), so that the call has time to be made, and a line that does not move is named in the failure.
 */
const LINE_PATIENCE_MS = 5 * 60_000;
assert(LINE_PATIENCE_MS <= MODEL_PATIENCE_MS / 2, "who had to stand in line has as long for the call itself");
/** And how long a budget that does not answer: a take-over takes seconds, an election of the broker eight. */
const ASK_PATIENCE_MS = 60_000;
const ASK_ONCE_MS = 10_000;
/** Where the call may go on without an answer: longer than a budget's owner needs on its worst day, and no take-over. */
const UNDECIDED_PATIENCE_MS = 5_000;
/** Beyond so many tenants each is asked once more whether its budget is there. */
const KNOWN_MAX = 10_000;
const BACKOFF_MS = [100, 200, 400, 800, 1000] as const;

interface Ask {
  readonly model: string;
  readonly amount_usd_micros: number | null;
  readonly minimum_usd_micros: number;
  readonly [key: string]: Json;
}

interface Refused {
  readonly code: string;
  readonly message: string;
  readonly details: JsonObject;
}
/** Money, with a slot and a place in a window; or another place alone. */
type Question = "budget.reserve" | "rate.acquire" | "action.acquire";
type Asker = Pick<OneCall, "scope" | "priority" | "waits"> & {
  /** How long a budget that does not answer is asked; ASK_PATIENCE_MS when absent. */
  readonly patience_ms?: number;
};
type Answer = { readonly kind: "granted"; readonly result: JsonObject } | { readonly kind: "refused"; readonly refused: Refused };

const limitsSaid = ({ model_calls, tool_calls, period }: Actions): JsonObject => ({
  period,
  ...(model_calls === undefined ? {} : { model_calls }),
  ...(tool_calls === undefined ? {} : { tool_calls }),
});

/** What is waited for by who was refused so. */
function waitOf({ code, details }: Refused): { readonly for: ModelWaitFor; readonly provider?: string } {
  const provider = details["provider"];
  if (code === "rate_limited") return { for: "rate", ...(typeof provider === "string" ? { provider } : {}) };
  return { for: code === "overloaded" ? "slot" : "money" };
}

/** What a call costs at most, and what it costs with a single token of answer: with less there is no call. */
function askOf(model: string, input_tokens: number, max_output_tokens: number): Ask {
  const most = costAtMost(model, { input_tokens, max_output_tokens });
  const least = costAtMost(model, { input_tokens, max_output_tokens: 1 });
  if (most.kind === "unknown" || least.kind === "unknown") return { model, amount_usd_micros: null, minimum_usd_micros: 0 };
  return {
    model,
    amount_usd_micros: Math.min(most.cost_usd_micros, MONEY_USD_MICROS_MAX),
    minimum_usd_micros: Math.min(least.cost_usd_micros, MONEY_USD_MICROS_MAX),
  };
}

/** What an agent's plan for hard times makes of a call. */
export function degradedCall(config: AgentConfig, request: Request): { readonly model: string; readonly request: Request } | undefined {
  const plan = config.degrade;
  if (plan === undefined) return undefined;
  const { tools } = plan;
  return {
    model: plan.model ?? config.model,
    request: {
      ...request,
      max_output_tokens: Math.min(request.max_output_tokens, plan.max_output_tokens ?? request.max_output_tokens),
      ...(tools === undefined ? {} : { tools: request.tools.filter(({ name }) => tools.includes(name)) }),
    },
  };
}

export function createModelMoney({
  client,
  world,
  providers,
  slots,
  pool,
  undecided,
}: {
  readonly client: CommandClient;
  readonly world: World;
  readonly providers: Providers;
  /** Absent: whose turn it is shows only when it asks again. */
  readonly slots?: SlotCaller;
  /** Counts the calls that stand in line for a slot. */
  readonly pool?: Pick<CallPool, "inLine">;
  /** Absent: what cannot be decided is refused. */
  readonly undecided?: UndecidedRates;
}): ModelMoney {
  /** MM5. Tenants whose budget is there: it never leaves. */
  const known = new Set<string>();

  /** As the model's own provider counts, where it can say; else rather too many. */
  function inputTokensOf(model: string, request: Request): number {
    const resolved = providers.resolve(model);
    return (resolved.kind === "resolved" ? resolved.provider.countInputTokens?.(request) : undefined) ?? estimateInputTokens(request);
  }

  /** So long, or until what is waited for is said to be there. */
  function wait(scope: EffectScope, ms: number, listen?: (wake: () => void) => (() => void) | undefined): Promise<void> {
    return new Promise((resolve, reject) => {
      const cancelled = (): void => {
        stop();
        deaf?.();
        reject(new EffectFailure("cancelled", "the call was cancelled before it was made"));
      };
      const go_on = (): void => {
        stop();
        deaf?.();
        scope.signal.removeEventListener("abort", cancelled);
        resolve();
      };
      const stop = world.after(ms, go_on);
      const deaf = listen?.(go_on);
      scope.signal.addEventListener("abort", cancelled, { once: true });
      if (scope.signal.aborted) cancelled();
    });
  }

  /** Asks until there is an answer that stands. MM1, MM3 */
  async function reserve({ scope, priority = PRIORITY_DEFAULT, waits, patience_ms }: Asker, type: Question, body: JsonObject, key: string): Promise<Answer> {
    let leaveLine: (() => void) | undefined;
    const call = { tenant: scope.actor.tenant, actor: actorPath(scope.actor), priority };
    try {
      const asker = { scope, ...(waits === undefined ? {} : { waits }), ...(patience_ms === undefined ? {} : { patience_ms }) };
      return await ask(asker, type, body, key, () => (leaveLine ??= pool?.inLine(call)));
    } finally {
      leaveLine?.();
    }
  }

  async function ask(
    { scope, waits, patience_ms = ASK_PATIENCE_MS }: Asker,
    type: Question,
    body: JsonObject,
    key: string,
    inLine: () => void,
  ): Promise<Answer> {
    const { tenant } = scope.actor;
    const budget = budgetActor(tenant);
    const began_ms = world.monotonic_ms();
    for (let tries = 0; ; tries++) {
      if (scope.signal.aborted) throw new EffectFailure("cancelled", "the call was cancelled before it was made");
      const pause_ms = BACKOFF_MS[Math.min(tries, BACKOFF_MS.length - 1)]! * (0.75 + world.random() / 2);
      const waited_ms = world.monotonic_ms() - began_ms;
      // A refusal that may end is an outcome like any other, so a repeat asks under a key of its own; the hold's id keeps it one hold.
      const is_known = known.has(tenant);
      const question = is_known ? { type, body, key: tries === 0 ? key : `${key}~${tries}` } : { type: "budget.create", body: {} };
      const outcome = await client.command(
        budget,
        { ...question, channel: "control", trace: scope.trace },
        { patience_ms: Math.min(ASK_ONCE_MS, patience_ms) },
      );
      if (!is_known && outcome.kind === "decided" && outcome.reply.ok) {
        if (known.size >= KNOWN_MAX) known.clear();
        known.add(tenant); // MM5
        tries -= 1;
        continue;
      }
      if (outcome.kind === "decided" && outcome.reply.ok) {
        const refused = outcome.reply.result["refused"] as unknown as Refused | undefined;
        if (refused === undefined) return { kind: "granted", result: outcome.reply.result };
        const may_end = refused.code === "overloaded" || refused.code === "rate_limited" || refused.details["may_return"] === true;
        const retry_after_ms = refused.details["retry_after_ms"];
        const wait_ms = Math.max(pause_ms, typeof retry_after_ms === "number" ? retry_after_ms : 0);
        // Who stands in line knows that it moves: he may wait longer than who only hopes.
        const stands = refused.code === "overloaded" && typeof refused.details["ahead"] === "number";
        if (!may_end || waited_ms + wait_ms > (stands ? LINE_PATIENCE_MS : ROOM_PATIENCE_MS)) return { kind: "refused", refused };
        if (stands) inLine();
        const until_ms = world.now_ms() + (stands ? LINE_PATIENCE_MS : ROOM_PATIENCE_MS) - waited_ms;
        waits?.({
          ...waitOf(refused),
          until_ms,
          ...(stands ? {} : { again_ms: world.now_ms() + wait_ms }),
          message: refused.message,
          numbers: refused.details,
        });
        const provider = refused.code === "rate_limited" ? refused.details["provider"] : undefined;
        await wait(scope, wait_ms, (wake) => {
          if (stands) return slots?.listen(String(body["hold"]), wake);
          return typeof provider === "string" ? slots?.listenWindow(scope.actor.tenant, provider, wake) : undefined;
        });
        continue;
      }
      const error = outcome.kind === "decided" && !outcome.reply.ok ? outcome.reply.error : outcome.kind === "refused" ? outcome.error : undefined;
      assert(error !== undefined, "what is not granted has its reason");
      if (error.code === "not_found") known.delete(tenant);
      const passes = error.code === "unavailable" || error.code === "overloaded" || error.code === "internal" || error.code === "not_found";
      if (!passes || world.monotonic_ms() - began_ms + pause_ms > patience_ms) {
        const code = passes ? "unavailable" : error.code;
        return { kind: "refused", refused: { code, message: `the budget cannot be asked: ${error.message}`, details: error.details ?? {} } };
      }
      waits?.({ for: "budget", until_ms: world.now_ms() + patience_ms - waited_ms, message: error.message });
      await wait(scope, pause_ms);
    }
  }

  async function whoseIs(scope: EffectScope): Promise<{ readonly agent: string; readonly user?: string }> {
    const init: Entry | undefined = (await scope.entries([1])).get(1);
    assert(init?.t === "init", "a journal begins with init");
    return init.body as { agent: string; user?: string };
  }

  async function open(
    { scope, request, hold: kept = noHold(), made: made_before = [], priority = PRIORITY_DEFAULT, waits }: OneCall,
    wanted_model: string,
    cheaper: ReturnType<typeof degradedCall>,
    actions?: Actions,
  ): Promise<CallMoney> {
    const { agent, user } = await whoseIs(scope);
    const hold = holdId(scope.actor, scope.inst, scope.attempt);
    const asker = { scope, priority, ...(waits === undefined ? {} : { waits }) };
    const who = { hold, session: scope.actor.id, agent, priority, ...(user === undefined ? {} : { user }) };
    const costOf = (calls: readonly Made[]): number => calls.reduce((sum, one) => sum + (one.cost_usd_micros ?? 0), 0);
    /** What is held and not used up by calls that have ended. */
    const leftAfter = (calls: readonly Made[]): number => Math.max(0, kept.held_usd_micros - costOf(calls));
    const left_before = leftAfter(made_before);
    const beyond = (ask: Ask): Ask => ({
      model: ask.model,
      amount_usd_micros: ask.amount_usd_micros === null ? null : Math.max(0, ask.amount_usd_micros - left_before),
      minimum_usd_micros: Math.max(0, ask.minimum_usd_micros - left_before),
    });
    const asked = askOf(wanted_model, inputTokensOf(wanted_model, request), request.max_output_tokens);
    const degraded = cheaper === undefined ? undefined : askOf(cheaper.model, inputTokensOf(cheaper.model, cheaper.request), cheaper.request.max_output_tokens);
    const providerOf = (model: string): string => model.slice(0, model.indexOf("/"));
    const rateOf = (model: string, one: Request): JsonObject => ({
      provider: providerOf(model),
      tokens: inputTokensOf(model, one) + one.max_output_tokens,
      returns: true,
    });
    const hasPlace = (model: string, calls: readonly Made[]): boolean => {
      const provider = providerOf(model);
      return !kept.rated || calls.filter((one) => providerOf(one.model) === provider).length < (kept.places.get(provider) ?? 0);
    };
    const placed = (model: string): void => void kept.places.set(providerOf(model), (kept.places.get(providerOf(model)) ?? 0) + 1);
    let questions = 0;

    /** UR1: the budget was not there to ask, and it was said that this may go on. */
    let rate_undecided = false;
    const wentOn = (answer: Answer, may: boolean, model: string): boolean => {
      if (!may || answer.kind === "granted" || answer.refused.code !== "unavailable") return false;
      undecided?.wentOn(scope.actor.tenant, model);
      rate_undecided = true;
      return true;
    };
    const mayGoOn = (model: string, what: "held" | "all"): Promise<boolean> => undecided?.mayGoOn(scope.actor.tenant, model, what) ?? Promise.resolve(false);
    const askerFor = (may: boolean): Asker => ({ ...asker, ...(may ? { patience_ms: UNDECIDED_PATIENCE_MS } : {}) });

    /** Asks for one more part of the hold. */
    const part = async (body: JsonObject, may_go_on = false): Promise<Answer> => {
      const number = kept.parts + 1;
      const key = number === 1 ? hold : `${hold}+${number}`;
      const answer = await reserve(askerFor(may_go_on), "budget.reserve", { ...who, ...body, ...(number === 1 ? {} : { part: number }) }, key);
      if (answer.kind === "granted") {
        kept.parts = number;
        kept.held_usd_micros += Number(answer.result["granted_usd_micros"]);
        kept.rated = answer.result["rated"] === true;
        placed(String(answer.result["model"]));
      }
      return answer;
    };

    /** MM4 */
    const place = async (model: string): Promise<Answer> => {
      questions += 1;
      const { returns: _, ...rate } = rateOf(model, order.request);
      const may = await mayGoOn(model, "held");
      const key = `${hold}+place${kept.parts}.${calls_before}.${questions}`;
      const answer = await reserve(askerFor(may), "rate.acquire", { ...rate, requests: 1, hold }, key);
      if (answer.kind === "granted") placed(model);
      return wentOn(answer, may, model) ? { kind: "granted", result: {} } : answer;
    };

    const may_go_on = actions?.model_calls === undefined && (await mayGoOn(wanted_model, "all"));
    const body = {
      ...beyond(asked),
      ...(cheaper === undefined || degraded === undefined ? {} : { degraded: { ...beyond(degraded), rate: rateOf(cheaper.model, cheaper.request) } }),
      rate: rateOf(wanted_model, request),
      ...(actions?.model_calls === undefined ? {} : { actions: limitsSaid(actions) }),
    };
    const first = await part(body, may_go_on);
    if (wentOn(first, may_go_on, wanted_model)) {
      // No limit applies to any call of the tenant, so none of this attempt asks for more.
      const pay = (): Promise<Payment> => Promise.resolve({ kind: "paid", max_output_tokens: request.max_output_tokens });
      return { model: wanted_model, request, decision: undefined, refusal: undefined, rate_undecided, pay };
    }
    if (first.kind === "refused") {
      const { code, message, details } = first.refused;
      // Nothing was called: `attempts` says so, and the hold that may be there is settled with nothing.
      throw new EffectFailure(code, message, { model: wanted_model, attempts: [], refusal: details, usage: null, cost_usd_micros: 0, price_version: null });
    }
    const is_degraded = first.result["choice"] === "degraded" && cheaper !== undefined;
    const order = is_degraded ? cheaper : { model: wanted_model, request };
    const priced = (is_degraded ? degraded : asked)?.amount_usd_micros !== null;
    const calls_before = made_before.length;
    let refusal: JsonObject | undefined;
    const decision = first.result["decision"] as JsonObject | undefined;

    /** MM2 */
    const paid = (model: string, left: number): Payment => {
      const bounds = { input_tokens: inputTokensOf(model, order.request), max_output_tokens: order.request.max_output_tokens };
      const tokens = affordableOutputTokens(model, bounds, left);
      if (tokens === undefined) return { kind: "refused", code: "budget_exceeded", message: "what is held does not pay for a single token of answer" };
      return { kind: "paid", max_output_tokens: tokens };
    };

    // A call that is called off is refused here like any other: who routes is told by its signal, and nothing is thrown at it.
    const cancelled = (error: unknown): Answer => {
      if (error instanceof EffectFailure)
        return { kind: "refused", refused: { code: error.effect_error.code, message: error.effect_error.message, details: {} } };
      throw error;
    };
    const refusedBy = ({ code, message, details }: Refused): Payment => {
      refusal = details;
      return { kind: "refused", code, message };
    };

    return {
      model: order.model,
      request: order.request,
      decision: first.result["limited"] === true || decision?.["kind"] === "degrade" ? decision : undefined,
      get refusal() {
        return refusal;
      },
      get rate_undecided() {
        return rate_undecided;
      },
      async pay(model, made) {
        const ask = askOf(model, inputTokensOf(model, order.request), order.request.max_output_tokens);
        const left = leftAfter(made);
        if (made.length === calls_before && model === order.model)
          return priced ? paid(model, left) : { kind: "paid", max_output_tokens: order.request.max_output_tokens };
        if (ask.amount_usd_micros !== null && ask.amount_usd_micros <= left) {
          const answer = hasPlace(model, made) ? undefined : await place(model).catch(cancelled);
          return answer?.kind === "refused" ? refusedBy(answer.refused) : paid(model, left);
        }
        const more = {
          model,
          amount_usd_micros: ask.amount_usd_micros === null ? null : ask.amount_usd_micros - left,
          minimum_usd_micros: Math.max(0, ask.minimum_usd_micros - left),
        };
        const answer = await part({ ...more, rate: rateOf(model, order.request) }).catch(cancelled);
        if (answer.kind === "refused") return refusedBy(answer.refused);
        return ask.amount_usd_micros === null ? { kind: "paid", max_output_tokens: order.request.max_output_tokens } : paid(model, leftAfter(made));
      },
    };
  }

  return {
    begin: (call) => open(call, call.config.model, degradedCall(call.config, call.request), call.config.limits?.actions),
    judge: (call) => open(call, call.model, undefined),
    async act({ scope, config }) {
      const limits = config.limits?.actions;
      if (limits?.tool_calls === undefined) return;
      const action = holdId(scope.actor, scope.inst, scope.attempt);
      const { agent } = await whoseIs(scope);
      const answer = await reserve({ scope }, "action.acquire", { action, agent, kind: "tool_calls", limits: limitsSaid(limits) }, action);
      if (answer.kind === "refused") throw new EffectFailure(answer.refused.code, answer.refused.message, answer.refused.details);
    },
    async spend({ scope, config, name, price: { usd_micros, category } }) {
      const hold = holdId(scope.actor, scope.inst, scope.attempt);
      const { agent, user } = await whoseIs(scope);
      const priority = config.priority ?? PRIORITY_DEFAULT;
      const who = { hold, session: scope.actor.id, agent, priority, ...(user === undefined ? {} : { user }) };
      const ask: Ask = { model: toolAsModel(name), amount_usd_micros: usd_micros, minimum_usd_micros: usd_micros };
      const answer = await reserve({ scope, priority }, "budget.reserve", { ...who, ...ask, category }, `${hold}+tool`);
      if (answer.kind === "refused") throw new EffectFailure(answer.refused.code, answer.refused.message, { ...answer.refused.details, cost_usd_micros: 0 });
    },
  };
}
