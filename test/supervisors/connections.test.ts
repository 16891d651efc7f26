// Goal: a killed worker is seen by its two closed connections at once, and nobody is judged by anything less: one connection, what the broker
// closed itself, a notice of a connection that was replaced, an outage of our own, or a worker that still answers.
// Method: whole supervisors and workers in virtual time; the broker's notices are told by hand, in every order.
import { describe, expect, test } from "vitest";
import { createCallPool } from "../../actors/call-pool.ts";
import { createDispatch } from "../../actors/dispatch.ts";
import { createMemoryConnectionWatch, lifelineName } from "../../bus/connection-watch.ts";
import { silentLog } from "../../protocol/log.ts";
import { connectionOf, Connections, GRACE_MS, SETTLE_MS } from "../../supervisors/connections.ts";
import { startHostService } from "../../supervisors/host-service.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { Cluster } from "./cluster.ts";

async function running(workers: readonly string[], options: { told?: boolean } = {}) {
  const cluster = new Cluster();
  const supervisor = cluster.supervisor("s1", { connections: cluster.connections });
  const made = workers.map((id) => cluster.worker(id));
  await cluster.until("all shards are placed evenly", () => cluster.balanced());
  await cluster.world.advance(6_000);
  if (options.told !== false) for (const id of workers) for (const which of ["main", "life"] as const) cluster.tellConnected(id, which, `${id}-${which}-1`);
  return { cluster, supervisor, workers: made, first: made[0]! };
}
const owned = (cluster: Cluster, id: string): number => cluster.workers.get(id)?.host.shards.size ?? 0;
const deaths = async (cluster: Cluster, id: string) => (await cluster.events(id)).filter((event) => event.endsWith("→dead")).length;

describe("a killed worker", () => {
  test.each([["main", "life"] as const, ["life", "main"] as const])(
    "with its connections closed, %s first, has no shard 100 ms later; its journal says why, and its lease is gone",
    async (a, b) => {
      const { cluster, first } = await running(["w1", "w2"]);
      first.kill();
      cluster.tellClosed("w1", a, `w1-${a}-1`);
      await cluster.world.advance(3);
      cluster.tellClosed("w1", b, `w1-${b}-1`);
      await cluster.world.advance(100);
      expect(owned(cluster, "w2")).toBe(8);
      const judged = (await cluster.journal("w1")).flatMap(({ events }) => events).find((event) => event["to"] === "dead");
      expect(judged?.["evidence"]).toMatchObject({ kind: "connections_closed", main: { reason: "Client Closed" }, life: { reason: "Client Closed" } });
      const evidence = judged?.["evidence"] as { silent_ms: number } | undefined;
      expect(evidence?.silent_ms ?? Number.POSITIVE_INFINITY).toBeLessThan(100);
      expect((await cluster.events("w1")).filter((event) => event.endsWith("→suspected"))).toEqual([]);
      expect(await cluster.observer.bucket("WORKERS").get("w1")).toBeUndefined();
    },
  );

  test("whose connections stood before the supervisor began to listen is seen as well", async () => {
    const { cluster, first } = await running(["w1", "w2"], { told: false });
    first.kill();
    cluster.tellClosed("w1", "main", "1");
    cluster.tellClosed("w1", "life", "2");
    await cluster.world.advance(100);
    expect(owned(cluster, "w2")).toBe(8);
  });

  test("that died before the leader did is declared dead by the next leader, from what it had heard while standing by", async () => {
    const { cluster, supervisor, first } = await running(["w1", "w2"]);
    cluster.supervisor("s2", { connections: cluster.connections });
    await cluster.world.advance(6_000);
    supervisor.kill();
    first.kill();
    cluster.tellClosed("w1", "main", "w1-main-1");
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.until("the rest goes on", () => owned(cluster, "w2") === 8, 7_000);
  });

  test("comes back as another incarnation and is given shards again", async () => {
    const { cluster, first } = await running(["w1", "w2"]);
    first.kill();
    cluster.tellClosed("w1", "main", "w1-main-1");
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.world.advance(300);
    for (const which of ["main", "life"] as const) cluster.tellConnected("w1", which, `w1-${which}-2`);
    cluster.worker("w1");
    await cluster.until("balanced again, long before the old lease would have ended", () => cluster.balanced(), 2_000);
    expect(await deaths(cluster, "w1")).toBe(1);
  });
});

