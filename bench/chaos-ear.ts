// chaos-ear: a client of one session's event stream, as careful as a client can be: it comes again from its last id after every broken connection,
// at whichever gateway, and writes down what it was given so that the audit can hold it against the journal.
//
//   connecting ──▶ hearing ──connection lost──▶ connecting, from the last id … ──close──▶ closed
import { type ClientRequest, type IncomingMessage, request } from "node:http";
import { createParser, type EventSourceMessage } from "eventsource-parser";

/** A client that was cut off comes again after this. */
const AGAIN_MS = 50;

interface FrameData {
  readonly type?: string;
  readonly seq?: number;
  readonly turn?: number;
  readonly step?: number;
  readonly attempt?: number;
  readonly index?: number;
  readonly text?: string;
  readonly channel?: string;
}

export interface EarToken {
  readonly session: string;
  readonly turn: number;
  readonly step: number;
  readonly attempt: number;
  readonly at_ms: number;
}

/** What one ear was given. */
export interface EarRecord {
  readonly session: string;
  /** `{seq} {type}` of every event, in the order in which they came. */
  readonly events: string[];
  /** `{turn}.{step}` → the text of its last attempt. */
  readonly texts: Map<string, string>;
  readonly faults: string[];
  readonly connections: number;
}

export interface Ear {
  readonly record: EarRecord;
  /** When the last frame came. */
  readonly last_ms: number;
  close(): void;
}

export interface EarOptions {
  readonly session: string;
  readonly urls: readonly string[];
  readonly key: string;
  on_event?(type: string, data: Readonly<Record<string, unknown>>, at_ms: number): void;
  on_token?(token: EarToken): void;
}

export function openEar({ session, urls, key, on_event, on_token }: EarOptions): Ear {
  const record = { session, events: [] as string[], texts: new Map<string, string>(), faults: [] as string[], connections: 0 };
  const steps = new Map<string, { attempt: number; next_index: number; void_up_to: number }>();
  const cursors = new Set<string>();
  let last_id: string | undefined;
  let last_ms = performance.now();
  let closed = false;
  let asking: ClientRequest | undefined;
  let place = Math.floor(Math.random() * urls.length);

  function fault(what: string): void {
    if (record.faults.length < 20) record.faults.push(`${session}: ${what}`);
  }

  function hear({ id, event = "message", data }: EventSourceMessage): void {
    const at_ms = performance.now();
    last_ms = at_ms;
    const frame = JSON.parse(data) as FrameData;
    if (event === "problem") {
      // A stream that ends with a problem is come back to like one that broke.
      return;
    }
    if (id !== undefined) {
      if (cursors.has(id)) fault(`cursor ${id} came twice (${event})`);
      cursors.add(id);
      last_id = id;
    }
    if (event === "token") {
      if (frame.channel === undefined) hearToken(frame, at_ms);
      return;
    }
    record.events.push(`${frame.seq} ${event}`);
    if (event === "superseded") {
      const name = `${frame.turn}.${frame.step}`;
      const step = steps.get(name) ?? { attempt: 0, next_index: 0, void_up_to: 0 };
      steps.set(name, { attempt: 0, next_index: 0, void_up_to: Math.max(step.void_up_to, frame.attempt ?? 0) });
      record.texts.delete(name);
    }
    on_event?.(event, frame as Readonly<Record<string, unknown>>, at_ms);
  }

  function hearToken({ turn = 0, step = 0, attempt = 0, index = -1, text = "" }: FrameData, at_ms: number): void {
    const name = `${turn}.${step}`;
    const before = steps.get(name) ?? { attempt: 0, next_index: 0, void_up_to: 0 };
    if (attempt <= before.void_up_to) fault(`${name}: a chunk of attempt ${attempt} after it was void`);
    if (before.attempt !== 0 && before.attempt !== attempt) fault(`${name}: attempt ${attempt} began though attempt ${before.attempt} was not declared void`);
    const next_index = before.attempt === attempt ? before.next_index : 0;
    if (index !== next_index) fault(`${name}: chunk ${index} of attempt ${attempt} came where ${next_index} was due`);
    record.texts.set(name, (before.attempt === attempt ? (record.texts.get(name) ?? "") : "") + text);
    steps.set(name, { ...before, attempt, next_index: index + 1 });
    on_token?.({ session, turn, step, attempt, at_ms });
  }

  function connect(): void {
    if (closed) return;
    record.connections += 1;
    const url = new URL(`/v1/sessions/${session}/events`, urls[place++ % urls.length]);
    let over = false;
    const again = (): void => {
      if (over) return;
      over = true;
      asking?.destroy();
      if (!closed) setTimeout(connect, AGAIN_MS);
    };
    asking = request(
      url,
      { headers: { authorization: `Bearer ${key}`, accept: "text/event-stream", ...(last_id === undefined ? {} : { "last-event-id": last_id }) } },
      (response: IncomingMessage) => {
        if (response.statusCode !== 200) {
          if (response.statusCode !== 503 && response.statusCode !== 404) fault(`its stream answered ${response.statusCode}`);
          response.resume();
          response.once("close", again);
          return;
        }
        const parser = createParser({ onEvent: (message) => void (over || hear(message)) });
        response.setEncoding("utf8");
        response.on("data", (text: string) => parser.feed(text));
        response.once("close", again);
        response.once("error", again);
      },
    );
    asking.once("error", again);
    asking.end();
  }
  connect();

  return {
    record,
    get last_ms() {
      return last_ms;
    },
    close() {
      closed = true;
      asking?.destroy();
    },
  };
}
