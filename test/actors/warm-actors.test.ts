// Goal: who prepares a shard reads it and touches nothing of it, and who takes it then reads only what was appended since, and has the same actors.
// Method: two hosts on the in-memory bus in virtual time; each operation that reaches the broker is counted.
import { expect, test } from "vitest";
import type { Performers } from "../../actors/performer.ts";
import type { ShardHost } from "../../actors/shard-host.ts";
import { Broker, type Operation } from "../../bus/memory.ts";
import { HEADER_REPLY_TO } from "../../protocol/commands.ts";
import { decodeJournal } from "../../protocol/journal.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { plainHost } from "../harness/plain-host.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session = { tenant: "acme", kind: "session", id: "s1" } as const;
const snapshot = actorSubject(session, "snapshot");
const journal = actorSubject(session, "event");

/** An actor with twenty messages behind it, a snapshot, and a mark, at its first owner. */
async function ground() {
  const world = new VirtualWorld(1);
  const operations: Operation[] = [];
  const broker = new Broker({ world, shards: 1, faults: { before: (operation) => void operations.push(operation) as undefined } });
  const service = broker.connect("service");
  const replies: Reply[] = [];
  service.subscribe("_INBOX.mine", (message) => void replies.push(decodeReply(message.data)));
  const performers: Performers = {
    load_configuration: (async () => ({
      config: { model: "simulated/echo", instructions: "hear", tools: [], mode: "multi", max_loops: 4 },
      hash: "h",
      agent_version: 1,
    })) as never,
    call_model: (() => new Promise(() => undefined)) as never,
  };
  const hostOn = (name: string): ShardHost => plainHost({ bus: broker.connect(name), world, name, performers });
  const say = async (type: string, body: object): Promise<void> => {
    void service.publish(actorSubject(session, "command"), new TextEncoder().encode(JSON.stringify({ type, body })), {
      headers: { [HEADER_REPLY_TO]: "_INBOX.mine" },
    });
    await world.advance(100);
  };
  const first = hostOn("w1");
  await first.take(0, 1, { worker: null, reason: "first" });
  await say("session.create", { agent: "a" });
  for (let index = 0; index < 20; index++) await say(index % 2 === 0 ? "session.pause" : "session.resume", index % 2 === 0 ? { reason: "by hand" } : {});
  const done = (name: string, kind: Operation["kind"], subject?: string): number =>
    operations.filter((one) => one.connection === name && one.kind === kind && (subject === undefined || one.subject === subject)).length;
  const finish = async <T>(call: Promise<T>): Promise<T> => {
    let outcome: { value: T } | undefined;
    void call.then((value) => (outcome = { value }));
    await world.until(() => outcome !== undefined, 20_000);
    return outcome!.value;
  };
  const seqs = (): number[] => {
    const events = broker.stream("EVENTS");
    return Array.from({ length: events.last_sequence }, (_, index) => decodeJournal(events.get(index + 1)!.data).seq);
  };
  return { world, broker, hostOn, say, first, done, finish, replies, seqs };
}

test("preparing writes nothing, and the owner goes on meanwhile", async () => {
  const { broker, hostOn, say, done, finish, replies } = await ground();
  const before = broker.stream("EVENTS").last_sequence;
  expect(await finish(hostOn("w2").prepare(0))).toBe(1);
  for (const kind of ["append", "publish", "clear", "ack", "schedule", "bucket_write"] as const) expect([kind, done("w2", kind)]).toEqual([kind, 0]);
  expect(broker.stream("EVENTS").last_sequence).toBe(before);
  await say("session.pause", { reason: "again" });
  expect(replies.at(-1)).toMatchObject({ ok: true, state: "paused" });
});

test("who takes what it prepared reads no snapshot, replays only what came since, and goes on where the owner ended", async () => {
  const { hostOn, say, first, done, finish, replies, seqs } = await ground();
  const second = hostOn("w2");
  await finish(second.prepare(0));
  const read = done("w2", "read", snapshot);
  expect(read).toBe(1);
  await say("session.pause", { reason: "after the preparation" });
  await first.drop(0);
  await finish(second.take(0, 2, { worker: "w1", reason: "moved" }));
  await say("session.resume", {});
  expect(replies.at(-1)).toMatchObject({ ok: true, state: "idle" });
  expect(done("w2", "read", snapshot)).toBe(read);
  expect(done("w2", "read", journal)).toBeGreaterThan(0);
  expect(seqs()).toEqual(seqs().map((_, index) => index + 1));
});

test("who prepares again reads on where it stopped", async () => {
  const { hostOn, say, done, finish } = await ground();
  const second = hostOn("w2");
  await finish(second.prepare(0));
  await say("session.pause", { reason: "meanwhile" });
  expect(await finish(second.prepare(0))).toBe(1);
  expect(done("w2", "read", snapshot)).toBe(1);
});

test("what is not taken in time is forgotten, and restored from its snapshot when the shard comes at last", async () => {
  const { world, hostOn, say, first, done, finish, replies } = await ground();
  const second = hostOn("w2");
  await finish(second.prepare(0));
  await world.advance(80_000);
  await first.drop(0);
  await finish(second.take(0, 2, { worker: "w1", reason: "moved" }));
  await say("session.pause", { reason: "late" });
  expect(done("w2", "read", snapshot)).toBe(2);
  expect(replies.at(-1)).toMatchObject({ ok: true, state: "paused" });
});

test("a host that stopped keeps nothing of what it prepared: no timer holds its process", async () => {
  const { world, hostOn, finish } = await ground();
  const second = hostOn("w2");
  const before = world.pending;
  expect(await finish(second.prepare(0))).toBe(1);
  expect(world.pending).toBeGreaterThan(before);
  await second.stop();
  expect(world.pending).toBeLessThanOrEqual(before);
});

test("an owner prepares nothing of what it has", async () => {
  const { first, finish } = await ground();
  expect(await finish(first.prepare(0))).toBe(0);
});
