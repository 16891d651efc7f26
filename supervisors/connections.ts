// connections: what the broker's notices say of the two connections of each process of one role, and what follows from it.
//
//   a worker has   worker-{id}        the one it works over                                          (a supervisor: supervisor-{id}, …)
//                  worker-{id}.life   an idle one: it ends when the process does, or its network
//
//   both stand, or nothing is known  ──▶ nothing
//   one closed from its own side     ──after SETTLE_MS──▶ suspect ──the working one, after GRACE_MS──▶ gone
//   both closed from their own side  ──▶ gone
//
// It only remembers and says; the leader decides. The lease is the second line, and the journal's fence makes a mistake harmless.
//
// Invariants:
//   K1. Only a connection that its own side closed counts. One that the broker let go of (it shuts down, sheds a slow reader, lost
//       patience with a silent one) says nothing of the process.
//   K2. The end of a connection that was replaced already says nothing.
//   K3. After a reset nothing is known of anybody.
import { type ConnectionEvent, lifelineName } from "../bus/connection-watch.ts";
import { type World, timestamp } from "../protocol/world.ts";

/** The two notices of one killed process arrive within a few milliseconds; a suspicion waits this long for the other one. */
export const SETTLE_MS = 30;
/** A client that lost its connection dials again within 200 ms; twice that and a busy processor. */
export const GRACE_MS = 500;

const LIFE_SUFFIX = lifelineName("");

/** Whose connections tell of them: workers to the leader, supervisors to those that stand by. */
export type WatchedRole = "worker" | "supervisor";
export const connectionOf = (role: WatchedRole, id: string): string => `${role}-${id}`;

type End =
  | { readonly kind: "unknown" }
  | { readonly kind: "up"; readonly client_id: string }
  | { readonly kind: "closed"; readonly at_ms: number; readonly at: string; readonly reason: string };
const UNKNOWN: End = { kind: "unknown" };

export interface Closed {
  readonly at: string;
  readonly reason: string;
}

export type Presence =
  | { readonly kind: "standing" }
  | { readonly kind: "suspect"; readonly since_ms: number; readonly which: "main" | "life"; readonly closed: Closed }
  /** The process is gone, or cut off from the broker. `life` is null when that one stands. */
  | { readonly kind: "gone"; readonly since_ms: number; readonly main: Closed; readonly life: Closed | null };

export class Connections {
  readonly #world: World;
  readonly #prefix: string;
  readonly #processes = new Map<string, { main: End; life: End }>();

  constructor(world: World, role: WatchedRole) {
    this.#world = world;
    this.#prefix = connectionOf(role, "");
  }

  /** Answers the id of the process that it is about, when something changed for it. */
  hear(event: ConnectionEvent): string | undefined {
    if (event.kind === "reset") {
      this.#processes.clear(); // K3
      return undefined;
    }
    if (!event.name.startsWith(this.#prefix)) return undefined;
    const isLife = event.name.endsWith(LIFE_SUFFIX);
    const id = event.name.slice(this.#prefix.length, isLife ? -LIFE_SUFFIX.length : undefined);
    const ends = this.#processes.get(id) ?? { main: UNKNOWN, life: UNKNOWN };
    const which = isLife ? "life" : "main";
    const before = ends[which];
    if (event.kind === "disconnected" && before.kind === "up" && before.client_id !== event.client_id) return undefined; // K2
    this.#processes.set(id, { ...ends, [which]: this.#after(event) });
    return id;
  }

  #after(event: Exclude<ConnectionEvent, { kind: "reset" }>): End {
    if (event.kind === "connected") return { kind: "up", client_id: event.client_id };
    if (event.by === "broker") return UNKNOWN; // K1
    return { kind: "closed", at_ms: this.#world.monotonic_ms(), at: timestamp(this.#world.now_ms()), reason: event.reason };
  }

  of(id: string): Presence {
    const ends = this.#processes.get(id);
    if (ends === undefined) return { kind: "standing" };
    const { main, life } = ends;
    const now_ms = this.#world.monotonic_ms();
    if (main.kind === "closed") {
      const since_ms = life.kind === "closed" ? Math.min(main.at_ms, life.at_ms) : main.at_ms;
      if (life.kind === "closed") return { kind: "gone", since_ms, main: closedOf(main), life: closedOf(life) };
      if (now_ms - main.at_ms >= GRACE_MS) return { kind: "gone", since_ms, main: closedOf(main), life: null };
    }
    for (const [which, end] of [
      ["main", main],
      ["life", life],
    ] as const)
      if (end.kind === "closed" && now_ms - end.at_ms >= SETTLE_MS) return { kind: "suspect", since_ms: end.at_ms, which, closed: closedOf(end) };
    return { kind: "standing" };
  }

  /** Of a process whose end is written down. */
  forget(id: string): void {
    this.#processes.delete(id);
  }
}

const closedOf = ({ at, reason }: Extract<End, { kind: "closed" }>): Closed => ({ at, reason });
