// feed-merge: a session's journal and the chunks of its model calls, merged into one ordered feed. Pure: no socket, no clock.
//
//   journal messages, in order ──┐
//                                ├──▶ merge ──▶ frames, each with the cursor just after it
//   chunks, in any order, twice ─┘
//
//   a step:  (none) ──model.started──▶ open ──chunks by index──▶ open ──model.completed──▶ its text whole ──▶ (none)
//                                       │  └──superseded──▶ open, next attempt, from its first chunk
//                                       └──model.failed──▶ open for the attempt after it; the turn's end closes it
//
// Given the journal in order without gaps, and chunks in whatever order, repeated or lost:
//   M1. Every event is given exactly once, in the journal's order.
//   M2. The texts of a finished step's last attempt, run together, are exactly its finished text, all before `model.completed`.
//   M3. A chunk is given at most once, in the order of its index, and never after a chunk of a higher attempt of its step.
//   M4. Going on from any frame's cursor gives the frames after it (text may be cut into other pieces).
//   M5. At most HELD_CHUNKS_MAX chunks are held. What is held no longer comes out of the journal at the end of the step.
import { assert } from "../protocol/assert.ts";
import type { ActorEvent, JournalMessage } from "../protocol/journal.ts";
import type { TokenChunk } from "../protocol/tokens.ts";
import { CURSOR_START, type Cursor, type StepPlace } from "./cursor.ts";

export type Frame =
  | { readonly kind: "event"; readonly cursor: Cursor; readonly event: ActorEvent; readonly seq: number; readonly at: string; readonly state: string }
  | {
      readonly kind: "token";
      readonly cursor: Cursor;
      readonly turn: number;
      readonly step: number;
      readonly attempt: number;
      readonly index: number;
      readonly text: string;
      readonly channel?: "reasoning" | "tool_call";
    };

/** Enough for a minute of chunks that overtook a lost one; a chunk is some 100 bytes. */
export const HELD_CHUNKS_MAX = 4096;

/** The `index` of a place after the last chunk of its attempt: nothing more of it is given. Cursors hold it, so it stays. */
const INDEX_PAST_ALL = 2 ** 31 - 1;

export interface Merge {
  /** Just after the last frame. */
  readonly cursor: Cursor;
  /** The next journal message; one that was given already gives nothing. Not to be called while `waits_for_text`. */
  journal(sequence: number, message: JournalMessage): Frame[];
  chunk(chunk: TokenChunk): Frame[];
  /** A finished step's text is not whole yet. The caller gives the chunks it can still find, then says textRead(). */
  readonly waits_for_text: boolean;
  /** No more chunks will be found: what is missing comes out of the finished message. */
  textRead(): Frame[];
  /** Chunks are held that the journal, as far as it was given, does not explain. The caller reads it to its end, then says journalRead(). */
  readonly ahead_of_journal: boolean;
  /**
   * The journal was given to its end. A call stands in the journal before its first chunk is sent, so held chunks of a step that is
   * still unknown are of one that was over before this feed began; a higher attempt of the open step is one its worker made by itself.
   */
  journalRead(): Frame[];
}

const isNumber = (value: unknown): value is number => typeof value === "number";

/** Is step a of turn at before, in or after step b? */
const compareSteps = (a: { turn: number; step: number }, b: { turn: number; step: number }): number => a.turn - b.turn || a.step - b.step;

/** What the model said in the call that this message ends, or undefined when it ends none. */
function finishedText(message: JournalMessage): string | undefined {
  for (const entry of message.entries.toReversed()) {
    if (entry.t !== "done" || !entry.inst.endsWith(":model")) continue;
    const { output } = entry;
    if (output !== null && typeof output === "object" && !Array.isArray(output)) {
      const { text } = output as { readonly text?: unknown };
      if (typeof text === "string") return text;
    }
  }
  return undefined;
}

