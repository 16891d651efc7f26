// locations: which worker has which actor, for whoever must route or tell. A watched copy of PLACEMENT in memory.
//
// Owns: the copy, and the counts by worker. Decides nothing: what it answers may be old, and the journal's fence corrects
// whoever trusted it.
//
// Invariants:
//   O1. A shard is in the list of exactly one worker, the one that the newest heard entry names, or of none.
//   O2. Counts are kept as entries change; nothing is scanned to answer.
import type { BucketChange, Bus, Subscription } from "../bus/port.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { shardOf } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { decodePlacementEntry, type PlacementEntry, shardOfKey } from "./tables.ts";

export interface Location {
  readonly worker: string;
  readonly epoch: number;
  readonly shard: number;
}

export interface Locations {
  /** Where the actor is, as far as is known; undefined when nobody owns its shard or nothing is known yet. No I/O. */
  locate(actor: ActorAddress): Location | undefined;
  entry(shard: number): PlacementEntry | undefined;
  /** The shards of a worker, in no order. */
  shards_of(worker: string): ReadonlySet<number>;
  /** How many shards each worker has. Workers without any are absent. */
  counts(): ReadonlyMap<string, number>;
  stop(): Promise<void>;
}

const RETRY_MS = 250;
const NONE: ReadonlySet<number> = new Set();

/** Begins to watch; answers at once and knows what there is as soon as the bus has told it. */
export function createLocations({ bus, world, log }: { bus: Bus; world: World; log: Log }): Locations {
  const table = new Map<number, { entry: PlacementEntry | undefined; revision: number }>();
  const byWorker = new Map<string, Set<number>>();
  const counted = new Map<string, number>();
  let watch: Subscription | undefined;
  let stopped = false;

  /** O1, O2 */
  function place(shard: number, entry: PlacementEntry | undefined, revision: number): void {
    const before = table.get(shard);
    if (before !== undefined && (entry === undefined ? revision < before.revision : revision <= before.revision)) return;
    table.set(shard, { entry, revision });
    const [from, to] = [before?.entry?.worker ?? "", entry?.worker ?? ""];
    if (from === to) return;
    if (from !== "") {
      const shards = byWorker.get(from);
      shards?.delete(shard);
      if (shards?.size === 0) byWorker.delete(from);
    }
    if (to !== "") byWorker.set(to, (byWorker.get(to) ?? new Set()).add(shard));
    for (const worker of [from, to]) {
      const count = byWorker.get(worker)?.size ?? 0;
      if (count > 0) counted.set(worker, count);
      else counted.delete(worker);
    }
  }

  function hear(change: BucketChange): void {
    const shard = shardOfKey(change.kind === "put" ? change.entry.key : change.key, bus.shards);
    if (shard === undefined) return;
    if (change.kind === "gone") {
      place(shard, undefined, change.revision);
      return;
    }
    const entry = decodePlacementEntry(change.entry.value);
    if (entry === undefined) log.error("a placement entry cannot be read; the shard counts as nobody's", { key: change.entry.key });
    place(shard, entry, change.entry.revision);
  }

  function begin(): void {
    bus
      .bucket("PLACEMENT")
      .watch(hear)
      .then(async (begun) => {
        if (stopped) await begun.stop();
        else watch = begun;
      })
      .catch((error: unknown) => {
        log.warn("the placement table cannot be watched yet", errorFields(error));
        if (!stopped) void world.after(RETRY_MS, begin);
      });
  }
  begin();

  return {
    locate(actor) {
      const shard = shardOf(actor, bus.shards);
      const entry = table.get(shard)?.entry;
      return entry === undefined || entry.worker === "" ? undefined : { worker: entry.worker, epoch: entry.epoch, shard };
    },
    entry: (shard) => table.get(shard)?.entry,
    shards_of: (worker) => byWorker.get(worker) ?? NONE,
    counts: () => counted,
    async stop() {
      stopped = true;
      await watch?.stop();
    },
  };
}
