// PlacementTable: the bucket PLACEMENT as one leadership knows and writes it: who owns each shard, and where it is to move.
//
//   known ──write: stored──▶ known ──a change is heard──▶ known
//     ├──write: another wrote meanwhile──▶ read again ──▶ known
//     └──write: no answer──▶ doubtful ──read again──▶ known          what became of it nobody said: nothing follows from what is known
//
// Owners write it too: the end of a planned move, and the release of a shard to nobody.
//
// Owns: what is known of the table. Leaves to others: what ought to stand in it (placement.ts), and saying that first (assignments.ts).
//
// Invariants (of leader.ts):
//   D2. The table changes by compare-and-set only, and the epoch of a shard only rises.
//   PT1. What is known of a shard only goes forward: an older revision never replaces a newer one.
//   PT2. A shard in doubt stays so until the bucket itself was read after the write.
import type { Bucket, BucketChange, BucketEntry, Bus, Subscription } from "../bus/port.ts";
import type { Log } from "../protocol/log.ts";
import { timestamp, type World } from "../protocol/world.ts";
import type { Calm } from "./calm.ts";
import { decodePlacementEntry, encodeRecord, type PlacementEntry, placementKey, shardOfKey } from "./tables.ts";
import type { Term } from "./term.ts";

export interface PlacementTableOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly calm: Calm;
  readonly term: Pick<Term, "may_act" | "over">;
  /** The highest epoch that the workers' journals know of a shard. */
  said_epoch(shard: number): number;
  /** What is known has changed. */
  on_change(): void;
}

/** A planned move that has begun. */
export interface Move {
  readonly to: string;
  readonly seen_ms: number;
}

export interface Placed {
  readonly entry: PlacementEntry;
  readonly revision: number;
}

export class PlacementTable {
  readonly #options: PlacementTableOptions;
  readonly #bucket: Bucket;
  readonly #placed = new Map<number, Placed>();
  readonly #doubtful = new Set<number>();
  /** When each was first seen, for its deadline. */
  readonly #moves = new Map<number, Move>();

  constructor(options: PlacementTableOptions) {
    this.#options = options;
    this.#bucket = options.bus.bucket("PLACEMENT");
  }

  watch(): Promise<Subscription> {
    return this.#bucket.watch((change) => this.#onChange(change));
  }

  /** What stands there, with its revision, to be written over. */
  placed(shard: number): Placed | undefined {
    return this.#placed.get(shard);
  }
  entry(shard: number): PlacementEntry | undefined {
    return this.#placed.get(shard)?.entry;
  }
  entries(): Map<number, PlacementEntry> {
    return new Map([...this.#placed].map(([shard, { entry }]) => [shard, entry]));
  }
  owned_by(worker: string): number[] {
    return [...this.#placed].flatMap(([shard, { entry }]) => (entry.worker === worker ? [shard] : []));
  }
  moves(): ReadonlyMap<number, Move> {
    return this.#moves;
  }
  /** The highest epoch the shard ever had, as far as anybody knows. */
  highest_epoch(shard: number): number {
    return Math.max(this.entry(shard)?.epoch ?? 0, this.#options.said_epoch(shard));
  }

  /** An entry of the shard was written and nobody said what became of it: nothing follows from what is known of it. */
  is_doubtful(shard: number): boolean {
    return this.#doubtful.has(shard);
  }

  /** PT2. Reads what stands there now for every shard in doubt. */
  async read_doubtful(): Promise<void> {
    await Promise.all(
      [...this.#doubtful].map(async (shard) => {
        const read = await this.#read(shard);
        if (read === undefined) return;
        if (read.entry !== undefined) this.#learn(read.entry);
        this.#doubtful.delete(shard);
      }),
    );
  }

  /** D2. A refused write means that the owner or another leader wrote since `over` was read; the next pass decides on what stands now. */
  async write(shard: number, entry: PlacementEntry, over: Placed | undefined): Promise<boolean> {
    if (!this.#options.term.may_act()) return false;
    const key = placementKey(shard);
    const value = encodeRecord(entry);
    const outcome = over === undefined ? await this.#bucket.create(key, value) : await this.#bucket.update(key, value, over.revision);
    if (outcome.kind === "ok") {
      this.#learn({ key, value, revision: outcome.revision });
      this.#options.on_change();
      return true;
    }
    if (outcome.kind === "unavailable") {
      this.#doubtful.add(shard);
      this.#options.calm.outage();
      return false;
    }
    const read = await this.#read(shard);
    if (read?.entry !== undefined) this.#learn(read.entry);
    this.#options.on_change();
    return false;
  }

  #read(shard: number): Promise<{ entry: BucketEntry | undefined } | undefined> {
    return this.#options.calm.attempt("the placement of a shard", async () => ({ entry: await this.#bucket.get(placementKey(shard)) }));
  }

  #onChange(change: BucketChange): void {
    if (this.#options.term.over) return;
    if (change.kind === "put") this.#learn(change.entry);
    else {
      const shard = shardOfKey(change.key, this.#options.bus.shards);
      if (shard === undefined || change.revision < (this.#placed.get(shard)?.revision ?? 0)) return;
      this.#placed.delete(shard);
      this.#moves.delete(shard);
    }
    this.#options.on_change();
  }

  #learn(read: BucketEntry): void {
    const { bus, world, log } = this.#options;
    const shard = shardOfKey(read.key, bus.shards);
    if (shard === undefined || read.revision <= (this.#placed.get(shard)?.revision ?? 0)) return; // PT1
    const entry = decodePlacementEntry(read.value);
    if (entry === undefined) {
      log.error("a placement entry cannot be read; the shard counts as nobody's", { key: read.key });
      const nobodys = { worker: "", incarnation: "", epoch: this.highest_epoch(shard), since: timestamp(world.now_ms()) };
      this.#placed.set(shard, { entry: nobodys, revision: read.revision });
      return;
    }
    this.#placed.set(shard, { entry, revision: read.revision });
    if (entry.moving_to === undefined) this.#moves.delete(shard);
    else if (this.#moves.get(shard)?.to !== entry.moving_to) this.#moves.set(shard, { to: entry.moving_to, seen_ms: world.monotonic_ms() });
  }
}
