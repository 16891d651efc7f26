// rows: Goal: what one journal message means for the tables, without a database. Method: messages as the machines write them, projected in one batch.
import { expect, test } from "vitest";
import { emptyBatch, projectMessage } from "../../projections/rows.ts";
import type { ActorEvent, Entry, JournalMessage } from "../../protocol/journal.ts";

const message = (seq: number, entries: readonly Entry[], events: readonly object[]): JournalMessage => ({
  v: 1,
  actor: { tenant: "acme", kind: "session", id: "s1" },
  seq,
  epoch: 1,
  worker: "w1",
  machine: "session@1",
  at: "2026-01-01T00:00:00.000Z",
  state: "idle",
  entries,
  events: events as readonly ActorEvent[],
  out: [],
  out_confirmed_seq: 0,
});
const command = (type: string): Entry => ({ t: "command", type, body: {}, channel: "command" });

test("R3: a call that a commit begins and calls off is its own row, beside that of the call which ended in it", () => {
  const started = (step: number, inst: string): object => ({ type: "model.started", turn: 1, step, attempt: 1, model: "simulated/echo", inst });
  const batch = emptyBatch();
  projectMessage(batch, message(1, [{ t: "init", type: "session.create", body: { agent: "a" }, channel: "command" }], []), 1);
  projectMessage(batch, message(2, [command("message.send")], [{ type: "turn.started", turn: 1 }, started(0, "2:model")]), 2);
  const completed = { type: "model.completed", turn: 1, step: 0, attempt: 1, model: "simulated/echo" };
  const failed = { type: "model.failed", turn: 1, step: 1, attempt: 1, model: "simulated/echo", code: "cancelled" };
  const output = { text: "", attempts: [{ model: "simulated/echo", outcome: "completed", cost_usd_micros: 5 }] };
  const ended = message(4, [{ t: "done", inst: "2:model", output }, command("turn.cancel")], [completed, started(1, "3:model"), failed]);
  projectMessage(batch, ended, 3);
  expect(batch.usage.map(({ inst, step, outcome, cost_usd_micros }) => [inst, step, outcome, cost_usd_micros])).toEqual([
    ["2:model", 0, "completed", 5],
    ["3:model", 1, "cancelled", null],
  ]);
});
