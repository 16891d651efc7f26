// Goal: both adapters of the bus keep the promises of bus/port.ts.
// Method: each promise is written once and run on both grounds. Every test has a tenant of its own, so they share one broker.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { setTimeout as sleep } from "node:timers/promises";
import { auditSubstrate, connectJetStream, ensureStreams } from "../../bus/jetstream.ts";
import { type AppendOutcome, type Bus, type BucketChange, type Delivery, headerOf, type InboxSpec, type StoredMessage } from "../../bus/port.ts";
import { HEADER_COMMIT } from "../../protocol/commands.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject, dueSubject, parseActorSubject, residentSubject, shardOf, timerSubject } from "../../protocol/subjects.ts";
import { type Ground, jetStreamGround, LEASE_TTL_MS, memoryGround, realWorld, SHARDS } from "./bus-grounds.ts";
import { startNatsServer } from "./nats-server.ts";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const text = (data: Uint8Array): string => new TextDecoder().decode(data);
let tenants = 0;
const newTenant = (): string => `t${(tenants += 1)}`;
const session = (tenant: string, id: string): ActorAddress => ({ tenant, kind: "session", id });
const journal = (tenant: string, id = "s1"): string => actorSubject(session(tenant, id), "event");

let commits = 0;
const append = (bus: Bus, subject: string, expected: number, data = "x", commit_id = `test.${(commits += 1)}`): Promise<AppendOutcome> =>
  bus.append({ subject, data: bytes(data), expected_last_sequence: expected, commit_id });

async function committed(outcome: Promise<AppendOutcome>): Promise<number> {
  const is = await outcome;
  if (is.kind !== "committed") throw new Error(`not committed: ${JSON.stringify(is)}`);
  return is.sequence;
}

async function collect(messages: AsyncIterable<StoredMessage>): Promise<StoredMessage[]> {
  const all: StoredMessage[] = [];
  for await (const message of messages) all.push(message);
  return all;
}

/** Waits until it holds, or fails with what was seen last. */
async function eventually<T>(look: () => T | Promise<T>, holds: (seen: T) => boolean, patience_ms = 20_000): Promise<T> {
  const give_up_at = Date.now() + patience_ms;
  for (;;) {
    const seen = await look();
    if (holds(seen)) return seen;
    if (Date.now() > give_up_at) throw new Error(`not in time; seen last: ${JSON.stringify(seen)}`);
    await sleep(5);
  }
}

/** The inbox of one tenant, so that tests do not share one. */
const inboxOf = (tenant: string, shard = "*"): InboxSpec => ({
  stream: "COMMANDS",
  durable: `inbox-${tenant}`,
  filters: [`shard.${shard}.tenant.${tenant}.session.*.*`],
});

async function command(bus: Bus, tenant: string, body: string, id = "s1"): Promise<number> {
  const outcome = await bus.publish(actorSubject(session(tenant, id), "command"), bytes(body));
  if (outcome.kind !== "stored") throw new Error(`not stored: ${JSON.stringify(outcome)}`);
  return outcome.sequence;
}

const grounds: [string, () => Promise<Ground>][] = [
  ["memory", memoryGround],
  ["jetstream", jetStreamGround],
];

