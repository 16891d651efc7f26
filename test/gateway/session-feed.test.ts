// Goal: over a bus that loses, delays and overtakes live messages, is cut off and restarts without its tokens, every reader of a session
//       gets the whole feed, however slow it is and wherever it begins; and readers cost the bus one pair of subscriptions.
// Method: sessions written onto the in-memory bus in virtual time, faults drawn from a seed that is printed, real hub and feeds.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { createMemoryBroker, type FaultBefore, type MemoryBroker, type Operation } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { type Cursor, CURSOR_START } from "../../gateway/cursor.ts";
import { createFeedHub, createTap, type FeedHub, type LiveInput, TAP_BYTES_MAX, TAP_INPUTS_MAX } from "../../gateway/feed-hub.ts";
import { cursorBefore, earlySessionFeed, type FeedItem, readEventPage, sessionFeed } from "../../gateway/session-feed.ts";
import { type ActorEvent, decodeJournal } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { pause } from "../../protocol/world.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";
import { type DrawnSession, drawSession, encodeWritten, planOf, SESSION, type SessionPlan, type Written } from "./drawn-session.ts";

interface Stage {
  readonly world: VirtualWorld;
  readonly broker: MemoryBroker;
  readonly writer: Bus;
  readonly gateway: Bus;
  readonly hub: FeedHub;
  readonly heard: { behind: number };
}

function stageOf(seed: number, before: (operation: Operation) => FaultBefore | undefined = () => undefined): Stage {
  const world = new VirtualWorld(seed);
  const broker = createMemoryBroker({
    world,
    shards: 4,
    faults: { before: (operation) => (operation.connection === "gateway" ? before(operation) : undefined) },
  });
  const heard = { behind: 0 };
  const gateway = broker.connect("gateway");
  const hub = createFeedHub({ bus: gateway, world, log: silentLog, on_behind: () => void heard.behind++ });
  return { world, broker, writer: broker.connect("worker"), gateway, hub, heard };
}

/** Writes a session as its worker would, and lets time pass until it is written. */
function write(stage: Stage, session: DrawnSession, gap_ms: (index: number) => number, after = 0): () => Promise<void> {
  let written = false;
  const writing = writeAll(stage, session, gap_ms, after).then(() => (written = true));
  return async () => {
    await stage.world.until(() => written, 600_000);
    await writing;
  };
}

/** Journal messages go behind their fence, chunks beside them. */
async function writeAll({ writer, world }: Stage, session: DrawnSession, gap_ms: (index: number) => number, after: number): Promise<void> {
  let last = after;
  for (const [index, one] of session.written.entries()) {
    if (one.kind === "journal") {
      let outcome = await writer.append({
        subject: actorSubject(SESSION, "event"),
        data: encodeWritten(one),
        expected_last_sequence: last,
        commit_id: `w.${after}.${index}`,
      });
      while (outcome.kind === "unavailable") {
        await pause(world, 100);
        outcome = await writer.append({
          subject: actorSubject(SESSION, "event"),
          data: encodeWritten(one),
          expected_last_sequence: last,
          commit_id: `w.${after}.${index}`,
        });
      }
      if (outcome.kind !== "committed") throw new Error(`the writer of this test is alone, but ${JSON.stringify(outcome)}`);
      last = outcome.sequence;
    } else {
      const outcome = await writer.publish(actorSubject(SESSION, "token"), encodeWritten(one), { patience_ms: 1000 });
      if (outcome.kind !== "stored" && outcome.kind !== "unavailable") throw new Error(`a chunk was ${outcome.kind}`);
    }
    const ms = gap_ms(index);
    if (ms > 0) await pause(world, ms);
  }
}

interface Reader {
  readonly items: FeedItem[];
  readonly ended: Promise<void>;
  stop(): void;
}

