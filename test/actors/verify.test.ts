// Goal: every kind of broken promise that can stand in a stream is found and named by its invariant; a clean stream has none.
// Method: a small machine with an effect, a timer and an outgoing message writes clean journals through the pure core; each test
// plants one fault in the bytes and reads what the verifier says.
import { describe, expect, test } from "vitest";
import { assign, emit, setup } from "xstate";
import { type AuditView, verifyActor, verifyAll, type Violation } from "../../actors/verify.ts";
import type { StoredMessage, StreamName } from "../../bus/port.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { decodeJournal, encodeJournal, type Entry, type JournalMessage } from "../../protocol/journal.ts";
import { hashOf } from "../../protocol/json.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { type ActorDefinition, effect, type Emitted } from "../../state-machines/definition.ts";
import { type ActorState, commandHash, type Core, coreOf, outerState } from "../../state-machines/step.ts";

const machine = setup({
  types: {
    context: {} as { now: { seq: number; at_ms: number }; tenant: string; asked: number },
    input: {} as { actor: ActorAddress; now: { seq: number; at_ms: number } },
    emitted: {} as Emitted,
    events: {} as { type: "message.send"; body: { content: string } } | { type: "session.pause" } | { type: "too_late" } | { type: "session.terminate" },
  },
  actors: { work: effect<{ asked: number }, { text: string }>() },
  delays: { patience: 60_000 },
  actions: {
    tellStarted: emit(({ context }) => ({ type: "tell", event: { type: "turn.started", turn: context.asked } }) as const),
    sendSettled: emit(({ context }) => ({ type: "send", to: `${context.tenant}/budget/main`, command: "budget.settle", body: { amount: 1 } }) as const),
    count: assign({ asked: ({ context }) => context.asked + 1 }),
  },
}).createMachine({
  id: "session",
  version: "1",
  context: ({ input }) => ({ now: input.now, tenant: input.actor.tenant, asked: 0 }),
  initial: "idle",
  states: {
    idle: { on: { "message.send": { target: "thinking", actions: ["count", "tellStarted"] }, "session.pause": "paused", "session.terminate": "terminated" } },
    thinking: {
      invoke: {
        id: "work",
        src: "work",
        input: ({ context }) => ({ asked: context.asked }),
        onDone: { target: "idle", actions: "sendSettled" },
        onError: "idle",
      },
      after: { patience: "unhealthy" },
    },
    paused: {},
    unhealthy: {},
    terminated: { type: "final" },
  },
});

const definition: ActorDefinition = {
  kind: "session",
  machine,
  creates: "session.create",
  effects: { work: { lost: () => "retry" } },
  // `paused` waits for nobody that could be named: it is what A6 must find.
  waits: (view) => ({ idle: "for a message", unhealthy: "for an operator" })[view.state],
};
const core = coreOf(definition);
const cores = { session: core };

const s1: ActorAddress = { tenant: "acme", kind: "session", id: "s1" };
const s2: ActorAddress = { tenant: "globex", kind: "session", id: "s2" };
const AT_MS = Date.UTC(2026, 10, 21);

const source = (seq: number) => ({ stream: "COMMANDS", incarnation: "i1", seq });
const create: Entry = { t: "init", type: "session.create", body: { agent: "a" }, channel: "command", source: source(1) };
const say = (content: string, seq: number, key?: string): Entry => ({
  t: "command",
  type: "message.send",
  body: { content },
  channel: "command",
  source: source(seq),
  ...(key === undefined ? {} : { key }),
});
const done = (inst: string): Entry => ({ t: "done", inst, output: { text: "well" } });

/** Streams in memory, as the verifier reads them. */
function createStreams() {
  const messages: StoredMessage[] = [];
  const store = (stream: StreamName, subject: string, data: Uint8Array) =>
    void messages.push({ stream, subject, data, sequence: 1 + messages.filter((one) => one.stream === stream).length, headers: {}, stored_at_ms: AT_MS });
  const matches = (filter: string, subject: string) => filter.split(".").every((token, index) => token === "*" || token === subject.split(".")[index]);
  return {
    messages,
    store,
    event: (message: JournalMessage, subject = actorSubject(message.actor, "event")) => store("EVENTS", subject, encodeJournal(message)),
    async *read(stream: StreamName, filter: string, from: number, to = Number.POSITIVE_INFINITY) {
      yield* messages.filter((one) => one.stream === stream && matches(filter, one.subject) && one.sequence >= from && one.sequence <= to);
    },
    bounds: async (stream: StreamName) => {
      const count = messages.filter((one) => one.stream === stream).length;
      return { first_sequence: 1, last_sequence: count, incarnation: "i1", messages: count, bytes: 0 };
    },
  };
}

