// budget-view: a tenant's budget as people and programs read it: every level with what is left and what the period may come to, and every rate
// with what its window has left. Pure: out of the budget's own state and a clock.
import type { JsonObject } from "../protocol/json.ts";
import { COST_PROJECTION_DEFAULT } from "../protocol/cost-projection.ts";
import { timestamp } from "../protocol/world.ts";
import { type ActionCounts, actionsIn } from "../state-machines/budget-actions.ts";
import { type BudgetContext, type Level, levelName, TENANT_LEVEL } from "../state-machines/budget-context.ts";
import { headroom, utilisation } from "../state-machines/budget-decision.ts";
import { PERIODS, periodEnd, periodStart } from "../state-machines/budget-period.ts";
import { type RateLimit, type RateWindow, rateUsed } from "../state-machines/budget-rate.ts";
import { tableRows } from "../state-machines/budget-table.ts";

/** A level as people and programs read it. A period that has ended since the last entry shows as the new one: its timer is about to say so. */
function shown(key: string, level: Level, now_ms: number): JsonObject {
  const ended = (periodEnd(level.period, level.period_started_at_ms) ?? Number.POSITIVE_INFINITY) <= now_ms;
  const settled_usd_micros = ended ? 0 : level.settled_usd_micros;
  const spending = { ...level, settled_usd_micros };
  const started_ms = ended ? periodStart(level.period, now_ms) : level.period_started_at_ms;
  const ends_ms = periodEnd(level.period, now_ms);
  const remaining = headroom(spending);
  return {
    ...levelName(key),
    limit_usd_micros: level.limit_usd_micros,
    settled_usd_micros,
    reserved_usd_micros: level.reserved_usd_micros,
    remaining_usd_micros: Number.isFinite(remaining) ? remaining : null,
    utilisation: Math.round(utilisation(spending) * 10_000) / 10_000,
    status: level.status,
    period: level.period,
    period_started_at: timestamp(started_ms),
    period_ends_at: ends_ms === null ? null : timestamp(ends_ms),
    forecast_usd_micros: forecast(settled_usd_micros, started_ms, ends_ms, now_ms),
  };
}

/** What the period comes to if it goes on as it began; null without a period, and in its first hundredth, which says nothing yet. */
function forecast(settled_usd_micros: number, started_ms: number, ends_ms: number | null, now_ms: number): number | null {
  if (ends_ms === null || now_ms - started_ms < (ends_ms - started_ms) / 100) return null;
  return Math.round((settled_usd_micros * (ends_ms - started_ms)) / (now_ms - started_ms));
}

const NO_BUDGET: JsonObject = {
  limit_usd_micros: null,
  settled_usd_micros: 0,
  reserved_usd_micros: 0,
  remaining_usd_micros: null,
  utilisation: 0,
  status: "healthy",
  period: "none",
};

/** A rate, what its window holds now, and what it still gives. */
function rateShown(provider: string, { requests_max, tokens_max, window_ms }: RateLimit, window: RateWindow, now_ms: number, tier: string | null): JsonObject {
  const { requests, tokens } = rateUsed({ requests_max, tokens_max, window_ms }, window, now_ms);
  return {
    provider,
    tier,
    requests_max,
    tokens_max,
    window_ms,
    requests,
    tokens,
    requests_remaining: requests_max === null ? null : Math.max(0, requests_max - requests),
    tokens_remaining: tokens_max === null ? null : Math.max(0, tokens_max - tokens),
  };
}

function ratesShown({ rates, tier, tier_windows = {} }: BudgetContext, now_ms: number): JsonObject[] {
  const own = Object.entries(rates).map(([provider, { limit, window }]) => rateShown(provider, limit, window, now_ms, null));
  if (!tier) return own;
  const of_tier = Object.entries(tier_windows).filter(([provider]) => !Object.hasOwn(rates, provider));
  return [...own, ...of_tier.map(([provider, window]) => rateShown(provider, tier, window, now_ms, tier.name))];
}

/** What agents with a limit of actions have done, by the period that runs. */
function actionsShown({ actions = [] }: BudgetContext, now_ms: number): JsonObject[] {
  const shownIn = (counts: ActionCounts): JsonObject =>
    Object.fromEntries(
      PERIODS.map((period) => {
        const { since_ms: _, ...count } = actionsIn(counts, period, now_ms);
        return [period, count];
      }),
    );
  return [...tableRows(actions)].map(([key, counts]) => ({ agent: levelName(key).id ?? "", ...shownIn(counts) }));
}

/** `found` is undefined for a tenant that has no budget yet: nothing is limited there. */
export function budgetView(found: BudgetContext | undefined, now_ms: number): JsonObject & { readonly children: readonly JsonObject[] } {
  const rows = found === undefined ? [] : [...tableRows(found.levels)].map(([key, level]) => ({ key, row: shown(key, level, now_ms) }));
  const own = rows.find(({ key }) => key === TENANT_LEVEL)?.row ?? { level: "tenant", ...NO_BUDGET };
  return {
    ...own,
    children: rows
      .filter(({ key }) => key !== TENANT_LEVEL)
      .sort((a, b) => (a.key < b.key ? -1 : 1))
      .map(({ row }) => row),
    calls_in_flight: found?.holds_open ?? 0,
    concurrency_max: found?.concurrency_max ?? null,
    sessions: found?.session_places?.taken ?? null,
    sessions_max: found?.session_places?.max ?? null,
    projection: found?.projection ?? COST_PROJECTION_DEFAULT,
    tier: (found?.tier ?? null) as JsonObject | null,
    rates: found === undefined ? [] : ratesShown(found, now_ms),
    actions: found === undefined ? [] : actionsShown(found, now_ms),
    by_category: found?.categories ?? {},
    settled_ever_usd_micros: found?.settled_ever_usd_micros ?? 0,
  };
}
