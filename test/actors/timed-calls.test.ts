// Goal: a call gets its time and no more, and whatever it does (throws at once, never settles, does not hear its signal, is called off while it waits or
// runs) its place in the pool comes back and it is counted once.
// Method: pool and time together, as performers use them, in virtual time; by hand and from a seed.
import { expect, test } from "vitest";
import { createCallPool } from "../../actors/call-pool.ts";
import { EffectFailure } from "../../actors/performer.ts";
import { CallTimeout, createTimedCalls, GRACE_MS } from "../../actors/timed-calls.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";

type Work = (signal: AbortSignal, world: VirtualWorld) => Promise<string>;
const never = new Promise<never>(() => {});

/** What a performer may be like. `hears`: it ends when it is told to. */
const WORKS: Readonly<Record<string, (ms: number) => Work>> = {
  answers: (ms) => (_, world) => new Promise((resolve) => void world.after(ms, () => resolve("answer"))),
  hears: () => (signal) => new Promise((_, reject) => signal.addEventListener("abort", () => reject(new EffectFailure("cancelled", "told to stop")))),
  rejects: (ms) => (_, world) => new Promise((_resolve, reject) => void world.after(ms, () => reject(new Error("broke")))),
  throws: () => () => {
    throw new Error("broke at once");
  },
  hangs: () => () => never,
};

function ground(calls_max: number) {
  const world = new VirtualWorld(5);
  const pool = createCallPool({ world, calls_max });
  const ends: string[] = [];
  const timed = createTimedCalls({ world, on_end: (how) => void ends.push(how) });
  /** As call-model does it. */
  const call = async (tenant: string, signal: AbortSignal, time_ms: number, work: Work): Promise<string> => {
    const leave = await pool.enter({ tenant, actor: `${tenant}/session/s`, priority: "normal" }, signal);
    return timed.run(time_ms, signal, (inner) => work(inner, world)).finally(leave);
  };
  return { world, pool, timed, ends, call };
}
const outcomeOf = (call: Promise<string>): { readonly now: () => string } => {
  let told = "open";
  call.then(
    (text) => (told = text),
    (error: unknown) => (told = error instanceof EffectFailure ? error.effect_error.code : (error as Error).message),
  );
  return { now: () => told };
};

test("a call that hears its signal ends when its time is over, by the reason of the signal; one that does not is left GRACE_MS later, as timeout", async () => {
  const { world, timed, call, pool } = ground(2);
  const reasons: unknown[] = [];
  const hears = outcomeOf(
    call("a", new AbortController().signal, 5_000, (signal) => {
      signal.addEventListener("abort", () => reasons.push(signal.reason));
      return WORKS["hears"]!(0)(signal, world);
    }),
  );
  const hangs = outcomeOf(call("a", new AbortController().signal, 5_000, WORKS["hangs"]!(0)));
  await world.advance(4_999);
  expect([hears.now(), hangs.now(), pool.report().running, timed.report().running]).toEqual(["open", "open", 2, 2]);
  await world.advance(1);
  expect(reasons).toEqual([expect.any(CallTimeout)]);
  expect([hears.now(), hangs.now(), pool.report().running]).toEqual(["cancelled", "open", 1]);
  await world.advance(GRACE_MS);
  expect([hangs.now(), pool.report().running]).toEqual(["timeout", 0]);
  expect(timed.report()).toEqual({ running: 0, done: 0, failed: 0, timed_out: 2, cancelled: 0 });
});

test("the time begins with the place: what waited for it an hour still has all of its time", async () => {
  const { world, call } = ground(1);
  const first = outcomeOf(call("a", new AbortController().signal, 3_600_000, WORKS["answers"]!(3_600_000 - 1)));
  const second = outcomeOf(call("a", new AbortController().signal, 1_000, WORKS["answers"]!(900)));
  await world.advance(3_600_000);
  expect([first.now(), second.now()]).toEqual(["answer", "open"]);
  await world.advance(1_000);
  expect(second.now()).toBe("answer");
});

test("a result that says of itself that it failed is counted as failed, and is handed on all the same", async () => {
  const { timed } = ground(1);
  expect(
    await timed.run(
      1_000,
      new AbortController().signal,
      async () => "failed",
      (text) => text === "failed",
    ),
  ).toBe("failed");
  expect(timed.report()).toMatchObject({ done: 0, failed: 1 });
});

test("from a seed: no place is ever lost and every call is counted once, whatever performers do", async () => {
  for (let seed = 1; seed <= 200; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const calls_max = 1 + pick(4);
    const { world, pool, timed, ends, call } = ground(calls_max);
    const calls: { readonly abort: AbortController; readonly outcome: ReturnType<typeof outcomeOf> }[] = [];
    const kinds = Object.keys(WORKS);
    for (let step = 0; step < 60; step++) {
      const abort = new AbortController();
      if (pick(12) === 0) abort.abort();
      const kind = kinds[pick(kinds.length)]!;
      calls.push({ abort, outcome: outcomeOf(call(`t${pick(3)}`, abort.signal, 1 + pick(4_000), WORKS[kind]!(pick(6_000)))) });
      if (pick(3) === 0) calls[pick(calls.length)]?.abort.abort();
      if (pick(4) === 0) await world.advance(pick(2_000));
      await world.settle();
      expect(pool.report().running, `seed ${seed}`).toBeLessThanOrEqual(calls_max);
      expect(timed.report().running, `seed ${seed}`).toBe(pool.report().running);
    }
    await world.advance(60 * (4_000 + GRACE_MS));
    expect(
      calls.filter(({ outcome }) => outcome.now() === "open"),
      `seed ${seed}`,
    ).toEqual([]);
    expect(pool.report(), `seed ${seed}`).toMatchObject({ running: 0, waiting: 0, tenants: [] });
    const { running, ...counts } = timed.report();
    expect(running, `seed ${seed}`).toBe(0);
    expect(
      Object.values(counts).reduce((sum, count) => sum + count, 0),
      `seed ${seed}`,
    ).toBe(ends.length);
    // A full set of places is there for who comes next.
    const after = Array.from({ length: calls_max }, () => outcomeOf(call("z", new AbortController().signal, 1_000, WORKS["answers"]!(10))));
    await world.advance(10);
    expect(
      after.map(({ now }) => now()),
      `seed ${seed}`,
    ).toEqual(Array.from({ length: calls_max }, () => "answer"));
  }
});
