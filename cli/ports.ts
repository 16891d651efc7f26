// ports: what the command line needs of the world. main.ts makes the real ones; tests make theirs.
import type { Readable } from "node:stream";
import type { Bus } from "../bus/port.ts";
import type { Database } from "../projections/database.ts";
import type { MasterKey } from "../protocol/key-ring.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";

/** 0 done, 1 refused or found a violation, 2 wrong usage, 3 unreachable. */
export const EXIT = { done: 0, refused: 1, usage: 2, unreachable: 3 } as const;

/** Where text goes. A terminal says so. */
export interface TextOutput {
  write(text: string): unknown;
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
}
export type TextInput = Readable & { readonly isTTY?: boolean };

export interface UpOptions {
  /** The gateway's port; 0 for any. Undefined: TROUPE_PORT, else 8787. */
  readonly port: number | undefined;
  readonly workers: number;
  /** Fixed with the first start of a data directory. Undefined: the default for embedded use. */
  readonly shards: number | undefined;
}
/** What every role that runs alone is told. */
export interface RoleOptions {
  /** Its name among its like; undefined for a fresh one. */
  readonly id: string | undefined;
  /** Where /healthz, /readyz and /metrics are served; 0 for any port. */
  readonly http_port: number;
}
export interface GatewayOptions extends RoleOptions {
  readonly host: string;
}
export interface ProjectorOptions extends RoleOptions {
  /** Empties what was projected and projects the streams from their beginning. */
  readonly rebuild: boolean;
}

/** Each runs until it is told to stop, and answers an exit code. */
export interface Roles {
  up(options: UpOptions): Promise<number>;
  worker(options: RoleOptions): Promise<number>;
  supervisor(options: RoleOptions): Promise<number>;
  gateway(options: GatewayOptions): Promise<number>;
  projector(options: ProjectorOptions): Promise<number>;
}

/** One setting of the broker that is not as it must be. */
export interface SubstrateFinding {
  readonly level: "refuse" | "warn";
  readonly what: string;
  readonly have: string;
  readonly want: string;
}

export interface CliPorts {
  readonly world: World;
  readonly log: Log;
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Absolute: where relative paths begin. */
  readonly working_directory: string;
  readonly stdin: TextInput;
  readonly stdout: TextOutput;
  readonly stderr: TextOutput;
  /** `process.version` */
  readonly node_version: string;
  /** Unguessable in the real world: keys are made of them. */
  random_bytes(count: number): Uint8Array;
  fetch(url: string, init?: RequestInit): Promise<Response>;
  /** Hears Ctrl-C (SIGINT, SIGTERM) until the answer is called; while somebody hears it, the process does not end by itself. */
  on_interrupt(listener: () => void): () => void;
  /** With the operator's credentials. Rejects when there is no broker. */
  connectBus(): Promise<Bus>;
  /** The user under which `connectBus` comes onto the bus: in whose name commands are said. */
  login(): Promise<string>;
  /** What tenants' own provider keys rest under. Both throw with a sentence for people when there are none here, or they cannot be read or written. */
  readonly master_keys: {
    /** The one that seals first. */
    read(): readonly MasterKey[];
    /** Puts a fresh one before the others, and answers its id. */
    add(): string;
  };
  /** Rejects when none is configured or it cannot be reached. */
  openDatabase(): Promise<Database>;
  /** Compares the broker with what is declared; what is as it must be is not named. */
  auditSubstrate(bus: Bus, options: { monitor_url?: string }): Promise<readonly SubstrateFinding[]>;
  readonly roles: Roles;
}
