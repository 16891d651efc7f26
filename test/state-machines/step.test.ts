// Goal: the step keeps S1 to S4 for any machine, and knows a command again.
// Method: a machine made for it, with every kind of action; identities at their bounds; S1 and S3 are checked at each step by drive.ts.
import { assign, emit, raise, setup, spawnChild } from "xstate";
import { describe, expect, test } from "vitest";
import { BrokenPromise } from "../../protocol/assert.ts";
import { errorBody } from "../../protocol/errors.ts";
import type { Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { IDEMPOTENCY_KEEP_MS, IDEMPOTENCY_KEYS_MAX } from "../../protocol/limits.ts";
import {
  type ActorDefinition,
  type BaseContext,
  type CommandEvent,
  type CreationInput,
  effect,
  type EffectError,
  type Emitted,
  groupFailed,
  type GroupResult,
  type Now,
} from "../../state-machines/definition.ts";
import { type ActorState, type Core, coreOf, type Identity, commandHash, recognise, type Step } from "../../state-machines/step.ts";
import { Drive } from "./drive.ts";

interface ProbeContext extends BaseContext {
  readonly errors: readonly string[];
  readonly seen: readonly Now[];
}
type ProbeEvent =
  | CommandEvent<"begin" | "note" | "again" | "finish" | "wait" | "spawn" | "inside" | "deeper">
  | { type: "waited" }
  | GroupResult<"risky", string>;

/** A machine with one of everything: an effect that is repeated, some that may have acted, sends, delays, and a history. */
const probe = setup({
  types: {} as { context: ProbeContext; events: ProbeEvent; emitted: Emitted; input: CreationInput },
  actors: { safe: effect<{ at: number }, string>(), risky: effect<{ at: number }, string>() },
  delays: { patience: 5_000 },
  actions: {
    note: assign({ seen: ({ context }) => [...context.seen, context.now] }),
    remember_error: assign({ errors: ({ context }, { error }: { error: EffectError }) => [...context.errors, `${error.code}: ${error.message}`] }),
    send: emit((_: unknown, { to }: { to: string }) => ({ type: "send" as const, to, command: "hear", body: { said: to } })),
  },
}).createMachine({
  id: "session",
  version: "7",
  context: ({ input }) => ({ now: input.now, errors: [], seen: [] }),
  initial: "resting",
  on: {
    note: { actions: "note" },
    finish: { target: ".over" },
    wait: { actions: raise({ type: "waited" }, { delay: "patience" }) },
    waited: { actions: "note" },
    spawn: { actions: spawnChild("risky", { id: ({ context }) => `risky.${context.now.seq}`, input: ({ context }) => ({ at: context.now.seq }) }) },
    [groupFailed("risky")]: {
      actions: [
        { type: "remember_error", params: ({ event }) => ({ error: event.error }) },
        { type: "send", params: { to: "acme/session/s2" } },
      ],
    },
  },
  states: {
    resting: {
      id: "resting",
      on: { begin: { target: "busy", actions: { type: "send", params: { to: "acme/budget/main" } } }, inside: { target: "nested.former" } },
    },
    nested: {
      id: "nested",
      initial: "shallow",
      on: { begin: { target: "resting" } },
      states: { shallow: { on: { deeper: { target: "deep" } } }, deep: {}, former: { type: "history" } },
    },
    busy: {
      id: "busy",
      invoke: [
        {
          id: "safe",
          src: "safe",
          input: ({ context }) => ({ at: context.now.seq }),
          onDone: { actions: "note" },
          onError: { actions: { type: "remember_error", params: ({ event }) => ({ error: event.error as EffectError }) } },
        },
        {
          id: "risky",
          src: "risky",
          input: ({ context }) => ({ at: context.now.seq }),
          onDone: { target: "resting" },
          onError: {
            actions: [
              { type: "remember_error", params: ({ event }) => ({ error: event.error as EffectError }) },
              { type: "send", params: { to: "acme/tenant/main" } },
              { type: "send", params: { to: "acme/budget/main" } },
            ],
          },
        },
      ],
      after: { patience: { target: "resting" } },
      on: { again: { target: "busy", reenter: true } },
    },
    over: { id: "over", type: "final" },
  },
});

const definition: ActorDefinition = {
  kind: "session",
  machine: probe,
  creates: "begin",
  effects: { safe: { lost: () => "retry", superseded: (_, attempt) => ({ type: "void", attempt }) }, risky: { lost: () => "ambiguous" } },
  waits: ({ state }) => `waits in ${state}`,
  moved: ({ before, after }) => ({ type: "moved", from: before.state, to: after.state }),
};

const busy = (): Drive => {
  const drive = new Drive(definition).create({});
  drive.tell("begin");
  return drive;
};

describe("the ledger", () => {
  test("names an effect by the entry that began it, fixes its input, and forgets it with its result (S2, S4)", () => {
    const drive = busy();
    expect(drive.state.running).toEqual({
      safe: { inst: "2:safe", src: "safe", input: { at: 2 }, attempt: 1 },
      risky: { inst: "2:risky", src: "risky", input: { at: 2 }, attempt: 1 },
    });
    drive.tell("note");
    drive.done("safe", "x");
    expect(drive.running).toEqual(["risky"]);
    expect(drive.at, "a result without a target leaves the state").toBe("busy");
    drive.done("risky", "x");
    expect([drive.at, drive.state.running, drive.state.timers]).toEqual(["resting", {}, {}]);
  });

  test("begins an effect anew under a new inst when its state is entered again, and the old result is stale (S2)", () => {
    const drive = busy();
    const old = drive.instOf("risky");
    drive.tell("again");
    expect(drive.instOf("risky")).toBe("3:risky");
    for (const entry of [
      { t: "done", inst: old, output: "x" } as const,
      { t: "fail", inst: old, error: { code: "c", message: "m" } } as const,
      { t: "timer", inst: "2:xstate.after.patience.busy" } as const,
    ]) {
      expect(drive.core.awaits(drive.state, entry)).toBe(false);
      const before = drive.saved;
      drive.apply(entry);
      expect(drive.told).toEqual([]);
      expect(drive.saved).toEqual({ ...before, seq: before.seq + 1 });
    }
    expect(drive.core.awaits(drive.state, { t: "done", inst: "3:risky", output: 1 })).toBe(true);
  });

  test("holds timers by their absolute time, and drops them with their state", () => {
    const drive = busy();
    expect(drive.state.timers).toEqual({
      "xstate.after.patience.busy": { inst: "2:xstate.after.patience.busy", due_ms: drive.at_ms + 5_000, event: { type: "xstate.after.patience.busy" } },
    });
    drive.later(1_000).tell("again");
    expect(Object.values(drive.state.timers)).toMatchObject([{ inst: "3:xstate.after.patience.busy", due_ms: drive.at_ms + 5_000 }]);
    drive.fire("patience");
    expect([drive.at, drive.state.timers, drive.state.running]).toEqual(["resting", {}, {}]);
  });

  test("S3: an actor that has ended has nothing in flight, and awaits nothing", () => {
    const drive = busy();
    const inst = drive.instOf("safe");
    drive.tell("finish");
    expect([drive.view.final, drive.state.running, drive.state.timers]).toEqual([true, {}, {}]);
    for (const entry of [{ t: "done", inst, output: 1 } as const, { t: "command", type: "note", body: {}, channel: "command" } as const])
      expect(drive.core.awaits(drive.state, entry)).toBe(false);
    expect(drive.refusal("note")).toMatchObject({ code: "illegal_transition", details: { state: "over", command: "note" } });
  });

  test("S3: nor what outlives its state: a delayed event and a spawned effect", () => {
    const drive = new Drive(definition).create({});
    drive.tell("wait");
    drive.tell("spawn");
    expect(drive.state.timers).toEqual({ "raise.waited": { inst: "2:raise.waited", due_ms: drive.at_ms + 5_000, event: { type: "waited" } } });
    expect(drive.state.running).toEqual({ "risky.3": { inst: "3:risky.3", src: "risky", input: { at: 3 }, attempt: 1 } });
    const other = drive.copyTo(new Drive(definition));
    drive.tell("finish");
    expect([drive.state.running, drive.state.timers]).toEqual([{}, {}]);
    other.fire("waited");
    expect((other.view.context as unknown as ProbeContext).seen).toHaveLength(1);
    expect(other.state.timers).toEqual({});
  });

  test("comes back from a snapshot with where it was inside a state", () => {
    const drive = new Drive(definition).create({});
    for (const command of ["inside", "deeper", "begin", "inside"]) drive.tell(command);
    expect([drive.at, drive.saved.value]).toEqual(["nested", { nested: "deep" }]);
  });

  test("tells the machine the attempts of what was in flight, that of an effect that just ended too", () => {
    const drive = busy().claim(["safe"]);
    drive.done("safe", "x");
    expect((drive.view.context as unknown as ProbeContext).seen).toEqual([{ seq: 4, at_ms: drive.at_ms, attempts: { safe: 2, risky: 1 } }]);
  });
});

describe("what goes out", () => {
  test("has ids that count over one entry, and tells a move last", () => {
    const drive = busy();
    expect(drive.out).toEqual([{ id: "2.0", to: "acme/budget/main", type: "hear", body: { said: "acme/budget/main" } }]);
    expect(drive.told).toEqual([{ type: "moved", from: "resting", to: "busy" }]);
    drive.fail("risky", { code: "no", message: "way" });
    expect(drive.out.slice(1).map(({ id, to }) => [id, to])).toEqual([
      ["3.0", "acme/tenant/main"],
      ["3.1", "acme/budget/main"],
    ]);
  });
});

describe("a claim", () => {
  test("repeats what may be repeated as the next attempt and hands back the rest as ambiguous, in one entry", () => {
    const drive = busy().claim();
    expect(drive.state.running).toEqual({ safe: { inst: "2:safe", src: "safe", input: { at: 2 }, attempt: 2 } });
    expect((drive.view.context as unknown as ProbeContext).errors).toEqual(["ambiguous: the worker was lost while this ran; it may have acted"]);
    expect(drive.told).toEqual([{ type: "void", attempt: 1 }]);
    expect(drive.out.slice(1).map(({ id }) => id)).toEqual(["3.0", "3.1"]);
    expect(drive.state.epoch).toBe(2);
  });

  test("counts the ids of what goes out over all that it hands back", () => {
    const drive = busy();
    drive.tell("spawn");
    drive.claim();
    expect(drive.out.slice(1).map(({ id, to }) => [id, to])).toEqual([
      ["4.0", "acme/tenant/main"],
      ["4.1", "acme/budget/main"],
      ["4.2", "acme/session/s2"],
    ]);
  });

  test("leaves alone what it does not name, and insts that are no more", () => {
    const drive = busy();
    const running = drive.state.running;
    drive.epoch = 2;
    drive.apply({ t: "claim", from: "w1", reason: "moved", lost: ["1:gone"] });
    expect(drive.state.running).toEqual(running);
  });
});

describe("frames", () => {
  const next = (drive: Drive, change: Partial<{ seq: number; at_ms: number; epoch: number }>): (() => Step) => {
    const frame = { seq: drive.seq + 1, at_ms: drive.at_ms, epoch: drive.epoch, worker: "w1", ...change };
    return () => drive.core.apply(drive.state, drive.actor, { t: "command", type: "note", body: {}, channel: "command" }, frame);
  };
  test("that skip an entry, go back in time or in epoch break a promise", () => {
    const drive = busy();
    expect(next(drive, {})).not.toThrow();
    for (const change of [{ seq: 2 }, { seq: 4 }, { at_ms: drive.at_ms - 1 }, { epoch: 0 }]) expect(next(drive, change)).toThrow(BrokenPromise);
  });
  test("of a second creation, or of an actor that is not there, break a promise", () => {
    const drive = busy();
    const entry: Entry = { t: "init", type: "begin", body: {}, channel: "command" };
    expect(() => drive.core.apply(drive.state, drive.actor, entry, { seq: 3, at_ms: drive.at_ms, epoch: 1, worker: "w" })).toThrow(BrokenPromise);
    expect(() => drive.core.apply(undefined, drive.actor, { t: "timer", inst: "x" }, { seq: 1, at_ms: 1, epoch: 1, worker: "w" })).toThrow(BrokenPromise);
  });
  test("of an upgrade lead only to a machine that this process knows", () => {
    const drive = busy();
    const before = drive.saved;
    drive.apply({ t: "upgrade", to: "session@7" });
    expect(drive.saved).toEqual({ ...before, seq: 3 });
    expect(() => drive.apply({ t: "upgrade", to: "session@8" })).toThrow(BrokenPromise);
  });
  test("a snapshot of another version is not loaded", () => {
    const drive = busy();
    expect(() => drive.core.load({ ...drive.saved, machine: "session@6" })).toThrow(BrokenPromise);
  });
});

// ── identity ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Commands one after another, as the host journals them. */
class Inbox {
  readonly core: Core = coreOf(definition);
  readonly actor = { tenant: "acme", kind: "session", id: "s" } as const;
  at_ms = 1_000_000;
  state: ActorState;
  constructor() {
    this.state = this.core.apply(undefined, this.actor, { t: "init", type: "begin", body: {}, channel: "control" }, this.frame(1)).state;
  }
  private frame(seq: number) {
    return { seq, at_ms: this.at_ms, epoch: 1, worker: "w" };
  }
  take(identity: Partial<Identity> = {}, body: JsonObject = {}): void {
    const { channel = "command", key, source } = identity;
    const entry: Entry = { t: "command", type: "note", body, channel, ...(key === undefined ? {} : { key }), ...(source === undefined ? {} : { source }) };
    this.state = this.core.apply(this.state, this.actor, entry, this.frame(this.state.seq + 1)).state;
  }
  refuse(code: "busy" | "illegal_transition" | "conflict", identity: Partial<Identity> = {}, body: JsonObject = {}): void {
    const { channel = "command", key, source } = identity;
    const hash = commandHash("note", body);
    const entry: Entry = {
      t: "refused",
      type: "note",
      hash,
      error: errorBody(code, "no"),
      channel,
      ...(key === undefined ? {} : { key }),
      ...(source === undefined ? {} : { source }),
    };
    this.state = this.core.apply(this.state, this.actor, entry, this.frame(this.state.seq + 1)).state;
  }
  knows(identity: Partial<Identity>, body: JsonObject = {}): string {
    return recognise(this.state, { channel: "command", type: "note", hash: commandHash("note", body), ...identity }).kind;
  }
}

const from = (seq: number, incarnation = "i1", stream = "COMMANDS") => ({ stream, incarnation, seq });

describe("a command is known again", () => {
  test("by its key, with the outcome its sender heard", () => {
    const inbox = new Inbox();
    inbox.take({ key: "k" }, { a: 1 });
    expect(recognise(inbox.state, { channel: "command", key: "k", type: "note", hash: commandHash("note", { a: 1 }) })).toEqual({
      kind: "repeat",
      outcome: { ok: true, seq: 2, state: "resting", result: {} },
    });
    expect(inbox.knows({ key: "other" }, { a: 1 })).toBe("new");
    expect(inbox.knows({})).toBe("new");
  });

  test("with another body under the same key only as a conflict, which does not displace the first outcome", () => {
    const inbox = new Inbox();
    inbox.take({ key: "k" }, { a: 1 });
    expect(inbox.knows({ key: "k" }, { a: 2 })).toBe("conflict");
    inbox.refuse("conflict", { key: "k" }, { a: 2 });
    expect(inbox.knows({ key: "k" }, { a: 1 })).toBe("repeat");
    expect(inbox.knows({ key: "k" }, { a: 2 })).toBe("conflict");
  });

  test("apart on each channel, so that a tenant cannot use up a key of ours", () => {
    const inbox = new Inbox();
    inbox.take({ key: "k", channel: "command" });
    expect(inbox.knows({ key: "k", channel: "control" })).toBe("new");
  });

  test("a refusal that lasts is remembered, one that may end is decided anew", () => {
    const inbox = new Inbox();
    inbox.refuse("illegal_transition", { key: "lasting" });
    inbox.refuse("busy", { key: "passing" });
    expect([inbox.knows({ key: "lasting" }), inbox.knows({ key: "passing" })]).toEqual(["repeat", "new"]);
    inbox.take({ key: "passing" });
    expect(inbox.knows({ key: "passing" })).toBe("repeat");
  });

  test("among the last 1,000 keys", () => {
    const inbox = new Inbox();
    for (let n = 0; n <= IDEMPOTENCY_KEYS_MAX; n++) inbox.take({ key: `k${n}` });
    expect(inbox.state.seen.keys).toHaveLength(IDEMPOTENCY_KEYS_MAX);
    expect([inbox.knows({ key: "k0" }), inbox.knows({ key: "k1" }), inbox.knows({ key: `k${IDEMPOTENCY_KEYS_MAX}` })]).toEqual(["new", "repeat", "repeat"]);
  });

  test("for seven days", () => {
    const inbox = new Inbox();
    inbox.take({ key: "old" });
    inbox.at_ms += 1;
    inbox.take({ key: "younger" });
    inbox.at_ms += IDEMPOTENCY_KEEP_MS;
    inbox.take({ key: "new" });
    expect([inbox.knows({ key: "old" }), inbox.knows({ key: "younger" })]).toEqual(["new", "repeat"]);
    inbox.at_ms += 1;
    inbox.take({ key: "newer" });
    expect(inbox.state.seen.keys.map(({ key }) => key)).toEqual(["command:new", "command:newer"]);
  });

  test("by its place in the stream, of which only the newest incarnation counts", () => {
    const inbox = new Inbox();
    inbox.take({ source: from(5) });
    inbox.take({ source: from(7, "t1", "TIMERS") });
    expect([inbox.knows({ source: from(4) }), inbox.knows({ source: from(5) }), inbox.knows({ source: from(6) })]).toEqual(["repeat", "repeat", "new"]);
    inbox.refuse("busy", { source: from(6) });
    expect(inbox.knows({ source: from(6) })).toBe("repeat");
    inbox.take({ source: from(1, "i2") });
    expect(inbox.state.seen.marks).toEqual({ "COMMANDS@i2": 1, "TIMERS@t1": 7 });
    expect([inbox.knows({ source: from(2, "i2") }), inbox.knows({ source: from(7, "t1", "TIMERS") })]).toEqual(["new", "repeat"]);
  });

  test("by a mark that never falls, though a keyed command may come again from behind it", () => {
    const inbox = new Inbox();
    inbox.take({ source: from(9) });
    inbox.take({ key: "late", source: from(5) });
    expect(inbox.knows({ source: from(9) })).toBe("repeat");
  });

  test("by its key first: a redelivery under a new place is the same command", () => {
    const inbox = new Inbox();
    inbox.take({ key: "k", source: from(5) });
    expect(inbox.knows({ key: "k", source: from(9) })).toBe("repeat");
  });
});
