// cell: one resident actor: its mailbox, its state, and the loop that takes one to the other.
//
//   mailbox ──▶ decide ──▶ pure steps ──▶ mark debt ──▶ ONE append ──▶ publish out ──▶ reply ──▶ acknowledge ──▶ effects, timers
//                 │                          │
//                 └─ refused / repeated      ├─ committed    go on
//                                            ├─ superseded   ask who owns the shard: mine → reload and decide again; lost → stop
//                                            └─ unavailable  the same append again, until it is known
//
// One step at a time, in mailbox order; several entries share an append when the mailbox is full.
//
// Invariants:
//   C1. Nothing is acknowledged, answered, published or begun before the append that makes it durable (A1).
//   C2. Every append carries the sequence of the journal's last message: only one owner's can succeed (A2).
//   C3. Before anything is acknowledged, answered or begun of an append that leaves something owing (effects, timers, outgoing messages), the
//       actor's resident mark is durable; before the append itself, unless the command that caused it would come again.
//   C4. An item of the mailbox leaves it decided, or stays unacknowledged; none is dropped.
//   C5. An actor that had effects in flight under another owner is claimed before anything else happens to it.
//   C6. A stored command that cannot be judged now waits, and no other of the actor's commands passes it; news of effects and timers does.
//   C7. The schedule of an actor in TIMERS is compared and set, and never over that of a later owner: what a former owner asked late does
//       not put his hour over the hour of who has the actor now.
//   C8. A stored command whose decision stands in no journal is settled with the broker before it is answered, and before the actor takes what was said
//       after it: if it came again it would be decided anew, or taken for a repeat of what it never was.
import { BusUnavailable } from "../bus/fence.ts";
import type { AppendOutcome, Bus } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import type { Command } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, parseActorPath } from "../protocol/ids.ts";
import type { ActorEvent, CommandSource, Entry, JournalMessage, OutMessage } from "../protocol/journal.ts";
import { encodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import {
  APPEND_BYTES_TARGET,
  APPEND_ENTRIES_MAX,
  PAYLOAD_BYTES_MAX,
  SNAPSHOT_ENTRIES_MAX,
  SNAPSHOT_EVERY_ENTRIES,
  SNAPSHOT_EVERY_MS,
  TIMER_IN_PROCESS_MS,
} from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject, timerSubject } from "../protocol/subjects.ts";
import { pause, timestamp, type World } from "../protocol/world.ts";
import type { ActorView } from "../state-machines/definition.ts";
import { type ActorState, commandHash, type Core, outerState, recognise, type Outcome, type Running, viewOf } from "../state-machines/step.ts";
import { createEffectRunner, type EffectRunner } from "./effect-runner.ts";
import type { EntryCache } from "./entry-cache.ts";
import type { EffectScope, Performers } from "./performer.ts";
import { type CommitHead, encodeSnapshot, type Restored, type Restorer } from "./restore.ts";
import { createTokenWriter } from "./token-writer.ts";

/** `after_sequence`: where in EVENTS the actor's journal ended before the commit that decided it; absent for what was decided before. */
export type Decide = (outcome: Outcome, after_sequence?: number) => void;

/**
 * Of a stored command: sees to it that it never comes again. False: it may, and everything after it too, in its order; what waits of the inbox has been
 * forgotten then.
 */
export type Settle = () => Promise<boolean>;

/** What the mailbox holds: a command or its refusal at the door, or news of the actor's own effects and timers. */
export type MailItem =
  | {
      readonly kind: "command";
      readonly command: Command;
      readonly source?: CommandSource;
      /** Its tenant has more waiting than it may: unless it was decided before, it is refused with this, in its turn. */
      readonly overloaded?: ErrorBody;
      /** Told exactly once when the command has been decided and that is durable. */
      readonly decided: Decide;
      /** Told instead, when nobody stored it and it cannot be judged now, or comes too late. */
      readonly given_up?: () => void;
      /** Its durable twin was refused before it: what its sender was told stands. */
      readonly late?: () => boolean;
      readonly settle?: Settle;
    }
  | {
      readonly kind: "refused";
      readonly error: ErrorBody;
      readonly type: string;
      readonly channel: Command["channel"];
      readonly principal?: string;
      readonly source?: CommandSource;
      readonly decided: Decide;
      readonly settle?: Settle;
    }
  | { readonly kind: "entry"; readonly entry: Extract<Entry, { t: "done" | "fail" | "timer" | "claim" | "progress" }> };

export interface CellObserver {
  committed?(entries: number, ms: number): void;
  decided?(outcome: Outcome, type: string): void;
  /** How long a command lay in the mailbox before it was taken out to be decided. */
  waited?(ms: number): void;
  effect?(what: "started" | "done" | "failed" | "aborted", src: string): void;
  /** A model call of this actor said its first word. */
  first_token?(actor: ActorAddress): void;
  events?(actor: ActorAddress, events: readonly ActorEvent[]): void;
}

