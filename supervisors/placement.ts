// placement: who should own which shard. Pure: equal input gives equal decisions.
//
//   nobody's ──assign──▶ owned ──move──▶ owned, moving_to ──(the owner writes)──▶ owned by the other
//
// Invariants:
//   P1. A decision names only workers that are ready, know the required versions, and are not draining.
//   P2. A shard with a living owner is never assigned; it moves, and only away from an owner that drains or cannot run its
//       actors, or to bring the counts of two ready workers within one of each other.
//   P3. No more shards move than those counts need; none moves that is already moving to a good place.
//   P4. An assignment's epoch is above every epoch its shard has ever had.
import { assert } from "../protocol/assert.ts";
import type { PlacementEntry } from "./tables.ts";

export interface PlacementWorker {
  readonly id: string;
  readonly incarnation: string;
  /** `ready` may be given shards; `leaving` must give all away; `suspected` keeps what it has and gets no more. */
  readonly condition: "ready" | "suspected" | "leaving";
  readonly versions: readonly string[];
}

export interface PlacementInput {
  readonly shards: number;
  /** Those that hold a lease. Who is not here is dead, and so is every other incarnation of who is. */
  readonly workers: readonly PlacementWorker[];
  readonly table: ReadonlyMap<number, PlacementEntry>;
  /** The highest epoch a shard is known to have had elsewhere than in the table: decisions that never reached it. */
  readonly epochs: ReadonlyMap<number, number>;
  /** Machine versions that a worker must know to be given anything. */
  readonly required_versions: readonly string[];
}

export type PlacementDecision =
  | {
      readonly kind: "assign";
      readonly shard: number;
      readonly worker: string;
      readonly incarnation: string;
      readonly epoch: number;
      readonly from: string | null;
      readonly reason: "unowned" | "owner_gone";
    }
  | { readonly kind: "move"; readonly shard: number; readonly from: string; readonly to: string; readonly reason: "draining" | "versions" | "balance" }
  /** The place it was moving to is no longer good, and there is no other. */
  | { readonly kind: "stay"; readonly shard: number };

export interface Plan {
  readonly decisions: readonly PlacementDecision[];
  /** Shards that nobody owns and nobody may be given: no worker is ready. */
  readonly unplaced: readonly number[];
}

/** Chooses among candidates; `count` is how many shards each has or is about to have. */
export interface PlacementStrategy {
  readonly name: string;
  pick(shard: number, candidates: readonly { readonly id: string; readonly count: number }[]): string;
}

const fewer = (a: { id: string; count: number }, b: { id: string; count: number }): number => a.count - b.count || (a.id < b.id ? -1 : 1);

/** The fewest shards first, then the first by name. */
export const leastLoaded: PlacementStrategy = {
  name: "least_loaded",
  pick(_shard, candidates) {
    const best = candidates.toSorted(fewer)[0];
    assert(best !== undefined, "a strategy chooses among at least one");
    return best.id;
  },
};

/** By the shard's number, whatever anybody has. Balance is then restored by planned moves. */
export const roundRobin: PlacementStrategy = {
  name: "round_robin",
  pick(shard, candidates) {
    const best = candidates.toSorted((a, b) => (a.id < b.id ? -1 : 1))[shard % candidates.length];
    assert(best !== undefined, "a strategy chooses among at least one");
    return best.id;
  },
};

/** Where a shard is, as the planner goes on deciding. */
interface Place {
  readonly owner: PlacementWorker | undefined;
  readonly target: string | undefined;
}

