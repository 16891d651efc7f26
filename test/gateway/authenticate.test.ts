// Goal: a key is worth exactly what its tenant's record says of it, and the system tenant has no keys.
// Method: authenticate over records made by hand.
import { createHash } from "node:crypto";
import { expect, test } from "vitest";
import type { TenantRecord } from "../../actors/directory.ts";
import { authenticate } from "../../gateway/authenticate.ts";
import { bearer, keyOf } from "./small-cell.ts";

const recordOf = (tenant: string, more: Partial<TenantRecord> = {}, revoked_at_ms: number | null = null): TenantRecord => ({
  state: "active",
  name: null,
  agents: {},
  keys: { k1: { hash: createHash("sha256").update(keyOf(tenant)).digest("hex"), scopes: ["sessions"], label: null, created_at_ms: 1, revoked_at_ms } },
  ...more,
});
const asked = (tenant: string, record: TenantRecord | undefined, authorization = bearer(keyOf(tenant)).authorization) =>
  authenticate(authorization, async () => record);

test("a key that its tenant has names the tenant, the key and its scopes", async () => {
  expect(await asked("acme", recordOf("acme"))).toMatchObject({ kind: "principal", principal: { tenant: "acme", key_id: "k1", scopes: ["sessions"] } });
  expect(await asked("acme", recordOf("acme"), `bearer   ${keyOf("acme")}`)).toMatchObject({ kind: "principal" });
});

test.each([
  ["the system tenant's, even if its record had one", asked("system", recordOf("system"))],
  ["a revoked one", asked("acme", recordOf("acme", {}, 5))],
  ["one of a closed tenant", asked("acme", recordOf("acme", { state: "closed" }))],
  ["one of a tenant in a state nobody knows", asked("acme", recordOf("acme", { state: "odd" as never }))],
  ["one of a tenant without a record", asked("acme", undefined)],
  ["one whose hash is another's", asked("acme", recordOf("rival"))],
  ["one whose hash is missing", asked("acme", recordOf("acme", { keys: { k1: { ...recordOf("acme").keys["k1"]!, hash: "" } } }))],
  ["one with more parts", asked("acme", recordOf("acme"), `Bearer ${keyOf("acme")}.x`)],
  ["another scheme", asked("acme", recordOf("acme"), `Basic ${keyOf("acme")}`)],
])("refused as unauthenticated: %s", async (_, answer) => {
  expect(await answer).toMatchObject({ kind: "refused", error: { code: "unauthenticated" } });
});

test("a valid key of a suspended tenant is forbidden, a wrong one does not learn of it", async () => {
  expect(await asked("acme", recordOf("acme", { state: "suspended" }))).toMatchObject({ error: { code: "forbidden" } });
  expect(await asked("acme", recordOf("rival", { state: "suspended" }))).toMatchObject({ error: { code: "unauthenticated" } });
});
