// projector: EVENTS becomes rows. It follows the stream from where the tables stand and writes rows and position in one transaction.
//
//   starting ──▶ following ◀──▶ waiting (Postgres or the broker is away; back-off, then on)
//       │            │
//       └────────────┴──▶ stopped (a message that cannot be projected, or another stream under the old position)
//
// Invariants:
//   P1. Rows and position commit together: each message is projected exactly once, whatever dies in between.
//   P2. The position in the table decides, never the one in memory. Under its row lock a projector whose expectation differs writes
//       nothing and goes on from the table's. So two projectors are only a waste, and a table that was restored, rebuilt or lost its
//       last milliseconds is simply read on from.
//   P3. No message is passed over. One that cannot be projected stops the projection with its name and place.
//   P4. A position belongs to one incarnation of the stream; under another one nothing is written.
//   P5. What waits here is bounded: the bus holds the rest.
//   P6. Every audit row continues its tenant's chain (audit-chain.ts), and the head moves in the same transaction.
import { decodeJournal } from "../protocol/journal.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { assert, BrokenPromise, unreachable } from "../protocol/assert.ts";
import type { Bus, StoredMessage } from "../bus/port.ts";
import { type Metrics, silentMetrics } from "../telemetry/metrics.ts";
import { type AuditHead, chained } from "./audit-chain.ts";
import { type Database, faultOf } from "./database.ts";
import { postgresRows, resetProjection } from "./postgres-rows.ts";
import type { Position, RowStore, RowTransaction } from "./row-store.ts";
import { type AuditRecord, type Batch, emptyBatch, PROJECTION_STREAM, projectMessage, rowKey, sessionKey, settledCosts, Unprojectable } from "./rows.ts";

const STREAM = PROJECTION_STREAM;
const FILTER = "tenant.>";

/** A transaction of this many takes about 50 ms; above it others wait longer than they gain. */
const BATCH_MESSAGES_MAX = 500;
/** And of these bytes: messages are at most 4 MB each. */
const BATCH_BYTES_MAX = 8 * 1024 * 1024;
/** The first message of a batch waits this long for company. Rows come within tens of milliseconds, and a trickle of tokens' worth of
 *  commits costs at most 100 transactions a second. */
const BATCH_WAIT_MS = 10;
/** Messages held while a transaction runs: two full batches keep the stream and the database busy at the same time. P5. */
const WAITING_MESSAGES_MAX = 2 * BATCH_MESSAGES_MAX;
const WAITING_BYTES_MAX = 2 * BATCH_BYTES_MAX;
/** Back-off while Postgres or the broker is away: quick enough for a restart, slow enough not to be a load. */
const BACKOFF_MIN_MS = 100;
const BACKOFF_MAX_MS = 1_000;
const LAG_EVERY_MS = 5_000;

export interface ProjectionFault {
  /** `broken` is a promise of ours that did not hold. */
  readonly name: "unprojectable" | "stream_replaced" | "stream_cut" | "broken";
  readonly message: string;
  /** The message it stopped at. */
  readonly sequence?: number;
  readonly subject?: string;
}

export type ProjectorStatus =
  | { readonly kind: "starting" }
  | { readonly kind: "following"; readonly position: number }
  | { readonly kind: "waiting"; readonly position: number; readonly reason: string }
  | { readonly kind: "stopped"; readonly position: number; readonly fault: ProjectionFault }
  | { readonly kind: "ended"; readonly position: number };

export interface ProjectorOptions {
  readonly bus: Pick<Bus, "follow" | "bounds" | "on_state">;
  readonly rows: RowStore;
  readonly world: World;
  readonly log: Log;
  readonly metrics?: Metrics;
  readonly batch_messages_max?: number;
  readonly batch_wait_ms?: number;
}

export interface Projector {
  status(): ProjectorStatus;
  /** Messages in the stream that are not projected yet. Rejects when the broker cannot answer. */
  lag_messages(): Promise<number>;
  /** Answers true when the rows of this message and all before it are committed, false when that did not happen in time. */
  reached(sequence: number, patience_ms: number): Promise<boolean>;
  /** Settles when it has ended: by `stop`, or because it stopped at a fault. */
  readonly ended: Promise<ProjectorStatus>;
  stop(): Promise<void>;
}

