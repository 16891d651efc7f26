// global-setup: once per run of vitest. Makes the run's folder, stands ready to start what the files share (only when a file asks for it,
// so that a run of pure tests starts nothing), and leaves a guard that clears up whatever way this process ends.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer } from "node:http";
import type { ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { chmodSync, mkdirSync, mkdtempSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { TestProject } from "vitest/node";
import { ensureNatsServer } from "../../deploy/local/nats-server.ts";
import { startLocalPostgres } from "../../deploy/local/postgres.ts";
import type { LocalPostgres } from "../../deploy/local/postgres.ts";

declare module "vitest" {
  export interface ProvidedContext {
    /** The run's folder: everything a test leaves on disk or starts is under it. */
    run_directory: string;
    /** Where the files ask for what they share. */
    harness_url: string;
  }
}

export default async function setup(project: TestProject): Promise<() => Promise<void>> {
  const run_directory = mkdtempSync(join(tmpdir(), "troupe-test-"));
  chmodSync(run_directory, 0o755); // Postgres may run as another user than ours
  const say = (line: string): void => console.log(`  ${line}`);

  // The guard lives until its input closes, which the system does for us even when we are killed.
  const guard = spawn(process.execPath, [join(import.meta.dirname, "guard.ts"), run_directory], { stdio: ["pipe", "inherit", "inherit"], detached: true });
  const guard_ended = once(guard, "exit");

  // Found or fetched now, so that processes which tests start find it in their environment. Where there is none, the tests that need it say why.
  const nats_server = ensureNatsServer({ env: process.env, say }).then((program) => program.path);
  await nats_server.then(
    (path) => (process.env.TROUPE_NATS_SERVER = path),
    () => undefined,
  );
  let postgres: Promise<LocalPostgres> | undefined;
  let empty_home: Promise<string> | undefined;
  const answers: Readonly<Record<string, () => Promise<string>>> = {
    "/nats-server": () => nats_server,
    "/postgres": async () => {
      postgres ??= startSharedPostgres(run_directory, say);
      return (await postgres).url;
    },
    "/empty-home": () => (empty_home ??= makeEmptyHome(run_directory, say)),
  };
  const harness = createServer((request, response) => void answer(answers[request.url ?? ""], response));
  harness.listen(0, "127.0.0.1");
  await once(harness, "listening");
  project.provide("run_directory", run_directory);
  project.provide("harness_url", `http://127.0.0.1:${(harness.address() as AddressInfo).port}`);

  return async () => {
    harness.closeAllConnections();
    harness.close();
    if (postgres !== undefined) await postgres.then((server) => server.stop()).catch(() => undefined); // it never started: the tests said so
    guard.stdin?.end();
    await guard_ended;
  };
}

async function answer(wanted: (() => Promise<string>) | undefined, response: ServerResponse): Promise<void> {
  try {
    if (wanted === undefined) response.writeHead(404).end("the harness has no such thing");
    else response.writeHead(200).end(await wanted());
  } catch (error) {
    response.writeHead(500).end(error instanceof Error ? error.message : String(error));
  }
}

/** What `up` finds at its second start: a database without a table, and its password. A copy costs a tenth of making one. */
async function makeEmptyHome(run_directory: string, say: (line: string) => void): Promise<string> {
  const home = join(run_directory, "empty-home");
  mkdirSync(home, { recursive: true });
  await (await startLocalPostgres({ home, say })).stop();
  return home;
}

/** Its data is thrown away, so nothing is gained by waiting for the disk. */
function startSharedPostgres(run_directory: string, say: (line: string) => void): Promise<LocalPostgres> {
  const home = join(run_directory, "shared");
  mkdirSync(home, { recursive: true });
  return startLocalPostgres({ home, say, settings: { fsync: "off", synchronous_commit: "off", full_page_writes: "off" } });
}
