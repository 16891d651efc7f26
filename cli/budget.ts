// budget: set and show: an operator's word on a tenant's money, and what its journal says of it now.
import { budgetView } from "../actors/budget-view.ts";
import { createRestorer } from "../actors/restore.ts";
import type { BudgetLevelKind } from "../protocol/commands.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { budgetActor, tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { rateTier } from "../protocol/rate-tiers.ts";
import type { Reply } from "../protocol/reply.ts";
import { type BudgetContext, budgetContextOf } from "../state-machines/budget-context.ts";
import { PERIODS } from "../state-machines/budget-period.ts";
import type { RateLimit } from "../state-machines/budget-rate.ts";
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

/** `PROVIDER=REQUESTS/TOKENS/SECONDS`, with `-` for what is not limited; `PROVIDER=none`. Throws what does not read so. */
export function readRate(text: string): readonly [string, RateLimit | null] {
  const [provider = "", limit = "", ...more] = text.split("=");
  if (more.length === 0 && /^[a-z0-9_-]{1,32}$/.test(provider)) {
    if (limit === "none") return [provider, null];
    const [, requests, tokens, seconds] = /^(\d{1,10}|-)\/(\d{1,13}|-)\/(\d{1,5})$/.exec(limit) ?? [];
    const bound = (part: string): number | null => (part === "-" ? null : Number(part));
    if (requests !== undefined && tokens !== undefined && seconds !== undefined)
      return [provider, { requests_max: bound(requests), tokens_max: bound(tokens), window_ms: Number(seconds) * 1000 }];
  }
  throw new TroupeError(errorBody("invalid", `--rate is PROVIDER=REQUESTS/TOKENS/SECONDS (- where there is no limit) or PROVIDER=none, not '${text}'`));
}

export interface BudgetSetOptions {
  readonly tenant: string;
  readonly agent?: string;
  readonly user?: string;
  readonly session?: string;
  readonly limitUsdMicros?: number | "none";
  readonly period?: string;
  readonly concurrency?: number | "none";
  readonly rate?: readonly string[];
  readonly tier?: string;
  readonly sessions?: number | "none";
  readonly projection?: string;
}

export async function setBudget(context: Context, options: BudgetSetOptions): Promise<number> {
  const { tenant, agent, user, session, limitUsdMicros, period, concurrency, rate = [], tier, sessions, projection } = options;
  const { printer } = context;
  const named = Object.entries({ agent, user, session }).filter((entry): entry is [BudgetLevelKind, string] => entry[1] !== undefined);
  if (named.length > 1)
    throw new TroupeError(errorBody("invalid", "a budget is of one agent, one user or one session: give at most one of --agent, --user, --session"));
  const [level, id] = named[0] ?? (["tenant"] as const);
  if ([limitUsdMicros, period, concurrency, tier, sessions, projection].every((one) => one === undefined) && rate.length === 0)
    throw new TroupeError(errorBody("invalid", "nothing to set: give --limit-usd-micros, --period, --concurrency, --sessions, --rate, --tier or --projection"));
  const rates = Object.fromEntries(rate.map(readRate));
  const reply = await tell(context, tenant, "budget.configure", {
    level,
    ...(id === undefined ? {} : { id }),
    ...(limitUsdMicros === undefined ? {} : { limit_usd_micros: limitUsdMicros === "none" ? null : limitUsdMicros }),
    ...(period === undefined ? {} : { period }),
    ...(concurrency === undefined ? {} : { concurrency_max: concurrency === "none" ? null : concurrency }),
    ...(rate.length === 0 ? {} : { rates: rates as unknown as JsonObject }),
    ...(sessions === undefined ? {} : { sessions_max: sessions === "none" ? null : sessions }),
    ...(projection === undefined ? {} : { projection }),
    ...(tier === undefined ? {} : { tier: (rateTier(tier) ?? null) as unknown as JsonObject }),
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

async function contextOf(context: Context, tenant: string): Promise<BudgetContext | undefined> {
  const restorer = createRestorer({ bus: await context.bus(), cores, log: context.ports.log });
  const restored = await restorer.restore(budgetActor(tenant));
  if (restored !== undefined) return budgetContextOf(viewOf(restored.state));
  if ((await restorer.restore(tenantActor(tenant))) === undefined) throw new TroupeError(errorBody("not_found", `there is no tenant '${tenant}'`));
  return undefined;
}

export async function showBudget(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer, ports } = context;
  const view = budgetView(await contextOf(context, tenant), ports.world.now_ms());
  if (printer.json) {
    printer.document({ tenant, ...view });
    return EXIT.done;
  }
  const { children, rates, tier, ...own } = view as typeof view & { rates: readonly JsonObject[]; tier: JsonObject | null };
  printer.table(
    ["level", "limit", "settled", "reserved", "left", "status", "period", "forecast"],
    [own as JsonObject, ...children].map((row) => [
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
  const max = own["concurrency_max"] as number | null;
  printer.note(`micro-dollars; ${String(own["calls_in_flight"])} calls in flight${max === null ? "" : ` of at most ${max}`}`);
  const sessions_max = own["sessions_max"] as number | null;
  if (sessions_max !== null) printer.note(`${String(own["sessions"])} sessions of at most ${sessions_max}`);
  printer.note(`what a level comes to is foreseen by ${String(own["projection"])}`);
  if (rates.length > 0)
    printer.table(
      ["provider", "requests", "of", "tokens", "of", "in", "tier"],
      rates.map((rate) => [
        String(rate["provider"]),
        rate["requests"] as number,
        rate["requests_max"] as number | null,
        rate["tokens"] as number,
        rate["tokens_max"] as number | null,
        `${Number(rate["window_ms"]) / 1000} s`,
        rate["tier"] as string | null,
      ]),
    );
  const acting = own["actions"] as readonly JsonObject[];
  const counted = (row: JsonObject, kind: string): (string | number)[] => PERIODS.map((period) => (row[period] as JsonObject)[kind] as number);
  if (acting.length > 0)
    printer.table(
      ["agent", "by itself", ...PERIODS.map((period) => (period === "none" ? "ever" : `this ${period}`))],
      acting.flatMap((row) => [
        [String(row["agent"]), "model calls", ...counted(row, "model_calls")],
        [String(row["agent"]), "tool calls", ...counted(row, "tool_calls")],
      ]),
    );
  if (tier !== null) printer.note(`tier ${String(tier["name"])} at every provider without a rate of its own`);
  return EXIT.done;
}
