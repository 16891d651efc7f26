// projector: Goal: every message of the stream is in the tables exactly once, whatever dies. Method: journals written by the real
// machines, a real Postgres, and a death at every statement; the tables are compared with those of an undisturbed run.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { beforeAll, describe, expect, test } from "vitest";
import { createDatabase, type Database, type Transaction } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector, type Projector, readinessOf, rebuild } from "../../projections/projector.ts";
import { createQueries } from "../../projections/queries.ts";
import { silentLog } from "../../protocol/log.ts";
import { createMetrics } from "../../telemetry/metrics.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase, freshPostgres } from "../harness/servers.ts";
import {
  answered,
  command,
  createEventStream,
  CUSTOMER_TEXT,
  eventually,
  type EventStream,
  type Journal,
  live,
  livedStream,
  readySession,
  realWorld,
  seeded,
} from "./event-stream.ts";
import { dump } from "./tables.ts";

const SEED = 20261121;

async function emptyTables(url?: string): Promise<Database> {
  const database = createDatabase({ url: url ?? (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => database.close());
  await database.migrate();
  return database;
}

function project(stream: EventStream, database: Database, more: { batch_messages_max?: number; batch_wait_ms?: number } = {}): Projector {
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, ...more });
  atEndOfFile(() => projector.stop());
  return projector;
}

const endOf = (stream: EventStream): number => stream.messages.at(-1)?.sequence ?? 0;

async function projectAll(stream: EventStream, database: Database): Promise<void> {
  const projector = project(stream, database);
  expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
  await projector.stop();
}

describe("what the rows say", () => {
  let database: Database;
  let stream: EventStream;
  let journals: Journal[];
  beforeAll(async () => {
    database = await emptyTables();
    ({ stream, journals } = livedStream(SEED, 12, 600));
    await projectAll(stream, database);
  });

  test("the walk was not empty: every outcome of an attempt occurred, and commits of several entries", async () => {
    const outcomes = new Set(journals.flatMap((journal) => journal.attempts.map((attempt) => attempt.outcome)));
    expect([...outcomes].sort()).toEqual(["cancelled", "completed", "failed", "superseded"]);
    const [{ folded } = { folded: 0 }] = await database.query<{ folded: number }>("select count(*) as folded from audit where entry_index > 1");
    expect(folded).toBeGreaterThan(5);
  });

  test("every attempt of a model call has one usage row with its outcome", async () => {
    const truth = journals.flatMap((journal) => journal.attempts.map(({ session, attempt, outcome }) => `${session} ${attempt} ${outcome}`)).sort();
    const rows = await database.query<{ session: string; attempt: number; outcome: string }>("select session, attempt, outcome from llm_usage_events");
    expect(rows.map(({ session, attempt, outcome }) => `${session} ${attempt} ${outcome}`).sort()).toEqual(truth);
  });

  test("an attempt that ended by its own result or was lost with its worker bears the inst of the journal", async () => {
    const own = new Set(["completed", "failed", "superseded"]);
    const truth = journals
      .flatMap((journal) => journal.attempts.filter(({ outcome }) => own.has(outcome)).map(({ session, inst, attempt }) => `${session} ${inst} ${attempt}`))
      .sort();
    const rows = await database.query<{ session: string; inst: string; attempt: number }>(
      "select session, inst, attempt from llm_usage_events where outcome in ('completed', 'failed', 'superseded')",
    );
    expect(rows.map(({ session, inst, attempt }) => `${session} ${inst} ${attempt}`).sort()).toEqual(truth);
  });

  test("an attempt begins when the one before it was lost", async () => {
    const rows = await database.query<{ began: string; lost: string }>(
      `select next.started_at as began, lost.ended_at as lost from llm_usage_events lost join llm_usage_events next using (tenant, session, inst)
       where lost.outcome = 'superseded' and next.attempt = lost.attempt + 1`,
    );
    expect(rows.length).toBeGreaterThan(5);
    for (const { began, lost } of rows) expect(began).toBe(lost);
  });

  test("what an attempt cost is in its row, and null where nobody knows it", async () => {
    const [wrong] = await database.query(
      "select * from llm_usage_events where outcome = 'completed' and cost_usd_micros is distinct from input_tokens + 10 * output_tokens",
    );
    expect(wrong).toBeUndefined();
    const [known] = await database.query(
      "select * from llm_usage_events where outcome in ('cancelled', 'superseded') and (input_tokens is not null or cost_usd_micros is not null)",
    );
    expect(known).toBeUndefined();
    const [named] = await database.query(
      "select * from llm_usage_events where provider <> 'simulated' or user_id is null or agent not like 'agent%' or key_source <> 'platform'",
    );
    expect(named).toBeUndefined();
  });

  test("every entry of every journal has one audit row, and the session's row is where its journal ends", async () => {
    for (const journal of journals) {
      const [row] = await database.query<{ entries: number; seq_max: number }>("select count(*) as entries, max(seq) as seq_max from audit where actor = $1", [
        journal.actor.id,
      ]);
      expect(row).toEqual({ entries: journal.state()?.seq, seq_max: journal.state()?.seq });
      const session = await createQueries(database).sessions.get(journal.actor.tenant, journal.actor.id);
      expect(session?.seq).toBe(journal.state()?.seq);
      expect(session?.turn).toBe((journal.state()?.snapshot.context as { turn: number } | undefined)?.turn);
    }
  });

  test("no row bears what a customer wrote or an agent answered", async () => {
    expect(JSON.stringify(await dump(database))).not.toContain(CUSTOMER_TEXT);
  });

  test("a rebuild from the first message gives equal tables", async () => {
    const before = await dump(database);
    expect(await rebuild({ bus: stream.bus, database, world: realWorld, log: silentLog })).toMatchObject({ kind: "rebuilt", position: endOf(stream) });
    expect(await dump(database)).toEqual(before);
  });
});

