// bus-grounds: what the contract of the bus runs on: the in-memory broker, and a real nats-server with a wire to each connection that
// can be silenced, frozen and cut. A test says what happens to the network; each ground makes it happen in its own way.
import { connect as dial, createServer, type Server, type Socket } from "node:net";
import { setTimeout as sleep } from "node:timers/promises";
import type { Log, LogFields } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import { realWorld as createRealWorld } from "../../roles/real-world.ts";
import { connectJetStream } from "../../bus/jetstream.ts";
import { createMemoryBroker, type Faults } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { type NatsServer, startNatsServer } from "./nats-server.ts";

export const SHARDS = 16;
export const LEASE_TTL_MS = 2_000;

export interface Ground {
  readonly name: "memory" | "jetstream";
  connect(name: string): Promise<Bus>;
  /** From now on `name` hears no answers, while what it says arrives; `restore` makes its connection whole again (as a new one). */
  silence(name: string): void;
  restore(name: string): Promise<void>;
  /** The process stops without a word; its socket stays open. */
  freeze(name: string): void;
  /** The process dies. */
  kill(name: string): void;
  down(): Promise<void>;
  up(): Promise<void>;
  /** Log lines at warn and error. */
  readonly complaints: readonly string[];
  stop(): Promise<void>;
}

export const realWorld: World = createRealWorld();

export function listeningLog(): { log: Log; complaints: string[] } {
  const complaints: string[] = [];
  const note = (what: string, fields?: LogFields): void => void complaints.push(`${what} ${JSON.stringify(fields ?? {})}`);
  const log: Log = { debug() {}, info() {}, warn: note, error: note, with: () => log };
  return { log, complaints };
}

export function memoryGround(options: { commands_bytes_max?: number; faults?: Faults } = {}): Promise<Ground> {
  const { log, complaints } = listeningLog();
  const silenced = new Set<string>();
  const faults: Faults = {
    before: (operation) => options.faults?.before?.(operation),
    after: (operation) => (silenced.has(operation.connection) ? { kind: "lose_answer" } : options.faults?.after?.(operation)),
  };
  const broker = createMemoryBroker({ ...options, world: realWorld, shards: SHARDS, lease_ttl_ms: LEASE_TTL_MS, log, faults });
  const names = new Set<string>();
  let rise = (): void => {};
  return Promise.resolve({
    name: "memory",
    complaints,
    connect: (name) => {
      names.add(name);
      return Promise.resolve(broker.connect(name));
    },
    silence: (name) => void silenced.add(name),
    restore: async (name) => {
      silenced.delete(name);
      broker.cut(name);
      await sleep(10);
      broker.mend(name);
    },
    freeze: (name) => broker.cut(name),
    kill: (name) => broker.kill(name),
    down: async () => {
      for (const name of names) broker.cut(name);
      rise = () => names.forEach((name) => broker.mend(name));
    },
    up: async () => rise(),
    stop: async () => {
      for (const name of names) broker.kill(name);
    },
  });
}

export async function jetStreamGround(options: { commands_bytes_max?: number } = {}): Promise<Ground & { readonly server: NatsServer }> {
  const { log, complaints } = listeningLog();
  const server = await startNatsServer();
  const wires = new Map<string, Wire>();
  const buses: Bus[] = [];
  return {
    name: "jetstream",
    complaints,
    server,
    async connect(name) {
      const wire = await openWire(server.url);
      wires.set(name, wire);
      const bus = await connectJetStream({
        ...options,
        servers: wire.url,
        name,
        shards: SHARDS,
        replicas: 1,
        lease_ttl_ms: LEASE_TTL_MS,
        log,
        world: realWorld,
      });
      buses.push(bus);
      return bus;
    },
    silence: (name) => wires.get(name)?.silence(),
    restore: async (name) => wires.get(name)?.restore(),
    freeze: (name) => wires.get(name)?.freeze(),
    kill: (name) => void wires.get(name)?.close(),
    down: () => server.kill(),
    up: () => server.start(),
    async stop() {
      for (const bus of buses) await Promise.race([bus.close(), sleep(500)]);
      for (const wire of wires.values()) await wire.close();
      await server.stop();
    },
  };
}

interface Wire {
  readonly url: string;
  silence(): void;
  freeze(): void;
  restore(): void;
  close(): Promise<void>;
}

/** A TCP relay to the broker, for one client. */
async function openWire(url: string): Promise<Wire> {
  const target = new URL(url);
  const pairs = new Set<[Socket, Socket]>();
  let silent = false;
  let frozen = false;
  const server: Server = createServer((client) => {
    const broker = dial(Number(target.port), target.hostname);
    const pair: [Socket, Socket] = [client, broker];
    pairs.add(pair);
    client.on("data", (bytes) => frozen || broker.write(bytes));
    broker.on("data", (bytes) => silent || frozen || client.write(bytes));
    for (const socket of pair) {
      socket.on("error", () => socket.destroy());
      socket.on("close", () => {
        for (const other of pair) other.destroy();
        pairs.delete(pair);
      });
    }
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const address = server.address();
  if (address === null || typeof address === "string") throw new Error("a TCP server has a port");
  const cut = (): void => pairs.forEach((pair) => pair.forEach((socket) => socket.destroy()));
  return {
    url: `nats://127.0.0.1:${address.port}`,
    silence: () => void (silent = true),
    freeze: () => void (frozen = true),
    restore() {
      silent = false;
      frozen = false;
      cut();
    },
    async close() {
      server.close();
      cut();
    },
  };
}
