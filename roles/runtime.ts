// runtime: what every process of ours is made of: its settings, its connection to the bus, its log, its metrics, its end.
import type { Bus } from "../bus/port.ts";
import { type ConnectionWatch, lifelineName } from "../bus/connection-watch.ts";
import { connectJetStream, type LinkTls } from "../bus/jetstream.ts";
import { holdLifeline, watchConnections } from "../bus/jetstream-system.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import type { Tracing } from "../telemetry/tracing.ts";
import type { Settings } from "./settings.ts";

export interface Runtime {
  readonly world: World;
  readonly log: Log;
  readonly settings: Settings;
  readonly metrics: Metrics;
  readonly tracing: Tracing;
  /** Resolves with the first signal that asks the process to end: `drain` (SIGTERM) or `quick` (SIGINT). */
  readonly asked_to_end: Promise<"drain" | "quick">;
  /** Unguessable bytes. */
  random_bytes(count: number): Uint8Array;
}

/** `first_connection_patience_ms`: how long the first connection is tried for; a process that stands by can wait longer than a person. */
export function connect(
  runtime: Runtime,
  name: string,
  { ensure = true, first_connection_patience_ms }: { ensure?: boolean; first_connection_patience_ms?: number } = {},
): Promise<Bus> {
  const { settings, log, world, metrics } = runtime;
  return connectJetStream({
    on_commit: (appends) => metrics.observe("troupe_append_batch_size", {}, appends),
    servers: serversOf(settings),
    ...natsTls(settings),
    ...natsLogin(settings),
    name,
    shards: settings.TROUPE_SHARDS,
    replicas: settings.TROUPE_REPLICAS,
    lease_ttl_ms: settings.TROUPE_LEASE_TTL_MS,
    log,
    world,
    ensure,
    ...(first_connection_patience_ms === undefined ? {} : { first_connection_patience_ms }),
  });
}

export const serversOf = ({ TROUPE_NATS_URL }: Settings): string => TROUPE_NATS_URL ?? "nats://127.0.0.1:4222";

/** How the broker knows this process. */
function natsLogin({ TROUPE_NATS_USER: user, TROUPE_NATS_PASSWORD: password, TROUPE_NATS_CREDS: creds_file }: Settings): {
  user?: string;
  password?: string;
  creds_file?: string;
} {
  if (creds_file !== undefined) return { creds_file };
  return { ...(user === undefined ? {} : { user }), ...(password === undefined ? {} : { password }) };
}

/** How the broker is known to be the broker; nothing where it is spoken to in the clear. */
export function natsTls({ TROUPE_NATS_TLS_CA: ca_file, TROUPE_NATS_TLS_CERT: cert_file, TROUPE_NATS_TLS_KEY: key_file }: Settings): { tls?: LinkTls } {
  const tls: LinkTls = {
    ...(ca_file === undefined ? {} : { ca_file }),
    ...(cert_file === undefined ? {} : { cert_file }),
    ...(key_file === undefined ? {} : { key_file }),
  };
  return Object.keys(tls).length === 0 ? {} : { tls };
}

/** The second, idle connection of a process whose main one is called `name`. */
export function lifeline({ settings, log, world }: Runtime, name: string): Promise<{ close(): Promise<void> }> {
  return holdLifeline({
    servers: serversOf(settings),
    ...natsTls(settings),
    ...natsLogin(settings),
    name: lifelineName(name),
    log,
    world,
  });
}

/** Undefined when this process has no login of the system account. */
export async function connectionWatch({ settings, log, world }: Runtime, name: string): Promise<ConnectionWatch | undefined> {
  const { TROUPE_NATS_SYSTEM_USER: user, TROUPE_NATS_SYSTEM_PASSWORD: password = "", TROUPE_NATS_SYSTEM_CREDS: creds_file } = settings;
  if (user === undefined && creds_file === undefined) return undefined;
  const login = creds_file === undefined ? { ...(user === undefined ? {} : { user }), password } : { creds_file };
  return watchConnections({ servers: serversOf(settings), ...natsTls(settings), ...login, account: settings.TROUPE_NATS_ACCOUNT, name, log, world });
}

/** Keeps the gauge of the bus true. */
export function observeBus(bus: Bus, metrics: Metrics): void {
  metrics.set("troupe_bus_connected", {}, bus.state === "connected" ? 1 : 0);
  bus.on_state((state) => metrics.set("troupe_bus_connected", {}, state === "connected" ? 1 : 0));
}
