// Goal:   over HTTP a tenant's administrator gives, lists and takes away the tenant's own provider keys, and PK1: the key is in nothing that is said,
//         stored, logged or answered.
// Method: fetch against a gateway with an in-memory broker; what the broker stored and what was logged is searched for the key, as it is and encoded.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { hashKey } from "../../protocol/api-key.ts";
import { openSecret, type SealedSecret } from "../../protocol/key-ring.ts";
import { bearer, keyOf, MASTER_KEYS, type SmallCell, startSmallCell } from "./small-cell.ts";

const SECRET = "sk-proj-WINTERGREEN0123456789wxyz";

let cell: SmallCell;
const answers: string[] = [];
beforeAll(async () => {
  cell = await startSmallCell({ tenants: ["acme", "rival"] });
  for (const tenant of ["acme", "rival"]) await cell.tell(tenant, "key.create", { key_id: "boss", hash: hashKey(keyOf(tenant, "boss")), scopes: ["admin"] });
});
afterAll(() => cell.end());

type Body = Record<string, unknown>;
async function ask(
  method: string,
  path: string,
  { key = keyOf("acme", "boss"), body, raw }: { key?: string; body?: Body; raw?: string } = {},
  url = cell.gateway.url,
) {
  const payload = raw ?? (body === undefined ? undefined : JSON.stringify(body));
  const answer = await fetch(url + path, {
    method,
    headers: { ...bearer(key), ...(payload === undefined ? {} : { "content-type": "application/json" }) },
    ...(payload === undefined ? {} : { body: payload }),
  });
  const text = await answer.text();
  answers.push(`${JSON.stringify([...answer.headers])} ${text}`);
  return { status: answer.status, body: JSON.parse(text) as Body };
}
const listed = async (key?: string): Promise<readonly Body[]> =>
  (await ask("GET", "/v1/provider-keys", key === undefined ? {} : { key })).body["items"] as Body[];

interface Entered {
  readonly type?: string;
  readonly body: { readonly sealed?: SealedSecret };
}
async function journal(tenant: string): Promise<readonly Entered[]> {
  const entries: Entered[] = [];
  for await (const { data } of cell.operator.read("EVENTS", `tenant.${tenant}.tenant.main.event`, 1))
    entries.push(...(JSON.parse(new TextDecoder().decode(data)) as { entries: Entered[] }).entries);
  return entries;
}

