// Goal: every adapter of the provider port keeps every promise of providers/provider.ts, P1 to P8.
// Method: one suite over all adapters, told what to answer by the same scenarios. Those over an SDK run the real SDK against a local server that
// speaks the provider's wire format; they are also cut at every byte of an answer, and read it a byte at a time.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { MODEL_ERRORS, type ModelDelta, type ModelErrorCode, type ModelOutcome, type ModelRequest } from "../../providers/provider.ts";
import { answerBytes, type ModelAnswer } from "./model-server.ts";
import { API_KEY, callOnce, sdkSubject, simulatedSubject, type Subject, textOf, world } from "./provider-subjects.ts";

const RICH: ModelAnswer = {
  text: "Grüße aus 東京, schön 🌍 hier. ",
  thinking: "let me see",
  signature: "c2ln",
  tool_calls: [
    { name: "look", args: { at: "Málaga 🌞" } },
    { name: "look", args: {} },
  ],
};
const pause = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));
const tick = () => new Promise((resolve) => setImmediate(resolve));

function assertWellFormed(outcome: ModelOutcome, text: string): void {
  expect(outcome.text).toBe(text); // P1
  if (outcome.kind === "completed") return;
  expect(Object.keys(MODEL_ERRORS)).toContain(outcome.error.code);
  expect(outcome.error.transient).toBe(MODEL_ERRORS[outcome.error.code].transient);
  expect(outcome.error.message).not.toBe("");
  expect(JSON.stringify(outcome)).not.toContain("SENTINEL"); // P4
}

describe.each([
  ["anthropic", () => sdkSubject("anthropic")],
  ["openai", () => sdkSubject("openai")],
  ["openai-responses", () => sdkSubject("openai-responses")],
  ["google", () => sdkSubject("google")],
  ["simulated", () => Promise.resolve(simulatedSubject())],
] as const)("%s", (name, open) => {
  let subject: Subject;
  beforeAll(async () => {
    subject = await open();
    await callOnce(subject.tell({ text: "warm" })); // Loads the SDK, so that times below are the call's own.
  });
  afterAll(() => subject.close());

  test("P1: text, reasoning and arguments come as pieces that make up the outcome", async () => {
    const { outcome, deltas } = await callOnce(subject.tell(RICH));
    assertWellFormed(outcome, textOf(deltas));
    expect(outcome.text).toBe(RICH.text);
    expect(textOf(deltas, "reasoning").trim()).toBe(RICH.thinking);
    expect(textOf(deltas, "tool_call")).toContain("Málaga 🌞");
    expect(deltas.filter((delta) => delta.kind === "text").length).toBeGreaterThan(3);
    expect(deltas.every((delta) => delta.text !== "")).toBe(true);
  });

  test("P1: the text of a call that fails half way is what was delivered until then", async () => {
    const failing = { text: "one two three four", stream_error: { after_words: 2, type: "overloaded_error", message: "Overloaded" } };
    const { outcome, text } = await callOnce(subject.tell(failing));
    assertWellFormed(outcome, text);
    expect(outcome).toMatchObject({ kind: "failed", text: "one two", error: { code: "overloaded", transient: true } });
    expect(outcome.usage?.output_tokens).toBeGreaterThanOrEqual(2);
  });

  test("P2: a listener that throws ends the call as provider_error and hears no more", async () => {
    let heard = 0;
    const { outcome } = await callOnce(subject.tell({ text: "one two three" }), {
      on_delta() {
        heard += 1;
        throw new Error(`listener broke with ${API_KEY}`);
      },
    });
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "provider_error" } });
    expect(JSON.stringify(outcome)).not.toContain("SENTINEL");
    await pause(20);
    expect(heard).toBe(1);
  });

  test("P2: a provider that never begins is a timeout", async () => {
    const told = subject.tell(
      { text: "late", first_token_ms: 60_000, ...(name === "simulated" ? {} : { hang: true }) },
      { patience: { first_event_ms: 60, silence_ms: 60 } },
    );
    const { outcome } = await callOnce(told);
    expect(outcome).toMatchObject({ kind: "failed", text: "", error: { code: "timeout", transient: true } });
  });

  test("P2: a provider that falls silent in the middle is a timeout that keeps what was said and its usage", async () => {
    const told = subject.tell({ text: "one two", hang: true }, { patience: { first_event_ms: 20_000, silence_ms: 400 } });
    const { outcome, text } = await callOnce(told);
    assertWellFormed(outcome, text);
    expect(outcome).toMatchObject({ kind: "failed", text: "one two", error: { code: "timeout" } });
    expect(outcome.usage?.output_tokens).toBeGreaterThanOrEqual(2);
  });

  test("P2: a provider that is slow but not silent is heard to its end", async () => {
    const told = subject.tell({ tokens: 60, token_ms: 25 }, { patience: { first_event_ms: 20_000, silence_ms: 1_200 } });
    const { outcome } = await callOnce(told);
    expect(outcome).toMatchObject({ kind: "completed" });
  });

  test("P3: an abort in the middle settles within a tick, with the text and the usage so far, and silences the listener", async () => {
    const controller = new AbortController();
    const deltas: ModelDelta[] = [];
    let settled: ModelOutcome | undefined;
    const told = subject.tell({ tokens: 200, token_ms: 5 });
    void told.provider.call(told.request, { signal: controller.signal, on_delta: (delta) => void deltas.push(delta) }).then((outcome) => (settled = outcome));
    while (deltas.length < 3) await pause(1);
    expect(settled).toBeUndefined();
    controller.abort();
    await tick();
    expect(settled).toMatchObject({ kind: "failed", error: { code: "cancelled", transient: false }, text: textOf(deltas) });
    expect(settled?.usage?.input_tokens).toBeGreaterThan(0);
    expect(settled?.usage?.output_tokens).toBeGreaterThanOrEqual(deltas.length);
    expect(settled?.usage?.estimated).toBe(name === "simulated" ? undefined : true);
    const heard = deltas.length;
    await pause(40);
    expect(deltas.length).toBe(heard);
    // The connection is given up too: nobody pays for words that nobody reads.
    if (subject.server !== undefined) await expect.poll(() => subject.server?.open_streams, { timeout: 20_000 }).toBe(0);
  });

  test("P3: an abort before the call makes no request and costs nothing", async () => {
    const before = subject.server?.requests_count;
    const { outcome, deltas } = await callOnce(subject.tell({ text: "no" }), { signal: AbortSignal.abort() });
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "cancelled" }, text: "" });
    expect(outcome.usage).toBeUndefined();
    expect(deltas).toEqual([]);
    expect(subject.server?.requests_count).toBe(before);
  });

  test("P6: parallel calls come in order, with different ids, and the stop reason says so", async () => {
    const { outcome } = await callOnce(subject.tell(RICH));
    if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
    expect(outcome.stop).toBe("tool_calls");
    expect(outcome.tool_calls.map((call) => [call.name, call.args])).toEqual([
      ["look", { at: "Málaga 🌞" }],
      ["look", {}],
    ]);
    expect(new Set(outcome.tool_calls.map((call) => call.id)).size).toBe(2);
    expect(outcome.tool_calls.every((call) => call.invalid_args === undefined)).toBe(true);
  });

  test.each(['{"at": ', "[1]", '"text"', "null", "7"])("P6: arguments that are no JSON object, such as %s, come as invalid_args", async (args) => {
    const { outcome } = await callOnce(subject.tell({ tool_calls: [{ name: "look", args }] }));
    if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
    // A script is JSON itself, so what it names as arguments arrives as that value's JSON.
    expect(outcome.tool_calls).toMatchObject([{ name: "look", args: {}, invalid_args: name === "simulated" ? JSON.stringify(args) : args }]);
  });

  test("P7: the classes of usage are disjoint and add up to what the provider counted", async () => {
    const { outcome } = await callOnce(
      subject.tell({ text: "one two three", thinking: "a b", usage: { input: 100, cache_read: 40, cache_write: 7, output: 30, reasoning: 20 } }),
    );
    if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
    if (name === "simulated") {
      const words = (text: string) => text.trim().split(/\s+/).length;
      const told = subject.tell({ text: "one two three", thinking: "a b" });
      const input_tokens = words(told.request.instructions) + words(told.request.messages[0]?.text ?? "");
      expect(outcome.usage).toEqual({ input_tokens, output_tokens: 3, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 2 });
    } else {
      // Google has no class of tokens written to the cache: they are prompt like the others.
      const [input_tokens, cache_write_tokens] = name === "google" ? [107, 0] : [100, 7];
      expect(outcome.usage).toEqual({ input_tokens, output_tokens: 30, cache_read_tokens: 40, cache_write_tokens, reasoning_tokens: 20 });
    }
  });

  test("calls that overlap do not mix", async () => {
    const texts = Array.from({ length: 8 }, (_, n) => `call ${n} `.repeat(10));
    const outcomes = await Promise.all(texts.map((text) => callOnce(subject.tell({ text, token_ms: 1 }))));
    expect(outcomes.map(({ outcome }) => outcome.text)).toEqual(texts);
    expect(outcomes.map(({ text }) => text)).toEqual(texts);
  });

  test("an answer without a word is completed, not failed", async () => {
    const { outcome, deltas } = await callOnce(subject.tell({}));
    expect(outcome).toMatchObject({ kind: "completed", text: "", tool_calls: [], stop: "end" });
    expect(deltas).toEqual([]);
  });
});

