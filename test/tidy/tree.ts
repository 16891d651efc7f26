// tree: the repository as text, and the rules its text keeps. Each rule looks at a tree and answers its faults as `file:line words`, so that
// the same rule runs on the real tree and on a planted one.
import { readFileSync, readdirSync } from "node:fs";
import { join, posix } from "node:path";

export interface SourceFile {
  /** From the root, with slashes. */
  readonly path: string;
  readonly text: string;
}
export type Tree = readonly SourceFile[];

export const ROOMS = [
  "protocol",
  "telemetry",
  "state-machines",
  "bus",
  "providers",
  "actors",
  "supervisors",
  "gateway",
  "projections",
  "cli",
  "roles",
] as const;
const NOT_OURS = new Set(["node_modules", ".git", ".troupe", "coverage"]);
const TEXT = /\.(ts|mjs|cjs|mts|json|md|sql|sh|yaml|yml|html)$|\/run$|^\.npmrc$|Dockerfile$/;

export function readTree(root: string): Tree {
  const walk = (folder: string): SourceFile[] =>
    readdirSync(join(root, folder), { withFileTypes: true }).flatMap((entry) => {
      const path = posix.join(folder, entry.name);
      if (entry.isDirectory()) return NOT_OURS.has(entry.name) ? [] : walk(path);
      return entry.isFile() && TEXT.test(path) && path !== "package-lock.json" ? [{ path, text: readFileSync(join(root, path), "utf8") }] : [];
    });
  return walk("");
}

const isCode = (file: SourceFile): boolean => /\.(ts|mjs|cjs)$/.test(file.path);
const isOfRoom = (file: SourceFile): boolean => ROOMS.some((room) => file.path.startsWith(`${room}/`));
const isTest = (file: SourceFile): boolean => file.path.endsWith(".test.ts");
/** The rules and their planted faults speak of what they forbid. */
const isTidy = (file: SourceFile): boolean => file.path.startsWith("test/tidy/");

function lineFaults(tree: Tree, concerns: (file: SourceFile) => boolean, pattern: RegExp, words: string): string[] {
  return tree
    .filter(concerns)
    .flatMap((file) => file.text.split("\n").flatMap((line, index) => (pattern.test(line) ? [`${file.path}:${index + 1} ${words}`] : [])));
}

/** A file named after no noun collects everything. */
export function shapelessNames(tree: Tree): string[] {
  return tree
    .filter(({ path }) => path.split("/").some((part) => /^(utils?|helpers?|common|misc|shared)(\.|$)/i.test(part)))
    .map(({ path }) => `${path} is named after nothing in particular`);
}

