// Goal: an answer of the bus that gets lost, and a message that comes again because its acknowledgement did, change nothing that anybody was told.
// Method: one host on the in-memory bus in virtual time; single operations lose their answers, acknowledgements, or come late.
import { expect, test } from "vitest";
import { type CommandOutcome, createCommandClient } from "../../actors/client.ts";
import type { EffectScope, Performers } from "../../actors/performer.ts";
import type { ShardHost } from "../../actors/shard-host.ts";
import { Broker, type FaultAfter, type FaultBefore, type Operation } from "../../bus/memory.ts";
import { HEADER_IDEMPOTENCY_KEY, HEADER_REPLY_TO, HEADER_SUBJECT } from "../../protocol/commands.ts";
import type { ErrorBody } from "../../protocol/errors.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { decodeJournal, type Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { decodeReply, FAST_REPLY_SUFFIX, type Reply } from "../../protocol/reply.ts";
import { actorSubject, fastLaneSubject, residentSubject, timerSubject } from "../../protocol/subjects.ts";
import { plainHost } from "../harness/plain-host.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session: ActorAddress = { tenant: "acme", kind: "session", id: "s1" };
const MARK = residentSubject(0, session);

function ground(
  faults: { before?(operation: Operation): FaultBefore | undefined; after?(operation: Operation): FaultAfter | undefined } = {},
  admit?: () => Promise<ErrorBody | undefined>,
) {
  const world = new VirtualWorld(1);
  const broker = new Broker({ world, shards: 1, faults });
  const service = broker.connect("service");
  const replies: Reply[] = [];
  service.subscribe("_INBOX.mine", (message) => void replies.push(decodeReply(message.data)));
  const performers: { -readonly [Name in keyof Performers]: Performers[Name] } = {
    load_configuration: (async () => ({
      config: { model: "simulated/echo", instructions: "hear", tools: [], mode: "multi", max_loops: 4 },
      hash: "h",
      agent_version: 1,
    })) as never,
    call_model: (async (_: never, scope: { entries(seqs: readonly number[]): Promise<unknown> }) => {
      await scope.entries([1, 2, 3]);
      return new Promise(() => undefined);
    }) as never,
  };
  const hostOn = (name: string): ShardHost => plainHost({ bus: broker.connect(name), world, name, performers, ...(admit === undefined ? {} : { admit }) });
  const publish = async (type: string, body: object, key?: string): Promise<void> => {
    const headers = { [HEADER_REPLY_TO]: "_INBOX.mine", ...(key === undefined ? {} : { [HEADER_IDEMPOTENCY_KEY]: key }) };
    void service.publish(actorSubject(session, "command"), new TextEncoder().encode(typeof body === "string" ? body : JSON.stringify({ type, body })), {
      headers,
    });
    await world.advance(100);
  };
  const entries = (): Entry[] => {
    const found: Entry[] = [];
    const events = broker.stream("EVENTS");
    for (let sequence = 1; sequence <= events.last_sequence; sequence++) found.push(...decodeJournal(events.get(sequence)!.data).entries);
    return found;
  };
  return { world, broker, performers, hostOn, publish, entries, replies, mark: () => broker.stream("RESIDENT").last(MARK) };
}

test("C3: a mark whose clearing was done and not answered is set again before the next debt", async () => {
  const { world, hostOn, publish, mark } = ground({ after: ({ kind }) => (kind === "clear" ? { kind: "lose_answer" } : undefined) });
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  expect(mark()).toBeDefined();
  await world.until(() => mark() === undefined, 20_000);
  expect(mark()).toBeUndefined();
  await publish("message.send", { content: "hello" });
  expect(await world.until(() => mark() !== undefined, 20_000)).toBe(true);
});

test("C3: a mark that is found after a command was faster is not believed when it is long cleared", async () => {
  let slow = true;
  const { world, hostOn, publish, mark } = ground({
    before: ({ kind, subject }) => (slow && kind === "read" && subject === "resident.0.>" ? { kind: "delay", ms: 300 } : undefined),
  });
  slow = false;
  const first = hostOn("w1");
  await first.take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await first.drop(0);
  slow = true;
  await hostOn("w2").take(0, 2, { worker: "w1", reason: "gone" });
  await publish("session.resume", {});
  // It leaves memory with its mark cleared, and comes back.
  expect(await world.until(() => mark() === undefined, 120_000)).toBe(true);
  await world.advance(120_000);
  await publish("message.send", { content: "hello" });
  expect(mark()).toBeDefined();
});

