// dispatch: whose command is decided next in this process. Everything that comes to its shards passes here on the way to its actor's mailbox.
//
//   put ──▶ waiting ──a place is free, and it is its turn──▶ deciding ──done──▶ gone
//              │                                                │ a second later it has no place any more (it waits for something else)
//              └───────────────the inbox begins again───────────┴──▶ gone: it comes again
//
// A tenant's commands lie by actor, an actor's in the order they came. Places go round the tenants, and a tenant's round its actors. What a
// tenant's budget and its own actor are told goes round apart from its sessions, so that a settlement does not lie behind ten thousand messages.
//
// It leaves to others: what a command means (cell.ts), the bound of what the broker hands out unacknowledged (bus/), calls of models
// (call-pool.ts).
//
// Invariants:
//   DI1. An actor's works begin in the order in which they were put; those of a lane that is cleared do not begin at all.
//   DI2. While several tenants wait, places go round: who has more waiting gets no more of them. The same among a tenant's actors.
//   DI3. One tenant never has all places, so another that comes finds one at once.
//   DI4. What does not get decided keeps its place for STALE_MS only: an actor that cannot be restored holds up nobody but itself.
//   DI5. Whatever is put begins, unless its lane was cleared: what is over the bound begins too, and is refused by its actor, in its order.
import { assert } from "../protocol/assert.ts";
import { TENANT_COMMANDS_WAITING_MAX } from "../protocol/limits.ts";
import type { World } from "../protocol/world.ts";
import { Pressure, type PressureState } from "./pressure.ts";

/** Commands being decided at once: enough for the largest group commits, few enough that another's command is one of the next. */
export const PLACES_MAX = 384;
/** Of one tenant. */
export const PLACES_OF_TENANT_MAX = 256;
/** Of one actor: one append folds as many. */
export const PLACES_OF_ACTOR_MAX = 64;
assert(PLACES_OF_TENANT_MAX < PLACES_MAX && PLACES_OF_ACTOR_MAX < PLACES_OF_TENANT_MAX, "DI3: a place is left for another");
/** A command is decided within milliseconds; one that takes this long waits for something that others do not. */
export const STALE_MS = 1_000;
/**
 * What comes from a caller who waits is refused from a fifth of that on: its answer would come too late. He makes it durable after 250 ms, and
 * would then cause the work twice.
 */
const HURRIED_SHARE = 0.2;
/** An actor's works are copied to a shorter list after so many have begun. */
const COMPACT_AFTER = 1_024;

type Begin = (done: () => void) => void;

/** What a lane has put since it was last cleared, and has places. */
interface Generation {
  readonly places: Set<Place>;
}

interface Work {
  readonly generation: Generation;
  readonly put_ms: number;
  readonly begin: Begin;
}

interface Waiter {
  readonly path: string;
  readonly flow: Flow;
  works: Work[];
  /** Of works: begun already. Arrays are not shifted, since ten thousand may wait. */
  begun: number;
  undecided: number;
}

interface Flow {
  readonly name: string;
  readonly waiters: Map<string, Waiter>;
  /** Those that have something waiting and may have another place, in turn. */
  readonly ready: Set<Waiter>;
  /** Put and not yet decided. */
  held: number;
  /** Places. */
  deciding: number;
  readonly stored: Pressure;
  readonly hurried: Pressure;
}

interface Place {
  readonly waiter: Waiter;
  readonly began_ms: number;
}

/** One inbox's works, which may all come again. */
export interface Lane {
  /** `begin` is called when it is the work's turn; it calls `done`, once, when the work is decided or given up. */
  put(tenant: string, kind: string, path: string, begin: Begin): void;
  /** What waits never begins, what began has no place any more. */
  clear(): void;
}

export interface DispatchReport {
  readonly deciding: number;
  readonly waiting: number;
  /** How many refuse more. */
  readonly refusing: number;
  /** Those that wait, most first. */
  readonly flows: readonly {
    readonly tenant: string;
    readonly kind: string;
    readonly waiting: number;
    readonly state: PressureState;
    readonly hurried: PressureState;
  }[];
}

export interface Dispatch {
  lane(): Lane;
  /** May another command of this tenant and kind be put? `hurried`: its sender waits for the answer, and nothing is stored yet. */
  pressure(tenant: string, kind: string, hurried: boolean): PressureState;
  report(flows_max?: number): DispatchReport;
}

export interface DispatchOptions {
  readonly world: Pick<World, "monotonic_ms" | "after">;
  readonly tenant_waiting_max?: number;
  /** actors/pressure.ts */
  readonly refuse_percent?: number;
  /** Of each work that begins: how long it waited for its turn. */
  on_begin?(waited_ms: number): void;
}

