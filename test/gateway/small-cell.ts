// small-cell: all of Troupe that a gateway talks to, in this process: an in-memory broker, one shard host, the simulated models.
import { createHash, createSecretKey, randomBytes } from "node:crypto";
import { createCommandClient } from "../../actors/client.ts";
import { createDirectory } from "../../actors/directory.ts";
import { createPerformers } from "../../actors/performers.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost } from "../../actors/shard-host.ts";
import { createMemoryBroker, type FaultBefore, type MemoryBroker, type Operation } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { createKeyUse } from "../../actors/key-use.ts";
import { type Gateway, type GatewayDeps, startGateway } from "../../gateway/server.ts";
import { tenantActor } from "../../protocol/ids.ts";
import type { JsonObject } from "../../protocol/json.ts";
import type { MasterKey } from "../../protocol/key-ring.ts";
import type { Log } from "../../protocol/log.ts";
import { createProviders } from "../../providers/registry.ts";
import { realWorld } from "../../roles/real-world.ts";
import { cores, definitions } from "../../state-machines/kinds.ts";
import { silentMetrics } from "../../telemetry/metrics.ts";

export const keyOf = (tenant: string, key_id = "k1"): string => `troupe.${tenant}.${key_id}.${"s".repeat(43)}`;
export const bearer = (key: string): { authorization: string } => ({ authorization: `Bearer ${key}` });
/** What tenants' own provider keys are sealed with here. */
export const MASTER_KEYS: readonly MasterKey[] = [{ id: "m1", key: createSecretKey(randomBytes(32)) }];
/** In whose name `tell` speaks. */
export const OPERATOR = "login:operator";

export interface SmallCell {
  readonly broker: MemoryBroker;
  readonly operator: Bus;
  readonly gateway: Gateway;
  /** Every line that was logged. */
  readonly logged: string[];
  /** Says something to a tenant's own actor, as an operator. */
  tell(tenant: string, type: string, body: JsonObject): Promise<void>;
  /** A second gateway on the same broker. */
  another(overrides?: Partial<GatewayDeps>): Promise<Gateway>;
  end(): Promise<void>;
}

const SHARDS = 2;

export async function startSmallCell({
  tenants,
  overrides = {},
  before,
}: {
  tenants: readonly string[];
  overrides?: Partial<GatewayDeps>;
  before?: (operation: Operation) => FaultBefore | undefined;
}): Promise<SmallCell> {
  const world = realWorld();
  const logged: string[] = [];
  const note = (...parts: unknown[]): void => void logged.push(JSON.stringify(parts));
  const log: Log = { debug: note, info: note, warn: note, error: note, with: () => log };
  const broker = createMemoryBroker({ world, shards: SHARDS, ...(before === undefined ? {} : { faults: { before } }) });

  const worker = broker.connect("worker");
  const restorer = createRestorer({ bus: worker, cores, log });
  const directory = createDirectory({ bus: worker, restorer, world, log });
  let commits = 0;
  const host = createShardHost({
    bus: worker,
    world,
    log,
    cores,
    restorer,
    performers: createPerformers({ world, directory, providers: createProviders({ world, log }) }),
    worker: "w1",
    next_commit_id: () => `w1.${commits++}`,
    may_act: () => true,
    on_conflict: async () => "mine",
  });
  for (let shard = 0; shard < SHARDS; shard++) await host.take(shard, 1, { worker: null, reason: "first" });

  const operator = broker.connect("operator");
  const operators = createCommandClient({ bus: operator, world, principal: OPERATOR });
  async function tell(tenant: string, type: string, body: JsonObject): Promise<void> {
    const outcome = await operators.command(tenantActor(tenant), { type, body, channel: "control" });
    if (outcome.kind === "refused" || !outcome.reply.ok) throw new Error(`${type}: ${JSON.stringify(outcome)}`);
  }
  for (const tenant of tenants) {
    await tell(tenant, "tenant.create", {});
    await tell(tenant, "key.create", { key_id: "k1", hash: createHash("sha256").update(keyOf(tenant)).digest("hex") });
    await tell(tenant, "agent.put", { agent: "assistant", config: { model: "simulated/echo" } });
    await tell(tenant, "agent.put", { agent: "actor", config: { model: "simulated/script" } });
  }

  const ends: (() => Promise<void>)[] = [];
  let gateways = 0;
  async function another(more: Partial<GatewayDeps> = {}): Promise<Gateway> {
    const bus = broker.connect(`gateway-${gateways++}`);
    const reading = createRestorer({ bus, cores, log });
    const known = createDirectory({ bus, restorer: reading, world, log });
    const client = createCommandClient({ bus, world });
    const gateway = await startGateway({
      bus,
      restorer: reading,
      directory: known,
      client,
      sessions: { list: async () => ({ items: [] }) },
      usage_daily: async () => [],
      definition: definitions.session,
      key_use: createKeyUse({ bus, world, log }),
      master_keys: () => MASTER_KEYS,
      random_bytes: (count) => randomBytes(count),
      readiness: async () => ({ ready: true, components: { nats: { ok: true } } }),
      metrics: silentMetrics,
      world,
      log,
      host: "127.0.0.1",
      port: 0,
      ...overrides,
      ...more,
    });
    ends.push(async () => {
      await gateway.close();
      await client.stop();
      await known.stop();
      await bus.close();
    });
    return gateway;
  }

  return {
    broker,
    operator,
    gateway: await another(),
    logged,
    tell,
    another,
    async end() {
      for (const end of ends) await end();
      await operators.stop();
      for (let shard = 0; shard < SHARDS; shard++) await host.drop(shard);
      await directory.stop();
      await worker.close();
      await operator.close();
    },
  };
}
