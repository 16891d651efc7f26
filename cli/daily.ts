// daily: a tenant's report day by day (actors/daily-report.ts), for people and as JSON lines.
import type { LedgerDay } from "../actors/budget-ledger.ts";
import { createDailyReports } from "../actors/daily-report.ts";
import type { UsageDay } from "../projections/queries.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { dollars } from "./printer.ts";
import type { UsageFilter } from "../protocol/usage-filter.ts";

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
  for (const { rule, confidence, projections, held, projected_usd_micros, actual_usd_micros } of ledger.calibration)
    printer.line(
      `projections by ${rule} of confidence ${confidence}: ${held} of ${projections} held; ${dollars(projected_usd_micros)} projected, ${dollars(actual_usd_micros)} came`,
    );
}

export async function dailyReport(context: Context, tenant: string, filter: UsageFilter): Promise<number> {
  const { printer } = context;
  const queries = await context.queries();
  const reports = createDailyReports({ bus: await context.bus(), usage_daily: (of, wanted) => queries.usage_daily(of, wanted) });
  const days = await reports.of(tenant, filter);
  for (const day of days) {
    if (printer.json) printer.json_line(day);
    else tellDay(context, day.day, day.rows, day.ledger ?? undefined);
  }
  if (days.length === 0) printer.note(`nothing of '${tenant}' fits`);
  return EXIT.done;
}
