// verify: reads what the streams hold and names every promise that does not hold there. It changes nothing and trusts nothing:
// what a message says is compared with what the pure core makes of its entries.
//
//   SNAPSHOTS ──▶ digests, one per actor ─┐
//   EVENTS ─────▶ one pass in stream order, a small checker per actor ──▶ violations ──▶ what each actor is at its end
//   audit ──────▶ rows per actor ─────────┘
//
// Invariants, and what is looked at:
//   J1  seq counts entries without gaps, from 1
//   J2  epoch never falls; time never falls
//   J3  every message can be read and is of its subject's actor
//   A2  the messages of one epoch are one worker's
//   A3  an effect has one outcome, and its input never changes; a command (by key and channel, else by source) is decided once;
//       an armed timer fires once
//   A4  nothing stands under, or is sent to, another tenant (our own tenant `system` may be written to)
//   A5  replaying gives the state, events and out of every message, and every snapshot
//   A6  an actor that is not finished has an effect in flight, a timer, or a reason to wait
//   P1  the audit projection holds exactly what the journal says, up to its own position
//   M1  what sessions say their model calls cost, what the budget settled and what the usage projection sums to are one sum
//       (only where all actors of a tenant are looked at)
//
// Memory: one checker per actor: its replayed state (a few KB: transcripts are not in it) and the keys it remembers. Finished
// effects are not kept: an inst is in flight at most once, because its name holds the seq that began it. For streams of more actors
// than memory holds, `passes` reads the stream several times, each time for one part of the actors.
import type { Bus, StoredMessage } from "../bus/port.ts";
import { type ActorAddress, type ActorKind, actorPath, isId, parseActorPath, SYSTEM_TENANT } from "../protocol/ids.ts";
import { decodeJournal, type Entry, entrySeq, firstSeq, type JournalMessage } from "../protocol/journal.ts";
import { canonicalJson, hashOf } from "../protocol/json.ts";
import { IDEMPOTENCY_KEEP_MS, IDEMPOTENCY_KEYS_MAX } from "../protocol/limits.ts";
import { ERRORS } from "../protocol/errors.ts";
import { parseActorSubject, shardOf } from "../protocol/subjects.ts";
import { type ActorState, commandHash, type Core, outerState, type SavedState, type Step, viewOf } from "../state-machines/step.ts";
import { decodeSnapshot } from "./restore.ts";
import { createMoneyCheck, type MoneyCheck, type UsageCosts } from "./verify-money.ts";

export const INVARIANTS = {
  J1: "seq counts entries without gaps, from 1",
  J2: "epoch and time never fall",
  J3: "every message can be read and is of its subject's actor",
  A2: "the messages of one epoch are one worker's",
  A3: "an effect has one outcome and one input; a command is decided once; an armed timer fires once",
  A4: "nothing leaves with another tenant than it came in with",
  A5: "replaying gives every message's state, events and out, and every snapshot",
  A6: "an actor that is not finished has an effect in flight, a timer or a reason to wait",
  P1: "the audit projection holds what the journal says, and each tenant's chain of it is whole",
  M1: "what model calls cost, what the budget settled and what the usage rows sum to are one sum",
} as const;
export type Invariant = keyof typeof INVARIANTS;

export interface Violation {
  readonly invariant: Invariant;
  /** `tenant/kind/id`, or the subject where that names no actor. */
  readonly actor: string;
  /** Where in EVENTS (for a snapshot that cannot be read: in SNAPSHOTS); 0 when nothing stands there. */
  readonly stream_sequence: number;
  /** The actor's own count, where one is known. */
  readonly seq: number | null;
  readonly what: string;
}

/** The audit projection as the verifier sees it; projections/ and the CLI make one, so that this file needs no database. */
export interface AuditView {
  /** Every journal message up to this stream sequence has been projected. */
  position(): Promise<number>;
  /** What one journal message must have become: a digest per row, in order. Pure. */
  rows_of(message: JournalMessage, stream_sequence: number): readonly string[];
  /** The digests of an actor's rows of stream sequences up to `through`, in order. */
  rows(actor: ActorAddress, through: number): AsyncIterable<{ readonly stream_sequence: number; readonly digest: string }>;
  /** What the usage rows of each tenant sum to. */
  usage_costs?(): Promise<UsageCosts>;
}

