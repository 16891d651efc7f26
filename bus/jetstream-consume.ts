// consume: a shard's inbox. One durable consumer of the broker, opened again and again as long as its subscription lives.
//
//   opening ──durable as wanted, reset──▶ delivering ──broken──▶ (on_reset) ──▶ opening …      stop() ends it anywhere
//
// Invariants:
//   C1. Every opening resets the durable, so deliveries begin with the first unacknowledged message and in stream order; the
//       wait for an acknowledgement (30 s) is never what brings a dead owner's messages back.
//   C2. Somebody else who still pulls from the durable is cut off first: the durable is made anew, which ends his pulls.
//   C3. An opening after the first tells on_reset before its first delivery.
//   C4. Nothing more is asked for while what was delivered and not acknowledged is over its bound, in messages or in bytes.
//   C5. What is confirmed as settled was still out under this very opening when the confirmation came: a later one would deliver it again. What
//       cannot be confirmed ends the opening at once.
import { INBOX_UNDECIDED_BYTES_MAX, INBOX_UNDECIDED_MAX } from "../protocol/limits.ts";
import { pause } from "../protocol/world.ts";
import { guarded, type Link, toNanos } from "./jetstream-link.ts";
import { Pull } from "./jetstream-pull.ts";
import { streamInfo } from "./jetstream-reads.ts";
import type { Delivery, InboxHandlers, InboxSpec, Subscription } from "./port.ts";

/** The broker's own redelivery: only the last resort, when nobody resets the durable. */
const ACK_WAIT_MS = 30_000;
const WINDOW = 500;
/** How long consume() waits for its first opening before it answers; it goes on trying after. */
const FIRST_OPENING_PATIENCE_MS = 5_000;
/** A broker that knows the question answers within milliseconds; one that does not never will. */
const RESET_PATIENCE_MS = 1_000;
/** Of one question whether an acknowledgement arrived, and how often it is asked. */
const SETTLE_PATIENCE_MS = 1_000;
const SETTLE_TRIES_MAX = 3;
const REOPEN_FIRST_MS = 20;
const REOPEN_MAX_MS = 2_000;
/** A session that lived this long was well; the next failure is a new one. */
const WELL_AFTER_MS = 5_000;

const CONSUMER_NOT_FOUND = 10014;
const ACK = new TextEncoder().encode("+ACK");

interface WireConsumer {
  readonly config: Readonly<Record<string, unknown>> & { readonly filter_subject?: string; readonly filter_subjects?: readonly string[] };
  readonly num_waiting: number;
}
type Opening = { readonly kind: "open"; readonly incarnation: string } | { readonly kind: "failed"; readonly reason: string };

export async function consumeInbox(link: Link, spec: InboxSpec, handlers: InboxHandlers): Promise<Subscription> {
  const inbox = new Inbox(link, spec, handlers);
  await inbox.firstOpening();
  return inbox;
}

class Inbox implements Subscription {
  #link: Link;
  #spec: InboxSpec;
  #handlers: InboxHandlers;
  #stopped = false;
  #end_session: (reason: string) => void = () => {};
  #opened!: () => void;
  #first_opening: Promise<void>;

  constructor(link: Link, spec: InboxSpec, handlers: InboxHandlers) {
    this.#link = link;
    this.#spec = spec;
    this.#handlers = handlers;
    this.#first_opening = new Promise((resolve) => (this.#opened = resolve));
    void this.#live();
  }

