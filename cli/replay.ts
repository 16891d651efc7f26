// replay: rebuilds an actor from its journal with the pure core, entry by entry, and says where the journal and the replay differ.
//
// Invariants:
//   Y1. Nothing is read but the streams; nothing is written; the clock is the journal's.
//   Y2. Every message's state, events and out are compared with the replay's (A5); a difference is told, never repaired.
//   Y3. With a snapshot, the tail is replayed a second time from it, and both ends must be the same state.
import { replayMessage, savedDifferences } from "../actors/verify.ts";
import { decodeSnapshot } from "../actors/restore.ts";
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { type ActorEvent, decodeJournal, type Entry, type JournalMessage, type OutMessage } from "../protocol/journal.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { type ActorState, type Core, outerState } from "../state-machines/step.ts";

/** One entry, and what it led to. */
export interface ReplayLine {
  readonly seq: number;
  readonly at: string;
  readonly epoch: number;
  readonly worker: string;
  /** Of the message that bears the entry. */
  readonly stream_sequence: number;
  readonly entry: Entry;
  readonly state: string;
  readonly events: readonly ActorEvent[];
  readonly out: readonly OutMessage[];
  /** Effects in flight and timers armed after the entry, by inst. */
  readonly running: readonly string[];
  readonly timers: readonly string[];
}

/** What the snapshot showed. */
export interface SnapshotProof {
  readonly seq: number;
  /** Entries replayed on top of it. */
  readonly entries_after: number;
  /** Fields in which the snapshot differs from the replay at its seq. */
  readonly differs_in: readonly string[];
  /** Fields in which snapshot and tail differ from the full replay at the end. */
  readonly end_differs_in: readonly string[];
}

export type ReplayOutcome =
  | {
      readonly kind: "replayed";
      readonly entries: number;
      readonly seq: number;
      readonly state: ActorState;
      /** Where the journal says something else than the replay (A5), in words. */
      readonly differences: readonly string[];
      readonly snapshot: SnapshotProof | undefined;
    }
  | { readonly kind: "absent" }
  /** Asked for a proof that cannot be given. */
  | { readonly kind: "no_snapshot"; readonly reason: string }
  /** The journal cannot be followed from here on. */
  | { readonly kind: "broken"; readonly stream_sequence: number; readonly entries: number; readonly what: string }
  /** `on_line` asked to end. */
  | { readonly kind: "ended"; readonly entries: number };

export interface ReplayOptions {
  readonly bus: Pick<Bus, "read" | "last">;
  readonly core: Core;
  readonly actor: ActorAddress;
  /** The last seq to apply; all of them by default. */
  readonly to_seq?: number | undefined;
  readonly from_snapshot?: boolean;
  /** Hears every entry in order and is awaited; answers "end" to stop. */
  on_line?(line: ReplayLine, state: ActorState): Promise<"go_on" | "end"> | "go_on" | "end";
}

/** A message of which only the first entries are wanted. What it says of its end then no longer applies. */
function firstEntriesOf(message: JournalMessage, to_seq: number): { message: JournalMessage; whole: boolean } {
  const over = message.seq - to_seq;
  if (over <= 0) return { message, whole: true };
  return { message: { ...message, seq: to_seq, entries: message.entries.slice(0, message.entries.length - over) }, whole: false };
}

const reasonOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** Reads the snapshot that Y3 starts from. */
async function readSnapshot({
  bus,
  core,
  actor,
  to_seq,
}: ReplayOptions): Promise<{ state: ActorState; seq: number; last_sequence: number } | { reason: string }> {
  const stored = await bus.last("SNAPSHOTS", actorSubject(actor, "snapshot"));
  if (stored === undefined) return { reason: "the actor has no snapshot yet" };
  try {
    const { saved, last_sequence } = decodeSnapshot(stored.data);
    if (to_seq !== undefined && saved.seq > to_seq) return { reason: `the snapshot is of seq ${saved.seq}, after --to ${to_seq}` };
    return { state: core.load(saved), seq: saved.seq, last_sequence };
  } catch (error) {
    return { reason: `the snapshot cannot be read: ${reasonOf(error)}` };
  }
}

