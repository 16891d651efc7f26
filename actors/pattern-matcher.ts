// pattern-matcher: does this expression match this text, with an end to the looking? Expressions are tenants' own, and some of them take
// exponentially long over the right text; so they run in one thread beside ours, one at a time, and one that is too slow ends with its thread.
//
// Invariants:
//   PM1. Every question gets an answer, within MATCH_PATIENCE_MS of its turn; `too_slow` is one.
//   PM2. What waits is bounded: above QUEUE_MAX the answer is `too_slow` at once.
//   PM3. No slow expression costs another its answer: the thread is replaced and goes on with the next.
import { Worker } from "node:worker_threads";
import type { World } from "../protocol/world.ts";

/** An honest expression over a long text takes under a millisecond; this is what one dishonest one may cost. */
const MATCH_PATIENCE_MS = 100;
/** The first answer of a fresh thread waits for its start. */
const START_PATIENCE_MS = 5_000;
const QUEUE_MAX = 1_000;

export type Match = "yes" | "no" | "too_slow";

export interface PatternMatcher {
  matches(pattern: string, flags: string, text: string): Promise<Match>;
  stop(): Promise<void>;
}

interface Question {
  readonly pattern: string;
  readonly flags: string;
  readonly text: string;
  answer(match: Match): void;
}

export function createPatternMatcher(world: World): PatternMatcher {
  const waiting: Question[] = [];
  let thread: Worker | undefined;
  let ready = false;
  let asked: { readonly id: number; readonly question: Question; readonly stop: () => void } | undefined;
  let count = 0;

  function start(): Worker {
    const mine = new Worker(new URL("./pattern-thread.ts", import.meta.url));
    mine.unref();
    mine.on("message", ({ id, matches }: { id: number; matches: boolean }) => {
      ready = true;
      if (asked?.id === id) settle(matches ? "yes" : "no");
    });
    // Where an expression breaks the thread (memory), its text is as good as too slow.
    mine.on("error", () => {
      if (thread === mine) replace();
    });
    return mine;
  }

  function replace(): void {
    void thread?.terminate();
    thread = undefined;
    ready = false;
    settle("too_slow"); // PM3
  }

  function settle(match: Match): void {
    const done = asked;
    asked = undefined;
    done?.stop();
    done?.question.answer(match);
    next();
  }

  function next(): void {
    if (asked !== undefined) return;
    const question = waiting.shift();
    if (question === undefined) return;
    thread ??= start();
    const id = ++count;
    asked = { id, question, stop: world.after(ready ? MATCH_PATIENCE_MS : START_PATIENCE_MS, replace) }; // PM1
    const { pattern, flags, text } = question;
    thread.postMessage({ id, pattern, flags, text }, []);
  }

  return {
    matches(pattern, flags, text) {
      if (waiting.length >= QUEUE_MAX) return Promise.resolve("too_slow"); // PM2
      return new Promise((resolve) => {
        waiting.push({ pattern, flags, text, answer: resolve });
        next();
      });
    },
    async stop() {
      for (const question of waiting.splice(0)) question.answer("too_slow");
      asked?.stop();
      asked?.question.answer("too_slow");
      asked = undefined;
      await thread?.terminate();
      thread = undefined;
    },
  };
}