/** A message, and the sequence of the one that the stream told before it. */
type Told = StoredMessage & { readonly after: number };

type Turn =
  | { readonly kind: "go_on" }
  /** The table's position is not where our messages are: follow anew from it. */
  | { readonly kind: "follow_anew" }
  | { readonly kind: "fault"; readonly fault: ProjectionFault };

type Applied =
  | {
      readonly kind: "applied";
      readonly messages: readonly StoredMessage[];
      readonly position: number;
      readonly rows: Readonly<Record<string, number>>;
      readonly usage_repeats: number;
    }
  | { readonly kind: "elsewhere"; readonly position: number }
  | { readonly kind: "fault"; readonly fault: ProjectionFault };

/** Starts at once; it needs neither Postgres nor the broker to be there yet. */
export function createProjector({
  bus,
  rows,
  world,
  log,
  metrics = silentMetrics,
  batch_messages_max = BATCH_MESSAGES_MAX,
  batch_wait_ms = BATCH_WAIT_MS,
}: ProjectorOptions): Projector {
  let status: ProjectorStatus = { kind: "starting" };
  let position = 0;
  let incarnation = "";
  let stopping = false;
  let last_sequence = 0;
  /** Wakes the loop from what it sleeps in. */
  let wake: (by: "message" | "order") => void = () => {};
  const watchers = new Set<() => void>();

  const become = (next: ProjectorStatus): void => {
    if (next.kind === "waiting" && status.kind !== "waiting") log.warn("the projection waits", { reason: next.reason, position });
    if (next.kind === "following" && status.kind === "waiting") log.info("the projection goes on", { position });
    status = next;
    for (const watcher of watchers) watcher();
  };

  /** Sleeps until the time is over or something wakes it. A back-off is not ended by messages: they come whether Postgres is there or not. */
  const sleep = (ms: number, until: "message" | "order"): Promise<void> =>
    new Promise((resolve) => {
      const done = (): void => {
        cancel();
        wake = () => {};
        resolve();
      };
      const cancel = world.after(ms, done);
      wake = (by) => {
        if (by === "order" || until === "message") done();
      };
    });

  /** Repeats until it succeeds or we are to stop; undefined then. */
  async function persist<T>(what: string, attempt: () => Promise<T>): Promise<T | undefined> {
    for (let backoff_ms = BACKOFF_MIN_MS; !stopping; backoff_ms = Math.min(backoff_ms * 2, BACKOFF_MAX_MS)) {
      try {
        return await attempt();
      } catch (error) {
        become({ kind: "waiting", position, reason: `${what}: ${faultOf(error).reason}` });
        await sleep(backoff_ms, "order");
      }
    }
    return undefined;
  }

  /** Reads where the tables stand and whether the stream is still the one they were made of. P4 */
  async function agree(): Promise<ProjectionFault | undefined> {
    const row = await persist("Postgres cannot be asked for the position", () => rows.position());
    if (row === undefined) return undefined;
    const bounds = await persist("the broker cannot be asked for the stream", () => bus.bounds(STREAM));
    if (bounds === undefined) return undefined;
    position = row.position;
    incarnation = bounds.incarnation;
    last_sequence = bounds.last_sequence;
    return faultOfBounds(row, bounds);
  }

  async function main(): Promise<void> {
    const connection = bus.on_state((state) => {
      if (state === "connected") void checkStream();
    });
    const lagTimer = everyLag();
    try {
      while (!stopping) {
        doubtful = false;
        const disagreement = await agree();
        if (disagreement !== undefined) return halt(disagreement);
        const turn = stopping ? undefined : await followFrom(position);
        if (turn?.kind === "fault") return halt(turn.fault);
      }
      become({ kind: "ended", position });
    } finally {
      lagTimer();
      await connection.stop();
    }
  }

  function halt(fault: ProjectionFault): void {
    metrics.set("troupe_projection_stopped", {}, 1);
    log.error("the projection stopped", { fault: fault.name, message: fault.message, sequence: fault.sequence, subject: fault.subject, position });
    become({ kind: "stopped", position, fault });
  }

  /** Set when the stream may be another one: then both are asked before anything more is written. P4 */
  let doubtful = false;
  async function checkStream(): Promise<void> {
    const before = { position, incarnation };
    try {
      const bounds = await bus.bounds(STREAM);
      last_sequence = bounds.last_sequence;
      if (before.incarnation === "" || faultOfBounds(before, bounds)?.name !== "stream_replaced") return;
      doubtful = true;
      wake("order");
    } catch (error) {
      log.debug("the stream could not be looked at after a reconnect", errorFields(error));
    }
  }

  function everyLag(): () => void {
    let cancel = (): void => {};
    const tick = (): void => {
      void checkStream().then(() => metrics.set("troupe_projection_lag_messages", {}, Math.max(0, last_sequence - position)));
      cancel = world.after(LAG_EVERY_MS, tick);
    };
    cancel = world.after(LAG_EVERY_MS, tick);
    return () => cancel();
  }

  /** Follows the stream and applies what comes, until the table's position is not where our messages are. */
  async function followFrom(from: number): Promise<Turn> {
    const waiting: Told[] = [];
    let waiting_bytes = 0;
    let room: (() => void) | undefined;
    const hasRoom = (): boolean => waiting.length < WAITING_MESSAGES_MAX && waiting_bytes < WAITING_BYTES_MAX;
    let first_at_ms = 0;
    let told = from;

    const feed = await persist("the stream cannot be followed", () =>
      bus.follow(STREAM, FILTER, from + 1, (message) => {
        // A stream that was made anew is told from its beginning: its sequences mean other messages. P4
        if (message.sequence <= told) {
          doubtful = true;
          wake("order");
        }
        const after = told;
        told = message.sequence;
        if (message.sequence <= position || doubtful || stopping) return;
        if (waiting.length === 0) first_at_ms = world.monotonic_ms();
        waiting.push({ ...message, after });
        waiting_bytes += message.data.byteLength;
        last_sequence = Math.max(last_sequence, message.sequence);
        wake("message");
        if (hasRoom()) return;
        return new Promise<void>((resolve) => (room = resolve)); // P5
      }),
    );
    if (feed === undefined) return { kind: "go_on" };
    become({ kind: "following", position });

    /** Lets go of what the tables hold. */
    const dropProjected = (): void => {
      const left = waiting.findIndex((message) => message.sequence > position);
      for (const message of waiting.splice(0, left < 0 ? waiting.length : left)) waiting_bytes -= message.data.byteLength;
      if (hasRoom()) {
        room?.();
        room = undefined;
      }
    };

    try {
      let backoff_ms = BACKOFF_MIN_MS;
      while (!stopping) {
        if (doubtful) return { kind: "follow_anew" };
        if (waiting.length === 0) {
          await sleep(LAG_EVERY_MS, "message");
          continue;
        }
        const company_ms = first_at_ms + batch_wait_ms - world.monotonic_ms();
        if (waiting.length < batch_messages_max && waiting_bytes < BATCH_BYTES_MAX && company_ms > 0) {
          await sleep(company_ms, "message");
          continue;
        }
        const batch = headOf(waiting, batch_messages_max, BATCH_BYTES_MAX);
        let applied: Applied;
        try {
          applied = await apply(batch);
        } catch (error) {
          if (error instanceof BrokenPromise) throw error;
          become({ kind: "waiting", position, reason: `Postgres does not take rows: ${faultOf(error).reason}` });
          await sleep(backoff_ms, "order");
          backoff_ms = Math.min(backoff_ms * 2, BACKOFF_MAX_MS);
          continue;
        }
        backoff_ms = BACKOFF_MIN_MS;
        if (applied.kind === "fault") return applied;
        if (applied.kind === "elsewhere") {
          // P2. Behind: the rows of messages we no longer hold are gone. Far ahead: reading anew is less than dropping.
          log.info("the position is not where this projector left it", { expected: position, found: applied.position });
          const last = waiting.at(-1)?.sequence ?? 0;
          if (applied.position < position || applied.position > last + WAITING_MESSAGES_MAX) return { kind: "follow_anew" };
          position = applied.position;
        } else {
          position = applied.position;
          measure(applied);
        }
        dropProjected();
        first_at_ms = world.monotonic_ms();
        become({ kind: "following", position });
      }
      return { kind: "go_on" };
    } finally {
      room?.();
      await feed.stop();
    }
  }

  function measure(applied: Extract<Applied, { kind: "applied" }>): void {
    const now_ms = world.now_ms();
    const batch = applied.messages;
    metrics.add("troupe_projection_messages_total", {}, batch.length);
    metrics.observe("troupe_projection_batch_size", {}, batch.length);
    metrics.set("troupe_projection_lag_messages", {}, Math.max(0, last_sequence - position));
    for (const message of batch) metrics.observe("troupe_projection_delay_seconds", {}, Math.max(0, now_ms - message.stored_at_ms) / 1000);
    for (const [table, rows] of Object.entries(applied.rows)) if (rows > 0) metrics.add("troupe_projection_rows_total", { table }, rows);
    if (applied.usage_repeats > 0) log.error("an attempt of a model call was told twice; the first row stands", { rows: applied.usage_repeats, position });
  }

  /** One batch; when its content is refused, message by message, so that the one at fault is named and those before it are kept. P3 */
  async function apply(batch: readonly Told[]): Promise<Applied> {
    try {
      return await applyTogether(batch, position);
    } catch (error) {
      if (!(error instanceof Unprojectable) && faultOf(error).kind !== "content") throw error;
      const [first, ...rest] = batch;
      assert(first !== undefined, "a batch has a message");
      if (rest.length > 0) return apply([first]);
      const reason = error instanceof Unprojectable ? error.message : faultOf(error).reason;
      return {
        kind: "fault",
        fault: {
          name: "unprojectable",
          message: `message ${first.sequence} of ${STREAM} cannot be projected: ${reason}`,
          sequence: first.sequence,
          subject: first.subject,
        },
      };
    }
  }

  function applyTogether(messages: readonly Told[], expected: number): Promise<Applied> {
    const [first] = messages;
    assert(first !== undefined && first.after <= expected && expected < first.sequence, "P3: the batch begins with the message after the position");
    const decoded = messages.map(decode);
    const end = messages.at(-1)?.sequence ?? expected;
    return rows.transaction(async (transaction) => {
      const row = await transaction.position();
      if (row === undefined || row.position !== expected) return { kind: "elsewhere", position: row?.position ?? -1 }; // P2
      if (row.incarnation !== null && row.incarnation !== incarnation) return { kind: "fault", fault: replaced(row.incarnation, incarnation) }; // P4
      const batch = await load(transaction, decoded);
      for (const one of decoded) projectOrName(batch, one);
      const written = await write(transaction, batch);
      await transaction.moveTo({ position: end, incarnation }); // P1
      return { kind: "applied", messages, position: end, ...written };
    });
  }

  const ended = main().then(
    () => status,
    (error: unknown) => {
      halt({ name: "broken", message: `the projector broke: ${errorFields(error).error}` });
      return status;
    },
  );

  return {
    status: () => status,
    async lag_messages() {
      return Math.max(0, (await bus.bounds(STREAM)).last_sequence - position);
    },
    reached(sequence, patience_ms) {
      const isThere = (): boolean => (status.kind === "following" || status.kind === "ended") && position >= sequence;
      return new Promise((resolve) => {
        const done = (answer: boolean): void => {
          watchers.delete(look);
          cancel();
          resolve(answer);
        };
        const look = (): void => {
          if (isThere()) done(true);
          else if (status.kind === "stopped" || status.kind === "ended") done(false);
        };
        const cancel = world.after(patience_ms, () => done(isThere()));
        watchers.add(look);
        look();
      });
    },
    ended,
    async stop() {
      stopping = true;
      wake("order");
      await ended;
    },
  };
}

