// Goal:   over HTTP no byte of another tenant reaches a tenant, by any route, stream, header, cache or error; no route answers without the scope
//         it names; administrators reach their own tenant and operators no sessions.
// Method: a gateway with all that it talks to in this process, two tenants that are twins in every id and differ in one word. The routes are
//         those that the gateway itself lists, so a new one is asked without this file knowing of it. What it makes is made under the twins' id;
//         a route that answered nobody (its body is not known here) fails.
import { createHash } from "node:crypto";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { RouteInfo } from "../../gateway/route.ts";
import { createKey, hashKey } from "../../protocol/api-key.ts";
import type { Scope } from "../../protocol/scopes.ts";
import { decodeJournal } from "../../protocol/journal.ts";
import { bearer, keyOf, OPERATOR, type SmallCell, startSmallCell } from "../gateway/small-cell.ts";
import { canaryOf, otherOf, SESSION, TENANTS, type TenantName } from "./two-tenants.ts";

let cell: SmallCell;
const admins = {} as Record<TenantName, string>;
let random = 0;
const counted = (count: number): Uint8Array =>
  createHash("shake256", { outputLength: count })
    .update(String((random += 1)))
    .digest();

async function keyWith(tenant: string, more: { scopes?: string[]; expires_at?: string }): Promise<string> {
  const { key, key_id, hash } = createKey(tenant, counted);
  await cell.tell(tenant, "key.create", { key_id, hash, ...more });
  return key;
}

