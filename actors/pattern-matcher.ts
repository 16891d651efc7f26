// pattern-matcher: does this expression match this text, with an end to the looking? Expressions are tenants' own, and some of them take
// exponentially long over the right text; so they run in one thread beside ours, one at a time, and one that is too slow ends with its thread.
//
//   a tenant's line ──its turn──▶ the thread ──▶ yes | no
//        ▲                          └─ MATCH_PATIENCE_MS passed ──▶ too_slow: a new thread, and the tenant rests for SLOW_REST_MS
//        └─ round and round: each tenant's next question after one of every other tenant
//
// Invariants:
//   PM1. Every question gets an answer: within MATCH_PATIENCE_MS of its turn, and one that waited longer than WAIT_MS_MAX for it is `too_slow`.
//   PM2. What waits is bounded, for a tenant and for all: above it the answer is `too_slow` at once.
//   PM3. No slow expression costs another its answer: the thread is replaced and goes on with the next.
//   PM4. A tenant waits for at most one question of each other tenant, however many those have; and one whose expressions are slow gets at most a
//        fifth of the thread.
import { Worker } from "node:worker_threads";
import { assert } from "../protocol/assert.ts";
import type { World } from "../protocol/world.ts";

/** An honest expression over a long text takes under a millisecond; this is what one dishonest one may cost. */
const MATCH_PATIENCE_MS = 100;
/** After a slow one its tenant's turn comes no sooner. */
const SLOW_REST_MS = 4 * MATCH_PATIENCE_MS;
/** A thread that does not even start in this time is given up. */
const START_PATIENCE_MS = 5_000;
const WAITING_MAX = 1_000;
const TENANT_WAITING_MAX = 100;
assert(TENANT_WAITING_MAX * 10 <= WAITING_MAX, "no few tenants fill the line for all");
/** Shorter than the patience of a model call, within which a text is looked at. */
const WAIT_MS_MAX = 15_000;

export type Match = "yes" | "no" | "too_slow";

export interface PatternMatcher {
  /** On behalf of `tenant`, in whose line it waits. */
  matches(tenant: string, pattern: string, flags: string, text: string): Promise<Match>;
  stop(): Promise<void>;
}

interface Question {
  readonly tenant: string;
  readonly pattern: string;
  readonly flags: string;
  readonly text: string;
  readonly asked_at_ms: number;
  answer(match: Match): void;
}

/** A tenant's questions, and until when none of them is asked. */
interface Line {
  readonly waiting: Question[];
  rests_until_ms: number;
}

export function createPatternMatcher(world: World): PatternMatcher {
  /** In the order of their turns: who was asked goes to the end. A line without questions stays only while its tenant rests. */
  const lines = new Map<string, Line>();
  let waiting = 0;
  let thread: { readonly worker: Worker; ready: boolean; readonly give_up: () => void } | undefined;
  let asked: { readonly id: number; readonly question: Question; readonly stop: () => void } | undefined;
  let wake: (() => void) | undefined;
  let count = 0;
  let stopped = false;

  function start(): void {
    const worker = new Worker(new URL("./pattern-thread.ts", import.meta.url));
    const mine = { worker, ready: false, give_up: world.after(START_PATIENCE_MS, () => thread === mine && !mine.ready && replace()) };
    thread = mine;
    worker.unref();
    worker.on("message", (said: { ready: true } | { id: number; matches: boolean }) => {
      if (thread !== mine) return;
      if ("ready" in said) {
        mine.ready = true;
        mine.give_up();
        next();
      } else if (asked?.id === said.id) settle(said.matches ? "yes" : "no");
    });
    // Where an expression breaks the thread (memory), its text is as good as too slow.
    worker.on("error", () => {
      if (thread === mine) replace();
    });
  }

  /** PM3 */
  function replace(): void {
    thread?.give_up();
    void thread?.worker.terminate();
    thread = undefined;
    const slow = asked?.question ?? take(); // a thread that does not start answers for the question that it was started for
    if (asked !== undefined) settle("too_slow");
    else {
      slow?.answer("too_slow");
      next();
    }
  }

  function settle(match: Match): void {
    const done = asked;
    asked = undefined;
    done?.stop();
    if (done !== undefined && match === "too_slow") rest(done.question.tenant);
    done?.question.answer(match);
    next();
  }

  /** PM4 */
  function rest(tenant: string): void {
    const line = lines.get(tenant) ?? { waiting: [], rests_until_ms: 0 };
    line.rests_until_ms = world.monotonic_ms() + SLOW_REST_MS;
    lines.set(tenant, line);
  }

  /** Whose turn it is: the first of the first line that does not rest. */
  function take(): Question | undefined {
    const now_ms = world.monotonic_ms();
    for (const [tenant, line] of lines) {
      if (line.rests_until_ms > now_ms) continue;
      lines.delete(tenant);
      const question = line.waiting.shift();
      if (question === undefined) continue; // rested, and has nothing to ask
      waiting -= 1;
      if (line.waiting.length > 0) lines.set(tenant, line);
      if (now_ms - question.asked_at_ms <= WAIT_MS_MAX) return question;
      question.answer("too_slow"); // PM1
      return take();
    }
    return undefined;
  }

  function next(): void {
    if (asked !== undefined || stopped || waiting === 0) return;
    if (thread === undefined) start();
    if (thread === undefined || !thread.ready) return;
    const question = take();
    if (question === undefined) {
      // All that wait rest.
      const soonest_ms = Math.min(...[...lines.values()].map((line) => line.rests_until_ms));
      wake?.();
      wake = world.after(Math.max(1, soonest_ms - world.monotonic_ms()), next);
      return;
    }
    const id = ++count;
    asked = { id, question, stop: world.after(MATCH_PATIENCE_MS, replace) }; // PM1
    const { pattern, flags, text } = question;
    thread.worker.postMessage({ id, pattern, flags, text }, []);
  }

  return {
    matches(tenant, pattern, flags, text) {
      const line = lines.get(tenant) ?? { waiting: [], rests_until_ms: 0 };
      if (stopped || waiting >= WAITING_MAX || line.waiting.length >= TENANT_WAITING_MAX) return Promise.resolve("too_slow"); // PM2
      return new Promise((resolve) => {
        line.waiting.push({ tenant, pattern, flags, text, asked_at_ms: world.monotonic_ms(), answer: resolve });
        waiting += 1;
        lines.set(tenant, line);
        next();
      });
    },
    async stop() {
      stopped = true;
      wake?.();
      for (const line of lines.values()) for (const question of line.waiting.splice(0)) question.answer("too_slow");
      lines.clear();
      waiting = 0;
      asked?.stop();
      asked?.question.answer("too_slow");
      asked = undefined;
      thread?.give_up();
      await thread?.worker.terminate();
      thread = undefined;
    },
  };
}
