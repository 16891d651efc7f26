// Member: a worker's side of supervision. It keeps the worker's lease, and makes what the worker owns equal to what the
// placement table says it owns.
//
//   joining ──lease──▶ present ──renewals unanswered until the lease ends──▶ cut_off ──lease again, table read──▶ present
//      ▲                  │                                                     │
//      └── stalled, or the lease was taken: everything dropped, a new incarnation ──┘ (also after OUTAGE_HOLD_MS)
//
// One shard, at this worker:
//   wanted ──take──▶ owning ──moving_to──▶ leaving ──gap or deadline──▶ the next entry is written by us, ours no more
//                      └──the table names another owner or epoch──▶ dropped
//
// Owns: the lease, the incarnation, the handing over. Leaves to the host: what owning a shard means. The journal is the
// fence; everything here only decides who should try.
//
// Invariants:
//   M1. Nothing may act (append, start an effect, publish) unless the lease is valid by our own clock.
//   M2. The lease is renewed in tick() alone, and tick() is called by the worker's own loop.
//   M3. A shard is taken only with a valid lease, under an entry that names this worker, this incarnation and that epoch; an
//       epoch that was left is never taken again.
//   M4. After an outage nothing acts before the placement was read from the leader.
//   M5. One thing at a time happens to one shard; a lost ownership interrupts it.
import type { Bucket, BucketChange, BucketEntry, Bus, Subscription } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { HANDOVER_DEADLINE_MS, LEASE_RENEW_MS, LEASE_TTL_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { pause, timestamp, type World } from "../protocol/world.ts";
import type { ShardHost } from "../actors/shard-host.ts";
import { Lease } from "./lease.ts";
import { decodePlacementEntry, decodeWorkerLease, encodeRecord, type PlacementEntry, placementKey, shardOfKey, type WorkerLease } from "./tables.ts";

/** Between repeats of what the bus could not take: often enough to be back within a blink, seldom enough for a broker that starts. */
const RETRY_MS = 250;
/** How long work is held through an outage of the bus. A lost broker is replaced in 4 to 8 s; beyond this the work is somebody else's. */
const OUTAGE_HOLD_MS = 30_000;
assert(OUTAGE_HOLD_MS > 2 * LEASE_TTL_MS, "an outage that a broker heals by itself costs no work");
/** How long a draining worker waits for a leader to say where its shards go, before it releases them to nobody. */
const LEADER_PATIENCE_MS = 2 * LEASE_TTL_MS + LEASE_RENEW_MS;
/** A tick never takes longer: what the bus has not answered by then goes on beside the worker's loop, which must not look stuck. */
const TICK_MS_MAX = 200;
/** How often a draining worker looks whether it still owns something. */
const DRAIN_POLL_MS = 50;
/** How long past its deadline a drain waits for the last table writes. */
const DRAIN_GRACE_MS = 2_000;

export interface MemberOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly id: string;
  /** `{machine}@{version}` of all that this process can run. */
  readonly versions: readonly string[];
  readonly host: Pick<ShardHost, "take" | "leave" | "drop" | "owned">;
  /** Must be the time to live of the bucket's keys. */
  readonly ttl_ms?: number;
  /** How long a planned move waits for running effects. */
  readonly handover_deadline_ms?: number;
  /** Told when the process should know: it joined, lost everything, or is held by an outage. */
  on_phase?(phase: MemberPhase, incarnation: string): void;
}

export type MemberPhase = "joining" | "present" | "cut_off" | "stopped";

type Phase =
  | { readonly kind: "joining" }
  | { readonly kind: "present" }
  | { readonly kind: "cut_off"; readonly since_ms: number }
  | { readonly kind: "stopped" };

interface Placed {
  readonly entry: PlacementEntry;
  readonly revision: number;
}

interface Held {
  readonly epoch: number;
  readonly phase: "taking" | "owning" | "leaving";
}

type Errand =
  | { readonly kind: "rest" }
  | { readonly kind: "drop" }
  | { readonly kind: "take"; readonly entry: PlacementEntry }
  | { readonly kind: "leave"; readonly epoch: number }
  | { readonly kind: "hand_over"; readonly placed: Placed };

