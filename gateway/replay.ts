// replay: history for a tenant's own clients over NATS: a request to `tenant.{t}.replay`, answered message by message.
//
//   {"kind", "id", "channel": "event" | "token", "from_sequence"?, "to_sequence"?, "limit"?}
//     ──▶ message (Nats-Sequence, Nats-Subject) … message, then an empty one with Troupe-Done: true
//     ──▶ or one message with Troupe-Error: {code}, a JSON error and Troupe-Done: true
//
// One gateway answers each request (queue group). The last message of an answer that a bound cut short has Troupe-Next-Sequence:
// ask again from there.
//
// Invariants:
//   P1. The tenant is read off the subject, and only subjects of that tenant are read (A4).
//   P2. An answer goes to one literal subject that isReplayReplyAllowed for that tenant; without one nothing is sent at all.
//   P3. An answer has at most LIMIT_MAX messages and about BYTES_MAX bytes; ANSWERS_AT_ONCE_MAX answers are under way, the rest are
//       refused as overloaded.
import { z } from "zod";
import type { Bus, CoreMessage, Headers } from "../bus/port.ts";
import { HEADER_DONE, invalidBody } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, ID_PATTERN } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { actorSubject, isReplayReplyAllowed, parseReplaySubject, REPLAY_FILTER } from "../protocol/subjects.ts";

const HEADER_ERROR = "Troupe-Error";
export const HEADER_NEXT_SEQUENCE = "Troupe-Next-Sequence";
const REPLAY_QUEUE = "replay";

const LIMIT_DEFAULT = 1_000;
const LIMIT_MAX = 10_000;
/** What a broker buffers for one slow client before it cuts it off is 64 MiB; this leaves room for its other subscriptions. */
const BYTES_MAX = 16 * 1024 * 1024;
const ANSWERS_AT_ONCE_MAX = 16;
const REQUEST_BYTES_MAX = 4096;
/** The broker is asked to confirm after this many, so that an answer cannot run ahead of its connection. */
const FLUSH_EVERY = 128;

const sequence = z.int().min(1).max(Number.MAX_SAFE_INTEGER);
// The journals of sessions, runs and money. A tenant's own journal has its keys' hashes in it and is for operators.
const question = z.object({
  kind: z.enum(["session", "workflow", "budget"]),
  id: z.string().regex(ID_PATTERN, "1 to 64 of A-Z a-z 0-9 _ -"),
  channel: z.enum(["event", "token"]),
  from_sequence: sequence.optional(),
  to_sequence: sequence.optional(),
  limit: z.int().min(1).max(LIMIT_MAX).optional(),
});
type Question = z.infer<typeof question>;

function readQuestion(data: Uint8Array): { ok: true; asked: Question } | { ok: false; error: ErrorBody } {
  if (data.byteLength > REQUEST_BYTES_MAX) return { ok: false, error: errorBody("too_large", `a replay request is at most ${REQUEST_BYTES_MAX} bytes`) };
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data));
  } catch {
    return { ok: false, error: errorBody("invalid", "the request is not JSON in UTF-8") };
  }
  const parsed = question.safeParse(value);
  return parsed.success ? { ok: true, asked: parsed.data } : { ok: false, error: invalidBody(parsed.error, "") };
}

export interface Replay {
  /** Takes no more requests; answers under way go on to their end. */
  stop(): Promise<void>;
}

export function startReplay({ bus, log }: { bus: Bus; log: Log }): Replay {
  const answers = new Set<Promise<void>>();

  function refuse(reply: string, error: ErrorBody): void {
    bus.send(reply, new TextEncoder().encode(JSON.stringify({ ok: false, error })), { headers: { [HEADER_ERROR]: error.code, [HEADER_DONE]: "true" } });
  }

  async function answer(tenant: string, reply: string, asked: Question): Promise<void> {
    const actor: ActorAddress = { tenant, kind: asked.kind, id: asked.id }; // P1
    const stream = asked.channel === "event" ? "EVENTS" : "TOKENS";
    const limit = asked.limit ?? LIMIT_DEFAULT;
    let count = 0;
    let bytes = 0;
    let next: number | undefined;
    try {
      for await (const stored of bus.read(stream, actorSubject(actor, asked.channel), asked.from_sequence ?? 1, asked.to_sequence)) {
        if (count >= limit || (count > 0 && bytes + stored.data.byteLength > BYTES_MAX)) {
          next = stored.sequence; // P3
          break;
        }
        bus.send(reply, stored.data, { headers: { "Nats-Sequence": String(stored.sequence), "Nats-Subject": stored.subject } });
        count += 1;
        bytes += stored.data.byteLength;
        if (count % FLUSH_EVERY === 0) await bus.flush();
      }
    } catch (error) {
      log.warn("replay broken off", { actor: actorPath(actor), ...errorFields(error) });
      refuse(reply, errorBody("unavailable", "the stream cannot be read now", { retry_after_ms: 1000 }));
      return;
    }
    const headers: Headers = { [HEADER_DONE]: "true", ...(next === undefined ? {} : { [HEADER_NEXT_SEQUENCE]: String(next) }) };
    bus.send(reply, new Uint8Array(0), { headers });
  }

  function heard({ subject, data, reply }: CoreMessage): void {
    const tenant = parseReplaySubject(subject);
    if (tenant === undefined || reply === undefined || !isReplayReplyAllowed(tenant, reply)) {
      log.warn("replay asked for with no reply subject that is the tenant's own", { tenant }); // P2
      return;
    }
    const read = readQuestion(data);
    if (!read.ok) return refuse(reply, read.error);
    if (answers.size >= ANSWERS_AT_ONCE_MAX) return refuse(reply, errorBody("overloaded", "too many replays are under way", { retry_after_ms: 1000 }));
    const mine = answer(tenant, reply, read.asked).catch((error: unknown) => log.error("replay met a bug of ours", { tenant, ...errorFields(error) }));
    answers.add(mine);
    void mine.finally(() => answers.delete(mine));
  }

  const subscription = bus.subscribe(REPLAY_FILTER, heard, { queue: REPLAY_QUEUE });
  return {
    async stop() {
      await subscription.stop();
      await Promise.all(answers);
    },
  };
}
