// Goal: a chat shows each turn's text exactly once, whatever happens to the connection, and Ctrl-C cancels before it leaves.
// Method: a gateway of canned answers behind `fetch`; turn-text and server-sent events also by themselves.
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { readDevFile } from "../../cli/dev-file.ts";
import { serverEvents } from "../../cli/sse.ts";
import { createTurnText } from "../../cli/turn-text.ts";
import { readAgent } from "../../cli/tenancy.ts";
import type { TokenChunk } from "../../protocol/tokens.ts";
import { run } from "./ground.ts";

const frame = (id: string, event: string, data: object): string => `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
const token = (index: number, text: string, attempt = 1, step = 0): object => ({ turn: 1, step, attempt, epoch: 1, index, text });

interface Asked {
  readonly method: string;
  readonly path: string;
  readonly headers: Record<string, string>;
  readonly body: unknown;
}

/** Answers `fetch` from a list: text is an event stream, which breaks at its end when it ends with "!". */
function gatewayOf(answer: (asked: Asked, count: number) => string | object | Error) {
  const asked: Asked[] = [];
  const fetch = async (url: string, init: RequestInit = {}): Promise<Response> => {
    const one = {
      method: init.method ?? "GET",
      path: new URL(url).pathname,
      headers: init.headers as Record<string, string>,
      body: init.body === undefined ? undefined : JSON.parse(init.body as string),
    };
    asked.push(one);
    const answered = answer(one, asked.length);
    if (answered instanceof Error) throw answered;
    if (answered instanceof Response) return answered;
    if (typeof answered !== "string") return Response.json(answered);
    const breaks = answered.endsWith("!");
    let given = false;
    const body = new ReadableStream({
      pull(controller) {
        if (!given) controller.enqueue(new TextEncoder().encode(breaks ? answered.slice(0, -1) : answered));
        else if (breaks) controller.error(new Error("connection reset"));
        else controller.close();
        given = true;
      },
    });
    return new Response(body, { headers: { "content-type": "text/event-stream" } });
  };
  return { asked, fetch };
}
const chat = (fetch: (url: string, init?: RequestInit) => Promise<Response>, input: string, more: object = {}, argv: readonly string[] = []) =>
  run(["chat", "--gateway", "http://gateway", "--key", "troupe.acme.k.s", ...argv], { fetch, input, ...more });
const completed = frame("9", "message.completed", { turn: 1, step: 0, role: "assistant", content: "hello world" }) + frame("10", "turn.completed", { turn: 1 });

describe("chat from a pipe", () => {
  test("sends each line with the tenant's key and prints each finished answer", async () => {
    const { asked, fetch } = gatewayOf(({ path }) =>
      path === "/v1/sessions"
        ? { id: "s1", agent: "a" }
        : frame("1", "turn.started", { turn: 1 }) + frame("2", "token", token(0, "hello ")) + frame("3", "token", token(1, "world")) + completed,
    );
    const ran = await chat(fetch, "first\n\nsecond\n", {}, ["--agent", "a"]);
    expect(ran).toMatchObject({ code: 0, stdout: "hello world\nhello world\n" });
    expect(asked.map(({ method, path, body }) => [method, path, body])).toEqual([
      ["POST", "/v1/sessions", { agent: "a" }],
      ["POST", "/v1/sessions/s1/messages", { content: "first" }],
      ["POST", "/v1/sessions/s1/messages", { content: "second" }],
    ]);
    expect(asked[1]?.headers["authorization"]).toBe("Bearer troupe.acme.k.s");
    expect(asked[1]?.headers["idempotency-key"]).not.toBe(asked[2]?.headers["idempotency-key"]);
  });

  test("a stream that breaks is taken up where it was, and no text is given twice", async () => {
    const { asked, fetch } = gatewayOf(({ path }, count) => {
      if (path === "/v1/sessions/s1") return { id: "s1" };
      if (count === 2) return `${frame("1", "turn.started", { turn: 1 })}${frame("2", "token", token(0, "hello "))}!`;
      if (count === 3) return new TypeError("fetch failed");
      return frame("2", "token", token(0, "hello ")) + frame("3", "token", token(1, "world")) + completed;
    });
    expect(await chat(fetch, "hi\n", {}, ["--session", "s1"])).toMatchObject({ code: 0, stdout: "hello world\n" });
    expect(asked.slice(1).map(({ method, path, headers }) => [method, path, headers["last-event-id"]])).toEqual([
      ["POST", "/v1/sessions/s1/messages", undefined],
      ["GET", "/v1/sessions/s1/events", "2"],
      ["GET", "/v1/sessions/s1/events", "2"],
    ]);
  });

  test("a message whose answer never came is sent again under the same key", async () => {
    const { asked, fetch } = gatewayOf(({ path }, count) => (path === "/v1/sessions" ? { id: "s1" } : count === 2 ? new TypeError("fetch failed") : completed));
    expect((await chat(fetch, "hi\n")).stdout).toBe("hello world\n");
    expect(asked[2]?.headers["idempotency-key"]).toBe(asked[1]?.headers["idempotency-key"]);
  });

  test("text of a lost attempt is not in what a pipe gets", async () => {
    const events = [
      frame("1", "token", token(0, "wrong ")),
      frame("2", "superseded", { turn: 1, step: 0, attempt: 1 }),
      frame("3", "token", token(0, "hello world", 2)),
      completed,
    ].join("");
    const { fetch } = gatewayOf(({ path }) => (path === "/v1/sessions" ? { id: "s1" } : events));
    expect((await chat(fetch, "hi\n")).stdout).toBe("hello world\n");
  });

  test("a refused message and a failed turn are exit code 1, with the reason", async () => {
    const problem = () =>
      Response.json(
        { code: "agent_unknown", detail: "there is no agent 'x'", status: 422 },
        { status: 422, headers: { "content-type": "application/problem+json" } },
      );
    expect(await chat(gatewayOf(problem).fetch, "hi\n")).toMatchObject({ code: 1, stderr: "agent_unknown: there is no agent 'x'\n" });
    const failed = frame("1", "turn.failed", { turn: 1, reason: "loop_limit", message: "25 calls" });
    const { fetch } = gatewayOf(({ path }) => (path === "/v1/sessions" ? { id: "s1" } : failed));
    expect(await chat(fetch, "hi\n")).toMatchObject({ code: 1, stderr: "turn.failed: loop_limit: 25 calls\n" });
  });

  test("a named session that is not there is created under that name", async () => {
    const { asked, fetch } = gatewayOf(({ method, path }) => {
      if (method === "GET") return Response.json({ code: "not_found", detail: "-" }, { status: 404 });
      return path === "/v1/sessions" ? { id: "mine" } : completed;
    });
    expect((await chat(fetch, "hi\n", {}, ["--session", "mine"])).code).toBe(0);
    expect(asked[1]?.body).toEqual({ agent: "assistant", id: "mine" });
  });

  test("the key and the gateway come from dev.json when they are not given", async () => {
    const directory = await mkdtemp(join(tmpdir(), "troupe-chat-"));
    await writeFile(join(directory, "dev.json"), JSON.stringify({ gateway_url: "http://there", tenants: [{ id: "a" }, { id: "b", key: "troupe.b.k.s" }] }));
    const { asked, fetch } = gatewayOf(({ path }) => (path === "/v1/sessions" ? { id: "s1" } : completed));
    expect((await run(["chat"], { fetch, input: "hi\n", env: { TROUPE_HOME: directory } })).code).toBe(0);
    expect(asked[0]?.headers["authorization"]).toBe("Bearer troupe.b.k.s");
    expect(await run(["chat", "--tenant", "a"], { fetch, env: { TROUPE_HOME: directory } })).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("unauthenticated"),
    });
    await writeFile(join(directory, "dev.json"), "{");
    expect(await readDevFile(directory)).toMatchObject({ kind: "unreadable" });
    await writeFile(join(directory, "dev.json"), '{"gateway_url": 7}');
    expect(await readDevFile(directory)).toMatchObject({ kind: "unreadable", reason: expect.stringContaining("gateway_url") });
    await rm(directory, { recursive: true });
  });

  test("Ctrl-C cancels the turn that runs, and a second one leaves", async () => {
    let interrupt: () => void = () => {};
    let streaming: () => void = () => {};
    const begun = new Promise<void>((resolve) => (streaming = resolve));
    const cancelled: string[] = [];
    const fetch = async (url: string, init: RequestInit = {}): Promise<Response> => {
      const { pathname } = new URL(url);
      if (pathname === "/v1/sessions") return Response.json({ id: "s1" });
      if (pathname.endsWith("/cancel")) {
        cancelled.push(pathname);
        return Response.json({ id: "s1" });
      }
      const body = new ReadableStream({
        start(controller) {
          init.signal?.addEventListener("abort", () => controller.error(new Error("aborted")));
          streaming();
        },
      });
      return new Response(body);
    };
    const chatting = chat(fetch, "hi\n", { on_interrupt: (listener: () => void) => ((interrupt = listener), () => {}) });
    await begun;
    interrupt();
    await expect.poll(() => cancelled, { timeout: 20_000 }).toEqual(["/v1/sessions/s1/cancel"]);
    interrupt();
    expect((await chatting).code).toBe(1);
    expect(cancelled).toHaveLength(1);
  });
});

describe("chat at a terminal", () => {
  test("streams tokens as they come, and marks the text of a lost attempt as void", async () => {
    let text = "";
    const events = [
      frame("1", "token", token(0, "wrong ")),
      frame("2", "superseded", { turn: 1, step: 0, attempt: 1 }),
      frame("3", "token", token(0, "hello ", 2)),
      completed,
    ].join("");
    const { fetch } = gatewayOf(({ path }) => (path === "/v1/sessions" ? { id: "s1" } : events));
    await chat(fetch, "hi\n", { stdout: { isTTY: true, write: (more: string) => void (text += more) }, env: { NO_COLOR: "1" } });
    expect(text).toBe("wrong \n⟲ void: attempt 1 was lost; it begins again\nhello world\n");
  });
});

describe("turn-text", () => {
  function collect() {
    const given: string[] = [];
    const text = createTurnText({ began: () => given.push("|"), text: (piece) => given.push(piece), voided: () => given.push("✗") });
    return { text, given };
  }
  const chunk = (index: number, words: string, more: Partial<TokenChunk> = {}): TokenChunk => ({
    turn: 1,
    step: 0,
    attempt: 1,
    epoch: 1,
    index,
    text: words,
    ...more,
  });

  test("chunks are given in order and once, however they come (X1)", () => {
    const { text, given } = collect();
    for (const one of [chunk(1, "b"), chunk(0, "a"), chunk(1, "b"), chunk(3, "d"), chunk(2, "c"), chunk(0, "a")]) text.chunk(one);
    expect(given).toEqual(["a", "b", "c", "d"]);
  });

  test("reasoning counts in the row of chunks and is not text", () => {
    const { text, given } = collect();
    for (const one of [chunk(0, "hm", { channel: "reasoning" }), chunk(1, "a"), chunk(2, "{}", { channel: "tool_call" }), chunk(3, "b")]) text.chunk(one);
    expect(given).toEqual(["a", "b"]);
  });

  test("a higher attempt voids what was given of its step, and lower ones are no longer heard (X2)", () => {
    const { text, given } = collect();
    for (const one of [chunk(0, "a"), chunk(0, "A", { attempt: 2 }), chunk(1, "b"), chunk(1, "B", { attempt: 2 })]) text.chunk(one);
    expect(given).toEqual(["a", "✗", "A", "B"]);
  });

  test("what tokens did not bring comes out of the finished message; what differs is void (X3)", () => {
    const { text, given } = collect();
    text.chunk(chunk(0, "hello "));
    text.completed({ turn: 1, step: 0, content: "hello world" });
    text.chunk(chunk(1, "world"));
    expect(given).toEqual(["hello ", "world"]);
    text.chunk(chunk(0, "other", { step: 1 }));
    text.completed({ turn: 1, step: 1, content: "different" });
    expect(given.slice(2)).toEqual(["|", "other", "✗", "different"]);
  });
});

describe("server-sent events", () => {
  const read = async (pieces: readonly string[]) => {
    const events = [];
    for await (const event of serverEvents(
      (async function* () {
        for (const piece of pieces) yield new TextEncoder().encode(piece);
      })(),
    ))
      events.push(event);
    return events;
  };

  test("are the same however their bytes are cut", async () => {
    const whole = ': hello\r\nid: 1\r\nevent: token\r\ndata: {"a":\r\ndata: 1}\r\n\r\nretry: 100\n\ndata:plain\n\nid: 2\ndata: not ended';
    const expected = [
      { id: "1", event: "token", data: '{"a":\n1}' },
      { id: "1", event: "message", data: "plain" },
    ];
    expect(await read([whole])).toEqual(expected);
    expect(await read(whole.split(""))).toEqual(expected);
  });

  test("a letter of several bytes is whole when it is cut", async () => {
    const bytes = new TextEncoder().encode("data: ä\n\n");
    const events = [];
    for await (const event of serverEvents(
      (async function* () {
        yield bytes.slice(0, 7);
        yield bytes.slice(7);
      })(),
    ))
      events.push(event);
    expect(events).toEqual([{ id: undefined, event: "message", data: "ä" }]);
  });
});

describe("an agent's file", () => {
  test("may name id and instructions in each of the accepted ways", () => {
    const config = { model: "simulated/echo", instructions: "be kind", tools: [], mode: "multi" };
    for (const id of ["agent", "id", "name"])
      for (const words of ["instructions", "system", "system_prompt"]) {
        expect(readAgent(JSON.stringify({ [id]: "a", model: "simulated/echo", [words]: "be kind" }))).toEqual({ kind: "agent", agent: "a", config });
        expect(readAgent(JSON.stringify({ [id]: "a", config: { model: "simulated/echo", [words]: "be kind" } }))).toEqual({
          kind: "agent",
          agent: "a",
          config,
        });
      }
  });

  test("is refused with a pointer per fault", () => {
    const pointers = (value: unknown) => {
      const read = readAgent(typeof value === "string" ? value : JSON.stringify(value));
      if (read.kind !== "invalid") return [];
      const errors = read.error.details?.["errors"] as unknown as { pointer: string }[] | undefined;
      return (errors ?? []).map((one) => one.pointer).sort();
    };
    expect(pointers("{")).toEqual([""]);
    expect(pointers([])).toEqual([""]);
    expect(pointers({})).toEqual(["/agent", "/model"]);
    expect(pointers({ agent: "a", config: 7 })).toEqual(["/config"]);
    expect(pointers({ name: "a b", config: { model: "x", tools: ["ok", "not ok"], mode: "many" } })).toEqual([
      "/config/mode",
      "/config/model",
      "/config/tools/1",
      "/name",
    ]);
    expect(pointers({ agent: "a", model: "simulated/echo", system: "x", instructions: "y" })).toEqual(["/system"]);
    expect(pointers({ agent: "a", model: "simulated/echo", system_prompt: 7 })).toEqual(["/system_prompt"]);
    expect(pointers({ agent: "a", model: "simulated/echo", tool: [] })).toEqual(["/tool"]);
  });
});
