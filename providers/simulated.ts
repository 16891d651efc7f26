// simulated: models that need no provider, so that any behaviour can be had at will, offline, and in any World's time. They go through the same
// attempt as the real ones.
//
// simulated/echo repeats the last user message word by word.
//
// simulated/script plays the last user message, whose text is a JSON array of steps:
//   {"say": text, "tokens"?: n, "first_token_ms"?: a, "token_ms"?: b}
//       Says the text, a word at a time: the first after a ms, each later one b ms after the one before. With `tokens` exactly n words are said:
//       the text is cut, or begun again from its start (with a blank between), until there are n. A text without a word then stands for "word".
//   {"think": text, …as say}     The same as reasoning.
//   {"call": tool, "args"?: {…}, "first_token_ms"?: a}
//       Calls a tool. `args` that are no object arrive as a real model's would: as `invalid_args`.
//   {"fail": code, "message"?: text, "retry_after_ms"?: n, "first_token_ms"?: a}
//       Ends the model call with this error of MODEL_ERRORS, after what was said before. A repeat of the call fails again: a script has no memory.
//   {"stop": "length" | "refusal" | "content_filter"}
//       Ends the answer with this stop reason.
//
// A script is played over the model calls of one turn. Each model call plays on until a `call` (calls that stand together are parallel and
// end that model call together), a `fail`, a `stop`, or the end of the script. Where to begin is read off the request: one part of the script has been
// played for each assistant's message after the last user message. So a repeated attempt plays the same part again, in any process.
//   [{"say":"Let me look."},{"call":"clock"},{"call":"weather","args":{"at":"Rome"}},{"say":"It is noon and sunny."}]
//   is a first model call with a sentence and two parallel calls, and a second one with the answer.
//
// Tokens are words, separated by white space; a word is said with the white space before it, so that the pieces run together are the text.
// Usage is exact at any moment: input = words of the instructions and of every message (a call counts its name and the words of its JSON),
// output = words said and called, reasoning = words thought. `max_output_tokens` holds: beyond it the answer stops with `length`.
import { z } from "zod";
import { canonicalJson, hashOf } from "../protocol/json.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { type Attempt, PATIENCE_DEFAULT, type Patience, runAttempt } from "./attempt.ts";
import { modelError } from "./model-error.ts";
import {
  MODEL_ERRORS,
  NO_USAGE,
  type ModelErrorCode,
  type ModelOutcome,
  type ModelRequest,
  type Provider,
  type StopReason,
  type ToolCall,
  type Usage,
} from "./provider.ts";
import { toolCall } from "./tool-args.ts";

/** The echo's pace: fast enough for a program, slow enough that a person sees it stream. */
const ECHO_TOKEN_MS = 25;

export const SIMULATED_MODELS = ["echo", "script"] as const;

/** More than any experiment says, and still only seconds of work. */
const STEP_TOKENS_MAX = 1_000_000;
const STEPS_MAX = 1_000;
/** A timer of the host lasts longer than this only by mistake. */
const STEP_DELAY_MS_MAX = 24 * 60 * 60 * 1000;
/** Words said without a breath; then others get the thread. */
const WORDS_PER_BREATH = 64;

const delay_ms = z.number().min(0).max(STEP_DELAY_MS_MAX).optional();
const utterance = { tokens: z.int().min(0).max(STEP_TOKENS_MAX).optional(), first_token_ms: delay_ms, token_ms: delay_ms };
const error_codes = Object.keys(MODEL_ERRORS) as [ModelErrorCode, ...ModelErrorCode[]];
/** Strict: a mistyped field would silently be another script. */
const STEPS = {
  say: z.strictObject({ say: z.string(), ...utterance }),
  think: z.strictObject({ think: z.string(), ...utterance }),
  call: z.strictObject({ call: z.string().min(1), args: z.json().optional(), first_token_ms: delay_ms }),
  fail: z.strictObject({
    fail: z.enum(error_codes),
    message: z.string().max(500).optional(),
    retry_after_ms: z.int().min(0).optional(),
    first_token_ms: delay_ms,
  }),
  stop: z.strictObject({ stop: z.enum(["length", "refusal", "content_filter"]) }),
};
type StepName = keyof typeof STEPS;
type SayStep = z.infer<typeof STEPS.say>;
type ThinkStep = z.infer<typeof STEPS.think>;
type CallStep = z.infer<typeof STEPS.call>;
type FailStep = z.infer<typeof STEPS.fail>;
type StopStep = z.infer<typeof STEPS.stop>;
export type ScriptStep = SayStep | ThinkStep | CallStep | FailStep | StopStep;

