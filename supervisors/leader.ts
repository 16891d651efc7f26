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
// It is level-triggered: every change makes one pass over all that is known (leadership.ts), and a pass on what is as it should be does
// nothing. So a new leader needs no hand-over: it reads the journals, the leases and the table, and makes its first pass.
//
// Owns: the LEADER lease, and when a leadership begins and ends. Leaves to its parts what is decided in one:
//   leadership.ts       what is known in one leadership, and its passes        term.ts             the right to decide in it
//   verdicts.ts         which worker is there, suspected, dead, left           worker-journals.ts  saying so, before anything follows
//   assignments.ts      who owns what, and what moves                          placement-table.ts  the table that says so
//   worker-commands.ts  what operators say                                     recoveries.ts       how long a recovery took
// and to members: leaving a shard and writing the next entry of a planned move.
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
import type { Bucket, BucketEntry, Bus, Subscription } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { SYSTEM_TENANT } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { LEASE_RENEW_MS, LEASE_TTL_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { pause, timestamp, type World } from "../protocol/world.ts";
import { Calm } from "./calm.ts";
import { Connections, GRACE_MS, SETTLE_MS } from "./connections.ts";
import { Leadership, type LeadershipObserver } from "./leadership.ts";
import { Lease } from "./lease.ts";
import type { PlacementStrategy } from "./placement.ts";
import { Probation } from "./probation.ts";
import { Succession } from "./succession.ts";
import { decodeLeaderLease, encodeRecord, LEADER_KEY } from "./tables.ts";
import { Term } from "./term.ts";
import type { OpenWorkerCell } from "./worker-cell.ts";

/** The supervisor's own loop. Four beats to a renewal: a late beat costs no renewal. */
const BEAT_MS = LEASE_RENEW_MS / 4;
/** Between looks at whether a call of the lease has ended, as it stops. */
const RETRY_MS = 250;
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
  readonly observer?: LeaderObserver;
}

export interface LeaderObserver extends LeadershipObserver {
  role?(role: "standby" | "leading", epoch: number | undefined): void;
}

export class Leader {
  readonly #options: LeaderOptions;
  readonly #ttl_ms: number;
  readonly #leaders: Bucket;
  readonly #incarnation: string;
  readonly #started_at: string;
  readonly #lease: Lease;
  readonly #calm: Calm;
  readonly #probation: Probation;
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

