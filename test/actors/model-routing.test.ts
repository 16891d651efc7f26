// Goal: routing keeps MR1 to MR6: what is asked, how often, when, and what is told of it.
// Method: models that answer by a list, in virtual time; each test reads off the order and the times of the calls. Then drawn agents and failures.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import { createCallAccount } from "../../actors/call-account.ts";
import {
  backoffMs,
  FALLBACKS_MAX,
  type Fallbacks,
  MODELS_EXHAUSTED,
  ROUTE_PATIENCE_MS,
  routeModelCall,
  type RouteOutcome,
  TRIES_MAX,
} from "../../actors/model-routing.ts";
import type { Models } from "../../actors/tenant-models.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import type { BreakerBoard } from "../../providers/breaker.ts";
import { MODEL_ERRORS, type ModelErrorCode, type ModelOutcome, NO_USAGE, type Provider } from "../../providers/provider.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

type Say =
  | "ok"
  | "blocked"
  | ModelErrorCode
  | { readonly code: ModelErrorCode; readonly retry_after_ms?: number; readonly said?: string; readonly takes_ms?: number };

interface Ground {
  readonly world: VirtualWorld;
  readonly calls: { readonly model: string; readonly at_ms: number }[];
  readonly delivered: string[];
  /** What the journal heard while it went on. */
  readonly told: (JsonObject & { at_ms: number })[];
  /** What the call last routed has come to. */
  soFar(): JsonObject;
  route(models: { readonly model?: string; readonly fallbacks?: Fallbacks }, signal?: AbortSignal): Promise<RouteOutcome>;
}

/** `a/x: ["overloaded", "ok"]`: the first call of a/x is overloaded, each later one answers. */
function ground(script: Readonly<Record<string, readonly Say[]>>, options: { readonly breakers?: BreakerBoard; readonly world?: VirtualWorld } = {}): Ground {
  const world = options.world ?? new VirtualWorld(7);
  const calls: { model: string; at_ms: number }[] = [];
  const delivered: string[] = [];
  const told: (JsonObject & { at_ms: number })[] = [];
  const ways: { soFar: () => JsonObject } = { soFar: () => ({}) };
  const counts = new Map<string, number>();
  const providerOf = (name: string): Provider => ({
    name,
    async call(request, io): Promise<ModelOutcome> {
      const model = `${name}/${request.model}`;
      const n = counts.get(model) ?? 0;
      counts.set(model, n + 1);
      calls.push({ model, at_ms: world.monotonic_ms() });
      const list = script[model] ?? [];
      const say = list[Math.min(n, list.length - 1)] ?? "ok";
      if (say === "ok") {
        io.on_delta({ kind: "text", text: `from ${model}` });
        return { kind: "completed", text: `from ${model}`, tool_calls: [], stop: "end", usage: { ...NO_USAGE, input_tokens: 3, output_tokens: 2 } };
      }
      if (say === "blocked") return { kind: "completed", text: "", tool_calls: [], stop: "content_filter", usage: { ...NO_USAGE, input_tokens: 3 } };
      const { code, retry_after_ms, said = "", takes_ms = 0 } = typeof say === "string" ? { code: say } : say;
      if (takes_ms > 0) await new Promise<void>((resolve) => void world.after(takes_ms, resolve));
      if (said !== "") io.on_delta({ kind: "text", text: said });
      const error = { code, message: `it is ${code}`, transient: MODEL_ERRORS[code].transient, ...(retry_after_ms === undefined ? {} : { retry_after_ms }) };
      return { kind: "failed", error, text: said, ...(said === "" ? {} : { usage: { ...NO_USAGE, output_tokens: 1 } }) };
    },
  });
  const tenantModels: Models = {
    resolve(model) {
      const [name = "", rest = ""] = model.split("/");
      if (name === "absent") return { kind: "refused", error: { code: "model_unknown", message: "the provider absent has no key here", transient: false } };
      return { kind: "resolved", provider: providerOf(name), model: rest, key_source: "platform", owner: "platform" };
    },
  };
  const breakers = options.breakers ?? createBreakerBoard({ world, log: silentLog, worker: "w" });
  return {
    world,
    calls,
    delivered,
    told,
    soFar: () => ways.soFar(),
    async route({ model = "a/x", fallbacks = {} }, signal = new AbortController().signal) {
      let outcome: RouteOutcome | undefined;
      const account = createCallAccount(
        {
          attempt: 4,
          progress: (one) => void told.push({ at_ms: world.monotonic_ms(), ...one }),
          so_far: (read) => void (ways.soFar = read),
        },
        world,
      );
      const request = { instructions: "", messages: [], tools: [], max_output_tokens: 10, idempotency_key: "k" };
      void routeModelCall(
        { world, models: tenantModels, breakers, account },
        { model, fallbacks, attempt: 4, request },
        { signal, on_delta: ({ text }) => void delivered.push(text) },
      ).then((one) => (outcome = one));
      expect(await world.until(() => outcome !== undefined, 2 * ROUTE_PATIENCE_MS)).toBe(true);
      if (outcome === undefined) throw new Error("it never ended");
      return outcome;
    },
  };
}

