// call-account: what one attempt of a model call has come to, while it goes on: the calls that were made for it, one after another, whoever made
// them (the agent's own, and those in which a guardrail has a text judged), and the one that is being made.
//
//   opened with the attempt ──▶ a call begins ──▶ ends: one more in `attempts` ──▶ … ──▶ the attempt's output
//                                   └─ stopped from outside: `soFar` tells it too, with the usage known at that moment
//
// Invariants:
//   CA1. Every call that was made stands in `attempts` once, numbered from 1 over the whole attempt of the effect, in the order of the ends.
//   CA2. What is told when the attempt is stopped has every call in it, the one in flight with what it has used so far.
import type { Json, JsonObject } from "../protocol/json.ts";
import type { ModelAttempt, SkippedModel } from "./model-attempt.ts";
import type { EffectScope } from "./performer.ts";

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
  /** Stands beside the calls in what is told: the budget's decision. */
  note(fields: JsonObject): void;
  soFar(): JsonObject;
}

export function createCallAccount(scope: Pick<EffectScope, "attempt" | "progress" | "so_far">): CallAccount {
  const attempts: ModelAttempt[] = [];
  const skipped: SkippedModel[] = [];
  let inFlight: (() => ModelAttempt) | undefined;
  let noted: JsonObject = {};
  const account: CallAccount = {
    attempts,
    skipped,
    begun(now) {
      inFlight = now;
    },
    ended(attempt) {
      inFlight = undefined;
      attempts.push(attempt);
    },
    passedOver: (one) => void skipped.push(one),
    next: (next) => scope.progress({ attempts: [...attempts] as unknown as Json, skipped: [...skipped] as unknown as Json, next: next as unknown as Json }),
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
