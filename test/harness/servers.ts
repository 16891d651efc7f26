// servers: real brokers and databases for tests. Each ends with the test file that asked for it; a guard ends what a killed run left.
//
//   const nats = await freshNats();            // own nats-server, about 50 ms
//   const { url } = await freshDatabase();     // own empty database on the run's one Postgres, about 30 ms (the first asks for the server: 0.7 s)
//   const postgres = await freshPostgres();    // own Postgres, to be killed and restarted, about 0.7 s
import { execFile } from "node:child_process";
import { randomBytes } from "node:crypto";
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { promisify } from "node:util";
import pg from "pg";
import { inject } from "vitest";
import { startLocalNats } from "../../deploy/local/nats.ts";
import type { LocalNats } from "../../deploy/local/nats.ts";
import { startLocalPostgres } from "../../deploy/local/postgres.ts";
import type { LocalPostgres } from "../../deploy/local/postgres.ts";
import { freePort, startServer, until } from "../../deploy/local/server-process.ts";
import { atEndOfFile } from "./endings.ts";

const run = promisify(execFile);

export interface FreshNats extends LocalNats {
  /** Of the operator, who may do everything in the runtime's account. */
  readonly user: string;
  readonly password: string;
}

/** A nats-server of one's own, with the accounts and settings of `npm start`. */
export async function freshNats(options: { tenants?: readonly string[] } = {}): Promise<FreshNats> {
  const binary = await ask("/nats-server");
  const nats = await startLocalNats({ home: freshFolder("nats"), binary, tenants: options.tenants ?? [], say: () => undefined });
  atEndOfFile(() => nats.stop());
  return { ...nats, user: nats.operator.user, password: nats.operator.password };
}

/** A nats-server that runs by this configuration, in its own folder `home`, once it is healthy; throws what it wrote when it will not be. */
export async function natsServerOf(home: string, text: (ports: BrokerPorts) => string): Promise<BrokerPorts> {
  const ports = { port: await freePort(), monitor_port: await freePort() };
  const log_file = join(home, "log");
  mkdirSync(home, { recursive: true });
  writeFileSync(join(home, "nats.conf"), text(ports), { mode: 0o600 });
  const server = startServer({
    name: "nats-server",
    file: await natsServerProgram(),
    args: ["-c", join(home, "nats.conf")],
    cwd: home,
    env: {},
    log_file,
    record_file: join(home, "server.json"),
  });
  atEndOfFile(() => server.stop("SIGKILL", 5_000));
  const healthy = async (): Promise<boolean> =>
    fetch(`http://127.0.0.1:${ports.monitor_port}/healthz`).then(
      (answer) => answer.ok,
      () => false,
    );
  if (!(await until(healthy, 60_000, 20))) throw new Error(readFileSync(log_file, "utf8"));
  return ports;
}

export interface BrokerPorts {
  readonly port: number;
  readonly monitor_port: number;
}

/** The program of the run. */
export const natsServerProgram = (): Promise<string> => ask("/nats-server");

export interface FreshDatabase {
  /** Of the superuser, as `npm start` hands it out. */
  readonly url: string;
  drop(): Promise<void>;
}

/** An empty database on the Postgres that all files of this run share. */
export async function freshDatabase(): Promise<FreshDatabase> {
  const shared = await ask("/postgres");
  const name = `test_${randomBytes(6).toString("hex")}`;
  await onServer(shared, `CREATE DATABASE ${name}`);
  const url = new URL(shared);
  url.pathname = `/${name}`;
  const drop = (): Promise<void> => onServer(shared, `DROP DATABASE IF EXISTS ${name} WITH (FORCE)`);
  atEndOfFile(drop);
  return { url: url.href, drop };
}

/** A Postgres of one's own. */
export async function freshPostgres(): Promise<LocalPostgres> {
  const postgres = await startLocalPostgres({ home: await freshHome("postgres"), say: () => undefined });
  atEndOfFile(() => postgres.stop());
  return postgres;
}

/** A folder of one's own in which a database was made already, so that nobody waits for that. */
export async function freshHome(name: string): Promise<string> {
  const home = freshFolder(name);
  const empty = await ask("/empty-home");
  for (const part of ["secrets.json", "postgres"]) await run("cp", ["-a", join(empty, part), home]); // the data's owner is another user
  return home;
}

/** A folder of one's own under the run's; removed with it. */
export function freshFolder(name: string): string {
  const folder = mkdtempSync(join(inject("run_directory"), `${name}-`));
  chmodSync(folder, 0o755); // Postgres may run as another user than ours
  return folder;
}

async function onServer(url: string, sql: string): Promise<void> {
  const client = new pg.Client({ connectionString: url });
  await client.connect();
  try {
    await client.query(sql);
  } finally {
    await client.end();
  }
}

async function ask(path: string): Promise<string> {
  const answer = await fetch(new URL(path, inject("harness_url")), { signal: AbortSignal.timeout(180_000) });
  const text = await answer.text();
  if (!answer.ok) throw new Error(text);
  return text;
}
