// budget-period: where a level's period begins and ends: days, weeks (from Monday) and months of UTC. Pure calendar arithmetic.

export const PERIODS = ["day", "week", "month", "none"] as const;
export type BudgetPeriod = (typeof PERIODS)[number];

const DAY_MS = 24 * 60 * 60 * 1000;

/** The beginning of the period that holds `at_ms`; 0 for `none`, which began with time. */
export function periodStart(period: BudgetPeriod, at_ms: number): number {
  const at = new Date(at_ms);
  const day = Date.UTC(at.getUTCFullYear(), at.getUTCMonth(), at.getUTCDate());
  switch (period) {
    case "day":
      return day;
    case "week":
      return day - ((at.getUTCDay() + 6) % 7) * DAY_MS;
    case "month":
      return Date.UTC(at.getUTCFullYear(), at.getUTCMonth(), 1);
    case "none":
      return 0;
  }
}

/** The first moment after the period that holds `at_ms`; null for `none`, which has no end. */
export function periodEnd(period: BudgetPeriod, at_ms: number): number | null {
  const start = periodStart(period, at_ms);
  switch (period) {
    case "day":
      return start + DAY_MS;
    case "week":
      return start + 7 * DAY_MS;
    case "month": {
      const first = new Date(start);
      return Date.UTC(first.getUTCFullYear(), first.getUTCMonth() + 1, 1);
    }
    case "none":
      return null;
  }
}
