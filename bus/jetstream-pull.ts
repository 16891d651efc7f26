// pull: reads one consumer of the broker over one connection until something is out of order. It does not heal: its user
// (consume, follow) opens the next one, because what healing means differs between them.
//
//   pulling ──gap · redelivery · silence · refusal · disconnect──▶ broken      (told once)
//      └──stop()──▶ stopped
//
// Invariants:
//   P1. Messages come in order and without a gap: the consumer's own count of deliveries must rise by one, and its heartbeats
//       must name the count we have. A rival that pulls from the same consumer shows itself within one heartbeat.
//   P2. What was asked for and not yet handled is never more than the window.
//   P3. After broken or stop nothing more is told.
import { createInbox, type Msg } from "@nats-io/transport-node";
import { fromWire, type Link, toNanos } from "./jetstream-link.ts";
import type { StoredMessage, StreamName } from "./port.ts";

/** The client's own way notices a lost consumer after 42 s; three of these are noticed in a second and a half. */
const HEARTBEAT_MS = 500;
const HEARTBEATS_MISSED_MAX = 3;
const PULL_EXPIRES_MS = 30_000;
/** One pull's share of the socket: the broker cuts off a client that owes it 64 MiB. */
const PULL_BYTES_MAX = 8 * 1024 * 1024;

const encoder = new TextEncoder();

export interface PullSpec {
  readonly stream: string;
  readonly consumer: string;
  /** Messages asked for and not yet handled, at most. */
  readonly window: number;
}

export interface PullHandlers {
  /** `reply` acknowledges it. Call `handled` of the pull once it is out of memory. */
  on_message(message: StoredMessage, reply: string): void;
  on_broken(reason: string): void;
}

export class Pull {
  #link: Link;
  #spec: PullSpec;
  #handlers: PullHandlers;
  #inbox: string;
  #subscription: { stop(): void };
  #states: { stop(): Promise<void> };
  #cancel_watch: () => void;
  /** Asked of the broker and not yet come. */
  #asked = 0;
  /** Come and not yet handled. */
  #unhandled = 0;
  #delivered = 0;
  #silent_beats = 0;
  #over = false;

  constructor(link: Link, spec: PullSpec, handlers: PullHandlers) {
    this.#link = link;
    this.#spec = spec;
    this.#handlers = handlers;
    this.#inbox = createInbox(link.inbox_prefix);
    this.#subscription = link.listen(this.#inbox, (message) => this.#hear(message));
    this.#states = link.onState((state) => {
      if (state === "disconnected") this.#break("the connection was lost");
    });
    this.#cancel_watch = link.world.after(HEARTBEAT_MS, () => this.#watch());
    this.#refill();
  }

  handled(): void {
    this.#unhandled -= 1;
    this.#refill();
  }

  stop(): void {
    if (this.#over) return;
    this.#over = true;
    this.#cancel_watch();
    this.#subscription.stop();
    void this.#states.stop();
  }

  #break(reason: string): void {
    if (this.#over) return;
    this.stop();
    this.#handlers.on_broken(reason);
  }

  #refill(): void {
    if (this.#over) return;
    const free = this.#spec.window - this.#asked - this.#unhandled;
    // Asking for each message as one is handled would double the traffic.
    if (free <= 0 || free < this.#spec.window / 2) return;
    this.#asked += free;
    const question = { batch: free, max_bytes: PULL_BYTES_MAX, expires: toNanos(PULL_EXPIRES_MS), idle_heartbeat: toNanos(HEARTBEAT_MS) };
    const sent = this.#link.send(
      `$JS.API.CONSUMER.MSG.NEXT.${this.#spec.stream}.${this.#spec.consumer}`,
      encoder.encode(JSON.stringify(question)),
      undefined,
      this.#inbox,
    );
    if (!sent) this.#break("there is no connection to the broker");
  }

  /** Counts heartbeats that did not come. Two checks in a row are needed, so a stall of our own process is not taken for one of the broker. */
  #watch(): void {
    if (this.#over) return;
    this.#silent_beats = this.#asked > 0 ? this.#silent_beats + 1 : 0;
    if (this.#silent_beats > HEARTBEATS_MISSED_MAX) return this.#break("heartbeats were missed");
    this.#cancel_watch = this.#link.world.after(HEARTBEAT_MS, () => this.#watch());
  }

  #hear(message: Msg): void {
    if (this.#over) return;
    this.#silent_beats = 0;
    const status = message.headers?.code ?? 0;
    if (status !== 0) return this.#hearStatus(status, message);
    const place = message.reply === undefined ? undefined : parsePlace(message.reply);
    if (place === undefined || message.reply === undefined) return this.#break("a message came without its place");
    if (place.deliveries > 1) return this.#break(`a redelivery of ${place.sequence}`);
    if (place.delivery !== this.#delivered + 1) return this.#break(`a gap: delivery ${place.delivery} came after ${this.#delivered}`);
    this.#delivered = place.delivery;
    this.#asked -= 1;
    this.#unhandled += 1;
    const stored = {
      stream: this.#spec.stream as StreamName,
      subject: message.subject,
      sequence: place.sequence,
      headers: fromWire(message.headers),
      data: message.data,
      stored_at_ms: place.stored_at_ms,
    };
    this.#handlers.on_message(stored, message.reply);
    this.#refill();
  }

  #hearStatus(status: number, message: Msg): void {
    const description = (message.headers?.description ?? "").toLowerCase();
    if (status === 100) {
      const last = message.headers?.get("Nats-Last-Consumer") ?? "";
      if (last !== "" && Number(last) !== this.#delivered) this.#break(`a gap: the consumer is at ${last}, we are at ${this.#delivered}`);
      return;
    }
    // A pull that ended: its time is over, or what fits it was given.
    if (status === 404 || status === 408 || (status === 409 && (description.includes("maxbytes") || description.includes("batch completed")))) {
      const left = Number(message.headers?.get("Nats-Pending-Messages") ?? NaN);
      this.#asked = Number.isNaN(left) ? 0 : Math.max(0, this.#asked - left);
      return this.#refill();
    }
    this.#break(`the broker ended it: ${status} ${description}`);
  }
}

interface Place {
  readonly deliveries: number;
  readonly sequence: number;
  readonly delivery: number;
  readonly stored_at_ms: number;
}

/** `$JS.ACK.[domain.account.]stream.consumer.deliveries.sequence.delivery.nanoseconds.pending[.random]` */
function parsePlace(reply: string): Place | undefined {
  const tokens = reply.split(".");
  if (tokens[0] !== "$JS" || tokens[1] !== "ACK") return undefined;
  const at = tokens.length >= 11 ? 6 : 4;
  const [deliveries, sequence, delivery, nanoseconds] = tokens.slice(at, at + 4).map(Number);
  if (deliveries === undefined || sequence === undefined || delivery === undefined || nanoseconds === undefined) return undefined;
  return { deliveries, sequence, delivery, stored_at_ms: Math.floor(nanoseconds / 1e6) };
}
