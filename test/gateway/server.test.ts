// Goal: over real HTTP the gateway keeps WIRE §5 and §8: who may ask, what each route answers, how refusals look, how turns stream.
// Method: fetch against a listening gateway; behind it an in-memory broker, a shard host and the simulated models.
import { connect } from "node:net";
import { createParser } from "eventsource-parser";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { decodeCursor } from "../../gateway/cursor.ts";
import type { Gateway } from "../../gateway/server.ts";
import { errorBody, TroupeError } from "../../protocol/errors.ts";
import { bearer, keyOf, type SmallCell, startSmallCell } from "./small-cell.ts";

let cell: SmallCell;
let gateway: Gateway;
beforeAll(async () => {
  cell = await startSmallCell({ tenants: ["acme", "rival", "sleepy"] });
  ({ gateway } = cell);
});
afterAll(() => cell.end());

/** Whatever came over the wire; each test says what it must be. */
type Parsed = ReturnType<typeof JSON.parse>;
type Answer = { status: number; headers: Headers; body: Parsed };
interface Ask {
  readonly key?: string | null;
  readonly headers?: Record<string, string>;
  readonly body?: unknown;
  readonly raw?: string | Uint8Array;
}

async function ask(method: string, path: string, { key = keyOf("acme"), headers = {}, body, raw }: Ask = {}, to = gateway): Promise<Answer> {
  const payload = raw ?? (body === undefined ? undefined : JSON.stringify(body));
  const response = await fetch(`${to.url}${path}`, {
    method,
    headers: { ...(key === null ? {} : bearer(key)), ...(payload === undefined ? {} : { "content-type": "application/json" }), ...headers },
    ...(payload === undefined ? {} : { body: payload as string }),
  });
  const text = await response.text();
  return { status: response.status, headers: response.headers, body: text.startsWith("{") ? JSON.parse(text) : text };
}

interface Sse {
  readonly id: string | undefined;
  readonly event: string | undefined;
  readonly data: Parsed;
}
/** Reads server-sent events until the stream ends or `enough` says so. */
async function listen(
  method: string,
  path: string,
  { key = keyOf("acme"), headers = {}, body }: Ask = {},
  enough: (events: readonly Sse[]) => boolean = () => false,
  to = gateway,
): Promise<{ events: Sse[]; comments: string[]; response: Response }> {
  const abort = new AbortController();
  const response = await fetch(`${to.url}${path}`, {
    method,
    signal: abort.signal,
    headers: { ...bearer(key ?? ""), accept: "text/event-stream", ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers },
    ...(body === undefined ? {} : { body: JSON.stringify(body) }),
  });
  const events: Sse[] = [];
  const comments: string[] = [];
  const parser = createParser({
    onEvent: ({ id, event, data }) => void events.push({ id, event, data: JSON.parse(data) }),
    onComment: (comment) => void comments.push(comment),
  });
  const decoder = new TextDecoder();
  try {
    for await (const bytes of response.body ?? []) {
      parser.feed(decoder.decode(bytes as Uint8Array, { stream: true }));
      if (enough(events)) break;
    }
  } finally {
    abort.abort();
  }
  return { events, comments, response };
}

const ended = (turn: number) => (events: readonly Sse[]) =>
  events.some(({ event, data }) => ["turn.completed", "turn.failed", "turn.cancelled"].includes(event ?? "") && data.turn === turn);
const textOf = (events: readonly Sse[], turn: number): string =>
  events
    .filter(({ event, data }) => event === "token" && data.turn === turn && data.channel === undefined)
    .map(({ data }) => data.text)
    .join("");

let count = 0;
async function newSession(agent = "assistant", key = keyOf("acme")): Promise<string> {
  const answer = await ask("POST", "/v1/sessions", { key, body: { agent, id: `s${++count}` } });
  expect(answer.status).toBe(201);
  return answer.body.id;
}

