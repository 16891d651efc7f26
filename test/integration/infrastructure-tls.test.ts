// Goal:   our processes speak to broker and database under TLS when they are told to, with nobody else's, and show the broker a key instead of a
//         password; in the clear, with another authority, without their own certificate, with a wrong or ended key they do not get in.
// Method: an authority made here; a real nats-server with TLS for both ends, with nkeys in its file and with accounts as JWTs; Postgres behind a front
//         that speaks its own way into TLS; our own command line and a supervisor as processes.
import { type ChildProcess, spawn } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { createServer, type AddressInfo, type Server, type Socket, connect as dial } from "node:net";
import { join } from "node:path";
import { TLSSocket } from "node:tls";
import { createAccount, createOperator, createUser, encodeAccount, encodeOperator, encodeUser, fmtCreds } from "@nats-io/jwt";
import { beforeAll, describe, expect, test } from "vitest";
import { connectJetStream } from "../../bus/jetstream.ts";
import type { LinkTls } from "../../bus/jetstream.ts";
import { natsConfig } from "../../deploy/local/nats.ts";
import { until } from "../../deploy/local/server-process.ts";
import { createDatabase } from "../../projections/database.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld } from "../../roles/real-world.ts";
import { type Authority, type CertificateFiles, createAuthority } from "../harness/certificates.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase, freshFolder, natsServerOf } from "../harness/servers.ts";

const MAIN = join(import.meta.dirname, "..", "..", "main.ts");
const login = (user: string): { user: string; password: string } => ({ user, password: `password-of-${user}` });
const decoder = new TextDecoder();

let folder = "";
let authority: Authority;
let stranger: Authority;
let ours: CertificateFiles;
let broker: CertificateFiles;

beforeAll(() => {
  folder = freshFolder("tls");
  authority = createAuthority(folder, "authority");
  stranger = createAuthority(folder, "stranger");
  ours = authority.issue("troupe");
  broker = authority.issue("broker");
});

/** A broker with this configuration; the port is the client's. */
async function serve(name: string, text: (ports: { port: number; monitor_port: number; home: string }) => string): Promise<number> {
  const home = join(folder, name);
  const { port } = await natsServerOf(home, (ports) => text({ ...ports, home }));
  return port;
}

const tlsFiles = (from: Authority, { cert_file, key_file }: Partial<CertificateFiles> = {}): LinkTls => ({
  ca_file: from.ca_file,
  ...(cert_file === undefined || key_file === undefined ? {} : { cert_file, key_file }),
});

interface Shown {
  readonly user?: string;
  readonly password?: string;
  readonly creds_file?: string;
  readonly tls?: LinkTls;
}

/** Opens the bus and has a message stored and read; or says why not. */
async function speak(port: number, shown: Shown, first_connection_patience_ms = 20_000): Promise<string> {
  try {
    const bus = await connectJetStream({
      servers: `127.0.0.1:${port}`,
      ...shown,
      name: "test",
      shards: 1,
      replicas: 1,
      lease_ttl_ms: 5_000,
      first_connection_patience_ms,
      log: silentLog,
      world: realWorld(),
    });
    try {
      const bucket = bus.bucket("EDGE");
      const key = `k${Date.now()}`;
      await bucket.create(key, new TextEncoder().encode("kept"));
      return decoder.decode((await bucket.all()).find((one) => one.key === key)?.value);
    } finally {
      await bus.close();
    }
  } catch (error) {
    const said = error instanceof Error ? `${error.message}: ${error.cause instanceof Error ? error.cause.message : ""}` : String(error);
    return `refused: ${said}`;
  }
}