export type Cores = Readonly<Partial<Record<ActorKind, Core>>>;

export interface ActorFilter {
  readonly tenant?: string | undefined;
  readonly kind?: ActorKind | undefined;
  readonly id?: string | undefined;
}

export interface VerifyOptions {
  readonly bus: Pick<Bus, "read" | "bounds">;
  readonly cores: Cores;
  readonly filter?: ActorFilter;
  readonly audit?: AuditView;
  /** How often the stream is read, each time for one part of the actors. Default 1. */
  readonly passes?: number;
  /** Who has replayed the journals already may say what came out. Default `replayMessage`. */
  readonly replay?: typeof replayMessage;
  report(violation: Violation): void;
}

export interface VerifyReport {
  readonly actors: number;
  readonly messages: number;
  readonly entries: number;
  /** Snapshots that were compared with the replay. */
  readonly snapshots: number;
  /** Audit rows that were compared with the journal. */
  readonly audit_rows: number;
  readonly violations: number;
  /** The last stream sequence that was looked at. */
  readonly through_sequence: number;
}

/** One broken actor must not bury the others: what is above this is counted and not listed. */
const VIOLATIONS_PER_ACTOR_MAX = 20;

const subjectFilter = (filter: ActorFilter, channel: "event" | "snapshot"): string =>
  `tenant.${filter.tenant ?? "*"}.${filter.kind ?? "*"}.${filter.id ?? "*"}.${channel}`;

/** One entry of a message and what it did. */
export interface ReplayedEntry {
  readonly entry: Entry;
  readonly seq: number;
  readonly step: Step;
}

export interface ReplayedMessage {
  readonly state: ActorState;
  readonly entries: readonly ReplayedEntry[];
  /** Where the message says something else than the replay; empty when A5 holds. */
  readonly differences: readonly string[];
}

const short = (value: unknown): string => {
  const text = canonicalJson(value);
  return text.length <= 160 ? text : `${text.slice(0, 157)}…`;
};

function listDifferences(what: string, said: readonly unknown[], replayed: readonly unknown[]): string[] {
  const found: string[] = [];
  for (let index = 0; index < Math.max(said.length, replayed.length) && found.length < 3; index += 1) {
    const [one, other] = [said[index], replayed[index]];
    // Mostly they are written in the same order too, and then nothing has to be put in order.
    if (JSON.stringify(one) === JSON.stringify(other) || canonicalJson(one ?? null) === canonicalJson(other ?? null)) continue;
    const saying = one === undefined ? "nothing" : short(one);
    found.push(`${what} ${index}: the message says ${saying}, the replay ${other === undefined ? "nothing" : short(other)}`);
  }
  return found;
}

/**
 * Applies the entries of one journal message through the pure core, and compares what comes out with what the message says.
 * Throws BrokenPromise where the core cannot apply an entry at all; `on_entry` hears of each entry before and after.
 */
export function replayMessage(
  core: Core,
  before: ActorState | undefined,
  message: JournalMessage,
  on_entry?: (state: ActorState | undefined, replayed: ReplayedEntry) => void,
): ReplayedMessage {
  const at_ms = Date.parse(message.at);
  const entries: ReplayedEntry[] = [];
  let state = before;
  message.entries.forEach((entry, index) => {
    const seq = entrySeq(message, index);
    const step = core.apply(state, message.actor, entry, { seq, at_ms, epoch: message.epoch, worker: message.worker });
    const replayed = { entry, seq, step };
    on_entry?.(state, replayed);
    entries.push(replayed);
    state = step.state;
  });
  if (state === undefined) throw new RangeError("a journal message holds at least one entry");
  const differences: string[] = [];
  if (outerState(state.snapshot) !== message.state) differences.push(`state: the message says ${message.state}, the replay ${outerState(state.snapshot)}`);
  differences.push(
    ...listDifferences(
      "event",
      message.events,
      entries.flatMap((one) => one.step.events),
    ),
  );
  differences.push(
    ...listDifferences(
      "out",
      message.out,
      entries.flatMap((one) => one.step.out),
    ),
  );
  return { state, entries, differences };
}

/** Each field of a saved state as a digest: enough to say which differ, at a hundredth of the size. */
function digestsOf(saved: SavedState): Readonly<Record<string, string>> {
  return Object.fromEntries(Object.entries(saved).map(([field, value]) => [field, hashOf(value).slice(0, 16)]));
}

