// chaos-brokers: the brokers that chaos kills: one nats-server, or three that form a cluster on 127.0.0.1, each a process of its own with
// the accounts and settings of `npm start`.
//
//   startBrokers(1 | 3) ──▶ every node ready ──kill9 / start, node by node──▶ … ──stop──▶ none left
//
// Invariants:
//   B1. Addresses and data of a node stay the same over its death, so that clients and the other nodes find it again.
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Login, natsConfig } from "../deploy/local/nats.ts";
import { localSecrets } from "../deploy/local/secrets.ts";
import { freePort, logTail, type ServerProcess, startServer, until } from "../deploy/local/server-process.ts";

/** Three nodes elect within some seconds, on a busy machine within some more. */
const READY_PATIENCE_MS = 40_000;
const STOP_PATIENCE_MS = 10_000;

export interface BrokerNode {
  readonly name: string;
  readonly url: string;
  readonly monitor_url: string;
  pid(): number;
  running(): boolean;
  /** Answers when it is gone. */
  kill9(): Promise<void>;
  /** Answers when it is ready. */
  start(): Promise<void>;
}

export interface Brokers {
  /** All nodes, as clients take it. */
  readonly url: string;
  readonly nodes: readonly BrokerNode[];
  readonly account: "RT";
  readonly operator: Login;
  readonly runtime: Login;
  readonly system: Login;
  tenantLogin(tenant: string): Login;
  stop(): Promise<void>;
}

export interface BrokersOptions {
  readonly home: string;
  readonly program: string;
  readonly count: 1 | 3;
  readonly tenant: string;
}

export async function startBrokers({ home, program, count, tenant }: BrokersOptions): Promise<Brokers> {
  const secrets = localSecrets(home);
  const login = (user: string): Login => ({ user, password: secrets.of(`nats.${user}`) });
  const names = Array.from({ length: count }, (_, index) => `n${index + 1}`);
  const ports = await Promise.all(names.map(async () => ({ port: await freePort(), monitor_port: await freePort(), route_port: await freePort() })));
  const routes = ports.map(({ route_port }) => `"nats://127.0.0.1:${route_port}"`).join(", ");
  const nodes = names.map((name, index) => brokerNode(name, ports[index]!));

  function brokerNode(name: string, { port, monitor_port, route_port }: { port: number; monitor_port: number; route_port: number }): BrokerNode {
    const directory = join(home, name);
    const log_file = join(directory, "nats-server.log");
    const config_file = join(directory, "nats-server.conf");
    mkdirSync(directory, { recursive: true, mode: 0o700 });
    const config = natsConfig({
      port,
      monitor_port,
      store_directory: join(directory, "jetstream"),
      log_file,
      operator: login("operator"),
      runtime: login("runtime"),
      system: login("system"),
      tenants: [{ tenant, login: login(`tenant-${tenant}`) }],
    });
    const named = config.replace(/^server_name: .*$/m, `server_name: "${name}"`);
    const cluster = count === 1 ? "" : `cluster {\n  name: "chaos"\n  listen: "127.0.0.1:${route_port}"\n  routes: [${routes}]\n}\n`;
    writeFileSync(config_file, named + cluster, { mode: 0o600 });
    let server: ServerProcess | undefined;
    const monitor_url = `http://127.0.0.1:${monitor_port}`;
    return {
      name,
      url: `nats://127.0.0.1:${port}`,
      monitor_url,
      pid: () => server?.pid ?? 0,
      running: () => server?.is_running() ?? false,
      async kill9() {
        await server?.stop("SIGKILL", STOP_PATIENCE_MS);
      },
      async start() {
        // B1
        const started = startServer({
          name: "nats-server",
          file: program,
          args: ["-c", config_file],
          cwd: directory,
          env: { PATH: "/usr/bin:/bin" },
          log_file,
          record_file: join(directory, "server.json"),
        });
        server = started;
        const ready = await until(async () => !started.is_running() || (await isHealthy(monitor_url)), READY_PATIENCE_MS);
        if (!ready || !started.is_running()) throw new Error(`broker ${name} did not become ready:\n${logTail(log_file)}`);
      },
    };
  }

  const stop = async (): Promise<void> => {
    await Promise.all(nodes.map((node) => node.kill9()));
  };
  try {
    await Promise.all(nodes.map((node) => node.start()));
  } catch (error) {
    await stop();
    throw error;
  }
  return {
    url: nodes.map((node) => node.url).join(","),
    nodes,
    account: "RT",
    operator: login("operator"),
    runtime: login("runtime"),
    system: login("system"),
    tenantLogin: (name) => login(`tenant-${name}`),
    stop,
  };
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
