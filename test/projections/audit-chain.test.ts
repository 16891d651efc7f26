// audit-chain: Goal: no change of the audit stays unseen, and none is seen that is not there. Method: journals of several tenants through
// the projector into a real Postgres; then, as superuser, every kind of tampering with rows, order and head, one at a time, each undone by
// projecting anew; and the pure chain over the journal alone.
import { beforeEach, expect, test } from "vitest";
import { chained, chainOf, genesisOf, type AuditFinding, type AuditHead, type ChainedRow, verifyAudit } from "../../projections/audit-chain.ts";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { createQueries, type Queries } from "../../projections/queries.ts";
import { auditRecords } from "../../projections/rows.ts";
import type { OpenTool } from "../../projections/tool-audit.ts";
import { decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { command, livedStream, readySession, realWorld } from "./event-stream.ts";

const { stream } = livedStream(41, 6, 150);
readySession(stream, "lone", "s1").commit(command("message.send", { content: "\u0000 and half of 😀" }), command("message.send", { content: "twice" }));
const TENANTS = [...new Set(stream.messages.map(({ subject }) => subject.split(".")[1] ?? ""))].sort();
const TENANT = TENANTS.find((tenant) => tenant !== "lone") ?? "";

async function* journalOf(tenant: string, through = Number.MAX_SAFE_INTEGER): AsyncGenerator<{ message: JournalMessage; sequence: number }> {
  for (const { subject, data, sequence } of stream.messages)
    if (subject.split(".")[1] === tenant && sequence <= through) yield { message: decodeJournal(data), sequence };
}

let database: Database;
let queries: Queries;

beforeEach(async () => {
  const { url, drop } = await freshDatabase();
  database = createDatabase({ url, application_name: "test", log: silentLog });
  const mine = database;
  atEndOfFile(() => mine.close());
  atEndOfFile(drop);
  await database.migrate();
  queries = createQueries(database);
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_messages_max: 37 });
  expect(await projector.reached(stream.messages.length, 60_000)).toBe(true);
  await projector.stop();
});

async function findings(tenant: string, with_stream = true): Promise<AuditFinding[]> {
  const found: AuditFinding[] = [];
  const { position, head, beyond } = await queries.audit_end(tenant);
  const journal = with_stream ? journalOf(tenant, position) : null;
  const report = await verifyAudit({ tenant, rows: queries.audit_chain(tenant, position), head, beyond, journal, report: (one) => void found.push(one) });
  expect(report.findings).toBe(found.length);
  return found;
}

const faults = async (with_stream = true): Promise<string[]> => [...new Set((await findings(TENANT, with_stream)).map((one) => one.fault))].sort();

test("an audit as the projector wrote it is whole for every tenant, and its head is the one that the stream alone gives", async () => {
  expect(TENANTS.length).toBeGreaterThan(2);
  for (const tenant of TENANTS) {
    expect(await findings(tenant)).toEqual([]);
    const heads = new Map<string, AuditHead>();
    const open = new Map<string, readonly OpenTool[]>();
    for await (const { message, sequence } of journalOf(tenant)) {
      const made = auditRecords(message, sequence, open.get(message.actor.id) ?? []);
      open.set(message.actor.id, made.open);
      chained(heads, made.rows);
    }
    expect((await queries.audit_end(tenant)).head).toEqual(heads.get(tenant));
    expect(heads.get(tenant)?.rows).toBeGreaterThan(2);
  }
});

test("each tenant's chain begins elsewhere and hangs on no other tenant's rows", async () => {
  const rows: ChainedRow[] = [];
  for await (const row of queries.audit_chain(TENANT)) rows.push(row);
  const [first] = rows;
  expect(first?.chain).toBe(chainOf(genesisOf(TENANT), first as ChainedRow));
  expect(genesisOf("a")).not.toBe(genesisOf("b"));
  expect(rows.every((row) => row.tenant === TENANT)).toBe(true);
});

/** A row in the middle, by its place. */
const MIDDLE = `(tenant, stream_sequence, entry_index) = (select tenant, stream_sequence, entry_index from audit where tenant = $1
  order by stream_sequence, entry_index offset (select count(*) / 2 from audit where tenant = $1) limit 1)`;
const LAST = `(tenant, stream_sequence, entry_index) in (select tenant, stream_sequence, entry_index from audit where tenant = $1
  order by stream_sequence desc, entry_index desc limit 3)`;

test.each([
  ["the worker that did it", "worker = 'somebody else'"],
  ["its time", "at = at + interval '1 millisecond'"],
  ["its content hash", "hash = repeat('0', 64)"],
  ["its state", "state_after = 'terminated'"],
  ["its events", "events = events || '[\"turn.completed\"]'::jsonb"],
  ["its seq", "seq = seq + 1"],
])("one changed column of one row is found, by the stream and by the table alone: %s", async (_, change) => {
  await database.query(`update audit set ${change} where ${MIDDLE}`, [TENANT]);
  expect(await faults()).toEqual(["changed"]);
  expect(await findings(TENANT)).toHaveLength(1);
  expect(await faults(false)).toEqual(["chain_broken"]);
});

