// tenants: Goal: keys, agents and the tenant's state in the tables are those of the tenant's own machine. Method: a tenant's journal
// through its machine, folded at times; the tables compared with the machine's context.
import { beforeAll, expect, test } from "vitest";
import { createDatabase, type Database } from "../../projections/database.ts";
import { createProjector } from "../../projections/projector.ts";
import type { Entry } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { timestamp } from "../../protocol/world.ts";
import { cores } from "../../state-machines/kinds.ts";
import type { TenantContext } from "../../state-machines/tenant.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { command, createEventStream, journalOf, realWorld, seeded } from "./event-stream.ts";

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
  const projector = createProjector({ bus: stream.bus, database, world: realWorld, log: silentLog, batch_messages_max: 9 });
  expect(await projector.reached(stream.messages.length, 10_000)).toBe(true);
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
