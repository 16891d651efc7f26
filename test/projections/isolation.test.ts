// isolation: Goal: the database itself keeps tenants apart and the audit as it was written, whatever a query of ours forgets.
// Method: a real Postgres with two tenants' rows, asked as the very roles that gateways and the projector connect as, with every kind of
// setting; and the look at the catalogue held against planted faults.
import { beforeAll, describe, expect, test } from "vitest";
import { createDatabase, type Database } from "../../projections/database.ts";
import { bypassesIsolation, isolationFaults, letIn, urlAs } from "../../projections/isolation.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { createQueries } from "../../projections/queries.ts";
import { silentLog } from "../../protocol/log.ts";
import { cores } from "../../state-machines/kinds.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshPostgres } from "../harness/servers.ts";
import { answered, command, createEventStream, readySession, journalOf, realWorld } from "./event-stream.ts";

const PASSWORD = 'it\'s "quoted" \\ $$ and % odd';
const TENANT_TABLES = ["tenants", "agents", "sessions", "audit", "audit_heads", "llm_usage_events"];

let owner: Database;
let app: Database;
let projector: Database;
let operator: Database;

const open = (url: string): Database => {
  const database = createDatabase({ url, application_name: "test", log: silentLog, pool_size_max: 1 });
  atEndOfFile(() => database.close());
  return database;
};

/** The SQLSTATE that a statement is refused with. */
async function refusal(attempt: Promise<unknown>): Promise<string> {
  try {
    await attempt;
    return "none";
  } catch (error) {
    return (error as { code?: string }).code ?? String(error);
  }
}

/** Rows of each table that a transaction sees after `prepare`, as `{table: tenants}`. */
async function seen(database: Database, setting: string | undefined): Promise<Record<string, string[]>> {
  return database.transaction(async (transaction) => {
    if (setting !== undefined) await transaction.query("select set_config('troupe.tenant', $1, true)", [setting]);
    const tenants: Record<string, string[]> = {};
    for (const table of TENANT_TABLES) {
      const rows = await transaction.query<{ tenant: string }>(`select distinct tenant from ${table} order by tenant`);
      tenants[table] = rows.map((row) => row.tenant);
    }
    return tenants;
  });
}

const everywhere = (...tenants: string[]): Record<string, string[]> => Object.fromEntries(TENANT_TABLES.map((table) => [table, tenants]));

beforeAll(async () => {
  // A server of its own: the roles belong to the whole server.
  const { url } = await freshPostgres();
  owner = open(url);
  await owner.migrate();
  for (const role of ["app", "projector", "operator"] as const) await letIn(owner, role, PASSWORD);
  app = open(urlAs(url, "app", PASSWORD));
  projector = open(urlAs(url, "projector", PASSWORD));
  operator = open(urlAs(url, "operator", PASSWORD));
  const stream = createEventStream();
  for (const tenant of ["acme", "other"]) {
    const journal = journalOf(stream, { tenant, kind: "tenant", id: "main" }, cores.tenant);
    journal.commit({ t: "init", channel: "control", type: "tenant.create", body: {} });
    journal.commit({
      t: "command",
      channel: "control",
      type: "agent.put",
      body: { agent: "a", config: { model: "simulated/echo", instructions: "", tools: [], mode: "multi" } },
    });
    const session = readySession(stream, tenant, "s1");
    session.commit(command("message.send", { content: "hi" }));
    session.commit(answered(session.inst("model") ?? "", "hello", 1, 2));
  }
  const projecting = createProjector({ bus: stream.bus, rows: postgresRows(projector), world: realWorld, log: silentLog });
  const reached = await projecting.reached(stream.messages.length, 60_000);
  expect([reached, projecting.status()]).toEqual([true, { kind: "following", position: stream.messages.length }]);
  await projecting.stop();
});