test("a message that was refused and comes again, its acknowledgement lost, is refused again in the same words and journaled once", async () => {
  let losing = true;
  const { world, hostOn, publish, entries, replies } = ground({ before: ({ kind }) => (losing && kind === "ack" ? { kind: "unavailable" } : undefined) });
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await publish("message.send", { content: "hello" });
  await publish("session.resume", {}); // nothing is paused
  await publish("message.send", { content: "and me?", on_busy: "reject" }, "k1");
  await publish("", "{" as never);
  const told = replies.slice(2);
  expect(told.map((reply) => (reply.ok ? "ok" : reply.error.code))).toEqual(["illegal_transition", "busy", "invalid"]);
  losing = false;
  await publish("turn.cancel", {}); // now the second message would be taken, if it were decided anew
  replies.length = 0;
  await world.advance(35_000);
  expect(replies.filter((reply) => !reply.ok)).toEqual(told);
  expect(entries().filter((entry) => entry.t === "refused")).toHaveLength(3);
  expect(entries().filter((entry) => "key" in entry && entry.key === "k1")).toHaveLength(1);
});

test("a prompt that cannot be read because the broker is away is read when it is back, and the turn goes on", async () => {
  let away = false;
  let armed = false;
  const { world, hostOn, publish, entries } = ground({
    before: ({ kind, subject }) => (away && kind === "read" && subject.endsWith(".event") ? { kind: "unavailable" } : undefined),
    after: ({ kind }) => {
      if (kind === "append") away = armed; // the call has begun, its prompt is not read
      return undefined;
    },
  });
  const first = hostOn("w1");
  await first.take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await world.advance(70_000); // it leaves memory, and what it had read with it
  expect(first.resident()).toEqual([]);
  armed = true;
  await publish("message.send", { content: "hello" });
  expect(away).toBe(true);
  await world.advance(12_000);
  away = armed = false;
  await world.advance(12_000);
  expect(entries().filter((entry) => entry.t === "fail")).toEqual([]);
});

test("C6: a stored command whose tenant cannot be read waits until it can, in its order, and the end of the model call does not wait with it", async () => {
  let unreadable = false;
  let endCall = (): void => undefined;
  const { world, hostOn, publish, entries, replies, performers } = ground({}, () =>
    unreadable ? Promise.reject(new Error("no answer")) : Promise.resolve(undefined),
  );
  performers.call_model = (() => new Promise((_, reject) => (endCall = () => reject(new Error("enough"))))) as never;
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await publish("message.send", { content: "hello" });
  unreadable = true;
  await publish("message.send", { content: "first" });
  await publish("message.send", { content: "second" });
  endCall();
  await world.advance(20_000);
  expect(replies).toHaveLength(2);
  expect(entries().map((entry) => entry.t)).toEqual(["init", "done", "command", "fail"]);
  unreadable = false;
  await world.advance(2_000);
  expect(replies.map((reply) => reply.ok)).toEqual([true, true, true, true]);
  expect(entries().flatMap((entry) => (entry.t === "command" ? [entry.body["content"]] : []))).toEqual(["hello", "first", "second"]);
});

test("a stored command that the door refuses stands in the journal as refused, since its sender may hear no reply", async () => {
  let suspended = false;
  const { hostOn, publish, entries } = ground({}, async () => (suspended ? { code: "forbidden", message: "the tenant is suspended" } : undefined));
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  suspended = true;
  await publish("message.send", { content: "hello" });
  expect(entries().at(-1)).toMatchObject({ t: "refused", type: "message.send", error: { code: "forbidden" } });
});

test.each(["acknowledgement", "broker's word for it"])(
  "C8: a command to nobody is not answered while its %s is lost, comes again before what was said after it, and is answered once",
  async (what) => {
    let losing = true;
    const { world, hostOn, publish, entries, replies } = ground({
      before: ({ kind }) => (losing && kind === "ack" && what === "acknowledgement" ? { kind: "unavailable" } : undefined),
      after: ({ kind }) => (losing && kind === "ack" && what !== "acknowledgement" ? { kind: "lose_answer" } : undefined),
    });
    await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
    await publish("message.send", { content: "is anybody there?" });
    await publish("session.create", { agent: "a" });
    await world.advance(1_000);
    expect(replies).toEqual([]);
    losing = false;
    await world.advance(35_000);
    // Its answer is lost for good when only the broker's word was: nobody can know, and nothing happens behind the sender's back.
    const told = what === "acknowledgement" ? ["not_found", "ok"] : ["ok"];
    expect(replies.map((reply) => (reply.ok ? "ok" : reply.error.code))).toEqual(told);
    expect(entries().map((entry) => entry.t)).toEqual(["init", "done"]);
  },
);

