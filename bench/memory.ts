// memory: (c) what a resident idle session costs a worker, at 10,000 of them, and what a hibernated one does once it has left memory. Counted is
// what is still held after a collection; what the system counts for the process holds garbage and free pages too, and is told beside it.
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { quantiles, startCluster } from "./cluster.ts";

const SESSIONS = Number(process.env["BENCH_SESSIONS"] ?? 10_000);
const PASSIVATE_AFTER_MS = 60_000;

export interface MemoryRow {
  readonly sessions: number;
  /** Held by a session that is in memory and idle. */
  readonly live_bytes_per_session: number;
  /** Of the process, as the system counts, at the same moment. */
  readonly process_bytes_per_session: number;
  /** Still held for a session that has left memory. */
  readonly gone_bytes_per_session: number;
  readonly wake_p50_ms: number;
  readonly wake_p99_ms: number;
}

const PROBE = fileURLToPath(new URL("memory-probe.ts", import.meta.url));

const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));

export async function benchMemory(): Promise<MemoryRow> {
  const folder = mkdtempSync(join(tmpdir(), "troupe-memory-"));
  const file = join(folder, "memory.json");
  const cluster = await startCluster({
    workers: 1,
    agent: { model: "simulated/script" },
    env: { TROUPE_PASSIVATE_AFTER_MS: String(PASSIVATE_AFTER_MS), NODE_OPTIONS: `--expose-gc --import ${PROBE}`, MEMORY_PROBE_FILE: file },
  });
  try {
    const { client } = cluster;
    const settled = (): Promise<Memory> => probe(cluster.processes.get("worker-w1")?.pid, file);
    const session = (n: number) => ({ tenant: "bench", kind: "session", id: `m${n}` }) as const;
    const many = async (count: number, from: number, work: (n: number) => Promise<unknown>): Promise<void> => {
      for (let at = from; at < from + count; at += 100) await Promise.all(Array.from({ length: Math.min(100, from + count - at) }, (_, n) => work(at + n)));
    };
    const create = (n: number) => client.command(session(n), { type: "session.create", body: { agent: "a" } });
    // The first hundreds warm up code and pools; they are not what a session costs.
    await many(500, SESSIONS, create);
    await wait(2000);
    const before = await settled();
    const began_ms = performance.now();
    await many(SESSIONS, 0, create);
    const resident = await settled();
    if (performance.now() - began_ms > PASSIVATE_AFTER_MS) throw new Error("creating took longer than sessions stay: the figure would count those that left");
    await many(SESSIONS, 0, (n) => client.command(session(n), { type: "session.hibernate", body: {} }));
    await wait(PASSIVATE_AFTER_MS + 15_000);
    const gone = await settled();
    const wakes: number[] = [];
    for (let n = 0; n < 200; n++) {
      const sent_ms = performance.now();
      await client.command(session(n * 7), { type: "session.resume", body: {} });
      wakes.push(performance.now() - sent_ms);
    }
    const { p50_ms, p99_ms } = quantiles(wakes);
    return {
      sessions: SESSIONS,
      live_bytes_per_session: (resident.live_bytes - before.live_bytes) / SESSIONS,
      process_bytes_per_session: (resident.resident_bytes - before.resident_bytes) / SESSIONS,
      gone_bytes_per_session: (gone.live_bytes - before.live_bytes) / SESSIONS,
      wake_p50_ms: p50_ms,
      wake_p99_ms: p99_ms,
    };
  } finally {
    await cluster.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}

interface Memory {
  readonly live_bytes: number;
  readonly resident_bytes: number;
}

/** The least of some readings: work that is still under way holds more than it will. Only workers have the probe; it is loaded into supervisors too. */
async function probe(pid: number | undefined, file: string): Promise<Memory> {
  if (pid === undefined) throw new Error("there is no worker to be asked");
  const readings: Memory[] = [];
  for (let n = 0; n < 5; n++) {
    rmSync(file, { force: true });
    await wait(1000);
    process.kill(pid, "SIGUSR2");
    while (!existsSync(file)) await wait(20);
    readings.push(JSON.parse(readFileSync(file, "utf8")) as Memory);
  }
  return readings.reduce((least, one) => (one.live_bytes < least.live_bytes ? one : least));
}

if (import.meta.main) console.table([await benchMemory()]);
