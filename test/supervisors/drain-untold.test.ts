// Goal: a drain whose news has not reached the leader does not play its shards back and forth with a leader that gives them again.
// Method: a cluster in virtual time; the drain begins while the worker's renewals do not arrive, and its deadline passes before they do.
import { expect, test } from "vitest";
import { bucketSubject } from "../../bus/streams.ts";
import { Cluster } from "./cluster.ts";

test("a drain past its deadline releases its shards only when its lease says that it drains, and each once", async () => {
  let lost = false;
  const cluster: Cluster = new Cluster({
    faults: {
      before({ kind, subject }) {
        if (kind !== "bucket_write") return undefined;
        // Table writes take a moment, so that playing back and forth has an end here.
        return { kind: "delay", ms: lost && subject === bucketSubject("WORKERS", "w1") ? 1_500 : 3 };
      },
    },
  });
  cluster.supervisor("s1");
  const worker = cluster.worker("w1");
  await cluster.until("placed", () => cluster.placed());
  await cluster.world.advance(3_000);
  const before = (await cluster.table()).get(0)?.epoch ?? 0;
  lost = true;
  await cluster.world.advance(1_100); // a renewal that says nothing of a drain is under way
  let done = false;
  void worker.member.drain({ deadline_ms: 300 }).then(() => (done = true));
  await cluster.world.advance(1_000);
  lost = false;
  await cluster.until("it has drained", () => done, 5_000);
  expect([...(await cluster.table()).values()].map(({ worker: owner, epoch }) => [owner, epoch])).toEqual(Array.from({ length: 8 }, () => ["", before]));
  expect((await cluster.events("w1")).filter((type) => type === "shard.assigned")).toHaveLength(8);
});
