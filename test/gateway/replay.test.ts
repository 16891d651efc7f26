// Goal: a tenant's client gets its own history over NATS, whole and in order, and nobody else's, on its own subjects, within bounds.
// Method: requests on the in-memory bus, as a tenant's client and as a rival would make them.
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { createMemoryBroker, type MemoryBroker } from "../../bus/memory.ts";
import { type Bus, type CoreMessage, headerOf } from "../../bus/port.ts";
import { HEADER_NEXT_SEQUENCE, type Replay, startReplay } from "../../gateway/replay.ts";
import { decodeJournal } from "../../protocol/journal.ts";
import { type Log, silentLog } from "../../protocol/log.ts";
import { actorSubject, replaySubject } from "../../protocol/subjects.ts";
import { decodeToken } from "../../protocol/tokens.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { drawSession, encodeWritten, SESSION } from "./drawn-session.ts";

const session = drawSession([
  [{ text: "one two three", cuts: [4, 8], reasoning_at: -1, lost_after: [], ending: "completed" }],
  [{ text: "four", cuts: [], reasoning_at: 0, lost_after: [1], ending: "completed" }],
]);
const messages = session.written.flatMap((one) => (one.kind === "journal" ? [one.message] : []));
const chunks = session.written.flatMap((one) => (one.kind === "chunk" ? [one.chunk] : []));

let world: VirtualWorld;
let broker: MemoryBroker;
let client: Bus;
let replays: Replay[];
let reads_fail = false;
const warned: string[] = [];
const log: Log = { ...silentLog, warn: (what) => void warned.push(what) };

beforeEach(async () => {
  world = new VirtualWorld(1);
  reads_fail = false;
  broker = createMemoryBroker({ world, shards: 2, faults: { before: ({ kind }) => (reads_fail && kind === "read" ? { kind: "unavailable" } : undefined) } });
  client = broker.connect("client");
  warned.length = 0;
  // Two gateways: a request is answered by one.
  replays = [startReplay({ bus: broker.connect("gateway-1"), log }), startReplay({ bus: broker.connect("gateway-2"), log })];
  const writer = broker.connect("worker");
  for (const tenant of ["acme", "rival"]) {
    const actor = { ...SESSION, tenant };
    let last = 0;
    for (const [index, one] of session.written.entries()) {
      if (one.kind === "chunk") await writer.publish(actorSubject(actor, "token"), encodeWritten(one));
      else {
        const data = encodeWritten({ kind: "journal", message: { ...one.message, actor } });
        const outcome = await writer.append({ subject: actorSubject(actor, "event"), data, expected_last_sequence: last, commit_id: `${tenant}.${index}` });
        last = outcome.kind === "committed" ? outcome.sequence : 0;
      }
    }
  }
});
afterEach(() => Promise.all(replays.map((replay) => replay.stop())));

async function request(
  asked: unknown,
  { tenant = "acme", reply = `_INBOX_${tenant}.one` }: { tenant?: string; reply?: string | null } = {},
): Promise<CoreMessage[]> {
  const heard: CoreMessage[] = [];
  const subscription = client.subscribe(reply ?? "_INBOX_acme.>", (message) => void heard.push(message));
  const data = asked instanceof Uint8Array ? asked : new TextEncoder().encode(JSON.stringify(asked));
  client.send(replaySubject(tenant), data, reply === null ? {} : { reply });
  await world.until(() => heard.some((message) => headerOf(message.headers, "Troupe-Done") === "true"), 10_000);
  await world.advance(100);
  await subscription.stop();
  return heard;
}

const seqsOf = (heard: readonly CoreMessage[]): number[] =>
  heard.filter((message) => message.data.byteLength > 0).map((message) => decodeJournal(message.data, SESSION).seq);

