// chaos-audit: what must hold when the trouble is over. It reads the whole journal and holds against it what the services, their ears and the
// model provider wrote down.
//
//   1. every acknowledged command stands in its session's journal exactly once, by its key;
//   2. no effect with an outcome was begun again: the provider was asked for no model call whose `done` stood in the journal, and for none
//      oftener than the journal counts attempts;
//   3. every ear was given exactly the journal's events in order, and of every finished model call exactly its text;
//   4. `verify` finds nothing (actors/verify.ts), with the projections where there are any.
import { type AuditView, verifyAll } from "../actors/verify.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import { cores } from "../state-machines/kinds.ts";
import { answerTag, type Ground, type ModelCall, TENANT } from "./chaos-ground.ts";
import type { Load } from "./chaos-load.ts";

export interface AuditReport {
  readonly acknowledged: number;
  readonly lost: readonly string[];
  /** Commands that stand there twice, and effects that were begun again after their outcome. */
  readonly repeated: readonly string[];
  readonly stream_faults: readonly string[];
  readonly violations: readonly string[];
  readonly model_calls: number;
  /** Calls that were made again because their worker was lost: paid twice, which is what a crash costs. */
  readonly model_calls_again: number;
  readonly ears: number;
  /** Ears that heard the journal to its end. */
  readonly ears_whole: number;
  readonly sessions: number;
  readonly messages: number;
}

interface Finished {
  readonly tag: string;
  readonly step: number;
  readonly turn: number;
  readonly text: string;
  readonly stored_at_ms: number;
  readonly calls_allowed: number;
}

interface SessionJournal {
  /** key → how often it was decided as something done. */
  readonly commands: Map<string, number>;
  readonly refused: Map<string, number>;
  /** `{seq} {type}`, in order. */
  readonly events: string[];
  readonly finished: Finished[];
  /** inst → claims that named it lost. */
  readonly lost: Map<string, number>;
  turn: number;
  step: number;
}

/** The clocks of broker and provider are one machine's; requests leave a moment before they arrive. */
const CLOCK_SLACK_MS = 2;

export async function auditLoad(ground: Ground, load: Load, options: { readonly audit?: AuditView } = {}): Promise<AuditReport> {
  const sessions = await readJournals(ground);
  const lost: string[] = [];
  const repeated: string[] = [];
  const stream_faults: string[] = [];
  for (const { session, key, way, decided } of load.acknowledged) {
    const journal = sessions.get(session);
    const done = journal?.commands.get(key) ?? 0;
    const refused = journal?.refused.get(key) ?? 0;
    if (done + refused === 0) lost.push(`${session}: ${key} (${way}) was ${decided ? "decided" : "stored"} and is not in the journal`);
    else if (done > 1) repeated.push(`${session}: ${key} (${way}) stands in the journal ${done} times`);
    else if (done === 0) lost.push(`${session}: ${key} (${way}) was acknowledged and then refused`);
  }

  const calls = new Map<string, ModelCall[]>();
  for (const call of ground.calls) calls.set(answerTag(call.tag, call.step), [...(calls.get(answerTag(call.tag, call.step)) ?? []), call]);
  let model_calls_again = 0;
  for (const [session, { finished }] of sessions) {
    for (const { tag, step, stored_at_ms, calls_allowed } of finished) {
      const made = calls.get(answerTag(tag, step)) ?? [];
      model_calls_again += Math.max(0, made.length - 1);
      const late = made.filter(({ at_wall_ms }) => at_wall_ms > stored_at_ms + CLOCK_SLACK_MS);
      if (late.length > 0) repeated.push(`${session}: the model was asked for ${answerTag(tag, step)} ${late.length} times after its answer was journaled`);
      if (made.length > calls_allowed)
        repeated.push(`${session}: the model was asked ${made.length} times for ${answerTag(tag, step)}, the journal counts ${calls_allowed}`);
    }
  }

  let ears_whole = 0;
  for (const { session, events, texts, faults } of load.ears) {
    stream_faults.push(...faults);
    const journal = sessions.get(session);
    if (journal === undefined) {
      if (events.length > 0) stream_faults.push(`${session}: an ear heard events of a session without a journal`);
      continue;
    }
    // An ear may have been closed before the very last events; what it was given must be the journal's beginning.
    const at = events.findIndex((event, index) => event !== journal.events[index]);
    if (at >= 0) stream_faults.push(`${session}: event ${at} was '${events[at]}', the journal says '${journal.events[at]}'`);
    if (events.length !== journal.events.length) continue;
    ears_whole += 1;
    for (const { turn, step, text } of journal.finished) {
      const heard = texts.get(`${turn}.${step}`);
      if (heard !== text) stream_faults.push(`${session}: of turn ${turn} step ${step} ${heard?.length ?? 0} of ${text.length} characters were heard`);
    }
  }

  const violations: string[] = [];
  const report = await verifyAll({
    bus: ground.bus,
    cores,
    ...(options.audit === undefined ? {} : { audit: options.audit }),
    report: ({ invariant, actor, stream_sequence, what }) => void violations.push(`${invariant} ${actor} at ${stream_sequence}: ${what}`),
  });
  return {
    acknowledged: load.acknowledged.length,
    lost,
    repeated,
    stream_faults,
    violations,
    model_calls: ground.calls.length,
    model_calls_again,
    ears: load.ears.length,
    ears_whole,
    sessions: sessions.size,
    messages: report.messages,
  };
}

async function readJournals(ground: Ground): Promise<Map<string, SessionJournal>> {
  const sessions = new Map<string, SessionJournal>();
  for await (const stored of ground.bus.read("EVENTS", `tenant.${TENANT}.session.*.event`, 1)) {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "malformed") continue;
    const message = decodeJournal(stored.data, parsed.actor);
    let journal = sessions.get(parsed.actor.id);
    if (journal === undefined) {
      journal = { commands: new Map(), refused: new Map(), events: [], finished: [], lost: new Map(), turn: 0, step: 0 };
      sessions.set(parsed.actor.id, journal);
    }
    for (const event of message.events) {
      journal.events.push(`${message.seq} ${event.type}`);
    }
    const ends = message.events.filter(({ type }) => type === "model.completed");
    for (const entry of message.entries) {
      if ((entry.t === "init" || entry.t === "command") && entry.key !== undefined) journal.commands.set(entry.key, (journal.commands.get(entry.key) ?? 0) + 1);
      else if (entry.t === "refused" && entry.key !== undefined) journal.refused.set(entry.key, (journal.refused.get(entry.key) ?? 0) + 1);
      else if (entry.t === "claim") for (const inst of entry.lost) journal.lost.set(inst, (journal.lost.get(inst) ?? 0) + 1);
      else if (entry.t === "done" && entry.inst.endsWith(":model")) {
        const output = entry.output as JsonObject;
        const text = String(output["text"]);
        const [, tag, step] = /^\[(.*)\/(\d+)\]/.exec(text) ?? [];
        const end = ends.shift();
        if (tag === undefined || end === undefined) continue;
        const tries = (output["attempts"] as readonly unknown[] | undefined)?.length ?? 1;
        journal.finished.push({
          tag,
          step: Number(step),
          turn: Number(end["turn"]),
          text,
          stored_at_ms: stored.stored_at_ms,
          calls_allowed: tries + (journal.lost.get(entry.inst) ?? 0),
        });
      }
    }
  }
  return sessions;
}