/** Journals as a host writes them: one message per call of `commit`. */
function createWriter(actor: ActorAddress) {
  let state: ActorState | undefined;
  let at_ms = AT_MS;
  return {
    state: () => state as ActorState,
    commit(entries: readonly Entry[], { epoch = 1, worker = "w1" } = {}): JournalMessage {
      at_ms += 10;
      const events: JournalMessage["events"][number][] = [];
      const out: JournalMessage["out"][number][] = [];
      for (const entry of entries) {
        const step = core.apply(state, actor, entry, { seq: (state?.seq ?? 0) + 1, at_ms, epoch, worker });
        state = step.state;
        events.push(...step.events);
        out.push(...step.out);
      }
      const seq = state?.seq ?? 0;
      const at = new Date(at_ms).toISOString();
      return {
        v: 1,
        actor,
        seq,
        epoch,
        worker,
        machine: "session@1",
        at,
        entries,
        state: outerState(this.state().snapshot),
        events,
        out,
        out_confirmed_seq: 0,
      };
    },
  };
}

/** A journal in which everything happens once: created, asked, done, asked again under a new owner, claimed, done. */
function cleanJournal(actor: ActorAddress): { messages: JournalMessage[]; states: ActorState[] } {
  const writer = createWriter(actor);
  const states: ActorState[] = [];
  const commit = (entries: readonly Entry[], owner?: { epoch: number; worker: string }) => {
    const message = writer.commit(entries, owner);
    states.push(writer.state());
    return message;
  };
  const messages = [
    commit([create, say("hello", 2, "k1")]),
    commit([done("2:work")]),
    commit([say("again", 3)]),
    commit([{ t: "claim", from: "w1", reason: "w1 is dead", lost: ["4:work"] }], { epoch: 2, worker: "w2" }),
    commit([done("4:work")], { epoch: 2, worker: "w2" }),
  ];
  return { messages, states };
}

async function verify(
  plant: (streams: ReturnType<typeof createStreams>) => void,
  options: { cores?: { session: Core }; audit?: AuditView; passes?: number } = {},
) {
  const streams = createStreams();
  plant(streams);
  const violations: Violation[] = [];
  const report = await verifyAll({ bus: streams, cores, report: (violation) => violations.push(violation), ...options });
  return { report, violations, named: violations.map((one) => one.invariant) };
}

/** The clean journal with one message changed. */
function withChange(index: number, change: (message: JournalMessage) => JournalMessage) {
  return (streams: ReturnType<typeof createStreams>) =>
    cleanJournal(s1).messages.forEach((message, at) => streams.event(at === index ? change(message) : message));
}
/** The clean journal, and one more message that stands where the next would. */
function withNext(entries: readonly Entry[], over: Partial<JournalMessage> = {}) {
  return (streams: ReturnType<typeof createStreams>) => {
    const { messages } = cleanJournal(s1);
    for (const message of messages) streams.event(message);
    const last = messages.at(-1) as JournalMessage;
    streams.event({ ...last, seq: last.seq + entries.length, entries, events: [], out: [], ...over });
  };
}
function snapshotOf(state: ActorState, last_sequence: number, change: (saved: ReturnType<Core["save"]>) => object = (saved) => saved): Uint8Array {
  return new TextEncoder().encode(JSON.stringify({ saved: change(core.save(state)), last_sequence, last: {} }));
}

