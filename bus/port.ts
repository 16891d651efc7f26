// port: how messages rest and travel, as a list of promises. Two adapters keep it: jetstream.ts (the real one) and
// memory.ts (the same semantics in one thread and in any World's time). test/contract/bus-*.test.ts run on both.
//
// Promises that hold for every call:
//   B1. What a publish answered as `stored` or `committed` survives the death of the client and of the broker process.
//   B2. Sequences of a stream rise; a subject's messages are read in the order of their sequences.
//   B3. A call that cannot be decided answers `unavailable`, within its patience; it does not throw and does not hang.
//   B4. A callback that throws is logged and does not stop the deliveries after it.
//   B5. Nothing here interprets a payload.
import type { ActorAddress } from "../protocol/ids.ts";
import type { CommandSource } from "../protocol/journal.ts";

export const STREAMS = ["COMMANDS", "TIMERS", "EVENTS", "SNAPSHOTS", "RESIDENT", "TOKENS"] as const;
export type StreamName = (typeof STREAMS)[number];

export const BUCKETS = ["PLACEMENT", "WORKERS", "LEADER", "BREAKERS", "EDGE", "KEYUSE"] as const;
export type BucketName = (typeof BUCKETS)[number];

/** Names as they were sent; look one up with headerOf, which ignores case. */
export type Headers = Readonly<Record<string, string>>;

export function headerOf(headers: Headers, name: string): string | undefined {
  if (Object.hasOwn(headers, name)) return headers[name];
  const wanted = name.toLowerCase();
  for (const [key, value] of Object.entries(headers)) if (key.toLowerCase() === wanted) return value;
  return undefined;
}

export interface StoredMessage {
  readonly stream: StreamName;
  /** As stored: on COMMANDS and TIMERS with the shard before it. */
  readonly subject: string;
  readonly sequence: number;
  readonly headers: Headers;
  readonly data: Uint8Array;
  /** When the broker stored it, milliseconds since 1970. */
  readonly stored_at_ms: number;
}

export type PublishOutcome =
  | { readonly kind: "stored"; readonly stream: StreamName; readonly sequence: number }
  /** The expected last sequence of the subject was not the last one. */
  | { readonly kind: "conflict" }
  /** The stream is full (`discard: new`). Nothing was stored. */
  | { readonly kind: "overloaded" }
  /** The broker refuses a message of this size. Nothing was stored. */
  | { readonly kind: "too_large" }
  /** Nothing is known to be stored; it may have been. */
  | { readonly kind: "unavailable"; readonly reason: string };

export type AppendOutcome =
  | { readonly kind: "committed"; readonly sequence: number }
  /** Another writer's message stands where ours should: we are not the owner, or are behind. Nothing of ours was stored. */
  | { readonly kind: "superseded"; readonly by_sequence: number }
  /** Nothing is known. Repeating the same append with the same commit id is safe, and the only way to learn more. */
  | { readonly kind: "unavailable"; readonly reason: string };

export interface Append {
  readonly subject: string;
  readonly data: Uint8Array;
  /** The stream sequence of the subject's last message as the writer knows it; 0 for none. */
  readonly expected_last_sequence: number;
  /** Unique to this append, `{process nonce}.{n}`; stored as HEADER_COMMIT. */
  readonly commit_id: string;
}

export interface Subscription {
  stop(): Promise<void>;
}

/** One message of a shard's inbox. */
export interface Delivery {
  readonly message: StoredMessage;
  readonly source: CommandSource;
  /** Says it is done. Not awaited: a lost ack is a redelivery, which receivers recognise. */
  ack(): void;
  /**
   * Says it is done and asks the broker to confirm it, for what no receiver would recognise.
   * Promises: after true it never comes again. False, within some seconds: it may, and so that it comes before what was said after it,
   *           nothing more is delivered before the next `on_reset`.
   */
  settle(): Promise<boolean>;
}

export interface InboxSpec {
  readonly stream: "COMMANDS" | "TIMERS";
  /** The durable's name: one per shard and stream. */
  readonly durable: string;
  readonly filters: readonly string[];
  /** Deliveries that are handed out and not acknowledged, at most; INBOX_UNDECIDED_MAX when absent. */
  readonly undecided_max?: number;
}

/**
 * A durable consumer, read by one process at a time by agreement (the journal is the fence).
 *
 * Promises: deliveries start with the first unacknowledged message and come in stream order, each once, until `on_reset`.
 *           On any gap, redelivery, reconnect or missed heartbeat the adapter resets the consumer, calls `on_reset`
 *           (all that was delivered and not acknowledged will come again) and goes on from the first unacknowledged one.
 */
export interface InboxHandlers {
  on_delivery(delivery: Delivery): void;
  on_reset(): void;
}

export interface BucketEntry {
  readonly key: string;
  readonly value: Uint8Array;
  readonly revision: number;
}
export type BucketChange = { readonly kind: "put"; readonly entry: BucketEntry } | { readonly kind: "gone"; readonly key: string; readonly revision: number };
export type CasOutcome =
  | { readonly kind: "ok"; readonly revision: number }
  | { readonly kind: "conflict" }
  | { readonly kind: "unavailable"; readonly reason: string };

