// call-account: what one attempt of a model call has come to, while it goes on: the calls that were made for it, one after another, whoever made
// them (the agent's own, and those in which a guardrail has a text judged), and the one that is being made.
//
//   opened with the attempt ──▶ a call begins ──▶ ends: one more in `attempts` ──▶ … ──▶ the attempt's output
//                                   └─ stopped from outside: `soFar` tells it too, with the usage known at that moment
//
// Invariants:
//   CA1. Every call that was made stands in `attempts` once, numbered from 1 over the whole attempt of the effect, in the order of the ends.
//   CA3. What a call waits for before it is made is told when it has waited WAIT_TOLD_AFTER_MS for it, once for each thing, and its end when a call
//        begins: no journal grows by a wait that nobody could notice.
//   CA2. What is told when the attempt is stopped has every call in it, the one in flight with what it has used so far.
import type { Json, JsonObject } from "../protocol/json.ts";
import type { ModelAttempt, SkippedModel } from "./model-attempt.ts";
import type { World } from "../protocol/world.ts";
import type { ModelWait, ToldWait } from "../state-machines/model-wait.ts";
import type { EffectScope } from "./performer.ts";

/** Shorter waits are over before anybody has asked. */
export const WAIT_TOLD_AFTER_MS = 250;

/** What is done next about a call that did not answer, for the journal. */
export interface NextCall {
  readonly model: string;
  /** Of this model at this place, from 1. */
  readonly try: number;
  readonly wait_ms: number;
  /** Why: the trouble with the call before. */
  readonly code: string;
  readonly message: string;
  readonly purpose: ModelAttempt["purpose"];
  /** Models that may be asked after this one. */
  readonly left: readonly string[];
}

export interface CallAccount {
  readonly attempts: readonly ModelAttempt[];
  readonly skipped: readonly SkippedModel[];
  /** A call is being made; `now` says what it would be as an attempt that is cancelled this moment. */
  begun(now: () => ModelAttempt): void;
  ended(attempt: ModelAttempt): void;
  passedOver(skipped: SkippedModel): void;
  /** The journal hears of what failed and what comes next. */
  next(next: NextCall): void;
  /** It waits, before a call is made: told unless that begins soon. Saying the same again changes nothing. */
  waits(wait: Omit<ToldWait, "since_ms">): void;
  /** What it waited for has come: what was not told yet is told no more. */
  goesOn(): void;
  /** Nothing more is told: the attempt has ended. */
  close(): void;
  /** Stands beside the calls in what is told: the budget's decision. */
  note(fields: JsonObject): void;
  soFar(): JsonObject;
}

export function createCallAccount(
  scope: Pick<EffectScope, "attempt" | "progress" | "so_far" | "waited">,
  /** Absent: waits are nobody's business. */
  world?: Pick<World, "now_ms" | "after">,
): CallAccount {
  const attempts: ModelAttempt[] = [];
  const skipped: SkippedModel[] = [];
  let inFlight: (() => ModelAttempt) | undefined;
  let noted: JsonObject = {};
  let told = scope.waited !== undefined;
  let waiting: { readonly of: string; readonly stop: () => void } | undefined;
  const tell = (more: JsonObject): void => scope.progress({ attempts: [...attempts] as unknown as Json, skipped: [...skipped] as unknown as Json, ...more });
  const noLonger = (): void => {
    waiting?.stop();
    waiting = undefined;
  };
  const account: CallAccount = {
    attempts,
    skipped,
    begun(now) {
      inFlight = now;
      noLonger();
      if (told) tell({ wait: null });
      told = false;
    },
    waits(wait) {
      const of = `${wait.for} ${wait.provider ?? ""}`;
      if (world === undefined || waiting?.of === of) return;
      noLonger();
      const since_ms = world.now_ms();
      const stop = world.after(WAIT_TOLD_AFTER_MS, () => {
        told = true;
        tell({ wait: { ...wait, since_ms } satisfies ModelWait as unknown as Json });
      });
      waiting = { of, stop };
    },
    goesOn: noLonger,
    close: noLonger,
    ended(attempt) {
      inFlight = undefined;
      attempts.push(attempt);
    },
    passedOver: (one) => void skipped.push(one),
    next: (next) => tell({ next: next as unknown as Json }),
    note(fields) {
      noted = { ...noted, ...fields };
    },
    soFar() {
      const all = inFlight === undefined ? attempts : [...attempts, inFlight()];
      const last = all.findLast(({ purpose }) => purpose === "answer");
      return {
        ...(last === undefined ? {} : { model: last.model }),
        attempt: scope.attempt,
        usage: (last?.usage ?? null) as Json,
        cost_usd_micros: last === undefined ? 0 : last.cost_usd_micros,
        price_version: last?.price_version ?? null,
        ...(last === undefined ? {} : { key_source: last.key_source }),
        attempts: [...all] as unknown as Json,
        ...(skipped.length === 0 ? {} : { skipped: [...skipped] as unknown as Json }),
        ...noted,
      };
    },
  };
  scope.so_far(() => account.soFar());
  return account;
}
