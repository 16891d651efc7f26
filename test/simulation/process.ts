// process: one process of a simulated cluster, as the others see it: it may run, stand still as by SIGSTOP, or be dead.
//
//   running ──stop──▶ stopped ──go_on──▶ running        everything that would have happened to it happens then, in order, one after another
//      └──────────────────┴──die──▶ dead                nothing happens to it any more
//
// Everything that reaches a process comes through its gate: its alarms, the answers of the bus, what it listens to. Time does not stop
// with it. What its code does between two of them is one instant, as in a real process between two turns of its loop.
//
// Invariants:
//   PR1. Nothing passes the gate of a process that does not run; what waits keeps its order.
//   PR2. A process that is dead is told nothing, and its answers never come.
import type {
  Append,
  Bucket,
  BucketChange,
  BucketName,
  Bus,
  ConnectionState,
  CoreMessage,
  Delivery,
  InboxHandlers,
  InboxSpec,
  StoredMessage,
  StreamName,
  Subscription,
} from "../../bus/port.ts";
import type { World } from "../../protocol/world.ts";

export type ProcessState = "running" | "stopped" | "dead";

/** What the simulation wants to know of a process's words to the bus, at the moment they are said. */
export interface Overheard {
  sent?(subject: string, data: Uint8Array): void;
  acknowledged?(delivery: Delivery): void;
}

export class SimulatedProcess {
  readonly name: string;
  readonly world: World;
  readonly #base: World;
  #state: ProcessState = "running";
  #waiting: (() => void)[] = [];
  #draining = false;
  /** By how much its wall clock is wrong. */
  clock_skew_ms = 0;

  constructor(name: string, base: World) {
    this.name = name;
    this.#base = base;
    this.world = {
      now_ms: () => base.now_ms() + this.clock_skew_ms,
      monotonic_ms: () => base.monotonic_ms(),
      random: () => base.random(),
      id: () => base.id(),
      after: (ms, callback) => {
        let cancelled = false;
        const cancel = base.after(ms, () =>
          this.pass(() => {
            if (!cancelled) callback();
          }),
        );
        return () => {
          cancelled = true;
          cancel();
        };
      },
    };
  }

  get state(): ProcessState {
    return this.#state;
  }

  /** PR1 */
  pass(callback: () => void): void {
    if (this.#state === "dead") return;
    if (this.#state === "stopped" || this.#waiting.length > 0) this.#waiting.push(callback);
    else callback();
  }

  stop(): void {
    if (this.#state === "running") this.#state = "stopped";
  }

  goOn(): void {
    if (this.#state !== "stopped") return;
    this.#state = "running";
    this.#drain();
  }

  die(): void {
    this.#state = "dead";
    this.#waiting = [];
  }

  /** One at a time, so that what each sets off has happened before the next, as a real loop does between two callbacks. */
  #drain(): void {
    if (this.#draining) return;
    this.#draining = true;
    this.#base.after(0, () => {
      this.#draining = false;
      if (this.#state !== "running") return;
      this.#waiting.shift()?.();
      if (this.#waiting.length > 0) this.#drain();
    });
  }

  /** An answer as the process hears it. */
  answer<T>(coming: Promise<T>): Promise<T> {
    return new Promise((resolve, reject) => {
      coming.then(
        (value) => this.pass(() => resolve(value)),
        (error: unknown) => this.pass(() => reject(error)),
      );
    });
  }

  /** The bus as this process has it. */
  bus(inner: Bus, overheard: Overheard = {}): Bus {
    const answer = <T>(coming: Promise<T>): Promise<T> => this.answer(coming);
    const bucketOf = (name: BucketName): Bucket => {
      const bucket = inner.bucket(name);
      return {
        get: (key) => answer(bucket.get(key)),
        all: () => answer(bucket.all()),
        create: (key, value) => answer(bucket.create(key, value)),
        update: (key, value, revision) => answer(bucket.update(key, value, revision)),
        delete: (key, revision) => answer(bucket.delete(key, revision)),
        watch: (listener) => answer(bucket.watch((change: BucketChange) => this.pass(() => listener(change)))),
      };
    };
    return {
      shards: inner.shards,
      publish: (...args) => answer(inner.publish(...args)),
      append: (append: Append) => answer(inner.append(append)),
      last: (...args) => answer(inner.last(...args)),
      last_of_each: (...args) => answer(inner.last_of_each(...args)),
      counts: (...args) => answer(inner.counts(...args)),
      read: (...args) => this.#reading(inner.read(...args)),
      follow: (stream: StreamName, filter: string, from: number, on_message: (message: StoredMessage) => Promise<void> | void): Promise<Subscription> =>
        answer(
          inner.follow(
            stream,
            filter,
            from,
            (message) => new Promise<void>((resolve, reject) => this.pass(() => void Promise.try(() => on_message(message)).then(resolve, reject))),
          ),
        ),
      clear: (...args) => answer(inner.clear(...args)),
      consume: (spec: InboxSpec, handlers: InboxHandlers) =>
        answer(
          inner.consume(spec, {
            on_delivery: (delivery) =>
              this.pass(() =>
                handlers.on_delivery({
                  ...delivery,
                  ack: () => {
                    overheard.acknowledged?.(delivery);
                    delivery.ack();
                  },
                  settle: () => answer(delivery.settle()),
                }),
              ),
            on_reset: () => this.pass(() => handlers.on_reset()),
          }),
        ),
      schedule: (...args) => answer(inner.schedule(...args)),
      send: (subject, data, options) => {
        overheard.sent?.(subject, data);
        inner.send(subject, data, options);
      },
      subscribe: (subject: string, listener: (message: CoreMessage) => void, options?: { queue?: string }) =>
        inner.subscribe(subject, (message) => this.pass(() => listener(message)), options),
      request: (...args) => answer(inner.request(...args)),
      inbox: () => inner.inbox(),
      bucket: bucketOf,
      bounds: (...args) => answer(inner.bounds(...args)),
      get state(): ConnectionState {
        return inner.state;
      },
      on_state: (listener) => inner.on_state((state) => this.pass(() => listener(state))),
      flush: () => answer(inner.flush()),
      close: () => inner.close(),
    };
  }

  async *#reading(messages: AsyncIterable<StoredMessage>): AsyncGenerator<StoredMessage> {
    const iterator = messages[Symbol.asyncIterator]();
    for (;;) {
      const next = await this.answer(iterator.next());
      if (next.done === true) return;
      yield next.value;
    }
  }
}
