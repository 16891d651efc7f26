// Goal: whoever has much waiting slows down himself alone; an actor's commands stay in order; nothing that is put is lost, and a bound is a bound.
// Method: the dispatch alone with works that a test decides, then from a seed; then in virtual time over a worker of so many decisions a second;
// then a whole host on the in-memory bus, beside an actor that cannot be restored.
import { expect, test } from "vitest";
import { createCommandClient } from "../../actors/client.ts";
import { createDispatch, PLACES_MAX, PLACES_OF_ACTOR_MAX, PLACES_OF_TENANT_MAX, STALE_MS } from "../../actors/dispatch.ts";
import { Pressure } from "../../actors/pressure.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost } from "../../actors/shard-host.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { REFUSE_PERCENT_DISTRIBUTED, REFUSE_PERCENT_EMBEDDED } from "../../protocol/limits.ts";
import { silentLog } from "../../protocol/log.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { readSettings } from "../../roles/settings.ts";
import { cores } from "../../state-machines/kinds.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";

interface Begun {
  readonly what: string;
  readonly done: () => void;
}

/** A dispatch whose works are decided by the test. */
function ground(options: { tenant_waiting_max?: number } = {}) {
  const world = new VirtualWorld(1);
  const dispatch = createDispatch({ world, ...options });
  const begun: Begun[] = [];
  const lane = dispatch.lane();
  const put = (tenant: string, actor: string, what: string, into = lane): void =>
    into.put(tenant, "session", `${tenant}/session/${actor}`, (done) => void begun.push({ what, done }));
  return { world, dispatch, lane, begun, put };
}

test("pressure begins to refuse at 80 % of its bound and stops below 60 %", () => {
  const pressure = new Pressure(10);
  expect([0, 1, 7, 8, 7, 6, 5, 7, 8, 0].map((waiting) => pressure.at(waiting))).toEqual([
    "accepting",
    "queueing",
    "queueing",
    "refusing",
    "refusing",
    "refusing",
    "queueing",
    "queueing",
    "refusing",
    "accepting",
  ]);
});

test("with another share it begins there, and stops a fifth of the bound below", () => {
  const pressure = new Pressure(10, 90);
  const seen = [8, 9, 8, 7, 6, 8, 9].map((waiting) => pressure.at(waiting));
  expect(seen).toEqual(["queueing", "refusing", "refusing", "refusing", "queueing", "queueing", "refusing"]);
});

test("the share is 90 % where each role runs by itself, and 80 % under one `up`, unless somebody says another", () => {
  expect([REFUSE_PERCENT_DISTRIBUTED, REFUSE_PERCENT_EMBEDDED]).toEqual([90, 80]);
  const said = (value: string) => readSettings({ TROUPE_REFUSE_FROM_PERCENT: value }, "/");
  expect(said("")).toMatchObject({ kind: "settings", settings: {} });
  expect(said("75")).toMatchObject({ kind: "settings", settings: { TROUPE_REFUSE_FROM_PERCENT: 75 } });
  for (const wrong of ["29", "101", "85.5", "most"]) expect(said(wrong), wrong).toMatchObject({ kind: "invalid" });
});

test("what comes alone begins at once, and leaves nothing behind", () => {
  const { dispatch, begun, put } = ground();
  put("a", "s1", "one");
  expect(begun.map(({ what }) => what)).toEqual(["one"]);
  begun[0]?.done();
  expect(dispatch.report()).toEqual({ deciding: 0, waiting: 0, refusing: 0, flows: [] });
  expect(dispatch.pressure("a", "session", true)).toBe("accepting");
});

test("another tenant's command begins at once however much of one tenant waits, and no tenant or actor has more places than it may", () => {
  const { dispatch, begun, put } = ground();
  for (let n = 0; n < 10_000; n++) put("a", `s${n % 500}`, `a${n}`);
  expect(begun).toHaveLength(PLACES_OF_TENANT_MAX);
  put("b", "s1", "b0");
  expect(begun.at(-1)?.what).toBe("b0");
  for (let n = 0; n < 1_000; n++) put("c", "alone", `c${n}`);
  expect(begun.filter(({ what }) => what.startsWith("c"))).toHaveLength(PLACES_OF_ACTOR_MAX);
  for (let n = 0; n < 1_000; n++) put("d", `s${n}`, `d${n}`);
  expect(dispatch.report()).toMatchObject({ deciding: PLACES_MAX, waiting: 12_001 - PLACES_MAX });
});

test("while all places are taken, each one that comes free goes to the next tenant in turn", () => {
  const { begun, put } = ground();
  for (let n = 0; n < 1_000; n++) put("a", `s${n}`, "a");
  for (let n = 0; n < 1_000; n++) put("b", `s${n}`, "b");
  for (let n = 0; n < 10; n++) put("c", `s${n}`, "c");
  const before = begun.length;
  for (let n = 0; n < 30; n++) begun[n]?.done();
  const next = begun.slice(before).map(({ what }) => what);
  // a is at its own bound until its first ones are decided; nobody gets more than his turn.
  for (const tenant of ["b", "c"]) expect(next.filter((what) => what === tenant).length, tenant).toBeGreaterThanOrEqual(9);
});