function expectProblem(answer: Answer, status: number, code: string): void {
  expect({ status: answer.status, code: answer.body.code }).toEqual({ status, code });
  expect(answer.headers.get("content-type")).toBe("application/problem+json");
  expect(answer.body).toMatchObject({ type: `urn:troupe:error:${code}`, title: expect.any(String), status, detail: expect.any(String) });
}

describe("who may ask", () => {
  const concrete = (url: string): string => url.replace(":id", "s1");

  test("every route of the table but the three for machines refuses a missing, malformed, unknown or wrong credential, in the same words", async () => {
    const open = gateway.routes.filter((route) => !route.authenticated).map((route) => route.url);
    expect(open).toEqual(["/healthz", "/readyz", "/metrics"]);
    expect(gateway.routes.filter((route) => route.authenticated).length).toBeGreaterThan(9);
    const wrong = [
      null,
      "",
      "x",
      "troupe.acme.k1",
      `troupe.acme.k1.${"x".repeat(43)}`,
      `troupe.nobody.k1.${"s".repeat(43)}`,
      keyOf("acme", "k2"),
      keyOf("system"),
      `troupe.acme.__proto__.x`,
      "a".repeat(5000),
    ];
    const bodies = new Set<string>();
    for (const { method, url, authenticated } of gateway.routes) {
      if (!authenticated) continue;
      for (const key of wrong) {
        const answer = await ask(method, concrete(url), { key, ...(method === "POST" ? { body: {} } : {}) });
        expectProblem(answer, 401, "unauthenticated");
        expect(answer.headers.get("www-authenticate")).toBe("Bearer");
        bodies.add(JSON.stringify(answer.body));
      }
    }
    expect(bodies.size).toBe(1);
  });

  test("a revoked key stops working, a suspended tenant is refused as such, and no key is ever logged", async () => {
    expect((await ask("GET", "/v1/agents", { key: keyOf("sleepy") })).status).toBe(200);
    await cell.tell("sleepy", "tenant.suspend", {});
    await expect.poll(async () => (await ask("GET", "/v1/agents", { key: keyOf("sleepy") })).status, { timeout: 20_000 }).toBe(403);
    expectProblem(await ask("GET", "/v1/agents", { key: keyOf("sleepy") }), 403, "forbidden");
    await cell.tell("sleepy", "tenant.resume", {});
    await cell.tell("sleepy", "key.revoke", { key_id: "k1" });
    await expect.poll(async () => (await ask("GET", "/v1/agents", { key: keyOf("sleepy") })).status, { timeout: 20_000 }).toBe(401);
    expect(cell.logged.filter((line) => line.includes("s".repeat(43)))).toEqual([]);
  });

  test("another tenant's session answers on every route exactly as one that does not exist", async () => {
    const id = await newSession();
    for (const { method, url } of gateway.routes.filter((route) => route.url.startsWith("/v1/sessions/:id"))) {
      const told: Ask = {
        key: keyOf("rival"),
        headers: { accept: "application/json" },
        ...(method === "POST" ? { body: url.endsWith("messages") ? { content: "x" } : {} } : {}),
      };
      const foreign = await ask(method, url.replace(":id", id), told);
      const unknown = await ask(method, url.replace(":id", "never-was"), told);
      expectProblem(foreign, 404, "not_found");
      expect(foreign.body).toEqual(unknown.body);
      expectProblem(await ask(method, url.replace(":id", "a.b*"), told), 404, "not_found");
    }
  });

  test("two tenants with the same session id, and an id of the other in path and body, each see only their own", async () => {
    for (const tenant of ["acme", "rival"]) {
      await ask("POST", "/v1/sessions", { key: keyOf(tenant), body: { agent: "assistant", id: "twin", metadata: { canary: tenant }, tenant: "acme" } });
      await listen("POST", "/v1/sessions/twin/messages", { key: keyOf(tenant), body: { content: `canary-${tenant}` } });
    }
    for (const [tenant, other] of [
      ["acme", "rival"],
      ["rival", "acme"],
    ] as const) {
      expect((await ask("GET", "/v1/sessions/twin", { key: keyOf(tenant) })).body.metadata).toEqual({ canary: tenant });
      const { events } = await listen("GET", "/v1/sessions/twin/events", { key: keyOf(tenant) }, ended(1));
      expect(JSON.stringify(events)).toContain(`canary-${tenant}`);
      expect(JSON.stringify(events)).not.toContain(`canary-${other}`);
    }
  });

  test("answers to tenants are kept by no cache", async () => {
    for (const path of ["/v1/agents", "/v1/sessions", "/v1/sessions/none"])
      expect((await ask("GET", path)).headers.get("cache-control")).toBe("private, no-store");
  });
});

