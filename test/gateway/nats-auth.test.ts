// Goal:   who comes onto the bus gets its tenant's account and its scopes' permissions; no two tenants ever share an account, whichever gateways
//         give them at once.
// Method: the policy over an in-memory bus; the broker's side is seen in test/security/nats.test.ts.
import { describe, expect, test } from "vitest";
import type { TenantRecord } from "../../actors/directory.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { createEdgeAccounts } from "../../gateway/edge-accounts.ts";
import { createNatsAuth, tenantPermissions } from "../../gateway/nats-auth.ts";
import { hashKey, standInPassword } from "../../protocol/api-key.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld } from "../../roles/real-world.ts";
import { silentMetrics } from "../../telemetry/metrics.ts";
import { keyOf } from "./small-cell.ts";

const brokerWith = () => createMemoryBroker({ world: realWorld(), shards: 1 });

describe("accounts of the edge", () => {
  test("many gateways that give at once never give one account to two tenants, nor two accounts to one", async () => {
    const broker = brokerWith();
    const gateways = ["a", "b", "c"].map((name) => createEdgeAccounts({ bus: broker.connect(name), count: 40 }));
    const tenants = Array.from({ length: 30 }, (_, index) => `t${index}`);
    const given = await Promise.all(
      gateways.flatMap((gateway, nth) =>
        tenants.map(async (_, index) => {
          const tenant = tenants[(index + nth * 11) % tenants.length]!;
          return { tenant, account: await gateway.accountOf(tenant) };
        }),
      ),
    );
    const byTenant = new Map<string, Set<string>>();
    for (const { tenant, account } of given) {
      expect(account.kind).toBe("account");
      if (account.kind === "account") byTenant.set(tenant, (byTenant.get(tenant) ?? new Set()).add(account.name));
    }
    expect([...byTenant.values()].map(({ size }) => size)).toEqual(tenants.map(() => 1));
    expect(new Set([...byTenant.values()].flatMap((names) => [...names])).size).toBe(tenants.length);
  });

  test("a gateway that starts later knows what was given; when all are given the next tenant gets none", async () => {
    const broker = brokerWith();
    const first = createEdgeAccounts({ bus: broker.connect("a"), count: 2 });
    expect([await first.accountOf("x"), await first.accountOf("y")]).toEqual([
      { kind: "account", name: "EDGE_0" },
      { kind: "account", name: "EDGE_1" },
    ]);
    const later = createEdgeAccounts({ bus: broker.connect("b"), count: 2 });
    expect(await later.givenAccountOf("y")).toBe("EDGE_1");
    expect(await later.givenAccountOf("z")).toBe(undefined);
    expect(await later.accountOf("z")).toEqual({ kind: "full" });
    expect(await later.accountOf("x")).toEqual({ kind: "account", name: "EDGE_0" });
  });
});

describe("a login", () => {
  const NOW_MS = 5_000_000;
  const record = (tenant: string, more: object = {}): TenantRecord =>
    ({
      state: "active",
      name: null,
      agents: {},
      keys: { k1: { hash: hashKey(keyOf(tenant)), scopes: [], label: null, created_at_ms: 1, revoked_at_ms: null, ...more } },
    }) as unknown as TenantRecord;
  const login = (records: Record<string, TenantRecord>) =>
    createNatsAuth({
      accounts: createEdgeAccounts({ bus: brokerWith().connect("g"), count: 4 }),
      tenantOf: async (id) => (Object.hasOwn(records, id) ? records[id] : undefined),
      now_ms: () => NOW_MS,
      metrics: silentMetrics,
      log: silentLog,
      stand_in_secret: "secret",
    });

  test("with a key, as token or as password, gives its tenant's permissions until an hour from now, or the key's end", async () => {
    const decide = login({ acme: record("acme"), brief: record("brief", { expires_at_ms: NOW_MS + 10 }) });
    const admitted = await decide({ token: keyOf("acme"), host: "h" });
    expect(admitted).toEqual({
      kind: "admitted",
      account: "EDGE_0",
      name: "key:k1",
      publish: ["tenant.acme.session.*.command", "tenant.acme.workflow.*.command", "tenant.acme.replay"],
      subscribe: ["live.tenant.acme.>", "_INBOX_acme.>"],
      unheard: ["live.tenant.acme.tenant.>"],
      expires_at_ms: NOW_MS + 3_600_000,
    });
    expect(await decide({ user: "who", password: keyOf("acme"), host: "h" })).toEqual(admitted);
    expect(await decide({ token: keyOf("brief"), host: "h" })).toMatchObject({ account: "EDGE_1", expires_at_ms: NOW_MS + 10 });
  });

  test("as a stand-in is worth the stand-in's own tenant", async () => {
    const decide = login({ acme: record("acme") });
    expect(await decide({ user: "tenant-acme", password: standInPassword("secret", "acme"), host: "h" })).toMatchObject({ kind: "admitted", name: "stand-in" });
    for (const [user, password] of [
      ["tenant-acme", standInPassword("secret", "rival")],
      ["tenant-acme", standInPassword("other", "acme")],
      ["tenant-rival", standInPassword("secret", "rival")],
      ["tenant-", ""],
    ] as const)
      expect(await decide({ user, password, host: "h" })).toMatchObject({ kind: "refused" });
  });

  test.each([
    ["nothing", {}],
    ["another tenant's key", { token: keyOf("rival") }],
    ["a user's name alone", { user: "tenant-acme" }],
    ["an operator's key", { token: keyOf("system") }],
  ])("with %s is refused", async (_, shown: object) => {
    expect(await login({ acme: record("acme"), system: record("system", { scopes: ["operator:write"] }) })({ ...shown, host: "h" })).toMatchObject({
      kind: "refused",
    });
  });

  test("of a suspended tenant, or when nothing can be read, is refused", async () => {
    expect(await login({ acme: { ...record("acme"), state: "suspended" } })({ token: keyOf("acme"), host: "h" })).toEqual({
      kind: "refused",
      reason: "forbidden",
    });
    const away = createNatsAuth({
      accounts: createEdgeAccounts({ bus: brokerWith().connect("g"), count: 1 }),
      tenantOf: () => Promise.reject(new Error("away")),
      now_ms: () => NOW_MS,
      metrics: silentMetrics,
      log: silentLog,
    });
    expect(await away({ token: keyOf("acme"), host: "h" })).toEqual({ kind: "refused", reason: "unavailable" });
  });
});

test("every subject that a scope gives names the tenant, whatever its id", () => {
  for (const tenant of ["acme", "a-_Z9", "tenant", "live"])
    for (const scopes of [[], ["sessions:read"], ["sessions:write"], ["sessions:read", "sessions:write", "admin"]] as const) {
      const { publish, subscribe } = tenantPermissions(tenant, new Set(scopes));
      for (const subject of [...publish, ...subscribe]) expect(subject.split(".").some((word) => word === tenant || word === `_INBOX_${tenant}`)).toBe(true);
      expect(publish.length > 0).toBe(scopes.length > 0);
      expect(subscribe).toContain(`_INBOX_${tenant}.>`);
    }
});
