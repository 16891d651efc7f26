// budget: set and show: an operator's word on a tenant's money, and what its journal says of it now.
import { createRestorer } from "../actors/restore.ts";
import type { BudgetLevelKind } from "../protocol/commands.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { budgetActor, tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Reply } from "../protocol/reply.ts";
import { timestamp } from "../protocol/world.ts";
import { type BudgetContext, budgetContextOf, type Level, levelName, TENANT_LEVEL } from "../state-machines/budget.ts";
import { headroom, utilisation } from "../state-machines/budget-decision.ts";
import { periodEnd, periodStart } from "../state-machines/budget-period.ts";
import { tableRows } from "../state-machines/budget-table.ts";
import { cores } from "../state-machines/kinds.ts";
import { viewOf } from "../state-machines/step.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";

/** Says a command to the tenant's budget; one that is not there yet is made first. Throws what it refuses. */
async function tell(context: Context, tenant: string, type: string, body: JsonObject): Promise<Reply & { ok: true }> {
  const commands = await context.commands();
  for (const create of [false, true]) {
    if (create) await commands.command(budgetActor(tenant), { type: "budget.create", body: {}, channel: "control" });
    const outcome = await commands.command(budgetActor(tenant), { type, body, channel: "control" });
    if (outcome.kind === "refused") throw new TroupeError(outcome.error);
    if (outcome.reply.ok) return outcome.reply;
    if (create || outcome.reply.error.code !== "not_found") throw new TroupeError(outcome.reply.error);
    if ((await (await context.directory()).tenant(tenant)) === undefined) throw new TroupeError(errorBody("not_found", `there is no tenant '${tenant}'`));
  }
  throw new TroupeError(errorBody("internal", "a budget that was just made is not there"));
}

export interface BudgetSetOptions {
  readonly tenant: string;
  readonly agent?: string;
  readonly user?: string;
  readonly session?: string;
  readonly limitUsdMicros?: number | "none";
  readonly period?: string;
  readonly concurrency?: number | "none";
}

export async function setBudget(context: Context, { tenant, agent, user, session, limitUsdMicros, period, concurrency }: BudgetSetOptions): Promise<number> {
  const { printer } = context;
  const named = Object.entries({ agent, user, session }).filter((entry): entry is [BudgetLevelKind, string] => entry[1] !== undefined);
  if (named.length > 1)
    throw new TroupeError(errorBody("invalid", "a budget is of one agent, one user or one session: give at most one of --agent, --user, --session"));
  const [level, id] = named[0] ?? (["tenant"] as const);
  if (limitUsdMicros === undefined && period === undefined && concurrency === undefined)
    throw new TroupeError(errorBody("invalid", "nothing to set: give --limit-usd-micros, --period or --concurrency"));
  const reply = await tell(context, tenant, "budget.configure", {
    level,
    ...(id === undefined ? {} : { id }),
    ...(limitUsdMicros === undefined ? {} : { limit_usd_micros: limitUsdMicros === "none" ? null : limitUsdMicros }),
    ...(period === undefined ? {} : { period }),
    ...(concurrency === undefined ? {} : { concurrency_max: concurrency === "none" ? null : concurrency }),
  });
  const { limit_usd_micros, settled_usd_micros } = reply.result;
  if (printer.json) printer.document({ tenant, ...reply.result });
  else {
    const whose = id === undefined ? tenant : `${level} ${id} of ${tenant}`;
    printer.line(
      `${whose}: ${limit_usd_micros === null ? "no limit" : `${JSON.stringify(limit_usd_micros)} micro-dollars`} (${String(reply.result["period"])}), ${JSON.stringify(settled_usd_micros)} settled, ${String(reply.result["status"])}`,
    );
  }
  return EXIT.done;
}

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

async function contextOf(context: Context, tenant: string): Promise<BudgetContext | undefined> {
  const restorer = createRestorer({ bus: await context.bus(), cores, log: context.ports.log });
  const restored = await restorer.restore(budgetActor(tenant));
  if (restored !== undefined) return budgetContextOf(viewOf(restored.state));
  if ((await restorer.restore(tenantActor(tenant))) === undefined) throw new TroupeError(errorBody("not_found", `there is no tenant '${tenant}'`));
  return undefined;
}

export async function showBudget(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer, ports } = context;
  const found = await contextOf(context, tenant);
  const rows = found === undefined ? [] : [...tableRows(found.levels)].map(([key, level]) => ({ key, row: shown(key, level, ports.world.now_ms()) }));
  const own = rows.find(({ key }) => key === TENANT_LEVEL)?.row ?? { level: "tenant", ...NO_BUDGET };
  const children = rows
    .filter(({ key }) => key !== TENANT_LEVEL)
    .sort((a, b) => (a.key < b.key ? -1 : 1))
    .map(({ row }) => row);
  if (printer.json) {
    printer.document({
      tenant,
      ...own,
      children,
      calls_in_flight: found?.holds_open ?? 0,
      concurrency_max: found?.concurrency_max ?? null,
      by_category: found?.categories ?? {},
      settled_ever_usd_micros: found?.settled_ever_usd_micros ?? 0,
    });
    return EXIT.done;
  }
  printer.table(
    ["level", "limit", "settled", "reserved", "left", "status", "period", "forecast"],
    [own, ...children].map((row) => [
      row["level"] === "tenant" ? tenant : `${String(row["level"])} ${String(row["id"])}`,
      row["limit_usd_micros"] as number | null,
      row["settled_usd_micros"] as number,
      row["reserved_usd_micros"] as number,
      row["remaining_usd_micros"] as number | null,
      String(row["status"]),
      String(row["period"]),
      (row["forecast_usd_micros"] ?? null) as number | null,
    ]),
  );
  printer.note(
    `micro-dollars; ${found?.holds_open ?? 0} calls in flight${found?.concurrency_max === null || found === undefined ? "" : ` of at most ${found.concurrency_max}`}`,
  );
  return EXIT.done;
}
