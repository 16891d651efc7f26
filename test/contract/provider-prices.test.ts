// Goal: costs are exact, never too low, and unknown where the table knows nothing (M1 to M3 of prices.ts); estimates are quick and rather high;
// names of models are read right.
import { findProvider } from "@pydantic/genai-prices";
import { describe, expect, test } from "vitest";
import { silentLog } from "../../protocol/log.ts";
import { estimateInputTokens, estimateTokens } from "../../providers/estimate.ts";
import { affordableOutputTokens, costAtMost, costOf, priceVersion } from "../../providers/prices.ts";
import { NO_USAGE, type Usage } from "../../providers/provider.ts";
import { onlyInResponses } from "../../providers/openai-responses.ts";
import { createProviders } from "../../providers/registry.ts";
import { wellFormed } from "../../providers/transcript.ts";
import { REQUEST, sdkSubject, world } from "./provider-subjects.ts";

const micros = (model: string, usage: Partial<Usage>, at_ms?: number): number | "unknown" => {
  const cost = costOf(model, { ...NO_USAGE, ...usage }, at_ms);
  return cost.kind === "priced" ? cost.cost_usd_micros : "unknown";
};

describe("prices", () => {
  test("simulated models cost 1 and 10 micro-dollars per token, thoughts as output", () => {
    expect(costOf("simulated/echo", { ...NO_USAGE, input_tokens: 7, output_tokens: 3, reasoning_tokens: 2 })).toEqual({
      kind: "priced",
      cost_usd_micros: 57,
      price_version: priceVersion(),
    });
    expect(micros("simulated/script", {})).toBe(0);
  });

  test("the version names the table that is installed", async () => {
    const { version } = (await import("../../node_modules/@pydantic/genai-prices/package.json", { with: { type: "json" } })).default;
    expect(priceVersion()).toContain(`genai-prices@${version}`);
  });

  test("each class has its own price, and the sum is rounded up once", () => {
    // Claude Sonnet 4.6: 3 input, 0.3 cache read, 3.75 cache write, 15 output, in micro-dollars per token.
    expect(
      micros("anthropic/claude-sonnet-4-6", { input_tokens: 10, cache_read_tokens: 10, cache_write_tokens: 4, output_tokens: 2, reasoning_tokens: 1 }),
    ).toBe(93);
    expect(micros("anthropic/claude-sonnet-4-6", { cache_read_tokens: 1 })).toBe(1);
    expect(micros("anthropic/claude-sonnet-4-6", { cache_read_tokens: 10 })).toBe(3);
    // 0.3 + 3.75 rounds to 5 once, not to 1 + 4 each; 0.3 × 3 is exactly 0.9, not 0.8999….
    expect(micros("anthropic/claude-sonnet-4-6", { cache_read_tokens: 1, cache_write_tokens: 1 })).toBe(5);
    // 0.15 and 0.6: in binary fractions 0.15 × 20 is above 3, and would be rounded up to 4.
    expect(micros("openai/gpt-4o-mini", { input_tokens: 20 })).toBe(3);
    expect(micros("openai/gpt-4o-mini", { input_tokens: 1_000_000_000, output_tokens: 1_000_000_000 })).toBe(750_000_000);
  });

  test("the tier goes by the whole prompt, cached or not, and begins behind its mark", () => {
    const below = { input_tokens: 1_999, cache_read_tokens: 270_000 };
    expect(micros("openai/gpt-5.5", below)).toBe(1_999 * 5 + 270_000 / 2);
    expect(micros("openai/gpt-5.5", { ...below, input_tokens: 2_000 })).toBe(2_000 * 10 + 270_000);
  });

  test("a price that changed on a day holds from that day", () => {
    const usage = { input_tokens: 100, output_tokens: 10 };
    expect(micros("openai/o3", usage, Date.UTC(2025, 0, 1))).toBe(1_400);
    expect(micros("openai/o3", usage, Date.UTC(2026, 0, 1))).toBe(280);
    expect(micros("openai/o3", usage)).toBe(280);
  });

  test.each(["nonsense/x", "openai/of-tomorrow", "anthropic/gpt-4o", "simulated/oracle", "claude-sonnet-4-6", "", "openai/"])("%j has no price", (model) => {
    expect(costOf(model, NO_USAGE)).toEqual({ kind: "unknown" });
    expect(costAtMost(model, { input_tokens: 1, max_output_tokens: 1 })).toEqual({ kind: "unknown" });
    expect(affordableOutputTokens(model, { input_tokens: 1, max_output_tokens: 1 }, 1_000_000)).toBeUndefined();
  });

  test("every model of the table that has prices by the token is priced, and no mixture of classes costs more than costAtMost", () => {
    let priced = 0;
    for (const provider of ["anthropic", "openai", "google"]) {
      for (const { id } of findProvider({ providerId: provider })?.models ?? []) {
        const most = costAtMost(`${provider}/${id}`, { input_tokens: 300_000, max_output_tokens: 1_000 });
        if (most.kind === "unknown") continue;
        priced += 1;
        for (const [input_tokens, cache_read_tokens, cache_write_tokens] of [
          [300_000, 0, 0],
          [0, 300_000, 0],
          [0, 0, 300_000],
          [100_000, 100_000, 100_000],
          [1, 0, 0],
        ] as const) {
          const cost = micros(`${provider}/${id}`, { input_tokens, cache_read_tokens, cache_write_tokens, output_tokens: 400, reasoning_tokens: 600 });
          expect(cost).toBeLessThanOrEqual(most.cost_usd_micros);
        }
      }
    }
    expect(priced).toBeGreaterThan(80);
  });

  test("the head-room pays for exactly so many output tokens and not for one more", () => {
    for (const model of ["simulated/echo", "anthropic/claude-sonnet-4-6", "openai/gpt-4o-mini"]) {
      for (const headroom of [1, 99, 1_000, 12_345]) {
        const output = affordableOutputTokens(model, { input_tokens: 50, max_output_tokens: 500 }, headroom);
        const most = (max_output_tokens: number) => {
          const cost = costAtMost(model, { input_tokens: 50, max_output_tokens });
          return cost.kind === "priced" ? cost.cost_usd_micros : Number.NaN;
        };
        if (output === undefined) expect(most(1)).toBeGreaterThan(headroom);
        else {
          expect(most(output)).toBeLessThanOrEqual(headroom);
          if (output < 500) expect(most(output + 1)).toBeGreaterThan(headroom);
        }
      }
    }
    expect(affordableOutputTokens("simulated/echo", { input_tokens: 0, max_output_tokens: 0 }, 100)).toBeUndefined();
  });
});

