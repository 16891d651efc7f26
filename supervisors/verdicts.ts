// verdicts: which worker is there, suspected, dead or left, as the leader decides it from its lease and its connections.
//
//   lease of a worker appears ──▶ worker.join, worker.ready
//   half forgotten, or one of its two connections closed ──▶ worker.suspect    (it keeps what it has and gets no more)
//   both connections closed and it does not answer, or lease expired ──▶ worker.declare_dead
//   lease: drains ──▶ worker.drain ──▶ lease gone, nothing owned ──▶ worker.leave
//
// Owns: what is heard of the workers' leases. Leaves to others: the connections (connections.ts), the shards of who is gone (assignments.ts).
//
// Invariants (of leader.ts):
//   D3. Nobody is judged dead within one TTL of an outage of the bus, nor before the leader has looked itself: the bucket's leader
//       says that the lease is gone, or nobody answers for a worker whose connections were closed. Who is not judged keeps what
//       the table gives.
import type { Bucket, BucketChange, BucketEntry, Bus, Subscription } from "../bus/port.ts";
import type { JsonObject } from "../protocol/json.ts";
import { LEASE_RENEW_MS } from "../protocol/limits.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import type { Calm } from "./calm.ts";
import type { Connections, Presence } from "./connections.ts";
import { askHost } from "./host-service.ts";
import type { PlacementWorker } from "./placement.ts";
import type { Probation } from "./probation.ts";
import { decodeWorkerLease, type WorkerLease } from "./tables.ts";
import type { Term } from "./term.ts";
import type { WorkerRecord } from "./worker-cell.ts";
import { isAlive, type WorkerJournals } from "./worker-journals.ts";

/** A worker that was silent for this part of its lease is suspected: past a pause of 2 s and a renewal's second, before the end. */
const SUSPECT_AFTER = 0.7;
/** Nobody listens for a dead worker, and the broker says so at once; a worker that is there answers within a few milliseconds. */
const HEALTH_PATIENCE_MS = 100;

export interface VerdictsOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly term: Term;
  readonly calm: Calm;
  readonly journals: WorkerJournals;
  readonly connections: Connections;
  readonly probation: Probation;
  /** Of the workers' leases. */
  readonly ttl_ms: number;
  /** The shards that the table gives to the worker. */
  owned_by(worker: string): readonly number[];
  /** A worker was declared dead that was last heard `silent_ms` ago. */
  on_death(worker: string, silent_ms: number): void;
  /** What is known has changed. */
  on_change(): void;
}

interface Present {
  readonly lease: WorkerLease;
  readonly revision: number;
  readonly heard_ms: number;
}

export class Verdicts {
  readonly #options: VerdictsOptions;
  readonly #bucket: Bucket;
  readonly #present = new Map<string, Present>();
  /** When a worker that is not present was last heard, and what its lease said. */
  readonly #missing = new Map<string, { readonly lease: WorkerLease | undefined; readonly heard_ms: number }>();

  constructor(options: VerdictsOptions) {
    this.#options = options;
    this.#bucket = options.bus.bucket("WORKERS");
  }

  watch(): Promise<Subscription> {
    return this.#bucket.watch((change) => this.#onChange(change));
  }

