// Leadership: one supervisor's leading, from winning the lease to losing it: what it knows, and the passes in which it acts on that.
//
//   reading the journals, the leases and the table ──▶ quiet ⇄ a pass ──the term ends──▶ over
//                                                       └ every change that is heard makes one ┘
//
// A pass goes over all that is known, and on what is as it should be it does nothing:
//   1. who is there, suspected, dead, left          verdicts.ts
//   2. what became of writes that nobody answered   placement-table.ts
//   3. what owners wrote themselves                 assignments.ts: follow_table
//   4. who should own what, and what moves          assignments.ts: make (placement.ts decides)
//
// Invariants (of leader.ts):
//   D5. One pass at a time; a pass that makes no progress for PASS_PATIENCE_MS ends the term.
import type { Bus, Subscription } from "../bus/port.ts";
import type { JournalMessage } from "../protocol/journal.ts";
import { LEASE_TTL_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { RESUMED_SUBJECT } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { type Assigned, Assignments, type Moved } from "./assignments.ts";
import type { Calm } from "./calm.ts";
import type { Connections } from "./connections.ts";
import type { PlacementStrategy } from "./placement.ts";
import { PlacementTable } from "./placement-table.ts";
import type { Probation } from "./probation.ts";
import { Recoveries, type ResumedTimes } from "./recoveries.ts";
import type { Term } from "./term.ts";
import { Verdicts } from "./verdicts.ts";
import type { OpenWorkerCell } from "./worker-cell.ts";
import { WorkerCommands } from "./worker-commands.ts";
import { isAlive, WorkerJournals } from "./worker-journals.ts";

/** A pass is a few appends and table writes for each shard: some hundred milliseconds. */
const PASS_PATIENCE_MS = 2 * LEASE_TTL_MS;

export interface LeadershipObserver {
  /** A worker was declared dead, `detect_ms` after it was last heard of. */
  died?(worker: string, detect_ms: number): void;
  /** How many workers are in each state, as this leader's journals say; nothing at all once it leads no more. */
  workers?(count_by_state: ReadonlyMap<string, number>): void;
  assigned?(given: Assigned): void;
  moved?(move: Moved): void;
  resumed?(times: ResumedTimes): void;
}

export interface LeadershipOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly term: Term;
  readonly calm: Calm;
  readonly connections: Connections;
  readonly probation: Probation;
  readonly open_cell: OpenWorkerCell;
  readonly strategy: PlacementStrategy | undefined;
  /** Machine versions that journals are pinned to: who does not know them is given nothing. */
  required_versions(): readonly string[];
  readonly ttl_ms: number;
  readonly handover_deadline_ms: number | undefined;
  readonly observer: LeadershipObserver;
}

export class Leadership {
  readonly term: Term;
  readonly #options: LeadershipOptions;
  readonly #journals: WorkerJournals;
  readonly #table: PlacementTable;
  readonly #verdicts: Verdicts;
  readonly #recoveries: Recoveries;
  readonly #assignments: Assignments;
  readonly #commands: WorkerCommands;
  readonly #subscriptions: Subscription[] = [];
  #dirty = true;
  /** Reading everything is the first of its passes. */
  #passing_since_ms: number | undefined;

