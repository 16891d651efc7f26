// edge: a gateway's part in who may come onto the bus: it answers the broker's questions about logins, and shows out who may not stay.
//
// It stands where the broker was configured to ask (TROUPE_NATS_AUTH_*); without that, tenants have HTTP alone.
import type { Directory } from "../actors/directory.ts";
import { answerAuth } from "../bus/jetstream-auth.ts";
import { openWarden, type Warden } from "../bus/jetstream-warden.ts";
import type { Bus } from "../bus/port.ts";
import { createEdgeAccounts } from "../gateway/edge-accounts.ts";
import { createNatsAuth, keepOutWhoMayNotStay } from "../gateway/nats-auth.ts";
import type { KeyUse } from "../actors/key-use.ts";
import type { Oidc } from "../gateway/oidc.ts";
import type { Log } from "../protocol/log.ts";
import { natsTls, type Runtime, serversOf } from "./runtime.ts";

export async function openEdge(
  { settings, world, metrics }: Runtime,
  {
    id,
    bus,
    directory,
    oidc,
    key_use,
    crowded,
    log,
  }: {
    id: string;
    bus: Bus;
    directory: Directory;
    oidc: Oidc | undefined;
    key_use: KeyUse;
    crowded: (tenant: string) => boolean;
    log: Log;
  },
): Promise<{ admitAnew(tenant: string): Promise<void>; close(): Promise<void> } | undefined> {
  const {
    TROUPE_NATS_AUTH_USER: user,
    TROUPE_NATS_AUTH_PASSWORD: password,
    TROUPE_NATS_AUTH_ISSUER_SEED: issuer_seed,
    TROUPE_NATS_AUTH_EXCHANGE_SEED: exchange_seed,
  } = settings;
  if (user === undefined || issuer_seed === undefined || exchange_seed === undefined) {
    log.info("the broker is not configured to ask about logins: tenants have no way onto the bus but their own");
    return undefined;
  }
  const tenantOf = directory.tenant.bind(directory);
  const accounts = createEdgeAccounts({ bus, count: settings.TROUPE_NATS_EDGE_ACCOUNTS });
  const broker = { servers: serversOf(settings), log, world, ...natsTls(settings) };
  const stand_in_secret = settings.TROUPE_NATS_STAND_IN_SECRET;
  const decide = createNatsAuth({
    tenantOf,
    now_ms: () => world.now_ms(),
    accounts,
    metrics,
    log,
    crowded,
    key_used: (tenant, key_id) => key_use.used(tenant, key_id),
    ...(oidc === undefined ? {} : { oidc }),
    ...(stand_in_secret === undefined ? {} : { stand_in_secret }),
  });
  const answering = await answerAuth(
    { ...broker, user, ...(password === undefined ? {} : { password }), issuer_seed, exchange_seed, name: `gateway-${id}-auth` },
    decide,
  );

  let warden: Warden | undefined;
  let keeping: ReturnType<typeof keepOutWhoMayNotStay> | undefined;
  const { TROUPE_NATS_WARDEN_USER: warden_user, TROUPE_NATS_WARDEN_PASSWORD: warden_password } = settings;
  if (warden_user === undefined) log.warn("no login of the broker's system account: a revoked key keeps its connections until their token ends");
  else {
    warden = await openWarden({
      ...broker,
      user: warden_user,
      ...(warden_password === undefined ? {} : { password: warden_password }),
      name: `gateway-${id}-warden`,
    });
    keeping = keepOutWhoMayNotStay({ bus, tenantOf, accounts, warden, world, metrics, log });
  }
  return {
    async admitAnew(tenant) {
      await keeping?.admitAnew(tenant);
    },
    async close() {
      await keeping?.stop();
      await Promise.all([answering.close(), warden?.close()]);
    },
  };
}
