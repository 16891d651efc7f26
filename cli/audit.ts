// audit: the audit as a chain: recomputed from the table and from the stream, and given out as JSON lines.
import { createReadStream } from "node:fs";
import { isAbsolute, join } from "node:path";
import { createInterface } from "node:readline";
import type { Bus } from "../bus/port.ts";
import { type AuditFinding, type AuditReport, type ChainedRow, verifyAudit } from "../projections/audit-chain.ts";
import { PROJECTION_NAME } from "../projections/rows.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { decodeJournal, type JournalMessage } from "../protocol/journal.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { plain } from "./printer.ts";

export interface AuditVerifyOptions {
  readonly tenant?: string;
  readonly file?: string;
  readonly stream: boolean;
}

/** A tenant's journal messages in the stream's order, up to what is projected. */
async function* journalOf(bus: Bus, tenant: string, through: number): AsyncGenerator<{ message: JournalMessage; sequence: number }> {
  if (through === 0) return;
  for await (const stored of bus.read("EVENTS", `tenant.${tenant}.*.*.event`, 1, through)) {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "actor") yield { message: decodeJournal(stored.data, parsed.actor), sequence: stored.sequence };
  }
}

/** Tenants that the stream knows, up to what is projected. */
async function tenantsOf(bus: Bus, through: number): Promise<string[]> {
  if (through === 0) return [];
  const tenants = new Set<string>();
  for (const { subject, sequence } of await bus.last_of_each("EVENTS", "tenant.*.*.*.event")) {
    const parsed = parseActorSubject(subject);
    if (parsed.kind === "actor" && sequence > 0) tenants.add(parsed.actor.tenant);
  }
  return [...tenants];
}

async function* rowsOf(context: Context, file: string): AsyncGenerator<ChainedRow> {
  const { stdin, working_directory } = context.ports;
  const input = file === "-" ? stdin : createReadStream(isAbsolute(file) ? file : join(working_directory, file));
  let number = 0;
  for await (const line of createInterface({ input })) {
    number += 1;
    if (line.trim() === "") continue;
    let row: ChainedRow;
    try {
      row = JSON.parse(line) as ChainedRow;
    } catch (error) {
      throw new TroupeError(errorBody("invalid", `line ${number} is not JSON`), { cause: error });
    }
    if (row === null || typeof row !== "object" || typeof row.chain !== "string" || typeof row.tenant !== "string" || typeof row.at !== "string")
      throw new TroupeError(errorBody("invalid", `line ${number} is no row of an export`));
    yield row;
  }
}

/** The chain of one tenant, or of each there is, as the database has it, held against the stream. */
export async function verifyChains(
  context: Context,
  { tenant, stream }: { tenant?: string; stream: boolean },
  report: (finding: AuditFinding) => void,
): Promise<AuditReport[]> {
  const reports: AuditReport[] = [];
  const queries = await context.queries();
  const through = (await queries.positions()).find((row) => row.name === PROJECTION_NAME)?.position ?? 0;
  const bus = stream ? await context.bus() : undefined;
  // A tenant all of whose rows and head were taken out is known to the stream alone.
  const tenants = tenant === undefined ? new Set([...(await queries.audit_tenants()), ...(bus === undefined ? [] : await tenantsOf(bus, through))]) : [tenant];
  for (const one of [...tenants].sort()) {
    // What is compared is what was there at one moment; the projection goes on meanwhile.
    const { position, head, beyond } = await queries.audit_end(one);
    const journal = bus === undefined ? null : journalOf(bus, one, position);
    reports.push(await verifyAudit({ tenant: one, rows: queries.audit_chain(one, position), head, beyond, journal, report }));
  }
  return reports;
}

export async function auditVerify(context: Context, { tenant, file, stream }: AuditVerifyOptions): Promise<number> {
  const { printer } = context;
  const report = (finding: AuditFinding): void => {
    if (printer.json) printer.json_line({ finding });
    else
      printer.line(
        `${printer.style("red", finding.fault)}  ${plain(finding.tenant)}  ${printer.style("dim", `stream ${finding.stream_sequence}/${finding.entry_index}`)}  ${plain(finding.what)}`,
      );
  };
  let reports: AuditReport[];
  if (file !== undefined) {
    if (tenant === undefined)
      throw new TroupeError(errorBody("invalid", "an export is verified for the --tenant it is of: its chain begins with the tenant's name"));
    reports = [await verifyAudit({ tenant, rows: rowsOf(context, file), head: null, journal: null, report })];
  } else reports = await verifyChains(context, { stream, ...(tenant === undefined ? {} : { tenant }) }, report);
  const findings = reports.reduce((sum, one) => sum + one.findings, 0);
  if (printer.json) for (const one of reports) printer.json_line({ report: one });
  else
    for (const one of reports)
      printer.line(
        `${one.tenant}: ${one.rows} rows${one.rows_in_stream === null ? "" : `, ${one.rows_in_stream} in the stream`}, head ${one.head.slice(0, 16)}…: ${
          one.findings === 0 ? printer.style("green", "the chain is whole") : printer.style("red", `${one.findings} findings`)
        }`,
      );
  if (reports.length === 0) printer.note("there is no audit yet");
  return findings === 0 ? EXIT.done : EXIT.refused;
}

export async function auditExport(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  let rows = 0;
  for await (const row of (await context.queries()).audit_chain(tenant)) {
    printer.json_line(row);
    rows += 1;
  }
  printer.note(`${rows} rows of '${tenant}'`);
  return EXIT.done;
}
