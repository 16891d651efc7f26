// Goal: a worker never makes more calls at once than it may; between tenants places are shared evenly, within one they go by priority and age;
// a call that is called off leaves nothing behind; and so much waiting of one tenant closes the door to that tenant alone.
// Method: the pool in virtual time, by hand and from a seed.
import { expect, test } from "vitest";
import { type CallPoolOptions, createCallPool } from "../../actors/call-pool.ts";
import { EffectFailure } from "../../actors/performer.ts";
import { AGEING_SPAN_MS, PRIORITIES, type Priority, turnAt } from "../../protocol/priority.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";

function ground(calls_max: number, more: Partial<CallPoolOptions> = {}) {
  const world = new VirtualWorld(3);
  const pool = createCallPool({ world, calls_max, ...more });
  const begun: { name: string; leave: () => void }[] = [];
  const failed: { name: string; error: unknown }[] = [];
  const enter = (tenant: string, name: string, priority: Priority = "normal"): AbortController => {
    const abort = new AbortController();
    pool.enter({ tenant, actor: `${tenant}/session/${name}`, priority }, abort.signal).then(
      (leave) => void begun.push({ name, leave }),
      (error: unknown) => void failed.push({ name, error }),
    );
    return abort;
  };
  const names = (): string[] => begun.map(({ name }) => name);
  return { world, pool, begun, failed, enter, names };
}

test("within a tenant calls go by priority, and in order among equals", async () => {
  const { world, begun, enter, names } = ground(1);
  enter("a", "running");
  for (const [name, priority] of [
    ["low", "low"],
    ["normal1", "normal"],
    ["critical", "critical"],
    ["normal2", "normal"],
    ["batch", "batch"],
    ["high", "high"],
  ] as const)
    enter("a", name, priority);
  for (let n = 0; n < 7; n++) {
    await world.settle();
    begun[n]?.leave();
  }
  expect(names()).toEqual(["running", "critical", "high", "normal1", "normal2", "low", "batch"]);
});

test("another tenant's call gets the next place however many of one tenant wait, and however urgent they say they are", async () => {
  const { world, begun, enter, names } = ground(4);
  for (let n = 0; n < 1_000; n++) enter("a", `a${n}`, "critical");
  await world.settle();
  enter("b", "b0", "batch");
  enter("b", "b1", "batch");
  begun[0]?.leave();
  await world.settle();
  expect(names().at(-1)).toBe("b0");
  begun[1]?.leave();
  await world.settle();
  expect(names().at(-1)).toBe("b1");
  begun[2]?.leave();
  await world.settle();
  expect(names().at(-1)).toBe("a4");
});

test("a maximum that shrinks ends no call and begins none until enough have ended; one that grows begins what waits", async () => {
  const { world, pool, begun, enter } = ground(4);
  for (let n = 0; n < 10; n++) enter("a", `a${n}`);
  await world.settle();
  pool.resize(2);
  begun[0]?.leave();
  begun[1]?.leave();
  await world.settle();
  expect(begun).toHaveLength(4);
  begun[2]?.leave();
  begun[2]?.leave(); // CP2
  await world.settle();
  expect(begun).toHaveLength(5);
  pool.resize(6);
  await world.settle();
  expect(begun).toHaveLength(9);
  expect(pool.report()).toMatchObject({ calls_max: 6, running: 6, waiting: 1 });
});

test("a call that is called off while it waits fails as cancelled and takes no place; one that was called off before never waits", async () => {
  const { world, pool, begun, failed, enter, names } = ground(1);
  enter("a", "running");
  const off = enter("a", "off", "critical");
  enter("a", "next");
  off.abort();
  const gone = new AbortController();
  gone.abort();
  await expect(pool.enter({ tenant: "a", actor: "a/session/gone", priority: "normal" }, gone.signal)).rejects.toThrow(EffectFailure);
  begun[0]?.leave();
  await world.settle();
  expect(names()).toEqual(["running", "next"]);
  expect(failed.map(({ name }) => name)).toEqual(["off"]);
  begun[1]?.leave();
  expect(pool.report()).toEqual({ calls_max: 1, running: 0, waiting: 0, refusing: 0, tenants: [] });
});

test("from 80 % of its bound on a tenant's messages are refused, until below 60 %; calls in line for a slot count too; others are not touched", async () => {
  const { world, pool, begun, enter } = ground(1, { tenant_waiting_max: 10 });
  for (let n = 0; n < 5; n++) enter("a", `a${n}`);
  await world.settle();
  const left = [0, 1, 2, 3].map((n) => pool.inLine({ tenant: "a", actor: `a/session/slot${n}`, priority: "normal" }));
  expect(pool.refusal("a")).toMatchObject({ code: "overloaded", details: { waiting: 8, retry_after_ms: 2_000 } });
  expect(pool.refusal("b")).toBeUndefined();
  expect(pool.waitOf("a/session/slot2")).toMatchObject({ for: "slot", ahead: 2 });
  expect(pool.waitOf("a/session/a3")).toMatchObject({ for: "pool", ahead: 2 });
  expect(pool.waitOf("a/session/a0"), "it runs").toBeUndefined();
  left[0]?.();
  left[0]?.();
  expect(pool.refusal("a"), "7 of 10").toBeDefined();
  left[1]?.();
  expect(pool.refusal("a"), "6 of 10").toBeDefined();
  left[2]?.();
  expect(pool.refusal("a"), "5 of 10").toBeUndefined();
  begun[0]?.leave();
  await world.settle();
  expect(pool.report()).toMatchObject({ running: 1, waiting: 4, refusing: 0 });
});

