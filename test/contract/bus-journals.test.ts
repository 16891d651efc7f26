// Goal:   both adapters of the bus keep what bus/port.ts promises of appending, publishing, reading and following.
// Method: each promise is written once and run on both grounds.
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type Bus, headerOf } from "../../bus/port.ts";
import { HEADER_COMMIT } from "../../protocol/commands.ts";
import { actorSubject, residentSubject } from "../../protocol/subjects.ts";
import { type Ground, SHARDS } from "./bus-grounds.ts";
import { append, bytes, collect, committed, eventually, grounds, journal, newTenant, openGround, session, text } from "./bus-words.ts";

describe.each(grounds)("journals on %s", (_name, makeGround) => {
  let ground: Ground;
  let bus: Bus;
  beforeAll(async () => {
    ({ ground, bus } = await openGround(makeGround));
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
});