/** The fields in which two saved states differ. */
export function savedDifferences(one: SavedState, other: SavedState): string[] {
  const [digests, others] = [digestsOf(one), digestsOf(other)];
  return [...new Set([...Object.keys(digests), ...Object.keys(others)])].filter((field) => digests[field] !== others[field]).sort();
}

/** The shape that everything below relies on; what does not have it is reported, never followed. */
function shapeFault(message: JournalMessage): string | undefined {
  if (!Number.isSafeInteger(message.seq) || !Number.isSafeInteger(message.epoch)) return "seq or epoch is no integer";
  if (typeof message.worker !== "string" || typeof message.machine !== "string" || typeof message.state !== "string")
    return "worker, machine or state is no text";
  if (!Array.isArray(message.entries) || !Array.isArray(message.events) || !Array.isArray(message.out)) return "entries, events or out is no list";
  if (message.entries.length === 0) return "it holds no entry";
  if (Number.isNaN(Date.parse(message.at))) return "at is no time";
  return undefined;
}

interface SnapshotExpectation {
  readonly seq: number;
  readonly machine: string;
  readonly last_sequence: number;
  readonly digests: Readonly<Record<string, string>>;
}

type Replay =
  | { readonly kind: "fresh" }
  | { readonly kind: "following"; readonly state: ActorState }
  /** It cannot be replayed from here on; what was wrong has been reported. */
  | { readonly kind: "lost" };

/** What the last message said of itself. */
interface Head {
  readonly seq: number;
  readonly epoch: number;
  readonly worker: string;
  readonly at_ms: number;
  readonly stream_sequence: number;
}

/** The checker of one actor. */
interface ActorCheck {
  readonly address: ActorAddress;
  message(stored: StoredMessage): void;
  /** After the last message. */
  end(): Promise<void>;
  readonly messages: number;
  readonly entries: number;
  readonly snapshots: number;
  readonly audit_rows: number;
}

/** Commands an actor has decided, by the contract alone: last keys (1,000 unless its kind says fewer), seven days; a mark per source. Kept apart from the core's own memory. */
function createDecided(keys_max: number) {
  const keys = new Map<string, { hash: string; at_ms: number }>();
  const marks = new Map<string, { incarnation: string; seq: number }>();
  return {
    /** Answers what is wrong with this decision, if anything, and remembers it. */
    decide(entry: Extract<Entry, { t: "init" | "command" | "refused" }>, seq: number, at_ms: number): string | undefined {
      let fault: string | undefined;
      const hash = entry.t === "refused" ? entry.hash : commandHash(entry.type, entry.body);
      const mark = entry.source === undefined ? undefined : marks.get(entry.source.stream);
      const error = entry.t === "refused" ? entry.error : undefined;
      if (entry.key !== undefined) {
        const key = `${entry.channel}:${entry.key}`;
        const known = keys.get(key);
        const binds = known !== undefined && at_ms - known.at_ms <= IDEMPOTENCY_KEEP_MS;
        if (binds && known.hash === hash) fault = `'${entry.type}' with the key '${entry.key}' on .${entry.channel} was decided before`;
        else if (binds && error?.code !== "conflict")
          fault = `the key '${entry.key}' on .${entry.channel} was used for another body, and was not refused as conflict`;
        const transient = error !== undefined && (ERRORS[error.code]?.transient ?? false);
        if (!transient) {
          // A conflict takes a place in the actor's memory too, but the first body keeps the key.
          keys.set(binds ? `${key}#${seq}` : key, { hash, at_ms });
          if (keys.size > keys_max) keys.delete(keys.keys().next().value as string);
        }
      } else if (entry.source !== undefined && mark?.incarnation === entry.source.incarnation && entry.source.seq <= mark.seq) {
        fault = `'${entry.type}' from ${entry.source.stream} ${entry.source.seq} was decided before (the mark stands at ${mark.seq})`;
      }
      if (entry.source !== undefined) {
        const { stream, incarnation, seq: position } = entry.source;
        marks.set(stream, { incarnation, seq: mark?.incarnation === incarnation ? Math.max(mark.seq, position) : position });
      }
      return fault;
    },
  };
}