async function read({ gateway, hub, world }: Stage, start: Cursor, pause_ms: (index: number) => number = () => 0): Promise<Reader> {
  const abort = new AbortController();
  const items: FeedItem[] = [];
  const feed = await sessionFeed({ bus: gateway, hub, world, log: silentLog }, SESSION, start, abort.signal);
  const run = async (): Promise<void> => {
    for await (const item of feed) {
      items.push(item);
      const ms = pause_ms(items.length);
      if (ms > 0) await pause(world, ms);
    }
  };
  return { items, ended: run(), stop: () => abort.abort() };
}

const eventsIn = (one: Written): readonly ActorEvent[] => (one.kind === "journal" ? one.message.events : []);
const eventsOf = (items: readonly FeedItem[]): ActorEvent[] => items.flatMap((item) => (item.kind === "event" ? [item.event] : []));

/** What a client has shown of each step when its end came. */
function textsOf(items: readonly FeedItem[]): Map<string, string> {
  const open = new Map<string, { attempt: number; text: string }>();
  const finished = new Map<string, string>();
  for (const item of items) {
    if (item.kind === "token") {
      const key = `${item.turn}.${item.step}`;
      const before = open.get(key);
      const kept = before?.attempt === item.attempt ? before.text : "";
      open.set(key, { attempt: item.attempt, text: item.channel === undefined ? kept + item.text : kept });
    } else if (item.kind === "event") {
      const key = `${String(item.event["turn"])}.${String(item.event["step"])}`;
      if (item.event.type === "superseded") open.set(key, { attempt: Number(item.event["attempt"]) + 1, text: "" });
      if (item.event.type === "model.completed") finished.set(key, open.get(key)?.text ?? "");
    }
  }
  return finished;
}

function expectWhole(items: readonly FeedItem[], session: DrawnSession, where: string): void {
  expect(eventsOf(items), where).toEqual(session.events);
  expect(textsOf(items), where).toEqual(session.texts);
}

const complete = (reader: Reader, session: DrawnSession) => (): boolean => eventsOf(reader.items).length >= session.events.length;

const PLAN: SessionPlan = [
  [
    { text: "first I look it up", cuts: [5, 7, 12], reasoning_at: 0, lost_after: [2], ending: "completed" },
    { text: "and here it is", cuts: [3, 6, 9], reasoning_at: -1, lost_after: [], ending: "completed" },
  ],
  [{ text: "once more, with feeling", cuts: [4, 10, 15, 20], reasoning_at: 2, lost_after: [3, 1], ending: "completed" }],
];