describe("as the role of the gateways", () => {
  test("the setting of a tenant shows that tenant's rows and no other's, in every table", async () => {
    expect(await seen(app, "acme")).toEqual(everywhere("acme"));
    expect(await seen(app, "other")).toEqual(everywhere("other"));
  });

  test.each([
    ["no setting", undefined],
    ["an empty one", ""],
    ["one that names nobody", "nobody"],
    ["one in other letters", "ACME"],
    ["a wildcard", "%"],
    ["two tenants", "acme,other"],
    ["an injection", "acme' or '1'='1"],
    ["another injection", "acme'; set role troupe_projector; --"],
    ["a blank beside the name", " acme"],
  ])("%s shows no row at all", async (_, setting) => {
    expect(await seen(app, setting)).toEqual(everywhere());
  });

  test("a setting ends with its transaction, also on the same connection", async () => {
    expect(await seen(app, "acme")).toEqual(everywhere("acme"));
    expect(await seen(app, undefined)).toEqual(everywhere());
  });

  test("it can neither become somebody else nor lift what binds it", async () => {
    for (const statement of [
      "set role troupe_projector",
      "set role troupe_operator",
      "set session authorization postgres",
      "set row_security = off; select * from sessions",
      "alter table sessions no force row level security",
      "drop policy own_tenant on sessions",
      "create policy all_of_it on sessions for select to troupe_app using (true)",
      "alter role troupe_app bypassrls",
      "select protect_tenant_table('sessions')",
      "create table mine (x int)",
    ])
      expect([statement, await refusal(app.query(statement))]).toEqual([statement, "42501"]);
  });

  test("it writes nothing, and the hashes of keys are not for it", async () => {
    for (const statement of [
      ...[...TENANT_TABLES, "keys", "projection_positions"].flatMap((table) => [`delete from ${table}`, `truncate ${table}`]),
      "insert into audit_heads values ('acme', 1, 1, '')",
      "update sessions set state = 'idle'",
      "select * from keys",
    ])
      expect([statement, await refusal(app.query(statement))]).toEqual([statement, "42501"]);
  });
});

test("the audit can be changed, removed or emptied by none of the roles, the one that writes it included", async () => {
  for (const database of [app, projector, operator])
    for (const statement of [
      "update audit set hash = hash",
      "delete from audit",
      "truncate audit",
      "drop table audit",
      "alter table audit disable row level security",
    ])
      expect([statement, await refusal(database.query(statement))]).toEqual([statement, "42501"]);
});

test("operators see every tenant's rows, by a role of their own that cannot write", async () => {
  expect(await seen(operator, undefined)).toEqual(everywhere("acme", "other"));
  expect(await refusal(operator.query("delete from sessions"))).toBe("42501");
});

describe("queries", () => {
  test("made over the gateways' connection they answer, each tenant its own", async () => {
    const queries = createQueries(app);
    for (const tenant of ["acme", "other"]) {
      expect((await queries.sessions.list(tenant)).items).toHaveLength(1);
      expect((await queries.usage(tenant)).items).toHaveLength(1);
      expect((await queries.audit(tenant)).items.length).toBeGreaterThan(3);
    }
    expect((await queries.positions())[0]?.position).toBeGreaterThan(0);
    expect((await queries.sessions.list("nobody")).items).toEqual([]);
  });

  test("made over a superuser's connection they are still bound to one tenant", async () => {
    expect(await owner.read({ kind: "tenant", tenant: "acme" }, "select distinct tenant from sessions")).toEqual([{ tenant: "acme" }]);
    expect(await owner.read({ kind: "tenant", tenant: "" }, "select distinct tenant from sessions")).toEqual([]);
    expect(await owner.read({ kind: "operator" }, "select distinct tenant from sessions order by tenant")).toEqual([{ tenant: "acme" }, { tenant: "other" }]);
    expect(await refusal(owner.read({ kind: "tenant", tenant: "acme" }, "delete from sessions"))).toBe("25006");
  });
});

describe("the look at the catalogue", () => {
  test("finds nothing to say of the schema as the migrations make it, and it looked at tables", async () => {
    expect(await isolationFaults(owner)).toEqual([]);
    const [row] = await owner.query<{ tables: number }>(
      "select count(*) as tables from information_schema.columns where table_schema = 'public' and column_name = 'tenant'",
    );
    expect(row?.tables).toBeGreaterThanOrEqual(7);
  });

  test.each([
    ["create table leaky (tenant text, x int)", "drop table leaky", /leaky does not force.*\n.*leaky has no policy.*\n.*leaky does not have tenant/],
    ["alter table sessions no force row level security", "alter table sessions force row level security", /^sessions does not force/],
    [
      "drop policy own_tenant on agents",
      "create policy own_tenant on agents for select to troupe_app using (tenant = nullif(current_setting('troupe.tenant', true), ''))",
      /^agents has no policy/,
    ],
    ["grant delete on audit to troupe_projector", "revoke delete on audit from troupe_projector", /^troupe_projector may change/],
    ["alter role troupe_app bypassrls", "alter role troupe_app nobypassrls", /^troupe_app can step around/],
  ])("finds the planted fault: %s", async (plant, mend, words) => {
    await owner.query(plant);
    try {
      expect((await isolationFaults(owner)).join("\n")).toMatch(words);
    } finally {
      await owner.query(mend);
    }
    expect(await isolationFaults(owner)).toEqual([]);
  });

  test("knows a connection that could see everything", async () => {
    expect(await bypassesIsolation(owner)).toBe(true);
    expect(await bypassesIsolation(app)).toBe(false);
    expect(await bypassesIsolation(projector)).toBe(false);
  });
});
