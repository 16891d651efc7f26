// Goal: whatever comes late, twice, out of order or never, a reader gets every event once, in order, and of every finished step
//       exactly its text, from any cursor on.
// Method: sessions drawn by fast-check, their journal in order and their chunks in any order, repeated, lost and found again;
//         going on from the cursor of every frame with another delivery of the same session.
import fc from "fast-check";
import { expect, test } from "vitest";
import { type Cursor, decodeCursor, encodeCursor } from "../../gateway/cursor.ts";
import { createMerge, type Frame, HELD_CHUNKS_MAX, type Merge } from "../../gateway/feed-merge.ts";
import { encodeJournal, decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import type { TokenChunk } from "../../protocol/tokens.ts";
import { drawSession, type DrawnSession, planOf, SESSION } from "./drawn-session.ts";

/** How one delivery treats the chunks: a stream of numbers that never ends. */
interface Luck {
  next(below: number): number;
}
const luckOf = (seed: number): Luck => {
  let state = seed >>> 0;
  return {
    next(below) {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    },
  };
};

const journalOf = (session: DrawnSession): { sequence: number; message: JournalMessage }[] =>
  session.written.flatMap((one, index) =>
    one.kind === "journal" ? [{ sequence: 10 + index * 3, message: decodeJournal(encodeJournal(one.message), SESSION) }] : [],
  );
const chunksOf = (session: DrawnSession): TokenChunk[] => session.written.flatMap((one) => (one.kind === "chunk" ? [one.chunk] : []));

/** Delivers a session to a merge: the journal in order, the chunks as luck has it. */
function deliver(session: DrawnSession, merge: Merge, luck: Luck): Frame[] {
  const frames: Frame[] = [];
  const journal = journalOf(session);
  const pool: TokenChunk[] = [];
  for (const chunk of chunksOf(session)) {
    const times = [1, 1, 1, 1, 2, 0][luck.next(6)] ?? 1;
    for (let n = 0; n < times; n++) pool.splice(luck.next(3) === 0 ? luck.next(pool.length + 1) : pool.length, 0, chunk);
  }
  let next = 0;
  while (next < journal.length || pool.length > 0) {
    const chunk = luck.next(3) > 0 ? pool.shift() : undefined;
    if (chunk) {
      frames.push(...merge.chunk(chunk));
      continue;
    }
    const one = journal[next];
    if (one === undefined) continue;
    next += 1;
    frames.push(...merge.journal(one.sequence, one.message));
    if (luck.next(8) === 0) expect(merge.waits_for_text ? [] : merge.journal(one.sequence, one.message), "a message that was given gives nothing").toEqual([]);
    while (merge.waits_for_text) {
      const found = luck.next(2) === 0 ? chunksOf(session).filter(() => luck.next(4) > 0) : [];
      for (const again of found) if (merge.waits_for_text) frames.push(...merge.chunk(again));
      if (merge.waits_for_text) frames.push(...merge.textRead());
    }
    if (next === journal.length) frames.push(...merge.journalRead());
  }
  return frames;
}

const given = (frames: readonly Frame[]): object[] => frames.flatMap((frame) => (frame.kind === "event" ? [frame.event] : []));

/** What a client that obeys WIRE §4 has shown of each step when it was completed. */
function shownTexts(frames: readonly Frame[], started: ReadonlyMap<string, { attempt: number; text: string }> = new Map()): Map<string, string> {
  const open = new Map(started);
  const finished = new Map<string, string>();
  for (const frame of frames) {
    if (frame.kind === "token") {
      const key = `${frame.turn}.${frame.step}`;
      expect(finished.has(key), "M2: no text after the end of its step").toBe(false);
      const before = open.get(key);
      expect(frame.attempt, "M3: attempts only rise").toBeGreaterThanOrEqual(before?.attempt ?? 1);
      const kept = before?.attempt === frame.attempt ? before.text : "";
      open.set(key, { attempt: frame.attempt, text: frame.channel === undefined ? kept + frame.text : kept });
      continue;
    }
    const key = `${String(frame.event["turn"])}.${String(frame.event["step"])}`;
    if (frame.event.type === "superseded") open.set(key, { attempt: Number(frame.event["attempt"]) + 1, text: "" });
    if (frame.event.type === "model.completed") {
      finished.set(key, open.get(key)?.text ?? "");
    }
  }
  return finished;
}

test("M1, M2, M3: every event comes once and in order, and each finished step's text is whole before its model.completed", () => {
  fc.assert(
    fc.property(planOf(fc), fc.nat(), (plan, seed) => {
      const session = drawSession(plan);
      const frames = deliver(session, createMerge(), luckOf(seed));
      expect(given(frames)).toEqual(session.events);
      expect(shownTexts(frames)).toEqual(session.texts);
    }),
    { numRuns: 600 },
  );
});

test("M4: going on from the cursor of any frame gives exactly what comes after it", () => {
  let resumed = 0;
  fc.assert(
    fc.property(planOf(fc), fc.nat(), (plan, seed) => {
      const session = drawSession(plan);
      const luck = luckOf(seed);
      const frames = deliver(session, createMerge(), luck);
      frames.forEach((frame, index) => {
        const cursor = decodeCursor(encodeCursor(frame.cursor));
        expect(cursor).toEqual(frame.cursor);
        const before = frames.slice(0, index + 1);
        const after = deliver(session, createMerge(cursor as Cursor), luck);
        expect(given([...before, ...after])).toEqual(session.events);
        expect(shownTexts([...before, ...after])).toEqual(session.texts);
        resumed += 1;
      });
    }),
    { numRuns: 120 },
  );
  expect(resumed).toBeGreaterThan(1000);
});

test("cursors only rise: no two frames with text or an event have the same one", () => {
  fc.assert(
    fc.property(planOf(fc), fc.nat(), (plan, seed) => {
      const frames = deliver(drawSession(plan), createMerge(), luckOf(seed));
      expect(new Set(frames.map((frame) => encodeCursor(frame.cursor))).size).toBe(frames.length);
    }),
  );
});

test("when every chunk comes once and in order, each is given as it came and nothing is held", () => {
  fc.assert(
    fc.property(planOf(fc), (plan) => {
      const session = drawSession(plan);
      const merge = createMerge();
      const frames: Frame[] = [];
      session.written.forEach((one, index) => {
        frames.push(...(one.kind === "journal" ? merge.journal(index + 1, one.message) : merge.chunk(one.chunk)));
        expect(merge.waits_for_text).toBe(false);
        expect(merge.ahead_of_journal).toBe(false);
      });
      const tokens = frames.flatMap((frame) => (frame.kind === "token" ? [[frame.turn, frame.step, frame.attempt, frame.index, frame.text]] : []));
      expect(tokens).toEqual(
        chunksOf(session)
          .filter((chunk) => chunk.text !== "")
          .map(({ turn, step, attempt, index, text }) => [turn, step, attempt, index, text]),
      );
    }),
  );
});

const started = (turn: number, step: number, epoch = 1): JournalMessage => ({
  v: 1,
  actor: SESSION,
  seq: 1,
  epoch,
  worker: "w1",
  machine: "session@1",
  at: "2026-11-21T05:00:00.000Z",
  entries: [{ t: "command", type: "message.send", channel: "command", body: { content: "x" } }],
  state: "thinking",
  events: [{ type: "model.started", turn, step, model: "simulated/echo" }],
  out: [],
  out_confirmed_seq: 0,
});
const chunk = (fields: Partial<TokenChunk>): TokenChunk => ({ turn: 1, step: 0, attempt: 1, epoch: 1, index: 0, text: "a", ...fields });

test("chunks that overtook model.started are held, and given when it comes", () => {
  const merge = createMerge();
  expect(merge.chunk(chunk({ index: 1, text: "b" }))).toEqual([]);
  expect(merge.chunk(chunk({}))).toEqual([]);
  expect(merge.ahead_of_journal).toBe(true);
  expect(merge.journal(1, started(1, 0)).map((frame) => (frame.kind === "token" ? frame.text : frame.event.type))).toEqual(["model.started", "a", "b"]);
});

test("chunks of a step that the journal does not know, though it was read to its end, are dropped for good", () => {
  const merge = createMerge({ sequence: 9, events: 1 });
  merge.chunk(chunk({ index: 7 }));
  expect(merge.journalRead()).toEqual([]);
  expect(merge.ahead_of_journal).toBe(false);
  merge.chunk(chunk({ index: 8 }));
  expect(merge.ahead_of_journal).toBe(false);
  const frames = [...merge.journal(10, started(2, 0)), ...merge.chunk(chunk({ turn: 2 }))];
  expect(frames.map((frame) => frame.kind)).toEqual(["event", "token"]);
});

test("a higher attempt waits for `superseded`; where the journal has none, it is given once the journal was read", () => {
  const merge = createMerge();
  merge.journal(1, started(1, 0));
  merge.chunk(chunk({}));
  expect(merge.chunk(chunk({ attempt: 2, text: "z" }))).toEqual([]);
  expect(merge.ahead_of_journal).toBe(true);
  expect(merge.journalRead()).toMatchObject([{ kind: "token", attempt: 2, text: "z" }]);
  expect(merge.chunk(chunk({ index: 1, text: "late" }))).toEqual([]);
});

test("chunks of an owner that lost the actor are void, even with the attempt's number of the new owner", () => {
  const merge = createMerge();
  merge.journal(1, started(1, 0));
  const claim: JournalMessage = { ...started(1, 0, 2), events: [{ type: "superseded", turn: 1, step: 0, attempt: 1 }] };
  merge.journal(2, claim);
  expect(merge.chunk(chunk({ attempt: 2, epoch: 1, text: "zombie" }))).toEqual([]);
  expect(merge.chunk(chunk({ attempt: 2, epoch: 2, text: "heir" }))).toMatchObject([{ text: "heir" }]);
});

test("M5: chunks behind one that was lost are held up to a bound, and the text is whole all the same", () => {
  const merge = createMerge();
  merge.journal(1, started(1, 0));
  const pieces = HELD_CHUNKS_MAX + 50;
  for (let index = 1; index < pieces; index++) expect(merge.chunk(chunk({ index }))).toEqual([]);
  const text = "a".repeat(pieces);
  const done: JournalMessage = {
    ...started(1, 0),
    entries: [{ t: "done", inst: "1:model", output: { text } }],
    events: [{ type: "model.completed", turn: 1, step: 0, attempt: 1 }],
  };
  expect(merge.journal(2, done)).toEqual([]);
  expect(merge.waits_for_text).toBe(true);
  const frames = merge.textRead();
  expect(frames.map((frame) => (frame.kind === "token" ? frame.text : frame.event.type))).toEqual([text, "model.completed"]);
  expect(merge.cursor).toEqual({ sequence: 2, events: 1 });
});

test("M5: of chunks that wait for an earlier one no more than the bound are kept, and void ones take no room", () => {
  const merge = createMerge();
  merge.journal(1, started(1, 0));
  merge.journal(2, { ...started(1, 0, 2), events: [{ type: "superseded", turn: 1, step: 0, attempt: 1 }] });
  for (let index = 0; index < HELD_CHUNKS_MAX; index++) merge.chunk(chunk({ index, attempt: 1, epoch: 2 }));
  for (let index = 1; index < HELD_CHUNKS_MAX + 50; index++) merge.chunk(chunk({ index, attempt: 2, epoch: 2 }));
  expect(merge.chunk(chunk({ index: 0, attempt: 2, epoch: 2 }))).toHaveLength(HELD_CHUNKS_MAX + 1);
});