  constructor(options: LeadershipOptions) {
    const { bus, world, log, term, calm, connections, probation, open_cell, ttl_ms, observer } = options;
    const on_change = (): void => this.wake();
    this.term = term;
    this.#options = options;
    this.#passing_since_ms = world.monotonic_ms();
    const journals = new WorkerJournals({ term, log, open_cell });
    const table = new PlacementTable({ bus, world, log, calm, term, said_epoch: (shard) => journals.epoch_of(shard), on_change });
    const recoveries = new Recoveries({ log, term, journals, on_resumed: (times) => observer.resumed?.(times) });
    const verdicts = new Verdicts({
      bus,
      world,
      log,
      term,
      calm,
      journals,
      connections,
      probation,
      ttl_ms,
      owned_by: (worker) => table.owned_by(worker),
      on_death: (worker, silent_ms) => {
        observer.died?.(worker, silent_ms);
        recoveries.died(worker, silent_ms);
      },
      on_change,
    });
    this.#assignments = new Assignments({
      bus,
      world,
      log,
      journals,
      verdicts,
      table,
      strategy: options.strategy,
      handover_deadline_ms: options.handover_deadline_ms,
      required_versions: () => options.required_versions(),
      on_assigned: (assigned) => {
        observer.assigned?.(assigned);
        recoveries.assigned(assigned);
      },
      on_moved: (moved) => observer.moved?.(moved),
      on_change,
    });
    this.#commands = new WorkerCommands({ bus, log, term, journals, verdicts, on_change });
    this.#journals = journals;
    this.#table = table;
    this.#recoveries = recoveries;
    this.#verdicts = verdicts;
  }

  /** Is this one of the workers whose journals are open? */
  knows(worker: string): boolean {
    return this.#journals.has(worker);
  }

  /** D5 */
  is_stuck(now_ms: number): boolean {
    return this.#passing_since_ms !== undefined && now_ms - this.#passing_since_ms >= PASS_PATIENCE_MS;
  }

  /** Reads everything; the passes begin after it. `heads`: the last message of each worker's journal. Answers false when the tables cannot be read. */
  async begin(heads: readonly JournalMessage[]): Promise<boolean> {
    const { bus, calm } = this.#options;
    for (const head of heads) if (isAlive(head.state)) this.#journals.open(head.actor.id);
    const began = await calm.attempt("supervision's tables", async () => {
      for (const begin of [
        () => this.#verdicts.watch(),
        () => this.#table.watch(),
        () => this.#commands.consume(),
        async () => bus.subscribe(RESUMED_SUBJECT, ({ data }) => this.#recoveries.hear(data)),
      ]) {
        const subscription: Subscription = await begin();
        if (this.term.over) await subscription.stop();
        else this.#subscriptions.push(subscription);
      }
      await this.#journals.all_loaded();
      return true;
    });
    if (this.term.over) return true;
    if (began === undefined) return false;
    // A leader that died in the middle left the dead with shards that have other owners by now: their journals are ended too.
    const mentioned = new Set([...this.#table.entries().values()].flatMap(({ worker, from }) => [worker, from]));
    for (const head of heads) if (head.state === "dead" && mentioned.has(head.actor.id)) this.#journals.open(head.actor.id);
    this.#verdicts.begin();
    this.#passing_since_ms = undefined;
    this.wake();
    return true;
  }

  end(): void {
    this.term.end();
    this.#journals.stop();
    for (const subscription of this.#subscriptions)
      subscription.stop().catch((error: unknown) => this.#options.log.warn("a subscription did not stop", errorFields(error)));
  }

  /** Makes a pass soon; while one runs, another follows it. */
  wake(): void {
    this.#dirty = true;
    if (this.#passing_since_ms !== undefined || this.term.over) return;
    void this.#passes();
  }

  async #passes(): Promise<void> {
    const { world, log, observer } = this.#options;
    while (this.#dirty && this.term.may_act()) {
      this.#dirty = false;
      this.#passing_since_ms = world.monotonic_ms();
      try {
        await this.#pass();
      } catch (error) {
        // The next beat makes the next pass.
        log.error("a pass of the supervisor broke", errorFields(error));
        break;
      }
    }
    this.#passing_since_ms = undefined;
    if (!this.term.over) observer.workers?.(this.#journals.count_by_state());
  }

  async #pass(): Promise<void> {
    await this.#verdicts.judge();
    if (!this.term.may_act()) return;
    await this.#table.read_doubtful();
    await this.#assignments.follow_table();
    if (!this.term.may_act()) return;
    await this.#assignments.make();
  }
}
