// debian-package: one package out of the distribution this machine already trusts, unpacked into a folder of ours. Neither apt nor dpkg's
// database is touched and no root is needed.
//
//   apt's own sources ─▶ mirror ─▶ InRelease (signature) ─▶ index (hash) ─▶ .deb (hash) ─▶ unpacked by dpkg-deb
//
// Invariants:
//   D1. Every byte used is under a hash that leads up to InRelease, and InRelease is signed by the distribution's own key, or, where the
//       machine has no gpgv, came over HTTPS.
//   D2. Nothing is written outside the folder that was named.
import { createHash } from "node:crypto";
import { spawnSync } from "node:child_process";
import { existsSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";
import { download } from "./download.ts";

const INRELEASE_BYTES_MAX = 4 << 20;
const INDEX_BYTES_MAX = 64 << 20;
const PACKAGE_BYTES_MAX = 64 << 20;
/** A machine names one or two mirrors; more than that is a list of special repositories. */
const MIRRORS_MAX = 4;
const ARCHITECTURES: Readonly<Record<string, string>> = { x64: "amd64", arm64: "arm64" };

export type PackageOutcome =
  | { readonly kind: "unpacked"; readonly version: string; readonly host: string }
  | { readonly kind: "failed"; readonly reasons: readonly string[] };

export interface AptSource {
  readonly uri: string;
  readonly suites: readonly string[];
  readonly components: readonly string[];
  readonly signed_by?: string;
}

interface Distribution {
  readonly origin: "Debian" | "Ubuntu";
  /** Where the newest packages are, best first. */
  readonly suites: readonly string[];
  readonly component: string;
  readonly keyring: string;
}

const DISTRIBUTIONS: Readonly<Record<string, Distribution>> = {
  debian: { origin: "Debian", suites: ["forky", "sid"], component: "main", keyring: "/usr/share/keyrings/debian-archive-keyring.gpg" },
  ubuntu: { origin: "Ubuntu", suites: ["devel"], component: "universe", keyring: "/usr/share/keyrings/ubuntu-archive-keyring.gpg" },
};

/**
 * Fetches the newest package of this name and unpacks it into `directory`.
 *
 * Refuses: a system that is not Debian-like, one whose C library is older than the package wants, anything whose signature or hash is wrong.
 */
export async function unpackDebianPackage(
  name: string,
  directory: string,
  options: { env: NodeJS.ProcessEnv; say: (line: string) => void },
): Promise<PackageOutcome> {
  const failed = (...reasons: string[]): PackageOutcome => ({ kind: "failed", reasons });
  const system = osRelease();
  const distribution = DISTRIBUTIONS[system.id] ?? system.like.map((one) => DISTRIBUTIONS[one]).find((one) => one !== undefined);
  if (distribution === undefined) return failed("this system is not Debian or Ubuntu");
  const architecture = ARCHITECTURES[process.arch];
  const glibc = glibcVersion();
  if (architecture === undefined || glibc === undefined) return failed(`no package for ${process.arch}${glibc === undefined ? " without glibc" : ""}`);
  if (spawnSync("dpkg-deb", ["--version"], { stdio: "ignore" }).status !== 0) return failed("dpkg-deb is not there");
  const mirrors = mirrorsOf(aptSources(), system.codename);
  if (mirrors.length === 0) return failed("apt has no mirror configured");

  const reasons: string[] = [];
  for (const mirror of mirrors.slice(0, MIRRORS_MAX)) {
    for (const suite of distribution.suites) {
      const got = await fromSuite({ name, directory, mirror, suite, distribution, architecture, glibc, ...options });
      if (got.kind === "unpacked") return got;
      reasons.push(...got.reasons.map((reason) => `${suite}: ${reason}`));
    }
  }
  return failed(...reasons);
}

interface SuiteQuest {
  readonly name: string;
  readonly directory: string;
  readonly mirror: AptSource;
  readonly suite: string;
  readonly distribution: Distribution;
  readonly architecture: string;
  readonly glibc: string;
  readonly env: NodeJS.ProcessEnv;
  readonly say: (line: string) => void;
}

async function fromSuite(quest: SuiteQuest): Promise<PackageOutcome> {
  const { name, suite, distribution, architecture, env } = quest;
  const failed = (reason: string): PackageOutcome => ({ kind: "failed", reasons: [reason] });

  // D1: signed, or over HTTPS.
  const keyring = [quest.mirror.signed_by, distribution.keyring].find((file) => file !== undefined && existsSync(file));
  const can_verify = keyring !== undefined && spawnSync("gpgv", ["--version"], { stdio: "ignore" }).status === 0;
  const base = can_verify ? quest.mirror.uri : quest.mirror.uri.replace(/^http:/, "https:");
  const host = new URL(base).host;

  const release = await download(`${base}/dists/${suite}/InRelease`, { bytes_max: INRELEASE_BYTES_MAX, env });
  if (release.kind === "failed") return failed(release.reason);
  const text = can_verify ? verified(release.data, keyring) : release.data.toString("utf8");
  if (text === undefined) return failed(`${host}: the signature of its list is not one of ${keyring}`);
  if (!new RegExp(`^Origin: ${distribution.origin}$`, "m").test(text)) return failed(`${host} is not a mirror of ${distribution.origin}`);

  const index_path = `${distribution.component}/binary-${architecture}/Packages.gz`;
  const index_hash = new RegExp(`^ ([0-9a-f]{64}) +\\d+ ${index_path.replaceAll(".", "\\.")}$`, "m").exec(text)?.[1];
  if (index_hash === undefined) return failed(`${host} has no index for ${architecture}`);
  quest.say(`reading the package list of ${distribution.origin} ${suite}`);
  const index = await download(`${base}/dists/${suite}/${index_path.replace("Packages.gz", `by-hash/SHA256/${index_hash}`)}`, {
    bytes_max: INDEX_BYTES_MAX,
    env,
  });
  if (index.kind === "failed") return failed(index.reason);
  if (sha256(index.data) !== index_hash) return failed(`${host}: the package list does not have the hash it should`);

  const entry = packageEntry(gunzipSync(index.data), name);
  if (entry === undefined) return failed(`no ${name}`);
  const needs_glibc = /(?:^|, )libc6 \(>= ([0-9.]+)\)/.exec(entry.Depends ?? "")?.[1] ?? "0";
  if (compareVersions(quest.glibc, needs_glibc) < 0) return failed(`${name} ${entry.Version} needs glibc ${needs_glibc}, this machine has ${quest.glibc}`);

  quest.say(`downloading ${name} ${entry.Version} (${Math.round(Number(entry.Size) / 1e6)} MB)`);
  const deb = await download(`${base}/${entry.Filename}`, { bytes_max: PACKAGE_BYTES_MAX, env });
  if (deb.kind === "failed") return failed(deb.reason);
  if (sha256(deb.data) !== entry.SHA256) return failed(`${host}: the package does not have the hash it should`);

  const file = join(quest.directory, "package.deb"); // D2
  writeFileSync(file, deb.data);
  const unpacked = spawnSync("dpkg-deb", ["--extract", file, quest.directory], { encoding: "utf8" });
  rmSync(file, { force: true });
  return unpacked.status === 0 ? { kind: "unpacked", version: entry.Version ?? "", host } : failed(`dpkg-deb: ${unpacked.stderr.trim()}`);
}

/** The signed text, and only that; undefined when the signature is not good. */
function verified(inrelease: Buffer, keyring: string): string | undefined {
  const directory = mkdtempSync(join(tmpdir(), "troupe-inrelease-"));
  try {
    const file = join(directory, "InRelease");
    writeFileSync(file, inrelease);
    const checked = spawnSync("gpgv", ["--keyring", keyring, "--output", "-", file], { encoding: "utf8", maxBuffer: 2 * INRELEASE_BYTES_MAX });
    return checked.status === 0 ? checked.stdout : undefined;
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function packageEntry(index: Buffer, name: string): Record<string, string | undefined> | undefined {
  const start = index.indexOf(`\nPackage: ${name}\n`);
  if (start < 0) return undefined;
  const end = index.indexOf("\n\n", start);
  const lines = index.toString("utf8", start + 1, end < 0 ? index.length : end).split("\n");
  return Object.fromEntries(
    lines.filter((line) => /^[A-Za-z0-9-]+: /.test(line)).map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]),
  );
}

/** The mirrors of the running release first: those of other repositories do not have its suites. */
function mirrorsOf(sources: readonly AptSource[], codename: string): AptSource[] {
  const ours = sources.filter((source) =>
    source.suites.some((suite) => suite === codename || suite.startsWith(`${codename}-`) || suite === "stable" || suite === "testing" || suite === "sid"),
  );
  const exact = (source: AptSource): number => (source.suites.includes(codename) ? 0 : 1);
  const seen = new Set<string>();
  return [...ours].sort((a, b) => exact(a) - exact(b)).filter((source) => !seen.has(source.uri) && seen.add(source.uri));
}

export function aptSources(directory = "/etc/apt"): AptSource[] {
  const parts = join(directory, "sources.list.d");
  const files = [join(directory, "sources.list"), ...(existsSync(parts) ? readdirSync(parts).map((name) => join(parts, name)) : [])].filter((file) =>
    existsSync(file),
  );
  return files.flatMap((file) => {
    const text = readFileSync(file, "utf8");
    return file.endsWith(".sources") ? deb822Sources(text) : file.endsWith(".list") ? oneLineSources(text) : [];
  });
}

/** `Types: deb` / `URIs:` / `Suites:` … in paragraphs. */
export function deb822Sources(text: string): AptSource[] {
  const lines = text.split("\n").filter((line) => !line.startsWith("#"));
  return lines
    .join("\n")
    .split(/\n\s*\n/)
    .flatMap((paragraph) => {
      const field = (name: string): string[] => {
        const value = new RegExp(`^${name}:((?:.*)(?:\\n[ \\t].*)*)`, "im").exec(paragraph)?.[1] ?? "";
        return value.split(/\s+/).filter((word) => word !== "");
      };
      if (!field("Types").includes("deb") || field("Enabled")[0] === "no") return [];
      return sourcesOf(field("URIs"), field("Suites"), field("Components"), field("Signed-By")[0]);
    });
}

/** `deb [signed-by=…] uri suite component…` */
export function oneLineSources(text: string): AptSource[] {
  return text.split("\n").flatMap((line) => {
    const [, options = "", rest = ""] = /^\s*deb\s+(?:\[([^\]]*)\]\s+)?(.*?)\s*(?:#.*)?$/.exec(line) ?? [];
    const [uri, suite, ...components] = rest.split(/\s+/).filter((word) => word !== "");
    if (uri === undefined || suite === undefined) return [];
    return sourcesOf([uri], [suite], components, /(?:^|\s)signed-by=(\S+)/i.exec(options)?.[1]);
  });
}

function sourcesOf(uris: readonly string[], suites: readonly string[], components: readonly string[], signed_by: string | undefined): AptSource[] {
  return uris
    .flatMap(mirrorAddresses)
    .map((uri) => ({ uri: uri.replace(/\/+$/, ""), suites, components, ...(signed_by?.startsWith("/") ? { signed_by } : {}) }));
}

/** Cloud images name a file with a list of mirrors; what is neither that nor HTTP (cdrom:, file:) has no newer suite. */
function mirrorAddresses(uri: string): string[] {
  if (/^https?:\/\//.test(uri)) return [uri];
  const list = /^mirror\+file:(?:\/\/)?(\/.*)$/.exec(uri)?.[1];
  if (list === undefined || !existsSync(list)) return [];
  return readFileSync(list, "utf8")
    .split("\n")
    .map((line) => line.trim().split(/\s+/)[0] ?? "")
    .filter((address) => /^https?:\/\//.test(address));
}

function osRelease(): { id: string; like: string[]; codename: string } {
  const file = "/etc/os-release";
  const text = existsSync(file) ? readFileSync(file, "utf8") : "";
  const field = (name: string): string => new RegExp(`^${name}="?([^"\\n]*)"?$`, "m").exec(text)?.[1] ?? "";
  return { id: field("ID"), like: field("ID_LIKE").split(" "), codename: field("VERSION_CODENAME") };
}

function glibcVersion(): string | undefined {
  const report = process.report.getReport() as { header: { glibcVersionRuntime?: string } };
  return report.header.glibcVersionRuntime;
}

export function compareVersions(a: string, b: string): number {
  const [left, right] = [a, b].map((version) => version.split(".").map(Number)) as [number[], number[]];
  for (let place = 0; place < Math.max(left.length, right.length); place++) {
    const difference = (left[place] ?? 0) - (right[place] ?? 0);
    if (difference !== 0) return Math.sign(difference);
  }
  return 0;
}

function sha256(data: Buffer): string {
  return createHash("sha256").update(data).digest("hex");
}