describe.each(["anthropic", "openai", "openai-responses", "google"] as const)("%s on the wire", (dialect) => {
  let subject: Awaited<ReturnType<typeof sdkSubject>>;
  beforeAll(async () => {
    subject = await sdkSubject(dialect);
  });
  afterAll(() => subject.close());

  test("P2, P8: an answer cut at any byte is a classified failure, or complete once the provider has said how it ends", async () => {
    const answer: ModelAnswer = { text: "a ü 🌍", tool_calls: [{ name: "f", args: { é: 1 } }] };
    const modelOf = (n: number) => `cut${String(n).padStart(5, "0")}`; // Equally long: it stands in the answer.
    const bytes = answerBytes(dialect, answer, modelOf(0));
    const whole = await callOnce(subject.tell(answer));
    if (whole.outcome.kind !== "completed") throw new Error(JSON.stringify(whole.outcome));
    const seen = { failed: 0, completed: 0 };
    let next = 0;
    const cutAll = async () => {
      while (next <= bytes.length) {
        const cut_after_bytes = next++;
        const { outcome, text } = await callOnce(subject.tell({ ...answer, cut_after_bytes }, { request: { model: modelOf(cut_after_bytes) } }));
        assertWellFormed(outcome, text);
        seen[outcome.kind] += 1;
        if (outcome.kind === "failed") expect([cut_after_bytes, outcome.error.code]).toEqual([cut_after_bytes, "stream_broken"]);
        else expect([cut_after_bytes, outcome.text, outcome.tool_calls]).toEqual([cut_after_bytes, whole.outcome.text, toolCallsOf(whole.outcome)]);
      }
    };
    await Promise.all(Array.from({ length: 8 }, cutAll));
    expect(seen.failed).toBeGreaterThan(bytes.length / 2);
    // With anthropic and openai something follows the word of how it ends; with the others that word is the last.
    expect(seen.completed).toBeGreaterThan(dialect === "anthropic" || dialect === "openai" ? 10 : 0);
  }, 120_000); // Thousands of connections: seconds on a quiet machine.

  test("P8: a stream that ends properly but too early is broken, not complete", async () => {
    const answer: ModelAnswer = { text: "one two three" };
    const bytes = Buffer.from(answerBytes(dialect, answer));
    // Behind the last word's event: all of the text, and not a word of how it ends.
    const end_after_bytes = bytes.indexOf("\n\n", bytes.indexOf("three")) + 2;
    const { outcome, text } = await callOnce(subject.tell({ ...answer, end_after_bytes }, { request: { model: "m" } }));
    assertWellFormed(outcome, text);
    expect(outcome).toMatchObject({ kind: "failed", text: "one two three", error: { code: "stream_broken" } });
  });

  test("bytes that arrive one at a time, characters split, lines ended by CRLF: the same answer", async () => {
    const whole = await callOnce(subject.tell(RICH, { request: { model: "same" } }));
    for (const framing of [{ slice_bytes: 1 }, { slice_bytes: 7, crlf: true }, { slice_bytes: 1, crlf: true }]) {
      const split = await callOnce(subject.tell({ ...RICH, ...framing }, { request: { model: "same" } }));
      expect(split.outcome).toEqual(whole.outcome);
      expect(split.text).toBe(whole.text);
    }
  });

  test("P5: a call is one request, however it fails", async () => {
    const failures: ModelAnswer[] = [
      refusal(429, { "retry-after": "0" }),
      refusal(500),
      refusal(503),
      refusal(409),
      { text: "a b", cut_after_bytes: 20 },
      { stream_error: { after_words: 0, type: "overloaded_error", message: "Overloaded" } },
    ];
    for (const failure of failures) {
      const before = subject.server.requests_count;
      const { outcome } = await callOnce(subject.tell(failure));
      expect(outcome.kind).toBe("failed");
      await pause(5);
      expect(subject.server.requests_count).toBe(before + 1);
    }
  });

  test("an error as the first event of a 200 stream is known by its type, and costs nothing", async () => {
    const named: [string, ModelErrorCode, number?][] =
      dialect === "google"
        ? [
            ["UNAVAILABLE", "overloaded", 503],
            ["RESOURCE_EXHAUSTED", "rate_limited", 429],
            ["INTERNAL", "provider_unavailable", 500],
            ["INVALID_ARGUMENT", "invalid_request", 400],
            ["SOME_NEW_STATUS", "provider_error", 418],
          ]
        : [
            ["overloaded_error", "overloaded"],
            ["rate_limit_error", "rate_limited"],
            ["api_error", "provider_unavailable"],
            ...(dialect === "openai-responses" ? [] : [["invalid_request_error", "invalid_request"] as [string, ModelErrorCode]]),
            ["some_new_error", "provider_error"],
          ];
    for (const [type, code, status] of named) {
      const { outcome } = await callOnce(
        subject.tell({ stream_error: { after_words: 0, type, message: "So it is", ...(status === undefined ? {} : { code: status }) } }),
      );
      expect(outcome).toMatchObject({ kind: "failed", error: { code, transient: MODEL_ERRORS[code].transient } });
      expect(outcome.usage).toBeUndefined();
    }
  });

  const STATUSES: [number, object, ModelErrorCode][] = [
    [400, { type: "invalid_request_error", message: "temperature: not today" }, "invalid_request"],
    [400, { type: "invalid_request_error", message: "prompt is too long: 210000 tokens > 200000 maximum" }, "context_overflow"],
    [
      400,
      { type: "invalid_request_error", code: "context_length_exceeded", message: "This model's maximum context length is 8192 tokens" },
      "context_overflow",
    ],
    [400, { type: "invalid_request_error", message: "Output blocked by content filtering policy" }, "content_policy"],
    [400, { type: "invalid_request_error", message: "Your credit balance is too low" }, "provider_auth"],
    [401, { type: "authentication_error", message: `invalid x-api-key ${API_KEY}` }, "provider_auth"],
    [403, { type: "permission_error", message: "not yours" }, "provider_auth"],
    [404, { type: "not_found_error", message: "model: nope" }, "model_unknown"],
    [408, { message: "slow" }, "timeout"],
    [413, { type: "request_too_large", message: "too large" }, "context_overflow"],
    [429, { type: "rate_limit_error", message: "slow down" }, "rate_limited"],
    [429, { message: "no type at all" }, "rate_limited"],
    [500, { type: "api_error", message: "oops" }, "provider_unavailable"],
    [502, {}, "provider_unavailable"],
    [503, { message: "busy" }, "overloaded"],
    [504, { message: "gateway" }, "timeout"],
    [529, { type: "overloaded_error", message: "Overloaded" }, "overloaded"],
    [418, { message: "teapot" }, "provider_error"],
  ];
  test.each(STATUSES)("status %i with %o is %s", async (status, error, code) => {
    const { outcome, text } = await callOnce(subject.tell({ refusal: { status, body: { type: "error", error } } as NonNullable<ModelAnswer["refusal"]> }));
    assertWellFormed(outcome, text);
    expect(outcome).toMatchObject({ kind: "failed", error: { code } });
    expect(outcome.usage).toBeUndefined();
  });

  test("a key that will not do is not transient, whatever status it comes with", async () => {
    const [status, error] =
      dialect === "google"
        ? [
            400,
            {
              code: 400,
              status: "INVALID_ARGUMENT",
              message: "API key not valid",
              details: [{ "@type": "type.googleapis.com/google.rpc.ErrorInfo", reason: "API_KEY_INVALID" }],
            },
          ]
        : [429, { type: "insufficient_quota", code: "insufficient_quota", message: "no credit" }];
    const { outcome } = await callOnce(subject.tell({ refusal: { status, body: { error } } }));
    expect(outcome).toMatchObject({ error: { code: "provider_auth", transient: false } });
  });

  test.each([
    [{ "retry-after": "7" }, 7_000],
    [{ "retry-after-ms": "1234.5", "retry-after": "2" }, 1_235],
    [{ "retry-after": "99999999999" }, 24 * 60 * 60 * 1000],
    [{ "retry-after": "soon" }, undefined],
    [{}, undefined],
  ])("the wish to stay away %o becomes %s ms", async (headers, retry_after_ms) => {
    const { outcome } = await callOnce(subject.tell(refusal(429, headers)));
    expect(outcome.kind === "failed" && outcome.error.retry_after_ms).toBe(retry_after_ms);
  });

  test("a date in retry-after, and the reset of a limit that is used up, count from now", async () => {
    const in_30_s = Date.now() + 30_000;
    for (const headers of [
      { "retry-after": new Date(in_30_s).toUTCString() },
      {
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": new Date(in_30_s).toISOString(),
        "anthropic-ratelimit-tokens-remaining": "16000",
        "anthropic-ratelimit-tokens-reset": new Date(in_30_s + 60_000).toISOString(),
      },
    ]) {
      const { outcome } = await callOnce(subject.tell(refusal(429, headers)));
      const wish = outcome.kind === "failed" ? outcome.error.retry_after_ms : undefined;
      expect(wish).toBeGreaterThan(27_000);
      expect(wish).toBeLessThanOrEqual(30_000);
    }
  });

  test("P4: a key never comes out, not even in a key that the provider quotes back or in a page of HTML", async () => {
    const pages = [
      // Cut in the middle of a key, and short enough after the others are hidden for that piece to be shown.
      `${API_KEY} `.repeat(100),
      `<html>${"x".repeat(990)}${API_KEY}${"y".repeat(5000)}`,
      `Incorrect API key provided: sk-SENT*****6789`,
      `Authorization: Bearer ${API_KEY}`,
    ];
    for (const message of pages) {
      const { outcome } = await callOnce(subject.tell({ refusal: { status: 401, body: { error: { type: "authentication_error", message } } } }));
      if (outcome.kind !== "failed") throw new Error("completed");
      expect(outcome.error.message).not.toMatch(/SENT/);
      expect(outcome.error.message.length).toBeLessThanOrEqual(500);
    }
  });

  test("nobody at the address is provider_unavailable; a redirect is not followed with the key", async () => {
    const elsewhere = await sdkSubject(dialect);
    const told = elsewhere.tell({ text: "hi" });
    await elsewhere.close();
    expect((await callOnce(told)).outcome).toMatchObject({ kind: "failed", error: { code: "provider_unavailable", transient: true }, text: "" });

    const before = subject.server.requests_count;
    const paths = {
      anthropic: "/v1/messages",
      openai: "/v1/chat/completions",
      "openai-responses": "/v1/responses",
      google: "/v1beta/models/m:streamGenerateContent?alt=sse",
    };
    const location = `${subject.server.url}${paths[dialect]}`;
    const { outcome } = await callOnce(subject.tell({ refusal: { status: 307, body: {}, headers: { location } } }));
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "provider_unavailable" } });
    expect(subject.server.requests_count).toBe(before + 1);
  });

  test("the length, the filter and the refusal are told apart from the end", async () => {
    const stops = {
      anthropic: { max_tokens: "length", refusal: "refusal", end_turn: "end", stop_sequence: "end", of_tomorrow: "end" },
      openai: { length: "length", content_filter: "content_filter", stop: "end", of_tomorrow: "end" },
      "openai-responses": { max_output_tokens: "length", content_filter: "content_filter", completed: "end", of_tomorrow: "end" },
      google: { MAX_TOKENS: "length", SAFETY: "content_filter", PROHIBITED_CONTENT: "content_filter", STOP: "end", OF_TOMORROW: "end" },
    };
    for (const [stop, expected] of Object.entries(stops[dialect])) {
      const { outcome } = await callOnce(subject.tell({ text: "so", stop }));
      expect(outcome).toMatchObject({ kind: "completed", stop: expected });
    }
  });

  test("a history with holes is mended before it is sent: each call has one result, behind it, and no result is without its call", async () => {
    const messages: ModelRequest["messages"] = [
      { role: "user", text: "go" },
      {
        role: "assistant",
        text: "",
        tool_calls: [
          { id: "c1", name: "look", args: { at: "x" } },
          { id: "c2", name: "look", args: {} },
        ],
      },
      { role: "tool", call_id: "c2", name: "look", text: "two", is_error: false },
      { role: "tool", call_id: "nobody", name: "look", text: "orphan", is_error: false },
      { role: "user", text: "  " },
      { role: "assistant", text: "", tool_calls: [] },
      { role: "user", text: "again" },
    ];
    await callOnce(subject.tell({ text: "ok" }, { request: { model: "holes", messages } }));
    const body = subject.server.requests.find((request) => request.model === "holes")?.body;
    const sent = body?.["messages"] ?? body?.["input"] ?? body?.["contents"];
    if (dialect === "google") {
      expect(sent).toEqual([
        { role: "user", parts: [{ text: "go" }] },
        {
          role: "model",
          parts: [{ functionCall: { id: "c1", name: "look", args: { at: "x" } } }, { functionCall: { id: "c2", name: "look", args: {} } }],
        },
        {
          role: "user",
          parts: [
            { functionResponse: { id: "c1", name: "look", response: { error: expect.stringContaining("no result") } } },
            { functionResponse: { id: "c2", name: "look", response: { output: "two" } } },
          ],
        },
        { role: "user", parts: [{ text: "(blank message)" }] },
        { role: "user", parts: [{ text: "again" }] },
      ]);
    } else if (dialect === "openai-responses") {
      expect(sent).toEqual([
        { role: "user", content: "go" },
        { type: "function_call", call_id: "c1", name: "look", arguments: '{"at":"x"}' },
        { type: "function_call", call_id: "c2", name: "look", arguments: "{}" },
        { type: "function_call_output", call_id: "c1", output: expect.stringMatching(/^ERROR: .*no result/) },
        { type: "function_call_output", call_id: "c2", output: "two" },
        { role: "user", content: "  " },
        { role: "user", content: "again" },
      ]);
    } else if (dialect === "anthropic") {
      expect(sent).toEqual([
        { role: "user", content: [{ type: "text", text: "go" }] },
        {
          role: "assistant",
          content: [
            { type: "tool_use", id: "c1", name: "look", input: { at: "x" } },
            { type: "tool_use", id: "c2", name: "look", input: {} },
          ],
        },
        {
          role: "user",
          content: [
            { type: "tool_result", tool_use_id: "c1", content: expect.stringContaining("no result"), is_error: true },
            { type: "tool_result", tool_use_id: "c2", content: "two", is_error: false },
            { type: "text", text: "(blank message)" },
            { type: "text", text: "again" },
          ],
        },
      ]);
    } else {
      expect(sent).toEqual([
        { role: "system", content: "Be brief." },
        { role: "user", content: "go" },
        {
          role: "assistant",
          content: null,
          tool_calls: [
            { id: "c1", type: "function", function: { name: "look", arguments: '{"at":"x"}' } },
            { id: "c2", type: "function", function: { name: "look", arguments: "{}" } },
          ],
        },
        { role: "tool", tool_call_id: "c1", content: expect.stringMatching(/^ERROR: .*no result/) },
        { role: "tool", tool_call_id: "c2", content: "two" },
        { role: "user", content: "  " },
        { role: "user", content: "again" },
      ]);
    }
  });
});

