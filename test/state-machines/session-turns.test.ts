// Goal:   every message has its turn in its order, and every turn one end (SE1, SE8): also one that is interrupted, cancelled or blocked.
// Method: short stories, each step through drive.ts, which repeats it on the state loaded from its snapshot.
import { describe, expect, test } from "vitest";
import type { Json } from "../../protocol/json.ts";
import { SESSION_QUEUE_MAX } from "../../protocol/limits.ts";
import type { TranscriptItem } from "../../state-machines/session-transcript.ts";
import { acting, answer, expectInvariants, idle, observed, thinking } from "./session-drive.ts";

describe("messages while busy", () => {
  test("wait for their turn in order, each with its number", () => {
    const drive = thinking({}, { user: "u7" });
    expect(drive.send("two")).toEqual({ message_id: "m4", turn: 2 });
    expect(drive.told).toEqual([{ type: "message.received", turn: 2, message_id: "m4", user: "u7" }]);
    drive.send("three");
    drive.done("model", answer("one"));
    expect(drive.told.slice(-2)).toMatchObject([
      { type: "turn.started", turn: 2, message_id: "m4" },
      { type: "model.started", turn: 2, step: 0, model: "simulated/echo" },
    ]);
    drive.done("model", answer("two")).done("model", answer("three"));
    expect([drive.at, drive.count("turn.completed")]).toEqual(["idle", 3]);
  });

  test("are refused as overloaded when too many wait, and an interrupting one is not", () => {
    const drive = thinking();
    for (let waiting = 0; waiting < SESSION_QUEUE_MAX; waiting++) drive.send();
    expect(drive.refusal("message.send", { content: "x" })).toMatchObject({ code: "overloaded", details: { queue_max: SESSION_QUEUE_MAX } });
    drive.send("now", { on_busy: "interrupt" });
    expect(drive.context.queue).toHaveLength(SESSION_QUEUE_MAX);
    expectInvariants(drive);
    const pausing = acting();
    for (let waiting = 0; waiting < SESSION_QUEUE_MAX; waiting++) pausing.send();
    pausing.tell("session.pause");
    expect(pausing.refusal("message.send", { content: "x", on_busy: "interrupt" })).toMatchObject({ code: "overloaded" });
  });

  test("that interrupt end the running turn and go before those that wait", () => {
    const drive = thinking();
    drive.send("waits");
    drive.send("now!", { on_busy: "interrupt" });
    expect(drive.told).toMatchObject([
      { type: "message.received", turn: 3, message_id: "m5" },
      { type: "model.failed", turn: 1, step: 0, attempt: 1, code: "cancelled", usage: null },
      { type: "turn.cancelled", turn: 1, reason: "interrupted" },
      { type: "turn.started", turn: 3, message_id: "m5" },
      { type: "model.started", turn: 3, step: 0 },
    ]);
    expect(drive.running).toEqual(["model"]);
    expect(drive.instOf("model")).toBe("5:model");
    drive.done("model", answer("three"));
    expect(drive.told.slice(-2)).toMatchObject([{ type: "turn.started", turn: 2 }, {}]);
    expectInvariants(drive);
  });

  test("that interrupt tools leave a prompt in which every call is answered", () => {
    const drive = acting();
    drive.done("tool.1", observed);
    drive.send("stop that", { on_busy: "interrupt" });
    expect(drive.types).toEqual(["message.received", "tool.failed", "turn.cancelled", "turn.started", "model.started", "session.state"]);
    expect(drive.prompt).toMatchObject([
      { role: "user" },
      { role: "assistant" },
      { role: "tool", call_id: "call-0", failed: { code: "cancelled" } },
      { role: "tool", call_id: "call-1", at: 5 },
      { role: "user" },
    ]);
    expectInvariants(drive);
  });
});

describe("turn.cancel", () => {
  test("ends a call in flight, whose result is then stale", () => {
    const drive = thinking();
    const inst = drive.instOf("model");
    drive.tell("turn.cancel", { reason: "changed my mind" });
    expect(drive.told).toMatchObject([
      { type: "model.failed", code: "cancelled", usage: null, cost_usd_micros: null },
      { type: "turn.cancelled", turn: 1, reason: "changed my mind" },
      { type: "session.state", from: "thinking", to: "idle" },
    ]);
    const before = drive.context;
    const entry = { t: "done", inst, output: answer("too late") as unknown as Json } as const;
    expect(drive.core.awaits(drive.state, entry)).toBe(false);
    drive.apply(entry);
    expect([drive.told, drive.context]).toEqual([[], before]);
  });

  test("goes on with the next message that waits", () => {
    const drive = acting();
    drive.send("next");
    drive.tell("turn.cancel");
    expect(drive.types).toEqual(["tool.failed", "tool.failed", "turn.cancelled", "turn.started", "model.started", "session.state"]);
    expectInvariants(drive);
  });

  test("names the attempt that was in flight", () => {
    const drive = thinking().claim().claim();
    drive.tell("turn.cancel");
    expect(drive.told[0]).toMatchObject({ type: "model.failed", attempt: 3 });
  });
});

describe("what a guardrail blocks", () => {
  const blocked = (on: string) => ({
    code: "guardrail",
    message: "the guardrail 'no_keys' blocked it",
    details: { rule: "no_keys", on, attempts: [], usage: null, cost_usd_micros: 0 },
  });

  test("SE8: on its way in ends the turn with the rule's name, and is in no later prompt", () => {
    const drive = idle();
    drive.send("first");
    drive.done("model", answer("kept"));
    drive.send("blocked");
    drive.fail("model", blocked("input"));
    expect(drive.told.slice(0, 2)).toMatchObject([
      { type: "model.failed", code: "guardrail" },
      { type: "turn.failed", turn: 2, reason: "guardrail", rule: "no_keys", on: "input", message: "the guardrail 'no_keys' blocked it" },
    ]);
    expect(drive.count("superseded")).toBe(0);
    drive.send("third");
    expect((drive.prompt as TranscriptItem[]).map(({ turn }) => turn)).toEqual([1, 1, 3]);
    expectInvariants(drive);
  });

  test("on its way out ends the turn, voids the text that went out, and never completes a message", () => {
    const drive = thinking();
    drive.claim();
    drive.fail("model", blocked("output"));
    expect(drive.told.filter(({ type }) => type !== "session.state")).toMatchObject([
      { type: "model.failed", attempt: 2 },
      { type: "superseded", turn: 1, step: 0, attempt: 2 },
      { type: "turn.failed", reason: "guardrail", rule: "no_keys", on: "output" },
    ]);
    expect(drive.count("message.completed")).toBe(0);
    expectInvariants(drive);
  });
});