describe("a clean stream", () => {
  test("has no violation, and everything in it was looked at", async () => {
    const { violations, report } = await verify((streams) => {
      const [one, other] = [cleanJournal(s1), cleanJournal(s2)];
      one.messages.forEach((message, index) => {
        streams.event(message);
        streams.event(other.messages[index] as JournalMessage);
      });
      streams.store("SNAPSHOTS", actorSubject(s1, "snapshot"), snapshotOf(one.states[2] as ActorState, 5));
    });
    expect(violations).toEqual([]);
    expect(report).toMatchObject({ actors: 2, messages: 10, entries: 12, snapshots: 1, through_sequence: 10 });
  });

  test("is read in parts when passes are asked for, with the same result", async () => {
    const plant = (streams: ReturnType<typeof createStreams>) => {
      for (let n = 0; n < 10; n += 1) for (const message of cleanJournal({ ...s1, id: `s${n}` }).messages) streams.event(message);
    };
    const [whole, parts] = [await verify(plant), await verify(plant, { passes: 4 })];
    expect(whole.violations).toEqual([]);
    expect(parts.violations).toEqual([]);
    expect(parts.report).toEqual(whole.report);
    expect(parts.report).toMatchObject({ actors: 10, messages: 50 });
  });

  test("of one actor is read alone", async () => {
    const streams = createStreams();
    for (const actor of [s1, s2]) for (const message of cleanJournal(actor).messages) streams.event(message);
    const violations: Violation[] = [];
    expect(await verifyActor(s1, { bus: streams, cores, report: (one) => violations.push(one) })).toMatchObject({ actors: 1, messages: 5, violations: 0 });
    expect(violations).toEqual([]);
  });
});