describe("what is one dialect's own", () => {
  let anthropic: Awaited<ReturnType<typeof sdkSubject>>;
  let openai: Awaited<ReturnType<typeof sdkSubject>>;
  beforeAll(async () => {
    [anthropic, openai] = await Promise.all([sdkSubject("anthropic"), sdkSubject("openai")]);
  });
  afterAll(() => Promise.all([anthropic.close(), openai.close()]));
  const sentTo = (subject: typeof anthropic, model: string) => subject.server.requests.findLast((request) => request.model === model)?.body ?? {};

  test("anthropic: signed thinking goes back to the model that made it, in its place, and to no other", async () => {
    const answer: ModelAnswer = { ...RICH, redacted_thinking: "ZGF0YQ==" };
    const { outcome } = await callOnce(anthropic.tell(answer, { request: { model: "thinker" } }));
    if (outcome.kind !== "completed" || outcome.continuation === undefined) throw new Error(JSON.stringify(outcome));
    expect(JSON.stringify(outcome.continuation)).not.toContain("東京"); // The text is not stored twice.
    const { text, tool_calls, continuation } = outcome;
    const messages: ModelRequest["messages"] = [
      { role: "user", text: "go" },
      { role: "assistant", text, tool_calls, continuation: JSON.parse(JSON.stringify(continuation)) },
    ];
    for (const [model, blocks] of [
      ["thinker", ["thinking", "redacted_thinking", "text", "tool_use", "tool_use"]],
      ["other", ["text", "tool_use", "tool_use"]],
    ] as const) {
      await callOnce(anthropic.tell({ text: "ok" }, { request: { model, messages } }));
      const sent = (sentTo(anthropic, model)["messages"] as { content: { type: string }[] }[])[1]?.content ?? [];
      expect(sent.map((block) => block.type)).toEqual(blocks);
      expect(sent.find((block) => block.type === "text")).toEqual({ type: "text", text });
      if (model === "thinker") expect(sent[0]).toEqual({ type: "thinking", thinking: RICH.thinking, signature: RICH.signature });
    }
    // A message that was changed since no longer fits its continuation.
    const changed = [messages[0], { role: "assistant", text: "edited", tool_calls, continuation }] as ModelRequest["messages"];
    await callOnce(anthropic.tell({ text: "ok" }, { request: { model: "thinker", messages: changed } }));
    expect((sentTo(anthropic, "thinker")["messages"] as { content: { type: string }[] }[])[1]?.content.map((block) => block.type)).toEqual([
      "text",
      "tool_use",
      "tool_use",
    ]);
  });

  test("anthropic: iterations of the server are all billed, so their usage is added", async () => {
    const events = [
      { type: "message_start", message: { role: "assistant", content: [], usage: { input_tokens: 100, cache_read_input_tokens: 5000, output_tokens: 7 } } },
      {
        type: "message_delta",
        delta: { stop_reason: "end_turn" },
        usage: {
          input_tokens: 181,
          output_tokens: 8,
          cache_read_input_tokens: 0,
          iterations: [
            { type: "compaction", input_tokens: 100, output_tokens: 83, cache_read_input_tokens: 5000, cache_creation_input_tokens: 20 },
            { type: "message", input_tokens: 181, output_tokens: 8, cache_read_input_tokens: 0, output_tokens_details: { thinking_tokens: 3 } },
          ],
        },
      },
    ];
    const raw = Buffer.from(events.map((event) => `event: ${event.type}\ndata: ${JSON.stringify(event)}\n\n`).join(""));
    const { outcome } = await callOnce(anthropic.tell({ raw }));
    expect(outcome.usage).toEqual({ input_tokens: 281, output_tokens: 88, cache_read_tokens: 5000, cache_write_tokens: 20, reasoning_tokens: 3 });
  });

  test("anthropic: ids of another provider are made fit, the same way at the call and at its result", async () => {
    const messages: ModelRequest["messages"] = [
      { role: "user", text: "go" },
      { role: "assistant", text: "", tool_calls: [{ id: "functions.look:0", name: "look", args: {} }] },
      { role: "tool", call_id: "functions.look:0", name: "look", text: "seen", is_error: false },
    ];
    await callOnce(anthropic.tell({ text: "ok" }, { request: { model: "ids", messages } }));
    expect(JSON.stringify(sentTo(anthropic, "ids"))).toContain('"id":"functions_look_0"');
    expect(JSON.stringify(sentTo(anthropic, "ids"))).toContain('"tool_use_id":"functions_look_0"');
  });

  test("anthropic: the request carries instructions, tools, bound and temperature", async () => {
    await callOnce(anthropic.tell({ text: "ok" }, { request: { model: "all", temperature: 0.5 } }));
    expect(sentTo(anthropic, "all")).toMatchObject({
      system: "Be brief.",
      max_tokens: 1000,
      temperature: 0.5,
      stream: true,
      tools: [{ name: "look", input_schema: { type: "object" } }],
    });
    expect(sentTo(anthropic, "all")["messages"]).toEqual([{ role: "user", content: [{ type: "text", text: "Hello" }] }]);
  });

  test.each([
    ["whole in one chunk", { whole_tool_calls: true }],
    ["whole, all under index 0", { whole_tool_calls: true, same_index: true }],
    ["in pieces, ended by `stop`", { stop: "stop" }],
  ])("openai: calls that come %s are the same calls", async (_how, how) => {
    const { outcome } = await callOnce(
      openai.tell({
        tool_calls: [
          { name: "a", args: { x: 1 } },
          { name: "b", args: { y: 2 } },
        ],
        ...how,
      }),
    );
    expect(outcome).toMatchObject({
      kind: "completed",
      stop: "tool_calls",
      tool_calls: [
        { name: "a", args: { x: 1 } },
        { name: "b", args: { y: 2 } },
      ],
    });
  });

  test("openai: calls without ids, or with one id for all, get ids of their own that a repeat gives again", async () => {
    for (const id of ["", "same"]) {
      const answer: ModelAnswer = {
        tool_calls: [
          { id, name: "a", args: {} },
          { id, name: "b", args: {} },
        ],
      };
      const first = await callOnce(openai.tell(answer));
      const again = await callOnce(openai.tell(answer));
      const calls = toolCallsOf(first.outcome);
      expect(calls.map((call) => call.name)).toEqual(["a", "b"]);
      expect(calls.every((call) => call.id !== "")).toBe(true);
      expect(new Set(calls.map((call) => call.id)).size).toBe(2);
      expect(toolCallsOf(again.outcome)).toEqual(calls);
    }
  });

  test("openai: an answer without a usage chunk is complete, its usage estimated and marked so", async () => {
    const { outcome } = await callOnce(openai.tell({ text: "one two three", no_usage: true, no_done: true }));
    expect(outcome).toMatchObject({ kind: "completed", text: "one two three", usage: { estimated: true } });
    expect(outcome.usage?.input_tokens).toBeGreaterThan(5);
    expect(outcome.usage?.output_tokens).toBeGreaterThanOrEqual(3);
    expect((await callOnce(openai.tell({ text: "one" }))).outcome.usage).not.toHaveProperty("estimated");
  });

  test("openai: reasoning is shown under either name, and goes back only where it must", async () => {
    const plain = await callOnce(openai.tell({ text: "x", thinking: "hm hm", reasoning_field: "reasoning" }));
    expect(textOf(plain.deltas, "reasoning")).toBe("hm hm");
    expect(plain.outcome).not.toHaveProperty("continuation");
    const { outcome } = await callOnce(openai.tell({ thinking: "hm hm", tool_calls: [{ id: "c1", name: "look", args: {} }] }));
    if (outcome.kind !== "completed" || outcome.continuation === undefined) throw new Error(JSON.stringify(outcome));
    const assistant = { role: "assistant" as const, text: outcome.text, tool_calls: outcome.tool_calls, continuation: outcome.continuation };
    await callOnce(openai.tell({ text: "ok" }, { request: { model: "back", messages: [{ role: "user", text: "go" }, assistant] } }));
    expect(JSON.stringify(sentTo(openai, "back"))).toContain('"reasoning_content":"hm hm"');
  });

  test("openai: a refusal is text with its own stop reason", async () => {
    const { outcome, text } = await callOnce(openai.tell({ text: "I will not.", refuses: true }));
    expect(outcome).toMatchObject({ kind: "completed", text: "I will not.", stop: "refusal" });
    expect(text).toBe("I will not.");
  });

  test("openai: the status of a provider behind a proxy, given as a code inside the stream, counts", async () => {
    const { outcome } = await callOnce(openai.tell({ text: "a b", stream_error: { after_words: 1, type: "", code: 429, message: "Provider returned error" } }));
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "rate_limited" }, text: "a" });
  });

  test("openai: the bound on output has the name that the model knows", async () => {
    for (const [model, field] of [
      ["gpt-5.6", "max_completion_tokens"],
      ["o3-mini", "max_completion_tokens"],
      ["llama-4", "max_tokens"],
    ] as const) {
      await callOnce(openai.tell({ text: "ok" }, { request: { model } }));
      expect(sentTo(openai, model)).toMatchObject({ [field]: 1000, stream_options: { include_usage: true } });
      expect(Object.keys(sentTo(openai, model)).filter((key) => key.startsWith("max_"))).toEqual([field]);
    }
  });
});

