// Goal: no provider is called before the budget said yes, and what is asked of a model is what is held for it: MM1 to MM4.
// Method: model-money over the real budget machine, without a bus: the client below applies commands to a core, and may be told to be away.
import { describe, expect, test } from "vitest";
import type { CommandClient, CommandOutcome } from "../../actors/client.ts";
import { createModelMoney, noHold } from "../../actors/model-money.ts";
import { EffectFailure, type EffectScope } from "../../actors/performer.ts";
import { createUndecidedRates, type UndecidedMode, type UndecidedRates } from "../../actors/undecided-rates.ts";
import { agentConfig, checkCommand } from "../../protocol/commands.ts";
import { errorBody } from "../../protocol/errors.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { createProviders } from "../../providers/registry.ts";
import type { AttemptEnd } from "../../state-machines/definition.ts";
import { modelCallDues } from "../../state-machines/model-dues.ts";
import { budgetContextOf, TENANT_LEVEL } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { tableGet } from "../../state-machines/budget-table.ts";
import { coreOf } from "../../state-machines/step.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { Drive } from "../state-machines/drive.ts";

const core = coreOf(budgetDefinition);
const REQUEST = { instructions: "one two", messages: [{ role: "user", text: "three four" }], tools: [], max_output_tokens: 50, idempotency_key: "k" } as const;

function ground(limit: number | null, undecided?: UndecidedRates) {
  const world = new VirtualWorld(1);
  const drive = new Drive(core, { tenant: "acme", kind: "budget", id: "main" });
  const said: { type: string; key: string | undefined; body: JsonObject }[] = [];
  let exists = limit !== null;
  let away: CommandOutcome | undefined;
  drive.at_ms = world.now_ms();
  if (limit !== null) drive.create({}).tell("budget.configure", { level: "tenant", limit_usd_micros: limit });
  const client: CommandClient = {
    async command(actor, { type, body, key }) {
      if (type === "budget.create" && exists && away === undefined)
        return { kind: "decided", reply: { ok: true, actor: "", seq: drive.seq, state: drive.at, result: { created: false } } };
      said.push({ type, key, body });
      if (away !== undefined) return away;
      const checked = checkCommand("budget", "control", type, body);
      if (checked.kind === "refused") return { kind: "decided", reply: { ok: false, actor: "", error: checked.error } };
      drive.at_ms = world.now_ms();
      if (!exists) {
        if (type !== "budget.create")
          return { kind: "decided", reply: { ok: false, actor: "", error: errorBody("not_found", `there is no budget '${actor.id}'`) } };
        exists = true;
        drive.create({});
        return { kind: "decided", reply: { ok: true, actor: "", seq: 1, state: "healthy", result: {} } };
      }
      return { kind: "decided", reply: { ok: true, actor: "", seq: drive.seq, state: drive.at, result: drive.tell(type, body as JsonObject) } };
    },
    stop: () => Promise.resolve(),
  };
  const abort = new AbortController();
  const scope = (attempt = 1): EffectScope =>
    ({
      actor: { tenant: "acme", kind: "session", id: "s1" },
      inst: "5:model",
      attempt,
      signal: abort.signal,
      trace: undefined,
      entries: () => Promise.resolve(new Map([[1, { t: "init", type: "session.create", body: { agent: "a", user: "u" }, channel: "command" }]])),
    }) as unknown as EffectScope;
  const money = createModelMoney({
    client,
    world,
    providers: createProviders({ world, log: silentLog }),
    ...(undecided === undefined ? {} : { undecided }),
  });
  const config = (more: JsonObject = {}) => agentConfig.parse({ model: "simulated/echo", ...more });
  /** What becomes of it while time passes. */
  async function passing<T>(work: Promise<T>): Promise<T> {
    let over = false;
    const settled = work.then(
      () => (over = true),
      () => (over = true),
    );
    await world.until(() => over, 200_000);
    await settled;
    return work;
  }
  const begin = (more: JsonObject = {}, attempt = 1) => passing(money.begin({ scope: scope(attempt), config: config(more), request: REQUEST as never }));
  const reserved = () => tableGet(budgetContextOf(drive.view).levels, TENANT_LEVEL)?.reserved_usd_micros;
  return { world, drive, said, money, scope, config, begin, passing, reserved, abort, goAway: (outcome: CommandOutcome | undefined) => void (away = outcome) };
}

const failureOf = async (work: Promise<unknown>): Promise<EffectFailure["effect_error"]> => {
  const error: unknown = await work.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof EffectFailure)) throw new Error(`not refused: ${String(error)}`);
  return error.effect_error;
};

