// two-tenants: a whole Troupe with two tenants that are twins in every id and differ in one word each: what the one must never see of the other.
import { randomBytes } from "node:crypto";
import { connect, type NatsConnection } from "nats";
import { createCommandClient } from "../../actors/client.ts";
import { createKey } from "../../protocol/api-key.ts";
import { tenantActor } from "../../protocol/ids.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { realWorld } from "../../roles/real-world.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { startTroupe, type Troupe } from "../harness/troupe.ts";

export const TENANTS = ["acme", "rival"] as const;
export type TenantName = (typeof TENANTS)[number];

/** A word that stands in every text of the tenant and nowhere else. */
export const canaryOf = (tenant: TenantName): string => `canary-of-${tenant}-7f3a`;
export const otherOf = (tenant: TenantName): TenantName => (tenant === "acme" ? "rival" : "acme");
export const SESSION = "twin";

export interface TwoTenants {
  readonly troupe: Troupe;
  readonly keys: Record<TenantName, string>;
  /** Says something to a tenant's own actor, as an operator. */
  tell(tenant: string, type: string, body: JsonObject): Promise<void>;
  /** A new key of a tenant. */
  key(tenant: string, more?: JsonObject): Promise<{ key: string; key_id: string }>;
  /** A plain client of NATS that shows this credential; closed at the end of the file. Rejects when the broker does not let it in. */
  client(credential: string, tenant: string, options?: { as?: "token" | "password"; reconnect?: boolean }): Promise<NatsConnection>;
}

export async function startTwoTenants(options: Parameters<typeof startTroupe>[0] = {}): Promise<TwoTenants> {
  const troupe = await startTroupe(options);
  const bus = await troupe.bus();
  const operator = createCommandClient({ bus, world: realWorld() });
  const open: NatsConnection[] = [];
  // Registered after the bus's own, so it comes before it.
  atEndOfFile(async () => {
    await Promise.all(open.map((connection) => connection.close()));
    await operator.stop();
  });

  async function tell(tenant: string, type: string, body: JsonObject): Promise<void> {
    const outcome = await operator.command(tenantActor(tenant), { type, body, channel: "control" });
    if (outcome.kind === "refused" || !outcome.reply.ok) throw new Error(`${type}: ${JSON.stringify(outcome)}`);
  }
  async function key(tenant: string, more: JsonObject = {}): Promise<{ key: string; key_id: string }> {
    const made = createKey(tenant, (count) => randomBytes(count));
    await tell(tenant, "key.create", { key_id: made.key_id, hash: made.hash, ...more });
    return made;
  }

  const keys = {} as Record<TenantName, string>;
  for (const tenant of TENANTS) {
    const canary = canaryOf(tenant);
    await tell(tenant, "tenant.create", { name: canary });
    await tell(tenant, "agent.put", { agent: "assistant", config: { model: "simulated/echo", instructions: canary } });
    await tell(tenant, "agent.put", { agent: "actor", config: { model: "simulated/script", instructions: canary } });
    keys[tenant] = (await key(tenant, { label: canary })).key;
    const made = await troupe.api("/v1/sessions", {
      key: keys[tenant],
      json: { id: SESSION, agent: "assistant", user: canary, metadata: { word: canary } },
    });
    if (made.status !== 201) throw new Error(`the session of ${tenant} was not made: ${await made.text()}`);
    const said = await troupe.api(`/v1/sessions/${SESSION}/messages`, {
      key: keys[tenant],
      json: { content: `say ${canary}` },
      headers: { accept: "text/event-stream" },
    });
    await said.text();
  }

  return {
    troupe,
    keys,
    tell,
    key,
    async client(credential, tenant, { as = "token", reconnect = false } = {}) {
      const connection = await connect({
        servers: troupe.dev().nats_url,
        ...(as === "token" ? { token: credential } : { user: "any name", pass: credential }),
        inboxPrefix: `_INBOX_${tenant}`,
        reconnect,
        reconnectTimeWait: 50,
        maxReconnectAttempts: -1,
      });
      open.push(connection);
      return connection;
    },
  };
}
