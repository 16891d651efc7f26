// main: the one place that makes real clocks, sockets and ids, and reads the environment. Everything else is given what it needs.
//
// Rooms are imported when they are needed: a worker does not wait for what only a gateway uses.
import { randomBytes } from "node:crypto";
import { fileURLToPath } from "node:url";
import type { CliPorts } from "./cli/ports.ts";
import { runCli } from "./cli/run.ts";
import { commandLineMasterKeysFile, commandLineSettings } from "./roles/command-line.ts";
import { addMasterKey, openMasterKeys } from "./roles/master-keys.ts";
import { realWorld } from "./roles/real-world.ts";
import { connect, type Runtime } from "./roles/runtime.ts";
import { readSettings } from "./roles/settings.ts";
import type { Log } from "./protocol/log.ts";
import { crashFields, secretsOf } from "./telemetry/crash.ts";
import { createLog } from "./telemetry/log.ts";
import { createMetrics, type Role } from "./telemetry/metrics.ts";
import { noTracing, startTracing, type Tracing } from "./telemetry/tracing.ts";

// Who reads our output may leave early (`troupe shards | head`): that ends us, and is no error.
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit(0);
});

// A report that Node writes for an operator shows the machine, not what this process was told.
if (process.report !== undefined) process.report.excludeEnv = true;

/** What nobody caught ends the process, as it would anyhow; what is said of it has no secret in it. */
function sayWhyItBroke(log: Log): void {
  process.on("uncaughtException", (error) => {
    log.error("the process broke", crashFields(error, secretsOf(process.env)));
    process.exit(1);
  });
}

const world = realWorld();
const read = readSettings(process.env, process.cwd());
if (read.kind === "invalid") {
  process.stderr.write(`The environment cannot be used:\n${read.faults.map((fault) => `  ${fault}\n`).join("")}`);
  process.exit(2);
}
const { settings } = read;

/** A person who typed a command is told that the broker is away, before the hand goes to Ctrl-C; long enough for one that is being restarted. */
const COMMAND_LINE_PATIENCE_MS = 3_000;

/** A role that has ended ends its process: its last words are said by then. */
const LAST_WORDS_MS = 500;

/** Ctrl-C reaches a process twice when its parent passes on what the terminal told them both: within this it is one wish. */
const SAME_SIGNAL_MS = 2_000;

/** The first signal asks to end; another one later ends at once. */
function askedToEnd(): Promise<"drain" | "quick"> {
  return new Promise((resolve) => {
    let first_ms: number | undefined;
    const hear = (signal: "SIGTERM" | "SIGINT", how: "drain" | "quick"): void => {
      process.on(signal, () => {
        first_ms ??= world.monotonic_ms();
        if (world.monotonic_ms() - first_ms > SAME_SIGNAL_MS) process.exit(130);
        resolve(how);
      });
    };
    hear("SIGTERM", "drain");
    hear("SIGINT", "quick");
    // `up` holds a line to each of its children: cut, it says that nobody is left who could ask.
    process.once("disconnect", () => resolve("quick"));
    process.channel?.unref();
  });
}

function runtimeOf(role: Role, id: string, tracing: Tracing = noTracing): Runtime {
  const log = createLog({ level: settings.TROUPE_LOG_LEVEL, fields: { role, id } });
  return { world, log, settings, tracing, metrics: createMetrics(role), asked_to_end: askedToEnd(), random_bytes: (count) => randomBytes(count) };
}

/** Runs a role to its end, with tracing when an endpoint is given. */
async function runRole(role: Role, id: string, run: (runtime: Runtime) => Promise<number>): Promise<number> {
  const log = createLog({ level: settings.TROUPE_LOG_LEVEL, fields: { role, id } });
  sayWhyItBroke(log);
  const tracing = await startTracing({ endpoint: settings.OTEL_EXPORTER_OTLP_ENDPOINT, service_name: `troupe-${role}`, instance: id, log });
  try {
    return await run(runtimeOf(role, id, tracing));
  } finally {
    await tracing.stop();
    endSoon();
  }
}

/**
 * What is still open by then (a timer of a call that was given up, a socket) must not keep a process that does nothing: whoever waits for its end, or
 * starts it again, would wait for that.
 */
