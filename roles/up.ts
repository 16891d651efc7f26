// up: everything on one machine: broker, database, one supervisor, workers, a gateway and the projections, each a process of its own.
//
//   broker, database ──▶ streams, tables ──▶ children ──▶ demonstration tenant ──▶ ready: URL, key, curl line ──▶ Ctrl-C: all end in order
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { createCommandClient } from "../actors/client.ts";
import { createDirectory } from "../actors/directory.ts";
import { createRestorer } from "../actors/restore.ts";
import { auditSubstrate } from "../bus/jetstream.ts";
import type { Bus } from "../bus/port.ts";
import { type AuthKeys, createAuthKeys, publicAuthKeys } from "../bus/jetstream-auth.ts";
import { ensureNatsServer } from "../deploy/local/nats-server.ts";
import { type LocalNats, startLocalNats } from "../deploy/local/nats.ts";
import { localMasterKeys, localSecrets } from "../deploy/local/secrets.ts";
import { freePort, isFree } from "../deploy/local/server-process.ts";
import { type LocalPostgres, startLocalPostgres } from "../deploy/local/postgres.ts";
import { createKey } from "../protocol/api-key.ts";
import { tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { REFUSE_PERCENT_EMBEDDED } from "../protocol/limits.ts";
import { errorFields } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import { pause } from "../protocol/world.ts";
import { cores } from "../state-machines/kinds.ts";
import { createChildren } from "./children.ts";
import { prepareDatabase } from "./database.ts";
import { keepOwnKey, readOwnKeys, removeDevFile, writeDevFile } from "./dev-home.ts";
import { connect, type Runtime } from "./runtime.ts";
import { demonstrationModel } from "./settings.ts";

const DEMO_TENANT = "demo";
const DEMO_AGENT = "assistant";
const DEMO_INSTRUCTIONS = "You are a helpful assistant. Answer briefly.";
/** From the first child's start to a ready gateway; past it something is wrong that waiting does not mend. */
const READY_PATIENCE_MS = 60_000;
/** Children that have not ended by then are killed: their work is in the journals. */
const STOP_PATIENCE_MS = 15_000;

export interface UpRoleOptions {
  readonly port: number | undefined;
  readonly workers: number;
  readonly shards: number | undefined;
  /** `process.execPath` and the path of main.ts. */
  readonly program: string;
  readonly main: string;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly say: (line: string) => void;
}

/** What a child is told: the surroundings that people set, never a secret that it does not need. */
function childEnv(env: Readonly<Record<string, string | undefined>>, keep: RegExp, more: Record<string, string>): Record<string, string> {
  const kept = Object.entries(env).filter(
    (pair): pair is [string, string] =>
      pair[1] !== undefined && (/^(PATH|HOME|LANG|LC_|TZ|NODE_|OTEL_|TROUPE_(?!OPENAI_COMPATIBLE|MASTER_KEYS))/.test(pair[0]) || keep.test(pair[0])),
  );
  return { ...Object.fromEntries(kept), ...more };
}

export async function runUp(outer: Runtime, options: UpRoleOptions): Promise<number> {
  const { world, log } = outer;
  const { say } = options;
  const home = outer.settings.TROUPE_HOME;
  const shards = options.shards ?? outer.settings.TROUPE_SHARDS;
  const began_ms = world.monotonic_ms();
  let failed: string | undefined;
  let fail: () => void = () => undefined;
  const broken = new Promise<"broken">((resolve) => (fail = () => resolve("broken")));
  const giveUp = (reason: string): void => {
    failed ??= reason;
    fail();
  };

  const wanted_port = options.port ?? outer.settings.TROUPE_PORT;
  const port = wanted_port === 0 ? await freePort() : wanted_port;
  if (!(await isFree(port))) {
    say(`Port ${port} on 127.0.0.1 is taken by another program. End it, or choose another: TROUPE_PORT=8788 npm start (0 takes any).`);
    return 3;
  }

  let auth_keys: AuthKeys;
  let nats: LocalNats | undefined;
  let postgres: LocalPostgres | undefined;
  let tell = (): void => undefined;
  const endServers = async (): Promise<void> => {
    removeDevFile(home, process.pid);
    await Promise.all([nats?.stop(), postgres?.stop()]);
  };
  try {
    const program = await ensureNatsServer({ env: { ...options.env } as NodeJS.ProcessEnv, say });
    say(`nats-server ${program.version} (${program.origin})`);
    const own = readOwnKeys(home);
    const drawn = createAuthKeys();
    const secrets = localSecrets(home);
    auth_keys = {
      issuer_seed: secrets.of("nats.auth-issuer-seed", () => drawn.issuer_seed),
      exchange_seed: secrets.of("nats.auth-exchange-seed", () => drawn.exchange_seed),
    };
    const { TROUPE_NATS_PORT, TROUPE_NATS_MONITOR_PORT, TROUPE_POSTGRES_PORT } = outer.settings;
    // A server that dies unasked is started again: its data is on disk, and every client comes back by itself.
    const revive = (name: string, server: () => { start(): Promise<void> } | undefined) => (reason: string) => {
      say(`${name} ended (${reason}); starting it again`);
      server()
        ?.start()
        .then(() => tell()) // it is another process now
        .catch((error: unknown) => giveUp(`${name} could not be started again: ${String(error)}`));
    };
    const [broker_start, database_start] = await Promise.allSettled([
      startLocalNats({
        home,
        binary: program.path,
        auth: publicAuthKeys(auth_keys),
        tenants: [...new Set([DEMO_TENANT, ...Object.keys(own)])],
        say,
        on_death: revive("nats-server", () => nats),
        ...(TROUPE_NATS_PORT === undefined ? {} : { port: TROUPE_NATS_PORT }),
        ...(TROUPE_NATS_MONITOR_PORT === undefined ? {} : { monitor_port: TROUPE_NATS_MONITOR_PORT }),
      }),
      startLocalPostgres({
        home,
        say,
        on_death: revive("Postgres", () => postgres),
        ...(TROUPE_POSTGRES_PORT === undefined ? {} : { port: TROUPE_POSTGRES_PORT }),
      }),
    ]);
    // The one that did start is known, so that it ends with the other's failure.
    if (database_start.status === "fulfilled") postgres = database_start.value;
    if (broker_start.status === "rejected") throw broker_start.reason;
    nats = broker_start.value;
    if (database_start.status === "rejected") throw database_start.reason;
    postgres = database_start.value;
  } catch (error) {
    await endServers();
    say(error instanceof Error ? error.message : String(error));
    return 3;
  }
  const broker = nats;
  const database = postgres;
  // Told to end at once, or broken: nothing of ours outlives us.
  let over = false;
  let running: () => readonly { readonly pid: number }[] = () => [];
  process.once("exit", () => {
    if (over) return;
    for (const { pid } of running()) endNow(pid, "SIGKILL");
    for (const pid of [broker.pid(), database.pid()]) endNow(pid, "SIGTERM");
  });

  const runtime: Runtime = {
    ...outer,
    settings: {
      ...outer.settings,
      TROUPE_SHARDS: shards,
      TROUPE_NATS_URL: broker.url,
      TROUPE_NATS_USER: broker.operator.user,
      TROUPE_NATS_PASSWORD: broker.operator.password,
    },
  };
  // Tables and logins while the broker is got ready: every child but the owner of the tables gets a credential that row-level security binds.
  const prepared = prepareDatabase({ url: database.url, secret: (name) => localSecrets(home).of(name), log }).catch((error: unknown) => {
    giveUp(`the database could not be prepared: ${errorFields(error).error}`);
    return undefined;
  });
  let bus: Bus;
  try {
    bus = await connect(runtime, "up");
  } catch (error) {
    // Streams that another setting made, most of all.
    await prepared;
    await endServers();
    over = true;
    say(error instanceof Error ? error.message : String(error));
    return 3;
  }
  for (const finding of await auditSubstrate(bus, { monitor_url: broker.monitor_url }))
    if (finding.level === "refuse") giveUp(`the broker is not as it must be: ${finding.what} is ${finding.have}, wanted ${finding.want}`);

  const shared = {
    TROUPE_HOME: home,
    TROUPE_SHARDS: String(shards),
    TROUPE_NATS_URL: broker.url,
    TROUPE_NATS_USER: broker.runtime.user,
    TROUPE_NATS_PASSWORD: broker.runtime.password,
    TROUPE_NATS_MONITOR_URL: broker.monitor_url,
    TROUPE_REFUSE_FROM_PERCENT: String(outer.settings.TROUPE_REFUSE_FROM_PERCENT ?? REFUSE_PERCENT_EMBEDDED),
    NODE_COMPILE_CACHE: join(home, "cache", "node"),
  };
  // Gateways seal with it, workers open with it; nobody else is told.
  const { TROUPE_MASTER_KEYS: master_keys, TROUPE_MASTER_KEYS_FILE: master_keys_file } = outer.settings;
  const sealing: Record<string, string> =
    master_keys === undefined ? { TROUPE_MASTER_KEYS_FILE: master_keys_file ?? localMasterKeys(home) } : { TROUPE_MASTER_KEYS: master_keys };
  const webhook_key = outer.settings.TROUPE_WEBHOOK_KEY ?? localSecrets(home).of("webhooks.key");
  const gateway_url = `http://127.0.0.1:${port}`;
  const keys = new Map(Object.entries(readOwnKeys(home)));
  const tenants = new Set<string>([DEMO_TENANT, ...keys.keys()]);
  tell = (): void => {
    writeDevFile(home, {
      gateway_url,
      nats_url: broker.url,
      nats_monitor_url: broker.monitor_url,
      nats_operator: broker.operator,
      postgres_url: database.url,
      webhook_key,
      tenants: [...tenants].map((id) => ({ id, ...(keys.has(id) ? { key: keys.get(id)! } : {}), nats: broker.tenantLogin(id) })),
      processes: [
        { role: "up", id: "up", pid: process.pid },
        { role: "nats-server", id: "nats", pid: broker.pid() },
        { role: "postgres", id: "postgres", pid: database.pid() },
        ...children.running(),
      ],
    });
  };
  const children = createChildren({
    program: options.program,
    main: options.main,
    log_directory: join(home, "logs"),
    world,
    say,
    on_change: tell,
    on_given_up: (spec) => giveUp(`${spec.role} ${spec.id} does not stay up`),
  });
  running = () => children.running();
  const nothing = /^$/;
  children.start({
    role: "supervisor",
    id: "s1",
    args: ["supervisor", "--id", "s1"],
    env: childEnv(options.env, nothing, {
      ...shared,
      TROUPE_NATS_SYSTEM_USER: broker.system.user,
      TROUPE_NATS_SYSTEM_PASSWORD: broker.system.password,
      TROUPE_NATS_ACCOUNT: broker.account,
    }),
  });
  for (let index = 1; index <= options.workers; index++) {
    const id = `w${index}`;
    children.start({
      role: "worker",
      id,
      args: ["worker", "--id", id],
      env: childEnv(options.env, /^(ANTHROPIC|OPENAI|GEMINI|GOOGLE|TROUPE_OPENAI_COMPATIBLE)(_|$)/, { ...shared, ...sealing, TROUPE_WEBHOOK_KEY: webhook_key }),
    });
  }
  const logins = (await prepared) ?? { app: "", projector: "" };
  const withDatabase = (url: string): Record<string, string> => ({ ...shared, TROUPE_POSTGRES_URL: url });
  // Gateways alone decide who comes onto the bus.
  const edge = {
    TROUPE_NATS_AUTH_USER: broker.authenticator.user,
    TROUPE_NATS_AUTH_PASSWORD: broker.authenticator.password,
    TROUPE_NATS_AUTH_ISSUER_SEED: auth_keys.issuer_seed,
    TROUPE_NATS_AUTH_EXCHANGE_SEED: auth_keys.exchange_seed,
    TROUPE_NATS_WARDEN_USER: broker.warden.user,
    TROUPE_NATS_WARDEN_PASSWORD: broker.warden.password,
    TROUPE_NATS_STAND_IN_SECRET: broker.stand_in_secret,
  };
  children.start({
    role: "gateway",
    id: "g1",
    args: ["gateway", "--id", "g1", "--http-port", String(port)],
    env: childEnv(options.env, nothing, { ...withDatabase(logins.app), ...edge, ...sealing, TROUPE_WEBHOOK_KEY: webhook_key }),
  });
  children.start({ role: "projector", id: "p1", args: ["projector", "--id", "p1"], env: childEnv(options.env, nothing, withDatabase(logins.projector)) });

  const restorer = createRestorer({ bus, cores, log });
  const client = createCommandClient({ bus, world });
  const directory = createDirectory({ bus, restorer, world, log });
  // A tenant that is made while this runs gets its stand-in on the bus at once.
  const watching = bus.subscribe("live.tenant.*.tenant.main.event", (message) => {
    const parsed = parseActorSubject(message.subject);
    if (parsed.kind === "actor") void letIn(parsed.actor.tenant);
  });
  async function letIn(tenant: string): Promise<void> {
    if (tenants.has(tenant)) return;
    tenants.add(tenant);
    try {
      await broker.setTenants([...tenants]);
      tell();
    } catch (error) {
      log.error("a new tenant has no way onto the bus yet", { tenant, ...errorFields(error) });
    }
  }

  async function say_command(tenant: string, type: string, body: JsonObject): Promise<boolean> {
    const outcome = await client.command(tenantActor(tenant), { type, body, channel: "control" }, { patience_ms: 5_000 });
    if (outcome.kind === "decided" && outcome.reply.ok) return true;
    const error = outcome.kind === "refused" ? outcome.error : outcome.reply.ok ? undefined : outcome.reply.error;
    if (error?.code !== "conflict" && error?.code !== "unavailable")
      log.warn("the demonstration could not be prepared yet", { command: type, code: error?.code });
    return error?.code === "conflict";
  }

  /** The tenant, its agent and its key, each made once; what is there is left as people changed it. */
  async function demonstrate(): Promise<boolean> {
    if (!(await say_command(DEMO_TENANT, "tenant.create", { name: "Demonstration" }))) return false;
    const { model } = demonstrationModel(outer.settings);
    const record = await directory.tenant(DEMO_TENANT);
    const agent = record?.agents[DEMO_AGENT];
    const ours = agent === undefined || (agent.config.instructions === DEMO_INSTRUCTIONS && agent.config.model !== model);
    if (
      ours &&
      !(await say_command(DEMO_TENANT, "agent.put", {
        agent: DEMO_AGENT,
        config: { model, instructions: DEMO_INSTRUCTIONS, tools: ["now", "wait_ms"], mode: "multi" },
      }))
    )
      return false;
    const known = keys.get(DEMO_TENANT);
    const keyId = known?.split(".")[2];
    if (known !== undefined && keyId !== undefined && record?.keys[keyId] !== undefined) return true;
    const made = createKey(DEMO_TENANT, (count) => randomBytes(count));
    if (!(await say_command(DEMO_TENANT, "key.create", { key_id: made.key_id, hash: made.hash, scopes: [], label: "made by troupe up" }))) return false;
    keepOwnKey(home, DEMO_TENANT, made.key);
    keys.set(DEMO_TENANT, made.key);
    return true;
  }

  async function isReady(): Promise<boolean> {
    try {
      const answer = await fetch(`${gateway_url}/readyz`, { signal: AbortSignal.timeout(2_000) });
      await answer.body?.cancel();
      return answer.status === 200;
    } catch {
      return false; // not listening yet
    }
  }

  async function becomeReady(): Promise<"ready" | "late"> {
    while (world.monotonic_ms() - began_ms < READY_PATIENCE_MS) {
      if ((await demonstrate()) && (await isReady())) return "ready";
      await pause(world, 50);
    }
    return "late";
  }

  const became = await Promise.race([becomeReady(), broken, outer.asked_to_end]);
  let exit = 0;
  if (became === "ready") {
    const { session } = demonstrationModel(outer.settings);
    const key = keys.get(DEMO_TENANT)!;
    const made = await fetch(`${gateway_url}/v1/sessions`, {
      method: "POST",
      headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
      body: JSON.stringify({ id: session, agent: DEMO_AGENT }),
    });
    await made.body?.cancel();
    tell();
    say(welcome({ url: gateway_url, key, session, seconds: (world.monotonic_ms() - began_ms) / 1000, model: demonstrationModel(outer.settings).model }));
    if ((await Promise.race([outer.asked_to_end, broken])) === "broken") exit = 3;
  } else if (became === "late" || became === "broken") {
    failed ??= `not ready within ${READY_PATIENCE_MS / 1000} s; the logs are in ${join(home, "logs")}`;
    exit = 3;
  }
  if (failed !== undefined) say(failed);
  say("ending");
  await children.stop("SIGINT", STOP_PATIENCE_MS);
  await Promise.all([watching.stop(), client.stop(), directory.stop()]);
  await bus.close();
  await endServers();
  over = true;
  say("ended");
  return exit;
}

function endNow(pid: number, signal: NodeJS.Signals): void {
  try {
    if (pid > 0) process.kill(pid, signal);
  } catch {
    // it has ended already
  }
}

function welcome({ url, key, session, seconds, model }: { url: string; key: string; session: string; seconds: number; model: string }): string {
  return `
Troupe is ready after ${seconds.toFixed(1)} s.

  gateway  ${url}
  tenant   ${DEMO_TENANT}
  key      ${key}
  agent    ${DEMO_AGENT} (${model})

Say something to the session '${session}':

curl -N ${url}/v1/sessions/${session}/messages -H 'Authorization: Bearer ${key}' -H 'Accept: text/event-stream' -H 'Content-Type: application/json' -d '{"content":"Hello, Troupe! What do you remember of me?"}'

Or talk in the terminal: npx troupe chat          Ctrl-C ends everything; a second start finds it again.
`;
}