test("a changed row whose chain, and every one after it with the head, was made anew is found by the stream", async () => {
  await database.query(`update audit set worker = 'somebody else' where ${MIDDLE}`, [TENANT]);
  let previous = genesisOf(TENANT);
  const rows: ChainedRow[] = [];
  for await (const row of queries.audit_chain(TENANT)) rows.push(row);
  for (const row of rows) {
    previous = chainOf(previous, row);
    await database.query("update audit set chain = $4 where tenant = $1 and stream_sequence = $2 and entry_index = $3", [
      TENANT,
      row.stream_sequence,
      row.entry_index,
      previous,
    ]);
  }
  await database.query("update audit_heads set chain = $2 where tenant = $1", [TENANT, previous]);
  expect(await faults(false)).toEqual([]);
  expect(await faults()).toEqual(["changed"]);
});

test("a changed chain alone is found", async () => {
  await database.query(`update audit set chain = repeat('a', 64) where ${MIDDLE}`, [TENANT]);
  expect(await faults()).toEqual(["chain_broken"]);
  expect(await faults(false)).toEqual(["chain_broken"]);
});

test("a row taken out of the middle is found", async () => {
  await database.query(`delete from audit where ${MIDDLE}`, [TENANT]);
  expect(await faults()).toEqual(["head_changed", "removed"]);
  expect(await faults(false)).toEqual(["chain_broken", "head_changed"]);
});

test("the last rows taken away are found, also when the head was set back to fit", async () => {
  await database.query(`delete from audit where ${LAST}`, [TENANT]);
  expect(await faults()).toEqual(["head_changed", "removed"]);
  expect(await faults(false)).toEqual(["head_changed"]);
  await database.query(
    `update audit_heads set (rows, stream_sequence, chain) = (select (select count(*) from audit where tenant = $1), stream_sequence, chain from audit
     where tenant = $1 order by stream_sequence desc, entry_index desc limit 1) where tenant = $1`,
    [TENANT],
  );
  expect(await faults(false)).toEqual([]);
  expect(await faults()).toEqual(["removed"]);
});

test("all rows and the head taken away are found", async () => {
  await database.query("delete from audit where tenant = $1", [TENANT]);
  await database.query("delete from audit_heads where tenant = $1", [TENANT]);
  expect(await faults()).toEqual(["removed"]);
});

test("a row put in is found, in the middle and beyond what is projected", async () => {
  const put =
    "insert into audit select * from jsonb_populate_record(null::audit, (select to_jsonb(audit) || jsonb_build_object('stream_sequence', $2::bigint, 'entry_index', 40) from audit where tenant = $1 limit 1))";
  const { position } = await queries.audit_end(TENANT);
  await database.query(put, [TENANT, Math.floor(position / 2)]);
  expect(await faults()).toEqual(["head_changed", "inserted"]);
  await database.query("delete from audit where tenant = $1 and entry_index = 40", [TENANT]);
  expect(await faults()).toEqual([]);
  await database.query(put, [TENANT, position + 1000]);
  expect(await faults()).toEqual(["inserted"]);
  expect(await faults(false)).toEqual(["inserted"]);
});

test("two rows that changed places are found", async () => {
  const [one, other] = await database.query<{ stream_sequence: number; entry_index: number; kind: string; actor: string }>(
    "select stream_sequence, entry_index, kind, actor from audit where tenant = $1 and entry_index = 0 order by stream_sequence limit 2 offset 4",
    [TENANT],
  );
  const move = "update audit set stream_sequence = $2 where tenant = $1 and stream_sequence = $3 and entry_index = 0";
  await database.query(move, [TENANT, -1, one?.stream_sequence ?? 0]);
  await database.query(move, [TENANT, one?.stream_sequence ?? 0, other?.stream_sequence ?? 0]);
  await database.query(move, [TENANT, other?.stream_sequence ?? 0, -1]);
  expect(await faults()).toEqual(["changed"]);
  expect(await faults(false)).toEqual(["chain_broken"]);
});

test.each([
  ["its chain", "chain = repeat('b', 64)"],
  ["its count", "rows = rows + 1"],
  ["its place", "stream_sequence = stream_sequence - 1"],
])("a changed head is found: %s", async (_, change) => {
  await database.query(`update audit_heads set ${change} where tenant = $1`, [TENANT]);
  expect(await faults()).toEqual(["head_changed"]);
  expect(await faults(false)).toEqual(["head_changed"]);
});

test("rows that a tenant's audit got from another tenant are found in both", async () => {
  await database.query(`update audit set tenant = 'lone' where ${MIDDLE}`, [TENANT]);
  expect(await faults()).toEqual(["head_changed", "removed"]);
  expect([...new Set((await findings("lone")).map((one) => one.fault))].sort()).toEqual(["head_changed", "inserted"]);
});

test("what is read from an export has the chain of the table", async () => {
  const lines: string[] = [];
  for await (const row of queries.audit_chain(TENANT)) lines.push(JSON.stringify(row));
  async function* again(texts: readonly string[]): AsyncGenerator<ChainedRow> {
    for (const text of texts) yield JSON.parse(text) as ChainedRow;
  }
  const found: AuditFinding[] = [];
  const report = (one: AuditFinding): void => void found.push(one);
  const whole = await verifyAudit({ tenant: TENANT, rows: again(lines), head: null, journal: null, report });
  expect([found, whole.head]).toEqual([[], (await queries.audit_end(TENANT)).head?.chain]);
  await verifyAudit({ tenant: TENANT, rows: again(lines.toSpliced(3, 1)), head: null, journal: null, report });
  expect(found.map((one) => one.fault)).toEqual(["chain_broken"]);
});