/** The projector as a component of /readyz. */
export function readinessOf(status: ProjectorStatus): { readonly ok: boolean; readonly detail: string } {
  switch (status.kind) {
    case "starting":
      return { ok: false, detail: "starting" };
    case "following":
      return { ok: true, detail: `at ${status.position}` };
    case "waiting":
      return { ok: false, detail: `waits at ${status.position}: ${status.reason}` };
    case "stopped":
      return { ok: false, detail: `stopped at ${status.position}: ${status.fault.name}: ${status.fault.message}` };
    case "ended":
      return { ok: false, detail: `ended at ${status.position}` };
    default:
      return unreachable(status, "a projector's status");
  }
}

const replaced = (was: string, is: string): ProjectionFault => ({
  name: "stream_replaced",
  message: `the tables were made from the ${STREAM} stream of ${was}, and this one is of ${is}; to throw the rows away and project this stream, run \`troupe projector --rebuild\``,
});

function faultOfBounds(row: Position, bounds: Awaited<ReturnType<Bus["bounds"]>>): ProjectionFault | undefined {
  if (row.incarnation !== null && row.incarnation !== bounds.incarnation) return replaced(row.incarnation, bounds.incarnation);
  if (bounds.last_sequence < row.position)
    return {
      name: "stream_replaced",
      message: `the tables hold ${row.position} messages of ${STREAM}, and the stream ends at ${bounds.last_sequence}: it lost messages or is another one; look before you run \`troupe projector --rebuild\``,
    };
  if (bounds.messages > 0 && bounds.first_sequence > row.position + 1)
    return {
      name: "stream_cut",
      message: `the next message to project is ${row.position + 1}, and ${STREAM} begins at ${bounds.first_sequence}: those between were removed`,
    };
  return undefined;
}

