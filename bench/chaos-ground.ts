// chaos-ground: what chaos happens to: brokers, supervisors, workers, gateways, and where it matters a projector and Postgres, all as real
// processes through main.ts, and a model provider on 127.0.0.1 that counts what is asked of it.
//
//   startGround ──▶ ready: tenant, agent and key made, every shard owned ──kill, stop, go on, start──▶ … ──stop──▶ no process left
//
// Invariants:
//   G1. Every process is recorded under the ground's home, so that whatever kills this one, the guard of the tests finds the rest.
//   G2. A worker that takes a dead one's place has a new name, as in a fleet: a name that dies again and again is given nothing.
import { randomBytes } from "node:crypto";
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { type CommandClient, createCommandClient } from "../actors/client.ts";
import { connectJetStream } from "../bus/jetstream.ts";
import type { Bus } from "../bus/port.ts";
import { ensureNatsServer } from "../deploy/local/nats-server.ts";
import { type LocalPostgres, startLocalPostgres } from "../deploy/local/postgres.ts";
import { localSecrets } from "../deploy/local/secrets.ts";
import { freePort, logTail, sendSignal, type ServerProcess, startServer, until } from "../deploy/local/server-process.ts";
import { createKey } from "../protocol/api-key.ts";
import { tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { silentLog } from "../protocol/log.ts";
import { prepareDatabase } from "../roles/database.ts";
import { realWorld } from "../roles/real-world.ts";
import { type ModelAnswer, type ModelServer, type ModelServerRequest, startModelServer } from "../test/contract/model-server.ts";
import { type Brokers, startBrokers } from "./chaos-brokers.ts";
import { type Watch, startWatch } from "./chaos-watch.ts";

const MAIN = fileURLToPath(new URL("../main.ts", import.meta.url));
const CLOCK = fileURLToPath(new URL("chaos-clock.ts", import.meta.url));
export const TENANT = "bench";
export const AGENT = "a";
export const SHARDS = 16;
const READY_PATIENCE_MS = 60_000;
const STOP_PATIENCE_MS = 15_000;

export const now = (): number => performance.now();
export const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));

/** What a message asks the model for; it stands in the message as JSON. `tag` names the message for the audit. */
export interface Wish {
  readonly tag: string;
  readonly tokens: number;
  readonly token_ms: number;
  readonly first_token_ms: number;
  /** The first answer of the turn calls a tool, the second one ends it. */
  readonly tool: boolean;
}

/** One request at the model provider. `step` counts the model calls of the turn, from 0. */
export interface ModelCall {
  readonly tag: string;
  readonly step: number;
  readonly at_ms: number;
  /** Milliseconds since 1970, as the broker's times are. */
  readonly at_wall_ms: number;
}

export type Role = "supervisor" | "worker" | "gateway" | "projector";

export interface Ground {
  readonly home: string;
  readonly brokers: Brokers;
  readonly postgres: LocalPostgres | undefined;
  readonly bus: Bus;
  readonly client: CommandClient;
  readonly watch: Watch;
  readonly model: ModelServer;
  readonly calls: readonly ModelCall[];
  readonly gateway_urls: readonly string[];
  readonly key: string;
  readonly password: string;
  onCall(listener: (call: ModelCall) => void): () => void;
  /** Names of the workers that run. */
  workers(): string[];
  pidOf(role: Role, id: string): number;
  /** Starts one more worker and answers its name; ready it is later. */
  startWorker(options?: WorkerOptions): string;
  start(role: Role, id: string): void;
  /** Sends the signal and answers when, by performance.now(). */
  signal(role: Role, id: string, signal: NodeJS.Signals): number;
  /** Resolves when the process has ended. */
  ended(role: Role, id: string): Promise<string>;
  logOf(role: Role, id: string): string;
  stop(): Promise<void>;
}

export interface WorkerOptions {
  /** Through which it reaches the broker. */
  readonly nats_url?: string;
  /** A file that says by how much its wall clock is off. */
  readonly clock_file?: string;
}

export interface GroundOptions {
  /** Where everything is kept; a fresh folder, removed at the end, when absent. */
  readonly home?: string;
  readonly brokers?: 1 | 3;
  readonly workers?: number;
  readonly supervisors?: number;
  readonly gateways?: number;
  readonly postgres?: boolean;
  readonly env?: Readonly<Record<string, string>>;
}

