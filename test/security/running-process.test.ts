// Goal:   a running process takes up what changes around it and goes on with nothing it does not know: an issuer's keys rotate, a key is used, and what
//         a tenant permits can no longer be read.
// Method: the whole of Troupe; an issuer of JWTs on this machine that changes its keys; a journal message of a tenant that nobody can read.
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { exportJWK, generateKeyPair, type GenerateKeyPairResult, SignJWT } from "jose";
import { connect } from "nats";
import { afterAll, beforeAll, expect, test } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import { startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

interface Pair extends GenerateKeyPairResult {
  readonly kid: string;
}
let issuer: Server;
let issuer_url = "";
let served: Pair[] = [];
let fetched = 0;
let troupe: Troupe;

const pair = async (kid: string): Promise<Pair> => ({ kid, ...(await generateKeyPair("ES256", { extractable: true })) });

beforeAll(async () => {
  issuer = createServer((request, response) => {
    void (async () => {
      if (request.url?.includes("openid-configuration")) return void response.end(JSON.stringify({ jwks_uri: `${issuer_url}/keys` }));
      fetched += 1;
      const keys = served.map(async ({ kid, publicKey }) => ({ ...(await exportJWK(publicKey)), kid, alg: "ES256", use: "sig" }));
      response.end(JSON.stringify({ keys: await Promise.all(keys) }));
    })();
  });
  await new Promise<void>((resolve) => issuer.listen(0, "127.0.0.1", resolve));
  issuer_url = `http://127.0.0.1:${(issuer.address() as AddressInfo).port}`;
  troupe = await startTroupe({ env: { TROUPE_OIDC: JSON.stringify({ issuer: issuer_url, audience: "troupe" }) } });
}, 120_000);
afterAll(() => void issuer.close());

async function token(key: Pair, claims: Record<string, unknown> = {}): Promise<string> {
  const now_s = Math.floor(Date.now() / 1000);
  const said = { iss: issuer_url, aud: "troupe", sub: "Ann Ö", tenant: "demo", roles: ["sessions:read", "sessions:write"], iat: now_s, exp: now_s + 300 };
  return new SignJWT({ ...said, ...claims }).setProtectedHeader({ alg: "ES256", kid: key.kid }).sign(key.privateKey);
}
const asks = async (key: string): Promise<number> => (await troupe.api("/v1/agents", { key })).status;

test("an issuer's new key counts in a running gateway, over HTTP and on the bus, and the one that it withdrew does not; a token names its subject in the journal", async () => {
  const [first, second] = [await pair("first"), await pair("second")];
  served = [first];
  expect(await asks(await token(first))).toBe(200);
  expect(await asks(await token({ ...second, kid: "first" }))).toBe(401);
  served = [second];
  const rotated = await token(second);
  // Keys are fetched again at most every ten seconds.
  expect(await until(async () => (await asks(rotated)) === 200, 45_000, 250)).toBe(true);
  expect(await asks(await token(first))).toBe(401);
  expect(fetched).toBeLessThan(6);

  const client = await connect({ servers: troupe.dev().nats_url, token: rotated, inboxPrefix: "_INBOX_demo", reconnect: false });
  const ack = await client
    .jetstream()
    .publish("tenant.demo.session.by-token.command", JSON.stringify({ type: "session.create", body: { agent: "assistant" } }));
  expect(ack.stream).toBe("COMMANDS");
  await client.close();
  await expect(connect({ servers: troupe.dev().nats_url, token: await token(first), reconnect: false })).rejects.toThrow(/authorization/i);

  expect((await troupe.api("/v1/sessions", { key: rotated, json: { id: "by-jwt", agent: "assistant" } })).status).toBe(201);
  const [created] = (await troupe.journal("demo/session/by-jwt")).flatMap(({ entries }) => [...entries]);
  expect(created).toMatchObject({ t: "init", principal: "jwt:Ann%20%C3%96" });
});

test("a key's last use is listed by the gateway at once, and by the command line when it was written", async () => {
  const { stdout } = await typed(troupe, ["keys", "create", "--tenant", "demo", "--scope", "admin", "--json"]);
  const { key, key_id } = JSON.parse(stdout) as { key: string; key_id: string };
  expect(await until(async () => (await troupe.api("/v1/keys", { key })).status === 200, 30_000, 100)).toBe(true);
  const { items } = await troupe.json<{ items: { key_id: string; last_used_at: string | null }[] }>(200, "/v1/keys", { key });
  expect(Date.parse(items.find((one) => one.key_id === key_id)?.last_used_at ?? "")).toBeGreaterThan(Date.now() - 60_000);
  const listed = async (): Promise<string | null | undefined> => {
    const { keys } = JSON.parse((await typed(troupe, ["keys", "list", "--tenant", "demo", "--json"])).stdout) as {
      keys: { key_id: string; last_used_at: string | null }[];
    };
    return keys.find((one) => one.key_id === key_id)?.last_used_at;
  };
  // What is noted is written within a minute, and when the gateway ends.
  const gateway = troupe.dev().processes.find(({ role }) => role === "gateway");
  process.kill(troupe.processOf("gateway"), "SIGTERM");
  expect(await until(async () => typeof (await listed()) === "string", 60_000, 100)).toBe(true);
  await troupe.replaced(gateway!);
  expect(await until(async () => (await troupe.api("/readyz", { key: null }).catch(() => undefined))?.status === 200, 60_000, 100)).toBe(true);
}, 120_000);

// The last one: what it breaks cannot be mended by anybody who may not change the journals.
test("what a tenant permits that cannot be read makes the gateway unready by the tenant's name, serves nothing of the tenant, and keeps a fresh gateway unready from its start", async () => {
  const ready = async (): Promise<{ status: number; text: string }> => {
    const answer = await troupe.api("/readyz", { key: null });
    return { status: answer.status, text: await answer.text() };
  };
  expect(await ready()).toMatchObject({ status: 200 });
  const bus = await troupe.bus();
  const data = new TextEncoder().encode("no journal message");
  expect(await bus.append({ subject: "tenant.broken.tenant.main.event", data, expected_last_sequence: 0, commit_id: "planted.1" })).toMatchObject({
    kind: "committed",
  });
  const refused = await troupe.api("/v1/agents", { key: `troupe.broken.000000000000.${"A".repeat(43)}` });
  expect([refused.status, await refused.json()]).toMatchObject([503, { code: "unavailable" }]);
  const said = await ready();
  expect(said).toMatchObject({ status: 503 });
  expect(said.text).toContain("what tenant 'broken' permits cannot be read");
  // A tenant whose data is there is served as before: the red light is for whoever sends traffic here.
  expect((await troupe.api("/v1/agents")).status).toBe(200);

  const killed = await troupe.kill9("gateway");
  expect(killed.role).toBe("gateway");
  expect(await until(async () => (await ready().catch(() => ({ text: "" }))).text.includes("what tenant 'broken' permits cannot be read"), 60_000, 100)).toBe(
    true,
  );
  expect((await ready()).status).toBe(503);
}, 120_000);