/** Our program with this environment, and nothing else of ours in it. */
function run(args: readonly string[], env: Readonly<Record<string, string>>): ChildProcess & { said(): string; readonly exit: Promise<number | null> } {
  const child = spawn(process.execPath, [MAIN, ...args], {
    env: { PATH: process.env.PATH ?? "", TROUPE_HOME: join(folder, "home"), ...env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let text = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data: Buffer) => (text += data.toString()));
  atEndOfFile(async () => void child.kill("SIGKILL"));
  const exit = new Promise<number | null>((resolve) => child.once("close", (code) => resolve(code)));
  return Object.assign(child, { said: () => text, exit });
}

describe("a broker that asks for certificates, with nkeys in its file", () => {
  let port = 0;
  let seed_file = "";
  beforeAll(async () => {
    const key = createUser();
    seed_file = join(folder, "runtime.nk");
    writeFileSync(seed_file, `${decoder.decode(key.getSeed())}\n`, { mode: 0o600 });
    port = await serve("nkeys", ({ home, ...ports }) =>
      natsConfig({
        ...ports,
        store_directory: join(home, "jetstream"),
        log_file: join(home, "log"),
        operator: login("operator"),
        runtime: login("runtime"),
        system: login("system"),
        tenants: [],
        edge_accounts: 1,
        tls: { ...broker, ca_file: authority.ca_file },
      }).replace("jetstream: enabled\n    users: [", `jetstream: enabled\n    users: [\n      { nkey: ${key.getPublicKey()} }`),
    );
  }, 90_000);

  test("the bus opens under TLS with a password and with an nkey, and what is stored is read", async () => {
    expect(await speak(port, { ...login("runtime"), tls: tlsFiles(authority, ours) })).toBe("kept");
    expect(await speak(port, { creds_file: seed_file, tls: tlsFiles(authority, ours) })).toBe("kept");
  });

  test("in the clear, with another authority, without a certificate or with a stranger's, nobody gets in", async () => {
    const attempts: Shown[] = [
      login("runtime"),
      { ...login("runtime"), tls: tlsFiles(stranger, ours) },
      { ...login("runtime"), tls: tlsFiles(authority) },
      { ...login("runtime"), tls: tlsFiles(authority, stranger.issue("troupe")) },
    ];
    for (const said of await Promise.all(attempts.map((attempt) => speak(port, attempt, 1_500)))) expect(said).toMatch(/^refused: cannot connect/);
  }, 90_000);

  test("a wrong password, another nkey and a file without a key are refused", async () => {
    const tls = tlsFiles(authority, ours);
    const other = join(folder, "other.nk");
    writeFileSync(other, decoder.decode(createUser().getSeed()));
    const empty = join(folder, "empty.nk");
    writeFileSync(empty, "nothing of the kind\n");
    expect(await speak(port, { user: "runtime", password: "wrong", tls })).toMatch(/Authorization/i);
    expect(await speak(port, { creds_file: other, tls })).toMatch(/Authorization/i);
    expect(await speak(port, { creds_file: empty, tls })).toMatch(/^refused/);
    expect(await speak(port, { creds_file: join(folder, "none.nk"), tls })).toMatch(/ENOENT/);
  }, 90_000);

  test("our own processes read it off their environment: the command line gets in with a key and is told off without the authority", async () => {
    const env = {
      TROUPE_NATS_URL: `nats://127.0.0.1:${port}`,
      TROUPE_NATS_TLS_CA: authority.ca_file,
      TROUPE_NATS_TLS_CERT: ours.cert_file,
      TROUPE_NATS_TLS_KEY: ours.key_file,
      TROUPE_NATS_CREDS: seed_file,
    };
    const known = run(["workers", "--json"], env);
    const { TROUPE_NATS_TLS_CA: _, ...without } = env;
    const strange = run(["workers", "--json"], { ...without, TROUPE_NATS_TLS_CA: stranger.ca_file });
    const clear = run(["workers", "--json"], { TROUPE_NATS_URL: env.TROUPE_NATS_URL, TROUPE_NATS_CREDS: seed_file });
    expect([await known.exit, await strange.exit, await clear.exit], known.said()).toEqual([0, 3, 3]);
    expect(JSON.parse(known.said())).toMatchObject({ workers: [] });
  }, 120_000);
});

test("where accounts are JWTs, a supervisor comes in with its credentials, leads and watches connections; ended ones and those of another operator do not count", async () => {
  const [operator, account, system, usurper] = [createOperator(), createAccount(), createAccount(), createAccount()];
  const limits = { mem_storage: -1, disk_storage: -1, streams: -1, consumer: -1 };
  const unlimited = { subs: -1, data: -1, payload: -1, imports: -1, exports: -1, conn: -1, leaf: -1, wildcards: true };
  const accounts = {
    [account.getPublicKey()]: await encodeAccount("RT", account, { limits: { ...unlimited, ...limits } }, { signer: operator }),
    [system.getPublicKey()]: await encodeAccount("SYS", system, { limits: unlimited }, { signer: operator }),
  };
  const statement = await encodeOperator("troupe", operator, { system_account: system.getPublicKey() });
  const port = await serve(
    "jwt",
    ({ home, ...ports }) => `listen: "127.0.0.1:${ports.port}"
http: "127.0.0.1:${ports.monitor_port}"
max_payload: 4MB
jetstream { store_dir: ${JSON.stringify(join(home, "jetstream"))}, sync_interval: always }
tls { cert_file: ${JSON.stringify(broker.cert_file)}, key_file: ${JSON.stringify(broker.key_file)} }
operator: ${statement}
resolver: MEMORY
resolver_preload: { ${Object.entries(accounts)
      .map(([key, jwt]) => `${key}: ${jwt}`)
      .join(", ")} }
`,
  );
  const creds = async (name: string, issuer: typeof account, exp?: number): Promise<string> => {
    const user = createUser();
    const file = join(folder, `${name}.creds`);
    const token = await encodeUser(name, user, issuer, {}, exp === undefined ? {} : { exp });
    writeFileSync(file, fmtCreds(token, user), { mode: 0o600 });
    return file;
  };
  const tls = tlsFiles(authority);
  const runtime = await creds("runtime", account);
  expect(await speak(port, { creds_file: runtime, tls })).toBe("kept");
  expect(await speak(port, { creds_file: await creds("ended", account, Math.floor(Date.now() / 1000) - 60), tls })).toMatch(/Authorization|expired/i);
  expect(await speak(port, { creds_file: await creds("usurper", usurper), tls })).toMatch(/Authorization/i);
  expect(await speak(port, { tls })).toMatch(/Authorization/i);

  const supervisor = run(["supervisor"], {
    TROUPE_NATS_URL: `nats://127.0.0.1:${port}`,
    TROUPE_NATS_TLS_CA: authority.ca_file,
    TROUPE_NATS_CREDS: runtime,
    TROUPE_NATS_SYSTEM_CREDS: await creds("watcher", system),
    TROUPE_NATS_ACCOUNT: account.getPublicKey(),
    TROUPE_SHARDS: "1",
    TROUPE_LOG_LEVEL: "debug",
  });
  const urlOf = (): string | undefined => /"http":"(http:[^"]+)"/.exec(supervisor.said())?.[1];
  expect(await until(() => urlOf() !== undefined, 60_000, 50), supervisor.said()).toBe(true);
  const leads = async (): Promise<boolean> => /^troupe_leading\{[^}]*\} 1$/m.test(await (await fetch(`${urlOf()}/metrics`)).text());
  expect(await until(leads, 60_000, 100), supervisor.said()).toBe(true);
  expect(supervisor.said()).not.toContain("no login of the broker's system account");
  supervisor.kill("SIGTERM");
  expect(await supervisor.exit).toBe(0);
}, 120_000);

