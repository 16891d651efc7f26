// call-pool: how many calls of models this process makes at once, and whose is the next.
//
//   enter ──a place is free──▶ running ──left──▶ gone
//     └─────▶ waiting ──its turn──▶ running
//                └──called off──▶ gone
//
// Between tenants the next place goes to the one that has the fewest calls running: who wants little gets it, the rest is shared evenly. Within a
// tenant it goes by turn (protocol/priority.ts), so that a priority orders a tenant's own calls and never pushes another's aside.
//
// A tenant's own slots are counted by its budget, over all workers; calls of this process that stand in line there are known here too, so that
// one number says how much of a tenant waits, and its new messages are refused while that is too much.
//
// Invariants:
//   CP1. Never more than `calls_max` run. A smaller maximum ends no call: it waits until enough have ended.
//   CP2. A place is given back once, however often it is left.
//   CP3. Of a tenant's calls the one whose turn it is goes first; nobody starves, since turns age and tenants are equal.
import { assert } from "../protocol/assert.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { CALLS_MAX, TENANT_CALLS_WAITING_MAX } from "../protocol/limits.ts";
import { type Priority, turnAt } from "../protocol/priority.ts";
import type { World } from "../protocol/world.ts";
import { EffectFailure } from "./performer.ts";
import { Pressure, type PressureState } from "./pressure.ts";

/** When who was refused should come again. Calls take seconds. */
const OVERLOADED_RETRY_MS = 2_000;

export type WaitsFor = "slot" | "pool";

export interface PooledCall {
  readonly tenant: string;
  /** Whose call it is, for who asks why it waits. */
  readonly actor: string;
  readonly priority: Priority;
}

export interface WaitingCall {
  readonly for: WaitsFor;
  readonly priority: Priority;
  readonly since_ms: number;
  /** Calls of the tenant that go before it in this process. */
  readonly ahead: number;
}

export interface CallPoolReport {
  readonly calls_max: number;
  readonly running: number;
  readonly waiting: number;
  /** Tenants whose new messages are refused. */
  readonly refusing: number;
  readonly tenants: readonly { readonly tenant: string; readonly running: number; readonly waiting: number; readonly state: PressureState }[];
}

export interface CallPool {
  /** Resolves with how to leave, when the call may be made. Throws EffectFailure when it is called off before. */
  enter(call: PooledCall, signal: AbortSignal): Promise<() => void>;
  /** A call that waits for a slot of its tenant. Answers how to say that it waits no more. */
  inLine(call: PooledCall): () => void;
  /** Why no new message of this tenant can be taken now. */
  refusal(tenant: string): ErrorBody | undefined;
  /** What a call of this actor waits for here. */
  waitOf(actor: string): WaitingCall | undefined;
  resize(calls_max: number): void;
  report(tenants_max?: number): CallPoolReport;
}

interface Waiting extends PooledCall {
  readonly for: WaitsFor;
  readonly since_ms: number;
  readonly turn_at_ms: number;
  readonly begin?: () => void;
}

interface Tenant {
  running: number;
  /** In order of turns, and of arrival among equal ones. */
  readonly pool: Waiting[];
  readonly slot: Set<Waiting>;
  readonly pressure: Pressure;
}

export interface CallPoolOptions {
  readonly world: Pick<World, "monotonic_ms">;
  readonly calls_max?: number;
  readonly tenant_waiting_max?: number;
  /** actors/pressure.ts */
  readonly refuse_percent?: number;
  on_waited?(reason: WaitsFor, ms: number): void;
}

