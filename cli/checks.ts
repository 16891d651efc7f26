// checks: replay, verify and machines: what the streams hold, held against the machines.
import { mkdir, writeFile } from "node:fs/promises";
import { isAbsolute, join } from "node:path";
import { createInterface } from "node:readline";
import { type ActorFilter, INVARIANTS, verifyAll, type Violation } from "../actors/verify.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { cores, definitions } from "../state-machines/kinds.ts";
import { verifyChains } from "./audit.ts";
import { createAuditView } from "./audit-view.ts";
import { type Context, Unreachable } from "./context.ts";
import { contextSummary, coreFor } from "./look.ts";
import { EXIT } from "./ports.ts";
import { plain } from "./printer.ts";
import { entryWords, replay, type ReplayLine } from "./replay.ts";

// ── replay ─────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface ReplayCommandOptions {
  readonly to?: number;
  readonly step?: boolean;
  readonly fromSnapshot?: boolean;
}

export async function replayCommand(context: Context, { to, step, fromSnapshot }: ReplayCommandOptions, actor: ActorAddress): Promise<number> {
  const { printer, ports } = context;
  const core = coreFor(actor.kind);
  if (core === undefined) throw new TroupeError(errorBody("not_found", `there is no machine for the kind '${actor.kind}' in this program`));
  const keyboard = step && printer.terminal && ports.stdin.isTTY === true && !printer.json ? createInterface({ input: ports.stdin }) : undefined;
  const lines = keyboard?.[Symbol.asyncIterator]();
  const print = ({ seq, at, worker, epoch, entry, state, events, out, running, timers, stream_sequence }: ReplayLine, whole: JsonObject): void => {
    if (printer.json) {
      printer.json_line({ seq, at, worker, epoch, stream_sequence, entry, state, events, out, running, timers, ...(step ? { context: whole } : {}) });
      return;
    }
    printer.line(
      `${String(seq).padStart(5)}  ${printer.style("dim", `${at} ${plain(worker)}/${epoch}`)}  ${printer.style("bold", entry.t)} ${plain(entryWords(entry))}`,
    );
    printer.line(
      `       → ${printer.style("green", state)}${running.length === 0 ? "" : `  in flight ${running.join(" ")}`}${timers.length === 0 ? "" : `  timers ${timers.join(" ")}`}`,
    );
    if (!step) return;
    for (const event of events) printer.line(`       ${printer.style("cyan", event.type)} ${plain(JSON.stringify(event)).slice(0, 200)}`);
    for (const message of out) printer.line(`       out ${plain(message.to)} ${plain(message.type)}`);
    printer.pairs(Object.entries(contextSummary(whole)).map(([name, value]) => [`       ${name}`, value]));
  };
  try {
    const outcome = await replay({
      bus: await context.bus(),
      core,
      actor,
      to_seq: to,
      from_snapshot: fromSnapshot === true,
      async on_line(line, state) {
        print(line, state.snapshot.context as JsonObject);
        if (lines === undefined) return "go_on";
        printer.text(printer.style("dim", "       Enter: next, q: end "));
        const answer = await lines.next();
        return answer.done || answer.value.trim() === "q" ? "end" : "go_on";
      },
    });
    switch (outcome.kind) {
      case "absent":
        throw new TroupeError(errorBody("not_found", `${actorPath(actor)} has no journal`));
      case "no_snapshot":
        throw new TroupeError(errorBody("not_found", outcome.reason));
      case "ended":
        return EXIT.done;
      case "broken":
        if (printer.json) printer.json_line({ broken: { stream_sequence: outcome.stream_sequence, what: outcome.what } });
        printer.note(`${printer.style("red", "A5")} at stream sequence ${outcome.stream_sequence}: ${plain(outcome.what)}`);
        return EXIT.refused;
      default:
    }
    const { differences, snapshot, entries, seq } = outcome;
    const proven = snapshot === undefined || snapshot.differs_in.length + snapshot.end_differs_in.length === 0;
    if (printer.json)
      printer.json_line({
        replayed: { actor: actorPath(actor), entries, seq, differences, ...(snapshot === undefined ? {} : { snapshot: { ...snapshot, equal: proven } }) },
      });
    else {
      for (const difference of differences) printer.line(`${printer.style("red", "A5")} ${plain(difference)}`);
      printer.line(`${entries} entries; ${differences.length === 0 ? "the journal says what the replay gives" : `${differences.length} differences`}`);
      if (snapshot !== undefined && proven)
        printer.line(`the snapshot at seq ${snapshot.seq} and the ${snapshot.entries_after} entries after it give the same state`);
      if (snapshot !== undefined && !proven) {
        const where =
          snapshot.differs_in.length > 0
            ? `at seq ${snapshot.seq} in ${snapshot.differs_in.join(", ")}`
            : `at seq ${seq} in ${snapshot.end_differs_in.join(", ")}`;
        printer.line(`${printer.style("red", "A5")} the snapshot differs from the replay ${where}`);
      }
    }
    return differences.length === 0 && proven ? EXIT.done : EXIT.refused;
  } finally {
    keyboard?.close();
  }
}

// ── verify ─────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface VerifyCommandOptions {
  readonly projections: boolean;
  readonly passes: number;
}

