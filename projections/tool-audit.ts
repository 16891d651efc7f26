// tool-audit: what the audit says of each tool that a model called: a row of the intent, from the commit that let the call begin (or answered it
// without one), and a row of the outcome, from the commit that ended it. The effect begins only after its commit, so a worker that dies in
// mid-call leaves the intent behind; whoever takes the session over writes how it ended.
//
//   model's answer calls a tool ──▶ tool.intent {tool, args_hash, decision}
//        │  claims: attempts + 1
//        └──▶ tool.outcome {result_hash, decision, code, duration_ms, cost_usd_micros, attempts}
//
// Pure: (calls in flight, message) → rows and calls in flight; `audit verify` makes the same rows out of the stream alone.
//
// Invariants:
//   T1. Each call of a tool has one row of intent, in the stream before its row of outcome, and at most one row of outcome. Both bear the call's
//       inst; the intents that were `allowed` are the tool effects, one each.
//   T2. `decision` is the session's at first (what it froze), and in the outcome the gate's too (actors/permission.ts): `denied` where it refused.
//   T3. Of arguments and results there are hashes alone, and of a name that no tool has only one that looks like a name.
import { entrySeq, type Entry, type JournalMessage } from "../protocol/journal.ts";
import { hashOf, type Json, type JsonObject } from "../protocol/json.ts";

export type ToolDecision = "allowed" | "denied" | "unknown";

/** A call that has not ended, kept in the session's row until it does. */
export interface OpenTool {
  readonly inst: string;
  readonly turn: number;
  readonly step: number;
  readonly index: number;
  readonly tool: string;
  readonly args_hash: string;
  readonly decision: ToolDecision;
  readonly attempts: number;
  readonly started_at: string;
}

/** What a row says of a tool; the rest of it says where and when, as of any row. */
export interface ToolRow {
  readonly entry_type: "tool.intent" | "tool.outcome";
  /** The message's entry that began or ended the call. */
  readonly entry_index: number;
  readonly inst: string;
  readonly code: string | null;
  readonly tool: string;
  readonly args_hash: string;
  /** Of what came back, or of the error; null where nothing came back. */
  readonly result_hash: string | null;
  readonly decision: ToolDecision;
  readonly duration_ms: number | null;
  /** Null where nobody said. */
  readonly cost_usd_micros: number | null;
  readonly attempts: number | null;
}

const TOOL_EVENTS = new Set(["tool.started", "tool.completed", "tool.failed", "tool.denied"]);
const TOOL_NAME = /^[A-Za-z0-9_.-]{1,64}$/;
const MODEL_INST = /^\d+:model$/;

const objectOf = (value: Json | undefined): JsonObject | undefined =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? (value as JsonObject) : undefined;
const wholeOf = (value: Json | undefined): number | null => (typeof value === "number" && Number.isSafeInteger(value) && value >= 0 ? value : null);

interface Called {
  readonly turn: number;
  readonly step: number;
  readonly index: number;
}
const calledIn = (event: JsonObject): Called => ({ turn: Number(event["turn"]), step: Number(event["step"]), index: Number(event["index"]) });
const isSame = (one: Called, other: Called): boolean => one.turn === other.turn && one.step === other.step && one.index === other.index;

/** The entry whose output made the call, and the call as the model wrote it. */
function callOf(message: JournalMessage, event: JsonObject): { readonly entry_index: number; readonly call: JsonObject } {
  for (const [entry_index, entry] of message.entries.entries()) {
    if (entry.t !== "done" || !MODEL_INST.test(entry.inst)) continue;
    const calls = objectOf(entry.output)?.["tool_calls"];
    const call = Array.isArray(calls) ? objectOf(calls[Number(event["index"])] as Json) : undefined;
    if (call !== undefined && call["id"] === event["call_id"]) return { entry_index, call };
  }
  throw new Error("a tool is called by a model's answer in the same commit");
}