export function createCallPool({
  world,
  calls_max = CALLS_MAX,
  tenant_waiting_max = TENANT_CALLS_WAITING_MAX,
  refuse_percent,
  on_waited,
}: CallPoolOptions): CallPool {
  assert(Number.isInteger(calls_max) && calls_max > 0, "a pool has at least one place");
  const tenants = new Map<string, Tenant>();
  let max = calls_max;
  let running = 0;

  function tenantOf(name: string): Tenant {
    let tenant = tenants.get(name);
    if (tenant === undefined) {
      tenant = { running: 0, pool: [], slot: new Set(), pressure: new Pressure(tenant_waiting_max, refuse_percent) };
      tenants.set(name, tenant);
    }
    return tenant;
  }
  function forget(name: string, tenant: Tenant): void {
    if (tenant.running === 0 && tenant.pool.length === 0 && tenant.slot.size === 0) tenants.delete(name);
  }
  const waitingOf = ({ pool, slot }: Tenant): number => pool.length + slot.size;

  function begin(name: string, tenant: Tenant): () => void {
    running += 1;
    tenant.running += 1;
    assert(running <= max, "CP1: never more than its maximum run");
    let left = false;
    return () => {
      if (left) return; // CP2
      left = true;
      running -= 1;
      tenant.running -= 1;
      forget(name, tenant);
      fill();
    };
  }

  /** The tenant that waits with the fewest calls running; among equal ones, the one whose call has its turn first. */
  function next(): Tenant | undefined {
    let best: Tenant | undefined;
    for (const tenant of tenants.values()) {
      const [first] = tenant.pool;
      if (first === undefined) continue;
      const [other] = best?.pool ?? [];
      if (
        best === undefined ||
        other === undefined ||
        tenant.running < best.running ||
        (tenant.running === best.running && first.turn_at_ms < other.turn_at_ms)
      )
        best = tenant;
    }
    return best;
  }

  function fill(): void {
    for (let tenant = running < max ? next() : undefined; tenant !== undefined; tenant = running < max ? next() : undefined) tenant.pool.shift()?.begin?.();
  }

  function waitingCall(call: PooledCall, reason: WaitsFor, more: Pick<Waiting, "begin"> = {}): Waiting {
    const since_ms = world.monotonic_ms();
    return { ...call, for: reason, since_ms, turn_at_ms: turnAt(call.priority, since_ms), ...more };
  }

  return {
    enter(call, signal) {
      const tenant = tenantOf(call.tenant);
      if (running < max && next() === undefined) return Promise.resolve(begin(call.tenant, tenant));
      return new Promise((resolve, reject) => {
        const calledOff = (): void => {
          tenant.pool.splice(tenant.pool.indexOf(mine), 1);
          forget(call.tenant, tenant);
          reject(new EffectFailure("cancelled", "the call was cancelled before it was made"));
        };
        const mine = waitingCall(call, "pool", {
          begin: () => {
            signal.removeEventListener("abort", calledOff);
            on_waited?.("pool", world.monotonic_ms() - mine.since_ms);
            resolve(begin(call.tenant, tenant));
          },
        });
        const at = tenant.pool.findLastIndex((other) => other.turn_at_ms <= mine.turn_at_ms) + 1; // CP3
        tenant.pool.splice(at, 0, mine);
        signal.addEventListener("abort", calledOff, { once: true });
        if (signal.aborted) {
          signal.removeEventListener("abort", calledOff);
          calledOff();
        }
      });
    },
    inLine(call) {
      const tenant = tenantOf(call.tenant);
      const mine = waitingCall(call, "slot");
      tenant.slot.add(mine);
      return () => {
        if (!tenant.slot.delete(mine)) return;
        on_waited?.("slot", world.monotonic_ms() - mine.since_ms);
        forget(call.tenant, tenant);
      };
    },
    refusal(name) {
      const tenant = tenants.get(name);
      if (tenant === undefined) return undefined;
      const waiting = waitingOf(tenant);
      if (tenant.pressure.at(waiting) !== "refusing") return undefined;
      const waits_for = tenant.slot.size >= tenant.pool.length ? "slot" : "pool";
      return errorBody("overloaded", `${waiting} calls of this tenant wait already`, { waits_for, waiting, retry_after_ms: OVERLOADED_RETRY_MS });
    },
    waitOf(actor) {
      const tenant = tenants.get(actor.slice(0, actor.indexOf("/")));
      if (tenant === undefined) return undefined;
      const slots = [...tenant.slot].sort((a, b) => a.turn_at_ms - b.turn_at_ms);
      for (const line of [tenant.pool, slots]) {
        const ahead = line.findIndex((one) => one.actor === actor);
        const one = line[ahead];
        if (one !== undefined) return { for: one.for, priority: one.priority, since_ms: one.since_ms, ahead };
      }
      return undefined;
    },
    resize(calls) {
      assert(Number.isInteger(calls) && calls > 0, "a pool has at least one place");
      max = calls;
      fill();
    },
    report(tenants_max = 100) {
      const all = [...tenants].map(([tenant, one]) => ({
        tenant,
        running: one.running,
        waiting: waitingOf(one),
        state: one.pressure.at(waitingOf(one)),
      }));
      all.sort((a, b) => b.waiting - a.waiting || b.running - a.running);
      const refusing = all.filter(({ state }) => state === "refusing").length;
      return { calls_max: max, running, refusing, waiting: all.reduce((sum, { waiting }) => sum + waiting, 0), tenants: all.slice(0, tenants_max) };
    },
  };
}
