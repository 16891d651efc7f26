// look: show: one actor as its journal has it now: what it does, why it waits, who owns it, what happened last.
import type { ActorAddress } from "../protocol/ids.ts";
import { actorPath } from "../protocol/ids.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { decodeJournal, type Entry, entrySeq } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { timestamp } from "../protocol/world.ts";
import type { ActorDefinition } from "../state-machines/definition.ts";
import { tableSize } from "../state-machines/budget-table.ts";
import { cores } from "../state-machines/kinds.ts";
import { type Core, viewOf } from "../state-machines/step.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { ago } from "./printer.ts";
import { entryWords } from "./replay.ts";

/** The core of a kind, or undefined for a kind that this program has no machine for. */
export const coreFor = (kind: ActorAddress["kind"]): Core | undefined => (cores as Readonly<Partial<Record<string, Core>>>)[kind];

export interface ShownEntry {
  readonly seq: number;
  readonly at: string;
  readonly worker: string;
  readonly epoch: number;
  readonly entry: Entry;
}

/** What a person asks of a context: single values as they are, of lists and tables only how many. */
export function contextSummary(context: JsonObject): Readonly<Record<string, Json>> {
  const summary: Record<string, Json> = {};
  for (const [name, value] of Object.entries(context)) {
    if (name === "now" || value === null) continue;
    if (Array.isArray(value)) {
      const rows = tableSize(value);
      summary[name] = rows === undefined ? `${value.length} items` : `${rows} rows`;
    } else if (typeof value === "object") {
      const fields = Object.entries(value as JsonObject);
      const flat =
        fields.length <= 12 && fields.every(([, field]) => field === null || typeof field !== "object" || (Array.isArray(field) && field.length <= 8));
      if (fields.length > 0) summary[name] = flat ? value : `${fields.length} entries`;
    } else if (value !== "") {
      const isTime = name.endsWith("_at_ms") && typeof value === "number";
      summary[isTime ? name.slice(0, -3) : name] = isTime ? timestamp(value) : value;
    }
  }
  return summary;
}

async function lastEntries(context: Context, actor: ActorAddress, count: number): Promise<ShownEntry[]> {
  const entries: ShownEntry[] = [];
  if (count === 0) return entries;
  for await (const stored of (await context.bus()).read("EVENTS", actorSubject(actor, "event"), 1)) {
    const message = decodeJournal(stored.data, actor);
    message.entries.forEach((entry, index) =>
      entries.push({ seq: entrySeq(message, index), at: message.at, worker: message.worker, epoch: message.epoch, entry }),
    );
    if (entries.length > count) entries.splice(0, entries.length - count);
  }
  return entries;
}

export async function show(context: Context, { entries: count }: { entries: number }, actor: ActorAddress): Promise<number> {
  const { printer, ports } = context;
  const core = coreFor(actor.kind);
  if (core === undefined) throw new TroupeError(errorBody("not_found", `there is no machine for the kind '${actor.kind}' in this program`));
  const restored = await (await context.restorer()).restore(actor);
  if (restored === undefined) throw new TroupeError(errorBody("not_found", `${actorPath(actor)} was never created`));
  const { state, last } = restored;
  const view = viewOf(state);
  const definition: ActorDefinition = core.definition;
  const running = Object.values(state.running);
  const timers = Object.values(state.timers).sort((a, b) => a.due_ms - b.due_ms);
  const last_entries = await lastEntries(context, actor, count);
  const now_ms = ports.world.now_ms();
  if (printer.json) {
    printer.document({
      actor: actorPath(actor),
      state: view.state,
      final: view.final,
      wait_reason: definition.waits(view, now_ms) ?? null,
      waits_for: definition.waitsFor?.(view, now_ms) ?? null,
      seq: state.seq,
      at: last.at,
      epoch: last.epoch,
      worker: last.worker,
      machine: core.machine_name,
      last_sequence: restored.last_sequence,
      snapshot_seq: restored.snapshot_seq,
      running,
      timers: timers.map(({ inst, due_ms, event }) => ({ inst, due: timestamp(due_ms), event: event.type })),
      held: last.held,
      context: state.snapshot.context as JsonObject,
      last_entries,
    });
    return EXIT.done;
  }
  printer.line(printer.style("bold", actorPath(actor)));
  printer.pairs([
    ["state", view.final ? `${view.state} (finished)` : view.state],
    ["why", view.final ? "it is finished" : (definition.waits(view, now_ms) ?? "it works")],
    ["owner", `${last.worker}, epoch ${last.epoch}`],
    [
      "journal",
      `seq ${state.seq}, ${last.at} (${ago(now_ms - Date.parse(last.at))} ago), ${core.machine_name}, snapshot at ${restored.snapshot_seq === 0 ? "none" : restored.snapshot_seq}`,
    ],
    ...Object.entries(contextSummary(view.context)),
  ]);
  if (running.length > 0) {
    printer.line(`\n${printer.style("bold", "in flight")}`);
    printer.table(
      ["effect", "kind", "attempt", "input"],
      running.map((one) => [one.inst, one.src, one.attempt, JSON.stringify(one.input).slice(0, 100)]),
    );
  }
  if (timers.length > 0) {
    printer.line(`\n${printer.style("bold", "timers")}`);
    printer.table(
      ["timer", "due", "in"],
      timers.map((timer) => [timer.inst, timestamp(timer.due_ms), timer.due_ms <= now_ms ? "due" : ago(timer.due_ms - now_ms)]),
    );
  }
  if (last_entries.length > 0) {
    printer.line(`\n${printer.style("bold", "last entries")}`);
    printer.table(
      ["seq", "at", "worker", "entry", "what"],
      last_entries.map((one) => [one.seq, one.at, one.worker, one.entry.t, entryWords(one.entry)]),
    );
  }
  return EXIT.done;
}