/** A test that does not run proves nothing; one that runs alone hides the others. */
export function switchedOffTests(tree: Tree): string[] {
  return lineFaults(
    tree,
    (file) => isTest(file) && !isTidy(file),
    /\b(?:test|it|describe|suite)(?:\.\w+)*\.(?:skip|only|todo|skipIf|runIf|fails)\b|\b(?:xit|xtest|xdescribe|fit|fdescribe)\s*\(/,
    "switches a test off or on",
  );
}

/** A title is a sentence that can be false; "should" cannot be. */
export function wishfulTitles(tree: Tree): string[] {
  return lineFaults(
    tree,
    (file) => isTest(file) && !isTidy(file),
    /\b(?:test|it|describe)(?:\.\w+)*(?:\([^"'`]*\))?\(\s*["'`](?:should|works|test)\b/i,
    "has a title that is no statement",
  );
}

/** The files that read XState's machines from the inside; the machines themselves and everything above speak our own words. */
const KNOW_XSTATE = new Set(["step", "definition", "lint", "draw"].map((name) => `state-machines/${name}.ts`));

export function xstateNames(tree: Tree): string[] {
  return lineFaults(
    tree,
    (file) => isCode(file) && isOfRoom(file) && !KNOW_XSTATE.has(file.path),
    /["'`]xstate\.[a-z]/,
    "speaks of XState's own names; state-machines/step.ts is there for that",
  );
}

/**
 * Clock, chance, ids and environment come in through parameters (protocol/world.ts), so that a test can be the world. Roles and the command
 * line are handed the real one; telemetry stamps what really happened, whatever time a room lives in.
 */
export function unannouncedWorlds(tree: Tree): string[] {
  const pattern = /\bDate\.now\(|\bnew Date\(\)|\bMath\.random\(|\bprocess\.env\b|\brandomUUID\(|(?<![.\w])set(?:Timeout|Interval)\(|\bperformance\.now\(/;
  const concerns = (file: SourceFile): boolean =>
    isCode(file) && isOfRoom(file) && !["roles/", "cli/", "telemetry/"].some((room) => file.path.startsWith(room));
  return lineFaults(tree, concerns, pattern, "reaches for the world; take it as a parameter");
}

export function unfinishedWork(tree: Tree): string[] {
  return lineFaults(tree, (file) => isCode(file) && !isTidy(file), /\b(?:TODO|FIXME|XXX|HACK)\b|not (?:yet )?implemented/i, "is not finished");
}

/** Every file says in its first line what it is. */
export function silentFiles(tree: Tree): string[] {
  return tree.filter((file) => isCode(file) && !/^(?:#!.*\n)?(?:\/\/|\/\*\*)/.test(file.text)).map(({ path }) => `${path}:1 does not say what it is`);
}

/** What this machine knows and no other: its folders, and the hosts of its package mirrors, which are read from its own settings. */
export function localKnowledge(tree: Tree): string[] {
  return lineFaults(
    tree,
    (file) => !isTidy(file),
    /\/work\/|\/home\/[a-z]|\b(?:deb|security|archive|ports|snapshot)\.(?:debian|ubuntu)\.(?:org|com)\b/,
    "names something of one machine",
  );
}

/** A room is tested by files that import from it. */
export function untestedRooms(tree: Tree): string[] {
  const imports = tree
    .filter(isTest)
    .flatMap((file) => [...file.text.matchAll(/from "([^"]+)"/g)].map((match) => posix.join(posix.dirname(file.path), match[1] ?? "")));
  return ROOMS.filter((room) => tree.some((file) => file.path.startsWith(`${room}/`) && file.path.endsWith(".ts"))).flatMap((room) =>
    imports.some((path) => path.startsWith(`${room}/`)) ? [] : [`${room}/ has no test that imports from it`],
  );
}

/** Relative links of documents lead somewhere. */
export function brokenLinks(tree: Tree, exists: (path: string) => boolean): string[] {
  return tree
    .filter((file) => file.path.endsWith(".md"))
    .flatMap((file) =>
      [...file.text.matchAll(/\]\((?!https?:|mailto:|#)([^)\s#]+)[^)]*\)/g)]
        .map((match) => match[1] ?? "")
        .filter((target) => !exists(posix.join(posix.dirname(file.path), target)))
        .map((target) => `${file.path} links to ${target}, which is not there`),
    );
}

/** Long enough that two files do not share it by chance. */
const COPY_LINES_MIN = 12;

/** The same lines in two places drift apart. Imports, comments and brackets do not count. */
export function copies(tree: Tree): string[] {
  const seen = new Map<string, string>();
  const faults: string[] = [];
  for (const file of tree.filter((one) => isCode(one) && !isTidy(one))) {
    const lines = file.text
      .split("\n")
      .map((line, index) => ({ text: line.trim(), number: index + 1 }))
      .filter(({ text }) => text.length > 3 && !/^(?:\/\/|\*|\/\*|import |export \{|\} from )/.test(text));
    for (let at = 0; at + COPY_LINES_MIN <= lines.length; at++) {
      const block = lines.slice(at, at + COPY_LINES_MIN);
      const key = block.map(({ text }) => text).join("\n");
      const here = `${file.path}:${block[0]?.number}`;
      const first = seen.get(key);
      if (first === undefined) seen.set(key, here);
      else {
        faults.push(`${here} repeats ${COPY_LINES_MIN} lines of ${first}`);
        at += COPY_LINES_MIN - 1;
      }
    }
  }
  return faults;
}

interface LockedPackage {
  readonly optionalDependencies?: Readonly<Record<string, string>>;
}

/** npm ci refuses a lock file that leaves out what a package may need on another platform. */
export function packagesLeftOut(lock: { readonly packages: Readonly<Record<string, LockedPackage>> }): string[] {
  const { packages } = lock;
  const isLocked = (from: string, name: string): boolean => {
    for (let folder = from; ; folder = folder.slice(0, Math.max(0, folder.lastIndexOf("/node_modules/")))) {
      if (packages[`${folder === "" ? "" : `${folder}/`}node_modules/${name}`] !== undefined) return true;
      if (!folder.includes("/node_modules/")) return packages[`node_modules/${name}`] !== undefined;
    }
  };
  return Object.entries(packages).flatMap(([path, { optionalDependencies = {} }]) =>
    Object.keys(optionalDependencies)
      .filter((name) => !isLocked(path, name))
      .map((name) => `package-lock.json leaves out ${name}, which ${path} may need`),
  );
}

/** code and status of each row of docs/errors.md. */
export function documentedErrors(markdown: string): Record<string, number> {
  return Object.fromEntries([...markdown.matchAll(/^\| `([a-z_]+)` \| (\d{3}) \|/gm)].map((row) => [row[1] ?? "", Number(row[2])]));
}
