// drawn-session: a session's journal and chunks drawn from a generator, as workers could have written them.
import type fc from "fast-check";
import { type ActorEvent, encodeJournal, type Entry, type JournalMessage } from "../../protocol/journal.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { encodeToken, type TokenChunk } from "../../protocol/tokens.ts";

export const SESSION: ActorAddress = { tenant: "acme", kind: "session", id: "s1" };

export type Written = { readonly kind: "journal"; readonly message: JournalMessage } | { readonly kind: "chunk"; readonly chunk: TokenChunk };

export interface DrawnSession {
  /** In the order of writing: a step's chunks stand after its model.started and before its end. */
  readonly written: readonly Written[];
  /** `turn.step` → the text of a step that was completed. */
  readonly texts: ReadonlyMap<string, string>;
  readonly events: readonly ActorEvent[];
}

export interface StepPlan {
  readonly text: string;
  /** Where the text is cut into chunks. */
  readonly cuts: readonly number[];
  /** A reasoning chunk stands before this chunk. */
  readonly reasoning_at: number;
  /** Attempts that are lost to a take-over, each after so many chunks. */
  readonly lost_after: readonly number[];
  readonly ending: "completed" | "failed" | "cancelled";
}
export type SessionPlan = readonly (readonly StepPlan[])[];

export function planOf(f: typeof fc): fc.Arbitrary<SessionPlan> {
  const step = f.record({
    text: f.string({ maxLength: 24, unit: "grapheme" }),
    cuts: f.array(f.nat({ max: 24 }), { maxLength: 6 }),
    reasoning_at: f.integer({ min: -1, max: 3 }),
    lost_after: f.array(f.nat({ max: 4 }), { maxLength: 2 }),
    ending: f.constantFrom("completed" as const, "completed" as const, "completed" as const, "failed" as const, "cancelled" as const),
  });
  return f.array(f.array(step, { minLength: 1, maxLength: 3 }), { minLength: 1, maxLength: 3 });
}

function chunksOf(plan: StepPlan, turn: number, step: number, attempt: number, epoch: number, void_text: boolean): TokenChunk[] {
  // What a lost attempt said is other than what the next one says.
  const text = void_text ? `<void ${attempt}>${plan.text}` : plan.text;
  const places = [...new Set(plan.cuts.filter((cut) => cut > 0 && cut < text.length))].sort((a, b) => a - b);
  const pieces: { text: string; channel?: "reasoning" }[] = [0, ...places].map((from, index) => ({ text: text.slice(from, places[index] ?? text.length) }));
  if (plan.reasoning_at >= 0) pieces.splice(Math.min(plan.reasoning_at, pieces.length), 0, { text: "(thinks)", channel: "reasoning" });
  return pieces.map((piece, index) => ({ turn, step, attempt, epoch, index, ...piece, ...(index === pieces.length - 1 ? { end: true as const } : {}) }));
}

export function drawSession(plan: SessionPlan): DrawnSession {
  const written: Written[] = [];
  const texts = new Map<string, string>();
  const events: ActorEvent[] = [];
  let seq = 0;
  let epoch = 1;

  function commit(entry: Entry, state: string, told: ActorEvent[]): void {
    seq += 1;
    events.push(...told);
    const at = new Date(Date.UTC(2026, 10, 21) + seq).toISOString();
    written.push({
      kind: "journal",
      message: {
        v: 1,
        actor: SESSION,
        seq,
        epoch,
        worker: `w${epoch}`,
        machine: "session@1",
        at,
        entries: [entry],
        state,
        events: told,
        out: [],
        out_confirmed_seq: 0,
      },
    });
  }
  const say = (chunks: readonly TokenChunk[]): void => void written.push(...chunks.map((chunk) => ({ kind: "chunk" as const, chunk })));

  commit({ t: "init", type: "session.create", channel: "command", body: { agent: "assistant" } }, "initializing", [
    { type: "session.created", agent: "assistant" },
  ]);
  commit({ t: "done", inst: "1:configuration", output: {} }, "idle", [{ type: "session.state", from: "initializing", to: "idle" }]);
  plan.forEach((steps, before) => {
    const turn = before + 1;
    const head: ActorEvent[] = [
      { type: "message.received", turn, message_id: `m${turn}` },
      { type: "turn.started", turn, message_id: `m${turn}` },
      { type: "model.started", turn, step: 0, model: "simulated/echo" },
      { type: "session.state", from: "idle", to: "thinking" },
    ];
    commit({ t: "command", type: "message.send", channel: "command", body: { content: "hello" } }, "thinking", head);
    for (const [step, one] of steps.entries()) {
      let attempt = 1;
      for (const lost_after of one.lost_after) {
        say(chunksOf(one, turn, step, attempt, epoch, true).slice(0, lost_after));
        const from = `w${epoch}`;
        epoch += 1;
        commit({ t: "claim", from, reason: "dead", lost: [`${seq}:model`] }, "thinking", [
          { type: "session.claimed", epoch, from, to: `w${epoch}`, reason: "dead" },
          { type: "superseded", turn, step, attempt },
        ]);
        attempt += 1;
      }
      const chunks = chunksOf(one, turn, step, attempt, epoch, false);
      say(one.ending === "completed" ? chunks : chunks.slice(0, Math.ceil(chunks.length / 2)));
      if (one.ending === "completed") {
        texts.set(`${turn}.${step}`, one.text);
        const last = step === steps.length - 1;
        const completed: ActorEvent = { type: "model.completed", turn, step, model: "simulated/echo", attempt };
        const output = { text: one.text, tool_calls: [], stop: "end" };
        if (last) {
          commit({ t: "done", inst: `${seq}:model`, output }, "idle", [
            completed,
            { type: "message.completed", turn, step, message_id: `m${seq}`, role: "assistant", content: one.text },
            { type: "turn.completed", turn, message_id: `m${seq}` },
            { type: "session.state", from: "thinking", to: "idle" },
          ]);
        } else {
          commit({ t: "done", inst: `${seq}:model`, output }, "acting", [completed, { type: "tool.started", turn, step, index: 0, call_id: "c", name: "t" }]);
          commit({ t: "done", inst: `${seq}:tool.0`, output: { text: "ok", is_error: false } }, "thinking", [
            { type: "tool.completed", turn, step, index: 0, call_id: "c", name: "t" },
            { type: "model.started", turn, step: step + 1, model: "simulated/echo" },
          ]);
        }
        continue;
      }
      if (one.ending === "failed")
        commit({ t: "fail", inst: `${seq}:model`, error: { code: "timeout", message: "late" } }, "idle", [
          { type: "model.failed", turn, step, model: "simulated/echo", attempt, code: "timeout", message: "late" },
          { type: "turn.failed", turn, reason: "timeout", message: "late" },
        ]);
      else commit({ t: "command", type: "turn.cancel", channel: "command", body: {} }, "idle", [{ type: "turn.cancelled", turn, reason: "cancelled" }]);
      return;
    }
  });
  return { written, texts, events };
}

export const encodeWritten = (one: Written): Uint8Array => (one.kind === "journal" ? encodeJournal(one.message) : encodeToken(one.chunk));
