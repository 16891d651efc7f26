// simulation: a whole cluster in one thread and in virtual time, on the in-memory bus, going through one plan.
//
//   two supervisors, three workers and more, a gateway with readers, services that say commands ── each a SimulatedProcess
//      plan ──▶ acts, one after another ──▶ heal: every fault ends, everybody runs ──▶ settle: everything must come to rest
//                  └── the watch compares every append, start, answer and item with the journals ──┘
//
// What must hold at each moment is in watch.ts and reader.ts. What must hold in the end: every command has its outcome and it is the one
// that was answered, COMMANDS is empty, every session rests, nobody is in memory, every reader has everything, and the streams verify.
import { createHash } from "node:crypto";
import { type CommandClient, createCommandClient } from "../../actors/client.ts";
import { createAdmission } from "../../actors/admission.ts";
import { createCallPool } from "../../actors/call-pool.ts";
import { createDirectory } from "../../actors/directory.ts";
import { createDispatch } from "../../actors/dispatch.ts";
import { callTool } from "../../actors/effects/call-tool.ts";
import { lookUpTurns } from "../../actors/effects/look-up-turns.ts";
import { initSteps, loadConfiguration } from "../../actors/effects/load-configuration.ts";
import { EffectFailure, type EffectScope, type Performer, type Performers } from "../../actors/performer.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost } from "../../actors/shard-host.ts";
import { verifyAll } from "../../actors/verify.ts";
import { createTurnFinder } from "../../actors/turn-finder.ts";
import { Broker, type FaultAfter, type FaultBefore, type Operation } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { bucketSubject } from "../../bus/streams.ts";
import { createFeedHub, type FeedHub } from "../../gateway/feed-hub.ts";
import { sessionFeed } from "../../gateway/session-feed.ts";
import { HEADER_IDEMPOTENCY_KEY, HEADER_REPLY_TO } from "../../protocol/commands.ts";
import { ERRORS } from "../../protocol/errors.ts";
import { type ActorAddress, actorPath, parseActorPath } from "../../protocol/ids.ts";
import { canonicalJson, type Json, type JsonObject } from "../../protocol/json.ts";
import { LEASE_RENEW_MS } from "../../protocol/limits.ts";
import type { Log, LogFields } from "../../protocol/log.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { pause, type World } from "../../protocol/world.ts";
import { createProviders } from "../../providers/registry.ts";
import { cores as productCores } from "../../state-machines/kinds.ts";
import { sessionDefinitionOver } from "../../state-machines/session.ts";
import { coreOf } from "../../state-machines/step.ts";
import { BUILT_IN_TOOLS } from "../../state-machines/tools.ts";
import { startHostService } from "../../supervisors/host-service.ts";
import { Leader } from "../../supervisors/leader.ts";
import { Member } from "../../supervisors/member.ts";
import { tellResumed } from "../../supervisors/resumed.ts";
import { createWorkerCells } from "../../supervisors/worker-cell.ts";
import { type Act, describeAct, GATEWAY, isFault, type Plan, SERVICES, SESSIONS, SUPERVISORS, TENANTS, WORKERS } from "./plan.ts";
import { SimulatedProcess } from "./process.ts";
import { Reader } from "./reader.ts";
import { seededRandom, VirtualWorld } from "./virtual-world.ts";
import { Watch } from "./watch.ts";

export const SHARDS = 4;
/** Idle actors leave memory sooner than in the product, so that a run sees it. */
const PASSIVATE_AFTER_MS = 5_000;
const OPERATIONS_IN_AN_INSTANT_MAX = 20_000;
const OBSERVER = "observer";
const TRACE_LINES_KEPT = 400;
const SETTLE_PATIENCE_MS = 15 * 60_000;

/** The product's tools, and one that must not be repeated. */
const TOOLS = { ...BUILT_IN_TOOLS, charge: { description: "Takes money.", parameters: { type: "object" }, idempotent: false } } as const;

/** The product's actors, with sessions that know those tools. */
export const simulationCores = {
  ...productCores,
  session: coreOf(sessionDefinitionOver(TOOLS)),
};

export interface RunResult {
  /** What broke, in the order in which it was seen; empty for a good run. */
  readonly failures: readonly string[];
  /** The last lines of what happened. */
  readonly trace: readonly string[];
  readonly trace_hash: string;
  readonly counts: Readonly<Record<string, number>>;
  readonly virtual_ms: number;
  readonly broker: Broker;
}

export interface RunOptions {
  /** Changes what a process is made of, to see that the watch sees it. */
  readonly break_host?: (host: ShardHost) => ShardHost;
  readonly break_bus?: (bus: Bus, process: string) => Bus;
}

export function hashOfText(text: string): number {
  let hash = 2_166_136_261;
  for (const character of text) hash = Math.imul(hash ^ character.charCodeAt(0), 16_777_619);
  return (hash ^ (hash >>> 15)) >>> 0;
}

interface Strike {
  readonly act: Extract<Act, { kind: "strike" }>;
  left: number;
}
interface Weather {
  readonly act: Extract<Act, { kind: "weather" }>;
  readonly random: () => number;
  readonly until_ms: number;
}

/** A place that a process runs in: when it dies, another one begins there. */
interface Slot {
  readonly name: string;
  readonly role: "worker" | "supervisor" | "gateway" | "service";
  process: SimulatedProcess;
  connection: string;
  parts: { member?: Member; host?: ShardHost; leader?: Leader; hub?: FeedHub; clients?: { fast: CommandClient; durable: CommandClient }; bus: Bus };
  /** It is asked to end, and is not struck by other ends. */
  ending: boolean;
  gone: boolean;
}

