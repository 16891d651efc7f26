// event-stream: a feed as server-sent events on one response, by hand.
//
// Invariants:
//   E1. While the socket does not drain, nothing is pulled from the feed and nothing is written.
//   E2. A socket that does not drain within DRAIN_PATIENCE_MS is closed; its client goes on from its last id.
//   E3. A comment keeps a silent connection awake.
import type { ServerResponse } from "node:http";
import type { ActorEvent } from "../protocol/journal.ts";
import type { World } from "../protocol/world.ts";
import { type Cursor, encodeCursor } from "./cursor.ts";
import type { FeedItem } from "./session-feed.ts";

/** Proxies close what is silent for 30 s or 60 s. */
export const KEEP_AWAKE_MS = 15_000;
/** Long enough for a phone in a tunnel; afterwards the memory of its socket is worth more than its connection. */
const DRAIN_PATIENCE_MS = 60_000;
/** What a client waits before it comes again. */
const RETRY_MS = 1_000;

export const EVENT_STREAM_MEDIA_TYPE = "text/event-stream";

/** One frame as it stands on the wire. JSON holds no line break, so one data line is enough. */
export function encodeFrame(item: FeedItem): string {
  switch (item.kind) {
    case "event": {
      const { event, seq, at, state } = item;
      return frame(item.cursor, event.type, { ...event, seq, at, state });
    }
    case "token": {
      const { kind: _, cursor, ...token } = item;
      return frame(cursor, "token", token);
    }
    case "gap":
      return `: behind; read again from ${encodeCursor(item.from)}\n\n`;
    default:
      return item satisfies never;
  }
}

const frame = (cursor: Cursor, event: string, data: unknown): string => `id: ${encodeCursor(cursor)}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;

/** Waits until the socket takes more. False when it is closed, let go, or did not drain in time (E2). */
function drained(response: ServerResponse, world: World, signal: AbortSignal): Promise<boolean> {
  return new Promise((resolve) => {
    const settle = (answer: boolean) => (): void => {
      cancel();
      response.off("drain", onDrain);
      response.off("close", onClose);
      signal.removeEventListener("abort", onClose);
      resolve(answer);
    };
    const onDrain = settle(true);
    const onClose = settle(false);
    const cancel = world.after(DRAIN_PATIENCE_MS, settle(false));
    response.once("drain", onDrain);
    response.once("close", onClose);
    signal.addEventListener("abort", onClose);
    if (response.destroyed || response.writableEnded || signal.aborted) onClose();
  });
}

export interface EventStreamOptions {
  readonly world: World;
  /** Aborted when the stream must end. */
  readonly signal: AbortSignal;
  /** Says what to tell the client of an error that ended the feed. */
  problem(error: unknown): unknown;
}

/** Writes the feed until it ends or the socket does. Always ends the response. */
export async function writeEventStream(
  response: ServerResponse,
  items: AsyncIterable<FeedItem>,
  { world, signal, problem }: EventStreamOptions,
): Promise<void> {
  response.writeHead(200, { "content-type": EVENT_STREAM_MEDIA_TYPE, "cache-control": "private, no-store", "x-accel-buffering": "no" });
  response.write(`retry: ${RETRY_MS}\n\n`);
  let cancelAwake: (() => void) | undefined;
  const keepAwake = (): void => {
    cancelAwake?.();
    cancelAwake = world.after(KEEP_AWAKE_MS, () => {
      if (response.destroyed || response.writableEnded) return;
      if (!response.writableNeedDrain) response.write(": awake\n\n"); // E3
      keepAwake();
    });
  };
  keepAwake();
  try {
    for await (const item of items) {
      if (response.destroyed) return;
      keepAwake();
      if (!response.write(encodeFrame(item)) && !(await drained(response, world, signal))) {
        response.destroy();
        return;
      }
    }
  } catch (error) {
    // Not `error`: that is what a browser's EventSource calls its own lost connections.
    if (!response.destroyed) response.write(`event: problem\ndata: ${JSON.stringify(problem(error))}\n\n`);
  } finally {
    cancelAwake?.();
    if (!response.destroyed) response.end();
  }
}

const TURN_ENDS: ReadonlySet<string> = new Set(["turn.completed", "turn.failed", "turn.cancelled"]);
/** What befalls the whole session and so the turn. */
const SESSION_ENDS: ReadonlySet<string> = new Set(["terminated"]);
const SESSION_TROUBLE: ReadonlySet<string> = new Set(["unhealthy", "parked", "paused", "terminated"]);

const isTrouble = (event: ActorEvent): boolean =>
  event.type === "session.parked" || (event.type === "session.state" && typeof event["to"] === "string" && SESSION_TROUBLE.has(event["to"]));

/** Of a feed, only what belongs to one turn, and what befell its session; ends with the turn. */
export async function* turnOnly(items: AsyncIterable<FeedItem>, turn: number): AsyncGenerator<FeedItem> {
  for await (const item of items) {
    if (item.kind === "gap") yield item;
    else if (item.kind === "token") {
      if (item.turn === turn) yield item;
    } else {
      const { event } = item;
      const ours = event["turn"] === turn;
      if (ours || isTrouble(event)) yield item;
      if (ours && TURN_ENDS.has(event.type)) return;
      if (event.type === "session.state" && SESSION_ENDS.has(String(event["to"]))) return;
    }
  }
}
