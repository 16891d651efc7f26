// Goal: a session keeps SE1 to SE8 in every state, and answers every command in every state as its page says.
// Method: a table of every state crossed with every command; the loop and each way out of it told as short stories; then every point that
// can be reached with two messages is walked (breadth first), and longer lives are drawn at random. Each step goes through drive.ts, which
// repeats it on the state loaded from its snapshot.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { COMMANDS } from "../../protocol/commands.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { LOOPS_DEFAULT, SESSION_QUEUE_MAX } from "../../protocol/limits.ts";
import {
  IDLE_TTL_MS,
  MODEL_PATIENCE_MS,
  sessionDefinition,
  SUSPENDED_TTL_MS,
  TOOL_CALLS_MAX,
  TOOLS_PATIENCE_MS,
  TRANSCRIPT_ITEMS_KEPT,
  TRANSCRIPT_ITEMS_MAX,
  type TranscriptItem,
} from "../../state-machines/session.ts";
import { RECOVERY_COST_USD_MICROS_MAX, RECOVERY_TRIES_MAX } from "../../state-machines/step.ts";
import {
  acting,
  answer,
  callMade,
  callOfBefore,
  changed,
  configuration,
  expectInvariants,
  idle,
  lost,
  observed,
  session,
  SessionDrive,
  thinking,
  unbegun,
  updating,
  WAYS,
} from "./session-drive.ts";

type Way = keyof typeof WAYS;
const ILLEGAL = "illegal_transition";

