// Goal: what providers really send comes out right. The recordings are not part of the repository; where they lie beside it they are replayed
// through the real SDKs, and this file says when they do not.
// Method: the oracle reads the same bytes on its own, line by line, without SDK and without adapter.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { afterAll, beforeAll, expect, test } from "vitest";
import { answerBytes, type Dialect, type ModelAnswer } from "./model-server.ts";
import { callOnce, sdkSubject, textOf } from "./provider-subjects.ts";

const FOLDER = new URL("../../../shared/fixtures/", import.meta.url);

const DIALECTS = ["anthropic", "openai", "openai-responses", "google"] as const;
/** How the names of recordings begin. */
const PREFIXES: readonly [string, Dialect][] = [
  ["anthropic-", "anthropic"],
  ["openai-chat-", "openai"],
  ["openai-responses-", "openai-responses"],
  ["gemini-", "google"],
];
const dialectOf = (file: string) => PREFIXES.find(([prefix]) => file.startsWith(prefix))?.[1];

interface Recording {
  readonly name: string;
  readonly dialect: Dialect;
  readonly bytes: Uint8Array;
}

/** Written by us in the same formats: these are always replayed, so that the oracle is never without work. */
const OWN: readonly Recording[] = DIALECTS.map((dialect) => ({
  name: `${dialect}, our own`,
  dialect,
  bytes: answerBytes(dialect, {
    text: "Ein Gruß 🌍 an alle",
    tool_calls: [{ name: "look", args: { at: "東京" } }],
    usage: { input: 9, cache_read: 4, output: 8 },
  }),
}));

const recorded: readonly Recording[] = existsSync(FOLDER)
  ? readdirSync(FOLDER)
      .filter((file) => file.endsWith(".sse"))
      .flatMap((file) => {
        const dialect = dialectOf(file);
        return dialect === undefined ? [] : [{ name: file, dialect, bytes: readFileSync(new URL(file, FOLDER)) }];
      })
  : [];
if (recorded.length === 0) process.stdout.write("provider recordings: none lie beside the repository; only wire data of our own is replayed\n");

const subjects = new Map<Dialect, Awaited<ReturnType<typeof sdkSubject>>>();
beforeAll(async () => {
  for (const dialect of DIALECTS) subjects.set(dialect, await sdkSubject(dialect));
});
afterAll(() => Promise.all([...subjects.values()].map((subject) => subject.close())));
const subjectOf = (dialect: Dialect) => {
  const subject = subjects.get(dialect);
  if (subject === undefined) throw new Error("the servers are started before the tests");
  return subject;
};

test.each([...OWN, ...recorded].map((recording) => [recording.name, recording] as const))("%s comes out as it was sent", async (_name, { dialect, bytes }) => {
  const expected = READERS[dialect](bytes);
  expect(expected.text !== "" || expected.calls.length > 0).toBe(true); // The oracle found something.
  for (const framing of [{}, { slice_bytes: 1 }] satisfies ModelAnswer[]) {
    const { outcome, deltas, text } = await callOnce(subjectOf(dialect).tell({ raw: bytes, ...framing }));
    if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
    expect(text).toBe(expected.text);
    expect(outcome.text).toBe(expected.text);
    expect(textOf(deltas, "reasoning")).toBe(expected.thinking);
    expect(outcome.tool_calls.map((call) => ({ id: call.id, name: call.name, args: call.args }))).toEqual(
      expected.calls.map((call) => (call.id === "" ? { ...call, id: expect.stringMatching(/^call_/) } : call)),
    );
    const { usage } = outcome;
    if (expected.tokens === undefined) expect(usage.estimated).toBe(true);
    else {
      expect(usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens).toBe(expected.tokens.prompt);
      expect(usage.cache_read_tokens).toBe(expected.tokens.cache_read);
      expect(usage.output_tokens + usage.reasoning_tokens).toBe(expected.tokens.output);
      expect(usage.estimated).toBeUndefined();
    }
    if (expected.signature !== "") expect(JSON.stringify(outcome.continuation)).toContain(expected.signature);
  }
});

test.each(recorded.map((recording) => [recording.name, recording] as const))(
  "%s cut in places never throws, and says broken or is whole",
  async (_name, { dialect, bytes }) => {
    const whole = READERS[dialect](bytes).text;
    for (let n = 0; n <= 20; n++) {
      const { outcome, text } = await callOnce(subjectOf(dialect).tell({ raw: bytes, cut_after_bytes: Math.floor((bytes.length * n) / 20) }));
      expect(outcome.text).toBe(text);
      if (outcome.kind === "failed") expect(outcome.error.code).toBe("stream_broken");
      else expect(outcome.text).toBe(whole);
      expect(whole.startsWith(outcome.text)).toBe(true);
    }
  },
);

// Written down here, so that they are checked everywhere.
test("errors as they were seen in the wild", async () => {
  const overloaded = Buffer.from(
    'event: error\ndata: {"type":"error","error":{"details":null,"type":"overloaded_error","message":"Overloaded"}              }\n\n',
  );
  const first = await callOnce(subjectOf("anthropic").tell({ raw: overloaded }));
  expect(first.outcome).toMatchObject({ kind: "failed", error: { code: "overloaded", transient: true } });

  const body = { error: { code: 429, message: "Provider returned error", metadata: { provider_name: "Google", raw: "temporarily rate-limited upstream" } } };
  const second = await callOnce(subjectOf("openai").tell({ refusal: { status: 429, body } }));
  expect(second.outcome).toMatchObject({ kind: "failed", error: { code: "rate_limited", transient: true } });
  // A proxy that sends the same inside a 200 stream.
  const third = await callOnce(subjectOf("openai").tell({ raw: Buffer.from(`data: ${JSON.stringify(body)}\n\n`) }));
  expect(third.outcome).toMatchObject({ kind: "failed", error: { code: "rate_limited", transient: true } });
});

