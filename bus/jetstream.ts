// jetstream: the bus on NATS JetStream. Puts the parts together; each part's file says what it promises.
//
//   link     one connection, questions and answers        append   the fence and group commit
//   ensure   streams as declared                          reads    last, pages, lists
//   audit    is the ground as believed                    pull     one consumer until it breaks
//   bucket   last values                                  consume, follow   pull, healed
//
// Invariants:
//   J1. A memory stream that a broker restart took is made again by whoever is told to ensure; until then its publishes are `unavailable`.
import { createInbox } from "@nats-io/transport-node";
import { assert } from "../protocol/assert.ts";
import { dueSubject, timerSubject } from "../protocol/subjects.ts";
import { pause, timestamp } from "../protocol/world.ts";
import { Appender } from "./jetstream-append.ts";
import { auditLink, type Finding } from "./jetstream-audit.ts";
import { openBucket } from "./jetstream-bucket.ts";
import { consumeInbox } from "./jetstream-consume.ts";
import { type Difference, ensureStream, ensureStreams as ensureOn } from "./jetstream-ensure.ts";
import { followStream } from "./jetstream-follow.ts";
import { type Answer, type ApiError, fromWire, type Link, type LinkOptions, openLink, parseJson, REQUEST_PATIENCE_MS, toWire } from "./jetstream-link.ts";
import { countsOf, lastOfEach, leaderGet, onlyReplicaLast, readRange, streamInfo } from "./jetstream-reads.ts";
import {
  BUCKETS,
  type BucketName,
  type Bucket,
  type Bus,
  type CasOutcome,
  type CoreMessage,
  type Headers,
  type PublishOutcome,
  STREAMS,
  type Subscription,
  type StreamName,
} from "./port.ts";
import { allDeclarations, type Declarations, declareStreams } from "./streams.ts";

export type { Finding } from "./jetstream-audit.ts";
export type { LinkTls } from "./jetstream-link.ts";

export interface JetStreamOptions extends LinkOptions {
  readonly shards: number;
  readonly replicas: number;
  readonly commands_bytes_max?: number;
  readonly tokens_bytes_max?: number;
  readonly lease_ttl_ms?: number;
  /** Creates and updates the streams before it answers, and makes memory streams again. Default true. */
  readonly ensure?: boolean;
  /** Told with each commit how many appends travelled in it. */
  readonly on_commit?: (appends: number) => void;
}

/** What the broker says when a stream is full, and when a message is larger than a stream takes. */
const STORE_FAILED = 10077;
const RESOURCES_EXCEEDED: ReadonlySet<number> = new Set([10002, 10023, 10028, 10047, 10122]);
const MESSAGE_TOO_LARGE = 10054;
const WRONG_LAST: ReadonlySet<number> = new Set([10071, 10164]);
/** The message at a sequence is not there: the subject has a newer one, or none. */
const NOT_THERE: ReadonlySet<number> = new Set([10037, 10043, 10057]);
const FOLLOW_OPENING_PATIENCE_MS = 5_000;
const REMAKE_EVERY_MS = 1_000;

interface Inside {
  readonly link: Link;
  readonly declarations: Declarations;
}
/** What the audit needs of a bus and nobody else may reach. */
const insides = new WeakMap<Bus, Inside>();

/**
 * Connects to the broker and makes its streams as declared.
 *
 * Refuses (rejects with a sentence): no connection within the patience; credentials refused; streams that cannot become what is
 * declared, for instance with another number of shards.
 */
export async function connectJetStream(options: JetStreamOptions): Promise<Bus> {
  const declarations = declareStreams(options);
  const link = await openLink(options);
  if (options.ensure !== false) {
    const outcome = await ensureOn(link, declarations);
    if (outcome.kind !== "ready") {
      await link.close();
      throw new Error(
        outcome.kind === "refused"
          ? `the streams of this broker cannot be used: ${outcome.differences.map(inWords).join("; ")}`
          : `the streams cannot be made: ${outcome.reason}`,
      );
    }
    if (outcome.created.length + outcome.updated.length > 0)
      options.log.info("streams are as declared", { created: outcome.created.join(" "), updated: outcome.updated.join(" ") });
    remakeMemoryStreams(link, declarations);
  }
  const bus = createBus(link, declarations, options.on_commit);
  insides.set(bus, { link, declarations });
  return bus;
}

const inWords = (difference: Difference): string => `${difference.stream}: ${difference.what}: have ${difference.have}, want ${difference.want}`;

