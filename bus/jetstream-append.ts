// append: the fence, and group commit behind it.
//
//   waiting ──few wait──▶ sent singly ──┬─ acknowledged ──▶ committed
//      └──many wait──▶ in a batch ──────┤
//              └ refused: each singly ◀─┘─ refused or silent ──▶ fence.ts decides
//
// Invariants:
//   G1. Every message carries its own expected sequence, so a member of a batch is fenced as if it went alone.
//   G2. A refused batch stored nothing; its members go singly, so one stale writer harms no other.
//   G4. One append of a subject is in flight; a second waits for the first.
import { HEADER_COMMIT } from "../protocol/commands.ts";
import { headers as newHeaders, type MsgHdrs } from "@nats-io/transport-node";
import { ANSWER_PATIENCE_MS, APPEND_PATIENCE_MS, decideAppend, type Sending } from "./fence.ts";
import { type Answer, type ApiError, type Link, parseJson } from "./jetstream-link.ts";
import { leaderGet } from "./jetstream-reads.ts";
import type { Append, AppendOutcome } from "./port.ts";

/** Below this many waiting, single appends are faster: a batch costs the broker a staging area, about 3 ms on a file. */
const BATCH_MIN = 20;
/** The broker takes 1,000; half leaves the next batch something to carry. */
const BATCH_MESSAGES_MAX = 500;
/** Bounds what the broker stages at once, and the pause that one batch makes for others. */
const BATCH_BYTES_MAX = 4 * 1024 * 1024;
/** More in flight only makes the broker stage more; measured best at four. */
const BATCHES_IN_FLIGHT_MAX = 4;
/** Appends waiting in this process. More means the broker cannot keep up: better said than hoarded. */
const WAITING_MAX = 20_000;
const WAITING_BYTES_MAX = 256 * 1024 * 1024;

/** Expected sequence, commit id and a batch's three headers are below this together. */
const HEADER_BYTES_MAX = 1024;

const STREAM = "EVENTS";
/** The expected sequence was not the last; on a cluster the leader may not name the one it has. */
const WRONG_LAST = new Set([10071, 10164]);

interface Waiting {
  readonly append: Append;
  readonly give_up_at_ms: number;
  readonly settle: (outcome: AppendOutcome) => void;
}

export class Appender {
  #link: Link;
  #waiting: Waiting[] = [];
  #waiting_bytes = 0;
  #held = new Map<string, Waiting[]>();
  #batches_in_flight = 0;
  #singles_in_flight = 0;
  #batch_count = 0;
  #batch_prefix: string;
  #pump_planned = false;

  #on_commit: (appends: number) => void;

  /** `on_commit` hears how many appends travel together, each time that some do. */
  constructor(link: Link, on_commit: (appends: number) => void = () => {}) {
    this.#link = link;
    this.#on_commit = on_commit;
    this.#batch_prefix = link.world.id();
  }

  append(append: Append): Promise<AppendOutcome> {
    if (!this.#link.fits(append.data.length + HEADER_BYTES_MAX))
      return Promise.resolve({ kind: "unavailable", reason: "the append is larger than the broker takes" });
    if (this.#waiting.length >= WAITING_MAX || this.#waiting_bytes >= WAITING_BYTES_MAX) {
      return Promise.resolve({ kind: "unavailable", reason: `${this.#waiting.length} appends are waiting already` });
    }
    return new Promise((resolve) => {
      const settle = (outcome: AppendOutcome): void => {
        this.#release(append.subject);
        resolve(outcome);
      };
      const waiting = { append, settle, give_up_at_ms: this.#link.world.monotonic_ms() + APPEND_PATIENCE_MS };
      const held = this.#held.get(append.subject);
      if (held !== undefined) return void held.push(waiting);
      this.#held.set(append.subject, []);
      this.#enqueue(waiting);
    });
  }

  /** G4: the next append of the subject may go. */
  #release(subject: string): void {
    const next = this.#held.get(subject)?.shift();
    if (next === undefined) this.#held.delete(subject);
    else this.#enqueue(next);
  }

  #enqueue(waiting: Waiting): void {
    this.#waiting.push(waiting);
    this.#waiting_bytes += waiting.append.data.length;
    if (this.#pump_planned) return;
    this.#pump_planned = true;
    // Everything that is appended in the same turn of the loop is seen together.
    queueMicrotask(() => {
      this.#pump_planned = false;
      this.#pump();
    });
  }

  #pump(): void {
    while (this.#waiting.length > 0) {
      const few = this.#waiting.length + this.#singles_in_flight < BATCH_MIN;
      if (few && this.#batches_in_flight === 0) {
        for (const waiting of this.#take(this.#waiting.length)) void this.#singly(waiting);
        return;
      }
      if (this.#batches_in_flight >= BATCHES_IN_FLIGHT_MAX) return;
      // A few more that come while something is under way wait for it: what returns next takes them along.
      if (this.#waiting.length < BATCH_MIN && this.#batches_in_flight + this.#singles_in_flight > 0) return;
      const batch = this.#take(BATCH_MESSAGES_MAX);
      if (batch.length === 1) void this.#singly(batch[0] as Waiting);
      else void this.#together(batch);
    }
  }

  /** The next appends, at least one, at most what one batch may carry. */
  #take(messages_max: number): Waiting[] {
    let bytes = 0;
    let count = 0;
    while (count < this.#waiting.length && count < messages_max) {
      bytes += (this.#waiting[count] as Waiting).append.data.length;
      if (count > 0 && bytes > BATCH_BYTES_MAX) break;
      count += 1;
    }
    const taken = this.#waiting.splice(0, count);
    for (const { append } of taken) this.#waiting_bytes -= append.data.length;
    return taken;
  }

  async #singly(waiting: Waiting): Promise<void> {
    this.#on_commit(1);
    this.#singles_in_flight += 1;
    try {
      waiting.settle(await this.#decide(waiting, () => this.#sendOne(waiting.append)));
    } finally {
      this.#singles_in_flight -= 1;
      this.#pump();
    }
  }

  async #together(batch: readonly Waiting[]): Promise<void> {
    this.#on_commit(batch.length);
    this.#batches_in_flight += 1;
    const sending = await this.#sendBatch(batch).finally(() => {
      this.#batches_in_flight -= 1;
    });
    if (sending.kind === "committed") {
      // Members of a batch are stored one after the other, and the acknowledgement names the last.
      batch.forEach((waiting, index) => waiting.settle({ kind: "committed", sequence: sending.sequence - (batch.length - 1) + index }));
    } else {
      // G2. After silence each member first looks whether it stands; after a refusal it is simply sent.
      for (const waiting of batch) void this.#afterBatch(waiting, sending);
    }
    this.#pump();
  }

