// durable-command: (a) a command to one of 1,000 sessions, answered once it is journaled, beside the raw floor: a JetStream publish with an
// expected last subject sequence, same broker, same settings, in turn. A command is two durable writes and two hops more than the floor.
import type { ActorAddress } from "../protocol/ids.ts";
import { type Latencies, measure, startCluster } from "./cluster.ts";

const ACTORS = 1000;
const DURATION_MS = Number(process.env["BENCH_MS"] ?? 5000);

export interface CommandRow {
  readonly concurrency: number;
  readonly floor: Latencies;
  readonly command: Latencies;
}

export async function benchDurableCommand(): Promise<CommandRow[]> {
  const cluster = await startCluster({ workers: 1, agent: { model: "simulated/echo" } });
  try {
    const { client, bus } = cluster;
    const sessions: ActorAddress[] = Array.from({ length: ACTORS }, (_, index) => ({ tenant: "bench", kind: "session", id: `s${index}` }));
    for (let from = 0; from < ACTORS; from += 100)
      await Promise.all(sessions.slice(from, from + 100).map((session) => client.command(session, { type: "session.create", body: { agent: "a" } })));
    await new Promise((resolve) => setTimeout(resolve, 1000));
    // Each actor is used by one caller at a time, so that nobody measures a neighbour's queue.
    const free = [...sessions];
    const paused = new Set<string>();
    const command = async (): Promise<void> => {
      const session = free.shift()!;
      const type = paused.has(session.id) ? "session.resume" : "session.pause";
      const outcome = await client.command(session, { type, body: {} }, { patience_ms: 30_000 });
      if (outcome.kind !== "decided" || !outcome.reply.ok) throw new Error(`not decided: ${JSON.stringify(outcome)}`);
      if (type === "session.pause") paused.add(session.id);
      else paused.delete(session.id);
      free.push(session);
    };
    const last = new Map<string, number>();
    const floors = Array.from({ length: ACTORS }, (_, index) => `tenant.bench.session.floor${index}.snapshot`);
    const payload = new Uint8Array(700);
    const floor = async (): Promise<void> => {
      const subject = floors.shift()!;
      const stored = await bus.publish(subject, payload, { expected_last_sequence: last.get(subject) ?? 0, patience_ms: 30_000 });
      if (stored.kind !== "stored") throw new Error(`not stored: ${stored.kind}`);
      last.set(subject, stored.sequence);
      floors.push(subject);
    };
    const rows: CommandRow[] = [];
    for (const concurrency of [1, 64, 512])
      rows.push({ concurrency, floor: await measure(concurrency, DURATION_MS, floor), command: await measure(concurrency, DURATION_MS, command) });
    return rows;
  } finally {
    await cluster.stop();
  }
}

if (import.meta.main) {
  for (const { concurrency, floor, command } of await benchDurableCommand()) {
    const line = (name: string, { per_s, p50_ms, p99_ms }: Latencies): string =>
      `${name} ${per_s.toFixed(0)}/s p50 ${p50_ms.toFixed(2)} p99 ${p99_ms.toFixed(2)} ms`;
    console.log(
      `${concurrency}: ${line("floor", floor)} | ${line("command", command)} | throughput ×${(command.per_s / floor.per_s).toFixed(2)}, p50 ×${(command.p50_ms / floor.p50_ms).toFixed(2)}`,
    );
  }
}