/** Makes the broker's streams agree with the declaration; the names of what it created and updated, or a rejection that names what cannot be. */
export async function ensureStreams(bus: Bus): Promise<{ created: readonly string[]; updated: readonly string[] }> {
  const { link, declarations } = insideOf(bus);
  const outcome = await ensureOn(link, declarations);
  if (outcome.kind === "ready") return outcome;
  throw new Error(outcome.kind === "refused" ? outcome.differences.map(inWords).join("; ") : outcome.reason);
}

/** Compares the running broker with what is declared and needed. `monitor_url` is the broker's monitoring port; without it fsync cannot be seen. */
export async function auditSubstrate(bus: Bus, options: { monitor_url?: string } = {}): Promise<Finding[]> {
  const { link, declarations } = insideOf(bus);
  return auditLink(link, declarations, options.monitor_url);
}

function insideOf(bus: Bus): Inside {
  const inside = insides.get(bus);
  assert(inside !== undefined, "this bus was made by connectJetStream");
  return inside;
}

/** J1. A broker that was restarted has forgotten its memory streams. */
function remakeMemoryStreams(link: Link, declarations: Declarations): void {
  const memory = allDeclarations(declarations).filter((declared) => declared.storage === "memory");
  let round = 0;
  const remake = async (): Promise<void> => {
    const mine = (round += 1);
    for (const declared of memory) {
      // The broker may be electing for a while yet; the next connection begins a round of its own.
      while (mine === round && !link.closed) {
        const outcome = await ensureStream(link, declared, declarations.parameters.shards);
        if (outcome.kind === "created") link.log.warn("a memory stream was lost with the broker and is made again", { stream: declared.name });
        if (outcome.kind === "refused")
          link.log.error("a memory stream cannot be made again", { stream: declared.name, differences: outcome.differences.map(inWords).join("; ") });
        if (outcome.kind !== "unavailable") break;
        link.log.warn("a memory stream cannot be looked for yet", { stream: declared.name, reason: outcome.reason });
        await pause(link.world, REMAKE_EVERY_MS);
      }
    }
  };
  link.onState((state) => (state === "connected" ? remake() : undefined));
}