describe("a budget that cannot be asked (AR-F77)", () => {
  const AWAY: CommandOutcome = { kind: "refused", error: errorBody("unavailable", "nobody answers") };
  /** Of a tenant with or without limits; `knows` false: neither its journal nor its keys can be read. */
  function rates(
    mode: UndecidedMode,
    { key_source = "platform", unlimited = true, knows = true }: { key_source?: string; unlimited?: boolean; knows?: boolean } = {},
  ) {
    const went: string[] = [];
    const undecided = createUndecidedRates({
      mode,
      models: { of: () => ({ resolve: () => (knows ? ({ kind: "resolved", key_source } as never) : Promise.reject(new Error("no broker"))) }) },
      standing: { is_unlimited: () => (knows ? Promise.resolve(unlimited) : Promise.reject(new Error("no broker"))) },
      log: silentLog,
      on_went_on: (provider) => void went.push(provider),
    });
    return { undecided, went };
  }

  test.each([
    ["closed", {}],
    ["own_keys", { key_source: "platform" }],
    ["own_keys", { key_source: "tenant", unlimited: false }],
    ["open", { unlimited: false }],
    ["open", { knows: false }],
  ] as const)("UR1, UR2: with %s and %o nothing is called", async (mode, tenant) => {
    const { undecided, went } = rates(mode, tenant);
    const { begin, goAway } = ground(null, undecided);
    goAway(AWAY);
    expect(await failureOf(begin())).toMatchObject({ code: "unavailable", details: { attempts: [], cost_usd_micros: 0 } });
    expect(went).toEqual([]);
  });

  test.each([
    ["own_keys", { key_source: "tenant" }],
    ["open", {}],
  ] as const)("with %s and %o, and no limit anywhere, the call goes on after some seconds, and says that its rate was not decided", async (mode, tenant) => {
    const { undecided, went } = rates(mode, tenant);
    const { begin, goAway, world } = ground(null, undecided);
    goAway(AWAY);
    const before_ms = world.monotonic_ms();
    const call = await begin();
    expect(call.rate_undecided).toBe(true);
    expect(await call.pay("simulated/echo", [])).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect(went).toEqual(["simulated"]);
    expect(world.monotonic_ms() - before_ms).toBeLessThan(10_000);
  });

  test("an agent whose own actions are limited is not let through: nobody could count them", async () => {
    const { begin, goAway } = ground(null, rates("open").undecided);
    goAway(AWAY);
    expect(await failureOf(begin({ limits: { actions: { model_calls: 5 } } }))).toMatchObject({ code: "unavailable" });
  });

  test.each([
    ["closed", { kind: "refused", code: "unavailable" }],
    ["open", { kind: "paid", max_output_tokens: 50 }],
  ] as const)("with %s a further try whose money is held is told %o when only its place in the window cannot be asked for", async (mode, payment) => {
    const { undecided } = rates(mode, { unlimited: false });
    const { begin, goAway, drive, passing } = ground(10_000, undecided);
    drive.tell("budget.configure", { level: "tenant", rates: { simulated: { requests_max: 100, tokens_max: null, window_ms: 60_000 } } });
    const call = await begin();
    expect(call.rate_undecided).toBe(false);
    goAway(AWAY);
    expect(await passing(call.pay("simulated/echo", [{ model: "simulated/echo", cost_usd_micros: 0 }]))).toMatchObject(payment);
    expect(call.rate_undecided).toBe(mode === "open");
  });
});