describe("estimates", () => {
  // True counts of the o200k tokenizer, the leanest of the common ones, or of the provider where it said so; the last column is what we allow ourselves.
  test.each([
    ["The quick brown fox jumps over the lazy dog.", 10, 2],
    ["Why did the developer go broke? Because they were always tracing their steps but never logging any savings!", 20, 2.2],
    ['{"location": "San Francisco, CA", "unit": "celsius"}', 14, 2.5],
    ["東京は日本の首都です。", 7, 2.7],
    ["🌍👋🏽🎉", 6, 3],
    ["", 0, 1],
  ])("of %j is not below the true count %i and not above %f times it", (text, tokens, factor) => {
    expect(estimateTokens(text)).toBeGreaterThanOrEqual(tokens);
    expect(estimateTokens(text)).toBeLessThanOrEqual(tokens * factor);
  });

  test("grows with the text and never shrinks by adding to it", () => {
    const text = "Ein Satz, 12345 und 東京 🌍 mit  Leerraum\n\n und mehr.";
    for (let at = 1; at <= text.length; at++) expect(estimateTokens(text.slice(0, at))).toBeGreaterThanOrEqual(estimateTokens(text.slice(0, at - 1)));
  });

  test.each([["a"], ["あ"], [" "], ["🌍"], ["a b"]])("takes a time in proportion to the length, also for hostile %j", (unit) => {
    const began = performance.now();
    const tokens = estimateTokens(unit.repeat(2_000_000));
    // A tenth of a second; what is not in proportion takes hours.
    expect(performance.now() - began).toBeLessThan(10_000);
    expect(tokens).toBeGreaterThan(100_000);
  });

  test("of a prompt counts instructions, messages, calls and tools", () => {
    const base = estimateInputTokens(REQUEST);
    expect(estimateInputTokens({ ...REQUEST, instructions: "" })).toBeLessThan(base);
    expect(estimateInputTokens({ ...REQUEST, tools: [] })).toBeLessThan(base);
    const call = { role: "assistant" as const, text: "", tool_calls: [{ id: "c", name: "look", args: { at: "somewhere" } }] };
    expect(estimateInputTokens({ ...REQUEST, messages: [...REQUEST.messages, call] })).toBeGreaterThan(base + 5);
  });
});