describe("google's own", () => {
  let google: Awaited<ReturnType<typeof sdkSubject>>;
  beforeAll(async () => {
    google = await sdkSubject("google");
  });
  afterAll(() => google.close());
  const sentTo = (model: string) => google.server.requests.findLast((request) => request.model === model);
  const modelParts = (model: string) =>
    ((sentTo(model)?.body["contents"] ?? []) as { role: string; parts: object[] }[]).find((content) => content.role === "model")?.parts;

  test("the key goes in the header, and no URL holds it", async () => {
    await callOnce(google.tell({ text: "ok" }, { request: { model: "keyed" } }));
    expect(sentTo("keyed")?.headers["x-goog-api-key"]).toBe(API_KEY);
    expect(sentTo("keyed")?.path).toBe("/v1beta/models/keyed:streamGenerateContent?alt=sse");
    expect(google.server.requests.every((request) => !request.path.includes("SENTINEL") && !JSON.stringify(request.body).includes("SENTINEL"))).toBe(true);
  });

  test("the request carries instructions, tools, bound and temperature", async () => {
    await callOnce(google.tell({ text: "ok" }, { request: { model: "all", temperature: 0.5 } }));
    expect(sentTo("all")?.body).toEqual({
      contents: [{ role: "user", parts: [{ text: "Hello" }] }],
      systemInstruction: { parts: [{ text: "Be brief." }] },
      tools: [
        { functionDeclarations: [{ name: "look", description: "Looks", parametersJsonSchema: { type: "object", properties: { at: { type: "string" } } } }] },
      ],
      generationConfig: { maxOutputTokens: 1000, temperature: 0.5 },
    });
  });

  test("a signature goes back on the part it came with, to the model that made it and to no other", async () => {
    const { outcome } = await callOnce(google.tell(RICH, { request: { model: "gemini-3-pro" } }));
    if (outcome.kind !== "completed" || outcome.continuation === undefined) throw new Error(JSON.stringify(outcome));
    expect(JSON.stringify(outcome.continuation)).not.toContain("東京"); // The text is not stored twice.
    const { text, tool_calls, continuation } = outcome;
    const messages: ModelRequest["messages"] = [
      { role: "user", text: "go" },
      { role: "assistant", text, tool_calls, continuation: JSON.parse(JSON.stringify(continuation)) },
    ];
    const calls = tool_calls.map(({ id, name, args }) => ({ functionCall: { id, name, args } }));
    const told = (model: string, said = messages) => callOnce(google.tell({ text: "ok" }, { request: { model, messages: said } }));
    await told("gemini-3-pro");
    expect(modelParts("gemini-3-pro")).toEqual([{ text: RICH.thinking, thought: true }, { text }, { ...calls[0], thoughtSignature: RICH.signature }, calls[1]]);
    await told("gemini-2.5-flash");
    expect(modelParts("gemini-2.5-flash")).toEqual([{ text }, ...calls]);
    // Gemini 3 refuses a step that another model made unless its first call says so.
    await told("gemini-3-flash");
    expect(modelParts("gemini-3-flash")).toEqual([{ text }, { ...calls[0], thoughtSignature: "skip_thought_signature_validator" }, calls[1]]);
    // A message that was changed since no longer fits its continuation.
    await told("gemini-3-pro", [messages[0], { role: "assistant", text: "edited", tool_calls, continuation }] as ModelRequest["messages"]);
    expect(modelParts("gemini-3-pro")?.[0]).toEqual({ text: "edited" });
  });

  test("a signature on text goes back on that text", async () => {
    const { outcome } = await callOnce(google.tell({ text: "one two", signature: "c2ln" }, { request: { model: "gemini-3-pro" } }));
    if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
    const messages = [
      { role: "user", text: "go" },
      { role: "assistant", ...outcome },
      { role: "user", text: "on" },
    ] as ModelRequest["messages"];
    await callOnce(google.tell({ text: "ok" }, { request: { model: "gemini-3-pro", messages } }));
    expect(modelParts("gemini-3-pro")).toEqual([{ text: "one two", thoughtSignature: "c2ln" }]);
  });

  test("calls without ids get ids of their own that a repeat gives again", async () => {
    const answer: ModelAnswer = {
      tool_calls: [
        { name: "a", args: {} },
        { name: "b", args: {} },
      ],
    };
    const first = toolCallsOf((await callOnce(google.tell(answer))).outcome);
    expect(new Set(first.map((call) => call.id)).size).toBe(2);
    expect(toolCallsOf((await callOnce(google.tell(answer))).outcome)).toEqual(first);
  });

  test("P5: an answer that offers to be continued is not continued behind our back", async () => {
    const candidate = { content: { parts: [{ text: "half" }], role: "model" }, continuationToken: "t" };
    const before = google.server.requests_count;
    const { outcome } = await callOnce(google.tell({ raw: Buffer.from(`data: ${JSON.stringify({ candidates: [candidate] })}\n\n`) }));
    expect(outcome).toMatchObject({ kind: "failed", text: "half", error: { code: "stream_broken" } });
    expect(google.server.requests_count).toBe(before + 1);
  });

  test("a prompt that is blocked is content_policy", async () => {
    const { outcome } = await callOnce(google.tell({ block_reason: "PROHIBITED_CONTENT" }));
    expect(outcome).toMatchObject({
      kind: "failed",
      text: "",
      error: { code: "content_policy", transient: false, message: expect.stringContaining("PROHIBITED_CONTENT") },
    });
  });

  test("a call that the model could not finish is a broken answer, which may be tried again", async () => {
    const { outcome } = await callOnce(google.tell({ stop: "MALFORMED_FUNCTION_CALL" }));
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "stream_broken", transient: true } });
  });

  test("the delay of a RetryInfo is how long to stay away", async () => {
    const body = {
      error: {
        code: 429,
        message: "You exceeded your current quota, please check your plan.",
        status: "RESOURCE_EXHAUSTED",
        details: [
          { "@type": "type.googleapis.com/google.rpc.QuotaFailure", violations: [{ quotaId: "GenerateRequestsPerMinute" }] },
          { "@type": "type.googleapis.com/google.rpc.RetryInfo", retryDelay: "34.4s" },
        ],
      },
    };
    const { outcome } = await callOnce(google.tell({ refusal: { status: 429, body } }));
    expect(outcome).toMatchObject({ error: { code: "rate_limited", retry_after_ms: 34_400, message: body.error.message } });
  });

  test("a prompt that is too long is known by Google's sentence", async () => {
    const error = { code: 400, status: "INVALID_ARGUMENT", message: "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)." };
    const { outcome } = await callOnce(google.tell({ refusal: { status: 400, body: { error } } }));
    expect(outcome).toMatchObject({ error: { code: "context_overflow" } });
  });

  test("a name that would change the URL is refused without a request", async () => {
    for (const model of ["a?key=1", "../v1/files", "a/b", "a:b", ""]) {
      const before = google.server.requests_count;
      const { outcome } = await callOnce(google.tell({ text: "no" }, { request: { model } }));
      expect(outcome).toMatchObject({ kind: "failed", error: { code: "model_unknown" } });
      expect(google.server.requests_count).toBe(before);
    }
  });
});