/** Answers what must change; the same input again, once that is done, answers nothing. */
export function planPlacement(input: PlacementInput, strategy: PlacementStrategy = leastLoaded): Plan {
  const living = new Map(input.workers.map((worker) => [worker.id, worker]));
  assert(living.size === input.workers.length, "a worker is named once");
  const knows = (worker: PlacementWorker): boolean => input.required_versions.every((version) => worker.versions.includes(version));
  const eligible = input.workers.filter((worker) => worker.condition === "ready" && knows(worker));
  const good = new Set(eligible.map((worker) => worker.id)); // P1
  const counts = new Map([...good].map((id) => [id, 0]));
  const decisions: PlacementDecision[] = [];
  const unplaced: number[] = [];
  const places = new Map<number, Place>();

  const count = (id: string, by: number): void => void counts.set(id, (counts.get(id) ?? 0) + by);
  const candidates = (): { id: string; count: number }[] => [...good].map((id) => ({ id, count: counts.get(id) ?? 0 }));

  // What stands: a shard counts for the worker where it is going to be.
  for (let shard = 0; shard < input.shards; shard++) {
    const entry = input.table.get(shard);
    const named = entry === undefined ? undefined : living.get(entry.worker);
    const owner = named !== undefined && named.incarnation === entry?.incarnation ? named : undefined;
    const target =
      owner !== undefined && entry?.moving_to !== undefined && entry.moving_to !== owner.id && good.has(entry.moving_to) ? entry.moving_to : undefined;
    places.set(shard, { owner, target });
    const at = target ?? owner?.id;
    if (at !== undefined && good.has(at)) count(at, 1);
  }

  // Nobody's: to where it was going, else to whom the strategy picks.
  for (const [shard, place] of places) {
    if (place.owner !== undefined) continue;
    if (good.size === 0) {
      unplaced.push(shard);
      continue;
    }
    const entry = input.table.get(shard);
    // Who released it to nobody is leaving, whatever its lease said when it was heard last: given back, it would be released again at once.
    const stay = candidates().filter(({ id }) => entry?.worker !== "" || entry.from !== id || entry.incarnation !== living.get(id)?.incarnation);
    if (stay.length === 0) {
      unplaced.push(shard);
      continue;
    }
    const worker = entry?.moving_to !== undefined && good.has(entry.moving_to) ? entry.moving_to : strategy.pick(shard, stay);
    const chosen = living.get(worker);
    assert(chosen !== undefined && good.has(worker), "P1: a shard is given to a ready worker");
    const epoch = Math.max(entry?.epoch ?? 0, input.epochs.get(shard) ?? 0) + 1; // P4
    const from = entry === undefined || entry.worker === "" ? (entry?.from ?? null) : entry.worker;
    decisions.push({
      kind: "assign",
      shard,
      worker,
      incarnation: chosen.incarnation,
      epoch,
      from,
      reason: entry === undefined || entry.worker === "" ? "unowned" : "owner_gone",
    });
    count(worker, 1);
    places.set(shard, { owner: chosen, target: undefined });
  }

  // Away from those that leave or cannot run what they have.
  const moves = new Map<number, Extract<PlacementDecision, { kind: "move" }>>();
  const move = (shard: number, from: string, to: string, reason: "draining" | "versions" | "balance"): void => {
    moves.set(shard, { kind: "move", shard, from, to, reason });
    count(to, 1);
  };
  for (const [shard, { owner, target }] of places) {
    if (owner === undefined || target !== undefined) continue;
    const must = owner.condition === "leaving" ? "draining" : knows(owner) ? undefined : "versions";
    if (must !== undefined && good.size > 0) move(shard, owner.id, strategy.pick(shard, candidates()), must);
    else if (
      input.table.get(shard)?.moving_to !== undefined &&
      owner.incarnation === input.table.get(shard)?.incarnation &&
      owner.id === input.table.get(shard)?.worker
    )
      decisions.push({ kind: "stay", shard });
  }

  // Balance, by the fewest moves (P3): from the fullest to the emptiest until they differ by at most one.
  const assigned = new Set(decisions.flatMap((decision) => (decision.kind === "assign" ? [decision.shard] : [])));
  const movable = new Map<string, number[]>();
  for (const [shard, { owner, target }] of places) {
    if (owner === undefined || target !== undefined || moves.has(shard) || assigned.has(shard) || !good.has(owner.id)) continue;
    movable.set(owner.id, [...(movable.get(owner.id) ?? []), shard]);
  }
  for (;;) {
    const sorted = candidates().toSorted(fewer);
    const emptiest = sorted[0];
    const fullest = sorted.findLast((candidate) => (movable.get(candidate.id)?.length ?? 0) > 0);
    if (emptiest === undefined || fullest === undefined || fullest.count - emptiest.count <= 1) break;
    const shard = movable.get(fullest.id)?.pop();
    assert(shard !== undefined, "a worker that is too full has a shard that can move");
    count(fullest.id, -1);
    move(shard, fullest.id, emptiest.id, "balance");
    const stays = decisions.findIndex((decision) => decision.kind === "stay" && decision.shard === shard);
    if (stays >= 0) decisions.splice(stays, 1);
  }
  return { decisions: [...decisions, ...[...moves.values()].toSorted((a, b) => a.shard - b.shard)], unplaced };
}