describe("sessions", () => {
  test("a session is created once: 201, then 200 with the same body, 409 with another, and shows what it is", async () => {
    const body = { agent: "assistant", external_id: "order-1", user: "ann", metadata: { a: "b" }, unknown_field: 1 };
    const first = await ask("POST", "/v1/sessions", { body });
    expect(first.status).toBe(201);
    expect(first.headers.get("location")).toBe(`/v1/sessions/${first.body.id}`);
    const again = await ask("POST", "/v1/sessions", { body: { ...body, unknown_field: 2 } });
    expect(again.status).toBe(200);
    expect(again.body.id).toBe(first.body.id);
    expectProblem(await ask("POST", "/v1/sessions", { body: { ...body, user: "bob" } }), 409, "conflict");
    await expect.poll(async () => (await ask("GET", `/v1/sessions/${first.body.id}`)).body.state, { timeout: 20_000 }).toBe("idle");
    const view = await ask("GET", `/v1/sessions/${first.body.id}`);
    expect(view.body).toMatchObject({
      agent: "assistant",
      external_id: "order-1",
      user: "ann",
      metadata: { a: "b" },
      mode: "multi",
      turn: 0,
      queue_length: 0,
      wait_reason: "waits for a message",
      worker: "w1",
      epoch: 1,
      model: "simulated/echo",
    });
    expect(view.body.config_hash).toMatch(/^[0-9a-f]{64}$/);
    expect(view.body.created_at).toMatch(/^\d{4}-.*Z$/);
    expect(Object.keys(view.body)).toEqual(expect.arrayContaining(["seq", "usage"]));
  });

  test("without id and external_id, a repeat with the same Idempotency-Key finds the same session, and other requests find others", async () => {
    const headers = { "idempotency-key": "create-1" };
    const [a, b, c, d] = [
      await ask("POST", "/v1/sessions", { headers, body: { agent: "assistant" } }),
      await ask("POST", "/v1/sessions", { headers, body: { agent: "assistant" } }),
      await ask("POST", "/v1/sessions", { body: { agent: "assistant" } }),
      await ask("POST", "/v1/sessions", { body: { agent: "assistant" } }),
    ].map((answer) => answer.body.id);
    expect(a).toBe(b);
    expect(new Set([a, c, d]).size).toBe(3);
    expectProblem(await ask("POST", "/v1/sessions", { headers, body: { agent: "actor" } }), 409, "conflict");
  });

  test("an unknown agent is 422 agent_unknown, and content that does not fit is 422 with pointers into the body that was sent", async () => {
    expectProblem(await ask("POST", "/v1/sessions", { body: { agent: "nobody" } }), 422, "agent_unknown");
    const wrong: [unknown, string][] = [
      [{ agent: 7 }, "/agent"],
      [{}, "/agent"],
      [{ agent: "assistant", metadata: { k: 1 } }, "/metadata/k"],
      [{ agent: "assistant", overrides: { temperature: 9 } }, "/overrides/temperature"],
      [{ agent: "assistant", id: "not an id" }, "/id"],
      [{ agent: "assistant", user: "a\u0000b" }, "/user"],
      [{ agent: "assistant", user: "\ud800" }, "/user"],
    ];
    for (const [body, pointer] of wrong) {
      const answer = await ask("POST", "/v1/sessions", { body });
      expectProblem(answer, 422, "invalid");
      expect(answer.body.details.errors.map((one: { pointer: string }) => one.pointer)).toContain(pointer);
    }
  });

  test("verbs answer the session as it is afterwards, and 409 with its state where it does not allow them", async () => {
    const id = await newSession();
    await expect.poll(async () => (await ask("GET", `/v1/sessions/${id}`)).body.state, { timeout: 20_000 }).toBe("idle");
    expect((await ask("POST", `/v1/sessions/${id}/pause`, { body: { reason: "lunch" } })).body).toMatchObject({
      id,
      state: "paused",
      wait_reason: expect.stringContaining("lunch"),
    });
    const twice = await ask("POST", `/v1/sessions/${id}/pause`);
    expectProblem(twice, 409, "illegal_transition");
    expect(twice.body.details.state).toBe("paused");
    expect((await ask("POST", `/v1/sessions/${id}/hibernate`)).body.state).toBe("hibernated");
    expect((await ask("POST", `/v1/sessions/${id}/resume`)).body.state).toBe("idle");
    expect((await ask("POST", `/v1/sessions/${id}/terminate`)).body.state).toBe("terminated");
    expectProblem(await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: "x" } }), 409, "illegal_transition");
    expect((await ask("GET", `/v1/sessions/${id}`)).body.state).toBe("terminated");
  });

  test("lists come from their database, for the credential's tenant, and are 503 with retry-after while it is away", async () => {
    const asked: unknown[] = [];
    const listing = await cell.another({
      sessions: { list: async (tenant, request) => (asked.push([tenant, request]), { items: [{ session: "s1" }], next: "more" }) },
    });
    const page = await ask("GET", "/v1/sessions?state=idle&agent=assistant&limit=7&after=abc", {}, listing);
    expect(page.body).toEqual({ items: [{ session: "s1" }], next: "more" });
    expect(asked).toEqual([["acme", { state: "idle", agent: "assistant", limit: 7, after: "abc" }]]);
    for (const state of ["initializing", "thinking", "acting", "parked", "terminated"])
      expect((await ask("GET", `/v1/sessions?state=${state}`, {}, listing)).status, state).toBe(200);
    for (const query of ["limit=0", "limit=101", "limit=x", "limit=1&limit=2", "state=%00", "state=bogus", "state=choosing", "agent=a%20b"])
      expectProblem(await ask("GET", `/v1/sessions?${query}`, {}, listing), 422, "invalid");
    const away = await cell.another({ sessions: { list: () => Promise.reject(new Error("connection refused at 10.0.0.1")) } });
    const refused = await ask("GET", "/v1/sessions", {}, away);
    expectProblem(refused, 503, "unavailable");
    expect(refused.headers.get("retry-after")).toBe("1");
    expect(JSON.stringify(refused.body)).not.toContain("10.0.0.1");
    const picky = await cell.another({ sessions: { list: () => Promise.reject(new TroupeError(errorBody("invalid", "?after= is no page"))) } });
    expectProblem(await ask("GET", "/v1/sessions?after=zzz", {}, picky), 422, "invalid");
  });

  test("agents are listed with version, hash and configuration", async () => {
    const { body } = await ask("GET", "/v1/agents");
    expect(body.items.map((agent: { id: string }) => agent.id)).toEqual(["assistant", "actor"]);
    expect(body.items[0]).toMatchObject({ version: 1, config: { model: "simulated/echo" } });
  });
});

