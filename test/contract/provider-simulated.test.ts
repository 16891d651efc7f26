// Goal: the simulated models do exactly what their scripts say, count exactly, and remember nothing.
// Method: in virtual time, so that an hour's delay costs nothing and every moment is exact.
import { describe, expect, test } from "vitest";
import { silentLog } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import type { ChatMessage, ModelDelta, ModelOutcome } from "../../providers/provider.ts";
import { parseScript, scriptPart, simulatedProvider, wordCount, wordsOf } from "../../providers/simulated.ts";
import { REQUEST } from "./provider-subjects.ts";

/** Time that passes only when nobody has anything else to do. */
class VirtualWorld implements World {
  #now_ms = 0;
  readonly timers = new Map<number, { due_ms: number; callback: () => void }>();
  #ids = 0;
  now_ms = () => this.#now_ms;
  monotonic_ms = () => this.#now_ms;
  random = () => 0;
  id = () => `id${this.#ids++}`;
  after = (delay_ms: number, callback: () => void) => {
    const id = this.#ids++;
    this.timers.set(id, { due_ms: this.#now_ms + delay_ms, callback });
    return () => void this.timers.delete(id);
  };
  async run<T>(work: Promise<T>): Promise<T> {
    let done = false;
    void work.then(() => (done = true));
    for (;;) {
      await new Promise((resolve) => setImmediate(resolve));
      if (done) return work;
      const next = [...this.timers].sort(([, a], [, b]) => a.due_ms - b.due_ms)[0];
      if (next === undefined) throw new Error("nothing is going on and nothing will");
      this.timers.delete(next[0]);
      this.#now_ms = next[1].due_ms;
      next[1].callback();
    }
  }
}

async function play(messages: readonly ChatMessage[] | object[] | string, options: { model?: string; max_output_tokens?: number; abort_at_ms?: number } = {}) {
  const world = new VirtualWorld();
  const provider = simulatedProvider({ world, log: silentLog });
  const script = typeof messages === "string" ? messages : JSON.stringify(messages);
  const isTranscript = Array.isArray(messages) && messages[0] !== undefined && "role" in messages[0];
  const controller = new AbortController();
  if (options.abort_at_ms !== undefined) world.after(options.abort_at_ms, () => controller.abort());
  const said: (ModelDelta & { at_ms: number })[] = [];
  const outcome: ModelOutcome = await world.run(
    provider.call(
      {
        ...REQUEST,
        model: options.model ?? "script",
        messages: isTranscript ? (messages as ChatMessage[]) : [{ role: "user", text: script }],
        max_output_tokens: options.max_output_tokens ?? 1_000_000,
      },
      { signal: controller.signal, on_delta: (delta) => void said.push({ ...delta, at_ms: world.monotonic_ms() }) },
    ),
  );
  return { outcome, said, ended_at_ms: world.monotonic_ms(), timers_left: world.timers.size };
}

describe("simulated/echo", () => {
  test.each(["one two  three\n four ", " leading", "東京 🌍", "   ", "word"])("repeats %j word by word, white space and all", async (text) => {
    const { outcome, said } = await play(text, { model: "echo" });
    expect(outcome).toMatchObject({ kind: "completed", text, stop: "end" });
    expect(said.map((delta) => delta.text)).toEqual(wordsOf(text));
    expect(said.length).toBe(Math.max(1, wordCount(text)));
    expect(outcome.usage).toMatchObject({ input_tokens: 2 + wordCount(text), output_tokens: wordCount(text) });
  });

  test("repeats the last user message, not an earlier one", async () => {
    const messages: ChatMessage[] = [
      { role: "user", text: "first" },
      { role: "assistant", text: "first", tool_calls: [] },
      { role: "user", text: "second" },
    ];
    expect((await play(messages, { model: "echo" })).outcome.text).toBe("second");
  });

  test("stops with `length` where the bound on output is", async () => {
    const { outcome } = await play("one two three four", { model: "echo", max_output_tokens: 3 });
    expect(outcome).toMatchObject({ kind: "completed", text: "one two three", stop: "length", usage: { output_tokens: 3 } });
  });
});

describe("simulated/script", () => {
  test("says words at their times", async () => {
    const { said, ended_at_ms } = await play([
      { say: "a b c", first_token_ms: 100, token_ms: 30 },
      { say: " d", first_token_ms: 5 },
    ]);
    expect(said.map((delta) => [delta.text, delta.at_ms])).toEqual([
      ["a", 100],
      [" b", 130],
      [" c", 160],
      [" d", 165],
    ]);
    expect(ended_at_ms).toBe(165);
  });

  test.each([
    ["a b c", 2, "a b"],
    ["a b c", 7, "a b c a b c a"],
    ["a b\n", 5, "a b\na b\na"],
    ["", 3, "word word word"],
    ["a", 0, ""],
  ])("%j with tokens %i is %j", async (say, tokens, text) => {
    const { outcome } = await play([{ say, tokens }]);
    expect(outcome).toMatchObject({ kind: "completed", text, usage: { output_tokens: tokens } });
  });

  test("plays one part for each model call of the turn, read off the transcript, and nothing beyond its end", async () => {
    const script = JSON.stringify([{ say: "Let me look." }, { call: "clock" }, { call: "weather", args: { at: "Rome" } }, { say: "Noon." }, { call: "clock" }]);
    const user: ChatMessage = { role: "user", text: script };
    const assistant: ChatMessage = { role: "assistant", text: "", tool_calls: [] };
    const result: ChatMessage = { role: "tool", call_id: "c", name: "clock", text: "12", is_error: false };
    const earlier: ChatMessage[] = [{ role: "user", text: "hi" }, assistant, assistant];
    const parts = [
      [user],
      [user, assistant, result, result],
      [user, assistant, result, result, assistant, result],
      [user, assistant, assistant, assistant],
      [...earlier, user],
    ];
    const played = [];
    for (const messages of parts) {
      const { outcome } = await play(messages);
      if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
      played.push([outcome.text, outcome.tool_calls.map((call) => call.name).join(), outcome.stop]);
    }
    expect(played).toEqual([
      ["Let me look.", "clock,weather", "tool_calls"],
      ["Noon.", "clock", "tool_calls"],
      ["", "", "end"],
      ["", "", "end"],
      ["Let me look.", "clock,weather", "tool_calls"],
    ]);
  });

  test("the parts of a script, run together, are the script", () => {
    const steps = [{ say: "a" }, { call: "x" }, { call: "y" }, { think: "b" }, { call: "z" }, { say: "c" }, { fail: "overloaded" as const }, { say: "d" }];
    const parts = [0, 1, 2, 3, 4].map((n) => scriptPart(steps, n));
    expect(parts.map((part) => part.length)).toEqual([3, 2, 2, 1, 0]);
    expect(parts.flat()).toEqual(steps);
    expect(scriptPart([], 0)).toEqual([]);
  });

  test("a failure comes after what was said, with its code and its wish, and again on every repeat", async () => {
    for (let attempt = 0; attempt < 2; attempt++) {
      const { outcome, ended_at_ms } = await play([{ say: "so far" }, { fail: "rate_limited", retry_after_ms: 250, first_token_ms: 40 }]);
      expect(outcome).toMatchObject({
        kind: "failed",
        text: "so far",
        error: { code: "rate_limited", transient: true, retry_after_ms: 250 },
        usage: { output_tokens: 2 },
      });
      expect(ended_at_ms).toBe(40);
    }
  });

  test("a failure before the first word costs nothing", async () => {
    expect((await play([{ fail: "overloaded" }])).outcome.usage).toBeUndefined();
  });

  test("stops for the reason it is told", async () => {
    for (const stop of ["length", "refusal", "content_filter"])
      expect((await play([{ say: "so" }, { stop }])).outcome).toMatchObject({ kind: "completed", text: "so", stop });
  });

  test("counts words of instructions and of all messages as input, of text and calls as output, of thoughts as reasoning", async () => {
    const script = JSON.stringify([{ think: "a b c" }, { say: "d e" }, { call: "look", args: { at: "old town" } }]);
    const messages: ChatMessage[] = [
      { role: "user", text: "one two" },
      { role: "assistant", text: "three", tool_calls: [{ id: "c", name: "look", args: { at: "x" } }] },
      { role: "tool", call_id: "c", name: "look", text: "four five six", is_error: false },
      { role: "user", text: script },
    ];
    const { outcome } = await play(messages);
    // Instructions 2, messages 2 + 1 + (look {"at":"x"}: 2) + 3 + the script's own words.
    const input_tokens = 2 + 2 + 1 + 2 + 3 + wordCount(script);
    expect(outcome.usage).toEqual({ input_tokens, output_tokens: 2 + 1 + 2, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 3 });
  });

  test("a bound on output holds across steps, thoughts and calls", async () => {
    const steps = [{ think: "a b" }, { say: "c d" }, { call: "look" }, { say: "e" }];
    for (const [max_output_tokens, text, calls] of [
      [1, "", 0],
      [3, "c", 0],
      [5, "c d", 0],
      [6, "c d", 1],
    ] as const) {
      const { outcome } = await play(steps, { max_output_tokens });
      if (outcome.kind !== "completed") throw new Error(JSON.stringify(outcome));
      expect([outcome.text, outcome.tool_calls.length, outcome.stop]).toEqual([text, calls, max_output_tokens === 6 ? "tool_calls" : "length"]);
      expect(outcome.usage.output_tokens + outcome.usage.reasoning_tokens).toBeLessThanOrEqual(max_output_tokens);
    }
  });

  test("an abort in the middle of an hour's pause ends at once, with exact usage, and leaves no timer", async () => {
    const { outcome, ended_at_ms, timers_left } = await play([{ say: "one two" }, { say: "late", first_token_ms: 100_000 }], { abort_at_ms: 500 });
    expect(outcome).toMatchObject({ kind: "failed", text: "one two", error: { code: "cancelled" }, usage: { output_tokens: 2 } });
    expect(outcome.usage).not.toHaveProperty("estimated");
    expect(ended_at_ms).toBe(500);
    expect(timers_left).toBe(0);
  });

  test("a silence longer than the patience is a timeout, also here", async () => {
    const { outcome, ended_at_ms } = await play([{ say: "one" }, { say: "late", first_token_ms: 3_600_000 }]);
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "timeout" }, text: "one" });
    expect(ended_at_ms).toBe(120_000);
  });