const codeOf = (event: JsonObject): string | null => (typeof event["code"] === "string" ? event["code"] : null);

/** The entry by which a call ended, if it was its own: a result may also come too late, in the very commit that gave it up. */
function resultOf(message: JournalMessage, event: JsonObject, inst: string): { readonly entry_index: number; readonly entry: Entry } | undefined {
  const code = codeOf(event);
  const entry_index = message.entries.findIndex((entry) => {
    if (entry.t === "done") return entry.inst === inst && (code === null || code === "tool_error");
    return entry.t === "fail" && entry.inst === inst && entry.error.code === code;
  });
  const entry = message.entries[entry_index];
  return entry === undefined ? undefined : { entry_index, entry };
}

const decisionOf = (event: JsonObject): ToolDecision => (event["type"] === "tool.started" ? "allowed" : event["type"] === "tool.denied" ? "denied" : "unknown");

function outcomeOf(message: JournalMessage, event: JsonObject, open: OpenTool): ToolRow {
  const { inst, tool, args_hash, attempts, started_at } = open;
  const ended = resultOf(message, event, inst);
  const claim = message.entries.findIndex((entry) => entry.t === "claim");
  const told = ended?.entry.t === "done" ? objectOf(ended.entry.output) : ended?.entry.t === "fail" ? ended.entry.error.details : undefined;
  const result = ended?.entry.t === "done" ? ended.entry.output : ended?.entry.t === "fail" ? ended.entry.error : undefined;
  const by = ended?.entry_index ?? (codeOf(event) === "ambiguous" && claim >= 0 ? claim : message.entries.length - 1);
  return {
    entry_type: "tool.outcome",
    entry_index: by,
    inst,
    code: codeOf(event),
    tool,
    args_hash,
    result_hash: result === undefined ? null : hashOf(result),
    decision: event["type"] === "tool.denied" ? "denied" : open.decision, // T2
    duration_ms: Math.max(0, Date.parse(message.at) - Date.parse(started_at)),
    cost_usd_micros: wholeOf(told?.["cost_usd_micros"]),
    attempts,
  };
}

/** The rows that a session's message makes, in the order of what happened, and the calls that are in flight after it. T1 */
export function toolRows(open: readonly OpenTool[], message: JournalMessage): { readonly rows: readonly ToolRow[]; readonly open: readonly OpenTool[] } {
  if (message.actor.kind !== "session") return { rows: [], open: [] };
  const events = message.events.filter(({ type }) => TOOL_EVENTS.has(type));
  const lost = message.entries.flatMap((entry) => (entry.t === "claim" ? entry.lost : []));
  let left = open;
  const rows: ToolRow[] = [];
  for (const event of events) {
    let known = left.find((one) => isSame(one, calledIn(event)));
    if (known === undefined) {
      const { entry_index, call } = callOf(message, event);
      const decision = decisionOf(event);
      const name = String(event["name"]);
      known = {
        inst: `${entrySeq(message, entry_index)}:tool.${Number(event["index"])}`,
        ...calledIn(event),
        tool: decision !== "unknown" || TOOL_NAME.test(name) ? name : "?", // T3
        args_hash: hashOf(call["args"] ?? null),
        decision,
        attempts: decision === "allowed" ? 1 : 0,
        started_at: message.at,
      };
      const { inst, tool, args_hash } = known;
      rows.push({
        entry_type: "tool.intent",
        entry_index,
        inst,
        code: null,
        tool,
        args_hash,
        result_hash: null,
        decision,
        duration_ms: null,
        cost_usd_micros: null,
        attempts: null,
      });
      if (event.type === "tool.started") {
        left = [...left, known];
        continue;
      }
    }
    const { inst } = known;
    rows.push(outcomeOf(message, event, known));
    left = left.filter((one) => one.inst !== inst);
  }
  // What a claim lost and nobody ended begins again.
  return { rows, open: left.map((one) => (lost.includes(one.inst) ? { ...one, attempts: one.attempts + 1 } : one)) };
}
