// memory: the bus in one thread and in any World's time: the same promises as JetStream, for tests and the simulation. Nothing here
// uses a clock, a random number or a wait of its own, so a virtual world runs it the same way every time.
//
//   connected ──cut()──▶ disconnected ──mend()──▶ connected
//       └──kill()──▶ dead: its subscriptions are gone, and what it asked is never answered, as for a process that died
//
// Faults: `before(op)` is asked as an operation leaves its connection, `after(op)` as its answer comes back.
//
// Invariants:
//   M3. A dead connection hears and is told nothing. What it had sent may still arrive.
//   M4. A fault only does what a network or a broker can do: a stored message stays stored, whatever happens to its answer.
import { assert } from "../protocol/assert.ts";
import { HEADER_COMMIT } from "../protocol/commands.ts";
import { INBOX_UNDECIDED_MAX } from "../protocol/limits.ts";
import { errorFields, type Log, silentLog } from "../protocol/log.ts";
import { dueSubject, timerSubject } from "../protocol/subjects.ts";
import { pause, timestamp, type World } from "../protocol/world.ts";
import { ANSWER_PATIENCE_MS, APPEND_PATIENCE_MS, BusUnavailable, decideAppend, type Sending } from "./fence.ts";
import { MemoryBucket } from "./memory-bucket.ts";
import { MemoryCore } from "./memory-core.ts";
import { HEADER_SCHEDULE, HEADER_SCHEDULE_TARGET, MemoryStream, type StoreOutcome } from "./memory-stream.ts";
import {
  type Append,
  type AppendOutcome,
  BUCKETS,
  type Bucket,
  type BucketName,
  type Bus,
  type CasOutcome,
  type ConnectionState,
  type CoreMessage,
  type Headers,
  type InboxHandlers,
  type InboxSpec,
  type PublishOutcome,
  type StoredMessage,
  STREAMS,
  type StreamName,
  type Subscription,
} from "./port.ts";
import { type Declarations, declareStreams, streamOf } from "./streams.ts";

export interface Operation {
  /** `deliver`: a message of an inbox on its way to its reader; `hear`: a core message on its way to a listener. */
  readonly kind: "publish" | "append" | "read" | "clear" | "schedule" | "ack" | "bucket_write" | "bucket_read" | "deliver" | "hear" | "send" | "request";
  readonly connection: string;
  /** Or the filter of a read. */
  readonly subject: string;
}
/** It arrives later (others may overtake it), or never. */
export type FaultBefore = { readonly kind: "delay"; readonly ms: number } | { readonly kind: "unavailable" };
/** It was done; the answer comes later, or never. */
export type FaultAfter = { readonly kind: "delay"; readonly ms: number } | { readonly kind: "lose_answer" };

export interface Faults {
  before?(operation: Operation): FaultBefore | undefined;
  after?(operation: Operation): FaultAfter | undefined;
}

export interface MemoryBrokerOptions {
  readonly world: World;
  readonly shards: number;
  readonly log?: Log;
  readonly faults?: Faults;
  readonly commands_bytes_max?: number;
  readonly tokens_bytes_max?: number;
  readonly lease_ttl_ms?: number;
}

export interface MemoryBroker {
  connect(name: string): Bus;
  /** Every connection of this name dies with its process. */
  kill(name: string): void;
  /** The network between a connection and the broker: cut, and whole again. */
  cut(name: string): void;
  mend(name: string): void;
  /** The broker is gone for a while and comes back without its memory streams. */
  restart(down_ms: number): Promise<void>;
}

const REQUEST_PATIENCE_MS = 5_000;
/** The broker takes no larger message, on any subject. */
const PAYLOAD_BYTES_MAX = 4 * 1024 * 1024;
/** As the real inbox: the wait for an acknowledgement, the pause before opening again. */
const ACK_WAIT_MS = 30_000;
const REOPEN_MS = 20;
const SETTLE_PATIENCE_MS = 3_000;
/** A gap is seen with the next heartbeat. */
const HEARTBEAT_MS = 500;

