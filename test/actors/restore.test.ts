// Goal: what is restored is what the journal says, or nobody goes on with it; and a snapshot is a short cut that may fail.
// Method: the real session machine's journal, written by one host on the in-memory bus, read back as it is and with one thing changed.
import { expect, test } from "vitest";
import { createRestorer } from "../../actors/restore.ts";
import { Broker } from "../../bus/memory.ts";
import { decodeJournal, encodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { cores } from "../../state-machines/kinds.ts";
import { outerState } from "../../state-machines/step.ts";
import { plainHost } from "../harness/plain-host.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session = { tenant: "acme", kind: "session", id: "s1" } as const;

/** A session's journal of twenty entries and its snapshot; both may be rewritten on the way to another broker. */
async function written(change: { message?: (message: JournalMessage) => JournalMessage; snapshot?: (text: string) => string } = {}) {
  const world = new VirtualWorld(1);
  const first = new Broker({ world, shards: 1 });
  const load_configuration = (async () => ({
    config: { model: "simulated/echo", instructions: "", tools: [], mode: "multi", max_loops: 4 },
    hash: "h",
    agent_version: 1,
  })) as never;
  await plainHost({ bus: first.connect("w1"), world, name: "w1", performers: { load_configuration } }).take(0, 1, { worker: null, reason: "first" });
  const service = first.connect("service");
  const say = async (type: string, body: object): Promise<void> => {
    void service.publish(actorSubject(session, "command"), new TextEncoder().encode(JSON.stringify({ type, body })));
    await world.advance(50);
  };
  await say("session.create", { agent: "a" });
  for (let index = 0; index < 18; index++) await say(index % 2 === 0 ? "session.pause" : "session.resume", {});
  const second = new Broker({ world, shards: 1 });
  const copyist = second.connect("copyist");
  const events = first.stream("EVENTS");
  for (let sequence = 1; sequence <= events.last_sequence; sequence++) {
    const message = decodeJournal(events.get(sequence)!.data);
    const data = encodeJournal(change.message?.(message) ?? message);
    void copyist.append({ subject: actorSubject(session, "event"), data, expected_last_sequence: sequence - 1, commit_id: `c.${sequence}` });
    await world.advance(5);
  }
  const snapshot = first.stream("SNAPSHOTS").last(actorSubject(session, "snapshot"));
  const text = new TextDecoder().decode(snapshot?.data);
  void copyist.publish(actorSubject(session, "snapshot"), new TextEncoder().encode(change.snapshot?.(text) ?? text));
  await world.advance(5);
  const restorer = createRestorer({ bus: second.connect("reader"), cores, log: silentLog });
  let outcome: { state: string; seq: number; replayed: number } | { error: string } | undefined;
  void restorer.restore(session).then(
    (restored) => (outcome = { state: outerState(restored!.state.snapshot), seq: restored!.state.seq, replayed: restored!.entries_replayed }),
    (error: unknown) => (outcome = { error: String(error) }),
  );
  await world.advance(1_000);
  return outcome;
}

test("a snapshot and what came after it give what the journal says", async () => {
  expect(await written()).toEqual({ state: "idle", seq: 20, replayed: 4 });
});

test("R2: a snapshot of another shape is left aside, and the whole journal gives the same", async () => {
  expect(await written({ snapshot: () => "{" })).toEqual({ state: "idle", seq: 20, replayed: 20 });
});

test("A4: a snapshot that bears another actor's name is left aside", async () => {
  expect(await written({ snapshot: (text) => text.replaceAll('"acme"', '"globex"') })).toEqual({ state: "idle", seq: 20, replayed: 20 });
});

test("R1: a journal whose replay ends in another state than it says restores nobody", async () => {
  const outcome = await written({ message: (message) => (message.seq === 19 ? { ...message, state: "terminated" } : message) });
  expect(outcome).toMatchObject({ error: expect.stringContaining("A5") });
});

test("J3: a message of another actor in the journal restores nobody", async () => {
  const outcome = await written({ message: (message) => (message.seq === 19 ? { ...message, actor: { ...session, tenant: "globex" } } : message) });
  expect(outcome).toMatchObject({ error: expect.any(String) });
});
