// cluster: who is there in a simulated run: supervisors, workers, a gateway with its readers, services and a projector, each the product's own code in a
// SimulatedProcess. Whoever dies begins again after a while, as `up` or an orchestrator has it.
//
//   begin ──▶ running ──stop──▶ stands still ──▶ running ──end──▶ dead ──▶ begins again, under a connection of its own
//                └──drain──▶ hands over and ends by itself
import { createAdmission } from "../../actors/admission.ts";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import { createBudgetStanding } from "../../actors/budget-standing.ts";
import { createCallPool } from "../../actors/call-pool.ts";
import { createCommandClient } from "../../actors/client.ts";
import { createDirectory } from "../../actors/directory.ts";
import { createDispatch } from "../../actors/dispatch.ts";
import { assumedCost } from "../../actors/effects/assumed-cost.ts";
import { callModel } from "../../actors/effects/call-model.ts";
import { callTool } from "../../actors/effects/call-tool.ts";
import { initSteps, loadConfiguration } from "../../actors/effects/load-configuration.ts";
import { lookUpTurns } from "../../actors/effects/look-up-turns.ts";
import { withGuardrails } from "../../actors/guardrails.ts";
import { createModelMoney } from "../../actors/model-money.ts";
import type { PatternMatcher } from "../../actors/pattern-matcher.ts";
import type { Performer, Performers } from "../../actors/performer.ts";
import { createGate, gated } from "../../actors/permission.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost } from "../../actors/shard-host.ts";
import { createSlotCaller } from "../../actors/slot-caller.ts";
import { createTurnFinder } from "../../actors/turn-finder.ts";
import type { Broker } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { createFeedHub, type FeedHub } from "../../gateway/feed-hub.ts";
import { sessionFeed } from "../../gateway/session-feed.ts";
import { createProjector } from "../../projections/projector.ts";
import { actorPath } from "../../protocol/ids.ts";
import { canonicalJson, type Json } from "../../protocol/json.ts";
import { LEASE_RENEW_MS } from "../../protocol/limits.ts";
import type { Log, LogFields } from "../../protocol/log.ts";
import { pause } from "../../protocol/world.ts";
import { cores as productCores } from "../../state-machines/kinds.ts";
import { sessionDefinitionOver } from "../../state-machines/session.ts";
import { coreOf } from "../../state-machines/step.ts";
import { startHostService } from "../../supervisors/host-service.ts";
import { Leader } from "../../supervisors/leader.ts";
import { Member } from "../../supervisors/member.ts";
import { tellResumed } from "../../supervisors/resumed.ts";
import { createWorkerCells } from "../../supervisors/worker-cell.ts";
import { type SimulatedModels, TOOLS } from "./models.ts";
import { GATEWAY, PROJECTOR, SERVICES, SUPERVISORS, WORKERS } from "./plan.ts";
import type { SimulatedPostgres } from "./postgres.ts";
import { SimulatedProcess } from "./process.ts";
import { Reader } from "./reader.ts";
import { addressOf, type Speaker } from "./services.ts";
import { hashOfText, type Story } from "./story.ts";
import type { VirtualWorld } from "./virtual-world.ts";
import type { Watch } from "./watch.ts";

export const SHARDS = 4;
/** Idle actors leave memory sooner than in the product, so that a run sees it. */
const PASSIVATE_AFTER_MS = 5_000;
/** Few enough that calls wait for a place. */
const CALLS_MAX = 2;

/** The product's actors, with sessions that know the simulation's tools. */
export const simulationCores = {
  ...productCores,
  session: coreOf(sessionDefinitionOver(TOOLS)),
};

/** No agent of a run has a pattern: that would be looked at in a thread of its own, in real time. */
const NO_PATTERNS: PatternMatcher = { matches: () => Promise.reject(new Error("nobody asks for patterns")), stop: () => Promise.resolve() };

type Role = "worker" | "supervisor" | "gateway" | "service" | "projector";

/** A place that a process runs in: when it dies, another one begins there. */
export interface Slot {
  readonly name: string;
  readonly role: Role;
  readonly process: SimulatedProcess;
  readonly connection: string;
  readonly bus: Bus;
  parts: { member?: Member; host?: ShardHost; leader?: Leader; hub?: FeedHub; clients?: Speaker["clients"]; leaveDatabase?: () => void };
  /** It is asked to end, and is not struck by other ends. */
  ending: boolean;
  gone: boolean;
}

