// Goal: a tenant's configuration keeps T1 to T4, and each command is answered in each state as its page says.
// Method: every state crossed with every command; stories for keys and agents at their bounds.
import { describe, expect, test } from "vitest";
import { agentConfig, COMMANDS } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { coreOf } from "../../state-machines/step.ts";
import {
  TENANT_AGENTS_MAX,
  TENANT_BYTES_MAX,
  TENANT_KEYS_MAX,
  TENANT_PROVIDER_KEYS_MAX,
  TENANT_ROLES_MAX,
  type TenantContext,
  tenantContextOf,
  tenantDefinition,
} from "../../state-machines/tenant.ts";
import { Drive } from "./drive.ts";

const core = coreOf(tenantDefinition);
const hash = (n: number): string => n.toString(16).padStart(64, "0");
const config = (instructions = ""): JsonObject => agentConfig.parse({ model: "simulated/echo", instructions }) as unknown as JsonObject;
const key = (n: number, more: JsonObject = {}): JsonObject => ({ key_id: `k${n}`, hash: hash(n), scopes: ["sessions"], ...more });
const sealed = (n: number, master_key_id = "m1"): JsonObject => ({ v: 1, master_key_id, nonce: `nonce${n}`.padEnd(16, "x"), ciphertext: `cipher${n}` });
const providerKey = (n: number, more: JsonObject = {}): JsonObject => ({ provider: "openai", sealed: sealed(n), last_four: "wxyz", ...more });
const active = (): Drive => new Drive(core, { tenant: "acme", kind: "tenant", id: "main" }).create({ name: "Acme" });
const suspended = (): Drive => {
  const drive = active();
  drive.tell("tenant.suspend", { reason: "unpaid" });
  return drive;
};
const contextOf = (drive: Drive): TenantContext => tenantContextOf(drive.view);

const BODIES: Record<string, JsonObject> = {
  "key.create": key(1),
  "key.revoke": { key_id: "k9" },
  "key.expire": { key_id: "k9", expires_at: "2030-01-01T00:00:00Z" },
  "agent.put": { agent: "a", config: config() },
  "tenant.configure": { default: "deny" },
  "grant.put": { role: "writer", allow: ["tool:now"], deny: [] },
  "provider_key.put": providerKey(1),
  "provider_key.remove": { provider: "openai" },
  "provider_key.reseal": { provider: "openai", sealed: sealed(2), replaces: "nonce1xxxxxxxxxx" },
};
const TABLE: Record<string, Record<string, string>> = {
  active: {
    "tenant.create": "illegal_transition",
    "tenant.suspend": "suspended",
    "tenant.resume": "illegal_transition",
    "key.create": "active",
    "key.revoke": "not_found",
    "key.expire": "not_found",
    "agent.put": "active",
    "tenant.configure": "active",
    "grant.put": "active",
    "config.updated": "active",
    "provider_key.put": "active",
    "provider_key.remove": "not_found",
    "provider_key.reseal": "not_found",
  },
  suspended: {
    "tenant.create": "illegal_transition",
    "tenant.suspend": "illegal_transition",
    "tenant.resume": "active",
    "key.create": "suspended",
    "key.revoke": "not_found",
    "key.expire": "not_found",
    "agent.put": "suspended",
    "tenant.configure": "suspended",
    "grant.put": "suspended",
    "config.updated": "suspended",
    "provider_key.put": "suspended",
    "provider_key.remove": "not_found",
    "provider_key.reseal": "not_found",
  },
};

describe("every state crossed with every command", () => {
  const ways: Record<string, () => Drive> = { active, suspended };
  const cases = Object.entries(TABLE).flatMap(([state, row]) => Object.entries(row).map(([command, leads_to]) => ({ state, command, leads_to })));
  test("the table is whole", () => {
    expect(Object.keys(TABLE).sort()).toEqual(Object.keys(tenantDefinition.machine.states).sort());
    for (const row of Object.values(TABLE)) expect(Object.keys(row).sort()).toEqual(Object.keys(COMMANDS.tenant).sort());
  });
  test.each(cases)("$state takes $command to $leads_to", ({ state, command, leads_to }) => {
    const drive = ways[state]?.() ?? active();
    expect(drive.at).toBe(state);
    expect(drive.command(command, BODIES[command] ?? {})?.code ?? drive.at).toBe(leads_to);
  });
});

