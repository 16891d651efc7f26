// assignments: carries out what the plan says (placement.ts): each decision first into the worker's journal, then into the table. And the other
// way round: what owners wrote into the table themselves is told in the journals.
//
//   assign ──shard.assign is appended──▶ the entry is written ──▶ told
//   move ──its target is prepared──▶ the entry says where to ──the owner leaves, and writes the next one──▶ told
//     └──the owner does not, for MOVE_GRACE_MS past its deadline──▶ assign
//   the table gives a shard to another than a journal says ──▶ shard.release, shard.assign there
//
// Invariants (of leader.ts):
//   D1. Each decision is appended to the worker's journal before the table changes by it.
//   D2. The table changes by compare-and-set only, and the epoch of a shard only rises.
import type { Bus } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { HANDOVER_DEADLINE_MS } from "../protocol/limits.ts";
import type { Log } from "../protocol/log.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { leastLoaded, type PlacementDecision, type PlacementStrategy, type PlacementWorker, planPlacement } from "./placement.ts";
import type { PlacementTable } from "./placement-table.ts";
import { Preparations } from "./preparations.ts";
import type { WorkerLease } from "./tables.ts";
import type { Verdicts } from "./verdicts.ts";
import { isAlive, type WorkerJournals } from "./worker-journals.ts";

/** How long past its deadline a planned move is left to the owner before the leader ends it. */
const MOVE_GRACE_MS = 5_000;

/** A shard got an owner; `assign_ms` after it lost the last one, as far as this leader saw it. */
export interface Assigned {
  readonly shard: number;
  readonly worker: string;
  readonly epoch: number;
  readonly from: string | null;
  readonly reason: string;
  readonly assign_ms: number;
}

/** A living owner was asked to hand the shard over. */
export interface Moved {
  readonly shard: number;
  readonly from: string;
  readonly to: string;
  readonly reason: string;
}

export interface AssignmentsOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly journals: WorkerJournals;
  readonly verdicts: Verdicts;
  readonly table: PlacementTable;
  readonly strategy: PlacementStrategy | undefined;
  readonly handover_deadline_ms: number | undefined;
  /** Machine versions that journals are pinned to: who does not know them is given nothing. */
  required_versions(): readonly string[];
  on_assigned(assigned: Assigned): void;
  on_moved(moved: Moved): void;
  /** What is known has changed. */
  on_change(): void;
}

export class Assignments {
  readonly #options: AssignmentsOptions;
  /** Planned moves that begin when their target is ready. */
  readonly #preparations: Preparations;
  readonly #unowned_since_ms = new Map<number, number>();
  /** Who released a shard to nobody, by incarnation, with its lease as it was heard last by then. */
  readonly #released_under = new Map<string, WorkerLease>();

  constructor(options: AssignmentsOptions) {
    this.#options = options;
    this.#preparations = new Preparations({ bus: options.bus, log: options.log, on_ready: () => options.on_change() });
  }