export class Member {
  readonly #options: MemberOptions;
  readonly #ttl_ms: number;
  readonly #workers: Bucket;
  readonly #placement: Bucket;
  readonly #started_at: string;
  #lease: Lease;
  #incarnation: string;
  #phase: Phase = { kind: "joining" };
  #watch: Subscription | undefined;
  #ticking = false;
  #last_tick_ms: number;
  /** The longest silence of our own loop since the last successful renewal: tells a stall from an outage. */
  #longest_silence_ms = 0;
  #renewed_ms = Number.NEGATIVE_INFINITY;
  readonly #table = new Map<number, Placed>();
  readonly #held = new Map<number, Held>();
  /** Shards that were left, and the epoch at which (M3). */
  readonly #left = new Map<number, number>();
  /** Shards with something going on (M5), and whether to look again afterwards. */
  readonly #errands = new Map<number, { again: boolean }>();
  #draining: { readonly until_ms: number; readonly release: boolean } | undefined;
  /** The lease as the leader can read it says that we drain. Before that, what we release would be given to us again at once. */
  #drain_told = false;

  constructor(options: MemberOptions) {
    this.#options = options;
    this.#ttl_ms = options.ttl_ms ?? LEASE_TTL_MS;
    this.#workers = options.bus.bucket("WORKERS");
    this.#placement = options.bus.bucket("PLACEMENT");
    this.#started_at = timestamp(options.world.now_ms());
    this.#last_tick_ms = options.world.monotonic_ms();
    this.#incarnation = options.world.id();
    this.#lease = this.#newLease();
  }

  get incarnation(): string {
    return this.#incarnation;
  }
  get phase(): MemberPhase {
    return this.#phase.kind;
  }
  get draining(): boolean {
    return this.#draining !== undefined;
  }

  /** M1. By our own clock, now: may this worker append, begin an effect, publish? */
  may_act(): boolean {
    return this.#phase.kind === "present" && this.#lease.is_valid();
  }

