// Goal:   when a key was last used is known within a minute, over HTTP and at the command line, at the price of one write a minute and tenant, however
//         many uses and gateways there are; nobody waits for it and no other tenant's key is in it.
// Method: the noting alone in virtual time on an in-memory bus with faults; a gateway with all that it talks to.
import { describe, expect, test } from "vitest";
import { createMemoryBroker, type MemoryBroker } from "../../bus/memory.ts";
import { createKeyUse, type KeyUse, lastUsedAt, readKeyUse } from "../../actors/key-use.ts";
import { silentLog } from "../../protocol/log.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { bearer, keyOf, startSmallCell } from "./small-cell.ts";

interface Ground {
  readonly world: VirtualWorld;
  readonly broker: MemoryBroker;
  gateway(name: string): KeyUse;
  /** Writes that reached the bucket. */
  writes(): number;
  away: boolean;
}

function ground(): Ground {
  const world = new VirtualWorld(7);
  let writes = 0;
  const made: Ground = {
    world,
    broker: createMemoryBroker({
      world,
      shards: 1,
      faults: {
        before: ({ kind, subject }) => {
          if (kind !== "bucket_write" || !subject.includes("KEYUSE")) return undefined;
          if (made.away) return { kind: "unavailable" };
          writes += 1;
          return undefined;
        },
      },
    }),
    gateway: (name) => createKeyUse({ bus: made.broker.connect(name), world, log: silentLog }),
    writes: () => writes,
    away: false,
  };
  return made;
}

describe("what is noted", () => {
  test("a thousand uses in a minute are one write, and what is told of them is the last one", async () => {
    const { world, broker, gateway, writes } = ground();
    const use = gateway("a");
    for (let n = 0; n < 1_000; n += 1) {
      use.used("acme", `k${n % 3}`);
      await world.advance(50);
    }
    const last_ms = world.now_ms() - 50;
    expect(writes()).toBe(0);
    await world.advance(20_000);
    expect(writes()).toBe(1);
    const read = await readKeyUse(broker.connect("cli"), "acme");
    expect(Object.keys(read).sort()).toEqual(["k0", "k1", "k2"]);
    expect(Math.max(...Object.values(read))).toBe(last_ms);
    await world.advance(600_000);
    expect(writes()).toBe(1);
  });

  test("KU1: gateways that write at once keep each other's, and a time only rises", async () => {
    const { world, broker, gateway } = ground();
    const [one, other] = [gateway("a"), gateway("b")];
    one.used("acme", "old");
    one.used("acme", "both");
    await world.advance(1_000);
    other.used("acme", "both");
    other.used("acme", "new");
    const newest_ms = world.now_ms();
    await world.advance(120_000);
    const read = await readKeyUse(broker.connect("cli"), "acme");
    expect(read).toEqual({ both: newest_ms, new: newest_ms, old: newest_ms - 1_000 });
    expect(await readKeyUse(broker.connect("cli"), "rival")).toEqual({});
  });

  test("KU2: what cannot be written waits for the next time, and the end writes what is noted", async () => {
    const made = ground();
    const { world, broker, gateway } = made;
    const use = gateway("a");
    made.away = true;
    use.used("acme", "k1");
    const at_ms = world.now_ms();
    await world.advance(70_000);
    expect(await readKeyUse(broker.connect("cli"), "acme")).toEqual({});
    made.away = false;
    await world.advance(130_000);
    expect(await readKeyUse(broker.connect("cli"), "acme")).toEqual({ k1: at_ms });
    use.used("acme", "k2");
    const later_ms = world.now_ms();
    const ended = use.stop();
    await world.advance(1_000);
    await ended;
    expect(await readKeyUse(broker.connect("cli"), "acme")).toEqual({ k1: at_ms, k2: later_ms });
  });

  test("KU3: a tenant's oldest fall out above what a tenant can list", async () => {
    const { world, broker, gateway } = ground();
    const use = gateway("a");
    for (let n = 0; n < 1_200; n += 1) {
      use.used("acme", `k${n}`);
      await world.advance(1);
    }
    await world.advance(120_000);
    const read = await readKeyUse(broker.connect("cli"), "acme");
    expect(Object.keys(read)).toHaveLength(1_000);
    expect([Object.hasOwn(read, "k199"), Object.hasOwn(read, "k200")]).toEqual([false, true]);
  });

  test("a key may be called anything that an id may be", () => {
    expect(lastUsedAt({}, "constructor")).toBe(null);
    expect(lastUsedAt({ k: 0 }, "k")).toBe("1970-01-01T00:00:00.000Z");
  });
});

test("over HTTP each key of the tenant is listed with its last use, a key that was refused is not used, and another tenant's is not there", async () => {
  const cell = await startSmallCell({ tenants: ["acme", "rival"] });
  atEndOfFile(() => cell.end());
  const { createHash } = await import("node:crypto");
  const listed = async (tenant: string): Promise<Record<string, string | null>> => {
    const answer = await fetch(`${cell.gateway.url}/v1/keys`, { headers: bearer(keyOf(tenant, "boss")) });
    const { items } = (await answer.json()) as { items: { key_id: string; last_used_at: string | null }[] };
    return Object.fromEntries(items.map(({ key_id, last_used_at }) => [key_id, last_used_at]));
  };
  for (const tenant of ["acme", "rival"])
    for (const key_id of ["boss", "idle"]) {
      const hash = createHash("sha256").update(keyOf(tenant, key_id)).digest("hex");
      await cell.tell(tenant, "key.create", { key_id, hash, scopes: ["admin"] });
    }
  const before_ms = Date.now();
  expect((await fetch(`${cell.gateway.url}/v1/agents`, { headers: bearer(keyOf("rival", "k1")) })).status).toBe(200);
  expect((await fetch(`${cell.gateway.url}/v1/agents`, { headers: bearer(`${keyOf("acme", "idle")}x`) })).status).toBe(401);
  const acme = await listed("acme");
  expect(Object.keys(acme).sort()).toEqual(["boss", "idle", "k1"]);
  expect([acme["idle"], acme["k1"]]).toEqual([null, null]);
  expect(Date.parse(acme["boss"] ?? "")).toBeGreaterThanOrEqual(before_ms);
  expect((await listed("rival"))["k1"]).not.toBe(null);
});
