// queries: Goal: pages are whole, tenants are apart, cursors are harmless, and the audit can be held against the stream. Method: real
// Postgres, rows projected from journals.
import { beforeAll, describe, expect, test } from "vitest";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { createQueries, digestOf, type Page, type Queries } from "../../projections/queries.ts";
import { auditHash } from "../../projections/rows.ts";
import { TroupeError } from "../../protocol/errors.ts";
import { decodeJournal, type Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase, freshPostgres } from "../harness/servers.ts";
import { answered, command, createEventStream, eventually, type EventStream, type Journal, readySession, realWorld } from "./event-stream.ts";

/** node-pg-migrate's own. */
const MIGRATION_LOCK = "7241865325823964";

let database: Database;
let queries: Queries;
const stream: EventStream = createEventStream();
const BEGAN_MS = Date.parse("2026-11-21T05:00:00.000Z");
const journals: Journal[] = [];

async function projected(): Promise<void> {
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog });
  expect(await projector.reached(stream.messages.at(-1)?.sequence ?? 0, 60_000)).toBe(true);
  await projector.stop();
}

async function walk<T>(page: (after: string | undefined) => Promise<Page<T>>): Promise<T[]> {
  const all: T[] = [];
  let after: string | undefined;
  do {
    const { items, next } = await page(after);
    all.push(...items);
    after = next ?? undefined;
  } while (after !== undefined);
  return all;
}

async function codeOf(ask: () => Promise<unknown>): Promise<string> {
  try {
    await ask();
    return "none";
  } catch (error) {
    return error instanceof TroupeError ? error.body.code : String(error);
  }
}

beforeAll(async () => {
  database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => database.close());
  await database.migrate();
  queries = createQueries(database);
  for (let index = 0; index < 23; index += 1) {
    // Several sessions in one millisecond: the page's order must not hang on time alone.
    const clock = { ms: BEGAN_MS + 1000 * Math.floor(index / 4) };
    const journal = readySession(stream, index === 22 ? "other" : "acme", `s${index}`, { agent: `a${index % 2}`, user: `u${index % 3}` }, clock);
    journal.commit(command("message.send", { content: "hi" }));
    if (index % 3 !== 0) journal.commit(answered(journal.inst("model") ?? "", "hello", index, 2));
    journals.push(journal);
  }
  journals[4]?.commit(...["one", "two", "three", "four", "five"].map((content) => command("message.send", { content })));
  await projected();
});

describe("sessions", () => {
  test("pages of any size tell every session once, newest first, also while new ones arrive", async () => {
    for (const limit of [1, 2, 5, 22, 100]) {
      const ids = (await walk((after) => queries.sessions.list("acme", { limit, after }))).map(({ session }) => session);
      expect(new Set(ids).size).toBe(22);
      expect(ids.length).toBe(22);
    }
    const first = await queries.sessions.list("acme", { limit: 5 });
    const created = first.items.map(({ created_at }) => created_at);
    expect(created).toEqual([...created].sort().reverse());
    readySession(stream, "acme", "newer", {}, { ms: BEGAN_MS + 60_000 });
    await projected();
    const rest = await walk((after) => queries.sessions.list("acme", { limit: 5, after: after ?? first.next ?? "" }));
    expect(rest.length).toBe(17);
    expect(rest.map(({ session }) => session)).not.toContain("newer");
  });

  test("filters by state and agent hold over pages", async () => {
    const thinking = await walk((after) => queries.sessions.list("acme", { state: "thinking", agent: "a0", limit: 2, after }));
    expect(thinking.length).toBe(5);
    expect(thinking.every(({ state, agent }) => state === "thinking" && agent === "a0")).toBe(true);
  });

  test("a session tells its frozen configuration, and another tenant's does not exist", async () => {
    expect(await queries.sessions.get("acme", "s1")).toMatchObject({
      agent: "a1",
      agent_version: 3,
      config_hash: "c".repeat(64),
      model: "simulated/echo",
      mode: "multi",
      user: "u1",
      turn: 1,
      state: "idle",
    });
    expect(await queries.sessions.get("acme", "s22")).toBeUndefined();
    expect(await queries.sessions.get("other", "s1")).toBeUndefined();
  });
});

describe("cursors and limits", () => {
  test("a cursor that was not ours is refused as invalid, never as a fault of the database", async () => {
    const forged = [
      "",
      "!",
      "bm9wZQ",
      Buffer.from('["now","x"]').toString("base64url"),
      Buffer.from('["2026-11-21","\\u0000"]').toString("base64url"),
      Buffer.from("[1,2]").toString("base64url"),
      "x".repeat(5000),
    ];
    for (const after of forged) expect(await codeOf(() => queries.sessions.list("acme", { after }))).toBe("invalid");
    expect(await codeOf(() => queries.usage("acme", { after: Buffer.from('["1",2,3]').toString("base64url") }))).toBe("invalid");
  });

  test("a forged cursor reaches no other tenant's rows", async () => {
    const after = Buffer.from(JSON.stringify(["9999-01-01T00:00:00.000Z", "zzz"])).toString("base64url");
    const items = await walk((next) => queries.sessions.list("other", { after: next ?? after }));
    expect(items.map(({ session }) => session)).toEqual(["s22"]);
  });

  test("limits out of range and times that are none are invalid", async () => {
    for (const limit of [0, -1, 501, 1.5, Number.NaN]) expect(await codeOf(() => queries.sessions.list("acme", { limit }))).toBe("invalid");
    for (const since of ["now", "infinity", "", "13"]) expect(await codeOf(() => queries.usage("acme", { since }))).toBe("invalid");
  });

  test("a filter with hostile text finds nothing and breaks nothing", async () => {
    for (const agent of ["' or 1=1 --", "\u0000", "\ud800", "%"]) expect((await queries.sessions.list("acme", { agent })).items).toEqual([]);
  });

  test("a forgotten transaction and a stuck statement have an end on the server's side", async () => {
    expect(await database.query("show idle_in_transaction_session_timeout")).toEqual([{ idle_in_transaction_session_timeout: "15s" }]);
    expect(await database.query("show statement_timeout")).toEqual([{ statement_timeout: "1min" }]);
  });

  test("a database that is away is `unavailable`", async () => {
    const away = createDatabase({ url: "postgres://nobody:x@127.0.0.1:1/none", application_name: "test", log: silentLog });
    expect(await codeOf(() => createQueries(away).sessions.list("acme"))).toBe("unavailable");
    await away.close();
  });
});

