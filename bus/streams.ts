// streams: what rests where. The one declaration of every stream and bucket, as plain data in our own words; the adapters turn it
// into what they keep, ensureStreams makes a broker agree with it, and the audit compares a running broker against it.
//
// Invariants:
//   S1. A stream that tenants may publish to (COMMANDS) has no feature a header can invoke: no schedules, no rollup, no batches,
//       no time to live, and the smallest duplicate window the broker allows. Each of these let one tenant touch another's messages.
//   S2. `consumers_max` is positive everywhere: brokers from 2.15 on read "unlimited" as 1,000.
//   S3. Whatever is decided by a read (buckets, COMMANDS, TIMERS) cannot be read directly from a replica, only from the leader.
//   S4. The number of shards is fixed with the first start: another one would send an actor's commands to another inbox.
import { assert } from "../protocol/assert.ts";
import { ACTOR_KINDS } from "../protocol/ids.ts";
import { COMMAND_BYTES_MAX, LEASE_TTL_MS } from "../protocol/limits.ts";
import { EDGE_KINDS, edgeCommandFilter } from "../protocol/subjects.ts";
import { BUCKETS, type BucketName, STREAMS, type StreamName } from "./port.ts";

export interface StreamDeclaration {
  /** The broker's name for it. */
  readonly name: string;
  readonly purpose: string;
  readonly subjects: readonly string[];
  /** `until_acknowledged` is a work queue: a message leaves with its acknowledgement. */
  readonly kept: "always" | "until_acknowledged";
  readonly storage: "file" | "memory";
  readonly replicas: number;
  readonly when_full: "refuse_new" | "drop_old";
  readonly bytes_max?: number;
  /** Headers and body of one message. */
  readonly message_bytes_max?: number;
  readonly messages_per_subject_max?: number;
  readonly age_max_ms?: number;
  /** How long a marker of an expired key stays for watchers to see. */
  readonly expiry_marker_ms?: number;
  readonly duplicate_window_ms: number;
  readonly consumers_max: number;
  readonly transform?: { readonly from: string; readonly to: string };
  readonly republish?: { readonly from: string; readonly to: string };
  readonly atomic_batches: boolean;
  readonly schedules: boolean;
  /** Any replica may answer reads: fast, and possibly a moment behind. */
  readonly direct_reads: boolean;
}

export interface StreamParameters {
  readonly shards: number;
  /** 1 on one broker, 3 in a cluster. */
  readonly replicas: number;
  /** What COMMANDS holds before it answers `overloaded`. */
  readonly commands_bytes_max?: number;
  readonly tokens_bytes_max?: number;
  readonly lease_ttl_ms?: number;
}

export interface Declarations {
  readonly parameters: StreamParameters;
  readonly streams: Readonly<Record<StreamName, StreamDeclaration>>;
  readonly buckets: Readonly<Record<BucketName, StreamDeclaration>>;
}

/** A gibibyte: thousands of the largest commands, and a disk that has it. Above it publishers hear `overloaded`. */
const COMMANDS_BYTES_MAX = 1024 * 1024 * 1024;
/** Text as it streams; the oldest goes first, since the finished message is in the journal. */
const TOKENS_BYTES_MAX = 256 * 1024 * 1024;
/** A client that reconnects within the hour sees the text as it came; later it sees the finished message. */
const TOKENS_AGE_MAX_MS = 60 * 60 * 1000;
/** Trace context, key, reply subject and content type are below 2 KiB together; a body of 1 MiB always passes beside them. */
const COMMAND_HEADER_BYTES_MAX = 16 * 1024;
export const COMMAND_MESSAGE_BYTES_MAX = COMMAND_BYTES_MAX + COMMAND_HEADER_BYTES_MAX;
assert(COMMAND_MESSAGE_BYTES_MAX < 2 * COMMAND_BYTES_MAX, "a body of twice the limit is refused by the broker itself");

