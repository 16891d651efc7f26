// Goal:   with a provider's key and base URL in the environment, the same happens through the provider's real SDK: a message in, tokens out, usage
//         and cost on record; and the key is nowhere but in the request to the provider.
// Method: the real `up` with base URLs that point at a local server of each wire format (test/contract/model-server.ts). Each key is a word that
//         occurs nowhere else; at the end the whole home folder, what was printed, and every stream are searched for it.
import { spawn } from "node:child_process";
import { readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import { STREAMS } from "../../bus/port.ts";
import { type ModelAnswer, type ModelServer, type ModelServerRequest, startModelServer } from "../contract/model-server.ts";
import { collect, hear, readEventStream, type StreamMessage } from "../harness/event-stream.ts";
import { startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

const KEYS = { anthropic: "sk-ant-sentinel-4f9d81c6e2", openai: "sk-proj-sentinel-b7a03e55d1", google: "AIza-sentinel-93c2f7a8b4" };
const bearer = (request: ModelServerRequest): string => String(request.headers["authorization"]).replace("Bearer ", "");
const PROVIDERS = [
  { provider: "anthropic", model: "anthropic/claude-sonnet-5", credential: bearer, key: KEYS.anthropic },
  {
    provider: "openai",
    model: "openai/gpt-5.6-luna",
    credential: bearer,
    key: KEYS.openai,
  },
  { provider: "google", model: "google/gemini-3.5-flash", credential: (request: ModelServerRequest) => request.headers["x-goog-api-key"], key: KEYS.google },
] as const;

let troupe: Troupe;
let server: ModelServer;
/** What the provider says next: each request takes one, the last one stays. */
let answers: ModelAnswer[] = [];
let hidden: StreamMessage[] = [];

beforeAll(async () => {
  server = await startModelServer({ answer: () => (answers.length > 1 ? answers.shift() : answers[0]) ?? { text: "" } });
  troupe = await startTroupe({
    env: {
      ANTHROPIC_API_KEY: KEYS.anthropic,
      ANTHROPIC_BASE_URL: server.url,
      OPENAI_API_KEY: KEYS.openai,
      OPENAI_BASE_URL: `${server.url}/v1`,
      GEMINI_API_KEY: KEYS.google,
      GOOGLE_GEMINI_BASE_URL: server.url,
      TROUPE_LOG_LEVEL: "debug",
    },
  });
}, 120_000);
afterAll(() => server?.close());

async function say(session: string, model: string, content: string): Promise<StreamMessage[]> {
  await troupe.json(201, "/v1/sessions", { json: { id: session, agent: "assistant", overrides: { model } } });
  const messages = await collect(troupe.sse(`/v1/sessions/${session}/messages`, { json: { content } }));
  hidden = [...hidden, ...messages];
  return messages;
}

interface Usage {
  readonly model: string;
  readonly provider: string;
  readonly attempt: number;
  readonly try: number;
  readonly outcome: string;
  readonly code: string | null;
  readonly input_tokens: number | null;
  readonly output_tokens: number | null;
  readonly cache_read_tokens: number | null;
  readonly cost_usd_micros: number | null;
  readonly price_version: string | null;
}
async function usageOf(session: string, count: number): Promise<Usage[]> {
  let rows: Usage[] = [];
  const there = async (): Promise<boolean> => {
    const { stdout } = await typed(troupe, ["usage", "--tenant", "demo", "--session", session, "--json"]);
    rows = stdout.split("\n").flatMap((line) => (line === "" ? [] : [JSON.parse(line) as Usage]));
    return rows.length >= count;
  };
  await until(there, 60_000, 100);
  expect(rows).toHaveLength(count);
  return rows;
}

test("the demonstration takes the real model, and the printed line streams its answer", async () => {
  answers = [{ tokens: 20, token_ms: 20 }];
  const line =
    troupe
      .output()
      .split("\n")
      .findLast((one) => one.startsWith("curl ")) ?? "";
  expect(line).toContain("/v1/sessions/hello-anthropic/messages");
  expect(troupe.output()).toContain("assistant (anthropic/claude-sonnet-5)");
  const shell = spawn("sh", ["-c", line], { stdio: ["ignore", "pipe", "ignore"] });
  const messages = await collect(readEventStream(shell.stdout as unknown as ReadableStream<Uint8Array>));
  const heard = hear(messages, 1);
  expect(heard).toMatchObject({ faults: [], attempts: 1, text: Array.from({ length: 20 }, (_, n) => `w${n}`).join(" ") });
  expect(messages.filter(({ event }) => event === "token").length).toBeGreaterThan(5);
});

describe.each(PROVIDERS)("through the SDK of $provider", ({ provider, model, credential, key }) => {
  test("a message goes in, tokens come out, and usage and cost are on record", async () => {
    const before = server.requests_count;
    answers = [{ text: "Grüße aus der Ferne, 世界!", token_ms: 5, usage: { input: 1000, output: 200, cache_read: 400 } }];
    const messages = await say(`${provider}-plain`, model, "hello over there");
    const heard = hear(messages, 1);
    expect(heard).toMatchObject({ text: "Grüße aus der Ferne, 世界!", finished: "Grüße aus der Ferne, 世界!", faults: [] });
    expect(server.requests_count).toBe(before + 1);
    const request = server.requests[before]!;
    expect(request).toMatchObject({ dialect: provider, model: model.slice(provider.length + 1) });
    expect(credential(request)).toBe(key);
    expect(JSON.stringify(request.body)).toContain("hello over there");
    const [usage] = await usageOf(`${provider}-plain`, 1);
    expect(usage).toMatchObject({
      model,
      provider,
      attempt: 1,
      input_tokens: 1000,
      output_tokens: 200,
      cache_read_tokens: 400,
      price_version: expect.any(String),
    });
    expect(usage?.cost_usd_micros).toBeGreaterThan(100);
    const completed = messages.find(({ event }) => event === "model.completed")?.data;
    expect(completed?.["cost_usd_micros"]).toBe(usage?.cost_usd_micros);
  });

  test("a tool that the model calls is run, and its result is in the next request", async () => {
    const before = server.requests_count;
    answers = [{ text: "I look. ", tool_calls: [{ id: "call_1", name: "wait_ms", args: { ms: 20 } }] }, { text: "Twenty have passed." }];
    const heard = hear(await say(`${provider}-tool`, model, "wait for me"), 1);
    expect(heard).toMatchObject({ text: "I look. Twenty have passed.", faults: [] });
    expect(server.requests_count).toBe(before + 2);
    const second = JSON.stringify(server.requests[before + 1]?.body);
    for (const words of ["wait for me", "I look. ", "wait_ms"]) expect(second).toContain(words);
    expect(await usageOf(`${provider}-tool`, 2)).toHaveLength(2);
  });

  test("a call that fails before its first word is made again, and the journal and the usage rows have both calls", async () => {
    answers = [
      { refusal: { status: 503, body: { error: { type: "overloaded_error", code: 503, status: "UNAVAILABLE", message: "come back later" } } } },
      { tokens: 10 },
    ];
    const heard = hear(await say(`${provider}-again`, model, "are you there?"), 1);
    expect(heard).toMatchObject({ faults: [], text: heard.finished });
    expect(heard.text.split(" ")).toHaveLength(10);
    const done = (await troupe.journal(`demo/session/${provider}-again`))
      .flatMap(({ entries }) => entries)
      .filter((entry) => entry.t === "done" && entry.inst.endsWith(":model"));
    expect(done).toMatchObject([
      {
        output: {
          attempts: [
            { outcome: "failed", code: expect.any(String) },
            { outcome: "completed", code: null },
          ],
        },
      },
    ]);
    const rows = await usageOf(`${provider}-again`, 2);
    expect(rows).toMatchObject([
      { try: 2, outcome: "completed", code: null, output_tokens: 10 },
      { try: 1, outcome: "failed", code: expect.any(String), output_tokens: null },
    ]);
  });

  test("an answer that is cut off in the middle is not passed off as whole: the turn fails and says why, and what was used is on record", async () => {
    answers = [{ tokens: 40, token_ms: 5, cut_after_bytes: 2500 }];
    const messages = await say(`${provider}-cut`, model, "a long one");
    const heard = hear(messages, 1);
    expect(heard).toMatchObject({ faults: [], finished: "", attempts: 1 });
    expect(heard.text.split(" ").length).toBeGreaterThan(5);
    expect(messages.find(({ event }) => event === "turn.failed")?.data).toMatchObject({ reason: "stream_broken" });
    expect(await usageOf(`${provider}-cut`, 1)).toMatchObject([{ outcome: "failed", model }]);
  });

  test("a provider that refuses the key, and repeats it in its words, ends the turn with a reason and not with the key", async () => {
    const words = `Incorrect API key provided: ${key}. You can find your API key at the provider's site.`;
    const body = { type: "error", error: { type: "authentication_error", code: 401, status: "UNAUTHENTICATED", message: words } };
    answers = [{ refusal: { status: 401, body } }];
    const messages = await say(`${provider}-refused`, model, "anybody there?");
    const failed = messages.find(({ event }) => event === "turn.failed")?.data;
    expect(failed).toMatchObject({ reason: "provider_auth" });
    expect(JSON.stringify(messages)).not.toContain(key);
    // The session is well: it answers as soon as the provider does.
    answers = [{ text: "back again" }];
    const again = await collect(troupe.sse(`/v1/sessions/${provider}-refused/messages`, { json: { content: "and now?" } }));
    expect(hear(again, 2)).toMatchObject({ text: "back again", faults: [] });
  });
});

/** Every file under a folder, with its bytes as text. */
function* filesUnder(folder: string): Generator<{ path: string; text: string }> {
  for (const entry of readdirSync(folder, { withFileTypes: true })) {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) yield* filesUnder(path);
    else if (entry.isFile() && statSync(path).size < 64 * 1024 * 1024) yield { path, text: readFileSync(path, "latin1") };
  }
}

test("no key is in the home folder, in what was printed or heard, in a stream, or in the surroundings of a process that does not need it", async () => {
  const found: string[] = [];
  const look = (where: string, text: string): void => {
    for (const key of Object.values(KEYS)) if (text.includes(key)) found.push(`${where} has ${key}`);
  };
  const bus = await troupe.bus();
  let messages = 0;
  for (const stream of STREAMS) {
    const { last_sequence } = await bus.bounds(stream);
    if (last_sequence === 0 || stream === "COMMANDS" || stream === "TIMERS") continue; // work queues: empty when the work is done
    for await (const stored of bus.read(stream, ">", 1)) {
      messages += 1;
      look(`${stream} ${stored.sequence}`, Buffer.from(stored.data).toString("latin1"));
    }
  }
  expect(messages).toBeGreaterThan(100);
  let files = 0;
  for (const { path, text } of filesUnder(troupe.home)) {
    files += 1;
    look(path, text);
  }
  expect(files).toBeGreaterThan(50);
  look("the output of up", troupe.output());
  look("what was heard", JSON.stringify(hidden));
  if (process.platform === "linux") {
    for (const { role, id, pid } of troupe.dev().processes) {
      if (role !== "up" && role !== "worker") look(`the environment of ${role} ${id}`, readFileSync(`/proc/${pid}/environ`, "latin1"));
      look(`the command line of ${role} ${id}`, readFileSync(`/proc/${pid}/cmdline`, "latin1"));
    }
  }
  expect(found).toEqual([]);
  expect((await typed(troupe, ["verify", "--json"])).stdout).toContain('"violations":0');
});
