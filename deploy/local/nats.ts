// nats: the broker of `npm start`: one nats-server on 127.0.0.1 with JetStream, its data in $TROUPE_HOME/nats.
//
// Accounts:
//   SYS          the server's own events; supervisors listen there for $SYS.ACCOUNT.RT.DISCONNECT, gateways list and end connections
//   RT           the runtime: all streams; the users `operator` and `runtime` may do what the runtime does
//   AUTH         where the broker asks the gateways about every login that this file does not have
//   EDGE_0 …     no stream, no JetStream, all alike: each tenant that comes onto the bus lives in one alone. Into RT lead session and workflow
//                commands and replay; out of RT come what is live and answers; permissions keep each client to what names its tenant
//
// Without AUTH (a broker alone, without gateways) the stand-in logins `tenant-{id}` stand in the file, each in an account of the edge.
//
// Invariants:
//   N1. Every port listens on 127.0.0.1 only.
//   N2. What the broker acknowledged is on disk: `sync_interval: always`.
//   N3. The addresses stay the same over a restart, so clients find it again.
//   N5. No account of a tenant's clients holds a stream or reaches JetStream's API, and two tenants never share one.
//   N4. The runtime's user cannot delete or purge the journals (stream EVENTS).
import { chmodSync, mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { standInPassword, standInUser } from "../../protocol/api-key.ts";
import { assert } from "../../protocol/assert.ts";
import { EDGE_ACCOUNTS_DEFAULT } from "../../protocol/limits.ts";
import {
  EDGE_KINDS,
  edgeCommandFilter,
  replaySubject,
  tenantCommandFilters,
  tenantInboxPrefix,
  tenantLiveFilter,
  tenantOwnLiveFilter,
} from "../../protocol/subjects.ts";
import { localSecrets } from "./secrets.ts";
import { SetupFault } from "./setup-fault.ts";
import { endLeftover, freePort, logTail, sendSignal, startServer, until } from "./server-process.ts";
import type { ServerProcess } from "./server-process.ts";

/** Room for a command of 1 MiB with its journal entry and headers, four times over. */
const PAYLOAD_MAX = "4MB";
const READY_PATIENCE_MS = 20_000;
/** A clean end flushes to disk; ten seconds is far above what was ever seen. */
const STOP_PATIENCE_MS = 10_000;
/** A free port can be taken by somebody else before the server binds it. */
const PORT_TRIES_MAX = 5;

export interface Login {
  readonly user: string;
  readonly password: string;
}

export interface BrokerAuth {
  readonly issuer: string;
  readonly exchange: string;
}

/** Files in PEM. With `ca_file` clients show a certificate too. */
export interface BrokerTls {
  readonly cert_file: string;
  readonly key_file: string;
  readonly ca_file?: string;
}

export interface LocalNatsOptions {
  /** $TROUPE_HOME, absolute. */
  readonly home: string;
  /** The nats-server to run, as ensureNatsServer answered it. */
  readonly binary: string;
  /** Whose stand-in logins the file has. With `auth` the gateways know them, and the file has none. */
  readonly tenants: readonly string[];
  /** Gateways answer for every login that the file does not have: the public halves of their keys (bus/jetstream-auth.ts). */
  readonly auth?: BrokerAuth;
  readonly port?: number;
  readonly monitor_port?: number;
  readonly say: (line: string) => void;
  /** Called when it ends though nobody asked it to. */
  readonly on_death?: (reason: string) => void;
}

export interface LocalNats {
  readonly url: string;
  readonly monitor_url: string;
  /** The account of the runtime, as monitoring and $SYS subjects name it. */
  readonly account: "RT";
  readonly operator: Login;
  readonly runtime: Login;
  /** In the system account: may listen to $SYS.>. */
  readonly system: Login;
  /** In AUTH: answers the broker's questions. */
  readonly authenticator: Login;
  /** In the system account: may list connections and end them, and nothing else. */
  readonly warden: Login;
  /** Who holds it can tell every stand-in's password. */
  readonly stand_in_secret: string;
  pid(): number;
  tenantLogin(tenant: string): Login;
  /** Lets exactly these tenants in, without a restart. Connections of the others stay; answers when the broker knows. */
  setTenants(tenants: readonly string[]): Promise<void>;
  /** Clean stop and start, same addresses. */
  restart(): Promise<void>;
  /** Starts it again after it died. */
  start(): Promise<void>;
  /** As a crash does: SIGKILL. Answers when it is gone; `on_death` is not called. */
  kill9(): Promise<void>;
  stop(): Promise<void>;
}

export async function startLocalNats(options: LocalNatsOptions): Promise<LocalNats> {
  const directory = join(options.home, "nats");
  mkdirSync(directory, { recursive: true, mode: 0o700 });
  const config_file = join(directory, "nats-server.conf");
  const log_file = join(directory, "nats-server.log");
  const record_file = join(directory, "server.json");
  const secrets = localSecrets(options.home);
  const login = (user: string): Login => ({ user, password: secrets.of(`nats.${user}`) });
  const stand_in_secret = secrets.of("nats.stand-in");
  const tenantLogin = (tenant: string): Login => ({ user: standInUser(tenant), password: standInPassword(stand_in_secret, tenant) });
  const { auth } = options;

  await endLeftover("nats-server", record_file, ["SIGTERM"], options.say);

  let tenants = [...options.tenants];
  let port = options.port ?? 0;
  let monitor_port = options.monitor_port ?? 0;
  let server: ServerProcess | undefined;
  let end_is_wanted = false;

  const writeConfig = (): void => {
    const text = natsConfig({
      port,
      monitor_port,
      store_directory: join(directory, "jetstream"),
      log_file,
      operator: login("operator"),
      runtime: login("runtime"),
      system: login("system"),
      ...(auth === undefined ? {} : { auth: { ...auth, authenticator: login("authenticator"), warden: login("warden") } }),
      tenants: auth === undefined ? tenants.map((tenant) => ({ tenant, login: tenantLogin(tenant) })) : [],
    });
    writeFileSync(`${config_file}.new`, text, { mode: 0o600 });
    chmodSync(`${config_file}.new`, 0o600);
    renameSync(`${config_file}.new`, config_file);
  };

  const launch = async (): Promise<"ready" | "port taken"> => {
    writeConfig();
    end_is_wanted = false;
    const started = startServer({
      name: "nats-server",
      file: options.binary,
      args: ["-c", config_file],
      cwd: directory,
      env: { PATH: "/usr/bin:/bin" },
      log_file,
      record_file,
    });
    server = started;
    const ready = await until(async () => !started.is_running() || (await isHealthy(`http://127.0.0.1:${monitor_port}`)), READY_PATIENCE_MS);
    if (ready && started.is_running()) {
      void started.ended.then((reason) => (end_is_wanted ? undefined : options.on_death?.(reason)));
      return "ready";
    }
    const tail = logTail(log_file);
    end_is_wanted = true;
    await started.stop("SIGTERM", STOP_PATIENCE_MS);
    if (/address already in use/i.test(tail.split("\n").slice(-6).join("\n"))) return "port taken";
    throw new SetupFault(`The broker did not become ready. The end of ${log_file}:\n${tail}`);
  };

  const start = async (): Promise<void> => {
    if (server?.is_running()) return;
    if ((await launch()) === "port taken")
      throw new SetupFault(
        `Port ${port} or ${monitor_port} on 127.0.0.1 is taken by another program; end it, or set TROUPE_NATS_PORT and TROUPE_NATS_MONITOR_PORT.`,
      );
  };

  for (let tries = 1; ; tries++) {
    port = options.port || (await freePort());
    monitor_port = options.monitor_port || (await freePort());
    if ((await launch()) === "ready") break;
    if (tries === PORT_TRIES_MAX || (options.port && options.monitor_port)) await start();
  }

  const stopServer = async (signal: NodeJS.Signals): Promise<void> => {
    end_is_wanted = true;
    await server?.stop(signal, STOP_PATIENCE_MS);
  };

  return {
    url: `nats://127.0.0.1:${port}`,
    monitor_url: `http://127.0.0.1:${monitor_port}`,
    account: "RT",
    operator: login("operator"),
    runtime: login("runtime"),
    system: login("system"),
    authenticator: login("authenticator"),
    warden: login("warden"),
    stand_in_secret,
    pid: () => server?.pid ?? 0,
    tenantLogin,
    async setTenants(wanted) {
      if (tenants.length === wanted.length && wanted.every((tenant) => tenants.includes(tenant))) return;
      tenants = [...wanted];
      if (auth !== undefined) return; // whoever is asked knows them
      writeConfig();
      if (server === undefined || !server.is_running()) return; // the next start reads it
      const monitor_url = `http://127.0.0.1:${monitor_port}`;
      const before = await configLoadedAt(monitor_url);
      sendSignal(server.pid, "SIGHUP");
      const reloaded = await until(async () => (await configLoadedAt(monitor_url)) !== before, 5_000);
      if (!reloaded) throw new Error(`the broker did not take its new configuration; the end of ${log_file}:\n${logTail(log_file)}`);
    },
    async restart() {
      await stopServer("SIGTERM");
      await start();
    },
    start,
    kill9: () => stopServer("SIGKILL"),
    stop: () => stopServer("SIGTERM"),
  };
}

interface NatsConfig {
  readonly port: number;
  readonly monitor_port: number;
  readonly store_directory: string;
  readonly log_file: string;
  readonly operator: Login;
  readonly runtime: Login;
  readonly system: Login;
  readonly auth?: BrokerAuth & { readonly authenticator: Login; readonly warden: Login };
  readonly tls?: BrokerTls;
  /** Tenants that can be on the bus. */
  readonly edge_accounts?: number;
  readonly tenants: readonly { readonly tenant: string; readonly login: Login }[];
}

const quoted = (text: string): string => JSON.stringify(text);
const list = (subjects: readonly string[]): string => `[${subjects.map(quoted).join(", ")}]`;

/** N4. */
const JOURNALS_ARE_KEPT = list(["DELETE", "PURGE", "MSG.DELETE"].map((verb) => `$JS.API.STREAM.${verb}.EVENTS`));

export function natsConfig(config: NatsConfig): string {
  const { auth, tls, edge_accounts = EDGE_ACCOUNTS_DEFAULT } = config;
  assert(config.tenants.length <= edge_accounts, "each tenant of the file has an account of the edge");
  const user = (login: Login, permissions = ""): string => `      { user: ${quoted(login.user)}, password: ${quoted(login.password)}${permissions} }`;
  const edges = Array.from({ length: edge_accounts }, (_, index) => {
    const stand_in = config.tenants[index];
    const users = stand_in === undefined ? "" : user(stand_in.login, `, permissions: { ${standInPermissions(stand_in.tenant)} }`).trim();
    return `  EDGE_${index} { users: [${users}], imports: [${EDGE_IMPORTS.join(", ")}] }`;
  });
  return `# Written by Troupe at every start; changes made here are lost.
server_name: "troupe-local"
listen: "127.0.0.1:${config.port}"
http: "127.0.0.1:${config.monitor_port}"
log_file: ${quoted(config.log_file)}
log_size_limit: 16MB
max_payload: ${PAYLOAD_MAX}
# A hung client is noticed in about ten seconds.
ping_interval: "5s"
ping_max: 2
jetstream {
  store_dir: ${quoted(config.store_directory)}
  sync_interval: always
}
${tls === undefined ? "" : tlsBlock(tls)}${auth === undefined ? "" : authBlock(config, auth)}system_account: SYS
accounts {
  SYS {
    users: [
${[user(config.system), ...(auth === undefined ? [] : [user(auth.warden, `, permissions: { ${WARDEN_PERMISSIONS} }`)])].join("\n")}
    ]
  }
${auth === undefined ? "" : `  AUTH {\n    users: [\n${user(auth.authenticator, `, permissions: { ${AUTHENTICATOR_PERMISSIONS} }`)}\n    ]\n  }\n`}  RT {
    jetstream: enabled
    users: [
${[user(config.operator), user(config.runtime, `, permissions: { publish: { allow: [">"], deny: ${JOURNALS_ARE_KEPT} } }`)].join("\n")}
    ]
    exports: [${RUNTIME_EXPORTS.join(", ")}]
  }
${edges.join("\n")}
}
`;
}

/**
 * What crosses between the runtime and the edge, and nothing else does. Answers cross without their `reply.` before them. A command arrives under a
 * subject of its own, so that the runtime knows what a tenant's client said from what was said with the runtime's credentials.
 */
const COMMANDS_CROSSING = EDGE_KINDS.map((kind) => ({ said: `tenant.*.${kind}.*.command`, arrives: edgeCommandFilter(kind) }));
const REPLAY_CROSSING = "tenant.*.replay";
const RUNTIME_EXPORTS = [
  ...COMMANDS_CROSSING.map(({ arrives }) => `{ service: ${quoted(arrives)} }`),
  `{ service: ${quoted(REPLAY_CROSSING)}, response_type: stream }`,
  `{ stream: "live.tenant.>" }`,
  `{ stream: "reply.>" }`,
];
const EDGE_IMPORTS = [
  ...COMMANDS_CROSSING.map(({ said, arrives }) => `{ service: { account: RT, subject: ${quoted(arrives)} }, to: ${quoted(said)} }`),
  `{ service: { account: RT, subject: ${quoted(REPLAY_CROSSING)} } }`,
  `{ stream: { account: RT, subject: "live.tenant.>" } }`,
  `{ stream: { account: RT, subject: "reply.>" }, to: ">" }`,
];

const AUTHENTICATOR_PERMISSIONS = `publish: { deny: [">"] }, subscribe: { allow: ["$SYS.REQ.USER.AUTH", "_INBOX.>"] }, allow_responses: { max: 1, expires: "10s" }`;
const WARDEN_PERMISSIONS = `publish: { allow: ["$SYS.REQ.SERVER.PING.CONNZ", "$SYS.REQ.SERVER.*.KICK"] }, subscribe: { allow: ["_INBOX_warden.>"] }`;

/** Logins of the file are believed as they stand (AUTH is the one account where they are not, and there the one login is named); all others are asked about. */
function authBlock({ operator, runtime, system }: NatsConfig, { issuer, exchange, authenticator, warden }: NatsConfig["auth"] & object): string {
  const known = list([authenticator, warden, operator, runtime, system].map(({ user }) => user));
  return `authorization {
  timeout: 5
  auth_callout { issuer: ${issuer}, xkey: ${exchange}, account: AUTH, auth_users: ${known}, allowed_accounts: [AUTH] }
}
`;
}

function tlsBlock({ cert_file, key_file, ca_file }: BrokerTls): string {
  const authority = ca_file === undefined ? "" : `\n  ca_file: ${quoted(ca_file)}\n  verify: true`;
  return `tls {\n  cert_file: ${quoted(cert_file)}\n  key_file: ${quoted(key_file)}${authority}\n}\n`;
}

/** All that a stand-in may do on the bus: what a key without listed scopes may. A tenant's id has no character that means anything to the broker. */
function standInPermissions(tenant: string): string {
  const publish = [...tenantCommandFilters(tenant), replaySubject(tenant)];
  const subscribe = `allow: ${list([tenantLiveFilter(tenant), `${tenantInboxPrefix(tenant)}>`])}, deny: ${list([tenantOwnLiveFilter(tenant)])}`;
  return `publish: { allow: ${list(publish)} }, subscribe: { ${subscribe} }`;
}

/**
 * The broker's account of a cell that one tenant has to itself: the runtime's logins of that cell, and the tenant's own, which has all of JetStream
 * in there but the journals' deletion. The cell's workers, supervisors and gateways are started with the runtime's login and know of no
 * other tenant; nothing leads from this account to another (docs/security.md).
 */
export function dedicatedCellAccount(cell: {
  readonly name: string;
  readonly operator: Login;
  readonly runtime: Login;
  readonly tenant: Login;
  readonly memory_bytes: number;
  readonly file_bytes: number;
}): string {
  const user = (login: Login, permissions = ""): string => `      { user: ${quoted(login.user)}, password: ${quoted(login.password)}${permissions} }`;
  const keeps_journals = `, permissions: { publish: { allow: [">"], deny: ${JOURNALS_ARE_KEPT} } }`;
  return `  ${cell.name} {
    jetstream { max_mem: ${cell.memory_bytes}, max_file: ${cell.file_bytes} }
    users: [
${[user(cell.operator), user(cell.runtime, keeps_journals), user(cell.tenant, keeps_journals)].join("\n")}
    ]
  }
`;
}

async function isHealthy(monitor_url: string): Promise<boolean> {
  try {
    const answer = await fetch(`${monitor_url}/healthz`, { signal: AbortSignal.timeout(2_000) });
    await answer.body?.cancel();
    return answer.status === 200;
  } catch {
    return false; // not listening yet
  }
}

async function configLoadedAt(monitor_url: string): Promise<string> {
  const answer = await fetch(`${monitor_url}/varz`, { signal: AbortSignal.timeout(5_000) });
  return ((await answer.json()) as { config_load_time: string }).config_load_time;
}
