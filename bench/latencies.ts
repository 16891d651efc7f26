// latencies: (f) what the design this is held against did in memory, measured through the broker with file storage and fsync: handing a task over, asking the
// budget, keeping count of what runs at once, deciding to make a call cheaper. One worker process, one caller: what one call feels, not how many fit.
//   node bench/latencies.ts        BENCH_MS sets how long each row runs
import { type ActorAddress, budgetActor, tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { type BenchCluster, startCluster } from "./cluster.ts";

const DURATION_MS = Number(process.env["BENCH_MS"] ?? 4000);
const SESSIONS = 200;
/** Between two calls: the next does not stand in the wake of the one before. */
const PAUSE_MS = 2;

export interface LatencyRow {
  readonly what: string;
  /** What was asked of it, in memory. */
  readonly aim_ms: number;
  readonly count: number;
  readonly p50_ms: number;
  readonly p95_ms: number;
  readonly p99_ms: number;
  readonly within_aim: number;
}

async function answered(
  cluster: BenchCluster,
  actor: ActorAddress,
  type: string,
  body: JsonObject,
  channel: "command" | "control" = "control",
): Promise<JsonObject> {
  const outcome = await cluster.client.command(actor, { type, body, channel }, { patience_ms: 30_000 });
  if (outcome.kind !== "decided" || !outcome.reply.ok || "refused" in outcome.reply.result) throw new Error(`${type}: ${JSON.stringify(outcome)}`);
  return outcome.reply.result;
}

/** `once` answers how long its own part took. */
async function row(what: string, aim_ms: number, once: (n: number) => Promise<number>): Promise<LatencyRow> {
  const times: number[] = [];
  const began_ms = performance.now();
  for (let n = 0; performance.now() - began_ms < DURATION_MS; n++) {
    times.push(await once(n));
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
  }
  times.sort((a, b) => a - b);
  const at = (share: number): number => times[Math.min(times.length - 1, Math.floor(times.length * share))] ?? Number.NaN;
  const within_aim = times.filter((one) => one < aim_ms).length / times.length;
  return { what, aim_ms, count: times.length, p50_ms: at(0.5), p95_ms: at(0.95), p99_ms: at(0.99), within_aim };
}

async function timed(work: () => Promise<unknown>): Promise<number> {
  const began_ms = performance.now();
  await work();
  return performance.now() - began_ms;
}

export async function benchLatencies(): Promise<LatencyRow[]> {
  const cluster = await startCluster({ workers: 1, agent: { model: "simulated/echo" } });
  try {
    for (const tenant of ["free", "bound", "spent"]) {
      await answered(cluster, tenantActor(tenant), "tenant.create", {});
      await answered(cluster, budgetActor(tenant), "budget.create", {});
    }
    await answered(cluster, budgetActor("free"), "budget.configure", { level: "tenant", limit_usd_micros: 1_000_000_000_000, period: "day" });
    await answered(cluster, budgetActor("bound"), "budget.configure", {
      level: "tenant",
      limit_usd_micros: 1_000_000_000_000,
      period: "day",
      concurrency_max: 10_000,
      rates: { simulated: { requests_max: 1_000_000_000, tokens_max: 1_000_000_000_000, window_ms: 60_000 } },
    });
    await answered(cluster, budgetActor("spent"), "budget.configure", { level: "tenant", limit_usd_micros: 1_000_000, period: "none" });
    const sessionsOf = (prefix: string): ActorAddress[] =>
      Array.from({ length: SESSIONS }, (_, n) => ({ tenant: "bench", kind: "session", id: `${prefix}${n}` }));
    const [sessions, others] = [sessionsOf("s"), sessionsOf("t")];
    for (const session of [...sessions, ...others]) await answered(cluster, session, "session.create", { agent: "a" }, "command");

    let calls = 0;
    const ask = (tenant: string, more: JsonObject = {}): JsonObject => ({
      hold: `${tenant}/session/s/${(calls += 1)}:model/1`,
      session: "s",
      agent: "a",
      model: "simulated/echo",
      amount_usd_micros: 50,
      minimum_usd_micros: 10,
      ...more,
    });
    const reserved = async (tenant: string, body: JsonObject, check?: (result: JsonObject) => void): Promise<number> => {
      const began_ms = performance.now();
      const result = await answered(cluster, budgetActor(tenant), "budget.reserve", body);
      const took_ms = performance.now() - began_ms;
      check?.(result);
      await answered(cluster, budgetActor(tenant), "budget.settle", { hold: body["hold"] as string, cost_usd_micros: 0 });
      return took_ms;
    };
    const rate = { provider: "simulated", tokens: 100, returns: true };
    const command = (n: number): JsonObject => ({ type: Math.floor(n / SESSIONS) % 2 === 0 ? "session.pause" : "session.resume", body: {} });
    const encoder = new TextEncoder();

    await row("warm-up", 1, () => reserved("free", ask("free")));
    const submit = await row("submit: the command is stored, and cannot be lost any more", 1, (n) => {
      const { tenant, id } = sessions[n % SESSIONS] as ActorAddress;
      return timed(async () => {
        const stored = await cluster.bus.publish(`tenant.${tenant}.session.${id}.command`, encoder.encode(JSON.stringify(command(n))));
        if (stored.kind !== "stored") throw new Error(`not stored: ${stored.kind}`);
      });
    });
    const decided = await row("submit: decided and journaled by its session, and answered", 1, (n) => {
      const { type } = command(n) as { type: string };
      return timed(() => answered(cluster, others[n % SESSIONS] as ActorAddress, type, {}, "command"));
    });
    const check = await row("budget check: a reservation decided, journaled and answered", 5, () => reserved("free", ask("free")));
    // A call under limits of calls and rates, less one without, in turn: what keeping count adds.
    const counted = await row("concurrency: what a slot and a place in a window add to it", 10, async () => {
      const without_ms = await reserved("free", ask("free"));
      return (await reserved("bound", ask("bound", { rate, priority: "normal" }))) - without_ms;
    });
    const slot = await row("concurrency: a slot taken and given back by name, both answered", 10, (n) =>
      timed(async () => {
        await answered(cluster, budgetActor("bound"), "slot.acquire", { slot: `bench-${n}` });
        await answered(cluster, budgetActor("bound"), "slot.release", { slot: `bench-${n}` });
      }),
    );
    // 95 % of its money is held: the call as it is wanted is to be made cheaper.
    await answered(cluster, budgetActor("spent"), "budget.reserve", { ...ask("spent"), amount_usd_micros: 950_000, minimum_usd_micros: 950_000 });
    const degraded = await row("degradation: judged as wanted and as planned, journaled and answered", 50, () =>
      reserved("spent", ask("spent", { degraded: { model: "simulated/script", amount_usd_micros: 20, minimum_usd_micros: 5 } }), ({ choice }) => {
        if (choice !== "degraded") throw new Error("it was not made cheaper");
      }),
    );
    return [submit, decided, check, counted, slot, degraded];
  } finally {
    await cluster.stop();
  }
}

if (import.meta.main) for (const one of await benchLatencies()) console.log(one);