function createBus(link: Link, declarations: Declarations, on_commit: JetStreamOptions["on_commit"]): Bus {
  const appender = new Appender(link, on_commit);
  const buckets = new Map<BucketName, Bucket>(BUCKETS.map((name) => [name, openBucket(link, name)]));

  function directOf(stream: StreamName): boolean | "only" {
    const { direct_reads, replicas } = declarations.streams[stream];
    return direct_reads && replicas === 1 ? "only" : direct_reads;
  }

  async function publish(subject: string, data: Uint8Array, headers: Headers, patience_ms: number | undefined): Promise<PublishOutcome> {
    const wire = Object.keys(headers).length === 0 ? {} : { headers: toWire(headers) };
    const answer = await link.ask(subject, data, { ...wire, ...(patience_ms === undefined ? {} : { patience_ms }) });
    return readPublish(answer);
  }

  return {
    shards: declarations.parameters.shards,

    publish(subject, data, options = {}) {
      const fence = options.expected_last_sequence === undefined ? {} : { "Nats-Expected-Last-Subject-Sequence": String(options.expected_last_sequence) };
      return publish(subject, data, { ...options.headers, ...fence }, options.patience_ms);
    },
    append: (append) => appender.append(append),

    last: (stream, subject) => (directOf(stream) === "only" ? onlyReplicaLast(link, stream, subject) : leaderGet(link, stream, { last_by_subj: subject })),
    last_of_each: (stream, filter) => lastOfEach(link, stream, filter, directOf(stream)),
    read(stream, filter, from_sequence, to_sequence = Number.MAX_SAFE_INTEGER) {
      return readRange(link, stream, filter, from_sequence, to_sequence, directOf(stream));
    },
    async follow(stream, filter, from_sequence, on_message) {
      assert(declarations.streams[stream].kept === "always", "a work queue is consumed, not followed");
      let opened!: () => void;
      const opening = new Promise<void>((resolve) => (opened = resolve));
      const subscription = followStream(link, { stream, filter, from_sequence, on_message, on_open: opened });
      const cancel = link.world.after(FOLLOW_OPENING_PATIENCE_MS, opened);
      await opening;
      cancel();
      return subscription;
    },
    async clear(stream, subject, sequence): Promise<CasOutcome> {
      // One message a subject: the message at this sequence exists only while it is the last, so its deletion is the comparison.
      assert(declarations.streams[stream].messages_per_subject_max === 1, "clear is for streams with one message a subject");
      const answer = await link.ask(`$JS.API.STREAM.MSG.DELETE.${stream}`, new TextEncoder().encode(JSON.stringify({ seq: sequence, no_erase: true })));
      if (answer.kind !== "answer") return { kind: "unavailable", reason: `the mark of ${subject} may stand: ${reasonOf(answer)}` };
      const outcome = parseJson(answer.message.data) as { success?: boolean; error?: ApiError } | undefined;
      if (outcome?.success === true) return { kind: "ok", revision: sequence };
      if (outcome?.error !== undefined && NOT_THERE.has(outcome.error.err_code)) return { kind: "conflict" };
      return { kind: "unavailable", reason: outcome?.error?.description ?? "the answer cannot be read" };
    },
    consume: (spec, handlers) => consumeInbox(link, spec, handlers),
    schedule(actor, at_ms, data, expected_last_sequence) {
      const headers = {
        "Nats-Schedule": `@at ${timestamp(at_ms)}`,
        "Nats-Schedule-Target": dueSubject(actor),
        "Nats-Expected-Last-Subject-Sequence": String(expected_last_sequence),
      };
      return publish(timerSubject(actor), data, headers, undefined);
    },

    send(subject, data, options = {}) {
      link.send(subject, data, options.headers === undefined ? undefined : toWire(options.headers), options.reply);
    },
    subscribe(subject, listener, options = {}): Subscription {
      const subscription = link.listen(
        subject,
        (message) =>
          listener({ subject: message.subject, data: message.data, headers: fromWire(message.headers), ...(message.reply ? { reply: message.reply } : {}) }),
        options.queue,
      );
      return { stop: async () => subscription.stop() };
    },
    async request(subject, data, options = {}): Promise<CoreMessage | undefined> {
      const answer = await link.ask(subject, data, {
        ...(options.headers === undefined ? {} : { headers: toWire(options.headers) }),
        patience_ms: options.patience_ms ?? REQUEST_PATIENCE_MS,
      });
      if (answer.kind !== "answer") return undefined;
      const { message } = answer;
      return { subject: message.subject, data: message.data, headers: fromWire(message.headers), ...(message.reply ? { reply: message.reply } : {}) };
    },
    inbox: () => createInbox(link.inbox_prefix),

    bucket(name) {
      const bucket = buckets.get(name);
      assert(bucket !== undefined, "a bucket is one of its declared names");
      return bucket;
    },
    counts: (stream, filter) => countsOf(link, stream, filter),
    async bounds(stream) {
      const { state, created } = await streamInfo(link, stream);
      return { first_sequence: state.first_seq, last_sequence: state.last_seq, incarnation: created, messages: state.messages, bytes: state.bytes };
    },

    get state() {
      return link.state;
    },
    on_state: (listener) => link.onState(listener),
    flush: () => link.flush(),
    close: () => link.close(),
  };
}

function readPublish(answer: Answer): PublishOutcome {
  if (answer.kind === "too_large") return { kind: "too_large" };
  if (answer.kind !== "answer") return { kind: "unavailable", reason: reasonOf(answer) };
  const ack = parseJson(answer.message.data) as { stream?: string; seq?: number; error?: ApiError } | undefined;
  if (ack === undefined) return { kind: "unavailable", reason: "the acknowledgement is not JSON" };
  if (ack.error === undefined) {
    const stream = STREAMS.find((name) => name === ack.stream);
    return stream === undefined || typeof ack.seq !== "number"
      ? { kind: "unavailable", reason: `no stream of ours acknowledged it, but '${String(ack.stream)}'` }
      : { kind: "stored", stream, sequence: ack.seq };
  }
  const { err_code, description } = ack.error;
  if (WRONG_LAST.has(err_code)) return { kind: "conflict" };
  if (err_code === MESSAGE_TOO_LARGE) return { kind: "too_large" };
  if (RESOURCES_EXCEEDED.has(err_code) || (err_code === STORE_FAILED && description.includes("exceeded"))) return { kind: "overloaded" };
  return { kind: "unavailable", reason: `${description} (${err_code})` };
}

function reasonOf(answer: Exclude<Answer, { kind: "answer" }>): string {
  switch (answer.kind) {
    case "nobody":
      return "no stream takes it now";
    case "too_large":
      return "it is larger than the broker takes";
    default:
      return answer.reason;
  }
}
