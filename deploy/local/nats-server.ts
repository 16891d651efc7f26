// nats-server: finds the broker's program on this machine, or gets it.
//
//   TROUPE_NATS_SERVER ─▶ PATH ─▶ our cache ─▶ official release ─▶ the distribution's package ─▶ instructions
//
// The first that is new enough is taken; each step that fails says why, and the last resort prints them all. A broker that is named
// and too old is a mistake to be told, not a reason to look elsewhere.
//
// Invariants:
//   S1. A program runs only if its bytes have the hash noted when it was installed, or if the machine's owner put it on the PATH.
//   S2. The cache never shows a half-made program: everything is made under another name and renamed.
import { createHash } from "node:crypto";
import { spawnSync } from "node:child_process";
import {
  accessSync,
  chmodSync,
  constants,
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { homedir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { compareVersions, unpackDebianPackage } from "./debian-package.ts";
import { download } from "./download.ts";
import { withLock } from "./lock.mjs";
import { SetupFault } from "./setup-fault.ts";

/** Message schedules, per-message TTL and atomic batches came with 2.12. */
const VERSION_MIN = "2.12.0";
/** What is fetched from the official release when the machine has none. Its archive is checked against the release's own SHA256SUMS. */
const RELEASE = "2.15.1";
const RELEASE_PAGE = "https://github.com/nats-io/nats-server/releases";
const ARCHIVE_BYTES_MAX = 64 << 20;
const ARCHITECTURES: Readonly<Record<string, string>> = { x64: "amd64", arm64: "arm64" };
const USUAL_FOLDERS = ["/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/opt/homebrew/bin"];

export interface NatsServerProgram {
  readonly path: string;
  readonly version: string;
  /** In words for a person: "TROUPE_NATS_SERVER", "PATH", "cache", "release 2.15.1", "Debian package 2.15.1-1". */
  readonly origin: string;
}

export interface NatsServerOptions {
  readonly env: NodeJS.ProcessEnv;
  readonly say: (line: string) => void;
  /** Default `${XDG_CACHE_HOME:-~/.cache}/troupe`; where that cannot be written, node_modules/.cache/troupe. */
  readonly cache_directory?: string;
  /** Where else than on the PATH it usually lies; in tests nowhere. */
  readonly usual_folders?: readonly string[];
}

/**
 * The broker's program, newer than 2.12.
 *
 * Refuses: with a SetupFault that tells what was tried and what to do. `TROUPE_OFFLINE=1` skips the downloads.
 * Repeats: the second call finds the first one's cache; two at once download once.
 */
export async function ensureNatsServer(options: NatsServerOptions): Promise<NatsServerProgram> {
  const { env, say } = options;
  const named = env.TROUPE_NATS_SERVER;
  if (named !== undefined && named !== "") return namedProgram(named);

  const reasons: string[] = [];
  const found = onPath(env, options.usual_folders ?? USUAL_FOLDERS, reasons);
  if (found !== undefined) return found;

  const cache = join(options.cache_directory ?? cacheDirectory(env), "nats-server");
  const cached = fromCache(cache);
  if (cached !== undefined) return cached;
  if (env.TROUPE_OFFLINE === "1") throw new SetupFault(instructions(["TROUPE_OFFLINE=1: nothing is downloaded", ...reasons]));

  mkdirSync(cache, { recursive: true });
  return withLock(join(cache, "lock"), say, async () => {
    const meanwhile = fromCache(cache);
    if (meanwhile !== undefined) return meanwhile;
    for (const leftover of readdirSync(cache).filter((name) => name.startsWith("new-"))) rmSync(join(cache, leftover), { recursive: true, force: true });
    say("nats-server is not on this machine; getting it");
    for (const fetchProgram of [fromRelease, fromDistribution]) {
      const directory = mkdtempSync(join(cache, "new-"));
      try {
        const got = await fetchProgram(directory, options);
        if (got.kind === "failed") {
          reasons.push(...got.reasons);
          continue;
        }
        const installed = install(cache, got.program, got.origin);
        if (typeof installed !== "string") {
          say(`nats-server ${installed.version} is ready (${installed.origin})`);
          return installed;
        }
        reasons.push(`${got.origin}: ${installed}`);
      } finally {
        rmSync(directory, { recursive: true, force: true });
      }
    }
    throw new SetupFault(instructions(reasons));
  });
}

function namedProgram(path: string): NatsServerProgram {
  const version = versionOf(path);
  if (version === undefined) throw new SetupFault(`TROUPE_NATS_SERVER names ${path}, which does not run as a nats-server. Correct it, or unset it.`);
  if (compareVersions(version, VERSION_MIN) < 0) {
    throw new SetupFault(`TROUPE_NATS_SERVER names ${path}, version ${version}; Troupe needs ${VERSION_MIN} or newer. Correct it, or unset it.`);
  }
  return { path, version, origin: "TROUPE_NATS_SERVER" };
}

function onPath(env: NodeJS.ProcessEnv, usual_folders: readonly string[], reasons: string[]): NatsServerProgram | undefined {
  const folders = new Set([...(env.PATH ?? "").split(delimiter), ...usual_folders].filter((folder) => folder !== ""));
  for (const folder of folders) {
    const path = join(folder, "nats-server");
    if (!isExecutable(path)) continue;
    const version = versionOf(path);
    if (version !== undefined && compareVersions(version, VERSION_MIN) >= 0) return { path, version, origin: "PATH" };
    reasons.push(`${path}: ${version === undefined ? "does not run" : `version ${version} is older than ${VERSION_MIN}`}`);
  }
  return undefined;
}

interface CacheNote {
  readonly version: string;
  readonly sha256: string;
  readonly origin: string;
}

/** The newest program of the cache whose bytes are the noted ones (S1). */
function fromCache(cache: string): NatsServerProgram | undefined {
  if (!existsSync(cache)) return undefined;
  const programs = readdirSync(cache)
    .filter((name) => name.endsWith(`-${process.platform}-${process.arch}`))
    .flatMap((name) => {
      const path = join(cache, name, "nats-server");
      const note_file = join(cache, name, "note.json");
      if (!existsSync(path) || !existsSync(note_file)) return [];
      const note = JSON.parse(readFileSync(note_file, "utf8")) as CacheNote;
      return compareVersions(note.version, VERSION_MIN) >= 0 ? [{ path, note }] : [];
    })
    .sort((a, b) => compareVersions(b.note.version, a.note.version));
  const good = programs.find(({ path, note }) => sha256Of(path) === note.sha256 && versionOf(path) === note.version);
  return good === undefined ? undefined : { path: good.path, version: good.note.version, origin: `cache, from the ${good.note.origin}` };
}

/** Moves a fetched program into the cache (S2), or says why it is unfit. */
function install(cache: string, program: string, origin: string): NatsServerProgram | string {
  chmodSync(program, 0o755);
  const version = versionOf(program);
  if (version === undefined) return "the program does not run on this machine";
  if (compareVersions(version, VERSION_MIN) < 0) return `version ${version} is older than ${VERSION_MIN}`;
  const staged = mkdtempSync(join(cache, "new-"));
  const note: CacheNote = { version, sha256: sha256Of(program), origin };
  copyFileSync(program, join(staged, "nats-server"));
  chmodSync(join(staged, "nats-server"), 0o755);
  chmodSync(staged, 0o755);
  writeFileSync(join(staged, "note.json"), `${JSON.stringify(note, null, 2)}\n`);
  const place = join(cache, `${version}-${process.platform}-${process.arch}`);
  rmSync(place, { recursive: true, force: true });
  renameSync(staged, place);
  return { path: join(place, "nats-server"), version, origin };
}

type Fetched =
  | { readonly kind: "fetched"; readonly program: string; readonly origin: string }
  | { readonly kind: "failed"; readonly reasons: readonly string[] };

/** The official archive; its hash is read from the release's SHA256SUMS over HTTPS. */
async function fromRelease(directory: string, { env, say }: NatsServerOptions): Promise<Fetched> {
  const failed = (reason: string): Fetched => ({ kind: "failed", reasons: [`official release ${RELEASE}: ${reason}`] });
  const architecture = ARCHITECTURES[process.arch];
  if (architecture === undefined || (process.platform !== "linux" && process.platform !== "darwin"))
    return failed(`none for ${process.platform}-${process.arch}`);
  const name = `nats-server-v${RELEASE}-${process.platform}-${architecture}`;
  const base = `${RELEASE_PAGE}/download/v${RELEASE}`;
  say(`asking for the official release ${RELEASE}`);
  const sums = await download(`${base}/SHA256SUMS`, { bytes_max: 1 << 20, env });
  if (sums.kind === "failed") return failed(sums.reason);
  const wanted = new RegExp(`^([0-9a-f]{64})\\s+\\*?${name.replaceAll(".", "\\.")}\\.tar\\.gz$`, "m").exec(sums.data.toString("utf8"))?.[1];
  if (wanted === undefined) return failed(`its SHA256SUMS does not list ${name}.tar.gz`);
  say(`downloading ${name}.tar.gz`);
  const archive = await download(`${base}/${name}.tar.gz`, { bytes_max: ARCHIVE_BYTES_MAX, env });
  if (archive.kind === "failed") return failed(archive.reason);
  if (createHash("sha256").update(archive.data).digest("hex") !== wanted) return failed("the archive does not have the hash it should");
  const file = join(directory, "archive.tar.gz");
  writeFileSync(file, archive.data);
  const unpacked = spawnSync("tar", ["-xzf", file, "-C", directory], { encoding: "utf8" });
  if (unpacked.status !== 0) return failed(`tar: ${unpacked.error?.message ?? unpacked.stderr.trim()}`);
  return { kind: "fetched", program: join(directory, name, "nats-server"), origin: `release ${RELEASE}` };
}

async function fromDistribution(directory: string, { env, say }: NatsServerOptions): Promise<Fetched> {
  if (process.platform !== "linux") return { kind: "failed", reasons: [] };
  const got = await unpackDebianPackage("nats-server", directory, { env, say });
  if (got.kind === "failed") return { kind: "failed", reasons: got.reasons.map((reason) => `distribution's package: ${reason}`) };
  const program = ["usr/sbin/nats-server", "usr/bin/nats-server"].map((path) => join(directory, path)).find((path) => existsSync(path));
  if (program === undefined) return { kind: "failed", reasons: [`distribution's package ${got.version}: there is no program in it`] };
  return { kind: "fetched", program, origin: `distribution's package ${got.version}` };
}

function instructions(reasons: readonly string[]): string {
  return [
    `Troupe needs nats-server ${VERSION_MIN} or newer, and could not get it:`,
    ...reasons.map((reason) => `  - ${reason}`),
    "Do one of these, then start again:",
    "  macOS:            brew install nats-server",
    `  any system:       download it from ${RELEASE_PAGE}, unpack it,`,
    "                    and put nats-server on the PATH or set TROUPE_NATS_SERVER=/path/to/nats-server",
    "  behind a proxy:   set HTTPS_PROXY and HTTP_PROXY",
  ].join("\n");
}

function cacheDirectory(env: NodeJS.ProcessEnv): string {
  const usual = join(env.XDG_CACHE_HOME || join(env.HOME || homedir(), ".cache"), "troupe");
  try {
    mkdirSync(usual, { recursive: true });
    accessSync(usual, constants.W_OK);
    return usual;
  } catch {
    // A home that is read-only, or nobody's: the repository is ours to write.
    return join(dirname(dirname(dirname(fileURLToPath(import.meta.url)))), "node_modules", ".cache", "troupe");
  }
}

function versionOf(path: string): string | undefined {
  const answer = spawnSync(path, ["--version"], { encoding: "utf8", timeout: 10_000 });
  return /^nats-server: v(\d+\.\d+\.\d+)/m.exec(answer.stdout ?? "")?.[1];
}

function sha256Of(path: string): string {
  return createHash("sha256").update(readFileSync(path)).digest("hex");
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}
