// Goal:   a session thinks, acts, observes and answers; it sleeps and wakes, is taken over, and ends. The rest of its life is beside this file:
//         session-commands.test.ts (every command in every state), session-lives.test.ts (SE1 to SE6 at every point that can be reached),
//         session-configuration, session-turns, session-model-calls and session-tool-calls.
// Method: the loop and each way out of it told as short stories. Each step goes through drive.ts, which repeats it on the state loaded from its
// snapshot.
import { describe, expect, test } from "vitest";
import { LOOPS_DEFAULT } from "../../protocol/limits.ts";
import { IDLE_TTL_MS, SUSPENDED_TTL_MS } from "../../state-machines/session-configuration.ts";
import { MODEL_PATIENCE_MS } from "../../state-machines/session-model-calls.ts";
import { TOOL_CALLS_MAX, TOOLS_PATIENCE_MS } from "../../state-machines/session-tool-calls.ts";
import { TRANSCRIPT_ITEMS_KEPT, TRANSCRIPT_ITEMS_MAX, type TranscriptItem } from "../../state-machines/session-transcript.ts";
import { sessionDefinition } from "../../state-machines/session.ts";
import { RECOVERY_COST_USD_MICROS_MAX, RECOVERY_TRIES_MAX } from "../../state-machines/step.ts";
import { acting, answer, configuration, expectInvariants, idle, lost, observed, session, type SessionDrive, thinking, WAYS } from "./session-drive.ts";