class Killed extends Error {}

/** A process that dies at the nth thing it asks of the database. `after_commit`: the commit is done, and nobody hears of it. */
function mortal(database: Database, dies_at: number, way: "at_statement" | "before_commit" | "after_commit"): { database: Database; dead: Promise<void> } {
  let asked = 0;
  let is_dead = false;
  let die: () => void = () => {};
  const dead = new Promise<void>((resolve) => (die = resolve));
  const kill = (): never => {
    is_dead = true;
    die();
    throw new Killed("killed");
  };
  const living = (): void => {
    if (is_dead) throw new Killed("killed");
  };
  const mortalTransaction = (transaction: Transaction): Transaction => ({
    query(sql, values) {
      living();
      if (way === "at_statement" && ++asked === dies_at) kill();
      return transaction.query(sql, values);
    },
  });
  return {
    dead,
    database: {
      ...database,
      query(sql, values) {
        living();
        return database.query(sql, values);
      },
      async transaction(work) {
        living();
        const answer = await database.transaction(async (transaction) => {
          const done = await work(mortalTransaction(transaction));
          if (way === "before_commit" && ++asked === dies_at) kill();
          return done;
        });
        if (way === "after_commit" && ++asked === dies_at) kill();
        return answer;
      },
    },
  };
}

describe("exactly once", () => {
  test("a death at every statement, before and after every kind of commit, leaves the tables of an undisturbed run", async () => {
    const { stream } = livedStream(SEED + 1, 4, 60);
    const undisturbed = await emptyTables();
    await projectAll(stream, undisturbed);
    const database = await emptyTables();
    let lives = 0;
    for (let dies_at = 1; dies_at <= 12; dies_at += 1) {
      for (const way of ["at_statement", "before_commit", "after_commit"] as const) {
        if (way !== "at_statement" && dies_at > 4) continue;
        const life = mortal(database, dies_at, way);
        const projector = project(stream, life.database, { batch_messages_max: 2, batch_wait_ms: 0 });
        const ended = await Promise.race([life.dead.then(() => "dead"), projector.reached(endOf(stream), 60_000).then(() => "through")]);
        await projector.stop();
        if (ended === "dead") lives += 1;
      }
    }
    expect(lives).toBeGreaterThan(12);
    await projectAll(stream, database);
    expect(await dump(database)).toEqual(await dump(undisturbed));
  });

  test("a process that is killed with SIGKILL at any time leaves the tables of an undisturbed run", async () => {
    const [seed, sessions, happenings] = [SEED + 2, 6, 800];
    const { stream } = livedStream(seed, sessions, happenings);
    const undisturbed = await emptyTables();
    await projectAll(stream, undisturbed);
    const { url } = await freshDatabase();
    const database = await emptyTables(url);
    const random = seeded(SEED);
    const script = join(import.meta.dirname, "projecting-process.ts");
    let kills = 0;
    for (let life = 0; life < 12; life += 1) {
      const child = spawn(process.execPath, [script, url, String(seed), String(sessions), String(happenings)], { stdio: ["ignore", "pipe", "inherit"] });
      const exited = once(child, "exit");
      await once(child.stdout, "data");
      // Later and later, so that also on a slow machine some of them die in the midst of their work.
      const delay_ms = random() * 300 * (1 + life / 3);
      const finished = await Promise.race([exited.then(() => true), sleep(delay_ms).then(() => false)]);
      if (finished) break;
      child.kill("SIGKILL");
      await exited;
      kills += 1;
    }
    const [position] = await createQueries(database).positions();
    console.log(`  ${kills} kills; the position after them was ${position?.position} of ${endOf(stream)}`);
    expect(kills).toBeGreaterThan(1);
    expect(position?.position).toBeGreaterThan(0);
    await projectAll(stream, database);
    expect(await dump(database)).toEqual(await dump(undisturbed));
  });

  test("two projectors at once leave the tables of one", async () => {
    const { stream, journals } = livedStream(SEED + 3, 6, 200);
    const database = await emptyTables();
    const one = project(stream, database, { batch_messages_max: 7 });
    const other = project(stream, database, { batch_messages_max: 11 });
    const random = seeded(SEED + 3);
    for (let count = 0; count < 300; count += 1) {
      live(journals[count % journals.length] as Journal, random);
      if (count % 10 === 0) await sleep(2);
    }
    expect(await one.reached(endOf(stream), 60_000)).toBe(true);
    expect(await other.reached(endOf(stream), 60_000)).toBe(true);
    await Promise.all([one.stop(), other.stop()]);
    const alone = await emptyTables();
    await projectAll(stream, alone);
    expect(await dump(database)).toEqual(await dump(alone));
  });

  test("a running projector follows a rebuild that somebody else begins", async () => {
    const { stream } = livedStream(SEED + 4, 4, 100);
    const database = await emptyTables();
    const projector = project(stream, database);
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
    const before = await dump(database);
    expect((await rebuild({ bus: stream.bus, database, world: realWorld, log: silentLog })).kind).toBe("rebuilt");
    const journal = readySession(stream, "acme", "late");
    journal.commit(command("message.send", { content: "hello" }));
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
    expect(await eventually(async () => (await createQueries(database).sessions.get("acme", "late"))?.state === "thinking")).toBe(true);
    const after = await dump(database);
    expect(after["audit"]).toEqual(expect.arrayContaining(before["audit"] ?? []));
  });
});

