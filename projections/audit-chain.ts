// audit-chain: the audit of a tenant as a chain: each row's `chain` is the SHA-256 of the row's before it and of its own text, in the order of
// the stream. So a row that is changed, taken out, put in or moved breaks every one after it; and the chain can be made anew out of the
// stream alone, where nobody who writes to the database can reach it.
//
//   genesis(tenant) ──row 1──▶ chain 1 ──row 2──▶ chain 2 … ──row n──▶ chain n = the head
//
// Pure, but for reading what it is given.
//
// Invariants:
//   H1. Equal rows in equal order give equal chains, whoever computes them: from the journal, from the table, or from an export.
//   H2. Each difference is told once, by its row, where it begins; what follows from it is not told again.
import { hash } from "node:crypto";
import { canonicalJson } from "../protocol/json.ts";
import type { JournalMessage } from "../protocol/journal.ts";
import { actorPath } from "../protocol/ids.ts";
import { timestamp } from "../protocol/world.ts";
import { type AuditRecord, auditRecords, isStorable, storable } from "./rows.ts";
import type { OpenTool } from "./tool-audit.ts";

/** The last row of a tenant's audit, as the projector keeps it. */
export interface AuditHead {
  readonly rows: number;
  readonly stream_sequence: number;
  readonly chain: string;
}

const sha256 = (text: string): string => hash("sha256", text, "hex");

/** Where a tenant's chain begins: another place for each, so that no piece of one fits into another. */
export function genesisOf(tenant: string): string {
  return sha256(`troupe audit 1 ${tenant}`);
}

/** Columns that came later: a row without one has the text, and so the chain, that it had before there was one. */
const LATER = new Set(["principal", "tool", "args_hash", "result_hash", "decision", "duration_ms", "cost_usd_micros", "attempts"]);

/** A row as it will be read back: times in one form, text as Postgres can hold it. */
function canonicalRow(row: AuditRecord): string {
  const rest: Record<string, unknown> = {};
  for (const [column, value] of Object.entries(row)) if (column !== "chain" && (value !== null || !LATER.has(column))) rest[column] = value;
  const at_ms = Date.parse(row.at);
  // What is no time is refused by the table.
  rest["at"] = Number.isNaN(at_ms) ? row.at : timestamp(at_ms);
  const text = canonicalJson(rest);
  return isStorable(text) ? text : canonicalJson(storable(rest));
}

export function chainOf(previous: string, row: AuditRecord): string {
  return sha256(`${previous}\n${canonicalRow(row)}`);
}

export type ChainedRow = AuditRecord & { readonly chain: string };

/** Rows of any tenants in the stream's order, each with its chain; `heads` move on with them. */
export function chained(heads: Map<string, AuditHead>, rows: readonly AuditRecord[]): ChainedRow[] {
  return rows.map((row) => {
    const head = heads.get(row.tenant);
    const chain = chainOf(head?.chain ?? genesisOf(row.tenant), row);
    heads.set(row.tenant, { rows: (head?.rows ?? 0) + 1, stream_sequence: row.stream_sequence, chain });
    return { ...row, chain };
  });
}

// ── verifying ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export type AuditFault = "changed" | "removed" | "inserted" | "chain_broken" | "head_changed";

export interface AuditFinding {
  readonly tenant: string;
  readonly fault: AuditFault;
  /** 0 where it is about the whole. */
  readonly stream_sequence: number;
  readonly entry_index: number;
  readonly what: string;
}

export interface AuditReport {
  readonly tenant: string;
  /** In the table. */
  readonly rows: number;
  /** That the stream asks for; null when the stream was not read. */
  readonly rows_in_stream: number | null;
  readonly head: string;
  readonly findings: number;
}

export interface AuditVerification {
  readonly tenant: string;
  /** In the order of their place: stream_sequence, then entry_index. */
  readonly rows: AsyncIterable<ChainedRow>;
  /** What the projector keeps as the end; undefined when it keeps none. Null when it is not known, as for an export. */
  readonly head: AuditHead | undefined | null;
  /** Rows of the table that stand beyond what is projected, and so beyond `rows`. */
  readonly beyond?: number;
  /** The tenant's journal messages in stream order, as far as they are projected; null leaves the stream out. */
  readonly journal: AsyncIterable<{ readonly message: JournalMessage; readonly sequence: number }> | null;
  report(finding: AuditFinding): void;
}

const isBefore = (one: AuditRecord, other: AuditRecord): boolean =>
  one.stream_sequence < other.stream_sequence || (one.stream_sequence === other.stream_sequence && one.entry_index < other.entry_index);

