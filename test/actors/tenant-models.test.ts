// Goal:   tenant-models keeps TM1 to TM3: whose key a call is made with, when a key is opened, and how long what was made with it is kept.
// Method: a provider on this machine that notes which key it was shown; tenants' records are put into a directory's place and changed at will.
import { randomBytes } from "node:crypto";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import { createCallAccount } from "../../actors/call-account.ts";
import type { TenantRecord } from "../../actors/directory.ts";
import { routeModelCall, type RouteOutcome } from "../../actors/model-routing.ts";
import { createTenantModels, refusalOfModel, type TenantModels } from "../../actors/tenant-models.ts";
import { drawMasterKey, type MasterKey, readMasterKeys, sealSecret } from "../../protocol/key-ring.ts";
import { silentLog } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import { createProviders, type Providers, type Resolution } from "../../providers/registry.ts";
import { realWorld } from "../../roles/real-world.ts";
import type { ProviderKey } from "../../state-machines/tenant.ts";
import { type ModelAnswer, type ModelServer, startModelServer } from "../contract/model-server.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { eventually } from "../harness/troupe.ts";

const PLATFORM_KEY = "platform-key-0123456789abcdef";
const keyOf = (tenant: string, n = 1): string => `own-key-of-${tenant}-${n}-0123456789`;

function masterKeys(): readonly MasterKey[] {
  const reading = readMasterKeys(drawMasterKey(randomBytes).line);
  if (reading.kind === "invalid") throw new Error(reading.fault);
  return reading.keys;
}

let server: ModelServer;
let answer: ModelAnswer = { text: "hello" };
let keys = masterKeys();
let records: Map<string, TenantRecord | Error>;
let providers: Providers;
let models: TenantModels;

const record = (provider_keys: Record<string, ProviderKey> = {}): TenantRecord => ({
  state: "active",
  name: null,
  keys: {},
  agents: {},
  policy: { default: "allow", deny: [] },
  grants: {},
  config_epoch: 0,
  provider_keys,
});
const sealed = (secret: string, tenant: string, provider = "openai", under = keys): ProviderKey => ({
  sealed: sealSecret(under, secret, { tenant, provider }, randomBytes),
  last_four: null,
  label: null,
  version: 1,
  created_at_ms: 0,
  rotated_at_ms: 0,
});

function modelsOf(world: World): TenantModels {
  return createTenantModels({
    providers,
    directory: {
      async tenant(id) {
        const known = records.get(id);
        if (known instanceof Error) throw known;
        return known;
      },
    },
    master_keys: () => keys,
    world,
    log: silentLog,
  });
}

beforeAll(async () => {
  server = await startModelServer({ answer: () => answer });
});
afterAll(() => server.close());
beforeEach(() => {
  answer = { text: "hello" };
  keys = masterKeys();
  records = new Map();
  const world = realWorld();
  providers = createProviders({
    world,
    log: silentLog,
    openai: { api_key: PLATFORM_KEY, base_url: `${server.url}/v1` },
    anthropic: { api_key: "", base_url: server.url },
    compatible: [{ name: "vllm", base_url: `${server.url}/v1` }],
  });
  models = modelsOf(world);
});

/** The one call that was made of a tenant's model, and the key that it showed. */
async function call(tenant: string, model = "openai/gpt-5.6-luna"): Promise<{ shown: string; key_source: string; owner: string }> {
  const resolution = await models.of(tenant).resolve(model);
  if (resolution.kind === "refused") throw new Error(`${resolution.error.code}: ${resolution.error.message}`);
  const before = server.requests.length;
  const request = {
    model: resolution.model,
    instructions: "",
    messages: [{ role: "user", text: "hi" }],
    tools: [],
    max_output_tokens: 9,
    idempotency_key: "i",
  } as const;
  await resolution.provider.call(request, { signal: new AbortController().signal, on_delta: () => undefined });
  expect(server.requests.length).toBe(before + 1);
  const { headers } = server.requests[before]!;
  return { shown: String(headers["authorization"] ?? headers["x-api-key"]), key_source: resolution.key_source, owner: resolution.owner };
}

