// guard: outlives a run of the tests by a moment. When its input closes, because the run ended or was killed, it ends every server whose
// record lies under the run's folder, and removes the folder.
import { existsSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { beganAt, sendSignal, until } from "../../deploy/local/server-process.ts";

const [run_directory] = process.argv.slice(2);
if (run_directory === undefined) throw new Error("usage: guard.ts RUN_DIRECTORY");
// A Ctrl-C is for the run; the guard ends when the run has.
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(signal, () => undefined);
process.stdin.resume();
process.stdin.once("close", () => void clearUp(run_directory));

async function clearUp(directory: string): Promise<void> {
  if (!existsSync(directory)) return;
  const records = readdirSync(directory, { recursive: true, encoding: "utf8" }).filter((name) => name.endsWith("server.json"));
  for (const name of records) {
    const record = JSON.parse(readFileSync(join(directory, name), "utf8")) as { pid: number; began: string };
    const lives = (): boolean => record.began !== "" && beganAt(record.pid) === record.began;
    if (!lives()) continue;
    sendSignal(record.pid, "SIGINT");
    if (!(await until(() => !lives(), 3_000))) sendSignal(record.pid, "SIGKILL");
  }
  rmSync(directory, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 });
}