describe("a session's feed", () => {
  test("whatever is lost, delayed, cut off or restarted, readers that begin anywhere and at any pace get all of it once and in order", async () => {
    let faults = 0;
    let resumed = 0;
    const plans = fc.sample(planOf(fc), { numRuns: 300, seed: 7 });
    for (const [seed, plan] of plans.entries()) {
      const random = seededRandom(seed);
      const pick = (below: number): number => Math.floor(random() * below);
      let reads_fail = false;
      const stage = stageOf(seed, ({ kind }) => {
        if (kind === "read" && reads_fail && pick(40) === 0) return (void faults++, { kind: "unavailable" });
        if (kind !== "hear") return undefined;
        const luck = pick(10);
        if (luck < 2) return (void faults++, { kind: "unavailable" });
        if (luck < 4) return (void faults++, { kind: "delay", ms: pick(60) });
        return undefined;
      });
      const { world, broker } = stage;
      const session = drawSession(plan);
      const writing = write(stage, session, () => (pick(3) === 0 ? 0 : pick(30)));
      const early = await read(stage, CURSOR_START);
      const slow = await read(stage, CURSOR_START, () => pick(50));
      const trouble = pick(4);
      reads_fail = trouble === 3;
      if (trouble === 1)
        world.after(pick(200), () => {
          broker.cut("gateway");
          world.after(pick(400), () => broker.mend("gateway"));
        });
      if (trouble === 2) world.after(pick(200), () => void broker.restart(pick(400)));
      await world.until(complete(early, session), 120_000);
      await world.until(complete(slow, session), 120_000);
      await writing();
      reads_fail = false;
      const where = `seed ${seed}, trouble ${trouble}`;
      expectWhole(early.items, session, where);
      expectWhole(slow.items, session, `${where}, slow`);
      // From the cursor of a few of the frames the rest comes again, over another feed.
      for (let n = 0; n < 3; n++) {
        const index = pick(early.items.length);
        const item = early.items[index];
        if (item === undefined || item.kind === "gap") continue;
        const before = early.items.slice(0, index + 1);
        const rest = await read(stage, item.cursor);
        await world.until(() => eventsOf([...before, ...rest.items]).length >= session.events.length, 60_000);
        expectWhole([...before, ...rest.items], session, `${where}, resumed after ${index}`);
        rest.stop();
        resumed += 1;
      }
      early.stop();
      slow.stop();
      await world.advance(5_000);
      await Promise.all([early.ended, slow.ended]);
      expect(stage.hub.size()).toEqual({ sessions: 0, readers: 0 });
      await stage.hub.stop();
    }
    expect(faults).toBeGreaterThan(200);
    expect(resumed).toBeGreaterThan(100);
  });

  test("without faults chunks come as they were written, each before anything later is written", async () => {
    const stage = stageOf(1);
    const session = drawSession(PLAN);
    const reader = await read(stage, CURSOR_START);
    const seen: number[] = [];
    await stage.world.until(() => false, 0);
    const writing = write(stage, session, () => (seen.push(reader.items.length), 25));
    await stage.world.until(complete(reader, session), 60_000);
    await writing();
    const chunks = session.written.filter((one) => one.kind === "chunk");
    expect(reader.items.filter((item) => item.kind === "token")).toHaveLength(chunks.length);
    // Items rise with what is written: nothing is held back to the end.
    expect(seen.at(-1)).toBeGreaterThan((seen.at(Math.floor(seen.length / 2)) ?? 0) + 5);
    reader.stop();
  });

  test("many readers of one session are one pair of subscriptions, and the last to leave ends it", async () => {
    const stage = stageOf(2);
    let subscriptions = 0;
    const counted: Bus = new Proxy(stage.gateway, {
      get(target, name) {
        const value: unknown = Reflect.get(target, name, target);
        return typeof value === "function"
          ? (...args: unknown[]) => {
              if (name === "subscribe") subscriptions += 1;
              return (value as (...all: unknown[]) => unknown).apply(target, args);
            }
          : value;
      },
    });
    const hub = createFeedHub({ bus: counted, world: stage.world, log: silentLog });
    const taps = await Promise.all(Array.from({ length: 20 }, () => hub.attach(SESSION)));
    expect(subscriptions).toBe(2);
    expect(hub.size()).toEqual({ sessions: 1, readers: 20 });
    for (const tap of taps) tap.close();
    expect(hub.size()).toEqual({ sessions: 0, readers: 0 });
    expect(await taps[0]?.next()).toEqual({ kind: "closed" });
  });

  test("a reader that stands still loses its place in the live tail, is told where, and loses nothing; the others notice nothing", async () => {
    const stage = stageOf(3);
    const { world } = stage;
    const cuts = Array.from({ length: 3000 }, (_, index) => (index + 1) * 2);
    const session = drawSession([[{ text: "ab".repeat(3001), cuts, reasoning_at: -1, lost_after: [], ending: "completed" }]]);
    const fast = await read(stage, CURSOR_START);
    const slow = await read(stage, CURSOR_START, (index) => (index === 5 ? 60_000 : 0));
    const writing = write(stage, session, (index) => (index % 50 === 0 ? 1 : 0));
    await world.until(complete(fast, session), 30_000);
    await writing();
    expect(stage.heard.behind).toBe(1);
    expect(slow.items.length).toBe(5);
    expect(fast.items.filter((item) => item.kind === "gap")).toEqual([]);
    expectWhole(fast.items, session, "fast");
    await world.until(complete(slow, session), 120_000);
    expect(slow.items.filter((item) => item.kind === "gap")).toHaveLength(1);
    expectWhole(slow.items, session, "slow");
    fast.stop();
    slow.stop();
  });

  test("two tenants with the same session id hear nothing of each other", async () => {
    const stage = stageOf(4);
    const session = drawSession(PLAN);
    const abort = new AbortController();
    const items: FeedItem[] = [];
    const foreign = await sessionFeed(
      { bus: stage.gateway, hub: stage.hub, world: stage.world, log: silentLog },
      { ...SESSION, tenant: "rival" },
      CURSOR_START,
      abort.signal,
    );
    const ended = (async () => {
      for await (const item of foreign) items.push(item);
    })();
    const own = await read(stage, CURSOR_START);
    await write(stage, session, () => 0)();
    await stage.world.until(complete(own, session), 10_000);
    await stage.world.advance(60_000);
    expect(items).toEqual([]);
    abort.abort();
    own.stop();
    await ended;
  });

  test("a feed that hears of a message whose predecessor it has not seen reads the stream, whatever the hub promised", async () => {
    const stage = stageOf(8);
    const session = drawSession(PLAN);
    const { world } = stage;
    const tap = createTap(world, { token_floor: () => 1, on_behind() {}, on_close() {} });
    const forgetful: FeedHub = {
      listen: () => ({ tap, begins() {}, looked: async () => {} }),
      attach: async () => tap,
      size: () => ({ sessions: 1, readers: 1 }),
      stop: async () => {},
    };
    const reader = await read({ ...stage, hub: forgetful }, CURSOR_START);
    await world.advance(10);
    await write(stage, session, () => 0)();
    expect(reader.items).toEqual([]);
    const last = (await stage.gateway.last("EVENTS", actorSubject(SESSION, "event")))!;
    tap.offer({ kind: "journal", sequence: last.sequence, previous: last.sequence - 1, message: decodeJournal(last.data), bytes: 1 });
    await world.until(complete(reader, session), 1_000);
    expectWhole(reader.items, session, "the hub forgot all but the last");
    reader.stop();
  });

  /** Written up to the first turn's end before the feed listens; told where that was, as whoever says the second turn's message is. */
  async function continued(stage: Stage, deaf_for: (index: number) => boolean = () => false, hear: (deaf: boolean) => void = () => {}) {
    const session = drawSession(PLAN);
    const { written } = session;
    const middle = written.findIndex((one) => eventsIn(one).some(({ type }) => type === "turn.completed")) + 1;
    await write(stage, { ...session, written: written.slice(0, middle) }, () => 0)();
    const { sequence } = (await stage.gateway.last("EVENTS", actorSubject(SESSION, "event")))!;
    const abort = new AbortController();
    const early = earlySessionFeed({ bus: stage.gateway, hub: stage.hub, world: stage.world, log: silentLog }, SESSION, abort.signal);
    const items: FeedItem[] = [];
    hear(deaf_for(-1));
    const writing = write(
      stage,
      { ...session, written: written.slice(middle) },
      (index) => {
        hear(deaf_for(index));
        return 1;
      },
      sequence,
    );
    const told = sequence;
    const given = (async () => {
      await pause(stage.world, 3); // the answer comes after the first of what it caused
      for await (const item of early.after(told)) items.push(item);
    })();
    const before = written.slice(0, middle).flatMap(eventsIn).length;
    return { session, items, writing, given, events_after: session.events.slice(before), stop: () => abort.abort() };
  }

  test("F4: who listened before it spoke is given what followed without a look at the streams", async () => {
    let reads = 0;
    const stage = stageOf(9, ({ kind, connection }) => {
      if (kind === "read" && connection === "gateway") reads += 1;
      return undefined;
    });
    const { items, writing, given, events_after, stop } = await continued(stage);
    reads = 0;
    await stage.world.until(() => eventsOf(items).length >= 2, 50);
    expect(eventsOf(items).length).toBeGreaterThanOrEqual(2);
    expect(reads).toBe(0);
    await stage.world.until(() => eventsOf(items).length >= events_after.length, 10_000);
    await writing();
    expect(eventsOf(items)).toEqual(events_after);
    stop();
    await given;
  });

  test("F4: when the first of what followed is not heard, the streams are read after all", async () => {
    let deaf = false;
    const stage = stageOf(10, ({ kind }) => (deaf && kind === "hear" ? { kind: "unavailable" } : undefined));
    const { items, writing, given, events_after, stop } = await continued(
      stage,
      () => true,
      (is) => (deaf = is),
    );
    // Long before the hub looks by itself whether it missed something.
    await stage.world.until(() => eventsOf(items).length >= 2, 500);
    expect(eventsOf(items).length).toBeGreaterThanOrEqual(2);
    await stage.world.until(() => eventsOf(items).length >= events_after.length, 100_000);
    await writing();
    expect(eventsOf(items)).toEqual(events_after);
    stop();
    await given;
  });

  test("when the very last live message is lost, it is found within seconds", async () => {
    let deaf = false;
    const stage = stageOf(5, ({ kind }) => (deaf && kind === "hear" ? { kind: "unavailable" } : undefined));
    const session = drawSession(PLAN);
    const reader = await read(stage, CURSOR_START);
    const { written } = session;
    const last = written.length - 1;
    const writing = write(stage, session, (index) => {
      deaf = index >= last - 1;
      return 1;
    });
    await stage.world.until(complete(reader, session), 4_000);
    await writing();
    expectWhole(reader.items, session, "the end was lost");
    reader.stop();
  });
});

