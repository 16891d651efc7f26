// Leader: the supervisor that leads. Any number stand by; the one that holds the LEADER lease decides who is dead, who owns
// what, and what moves.
//
//   standby ──the lease is free, or its holder is gone (succession.ts)──▶ leading ──lost by own clock, by the bucket, or by a fenced append──▶ standby
//
//   lease of a worker appears ──▶ worker.join, worker.ready ──▶ shards are given to it
//   half forgotten, or one of its two connections closed ──▶ worker.suspect    (it keeps what it has and gets no more)
//   both connections closed, or lease expired ──▶ worker.declare_dead, then its shards go to others and its lease is deleted
//   lease or operator: drains ──▶ worker.drain, then its shards move away, each once its next owner is prepared ──▶ lease gone, nothing owned ──▶ worker.leave
//
// It is level-triggered: every change makes one pass over all that is known, and a pass on what is as it should be does
// nothing. So a new leader needs no hand-over: it reads the journals, the leases and the table, and makes its first pass.
//
// Owns: the worker actors' journals, the assignments in PLACEMENT. Leaves to members: leaving a shard and writing the next
// entry of a planned move.
//
// Invariants:
//   D1. Each decision is appended to the worker's journal before the table changes by it; the append carries the epoch of
//       this leadership and is the fence between two leaders.
//   D2. The table changes by compare-and-set only, and the epoch of a shard only rises.
//   D3. Nobody is judged dead within one TTL of an outage of the bus, nor before the leader has looked itself: the bucket's leader
//       says that the lease is gone, or nobody answers for a worker whose connections were closed. Who is not judged keeps what
//       the table gives.
//   D4. Nothing is decided unless the LEADER lease is valid by our own clock.
//   D5. One pass at a time; a pass that makes no progress for PASS_PATIENCE_MS ends the term.
import type { ConnectionEvent, ConnectionWatch } from "../bus/connection-watch.ts";
import { type Bucket, type BucketChange, type BucketEntry, type Bus, type Delivery, headerOf, type Subscription } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { decodeCommand, HEADER_REPLY_TO } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, SYSTEM_TENANT } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { HANDOVER_DEADLINE_MS, LEASE_RENEW_MS, LEASE_TTL_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { encodeReply } from "../protocol/reply.ts";
import { isReplyAllowed, parseActorSubject, RESUMED_SUBJECT, WORKER_COMMAND_FILTER } from "../protocol/subjects.ts";
import { timestamp, type World } from "../protocol/world.ts";
import type { Outcome } from "../state-machines/step.ts";
import { Connections, GRACE_MS, type Presence, SETTLE_MS } from "./connections.ts";
import { askHost } from "./host-service.ts";
import { Lease } from "./lease.ts";
import { leastLoaded, type PlacementDecision, type PlacementStrategy, type PlacementWorker, planPlacement } from "./placement.ts";
import { Preparations } from "./preparations.ts";
import { decodeResumed } from "./resumed.ts";
import { Succession } from "./succession.ts";
import {
  decodeLeaderLease,
  decodePlacementEntry,
  decodeWorkerLease,
  encodeRecord,
  LEADER_KEY,
  type PlacementEntry,
  placementKey,
  shardOfKey,
  type WorkerLease,
} from "./tables.ts";
import { type CommandOrigin, type OpenWorkerCell, type WorkerCell, type WorkerRecord, workerActor } from "./worker-cell.ts";

/** The supervisor's own loop. Four beats to a renewal: a late beat costs no renewal. */
const BEAT_MS = LEASE_RENEW_MS / 4;
/** Between repeats of what the bus could not take. */
const RETRY_MS = 250;
/** A worker that was silent for this part of its lease is suspected: past a pause of 2 s and a renewal's second, before the end. */
const SUSPECT_AFTER = 0.7;
/** How long past its deadline a planned move is left to the owner before the leader ends it. */
const MOVE_GRACE_MS = 5_000;
/** A pass is a few appends and table writes for each shard: some hundred milliseconds. */
const PASS_PATIENCE_MS = 2 * LEASE_TTL_MS;
/** A worker that died this often within the window gets nothing while another can take it: a restart loop moves no shards. */
const DEATHS_MAX = 3;
const DEATHS_WINDOW_MS = 5 * 60_000;
/** Nobody listens for a dead worker, and the broker says so at once; a worker that is there answers within a few milliseconds. */
const HEALTH_PATIENCE_MS = 100;
/** The names of workers come from our own configuration; the bound is for a configuration that draws a new name at each start. */
const CELLS_MAX = 10_000;
/** News of resumed actors waiting for their append. A worker's death is some hundred of them; above it the history is thinned, not the work. */
const RESUMING_MAX = 1_000;
const WORKER_JOURNALS = `tenant.${SYSTEM_TENANT}.worker.*.event`;

export interface LeaderOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** This supervisor. */
  readonly id: string;
  readonly open_cell: OpenWorkerCell;
  readonly strategy?: PlacementStrategy;
  /** Machine versions that journals are pinned to: who does not know them is given nothing. */
  required_versions?(): readonly string[];
  /** What the broker tells of connections. Without it the leases alone decide. */
  readonly connections?: ConnectionWatch;
  /** Must be the time to live of the buckets' keys. */
  readonly ttl_ms?: number;
  readonly handover_deadline_ms?: number;
  observer?: LeaderObserver;
}

export interface LeaderObserver {
  role?(role: "standby" | "leading", epoch: number | undefined): void;
  /** A worker was declared dead, `detect_ms` after it was last heard of. */
  died?(worker: string, detect_ms: number): void;
  /** How many workers are in each state, as this leader's journals say; nothing at all once it leads no more. */
  workers?(count_by_state: ReadonlyMap<string, number>): void;
  /** A shard got an owner; `assign_ms` after it lost the last one, as far as this leader saw it. */
  assigned?(given: { readonly shard: number; readonly worker: string; readonly epoch: number; readonly reason: string; readonly assign_ms: number }): void;
  /** A living owner was asked to hand the shard over. */
  moved?(move: { readonly shard: number; readonly from: string; readonly to: string; readonly reason: string }): void;
  /** An actor with work in flight goes on; the times follow one another, and `first_token_ms` is absent when none came soon. */
  resumed?(times: { readonly detect_ms: number; readonly assign_ms: number; readonly replay_ms: number; readonly first_token_ms?: number }): void;
}

interface Placed {
  readonly entry: PlacementEntry;
  readonly revision: number;
}

