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
import type { ProviderKey, TenantContext } from "../state-machines/tenant.ts";
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
  /** By provider; sealed. Absent: the tenant has none. */
  readonly provider_keys?: Readonly<Record<string, ProviderKey>>;
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
/** While the bus is away, what is known is believed this long before the bus is asked again: each asking takes seconds then. */
const STALE_AGE_MS = 500;
const TENANTS_MAX = 10_000;
/** Read before a process calls itself ready: a few seconds of work at most. */
const TENANTS_READ_MAX = 1_000;
const READ_AT_ONCE = 16;
/** Looked at again, and named, when somebody asks; one is enough to be looked after. */
const UNREADABLE_NAMED_MAX = 10;

interface Known {
  /** As last read; `undefined` in it: there is no such tenant. Absent while it was never read. */
  readonly found?: { readonly record: TenantRecord | undefined };
  readonly until_ms: number;
  /** Is being read now, for everybody who asks meanwhile. */
  readonly reading?: Promise<TenantRecord | undefined>;
}

export interface DirectoryOptions {
  readonly bus: Bus;
  readonly restorer: Restorer;
  readonly world: World;
  readonly log: Log;
  /** Told of each tenant whose journal moved on: what was made of the former record is old. Must not throw. */
  on_change?(tenant: string): void;
}

export function createDirectory({ bus, restorer, world, log, on_change }: DirectoryOptions): Directory {
  const known = new Map<string, Known>();
  const unreadable = new Map<string, string>();
  const subscriptions: Subscription[] = [
    bus.subscribe("live.tenant.*.tenant.main.event", (message) => {
      const parsed = parseActorSubject(message.subject);
      if (parsed.kind !== "actor") return;
      known.delete(parsed.actor.tenant);
      on_change?.(parsed.actor.tenant);
    }),
    bus.on_state((state) => {
      // What was told meanwhile was not heard: everything is read again before it is believed, or the bus is away once more.
      if (state === "connected") for (const [id, { found }] of known) known.set(id, { ...(found === undefined ? {} : { found }), until_ms: 0 });
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
      ...(context.provider_keys === undefined ? {} : { provider_keys: context.provider_keys }),
    };
  }

  /** Reads it for everybody who asks meanwhile. */
  function read(id: string, before: Known | undefined): Promise<TenantRecord | undefined> {
    const reading = load(id).then(
      (record) => {
        unreadable.delete(id);
        const age_ms = record === undefined ? ABSENT_AGE_MS : MAX_AGE_MS;
        if (known.get(id) === mine) known.set(id, { found: { record }, until_ms: world.monotonic_ms() + age_ms });
        return record;
      },
      (error: unknown) => {
        const latest = known.get(id);
        const known_still = error instanceof BusUnavailable ? latest?.found : undefined;
        if (!(error instanceof BusUnavailable)) unreadable.set(id, errorFields(error).error);
        // A journal that is there and cannot be read is no reason to go on with what was permitted before. A bus that is away is one,
        // unless it said first that the journal moved on, which took away what was known.
        if (known_still === undefined) {
          if (latest === mine) known.delete(id);
          throw error;
        }
        log.warn("tenant cannot be read again, going on with what is known", { tenant: id });
        if (latest === mine) known.set(id, { found: known_still, until_ms: world.monotonic_ms() + STALE_AGE_MS });
        return known_still.record;
      },
    );
    const mine: Known = { ...(before?.found === undefined ? {} : { found: before.found }), until_ms: 0, reading };
    known.set(id, mine);
    if (known.size > TENANTS_MAX) known.delete(known.keys().next().value!);
    return reading;
  }

  return {
    tenant(id) {
      const cached = known.get(id);
      if (cached?.reading !== undefined) return cached.reading;
      if (cached?.found !== undefined && cached.until_ms > world.monotonic_ms()) return Promise.resolve(cached.found.record);
      return read(id, cached);
    },
    async readAll() {
      const lasts = await bus.last_of_each("EVENTS", "tenant.*.tenant.main.event");
      const ids = lasts.flatMap(({ subject }) => {
        const parsed = parseActorSubject(subject);
        return parsed.kind === "actor" ? [parsed.actor.tenant] : [];
      });
      for (let from = 0; from < Math.min(ids.length, TENANTS_READ_MAX); from += READ_AT_ONCE)
        await Promise.allSettled(
          ids.slice(from, Math.min(from + READ_AT_ONCE, TENANTS_READ_MAX)).map((id) => (known.has(id) ? Promise.resolve(undefined) : read(id, undefined))),
        );
    },
    async unreadable() {
      const named = [...unreadable.keys()].slice(0, UNREADABLE_NAMED_MAX);
      await Promise.allSettled(named.map((id) => read(id, known.get(id))));
      return named.flatMap((tenant) => (unreadable.has(tenant) ? [{ tenant, reason: unreadable.get(tenant) ?? "" }] : []));
    },
    async stop() {
      await Promise.all(subscriptions.map((subscription) => subscription.stop()));
    },
  };
}
