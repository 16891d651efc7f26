// Goal: what a guardrail blocks reaches no model and no journal, what it cannot look at it blocks, and no expression holds anybody up.
// Method: a real thread for expressions, good, bad and endless; a model call in a hand-made scope, with simulated models as judges.
import { describe, expect, test } from "vitest";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import type { ModelCall } from "../../actors/effects/call-model.ts";
import type { ModelMoney } from "../../actors/model-money.ts";
import type { ModelAttempt } from "../../actors/model-attempt.ts";
import { secretIn, withGuardrails } from "../../actors/guardrails.ts";
import { createPatternMatcher, type PatternMatcher } from "../../actors/pattern-matcher.ts";
import { EffectFailure, type EffectScope } from "../../actors/performer.ts";
import { agentConfig } from "../../protocol/commands.ts";
import type { EffectError, Entry } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { createProviders } from "../../providers/registry.ts";
import { realWorld } from "../../roles/real-world.ts";
import type { TranscriptItem } from "../../state-machines/session-transcript.ts";
import { atEndOfFile } from "../harness/endings.ts";

const world = realWorld();
const log = silentLog;
const providers = createProviders({ world, log });
const breakers = createBreakerBoard({ world, log, worker: "w" });
const patterns = createPatternMatcher(world);
atEndOfFile(() => patterns.stop());

const ENDLESS = "(a+)+$";
const FOR_EVER = `${"a".repeat(40)}b`;

