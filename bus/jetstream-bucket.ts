// bucket: last values under compare-and-set, as a stream with one message a key. Reads are the leader's.
//
// Invariants:
//   K1. A write whose answer was lost is looked for by its commit id before it is called unavailable.
//   K2, K3 of watchers stand in bucket-told.ts: each session first compares all keys with what was told, then follows.
import { HEADER_COMMIT } from "../protocol/commands.ts";
import { type ApiError, guarded, type Link, parseJson, toWire } from "./jetstream-link.ts";
import { BucketTold, entryOf, HEADER_OPERATION, isGone } from "./bucket-told.ts";
import { BusUnavailable } from "./fence.ts";
import { followStream } from "./jetstream-follow.ts";
import { lastOfEach, leaderGet, streamInfo } from "./jetstream-reads.ts";
import { type Bucket, type BucketChange, type BucketName, type CasOutcome, headerOf, type Headers, type StoredMessage, type Subscription } from "./port.ts";
import { bucketStream, bucketSubject } from "./streams.ts";

/** A lease is renewed each second: an answer that takes longer than this is no use to its holder. */
const WRITE_PATIENCE_MS = 3_000;
/** A watch that cannot tell the present entries by then rejects; once it stands, it heals itself for ever. */
const WATCH_PATIENCE_MS = 10_000;
const WRONG_LAST = new Set([10071, 10164, 10158]);

export function openBucket(link: Link, name: BucketName): Bucket {
  const stream = bucketStream(name);
  const last = (key: string): Promise<StoredMessage | undefined> => leaderGet(link, stream, { last_by_subj: bucketSubject(name, key) });

  async function write(key: string, value: Uint8Array, revision: number, headers: Headers = {}): Promise<CasOutcome> {
    const commit_id = link.world.id();
    const all = toWire({ ...headers, "Nats-Expected-Last-Subject-Sequence": String(revision), [HEADER_COMMIT]: commit_id });
    const answer = await link.ask(bucketSubject(name, key), value, { headers: all, patience_ms: WRITE_PATIENCE_MS });
    if (answer.kind === "nobody" || answer.kind === "not_sent")
      return { kind: "unavailable", reason: answer.kind === "nobody" ? "no stream takes writes now" : answer.reason };
    if (answer.kind === "too_large") return { kind: "unavailable", reason: "the value is larger than the broker takes" };
    let reason = "no answer";
    if (answer.kind === "answer") {
      const ack = parseJson(answer.message.data) as { seq?: number; error?: ApiError } | undefined;
      if (ack?.error === undefined && typeof ack?.seq === "number") return { kind: "ok", revision: ack.seq };
      if (ack?.error !== undefined && WRONG_LAST.has(ack.error.err_code)) return { kind: "conflict" };
      reason = ack?.error?.description ?? "the acknowledgement cannot be read";
    }
    try {
      const next = await leaderGet(link, stream, { seq: revision + 1, next_by_subj: bucketSubject(name, key) }, WRITE_PATIENCE_MS);
      if (next === undefined) return { kind: "unavailable", reason };
      return headerOf(next.headers, HEADER_COMMIT) === commit_id ? { kind: "ok", revision: next.sequence } : { kind: "conflict" };
    } catch (error) {
      if (!(error instanceof BusUnavailable)) throw error;
      return { kind: "unavailable", reason: error.message };
    }
  }

  return {
    async get(key) {
      const message = await last(key);
      return message === undefined || isGone(message) ? undefined : entryOf(name, message);
    },
    async all() {
      return (await lastOfEach(link, stream, bucketSubject(name, ">"), false)).filter((message) => !isGone(message)).map((message) => entryOf(name, message));
    },
    async create(key, value) {
      const first = await write(key, value, 0);
      if (first.kind !== "conflict") return first;
      try {
        // A marker of an expired or deleted key is a message, and the one to build on.
        const message = await last(key);
        return message === undefined ? await write(key, value, 0) : isGone(message) ? await write(key, value, message.sequence) : first;
      } catch (error) {
        if (!(error instanceof BusUnavailable)) throw error;
        return { kind: "unavailable", reason: error.message };
      }
    },
    update: (key, value, revision) => write(key, value, revision),
    delete: (key, revision) => write(key, new Uint8Array(0), revision, { [HEADER_OPERATION]: "DEL" }),
    watch: (listener) => watchBucket(link, name, listener),
  };
}

function watchBucket(link: Link, name: BucketName, listener: (change: BucketChange) => void): Promise<Subscription> {
  const stream = bucketStream(name);
  const told = new BucketTold(name, (change) => guarded(link.log, "a bucket's watcher threw", { bucket: name }, () => listener(change)));

  /** K2. Everything up to `last_seq` is told by comparing; what comes after it is followed. */
  async function compare(): Promise<number> {
    const { state } = await streamInfo(link, stream);
    told.compare(await lastOfEach(link, stream, bucketSubject(name, ">"), false), state.last_seq);
    return state.last_seq + 1;
  }

  return new Promise((resolve, reject) => {
    const cancel = link.world.after(WATCH_PATIENCE_MS, () => {
      void subscription.stop();
      reject(new BusUnavailable(`cannot list ${stream} within ${WATCH_PATIENCE_MS} ms`));
    });
    const subscription = followStream(link, {
      stream,
      filter: bucketSubject(name, ">"),
      from_sequence: 1,
      before_session: compare,
      on_open: () => {
        cancel();
        resolve(subscription);
      },
      on_message: (message) => told.hear(message),
    });
  });
}
