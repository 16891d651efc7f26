// typed-command: a `troupe` command in the test's own process, against a Troupe that runs: the same words, the same answer and exit code, the same
// broker and database, without the start of a Node for each, which is most of what a command costs (a second and more where processors are slow).
//
// Troupe.cli starts the real process: what main.ts itself does (the environment, the streams, the exit code) is seen there. This is for all else.
import { randomBytes } from "node:crypto";
import { Readable } from "node:stream";
import { auditSubstrate } from "../../bus/jetstream.ts";
import { runCli } from "../../cli/run.ts";
import { createDatabase } from "../../projections/database.ts";
import { silentLog } from "../../protocol/log.ts";
import { commandLineMasterKeysFile, commandLineSettings } from "../../roles/command-line.ts";
import { addMasterKey, openMasterKeys } from "../../roles/master-keys.ts";
import { realWorld } from "../../roles/real-world.ts";
import { connect } from "../../roles/runtime.ts";
import { readSettings } from "../../roles/settings.ts";
import { createMetrics } from "../../telemetry/metrics.ts";
import { noTracing } from "../../telemetry/tracing.ts";
import type { CliOutcome, Troupe } from "./troupe.ts";

/** As Troupe.cli answers, also when the command was refused. */
export async function typed(
  troupe: Troupe,
  args: readonly string[],
  { stdin, env: more = {} }: { stdin?: string; env?: Readonly<Record<string, string>> } = {},
): Promise<CliOutcome> {
  const env = { ...troupe.env, ...more };
  const read = readSettings(env, troupe.home);
  if (read.kind === "invalid") throw new Error(`the environment cannot be used: ${read.faults.join("; ")}`);
  const settings = await commandLineSettings(read.settings);
  const world = realWorld();
  const log = silentLog;
  const random_bytes = (count: number): Uint8Array => randomBytes(count);
  const master_keys_file = commandLineMasterKeysFile(settings);
  const no_role = (): Promise<number> => Promise.reject(new Error("a role is a process of its own: Troupe.cli starts one"));
  let stdout = "";
  let stderr = "";
  const code = await runCli(args, {
    world,
    log,
    env,
    working_directory: troupe.home,
    stdin: Readable.from(stdin === undefined ? [] : [stdin]),
    stdout: { write: (text) => void (stdout += text) },
    stderr: { write: (text) => void (stderr += text) },
    node_version: process.version,
    random_bytes,
    fetch: (url, init) => fetch(url, init),
    on_interrupt: () => () => undefined,
    connectBus: () =>
      connect(
        { world, log, settings, tracing: noTracing, metrics: createMetrics("all"), asked_to_end: new Promise(() => undefined), random_bytes },
        "troupe-cli",
        { ensure: false, first_connection_patience_ms: 3_000 },
      ),
    login: async () => settings.TROUPE_NATS_USER ?? "nobody",
    master_keys: {
      read: () => openMasterKeys({ ...settings, TROUPE_MASTER_KEYS_FILE: master_keys_file }, log)(),
      add: () => addMasterKey(master_keys_file ?? "", random_bytes),
    },
    async openDatabase() {
      if (settings.TROUPE_POSTGRES_URL === undefined) throw new Error("no Postgres is configured");
      const database = createDatabase({ url: settings.TROUPE_POSTGRES_URL, application_name: "troupe-cli", log });
      await database.query("select 1");
      return database;
    },
    auditSubstrate,
    roles: { up: no_role, worker: no_role, supervisor: no_role, gateway: no_role, projector: no_role },
  });
  return { code, stdout, stderr };
}