/** What a cell needs of the process it lives in. */
export interface CellDeps {
  readonly actor: ActorAddress;
  readonly core: Core;
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly restorer: Restorer;
  readonly performers: Performers;
  readonly entries: EntryCache;
  readonly worker: string;
  /** The epoch of the ownership this process acts under. */
  readonly epoch: number;
  readonly next_commit_id: () => string;
  /** By the owner's own clock: is its lease still good? Asked before each append and each start of an effect. */
  may_act(): boolean;
  /** While the shard is leaving: steps go on, new effects begin at the next owner. */
  holding(): boolean;
  /** A fence refused us, or the journal knows a later owner. Asks who owns the actor now, from the leader. */
  conflict(): Promise<"mine" | "lost">;
  /** A command that the actor's own state cannot judge: is the tenant active, does the agent exist? Rejects when that cannot be known now. */
  admit?(command: Command, view: ActorView | undefined): Promise<ErrorBody | undefined>;
  /** Makes the actor's debt durable before it exists; undefined for actors outside the shards. */
  mark?(): Promise<void>;
  /** Its mark is on its way out: what owes must wait until that is over. */
  unmarking?(): boolean;
  /** What a lost attempt may have cost, for effects that cost money; the machine's recovery budget counts it. Rejects when it cannot be known. */
  readonly assume_cost?: (effect: Running, scope: EffectScope) => Promise<number | undefined>;
  /**
   * An actor that lost its worker more than once is suspected to be why. Resolves when it may begin its effects, one suspect at a time in
   * this process; the answer is called when it has shown that it does no harm, or has left.
   */
  readonly quarantine?: (tries: number) => Promise<() => void>;
  /** Why the previous owner is not ours: stands in the claim. */
  readonly claim_reason: string;
  /** The actor as it was restored beforehand, if it was; asked once. */
  readonly warm?: () => Restored | undefined;
  /** Told when an actor with work in flight goes on here. */
  resumed?(resumed: { actor: ActorAddress; entries: number; replay_ms: number }): void;
  observer?: CellObserver;
}

export type CellPhase = "loading" | "active" | "stopped";

/** Refusals an actor journals in a burst, and then per second: enough for an audit, too few to fill a disk. */
const REFUSED_BURST = 20;
const REFUSED_PER_S = 1;
/** While the lease is not good, it is looked at this often. */
const PERMISSION_POLL_MS = 50;
/** Waits between repeats of what the bus could not take; the last one repeats. */
const RETRY_MS = [20, 50, 100, 250, 500, 1000] as const;

/** Tries to judge a command until its waiting is told again: about a minute. */
const UNJUDGED_TOLD_EVERY = 60;

/** From this many lost attempts in a row on, an actor is a suspect. Two: the first loss is anybody's, the second a coincidence at most. */
const SUSPECT_TRIES = 2;
/** A suspect whose effects run this long without harm lets the next one begin. Poison acts at once, as a rule. */
const SUSPECT_SURVIVES_MS = 3_000;

interface Decided {
  readonly item: MailItem;
  readonly outcome: Outcome | undefined;
  /** By an entry of this commit, and not by one before. */
  readonly journaled: boolean;
}

export class ActorCell {
  readonly #deps: CellDeps;
  readonly #effects: EffectRunner;
  readonly #mailbox: MailItem[] = [];
  readonly #arrived_ms = new WeakMap<MailItem, number>();
  readonly #clocks = new Map<string, () => void>();
  #phase: CellPhase = "loading";
  #state: ActorState | undefined;
  #last_sequence = 0;
  #head: CommitHead | undefined;
  #snapshot_seq = 0;
  #snapshot_bytes = 0;
  /** Under way; at most one. */
  #snapshot_writing: Promise<void> | undefined;
  /** Appended since the last snapshot. */
  #journal_bytes = 0;
  #snapshot_at_ms: number;
  #running_loop: Promise<void> | undefined;
  #needs_load = true;
  #touched_at_ms: number;
  #refused_tokens = REFUSED_BURST;
  #refused_at_ms: number;
  #trace: string | undefined;
  #armed_due_ms: number | undefined;
  readonly #journal_read = Promise.withResolvers<void>();
  /** Of our schedule in TIMERS, as far as we know; undefined when it must be read. */
  #armed_sequence: number | undefined;
  readonly #unanswered = new Set<(outcome: Outcome) => void>();
  /** How often in a row the first command could not be judged; while it waits for the next time, only news is taken (C6). */
  #unjudged = 0;
  #commands_wait = false;
  /** Its effects may not begin yet: it is suspected of ending the processes it runs in. */
  #quarantined = false;
  #leaveQuarantine: (() => void) | undefined;

