// Goal: a timer fires once, at its time, wherever its actor is by then: busy in memory, idle and gone, or on another worker.
// Method: one host on the in-memory bus in virtual time, with a session whose model never answers, and one that nobody talks to.
import { expect, test } from "vitest";
import { createCommandClient } from "../../actors/client.ts";
import type { Performers } from "../../actors/performer.ts";
import { createRestorer } from "../../actors/restore.ts";
import type { ShardHost } from "../../actors/shard-host.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { silentLog } from "../../protocol/log.ts";
import { cores } from "../../state-machines/kinds.ts";
import { IDLE_TTL_MS } from "../../state-machines/session-configuration.ts";
import { MODEL_PATIENCE_MS } from "../../state-machines/session-model-calls.ts";
import { outerState } from "../../state-machines/step.ts";
import { plainHost } from "../harness/plain-host.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session: ActorAddress = { tenant: "acme", kind: "session", id: "s1" };

function ground() {
  const world = new VirtualWorld(1);
  const broker = createMemoryBroker({ world, shards: 1 });
  const observer = broker.connect("observer");
  const performers: Performers = {
    load_configuration: (async () => ({
      config: { model: "simulated/echo", instructions: "", tools: [], mode: "multi", max_loops: 4 },
      hash: "h",
      agent_version: 1,
    })) as never,
    call_model: (() => new Promise(() => undefined)) as never,
  };
  const hostOn = (name: string): ShardHost => plainHost({ bus: broker.connect(name), world, name, performers });
  const client = createCommandClient({ bus: observer, world });
  const say = async (type: string, body: object): Promise<void> => {
    let done = false;
    void client.command(session, { type, body: body as never }).then(() => (done = true));
    expect(await world.until(() => done, 5_000)).toBe(true);
  };
  const stateNow = async (): Promise<string | undefined> => {
    let state: string | undefined;
    let done = false;
    void createRestorer({ bus: observer, cores, log: silentLog })
      .restore(session)
      .then((restored) => {
        state = restored === undefined ? undefined : outerState(restored.state.snapshot);
        done = true;
      });
    await world.until(() => done, 1_000);
    return state;
  };
  return { world, hostOn, say, stateNow };
}

test("a model that never answers is given up after its patience, though its actor is never quiet", async () => {
  const { world, hostOn, say, stateNow } = ground();
  await hostOn("w1").take(0, 1, { worker: null, reason: "first" });
  await say("session.create", { agent: "a" });
  await say("message.send", { content: "hello" });
  await world.advance(MODEL_PATIENCE_MS - 10_000);
  expect(await stateNow()).toBe("thinking");
  await world.advance(20_000);
  expect(await stateNow()).toBe("idle");
});

test("an idle session that left memory expires at its time, also on a worker that never saw it", async () => {
  const { world, hostOn, say, stateNow } = ground();
  const first = hostOn("w1");
  await first.take(0, 1, { worker: null, reason: "first" });
  await say("session.create", { agent: "a" });
  await world.advance(120_000);
  expect(first.resident()).toEqual([]);
  await first.leave(0, 1_000);
  const second = hostOn("w2");
  await second.take(0, 2, { worker: "w1", reason: "moved" });
  expect(second.resident()).toEqual([]);
  await world.advance(IDLE_TTL_MS - 300_000);
  expect(await stateNow()).toBe("idle");
  await world.advance(400_000);
  expect(await stateNow()).toBe("terminated");
});