function endSoon(): void {
  setTimeout(() => process.exit(), LAST_WORDS_MS).unref();
}

const fresh = (): string => world.id().slice(0, 8);

const log = createLog({ level: "warn", fields: { role: "cli" }, for_people: process.stderr.isTTY });
const commandLine = async (): Promise<Runtime> => ({
  world,
  log,
  settings: await commandLineSettings(settings),
  tracing: noTracing,
  metrics: createMetrics("all"),
  asked_to_end: new Promise(() => undefined),
  random_bytes: (count) => randomBytes(count),
});

/** What the environment says, else the file that `up` keeps. */
const commandLineMasterKeys: CliPorts["master_keys"] = {
  read() {
    const keys = openMasterKeys({ ...settings, TROUPE_MASTER_KEYS_FILE: commandLineMasterKeysFile(settings) }, log)();
    if (keys.length === 0) throw new Error("there are no master keys here: set TROUPE_MASTER_KEYS_FILE or TROUPE_MASTER_KEYS");
    return keys;
  },
  add() {
    const file = commandLineMasterKeysFile(settings);
    if (file === undefined) throw new Error("a master key is added to a file, and none is named here: set TROUPE_MASTER_KEYS_FILE");
    return addMasterKey(file, (count) => randomBytes(count));
  },
};

const ports: CliPorts = {
  world,
  log,
  env: process.env,
  working_directory: process.cwd(),
  stdin: process.stdin,
  stdout: process.stdout,
  stderr: process.stderr,
  node_version: process.version,
  random_bytes: (count) => randomBytes(count),
  fetch: (url, init) => fetch(url, init),
  on_interrupt(listener) {
    process.on("SIGINT", listener);
    process.on("SIGTERM", listener);
    return () => {
      process.off("SIGINT", listener);
      process.off("SIGTERM", listener);
    };
  },
  async connectBus() {
    return connect(await commandLine(), "troupe-cli", { ensure: false, first_connection_patience_ms: COMMAND_LINE_PATIENCE_MS });
  },
  async login() {
    return (await commandLineSettings(settings)).TROUPE_NATS_USER ?? "nobody";
  },
  master_keys: commandLineMasterKeys,
  async openDatabase() {
    const { TROUPE_POSTGRES_URL: url } = await commandLineSettings(settings);
    if (url === undefined) throw new Error("no Postgres is configured: TROUPE_POSTGRES_URL is not set and dev.json names none");
    const { createDatabase } = await import("./projections/database.ts");
    const database = createDatabase({ url, application_name: "troupe-cli", log });
    await database.query("select 1");
    return database;
  },
  async auditSubstrate(bus, options) {
    const { auditSubstrate } = await import("./bus/jetstream.ts");
    return auditSubstrate(bus, options);
  },
  roles: {
    async up({ port, workers, shards }) {
      sayWhyItBroke(log);
      const { runUp } = await import("./roles/up.ts");
      const say = (line: string): void => void process.stdout.write(`${line}\n`);
      return runUp(
        { ...runtimeOf("all", "up"), log },
        { port, workers, shards, program: process.execPath, main: fileURLToPath(import.meta.url), env: process.env, say },
      ).finally(endSoon);
    },
    async worker({ id = `w-${fresh()}`, http_port }) {
      const { runWorker } = await import("./roles/worker.ts");
      return runRole("worker", id, (runtime) => runWorker(runtime, { id, http_port }));
    },
    async supervisor({ id = `s-${fresh()}`, http_port }) {
      const { runSupervisor } = await import("./roles/supervisor.ts");
      return runRole("supervisor", id, (runtime) => runSupervisor(runtime, { id, http_port }));
    },
    async gateway({ id = `g-${fresh()}`, http_port, host }) {
      const { runGateway } = await import("./roles/gateway.ts");
      return runRole("gateway", id, (runtime) => runGateway(runtime, { id, http_port, host }));
    },
    async projector({ id = `p-${fresh()}`, http_port, rebuild }) {
      const { runProjector } = await import("./roles/projector.ts");
      return runRole("projector", id, (runtime) => runProjector(runtime, { id, http_port, rebuild }));
    },
  },
};

process.exitCode = await runCli(process.argv.slice(2), ports);
