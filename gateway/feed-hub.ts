// feed-hub: the live tail of sessions, heard once in this process and handed to any number of readers.
//
//   live.….event ─┐                      ┌─▶ tap ─▶ reader
//                 ├─▶ one line a session ─┼─▶ tap ─▶ reader
//   live.….token ─┘      ▲               └─▶ tap ─▶ reader (slow: its tap says "behind")
//                        └─ gaps, reconnects and silence are repaired from the streams
//
// Owns: the NATS subscriptions of sessions that somebody reads, and each reader's bounded buffer.
// Leaves to session-feed.ts: catching up from a cursor, and merging.
//
// Invariants:
//   H1. However many readers a session has, it has one pair of subscriptions in this process.
//   H2. A tap holds at most TAP_INPUTS_MAX inputs and about TAP_BYTES_MAX bytes. Over that it forgets them all, says "behind" once and
//       goes on with what comes then: a slow reader loses only its place in the live tail, and costs the others nothing.
//   H3. Journal messages reach a tap in order, each once; from one to the next there is no gap unless "behind" stands between.
//      A line begins where the streams end, or where somebody says that they ended: what came before that was known is kept and sorted then.
//   H4. What tenant's session a tap hears is fixed when it is attached (A4).
import type { Bus, CoreMessage, StoredMessage, Subscription } from "../bus/port.ts";
import { headerOf } from "../bus/port.ts";
import { BrokenPromise } from "../protocol/assert.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { decodeJournal, type JournalMessage } from "../protocol/journal.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject, liveSubject } from "../protocol/subjects.ts";
import type { TokenChunk } from "../protocol/tokens.ts";
import { readChunk } from "./chunk.ts";
import type { World } from "../protocol/world.ts";

export type LiveInput =
  | { readonly kind: "journal"; readonly sequence: number; readonly previous: number; readonly message: JournalMessage; readonly bytes: number }
  | { readonly kind: "chunk"; readonly chunk: TokenChunk; readonly bytes: number };

/** What a tap answers: an input, or why there is none. */
export type TapAnswer =
  | LiveInput
  /** Inputs were forgotten: catch up from the streams. */
  | { readonly kind: "behind" }
  /** Nothing came within the patience. */
  | { readonly kind: "quiet" }
  | { readonly kind: "closed" };

/** Some seconds of a fast answer. */
export const TAP_INPUTS_MAX = 1024;
/** Holds the largest journal message (4 MiB) beside a usual backlog. */
export const TAP_BYTES_MAX = 8 * 1024 * 1024;
/** While a model speaks, a lost last message is found after this. */
const CHECK_BUSY_MS = 3_000;
/** In a session that waits for people, after this. */
const CHECK_RESTING_MS = 30_000;
const REPAIR_AGAIN_MS = 1_000;
/** After a reconnect every session is repaired; this many at once, so that the broker gets up in peace. */
const REPAIRS_AT_ONCE_MAX = 16;

/** Live messages kept until it is known where a line begins: some milliseconds' worth. More are read from the stream again. */
const EARLY_MAX = 256;

/** States in which more is about to come by itself. */
const BUSY_STATES: ReadonlySet<string> = new Set(["initializing", "thinking", "acting"]);

export interface Tap {
  /** The next input, in order. One call at a time. */
  next(patience_ms?: number): Promise<TapAnswer>;
  /** TOKENS holds nothing of this step before this stream sequence. */
  tokenFloor(step: { turn: number; step: number }): number;
  readonly closed: boolean;
  /** Ends a waiting next() with "closed". Calling it again does nothing. */
  close(): void;
}

/** A tap that listens from now on, before anything was read. */
export interface EarlyTap {
  readonly tap: Tap;
  /** Begins with what is stored after this journal message, which is the session's last but those that are heard by now. */
  begins(sequence: number): void;
  /** Begins with what is stored after now. Rejects when the bus cannot answer. */
  looked(): Promise<void>;
}