const refusal = (resolution: Resolution): string => (resolution.kind === "refused" ? resolution.error.code : "none");

describe("whose key a provider is shown", () => {
  test("is the tenant's own where it has one, and the platform's for everybody else", async () => {
    records.set("acme", record({ openai: sealed(keyOf("acme"), "acme") }));
    records.set("rival", record());
    expect(await call("acme")).toEqual({ shown: `Bearer ${keyOf("acme")}`, key_source: "tenant", owner: "tenant.acme" });
    expect(await call("rival")).toEqual({ shown: `Bearer ${PLATFORM_KEY}`, key_source: "platform", owner: "platform" });
    expect(await call("acme", "vllm/some-model")).toMatchObject({ key_source: "platform" });
  });

  test("is the same for both of a provider's dialects", async () => {
    records.set("acme", record({ openai: sealed(keyOf("acme"), "acme") }));
    expect(await call("acme", "openai-responses/gpt-5.6-luna")).toMatchObject({ shown: `Bearer ${keyOf("acme")}`, key_source: "tenant" });
  });

  test("can be a tenant's own where the platform has none: the provider is there for that tenant alone", async () => {
    records.set("acme", record({ anthropic: sealed(keyOf("acme"), "acme", "anthropic") }));
    records.set("rival", record());
    expect(await call("acme", "anthropic/claude-sonnet-5")).toMatchObject({ shown: expect.stringContaining(keyOf("acme")), key_source: "tenant" });
    expect(refusal(await models.of("rival").resolve("anthropic/claude-sonnet-5"))).toBe("model_unknown");
    const [acme, rival] = [records.get("acme") as TenantRecord, records.get("rival") as TenantRecord];
    expect(refusalOfModel(providers, acme, "anthropic/claude-sonnet-5")).toBeUndefined();
    expect(refusalOfModel(providers, rival, "anthropic/claude-sonnet-5")?.code).toBe("model_unknown");
  });

  test("is the one that was put last, and the platform's again when it is removed", async () => {
    records.set("acme", record({ openai: sealed(keyOf("acme", 1), "acme") }));
    expect((await call("acme")).shown).toBe(`Bearer ${keyOf("acme", 1)}`);
    records.set("acme", record({ openai: sealed(keyOf("acme", 2), "acme") }));
    expect((await call("acme")).shown).toBe(`Bearer ${keyOf("acme", 2)}`);
    records.set("acme", record());
    expect((await call("acme")).shown).toBe(`Bearer ${PLATFORM_KEY}`);
  });
});

describe("TM1: the platform's key never stands in for a tenant's own", () => {
  test.each([
    ["its master key is not there", () => sealed(keyOf("acme"), "acme", "openai", masterKeys())],
    ["it was sealed for another tenant", () => sealed(keyOf("rival"), "rival")],
    ["it was sealed for another provider", () => sealed(keyOf("acme"), "acme", "anthropic")],
  ])("when %s", async (_why, make) => {
    records.set("acme", record({ openai: make() }));
    const before = server.requests.length;
    const resolution = await models.of("acme").resolve("openai/gpt-5.6-luna");
    expect(refusal(resolution)).toBe("provider_key_unusable");
    expect(JSON.stringify(resolution)).not.toContain("own-key");
    expect(server.requests.length).toBe(before);
  });

  test("when it cannot be known whether the tenant has one", async () => {
    records.set("acme", new Error("the bus is away"));
    const resolution = await models.of("acme").resolve("openai/gpt-5.6-luna");
    expect(resolution).toMatchObject({ kind: "refused", error: { code: "provider_unavailable", transient: true } });
  });

  test("and once the master key is there again, the tenant's own is used", async () => {
    const theirs = keys;
    records.set("acme", record({ openai: sealed(keyOf("acme"), "acme") }));
    keys = masterKeys();
    expect(refusal(await models.of("acme").resolve("openai/gpt-5.6-luna"))).toBe("provider_key_unusable");
    keys = [...keys, ...theirs];
    expect((await call("acme")).shown).toBe(`Bearer ${keyOf("acme")}`);
  });
});

