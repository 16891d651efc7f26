// Goal: a standby leads within half a second of the leader's death, one of several, and the one it replaced is fenced; and nobody takes over from a
// leader that lives, whatever happens to the broker.
// Method: whole supervisors and workers in virtual time; the broker's notices are told by hand.
import { expect, test } from "vitest";
import { Cluster, type TestSupervisor } from "./cluster.ts";

async function running(standbys: readonly string[]) {
  const cluster = new Cluster();
  const first = cluster.supervisor("s1", { connections: cluster.connections });
  cluster.worker("w1");
  cluster.worker("w2");
  await cluster.until("all shards are placed evenly", () => cluster.balanced());
  const others = standbys.map((id) => cluster.supervisor(id, { connections: cluster.connections }));
  await cluster.world.advance(6_000);
  for (const id of ["s1", ...standbys]) cluster.tellSupervisor(id, "connected", `${id}-1`);
  for (const id of ["w1", "w2"]) for (const which of ["main", "life"] as const) cluster.tellConnected(id, which, `${id}-${which}-1`);
  await cluster.world.advance(1_000);
  return { cluster, first, others };
}
const leading = (supervisors: readonly TestSupervisor[]): string[] => supervisors.flatMap(({ id, leader }) => (leader.role === "leading" ? [id] : []));

test("a killed leader is followed at once, under a higher epoch, and a worker that died with it is judged by its heir", async () => {
  const { cluster, first, others } = await running(["s2"]);
  const before = first.leader.epoch!;
  first.kill();
  cluster.workers.get("w1")!.kill();
  cluster.tellSupervisor("s1", "closed", "s1-1");
  for (const which of ["main", "life"] as const) cluster.tellClosed("w1", which, `w1-${which}-1`);
  await cluster.world.advance(500);
  expect(leading(others)).toEqual(["s2"]);
  expect(others[0]!.leader.epoch).toBeGreaterThan(before);
  expect(cluster.counts()).toEqual({ w2: 8 });
});

test("of three that stand by one leads, and the others go on standing by", async () => {
  const { cluster, first, others } = await running(["s2", "s3", "s4"]);
  first.kill();
  cluster.tellSupervisor("s1", "closed", "s1-1");
  await cluster.world.advance(500);
  expect(leading(others)).toHaveLength(1);
  const heir = leading(others);
  await cluster.world.advance(20_000);
  expect(leading(others)).toEqual(heir);
  expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
});

test("a leader whose process was started again under its name leads again at once: nobody answers for its earlier life", async () => {
  const { cluster, first } = await running([]);
  const before = first.leader.epoch!;
  first.kill();
  const again = cluster.supervisor("s1", { connections: cluster.connections });
  await cluster.world.advance(500);
  expect(again.leader.role).toBe("leading");
  expect(again.leader.epoch).toBeGreaterThan(before);
});

test("a second process of the leader's name stands by while the first one answers", async () => {
  const { cluster, first } = await running([]);
  const twin = cluster.supervisor("s1", { connections: cluster.connections });
  await cluster.world.advance(20_000);
  expect([first.leader.role, twin.leader.role]).toEqual(["leading", "standby"]);
});

test.each([
  ["the broker ends them as it shuts down", "Server Shutdown"],
  ["the broker loses patience with them", "Stale Connection"],
])("nobody takes over when the leader's connections end because %s", async (_, reason) => {
  const { cluster, first, others } = await running(["s2"]);
  cluster.tellSupervisor("s1", "closed", "s1-1", reason);
  await cluster.world.advance(20_000);
  expect(first.leader.role).toBe("leading");
  expect(leading(others)).toEqual([]);
});

test("nobody takes over within a lease of an outage of our own, though the leader's connections are told as closed", async () => {
  const { cluster, first, others } = await running(["s2"]);
  // Silent, and not dead: it goes on renewing, and answers nobody for a moment.
  cluster.connections.tell({ kind: "reset" });
  cluster.broker.cut(first.connection);
  cluster.tellSupervisor("s1", "closed", "s1-1");
  await cluster.world.advance(1_500);
  cluster.broker.mend(first.connection);
  await cluster.world.advance(2_500);
  expect(first.leader.role).toBe("leading");
  expect(leading(others)).toEqual([]);
});

test("nobody takes over from a leader that answers: its notices were late, or another's", async () => {
  const { cluster, first, others } = await running(["s2"]);
  cluster.tellSupervisor("s1", "closed", "s1-1");
  await cluster.world.advance(20_000);
  expect(first.leader.role).toBe("leading");
  expect(leading(others)).toEqual([]);
});

test("a leader that was cut off and replaced decides nothing more once it is back", async () => {
  const { cluster, first, others } = await running(["s2"]);
  cluster.broker.cut(first.connection);
  cluster.tellSupervisor("s1", "closed", "s1-1");
  await cluster.world.advance(500);
  expect(leading(others)).toEqual(["s2"]);
  cluster.broker.mend(first.connection);
  cluster.tellSupervisor("s1", "connected", "s1-2");
  // What it would decide wrongly: it never hears of the new worker's shards.
  cluster.worker("w3");
  await cluster.until("balanced over three", () => cluster.balanced() && cluster.workers.size === 3);
  await cluster.world.advance(10_000);
  expect([first.leader.role, ...leading(others)]).toEqual(["standby", "s2"]);
  for (const worker of ["w1", "w2", "w3"]) {
    const epochs = (await cluster.journal(worker)).map(({ epoch }) => epoch);
    expect(epochs, `epochs in the journal of ${worker} only rise`).toEqual(epochs.toSorted((a, b) => a - b));
  }
});

test("the leader tells how many workers are in which state, and one that leads no more tells of none", async () => {
  const cluster = new Cluster();
  const told = new Map<string, Record<string, number>>();
  const supervisor = (id: string): TestSupervisor =>
    cluster.supervisor(id, { connections: cluster.connections, observer: { workers: (counts) => void told.set(id, Object.fromEntries(counts)) } });
  const first = supervisor("s1");
  cluster.worker("w1");
  cluster.worker("w2");
  await cluster.until("all shards are placed evenly", () => cluster.balanced());
  supervisor("s2");
  await cluster.world.advance(6_000);
  expect(Object.fromEntries(told)).toEqual({ s1: { ready: 2 } });
  cluster.broker.cut(first.connection);
  cluster.tellSupervisor("s1", "closed", "s1-1");
  cluster.workers.get("w1")!.kill();
  for (const which of ["main", "life"] as const) cluster.tellClosed("w1", which, `w1-${which}-1`);
  await cluster.world.advance(10_000);
  expect(Object.fromEntries(told)).toEqual({ s1: {}, s2: { ready: 1 } });
});