describe("nobody is judged", () => {
  test("for one closed connection that is back within the grace: it is suspected, cleared, and keeps its shards", async () => {
    const { cluster } = await running(["w1", "w2"]);
    cluster.tellClosed("w1", "main", "w1-main-1");
    await cluster.world.advance(GRACE_MS - 100);
    cluster.tellConnected("w1", "main", "w1-main-2");
    await cluster.world.advance(3_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect((await cluster.events("w1")).slice(-2)).toEqual(["state ready→suspected", "state suspected→ready"]);
  });

  test("for its idle connection alone, however long that stays closed", async () => {
    const { cluster } = await running(["w1", "w2"]);
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.world.advance(20_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect((await cluster.events("w1")).at(-1)).toBe("state ready→suspected");
  });

  test("for connections that the broker let go of", async () => {
    const { cluster } = await running(["w1", "w2"]);
    for (const reason of ["Server Shutdown", "Slow Consumer (Write Deadline)", "Stale Connection"]) {
      cluster.tellClosed("w1", "main", "w1-main-1", reason);
      cluster.tellClosed("w1", "life", "w1-life-1", reason);
    }
    await cluster.world.advance(20_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect(await cluster.events("w1")).not.toContain("state ready→suspected");
  });

  test("within one lease of an outage of our own", async () => {
    const { cluster, first } = await running(["w1", "w2"]);
    cluster.connections.tell({ kind: "reset" });
    first.kill();
    cluster.tellClosed("w1", "main", "w1-main-1");
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.world.advance(4_000);
    expect(owned(cluster, "w2")).toBe(4);
    await cluster.until("in the end it is", () => owned(cluster, "w2") === 8, 4_000);
  });

  test("while it answers: its notices were late, or another's", async () => {
    const { cluster, first } = await running(["w1", "w2"]);
    const host = { prepare: async () => 0, load: async () => false, passivate: async () => false, resident: () => [], owned: () => first.host.owned() };
    const service = startHostService({
      bus: cluster.broker.connect("answers"),
      world: cluster.world,
      log: silentLog,
      worker: "w1",
      host,
      draining: () => false,
      pool: createCallPool({ world: cluster.world }),
      dispatch: createDispatch({ world: cluster.world }),
    });
    cluster.tellClosed("w1", "main", "w1-main-1");
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.world.advance(10_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect(await deaths(cluster, "w1")).toBe(0);
    await service.stop();
  });

  test.each([0, 1_000])("when it drained, left, and closed its connections, which is heard %i ms after its last shard went", async (ms) => {
    const { cluster, first } = await running(["w1", "w2"]);
    const drained = first.member.drain().then(() => first.member.stop());
    await cluster.until("w2 has all", () => owned(cluster, "w2") === 8);
    await cluster.world.advance(ms);
    cluster.tellClosed("w1", "main", "w1-main-1");
    cluster.tellClosed("w1", "life", "w1-life-1");
    await cluster.world.advance(1_000);
    await drained;
    await cluster.world.advance(10_000);
    expect((await cluster.events("w1")).at(-1)).toBe("state draining→left");
  });
});

test("a worker judged by mistake acts no more within a renewal, and joins anew", async () => {
  const { cluster, first } = await running(["w1", "w2"]);
  const before = first.member.incarnation;
  cluster.tellClosed("w1", "main", "w1-main-1");
  cluster.tellClosed("w1", "life", "w1-life-1");
  await cluster.world.advance(1_500);
  for (const which of ["main", "life"] as const) cluster.tellConnected("w1", which, `w1-${which}-2`);
  await cluster.until("balanced again", () => cluster.balanced(), 3_000);
  expect(first.member.incarnation).not.toBe(before);
});

test("the working connection closed for longer than the grace is the end, though the idle one stands", async () => {
  const { cluster, first } = await running(["w1", "w2"]);
  first.kill();
  cluster.tellClosed("w1", "main", "w1-main-1");
  await cluster.world.advance(GRACE_MS + 100);
  expect(owned(cluster, "w2")).toBe(8);
});

describe("what is known of connections", () => {
  const name = connectionOf("worker", "w1");
  test("the end of a connection that was replaced says nothing, whichever notice comes first", async () => {
    const world = new VirtualWorld(1);
    const connections = new Connections(world, "worker");
    connections.hear({ kind: "connected", name, client_id: "1" });
    connections.hear({ kind: "connected", name, client_id: "2" });
    expect(connections.hear({ kind: "disconnected", name, client_id: "1", reason: "Client Closed", by: "client" })).toBeUndefined();
    await world.advance(10 * GRACE_MS);
    expect(connections.of("w1")).toEqual({ kind: "standing" });
  });

  test("a suspicion waits for the other notice", async () => {
    const world = new VirtualWorld(1);
    const connections = new Connections(world, "worker");
    connections.hear({ kind: "disconnected", name, client_id: "1", reason: "Client Closed", by: "client" });
    expect(connections.of("w1").kind).toBe("standing");
    await world.advance(SETTLE_MS);
    expect(connections.of("w1")).toMatchObject({ kind: "suspect", which: "main" });
  });

  test("K3: what was heard before an outage of our own makes no verdict with what is heard after it", async () => {
    const world = new VirtualWorld(1);
    const connections = new Connections(world, "worker");
    connections.hear({ kind: "disconnected", name, client_id: "1", reason: "Client Closed", by: "client" });
    connections.hear({ kind: "reset" });
    expect(connections.of("w1")).toEqual({ kind: "standing" });
    connections.hear({ kind: "disconnected", name: lifelineName(name), client_id: "2", reason: "Client Closed", by: "client" });
    await world.advance(10 * GRACE_MS);
    expect(connections.of("w1")).toMatchObject({ kind: "suspect", which: "life" });
  });

  test("a worker whose id ends like a lifeline is not taken for one", () => {
    const connections = new Connections(new VirtualWorld(1), "worker");
    expect(connections.hear({ kind: "connected", name: connectionOf("worker", "w1-life"), client_id: "1" })).toBe("w1-life");
    expect(connections.hear({ kind: "connected", name: "worker-w1.life", client_id: "1" })).toBe("w1");
    expect(connections.hear({ kind: "connected", name: "gateway-g1", client_id: "1" })).toBeUndefined();
  });

  test("who stopped listening hears nothing", async () => {
    const watch = createMemoryConnectionWatch();
    const heard: string[] = [];
    const subscription = watch.on(({ kind }) => heard.push(kind));
    watch.tell({ kind: "reset" });
    await subscription.stop();
    watch.tell({ kind: "reset" });
    expect(heard).toEqual(["reset"]);
  });
});
