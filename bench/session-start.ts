// session-start: (1) how long a cold session takes from its creation to its first rest, at a steady rate: command stored, actor made, five steps
// taken, configuration journaled; (2) what the gate before each effect costs, beside an effect that does nothing; (3) one verdict of the pure rule.
import { createDirectory } from "../actors/directory.ts";
import { createGate, gated } from "../actors/permission.ts";
import { createRestorer } from "../actors/restore.ts";
import type { EffectScope } from "../actors/performer.ts";
import { actorPath, type ActorAddress } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { silentLog } from "../protocol/log.ts";
import { realWorld } from "../roles/real-world.ts";
import { cores } from "../state-machines/kinds.ts";
import { allowed } from "../state-machines/permission.ts";
import { type BenchCluster, startCluster } from "./cluster.ts";

const PER_S = Number(process.env["BENCH_PER_S"] ?? 20);
const DURATION_MS = Number(process.env["BENCH_MS"] ?? 10_000);
const GATE_CALLS = 20_000;

interface Spread {
  readonly count: number;
  readonly p50_ms: number;
  readonly p95_ms: number;
  readonly p99_ms: number;
}

function spreadOf(times: readonly number[]): Spread {
  const sorted = [...times].sort((a, b) => a - b);
  const at = (share: number): number => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN;
  return { count: sorted.length, p50_ms: at(0.5), p95_ms: at(0.95), p99_ms: at(0.99) };
}

/** From the command's publish to `idle` in the journal, heard on the live subject. */
async function coldStarts({ bus, client }: BenchCluster): Promise<Spread> {
  const began = new Map<string, number>();
  const times: number[] = [];
  const warm = PER_S; // the first second is a warm-up
  const listening = bus.subscribe("live.tenant.bench.session.*.event", ({ data }) => {
    const message = decodeJournal(data);
    const began_ms = began.get(actorPath(message.actor));
    if (began_ms === undefined || message.state !== "idle") return;
    began.delete(actorPath(message.actor));
    times.push(performance.now() - began_ms);
  });
  const pending: Promise<unknown>[] = [];
  const count = Math.floor((PER_S * DURATION_MS) / 1000) + warm;
  for (let index = 0; index < count; index++) {
    const session: ActorAddress = { tenant: "bench", kind: "session", id: `cold${index}` };
    began.set(actorPath(session), performance.now());
    pending.push(client.command(session, { type: "session.create", body: { agent: "a" } }));
    await new Promise((resolve) => setTimeout(resolve, 1000 / PER_S));
  }
  await Promise.all(pending);
  await new Promise((resolve) => setTimeout(resolve, 500));
  await listening.stop();
  if (began.size > 0) throw new Error(`${began.size} sessions did not come to rest`);
  return spreadOf(times.slice(warm));
}

/** Microseconds of one effect behind the gate, and of one without it, over the same cluster's tenant. */
async function gateCost({ bus }: BenchCluster): Promise<{ bare_us: number; gated_us: number }> {
  const world = realWorld();
  const directory = createDirectory({ bus, restorer: createRestorer({ bus, cores, log: silentLog }), world, log: silentLog });
  const nothing = { call_tool: async () => null };
  const behind = gated(createGate({ directory, world }), nothing);
  const frozen = new Map([[2, { t: "done", inst: "1:configuration", output: { config: { model: "simulated/echo" }, agent: "a", roles: ["r"] } } as const]]);
  const scope = {
    actor: { tenant: "bench", kind: "session", id: "s" },
    signal: new AbortController().signal,
    entries: async () => frozen,
  } as unknown as EffectScope;
  const run = async (perform: ((input: never, scope: EffectScope) => Promise<unknown>) | undefined): Promise<number> => {
    const began_ms = performance.now();
    for (let call = 0; call < GATE_CALLS; call++) await perform?.({ config_seq: 2, name: "now" } as never, scope);
    return ((performance.now() - began_ms) * 1000) / GATE_CALLS;
  };
  await run(behind["call_tool"]);
  const bare_us = await run(nothing.call_tool);
  const gated_us = await run(behind["call_tool"]);
  await directory.stop();
  return { bare_us, gated_us };
}

function verdictCost(): number {
  const permissions = {
    default: "deny",
    allow: Array.from({ length: 100 }, (_, index) => `tool:t${index}`),
    deny: Array.from({ length: 100 }, (_, index) => `model:m${index}/*`),
  } as const;
  const began_ms = performance.now();
  let yes = 0;
  for (let call = 0; call < GATE_CALLS; call++) yes += allowed(permissions, { kind: "tool", name: "t99" }).kind === "allowed" ? 1 : 0;
  if (yes !== GATE_CALLS) throw new Error("the verdict is wrong");
  return ((performance.now() - began_ms) * 1000) / GATE_CALLS;
}

export async function benchSessionStart(): Promise<{ cold: Spread; bare_us: number; gated_us: number; verdict_us: number }> {
  const cluster = await startCluster({ workers: 1, agent: { model: "simulated/echo", tools: ["now", "wait_ms"] } });
  try {
    return { cold: await coldStarts(cluster), ...(await gateCost(cluster)), verdict_us: verdictCost() };
  } finally {
    await cluster.stop();
  }
}

if (import.meta.main) {
  const { cold, bare_us, gated_us, verdict_us } = await benchSessionStart();
  console.log(
    `cold sessions at ${PER_S}/s (${cold.count}): p50 ${cold.p50_ms.toFixed(1)} ms, p95 ${cold.p95_ms.toFixed(1)} ms, p99 ${cold.p99_ms.toFixed(1)} ms (aim: p95 ≤ 50 ms)`,
  );
  console.log(`the gate: ${gated_us.toFixed(1)} µs an effect, ${bare_us.toFixed(1)} µs without it; one verdict over 200 rules ${verdict_us.toFixed(2)} µs`);
}
