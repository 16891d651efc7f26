// chaos-proxy: a wire between one worker and its broker that can be cut. Every connection of the worker passes through here and is told by the
// name that it gives itself.
//
//   open ──cut(name)──▶ that connection closed, a new one passes ──sever()──▶ all closed, none passes ──mend()──▶ open
import { createServer, connect, type AddressInfo, type Socket } from "node:net";

export interface Proxy {
  readonly url: string;
  /** Closes the connections whose name fits; answers how many. */
  cut(fits: (name: string) => boolean): number;
  /** Closes all, and lets none pass until it is mended. */
  sever(): void;
  mend(): void;
  close(): Promise<void>;
}

export async function startProxy(target: string): Promise<Proxy> {
  const { hostname, port } = new URL(target);
  const wires = new Set<{ name: string; client: Socket; server: Socket }>();
  let severed = false;
  const proxy = createServer((client) => {
    if (severed) {
      client.destroy();
      return;
    }
    client.setNoDelay(true);
    const server = connect(Number(port), hostname);
    server.setNoDelay(true);
    const wire = { name: "", client, server };
    wires.add(wire);
    const end = (): void => {
      wires.delete(wire);
      client.destroy();
      server.destroy();
    };
    // The client's first words are CONNECT {…,"name":"worker-w1",…}.
    client.once("data", (bytes: Buffer) => (wire.name = /"name":"([^"]*)"/.exec(bytes.toString("latin1"))?.[1] ?? ""));
    client.pipe(server);
    server.pipe(client);
    for (const socket of [client, server]) {
      socket.on("error", end);
      socket.on("close", end);
    }
  });
  await new Promise<void>((resolve, reject) => {
    proxy.once("error", reject);
    proxy.listen(0, "127.0.0.1", resolve);
  });
  const cut = (fits: (name: string) => boolean): number => {
    const found = [...wires].filter(({ name }) => fits(name));
    for (const { client, server } of found) {
      client.destroy();
      server.destroy();
    }
    return found.length;
  };
  return {
    url: `nats://127.0.0.1:${(proxy.address() as AddressInfo).port}`,
    cut,
    sever() {
      severed = true;
      cut(() => true);
    },
    mend() {
      severed = false;
    },
    async close() {
      const closed = new Promise<void>((resolve) => proxy.close(() => resolve()));
      cut(() => true);
      await closed;
    },
  };
}