describe("a client with a key", () => {
  const client = async (tenant: string) => {
    const resolution = await models.of(tenant).resolve("openai/gpt-5.6-luna");
    return resolution.kind === "resolved" ? resolution.provider : undefined;
  };

  test("TM2: is kept for its tenant alone, and is another one after anything of the tenant changed", async () => {
    for (const tenant of ["acme", "rival"]) records.set(tenant, record({ openai: sealed(keyOf(tenant), tenant) }));
    const [acme, rival] = [await client("acme"), await client("rival")];
    expect(acme).not.toBe(rival);
    expect(await client("acme")).toBe(acme);
    models.forget("acme");
    expect(await client("acme")).not.toBe(acme);
    expect(await client("rival")).toBe(rival);
  });

  test("TM3: is dropped when it was not used for ten minutes, and stays while it is used", async () => {
    const world = new VirtualWorld(3);
    models = modelsOf(world);
    for (const tenant of ["acme", "rival"]) records.set(tenant, record({ openai: sealed(keyOf(tenant), tenant) }));
    const [acme, rival] = [await client("acme"), await client("rival")];
    for (let minute = 0; minute < 12; minute++) {
      let over = false;
      world.after(60_000, () => (over = true));
      await world.until(() => over, 120_000);
      expect(await client("acme")).toBe(acme);
    }
    expect(await client("rival")).not.toBe(rival);
  });

  test("TM3: is one of a thousand at most; the one that was not used for longest goes first", async () => {
    for (let n = 0; n <= 1_000; n++) records.set(`t${n}`, record({ openai: sealed(keyOf(`t${n}`), `t${n}`) }));
    const [oldest, second] = [await client("t0"), await client("t1")];
    for (let n = 2; n < 1_000; n++) await client(`t${n}`);
    expect(await client("t0")).toBe(oldest);
    await client("t1000");
    expect(await client("t0")).toBe(oldest);
    expect(await client("t1")).not.toBe(second);
  });
});

test("a provider that fails a tenant's own key trips the breaker of that tenant alone", async () => {
  records.set("acme", record({ openai: sealed(keyOf("acme"), "acme") }));
  records.set("rival", record({ openai: sealed(keyOf("rival"), "rival") }));
  records.set("poor", record());
  const world = realWorld();
  const breakers = createBreakerBoard({ world, log: silentLog, worker: "w1" });
  const route = (tenant: string, signal = new AbortController().signal): Promise<RouteOutcome> =>
    routeModelCall(
      { world, models: models.of(tenant), breakers, account: createCallAccount({ attempt: 1, progress: () => undefined, so_far: () => undefined }) },
      {
        model: "openai/gpt-5.6-luna",
        fallbacks: {},
        attempt: 1,
        request: { instructions: "", messages: [{ role: "user", text: "hi" }], tools: [], max_output_tokens: 9, idempotency_key: "i" },
      },
      { signal, on_delta: () => undefined },
    );
  answer = { refusal: { status: 503, body: { error: { message: "down for this account" } } } };
  // With no other model to go to they would wait for the breaker's probe.
  const enough = new AbortController();
  const failing = [1, 2, 3].map(() => route("acme", enough.signal));
  await eventually(
    async () => breakers.readings(),
    (all) => all.some(({ state }) => state === "open"),
  );
  enough.abort();
  expect((await Promise.allSettled(failing)).filter((one) => one.status === "fulfilled" && one.value.kind === "completed")).toEqual([]);
  answer = { text: "hello" };
  expect(breakers.readings().filter(({ state }) => state !== "closed")).toMatchObject([{ provider: "openai", owner: "tenant.acme", state: "open" }]);
  for (const tenant of ["rival", "poor"])
    expect(await route(tenant)).toMatchObject({ kind: "completed", attempts: [{ key_source: tenant === "poor" ? "platform" : "tenant" }] });
});