describe("messages and events", () => {
  test("a message is 202 with a cursor, and a stream from that cursor begins exactly with it", async () => {
    const id = await newSession();
    await listen("POST", `/v1/sessions/${id}/messages`, { body: { content: "one two" } });
    const sent = await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: "three four five" } });
    expect(sent.status).toBe(202);
    expect(sent.body).toMatchObject({ turn: 2, message_id: expect.any(String) });
    const { events } = await listen("GET", `/v1/sessions/${id}/events?cursor=${sent.body.cursor}`, {}, ended(2));
    expect(events[0]).toMatchObject({ event: "message.received", data: { turn: 2, message_id: sent.body.message_id } });
    expect(textOf(events, 2)).toBe("three four five");
    expect(textOf(events, 1)).toBe("");
  });

  test("with Accept: text/event-stream a message is answered with its turn alone, in order, to its end", async () => {
    const id = await newSession();
    const waiting = ask("POST", `/v1/sessions/${id}/messages`, { body: { content: "before" } });
    await waiting;
    const { events, response } = await listen("POST", `/v1/sessions/${id}/messages`, { body: { content: "the answer is here" } });
    expect(response.status).toBe(200);
    expect(response.headers.get("content-type")).toBe("text/event-stream");
    expect(response.headers.get("cache-control")).toBe("private, no-store");
    expect(new Set(events.map(({ data }) => data.turn))).toEqual(new Set([2]));
    const kinds = events.map(({ event }) => event).filter((event, index, all) => event !== all[index - 1]);
    expect(kinds).toEqual(["message.received", "turn.started", "model.started", "token", "model.completed", "message.completed", "turn.completed"]);
    expect(textOf(events, 2)).toBe("the answer is here");
    for (const { id: cursor } of events) expect(decodeCursor(cursor ?? "")).toBeDefined();
    for (const { event, data } of events)
      if (event !== "token") expect(data).toMatchObject({ type: event, seq: expect.any(Number), at: expect.any(String), state: expect.any(String) });
  });

  test("the same Idempotency-Key sends once and answers twice; with another content it is a conflict", async () => {
    const id = await newSession();
    const headers = { "idempotency-key": "send-1" };
    const first = await listen("POST", `/v1/sessions/${id}/messages`, { headers, body: { content: "only once" } });
    const again = await listen("POST", `/v1/sessions/${id}/messages`, { headers, body: { content: "only once" } });
    expect(textOf(again.events, 1)).toBe("only once");
    expect(again.events.filter(({ event }) => event !== "token")).toEqual(first.events.filter(({ event }) => event !== "token"));
    expect((await ask("GET", `/v1/sessions/${id}`)).body.turn).toBe(1);
    expectProblem(await ask("POST", `/v1/sessions/${id}/messages`, { headers, body: { content: "other" } }), 409, "conflict");
  });

  test("from the id of any frame, on another gateway, the stream goes on with the next one", async () => {
    const id = await newSession("actor");
    const script = JSON.stringify([{ say: "a few words that take their time", first_token_ms: 5, token_ms: 8 }]);
    const sent = await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: script } });
    const other = await cell.another();
    const whole = await listen("GET", `/v1/sessions/${id}/events`, {}, ended(1));
    expect(textOf(whole.events, 1).trim()).toBe("a few words that take their time");
    const eventsOnly = (events: readonly Sse[]) => events.filter(({ event }) => event !== "token").map(({ data }) => data);
    for (let index = 0; index < whole.events.length - 1; index++) {
      const before = whole.events.slice(0, index + 1);
      if (ended(1)(before)) break;
      const rest = await listen(
        "GET",
        `/v1/sessions/${id}/events?cursor=${sent.body.cursor}`,
        { headers: { "last-event-id": before.at(-1)?.id ?? "" } },
        ended(1),
        other,
      );
      expect(textOf([...before, ...rest.events], 1), `after ${index}`).toBe(textOf(whole.events, 1));
      const together = eventsOnly([...before, ...rest.events]);
      expect(together).toEqual(eventsOnly(whole.events).slice(0, together.length));
      expect(ended(1)(rest.events)).toBe(true);
    }
  });

  test("X08: a client that goes away cancels nothing; cancel does, and the stream says so", async () => {
    const id = await newSession("actor");
    const script = JSON.stringify([{ say: "x ".repeat(20).trim(), token_ms: 15 }]);
    const gone = await listen("POST", `/v1/sessions/${id}/messages`, { body: { content: script } }, (events) => events.some(({ event }) => event === "token"));
    expect(ended(1)(gone.events)).toBe(false);
    const whole = await listen("GET", `/v1/sessions/${id}/events`, {}, ended(1));
    expect(whole.events.map(({ event }) => event)).toContain("turn.completed");
    const long = JSON.stringify([{ say: "y ".repeat(500).trim(), token_ms: 20 }]);
    const cancelled = listen("POST", `/v1/sessions/${id}/messages`, { body: { content: long } });
    await expect.poll(async () => (await ask("GET", `/v1/sessions/${id}`)).body.state, { timeout: 20_000 }).toBe("thinking");
    expect((await ask("POST", `/v1/sessions/${id}/cancel`, { body: { reason: "enough" } })).status).toBe(200);
    const { events } = await cancelled;
    expect(events.at(-1)).toMatchObject({ event: "turn.cancelled", data: { turn: 2, reason: "enough" } });
  });

  test("a page of events is JSON with a cursor each, goes on from `next`, and ends with null", async () => {
    const id = await newSession();
    await listen("POST", `/v1/sessions/${id}/messages`, { body: { content: "hello there" } });
    const headers = { accept: "application/json" };
    const all = (await ask("GET", `/v1/sessions/${id}/events?limit=1000`, { headers })).body;
    expect(all.next).toBeNull();
    const items = [];
    let cursor: string | null = "";
    while (cursor !== null) {
      const page: Answer = await ask("GET", `/v1/sessions/${id}/events?limit=2&cursor=${cursor}`, { headers });
      expect(page.body.items.length).toBeLessThanOrEqual(2);
      items.push(...page.body.items);
      cursor = page.body.next;
    }
    expect(items).toEqual(all.items);
    expect(items[0]).toMatchObject({ type: "session.created", cursor: expect.any(String), seq: 1 });
  });

  test("a cursor that is none, or that lies beyond the session's end, is 422", async () => {
    const id = await newSession();
    const far = Buffer.from("[1,999999999,0]").toString("base64url");
    for (const cursor of ["garbage!", "AAAA", far]) {
      expectProblem(await ask("GET", `/v1/sessions/${id}/events?cursor=${encodeURIComponent(cursor)}`), 422, "invalid");
      expectProblem(await ask("GET", `/v1/sessions/${id}/events`, { headers: { "last-event-id": cursor } }), 422, "invalid");
    }
  });

  test("what a busy session refuses reaches the client with its code", async () => {
    const id = await newSession("actor");
    const script = JSON.stringify([{ say: "slow slow slow", first_token_ms: 300 }]);
    await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: script } });
    expectProblem(await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: "x", on_busy: "reject" } }), 409, "busy");
    expectProblem(await ask("POST", `/v1/sessions/${id}/messages`, { body: { content: "" } }), 422, "invalid");
  });

  test("a client that does not read slows nobody and loses nothing: when it reads again, it gets all of it", async () => {
    let behind = 0;
    const counting = await cell.another({
      metrics: {
        add: (name) => void (name === "troupe_gateway_gaps_repaired_total" && behind++),
        set() {},
        observe() {},
        text: async () => "",
        content_type: "",
      },
    });
    const id = await newSession("actor");
    const { hostname, port } = new URL(counting.url);
    const socket = connect(Number(port), hostname);
    socket.pause();
    let text = "";
    socket.on("data", (data) => (text += data.toString()));
    socket.write(`GET /v1/sessions/${id}/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${keyOf("acme")}\r\n\r\n`);
    const words = Array.from({ length: 120 }, (_, index) => `${index}-${"w".repeat(60_000)}`).join(" ");
    for (let turn = 1; turn <= 12; turn++) {
      const began_ms = performance.now();
      const { events } = await listen(
        "POST",
        `/v1/sessions/${id}/messages`,
        { body: { content: JSON.stringify([{ say: words.slice(turn * 1000, turn * 1000 + 900_000) }]) } },
        undefined,
        counting,
      );
      expect(textOf(events, turn)).toHaveLength(900_000);
      expect(performance.now() - began_ms).toBeLessThan(20_000);
    }
    expect(behind).toBeGreaterThan(0);
    socket.resume();
    await expect.poll(() => text.includes('"type":"turn.completed","turn":12'), { timeout: 60_000, interval: 200 }).toBe(true);
    socket.destroy();
    const lines = text
      .split("\n")
      .filter((line) => line.startsWith("data: "))
      .map((line) => line.slice(6));
    const frames = lines.flatMap((line) => (line.endsWith("}") || line.endsWith("}\r") ? [JSON.parse(line)] : []));
    for (let turn = 1; turn <= 12; turn++) {
      const said = frames
        .filter((frame) => frame.type === undefined && frame.turn === turn)
        .map((frame) => frame.text)
        .join("");
      expect(said.length, `turn ${turn}`).toBe(900_000);
    }
    expect(text).toContain(": behind; read again from ");
  });

  test("above the bound of open streams a new one is 503 overloaded with retry-after, and one that ends makes room", async () => {
    const small = await cell.another({ streams_max: 1 });
    const id = await newSession();
    const first = await fetch(`${small.url}/v1/sessions/${id}/events`, { headers: bearer(keyOf("acme")) });
    const refused = await ask("GET", `/v1/sessions/${id}/events`, {}, small);
    expectProblem(refused, 503, "overloaded");
    expect(refused.headers.get("retry-after")).toBe("1");
    await first.body?.cancel();
    await expect
      .poll(async () => {
        const response = await fetch(`${small.url}/v1/sessions/${id}/events`, { headers: bearer(keyOf("acme")) });
        await response.body?.cancel();
        return response.status;
      })
      .toBe(200);
  });

  test("closing a gateway ends its streams at once, so that clients go on elsewhere", async () => {
    const closing = await cell.another();
    const id = await newSession();
    const response = await fetch(`${closing.url}/v1/sessions/${id}/events`, { headers: bearer(keyOf("acme")) });
    const reading = (async () => {
      let bytes = 0;
      for await (const part of response.body ?? []) bytes += (part as Uint8Array).byteLength;
      return bytes;
    })();
    await closing.close();
    expect(await reading).toBeGreaterThan(0);
  });
});

