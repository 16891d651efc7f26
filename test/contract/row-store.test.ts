// row-store: Goal: both stores of the projection's rows keep the same promises (projections/row-store.ts), so that what the simulation sees of the
// projector on rows in memory holds on Postgres. Method: one suite, run on each.
import { setTimeout as sleep } from "node:timers/promises";
import { describe, expect, test } from "vitest";
import { genesisOf } from "../../projections/audit-chain.ts";
import { createDatabase, faultOf } from "../../projections/database.ts";
import { MemoryRows } from "../../projections/memory-rows.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import type { RowStore } from "../../projections/row-store.ts";
import type { AgentRecord, KeyRecord, SessionRecord, TenantRecord, UsageRecord } from "../../projections/rows.ts";
import { silentLog } from "../../protocol/log.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { realWorld } from "../projections/event-stream.ts";

const AT = "2026-01-01T00:00:00.000Z";

const session = (id: string, more: Partial<SessionRecord> = {}): SessionRecord => ({
  tenant: "acme",
  session: id,
  agent: "a",
  agent_version: 1,
  config_hash: "h",
  external_id: null,
  user_id: null,
  mode: "multi",
  metadata: { a: "b" },
  model: null,
  state: "idle",
  reason: null,
  turn: 0,
  created_at: AT,
  updated_at: AT,
  seq: 1,
  epoch: 1,
  worker: "w1",
  machine: "session@1",
  stream_sequence: 1,
  open_call: null,
  open_tools: [],
  ...more,
});
const tenant: TenantRecord = { tenant: "acme", name: null, state: "active", created_at: AT, updated_at: AT, seq: 1, stream_sequence: 1, own_keys: ["openai"] };
const key: KeyRecord = { tenant: "acme", key_id: "k1", hash: "h", scopes: ["read"], label: null, created_at: AT, revoked_at: null };
const agent = (version: number): AgentRecord => ({
  tenant: "acme",
  agent: "a",
  version,
  hash: `h${version}`,
  config: { model: "simulated/echo" },
  created_at: AT,
});
const usage = (number: number, cost_usd_micros: number | null): UsageRecord => ({
  tenant: "acme",
  session: "s1",
  inst: "3:model",
  attempt: 1,
  turn: 1,
  step: 1,
  agent: "a",
  user_id: null,
  model: "simulated/echo",
  provider: "simulated",
  key_source: "platform",
  input_tokens: 1,
  output_tokens: 2,
  cache_read_tokens: 0,
  cache_write_tokens: 0,
  reasoning_tokens: 0,
  cost_usd_micros,
  price_version: "p",
  estimated: false,
  outcome: "completed",
  code: null,
  started_at: AT,
  ended_at: AT,
  stream_sequence: 3,
  try: number,
  purpose: "answer",
  rule: null,
  first_token_ms: 5,
});

const STORES: Readonly<Record<string, () => Promise<RowStore>>> = {
  memory: () => Promise.resolve(new MemoryRows({ world: realWorld }).connect()),
  postgres: async () => {
    const database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
    atEndOfFile(() => database.close());
    await database.migrate();
    return postgresRows(database);
  },
};