interface Said {
  readonly actor: string;
  readonly key: string;
  readonly type: string;
  readonly replies: Reply[];
  sends: number;
}
interface Published {
  readonly actor: string;
  readonly type: string;
  readonly key: string | undefined;
  /** Sequences in COMMANDS of the copies that are known to be stored. */
  readonly sequences: number[];
  copies: number;
  readonly replies: Reply[];
}

const NO_USAGE = { input_tokens: 3, output_tokens: 5, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
const CONFIG = { model: "simulated/echo", instructions: "", tools: ["now", "wait_ms", "charge"], mode: "multi", max_loops: 4 } as const;
const AGENTS: Readonly<Record<string, JsonObject>> = {
  assistant: { ...CONFIG },
  // Its timers are far enough to rest in the broker, and near enough to come due within a run.
  brief: { ...CONFIG, idle_ttl_ms: 70_000, suspended_ttl_ms: 90_000 },
};

export async function runPlan(plan: Plan, options: RunOptions = {}): Promise<RunResult> {
  // A run never lets go of the loop; between two of them timers, signals and messages are heard.
  await new Promise((resolve) => setImmediate(resolve));
  return new Simulation(plan, options).run();
}

class Simulation {
  readonly plan: Plan;
  readonly options: RunOptions;
  readonly world: VirtualWorld;
  readonly broker: Broker;
  readonly watch: Watch;
  readonly slots = new Map<string, Slot>();
  readonly said = new Map<string, Said>();
  readonly published: Published[] = [];
  readonly readers: Reader[] = [];
  readonly spoken = new Map<string, string>();
  readonly failures: string[] = [];
  readonly counts: Record<string, number> = {};
  readonly #trace: string[] = [];
  readonly #hash = createHash("sha256");
  readonly #strikes: Strike[] = [];
  readonly #weathers: Weather[] = [];
  readonly #queues = new Map<string, Promise<void>>();
  readonly #charged = new Map<string, number>();
  readonly #reading = new Map<Reader, AbortController>();
  readonly #latency: () => number;
  #generation = 0;
  #healed = false;
  #over = false;
  #instant = { at_ms: 0, operations: 0 };
  #frozen = false;
  #pending = 0;
  #poisoned: boolean;
  #hung = false;

  constructor(plan: Plan, options: RunOptions) {
    this.plan = plan;
    this.options = options;
    this.world = new VirtualWorld(plan.seed ^ 0x7e11);
    this.#poisoned = plan.poison !== undefined;
    this.#latency = seededRandom(plan.seed ^ 0x1a7e);
    this.broker = new Broker({
      world: this.world,
      shards: SHARDS,
      faults: { before: (operation) => this.#before(operation), after: (operation) => this.#after(operation) },
    });
    this.watch = new Watch({
      broker: () => this.broker,
      shards: SHARDS,
      cores: simulationCores,
      fail: (what) => this.fail(what),
      trace: (line) => this.trace(line),
      count: (what) => this.count(what),
    });
  }

  fail(what: string): void {
    this.trace(`BROKEN ${what}`);
    if (this.failures.length < 20) this.failures.push(what);
  }
  trace(line: string): void {
    if (this.#over) return;
    const whole = `${(this.world.monotonic_ms() / 1000).toFixed(3).padStart(9)} ${line}`;
    this.#hash.update(whole);
    this.#trace.push(whole);
    if (this.#trace.length > 2 * TRACE_LINES_KEPT) this.#trace.splice(0, TRACE_LINES_KEPT);
  }
  count(what: string): void {
    this.counts[what] = (this.counts[what] ?? 0) + 1;
  }

  async run(): Promise<RunResult> {
    for (const name of SUPERVISORS) this.#supervisor(name);
    for (const name of WORKERS) this.#worker(name);
    for (const name of SERVICES) this.#service(name);
    this.#gateway(GATEWAY);
    await this.#prepare();
    for (const act of this.plan.acts) {
      if (this.failures.length > 0) break;
      await this.#perform(act);
    }
    if (this.failures.length === 0) await this.#heal();
    if (this.failures.length === 0) await this.#judge();
    const trace = this.#trace.slice(-TRACE_LINES_KEPT);
    this.#over = true;
    return {
      failures: this.failures,
      trace,
      trace_hash: this.#hash.digest("hex"),
      counts: this.counts,
      virtual_ms: this.world.monotonic_ms(),
      broker: this.broker,
    };
  }

  /** Tenants and agents, before anything goes wrong. */
  async #prepare(): Promise<void> {
    for (const tenant of TENANTS) {
      const main = `${tenant}/tenant/main`;
      this.#say({ kind: "say", service: "svc1", actor: main, channel: "control", type: "tenant.create", body: {}, key: "create", fast: false, repeats: 0 });
      for (const [agent, config] of Object.entries(AGENTS))
        this.#say({
          kind: "say",
          service: "svc1",
          actor: main,
          channel: "control",
          type: "agent.put",
          body: { agent, config },
          key: `agent-${agent}`,
          fast: false,
          repeats: 0,
        });
    }
    if (!(await this.world.until(() => this.#pending === 0, 60_000))) this.fail("liveness: an undisturbed cluster takes no commands within a minute");
  }

  // ── processes ──────────────────────────────────────────────────────────────────────────────────────────────────────

  #log(process: SimulatedProcess): Log {
    const log: Log = {
      debug: () => undefined,
      info: () => undefined,
      warn: (what, fields) => this.trace(`${process.name} warns: ${what}${short(fields)}`),
      error: (what, fields) => {
        if (process.state !== "dead") this.fail(`log: ${process.name} says: ${what}${short(fields)}`);
      },
      with: () => log,
    };
    return log;
  }

  #begin(name: string, role: Slot["role"]): { slot: Slot; bus: Bus; process: SimulatedProcess; log: Log } {
    const connection = `${name}#${this.#generation++}`;
    const process = new SimulatedProcess(connection, this.world);
    const bus = process.bus(this.broker.connect(connection), {
      sent: (subject, data) => {
        // What a worker answers to the leader is no command's reply.
        if (role === "worker" && subject.startsWith("_INBOX") && "actor" in (JSON.parse(new TextDecoder().decode(data)) as object))
          this.watch.replied(connection, subject, decodeReply(data));
      },
      acknowledged: (delivery) => {
        if (role === "worker") this.watch.acknowledged(connection, delivery);
      },
    });
    const broken = this.options.break_bus?.(bus, name) ?? bus;
    const slot: Slot = { name, role, process, connection, parts: { bus: broken }, ending: false, gone: false };
    this.slots.set(name, slot);
    this.trace(`${connection} begins`);
    return { slot, bus: broken, process, log: this.#log(process) };
  }

  #supervisor(name: string): void {
    const { slot, bus, process, log } = this.#begin(name, "supervisor");
    const { world } = process;
    let commits = 0;
    const restorer = createRestorer({ bus, cores: simulationCores, log });
    const open_cell = createWorkerCells({
      bus,
      world,
      log,
      core: simulationCores.worker,
      restorer,
      supervisor: name,
      next_commit_id: () => `${slot.connection}.${commits++}`,
    });
    slot.parts.leader = new Leader({ bus, world, log, id: name, open_cell, handover_deadline_ms: 20_000 });
    slot.parts.leader.start();
  }

  #worker(name: string, key = name): void {
    const { slot, bus, process, log } = this.#begin(key, "worker");
    const { world } = process;
    let commits = 0;
    const late: { member?: Member } = {};
    const restorer = createRestorer({ bus, cores: simulationCores, log });
    const directory = createDirectory({ bus, restorer, world, log });
    const turns = createTurnFinder({ bus, restorer });
    const made = createShardHost({
      bus,
      world,
      log,
      cores: simulationCores,
      restorer,
      performers: this.#performers(slot, world, {
        load_configuration: loadConfiguration(directory, world, initSteps(directory, world, TOOLS)),
        call_tool: callTool(world),
        look_up_turns: lookUpTurns(turns),
      }),
      worker: name,
      next_commit_id: () => `${slot.connection}.${commits++}`,
      may_act: () => late.member?.may_act() ?? false,
      on_conflict: (shard, epoch) => late.member?.on_conflict(shard, epoch) ?? Promise.resolve("lost"),
      admit: createAdmission({ directory, providers: createProviders({ world, log }), turns, tools: TOOLS }),
      on_resumed: ({ actor, shard, epoch, entries, replay_ms }) => {
        this.count("resumed");
        tellResumed(bus, { worker: name, actor: actorPath(actor), shard, epoch, entries, replay_ms });
      },
      assume_cost: (effect) => Promise.resolve(effect.src === "call_model" ? 40 : undefined),
      passivate_after_ms: PASSIVATE_AFTER_MS,
    });
    const broken = this.options.break_host?.(made) ?? made;
    const host: ShardHost = {
      ...broken,
      take: (shard, epoch, from) => {
        if (process.state === "running" && late.member?.may_act() !== true)
          this.fail(`M3: ${slot.connection} takes shard ${shard} under epoch ${epoch} without a valid lease`);
        return broken.take(shard, epoch, from);
      },
      prepare: (shard) => {
        this.count("shards prepared");
        return broken.prepare(shard);
      },
    };
    const member = new Member({
      bus,
      world,
      log,
      id: name,
      versions: Object.values(simulationCores).map((core) => core.machine_name),
      host,
      handover_deadline_ms: 20_000,
    });
    late.member = member;
    const me = member;
    slot.parts.member = me;
    slot.parts.host = host;
    startHostService({
      bus,
      world,
      log,
      worker: name,
      host,
      draining: () => me.draining,
      may_act: () => me.may_act(),
      pool: createCallPool({ world }),
      dispatch: createDispatch({ world }),
    });
    const beat = (): void => {
      void world.after(LEASE_RENEW_MS / 4, () => {
        if (me.phase !== "stopped") void me.tick().finally(beat);
      });
    };
    void me.start().then(beat);
  }

  #service(name: string): void {
    const { slot, bus, process } = this.#begin(name, "service");
    const { world } = process;
    slot.parts.clients = { fast: createCommandClient({ bus, world }), durable: createCommandClient({ bus, world, fast_lane: false }) };
  }

  #gateway(name: string): void {
    const { slot, bus, process, log } = this.#begin(name, "gateway");
    slot.parts.hub = createFeedHub({ bus, world: process.world, log, on_behind: () => this.count("readers behind") });
    for (const reader of this.readers) this.#attach(reader);
  }

  #end(slot: Slot, why: string): void {
    if (slot.process.state === "dead") return;
    this.trace(`${slot.connection} dies: ${why}`);
    slot.process.die();
    this.broker.kill(slot.connection);
    if (slot.ending) return;
    slot.ending = true;
    // Somebody starts it again, as `up` or an orchestrator does.
    this.world.after(200 + (hashOfText(slot.connection) % 2_500), () => this.#again(slot));
  }
  #again(slot: Slot): void {
    slot.gone = true;
    if (this.slots.get(slot.name) !== slot) return;
    if (slot.role === "worker") this.#worker(slot.name.replace(/'$/, ""), slot.name);
    else if (slot.role === "supervisor") this.#supervisor(slot.name);
    else if (slot.role === "gateway") this.#gateway(slot.name);
  }

  #goOn(slot: Slot): void {
    if (slot.process.state !== "stopped") return;
    this.trace(`${slot.connection} goes on`);
    slot.process.goOn();
  }
  #stop(slot: Slot, ms: number): void {
    if (slot.process.state !== "running") return;
    this.trace(`${slot.connection} stands still for ${ms} ms`);
    this.count("stops");
    slot.process.stop();
    this.world.after(ms, () => this.#goOn(slot));
    // A broker lets go of a connection that answers no pings.
    if (ms > 8_000 && ms % 2_000 === 0) this.#cut(slot, ms);
  }
  #cut(slot: Slot, ms: number): void {
    this.broker.cut(slot.connection);
    this.world.after(ms, () => this.broker.mend(slot.connection));
  }

  // ── faults on operations ───────────────────────────────────────────────────────────────────────────────────────────

  #slotOf(connection: string): Slot | undefined {
    const slot = this.slots.get(connection.slice(0, connection.indexOf("#")));
    return slot?.connection === connection ? slot : undefined;
  }

  #struck(operation: Operation, side: "before" | "after"): Strike["act"]["effect"] | undefined {
    if (this.#healed || this.#strikes.length === 0) return undefined;
    const name = operation.connection.slice(0, operation.connection.indexOf("#"));
    for (const [index, strike] of this.#strikes.entries()) {
      const { act } = strike;
      if (act.process !== name || act.operation !== operation.kind || act.side !== side || --strike.left > 0) continue;
      this.#strikes.splice(index, 1);
      this.count(`${act.effect.kind} ${side} ${operation.kind}`);
      if (act.effect.kind === "crash") this.count("crashes");
      this.trace(`${operation.connection} is struck ${side} ${operation.kind} ${operation.subject}: ${act.effect.kind}`);
      return act.effect;
    }
    return undefined;
  }

  /** What happens without end in one instant would never let the simulation look: from here on everything takes time. */
  #livelocked(): boolean {
    const now_ms = this.world.monotonic_ms();
    if (this.#instant.at_ms !== now_ms) this.#instant = { at_ms: now_ms, operations: 0 };
    if (++this.#instant.operations > OPERATIONS_IN_AN_INSTANT_MAX && !this.#frozen) {
      this.#frozen = true;
      this.fail(`liveness: more than ${OPERATIONS_IN_AN_INSTANT_MAX} operations in one instant`);
    }
    return this.#frozen;
  }

  #before(operation: Operation): FaultBefore | undefined {
    if (this.#livelocked()) return { kind: "delay", ms: 1_000_000 };
    const effect = this.#struck(operation, "before");
    const slot = this.#slotOf(operation.connection);
    if (effect === undefined || slot === undefined) return this.#late(operation);
    if (effect.kind === "delay") return { kind: "delay", ms: effect.ms };
    if (effect.kind === "stop") {
      this.#stop(slot, effect.ms);
      return undefined;
    }
    if (effect.kind === "crash") this.#end(slot, `before ${operation.kind}`);
    return { kind: "unavailable" };
  }

  #late(operation: Operation): FaultBefore | undefined {
    if (this.#healed) return undefined;
    const name = operation.connection.slice(0, operation.connection.indexOf("#"));
    for (const { act, random, until_ms } of this.#weathers) {
      if (act.process !== name || this.world.monotonic_ms() > until_ms || random() >= act.chance) continue;
      this.count("late operations");
      return { kind: "delay", ms: Math.ceil(random() * act.late_ms_max) };
    }
    const { latency_ms_max } = this.plan;
    return latency_ms_max === 0 || operation.connection === OBSERVER ? undefined : { kind: "delay", ms: this.#latency() * latency_ms_max };
  }

  #after(operation: Operation): FaultAfter | undefined {
    if (operation.kind === "append") this.watch.look();
    if (operation.kind === "clear") {
      this.trace(`${operation.connection} clears ${operation.subject}`);
      this.watch.cleared(operation.subject);
    }
    if (operation.kind === "publish" && operation.subject.startsWith("resident.")) this.trace(`${operation.connection} marks ${operation.subject}`);
    if (operation.kind === "bucket_write" && operation.subject.startsWith(bucketSubject("PLACEMENT", ""))) this.watch.placed(operation.subject);
    if (operation.kind === "append") this.#oneOwner();
    const effect = this.#struck(operation, "after");
    const slot = this.#slotOf(operation.connection);
    if (effect === undefined || slot === undefined) return undefined;
    if (effect.kind === "delay") return { kind: "delay", ms: effect.ms };
    if (effect.kind === "stop") {
      this.#stop(slot, effect.ms);
      return undefined;
    }
    if (effect.kind === "crash") this.#end(slot, `after ${operation.kind}`);
    return { kind: "lose_answer" };
  }

  /** At most one process may act on a shard. */
  #oneOwner(): void {
    const owners = new Map<number, string>();
    for (const { process, parts, connection } of this.slots.values()) {
      if (process.state !== "running" || parts.member?.may_act() !== true) continue;
      for (const { shard, phase } of parts.host?.owned() ?? []) {
        if (phase === "taking") continue;
        const other = owners.get(shard);
        if (other !== undefined) this.fail(`M3: ${other} and ${connection} may both act on shard ${shard}`);
        owners.set(shard, connection);
      }
    }
  }

  // ── effects ────────────────────────────────────────────────────────────────────────────────────────────────────────

  #performers(slot: Slot, world: World, real: { load_configuration: Performer; call_tool: Performer; look_up_turns: Performer }): Performers {
    const performers: Record<string, Performer> = {
      load_configuration: real.load_configuration,
      look_up_turns: real.look_up_turns,
      call_model: (input: { turn: number; step: number; config_seq: number; messages: readonly { at: number }[] }, scope) =>
        this.#callModel(slot, world, input, scope),
      call_tool: (input: { name: string }, scope) => (input.name === "charge" ? this.#charge(world, scope) : real.call_tool(input as never, scope)),
    };
    return Object.fromEntries(
      Object.entries(performers).map(([src, perform]): [string, Performer] => [
        src,
        (input, scope) => {
          // What a dead process would still do in this very instant does not happen.
          if (slot.process.state !== "running") return new Promise<Json>(() => undefined);
          const { actor, inst, attempt, epoch } = scope;
          this.watch.began({ actor, inst, attempt, epoch, src, input: canonicalJson(input), worker: slot.connection });
          return perform(input, scope);
        },
      ]),
    );
  }

  async #callModel(
    slot: Slot,
    world: World,
    { turn, step, config_seq, messages }: { turn: number; step: number; config_seq: number; messages: readonly { at: number }[] },
    scope: EffectScope,
  ): Promise<Json> {
    const path = actorPath(scope.actor);
    const fate = hashOfText(`${this.plan.seed} ${scope.idempotency_key}`);
    const fateOfAttempt = hashOfText(`${this.plan.seed} ${scope.idempotency_key} ${scope.attempt}`);
    const asked = [config_seq, ...messages.map((one) => one.at)];
    const found = await scope.entries(asked);
    for (const seq of asked) if (found.get(seq) === undefined) this.fail(`S4: entry ${seq} of ${path} is not found for a prompt`);
    const words = Array.from({ length: 1 + (fateOfAttempt % 12) }, (_, index) => `${path.at(-1) ?? ""}${turn}.${step}.${scope.attempt}.${index} `);
    this.spoken.set(`${path} ${turn}.${step}.${scope.attempt}`, words.join(""));
    const tokens = scope.tokens({ turn, step });
    // Some calls say in the journal that they begin again; all of them can be asked, when they are stopped, what they had come to.
    const next = { model: "simulated/echo", try: 2, wait_ms: fate % 3 === 0 ? 0 : 200, code: "overloaded", message: "", purpose: "answer", left: [] };
    if (fate % 5 === 0) scope.progress({ attempts: [], skipped: [], next });
    // Others say what they wait for, and some of those are lost before they say that it is over.
    if (scope.waited !== undefined) this.count("waits that a take-over kept");
    if (fate % 7 === 0 || scope.waited !== undefined) {
      const wait = { for: "slot", since_ms: world.now_ms(), until_ms: world.now_ms() + 30_000, message: "" };
      scope.progress({ attempts: [], skipped: [], wait });
      await pause(world, fateOfAttempt % 400);
      scope.progress({ attempts: [], skipped: [], wait: null });
    }
    scope.so_far(() => {
      this.count("asked when stopped");
      return { attempts: [], usage: null, cost_usd_micros: 0, price_version: null };
    });
    if (this.#poisoned && path === this.plan.poison) {
      await pause(world, 30);
      this.count("poison taken");
      this.#end(slot, `poison in ${path}`);
      return new Promise(() => undefined);
    }
    if (this.plan.hang_one_in > 0 && !this.#hung && fate % this.plan.hang_one_in === 0) {
      this.#hung = true;
      this.count("hung calls");
      this.trace(`${slot.connection} model call ${scope.idempotency_key} hangs`);
      return new Promise(() => undefined);
    }
    const speed = fate % 20;
    const between_ms = speed < 14 ? fateOfAttempt % 40 : speed < 18 ? 50 + (fateOfAttempt % 300) : 400 + (fateOfAttempt % 1_500);
    for (const word of words) {
      await pause(world, between_ms);
      if (scope.signal.aborted) throw new EffectFailure("cancelled", "nobody wants it any more");
      tokens.write("text", word);
    }
    if (fate % 17 === 0) throw new EffectFailure("provider_error", "no answer today");
    tokens.end();
    const calls = step < 3 && fate % 4 === 0 ? 1 + ((fate >>> 4) % 3) : 0;
    const tool_calls = Array.from({ length: calls }, (_, index) => {
      const which = (fate >>> (6 + 2 * index)) % 5;
      const name = which < 2 ? "charge" : which < 4 ? "wait_ms" : which === 4 && index === 0 ? "nothing_known" : "now";
      return { id: `c${index}`, name, args: name === "wait_ms" ? { ms: (fate >>> 3) % 1_500 } : {} };
    });
    return {
      text: words.join(""),
      tool_calls,
      stop: calls > 0 ? "tool_calls" : "end",
      usage: NO_USAGE,
      model: "simulated/echo",
      cost_usd_micros: 53,
      price_version: "t",
    };
  }

  /** A tool that may not be called twice for one inst, whatever dies. */
  async #charge(world: World, scope: EffectScope): Promise<Json> {
    const times = (this.#charged.get(scope.idempotency_key) ?? 0) + 1;
    this.#charged.set(scope.idempotency_key, times);
    if (times > 1) this.fail(`A3: ${scope.idempotency_key} charged ${times} times`);
    const fate = hashOfText(`${this.plan.seed} ${scope.idempotency_key}`);
    await pause(world, fate % 900);
    if (fate % 7 === 0) throw new EffectFailure("tool_failed", "no luck");
    return { text: "charged", is_error: fate % 11 === 0 };
  }

  // ── acts ───────────────────────────────────────────────────────────────────────────────────────────────────────────

  async #perform(act: Act): Promise<void> {
    if (act.kind === "pass") {
      await this.world.advance(act.ms);
      return;
    }
    if (isFault(act)) this.trace(`act ${describeAct(act)}`);
    this.count(`act ${act.kind}`);
    const slot = "process" in act ? this.slots.get(act.process) : undefined;
    switch (act.kind) {
      case "say":
        this.#say(act);
        break;
      case "publish":
        this.#publish(act);
        break;
      case "garbage":
        this.#garbage(act);
        break;
      case "strike":
        this.#strikes.push({ act, left: act.nth });
        break;
      case "crash":
        if (slot !== undefined && slot.process.state !== "dead") {
          this.count("crashes");
          this.#end(slot, "killed");
        }
        break;
      case "stop":
        if (slot !== undefined) this.#stop(slot, act.ms);
        break;
      case "cut":
        if (slot !== undefined) this.#cut(slot, act.ms);
        break;
      case "away":
        for (const one of this.slots.values()) this.#cut(one, act.ms);
        break;
      case "restart":
        void this.broker.restart(act.ms);
        break;
      case "drain":
        if (slot !== undefined) this.#drain(slot, act.deadline_ms);
        break;
      case "join":
      case "twin": {
        const key = act.kind === "twin" ? `${act.process}'` : act.process;
        const there = this.slots.get(key);
        if (there === undefined || there.gone) this.#worker(act.process, key);
        break;
      }
      case "weather":
        this.#weathers.push({ act, random: seededRandom(hashOfText(describeAct(act)) ^ this.plan.seed), until_ms: this.world.monotonic_ms() + act.ms });
        break;
      case "clock":
        if (slot !== undefined) slot.process.clock_skew_ms += act.jump_ms;
        break;
      case "read":
        this.#read(act);
        break;
      case "reconnect": {
        const reader = this.readers[act.reader];
        if (reader !== undefined) this.#attach(reader);
        break;
      }
      default:
        act satisfies never;
    }
  }

  #drain(slot: Slot, deadline_ms: number): void {
    const { member, host } = slot.parts;
    if (member === undefined || host === undefined || slot.ending || slot.process.state === "dead") return;
    slot.ending = true;
    this.count("drains");
    const gone = async (): Promise<void> => {
      await member.drain({ deadline_ms });
      await member.stop();
      await host.stop();
    };
    void gone().then(() => {
      this.trace(`${slot.connection} has drained and ends`);
      slot.process.die();
      this.broker.kill(slot.connection);
    });
    // Whether it ended by itself or was killed meanwhile, another one comes.
    const look = (): void => void this.world.after(500, () => (slot.process.state === "dead" ? this.#again(slot) : look()));
    look();
  }

  #read({ actor: path, slow_ms }: Extract<Act, { kind: "read" }>): void {
    const actor = addressOf(path);
    const reader = new Reader({
      actor,
      name: `reader ${this.readers.length}`,
      slow_ms,
      journal: () => this.watch.journal(actor),
      spoken: this.spoken,
      fail: (what) => this.fail(what),
    });
    this.readers.push(reader);
    this.#attach(reader);
  }

  /** Reads on, from the reader's cursor, through the gateway as it is now. */
  #attach(reader: Reader): void {
    this.#reading.get(reader)?.abort();
    const abort = new AbortController();
    this.#reading.set(reader, abort);
    const { process, parts } = this.slots.get(GATEWAY)!;
    const { world } = process;
    const { hub, bus } = parts;
    if (hub === undefined || process.state === "dead") return;
    const mine = (): boolean => !abort.signal.aborted && process.state !== "dead";
    const read = async (): Promise<void> => {
      const feed = await sessionFeed({ bus, hub, world, log: this.#log(process) }, reader.deps.actor, reader.cursor, abort.signal);
      for await (const item of feed) {
        if (!mine()) return;
        reader.take(item);
        if (reader.deps.slow_ms > 0) await pause(world, reader.deps.slow_ms);
      }
    };
    read().catch((error: unknown) => {
      this.trace(`${reader.deps.name} is let go: ${String(error)}`);
      if (error instanceof Error && error.name === "BrokenPromise") this.fail(`F: ${reader.deps.name}: ${error.message}`);
      if (mine()) void world.after(300, () => this.#attach(reader));
    });
  }

  /** One after another per service and actor, until decided. */
  #say(act: Extract<Act, { kind: "say" }>): void {
    const { service, actor: path, key, type, body, channel, fast, repeats } = act;
    const actor = addressOf(path);
    const { parts, process } = this.slots.get(service)!;
    const said: Said = { actor: path, key, type, replies: [], sends: 0 };
    this.said.set(`${path} ${channel} ${key}`, said);
    this.#pending++;
    const line = `${service} ${path}`;
    const before = this.#queues.get(line) ?? Promise.resolve();
    const saying = before.then(async () => {
      const client = fast ? parts.clients!.fast : parts.clients!.durable;
      for (let again = repeats; ;) {
        said.sends++;
        const outcome = await client.command(actor, { type, body, key, channel }, { patience_ms: 2_500 });
        if (outcome.kind === "refused") {
          await pause(process.world, 100);
          continue;
        }
        const { reply } = outcome;
        this.trace(`${service} hears of ${path} ${type} ${key}: ${reply.ok ? `ok ${reply.seq} ${reply.state}` : reply.error.code}`);
        this.count(reply.ok ? "answered ok" : `answered ${reply.error.code}`);
        said.replies.push(reply);
        // Trouble that will pass is tried again; who is told that it is busy may give up.
        if (!reply.ok && ERRORS[reply.error.code].transient && reply.error.code !== "busy") {
          await pause(process.world, 300);
          continue;
        }
        if (again-- <= 0) break;
      }
      this.#pending--;
    });
    this.#queues.set(line, saying);
  }

  #publish({ service, actor: path, type, body, key, copies }: Extract<Act, { kind: "publish" }>): void {
    const { bus } = this.slots.get(service)!.parts;
    const actor = addressOf(path);
    const published: Published = { actor: path, type, key, sequences: [], copies, replies: [] };
    this.published.push(published);
    const inbox = bus.inbox();
    bus.subscribe(inbox, (message) => void published.replies.push(decodeReply(message.data)));
    for (let copy = 0; copy < copies; copy++) {
      this.#pending++;
      const headers = { [HEADER_REPLY_TO]: inbox, ...(key === undefined ? {} : { [HEADER_IDEMPOTENCY_KEY]: key }) };
      void bus.publish(actorSubject(actor, "command"), new TextEncoder().encode(JSON.stringify({ type, body })), { headers }).then((outcome) => {
        this.#pending--;
        if (outcome.kind === "stored") published.sequences.push(outcome.sequence);
        this.count(`published ${outcome.kind}`);
      });
    }
  }

  #garbage({ service, actor: path, text }: Extract<Act, { kind: "garbage" }>): void {
    const { bus } = this.slots.get(service)!.parts;
    void bus.publish(actorSubject(addressOf(path), "command"), new TextEncoder().encode(text));
  }

  // ── the end ────────────────────────────────────────────────────────────────────────────────────────────────────────

  async #heal(): Promise<void> {
    this.trace("every fault ends");
    this.#healed = true;
    this.#strikes.length = 0;
    for (const slot of this.slots.values()) {
      this.broker.mend(slot.connection);
      this.#goOn(slot);
    }
    // A broker that is away, and cuts that were to end later, end by themselves.
    await this.#until("every command that was sent is decided", () => this.#pending === 0);
    await this.#until("a poisoned session is parked", () => !this.#poisoned || !this.#works(this.plan.poison ?? ""));
    this.#poisoned = false;
    // Whatever state it was left in, it can go on: an answer is liveness.
    for (const path of SESSIONS) {
      if (this.watch.journals.get(path)?.state === undefined) continue;
      this.#say({
        kind: "say",
        service: "svc1",
        actor: path,
        channel: "control",
        type: "session.unpark",
        body: {},
        key: "last-unpark",
        fast: false,
        repeats: 0,
      });
      this.#say({
        kind: "say",
        service: "svc1",
        actor: path,
        channel: "command",
        type: "session.resume",
        body: {},
        key: "last-resume",
        fast: true,
        repeats: 0,
      });
    }
    await this.#until("every last command is decided", () => this.#pending === 0);
    await this.#until("every session comes to rest", () => SESSIONS.every((path) => !this.#works(path)));
    await this.#until("COMMANDS is empty", () => this.broker.stream("COMMANDS").messages === 0);
    await this.#until("everybody leaves memory", () =>
      [...this.slots.values()].every(({ process, parts }) => process.state === "dead" || (parts.host?.resident().length ?? 0) === 0),
    );
    await this.#until("every reader has everything", () => this.readers.every((reader) => reader.given === reader.deps.journal().events.length));
    await this.#until("every shard has one owner", () => this.#placed());
  }

  #works(path: string): boolean {
    const state = this.watch.journals.get(path)?.state;
    return state !== undefined && Object.keys(state.running).length > 0;
  }

  #placed(): boolean {
    const owned = [...this.slots.values()].flatMap(({ process, parts }) =>
      process.state === "running" ? (parts.host?.owned() ?? []).filter(({ phase }) => phase === "owning").map(({ shard }) => shard) : [],
    );
    return owned.length === SHARDS && new Set(owned).size === SHARDS;
  }

  async #until(what: string, holds: () => boolean): Promise<void> {
    if (this.failures.length > 0) return;
    const came = await this.world.until(() => holds() || this.failures.length > 0, SETTLE_PATIENCE_MS);
    if (!came) this.fail(`liveness: ${what}, within ${SETTLE_PATIENCE_MS / 60_000} minutes after the last fault: ${this.#standing()}`);
  }

  #standing(): string {
    const sessions = SESSIONS.map(
      (path) =>
        `${path} ${this.watch.journals.get(path)?.head?.state ?? "-"} [${Object.values(this.watch.journals.get(path)?.state?.running ?? {})
          .map((one) => one.inst)
          .join(" ")}]`,
    );
    const processes = [...this.slots.values()].map(
      ({ connection, process, parts }) =>
        `${connection} ${process.state} ${parts.member?.phase ?? parts.leader?.role ?? ""} ${JSON.stringify(parts.host?.owned() ?? [])}`,
    );
    const readers = this.readers.map((reader) => `${reader.deps.name} ${reader.given}/${reader.deps.journal().events.length}`);
    return [...sessions, ...processes, ...readers, `COMMANDS ${this.broker.stream("COMMANDS").messages}`, `pending ${this.#pending}`].join("; ");
  }

  async #judge(): Promise<void> {
    const observer = this.broker.connect(OBSERVER);
    let done = false;
    const verifying = verifyAll({
      bus: observer,
      cores: simulationCores,
      report: ({ invariant, actor, seq, what }) => this.fail(`verify ${invariant}: ${actor} ${seq ?? ""}: ${what}`),
    }).then((report) => {
      this.counts["entries"] = report.entries;
      this.counts["snapshots"] = report.snapshots;
      done = true;
    });
    await this.world.until(() => done, 60_000);
    await verifying;
    for (const said of this.said.values()) this.#judgeSaid(said);
    for (const published of this.published) this.#judgePublished(published);
    for (const reader of this.readers) this.counts["tokens read"] = (this.counts["tokens read"] ?? 0) + reader.tokens;
  }

  #judgeSaid({ actor, key, replies, sends, type }: Said): void {
    const decided = this.watch.journals.get(actor)?.decided.filter((one) => one.entry.key === key && one.entry.type === type) ?? [];
    const done = decided.filter((one) => one.entry.t !== "refused");
    if (done.length > 1) this.fail(`A3: ${key} is done ${done.length} times in ${actor}`);
    const seqs = new Set(replies.flatMap((reply) => (reply.ok ? [reply.seq] : [])));
    const created = replies.some((reply) => reply.ok && reply.result["created"] === false);
    if (seqs.size > 1 && !created) this.fail(`${actor} ${key} is answered with different outcomes: ${[...seqs].join(", ")}`);
    for (const reply of replies) {
      if (reply.ok && !created && !done.some((one) => one.seq === reply.seq))
        this.fail(`A1: ${actor} ${key} was answered ok at ${reply.seq}, where the journal has no such command`);
      if (!reply.ok && !ERRORS[reply.error.code].transient && reply.error.code !== "not_found" && done.length > 0)
        this.fail(`${actor} ${key} was answered ${reply.error.code}, and it was done at ${done[0]?.seq ?? 0}`);
    }
    const gaveUp = replies.at(-1);
    if (sends === 1 && gaveUp?.ok === false && done.length > 0)
      this.fail(`${actor} ${key} was sent once and answered ${gaveUp.error.code}, and it was done at ${done[0]?.seq ?? 0}`);
  }

  #judgePublished({ actor, key, sequences, copies, replies, type }: Published): void {
    const journal = this.watch.journals.get(actor);
    const created_at = journal?.messages[0];
    const decided = journal?.decided ?? [];
    const bySource = sequences.map((seq) => decided.find((one) => one.entry.source?.seq === seq));
    if (key !== undefined) {
      const done = decided.filter((one) => one.entry.key === key && one.entry.t !== "refused");
      if (done.length > 1) this.fail(`A3: ${key}, published ${copies} times, is done ${done.length} times in ${actor}`);
    }
    const refused = replies.some((reply) => !reply.ok);
    sequences.forEach((seq, index) => {
      const one = bySource[index];
      // Refused before it reached a journal, recognised as a repeat, or refused too often to be journaled: then its sender was told.
      if (one === undefined && key === undefined && !refused && created_at !== undefined && replies.length < copies && type !== "session.create")
        this.count("unanswered publishes");
      if (one === undefined && key === undefined && replies.some((reply) => reply.ok && reply.result["created"] !== false) && copies === 1)
        this.fail(`A1: ${actor} ${type} (COMMANDS ${seq}) was answered ok, and no journal has it`);
      if (one !== undefined && key === undefined && copies === 1) {
        for (const reply of replies) {
          if (reply.ok && one.entry.t === "refused")
            this.fail(`${actor} ${type} (COMMANDS ${seq}) was answered ok at ${reply.seq}, the journal refused it at ${one.seq}`);
          if (!reply.ok && one.entry.t !== "refused")
            this.fail(`${actor} ${type} (COMMANDS ${seq}) was answered ${reply.error.code}, and it was done at ${one.seq}`);
        }
      }
    });
  }
}

function addressOf(path: string): ActorAddress {
  const actor = parseActorPath(path);
  if (actor === undefined) throw new RangeError(`${path} names no actor`);
  return actor;
}

function short(fields: LogFields | undefined): string {
  if (fields === undefined) return "";
  const { stack: _, ...rest } = fields;
  return ` ${JSON.stringify(rest).slice(0, 300)}`;
}
