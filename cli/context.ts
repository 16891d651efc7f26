// context: what one run of a command works with. Connections are made when first asked for, once, and closed at the end.
import type { CommandClient } from "../actors/client.ts";
import { createCommandClient } from "../actors/client.ts";
import { createDirectory, type Directory } from "../actors/directory.ts";
import { createRestorer, type Restorer } from "../actors/restore.ts";
import type { Bus } from "../bus/port.ts";
import type { Database } from "../projections/database.ts";
import { createQueries, type Queries } from "../projections/queries.ts";
import { principalWord } from "../protocol/principal.ts";
import { cores } from "../state-machines/kinds.ts";
import { type DevFileReading, homeDirectory, readDevFile } from "./dev-file.ts";
import type { CliPorts } from "./ports.ts";
import type { Printer } from "./printer.ts";

/** Something that the command needs does not answer: exit code 3. */
export class Unreachable extends Error {
  override readonly name = "Unreachable";
  readonly what: string;
  constructor(what: string, cause: unknown) {
    super(`${what} cannot be reached: ${cause instanceof Error ? cause.message || cause.name : String(cause)}`, { cause });
    this.what = what;
  }
}

export interface Context {
  readonly ports: CliPorts;
  readonly printer: Printer;
  bus(): Promise<Bus>;
  database(): Promise<Database>;
  queries(): Promise<Queries>;
  restorer(): Promise<Restorer>;
  directory(): Promise<Directory>;
  commands(): Promise<CommandClient>;
  dev(): Promise<DevFileReading>;
  /** Was a connection made, and is it down now? Then what failed, failed for that. */
  lost(): boolean;
  close(): Promise<void>;
}

function once<T>(make: () => Promise<T>): () => Promise<T> {
  let made: Promise<T> | undefined;
  return () => (made ??= make());
}

export function createContext(ports: CliPorts, printer: Printer): Context {
  const { world, log } = ports;
  let opened: Bus | undefined;
  // Last opened is closed first.
  const closers: (() => Promise<void>)[] = [];
  const bus = once(async () => {
    const connected = await ports.connectBus().catch((error: unknown): never => {
      throw new Unreachable("NATS", error);
    });
    opened = connected;
    closers.push(() => connected.close());
    return connected;
  });
  const database = once(async () => {
    const connected = await ports.openDatabase().catch((error: unknown): never => {
      throw new Unreachable("Postgres", error);
    });
    closers.push(() => connected.close());
    return connected;
  });
  const restorer = once(async () => createRestorer({ bus: await bus(), cores, log }));
  return {
    ports,
    printer,
    bus,
    database,
    restorer,
    queries: once(async () => createQueries(await database())),
    directory: once(async () => {
      const directory = createDirectory({ bus: await bus(), restorer: await restorer(), world, log });
      closers.push(() => directory.stop());
      return directory;
    }),
    commands: once(async () => {
      const commands = createCommandClient({ bus: await bus(), world, principal: principalWord(`login:${await ports.login()}`) });
      closers.push(() => commands.stop());
      return commands;
    }),
    dev: once(() => readDevFile(homeDirectory(ports.env, ports.working_directory))),
    lost: () => opened !== undefined && opened.state === "disconnected",
    async close() {
      for (const close of closers.reverse()) await close();
    },
  };
}