interface Asked {
  readonly status: number;
  /** Status, headers and the whole body (of a stream: what came until it was silent), as one text. */
  readonly text: string;
  readonly body: Record<string, unknown>;
}
async function ask(
  method: string,
  path: string,
  key: string | null,
  { body, accept = "application/json", more = {} }: { body?: unknown; accept?: string; more?: Record<string, string> } = {},
): Promise<Asked> {
  const answer = await fetch(cell.gateway.url + path, {
    method,
    headers: { ...(key === null ? {} : bearer(key)), accept, ...(body === undefined ? {} : { "content-type": "application/json" }), ...more },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  const text = answer.headers.get("content-type")?.startsWith("text/event-stream") ? await untilSilent(answer) : await answer.text();
  const told = `${answer.status} ${JSON.stringify([...answer.headers])} ${text}`;
  return { status: answer.status, text: told, body: text.startsWith("{") ? (JSON.parse(text) as Record<string, unknown>) : {} };
}

const SILENCE_MS = 150;
/** A stream that has something to tell begins at once, which on a busy machine is a moment later. */
const BEGIN_MS = 2_000;
async function untilSilent(answer: Response): Promise<string> {
  const reader = answer.body!.getReader();
  let text = "";
  for (;;) {
    const silence_ms = text === "" ? BEGIN_MS : SILENCE_MS;
    const next = await Promise.race([reader.read(), new Promise<undefined>((resolve) => void setTimeout(() => resolve(undefined), silence_ms))]);
    if (next === undefined || next.done) break;
    text += new TextDecoder().decode(next.value);
  }
  await reader.cancel();
  return text;
}

beforeAll(async () => {
  cell = await startSmallCell({
    tenants: TENANTS,
    overrides: { sessions: { list: async (tenant) => ({ items: [{ id: SESSION, tenant, metadata: { word: canaryOf(tenant as TenantName) } }] }) } },
  });
  for (const tenant of TENANTS) {
    const word = canaryOf(tenant);
    await cell.tell(tenant, "agent.put", { agent: "assistant", config: { model: "simulated/echo", instructions: word } });
    admins[tenant] = await keyWith(tenant, { scopes: ["admin"] });
    await cell.tell(tenant, "key.create", { key_id: "spare", hash: hashKey(keyOf(tenant, "spare")), label: word });
    await ask("POST", "/v1/sessions", admins[tenant], {
      body: { id: SESSION, agent: "assistant", external_id: "same", user: word, metadata: { word } },
      more: { "idempotency-key": "same-key" },
    });
    const said = await ask("POST", `/v1/sessions/${SESSION}/messages`, admins[tenant], {
      body: { content: `say ${word}` },
      accept: "text/event-stream",
      more: { "idempotency-key": "same-message" },
    });
    expect(said.text).toContain(word);
  }
});
afterAll(() => cell.end());

/** What stands for a route's parameter where the twins' id does not. */
const IDS: Record<string, string> = { "/v1/agents": "assistant", "/v1/keys": "spare", "/v1/operator/tenants": "rival", "/v1/provider-keys": "openai" };
/** What stands for `:id` on a route. Twins: the same for both tenants. */
function concrete(url: string): string {
  return url.replaceAll(/:[a-z_]+/g, (_, at: number) => IDS[url.slice(0, at - 1)] ?? SESSION);
}

/** Bodies that the routes take, and ones that name the other tenant everywhere it could be named. */
function bodies({ method, url }: RouteInfo, other: TenantName): readonly (Record<string, unknown> | undefined)[] {
  if (method === "GET") return [undefined];
  const word = { tenant: other, id: SESSION, actor: { tenant: other, kind: "session", id: SESSION }, session: `${other}/session/${SESSION}` };
  if (url.endsWith("/messages")) return [{ content: "again" }, { content: "again", ...word }];
  if (url === "/v1/sessions")
    return [
      { id: SESSION, agent: "assistant" },
      { agent: "assistant", external_id: "same" },
      { agent: "assistant", ...word },
    ];
  if (url.startsWith("/v1/agents")) return [{ model: "simulated/echo", instructions: "mine", ...word }];
  if (url === "/v1/webhooks") return [{ url: `https://example.com/${canaryOf(otherOf(other))}`, ...word }];
  if (url === "/v1/provider-keys/:provider") return [{ key: `sk-${canaryOf(otherOf(other))}`, label: canaryOf(otherOf(other)), ...word }];
  return [{}, { ...word }];
}

describe("a tenant sees no byte of its twin", () => {
  test("on any route, with any of its keys, body and way of asking", async () => {
    const answered: string[] = [];
    for (const tenant of TENANTS) {
      const other = otherOf(tenant);
      const foreign = [canaryOf(other), keyOf(other), hashKey(keyOf(other)), admins[other], `"tenant":"${other}"`];
      const keys = [keyOf(tenant), admins[tenant], await keyWith(tenant, { scopes: ["operator:write", "operator:read"] })];
      // What ends the session, or the key that asks, comes last.
      const late = ["/remove", "/pause", "/hibernate", "/terminate", "/revoke"];
      // And what makes something comes before what asks for it.
      const lateness = ({ url, method }: RouteInfo): number => late.findIndex((end) => url.endsWith(end)) - (method === "POST" && !url.includes(":") ? 1 : 0);
      const routes = [...cell.gateway.routes].sort((a, b) => lateness(a) - lateness(b));
      let asks = 0;
      for (const route of routes) {
        for (const key of keys) {
          for (const body of bodies(route, other)) {
            for (const accept of ["application/json", "text/event-stream"]) {
              const more = {
                "x-tenant": other,
                "x-forwarded-for": other,
                "troupe-tenant": other,
                ...(route.method === "GET" ? {} : { "idempotency-key": `twin ${(asks += 1)}` }),
              };
              for (const suffix of route.method === "GET" ? ["", `?tenant=${other}`] : [""]) {
                const asked = await ask(route.method, concrete(route.url) + suffix, key, { ...(body === undefined ? {} : { body }), accept, more });
                expect(asked.status, `${route.method} ${route.url}`).toBeLessThan(500);
                for (const word of foreign) expect(asked.text, `${route.method} ${route.url} for ${tenant}`).not.toContain(word);
                if (asked.status < 300) answered.push(`${route.method} ${route.url}`);
              }
            }
          }
        }
      }
    }
    // It was not all refusals: each route of a tenant's was answered at least once.
    const expected = cell.gateway.routes.filter(({ url }) => !url.startsWith("/v1/operator") && !/unpark|resume|cancel|pause/.test(url));
    expect(expected.map(({ method, url }) => `${method} ${url}`).filter((one) => !answered.includes(one))).toEqual([]);
  }, 120_000);

  test("whatever was said to an actor over HTTP stands in its journal in the name of the key that asked, whichever route it came by", async () => {
    const said = new Map<string, Set<string>>();
    const nameless: string[] = [];
    for await (const { data } of cell.operator.read("EVENTS", ">", 1)) {
      const { actor, entries } = decodeJournal(data);
      for (const entry of entries) {
        if (entry.t !== "init" && entry.t !== "command" && entry.t !== "refused") continue;
        const from_actor = /^[^/]+\/[a-z]+\/[^/]+#/.test(entry.key ?? "");
        if (entry.principal === undefined && !from_actor) nameless.push(`${actor.tenant}/${actor.kind}/${actor.id} ${entry.type}`);
        else if (entry.principal !== undefined) said.set(actor.tenant, (said.get(actor.tenant) ?? new Set()).add(entry.principal));
      }
    }
    expect(nameless).toEqual([]);
    for (const tenant of TENANTS) {
      const mine = [OPERATOR, "key:k1", `key:${admins[tenant].split(".")[2]}`];
      expect([...(said.get(tenant) ?? [])].filter((name) => !mine.includes(name))).toEqual([]);
      expect([...(said.get(tenant) ?? [])].sort()).toEqual([...mine].sort());
    }
  });

  test("while both stream at once, each hears its own words alone", async () => {
    for (const tenant of TENANTS) await ask("POST", "/v1/sessions", keyOf(tenant), { body: { id: "duet", agent: "assistant" } });
    const streams = await Promise.all(
      TENANTS.flatMap((tenant) =>
        [1, 2].map(async (n) => ({
          tenant,
          ...(await ask("POST", "/v1/sessions/duet/messages", keyOf(tenant), { body: { content: `${n} ${canaryOf(tenant)}` }, accept: "text/event-stream" })),
        })),
      ),
    );
    for (const { tenant, text } of streams) {
      expect(text).toContain(canaryOf(tenant));
      expect(text).not.toContain(canaryOf(otherOf(tenant)));
    }
  });

  test("another tenant's cursor shows nothing of it", async () => {
    const page = await ask("GET", `/v1/sessions/duet/events?limit=3`, keyOf("rival"));
    const cursors = (page.body["items"] as { cursor: string }[]).map(({ cursor }) => cursor);
    for (const cursor of cursors)
      for (const accept of ["application/json", "text/event-stream"]) {
        const asked = await ask("GET", `/v1/sessions/duet/events?cursor=${encodeURIComponent(cursor)}`, keyOf("acme"), { accept });
        expect(asked.text).not.toContain(canaryOf("rival"));
        expect(asked.status).toBeLessThan(500);
      }
  });

  test("nothing is cacheable by anything between: no answer of any route, method and way of asking, and no error", async () => {
    let answers = 0;
    const errors = new Set<number>();
    for (const route of cell.gateway.routes.filter(({ authenticated }) => authenticated))
      for (const key of [admins.acme, keyOf("acme"), null, "troupe.acme.k.wrong"])
        for (const accept of ["application/json", "text/event-stream"]) {
          // A body that is none, too: what is wrong with a request is the tenant's own as well.
          const { status, text } = await ask(route.method, concrete(route.url), key, {
            accept,
            ...(route.method === "GET" ? {} : { body: { nothing: "of it" } }),
          });
          answers += 1;
          if (status >= 400) errors.add(status);
          expect(`${route.method} ${route.url} ${status} ${/"cache-control","([^"]*)"/.exec(text)?.[1] ?? "nothing"}`).toBe(
            `${route.method} ${route.url} ${status} private, no-store`,
          );
        }
    expect(answers).toBeGreaterThan(100);
    for (const status of [401, 403, 422]) expect(errors).toContain(status);
  });
});

describe("scopes", () => {
  const MADE: readonly (readonly Scope[])[] = [["sessions:read"], ["sessions:write"], ["admin"], ["operator:read"], ["operator:write"]];

  test("each route refuses every credential that lacks its scope, before it reads the body, and says which scope it is", async () => {
    const grants: { key: string; has: readonly string[] }[] = [];
    for (const scopes of MADE) {
      const implied = scopes.includes("admin")
        ? ["sessions:read", "sessions:write", "admin"]
        : scopes.some((one) => one.startsWith("operator"))
          ? []
          : [...scopes];
      grants.push({ key: await keyWith("acme", { scopes: [...scopes] }), has: implied });
    }
    grants.push({ key: await keyWith("acme", { scopes: ["*", "sessions", "SESSIONS:READ"] }), has: [] });
    await cell.tell("system", "tenant.create", {});
    grants.push({ key: await keyWith("system", {}), has: ["operator:read"] });
    grants.push({ key: await keyWith("system", { scopes: ["admin", "sessions:read", "sessions:write"] }), has: [] });
    for (const { method, url, scope } of cell.gateway.routes) {
      if (scope === null) continue;
      for (const { key, has } of grants) {
        if (has.includes(scope)) continue;
        const asked = await ask(method, concrete(url), key, method === "GET" ? {} : { body: "not an object" });
        expect([method, url, asked.status, asked.body["code"]]).toEqual([method, url, 403, "forbidden"]);
        expect(asked.body["details"]).toEqual({ scope });
      }
    }
  });

  test("every route that is not for machines names a scope", () => {
    expect(cell.gateway.routes.filter(({ scope }) => scope === null).map(({ url }) => url)).toEqual(["/healthz", "/readyz", "/metrics"]);
  });
});

describe("a tenant's keys, made by its administrators", () => {
  test("a key is shown once, works, is listed without its hash, ends by rotation and by revocation", async () => {
    const made = await ask("POST", "/v1/keys", admins.acme, { body: { scopes: ["sessions:read"], label: "ci" } });
    expect(made.status).toBe(201);
    const { key, key_id } = made.body as { key: string; key_id: string };
    expect((await ask("GET", `/v1/sessions/${SESSION}`, key)).status).toBe(200);
    expect((await ask("POST", `/v1/sessions/${SESSION}/pause`, key, { body: {} })).status).toBe(403);
    const listed = await ask("GET", "/v1/keys", admins.acme);
    expect(listed.body["items"]).toContainEqual(
      expect.objectContaining({ key_id, label: "ci", scopes: ["sessions:read"], revoked_at: null, expires_at: null }),
    );
    expect(listed.text).not.toContain(key);
    expect(listed.text).not.toContain(hashKey(key));

    const rotated = await ask("POST", `/v1/keys/${key_id}/rotate`, admins.acme, { body: { grace_s: 0 } });
    expect(rotated.body).toMatchObject({ replaces: key_id, scopes: ["sessions:read"], label: "ci" });
    const next = rotated.body as { key: string; key_id: string };
    expect((await ask("GET", `/v1/sessions/${SESSION}`, next.key)).status).toBe(200);
    await expect.poll(async () => (await ask("GET", `/v1/sessions/${SESSION}`, key)).status, { timeout: 20_000 }).toBe(401);

    expect((await ask("POST", `/v1/keys/${next.key_id}/revoke`, admins.acme, { body: { reason: "done" } })).status).toBe(200);
    await expect.poll(async () => (await ask("GET", `/v1/sessions/${SESSION}`, next.key)).status, { timeout: 20_000 }).toBe(401);
    expect(cell.logged.filter((line) => line.includes(key) || line.includes(next.key))).toEqual([]);
  });

  test("a key past its end is refused; the end of a key only comes nearer", async () => {
    const over = await keyWith("acme", { expires_at: new Date(Date.now() - 1_000).toISOString() });
    expect((await ask("GET", "/v1/agents", over)).status).toBe(401);
    const { body } = await ask("POST", "/v1/keys", admins.acme, { body: { expires_at: new Date(Date.now() + 3_600_000).toISOString() } });
    const { key, key_id } = body as { key: string; key_id: string };
    await cell.tell("acme", "key.expire", { key_id, expires_at: new Date(Date.now() + 7_200_000).toISOString() });
    const listed = async (): Promise<number> =>
      Date.parse(
        String(
          ((await ask("GET", "/v1/keys", admins.acme)).body["items"] as { key_id: string; expires_at: string }[]).find((one) => one.key_id === key_id)
            ?.expires_at,
        ),
      );
    expect((await listed()) - Date.now()).toBeLessThan(3_700_000);
    expect((await ask("GET", "/v1/agents", key)).status).toBe(200);
  });

  test("the other tenant's key is not there to be rotated or revoked, and stays", async () => {
    const key = await keyWith("rival", {});
    const key_id = key.split(".")[2];
    for (const verb of ["rotate", "revoke"]) expect((await ask("POST", `/v1/keys/${key_id}/${verb}`, admins.acme, { body: {} })).status).toBe(404);
    expect((await ask("GET", "/v1/agents", key)).status).toBe(200);
  });

  test("an agent is put into one's own tenant alone", async () => {
    expect((await ask("PUT", "/v1/agents/own-one", admins.acme, { body: { model: "simulated/echo", tenant: "rival" } })).status).toBe(200);
    await expect.poll(async () => (await ask("GET", "/v1/agents", keyOf("acme"))).text, { timeout: 20_000 }).toContain('"own-one"');
    expect((await ask("GET", "/v1/agents", keyOf("rival"))).text).not.toContain('"own-one"');
    expect((await ask("PUT", "/v1/agents/bad", admins.acme, { body: { model: "no such form" } })).status).toBe(422);
  });

  test.each(["constructor", "__proto__", "toString", "hasOwnProperty"])("'%s' is no agent and no key", async (id) => {
    expect((await ask("POST", "/v1/sessions", keyOf("acme"), { body: { agent: id } })).body).toMatchObject({ code: "agent_unknown" });
    expect((await ask("POST", `/v1/keys/${id}/rotate`, admins.acme, { body: {} })).status).toBe(404);
    expect((await ask("GET", "/v1/agents", `troupe.acme.${id}.${"s".repeat(43)}`)).status).toBe(401);
    expect((await ask("GET", "/v1/agents", `troupe.${id}.k1.${"s".repeat(43)}`)).status).toBe(401);
  });

  test("labels of a session are bounded in number", async () => {
    const labels = (count: number): Record<string, string> => Object.fromEntries(Array.from({ length: count }, (_, index) => [`l${index}`, "x"]));
    expect((await ask("POST", "/v1/sessions", keyOf("acme"), { body: { agent: "assistant", metadata: labels(64) } })).status).toBe(201);
    expect((await ask("POST", "/v1/sessions", keyOf("acme"), { body: { agent: "assistant", metadata: labels(65) } })).body).toMatchObject({ code: "invalid" });
  });
});

describe("operators", () => {
  test("an operator's key makes, sees, suspends and resumes tenants and is nobody's to make over HTTP", async () => {
    const operator = await keyWith("system", { scopes: ["operator:write"] });
    expect((await ask("POST", "/v1/operator/tenants", operator, { body: { id: "fresh", name: "Fresh" } })).status).toBe(201);
    const { body } = await ask("POST", "/v1/operator/tenants/fresh/keys", operator, { body: { scopes: ["admin"] } });
    const { key } = body as { key: string };
    await expect.poll(async () => (await ask("GET", "/v1/keys", key)).status, { timeout: 20_000 }).toBe(200);
    expect((await ask("POST", "/v1/operator/tenants/fresh/suspend", operator, { body: { reason: "test" } })).body).toEqual({ id: "fresh", state: "suspended" });
    await expect.poll(async () => (await ask("GET", "/v1/keys", key)).status, { timeout: 20_000 }).toBe(403);
    expect((await ask("GET", "/v1/operator/tenants/fresh", operator)).body).toMatchObject({ state: "suspended", name: "Fresh" });
    expect((await ask("POST", "/v1/operator/tenants/fresh/resume", operator, { body: {} })).status).toBe(200);
    for (const [method, path, more] of [
      ["POST", "/v1/operator/tenants/system/keys", { body: { scopes: ["operator:write"] } }],
      ["POST", "/v1/operator/tenants/system/suspend", { body: {} }],
      ["GET", "/v1/operator/tenants/system", {}],
      ["GET", "/v1/operator/tenants/nobody", {}],
    ] as const)
      expect((await ask(method, path, operator, more)).status).toBe(404);
    expect((await ask("POST", "/v1/operator/tenants", operator, { body: { id: "system" } })).status).toBe(422);
  });
});
