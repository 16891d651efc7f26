// watch: sees every append the moment it is stored, everything that begins and everything that is said, and names the promise that breaks.
//
// It keeps its own replay of every journal, so that at each moment it can be asked what an actor's journal says: what a worker, a service or
// a reader believes is compared with that, never with another worker.
import { type Broker } from "../../bus/memory.ts";
import { type Delivery, headerOf } from "../../bus/port.ts";
import { HEADER_IDEMPOTENCY_KEY, HEADER_REPLY_TO } from "../../protocol/commands.ts";
import { HEADER_SCHEDULE } from "../../bus/memory-stream.ts";
import { bucketStream } from "../../bus/streams.ts";
import { type ReplayedMessage, replayMessage } from "../../actors/verify.ts";
import { type ActorAddress, actorPath } from "../../protocol/ids.ts";
import { type ActorEvent, decodeJournal, type Entry, entrySeq, firstSeq, type JournalMessage } from "../../protocol/journal.ts";
import { canonicalJson } from "../../protocol/json.ts";
import type { Reply } from "../../protocol/reply.ts";
import { ERRORS } from "../../protocol/errors.ts";
import { dueSubject, parseActorSubject, parseResidentSubject, residentSubject, shardOf, timerSubject } from "../../protocol/subjects.ts";
import type { ActorState, Core } from "../../state-machines/step.ts";
import { decodePlacementEntry } from "../../supervisors/tables.ts";

export interface Decided {
  readonly seq: number;
  readonly entry: Extract<Entry, { t: "init" | "command" | "refused" }>;
}

/** What a journal says, as of now. */
export interface Journal {
  readonly actor: ActorAddress;
  state: ActorState | undefined;
  head: JournalMessage | undefined;
  readonly messages: JournalMessage[];
  readonly events: ActorEvent[];
  readonly ended: Set<string>;
  readonly decided: Decided[];
  readonly workers: Map<number, string>;
  /** What came out of each message, by its seq, and what was before it. */
  readonly replays: Map<number, { readonly before: ActorState | undefined; readonly replayed: ReplayedMessage }>;
}

export interface Start {
  readonly actor: ActorAddress;
  readonly inst: string;
  readonly attempt: number;
  readonly epoch: number;
  readonly src: string;
  readonly input: string;
  readonly worker: string;
}

export interface WatchDeps {
  readonly broker: () => Broker;
  readonly shards: number;
  readonly cores: Readonly<Record<string, Core>>;
  fail(what: string): void;
  trace(line: string): void;
  count(what: string): void;
  /** It is in the journal as the watch has it. */
  on_append?(journal: Journal, message: JournalMessage): void;
}

const entryWords = (entry: Entry): string =>
  entry.t === "init" || entry.t === "command" || entry.t === "refused"
    ? `${entry.t} ${entry.type}${entry.key === undefined ? "" : ` key ${entry.key}`}${entry.t === "refused" ? ` ${entry.error.code}` : ""}`
    : entry.t === "claim"
      ? `claim from ${entry.from ?? "-"} lost [${entry.lost.join(" ")}]`
      : entry.t === "upgrade"
        ? `upgrade to ${entry.to}`
        : `${entry.t} ${entry.inst}`;

const DECODER = new TextDecoder();

export class Watch {
  readonly journals = new Map<string, Journal>();
  readonly starts: Start[] = [];
  /** Everything, in the order of the stream. */
  readonly told: { readonly message: JournalMessage; readonly sequence: number }[] = [];
  readonly #deps: WatchDeps;
  readonly #started = new Map<string, Start>();
  readonly #inputs = new Map<string, string>();
  readonly #placed = new Map<string, number>();
  /** Where a refusal was sent to. */
  readonly #refused = new Set<string>();
  #through = 0;

  constructor(deps: WatchDeps) {
    this.#deps = deps;
  }

  journal(actor: ActorAddress): Journal {
    const path = actorPath(actor);
    let journal = this.journals.get(path);
    if (journal === undefined) {
      journal = { actor, state: undefined, head: undefined, messages: [], events: [], ended: new Set(), decided: [], workers: new Map(), replays: new Map() };
      this.journals.set(path, journal);
    }
    return journal;
  }

