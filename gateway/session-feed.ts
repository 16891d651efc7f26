// session-feed: one merged, ordered, gapless, repeat-free feed of a session's events and tokens, from a cursor on.
//
//   attach (listening) ──▶ catch up: EVENTS, then TOKENS of the open step ──▶ live ──┐
//                              ▲                                                     │ a gap, "behind", chunks ahead of the journal
//                              └─────────────────────────────────────────────────────┘
//
// This is the shell of feed-merge.ts: it decides what to read, the merge decides what is given.
//
// Invariants:
//   F1. It listens before it reads, so nothing falls between the two.
//   F2. It is pulled: while its reader is busy it takes nothing from its tap, which is bounded (H2). What the tap forgets is read again
//       from the streams, from the feed's own cursor.
//   F3. Ending it ends nothing but itself: a turn is never cancelled because nobody looks.
//   F4. Whoever said a command after the feed began to listen, and was told where the journal ended before it, has heard what follows: that is
//       given without a look at the streams. If nothing comes of it within AHEAD_PATIENCE_MS, or something is missing, they are read after all.
import type { Bus } from "../bus/port.ts";
import { BrokenPromise } from "../protocol/assert.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { pause, type World } from "../protocol/world.ts";
import { readChunk } from "./chunk.ts";
import { type Cursor, cursorAfter } from "./cursor.ts";
import type { FeedHub, Tap } from "./feed-hub.ts";
import { createMerge, type Frame, type Merge } from "./feed-merge.ts";

/** `gap`: the reader was too slow for the live tail; what follows `from` is read again from the streams, nothing is lost. */
export type FeedItem = Frame | { readonly kind: "gap"; readonly from: Cursor };

export interface FeedDeps {
  readonly bus: Bus;
  readonly hub: FeedHub;
  readonly world: World;
  readonly log: Log;
}

/** How long chunks may be ahead of the journal before it is read: live messages of two subjects overtake each other by less. */
const AHEAD_PATIENCE_MS = 100;
/** Between tries to read while the broker is away: the first, and the longest. */
const RETRY_FIRST_MS = 100;
const RETRY_MAX_MS = 2_000;

const eventsSubject = (session: ActorAddress): string => actorSubject(session, "event");

/** Reads what TOKENS still holds of the open step. */
async function* readStepTokens(bus: Bus, session: ActorAddress, merge: Merge, from_sequence: number): AsyncGenerator<Frame> {
  for await (const stored of bus.read("TOKENS", actorSubject(session, "token"), from_sequence)) {
    const chunk = readChunk(stored.data);
    if (chunk) yield* merge.chunk(chunk);
    if (merge.cursor.place === undefined) return;
  }
}

/**
 * Follows a session from a cursor, until `signal` is aborted. The signal must be aborted in the end: it frees the tap.
 *
 * Promises: M1–M4 of feed-merge.ts, over lost live messages, reconnects, restarts of the broker and slow readers.
 * Rejects:  when the bus cannot answer at the beginning. Later it waits for the bus; the feed throws only BrokenPromise, for a
 *           journal that cannot be read.
 */
export async function sessionFeed(deps: FeedDeps, session: ActorAddress, start: Cursor, signal: AbortSignal): Promise<AsyncGenerator<FeedItem>> {
  return earlySessionFeed(deps, session, signal).from(start);
}

/** A feed that listens already and is told later where it begins. One of the two may be called, once. */
export interface EarlyFeed {
  /** From a cursor on. Rejects when the bus cannot answer. */
  from(start: Cursor): Promise<AsyncGenerator<FeedItem>>;
  /**
   * From just after a journal message that was the session's last when a command was decided which was said after this feed began to listen:
   * what follows was heard, and nothing is read before it is given (F4).
   */
  after(sequence: number): AsyncGenerator<FeedItem>;
}

/** As sessionFeed, for whoever learns the cursor only when what follows it is on its way. */
export function earlySessionFeed(deps: FeedDeps, session: ActorAddress, signal: AbortSignal): EarlyFeed {
  const { tap, begins, looked } = deps.hub.listen(session); // F1
  signal.addEventListener("abort", () => tap.close(), { once: true });
  if (signal.aborted) tap.close();
  return {
    async from(start) {
      await looked();
      return follow(deps, session, start, tap, false);
    },
    after(sequence) {
      begins(sequence);
      return follow(deps, session, cursorAfter(sequence), tap, true);
    },
  };
}

