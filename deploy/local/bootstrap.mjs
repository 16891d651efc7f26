// bootstrap: from a clone and any Node ≥ 20 to a running command. Plain JavaScript without dependencies: nothing is installed when it begins.
//
//   packages as package-lock.json says ─▶ a Node that runs TypeScript ─▶ main.ts …, or the checks
//
// Invariants:
//   I1. Packages are installed when node_modules is not what package-lock.json says, and only then; of two that start at once one installs.
//   I2. No install script of any package runs; the one thing such a script is needed for (links of Postgres) is done here.
//   I3. The command gets each signal once, whether it came from the terminal, from npm or from both, and its exit code is ours.
//   I4. The command ends when we are killed, even by kill -9: it holds a line to us (lifeline.mjs). When npm, which began us, is killed, we end it.
import { createHash } from "node:crypto";
import { spawn, spawnSync } from "node:child_process";
import { chmodSync, existsSync, lstatSync, mkdirSync, readFileSync, readdirSync, realpathSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { constants } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { withLock } from "./lock.mjs";
import { linkPostgres } from "./postgres-links.mjs";

const ROOT = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const MODULES = join(ROOT, "node_modules");
/** What was installed, from which lock file, for which machine, and the Node to go on with. */
const NOTE = join(MODULES, ".troupe.json");
/** The first that runs .ts files as they are and has all we use. */
const NODE_MAJOR_MIN = 24;
const PROGRESS_EVERY_MS = 3_000;
const PARENT_LOOK_EVERY_MS = 500;
/** npm and the terminal both pass on one Ctrl-C; a person's second one comes later than this. */
const SAME_SIGNAL_MS = 500;

/** The machine lacks something. The message tells a person what to do. */
class SetupFault extends Error {}

/**
 * Runs `main.ts …args` (or another file of the repository) under Node 24, after installing what is missing, and ends this process with its exit code.
 *
 * @param {string} file
 * @param {readonly string[]} args
 * @returns {Promise<void>}
 */
export async function launch(file, args) {
  let node;
  try {
    node = await prepare((line) => process.stderr.write(`${line}\n`));
  } catch (error) {
    if (!(error instanceof SetupFault)) throw error;
    process.stderr.write(`\n${error.message}\n`);
    process.exitCode = 3;
    return;
  }
  await run(node, join(ROOT, file), args);
}

/**
 * Installs what is missing and answers the path of a Node ≥ 24.
 * Repeats: costs a few milliseconds when everything is there.
 */
async function prepare(say) {
  checkOwnNode();
  const wanted = fingerprint();
  const present = readNote();
  if (present?.fingerprint === wanted && existsSync(present.node)) return present.node;
  return withLock(join(ROOT, ".troupe", "install.lock"), say, async () => {
    const meanwhile = readNote();
    if (meanwhile?.fingerprint === wanted && existsSync(meanwhile.node)) return meanwhile.node;
    if (!installedMatchesLock()) await install(say);
    linkPostgres(MODULES); // I2
    linkOwnCommand();
    const node = findNode();
    writeFileSync(NOTE, `${JSON.stringify({ fingerprint: wanted, node }, null, 2)}\n`);
    return node;
  });
}

function checkOwnNode() {
  const major = Number(process.versions.node.split(".")[0]);
  if (major < 20)
    throw new SetupFault(
      `Troupe starts with Node 20 or newer; this is ${process.version}.\nInstall a newer one from https://nodejs.org (or: nvm install 24) and type the same again.`,
    );
}

/** I1: changes whenever what must be in node_modules changes. */
function fingerprint() {
  const lock = readFileSync(join(ROOT, "package-lock.json"));
  return createHash("sha256").update(lock).update(`\n${process.platform} ${process.arch}`).digest("hex");
}

function readNote() {
  try {
    return JSON.parse(readFileSync(NOTE, "utf8"));
  } catch {
    return undefined; // never installed, or cut off while writing: then look at the packages themselves
  }
}

/** Whether somebody installed already, with npm and by hand: npm notes in node_modules what it put there. */
function installedMatchesLock() {
  const noted = join(MODULES, ".package-lock.json");
  if (!existsSync(noted)) return false;
  const wanted = JSON.parse(readFileSync(join(ROOT, "package-lock.json"), "utf8")).packages;
  const present = JSON.parse(readFileSync(noted, "utf8")).packages;
  return Object.entries(wanted).every(([path, { version, integrity, optional, link }]) => {
    if (path === "" || link) return true;
    const there = present[path];
    // npm leaves out what only other platforms need; a package that names this platform must be there.
    if (there === undefined) return optional === true && !isMadeForThisMachine(wanted[path]);
    return there.version === version && there.integrity === integrity && existsSync(join(ROOT, path));
  });
}

function isMadeForThisMachine({ os, cpu, libc }) {
  if (os === undefined && cpu === undefined) return false;
  const fits = (wanted, own) => {
    const list = [wanted ?? own].flat(); // one name or several, "!name" for all but that one
    return !list.includes(`!${own}`) && (list.includes(own) || list.every((one) => one.startsWith("!")));
  };
  const own_libc = process.platform !== "linux" || process.report.getReport().header.glibcVersionRuntime !== undefined ? "glibc" : "musl";
  return fits(os, process.platform) && fits(cpu, process.arch) && fits(libc, own_libc);
}

async function install(say) {
  const began_ms = Date.now();
  const seconds = () => Math.round((Date.now() - began_ms) / 1000);
  say("installing packages (npm ci), once");
  const progress = setInterval(() => say(`  still installing: ${packagesUnpacked()} packages unpacked, ${seconds()} s`), PROGRESS_EVERY_MS);
  try {
    const done = await npmCi();
    if (done.code !== 0) {
      throw new SetupFault(
        `npm ci failed:\n${done.output.trim()}\n\n` +
          "If npm could not reach its registry, check the network (behind a proxy: npm config set proxy …) and type the same again.\n" +
          `If it may not write, look who owns ${ROOT}. To see all of npm's own words: cd ${ROOT} && npm ci`,
      );
    }
  } finally {
    clearInterval(progress);
  }
  say(`packages are installed (${seconds()} s)`);
}

/** npm makes every folder at once and fills them as the packages arrive. */
function packagesUnpacked() {
  const folders = existsSync(MODULES) ? readdirSync(MODULES).filter((name) => !name.startsWith(".")) : [];
  const packages = folders.flatMap((name) => (name.startsWith("@") ? readdirSync(join(MODULES, name)).map((part) => join(name, part)) : [name]));
  return packages.filter((name) => existsSync(join(MODULES, name, "package.json"))).length;
}

function npmCi() {
  const args = ["ci", "--ignore-scripts", "--include=dev", "--include=optional", "--no-audit", "--no-fund", "--no-progress", "--loglevel=error"]; // I2
  // Under `npm start` npm tells where it lies; else it is on the PATH.
  const own = process.env.npm_execpath ?? "";
  const [file, first] = /npm-cli\.c?js$/.test(own) && existsSync(own) ? [process.execPath, [own]] : ["npm", []];
  return new Promise((resolve) => {
    let output = "";
    const child = spawn(file, [...first, ...args], { cwd: ROOT, stdio: ["ignore", "pipe", "pipe"] });
    for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => (output += data));
    child.once("error", (error) =>
      resolve({ code: 1, output: error.code === "ENOENT" ? "npm is not on the PATH; it comes with Node (Debian: apt install npm)" : error.message }),
    );
    child.once("close", (code) => resolve({ code, output }));
  });
}