const models = (calls: Ground["calls"]) => calls.map((call) => call.model);
const pauses = (calls: Ground["calls"]) => calls.slice(1).map((call, n) => call.at_ms - (calls[n]?.at_ms ?? 0));

test("the back-off doubles from half a second to eight, less up to a quarter at random", () => {
  expect([1, 2, 3, 4, 5, 6, 20].map((tries) => backoffMs(tries, 0))).toEqual([500, 1000, 2000, 4000, 8000, 8000, 8000]);
  expect([1, 2, 5].map((tries) => backoffMs(tries, 1))).toEqual([375, 750, 6000]);
});

describe("one model", () => {
  test("an answer at once is one attempt, with its own usage, times and number", async () => {
    const { route } = ground({ "simulated/echo": ["ok"] });
    expect(await route({ model: "simulated/echo" })).toMatchObject({
      kind: "completed",
      model: "simulated/echo",
      skipped: [],
      attempts: [
        {
          model: "simulated/echo",
          attempt: 4,
          try: 1,
          outcome: "completed",
          stop: "end",
          code: null,
          usage: { input_tokens: 3, output_tokens: 2 },
          cost_usd_micros: 23,
          price_version: expect.stringContaining("simulated"),
          started_at: "2026-01-01T00:00:00.000Z",
          first_token_ms: 0,
        },
      ],
    });
  });

  test("a transient failure is asked again after half a second and a second, less at most a quarter, and no fourth time (MR3)", async () => {
    const { route, calls } = ground({ "a/x": ["overloaded"] });
    const outcome = await route({});
    expect(outcome).toMatchObject({ kind: "failed", code: "overloaded", message: "it is overloaded", transient: true });
    expect(outcome.attempts.map((one) => [one.try, one.code])).toEqual([
      [1, "overloaded"],
      [2, "overloaded"],
      [3, "overloaded"],
    ]);
    const [first = 0, second = 0] = pauses(calls);
    expect(first).toBeGreaterThanOrEqual(375);
    expect(first).toBeLessThanOrEqual(500);
    expect(second).toBeGreaterThanOrEqual(750);
    expect(second).toBeLessThanOrEqual(1000);
    expect(calls.length).toBe(TRIES_MAX);
  });

  test("a provider's wish to stay away is honoured, and one for longer than a turn waits ends it with the wish (MR4)", async () => {
    const waits = ground({ "a/x": [{ code: "rate_limited", retry_after_ms: 7_000 }, "ok"] });
    expect((await waits.route({})).kind).toBe("completed");
    expect(pauses(waits.calls)).toEqual([7_000]);
    const tooLong = ground({ "a/x": [{ code: "rate_limited", retry_after_ms: 3_600_000 }] });
    expect(await tooLong.route({})).toMatchObject({ kind: "failed", code: "rate_limited", retry_after_ms: 3_600_000 });
    expect(tooLong.calls.length).toBe(1);
  });

  test.each<ModelErrorCode>(["invalid_request", "provider_auth", "model_unknown", "content_policy", "context_overflow", "provider_error", "script_failed"])(
    "%s is not asked again",
    async (code) => {
      const { route, calls } = ground({ "a/x": [code] });
      expect(await route({})).toMatchObject({ kind: "failed", code });
      expect(calls.length).toBe(1);
    },
  );

  test("after the first delivered piece nothing is asked again, whoever else is there (MR1)", async () => {
    const { route, calls, delivered } = ground({ "a/x": [{ code: "stream_broken", said: "half an" }], "b/y": ["ok"] });
    const outcome = await route({ fallbacks: { models: ["b/y"] } });
    expect(outcome).toMatchObject({ kind: "failed", code: "stream_broken", attempts: [{ usage: { output_tokens: 1 }, first_token_ms: 0 }] });
    expect(models(calls)).toEqual(["a/x"]);
    expect(delivered).toEqual(["half an"]);
  });

  test("a call that is called off while it waits ends at once", async () => {
    const abort = new AbortController();
    const { route, calls, world } = ground({ "a/x": [{ code: "rate_limited", retry_after_ms: 50_000 }] });
    world.after(1_000, () => abort.abort());
    expect(await route({}, abort.signal)).toMatchObject({ kind: "failed", code: "cancelled" });
    expect(calls.length).toBe(1);
    expect(world.monotonic_ms()).toBe(1_000);
  });
});