describe("bad requests", () => {
  test("whatever is sent, the answer is a problem below 500", async () => {
    const id = await newSession();
    const json = { "content-type": "application/json" };
    const requests: [string, string, Ask, number, string][] = [
      ["POST", "/v1/sessions", { raw: "{" }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: "[]" }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: "null" }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: '"x"' }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: new Uint8Array([0x7b, 0x22, 0xff, 0x22, 0x7d]) }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: '{"__proto__":{"agent":"assistant"}}' }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: `{"agent":"assistant","metadata":${"[".repeat(5000)}${"]".repeat(5000)}}` }, 422, "invalid"],
      ["POST", "/v1/sessions", { raw: "x", headers: { "content-type": "text/plain" } }, 415, "invalid"],
      ["POST", `/v1/sessions/${id}/messages`, { raw: JSON.stringify({ content: "x".repeat(1024 * 1024) }) }, 413, "too_large"],
      ["POST", `/v1/sessions/${id}/messages`, { raw: "", headers: json }, 422, "invalid"],
      ["POST", `/v1/sessions/${id}/messages`, { body: { content: "x" }, headers: { "idempotency-key": "k".repeat(256) } }, 422, "invalid"],
      ["POST", `/v1/sessions/${id}/messages`, { body: { content: "x" }, headers: { "idempotency-key": "ümlaut" } }, 422, "invalid"],
      ["GET", "/v1/nothing", {}, 404, "not_found"],
      ["GET", "/", {}, 404, "not_found"],
      ["GET", "/v1/%zz", {}, 404, "not_found"],
      ["GET", `/v1/sessions/${"a".repeat(2000)}`, {}, 404, "not_found"],
      ["POST", `/v1/sessions/${id}/unpark`, {}, 409, "illegal_transition"],
      ["DELETE", `/v1/sessions/${id}`, {}, 405, "not_found"],
      ["POST", `/v1/sessions/${id}`, { body: {} }, 405, "not_found"],
      ["GET", `/v1/sessions/${id}/messages`, {}, 405, "not_found"],
    ];
    for (const [method, path, told, status, code] of requests) {
      const answer = await ask(method, path, told);
      expect([method, path.slice(0, 60), answer.status, answer.body.code]).toEqual([method, path.slice(0, 60), status, code]);
      expectProblem(answer, status, code);
    }
    expect((await ask("DELETE", `/v1/sessions/${id}`)).headers.get("allow")).toBe("GET");
    expect(cell.logged.filter((line) => line.includes("bug of ours"))).toEqual([]);
  });

  test("what is not HTTP is answered 400 with a problem, and the gateway goes on", async () => {
    const { hostname, port } = new URL(gateway.url);
    const answer = await new Promise<string>((resolve, reject) => {
      const socket = connect(Number(port), hostname, () => socket.write("\u0016\u0003\u0001 nonsense\r\n\r\n"));
      let text = "";
      socket.on("data", (data) => (text += data.toString()));
      socket.on("close", () => resolve(text));
      socket.on("error", reject);
    });
    expect(answer).toMatch(/^HTTP\/1\.1 400 /);
    expect(answer).toContain("urn:troupe:error:invalid");
    expect((await ask("GET", "/healthz", { key: null })).status).toBe(200);
  });
});