  /** For who verifies in the end: every message was replayed when it came. */
  readonly replay: typeof replayMessage = (core, before, message, on_entry) => {
    const known = this.journals.get(actorPath(message.actor))?.replays.get(message.seq);
    if (known === undefined || known.before !== before) return replayMessage(core, before, message, on_entry);
    let state = before;
    for (const one of known.replayed.entries) {
      on_entry?.(state, one);
      state = one.step.state;
    }
    return known.replayed;
  };

  /** To be called whenever something may have been stored. */
  look(): void {
    const events = this.#deps.broker().stream("EVENTS");
    while (this.#through < events.last_sequence) {
      this.#through += 1;
      const stored = events.get(this.#through);
      if (stored === undefined) {
        this.#deps.fail(`B1: message ${this.#through} of EVENTS is gone`);
        continue;
      }
      const parsed = parseActorSubject(stored.subject);
      if (parsed.kind === "malformed") this.#deps.fail(`J3: ${stored.subject} is no actor's`);
      else {
        const message = decodeJournal(stored.data, parsed.actor);
        this.told.push({ message, sequence: stored.sequence });
        this.#append(this.journal(parsed.actor), message);
      }
    }
  }

  #append(journal: Journal, message: JournalMessage): void {
    const { fail, trace, count } = this.#deps;
    const path = actorPath(journal.actor);
    const { head, state: before } = journal;
    trace(
      `${path} seq ${message.seq} epoch ${message.epoch} by ${message.worker} → ${message.state}: ${message.entries.map(entryWords).join(", ")}${message.held === undefined ? "" : ` held [${message.held.join(" ")}]`}`,
    );
    count("appends");
    if (firstSeq(message) !== (head?.seq ?? 0) + 1) fail(`J1: ${path} goes from seq ${head?.seq ?? 0} to ${firstSeq(message)}`);
    if (head !== undefined && message.epoch < head.epoch) fail(`A2: ${path} epoch falls from ${head.epoch} to ${message.epoch}`);
    if (head !== undefined && message.at < head.at) fail(`J2: ${path} time falls from ${head.at} to ${message.at}`);
    const owner = journal.workers.get(message.epoch) ?? message.worker;
    if (owner !== message.worker) fail(`A2: epoch ${message.epoch} of ${path} is ${owner}'s, and ${message.worker} appends under it`);
    journal.workers.set(message.epoch, message.worker);
    const inFlight = Object.values(before?.running ?? {});
    const newOwner = head !== undefined && head.epoch !== message.epoch;
    if (newOwner && inFlight.length > 0 && message.entries[0]?.t !== "claim")
      fail(`C5: ${path} had ${inFlight.map((one) => one.inst).join(", ")} in flight under another owner and was not claimed first`);
    this.#entries(journal, message);
    const core = this.#deps.cores[journal.actor.kind];
    if (core === undefined) return fail(`J3: ${path} is of a kind that nobody hosts`);
    try {
      const replayed = replayMessage(core, before, message);
      for (const difference of replayed.differences) fail(`A5: ${path} seq ${message.seq}: ${difference}`);
      journal.state = replayed.state;
      journal.replays.set(message.seq, { before, replayed });
    } catch (error) {
      fail(`A5: ${path} seq ${message.seq} cannot be replayed: ${error instanceof Error ? error.message : String(error)}`);
    }
    for (const event of message.events) {
      if (event.type === "superseded" || event.type === "session.parked" || event.type === "session.claimed") count(event.type);
      if (event.type === "tool.failed" && event["code"] === "ambiguous") count("ambiguous");
    }
    journal.head = message;
    journal.messages.push(message);
    journal.events.push(...message.events);
    this.#debt(journal, message);
    this.#deps.on_append?.(journal, message);
  }