  /** The leases are told: whose journal is open and who has none counts as heard until now. */
  begin(): void {
    const heard_ms = this.#options.world.monotonic_ms();
    for (const worker of this.#options.journals.workers()) if (!this.#present.has(worker)) this.#missing.set(worker, { lease: undefined, heard_ms });
  }

  /** What the worker's lease says, while it holds one. */
  lease(worker: string): WorkerLease | undefined {
    return this.#present.get(worker)?.lease;
  }

  /** Looks at every worker that is known, and says of each what follows. */
  async judge(): Promise<void> {
    await Promise.all([...this.#present.keys()].map((worker) => this.#greet(worker)));
    const missing = this.#options.journals.workers().filter((worker) => !this.#present.has(worker));
    await Promise.all(missing.map((worker) => this.#miss(worker)));
  }

  /** Who counts as living (D3: also who is missing and not judged), and who may be given more. */
  living(): PlacementWorker[] {
    const { journals, probation } = this.#options;
    const workers: PlacementWorker[] = [];
    for (const id of journals.workers()) {
      const record = journals.record(id);
      if (record === undefined || !isAlive(record.state)) continue;
      const lease = this.lease(id);
      if (lease !== undefined && lease.incarnation !== record.incarnation) continue;
      const leaving = record.state === "draining" || lease?.draining === true;
      const condition = lease === undefined ? "suspected" : leaving ? "leaving" : record.state === "ready" ? "ready" : "suspected";
      workers.push({ id, incarnation: record.incarnation, condition, versions: lease?.versions ?? [] });
    }
    const steady = workers.filter((worker) => worker.condition === "ready" && !probation.has(worker.id));
    if (steady.length === 0) return workers;
    return workers.map((worker) => (worker.condition === "ready" && probation.has(worker.id) ? { ...worker, condition: "suspected" as const } : worker));
  }

  /** Of a worker that there is not, or that is over and owes nothing: its journal stays, what is in memory goes. */
  forget(worker: string): void {
    this.#options.journals.forget(worker);
    this.#missing.delete(worker);
    this.#options.probation.forget(worker);
  }

  #onChange(change: BucketChange): void {
    if (this.#options.term.over) return;
    if (change.kind === "put") this.#heard(change.entry);
    else {
      const before = this.#present.get(change.key);
      if (before === undefined || change.revision < before.revision) return;
      this.#present.delete(change.key);
      this.#missing.set(change.key, { lease: before.lease, heard_ms: before.heard_ms });
    }
    this.#options.on_change();
  }

  #heard(read: BucketEntry): void {
    const before = this.#present.get(read.key);
    if (before !== undefined && read.revision <= before.revision) return;
    const lease = decodeWorkerLease(read.value);
    if (lease === undefined || lease.id !== read.key) {
      this.#options.log.error("a worker's lease cannot be read and is passed over", { key: read.key });
      return;
    }
    this.#missing.delete(read.key);
    this.#present.set(read.key, { lease, revision: read.revision, heard_ms: this.#options.world.monotonic_ms() });
  }

  /** A worker with a lease: known, of this incarnation, ready or draining. */
  async #greet(worker: string): Promise<void> {
    const { world, term, calm, journals, connections, ttl_ms } = this.#options;
    journals.open(worker);
    await journals.loaded(worker);
    const present = this.#present.get(worker);
    if (present === undefined || !term.may_act()) return;
    const { lease } = present;
    let record = journals.record(worker);
    if (record !== undefined && isAlive(record.state) && record.incarnation !== lease.incarnation) {
      // D1: what the earlier incarnation had is nobody's; the table follows in this very pass.
      await this.#declareDead(worker, { kind: "new_incarnation", incarnation: record.incarnation, by: lease.incarnation }, world.monotonic_ms());
      record = journals.record(worker);
    }
    if (record !== undefined && !isAlive(record.state) && record.incarnation === lease.incarnation) {
      // Over, and its lease still stands, or again: without it a process that lives after all starts over, as another incarnation.
      const deleted = await this.#bucket.delete(worker, present.revision);
      if (deleted.kind === "unavailable") calm.outage();
      return;
    }
    if (record === undefined || !isAlive(record.state)) {
      const joined = await journals.say(worker, "worker.join", { incarnation: lease.incarnation, versions: versionsByKind(lease.versions) });
      if (joined?.ok !== true) return;
      record = journals.record(worker);
    }
    if (record !== undefined && (await this.#judgeByConnections(worker, record, present))) return;
    const silent_ms = world.monotonic_ms() - present.heard_ms;
    const { kind: presence } = connections.of(worker);
    if (record?.state === "joining") {
      await journals.say(worker, "worker.ready", {});
      record = journals.record(worker);
    }
    if (record?.state === "suspected" && silent_ms < LEASE_RENEW_MS * 2 && presence === "standing") {
      await journals.say(worker, "worker.clear", {});
      record = journals.record(worker);
    }
    if (record?.state === "ready" && lease.draining) await journals.say(worker, "worker.drain", { reason: "the worker is leaving" });
    else if (record?.state === "ready" && silent_ms >= ttl_ms * SUSPECT_AFTER && calm.may_judge_leases())
      await journals.say(worker, "worker.suspect", { evidence: { kind: "silent", silent_ms: Math.round(silent_ms), incarnation: lease.incarnation } });
  }

  /** What its connections say. Answers true when that is all there is to say of it. */
  async #judgeByConnections(worker: string, record: WorkerRecord, { lease }: Present): Promise<boolean> {
    const { bus, term, calm, journals, connections } = this.#options;
    const presence = connections.of(worker);
    if (presence.kind === "standing" || !calm.may_judge()) return false;
    if (presence.kind === "suspect") {
      if (record.state !== "ready") return false;
      const { which, closed } = presence;
      await journals.say(worker, "worker.suspect", { evidence: { kind: "connection_closed", which, ...closed, incarnation: lease.incarnation } });
      return true;
    }
    // Who has nothing left and says so is leaving in good order, and its lease goes next.
    if (lease.draining && this.#options.owned_by(worker).length === 0) return false;
    const answer = await askHost(bus, worker, "health", {}, { patience_ms: HEALTH_PATIENCE_MS });
    if (answer.ok || !calm.may_judge() || !term.may_act() || connections.of(worker).kind !== "gone") return false;
    await this.#declareDead(worker, { ...connectionsClosed(presence), incarnation: lease.incarnation }, presence.since_ms);
    return true;
  }

  /** A worker without a lease: left in good order, dead, or not to be judged yet (D3). */
  async #miss(worker: string): Promise<void> {
    const { term, calm, journals } = this.#options;
    await journals.loaded(worker);
    const record = journals.record(worker);
    if (record === undefined || !isAlive(record.state)) {
      // The dead are remembered until their shards have other owners.
      if (!this.#present.has(worker) && (record?.shards.size ?? 0) === 0 && term.may_act()) this.forget(worker);
      return;
    }
    if (!term.may_act() || this.#present.has(worker)) return;
    const missing = this.#missing.get(worker);
    const left = (record.state === "draining" || missing?.lease?.draining === true) && this.#options.owned_by(worker).length === 0;
    if (!left && !calm.may_judge_leases()) return;
    const read = await calm.attempt("a worker's lease", async () => ({ entry: await this.#bucket.get(worker) }));
    if (read === undefined || !term.may_act()) return;
    if (read.entry !== undefined) {
      this.#heard(read.entry);
      this.#options.on_change();
      return;
    }
    if (!left && !calm.may_judge_leases()) return;
    if (left) await journals.say(worker, "worker.leave", {});
    else await this.#declareDead(worker, { kind: "lease_expired", incarnation: record.incarnation }, missing?.heard_ms);
  }

  async #declareDead(worker: string, found: JsonObject & { readonly kind: string; readonly incarnation: string }, heard_ms: number | undefined): Promise<void> {
    const { world, log, journals, probation, on_death } = this.#options;
    const now_ms = world.monotonic_ms();
    const silent_ms = Math.round(now_ms - (heard_ms ?? now_ms));
    const outcome = await journals.say(worker, "worker.declare_dead", { evidence: { ...found, silent_ms } });
    if (outcome?.ok !== true) return;
    log.warn("a worker is dead", { worker, ...found, silent_ms });
    probation.died(worker, now_ms);
    on_death(worker, silent_ms);
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