describe("a database behind TLS", () => {
  const SSL_REQUEST = 80_877_103;
  let front: Server;
  let url: URL;
  let in_clear = 0;
  let encrypted = 0;

  beforeAll(async () => {
    const fresh = await freshDatabase();
    url = new URL(fresh.url);
    const [host, port] = [url.hostname, Number(url.port)];
    const own = authority.issue("postgres");
    const files = { key: readFileSync(own.key_file), cert: readFileSync(own.cert_file) };
    // Postgres asks for TLS with eight bytes of its own, and answers with one letter.
    front = createServer((socket: Socket) => {
      socket.on("error", () => undefined);
      socket.once("data", (first) => {
        if (first.length !== 8 || first.readInt32BE(4) !== SSL_REQUEST) {
          in_clear += 1;
          socket.destroy();
          return;
        }
        socket.write("S");
        const secured = new TLSSocket(socket, { isServer: true, ...files });
        const behind = dial(port, host);
        for (const one of [secured, behind]) one.on("error", () => void (secured.destroy(), behind.destroy()));
        secured.once("secure", () => (encrypted += 1));
        secured.pipe(behind).pipe(secured);
      });
    });
    front.listen(0, "127.0.0.1");
    await until(() => front.listening, 30_000);
    atEndOfFile(async () => void front.close());
    url.port = String((front.address() as AddressInfo).port);
  });

  const asks = async (parameters: Readonly<Record<string, string>>): Promise<string> => {
    const asked = new URL(url);
    for (const [name, value] of Object.entries(parameters)) asked.searchParams.set(name, value);
    const database = createDatabase({ url: asked.href, application_name: "test", log: silentLog });
    try {
      const [row] = await database.query<{ word: string }>("select 'read' as word");
      return row?.word ?? "";
    } catch (error) {
      return `refused: ${error instanceof Error ? error.message : String(error)}`;
    } finally {
      await database.close();
    }
  };

  test("what the URL says of TLS is done: rows come encrypted, from a database that the authority vouches for", async () => {
    expect(await asks({ sslmode: "verify-full", sslrootcert: authority.ca_file })).toBe("read");
    expect([encrypted, in_clear]).toEqual([1, 0]);
  });

  test("a database that another authority vouches for, or nobody, is not believed; without the word TLS is not spoken", async () => {
    expect(await asks({ sslmode: "verify-full", sslrootcert: stranger.ca_file })).toMatch(/^refused: .*(certificate|self-signed|verify)/i);
    expect(await asks({ sslmode: "verify-full" })).toMatch(/^refused: .*(certificate|self-signed|verify)/i);
    expect(in_clear).toBe(0);
    expect(await asks({})).toMatch(/^refused/);
    expect(in_clear).toBe(1);
  });

  test("the command line asks it under TLS as its environment says", async () => {
    const asked = new URL(url);
    asked.searchParams.set("sslmode", "verify-full");
    asked.searchParams.set("sslrootcert", authority.ca_file);
    const migrated = run(["migrate", "--json"], { TROUPE_POSTGRES_URL: asked.href });
    expect(await migrated.exit, migrated.said()).toBe(0);
    expect(JSON.parse(migrated.said())).toMatchObject({ applied: expect.arrayContaining(["0001_projections"]) });
    asked.searchParams.set("sslrootcert", stranger.ca_file);
    expect(await run(["migrate", "--json"], { TROUPE_POSTGRES_URL: asked.href }).exit).toBe(3);
  }, 120_000);
});