describe("before a call", () => {
  test("its words in and all the words out it may have are held, under the name of the attempt", async () => {
    const { begin, said, reserved } = ground(10_000);
    const call = await begin();
    expect(said).toMatchObject([
      {
        type: "budget.reserve",
        key: "acme/session/s1/5:model/1",
        body: { session: "s1", agent: "a", user: "u", amount_usd_micros: 504, minimum_usd_micros: 14 },
      },
    ]);
    expect(await call.pay("simulated/echo", [])).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect([reserved(), said.length]).toEqual([504, 1]);
  });

  test("MM2: with less left, the model is asked for as many words as are paid for", async () => {
    const { begin } = ground(104);
    const call = await begin();
    expect(await call.pay("simulated/echo", [])).toEqual({ kind: "paid", max_output_tokens: 10 });
    expect(call.decision).toMatchObject({ kind: "degrade", reason: "projected_overrun", applied: false });
  });

  test("too little for one word is refused with the numbers, and the failure says that nothing was called", async () => {
    const failure = await failureOf(ground(13).begin());
    expect(failure).toMatchObject({
      code: "budget_exceeded",
      details: { attempts: [], cost_usd_micros: 0, refusal: { limit_usd_micros: 13, minimum_usd_micros: 14, may_return: false } },
    });
  });

  test("the plan for hard times is asked for beside, and followed", async () => {
    const { begin, reserved } = ground(100);
    const call = await begin({ degrade: { model: "simulated/script", max_output_tokens: 5 } });
    expect(call).toMatchObject({ model: "simulated/script", request: { max_output_tokens: 5 }, decision: { kind: "degrade", applied: true } });
    expect(await call.pay("simulated/script", [])).toEqual({ kind: "paid", max_output_tokens: 5 });
    expect(reserved()).toBe(54);
  });

  test("a model without a price is refused under a limit, and called without one", async () => {
    const more = { model: "openai/no-such-model" };
    expect(await failureOf(ground(1_000_000).begin(more))).toMatchObject({ code: "price_unknown" });
    const { begin } = ground(null);
    expect(await (await begin(more)).pay("openai/no-such-model", [])).toEqual({ kind: "paid", max_output_tokens: 50 });
  });

  test("MM5: a budget that is not there yet is made before anything is reserved, once", async () => {
    const { begin, said } = ground(null);
    await begin();
    expect(said.map(({ type }) => type)).toEqual(["budget.create", "budget.reserve"]);
    await begin();
    expect(said.map(({ type }) => type)).toEqual(["budget.create", "budget.reserve", "budget.reserve"]);
  });

  test("MM1: a budget that does not answer refuses in the end, and is believed when it answers in time", async () => {
    const gone = ground(10_000);
    gone.goAway({ kind: "refused", error: errorBody("unavailable", "the bus cannot take it now") });
    const began_ms = gone.world.monotonic_ms();
    expect(await failureOf(gone.begin())).toMatchObject({ code: "unavailable" });
    expect(gone.world.monotonic_ms() - began_ms).toBeGreaterThan(50_000);
    expect(gone.world.monotonic_ms() - began_ms).toBeLessThan(62_000);

    const back = ground(10_000);
    back.goAway({ kind: "refused", error: errorBody("unavailable", "the bus cannot take it now") });
    back.world.after(5_000, () => back.goAway(undefined));
    expect(await (await back.begin()).pay("simulated/echo", [])).toMatchObject({ kind: "paid" });
    expect(new Set(back.said.flatMap(({ body }) => body["hold"] ?? [])).size).toBe(1);
  });

  test("MM3: money that others hold is waited for, and had when it comes back", async () => {
    const { begin, drive, world } = ground(510);
    drive.tell("budget.reserve", {
      hold: "acme/session/s2/5:model/1",
      session: "s2",
      agent: "a",
      model: "simulated/echo",
      amount_usd_micros: 500,
      minimum_usd_micros: 500,
    });
    world.after(3_000, () => {
      drive.at_ms = world.now_ms();
      drive.tell("budget.settle", { hold: "acme/session/s2/5:model/1", cost_usd_micros: 6 });
    });
    const call = await begin();
    expect(await call.pay("simulated/echo", [])).toEqual({ kind: "paid", max_output_tokens: 50 });
    const never = ground(510);
    never.drive.tell("budget.reserve", {
      hold: "acme/session/s2/5:model/1",
      session: "s2",
      agent: "a",
      model: "simulated/echo",
      amount_usd_micros: 500,
      minimum_usd_micros: 500,
    });
    expect(await failureOf(never.begin())).toMatchObject({ code: "budget_exceeded", details: { refusal: { may_return: true } } });
    expect(never.world.monotonic_ms()).toBeLessThan(31_000);
  });

  test("a call that is called off while it waits is not made", async () => {
    const { begin, abort, goAway, world } = ground(510);
    goAway({ kind: "refused", error: errorBody("unavailable", "away") });
    world.after(1_000, () => abort.abort());
    expect(await failureOf(begin())).toMatchObject({ code: "cancelled" });
  });
});

