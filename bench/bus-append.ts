// bus-append: what group commit gives. Appends a second through the bus, beside the client library's own publish with an expected
// sequence, on one broker that syncs every write.
//   TROUPE_NATS_SERVER=… node bench/bus-append.ts
import { connect } from "@nats-io/transport-node";
import { jetstream } from "@nats-io/jetstream";
import { connectJetStream } from "../bus/jetstream.ts";
import { silentLog } from "../protocol/log.ts";
import { startNatsServer } from "../test/contract/nats-server.ts";
import { realWorld } from "../test/contract/bus-grounds.ts";

const WAITING = [1, 16, 64, 512];
const ROUND_MS = 2_000;
const BODY = new Uint8Array(400);

type AppendOnce = (subject: string, expected_last_sequence: number) => Promise<number>;

/** So many actors append, each its next message once the last is acknowledged. */
async function measure(prefix: string, waiting: number, append: AppendOnce): Promise<{ per_second: number; p50_ms: number; p99_ms: number }> {
  const took_ms: number[] = [];
  const begun_ms = performance.now();
  const actor = async (index: number): Promise<void> => {
    let last = 0;
    while (performance.now() - begun_ms < ROUND_MS) {
      const sent_ms = performance.now();
      last = await append(`tenant.bench.session.${prefix}-${waiting}-${index}.event`, last);
      took_ms.push(performance.now() - sent_ms);
    }
  };
  await Promise.all(Array.from({ length: waiting }, (_, index) => actor(index)));
  const elapsed_ms = performance.now() - begun_ms;
  took_ms.sort((a, b) => a - b);
  const at = (share: number): number => took_ms[Math.floor(took_ms.length * share)] ?? NaN;
  return { per_second: Math.round((took_ms.length / elapsed_ms) * 1_000), p50_ms: at(0.5), p99_ms: at(0.99) };
}

const server = await startNatsServer();
try {
  const bus = await connectJetStream({ servers: server.url, name: "bench", shards: 16, replicas: 1, log: silentLog, world: realWorld });
  const raw = await connect({ servers: server.url, noAsyncTraces: true });
  const client = jetstream(raw);
  let commits = 0;
  const throughBus: AppendOnce = async (subject, expected_last_sequence) => {
    const outcome = await bus.append({ subject, data: BODY, expected_last_sequence, commit_id: `bench.${(commits += 1)}` });
    if (outcome.kind !== "committed") throw new Error(`an append was not committed: ${JSON.stringify(outcome)}`);
    return outcome.sequence;
  };
  const throughClient: AppendOnce = async (subject, lastSubjectSequence) => (await client.publish(subject, BODY, { expect: { lastSubjectSequence } })).seq;
  console.log("waiting   bus.append /s (p50, p99 ms)      js.publish /s (p50, p99 ms)      ratio");
  for (const waiting of WAITING) {
    const ours = await measure("bus", waiting, throughBus);
    const theirs = await measure("raw", waiting, throughClient);
    const cell = (is: typeof ours): string => `${String(is.per_second).padStart(7)} (${is.p50_ms.toFixed(2)}, ${is.p99_ms.toFixed(2)})`.padEnd(32);
    console.log(`${String(waiting).padStart(7)}   ${cell(ours)} ${cell(theirs)} ${(ours.per_second / theirs.per_second).toFixed(1)}`);
  }
  await raw.close();
  await bus.close();
} finally {
  await server.stop();
}