test("creation, suspension and its end are told with their reason", () => {
  const drive = suspended();
  expect(tenantDefinition.waits(drive.view)).toBe("suspended (unpaid): waits for tenant.resume");
  drive.tell("tenant.resume");
  expect(drive.events).toEqual([
    { type: "tenant.created", name: "Acme" },
    { type: "tenant.state", from: "active", to: "suspended", reason: "unpaid" },
    { type: "tenant.state", from: "suspended", to: "active" },
  ]);
});

describe("keys at model providers", () => {
  test("are kept sealed, told without what is sealed, and counted from one put to the next", () => {
    const drive = active();
    expect(contextOf(drive).provider_keys).toBeUndefined();
    expect(drive.tell("provider_key.put", providerKey(1, { label: "team" }))).toEqual({ provider: "openai", version: 1 });
    const first_ms = drive.at_ms;
    expect(drive.told).toEqual([{ type: "provider_key.put", provider: "openai", version: 1, last_four: "wxyz", label: "team", master_key_id: "m1" }]);
    expect(drive.later(5).tell("provider_key.put", providerKey(2, { last_four: null }))).toEqual({ provider: "openai", version: 2 });
    expect(contextOf(drive).provider_keys).toEqual({
      openai: { sealed: sealed(2), last_four: null, label: "team", version: 2, created_at_ms: first_ms, rotated_at_ms: drive.at_ms },
    });
  });

  test("are gone when they are removed, and only the one that was named", () => {
    const drive = active();
    drive.tell("provider_key.put", providerKey(1));
    drive.tell("provider_key.put", providerKey(2, { provider: "anthropic" }));
    drive.tell("provider_key.remove", { provider: "openai", reason: "leaked" });
    expect(drive.told).toEqual([{ type: "provider_key.removed", provider: "openai", reason: "leaked" }]);
    expect(Object.keys(contextOf(drive).provider_keys ?? {})).toEqual(["anthropic"]);
    expect(drive.refusal("provider_key.remove", { provider: "openai" })).toMatchObject({ code: "not_found" });
    expect(drive.tell("provider_key.put", providerKey(3))).toEqual({ provider: "openai", version: 1 });
  });

  test("T6: sealing anew changes the seal alone", () => {
    const drive = active();
    drive.tell("provider_key.put", providerKey(1, { label: "team" }));
    const before = contextOf(drive).provider_keys?.["openai"];
    drive.later(5).tell("provider_key.reseal", { provider: "openai", sealed: sealed(2, "m2"), replaces: before?.sealed.nonce ?? "" });
    expect(drive.told).toEqual([{ type: "provider_key.resealed", provider: "openai", master_key_id: "m2", from: "m1" }]);
    expect(contextOf(drive).provider_keys?.["openai"]).toEqual({ ...before, sealed: sealed(2, "m2") });
  });

  test("T6: a key that was put or removed since it was opened is not overwritten by its older self", () => {
    const drive = active();
    drive.tell("provider_key.put", providerKey(1));
    const opened = contextOf(drive).provider_keys?.["openai"]?.sealed.nonce ?? "";
    drive.tell("provider_key.put", providerKey(2));
    const late = { provider: "openai", sealed: sealed(9, "m2"), replaces: opened };
    expect(drive.refusal("provider_key.reseal", late)).toMatchObject({ code: "conflict" });
    expect(contextOf(drive).provider_keys?.["openai"]?.sealed).toEqual(sealed(2));
    drive.tell("provider_key.remove", { provider: "openai" });
    expect(drive.refusal("provider_key.reseal", late)).toMatchObject({ code: "not_found" });
  });

  test("T4: there are at most 32, and one of them can always be put again", () => {
    const drive = active();
    for (let n = 0; n < TENANT_PROVIDER_KEYS_MAX; n++) drive.tell("provider_key.put", providerKey(n, { provider: `p${n}` }));
    expect(drive.refusal("provider_key.put", providerKey(99, { provider: "more" }))).toMatchObject({ code: "invalid" });
    expect(drive.tell("provider_key.put", providerKey(99, { provider: "p0" }))).toEqual({ provider: "p0", version: 2 });
  });
});