describe("a further try", () => {
  test("after one that cost nothing is paid from what is held", async () => {
    const { begin, said } = ground(10_000);
    const call = await begin();
    expect(await call.pay("simulated/echo", [{ model: "simulated/echo", cost_usd_micros: 0 }])).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect(said).toHaveLength(1);
  });

  test("after one that cost something asks for what is missing, as one more part of the same hold", async () => {
    const { begin, said, reserved } = ground(10_000);
    const call = await begin();
    expect(await call.pay("simulated/echo", [{ model: "simulated/echo", cost_usd_micros: 100 }])).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect(said[1]).toMatchObject({ type: "budget.reserve", body: { hold: "acme/session/s1/5:model/1", part: 2, amount_usd_micros: 100 } });
    expect(reserved()).toBe(604);
    expect(
      await call.pay("simulated/script", [
        { model: "simulated/echo", cost_usd_micros: 100 },
        { model: "simulated/echo", cost_usd_micros: 504 },
      ]),
    ).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect(reserved()).toBe(1108);
  });

  test("that nothing is left for is refused, and the first tries are still settled", async () => {
    const { begin, passing, drive, world } = ground(504);
    const call = await begin();
    expect(await passing(call.pay("simulated/echo", [{ model: "simulated/echo", cost_usd_micros: 504 }]))).toMatchObject({
      kind: "refused",
      code: "budget_exceeded",
    });
    expect(call.refusal).toMatchObject({ limit_usd_micros: 504, may_return: false });
    expect(world.monotonic_ms(), "it does not wait for what it holds itself").toBe(0);
    drive.tell("budget.settle", { hold: "acme/session/s1/5:model/1", cost_usd_micros: 504 });
    expect(drive.outcome).toMatchObject({ ok: true, result: { settled: true } });
  });
});

describe("MM4: under a provider's window", () => {
  const rates = { simulated: { requests_max: 3, tokens_max: null, window_ms: 60_000 }, p: { requests_max: 1, tokens_max: null, window_ms: 60_000 } };

  test("each further call has a place of its own, asked for before it is made, also where money is held already", async () => {
    const { begin, passing, drive, said, world } = ground(10_000);
    drive.tell("budget.configure", { level: "tenant", rates });
    const call = await begin();
    const one = { model: "simulated/echo", cost_usd_micros: 0 };
    expect(await call.pay("simulated/echo", [])).toMatchObject({ kind: "paid" });
    expect(said.map(({ type }) => type)).toEqual(["budget.reserve"]);
    expect(await passing(call.pay("simulated/echo", [one]))).toMatchObject({ kind: "paid" });
    expect(await passing(call.pay("simulated/script", [one, one]))).toMatchObject({ kind: "paid" });
    expect(said.slice(1).map(({ type, body }) => [type, body["requests"], body["hold"]])).toEqual([
      ["rate.acquire", 1, "acme/session/s1/5:model/1"],
      ["rate.acquire", 1, "acme/session/s1/5:model/1"],
    ]);
    // The fourth would be one too many, and is waited for no longer than a call waits.
    expect(await passing(call.pay("simulated/echo", [one, one, one]))).toMatchObject({ kind: "refused", code: "rate_limited" });
    expect(call.refusal).toMatchObject({ provider: "simulated", requests: 3, requests_max: 3 });
    expect(world.monotonic_ms()).toBeLessThan(31_000);
    drive.tell("budget.settle", { hold: "acme/session/s1/5:model/1", cost_usd_micros: 0, used: [{ provider: "simulated", requests: 3, tokens: 0 }] });
    expect(drive.told).toContainEqual(expect.objectContaining({ rates_unused: [{ provider: "simulated", requests: 0, tokens: expect.any(Number) }] }));
  });

  test("a model that is passed over leaves its place to the next call of its provider, and without windows nobody asks", async () => {
    const { begin, said } = ground(10_000);
    const call = await begin();
    const one = { model: "simulated/echo", cost_usd_micros: 0 };
    expect(await call.pay("simulated/echo", [one])).toMatchObject({ kind: "paid" });
    expect(said).toHaveLength(1);
    const other = ground(10_000);
    other.drive.tell("budget.configure", { level: "tenant", rates });
    const placed = await other.begin();
    // echo was passed over without a call: script takes the place that was taken for it.
    expect(await placed.pay("simulated/script", [])).toMatchObject({ kind: "paid" });
    expect(other.said).toHaveLength(1);
  });
});

