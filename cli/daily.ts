// daily: a tenant's report day by day: what its calls cost by agent, model and key (from the usage rows), and what its budget did (from the
// budget's own journal): refusals, degraded calls, alerts, closed periods, and how its projections came true. Either can be made again from
// the streams.
import { createLedger, type LedgerDay } from "../actors/budget-ledger.ts";
import type { UsageDay, UsageFilter } from "../projections/queries.ts";
import { budgetActor } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { actorSubject } from "../protocol/subjects.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { dollars } from "./printer.ts";

const DAY_MS = 24 * 60 * 60 * 1000;

/** The whole journal is folded, since a day's projections are judged by what came after; what is shown are the days that were asked for. */
async function ledgerOf(context: Context, tenant: string, { since, until }: UsageFilter): Promise<Map<string, LedgerDay>> {
  const actor = budgetActor(tenant);
  const ledger = createLedger();
  const bus = await context.bus();
  for await (const { data } of bus.read("EVENTS", actorSubject(actor, "event"), 1)) ledger.add(decodeJournal(data, actor));
  const within = (day: string): boolean => {
    const from_ms = Date.parse(day);
    return (since === undefined || from_ms + DAY_MS > Date.parse(since)) && (until === undefined || from_ms < Date.parse(until));
  };
  return new Map(
    ledger
      .days()
      .filter(({ day }) => within(day))
      .map((day) => [day.day, day]),
  );
}

const counts = (of: Readonly<Record<string, number>>): string =>
  Object.entries(of)
    .map(([name, count]) => `${name} ${count}`)
    .join(", ") || "none";

function tellDay({ printer }: Context, day: string, rows: readonly UsageDay[], ledger: LedgerDay | undefined): void {
  const cost = rows.reduce((sum, row) => sum + row.cost_usd_micros, 0);
  printer.line(`${printer.style("bold", day)}  ${dollars(cost)} for ${rows.reduce((sum, row) => sum + row.calls, 0)} calls`);
  if (rows.length > 0)
    printer.table(
      ["agent", "model", "key", "calls", "failed", "input", "output", "cost"],
      rows.map((row) => [row.agent, row.model, row.key_source, row.calls, row.failed, row.input_tokens, row.output_tokens, dollars(row.cost_usd_micros)]),
    );
  if (ledger === undefined) return;
  const { settled_usd_micros, assumed_usd_micros, by_category, refused, degraded, degraded_without_plan, alerts, overruns, periods_closed } = ledger;
  printer.line(`settled ${dollars(settled_usd_micros)}, of it assumed ${dollars(assumed_usd_micros)}; by category (micro-dollars): ${counts(by_category)}`);
  printer.line(
    `refused: ${counts(refused)}; degraded: ${counts(degraded)}, without a plan ${degraded_without_plan}; alerts: ${counts(alerts)}; overruns ${overruns}`,
  );
  for (const closed of periods_closed)
    printer.line(
      `closed: ${String(closed["level"])} ${String(closed["id"] ?? "")} ${String(closed["period"])} from ${String(closed["from"])}: ${dollars(Number(closed["settled_usd_micros"]))}`,
    );
  for (const { confidence, projections, held, projected_usd_micros, actual_usd_micros } of ledger.calibration)
    printer.line(
      `projections of confidence ${confidence}: ${held} of ${projections} held; ${dollars(projected_usd_micros)} projected, ${dollars(actual_usd_micros)} came`,
    );
}

export async function dailyReport(context: Context, tenant: string, filter: UsageFilter): Promise<number> {
  const { printer } = context;
  const rows = await (await context.queries()).usage_daily(tenant, filter);
  // The budget knows levels, not single sessions or models: with such a filter its part would be about something else.
  const narrowed = [filter.session, filter.agent, filter.user, filter.model].some((one) => one !== undefined);
  const ledger = narrowed ? new Map<string, LedgerDay>() : await ledgerOf(context, tenant, filter);
  const days = [...new Set([...rows.map(({ day }) => day), ...ledger.keys()])].sort();
  for (const day of days) {
    const mine = rows.filter((row) => row.day === day);
    const usage_usd_micros = mine.reduce((sum, row) => sum + row.cost_usd_micros, 0);
    if (printer.json) printer.json_line({ tenant, day, usage_usd_micros, rows: mine, ledger: ledger.get(day) ?? null });
    else tellDay(context, day, mine, ledger.get(day));
  }
  if (days.length === 0) printer.note(`nothing of '${tenant}' fits`);
  return EXIT.done;
}
