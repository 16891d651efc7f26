// step: one pure step of an actor: (state, entry) → (state, outputs). No clock, no randomness, no I/O.
//
//   entry ──▶ event of the machine ──▶ machine.transition ──▶ executable actions ──▶ ledger of effects and timers,
//                                                                                      events, outgoing messages, answer
//
// This is the only file that knows XState's own action and event names (`xstate.*`; the keys of group results in definition.ts apart), so
// that its successor is one file.
//
// Invariants:
//   S1. Equal state and entry give equal outputs; nothing else is read.
//   S2. An effect that got its `done` or `fail` leaves the ledger in that very step; a stale result changes nothing (A3).
//   S3. A finished actor has no effects and no timers.
//   S4. The input of an effect is fixed when it begins; attempts differ only in their number.
//   S5. Each attempt ends once (done, failed, stopped, lost), and in the step that ends it its kind says what that owes to others.
//   S6. What an effect says while it runs (`progress`) changes neither its input nor who runs it, and is forgotten with its attempt; but the next
//       attempt knows what the lost one waited for (`wait`), since the actor's state still says so.
import { type AnyActorScope, type AnyMachineSnapshot, type AnyStateMachine, createActor, type ExecutableActionObject } from "xstate";
import { assert, unreachable } from "../protocol/assert.ts";
import { type ErrorBody, ERRORS, errorBody } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { ActorEvent, CommandSource, Entry, OutMessage } from "../protocol/journal.ts";
import { hashOf, type Json, type JsonObject } from "../protocol/json.ts";
import { AUTOMATIC_KEY_PREFIX } from "../protocol/commands.ts";
import { AUTOMATIC_KEY_KEEP_MS, IDEMPOTENCY_KEEP_MS, IDEMPOTENCY_KEYS_MAX } from "../protocol/limits.ts";
import type { CommandChannel } from "../protocol/subjects.ts";
import { type ActorDefinition, type ActorView, type AttemptEnd, type Emitted, type Now, progressOf } from "./definition.ts";

/** An effect that must be going on. */
export interface Running {
  /** `{seq of the entry that began it}:{effect id}`; with the actor's path the idempotency key of whoever performs it. */
  readonly inst: string;
  readonly src: string;
  readonly input: Json;
  /** 1 + how often a take-over lost it. */
  readonly attempt: number;
  /** What this attempt last said of itself. */
  readonly told?: JsonObject;
}

export interface Timer {
  readonly inst: string;
  readonly due_ms: number;
  readonly event: { readonly type: string };
}

export type Outcome =
  | { readonly ok: true; readonly seq: number; readonly state: string; readonly result: JsonObject }
  | { readonly ok: false; readonly error: ErrorBody };

/** The remembered outcome of one keyed command. */
interface Remembered {
  readonly key: string;
  readonly hash: string;
  readonly at_ms: number;
  readonly outcome: Outcome;
}

/** What an actor knows of the commands it has decided. */
interface Seen {
  /** Oldest first; at most IDEMPOTENCY_KEYS_MAX, none older than IDEMPOTENCY_KEEP_MS. */
  readonly keys: readonly Remembered[];
  /** `{stream}@{incarnation}` → the highest sequence decided. Only the newest incarnation of a stream is kept. */
  readonly marks: Readonly<Record<string, number>>;
  /** The last refusals by their source, oldest first, at most REFUSALS_KEPT_MAX: a message that comes again hears the same again. */
  readonly refusals?: readonly { readonly source: string; readonly error: ErrorBody }[];
}
/** Refused commands whose acknowledgement may be lost at one time; a mailbox that is refused more of them has a larger problem. */
const REFUSALS_KEPT_MAX = 32;
const markOf = (source: CommandSource): string => `${source.stream}@${source.incarnation}`;
const sourceName = (source: CommandSource): string => `${markOf(source)}:${source.seq}`;

/**
 * The recovery budget, spent. A take-over that lost attempts spends one try and what those attempts may have cost; only real progress (an
 * effect's result) gives it back. Above either limit the actor is told `recovery.exhausted` instead of being tried again.
 */