test("what is not decided for a second has no place any more, and its actor alone goes no further", async () => {
  const { world, begun, put } = ground();
  for (let n = 0; n < PLACES_OF_ACTOR_MAX + 10; n++) put("a", "stuck", `stuck${n}`);
  for (let n = 0; n < PLACES_OF_TENANT_MAX; n++) put("a", `s${n}`, `well${n}`);
  expect(begun).toHaveLength(PLACES_OF_TENANT_MAX);
  await world.advance(2 * STALE_MS);
  const well = begun.filter(({ what }) => what.startsWith("well"));
  expect(well).toHaveLength(PLACES_OF_TENANT_MAX);
  expect(begun.filter(({ what }) => what.startsWith("stuck"))).toHaveLength(PLACES_OF_ACTOR_MAX);
  begun.find(({ what }) => what === "stuck0")?.done();
  expect(begun.filter(({ what }) => what.startsWith("stuck"))).toHaveLength(PLACES_OF_ACTOR_MAX + 1);
});

test("a lane that is cleared begins nothing more and gives its places back; what was decided of it meanwhile counts for nobody", () => {
  const { dispatch, lane, begun, put } = ground();
  const other = dispatch.lane();
  for (let n = 0; n < 1_000; n++) put("a", `s${n}`, `old${n}`);
  for (let n = 0; n < 3; n++) put("a", `s${n}`, `other${n}`, other);
  const old = [...begun];
  lane.clear();
  expect(begun.slice(old.length).map(({ what }) => what)).toEqual(["other0", "other1", "other2"]);
  expect(dispatch.report()).toMatchObject({ deciding: 3, waiting: 0 });
  for (const { done } of old) done();
  expect(dispatch.report()).toMatchObject({ deciding: 3, waiting: 0 });
  put("a", "s1", "new");
  for (const { done } of begun.slice(old.length)) done();
  expect(dispatch.report()).toEqual({ deciding: 0, waiting: 0, refusing: 0, flows: [] });
});

test("pressure on one tenant is felt by that tenant alone, by callers who wait first, and ends when enough is decided", () => {
  const { dispatch, begun, put } = ground({ tenant_waiting_max: 1_000 });
  const states = (): string[] => [dispatch.pressure("a", "session", true), dispatch.pressure("a", "session", false), dispatch.pressure("b", "session", true)];
  for (let n = 0; n < 160; n++) put("a", `s${n}`, "a");
  expect(states()).toEqual(["refusing", "queueing", "accepting"]);
  for (let n = 160; n < 800; n++) put("a", `s${n}`, "a");
  expect(states()).toEqual(["refusing", "refusing", "accepting"]);
  for (let n = 0; n < 201; n++) begun[n]?.done();
  expect(states()).toEqual(["refusing", "queueing", "accepting"]);
  for (let n = 201; n < 800; n++) begun[n]?.done();
  expect(states()).toEqual(["accepting", "accepting", "accepting"]);
});

test("whatever comes, is decided, stands still or begins anew: an actor's order is kept, every bound holds, and all that was put begins once", async () => {
  let cleared = 0;
  for (let seed = 1; seed <= 40; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const world = new VirtualWorld(seed);
    const dispatch = createDispatch({ world });
    const lanes = [dispatch.lane(), dispatch.lane()];
    const put: Set<string>[] = [new Set(), new Set()];
    const order = new Map<string, number>();
    const open: { tenant: string; actor: string; done: () => void }[] = [];
    let count = 0;
    let begun = 0;
    for (let step = 0; step < 400; step++) {
      const lane = pick(2);
      switch (pick(12)) {
        case 0:
          if (pick(8) > 0) break;
          cleared += 1;
          put[lane]?.clear();
          lanes[lane]?.clear();
          break;
        case 1:
          await world.advance(pick(2 * STALE_MS));
          break;
        case 2:
        case 3:
        case 4:
          for (let n = pick(80); n > 0; n--) open.splice(pick(open.length), 1)[0]?.done();
          break;
        default:
          for (let n = pick(40); n > 0; n--) {
            const tenant = `t${pick(3)}`;
            const actor = `${tenant}/session/${lane}-${pick(4)}`;
            const mine = count++;
            const name = `${mine}`;
            put[lane]?.add(name);
            lanes[lane]?.put(tenant, "session", actor, (done) => {
              if (put[lane]?.delete(name) !== true) throw new Error(`seed ${seed}: ${name} began twice, or after it was cleared`);
              if ((order.get(actor) ?? -1) > mine) throw new Error(`seed ${seed}: ${name} of ${actor} began out of its order`);
              order.set(actor, mine);
              begun += 1;
              open.push({ tenant, actor, done });
            });
          }
      }
      expect(dispatch.report().deciding).toBeLessThanOrEqual(PLACES_MAX);
    }
    while (open.length > 0) open.shift()?.done();
    expect(begun).toBeGreaterThan(0);
    expect([...put[0]!, ...put[1]!], `seed ${seed}: all began`).toEqual([]);
    expect(dispatch.report(), `seed ${seed}`).toEqual({ deciding: 0, waiting: 0, refusing: 0, flows: [] });
  }
  expect(cleared).toBeGreaterThan(20);
});