describe("keys", () => {
  test("are listed by their hash, and told without it", () => {
    const drive = active();
    expect(drive.tell("key.create", key(1, { label: "ci" }))).toEqual({ key_id: "k1" });
    expect(drive.told).toEqual([{ type: "key.created", key_id: "k1", scopes: ["sessions"], label: "ci" }]);
    expect(contextOf(drive).keys).toEqual({ k1: { hash: hash(1), scopes: ["sessions"], label: "ci", created_at_ms: drive.at_ms, revoked_at_ms: null } });
  });

  test("T1: an id, and a key, is listed once", () => {
    const drive = active();
    drive.tell("key.create", key(1));
    expect(drive.refusal("key.create", { ...key(1), hash: hash(2) })).toMatchObject({ code: "conflict" });
    expect(drive.refusal("key.create", { ...key(2), hash: hash(1) })).toMatchObject({ code: "conflict" });
  });

  test("T2: a revoked key stays revoked, and revoking it again is no news", () => {
    const drive = active();
    drive.tell("key.create", key(1));
    drive.later(5).tell("key.revoke", { key_id: "k1", reason: "leaked" });
    expect(drive.told).toEqual([{ type: "key.revoked", key_id: "k1", reason: "leaked" }]);
    const revoked = contextOf(drive).keys;
    expect(revoked["k1"]?.revoked_at_ms).toBe(drive.at_ms);
    expect(drive.later(5).tell("key.revoke", { key_id: "k1" })).toEqual({ key_id: "k1" });
    expect([drive.told, contextOf(drive).keys]).toEqual([[], revoked]);
    expect(drive.refusal("key.create", key(1))).toMatchObject({ code: "conflict" });
  });

  test("T4: at most 1,000 work; revoked ones are forgotten, oldest first, when there is no room", () => {
    const drive = active();
    drive.thorough = false;
    for (let n = 0; n < TENANT_KEYS_MAX; n++) drive.tell("key.create", key(n));
    expect(drive.refusal("key.create", key(TENANT_KEYS_MAX))).toMatchObject({ code: "invalid", details: { keys_max: TENANT_KEYS_MAX } });
    drive.later(1).tell("key.revoke", { key_id: "k7" });
    drive.later(1).tell("key.revoke", { key_id: "k3" });
    drive.tell("key.create", key(TENANT_KEYS_MAX));
    expect(Object.keys(contextOf(drive).keys)).toHaveLength(TENANT_KEYS_MAX);
    expect([contextOf(drive).keys["k7"], contextOf(drive).keys["k3"]?.revoked_at_ms]).toEqual([undefined, drive.at_ms]);
  });
});

describe("agents", () => {
  test("T3: the version rises exactly when the configuration changes", () => {
    const drive = active();
    const first = drive.tell("agent.put", { agent: "a", config: config("one") });
    expect(first).toMatchObject({ agent: "a", version: 1 });
    expect(drive.told).toEqual([{ type: "agent.put", ...first }]);
    const reordered = Object.fromEntries(Object.entries(config("one")).reverse());
    expect(drive.tell("agent.put", { agent: "a", config: reordered })).toEqual(first);
    expect(drive.told).toEqual([]);
    expect(drive.later(9).tell("agent.put", { agent: "a", config: config("two") })).toMatchObject({ version: 2 });
    expect(drive.tell("agent.put", { agent: "a", config: config("one") })).toEqual({ ...first, version: 3 });
    expect(drive.tell("agent.put", { agent: "b", config: config("one") })).toEqual({ ...first, agent: "b" });
    expect(contextOf(drive).agents["a"]).toEqual({ version: 3, hash: first.hash, config: config("one"), at_ms: drive.at_ms, config_epoch: 0 });
  });

  test("may have any name that an id may have", () => {
    const drive = active();
    for (const agent of ["__proto__", "constructor", "toString"]) {
      expect(drive.tell("agent.put", { agent, config: config() })).toMatchObject({ agent, version: 1 });
      expect(drive.tell("agent.put", { agent, config: config("x") })).toMatchObject({ agent, version: 2 });
      expect(drive.refusal("key.revoke", { key_id: agent })).toMatchObject({ code: "not_found" });
    }
    expect(Object.keys(contextOf(drive).agents)).toEqual(["__proto__", "constructor", "toString"]);
  });

  test("T4: are bounded in number and in bytes", () => {
    const drive = active();
    drive.thorough = false;
    for (let n = 0; n < TENANT_AGENTS_MAX; n++) drive.tell("agent.put", { agent: `a${n}`, config: config() });
    expect(drive.refusal("agent.put", { agent: "more", config: config() })).toMatchObject({ code: "invalid", details: { agents_max: TENANT_AGENTS_MAX } });
    expect(drive.refusal("agent.put", { agent: "a1", config: config("changed") })).toBeUndefined();
    const large = active();
    large.thorough = false;
    let put = 0;
    while (put < 100 && large.command("agent.put", { agent: `a${put}`, config: config("x".repeat(200_000)) }) === undefined) put += 1;
    expect(put).toBe(Math.floor(TENANT_BYTES_MAX / 200_300));
    expect(large.refusal("agent.put", { agent: "z", config: config("x".repeat(200_000)) })).toMatchObject({
      code: "too_large",
      details: { bytes_max: TENANT_BYTES_MAX },
    });
    expect(large.refusal("key.create", key(1, { label: "x" }))).toBeUndefined();
  });
});