describe("a page of events", () => {
  test("pages of any size, one after the other, hold every event once and in order", async () => {
    for (const limit of [1, 2, 3, 7, 100]) {
      const stage = stageOf(6);
      const session = drawSession(PLAN);
      await write(stage, session, () => 0)();
      const events: ActorEvent[] = [];
      let cursor = CURSOR_START;
      for (let more = true; more;) {
        const page = await readEventPage(stage.gateway, SESSION, cursor, limit);
        expect(page.items.length).toBeLessThanOrEqual(limit);
        events.push(...page.items.map((item) => item.event));
        cursor = page.items.at(-1)?.cursor ?? cursor;
        more = page.more;
      }
      expect(events, `limit ${limit}`).toEqual(session.events);
    }
  });

  test("the cursor before an entry lets a reader begin exactly there", async () => {
    const stage = stageOf(7);
    const session = drawSession(PLAN);
    await write(stage, session, () => 0)();
    const journal = session.written.flatMap((one) => (one.kind === "journal" ? [one.message] : []));
    for (const message of journal) {
      const cursor = await cursorBefore(stage.gateway, SESSION, CURSOR_START, message.seq);
      const page = await readEventPage(stage.gateway, SESSION, cursor, 1);
      expect(page.items[0]?.seq).toBe(message.seq);
    }
    const missing = await cursorBefore(stage.gateway, SESSION, CURSOR_START, 10_000);
    expect(missing).toEqual(CURSOR_START);
  });
});