test("beside 10,000 commands of one tenant, another tenant's commands are decided within a fraction of a second each, in virtual time", async () => {
  const world = new VirtualWorld(7);
  const dispatch = createDispatch({ world });
  const lane = dispatch.lane();
  /** A worker decides 2,000 a second, one after another as they began. */
  const queue: (() => void)[] = [];
  let works = false;
  const work = (): void => {
    works = true;
    world.after(0.5, () => {
      queue.shift()?.();
      if (queue.length > 0) work();
      else works = false;
    });
  };
  const put = (tenant: string, actor: string, decided: () => void): void =>
    lane.put(tenant, "session", `${tenant}/session/${actor}`, (done) => {
      queue.push(() => {
        decided();
        done();
      });
      if (!works) work();
    });
  let of_a = 0;
  for (let n = 0; n < 10_000; n++) put("a", `s${n}`, () => void (of_a += 1));
  const latencies: number[] = [];
  const waits_of_a = (): number => 10_000 - of_a;
  for (let n = 0; n < 20; n++) {
    const began_ms = world.monotonic_ms();
    put("b", "s1", () => latencies.push(world.monotonic_ms() - began_ms));
    await world.advance(100);
  }
  expect(waits_of_a()).toBeGreaterThan(5_000);
  await world.advance(200);
  expect(latencies).toHaveLength(20);
  expect(Math.max(...latencies)).toBeLessThan(200);
  await world.advance(5_000);
  expect(waits_of_a()).toBe(0);
});

test("10,000 commands to an actor that cannot be restored hold up nobody else of its shard, and are decided in their order once it can", async () => {
  const world = new VirtualWorld(11);
  let readable = false;
  const broker = createMemoryBroker({
    world,
    shards: 1,
    faults: {
      before: ({ kind, connection, subject }) =>
        !readable && connection === "w1" && kind === "read" && subject.includes("session.stuck.") ? { kind: "unavailable" } : undefined,
    },
  });
  const bus = broker.connect("w1");
  let commits = 0;
  const host = createShardHost({
    bus,
    world,
    log: silentLog,
    cores,
    restorer: createRestorer({ bus, cores, log: silentLog }),
    performers: { load_configuration: () => new Promise(() => {}), call_model: () => new Promise(() => {}), call_tool: () => new Promise(() => {}) },
    worker: "w1",
    next_commit_id: () => `c${commits++}`,
    may_act: () => true,
    on_conflict: () => Promise.resolve("mine"),
    dispatch: createDispatch({ world, tenant_waiting_max: 100_000 }),
  });
  await host.take(0, 1, { worker: null, reason: "test" });

  const sender = broker.connect("sender");
  const stuck: ActorAddress = { tenant: "a", kind: "session", id: "stuck" };
  const replies: Reply[] = [];
  sender.subscribe("_INBOX.a.>", (message) => {
    const reply = decodeReply(message.data);
    if (reply !== undefined) replies.push(reply);
  });
  const bytes = (type: string, body: object): Uint8Array => new TextEncoder().encode(JSON.stringify({ type, body }));
  const subject = actorSubject(stuck, "control");
  for (let n = 0; n < 10_000; n++)
    void sender.publish(subject, n === 0 ? bytes("session.create", { agent: "x" }) : bytes("session.pause", {}), {
      headers: { "Troupe-Reply-To": `_INBOX.a.${n}` },
    });
  await world.settle();
  const client = createCommandClient({ bus: broker.connect("client"), world, fast_lane: false });
  for (let n = 0; n < 3; n++) {
    const began_ms = world.monotonic_ms();
    const answered = client.command({ tenant: "b", kind: "session", id: `s${n}` }, { type: "session.create", body: { agent: "x" } });
    let over = false;
    void answered.then(() => (over = true));
    expect(await world.until(() => over, 2_000), "another tenant's command is decided").toBe(true);
    expect(await answered).toMatchObject({ kind: "decided", reply: { ok: true } });
    expect(world.monotonic_ms() - began_ms).toBeLessThan(1_000);
  }
  expect(replies).toHaveLength(0);
  readable = true;
  expect(await world.until(() => replies.length >= 10_000, 120_000), `${replies.length} replies`).toBe(true);
  const seqs = replies.filter((reply) => reply.ok).map((reply) => (reply.ok ? reply.seq : 0));
  expect(seqs.length).toBeGreaterThan(0);
  expect(seqs).toEqual(seqs.toSorted((a, b) => a - b));
  await client.stop();
  await host.stop();
});