export function createDispatch({ world, tenant_waiting_max = TENANT_COMMANDS_WAITING_MAX, refuse_percent, on_begin }: DispatchOptions): Dispatch {
  const flows = new Map<string, Flow>();
  /** Flows with somebody ready and a place to give, in turn. */
  const ring = new Set<Flow>();
  /** In the order in which they began. */
  const places = new Set<Place>();
  let waiting = 0;
  let pumping = false;
  let watching = false;

  function waiterOf(name: string, path: string): Waiter {
    let flow = flows.get(name);
    if (flow === undefined) {
      const stored = new Pressure(tenant_waiting_max, refuse_percent);
      const hurried = new Pressure(Math.max(1, Math.floor(tenant_waiting_max * HURRIED_SHARE)), refuse_percent);
      flow = { name, waiters: new Map(), ready: new Set(), held: 0, deciding: 0, stored, hurried };
      flows.set(name, flow);
    }
    let waiter = flow.waiters.get(path);
    if (waiter === undefined) {
      waiter = { path, flow, works: [], begun: 0, undecided: 0 };
      flow.waiters.set(path, waiter);
    }
    return waiter;
  }

  const left = (waiter: Waiter): number => waiter.works.length - waiter.begun;

  /** Puts a waiter and its flow where they belong: at the end of their turns, out of them, or nowhere any more. */
  function settle(waiter: Waiter): void {
    const { flow, path } = waiter;
    if (left(waiter) > 0 && waiter.undecided < PLACES_OF_ACTOR_MAX) flow.ready.add(waiter);
    else flow.ready.delete(waiter);
    if (left(waiter) === 0 && waiter.undecided === 0 && flow.waiters.get(path) === waiter) flow.waiters.delete(path);
    if (flow.ready.size > 0 && flow.deciding < PLACES_OF_TENANT_MAX) ring.add(flow);
    else ring.delete(flow);
    if (flow.waiters.size === 0 && flows.get(flow.name) === flow) flows.delete(flow.name);
  }

  function decided(place: Place): void {
    const { waiter } = place;
    waiter.undecided -= 1;
    waiter.flow.held -= 1;
    if (places.delete(place)) waiter.flow.deciding -= 1;
    assert(waiter.undecided >= 0 && waiter.flow.held >= 0 && waiter.flow.deciding >= 0, "a work is decided once");
    settle(waiter);
    pump();
  }

  function begin(waiter: Waiter): void {
    const work = waiter.works[waiter.begun++];
    assert(work !== undefined, "who is ready has something waiting");
    if (waiter.begun === waiter.works.length || waiter.begun >= COMPACT_AFTER) {
      waiter.works = waiter.works.slice(waiter.begun);
      waiter.begun = 0;
    }
    const now_ms = world.monotonic_ms();
    const place: Place = { waiter, began_ms: now_ms };
    places.add(place);
    work.generation.places.add(place);
    waiter.undecided += 1;
    waiter.flow.deciding += 1;
    waiting -= 1;
    settle(waiter);
    on_begin?.(now_ms - work.put_ms);
    work.begin(() => {
      if (work.generation.places.delete(place)) decided(place);
    });
  }

  /** DI2: whoever is taken goes to the end of its turn. */
  function pump(): void {
    if (pumping) return;
    pumping = true;
    try {
      while (places.size < PLACES_MAX) {
        const [flow] = ring;
        if (flow === undefined) break;
        ring.delete(flow);
        const [waiter] = flow.ready;
        assert(waiter !== undefined, "a flow in the ring has somebody ready");
        flow.ready.delete(waiter);
        begin(waiter);
      }
    } finally {
      pumping = false;
    }
    if (waiting > 0 && !watching) watch();
  }

  /** DI4. Only while somebody waits. */
  function watch(): void {
    watching = true;
    void world.after(STALE_MS / 4, () => {
      watching = false;
      const now_ms = world.monotonic_ms();
      for (const place of places) {
        if (now_ms - place.began_ms < STALE_MS) break;
        places.delete(place);
        place.waiter.flow.deciding -= 1;
        settle(place.waiter);
      }
      pump();
    });
  }

  function lane(): Lane {
    let generation: Generation = { places: new Set() };
    return {
      put(tenant, kind, path, start) {
        const waiter = waiterOf(`${tenant}/${kind}`, path);
        waiter.works.push({ generation, put_ms: world.monotonic_ms(), begin: start });
        waiter.flow.held += 1;
        waiting += 1;
        settle(waiter);
        pump();
      },
      clear() {
        const old = generation;
        generation = { places: new Set() };
        for (const flow of [...flows.values()])
          for (const waiter of [...flow.waiters.values()]) {
            const kept = waiter.works.slice(waiter.begun).filter((work) => work.generation !== old);
            const dropped = left(waiter) - kept.length;
            if (dropped === 0) continue;
            flow.held -= dropped;
            waiting -= dropped;
            waiter.works = kept;
            waiter.begun = 0;
            settle(waiter);
          }
        const undecided = [...old.places];
        old.places.clear();
        for (const place of undecided) decided(place);
      },
    };
  }

  return {
    lane,
    pressure(tenant, kind, hurried) {
      const flow = flows.get(`${tenant}/${kind}`);
      if (flow === undefined) return "accepting";
      return (hurried ? flow.hurried : flow.stored).at(flow.held);
    },
    report(flows_max = 100) {
      const all = [...flows.values()].map((flow) => {
        const [tenant = "", kind = ""] = flow.name.split("/");
        let behind = 0;
        for (const waiter of flow.waiters.values()) behind += left(waiter);
        const hurried = flow.hurried.at(flow.held);
        return { tenant, kind, waiting: behind, state: flow.stored.at(flow.held), hurried };
      });
      const behind = all.filter((flow) => flow.waiting > 0).sort((a, b) => b.waiting - a.waiting);
      const refusing = all.filter(({ state, hurried }) => state === "refusing" || hurried === "refusing").length;
      return { deciding: places.size, waiting, refusing, flows: behind.slice(0, flows_max) };
    },
  };
}