interface Expected {
  text: string;
  thinking: string;
  signature: string;
  calls: { id: string; name: string; args: unknown }[];
  tokens: { prompt: number; output: number; cache_read: number } | undefined;
}

// oxlint-disable-next-line typescript/no-explicit-any -- an oracle reads foreign data by its own eyes
function dataOf(bytes: Uint8Array): any[] {
  return Buffer.from(bytes)
    .toString("utf8")
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:") && !line.includes("[DONE]"))
    .map((line) => JSON.parse(line.slice(5)));
}

const READERS: Readonly<Record<Dialect, (bytes: Uint8Array) => Expected>> = {
  anthropic: readAnthropic,
  openai: readOpenai,
  "openai-responses": readResponses,
  google: readGoogle,
};

function readGoogle(bytes: Uint8Array): Expected {
  const expected: Expected = { text: "", thinking: "", signature: "", calls: [], tokens: undefined };
  for (const data of dataOf(bytes)) {
    for (const part of data.candidates?.[0]?.content?.parts ?? []) {
      if (part.thoughtSignature !== undefined) expected.signature = part.thoughtSignature;
      if (part.functionCall !== undefined) expected.calls.push({ id: part.functionCall.id ?? "", name: part.functionCall.name, args: part.functionCall.args });
      else if (part.thought === true) expected.thinking += part.text;
      else expected.text += part.text;
    }
    const { promptTokenCount = 0, candidatesTokenCount = 0, thoughtsTokenCount = 0, cachedContentTokenCount = 0 } = data.usageMetadata;
    expected.tokens = { prompt: promptTokenCount, output: candidatesTokenCount + thoughtsTokenCount, cache_read: cachedContentTokenCount };
  }
  return expected;
}

/** Reads only the last event, which holds everything once more: the adapter reads all the others. */
function readResponses(bytes: Uint8Array): Expected {
  const expected: Expected = { text: "", thinking: "", signature: "", calls: [], tokens: undefined };
  const events = dataOf(bytes);
  const response = events.at(-1).response;
  // A server that tells its items only as they end leaves the last event's list empty.
  const items = response.output.length > 0 ? response.output : events.filter((event) => event.type === "response.output_item.done").map((event) => event.item);
  for (const item of items) {
    if (item.type === "message") expected.text += item.content.map((part: { text: string }) => part.text).join("");
    if (item.type === "function_call") expected.calls.push({ id: item.call_id, name: item.name, args: JSON.parse(item.arguments) });
  }
  const { input_tokens, output_tokens, input_tokens_details } = response.usage;
  expected.tokens = { prompt: input_tokens, output: output_tokens, cache_read: input_tokens_details?.cached_tokens ?? 0 };
  return expected;
}

function readAnthropic(bytes: Uint8Array): Expected {
  const expected: Expected = { text: "", thinking: "", signature: "", calls: [], tokens: undefined };
  const json = new Map<number, { id: string; name: string; text: string }>();
  let prompt = {};
  for (const data of dataOf(bytes)) {
    if (data.type === "content_block_start" && data.content_block.type === "tool_use") json.set(data.index, { ...data.content_block, text: "" });
    if (data.delta?.type === "text_delta") expected.text += data.delta.text;
    if (data.delta?.type === "thinking_delta") expected.thinking += data.delta.thinking;
    if (data.delta?.type === "signature_delta") expected.signature += data.delta.signature;
    const open = json.get(data.index);
    if (data.delta?.type === "input_json_delta" && open !== undefined) open.text += data.delta.partial_json;
    if (data.type === "message_start") prompt = data.message.usage;
    if (data.type === "message_delta") {
      // Older API versions count the prompt at the start only.
      const rounds = data.usage.iterations ?? [{ ...prompt, ...data.usage }];
      // oxlint-disable-next-line typescript/no-explicit-any -- as above
      const sum = (count: (round: any) => number) => rounds.reduce((total: number, round: unknown) => total + count(round), 0);
      expected.tokens = {
        prompt: sum((round) => round.input_tokens + round.cache_read_input_tokens + round.cache_creation_input_tokens),
        cache_read: sum((round) => round.cache_read_input_tokens),
        output: sum((round) => round.output_tokens),
      };
    }
  }
  expected.calls = [...json.values()].map(({ id, name, text }) => ({ id, name, args: JSON.parse(text) }));
  return expected;
}

function readOpenai(bytes: Uint8Array): Expected {
  const expected: Expected = { text: "", thinking: "", signature: "", calls: [], tokens: undefined };
  const json = new Map<number, { id: string; name: string; text: string }>();
  for (const data of dataOf(bytes)) {
    const delta = data.choices[0]?.delta;
    expected.text += delta?.content ?? "";
    for (const piece of delta?.tool_calls ?? []) {
      const open = json.get(piece.index) ?? { id: piece.id, name: piece.function.name, text: "" };
      open.text += piece.function.arguments;
      json.set(piece.index, open);
    }
    if (data.usage) {
      const { prompt_tokens: prompt, completion_tokens: output, prompt_tokens_details: details } = data.usage;
      expected.tokens = { prompt, output, cache_read: details?.cached_tokens ?? 0 };
    }
  }
  expected.calls = [...json.values()].map(({ id, name, text }) => ({ id, name, args: JSON.parse(text) }));
  return expected;
}