interface AuditPlan {
  readonly view: AuditView;
  readonly through: number;
}

function createActorCheck(
  address: ActorAddress,
  core: Core | undefined,
  snapshot: SnapshotExpectation | undefined,
  audit: AuditPlan | undefined,
  replayOf: typeof replayMessage,
  report: (violation: Violation) => void,
): ActorCheck {
  const path = actorPath(address);
  const decided = createDecided(core?.definition.keys_max ?? IDEMPOTENCY_KEYS_MAX);
  const counts = { messages: 0, entries: 0, snapshots: 0, audit_rows: 0 };
  let replay: Replay = { kind: "fresh" };
  let head: Head | undefined;
  let snapshotAwaited = snapshot;
  let reported = 0;
  let unlisted: Invariant | undefined;
  // Running digests of the audit rows the journal asks for: enough to compare, without keeping them.
  const expected = { count: 0, chain: "", last_sequence: 0 };
  const found = (invariant: Invariant, stream_sequence: number, seq: number | null, what: string): void => {
    reported += 1;
    if (reported <= VIOLATIONS_PER_ACTOR_MAX) report({ invariant, actor: path, stream_sequence, seq, what });
    else unlisted ??= invariant;
  };

  function checkOut(message: JournalMessage, stream_sequence: number): void {
    for (const out of message.out) {
      const to = parseActorPath(String(out.to));
      if (to === undefined) found("A4", stream_sequence, message.seq, `the outgoing message ${out.id} names no actor: '${String(out.to).slice(0, 200)}'`);
      else if (to.tenant !== address.tenant && to.tenant !== SYSTEM_TENANT)
        found("A4", stream_sequence, message.seq, `the outgoing message ${out.id} (${out.type}) goes to ${out.to}, under another tenant`);
    }
  }

  /** J1, J2, A2 on the head of a message. Answers what the replay may do with it. */
  function checkHead(message: JournalMessage, at_ms: number, stream_sequence: number): "follow" | "skip" | "lost" {
    const first = firstSeq(message);
    const next = (head?.seq ?? 0) + 1;
    if (head !== undefined) {
      if (message.epoch < head.epoch) found("J2", stream_sequence, message.seq, `epoch falls from ${head.epoch} to ${message.epoch}`);
      if (at_ms < head.at_ms) found("J2", stream_sequence, message.seq, `time falls from ${new Date(head.at_ms).toISOString()} to ${message.at}`);
      if (message.epoch === head.epoch && message.worker !== head.worker)
        found("A2", stream_sequence, message.seq, `epoch ${message.epoch} is ${head.worker}'s, and here ${message.worker}'s`);
    }
    if (first === next) return "follow";
    if (first > next) {
      found("J1", stream_sequence, message.seq, head === undefined ? `the journal begins with seq ${first}` : `seq goes from ${head.seq} to ${first}`);
      return "lost";
    }
    found("J1", stream_sequence, message.seq, `seq ${first}${first === message.seq ? "" : ` to ${message.seq}`} stands here again after ${head?.seq ?? 0}`);
    return message.seq <= (head?.seq ?? 0) ? "skip" : "lost";
  }

  /** A3 on one entry: does the replay await this result, this timer? */
  function checkAwaited(before: ActorState | undefined, entry: Entry, seq: number, stream_sequence: number, at_ms: number): void {
    if (entry.t === "init" || entry.t === "command" || entry.t === "refused") {
      const fault = decided.decide(entry, seq, at_ms);
      if (fault !== undefined) found("A3", stream_sequence, seq, fault);
      return;
    }
    if (core === undefined || before === undefined || core.awaits(before, entry)) return;
    if (entry.t === "timer") found("A3", stream_sequence, seq, `the timer ${entry.inst} fires, which is not armed here: it fired, was cancelled, or never was`);
    else if (entry.t === "done" || entry.t === "fail")
      found(
        "A3",
        stream_sequence,
        seq,
        `'${entry.t}' of the effect ${entry.inst}, which is not in flight here: it has its outcome, was stopped, or never began`,
      );
  }

  /** A3 on what an entry started: new effects bear this entry's seq, and effects that go on keep their input. */
  function checkLedger(before: ActorState | undefined, { seq, step }: ReplayedEntry, stream_sequence: number): void {
    const known = new Map(Object.values(before?.running ?? {}).map((running) => [running.inst, running]));
    for (const running of Object.values(step.state.running)) {
      const earlier = known.get(running.inst);
      if (earlier === undefined) {
        if (!running.inst.startsWith(`${seq}:`)) found("A3", stream_sequence, seq, `the effect ${running.inst} is started again by entry ${seq}`);
      } else if (earlier.input !== running.input && canonicalJson(earlier.input) !== canonicalJson(running.input)) {
        found("A3", stream_sequence, seq, `the input of the effect ${running.inst} changes while it is in flight`);
      }
    }
  }

  /** A5 against the snapshot, once the replay stands where it was taken. */
  function checkSnapshot(state: ActorState, stream_sequence: number): void {
    if (core === undefined || snapshotAwaited === undefined || snapshotAwaited.seq !== state.seq) return;
    const expectation = snapshotAwaited;
    snapshotAwaited = undefined;
    counts.snapshots += 1;
    const digests = digestsOf(core.save(state));
    const fields = [...new Set([...Object.keys(digests), ...Object.keys(expectation.digests)])].filter(
      (field) => digests[field] !== expectation.digests[field],
    );
    if (fields.length > 0) found("A5", stream_sequence, state.seq, `the snapshot at seq ${state.seq} differs from the replay in ${fields.sort().join(", ")}`);
    if (expectation.last_sequence !== stream_sequence)
      found("A5", stream_sequence, state.seq, `the snapshot at seq ${state.seq} says it stands at stream sequence ${expectation.last_sequence}`);
  }

  function follow(message: JournalMessage, stored: StoredMessage): void {
    if (replay.kind === "lost") return;
    if (core === undefined || core.machine_name !== message.machine) {
      found("A5", stored.sequence, message.seq, `it was written by ${message.machine}, which this program does not know: nothing of it was replayed`);
      replay = { kind: "lost" };
      return;
    }
    const before = replay.kind === "following" ? replay.state : undefined;
    // What falls has been reported as J2; the replay goes on with what it should have been, so that the rest is looked at too.
    const epoch = Math.max(message.epoch, before?.epoch ?? 0);
    const at = before !== undefined && Date.parse(message.at) < before.at_ms ? new Date(before.at_ms).toISOString() : message.at;
    try {
      const replayed = replayOf(core, before, { ...message, epoch, at }, (state, one) => {
        checkAwaited(state, one.entry, one.seq, stored.sequence, Date.parse(at));
        checkLedger(state, one, stored.sequence);
      });
      for (const difference of replayed.differences) found("A5", stored.sequence, message.seq, difference);
      replay = { kind: "following", state: replayed.state };
      checkSnapshot(replayed.state, stored.sequence);
    } catch (error) {
      found("A5", stored.sequence, message.seq, `it cannot be replayed: ${error instanceof Error ? error.message : String(error)}`);
      replay = { kind: "lost" };
    }
  }

  function decode(stored: StoredMessage): JournalMessage | undefined {
    let message: JournalMessage;
    try {
      message = decodeJournal(stored.data);
    } catch (error) {
      found("J3", stored.sequence, null, `it cannot be read: ${error instanceof Error ? error.message : String(error)}`);
      return undefined;
    }
    const fault = shapeFault(message);
    if (fault !== undefined) {
      found("J3", stored.sequence, null, `it is no journal message: ${fault}`);
      return undefined;
    }
    const { tenant, kind, id } = message.actor ?? {};
    if (tenant !== address.tenant) found("A4", stored.sequence, message.seq, `the message says it is of tenant '${isId(tenant) ? tenant : "?"}'`);
    else if (kind !== address.kind || id !== address.id)
      found("J3", stored.sequence, message.seq, `the message says it is of ${tenant}/${String(kind)}/${String(id)}`);
    // From here on it counts as what its subject says, so that a foreign body is reported once.
    return { ...message, actor: address };
  }

  async function checkAudit(): Promise<void> {
    if (audit === undefined) return;
    const rows = { count: 0, chain: "", last_sequence: 0 };
    for await (const row of audit.view.rows(address, audit.through)) {
      rows.count += 1;
      rows.chain = hashOf([rows.chain, row.digest]);
      rows.last_sequence = row.stream_sequence;
    }
    counts.audit_rows = rows.count;
    const seq = head?.seq ?? null;
    if (rows.count !== expected.count)
      found(
        "P1",
        expected.last_sequence,
        seq,
        `the audit has ${rows.count} rows up to stream sequence ${audit.through}, the journal asks for ${expected.count}`,
      );
    else if (rows.last_sequence !== expected.last_sequence)
      found("P1", expected.last_sequence, seq, `the last audit row is of stream sequence ${rows.last_sequence}, the journal's is ${expected.last_sequence}`);
    else if (rows.chain !== expected.chain) found("P1", expected.last_sequence, seq, `the audit's ${rows.count} rows are not what the journal says`);
  }

  return {
    address,
    message(stored) {
      counts.messages += 1;
      const message = decode(stored);
      if (message === undefined) {
        replay = { kind: "lost" };
        return;
      }
      counts.entries += message.entries.length;
      if (audit !== undefined && stored.sequence <= audit.through) {
        for (const digest of audit.view.rows_of(message, stored.sequence)) {
          expected.count += 1;
          expected.chain = hashOf([expected.chain, digest]);
          expected.last_sequence = stored.sequence;
        }
      }
      const at_ms = Date.parse(message.at);
      checkOut(message, stored.sequence);
      const next = checkHead(message, at_ms, stored.sequence);
      if (next === "lost") replay = { kind: "lost" };
      else if (next === "follow") follow(message, stored);
      head = {
        seq: Math.max(message.seq, head?.seq ?? 0),
        epoch: Math.max(message.epoch, head?.epoch ?? 0),
        worker: message.epoch >= (head?.epoch ?? 0) ? message.worker : (head?.worker ?? message.worker),
        at_ms: Math.max(at_ms, head?.at_ms ?? 0),
        stream_sequence: stored.sequence,
      };
    },
    async end() {
      const stream_sequence = head?.stream_sequence ?? 0;
      if (replay.kind === "following" && core !== undefined) {
        const { state } = replay;
        const view = viewOf(state);
        const busy = view.running.length > 0 || Object.keys(state.timers).length > 0;
        if (!view.final && !busy && core.definition.waits(view) === undefined)
          found("A6", stream_sequence, state.seq, `it is ${view.state} with no effect in flight, no timer and no reason to wait`);
        // An older machine's snapshot is not read by anybody: such an actor is replayed from its first entry.
        if (snapshotAwaited !== undefined && snapshotAwaited.machine === core.machine_name)
          found("A5", stream_sequence, state.seq, `its snapshot is of seq ${snapshotAwaited.seq}, where no message of the journal ends`);
      } else if (replay.kind === "fresh" && snapshotAwaited !== undefined) {
        found("A5", 0, null, `it has a snapshot of seq ${snapshotAwaited.seq} and no journal`);
      }
      await checkAudit();
      if (unlisted !== undefined)
        report({
          invariant: unlisted,
          actor: path,
          stream_sequence,
          seq: head?.seq ?? null,
          what: `and ${reported - VIOLATIONS_PER_ACTOR_MAX} more violations of this actor`,
        });
    },
    get messages() {
      return counts.messages;
    },
    get entries() {
      return counts.entries;
    },
    get snapshots() {
      return counts.snapshots;
    },
    get audit_rows() {
      return counts.audit_rows;
    },
  };
}

