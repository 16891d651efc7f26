// Goal: whatever mixture of deaths, pauses, cuts, drains, broker outages and slow or lost answers, no two workers may act on one
// shard at once, epochs only rise, and when it is over every shard is placed and even.
// Method: drawn from a seed, which is printed when it fails; looked at after every drawn step and every 100 ms between them.
import { expect, test } from "vitest";
import { Cluster, type TestSupervisor, type TestWorker } from "./cluster.ts";

const SEEDS = 60;

function check(known: Iterable<TestWorker>, context: string): void {
  const owners = new Map<number, string>();
  for (const worker of known) {
    if (!worker.member.may_act() || worker.sleeper.asleep) continue;
    for (const { shard, phase } of worker.host.shards.values()) {
      if (phase === "taking") continue;
      const other = owners.get(shard);
      expect(other === undefined ? "" : `shard ${shard} is acted on by ${other} and ${worker.id} ${context}`).toBe("");
      owners.set(shard, worker.id);
    }
  }
}

test(`over ${SEEDS} drawn runs no two workers act on one shard, and each run ends placed and even`, { timeout: 180_000 }, async () => {
  const seen = new Map<string, number>();
  for (let seed = 1; seed <= SEEDS; seed++) {
    let trouble = true;
    const cluster: Cluster = new Cluster({
      seed,
      shards: 6,
      faults: {
        before: ({ connection }) =>
          trouble && connection !== "observer" && cluster.world.random() < 0.02 ? { kind: "delay", ms: cluster.world.random() * 400 } : undefined,
        after: ({ kind, connection }) =>
          trouble && connection !== "observer" && kind.startsWith("bucket") && cluster.world.random() < 0.02 ? { kind: "lose_answer" } : undefined,
      },
    });
    const { world } = cluster;
    const supervisors: TestSupervisor[] = ["s1", "s2"].map((id) => cluster.supervisor(id));
    const everybody = new Set<TestWorker>();
    let born = 0;
    const join = (): void => void everybody.add(cluster.worker(`w${born++}`));
    for (let n = 0; n < 3; n++) join();
    const epochs = new Map<number, number>();
    const steps: string[] = [];
    let down = false;
    const any = <T>(list: readonly T[]): T | undefined => list[Math.floor(world.random() * list.length)];
    const later = (what: () => void): void => void world.after(world.random() * 9_000, what);
    for (let step = 0; step < 12; step++) {
      const living = [...cluster.workers.values()];
      const worker = any(living);
      const deed = any(["join", "kill", "pause", "cut", "restart", "drain", "lead", "calm"])!;
      steps.push(`${deed} ${worker?.id ?? ""}`);
      seen.set(deed, (seen.get(deed) ?? 0) + 1);
      if (deed === "join" && living.length < 6) join();
      else if (deed === "kill" && worker !== undefined && living.length > 1) worker.kill();
      else if (deed === "pause" && worker !== undefined) {
        worker.sleeper.asleep = true;
        later(() => worker.sleeper.wake());
      } else if (deed === "cut" && worker !== undefined) {
        cluster.broker.cut(worker.connection);
        later(() => cluster.broker.mend(worker.connection));
      } else if (deed === "restart" && !down) {
        down = true;
        void cluster.broker.restart(world.random() * 9_000).then(() => (down = false));
      } else if (deed === "drain" && worker !== undefined && living.length > 1) {
        cluster.workers.delete(worker.id);
        void worker.member.drain({ deadline_ms: 3_000 }).then(() => worker.member.stop());
      } else if (deed === "lead") {
        const supervisor = any(supervisors)!;
        supervisor.sleeper.asleep = true;
        later(() => supervisor.sleeper.wake());
      }
      const until_ms = world.monotonic_ms() + world.random() * 6_000;
      while (world.monotonic_ms() < until_ms) {
        await world.advance(100);
        check(everybody, `(seed ${seed}, ${steps.join(", ")})`);
      }
      if (down) continue;
      for (const [shard, { epoch }] of await cluster.table()) {
        expect(epoch, `seed ${seed}`).toBeGreaterThanOrEqual(epochs.get(shard) ?? 0);
        epochs.set(shard, epoch);
      }
    }
    await world.advance(10_000);
    trouble = false;
    // Long enough for moves whose owner was away, and for who died thrice to be trusted again.
    expect(await world.until(() => cluster.balanced(), 400_000), `seed ${seed}: ${steps.join(", ")}: ${JSON.stringify(cluster.counts())}`).toBe(true);
    for (const id of new Set([...everybody].map((worker) => worker.id))) {
      const led = (await cluster.journal(id)).map((message) => message.epoch);
      expect(led, `seed ${seed}`).toEqual(led.toSorted((a, b) => a - b));
    }
  }
  expect(Math.min(...seen.values())).toBeGreaterThan(20);
});
