// concurrency: how many calls of a tenant ran side by side over time, for how long its bound was reached, and who waited how long for what: computed
// from the journals of its budget and its sessions alone, so that the same journals give the same report.
import { type ConcurrencyReport, createConcurrencyFold, type Load } from "../actors/concurrency-report.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { ago, type Printer } from "./printer.ts";

export interface ConcurrencyOptions {
  readonly session?: string;
  readonly since?: string;
  readonly until?: string;
}

const BAR_CHARACTERS = 40;

/** Shorter than two minutes in seconds with one digit: calls take seconds. */
const length = (ms: number): string => (ms < 120_000 ? `${(ms / 1000).toFixed(1)} s` : ago(ms));

function tellLoad(printer: Printer, what: string, load: Load): void {
  printer.line(
    `${printer.style("bold", what)}  ${load.count}, at most ${load.peak} at once${load.peak_at === null ? "" : ` (${load.peak_at})`}, busy ${length(load.busy_ms)}`,
  );
  if (load.peak === 0) return;
  printer.table(
    ["from", "peak", "mean", ""],
    load.slices.map(({ from, peak, mean }) => [from, peak, mean, "#".repeat(Math.round((peak / load.peak) * BAR_CHARACTERS))]),
  );
  printer.table(
    ["ran at once", "for"],
    load.ms_by_running.map(({ running, ms }) => [running, length(ms)]),
  );
}

function tell(printer: Printer, report: ConcurrencyReport): void {
  const { models, tools, waits, longest } = report;
  printer.line(`${report.session === null ? report.tenant : `${report.tenant}/session/${report.session}`}, from ${report.from ?? "-"} to ${report.to ?? "-"}`);
  tellLoad(printer, "calls of models", models);
  printer.line(
    models.concurrency_max === null && models.at_limit_ms === 0
      ? "the tenant has no bound"
      : `${models.concurrency_max ?? "as many as there are"} may run at once; as many as might ran for ${length(models.at_limit_ms)}`,
  );
  tellLoad(printer, "calls of tools", tools);
  if (waits.length === 0) {
    printer.note("nobody waited");
    return;
  }
  printer.table(
    ["waited for", "waits", "in all", "longest", "given up"],
    waits.map(({ reason, waits: count, ms, longest_ms, given_up }) => [reason, count, length(ms), length(longest_ms), given_up]),
  );
  printer.table(
    ["session", "waited for", "from", "for", "then"],
    longest.map(({ session, reason, from, ms, ended }) => [
      session,
      reason,
      from,
      length(ms),
      ended === "open" ? "waits still" : ended === "began" ? "began" : "given up",
    ]),
  );
}

export async function concurrency(context: Context, { session, since, until }: ConcurrencyOptions, tenant: string): Promise<number> {
  const { printer } = context;
  const time = (text: string | undefined): number | undefined => (text === undefined ? undefined : Date.parse(text));
  const fold = createConcurrencyFold({ tenant, session, since_ms: time(since), until_ms: time(until) });
  // In the order of the stream, so that a call's grant is known when its session says what became of it.
  for await (const { subject, data } of (await context.bus()).read("EVENTS", `tenant.${tenant}.*.*.event`, 1)) {
    const parsed = parseActorSubject(subject);
    if (parsed.kind === "malformed") continue;
    const { kind, id } = parsed.actor;
    if (kind === "budget" || (kind === "session" && (session === undefined || session === id))) fold.add(decodeJournal(data, parsed.actor));
  }
  const report = fold.report();
  if (printer.json) printer.document(report);
  else if (report.from === null) printer.note(`nothing of '${tenant}' fits`);
  else tell(printer, report);
  return EXIT.done;
}
