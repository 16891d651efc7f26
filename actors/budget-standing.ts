// budget-standing: which levels of a tenant's budget have nothing left that could come back, for whoever refuses work at the door. A cache
// of the budget actors, as directory.ts is of the tenants; what it does not know it does not refuse, because the reservation decides.
//
// A level is spent when what is settled reaches its limit: what is only reserved may return. The cache is dropped when a message of the
// journal could change the answer, when the connection was away, and after MAX_AGE_MS.
import { type Bus, type Subscription } from "../bus/port.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { budgetActor } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { budgetContextOf, type Level, levelName, TENANT_LEVEL } from "../state-machines/budget.ts";
import { tableRows } from "../state-machines/budget-table.ts";
import { viewOf } from "../state-machines/step.ts";
import type { Restorer } from "./restore.ts";

/** Who would spend. */
export interface Spender {
  readonly session: string;
  readonly agent: string;
  readonly user: string | null;
}

export interface BudgetStanding {
  /** The refusal, with the numbers, when a level that applies is spent. */
  refusal(tenant: string, spender: Spender): Promise<ErrorBody | undefined>;
  stop(): Promise<void>;
}

/** A raised limit is felt after this even if every live message was lost. */
const MAX_AGE_MS = 10_000;
const TENANTS_MAX = 10_000;
/** Events after which another level may be spent, or one no longer. */
const TURNING = new Set(["budget.status", "budget.configured", "budget.period_closed", "budget.created"]);

const isSpent = ({ limit_usd_micros, settled_usd_micros }: Level): boolean => limit_usd_micros !== null && settled_usd_micros >= limit_usd_micros;

export function createBudgetStanding({ bus, restorer, world, log }: { bus: Bus; restorer: Restorer; world: World; log: Log }): BudgetStanding {
  const known = new Map<string, { readonly spent: Promise<ReadonlyMap<string, Level>>; readonly until_ms: number }>();
  const subscriptions: Subscription[] = [
    bus.subscribe("live.tenant.*.budget.main.event", (message) => {
      const parsed = parseActorSubject(message.subject);
      if (parsed.kind !== "actor" || !known.has(parsed.actor.tenant)) return;
      const { state, events } = decodeJournal(message.data);
      // While a level is exceeded, each settlement may be the one that makes it spent for good.
      if (state === "exceeded" || events.some(({ type }) => TURNING.has(type))) known.delete(parsed.actor.tenant);
    }),
    bus.on_state((state) => {
      if (state === "connected") known.clear();
    }),
  ];

  async function load(tenant: string): Promise<ReadonlyMap<string, Level>> {
    const restored = await restorer.restore(budgetActor(tenant));
    if (restored === undefined) return new Map();
    return new Map([...tableRows(budgetContextOf(viewOf(restored.state)).levels)].filter(([, level]) => isSpent(level)));
  }

  function spentOf(tenant: string): Promise<ReadonlyMap<string, Level>> {
    const cached = known.get(tenant);
    if (cached !== undefined && cached.until_ms > world.monotonic_ms()) return cached.spent;
    const spent = load(tenant);
    const mine = { spent, until_ms: world.monotonic_ms() + MAX_AGE_MS };
    known.set(tenant, mine);
    if (known.size > TENANTS_MAX) known.delete(known.keys().next().value!);
    spent.catch(() => {
      if (known.get(tenant) === mine) known.delete(tenant);
    });
    return spent;
  }

  return {
    async refusal(tenant, { session, agent, user }) {
      let spent;
      try {
        spent = await spentOf(tenant);
      } catch (error) {
        log.debug("a budget cannot be read at the door; the reservation decides", { tenant, ...errorFields(error) });
        return undefined;
      }
      if (spent.size === 0) return undefined;
      for (const key of [TENANT_LEVEL, `agent/${agent}`, `user/${user ?? ""}`, `session/${session}`]) {
        const level = spent.get(key);
        if (level === undefined) continue;
        const { limit_usd_micros, settled_usd_micros, reserved_usd_micros, period } = level;
        const { level: kind, id } = levelName(key);
        const whose = id === undefined ? "the tenant's budget" : `the budget of ${kind} ${id}`;
        const details = {
          ...levelName(key),
          limit_usd_micros,
          settled_usd_micros,
          reserved_usd_micros,
          remaining_usd_micros: (limit_usd_micros ?? 0) - settled_usd_micros - reserved_usd_micros,
          period,
        };
        return errorBody("budget_exceeded", `${whose} is spent`, details);
      }
      return undefined;
    },
    async stop() {
      await Promise.all(subscriptions.map((subscription) => subscription.stop()));
    },
  };
}
