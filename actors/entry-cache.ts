// entry-cache: the committed entries that bear messages, for the effects that read them.
//
// A transcript is not in a machine's context; its context holds positions. The text of recent entries is kept here, bounded in
// bytes over the whole process, least recently used actor first; what is not here is read from the journal again.
import type { Bus } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { decodeJournal, type Entry, entrySeq, type JournalMessage } from "../protocol/journal.ts";
import { actorSubject } from "../protocol/subjects.ts";

/** About 200 long conversations; a fraction of what the process may use. */
export const ENTRY_CACHE_BYTES_MAX = 64 * 1024 * 1024;

interface Kept {
  readonly entries: Map<number, Entry>;
  bytes: number;
}

export interface EntryCache {
  /** Remembers what of a committed message an effect may want to read. */
  add(actor: ActorAddress, message: JournalMessage): void;
  /** Entries by seq. Rejects when the bus cannot answer, or when one is not in the journal. */
  get(actor: ActorAddress, seqs: readonly number[]): Promise<ReadonlyMap<number, Entry>>;
  forget(actor: ActorAddress): void;
  readonly bytes: number;
}

/** Only sessions have messages; of their entries only these are read again, the first one before every model call: it says whose money it is. */
const isReadAgain = (actor: ActorAddress, entry: Entry): boolean =>
  actor.kind === "session" && (entry.t === "init" || entry.t === "done" || (entry.t === "command" && entry.type === "message.send"));

export function createEntryCache(bus: Bus, bytes_max = ENTRY_CACHE_BYTES_MAX): EntryCache {
  const actors = new Map<string, Kept>();
  let total = 0;

  function keep(actor: ActorAddress, seq: number, entry: Entry): void {
    const path = actorPath(actor);
    const kept = actors.get(path) ?? { entries: new Map<number, Entry>(), bytes: 0 };
    actors.delete(path); // to the end: most recently used
    actors.set(path, kept);
    if (kept.entries.has(seq)) return;
    const bytes = JSON.stringify(entry).length;
    kept.entries.set(seq, entry);
    kept.bytes += bytes;
    total += bytes;
    for (const [oldest, old] of actors) {
      if (total <= bytes_max || oldest === path) break;
      actors.delete(oldest);
      total -= old.bytes;
    }
  }

  function keepMessage(actor: ActorAddress, message: JournalMessage): void {
    message.entries.forEach((entry, index) => {
      if (isReadAgain(actor, entry)) keep(actor, entrySeq(message, index), entry);
    });
  }

  return {
    add: keepMessage,
    async get(actor, seqs) {
      const found = new Map<number, Entry>();
      const collect = (): boolean => {
        const kept = actors.get(actorPath(actor));
        for (const seq of seqs) {
          const entry = kept?.entries.get(seq);
          if (entry !== undefined) found.set(seq, entry);
        }
        return seqs.every((seq) => found.has(seq));
      };
      if (collect()) return found;
      const wanted = new Set(seqs);
      for await (const stored of bus.read("EVENTS", actorSubject(actor, "event"), 1)) {
        const message = decodeJournal(stored.data, actor);
        keepMessage(actor, message);
        message.entries.forEach((entry, index) => {
          if (wanted.has(entrySeq(message, index))) found.set(entrySeq(message, index), entry);
        });
      }
      assert(
        seqs.every((seq) => found.has(seq)),
        "positions in a state name entries of its journal",
      );
      return found;
    },
    forget(actor) {
      const path = actorPath(actor);
      total -= actors.get(path)?.bytes ?? 0;
      actors.delete(path);
    },
    get bytes() {
      return total;
    },
  };
}