test("what an attempt's calls used goes with its settlement; where one of them is not known, or the attempt was lost, nothing is said of it", () => {
  const call = (model: string, rate_tokens: number | null | undefined): JsonObject => ({
    model,
    purpose: "answer",
    usage: null,
    cost_usd_micros: 0,
    ...(rate_tokens === undefined ? {} : { rate_tokens }),
  });
  const usedOf = (end: AttemptEnd): unknown => {
    const ended = { actor: { tenant: "acme", kind: "session", id: "s1" } as const, inst: "5:model", attempt: 1, input: {}, end };
    return modelCallDues(ended).flatMap((one) => (one.type === "send" ? [one.body["used"]] : []))[0];
  };
  const done = (...attempts: JsonObject[]): AttemptEnd => ({ kind: "done", output: { attempts, cost_usd_micros: 0 } });
  expect(usedOf(done(call("p/m", 7), call("q/m", 5), call("p/n", 3)))).toEqual([
    { provider: "p", requests: 2, tokens: 10 },
    { provider: "q", requests: 1, tokens: 5 },
  ]);
  expect(usedOf(done(call("p/m", 7), call("p/m", null)))).toEqual([{ provider: "p", requests: 2, tokens: null }]);
  expect(usedOf(done(call("p/m", undefined)))).toBeUndefined();
  expect(usedOf(done())).toBeUndefined();
  expect(usedOf({ kind: "lost" })).toBeUndefined();
  expect(usedOf({ kind: "failed", error: { code: "timeout", message: "", details: { attempts: [call("p/m", 0)] } } })).toEqual([
    { provider: "p", requests: 1, tokens: 0 },
  ]);
});

describe("a guardrail's judge", () => {
  const JUDGED = { ...REQUEST, max_output_tokens: 5 };

  test("is paid from the hold of the attempt, as a part of its own, and what it left over pays for the call itself", async () => {
    const { money, scope, said, reserved, passing, config } = ground(10_000);
    const [hold, one] = [noHold(), scope()];
    const made: { model: string; cost_usd_micros: number }[] = [];
    const before = await passing(money.judge({ scope: one, model: "simulated/echo", request: JUDGED as never, hold, made }));
    expect(await before.pay("simulated/echo", made)).toEqual({ kind: "paid", max_output_tokens: 5 });
    expect(reserved()).toBe(54);
    made.push({ model: "simulated/echo", cost_usd_micros: 14 });
    const call = await passing(money.begin({ scope: one, config: config(), request: REQUEST as never, hold, made }));
    expect(await call.pay("simulated/echo", made)).toEqual({ kind: "paid", max_output_tokens: 50 });
    expect(reserved(), "504 for the call, 14 that the judge used").toBe(518);
    made.push({ model: "simulated/echo", cost_usd_micros: 504 });
    const after = await passing(money.judge({ scope: one, model: "simulated/echo", request: JUDGED as never, hold, made }));
    expect(await after.pay("simulated/echo", made)).toEqual({ kind: "paid", max_output_tokens: 5 });
    expect(reserved()).toBe(572);
    expect(said.map(({ key, body }) => [key, body["hold"], body["part"]])).toEqual([
      ["acme/session/s1/5:model/1", "acme/session/s1/5:model/1", undefined],
      ["acme/session/s1/5:model/1+2", "acme/session/s1/5:model/1", 2],
      ["acme/session/s1/5:model/1+3", "acme/session/s1/5:model/1", 3],
    ]);
  });

  test("that the budget does not pay for is not asked, and the refusal has the numbers", async () => {
    const { money, scope, passing } = ground(13);
    expect(await failureOf(passing(money.judge({ scope: scope(), model: "simulated/echo", request: JUDGED as never })))).toMatchObject({
      code: "budget_exceeded",
      details: { attempts: [], refusal: { limit_usd_micros: 13, minimum_usd_micros: 14 } },
    });
  });
});

test("a settlement of a lost attempt is the whole hold, and never less than what had ended is known to have cost", () => {
  const { drive } = ground(10_000);
  const reserve = (n: number): string => {
    const hold = `acme/session/s1/${n}:model/1`;
    drive.tell("budget.reserve", { hold, session: "s1", agent: "a", model: "simulated/echo", amount_usd_micros: 100, minimum_usd_micros: 1 });
    return hold;
  };
  const settled = (): unknown => drive.told.find(({ type }) => type === "budget.settled");
  drive.tell("budget.settle", { hold: reserve(5), cost_usd_micros: null, spent_usd_micros: 40 });
  expect(settled()).toMatchObject({ cost_usd_micros: 100, assumed: true });
  drive.tell("budget.settle", { hold: reserve(7), cost_usd_micros: null, spent_usd_micros: 130 });
  expect(settled()).toMatchObject({ cost_usd_micros: 130, assumed: true });
  expect(drive.told).toContainEqual(expect.objectContaining({ type: "budget.overrun", over_usd_micros: 30 }));
});