  /** Plans on what is known now, and carries it out as far as nothing of it is in doubt. */
  async make(): Promise<void> {
    const { bus, world, journals, table } = this.#options;
    const now_ms = world.monotonic_ms();
    const { decisions, unplaced } = planPlacement(
      {
        shards: bus.shards,
        workers: this.#workers(),
        table: table.entries(),
        epochs: journals.epochs(),
        required_versions: this.#options.required_versions(),
      },
      this.#options.strategy ?? leastLoaded,
    );
    for (const decision of decisions)
      if (decision.kind === "assign" && !this.#unowned_since_ms.has(decision.shard)) this.#unowned_since_ms.set(decision.shard, now_ms);
    for (const shard of unplaced) if (!this.#unowned_since_ms.has(shard)) this.#unowned_since_ms.set(shard, now_ms);
    const decided = new Set(decisions.map((decision) => decision.shard));
    this.#preparations.keep(new Set(decisions.flatMap((decision) => (decision.kind === "move" ? [decision.shard] : []))));
    const known = [...decisions, ...this.#overdue(decided)].filter(({ shard }) => !table.is_doubtful(shard));
    await Promise.all(known.map((decision) => this.#carryOut(decision)));
  }

  /**
   * The living. Who releases a shard to nobody is leaving, and its lease says so; until that is heard it is given nothing: it would release that at once
   * as well, and be the emptiest again.
   */
  #workers(): PlacementWorker[] {
    const { verdicts, table } = this.#options;
    for (const { worker, from, incarnation } of table.entries().values()) {
      if (worker !== "" || typeof from !== "string" || this.#released_under.has(incarnation)) continue;
      const lease = verdicts.lease(from);
      if (lease?.incarnation === incarnation) this.#released_under.set(incarnation, lease);
    }
    const living = verdicts.living();
    const heard = new Map(living.map(({ id, incarnation }) => [incarnation, verdicts.lease(id)]));
    for (const [incarnation, lease] of this.#released_under) if (heard.get(incarnation) !== lease) this.#released_under.delete(incarnation);
    return living.map((one) => (one.condition === "ready" && this.#released_under.has(one.incarnation) ? { ...one, condition: "suspected" } : one));
  }

  /** Owners write the table themselves when they hand over; their journals tell it too. */
  async follow_table(): Promise<void> {
    const { journals, table } = this.#options;
    await Promise.all(
      journals.workers().map(async (worker) => {
        const record = journals.record(worker);
        if (record === undefined) return;
        const dead = !isAlive(record.state);
        for (const [shard, epoch] of record.shards) {
          if (table.is_doubtful(shard)) continue;
          const entry = table.entry(shard);
          if (entry !== undefined && entry.worker === worker && entry.incarnation === record.incarnation && entry.epoch >= epoch) continue;
          // A dead worker's shard is released when it has another owner, so that its journal says to whom it went.
          if (dead && entry !== undefined && entry.worker === worker) continue;
          await journals.say(worker, "shard.release", {
            shard,
            epoch,
            to: entry === undefined || entry.worker === "" ? null : entry.worker,
            reason: dead ? "owner_gone" : (entry?.reason ?? "not_placed"),
          });
        }
        if (record.state !== "ready") return;
        for (const shard of table.owned_by(worker)) {
          if (table.is_doubtful(shard)) continue;
          const entry = table.entry(shard);
          if (entry === undefined || entry.worker !== worker || entry.incarnation !== record.incarnation || (record.shards.get(shard) ?? -1) >= entry.epoch)
            continue;
          await journals.say(worker, "shard.assign", { shard, epoch: entry.epoch, from: entry.from ?? null, reason: entry.reason ?? "moved" });
        }
      }),
    );
  }

  /** Planned moves that their owner did not end in time: the leader ends them. */
  #overdue(decided: ReadonlySet<number>): PlacementDecision[] {
    const { world, verdicts, table, handover_deadline_ms } = this.#options;
    const now_ms = world.monotonic_ms();
    const patience_ms = (handover_deadline_ms ?? HANDOVER_DEADLINE_MS) + MOVE_GRACE_MS;
    return [...table.moves()].flatMap(([shard, { to, seen_ms }]): PlacementDecision[] => {
      const entry = table.entry(shard);
      const target = verdicts.lease(to);
      if (decided.has(shard) || entry === undefined || target === undefined || now_ms - seen_ms < patience_ms) return [];
      return [
        {
          kind: "assign",
          shard,
          worker: to,
          incarnation: target.incarnation,
          epoch: table.highest_epoch(shard) + 1,
          from: entry.worker,
          reason: "owner_gone",
        },
      ];
    });
  }

  async #carryOut(decision: PlacementDecision): Promise<void> {
    const { log, world, journals, verdicts, table, on_assigned, on_moved } = this.#options;
    const { shard } = decision;
    const placed = table.placed(shard);
    if (decision.kind === "assign") {
      const { worker, incarnation, epoch, from, reason } = decision;
      assert(epoch > (placed?.entry.epoch ?? 0), "D2: the epoch of a shard only rises");
      const outcome = await journals.say(worker, "shard.assign", { shard, epoch, from, reason }); // D1
      if (outcome?.ok !== true) return;
      const written = await table.write(shard, { worker, incarnation, epoch, from, reason, since: timestamp(world.now_ms()) }, placed);
      if (!written) return;
      const since_ms = this.#unowned_since_ms.get(shard);
      this.#unowned_since_ms.delete(shard);
      log.info("a shard was given", { shard, worker, epoch, from, reason });
      const assign_ms = world.monotonic_ms() - (since_ms ?? world.monotonic_ms());
      on_assigned({ shard, worker, epoch, from, reason, assign_ms });
      return;
    }
    if (placed === undefined) return;
    if (decision.kind === "stay") {
      const { moving_to: _, ...entry } = placed.entry;
      await table.write(shard, entry, placed);
      return;
    }
    const { from, to, reason } = decision;
    const target = verdicts.lease(to);
    if (target === undefined || !this.#preparations.ready(shard, to, target.incarnation)) return;
    const written = await table.write(shard, { ...placed.entry, moving_to: to }, placed);
    if (!written) return;
    log.info("a shard is to move", { shard, from, to, reason });
    on_moved({ shard, from, to, reason });
  }
}