describe("the loop", () => {
  test("thinks, acts, observes, acts again and answers, with the prompt of each call in the order things were said", () => {
    const drive = thinking();
    expect(drive.state.running["model"]).toMatchObject({ inst: "3:model", src: "call_model", input: { turn: 1, step: 0, config_seq: 2 } });
    drive.done("model", answer("let me see", "now", "wait_ms"));
    expect(drive.types).toEqual(["model.completed", "tool.started", "tool.started", "session.state"]);
    expect(drive.state.running).toMatchObject({
      "tool.0": { inst: "4:tool.0", src: "call_tool", input: { turn: 1, step: 0, call_seq: 4, index: 0, call_id: "call-0", name: "now", idempotent: true } },
      "tool.1": { inst: "4:tool.1", src: "call_tool", input: { index: 1, name: "wait_ms" } },
    });
    drive.done("tool.1", observed);
    expect([drive.at, drive.types]).toEqual(["acting", ["tool.completed"]]);
    drive.fail("tool.0", { code: "tool_failed", message: "no clock" });
    expect(drive.types).toEqual(["tool.failed", "model.started", "session.state"]);
    expect(drive.state.running["model"]).toMatchObject({ inst: "6:model", input: { step: 1 } });
    drive.done("model", answer("", "now")).done("tool.0", observed);
    expect(drive.context.step).toBe(2);
    expect(drive.prompt).toEqual([
      { role: "user", at: 3, turn: 1 },
      { role: "assistant", at: 4, turn: 1 },
      { role: "tool", at: 6, turn: 1, call_id: "call-0", name: "now", failed: { code: "tool_failed", message: "no clock" } },
      { role: "tool", at: 5, turn: 1, call_id: "call-1", name: "wait_ms" },
      { role: "assistant", at: 7, turn: 1 },
      { role: "tool", at: 8, turn: 1, call_id: "call-0", name: "now" },
    ]);
    drive.done("model", answer("the answer"));
    expect(drive.told).toEqual([
      {
        type: "model.completed",
        turn: 1,
        step: 2,
        attempt: 1,
        model: "simulated/echo",
        usage: { input_tokens: 5, output_tokens: 2, cache_read_tokens: 3, cache_write_tokens: 1, reasoning_tokens: 4 },
        cost_usd_micros: 25,
        price_version: "v1",
        stop: "end",
      },
      { type: "message.completed", turn: 1, step: 2, message_id: "m9", role: "assistant", content: "the answer" },
      { type: "turn.completed", turn: 1, message_id: "m9", stop: "end" },
      { type: "session.state", from: "thinking", to: "idle" },
    ]);
    expect(drive.context.usage).toEqual({
      input_tokens: 15,
      output_tokens: 6,
      cache_read_tokens: 9,
      cache_write_tokens: 3,
      reasoning_tokens: 12,
      cost_usd_micros: 75,
      model_calls: 3,
    });
    expectInvariants(drive);
  });

  test("no text of a message is ever in the state", () => {
    const drive = idle();
    drive.send("SECRET-QUESTION");
    drive.done("model", { ...answer("SECRET-THOUGHT", "now"), tool_calls: [{ id: "c", name: "now", args: { a: "SECRET-ARGS" } }] });
    drive.done("tool.0", { text: "SECRET-RESULT", is_error: true }).done("model", answer("SECRET-ANSWER"));
    expect(JSON.stringify(drive.saved)).not.toContain("SECRET");
  });

  test("what the creator asked for goes before what the agent says", () => {
    expect(idle({ mode: "multi" }, { mode: "single" }).context.mode).toBe("single");
    expect(idle({ mode: "single" }).context.mode).toBe("single");
  });

  test("SE7: a tool that the agent does not have, or nobody has, is answered as an error without an effect", () => {
    const drive = thinking({ tools: ["now", "constructor"] });
    drive.done("model", answer("", "wait_ms", "rm_rf", "constructor"));
    expect([drive.at, drive.running, drive.context.step]).toEqual(["thinking", ["model"], 1]);
    expect(drive.types).toEqual(["model.completed", "tool.failed", "tool.failed", "tool.failed", "model.started"]);
    expect((drive.prompt as TranscriptItem[]).slice(2)).toMatchObject([
      { failed: { code: "tool_unknown" } },
      { failed: { code: "tool_unknown" } },
      { failed: { code: "tool_unknown" } },
    ]);
    expectInvariants(drive);
  });

  test("SE2: call 26 of a turn is never made", () => {
    const drive = thinking();
    for (let call = 1; call < LOOPS_DEFAULT; call++) drive.done("model", answer("", "now")).done("tool.0", observed);
    expect([drive.count("model.started"), drive.at]).toEqual([LOOPS_DEFAULT, "thinking"]);
    drive.done("model", answer("", "now")).done("tool.0", observed);
    expect([drive.count("model.started"), drive.at]).toEqual([LOOPS_DEFAULT, "idle"]);
    expect(drive.told).toMatchObject([
      { type: "tool.completed" },
      { type: "turn.failed", turn: 1, reason: "loop_limit" },
      { type: "session.state", to: "idle" },
    ]);
    expectInvariants(drive);
  });

  test("SE2: the limit of an agent counts, also over crashes and pauses", () => {
    const drive = thinking({ max_loops: 2 });
    drive.claim().tell("session.pause");
    drive.tell("session.resume");
    expect([drive.context.step, drive.at]).toEqual([1, "thinking"]);
    drive.claim().tell("session.pause");
    drive.tell("session.resume");
    expect(drive.told).toMatchObject([
      { type: "turn.failed", reason: "loop_limit" },
      { type: "session.state", from: "paused", to: "idle" },
    ]);
    expectInvariants(drive);
  });

  test("an answer that calls more tools than it may ends the turn, and does not stay in the prompt", () => {
    const drive = thinking();
    drive.done("model", answer("", ...Array<string>(TOOL_CALLS_MAX).fill("now")));
    expect(drive.running).toHaveLength(TOOL_CALLS_MAX);
    expectInvariants(drive);
    const other = thinking();
    other.done("model", answer("", ...Array<string>(TOOL_CALLS_MAX + 1).fill("now")));
    expect(other.told).toMatchObject([
      { type: "model.completed" },
      { type: "turn.failed", reason: "too_many_tool_calls" },
      { type: "session.state", to: "idle" },
    ]);
    expectInvariants(other);
  });

  test("a failed call ends the turn with its code, and counts what it cost", () => {
    const drive = thinking();
    drive.send("next");
    drive.fail("model", {
      ...lost,
      details: { usage: { input_tokens: 9, output_tokens: 0, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 }, cost_usd_micros: 9 },
    });
    expect(drive.told).toMatchObject([
      { type: "model.failed", turn: 1, step: 0, attempt: 1, code: "provider_unavailable", usage: { input_tokens: 9 }, cost_usd_micros: 9 },
      { type: "turn.failed", turn: 1, reason: "provider_unavailable", message: "away" },
      { type: "turn.started", turn: 2 },
      { type: "model.started", turn: 2, step: 0 },
    ]);
    expect(drive.context.usage).toMatchObject({ input_tokens: 9, cost_usd_micros: 9, model_calls: 1 });
  });

  test("a call that does not end is given up after ten minutes", () => {
    const drive = thinking();
    const began = drive.at_ms;
    drive.fire("model_patience");
    expect(drive.at_ms - began).toBe(MODEL_PATIENCE_MS);
    expect(drive.told).toMatchObject([
      { type: "model.failed", code: "timeout" },
      { type: "turn.failed", reason: "timeout" },
      { type: "session.state", to: "idle" },
    ]);
    expectInvariants(drive);
  });

  test("tools that do not end are given up, and the model is told so", () => {
    const drive = acting();
    const began = drive.at_ms;
    drive.done("tool.0", observed).fire("tools_patience");
    expect(drive.at_ms - began).toBe(TOOLS_PATIENCE_MS);
    expect(drive.told).toMatchObject([
      { type: "tool.failed", call_id: "call-1", code: "timeout" },
      { type: "model.started", step: 1 },
      { type: "session.state", to: "thinking" },
    ]);
    expect(drive.prompt).toMatchObject([{}, {}, { at: 5 }, { failed: { code: "timeout" } }]);
    expectInvariants(drive);
  });

  test("a prompt keeps its bound: the oldest turns leave whole, and the turn that runs keeps its message", () => {
    const drive = idle({ max_loops: 1000 });
    drive.thorough = false; // thousands of steps
    while (drive.context.transcript.length < TRANSCRIPT_ITEMS_MAX - 3) {
      drive.send();
      drive.done("model", answer("", "now")).done("tool.0", observed).done("model", answer("done"));
    }
    const former = drive.context.transcript;
    drive.send();
    drive
      .done("model", answer("", "now", "now", "now"))
      .done("tool.0", observed)
      .done("tool.1", observed)
      .done("tool.2", observed);
    const { transcript } = drive.context;
    expect(Math.abs(transcript.length - TRANSCRIPT_ITEMS_KEPT)).toBeLessThan(10);
    expect(transcript[0]?.role).toBe("user");
    expect(former).toContainEqual(transcript[0]);
    expectInvariants(drive);

    // One turn alone that is longer than a prompt may be.
    for (let step = 0; step < 30; step++) {
      drive.done("model", answer("", ...Array<string>(40).fill("now")));
      for (let index = 0; index < 40; index++) drive.done(`tool.${index}`, observed);
    }
    const [first, second] = drive.context.transcript;
    expect([first, second]).toMatchObject([
      { role: "user", turn: drive.context.turn },
      { role: "assistant", turn: drive.context.turn },
    ]);
    expectInvariants(drive);
  });
});

