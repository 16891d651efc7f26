// Goal: a message that comes after others waits for their turns, by name and visibly, begins when all have completed, is skipped by name when one has not;
// and a session tells whoever asked of each turn's end, in the commit that ends it.
// Method: sessions driven entry by entry; what their looks find is handed in.
import { describe, expect, test } from "vitest";
import { ASKERS_MAX, LOOK_AGAIN_MS, type ParentEnd } from "../../state-machines/dependency.ts";
import { acting, answer, comingAfter, configuration, expectInvariants, found, idle, PARENT, session, type SessionDrive, thinking } from "./session-drive.ts";

const waits = (drive: SessionDrive): string | undefined => drive.core.definition.waits(drive.view);
const ASK = { to: "acme/session/parent", type: "dependency.ask", body: { ...PARENT, from: "acme/session/a1" } };

describe("the one that comes after", () => {
  test("its turn begins when all have completed, and says what it came after", () => {
    const drive = comingAfter();
    expect([drive.at, drive.running, drive.state.running["parents"]?.input]).toEqual(["awaiting_dependency", ["parents"], { parents: [PARENT] }]);
    expect(drive.events.find(({ type }) => type === "message.received")).toMatchObject({ after: ["parent/m3"] });
    drive.done("parents", found("completed"));
    expect(drive.types).toEqual(["dependency.met", "turn.started", "model.started", "session.state"]);
    expect(drive.at).toBe("thinking");
    expect(drive.out).toEqual([]);
    expect(drive.replayed().saved).toEqual(drive.saved);
    expectInvariants(drive);
  });

  test.each([
    ["failed", "whose turn failed"],
    ["cancelled", "whose turn was cancelled"],
    ["gone", "whose turn is gone"],
  ] as const)("DP2: a parent that %s skips it by name, and the next message has its turn", (end: ParentEnd, words) => {
    const drive = comingAfter();
    drive.send("and this");
    drive.done("parents", { ...found("completed"), parents: [{ session: "other", message: "m9", end: "open" }, ...found(end).parents] });
    expect(drive.told[0]).toEqual({
      type: "turn.failed",
      turn: 1,
      reason: "dependency_failed",
      message: `it comes after message m3 of session parent, ${words}`,
      details: { parent: { ...PARENT, end } },
    });
    expect([drive.at, drive.context.turn]).toEqual(["thinking", 2]);
    expect(drive.prompt, "what was skipped is not in the prompt").toHaveLength(1);
    expectInvariants(drive);
  });

  test("an open parent is asked once to tell; told, or after a while, it looks again; meanwhile it says what it waits for", () => {
    const drive = comingAfter();
    drive.done("parents", found("open"));
    expect(drive.out).toMatchObject([ASK]);
    expect(waits(drive)).toBe("waits for dependency: message m3 of session parent");
    expect(drive.core.definition.waitsFor?.(drive.view)).toMatchObject({ for: "dependency", parents: [PARENT] });
    drive.send("behind it");
    expect(waits(drive)).toBe("waits for dependency: message m3 of session parent; 1 message waits");
    drive.tell("dependency.told", PARENT);
    expect(drive.running).toEqual(["parents"]);
    drive.done("parents", found("open")); // read before its end was there
    for (const wait_ms of [...LOOK_AGAIN_MS.slice(1), ...LOOK_AGAIN_MS.slice(-1)]) {
      const [timer] = Object.values(drive.state.timers).filter(({ inst }) => inst.includes("look_again"));
      expect(timer?.due_ms).toBe(drive.at_ms + wait_ms);
      drive.fire("look_again");
      drive.done("parents", found("open"));
    }
    expect(drive.out, "asked once").toHaveLength(1);
    drive.tell("dependency.told", PARENT);
    drive.done("parents", found("completed"));
    expect(drive.at).toBe("thinking");
    expectInvariants(drive);
  });

  test("told while it looks, it looks anew: what it read may be older than what it was told", () => {
    const drive = comingAfter();
    const first = drive.instOf("parents");
    drive.tell("dependency.told", PARENT);
    expect(drive.instOf("parents")).not.toBe(first);
    expect(drive.types).toEqual([]);
  });

  test("a look that fails is made again, and is no reason to skip", () => {
    const drive = comingAfter();
    drive.fail("parents", { code: "unavailable", message: "away" });
    expect(waits(drive)).toMatch(/^waits for dependency: it could not be looked/);
    drive.fire("look_again");
    drive.done("parents", found("completed"));
    expect(drive.at).toBe("thinking");
  });

  test("a lost look is made again with its worker's successor", () => {
    const drive = comingAfter();
    drive.claim();
    expect(drive.state.running["parents"]).toMatchObject({ attempt: 2 });
  });

  test("it can be given up, paused and taken up again, and an interrupting message goes before it", () => {
    const drive = comingAfter();
    drive.done("parents", found("open"));
    drive.tell("session.pause");
    drive.tell("session.resume");
    drive.done("parents", found("open"));
    expect(drive.out, "asked once, however often it begins to wait").toHaveLength(1);
    drive.send("now!", { on_busy: "interrupt" });
    expect([drive.at, drive.context.turn]).toEqual(["thinking", 2]);
    drive.done("model", answer("there"));
    expect(drive.at).toBe("awaiting_dependency");
    drive.tell("turn.cancel", { reason: "never mind" });
    expect(drive.told[0]).toMatchObject({ type: "turn.cancelled", turn: 1, reason: "never mind" });
    expect(drive.at).toBe("idle");
    expectInvariants(drive);
  });

  test("a session of mode single ends with the turn that was skipped", () => {
    const drive = comingAfter({ mode: "single" });
    drive.done("parents", found("failed"));
    expect([drive.at, drive.context.reason]).toEqual(["terminated", "single turn failed"]);
  });

  test("behind a turn that runs it waits for its own turn first, and looks only then", () => {
    const drive = thinking();
    drive.send("then", { after: [PARENT] });
    expect(drive.running).toEqual(["model"]);
    drive.done("model", answer("there"));
    expect(drive.at).toBe("awaiting_dependency");
  });

  test("what waits too long ends with its session", () => {
    const drive = comingAfter();
    drive.done("parents", found("open"));
    drive.fire("suspended_ttl");
    expect(drive.at).toBe("terminated");
    expect(drive.told.filter(({ type }) => type === "turn.cancelled")).toHaveLength(1);
    expectInvariants(drive);
  });
});