test("nobody starves: beside critical calls without end, the least begins within the span of ageing", async () => {
  const { world, begun, enter } = ground(1);
  let batch_began_ms: number | undefined;
  let handled = 0;
  const step = async (): Promise<void> => {
    await world.advance(500);
    begun[handled]?.leave();
    handled += 1;
    await world.settle();
    if (batch_began_ms === undefined && begun.some(({ name }) => name === "batch")) batch_began_ms = world.monotonic_ms();
  };
  for (let n = 0; n < 10; n++) enter("a", `before${n}`, "critical");
  enter("a", "batch", "batch");
  const asked_ms = world.monotonic_ms();
  for (let n = 0; n < 400; n++) {
    enter("a", `c${n}`, "critical");
    await step();
  }
  const waited_ms = (batch_began_ms ?? Number.POSITIVE_INFINITY) - asked_ms;
  expect(waited_ms).toBeGreaterThan(10_000);
  expect(waited_ms).toBeLessThan(AGEING_SPAN_MS + 10_000);
});

test("from a seed: of a tenant no call begins while one waits whose turn it was before; so none waits for who came a span later", async () => {
  let waited = 0;
  for (let seed = 1; seed <= 60; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const { world, begun, enter } = ground(1 + pick(3));
    const asked = new Map<string, { tenant: string; turn_ms: number; at_ms: number }>();
    const left = new Set<number>();
    let looked = 0;
    for (let step = 0; step < 200; step++) {
      await world.advance(pick(2_000));
      if (pick(3) > 0) {
        const [tenant, name, priority] = [`t${pick(2)}`, `s${step}`, PRIORITIES[pick(5)] ?? "normal"];
        asked.set(name, { tenant, turn_ms: turnAt(priority, world.monotonic_ms()), at_ms: world.monotonic_ms() });
        enter(tenant, name, priority);
      } else {
        const running = begun.map((_, index) => index).filter((index) => !left.has(index));
        const one = running[pick(running.length)];
        if (one !== undefined) left.add(one);
        if (one !== undefined) begun[one]?.leave();
      }
      await world.settle();
      for (; looked < begun.length; looked++) {
        const name = begun[looked]?.name ?? "";
        const mine = asked.get(name);
        asked.delete(name);
        for (const [other, { tenant, turn_ms, at_ms }] of asked) {
          if (tenant !== mine?.tenant) continue;
          waited += 1;
          expect(turn_ms, `seed ${seed}: ${other} before ${name}`).toBeGreaterThanOrEqual(mine.turn_ms);
          expect(mine.at_ms - at_ms, `seed ${seed}: ${name} came too late to go before ${other}`).toBeLessThanOrEqual(AGEING_SPAN_MS);
        }
      }
    }
  }
  expect(waited).toBeGreaterThan(1_000);
});

test("from a seed: what runs is what began and did not end, no place is empty while somebody waits, and all that came has begun or was called off", async () => {
  for (let seed = 1; seed <= 30; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const { world, pool, begun, failed, enter } = ground(1 + pick(6));
    const aborts: AbortController[] = [];
    let entered = 0;
    const ended = new Set<number>();
    for (let step = 0; step < 150; step++) {
      await world.advance(pick(500));
      if (pick(2) === 0) aborts.push(enter(`t${pick(3)}`, `s${entered++}`, PRIORITIES[pick(5)] ?? "normal"));
      else if (pick(6) === 0) aborts[pick(aborts.length)]?.abort();
      else if (pick(10) === 0) pool.resize(1 + pick(6));
      else {
        const one = pick(begun.length);
        begun[one]?.leave();
        if (begun[one] !== undefined) ended.add(one);
      }
      await world.settle();
      const { running, calls_max, tenants } = pool.report();
      expect(running, `seed ${seed}`).toBe(begun.length - ended.size);
      if (tenants.some(({ waiting }) => waiting > 0)) expect(running, `seed ${seed}: no place is empty while somebody waits`).toBeGreaterThanOrEqual(calls_max);
    }
    for (let n = 0; n < begun.length; n++) {
      begun[n]?.leave();
      await world.settle();
    }
    expect(begun.length + failed.length, `seed ${seed}`).toBe(entered);
    expect(pool.report()).toMatchObject({ running: 0, waiting: 0 });
  }
});
