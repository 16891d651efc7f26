// gateway: HTTP, SSE and the replay service. Any gateway serves any session; it owns nothing that a restart loses.
import { createCommandClient } from "../actors/client.ts";
import { createDirectory } from "../actors/directory.ts";
import { watchPermissions } from "../actors/permission.ts";
import { createRestorer } from "../actors/restore.ts";
import { createStoredCommands } from "../actors/stored-commands.ts";
import { createKeyUse } from "../actors/key-use.ts";
import { createOidc } from "../gateway/oidc.ts";
import { type Readiness, startGateway } from "../gateway/server.ts";
import { createDatabase } from "../projections/database.ts";
import { bypassesIsolation } from "../projections/isolation.ts";
import { createQueries } from "../projections/queries.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { REFUSE_PERCENT_DISTRIBUTED } from "../protocol/limits.ts";
import { cores, definitions } from "../state-machines/kinds.ts";
import { openEdge } from "./edge.ts";
import { createLocations } from "../supervisors/locations.ts";
import { openMasterKeys } from "./master-keys.ts";
import { connect, observeBus, type Runtime } from "./runtime.ts";

export interface GatewayRoleOptions {
  readonly id: string;
  readonly host: string;
  readonly http_port: number;
}

export async function runGateway(runtime: Runtime, { id, host, http_port }: GatewayRoleOptions): Promise<number> {
  const { world, settings, metrics } = runtime;
  const log = runtime.log.with({ gateway: id });
  const bus = await connect(runtime, `gateway-${id}`);
  observeBus(bus, metrics);
  const restorer = createRestorer({ bus, cores, log });
  const directory = createDirectory({ bus, restorer, world, log });
  const permissions = watchPermissions({ directory, world });
  const locations = createLocations({ bus, world, log });
  const client = createCommandClient({ bus, world });
  const database =
    settings.TROUPE_POSTGRES_URL === undefined
      ? undefined
      : createDatabase({ url: settings.TROUPE_POSTGRES_URL, application_name: `troupe-gateway-${id}`, log });
  const queries = database === undefined ? undefined : createQueries(database);

  /** Sessions run without Postgres, so its absence is told and does not make the gateway unready; only lists need it. */
  async function readiness(): Promise<Readiness> {
    const bus_ok = bus.state === "connected";
    const placed = [...locations.counts().values()].reduce((sum, count) => sum + count, 0);
    const shards = { ok: placed === bus.shards, detail: `${placed} of ${bus.shards} shards have an owner` };
    let postgres: { ok: boolean; detail?: string } = { ok: true, detail: "not configured; lists are unavailable" };
    if (database !== undefined) {
      try {
        // The queries bind themselves to one tenant all the same; a credential that could see all is one mistake away from showing it.
        postgres = (await bypassesIsolation(database))
          ? { ok: false, detail: "the credential is not bound by row-level security; connect as troupe_app" }
          : { ok: true };
      } catch (error) {
        postgres = { ok: false, detail: error instanceof Error ? error.name : "away" };
      }
    }
    const allowed = await permissions.status();
    return { ready: bus_ok && shards.ok && allowed.ok, components: { nats: { ok: bus_ok }, shards, postgres, permissions: allowed } };
  }

  const oidc = settings.oidc.length === 0 ? undefined : createOidc({ issuers: settings.oidc, world, log, fetch });
  const key_use = createKeyUse({ bus, world, log });
  // The edge and what it asks need each other: who has become crowded is to come onto the bus anew.
  const late: { edge?: Awaited<ReturnType<typeof openEdge>> } = {};
  const crowds = new Set<string>();
  const stored = createStoredCommands({
    bus,
    world,
    log,
    messages_max: settings.TROUPE_TENANT_COMMANDS_STORED_MAX,
    bytes_max: settings.TROUPE_TENANT_COMMANDS_BYTES_MAX,
    refuse_percent: settings.TROUPE_REFUSE_FROM_PERCENT ?? REFUSE_PERCENT_DISTRIBUTED,
    on_change(tenant, crowded) {
      if (crowded) crowds.add(tenant);
      else crowds.delete(tenant);
      metrics.set("troupe_tenants_refused", { what: "stored" }, crowds.size);
      void late.edge?.admitAnew(tenant);
    },
  });
  const edge = await openEdge(runtime, { id, bus, directory, oidc, key_use, crowded: (tenant) => stored.refusal(tenant) !== undefined, log });
  late.edge = edge;

  const gateway = await startGateway({
    bus,
    restorer,
    directory,
    client,
    sessions: {
      list(tenant, request) {
        if (queries === undefined) throw new TroupeError(errorBody("unavailable", "no database is configured, so there are no lists"));
        return queries.sessions.list(tenant, request);
      },
    },
    async usage_daily(tenant, filter) {
      if (queries === undefined) throw new TroupeError(errorBody("unavailable", "no database is configured, so there are no reports"));
      return queries.usage_daily(tenant, filter);
    },
    definition: definitions.session,
    ...(oidc === undefined ? {} : { oidc }),
    key_use,
    random_bytes: (count) => runtime.random_bytes(count),
    master_keys: openMasterKeys(settings, log),
    ...(settings.TROUPE_WEBHOOK_KEY === undefined ? {} : { webhook_key: settings.TROUPE_WEBHOOK_KEY }),
    private_addresses: settings.TROUPE_PRIVATE_ADDRESSES === "allow",
    crowded: (tenant) => stored.refusal(tenant),
    requests_per_s: settings.TROUPE_GATEWAY_REQUESTS_PER_S,
    readiness,
    metrics,
    world,
    log,
    host,
    port: http_port,
  });
  log.info("gateway runs", { url: gateway.url });
  await runtime.asked_to_end;
  stored.stop();
  await edge?.close();
  await gateway.close();
  await key_use.stop();
  await locations.stop();
  await client.stop();
  await directory.stop();
  await database?.close();
  await bus.close();
  log.info("gateway ended");
  return 0;
}