/** What the broker takes at least ("needs to be >= 100ms"). The window is shared by all publishers, so we want none. */
const DUPLICATE_WINDOW_MIN_MS = 100;
/** Long enough for a watcher that was cut off to see each expiry; one that was away longer lists the keys anew. */
const EXPIRY_MARKER_MS = 60_000;

/** Two durables a shard and stream, with room for people who look. */
const INBOX_CONSUMERS_MAX = 4096;
/** Every follower is a consumer while it follows: gateways, projections, tools. */
const FOLLOWERS_MAX = 10_000;

const KEEP_FOR_EVER = {
  kept: "always",
  storage: "file",
  when_full: "drop_old",
  duplicate_window_ms: DUPLICATE_WINDOW_MIN_MS,
  consumers_max: FOLLOWERS_MAX,
  atomic_batches: false,
  schedules: false,
  direct_reads: true,
} as const;

/** Everything that rests, for a deployment of so many shards and replicas. */
export function declareStreams(parameters: StreamParameters): Declarations {
  const { shards, replicas } = parameters;
  assert(Number.isInteger(shards) && shards > 0, "a deployment has at least one shard");
  assert(Number.isInteger(replicas) && replicas > 0 && replicas <= 5, "a stream has one to five replicas");
  const streams: Record<StreamName, StreamDeclaration> = {
    COMMANDS: {
      ...KEEP_FOR_EVER,
      name: "COMMANDS",
      purpose: "What actors are asked to do, until it is done; each shard reads its own part.",
      // Of the kinds there are, and no other: what nobody reads would lie here for ever, until the stream is full for all.
      subjects: [...ACTOR_KINDS.flatMap((kind) => [`tenant.*.${kind}.*.command`, `tenant.*.${kind}.*.control`]), ...EDGE_KINDS.map(edgeCommandFilter)],
      kept: "until_acknowledged",
      replicas,
      when_full: "refuse_new",
      bytes_max: parameters.commands_bytes_max ?? COMMANDS_BYTES_MAX,
      message_bytes_max: COMMAND_MESSAGE_BYTES_MAX,
      consumers_max: INBOX_CONSUMERS_MAX,
      transform: {
        from: "tenant.*.*.*.*",
        to: `shard.{{partition(${shards},1,2,3)}}.tenant.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}.{{wildcard(4)}}`,
      },
      direct_reads: false,
    },
    TIMERS: {
      ...KEEP_FOR_EVER,
      name: "TIMERS",
      purpose: "The one schedule of each actor, and what fell due, until the shard has taken it.",
      subjects: ["timer.>", "due.>"],
      kept: "until_acknowledged",
      replicas,
      // Schedules forbid "refuse new", and dropping the oldest would lose timers: so no limit but the disk. Only the runtime
      // publishes here, and one schedule an actor bounds it.
      consumers_max: INBOX_CONSUMERS_MAX,
      transform: { from: "due.tenant.*.*.*", to: `shard.{{partition(${shards},1,2,3)}}.due.tenant.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}` },
      schedules: true,
      direct_reads: false,
    },
    EVENTS: {
      ...KEEP_FOR_EVER,
      name: "EVENTS",
      purpose: "The journals: the truth. Deleting and purging are refused by permission, since the stream's own flags cannot be undone.",
      subjects: ["tenant.*.*.*.event"],
      replicas,
      republish: { from: "tenant.*.*.*.event", to: "live.tenant.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}.event" },
      atomic_batches: true,
    },
    SNAPSHOTS: {
      ...KEEP_FOR_EVER,
      name: "SNAPSHOTS",
      purpose: "The latest snapshot of each actor; any of them may be lost, the journal rebuilds it.",
      subjects: ["tenant.*.*.*.snapshot"],
      replicas,
      messages_per_subject_max: 1,
    },
    RESIDENT: {
      ...KEEP_FOR_EVER,
      name: "RESIDENT",
      purpose: "Marks of actors that owe something, durable before the debt is.",
      subjects: ["resident.>"],
      replicas,
      messages_per_subject_max: 1,
    },
    TOKENS: {
      ...KEEP_FOR_EVER,
      name: "TOKENS",
      purpose: "Model output as it comes, for an hour.",
      subjects: ["tenant.*.*.*.token"],
      storage: "memory",
      replicas,
      bytes_max: parameters.tokens_bytes_max ?? TOKENS_BYTES_MAX,
      age_max_ms: TOKENS_AGE_MAX_MS,
      republish: { from: "tenant.*.*.*.token", to: "live.tenant.{{wildcard(1)}}.{{wildcard(2)}}.{{wildcard(3)}}.token" },
    },
  };
  const lease_ttl_ms = parameters.lease_ttl_ms ?? LEASE_TTL_MS;
  const buckets: Record<BucketName, StreamDeclaration> = {
    PLACEMENT: bucket("PLACEMENT", "Which worker owns a shard; a hint for routing, the journal is the fence.", replicas),
    WORKERS: bucket("WORKERS", "The lease of each worker.", replicas, lease_ttl_ms),
    LEADER: bucket("LEADER", "The lease of the leading supervisor.", replicas, lease_ttl_ms),
    EDGE: bucket("EDGE", "Which tenant a broker account of the edge belongs to; once given, for ever.", replicas),
    KEYUSE: bucket("KEYUSE", "When each API key was last used, an entry a tenant; written at most once a minute.", replicas),
    BREAKERS: bucket("BREAKERS", "Circuit breakers that are not closed; a hint among workers, each has its own.", replicas),
  };
  return { parameters, streams, buckets };
}

