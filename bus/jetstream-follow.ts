// follow: messages of a filter in order, each once, and on as they come. A short-lived consumer of the broker, made anew from the
// next sequence whenever it breaks; the broker's own ordered readers never come back when their node dies.
//
// Invariants:
//   F1. A message is told once: `next` moves on before the next is taken, and what arrives below `next` is dropped.
//   F2. The listener is awaited: at most WINDOW messages are in memory, however slow it is.
//   F3. A stream that was made anew (another incarnation) is followed from its beginning: its sequences mean other messages.
import { pause } from "../protocol/world.ts";
import { errorFields } from "../protocol/log.ts";
import { type Link, toNanos } from "./jetstream-link.ts";
import { BusUnavailable } from "./fence.ts";
import { Pull } from "./jetstream-pull.ts";
import { streamInfo } from "./jetstream-reads.ts";
import type { StoredMessage, Subscription } from "./port.ts";

const WINDOW = 256;
/** The broker forgets the consumer of a follower that is gone. */
const INACTIVE_MS = 60_000;
const REOPEN_FIRST_MS = 20;
const REOPEN_MAX_MS = 1_000;
const WELL_AFTER_MS = 5_000;

export interface FollowSpec {
  readonly stream: string;
  readonly filter: string;
  /** Where the first session begins. */
  readonly from_sequence: number;
  /** Before every session: answers where it begins, when that is not the message after the last one. Rejects while it cannot know. */
  readonly before_session?: () => Promise<number>;
  readonly on_message: (message: StoredMessage) => Promise<void> | void;
  /** Once the first session stands. */
  readonly on_open?: () => void;
}

export function followStream(link: Link, spec: FollowSpec): Subscription {
  const follower = new Follower(link, spec);
  return { stop: () => follower.stop() };
}

class Follower {
  #link: Link;
  #spec: FollowSpec;
  #next: number;
  #incarnation: string | undefined;
  #stopped = false;
  #wake: () => void = () => {};
  #consumer_count = 0;
  #name: string;

  constructor(link: Link, spec: FollowSpec) {
    this.#link = link;
    this.#spec = spec;
    this.#next = Math.max(1, spec.from_sequence);
    this.#name = `follow-${link.world.id()}`;
    void this.#live();
  }

  /** A listener that is at work is not waited for: it may be the one who stops us. */
  async stop(): Promise<void> {
    this.#stopped = true;
    this.#wake();
  }

  async #live(): Promise<void> {
    const { world, log } = this.#link;
    const fields = { stream: this.#spec.stream, filter: this.#spec.filter };
    let wait_ms = REOPEN_FIRST_MS;
    while (!this.#stopped && !this.#link.closed) {
      const begun_at_ms = world.monotonic_ms();
      let reason: string;
      try {
        reason = await this.#session();
      } catch (error) {
        reason = error instanceof Error ? error.message : String(error);
        if (!(error instanceof BusUnavailable)) log.error("a follower's session failed", { ...fields, ...errorFields(error) });
      }
      if (this.#stopped) break;
      log.info("a stream is followed anew", { ...fields, next: this.#next, reason });
      if (world.monotonic_ms() - begun_at_ms >= WELL_AFTER_MS) wait_ms = REOPEN_FIRST_MS;
      await pause(world, wait_ms);
      wait_ms = Math.min(2 * wait_ms, REOPEN_MAX_MS);
      if (this.#link.state === "disconnected" && (await this.#link.connectedWithin(REOPEN_MAX_MS))) wait_ms = REOPEN_FIRST_MS;
    }
  }

  /** One consumer, from `next` on, until it breaks; answers why it did. */
  async #session(): Promise<string> {
    const { stream } = this.#spec;
    if (this.#spec.before_session !== undefined) this.#next = await this.#spec.before_session();
    else await this.#checkIncarnation();
    this.#consumer_count += 1;
    const consumer = `${this.#name}-${this.#consumer_count}`;
    const config = {
      name: consumer,
      deliver_policy: "by_start_sequence",
      opt_start_seq: this.#next,
      ack_policy: "none",
      max_deliver: 1,
      replay_policy: "instant",
      mem_storage: true,
      num_replicas: 1,
      inactive_threshold: toNanos(INACTIVE_MS),
      filter_subjects: [this.#spec.filter],
    };
    const creation = await this.#link.api(`CONSUMER.CREATE.${stream}.${consumer}`, { stream_name: stream, config, action: "create" });
    if (creation.kind !== "ok") return creation.kind === "error" ? creation.error.description : creation.reason;
    const queue: StoredMessage[] = [];
    let broken: string | undefined;
    const pull = new Pull(
      this.#link,
      { stream, consumer, window: WINDOW },
      {
        on_message: (message) => {
          queue.push(message);
          this.#wake();
        },
        on_broken: (reason) => {
          broken = reason;
          this.#wake();
        },
      },
    );
    this.#spec.on_open?.();
    try {
      for (;;) {
        if (this.#stopped) return "it was stopped";
        const message = queue.shift();
        if (message !== undefined) {
          if (message.sequence >= this.#next) await this.#tell(message);
          pull.handled();
          continue;
        }
        // What came before the break is in order and is told; the next session begins after it.
        if (broken !== undefined) return broken;
        await new Promise<void>((resolve) => (this.#wake = resolve));
      }
    } finally {
      pull.stop();
      if (this.#link.state === "connected") this.#link.send(`$JS.API.CONSUMER.DELETE.${stream}.${consumer}`, new Uint8Array(0));
    }
  }

  async #tell(message: StoredMessage): Promise<void> {
    this.#next = message.sequence + 1;
    try {
      await this.#spec.on_message(message);
    } catch (error) {
      this.#link.log.error("a follower's listener threw", {
        stream: this.#spec.stream,
        subject: message.subject,
        sequence: message.sequence,
        ...errorFields(error),
      });
    }
  }

  /** F3 */
  async #checkIncarnation(): Promise<void> {
    const { created } = await streamInfo(this.#link, this.#spec.stream);
    if (this.#incarnation !== undefined && this.#incarnation !== created) this.#next = 1;
    this.#incarnation = created;
  }
}
