// fold: one entry taken through the machine's pure step, with all that came of it: what a commit is made of.
//
// A step that throws is a bug of a machine: the actor hears a failure instead, and goes on. An entry that stops effects bears what they came to: they
// are ended now, and the step is taken with that (E4 of effect-runner.ts).
import { errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import type { ActorEvent, Entry, OutMessage } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { APPEND_BYTES_TARGET, PAYLOAD_BYTES_MAX } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { type ActorState, commandHash, type Core, type Outcome } from "../state-machines/step.ts";
import type { EffectRunner } from "./effect-runner.ts";

export interface Fold {
  readonly entry: Entry;
  readonly state: ActorState;
  readonly events: readonly ActorEvent[];
  readonly out: readonly OutMessage[];
  readonly outcome: Outcome | undefined;
  readonly at_ms: number;
  readonly bytes: number;
}

/** Whose step it is, and under which ownership. */
export interface FoldingActor {
  readonly actor: ActorAddress;
  readonly core: Core;
  readonly epoch: number;
  readonly worker: string;
  readonly log: Log;
}

/** The one clock an actor sees, the same for all entries of a commit: never before the last one's, whatever the computer's clock does. */
export function stampOf(world: World, state: ActorState | undefined): number {
  return Math.max(Math.trunc(world.now_ms()), state?.at_ms ?? 0);
}

export function fold({ actor, core, epoch, worker }: FoldingActor, state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
  const step = core.apply(state, actor, entry, { seq: (state?.seq ?? 0) + 1, at_ms, epoch, worker });
  const bytes = JSON.stringify(entry).length + JSON.stringify(step.events).length;
  return { entry, state: step.state, events: step.events, out: step.out, outcome: step.outcome, at_ms, bytes };
}

/** E4 */
function foldStopping(by: FoldingActor, effects: Pick<EffectRunner, "end">, state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
  const folded = fold(by, state, entry, at_ms);
  if (state === undefined || (entry.t !== "command" && entry.t !== "timer")) return folded;
  const left = new Set(Object.values(folded.state.running).map(({ inst }) => inst));
  const stopped: Record<string, JsonObject> = {};
  for (const { inst } of Object.values(state.running)) {
    const told = left.has(inst) ? undefined : effects.end(inst);
    if (told !== undefined) stopped[inst] = told;
  }
  return Object.keys(stopped).length === 0 ? folded : fold(by, state, { ...entry, stopped }, at_ms);
}

/** The same, whatever the machine does with the entry; a result that no journal takes is heard as a failure. */
export function foldSafely(by: FoldingActor, effects: Pick<EffectRunner, "end">, state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
  try {
    const folded = foldStopping(by, effects, state, entry, at_ms);
    if (folded.bytes <= PAYLOAD_BYTES_MAX - APPEND_BYTES_TARGET || entry.t !== "done") return folded;
    const error = { code: "too_large", message: `the result is larger than a journal takes (${folded.bytes} bytes)` };
    return fold(by, state, { t: "fail", inst: entry.inst, error }, at_ms);
  } catch (error) {
    by.log.error("a machine broke on an entry", { actor: actorPath(by.actor), entry: entry.t, ...errorFields(error) });
    const internal = errorBody("internal", "the actor could not take this");
    if (entry.t === "done") return fold(by, state, { t: "fail", inst: entry.inst, error: internal }, at_ms);
    if (entry.t === "command" && state !== undefined) {
      const { t: _, body, stopped: __, ...identity } = entry;
      return fold(by, state, { t: "refused", hash: commandHash(entry.type, body), error: internal, ...identity }, at_ms);
    }
    throw error;
  }
}
