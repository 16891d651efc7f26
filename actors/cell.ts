// cell: one resident actor: its state, and the loop that takes it from its mailbox to its journal and to the world.
//
//   mailbox ──▶ decide ──▶ pure steps ──▶ mark debt ──▶ ONE append ──▶ publish out ──▶ reply ──▶ acknowledge ──▶ effects, timers
//                 │                          │
//                 └─ refused / repeated      ├─ committed    go on
//                                            ├─ superseded   ask who owns the shard: mine → reload and decide again; lost → stop
//                                            └─ unavailable  the same append again, until it is known
//
// One step at a time, in mailbox order; several entries share an append when the mailbox is full.
//
// Owns: the loop, the append, and the order of everything around it. Its parts:
//   mailbox.ts  what waits                            fold.ts          one entry through the pure step       timers.ts      clocks, and the schedule
//   judge.ts    what becomes of an item of it         effect-scope.ts  what an effect sees of its actor      snapshots.ts   when one is written
//   restore.ts  snapshot and journal to a state       effect-runner.ts makes what runs agree with the ledger quarantine.ts  actors that lose workers
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
import type { AppendOutcome, Bus } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import type { Command } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, parseActorPath } from "../protocol/ids.ts";
import { type ActorEvent, encodeJournal, type Entry, type JournalMessage, type OutMessage } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { APPEND_BYTES_TARGET, APPEND_ENTRIES_MAX } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { pause, timestamp, type World } from "../protocol/world.ts";
import type { ActorView } from "../state-machines/definition.ts";
import { type ActorState, type Core, outerState, type Outcome, type Running } from "../state-machines/step.ts";
import { createEffectRunner, type EffectRunner } from "./effect-runner.ts";
import { scopeOf, type ScopeHost } from "./effect-scope.ts";
import type { EntryCache } from "./entry-cache.ts";
import { fold, type Fold, foldSafely, stampOf } from "./fold.ts";
import { Judge } from "./judge.ts";
import { Mailbox, type MailItem } from "./mailbox.ts";
import type { EffectScope, Performers } from "./performer.ts";
import { Quarantine } from "./quarantine.ts";
import type { CommitHead, Restored, Restorer } from "./restore.ts";
import { Snapshots } from "./snapshots.ts";
import { Timers } from "./timers.ts";

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

/** While the lease is not good, it is looked at this often. */
const PERMISSION_POLL_MS = 50;
/** Waits between repeats of what the bus could not take; the last one repeats. */
const RETRY_MS = [20, 50, 100, 250, 500, 1000] as const;

/** Tries to judge a command until its waiting is told again: about a minute. */
const UNJUDGED_TOLD_EVERY = 60;

interface Decided {
  readonly item: MailItem;
  readonly outcome: Outcome | undefined;
  /** By an entry of this commit, and not by one before. */
  readonly journaled: boolean;
}

export class ActorCell {
  readonly #deps: CellDeps;
  readonly #effects: EffectRunner;
  readonly #mailbox = new Mailbox();
  readonly #judge: Judge;
  readonly #timers: Timers;
  readonly #snapshots: Snapshots;
  readonly #quarantine: Quarantine;
  readonly #scope_host: ScopeHost;
  #phase: CellPhase = "loading";
  #state: ActorState | undefined;
  #last_sequence = 0;
  #head: CommitHead | undefined;
  #running_loop: Promise<void> | undefined;
  #needs_load = true;
  #touched_at_ms: number;
  #trace: string | undefined;
  readonly #journal_read = Promise.withResolvers<void>();
  readonly #unanswered = new Set<(outcome: Outcome) => void>();

