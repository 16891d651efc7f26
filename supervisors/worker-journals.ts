// WorkerJournals: the worker actors' journals as one leadership reads and writes them. Every decision about a worker is said here before
// anything follows from it.
//
//   unknown ──open──▶ loading ──▶ loaded ──forget──▶ unknown          (the journal itself stays)
//
// Owns: the cells of one term. Leaves to others: what to say (verdicts.ts, assignments.ts, worker-commands.ts, recoveries.ts).
//
// Invariants (of leader.ts):
//   D1. Each decision is appended to the worker's journal before the table changes by it; the append carries the epoch of
//       this leadership and is the fence between two leaders.
import { assert } from "../protocol/assert.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Log } from "../protocol/log.ts";
import type { Outcome } from "../state-machines/step.ts";
import type { Term } from "./term.ts";
import type { CommandOrigin, OpenWorkerCell, WorkerCell, WorkerRecord } from "./worker-cell.ts";

/** The names of workers come from our own configuration; the bound is for a configuration that draws a new name at each start. */
const WORKERS_MAX = 10_000;

export interface WorkerJournalsOptions {
  readonly term: Term;
  readonly log: Log;
  readonly open_cell: OpenWorkerCell;
}

interface OpenJournal {
  readonly cell: WorkerCell;
  readonly loading: Promise<void>;
}

export class WorkerJournals {
  readonly #term: Term;
  readonly #log: Log;
  readonly #open_cell: OpenWorkerCell;
  readonly #journals = new Map<string, OpenJournal>();

  constructor({ term, log, open_cell }: WorkerJournalsOptions) {
    this.#term = term;
    this.#log = log;
    this.#open_cell = open_cell;
  }

  /** Begins to read a worker's journal, once. */
  open(worker: string): WorkerCell {
    const open = this.#journals.get(worker);
    if (open !== undefined) return open.cell;
    assert(this.#journals.size < WORKERS_MAX, "a cell of the runtime has fewer than ten thousand workers");
    const cell = this.#open_cell(worker, this.#term);
    this.#journals.set(worker, { cell, loading: cell.load() });
    return cell;
  }

  has(worker: string): boolean {
    return this.#journals.has(worker);
  }
  /** Of those whose journals are open. */
  workers(): string[] {
    return [...this.#journals.keys()];
  }
  /** What a worker's journal says of it; undefined before it is loaded, and when there was never such a worker. */
  record(worker: string): WorkerRecord | undefined {
    return this.#journals.get(worker)?.cell.record();
  }

  /** Until the worker's journal is read, or the term is over. */
  loaded(worker: string): Promise<unknown> {
    return Promise.race([this.#journals.get(worker)?.loading, this.#term.ended]);
  }
  /** The same of all that are open now. */
  all_loaded(): Promise<unknown> {
    return Promise.race([Promise.all([...this.#journals.values()].map(({ loading }) => loading)), this.#term.ended]);
  }

  /** D1. Answers undefined when the leadership ended before it was decided. */
  async say(worker: string, type: string, body: JsonObject, origin?: CommandOrigin): Promise<Outcome | undefined> {
    if (!this.#term.may_act()) return undefined;
    const outcome = await Promise.race([this.open(worker).say(type, body, origin), this.#term.ended]);
    if (outcome === "ended" || this.#term.over) return undefined;
    if (!outcome.ok && origin === undefined)
      this.#log.error("a worker's machine refused the leader", { worker, type, code: outcome.error.code, message: outcome.error.message });
    return outcome;
  }

  /** The highest epoch that each shard was ever given to anybody under, as these journals say. */
  epochs(): Map<number, number> {
    const epochs = new Map<number, number>();
    for (const { cell } of this.#journals.values())
      for (const [shard, epoch] of cell.record()?.epochs ?? []) epochs.set(shard, Math.max(epoch, epochs.get(shard) ?? 0));
    return epochs;
  }
  /** The same of one shard; 0 when nobody ever had it. */
  epoch_of(shard: number): number {
    return Math.max(0, ...[...this.#journals.values()].map(({ cell }) => cell.record()?.epochs.get(shard) ?? 0));
  }

  count_by_state(): Map<string, number> {
    const counts = new Map<string, number>();
    for (const { cell } of this.#journals.values()) {
      const state = cell.record()?.state;
      if (state !== undefined) counts.set(state, (counts.get(state) ?? 0) + 1);
    }
    return counts;
  }

  /** Its cell leaves memory. */
  forget(worker: string): void {
    this.#journals.get(worker)?.cell.stop();
    this.#journals.delete(worker);
  }
  stop(): void {
    for (const { cell } of this.#journals.values()) cell.stop();
  }
}

/** Counts as being there: not dead and not left. */
export function isAlive(state: string): boolean {
  return state !== "dead" && state !== "left";
}