/** Replays one actor. Rejects when the broker cannot answer; everything about the journal itself is in the outcome. */
export async function replay(options: ReplayOptions): Promise<ReplayOutcome> {
  const { bus, core, actor, to_seq = Number.POSITIVE_INFINITY, on_line } = options;
  // The snapshot first: whatever it speaks of is then in the journal that is read after it.
  const snapshot = options.from_snapshot === true ? await readSnapshot(options) : undefined;
  if (snapshot !== undefined && "reason" in snapshot) return { kind: "no_snapshot", reason: snapshot.reason };
  let state: ActorState | undefined;
  let resumed = snapshot?.state;
  let differs_in: readonly string[] | undefined;
  let entries = 0;
  const differences: string[] = [];

  for await (const stored of bus.read("EVENTS", actorSubject(actor, "event"), 1)) {
    if (state !== undefined && state.seq >= to_seq) break;
    try {
      const { message, whole } = firstEntriesOf(decodeJournal(stored.data, actor), to_seq);
      if (message.machine !== core.machine_name)
        return {
          kind: "broken",
          stream_sequence: stored.sequence,
          entries,
          what: `it was written by ${message.machine}; this program knows ${core.machine_name}`,
        };
      const replayed = replayMessage(core, state, message);
      if (whole) differences.push(...replayed.differences.map((one) => `seq ${message.seq}: ${one}`));
      for (const { entry, seq, step } of replayed.entries) {
        entries += 1;
        state = step.state;
        const line: ReplayLine = {
          seq,
          at: message.at,
          epoch: message.epoch,
          worker: message.worker,
          stream_sequence: stored.sequence,
          entry,
          state: outerState(step.state.snapshot),
          events: step.events,
          out: step.out,
          running: Object.values(step.state.running).map((running) => running.inst),
          timers: Object.values(step.state.timers).map((timer) => timer.inst),
        };
        if ((await on_line?.(line, step.state)) === "end") return { kind: "ended", entries };
      }
      if (snapshot !== undefined && resumed !== undefined) {
        if (stored.sequence > snapshot.last_sequence) resumed = replayMessage(core, resumed, message).state;
        else if (stored.sequence === snapshot.last_sequence) differs_in = savedDifferences(core.save(snapshot.state), core.save(replayed.state));
      }
    } catch (error) {
      return { kind: "broken", stream_sequence: stored.sequence, entries, what: `${actorPath(actor)} cannot be replayed further: ${reasonOf(error)}` };
    }
  }
  if (state === undefined) return { kind: "absent" };
  const proof =
    snapshot === undefined || resumed === undefined
      ? undefined
      : {
          seq: snapshot.seq,
          entries_after: state.seq - snapshot.seq,
          differs_in: differs_in ?? ["the place in the stream it names"],
          end_differs_in: savedDifferences(core.save(resumed), core.save(state)),
        };
  return { kind: "replayed", entries, seq: state.seq, state, differences, snapshot: proof };
}

/** Who said it, where that is known and not the runtime itself. */
export const byWords = (entry: Entry): string => ("principal" in entry && entry.principal !== undefined ? ` by ${entry.principal}` : "");

/** An entry in a few words, for a line of a terminal. */
export function entryWords(entry: Entry): string {
  const short = (value: unknown): string => {
    const text = JSON.stringify(value) ?? "";
    return text.length <= 100 ? text : `${text.slice(0, 97)}…`;
  };
  switch (entry.t) {
    case "init":
    case "command":
      return `${entry.type}${byWords(entry)} ${short(entry.body)}`;
    case "refused":
      return `${entry.type}${byWords(entry)} → ${entry.error.code}: ${entry.error.message}`;
    case "done":
      return `${entry.inst} ${short(entry.output)}`;
    case "fail":
      return `${entry.inst} ${entry.error.code}: ${entry.error.message}`;
    case "timer":
      return entry.inst;
    case "progress":
      return `${entry.inst} ${short(entry.told)}`;
    case "claim":
      return `from ${entry.from ?? "nobody"}: ${entry.reason}${entry.lost.length === 0 ? "" : `, lost ${entry.lost.join(" ")}`}`;
    default:
      return `to ${entry.to}`;
  }
}