/** Every command in every state: the state it leads to, or the code it is refused with. */
const AWAITING = {
  "message.send": "awaiting_dependency",
  "message.send reject": "busy",
  "message.send interrupt": "thinking",
  "turn.cancel": "idle",
  "session.pause": "paused",
  "session.resume": ILLEGAL,
  "session.hibernate": "hibernated",
  "session.terminate": "terminated",
  "session.create": ILLEGAL,
  "session.unpark": ILLEGAL,
} as const;
const TABLE: Readonly<Record<Way, Readonly<Record<string, string>>>> = {
  initializing: {
    "message.send": "initializing",
    "message.send reject": "initializing",
    "message.send interrupt": "initializing",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "initializing, a step failed": {
    "message.send": "initializing",
    "message.send reject": "initializing",
    "message.send interrupt": "initializing",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "initializing within a turn": {
    "message.send": "initializing",
    "message.send reject": "busy",
    "message.send interrupt": "initializing",
    "turn.cancel": "initializing",
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  idle: {
    "message.send": "thinking",
    "message.send reject": "thinking",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": "paused",
    "session.resume": ILLEGAL,
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  thinking: {
    "message.send": "thinking",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": "idle",
    "session.pause": "paused",
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  acting: {
    "message.send": "acting",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": "idle",
    "session.pause": "acting",
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "acting, to be paused": {
    "message.send": "acting",
    "message.send reject": "busy",
    "message.send interrupt": "paused",
    "turn.cancel": "paused",
    "session.pause": ILLEGAL,
    "session.resume": "acting",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  awaiting_dependency: AWAITING,
  "awaiting_dependency, looking": AWAITING,
  paused: {
    "message.send": "paused",
    "message.send reject": "paused",
    "message.send interrupt": "paused",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "idle",
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "paused within a turn": {
    "message.send": "paused",
    "message.send reject": "busy",
    "message.send interrupt": "paused",
    "turn.cancel": "paused",
    "session.pause": ILLEGAL,
    "session.resume": "thinking",
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  hibernated: {
    "message.send": "thinking",
    "message.send reject": "thinking",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "idle",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "hibernated within a turn": {
    "message.send": "thinking",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "thinking",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  unhealthy: {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "initializing",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "unhealthy within a turn": {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": "unhealthy",
    "session.pause": ILLEGAL,
    "session.resume": "initializing",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  terminated: {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": ILLEGAL,
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  parked: {
    "message.send": "parked",
    "message.send reject": "busy",
    "message.send interrupt": "parked",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": "thinking",
  },
  "parked before its configuration": {
    "message.send": "parked",
    "message.send reject": "parked",
    "message.send interrupt": "parked",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": "initializing",
  },
};

const BODIES: Readonly<Record<string, JsonObject>> = {
  "message.send": { content: "x" },
  "dependency.ask": { session: "a1", message: "m1", from: "acme/session/child" },
  "dependency.told": { session: "parent", message: "m3" },
};

describe("every state crossed with every command", () => {
  // What sessions tell one another leaves each where it is.
  const told = (way: string): string => (way === "terminated" ? ILLEGAL : WAYS[way as Way]().at);
  const rows = Object.entries(TABLE).map(([way, row]) => [way, { ...row, "dependency.ask": told(way), "dependency.told": told(way) }] as const);
  const cases = rows.flatMap(([way, row]) => Object.entries(row).map(([command, leads_to]) => ({ way: way as Way, command, leads_to })));

  test("the table names every command of the wire, and its ways reach every state of the machine", () => {
    for (const [, row] of rows)
      expect([...new Set(Object.keys(row).map((command) => command.split(" ")[0]))].sort()).toEqual(Object.keys(COMMANDS.session).sort());
    const states = Object.keys(sessionDefinition.machine.states).filter((name) => name !== "choosing");
    expect([...new Set(Object.values(WAYS).map((way) => way().at))].sort()).toEqual(states.sort());
    expect(cases).toHaveLength(18 * 12);
  });

  test.each(cases)("$way takes $command to $leads_to", ({ way, command, leads_to }) => {
    const drive = WAYS[way]();
    expectInvariants(drive);
    const before = drive.at;
    const entries = drive.entries.length;
    const [type = "", on_busy] = command.split(" ");
    const refusal = drive.command(type, { ...BODIES[type], ...(on_busy === undefined ? {} : { on_busy }) });
    expect(refusal?.code ?? drive.at).toBe(leads_to);
    expect(drive.entries.length - entries, "a refused command is not applied").toBe(refusal === undefined ? 1 : 0);
    const moved = drive.told.filter(({ type }) => type === "session.state");
    if (refusal === undefined && before !== drive.at) expect(moved).toMatchObject([{ from: before, to: drive.at }]);
    else if (refusal === undefined) expect(moved).toEqual([]);
    else expect(refusal.details).toMatchObject({ state: before });
    expectInvariants(drive);
  });
});

describe("creation", () => {
  test("tells who was created and asks for the configuration that was asked for", () => {
    const drive = session({ external_id: "x-1", user: "u1", mode: "single", overrides: { model: "a/b" }, metadata: { k: "v" } });
    expect(drive.told).toEqual([
      { type: "session.created", agent: "assistant", external_id: "x-1", user: "u1", mode: "single", metadata: { k: "v" } },
      { type: "session.initializing", step: "agent", retries: 0 },
    ]);
    expect(drive.outcome).toEqual({ ok: true, seq: 1, state: "initializing", result: { created: true } });
    expect(drive.state.running["configuration"]).toEqual({
      inst: "1:configuration",
      src: "load_configuration",
      input: { agent: "assistant", overrides: { model: "a/b" }, mode: "single" },
      attempt: 1,
    });
  });

  test("what stays of the configuration is small, and says where the whole of it stands", () => {
    const drive = idle({ instructions: "x".repeat(100_000), max_loops: 7, temperature: 0.5 }, { overrides: { instructions: "y".repeat(100_000) } });
    expect(drive.context.config).toEqual({
      seq: 2,
      hash: "a".repeat(64),
      agent_version: 3,
      model: "simulated/echo",
      tools: ["now", "wait_ms", "pay"],
      denied_tools: [],
      max_loops: 7,
      max_output_tokens: null,
      temperature: 0.5,
      idle_ttl_ms: IDLE_TTL_MS,
      suspended_ttl_ms: SUSPENDED_TTL_MS,
    });
    expect(JSON.stringify(drive.saved).length).toBeLessThan(2_000);
  });

  test("a step that fails is tried again after 100, 200 and 500 ms, by name; then the session is unhealthy, and resume asks again with the same wishes", () => {
    const drive = session({ overrides: { max_loops: 3 } });
    const failure = { code: "unavailable", message: "the journal is away", details: { step: "tools" } };
    const waits: number[] = [];
    for (let retries = 0; drive.at === "initializing"; retries++) {
      const failed_at_ms = drive.later(7).at_ms;
      drive.fail("configuration", failure);
      const told = { type: "session.initializing", step: "tools", retries, code: "unavailable", message: "the journal is away" };
      expect(drive.told[0]).toEqual({ ...told, retry_in_ms: [100, 200, 500][retries] ?? null });
      if (drive.at !== "initializing") break;
      expect([drive.context.init?.step, sessionDefinition.waits(drive.view)]).toEqual([
        "tools",
        "step 'tools' of its initialisation failed (unavailable); it is tried again",
      ]);
      drive.fire("init_retry");
      waits.push(drive.at_ms - failed_at_ms);
      expect(drive.told).toEqual([{ type: "session.initializing", step: "agent", retries: retries + 1 }]);
    }
    expect(waits).toEqual([100, 200, 500]);
    expect(drive.told[1]).toEqual({ type: "session.state", from: "initializing", to: "unhealthy", reason: "step 'tools': unavailable: the journal is away" });
    expect(sessionDefinition.waits(drive.view)).toBe(
      "could not begin (step 'tools': unavailable: the journal is away): waits for session.resume, which tries again",
    );
    drive.tell("session.resume");
    expect(drive.told[0]).toEqual({ type: "session.initializing", step: "agent", retries: 0 });
    expect(drive.state.running["configuration"]).toMatchObject({ input: { agent: "assistant", overrides: { max_loops: 3 }, mode: null } });
    expect(drive.count("session.created")).toBe(1);
    expect(drive.done("configuration", configuration()).at).toBe("idle");
    expect(drive.context.init).toBeNull();
  });

  test("a step that fails once and then does not is no trouble", () => {
    const drive = session().fail("configuration", lost) as SessionDrive;
    drive.claim([]).fire("init_retry");
    expect(drive.done("configuration", configuration()).at).toBe("idle");
  });

  test("a configuration that does not come is a failed try after its patience", () => {
    const drive = session();
    for (let tries = 0; tries < 4; tries++) {
      drive.fire("configuration_patience");
      if (tries < 3) drive.fire("init_retry");
    }
    expect([drive.at, drive.context.reason]).toEqual(["unhealthy", "step 'agent': timeout: it did not come in time"]);
  });

  test("messages that came before the configuration have their turns after it, in order", () => {
    const drive = session();
    expect(drive.send("one")).toEqual({ message_id: "m2", turn: 1 });
    expect(drive.send("two")).toEqual({ message_id: "m3", turn: 2 });
    drive.done("configuration", configuration());
    expect(drive.types).toEqual(["turn.started", "model.started", "session.state"]);
    expect(drive.prompt).toEqual([{ role: "user", at: 2, turn: 1 }]);
    drive.done("model", answer("first"));
    expect(drive.prompt).toEqual([
      { role: "user", at: 2, turn: 1 },
      { role: "assistant", at: 5, turn: 1 },
      { role: "user", at: 3, turn: 2 },
    ]);
  });
});

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
    expect(drive.refusal("message.send", { content: "two" })).toMatchObject({ code: ILLEGAL });
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

// ── every reachable point, and long lives ──────────────────────────────────────────────────────────────────────────────────────────

/** One thing that may happen to a session next. */
interface Happening {
  readonly name: string;
  run(drive: SessionDrive): void;
}

/** Everything that may happen now, without regard to whether it is refused. */
function happenings(drive: SessionDrive, tools: readonly string[]): Happening[] {
  const next: Happening[] = [];
  for (const type of Object.keys(COMMANDS.session)) {
    if (type !== "message.send") next.push({ name: type, run: (now) => void now.command(type) });
  }
  for (const on_busy of ["enqueue", "reject", "interrupt"])
    next.push({ name: `message.send ${on_busy}`, run: (now) => void now.command("message.send", { content: "x", on_busy }) });
  for (const id of drive.running) {
    if (id === "configuration") next.push({ name: "configured", run: (now) => void now.done(id, configuration({ max_loops: 2, mode: now.context.mode })) });
    else if (id === "model") {
      next.push({ name: "answers", run: (now) => void now.done(id, answer("yes")) });
      if (drive.context.at_boundary) next.push({ name: "model finds a change", run: (now) => void now.fail(id, changed) });
      next.push({ name: "model is blocked", run: (now) => void now.fail(id, { code: "guardrail", message: "blocked", details: { rule: "r", on: "input" } }) });
      next.push({ name: "calls tools", run: (now) => void now.done(id, answer("", ...tools)) });
    } else next.push({ name: `${id} done`, run: (now) => void now.done(id, observed) });
    next.push({ name: `${id} fails`, run: (now) => void now.fail(id, lost) });
    next.push({ name: `${id} lost`, run: (now) => void now.claim([id]) });
  }
  for (const id of Object.keys(drive.state.timers)) next.push({ name: `timer ${id}`, run: (now) => void now.fire(id) });
  return next;
}

/** Points that differ in nothing a decision rests on are the same point. */
function pointOf({ context, view }: SessionDrive): string {
  const { turn_state, step, steps_void, queue, tools, pausing, mode, config, turns_assigned, init, at_boundary } = context;
  return JSON.stringify([
    view.state,
    view.running,
    turn_state,
    step - steps_void,
    init === null ? null : [init.retries, init.failed !== null],
    at_boundary,
    queue.length,
    tools.map(({ outcome }) => outcome.kind),
    pausing,
    mode,
    config !== null,
    Math.min(turns_assigned, 2),
  ]);
}

test("every point that two messages and two loops can lead to keeps the invariants, and every transition of the machine is taken on the way", () => {
  const seen = new Set<string>();
  const taken = new Set<string>();
  let steps = 0;
  const begin = [session(), session({ mode: "single" })];
  const pending: SessionDrive[] = [...begin];
  for (const drive of begin) seen.add(pointOf(drive));
  for (let drive = pending.shift(); drive !== undefined; drive = pending.shift()) {
    for (const happening of happenings(drive, ["now", "pay", "nonsense"])) {
      const next = drive.copyTo(new SessionDrive());
      const before = next.entries.length;
      happening.run(next);
      if (next.entries.length === before) continue;
      steps += 1;
      taken.add(`${drive.at} · ${happening.name.replace(/^timer .*/, "timer")} · ${next.at}`);
      expectInvariants(next);
      const point = pointOf(next);
      if (next.context.turns_assigned > 2 || seen.has(point)) continue;
      seen.add(point);
      pending.push(next);
    }
  }
  expect(seen.size).toBeGreaterThan(150);
  expect(steps).toBeGreaterThan(1_000);
  // Not by chance: each of these is one transition of the machine, and the walk must have gone through it.
  for (const one of [
    "initializing · timer · unhealthy",
    "initializing · timer · initializing",
    "initializing · configuration fails · unhealthy",
    "initializing · configuration fails · initializing",
    "thinking · model finds a change · initializing",
    "thinking · model is blocked · idle",
    "initializing · turn.cancel · initializing",
    "unhealthy · turn.cancel · unhealthy",
    "initializing · configured · thinking",
    "idle · timer · terminated",
    "paused · timer · terminated",
    "hibernated · timer · terminated",
    "thinking · timer · idle",
    "acting · timer · thinking",
    "acting · timer · idle",
    "acting · timer · paused",
    "acting · tool.1 lost · thinking",
    "acting · tool.1 lost · paused",
    "acting · turn.cancel · paused",
    "acting · session.resume · acting",
    "paused · turn.cancel · paused",
    "hibernated · message.send enqueue · thinking",
    "thinking · answers · terminated",
    "thinking · message.send interrupt · thinking",
  ])
    expect([...taken]).toContain(one);
}, 60_000);

test("long random lives keep the invariants, end every turn once, and replay from the first entry to the same state", () => {
  let longest = 0;
  fc.assert(
    fc.property(fc.array(fc.noBias(fc.nat()), { minLength: 1, maxLength: 60, size: "max" }), fc.nat(9), (choices, mode) => {
      const drive = session(mode === 0 ? { mode: "single" } : {});
      for (const choice of choices) {
        // Terminating and expiring are always possible and would end most lives at once.
        const next = happenings(drive, choice % 2 === 0 ? ["now"] : ["pay", "now", "nonsense"]).filter(
          ({ name }) => name !== "session.terminate" && !name.includes("ttl"),
        );
        next[choice % next.length]?.run(drive.later(choice % 1000));
        expectInvariants(drive);
        if (drive.view.final) break;
      }
      if (!drive.view.final) drive.tell("session.terminate");
      expectInvariants(drive);
      expect(drive.replayed()).toEqual({ saved: drive.saved, events: drive.events }); // A5
      longest = Math.max(longest, drive.entries.length);
    }),
    { numRuns: 150 },
  );
  expect(longest).toBeGreaterThan(20);
}, 60_000);

describe("a configuration that changed", () => {
  test("is taken up at the turn's beginning: the turn goes on with it, and asking no model used no loop", () => {
    const drive = thinking({ max_loops: 1 }, { overrides: { temperature: 1 } });
    expect(drive.state.running["model"]?.input).toMatchObject({ step: 0, boundary: true });
    drive.fail("model", changed);
    expect(drive.types).toEqual(["model.failed", "session.initializing", "session.state"]);
    expect(drive.state.running["configuration"]?.input).toEqual({ agent: "assistant", overrides: null, mode: null, again: true });
    drive.done("configuration", { ...configuration({ max_loops: 1, model: "simulated/other", mode: "single" }), agent_version: 4 });
    expect([drive.at, drive.context.config?.agent_version, drive.context.config?.model, drive.context.mode]).toEqual([
      "thinking",
      4,
      "simulated/other",
      "multi",
    ]);
    expect(drive.state.running["model"]?.input).toMatchObject({ turn: 1, step: 1, config_seq: drive.seq, boundary: true });
    drive.done("model", answer("yes"));
    expect([drive.at, drive.count("turn.completed"), drive.count("turn.failed")]).toEqual(["idle", 1, 0]);
    expectInvariants(drive);
  });

  test("is looked for where a turn begins and where a sleeping one goes on, not between its steps", () => {
    const boundary = (drive: SessionDrive): unknown => (drive.state.running["model"]?.input as { boundary?: true } | undefined)?.boundary;
    const drive = acting();
    drive.done("tool.0", observed).done("tool.1", observed);
    expect(boundary(drive)).toBeUndefined();
    drive.tell("session.pause");
    drive.tell("session.hibernate");
    drive.send();
    expect([drive.context.turn, boundary(drive)]).toEqual([1, true]);
    drive.done("model", answer("done"));
    expect([drive.context.turn, boundary(drive)]).toEqual([2, true]);
    expectInvariants(drive);
  });

  test("that cannot be had makes the session unhealthy with its turn open, and the turn can be given up", () => {
    const drive = unbegun(updating());
    expect([drive.at, drive.context.turn_state]).toEqual(["unhealthy", "open"]);
    drive.tell("turn.cancel");
    expect(drive.told).toEqual([{ type: "turn.cancelled", turn: 1, reason: "cancelled" }]);
    drive.tell("session.resume");
    expect(drive.done("configuration", configuration()).at).toBe("idle");
    expectInvariants(drive);
  });
});

describe("what is not permitted", () => {
  const denying = (): SessionDrive => {
    const drive = session();
    drive.done("configuration", { ...configuration({ tools: ["now"] }), denied_tools: ["pay"] });
    drive.send();
    return drive;
  };

  test("SE7: a denied tool is refused by name, without an effect, in the commit of the answer that called it", () => {
    const drive = denying();
    drive.done("model", answer("", "pay", "now"));
    expect(drive.told.filter(({ type }) => type.startsWith("tool."))).toMatchObject([
      { type: "tool.denied", name: "pay", code: "denied", message: "the tool 'pay' is not permitted here" },
      { type: "tool.started", name: "now" },
    ]);
    expect(drive.running).toEqual(["tool.1"]);
    drive.done("tool.1", observed);
    expect((drive.prompt as TranscriptItem[]).at(-2)).toMatchObject({ role: "tool", name: "pay", failed: { code: "denied" } });
    expectInvariants(drive);
  });

  test("a tool that is denied when it is to run is told as denied too", () => {
    const drive = denying();
    drive.done("model", answer("", "now")).fail("tool.0", { code: "denied", message: "tool:now is denied by the rule 'tool:*'" });
    expect(drive.told[0]).toMatchObject({ type: "tool.denied", name: "now", message: "tool:now is denied by the rule 'tool:*'" });
    expectInvariants(drive);
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

describe("the calls of a model call", () => {
  const usage = { input_tokens: 5, output_tokens: 2, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
  const answered = (number: number): JsonObject =>
    callMade(number, { outcome: "completed", code: null, message: null, usage, cost_usd_micros: 25, model: "simulated/echo" });
  const judged = (number: number): JsonObject => ({ ...answered(number), purpose: "guardrail", rule: "kind", cost_usd_micros: 3 });
  const next = (more: JsonObject = {}): JsonObject => ({
    model: "openai/b",
    try: 2,
    wait_ms: 4_000,
    code: "rate_limited",
    message: "too many",
    purpose: "answer",
    left: ["simulated/echo"],
    ...more,
  });
  const says = (drive: SessionDrive, attempts: readonly JsonObject[], more: JsonObject = {}): SessionDrive => {
    drive.apply({ t: "progress", inst: drive.instOf("model"), told: { attempts, skipped: [], next: next(more) } });
    return drive;
  };
  const settlements = (drive: SessionDrive): JsonObject[] => drive.out.filter(({ type }) => type === "budget.settle").map(({ body }) => body);

  test("are told one by one before the end, which tells the one that answered; all of them count", () => {
    const drive = thinking();
    const skipped = [{ model: "anthropic/a", code: "circuit_open", message: "it is open", purpose: "answer" }];
    drive.done("model", { ...answer("fine"), attempts: [judged(1), callMade(2), answered(3)], skipped });
    expect(drive.told.slice(0, 4)).toMatchObject([
      { type: "model.skipped", turn: 1, step: 0, attempt: 1, model: "anthropic/a", code: "circuit_open" },
      { type: "model.tried", try: 1, purpose: "guardrail", rule: "kind", outcome: "completed", cost_usd_micros: 3 },
      { type: "model.tried", try: 2, purpose: "answer", model: "openai/b", outcome: "failed", code: "overloaded", usage: null },
      { type: "model.completed", model: "simulated/echo", cost_usd_micros: 25 },
    ]);
    expect(drive.context.usage).toMatchObject({ model_calls: 3, cost_usd_micros: 28, input_tokens: 10 });
    expect(settlements(drive).at(-1)).toMatchObject({ cost_usd_micros: 28 });
    expectInvariants(drive);
  });

  test("of a failure are told too, the last of them by the failure itself", () => {
    const drive = thinking();
    drive.fail("model", { code: "models_exhausted", message: "none", details: { model: "openai/b", attempts: [callMade(1), callMade(2)], usage: null } });
    expect(drive.types.slice(0, 3)).toEqual(["model.tried", "model.failed", "turn.failed"]);
    expect(drive.context.usage.model_calls).toBe(2);
    expectInvariants(drive);
  });

  test("of journals from before they were told are not told now, and count as they did", () => {
    const drive = thinking();
    drive.done("model", {
      ...answer("fine"),
      attempts: [callOfBefore(callMade(1)), callOfBefore(answered(2))],
      skipped: [{ model: "anthropic/a", code: "circuit_open", message: "it is open" }],
    });
    expect(drive.types).toEqual(["model.completed", "message.completed", "turn.completed", "session.state"]);
    expect(drive.context.usage).toMatchObject({ model_calls: 1, cost_usd_micros: 25 });
  });

  test("that are made again say for whom the session waits, until when and why; then it works, and nothing of it is left at the end", () => {
    const drive = says(thinking(), [callMade(1)]);
    const { waits } = drive.core.definition;
    expect(drive.told).toMatchObject([
      { type: "model.retrying", turn: 1, step: 0, attempt: 1, model: "openai/b", try: 2, wait_ms: 4_000, code: "rate_limited" },
    ]);
    expect(waits(drive.view, drive.at_ms + 1_500)).toBe("waits for provider openai: try 2 of openai/b in 2500 ms, because it answered 429 (rate_limited)");
    expect(waits(drive.view)).toContain("4000 ms after 1970-01-01T00:16:40.000Z");
    expect(waits(drive.view, drive.at_ms + 4_000)).toBeUndefined();
    says(drive, [callMade(1), callMade(2)], { wait_ms: 0, model: "simulated/echo", try: 1 });
    expect(waits(drive.view, drive.at_ms)).toBeUndefined();
    says(drive, [callMade(1), callMade(2)], { code: "circuit_open" });
    expect(waits(drive.view, drive.at_ms)).toContain("its circuit breaker is open (circuit_open)");
    drive.done("model", answer("fine"));
    expect(drive.context.retry).toBeNull();
    expectInvariants(drive);
  });

  test("S6: what they said changes no input, and is forgotten with the attempt that said it", () => {
    const drive = thinking();
    const { input, inst } = drive.state.running["model"]!;
    says(drive, [callMade(1)]);
    expect(drive.state.running["model"]).toMatchObject({ inst, input, attempt: 1, told: { next: { try: 2 } } });
    drive.claim();
    expect(drive.state.running["model"]).toEqual({ inst, input, src: "call_model", attempt: 2 });
    drive.apply({ t: "progress", inst: "1:model", told: { next: {} } });
    expect([drive.told, drive.state.running["model"]?.told]).toEqual([[], undefined]);
  });

  test("that are lost settle the hold, and at least what had ended before", () => {
    const drive = says(thinking(), [callMade(1, { usage, cost_usd_micros: 30 })]);
    drive.claim();
    expect(settlements(drive)).toMatchObject([{ hold: expect.stringMatching(/model\/1$/), cost_usd_micros: null, spent_usd_micros: 30 }]);
    drive.claim();
    expect(settlements(drive)[1]).toEqual({ hold: expect.stringMatching(/model\/2$/), cost_usd_micros: null });
  });

  test.each<[string, (drive: SessionDrive, stopped: Record<string, JsonObject>) => unknown]>([
    ["turn.cancel", (drive, stopped) => drive.apply({ t: "command", type: "turn.cancel", body: {}, channel: "control", stopped })],
    ["session.pause", (drive, stopped) => drive.apply({ t: "command", type: "session.pause", body: {}, channel: "control", stopped })],
    ["session.terminate", (drive, stopped) => drive.apply({ t: "command", type: "session.terminate", body: {}, channel: "control", stopped })],
    [
      "an interrupting message",
      (drive, stopped) => drive.apply({ t: "command", type: "message.send", body: { content: "no", on_busy: "interrupt" }, channel: "command", stopped }),
    ],
    [
      "its patience",
      (drive, stopped) => {
        const inst = Object.values(drive.state.timers).find((timer) => timer.inst.includes("model_patience"))?.inst ?? "";
        return drive.apply({ t: "timer", inst, stopped });
      },
    ],
  ])("that are stopped by %s are settled by what they had used, and told with it", (_, stop) => {
    const drive = thinking();
    const cancelled = callMade(2, { code: "cancelled", usage, cost_usd_micros: 12 });
    stop(drive, { [drive.instOf("model")]: { model: "openai/b", attempts: [callMade(1), cancelled], usage, cost_usd_micros: 12, price_version: "v" } });
    expect(drive.told.find(({ type }) => type === "model.failed")).toMatchObject({ model: "openai/b", usage, cost_usd_micros: 12 });
    expect(drive.told.find(({ type }) => type === "model.tried")).toMatchObject({ try: 1, code: "overloaded" });
    expect(settlements(drive)).toEqual([{ hold: expect.stringMatching(/model\/1$/), cost_usd_micros: 12, model: "openai/b" }]);
    expect(drive.context.usage).toMatchObject({ model_calls: 2, cost_usd_micros: 12 });
    expectInvariants(drive);
  });

  test("that were stopped before any was made cost nothing, and that nobody knows of, their hold", () => {
    const known = thinking();
    const stopped = { [known.instOf("model")]: { attempts: [], usage: null, cost_usd_micros: 0, price_version: null } };
    known.apply({ t: "command", type: "turn.cancel", body: {}, channel: "control", stopped });
    const unknown = thinking();
    unknown.tell("turn.cancel");
    expect([settlements(known)[0]?.["cost_usd_micros"], settlements(unknown)[0]?.["cost_usd_micros"]]).toEqual([0, null]);
  });
});