describe("the registry", () => {
  test("models that OpenAI serves in Responses alone go there, others through Chat Completions, and elsewhere all do", async () => {
    const chat = await sdkSubject("openai");
    const key = { api_key: "k-0123456789" };
    const elsewhere = createProviders({ ...options, openai: { ...key, base_url: `${chat.server.url}/v1` } });
    for (const [name, path] of [
      ["openai/gpt-5.3-codex", "/v1/chat/completions"],
      ["openai/gpt-5.6-terra", "/v1/chat/completions"],
      ["openai-responses/gpt-5.6-terra", "/v1/responses"],
    ] as const) {
      const resolved = elsewhere.resolve(name);
      if (resolved.kind !== "resolved") throw new Error(resolved.error.message);
      await resolved.provider.call({ ...REQUEST, model: resolved.model }, { signal: new AbortController().signal, on_delta: () => undefined });
      expect(chat.server.requests.at(-1)?.path).toBe(path);
    }
    await chat.close();
    expect(
      ["o1-pro", "o3-pro", "gpt-5-pro", "gpt-5.2-pro", "gpt-5.3-codex", "gpt-5.1-codex-mini", "codex-mini-latest", "o4-mini-deep-research"].filter(
        (model) => !onlyInResponses(model),
      ),
    ).toEqual([]);
    expect(["gpt-5", "gpt-5.6-luna", "gpt-4o", "o3", "o4-mini", "gpt-6-sol", "gpt-5-mini"].filter(onlyInResponses)).toEqual([]);
  });

  test("a server that speaks OpenAI's dialect has a name of its own, with or without a key, and takes no name of ours", async () => {
    const server = await sdkSubject("openai");
    const base_url = `${server.server.url}/v1`;
    const providers = createProviders({
      ...options,
      compatible: [
        { name: "ollama", base_url },
        { name: "vllm", base_url, api_key: "SENTINEL_KEY_XYZ" },
        { name: "anthropic", base_url },
        { name: "Upper", base_url },
        { name: "broken", base_url: "http://u:p@x" },
      ],
    });
    expect(providers.configured).toEqual(["ollama", "simulated", "vllm"]);
    expect(providers.resolve("broken/x")).toMatchObject({ kind: "refused", error: { message: expect.not.stringContaining("u:p") } });
    for (const [name, authorization] of [
      ["ollama", "Bearer none"],
      ["vllm", "Bearer SENTINEL_KEY_XYZ"],
    ] as const) {
      const resolved = providers.resolve(`${name}/qwen/3:8b`);
      if (resolved.kind !== "resolved") throw new Error(resolved.error.message);
      expect(resolved.model).toBe("qwen/3:8b");
      const outcome = await resolved.provider.call({ ...REQUEST, model: resolved.model }, { signal: new AbortController().signal, on_delta: () => undefined });
      expect(outcome.kind).toBe("completed");
      expect(server.server.requests.at(-1)).toMatchObject({ model: "qwen/3:8b", headers: { authorization } });
    }
    await server.close();
  });

  const options = { world, log: silentLog };
  test("reads provider and model off a name, whose model may hold slashes", () => {
    const providers = createProviders({ ...options, openai: { api_key: "k", base_url: "http://127.0.0.1:9/v1" } });
    expect(providers.configured).toEqual(["openai", "openai-responses", "simulated"]);
    expect(providers.resolve("openai/meta/llama-4")).toMatchObject({ kind: "resolved", provider: { name: "openai" }, model: "meta/llama-4" });
    expect(providers.resolve("simulated/echo")).toMatchObject({ kind: "resolved", provider: { name: "simulated" }, model: "echo" });
  });

  test.each(["anthropic/claude-sonnet-4-6", "google/gemini", "simulated/oracle", "echo", "/echo", "openai/", "", "toString/x", "openai/gpt-4o"])(
    "%j is model_unknown where nothing is configured",
    (name) => {
      const providers = createProviders({ ...options, openai: { api_key: " " } });
      expect(providers.resolve(name)).toMatchObject({ kind: "refused", error: { code: "model_unknown", transient: false } });
    },
  );

  test.each(["localhost", "ftp://127.0.0.1", "http://user:hunter2@127.0.0.1", "http://hunter2@127.0.0.1"])(
    "the base URL %s turns the provider off and says so without quoting it",
    (base_url) => {
      const providers = createProviders({ ...options, anthropic: { api_key: "k", base_url } });
      expect(providers.configured).toEqual(["simulated"]);
      const resolution = providers.resolve("anthropic/x");
      expect(resolution).toMatchObject({ kind: "refused", error: { message: expect.stringContaining("base URL") } });
      expect(JSON.stringify(resolution)).not.toContain("hunter2");
    },
  );
});

describe("a transcript", () => {
  const call = (id: string) => ({ id, name: "look", args: {} });
  const result = (call_id: string, text = call_id) => ({ role: "tool" as const, call_id, name: "look", text, is_error: false });
  const asks = (...ids: string[]) => ({ role: "assistant" as const, text: "", tool_calls: ids.map(call) });
  const user = { role: "user" as const, text: "go" };

  test("that is whole stays as it is (T3)", () => {
    const whole = [user, asks("a", "b"), result("a"), result("b"), asks("c"), result("c"), user];
    expect(wellFormed(whole)).toEqual(whole);
  });

  test("gets results behind their calls, in order, once, also if ids come again in a later answer (T1, T2)", () => {
    expect(wellFormed([result("x"), user, asks("a", "b"), user, result("b"), result("b", "again"), asks("a"), result("a", "second")])).toEqual([
      user,
      asks("a", "b"),
      expect.objectContaining({ role: "tool", call_id: "a", is_error: true }),
      result("b"),
      user,
      asks("a"),
      result("a", "second"),
    ]);
  });
});
