// Goal: a key is worth exactly what its tenant's record says of it, and an operator's key is no tenant's.
// Method: authenticate over records made by hand.
import { createHash } from "node:crypto";
import { expect, test } from "vitest";
import type { TenantRecord } from "../../actors/directory.ts";
import { authenticate, bearerOf } from "../../gateway/authenticate.ts";
import { bearer, keyOf } from "./small-cell.ts";

const NOW_MS = 1_000_000;
const recordOf = (tenant: string, more: Partial<TenantRecord> = {}, revoked_at_ms: number | null = null): TenantRecord => ({
  state: "active",
  name: null,
  agents: {},
  policy: { default: "allow", deny: [] },
  grants: {},
  config_epoch: 0,
  keys: { k1: { hash: createHash("sha256").update(keyOf(tenant)).digest("hex"), scopes: ["sessions:read"], label: null, created_at_ms: 1, revoked_at_ms } },
  ...more,
});
const asked = (tenant: string, record: TenantRecord | undefined, authorization = bearer(keyOf(tenant)).authorization) =>
  authenticate(bearerOf(authorization), { tenantOf: async () => record, now_ms: () => NOW_MS });

test("a key that its tenant has names the tenant, the key and its scopes", async () => {
  expect(await asked("acme", recordOf("acme"))).toMatchObject({
    kind: "principal",
    principal: { kind: "tenant", tenant: "acme", name: "key:k1", scopes: new Set(["sessions:read"]), expires_at_ms: null },
  });
  expect(await asked("acme", recordOf("acme"), `bearer   ${keyOf("acme")}`)).toMatchObject({ kind: "principal" });
});

test.each([
  ["an expired one", asked("acme", recordOf("acme", { keys: { k1: { ...recordOf("acme").keys["k1"]!, expires_at_ms: NOW_MS } } }))],
  ["one whose id is a word of every object", asked("acme", recordOf("acme"), "Bearer troupe.acme.constructor.x")],
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

test("a key counts until its end, and the principal knows of it", async () => {
  const record = recordOf("acme", { keys: { k1: { ...recordOf("acme").keys["k1"]!, expires_at_ms: NOW_MS + 1 } } });
  expect(await asked("acme", record)).toMatchObject({ principal: { expires_at_ms: NOW_MS + 1 } });
});

const granted = async (tenant: string, scopes: readonly string[]): Promise<string[]> => {
  const answer = await asked(tenant, recordOf(tenant, { keys: { k1: { ...recordOf(tenant).keys["k1"]!, scopes } } }));
  return answer.kind === "principal" ? [answer.principal.kind, ...answer.principal.scopes] : [answer.error.code];
};

test.each([
  ["acme", [], ["tenant", "sessions:read", "sessions:write"]],
  ["acme", ["sessions:read"], ["tenant", "sessions:read"]],
  ["acme", ["admin"], ["tenant", "admin", "sessions:read", "sessions:write"]],
  ["acme", ["sessions", "*", "operator:write"], ["tenant"]],
  ["system", [], ["operator", "operator:read"]],
  ["system", ["operator:write"], ["operator", "operator:write", "operator:read"]],
  ["system", ["admin", "sessions:read"], ["operator"]],
])("a key of '%s' that lists %j grants exactly %j", async (tenant, scopes, wanted) => {
  expect(await granted(tenant, scopes)).toEqual(wanted);
});
