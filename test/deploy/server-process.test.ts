// Goal:   a port that is handed out for a server stays free until the server listens, also on a machine where many connections are opened meanwhile.
// Method: ports drawn, and ports that are taken.
import { createServer, type AddressInfo } from "node:net";
import { expect, test } from "vitest";
import { freePort, isFree } from "../../deploy/local/server-process.ts";

/** Where the ports begin that systems give to connections, unless somebody chose otherwise: Linux; others begin higher. */
const CONNECTIONS_FROM = 32_768;

test("a free port is none of those that the system gives to whoever opens a connection", async () => {
  const drawn = await Promise.all(Array.from({ length: 50 }, freePort));
  expect(Math.max(...drawn)).toBeLessThan(CONNECTIONS_FROM);
  expect(Math.min(...drawn)).toBeGreaterThan(1_024);
  expect(new Set(drawn).size, "they are drawn, not counted: two programs that ask at once hear different ones").toBeGreaterThan(40);
});

test("a port that somebody listens on is not free", async () => {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const { port } = server.address() as AddressInfo;
  expect(await isFree(port)).toBe(false);
  await new Promise((resolve) => server.close(resolve));
  expect(await isFree(port)).toBe(true);
});
