// key-use: when each API key was last used, so that whoever looks after them sees which may go. Kept cheaply: noted in memory with each use, and
// written to the bucket KEYUSE at most once in WRITE_EVERY_MS, one entry a tenant; no journal and no database has a row for a use.
//
//   a credential passes ──▶ noted here ──a minute at most──▶ KEYUSE {tenant}: {key_id: milliseconds since 1970}
//
// Invariants:
//   KU1. The time of a key only rises, whichever gateway writes it: entries are merged, by compare-and-set.
//   KU2. Nothing waits for it: a use that cannot be written is kept for the next time, and a gateway that dies loses at most WRITE_EVERY_MS of it.
//   KU3. What is kept is bounded: KEYS_KEPT_MAX a tenant, the newest; NOTED_MAX in a gateway.
import type { Bus } from "../bus/port.ts";
import { isId } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { TENANT_KEYS_MAX } from "../state-machines/tenant.ts";

/** By key id, milliseconds since 1970. */
export type LastUsed = Readonly<Record<string, number>>;

export interface KeyUse {
  /** A key opened something just now. */
  used(tenant: string, key_id: string): void;
  /** When each key of a tenant was last used, as far as any gateway wrote it and this one knows; absent: never. Rejects when the bus cannot answer. */
  lastUsed(tenant: string): Promise<LastUsed>;
  /** Writes what is noted, and ends. */
  stop(): Promise<void>;
}

/** Who looks for a key that nobody uses thinks in days. */
const WRITE_EVERY_MS = 60_000;
/** As many as a tenant can list. Those that it lists no more are the oldest and fall out. */
const KEYS_KEPT_MAX = TENANT_KEYS_MAX;
/** Keys with a use that is not written yet: a minute of as many different keys as there are in a large cell. Above it a use is not noted. */
const NOTED_MAX = 100_000;
/** Gateways that write the same tenant in the same moment try again; after this many, at the next time. */
const TRIES_MAX = 5;
/** Tenants written at once. */
const WRITES_AT_ONCE = 8;

function decodeUse(value: Uint8Array | undefined): Record<string, number> {
  if (value === undefined) return {};
  const read: unknown = JSON.parse(new TextDecoder().decode(value));
  if (read === null || typeof read !== "object") return {};
  return Object.fromEntries(Object.entries(read).filter((entry): entry is [string, number] => isId(entry[0]) && typeof entry[1] === "number"));
}

/** KU1, KU3. */
function merged(one: LastUsed, other: LastUsed): Record<string, number> {
  const all = new Map(Object.entries(one));
  for (const [key_id, at_ms] of Object.entries(other)) all.set(key_id, Math.max(at_ms, all.get(key_id) ?? 0));
  return Object.fromEntries([...all].sort((a, b) => b[1] - a[1]).slice(0, KEYS_KEPT_MAX));
}

/** What gateways wrote of a tenant's keys. Rejects when the bus cannot answer. */
export async function readKeyUse(bus: Pick<Bus, "bucket">, tenant: string): Promise<LastUsed> {
  return decodeUse((await bus.bucket("KEYUSE").get(tenant))?.value);
}

export function createKeyUse({
  bus,
  world,
  log,
  write_every_ms = WRITE_EVERY_MS,
}: {
  bus: Pick<Bus, "bucket">;
  world: World;
  log: Log;
  write_every_ms?: number;
}): KeyUse {
  const bucket = bus.bucket("KEYUSE");
  let noted = new Map<string, Map<string, number>>();
  let count = 0;
  let armed: (() => void) | undefined;
  let writing: Promise<void> | undefined;
  let stopped = false;

  function note(tenant: string, key_id: string, at_ms: number): void {
    const keys = noted.get(tenant) ?? new Map<string, number>();
    if (!keys.has(key_id)) {
      if (count >= NOTED_MAX) return; // KU3
      count += 1;
    }
    keys.set(key_id, Math.max(at_ms, keys.get(key_id) ?? 0));
    noted.set(tenant, keys);
    if (!stopped) armed ??= world.after(write_every_ms, writeSoon);
  }

  function writeSoon(): void {
    armed = undefined;
    writing = writeAll().finally(() => (writing = undefined));
  }

  async function writeOne(tenant: string, uses: LastUsed): Promise<boolean> {
    for (let tries = 0; tries < TRIES_MAX; tries += 1) {
      const before = await bucket.get(tenant);
      const known = decodeUse(before?.value);
      const next = merged(known, uses);
      if (Object.entries(next).every(([key_id, at_ms]) => known[key_id] === at_ms)) return true;
      const value = new TextEncoder().encode(JSON.stringify(next));
      const outcome = before === undefined ? await bucket.create(tenant, value) : await bucket.update(tenant, value, before.revision);
      if (outcome.kind === "ok") return true;
      if (outcome.kind === "unavailable") return false;
    }
    return false;
  }

  async function writeAll(): Promise<void> {
    const due = [...noted];
    noted = new Map();
    count = 0;
    let failed = 0;
    const next = async (): Promise<void> => {
      for (let one = due.pop(); one !== undefined; one = due.pop()) {
        const [tenant, uses] = one;
        const written = await writeOne(tenant, Object.fromEntries(uses)).catch((error: unknown) => {
          log.debug("when keys were used could not be written", { tenant, ...errorFields(error) });
          return false;
        });
        if (written) continue;
        failed += 1;
        for (const [key_id, at_ms] of uses) note(tenant, key_id, at_ms); // KU2
      }
    };
    await Promise.all(Array.from({ length: WRITES_AT_ONCE }, next));
    if (failed > 0) log.warn("when keys were used could not be written for some tenants, and is written later", { tenants: failed });
  }

  return {
    used(tenant, key_id) {
      note(tenant, key_id, Math.trunc(world.now_ms()));
    },
    async lastUsed(tenant) {
      return merged(await readKeyUse(bus, tenant), Object.fromEntries(noted.get(tenant) ?? []));
    },
    async stop() {
      stopped = true;
      armed?.();
      await writing;
      await writeAll();
    },
  };
}

/** As people and programs are told; null: never, as far as is known. */
export function lastUsedAt(used: LastUsed, key_id: string): string | null {
  const at_ms = Object.hasOwn(used, key_id) ? used[key_id] : undefined;
  return at_ms === undefined ? null : timestamp(at_ms);
}
