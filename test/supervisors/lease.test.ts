// Goal: nobody trusts a lease for longer than the broker keeps it, and no lost answer makes or breaks one.
// Method: two holders on the in-memory bus in virtual time; answers are lost and calls refused by planned faults.
import { expect, test } from "vitest";
import { createMemoryBroker, type Faults } from "../../bus/memory.ts";
import { LEASE_TTL_MS } from "../../protocol/limits.ts";
import { silentLog } from "../../protocol/log.ts";
import { Lease } from "../../supervisors/lease.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);

function bench() {
  const world = new VirtualWorld(1);
  const faults: { before?: Faults["before"]; after?: Faults["after"] } = {};
  const broker = createMemoryBroker({
    world,
    shards: 4,
    faults: { before: (operation) => faults.before?.(operation), after: (operation) => faults.after?.(operation) },
  });
  const holder = (name: string) =>
    new Lease({
      bucket: broker.connect(name).bucket("WORKERS"),
      key: "w",
      world,
      log: silentLog,
      is_mine: (value) => new TextDecoder().decode(value) === name,
    });
  /** Runs a call to its end in virtual time. */
  const finish = async <T>(call: Promise<T>): Promise<T> => {
    let outcome: { value: T } | undefined;
    void call.then((value) => (outcome = { value }));
    await world.until(() => outcome !== undefined, 20_000);
    return outcome!.value;
  };
  return { world, broker, faults, a: holder("a"), b: holder("b"), finish };
}

test("one holder at a time: the second is told whose it is, and gets it after the first stopped renewing", async () => {
  const { world, a, b, finish } = bench();
  expect(await finish(a.acquire(bytes("a")))).toEqual({ kind: "held" });
  expect(await finish(b.acquire(bytes("b")))).toMatchObject({ kind: "taken", value: bytes("a") });
  await world.advance(LEASE_TTL_MS - 1);
  expect(a.is_valid()).toBe(true);
  await world.advance(1);
  expect(a.is_valid()).toBe(false); // by its own clock, without a word from the bus
  await world.advance(500);
  expect(await finish(b.acquire(bytes("b")))).toEqual({ kind: "held" });
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "lost", reason: "expired" });
});

test("L1: validity counts from when the renewal was sent, not from when it was answered", async () => {
  const { world, faults, a, finish } = bench();
  await finish(a.acquire(bytes("a")));
  await world.advance(1_000);
  faults.after = () => ({ kind: "delay", ms: 2_000 });
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "held" });
  await world.advance(LEASE_TTL_MS - 2_000 - 1);
  expect(a.is_valid()).toBe(true);
  await world.advance(1);
  expect(a.is_valid()).toBe(false);
});

test("renewals keep it for as long as they are sent", async () => {
  const { world, a, finish } = bench();
  await finish(a.acquire(bytes("a")));
  for (let renewals = 0; renewals < 20; renewals++) {
    await world.advance(1_000);
    expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "held" });
  }
  expect(a.is_valid()).toBe(true);
});

test("L3: a renewal whose answer got lost is found by the next one, and counts from when the lost one was sent", async () => {
  const { world, faults, a, finish } = bench();
  await finish(a.acquire(bytes("a")));
  await world.advance(1_000);
  faults.after = ({ kind }) => (kind === "bucket_write" ? { kind: "lose_answer" } : undefined);
  expect((await finish(a.renew(bytes("a")))).kind).toBe("unavailable"); // sent at 1 s, known to be unanswered at 4 s
  expect(world.monotonic_ms()).toBe(4_000);
  faults.after = () => undefined;
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "held" });
  await world.advance(1_999);
  expect(a.is_valid()).toBe(true);
  await world.advance(1);
  expect(a.is_valid()).toBe(false);
});

test("a renewal that nobody took leaves what is left of the last one", async () => {
  const { world, faults, a, finish } = bench();
  await finish(a.acquire(bytes("a")));
  faults.before = () => ({ kind: "unavailable" });
  expect((await finish(a.renew(bytes("a")))).kind).toBe("unavailable");
  expect(a.is_valid()).toBe(true);
  await world.advance(LEASE_TTL_MS);
  expect(a.is_valid()).toBe(false);
});

test("a lease that somebody deleted or took is lost at the next renewal", async () => {
  const { broker, a, b, finish } = bench();
  const bucket = broker.connect("c").bucket("WORKERS");
  await finish(a.acquire(bytes("a")));
  await finish(bucket.delete("w", a.revision!));
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "lost", reason: "deleted" });
  await finish(a.acquire(bytes("a")));
  await finish(bucket.delete("w", a.revision!));
  await finish(b.acquire(bytes("b")));
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "lost", reason: "taken" });
  expect(a.is_valid()).toBe(false);
});

test("after an outage its own value is taken up again, at once", async () => {
  const { world, faults, a, finish } = bench();
  await finish(a.acquire(bytes("a")));
  await world.advance(1_000);
  faults.after = ({ kind }) => (kind === "bucket_write" ? { kind: "lose_answer" } : undefined);
  await finish(a.renew(bytes("a")));
  await world.advance(1_500);
  faults.after = () => undefined;
  expect(a.is_valid()).toBe(false); // 5.5 s after the first, 4.5 s after what was stored and not answered
  expect(await finish(a.acquire(bytes("a")))).toEqual({ kind: "held" });
});

test("a lease that was released is free at once", async () => {
  const { a, b, finish } = bench();
  await finish(a.acquire(bytes("a")));
  await finish(a.release());
  expect(a.is_valid()).toBe(false);
  expect(await finish(b.acquire(bytes("b")))).toEqual({ kind: "held" });
});

test("L4: a name is taken from its holder over the value that was seen, and the holder hears it with its next renewal", async () => {
  const { a, b, finish } = bench();
  await finish(a.acquire(bytes("a")));
  const seen = await finish(b.acquire(bytes("b")));
  expect(await finish(b.take_over(bytes("b"), seen.kind === "taken" ? seen.revision : 0))).toEqual({ kind: "held" });
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "lost", reason: "taken" });
  expect(b.is_valid()).toBe(true);
});

test("L4: a holder that renewed since it was seen keeps its name", async () => {
  const { a, b, finish } = bench();
  await finish(a.acquire(bytes("a")));
  const seen = await finish(b.acquire(bytes("b")));
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "held" });
  expect(await finish(b.take_over(bytes("b"), seen.kind === "taken" ? seen.revision : 0))).toMatchObject({ kind: "taken", value: bytes("a") });
  expect(b.is_valid()).toBe(false);
  expect(await finish(a.renew(bytes("a")))).toEqual({ kind: "held" });
});
