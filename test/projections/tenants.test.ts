// tenants: Goal: keys, agents and the tenant's state in the tables are those of the tenant's own machine. Method: a tenant's journal
// through its machine, folded at times; the tables compared with the machine's context.
import { beforeAll, expect, test } from "vitest";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { timestamp } from "../../protocol/world.ts";
import { cores } from "../../state-machines/kinds.ts";
import type { TenantContext } from "../../state-machines/tenant.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { callMade } from "../state-machines/session-drive.ts";
import { answered, claimed, command, createEventStream, journalOf, readySession, realWorld, seeded } from "./event-stream.ts";

const SEED = 7;
const control = (type: string, body: Parameters<typeof command>[1]): Entry => ({ ...command(type, body), channel: "control" }) as Entry;
const agentConfig = (model: string) => ({ model, instructions: "be kind", tools: [], mode: "multi" });

let database: Database;
let context: TenantContext;
const stream = createEventStream();

beforeAll(async () => {
  database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => database.close());
  await database.migrate();
  const random = seeded(SEED);
  const journal = journalOf(stream, { tenant: "acme", kind: "tenant", id: "main" }, cores.tenant);
  const other = journalOf(stream, { tenant: "other", kind: "tenant", id: "main" }, cores.tenant);
  for (const one of [journal, other]) one.commit({ t: "init", channel: "control", type: "tenant.create", body: { name: "A company" } });
  for (let index = 0; index < 40; index += 1) {
    const happenings: Entry[] = [
      control("key.create", {
        key_id: `k${index}`,
        hash: String(index).padStart(64, "0"),
        scopes: ["sessions", "read"],
        ...(index % 2 === 0 ? { label: "a label" } : {}),
      }),
      control("agent.put", { agent: `a${Math.floor(random() * 3)}`, config: agentConfig(`simulated/m${Math.floor(random() * 2)}`) }),
    ];
    if (index % 5 === 4) happenings.push(control("key.revoke", { key_id: `k${Math.floor(random() * index)}` }));
    if (index % 3 === 0) journal.commit(...happenings);
    else for (const happening of happenings) journal.commit(happening);
  }
  journal.commit(control("tenant.suspend", { reason: "unpaid" }));
  context = journal.state()?.snapshot.context as TenantContext;
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_messages_max: 9 });
  expect(await projector.reached(stream.messages.length, 60_000)).toBe(true);
  await projector.stop();
});

test("the rows of keys are the keys that the tenant lists, revoked ones with their time", async () => {
  const rows = await database.query("select key_id, hash, scopes, label, created_at, revoked_at from keys where tenant = 'acme'");
  const truth = Object.entries(context.keys).map(([key_id, { hash, scopes, label, created_at_ms, revoked_at_ms }]) => ({
    key_id,
    hash,
    scopes,
    label,
    created_at: timestamp(created_at_ms),
    revoked_at: revoked_at_ms === null ? null : timestamp(revoked_at_ms),
  }));
  expect(truth.filter(({ revoked_at }) => revoked_at !== null).length).toBeGreaterThan(3);
  const byId = (a: unknown, b: unknown): number => ((a as { key_id: string }).key_id < (b as { key_id: string }).key_id ? -1 : 1);
  expect([...rows].sort(byId)).toEqual(truth.sort(byId));
});

test("the newest version of each agent's rows is the tenant's, and versions have no holes", async () => {
  const rows = await database.query<{ agent: string; version: number; hash: string; config: unknown; versions: number }>(
    "select distinct on (agent) agent, version, hash, config, count(*) over (partition by agent) as versions from agents where tenant = 'acme' order by agent, version desc",
  );
  expect(rows.length).toBe(3);
  for (const { agent, version, hash, config, versions } of rows) {
    expect(context.agents[agent]).toMatchObject({ version, hash, config });
    expect(versions).toBe(version);
    expect(version).toBeGreaterThan(1);
  }
});

test("a tenant's state follows its journal and touches no other tenant", async () => {
  expect(await database.query("select tenant, name, state from tenants order by tenant")).toEqual([
    { tenant: "acme", name: "A company", state: "suspended" },
    { tenant: "other", name: "A company", state: "active" },
  ]);
});

test("a call that nobody said the key of was made with the tenant's own where the tenant had one then; one that says whose it was is believed", async () => {
  const clock = { ms: Date.parse("2026-11-22T05:00:00.000Z") };
  const owner = journalOf(stream, { tenant: "owner", kind: "tenant", id: "main" }, cores.tenant, clock);
  owner.commit({ t: "init", channel: "control", type: "tenant.create", body: {} });
  const sealed = { v: 1, master_key_id: "m1", nonce: "n".repeat(16), ciphertext: "c".repeat(40) };
  /** A first attempt that is lost with its worker, and a second with these calls. */
  const turn = (id: string, ...calls: readonly JsonObject[]): void => {
    const journal = readySession(stream, "owner", id, {}, clock);
    journal.commit(command("message.send", { content: "hello" }));
    const inst = journal.inst("model") ?? "";
    journal.commit(claimed([inst]));
    const entry = answered(inst, "fine") as Extract<Entry, { t: "done" }>;
    journal.commit({
      ...entry,
      output: { ...(entry.output as JsonObject), attempts: calls.map((call, index) => callMade(index + 1, { attempt: 2, ...call })) },
    });
  };
  const told = { model: "simulated/echo", key_source: "platform" };
  turn("before", told);
  for (const provider of ["simulated", "openai"]) owner.commit(control("provider_key.put", { provider, sealed, last_four: null }));
  turn("with", told, { model: "openai-responses/m" }, { model: "anthropic/m" }, { model: "anthropic/m", key_source: "tenant" });
  owner.commit(control("provider_key.remove", { provider: "simulated" }));
  turn("after", told);
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_wait_ms: 1 });
  expect(await projector.reached(stream.messages.length, 60_000)).toBe(true);
  await projector.stop();
  const rows = await database.query<{ session: string; model: string; key_source: string }>(
    "select session, model, key_source from llm_usage_events where tenant = 'owner' order by stream_sequence, attempt, try",
  );
  expect(rows.map(({ session, model, key_source }) => `${session} ${model} ${key_source}`)).toEqual([
    "before simulated/echo platform",
    "before simulated/echo platform",
    "with simulated/echo tenant",
    "with simulated/echo platform",
    "with openai-responses/m tenant",
    "with anthropic/m platform",
    "with anthropic/m tenant",
    "after simulated/echo platform",
    "after simulated/echo platform",
  ]);
  expect(await database.query("select own_keys from tenants where tenant in ('owner', 'acme') order by tenant")).toEqual([
    { own_keys: [] },
    { own_keys: ["openai"] },
  ]);
});
