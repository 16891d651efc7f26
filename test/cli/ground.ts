// ground: a whole Troupe in one thread for tests of the command: broker in memory, one worker with simulated models, and the command's ports.
import { Readable } from "node:stream";
import { createAdmission } from "../../actors/admission.ts";
import { createDirectory } from "../../actors/directory.ts";
import { createPerformers } from "../../actors/performers.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost } from "../../actors/shard-host.ts";
import { createTurnFinder } from "../../actors/turn-finder.ts";
import { createMemoryBroker, type MemoryBroker } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import type { CliPorts } from "../../cli/ports.ts";
import { runCli } from "../../cli/run.ts";
import { silentLog } from "../../protocol/log.ts";
import { createProviders } from "../../providers/registry.ts";
import { realWorld } from "../../roles/real-world.ts";
import { cores } from "../../state-machines/kinds.ts";

const SHARDS = 2;

export interface Ran {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
  /** stdout as JSON lines. */
  lines(): Record<string, never>[];
}

export interface RanOptions extends Partial<CliPorts> {
  readonly input?: string;
}

/** Runs the command once with everything absent that is not given. */
export async function run(argv: readonly string[], { input, ...ports }: RanOptions = {}): Promise<Ran> {
  let stdout = "";
  let stderr = "";
  const absent = (what: string) => () => Promise.reject(new Error(`no ${what} here`));
  const role = (name: string) => async (options: object) => {
    stdout += `${name} ${JSON.stringify(options)}\n`;
    return 0;
  };
  const code = await runCli(argv, {
    world: realWorld(),
    log: silentLog,
    env: {},
    working_directory: "/nowhere",
    stdin: Readable.from(input === undefined ? [] : [input]),
    stdout: { write: (text) => void (stdout += text) },
    stderr: { write: (text) => void (stderr += text) },
    node_version: "v24.0.0",
    random_bytes: (count) => new Uint8Array(count).fill(7),
    fetch: absent("gateway"),
    on_interrupt: () => () => {},
    connectBus: absent("broker"),
    login: async () => "operator",
    master_keys: {
      read: () => {
        throw new Error("no master keys here");
      },
      add: () => {
        throw new Error("no master keys here");
      },
    },
    openDatabase: absent("database"),
    auditSubstrate: async () => [],
    roles: { up: role("up"), worker: role("worker"), supervisor: role("supervisor"), gateway: role("gateway"), projector: role("projector") },
    ...ports,
  });
  return {
    code,
    stdout,
    stderr,
    lines: () =>
      stdout
        .trim()
        .split("\n")
        .map((line) => JSON.parse(line) as Record<string, never>),
  };
}

export interface Ground {
  readonly broker: MemoryBroker;
  readonly bus: Bus;
  /** Ports that reach this ground's broker. */
  readonly ports: Pick<CliPorts, "connectBus">;
  cli(argv: readonly string[], options?: RanOptions): Promise<Ran>;
  stop(): Promise<void>;
}

export async function startGround(): Promise<Ground> {
  const world = realWorld();
  const log = silentLog;
  const broker = createMemoryBroker({ world, shards: SHARDS });
  const bus = broker.connect("worker");
  const restorer = createRestorer({ bus, cores, log });
  const directory = createDirectory({ bus, restorer, world, log });
  const providers = createProviders({ world, log });
  const turns = createTurnFinder({ bus, restorer });
  let commits = 0;
  const host = createShardHost({
    bus,
    world,
    log,
    cores,
    restorer,
    performers: createPerformers({ world, directory, providers, turns }),
    worker: "w1",
    next_commit_id: () => `w1.${commits++}`,
    may_act: () => true,
    on_conflict: async () => "mine",
    admit: createAdmission({ directory, providers, turns }),
  });
  for (let shard = 0; shard < SHARDS; shard += 1) await host.take(shard, 1, { worker: null, reason: "first" });
  let connections = 0;
  const ports = { connectBus: async () => broker.connect(`cli-${++connections}`) };
  return {
    broker,
    bus,
    ports,
    cli: (argv, options = {}) => run(argv, { ...ports, ...options }),
    async stop() {
      await host.stop();
      await directory.stop();
      await bus.close();
    },
  };
}
