// Goal:   bad input is refused with its documented code and harms nobody: the workers live, the next good command is done, nothing is lost.
// Method: every kind of bad input over HTTP and over NATS against the real `up`; after each a good command to the same session, whose
//         acknowledged messages are counted against its journal at the end.
import { spawn } from "node:child_process";
import { once } from "node:events";
import type { AddressInfo } from "node:net";
import { createServer } from "node:net";
import { connect, headers, JSONCodec, type NatsConnection } from "nats";
import { pack } from "msgpackr";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import { ERRORS, type ErrorCode } from "../../protocol/errors.ts";
import { type ApiRequest, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

const LONG = "x".repeat(65);
const TWO_MEGABYTES = "x".repeat(2 * 1024 * 1024);
const json = JSONCodec();
let troupe: Troupe;
let processes: string[];
let demo: NatsConnection;
/** What was said to the good session and acknowledged, in order. */
const acknowledged: string[] = [];

const running = (): string[] => troupe.dev().processes.map(({ role, id, pid }) => `${role} ${id} ${pid}`);

beforeAll(async () => {
  troupe = await startTroupe();
  processes = running();
  const { nats_url, tenants } = troupe.dev();
  const login = tenants[0]?.nats;
  demo = await connect({ servers: nats_url, user: login?.user ?? "", pass: login?.password ?? "", inboxPrefix: "_INBOX_demo" });
  await troupe.json(201, "/v1/sessions", { json: { id: "good", agent: "assistant" } });
  await troupe.json(201, "/v1/sessions", { json: { id: "over", agent: "assistant" } });
  await troupe.json(200, "/v1/sessions/over/terminate", { json: {} });
}, 120_000);
afterAll(async () => {
  await demo?.close();
});

/** The good command right after a bad one: acknowledged with the next turn. */
async function goodCommand(): Promise<void> {
  const content = `good${acknowledged.length}`;
  const { turn } = await troupe.json<{ turn: number }>(202, "/v1/sessions/good/messages", { json: { content } });
  acknowledged.push(content);
  expect(turn).toBe(acknowledged.length);
}

describe("over HTTP", () => {
  const send = "/v1/sessions/good/messages";
  const bytes = (...parts: (string | number[])[]): Uint8Array<ArrayBuffer> => new Uint8Array(Buffer.concat(parts.map((part) => Buffer.from(part as string))));
  const cases: readonly { what: string; path: string; request: ApiRequest; code: ErrorCode; status?: number; pointer?: string }[] = [
    { what: "broken JSON", path: send, request: { body: '{"content": "half' }, code: "invalid" },
    { what: "no JSON at all", path: send, request: { body: "\u0000\u0001\u0002" }, code: "invalid" },
    { what: "a body that is a list", path: send, request: { json: [1, 2, 3] }, code: "invalid" },
    { what: "a number for the content", path: send, request: { json: { content: 7 } }, code: "invalid", pointer: "/content" },
    { what: "no content", path: send, request: { json: {} }, code: "invalid", pointer: "/content" },
    { what: "an empty content", path: send, request: { json: { content: "" } }, code: "invalid", pointer: "/content" },
    { what: "a choice that is none", path: send, request: { json: { content: "x", on_busy: "shout" } }, code: "invalid", pointer: "/on_busy" },
    { what: "a part of a kind that is not taken", path: send, request: { json: { content: [{ type: "image" }] } }, code: "invalid", pointer: "/content" },
    { what: "a NUL character", path: send, request: { json: { content: "a\u0000b" } }, code: "invalid", pointer: "/content" },
    { what: "a lone surrogate", path: send, request: { body: '{"content":"\\ud800"}' }, code: "invalid", pointer: "/content" },
    { what: "bytes that are no UTF-8", path: send, request: { body: bytes('{"content":"', [0xff, 0xfe, 0xc0], '"}') }, code: "invalid" },
    { what: "a surrogate written as bytes", path: send, request: { body: bytes('{"content":"', [0xed, 0xa0, 0x80], '"}') }, code: "invalid" },
    { what: "a body of 2 MB", path: send, request: { json: { content: TWO_MEGABYTES } }, code: "too_large" },
    { what: "half a million brackets", path: send, request: { body: `{"content":${"[".repeat(400_000)}${"]".repeat(400_000)}}` }, code: "invalid" },
    {
      what: "a body that is no JSON by its own word",
      path: send,
      request: { body: "content=x", headers: { "content-type": "text/plain" } },
      code: "invalid",
      status: 415,
    },
    {
      what: "an Idempotency-Key that is none",
      path: send,
      request: { json: { content: "x" }, headers: { "idempotency-key": "k".repeat(256) } },
      code: "invalid",
    },
    { what: "an agent that is not there", path: "/v1/sessions", request: { json: { agent: "nobody" } }, code: "agent_unknown" },
    { what: "an agent that is no word", path: "/v1/sessions", request: { json: { agent: { name: "x" } } }, code: "invalid", pointer: "/agent" },
    {
      what: "a model that is not there",
      path: "/v1/sessions",
      request: { json: { agent: "assistant", overrides: { model: "nobody/none" } } },
      code: "model_unknown",
    },
    { what: "a prototype for an agent", path: "/v1/sessions", request: { body: '{"agent":"__proto__"}' }, code: "agent_unknown" },
    { what: "an id of 65 characters", path: "/v1/sessions", request: { json: { id: LONG, agent: "assistant" } }, code: "invalid", pointer: "/id" },
    { what: "an id with a dot and a wildcard", path: "/v1/sessions", request: { json: { id: "a.*", agent: "assistant" } }, code: "invalid", pointer: "/id" },
    { what: "a session whose id has 65 characters", path: `/v1/sessions/${LONG}/messages`, request: { json: { content: "x" } }, code: "not_found" },
    { what: "a session that is not there", path: "/v1/sessions/nobody/messages", request: { json: { content: "x" } }, code: "not_found" },
    { what: "a verb that is not there", path: "/v1/sessions/good/frobnicate", request: { json: {} }, code: "not_found" },
    { what: "a kind that is not there", path: "/v1/dragons", request: { json: {} }, code: "not_found" },
    { what: "another method than there is", path: "/v1/sessions/good", request: { method: "DELETE" }, code: "not_found", status: 405 },
    { what: "a cursor that is none of ours", path: "/v1/sessions/good/events?cursor=hello", request: {}, code: "invalid" },
    {
      what: "a cursor after the end",
      path: `/v1/sessions/good/events?cursor=${Buffer.from("[1,999999,0]").toString("base64url")}`,
      request: {},
      code: "invalid",
    },
    { what: "a limit that is none", path: "/v1/sessions?limit=-1", request: {}, code: "invalid" },
    { what: "a message for a terminated session", path: "/v1/sessions/over/messages", request: { json: { content: "x" } }, code: "illegal_transition" },
    { what: "a verb that the state does not allow", path: "/v1/sessions/over/pause", request: { json: {} }, code: "illegal_transition" },
    { what: "no key", path: send, request: { json: { content: "x" }, key: null }, code: "unauthenticated" },
    { what: "a key that is none", path: send, request: { json: { content: "x" }, key: "hello" }, code: "unauthenticated" },
    { what: "a key of nobody", path: send, request: { json: { content: "x" }, key: "troupe.nobody.abcdef012345.c2VjcmV0" }, code: "unauthenticated" },
    {
      what: "another scheme than Bearer",
      path: send,
      request: { json: { content: "x" }, key: null, headers: { authorization: "Basic eDp5" } },
      code: "unauthenticated",
    },
    { what: "2 MB with no key", path: send, request: { json: { content: TWO_MEGABYTES }, key: null }, code: "unauthenticated" },
  ];

  test.each(cases)("$what is refused as $code, and a good command after it is done", async ({ path, request, code, status = ERRORS[code].status, pointer }) => {
    const answer = await troupe.api(path, request);
    const problem = (await answer.json()) as { code: string; status: number; detail: string; details?: { errors?: { pointer: string }[] } };
    expect(problem).toMatchObject({ code, status });
    expect(answer.status).toBe(status);
    expect(answer.headers.get("content-type")).toBe("application/problem+json");
    if (pointer !== undefined) expect(problem.details?.errors?.map((error) => error.pointer)).toContain(pointer);
    await goodCommand();
  });

  test("a key with one character changed is refused", async () => {
    const { key } = troupe;
    const wrong = `${key.slice(0, -1)}${key.endsWith("A") ? "B" : "A"}`;
    expect(await troupe.json(401, send, { json: { content: "x" }, key: wrong })).toMatchObject({ code: "unauthenticated" });
    await goodCommand();
  });
});

interface Refusal {
  readonly ok: boolean;
  readonly error?: { readonly code: string; readonly details?: { readonly errors?: readonly { readonly pointer: string }[] } };
}
let asked = 0;
async function publish(subject: string, data: Uint8Array, head: Readonly<Record<string, string>> = {}): Promise<Refusal> {
  const inbox = `_INBOX_demo.bad.${asked++}`;
  const subscription = demo.subscribe(inbox, { max: 1 });
  const reply = (async () => {
    for await (const message of subscription) return json.decode(message.data) as Refusal;
    return undefined;
  })();
  const named = headers();
  for (const [name, value] of Object.entries({ "Troupe-Reply-To": inbox, ...head })) named.set(name, value);
  await demo.jetstream().publish(subject, data, { headers: named });
  const heard = await Promise.race([reply, later(60_000, undefined)]);
  subscription.unsubscribe();
  if (heard === undefined) throw new Error("no reply came");
  return heard;
}

describe("over NATS", () => {
  const good = "tenant.demo.session.good.command";
  const text = (words: string): Uint8Array => Buffer.from(words);
  const say = (type: string, body: unknown): Uint8Array => json.encode({ type, body });
  const cases: readonly { what: string; subject?: string; data: Uint8Array; head?: Readonly<Record<string, string>>; code: ErrorCode; pointer?: string }[] = [
    { what: "broken JSON", data: text('{"type":"message.send"'), code: "invalid" },
    { what: "nothing at all", data: new Uint8Array(0), code: "invalid" },
    { what: "JSON that is no object", data: text("null"), code: "invalid" },
    { what: "no type", data: json.encode({ body: {} }), code: "invalid", pointer: "/type" },
    { what: "a type that is no word", data: json.encode({ type: 7, body: {} }), code: "invalid", pointer: "/type" },
    { what: "an unknown type", data: say("message.shout", { content: "x" }), code: "invalid" },
    { what: "a type out of the prototype", data: say("constructor", {}), code: "invalid" },
    { what: "a body that is no object", data: say("message.send", "x"), code: "invalid", pointer: "/body" },
    { what: "a number for the content", data: say("message.send", { content: 7 }), code: "invalid", pointer: "/body/content" },
    { what: "a NUL character", data: say("message.send", { content: "a\u0000b" }), code: "invalid", pointer: "/body/content" },
    { what: "a lone surrogate", data: text('{"type":"message.send","body":{"content":"\\udfff"}}'), code: "invalid", pointer: "/body/content" },
    { what: "a NUL in a name", data: text('{"type":"message.send","body":{"content":"x","a\\u0000":1}}'), code: "invalid" },
    {
      what: "bytes that are no UTF-8",
      data: Buffer.concat([text('{"type":"message.send","body":{"content":"'), Buffer.from([0xff, 0xfe]), text('"}}')]),
      code: "invalid",
    },
    { what: "half a million brackets", data: text(`{"type":"message.send","body":${"[".repeat(400_000)}${"]".repeat(400_000)}}`), code: "invalid" },
    {
      what: "msgpack that breaks off",
      data: pack({ type: "message.send", body: { content: "xyz" } }).subarray(0, 12),
      head: { "Content-Type": "application/msgpack" },
      code: "invalid",
    },
    {
      what: "msgpack of what is no JSON",
      data: pack({ type: "message.send", body: { content: new Date(0) } }),
      head: { "Content-Type": "application/msgpack" },
      code: "invalid",
    },
    { what: "a content type that nobody reads", data: say("message.send", { content: "x" }), head: { "Content-Type": "application/xml" }, code: "invalid" },
    { what: "a key of 256 bytes", data: say("message.send", { content: "x" }), head: { "Idempotency-Key": "k".repeat(256) }, code: "invalid" },
    { what: "a command of the runtime's own", data: say("session.unpark", {}), code: "forbidden" },
    { what: "a command of another kind of actor", data: say("agent.put", { agent: "x", config: {} }), code: "invalid" },
    {
      what: "an agent that is not there",
      subject: "tenant.demo.session.fresh.command",
      data: say("session.create", { agent: "nobody" }),
      code: "agent_unknown",
    },
    {
      what: "a model that is not there",
      subject: "tenant.demo.session.fresh.command",
      data: say("session.create", { agent: "assistant", overrides: { model: "a/b" } }),
      code: "model_unknown",
    },
    { what: "a session that is not there", subject: "tenant.demo.session.nobody.command", data: say("message.send", { content: "x" }), code: "not_found" },
    { what: "a kind that is not hosted", subject: "tenant.demo.workflow.w1.command", data: say("workflow.execute", {}), code: "invalid" },
    { what: "an id of 65 characters", subject: `tenant.demo.session.${LONG}.command`, data: say("session.create", { agent: "assistant" }), code: "invalid" },
    { what: "an id that is no id", subject: "tenant.demo.session.ä$%.command", data: say("session.create", { agent: "assistant" }), code: "invalid" },
    {
      what: "a message for a terminated session",
      subject: "tenant.demo.session.over.command",
      data: say("message.send", { content: "x" }),
      code: "illegal_transition",
    },
  ];

  test.each(cases)("$what is refused as $code, and a good command after it is done", async ({ subject = good, data, head, code, pointer }) => {
    const heard = await publish(subject, data, head);
    expect(heard).toMatchObject({ ok: false, error: { code, message: expect.any(String) } });
    if (pointer !== undefined) expect(heard.error?.details?.errors?.map((error) => error.pointer)).toContain(pointer);
    await goodCommand();
  });

  test("a message of 2 MB is refused by the broker itself, and nothing of it is stored", async () => {
    await expect(demo.jetstream().publish(good, say("message.send", { content: TWO_MEGABYTES }))).rejects.toThrow(/size/);
    await goodCommand();
  });

  test("a subject with a kind that there is not is stored nowhere", async () => {
    const { nats_url, nats_operator } = troupe.dev();
    const operator = await connect({ servers: nats_url, user: nats_operator.user, pass: nats_operator.password });
    await expect(operator.jetstream().publish("tenant.demo.dragon.d1.command", say("session.create", { agent: "assistant" }))).rejects.toThrow(/503/);
    // And a tenant's user may not even say it.
    await expect(demo.jetstream().publish("tenant.demo.dragon.d1.command", say("session.create", {}), { timeout: 1_000 })).rejects.toThrow(/.+/);
    await operator.close();
    await goodCommand();
  });

  test("a wrong password opens nothing", async () => {
    await expect(connect({ servers: troupe.dev().nats_url, user: "tenant-demo", pass: "wrong", reconnect: false })).rejects.toThrow(/authorization/i);
    await expect(connect({ servers: troupe.dev().nats_url, reconnect: false })).rejects.toThrow(/authorization/i);
  });
});

test("every acknowledged message is in the journal, once and in order, and its turn has ended", async () => {
  const idle = async (): Promise<boolean> => {
    const view = await troupe.json<{ state: string; queue_length: number }>(200, "/v1/sessions/good");
    return view.state === "idle" && view.queue_length === 0;
  };
  expect(await until(idle, 60_000, 100)).toBe(true);
  const journal = await troupe.journal("demo/session/good");
  const entries = journal.flatMap((message) => message.entries);
  expect(entries.flatMap((entry) => (entry.t === "command" && entry.type === "message.send" ? [entry.body["content"]] : []))).toEqual(acknowledged);
  expect(acknowledged.length).toBeGreaterThan(60);
  expect(journal.flatMap(({ events }) => events).filter(({ type }) => type === "turn.completed")).toHaveLength(acknowledged.length);
  // What was refused over the bus stands in the journal too, at a bounded rate.
  expect(entries.filter(({ t }) => t === "refused").length).toBeGreaterThan(5);
});

test("no inbox holds anything back, and no process had to be started again", async () => {
  const bus = await troupe.bus();
  expect(await until(async () => (await bus.bounds("COMMANDS")).messages === 0, 60_000, 100)).toBe(true);
  expect(running()).toEqual(processes);
  for (const { role, id } of troupe.dev().processes.filter((one) => one.role === "worker")) {
    const health = await typed(troupe, ["show", `system/worker/${id}`, "--json"]);
    expect({ role, id, health: JSON.parse(health.stdout) as unknown }).toMatchObject({ health: { state: "ready" } });
  }
  // A worker's journal holds what the supervisors decided about it, and its story tells that once.
  const { story } = JSON.parse((await typed(troupe, ["explain", "system/worker/w1", "--json"])).stdout) as { story: { what: string; text: string }[] };
  expect(story.filter(({ text }) => text === "worker.state from joining to ready")).toHaveLength(1);
  const verified = await typed(troupe, ["verify", "--json"]);
  expect(verified).toMatchObject({ code: 0, stdout: expect.stringContaining('"violations":0') });
});

test("a second start on the same home is told who has it, and the first goes on as if nothing had been", async () => {
  const before = troupe.dev();
  const tried = await troupe.cli(["up"]);
  expect(tried).toMatchObject({ code: 3, stdout: expect.stringContaining("already runs on this data") });
  expect(troupe.dev()).toEqual(before);
});

test("a process that is left behind would be seen", async () => {
  // Only Linux says of any process where it works.
  const stray =
    process.platform === "linux" ? spawn(process.execPath, ["-e", "setInterval(() => undefined, 1000)"], { cwd: troupe.home, stdio: "ignore" }) : undefined;
  try {
    if (stray === undefined) expect(await troupe.stop()).toBe(0);
    else await expect(troupe.stop()).rejects.toThrow(new RegExp(`${stray.pid}.* were left`));
  } finally {
    stray?.kill("SIGKILL");
  }
});

test("a start with other shards than the data was made with says so, ends, and leaves nothing running", async () => {
  const tried = await troupe.cli(["up", "--shards", "32"]);
  expect(tried).toMatchObject({ code: 3, stdout: expect.stringMatching(/shards .*have 16, want 32/) });
  expect(await until(() => troupe.processes().length === 0, 5_000)).toBe(true);
});

test("a broker that cannot start takes the database with it that could", async () => {
  const taken = createServer().listen(0, "127.0.0.1");
  await once(taken, "listening");
  const { port } = taken.address() as AddressInfo;
  try {
    expect(await troupe.cli(["up"], { env: { TROUPE_NATS_PORT: String(port) } })).toMatchObject({ code: 3, stdout: expect.stringContaining(String(port)) });
    expect(await until(() => troupe.processes().length === 0, 5_000)).toBe(true);
  } finally {
    taken.close();
  }
});
