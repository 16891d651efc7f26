// Goal: on a real broker a feed is live within milliseconds, and whole over a lost connection and a broker that dies with its tokens.
// Method: a nats-server of one's own; a session written by hand; two readers on one gateway, one more on another.
import { setTimeout as sleep } from "node:timers/promises";
import { afterEach, beforeEach, expect, test } from "vitest";
import type { Bus } from "../../bus/port.ts";
import { CURSOR_START } from "../../gateway/cursor.ts";
import { createFeedHub } from "../../gateway/feed-hub.ts";
import { type FeedItem, sessionFeed } from "../../gateway/session-feed.ts";
import type { ActorEvent } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { type Ground, jetStreamGround, realWorld } from "../contract/bus-grounds.ts";
import { type DrawnSession, drawSession, encodeWritten, SESSION } from "./drawn-session.ts";

let ground: Ground;
beforeEach(async () => {
  ground = await jetStreamGround();
});
afterEach(() => ground.stop());

interface Reader {
  readonly items: { item: FeedItem; at_ms: number }[];
  stop(): Promise<void>;
}

async function readers(bus: Bus, count: number): Promise<Reader[]> {
  const hub = createFeedHub({ bus, world: realWorld, log: silentLog });
  return Promise.all(
    Array.from({ length: count }, async (): Promise<Reader> => {
      const abort = new AbortController();
      const items: Reader["items"] = [];
      const feed = await sessionFeed({ bus, hub, world: realWorld, log: silentLog }, SESSION, CURSOR_START, abort.signal);
      const running = (async () => {
        for await (const item of feed) items.push({ item, at_ms: performance.now() });
      })();
      return {
        items,
        async stop() {
          abort.abort();
          await running;
        },
      };
    }),
  );
}

/** Writes on, whatever happens to the broker; answers when each was stored. */
async function write(bus: Bus, session: DrawnSession, gap_ms: number): Promise<number[]> {
  let last = 0;
  const stored_at_ms: number[] = [];
  for (const [index, one] of session.written.entries()) {
    const subject = actorSubject(SESSION, one.kind === "journal" ? "event" : "token");
    const data = encodeWritten(one);
    for (;;) {
      if (one.kind === "chunk") {
        if ((await bus.publish(subject, data, { patience_ms: 500 })).kind === "stored") break;
      } else {
        const outcome = await bus.append({ subject, data, expected_last_sequence: last, commit_id: `w.${index}` });
        if (outcome.kind === "committed") {
          last = outcome.sequence;
          break;
        }
        expect(outcome.kind).toBe("unavailable");
      }
      await sleep(50);
    }
    stored_at_ms.push(performance.now());
    await sleep(gap_ms);
  }
  return stored_at_ms;
}

const eventsOf = (reader: Reader): ActorEvent[] => reader.items.flatMap(({ item }) => (item.kind === "event" ? [item.event] : []));
const textOf = (reader: Reader, turn: number): string =>
  reader.items.flatMap(({ item }) => (item.kind === "token" && item.turn === turn && item.channel === undefined ? [item.text] : [])).join("");

const turns = Array.from({ length: 6 }, (_, index) => `turn ${index + 1} says a handful of words`);
const session = drawSession(turns.map((text) => [{ text, cuts: [3, 7, 9, 14, 20, 25, 28], reasoning_at: 2, lost_after: [], ending: "completed" as const }]));

function expectWhole(reader: Reader): void {
  expect(eventsOf(reader)).toEqual(session.events);
  turns.forEach((text, index) => expect(textOf(reader, index + 1)).toBe(text));
}

test("a chunk reaches every reader of every gateway within milliseconds, as it was written", async () => {
  const [writer, one, two] = [await ground.connect("writer"), await ground.connect("one"), await ground.connect("two")];
  const all = [...(await readers(one, 2)), ...(await readers(two, 1))];
  const stored = await write(writer, session, 5);
  const writing_ms = (stored.at(-1) ?? 0) - (stored[0] ?? 0);
  await expect.poll(() => Math.min(...all.map((reader) => eventsOf(reader).length)), { timeout: 20_000 }).toBe(session.events.length);
  for (const reader of all) {
    expectWhole(reader);
    const chunks = session.written.flatMap((written, index) => (written.kind === "chunk" && written.chunk.text !== "" ? [stored[index] ?? 0] : []));
    const tokens = reader.items.filter(({ item }) => item.kind === "token");
    expect(tokens).toHaveLength(chunks.length);
    const late = tokens.map(({ at_ms }, index) => at_ms - (chunks[index] ?? 0)).sort((a, b) => a - b);
    // Milliseconds; on any machine a small part of the time in which all of it was written.
    expect(late[Math.floor(late.length / 2)]).toBeLessThan(writing_ms / 5);
    await reader.stop();
  }
});

test("a gateway that loses its connection in the middle gives the rest when it has one again, with nothing twice", async () => {
  const [writer, one] = [await ground.connect("writer"), await ground.connect("one")];
  const [reader] = await readers(one, 1);
  if (reader === undefined) throw new Error("one reader was asked for");
  const writing = write(writer, session, 15);
  await sleep(200);
  ground.silence("one");
  await sleep(300);
  await ground.restore("one");
  await writing;
  await expect.poll(() => eventsOf(reader).length, { timeout: 15_000 }).toBe(session.events.length);
  expectWhole(reader);
  await reader.stop();
});

test("a broker that is killed in the middle takes its tokens with it, and readers get every text whole all the same", async () => {
  const [writer, one] = [await ground.connect("writer"), await ground.connect("one")];
  const [early, slow] = await readers(one, 2);
  if (early === undefined || slow === undefined) throw new Error("two readers were asked for");
  const writing = write(writer, session, 15);
  await sleep(250);
  await ground.down();
  await sleep(200);
  await ground.up();
  await writing;
  const [late] = await readers(one, 1);
  if (late === undefined) throw new Error("one more was asked for");
  for (const reader of [early, slow, late]) {
    await expect.poll(() => eventsOf(reader).length, { timeout: 15_000 }).toBe(session.events.length);
    expectWhole(reader);
    await reader.stop();
  }
});
