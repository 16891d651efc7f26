// Goal:   both adapters of the bus keep what bus/port.ts promises of inboxes and schedules, and of an inbox that is full.
// Method: each promise is written once and run on both grounds.
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Bus, Delivery, InboxSpec } from "../../bus/port.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { actorSubject, dueSubject, parseActorSubject, shardOf, timerSubject } from "../../protocol/subjects.ts";
import { type Ground, jetStreamGround, memoryGround, SHARDS } from "./bus-grounds.ts";
import { bytes, collect, command, eventually, grounds, inboxOf, newTenant, openGround, session, text } from "./bus-words.ts";

describe.each(grounds)("inboxes on %s", (_name, makeGround) => {
  let ground: Ground;
  let bus: Bus;
  beforeAll(async () => {
    ({ ground, bus } = await openGround(makeGround));
  });
  afterAll(() => ground.stop());

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
    }, 180_000);

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
