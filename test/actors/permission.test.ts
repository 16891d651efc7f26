// Goal: nothing is done that is not permitted, what is not known is not permitted, and a running session feels a change within a second.
// Method: every effect of every machine held against the declarations; a whole host on the in-memory bus with simulated models, on which a
// tenant changes what is permitted, with guardrails and critical changes told as they reach the journal; initialisation with a fault injected
// into each of its steps, in virtual time.
import { describe, expect, test } from "vitest";
import { createAdmission } from "../../actors/admission.ts";
import { createCommandClient } from "../../actors/client.ts";
import { createDirectory } from "../../actors/directory.ts";
import { frozenConfig, initSteps, type InitSteps, loadConfiguration } from "../../actors/effects/load-configuration.ts";
import { EffectFailure, type EffectScope } from "../../actors/performer.ts";
import { createPerformers } from "../../actors/performers.ts";
import { createGate, EFFECT_DECLARATIONS, gated, watchPermissions } from "../../actors/permission.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost } from "../../actors/shard-host.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { agentConfig } from "../../protocol/commands.ts";
import { type ActorAddress, tenantActor } from "../../protocol/ids.ts";
import { type ActorEvent, decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { hashOf, type JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import { createProviders } from "../../providers/registry.ts";
import { realWorld } from "../../roles/real-world.ts";
import { cores, definitions } from "../../state-machines/kinds.ts";
import { INIT_STEPS, type InitStep } from "../../state-machines/session-context.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const log = silentLog;

describe("declarations", () => {
  test("G1: every effect of every machine is declared, and nothing else is", () => {
    const effects = Object.values(definitions).flatMap(({ effects: its }) => Object.keys(its));
    expect(effects.length).toBeGreaterThan(2);
    expect(Object.keys(EFFECT_DECLARATIONS).sort()).toEqual([...new Set(effects)].sort());
    for (const declaration of Object.values(EFFECT_DECLARATIONS)) if (declaration.kind === "none") expect(declaration.why).toMatch(/\w+ \w+/);
  });

  test("G1: an effect that is not declared is not performed", () => {
    expect(() => gated({ pass: async () => undefined }, { call_home: async () => null })).toThrow(/the effect 'call_home' declares/);
  });

  test("G2: an effect of a session that froze no configuration is refused, whatever the tenant permits", async () => {
    const record = { state: "active", policy: { default: "allow" }, grants: {} };
    const gate = createGate({ directory: { tenant: async () => record } as never, world: new VirtualWorld(1) });
    const scope = { actor: { tenant: "acme", kind: "session", id: "s1" }, signal: new AbortController().signal, entries: async () => new Map() } as never;
    const passing = gate.pass({ kind: "actions", of: () => [], code: "forbidden" }, { config_seq: 0 }, scope);
    await expect(passing).rejects.toThrow("the session has no configuration, so nothing is permitted");
  });

  test("a model call declares every model that it may come to ask", () => {
    const declaration = EFFECT_DECLARATIONS["call_model"];
    if (declaration?.kind !== "actions") throw new Error("a model call acts");
    const config = agentConfig.parse({
      model: "a/1",
      fallbacks: { models: ["a/2"], context_overflow: ["a/3"], content_policy: ["a/4"] },
      degrade: { model: "a/5" },
      guardrails: [{ name: "j", on: "input", kind: "judge", model: "a/6", policy: "p" }],
    });
    expect(declaration.of({}, { config } as never).map(({ name }) => name)).toEqual(["a/1", "a/2", "a/3", "a/4", "a/5", "a/6"]);
  });
});

// ── a whole host ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface House {
  readonly world: World;
  /** Messages of the journal of one session. */
  journal(session: string): Promise<JournalMessage[]>;
  events(session: string): Promise<ActorEvent[]>;
  tenant(type: string, body: JsonObject): Promise<JsonObject>;
  say(session: string, type: string, body: JsonObject): Promise<JsonObject>;
  /** Waits until the session told an event that fits. */
  told(session: string, type: string, fits?: (event: ActorEvent) => boolean): Promise<ActorEvent>;
}

async function house({ steps, world = realWorld() }: { steps?: (real: InitSteps) => InitSteps; world?: World } = {}): Promise<House> {
  const broker = createMemoryBroker({ world, shards: 1 });
  const bus = broker.connect("worker");
  const restorer = createRestorer({ bus, cores, log });
  const directory = createDirectory({ bus, restorer, world, log });
  const providers = createProviders({ world, log });
  const performers = createPerformers({ world, directory, providers });
  const real = initSteps(directory, world);
  let commits = 0;
  const host = createShardHost({
    bus,
    world,
    log,
    cores,
    restorer,
    performers: steps === undefined ? performers : { ...performers, load_configuration: loadConfiguration(directory, world, steps(real)) },
    worker: "w1",
    next_commit_id: () => `w1.${commits++}`,
    may_act: () => true,
    on_conflict: async () => "mine",
    admit: createAdmission({ directory, providers }),
  });
  await host.take(0, 1, { worker: null, reason: "first" });
  const client = createCommandClient({ bus, world });
  atEndOfFile(async () => {
    await client.stop();
    await host.stop();
    await directory.stop();
    await bus.close();
  });
  const command = async (actor: ActorAddress, type: string, body: JsonObject): Promise<JsonObject> => {
    const outcome = await client.command(actor, { type, body, channel: "control" }, { patience_ms: 10_000 });
    if (outcome.kind !== "decided" || !outcome.reply.ok) throw new Error(`${type}: ${JSON.stringify(outcome)}`);
    return outcome.reply.result;
  };
  const journal = async (session: string): Promise<JournalMessage[]> => {
    const messages: JournalMessage[] = [];
    for await (const stored of bus.read("EVENTS", `tenant.acme.session.${session}.event`, 1)) messages.push(decodeJournal(stored.data));
    return messages;
  };
  const events = async (session: string): Promise<ActorEvent[]> => (await journal(session)).flatMap((message) => message.events);
  const tenant = (type: string, body: JsonObject): Promise<JsonObject> => command(tenantActor("acme"), type, body);
  await tenant("tenant.create", {});
  return {
    world,
    journal,
    events,
    tenant,
    say: (session, type, body) => command({ tenant: "acme", kind: "session", id: session }, type, body),
    async told(session, type, fits = () => true) {
      for (let tries = 0; tries < 2_500; tries += 1) {
        const found = (await events(session)).find((event) => event.type === type && fits(event));
        if (found !== undefined) return found;
        await new Promise((resolve) => setTimeout(resolve, 10));
      }
      throw new Error(`${session} never told ${type}: ${JSON.stringify(await events(session))}`);
    },
  };
}

const agent = (more: JsonObject = {}): JsonObject => ({
  agent: "a",
  config: agentConfig.parse({ model: "simulated/script", tools: ["now", "wait_ms"], ...more }) as unknown as JsonObject,
});
const script = (...steps: JsonObject[]): JsonObject => ({ content: JSON.stringify(steps) });
const ofTurn = (turn: number) => (event: ActorEvent) => event["turn"] === turn;

describe("in a running host", () => {
  test("G3: a tool that the tenant denies is not offered, and a model that names it hears no: journaled as denied", async () => {
    const { tenant, say, told, journal } = await house();
    await tenant("tenant.configure", { deny: ["tool:now"] });
    await tenant("agent.put", agent());
    await say("s1", "session.create", { agent: "a" });
    await say("s1", "message.send", script({ call: "now", args: {} }, { say: "done" }));
    expect(await told("s1", "tool.denied")).toMatchObject({ turn: 1, name: "now", code: "denied" });
    await told("s1", "turn.completed");
    const frozen = (await journal("s1")).flatMap(({ entries }) => entries).find((entry) => entry.t === "done" && entry.inst.endsWith(":configuration"));
    expect(frozen).toMatchObject({ output: { config: { tools: ["wait_ms"] }, denied_tools: ["now"], permissions: { default: "allow", deny: ["tool:now"] } } });
  });

  test("G3: a tool that is denied while the turn runs is refused at its execution", async () => {
    const { tenant, say, told } = await house();
    await tenant("agent.put", agent());
    await say("s1", "session.create", { agent: "a" });
    await say("s1", "message.send", script({ call: "wait_ms", args: { ms: 300 } }, { say: "now" }, { call: "now", args: {} }, { say: "done" }));
    await told("s1", "tool.started");
    await tenant("tenant.configure", { deny: ["tool:now"] });
    expect(await told("s1", "tool.denied")).toMatchObject({ name: "now", code: "denied", message: "tool:now is denied by the rule 'tool:now'" });
    await told("s1", "turn.completed");
  });

  test("a default of deny permits what a role of the agent was granted, and nothing else", async () => {
    const { tenant, say, told } = await house();
    await tenant("tenant.configure", { default: "deny" });
    await tenant("grant.put", { role: "worker", allow: ["model:simulated/*", "tool:now"] });
    await tenant("agent.put", agent({ roles: ["worker"] }));
    await tenant("agent.put", { ...agent(), agent: "nobody" });
    await say("s1", "session.create", { agent: "a" });
    await say("s1", "message.send", script({ call: "now", args: {} }, { call: "wait_ms", args: { ms: 1 } }, { say: "done" }));
    expect(await told("s1", "tool.denied")).toMatchObject({ name: "wait_ms" });
    expect(await told("s1", "tool.completed")).toMatchObject({ name: "now" });
    await say("s2", "session.create", { agent: "nobody" });
    await say("s2", "message.send", script({ say: "hello" }));
    expect(await told("s2", "turn.failed")).toMatchObject({
      reason: "forbidden",
      message: "model:simulated/script is allowed by no grant, and the tenant's default is to deny",
    });
  });

  test("a suspended tenant's running turn makes no further call", async () => {
    const { tenant, say, told } = await house();
    await tenant("agent.put", agent());
    await say("s1", "session.create", { agent: "a" });
    await say("s1", "message.send", script({ call: "wait_ms", args: { ms: 200 } }, { say: "never said" }));
    await told("s1", "tool.started");
    await tenant("tenant.suspend", { reason: "unpaid" });
    expect(await told("s1", "turn.failed")).toMatchObject({ reason: "forbidden", message: "the tenant is suspended" });
  });

  test("a critical change reaches a live session at its next turn within a second, a hibernated one on waking; one that is not critical reaches none", async () => {
    const { tenant, say, told, events, world } = await house();
    await tenant("agent.put", agent({ model: "simulated/echo" }));
    for (const session of ["live", "asleep"]) {
      await say(session, "session.create", { agent: "a" });
      await say(session, "message.send", { content: "one" });
      await told(session, "turn.completed");
    }
    await say("asleep", "session.hibernate", {});
    await tenant("agent.put", agent({ model: "simulated/echo", max_output_tokens: 7 }));
    await say("live", "message.send", { content: "two" });
    await told("live", "turn.completed", ofTurn(2));
    expect((await events("live")).filter(({ type }) => type === "session.initializing")).toHaveLength(1);

    await tenant("agent.put", { ...agent({ model: "simulated/script" }), critical: true });
    for (const session of ["live", "asleep"]) {
      const changed_ms = world.monotonic_ms();
      const turn = (await say(session, "message.send", script({ say: "by the new model" })))["turn"] as number;
      expect(await told(session, "message.completed", ofTurn(turn))).toMatchObject({ content: "by the new model" });
      expect(world.monotonic_ms() - changed_ms).toBeLessThan(1_000);
      const told_events = await events(session);
      expect(told_events.filter(({ type }) => type === "session.initializing")).toHaveLength(2);
      expect(told_events.find(({ type, code }) => type === "model.failed" && code === "configuration_changed")).toMatchObject({ turn, cost_usd_micros: 0 });
      expect(told_events.filter(({ type, model }) => type === "model.completed" && model === "simulated/script")).toHaveLength(1);
    }
    await say("live", "message.send", script({ say: "again" }));
    await told("live", "turn.completed", ofTurn(4));
    expect((await events("live")).filter(({ type }) => type === "session.initializing")).toHaveLength(2);
  });

  test("a blocked message ends its turn with the rule's name, and a blocked answer voids what was streamed", async () => {
    const { tenant, say, told, journal } = await house();
    const guardrails = [
      { name: "no_swearing", on: "input", kind: "pattern", pattern: "dr+at", ignore_case: true },
      { name: "no_keys", on: "output", kind: "secret" },
    ];
    await tenant("agent.put", agent({ guardrails }));
    await say("s1", "session.create", { agent: "a" });
    await say("s1", "message.send", script({ say: "Drrrat" }));
    expect(await told("s1", "turn.failed", ofTurn(1))).toMatchObject({ reason: "guardrail", rule: "no_swearing", on: "input" });
    await say("s1", "message.send", script({ say: ["take AKIA", "IOSFODNN7EXAMPLE"].join("") }));
    expect(await told("s1", "turn.failed", ofTurn(2))).toMatchObject({ reason: "guardrail", rule: "no_keys", on: "output" });
    expect(await told("s1", "superseded", ofTurn(2))).toMatchObject({ step: 0, attempt: 1 });
    await say("s1", "message.send", script({ say: "all is well" }));
    expect(await told("s1", "message.completed")).toMatchObject({ turn: 3, content: "all is well" });
    // The answer was said nowhere: in the journal stands only what the sender himself wrote.
    const outputs = (await journal("s1")).flatMap(({ entries }) => entries).filter((entry) => entry.t !== "command" && entry.t !== "init");
    expect(JSON.stringify(outputs)).not.toContain("AKIA");
  });
});

// ── initialisation ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Lets virtual time pass until `done`, or an hour of it. */
async function pass(world: VirtualWorld, done: () => Promise<boolean>): Promise<void> {
  for (let round = 0; round < 3_600; round += 1) {
    if (await Promise.race([done(), Promise.resolve(false)])) return;
    await world.advance(1_000);
  }
}

describe("initialisation", () => {
  test.each(INIT_STEPS.map((step) => [step]))(
    "a fault in the step '%s' is tried again after 100, 200 and 500 ms, by name, and then the session is unhealthy",
    async (faulty: InitStep) => {
      const at_ms: number[] = [];
      const world = new VirtualWorld(1);
      const steps = (real: InitSteps): InitSteps => ({
        ...real,
        [faulty]() {
          at_ms.push(world.monotonic_ms());
          throw new EffectFailure("unavailable", "a fault was injected");
        },
      });
      let journaled: ActorEvent[] = [];
      const life = (async () => {
        const { tenant, say, events } = await house({ steps, world });
        await tenant("agent.put", agent());
        await say("s1", "session.create", { agent: "a" });
        return events;
      })();
      await pass(world, async () => {
        journaled = await (await life)("s1");
        return journaled.some(({ type, to }) => type === "session.state" && to === "unhealthy");
      });
      expect(at_ms.slice(1).map((now, index) => now - (at_ms[index] ?? 0))).toEqual([100, 200, 500]);
      expect(journaled.filter(({ type, code }) => type === "session.initializing" && code === "unavailable")).toMatchObject(
        [100, 200, 500, null].map((retry_in_ms, retries) => ({ step: faulty, retries, retry_in_ms })),
      );
      expect(journaled.at(-1)).toMatchObject({ type: "session.state", to: "unhealthy", reason: `step '${faulty}': unavailable: a fault was injected` });
    },
  );

  test("LC1: what is frozen is equal in hash exactly when it is equal in meaning", async () => {
    const hashes = async (config: JsonObject): Promise<{ hash: string; output: JsonObject }> => {
      const record = {
        state: "active",
        agents: { a: { version: 1, hash: "", config, config_epoch: 2 } },
        keys: {},
        name: null,
        policy: { default: "allow", deny: ["tool:wait_ms"] },
        grants: {},
        config_epoch: 5,
      };
      const directory = { tenant: async () => record as never, readAll: async () => undefined, unreadable: async () => [], stop: async () => undefined };
      const output = (await loadConfiguration(directory)(
        { agent: "a", overrides: null, mode: null } as never,
        { actor: { tenant: "acme", kind: "session", id: "s" } } as EffectScope,
      )) as JsonObject;
      return { hash: String(output["hash"]), output };
    };
    const rules = [
      { name: "x", on: "input", kind: "secret" },
      { name: "y", on: "output", kind: "size", characters_max: 5 },
    ];
    const base: JsonObject = agentConfig.parse({
      model: "simulated/echo",
      tools: ["now", "wait_ms"],
      roles: ["r", "s"],
      guardrails: rules,
    }) as unknown as JsonObject;
    const first = await hashes(base);
    const turned = Object.fromEntries(
      Object.entries({ ...base, tools: ["wait_ms", "now", "now"], roles: ["s", "r"], guardrails: rules.toReversed() }).reverse(),
    );
    expect((await hashes(turned)).hash).toBe(first.hash);
    for (const change of [
      { model: "simulated/script" },
      { temperature: 1 },
      { tools: ["now"] },
      { roles: ["r"] },
      { guardrails: [rules[0]] },
      { instructions: "x" },
    ])
      expect([change, (await hashes({ ...base, ...change } as JsonObject)).hash === first.hash]).toEqual([change, false]);
    expect(first.output).toMatchObject({
      config: { tools: ["now"] },
      denied_tools: ["wait_ms"],
      tool_hashes: { now: expect.stringMatching(/^[0-9a-f]{64}$/), wait_ms: expect.stringMatching(/^[0-9a-f]{64}$/) },
      guardrail_hashes: { x: hashOf(rules[0]), y: hashOf(rules[1]) },
      roles: ["r", "s"],
      permissions: { default: "allow", allow: [], deny: ["tool:wait_ms"] },
      price_version: expect.stringMatching(/.+/),
      config_epoch: 7,
    });
  });

  test("LC4: an agent that names a tool that there is not is refused when it is put, by the place of the name; one that was put before makes an unhealthy session that says so", async () => {
    const admit = createAdmission({ directory: { tenant: async () => undefined } as never, providers: createProviders({ world: realWorld(), log }) });
    const put = (tools: string[]) => ({ channel: "control", type: "agent.put", body: { agent: "a", config: agentConfig.parse({ model: "a/b", tools }) } });
    expect(await admit(tenantActor("acme"), put(["now", "wait_ms"]) as never)).toBe(undefined);
    expect(await admit(tenantActor("acme"), put(["now", "pay", "constructor"]) as never)).toMatchObject({
      code: "invalid",
      message: "there is no tool 'pay', 'constructor'; there are now, wait_ms",
      details: { errors: [{ pointer: "/config/tools/1" }, { pointer: "/config/tools/2" }] },
    });
    const record = {
      state: "active",
      agents: { a: { version: 1, config: agentConfig.parse({ model: "a/b", tools: ["now", "pay"] }) } },
      policy: {},
      grants: {},
    };
    const steps = loadConfiguration({ tenant: async () => record } as never);
    const failed = Promise.resolve(steps({ agent: "a", overrides: null, mode: null } as never, { actor: { tenant: "acme" } } as EffectScope));
    await expect(failed).rejects.toMatchObject({ effect_error: { code: "tool_unknown", message: "there is no tool 'pay'", details: { step: "tools" } } });
  });

  test("LC5: fallbacks and a cheaper model that the agent may not use are left out, by name; its own model is not", async () => {
    const config = agentConfig.parse({
      model: "openai/dear",
      fallbacks: { models: ["openai/b", "anthropic/c"], content_policy: ["openai/d"] },
      degrade: { model: "openai/b", max_output_tokens: 10 },
    });
    const load = async (deny: string[]): Promise<JsonObject> => {
      const record = { state: "active", agents: { a: { version: 1, config } }, policy: { default: "allow", deny }, grants: {}, config_epoch: 0 };
      const input = { agent: "a", overrides: null, mode: null } as never;
      return (await loadConfiguration({ tenant: async () => record } as never)(input, { actor: { tenant: "acme" } } as EffectScope)) as JsonObject;
    };
    expect(await load(["model:openai/*"])).toMatchObject({
      config: { model: "openai/dear", fallbacks: { models: ["anthropic/c"], content_policy: [] }, degrade: { max_output_tokens: 10 } },
      denied_models: ["openai/b", "openai/d"],
    });
    expect(((await load(["model:openai/*"]))["config"] as JsonObject)["degrade"]).not.toHaveProperty("model");
    const all = await load(["tool:pay"]);
    expect(all).not.toHaveProperty("denied_models");
    expect(all["config"]).toMatchObject({ fallbacks: config.fallbacks, degrade: config.degrade });
  });

  test("AR-F66: a session whose override names a model that the agent may not use is refused when it is made", async () => {
    const record = {
      state: "active",
      agents: { a: { version: 1, config: agentConfig.parse({ model: "simulated/echo", roles: ["r"] }) } },
      policy: { default: "deny", deny: [] },
      grants: { r: { allow: ["model:simulated/echo"], deny: [] } },
    };
    const admit = createAdmission({ directory: { tenant: async () => record } as never, providers: createProviders({ world: realWorld(), log }) });
    const create = (model: string) =>
      admit({ tenant: "acme", kind: "session", id: "s" }, { channel: "command", type: "session.create", body: { agent: "a", overrides: { model } } } as never);
    expect(await create("simulated/echo")).toBeUndefined();
    expect(await create("simulated/script")).toMatchObject({ code: "forbidden", details: { model: "simulated/script" } });
    expect(await create("nobody/none")).toMatchObject({ code: "model_unknown" });
  });

  test("overrides and mode lie over the agent's configuration", () => {
    expect(frozenConfig(agentConfig.parse({ model: "a/b", max_loops: 3 }), { max_loops: 9 }, "single")).toMatchObject({
      model: "a/b",
      max_loops: 9,
      mode: "single",
    });
  });
});

// ── what is not known ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

describe("permission data that cannot be read", () => {
  test("G2: makes readiness red with the reason, admits nothing and performs nothing, until it can be read", async () => {
    const world = realWorld();
    const broker = createMemoryBroker({ world, shards: 1 });
    const bus = broker.connect("reader");
    const restorer = createRestorer({ bus, cores, log });
    let broken = true;
    const directory = createDirectory({
      bus,
      restorer: { restore: async (actor) => (broken ? Promise.reject(new Error("it is no journal message")) : restorer.restore(actor)) },
      world,
      log,
    });
    atEndOfFile(() => directory.stop());
    const health = watchPermissions({ directory, world });
    expect((await health.status()).ok).toBe(false);
    await expect(directory.tenant("acme")).rejects.toThrow("it is no journal message");
    expect(await health.status()).toEqual({ ok: false, detail: "what tenant 'acme' permits cannot be read: Error: it is no journal message" });
    const admission = createAdmission({ directory, providers: createProviders({ world, log }) });
    const session: ActorAddress = { tenant: "acme", kind: "session", id: "s" };
    await expect(admission(session, { channel: "command", type: "session.create", body: { agent: "a" } })).rejects.toThrow("it is no journal message");
    broken = false;
    expect(await health.status()).toEqual({ ok: true, detail: "read" });
  });

  test.each(["policy", "grants"])(
    "G2: a tenant whose record has lost its %s is as one that cannot be read: red, by name, and nothing is permitted",
    async (lost) => {
      const world = realWorld();
      const bus = createMemoryBroker({ world, shards: 1 }).connect("reader");
      const restorer = createRestorer({ bus, cores, log });
      const context: Record<string, unknown> = { name: null, keys: {}, agents: {}, policy: { default: "allow", deny: [] }, grants: {}, config_epoch: 0 };
      delete context[lost];
      const directory = createDirectory({
        bus,
        restorer: { ...restorer, restore: async () => ({ state: { snapshot: { context, value: "active", status: "active" } } }) as never },
        world,
        log,
      });
      atEndOfFile(() => directory.stop());
      const health = watchPermissions({ directory, world });
      await expect(directory.tenant("acme")).rejects.toThrow("a tenant's record says what is permitted");
      expect(await health.status()).toEqual({
        ok: false,
        detail: expect.stringContaining("what tenant 'acme' permits cannot be read: BrokenPromise: a tenant's record says what is permitted"),
      });
      context[lost] = lost === "policy" ? { default: "allow", deny: [] } : {};
      expect((await health.status()).ok).toBe(true);
    },
  );
});
