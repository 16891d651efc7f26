// directory: what every process may know of tenants: their state, keys and agents. A cache of the tenant actors.
//
// The tenant actor's journal is the truth; this restores it, keeps what it restored, and drops it when the journal moves on
// (heard on `live.`), when the connection was away, and after MAX_AGE_MS at the latest. Postgres is not asked.
import type { Bus, Subscription } from "../bus/port.ts";
import { BusUnavailable } from "../bus/fence.ts";
import { assert } from "../protocol/assert.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import { tenantActor } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import type { Grant, Policy } from "../state-machines/permission.ts";
import { outerState } from "../state-machines/step.ts";
import type { TenantContext } from "../state-machines/tenant.ts";
import type { Restorer } from "./restore.ts";

export interface TenantRecord {
  readonly state: "active" | "suspended" | "closed";
  readonly name: string | null;
  readonly keys: TenantContext["keys"];
  readonly agents: { readonly [id: string]: { readonly version: number; readonly hash: string; readonly config: AgentConfig; readonly config_epoch: number } };
  /** What is permitted, and by which roles (state-machines/permission.ts). */
  readonly policy: Policy;
  readonly grants: Readonly<Record<string, Grant>>;
  readonly config_epoch: number;
}

export interface Directory {
  /** The tenant as its journal stands, or undefined when there is none. Rejects when the bus cannot answer and nothing is cached. */
  tenant(id: string): Promise<TenantRecord | undefined>;
  /** Reads every tenant there is, up to TENANTS_READ_MAX of them, so that what cannot be read shows before anybody asks for it. */
  readAll(): Promise<void>;
  /** Tenants whose journal is there and cannot be read: nothing is permitted for them. Each is tried again first. */
  unreadable(): Promise<readonly Unreadable[]>;
  stop(): Promise<void>;
}

export interface Unreadable {
  readonly tenant: string;
  readonly reason: string;
}

/** A revoked key is refused everywhere after this even if every live message was lost. */
const MAX_AGE_MS = 10_000;
/** Tenants that are not there are remembered shortly, so that guessing ids costs the broker little. */
const ABSENT_AGE_MS = 500;
const TENANTS_MAX = 10_000;
/** Read before a process calls itself ready: a few seconds of work at most. */
const TENANTS_READ_MAX = 1_000;
const READ_AT_ONCE = 16;
/** Looked at again, and named, when somebody asks; one is enough to be looked after. */
const UNREADABLE_NAMED_MAX = 10;

interface Known {
  readonly record: Promise<TenantRecord | undefined>;
  readonly until_ms: number;
}

export function createDirectory({ bus, restorer, world, log }: { bus: Bus; restorer: Restorer; world: World; log: Log }): Directory {
  const known = new Map<string, Known>();
  const unreadable = new Map<string, string>();
  const subscriptions: Subscription[] = [
    bus.subscribe("live.tenant.*.tenant.main.event", (message) => {
      const parsed = parseActorSubject(message.subject);
      if (parsed.kind === "actor") known.delete(parsed.actor.tenant);
    }),
    bus.on_state((state) => {
      if (state === "connected") known.clear();
    }),
  ];

  async function load(id: string): Promise<TenantRecord | undefined> {
    const restored = await restorer.restore(tenantActor(id));
    if (restored === undefined) return undefined;
    const context = restored.state.snapshot.context as TenantContext;
    assert(
      (context as Partial<TenantContext>).policy !== undefined && (context as Partial<TenantContext>).grants !== undefined,
      "a tenant's record says what is permitted",
    );
    return {
      state: outerState(restored.state.snapshot) as TenantRecord["state"],
      name: context.name,
      keys: context.keys,
      agents: context.agents,
      policy: context.policy,
      grants: context.grants,
      config_epoch: context.config_epoch,
    };
  }

  function remember(id: string): Promise<TenantRecord | undefined> {
    const record = load(id);
    const mine: Known = { record, until_ms: world.monotonic_ms() + MAX_AGE_MS };
    known.set(id, mine);
    if (known.size > TENANTS_MAX) known.delete(known.keys().next().value!);
    record.then(
      (found) => {
        unreadable.delete(id);
        if (found === undefined && known.get(id) === mine) known.set(id, { record, until_ms: world.monotonic_ms() + ABSENT_AGE_MS });
      },
      (error: unknown) => {
        if (known.get(id) === mine) known.delete(id);
        if (!(error instanceof BusUnavailable)) unreadable.set(id, errorFields(error).error);
      },
    );
    return record;
  }

  return {
    async tenant(id) {
      const cached = known.get(id);
      if (cached === undefined) return remember(id);
      if (cached.until_ms > world.monotonic_ms()) return cached.record;
      try {
        return await remember(id);
      } catch (error) {
        // A journal that is there and cannot be read is no reason to go on with what was permitted before.
        if (!(error instanceof BusUnavailable)) throw error;
        // The bus is away: sessions run on with what is known.
        log.warn("tenant cannot be read again, going on with what is known", { tenant: id });
        const stale = await cached.record.catch(() => undefined);
        if (stale === undefined) throw error;
        known.set(id, cached);
        return stale;
      }
    },
    async readAll() {
      const lasts = await bus.last_of_each("EVENTS", "tenant.*.tenant.main.event");
      const ids = lasts.flatMap(({ subject }) => {
        const parsed = parseActorSubject(subject);
        return parsed.kind === "actor" ? [parsed.actor.tenant] : [];
      });
      for (let from = 0; from < Math.min(ids.length, TENANTS_READ_MAX); from += READ_AT_ONCE)
        await Promise.allSettled(
          ids.slice(from, Math.min(from + READ_AT_ONCE, TENANTS_READ_MAX)).map((id) => (known.has(id) ? Promise.resolve(undefined) : remember(id))),
        );
    },
    async unreadable() {
      const named = [...unreadable.keys()].slice(0, UNREADABLE_NAMED_MAX);
      await Promise.allSettled(named.map((id) => remember(id)));
      return named.flatMap((tenant) => (unreadable.has(tenant) ? [{ tenant, reason: unreadable.get(tenant) ?? "" }] : []));
    },
    async stop() {
      await Promise.all(subscriptions.map((subscription) => subscription.stop()));
    },
  };
}
