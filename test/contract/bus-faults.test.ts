// Goal: each hook by which the simulation hurts the in-memory bus does what it says, and only that.
// Method: virtual time, one fault at a time; and one run twice from the same seed, which must be the same run.
import { expect, test } from "vitest";
import { createMemoryBroker, type FaultAfter, type FaultBefore, type MemoryBroker, type Operation } from "../../bus/memory.ts";
import type { Bus, Delivery } from "../../bus/port.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
const text = (data: Uint8Array): string => new TextDecoder().decode(data);
const SUBJECT = "tenant.acme.session.s1.event";
const COMMAND = "tenant.acme.session.s1.command";

interface Stage {
  readonly world: VirtualWorld;
  readonly broker: MemoryBroker;
  readonly bus: Bus;
  /** Takes effect for the next operation of this kind on any connection. */
  before(kind: Operation["kind"], fault: FaultBefore): void;
  after(kind: Operation["kind"], fault: FaultAfter): void;
}

function stage(): Stage {
  const world = new VirtualWorld(1);
  const befores = new Map<Operation["kind"], FaultBefore>();
  const afters = new Map<Operation["kind"], FaultAfter>();
  const take = <F>(faults: Map<Operation["kind"], F>, kind: Operation["kind"]): F | undefined => {
    const fault = faults.get(kind);
    faults.delete(kind);
    return fault;
  };
  const broker = createMemoryBroker({ world, shards: 4, faults: { before: ({ kind }) => take(befores, kind), after: ({ kind }) => take(afters, kind) } });
  return {
    world,
    broker,
    bus: broker.connect("w1"),
    before: (kind, fault) => void befores.set(kind, fault),
    after: (kind, fault) => void afters.set(kind, fault),
  };
}

/** What a promise came to so far. */
function watchPromise<T>(promise: Promise<T>): { seen: () => T | "open" | Error } {
  let value: T | "open" | Error = "open";
  promise.then(
    (is) => (value = is),
    (error: Error) => (value = error),
  );
  return { seen: () => value };
}

const append = (bus: Bus, expected_last_sequence = 0, commit_id = "w1.1"): ReturnType<Bus["append"]> =>
  bus.append({ subject: SUBJECT, data: bytes("x"), expected_last_sequence, commit_id });

test("a publish that is unavailable before it arrives stores nothing and answers after its patience", async () => {
  const { world, bus, before } = stage();
  before("publish", { kind: "unavailable" });
  const outcome = watchPromise(bus.publish(COMMAND, bytes("x"), { patience_ms: 300 }));
  await world.advance(299);
  expect(outcome.seen()).toBe("open");
  await world.advance(2);
  expect(outcome.seen()).toMatchObject({ kind: "unavailable" });
  expect((await bus.bounds("COMMANDS")).messages).toBe(0);
});

test("a publish whose answer is lost is stored and answers unavailable", async () => {
  const { world, bus, after } = stage();
  after("publish", { kind: "lose_answer" });
  const outcome = watchPromise(bus.publish(COMMAND, bytes("x"), { patience_ms: 300 }));
  await world.advance(301);
  expect(outcome.seen()).toMatchObject({ kind: "unavailable" });
  expect((await bus.bounds("COMMANDS")).messages).toBe(1);
});

test("a delayed publish is overtaken by a later one, and one delayed beyond its patience arrives after its answer was given up", async () => {
  const { world, bus, before } = stage();
  before("publish", { kind: "delay", ms: 100 });
  const slow = watchPromise(bus.publish(COMMAND, bytes("slow")));
  await world.advance(0);
  expect(await bus.publish(COMMAND, bytes("quick"))).toMatchObject({ sequence: 1 });
  await world.advance(101);
  expect(slow.seen()).toMatchObject({ kind: "stored", sequence: 2 });
  before("publish", { kind: "delay", ms: 1_000 });
  const late = watchPromise(bus.publish(COMMAND, bytes("late"), { patience_ms: 200 }));
  await world.advance(250);
  expect(late.seen()).toMatchObject({ kind: "unavailable" });
  expect((await bus.bounds("COMMANDS")).messages).toBe(2);
  await world.advance(1_000);
  expect((await bus.bounds("COMMANDS")).messages).toBe(3);
});

test("a delayed answer comes later, and what it says was done before", async () => {
  const { world, bus, after } = stage();
  after("publish", { kind: "delay", ms: 100 });
  const outcome = watchPromise(bus.publish(COMMAND, bytes("x")));
  await world.advance(50);
  expect(outcome.seen()).toBe("open");
  expect((await bus.bounds("COMMANDS")).messages).toBe(1);
  await world.advance(51);
  expect(outcome.seen()).toMatchObject({ kind: "stored" });
});

