// succession: when a supervisor that stands by need not wait for the leader's lease to end: the leader is gone for sure.
//
//   the lease of another ──▶ both its connections closed from its own side, while our own broker is well ─┐
//   a lease of our own name, from before this process began ──────────────────────────────────────────────┴▶ nobody answers for that
//   incarnation ──▶ vacant: the lease may be taken over that very value
//
// A mistake is harmless: who takes the lease fences the one before it, by the lease's revision and by each journal's sequence. So a
// reader of notices that came late costs a change of leaders and nothing else.
//
// Owns: the answering for this incarnation, and what is known of supervisors' connections. Leaves to the leader: taking the lease.
//
// Invariants:
//   U1. Nobody is succeeded within one TTL of an outage of the bus, nor for connections that the broker itself ended: a broker that
//       restarts, or elects, makes no new leader.
//   U2. Nobody is succeeded that answers.
import type { ConnectionEvent } from "../bus/connection-watch.ts";
import type { BucketEntry, Bus, Subscription } from "../bus/port.ts";
import type { JsonObject } from "../protocol/json.ts";
import { supervisorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { Connections, GRACE_MS, SETTLE_MS } from "./connections.ts";
import { decodeLeaderLease } from "./tables.ts";

/** Nobody listens for a dead supervisor, and the broker says so at once; one that is there answers within a few milliseconds. */
const ANSWER_PATIENCE_MS = 100;

export interface SuccessionOptions {
  readonly bus: Bus;
  readonly world: World;
  /** This supervisor. */
  readonly id: string;
  readonly incarnation: string;
  /** U1. Has the bus been well for as long as a lease lasts? */
  may_judge(): boolean;
}

export interface Vacancy {
  /** Of the lease that stands there. */
  readonly revision: number;
  /** Whose it was, and why nobody waits for it. */
  readonly why: JsonObject;
}

export class Succession {
  readonly #options: SuccessionOptions;
  readonly #connections: Connections;

  constructor(options: SuccessionOptions) {
    this.#options = options;
    this.#connections = new Connections(options.world, "supervisor");
  }

  /** Answers for this incarnation, whether it leads or stands by, for as long as the process lives. */
  answer(): Subscription {
    const { bus, id, incarnation } = this.#options;
    const data = new TextEncoder().encode(JSON.stringify({ id, incarnation }));
    return bus.subscribe(supervisorSubject(id, incarnation), ({ reply }) => {
      if (reply !== undefined) bus.send(reply, data);
    });
  }

  /** `look` is called now and when what is a suspicion may have become a verdict, if this was about a supervisor. */
  hear(event: ConnectionEvent, look: () => void): void {
    if (this.#connections.hear(event) === undefined || event.kind !== "disconnected") return;
    look();
    for (const ms of [SETTLE_MS, GRACE_MS]) void this.#options.world.after(ms, look);
  }

  /** Is the one whose lease this is gone for sure? */
  async vacancyOf({ value, revision }: Pick<BucketEntry, "value" | "revision">): Promise<Vacancy | undefined> {
    const { bus, incarnation } = this.#options;
    const lease = decodeLeaderLease(value);
    if (lease === undefined || lease.incarnation === incarnation) return undefined;
    const found = this.#isGone(lease.id);
    if (found === undefined) return undefined;
    const answer = await bus.request(supervisorSubject(lease.id, lease.incarnation), new Uint8Array(0), { patience_ms: ANSWER_PATIENCE_MS });
    if (answer !== undefined || this.#isGone(lease.id) === undefined) return undefined; // U2
    return { revision, why: { leader: lease.id, ...found } };
  }

  #isGone(id: string): JsonObject | undefined {
    if (this.#options.bus.state !== "connected") return undefined;
    // A process has its name to itself: the one that had it before us is gone, or is meant to be.
    if (id === this.#options.id) return { kind: "started_again" };
    if (!this.#options.may_judge()) return undefined; // U1
    const presence = this.#connections.of(id);
    if (presence.kind !== "gone") return undefined;
    return { kind: "connections_closed", main: { ...presence.main }, life: presence.life === null ? null : { ...presence.life } };
  }
}
