// definition: what a kind of actor is made of: a machine that is data, and what the host must know to run it.
//
// A machine never sends, sleeps, reads a clock or draws an id. It says three things to the world, by `emit`:
//   tell    an event of WIRE §3, for whoever listens
//   send    a message to another actor
//   answer  the result that the sender of the present command gets
// and names its effects by `invoke` and `spawnChild`: typed inert logic that the host performs.
import { type AnyStateMachine, type DoneActorEvent, type ErrorActorEvent, fromPromise, type NonReducibleUnknown, type PromiseActorLogic } from "xstate";
import type { Command } from "../protocol/commands.ts";
import type { ErrorBody } from "../protocol/errors.ts";
import type { ActorAddress, ActorKind } from "../protocol/ids.ts";
import type { ActorEvent, EffectError, Entry } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";

/** What a machine may emit. */
export type Emitted =
  | { readonly type: "tell"; readonly event: ActorEvent }
  | { readonly type: "send"; readonly to: string; readonly command: string; readonly body: JsonObject }
  | { readonly type: "answer"; readonly result: JsonObject };

/** The entry being applied, as every machine sees it: `context.now`. The only clock there is. */
export interface Now {
  readonly seq: number;
  /** Milliseconds since 1970, never before the last entry's. */
  readonly at_ms: number;
  /** Effect id → its attempt, for every effect that was in flight when the entry came: what its end is told under. */
  readonly attempts: Readonly<Record<string, number>>;
  /** Effect id → what the effect had come to, for those that this entry stops; absent when it stops none that said anything. */
  readonly stopped?: Readonly<Record<string, JsonObject>>;
}

/** Every machine's context has at least this. Plain JSON, `null` and never `undefined`. */
export interface BaseContext {
  readonly now: Now;
}

/** What the host gives to a machine when its actor is created. */
export interface CreationInput {
  readonly actor: ActorAddress;
  readonly now: Now;
  readonly body: JsonObject;
}

/** A command as the machine sees it: its event type is the command's type. */
export interface CommandEvent<T extends string = string, B = JsonObject> {
  readonly type: T;
  readonly body: B;
}

/** An effect is declared, never run, by the machine. */
export const effect = <I extends NonReducibleUnknown, O>(): PromiseActorLogic<O, I> =>
  fromPromise<O, I>(() => {
    throw new Error("effects are performed by the host");
  });

/**
 * The event keys under which results of a group of spawned effects (`tool.0`, `tool.1`, …) reach a machine. XState's names for them
 * stand here and in step.ts alone.
 */
export const groupDone = <G extends string>(group: G): `xstate.done.actor.${G}.*` => `xstate.done.actor.${group}.*`;
export const groupFailed = <G extends string>(group: G): `xstate.error.actor.${G}.*` => `xstate.error.actor.${group}.*`;

/** The event under which a machine hears how far its effect `id` has come. A machine that does not take it hears nothing; the ledger keeps it anyway. */
export const progressOf = <I extends string>(id: I): `${I}.progress` => `${id}.progress`;

/** Such results as a machine's event union must name them. */
export type GroupResult<G extends string, O> = DoneActorEvent<O, `${G}.${string}`> | ErrorActorEvent<EffectError, `${G}.${string}`>;

/**
 * What a lost attempt of an effect means after a take-over:
 * `retry`      safe to repeat with the same inst: begin again as the next attempt
 * `ambiguous`  it may have acted: it comes back to the machine as `fail{ambiguous}` and is not run again
 */
export type LostAttempt = "retry" | "ambiguous";

/** How one attempt of an effect ended. */
export type AttemptEnd =
  | { readonly kind: "done"; readonly output: Json }
  | { readonly kind: "failed"; readonly error: EffectError }
  /** The machine left it: cancelled, timed out, paused, finished. `told` is what it had come to by then, where it ran here. */
  | { readonly kind: "stopped"; readonly told?: JsonObject }
  /** With the worker that ran it. */
  | { readonly kind: "lost" };

export interface EndedAttempt {
  readonly actor: ActorAddress;
  readonly inst: string;
  readonly attempt: number;
  readonly input: Json;
  /** What it had said of itself while it ran. */
  readonly progress?: JsonObject;
  readonly end: AttemptEnd;
}

export interface EffectKind {
  /** May depend on the input: a tool that is idempotent is retried, another is ambiguous. */
  lost(input: Json): LostAttempt;
  /**
   * What the end of an attempt owes to other actors. Pure. Called exactly once for each attempt, however it ends, in the step that ends it:
   * what it answers is committed with that end, and published after it.
   */
  owes?(ended: EndedAttempt): readonly Exclude<Emitted, { type: "answer" }>[];
  /** The event that tells readers of a stream that what attempt `attempt` said is void. */
  superseded?(input: Json, attempt: number): ActorEvent;
}

/** What a command or an outcome makes of an actor, as data: pure functions answer it, and machines perform it. */
export interface Change<Context> {
  readonly context?: Partial<Context>;
  /** Into the journal, for whoever follows it. */
  readonly tell?: readonly ActorEvent[];
  /** Of the command's reply. */
  readonly answer?: JsonObject;
}

interface Enqueue<Context> {
  assign(patch: Partial<Context>): void;
  emit(emitted: Emitted): void;
}

/** A change as XState's actions; the cast because XState's own type of `enqueue` depends on the machine that is not made yet. */
export function perform<Context>({ enqueue }: { enqueue: unknown }, change: Change<Context>): void {
  const actions = enqueue as Enqueue<Context>;
  if (change.context !== undefined) actions.assign(change.context);
  for (const event of change.tell ?? []) actions.emit({ type: "tell", event });
  if (change.answer !== undefined) actions.emit({ type: "answer", result: change.answer });
}

export interface ActorDefinition {
  readonly kind: ActorKind;
  /** `id` and `version` make the name in the journal: `session@1`. */
  readonly machine: AnyStateMachine;
  /** The command type that brings such an actor into being. */
  readonly creates: string;
  /** Commands that only the actor's own host says, and that no message can bring: they have no schema in protocol/commands.ts. */
  readonly internal?: readonly string[];
  /** Outcomes of keyed commands that it remembers, IDEMPOTENCY_KEYS_MAX by default: fewer where the machine itself knows what was done. */
  readonly keys_max?: number;
  /** By the effect's `src` name; complete: lint compares it with the machine. */
  readonly effects: Readonly<Record<string, EffectKind>>;
  /** A finer refusal than `illegal_transition` for a command the state does not take, or takes only with conditions. Pure. */
  refuse?(view: ActorView, command: Command): ErrorBody | undefined;
  /** Why the actor does nothing right now, in words for people; undefined while it works (A6). `at_ms`: when it is asked, where that is known. */
  waits(view: ActorView, at_ms?: number): string | undefined;
  /** The same for programs, where it waits for something in particular: `for`, `since`, `until` and what else is known. */
  waitsFor?(view: ActorView, at_ms?: number): JsonObject | undefined;
  /** The event that tells of a change of the outer state (`session.state`, `worker.state`); it comes after what the machine tells itself. */
  moved?(change: { before: ActorView; after: ActorView; entry: Entry }): ActorEvent;
  /** The event that tells of a take-over; it comes first. */
  claimed?(claim: { epoch: number; from: string | null; to: string; reason: string }): ActorEvent;
}

/** What refuse and waits may look at. */
export interface ActorView {
  /** The outer state. */
  readonly state: string;
  readonly context: JsonObject;
  readonly final: boolean;
  /** ids of the effects in flight. */
  readonly running: readonly string[];
}

/** As an effect's failure reaches `onError`: `event.error`. */
export type { EffectError };
