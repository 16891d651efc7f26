// limits: every bound that more than one room relies on, with the sentence that justifies it.
import { assert } from "./assert.ts";

/** A command a tenant may publish. Large enough for a long document, small enough that a shard's inbox of thousands fits memory. */
export const COMMAND_BYTES_MAX = 1024 * 1024;
/** What the broker takes at all: an append may carry several commands and their events. */
export const PAYLOAD_BYTES_MAX = 4 * 1024 * 1024;
/** What one append may hold before the host stops folding more of the mailbox into it. */
export const APPEND_BYTES_TARGET = 1024 * 1024;
/** Entries that one append folds. Above it latency of the first grows faster than throughput. */
export const APPEND_ENTRIES_MAX = 64;
assert(COMMAND_BYTES_MAX + APPEND_BYTES_TARGET < PAYLOAD_BYTES_MAX, "one command always fits an append that was not yet full");

/** Outcomes of keyed commands an actor remembers: a week is longer than any sender's retry, 1,000 bounds the state. */
export const IDEMPOTENCY_KEYS_MAX = 1000;
export const IDEMPOTENCY_KEEP_MS = 7 * 24 * 60 * 60 * 1000;
export const IDEMPOTENCY_KEY_BYTES_MAX = 255;
/** A client of ours says a command twice at most, within its patience; six times that is certainly over. */
export const AUTOMATIC_KEY_KEEP_MS = 60_000;

/**
 * Commands of a shard that its owner has from the broker and has not decided. It must see far: who is decided next is chosen among these, so
 * that ten thousand commands of one tenant do not hide another's. A session's message is some hundred bytes; larger ones are bounded by bytes.
 */
export const INBOX_UNDECIDED_MAX = 16_000;
export const INBOX_UNDECIDED_BYTES_MAX = 64 * 1024 * 1024;
assert(INBOX_UNDECIDED_BYTES_MAX >= 16 * COMMAND_BYTES_MAX, "a few of the largest commands do not close a shard's inbox");

/** A call waits for its provider, not for the processor: a process carries some thousand streams. Above it the sockets and buffers are what ends it. */
export const CALLS_MAX = 1_000;
export const CALLS_MAX_MAX = 100_000;
/** What a call of a model or a tool may take when its agent says nothing; and at most, since a worker that is to be stopped waits for nobody longer. */
export const CALL_TIMEOUT_MS = 300_000;
export const CALL_TIMEOUT_MS_MAX = 3_600_000;
/** How long money that others hold, a slot or a window is waited for. Most calls end within this; a person's patience does not go further. */
export const ROOM_PATIENCE_MS = 30_000;
/** Calls of one tenant that wait in one worker: more than a minute's work of the slots that tenants have. Near it new messages are refused (REFUSE_PERCENT_…). */
export const TENANT_CALLS_WAITING_MAX = 1_000;
/** Commands of a tenant that wait to be decided in one worker: some seconds of its work. Near it more are refused. */
export const TENANT_COMMANDS_WAITING_MAX = 10_000;

/**
 * Commands of a tenant that wait in COMMANDS, before any worker has them: a quarter of its bytes, so that three tenants at their bound still leave room for
 * all others; and a tenth of the messages it holds of the usual size. Near either more are refused where they enter.
 */
export const TENANT_COMMANDS_STORED_MAX = 100_000;
export const TENANT_COMMANDS_BYTES_MAX = 256 * 1024 * 1024;

/** Messages waiting in one session. A person does not queue more; a program should open more sessions. */
export const SESSION_QUEUE_MAX = 100;
/** Model calls in one turn before it ends as `loop_limit` (AR-F06); an agent may set its own, up to the ceiling. */
export const LOOPS_DEFAULT = 25;
export const LOOPS_MAX = 1000;

/** Entries between snapshots: replaying one costs 0.15 ms of processor time, and a worker's death is replayed for all its actors at once. */
export const SNAPSHOT_EVERY_ENTRIES = 16;
/** However large the snapshot, the tail is never longer: replaying this many costs some twenty milliseconds. */
export const SNAPSHOT_ENTRIES_MAX = 1024;
/** And no journal tail is older than this without one (AR-F47). */
export const SNAPSHOT_EVERY_MS = 30_000;

/** An idle actor leaves memory after this. */
export const PASSIVATE_AFTER_MS = 60_000;
/** Timers nearer than this run in the process; farther ones, and all on passivation, are armed in TIMERS. */
export const TIMER_IN_PROCESS_MS = 60_000;

/** A worker's lease. Long enough for two missed renewals and a broker restart, short enough for a person's patience. */
export const LEASE_TTL_MS = 5_000;
export const LEASE_RENEW_MS = 1_000;
assert(LEASE_TTL_MS >= 4 * LEASE_RENEW_MS, "a lease outlives three missed renewals");
/** A planned move waits for running effects at most this long. */
export const HANDOVER_DEADLINE_MS = 60_000;

/** Partitions of the actor space; fixed per deployment. */
export const SHARDS_EMBEDDED = 16;

/** Tokens coalesce this long after the first chunk. */
export const TOKEN_COALESCE_MS = 20;

/** Labels on one session. They stand in its context and in every view of it. */
export const METADATA_KEYS_MAX = 64;

/** Accounts of the broker for tenants' clients. Each costs the broker about 30 KiB; a cell of more tenants on the bus configures more. */
export const EDGE_ACCOUNTS_DEFAULT = 256;

/** Requests of one tenant in a second at one gateway. As many as one process serves of small requests; a deployment of many tenants sets less. */
export const GATEWAY_REQUESTS_PER_S = 2_000;

/** From this share of a bound on no more is taken: the rest is for what is on its way already. On one machine (`up`), and where each role runs by itself. */
export const REFUSE_PERCENT_EMBEDDED = 80;
export const REFUSE_PERCENT_DISTRIBUTED = 90;

/** Sessions of one tenant that its budget counts one by one, where it may have only so many. A tenant that needs more has no bound. */
export const SESSIONS_COUNTED_MAX = 10_000;