describe.each(Object.entries(STORES))("rows in %s", (_, open) => {
  test("RS1, RS4: a transaction reads what it wrote, and afterwards all of it is there", async () => {
    const store = await open();
    expect(await store.position()).toEqual({ position: 0, incarnation: null });
    await store.transaction(async (rows) => {
      expect(await rows.position()).toEqual({ position: 0, incarnation: null });
      await rows.putSessions([session("s1"), session("s2")]);
      await rows.putSessions([session("s1", { seq: 2, state: "thinking" })]);
      await rows.putTenants([tenant]);
      await rows.putKeys([key]);
      await rows.addAgents([agent(1), agent(2)]);
      expect(await rows.addUsage([usage(1, null), usage(2, 7)])).toBe(2);
      await rows.putAuditHeads([{ tenant: "acme", rows: 1, stream_sequence: 1, chain: genesisOf("acme") }]);
      expect((await rows.sessions([{ tenant: "acme", session: "s1" }])).map(({ seq, state }) => [seq, state])).toEqual([[2, "thinking"]]);
      await rows.moveTo({ position: 3, incarnation: "i" });
    });
    expect(await store.position()).toEqual({ position: 3, incarnation: "i" });
    await store.transaction(async (rows) => {
      await rows.position();
      const wanted = ["s1", "s2", "s3"].map((id) => ({ tenant: "acme", session: id }));
      const found = [...(await rows.sessions(wanted))].sort((a, b) => (a.session < b.session ? -1 : 1));
      expect(found).toEqual([session("s1", { seq: 2, state: "thinking" }), session("s2")]);
      expect(await rows.tenants(["acme", "other"])).toEqual([tenant]);
      expect(await rows.keys(["acme"])).toEqual([key]);
      expect(await rows.newestAgents(["acme"])).toEqual([agent(2)]);
      expect(await rows.auditHeads(["acme"])).toEqual([{ tenant: "acme", rows: 1, stream_sequence: 1, chain: genesisOf("acme") }]);
      expect([await rows.tenants(["other"]), await rows.keys(["other"]), await rows.newestAgents(["other"])]).toEqual([[], [], []]);
    });
  });

  test("the calls of an attempt are found together, and cost what they are told to", async () => {
    const store = await open();
    await store.position();
    const attempt = { tenant: "acme", session: "s1", inst: "3:model", attempt: 1 };
    const costs = await store.transaction(async (rows) => {
      await rows.position();
      await rows.addUsage([usage(1, null), usage(2, 7)]);
      await rows.setCosts([{ ...attempt, try: 1, cost_usd_micros: 40, estimated: true }]);
      const found = await rows.usageOf([attempt, { ...attempt, attempt: 2 }]);
      return [...found].sort((a, b) => a.try - b.try);
    });
    expect(costs).toEqual([{ ...usage(1, 40), estimated: true }, usage(2, 7)]);
  });

  test("RS1: what a transaction wrote that failed is not there", async () => {
    const store = await open();
    await store.position();
    const failing = store.transaction(async (rows) => {
      await rows.position();
      await rows.putSessions([session("s1")]);
      await rows.addUsage([usage(1, 1)]);
      await rows.moveTo({ position: 9, incarnation: "i" });
      throw new Error("no");
    });
    await expect(failing).rejects.toThrow("no");
    expect(await store.position()).toEqual({ position: 0, incarnation: null });
    await store.transaction(async (rows) => {
      await rows.position();
      expect(await rows.sessions([{ tenant: "acme", session: "s1" }])).toEqual([]);
      expect(await rows.addUsage([usage(1, 1)])).toBe(1);
    });
  });

  test("RS3: a row has its key once; of usage the first stands, of all others one more is refused as content", async () => {
    const store = await open();
    await store.position();
    await store.transaction(async (rows) => {
      await rows.position();
      await rows.addAgents([agent(1)]);
      expect(await rows.addUsage([usage(1, 5)])).toBe(1);
      expect(await rows.addUsage([usage(1, 6), usage(2, 6), usage(2, 7)])).toBe(1);
      const found = await rows.usageOf([{ tenant: "acme", session: "s1", inst: "3:model", attempt: 1 }]);
      expect(found.map((row) => row.cost_usd_micros).sort()).toEqual([5, 6]);
    });
    const again = store.transaction(async (rows) => {
      await rows.position();
      await rows.addAgents([agent(1)]);
    });
    const fault = await again.then(
      () => undefined,
      (error: unknown) => faultOf(error).kind,
    );
    expect(fault).toBe("content");
  });

  test("RS2: who has asked for the position has it to himself until the end", async () => {
    const store = await open();
    await store.position();
    const order: string[] = [];
    let inside!: () => void;
    const begun = new Promise<void>((resolve) => (inside = resolve));
    const first = store.transaction(async (rows) => {
      await rows.position();
      inside();
      await sleep(100);
      await rows.moveTo({ position: 1, incarnation: "i" });
      order.push("first");
    });
    await begun;
    const second = store.transaction(async (rows) => {
      const position = await rows.position();
      order.push("second");
      return position;
    });
    await first;
    expect(await second).toEqual({ position: 1, incarnation: "i" });
    expect(order).toEqual(["first", "second"]);
  });
});