describe("the matcher", () => {
  test("answers yes and no as the expression does", async () => {
    expect(await patterns.matches("acme", "a.c", "u", "xabcx")).toBe("yes");
    expect(await patterns.matches("acme", "^a.c$", "u", "xabcx")).toBe("no");
    expect(await patterns.matches("acme", "ABC", "iu", "xabcx")).toBe("yes");
  });

  test("PM1, PM3: an expression that takes for ever is too slow, those that wait behind it get their answers, and our own thread goes on", async () => {
    let beats = 0;
    const heart = setInterval(() => (beats += 1), 5);
    const began_ms = world.monotonic_ms();
    const answers = await Promise.all([
      patterns.matches("acme", ENDLESS, "u", FOR_EVER),
      patterns.matches("acme", "b", "u", "abc"),
      patterns.matches("acme", ENDLESS, "u", FOR_EVER),
      patterns.matches("acme", "x", "u", "abc"),
    ]);
    clearInterval(heart);
    expect(answers).toEqual(["too_slow", "yes", "too_slow", "no"]);
    expect(world.monotonic_ms() - began_ms).toBeLessThan(20_000);
    expect(beats).toBeGreaterThan(10);
  });

  test("PM2: what waits is bounded", async () => {
    const crowded: PatternMatcher = createPatternMatcher(world);
    const of = (tenant: string): Promise<string>[] => Array.from({ length: 110 }, () => crowded.matches(tenant, "a", "u", "a"));
    const one = of("t0");
    const others = Array.from({ length: 10 }, (_, index) => of(`t${index + 1}`)).flat();
    expect(await one.at(-1)).toBe("too_slow");
    expect(await others.at(-1)).toBe("too_slow");
    await crowded.stop();
    expect(await Promise.all([...one, ...others])).toHaveLength(1_210);
  });

  test("PM4: a tenant with a line full of endless expressions holds up another tenant's question for one turn, and takes a fifth of the thread", async () => {
    const shared: PatternMatcher = createPatternMatcher(world);
    await shared.matches("acme", "a", "u", "a"); // the thread runs
    const hostile = Array.from({ length: 100 }, () => shared.matches("hostile", ENDLESS, "u", FOR_EVER));
    const waits_ms: number[] = [];
    const until_ms = world.monotonic_ms() + 3_000;
    while (world.monotonic_ms() < until_ms) {
      const began_ms = world.monotonic_ms();
      expect(await shared.matches("acme", "b", "u", "abc")).toBe("yes");
      waits_ms.push(world.monotonic_ms() - began_ms);
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    // One endless turn is 100 ms and the start of a thread; on a busy machine that takes a while.
    expect(Math.max(...waits_ms)).toBeLessThan(6_000); // behind the whole line it would be ten seconds
    const held_up = waits_ms.filter((ms) => ms >= 100).length;
    expect(held_up).toBeGreaterThan(1); // it did share the thread
    expect(held_up).toBeLessThan(15); // in three seconds, of turns that are half a second apart; taking turns one by one it would be nearly thirty
    await shared.stop();
    expect(new Set(await Promise.all(hostile))).toEqual(new Set(["too_slow"]));
  });
});

test.each([
  "AKIAIOSFODNN7EXAMPLE",
  `sk-ant-api03-${"x".repeat(40)}`,
  `ghp_${"a1".repeat(18)}`,
  "-----BEGIN RSA PRIVATE KEY-----",
  `AIza${"b".repeat(35)}`,
  `xoxb-${"1".repeat(12)}`,
  `sk_live_${"a".repeat(24)}`,
  `eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.${"s".repeat(43)}`,
  `troupe.demo.abcdefghijkl.${"k".repeat(43)}`,
])("a secret is seen inside a text: %s", (secret) => {
  expect(secretIn(`please use ${secret}, thanks`)).toBeDefined();
});

test.each(["the skeleton key", "sk-short", "AKIA is a prefix", "a token of love", "eyJ.eyJ.x", "-----BEGIN PUBLIC KEY-----"])(
  "an innocent text is no secret: %s",
  (text) => {
    expect(secretIn(text)).toBeUndefined();
  },
);

test("looking for secrets in a long text takes no time", () => {
  const began_ms = world.monotonic_ms();
  for (const part of ["sk-", "eyJ", "a.", "troupe.", "-----BEGIN ", "AKIA", "x"]) secretIn(part.repeat(1_000_000 / part.length));
  expect(world.monotonic_ms() - began_ms).toBeLessThan(15_000);
});

// ── a call within its guardrails ───────────────────────────────────────────────────────────────────────────────────────────────────

interface Called {
  readonly asked: number;
  readonly output: JsonObject | undefined;
  readonly failure: EffectError | undefined;
}

/** One call: the user says `said`, the model answers `answer`. */
async function call(
  guardrails: readonly JsonObject[],
  said: string,
  answer = "fine",
  more: { items?: readonly TranscriptItem[]; entries?: Record<number, Entry>; fails?: true; money?: ModelMoney } = {},
): Promise<Called> {
  const config = agentConfig.parse({ model: "simulated/echo", guardrails });
  const entries = new Map<number, Entry>([
    [2, { t: "done", inst: "1:configuration", output: { config } as unknown as Json }],
    [3, { t: "command", type: "message.send", channel: "command", body: { content: said } }],
    ...Object.entries(more.entries ?? {}).map(([seq, entry]) => [Number(seq), entry] as const),
  ]);
  let asked = 0;
  const model: ModelCall = async (_input, _scope, account) => {
    asked += 1;
    account.ended({ model: "own", purpose: "answer", cost_usd_micros: 43 } as ModelAttempt);
    if (more.fails) throw new EffectFailure("provider_unavailable", "away", {});
    return {
      text: answer,
      tool_calls: [],
      stop: "end",
      usage: { input_tokens: 3, output_tokens: 4 },
      cost_usd_micros: 43,
      price_version: "v",
      model: "simulated/echo",
    };
  };
  const scope = {
    actor: { tenant: "acme", kind: "session", id: "s1" },
    inst: "3:model",
    attempt: 1,
    epoch: 1,
    idempotency_key: "acme/session/s1/3:model",
    signal: new AbortController().signal,
    permitted: async () => true,
    trace: undefined,
    entries: async (seqs: readonly number[]) => new Map(seqs.map((seq) => [seq, entries.get(seq) as Entry])),
    tokens: () => ({ write() {}, end() {} }),
    progress() {},
    so_far() {},
  } as unknown as EffectScope;
  const messages = more.items ?? [{ role: "user", at: 3, turn: 1 }];
  try {
    const output = (await withGuardrails({ world, providers, breakers, patterns, ...(more.money === undefined ? {} : { money: more.money }) }, model)(
      { turn: 1, step: 0, config_seq: 2, messages } as never,
      scope,
    )) as JsonObject;
    return { asked, output, failure: undefined };
  } catch (error) {
    if (!(error instanceof EffectFailure)) throw error;
    return { asked, output: undefined, failure: error.effect_error };
  }
}

const rule = (more: JsonObject): JsonObject => ({ name: "rule", on: "input", ...more });
/** simulated/echo says what it hears: a text that says ALLOW is allowed by it. */
const JUDGE = { kind: "judge", model: "simulated/echo", policy: "be kind" };

describe("what the model would hear", () => {
  test.each([
    ["a pattern that matches", { kind: "pattern", pattern: "for+bidden" }, "it is forrrbidden", "the pattern matches"],
    ["a pattern in other letters", { kind: "pattern", pattern: "secret", ignore_case: true }, "SECRET", "the pattern matches"],
    ["a pattern that takes for ever", { kind: "pattern", pattern: ENDLESS }, FOR_EVER, "the pattern was too slow on it"],
    ["a size", { kind: "size", characters_max: 10 }, "eleven chars", "12 characters are more than 10"],
    ["a secret", { kind: "secret" }, "mine is AKIAIOSFODNN7EXAMPLE", "it holds what looks like a key of AWS"],
    ["a judge that blocks", JUDGE, "BLOCK", "the judge does not allow it"],
    ["a judge that says anything else", JUDGE, "well, ALLOW it, I think", "the judge does not allow it"],
    ["a judge that does not answer", { ...JUDGE, model: "simulated/script" }, '[{"fail":"bad_request"}]', "it could not be judged (script_failed)"],
    ["a judge that there is not", { ...JUDGE, model: "nowhere/nothing" }, "ALLOW", "it could not be judged (model_unknown)"],
  ])("GR1, GR3: is blocked by %s before any call, with the rule's name and not the text", async (_, given, said, why) => {
    const { asked, failure } = await call([rule(given)], said);
    expect([asked, failure?.code, failure?.message]).toEqual([0, "guardrail", `the guardrail 'rule' blocked it: ${why}`]);
    expect(failure?.details).toMatchObject({ rule: "rule", on: "input" });
    if (said.length > 12) expect(JSON.stringify(failure)).not.toContain(said);
  });

  test.each([
    ["a pattern", { kind: "pattern", pattern: "forbidden" }],
    ["a size", { kind: "size", characters_max: 10 }],
    ["a secret", { kind: "secret" }],
    ["a judge", JUDGE],
  ])("passes %s that it keeps", async (_, given) => {
    expect(await call([rule(given)], "ALLOW")).toMatchObject({ asked: 1, output: { text: "fine" } });
  });

  test("is what is new to it: the answers of tools, and not what it heard before", async () => {
    const entries: Record<number, Entry> = {
      4: { t: "done", inst: "3:model", output: { text: "", tool_calls: [] } },
      5: { t: "done", inst: "4:tool.0", output: { text: "AKIAIOSFODNN7EXAMPLE", is_error: false } },
    };
    const items: TranscriptItem[] = [
      { role: "user", at: 3, turn: 1 },
      { role: "assistant", at: 4, turn: 1 },
      { role: "tool", at: 5, turn: 1, call_id: "c", name: "now" },
    ];
    expect((await call([rule({ kind: "secret" })], "hello", "fine", { items, entries })).failure?.code).toBe("guardrail");
    expect((await call([rule({ kind: "pattern", pattern: "hello" })], "hello", "fine", { items, entries })).asked).toBe(1);
  });

  test("GR1: is told to no judge after a rule that it broke", async () => {
    const { failure } = await call(
      [
        { ...rule(JUDGE), name: "judge" },
        { ...rule({ kind: "secret" }), name: "keys" },
      ],
      "ALLOW AKIAIOSFODNN7EXAMPLE",
    );
    expect(failure?.details).toMatchObject({ rule: "keys", attempts: [] });
  });
});

describe("what the model said", () => {
  test("GR2: is dropped when it breaks a rule; what it cost is told, and nothing of its text", async () => {
    const { asked, failure } = await call([rule({ on: "output", kind: "secret" })], "hello", "it is AKIAIOSFODNN7EXAMPLE");
    expect(asked).toBe(1);
    expect(failure).toMatchObject({
      code: "guardrail",
      details: { rule: "rule", on: "output", usage: { output_tokens: 4 }, cost_usd_micros: 43, attempts: [{ model: "own" }] },
    });
    expect(JSON.stringify(failure)).not.toContain("AKIA");
  });

  test("passes a rule for what it hears", async () => {
    expect((await call([rule({ kind: "secret" })], "hello", "it is AKIAIOSFODNN7EXAMPLE")).output?.["text"]).toBe("it is AKIAIOSFODNN7EXAMPLE");
  });
});

test("GR4: what judges cost is told with the call's attempts, whether it answers or fails", async () => {
  const both = [
    { ...rule(JUDGE), name: "in" },
    { ...rule(JUDGE), name: "out", on: "output" },
  ];
  const { output } = await call(both, "ALLOW", "ALLOW");
  expect(output?.["attempts"]).toMatchObject([
    { model: "simulated/echo", outcome: "completed", purpose: "guardrail", rule: "in", try: 1, cost_usd_micros: expect.any(Number) },
    { model: "own", purpose: "answer" },
    { model: "simulated/echo", purpose: "guardrail", rule: "out", try: 3 },
  ]);
  const { failure } = await call(both, "ALLOW", "ALLOW", { fails: true });
  expect(failure).toMatchObject({ code: "provider_unavailable", details: { attempts: [{ model: "simulated/echo" }, { model: "own" }] } });
});

describe("a judge that costs", () => {
  const refuses: ModelMoney = {
    act: () => Promise.resolve(),
    spend: () => Promise.resolve(),
    begin: () => Promise.reject(new Error("the call itself asks for itself")),
    judge: () => Promise.reject(new EffectFailure("budget_exceeded", "nothing is left", { refusal: { limit_usd_micros: 0 } })),
  };

  test("GR4: is asked after the budget said yes, with as many words as are paid for, from the attempt's own hold", async () => {
    const asked: { model: string; made: number }[] = [];
    const money: ModelMoney = {
      ...refuses,
      judge: async ({ model, request, made = [] }) => {
        asked.push({ model, made: made.length });
        const pay = async () => ({ kind: "paid", max_output_tokens: 1 }) as const;
        return { model, request, decision: undefined, refusal: undefined, pay };
      },
    };
    const both = [
      { ...rule(JUDGE), name: "in" },
      { ...rule(JUDGE), name: "out", on: "output" },
    ];
    const { output } = await call(both, "ALLOW", "ALLOW", { money });
    expect(asked).toEqual([
      { model: "simulated/echo", made: 0 },
      { model: "simulated/echo", made: 2 },
    ]);
    expect(((output?.["attempts"] ?? []) as JsonObject[]).map(({ usage }) => (usage as JsonObject | undefined)?.["output_tokens"])).toEqual([1, undefined, 1]);
  });

  test("GR3: that the budget does not pay for lets no message to the model, and the turn ends with the budget's own words", async () => {
    const { asked, failure } = await call([rule(JUDGE)], "ALLOW", "fine", { money: refuses });
    expect([asked, failure?.code, failure?.details?.["refusal"]]).toEqual([0, "budget_exceeded", { limit_usd_micros: 0 }]);
  });

  test("GR3: that the budget does not pay for lets no answer out", async () => {
    const { asked, failure } = await call([rule({ ...JUDGE, on: "output" })], "hello", "an unjudged answer", { money: refuses });
    expect([asked, failure?.code]).toEqual([1, "guardrail"]);
    expect(failure?.message).toContain("could not be judged (budget_exceeded)");
    expect(JSON.stringify(failure)).not.toContain("unjudged answer");
  });
});

test("an agent without guardrails is called as it is", async () => {
  expect(await call([], "AKIAIOSFODNN7EXAMPLE", "AKIAIOSFODNN7EXAMPLE")).toMatchObject({ asked: 1, output: { text: "AKIAIOSFODNN7EXAMPLE" } });
});