describe.each(grounds)("the bus on %s", (_name, makeGround) => {
  let ground: Ground;
  let bus: Bus;
  beforeAll(async () => {
    ground = await makeGround();
    bus = await ground.connect("main");
  });
  afterAll(() => ground.stop());

  describe("the fence", () => {
    test("an append behind another's names the rival's message and stores nothing", async () => {
      const subject = journal(newTenant());
      const rival = await committed(append(bus, subject, 0, "rival"));
      expect(await append(bus, subject, 0, "late")).toEqual({ kind: "superseded", by_sequence: rival });
      expect((await collect(bus.read("EVENTS", subject, 1))).map((message) => text(message.data))).toEqual(["rival"]);
    });

    test("of eight appends behind the same message exactly one is committed, and the others name it", async () => {
      const subject = journal(newTenant());
      const rivals = await Promise.all(Array.from({ length: 4 }, (_, index) => ground.connect(`rival-${subject}-${index}`)));
      const outcomes = await Promise.all([...rivals, ...rivals].map((rival, index) => append(rival, subject, 0, `rival ${index}`)));
      const winners = outcomes.filter((outcome) => outcome.kind === "committed");
      expect(winners).toHaveLength(1);
      const by_sequence = winners[0]?.kind === "committed" ? winners[0].sequence : 0;
      expect(outcomes.filter((outcome) => outcome.kind === "superseded")).toEqual(Array.from({ length: 7 }, () => ({ kind: "superseded", by_sequence })));
      expect(await collect(bus.read("EVENTS", subject, 1))).toHaveLength(1);
      await Promise.all(rivals.map((rival) => rival.close()));
    });

    test("a writer that believes in a message the stream does not have is superseded", async () => {
      const subject = journal(newTenant());
      expect(await append(bus, subject, 4_000_000)).toEqual({ kind: "superseded", by_sequence: 0 });
    });

    test("an append whose answer is lost is told as committed, and stored once", async () => {
      const subject = journal(newTenant());
      const writer = await ground.connect(`lost-${subject}`);
      ground.silence(`lost-${subject}`);
      const outcome = append(writer, subject, 0, "mine");
      const stored = await eventually(
        () => bus.last("EVENTS", subject),
        (message) => message !== undefined,
      );
      await ground.restore(`lost-${subject}`);
      expect(await outcome).toEqual({ kind: "committed", sequence: stored?.sequence });
      expect(await collect(bus.read("EVENTS", subject, 1))).toHaveLength(1);
      await writer.close();
    });

    test("an append whose answer is lost is told as committed even when a rival has built on it", async () => {
      const subject = journal(newTenant());
      const writer = await ground.connect(`built-${subject}`);
      ground.silence(`built-${subject}`);
      const outcome = append(writer, subject, 0, "mine");
      const stored = await eventually(
        () => bus.last("EVENTS", subject),
        (message) => message !== undefined,
      );
      await committed(append(bus, subject, stored?.sequence ?? 0, "rival"));
      await ground.restore(`built-${subject}`);
      expect(await outcome).toEqual({ kind: "committed", sequence: stored?.sequence });
      await writer.close();
    });

    test("an append repeated with its commit id is answered with the first one's sequence and stored once", async () => {
      const subject = journal(newTenant());
      const first = await committed(append(bus, subject, 0, "mine", "me.1"));
      expect(await append(bus, subject, 0, "mine", "me.1")).toEqual({ kind: "committed", sequence: first });
      expect((await collect(bus.read("EVENTS", subject, 1))).map((message) => headerOf(message.headers, HEADER_COMMIT))).toEqual(["me.1"]);
    });

    test("of 200 appends that travel together one stale member is superseded and the others are committed where they say", async () => {
      const tenant = newTenant();
      const rival = await committed(append(bus, journal(tenant, "s77"), 0, "rival"));
      const outcomes = await Promise.all(Array.from({ length: 200 }, (_, index) => append(bus, journal(tenant, `s${index}`), 0, `of ${index}`)));
      for (const [index, outcome] of outcomes.entries()) {
        if (index === 77) expect(outcome).toEqual({ kind: "superseded", by_sequence: rival });
        else {
          const last = await bus.last("EVENTS", journal(tenant, `s${index}`));
          expect(outcome).toEqual({ kind: "committed", sequence: last?.sequence });
          expect(text(last?.data as Uint8Array)).toBe(`of ${index}`);
        }
      }
    });

    test("200 appends that travel together are told their own sequences, on which their next ones build", async () => {
      const tenant = newTenant();
      const actors = Array.from({ length: 200 }, (_, index) => journal(tenant, `s${index}`));
      const first = await Promise.all(actors.map((subject) => committed(append(bus, subject, 0, `first of ${subject}`))));
      const second = await Promise.all(actors.map((subject, index) => committed(append(bus, subject, first[index] as number, `second of ${subject}`))));
      const stored = new Map((await collect(bus.read("EVENTS", `tenant.${tenant}.>`, 1))).map((message) => [message.sequence, text(message.data)]));
      expect(actors.map((_, index) => [stored.get(first[index] as number), stored.get(second[index] as number)])).toEqual(
        actors.map((subject) => [`first of ${subject}`, `second of ${subject}`]),
      );
    });

    test("an append waits for an earlier one of the same subject, so both can be committed", async () => {
      const subject = journal(newTenant());
      const first = append(bus, subject, 0, "one");
      const second = first.then((outcome) => append(bus, subject, outcome.kind === "committed" ? outcome.sequence : -1, "two"));
      const stale = append(bus, subject, 0, "stale");
      expect([(await first).kind, (await stale).kind]).toEqual(["committed", "superseded"]);
      expect((await second).kind).toBe("committed");
    });

    test("a publish with an expected sequence is a conflict when another message stands there", async () => {
      const subject = actorSubject(session(newTenant(), "s1"), "snapshot");
      const first = await bus.publish(subject, bytes("1"), { expected_last_sequence: 0 });
      expect(first).toEqual({ kind: "stored", stream: "SNAPSHOTS", sequence: first.kind === "stored" ? first.sequence : 0 });
      expect(await bus.publish(subject, bytes("2"), { expected_last_sequence: 0 })).toEqual({ kind: "conflict" });
    });
  });

  describe("reading", () => {
    test("a journal among 600 other messages, and all of them, are read in order, from and to where they are asked for", async () => {
      const tenant = newTenant();
      const sequences: number[] = [];
      await Promise.all(Array.from({ length: 20 }, (_, index) => committed(append(bus, journal(tenant, `other${index}`), 0))));
      for (let index = 0; index < 30; index += 1) {
        sequences.push(await committed(append(bus, journal(tenant), sequences.at(-1) ?? 0, `n ${index}`)));
        await Promise.all(Array.from({ length: 19 }, (_, other) => append(bus, journal(tenant, `x${index}-${other}`), 0)));
      }
      const all = await collect(bus.read("EVENTS", journal(tenant), 1));
      expect(all.map((message) => message.sequence)).toEqual(sequences);
      expect(all.map((message) => text(message.data))).toEqual(Array.from({ length: 30 }, (_, index) => `n ${index}`));
      const part = await collect(bus.read("EVENTS", journal(tenant), sequences[10] as number, sequences[20] as number));
      expect(part.map((message) => message.sequence)).toEqual(sequences.slice(10, 21));
      const everything = (await collect(bus.read("EVENTS", `tenant.${tenant}.>`, 1))).map((message) => message.sequence);
      expect(everything).toHaveLength(620);
      expect(everything).toEqual([...everything].sort((a, b) => a - b));
    });

    test("a reader that stops early leaves nothing behind, and an empty subject reads as nothing", async () => {
      const tenant = newTenant();
      await Promise.all(Array.from({ length: 5 }, (_, index) => append(bus, journal(tenant, `s${index}`), 0)));
      for await (const message of bus.read("EVENTS", `tenant.${tenant}.>`, 1)) {
        expect(message.stream).toBe("EVENTS");
        break;
      }
      expect(await collect(bus.read("EVENTS", journal(tenant, "nobody"), 1))).toEqual([]);
      expect(await bus.last("EVENTS", journal(tenant, "nobody"))).toBeUndefined();
    });

    test("a message bears its headers, its bytes and when it was stored", async () => {
      const subject = actorSubject(session(newTenant(), "s1"), "snapshot");
      const before = Date.now();
      const outcome = await bus.publish(subject, new Uint8Array([0, 255, 13, 10]), { headers: { "Troupe-Test": "a: b" } });
      for (const message of [await bus.last("SNAPSHOTS", subject), (await collect(bus.read("SNAPSHOTS", subject, 1)))[0]]) {
        expect([message?.stream, message?.subject, message?.sequence]).toEqual(["SNAPSHOTS", subject, outcome.kind === "stored" ? outcome.sequence : 0]);
        expect([...(message?.data ?? [])]).toEqual([0, 255, 13, 10]);
        expect(headerOf(message?.headers ?? {}, "troupe-test")).toBe("a: b");
        expect(Math.abs((message?.stored_at_ms ?? 0) - before), "milliseconds, by a clock").toBeLessThan(20_000);
      }
    });

    test("the last of each of 1,100 subjects is found, beyond what one direct read of the broker can hold", async () => {
      const tenant = newTenant();
      const subjects = Array.from({ length: 1_100 }, (_, index) => residentSubject(index % SHARDS, session(tenant, `s${index}`)));
      await Promise.all(subjects.map((subject) => bus.publish(subject, bytes(""))));
      await bus.publish(subjects[5] as string, bytes("newer"));
      const found = await bus.last_of_each("RESIDENT", `resident.*.${tenant}.>`);
      expect(found.map((message) => message.subject).sort()).toEqual([...subjects].sort());
      expect(text(found.at(-1)?.data as Uint8Array)).toBe("newer");
    });

    test("what a stream holds is counted by subject under a filter, and what was acknowledged no longer", async () => {
      const bus = await ground.connect("counter");
      const tenant = "counting";
      const said = (id: string): string => actorSubject({ tenant, kind: "session", id }, "command");
      for (const id of ["s1", "s2", "s2", "s2"]) await bus.publish(said(id), new Uint8Array(10));
      const counted = async (): Promise<[string, number][]> =>
        (await bus.counts("COMMANDS", `shard.*.tenant.${tenant}.>`))
          .map(({ subject, messages }): [string, number] => [subject.replace(/^shard\.\d+\./, ""), messages])
          .sort(([a], [b]) => (a < b ? -1 : 1));
      expect(await counted()).toEqual([
        [said("s1"), 1],
        [said("s2"), 3],
      ]);
      expect(await bus.counts("COMMANDS", "shard.*.tenant.nobody.>")).toEqual([]);
      const filters = ["s1", "s2"].map((id) => `shard.*.tenant.${tenant}.session.${id}.command`);
      let delivered = 0;
      const inbox = await bus.consume(
        { stream: "COMMANDS", durable: `counted-${tenant}`, filters },
        { on_delivery: (delivery) => (delivered++ === 0 ? delivery.ack() : undefined), on_reset: () => undefined },
      );
      await eventually(counted, (all) => all.length === 1);
      expect(await counted()).toEqual([[said("s2"), 3]]);
      await inbox.stop();
    });

    test("a mark is cleared only while it is the last of its subject", async () => {
      const subject = residentSubject(3, session(newTenant(), "s1"));
      const first = await bus.publish(subject, bytes("1"));
      const second = await bus.publish(subject, bytes("2"));
      expect(await bus.clear("RESIDENT", subject, first.kind === "stored" ? first.sequence : 0)).toEqual({ kind: "conflict" });
      const sequence = second.kind === "stored" ? second.sequence : 0;
      expect(await bus.clear("RESIDENT", subject, sequence)).toEqual({ kind: "ok", revision: sequence });
      expect(await bus.last("RESIDENT", subject)).toBeUndefined();
      expect(await bus.clear("RESIDENT", subject, sequence)).toEqual({ kind: "conflict" });
    });
  });

  describe("following", () => {
    test("what was stored and what comes is told in order, each once, and a slow or throwing listener loses nothing", async () => {
      const tenant = newTenant();
      const sequences: number[] = [];
      for (let index = 0; index < 5; index += 1) sequences.push(await committed(append(bus, journal(tenant), sequences.at(-1) ?? 0)));
      const told: number[] = [];
      let at_once = 0;
      const subscription = await bus.follow("EVENTS", journal(tenant), sequences[2] as number, async (message) => {
        at_once += 1;
        expect(at_once).toBe(1);
        await sleep(2);
        told.push(message.sequence);
        at_once -= 1;
        if (told.length === 2) throw new Error("a listener breaks");
      });
      for (let index = 0; index < 5; index += 1) sequences.push(await committed(append(bus, journal(tenant), sequences.at(-1) as number)));
      await eventually(
        () => told.length,
        (length) => length >= 8,
      );
      await sleep(20);
      expect(told).toEqual(sequences.slice(2));
      await subscription.stop();
      await append(bus, journal(tenant), sequences.at(-1) as number);
      await sleep(50);
      expect(told).toHaveLength(8);
    });

    test("a republished message bears its place in the stream and the place of the subject's previous one", async () => {
      const tenant = newTenant();
      const heard: { subject: string; sequence: string | undefined; previous: string | undefined; of: string | undefined; data: string }[] = [];
      const subscription = bus.subscribe(`live.tenant.${tenant}.>`, ({ subject, headers, data }) => {
        heard.push({
          subject,
          sequence: headerOf(headers, "Nats-Sequence"),
          previous: headerOf(headers, "Nats-Last-Sequence"),
          of: headerOf(headers, "Nats-Subject"),
          data: text(data),
        });
      });
      await bus.flush();
      const first = await committed(append(bus, journal(tenant), 0, "one"));
      await append(bus, journal(tenant), 0, "refused");
      const second = await committed(append(bus, journal(tenant), first, "two"));
      const token = await bus.publish(actorSubject(session(tenant, "s1"), "token"), bytes("three"));
      await eventually(
        () => heard.length,
        (length) => length >= 3,
      );
      expect(heard).toEqual([
        { subject: `live.${journal(tenant)}`, sequence: String(first), previous: "0", of: journal(tenant), data: "one" },
        { subject: `live.${journal(tenant)}`, sequence: String(second), previous: String(first), of: journal(tenant), data: "two" },
        {
          subject: `live.tenant.${tenant}.session.s1.token`,
          sequence: String(token.kind === "stored" && token.sequence),
          previous: "0",
          of: `tenant.${tenant}.session.s1.token`,
          data: "three",
        },
      ]);
      await subscription.stop();
    });
  });

  describe("inboxes", () => {
    test("commands come once, in stream order, with the shard before their subject, and leave with their acknowledgement", async () => {
      const tenant = newTenant();
      const actor = session(tenant, "s1");
      const deliveries: Delivery[] = [];
      const subscription = await bus.consume(inboxOf(tenant, String(shardOf(actor, SHARDS))), {
        on_delivery: (delivery) => void deliveries.push(delivery),
        on_reset: () => expect.unreachable(),
      });
      const sequences: number[] = [];
      for (let index = 0; index < 20; index += 1) sequences.push(await command(bus, tenant, `c${index}`));
      await eventually(
        () => deliveries.length,
        (length) => length >= 20,
      );
      expect(deliveries.map(({ message }) => message.sequence)).toEqual(sequences);
      expect(deliveries.map(({ message }) => text(message.data))).toEqual(Array.from({ length: 20 }, (_, index) => `c${index}`));
      expect(deliveries[0]?.message.subject).toBe(`shard.${shardOf(actor, SHARDS)}.${actorSubject(actor, "command")}`);
      const { incarnation } = await bus.bounds("COMMANDS");
      expect(deliveries[3]?.source).toEqual({ stream: "COMMANDS", incarnation, seq: sequences[3] });
      for (const delivery of deliveries.slice(0, 19)) delivery.ack();
      await eventually(
        () => collect(bus.read("COMMANDS", `shard.*.tenant.${tenant}.>`, 1)),
        (left) => left.length === 1,
      );
      deliveries[19]?.ack();
      await eventually(
        () => collect(bus.read("COMMANDS", `shard.*.tenant.${tenant}.>`, 1)),
        (left) => left.length === 0,
      );
      await subscription.stop();
    });

    test("after a cut connection a reset is told, and then everything unacknowledged comes again in order before what is new", async () => {
      const tenant = newTenant();
      const name = `reset-${tenant}`;
      const reader = await ground.connect(name);
      const told: string[] = [];
      const held: Delivery[] = [];
      await reader.consume(inboxOf(tenant), {
        on_delivery: (delivery) => {
          told.push(text(delivery.message.data));
          held.push(delivery);
        },
        on_reset: () => void told.push("reset"),
      });
      for (let index = 0; index < 4; index += 1) await command(bus, tenant, `c${index}`, `s${index}`);
      await eventually(
        () => told.length,
        (length) => length === 4,
      );
      held[1]?.ack();
      await reader.flush();
      await eventually(
        () => collect(bus.read("COMMANDS", `shard.*.tenant.${tenant}.>`, 1)),
        (left) => left.length === 3,
      );
      await ground.restore(name);
      await command(bus, tenant, "c4", "s4");
      await eventually(
        () => told.length,
        (length) => length >= 9,
      );
      expect(told).toEqual(["c0", "c1", "c2", "c3", "reset", "c0", "c2", "c3", "c4"]);
      await reader.close();
    });

    test("what is settled is gone, and what a later opening delivers again is not settled by the earlier one", async () => {
      const tenant = newTenant();
      const name = `settle-${tenant}`;
      const reader = await ground.connect(name);
      const held: Delivery[] = [];
      let resets = 0;
      await reader.consume(inboxOf(tenant), { on_delivery: (delivery) => void held.push(delivery), on_reset: () => void (resets += 1) });
      for (let index = 0; index < 2; index += 1) await command(bus, tenant, `c${index}`, `s${index}`);
      await eventually(
        () => held.length,
        (length) => length === 2,
      );
      expect(await held[0]?.settle()).toBe(true);
      expect(await collect(bus.read("COMMANDS", `shard.*.tenant.${tenant}.>`, 1))).toHaveLength(1);
      await ground.restore(name);
      await eventually(
        () => [held.length, resets],
        ([length]) => length === 3,
      );
      expect(text(held[2]!.message.data)).toBe("c1");
      expect(await held[1]?.settle()).toBe(false);
      await reader.close();
    });

    test.each(["dies", "freezes with its socket open"] as const)(
      "when an owner %s the next one gets all it had not acknowledged, in order and soon",
      async (how) => {
        const tenant = newTenant();
        const name = `owner-${tenant}`;
        const owner = await ground.connect(name);
        const had: string[] = [];
        await owner.consume(inboxOf(tenant), { on_delivery: (delivery) => void had.push(text(delivery.message.data)), on_reset: () => undefined });
        for (let index = 0; index < 10; index += 1) await command(bus, tenant, `c${index}`, `s${index}`);
        await eventually(
          () => had.length,
          (length) => length === 10,
        );
        if (how === "dies") ground.kill(name);
        else ground.freeze(name);
        await command(bus, tenant, "c10", "s10");
        const begun = Date.now();
        const got: string[] = [];
        const next = await bus.consume(inboxOf(tenant), {
          on_delivery: (delivery) => {
            got.push(text(delivery.message.data));
            delivery.ack();
          },
          on_reset: () => undefined,
        });
        for (let index = 11; index < 20; index += 1) await command(bus, tenant, `c${index}`, `s${index}`);
        await eventually(
          () => got.length,
          (length) => length >= 20,
        );
        expect(Date.now() - begun, "not the half minute after which the broker itself gives up what the dead one holds").toBeLessThan(15_000);
        expect(got).toEqual(Array.from({ length: 20 }, (_, index) => `c${index}`));
        await next.stop();
        ground.kill(name);
      },
    );

    test("a queue hands out as many undecided commands as one can choose among and no more, goes on as they are done, and ends empty, each done once", async () => {
      const tenant = newTenant();
      const window = 200;
      const total = window + 40;
      let said = 0;
      const sayAll = async (): Promise<void> => {
        for (let index = said++; index < total; index = said++) await command(bus, tenant, `c${index}`, `s${index % 50}`);
      };
      await Promise.all(Array.from({ length: 40 }, sayAll));
      const seen = new Set<number>();
      const held: Delivery[] = [];
      const queue = await bus.consume(
        { ...inboxOf(tenant), undecided_max: window },
        {
          on_delivery: (delivery) => {
            expect(seen.has(delivery.source.seq), "each once").toBe(false);
            seen.add(delivery.source.seq);
            held.push(delivery);
          },
          on_reset: () => expect.unreachable(),
        },
      );
      await eventually(
        () => held.length,
        (length) => length >= window,
      );
      await sleep(300);
      expect(held.length, "nothing beyond the bound").toBe(window);
      // Done in any order: one of the last first.
      for (const delivery of [...held.slice(-10), ...held.slice(0, 10)]) delivery.ack();
      await eventually(
        () => held.length,
        (length) => length >= window + 20,
      );
      await sleep(300);
      expect(held.length, "as many more as were done").toBe(window + 20);
      for (const delivery of held.slice(10)) delivery.ack();
      await eventually(
        () => held.length,
        (length) => length === total,
      );
      for (const delivery of held.slice(window + 20)) delivery.ack();
      await eventually(
        () => bus.counts("COMMANDS", `shard.*.tenant.${tenant}.>`),
        (left) => left.length === 0,
      );
      const order = held.map(({ source }) => source.seq);
      expect(order).toEqual([...order].sort((a, b) => a - b));
      await queue.stop();
    }, 30_000);

    test("a delivery whose handler throws does not stop those after it, and is logged", async () => {
      const tenant = newTenant();
      const told: string[] = [];
      const subscription = await bus.consume(inboxOf(tenant), {
        on_delivery: (delivery) => {
          delivery.ack();
          told.push(text(delivery.message.data));
          if (told.length === 1) throw new Error(`broken handler of ${tenant}`);
        },
        on_reset: () => undefined,
      });
      for (const body of ["a", "b", "c"]) await command(bus, tenant, body);
      await eventually(
        () => told.join(""),
        (all) => all === "abc",
      );
      expect(ground.complaints.filter((line) => line.includes(`broken handler of ${tenant}`))).toHaveLength(1);
      await subscription.stop();
    });

    test("an inbox opened with other filters than before reads by the new ones", async () => {
      const tenant = newTenant();
      const spec = inboxOf(tenant);
      await (await bus.consume(spec, { on_delivery: () => undefined, on_reset: () => undefined })).stop();
      const told: string[] = [];
      const narrow = { ...spec, filters: [`shard.*.tenant.${tenant}.session.wanted.*`, `shard.*.tenant.${tenant}.session.also.*`] };
      const subscription = await bus.consume(narrow, { on_delivery: (delivery) => void told.push(text(delivery.message.data)), on_reset: () => undefined });
      await command(bus, tenant, "1", "wanted");
      await command(bus, tenant, "2", "unwanted");
      await command(bus, tenant, "3", "also");
      await eventually(
        () => told.length,
        (length) => length >= 2,
      );
      await sleep(30);
      expect(told).toEqual(["1", "3"]);
      await subscription.stop();
    });

    test("each of 1,000 random actors has the shard that shardOf says", async () => {
      const tenant = newTenant();
      const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-";
      const word = (): string => Array.from({ length: 1 + Math.floor(Math.random() * 30) }, () => letters[Math.floor(Math.random() * letters.length)]).join("");
      const kinds = ["session", "workflow", "tenant", "budget"] as const;
      const sent = Array.from({ length: 1_000 }, (_, index) => ({
        tenant: `${tenant}-${word()}`,
        kind: kinds[index % 4] as (typeof kinds)[number],
        id: word(),
      }));
      const sequences = new Set<number>();
      for (const outcome of await Promise.all(sent.map((actor) => bus.publish(actorSubject(actor, "control"), bytes("")))))
        if (outcome.kind === "stored") sequences.add(outcome.sequence);
      expect(sequences.size).toBe(1_000);
      const stored = (await collect(bus.read("COMMANDS", "shard.>", Math.min(...sequences)))).filter((message) => sequences.has(message.sequence));
      expect(stored).toHaveLength(1_000);
      for (const message of stored) {
        const parse = parseActorSubject(message.subject);
        expect(Number(message.subject.split(".")[1]), message.subject).toBe(parse.kind === "actor" ? shardOf(parse.actor, SHARDS) : undefined);
      }
    });
  });

  describe("schedules", () => {
    const dueInbox = (tenant: string, actor: ActorAddress): InboxSpec => ({
      stream: "TIMERS",
      durable: `due-${tenant}`,
      filters: [`shard.${shardOf(actor, SHARDS)}.${dueSubject(actor)}`],
    });

    test("a schedule arrives in its shard's inbox at its time, and arming again replaces it", async () => {
      const tenant = newTenant();
      const actor = session(tenant, "s1");
      const due: { data: string; at_ms: number }[] = [];
      const subscription = await bus.consume(dueInbox(tenant, actor), {
        on_delivery: (delivery) => {
          due.push({ data: text(delivery.message.data), at_ms: Date.now() });
          delivery.ack();
        },
        on_reset: () => undefined,
      });
      const begun = Date.now();
      const first = await bus.schedule(actor, begun + 1_500, bytes("first"), 0);
      const first_sequence = first.kind === "stored" ? first.sequence : -1;
      expect((await bus.schedule(actor, begun + 100, bytes("by somebody who knew of none"), 0)).kind).toBe("conflict");
      expect((await bus.schedule(actor, begun + 1_800, bytes("second"), first_sequence)).kind).toBe("stored");
      expect((await bus.schedule(actor, begun + 100, bytes("by somebody who knew of the first"), first_sequence)).kind).toBe("conflict");
      await eventually(
        () => due.length,
        (length) => length >= 1,
      );
      await sleep(100);
      expect(due.map(({ data }) => data)).toEqual(["second"]);
      expect((due[0]?.at_ms ?? 0) - begun).toBeGreaterThanOrEqual(1_799);
      expect((due[0]?.at_ms ?? 0) - begun).toBeLessThan(10_000);
      expect(await bus.last("TIMERS", timerSubject(actor))).toBeUndefined();
      // It fired and is gone: there is none to be replaced.
      expect((await bus.schedule(actor, Date.now() + 60_000, bytes("third"), 0)).kind).toBe("stored");
      await subscription.stop();
    });

    test("a schedule in the past arrives at once", async () => {
      const tenant = newTenant();
      const actor = session(tenant, "s1");
      const due: string[] = [];
      const subscription = await bus.consume(dueInbox(tenant, actor), {
        on_delivery: (delivery) => void (due.push(text(delivery.message.data)), delivery.ack()),
        on_reset: () => undefined,
      });
      await bus.schedule(actor, Date.now() - 60_000, bytes("late"), 0);
      await eventually(
        () => due,
        (all) => all.length === 1,
        2_000,
      );
      expect(due).toEqual(["late"]);
      await subscription.stop();
    });
  });

  describe("buckets", () => {
    test("a key is created once, updated and deleted only behind its last revision, and created again after", async () => {
      const key = newTenant();
      const bucket = bus.bucket("PLACEMENT");
      const created = await bucket.create(key, bytes("1"));
      if (created.kind !== "ok") throw new Error("the first creation wins");
      expect(await bucket.create(key, bytes("2"))).toEqual({ kind: "conflict" });
      const updated = await bucket.update(key, bytes("3"), created.revision);
      if (updated.kind !== "ok") throw new Error("an update behind the last revision wins");
      expect(await bucket.update(key, bytes("4"), created.revision)).toEqual({ kind: "conflict" });
      const entry = await bucket.get(key);
      expect([entry?.key, text(entry?.value as Uint8Array), entry?.revision]).toEqual([key, "3", updated.revision]);
      expect((await bucket.all()).filter((other) => other.key === key)).toHaveLength(1);
      expect(await bucket.delete(key, created.revision)).toEqual({ kind: "conflict" });
      expect((await bucket.delete(key, updated.revision)).kind).toBe("ok");
      expect(await bucket.get(key)).toBeUndefined();
      expect((await bucket.all()).filter((other) => other.key === key)).toHaveLength(0);
      expect((await bucket.create(key, bytes("5"))).kind).toBe("ok");
    });

    test("a lease that is renewed lives, one that is not is told as gone soon after its time, once, and can be taken again", async () => {
      const key = newTenant();
      const bucket = bus.bucket("WORKERS");
      const changes: { change: BucketChange; at_ms: number }[] = [];
      const subscription = await bucket.watch((change) => {
        if ((change.kind === "put" ? change.entry.key : change.key) === key) changes.push({ change, at_ms: Date.now() });
      });
      let lease = await bucket.create(key, bytes("0"));
      for (let index = 1; index <= 4; index += 1) {
        await sleep(LEASE_TTL_MS / 4);
        lease = await bucket.update(key, bytes(String(index)), lease.kind === "ok" ? lease.revision : -1);
        expect(lease.kind).toBe("ok");
      }
      const renewed_at_ms = Date.now();
      await eventually(
        () => changes.map(({ change }) => change.kind),
        (kinds) => kinds.includes("gone"),
        10 * LEASE_TTL_MS,
      );
      const gone = changes.at(-1);
      expect((gone?.at_ms ?? 0) - renewed_at_ms).toBeGreaterThan(LEASE_TTL_MS - 50);
      expect((gone?.at_ms ?? 0) - renewed_at_ms).toBeLessThan(6 * LEASE_TTL_MS);
      expect(changes.map(({ change }) => change.kind)).toEqual(["put", "put", "put", "put", "put", "gone"]);
      expect(await bucket.get(key)).toBeUndefined();
      expect(await bucket.update(key, bytes("late"), lease.kind === "ok" ? lease.revision : -1)).toEqual({ kind: "conflict" });
      expect((await bucket.create(key, bytes("again"))).kind).toBe("ok");
      await eventually(
        () => changes.length,
        (length) => length === 7,
      );
      await subscription.stop();
    });

    test("a lease that was given back is told as gone once, though its marker expires too", async () => {
      const key = newTenant();
      const bucket = bus.bucket("WORKERS");
      const told: string[] = [];
      const subscription = await bucket.watch((change) => {
        if ((change.kind === "put" ? change.entry.key : change.key) === key) told.push(change.kind);
      });
      const lease = await bucket.create(key, bytes("1"));
      await bucket.delete(key, lease.kind === "ok" ? lease.revision : -1);
      await sleep(LEASE_TTL_MS + 500);
      expect(told).toEqual(["put", "gone"]);
      await subscription.stop();
    });

    test("a watcher is told the present entries before the watch is answered, and a throwing one is still told the rest", async () => {
      const prefix = newTenant();
      const bucket = bus.bucket("PLACEMENT");
      for (const name of ["a", "b"]) await bucket.create(`${prefix}-${name}`, bytes(name));
      const told: string[] = [];
      const subscription = await bucket.watch((change) => {
        const key = change.kind === "put" ? change.entry.key : change.key;
        if (!key.startsWith(prefix)) return;
        told.push(`${change.kind} ${key.slice(prefix.length)}`);
        throw new Error("a watcher breaks");
      });
      expect(told).toEqual(["put -a", "put -b"]);
      const created = await bucket.create(`${prefix}-c`, bytes("c"));
      await bucket.delete(`${prefix}-c`, created.kind === "ok" ? created.revision : 0);
      await eventually(
        () => told,
        (all) => all.length === 4,
      );
      expect(told.slice(2)).toEqual(["put -c", "gone -c"]);
      await subscription.stop();
    });
  });

  describe("core messages", () => {
    test("a request is answered by its responder, and one of a queue group hears it", async () => {
      const subject = `system.${newTenant()}.ask`;
      let heard = 0;
      const answer = (): void => void (heard += 1);
      const responders = [1, 2, 3].map(() =>
        bus.subscribe(
          subject,
          (message) => {
            answer();
            bus.send(message.reply as string, bytes(`re: ${text(message.data)} ${headerOf(message.headers, "X-Test")}`), { headers: { "X-Back": "yes" } });
          },
          { queue: "responders" },
        ),
      );
      await bus.flush();
      const reply = await bus.request(subject, bytes("you"), { headers: { "X-Test": "there" } });
      expect([text(reply?.data as Uint8Array), headerOf(reply?.headers ?? {}, "X-Back"), heard]).toEqual(["re: you there", "yes", 1]);
      await Promise.all(responders.map((responder) => responder.stop()));
    });

    test("a request nobody listens to is answered with nothing, long before its patience ends", async () => {
      const begun = Date.now();
      expect(await bus.request(`system.${newTenant()}.nobody`, bytes(""), { patience_ms: 30_000 })).toBeUndefined();
      expect(Date.now() - begun).toBeLessThan(10_000);
    });

    test("a request that is heard and not answered ends with its patience", async () => {
      const subject = `system.${newTenant()}.mute`;
      const mute = bus.subscribe(subject, () => undefined);
      await bus.flush();
      const begun = Date.now();
      expect(await bus.request(subject, bytes(""), { patience_ms: 200 })).toBeUndefined();
      expect(Date.now() - begun).toBeGreaterThanOrEqual(190);
      await mute.stop();
    });

    test("a listener that throws, now or later, is logged and hears the next message, and so does everybody else", async () => {
      const tenant = newTenant();
      const heard: string[] = [];
      const throwing = bus.subscribe(`system.${tenant}.*`, (message) => {
        heard.push(text(message.data));
        throw new Error(`broken listener of ${tenant}`);
      });
      const rejection = (): Promise<never> => Promise.reject(new Error(`rejecting listener of ${tenant}`));
      const rejecting = bus.subscribe(`system.${tenant}.*`, rejection as () => void);
      const calm: string[] = [];
      const other = bus.subscribe(`system.${tenant}.>`, (message) => void calm.push(text(message.data)));
      await bus.flush();
      for (const body of ["a", "b"]) bus.send(`system.${tenant}.x`, bytes(body));
      await eventually(
        () => [heard.length, calm.length],
        ([throws, calms]) => throws === 2 && calms === 2,
      );
      expect((await bus.publish(residentSubject(0, session(tenant, "s")), bytes(""))).kind).toBe("stored");
      expect(ground.complaints.filter((line) => line.includes(`broken listener of ${tenant}`))).toHaveLength(2);
      expect(ground.complaints.filter((line) => line.includes(`rejecting listener of ${tenant}`))).toHaveLength(2);
      await Promise.all([throwing.stop(), rejecting.stop(), other.stop()]);
    });

    test("a fresh inbox hears what is sent to it, and nothing once it is stopped", async () => {
      const inbox = bus.inbox();
      const heard: string[] = [];
      const subscription = bus.subscribe(inbox, (message) => void heard.push(text(message.data)));
      await bus.flush();
      bus.send(inbox, bytes("one"));
      await eventually(
        () => heard.length,
        (length) => length === 1,
      );
      await subscription.stop();
      bus.send(inbox, bytes("two"));
      await bus.flush();
      await sleep(30);
      expect(heard).toEqual(["one"]);
    });
  });

  describe("limits", () => {
    test("a command of 1 MiB with headers is stored and one of 2 MB is too large", async () => {
      const subject = actorSubject(session(newTenant(), "s1"), "command");
      expect((await bus.publish(subject, new Uint8Array(1024 * 1024), { headers: { "Idempotency-Key": "k".repeat(255) } })).kind).toBe("stored");
      expect(await bus.publish(subject, new Uint8Array(2_000_000))).toEqual({ kind: "too_large" });
      expect(await bus.publish(subject, new Uint8Array(5_000_000))).toEqual({ kind: "too_large" });
    });

    test("a publish that no stream takes is unavailable at once", async () => {
      expect((await bus.publish(`nowhere.${newTenant()}`, bytes(""))).kind).toBe("unavailable");
    });
  });

  // Last, because the broker goes down under everybody.
  describe("while the broker is away", () => {
    test(
      "calls answer unavailable or reject within their patience, appends survive, and followers, watchers and inboxes go on after",
      { timeout: 30_000 },
      async () => {
        const tenant = newTenant();
        const states: string[] = [];
        const listening = bus.on_state((state) => void states.push(state));
        const followed: string[] = [];
        const follower = await bus.follow("EVENTS", `tenant.${tenant}.>`, 1, (message) => void followed.push(text(message.data)));
        const delivered: string[] = [];
        const inbox = await bus.consume(inboxOf(tenant), {
          on_delivery: (delivery) => void (delivered.push(text(delivery.message.data)), delivery.ack()),
          on_reset: () => undefined,
        });
        const watched: string[] = [];
        const watch = await bus.bucket("PLACEMENT").watch((change) => {
          if (change.kind === "put" && change.entry.key.startsWith(tenant)) watched.push(text(change.entry.value));
        });
        const first = await committed(append(bus, journal(tenant), 0, "before"));
        await command(bus, tenant, "before");
        await bus.bucket("PLACEMENT").create(`${tenant}-a`, bytes("before"));
        await eventually(
          () => [followed.length, delivered.length, watched.length].join(),
          (all) => all === "1,1,1",
        );

        await ground.down();
        await eventually(
          () => bus.state,
          (state) => state === "disconnected",
        );
        const begun = Date.now();
        expect((await bus.publish(actorSubject(session(tenant, "s1"), "command"), bytes("lost"), { patience_ms: 200 })).kind).toBe("unavailable");
        expect(Date.now() - begun, "its patience, not the client's own of five seconds").toBeLessThan(3_000);
        const reading = bus.last("EVENTS", journal(tenant)).then(
          () => "an answer",
          (error: Error) => error.name,
        );
        expect(await bus.request("system.anybody", bytes(""), { patience_ms: 100 })).toBeUndefined();
        expect((await append(bus, journal(tenant, "other"), 0)).kind).toBe("unavailable");
        expect(await reading).toBe("BusUnavailable");

        const through = append(bus, journal(tenant), first, "through");
        await sleep(300);
        await ground.up();
        const second = await committed(through);
        await eventually(
          () => bus.state,
          (state) => state === "connected",
        );
        await committed(append(bus, journal(tenant), second, "after"));
        await command(bus, tenant, "after");
        await bus.bucket("PLACEMENT").create(`${tenant}-b`, bytes("after"));
        await eventually(
          () => [followed, delivered, watched],
          ([f, d, w]) => f?.at(-1) === "after" && d?.at(-1) === "after" && w?.at(-1) === "after",
          8_000,
        );
        expect([followed, delivered, watched]).toEqual([
          ["before", "through", "after"],
          ["before", "after"],
          ["before", "after"],
        ]);
        expect(states).toEqual(["disconnected", "connected"]);
        const token = await eventually(
          () => bus.publish(actorSubject(session(tenant, "s1"), "token"), bytes("t")),
          (outcome) => outcome.kind === "stored",
        );
        expect(token.kind).toBe("stored");
        await Promise.all([follower.stop(), inbox.stop(), watch.stop(), listening.stop()]);
      },
    );
  });
});

