// budget-context: what a budget remembers between two entries: its levels, its open holds, its slots and who waits for one, its rates. All of it has
// a bound (B8 of budget.ts).
import { assert } from "../protocol/assert.ts";
import { type BudgetLevelKind, MONEY_USD_MICROS_MAX } from "../protocol/commands.ts";
import type { CostProjection } from "../protocol/cost-projection.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Priority } from "../protocol/priority.ts";
import type { RateTier } from "../protocol/rate-tiers.ts";
import type { ActionCounts } from "./budget-actions.ts";
import { type BudgetStatus, STATUSES } from "./budget-decision.ts";
import type { BudgetPeriod } from "./budget-period.ts";
import type { RateLimit, RateWindow } from "./budget-rate.ts";
import type { SessionPlaces } from "./budget-sessions.ts";
import { emptyTable, type Table, tablePut } from "./budget-table.ts";
import type { Taken } from "./budget-windows.ts";
import type { ActorView, BaseContext, CreationInput } from "./definition.ts";

/** Agents are at most 1,000 (tenant.ts); three times as many users and sessions can have a limit of their own. */
export const LEVELS_MAX = 4_000;
/** Calls in flight of one tenant. More than a deployment of workers runs; as JSON they fit a snapshot with room. */
export const HOLDS_MAX = 5_000;
assert(HOLDS_MAX * MONEY_USD_MICROS_MAX < Number.MAX_SAFE_INTEGER, "B6: what is reserved is always a safe integer");
/** A hold that nobody closes. No call lasts as long (a session gives one up after minutes), and a lost one is settled when it is recovered. */
export const HOLD_LIFE_MS = 24 * 60 * 60 * 1000;
/** Slots that were taken by name, beside the calls in flight. */
export const SLOTS_MAX = 1_000;
/** Providers with a rate of their own. There are a dozen. */
export const RATES_MAX = 64;
/** Kinds of cost a report tells apart. */
export const CATEGORIES_MAX = 32;

export interface Level {
  readonly limit_usd_micros: number | null;
  readonly period: BudgetPeriod;
  /** When what is settled began to count. */
  readonly period_started_at_ms: number;
  readonly settled_usd_micros: number;
  readonly reserved_usd_micros: number;
  readonly status: BudgetStatus;
  /** The highest alert (80, 90, 100 percent) told in this period under this limit. */
  readonly alerted_percent: number;
}

export interface Hold {
  readonly session: string;
  readonly agent: string;
  readonly user: string | null;
  readonly model: string;
  readonly category: string;
  /** Of all its parts. */
  readonly amount_usd_micros: number;
  /** A call that tries again after a try that cost something asks for one more part. The newest, and its grant. */
  readonly part: number;
  readonly granted_usd_micros: number;
  readonly choice: "wanted" | "degraded";
  readonly levels: readonly string[];
  readonly at_ms: number;
  /** It is counted as an action of its agent; absent where its agent has no limit of them. */
  readonly acts?: true;
  /** In the windows of rates; absent where its caller does not say what it used, or where nothing was taken. */
  readonly taken?: readonly Taken[];
}

/** A call that waits for a slot. */
export interface InLine {
  readonly priority: Priority;
  readonly since_ms: number;
  readonly asked_ms: number;
  /** Counts those who joined, so that equal turns go in the order they came. */
  readonly number: number;
}

/** The newest closed attempt of a sender: it and all before it are closed. */
export interface Closed {
  readonly seq: number;
  readonly attempt: number;
}

export interface BudgetContext extends BaseContext {
  /** `tenant/main`, `agent/{id}`, `user/{id}`, `session/{id}` */
  readonly levels: Table<Level>;
  /** How many levels are in each status but healthy: the outer state is the worst one that is not 0. */
  readonly in_status: Readonly<Record<BudgetStatus, number>>;
  /** By hold id. */
  readonly holds: Table<Hold>;
  readonly holds_open: number;
  /** By sender: the actor's path and the effect's id. */
  readonly closed: Table<Closed>;
  readonly concurrency_max: number | null;
  /** slot → since when. */
  readonly slots: Readonly<Record<string, number>>;
  /** Who waits for a slot, by hold id; absent while nobody ever did. */
  readonly line?: Table<InLine>;
  readonly rates: Readonly<Record<string, { readonly limit: RateLimit; readonly window: RateWindow }>>;
  /** The rate at every provider without one of its own, and what was taken there; absent where none was ever set. */
  readonly tier?: RateTier | null;
  readonly tier_windows?: Readonly<Record<string, RateWindow>>;
  /** By `agent/{id}`, of those that have a limit of actions; absent where none ever had one. */
  readonly actions?: Table<ActionCounts>;
  /** Webhooks that hear each alert; absent where none was ever named. */
  readonly alerts_to?: readonly string[];
  /** By which rule a period's end is foreseen; absent where none was ever named. */
  readonly projection?: CostProjection;
  /** Its sessions, where it may have only so many; absent where that was never said, null where it is said no longer. */
  readonly session_places?: SessionPlaces | null;
  /** Of the tenant's running period. */
  readonly categories: Readonly<Record<string, number>>;
  /** Everything ever settled. */
  readonly settled_ever_usd_micros: number;
  /** The next moment at which a period ends or a hold has lived too long; may be early, never late. */
  readonly alarm_at_ms: number | null;
  readonly created_at_ms: number;
}

export const TENANT_LEVEL = "tenant/main";
export const levelKey = (kind: BudgetLevelKind, id: string | undefined): string => (kind === "tenant" ? TENANT_LEVEL : `${kind}/${id ?? ""}`);

/** A level's name as the wire has it: `level` and, under the tenant, `id`. */
export function levelName(key: string): { level: string; id?: string } {
  if (key === TENANT_LEVEL) return { level: "tenant" };
  const slash = key.indexOf("/");
  return { level: key.slice(0, slash), id: key.slice(slash + 1) };
}

export function freshLevel(at_ms: number): Level {
  return {
    limit_usd_micros: null,
    period: "none",
    period_started_at_ms: at_ms,
    settled_usd_micros: 0,
    reserved_usd_micros: 0,
    status: "healthy",
    alerted_percent: 0,
  };
}

export const moneyOf = ({ limit_usd_micros, settled_usd_micros, reserved_usd_micros }: Level): JsonObject => ({
  limit_usd_micros,
  settled_usd_micros,
  reserved_usd_micros,
});

export function created({ now }: CreationInput): BudgetContext {
  return {
    now,
    levels: tablePut(emptyTable<Level>(), TENANT_LEVEL, freshLevel(now.at_ms)),
    in_status: { healthy: 0, warning: 0, critical: 0, exceeded: 0 },
    holds: emptyTable(),
    holds_open: 0,
    closed: emptyTable(),
    concurrency_max: null,
    slots: {},
    rates: {},
    categories: {},
    settled_ever_usd_micros: 0,
    alarm_at_ms: null,
    created_at_ms: now.at_ms,
  };
}

export function budgetContextOf(view: Pick<ActorView, "context">): BudgetContext {
  return view.context as unknown as BudgetContext;
}

/** The worst status that any level has. */
export function worstStatus({ in_status }: Pick<BudgetContext, "in_status">): BudgetStatus {
  return STATUSES.findLast((status) => status !== "healthy" && in_status[status] > 0) ?? "healthy";
}