/**
 * Checks every invariant on the journals under a filter, their snapshots and, where a view is given, their audit rows.
 *
 * Promises: looks at everything that was stored when it began, and ends although more is being stored. One violation of an actor does
 *           not hide another actor's.
 * Refuses:  nothing: what cannot be read is a violation. Rejects when the broker or the database cannot answer.
 * Limits:   20 violations listed per actor; the rest are counted in one more line.
 */
export async function verifyAll(options: VerifyOptions): Promise<VerifyReport> {
  const { bus, cores, filter = {}, passes = 1 } = options;
  const total = { actors: 0, messages: 0, entries: 0, snapshots: 0, audit_rows: 0, violations: 0 };
  const report = (violation: Violation): void => {
    total.violations += 1;
    options.report(violation);
  };
  // The projection's position is asked first, the end of EVENTS last: whatever a row or a snapshot speaks of is then within what is read.
  const audit = options.audit === undefined ? undefined : { view: options.audit, through: await options.audit.position() };
  const usage = await options.audit?.usage_costs?.();
  const money = filter.kind === undefined ? createMoneyCheck(usage, (fault) => report({ invariant: "M1", ...fault })) : undefined;
  let through = 0;
  for (let pass = 0; pass < passes; pass += 1) {
    const mine = (actor: ActorAddress): boolean => passes === 1 || shardOf(actor, passes) === pass;
    // A snapshot that was taken after the end of what is read is nobody's concern today; in the first pass there is none such.
    const snapshots = await snapshotExpectations(bus, cores, filter, (actor, last_sequence) => mine(actor) && (pass === 0 || last_sequence <= through), report);
    if (pass === 0) through = (await bus.bounds("EVENTS")).last_sequence;
    const checks = new Map<string, ActorCheck>();
    const checkOf = (actor: ActorAddress): ActorCheck => {
      const path = actorPath(actor);
      let check = checks.get(path);
      if (check === undefined)
        checks.set(path, (check = createActorCheck(actor, cores[actor.kind], snapshots.get(path), audit, options.replay ?? replayMessage, report)));
      return check;
    };
    for await (const stored of bus.read("EVENTS", subjectFilter(filter, "event"), 1, through)) {
      const parsed = parseActorSubject(stored.subject);
      if (parsed.kind === "malformed") {
        if (pass === 0)
          report({ invariant: "J3", actor: stored.subject, stream_sequence: stored.sequence, seq: null, what: `the subject is ${parsed.reason}` });
        continue;
      }
      if (mine(parsed.actor)) checkOf(parsed.actor).message(stored);
      if (pass === 0) heard(money, stored, parsed.actor);
    }
    if (pass === 0) money?.end();
    for (const path of snapshots.keys()) checkOf(parseActorPath(path) as ActorAddress);
    for (const check of checks.values()) {
      await check.end();
      total.actors += check.messages > 0 ? 1 : 0;
      total.messages += check.messages;
      total.entries += check.entries;
      total.snapshots += check.snapshots;
      total.audit_rows += check.audit_rows;
    }
  }
  return { ...total, through_sequence: through };
}