export function simulatedProvider(settings: { readonly world: World; readonly log: Log; readonly patience?: Patience }): Provider {
  const { world, log } = settings;
  return {
    name: "simulated",
    countInputTokens: inputWords,
    call(request, io) {
      const input_tokens = inputWords(request);
      // Counted as they are said: two steps without white space between them run together in the text, and are two words nevertheless.
      const said = { output_tokens: 0, reasoning_tokens: 0 };
      const usageOf = (): Usage => ({ ...NO_USAGE, input_tokens, ...said });
      const context = { provider: "simulated", world, log, patience: settings.patience ?? PATIENCE_DEFAULT, secrets: [], usageOf };
      return runAttempt(context, request, io, (attempt) => new Performance(attempt, request, world, said).run());
    },
  };
}

/** Words of a text: what stands between white space. */
export function wordCount(text: string): number {
  return text.match(/\S+/g)?.length ?? 0;
}

/** A text as words, each with the white space before it and the last also with what follows it. Run together they are the text. */
export function wordsOf(text: string): string[] {
  const words = text.match(/\s*\S+/g);
  if (words === null) return text === "" ? [] : [text];
  const rest = text.slice(words.reduce((length, word) => length + word.length, 0));
  words[words.length - 1] += rest;
  return words;
}

/** Exactly `tokens` words out of a text, which is cut or begun again. */
function wordsRepeated(text: string, tokens: number): string[] {
  const once = text.trim() === "" ? ["word"] : wordsOf(text);
  const words: string[] = [];
  for (let n = 0; n < tokens; n++) {
    const word = once[n % once.length] ?? "word";
    const needs_blank = n > 0 && n % once.length === 0 && !/^\s/.test(word) && !/\s$/.test(words[n - 1] ?? "");
    words.push(needs_blank ? ` ${word}` : word);
  }
  return words;
}

function callWords(call: Pick<ToolCall, "name" | "args" | "invalid_args">): number {
  return wordCount(call.name) + wordCount(call.invalid_args ?? canonicalJson(call.args));
}

function inputWords(request: Pick<ModelRequest, "instructions" | "messages">): number {
  let words = wordCount(request.instructions);
  for (const message of request.messages) {
    words += wordCount(message.text);
    if (message.role === "assistant") for (const call of message.tool_calls) words += callWords(call);
  }
  return words;
}

/** Reads a script, or says what is wrong with it. */
export function parseScript(text: string): { kind: "script"; steps: readonly ScriptStep[] } | { kind: "no_script"; message: string } {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return { kind: "no_script", message: "simulated/script wants the message to be a JSON array of steps, and it is not JSON" };
  }
  if (!Array.isArray(value)) return { kind: "no_script", message: "simulated/script wants the message to be a JSON array of steps, and it is no array" };
  if (value.length > STEPS_MAX) return { kind: "no_script", message: `a script has at most ${STEPS_MAX} steps` };
  const steps: ScriptStep[] = [];
  for (const [index, item] of value.entries()) {
    const name = (Object.keys(STEPS) as StepName[]).find((key) => item !== null && typeof item === "object" && Object.hasOwn(item, key));
    if (name === undefined) return { kind: "no_script", message: `step ${index} of the script has none of ${Object.keys(STEPS).join(", ")}` };
    const step = STEPS[name].safeParse(item);
    if (!step.success) {
      const issue = step.error.issues[0];
      const where = issue === undefined || issue.path.length === 0 ? "" : `, ${issue.path.join("/")}`;
      return { kind: "no_script", message: `step ${index} of the script (${name})${where}: ${issue?.message ?? "is not valid"}` };
    }
    steps.push(step.data);
  }
  return { kind: "script", steps };
}

/** The part of a script that the nth model call of a turn plays (from 0); empty beyond the last. */
export function scriptPart(steps: readonly ScriptStep[], n: number): readonly ScriptStep[] {
  let begin = 0;
  for (let part = 0; ; part++) {
    let end = begin;
    while (end < steps.length) {
      const step = steps[end++];
      const next = steps[end];
      if (step === undefined || "fail" in step || "stop" in step) break;
      if ("call" in step && !(next !== undefined && "call" in next)) break;
    }
    if (part === n) return steps.slice(begin, end);
    if (end >= steps.length) return [];
    begin = end;
  }
}

/** One answer as it is given. */
class Performance {
  readonly #attempt: Attempt;
  readonly #request: ModelRequest;
  readonly #world: World;
  readonly #said: { output_tokens: number; reasoning_tokens: number };
  readonly #calls: ToolCall[] = [];
  #words_left: number;
  #words_since_breath = 0;

