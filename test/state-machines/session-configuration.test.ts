// Goal:   a session begins with the configuration that was asked for, takes up a changed one where a turn begins, and says which step failed.
// Method: short stories, each step through drive.ts, which repeats it on the state loaded from its snapshot.
import { describe, expect, test } from "vitest";
import { IDLE_TTL_MS, SUSPENDED_TTL_MS } from "../../state-machines/session-configuration.ts";
import { sessionDefinition } from "../../state-machines/session.ts";
import {
  acting,
  answer,
  changed,
  configuration,
  expectInvariants,
  idle,
  lost,
  observed,
  session,
  type SessionDrive,
  thinking,
  unbegun,
  updating,
} from "./session-drive.ts";

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