export interface ClusterDeps {
  readonly world: VirtualWorld;
  readonly broker: () => Broker;
  readonly watch: Watch;
  readonly story: Story;
  readonly models: SimulatedModels;
  readonly postgres: SimulatedPostgres;
  /** Change what a process is made of, to see that the watch sees it. */
  readonly break_host?: ((host: ShardHost) => ShardHost) | undefined;
  readonly break_bus?: ((bus: Bus, process: string) => Bus) | undefined;
}

export class Cluster {
  readonly slots = new Map<string, Slot>();
  readonly readers: Reader[] = [];
  readonly #deps: ClusterDeps;
  readonly #reading = new Map<Reader, AbortController>();
  #generation = 0;

  constructor(deps: ClusterDeps) {
    this.#deps = deps;
  }

  begin(): void {
    for (const name of SUPERVISORS) this.#supervisor(name);
    for (const name of WORKERS) this.worker(name);
    for (const name of SERVICES) this.#service(name);
    this.#gateway(GATEWAY);
    this.#projector(PROJECTOR);
  }

  // ── what each process is made of ───────────────────────────────────────────────────────────────────────────────────

  #log(process: SimulatedProcess): Log {
    const { story } = this.#deps;
    const log: Log = {
      debug: () => undefined,
      info: () => undefined,
      warn: (what, fields) => story.trace(`${process.name} warns: ${what}${short(fields)}`),
      error: (what, fields) => {
        if (process.state !== "dead") story.fail(`log: ${process.name} says: ${what}${short(fields)}`);
      },
      with: () => log,
    };
    return log;
  }

  #process(name: string, role: Role): { slot: Slot; bus: Bus; process: SimulatedProcess; log: Log } {
    const { world, broker, watch, story, break_bus } = this.#deps;
    const connection = `${name}#${this.#generation++}`;
    const process = new SimulatedProcess(connection, world);
    const bus = process.bus(broker().connect(connection), {
      sent: (subject, data) => {
        if (role === "worker" && subject.startsWith("_INBOX")) watch.replied(connection, subject, data);
      },
      acknowledged: (delivery) => {
        if (role === "worker") watch.acknowledged(connection, delivery);
      },
    });
    const broken = break_bus?.(bus, name) ?? bus;
    const slot: Slot = { name, role, process, connection, bus: broken, parts: {}, ending: false, gone: false };
    this.slots.set(name, slot);
    story.trace(`${connection} begins`);
    return { slot, bus: broken, process, log: this.#log(process) };
  }

  #supervisor(name: string): void {
    const { slot, bus, process, log } = this.#process(name, "supervisor");
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

  /** As roles/worker.ts has it. */
  worker(name: string, key = name): void {
    const { story, models } = this.#deps;
    const { slot, bus, process, log } = this.#process(key, "worker");
    const { world } = process;
    let commits = 0;
    const late: { member?: Member } = {};
    const restorer = createRestorer({ bus, cores: simulationCores, log });
    const directory = createDirectory({ bus, restorer, world, log });
    const standing = createBudgetStanding({ bus, restorer, world, log });
    const turns = createTurnFinder({ bus, restorer });
    const pool = createCallPool({ world, calls_max: CALLS_MAX });
    const providers = models.providers({ world, connection: slot.connection, end: (why) => this.end(slot, why) });
    const money = createModelMoney({ client: createCommandClient({ bus, world }), world, providers, slots: createSlotCaller(bus), pool });
    const model = { world, providers, breakers: createBreakerBoard({ world, log, worker: name }), money, pool };
    const tools = callTool(world, undefined, money);
    const performers = gated(createGate({ directory, world }), {
      load_configuration: loadConfiguration(directory, world, initSteps(directory, world, TOOLS)),
      call_model: models.performer(withGuardrails({ ...model, patterns: NO_PATTERNS }, callModel(model))),
      call_tool: (input: { name: string }, scope) => (input.name === "charge" ? models.charge(world, scope) : tools(input as never, scope)),
      look_up_turns: lookUpTurns(turns),
    });
    const dispatch = createDispatch({ world });
    const made = createShardHost({
      bus,
      world,
      log,
      cores: simulationCores,
      restorer,
      performers: this.#watched(slot, performers),
      worker: name,
      next_commit_id: () => `${slot.connection}.${commits++}`,
      may_act: () => late.member?.may_act() ?? false,
      on_conflict: (shard, epoch) => late.member?.on_conflict(shard, epoch) ?? Promise.resolve("lost"),
      admit: createAdmission({ directory, providers, standing, pool, turns, tools: TOOLS }),
      dispatch,
      on_resumed: ({ actor, shard, epoch, entries, replay_ms }) => {
        story.count("resumed");
        tellResumed(bus, { worker: name, actor: actorPath(actor), shard, epoch, entries, replay_ms });
      },
      assume_cost: assumedCost,
      passivate_after_ms: PASSIVATE_AFTER_MS,
    });
    const host = this.#leased(slot, this.#deps.break_host?.(made) ?? made, late);
    const me = new Member({
      bus,
      world,
      log,
      id: name,
      versions: Object.values(simulationCores).map((core) => core.machine_name),
      host,
      handover_deadline_ms: 20_000,
    });
    late.member = me;
    slot.parts = { member: me, host };
    startHostService({ bus, world, log, worker: name, host, draining: () => me.draining, may_act: () => me.may_act(), pool, dispatch });
    const beat = (): void => {
      void world.after(LEASE_RENEW_MS / 4, () => {
        if (me.phase !== "stopped") void me.tick().finally(beat);
      });
    };
    void me.start().then(beat);
  }

  /** M3: a shard is taken with a valid lease only. */
  #leased({ process, connection }: Slot, host: ShardHost, late: { readonly member?: Member }): ShardHost {
    const { story } = this.#deps;
    return {
      ...host,
      take: (shard, epoch, from) => {
        if (process.state === "running" && late.member?.may_act() !== true)
          story.fail(`M3: ${connection} takes shard ${shard} under epoch ${epoch} without a valid lease`);
        return host.take(shard, epoch, from);
      },
      prepare: (shard) => {
        story.count("shards prepared");
        return host.prepare(shard);
      },
    };
  }

  /** The watch hears of every effect that begins. */
  #watched({ process, connection }: Slot, performers: Performers): Performers {
    return Object.fromEntries(
      Object.entries(performers).map(([src, perform]): [string, Performer] => [
        src,
        (input, scope) => {
          // What a dead process would still do in this very instant does not happen.
          if (process.state !== "running") return new Promise<Json>(() => undefined);
          const { actor, inst, attempt, epoch } = scope;
          this.#deps.watch.began({ actor, inst, attempt, epoch, src, input: canonicalJson(input), worker: connection });
          return perform(input, scope);
        },
      ]),
    );
  }

  #service(name: string): void {
    const { slot, bus, process } = this.#process(name, "service");
    const { world } = process;
    slot.parts.clients = { fast: createCommandClient({ bus, world }), durable: createCommandClient({ bus, world, fast_lane: false }) };
  }

  speaker(name: string): Speaker {
    const { bus, process, parts } = this.slots.get(name)!;
    return { bus, world: process.world, clients: parts.clients! };
  }

  #gateway(name: string): void {
    const { slot, bus, process, log } = this.#process(name, "gateway");
    slot.parts.hub = createFeedHub({ bus, world: process.world, log, on_behind: () => this.#deps.story.count("readers behind") });
    for (const reader of this.readers) this.attach(reader);
  }

  #projector(name: string): void {
    const { slot, bus, process, log } = this.#process(name, "projector");
    const { rows, die } = this.#deps.postgres.connect(process, slot.connection);
    slot.parts.leaveDatabase = die;
    createProjector({ bus, rows, world: process.world, log });
  }

  // ── their life ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** The slot whose process this connection is now. */
  slotOf(connection: string): Slot | undefined {
    const slot = this.slots.get(connection.slice(0, connection.indexOf("#")));
    return slot?.connection === connection ? slot : undefined;
  }

  #die(slot: Slot): void {
    slot.process.die();
    slot.parts.leaveDatabase?.();
    this.#deps.broker().kill(slot.connection);
  }

  end(slot: Slot, why: string): void {
    if (slot.process.state === "dead") return;
    this.#deps.story.trace(`${slot.connection} dies: ${why}`);
    this.#die(slot);
    if (slot.ending) return;
    slot.ending = true;
    this.#deps.world.after(200 + (hashOfText(slot.connection) % 2_500), () => this.#again(slot));
  }

  #again(slot: Slot): void {
    slot.gone = true;
    if (this.slots.get(slot.name) !== slot) return;
    if (slot.role === "worker") this.worker(slot.name.replace(/'$/, ""), slot.name);
    else if (slot.role === "supervisor") this.#supervisor(slot.name);
    else if (slot.role === "gateway") this.#gateway(slot.name);
    else if (slot.role === "projector") this.#projector(slot.name);
  }

  /** A process more: another one, or a second one under the name of one that may be running. */
  join(name: string, key: string): void {
    const there = this.slots.get(key);
    if (there !== undefined && !there.gone) return;
    if (name === PROJECTOR) this.#projector(key);
    else this.worker(name, key);
  }

  goOn(slot: Slot): void {
    if (slot.process.state !== "stopped") return;
    this.#deps.story.trace(`${slot.connection} goes on`);
    slot.process.goOn();
  }

  stop(slot: Slot, ms: number): void {
    if (slot.process.state !== "running") return;
    this.#deps.story.trace(`${slot.connection} stands still for ${ms} ms`);
    this.#deps.story.count("stops");
    slot.process.stop();
    this.#deps.world.after(ms, () => this.goOn(slot));
    // A broker lets go of a connection that answers no pings.
    if (ms > 8_000 && ms % 2_000 === 0) this.cut(slot, ms);
  }

  cut(slot: Slot, ms: number): void {
    const broker = this.#deps.broker();
    broker.cut(slot.connection);
    this.#deps.world.after(ms, () => broker.mend(slot.connection));
  }

  /** As SIGTERM does it. */
  drain(slot: Slot, deadline_ms: number): void {
    const { member, host } = slot.parts;
    if (member === undefined || host === undefined || slot.ending || slot.process.state === "dead") return;
    slot.ending = true;
    this.#deps.story.count("drains");
    const gone = async (): Promise<void> => {
      await member.drain({ deadline_ms });
      await member.stop();
      await host.stop();
    };
    void gone().then(() => {
      this.#deps.story.trace(`${slot.connection} has drained and ends`);
      this.#die(slot);
    });
    // Whether it ended by itself or was killed meanwhile, another one comes.
    const look = (): void => void this.#deps.world.after(500, () => (slot.process.state === "dead" ? this.#again(slot) : look()));
    look();
  }

  /** At most one process may act on a shard. */
  checkOwners(): void {
    const owners = new Map<number, string>();
    for (const { process, parts, connection } of this.slots.values()) {
      if (process.state !== "running" || parts.member?.may_act() !== true) continue;
      for (const { shard, phase } of parts.host?.owned() ?? []) {
        if (phase === "taking") continue;
        const other = owners.get(shard);
        if (other !== undefined) this.#deps.story.fail(`M3: ${other} and ${connection} may both act on shard ${shard}`);
        owners.set(shard, connection);
      }
    }
  }

  /** Every shard has one owner. */
  isPlaced(): boolean {
    const owned = [...this.slots.values()].flatMap(({ process, parts }) =>
      process.state === "running" ? (parts.host?.owned() ?? []).filter(({ phase }) => phase === "owning").map(({ shard }) => shard) : [],
    );
    return owned.length === SHARDS && new Set(owned).size === SHARDS;
  }

  /** No actor is in anybody's memory. */
  isEmpty(): boolean {
    return [...this.slots.values()].every(({ process, parts }) => process.state === "dead" || (parts.host?.resident().length ?? 0) === 0);
  }

  describe(): string[] {
    const processes = [...this.slots.values()].map(
      ({ connection, process, parts }) =>
        `${connection} ${process.state} ${parts.member?.phase ?? parts.leader?.role ?? ""} ${JSON.stringify(parts.host?.owned() ?? [])}`,
    );
    return [...processes, ...this.readers.map((reader) => `${reader.deps.name} ${reader.given}/${reader.deps.journal().events.length}`)];
  }

  // ── readers ────────────────────────────────────────────────────────────────────────────────────────────────────────

  read(path: string, slow_ms: number): void {
    const { watch, models, story } = this.#deps;
    const actor = addressOf(path);
    const reader = new Reader({
      actor,
      name: `reader ${this.readers.length}`,
      slow_ms,
      journal: () => watch.journal(actor),
      spoken: models.spoken,
      fail: story.fail,
    });
    this.readers.push(reader);
    this.attach(reader);
  }

  /** Reads on, from the reader's cursor, through the gateway as it is now. */
  attach(reader: Reader): void {
    this.#reading.get(reader)?.abort();
    const abort = new AbortController();
    this.#reading.set(reader, abort);
    const { process, parts, bus } = this.slots.get(GATEWAY)!;
    const { world } = process;
    const { hub } = parts;
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
      this.#deps.story.trace(`${reader.deps.name} is let go: ${String(error)}`);
      if (error instanceof Error && error.name === "BrokenPromise") this.#deps.story.fail(`F: ${reader.deps.name}: ${error.message}`);
      if (mine()) void world.after(300, () => this.attach(reader));
    });
  }
}

function short(fields: LogFields | undefined): string {
  if (fields === undefined) return "";
  const { stack: _, ...rest } = fields;
  return ` ${JSON.stringify(rest).slice(0, 300)}`;
}