export function createMerge(start: Cursor = CURSOR_START): Merge {
  let sequence = start.sequence;
  let given = start.events;
  let place: StepPlace | undefined = start.place;
  /** Chunks that wait for one before them, for an attempt or a step that the journal has not told of. */
  let held: TokenChunk[] = [];
  /** While no step is open, chunks of steps up to this one are dropped: they are over. */
  let over: { turn: number; step: number } | undefined;
  /** The message that is being given, while its step's text is awaited. */
  let halted: { message: JournalMessage; text: string } | undefined;

  const cursor = (): Cursor => (place === undefined ? { sequence, events: given } : { sequence, events: given, place });

  function close(): void {
    if (place && (over === undefined || compareSteps(place, over) > 0)) over = { turn: place.turn, step: place.step };
    place = undefined;
  }

  /** Void for good: of a step that is over, an attempt that was superseded, an owner that lost the actor, or given already (M3). */
  function isVoid(chunk: TokenChunk): boolean {
    if (place === undefined) return over !== undefined && compareSteps(chunk, over) <= 0;
    const order = compareSteps(chunk, place);
    if (order !== 0) return order < 0;
    return chunk.epoch < place.epoch || chunk.attempt < place.attempt || (chunk.attempt === place.attempt && chunk.index < place.index);
  }

  const isNext = (chunk: TokenChunk): boolean =>
    place !== undefined && compareSteps(chunk, place) === 0 && chunk.attempt === place.attempt && chunk.index === place.index;

  function give(chunk: TokenChunk): Frame[] {
    assert(place !== undefined, "a chunk is given while its step is open");
    const characters = place.characters + (chunk.channel === undefined ? chunk.text.length : 0);
    place = { ...place, index: chunk.end ? INDEX_PAST_ALL : chunk.index + 1, characters };
    if (chunk.text === "") return [];
    const { turn, step, attempt, index, text, channel } = chunk;
    return [{ kind: "token", cursor: cursor(), turn, step, attempt, index, text, ...(channel === undefined ? {} : { channel }) }];
  }

  /** Gives every held chunk whose turn has come, and forgets the void ones. */
  function flush(): Frame[] {
    const frames: Frame[] = [];
    if (held.length === 0) return frames;
    held = held.filter((chunk) => !isVoid(chunk)).toSorted((a, b) => compareSteps(a, b) || a.attempt - b.attempt || a.index - b.index);
    const kept: TokenChunk[] = [];
    for (const chunk of held) {
      if (isNext(chunk)) frames.push(...give(chunk));
      else if (!isVoid(chunk)) kept.push(chunk);
    }
    held = kept;
    return frames;
  }

  /** The rest of a finished step's text, as one chunk (M2). */
  function remainder(text: string): Frame[] {
    assert(place !== undefined, "the remainder belongs to the open step");
    if (place.characters >= text.length) return [];
    const { turn, step, attempt, epoch, index, characters } = place;
    return give({ turn, step, attempt, epoch, index, text: text.slice(characters), end: true });
  }

  /** Moves the step along before an event is given. */
  function before(event: ActorEvent, message: JournalMessage): void {
    const { type, turn, step, attempt } = event;
    const same = place !== undefined && place.turn === turn && place.step === step;
    switch (type) {
      case "model.started": {
        if (!isNumber(turn) || !isNumber(step)) return;
        const first = same && place ? place.attempt : 1;
        if (!same) close();
        place = { turn, step, attempt: isNumber(attempt) ? attempt : first, epoch: message.epoch, index: 0, characters: 0 };
        return;
      }
      case "superseded":
      case "model.failed":
        // The attempt is over; what it said is void. If the step goes on, it is with the next attempt.
        if (same && place) {
          const next = (isNumber(attempt) ? attempt : place.attempt) + 1;
          if (next > place.attempt) place = { ...place, attempt: next, epoch: type === "superseded" ? message.epoch : place.epoch, index: 0, characters: 0 };
        }
        return;
      case "model.completed":
        if (same) close();
        return;
      case "turn.completed":
      case "turn.failed":
      case "turn.cancelled":
        if (place?.turn === turn) close();
        return;
      default:
    }
  }

  /** Gives the rest of a message's events, or halts before the end of a step whose text is not whole. */
  function proceed(message: JournalMessage): Frame[] {
    const frames: Frame[] = [];
    while (given < message.events.length) {
      const event = message.events[given];
      assert(event !== undefined, "an event stands at every place of a message");
      if (event.type === "model.completed" && place !== undefined && event["turn"] === place.turn && event["step"] === place.step) {
        const { attempt } = event;
        if (isNumber(attempt) && attempt > place.attempt) {
          place = { ...place, attempt, index: 0, characters: 0 };
          frames.push(...flush());
        }
        const text = finishedText(message);
        if (text !== undefined && place.index < INDEX_PAST_ALL) {
          halted = { message, text };
          return frames;
        }
        if (text !== undefined) frames.push(...remainder(text));
      }
      before(event, message);
      given += 1;
      frames.push({ kind: "event", cursor: cursor(), event, seq: message.seq, at: message.at, state: message.state });
    }
    frames.push(...flush());
    return frames;
  }

  /** Ends the wait for a step's text: gives what is missing of it, then the events after it. */
  function release(): Frame[] {
    assert(halted !== undefined, "text is released where it was awaited");
    const { message, text } = halted;
    halted = undefined;
    const rest = remainder(text);
    if (place) place = { ...place, index: INDEX_PAST_ALL };
    return [...rest, ...proceed(message)];
  }

  return {
    get cursor() {
      return cursor();
    },
    get waits_for_text() {
      return halted !== undefined;
    },
    get ahead_of_journal() {
      return held.some((chunk) => place === undefined || compareSteps(chunk, place) > 0 || chunk.attempt > place.attempt);
    },
    journal(next, message) {
      assert(halted === undefined, "a journal message is given after the one before it");
      if (next < sequence) return [];
      if (next > sequence) {
        sequence = next;
        given = 0;
      }
      return proceed(message);
    },
    chunk(chunk) {
      if (isVoid(chunk)) return [];
      if (!isNext(chunk)) {
        const known = held.some((one) => compareSteps(one, chunk) === 0 && one.attempt === chunk.attempt && one.index === chunk.index);
        if (!known && held.length < HELD_CHUNKS_MAX) held.push(chunk); // M5
        return [];
      }
      const frames = [...give(chunk), ...flush()];
      return halted !== undefined && place?.index === INDEX_PAST_ALL ? [...frames, ...release()] : frames;
    },
    textRead() {
      return halted === undefined ? [] : release();
    },
    journalRead() {
      const frames: Frame[] = [];
      if (place !== undefined) {
        const here = place;
        const attempts = held.filter((chunk) => compareSteps(chunk, here) === 0).map((chunk) => chunk.attempt);
        const highest = Math.max(here.attempt, ...attempts);
        if (highest > here.attempt) place = { ...here, attempt: highest, index: 0, characters: 0 };
        frames.push(...flush());
      }
      for (const chunk of held) {
        if (place !== undefined && compareSteps(chunk, place) <= 0) continue;
        if (over === undefined || compareSteps(chunk, over) > 0) over = { turn: chunk.turn, step: chunk.step };
      }
      held = held.filter((chunk) => place !== undefined && compareSteps(chunk, place) === 0);
      return frames;
    },
  };
}