  #entries(journal: Journal, message: JournalMessage): void {
    const { fail, count } = this.#deps;
    const path = actorPath(journal.actor);
    message.entries.forEach((entry, index) => {
      count(`entry ${entry.t}`);
      if (entry.t === "done" || entry.t === "fail") {
        if (journal.ended.has(entry.inst)) fail(`A3: ${path} ${entry.inst} has a second outcome`);
        journal.ended.add(entry.inst);
        if (!this.#inputs.has(`${path} ${entry.inst}`)) fail(`A3: ${path} ${entry.inst} has an outcome and was never begun`);
      }
      if (entry.t === "timer") {
        if (journal.ended.has(`timer ${entry.inst}`)) fail(`A3: ${path} the timer ${entry.inst} fires a second time`);
        journal.ended.add(`timer ${entry.inst}`);
      }
      if (entry.t === "init" || entry.t === "command" || entry.t === "refused") {
        const { source, key, channel } = entry;
        const final = (other: Decided["entry"]): boolean => !(other.t === "refused" && ERRORS[other.error.code].transient);
        for (const other of journal.decided) {
          const same = other.entry;
          if (key !== undefined && same.key === key && same.channel === channel && final(same))
            fail(`A3: ${path} the key ${key} is decided at ${other.seq} and again at ${entrySeq(message, index)}`);
          if (source !== undefined && same.source?.seq === source.seq && same.source.incarnation === source.incarnation)
            fail(`A3: ${path} the message ${source.seq} of COMMANDS is decided at ${other.seq} and again at ${entrySeq(message, index)}`);
        }
        journal.decided.push({ seq: entrySeq(message, index), entry });
      }
    });
  }

  /** C3, at the append: only a command that comes again may be journaled before the mark is there. */
  #debt(journal: Journal, message: JournalMessage): void {
    const { actor } = journal;
    if (message.entries.some((entry) => (entry.t === "init" || entry.t === "command" || entry.t === "refused") && (entry.key ?? entry.source) !== undefined))
      return;
    if (this.#owes(journal, message) && !this.#hasMark(actor))
      this.#deps.fail(`C3: ${actorPath(actor)} seq ${message.seq} leaves something owing and has no resident mark`);
  }