describe("the one that is asked", () => {
  const asker = (message: string, n = 0): Parameters<SessionDrive["tell"]>[1] => ({ session: "a1", message, from: `acme/session/child${n}` });
  const told = (message: string, n = 0): object => ({ to: `acme/session/child${n}`, type: "dependency.told", body: { session: "a1", message } });

  test.each([
    ["completes", thinking, (drive: SessionDrive) => drive.done("model", answer("there"))],
    ["fails", thinking, (drive: SessionDrive) => drive.fail("model", { code: "provider_unavailable", message: "away" })],
    ["is cancelled", acting, (drive: SessionDrive) => drive.tell("turn.cancel")],
    ["ends with its session", thinking, (drive: SessionDrive) => drive.tell("session.terminate")],
  ] as const)("tells in the commit in which the turn %s, and once", (_, begin, end) => {
    const drive = begin();
    const [message] = drive.events.filter(({ type }) => type === "message.received").map(({ message_id }) => String(message_id));
    drive.tell("dependency.ask", asker(message ?? ""));
    drive.tell("dependency.ask", asker(message ?? ""));
    drive.tell("dependency.ask", asker(message ?? "", 1));
    expect(drive.out.filter(({ type }) => type === "dependency.told")).toEqual([]);
    end(drive);
    expect(drive.out.filter(({ type }) => type === "dependency.told")).toMatchObject([told(message ?? ""), told(message ?? "", 1)]);
    expect(drive.context.askers).toEqual({});
    expect(drive.replayed().saved).toEqual(drive.saved);
  });

  test("a turn that waits is told of when it has ended; of one that is over, or never was, it tells at once", () => {
    const drive = thinking();
    const { message_id } = drive.send("next");
    drive.tell("dependency.ask", asker(String(message_id)));
    drive.done("model", answer("there"));
    expect(drive.out.filter(({ type }) => type === "dependency.told")).toEqual([]);
    drive.done("model", answer("and there"));
    expect(drive.out.filter(({ type }) => type === "dependency.told")).toMatchObject([told(String(message_id))]);
    drive.tell("dependency.ask", asker(String(message_id)));
    drive.tell("dependency.ask", asker("m999"));
    expect(drive.out.filter(({ type }) => type === "dependency.told").slice(1)).toMatchObject([told(String(message_id)), told("m999")]);
  });

  test("a turn that is skipped is told of too: who comes after it is skipped in its turn", () => {
    const drive = comingAfter();
    const message = String(drive.events.find(({ type }) => type === "message.received")?.["message_id"]);
    drive.done("parents", found("open"));
    drive.tell("dependency.ask", asker(message));
    drive.tell("dependency.told", PARENT);
    drive.done("parents", found("failed"));
    expect(drive.out.at(-1)).toMatchObject(told(message));
  });

  test("DP4: who asks beyond the bound is told at once, and looks by itself", () => {
    const drive = thinking();
    drive.thorough = false;
    const message = String(drive.events.find(({ type }) => type === "message.received")?.["message_id"]);
    for (let n = 0; n <= ASKERS_MAX; n++) drive.tell("dependency.ask", asker(message, n));
    expect(drive.out.filter(({ type }) => type === "dependency.told")).toMatchObject([told(message, ASKERS_MAX)]);
  });
});

test("sessions that never heard of any of this keep the state they had", () => {
  const drive = idle();
  drive.send();
  drive.done("model", answer("there"));
  expect(Object.keys(drive.context)).not.toContain("dependency");
  expect(Object.keys(drive.context)).not.toContain("askers");
  expect(Object.keys(session().done("configuration", configuration()).context)).not.toContain("askers");
});