describe("usage and audit", () => {
  test("usage pages tell every attempt once, and totals are their sums", async () => {
    const rows = await walk((after) => queries.usage("acme", { limit: 4, after }));
    expect(rows.length).toBe(14);
    expect(new Set(rows.map(({ session, inst, attempt }) => `${session} ${inst} ${attempt}`)).size).toBe(14);
    const totals = await queries.usage_totals("acme");
    expect(totals.map(({ agent }) => agent).sort()).toEqual(["a0", "a1"]);
    const sum = (values: (number | null)[]): number => values.reduce<number>((total, value) => total + (value ?? 0), 0);
    expect(sum(totals.map(({ cost_usd_micros }) => cost_usd_micros))).toBe(sum(rows.map(({ cost_usd_micros }) => cost_usd_micros)));
    expect(sum(totals.map(({ attempts }) => attempts))).toBe(14);
    const user = await queries.usage("acme", { user: "u1" });
    expect(user.items.every((row) => row.user === "u1")).toBe(true);
    const ended = rows[3]?.ended_at ?? "";
    expect((await queries.usage("acme", { until: ended })).items.every(({ ended_at }) => ended_at < ended)).toBe(true);
  });

  test("audit pages tell every entry once, in order, and events as types only", async () => {
    const rows = await walk((after) => queries.audit("acme", { actor: "s1", kind: "session", limit: 2, after }));
    expect(rows.map(({ seq }) => seq)).toEqual([4, 3, 2, 1]);
    expect(rows.map(({ entry_type }) => entry_type)).toEqual(["done", "command", "done", "init"]);
    expect(rows[1]).toMatchObject({
      command_type: "message.send",
      channel: "command",
      state_after: "thinking",
      events: ["message.received", "turn.started", "model.started", "session.state"],
    });
  });

  test("pages may end within a commit of several entries", async () => {
    for (const limit of [1, 2, 3]) {
      const rows = await walk((after) => queries.audit("acme", { actor: "s4", limit, after }));
      expect(rows.map(({ seq }) => seq)).toEqual([9, 8, 7, 6, 5, 4, 3, 2, 1]);
      expect(rows.map(({ state_after }) => state_after === null)).toEqual([false, true, true, true, true, false, false, false, false]);
    }
  });

  test("what the audit holds of an actor equals what its journal says, and one changed byte shows", async () => {
    const journal = journals[1] as Journal;
    const entries: Entry[] = stream.messages.flatMap(({ subject, data }) => (subject === "tenant.acme.session.s1.event" ? decodeJournal(data).entries : []));
    const summary = await queries.audit_summary(journal.actor);
    expect(summary).toEqual({ rows: 4, seq_max: 4, stream_sequence_max: expect.any(Number), digest: digestOf(entries.map(auditHash)) });
    const hashes: string[] = [];
    for await (const { hash } of queries.audit_hashes(journal.actor)) hashes.push(hash);
    expect(digestOf(hashes)).toBe(summary.digest);
    const changed = entries.map((entry) => (entry.t === "command" ? { ...entry, body: { ...entry.body, content: "hi " } as JsonObject } : entry));
    expect(digestOf(changed.map(auditHash))).not.toBe(summary.digest);
    expect(await queries.audit_summary({ ...journal.actor, tenant: "other" })).toEqual({ rows: 0, seq_max: 0, stream_sequence_max: 0, digest: digestOf([]) });
  });
});

test("migrations that meet the end of Postgres reject, and the process lives", { timeout: 180_000 }, async () => {
  const postgres = await freshPostgres();
  const fresh = createDatabase({ url: postgres.url, application_name: "test", log: silentLog });
  atEndOfFile(() => fresh.close());
  // Somebody else holds the lock, so they wait; then Postgres goes.
  const holder = createDatabase({ url: postgres.url, application_name: "holder", log: silentLog });
  atEndOfFile(() => holder.close());
  await holder.query(`select pg_advisory_lock(${MIGRATION_LOCK})`);
  const waits = fresh.migrate();
  const outcome = waits.then(
    () => "migrated",
    () => "rejected",
  );
  await eventually(async () => (await holder.query<{ waiting: number }>("select count(*) as waiting from pg_locks where not granted"))[0]?.waiting === 1);
  await postgres.stop();
  expect(await outcome).toBe("rejected");
  await postgres.start();
  expect(await fresh.migrate()).toEqual(expect.arrayContaining(["0001_projections", "0002_tenancy", "0003_usage_tries"]));
  expect(await fresh.migrate()).toEqual([]);
});