export interface Recovery {
  readonly tries: number;
  readonly cost_usd_micros: number;
}
/** Five workers lost with an actor's work in their hands are no coincidence. */
export const RECOVERY_TRIES_MAX = 5;
/** A dollar of model calls paid for and thrown away. */
export const RECOVERY_COST_USD_MICROS_MAX = 1_000_000;
/** The event a machine is told then; one that does not take it is tried on. */
export const RECOVERY_EXHAUSTED = "recovery.exhausted";
const NO_RECOVERY: Recovery = { tries: 0, cost_usd_micros: 0 };

export interface ActorState {
  readonly actor: ActorAddress;
  readonly seq: number;
  readonly at_ms: number;
  readonly epoch: number;
  readonly snapshot: AnyMachineSnapshot;
  readonly running: Readonly<Record<string, Running>>;
  readonly timers: Readonly<Record<string, Timer>>;
  readonly seen: Seen;
  /** What recovering has used up since the last real progress. */
  readonly recovery: Recovery;
  /** Hash of the body it was created with: creating again with the same body answers with the existing one. */
  readonly created_hash: string;
}

/** What an entry is applied under: fixed by the commit that holds it. */
export interface EntryFrame {
  readonly seq: number;
  readonly at_ms: number;
  readonly epoch: number;
  readonly worker: string;
}

export interface Step {
  readonly state: ActorState;
  readonly events: readonly ActorEvent[];
  readonly out: readonly OutMessage[];
  /** For commands: what their sender hears. */
  readonly outcome: Outcome | undefined;
}

/** The state as it rests in a snapshot. */
export interface SavedState {
  readonly machine: string;
  readonly actor: ActorAddress;
  readonly seq: number;
  readonly at_ms: number;
  readonly epoch: number;
  readonly value: Json;
  readonly context: Json;
  readonly status: string;
  readonly output: Json;
  readonly error: Json;
  readonly history: Json;
  readonly children: Readonly<Record<string, string>>;
  readonly running: Readonly<Record<string, Running>>;
  readonly timers: Readonly<Record<string, Timer>>;
  readonly seen: Seen;
  readonly created_hash: string;
  readonly recovery: Recovery;
}

/** What a command must show of itself to be recognised. */
export interface Identity {
  readonly channel: CommandChannel;
  readonly key?: string | undefined;
  readonly source?: CommandSource | undefined;
  readonly type: string;
  /** Of {type, body}. */
  readonly hash: string;
}

export type Recognition =
  /** Not decided before. */
  | { readonly kind: "new" }
  /** Decided before: this is what its sender heard, and hears again. Without a key only the fact is known. */
  | { readonly kind: "repeat"; readonly outcome: Outcome | undefined }
  /** The key was used with another body. */
  | { readonly kind: "conflict"; readonly error: ErrorBody };

export const commandHash = (type: string, body: JsonObject): string => hashOf({ type, body });

/** The outer state: the only part of the value that is a word of the wire. */
export function outerState(snapshot: AnyMachineSnapshot): string {
  const { value } = snapshot as { value: unknown };
  if (typeof value === "string") return value;
  const [outer] = Object.keys(value as object);
  assert(outer !== undefined, "a state value names a state");
  return outer;
}

/** The states that an actor of the kind can rest in, as the wire names them. */
export function outerStates({ machine }: ActorDefinition): readonly string[] {
  const nodes = Object.values((machine as AnyStateMachine).root.states);
  // One that is left by an eventless transition without a condition is never rested in.
  return nodes.filter(({ always }) => !always?.some(({ guard }) => guard === undefined)).map(({ key }) => key);
}

export function viewOf(state: ActorState): ActorView {
  return {
    state: outerState(state.snapshot),
    context: state.snapshot.context as JsonObject,
    final: state.snapshot.status !== "active",
    running: Object.keys(state.running),
  };
}

