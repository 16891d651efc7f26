// records: sessions, usage, audit and migrate: what the projections hold, asked of Postgres.
import type { Context } from "./context.ts";
import { dailyReport } from "./daily.ts";
import { EXIT } from "./ports.ts";
import { dollars } from "./printer.ts";

export interface SessionsOptions {
  readonly tenant: string;
  readonly state?: string;
  readonly agent?: string;
  readonly limit?: number;
  readonly after?: string;
}

export async function sessions(context: Context, { tenant, state, agent, limit, after }: SessionsOptions): Promise<number> {
  const { printer } = context;
  const page = await (await context.queries()).sessions.list(tenant, { state, agent, limit, after });
  if (printer.json) {
    printer.document(page);
    return EXIT.done;
  }
  printer.table(
    ["session", "state", "agent", "model", "turn", "worker", "epoch", "updated"],
    page.items.map((row) => [
      row.session,
      row.reason === null ? row.state : `${row.state} (${row.reason})`,
      row.agent,
      row.model,
      row.turn,
      row.worker,
      row.epoch,
      row.updated_at,
    ]),
  );
  if (page.items.length === 0) printer.note(`no session of '${tenant}' fits`);
  if (page.next !== null) printer.note(`more: --after ${page.next}`);
  return EXIT.done;
}

export interface UsageOptions {
  readonly tenant: string;
  readonly session?: string;
  readonly agent?: string;
  readonly user?: string;
  readonly model?: string;
  readonly since?: string;
  readonly until?: string;
  readonly limit?: number;
  readonly daily?: boolean;
}

/** A page of the database at a time, whatever was asked for. */
const PAGE = 500;

export async function usage(context: Context, { tenant, limit, daily, ...filter }: UsageOptions): Promise<number> {
  if (daily === true) return dailyReport(context, tenant, filter);
  const { printer } = context;
  const queries = await context.queries();
  if (!printer.json) {
    const totals = await queries.usage_totals(tenant, filter);
    const sum = (of: (row: (typeof totals)[number]) => number): number => totals.reduce((total, row) => total + of(row), 0);
    printer.table(
      ["agent", "model", "attempts", "input", "output", "cache read", "cache write", "reasoning", "cost"],
      totals.map((row) => [
        row.agent,
        row.model,
        row.attempts,
        row.input_tokens,
        row.output_tokens,
        row.cache_read_tokens,
        row.cache_write_tokens,
        row.reasoning_tokens,
        dollars(row.cost_usd_micros),
      ]),
    );
    const unpriced = sum((row) => row.attempts_unpriced);
    const attempts = sum((row) => row.attempts);
    if (totals.length === 0) printer.note(`no model call of '${tenant}' fits`);
    else
      printer.line(
        `\n${printer.style("bold", dollars(sum((row) => row.cost_usd_micros)))} for ${attempts} attempt${attempts === 1 ? "" : "s"}${unpriced === 0 ? "" : `, and ${unpriced} of unknown cost`}`,
      );
    return EXIT.done;
  }
  let left = limit ?? Number.POSITIVE_INFINITY;
  let after: string | undefined;
  do {
    const page = await queries.usage(tenant, { ...filter, after, limit: Math.min(left, PAGE) });
    for (const row of page.items) printer.json_line(row);
    left -= page.items.length;
    after = page.next ?? undefined;
  } while (after !== undefined && left > 0);
  return EXIT.done;
}

export interface AuditOptions {
  readonly tenant: string;
  readonly kind?: string;
  readonly actor?: string;
  readonly entry?: string;
  readonly command?: string;
  readonly principal?: string;
  readonly tool?: string;
  readonly since?: string;
  readonly until?: string;
  readonly limit?: number;
  readonly after?: string;
}

export async function audit(
  context: Context,
  { tenant, kind, actor, entry, command, principal, tool, since, until, limit, after }: AuditOptions,
): Promise<number> {
  const { printer } = context;
  const page = await (
    await context.queries()
  ).audit(tenant, { kind, actor, entry_type: entry, command_type: command, principal, tool, since, until, limit, after });
  if (printer.json) for (const row of page.items) printer.json_line(row);
  else
    printer.table(
      ["at", "actor", "seq", "entry", "what", "by", "state after", "events", "worker", "epoch"],
      page.items.map((row) => [
        row.at,
        `${row.kind}/${row.actor}`,
        row.seq,
        row.code === null ? row.entry_type : `${row.entry_type} ${row.code}`,
        row.tool === null ? (row.command_type ?? row.inst) : `${row.tool} ${row.decision ?? ""}${row.duration_ms === null ? "" : ` ${row.duration_ms} ms`}`,
        row.principal,
        row.state_after,
        row.events.join(" "),
        row.worker,
        row.epoch,
      ]),
    );
  if (page.items.length === 0) printer.note(`no entry of '${tenant}' fits`);
  if (page.next !== null) printer.note(`more: --after ${page.next}`);
  return EXIT.done;
}

export async function migrate(context: Context): Promise<number> {
  const { printer } = context;
  const applied = await (await context.database()).migrate();
  if (printer.json) printer.document({ applied });
  else if (applied.length === 0) printer.line("the schema is current");
  else for (const name of applied) printer.line(`applied ${name}`);
  return EXIT.done;
}
