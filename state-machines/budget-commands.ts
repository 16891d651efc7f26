// budget-commands: what a budget is asked, as the machine reads it; protocol/commands.ts checks it at the door.
import type { BudgetLevelKind } from "../protocol/commands.ts";
import type { CostProjection } from "../protocol/cost-projection.ts";
import type { Priority } from "../protocol/priority.ts";
import type { RateTier } from "../protocol/rate-tiers.ts";
import type { ActionKind, ActionLimits } from "./budget-actions.ts";
import type { BudgetPeriod } from "./budget-period.ts";
import type { RateLimit } from "./budget-rate.ts";
import type { RateUse } from "./budget-windows.ts";

export interface ConfigureBody {
  readonly level: BudgetLevelKind;
  readonly id?: string;
  readonly limit_usd_micros?: number | null;
  readonly period?: BudgetPeriod;
  readonly concurrency_max?: number | null;
  readonly rates?: Readonly<Record<string, RateLimit | null>>;
  readonly tier?: RateTier | null;
  readonly alerts_to?: { readonly add?: readonly string[]; readonly remove?: readonly string[] };
  readonly projection?: CostProjection;
  readonly sessions_max?: number | null;
}

export interface Ask {
  readonly model: string;
  /** null: its price is not known. */
  readonly amount_usd_micros: number | null;
  readonly minimum_usd_micros: number;
}

/** Of one call: one request, and tokens at most. */
interface RateOfCall {
  readonly provider: string;
  readonly tokens: number;
  /** Its settlement says what was used, so the rest can come back. Callers of before do not say it, and nothing comes back. */
  readonly returns?: true;
}

export interface ReserveBody extends Ask {
  /** `{actor path}/{inst}/{attempt}` */
  readonly hold: string;
  readonly session: string;
  readonly agent: string;
  readonly user?: string;
  readonly category?: string;
  readonly part?: number;
  /** What the caller would do if it must be cheaper. */
  readonly degraded?: Ask & { readonly rate?: RateOfCall };
  readonly rate?: RateOfCall;
  /** Its agent's: the hold is one of its model calls. */
  readonly actions?: ActionLimits;
  /** With it, who is refused for want of a slot stands in line: the next slots go by it and by the time that was waited. */
  readonly priority?: Priority;
}

export interface SettleBody {
  readonly hold: string;
  /** null: nobody knows, so the whole hold. */
  readonly cost_usd_micros: number | null;
  /** Where the cost is not known: what of it is, because it ended before. */
  readonly spent_usd_micros?: number;
  readonly model?: string;
  /** What its calls used in windows; absent where nobody knows, or nothing was called. */
  readonly used?: readonly RateUse[];
  /** Parts of the cost that are of another category than the hold. */
  readonly by_category?: Readonly<Record<string, number>>;
}

export interface RateBody {
  readonly provider: string;
  readonly requests: number;
  readonly tokens: number;
  /** The hold whose calls these are: what they do not use comes back with it. */
  readonly hold?: string;
}

export interface ActionBody {
  /** As holds are named: of one attempt. */
  readonly action: string;
  readonly agent: string;
  readonly kind: ActionKind;
  readonly limits: ActionLimits;
}
