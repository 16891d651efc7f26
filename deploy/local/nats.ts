// nats: the broker of `npm start`: one nats-server on 127.0.0.1 with JetStream, its data in $TROUPE_HOME/nats.
//
// Accounts: SYS (the server's own events; supervisors listen there for $SYS.ACCOUNT.RT.DISCONNECT) and RT (the runtime: all streams).
// In RT the users `operator` and `runtime` may do what the runtime does; each tenant has a stand-in user `tenant-{id}` that may
// publish its own commands and listen to its own live subjects, and nothing else.
//
// Invariants:
//   N1. Every port listens on 127.0.0.1 only.
//   N2. What the broker acknowledged is on disk: `sync_interval: always`.
//   N3. The addresses stay the same over a restart, so clients find it again.
//   N4. The runtime's user cannot delete or purge the journals (stream EVENTS).
import { chmodSync, mkdirSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";
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

export interface LocalNatsOptions {
  /** $TROUPE_HOME, absolute. */
  readonly home: string;
  /** The nats-server to run, as ensureNatsServer answered it. */
  readonly binary: string;
  readonly tenants: readonly string[];
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
  const tenantLogin = (tenant: string): Login => login(`tenant-${tenant}`);

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
      tenants: tenants.map((tenant) => ({ tenant, login: tenantLogin(tenant) })),
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
    pid: () => server?.pid ?? 0,
    tenantLogin,
    async setTenants(wanted) {
      if (tenants.length === wanted.length && wanted.every((tenant) => tenants.includes(tenant))) return;
      tenants = [...wanted];
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
  readonly tenants: readonly { readonly tenant: string; readonly login: Login }[];
}

export function natsConfig(config: NatsConfig): string {
  const quoted = (text: string): string => JSON.stringify(text);
  const user = (login: Login, permissions = ""): string => `      { user: ${quoted(login.user)}, password: ${quoted(login.password)}${permissions} }`;
  const journals_are_kept = ["DELETE", "PURGE", "MSG.DELETE"].map((verb) => quoted(`$JS.API.STREAM.${verb}.EVENTS`)).join(", "); // N4
  const users = [
    user(config.operator),
    user(config.runtime, `, permissions: { publish: { allow: [">"], deny: [${journals_are_kept}] } }`),
    ...config.tenants.map(({ tenant, login }) => user(login, `, permissions: { ${tenantPermissions(tenant)} }`)),
  ];
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
system_account: SYS
accounts {
  SYS {
    users: [
${user(config.system)}
    ]
  }
  RT {
    jetstream: enabled
    users: [
${users.join("\n")}
    ]
  }
}
`;
}

/** All that a tenant may do on the bus. A tenant's id has no character that means anything to the broker. */
function tenantPermissions(tenant: string): string {
  const list = (subjects: readonly string[]): string => `[${subjects.map((subject) => JSON.stringify(subject)).join(", ")}]`;
  const publish = [`tenant.${tenant}.session.*.command`, `tenant.${tenant}.workflow.*.command`, `tenant.${tenant}.replay`];
  const subscribe = [`live.tenant.${tenant}.>`, `_INBOX_${tenant}.>`];
  return `publish: { allow: ${list(publish)} }, subscribe: { allow: ${list(subscribe)} }`;
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