describe("H2: a tap", () => {
  const input = (bytes: number): LiveInput => ({ kind: "chunk", bytes, chunk: { turn: 1, step: 0, attempt: 1, epoch: 1, index: 0, text: "" } });
  const tapOf = (behind: { count: number }) => createTap(new VirtualWorld(1), { token_floor: () => 1, on_behind: () => void behind.count++, on_close() {} });

  test.each([
    ["inputs", TAP_INPUTS_MAX, 10],
    ["bytes", 8, TAP_BYTES_MAX / 8],
  ])("holds %s up to its bound, then forgets them all, says so once, and goes on with what comes after it was heard", async (_, fits, bytes) => {
    const behind = { count: 0 };
    const tap = tapOf(behind);
    for (let n = 0; n < fits; n++) tap.offer(input(bytes));
    expect(behind.count).toBe(0);
    for (let n = 0; n < 3; n++) tap.offer(input(bytes));
    expect(behind.count).toBe(1);
    expect(await tap.next()).toEqual({ kind: "behind" });
    tap.offer(input(7));
    expect(await tap.next()).toEqual(input(7));
  });

  test("takes one message larger than its bound when it is empty, since the reader could never get it otherwise", async () => {
    const behind = { count: 0 };
    const tap = tapOf(behind);
    tap.offer(input(TAP_BYTES_MAX + 1));
    expect((await tap.next()).kind).toBe("chunk");
    expect(behind.count).toBe(0);
  });
});