describe("readiness", () => {
  test("says ok only while it follows, and why not otherwise", () => {
    expect(readinessOf({ kind: "following", position: 3 })).toEqual({ ok: true, detail: "at 3" });
    expect(readinessOf({ kind: "waiting", position: 3, reason: "Postgres is away" })).toEqual({ ok: false, detail: "waits at 3: Postgres is away" });
    expect(readinessOf({ kind: "stopped", position: 3, fault: { name: "stream_cut", message: "those between were removed" } })).toEqual({
      ok: false,
      detail: "stopped at 3: stream_cut: those between were removed",
    });
  });
});

describe("when something is away", () => {
  test("Postgres killed and away for 5 s costs nothing but time", { timeout: 180_000 }, async () => {
    const postgres = await freshPostgres();
    const database = await emptyTables(postgres.url);
    const { stream, journals } = livedStream(SEED + 5, 6, 200);
    const projector = project(stream, database);
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
    const random = seeded(SEED + 5);
    const write = (count: number): void => {
      for (let index = 0; index < count; index += 1) live(journals[index % journals.length] as Journal, random);
    };
    write(50);
    await postgres.kill9();
    write(100);
    await sleep(5_000);
    expect(projector.status().kind).toBe("waiting");
    write(50);
    await postgres.start();
    const back_ms = performance.now();
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
    console.log(`  all rows were there ${Math.round(performance.now() - back_ms)} ms after Postgres was`);
    await projector.stop();
    const alone = await emptyTables();
    await projectAll(stream, alone);
    expect(await dump(database)).toEqual(await dump(alone));
  });

  test("a projector that starts before Postgres and the broker are there goes on when they are", async () => {
    const postgres = await freshPostgres();
    const database = await emptyTables(postgres.url);
    const { stream } = livedStream(SEED + 6, 3, 30);
    await postgres.stop();
    stream.set("disconnected");
    const projector = project(stream, database);
    expect(await eventually(() => projector.status().kind === "waiting")).toBe(true);
    await postgres.start();
    await sleep(300);
    expect(projector.status().kind).toBe("waiting");
    stream.set("connected");
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
  });

  test("a schema that was never migrated is waited for, and named", async () => {
    const database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
    atEndOfFile(() => database.close());
    const { stream } = livedStream(SEED + 7, 2, 10);
    const projector = project(stream, database);
    expect(await eventually(() => JSON.stringify(projector.status()).includes("troupe migrate"))).toBe(true);
    await Promise.all([database.migrate(), database.migrate()]);
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
  });
});

