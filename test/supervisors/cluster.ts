// cluster: supervisors and workers in one thread and in virtual time, on the in-memory bus, with the real worker machine and
// journals. Hosts are recorders: what they own, since when, and every moment at which two owned one shard.
import { expect } from "vitest";
import type { ShardHost, ShardStatus } from "../../actors/shard-host.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createMemoryConnectionWatch, lifelineName, type MemoryConnectionWatch } from "../../bus/connection-watch.ts";
import { createMemoryBroker, type Faults, type MemoryBroker } from "../../bus/memory.ts";
import type { Bucket, BucketChange, BucketName, Bus } from "../../bus/port.ts";
import { decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { LEASE_RENEW_MS } from "../../protocol/limits.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import type { World } from "../../protocol/world.ts";
import { cores } from "../../state-machines/kinds.ts";
import { connectionOf } from "../../supervisors/connections.ts";
import { Leader, type LeaderOptions } from "../../supervisors/leader.ts";
import { Member } from "../../supervisors/member.ts";
import { decodePlacementEntry, type PlacementEntry, shardOfKey } from "../../supervisors/tables.ts";
import { createWorkerCells, type WorkerCell, workerActor } from "../../supervisors/worker-cell.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

/** A process that can be stopped as by SIGSTOP: its alarms and what it hears wait until it goes on; time does not. */
export class Sleeper {
  asleep = false;
  /** Awake, but what it watches does not reach it. */
  deaf = false;
  /** Who listens to WORKERS, so that a test can lie to them. */
  readonly worker_listeners: ((change: BucketChange) => void)[] = [];
  #waiting: (() => void)[] = [];
  readonly world: World;
  constructor(world: World) {
    this.world = {
      now_ms: () => world.now_ms(),
      monotonic_ms: () => world.monotonic_ms(),
      random: () => world.random(),
      id: () => world.id(),
      after: (ms, callback) => {
        let cancelled = false;
        const cancel = world.after(ms, () => this.run(() => !cancelled && callback()));
        return () => {
          cancelled = true;
          cancel();
        };
      },
    };
  }
  run(callback: () => void): void {
    if (this.asleep) this.#waiting.push(callback);
    else callback();
  }
  wake(): void {
    this.asleep = false;
    for (const callback of this.#waiting.splice(0)) callback();
  }
  /** The process's view of a bus: what it watches waits while it sleeps. */
  bus(bus: Bus): Bus {
    const bucket = (name: BucketName): Bucket => {
      const inner = bus.bucket(name);
      return {
        get: (key) => inner.get(key),
        all: () => inner.all(),
        create: (key, value) => inner.create(key, value),
        update: (key, value, revision) => inner.update(key, value, revision),
        delete: (key, revision) => inner.delete(key, revision),
        watch: (listener) => {
          if (name === "WORKERS") this.worker_listeners.push(listener);
          return inner.watch((change) => {
            if (!this.deaf) this.run(() => listener(change));
          });
        },
      };
    };
    return new Proxy(bus, {
      get(target, property) {
        if (property === "bucket") return bucket;
        const value: unknown = Reflect.get(target, property, target);
        return typeof value === "function" ? (value as (...args: unknown[]) => unknown).bind(target) : value;
      },
    });
  }
}

/** A host that owns and does nothing. `busy` effects hold up a planned leaving until they end or the deadline passes. */
export class RecordingHost implements Pick<ShardHost, "take" | "leave" | "drop" | "owned"> {
  readonly shards = new Map<number, ShardStatus>();
  readonly history: string[] = [];
  busy = false;
  take_ms = 0;
  readonly #world: World;
  constructor(world: World) {
    this.#world = world;
  }
  async take(shard: number, epoch: number, from: { worker: string | null; reason: string }): Promise<void> {
    this.history.push(`take ${shard}@${epoch} from ${from.worker ?? "-"} ${from.reason}`);
    this.shards.set(shard, { shard, epoch, phase: "taking", resident: 0, running: 0 });
    if (this.take_ms > 0) await new Promise<void>((resolve) => void this.#world.after(this.take_ms, resolve));
    if (this.shards.get(shard)?.epoch === epoch) this.shards.set(shard, { shard, epoch, phase: "owning", resident: 2, running: this.busy ? 1 : 0 });
  }
  async leave(shard: number, deadline_ms: number): Promise<{ gap: boolean }> {
    const until_ms = this.#world.monotonic_ms() + deadline_ms;
    const status = this.shards.get(shard);
    if (status !== undefined) this.shards.set(shard, { ...status, phase: "leaving" });
    while (this.busy && this.shards.has(shard) && this.#world.monotonic_ms() < until_ms)
      await new Promise<void>((resolve) => void this.#world.after(20, resolve));
    this.history.push(`leave ${shard}`);
    this.shards.delete(shard);
    return { gap: !this.busy };
  }
  async drop(shard: number): Promise<void> {
    if (this.shards.delete(shard)) this.history.push(`drop ${shard}`);
  }
  owned(): readonly ShardStatus[] {
    return [...this.shards.values()];
  }
}

export interface TestWorker {
  readonly id: string;
  readonly member: Member;
  readonly host: RecordingHost;
  readonly sleeper: Sleeper;
  readonly connection: string;
  kill(): void;
}
export interface TestSupervisor {
  readonly id: string;
  readonly leader: Leader;
  readonly sleeper: Sleeper;
  readonly connection: string;
  kill(): void;
}

export class Cluster {
  readonly world: VirtualWorld;
  readonly broker: MemoryBroker;
  /** What the broker tells of connections. Supervisors hear it when they are given it. */
  readonly connections: MemoryConnectionWatch = createMemoryConnectionWatch();
  readonly shards: number;
  readonly workers = new Map<string, TestWorker>();
  readonly observer: Bus;
  #connections = 0;

  constructor(options: { seed?: number; shards?: number; faults?: Faults } = {}) {
    this.world = new VirtualWorld(options.seed ?? 1);
    this.shards = options.shards ?? 8;
    this.broker = createMemoryBroker({ world: this.world, shards: this.shards, ...(options.faults === undefined ? {} : { faults: options.faults }) });
    this.observer = this.broker.connect("observer");
  }

  worker(id: string, options: { handover_deadline_ms?: number } = {}): TestWorker {
    const connection = `worker-${id}-${this.#connections++}`;
    const sleeper = new Sleeper(this.world);
    const host = new RecordingHost(sleeper.world);
    let killed = false;
    const member = new Member({
      bus: sleeper.bus(this.broker.connect(connection)),
      world: sleeper.world,
      log: silentLog,
      id,
      versions: ["session@1"],
      host,
      ...options,
    });
    const beat = (): void => {
      void sleeper.world.after(LEASE_RENEW_MS / 4, () => {
        if (!killed && member.phase !== "stopped") void member.tick().finally(beat);
      });
    };
    void member.start().then(beat);
    const worker: TestWorker = {
      id,
      member,
      host,
      sleeper,
      connection,
      kill: () => {
        killed = true;
        sleeper.asleep = true;
        host.shards.clear();
        this.broker.kill(connection);
        this.workers.delete(id);
      },
    };
    this.workers.set(id, worker);
    return worker;
  }

  supervisor(id: string, { change_cell, ...options }: Partial<LeaderOptions> & { change_cell?: (cell: WorkerCell) => WorkerCell } = {}): TestSupervisor {
    const connection = `supervisor-${id}-${this.#connections++}`;
    const sleeper = new Sleeper(this.world);
    const bus = sleeper.bus(this.broker.connect(connection));
    const { world } = sleeper;
    let commits = 0;
    const open_cell = createWorkerCells({
      bus,
      world,
      log: silentLog,
      core: cores.worker,
      restorer: createRestorer({ bus, cores, log: silentLog }),
      supervisor: id,
      next_commit_id: () => `${connection}.${commits++}`,
    });
    const leader = new Leader({
      bus,
      world,
      log: silentLog,
      id,
      open_cell: change_cell === undefined ? open_cell : (worker, term) => change_cell(open_cell(worker, term)),
      ...options,
    });
    leader.start();
    return {
      id,
      leader,
      sleeper,
      connection,
      kill: () => {
        sleeper.asleep = true;
        this.broker.kill(connection);
      },
    };
  }

  /** The broker's notices of one of a worker's connections. */
  tellConnected(worker: string, which: "main" | "life", client_id: string): void {
    this.connections.tell({ kind: "connected", name: nameOf(worker, which), client_id });
  }
  tellClosed(worker: string, which: "main" | "life", client_id: string, reason = "Client Closed"): void {
    this.connections.tell({ kind: "disconnected", name: nameOf(worker, which), client_id, reason, by: reason === "Client Closed" ? "client" : "broker" });
  }

  /** The same of both connections of a supervisor. */
  tellSupervisor(id: string, what: "connected" | "closed", client_id: string, reason = "Client Closed"): void {
    const name = connectionOf("supervisor", id);
    for (const one of [name, lifelineName(name)])
      this.connections.tell(
        what === "connected"
          ? { kind: "connected", name: one, client_id }
          : { kind: "disconnected", name: one, client_id, reason, by: reason === "Client Closed" ? "client" : "broker" },
      );
  }

  async table(): Promise<Map<number, PlacementEntry>> {
    const entries = await this.observer.bucket("PLACEMENT").all();
    return new Map(
      entries.flatMap((read) => {
        const [shard, entry] = [shardOfKey(read.key, this.shards), decodePlacementEntry(read.value)];
        return shard === undefined || entry === undefined ? [] : [[shard, entry] as const];
      }),
    );
  }

  /** Every shard is owned by exactly the worker that the table names, under its epoch, and by no other. */
  placed(): boolean {
    const owners = new Map<number, string[]>();
    for (const { id, host } of this.workers.values())
      for (const { shard, phase } of host.shards.values()) if (phase === "owning") owners.set(shard, [...(owners.get(shard) ?? []), id]);
    return owners.size === this.shards && [...owners.values()].every((ids) => ids.length === 1);
  }
  counts(): Record<string, number> {
    return Object.fromEntries([...this.workers.values()].map(({ id, host }) => [id, host.shards.size]));
  }
  balanced(): boolean {
    const counts = Object.values(this.counts());
    return this.placed() && Math.max(...counts) - Math.min(...counts) <= 1;
  }
  async until(what: string, condition: () => boolean, patience_ms = 10_000): Promise<void> {
    const came = await this.world.until(condition, patience_ms);
    expect(came, `${what}: ${JSON.stringify(this.counts())}`).toBe(true);
  }

  async journal(worker: string): Promise<JournalMessage[]> {
    const messages: JournalMessage[] = [];
    for await (const message of this.observer.read("EVENTS", actorSubject(workerActor(worker), "event"), 1)) messages.push(decodeJournal(message.data));
    return messages;
  }
  async events(worker: string): Promise<string[]> {
    return (await this.journal(worker)).flatMap(({ events }) =>
      events.map((event) => (event.type === "worker.state" ? `state ${String(event["from"])}→${String(event["to"])}` : event.type)),
    );
  }
}

const nameOf = (worker: string, which: "main" | "life"): string =>
  which === "main" ? connectionOf("worker", worker) : lifelineName(connectionOf("worker", worker));