  constructor(deps: CellDeps) {
    this.#deps = deps;
    this.#touched_at_ms = deps.world.monotonic_ms();
    this.#refused_at_ms = this.#touched_at_ms;
    this.#snapshot_at_ms = this.#touched_at_ms;
    this.#effects = createEffectRunner({
      performers: deps.performers,
      log: deps.log,
      post: (entry) => this.push({ kind: "entry", entry }),
      observe: (what, src) => deps.observer?.effect?.(what, src),
      scope: (effect, signal, so_far) => this.#scopeOf(effect, signal, so_far),
    });
  }

  #scopeOf(effect: Running, signal: AbortSignal, so_far: EffectScope["so_far"] = () => undefined): EffectScope {
    const { actor, bus, world, log, epoch, observer } = this.#deps;
    const waited = effect.told?.["wait"];
    return {
      actor,
      inst: effect.inst,
      attempt: effect.attempt,
      ...(waited === undefined || waited === null ? {} : { waited: waited as JsonObject }),
      epoch,
      idempotency_key: `${actorPath(actor)}/${effect.inst}`,
      signal,
      permitted: async () => (await this.#permitted()) && !signal.aborted,
      trace: this.#trace,
      entries: (seqs) => this.#entriesOf(seqs, signal),
      progress: (told) => {
        if (!signal.aborted) this.push({ kind: "entry", entry: { t: "progress", inst: effect.inst, told } });
      },
      so_far,
      tokens: (place) =>
        createTokenWriter(actor, { ...place, attempt: effect.attempt, epoch }, { bus, world, log, on_first: () => observer?.first_token?.(actor) }),
    };
  }

  /** Waits for a bus that is away: a turn does not fail because a broker was restarted while its prompt was read. */
  async #entriesOf(seqs: readonly number[], signal: AbortSignal): Promise<ReadonlyMap<number, Entry>> {
    for (let tries = 0; ; tries++) {
      try {
        return await this.#deps.entries.get(this.actor, seqs);
      } catch (error) {
        if (!(error instanceof BusUnavailable) || signal.aborted || this.#stopped()) throw error;
        await this.#backOff(tries);
      }
    }
  }

  get actor(): ActorAddress {
    return this.#deps.actor;
  }
  get phase(): CellPhase {
    return this.#phase;
  }
  /** Effects that are working right now. */
  get working(): number {
    return this.#effects.working();
  }
  get state(): ActorState | undefined {
    return this.#state;
  }
  /** Nothing waits, nothing runs, the loop rests. */
  get idle(): boolean {
    return this.#running_loop === undefined && this.#mailbox.length === 0 && this.#effects.live().size === 0;
  }
  /** For how long nothing has been put in. */
  idle_ms(): number {
    return this.#deps.world.monotonic_ms() - this.#touched_at_ms;
  }

  push(item: MailItem): void {
    if (this.#phase === "stopped") return; // unacknowledged: it comes again to whoever owns the actor then (C4)
    this.#touched_at_ms = this.#deps.world.monotonic_ms();
    if (item.kind === "command") this.#arrived_ms.set(item, this.#touched_at_ms);
    this.#mailbox.push(item);
    this.#wake();
  }

  /** Restores the actor now, so that what it owes goes on. Resolves when that is done or the cell stopped. */
  async load(): Promise<void> {
    this.#wake();
    await this.#running_loop;
  }

  /** Restores the actor now. Resolves when its journal has been read or the cell stopped: its claim may still be on its way. */
  async read(): Promise<void> {
    this.#wake();
    await this.#journal_read.promise;
  }

  /** A command from within this process, for actors whose host says their commands itself. */
  command(command: { type: string; body: JsonObject; key?: string }): Promise<Outcome> {
    if (this.#phase === "stopped") return Promise.resolve({ ok: false, error: errorBody("unavailable", "the actor has left this process") });
    return new Promise((resolve) => {
      const decided = (outcome: Outcome): void => {
        this.#unanswered.delete(decided);
        resolve(outcome);
      };
      this.#unanswered.add(decided);
      this.push({ kind: "command", command: { channel: "control", ...command }, decided });
    });
  }

  /** The inbox begins again from its first unacknowledged message: what waits here of it will come again. */
  forget_commands(): void {
    const kept = this.#mailbox.filter((item) => item.kind === "entry" || item.source === undefined);
    this.#mailbox.splice(0, this.#mailbox.length, ...kept);
  }

  /** Ends everything at once. Nothing more is appended, answered or acknowledged. */
  stop(): void {
    this.#phase = "stopped";
    this.#journal_read.resolve();
    this.#endQuarantine();
    this.#effects.stop();
    this.#stopClocks();
    this.#mailbox.length = 0;
    for (const tell of this.#unanswered) tell({ ok: false, error: errorBody("unavailable", "the actor left this process before it decided") });
    this.#unanswered.clear();
  }

  #stopClocks(): void {
    for (const cancel of this.#clocks.values()) cancel();
    this.#clocks.clear();
  }

  /** Resolves when the present run of the loop has ended. */
  async settled(): Promise<void> {
    await this.#running_loop;
  }

  #wake(): void {
    if (this.#running_loop !== undefined || this.#phase === "stopped") return;
    if (!this.#hasWork() && !this.#needs_load) return;
    this.#running_loop = this.#run()
      .catch((error: unknown) => {
        this.#deps.log.error("actor loop broke; the actor starts over from its journal", { actor: actorPath(this.actor), ...errorFields(error) });
        this.#needs_load = true;
        // The claim that follows calls them lost, and some of them may have been stopped for an entry that is not there.
        this.#effects.reconcile({}, true);
      })
      .finally(() => {
        this.#running_loop = undefined;
        // A broken loop waits before it tries again: its journal may be what breaks it.
        if (this.#needs_load && this.#phase !== "stopped") void this.#deps.world.after(1000, () => this.#wake());
        else this.#wake();
      });
  }

  async #run(): Promise<void> {
    while (this.#phase !== "stopped" && (this.#needs_load || this.#hasWork())) {
      if (this.#needs_load && !(await this.#restore())) {
        await this.#backOff(0);
        continue;
      }
      if (this.#hasWork()) await this.#turn();
    }
  }

  #hasWork(): boolean {
    return this.#commands_wait ? this.#mailbox.some((item) => item.kind === "entry") : this.#mailbox.length > 0;
  }

  /** The first item that may be taken now. */
  #next(): MailItem | undefined {
    if (!this.#commands_wait) return this.#mailbox.shift();
    const index = this.#mailbox.findIndex((item) => item.kind === "entry");
    return index < 0 ? undefined : this.#mailbox.splice(index, 1)[0];
  }

  /** C6. */
  async #letCommandsWait(error: unknown): Promise<void> {
    if (this.#unjudged % UNJUDGED_TOLD_EVERY === 0)
      this.#deps.log.warn("a command cannot be judged yet, and waits", { actor: actorPath(this.actor), tries: this.#unjudged, ...errorFields(error) });
    this.#commands_wait = true;
    await this.#backOff(this.#unjudged++);
    this.#commands_wait = false;
    this.#wake();
  }

  // ── restoring ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Answers false when the cell stopped meanwhile. */
  async #restore(): Promise<boolean> {
    const { restorer, world, log, actor } = this.#deps;
    const began_ms = world.monotonic_ms();
    let restored: Restored | undefined;
    const warm = this.#deps.warm?.();
    for (let tries = 0; ; tries++) {
      try {
        restored = await restorer.restore(actor, (message) => this.#deps.entries.add(actor, message), warm);
        break;
      } catch (error) {
        if (this.#stopped()) return false;
        log.warn("actor cannot be restored yet", { actor: actorPath(actor), ...errorFields(error) });
        await this.#backOff(tries);
      }
    }
    this.#journal_read.resolve();
    if (this.#stopped()) return false;
    if (restored !== undefined && restored.last.epoch > this.#deps.epoch && (await this.#lost())) return false;
    this.#state = restored?.state;
    this.#last_sequence = restored?.last_sequence ?? 0;
    this.#head = restored?.last;
    this.#snapshot_seq = restored?.snapshot_seq ?? 0;
    this.#armed_due_ms = undefined;
    this.#armed_sequence = undefined;
    this.#phase = "active";
    this.#needs_load = false;
    if (restored === undefined) return true;
    if (restored.last.out.length > 0 && !(await this.#publishOut(restored.last.out))) return false;
    const inFlight = Object.values(restored.state.running);
    if (inFlight.length > 0) {
      if (!(await this.#claim(restored))) return false;
      this.#deps.resumed?.({ actor, entries: restored.entries_replayed, replay_ms: world.monotonic_ms() - began_ms });
    }
    this.#reconcile(this.#holding());
    return !this.#stopped();
  }

  /** C5. Answers false when the cell stopped, or must be loaded again. */
  async #claim(restored: Restored): Promise<boolean> {
    const held = new Set(restored.last.held);
    const effects = Object.values(restored.state.running).filter((effect) => !held.has(effect.inst));
    const assumed = await this.#assumedCosts(effects);
    const entry: Entry = {
      t: "claim",
      from: restored.last.worker,
      reason: this.#deps.claim_reason,
      lost: effects.map((effect) => effect.inst),
      ...(Object.keys(assumed).length === 0 ? {} : { assumed }),
    };
    const folded = this.#fold(restored.state, entry, this.#stamp(restored.state));
    const { tries } = folded.state.recovery;
    const suspect = this.#deps.quarantine !== undefined && tries >= SUSPECT_TRIES && Object.keys(folded.state.running).length > 0;
    this.#quarantined = suspect;
    const outcome = await this.#commit([folded], []);
    if (outcome === "committed" && suspect) this.#enterQuarantine(tries);
    return outcome === "committed";
  }

  async #assumedCosts(effects: readonly Running[]): Promise<Record<string, number>> {
    const costs: Record<string, number> = {};
    for (const effect of effects) {
      try {
        const cost = await this.#deps.assume_cost?.(effect, this.#scopeOf(effect, new AbortController().signal));
        if (cost !== undefined) costs[effect.inst] = cost;
      } catch (error) {
        this.#deps.log.warn("what a lost attempt may have cost is not known", { actor: actorPath(this.actor), inst: effect.inst, ...errorFields(error) });
      }
    }
    return costs;
  }

  /** The claim said that nothing of it has begun (`held`); another one says when it may. */
  #enterQuarantine(tries: number): void {
    const { quarantine, world, worker } = this.#deps;
    void quarantine?.(tries).then((leave) => {
      if (this.#stopped()) {
        leave();
        return;
      }
      this.#leaveQuarantine = leave;
      this.#quarantined = false;
      this.push({ kind: "entry", entry: { t: "claim", from: worker, reason: "its quarantine ended", lost: [] } });
      void world.after(SUSPECT_SURVIVES_MS, () => this.#endQuarantine());
    });
  }

  #endQuarantine(): void {
    this.#leaveQuarantine?.();
    this.#leaveQuarantine = undefined;
  }

  // ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Takes from the mailbox what fits one append, steps through it, commits, and lets the world know. */
  async #turn(): Promise<void> {
    const taken: MailItem[] = [];
    const decided: Decided[] = [];
    const folds: Fold[] = [];
    let state = this.#state;
    const at_ms = this.#stamp(state);
    let bytes = 0;
    while (folds.length < APPEND_ENTRIES_MAX && bytes < APPEND_BYTES_TARGET) {
      const item = this.#next();
      if (item === undefined) break;
      const arrived_ms = this.#arrived_ms.get(item);
      const taken_ms = this.#deps.world.monotonic_ms();
      const verdict = await this.#decide(item, state);
      if (this.#stopped()) return;
      if (verdict === "unknown") continue;
      if (item.kind !== "entry" && item.settle !== undefined && verdict.entry === undefined && verdict.journaled !== true) {
        // C8
        if (folds.length > 0) {
          this.#mailbox.unshift(item); // first the ones before it
          break;
        }
        if (await item.settle()) this.#tell([{ item, outcome: verdict.outcome, journaled: false }]);
        if (this.#stopped()) return;
        continue;
      }
      if (arrived_ms !== undefined) this.#deps.observer?.waited?.(taken_ms - arrived_ms);
      taken.push(item);
      if (verdict.entry !== undefined) {
        const fold = this.#foldSafely(state, verdict.entry, at_ms);
        folds.push(fold);
        state = fold.state;
        bytes += fold.bytes;
        decided.push({ item, outcome: fold.outcome, journaled: true });
      } else decided.push({ item, outcome: verdict.outcome, journaled: false });
    }
    if (folds.length === 0) {
      this.#tell(decided);
      return;
    }
    await this.#commit(folds, taken, decided);
  }

  /**
   * What becomes of one item: an entry to append, or only an answer, or (for stale news) nothing. `journaled`: the answer is that of an entry before.
   * `unknown`: it has been put where it belongs.
   */
  async #decide(item: MailItem, state: ActorState | undefined): Promise<{ entry?: Entry; outcome?: Outcome; journaled?: boolean } | "unknown"> {
    const { core, actor } = this.#deps;
    if (item.kind === "entry") {
      const wanted = state !== undefined && core.awaits(state, item.entry) && (item.entry.t !== "claim" || Object.keys(state.running).length > 0);
      return wanted ? { entry: item.entry } : {};
    }
    const no = (error: ErrorBody): { outcome: Outcome } => ({ outcome: { ok: false, error } });
    if (item.kind === "refused") {
      if (state === undefined) return no(item.error);
      const hash = commandHash(item.type, { error: item.error.message });
      // The same message again: its refusal stands in the journal.
      if (recognise(state, { channel: item.channel, source: item.source, type: item.type, hash }).kind === "repeat")
        return { ...no(item.error), journaled: true };
      if (!this.#mayJournalRefusal()) return no(item.error);
      const { type, error, channel, source, principal } = item;
      const who = principal === undefined ? {} : { principal };
      return { entry: { t: "refused", type, hash, error, channel, ...(source === undefined ? {} : { source }), ...who } };
    }
    const { command, source } = item;
    const identity = {
      channel: command.channel,
      ...(command.key === undefined ? {} : { key: command.key }),
      ...(source === undefined ? {} : { source }),
      ...(command.trace === undefined ? {} : { trace: command.trace }),
      ...(command.principal === undefined ? {} : { principal: command.principal }),
    };
    const hash = commandHash(command.type, command.body);
    if (state !== undefined) {
      const known = recognise(state, { ...identity, type: command.type, hash });
      if (known.kind === "conflict") return no(known.error);
      if (known.kind === "repeat")
        return { outcome: known.outcome ?? { ok: true, seq: state.seq, state: outerState(state.snapshot), result: { repeated: true } }, journaled: true };
    }
    if (item.late?.() === true) {
      item.given_up?.();
      return "unknown";
    }
    let refused = item.overloaded;
    try {
      refused ??= await this.#deps.admit?.(command, state === undefined ? undefined : viewOf(state));
    } catch (error) {
      // What came on the fast lane is stored nowhere: its sender makes it durable when he hears nothing, and it waits then.
      if (source === undefined) {
        item.given_up?.();
        return "unknown";
      }
      this.#mailbox.unshift(item);
      void this.#letCommandsWait(error);
      return "unknown";
    }
    this.#unjudged = 0;
    if (refused !== undefined && state !== undefined && this.#mayJournalRefusal())
      return { entry: { t: "refused", type: command.type, hash, error: refused, ...identity } };
    if (refused !== undefined) return no(refused);
    if (state === undefined) {
      if (command.type !== core.definition.creates) return no(errorBody("not_found", `there is no ${actor.kind} '${actor.id}'`));
      return { entry: { t: "init", type: command.type, body: command.body, ...identity } };
    }
    // A kind may take its creating command again later (a worker that died joins again); else it is a repeat or a conflict.
    if (command.type === core.definition.creates && core.refusal(state, command.type, command.body, command.channel) !== undefined) {
      if (hash === state.created_hash) return { outcome: { ok: true, seq: state.seq, state: outerState(state.snapshot), result: { created: false } } };
      return no(errorBody("conflict", `the ${actor.kind} '${actor.id}' exists with another body`));
    }
    const refusal = core.refusal(state, command.type, command.body, command.channel);
    if (refusal === undefined) return { entry: { t: "command", type: command.type, body: command.body, ...identity } };
    if (!this.#mayJournalRefusal()) return no(refusal);
    return { entry: { t: "refused", type: command.type, hash, error: refusal, ...identity } };
  }

  #mayJournalRefusal(): boolean {
    const now_ms = this.#deps.world.monotonic_ms();
    this.#refused_tokens = Math.min(REFUSED_BURST, this.#refused_tokens + ((now_ms - this.#refused_at_ms) / 1000) * REFUSED_PER_S);
    this.#refused_at_ms = now_ms;
    if (this.#refused_tokens < 1) return false;
    this.#refused_tokens -= 1;
    return true;
  }

  /** The one clock an actor sees, the same for all entries of a commit: never before the last one's, whatever the computer's clock does. */
  #stamp(state: ActorState | undefined): number {
    return Math.max(Math.trunc(this.#deps.world.now_ms()), state?.at_ms ?? 0);
  }

  #fold(state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
    const { core, actor, epoch, worker } = this.#deps;
    const step = core.apply(state, actor, entry, { seq: (state?.seq ?? 0) + 1, at_ms, epoch, worker });
    const bytes = JSON.stringify(entry).length + JSON.stringify(step.events).length;
    return { entry, state: step.state, events: step.events, out: step.out, outcome: step.outcome, at_ms, bytes };
  }

  /** An entry that stops effects bears what they came to: they are ended now, and the step is taken with that (E4). */
  #foldStopping(state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
    const fold = this.#fold(state, entry, at_ms);
    if (state === undefined || (entry.t !== "command" && entry.t !== "timer")) return fold;
    const left = new Set(Object.values(fold.state.running).map(({ inst }) => inst));
    const stopped: Record<string, JsonObject> = {};
    for (const { inst } of Object.values(state.running)) {
      const told = left.has(inst) ? undefined : this.#effects.end(inst);
      if (told !== undefined) stopped[inst] = told;
    }
    return Object.keys(stopped).length === 0 ? fold : this.#fold(state, { ...entry, stopped }, at_ms);
  }

  /** A step that throws is a bug of a machine: the actor hears a failure instead, and goes on. */
  #foldSafely(state: ActorState | undefined, entry: Entry, at_ms: number): Fold {
    try {
      const fold = this.#foldStopping(state, entry, at_ms);
      if (fold.bytes <= PAYLOAD_BYTES_MAX - APPEND_BYTES_TARGET || entry.t !== "done") return fold;
      return this.#fold(
        state,
        { t: "fail", inst: entry.inst, error: { code: "too_large", message: `the result is larger than a journal takes (${fold.bytes} bytes)` } },
        at_ms,
      );
    } catch (error) {
      this.#deps.log.error("a machine broke on an entry", { actor: actorPath(this.actor), entry: entry.t, ...errorFields(error) });
      const internal = errorBody("internal", "the actor could not take this");
      if (entry.t === "done") return this.#fold(state, { t: "fail", inst: entry.inst, error: internal }, at_ms);
      if (entry.t === "command" && state !== undefined) {
        const { t: _, body, stopped: __, ...identity } = entry;
        return this.#fold(state, { t: "refused", hash: commandHash(entry.type, body), error: internal, ...identity }, at_ms);
      }
      throw error;
    }
  }

  // ── committing ───────────────────────────────────────────────────────────────────────────────────────────────────

  async #commit(folds: readonly Fold[], taken: readonly MailItem[], decided: readonly Decided[] = []): Promise<"committed" | "again" | "stopped"> {
    const { bus, world, core, actor, epoch, worker, observer } = this.#deps;
    const began_ms = world.monotonic_ms();
    const last = folds.at(-1);
    assert(last !== undefined, "a commit has entries");
    const { state } = last;
    const hold = this.#holding();
    const live = this.#effects.live();
    const held = hold ? Object.values(state.running).flatMap((effect) => (live.has(effect.inst) ? [] : [effect.inst])) : [];
    const out = folds.flatMap((fold) => fold.out);
    for (const message of out)
      assert(message.to.startsWith(`${actor.tenant}/`) || message.to.startsWith("system/"), "A4: no message leaves with another tenant");
    const message: JournalMessage = {
      v: 1,
      actor,
      seq: state.seq,
      epoch,
      worker,
      machine: core.machine_name,
      at: timestamp(last.at_ms),
      entries: folds.map((fold) => fold.entry),
      state: outerState(state.snapshot),
      events: folds.flatMap((fold) => fold.events),
      out,
      out_confirmed_seq: this.#head?.seq ?? 0,
      ...(held.length === 0 ? {} : { held }),
    };
    const owes = Object.keys(state.running).length > 0 || Object.keys(state.timers).length > 0 || out.length > 0;
    // C3. A command that comes again when this process dies between the two brings its actor back as well as the mark would: they need not wait for
    // each other, only the world for both.
    const comes_again = decided.some(({ item, journaled }) => journaled && item.kind === "command" && (item.source ?? item.command.key) !== undefined);
    const marked = owes ? this.#deps.mark?.() : undefined;
    if (!comes_again || this.#deps.unmarking?.() === true) await marked;
    const data = encodeJournal(message);
    const after_sequence = this.#last_sequence;
    const [outcome] = await Promise.all([this.#append(data), marked]);
    if (outcome === undefined) return "stopped";
    if (outcome.kind === "superseded") {
      this.#mailbox.unshift(...taken); // C4: decided anew against the journal as it is
      this.#effects.reconcile({}, true);
      this.#stopClocks();
      this.#needs_load = true;
      return (await this.#lost()) ? "stopped" : "again";
    }
    this.#state = state;
    this.#journal_bytes += data.byteLength;
    this.#last_sequence = outcome.sequence;
    this.#head = { seq: message.seq, epoch, worker, at: message.at, out, held };
    const trace = folds.findLast((fold) => "trace" in fold.entry && fold.entry.trace !== undefined)?.entry;
    if (trace !== undefined && "trace" in trace) this.#trace = trace.trace;
    this.#deps.entries.add(actor, message);
    observer?.committed?.(folds.length, world.monotonic_ms() - began_ms);
    observer?.events?.(actor, message.events);
    // What begins waits for nothing but the journal; what is said of it waits for its messages.
    this.#reconcile(hold);
    if (out.length > 0 && !(await this.#publishOut(out))) return "stopped";
    this.#tell(decided, after_sequence);
    if (Object.keys(state.running).length === 0) this.#endQuarantine();
    this.#maybeSnapshot(bus); // not awaited: the next commit owes it nothing
    return "committed";
  }

  /** C2. The same append until its fate is known; undefined when the cell stopped or may no longer act. */
  async #append(data: Uint8Array): Promise<Exclude<AppendOutcome, { kind: "unavailable" }> | undefined> {
    const { bus, actor, next_commit_id } = this.#deps;
    const append = { subject: actorSubject(actor, "event"), data, expected_last_sequence: this.#last_sequence, commit_id: next_commit_id() };
    for (let tries = 0; ; tries++) {
      if (!(await this.#permitted())) return undefined;
      const outcome = await bus.append(append);
      if (this.#stopped()) return undefined;
      if (outcome.kind !== "unavailable") return outcome;
      await this.#backOff(tries);
    }
  }

  /** Publishes outgoing messages in order; their ids make repeats harmless. Answers false when the cell stopped. */
  async #publishOut(out: readonly OutMessage[]): Promise<boolean> {
    const { bus, actor } = this.#deps;
    for (const message of out) {
      const target = parseActorPath(message.to);
      assert(target !== undefined, "an outgoing message names an actor");
      const data = new TextEncoder().encode(JSON.stringify({ type: message.type, body: message.body }));
      for (let tries = 0; ; tries++) {
        if (!(await this.#permitted())) return false;
        const outcome = await bus.publish(actorSubject(target, "control"), data, { headers: { "Idempotency-Key": `${actorPath(actor)}#${message.id}` } });
        if (outcome.kind === "stored") break;
        await this.#backOff(tries);
      }
    }
    return true;
  }

  #tell(decided: readonly Decided[], after_sequence?: number): void {
    for (const { item, outcome, journaled } of decided) {
      if (item.kind === "entry") continue;
      assert(outcome !== undefined, "every command is decided to an outcome");
      this.#deps.observer?.decided?.(outcome, item.kind === "command" ? item.command.type : item.type);
      item.decided(outcome, journaled ? after_sequence : undefined);
    }
  }

  #reconcile(hold: boolean): void {
    const { state } = this;
    if (state === undefined || this.#stopped() || this.#needs_load) return;
    const permitted = this.#deps.may_act();
    this.#effects.reconcile(state.running, hold || !permitted);
    this.#reconcileTimers(state);
    // Held up by an outage, not by leaving: what the state names begins as soon as the lease is good again.
    if (!permitted && !hold) void this.#deps.world.after(PERMISSION_POLL_MS, () => this.#reconcile(this.#holding()));
  }

  #reconcileTimers(state: ActorState): void {
    const { world } = this.#deps;
    const wanted = new Map(Object.values(state.timers).map((timer) => [timer.inst, timer]));
    for (const [inst, cancel] of this.#clocks) {
      if (wanted.has(inst)) continue;
      this.#clocks.delete(inst);
      cancel();
    }
    for (const [inst, timer] of wanted) {
      if (this.#clocks.has(inst)) continue;
      const delay_ms = Math.max(0, timer.due_ms - world.now_ms());
      // A far one is armed in TIMERS once the actor is quiet; while its effects run it is not quiet, and the process keeps the time.
      if (delay_ms > TIMER_IN_PROCESS_MS && Object.keys(state.running).length === 0) continue;
      this.#clocks.set(
        inst,
        world.after(delay_ms, () => {
          this.#clocks.delete(inst);
          this.push({ kind: "entry", entry: { t: "timer", inst } });
        }),
      );
    }
  }

  /** The actor's schedule in TIMERS came due: fires what is due by now. */
  due(): void {
    this.#armed_due_ms = undefined;
    this.#armed_sequence = undefined;
    const now_ms = this.#deps.world.now_ms();
    for (const timer of Object.values(this.#state?.timers ?? {}))
      if (timer.due_ms <= now_ms && !this.#clocks.has(timer.inst)) this.push({ kind: "entry", entry: { t: "timer", inst: timer.inst } });
    this.#touched_at_ms = this.#deps.world.monotonic_ms();
    this.#wake();
  }

  // ── resting ──────────────────────────────────────────────────────────────────────────────────────────────────────

  /**
   * Settles what an idle actor owes: its earliest timer is armed in TIMERS, its snapshot is written.
   * Answers true when nothing is owed any more, so that its resident mark may go and it may leave memory.
   */
  async rest(): Promise<boolean> {
    if (!this.idle || this.#needs_load || this.#stopped()) return false;
    const { bus } = this.#deps;
    const seq = this.#state?.seq ?? 0;
    const dues = Object.values(this.#state?.timers ?? {}).map((timer) => timer.due_ms);
    if (dues.length > 0) {
      const due_ms = Math.min(...dues);
      if (due_ms !== this.#armed_due_ms && !(await this.#arm(due_ms))) return false;
    }
    await this.#snapshot_writing;
    this.#maybeSnapshot(bus);
    await this.#snapshot_writing;
    return this.idle && !this.#stopped() && (this.#state?.seq ?? 0) === seq && Object.keys(this.#state?.running ?? {}).length === 0;
  }

  /** C7 */
  async #arm(due_ms: number): Promise<boolean> {
    const { bus, actor, epoch, log } = this.#deps;
    try {
      if (this.#armed_sequence === undefined) {
        const stored = await bus.last("TIMERS", timerSubject(actor));
        if (stored !== undefined && armedEpoch(stored.data) > epoch) return false;
        this.#armed_sequence = stored?.sequence ?? 0;
      }
    } catch (error) {
      log.debug("the schedule of an actor cannot be read yet", { actor: actorPath(actor), ...errorFields(error) });
      return false;
    }
    const armed = await bus.schedule(actor, due_ms, new TextEncoder().encode(JSON.stringify({ due: timestamp(due_ms), epoch })), this.#armed_sequence);
    this.#armed_sequence = armed.kind === "stored" ? armed.sequence : undefined;
    if (armed.kind === "stored") this.#armed_due_ms = due_ms;
    return armed.kind === "stored";
  }

  /**
   * A snapshot is taken only when every outgoing message up to it is published, which #commit has awaited. It is written beside the commits that
   * follow, one at a time: an actor that commits without pause (a budget) would keep one in sixty of its callers waiting for a second fsync.
   */
  #maybeSnapshot(bus: Bus): void {
    const state = this.#state;
    const head = this.#head;
    if (state === undefined || head === undefined || this.#snapshot_writing !== undefined) return;
    const { world, core } = this.#deps;
    const entries = state.seq - this.#snapshot_seq;
    const old = world.monotonic_ms() - this.#snapshot_at_ms >= SNAPSHOT_EVERY_MS;
    // A large snapshot is written seldom: what is written of snapshots stays below what is written of the journal.
    const worth = entries >= SNAPSHOT_EVERY_ENTRIES && (this.#journal_bytes >= this.#snapshot_bytes || entries >= SNAPSHOT_ENTRIES_MAX);
    if (entries === 0 || (!worth && !old)) return;
    const data = encodeSnapshot(core, state, this.#last_sequence, head);
    this.#snapshot_bytes = data.byteLength;
    this.#journal_bytes = 0;
    this.#snapshot_seq = state.seq;
    this.#snapshot_at_ms = world.monotonic_ms();
    this.#snapshot_writing = this.#writeSnapshot(bus, data).finally(() => (this.#snapshot_writing = undefined));
  }

  async #writeSnapshot(bus: Bus, data: Uint8Array): Promise<void> {
    const { actor, log } = this.#deps;
    const outcome = await bus.publish(actorSubject(actor, "snapshot"), data);
    if (outcome.kind !== "stored")
      log.warn("snapshot not stored; the journal is replayed from the one before", { actor: actorPath(actor), outcome: outcome.kind });
  }

  #holding(): boolean {
    return this.#quarantined || this.#deps.holding();
  }

  #stopped(): boolean {
    return this.#phase === "stopped";
  }

  /** Waits while the lease is not good by our own clock; answers false when the cell stopped instead. */
  async #permitted(): Promise<boolean> {
    while (!this.#stopped() && !this.#deps.may_act()) await pause(this.#deps.world, PERMISSION_POLL_MS);
    return !this.#stopped();
  }

  /** Who owns us now? Stops when it is somebody else. */
  async #lost(): Promise<boolean> {
    if (this.#stopped()) return true;
    const verdict = await this.#deps.conflict();
    if (verdict === "lost") this.stop();
    return this.#stopped();
  }

  #backOff(tries: number): Promise<void> {
    const { world } = this.#deps;
    return pause(world, RETRY_MS[Math.min(tries, RETRY_MS.length - 1)]! * (0.75 + world.random() / 2));
  }
}

/** Whose schedule it is; those of before there were epochs in them are everybody's. */
function armedEpoch(data: Uint8Array): number {
  const { epoch } = JSON.parse(new TextDecoder().decode(data)) as { epoch?: number };
  return epoch ?? 0;
}

interface Fold {
  readonly entry: Entry;
  readonly state: ActorState;
  readonly events: readonly ActorEvent[];
  readonly out: readonly OutMessage[];
  readonly outcome: Outcome | undefined;
  readonly at_ms: number;
  readonly bytes: number;
}
