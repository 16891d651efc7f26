// memory: (c) what a resident idle session costs a worker, at 10,000 of them, and what a hibernated one does once it has left memory.
import { quantiles, startCluster } from "./cluster.ts";

const SESSIONS = Number(process.env["BENCH_SESSIONS"] ?? 10_000);
const PASSIVATE_AFTER_MS = 60_000;

export interface MemoryRow {
  readonly sessions: number;
  readonly resident_bytes_per_session: number;
  readonly gone_bytes_per_session: number;
  readonly wake_p50_ms: number;
  readonly wake_p99_ms: number;
}

const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));

export async function benchMemory(): Promise<MemoryRow> {
  const cluster = await startCluster({
    workers: 1,
    agent: { model: "simulated/script" },
    env: { TROUPE_PASSIVATE_AFTER_MS: String(PASSIVATE_AFTER_MS), NODE_OPTIONS: "--expose-gc" },
  });
  try {
    const { client } = cluster;
    const session = (n: number) => ({ tenant: "bench", kind: "session", id: `m${n}` }) as const;
    const many = async (count: number, from: number, work: (n: number) => Promise<unknown>): Promise<void> => {
      for (let at = from; at < from + count; at += 100) await Promise.all(Array.from({ length: Math.min(100, from + count - at) }, (_, n) => work(at + n)));
    };
    const create = (n: number) => client.command(session(n), { type: "session.create", body: { agent: "a" } });
    // The first hundreds warm up code and pools; they are not what a session costs.
    await many(500, SESSIONS, create);
    await wait(2000);
    const before = await settledRss(cluster, "worker-w1");
    const began_ms = performance.now();
    await many(SESSIONS, 0, create);
    const resident = await settledRss(cluster, "worker-w1");
    if (performance.now() - began_ms > PASSIVATE_AFTER_MS) throw new Error("creating took longer than sessions stay: the figure would count those that left");
    await many(SESSIONS, 0, (n) => client.command(session(n), { type: "session.hibernate", body: {} }));
    await wait(PASSIVATE_AFTER_MS + 15_000);
    const gone = await settledRss(cluster, "worker-w1");
    const wakes: number[] = [];
    for (let n = 0; n < 200; n++) {
      const sent_ms = performance.now();
      await client.command(session(n * 7), { type: "session.resume", body: {} });
      wakes.push(performance.now() - sent_ms);
    }
    const { p50_ms, p99_ms } = quantiles(wakes);
    return {
      sessions: SESSIONS,
      resident_bytes_per_session: (resident - before) / SESSIONS,
      gone_bytes_per_session: (gone - before) / SESSIONS,
      wake_p50_ms: p50_ms,
      wake_p99_ms: p99_ms,
    };
  } finally {
    await cluster.stop();
  }
}

/** The least of some readings: a collection happens when it happens. */
async function settledRss(cluster: { rss_bytes(name: string): number }, name: string): Promise<number> {
  const readings: number[] = [];
  for (let n = 0; n < 10; n++) {
    await wait(500);
    readings.push(cluster.rss_bytes(name));
  }
  return Math.min(...readings);
}

if (import.meta.main) console.table([await benchMemory()]);
