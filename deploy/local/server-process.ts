// server-process: a database or broker that runs beside us, from start to clean end; also the one that a killed predecessor left behind.
//
//   (nothing) ──start──▶ running ──stop──▶ ended
//        ▲                  │ we are killed: it runs on, and its record says whose it was
//        └──endLeftover─────┘
//
// The record is a small file: the server's pid and our own, each with the time its process began, so that a pid which the
// system gave to somebody else in between is never taken for ours.
//
// Invariants:
//   P1. No signal is sent to a process unless its pid and its beginning are the recorded ones.
//   P2. A server whose owner still lives is never touched: the second start refuses.
//   P3. Servers run in a process group of their own: a Ctrl-C at the terminal reaches us alone, and we stop them in our order.
import { spawn, spawnSync } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { randomInt } from "node:crypto";
import { closeSync, existsSync, openSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { SetupFault } from "./setup-fault.ts";

export interface ServerCommand {
  /** As people call it: "nats-server", "Postgres". */
  readonly name: string;
  readonly file: string;
  readonly args: readonly string[];
  readonly cwd: string;
  readonly env: NodeJS.ProcessEnv;
  readonly uid?: number;
  readonly gid?: number;
  /** Where its standard output and error go. */
  readonly log_file: string;
  readonly record_file: string;
}

export interface ServerProcess {
  readonly pid: number;
  /** Settles once, when it has ended, with the reason. */
  readonly ended: Promise<string>;
  is_running(): boolean;
  /** Asks with the first signal, insists with SIGKILL after `patience_ms`. Answers when it has ended. */
  stop(signal: NodeJS.Signals, patience_ms: number): Promise<void>;
}

interface ServerRecord {
  readonly pid: number;
  readonly began: string;
  readonly owner_pid: number;
  readonly owner_began: string;
}

export function startServer(command: ServerCommand): ServerProcess {
  const log = openSync(command.log_file, "a", 0o600);
  let child: ChildProcess;
  try {
    child = spawn(command.file, command.args, {
      cwd: command.cwd,
      env: command.env,
      stdio: ["ignore", log, log],
      detached: true, // P3
      ...(command.uid === undefined ? {} : { uid: command.uid }),
      ...(command.gid === undefined ? {} : { gid: command.gid }),
    });
  } finally {
    closeSync(log);
  }
  let running = true;
  const ended = new Promise<string>((resolve) => {
    const end = (reason: string): void => {
      running = false;
      rmSync(command.record_file, { force: true });
      resolve(reason);
    };
    child.once("error", (error) => end(`${command.name} could not be started: ${error.message}`));
    child.once("exit", (code, signal) => end(signal === null ? `${command.name} ended with code ${code}` : `${command.name} was ended by ${signal}`));
  });
  const pid = child.pid ?? 0;
  if (pid > 0) writeRecord(command.record_file, { pid, began: beganAt(pid) ?? "", owner_pid: process.pid, owner_began: beganAt(process.pid) ?? "" });
  return {
    pid,
    ended,
    is_running: () => running,
    async stop(signal, patience_ms) {
      if (!running) return;
      child.kill(signal);
      const insist = setTimeout(() => child.kill("SIGKILL"), patience_ms);
      await ended;
      clearTimeout(insist);
    },
  };
}

/**
 * Ends the server that a killed predecessor left running, if there is one.
 *
 * Refuses: a server whose owner is alive; that is another `npm start` on the same data (P2).
 */
export async function endLeftover(name: string, record_file: string, signals: readonly NodeJS.Signals[], say: (line: string) => void): Promise<void> {
  const record = readRecord(record_file);
  if (record === undefined) return;
  if (record.began !== "" && beganAt(record.pid) === record.began) {
    const owner_lives = record.owner_pid !== process.pid && record.owner_began !== "" && beganAt(record.owner_pid) === record.owner_began;
    if (owner_lives) {
      throw new SetupFault(
        `Troupe already runs on this data: process ${record.owner_pid} owns its ${name} (${record_file}).\n` +
          "Stop it first (Ctrl-C where it runs), or start on other data: TROUPE_HOME=/another/folder npm start",
      );
    }
    say(`ending the ${name} that an earlier run left behind (pid ${record.pid})`);
    for (const signal of [...signals, "SIGKILL" as const]) {
      if (beganAt(record.pid) !== record.began) break; // P1
      sendSignal(record.pid, signal);
      await until(() => beganAt(record.pid) !== record.began, 5_000);
    }
  }
  rmSync(record_file, { force: true });
}

/**
 * What tells this process from another that is given the same pid later; undefined when there is none, or only its remains
 * (a zombie that its parent has not collected yet).
 */
export function beganAt(pid: number): string | undefined {
  if (process.platform === "linux") {
    let stat: string;
    try {
      stat = readFileSync(`/proc/${pid}/stat`, "utf8");
    } catch {
      return undefined; // no such process
    }
    // After the command's closing parenthesis: state is the 1st field, the start time in ticks since boot the 20th.
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
    return fields[0] === "Z" || fields[0] === "X" ? undefined : `ticks ${fields[19]}`;
  }
  const answer = spawnSync("ps", ["-o", "stat=,lstart=", "-p", String(pid)], { encoding: "utf8" });
  const line = answer.stdout?.trim() ?? "";
  return line === "" || line.startsWith("Z") ? undefined : line.slice(line.indexOf(" ")).trim();
}

/** Looks every few milliseconds; answers whether it came true in time. */
export async function until(condition: () => boolean | Promise<boolean>, patience_ms: number, every_ms = 10): Promise<boolean> {
  const deadline_ms = performance.now() + patience_ms;
  for (;;) {
    if (await condition()) return true;
    if (performance.now() > deadline_ms) return false;
    await new Promise((resolve) => setTimeout(resolve, every_ms));
  }
}

/**
 * Systems give ports above these to whoever opens a connection (32768 and up on Linux, 49152 elsewhere). A server that was promised one of those may find
 * it taken by a client of anybody's when it listens a few seconds later, or when it is started again; and a client that seeks it there meanwhile can be
 * given the very same one and speak to itself.
 */
const PORTS = { from: 15_000, below: 32_000 };
/** With every second one taken, nobody is that unlucky. */
const DRAWS_MAX = 200;

/** A port on 127.0.0.1 that was free a moment ago. Whoever uses it must be ready to try another. */
export async function freePort(): Promise<number> {
  for (let draws = 0; draws < DRAWS_MAX; draws++) {
    const port = randomInt(PORTS.from, PORTS.below);
    if (await isFree(port)) return port;
  }
  throw new Error(`no port of ${DRAWS_MAX} that were drawn on 127.0.0.1 is free`);
}

export function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const probe = createServer();
    probe.once("error", () => resolve(false));
    probe.listen(port, "127.0.0.1", () => probe.close(() => resolve(true)));
  });
}

/** The end of a log, for the person who must find out why a server did not start. */
export function logTail(file: string, lines = 15): string {
  if (!existsSync(file)) return "(it wrote no log)";
  return readFileSync(file, "utf8").trimEnd().split("\n").slice(-lines).join("\n");
}

export function sendSignal(pid: number, signal: NodeJS.Signals): void {
  try {
    process.kill(pid, signal);
  } catch (error) {
    // Gone between the look and the signal: that is what was wanted.
    if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error;
  }
}

function writeRecord(file: string, record: ServerRecord): void {
  writeFileSync(`${file}.new`, JSON.stringify(record), { mode: 0o600 });
  renameSync(`${file}.new`, file);
}

function readRecord(file: string): ServerRecord | undefined {
  if (!existsSync(file)) return undefined;
  try {
    return JSON.parse(readFileSync(file, "utf8")) as ServerRecord;
  } catch {
    return undefined; // cut off by a crash of the machine: then the process is gone too
  }
}