  #owes({ actor, state }: Journal, message?: JournalMessage): boolean {
    if (actor.kind === "worker" || state === undefined) return false;
    return Object.keys(state.running).length > 0 || Object.keys(state.timers).length > 0 || (message?.out.length ?? 0) > 0;
  }

  #hasMark(actor: ActorAddress): boolean {
    const mark = residentSubject(shardOf(actor, this.#deps.shards), actor);
    return this.#deps.broker().stream("RESIDENT").last(mark) !== undefined;
  }

  /** H3: a mark was just cleared. */
  cleared(subject: string): void {
    const parsed = parseResidentSubject(subject);
    if (parsed === undefined) return;
    const broker = this.#deps.broker();
    if (broker.stream("RESIDENT").last(subject) !== undefined) return;
    const { actor } = parsed;
    const state = this.journals.get(actorPath(actor))?.state;
    if (state === undefined) return;
    this.#deps.count("marks cleared");
    const path = actorPath(actor);
    const running = Object.values(state.running);
    if (running.length > 0) this.#deps.fail(`H3: the mark of ${path} is cleared while ${running.map((one) => one.inst).join(", ")} is in flight`);
    const dues = Object.values(state.timers).map((timer) => timer.due_ms);
    if (dues.length === 0) return;
    const armed = broker.stream("TIMERS").last(timerSubject(actor));
    const at_ms = armed === undefined ? Number.POSITIVE_INFINITY : Date.parse((headerOf(armed.headers, HEADER_SCHEDULE) ?? "").replace(/^@at /, ""));
    const fired = broker.stream("TIMERS").last(`shard.${parsed.shard}.${dueSubject(actor)}`);
    if (at_ms > Math.min(...dues) && fired === undefined)
      this.#deps.fail(`H3: the mark of ${path} is cleared and its timer of ${new Date(Math.min(...dues)).toISOString()} is armed nowhere`);
  }

  /** D2: the placement table was written. */
  placed(subject: string): void {
    const stored = this.#deps.broker().stream(bucketStream("PLACEMENT")).last(subject);
    const entry = stored === undefined ? undefined : decodePlacementEntry(stored.data);
    if (entry === undefined) return;
    const before = this.#placed.get(subject) ?? 0;
    if (entry.epoch < before) this.#deps.fail(`D2: the epoch of ${subject} falls from ${before} to ${entry.epoch}`);
    if (entry.epoch > before && entry.worker !== "") this.#deps.count(entry.reason === "owner_gone" ? "takeovers" : "placements");
    this.#placed.set(subject, entry.epoch);
  }

  /** An effect begins. */
  began(start: Start): void {
    const { fail, trace, count } = this.#deps;
    const journal = this.journal(start.actor);
    const path = actorPath(start.actor);
    const name = `${path} ${start.inst}`;
    trace(`${start.worker} begins ${name} attempt ${start.attempt} (${start.src})`);
    count("effects begun");
    if (start.attempt > 1) count("effects begun again");
    if (start.actor.kind !== "worker" && !this.#hasMark(start.actor)) fail(`C3: ${name} begins and its actor has no resident mark`);
    if (journal.ended.has(start.inst)) fail(`A3: ${name} begins although it has an outcome`);
    const running = Object.values(journal.state?.running ?? {}).find((one) => one.inst === start.inst);
    if (running === undefined) fail(`E1: ${name} begins and the journal does not say so`);
    else if (running.attempt !== start.attempt) fail(`E1: ${name} begins as attempt ${start.attempt}, the journal is at ${running.attempt}`);
    else if (canonicalJson(running.input) !== start.input) fail(`S4: ${name} begins with another input than the journal's`);
    if (journal.head !== undefined && journal.head.epoch !== start.epoch)
      fail(`M1: ${name} begins under epoch ${start.epoch}, the journal is at ${journal.head.epoch}`);
    const attempt = `${name}#${start.attempt}`;
    if (this.#started.has(attempt))
      fail(`A3: attempt ${start.attempt} of ${name} begins twice, at ${this.#started.get(attempt)?.worker ?? ""} and ${start.worker}`);
    this.#started.set(attempt, start);
    if ((this.#inputs.get(name) ?? start.input) !== start.input) fail(`S4: ${name} begins again with another input`);
    this.#inputs.set(name, start.input);
    this.starts.push(start);
  }

  /** A1: a worker says that a command of COMMANDS is done with. Decided it is by its place, by its key, or by a refusal that was told. */
  acknowledged(worker: string, { message, source }: Delivery): void {
    const parsed = parseActorSubject(message.subject);
    if (source.stream !== "COMMANDS" || parsed.kind === "malformed") return;
    const inbox = headerOf(message.headers, HEADER_REPLY_TO);
    if (inbox === undefined || this.#refused.has(inbox)) return;
    const key = headerOf(message.headers, HEADER_IDEMPOTENCY_KEY);
    const decided = this.journals.get(actorPath(parsed.actor))?.decided ?? [];
    const known = decided.some(({ entry }) => entry.source?.seq === source.seq || (key !== undefined && entry.key === key));
    // Creating again what exists is answered and not journaled.
    const again = decided.length > 0 && DECODER.decode(message.data).includes("session.create");
    if (!known && !again) this.#deps.fail(`A1: ${worker} acknowledges message ${source.seq} of COMMANDS to ${actorPath(parsed.actor)}, which no journal has`);
  }

  /** A1: a worker says that a command has been decided. */
  replied(worker: string, inbox: string, data: Uint8Array): void {
    const reply = JSON.parse(DECODER.decode(data)) as Partial<Reply>;
    // What a worker answers to the leader is no command's reply.
    if (reply.actor === undefined) return;
    if (reply.ok !== true) {
      this.#refused.add(inbox);
      return;
    }
    const seq = this.journals.get(reply.actor)?.head?.seq ?? 0;
    if (Number(reply.seq) > seq) this.#deps.fail(`A1: ${worker} says that ${reply.actor} is at ${reply.seq}, and the journal is at ${seq}`);
  }
}