function bucket(name: BucketName, purpose: string, replicas: number, ttl_ms?: number): StreamDeclaration {
  return {
    ...KEEP_FOR_EVER,
    name: bucketStream(name),
    purpose,
    subjects: [bucketSubject(name, ">")],
    replicas,
    messages_per_subject_max: 1,
    direct_reads: false,
    ...(ttl_ms === undefined ? {} : { age_max_ms: ttl_ms, expiry_marker_ms: EXPIRY_MARKER_MS }),
  };
}

/** Streams and subjects of buckets are named as NATS tools expect a key-value bucket. */
export const bucketStream = (name: BucketName): string => `KV_${name}`;
export const bucketSubject = (name: BucketName, key: string): string => `$KV.${name}.${key}`;
export const bucketKey = (name: BucketName, subject: string): string => subject.slice(`$KV.${name}.`.length);

/** Every declaration, streams first. */
export function allDeclarations(declarations: Declarations): StreamDeclaration[] {
  return [...STREAMS.map((name) => declarations.streams[name]), ...BUCKETS.map((name) => declarations.buckets[name])];
}

/** The stream whose subjects cover a subject as it is published. */
export function streamOf(declarations: Declarations, subject: string): StreamName | undefined {
  return STREAMS.find((name) => declarations.streams[name].subjects.some((filter) => covers(filter, subject)));
}

/** Does a filter (`*` is one token, `>` the rest) cover a subject? */
export function covers(filter: string, subject: string): boolean {
  if (filter === subject) return true;
  let at = 0;
  for (let from = 0; ;) {
    const wanted_end = tokenEnd(filter, from);
    if (filter[from] === ">" && wanted_end === from + 1) return at < subject.length;
    const end = tokenEnd(subject, at);
    const any = filter[from] === "*" && wanted_end === from + 1;
    if (!any && (wanted_end - from !== end - at || !subject.startsWith(filter.slice(from, wanted_end), at))) return false;
    if (wanted_end === filter.length || end === subject.length) return wanted_end === filter.length && end === subject.length;
    from = wanted_end + 1;
    at = end + 1;
  }
}

function tokenEnd(subject: string, from: number): number {
  const dot = subject.indexOf(".", from);
  return dot < 0 ? subject.length : dot;
}

export const isLiteral = (filter: string): boolean => !filter.split(".").some((token) => token === "*" || token === ">");