function heard(money: MoneyCheck | undefined, stored: StoredMessage, actor: ActorAddress): void {
  if (money === undefined || (actor.kind !== "session" && actor.kind !== "budget")) return;
  let message: JournalMessage;
  try {
    message = decodeJournal(stored.data, actor);
  } catch {
    return; // J3, or A4: the actor's own checker says so.
  }
  if (shapeFault(message) === undefined) money.message(message, stored.sequence);
}

/** One actor: its journal and snapshot alone are read. */
export function verifyActor(actor: ActorAddress, options: Omit<VerifyOptions, "filter" | "passes">): Promise<VerifyReport> {
  return verifyAll({ ...options, filter: actor });
}

async function snapshotExpectations(
  bus: Pick<Bus, "read">,
  cores: Cores,
  filter: ActorFilter,
  takes: (actor: ActorAddress, last_sequence: number) => boolean,
  report: (violation: Violation) => void,
): Promise<Map<string, SnapshotExpectation>> {
  const found = new Map<string, SnapshotExpectation>();
  for await (const stored of bus.read("SNAPSHOTS", subjectFilter(filter, "snapshot"), 1)) {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "malformed" || !takes(parsed.actor, 0)) continue;
    const path = actorPath(parsed.actor);
    try {
      const { saved, last_sequence } = decodeSnapshot(stored.data);
      if (saved.actor.tenant !== parsed.actor.tenant)
        report({
          invariant: "A4",
          actor: path,
          stream_sequence: stored.sequence,
          seq: saved.seq,
          what: `its snapshot says it is of ${actorPath(saved.actor)}`,
        });
      if (!takes(parsed.actor, last_sequence)) continue;
      // What counts is what a restore makes of it: a field that a later program fills in by itself is no difference.
      const core = cores[parsed.actor.kind];
      const restored = core?.machine_name === saved.machine ? core.save(core.load(saved)) : saved;
      found.set(path, { seq: saved.seq, machine: saved.machine, last_sequence, digests: digestsOf(restored) });
    } catch (error) {
      const what = `its snapshot cannot be restored from: ${error instanceof Error ? error.message : String(error)}`;
      report({ invariant: "A5", actor: path, stream_sequence: stored.sequence, seq: null, what });
    }
  }
  return found;
}