describe("openai-responses' own", () => {
  let openai: Awaited<ReturnType<typeof sdkSubject>>;
  beforeAll(async () => {
    openai = await sdkSubject("openai-responses");
  });
  afterAll(() => openai.close());
  const sentTo = (model: string) => openai.server.requests.findLast((request) => request.model === model)?.body ?? {};

  test("the request stores nothing, and asks for encrypted reasoning only where there is reasoning", async () => {
    for (const [model, include] of [
      ["gpt-5.6-codex", ["reasoning.encrypted_content"]],
      ["o3-pro", ["reasoning.encrypted_content"]],
      ["gpt-5-chat-latest", undefined],
      ["gpt-4o", undefined],
    ] as const) {
      await callOnce(openai.tell({ text: "ok" }, { request: { model } }));
      expect(sentTo(model)).toMatchObject({
        store: false,
        max_output_tokens: 1000,
        instructions: "Be brief.",
        tools: [{ type: "function", name: "look", strict: false }],
      });
      expect(sentTo(model)["include"]).toEqual(include);
    }
  });

  test("encrypted reasoning goes back before what it led to, to the model that made it and to no other", async () => {
    const { outcome } = await callOnce(openai.tell(RICH, { request: { model: "o3-pro" } }));
    if (outcome.kind !== "completed" || outcome.continuation === undefined) throw new Error(JSON.stringify(outcome));
    expect(JSON.stringify(outcome.continuation)).not.toContain("東京");
    const messages = [
      { role: "user", text: "go" },
      { role: "assistant", ...outcome },
    ] as ModelRequest["messages"];
    for (const [model, types] of [
      ["o3-pro", ["reasoning", undefined, "function_call", "function_call"]],
      ["o4-pro", [undefined, "function_call", "function_call"]],
    ] as const) {
      await callOnce(openai.tell({ text: "ok" }, { request: { model, messages } }));
      const items = (sentTo(model)["input"] as { type?: string }[]).slice(1, 1 + types.length);
      expect(items.map((item) => item.type)).toEqual(types);
      if (model === "o3-pro")
        expect(items[0]).toEqual({
          type: "reasoning",
          id: "rs_1",
          summary: [{ type: "summary_text", text: RICH.thinking }],
          encrypted_content: RICH.signature,
        });
    }
  });

  test("an answer that failed at the provider is a failure, with what it cost", async () => {
    const { outcome } = await callOnce(openai.tell({ text: "one two", stop: "failed", usage: { input: 9, output: 2 } }));
    expect(outcome).toMatchObject({ kind: "failed", text: "one two", error: { code: "provider_unavailable", transient: true }, usage: { input_tokens: 9 } });
  });

  test("calls that come without deltas are the same calls; a refusal is text with its own stop reason", async () => {
    const whole = await callOnce(openai.tell({ tool_calls: [{ name: "a", args: { x: 1 } }], whole_tool_calls: true }));
    expect(toolCallsOf(whole.outcome)).toMatchObject([{ name: "a", args: { x: 1 } }]);
    expect((await callOnce(openai.tell({ text: "I will not.", refuses: true }))).outcome).toMatchObject({ text: "I will not.", stop: "refusal" });
  });
});