  constructor(attempt: Attempt, request: ModelRequest, world: World, said: { output_tokens: number; reasoning_tokens: number }) {
    this.#attempt = attempt;
    this.#request = request;
    this.#world = world;
    this.#said = said;
    this.#words_left = request.max_output_tokens;
  }

  run(): Promise<ModelOutcome> {
    const { messages, model } = this.#request;
    const at = messages.findLastIndex((message) => message.role === "user");
    const text = messages[at]?.text ?? "";
    switch (model) {
      case "echo":
        return this.#play([{ say: text, token_ms: ECHO_TOKEN_MS }]);
      case "script": {
        const script = parseScript(text);
        if (script.kind === "no_script") return Promise.resolve(this.#attempt.failed(modelError("script_failed", script.message)));
        const played = messages.slice(at + 1).filter((message) => message.role === "assistant").length;
        return this.#play(scriptPart(script.steps, played));
      }
      default:
        return Promise.resolve(this.#attempt.failed(modelError("model_unknown", `there is no model simulated/${model}`)));
    }
  }

  async #play(steps: readonly ScriptStep[]): Promise<ModelOutcome> {
    for (const step of steps) {
      if ("say" in step) {
        if (!(await this.#utter("text", step.say, step))) return this.#completed("length");
      } else if ("think" in step) {
        if (!(await this.#utter("reasoning", step.think, step))) return this.#completed("length");
      } else if ("call" in step) {
        await this.#wait(step.first_token_ms ?? 0);
        if (!this.#callTool(step)) return this.#completed("length");
      } else if ("fail" in step) {
        await this.#wait(step.first_token_ms ?? 0);
        return this.#attempt.failed(
          modelError(step.fail, step.message ?? `the script fails here: ${MODEL_ERRORS[step.fail].meaning}`, [], step.retry_after_ms),
        );
      } else {
        return this.#completed(step.stop);
      }
    }
    return this.#completed(this.#calls.length > 0 ? "tool_calls" : "end");
  }

  /** Says words at their times; false when there were more than may be said. */
  async #utter(
    kind: "text" | "reasoning",
    text: string,
    step: { tokens?: number | undefined; first_token_ms?: number | undefined; token_ms?: number | undefined },
  ): Promise<boolean> {
    const words = step.tokens === undefined ? wordsOf(text) : wordsRepeated(text, step.tokens);
    // Times count from here, so that late timers do not add up over a long answer.
    const begin_ms = this.#world.monotonic_ms() + (step.first_token_ms ?? 0);
    for (const [n, word] of words.entries()) {
      await this.#wait(begin_ms + n * (step.token_ms ?? 0) - this.#world.monotonic_ms());
      if (this.#attempt.signal.aborted) return true;
      const costs = wordCount(word);
      if (costs > this.#words_left) return false;
      this.#words_left -= costs;
      this.#said[kind === "text" ? "output_tokens" : "reasoning_tokens"] += costs;
      this.#attempt.heard();
      this.#attempt.deliver(kind, word);
    }
    return true;
  }

  #callTool(step: CallStep): boolean {
    const id = `call_${hashOf(this.#request.idempotency_key).slice(0, 16)}_${this.#calls.length}`;
    const call = toolCall(id, step.call, canonicalJson(step.args ?? {}));
    const costs = callWords(call);
    if (costs > this.#words_left) return false;
    this.#words_left -= costs;
    this.#calls.push(call);
    this.#said.output_tokens += costs;
    this.#attempt.heard();
    this.#attempt.deliver("tool_call", call.invalid_args ?? canonicalJson(call.args));
    return true;
  }

  #completed(stop: StopReason): ModelOutcome {
    this.#attempt.heard();
    return { kind: "completed", text: this.#attempt.delivered.text, tool_calls: this.#calls, stop, usage: this.#attempt.usageSoFar() };
  }

  /** Until the time has come or nobody listens any more. Without a delay only every so many words, to leave the thread to others. */
  #wait(ms: number): Promise<void> {
    if (ms <= 0 && ++this.#words_since_breath < WORDS_PER_BREATH) return Promise.resolve();
    this.#words_since_breath = 0;
    const { signal } = this.#attempt;
    if (signal.aborted) return Promise.resolve();
    return new Promise((resolve) => {
      const end = () => {
        cancel();
        signal.removeEventListener("abort", end);
        resolve();
      };
      const cancel = this.#world.after(Math.max(0, ms), end);
      signal.addEventListener("abort", end, { once: true });
    });
  }
}
