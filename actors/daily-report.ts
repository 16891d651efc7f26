// daily-report: a tenant's report day by day: what its calls cost by agent, model and key (usage rows), and what its budget did (the budget's own journal):
// refusals, degraded calls, alerts, closed periods, and how its projections came true. Either can be made again from the streams.
//
// Invariants:
//   DR1. A tenant's journal is folded once at a time here, however many ask; who asks meanwhile gets the same fold.
import type { Bus } from "../bus/port.ts";
import { budgetActor } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { actorSubject } from "../protocol/subjects.ts";
import type { UsageFilter } from "../protocol/usage-filter.ts";
import { createLedger, type LedgerDay } from "./budget-ledger.ts";

const DAY_MS = 24 * 60 * 60 * 1000;

/** Sums of one day, agent, model and key. */
export interface DailyRow {
  readonly day: string;
  readonly cost_usd_micros: number;
}

export interface DayReport<Row extends DailyRow> {
  readonly tenant: string;
  readonly day: string;
  readonly usage_usd_micros: number;
  readonly rows: readonly Row[];
  /** null: nothing happened to the budget that day, or only a part of the tenant was asked for, which a budget does not tell apart. */
  readonly ledger: LedgerDay | null;
}

export interface DailyReports<Row extends DailyRow> {
  /** Oldest day first. Rejects when the bus or the database cannot answer. */
  of(tenant: string, filter: UsageFilter): Promise<DayReport<Row>[]>;
}

export function createDailyReports<Row extends DailyRow>({
  bus,
  usage_daily,
}: {
  readonly bus: Pick<Bus, "read">;
  usage_daily(tenant: string, filter: UsageFilter): Promise<readonly Row[]>;
}): DailyReports<Row> {
  const folding = new Map<string, Promise<LedgerDay[]>>();

  /** The whole journal is folded, since a day's projections are judged by what came after. */
  async function fold(tenant: string): Promise<LedgerDay[]> {
    const actor = budgetActor(tenant);
    const ledger = createLedger();
    for await (const { data } of bus.read("EVENTS", actorSubject(actor, "event"), 1)) ledger.add(decodeJournal(data, actor));
    return ledger.days();
  }
  /** DR1 */
  function ledgerOf(tenant: string): Promise<LedgerDay[]> {
    const known = folding.get(tenant);
    if (known !== undefined) return known;
    const coming = fold(tenant).finally(() => folding.delete(tenant));
    folding.set(tenant, coming);
    return coming;
  }

  return {
    async of(tenant, filter) {
      const { session, agent, user, model, since, until } = filter;
      // The budget knows levels, not single sessions or models: with such a filter its part would be about something else.
      const narrowed = [session, agent, user, model].some((one) => one !== undefined);
      const within = ({ day }: LedgerDay): boolean => {
        const from_ms = Date.parse(day);
        return (since === undefined || from_ms + DAY_MS > Date.parse(since)) && (until === undefined || from_ms < Date.parse(until));
      };
      const [rows, ledger] = await Promise.all([usage_daily(tenant, filter), narrowed ? [] : ledgerOf(tenant)]);
      const by_day = new Map(ledger.filter(within).map((day) => [day.day, day]));
      return [...new Set([...rows.map(({ day }) => day), ...by_day.keys()])].sort().map((day) => {
        const mine = rows.filter((row) => row.day === day);
        return { tenant, day, usage_usd_micros: mine.reduce((sum, row) => sum + row.cost_usd_micros, 0), rows: mine, ledger: by_day.get(day) ?? null };
      });
    },
  };
}
