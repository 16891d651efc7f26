// Goal: the host protocol answers every request once, in its declared shape, and refuses what it cannot read.
// Method: a service over a host that is a plain list, asked through the in-memory bus by the client and by raw requests.
import { expect, test } from "vitest";
import { createMemoryBroker } from "../../bus/memory.ts";
import { type ActorAddress, actorPath } from "../../protocol/ids.ts";
import { silentLog } from "../../protocol/log.ts";
import { HOST_OPERATIONS } from "../../protocol/subjects.ts";
import { createCallPool } from "../../actors/call-pool.ts";
import { createDispatch } from "../../actors/dispatch.ts";
import { createTimedCalls } from "../../actors/timed-calls.ts";
import { askHost, HOST_PROTOCOL, startHostService } from "../../supervisors/host-service.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session = (id: string): ActorAddress => ({ tenant: "acme", kind: "session", id });

function service(residents = 0) {
  const world = new VirtualWorld(1);
  const broker = createMemoryBroker({ world, shards: 4 });
  const resident = new Map(Array.from({ length: residents }, (_, n) => session(`s${String(n).padStart(5, "0")}`)).map((actor) => [actorPath(actor), actor]));
  const pool = createCallPool({ world });
  const running = startHostService({
    bus: broker.connect("worker"),
    world,
    log: silentLog,
    worker: "w1",
    host: {
      prepare: async (shard) => shard * 100,
      async load(actor) {
        if (actor.id === "broken") throw new Error("the host broke");
        if (actor.id === "elsewhere") return false;
        resident.set(actorPath(actor), actor);
        return true;
      },
      passivate: async (actor) => resident.delete(actorPath(actor)),
      resident: () => [...resident.values()],
      owned: () => [{ shard: 2, epoch: 7, phase: "owning", resident: resident.size, running: 1 }],
    },
    draining: () => false,
    may_act: () => true,
    pool,
    dispatch: createDispatch({ world }),
    ended: { models: createTimedCalls({ world }), tools: createTimedCalls({ world }) },
  });
  const asker = broker.connect("operator");
  const ask = async (subject: string, data: Uint8Array): Promise<unknown> => {
    let answer: Uint8Array | undefined;
    void asker.request(subject, data).then((reply) => (answer = reply?.data ?? new TextEncoder().encode("null")));
    await world.until(() => answer !== undefined, 10_000);
    return JSON.parse(new TextDecoder().decode(answer));
  };
  return { world, asker, ask, running, resident, pool };
}

test("prepare says how many actors of a shard are known now, and knows no shard beyond the last", async () => {
  const { asker } = service();
  expect(await askHost(asker, "w1", "prepare", { shard: 3 })).toEqual({ ok: true, result: { shard: 3, actors: 300 } });
  expect(await askHost(asker, "w1", "prepare", { shard: 4 })).toMatchObject({ ok: false, error: { code: "not_found" } });
});

test("start restores an actor and may be repeated; stop lets it leave and says whether it was there", async () => {
  const { asker, resident } = service();
  expect(await askHost(asker, "w1", "start", { actor: "acme/session/s1" })).toMatchObject({ ok: true, result: { actor: "acme/session/s1" } });
  expect(await askHost(asker, "w1", "start", { actor: "acme/session/s1" })).toMatchObject({ ok: true });
  expect([...resident.keys()]).toEqual(["acme/session/s1"]);
  expect(await askHost(asker, "w1", "stop", { actor: "acme/session/s1" })).toMatchObject({ ok: true, result: { stopped: true } });
  expect(await askHost(asker, "w1", "stop", { actor: "acme/session/s1" })).toMatchObject({ ok: true, result: { stopped: false } });
});

test("N2: an actor whose shard is another's is not started here", async () => {
  const { asker } = service();
  expect(await askHost(asker, "w1", "start", { actor: "acme/session/elsewhere" })).toMatchObject({ ok: false, error: { code: "not_found" } });
});

test("status and health tell the shards and the counts", async () => {
  const { asker } = service(3);
  expect(await askHost(asker, "w1", "status", {})).toEqual({
    ok: true,
    result: { worker: "w1", shards: [{ shard: 2, epoch: 7, phase: "owning", resident: 3, running: 1 }] },
  });
  expect(await askHost(asker, "w1", "health", {})).toMatchObject({
    ok: true,
    result: { worker: "w1", draining: false, may_act: true, bus: "connected", owned: 1, resident: 3, running: 1 },
  });
});

