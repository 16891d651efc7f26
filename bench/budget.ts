// budget: (e) what asking for money costs: a reservation answered to its caller once it is journaled (fsync), and a settlement stored after it, for one
// tenant (one actor decides all) and for a hundred. One worker process; the callers are this process.
//   node bench/budget.ts        BENCH_MS sets how long each row runs
import { type ActorAddress, budgetActor, tenantActor } from "../protocol/ids.ts";
import { type BenchCluster, startCluster } from "./cluster.ts";

const DURATION_MS = Number(process.env["BENCH_MS"] ?? 5000);
const TENANTS = 100;

export interface BudgetRow {
  readonly what: string;
  readonly pairs_per_s: number;
  readonly reserve_p50_ms: number;
  readonly reserve_p99_ms: number;
  readonly settle_p50_ms: number;
  readonly settle_p99_ms: number;
  /** Processor time of our processes (worker and supervisor). */
  readonly cpu_ms_per_pair: number;
}

const at = (sorted: readonly number[], share: number): number => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;

async function said(cluster: BenchCluster, actor: ActorAddress, type: string, body: { [key: string]: never } | object, key?: string): Promise<number> {
  const sent_ms = performance.now();
  const outcome = await cluster.client.command(actor, { type, body: body as never, channel: "control", key }, { patience_ms: 30_000 });
  if (outcome.kind !== "decided" || !outcome.reply.ok || "refused" in outcome.reply.result) throw new Error(`${type}: ${JSON.stringify(outcome)}`);
  return performance.now() - sent_ms;
}

let calls = 0;
/** A call as a session makes it: reserved, and settled under a key of its own. */
async function pair(cluster: BenchCluster, tenant: string, caller: number): Promise<{ reserve_ms: number; settle_ms: number }> {
  const session = `s${caller}`;
  const hold = `${tenant}/session/${session}/${(calls += 1)}:model/1`;
  const ask = { model: "simulated/echo", amount_usd_micros: 5000, minimum_usd_micros: 20 };
  const reserve_ms = await said(
    cluster,
    budgetActor(tenant),
    "budget.reserve",
    { hold, session, agent: "a", ...ask, rate: { provider: "simulated", tokens: 500 } },
    hold,
  );
  return { reserve_ms, settle_ms: await said(cluster, budgetActor(tenant), "budget.settle", { hold, cost_usd_micros: 700 }, `${hold}#1`) };
}

/** `every_ms`: a call begins that often, whether or not the last one has ended; else each caller begins its next when its last has ended. */
async function measure(cluster: BenchCluster, what: string, callers: number, tenantOf: (caller: number) => string, every_ms?: number): Promise<BudgetRow> {
  const reserves: number[] = [];
  const settles: number[] = [];
  const cpu_before_s = cluster.cpu_s();
  const began_ms = performance.now();
  const keep = (one: { reserve_ms: number; settle_ms: number }): void => void (reserves.push(one.reserve_ms), settles.push(one.settle_ms));
  if (every_ms === undefined)
    await Promise.all(
      Array.from({ length: callers }, async (_, caller) => {
        while (performance.now() - began_ms < DURATION_MS) keep(await pair(cluster, tenantOf(caller), caller));
      }),
    );
  else {
    const running: Promise<void>[] = [];
    for (let n = 0; performance.now() - began_ms < DURATION_MS; n++) {
      running.push(pair(cluster, tenantOf(n), n % callers).then(keep));
      await new Promise((resolve) => setTimeout(resolve, Math.max(0, began_ms + (n + 1) * every_ms - performance.now())));
    }
    await Promise.all(running);
  }
  const elapsed_s = (performance.now() - began_ms) / 1000;
  reserves.sort((a, b) => a - b);
  settles.sort((a, b) => a - b);
  return {
    what,
    pairs_per_s: reserves.length / elapsed_s,
    reserve_p50_ms: at(reserves, 0.5),
    reserve_p99_ms: at(reserves, 0.99),
    settle_p50_ms: at(settles, 0.5),
    settle_p99_ms: at(settles, 0.99),
    cpu_ms_per_pair: ((cluster.cpu_s() - cpu_before_s) * 1000) / reserves.length,
  };
}

export async function benchBudget(): Promise<BudgetRow[]> {
  const cluster = await startCluster({ workers: 1, agent: { model: "simulated/echo" } });
  try {
    const tenants = Array.from({ length: TENANTS }, (_, index) => `t${index}`);
    for (const tenant of tenants) {
      await said(cluster, tenantActor(tenant), "tenant.create", {});
      await said(cluster, budgetActor(tenant), "budget.create", {});
      const rates = { simulated: { requests_max: 1_000_000_000, tokens_max: null, window_ms: 60_000 } };
      await said(cluster, budgetActor(tenant), "budget.configure", { level: "tenant", limit_usd_micros: 1_000_000_000_000, period: "day", rates });
    }
    const one = (): string => "t0";
    const each = (caller: number): string => tenants[caller % TENANTS] as string;
    await measure(cluster, "warm-up", 16, each);
    return [
      await measure(cluster, "one tenant, 100 calls a second", 64, one, 10),
      await measure(cluster, "one tenant, 1 caller", 1, one),
      await measure(cluster, "one tenant, 16 callers", 16, one),
      await measure(cluster, "one tenant, 64 callers", 64, one),
      await measure(cluster, "one tenant, 256 callers", 256, one),
      await measure(cluster, "100 tenants, 100 callers", 100, each),
      await measure(cluster, "100 tenants, 400 callers", 400, each),
    ];
  } finally {
    await cluster.stop();
  }
}

if (import.meta.main) {
  for (const row of await benchBudget())
    console.log(
      `${row.what.padEnd(32)} ${row.pairs_per_s.toFixed(0).padStart(6)} pairs/s   reserve p50 ${row.reserve_p50_ms.toFixed(2)} p99 ${row.reserve_p99_ms.toFixed(2)} ms   settle p50 ${row.settle_p50_ms.toFixed(2)} p99 ${row.settle_p99_ms.toFixed(2)} ms   CPU ${row.cpu_ms_per_pair.toFixed(2)} ms a pair`,
    );
}