describe("what is planted is found and named", () => {
  test("J1: a message that is missing", async () => {
    const { violations } = await verify((streams) => cleanJournal(s1).messages.forEach((message, at) => at !== 1 && streams.event(message)));
    expect(violations[0]).toEqual({ invariant: "J1", actor: "acme/session/s1", stream_sequence: 2, seq: 4, what: "seq goes from 2 to 4" });
  });

  test("J1: a journal that does not begin at its beginning", async () => {
    const { violations } = await verify((streams) => cleanJournal(s1).messages.forEach((message, at) => at > 0 && streams.event(message)));
    expect(violations[0]).toMatchObject({ invariant: "J1", seq: 3, what: "the journal begins with seq 3" });
  });

  test("J1: a message that stands there twice, and the rest is looked at all the same", async () => {
    const { violations, named } = await verify((streams) =>
      cleanJournal(s1).messages.forEach((message, at) => {
        streams.event(message);
        if (at === 1) streams.event(message);
        if (at === 4) streams.event({ ...message, seq: message.seq + 1, entries: [done("4:work")], events: [], out: [] });
      }),
    );
    expect(violations[0]).toMatchObject({ invariant: "J1", stream_sequence: 3, what: "seq 3 stands here again after 3" });
    expect(named).toEqual(["J1", "A3"]);
  });

  test("J2: an epoch that falls", async () => {
    const { violations } = await verify(withChange(4, (message) => ({ ...message, epoch: 1, worker: "w1" })));
    expect(violations).toEqual([{ invariant: "J2", actor: "acme/session/s1", stream_sequence: 5, seq: 6, what: "epoch falls from 2 to 1" }]);
  });

  test("J2: time that falls", async () => {
    const { violations } = await verify(withChange(4, (message) => ({ ...message, at: "2026-11-20T00:00:00.000Z" })));
    expect(violations).toMatchObject([{ invariant: "J2", what: "time falls from 2026-11-21T00:00:00.040Z to 2026-11-20T00:00:00.000Z" }]);
  });

  test("J3: bytes that are no journal message", async () => {
    const { violations } = await verify((streams) => {
      withChange(-1, (message) => message)(streams);
      streams.store("EVENTS", actorSubject(s1, "event"), new TextEncoder().encode("{"));
      streams.store("EVENTS", actorSubject(s2, "event"), new TextEncoder().encode('{"v":1,"seq":1,"epoch":1}'));
      streams.event({ ...(cleanJournal({ ...s1, id: "s3" }).messages[0] as JournalMessage), entries: [] });
    });
    expect(violations.map((one) => [one.invariant, one.actor])).toEqual([
      ["J3", "acme/session/s1"],
      ["J3", "globex/session/s2"],
      ["J3", "acme/session/s3"],
    ]);
    expect(violations.at(-1)?.what).toBe("it is no journal message: it holds no entry");
  });

  test("J3: a message of another actor of the same tenant", async () => {
    const { violations } = await verify(withChange(2, (message) => message));
    expect(violations).toEqual([]);
    const planted = await verify((streams) =>
      cleanJournal(s1).messages.forEach((message, at) =>
        streams.event(at === 2 ? { ...message, actor: { ...s1, id: "s9" } } : message, actorSubject(s1, "event")),
      ),
    );
    expect(planted.violations).toMatchObject([{ invariant: "J3", what: "the message says it is of acme/session/s9" }]);
  });

  test("A2: two workers in one epoch", async () => {
    const { violations } = await verify(withChange(4, (message) => ({ ...message, worker: "w3" })));
    expect(violations).toMatchObject([{ invariant: "A2", what: "epoch 2 is w2's, and here w3's" }]);
  });

  test("A3: a second outcome of an effect", async () => {
    const { violations } = await verify(withNext([done("4:work")]));
    expect(violations).toMatchObject([{ invariant: "A3", seq: 7 }]);
    expect(violations[0]?.what).toContain("'done' of the effect 4:work, which is not in flight here");
  });

  test("A3: an outcome of an effect that never began", async () => {
    const { named } = await verify(withNext([{ t: "fail", inst: "6:work", error: { code: "timeout", message: "-" } }]));
    expect(named).toEqual(["A3"]);
  });

  test("A3: an input that changes while the effect is in flight", async () => {
    const drifting: Core = {
      ...core,
      apply(state, actor, entry, frame) {
        const step = core.apply(state, actor, entry, frame);
        if (entry.t !== "claim") return step;
        const running = Object.fromEntries(Object.entries(step.state.running).map(([id, one]) => [id, { ...one, input: { asked: 99 } }]));
        return { ...step, state: { ...step.state, running } };
      },
    };
    const { violations } = await verify(
      withChange(-1, (message) => message),
      { cores: { session: drifting } },
    );
    expect(violations).toMatchObject([{ invariant: "A3", seq: 5, what: "the input of the effect 4:work changes while it is in flight" }]);
  });

  test("A3: an effect that is started again after its outcome", async () => {
    const restarting: Core = {
      ...core,
      apply(state, actor, entry, frame) {
        const step = core.apply(state, actor, entry, frame);
        if (frame.seq !== 4) return step;
        return { ...step, state: { ...step.state, running: { ...step.state.running, old: { inst: "2:work", src: "work", input: { asked: 1 }, attempt: 1 } } } };
      },
    };
    const { violations } = await verify(
      withChange(-1, (message) => message),
      { cores: { session: restarting } },
    );
    expect(violations.filter((one) => one.invariant === "A3")).toMatchObject([{ seq: 4, what: "the effect 2:work is started again by entry 4" }]);
  });

  test("A3: a command with a key that was decided before", async () => {
    const { violations } = await verify((streams) => {
      const writer = createWriter(s1);
      for (const entries of [[create, say("hello", 2, "k1")], [done("2:work")], [say("hello", 3, "k1")]]) streams.event(writer.commit(entries));
    });
    expect(violations).toMatchObject([{ invariant: "A3", seq: 4, what: "'message.send' with the key 'k1' on .command was decided before" }]);
  });

  test("A3: a key that two bodies share; refusing the second as conflict is right", async () => {
    const again = (entry: Entry) =>
      verify((streams) => {
        const writer = createWriter(s1);
        for (const entries of [[create, say("hello", 2, "k1")], [done("2:work")], [entry]]) streams.event(writer.commit(entries));
      });
    expect((await again(say("other", 3, "k1"))).named).toEqual(["A3"]);
    const body = { content: "other" };
    const refused = { t: "refused", type: "message.send", hash: commandHash("message.send", body), channel: "command", key: "k1", source: source(3) } as const;
    expect((await again({ ...refused, error: { code: "conflict", message: "-" } })).named).toEqual([]);
    expect((await again({ ...refused, channel: "control", error: { code: "forbidden", message: "-" } })).named).toEqual([]);
  });

  test("A3: a key is no longer bound after seven days", async () => {
    const { named } = await verify((streams) => {
      const writer = createWriter(s1);
      streams.event(writer.commit([create, say("hello", 2, "k1")]));
      streams.event(writer.commit([done("2:work")]));
      const late = writer.commit([say("hello", 3, "k1")]);
      streams.event({ ...late, at: new Date(AT_MS + 8 * 24 * 3600 * 1000).toISOString() });
    });
    expect(named).toEqual([]);
  });

  test("A3: a command of the same place in the stream", async () => {
    const { violations } = await verify((streams) => {
      const writer = createWriter(s1);
      for (const entries of [[create, say("hello", 7)], [done("2:work")], [say("more", 7)]]) streams.event(writer.commit(entries));
    });
    expect(violations).toMatchObject([{ invariant: "A3", seq: 4, what: "'message.send' from COMMANDS 7 was decided before (the mark stands at 7)" }]);
  });

  test("A3: a refusal that may end can be decided anew", async () => {
    const refused = {
      t: "refused",
      type: "message.send",
      hash: commandHash("message.send", { content: "x" }),
      channel: "command",
      key: "k2",
      error: { code: "busy", message: "-" },
    } as const;
    const { named } = await verify((streams) => {
      const writer = createWriter(s1);
      for (const entries of [[create, say("hello", 2)], [refused], [done("2:work")], [say("x", 3, "k2")]]) streams.event(writer.commit(entries));
    });
    expect(named).toEqual([]);
  });

  test("A3: a timer that fires twice", async () => {
    const inst = Object.values((cleanJournal(s1).states[2] as ActorState).timers)[0]?.inst as string;
    const plant = (entries: readonly Entry[]) => (streams: ReturnType<typeof createStreams>) => {
      const writer = createWriter(s1);
      for (const one of [[create, say("hello", 2)], [done("2:work")], [say("again", 3)], ...entries.map((entry) => [entry])]) streams.event(writer.commit(one));
    };
    expect((await verify(plant([{ t: "timer", inst }]))).named).toEqual([]);
    const { violations } = await verify(
      plant([
        { t: "timer", inst },
        { t: "timer", inst },
      ]),
    );
    expect(violations).toMatchObject([{ invariant: "A3", seq: 6 }]);
    expect(violations[0]?.what).toContain(`the timer ${inst} fires, which is not armed here`);
  });

  test("A4: a body of another tenant under the subject", async () => {
    const { violations } = await verify((streams) =>
      cleanJournal(s1).messages.forEach((message, at) =>
        streams.event(at === 2 ? { ...message, actor: { ...s1, tenant: "globex" } } : message, actorSubject(s1, "event")),
      ),
    );
    expect(violations).toMatchObject([{ invariant: "A4", stream_sequence: 3, what: "the message says it is of tenant 'globex'" }]);
  });

  test("A4: an outgoing message under another tenant; our own may be written to", async () => {
    const outTo = (to: string) => (message: JournalMessage) => ({ ...message, out: message.out.map((out) => ({ ...out, to })) });
    const { violations } = await verify(withChange(1, outTo("globex/budget/main")));
    expect(violations[0]).toMatchObject({
      invariant: "A4",
      seq: 3,
      what: "the outgoing message 3.0 (budget.settle) goes to globex/budget/main, under another tenant",
    });
    expect((await verify(withChange(1, outTo("system/worker/w1")))).named).not.toContain("A4");
    expect((await verify(withChange(1, outTo("nowhere")))).named).toContain("A4");
  });

  test("A5: a state, an event or an outgoing message that the entries do not give", async () => {
    expect((await verify(withChange(2, (message) => ({ ...message, state: "idle" })))).violations).toMatchObject([
      { invariant: "A5", stream_sequence: 3, seq: 4, what: "state: the message says idle, the replay thinking" },
    ]);
    expect((await verify(withChange(2, (message) => ({ ...message, events: [{ type: "turn.started", turn: 7 }] })))).violations).toMatchObject([
      { invariant: "A5", what: 'event 0: the message says {"turn":7,"type":"turn.started"}, the replay {"turn":2,"type":"turn.started"}' },
    ]);
    expect((await verify(withChange(4, (message) => ({ ...message, out: [] })))).violations).toMatchObject([{ invariant: "A5", stream_sequence: 5 }]);
  });

  test("A5: an entry that was changed, by what it leads to", async () => {
    const { named } = await verify(
      withChange(1, (message) => ({ ...message, entries: [{ t: "fail", inst: "2:work", error: { code: "timeout", message: "-" } }] })),
    );
    expect(named).toEqual(["A5"]);
  });

  test("A5: a machine that this program does not know", async () => {
    const { violations } = await verify(withChange(2, (message) => ({ ...message, machine: "session@0" })));
    expect(violations).toMatchObject([{ invariant: "A5", stream_sequence: 3 }]);
    expect(violations[0]?.what).toContain("session@0");
  });

  test("A5: a journal that no core can follow, with the promise that broke", async () => {
    const { violations } = await verify(withChange(0, (message) => ({ ...message, entries: [say("first", 1), say("hello", 2)] })));
    expect(violations).toMatchObject([{ invariant: "A5", stream_sequence: 1, what: "it cannot be replayed: a journal begins with init" }]);
  });

  test("A5: a snapshot that the replay does not give, with the fields that differ", async () => {
    const plant = (data: Uint8Array) => (streams: ReturnType<typeof createStreams>) => {
      withChange(-1, (message) => message)(streams);
      streams.store("SNAPSHOTS", actorSubject(s1, "snapshot"), data);
    };
    const state = cleanJournal(s1).states[2] as ActorState;
    expect((await verify(plant(snapshotOf(state, 3)))).violations).toEqual([]);
    expect((await verify(plant(snapshotOf(state, 3, (saved) => ({ ...saved, running: {}, epoch: 3 }))))).violations).toMatchObject([
      { invariant: "A5", stream_sequence: 3, seq: 4, what: "the snapshot at seq 4 differs from the replay in epoch, running" },
    ]);
    expect((await verify(plant(snapshotOf(state, 2)))).violations).toMatchObject([
      { invariant: "A5", what: "the snapshot at seq 4 says it stands at stream sequence 2" },
    ]);
    expect((await verify(plant(snapshotOf(state, 3, (saved) => ({ ...saved, seq: 40 }))))).violations).toMatchObject([
      { invariant: "A5", what: "its snapshot is of seq 40, where no message of the journal ends" },
    ]);
    expect((await verify(plant(new TextEncoder().encode("{")))).named).toEqual(["A5"]);
  });

  test("A5: a snapshot without a journal", async () => {
    const { violations } = await verify((streams) =>
      streams.store("SNAPSHOTS", actorSubject(s1, "snapshot"), snapshotOf(cleanJournal(s1).states[0] as ActorState, 1)),
    );
    expect(violations).toMatchObject([{ invariant: "A5", actor: "acme/session/s1", what: "it has a snapshot of seq 2 and no journal" }]);
  });

  test("A6: an actor that does nothing and waits for nothing", async () => {
    const { violations } = await verify((streams) => {
      const writer = createWriter(s1);
      for (const entries of [[create], [{ t: "command", type: "session.pause", body: {}, channel: "command", source: source(2) } as const]])
        streams.event(writer.commit(entries));
    });
    expect(violations).toMatchObject([{ invariant: "A6", seq: 2, what: "it is paused with no effect in flight, no timer and no reason to wait" }]);
  });

  test("A6: a finished actor owes nothing", async () => {
    const { named } = await verify((streams) => {
      const writer = createWriter(s1);
      for (const entries of [[create], [{ t: "command", type: "session.terminate", body: {}, channel: "command", source: source(2) } as const]])
        streams.event(writer.commit(entries));
    });
    expect(named).toEqual([]);
  });

  test("P1: audit rows that are missing, changed, or of another place; rows that are not yet projected are not missed", async () => {
    const rows = (message: JournalMessage, stream_sequence: number) => message.entries.map((entry) => hashOf({ entry, stream_sequence }));
    const plant = withChange(-1, (message) => message);
    const streams = createStreams();
    plant(streams);
    const all = streams.messages.flatMap((stored) =>
      rows(decodeJournal(stored.data), stored.sequence).map((digest) => ({ stream_sequence: stored.sequence, digest })),
    );
    const viewOver = (kept: typeof all, position = 5): AuditView => ({
      position: async () => position,
      rows_of: rows,
      async *rows(_actor, through) {
        yield* kept.filter((row) => row.stream_sequence <= through);
      },
    });
    const clean = await verify(plant, { audit: viewOver(all) });
    expect(clean.violations).toEqual([]);
    expect(clean.report.audit_rows).toBe(6);
    expect((await verify(plant, { audit: viewOver(all.slice(0, 3), 2) })).violations).toEqual([]);
    expect((await verify(plant, { audit: viewOver(all.slice(0, 3), 5) })).violations).toMatchObject([
      { invariant: "P1", what: "the audit has 3 rows up to stream sequence 5, the journal asks for 6" },
    ]);
    const changed = all.map((row, index) => (index === 2 ? { ...row, digest: "0" } : row));
    expect((await verify(plant, { audit: viewOver(changed) })).violations).toMatchObject([
      { invariant: "P1", what: "the audit's 6 rows are not what the journal says" },
    ]);
    const moved = all.map((row, index) => (index === 5 ? { ...row, stream_sequence: 4 } : row));
    expect((await verify(plant, { audit: viewOver(moved) })).violations).toMatchObject([
      { invariant: "P1", what: "the last audit row is of stream sequence 4, the journal's is 5" },
    ]);
  });

  test("an actor that breaks everything is listed at most twenty times, and the rest counted", async () => {
    const { violations } = await verify(withNext(Array.from({ length: 30 }, () => done("4:work"))));
    expect(violations).toHaveLength(21);
    expect(violations.at(-1)?.what).toBe("and 10 more violations of this actor");
  });
});
