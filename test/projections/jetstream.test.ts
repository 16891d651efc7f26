// jetstream: Goal: what the projector was shown to do over a stream in memory it does over the real broker, also across the broker's
// death; and how long a row takes. Method: nats-server and Postgres of one's own, journals appended behind their fence.
import { expect, test } from "vitest";
import { connectJetStream } from "../../bus/jetstream.ts";
import type { Bus } from "../../bus/port.ts";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { createQueries } from "../../projections/queries.ts";
import { silentLog } from "../../protocol/log.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase, freshNats } from "../harness/servers.ts";
import { eventually, livedStream, realWorld } from "./event-stream.ts";

async function grounds(): Promise<{ bus: Bus; database: Database; kill9: () => Promise<void>; start: () => Promise<void> }> {
  const nats = await freshNats();
  const bus = await connectJetStream({
    servers: nats.url,
    user: nats.user,
    password: nats.password,
    name: "test",
    shards: 16,
    replicas: 1,
    log: silentLog,
    world: realWorld,
  });
  atEndOfFile(() => bus.close());
  const database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => database.close());
  await database.migrate();
  return { bus, database, kill9: () => nats.kill9(), start: () => nats.start() };
}

/** Appends a lived stream's journals, each in its order, side by side. */
async function appendAll(
  bus: Bus,
  messages: ReturnType<typeof livedStream>["stream"]["messages"],
  on_committed?: (sequence: number) => Promise<void>,
): Promise<void> {
  const bySubject = Map.groupBy(messages, ({ subject }) => subject);
  await Promise.all(
    [...bySubject.entries()].map(async ([subject, own]) => {
      let expected_last_sequence = 0;
      for (const [index, { data }] of own.entries()) {
        for (;;) {
          const outcome = await bus.append({ subject, data, expected_last_sequence, commit_id: `${subject}.${index}` });
          if (outcome.kind === "unavailable") continue;
          if (outcome.kind === "superseded") throw new Error(`superseded by ${outcome.by_sequence}`);
          expected_last_sequence = outcome.sequence;
          break;
        }
        await on_committed?.(expected_last_sequence);
      }
    }),
  );
}

test("a backlog is projected quickly, a fresh message as it comes", async () => {
  const { bus, database } = await grounds();
  const { stream } = livedStream(41, 60, 3_000);
  await appendAll(bus, stream.messages);
  const { last_sequence } = await bus.bounds("EVENTS");
  expect(last_sequence).toBe(stream.messages.length);
  const began_ms = performance.now();
  const projector = createProjector({ bus, rows: postgresRows(database), world: realWorld, log: silentLog });
  atEndOfFile(() => projector.stop());
  expect(await projector.reached(last_sequence, 60_000)).toBe(true);
  const took_ms = performance.now() - began_ms;
  console.log(`  backlog: ${last_sequence} messages in ${Math.round(took_ms)} ms, ${Math.round((last_sequence / took_ms) * 1000)}/s`);
  expect(await projector.lag_messages()).toBe(0);

  const delays_ms: number[] = [];
  const fresh = livedStream(42, 1, 60).stream.messages.map((message) => ({ ...message, subject: message.subject.replace("session.s0", "session.fresh") }));
  const own = fresh.map(({ data, ...message }) => ({
    ...message,
    data: new TextEncoder().encode(new TextDecoder().decode(data).replaceAll('"id":"s0"', '"id":"fresh"')),
  }));
  await appendAll(bus, own, async (sequence) => {
    const committed_ms = performance.now();
    expect(await projector.reached(sequence, 60_000)).toBe(true);
    delays_ms.push(performance.now() - committed_ms);
  });
  delays_ms.sort((a, b) => a - b);
  const at = (part: number): number => delays_ms[Math.floor(delays_ms.length * part)] ?? 0;
  console.log(`  from commit to row: median ${at(0.5).toFixed(1)} ms, p95 ${at(0.95).toFixed(1)} ms of ${delays_ms.length}`);
  expect(at(0.5)).toBeLessThan(1_000);
});

test("a broker that is killed while journals grow leaves every entry with one row", { timeout: 180_000 }, async () => {
  const { bus, database, kill9, start } = await grounds();
  const { stream, journals } = livedStream(43, 8, 400);
  const projector = createProjector({ bus, rows: postgresRows(database), world: realWorld, log: silentLog });
  atEndOfFile(() => projector.stop());
  let committed = 0;
  let broken: Promise<void> | undefined;
  await appendAll(bus, stream.messages, async () => {
    committed += 1;
    if (committed === 100) broken = kill9().then(start);
  });
  await broken;
  expect(await eventually(async () => (await bus.bounds("EVENTS").catch(() => undefined))?.last_sequence === stream.messages.length, 20_000)).toBe(true);
  expect(await projector.reached(stream.messages.length, 60_000)).toBe(true);
  for (const { actor, state } of journals) {
    const summary = await createQueries(database).audit_summary(actor);
    expect([summary.rows, summary.seq_max]).toEqual([state()?.seq, state()?.seq]);
  }
});