  test("leaves no timer behind when it completes", async () => {
    expect((await play([{ say: "a b", token_ms: 10 }])).timers_left).toBe(0);
  });

  test.each([
    ["Hello there", /not JSON/],
    ["", /not JSON/],
    ['{"say":"x"}', /no array/],
    ['[{"shout":"x"}]', /step 0 .*none of say, think, call, fail, stop/],
    ['[{"say":"x"},{"say":1}]', /step 1 .*\(say\), say/],
    ['[{"say":"x","tokens":-1}]', /step 0 .*tokens/],
    ['[{"say":"x","token_m":5}]', /token_m/],
    ['[{"fail":"bad_mood"}]', /step 0 .*\(fail\), fail/],
    ["[null]", /step 0/],
    [JSON.stringify(Array.from({ length: 1001 }, () => ({ say: "x" }))), /at most 1000/],
  ])("%j is no script, and says why", async (text, why) => {
    expect(parseScript(text)).toMatchObject({ kind: "no_script" });
    const { outcome } = await play(text);
    expect(outcome).toMatchObject({ kind: "failed", error: { code: "script_failed", transient: false, message: expect.stringMatching(why) } });
    expect(outcome.usage).toBeUndefined();
  });

  test("an unknown simulated model is model_unknown", async () => {
    expect((await play("x", { model: "oracle" })).outcome).toMatchObject({ kind: "failed", error: { code: "model_unknown" } });
  });

  test("a hundred thousand words without delay leave the thread to others in between", async () => {
    let turns = 0;
    const ticker = setInterval(() => (turns += 1), 0);
    const { outcome } = await play([{ say: "w", tokens: 100_000 }]);
    clearInterval(ticker);
    expect(outcome.usage?.output_tokens).toBe(100_000);
    expect(turns).toBeGreaterThan(10);
  });
});
