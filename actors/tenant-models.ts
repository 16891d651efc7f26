// tenant-models: the models of one tenant: with the tenant's own key at a provider where it has one, else with the platform's.
//
//   resolve ──the tenant has a key there──▶ the key is opened, here and now ──▶ a client with it, kept while it is used
//      │                                        └─ it cannot be ──▶ refused: provider_key_unusable
//      └──────it has none──────────────────▶ the platform's client
//
// Invariants, each a test in test/actors/tenant-models.test.ts:
//   TM1. A tenant that has a key at a provider is never served there with the platform's: neither when its own cannot be opened, nor when it cannot be
//        known whether it has one.
//   TM2. A client with a key serves its tenant alone, is gone as soon as it is heard that the tenant changed anything, and is never used after the key was
//        seen to be another one.
//   TM3. At most CLIENTS_MAX clients are kept, none longer than CLIENT_IDLE_MS after its last use: no key stays in memory that nobody uses.
import type { JsonObject } from "../protocol/json.ts";
import { type MasterKey, openSecret } from "../protocol/key-ring.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { modelError } from "../providers/model-error.ts";
import type { ModelError, Provider } from "../providers/provider.ts";
import type { Providers, Resolution } from "../providers/registry.ts";
import { providerKeyOf } from "../state-machines/tenant.ts";
import type { Directory, TenantRecord } from "./directory.ts";

/** A client costs some kilobytes; tenants that call at the same time are fewer. The one that was not used for longest goes first. */
const CLIENTS_MAX = 1_000;
/** Longer than a person thinks about an answer. */
const CLIENT_IDLE_MS = 10 * 60_000;
const SWEEP_MS = 60_000;

/** Who can say which provider a model's name means. */
export interface Models {
  resolve(model: string): Resolution | Promise<Resolution>;
}

export interface TenantModels {
  of(tenant: string): Models;
  /** TM2: something of the tenant changed. */
  forget(tenant: string): void;
  stop(): void;
}

export interface TenantModelsDeps {
  readonly providers: Providers;
  readonly directory: Pick<Directory, "tenant">;
  /** As they are now, the one that seals first. */
  readonly master_keys: () => readonly MasterKey[];
  readonly world: World;
  readonly log: Log;
}

interface Client {
  readonly tenant: string;
  /** Of what was opened for it: another key, and the same key sealed anew, have another one. */
  readonly nonce: string;
  readonly provider: Provider;
  used_ms: number;
}

/** The owner of a tenant's keys, for breakers. */
export const tenantOwner = (tenant: string): string => `tenant.${tenant}`;

/** Why a tenant cannot have a model, as far as that is known before it is called. */
export function refusalOfModel(providers: Providers, record: Pick<TenantRecord, "provider_keys">, model: string): ModelError | undefined {
  const key_name = providers.keyNameOf(model);
  if (key_name !== undefined && providerKeyOf(record, key_name) !== undefined) return undefined;
  const resolved = providers.resolve(model);
  return resolved.kind === "refused" ? resolved.error : undefined;
}

/** What may be said of a tenant's own keys. */
export function providerKeysOf({ provider_keys = {} }: Pick<TenantRecord, "provider_keys">): JsonObject[] {
  return Object.entries(provider_keys)
    .map(([provider, { label, last_four, version, created_at_ms, rotated_at_ms, sealed }]) => ({
      provider,
      label,
      last_four,
      version,
      created_at: timestamp(created_at_ms),
      rotated_at: timestamp(rotated_at_ms),
      master_key_id: sealed.master_key_id,
    }))
    .sort((a, b) => (a.provider < b.provider ? -1 : 1));
}

export function createTenantModels({ providers, directory, master_keys, world, log }: TenantModelsDeps): TenantModels {
  /** By tenant and the provider's name in a model's name; the one that was used last at the end. */
  const clients = new Map<string, Client>();
  let stopSweep: (() => void) | undefined;

  /** TM3 */
  function sweep(): void {
    const idle_since_ms = world.monotonic_ms() - CLIENT_IDLE_MS;
    for (const [name, { used_ms }] of clients) if (used_ms <= idle_since_ms) clients.delete(name);
    stopSweep = clients.size === 0 ? undefined : world.after(SWEEP_MS, sweep);
  }

  function keep(name: string, client: Client): void {
    clients.delete(name);
    clients.set(name, client);
    if (clients.size > CLIENTS_MAX) clients.delete(clients.keys().next().value!);
    stopSweep ??= world.after(SWEEP_MS, sweep);
  }

  const refused = (code: "provider_unavailable" | "provider_key_unusable", message: string): Resolution => ({
    kind: "refused",
    error: modelError(code, message),
  });

  async function resolve(tenant: string, model: string): Promise<Resolution> {
    const key_name = providers.keyNameOf(model);
    if (key_name === undefined) return providers.resolve(model);
    let record: TenantRecord | undefined;
    try {
      record = await directory.tenant(tenant);
    } catch (error) {
      log.warn("it cannot be known whether a tenant has a key of its own", { tenant, provider: key_name, ...errorFields(error) });
      return refused("provider_unavailable", `it cannot be known now whether the tenant has a key of its own for ${key_name}`); // TM1
    }
    const slash = model.indexOf("/");
    const name = `${tenant}/${model.slice(0, slash)}`;
    const key = record === undefined ? undefined : providerKeyOf(record, key_name);
    if (key === undefined) {
      clients.delete(name);
      return providers.resolve(model);
    }
    const resolved = (client: Client): Resolution => {
      client.used_ms = world.monotonic_ms();
      keep(name, client);
      return { kind: "resolved", provider: client.provider, model: model.slice(slash + 1), key_source: "tenant", owner: tenantOwner(tenant) };
    };
    const known = clients.get(name);
    if (known !== undefined && known.nonce === key.sealed.nonce) return resolved(known); // TM2
    clients.delete(name);
    const opened = openSecret(master_keys(), key.sealed, { tenant, provider: key_name });
    if (opened.kind === "refused") {
      const why = opened.reason === "unknown_master_key" ? `the master key '${opened.master_key_id}' is not known here` : "it is not what was sealed";
      log.error("a tenant's own key cannot be opened", { tenant, provider: key_name, reason: opened.reason, master: opened.master_key_id });
      return refused("provider_key_unusable", `the tenant's own key for ${key_name} cannot be opened: ${why}`); // TM1
    }
    return resolved({ tenant, nonce: key.sealed.nonce, provider: providers.withKey(model, opened.secret), used_ms: 0 });
  }

  return {
    of: (tenant) => ({ resolve: (model) => resolve(tenant, model) }),
    forget(tenant) {
      for (const [name, client] of clients) if (client.tenant === tenant) clients.delete(name);
    },
    stop() {
      stopSweep?.();
      clients.clear();
    },
  };
}