test("an append whose answer is lost is found as committed, and one whose finding fails too is unavailable though it is stored", async () => {
  const { world, bus, after, before } = stage();
  after("append", { kind: "lose_answer" });
  const found = watchPromise(append(bus));
  await world.advance(3_000);
  expect(found.seen()).toEqual({ kind: "committed", sequence: 1 });
  after("append", { kind: "lose_answer" });
  before("read", { kind: "unavailable" });
  const unknown = watchPromise(append(bus, 1, "w1.2"));
  await world.advance(10_000);
  expect(unknown.seen()).toMatchObject({ kind: "unavailable" });
  expect((await bus.bounds("EVENTS")).last_sequence).toBe(2);
  expect(await append(bus, 1, "w1.2")).toEqual({ kind: "committed", sequence: 2 });
});

test("an append that does not arrive the first time is sent again and committed once", async () => {
  const { world, bus, before } = stage();
  before("append", { kind: "unavailable" });
  const outcome = watchPromise(append(bus));
  await world.advance(4_000);
  expect(outcome.seen()).toEqual({ kind: "committed", sequence: 1 });
});

test("a read, a bucket's read and a bucket's write that fail say so", async () => {
  const { world, bus, before, after } = stage();
  before("read", { kind: "unavailable" });
  const read = watchPromise(bus.last("EVENTS", SUBJECT));
  before("bucket_read", { kind: "unavailable" });
  const entry = watchPromise(bus.bucket("WORKERS").get("w1"));
  before("clear", { kind: "unavailable" });
  const cleared = watchPromise(bus.clear("RESIDENT", "resident.0.acme.session.s1", 1));
  await world.advance(6_000);
  expect([read.seen(), entry.seen()].map((is) => is instanceof Error && is.name)).toEqual(["BusUnavailable", "BusUnavailable"]);
  expect(cleared.seen()).toMatchObject({ kind: "unavailable" });
  after("bucket_write", { kind: "lose_answer" });
  const lease = watchPromise(bus.bucket("WORKERS").create("w1", bytes("1")));
  await world.advance(3_001);
  expect(lease.seen()).toMatchObject({ kind: "unavailable" });
  expect(text((await bus.bucket("WORKERS").get("w1"))?.value as Uint8Array)).toBe("1");
});