interface Present {
  readonly lease: WorkerLease;
  readonly revision: number;
  readonly heard_ms: number;
}

/** One leadership, from winning the lease to losing it. */
interface Leadership {
  readonly epoch: number;
  readonly incarnation: string;
  readonly cells: Map<string, WorkerCell>;
  readonly loads: Map<string, Promise<void>>;
  readonly present: Map<string, Present>;
  /** When a worker that is not present was last heard, and what its lease said. */
  readonly missing: Map<string, { readonly lease: WorkerLease | undefined; readonly heard_ms: number }>;
  readonly table: Map<number, Placed>;
  /** Shards whose entry was written and nobody said what became of it: nothing follows from what is known of them. */
  readonly doubtful: Set<number>;
  /** When a planned move was first seen, for its deadline. */
  readonly moves: Map<number, { readonly to: string; readonly seen_ms: number }>;
  /** Planned moves that begin when their target is ready. */
  readonly preparations: Preparations;
  readonly unowned_since_ms: Map<number, number>;
  /** For how long each dead worker had been silent when it was declared dead. */
  readonly detected_ms: Map<string, number>;
  /** How each shard came to its present owner after a death, for the history of what resumed. */
  readonly recoveries: Map<number, { readonly epoch: number; readonly detect_ms: number; readonly assign_ms: number }>;
  /** News of resumed actors on their way into a journal. */
  resuming: number;
  readonly subscriptions: Subscription[];
  readonly commands: Delivery[];
  commanding: boolean;
  dirty: boolean;
  passing_since_ms: number | undefined;
  over: boolean;
  /** Resolves when `over`. */
  readonly ended: Promise<"ended">;
  end(): void;
}

export class Leader {
  readonly #options: LeaderOptions;
  readonly #ttl_ms: number;
  readonly #leaders: Bucket;
  readonly #workers: Bucket;
  readonly #placement: Bucket;
  readonly #incarnation: string;
  readonly #started_at: string;
  readonly #lease: Lease;
  readonly #deaths = new Map<string, number[]>();
  /** Kept also while standing by, so that who begins to lead knows. */
  readonly #connections: Connections;
  readonly #succession: Succession;
  #succeeding = false;
  readonly #subscriptions: Subscription[] = [];
  #leadership: Leadership | undefined;
  #preparing = false;
  #stopped = false;
  #cancelBeat: (() => void) | undefined;
  #tried_ms = Number.NEGATIVE_INFINITY;
  #renewed_ms = 0;
  /** D3. When the bus was last seen to fail, or when we began to look. */
  #calm_since_ms: number;
  /** The same of the workers' leases alone: their bucket has a leader of its own in the broker, which may be away while everything else is there. */
  #leases_calm_since_ms: number;
  #probing_since_ms: number | undefined;
  #probed_ms = Number.NEGATIVE_INFINITY;

