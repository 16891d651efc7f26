// WorkerCell: a worker actor (`system/worker/{id}`) as the leading supervisor hosts it: outside the shards, under the epoch
// of its leadership. Every decision about a worker is said to its cell first; the append is the fence between two leaders.
import type { Bus } from "../bus/port.ts";
import { ActorCell } from "../actors/cell.ts";
import { createEntryCache } from "../actors/entry-cache.ts";
import type { Restorer } from "../actors/restore.ts";
import { type ActorAddress, SYSTEM_TENANT } from "../protocol/ids.ts";
import type { CommandSource } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { type ActorState, type Core, type Outcome, outerState, viewOf } from "../state-machines/step.ts";
import { workerContextOf } from "../state-machines/worker.ts";
import type { Term } from "./term.ts";

/** What a worker's journal says of it, as far as the leader decides by it. */
export interface WorkerRecord {
  readonly state: string;
  readonly incarnation: string;
  /** The shards it was given and has not given up, with the epoch of each. */
  readonly shards: ReadonlyMap<number, number>;
  /** The highest epoch each shard was ever given to it under. */
  readonly epochs: ReadonlyMap<number, number>;
}

/** How a command that came from outside is recognised when it comes again. */
export interface CommandOrigin {
  readonly key?: string;
  readonly source?: CommandSource;
  readonly trace?: string;
  readonly principal?: string;
}

export interface WorkerCell {
  /** Restores the worker's record. Rejects never; while the bus is away it waits. */
  load(): Promise<void>;
  /** The record as it stands, undefined when there was never such a worker. Only after load. */
  record(): WorkerRecord | undefined;
  /** Resolves once it is decided and that is durable. Never resolves when the cell was stopped or lost its right: race it with the term's end. */
  say(type: string, body: JsonObject, origin?: CommandOrigin): Promise<Outcome>;
  stop(): void;
}

/** Opens a worker's cell; it acts under that term alone. */
export type OpenWorkerCell = (worker: string, term: Pick<Term, "epoch" | "may_act" | "conflict">) => WorkerCell;

export const workerActor = (id: string): ActorAddress => ({ tenant: SYSTEM_TENANT, kind: "worker", id });

export interface WorkerCellDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** Of the worker machine. */
  readonly core: Core;
  readonly restorer: Restorer;
  /** The supervisor's id: stands as `worker` in the journal's messages. */
  readonly supervisor: string;
  readonly next_commit_id: () => string;
}

const byShard = (epochs: Readonly<Record<string, number>>): Map<number, number> =>
  new Map(Object.entries(epochs).map(([shard, epoch]) => [Number(shard), epoch]));

/** Opens worker actors over the real journal. */
export function createWorkerCells(deps: WorkerCellDeps): OpenWorkerCell {
  const entries = createEntryCache(deps.bus);
  return (worker, term) => {
    const cell = new ActorCell({
      actor: workerActor(worker),
      core: deps.core,
      bus: deps.bus,
      world: deps.world,
      log: deps.log,
      restorer: deps.restorer,
      performers: {},
      entries,
      worker: deps.supervisor,
      epoch: term.epoch,
      next_commit_id: deps.next_commit_id,
      may_act: () => term.may_act(),
      holding: () => false,
      conflict: () => term.conflict(),
      claim_reason: "another supervisor leads",
    });
    // A pass of the leader asks for the record of every worker many times over: read once for each state.
    const read: { of?: ActorState; record?: WorkerRecord } = {};
    return {
      load: () => cell.load(),
      record() {
        const { state } = cell;
        if (state === undefined) return undefined;
        if (read.of !== state) {
          const { incarnation, shards, epochs } = workerContextOf(viewOf(state));
          read.record = { state: outerState(state.snapshot), incarnation, shards: byShard(shards), epochs: byShard(epochs) };
          read.of = state;
        }
        return read.record;
      },
      say: (type, body, origin = {}) =>
        new Promise((resolve) => {
          const { source, ...identity } = origin;
          cell.push({
            kind: "command",
            command: { channel: "control", type, body, ...identity },
            ...(source === undefined ? {} : { source }),
            decided: resolve,
          });
        }),
      stop: () => cell.stop(),
    };
  };
}