function headOf(messages: readonly Told[], count_max: number, bytes_max: number): Told[] {
  let bytes = 0;
  const end = messages.findIndex((message, index) => index > 0 && (index >= count_max || (bytes += message.data.byteLength) > bytes_max));
  return messages.slice(0, end < 0 ? messages.length : end);
}

interface Decoded {
  readonly message: ReturnType<typeof decodeJournal>;
  readonly sequence: number;
}

function decode(stored: StoredMessage): Decoded {
  const parsed = parseActorSubject(stored.subject);
  if (parsed.kind !== "actor" || parsed.channel !== "event") throw new Unprojectable(`'${stored.subject}' is not the journal of an actor`);
  try {
    return { message: decodeJournal(stored.data, parsed.actor), sequence: stored.sequence };
  } catch (error) {
    throw new Unprojectable(`it is not a journal message: ${errorFields(error).error}`, { cause: error });
  }
}

/** Whatever the rows of a message trip over is that message's fault until a person has looked: it is named, and nothing is retried. */
function projectOrName(batch: Batch, { message, sequence }: Decoded): void {
  try {
    projectMessage(batch, message, sequence);
  } catch (error) {
    if (error instanceof Unprojectable) throw error;
    throw new Unprojectable(errorFields(error).error, { cause: error });
  }
}

