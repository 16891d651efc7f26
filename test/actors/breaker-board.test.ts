// Goal: what one worker learns of a provider all know at once, and of all workers one sends the probe (BB1), whatever the broker does (BB2).
// Method: boards of several workers over the in-memory bus in virtual time; the faults are a broker that does not answer.
import { describe, expect, test } from "vitest";
import { createBreakerBoard, type RunningBoard } from "../../actors/breaker-board.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { silentLog } from "../../protocol/log.ts";
import type { Admission, Verdict } from "../../providers/breaker.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const KEY = { provider: "anthropic", owner: "platform" };

async function boards(
  names: readonly string[],
): Promise<{ world: VirtualWorld; down: (is: boolean) => void; all: RunningBoard[]; ask: (board: RunningBoard) => Promise<Admission> }> {
  const world = new VirtualWorld(5);
  let is_down = false;
  const broker = createMemoryBroker({
    world,
    shards: 1,
    faults: { before: (operation) => (is_down && operation.kind === "bucket_write" ? { kind: "unavailable" } : undefined) },
  });
  const all: RunningBoard[] = [];
  for (const worker of names) {
    const board = createBreakerBoard({ world, log: silentLog, worker, bus: broker.connect(worker) });
    await passing(world, board.start());
    all.push(board);
  }
  return { world, down: (is) => void (is_down = is), all, ask: (board) => passing(world, board.admit(KEY)) };
}

/** Lets virtual time pass until it is there. */
async function passing<T>(world: VirtualWorld, what: Promise<T>): Promise<T> {
  let done = false;
  const settled = what.finally(() => (done = true));
  await world.until(() => done, 10_000);
  return settled;
}

async function calls(world: VirtualWorld, board: RunningBoard, verdicts: readonly Verdict[]): Promise<void> {
  for (const verdict of verdicts) {
    const admission = await passing(world, board.admit(KEY));
    if (admission.kind === "admitted") admission.ended(verdict);
  }
  await world.advance(100);
}

const FIVE: readonly Verdict[] = ["failed", "failed", "failed", "failed", "failed"];
const stateOf = (board: RunningBoard | undefined) => board?.readings().find((reading) => reading.provider === KEY.provider)?.state ?? "closed";

test("BB3: closed breakers are forgotten from the oldest on when there are ten thousand, and one that is open is not", async () => {
  const world = new VirtualWorld(5);
  const board = createBreakerBoard({ world, log: silentLog, worker: "alone" });
  await calls(world, board, FIVE);
  expect(stateOf(board)).toBe("open");
  const call = async (n: number): Promise<void> => {
    const admission = await board.admit({ provider: "openai", owner: `tenant.t${n}` });
    if (admission.kind === "admitted") admission.ended("answered");
  };
  for (let n = 0; n < 10_100; n++) await call(n);
  const owners = board.readings().map(({ owner }) => owner);
  expect(owners).toHaveLength(10_000);
  expect(owners).toContain("platform");
  expect(stateOf(board)).toBe("open");
  expect([owners.includes("tenant.t0"), owners.includes("tenant.t10099")]).toEqual([false, true]);
});

describe("over the bus", () => {
  test("one worker's trip stops the others, also one that comes later, and of another owner's key says nothing", async () => {
    const { world, all, ask } = await boards(["w1", "w2"]);
    await calls(world, all[0]!, FIVE);
    expect(all.map(stateOf)).toEqual(["open", "open"]);
    expect(await ask(all[1]!)).toMatchObject({ kind: "refused" });
    expect(await passing(world, all[1]!.admit({ provider: "anthropic", owner: "acme" }))).toMatchObject({ kind: "admitted" });
  });

  test("when the cool-down is over exactly one of all workers sends the probe, and its answer frees all", async () => {
    const { world, all, ask } = await boards(["w1", "w2", "w3"]);
    await calls(world, all[1]!, FIVE);
    await world.advance(5_000);
    const asked = await Promise.all(all.flatMap((board) => [ask(board), ask(board)]));
    const admitted = asked.filter((one) => one.kind === "admitted");
    expect(admitted.length).toBe(1);
    await world.advance(100);
    expect(all.map(stateOf)).toEqual(["half_open", "half_open", "half_open"]);
    for (const one of admitted) if (one.kind === "admitted") one.ended("answered");
    await world.advance(100);
    expect(all.map(stateOf)).toEqual(["closed", "closed", "closed"]);
    expect((await Promise.all(all.map(ask))).map((one) => one.kind)).toEqual(["admitted", "admitted", "admitted"]);
  });

  test("of two workers that tripped while the broker was away one sends the probe when it is back", async () => {
    const { world, all, down, ask } = await boards(["w1", "w2"]);
    down(true);
    for (const board of all) await calls(world, board, FIVE);
    expect(all.map(stateOf)).toEqual(["open", "open"]);
    down(false);
    await world.advance(5_000);
    const asked = await Promise.all(all.flatMap((board) => [ask(board), ask(board)]));
    expect(asked.filter(({ kind }) => kind === "admitted")).toHaveLength(1);
    for (const one of asked) if (one.kind === "admitted") one.ended("answered");
    await world.advance(100);
    expect(all.map(stateOf)).toEqual(["closed", "closed"]);
  });

  test("a probe that fails keeps all away for twice as long", async () => {
    const { world, all, ask } = await boards(["w1", "w2"]);
    await calls(world, all[0]!, FIVE);
    await world.advance(5_000);
    const probe = await ask(all[1]!);
    if (probe.kind !== "admitted") throw new Error("the cool-down is over");
    probe.ended("failed");
    await world.advance(9_000);
    expect((await ask(all[0]!)).kind).toBe("refused");
    await world.advance(1_000);
    expect((await ask(all[0]!)).kind).toBe("admitted");
  });

  test("a worker that died with the probe does not keep the door shut for ever", async () => {
    const { world, all, ask } = await boards(["w1", "w2"]);
    await calls(world, all[0]!, FIVE);
    await world.advance(5_000);
    expect((await ask(all[0]!)).kind).toBe("admitted"); // And is never heard of again.
    await world.advance(60_000);
    expect((await ask(all[1]!)).kind).toBe("refused");
    await world.advance(61_000);
    expect((await ask(all[1]!)).kind).toBe("admitted");
  });
});

test("without the broker a worker goes by what it knows, and no call waits for it longer than half a second (BB2)", async () => {
  const { world, all, down, ask } = await boards(["w1", "w2"]);
  down(true);
  await calls(world, all[0]!, FIVE);
  expect(stateOf(all[0])).toBe("open");
  expect(stateOf(all[1])).toBe("closed");
  await world.advance(5_000);
  const before_ms = world.monotonic_ms();
  const probe = await ask(all[0]!);
  expect(world.monotonic_ms() - before_ms).toBeLessThanOrEqual(500);
  if (probe.kind !== "admitted") throw new Error("the cool-down is over");
  probe.ended("answered");
  expect(stateOf(all[0])).toBe("closed");
});
