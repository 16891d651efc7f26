// Goal:   while the bus is away, what was known of a tenant is gone on with by everybody who asks; what the bus said to have moved on is not.
// Method: the directory over a reader whose answers are held, fail or come by hand, in virtual time.
import { expect, test } from "vitest";
import { createDirectory } from "../../actors/directory.ts";
import type { Restored } from "../../actors/restore.ts";
import { BusUnavailable } from "../../bus/fence.ts";
import { Broker } from "../../bus/memory.ts";
import { silentLog } from "../../protocol/log.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const AWAY = new BusUnavailable("no answer within the patience");
const journalOf = (name: string): Restored =>
  ({ state: { snapshot: { value: "active", context: { name, keys: {}, agents: {}, policy: {}, grants: {}, config_epoch: 1 } } } }) as unknown as Restored;

function ground() {
  const world = new VirtualWorld(1);
  const broker = new Broker({ world, shards: 1 });
  const readings: { resolve(found: Restored | undefined): void; reject(error: Error): void }[] = [];
  const restorer = { restore: () => new Promise<Restored | undefined>((resolve, reject) => void readings.push({ resolve, reject })) };
  const directory = createDirectory({ bus: broker.connect("reader"), restorer, world, log: silentLog });
  const writer = broker.connect("writer");
  return { world, readings, directory, move: () => writer.send("live.tenant.acme.tenant.main.event", new Uint8Array([1])) };
}

async function known(ground_: ReturnType<typeof ground>): Promise<void> {
  const first = ground_.directory.tenant("acme");
  ground_.readings.shift()!.resolve(journalOf("before"));
  expect((await first)?.name).toBe("before");
}

test("everybody who asks while a reading fails hears what was known, and the next does not wait for another reading", async () => {
  const all = ground();
  await known(all);
  await all.world.advance(11_000);
  const asked = [all.directory.tenant("acme"), all.directory.tenant("acme"), all.directory.tenant("acme")];
  expect(all.readings).toHaveLength(1);
  all.readings.shift()!.reject(AWAY);
  expect((await Promise.all(asked)).map((tenant) => tenant?.name)).toEqual(["before", "before", "before"]);
  expect((await all.directory.tenant("acme"))?.name).toBe("before");
  expect(all.readings).toHaveLength(0);
  await all.world.advance(600);
  const again = all.directory.tenant("acme");
  all.readings.shift()!.resolve(journalOf("after"));
  expect((await again)?.name).toBe("after");
});

test("a tenant whose journal moved on is not answered for with what was known before", async () => {
  const all = ground();
  await known(all);
  all.move();
  await all.world.advance(10);
  const asked = all.directory.tenant("acme");
  all.readings.shift()!.reject(AWAY);
  await expect(asked).rejects.toThrow(BusUnavailable);
});

test("a tenant whose journal moved on while it was read is read again for the next who asks", async () => {
  const all = ground();
  await known(all);
  await all.world.advance(11_000);
  const during = all.directory.tenant("acme");
  all.move();
  await all.world.advance(10);
  const after = all.directory.tenant("acme");
  all.readings.shift()!.resolve(journalOf("stale"));
  all.readings.shift()!.resolve(journalOf("fresh"));
  expect((await during)?.name).toBe("stale");
  expect((await after)?.name).toBe("fresh");
  expect((await all.directory.tenant("acme"))?.name).toBe("fresh");
});

test("a journal that is there and cannot be read permits nothing, whatever was known", async () => {
  const all = ground();
  await known(all);
  await all.world.advance(11_000);
  const asked = all.directory.tenant("acme");
  all.readings.shift()!.reject(new Error("it is no journal message"));
  await expect(asked).rejects.toThrow("it is no journal message");
  const named = all.directory.unreadable();
  all.readings.shift()!.resolve(journalOf("mended"));
  expect(await named).toEqual([]);
});
