// Goal: a tenant that has too much waiting in COMMANDS, by messages or by bytes, is refused more until much of it is decided; nobody is refused for what
// others stored; what cannot be counted refuses nobody.
// Method: the in-memory broker in virtual time, with commands that nobody takes until a test takes them.
import { expect, test } from "vitest";
import { createStoredCommands, type StoredCommandsOptions } from "../../actors/stored-commands.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import type { Delivery } from "../../bus/port.ts";
import { silentLog } from "../../protocol/log.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

function ground(options: Partial<StoredCommandsOptions> = {}) {
  const world = new VirtualWorld(9);
  const broker = createMemoryBroker({ world, shards: 4 });
  const bus = broker.connect("gateway");
  const changes: [string, boolean][] = [];
  const stored = createStoredCommands({ bus, world, log: silentLog, on_change: (tenant, crowded) => void changes.push([tenant, crowded]), ...options });
  const store = async (tenant: string, count: number, bytes = 100): Promise<void> => {
    for (let n = 0; n < count; n++) void bus.publish(`tenant.${tenant}.session.s${n % 7}.command`, new Uint8Array(bytes));
    await world.advance(1);
  };
  const deliveries: Delivery[] = [];
  const take = async (): Promise<void> => {
    void bus.consume(
      { stream: "COMMANDS", durable: "d", filters: ["shard.>"] },
      { on_delivery: (one) => void deliveries.push(one), on_reset: () => undefined },
    );
    await world.advance(10);
  };
  return { world, broker, stored, store, take, deliveries, changes };
}

test("10,000 waiting messages of one tenant refuse it more, by name and with a time, and nobody else; below 60 % it is taken again", async () => {
  const { world, stored, store, take, deliveries, changes } = ground({ messages_max: 12_000 });
  await store("a", 9_000);
  await store("b", 900);
  await world.advance(600);
  expect(stored.refusal("a")).toBeUndefined();
  await store("a", 1_000);
  await world.advance(600);
  expect(stored.refusal("a")).toMatchObject({ code: "overloaded", details: { waits_for: "stream", waiting: 10_000, retry_after_ms: 2_000 } });
  expect(stored.refusal("b")).toBeUndefined();
  expect(stored.refusal("c")).toBeUndefined();
  await take();
  for (const delivery of deliveries.splice(0, 2_000)) delivery.ack();
  await world.advance(600);
  expect(stored.refusal("a"), "not below 60 % yet").toBeDefined();
  for (const delivery of deliveries.splice(0, 1_500)) delivery.ack();
  await world.advance(600);
  expect(stored.refusal("a")).toBeUndefined();
  expect(changes).toEqual([
    ["a", true],
    ["a", false],
  ]);
  stored.stop();
});

test("a few large messages refuse their tenant by their bytes, and not the one that has many small ones", async () => {
  const { world, stored, store } = ground({ bytes_max: 1_000_000 });
  await store("small", 2_000, 50);
  await store("large", 90, 10_000);
  await world.advance(1_200);
  expect(stored.refusal("large")).toMatchObject({ code: "overloaded", details: { waiting: 90 } });
  expect(stored.refusal("small")).toBeUndefined();
  stored.stop();
});

test("SC2, SC3: little is not counted at all, and a broker that does not answer refuses nobody", async () => {
  const { world, broker, stored, store, changes } = ground({ messages_max: 1_000 });
  await store("a", 90);
  await world.advance(600);
  expect(stored.refusal("a")).toBeUndefined();
  await store("a", 1_000);
  broker.kill("gateway");
  await world.advance(5_000);
  expect(stored.refusal("a")).toBeUndefined();
  expect(changes).toEqual([]);
  stored.stop();
});
