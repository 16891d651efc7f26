// Goal: the daily report over HTTP is the tenant's own, of the days and the part that were asked for; operators see any tenant's; nobody else sees one; a query
//       that cannot be read is refused, and a database that is away is unavailable.
// Method: a gateway in this process whose database says whose days it was asked for; a budget's journal written by the budget's own machine.
import { createHash } from "node:crypto";
import { afterAll, beforeAll, expect, test } from "vitest";
import { createCommandClient } from "../../actors/client.ts";
import type { UsageFilter } from "../../protocol/usage-filter.ts";
import { budgetActor } from "../../protocol/ids.ts";
import { realWorld } from "../../roles/real-world.ts";
import { bearer, keyOf, type SmallCell, startSmallCell } from "./small-cell.ts";

let cell: SmallCell;
let is_away = false;
const asked: [string, UsageFilter][] = [];
const hash = (tenant: string, key_id: string): string => createHash("sha256").update(keyOf(tenant, key_id)).digest("hex");

beforeAll(async () => {
  cell = await startSmallCell({
    tenants: ["acme", "globex"],
    overrides: {
      async usage_daily(tenant, filter) {
        if (is_away) throw new Error("away");
        asked.push([tenant, filter]);
        return tenant === "acme"
          ? [
              { day: "2026-11-20", cost_usd_micros: 30 },
              { day: "2026-11-20", cost_usd_micros: 12 },
            ]
          : [];
      },
    },
  });
  for (const tenant of ["acme", "globex"]) await cell.tell(tenant, "key.create", { key_id: "boss", hash: hash(tenant, "boss"), scopes: ["admin"] });
  await cell.tell("system", "tenant.create", {});
  await cell.tell("system", "key.create", { key_id: "op", hash: hash("system", "op") });
  const client = createCommandClient({ bus: cell.operator, world: realWorld() });
  for (const [type, body] of [
    ["budget.create", {}],
    ["budget.configure", { level: "tenant", limit_usd_micros: 0, period: "day" }],
    ["budget.reserve", { hold: "acme/session/s1/3:model/1", session: "s1", agent: "a", model: "simulated/echo", amount_usd_micros: 10, minimum_usd_micros: 1 }],
  ] as const)
    expect(await client.command(budgetActor("acme"), { type, body, channel: "control" }), type).toMatchObject({ kind: "decided", reply: { ok: true } });
  await client.stop();
}, 180_000);
afterAll(() => cell?.end());

const get = async (path: string, key: string): Promise<{ status: number; body: Record<string, unknown> }> => {
  const answer = await fetch(cell.gateway.url + path, { headers: bearer(key) });
  return { status: answer.status, body: (await answer.json()) as Record<string, unknown> };
};
const OWN = "/v1/usage/daily";
const today = (): string => new Date().toISOString().slice(0, 10);

test("a tenant's administrators see its own days, from the rows and from its budget's journal; operators the same of any tenant", async () => {
  const report = {
    tenant: "acme",
    items: [
      {
        tenant: "acme",
        day: "2026-11-20",
        usage_usd_micros: 42,
        rows: [{ cost_usd_micros: 30 }, { cost_usd_micros: 12 }],
        ...(today() === "2026-11-20" ? {} : { ledger: null }),
      },
      ...(today() === "2026-11-20" ? [] : [{ day: today(), usage_usd_micros: 0, rows: [], ledger: { refused: { budget_exceeded: 1 } } }]),
    ].sort((a, b) => (a.day < b.day ? -1 : 1)),
  };
  expect(await get(OWN, keyOf("acme", "boss"))).toMatchObject({ status: 200, body: report });
  expect(await get("/v1/operator/tenants/acme/usage/daily", keyOf("system", "op"))).toMatchObject({ status: 200, body: report });
  expect(await get(OWN, keyOf("globex", "boss"))).toEqual({ status: 200, body: { tenant: "globex", items: [] } });
});

test("a part of it: what the query names is asked of the database, and a budget's part is left out of what it does not tell apart", async () => {
  asked.length = 0;
  const query = "?since=2026-11-01T00:00:00Z&until=2026-12-01T00:00:00%2B01:00&agent=a&model=simulated/echo";
  const { body } = await get(OWN + query, keyOf("acme", "boss"));
  expect(asked).toMatchObject([["acme", { since: "2026-11-01T00:00:00Z", until: "2026-12-01T00:00:00+01:00", agent: "a", model: "simulated/echo" }]]);
  expect((body["items"] as { ledger: unknown }[]).every(({ ledger }) => ledger === null)).toBe(true);
});

test("nobody else sees one", async () => {
  for (const key of [keyOf("acme"), keyOf("system", "op")]) expect((await get(OWN, key)).status).toBe(403);
  expect((await get("/v1/operator/tenants/acme/usage/daily", keyOf("acme", "boss"))).status).toBe(403);
  for (const id of ["nobody", "system", "a b"])
    expect((await get(`/v1/operator/tenants/${encodeURIComponent(id)}/usage/daily`, keyOf("system", "op"))).status).toBe(404);
});

test.each(["?since=yesterday", "?until=2026-13-01T00:00:00Z", "?agent=", "?user=a%00b", `?model=${"x".repeat(257)}`, "?since=2026-11-01T00:00:00Z&since=x"])(
  "a query that cannot be read is refused: %s",
  async (query) => {
    expect(await get(OWN + query, keyOf("acme", "boss"))).toMatchObject({ status: 422, body: { code: "invalid" } });
  },
);

test("a database that is away is unavailable, and says when to come again", async () => {
  is_away = true;
  expect(await get(OWN, keyOf("acme", "boss"))).toMatchObject({ status: 503, body: { code: "unavailable" } });
  is_away = false;
});