export interface FeedHub {
  /** A new reader's tap at once. One of its two beginnings must be said, or the tap be closed. */
  listen(actor: ActorAddress): EarlyTap;
  /**
   * A new reader's tap. What is stored after the promise is fulfilled reaches the tap or is announced by "behind".
   * Rejects when the bus cannot answer.
   */
  attach(actor: ActorAddress): Promise<Tap>;
  /** Sessions that are heard now, and their readers. */
  size(): { sessions: number; readers: number };
  /** Closes every tap. */
  stop(): Promise<void>;
}

export interface FeedHubDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** Told whenever a reader's buffer overflowed. */
  readonly on_behind?: () => void;
}

/** A reader's buffer (H2). Apart from the line, so that it can be tested by itself. */
export function createTap(
  world: World,
  options: { token_floor(step: { turn: number; step: number }): number; on_behind(): void; on_close(): void },
): Tap & {
  offer(input: LiveInput): void;
} {
  let inputs: LiveInput[] = [];
  let bytes = 0;
  let behind = false;
  let closed = false;
  let wake: (() => void) | undefined;

  function take(): TapAnswer | undefined {
    if (closed) return { kind: "closed" };
    if (behind) {
      behind = false;
      return { kind: "behind" };
    }
    const input = inputs.shift();
    if (input) bytes -= input.bytes;
    return input;
  }

  return {
    offer(input) {
      if (closed) return;
      if (inputs.length >= TAP_INPUTS_MAX || (inputs.length > 0 && bytes + input.bytes > TAP_BYTES_MAX)) {
        inputs = [];
        bytes = 0;
        if (!behind) options.on_behind();
        behind = true;
      }
      // While "behind" is not heard, what comes is caught up from the streams, so it need not be kept.
      if (!behind) {
        inputs.push(input);
        bytes += input.bytes;
      }
      wake?.();
    },
    async next(patience_ms) {
      const ready = take();
      if (ready) return ready;
      await new Promise<void>((resolve) => {
        const cancel = patience_ms === undefined ? undefined : world.after(patience_ms, resolve);
        wake = () => {
          cancel?.();
          resolve();
        };
      });
      wake = undefined;
      return take() ?? { kind: "quiet" };
    },
    get closed() {
      return closed;
    },
    tokenFloor: (step) => options.token_floor(step),
    close() {
      if (closed) return;
      closed = true;
      inputs = [];
      wake?.();
      options.on_close();
    },
  };
}

const count = (text: string | undefined): number | undefined => (text !== undefined && /^\d{1,16}$/.test(text) ? Number(text) : undefined);

/** Lets at most `at_once_max` of the given works go on together; the rest wait in line. */
function createGate(at_once_max: number): <T>(work: () => Promise<T>) => Promise<T> {
  let going = 0;
  const waiting: (() => void)[] = []; // At most one for each session that is read.
  return async (work) => {
    if (going >= at_once_max) await new Promise<void>((resolve) => waiting.push(resolve));
    else going += 1;
    try {
      return await work();
    } finally {
      const next = waiting.shift();
      if (next) next();
      else going -= 1;
    }
  };
}

type GatedTap = ReturnType<typeof createTap>;

/** One session's live tail. */
interface Line {
  readonly taps: Set<GatedTap>;
  /** Reads where the streams end, once. */
  looked(): Promise<void>;
  /** Is told where they ended. */
  begins(sequence: number): void;
  floorOf(step: { turn: number; step: number }): number;
  reconnected(): void;
  stop(): Promise<void>;
}