/** Has this command been decided? A sequence mark is trusted only because the inbox delivers without gaps. */
export function recognise(state: ActorState, identity: Identity): Recognition {
  if (identity.key !== undefined) {
    const key = `${identity.channel}:${identity.key}`;
    const known = state.seen.keys.findLast((remembered) => remembered.key === key);
    if (known !== undefined) {
      if (known.hash !== identity.hash)
        return { kind: "conflict", error: errorBody("conflict", `the Idempotency-Key was used with another body`, { key: identity.key }) };
      return { kind: "repeat", outcome: known.outcome };
    }
  }
  // A message that was refused and comes again, because its acknowledgement got lost, is no repeat of its sender's: he was told, also
  // with a refusal that may end.
  if (identity.source !== undefined) {
    const { source } = identity;
    const mark = state.seen.marks[markOf(source)];
    if (mark !== undefined && source.seq <= mark) {
      const refusal = state.seen.refusals?.find((one) => one.source === sourceName(source));
      if (refusal !== undefined) return { kind: "repeat", outcome: { ok: false, error: refusal.error } };
      if (identity.key === undefined) return { kind: "repeat", outcome: undefined };
    }
  }
  return { kind: "new" };
}

const NO_SEEN: Seen = { keys: [], marks: {} };

function remember(seen: Seen, at_ms: number, identity: Identity, outcome: Outcome, keys_max: number): Seen {
  let { keys, marks } = seen;
  const name = identity.key === undefined ? undefined : `${identity.channel}:${identity.key}`;
  // The first outcome of a key stays: a later `conflict` under the same key must not displace it.
  if (name !== undefined && !keys.some((remembered) => remembered.key === name) && (outcome.ok || !ERRORS[outcome.error.code].transient)) {
    const expired = (remembered: Remembered): boolean =>
      remembered.at_ms < at_ms - (remembered.key.includes(`:${AUTOMATIC_KEY_PREFIX}`) ? AUTOMATIC_KEY_KEEP_MS : IDEMPOTENCY_KEEP_MS);
    const crowded = keys.length >= keys_max || (keys[0] !== undefined && expired(keys[0]));
    const kept = crowded ? keys.filter((remembered, index) => index > keys.length - keys_max && !expired(remembered)) : keys;
    keys = [...kept, { key: name, hash: identity.hash, at_ms, outcome }];
  }
  if (identity.source !== undefined) {
    const { stream, seq } = identity.source;
    const others = Object.entries(marks).filter(([name]) => !name.startsWith(`${stream}@`));
    const mark = markOf(identity.source);
    marks = { ...Object.fromEntries(others), [mark]: Math.max(marks[mark] ?? 0, seq) };
    if (!outcome.ok) {
      const refusals = [...(seen.refusals ?? []), { source: sourceName(identity.source), error: outcome.error }].slice(-REFUSALS_KEPT_MAX);
      return { ...seen, keys, marks, refusals };
    }
  }
  return { ...seen, keys, marks };
}

const asSnapshot = (value: unknown): AnyMachineSnapshot => value as AnyMachineSnapshot;

/** The pure core of one kind of actor. Made once per definition and process. */
export interface Core {
  readonly definition: ActorDefinition;
  /** `session@1` */
  readonly machine_name: string;
  /** Would the machine take this command now? Answers the refusal, or undefined. */
  refusal(state: ActorState, type: string, body: JsonObject, channel: CommandChannel): ErrorBody | undefined;
  /** Is this effect result or timer still awaited? */
  awaits(state: ActorState, entry: Entry): boolean;
  apply(state: ActorState | undefined, actor: ActorAddress, entry: Entry, frame: EntryFrame): Step;
  save(state: ActorState): SavedState;
  load(saved: SavedState): ActorState;
}

/** The parameters of those of XState's built-in actions that are read here; its own types leave them open. */
interface SpawnParams {
  readonly actorRef?: { readonly id?: unknown };
  readonly src?: unknown;
  readonly input?: Json;
}
interface RaiseParams {
  readonly id?: string;
  readonly event: { readonly type: string };
  readonly delay?: number;
}