export async function startGround(options: GroundOptions = {}): Promise<Ground> {
  const home = options.home ?? mkdtempSync(join(tmpdir(), "troupe-chaos-"));
  mkdirSync(home, { recursive: true });
  chmodSync(home, 0o755); // Postgres may run as another user than ours
  mkdirSync(join(home, "processes"), { recursive: true });
  const say = (): void => undefined;
  const world = realWorld();
  const processes = new Map<string, ServerProcess>();
  const endings: (() => Promise<void> | void)[] = [];
  const servers: (() => number)[] = [];
  const stop = async (): Promise<void> => {
    for (const { pid } of processes.values()) sendSignal(pid, "SIGCONT");
    const kinds: Role[] = ["projector", "gateway", "worker", "supervisor"];
    for (const kind of kinds)
      await Promise.all([...processes].filter(([name]) => name.startsWith(`${kind}-`)).map(([, one]) => one.stop("SIGINT", STOP_PATIENCE_MS)));
    for (let ending = endings.pop(); ending !== undefined; ending = endings.pop()) await ending();
    process.off("exit", endNow);
    if (options.home === undefined) rmSync(home, { recursive: true, force: true, maxRetries: 5, retryDelay: 100 });
  };
  const endNow = (): void => {
    for (const { pid, is_running } of processes.values()) if (is_running()) sendSignal(pid, "SIGKILL");
    for (const pid of servers.map((pidOf) => pidOf())) if (pid > 0) sendSignal(pid, "SIGTERM");
  };
  process.once("exit", endNow);

  try {
    const calls: ModelCall[] = [];
    const call_listeners = new Set<(call: ModelCall) => void>();
    const model = await startModelServer({
      answer: (request) =>
        answerTo(request, (call) => {
          calls.push(call);
          for (const listener of [...call_listeners]) listener(call);
        }),
      requests_kept_max: 0,
    });
    endings.push(() => model.close());
    const program = await ensureNatsServer({ env: process.env, say });
    const brokers = await startBrokers({ home: join(home, "nats"), program: program.path, count: options.brokers ?? 1, tenant: TENANT });
    endings.push(() => brokers.stop());
    servers.push(...brokers.nodes.map((node) => () => (node.running() ? node.pid() : 0)));
    const postgres = options.postgres === true ? await startLocalPostgres({ home, say }) : undefined;
    if (postgres !== undefined) {
      endings.push(() => postgres.stop());
      servers.push(() => postgres.pid());
    }
    const logins =
      postgres === undefined ? undefined : await prepareDatabase({ url: postgres.url, secret: (name) => localSecrets(home).of(name), log: silentLog });
    const bus = await connectJetStream({
      servers: brokers.url,
      user: brokers.operator.user,
      password: brokers.operator.password,
      name: "chaos",
      shards: SHARDS,
      replicas: brokers.nodes.length,
      log: silentLog,
      world,
    });
    endings.push(() => bus.close());
    const client = createCommandClient({ bus, world });
    endings.push(() => client.stop());
    const watch = await startWatch(bus);
    endings.push(() => watch.stop());

    const shared: Record<string, string> = {
      PATH: process.env["PATH"] ?? "",
      HOME: process.env["HOME"] ?? "",
      NODE_COMPILE_CACHE: join(home, "compiled"),
      TROUPE_HOME: home,
      TROUPE_LOG_LEVEL: "info",
      TROUPE_SHARDS: String(SHARDS),
      TROUPE_REPLICAS: String(brokers.nodes.length),
      TROUPE_NATS_URL: brokers.url,
      TROUPE_NATS_USER: brokers.runtime.user,
      TROUPE_NATS_PASSWORD: brokers.runtime.password,
      ...options.env,
    };
    const of_role: Record<Role, Record<string, string>> = {
      supervisor: { TROUPE_NATS_SYSTEM_USER: brokers.system.user, TROUPE_NATS_SYSTEM_PASSWORD: brokers.system.password, TROUPE_NATS_ACCOUNT: brokers.account },
      worker: { OPENAI_API_KEY: "sk-chaos", OPENAI_BASE_URL: `${model.url}/v1` },
      gateway: logins === undefined ? {} : { TROUPE_POSTGRES_URL: logins.app },
      projector: { TROUPE_POSTGRES_URL: logins?.projector ?? "" },
    };
    const ports = await Promise.all(Array.from({ length: options.gateways ?? 1 }, () => freePort()));
    const logFile = (role: Role, id: string): string => join(home, "processes", `${role}-${id}.log`);
    const launch = (
      role: Role,
      id: string,
      { args = [], env = {}, imports = [] }: { args?: string[]; env?: Record<string, string>; imports?: string[] } = {},
    ): void => {
      processes.set(
        `${role}-${id}`,
        startServer({
          name: `${role} ${id}`,
          file: process.execPath,
          args: [...imports.flatMap((file) => ["--import", file]), MAIN, role, "--id", id, ...args],
          cwd: home,
          env: { ...shared, ...of_role[role], ...env },
          log_file: logFile(role, id),
          record_file: join(home, "processes", `${role}-${id}.server.json`), // G1
        }),
      );
    };
    const portOf = (id: string): number => ports[Number(id.slice(1)) - 1] ?? 0;
    const processOf = (role: Role, id: string): ServerProcess => {
      const found = processes.get(`${role}-${id}`);
      if (found === undefined) throw new Error(`no ${role} ${id} was started`);
      return found;
    };
    let workers_count = 0;
    const gateway_urls = ports.map((port) => `http://127.0.0.1:${port}`);
    const key = createKey(TENANT, (count) => randomBytes(count));
    const ground: Ground = {
      home,
      brokers,
      postgres,
      bus,
      client,
      watch,
      model,
      calls,
      gateway_urls,
      key: key.key,
      password: brokers.tenantLogin(TENANT).password,
      onCall(listener) {
        call_listeners.add(listener);
        return () => void call_listeners.delete(listener);
      },
      workers: () => [...processes].filter(([name, one]) => name.startsWith("worker-") && one.is_running()).map(([name]) => name.slice("worker-".length)),
      pidOf: (role, id) => processOf(role, id).pid,
      startWorker({ nats_url, clock_file } = {}) {
        const id = `w${++workers_count}`; // G2
        launch("worker", id, {
          env: { ...(nats_url === undefined ? {} : { TROUPE_NATS_URL: nats_url }), ...(clock_file === undefined ? {} : { CHAOS_CLOCK_FILE: clock_file }) },
          imports: clock_file === undefined ? [] : [CLOCK],
        });
        return id;
      },
      start: (role, id) => launch(role, id, role === "gateway" ? { args: ["--http-port", String(portOf(id))] } : {}),
      signal(role, id, signal) {
        const { pid } = processOf(role, id);
        const at_ms = now();
        sendSignal(pid, signal);
        return at_ms;
      },
      ended: (role, id) => processOf(role, id).ended,
      logOf: (role, id) => logFile(role, id),
      stop,
    };

    for (let index = 1; index <= (options.supervisors ?? 1); index++) ground.start("supervisor", `s${index}`);
    for (let index = 1; index <= (options.workers ?? 2); index++) ground.startWorker();
    for (let index = 1; index <= ports.length; index++) ground.start("gateway", `g${index}`);
    if (postgres !== undefined) ground.start("projector", "p1");
    const tails = (): string => [...processes.keys()].map((name) => `── ${name}\n${logTail(join(home, "processes", `${name}.log`), 6)}`).join("\n");
    const say_command = async (type: string, body: JsonObject): Promise<boolean> => {
      const outcome = await client.command(tenantActor(TENANT), { type, body, channel: "control", key: `chaos-${type}` }, { patience_ms: 2_000 });
      return outcome.kind === "decided" && outcome.reply.ok;
    };
    const agent = { model: "openai/gpt-5.6-luna", instructions: "", tools: ["now"], max_output_tokens: 512 };
    const ready = await until(
      async () =>
        (await say_command("tenant.create", {})) &&
        (await say_command("agent.put", { agent: AGENT, config: agent })) &&
        (await say_command("key.create", { key_id: key.key_id, hash: key.hash })),
      READY_PATIENCE_MS,
      100,
    );
    if (!ready) throw new Error(`the ground did not become ready:\n${tails()}`);
    const serving = await until(async () => (await Promise.all(gateway_urls.map(isReady))).every(Boolean), READY_PATIENCE_MS, 100);
    if (!serving) throw new Error(`the gateways did not become ready:\n${tails()}`);
    if (!(await until(() => ground.workers().every((id) => watch.shardsOf(id).length > 0), READY_PATIENCE_MS)))
      throw new Error(`not every worker owns shards:\n${tails()}`);
    return ground;
  } catch (error) {
    await stop();
    throw error;
  }
}