describe("what running sessions must take up", () => {
  const epochs = (drive: Drive, agent: string): number => contextOf(drive).config_epoch + (contextOf(drive).agents[agent]?.config_epoch ?? 0);

  test("T5: an agent's epoch rises with critical puts and config.updated, for it or for all, and with no other change of it", () => {
    const drive = active();
    for (const agent of ["a", "b"]) drive.tell("agent.put", { agent, config: config("one"), critical: true });
    expect([epochs(drive, "a"), epochs(drive, "b")]).toEqual([0, 0]);
    drive.tell("agent.put", { agent: "a", config: config("two") });
    expect([epochs(drive, "a"), drive.types]).toEqual([0, ["agent.put"]]);
    drive.tell("agent.put", { agent: "a", config: config("three"), critical: true });
    expect([epochs(drive, "a"), epochs(drive, "b"), drive.types]).toEqual([1, 0, ["agent.put", "config.updated"]]);
    drive.tell("agent.put", { agent: "a", config: config("three"), critical: true });
    expect([epochs(drive, "a"), drive.types]).toEqual([2, ["config.updated"]]);
    drive.tell("config.updated", { agent: "b", reason: "the key leaked" });
    expect(drive.told).toEqual([{ type: "config.updated", agent: "b", config_epoch: 1, reason: "the key leaked" }]);
    drive.tell("config.updated");
    expect([epochs(drive, "a"), epochs(drive, "b")]).toEqual([3, 2]);
    drive.tell("agent.put", { agent: "a", config: config("four") });
    expect(epochs(drive, "a")).toBe(3);
    expect(drive.refusal("config.updated", { agent: "nobody" })).toMatchObject({ code: "not_found" });
  });

  test("T5: a change of what is permitted raises every agent's epoch, the same again does not", () => {
    const drive = active();
    drive.tell("agent.put", { agent: "a", config: config() });
    drive.tell("tenant.configure", { default: "deny", deny: ["tool:pay", "tool:pay"] });
    expect(contextOf(drive).policy).toEqual({ default: "deny", deny: ["tool:pay"] });
    expect(drive.types).toEqual(["tenant.configured", "config.updated"]);
    drive.tell("tenant.configure", { deny: ["tool:pay"] });
    expect([drive.told, epochs(drive, "a")]).toEqual([[], 1]);
    drive.tell("grant.put", { role: "writer", allow: ["tool:*"], deny: [] });
    drive.tell("grant.put", { role: "writer", allow: ["tool:*"], deny: [] });
    expect([contextOf(drive).grants, epochs(drive, "a")]).toEqual([{ writer: { allow: ["tool:*"], deny: [] } }, 2]);
    drive.tell("grant.put", { role: "writer", allow: [], deny: [] });
    drive.tell("grant.put", { role: "nobody", allow: [], deny: [] });
    expect([contextOf(drive).grants, epochs(drive, "a")]).toEqual([{}, 3]);
    expect(contextOf(drive).policy).toEqual({ default: "deny", deny: ["tool:pay"] });
  });

  test("T4: grants are bounded in number", () => {
    const drive = active();
    drive.thorough = false;
    for (let n = 0; n < TENANT_ROLES_MAX; n++) drive.tell("grant.put", { role: `r${n}`, allow: ["tool:*"], deny: [] });
    expect(drive.refusal("grant.put", { role: "more", allow: ["tool:*"], deny: [] })).toMatchObject({
      code: "invalid",
      details: { roles_max: TENANT_ROLES_MAX },
    });
    expect(drive.refusal("grant.put", { role: "r1", allow: [], deny: [] })).toBeUndefined();
  });
});

test("a tenant replays from its first entry to the same state", () => {
  const drive = active();
  drive.tell("key.create", key(1), { key: "idem" });
  drive.tell("agent.put", { agent: "a", config: config() });
  drive.tell("grant.put", { role: "writer", allow: ["tool:*"], deny: ["model:openai/*"] });
  drive.tell("tenant.configure", { default: "deny" });
  drive.tell("tenant.suspend");
  drive.tell("key.revoke", { key_id: "k1" });
  expect(drive.replayed()).toEqual({ saved: drive.saved, events: drive.events });
});