  /** Watches the table and tries to join. Resolves when the table is known; the lease comes with the ticks. */
  async start(): Promise<void> {
    assert(this.#watch === undefined && this.#phase.kind === "joining", "a member starts once");
    while (this.#watch === undefined && !this.#stopped()) {
      try {
        const watch = await this.#placement.watch((change) => this.#onChange(change));
        if (this.#stopped()) await watch.stop();
        else this.#watch = watch;
      } catch (error) {
        this.#options.log.warn("the placement table cannot be watched yet", errorFields(error));
        await pause(this.#options.world, RETRY_MS);
      }
    }
    await this.tick();
  }

  /**
   * M2. One beat of the worker's loop: renews the lease when a renewal is due, and notices that it ended.
   * To be called at least every LEASE_RENEW_MS / 2 by the loop whose health the lease stands for.
   */
  async tick(): Promise<void> {
    const now_ms = this.#options.world.monotonic_ms();
    this.#longest_silence_ms = Math.max(this.#longest_silence_ms, now_ms - this.#last_tick_ms);
    this.#last_tick_ms = now_ms;
    if (this.#stopped()) return;
    if (this.#phase.kind === "present" && !this.#lease.is_valid()) this.#expired();
    if (this.#ticking || this.#lease.busy) return;
    this.#ticking = true;
    const beat = this.#beat()
      .catch((error: unknown) => this.#options.log.error("a beat of the member broke", errorFields(error)))
      .finally(() => {
        this.#ticking = false;
      });
    await this.#atMost(beat, TICK_MS_MAX);
  }

  /** Waits for it, but not longer. */
  #atMost(work: Promise<void>, ms: number): Promise<void> {
    return new Promise((resolve) => {
      const cancel = this.#options.world.after(ms, resolve);
      void work.then(() => {
        cancel();
        resolve();
      });
    });
  }

  /**
   * A fence refused an append of a shard we hold under `epoch`: whose is it? Read from the leader; an unreadable
   * placement is asked for again until it is known or our hold of everything ended.
   */
  async on_conflict(shard: number, epoch: number): Promise<"mine" | "lost"> {
    for (;;) {
      if (this.#held.get(shard)?.epoch !== epoch || this.#stopped()) return "lost";
      if (this.#phase.kind === "present") {
        const placed = await this.#readPlacement(shard);
        if (placed !== "unavailable") {
          if (this.#isMine(this.#table.get(shard)?.entry, epoch)) return "mine";
          this.#look(shard);
          return "lost";
        }
      }
      await pause(this.#options.world, RETRY_MS);
    }
  }

  /**
   * Leaves in good order: marks the lease, hands every shard to whom the leader names, or to nobody when nobody else is
   * there. Resolves when nothing is owned, at the latest a moment after the deadline. Repeats: the same drain goes on.
   */
  async drain(options: { deadline_ms?: number } = {}): Promise<void> {
    const { world, log, id } = this.#options;
    const began_ms = world.monotonic_ms();
    const until_ms = began_ms + (options.deadline_ms ?? this.#handoverDeadlineMs());
    this.#draining ??= { until_ms, release: false };
    this.#renewed_ms = Number.NEGATIVE_INFINITY; // the leader should hear it now, not at the next renewal
    await this.tick();
    for (;;) {
      const owned = [...this.#table].some(([, { entry }]) => this.#isMine(entry)) || this.#held.size > 0;
      const now_ms = world.monotonic_ms();
      if (!owned || this.#stopped() || this.#phase.kind === "joining") return;
      if (now_ms >= until_ms + DRAIN_GRACE_MS) {
        log.warn("a drain ended at its deadline with shards still held; the leader gives them away", { worker: id, shards: this.#held.size });
        return;
      }
      if (!this.#draining.release) {
        const waiting = [...this.#table].some(([, { entry }]) => this.#isMine(entry) && entry.moving_to === undefined);
        const unled = waiting && now_ms >= began_ms + LEADER_PATIENCE_MS;
        if (this.#drain_told && (now_ms >= until_ms || unled || (await this.#alone()))) {
          this.#draining = { until_ms, release: true };
          for (const shard of this.#table.keys()) this.#look(shard);
        }
      }
      await pause(world, DRAIN_POLL_MS);
    }
  }

  /** Ends at once: drops what is held, gives the lease back. After a drain nothing is held. */
  async stop(): Promise<void> {
    if (this.#stopped()) return;
    this.#become({ kind: "stopped" });
    await this.#watch?.stop();
    await this.#dropAll();
    for (let waits = 0; this.#lease.busy && waits < 20; waits++) await pause(this.#options.world, RETRY_MS);
    if (!this.#lease.busy) await this.#lease.release();
  }

  // ── the lease ────────────────────────────────────────────────────────────────────────────────────────────────────

  #newLease(): Lease {
    const incarnation = this.#incarnation;
    return new Lease({
      bucket: this.#workers,
      key: this.#options.id,
      world: this.#options.world,
      log: this.#options.log,
      ttl_ms: this.#ttl_ms,
      is_mine: (value) => decodeWorkerLease(value)?.incarnation === incarnation,
    });
  }

  #value(): Uint8Array {
    const owned = this.#options.host.owned();
    const lease: WorkerLease = {
      id: this.#options.id,
      incarnation: this.#incarnation,
      versions: [...this.#options.versions],
      draining: this.#draining !== undefined,
      owned: owned.length,
      resident: owned.reduce((sum, shard) => sum + shard.resident, 0),
      running: owned.reduce((sum, shard) => sum + shard.running, 0),
      started_at: this.#started_at,
    };
    return encodeRecord(lease);
  }

  async #beat(): Promise<void> {
    const phase = this.#phase;
    if (phase.kind === "joining") return this.#join();
    if (phase.kind === "cut_off") return this.#comeBack(phase.since_ms);
    if (phase.kind === "present") await this.#renewWhenDue();
  }

  async #join(): Promise<void> {
    const outcome = await this.#acquire();
    if (outcome !== "held") return;
    this.#become({ kind: "present" });
    for (const shard of this.#table.keys()) this.#look(shard);
  }

  async #acquire(): Promise<"held" | "taken" | "unavailable"> {
    const sent_ms = this.#options.world.monotonic_ms();
    const draining = this.draining;
    const outcome = await this.#lease.acquire(this.#value());
    if (outcome.kind === "taken") this.#options.log.debug("another process of this name still holds the worker's lease", { worker: this.#options.id });
    if (outcome.kind !== "held") return outcome.kind;
    this.#renewed_ms = sent_ms;
    this.#longest_silence_ms = 0;
    this.#drain_told = draining;
    return "held";
  }

  async #renewWhenDue(): Promise<void> {
    const now_ms = this.#options.world.monotonic_ms();
    if (now_ms - this.#renewed_ms < LEASE_RENEW_MS) return;
    const lease = this.#lease;
    const draining = this.draining;
    const outcome = await lease.renew(this.#value());
    if (this.#lease !== lease || this.#stopped()) return;
    if (outcome.kind === "held") {
      // A drain that began while this was under way is told with the next one, at once.
      this.#renewed_ms = draining === this.draining ? now_ms : Number.NEGATIVE_INFINITY;
      this.#longest_silence_ms = 0;
      this.#drain_told = draining;
    } else if (outcome.kind === "lost" && outcome.reason !== "expired") await this.#startOver(`the lease was ${outcome.reason}`);
    else if (outcome.kind === "lost") this.#expired();
  }

  /** The lease ended by our own clock. Did we sleep, or was the bus away? */
  #expired(): void {
    if (this.#phase.kind !== "present") return;
    if (this.#longest_silence_ms >= this.#ttl_ms / 2) {
      void this.#startOver(`this process stood still for ${Math.round(this.#longest_silence_ms)} ms`);
      return;
    }
    this.#options.log.warn("the bus did not take the worker's renewals; it holds its work and acts no more until it is back", { worker: this.#options.id });
    this.#become({ kind: "cut_off", since_ms: this.#options.world.monotonic_ms() });
  }

  /** M4 */
  async #comeBack(since_ms: number): Promise<void> {
    if (this.#options.world.monotonic_ms() - since_ms >= OUTAGE_HOLD_MS) return this.#startOver("the bus was away for too long");
    if (!this.#lease.is_valid()) {
      const outcome = await this.#acquire();
      if (outcome === "taken") return this.#startOver("another process took the worker's name");
      if (outcome === "unavailable") return;
    }
    const entries = await this.#readAll();
    if (entries === undefined || this.#phase.kind !== "cut_off") return;
    for (const entry of entries) this.#apply(entry);
    this.#become({ kind: "present" });
    this.#options.log.info("the bus is back; the worker goes on with what is still its own", { worker: this.#options.id });
    for (const shard of this.#shardsOfInterest()) this.#look(shard);
  }

  /** Drops everything and joins again as another: whatever was decided meanwhile was decided without us. */
  async #startOver(why: string): Promise<void> {
    this.#options.log.warn("the worker drops all it owned and joins again", { worker: this.#options.id, why, shards: this.#held.size });
    this.#incarnation = this.#options.world.id();
    this.#lease = this.#newLease();
    this.#become({ kind: "joining" });
    await this.#dropAll();
  }

  async #dropAll(): Promise<void> {
    const shards = [...this.#held.keys()];
    this.#left.clear();
    await Promise.all(
      shards.map(async (shard) => {
        this.#held.delete(shard);
        await this.#drop(shard);
      }),
    );
  }

  #become(phase: Phase): void {
    this.#phase = phase;
    this.#options.on_phase?.(phase.kind, this.#incarnation);
  }
  #stopped(): boolean {
    return this.#phase.kind === "stopped";
  }

  // ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────

  #onChange(change: BucketChange): void {
    const key = change.kind === "put" ? change.entry.key : change.key;
    const shard = shardOfKey(key, this.#options.bus.shards);
    if (shard === undefined || this.#stopped()) return;
    if (change.kind === "put") this.#apply(change.entry);
    else if (change.revision >= (this.#table.get(shard)?.revision ?? 0)) this.#table.delete(shard);
    this.#look(shard);
  }

  /** Keeps the newest of what is heard, in whatever order it is heard. */
  #apply(read: BucketEntry): void {
    const shard = shardOfKey(read.key, this.#options.bus.shards);
    if (shard === undefined || read.revision <= (this.#table.get(shard)?.revision ?? 0)) return;
    const entry = decodePlacementEntry(read.value);
    if (entry === undefined) {
      this.#options.log.error("a placement entry cannot be read and is passed over", { key: read.key });
      return;
    }
    this.#table.set(shard, { entry, revision: read.revision });
  }

  async #readPlacement(shard: number): Promise<"read" | "unavailable"> {
    try {
      const read = await this.#placement.get(placementKey(shard));
      if (read === undefined) this.#table.delete(shard);
      else this.#apply(read);
      return "read";
    } catch (error) {
      this.#options.log.warn("the placement of a shard cannot be read", { shard, ...errorFields(error) });
      return "unavailable";
    }
  }

  async #readAll(): Promise<BucketEntry[] | undefined> {
    try {
      return await this.#placement.all();
    } catch (error) {
      this.#options.log.warn("the placement table cannot be read", errorFields(error));
      return undefined;
    }
  }

  #isMine(entry: PlacementEntry | undefined, epoch?: number): boolean {
    return (
      entry !== undefined && entry.worker === this.#options.id && entry.incarnation === this.#incarnation && (epoch === undefined || entry.epoch === epoch)
    );
  }
  #shardsOfInterest(): Set<number> {
    return new Set([...this.#table.keys(), ...this.#held.keys()]);
  }

  // ── one shard ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** What must happen next to a shard, so that what we hold equals the table. */
  #errandOf(shard: number): Errand {
    const held = this.#held.get(shard);
    const placed = this.#table.get(shard);
    if (this.#phase.kind !== "present") return { kind: "rest" };
    if (placed === undefined || !this.#isMine(placed.entry)) return held === undefined ? { kind: "rest" } : { kind: "drop" };
    const { entry } = placed;
    if (held !== undefined && held.epoch !== entry.epoch) return { kind: "drop" };
    const going = entry.moving_to !== undefined || this.#draining?.release === true;
    if (held !== undefined) return going ? { kind: "leave", epoch: entry.epoch } : { kind: "rest" };
    if (going || this.#left.get(shard) === entry.epoch) return { kind: "hand_over", placed }; // M3
    // Who slept may hear only now of what it was given and lost again: its tick will say what its lease is worth, and looks again.
    return this.#lease.is_valid() ? { kind: "take", entry } : { kind: "rest" };
  }

  /** Starts what must happen to a shard, or makes what is going on look again (M5). */
  #look(shard: number): void {
    const running = this.#errands.get(shard);
    if (running === undefined) {
      if (this.#errandOf(shard).kind === "rest") return;
      void this.#run(shard);
      return;
    }
    running.again = true;
    const held = this.#held.get(shard);
    const lost = held !== undefined && held.phase !== "owning" && this.#phase.kind === "present" && !this.#isMine(this.#table.get(shard)?.entry, held.epoch);
    if (lost) void this.#drop(shard);
  }

  async #run(shard: number): Promise<void> {
    const running = { again: true };
    this.#errands.set(shard, running);
    let failures = 0;
    while (running.again && !this.#stopped()) {
      running.again = false;
      const errand = this.#errandOf(shard);
      if (errand.kind === "rest") continue;
      running.again = true;
      try {
        if (await this.#perform(shard, errand)) failures = 0;
        else await pause(this.#options.world, RETRY_MS);
      } catch (error) {
        failures += 1;
        this.#options.log.error("an errand of a shard failed and is tried again", { shard, errand: errand.kind, failures, ...errorFields(error) });
        this.#held.delete(shard);
        await this.#drop(shard);
        await pause(this.#options.world, Math.min(this.#ttl_ms, RETRY_MS * 2 ** Math.min(failures, 6)));
      }
    }
    this.#errands.delete(shard);
  }

  /** Answers false when it must be tried again after a moment. */
  async #perform(shard: number, errand: Exclude<Errand, { kind: "rest" }>): Promise<boolean> {
    const { host, log, id } = this.#options;
    const incarnation = this.#incarnation;
    if (errand.kind === "drop") {
      log.info("a shard is another's now", { shard, worker: id, epoch: this.#held.get(shard)?.epoch });
      this.#held.delete(shard);
      await this.#drop(shard);
      return true;
    }
    if (errand.kind === "take") {
      const { epoch, from, reason } = errand.entry;
      this.#held.set(shard, { epoch, phase: "taking" });
      await host.take(shard, epoch, { worker: from ?? null, reason: reason ?? "assigned" });
      if (this.#incarnation !== incarnation || !this.#isMine(this.#table.get(shard)?.entry, epoch)) {
        // Lost while it was taken: nothing of it may stay.
        if (this.#held.get(shard)?.epoch === epoch) this.#held.delete(shard);
        await this.#drop(shard);
      } else this.#held.set(shard, { epoch, phase: "owning" });
      return true;
    }
    if (errand.kind === "leave") {
      const { epoch } = errand;
      this.#held.set(shard, { epoch, phase: "leaving" });
      const now_ms = this.#options.world.monotonic_ms();
      const deadline_ms = Math.max(0, Math.min(this.#handoverDeadlineMs(), (this.#draining?.until_ms ?? Number.POSITIVE_INFINITY) - now_ms));
      const { gap } = await host.leave(shard, deadline_ms);
      if (!gap) log.warn("a shard was left at the deadline with effects running; they begin again at the next owner", { shard, worker: id });
      if (this.#incarnation !== incarnation) return true;
      this.#held.delete(shard);
      this.#left.set(shard, epoch);
      return true;
    }
    return this.#handOver(shard, errand.placed);
  }

  /** Writes the entry after ours: the named successor's, or nobody's. */
  async #handOver(shard: number, { entry, revision }: Placed): Promise<boolean> {
    const { world, log, id } = this.#options;
    const successor = entry.moving_to === undefined ? undefined : await this.#successor(entry.moving_to);
    if (successor === "unavailable") return false;
    const since = timestamp(world.now_ms());
    const next: PlacementEntry =
      successor === undefined
        ? { worker: "", incarnation: this.draining ? this.#incarnation : "", epoch: entry.epoch, from: id, reason: "released", since }
        : { worker: successor.id, incarnation: successor.incarnation, epoch: entry.epoch + 1, from: id, reason: "moved", since };
    const value = encodeRecord(next);
    const outcome = await this.#placement.update(placementKey(shard), value, revision);
    if (outcome.kind === "unavailable") return false;
    if (outcome.kind === "conflict") return (await this.#readPlacement(shard)) === "read";
    this.#apply({ key: placementKey(shard), value, revision: outcome.revision });
    this.#left.delete(shard);
    log.info("a shard was handed over", { shard, from: id, to: next.worker === "" ? null : next.worker, epoch: next.epoch });
    return true;
  }

  /** Who is to have it, if it is still there and stays; undefined when not. */
  async #successor(worker: string): Promise<WorkerLease | undefined | "unavailable"> {
    try {
      const read = await this.#workers.get(worker);
      const lease = read === undefined ? undefined : decodeWorkerLease(read.value);
      return lease === undefined || lease.draining ? undefined : lease;
    } catch (error) {
      this.#options.log.warn("the lease of a successor cannot be read", { worker, ...errorFields(error) });
      return "unavailable";
    }
  }

  /** Nobody else could take anything over. Unknown counts as somebody. */
  async #alone(): Promise<boolean> {
    try {
      const others = (await this.#workers.all())
        .map((read) => decodeWorkerLease(read.value))
        .filter((lease) => lease !== undefined && lease.id !== this.#options.id && !lease.draining);
      return others.length === 0;
    } catch (error) {
      this.#options.log.warn("the other workers cannot be read", errorFields(error));
      return false;
    }
  }

  /** Dropping is at once and may be repeated; a host that breaks on it is told of, and the shard is gone from here all the same. */
  async #drop(shard: number): Promise<void> {
    try {
      await this.#options.host.drop(shard);
    } catch (error) {
      this.#options.log.error("a shard could not be dropped cleanly", { shard, ...errorFields(error) });
    }
  }

  #handoverDeadlineMs(): number {
    return this.#options.handover_deadline_ms ?? HANDOVER_DEADLINE_MS;
  }
}