test("a delivery lost on its way is a reset, and then comes with all that was not acknowledged", async () => {
  const { world, bus, before } = stage();
  const told: string[] = [];
  await bus.consume(
    { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
    { on_delivery: ({ message }) => void told.push(text(message.data)), on_reset: () => void told.push("reset") },
  );
  await bus.publish(COMMAND, bytes("a"));
  await world.advance(1);
  before("deliver", { kind: "unavailable" });
  await bus.publish(COMMAND, bytes("b"));
  await world.advance(1_000);
  expect(told).toEqual(["a", "reset", "a", "b"]);
  before("deliver", { kind: "delay", ms: 70 });
  await bus.publish(COMMAND, bytes("c"));
  await world.advance(60);
  expect(told).toHaveLength(4);
  await world.advance(20);
  expect(told.at(-1)).toBe("c");
});

test("an acknowledgement that is lost is a redelivery after the broker's wait", async () => {
  const { world, bus, before } = stage();
  const told: Delivery[] = [];
  let resets = 0;
  await bus.consume(
    { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
    { on_delivery: (delivery) => void (told.push(delivery), delivery.ack()), on_reset: () => void (resets += 1) },
  );
  before("ack", { kind: "unavailable" });
  await bus.publish(COMMAND, bytes("a"));
  await world.advance(29_000);
  expect([told.length, resets]).toEqual([1, 0]);
  await world.advance(2_000);
  expect([told.length, resets]).toEqual([2, 1]);
  expect((await bus.bounds("COMMANDS")).messages).toBe(0);
});

test("core messages are lost or late on either end, and a schedule can fail", async () => {
  const { world, bus, before } = stage();
  const heard: string[] = [];
  bus.subscribe("system.x", (message) => void heard.push(text(message.data)));
  before("send", { kind: "unavailable" });
  bus.send("system.x", bytes("never sent"));
  await world.advance(1);
  before("hear", { kind: "unavailable" });
  bus.send("system.x", bytes("never heard"));
  await world.advance(1);
  before("hear", { kind: "delay", ms: 10 });
  bus.send("system.x", bytes("late"));
  await world.advance(1);
  bus.send("system.x", bytes("overtaking"));
  await world.advance(20);
  expect(heard).toEqual(["overtaking", "late"]);
  before("request", { kind: "unavailable" });
  const request = watchPromise(bus.request("system.x", bytes(""), { patience_ms: 50 }));
  await world.advance(51);
  expect(request.seen()).toBeUndefined();
  before("schedule", { kind: "unavailable" });
  const armed = watchPromise(bus.schedule({ tenant: "acme", kind: "session", id: "s1" }, world.now_ms(), bytes(""), 0));
  await world.advance(6_000);
  expect(armed.seen()).toMatchObject({ kind: "unavailable" });
});

test("a killed connection hears nothing more and is never answered, while what it had sent arrives", async () => {
  const { world, broker, bus, before } = stage();
  const other = broker.connect("w2");
  const heard: string[] = [];
  bus.subscribe("system.x", () => void heard.push("core"));
  await bus.follow("EVENTS", "tenant.>", 1, () => void heard.push("followed"));
  await bus.consume({ stream: "COMMANDS", durable: "d", filters: ["shard.>"] }, { on_delivery: () => void heard.push("delivered"), on_reset: () => undefined });
  before("append", { kind: "delay", ms: 50 });
  const outcome = watchPromise(append(bus));
  await world.advance(10);
  broker.kill("w1");
  await world.advance(100);
  other.send("system.x", bytes(""));
  await other.publish(COMMAND, bytes(""));
  const asked = [
    bus.last("EVENTS", SUBJECT),
    append(bus, 1),
    bus.consume({ stream: "COMMANDS", durable: "d", filters: [] }, { on_delivery: () => undefined, on_reset: () => undefined }),
  ].map((promise) => watchPromise<unknown>(promise));
  await world.advance(20_000);
  expect([outcome, ...asked].map(({ seen }) => seen())).toEqual(["open", "open", "open", "open"]);
  expect(heard).toEqual([]);
  expect((await other.last("EVENTS", SUBJECT))?.sequence).toBe(1);
});

test("a broker that restarts forgets its memory streams alone, and everybody goes on", async () => {
  const { world, broker, bus } = stage();
  const followed: string[] = [];
  await bus.publish("tenant.acme.session.s1.token", bytes("t1"));
  await append(bus);
  await bus.follow("TOKENS", "tenant.>", 1, ({ data }) => void followed.push(text(data)));
  await world.advance(1);
  const states: string[] = [];
  bus.on_state((state) => void states.push(state));
  void broker.restart(500);
  await world.advance(600);
  expect([(await bus.bounds("TOKENS")).messages, (await bus.bounds("EVENTS")).messages, states]).toEqual([0, 1, ["disconnected", "connected"]]);
  await bus.publish("tenant.acme.session.s1.token", bytes("t2"));
  await world.advance(1);
  expect(followed).toEqual(["t1", "t2"]);
});

test("what was settled and not confirmed is not called settled, whether the acknowledgement was lost or its answer", async () => {
  for (const lost of ["acknowledgement", "answer"] as const) {
    const { world, bus, before, after } = stage();
    const settled: boolean[] = [];
    let told = 0;
    await bus.consume(
      { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
      {
        on_delivery: (delivery) => {
          told += 1;
          void delivery.settle().then((outcome) => settled.push(outcome));
        },
        on_reset: () => undefined,
      },
    );
    if (lost === "acknowledgement") before("ack", { kind: "unavailable" });
    else after("ack", { kind: "lose_answer" });
    await bus.publish(COMMAND, bytes("a"));
    await world.advance(10_000);
    // It came again at once, and not only after the broker's wait.
    expect([told, settled], lost).toEqual(lost === "acknowledgement" ? [2, [false, true]] : [1, [false]]);
  }
});

test("what an earlier opening delivered is not settled by it once a later one has delivered it again", async () => {
  const { world, bus, before } = stage();
  const held: Delivery[] = [];
  await bus.consume(
    { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
    { on_delivery: (delivery) => void held.push(delivery), on_reset: () => undefined },
  );
  await bus.publish(COMMAND, bytes("a"));
  await world.advance(1);
  before("deliver", { kind: "unavailable" });
  await bus.publish(COMMAND, bytes("b"));
  await world.advance(1_000);
  expect(held.map(({ message }) => text(message.data))).toEqual(["a", "a", "b"]);
  const settled: boolean[] = [];
  void held[0]!.settle().then((outcome) => settled.push(outcome));
  await world.advance(10);
  expect(settled).toEqual([false]);
});

test("two runs from one seed are the same run", async () => {
  const run = async (seed: number): Promise<string[]> => {
    const world = new VirtualWorld(seed);
    const faults = {
      before: (): FaultBefore | undefined =>
        world.random() < 0.2 ? { kind: "delay", ms: Math.floor(world.random() * 100) } : world.random() < 0.1 ? { kind: "unavailable" } : undefined,
      after: (): FaultAfter | undefined => (world.random() < 0.1 ? { kind: "lose_answer" } : undefined),
    };
    const broker = createMemoryBroker({ world, shards: 4, faults });
    const story: string[] = [];
    const reader = broker.connect("reader");
    await Promise.race([
      reader.consume(
        { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
        {
          on_delivery: ({ message, ack }) => {
            story.push(`${world.monotonic_ms()} got ${message.sequence}`);
            ack();
          },
          on_reset: () => void story.push(`${world.monotonic_ms()} reset`),
        },
      ),
      world.advance(0),
    ]);
    for (let index = 0; index < 30; index += 1) {
      const bus = broker.connect(`writer${index % 3}`);
      void bus.publish(COMMAND, bytes(`${index}`)).then(({ kind }) => story.push(`${world.monotonic_ms()} ${index} ${kind}`));
      void append(bus, 0, `c.${index}`).then((outcome) => story.push(`${world.monotonic_ms()} ${index} ${JSON.stringify(outcome)}`));
      await world.advance(37);
    }
    await world.advance(60_000);
    return story;
  };
  const first = await run(7);
  expect(first.length).toBeGreaterThan(60);
  expect(await run(7)).toEqual(first);
  expect(await run(8)).not.toEqual(first);
});