/** Loads the rows that these messages will read. */
async function load(transaction: RowTransaction, decoded: readonly Decoded[]): Promise<Batch> {
  const batch = emptyBatch();
  const actors = decoded.map(({ message }) => message.actor);
  const sessions = new Map(actors.filter((actor) => actor.kind === "session").map((actor) => [sessionKey(actor), actor]));
  if (sessions.size > 0) {
    const wanted = [...sessions.values()].map(({ tenant, id }) => ({ tenant, session: id }));
    for (const row of await transaction.sessions(wanted)) batch.sessions.set(rowKey(row.tenant, row.session), row);
  }
  // A session's calls ask their tenant's row whose key they were made with.
  const named = [...new Set(actors.filter(({ kind }) => kind === "tenant" || kind === "session").map((actor) => actor.tenant))];
  if (named.length > 0) for (const row of await transaction.tenants(named)) batch.tenants.set(row.tenant, row);
  const tenants = [...new Set(actors.filter((actor) => actor.kind === "tenant").map((actor) => actor.tenant))];
  if (tenants.length > 0) {
    for (const row of await transaction.keys(tenants)) batch.keys.set(rowKey(row.tenant, row.key_id), row);
    for (const row of await transaction.newestAgents(tenants)) batch.agents.set(rowKey(row.tenant, row.agent), row);
  }
  return batch;
}