test("list pages through ten thousand actors without leaving one out or telling one twice", async () => {
  const { asker } = service(10_000);
  const seen: string[] = [];
  let after: string | undefined;
  do {
    const page = await askHost(asker, "w1", "list", { limit: 1_000, ...(after === undefined ? {} : { after }) });
    if (!page.ok) throw new Error(page.error.message);
    expect(page.result.total).toBe(10_000);
    seen.push(...page.result.actors);
    after = page.result.next;
  } while (after !== undefined);
  expect(seen).toHaveLength(10_000);
  expect(new Set(seen).size).toBe(10_000);
});

test("what cannot be read is refused by name, and one broken request does not end the service", async () => {
  const { ask, asker } = service();
  const text = (value: string): Uint8Array => new TextEncoder().encode(value);
  expect(await ask("system.worker.w1.v1.start", text("{"))).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await ask("system.worker.w1.v1.start", text("{}"))).toMatchObject({
    ok: false,
    error: { code: "invalid", details: { errors: [{ pointer: "/actor" }] } },
  });
  expect(await ask("system.worker.w1.v1.start", text(`{"actor":"${"a".repeat(200)}"}`))).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await ask("system.worker.w1.v1.list", text('{"limit":0}'))).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await ask("system.worker.w1.v1.start", text(`{"actor":"a/session/b","more":"${"x".repeat(5_000)}"}`))).toMatchObject({
    ok: false,
    error: { code: "too_large" },
  });
  expect(await ask("system.worker.w1.v1.explode", text("{}"))).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await ask("system.worker.w1.v1.start", text('{"actor":"acme/session/broken"}'))).toMatchObject({ ok: false, error: { code: "internal" } });
  expect(await ask("system.worker.w1.v1.health", new Uint8Array())).toMatchObject({ ok: true });
  expect(await ask("system.worker.w1.v1.start", text('{"actor":"acme/session/s1","unknown":1}'))).toMatchObject({ ok: true }); // unknown fields are passed over
  expect(await askHost(asker, "w1", "health", {})).toMatchObject({ ok: true });
});

test("a worker that is not there is unavailable, and so is one that stopped", async () => {
  const { asker, running, world } = service();
  const asked = async (worker: string) => {
    let outcome: unknown;
    void askHost(asker, worker, "health", {}, { patience_ms: 500 }).then((one) => (outcome = one));
    await world.until(() => outcome !== undefined, 2_000);
    return outcome;
  };
  expect(await asked("w9")).toMatchObject({ ok: false, error: { code: "unavailable" } });
  await running.stop();
  expect(await asked("w1")).toMatchObject({ ok: false, error: { code: "unavailable" } });
});

test("the contract has a request and a reply for each of the five operations", () => {
  expect(Object.keys(HOST_PROTOCOL).sort()).toEqual([...HOST_OPERATIONS].sort());
});

test("waits tells what waits here and why an actor's call does, and sets how many calls run at once", async () => {
  const { world, asker, pool } = service();
  for (let n = 0; n < 3; n++) void pool.enter({ tenant: "acme", actor: `acme/session/s${n}`, priority: "low" }, new AbortController().signal);
  expect(await askHost(asker, "w1", "waits", { calls_max: 2 })).toMatchObject({
    ok: true,
    result: { worker: "w1", calls: { calls_max: 2, running: 3, waiting: 0, refusing: 0 }, commands: { deciding: 0, waiting: 0, flows: [] } },
  });
  void pool.enter({ tenant: "acme", actor: "acme/session/late", priority: "low" }, new AbortController().signal);
  await world.advance(1_500);
  expect(await askHost(asker, "w1", "waits", { actor: "acme/session/late" })).toMatchObject({
    ok: true,
    result: { calls: { waiting: 1 }, call: { for: "pool", priority: "low", waited_ms: 1_500, ahead: 0 } },
  });
  const running = await askHost(asker, "w1", "waits", { actor: "acme/session/s1" });
  expect(running.ok && "call" in running.result).toBe(false);
  expect(await askHost(asker, "w1", "waits", { calls_max: 0 })).toMatchObject({ ok: false, error: { code: "invalid" } });
});