describe("chains", () => {
  test("what one model cannot answer the next one does, in order; each call is an attempt of its own (MR2)", async () => {
    const { route, calls } = ground({ "a/x": ["overloaded"], "b/y": ["provider_auth"], "c/z": ["ok"] });
    const outcome = await route({ fallbacks: { models: ["b/y", "c/z"] } });
    expect(outcome).toMatchObject({ kind: "completed", model: "c/z", outcome: { text: "from c/z" } });
    expect(models(calls)).toEqual(["a/x", "a/x", "a/x", "b/y", "c/z"]);
    expect(outcome.attempts.map((one) => [one.model, one.try, one.outcome])).toEqual([
      ["a/x", 1, "failed"],
      ["a/x", 2, "failed"],
      ["a/x", 3, "failed"],
      ["b/y", 4, "failed"],
      ["c/z", 5, "completed"],
    ]);
  });

  test("with another model at hand nobody waits for a long wish (MR4)", async () => {
    const { route, calls } = ground({ "a/x": [{ code: "rate_limited", retry_after_ms: 30_000 }], "b/y": ["ok"] });
    expect(await route({ fallbacks: { models: ["b/y"] } })).toMatchObject({ kind: "completed", model: "b/y" });
    expect(calls).toEqual([
      { model: "a/x", at_ms: 0 },
      { model: "b/y", at_ms: 0 },
    ]);
  });

  test.each([
    ["context_overflow", "big/w"],
    ["content_policy", "mild/v"],
    ["blocked", "mild/v"],
    ["invalid_request", "b/y"],
  ] as const)("%s goes to %s", async (say, model) => {
    const { route, calls } = ground({ "a/x": [say] });
    const fallbacks = { models: ["b/y"], context_overflow: ["big/w"], content_policy: ["mild/v"] };
    expect(await route({ fallbacks })).toMatchObject({ kind: "completed", model });
    expect(models(calls)).toEqual(["a/x", model]);
  });

  test("a chain for a cause is entered once; without one the cause goes along the common chain", async () => {
    const once = ground({ "a/x": ["context_overflow"], "big/w": ["context_overflow"], "big/u": ["context_overflow"] });
    expect(await once.route({ fallbacks: { models: ["b/y"], context_overflow: ["big/w", "big/u"] } })).toMatchObject({
      kind: "failed",
      code: MODELS_EXHAUSTED,
    });
    expect(models(once.calls)).toEqual(["a/x", "big/w", "big/u"]);
    const common = ground({ "a/x": ["context_overflow"] });
    expect(await common.route({ fallbacks: { models: ["b/y"] } })).toMatchObject({ kind: "completed", model: "b/y" });
  });

  test("an exhausted chain is one error that lists its causes (MR6)", async () => {
    const { route } = ground({ "a/x": ["overloaded"], "b/y": ["provider_auth"] });
    const outcome = await route({ fallbacks: { models: ["b/y", "absent/z"] } });
    expect(outcome).toMatchObject({ kind: "failed", code: MODELS_EXHAUSTED, skipped: [{ model: "absent/z", code: "model_unknown" }] });
    for (const cause of ["a/x overloaded (3 tries)", "b/y provider_auth", "absent/z model_unknown"])
      expect(outcome).toMatchObject({ message: expect.stringContaining(cause) });
    expect(outcome.attempts.length).toBe(4);
  });

  test("a script that fails is the caller's own and falls back on nobody", async () => {
    const { route, calls } = ground({ "simulated/script": ["script_failed"] });
    expect(await route({ model: "simulated/script", fallbacks: { models: ["b/y"] } })).toMatchObject({ code: "script_failed" });
    expect(calls.length).toBe(1);
  });
});