export function createMemoryBroker(options: MemoryBrokerOptions): MemoryBroker {
  return new Broker(options);
}

export class Broker implements MemoryBroker {
  readonly world: World;
  readonly log: Log;
  readonly faults: Faults;
  readonly declarations: Declarations;
  readonly core: MemoryCore;
  #streams = new Map<string, MemoryStream>();
  #connections = new Set<Connection>();
  /** The readers that each durable has; the latest has taken over, and when it ends the one before it goes on. */
  readonly #readers = new Map<string, MemoryInbox[]>();
  #waiters = new Map<string, Set<() => void>>();

  constructor(options: MemoryBrokerOptions) {
    this.world = options.world;
    this.log = options.log ?? silentLog;
    this.faults = options.faults ?? {};
    this.declarations = declareStreams({ ...options, replicas: 1 });
    this.core = new MemoryCore(() => this.world.random());
    for (const name of STREAMS) this.#make(name);
    for (const name of BUCKETS) this.#make(this.declarations.buckets[name].name);
  }

  connect(name: string): Bus {
    const connection = new Connection(this, name);
    this.#connections.add(connection);
    return connection;
  }
  kill(name: string): void {
    for (const connection of this.#named(name)) connection.die();
  }
  cut(name: string): void {
    for (const connection of this.#named(name)) connection.become("disconnected");
  }
  mend(name: string): void {
    for (const connection of this.#named(name)) connection.become("connected");
  }
  async restart(down_ms: number): Promise<void> {
    const connected = [...this.#connections].filter((connection) => connection.state === "connected");
    for (const connection of connected) connection.become("disconnected");
    for (const name of STREAMS) if (this.declarations.streams[name].storage === "memory") this.#make(name);
    await pause(this.world, down_ms);
    for (const connection of connected) connection.become("connected");
  }
  forget(connection: Connection): void {
    this.#connections.delete(connection);
  }

  addReader(durable: string, inbox: MemoryInbox): void {
    this.#readers.set(durable, [...(this.#readers.get(durable) ?? []), inbox]);
  }
  reads(durable: string, inbox: MemoryInbox): boolean {
    return this.#readers.get(durable)?.at(-1) === inbox;
  }
  removeReader(durable: string, inbox: MemoryInbox): void {
    const had = this.reads(durable, inbox);
    const left = (this.#readers.get(durable) ?? []).filter((other) => other !== inbox);
    if (left.length === 0) this.#readers.delete(durable);
    else this.#readers.set(durable, left);
    if (had) left.at(-1)?.missed();
  }

  stream(name: string): MemoryStream {
    const stream = this.#streams.get(name);
    assert(stream !== undefined, "a stream is one of its declared names");
    return stream;
  }

  /** A message as it arrives: heard by who listens to its subject, and stored where a stream covers it. */
  arrive(message: CoreMessage, expected_last_sequence?: number): { heard: boolean; stored: StoreOutcome | undefined; stream: StreamName | undefined } {
    const heard = this.core.publish(message);
    const stream = streamOf(this.declarations, message.subject);
    const stored = stream === undefined ? undefined : this.stream(stream).store(message.subject, message.data, message.headers, expected_last_sequence);
    return { heard, stored, stream };
  }

  /** Resolves with the next message stored in a stream, or when woken. */
  awaitStored(stream: string): { stored: Promise<void>; wake(): void } {
    let wake!: () => void;
    const stored = new Promise<void>((resolve) => (wake = resolve));
    const waiters = this.#waiters.get(stream) ?? new Set();
    this.#waiters.set(stream, waiters.add(wake));
    return {
      stored,
      wake: () => {
        waiters.delete(wake);
        wake();
      },
    };
  }

  #named(name: string): Connection[] {
    return [...this.#connections].filter((connection) => connection.name === name);
  }

  #make(name: string): void {
    const declared = [...Object.values(this.declarations.streams), ...Object.values(this.declarations.buckets)].find((candidate) => candidate.name === name);
    assert(declared !== undefined, "a stream is one of its declared names");
    const stream = new MemoryStream(declared, this.world, {
      on_stored: () => {
        const waiters = this.#waiters.get(name);
        if (waiters === undefined) return;
        this.#waiters.delete(name);
        for (const wake of waiters) wake();
      },
      on_republish: (subject, headers, data) => void this.core.publish({ subject, headers, data }),
    });
    this.#streams.set(name, stream);
  }
}

/** What came of an operation over a connection. */
export type Reach<T> =
  | { readonly kind: "answer"; readonly value: T }
  | { readonly kind: "not_sent"; readonly reason: string }
  | { readonly kind: "silence"; readonly reason: string };

export class Connection implements Bus {
  readonly broker: Broker;
  readonly name: string;
  readonly shards: number;
  readonly #log: Log;
  #state: ConnectionState = "connected";
  #dead = false;
  #closed = false;
  #state_listeners = new Set<(state: ConnectionState) => void>();
  #ends = new Set<() => void>();
  #buckets: ReadonlyMap<BucketName, Bucket>;
  #busy = new Map<string, Promise<unknown>>();

  constructor(broker: Broker, name: string) {
    this.broker = broker;
    this.name = name;
    this.shards = broker.declarations.parameters.shards;
    this.#log = broker.log.with({ connection: name });
    this.#buckets = new Map(BUCKETS.map((bucket) => [bucket, new MemoryBucket(this, bucket)]));
  }

  get state(): ConnectionState {
    return this.#state;
  }
  get over(): boolean {
    return this.#dead || this.#closed;
  }

  // ——— the life of a connection

  die(): void {
    this.#dead = true;
    this.#end();
  }
  async close(): Promise<void> {
    if (this.over) return;
    this.become("disconnected");
    this.#closed = true;
    this.#end();
  }
  #end(): void {
    for (const end of [...this.#ends]) end();
    this.#ends.clear();
    this.#state_listeners.clear();
    this.broker.forget(this);
  }
  become(state: ConnectionState): void {
    if (this.over || this.#state === state) return;
    this.#state = state;
    for (const listener of [...this.#state_listeners]) this.guard("a listener of the connection's state threw", () => listener(state));
  }
  on_state(listener: (state: ConnectionState) => void): Subscription {
    this.#state_listeners.add(listener);
    return { stop: async () => void this.#state_listeners.delete(listener) };
  }
  /** Called when the connection ends; the answer forgets it. */
  onEnd(end: () => void): () => void {
    this.#ends.add(end);
    return () => void this.#ends.delete(end);
  }
  async connectedWithin(patience_ms: number): Promise<boolean> {
    if (this.#state === "connected" || this.#closed) return this.#state === "connected";
    return new Promise((resolve) => {
      const finish = (): void => {
        cancel();
        this.#state_listeners.delete(finish);
        forget();
        resolve(this.#state === "connected");
      };
      const cancel = this.broker.world.after(patience_ms, finish);
      const forget = this.onEnd(finish);
      this.#state_listeners.add(finish);
    });
  }

  /** Calls somebody else's code and logs what it throws, at once or later. */
  guard(what: string, call: () => unknown): void {
    const report = (error: unknown): void => this.#log.error(what, errorFields(error));
    try {
      const result = call();
      if (result instanceof Promise) result.catch(report);
    } catch (error) {
      report(error);
    }
  }

  /**
   * One operation against the broker. For a dead connection it never answers (M3); after the patience it is silence, and what was
   * sent may still be done.
   */
  async reach<T>(kind: Operation["kind"], subject: string, patience_ms: number, act: () => T): Promise<Reach<T>> {
    const { world, faults } = this.broker;
    // As on a wire, nothing is done before the caller has gone on.
    await Promise.resolve();
    if (this.#dead) return never();
    if (this.#closed) return { kind: "not_sent", reason: "the connection is closed" };
    if (this.#state === "disconnected" && !(await this.connectedWithin(patience_ms)))
      return this.#dead ? never() : { kind: "not_sent", reason: "there is no connection to the broker" };
    const operation = { kind, connection: this.name, subject };
    const before = faults.before?.(operation);
    if (before?.kind === "unavailable") {
      await pause(world, patience_ms);
      return this.#dead ? never() : { kind: "silence", reason: "no answer within the patience" };
    }
    if (before === undefined) return this.#answer(operation, patience_ms, act());
    // Patience runs while it is on its way, and it arrives whether or not anybody still waits (M4).
    const arrival = pause(world, before.ms).then(() => this.#answer(operation, patience_ms, act()));
    return this.#orSilence(arrival, patience_ms);
  }

  async #answer<T>(operation: Operation, patience_ms: number, value: T): Promise<Reach<T>> {
    const after = this.broker.faults.after?.(operation);
    if (after !== undefined) {
      const lost = after.kind === "lose_answer" || after.ms > patience_ms;
      await pause(this.broker.world, lost ? patience_ms : after.ms);
      if (lost) return this.#dead ? never() : { kind: "silence", reason: "no answer within the patience" };
    } else {
      await Promise.resolve();
    }
    if (this.#dead) return never();
    return this.#state === "disconnected" ? { kind: "silence", reason: "the connection was lost" } : { kind: "answer", value };
  }

  #orSilence<T>(arrival: Promise<Reach<T>>, patience_ms: number): Promise<Reach<T>> {
    return new Promise((resolve) => {
      const cancel = this.broker.world.after(patience_ms, () => {
        if (!this.#dead) resolve({ kind: "silence", reason: "no answer within the patience" });
      });
      void arrival.then((outcome) => {
        cancel();
        resolve(outcome);
      });
    });
  }

  // ——— streams

  async publish(
    subject: string,
    data: Uint8Array,
    options: { headers?: Headers; expected_last_sequence?: number; patience_ms?: number } = {},
  ): Promise<PublishOutcome> {
    return this.#publish("publish", subject, data, options.headers ?? {}, options.expected_last_sequence, options.patience_ms ?? REQUEST_PATIENCE_MS);
  }

  async #publish(
    kind: "publish" | "schedule",
    subject: string,
    data: Uint8Array,
    headers: Headers,
    expected: number | undefined,
    patience_ms: number,
  ): Promise<PublishOutcome> {
    if (data.length > PAYLOAD_BYTES_MAX) return { kind: "too_large" };
    const outcome = await this.reach(kind, subject, patience_ms, () => this.broker.arrive({ subject, data, headers: fenced(headers, expected) }, expected));
    if (outcome.kind !== "answer") return { kind: "unavailable", reason: outcome.reason };
    const { stored, stream } = outcome.value;
    if (stored === undefined || stream === undefined) return { kind: "unavailable", reason: "no stream takes it now" };
    return stored.kind === "stored" ? { kind: "stored", stream, sequence: stored.sequence } : { kind: stored.kind };
  }

  schedule(actor: Parameters<Bus["schedule"]>[0], at_ms: number, data: Uint8Array, expected_last_sequence: number): Promise<PublishOutcome> {
    const headers = { [HEADER_SCHEDULE]: `@at ${timestamp(at_ms)}`, [HEADER_SCHEDULE_TARGET]: dueSubject(actor) };
    return this.#publish("schedule", timerSubject(actor), data, headers, expected_last_sequence, REQUEST_PATIENCE_MS);
  }

  /** One append of a subject is in flight; a second waits for the first. */
  append(append: Append): Promise<AppendOutcome> {
    const before = this.#busy.get(append.subject);
    const outcome = before === undefined ? this.#append(append) : before.then(() => this.#append(append));
    this.#busy.set(append.subject, outcome);
    void outcome.then(() => {
      if (this.#busy.get(append.subject) === outcome) this.#busy.delete(append.subject);
    });
    return outcome;
  }

  async #append(append: Append): Promise<AppendOutcome> {
    if (append.data.length > PAYLOAD_BYTES_MAX) return { kind: "unavailable", reason: "the append is larger than the broker takes" };
    const { world } = this.broker;
    const give_up_at_ms = world.monotonic_ms() + APPEND_PATIENCE_MS;
    const expected = append.expected_last_sequence;
    const headers = fenced({ [HEADER_COMMIT]: append.commit_id }, expected);
    const send = async (): Promise<Sending> => {
      const outcome = await this.reach("append", append.subject, ANSWER_PATIENCE_MS, () =>
        this.broker.arrive({ subject: append.subject, data: append.data, headers }, expected),
      );
      if (outcome.kind === "not_sent") return { kind: "not_stored", reason: outcome.reason };
      if (outcome.kind === "silence") return { kind: "unknown", reason: outcome.reason };
      const { stored, stream } = outcome.value;
      if (stream !== "EVENTS" || stored === undefined) return { kind: "not_stored", reason: "no stream takes appends now" };
      if (stored.kind === "stored") return { kind: "committed", sequence: stored.sequence };
      return stored.kind === "conflict" ? { kind: "fenced" } : { kind: "unknown", reason: stored.kind };
    };
    const events = (): MemoryStream => this.broker.stream("EVENTS");
    const reads = {
      next_after: (subject: string, sequence: number, patience_ms: number) =>
        this.readFrom("read", subject, () => events().next([subject], sequence + 1), patience_ms),
      last: (subject: string, patience_ms: number) => this.readFrom("read", subject, () => events().last(subject), patience_ms),
      is_closed: () => this.over,
    };
    return decideAppend(world, reads, append, give_up_at_ms, send);
  }

  /** A read of the leader: the value, or a rejection. */
  async readFrom<T>(kind: "read" | "bucket_read", subject: string, act: () => T, patience_ms: number = REQUEST_PATIENCE_MS): Promise<T> {
    const outcome = await this.reach(kind, subject, patience_ms, act);
    if (outcome.kind === "answer") return outcome.value;
    throw new BusUnavailable(`cannot read ${subject}: ${outcome.reason}`);
  }

  last(stream: StreamName, subject: string): Promise<StoredMessage | undefined> {
    return this.readFrom("read", subject, () => this.broker.stream(stream).last(subject));
  }
  last_of_each(stream: StreamName, filter: string): Promise<StoredMessage[]> {
    return this.readFrom("read", filter, () => this.broker.stream(stream).lastOfEach(filter));
  }
  async *read(stream: StreamName, filter: string, from_sequence: number, to_sequence: number = Number.MAX_SAFE_INTEGER): AsyncGenerator<StoredMessage> {
    let next = from_sequence;
    for (;;) {
      const message = await this.readFrom("read", filter, () => this.broker.stream(stream).next([filter], next));
      if (message === undefined || message.sequence > to_sequence) return;
      next = message.sequence + 1;
      yield message;
    }
  }
  counts(stream: StreamName, filter: string): ReturnType<Bus["counts"]> {
    return this.readFrom("read", filter, () => this.broker.stream(stream).countsOf(filter));
  }
  async bounds(stream: StreamName): ReturnType<Bus["bounds"]> {
    return this.readFrom("read", stream, () => {
      const { first_sequence, last_sequence, incarnation, messages, bytes } = this.broker.stream(stream);
      return { first_sequence, last_sequence, incarnation, messages, bytes };
    });
  }
  async clear(stream: "RESIDENT", subject: string, sequence: number): Promise<CasOutcome> {
    assert(this.broker.stream(stream).declared.messages_per_subject_max === 1, "clear is for streams with one message a subject");
    const outcome = await this.reach("clear", subject, REQUEST_PATIENCE_MS, () => this.broker.stream(stream).remove(sequence));
    if (outcome.kind !== "answer") return { kind: "unavailable", reason: outcome.reason };
    return outcome.value ? { kind: "ok", revision: sequence } : { kind: "conflict" };
  }

  async follow(stream: StreamName, filter: string, from_sequence: number, on_message: (message: StoredMessage) => Promise<void> | void): Promise<Subscription> {
    assert(this.broker.declarations.streams[stream].kept === "always", "a work queue is consumed, not followed");
    if (this.#dead) return never();
    return this.followStream(stream, filter, { from_sequence }, on_message);
  }

  /** Messages from a sequence on, for ever. `on_connected` is called before the first and after each cut, and may move the start. */
  followStream(
    name: string,
    filter: string,
    start: { from_sequence: number; on_connected?: () => number },
    on_message: (message: StoredMessage) => Promise<void> | void,
  ): Subscription {
    let stopped = false;
    let wake = (): void => {};
    const stop = (): void => {
      stopped = true;
      forget();
      wake();
    };
    const forget = this.onEnd(stop);
    const live = async (): Promise<void> => {
      let next = start.from_sequence;
      let stream = this.broker.stream(name);
      let fresh = true;
      while (!stopped) {
        if (this.#state === "disconnected") {
          fresh = true;
          await this.connectedWithin(REQUEST_PATIENCE_MS);
          continue;
        }
        if (fresh && start.on_connected !== undefined) next = start.on_connected();
        fresh = false;
        // A stream that was made anew is followed from its beginning.
        if (stream !== this.broker.stream(name)) {
          stream = this.broker.stream(name);
          next = 1;
        }
        const message = stream.next([filter], next);
        if (message === undefined) {
          const waiting = this.broker.awaitStored(name);
          const states = this.on_state(waiting.wake);
          wake = waiting.wake;
          await waiting.stored;
          await states.stop();
          continue;
        }
        next = message.sequence + 1;
        await Promise.resolve();
        if (stopped) return;
        try {
          await on_message(message);
        } catch (error) {
          this.#log.error("a follower's listener threw", { stream: name, sequence: message.sequence, ...errorFields(error) });
        }
      }
    };
    void live();
    return { stop: async () => stop() };
  }

  async consume(spec: InboxSpec, handlers: InboxHandlers): Promise<Subscription> {
    await this.connectedWithin(REQUEST_PATIENCE_MS);
    if (this.#dead) return never();
    return new MemoryInbox(this, spec, handlers);
  }

  // ——— core messages

  send(subject: string, data: Uint8Array, options: { headers?: Headers; reply?: string } = {}): void {
    void this.#send("send", subject, data, options.headers ?? {}, options.reply);
  }

  async #send(kind: "send" | "request", subject: string, data: Uint8Array, headers: Headers, reply: string | undefined): Promise<boolean> {
    if (this.over || this.#state === "disconnected" || data.length > PAYLOAD_BYTES_MAX) return false;
    const copy = data.slice();
    await Promise.resolve();
    const fault = this.broker.faults.before?.({ kind, connection: this.name, subject });
    if (fault?.kind === "unavailable") return true;
    if (fault?.kind === "delay") await pause(this.broker.world, fault.ms);
    const { heard, stored, stream } = this.broker.arrive({ subject, data: copy, headers, ...(reply === undefined ? {} : { reply }) });
    // A stream acknowledges whoever gave a reply subject, as it does every publish.
    if (stored !== undefined && reply !== undefined) this.broker.core.publish({ subject: reply, headers: {}, data: acknowledgement(stored, stream) });
    return heard || stored !== undefined;
  }

  subscribe(subject: string, listener: (message: CoreMessage) => void, options: { queue?: string } = {}): Subscription {
    const { broker } = this;
    let stopped = false;
    const tell = (message: CoreMessage): void => {
      if (!stopped && !this.over && this.#state === "connected") this.guard("a listener threw", () => listener(message));
    };
    const remove = broker.core.add({
      subject,
      queue: options.queue,
      connection: this.name,
      hear: (message) => {
        const fault = broker.faults.before?.({ kind: "hear", connection: this.name, subject: message.subject });
        if (fault?.kind === "unavailable") return;
        if (fault?.kind === "delay") broker.world.after(fault.ms, () => tell(message));
        else queueMicrotask(() => tell(message));
      },
    });
    const stop = (): void => {
      stopped = true;
      remove();
      forget();
    };
    const forget = this.onEnd(stop);
    return { stop: async () => stop() };
  }

  async request(subject: string, data: Uint8Array, options: { headers?: Headers; patience_ms?: number } = {}): Promise<CoreMessage | undefined> {
    const reply = this.inbox();
    return new Promise((resolve) => {
      const finish = (answer: CoreMessage | undefined): void => {
        cancel();
        void subscription.stop();
        if (!this.#dead) resolve(answer);
      };
      const cancel = this.broker.world.after(options.patience_ms ?? REQUEST_PATIENCE_MS, () => finish(undefined));
      const subscription = this.subscribe(reply, finish);
      void this.#send("request", subject, data, options.headers ?? {}, reply).then((heard) => {
        if (!heard) finish(undefined);
      });
    });
  }
  inbox(): string {
    return `_INBOX.${this.broker.world.id()}`;
  }

  bucket(name: BucketName): Bucket {
    const bucket = this.#buckets.get(name);
    assert(bucket !== undefined, "a bucket is one of its declared names");
    return bucket;
  }

  async flush(): Promise<void> {
    await Promise.resolve();
  }
}

/** The reader of a durable. A later reader of the same durable takes over; this one then hears nothing more. */
class MemoryInbox implements Subscription {
  #connection: Connection;
  #spec: InboxSpec;
  #handlers: InboxHandlers;
  #key: string;
  #stopped = false;
  #cursor = 1;
  /** Delivered and not acknowledged, and when. In order of delivery. */
  #unacknowledged = new Map<number, number>();
  /** How often it began anew. */
  #openings = 0;
  #must_reset = false;
  #reading = false;
  #wake = (): void => {};
  #cancel_ack_wait: (() => void) | undefined;
  #forget: () => void;

  constructor(connection: Connection, spec: InboxSpec, handlers: InboxHandlers) {
    this.#connection = connection;
    this.#spec = spec;
    this.#handlers = handlers;
    this.#key = `${spec.stream} ${spec.durable}`;
    connection.broker.addReader(this.#key, this);
    const states = connection.on_state((state) => {
      if (state === "disconnected") this.#must_reset = true;
      this.#wake();
    });
    const forget = connection.onEnd(() => this.#stop());
    this.#forget = () => {
      forget();
      void states.stop();
    };
    void this.#live();
  }

  async stop(): Promise<void> {
    this.#stop();
  }

  #stop(): void {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#connection.broker.removeReader(this.#key, this);
    this.#cancel_ack_wait?.();
    this.#forget();
    this.#wake();
  }

  /** Another reader had the durable meanwhile: the next heartbeat shows it. */
  missed(): void {
    this.#connection.broker.world.after(HEARTBEAT_MS, () => {
      this.#reset();
      if (!this.#reading) void this.#live();
    });
  }

  #reset(): void {
    this.#must_reset = true;
    this.#wake();
  }

  async #live(): Promise<void> {
    const { broker } = this.#connection;
    const { stream: name, filters } = this.#spec;
    this.#reading = true;
    while (!this.#stopped && broker.reads(this.#key, this)) {
      if (this.#must_reset) await this.#openAgain();
      if (this.#stopped) break;
      const message =
        this.#unacknowledged.size < (this.#spec.undecided_max ?? INBOX_UNDECIDED_MAX) ? broker.stream(name).next(filters, this.#cursor) : undefined;
      if (message === undefined || this.#must_reset) {
        if (!this.#must_reset) await this.#idle(name);
        continue;
      }
      this.#cursor = message.sequence + 1;
      const fault = broker.faults.before?.({ kind: "deliver", connection: this.#connection.name, subject: message.subject });
      if (fault?.kind === "unavailable") {
        // Lost on its way: the next heartbeat shows the gap.
        await pause(broker.world, HEARTBEAT_MS);
        this.#must_reset = true;
        continue;
      }
      if (fault?.kind === "delay") await pause(broker.world, fault.ms);
      else await Promise.resolve();
      if (this.#stopped || this.#must_reset || !broker.reads(this.#key, this)) continue;
      this.#deliver(message);
    }
    this.#reading = false;
  }

  async #idle(name: string): Promise<void> {
    const waiting = this.#connection.broker.awaitStored(name);
    this.#wake = waiting.wake;
    await waiting.stored;
    this.#wake = () => {};
  }

  async #openAgain(): Promise<void> {
    const { broker } = this.#connection;
    await pause(broker.world, REOPEN_MS);
    while (!this.#stopped && this.#connection.state === "disconnected") await this.#connection.connectedWithin(REQUEST_PATIENCE_MS);
    if (this.#stopped || !broker.reads(this.#key, this)) return;
    this.#must_reset = false;
    this.#openings += 1;
    this.#cursor = 1;
    this.#unacknowledged.clear();
    this.#connection.guard("an inbox's on_reset threw", () => this.#handlers.on_reset());
  }

  #deliver(message: StoredMessage): void {
    const { broker, name: connection } = this.#connection;
    const { stream: name } = this.#spec;
    const stream = broker.stream(name);
    this.#unacknowledged.set(message.sequence, broker.world.monotonic_ms());
    this.#watchAcks();
    const opening = this.#openings;
    const operation = { kind: "ack", connection, subject: message.subject } as const;
    const send = (arrived: () => void): void => {
      if (this.#connection.over || this.#connection.state === "disconnected") return;
      const arrive = (): void => {
        this.#unacknowledged.delete(message.sequence);
        stream.remove(message.sequence);
        this.#wake();
        arrived();
      };
      const fault = broker.faults.before?.(operation);
      if (fault?.kind === "unavailable") return;
      if (fault?.kind === "delay") broker.world.after(fault.ms, arrive);
      else queueMicrotask(arrive);
    };
    const settle = (): Promise<boolean> =>
      new Promise((resolve) => {
        const unsure = (): void => {
          this.#reset(); // also a later opening: it has delivered what was said after this
          resolve(false);
        };
        // A later opening may have delivered it again before the acknowledgement arrived.
        const same = (): boolean => !this.#stopped && !this.#must_reset && this.#openings === opening && broker.reads(this.#key, this);
        const answer = (): void => (same() ? resolve(true) : unsure());
        const cancel = broker.world.after(SETTLE_PATIENCE_MS, unsure);
        send(() => {
          const fault = broker.faults.after?.(operation);
          if (fault?.kind === "lose_answer") return;
          cancel();
          if (fault?.kind === "delay") broker.world.after(fault.ms, answer);
          else answer();
        });
      });
    const source = { stream: name, incarnation: stream.incarnation, seq: message.sequence };
    this.#connection.guard("an inbox's on_delivery threw", () => this.#handlers.on_delivery({ message, source, ack: () => send(() => undefined), settle }));
  }

  /** What is not acknowledged in time comes again, and a redelivery is a reset. */
  #watchAcks(): void {
    const { world } = this.#connection.broker;
    if (this.#cancel_ack_wait !== undefined) return;
    const [oldest_ms] = this.#unacknowledged.values();
    if (oldest_ms === undefined) return;
    this.#cancel_ack_wait = world.after(Math.max(0, oldest_ms + ACK_WAIT_MS - world.monotonic_ms()), () => {
      this.#cancel_ack_wait = undefined;
      const [still_ms] = this.#unacknowledged.values();
      // Opening again forgets what was unacknowledged, and the next delivery begins the watch anew.
      if (still_ms !== undefined && still_ms + ACK_WAIT_MS <= world.monotonic_ms()) this.#reset();
      else this.#watchAcks();
    });
  }
}

function fenced(headers: Headers, expected_last_sequence: number | undefined): Headers {
  return expected_last_sequence === undefined ? headers : { ...headers, "Nats-Expected-Last-Subject-Sequence": String(expected_last_sequence) };
}

/** As the broker acknowledges. */
function acknowledgement(stored: StoreOutcome, stream: StreamName | undefined): Uint8Array {
  const body =
    stored.kind === "stored"
      ? { stream, seq: stored.sequence }
      : { error: { code: stored.kind === "overloaded" ? 503 : 400, description: stored.kind }, stream, seq: 0 };
  return new TextEncoder().encode(JSON.stringify(body));
}

/** A dead process waits for ever. */
function never(): Promise<never> {
  return new Promise(() => {});
}