describe("for machines", () => {
  test("health answers, readiness tells its components and is 503 when it is not, metrics are text", async () => {
    expect((await ask("GET", "/healthz", { key: null })).body).toEqual({ status: "ok" });
    expect((await ask("GET", "/readyz", { key: null })).body).toEqual({ ready: true, components: { nats: { ok: true } } });
    const unready = await cell.another({
      readiness: async () => ({ ready: false, components: { nats: { ok: false, detail: "away" } } }),
      metrics: { add() {}, set() {}, observe() {}, text: async () => "troupe_x 1\n", content_type: "text/plain; version=0.0.4" },
    });
    const answer = await ask("GET", "/readyz", { key: null }, unready);
    expect([answer.status, answer.body.components.nats.detail]).toEqual([503, "away"]);
    expect((await ask("GET", "/metrics", { key: null }, unready)).body).toBe("troupe_x 1\n");
  });

  test("while the bus is away, sessions are 503 with retry-after, never 404", async () => {
    const id = await newSession();
    const lonely = await cell.another();
    const name = "gateway-"; // the last one that was connected
    expect((await ask("GET", `/v1/sessions/${id}`, {}, lonely)).status).toBe(200);
    for (let n = 0; n < 20; n++) cell.broker.cut(`${name}${n}`);
    try {
      const refused = await ask("GET", `/v1/sessions/${id}`, {}, lonely);
      expectProblem(refused, 503, "unavailable");
      expect(refused.headers.get("retry-after")).toBe("1");
    } finally {
      for (let n = 0; n < 20; n++) cell.broker.mend(`${name}${n}`);
    }
    expect((await ask("GET", `/v1/sessions/${id}`, {}, lonely)).status).toBe(200);
  });
});