describe("what stops it", () => {
  test("a message that is no journal message stops it there, with all before it projected", async () => {
    const { stream, journals } = livedStream(SEED + 8, 3, 30);
    const good = endOf(stream);
    const bad = stream.append("tenant.t0.session.s0.event", new TextEncoder().encode("{not json"));
    live(journals[1] as Journal, seeded(1));
    const database = await emptyTables();
    const projector = project(stream, database);
    const status = await projector.ended;
    expect(status).toMatchObject({ kind: "stopped", position: good, fault: { name: "unprojectable", sequence: bad, subject: "tenant.t0.session.s0.event" } });
    expect((await createQueries(database).positions())[0]?.position).toBe(good);
  });

  test("a message whose values Postgres refuses stops it there, with all before it projected", async () => {
    const stream = createEventStream();
    readySession(stream, "acme", "good");
    const good = endOf(stream);
    const bad = readySession(stream, "acme", "bad");
    const [first] = stream.messages.splice(good);
    const broken = JSON.parse(new TextDecoder().decode(first?.data)) as { at: string };
    stream.append("tenant.acme.session.bad.event", new TextEncoder().encode(JSON.stringify({ ...broken, at: "not a time" })));
    const projector = project(stream, await emptyTables());
    expect(await projector.ended).toMatchObject({ kind: "stopped", position: good, fault: { name: "unprojectable", sequence: good + 1 } });
    expect(bad.actor.id).toBe("bad");
  });

  test("another stream under the old position stops it, at a start and while it runs", async () => {
    const { stream } = livedStream(SEED + 9, 3, 30);
    const database = await emptyTables();
    const running = project(stream, database);
    expect(await running.reached(endOf(stream), 60_000)).toBe(true);
    const before = await dump(database);
    const old_end = endOf(stream);
    stream.recreate();
    for (let index = 0; endOf(stream) <= old_end + 5; index += 1) readySession(stream, "other", `x${index}`);
    expect(await running.ended).toMatchObject({ kind: "stopped", fault: { name: "stream_replaced" } });
    const started = project(stream, database);
    expect(await started.ended).toMatchObject({ kind: "stopped", fault: { name: "stream_replaced" } });
    expect(await dump(database)).toEqual(before);
    expect((await rebuild({ bus: stream.bus, database, world: realWorld, log: silentLog })).kind).toBe("rebuilt");
    expect((await createQueries(database).sessions.list("other")).items.length).toBeGreaterThan(0);
  });

  test("another stream of the very same length stops it too, though there is nothing to write", async () => {
    const { stream } = livedStream(SEED + 11, 3, 30);
    const database = await emptyTables();
    await projectAll(stream, database);
    const length = stream.messages.length;
    stream.recreate();
    for (const message of livedStream(SEED + 12, 3, 60).stream.messages.slice(0, length)) stream.append(message.subject, message.data);
    expect(endOf(stream)).toBe(length);
    expect(await project(stream, database).ended).toMatchObject({ kind: "stopped", fault: { name: "stream_replaced" } });
  });

  test("a stream that ends before the position stops it, and so does one whose next messages were removed", async () => {
    const { stream } = livedStream(SEED + 10, 3, 40);
    const database = await emptyTables();
    await projectAll(stream, database);
    const removed = stream.messages.splice(-5);
    expect(await project(stream, database).ended).toMatchObject({ kind: "stopped", fault: { name: "stream_replaced" } });
    stream.messages.push(...removed);
    const fresh = await emptyTables();
    stream.cut(10);
    expect(await project(stream, fresh).ended).toMatchObject({ kind: "stopped", fault: { name: "stream_cut" } });
  });
});

