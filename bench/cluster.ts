// cluster: the processes that a benchmark measures: a broker of its own (fsync on), supervisors, workers and a gateway through main.ts.
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type CommandClient, createCommandClient } from "../actors/client.ts";
import { connectJetStream } from "../bus/jetstream.ts";
import type { Bus } from "../bus/port.ts";
import { ensureNatsServer } from "../deploy/local/nats-server.ts";
import { type LocalNats, startLocalNats } from "../deploy/local/nats.ts";
import { freePort } from "../deploy/local/server-process.ts";
import { createKey } from "../protocol/api-key.ts";
import { tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { silentLog } from "../protocol/log.ts";
import { realWorld } from "../roles/real-world.ts";
import { randomBytes } from "node:crypto";

const MAIN = fileURLToPath(new URL("../main.ts", import.meta.url));
const READY_PATIENCE_MS = 30_000;

export interface BenchCluster {
  readonly nats: LocalNats;
  readonly bus: Bus;
  readonly client: CommandClient;
  readonly gateway_url: string;
  readonly key: string;
  /** Role and id → process. */
  readonly processes: ReadonlyMap<string, ChildProcess>;
  /** User and system time of our own processes so far, in seconds. */
  cpu_s(): number;
  rss_bytes(name: string): number;
  stop(): Promise<void>;
}

export interface BenchOptions {
  readonly workers: number;
  readonly gateway?: boolean;
  readonly agent: JsonObject;
  readonly env?: Readonly<Record<string, string>>;
}

const world = realWorld();
const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));

export async function startCluster({ workers, gateway = false, agent, env = {} }: BenchOptions): Promise<BenchCluster> {
  const home = mkdtempSync(join(tmpdir(), "troupe-bench-"));
  const say = (): void => undefined;
  const program = await ensureNatsServer({ env: process.env, say });
  const nats = await startLocalNats({ home, binary: program.path, tenants: ["bench"], say });
  const processes = new Map<string, ChildProcess>();
  const bus = await connectJetStream({
    servers: nats.url,
    user: nats.operator.user,
    password: nats.operator.password,
    name: "bench",
    shards: 16,
    replicas: 1,
    log: silentLog,
    world,
  });
  const client = createCommandClient({ bus, world });
  const port = await freePort();
  const start = (role: string, id: string, ...args: string[]): void => {
    const child = spawn(process.execPath, [MAIN, role, "--id", id, ...args], {
      stdio: ["ignore", "ignore", process.env["BENCH_LOG"] ? "inherit" : "ignore"],
      env: {
        PATH: process.env["PATH"] ?? "",
        HOME: process.env["HOME"] ?? "",
        TROUPE_HOME: home,
        TROUPE_LOG_LEVEL: "warn",
        TROUPE_NATS_URL: nats.url,
        TROUPE_NATS_USER: nats.runtime.user,
        TROUPE_NATS_PASSWORD: nats.runtime.password,
        ...env,
      },
    });
    processes.set(`${role}-${id}`, child);
  };
  const stop = async (): Promise<void> => {
    for (const child of processes.values()) child.kill("SIGINT");
    await Promise.all(
      [...processes.values()].map((child) =>
        child.exitCode === null && child.signalCode === null ? new Promise((resolve) => child.once("exit", resolve)) : Promise.resolve(),
      ),
    );
    await client.stop();
    await bus.close();
    await nats.stop();
    rmSync(home, { recursive: true, force: true });
  };
  start("supervisor", "s1");
  for (let index = 1; index <= workers; index++) start("worker", `w${index}`);
  if (gateway) start("gateway", "g1", "--http-port", String(port));
  const key = createKey("bench", (count) => randomBytes(count));
  try {
    await until(async () => {
      const made = await client.command(tenantActor("bench"), { type: "tenant.create", body: {}, channel: "control" }, { patience_ms: 1000 });
      return made.kind === "decided" && made.reply.ok;
    });
    await client.command(tenantActor("bench"), { type: "agent.put", body: { agent: "a", config: agent }, channel: "control" });
    await client.command(tenantActor("bench"), { type: "key.create", body: { key_id: key.key_id, hash: key.hash }, channel: "control" });
    const gateway_url = `http://127.0.0.1:${port}`;
    if (gateway) await until(async () => (await fetch(`${gateway_url}/readyz`).catch(() => undefined))?.status === 200);
    await wait(1000); // placement settles
    return {
      nats,
      bus,
      client,
      gateway_url,
      key: key.key,
      processes,
      stop,
      cpu_s: () => [...processes.values()].reduce((sum, child) => sum + cpuOf(child.pid), 0),
      rss_bytes: (name) => rssOf(processes.get(name)?.pid),
    };
  } catch (error) {
    await stop();
    throw error;
  }
}

async function until(condition: () => Promise<boolean>): Promise<void> {
  const began_ms = performance.now();
  while (!(await condition())) {
    if (performance.now() - began_ms > READY_PATIENCE_MS) throw new Error("the cluster did not become ready");
    await wait(50);
  }
}

/** From /proc; 100 ticks a second on every Linux that we know. */
function cpuOf(pid: number | undefined): number {
  if (pid === undefined) return 0;
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ") ?? [];
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

function rssOf(pid: number | undefined): number {
  const found = /VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid ?? 0}/status`, "utf8"));
  return Number(found?.[1] ?? 0) * 1024;
}

export interface Latencies {
  readonly count: number;
  readonly per_s: number;
  readonly p50_ms: number;
  readonly p99_ms: number;
}

/** Runs `work` at a fixed concurrency for a time, after a warm-up that does not count. */
export async function measure(
  concurrency: number,
  duration_ms: number,
  work: (worker: number) => Promise<void>,
  warm_ms = duration_ms / 5,
): Promise<Latencies> {
  const times: number[] = [];
  const began_ms = performance.now();
  const counts_from_ms = began_ms + warm_ms;
  const until_ms = counts_from_ms + duration_ms;
  await Promise.all(
    Array.from({ length: concurrency }, async (_, worker) => {
      for (let now = performance.now(); now < until_ms; now = performance.now()) {
        await work(worker);
        if (now >= counts_from_ms) times.push(performance.now() - now);
      }
    }),
  );
  return { count: times.length, per_s: (times.length / duration_ms) * 1000, ...quantiles(times) };
}

export function quantiles(times: number[]): { p50_ms: number; p99_ms: number } {
  const sorted = [...times].sort((a, b) => a - b);
  const at = (share: number): number => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? 0;
  return { p50_ms: at(0.5), p99_ms: at(0.99) };
}
