// Goal: what a leader knows of the placement table is what stands there, or is known not to be known.
// Method: the table alone, on the in-memory bus in virtual time, whose answers get lost when a test says so.
import { expect, test } from "vitest";
import { createMemoryBroker } from "../../bus/memory.ts";
import { silentLog } from "../../protocol/log.ts";
import { Calm } from "../../supervisors/calm.ts";
import { PlacementTable } from "../../supervisors/placement-table.ts";
import { decodePlacementEntry, encodeRecord, type PlacementEntry, placementKey } from "../../supervisors/tables.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const entryOf = (worker: string, epoch: number): PlacementEntry => ({ worker, incarnation: `${worker}-1`, epoch, since: "2026-01-01T00:00:00.000Z" });

function tableOnBus() {
  const world = new VirtualWorld(1);
  const trouble = { answers: false, reads: false };
  const broker = createMemoryBroker({
    world,
    shards: 4,
    faults: {
      before: ({ kind, connection }) => (trouble.reads && connection === "leader" && kind === "bucket_read" ? { kind: "unavailable" } : undefined),
      after: ({ kind, connection }) => (trouble.answers && connection === "leader" && kind === "bucket_write" ? { kind: "lose_answer" } : undefined),
    },
  });
  const bus = broker.connect("leader");
  const calm = new Calm({ bus, world, log: silentLog, ttl_ms: 5_000 });
  let changes = 0;
  const table = new PlacementTable({
    bus,
    world,
    log: silentLog,
    calm,
    term: { over: false, may_act: () => true },
    said_epoch: () => 0,
    on_change: () => changes++,
  });
  /** Until a call of the table is over. */
  const done = async <T>(call: Promise<T>): Promise<T> => {
    let over = false;
    void call.finally(() => (over = true));
    expect(await world.until(() => over, 20_000)).toBe(true);
    return call;
  };
  const bucket = broker.connect("owner").bucket("PLACEMENT");
  return { world, trouble, calm, table, done, bucket, changes: () => changes };
}

test("a write that nobody answered leaves its shard in doubt, for as long as the bucket cannot be read; then what stands there counts", async () => {
  const { world, trouble, calm, table, done, bucket } = tableOnBus();
  await world.advance(6_000);
  expect(calm.may_judge()).toBe(true);
  trouble.answers = true;
  expect(await done(table.write(2, entryOf("w1", 1), undefined))).toBe(false);
  expect(calm.may_judge()).toBe(false); // a call that failed is an outage: nobody is judged for it
  expect([table.is_doubtful(2), table.entry(2)]).toEqual([true, undefined]);
  expect(decodePlacementEntry((await done(bucket.get(placementKey(2))))!.value)).toEqual(entryOf("w1", 1)); // it was stored after all
  trouble.answers = false;
  trouble.reads = true;
  await done(table.read_doubtful());
  expect([table.is_doubtful(2), table.entry(2)]).toEqual([true, undefined]);
  trouble.reads = false;
  await done(table.read_doubtful());
  expect([table.is_doubtful(2), table.entry(2)]).toEqual([false, entryOf("w1", 1)]);
  expect(await done(table.write(2, entryOf("w2", 2), table.placed(2)))).toBe(true);
});

test("one in doubt does not put the others in doubt, and a write that never arrived is no longer in doubt once that was read", async () => {
  const { trouble, table, done, bucket } = tableOnBus();
  expect(await done(table.write(1, entryOf("w1", 1), undefined))).toBe(true);
  const placed = table.placed(1);
  trouble.answers = true;
  void table.write(2, entryOf("w1", 1), undefined);
  await done(table.write(1, entryOf("w2", 2), placed));
  // Somebody else takes the second one back before the leader looks.
  await done(bucket.delete(placementKey(2), (await done(bucket.get(placementKey(2))))!.revision));
  expect([1, 2, 3].map((shard) => table.is_doubtful(shard))).toEqual([true, true, false]);
  trouble.answers = false;
  await done(table.read_doubtful());
  expect([1, 2].map((shard) => [table.is_doubtful(shard), table.entry(shard)])).toEqual([
    [false, entryOf("w2", 2)],
    [false, undefined],
  ]);
});

test("D2: a write over what is not there any more is refused, and what stands there is known from then on", async () => {
  const { table, done, bucket, changes } = tableOnBus();
  await done(table.write(0, entryOf("w1", 1), undefined));
  const placed = table.placed(0)!;
  await done(bucket.update(placementKey(0), encodeRecord(entryOf("w2", 2)), placed.revision));
  const before = changes();
  expect(await done(table.write(0, entryOf("w3", 2), placed))).toBe(false);
  expect([table.entry(0), table.is_doubtful(0), changes()]).toEqual([entryOf("w2", 2), false, before + 1]);
});