test("C8: a command to nobody is answered once the broker has let go of it, and never comes again", async () => {
  const { world, broker, hostOn, publish, entries, replies } = ground();
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("message.send", { content: "is anybody there?" });
  expect(replies).toMatchObject([{ ok: false, error: { code: "not_found" } }]);
  expect(broker.stream("COMMANDS").get(1)).toBeUndefined();
  await publish("session.create", { agent: "a" });
  await world.advance(35_000);
  expect(entries().filter((entry) => entry.t === "command")).toEqual([]);
});

test("H5: it is not answered by an owner that has lost the shard meanwhile: its successor may have taken it", async () => {
  const { world, broker, publish, replies, performers } = ground();
  await plainHost({ bus: broker.connect("w1"), world, name: "w1", performers, on_conflict: async () => "lost" }).take(0, 1, { worker: null, reason: "first" });
  await publish("message.send", { content: "is anybody there?" });
  expect(replies).toEqual([]);
});

test("C8: refusals too many for the journal are settled like those of nobody, and the actor goes on", async () => {
  const { world, broker, hostOn, publish, entries, replies } = ground();
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  for (let index = 0; index < 40; index++) await publish("session.resume", {}); // nothing is paused
  await publish("message.send", { content: "hello" });
  expect(replies.filter((reply) => !reply.ok)).toHaveLength(40);
  expect(replies.at(-1)).toMatchObject({ ok: true });
  expect(entries().filter((entry) => entry.t === "refused").length).toBeLessThan(40);
  await world.advance(35_000);
  expect(replies).toHaveLength(42);
  expect(broker.stream("COMMANDS").next(["shard.>"], 1)).toBeUndefined();
});

test("C6: what came on the fast lane and cannot be judged is not answered: its sender makes it durable, and is told once", async () => {
  let unreadable = true;
  const { world, broker, hostOn, entries } = ground({}, () => (unreadable ? Promise.reject(new Error("no answer")) : Promise.resolve(undefined)));
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  const client = createCommandClient({ bus: broker.connect("gateway"), world });
  const outcomes: CommandOutcome[] = [];
  void client.command(session, { type: "session.create", body: { agent: "a" } }).then((outcome) => outcomes.push(outcome));
  await world.advance(5_000);
  expect(outcomes).toEqual([]);
  unreadable = false;
  await world.advance(2_000);
  expect(outcomes).toMatchObject([{ kind: "decided", reply: { ok: true } }]);
  expect(entries().filter((entry) => entry.t === "init")).toHaveLength(1);
});

test("W1: a no of the fast lane that comes when the command is durable is not told, since the durable command may be taken", async () => {
  const world = new VirtualWorld(1);
  const broker = new Broker({ world, shards: 1 });
  const gateway = broker.connect("gateway");
  const owner = broker.connect("owner");
  const answer = (reply: string, body: object): void => owner.send(reply, new TextEncoder().encode(JSON.stringify(body)));
  const busy = { ok: false, actor: "acme/session/s1", error: { code: "busy", message: "a turn is running" } };
  const yes = { ok: true, actor: "acme/session/s1", seq: 3, state: "running", result: {} };
  let fast = "";
  owner.subscribe(fastLaneSubject(0), (message) => void (fast = message.reply ?? ""));
  const outcomes: CommandOutcome[] = [];
  const client = createCommandClient({ bus: gateway, world });
  void client.command(session, { type: "message.send", body: { content: "hello" } }).then((outcome) => outcomes.push(outcome));
  await world.advance(1_000);
  const stored = broker.stream("COMMANDS").get(1)!;
  answer(fast, busy);
  await world.advance(100);
  expect(outcomes).toEqual([]);
  answer(stored.headers[HEADER_REPLY_TO] ?? "", yes);
  await world.advance(100);
  expect(outcomes).toEqual([{ kind: "decided", reply: expect.objectContaining({ ok: true, seq: 3 }) }]);
});