describe("pause, hibernate and resume", () => {
  test("a pause while thinking voids the call, and resuming begins the step anew as the next one", () => {
    const drive = thinking();
    drive.tell("session.pause", { reason: "lunch" });
    expect(drive.told).toMatchObject([
      { type: "model.failed", turn: 1, step: 0, attempt: 1, code: "cancelled" },
      { type: "superseded", turn: 1, step: 0, attempt: 1 },
      { type: "session.state", from: "thinking", to: "paused", reason: "lunch" },
    ]);
    expect(sessionDefinition.waits(drive.view)).toBe("paused (lunch): waits for session.resume; turn 1 goes on then");
    drive.tell("session.resume");
    expect(drive.told).toMatchObject([
      { type: "model.started", turn: 1, step: 1, model: "simulated/echo" },
      { type: "session.state", from: "paused", to: "thinking" },
    ]);
    expect(drive.prompt).toEqual([{ role: "user", at: 3, turn: 1 }]);
    expectInvariants(drive);
  });

  test("a pause while acting waits for the tools, and can be withdrawn", () => {
    const drive = acting();
    drive.tell("session.pause");
    expect(drive.outcome).toMatchObject({ ok: true, state: "acting" });
    drive.done("tool.0", observed).done("tool.1", observed);
    expect([drive.at, drive.context.pausing, drive.running]).toEqual(["paused", false, []]);
    drive.tell("session.resume");
    expect([drive.at, drive.context.step]).toEqual(["thinking", 1]);
    const other = acting();
    other.tell("session.pause", { reason: "later" });
    other.tell("session.resume");
    other.done("tool.0", observed).done("tool.1", observed);
    expect([other.at, other.context.reason]).toEqual(["thinking", null]);
  });

  test("a turn that was put to sleep half-way goes on when it wakes, before the message that woke it", () => {
    const drive = WAYS["hibernated within a turn"]();
    drive.send("wake up");
    expect(drive.types).toEqual(["message.received", "model.started", "session.state"]);
    expect(drive.context).toMatchObject({ turn: 1, step: 1, queue: [{ turn: 2 }] });
    expectInvariants(drive);
  });

  test("a message while paused waits, and has its turn on resuming", () => {
    const drive = WAYS.paused();
    drive.send();
    expect(sessionDefinition.waits(drive.view)).toBe("paused: waits for session.resume; 1 message waits");
    drive.tell("session.resume");
    expect(drive.types).toEqual(["turn.started", "model.started", "session.state"]);
  });
});