  constructor(deps: CellDeps) {
    this.#deps = deps;
    this.#touched_at_ms = deps.world.monotonic_ms();
    const { actor, core, bus, world, log, epoch, entries } = deps;
    this.#judge = new Judge({ actor, core, world, admit: async (command, view) => deps.admit?.(command, view) });
    this.#timers = new Timers({ actor, bus, world, log, epoch, fire: (inst) => this.push({ kind: "entry", entry: { t: "timer", inst } }) });
    this.#snapshots = new Snapshots({ actor, core, bus, world, log });
    this.#quarantine = new Quarantine({
      world,
      quarantine: deps.quarantine,
      stopped: () => this.#stopped(),
      // The claim before said that nothing of it had begun (`held`); this one says that it may.
      on_over: () => this.push({ kind: "entry", entry: { t: "claim", from: deps.worker, reason: "its quarantine ended", lost: [] } }),
    });
    this.#scope_host = {
      actor,
      bus,
      world,
      log,
      epoch,
      entries,
      trace: () => this.#trace,
      permitted: () => this.#permitted(),
      stopped: () => this.#stopped(),
      back_off: (tries) => this.#backOff(tries),
      post: (entry) => this.push({ kind: "entry", entry }),
      first_token: () => deps.observer?.first_token?.(actor),
    };
    this.#effects = createEffectRunner({
      performers: deps.performers,
      log,
      post: (entry) => this.push({ kind: "entry", entry }),
      observe: (what, src) => deps.observer?.effect?.(what, src),
      scope: (effect, signal, so_far) => scopeOf(this.#scope_host, effect, signal, so_far),
    });
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
    return this.#running_loop === undefined && this.#mailbox.empty && this.#effects.live().size === 0;
  }
  /** For how long nothing has been put in. */
  idle_ms(): number {
    return this.#deps.world.monotonic_ms() - this.#touched_at_ms;
  }

  push(item: MailItem): void {
    if (this.#phase === "stopped") return; // unacknowledged: it comes again to whoever owns the actor then (C4)
    this.#touched_at_ms = this.#deps.world.monotonic_ms();
    this.#mailbox.put(item, this.#touched_at_ms);
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
    this.#mailbox.forget_commands();
  }

  /** Ends everything at once. Nothing more is appended, answered or acknowledged. */
  stop(): void {
    this.#phase = "stopped";
    this.#journal_read.resolve();
    this.#quarantine.end();
    this.#effects.stop();
    this.#timers.stop();
    this.#mailbox.clear();
    for (const tell of this.#unanswered) tell({ ok: false, error: errorBody("unavailable", "the actor left this process before it decided") });
    this.#unanswered.clear();
  }

  /** Resolves when the present run of the loop has ended. */
  async settled(): Promise<void> {
    await this.#running_loop;
  }

  #wake(): void {
    if (this.#running_loop !== undefined || this.#phase === "stopped") return;
    if (!this.#mailbox.has_work() && !this.#needs_load) return;
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
    while (this.#phase !== "stopped" && (this.#needs_load || this.#mailbox.has_work())) {
      if (this.#needs_load && !(await this.#restore())) {
        await this.#backOff(0);
        continue;
      }
      if (this.#mailbox.has_work()) await this.#turn();
    }
  }

  /** C6. */
  async #letCommandsWait(error: unknown, tries: number): Promise<void> {
    if (tries % UNJUDGED_TOLD_EVERY === 0)
      this.#deps.log.warn("a command cannot be judged yet, and waits", { actor: actorPath(this.actor), tries, ...errorFields(error) });
    this.#mailbox.commands_wait = true;
    await this.#backOff(tries);
    this.#mailbox.commands_wait = false;
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
    this.#snapshots.restored(restored?.snapshot_seq ?? 0);
    this.#timers.forget_schedule();
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
    const folded = fold(this.#deps, restored.state, entry, stampOf(this.#deps.world, restored.state));
    const { tries } = folded.state.recovery;
    const suspect = this.#quarantine.suspects(tries, Object.keys(folded.state.running).length > 0);
    const outcome = await this.#commit([folded], []);
    if (outcome === "committed" && suspect) this.#quarantine.enter(tries);
    return outcome === "committed";
  }

  async #assumedCosts(effects: readonly Running[]): Promise<Record<string, number>> {
    const costs: Record<string, number> = {};
    for (const effect of effects) {
      try {
        const cost = await this.#deps.assume_cost?.(effect, scopeOf(this.#scope_host, effect, new AbortController().signal));
        if (cost !== undefined) costs[effect.inst] = cost;
      } catch (error) {
        this.#deps.log.warn("what a lost attempt may have cost is not known", { actor: actorPath(this.actor), inst: effect.inst, ...errorFields(error) });
      }
    }
    return costs;
  }

  // ── deciding ─────────────────────────────────────────────────────────────────────────────────────────────────────

  /** Takes from the mailbox what fits one append, steps through it, commits, and lets the world know. */
  async #turn(): Promise<void> {
    const taken: MailItem[] = [];
    const decided: Decided[] = [];
    const folds: Fold[] = [];
    let state = this.#state;
    const at_ms = stampOf(this.#deps.world, state);
    let bytes = 0;
    while (folds.length < APPEND_ENTRIES_MAX && bytes < APPEND_BYTES_TARGET) {
      const item = this.#mailbox.take();
      if (item === undefined) break;
      const arrived_ms = this.#mailbox.arrived_ms(item);
      const taken_ms = this.#deps.world.monotonic_ms();
      const verdict = await this.#judge.judge(item, state);
      if (verdict.kind === "given_up" && item.kind === "command") item.given_up?.();
      if (verdict.kind === "unjudged") {
        this.#mailbox.put_back(item);
        void this.#letCommandsWait(verdict.error, verdict.tries);
      }
      if (this.#stopped()) return;
      if (verdict.kind === "given_up" || verdict.kind === "unjudged") continue;
      if (item.kind !== "entry" && item.settle !== undefined && verdict.kind === "answer" && !verdict.journaled) {
        // C8
        if (folds.length > 0) {
          this.#mailbox.put_back(item); // first the ones before it
          break;
        }
        if (await item.settle()) this.#tell([{ item, outcome: verdict.outcome, journaled: false }]);
        if (this.#stopped()) return;
        continue;
      }
      if (arrived_ms !== undefined) this.#deps.observer?.waited?.(taken_ms - arrived_ms);
      taken.push(item);
      if (verdict.kind === "entry") {
        const fold = foldSafely(this.#deps, this.#effects, state, verdict.entry, at_ms);
        folds.push(fold);
        state = fold.state;
        bytes += fold.bytes;
        decided.push({ item, outcome: fold.outcome, journaled: true });
      } else decided.push({ item, outcome: verdict.kind === "answer" ? verdict.outcome : undefined, journaled: false });
    }
    if (folds.length === 0) {
      this.#tell(decided);
      return;
    }
    await this.#commit(folds, taken, decided);
  }

  // ── committing ───────────────────────────────────────────────────────────────────────────────────────────────────

  async #commit(folds: readonly Fold[], taken: readonly MailItem[], decided: readonly Decided[] = []): Promise<"committed" | "again" | "stopped"> {
    const { world, core, actor, epoch, worker, observer } = this.#deps;
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
      this.#mailbox.put_back(...taken); // C4: decided anew against the journal as it is
      this.#effects.reconcile({}, true);
      this.#timers.stop();
      this.#needs_load = true;
      return (await this.#lost()) ? "stopped" : "again";
    }
    this.#state = state;
    this.#snapshots.appended(data.byteLength);
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
    if (Object.keys(state.running).length === 0) this.#quarantine.end();
    this.#snapshots.maybe_write(this.#state, this.#last_sequence, this.#head); // not awaited: the next commit owes it nothing
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
    this.#timers.reconcile(state);
    // Held up by an outage, not by leaving: what the state names begins as soon as the lease is good again.
    if (!permitted && !hold) void this.#deps.world.after(PERMISSION_POLL_MS, () => this.#reconcile(this.#holding()));
  }

  /** The actor's schedule in TIMERS came due: fires what is due by now. */
  due(): void {
    this.#timers.due(this.#state);
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
    const seq = this.#state?.seq ?? 0;
    if (!(await this.#timers.arm(this.#state))) return false;
    await this.#snapshots.written();
    this.#snapshots.maybe_write(this.#state, this.#last_sequence, this.#head);
    await this.#snapshots.written();
    return this.idle && !this.#stopped() && (this.#state?.seq ?? 0) === seq && Object.keys(this.#state?.running ?? {}).length === 0;
  }

  #holding(): boolean {
    return this.#quarantine.holds || this.#deps.holding();
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