test("an answer that never ends is given up at its bound, and what it was charged for is said", async () => {
  const subject = await sdkSubject("openai");
  const chunk = (content: string) => `data: ${JSON.stringify({ choices: [{ index: 0, delta: { content } }] })}\n\n`;
  const raw = Buffer.from(chunk("x".repeat(9 * 1024 * 1024)) + chunk("y".repeat(9 * 1024 * 1024)));
  const { outcome, text } = await callOnce(subject.tell({ raw }));
  expect(outcome).toMatchObject({
    kind: "failed",
    error: { code: "provider_error", message: expect.stringContaining("longer than") },
    usage: { estimated: true },
  });
  expect(outcome.text === text && text.length === 9 * 1024 * 1024).toBe(true);
  await subject.close();
});

test("the model server counts words, keeps its pace, and gives up a stream whose reader left", async () => {
  const subject = await sdkSubject("anthropic");
  const began = world.monotonic_ms();
  await callOnce(subject.tell({ tokens: 40, first_token_ms: 20, token_ms: 5 }));
  const took = world.monotonic_ms() - began;
  expect(took).toBeGreaterThanOrEqual(20 + 39 * 5 - 5);
  expect(subject.server.tokens_sent).toBe(40);
  await subject.close();
});

function refusal(status: number, headers: Record<string, string> = {}): ModelAnswer {
  return { refusal: { status, headers, body: { type: "error", error: { message: "not now" } } } };
}

function toolCallsOf(outcome: ModelOutcome) {
  return outcome.kind === "completed" ? outcome.tool_calls : [];
}