describe("the end of a session", () => {
  test("ends the turn in flight and those that wait, each once", () => {
    const drive = acting();
    drive.send();
    drive.send();
    drive.tell("session.terminate", { reason: "enough" });
    expect(drive.told).toMatchObject([
      { type: "tool.failed", code: "cancelled" },
      { type: "tool.failed", code: "cancelled" },
      { type: "turn.cancelled", turn: 1, reason: "terminated" },
      { type: "turn.cancelled", turn: 2, reason: "terminated" },
      { type: "turn.cancelled", turn: 3, reason: "terminated" },
      { type: "session.state", from: "acting", to: "terminated", reason: "enough" },
    ]);
    expect(() => drive.apply({ t: "command", type: "message.send", body: { content: "x" }, channel: "command" })).toThrow("a finished actor takes no command");
    expectInvariants(drive);
  });

  test.each([
    { how: "completed", end: (drive: SessionDrive) => drive.done("model", answer("once")) },
    { how: "failed", end: (drive: SessionDrive) => drive.fail("model", lost) },
    { how: "cancelled", end: (drive: SessionDrive) => drive.tell("turn.cancel") },
  ])("mode single ends when its one turn is $how", ({ how, end }) => {
    const drive = thinking({ mode: "single" });
    expect(drive.refusal("message.send", { content: "two" })).toMatchObject({ code: "illegal_transition" });
    end(drive);
    expect(drive.told.at(-1)).toEqual({ type: "session.state", from: "thinking", to: "terminated", reason: `single turn ${how}` });
    expectInvariants(drive);
  });

  test("mode single, known only with the configuration, answers the first message and cancels the others", () => {
    const drive = session();
    drive.send();
    drive.send();
    drive.done("configuration", configuration({ mode: "single" })).done("model", answer("first"));
    expect(drive.told.slice(-2)).toMatchObject([
      { type: "turn.cancelled", turn: 2 },
      { type: "session.state", to: "terminated" },
    ]);
    expectInvariants(drive);
  });

  test.each([
    { way: "idle", ttl: "idle_ttl", ms: IDLE_TTL_MS },
    { way: "paused", ttl: "suspended_ttl", ms: SUSPENDED_TTL_MS },
    { way: "hibernated", ttl: "suspended_ttl", ms: SUSPENDED_TTL_MS },
    { way: "paused within a turn", ttl: "suspended_ttl", ms: SUSPENDED_TTL_MS },
  ] as const)("$way for too long expires", ({ way, ttl, ms }) => {
    const drive = WAYS[way]();
    const from = drive.at;
    const began = drive.at_ms;
    drive.fire(ttl);
    expect(drive.at_ms - began).toBe(ms);
    expect(drive.told.slice(-2)).toEqual([
      { type: "session.expired", state: from },
      { type: "session.state", from, to: "terminated", reason: "expired" },
    ]);
    expectInvariants(drive);
  });

  test("an agent says how long its sessions live, and each message begins the time anew", () => {
    const drive = idle({ idle_ttl_ms: 5_000 });
    const [due] = Object.values(drive.state.timers).map(({ due_ms }) => due_ms);
    expect(due).toBe(drive.at_ms + 5_000);
    drive.later(4_000).send();
    expect(Object.keys(drive.state.timers).join()).not.toContain("idle_ttl");
    drive.done("model", answer("x"));
    expect(Object.values(drive.state.timers).map(({ due_ms }) => due_ms)).toEqual([drive.at_ms + 5_000]);
  });
});