  constructor(options: LeaderOptions) {
    const { bus, world } = options;
    this.#options = options;
    this.#ttl_ms = options.ttl_ms ?? LEASE_TTL_MS;
    this.#leaders = bus.bucket("LEADER");
    this.#workers = bus.bucket("WORKERS");
    this.#placement = bus.bucket("PLACEMENT");
    this.#incarnation = world.id();
    this.#started_at = timestamp(world.now_ms());
    this.#calm_since_ms = world.monotonic_ms();
    this.#leases_calm_since_ms = this.#calm_since_ms;
    this.#connections = new Connections(world, "worker");
    this.#succession = new Succession({ bus, world, id: options.id, incarnation: this.#incarnation, may_judge: () => this.#mayJudge() });
    this.#lease = new Lease({
      bucket: this.#leaders,
      key: LEADER_KEY,
      world,
      log: options.log,
      ttl_ms: this.#ttl_ms,
      is_mine: (value) => decodeLeaderLease(value)?.incarnation === this.#incarnation,
    });
  }

  get role(): "standby" | "leading" {
    return this.#leadership === undefined ? "standby" : "leading";
  }
  /** Of the present leadership. */
  get epoch(): number | undefined {
    return this.#leadership?.epoch;
  }

  /** D4. By our own clock, now: may this supervisor decide anything? */
  may_decide(): boolean {
    return this.#leadership !== undefined && this.#mayAct(this.#leadership);
  }

  /** Stands by from now on. Its loop is its own: it beats until stop. */
  start(): void {
    assert(this.#cancelBeat === undefined && !this.#stopped, "a supervisor starts once");
    this.#subscriptions.push(
      this.#options.bus.on_state((state) => {
        this.#options.log.info("the supervisor's connection changed", { state });
        this.#outage();
      }),
    );
    this.#subscriptions.push(this.#succession.answer());
    if (this.#options.connections !== undefined) this.#subscriptions.push(this.#options.connections.on((event) => this.#onConnection(event)));
    this.#watchLeader().catch((error: unknown) =>
      this.#options.log.warn("the leader's lease cannot be watched; it is asked for every second", errorFields(error)),
    );
    this.#beatLater(0);
  }

  /** Gives the leadership back at once, so that a standby need not wait for the lease to end. */
  async stop(): Promise<void> {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#cancelBeat?.();
    this.#endLeadership("this supervisor stops");
    await Promise.all(this.#subscriptions.splice(0).map((subscription) => subscription.stop()));
    for (let waits = 0; this.#lease.busy && waits < 20; waits++) await this.#pause(RETRY_MS);
    if (!this.#lease.busy) await this.#lease.release();
  }

  // ── the loop ─────────────────────────────────────────────────────────────────────────────────────────────────────

  #beatLater(ms: number): void {
    if (this.#stopped) return;
    this.#cancelBeat?.();
    this.#cancelBeat = this.#options.world.after(ms, () => {
      this.#beat()
        .catch((error: unknown) => this.#options.log.error("a beat of the supervisor broke", errorFields(error)))
        .finally(() => this.#beatLater(BEAT_MS));
    });
  }

  async #watchLeader(): Promise<void> {
    const watch = await this.#leaders.watch((change) => {
      if ((change.kind === "put" ? change.entry.key : change.key) !== LEADER_KEY || this.#lease.busy) return;
      if (change.kind === "gone" && this.#leadership === undefined) this.#tried_ms = Number.NEGATIVE_INFINITY;
      else if (change.kind === "put" && change.entry.revision > (this.#lease.revision ?? Number.POSITIVE_INFINITY)) this.#renewed_ms = Number.NEGATIVE_INFINITY;
      else return;
      this.#beatLater(0); // it is free, or another took it from us: the renewal says so
    });
    if (this.#stopped) await watch.stop();
    else this.#subscriptions.push(watch);
  }

  async #beat(): Promise<void> {
    const now_ms = this.#options.world.monotonic_ms();
    const { bus } = this.#options;
    if (bus.state === "disconnected") this.#outage();
    const leadership = this.#leadership;
    if (leadership !== undefined && !this.#lease.is_valid()) this.#endLeadership("its lease ended");
    if (this.#lease.busy) return;
    if (this.#leadership?.passing_since_ms !== undefined && now_ms - this.#leadership.passing_since_ms >= PASS_PATIENCE_MS) {
      this.#endLeadership("a pass makes no progress"); // D5: let another one try, and not this one at once
      this.#tried_ms = now_ms + this.#ttl_ms;
      await this.#lease.release();
      return;
    }
    if (this.#lease.is_valid()) {
      if (now_ms - this.#renewed_ms >= LEASE_RENEW_MS) await this.#renew(now_ms);
      if (!this.#lease.is_valid() || this.#stopped) return;
      void this.#probe(now_ms);
      if (this.#leadership === undefined) this.#beginToLead();
      else this.#wake(this.#leadership);
      return;
    }
    if (now_ms - this.#tried_ms < LEASE_RENEW_MS) return;
    this.#tried_ms = now_ms;
    const outcome = await this.#lease.acquire(this.#value());
    if (outcome.kind === "unavailable") this.#outage();
    if (outcome.kind === "taken") await this.#succeed(outcome);
    if (outcome.kind !== "held" || this.#stopped) return;
    this.#renewed_ms = now_ms;
    this.#beginToLead();
  }

  #mayTry(): boolean {
    return !this.#stopped && this.#leadership === undefined && !this.#succeeding && !this.#lease.busy && !this.#lease.is_valid();
  }

  /** Takes the lease of a leader that is gone for sure, and fences it by that. `seen`: the lease as it was read just now, if it was. */
  async #succeed(seen?: Pick<BucketEntry, "value" | "revision">): Promise<void> {
    if (!this.#mayTry()) return;
    this.#succeeding = true;
    try {
      const standing = seen ?? (await this.#attempt("the leader's lease", async () => ({ entry: await this.#leaders.get(LEADER_KEY) })))?.entry;
      const vacancy = standing === undefined ? undefined : await this.#succession.vacancyOf(standing);
      if (vacancy === undefined || this.#stopped || this.#lease.busy || this.#lease.is_valid()) return;
      const { world, log, id } = this.#options;
      const now_ms = world.monotonic_ms();
      const outcome = await this.#lease.take_over(this.#value(), vacancy.revision);
      if (outcome.kind !== "held" || this.#stopped) return;
      log.warn("the leading supervisor is gone; this one takes its place", { supervisor: id, ...vacancy.why });
      this.#renewed_ms = now_ms;
      this.#beginToLead();
    } finally {
      this.#succeeding = false;
    }
  }

  #value(): Uint8Array {
    return encodeRecord({ id: this.#options.id, incarnation: this.#incarnation, started_at: this.#started_at });
  }

  async #renew(now_ms: number): Promise<void> {
    const outcome = await this.#lease.renew(this.#value());
    if (outcome.kind === "held") this.#renewed_ms = now_ms;
    else if (outcome.kind === "unavailable") this.#outage();
    else this.#endLeadership(`its lease was ${outcome.reason}`);
  }

  // ── leading ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Beside the loop, which goes on renewing the lease meanwhile. */
  #beginToLead(): void {
    if (this.#preparing) return;
    this.#preparing = true;
    this.#lead()
      .catch((error: unknown) => {
        this.#options.log.error("a supervisor could not begin to lead", errorFields(error));
        this.#endLeadership("it could not begin");
      })
      .finally(() => {
        this.#preparing = false;
      });
  }

  async #lead(): Promise<void> {
    const { bus, world, log, id, observer } = this.#options;
    const revision = this.#lease.revision;
    assert(revision !== undefined, "who leads holds the lease");
    const known = await this.#attempt("the workers' journals", () => bus.last_of_each("EVENTS", WORKER_JOURNALS));
    if (known === undefined || !this.#lease.is_valid() || this.#stopped) return;
    const heads = known.map((message) => decodeJournal(message.data));
    // The revision rises from holder to holder; above every journal's epoch too, should the bucket ever have begun anew.
    const epoch = Math.max(revision, ...heads.map((head) => head.epoch + 1));
    const preparations = new Preparations({ bus, log, on_ready: () => this.#wake(leadership) });
    const leadership: Leadership = newLeadership(epoch, this.#incarnation, world.monotonic_ms(), preparations);
    this.#leadership = leadership;
    log.info("this supervisor leads", { supervisor: id, epoch });
    observer?.role?.("leading", epoch);
    for (const head of heads) if (isAlive(head.state)) this.#cell(leadership, head.actor.id);
    const began = await this.#attempt("supervision's tables", async () => {
      for (const begin of [
        () => this.#workers.watch((change) => this.#onWorker(leadership, change)),
        () => this.#placement.watch((change) => this.#onPlacement(leadership, change)),
        () =>
          bus.consume(
            { stream: "COMMANDS", durable: "workers", filters: [WORKER_COMMAND_FILTER] },
            { on_delivery: (delivery) => this.#onCommand(leadership, delivery), on_reset: () => void leadership.commands.splice(0) },
          ),
        async () => bus.subscribe(RESUMED_SUBJECT, ({ data }) => this.#onResumed(leadership, data)),
      ]) {
        const subscription: Subscription = await begin();
        if (leadership.over) await subscription.stop();
        else leadership.subscriptions.push(subscription);
      }
      await Promise.race([Promise.all(leadership.loads.values()), leadership.ended]);
      return true;
    });
    if (leadership.over) return;
    if (began === undefined) {
      this.#endLeadership("the tables cannot be read");
      return;
    }
    // A leader that died in the middle left the dead with shards that have other owners by now: their journals are ended too.
    const mentioned = new Set([...leadership.table.values()].flatMap(({ entry }) => [entry.worker, entry.from]));
    for (const head of heads) if (head.state === "dead" && mentioned.has(head.actor.id)) this.#cell(leadership, head.actor.id);
    for (const worker of leadership.cells.keys())
      if (!leadership.present.has(worker)) leadership.missing.set(worker, { lease: undefined, heard_ms: world.monotonic_ms() });
    leadership.passing_since_ms = undefined;
    this.#begun.add(leadership);
    this.#wake(leadership);
  }

  /** Leaderships whose tables are known. */
  readonly #begun = new WeakSet<Leadership>();

  #endLeadership(why: string): void {
    const leadership = this.#leadership;
    if (leadership === undefined) return;
    this.#leadership = undefined;
    this.#options.log.warn("this supervisor leads no more", { supervisor: this.#options.id, epoch: leadership.epoch, why });
    leadership.end();
    for (const cell of leadership.cells.values()) cell.stop();
    for (const subscription of leadership.subscriptions)
      subscription.stop().catch((error: unknown) => this.#options.log.warn("a subscription did not stop", errorFields(error)));
    this.#options.observer?.role?.("standby", undefined);
    this.#options.observer?.workers?.(new Map());
  }

  #mayAct(leadership: Leadership): boolean {
    return !leadership.over && this.#lease.is_valid(); // D4
  }

  /** D3 */
  #outage(): void {
    this.#calm_since_ms = this.#options.world.monotonic_ms();
  }
  #mayJudge(): boolean {
    return this.#options.bus.state === "connected" && this.#options.world.monotonic_ms() - this.#calm_since_ms >= this.#ttl_ms;
  }

  /** By the leases' silence: only while they could have been renewed (D3). */
  #mayJudgeLeases(): boolean {
    const now_ms = this.#options.world.monotonic_ms();
    if (this.#probing_since_ms !== undefined && now_ms - this.#probing_since_ms >= LEASE_RENEW_MS) return false;
    return this.#mayJudge() && now_ms - this.#leases_calm_since_ms >= this.#ttl_ms;
  }

  /** Asks the workers' bucket for anything, once in the time of a renewal: what it answers late or not at all, it did not take either. */
  async #probe(now_ms: number): Promise<void> {
    if (this.#probing_since_ms !== undefined || now_ms - this.#probed_ms < LEASE_RENEW_MS) return;
    const { world, log } = this.#options;
    this.#probing_since_ms = this.#probed_ms = now_ms;
    try {
      await this.#workers.get(LEADER_KEY);
      if (world.monotonic_ms() - now_ms >= LEASE_RENEW_MS) this.#leases_calm_since_ms = world.monotonic_ms();
    } catch (error) {
      this.#leases_calm_since_ms = world.monotonic_ms();
      log.debug("the workers' leases cannot be read", errorFields(error));
    }
    this.#probing_since_ms = undefined;
  }

  /** Reads from the bus; undefined, and an outage noted, when it cannot answer. */
  async #attempt<T>(what: string, read: () => Promise<T>): Promise<T | undefined> {
    try {
      return await read();
    } catch (error) {
      this.#outage();
      this.#options.log.warn("the supervisor could not read", { what, ...errorFields(error) });
      return undefined;
    }
  }

  #pause(ms: number): Promise<void> {
    return new Promise((resolve) => void this.#options.world.after(ms, resolve));
  }

  // ── what is heard ────────────────────────────────────────────────────────────────────────────────────────────────

  #onWorker(leadership: Leadership, change: BucketChange): void {
    if (leadership.over) return;
    if (change.kind === "put") this.#heard(leadership, change.entry);
    else {
      const before = leadership.present.get(change.key);
      if (before === undefined || change.revision < before.revision) return;
      leadership.present.delete(change.key);
      leadership.missing.set(change.key, { lease: before.lease, heard_ms: before.heard_ms });
    }
    this.#wake(leadership);
  }

  #heard(leadership: Leadership, read: BucketEntry): void {
    const before = leadership.present.get(read.key);
    if (before !== undefined && read.revision <= before.revision) return;
    const lease = decodeWorkerLease(read.value);
    if (lease === undefined || lease.id !== read.key) {
      this.#options.log.error("a worker's lease cannot be read and is passed over", { key: read.key });
      return;
    }
    leadership.missing.delete(read.key);
    leadership.present.set(read.key, { lease, revision: read.revision, heard_ms: this.#options.world.monotonic_ms() });
  }

  #onConnection(event: ConnectionEvent): void {
    if (event.kind === "reset") this.#outage(); // D3
    this.#succession.hear(event, () => {
      this.#succeed().catch((error: unknown) => this.#options.log.error("a supervisor could not take the leader's place", errorFields(error)));
    });
    const worker = this.#connections.hear(event);
    if (worker === undefined) return;
    const wake = (): void => {
      const leadership = this.#leadership;
      if (leadership?.cells.has(worker) === true) this.#wake(leadership);
    };
    wake();
    if (event.kind === "connected") return;
    // What is a suspicion then, or a verdict, is seen then.
    for (const ms of [SETTLE_MS, GRACE_MS]) void this.#options.world.after(ms, wake);
  }

  #onPlacement(leadership: Leadership, change: BucketChange): void {
    if (leadership.over) return;
    if (change.kind === "put") this.#placed(leadership, change.entry);
    else {
      const shard = shardOfKey(change.key, this.#options.bus.shards);
      if (shard === undefined || change.revision < (leadership.table.get(shard)?.revision ?? 0)) return;
      leadership.table.delete(shard);
      leadership.moves.delete(shard);
    }
    this.#wake(leadership);
  }

  #placed(leadership: Leadership, read: BucketEntry): void {
    const shard = shardOfKey(read.key, this.#options.bus.shards);
    if (shard === undefined || read.revision <= (leadership.table.get(shard)?.revision ?? 0)) return;
    const entry = decodePlacementEntry(read.value);
    if (entry === undefined) {
      this.#options.log.error("a placement entry cannot be read; the shard counts as nobody's", { key: read.key });
      leadership.table.set(shard, {
        entry: { worker: "", incarnation: "", epoch: this.#highestEpoch(leadership, shard), since: this.#now() },
        revision: read.revision,
      });
      return;
    }
    leadership.table.set(shard, { entry, revision: read.revision });
    if (entry.moving_to === undefined) leadership.moves.delete(shard);
    else if (leadership.moves.get(shard)?.to !== entry.moving_to)
      leadership.moves.set(shard, { to: entry.moving_to, seen_ms: this.#options.world.monotonic_ms() });
  }

  #highestEpoch(leadership: Leadership, shard: number): number {
    const said = [...leadership.cells.values()].map((cell) => cell.record()?.epochs.get(shard) ?? 0);
    return Math.max(leadership.table.get(shard)?.entry.epoch ?? 0, ...said);
  }

  #now(): string {
    return timestamp(this.#options.world.now_ms());
  }

  // ── cells ────────────────────────────────────────────────────────────────────────────────────────────────────────

  #cell(leadership: Leadership, worker: string): WorkerCell {
    const open = leadership.cells.get(worker);
    if (open !== undefined) return open;
    assert(leadership.cells.size < CELLS_MAX, "a cell of the runtime has fewer than ten thousand workers");
    const cell = this.#options.open_cell(worker, {
      epoch: leadership.epoch,
      may_act: () => this.#mayAct(leadership),
      conflict: () => this.#conflict(leadership),
    });
    leadership.cells.set(worker, cell);
    leadership.loads.set(worker, cell.load());
    return cell;
  }

  /** Another's append stands in a worker's journal: do we still lead? */
  async #conflict(leadership: Leadership): Promise<"mine" | "lost"> {
    for (;;) {
      if (!this.#mayAct(leadership)) return "lost";
      const read = await this.#attempt("the leader's lease", async () => ({ entry: await this.#leaders.get(LEADER_KEY) }));
      if (read !== undefined) {
        const standing = read.entry === undefined ? undefined : decodeLeaderLease(read.entry.value);
        if (standing?.incarnation === leadership.incarnation) return "mine";
        this.#endLeadership("another supervisor leads");
        return "lost";
      }
      await this.#pause(RETRY_MS);
    }
  }

  /** D1. Answers undefined when the leadership ended before it was decided. */
  async #say(leadership: Leadership, worker: string, type: string, body: JsonObject, origin?: CommandOrigin): Promise<Outcome | undefined> {
    if (!this.#mayAct(leadership)) return undefined;
    const outcome = await Promise.race([this.#cell(leadership, worker).say(type, body, origin), leadership.ended]);
    if (outcome === "ended" || leadership.over) return undefined;
    if (!outcome.ok && origin === undefined)
      this.#options.log.error("a worker's machine refused the leader", { worker, type, code: outcome.error.code, message: outcome.error.message });
    return outcome;
  }

  // ── passes ───────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Makes a pass soon; while one runs, another follows it. */
  #wake(leadership: Leadership): void {
    leadership.dirty = true;
    if (leadership.passing_since_ms !== undefined || leadership.over || !this.#begun.has(leadership)) return;
    void this.#passes(leadership);
  }

  async #passes(leadership: Leadership): Promise<void> {
    while (leadership.dirty && this.#mayAct(leadership)) {
      leadership.dirty = false;
      leadership.passing_since_ms = this.#options.world.monotonic_ms();
      try {
        await this.#pass(leadership);
      } catch (error) {
        // The next beat makes the next pass.
        this.#options.log.error("a pass of the supervisor broke", errorFields(error));
        break;
      }
    }
    leadership.passing_since_ms = undefined;
    if (!leadership.over) this.#options.observer?.workers?.(countByState(leadership));
  }

  async #pass(leadership: Leadership): Promise<void> {
    await Promise.all([...leadership.present.keys()].map((worker) => this.#greet(leadership, worker)));
    await Promise.all([...leadership.cells.keys()].filter((worker) => !leadership.present.has(worker)).map((worker) => this.#miss(leadership, worker)));
    if (!this.#mayAct(leadership)) return;
    await this.#readDoubtful(leadership);
    await this.#followTable(leadership);
    if (!this.#mayAct(leadership)) return;
    const now_ms = this.#options.world.monotonic_ms();
    const { decisions, unplaced } = planPlacement(
      {
        shards: this.#options.bus.shards,
        workers: this.#placementWorkers(leadership),
        table: new Map([...leadership.table].map(([shard, { entry }]) => [shard, entry])),
        epochs: this.#saidEpochs(leadership),
        required_versions: this.#options.required_versions?.() ?? [],
      },
      this.#options.strategy ?? leastLoaded,
    );
    for (const decision of decisions)
      if (decision.kind === "assign" && !leadership.unowned_since_ms.has(decision.shard)) leadership.unowned_since_ms.set(decision.shard, now_ms);
    for (const shard of unplaced) if (!leadership.unowned_since_ms.has(shard)) leadership.unowned_since_ms.set(shard, now_ms);
    const decided = new Set(decisions.map((decision) => decision.shard));
    leadership.preparations.keep(new Set(decisions.flatMap((decision) => (decision.kind === "move" ? [decision.shard] : []))));
    const known = [...decisions, ...this.#overdue(leadership, decided)].filter(({ shard }) => !leadership.doubtful.has(shard));
    await Promise.all(known.map((decision) => this.#carryOut(leadership, decision)));
  }

  async #readDoubtful(leadership: Leadership): Promise<void> {
    await Promise.all(
      [...leadership.doubtful].map(async (shard) => {
        const read = await this.#attempt("the placement of a shard", async () => ({ entry: await this.#placement.get(placementKey(shard)) }));
        if (read === undefined) return;
        if (read.entry !== undefined) this.#placed(leadership, read.entry);
        leadership.doubtful.delete(shard);
      }),
    );
  }

  /** A worker with a lease: known, of this incarnation, ready or draining. */
  async #greet(leadership: Leadership, worker: string): Promise<void> {
    const { world } = this.#options;
    const cell = this.#cell(leadership, worker);
    await Promise.race([leadership.loads.get(worker), leadership.ended]);
    const present = leadership.present.get(worker);
    if (present === undefined || !this.#mayAct(leadership)) return;
    const { lease } = present;
    let record = cell.record();
    if (record !== undefined && isAlive(record.state) && record.incarnation !== lease.incarnation) {
      // D1: what the earlier incarnation had is nobody's; the table follows in this very pass.
      await this.#declareDead(leadership, worker, { kind: "new_incarnation", incarnation: record.incarnation, by: lease.incarnation }, world.monotonic_ms());
      record = cell.record();
    }
    if (record !== undefined && !isAlive(record.state) && record.incarnation === lease.incarnation) {
      // Over, and its lease still stands, or again: without it a process that lives after all starts over, as another incarnation.
      const deleted = await this.#workers.delete(worker, present.revision);
      if (deleted.kind === "unavailable") this.#outage();
      return;
    }
    if (record === undefined || !isAlive(record.state)) {
      const joined = await this.#say(leadership, worker, "worker.join", { incarnation: lease.incarnation, versions: versionsByKind(lease.versions) });
      if (joined?.ok !== true) return;
      record = cell.record();
    }
    if (record !== undefined && (await this.#judgeByConnections(leadership, worker, record, present))) return;
    const silent_ms = world.monotonic_ms() - present.heard_ms;
    const { kind: presence } = this.#connections.of(worker);
    if (record?.state === "joining") {
      await this.#say(leadership, worker, "worker.ready", {});
      record = cell.record();
    }
    if (record?.state === "suspected" && silent_ms < LEASE_RENEW_MS * 2 && presence === "standing") {
      await this.#say(leadership, worker, "worker.clear", {});
      record = cell.record();
    }
    if (record?.state === "ready" && lease.draining) await this.#say(leadership, worker, "worker.drain", { reason: "the worker is leaving" });
    else if (record?.state === "ready" && silent_ms >= this.#ttl_ms * SUSPECT_AFTER && this.#mayJudgeLeases())
      await this.#say(leadership, worker, "worker.suspect", { evidence: { kind: "silent", silent_ms: Math.round(silent_ms), incarnation: lease.incarnation } });
  }

  /** What its connections say. Answers true when that is all there is to say of it. */
  async #judgeByConnections(leadership: Leadership, worker: string, record: WorkerRecord, { lease }: Present): Promise<boolean> {
    const presence = this.#connections.of(worker);
    if (presence.kind === "standing" || !this.#mayJudge()) return false;
    if (presence.kind === "suspect") {
      if (record.state !== "ready") return false;
      const { which, closed } = presence;
      await this.#say(leadership, worker, "worker.suspect", { evidence: { kind: "connection_closed", which, ...closed, incarnation: lease.incarnation } });
      return true;
    }
    // Who has nothing left and says so is leaving in good order, and its lease goes next.
    if (lease.draining && this.#ownedBy(leadership, worker).length === 0) return false;
    const answer = await askHost(this.#options.bus, worker, "health", {}, { patience_ms: HEALTH_PATIENCE_MS });
    if (answer.ok || !this.#mayJudge() || !this.#mayAct(leadership) || this.#connections.of(worker).kind !== "gone") return false;
    await this.#declareDead(leadership, worker, { ...connectionsClosed(presence), incarnation: lease.incarnation }, presence.since_ms);
    return true;
  }

  /** A worker without a lease: left in good order, dead, or not to be judged yet (D3). */
  async #miss(leadership: Leadership, worker: string): Promise<void> {
    const cell = this.#cell(leadership, worker);
    await Promise.race([leadership.loads.get(worker), leadership.ended]);
    const record = cell.record();
    if (record === undefined || !isAlive(record.state)) {
      // The dead are remembered until their shards have other owners.
      if (!leadership.present.has(worker) && (record?.shards.size ?? 0) === 0 && this.#mayAct(leadership)) this.#forget(leadership, worker);
      return;
    }
    if (!this.#mayAct(leadership) || leadership.present.has(worker)) return;
    const missing = leadership.missing.get(worker);
    const left = (record.state === "draining" || missing?.lease?.draining === true) && this.#ownedBy(leadership, worker).length === 0;
    if (!left && !this.#mayJudgeLeases()) return;
    const read = await this.#attempt("a worker's lease", async () => ({ entry: await this.#workers.get(worker) }));
    if (read === undefined || !this.#mayAct(leadership)) return;
    if (read.entry !== undefined) {
      this.#heard(leadership, read.entry);
      leadership.dirty = true;
      return;
    }
    if (!left && !this.#mayJudgeLeases()) return;
    if (left) await this.#say(leadership, worker, "worker.leave", {});
    else await this.#declareDead(leadership, worker, { kind: "lease_expired", incarnation: record.incarnation }, missing?.heard_ms);
  }

  async #declareDead(
    leadership: Leadership,
    worker: string,
    found: JsonObject & { readonly kind: string; readonly incarnation: string },
    heard_ms: number | undefined,
  ): Promise<void> {
    const { world, log, observer } = this.#options;
    const now_ms = world.monotonic_ms();
    const silent_ms = Math.round(now_ms - (heard_ms ?? now_ms));
    const outcome = await this.#say(leadership, worker, "worker.declare_dead", { evidence: { ...found, silent_ms } });
    if (outcome?.ok !== true) return;
    log.warn("a worker is dead", { worker, ...found, silent_ms });
    observer?.died?.(worker, silent_ms);
    leadership.detected_ms.set(worker, silent_ms);
    const deaths = (this.#deaths.get(worker) ?? []).filter((at_ms) => now_ms - at_ms < DEATHS_WINDOW_MS);
    this.#deaths.set(worker, [...deaths, now_ms].slice(-DEATHS_MAX - 1));
  }

  /** A dead worker's cell leaves memory; its journal stays. */
  #forget(leadership: Leadership, worker: string): void {
    leadership.cells.get(worker)?.stop();
    leadership.cells.delete(worker);
    leadership.loads.delete(worker);
    leadership.missing.delete(worker);
    const last = this.#deaths.get(worker)?.at(-1);
    if (last !== undefined && this.#options.world.monotonic_ms() - last >= DEATHS_WINDOW_MS) this.#deaths.delete(worker);
  }

  #ownedBy(leadership: Leadership, worker: string): number[] {
    return [...leadership.table].flatMap(([shard, { entry }]) => (entry.worker === worker ? [shard] : []));
  }

  /** Owners write the table themselves when they hand over; their journals tell it too. */
  async #followTable(leadership: Leadership): Promise<void> {
    await Promise.all(
      [...leadership.cells].map(async ([worker, cell]) => {
        const record = cell.record();
        if (record === undefined) return;
        const dead = !isAlive(record.state);
        for (const [shard, epoch] of record.shards) {
          if (leadership.doubtful.has(shard)) continue;
          const entry = leadership.table.get(shard)?.entry;
          if (entry !== undefined && entry.worker === worker && entry.incarnation === record.incarnation && entry.epoch >= epoch) continue;
          // A dead worker's shard is released when it has another owner, so that its journal says to whom it went.
          if (dead && entry !== undefined && entry.worker === worker) continue;
          await this.#say(leadership, worker, "shard.release", {
            shard,
            epoch,
            to: entry === undefined || entry.worker === "" ? null : entry.worker,
            reason: dead ? "owner_gone" : (entry?.reason ?? "not_placed"),
          });
        }
        if (record.state !== "ready") return;
        for (const shard of this.#ownedBy(leadership, worker)) {
          if (leadership.doubtful.has(shard)) continue;
          const entry = leadership.table.get(shard)?.entry;
          if (entry === undefined || entry.worker !== worker || entry.incarnation !== record.incarnation || (record.shards.get(shard) ?? -1) >= entry.epoch)
            continue;
          await this.#say(leadership, worker, "shard.assign", { shard, epoch: entry.epoch, from: entry.from ?? null, reason: entry.reason ?? "moved" });
        }
      }),
    );
  }

  #saidEpochs(leadership: Leadership): Map<number, number> {
    const epochs = new Map<number, number>();
    for (const cell of leadership.cells.values())
      for (const [shard, epoch] of cell.record()?.epochs ?? []) epochs.set(shard, Math.max(epoch, epochs.get(shard) ?? 0));
    return epochs;
  }

  /** Who counts as living (D3: also who is missing and not judged), and who may be given more. */
  #placementWorkers(leadership: Leadership): PlacementWorker[] {
    const workers: PlacementWorker[] = [];
    for (const [id, cell] of leadership.cells) {
      const record = cell.record();
      if (record === undefined || !isAlive(record.state)) continue;
      const lease = leadership.present.get(id)?.lease;
      if (lease !== undefined && lease.incarnation !== record.incarnation) continue;
      const leaving = record.state === "draining" || lease?.draining === true;
      const condition = lease === undefined ? "suspected" : leaving ? "leaving" : record.state === "ready" ? "ready" : "suspected";
      workers.push({ id, incarnation: record.incarnation, condition, versions: lease?.versions ?? [] });
    }
    const steady = workers.filter((worker) => worker.condition === "ready" && !this.#onProbation(worker.id));
    if (steady.length === 0) return workers;
    return workers.map((worker) => (worker.condition === "ready" && this.#onProbation(worker.id) ? { ...worker, condition: "suspected" as const } : worker));
  }

  #onProbation(worker: string): boolean {
    const now_ms = this.#options.world.monotonic_ms();
    return (this.#deaths.get(worker) ?? []).filter((at_ms) => now_ms - at_ms < DEATHS_WINDOW_MS).length >= DEATHS_MAX;
  }

  /** Planned moves that their owner did not end in time: the leader ends them. */
  #overdue(leadership: Leadership, decided: ReadonlySet<number>): PlacementDecision[] {
    const now_ms = this.#options.world.monotonic_ms();
    const patience_ms = (this.#options.handover_deadline_ms ?? HANDOVER_DEADLINE_MS) + MOVE_GRACE_MS;
    return [...leadership.moves].flatMap(([shard, { to, seen_ms }]): PlacementDecision[] => {
      const entry = leadership.table.get(shard)?.entry;
      const target = leadership.present.get(to)?.lease;
      if (decided.has(shard) || entry === undefined || target === undefined || now_ms - seen_ms < patience_ms) return [];
      return [
        {
          kind: "assign",
          shard,
          worker: to,
          incarnation: target.incarnation,
          epoch: this.#highestEpoch(leadership, shard) + 1,
          from: entry.worker,
          reason: "owner_gone",
        },
      ];
    });
  }

  async #carryOut(leadership: Leadership, decision: PlacementDecision): Promise<void> {
    const { log, observer, world } = this.#options;
    const { shard } = decision;
    const placed = leadership.table.get(shard);
    if (decision.kind === "assign") {
      const { worker, incarnation, epoch, from, reason } = decision;
      assert(epoch > (placed?.entry.epoch ?? 0), "D2: the epoch of a shard only rises");
      const outcome = await this.#say(leadership, worker, "shard.assign", { shard, epoch, from, reason });
      if (outcome?.ok !== true) return;
      const written = await this.#write(leadership, shard, { worker, incarnation, epoch, from, reason, since: this.#now() }, placed);
      if (!written) return;
      const since_ms = leadership.unowned_since_ms.get(shard);
      leadership.unowned_since_ms.delete(shard);
      log.info("a shard was given", { shard, worker, epoch, from, reason });
      const assign_ms = world.monotonic_ms() - (since_ms ?? world.monotonic_ms());
      observer?.assigned?.({ shard, worker, epoch, reason, assign_ms });
      const detect_ms = reason === "owner_gone" && from !== null ? leadership.detected_ms.get(from) : undefined;
      leadership.recoveries.set(shard, { epoch, detect_ms: detect_ms ?? 0, assign_ms: Math.round(assign_ms) });
      return;
    }
    if (placed === undefined) return;
    if (decision.kind === "stay") {
      const { moving_to: _, ...entry } = placed.entry;
      await this.#write(leadership, shard, entry, placed);
      return;
    }
    const target = leadership.present.get(decision.to)?.lease;
    if (target === undefined || !leadership.preparations.ready(shard, decision.to, target.incarnation)) return;
    const written = await this.#write(leadership, shard, { ...placed.entry, moving_to: decision.to }, placed);
    if (!written) return;
    log.info("a shard is to move", { shard, from: decision.from, to: decision.to, reason: decision.reason });
    observer?.moved?.({ shard, from: decision.from, to: decision.to, reason: decision.reason });
  }

  /** D2. A refused write means that the owner or another leader wrote; the next pass decides on what stands now. */
  async #write(leadership: Leadership, shard: number, entry: PlacementEntry, placed: Placed | undefined): Promise<boolean> {
    if (!this.#mayAct(leadership)) return false;
    const key = placementKey(shard);
    const value = encodeRecord(entry);
    const outcome = placed === undefined ? await this.#placement.create(key, value) : await this.#placement.update(key, value, placed.revision);
    if (outcome.kind === "ok") {
      this.#placed(leadership, { key, value, revision: outcome.revision });
      leadership.dirty = true;
      return true;
    }
    if (outcome.kind === "unavailable") {
      leadership.doubtful.add(shard);
      this.#outage();
      return false;
    }
    const read = await this.#attempt("the placement of a shard", async () => ({ entry: await this.#placement.get(key) }));
    if (read?.entry !== undefined) this.#placed(leadership, read.entry);
    leadership.dirty = true;
    return false;
  }

  // ── what resumed ─────────────────────────────────────────────────────────────────────────────────────────────────

  #onResumed(leadership: Leadership, data: Uint8Array): void {
    const news = decodeResumed(data);
    if (news === undefined || leadership.over || leadership.cells.get(news.worker)?.record() === undefined) {
      this.#options.log.debug("news of a resumed actor is set aside", { worker: news?.worker });
      return;
    }
    if (leadership.resuming >= RESUMING_MAX) {
      this.#options.log.warn("too many actors resume at once for all to be told", { worker: news.worker, actor: news.actor });
      return;
    }
    const recovery = leadership.recoveries.get(news.shard);
    const { detect_ms, assign_ms } = recovery?.epoch === news.epoch ? recovery : { detect_ms: 0, assign_ms: 0 };
    const { actor, entries, replay_ms, first_token_ms } = news;
    leadership.resuming += 1;
    if (recovery?.epoch === news.epoch)
      this.#options.observer?.resumed?.({ detect_ms, assign_ms, replay_ms, ...(first_token_ms === undefined ? {} : { first_token_ms }) });
    this.#say(leadership, news.worker, "actor.resumed", {
      actor,
      entries,
      detect_ms,
      assign_ms,
      replay_ms: Math.round(replay_ms),
      ...(first_token_ms === undefined ? {} : { first_token_ms: Math.round(first_token_ms) }),
    })
      .catch((error: unknown) => this.#options.log.warn("a resumed actor could not be told", { actor, ...errorFields(error) }))
      .finally(() => {
        leadership.resuming -= 1;
      });
  }

  // ── operators' commands ──────────────────────────────────────────────────────────────────────────────────────────

  #onCommand(leadership: Leadership, delivery: Delivery): void {
    if (leadership.over) return;
    leadership.commands.push(delivery); // bounded by what the consumer leaves unacknowledged
    if (!leadership.commanding) void this.#commandsOf(leadership);
  }

  async #commandsOf(leadership: Leadership): Promise<void> {
    leadership.commanding = true;
    for (let delivery = leadership.commands.shift(); delivery !== undefined && !leadership.over; delivery = leadership.commands.shift()) {
      try {
        await this.#decide(leadership, delivery);
      } catch (error) {
        // Unacknowledged: it comes again with the next reset, or to the next leader.
        this.#options.log.error("a worker's command could not be decided", { subject: delivery.message.subject, ...errorFields(error) });
      }
    }
    leadership.commanding = false;
  }

  async #decide(leadership: Leadership, delivery: Delivery): Promise<void> {
    const { message, source } = delivery;
    const parsed = parseActorSubject(message.subject);
    if (parsed.kind === "malformed" || (parsed.channel !== "command" && parsed.channel !== "control")) {
      delivery.ack();
      return;
    }
    const { actor, channel } = parsed;
    const refuse = (error: ErrorBody): Promise<void> => this.#refuse(leadership, actor, delivery, error);
    // A tenant's subject names no worker of ours: it is answered as if there were none.
    if (actor.tenant !== SYSTEM_TENANT) return refuse(errorBody("not_found", `there is no worker '${actor.id}'`));
    const decoding = decodeCommand("worker", channel, message.data, (name) => headerOf(message.headers, name));
    if (decoding.kind === "refused") return refuse(decoding.error);
    const { type, body, key, trace, principal } = decoding.command;
    const cell = this.#cell(leadership, actor.id);
    await Promise.race([leadership.loads.get(actor.id), leadership.ended]);
    if (leadership.over) return;
    if (cell.record() === undefined) {
      if (!leadership.present.has(actor.id)) this.#forget(leadership, actor.id);
      return refuse(errorBody("not_found", `there is no worker '${actor.id}'`));
    }
    const outcome = await this.#say(leadership, actor.id, type, body, {
      source,
      ...(key === undefined ? {} : { key }),
      ...(principal === undefined ? {} : { principal }),
      ...(trace === undefined ? {} : { trace }),
    });
    if (outcome === undefined) return; // unacknowledged: the next leader decides it, and recognises it if it was decided
    if (!outcome.ok) return refuse(outcome.error);
    this.#answer(actor, delivery, outcome);
    delivery.ack();
    this.#wake(leadership);
  }

  /** A refusal may stand in no journal: it is told once the command is gone for sure, for it may be taken if it comes again (C8 of actors/cell.ts). */
  async #refuse(leadership: Leadership, actor: ActorAddress, delivery: Delivery, error: ErrorBody): Promise<void> {
    if (!(await delivery.settle())) leadership.commands.splice(0);
    else if ((await this.#conflict(leadership)) === "mine") this.#answer(actor, delivery, { ok: false, error });
  }

  #answer(actor: ActorAddress, delivery: Delivery, outcome: Outcome): void {
    const reply_to = headerOf(delivery.message.headers, HEADER_REPLY_TO);
    if (reply_to === undefined || !isReplyAllowed(actor.tenant, reply_to, "runtime")) return;
    const path = actorPath(actor.tenant === SYSTEM_TENANT ? workerActor(actor.id) : actor);
    const data = outcome.ok
      ? encodeReply({ ok: true, actor: path, seq: outcome.seq, state: outcome.state, result: outcome.result })
      : encodeReply({ ok: false, actor: path, error: outcome.error });
    this.#options.bus.send(reply_to, data);
  }
}

/** `session@1` → {session: "1"}; a process that knows several versions of a machine names them all. */
function versionsByKind(versions: readonly string[]): JsonObject {
  const byKind: Record<string, string> = {};
  for (const name of versions) {
    const at = name.lastIndexOf("@");
    const [kind, version] = at < 0 ? [name, "0"] : [name.slice(0, at), name.slice(at + 1)];
    byKind[kind] = byKind[kind] === undefined ? version : `${byKind[kind]},${version}`;
  }
  return byKind;
}

function connectionsClosed({ main, life }: Extract<Presence, { kind: "gone" }>): { kind: string } & JsonObject {
  return life === null ? { kind: "connection_not_back", main: { ...main } } : { kind: "connections_closed", main: { ...main }, life: { ...life } };
}

function countByState({ cells }: Leadership): Map<string, number> {
  const counts = new Map<string, number>();
  for (const cell of cells.values()) {
    const state = cell.record()?.state;
    if (state !== undefined) counts.set(state, (counts.get(state) ?? 0) + 1);
  }
  return counts;
}

/** Counts as being there: not dead and not left. */
function isAlive(state: string): boolean {
  return state !== "dead" && state !== "left";
}

function newLeadership(epoch: number, incarnation: string, began_ms: number, preparations: Preparations): Leadership {
  let resolveEnded: (value: "ended") => void = () => {};
  const ended = new Promise<"ended">((resolve) => {
    resolveEnded = resolve;
  });
  return {
    epoch,
    incarnation,
    cells: new Map(),
    loads: new Map(),
    present: new Map(),
    missing: new Map(),
    table: new Map(),
    doubtful: new Set(),
    moves: new Map(),
    preparations,
    unowned_since_ms: new Map(),
    detected_ms: new Map(),
    recoveries: new Map(),
    resuming: 0,
    subscriptions: [],
    commands: [],
    commanding: false,
    dirty: true,
    passing_since_ms: began_ms, // reading everything is the first of its passes
    over: false,
    ended,
    end() {
      this.over = true;
      resolveEnded("ended");
    },
  };
}
