// restore: an actor's state out of the streams: its snapshot, then the journal's tail through the same pure step.
//
// Read-only: any process may restore any actor at any time. Owners do it before they go on; gateways and operators to look.
//
// Invariants:
//   R1. What is restored is what a replay from the first entry gives (A5): the outer state of every message read is checked.
//   R2. A snapshot that cannot be read (other version, other shape) is left aside and the whole journal replayed.
import type { Bus } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { type ActorAddress, type ActorKind, actorPath } from "../protocol/ids.ts";
import { decodeJournal, firstSeq, type JournalMessage, type OutMessage } from "../protocol/journal.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { type ActorState, type Core, outerState, type SavedState } from "../state-machines/step.ts";

/** What a restorer must know of the last commit besides the state it led to. */
export interface CommitHead {
  readonly seq: number;
  readonly epoch: number;
  readonly worker: string;
  readonly at: string;
  /** Messages of the last commit that may not have been published. */
  readonly out: readonly OutMessage[];
  /** Effects in flight that no owner has begun. */
  readonly held: readonly string[];
}

export interface Restored {
  readonly state: ActorState;
  /** Stream sequence of the journal's last message: what the next append expects. */
  readonly last_sequence: number;
  readonly last: CommitHead;
  readonly entries_replayed: number;
  /** seq of the snapshot it began with; 0 for none. */
  readonly snapshot_seq: number;
}

export type Cores = { readonly [K in ActorKind]?: Core };

export interface Snapshot {
  readonly saved: SavedState;
  readonly last_sequence: number;
  readonly last: CommitHead;
}

export function encodeSnapshot(core: Core, state: ActorState, last_sequence: number, last: CommitHead): Uint8Array {
  const snapshot: Snapshot = { saved: core.save(state), last_sequence, last: { ...last, out: [] } };
  return new TextEncoder().encode(JSON.stringify(snapshot));
}
export function decodeSnapshot(data: Uint8Array): Snapshot {
  return JSON.parse(new TextDecoder().decode(data)) as Snapshot;
}

export const headOf = (message: JournalMessage): CommitHead => ({
  seq: message.seq,
  epoch: message.epoch,
  worker: message.worker,
  at: message.at,
  out: message.out,
  held: message.held ?? [],
});

/** Applies every entry of one journal message, and checks R1. */
export function replayMessage(core: Core, state: ActorState | undefined, message: JournalMessage): ActorState {
  let current = state;
  const first = firstSeq(message);
  message.entries.forEach((entry, index) => {
    current = core.apply(current, message.actor, entry, {
      seq: first + index,
      at_ms: Date.parse(message.at),
      epoch: message.epoch,
      worker: message.worker,
    }).state;
  });
  assert(current !== undefined, "a journal message has entries");
  assert(outerState(current.snapshot) === message.state, `A5: replaying ${actorPath(message.actor)} to ${message.seq} gives its state ${message.state}`);
  return current;
}

export interface Restorer {
  /**
   * The actor as its journal stands, or undefined when it was never created. Rejects when the bus cannot answer.
   * `heard` is told each message of the journal that had to be read for it: who needs their text need not read them again.
   * `from`: the same actor as it was restored before; then only what was appended since is read.
   */
  restore(actor: ActorAddress, heard?: (message: JournalMessage) => void, from?: Restored): Promise<Restored | undefined>;
}

export function createRestorer({ bus, cores, log }: { bus: Bus; cores: Cores; log: Log }): Restorer {
  async function startOf(core: Core, actor: ActorAddress): Promise<(Snapshot & { state: ActorState }) | undefined> {
    const stored = await bus.last("SNAPSHOTS", actorSubject(actor, "snapshot"));
    if (stored === undefined) return undefined;
    try {
      const snapshot = decodeSnapshot(stored.data);
      assert(actorPath(snapshot.saved.actor) === actorPath(actor), "A4: a snapshot keeps the actor of its subject");
      return { ...snapshot, state: core.load(snapshot.saved) };
    } catch (error) {
      log.warn("snapshot left aside, replaying the whole journal", { actor: actorPath(actor), ...errorFields(error) }); // R2
      return undefined;
    }
  }

  return {
    async restore(actor, heard, from) {
      const core = cores[actor.kind];
      if (core === undefined) return undefined;
      const start = from === undefined ? await startOf(core, actor) : { ...from, saved: { seq: from.snapshot_seq } };
      let state = start?.state;
      let last = start?.last;
      let last_sequence = start?.last_sequence ?? 0;
      let replayed = 0;
      for await (const stored of bus.read("EVENTS", actorSubject(actor, "event"), last_sequence + 1)) {
        const message = decodeJournal(stored.data, actor);
        state = replayMessage(core, state, message);
        heard?.(message);
        last = headOf(message);
        last_sequence = stored.sequence;
        replayed += message.entries.length;
      }
      if (state === undefined || last === undefined) return undefined;
      return { state, last_sequence, last, entries_replayed: replayed, snapshot_seq: start?.saved.seq ?? 0 };
    },
  };
}
