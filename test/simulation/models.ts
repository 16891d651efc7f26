// models: the providers of a simulated cluster, and its one tool that must not be repeated. What a call does is drawn from the seed and the effect's
// own name, so it stays the same when acts of the plan are left out. Everything around a call (money, places, routing) is the product's own.
//
//   a call ──▶ overloaded, before a word ──▶ (routed again)
//         ──▶ words, one after another ──▶ completed, with or without calls of tools
//                └──▶ broken off, called off, or never heard of again; or it ends the process it runs in
import { EffectFailure, type EffectScope, type Performer } from "../../actors/performer.ts";
import { actorPath } from "../../protocol/ids.ts";
import type { Json } from "../../protocol/json.ts";
import { pause, type World } from "../../protocol/world.ts";
import { modelError } from "../../providers/model-error.ts";
import { type CallIo, type ModelOutcome, type ModelRequest, NO_USAGE, type Provider, type Usage } from "../../providers/provider.ts";
import { PLATFORM_OWNER, type Providers } from "../../providers/registry.ts";
import { BUILT_IN_TOOLS } from "../../state-machines/tools.ts";
import type { Plan } from "./plan.ts";
import { hashOfText, type Story } from "./story.ts";

/** The product's tools, and one that must not be repeated. */
export const TOOLS = { ...BUILT_IN_TOOLS, charge: { description: "Takes money.", parameters: { type: "object" }, idempotent: false } } as const;

/** As the price table has them: what a model of another name costs nobody knows. */
const MODELS: ReadonlySet<string> = new Set(["echo", "script"]);

/** A process, as the calls in it know it. */
export interface Caller {
  readonly world: World;
  readonly connection: string;
  end(why: string): void;
}

const words = (text: string): number => text.match(/\S+/g)?.length ?? 0;

function inputTokens({ instructions, messages }: Pick<ModelRequest, "instructions" | "messages">): number {
  return messages.reduce((sum, { text }) => sum + 1 + words(text), 1 + words(instructions));
}

/** A wait that a signal ends: one listener for all waits of a call. */
function waiter(world: World, signal: AbortSignal): (ms: number) => Promise<void> {
  let wake = (): void => {};
  signal.addEventListener("abort", () => wake(), { once: true });
  return (ms) =>
    new Promise((resolve) => {
      if (signal.aborted) return resolve();
      const cancel = world.after(ms, resolve);
      wake = () => {
        cancel();
        resolve();
      };
    });
}

export class SimulatedModels {
  /** What the models really said: `{path} {turn}.{step}.{attempt}` → the whole text of that attempt. */
  readonly spoken = new Map<string, string>();
  readonly #plan: Plan;
  readonly #story: Story;
  readonly #charged = new Map<string, number>();
  /** Calls made for an attempt. */
  readonly #calls = new Map<string, number>();
  #hung = false;
  poisoned: boolean;

  constructor(plan: Plan, story: Story) {
    this.#plan = plan;
    this.#story = story;
    this.poisoned = plan.poison !== undefined;
  }

