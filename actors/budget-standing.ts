// budget-standing: which levels of a tenant's budget have nothing left that could come back, for whoever refuses work at the door. A cache
// of the budget actors, as directory.ts is of the tenants; what it does not know it does not refuse, because the reservation decides.
//
// A level is spent when what is settled reaches its limit: what is only reserved may return. The cache is dropped when a message of the
// journal could change the answer, when the connection was away, and after MAX_AGE_MS.
//
// A provider's window is full when the budget has refused a call for it, and for as long as it said. Who would wait for it longer than a call
// waits is told so at once, with when to come again, instead of by a turn that fails half a minute later.
import { type Bus, type Subscription } from "../bus/port.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { budgetActor } from "../protocol/ids.ts";
import { type ActorEvent, decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { ROOM_PATIENCE_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { budgetContextOf, type Level, levelName, TENANT_LEVEL } from "../state-machines/budget-context.ts";
import { tableRows } from "../state-machines/budget-table.ts";
import { viewOf } from "../state-machines/step.ts";
import type { Restorer } from "./restore.ts";

/** Who would spend. */
export interface Spender {
  readonly session: string;
  readonly agent: string;
  readonly user: string | null;
  /** `{provider}/{model}`; null while the session does not know its configuration. */
  readonly model: string | null;
}

export interface BudgetStanding {
  /** May the tenant have only so many sessions? Rejects when that cannot be read. */
  counts_sessions(tenant: string): Promise<boolean>;
  /** Is there no limit of money at any level, and none of calls at once? Rejects when that cannot be read. */
  is_unlimited(tenant: string): Promise<boolean>;
  /** The refusal, with the numbers, when a level that applies is spent, or the window of the model's provider is full for long. */
  refusal(tenant: string, spender: Spender): Promise<ErrorBody | undefined>;
  stop(): Promise<void>;
}

/** A raised limit is felt after this even if every live message was lost. */
const MAX_AGE_MS = 10_000;
const TENANTS_MAX = 10_000;
/** Events after which another level may be spent, or one no longer. */
const TURNING = new Set(["budget.status", "budget.configured", "budget.period_closed", "budget.created"]);

/** What is kept of a budget. */
interface Standing {
  readonly spent: ReadonlyMap<string, Level>;
  readonly counts_sessions: boolean;
  readonly is_unlimited: boolean;
}

interface FullWindow {
  /** Of the monotonic clock. */
  readonly until_ms: number;
  readonly details: JsonObject;
}

/** Of a window: what has less left than this share takes hardly any call. A call that was too large for what is left says nothing of others. */
const FULL_AT = 0.99;
function isFull({ requests, requests_max, tokens, tokens_max }: ActorEvent): boolean {
  const used = (count: unknown, max: unknown): boolean => typeof max === "number" && Number(count) >= FULL_AT * max;
  return used(requests, requests_max) || used(tokens, tokens_max);
}

const isSpent = ({ limit_usd_micros, settled_usd_micros }: Level): boolean => limit_usd_micros !== null && settled_usd_micros >= limit_usd_micros;

export function createBudgetStanding({ bus, restorer, world, log }: { bus: Bus; restorer: Restorer; world: World; log: Log }): BudgetStanding {
  const known = new Map<string, { readonly standing: Promise<Standing>; readonly until_ms: number }>();
  /** tenant → provider → until when. As many tenants as are known; a tenant has some providers. */
  const full = new Map<string, Map<string, FullWindow>>();

  function hear(tenant: string, events: readonly ActorEvent[]): void {
    for (const event of events) {
      if (event.type === "budget.configured") full.delete(tenant);
      for (const { provider } of (event["rates_unused"] ?? []) as readonly JsonObject[]) full.get(tenant)?.delete(String(provider));
      if (event.type !== "budget.refused" || event["code"] !== "rate_limited") continue;
      const { type: _, hold: __, code: ___, provider, retry_after_ms, ...numbers } = event;
      if (typeof provider !== "string" || typeof retry_after_ms !== "number" || !isFull(event)) continue;
      const windows = full.get(tenant) ?? new Map<string, FullWindow>();
      if (full.size >= TENANTS_MAX) full.delete(full.keys().next().value!);
      full.set(tenant, windows.set(provider, { until_ms: world.monotonic_ms() + retry_after_ms, details: { provider, ...numbers } }));
    }
  }

  function refusalOfRate(tenant: string, model: string | null): ErrorBody | undefined {
    const windows = full.get(tenant);
    if (windows === undefined || model === null) return undefined;
    const now_ms = world.monotonic_ms();
    for (const [provider, { until_ms }] of windows) if (until_ms <= now_ms) windows.delete(provider);
    if (windows.size === 0) full.delete(tenant);
    const window = windows.get(model.slice(0, model.indexOf("/")));
    if (window === undefined || window.until_ms - now_ms <= ROOM_PATIENCE_MS) return undefined;
    const { details } = window;
    return errorBody("rate_limited", `the window of ${String(details["provider"])} is full`, {
      ...details,
      retry_after_ms: Math.ceil(window.until_ms - now_ms),
    });
  }

  const subscriptions: Subscription[] = [
    bus.subscribe("live.tenant.*.budget.main.event", (message) => {
      const parsed = parseActorSubject(message.subject);
      if (parsed.kind !== "actor" || !known.has(parsed.actor.tenant)) return;
      const { state, events } = decodeJournal(message.data);
      hear(parsed.actor.tenant, events);
      // While a level is exceeded, each settlement may be the one that makes it spent for good.
      if (state === "exceeded" || events.some(({ type }) => TURNING.has(type))) known.delete(parsed.actor.tenant);
    }),
    bus.on_state((state) => {
      if (state !== "connected") return;
      known.clear();
      full.clear();
    }),
  ];

  async function load(tenant: string): Promise<Standing> {
    const restored = await restorer.restore(budgetActor(tenant));
    if (restored === undefined) return { spent: new Map(), counts_sessions: false, is_unlimited: true };
    const { levels, session_places = null, concurrency_max } = budgetContextOf(viewOf(restored.state));
    const rows = [...tableRows(levels)];
    return {
      spent: new Map(rows.filter(([, level]) => isSpent(level))),
      counts_sessions: session_places !== null,
      is_unlimited: concurrency_max === null && rows.every(([, level]) => level.limit_usd_micros === null),
    };
  }

  function standingOf(tenant: string): Promise<Standing> {
    const cached = known.get(tenant);
    if (cached !== undefined && cached.until_ms > world.monotonic_ms()) return cached.standing;
    const standing = load(tenant);
    const mine = { standing, until_ms: world.monotonic_ms() + MAX_AGE_MS };
    known.set(tenant, mine);
    if (known.size > TENANTS_MAX) known.delete(known.keys().next().value!);
    standing.catch(() => {
      if (known.get(tenant) === mine) known.delete(tenant);
    });
    return standing;
  }

  return {
    counts_sessions: async (tenant) => (await standingOf(tenant)).counts_sessions,
    is_unlimited: async (tenant) => (await standingOf(tenant)).is_unlimited,
    async refusal(tenant, { session, agent, user, model }) {
      let spent: Standing["spent"];
      try {
        ({ spent } = await standingOf(tenant));
      } catch (error) {
        log.debug("a budget cannot be read at the door; the reservation decides", { tenant, ...errorFields(error) });
        return undefined;
      }
      if (spent.size === 0) return refusalOfRate(tenant, model);
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
      return refusalOfRate(tenant, model);
    },
    async stop() {
      await Promise.all(subscriptions.map((subscription) => subscription.stop()));
    },
  };
}