describe.each([
  ["memory", memoryGround],
  ["jetstream", jetStreamGround],
] as [string, (options: { commands_bytes_max: number }) => Promise<Ground>][])("a small bus on %s", (_name, makeGround) => {
  test("a full inbox answers overloaded, stores nothing, and takes commands again once some are done", async () => {
    const ground = await makeGround({ commands_bytes_max: 100_000 });
    try {
      const bus = await ground.connect("small");
      const subject = actorSubject(session("acme", "s1"), "command");
      const outcomes = [];
      for (let index = 0; index < 12; index += 1) outcomes.push((await bus.publish(subject, new Uint8Array(10_000))).kind);
      expect(outcomes).toEqual([...Array.from({ length: 9 }, () => "stored"), ...Array.from({ length: 3 }, () => "overloaded")]);
      expect((await bus.bounds("COMMANDS")).messages).toBe(9);
      await bus.consume({ stream: "COMMANDS", durable: "d", filters: ["shard.>"] }, { on_delivery: (delivery) => delivery.ack(), on_reset: () => undefined });
      await eventually(
        () => bus.publish(subject, new Uint8Array(10_000)),
        (outcome) => outcome.kind === "stored",
      );
    } finally {
      await ground.stop();
    }
  });
});

describe("streams on a real broker", () => {
  const options = { name: "tool", shards: SHARDS, replicas: 1, log: silentLog, world: realWorld };

  test("another number of shards is refused by name, another limit is migrated, and the audit names what differs", async () => {
    const server = await startNatsServer();
    try {
      const first = await connectJetStream({ ...options, servers: server.url });
      expect(await auditSubstrate(first, { monitor_url: server.monitor_url })).toEqual([]);
      await expect(connectJetStream({ ...options, shards: 32, servers: server.url })).rejects.toThrow(/COMMANDS: shards .*have 16, want 32/);
      const looking = await connectJetStream({ ...options, shards: 32, commands_bytes_max: 5_000_000, servers: server.url, ensure: false });
      const findings = await auditSubstrate(looking, { monitor_url: server.monitor_url });
      expect(findings.map(({ level, what }) => `${level} ${what}`).sort()).toEqual([
        "refuse stream COMMANDS: subject_transform",
        "refuse stream TIMERS: subject_transform",
        "warn stream COMMANDS: max_bytes",
      ]);
      const migrated = await connectJetStream({ ...options, commands_bytes_max: 5_000_000, servers: server.url });
      expect(await auditSubstrate(migrated, { monitor_url: server.monitor_url })).toEqual([]);
      expect(await ensureStreams(migrated)).toMatchObject({ created: [], updated: [] });
      expect((await ensureStreams(first)).updated).toEqual(["COMMANDS"]);
      for (const bus of [first, looking, migrated]) await bus.close();
    } finally {
      await server.stop();
    }
  });

  test("the audit refuses a broker that does not sync each write or takes too small messages, and warns where it cannot look", async () => {
    const server = await startNatsServer({ sync: false, max_payload: "2MB" });
    try {
      const bus = await connectJetStream({ ...options, servers: server.url });
      const findings = await auditSubstrate(bus, { monitor_url: server.monitor_url });
      expect(findings.map(({ level, what, have }) => [level, what, have])).toEqual([
        ["refuse", "max_payload", String(2 * 1024 * 1024)],
        ["refuse", "sync_interval", "120 s"],
      ]);
      expect((await auditSubstrate(bus)).map(({ level, what }) => [level, what])).toContainEqual(["warn", "sync_interval"]);
      await bus.close();
    } finally {
      await server.stop();
    }
  });

  test.each([
    ["last", "with the next heartbeat", 2],
    ["middle", "with the next delivery", 3],
  ])("the %s message, taken from the inbox by somebody else, is missed %s, and all comes again in order", async (_which, _when, count) => {
    const server = await startNatsServer();
    try {
      const bus = await connectJetStream({ ...options, servers: server.url });
      const told: string[] = [];
      const spec = inboxOf("acme");
      const subscription = await bus.consume(spec, {
        on_delivery: ({ message }) => void told.push(text(message.data)),
        on_reset: () => void told.push("reset"),
      });
      const stolen: string[] = [];
      const thief = bus.inbox();
      bus.subscribe(thief, ({ data }) => void (data.length > 0 && stolen.push(text(data))));
      bus.send(`$JS.API.CONSUMER.MSG.NEXT.COMMANDS.${spec.durable}`, bytes(JSON.stringify({ batch: 1, expires: 5_000_000_000 })), { reply: thief });
      await bus.flush();
      const all = Array.from({ length: count }, (_, index) => `c${index}`);
      for (const body of all) await command(bus, "acme", body);
      await eventually(
        () => told.slice(told.indexOf("reset")).length,
        (length) => told.includes("reset") && length > count,
        3_000,
      );
      expect(stolen).toEqual(["c1"]);
      expect(told.slice(told.indexOf("reset"))).toEqual(["reset", ...all]);
      await subscription.stop();
      await bus.close();
    } finally {
      await server.stop();
    }
  });

  test("appends and commands through three crashes of the broker are each stored once, and followed and delivered in order", { timeout: 60_000 }, async () => {
    const server = await startNatsServer();
    try {
      const bus = await connectJetStream({ ...options, servers: server.url });
      const followed = new Map<string, string[]>();
      await bus.follow("EVENTS", "tenant.>", 1, ({ subject, data }) => void followed.set(subject, [...(followed.get(subject) ?? []), text(data)]));
      const delivered = new Set<number>();
      await bus.consume(inboxOf("acme"), { on_delivery: (delivery) => (delivered.add(delivery.message.sequence), delivery.ack()), on_reset: () => undefined });
      let over = false;
      const write = async (index: number): Promise<number> => {
        let last = 0;
        for (let count = 0; ; count += 1) {
          if (over) return count;
          let outcome: AppendOutcome;
          do outcome = await append(bus, journal("acme", `s${index}`), last, String(count), `w${index}.${count}`);
          while (outcome.kind === "unavailable");
          if (outcome.kind === "superseded") throw new Error("there is no rival");
          last = outcome.sequence;
        }
      };
      const writers = Array.from({ length: 40 }, (_, index) => write(index));
      const send = async (): Promise<number[]> => {
        const stored: number[] = [];
        while (!over) {
          const outcome = await bus.publish(actorSubject(session("acme", "s1"), "command"), bytes("c"), { patience_ms: 1_000 });
          if (outcome.kind === "stored") stored.push(outcome.sequence);
        }
        return stored;
      };
      const sender = send();
      for (let crash = 0; crash < 3; crash += 1) {
        await sleep(500);
        await server.restart({ down_ms: crash * 150 });
      }
      await sleep(500);
      over = true;
      const counts = await Promise.all(writers);
      expect(Math.min(...counts)).toBeGreaterThan(0);
      const wanted = counts.map((count) => Array.from({ length: count }, (_, index) => String(index)));
      for (const [index, want] of wanted.entries())
        expect((await collect(bus.read("EVENTS", journal("acme", `s${index}`), 1))).map(({ data }) => text(data))).toEqual(want);
      await eventually(
        () => wanted.every((want, index) => followed.get(journal("acme", `s${index}`))?.length === want.length),
        (all) => all,
      );
      for (const [index, want] of wanted.entries()) expect(followed.get(journal("acme", `s${index}`))).toEqual(want);
      const stored = await sender;
      await eventually(
        () => stored.filter((sequence) => !delivered.has(sequence)),
        (missing) => missing.length === 0,
      );
      await eventually(
        async () => (await bus.bounds("COMMANDS")).messages,
        (messages) => messages === 0,
      );
      await bus.close();
    } finally {
      await server.stop();
    }
  });

  test("a broker that is not there is a rejection that names it", async () => {
    await expect(connectJetStream({ ...options, servers: "nats://127.0.0.1:1", first_connection_patience_ms: 200 })).rejects.toThrow(
      "cannot connect to NATS at nats://127.0.0.1:1 as 'tool'",
    );
  });
});