describe("replay", () => {
  test("events come once, in order, with their positions, and an empty message says it is done", async () => {
    const heard = await request({ kind: "session", id: "s1", channel: "event" });
    expect(seqsOf(heard)).toEqual(messages.map((message) => message.seq));
    const sequences = heard.slice(0, -1).map((message) => Number(headerOf(message.headers, "Nats-Sequence")));
    expect(sequences).toEqual(sequences.toSorted((a, b) => a - b));
    for (const message of heard.slice(0, -1)) expect(headerOf(message.headers, "Nats-Subject")).toBe("tenant.acme.session.s1.event");
    expect([heard.at(-1)?.data.byteLength, heard.at(-1)?.headers]).toEqual([0, { "Troupe-Done": "true" }]);
  });

  test("tokens come too", async () => {
    const heard = await request({ kind: "session", id: "s1", channel: "token" });
    expect(heard.slice(0, -1).map((message) => decodeToken(message.data))).toEqual(chunks);
  });

  test("an answer that its limit cut short says where to go on, and going on gives the rest", async () => {
    const seqs: number[] = [];
    let from_sequence = 1;
    for (let more = true; more;) {
      const heard = await request({ kind: "session", id: "s1", channel: "event", limit: 2, from_sequence });
      expect(heard.length).toBeLessThanOrEqual(3);
      seqs.push(...seqsOf(heard));
      const next = headerOf(heard.at(-1)?.headers ?? {}, HEADER_NEXT_SEQUENCE);
      more = next !== undefined;
      from_sequence = Number(next);
    }
    expect(seqs).toEqual(messages.map((message) => message.seq));
  });

  test("to_sequence ends it", async () => {
    const all = await request({ kind: "session", id: "s1", channel: "event" });
    const third = Number(headerOf(all[2]?.headers ?? {}, "Nats-Sequence"));
    expect(seqsOf(await request({ kind: "session", id: "s1", channel: "event", to_sequence: third }))).toHaveLength(3);
  });

  test("what the subject's tenant does not have is empty, whatever the body says", async () => {
    expect(await request({ kind: "session", id: "s2", channel: "event" })).toHaveLength(1);
    const heard = await request({ kind: "session", id: "s1", channel: "event", tenant: "rival" });
    for (const message of heard.slice(0, -1)) expect(headerOf(message.headers, "Nats-Subject")).toMatch(/^tenant\.acme\./);
  });

  test.each([
    ["no JSON", new TextEncoder().encode("{"), "invalid"],
    ["no UTF-8", new Uint8Array([0xff, 0xfe]), "invalid"],
    ["null", null, "invalid"],
    ["a wildcard for an id", { kind: "session", id: "*", channel: "event" }, "invalid"],
    ["an id with a dot", { kind: "session", id: "s1.event.x", channel: "event" }, "invalid"],
    ["the tenant's own journal, which has hashes of keys", { kind: "tenant", id: "main", channel: "event" }, "invalid"],
    ["workers", { kind: "worker", id: "w1", channel: "event" }, "invalid"],
    ["snapshots", { kind: "session", id: "s1", channel: "snapshot" }, "invalid"],
    ["a limit over the bound", { kind: "session", id: "s1", channel: "event", limit: 10_001 }, "invalid"],
    ["a sequence of 0", { kind: "session", id: "s1", channel: "event", from_sequence: 0 }, "invalid"],
    ["too much", new Uint8Array(5000), "too_large"],
  ])("%s is answered with one message that bears the code and ends the answer", async (_, asked, code) => {
    const heard = await request(asked);
    expect(heard.map((message) => message.headers)).toEqual([{ "Troupe-Error": code, "Troupe-Done": "true" }]);
    expect(JSON.parse(new TextDecoder().decode(heard[0]?.data))).toMatchObject({ ok: false, error: { code } });
  });

  test("P2: to another tenant's inbox, to a stream's subject or to nobody, nothing is sent at all", async () => {
    const asked = { kind: "session", id: "s1", channel: "event" };
    for (const reply of ["_INBOX_rival.x", "tenant.acme.session.s1.event", "live.tenant.acme.session.s1.event", "_INBOX_acme.*", "_INBOX_acme", null]) {
      warned.length = 0;
      const before = await client.bounds("EVENTS");
      expect(await request(asked, { reply }), String(reply)).toEqual([]);
      expect((await client.bounds("EVENTS")).last_sequence).toBe(before.last_sequence);
      expect(warned.length, String(reply)).toBe(1);
    }
  });

  test("P3: more answers at once than the bound are refused as overloaded, and later ones are taken again", async () => {
    const heard: CoreMessage[] = [];
    client.subscribe("_INBOX_acme.many.>", (message) => void heard.push(message));
    const data = new TextEncoder().encode(JSON.stringify({ kind: "session", id: "s1", channel: "event" }));
    for (let n = 0; n < 200; n++) client.send(replaySubject("acme"), data, { reply: `_INBOX_acme.many.${n}` });
    const done = (): CoreMessage[] => heard.filter((message) => headerOf(message.headers, "Troupe-Done") === "true");
    await world.until(() => done().length === 200, 10_000);
    const refused = done().filter((message) => headerOf(message.headers, "Troupe-Error") === "overloaded");
    expect(refused.length).toBeGreaterThan(100);
    expect(refused.length).toBeLessThanOrEqual(200 - 16);
    expect(await request({ kind: "session", id: "s1", channel: "event" })).toHaveLength(messages.length + 1);
  });

  test("a stream that cannot be read now ends the answer with unavailable", async () => {
    reads_fail = true;
    const heard = await request({ kind: "session", id: "s1", channel: "event" });
    expect(heard.map((message) => headerOf(message.headers, "Troupe-Error"))).toEqual(["unavailable"]);
    reads_fail = false;
    expect(seqsOf(await request({ kind: "session", id: "s1", channel: "event" }))).toHaveLength(messages.length);
  });
});
