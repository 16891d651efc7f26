// troupe: the whole of Troupe as `npm start` runs it: `up` with its children, a real broker, a real database, in a home of its own.
//
//   startTroupe ──▶ ready ──stop──▶ ended: exit code known, no process left ──start──▶ ready …
//
// One start costs three to five seconds of two processors, so a file of tests shares one.
//
// Invariants:
//   H1. What was started ends with the test file that asked for it, also when a test failed; when the run itself is killed, `up` hears of it
//       (lifeline.mjs) and ends in its own order.
//   H2. stop() throws when a process of this home is left.
import { type ChildProcess, spawn } from "node:child_process";
import { mkdirSync, readdirSync, readFileSync, readlinkSync, symlinkSync } from "node:fs";
import { join } from "node:path";
import { inject } from "vitest";
import { connectJetStream } from "../../bus/jetstream.ts";
import type { Bus } from "../../bus/port.ts";
import { beganAt, sendSignal, until } from "../../deploy/local/server-process.ts";
import { parseActorPath } from "../../protocol/ids.ts";
import { decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { silentLog } from "../../protocol/log.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import type { DevFile, DevProcess } from "../../roles/dev-home.ts";
import { realWorld } from "../../roles/real-world.ts";
import { atEndOfFile } from "./endings.ts";
import { freshHome } from "./servers.ts";
import { readEventStream, type StreamMessage } from "./event-stream.ts";

const ROOT = join(import.meta.dirname, "..", "..");
const MAIN = join(ROOT, "main.ts");
const LIFELINE = join(ROOT, "deploy", "local", "lifeline.mjs");
/** `up` itself gives up after a minute. */
const READY_PATIENCE_MS = 70_000;
/** `up` kills children that have not ended after 15 s, and its servers after 10 s more. */
const STOP_PATIENCE_MS = 40_000;
/** A command that hangs is a failure of the test that typed it. */
const CLI_PATIENCE_MS = 60_000;
const SHARDS = 16;

export interface CliOutcome {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A request with the demonstration tenant's key; `json` is sent as such. `key: null` sends none. */
export interface ApiRequest {
  readonly method?: string;
  readonly json?: unknown;
  readonly body?: string | Uint8Array<ArrayBuffer>;
  readonly headers?: Readonly<Record<string, string>>;
  readonly key?: string | null;
  readonly signal?: AbortSignal;
}

export interface Troupe {
  readonly home: string;
  readonly env: Readonly<Record<string, string>>;
  readonly gateway_url: string;
  readonly key: string;
  dev(): DevFile;
  /** Everything that `up` printed, over all starts. */
  output(): string;
  /** From the spawn of `up` to its words that it is ready, the last time. */
  readonly start_ms: number;
  /** The process id of `up`, which leads a group of its own. */
  readonly pid: number;
  api(path: string, request?: ApiRequest): Promise<Response>;
  /** The same, with the answer read as JSON; throws when the status is another than the one that is given. */
  json<Answer = Record<string, unknown>>(status: number, path: string, request?: ApiRequest): Promise<Answer>;
  /** Messages as they come. Throws when the answer is no event stream, or its connection breaks. */
  sse(path: string, request?: ApiRequest & { readonly last_event_id?: string }): AsyncGenerator<StreamMessage>;
  cli(args: readonly string[], options?: { stdin?: string; env?: Readonly<Record<string, string>> }): Promise<CliOutcome>;
  processOf(role: string, id?: string): number;
  /** Kills one process and answers when it is gone; what it was then. */
  kill9(role: string, id?: string): Promise<DevProcess>;
  /** Waits until another process has taken the place of the one that was killed. */
  replaced(killed: DevProcess, patience_ms?: number): Promise<void>;
  /** The runtime's bus, as an operator has it. Opened once; it comes back by itself after an outage. */
  bus(): Promise<Bus>;
  journal(path: string): Promise<JournalMessage[]>;
  /** Asks `up` to end and answers its exit code. Throws when a process of this home is left. */
  stop(signal?: NodeJS.Signals | (() => void)): Promise<number>;
  /** Starts it again on the same home. */
  start(): Promise<void>;
  /** Processes that work in this home. */
  processes(): number[];
}

/** The surroundings of a person who has set nothing. */
function plainEnv(): Record<string, string> {
  return Object.fromEntries(
    Object.entries(process.env).filter(
      (pair): pair is [string, string] =>
        pair[1] !== undefined &&
        (pair[0] === "TROUPE_NATS_SERVER" || !/^(TROUPE_|ANTHROPIC_|OPENAI_|GEMINI_|GOOGLE_|OTEL_|NODE_|VITEST|FORCE_COLOR)/.test(pair[0])),
    ),
  );
}

export async function startTroupe({ env = {}, workers = 2 }: { env?: Readonly<Record<string, string>>; workers?: number } = {}): Promise<Troupe> {
  const home = await freshHome("troupe");
  // What one start compiled the next need not: the runs share it.
  mkdirSync(join(inject("run_directory"), "compiled"), { recursive: true });
  mkdirSync(join(home, "cache"));
  symlinkSync(join(inject("run_directory"), "compiled"), join(home, "cache", "node"));
  const whole_env = { ...plainEnv(), TROUPE_HOME: home, TROUPE_PORT: "0", NODE_COMPILE_CACHE: join(home, "cache", "node"), ...env };

  let printed = "";
  let up: { child: ChildProcess; ended: Promise<number>; began_ms: number } | undefined;
  let start_ms = 0;
  let bus: Promise<Bus> | undefined;
  const clis = new Set<ChildProcess>();

  const dev = (): DevFile => JSON.parse(readFileSync(join(home, "dev.json"), "utf8")) as DevFile;

  async function start(): Promise<void> {
    const began_ms = performance.now();
    const from = printed.length;
    const child = spawn(process.execPath, ["--import", LIFELINE, MAIN, "up", "--workers", String(workers), "--shards", String(SHARDS)], {
      cwd: home,
      env: { ...whole_env, TROUPE_LAUNCHER_PID: String(process.pid) },
      stdio: ["ignore", "pipe", "pipe", "ipc"],
      detached: true,
    });
    for (const stream of [child.stdout, child.stderr]) stream?.on("data", (data: Buffer) => (printed += data.toString()));
    const ended = new Promise<number>((resolve) => child.once("close", (code, signal) => resolve(code ?? (signal === null ? -1 : -2))));
    let over = false;
    void ended.then(() => (over = true));
    up = { child, ended, began_ms };
    const ready = await until(() => over || printed.slice(from).includes("Troupe is ready"), READY_PATIENCE_MS);
    if (!ready || over) throw new Error(`Troupe did not become ready:\n${printed.slice(from)}\n${logTails()}`);
    start_ms = performance.now() - began_ms;
  }

  function logTails(): string {
    try {
      return readdirSync(join(home, "logs"))
        .map(
          (name) =>
            `── ${name}\n${readFileSync(join(home, "logs", name), "utf8")
              .split("\n")
              .slice(-12)
              .join("\n")}`,
        )
        .join("\n");
    } catch {
      return "(no child wrote a log)";
    }
  }

  /** By what the system says of them; where it says nothing, by what dev.json said. */
  function processes(): number[] {
    if (process.platform !== "linux") return known.filter(({ pid, began }) => beganAt(pid) === began).map(({ pid }) => pid);
    const mine = (pid: string): boolean => {
      try {
        if (beganAt(Number(pid)) === undefined) return false;
        const words = `${readFileSync(`/proc/${pid}/cmdline`, "utf8")}\0${readFileSync(`/proc/${pid}/environ`, "utf8")}`;
        return words.includes(home) || readlinkSync(`/proc/${pid}/cwd`).startsWith(home);
      } catch {
        return false; // it has ended since, or is none of ours to look at
      }
    };
    return readdirSync("/proc")
      .filter((name) => /^\d+$/.test(name) && mine(name))
      .map(Number);
  }
  let known: { pid: number; began: string | undefined }[] = [];

  async function stop(signal: NodeJS.Signals | (() => void) = "SIGTERM"): Promise<number> {
    if (up === undefined) throw new Error("it was not started");
    const { child, ended } = up;
    known = (existsDev() ? dev().processes : []).map(({ pid }) => ({ pid, began: beganAt(pid) }));
    if (typeof signal === "function") signal();
    else child.kill(signal);
    const code = await Promise.race([ended, later(STOP_PATIENCE_MS, undefined)]);
    if (code === undefined) throw new Error(`up did not end within ${STOP_PATIENCE_MS} ms:\n${printed}\n${logTails()}`);
    up = undefined;
    await until(() => processes().length === 0, 4_000);
    const left = processes();
    if (left.length > 0) throw new Error(`processes ${left.join(", ")} of ${home} were left:\n${left.map(wordsOf).join("\n")}`); // H2
    return code;
  }
  function existsDev(): boolean {
    try {
      dev();
      return true;
    } catch {
      return false; // not written yet, or gone with a clean end
    }
  }

  // H1
  atEndOfFile(async () => {
    await (await bus)?.close();
    for (const child of clis) child.kill("SIGKILL");
    try {
      if (up !== undefined && up.child.exitCode === null && up.child.signalCode === null) await stop();
    } finally {
      for (const pid of processes()) sendSignal(pid, "SIGKILL");
    }
  });

  await start();

  const troupe: Troupe = {
    home,
    env: whole_env,
    get gateway_url() {
      return dev().gateway_url;
    },
    get key() {
      return keyOf(dev());
    },
    dev,
    output: () => printed,
    get start_ms() {
      return start_ms;
    },
    get pid() {
      return up?.child.pid ?? 0;
    },
    async api(path, { method, json, body, headers, key, signal } = {}) {
      const content = json === undefined ? body : JSON.stringify(json);
      const credential = key === undefined ? troupe.key : key;
      return fetch(new URL(path, troupe.gateway_url), {
        method: method ?? (content === undefined ? "GET" : "POST"),
        headers: {
          ...(credential === null ? {} : { authorization: `Bearer ${credential}` }),
          ...(content === undefined ? {} : { "content-type": "application/json" }),
          ...headers,
        },
        ...(content === undefined ? {} : { body: content }),
        ...(signal === undefined ? {} : { signal }),
      });
    },
    async json(status, path, request) {
      const answer = await troupe.api(path, request);
      const text = await answer.text();
      if (answer.status !== status) throw new Error(`${path} answered ${answer.status}, not ${status}: ${text}`);
      return JSON.parse(text) as never;
    },
    async *sse(path, { last_event_id, headers, ...request } = {}) {
      const answer = await troupe.api(path, {
        ...request,
        headers: { accept: "text/event-stream", ...(last_event_id === undefined ? {} : { "last-event-id": last_event_id }), ...headers },
      });
      if (answer.status !== 200 || answer.body === null) throw new Error(`${path} answered ${answer.status}: ${await answer.text()}`);
      yield* readEventStream(answer.body);
    },
    cli(args, { stdin, env: more = {} } = {}) {
      return new Promise((resolve, reject) => {
        const child = spawn(process.execPath, [MAIN, ...args], {
          cwd: home,
          env: { ...whole_env, ...more },
          stdio: [stdin === undefined ? "ignore" : "pipe", "pipe", "pipe"],
        });
        clis.add(child);
        let stdout = "";
        let stderr = "";
        child.stdout?.on("data", (data: Buffer) => (stdout += data.toString()));
        child.stderr?.on("data", (data: Buffer) => (stderr += data.toString()));
        const patience = setTimeout(() => child.kill("SIGKILL"), CLI_PATIENCE_MS);
        child.once("error", reject);
        child.once("close", (code, signal) => {
          clearTimeout(patience);
          clis.delete(child);
          if (code === null) reject(new Error(`troupe ${args.join(" ")} was ended by ${signal} after saying:\n${stdout}\n${stderr}`));
          else resolve({ code, stdout, stderr });
        });
        child.stdin?.end(stdin);
      });
    },
    processOf(role, id) {
      const found = dev().processes.find((one) => one.role === role && (id === undefined || one.id === id));
      if (found === undefined || found.pid === 0) throw new Error(`no ${role} ${id ?? ""} runs`);
      return found.pid;
    },
    async kill9(role, id) {
      const pid = troupe.processOf(role, id);
      const one = dev().processes.find((process) => process.pid === pid)!;
      const began = beganAt(pid);
      sendSignal(pid, "SIGKILL");
      if (!(await until(() => beganAt(pid) !== began, 30_000))) throw new Error(`${role} ${pid} outlives kill -9`);
      return one;
    },
    async replaced({ role, id, pid }, patience_ms = 60_000) {
      const again = (): boolean =>
        existsDev() && dev().processes.some((one) => one.role === role && one.id === id && one.pid !== pid && beganAt(one.pid) !== undefined);
      if (!(await until(again, patience_ms, 20))) throw new Error(`${role} ${id} was not replaced within ${patience_ms} ms:\n${printed}`);
    },
    bus() {
      bus ??= openBus(dev());
      return bus;
    },
    async journal(path) {
      const actor = parseActorPath(path);
      if (actor === undefined) throw new Error(`${path} names no actor`);
      const messages: JournalMessage[] = [];
      for await (const stored of (await troupe.bus()).read("EVENTS", actorSubject(actor, "event"), 1)) messages.push(decodeJournal(stored.data, actor));
      return messages;
    },
    async stop(signal) {
      await (await bus)?.close(); // it belongs to this start: the next one may have other ports
      bus = undefined;
      return stop(signal);
    },
    start,
    processes,
  };
  return troupe;
}

function keyOf({ tenants }: DevFile): string {
  const key = tenants.find(({ id }) => id === "demo")?.key;
  if (key === undefined) throw new Error("dev.json has no key of the tenant demo");
  return key;
}

function openBus({ nats_url, nats_operator }: DevFile): Promise<Bus> {
  return connectJetStream({
    servers: nats_url,
    user: nats_operator.user,
    password: nats_operator.password,
    name: "test",
    shards: SHARDS,
    replicas: 1,
    lease_ttl_ms: 5_000,
    log: silentLog,
    world: realWorld(),
    ensure: false,
  });
}

function wordsOf(pid: number): string {
  try {
    return `${pid} ${readFileSync(`/proc/${pid}/cmdline`, "utf8").replaceAll("\0", " ")}`;
  } catch {
    return String(pid); // it has ended since
  }
}

export function later<Value>(ms: number, value: Value): Promise<Value> {
  return new Promise((resolve) => {
    setTimeout(() => resolve(value), ms).unref();
  });
}

/** What was read once it is good, or what was read last when the patience is over: the expectation after it says what is missing. */
export async function eventually<T>(read: () => Promise<T>, good: (value: T) => boolean, patience_ms = 60_000): Promise<T> {
  for (const give_up_ms = performance.now() + patience_ms; ; await later(100, undefined)) {
    const value = await read();
    if (good(value) || performance.now() > give_up_ms) return value;
  }
}