describe("breakers", () => {
  test("a provider that is down is passed over without a call once its breaker is open, and asked once when the cool-down is over (MR5)", async () => {
    const world = new VirtualWorld(3);
    const breakers = createBreakerBoard({ world, log: silentLog, worker: "w" });
    const first = ground({ "a/x": ["provider_unavailable"] }, { breakers, world });
    const fallbacks = { models: ["b/y"] };
    await first.route({ fallbacks });
    await first.route({ fallbacks });
    // The fifth failure trips it, so the sixth try is not made.
    expect(models(first.calls).filter((model) => model === "a/x").length).toBe(5);
    expect(breakers.readings()).toMatchObject([
      { provider: "a", owner: "platform", state: "open" },
      { provider: "b", state: "closed" },
    ]);

    const second = ground({ "a/x": ["provider_unavailable"] }, { breakers, world });
    const outcome = await second.route({ fallbacks });
    expect(outcome).toMatchObject({ kind: "completed", model: "b/y", skipped: [{ model: "a/x", code: "circuit_open" }] });
    expect(outcome.attempts.length).toBe(1);
    expect(models(second.calls)).toEqual(["b/y"]);

    await world.advance(5_000);
    const third = ground({ "a/x": ["ok"] }, { breakers, world });
    expect(await third.route({ fallbacks })).toMatchObject({ kind: "completed", model: "a/x" });
    expect(breakers.readings()[0]).toMatchObject({ state: "closed" });
  });

  test("the last model waits for its breaker's cool-down and is asked then", async () => {
    const world = new VirtualWorld(3);
    const breakers = createBreakerBoard({ world, log: silentLog, worker: "w" });
    const down = ground({ "a/x": ["provider_unavailable"] }, { breakers, world });
    await down.route({});
    await down.route({});
    const before_ms = world.monotonic_ms();
    const up = ground({ "a/x": ["ok"] }, { breakers, world });
    expect(await up.route({})).toMatchObject({ kind: "completed", model: "a/x" });
    expect(world.monotonic_ms() - before_ms).toBeGreaterThan(0);
    // The second call that failed had sent a probe of its own, so the cool-down has doubled.
    expect(world.monotonic_ms() - before_ms).toBeLessThanOrEqual(10_000);
  });

  test("a caller's own faults trip nothing", async () => {
    const world = new VirtualWorld(3);
    const breakers = createBreakerBoard({ world, log: silentLog, worker: "w" });
    const { route } = ground({ "a/x": ["invalid_request"], "b/y": ["rate_limited"] }, { breakers, world });
    for (let n = 0; n < 12; n++) await route({ model: n % 2 === 0 ? "a/x" : "b/y" });
    expect(breakers.readings().map((reading) => reading.state)).toEqual(["closed", "closed"]);
  });
});

