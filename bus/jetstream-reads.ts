// reads: what the streams hold. Single messages come from the leader; pages come from any replica and their end from the leader.
//
// Invariants:
//   R1. A read never misses what the leader had acknowledged when the read began: replicas hold a prefix of the leader's log, so
//       where a page ends, the leader is asked whether it knows of a next message. A stream with one replica has no other to ask.
//   R2. A read rejects (BusUnavailable) rather than answer less than there is.
//   R3. Memory of a read is bounded by one page.
import type { Msg } from "@nats-io/transport-node";
import { createInbox } from "@nats-io/transport-node";
import { fromWire, type Link, parseHeaderText, REQUEST_PATIENCE_MS } from "./jetstream-link.ts";
import { BusUnavailable } from "./fence.ts";
import type { WireStreamInfo } from "./jetstream-ensure.ts";
import type { StoredMessage, StreamName } from "./port.ts";

/** A page's messages and bytes: large enough that a page's round trip is small beside it, small enough to hold many at once. */
const PAGE_MESSAGES = 256;
const PAGE_BYTES = 2 * 1024 * 1024;
/** A page that takes longer than this between two messages is given up. */
const PAGE_SILENCE_MS = 5_000;
const PAGE_ATTEMPTS = 5;
/** Leader reads in flight at once when many subjects are read. */
const LEADER_READS_IN_FLIGHT = 64;

const NO_MESSAGE = 10037;
const encoder = new TextEncoder();

interface WireMessage {
  readonly subject: string;
  readonly seq: number;
  readonly data?: string;
  readonly hdrs?: string;
  readonly time: string;
}

/** One message from the leader: the last of a subject, or the first of a filter from a sequence on. */
export async function leaderGet(
  link: Link,
  stream: string,
  question: { last_by_subj: string } | { seq: number; next_by_subj: string },
  patience_ms?: number,
): Promise<StoredMessage | undefined> {
  const answer = await link.api<{ message: WireMessage }>(`STREAM.MSG.GET.${stream}`, question, patience_ms);
  if (answer.kind === "ok") return storedOf(stream, answer.value.message);
  if (answer.kind === "error" && answer.error.err_code === NO_MESSAGE) return undefined;
  throw new BusUnavailable(`cannot read ${stream}: ${answer.kind === "error" ? answer.error.description : answer.reason}`);
}

/** The last message of a subject out of a stream with one replica, which is its leader: a third of the leader's own way. */
export async function onlyReplicaLast(link: Link, stream: string, subject: string): Promise<StoredMessage | undefined> {
  const answer = await link.ask(`$JS.API.DIRECT.GET.${stream}`, encoder.encode(JSON.stringify({ last_by_subj: subject })));
  const status = answer.kind === "answer" ? (answer.message.headers?.code ?? 0) : undefined;
  if (answer.kind === "answer" && status === 0) return directMessage(stream, answer.message);
  if (status === 404) return undefined;
  // It does not answer just now: the leader's way knows how to wait.
  return leaderGet(link, stream, { last_by_subj: subject });
}

function storedOf(stream: string, message: WireMessage): StoredMessage {
  return {
    stream: stream as StreamName,
    subject: message.subject,
    sequence: message.seq,
    headers: message.hdrs === undefined ? {} : parseHeaderText(Buffer.from(message.hdrs, "base64").toString()),
    data: message.data === undefined ? new Uint8Array(0) : new Uint8Array(Buffer.from(message.data, "base64")),
    stored_at_ms: Date.parse(message.time),
  };
}

export async function streamInfo(
  link: Link,
  stream: string,
  options: { subjects_filter?: string; offset?: number } = {},
): Promise<WireStreamInfo & { total?: number; limit?: number }> {
  const answer = await link.api<WireStreamInfo & { total?: number; limit?: number }>(`STREAM.INFO.${stream}`, options);
  if (answer.kind === "ok") return answer.value;
  throw new BusUnavailable(`cannot see ${stream}: ${answer.kind === "error" ? answer.error.description : answer.reason}`);
}

/** How many messages there are of every subject under a filter, from the leader, in pages. */
export async function countsOf(link: Link, stream: string, filter: string): Promise<{ subject: string; messages: number }[]> {
  const counts: { subject: string; messages: number }[] = [];
  for (;;) {
    const info = await streamInfo(link, stream, { subjects_filter: filter, offset: counts.length });
    const page = Object.entries(info.state.subjects ?? {});
    for (const [subject, messages] of page) counts.push({ subject, messages });
    if (page.length === 0 || counts.length >= (info.total ?? counts.length)) return counts;
  }
}

/** The last message of every subject under a filter. Subjects come from the leader in pages, and each last message too; from an only replica at once. */
export async function lastOfEach(link: Link, stream: string, filter: string, direct: boolean | "only"): Promise<StoredMessage[]> {
  if (direct === "only") {
    const outcome = await tryPage(link, stream, { multi_last: [filter] });
    if (outcome.kind === "page" && outcome.page.end === "stream") return outcome.page.sort((a, b) => a.sequence - b.sequence);
    // More than fits a page, or nobody answers just now.
  }
  const subjects = await countsOf(link, stream, filter);
  const found: StoredMessage[] = [];
  let next = 0;
  const reader = async (): Promise<void> => {
    while (next < subjects.length) {
      const { subject } = subjects[next++] as { subject: string };
      const message = await leaderGet(link, stream, { last_by_subj: subject });
      // One that was cleared between the list and the read is no longer there to be told of.
      if (message !== undefined) found.push(message);
    }
  };
  await Promise.all(Array.from({ length: Math.min(LEADER_READS_IN_FLIGHT, subjects.length) }, reader));
  return found.sort((a, b) => a.sequence - b.sequence);
}