export async function verifyCommand(context: Context, { projections, passes }: VerifyCommandOptions, filter: ActorFilter | undefined): Promise<number> {
  const { printer } = context;
  const bus = await context.bus();
  let audit: ReturnType<typeof createAuditView> | undefined;
  let unchecked: string | undefined = projections ? undefined : "not asked for";
  if (projections) {
    try {
      const queries = await context.queries();
      await queries.positions();
      audit = createAuditView(queries);
    } catch (error) {
      if (!(error instanceof Unreachable) && !(error instanceof TroupeError)) throw error;
      unchecked = error.message;
    }
  }
  const counts = new Map<string, number>();
  const told = (violation: Violation): void => {
    counts.set(violation.invariant, (counts.get(violation.invariant) ?? 0) + 1);
    if (printer.json) printer.json_line({ violation });
    else
      printer.line(
        `${printer.style("red", violation.invariant)}  ${plain(violation.actor)}  ${printer.style("dim", `seq ${violation.seq ?? "–"}, stream ${violation.stream_sequence}`)}  ${plain(violation.what)}`,
      );
  };
  const journals = await verifyAll({
    bus,
    cores,
    passes,
    ...(filter === undefined ? {} : { filter }),
    ...(audit === undefined ? {} : { audit }),
    report: told,
  });
  // The rows of single actors were compared above; the chain is the tenant's, and shows also what stands where no journal asks for it.
  const chains =
    audit === undefined || filter?.kind !== undefined
      ? []
      : await verifyChains(context, { stream: true, ...(filter?.tenant === undefined ? {} : { tenant: filter.tenant }) }, (finding) =>
          told({
            invariant: "P1",
            actor: finding.tenant,
            stream_sequence: finding.stream_sequence,
            seq: null,
            what: `the audit's chain, ${finding.fault}: ${finding.what}`,
          }),
        );
  const report = { ...journals, audit_chains: chains.length, violations: journals.violations + chains.reduce((sum, { findings }) => sum + findings, 0) };
  if (printer.json) printer.json_line({ report: { ...report, projections: unchecked === undefined ? "checked" : `not checked: ${unchecked}` } });
  else {
    for (const [invariant, count] of counts) printer.line(`${invariant}: ${count} × not kept: ${INVARIANTS[invariant as keyof typeof INVARIANTS]}`);
    printer.line(
      `${report.actors} actors, ${report.messages} messages, ${report.entries} entries, ${report.snapshots} snapshots, ${report.audit_rows} audit rows up to stream sequence ${report.through_sequence}: ${
        report.violations === 0 ? printer.style("green", "every promise kept") : printer.style("red", `${report.violations} violations`)
      }`,
    );
  }
  if (unchecked !== undefined) printer.note(`the projections were not checked: ${unchecked}`);
  if (report.violations > 0) return EXIT.refused;
  if (filter?.id !== undefined && report.messages === 0) throw new TroupeError(errorBody("not_found", "there is no such actor: nothing was checked"));
  return unchecked !== undefined && projections ? EXIT.unreachable : EXIT.done;
}

// ── machines ───────────────────────────────────────────────────────────────────────────────────────────────────────

const EXTENSIONS = { svg: "svg", mermaid: "mmd", dot: "dot" } as const;
export interface MachinesOptions {
  readonly format: keyof typeof EXTENSIONS;
  readonly out?: string;
}

export async function machines(context: Context, { format, out }: MachinesOptions, name: string | undefined): Promise<number> {
  const { printer, ports } = context;
  const all = Object.values(definitions);
  const wanted = name === undefined ? all : all.filter((one) => one.kind === name);
  if (wanted.length === 0)
    throw new TroupeError(errorBody("not_found", `there is no machine '${name ?? ""}'; there are ${all.map((one) => one.kind).join(", ")}`));
  if (name === undefined && out === undefined) {
    const rows = all.map((one) => ({
      name: one.kind,
      version: `${one.machine.id}@${one.machine.version ?? "0"}`,
      states: Object.keys(one.machine.states),
      created_by: one.creates,
    }));
    if (printer.json) printer.document({ machines: rows });
    else
      printer.table(
        ["machine", "version", "created by", "states"],
        rows.map((row) => [row.name, row.version, row.created_by, row.states.join(" ")]),
      );
    return EXIT.done;
  }
  // Loaded here: Graphviz is large, and only pictures need it.
  const { toDot, toMermaid, toSvg } = await import("../state-machines/draw.ts");
  const draw = { svg: toSvg, mermaid: toMermaid, dot: toDot }[format];
  const files: string[] = [];
  for (const { kind, machine, creates } of wanted) {
    const drawing = await draw(machine, creates);
    if (out === undefined) {
      if (printer.json) printer.document({ name: kind, format, drawing });
      else printer.text(drawing);
      continue;
    }
    const directory = isAbsolute(out) ? out : join(ports.working_directory, out);
    await mkdir(directory, { recursive: true });
    const file = join(directory, `${kind}.${EXTENSIONS[format]}`);
    await writeFile(file, drawing);
    files.push(file);
  }
  if (out !== undefined && printer.json) printer.document({ files });
  else if (out !== undefined) for (const file of files) printer.line(file);
  return EXIT.done;
}