async function* follow({ bus, world, log }: FeedDeps, session: ActorAddress, start: Cursor, tap: Tap, heard_all: boolean): AsyncGenerator<FeedItem> {
  const merge = createMerge(start);

  const tokenFloor = (): number => (merge.cursor.place === undefined ? 1 : tap.tokenFloor(merge.cursor.place));

  /** The end of a step waits for its text: first what TOKENS hold, then the finished message. */
  async function* finishText(look: boolean): AsyncGenerator<Frame> {
    if (look) {
      try {
        yield* readStepTokens(bus, session, merge, tokenFloor());
      } catch (error) {
        log.debug("chunks not read; the text comes out of the journal", { actor: actorPath(session), ...errorFields(error) });
      }
    }
    yield* merge.textRead();
  }

  async function* catchUp(): AsyncGenerator<Frame> {
    for await (const stored of bus.read("EVENTS", eventsSubject(session), Math.max(1, merge.cursor.sequence))) {
      yield* merge.journal(stored.sequence, decodeJournal(stored.data, session));
      // A step that was over before anything of it was given is given whole, out of the journal.
      if (merge.waits_for_text) yield* finishText((merge.cursor.place?.index ?? 0) > 0);
      if (tap.closed) return;
    }
    yield* merge.journalRead();
    if (merge.cursor.place !== undefined) yield* readStepTokens(bus, session, merge, tokenFloor());
  }

  /** Gives what comes until the streams must be read again; with `expected`, also when no journal message comes soon. */
  async function* live(expected: boolean): AsyncGenerator<FeedItem> {
    const first_until_ms = world.monotonic_ms() + AHEAD_PATIENCE_MS;
    let waits_for_first = expected;
    let ahead_until_ms: number | undefined;
    for (;;) {
      ahead_until_ms = waits_for_first ? first_until_ms : merge.ahead_of_journal ? (ahead_until_ms ?? world.monotonic_ms() + AHEAD_PATIENCE_MS) : undefined;
      const patience_ms = ahead_until_ms === undefined ? undefined : ahead_until_ms - world.monotonic_ms();
      if (patience_ms !== undefined && patience_ms <= 0) return;
      const input = await tap.next(patience_ms);
      switch (input.kind) {
        case "closed":
        case "quiet":
          return;
        case "behind":
          yield { kind: "gap", from: merge.cursor }; // F2
          return;
        case "chunk":
          yield* merge.chunk(input.chunk);
          break;
        case "journal":
          waits_for_first = false;
          // The hub hands on without gaps (H3); a feed that stands before what it hears relies on the stream alone all the same.
          if (input.previous > merge.cursor.sequence) return;
          yield* merge.journal(input.sequence, input.message);
          if (merge.waits_for_text) yield* finishText(true);
          break;
        default:
          input satisfies never;
      }
    }
  }

  try {
    let retry_ms = RETRY_FIRST_MS;
    if (heard_all) yield* live(true); // F4
    while (!tap.closed) {
      try {
        yield* catchUp();
        retry_ms = RETRY_FIRST_MS;
      } catch (error) {
        if (error instanceof BrokenPromise) throw error;
        log.debug("feed waits for the bus", { actor: actorPath(session), ...errorFields(error) });
        await pause(world, retry_ms);
        retry_ms = Math.min(RETRY_MAX_MS, retry_ms * 2);
        continue;
      }
      yield* live(false);
    }
  } finally {
    tap.close();
  }
}

/** One page of a session's events after a cursor: no tokens, nothing live. Rejects when the bus cannot answer. */
export async function readEventPage(
  bus: Bus,
  session: ActorAddress,
  start: Cursor,
  limit: number,
): Promise<{ items: Extract<Frame, { kind: "event" }>[]; more: boolean }> {
  const merge = createMerge(start);
  const items: Extract<Frame, { kind: "event" }>[] = [];
  for await (const stored of bus.read("EVENTS", eventsSubject(session), Math.max(1, start.sequence))) {
    const frames = [...merge.journal(stored.sequence, decodeJournal(stored.data, session)), ...merge.textRead()];
    for (const frame of frames) {
      if (frame.kind !== "event") continue;
      if (items.length === limit) return { items, more: true };
      items.push(frame);
    }
  }
  return { items, more: false };
}

/**
 * The cursor just before the journal message that decided entry `seq`, found from `base` on, which must not be after it.
 * Answers `base` when the entry is not there yet: it is before the entry too.
 */
export async function cursorBefore(bus: Bus, session: ActorAddress, base: Cursor, seq: number): Promise<Cursor> {
  let before = base;
  for await (const stored of bus.read("EVENTS", eventsSubject(session), base.sequence + 1)) {
    const message = decodeJournal(stored.data, session);
    if (message.seq >= seq) return before;
    before = { sequence: stored.sequence, events: message.events.length };
  }
  return base;
}
