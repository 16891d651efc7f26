// nats-server: a real broker for tests: free port, its own folder, fsync always, gone afterwards.
import { type ChildProcess, spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as sleep } from "node:timers/promises";
import { freePort } from "../../deploy/local/server-process.ts";

export interface NatsServer {
  readonly url: string;
  readonly monitor_url: string;
  /** Ends the process without a word, as a crash does, and starts it again on the same data. */
  restart(options?: { down_ms?: number }): Promise<void>;
  kill(): Promise<void>;
  start(): Promise<void>;
  /** Stops the process's clock, and lets it go on: a broker that hangs. */
  signal(signal: "SIGSTOP" | "SIGCONT"): void;
  stop(): Promise<void>;
}

const START_PATIENCE_MS = 60_000;

/** Starts a broker; `sync` false leaves the broker's default of two minutes, for tests of the audit. */
export async function startNatsServer(options: { sync?: boolean; max_payload?: string } = {}): Promise<NatsServer> {
  const folder = mkdtempSync(join(tmpdir(), "troupe-nats-"));
  const [port, monitor_port] = [await freePort(), await freePort()];
  const config = join(folder, "nats.conf");
  writeFileSync(
    config,
    `listen: 127.0.0.1:${port}\nhttp: 127.0.0.1:${monitor_port}\nlog_file: "${folder}/log"\nmax_payload: ${options.max_payload ?? "4MB"}\n` +
      `jetstream { store_dir: "${folder}/js"${options.sync === false ? "" : "\n sync_interval: always"} }\n`,
  );
  let child: ChildProcess | undefined;
  const monitor_url = `http://127.0.0.1:${monitor_port}`;
  const server: NatsServer = {
    url: `nats://127.0.0.1:${port}`,
    monitor_url,
    async start() {
      const started = spawn(process.env["TROUPE_NATS_SERVER"] ?? "nats-server", ["-c", config], { stdio: "ignore" });
      child = started;
      let failure = "";
      started.once("error", (error) => (failure = error.message));
      const give_up_at = Date.now() + START_PATIENCE_MS;
      for (;;) {
        if (failure !== "" || started.exitCode !== null)
          throw new Error(`nats-server did not start: ${failure || readFileSync(join(folder, "log"), "utf8").slice(-2000)}`);
        const healthy = await fetch(`${monitor_url}/healthz`).then(
          (answer) => answer.ok,
          () => false,
        );
        if (healthy) return;
        if (Date.now() > give_up_at) throw new Error("nats-server is not healthy in time");
        await sleep(10);
      }
    },
    async kill() {
      const running = child;
      if (running === undefined || running.exitCode !== null || running.signalCode !== null) return;
      const gone = new Promise((resolve) => running.once("exit", resolve));
      running.kill("SIGKILL");
      await gone;
    },
    async restart(how = {}) {
      await server.kill();
      if (how.down_ms !== undefined) await sleep(how.down_ms);
      await server.start();
    },
    signal(signal) {
      child?.kill(signal);
    },
    async stop() {
      await server.kill();
      rmSync(folder, { recursive: true, force: true });
    },
  };
  await server.start().catch(async (error: unknown) => {
    await server.stop();
    throw error;
  });
  return server;
}