describe("a take-over", () => {
  test("repeats a model call with the same inst and input as the next attempt, and voids what the lost one said", () => {
    const drive = thinking();
    const before = drive.state.running["model"];
    drive.claim(["model"], "worker w1 declared dead");
    expect(drive.told).toEqual([
      { type: "session.claimed", epoch: 2, from: "w1", to: "w2", reason: "worker w1 declared dead" },
      { type: "superseded", turn: 1, step: 0, attempt: 1 },
    ]);
    expect(drive.state.running["model"]).toEqual({ ...before, attempt: 2 });
    drive.claim();
    drive.done("model", answer("third time lucky"));
    expect(drive.told[0]).toMatchObject({ type: "model.completed", attempt: 3 });
  });

  test("that found the call not yet begun leaves its attempt alone", () => {
    const drive = thinking().claim([]);
    expect([drive.state.running["model"]?.attempt, drive.types]).toEqual([1, ["session.claimed"]]);
  });

  test("repeats idempotent tools, and answers the others as ambiguous without running them again", () => {
    const drive = thinking();
    drive.done("model", answer("", "now", "pay", "pay"));
    drive.claim(["tool.0", "tool.1"]);
    expect(drive.running).toEqual(["tool.0", "tool.2"]);
    expect(drive.state.running["tool.0"]?.attempt).toBe(2);
    expect(drive.told).toMatchObject([{ type: "session.claimed" }, { type: "tool.failed", call_id: "call-1", name: "pay", code: "ambiguous" }]);
    drive.done("tool.0", observed).claim();
    expect(drive.types).toEqual(["session.claimed", "tool.failed", "model.started", "session.state"]);
    expect((drive.prompt as TranscriptItem[]).slice(3)).toMatchObject([
      { call_id: "call-1", failed: { code: "ambiguous", message: "the tool was interrupted and may have acted; find out before calling it again" } },
      { call_id: "call-2", failed: { code: "ambiguous" } },
    ]);
    expectInvariants(drive);
  });

  test("repeats reading the configuration", () => {
    const drive = session().claim();
    expect(drive.state.running["configuration"]?.attempt).toBe(2);
    expect(drive.done("configuration", configuration()).at).toBe("idle");
  });
});

describe("the recovery budget", () => {
  test("five lost attempts in a row park the session: nothing runs, its turn stays open, its cost is told", () => {
    const drive = thinking();
    for (let tries = 1; tries < RECOVERY_TRIES_MAX; tries++) drive.claim();
    expect([drive.at, drive.state.running["model"]?.attempt]).toEqual(["thinking", RECOVERY_TRIES_MAX]);
    drive.claim();
    expect(drive.at).toBe("parked");
    expect(drive.running).toEqual([]);
    expect(drive.told).toContainEqual(expect.objectContaining({ type: "session.parked", tries: RECOVERY_TRIES_MAX }));
    expectInvariants(drive);
    drive.tell("session.unpark");
    expect([drive.at, drive.context.step, drive.context.turn]).toEqual(["thinking", 1, 1]);
    drive.done("model", answer("at last"));
    expect(drive.at).toBe("idle");
    expectInvariants(drive);
  });

  test("a result gives the budget back", () => {
    const drive = thinking();
    for (let tries = 1; tries < RECOVERY_TRIES_MAX; tries++) drive.claim();
    drive.done("model", answer("", "now"));
    for (let tries = 1; tries < RECOVERY_TRIES_MAX; tries++) drive.claim();
    expect(drive.at).toBe("acting");
  });

  test("what lost attempts may have cost parks it too, and is told with the attempt that it voids", () => {
    const drive = thinking();
    const inst = drive.state.running["model"]!.inst;
    drive.apply({ t: "claim", from: "w1", reason: "died", lost: [inst], assumed: { [inst]: RECOVERY_COST_USD_MICROS_MAX } });
    expect(drive.at).toBe("parked");
    expect(drive.told).toContainEqual({ type: "superseded", turn: 1, step: 0, attempt: 1, assumed_usd_micros: RECOVERY_COST_USD_MICROS_MAX });
  });

  test("a claim that lost nothing spends nothing", () => {
    const drive = thinking();
    for (let moves = 0; moves < 3 * RECOVERY_TRIES_MAX; moves++) drive.claim([]);
    expect([drive.at, drive.state.recovery.tries]).toEqual(["thinking", 0]);
  });
});