test("in any agent and any failures: bounded calls, none after an answer or a delivered piece, none before a wish is over", async () => {
  const say = fc.oneof(
    fc.constantFrom<Say>("ok", "blocked", "overloaded", "provider_unavailable", "invalid_request", "context_overflow", "content_policy", "timeout"),
    fc.record({ code: fc.constantFrom<ModelErrorCode>("rate_limited", "overloaded"), retry_after_ms: fc.integer({ min: 0, max: 90_000 }) }),
    fc.record({ code: fc.constant<ModelErrorCode>("stream_broken"), said: fc.constantFrom("", "piece") }),
    fc.record({ code: fc.constant<ModelErrorCode>("timeout"), takes_ms: fc.integer({ min: 1, max: 300_000 }) }),
  );
  const name = fc.constantFrom("a/x", "b/y", "c/z", "d/w", "absent/v");
  const chain = fc.option(fc.array(name, { maxLength: FALLBACKS_MAX }), { nil: undefined });
  const ends = { completed: 0, failed: 0, exhausted: 0 };
  await fc.assert(
    fc.asyncProperty(
      fc.record({ model: name, fallbacks: fc.record({ models: chain, context_overflow: chain, content_policy: chain }) }),
      fc.dictionary(fc.constantFrom("a/x", "b/y", "c/z", "d/w"), fc.array(say, { minLength: 1, maxLength: 4 })),
      async (order, script) => {
        const { route, calls, delivered } = ground(script);
        const outcome = await route(order);
        ends[outcome.kind] += 1;
        if (outcome.kind === "failed" && outcome.code === MODELS_EXHAUSTED) ends.exhausted += 1;
        expect(calls.length).toBeLessThanOrEqual(TRIES_MAX * (1 + 3 * FALLBACKS_MAX));
        expect(outcome.attempts.map((one) => one.model)).toEqual(models(calls));
        expect(outcome.attempts.map((one) => one.try)).toEqual(calls.map((_, n) => n + 1));
        expect(delivered.length).toBeLessThanOrEqual(1);
        const told = outcome.attempts.findIndex((one) => one.first_token_ms !== null);
        if (told >= 0) expect(told).toBe(outcome.attempts.length - 1);
        if (outcome.kind === "completed") expect(outcome.attempts.at(-1)).toMatchObject({ outcome: "completed", model: outcome.model });
      },
    ),
    { numRuns: 300 },
  );
  expect(Math.min(ends.completed, ends.failed, ends.exhausted)).toBeGreaterThan(10);
});

