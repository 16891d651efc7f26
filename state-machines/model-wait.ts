// model-wait: what a model call waits for before it is made, as its session's journal has it: for what, since when, until when at the latest.
//
//   the call says so (a `progress` entry) ──▶ model.waiting ──▶ … another wait … ──▶ the call is made, or fails ──▶ model.waited
//
// A take-over loses the call, not what is known: the wait stays until the next attempt says how it goes on, and when that waits for the same,
// it has waited since the first one did.
//
// Invariants:
//   MW1. A session that stands still before a model call says for what, and by when it will have been decided: in its state, so after every
//        take-over too.
import type { ActorEvent } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { timestamp } from "../protocol/world.ts";
import type { Change } from "./definition.ts";

/**
 * `slot`    one of the calls that its tenant may make at once
 * `place`   one of the calls that its worker makes at once
 * `rate`    a provider's window of requests and tokens
 * `money`   money that other calls hold and may give back
 * `budget`  the tenant's budget, which does not answer
 * `breaker` the one probe of a provider that was down, or its cool-down, once more
 */
export const MODEL_WAITS = ["slot", "place", "rate", "money", "budget", "breaker"] as const;
export type ModelWaitFor = (typeof MODEL_WAITS)[number];

export interface ModelWait {
  readonly for: ModelWaitFor;
  readonly since_ms: number;
  /** By then it goes on, or is refused. */
  readonly until_ms: number;
  /** When it asks again; absent where it is called. */
  readonly again_ms?: number;
  /** Of a rate. */
  readonly provider?: string;
  /** What it was told, in words. */
  readonly message: string;
}

/** A call's own word of a wait; `numbers` only for who listens. */
export type ToldWait = ModelWait & { readonly numbers?: JsonObject };

interface Waiting {
  readonly wait?: ModelWait | null;
}

const MESSAGE_CHARACTERS_MAX = 300;

/** The wait in a state is over, in whatever way. */
export const waitOver = ({ wait }: Waiting): { readonly wait?: null } => (wait === undefined || wait === null ? {} : { wait: null });

/** It waits now, for something else than before, or no longer. */
export function modelWaits(before: ModelWait | null | undefined, told: ToldWait | null, call: JsonObject, at_ms: number): Change<Waiting> {
  if (told === null) {
    if (before === undefined || before === null) return {};
    return {
      context: { wait: null },
      tell: [{ type: "model.waited", ...call, for: before.for, waited_ms: Math.max(0, at_ms - before.since_ms) } as ActorEvent],
    };
  }
  const { numbers, message, ...rest } = told;
  const same = before !== undefined && before !== null && before.for === told.for && before.provider === told.provider;
  const wait: ModelWait = { ...rest, since_ms: same ? before.since_ms : told.since_ms, message: message.slice(0, MESSAGE_CHARACTERS_MAX) };
  return {
    context: { wait },
    tell: [{ type: "model.waiting", ...call, ...waitShown(wait), ...(numbers === undefined ? {} : { details: numbers }) } as ActorEvent],
  };
}

/** A wait as events and programs have it. */
export function waitShown({ for: what, since_ms, until_ms, again_ms, provider, message }: ModelWait): JsonObject {
  return {
    for: what,
    ...(provider === undefined ? {} : { provider }),
    since: timestamp(since_ms),
    until: timestamp(until_ms),
    ...(again_ms === undefined ? {} : { again: timestamp(again_ms) }),
    message,
  };
}

const WORDS: Readonly<Record<ModelWaitFor, (wait: ModelWait) => string>> = {
  slot: () => "a slot of its tenant",
  place: () => "a place at its worker",
  rate: ({ provider = "its provider" }) => `the rate window of ${provider}`,
  money: () => "money that other calls hold",
  budget: () => "its tenant's budget to answer",
  breaker: ({ provider = "its provider" }) => `the circuit breaker of ${provider}`,
};

/** In words for people. */
export function waitWords(wait: ModelWait | null | undefined): string | undefined {
  if (wait === undefined || wait === null) return undefined;
  const again = wait.again_ms === undefined ? "" : `, asks again at ${timestamp(wait.again_ms)}`;
  return `its model call waits for ${WORDS[wait.for](wait)} since ${timestamp(wait.since_ms)}, until ${timestamp(wait.until_ms)} at the latest${again}: ${wait.message}`;
}