  constructor(options: LeaderOptions) {
    const { bus, world, log } = options;
    this.#options = options;
    this.#ttl_ms = options.ttl_ms ?? LEASE_TTL_MS;
    this.#leaders = bus.bucket("LEADER");
    this.#incarnation = world.id();
    this.#started_at = timestamp(world.now_ms());
    this.#calm = new Calm({ bus, world, log, ttl_ms: this.#ttl_ms });
    this.#probation = new Probation(world);
    this.#connections = new Connections(world, "worker");
    this.#succession = new Succession({ bus, world, id: options.id, incarnation: this.#incarnation, may_judge: () => this.#calm.may_judge() });
    this.#lease = new Lease({
      bucket: this.#leaders,
      key: LEADER_KEY,
      world,
      log,
      ttl_ms: this.#ttl_ms,
      is_mine: (value) => decodeLeaderLease(value)?.incarnation === this.#incarnation,
    });
  }

  get role(): "standby" | "leading" {
    return this.#leadership === undefined ? "standby" : "leading";
  }
  /** Of the present leadership. */
  get epoch(): number | undefined {
    return this.#leadership?.term.epoch;
  }

  /** D4. By our own clock, now: may this supervisor decide anything? */
  may_decide(): boolean {
    return this.#leadership !== undefined && this.#leadership.term.may_act();
  }

  /** Stands by from now on. Its loop is its own: it beats until stop. */
  start(): void {
    assert(this.#cancelBeat === undefined && !this.#stopped, "a supervisor starts once");
    this.#subscriptions.push(
      this.#options.bus.on_state((state) => {
        this.#options.log.info("the supervisor's connection changed", { state });
        this.#calm.outage();
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
    for (let waits = 0; this.#lease.busy && waits < 20; waits++) await pause(this.#options.world, RETRY_MS);
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
    if (bus.state === "disconnected") this.#calm.outage();
    const leadership = this.#leadership;
    if (leadership !== undefined && !this.#lease.is_valid()) this.#endLeadership("its lease ended");
    if (this.#lease.busy) return;
    if (this.#leadership?.is_stuck(now_ms) === true) {
      this.#endLeadership("a pass makes no progress"); // D5: let another one try, and not this one at once
      this.#tried_ms = now_ms + this.#ttl_ms;
      await this.#lease.release();
      return;
    }
    if (this.#lease.is_valid()) {
      if (now_ms - this.#renewed_ms >= LEASE_RENEW_MS) await this.#renew(now_ms);
      if (!this.#lease.is_valid() || this.#stopped) return;
      void this.#calm.probe_leases(now_ms);
      if (this.#leadership === undefined) this.#beginToLead();
      else this.#leadership.wake();
      return;
    }
    if (now_ms - this.#tried_ms < LEASE_RENEW_MS) return;
    this.#tried_ms = now_ms;
    const outcome = await this.#lease.acquire(this.#value());
    if (outcome.kind === "unavailable") this.#calm.outage();
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
      const standing = seen ?? (await this.#calm.attempt("the leader's lease", async () => ({ entry: await this.#leaders.get(LEADER_KEY) })))?.entry;
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
    else if (outcome.kind === "unavailable") this.#calm.outage();
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
    const { bus, world, log, id, open_cell, strategy, handover_deadline_ms, observer } = this.#options;
    const revision = this.#lease.revision;
    assert(revision !== undefined, "who leads holds the lease");
    const known = await this.#calm.attempt("the workers' journals", () => bus.last_of_each("EVENTS", WORKER_JOURNALS));
    if (known === undefined || !this.#lease.is_valid() || this.#stopped) return;
    const heads = known.map((message) => decodeJournal(message.data));
    // The revision rises from holder to holder; above every journal's epoch too, should the bucket ever have begun anew.
    const epoch = Math.max(revision, ...heads.map((head) => head.epoch + 1));
    const leadership = new Leadership({
      bus,
      world,
      log,
      term: new Term({
        epoch,
        incarnation: this.#incarnation,
        lease: this.#lease,
        bus,
        world,
        calm: this.#calm,
        on_taken: () => this.#endLeadership("another supervisor leads"),
      }),
      calm: this.#calm,
      connections: this.#connections,
      probation: this.#probation,
      open_cell,
      strategy,
      required_versions: () => this.#options.required_versions?.() ?? [],
      ttl_ms: this.#ttl_ms,
      handover_deadline_ms,
      observer: observer ?? {},
    });
    this.#leadership = leadership;
    log.info("this supervisor leads", { supervisor: id, epoch });
    observer?.role?.("leading", epoch);
    if (!(await leadership.begin(heads))) this.#endLeadership("the tables cannot be read");
  }

  #endLeadership(why: string): void {
    const leadership = this.#leadership;
    if (leadership === undefined) return;
    this.#leadership = undefined;
    this.#options.log.warn("this supervisor leads no more", { supervisor: this.#options.id, epoch: leadership.term.epoch, why });
    leadership.end();
    this.#options.observer?.role?.("standby", undefined);
    this.#options.observer?.workers?.(new Map());
  }

  #onConnection(event: ConnectionEvent): void {
    if (event.kind === "reset") this.#calm.outage(); // D3
    this.#succession.hear(event, () => {
      this.#succeed().catch((error: unknown) => this.#options.log.error("a supervisor could not take the leader's place", errorFields(error)));
    });
    const worker = this.#connections.hear(event);
    if (worker === undefined) return;
    const wake = (): void => {
      const leadership = this.#leadership;
      if (leadership?.knows(worker) === true) leadership.wake();
    };
    wake();
    if (event.kind === "connected") return;
    // What is a suspicion then, or a verdict, is seen then.
    for (const ms of [SETTLE_MS, GRACE_MS]) void this.#options.world.after(ms, wake);
  }
}
