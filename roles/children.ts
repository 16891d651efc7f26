// children: the processes of ours that `up` runs: each in its own process group, restarted when it dies, ended when `up` ends.
//
//   started ──dies unasked──▶ waiting (back-off) ──▶ started …   more than RESTARTS_MAX in RESTART_WINDOW_MS ──▶ given up, told
//
// A child ends by itself when `up` is killed: nobody would be left to end it, and its ports would be taken at the next start.
//
// Restart intensity: RESTARTS_MAX in a minute for one child. A child that dies oftener has a cause that starting it again does not mend.
import { type ChildProcess, spawn } from "node:child_process";
import { createWriteStream, mkdirSync, type WriteStream } from "node:fs";
import { join } from "node:path";
import type { World } from "../protocol/world.ts";

const RESTARTS_MAX = 20;
const RESTART_WINDOW_MS = 60_000;
const BACK_OFF_MS = [0, 100, 500, 1000, 2000] as const;
/** Where others of its role live they take its work over, in a fraction of a second; its next process would take the processors away from that. */
const OTHERS_FIRST_MS = 500;

export interface ChildSpec {
  readonly role: string;
  readonly id: string;
  readonly args: readonly string[];
  readonly env: Readonly<Record<string, string>>;
}

export interface Children {
  start(spec: ChildSpec): void;
  running(): { role: string; id: string; pid: number }[];
  /** Signals every child and resolves when all are gone; those that stay longer than the patience are killed. */
  stop(signal: NodeJS.Signals, patience_ms: number): Promise<void>;
}

export interface ChildrenOptions {
  readonly program: string;
  readonly main: string;
  readonly log_directory: string;
  readonly world: World;
  readonly say: (line: string) => void;
  readonly on_change: () => void;
  readonly on_given_up: (spec: ChildSpec) => void;
}

export function createChildren({ program, main, log_directory, world, say, on_change, on_given_up }: ChildrenOptions): Children {
  const live = new Map<string, { spec: ChildSpec; process: ChildProcess; ended: Promise<void> }>();
  const logs = new Map<string, WriteStream>();
  const deaths = new Map<string, number[]>();
  let stopping = false;
  mkdirSync(log_directory, { recursive: true });

  const nameOf = (spec: ChildSpec): string => `${spec.role}-${spec.id}`;

  function logOf(spec: ChildSpec): WriteStream {
    const name = nameOf(spec);
    const present = logs.get(name);
    if (present !== undefined) return present;
    const file = createWriteStream(join(log_directory, `${name}.log`), { flags: "a", mode: 0o600 });
    logs.set(name, file);
    return file;
  }

  function start(spec: ChildSpec): void {
    if (stopping) return;
    const name = nameOf(spec);
    // A process group of its own: Ctrl-C in the terminal reaches `up` alone, which ends the others in order.
    // The line (ipc) carries no word: that it is cut tells the child that `up` is gone, however that came about (main.ts).
    const child = spawn(program, [main, ...spec.args], { detached: true, stdio: ["ignore", "pipe", "pipe", "ipc"], env: { ...spec.env } });
    const log = logOf(spec);
    child.stdout?.on("data", (chunk: Buffer) => void log.write(chunk));
    child.stderr?.on("data", (chunk: Buffer) => void log.write(chunk));
    const ended = new Promise<void>((resolve) => {
      child.once("error", (error) => {
        say(`${name} could not be started: ${error.message}`);
        resolve();
      });
      child.once("exit", (code, signal) => {
        resolve();
        if (live.get(name)?.process !== child) return;
        live.delete(name);
        on_change();
        if (!stopping) again(spec, signal ?? `exit code ${code}`);
      });
    });
    live.set(name, { spec, process: child, ended });
    on_change();
  }

  function again(spec: ChildSpec, how: string): void {
    const name = nameOf(spec);
    const now_ms = world.monotonic_ms();
    const recent = [...(deaths.get(name) ?? []).filter((at_ms) => now_ms - at_ms < RESTART_WINDOW_MS), now_ms];
    deaths.set(name, recent);
    if (recent.length > RESTARTS_MAX) {
      say(`${name} ended ${recent.length} times within a minute (${how}); giving it up. Its log is in ${log_directory}`);
      on_given_up(spec);
      return;
    }
    say(`${name} ended (${how}); starting it again`);
    const back_off_ms = BACK_OFF_MS[Math.min(recent.length - 1, BACK_OFF_MS.length - 1)]!;
    const has_others = [...live.values()].some((other) => other.spec.role === spec.role);
    void world.after(has_others ? Math.max(OTHERS_FIRST_MS, back_off_ms) : back_off_ms, () => start(spec));
  }

  return {
    start,
    running: () =>
      [...live.values()].flatMap(({ spec, process: child }) => (child.pid === undefined ? [] : [{ role: spec.role, id: spec.id, pid: child.pid }])),
    async stop(signal, patience_ms) {
      stopping = true;
      const all = [...live.values()];
      for (const { process: child } of all) child.kill(signal);
      const cancel = world.after(patience_ms, () => {
        for (const { process: child } of all) if (child.exitCode === null && child.signalCode === null) child.kill("SIGKILL");
      });
      await Promise.all(all.map(({ ended }) => ended));
      cancel();
      for (const log of logs.values()) log.end();
    },
  };
}