/** Messages of a filter in order, page by page, up to what the leader has when the reading ends (R1). */
export async function* readRange(
  link: Link,
  stream: string,
  filter: string,
  from_sequence: number,
  to_sequence: number,
  /** `only`: the stream has one replica, whose end is the end (R1). */
  direct: boolean | "only",
): AsyncGenerator<StoredMessage> {
  let next = Math.max(1, from_sequence);
  while (next <= to_sequence) {
    const page: Page = direct === false ? [] : await readPage(link, stream, filter, next);
    for (const message of page) {
      if (message.sequence > to_sequence) return;
      next = message.sequence + 1;
      yield message;
    }
    if (page.length === PAGE_MESSAGES || page.end === "bytes" || next > to_sequence) continue;
    if (direct === "only" && page.end === "stream") return;
    const more = await leaderGet(link, stream, { seq: next, next_by_subj: filter });
    if (more === undefined || more.sequence > to_sequence) return;
    next = more.sequence + 1;
    yield more;
  }
}

/** Ends where the stream does, or because it holds as many bytes as a page may; a page that nobody gave has no end. */
type Page = StoredMessage[] & { end?: "bytes" | "stream" };

/** One page from any replica. It may end before what the leader has, never skip within. */
async function readPage(link: Link, stream: string, filter: string, from_sequence: number): Promise<Page> {
  let reason = "";
  for (let attempt = 1; attempt <= PAGE_ATTEMPTS; attempt += 1) {
    const outcome = await tryPage(link, stream, { seq: from_sequence, next_by_subj: filter });
    if (outcome.kind === "page") return outcome.page;
    reason = outcome.reason;
    // Where nobody answers direct reads just now, the leader still may: an empty page sends the reader there.
    if (outcome.kind === "nobody") return [];
    if (!(await link.connectedWithin(REQUEST_PATIENCE_MS))) break;
  }
  throw new BusUnavailable(`cannot read a page of ${stream}: ${reason}`);
}

type PageOutcome =
  | { readonly kind: "page"; readonly page: Page }
  | { readonly kind: "nobody"; readonly reason: string }
  | { readonly kind: "broken"; readonly reason: string };

type PageQuestion = { readonly seq: number; readonly next_by_subj: string } | { readonly multi_last: readonly string[] };

function tryPage(link: Link, stream: string, asked: PageQuestion): Promise<PageOutcome> {
  return new Promise((resolve) => {
    const page: Page = [];
    const inbox = createInbox(link.inbox_prefix);
    let cancel = (): void => {};
    const finish = (outcome: PageOutcome): void => {
      cancel();
      subscription.stop();
      void states.stop();
      resolve(outcome);
    };
    const rearm = (): void => {
      cancel();
      cancel = link.world.after(PAGE_SILENCE_MS, () => finish({ kind: "broken", reason: "the page stopped arriving" }));
    };
    const subscription = link.listen(inbox, (message) => {
      rearm();
      const status = message.headers?.code ?? 0;
      if (status === 0) return void page.push(directMessage(stream, message));
      if (status === 204) {
        if (page.length > 0) page.end = Number(message.headers?.get("Nats-Num-Pending") ?? 0) > 0 ? "bytes" : "stream";
        return finish({ kind: "page", page });
      }
      if (status === 404) {
        page.end = "stream";
        return finish({ kind: "page", page });
      }
      finish({ kind: status === 503 ? "nobody" : "broken", reason: `${status} ${message.headers?.description ?? ""}` });
    });
    const states = link.onState((state) => {
      if (state === "disconnected") finish({ kind: "broken", reason: "the connection was lost" });
    });
    rearm();
    const question = { batch: PAGE_MESSAGES, max_bytes: PAGE_BYTES, ...asked };
    if (!link.send(`$JS.API.DIRECT.GET.${stream}`, encoder.encode(JSON.stringify(question)), undefined, inbox))
      finish({ kind: "broken", reason: "there is no connection" });
  });
}

const DIRECT_HEADERS: ReadonlySet<string> = new Set([
  "Nats-Stream",
  "Nats-Subject",
  "Nats-Sequence",
  "Nats-Time-Stamp",
  "Nats-Num-Pending",
  "Nats-Last-Sequence",
  "Nats-UpTo-Sequence",
]);

/** A direct answer carries where it stood in headers; what the writer sent is the rest. */
function directMessage(stream: string, message: Msg): StoredMessage {
  const all = fromWire(message.headers);
  const headers = Object.fromEntries(Object.entries(all).filter(([name]) => !DIRECT_HEADERS.has(name)));
  return {
    stream: stream as StreamName,
    subject: all["Nats-Subject"] ?? "",
    sequence: Number(all["Nats-Sequence"]),
    headers,
    data: message.data,
    stored_at_ms: Date.parse(all["Nats-Time-Stamp"] ?? ""),
  };
}
