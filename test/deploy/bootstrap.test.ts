// Goal:   from a clone to a running command: installed once, signals and exit code passed through, nothing left behind.
// Method: the real bootstrap in a small repository of its own that has no dependencies, so that installing takes no network.
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { cpSync, existsSync, mkdirSync, readFileSync, realpathSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { beganAt, until } from "../../deploy/local/server-process.ts";
import { freshFolder } from "../harness/servers.ts";

const ROOT = join(import.meta.dirname, "..", "..");

const MAIN = `
let signals = 0;
process.on("SIGINT", () => { signals += 1; setTimeout(() => { console.log("signals", signals); process.exit(4); }, 200); });
process.on("SIGTERM", () => { console.log("asked to end"); process.exit(0); });
console.log("began", process.pid, JSON.stringify(process.argv.slice(2)));
if (process.argv[2] === "exit") process.exit(Number(process.argv[3]));
setInterval(() => undefined, 1000);
`;

function clone(): string {
  const root = freshFolder("clone");
  for (const folder of ["deploy/local", "cli"]) cpSync(join(ROOT, folder), join(root, folder), { recursive: true });
  writeFileSync(
    join(root, "package.json"),
    JSON.stringify({ name: "troupe", version: "0.0.0", private: true, type: "module", bin: { troupe: "cli/troupe.mjs" } }),
  );
  writeFileSync(
    join(root, "package-lock.json"),
    JSON.stringify({ name: "troupe", version: "0.0.0", lockfileVersion: 3, packages: { "": { name: "troupe", version: "0.0.0" } } }),
  );
  writeFileSync(join(root, "main.ts"), MAIN);
  return root;
}

interface Run {
  readonly child: ChildProcess;
  output(): string;
  readonly ended: Promise<number | null>;
}

function run(root: string, args: readonly string[]): Run {
  const env = { ...process.env, npm_config_update_notifier: "false" };
  const child = spawn(process.execPath, args, { cwd: root, env, stdio: ["ignore", "pipe", "pipe"] });
  let text = "";
  for (const stream of [child.stdout, child.stderr]) stream?.on("data", (data: Buffer) => (text += data.toString()));
  return { child, output: () => text, ended: once(child, "close").then(([code]) => code as number | null) };
}

const begin = ["deploy/local/bootstrap.mjs", "start", "--flag"];
const hasBegun = (one: Run): Promise<boolean> => until(() => one.output().includes("began"), 30_000);
const commandPid = (one: Run): number => Number(/began (\d+)/.exec(one.output())?.[1]);

test("the first start installs and says so; the second does not; arguments and exit code pass through", async () => {
  const root = clone();
  const first = run(root, ["cli/troupe.mjs", "exit", "7"]);
  expect(await first.ended).toBe(7);
  expect(first.output()).toMatch(/installing packages/);
  expect(first.output()).toContain('["exit","7"]');
  expect(realpathSync(join(root, "node_modules", ".bin", "troupe"))).toBe(realpathSync(join(root, "cli", "troupe.mjs")));
  const second = run(root, ["cli/troupe.mjs", "exit", "0"]);
  expect(await second.ended).toBe(0);
  expect(second.output()).not.toMatch(/install/);
});

test("a changed lock file is installed anew", async () => {
  const root = clone();
  await run(root, ["cli/troupe.mjs", "exit", "0"]).ended;
  const lock = join(root, "package-lock.json");
  writeFileSync(lock, `${readFileSync(lock, "utf8")}\n`);
  rmSync(join(root, "node_modules", ".package-lock.json"), { force: true });
  const again = run(root, ["cli/troupe.mjs", "exit", "0"]);
  expect(await again.ended).toBe(0);
  expect(again.output()).toMatch(/installing packages/);
});

test("packages that somebody installed by hand are taken as they are, when they are what the lock file says", async () => {
  const root = clone();
  const [here, elsewhere] = [process.platform, process.platform === "linux" ? "darwin" : "linux"];
  const locked = {
    "node_modules/plain": { version: "1.0.0" },
    "node_modules/made-for-another": { version: "1.0.0", optional: true, os: elsewhere },
    "node_modules/needed-by-another": { version: "1.0.0", optional: true },
    "node_modules/made-for-this": { version: "1.0.0", optional: true, os: [here], cpu: [process.arch] },
  };
  const packages = { "": { name: "troupe", version: "0.0.0" }, ...locked };
  writeFileSync(join(root, "package-lock.json"), JSON.stringify({ name: "troupe", version: "0.0.0", lockfileVersion: 3, packages }));
  for (const name of ["plain", "made-for-this"]) mkdirSync(join(root, "node_modules", name), { recursive: true });
  const noted = (names: readonly (keyof typeof locked)[]): void =>
    writeFileSync(
      join(root, "node_modules", ".package-lock.json"),
      JSON.stringify({ packages: Object.fromEntries(names.map((name) => [name, locked[name]])) }),
    );

  noted(["node_modules/plain", "node_modules/made-for-this"]);
  const taken = run(root, ["cli/troupe.mjs", "exit", "0"]);
  expect(await taken.ended).toBe(0);
  expect(taken.output()).not.toMatch(/installing/);

  rmSync(join(root, "node_modules", ".troupe.json"));
  noted(["node_modules/plain"]);
  const lacking = run(root, ["cli/troupe.mjs", "exit", "0"]);
  await lacking.ended;
  expect(lacking.output()).toMatch(/installing/);
});

test("of two that start at once one installs and the other waits for it", async () => {
  const root = clone();
  const both = [run(root, ["cli/troupe.mjs", "exit", "0"]), run(root, ["cli/troupe.mjs", "exit", "0"])];
  expect(await Promise.all(both.map((one) => one.ended))).toEqual([0, 0]);
  expect(both.filter((one) => one.output().includes("installing packages"))).toHaveLength(1);
  expect(existsSync(join(root, ".troupe", "install.lock"))).toBe(false);
});

test("an install that fails prints what npm said and what to do, and ends with 3", async () => {
  const root = clone();
  writeFileSync(join(root, "package.json"), JSON.stringify({ name: "troupe", version: "0.0.0", dependencies: { "not-in-the-lock": "1.0.0" } }));
  const failed = run(root, begin);
  expect(await failed.ended).toBe(3);
  expect(failed.output()).toMatch(/npm ci failed[^]*not-in-the-lock[^]*type the same again/);
  expect(failed.output()).not.toContain("began");
});

test("a signal that comes twice at once, from the terminal and from npm, reaches the command once", async () => {
  const one = run(clone(), begin);
  expect(await hasBegun(one)).toBe(true);
  one.child.kill("SIGINT");
  one.child.kill("SIGINT");
  await new Promise((resolve) => setTimeout(resolve, 50));
  one.child.kill("SIGINT");
  expect(await one.ended).toBe(4);
  expect(one.output()).toContain("signals 1");
});

test("the command ends in its own order when its launcher is killed", async () => {
  const one = run(clone(), begin);
  expect(await hasBegun(one)).toBe(true);
  const pid = commandPid(one);
  one.child.kill("SIGKILL");
  expect(await until(() => beganAt(pid) === undefined, 20_000)).toBe(true);
  await one.ended;
  expect(one.output()).toContain("asked to end");
});

test("the command ends in its own order when npm, which began its launcher, is killed", async () => {
  const script = `npm_lifecycle_event=start ${JSON.stringify(process.execPath)} ${begin.join(" ")} & wait`;
  const child = spawn("sh", ["-c", script], { cwd: clone(), stdio: ["ignore", "pipe", "pipe"] });
  let text = "";
  child.stdout.on("data", (data: Buffer) => (text += data.toString()));
  const closed = once(child, "close");
  expect(await until(() => text.includes("began"), 30_000)).toBe(true);
  child.kill("SIGKILL");
  await closed; // its output is held open by whoever still runs
  expect(text).toContain("asked to end");
});

test("a Node in node_modules that does not run here is not used", async () => {
  const root = clone();
  mkdirSync(join(root, "node_modules", ".bin"), { recursive: true });
  writeFileSync(join(root, "node_modules", ".package-lock.json"), JSON.stringify({ packages: {} }));
  symlinkSync("/dev/null", join(root, "node_modules", ".bin", "node"));
  const one = run(root, ["cli/troupe.mjs", "exit", "5"]);
  expect(await one.ended).toBe(5);
  expect(existsSync(join(root, "node_modules", ".bin", "node"))).toBe(false);
});
