// Goal:   a JWT counts exactly when a configured issuer signed it for us, it has not ended, and it names a tenant; keys rotate; nothing else gets in.
// Method: an issuer on this machine that signs with keys of its own and serves them; the clock is the test's.
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { exportJWK, generateKeyPair, type GenerateKeyPairResult, type JWTPayload, SignJWT } from "jose";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import type { TenantRecord } from "../../actors/directory.ts";
import { authenticate } from "../../gateway/authenticate.ts";
import { createOidc, type Oidc } from "../../gateway/oidc.ts";
import { readOidc } from "../../gateway/oidc-issuers.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld } from "../../roles/real-world.ts";

interface Pair extends GenerateKeyPairResult {
  readonly kid: string;
}
let server: Server;
let issuer = "";
let served: Pair[] = [];
let fetched = 0;
let broken = false;
let now_ms = Date.now();
let oidc: Oidc;

async function pair(kid: string): Promise<Pair> {
  return { kid, ...(await generateKeyPair("ES256", { extractable: true })) };
}

beforeAll(async () => {
  server = createServer((request, response) => {
    void (async () => {
      if (broken) return void response.writeHead(500).end();
      if (request.url?.includes("openid-configuration")) return void response.end(JSON.stringify({ jwks_uri: `${issuer}/keys` }));
      fetched += 1;
      response.end(
        JSON.stringify({
          keys: await Promise.all(served.map(async ({ kid, publicKey }) => ({ ...(await exportJWK(publicKey)), kid, alg: "ES256", use: "sig" }))),
        }),
      );
    })();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  issuer = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
});
afterAll(() => void server.close());

const fresh = (more: object = {}): Oidc => {
  const read = readOidc(JSON.stringify({ issuer, audience: "troupe", tenant_claim: "org.id", roles_claim: "roles", ...more }));
  if (read.kind === "invalid") throw new Error(read.fault);
  return createOidc({ issuers: read.issuers, world: { ...realWorld(), now_ms: () => now_ms }, log: silentLog, fetch });
};
beforeEach(async () => {
  now_ms = Date.now();
  broken = false;
  served = [await pair("one")];
  oidc = fresh();
});

const CLAIMS = { org: { id: "acme" }, roles: ["sessions:read"] };
async function token(
  claims: JWTPayload = CLAIMS,
  { key = served[0]!, more = {}, kid = key.kid }: { key?: Pair; more?: Record<string, unknown>; kid?: string } = {},
): Promise<string> {
  const seconds = Math.floor(now_ms / 1000);
  return new SignJWT({ iss: issuer, aud: "troupe", sub: "ann", iat: seconds, exp: seconds + 300, ...claims, ...more })
    .setProtectedHeader({ alg: "ES256", kid })
    .sign(key.privateKey);
}

describe("a token", () => {
  test("names tenant, subject, roles and its end", async () => {
    expect(await oidc.verify(await token())).toEqual({
      kind: "verified",
      tenant: "acme",
      subject: "ann",
      roles: ["sessions:read"],
      expires_at_ms: (Math.floor(now_ms / 1000) + 330) * 1000,
    });
    expect(await oidc.verify(await token({ ...CLAIMS, roles: "admin other" }))).toMatchObject({ roles: ["admin", "other"] });
    expect(await oidc.verify(await token({ org: { id: "acme" } }))).toMatchObject({ roles: [] });
  });

  const bad: readonly [string, () => Promise<string>][] = [
    ["of another issuer", () => token(CLAIMS, { more: { iss: "https://elsewhere.example" } })],
    ["for another audience", () => token(CLAIMS, { more: { aud: "other" } })],
    ["without an end", () => token(CLAIMS, { more: { exp: undefined } })],
    ["without a subject", () => token(CLAIMS, { more: { sub: undefined } })],
    ["that has ended", () => token(CLAIMS, { more: { exp: Math.floor(now_ms / 1000) - 31 } })],
    ["that has not begun", () => token(CLAIMS, { more: { nbf: Math.floor(now_ms / 1000) + 60 } })],
    ["without a tenant", () => token({ roles: ["admin"] })],
    ["with a tenant that is no id", () => token({ org: { id: "acme.>" } })],
    ["that names the system tenant", () => token({ org: { id: "system" }, roles: ["operator:write"] })],
    ["signed by somebody else under a known key's name", async () => token(CLAIMS, { key: await pair("one") })],
    [
      "signed with a shared secret",
      async () =>
        new SignJWT({ iss: issuer, aud: "troupe", sub: "ann", ...CLAIMS })
          .setProtectedHeader({ alg: "HS256", kid: "one" })
          .setExpirationTime("5m")
          .sign(new TextEncoder().encode("x".repeat(32))),
    ],
    ["not signed at all", async () => `${Buffer.from('{"alg":"none"}').toString("base64url")}.${(await token()).split(".")[1]}.`],
    [
      "with other claims than were signed",
      async () =>
        (await token())
          .split(".")
          .with(1, Buffer.from(JSON.stringify({ iss: issuer, aud: "troupe", sub: "ann", exp: 9e9, org: { id: "rival" } })).toString("base64url"))
          .join("."),
    ],
    ["that is none", async () => "a.b.c"],
  ];
  test.each(bad)("is refused: one %s", async (_, made) => {
    expect(await oidc.verify(await made())).toEqual({ kind: "refused" });
  });

  test("half a minute off counts, since clocks differ", async () => {
    expect(await oidc.verify(await token(CLAIMS, { more: { exp: Math.floor(now_ms / 1000) - 20 } }))).toMatchObject({ kind: "verified" });
    expect(await oidc.verify(await token(CLAIMS, { more: { nbf: Math.floor(now_ms / 1000) + 20 } }))).toMatchObject({ kind: "verified" });
  });

  test("an issuer that may name operators names one", async () => {
    expect(await fresh({ operators: true }).verify(await token({ org: { id: "system" }, roles: ["operator:write"] }))).toMatchObject({
      kind: "verified",
      tenant: "system",
    });
  });
});

describe("an issuer's keys", () => {
  test("are fetched once for many tokens, and again for a key that is new", async () => {
    fetched = 0;
    for (let n = 0; n < 5; n += 1) await oidc.verify(await token());
    expect(fetched).toBe(1);
    const made_up = await token(CLAIMS, { key: await pair("made-up") });
    for (let n = 0; n < 5; n += 1) expect(await oidc.verify(made_up)).toEqual({ kind: "refused" });
    // What was fetched a moment ago is not fetched again for every name that somebody makes up.
    expect(fetched).toBeLessThanOrEqual(2);
  });

  test("that were rotated count in a process that starts, the old ones no more", async () => {
    const [old] = served;
    served = [await pair("two")];
    const later = fresh();
    expect(await later.verify(await token())).toMatchObject({ kind: "verified" });
    expect(await later.verify(await token(CLAIMS, { key: old! }))).toEqual({ kind: "refused" });
  });

  test("that cannot be fetched are an outage and not a refusal, and the next token asks again", async () => {
    broken = true;
    expect(await oidc.verify(await token())).toEqual({ kind: "unavailable" });
    broken = false;
    expect(await oidc.verify(await token())).toMatchObject({ kind: "verified" });
  });
});

test.each([
  ["not json", "x"],
  ["no audience", JSON.stringify({ issuer: "https://a.example" })],
  ["keys in the clear from elsewhere", JSON.stringify({ issuer: "http://a.example", audience: "x" })],
  ["an empty list", "[]"],
])("a configuration is refused: %s", (_, text) => {
  expect(readOidc(text)).toMatchObject({ kind: "invalid", fault: expect.any(String) });
});

describe("as a principal", () => {
  const record = { state: "active", name: null, keys: {}, agents: {} } as unknown as TenantRecord;
  const asked = async (claims: JWTPayload, tenants: Record<string, TenantRecord>) =>
    authenticate(await token(claims), { oidc, now_ms: () => now_ms, tenantOf: async (id) => (Object.hasOwn(tenants, id) ? tenants[id] : undefined) });

  test("it has the scopes that its roles name and no others", async () => {
    const answer = await asked({ ...CLAIMS, roles: ["sessions:read", "operator:write", "boss"] }, { acme: record });
    expect(answer).toMatchObject({ kind: "principal", principal: { kind: "tenant", tenant: "acme", name: "jwt:ann", scopes: new Set(["sessions:read"]) } });
    expect(await asked({ org: { id: "acme" } }, { acme: record })).toMatchObject({ principal: { scopes: new Set() } });
  });

  test("of a tenant that is not there, or is suspended, it is refused", async () => {
    expect(await asked(CLAIMS, {})).toMatchObject({ error: { code: "unauthenticated" } });
    expect(await asked(CLAIMS, { acme: { ...record, state: "suspended" } })).toMatchObject({ error: { code: "forbidden" } });
  });

  test("without any configured issuer no token counts", async () => {
    expect(await authenticate(await token(), { now_ms: () => now_ms, tenantOf: async () => record })).toMatchObject({ error: { code: "unauthenticated" } });
  });
});