/** Which columns of two rows differ. */
function differing(one: AuditRecord, other: AuditRecord): string[] {
  const [a, b] = [JSON.parse(canonicalRow(one)) as Record<string, unknown>, JSON.parse(canonicalRow(other)) as Record<string, unknown>];
  return [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((column) => canonicalJson(a[column] ?? null) !== canonicalJson(b[column] ?? null)).sort();
}

async function* rowsOf(journal: NonNullable<AuditVerification["journal"]>): AsyncGenerator<AuditRecord> {
  const calls = new Map<string, readonly OpenTool[]>();
  for await (const { message, sequence } of journal) {
    const actor = actorPath(message.actor);
    const { rows, open } = auditRecords(message, sequence, calls.get(actor) ?? []);
    if (open.length > 0) calls.set(actor, open);
    else calls.delete(actor);
    yield* rows;
  }
}

/**
 * Recomputes a tenant's chain from its rows and from its journal, and holds rows, chain and head against each other.
 *
 * Promises: finds any row that was changed, taken out, put in or moved, wherever it stands, also at the end; and a head that was changed.
 * Limits:   without the journal, a table and a head that were rewritten together from some row on look whole; with it nothing does.
 */
export async function verifyAudit({ tenant, rows, head, beyond = 0, journal, report }: AuditVerification): Promise<AuditReport> {
  let findings = 0;
  let count = 0;
  let asked = 0;
  /** By the rows themselves, so that a break is told where it is and not from there on. H2 */
  let previous = genesisOf(tenant);
  let last_sequence = 0;
  /** By the journal. */
  let expected = genesisOf(tenant);
  const found = (fault: AuditFault, row: Pick<AuditRecord, "stream_sequence" | "entry_index">, what: string): void => {
    findings += 1;
    report({ tenant, fault, stream_sequence: row.stream_sequence, entry_index: row.entry_index, what });
  };

  const wanted = journal === null ? undefined : rowsOf(journal);
  let next = wanted === undefined ? undefined : await wanted.next();
  const step = async (): Promise<void> => {
    if (next === undefined || next.done === true || wanted === undefined) return;
    asked += 1;
    expected = chainOf(expected, next.value);
    next = await wanted.next();
  };

  for await (const row of rows) {
    count += 1;
    const self = chainOf(previous, row);
    let told = false;
    let wants: string | undefined;
    while (next !== undefined && next.done !== true && isBefore(next.value, row)) {
      found(
        "removed",
        next.value,
        `the journal of ${next.value.kind}/${next.value.actor} asks for a row of entry seq ${next.value.seq} here, and there is none`,
      );
      told = true;
      await step();
    }
    if (next !== undefined) {
      if (next.done === true || isBefore(row, next.value)) {
        found("inserted", row, `no journal message asks for this row (${row.kind}/${row.actor}, seq ${row.seq})`);
        told = true;
      } else {
        const columns = differing(row, next.value);
        if (columns.length > 0) {
          found("changed", row, `it differs from its journal entry in ${columns.join(", ")}`);
          told = true;
        }
        await step();
        wants = expected;
      }
    }
    // What fits the row before it goes on from a break that was told there; what fits the stream is as it was written.
    if (row.chain !== self && row.chain !== wants && !told)
      found("chain_broken", row, "its chain does not follow from the row before it: a row before it was changed, taken out, put in or moved, or its chain was");
    previous = row.chain;
    last_sequence = row.stream_sequence;
  }
  while (next !== undefined && next.done !== true) {
    found("removed", next.value, `the journal of ${next.value.kind}/${next.value.actor} asks for a row of entry seq ${next.value.seq} here, and there is none`);
    await step();
  }
  if (beyond > 0)
    found("inserted", { stream_sequence: last_sequence, entry_index: 0 }, `${beyond} rows stand beyond what is projected: no journal message asked for them`);
  if (head !== null) {
    const at = { stream_sequence: head?.stream_sequence ?? 0, entry_index: 0 };
    if (head === undefined && count > 0) found("head_changed", at, `there are ${count} rows and no head`);
    if (head !== undefined && head.rows !== count) found("head_changed", at, `the head counts ${head.rows} rows, and there are ${count}`);
    if (head !== undefined && (head.chain !== previous || head.stream_sequence !== last_sequence))
      found(
        "head_changed",
        at,
        `the head stands at stream sequence ${head.stream_sequence} with chain ${head.chain.slice(0, 16)}…, the rows end at ${last_sequence} with ${previous.slice(0, 16)}…`,
      );
  }
  if (journal !== null && findings === 0 && previous !== expected)
    found("chain_broken", { stream_sequence: last_sequence, entry_index: 0 }, "the chain of the rows is not the one that the stream gives");
  return { tenant, rows: count, rows_in_stream: journal === null ? null : asked, head: previous, findings };
}