export function createFeedHub({ bus, world, log, on_behind = () => {} }: FeedHubDeps): FeedHub {
  const lines = new Map<string, Line>();
  const gate = createGate(REPAIRS_AT_ONCE_MAX);
  let stopped = false;

  function createLine(actor: ActorAddress): Line {
    const taps = new Set<GatedTap>();
    const events = actorSubject(actor, "event");
    const tokens = actorSubject(actor, "token");
    /** Stream sequence of the last journal message that was handed on; undefined until the line begins. */
    let last: number | undefined;
    /** Heard before that. */
    let early: CoreMessage[] = [];
    let looking: Promise<void> | undefined;
    /** The same of the last chunk. */
    let lastToken: number | undefined;
    let state = "";
    /** The newest step of which the first chunk was seen, and where that stands in TOKENS. */
    let floor: { turn: number; step: number; sequence: number } | undefined;
    let ended = false;
    let repairing = false;
    let repair_events = false;
    /** From where TOKENS must be read again. */
    let repair_tokens_from: number | undefined;
    let cancelCheck: (() => void) | undefined;
    let cancelAgain: (() => void) | undefined;

    function hand(input: LiveInput): void {
      for (const tap of taps) tap.offer(input);
    }

    function acceptJournal(sequence: number, data: Uint8Array): void {
      const message = decodeJournal(data, actor);
      const previous = last ?? 0;
      last = sequence;
      const rested = !BUSY_STATES.has(state);
      state = message.state;
      if (rested && BUSY_STATES.has(state)) armCheck();
      hand({ kind: "journal", sequence, previous, message, bytes: data.byteLength });
    }

    function acceptChunk(sequence: number, data: Uint8Array): void {
      const chunk = readChunk(data);
      if (chunk === undefined) return;
      if (chunk.index === 0 && (floor === undefined || chunk.turn > floor.turn || (chunk.turn === floor.turn && chunk.step > floor.step)))
        floor = { turn: chunk.turn, step: chunk.step, sequence };
      hand({ kind: "chunk", chunk, bytes: data.byteLength });
    }

    async function repairOnce(): Promise<void> {
      if (repair_events && last !== undefined) {
        repair_events = false;
        try {
          for await (const stored of bus.read("EVENTS", events, last + 1)) if (stored.sequence > (last ?? 0)) acceptJournal(stored.sequence, stored.data);
        } catch (error) {
          repair_events = true;
          throw error;
        }
      }
      const from = repair_tokens_from;
      if (from === undefined) return;
      repair_tokens_from = undefined;
      try {
        for await (const stored of bus.read("TOKENS", tokens, from)) {
          lastToken = Math.max(lastToken ?? 0, stored.sequence);
          acceptChunk(stored.sequence, stored.data);
        }
      } catch (error) {
        repair_tokens_from = Math.min(from, repair_tokens_from ?? from);
        throw error;
      }
    }

    const owesRepair = (): boolean => !ended && (repair_events || repair_tokens_from !== undefined);

    function repair(): void {
      if (repairing || last === undefined || !owesRepair() || cancelAgain !== undefined) return;
      repairing = true;
      void gate(async () => {
        while (owesRepair()) await repairOnce();
      })
        .catch((error: unknown) => {
          if (error instanceof BrokenPromise) {
            log.error("a journal cannot be read; its readers are let go", { actor: actorPath(actor), ...errorFields(error) });
            for (const tap of [...taps]) tap.close();
            return;
          }
          log.debug("live tail not repaired yet", { actor: actorPath(actor), ...errorFields(error) });
          cancelAgain = world.after(REPAIR_AGAIN_MS, () => {
            cancelAgain = undefined;
            repair();
          });
        })
        .finally(() => {
          repairing = false;
          repair();
        });
    }

    function heardJournal(message: CoreMessage): void {
      const sequence = count(headerOf(message.headers, "Nats-Sequence"));
      const previous = count(headerOf(message.headers, "Nats-Last-Sequence"));
      if (sequence === undefined || previous === undefined || ended) return;
      if (last === undefined && early.length < EARLY_MAX) return void early.push(message);
      if (last !== undefined && sequence <= last) return;
      if (last !== undefined && previous === last) return acceptJournal(sequence, message.data);
      repair_events = true; // H3
      repair();
    }

    function heardChunk(message: CoreMessage): void {
      const sequence = count(headerOf(message.headers, "Nats-Sequence"));
      const previous = count(headerOf(message.headers, "Nats-Last-Sequence"));
      if (sequence === undefined || previous === undefined || ended) return;
      // TOKENS rests in memory: after a broker's restart it counts from 1 again.
      if (lastToken !== undefined && sequence < lastToken) {
        lastToken = 0;
        floor = undefined;
      }
      const missed = lastToken !== undefined && previous > lastToken;
      if (missed) repair_tokens_from = Math.min(repair_tokens_from ?? Number.MAX_SAFE_INTEGER, (lastToken ?? 0) + 1);
      lastToken = sequence;
      acceptChunk(sequence, message.data);
      if (missed) repair();
    }

    /** Is there something in the streams that was not heard? */
    async function check(): Promise<void> {
      try {
        const stored = await bus.last("EVENTS", events);
        if (stored && stored.sequence > (last ?? 0)) repair_events = true;
        if (BUSY_STATES.has(state) && lastToken !== undefined) {
          const token = await bus.last("TOKENS", tokens);
          if (token && token.sequence > lastToken) repair_tokens_from ??= lastToken + 1;
        }
        if (repair_events || repair_tokens_from !== undefined) repair();
      } catch (error) {
        log.debug("live tail not checked", { actor: actorPath(actor), ...errorFields(error) });
      }
    }

    function armCheck(): void {
      cancelCheck?.();
      if (ended) return;
      cancelCheck = world.after(BUSY_STATES.has(state) ? CHECK_BUSY_MS : CHECK_RESTING_MS, () => void check().finally(armCheck));
    }

    const subscriptions: Subscription[] = [bus.subscribe(liveSubject(actor, "event"), heardJournal), bus.subscribe(liveSubject(actor, "token"), heardChunk)];

    function begins(sequence: number): void {
      if (last !== undefined || ended) return;
      last = sequence;
      armCheck();
      const kept = early;
      early = [];
      for (const message of kept) heardJournal(message);
      if (repair_events) repair();
    }

    async function look(): Promise<void> {
      await bus.flush();
      const stored: StoredMessage | undefined = await bus.last("EVENTS", events);
      if (last !== undefined) return; // It was told meanwhile.
      state = stored ? decodeJournal(stored.data, actor).state : "";
      begins(stored?.sequence ?? 0);
    }

    return {
      taps,
      begins,
      looked: () => (last === undefined ? (looking ??= look().finally(() => (looking = undefined))) : Promise.resolve()),
      floorOf: (step) => (floor !== undefined && floor.turn === step.turn && floor.step === step.step ? floor.sequence : 1),
      reconnected() {
        repair_events = true;
        // A broker that restarted has forgotten its tokens, one that did not has those we missed.
        if (lastToken !== undefined) repair_tokens_from ??= lastToken + 1;
        repair();
      },
      async stop() {
        ended = true;
        cancelCheck?.();
        cancelAgain?.();
        await Promise.all(subscriptions.map((subscription) => subscription.stop()));
      },
    };
  }

  const connection = bus.on_state((state) => {
    if (state === "connected") for (const line of lines.values()) line.reconnected();
  });

  function release(path: string, line: Line): void {
    if (line.taps.size > 0 || lines.get(path) !== line) return;
    lines.delete(path);
    line.stop().catch((error: unknown) => log.warn("live subscription not ended", { actor: path, ...errorFields(error) }));
  }

  function listen(actor: ActorAddress): EarlyTap {
    const path = actorPath(actor);
    const line = lines.get(path) ?? createLine(actor); // H1
    lines.set(path, line);
    const tap: GatedTap = createTap(world, {
      token_floor: (step) => line.floorOf(step),
      on_behind,
      on_close() {
        line.taps.delete(tap);
        release(path, line);
      },
    });
    line.taps.add(tap);
    if (stopped) tap.close();
    return { tap, begins: (sequence) => line.begins(sequence), looked: () => line.looked() };
  }

  return {
    listen,
    async attach(actor) {
      const { tap, looked } = listen(actor);
      try {
        await looked();
      } catch (error) {
        tap.close();
        throw error;
      }
      if (stopped) tap.close();
      return tap;
    },
    size: () => ({ sessions: lines.size, readers: [...lines.values()].reduce((sum, line) => sum + line.taps.size, 0) }),
    async stop() {
      stopped = true;
      await connection.stop();
      for (const line of [...lines.values()]) for (const tap of [...line.taps]) tap.close();
    },
  };
}