describe("a tenant's own key at a provider", () => {
  test("is taken, listed by its last four characters, replaced and removed", async () => {
    expect(await ask("PUT", "/v1/provider-keys/openai", { body: { key: SECRET, label: "team" } })).toEqual({
      status: 201,
      body: { provider: "openai", last_four: "wxyz", label: "team", version: 1 },
    });
    await expect.poll(() => listed(), { timeout: 20_000 }).toMatchObject([{ provider: "openai", label: "team", last_four: "wxyz", version: 1 }]);
    expect((await ask("PUT", "/v1/provider-keys/openai", { body: { key: `${SECRET}-2` } })).status).toBe(200);
    await expect.poll(() => listed(), { timeout: 20_000 }).toMatchObject([{ provider: "openai", label: "team", last_four: "yz-2", version: 2 }]);
    const [first] = await listed();
    expect(Object.keys(first ?? {}).sort()).toEqual(["created_at", "label", "last_four", "master_key_id", "provider", "rotated_at", "version"]);
    expect((await ask("POST", "/v1/provider-keys/openai/remove", { body: { reason: "leaked" } })).status).toBe(200);
    await expect.poll(() => listed(), { timeout: 20_000 }).toEqual([]);
    expect((await ask("POST", "/v1/provider-keys/openai/remove", { body: {} })).status).toBe(404);
  });

  test("rests sealed for this tenant and this provider, and opens with the master key", async () => {
    await ask("PUT", "/v1/provider-keys/anthropic", { body: { key: SECRET } });
    const sealed = (await journal("acme")).findLast((entry) => entry.type === "provider_key.put")?.body.sealed;
    expect(sealed).toBeDefined();
    expect(openSecret(MASTER_KEYS, sealed!, { tenant: "acme", provider: "anthropic" })).toEqual({ kind: "opened", secret: SECRET });
    expect(openSecret(MASTER_KEYS, sealed!, { tenant: "rival", provider: "anthropic" }).kind).toBe("refused");
  });

  test("is nobody's business without the scope, and another tenant's does not exist", async () => {
    await ask("PUT", "/v1/provider-keys/google", { body: { key: SECRET } });
    for (const [method, path] of [
      ["GET", "/v1/provider-keys"],
      ["PUT", "/v1/provider-keys/google"],
      ["POST", "/v1/provider-keys/google/remove"],
    ] as const)
      expect((await ask(method, path, { key: keyOf("acme"), ...(method === "GET" ? {} : { body: { key: SECRET } }) })).status, path).toBe(403);
    expect(await listed(keyOf("rival", "boss"))).toEqual([]);
    expect((await ask("POST", "/v1/provider-keys/google/remove", { key: keyOf("rival", "boss"), body: {} })).status).toBe(404);
    expect((await listed()).some((one) => one["provider"] === "google")).toBe(true);
  });

  test("that does not fit a header, and a label that is no text, are refused with their place", async () => {
    for (const key of [undefined, "", "short", `${SECRET} and more`, `${SECRET}\n`, SECRET.repeat(40), 12345678901234, { key: SECRET }])
      expect(await ask("PUT", "/v1/provider-keys/openai", { body: { key } })).toMatchObject({
        status: 422,
        body: { code: "invalid", details: { errors: [{ pointer: "/key" }] } },
      });
    expect(await ask("PUT", "/v1/provider-keys/openai", { body: { key: SECRET, label: 5 } })).toMatchObject({
      status: 422,
      body: { details: { errors: [{ pointer: "/label" }] } },
    });
    expect((await ask("PUT", "/v1/provider-keys/Open%20AI", { body: { key: SECRET } })).status).toBe(404);
  });

  test("in a request that is not JSON is not in the refusal", async () => {
    for (const raw of [`{"key": ${SECRET}}`, `{"key": "${SECRET}"`, `{'key': '${SECRET}'}`, SECRET, `{"key": "${SECRET}",}`, `{"key":"\\x${SECRET}"}`]) {
      const refused = await ask("PUT", "/v1/provider-keys/openai", { raw });
      expect(refused, raw).toMatchObject({ status: 422, body: { code: "invalid" } });
      expect(JSON.stringify(refused)).not.toMatch(/WINTER|sk-proj/);
    }
  });

  test("is not taken by a gateway that was given no master key, and that is what it says", async () => {
    const bare = await cell.another({ master_keys: () => [] });
    expect(await ask("PUT", "/v1/provider-keys/openai", { body: { key: SECRET } }, bare.url)).toMatchObject({
      status: 503,
      body: { code: "unavailable", detail: expect.stringContaining("master key") },
    });
  });
});

test("PK1: after all that the key is in no answer, no line of the log and no stored message, as it is or encoded", async () => {
  const words = [SECRET, Buffer.from(SECRET).toString("base64"), Buffer.from(SECRET).toString("base64url"), Buffer.from(SECRET).toString("hex")].map((one) =>
    one.slice(4, 28),
  );
  const clean = (where: string, text: string): void => {
    for (const word of words) expect(text.includes(word) ? where : "").toBe("");
  };
  for (const answer of answers) clean("an answer", answer);
  for (const line of cell.logged) clean("the log", line);
  let messages = 0;
  for (const stream of ["COMMANDS", "EVENTS", "SNAPSHOTS", "RESIDENT", "TOKENS", "TIMERS"] as const)
    for await (const { subject, headers, data } of cell.operator.read(stream, ">", 1)) {
      messages += 1;
      clean(subject, `${JSON.stringify(headers)} ${Buffer.from(data).toString("latin1")}`);
    }
  expect(messages).toBeGreaterThan(10);
  expect(answers.length).toBeGreaterThan(20);
});