async function isReady(url: string): Promise<boolean> {
  try {
    const answer = await fetch(`${url}/readyz`, { signal: AbortSignal.timeout(2_000) });
    await answer.body?.cancel();
    return answer.status === 200;
  } catch {
    return false; // not listening yet
  }
}

/** Sets how far a clock is off; atomically enough for a reader that looks again. */
export function setClock(file: string, offset_ms: number): void {
  writeFileSync(file, String(offset_ms));
}

interface ChatTurn {
  readonly role?: string;
  readonly content?: unknown;
}

/** What the model says: as the last user's message wishes. Its words begin with the tag, so that the journal tells whose answer it is. */
function answerTo(request: ModelServerRequest, tell: (call: ModelCall) => void): ModelAnswer {
  const messages = (request.body["messages"] ?? []) as unknown as readonly ChatTurn[];
  const at = messages.findLastIndex(({ role }) => role === "user");
  const wish = JSON.parse(textOf(messages[at]?.content)) as Wish;
  const step = messages.slice(at + 1).filter(({ role }) => role === "assistant").length;
  tell({ tag: wish.tag, step, at_ms: now(), at_wall_ms: Date.now() });
  const calls = wish.tool && step === 0;
  const words = Array.from({ length: Math.max(0, (calls ? Math.ceil(wish.tokens / 2) : wish.tokens) - 1) }, (_, index) => ` w${index}`);
  return {
    text: `${answerTag(wish.tag, step)}${words.join("")}`,
    first_token_ms: wish.first_token_ms,
    token_ms: wish.token_ms,
    ...(calls ? { tool_calls: [{ name: "now", args: {} }] } : {}),
  };
}

/** How an answer to this message begins. */
export const answerTag = (tag: string, step: number): string => `[${tag}/${step}]`;

function textOf(content: unknown): string {
  if (typeof content === "string") return content;
  return (content as readonly { readonly text?: string }[]).map(({ text = "" }) => text).join("");
}