describe("time and texts", () => {
  test("a row is there as soon as its message", async () => {
    const stream = createEventStream();
    const database = await emptyTables();
    const metrics = createMetrics("projector");
    const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, metrics });
    atEndOfFile(() => projector.stop());
    const journal = readySession(stream, "acme", "s1");
    expect(await projector.reached(endOf(stream), 60_000)).toBe(true);
    const delays_ms: number[] = [];
    for (let turn = 0; turn < 30; turn += 1) {
      const began_ms = performance.now();
      const sequence =
        turn % 2 === 0 ? journal.commit(command("message.send", { content: "hi" })) : journal.commit(answered(journal.inst("model") ?? "", "hello"));
      expect(await projector.reached(sequence, 60_000)).toBe(true);
      delays_ms.push(performance.now() - began_ms);
    }
    delays_ms.sort((a, b) => a - b);
    const [middle = 0, slow = 0] = [delays_ms[15], delays_ms[28]];
    console.log(`  from append to committed row: median ${middle.toFixed(1)} ms, p95 ${slow.toFixed(1)} ms`);
    expect(middle).toBeLessThan(1_000);
    const text = await metrics.text();
    for (const name of [
      "troupe_projection_messages_total",
      "troupe_projection_rows_total",
      "troupe_projection_batch_size_count",
      "troupe_projection_delay_seconds_count",
      "troupe_projection_lag_messages",
    ])
      expect(text).toMatch(new RegExp(`^${name}\\{.*\\} \\d`, "m"));
    expect(text).toMatch(/troupe_projection_lag_messages\{role="projector"\} 0/);
  });

  test("hostile texts are stored as they are, or mended where Postgres cannot hold them", async () => {
    const stream = createEventStream();
    const database = await emptyTables();
    const texts = ["'; drop table sessions; --", "\\u0000 is not a NUL", '"\\"\\\\', "\u202egnirts", "𝒳 zażółć 字", "%s $1 {}", "\n\r\t\u0001\u007f"];
    texts.forEach((text, index) => readySession(stream, "acme", `s${index}`, { user: text, external_id: text, metadata: { [text.slice(0, 20)]: text } }));
    readySession(stream, "acme", "nul", { user: "a\u0000b", external_id: "half \ud800 of one", metadata: { "k\u0000": "\udc00" } });
    await projectAll(stream, database);
    const { sessions } = createQueries(database);
    for (const [index, text] of texts.entries())
      expect(await sessions.get("acme", `s${index}`)).toMatchObject({ user: text, external_id: text, metadata: { [text.slice(0, 20)]: text } });
    expect(await sessions.get("acme", "nul")).toMatchObject({ user: "a\ufffdb", external_id: "half \ufffd of one", metadata: { "k\ufffd": "\ufffd" } });
  });
});