test("H3: the clearing that an owner asked for before it was cut off, and that arrives at last, takes no mark of the next owner's", async () => {
  let asked = false;
  const { world, broker, hostOn, publish, mark } = ground({
    before({ kind, connection }) {
      if (kind !== "clear" || connection !== "w1") return undefined;
      asked = true;
      return { kind: "delay", ms: 3_000 };
    },
  });
  const first = hostOn("w1");
  await first.take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  expect(await world.until(() => asked, 20_000)).toBe(true);
  broker.kill("w1");
  await hostOn("w2").take(0, 2, { worker: "w1", reason: "gone" });
  await publish("message.send", { content: "hello" });
  for (let waited = 0; waited < 6; waited++) {
    await world.advance(1_000);
    expect(mark()).toBeDefined();
  }
});

test("what comes by the fast lane after its durable twin was refused is not done after all; a new attempt under the same key is", async () => {
  const { world, broker, hostOn, publish, entries } = ground();
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await publish("message.send", { content: "hello" });
  const service = broker.connect("sender");
  const heard: string[] = [];
  service.subscribe("_INBOX.asked.*", ({ subject, data }) => {
    const reply = decodeReply(data);
    heard.push(`${subject.slice("_INBOX.asked.".length)} ${reply.ok ? "ok" : reply.error.code}`);
  });
  const data = new TextEncoder().encode(JSON.stringify({ type: "message.send", body: { content: "and me?", on_busy: "reject" } }));
  const headers = { [HEADER_IDEMPOTENCY_KEY]: "k1" };
  const fast = (token: string): void =>
    service.send(fastLaneSubject(0), data, {
      headers: { ...headers, [HEADER_SUBJECT]: actorSubject(session, "command") },
      reply: `_INBOX.asked.${token}${FAST_REPLY_SUFFIX}`,
    });
  void service.publish(actorSubject(session, "command"), data, { headers: { ...headers, [HEADER_REPLY_TO]: "_INBOX.asked.t1" } });
  await world.advance(100);
  await publish("turn.cancel", {});
  fast("t1"); // it was held back on the way
  await world.advance(100);
  expect(heard).toEqual(["t1 busy"]);
  expect(entries().filter((entry) => "key" in entry && entry.key === "k1")).toMatchObject([{ t: "refused" }]);
  fast("t2");
  await world.advance(100);
  expect(heard).toEqual(["t1 busy", `t2${FAST_REPLY_SUFFIX} ok`]);
});

test("C7: what a former owner armed late does not stand over the schedule of who has the actor now", async () => {
  const { world, broker, hostOn, publish } = ground({
    before: ({ kind, connection }) => (kind === "schedule" && connection === "w1" ? { kind: "delay", ms: 4_000 } : undefined),
  });
  const schedule = (): JsonObject => JSON.parse(new TextDecoder().decode(broker.stream("TIMERS").last(timerSubject(session))?.data ?? new Uint8Array()));
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await publish("session.hibernate", {});
  await world.advance(2_500); // its arming is on its way
  await hostOn("w2").take(0, 2, { worker: "w1", reason: "gone" });
  await publish("session.resume", {});
  expect(await world.until(() => broker.stream("TIMERS").last(timerSubject(session)) !== undefined, 2_000)).toBe(true);
  const armed = schedule();
  await world.advance(10_000);
  expect(schedule()).toEqual(armed);
});

test("A3: an effect asks again before it reaches out: not while its worker may not act, and never once the actor is another's", async () => {
  const { world, broker, performers, publish } = ground();
  let may_act = true;
  let go_on: () => void = () => undefined;
  const asked: string[] = [];
  performers["call_model"] = (async (_: never, scope: EffectScope) => {
    await new Promise<void>((resolve) => (go_on = resolve)); // as long as money and a place are waited for
    asked.push((await scope.permitted()) ? "yes" : "no");
    return new Promise(() => undefined);
  }) as never;
  const host = plainHost({ bus: broker.connect("w1"), world, name: "w1", performers, may_act: () => may_act });
  await host.take(0, 1, { worker: null, reason: "first" });
  await publish("session.create", { agent: "a" });
  await publish("message.send", { content: "hello" });
  may_act = false; // it stood still, and its lease is over
  go_on();
  await world.advance(1_000);
  expect(asked).toEqual([]);
  may_act = true; // the bus was away, and the actor is still its own
  await world.advance(1_000);
  expect(asked).toEqual(["yes"]);
  await publish("turn.cancel", {});
  await publish("message.send", { content: "hello again" });
  may_act = false;
  go_on();
  await host.drop(0);
  may_act = true; // it joined again, as another
  await world.advance(1_000);
  expect(asked).toEqual(["yes", "no"]);
});
