// performer: who carries out an effect that a machine only names.
import type { TokenWriter } from "./token-writer.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { EffectError, Entry } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";

/** What a performer is given besides its input. */
export interface EffectScope {
  readonly actor: ActorAddress;
  readonly inst: string;
  /** 1 for the first; a take-over raises it. The inst stays. */
  readonly attempt: number;
  readonly epoch: number;
  /** `{tenant}/{kind}/{id}/{inst}`: for tools and providers that recognise a repeat. */
  readonly idempotency_key: string;
  /** Ends the effect: its result is no longer wanted. */
  readonly signal: AbortSignal;
  /**
   * To be asked right before anything leaves for the outside world, however soon after the effect began: a process that stood still between the two
   * may have lost the actor, and its effect may have ended elsewhere (A3). Waits while that is not certain. False: it is over, and nothing may leave.
   */
  permitted(): Promise<boolean>;
  readonly trace: string | undefined;
  /** Committed entries of this actor by seq: messages rest there, not in the machine's context. Rejects when one is not there. */
  entries(seqs: readonly number[]): Promise<ReadonlyMap<number, Entry>>;
  /** What the attempt before was lost at waiting for, as it told it; the actor's state still says so. */
  readonly waited?: JsonObject;
  /** How far this attempt has come, for the journal: nobody waits until it stands there, and what comes after the attempt's end is dropped. */
  progress(told: JsonObject): void;
  /** What the attempt has come to so far, asked when it is stopped from outside; the last one given counts. Must not throw. */
  so_far(read: () => JsonObject): void;
  /** Chunks of this attempt, on the actor's token subject. */
  tokens(place: { turn: number; step: number }): TokenWriter;
}

/** Performs one effect to its end. Answers the output, or throws EffectFailure for what the machine should hear as a failure. */
export type Performer = (input: never, scope: EffectScope) => Promise<Json>;

export type Performers = Readonly<Record<string, Performer>>;

/** The expected failure of an effect, with its stable code. Anything else that is thrown reaches the machine as `internal`. */
export class EffectFailure extends Error {
  override readonly name = "EffectFailure";
  readonly effect_error: EffectError;
  constructor(code: string, message: string, details?: JsonObject) {
    super(`${code}: ${message}`);
    this.effect_error = details === undefined ? { code, message } : { code, message, details };
  }
}
