// Goal:   with the whole of Troupe running, each tenant's calls go out under its own key where it has one, and under the platform's where not; master
//         keys are replaced under way; a key that cannot be opened is never replaced by the platform's.
// Method: the real `up`, a provider on this machine that notes which key it was shown; keys are given over HTTP and at the command line.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { type ModelServer, startModelServer } from "../contract/model-server.ts";
import { eventually, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

const PLATFORM_KEY = "platform-0123456789abcdefghij";
const ACME_KEY = "acme-openai-0123456789abcdefghij";
const ACME_ANTHROPIC_KEY = "acme-anthropic-0123456789abcdefghij";
const OPENAI = "openai/gpt-5.6-luna";
const ANTHROPIC = "anthropic/claude-sonnet-5";

let server: ModelServer;
let troupe: Troupe;
const keys: Record<string, string> = {};
const admins: Record<string, string> = {};

async function cli(args: readonly string[], { stdin, code = 0 }: { stdin?: string; code?: number } = {}): Promise<Record<string, never>> {
  const ran = await typed(troupe, [...args, "--json"], stdin === undefined ? {} : { stdin });
  expect(ran, args.join(" ")).toMatchObject({ code });
  return JSON.parse(ran.stdout) as Record<string, never>;
}

beforeAll(async () => {
  server = await startModelServer({ answer: { text: "well said" } });
  troupe = await startTroupe({
    env: { OPENAI_API_KEY: PLATFORM_KEY, OPENAI_BASE_URL: `${server.url}/v1`, ANTHROPIC_BASE_URL: server.url },
  });
  for (const tenant of ["acme", "rival"]) {
    await cli(["tenants", "create", tenant]);
    keys[tenant] = String((await cli(["keys", "create", "--tenant", tenant]))["key"]);
    admins[tenant] = String((await cli(["keys", "create", "--tenant", tenant, "--scope", "admin"]))["key"]);
    await cli(["agents", "put", "--tenant", tenant, "-"], { stdin: JSON.stringify({ agent: "assistant", model: OPENAI, max_output_tokens: 50 }) });
  }
}, 120_000);
afterAll(() => server.close());

let sessions = 0;
/** One turn of a new session: the last event's type and reason, and the keys that the provider was shown meanwhile. */
async function turn(tenant: string, model = OPENAI): Promise<{ end: string; reason: unknown; message: unknown; shown: readonly string[] }> {
  const id = `s${(sessions += 1)}`;
  const made = await eventually(
    () => troupe.api("/v1/sessions", { key: keys[tenant]!, json: { id, agent: "assistant", overrides: { model } } }),
    ({ status }) => status === 201,
  );
  expect(made.status).toBe(201);
  const before = server.requests.length;
  let last: Record<string, unknown> = {};
  for await (const { event, data } of troupe.sse(`/v1/sessions/${id}/messages`, { key: keys[tenant]!, json: { content: "speak" } }))
    if (event?.startsWith("turn.")) last = data;
  const shown = server.requests.slice(before).map(({ headers }) => String(headers["authorization"] ?? headers["x-api-key"]).replace("Bearer ", ""));
  return { end: String(last["type"]), reason: last["reason"], message: last["message"], shown: [...new Set(shown)] };
}

test("before a tenant has a key of its own it is served with the platform's, and a provider without one is not there for it", async () => {
  expect(await turn("acme")).toMatchObject({ end: "turn.completed", shown: [PLATFORM_KEY] });
  const refused = await troupe.api("/v1/sessions", { key: keys["acme"]!, json: { id: "none", agent: "assistant", overrides: { model: ANTHROPIC } } });
  expect([refused.status, ((await refused.json()) as { code: string }).code]).toEqual([422, "model_unknown"]);
});

test("a key given over HTTP is used from the next call on, and for that tenant alone", async () => {
  const given = await troupe.json(201, "/v1/provider-keys/openai", { method: "PUT", key: admins["acme"]!, json: { key: ACME_KEY, label: "team" } });
  expect(given).toMatchObject({ provider: "openai", last_four: "ghij", version: 1 });
  expect(await turn("acme")).toMatchObject({ end: "turn.completed", shown: [ACME_KEY] });
  expect(await turn("rival")).toMatchObject({ end: "turn.completed", shown: [PLATFORM_KEY] });
  expect(await troupe.json(200, "/v1/provider-keys", { key: admins["rival"]! })).toEqual({ items: [] });
});

test("a key given at the command line makes a provider usable that the platform has no key for", async () => {
  expect(await cli(["provider-keys", "set", "--tenant", "acme", "anthropic"], { stdin: `${ACME_ANTHROPIC_KEY}\n` })).toMatchObject({
    version: 1,
    last_four: "ghij",
  });
  expect(await turn("acme", ANTHROPIC)).toMatchObject({ end: "turn.completed", shown: [ACME_ANTHROPIC_KEY] });
  const listed = await cli(["provider-keys", "list", "--tenant", "acme"]);
  expect(listed["provider_keys"]).toMatchObject([{ provider: "anthropic" }, { provider: "openai", label: "team" }]);
  const refused = await troupe.api("/v1/sessions", { key: keys["rival"]!, json: { id: "none", agent: "assistant", overrides: { model: ANTHROPIC } } });
  expect(refused.status).toBe(422);
});

test("an agent whose provider has no key for the tenant is refused with the session, unless another of its models can be had", async () => {
  const create = async (tenant: string, id: string, config: object): Promise<string> => {
    await cli(["agents", "put", "--tenant", tenant, "-"], { stdin: JSON.stringify({ agent: id, ...config }) });
    const ask = async () => {
      const answer = await troupe.api("/v1/sessions", { key: keys[tenant]!, json: { id: `of-${id}`, agent: id } });
      return `${answer.status} ${String(((await answer.json()) as { code?: string }).code)}`;
    };
    return eventually(ask, (said) => !said.includes("agent_unknown"));
  };
  expect(await create("rival", "claude", { model: ANTHROPIC })).toBe("422 model_unknown");
  expect(await create("rival", "either", { model: ANTHROPIC, fallbacks: { models: [OPENAI] } })).toBe("201 undefined");
  expect(await create("acme", "claude", { model: ANTHROPIC })).toBe("201 undefined");
});

test("a key for a provider that there is not is refused by name, at the command line and over HTTP", async () => {
  const ran = await typed(troupe, ["provider-keys", "set", "--tenant", "acme", "opnai"], { stdin: ACME_KEY });
  expect(ran.code).toBe(1);
  expect(ran.stderr).toMatch(/opnai.*anthropic, google, openai/);
  const answer = await troupe.api("/v1/provider-keys/simulated", { method: "PUT", key: admins["acme"]!, json: { key: ACME_KEY } });
  expect([answer.status, ((await answer.json()) as { code: string }).code]).toEqual([422, "invalid"]);
});

test("usage says with whose key each call was made; what was made with the tenant's own is metered and not billed", async () => {
  const usage = async (tenant: string): Promise<Record<string, unknown>[]> => {
    const { stdout } = await typed(troupe, ["usage", "--tenant", tenant, "--json"]);
    return stdout.trim() === ""
      ? []
      : stdout
          .trim()
          .split("\n")
          .map((line) => JSON.parse(line) as Record<string, unknown>);
  };
  const rows = await eventually(
    () => usage("acme"),
    (all) => all.length === 3,
  );
  const told = rows.map(({ model, key_source, cost_usd_micros, billed_usd_micros }) => ({
    model,
    key_source,
    free: billed_usd_micros === 0,
    costs: Number(cost_usd_micros) > 0,
  }));
  expect(told.reverse()).toEqual([
    { model: OPENAI, key_source: "platform", free: false, costs: true },
    { model: OPENAI, key_source: "tenant", free: true, costs: true },
    { model: ANTHROPIC, key_source: "tenant", free: true, costs: true },
  ]);
  expect((await usage("rival")).map((row) => row["key_source"])).toEqual(["platform"]);
  const completed = (await troupe.journal(`acme/session/s2`)).flatMap(({ events }) => events).find(({ type }) => type === "model.completed");
  expect(completed).toMatchObject({ key_source: "tenant" });
});

test("everything is sealed anew under a fresh master key while calls go on, and then opens without the old one", async () => {
  const file = join(troupe.home, "master-keys");
  const [old] = readFileSync(file, "utf8").split(":");
  const rotated = await cli(["provider-keys", "rotate", "--new"]);
  expect(rotated).toMatchObject({ resealed: 2, unopened: 0, unused_master_keys: [old] });
  const fresh = String(rotated["master_key_id"]);
  expect(await turn("acme")).toMatchObject({ end: "turn.completed", shown: [ACME_KEY] });
  expect(await cli(["provider-keys", "rotate"])).toMatchObject({ master_key_id: fresh, resealed: 0, unopened: 0 });
  writeFileSync(
    file,
    readFileSync(file, "utf8")
      .split("\n")
      .filter((line) => !line.startsWith(`${String(old)}:`))
      .join("\n"),
  );
  expect(await turn("acme", ANTHROPIC)).toMatchObject({ end: "turn.completed", shown: [ACME_ANTHROPIC_KEY] });
});

test("a key whose master key is gone fails the turn by name and calls nobody; back again, it is used", async () => {
  const file = join(troupe.home, "master-keys");
  const kept = readFileSync(file, "utf8");
  writeFileSync(file, `other:${Buffer.alloc(32, 7).toString("base64")}\n`);
  // A client that was made before is kept while the key is the same: what is said of the tenant lets go of it.
  await cli(["agents", "refresh", "--tenant", "acme"]);
  const failed = await eventually(
    () => turn("acme"),
    ({ end }) => end === "turn.failed",
  );
  expect(failed).toMatchObject({ end: "turn.failed", reason: "provider_key_unusable", shown: [] });
  expect(await turn("rival")).toMatchObject({ end: "turn.completed", shown: [PLATFORM_KEY] });
  const rotated = await cli(["provider-keys", "rotate"], { code: 1 });
  expect(rotated).toMatchObject({ resealed: 0, unopened: 2 });
  writeFileSync(file, kept);
  expect(await turn("acme")).toMatchObject({ end: "turn.completed", shown: [ACME_KEY] });
});

test("a key that is removed is not shown any more: the platform's serves again, or nobody does", async () => {
  await troupe.json(200, "/v1/provider-keys/openai/remove", { method: "POST", key: admins["acme"]!, json: { reason: "done" } });
  await cli(["provider-keys", "remove", "--tenant", "acme", "anthropic"]);
  expect(await turn("acme")).toMatchObject({ end: "turn.completed", shown: [PLATFORM_KEY] });
  const asks = { key: keys["acme"]!, json: { id: "none", agent: "assistant", overrides: { model: ANTHROPIC } } };
  const refused = await eventually(
    () => troupe.api("/v1/sessions", asks),
    ({ status }) => status === 422,
  );
  expect(refused.status).toBe(422);
});