  async #afterBatch(waiting: Waiting, sending: Sending): Promise<void> {
    let first: Sending | undefined = sending.kind === "unknown" ? sending : undefined;
    this.#singles_in_flight += 1;
    const attempt = (): Promise<Sending> => {
      const before = first;
      first = undefined;
      return before === undefined ? this.#sendOne(waiting.append) : Promise.resolve(before);
    };
    try {
      waiting.settle(await this.#decide(waiting, attempt));
    } finally {
      this.#singles_in_flight -= 1;
      this.#pump();
    }
  }

  #decide(waiting: Waiting, send: () => Promise<Sending>): Promise<AppendOutcome> {
    const link = this.#link;
    const reads = {
      next_after: (subject: string, sequence: number, patience_ms: number) =>
        leaderGet(link, STREAM, { seq: sequence + 1, next_by_subj: subject }, patience_ms),
      last: (subject: string, patience_ms: number) => leaderGet(link, STREAM, { last_by_subj: subject }, patience_ms),
      is_closed: () => link.closed,
    };
    return decideAppend(link.world, reads, waiting.append, waiting.give_up_at_ms, send);
  }

  async #sendOne(append: Append): Promise<Sending> {
    const answer = await this.#link.ask(append.subject, append.data, { headers: fenceHeaders(append), patience_ms: ANSWER_PATIENCE_MS });
    return readAck(answer);
  }

  async #sendBatch(batch: readonly Waiting[]): Promise<Sending> {
    const link = this.#link;
    if (!(await link.connectedWithin(ANSWER_PATIENCE_MS))) return { kind: "not_stored", reason: "there is no connection to the broker" };
    this.#batch_count += 1;
    const id = `${this.#batch_prefix}.${this.#batch_count.toString(36)}`;
    const question = link.expectAnswer(ANSWER_PATIENCE_MS);
    for (const [index, { append }] of batch.entries()) {
      const headers = fenceHeaders(append);
      const last = index === batch.length - 1;
      headers.set("Nats-Batch-Id", id);
      headers.set("Nats-Batch-Sequence", String(index + 1));
      if (last) headers.set("Nats-Batch-Commit", "1");
      if (link.send(append.subject, append.data, headers, last ? question.reply : undefined)) continue;
      // A batch with a member missing is never committed: the broker forgets it, and nothing was stored.
      question.cancel({ kind: "not_sent", reason: "the client did not take a member of the batch" });
      break;
    }
    return readAck(await question.answer);
  }
}

function fenceHeaders(append: Append): MsgHdrs {
  const headers = newHeaders();
  headers.set("Nats-Expected-Last-Subject-Sequence", String(append.expected_last_sequence));
  headers.set(HEADER_COMMIT, append.commit_id);
  return headers;
}

function readAck(answer: Answer): Sending {
  switch (answer.kind) {
    case "answer": {
      const ack = parseJson(answer.message.data) as { seq?: number; error?: ApiError } | undefined;
      if (ack === undefined) return { kind: "unknown", reason: "the acknowledgement is not JSON" };
      if (ack.error === undefined)
        return typeof ack.seq === "number" ? { kind: "committed", sequence: ack.seq } : { kind: "unknown", reason: "the acknowledgement has no sequence" };
      if (WRONG_LAST.has(ack.error.err_code)) return { kind: "fenced" };
      // Whatever else the broker says (no leader, no room, an equal message still being replicated), the stream itself decides.
      return { kind: "unknown", reason: `${ack.error.description} (${ack.error.err_code})` };
    }
    case "nobody":
      return { kind: "not_stored", reason: "no stream takes appends now" };
    case "too_large":
      return { kind: "not_stored", reason: "the append is larger than the broker takes" };
    case "not_sent":
      return { kind: "not_stored", reason: answer.reason };
    default:
      return { kind: "unknown", reason: answer.reason };
  }
}