export function coreOf(definition: ActorDefinition): Core {
  const { machine } = definition;
  const machineName = `${machine.id}@${machine.version ?? "0"}`; // Stands in every journal message.
  const keysMax = definition.keys_max ?? IDEMPOTENCY_KEYS_MAX;
  // Never started: it is there only because the protocol of XState's actor logic asks for a scope. One per machine instead of
  // one per event, which halves the time and quarters the memory of a step.
  const self = createActor(machine, {
    input: { actor: { tenant: "-", kind: definition.kind, id: "-" }, now: { seq: 0, at_ms: 0, attempts: {} }, body: {} },
  } as never);

  function withActions<T>(run: (scope: AnyActorScope) => T): [T, ExecutableActionObject[]] {
    const actions: ExecutableActionObject[] = [];
    const scope = {
      self,
      id: "",
      sessionId: "",
      system: self.system,
      logger() {},
      defer() {},
      stopChild() {},
      emit() {},
      actionExecutor: (action: ExecutableActionObject) => void actions.push(action),
    } as unknown as AnyActorScope;
    return [run(scope), actions];
  }

  /** Reads effects, timers and emitted messages off the actions that the pure step names. */
  function interpret(
    actions: readonly ExecutableActionObject[],
    frame: EntryFrame,
    running: Record<string, Running>,
    timers: Record<string, Timer>,
  ): { events: ActorEvent[]; out: OutMessage[]; result: JsonObject | undefined } {
    const events: ActorEvent[] = [];
    const out: OutMessage[] = [];
    let result: JsonObject | undefined;
    for (const action of actions) {
      const params: unknown = action.params;
      switch (action.type as string) {
        case "xstate.spawnChild": {
          const { actorRef, src, input = null } = params as SpawnParams;
          const id = actorRef?.id;
          assert(typeof id === "string" && typeof src === "string", "an effect has an id and is named, not inline");
          running[id] = { inst: `${frame.seq}:${id}`, src, input, attempt: 1 };
          break;
        }
        case "xstate.stopChild": {
          // The reference itself; none when there was no such child any more.
          const child = params as { readonly id: string } | undefined;
          if (child !== undefined) delete running[child.id];
          break;
        }
        case "xstate.raise": {
          const { id, event, delay } = params as RaiseParams;
          // Without a delay it was already consumed by the step itself.
          if (typeof delay !== "number") break;
          const name = id ?? `raise.${event.type}`;
          timers[name] = { inst: `${frame.seq}:${name}`, due_ms: frame.at_ms + delay, event: { type: event.type } };
          break;
        }
        case "xstate.cancel":
          delete timers[(params as { readonly sendId: string }).sendId];
          break;
        case "xstate.emit": {
          const { event: emitted } = params as { readonly event: Emitted };
          if (emitted.type === "tell") events.push(emitted.event);
          else if (emitted.type === "send") out.push({ id: `${frame.seq}.${out.length}`, to: emitted.to, type: emitted.command, body: emitted.body });
          else if (emitted.type === "answer") result = { ...result, ...emitted.result };
          else unreachable(emitted, "what a machine emits");
          break;
        }
        case "xstate.log":
          break;
        default:
          assert(false, `action '${action.type}' of ${machineName} is data (assign, raise, cancel, emit, log, spawnChild, stopChild)`);
      }
    }
    return { events, out, result };
  }

  interface Moved {
    readonly state: ActorState;
    readonly events: ActorEvent[];
    readonly out: OutMessage[];
    readonly result: JsonObject | undefined;
  }

  /** Sends one event through the machine. */
  function move(
    state: ActorState,
    event: { type: string },
    frame: EntryFrame,
    running: Record<string, Running>,
    timers: Record<string, Timer>,
    stopped_insts?: Readonly<Record<string, JsonObject>>,
  ): Moved {
    // Of the effects in flight before this event, so of the one that just ended too.
    const attempts = Object.fromEntries(Object.entries(state.running).map(([id, effect]) => [id, effect.attempt]));
    const stopped = Object.fromEntries(Object.entries(state.running).flatMap(([id, { inst }]) => (stopped_insts?.[inst] ? [[id, stopped_insts[inst]]] : [])));
    const now: Now = { seq: frame.seq, at_ms: frame.at_ms, attempts, ...(Object.keys(stopped).length === 0 ? {} : { stopped }) };
    const before = { ...state.snapshot, context: { ...(state.snapshot.context as object), now } };
    const [snapshot, actions] = withActions((scope) => asSnapshot(machine.transition(before as never, event as never, scope as never)));
    const told = interpret(actions, frame, running, timers);
    return { ...told, state: settle({ ...state, snapshot, running, timers }, frame) };
  }

  /** S3, and the frame's marks on the state. */
  function settle(state: ActorState, frame: EntryFrame): ActorState {
    const over = state.snapshot.status !== "active";
    assert(
      state.snapshot.status !== "error",
      `a machine of ours ends in a final state, not in an error: ${JSON.stringify(state.snapshot.error)?.slice(0, 500)}`,
    );
    return { ...state, seq: frame.seq, at_ms: frame.at_ms, epoch: frame.epoch, running: over ? {} : state.running, timers: over ? {} : state.timers };
  }

  const idOf = (ledger: Readonly<Record<string, { inst: string }>>, inst: string): string | undefined =>
    Object.keys(ledger).find((id) => ledger[id]?.inst === inst);

  /** S5: what the ends of attempts owe, after what the step itself told and sent. Ids of outgoing messages count over the whole entry. */
  function withDues(step: Step, before: ActorState, entry: Entry, frame: EntryFrame): Step {
    const events: ActorEvent[] = [];
    const out: OutMessage[] = [];
    const end = (effect: Running, how: AttemptEnd): void => {
      const { inst, attempt, input, told } = effect;
      const ended = { actor: step.state.actor, inst, attempt, input, ...(told === undefined ? {} : { progress: told }), end: how };
      for (const emitted of definition.effects[effect.src]?.owes?.(ended) ?? []) {
        if (emitted.type === "tell") events.push(emitted.event);
        else out.push({ id: `${frame.seq}.${step.out.length + out.length}`, to: emitted.to, type: emitted.command, body: emitted.body });
      }
    };
    const left = new Map(Object.values(step.state.running).map((effect) => [effect.inst, effect]));
    for (const effect of Object.values(before.running)) {
      const lost = entry.t === "claim" && entry.lost.includes(effect.inst);
      const gone = !left.has(effect.inst);
      if (lost) end(effect, { kind: "lost" });
      else if (gone && entry.t === "done" && entry.inst === effect.inst) end(effect, { kind: "done", output: entry.output });
      else if (gone && entry.t === "fail" && entry.inst === effect.inst) end(effect, { kind: "failed", error: entry.error });
      else if (gone) {
        const told = entry.t === "command" || entry.t === "timer" ? entry.stopped?.[effect.inst] : undefined;
        end(effect, { kind: "stopped", ...(told === undefined ? {} : { told }) });
      }
    }
    return events.length + out.length === 0 ? step : { ...step, events: [...step.events, ...events], out: [...step.out, ...out] };
  }

  function applyClaim(state: ActorState, entry: Extract<Entry, { t: "claim" }>, frame: EntryFrame): Step {
    const events: ActorEvent[] = [];
    const out: OutMessage[] = [];
    const claimed = definition.claimed?.({ epoch: frame.epoch, from: entry.from, to: frame.worker, reason: entry.reason });
    if (claimed) events.push(claimed);
    let current = settle(state, frame);
    for (const inst of entry.lost) {
      const id = idOf(current.running, inst);
      const effect = id === undefined ? undefined : current.running[id];
      if (id === undefined || effect === undefined) continue;
      const kind = definition.effects[effect.src];
      assert(kind !== undefined, `effect '${effect.src}' of ${machineName} is declared`);
      const superseded = kind.superseded?.(effect.input, effect.attempt);
      const assumed = entry.assumed?.[inst];
      if (superseded) events.push(assumed === undefined ? superseded : { ...superseded, assumed_usd_micros: assumed });
      if (kind.lost(effect.input) === "retry") {
        const { told, ...anew } = effect; // S6
        const wait = told?.["wait"];
        const knows = wait === undefined || wait === null ? {} : { told: { wait } };
        current = { ...current, running: { ...current.running, [id]: { ...anew, ...knows, attempt: effect.attempt + 1 } } };
        continue;
      }
      const running = { ...current.running };
      delete running[id];
      const error = { code: "ambiguous", message: "the worker was lost while this ran; it may have acted" };
      const moved = move(current, { type: `xstate.error.actor.${id}`, actorId: id, error } as { type: string }, frame, running, { ...current.timers });
      // Ids of outgoing messages count over the whole entry.
      out.push(...moved.out.map((message, index) => ({ ...message, id: `${frame.seq}.${out.length + index}` })));
      events.push(...moved.events);
      current = moved.state;
    }
    const spent: Recovery = {
      tries: state.recovery.tries + (entry.lost.length > 0 ? 1 : 0),
      cost_usd_micros: state.recovery.cost_usd_micros + Object.values(entry.assumed ?? {}).reduce((sum, cost) => sum + cost, 0),
    };
    current = { ...current, recovery: spent };
    const exhausted = { type: RECOVERY_EXHAUSTED, ...spent };
    const over = spent.tries >= RECOVERY_TRIES_MAX || spent.cost_usd_micros >= RECOVERY_COST_USD_MICROS_MAX;
    if (over && Object.keys(current.running).length > 0 && current.snapshot.can(exhausted as never)) {
      const moved = move({ ...current, recovery: NO_RECOVERY }, exhausted, frame, { ...current.running }, { ...current.timers });
      out.push(...moved.out.map((message, index) => ({ ...message, id: `${frame.seq}.${out.length + index}` })));
      events.push(...moved.events);
      current = moved.state;
    }
    return { state: current, events, out, outcome: undefined };
  }

  /** A step, and the event that says the outer state changed. */
  function apply(state: ActorState | undefined, actor: ActorAddress, entry: Entry, frame: EntryFrame): Step {
    const applied = applyEntry(state, actor, entry, frame);
    if (state === undefined) return applied;
    const step = withDues(applied, state, entry, frame);
    if (definition.moved === undefined) return step;
    const before = viewOf(state);
    const after = viewOf(step.state);
    if (before.state === after.state) return step;
    return { ...step, events: [...step.events, definition.moved({ before, after, entry })] };
  }

  function applyEntry(state: ActorState | undefined, actor: ActorAddress, entry: Entry, frame: EntryFrame): Step {
    if (entry.t === "init") {
      assert(state === undefined, "an actor is created once");
      const now: Now = { seq: frame.seq, at_ms: frame.at_ms, attempts: {} };
      const [snapshot, actions] = withActions((scope) => asSnapshot(machine.getInitialSnapshot(scope as never, { actor, now, body: entry.body } as never)));
      const running: Record<string, Running> = {};
      const timers: Record<string, Timer> = {};
      const told = interpret(actions, frame, running, timers);
      const hash = commandHash(entry.type, entry.body);
      const created = settle({ actor, seq: 0, at_ms: 0, epoch: 0, snapshot, running, timers, seen: NO_SEEN, created_hash: hash, recovery: NO_RECOVERY }, frame);
      const outcome: Outcome = { ok: true, seq: frame.seq, state: outerState(snapshot), result: { created: true, ...told.result } };
      return { events: told.events, out: told.out, outcome, state: { ...created, seen: remember(NO_SEEN, frame.at_ms, { ...entry, hash }, outcome, keysMax) } };
    }
    assert(state !== undefined, "a journal begins with init");
    assert(frame.seq === state.seq + 1, "J1: seq counts entries without gaps");
    assert(frame.at_ms >= state.at_ms, "J2: time in a journal never falls");
    assert(frame.epoch >= state.epoch, "A2: epochs in one journal only rise");
    const nothing: Step = { state: settle(state, frame), events: [], out: [], outcome: undefined };
    switch (entry.t) {
      case "command": {
        // XState's own transition does not refuse events in a finished snapshot.
        assert(state.snapshot.status === "active", "a finished actor takes no command");
        const running = { ...state.running };
        const moved = move(state, { type: entry.type, body: entry.body } as { type: string }, frame, running, { ...state.timers }, entry.stopped);
        const outcome: Outcome = { ok: true, seq: frame.seq, state: outerState(moved.state.snapshot), result: moved.result ?? {} };
        const seen = remember(state.seen, frame.at_ms, { ...entry, hash: commandHash(entry.type, entry.body) }, outcome, keysMax);
        return { state: { ...moved.state, seen }, events: moved.events, out: moved.out, outcome };
      }
      case "refused": {
        const outcome: Outcome = { ok: false, error: entry.error };
        return { ...nothing, outcome, state: { ...nothing.state, seen: remember(state.seen, frame.at_ms, entry, outcome, keysMax) } };
      }
      case "done":
      case "fail": {
        const id = state.snapshot.status === "active" ? idOf(state.running, entry.inst) : undefined;
        if (id === undefined) return nothing; // S2
        const running = { ...state.running };
        delete running[id];
        const event =
          entry.t === "done"
            ? { type: `xstate.done.actor.${id}`, actorId: id, output: entry.output }
            : { type: `xstate.error.actor.${id}`, actorId: id, error: entry.error };
        // A result is real progress, and nothing else is: it gives the recovery budget back.
        const before = entry.t === "done" ? { ...state, recovery: NO_RECOVERY } : state;
        return { ...move(before, event, frame, running, { ...state.timers }), outcome: undefined };
      }
      case "timer": {
        const id = state.snapshot.status === "active" ? idOf(state.timers, entry.inst) : undefined;
        const timer = id === undefined ? undefined : state.timers[id];
        if (id === undefined || timer === undefined) return nothing;
        const timers = { ...state.timers };
        delete timers[id];
        return { ...move(state, timer.event, frame, { ...state.running }, timers, entry.stopped), outcome: undefined };
      }
      case "progress": {
        const id = state.snapshot.status === "active" ? idOf(state.running, entry.inst) : undefined;
        const effect = id === undefined ? undefined : state.running[id];
        if (id === undefined || effect === undefined) return nothing;
        const running = { ...state.running, [id]: { ...effect, told: entry.told } };
        const event = { type: progressOf(id), told: entry.told };
        if (!state.snapshot.can(event as never)) return { ...nothing, state: { ...nothing.state, running } };
        return { ...move({ ...state, running }, event, frame, running, { ...state.timers }), outcome: undefined };
      }
      case "claim":
        return applyClaim(state, entry, frame);
      case "upgrade":
        assert(entry.to === machineName, `an upgrade leads to a machine this process knows, not ${entry.to}`);
        return nothing;
      default:
        return unreachable(entry, "an entry's tag");
    }
  }

  return {
    definition,
    machine_name: machineName,
    refusal(state, type, body, channel) {
      const view = viewOf(state);
      const finer = definition.refuse?.(view, { channel, type, body });
      if (finer) return finer;
      // XState's own transition does not refuse events in a finished snapshot.
      const takes = !view.final && state.snapshot.can({ type, body } as never);
      return takes
        ? undefined
        : errorBody("illegal_transition", `'${type}' is not possible while the ${definition.kind} is ${view.state}`, { state: view.state, command: type });
    },
    awaits(state, entry) {
      if (state.snapshot.status !== "active") return false;
      if (entry.t === "done" || entry.t === "fail" || entry.t === "progress") return idOf(state.running, entry.inst) !== undefined;
      if (entry.t === "timer") return idOf(state.timers, entry.inst) !== undefined;
      return true;
    },
    apply,
    save(state) {
      const persisted = machine.getPersistedSnapshot({ ...(state.snapshot as object), children: {} } as never) as unknown as {
        value: Json;
        context: Json;
        status: string;
        output?: Json;
        error?: Json;
        historyValue?: Json;
      };
      const children = Object.entries(state.snapshot.children as Record<string, { src?: unknown } | undefined>).filter(([, child]) => child !== undefined);
      return {
        machine: machineName,
        actor: state.actor,
        seq: state.seq,
        at_ms: state.at_ms,
        epoch: state.epoch,
        value: persisted.value,
        context: persisted.context,
        status: persisted.status,
        output: persisted.output ?? null,
        error: persisted.error ?? null,
        history: persisted.historyValue ?? {},
        children: Object.fromEntries(children.map(([id, child]) => [id, String(child?.src)])),
        running: state.running,
        timers: state.timers,
        seen: state.seen,
        created_hash: state.created_hash,
        recovery: state.recovery,
      };
    },
    load(saved) {
      assert(saved.machine === machineName, `a snapshot is read by the machine that wrote it: ${saved.machine}, not ${machineName}`);
      const children = Object.fromEntries(
        Object.entries(saved.children).map(([id, src]) => [id, { src, syncSnapshot: false, snapshot: { status: "active" } }]),
      );
      const resting = {
        status: saved.status,
        output: saved.output ?? undefined,
        error: saved.error ?? undefined,
        value: saved.value,
        context: saved.context,
        historyValue: saved.history,
        children,
      };
      const [snapshot] = withActions((scope) => asSnapshot(machine.restoreSnapshot(resting as never, scope as never)));
      const { actor, seq, at_ms, epoch, running, timers, seen, created_hash, recovery } = saved;
      return { actor, seq, at_ms, epoch, snapshot, running, timers, seen, created_hash, recovery };
    },
  };
}