/** Writes what changed, one statement a table. */
async function write(transaction: RowTransaction, batch: Batch): Promise<{ rows: Record<string, number>; usage_repeats: number }> {
  const changed = <T>(rows: ReadonlyMap<string, T>, keys: ReadonlySet<string>): T[] => [...keys].map((key) => rows.get(key)).filter((row) => row !== undefined);
  const sessions = changed(batch.sessions, batch.changed.sessions);
  const tenants = changed(batch.tenants, batch.changed.tenants);
  const keys = changed(batch.keys, batch.changed.keys);
  if (batch.audit.length > 0) await writeAudit(transaction, batch.audit);
  if (sessions.length > 0) await transaction.putSessions(sessions);
  if (tenants.length > 0) await transaction.putTenants(tenants);
  if (keys.length > 0) await transaction.putKeys(keys);
  if (batch.agent_versions.length > 0) await transaction.addAgents(batch.agent_versions);
  const usage_repeats = batch.usage.length === 0 ? 0 : batch.usage.length - (await transaction.addUsage(batch.usage));
  if (batch.settlements.length > 0) await writeCosts(transaction, batch);
  return {
    rows: {
      audit: batch.audit.length,
      sessions: sessions.length,
      tenants: tenants.length,
      keys: keys.length,
      agents: batch.agent_versions.length,
      llm_usage_events: batch.usage.length - usage_repeats,
    },
    usage_repeats,
  };
}

/** P6. Under the lock of the position, so nobody else continues the same chains. */
async function writeAudit(transaction: RowTransaction, audit: readonly AuditRecord[]): Promise<void> {
  const tenants = [...new Set(audit.map((row) => row.tenant))];
  const heads = new Map<string, AuditHead>();
  for (const { tenant, ...head } of await transaction.auditHeads(tenants)) heads.set(tenant, head);
  await transaction.addAudit(chained(heads, audit));
  await transaction.putAuditHeads([...heads].map(([tenant, head]) => ({ tenant, ...head })));
}

/** R3. The rows of this batch are among those that are read. */
async function writeCosts(transaction: RowTransaction, { settlements }: Batch): Promise<void> {
  const costs = settledCosts(settlements, await transaction.usageOf(settlements));
  if (costs.length > 0) await transaction.setCosts(costs);
}

export type RebuildOutcome =
  | { readonly kind: "rebuilt"; readonly position: number; readonly took_ms: number }
  | { readonly kind: "failed"; readonly status: ProjectorStatus };

/**
 * Throws the rows away and projects the stream from its first message, up to what it held when this began.
 *
 * Promises: the tables are as if they had been projected from the first message on (R1).
 * Limits:   `patience_ms`, an hour; what is projected by then stays, and any projector goes on from there.
 */
export async function rebuild({
  database,
  patience_ms = 3_600_000,
  ...options
}: Omit<ProjectorOptions, "rows"> & { readonly database: Database; readonly patience_ms?: number }): Promise<RebuildOutcome> {
  const { bus, world, log } = options;
  const began_ms = world.monotonic_ms();
  const { last_sequence } = await bus.bounds(STREAM);
  await resetProjection(database);
  log.info("the projection is rebuilt", { to_sequence: last_sequence });
  const projector = createProjector({ ...options, rows: postgresRows(database) });
  const done = await projector.reached(last_sequence, patience_ms);
  const status = projector.status();
  await projector.stop();
  if (!done) return { kind: "failed", status };
  return { kind: "rebuilt", position: last_sequence, took_ms: Math.round(world.monotonic_ms() - began_ms) };
}