/** Last values under compare-and-set. Reads are answered by the leader: they see every write that was acknowledged. */
export interface Bucket {
  get(key: string): Promise<BucketEntry | undefined>;
  all(): Promise<BucketEntry[]>;
  /** Only when there is no such key, or it expired or was deleted. */
  create(key: string, value: Uint8Array): Promise<CasOutcome>;
  /** Only when `revision` is the key's last. In a bucket with a TTL this renews it. */
  update(key: string, value: Uint8Array, revision: number): Promise<CasOutcome>;
  delete(key: string, revision: number): Promise<CasOutcome>;
  /**
   * Every present entry, then every change. A key that expires arrives as `gone` within about 0.2 s of its TTL.
   * Heals itself over broker restarts: what changed meanwhile is told afterwards, so a listener converges on the truth.
   * Answers once the present entries were told.
   */
  watch(listener: (change: BucketChange) => void): Promise<Subscription>;
}

export type ConnectionState = "connected" | "disconnected";

export interface Bus {
  readonly shards: number;

  /**
   * Stores one message in the stream whose subjects cover `subject`: commands, snapshots, resident marks, tokens.
   * `patience_ms` bounds the wait (default 5 s); the message is sent once.
   */
  publish(subject: string, data: Uint8Array, options?: { headers?: Headers; expected_last_sequence?: number; patience_ms?: number }): Promise<PublishOutcome>;

  /**
   * Appends to a journal in EVENTS behind the fence `expected_last_sequence`. Many waiting appends travel together
   * (group commit), each with its own fence; one that is refused harms no other. At most one append of a subject is in
   * flight at a time: the caller waits for its answer before the next.
   *
   * Promises: `committed` is fsynced. An answer that got lost is found by reading the tail for `commit_id`, so
   *           `superseded` means a rival's message, never one's own.
   */
  append(append: Append): Promise<AppendOutcome>;

  /** The last message of a subject, read from the leader (never stale). Rejects when the broker cannot answer. */
  last(stream: StreamName, subject: string): Promise<StoredMessage | undefined>;
  /** The last message of every subject under a filter, from the leader. Rejects when the broker cannot answer. */
  last_of_each(stream: StreamName, filter: string): Promise<StoredMessage[]>;
  /** Messages of a filter from `from_sequence` on, in order, up to what is stored when the reading ends. Rejects when the broker cannot answer. */
  read(stream: StreamName, filter: string, from_sequence: number, to_sequence?: number): AsyncIterable<StoredMessage>;
  /**
   * Messages of a filter from `from_sequence` on, in order, each once, and on as they are stored. `on_message` is awaited
   * before the next, which is the back-pressure. Heals itself over broker restarts.
   */
  follow(stream: StreamName, filter: string, from_sequence: number, on_message: (message: StoredMessage) => Promise<void> | void): Promise<Subscription>;

  /** Deletes the message at this sequence when it is still the last of its subject. For clearing resident marks. */
  clear(stream: "RESIDENT", subject: string, sequence: number): Promise<CasOutcome>;

  consume(spec: InboxSpec, handlers: InboxHandlers): Promise<Subscription>;

  /**
   * Arms the one schedule of an actor: at `at_ms` a message arrives on its due subject. Arming again replaces it, when
   * `expected_last_sequence` is its schedule's in TIMERS (0 for none; a schedule that fired is gone).
   */
  schedule(actor: ActorAddress, at_ms: number, data: Uint8Array, expected_last_sequence: number): Promise<PublishOutcome>;

  /** Core messages: at most once, no memory. */
  send(subject: string, data: Uint8Array, options?: { headers?: Headers; reply?: string }): void;
  subscribe(subject: string, listener: (message: CoreMessage) => void, options?: { queue?: string }): Subscription;
  /** One answer, or undefined when none came within `patience_ms` (or nobody listens). */
  request(subject: string, data: Uint8Array, options?: { headers?: Headers; patience_ms?: number }): Promise<CoreMessage | undefined>;
  /** A fresh subject under our own inbox prefix, to be subscribed to. */
  inbox(): string;

  bucket(name: BucketName): Bucket;

  /** How many messages of each subject under a filter a stream holds now, as its leader counts. Rejects when the broker cannot answer. */
  counts(stream: StreamName, filter: string): Promise<readonly { readonly subject: string; readonly messages: number }[]>;
  /** The first and last sequence a stream holds now. */
  bounds(stream: StreamName): Promise<{ first_sequence: number; last_sequence: number; incarnation: string; messages: number; bytes: number }>;

  readonly state: ConnectionState;
  on_state(listener: (state: ConnectionState) => void): Subscription;
  /** Everything sent so far has reached the broker. */
  flush(): Promise<void>;
  close(): Promise<void>;
}

export interface CoreMessage {
  readonly subject: string;
  readonly data: Uint8Array;
  readonly headers: Headers;
  readonly reply?: string;
}