describe("what is told while it goes on", () => {
  test("MR7: the journal hears of each failure before the wait for the next try, of what comes next, and of what is left", async () => {
    const { route, told, calls } = ground({ "a/x": [{ code: "rate_limited", retry_after_ms: 2_000 }, "overloaded", "overloaded"], "b/y": ["ok"] });
    await route({ fallbacks: { models: ["b/y"], content_policy: ["c/z"] } });
    expect(told).toMatchObject([
      { at_ms: calls[0]?.at_ms, attempts: [{ try: 1 }], next: { model: "a/x", try: 2, wait_ms: 2_000, code: "rate_limited", left: ["b/y", "c/z"] } },
      { at_ms: calls[1]?.at_ms, attempts: [{ try: 1 }, { try: 2 }], next: { model: "a/x", try: 3, code: "overloaded" } },
      { at_ms: calls[2]?.at_ms, attempts: [{ try: 1 }, { try: 2 }, { try: 3 }], next: { model: "b/y", try: 1, wait_ms: 0, left: ["c/z"] } },
    ]);
  });

  test("an answer at once tells the journal nothing on the way", async () => {
    const { route, told } = ground({ "a/x": ["ok"] });
    await route({});
    expect(told).toEqual([]);
  });

  test("MR5: the only model is waited for while probes of others fail, however often its breaker is looked at, and no longer than the patience", async () => {
    const world = new VirtualWorld(3);
    const breakers = createBreakerBoard({ world, log: silentLog, worker: "w" });
    const down = ground({ "a/x": ["provider_unavailable"] }, { breakers, world });
    await down.route({});
    await down.route({});
    // Whoever sends the probes takes a minute for each, and hears nothing good four times: far more looks than a model has tries.
    const probing = ground({ "a/x": [...Array.from({ length: 4 }, () => ({ code: "timeout", takes_ms: 40_000 }) as const), "ok"] }, { breakers, world });
    const before_ms = world.monotonic_ms();
    const probe = probing.route({});
    await world.advance(1);
    const waiting = ground({ "a/x": ["ok"] }, { breakers, world });
    const outcome = await waiting.route({});
    expect(outcome).toMatchObject({ kind: "completed", model: "a/x" });
    expect(outcome.skipped, "said once").toEqual([{ model: "a/x", code: "circuit_open", message: expect.any(String), purpose: "answer" }]);
    expect(waiting.calls.length).toBe(1);
    expect(world.monotonic_ms() - before_ms).toBeGreaterThan(40_000);
    expect(world.monotonic_ms() - before_ms).toBeLessThan(ROUTE_PATIENCE_MS);
    expect(waiting.told.length, "once for the cool-down, once for the wait").toBeLessThanOrEqual(3);
    expect(waiting.told.some(({ wait }) => (wait as JsonObject | undefined)?.["for"] === "breaker")).toBe(true);
    await probe;
  });

  test("a breaker that never closes is given up with the patience, by its name", async () => {
    const world = new VirtualWorld(3);
    const shut: BreakerBoard = { admit: () => Promise.resolve({ kind: "refused", retry_after_ms: 5_000 }), readings: () => [] };
    const { route, calls } = ground({}, { breakers: shut, world });
    const before_ms = world.monotonic_ms();
    expect(await route({})).toMatchObject({ kind: "failed", code: "provider_unavailable", attempts: [], skipped: [{ code: "circuit_open" }] });
    expect(calls).toEqual([]);
    expect(world.monotonic_ms() - before_ms).toBeGreaterThan(ROUTE_PATIENCE_MS - 10_000);
    expect(world.monotonic_ms() - before_ms).toBeLessThanOrEqual(ROUTE_PATIENCE_MS);
  });

  test("a breaker that is waited for is named", async () => {
    const world = new VirtualWorld(3);
    const breakers = createBreakerBoard({ world, log: silentLog, worker: "w" });
    const down = ground({ "a/x": ["provider_unavailable"] }, { breakers, world });
    await down.route({});
    await down.route({});
    const up = ground({ "a/x": ["ok"] }, { breakers, world });
    await up.route({});
    expect(up.told).toMatchObject([{ attempts: [], skipped: [{ code: "circuit_open", purpose: "answer" }], next: { model: "a/x", code: "circuit_open" } }]);
  });

  test("MR7: asked in the middle of a call, it tells the tries that ended and what the one in flight has used, priced", async () => {
    const { route, world, soFar } = ground({ "simulated/echo": ["overloaded", { code: "timeout", said: "one two three four", takes_ms: 60_000 }] });
    let heard: JsonObject | undefined;
    world.after(30_000, () => (heard = soFar()));
    await route({ model: "simulated/echo" });
    expect(heard).toMatchObject({
      model: "simulated/echo",
      attempts: [
        { try: 1, outcome: "failed", code: "overloaded", usage: null },
        {
          try: 2,
          outcome: "failed",
          code: "cancelled",
          purpose: "answer",
          key_source: "platform",
          usage: { estimated: true },
          cost_usd_micros: expect.any(Number),
        },
      ],
    });
    expect(heard?.["attempts"]).toHaveLength(2);
    expect((soFar()["attempts"] as JsonObject[]).map((one) => one["code"])).toEqual(["overloaded", "timeout"]);
  });

  test("between two tries nothing is in flight: what is told is what ended", async () => {
    const { route, world, soFar } = ground({ "a/x": ["overloaded", "ok"] });
    let heard: JsonObject | undefined;
    world.after(100, () => (heard = soFar()));
    await route({});
    expect(heard).toMatchObject({ attempts: [{ try: 1, code: "overloaded" }] });
    expect(heard?.["attempts"]).toHaveLength(1);
  });
});