/** `npx troupe` looks here. npm makes such links for packages it installs, but not for the one it installs into. */
function linkOwnCommand() {
  const link = join(MODULES, ".bin", "troupe");
  if (process.platform === "win32" || lstatSync(link, { throwIfNoEntry: false }) !== undefined) return;
  mkdirSync(dirname(link), { recursive: true });
  chmodSync(join(ROOT, "cli", "troupe.mjs"), 0o755);
  symlinkSync("../../cli/troupe.mjs", link);
}

function findNode() {
  const packaged = join(MODULES, ".bin", "node");
  const version = nodeMajor(packaged);
  if (version !== undefined && version >= NODE_MAJOR_MIN) return packaged;
  // npm puts node_modules/.bin before everything on the PATH of its scripts: a Node there that does not run would stop the next `npm start`.
  rmSync(packaged, { force: true });
  if (Number(process.versions.node.split(".")[0]) >= NODE_MAJOR_MIN) return process.execPath;
  throw new SetupFault(
    `Troupe needs Node ${NODE_MAJOR_MIN} or newer. npm has none that runs on ${process.platform}-${process.arch}, and this is ${process.version}.\n` +
      `Install Node ${NODE_MAJOR_MIN} from https://nodejs.org (or: nvm install ${NODE_MAJOR_MIN}; Alpine: apk add nodejs-current) and type the same again.`,
  );
}

function nodeMajor(file) {
  if (!existsSync(file)) return undefined;
  const answer = spawnSync(file, ["--version"], { encoding: "utf8" });
  return answer.status === 0 ? Number(/^v(\d+)\./.exec(answer.stdout)?.[1]) : undefined;
}

function run(node, file, args) {
  return new Promise((resolve) => {
    // A process group of its own, so that the terminal's Ctrl-C comes to us alone and goes on once (I3).
    const child = spawn(node, ["--import", new URL("./lifeline.mjs", import.meta.url).href, file, ...args], {
      stdio: ["inherit", "inherit", "inherit", "ipc"],
      env: { ...process.env, TROUPE_LAUNCHER_PID: String(process.pid) },
      detached: process.platform !== "win32",
    });
    const sent_at_ms = new Map();
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGWINCH", "SIGCONT"]) {
      process.on(signal, () => {
        if (Date.now() - (sent_at_ms.get(signal) ?? 0) < SAME_SIGNAL_MS && signal !== "SIGWINCH") return;
        sent_at_ms.set(signal, Date.now());
        child.kill(signal);
      });
    }
    const parent = process.ppid;
    if (process.env.npm_lifecycle_event !== undefined) {
      const watch = setInterval(() => {
        if (process.ppid === parent) return;
        clearInterval(watch);
        child.kill("SIGTERM"); // I4
      }, PARENT_LOOK_EVERY_MS);
    }
    child.once("error", (error) => {
      process.stderr.write(`${node} could not be started: ${error.message}\n`);
      process.exitCode = 3;
      resolve();
    });
    child.once("exit", (code, signal) => {
      process.exitCode = code ?? 128 + (constants.signals[signal] ?? 0);
      resolve();
      // Listeners for signals would not keep us, an inherited pipe might.
      process.exit();
    });
  });
}

if (process.argv[1] !== undefined && fileURLToPath(import.meta.url) === realpathSync(process.argv[1])) {
  const [command, ...args] = process.argv.slice(2);
  if (command === "start") await launch("main.ts", ["up", ...args]);
  else if (command === "test") await launch("test/harness/checks.ts", args);
  else {
    process.stderr.write("usage: bootstrap.mjs start|test [arguments]\n");
    process.exitCode = 2;
  }
}