  async firstOpening(): Promise<void> {
    let cancel = (): void => {};
    await Promise.race([this.#first_opening, new Promise<void>((resolve) => (cancel = this.#link.world.after(FIRST_OPENING_PATIENCE_MS, resolve)))]);
    cancel();
  }

  async stop(): Promise<void> {
    if (this.#stopped) return;
    this.#stopped = true;
    this.#end_session("it was stopped");
    // What was acknowledged before the stop reaches the broker before anybody resets the durable.
    await this.#link.flush();
  }

  async #live(): Promise<void> {
    const { world, log } = this.#link;
    const fields = { stream: this.#spec.stream, durable: this.#spec.durable };
    let sessions = 0;
    let wait_ms = REOPEN_FIRST_MS;
    while (!this.#stopped && !this.#link.closed) {
      const opening = await this.#open();
      if (this.#stopped) break;
      if (opening.kind === "failed") {
        log.warn("an inbox cannot be opened", { ...fields, reason: opening.reason });
      } else {
        if (sessions > 0) guarded(log, "an inbox's on_reset threw", fields, () => this.#handlers.on_reset());
        sessions += 1;
        const begun_at_ms = world.monotonic_ms();
        const reason = await this.#session(opening.incarnation);
        if (this.#stopped) break;
        log.info("an inbox is opened again", { ...fields, reason });
        if (world.monotonic_ms() - begun_at_ms >= WELL_AFTER_MS) wait_ms = REOPEN_FIRST_MS;
      }
      await pause(world, wait_ms);
      wait_ms = Math.min(2 * wait_ms, REOPEN_MAX_MS);
      // Disconnected is not a failure to back off from: the moment it is connected again, it opens.
      if (this.#link.state === "disconnected" && (await this.#link.connectedWithin(REOPEN_MAX_MS))) wait_ms = REOPEN_FIRST_MS;
    }
    this.#opened();
  }

  #session(incarnation: string): Promise<string> {
    const { stream, durable } = this.#spec;
    let over = false;
    return new Promise((resolve) => {
      const end = (reason: string): void => {
        over = true;
        resolve(reason);
      };
      let undecided_bytes = 0;
      /** Deliveries whose place in the window is not given back yet (C4). */
      let owed = 0;
      const giveBack = (): void => {
        for (; owed > 0 && undecided_bytes < INBOX_UNDECIDED_BYTES_MAX; owed--) pull.handled();
      };
      const pull: Pull = new Pull(
        this.#link,
        { stream, consumer: durable, window: WINDOW },
        {
          on_message: (message, reply) => {
            const gone = (): void => {
              undecided_bytes -= message.data.byteLength;
              giveBack();
            };
            const delivery: Delivery = {
              message,
              source: { stream, incarnation, seq: message.sequence },
              ack: () => {
                this.#link.send(reply, ACK);
                gone();
              },
              settle: async () => {
                const settled = await this.#confirm(reply, () => over);
                gone();
                return settled;
              },
            };
            undecided_bytes += message.data.byteLength;
            owed += 1;
            guarded(this.#link.log, "an inbox's on_delivery threw", { durable, sequence: message.sequence }, () => this.#handlers.on_delivery(delivery));
            giveBack();
          },
          on_broken: end,
        },
      );
      this.#end_session = (reason) => {
        pull.stop();
        end(reason);
      };
      this.#opened();
    });
  }

  /** C5. An acknowledgement with a reply subject is answered once the broker has taken it. */
  async #confirm(reply: string, over: () => boolean): Promise<boolean> {
    for (let tries = 0; tries < SETTLE_TRIES_MAX && !over() && !this.#stopped; tries++) {
      const answer = await this.#link.ask(reply, ACK, { patience_ms: SETTLE_PATIENCE_MS });
      if (answer.kind === "nobody") break;
      if (answer.kind === "answer" && !over() && !this.#stopped) return true;
    }
    this.#end_session("it is not known whether an acknowledgement arrived"); // also a later one: it has delivered what was said after this
    return false;
  }

  async #open(): Promise<Opening> {
    const { stream, durable } = this.#spec;
    try {
      const incarnation = (await streamInfo(this.#link, stream)).created;
      // Resetting a durable that is not as wanted harms nothing, and its answer tells what it is like: one question instead of two.
      const reset = await this.#link.api<WireConsumer>(`CONSUMER.RESET.${stream}.${durable}`, undefined, RESET_PATIENCE_MS);
      if (reset.kind === "error" && reset.error.err_code === CONSUMER_NOT_FOUND) return await this.#create(incarnation);
      // C2, and brokers before 2.14, which cannot reset. What was not acknowledged is in the stream either way.
      if (reset.kind !== "ok" || reset.value.num_waiting > 0 || !sameConfig(reset.value.config, this.#spec)) return await this.#createAnew(incarnation);
      return { kind: "open", incarnation };
    } catch (error) {
      return { kind: "failed", reason: error instanceof Error ? error.message : String(error) };
    }
  }

  async #createAnew(incarnation: string): Promise<Opening> {
    const { stream, durable } = this.#spec;
    const deletion = await this.#link.api(`CONSUMER.DELETE.${stream}.${durable}`, undefined);
    if (deletion.kind === "unavailable") return { kind: "failed", reason: deletion.reason };
    if (deletion.kind === "error" && deletion.error.err_code !== CONSUMER_NOT_FOUND) return { kind: "failed", reason: deletion.error.description };
    return this.#create(incarnation);
  }

  async #create(incarnation: string): Promise<Opening> {
    const { stream, durable } = this.#spec;
    const creation = await this.#link.api(`CONSUMER.CREATE.${stream}.${durable}`, { stream_name: stream, config: durableConfig(this.#spec), action: "create" });
    if (creation.kind === "ok") return { kind: "open", incarnation };
    return { kind: "failed", reason: creation.kind === "error" ? creation.error.description : creation.reason };
  }
}

function durableConfig(spec: InboxSpec): Record<string, unknown> {
  return {
    name: spec.durable,
    durable_name: spec.durable,
    deliver_policy: "all",
    ack_policy: "explicit",
    ack_wait: toNanos(ACK_WAIT_MS),
    max_ack_pending: spec.undecided_max ?? INBOX_UNDECIDED_MAX,
    max_deliver: -1,
    replay_policy: "instant",
    filter_subjects: [...spec.filters],
  };
}

function sameConfig(have: WireConsumer["config"], spec: InboxSpec): boolean {
  const filters = have.filter_subjects ?? (have.filter_subject === undefined ? [] : [have.filter_subject]);
  const same_filters = [...filters].sort().join(" ") === [...spec.filters].sort().join(" ");
  const want = durableConfig(spec);
  return same_filters && ["ack_policy", "deliver_policy", "ack_wait", "max_ack_pending", "max_deliver"].every((name) => have[name] === want[name]);
}
