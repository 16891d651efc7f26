// Goal: whoever asks where an actor is hears what the table said last, without a look at the bus.
// Method: random interleavings of table writes against a plain model; and the time of ten thousand questions.
import fc from "fast-check";
import { expect, test } from "vitest";
import { createMemoryBroker } from "../../bus/memory.ts";
import type { BucketChange, Bus } from "../../bus/port.ts";
import { silentLog } from "../../protocol/log.ts";
import { shardOf } from "../../protocol/subjects.ts";
import { createLocations } from "../../supervisors/locations.ts";
import { encodeRecord, placementKey } from "../../supervisors/tables.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const SHARDS = 6;

test("O1: after any interleaving each shard is in the list of exactly the worker that its entry names, and the counts are theirs", async () => {
  let writes = 0;
  await fc.assert(
    fc.asyncProperty(
      fc.array(fc.record({ shard: fc.integer({ min: 0, max: SHARDS - 1 }), worker: fc.constantFrom("w1", "w2", "w3", "", "deleted"), heard: fc.boolean() }), {
        maxLength: 30,
      }),
      async (steps) => {
        const world = new VirtualWorld(1);
        const broker = createMemoryBroker({ world, shards: SHARDS });
        const bucket = broker.connect("leader").bucket("PLACEMENT");
        const locations = createLocations({ bus: broker.connect("gateway"), world, log: silentLog });
        const model = new Map<number, string>();
        for (const { shard, worker, heard } of steps) {
          const key = placementKey(shard);
          const standing = await bucket.get(key);
          if (worker === "deleted") {
            if (standing !== undefined) await bucket.delete(key, standing.revision);
            model.delete(shard);
          } else {
            const value = encodeRecord({ worker, incarnation: worker, epoch: 1, since: "" });
            const written = standing === undefined ? await bucket.create(key, value) : await bucket.update(key, value, standing.revision);
            expect(written.kind).toBe("ok");
            model.set(shard, worker);
          }
          writes += 1;
          if (heard) await world.settle();
        }
        await world.settle();
        for (const worker of ["w1", "w2", "w3"]) {
          const expected = [...model].flatMap(([shard, owner]) => (owner === worker ? [shard] : [])).sort();
          expect([...locations.shards_of(worker)].sort()).toEqual(expected);
          expect(locations.counts().get(worker) ?? 0).toBe(expected.length);
        }
        for (let n = 0; n < 20; n++) {
          const actor = { tenant: "acme", kind: "session", id: `s${n}` } as const;
          const owner = model.get(shardOf(actor, SHARDS)) ?? "";
          expect(locations.locate(actor)?.worker ?? "").toBe(owner);
        }
        await locations.stop();
      },
    ),
    { numRuns: 60 },
  );
  expect(writes).toBeGreaterThan(200);
});

test("an entry that cannot be read counts as nobody's, and a key that names no shard is passed over", async () => {
  const world = new VirtualWorld(1);
  const broker = createMemoryBroker({ world, shards: SHARDS });
  const bucket = broker.connect("leader").bucket("PLACEMENT");
  await bucket.create("0", encodeRecord({ worker: "w1", incarnation: "i", epoch: 1, since: "" }));
  await bucket.create("99", encodeRecord({ worker: "w1", incarnation: "i", epoch: 1, since: "" }));
  const locations = createLocations({ bus: broker.connect("gateway"), world, log: silentLog });
  await world.settle();
  expect(locations.counts()).toEqual(new Map([["w1", 1]]));
  await bucket.update("0", new TextEncoder().encode("{"), (await bucket.get("0"))!.revision);
  await world.settle();
  expect(locations.counts()).toEqual(new Map());
});

test("ten thousand questions are answered at once, on a loaded machine too", async () => {
  const world = new VirtualWorld(1);
  const broker = createMemoryBroker({ world, shards: SHARDS });
  const bucket = broker.connect("leader").bucket("PLACEMENT");
  for (let shard = 0; shard < SHARDS; shard++) await bucket.create(placementKey(shard), encodeRecord({ worker: "w1", incarnation: "i", epoch: 3, since: "" }));
  const locations = createLocations({ bus: broker.connect("gateway"), world, log: silentLog });
  await world.settle();
  const began_ms = performance.now();
  for (let n = 0; n < 10_000; n++) expect(locations.locate({ tenant: "acme", kind: "session", id: `s${n}` })?.epoch === 3).toBe(true);
  expect(performance.now() - began_ms).toBeLessThan(10_000);
});

test("O1: of two entries of a shard the newer counts, in whatever order they are heard", async () => {
  const listeners: ((change: BucketChange) => void)[] = [];
  const bucket = { watch: async (listener: (change: BucketChange) => void) => (listeners.push(listener), { stop: async () => undefined }) };
  const world = new VirtualWorld(1);
  const locations = createLocations({ bus: { shards: 4, bucket: () => bucket } as unknown as Bus, world, log: silentLog });
  await world.advance(1);
  const entry = (worker: string, epoch: number) => encodeRecord({ worker, incarnation: `${worker}-1`, epoch, since: "2026-01-01T00:00:00.000Z" });
  const hear = (change: BucketChange): void => listeners[0]!(change);
  hear({ kind: "put", entry: { key: "2", value: entry("w2", 4), revision: 9 } });
  hear({ kind: "put", entry: { key: "2", value: entry("w1", 3), revision: 7 } });
  hear({ kind: "gone", key: "2", revision: 8 });
  expect(locations.entry(2)).toMatchObject({ worker: "w2", epoch: 4 });
  expect([...locations.counts()]).toEqual([["w2", 1]]);
  await locations.stop();
});
