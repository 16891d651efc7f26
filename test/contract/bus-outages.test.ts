// Goal:   what was stored is there after the broker was away, and whoever followed, watched or waited goes on without a gap.
// Method: on both grounds while the broker is away; and a real one that is killed three times under forty writers.
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { connectJetStream } from "../../bus/jetstream.ts";
import type { AppendOutcome, Bus } from "../../bus/port.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { type Ground, realWorld, SHARDS } from "./bus-grounds.ts";
import { append, bytes, collect, command, committed, eventually, grounds, inboxOf, journal, newTenant, openGround, session, text } from "./bus-words.ts";
import { startNatsServer } from "./nats-server.ts";

describe.each(grounds)("outages on %s", (_name, makeGround) => {
  let ground: Ground;
  let bus: Bus;
  beforeAll(async () => {
    ({ ground, bus } = await openGround(makeGround));
  });
  afterAll(() => ground.stop());

  describe("while the broker is away", () => {
    test(
      "calls answer unavailable or reject within their patience, appends survive, and followers, watchers and inboxes go on after",
      { timeout: 180_000 },
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

test("appends and commands through three crashes of the broker are each stored once, and followed and delivered in order", { timeout: 180_000 }, async () => {
  const server = await startNatsServer();
  try {
    const bus = await connectJetStream({ name: "tool", shards: SHARDS, replicas: 1, log: silentLog, world: realWorld, servers: server.url });
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