  providers(caller: Caller): Providers {
    const provider: Provider = { name: "simulated", countInputTokens: inputTokens, call: (request, io) => this.#call(caller, request, io) };
    return {
      configured: ["simulated"],
      takes_keys: [],
      keyNameOf: () => undefined,
      withKey: () => provider,
      resolve(model) {
        const [name, rest = ""] = model.split("/", 2);
        if (name !== "simulated" || !MODELS.has(rest)) return { kind: "refused", error: modelError("model_unknown", `there is no model ${model}`) };
        return { kind: "resolved", provider, model: rest, key_source: "platform", owner: PLATFORM_OWNER };
      },
    };
  }

  /** The product's performer, whose calls say for which attempt they are: a provider is told an effect's name alone. */
  performer(perform: Performer): Performer {
    return (input: never, scope) => {
      const { turn, step } = input as { turn: number; step: number };
      if (scope.waited !== undefined) this.#story.count("waits that a take-over kept");
      return perform(input, {
        ...scope,
        idempotency_key: `${scope.idempotency_key}#${turn}.${step}.${scope.attempt}`,
        so_far: (read) =>
          scope.so_far(() => {
            this.#story.count("asked when stopped");
            return read();
          }),
      });
    };
  }

  async #call({ world, connection, end }: Caller, request: ModelRequest, io: CallIo): Promise<ModelOutcome> {
    const { seed, poison, hang_one_in } = this.#plan;
    const { count, trace } = this.#story;
    const [key = "", place = ""] = request.idempotency_key.split("#", 2);
    const [told = "", ...rule] = place.split("/");
    const path = key.split("/", 3).join("/");
    const [turn = "", step = "", attempt = ""] = told.split(".");
    const fate = hashOfText(`${seed} ${key}`);
    const fateOfAttempt = hashOfText(`${seed} ${key} ${attempt}`);
    const wait = waiter(world, io.signal);
    const input_tokens = inputTokens(request);
    let said = 0;
    let text = "";
    const usage = (): Usage => ({ ...NO_USAGE, input_tokens, output_tokens: said });
    io.meter?.(usage);
    const failed = (code: Parameters<typeof modelError>[0], billed: boolean): ModelOutcome => {
      const error = modelError(code, "no answer today");
      return { kind: "failed", error, text, ...(billed ? { usage: usage() } : {}) };
    };
    count("model calls");
    if (rule.length > 0) {
      // A guardrail asks for one word.
      await wait(fateOfAttempt % 300);
      if (io.signal.aborted) return failed("cancelled", true);
      said = 1;
      text = fate % 6 === 0 ? "BLOCK" : "ALLOW";
      io.on_delta({ kind: "text", text });
      return { kind: "completed", text, tool_calls: [], stop: "end", usage: usage() };
    }
    const call = (this.#calls.get(request.idempotency_key) ?? 0) + 1;
    this.#calls.set(request.idempotency_key, call);
    if (this.poisoned && path === poison) {
      await pause(world, 30);
      count("poison taken");
      end(`poison in ${path}`);
      return new Promise(() => undefined);
    }
    if (hang_one_in > 0 && !this.#hung && fate % hang_one_in === 0) {
      this.#hung = true;
      count("hung calls");
      trace(`${connection} model call ${request.idempotency_key} hangs`);
      return new Promise(() => undefined);
    }
    // Some fail before a word, once or as often as they are asked.
    if (fate % 5 === 0 && (call === 1 || fate % 25 === 0)) {
      await wait(fateOfAttempt % 400);
      return io.signal.aborted ? failed("cancelled", false) : failed("overloaded", fate % 2 === 0);
    }
    const wanted = Array.from({ length: 1 + (fateOfAttempt % 12) }, (_, index) => `${path.at(-1) ?? ""}${turn}.${step}.${attempt}.${index} `);
    const saying = wanted.slice(0, request.max_output_tokens);
    this.spoken.set(`${path} ${told}`, saying.join(""));
    const speed = fate % 20;
    const between_ms = speed < 14 ? fateOfAttempt % 40 : speed < 18 ? 50 + (fateOfAttempt % 300) : 400 + (fateOfAttempt % 1_500);
    for (const word of saying) {
      await wait(between_ms);
      if (io.signal.aborted) return failed("cancelled", true);
      said++;
      text += word;
      io.on_delta({ kind: "text", text: word });
    }
    if (fate % 17 === 0) return failed("provider_error", true);
    if (saying.length < wanted.length) return { kind: "completed", text, tool_calls: [], stop: "length", usage: usage() };
    const calls = Number(step) < 3 && fate % 4 === 0 ? 1 + ((fate >>> 4) % 3) : 0;
    const tool_calls = Array.from({ length: calls }, (_, index) => {
      const which = (fate >>> (6 + 2 * index)) % 5;
      const name = which < 2 ? "charge" : which < 4 ? "wait_ms" : index === 0 ? "nothing_known" : "now";
      return { id: `c${index}`, name, args: name === "wait_ms" ? { ms: (fate >>> 3) % 1_500 } : {} };
    });
    return { kind: "completed", text, tool_calls, stop: calls > 0 ? "tool_calls" : "end", usage: usage() };
  }

  /** A tool that may not be called twice for one inst, whatever dies. */
  async charge(world: World, scope: EffectScope): Promise<Json> {
    const times = (this.#charged.get(scope.idempotency_key) ?? 0) + 1;
    this.#charged.set(scope.idempotency_key, times);
    if (times > 1) this.#story.fail(`A3: ${scope.idempotency_key} charged ${times} times`);
    const fate = hashOfText(`${this.#plan.seed} ${actorPath(scope.actor)}/${scope.inst}`);
    await pause(world, fate % 900);
    if (fate % 7 === 0) throw new EffectFailure("tool_failed", "no luck");
    return { text: "charged", is_error: fate % 11 === 0 };
  }
}
