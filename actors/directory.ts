// directory: what every process may know of tenants: their state, keys and agents. A cache of the tenant actors.
//
// The tenant actor's journal is the truth; this restores it, keeps what it restored, and drops it when the journal moves on
// (heard on `live.`), when the connection was away, and after MAX_AGE_MS at the latest. Postgres is not asked.
import type { Bus, Subscription } from "../bus/port.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import { tenantActor } from "../protocol/ids.ts";
import type { Log } from "../protocol/log.ts";
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
  stop(): Promise<void>;
}

/** A revoked key is refused everywhere after this even if every live message was lost. */
const MAX_AGE_MS = 10_000;
/** Tenants that are not there are remembered shortly, so that guessing ids costs the broker little. */
const ABSENT_AGE_MS = 500;
const TENANTS_MAX = 10_000;

interface Known {
  readonly record: Promise<TenantRecord | undefined>;
  readonly until_ms: number;
}

export function createDirectory({ bus, restorer, world, log }: { bus: Bus; restorer: Restorer; world: World; log: Log }): Directory {
  const known = new Map<string, Known>();
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
    return { state: outerState(restored.state.snapshot) as TenantRecord["state"], name: context.name, keys: context.keys, agents: context.agents, policy: context.policy, grants: context.grants, config_epoch: context.config_epoch };
  }

  function remember(id: string): Promise<TenantRecord | undefined> {
    const record = load(id);
    const mine: Known = { record, until_ms: world.monotonic_ms() + MAX_AGE_MS };
    known.set(id, mine);
    if (known.size > TENANTS_MAX) known.delete(known.keys().next().value!);
    record.then(
      (found) => {
        if (found === undefined && known.get(id) === mine) known.set(id, { record, until_ms: world.monotonic_ms() + ABSENT_AGE_MS });
      },
      () => {
        if (known.get(id) === mine) known.delete(id);
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
        // The bus is away: sessions run on with what is known.
        log.warn("tenant cannot be read again, going on with what is known", { tenant: id });
        const stale = await cached.record.catch(() => undefined);
        if (stale === undefined) throw error;
        known.set(id, cached);
        return stale;
      }
    },
    async stop() {
      await Promise.all(subscriptions.map((subscription) => subscription.stop()));
    },
  };
}
