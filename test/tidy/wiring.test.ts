// Goal:   everything that is in the house is used by it (Q01): each module of a room is reached by imports from main.ts, or stands below with its reason.
// Method: the import graph is walked from main.ts over what is on disk, `import()` and the programs that are started beside us included.
import { existsSync } from "node:fs";
import { join, posix } from "node:path";
import { expect, test } from "vitest";
import { readTree, ROOMS, type Tree } from "./tree.ts";

const ROOT = join(import.meta.dirname, "..", "..");
const HOUSE = [...ROOMS, "deploy"];

const SIMULATED_BUS = "the bus in one process, for tests and for the simulation of whole clusters: the port's other implementation";

/** What no import from main.ts leads to, each with the reason why it is there all the same. */
const REACHED_OTHERWISE: Readonly<Record<string, string>> = {
  "bus/memory.ts": SIMULATED_BUS,
  "bus/memory-bucket.ts": SIMULATED_BUS,
  "bus/memory-core.ts": SIMULATED_BUS,
  "bus/memory-stream.ts": SIMULATED_BUS,
  "cli/troupe.mjs": "what `npx troupe` runs: it starts main.ts on the right Node",
  "deploy/local/bootstrap.mjs": "what npm start and npm test run: it runs on any Node, before anything is installed, and starts main.ts",
  "projections/memory-rows.ts": "the projection's rows in one process, for the same simulation: the row store's other implementation, under the same contract",
  "deploy/local/lifeline.mjs": "bootstrap.mjs has it loaded into what it starts, by --import",
};

const isModule = (path: string): boolean => /\.(ts|mjs|cjs)$/.test(path) && !/\.d\.[cm]?ts$/.test(path);

/** What a file names: imports, re-exports, import(), and files beside it that it hands to another program. Words in comments do not count. */
function namedBy(path: string, text: string): string[] {
  const code = text.replace(/^\s*(?:\/\/|\*|\/\*).*$/gm, "");
  const found = [
    ...code.matchAll(/\bfrom\s+"(\.{1,2}\/[^"]+)"/g),
    ...code.matchAll(/\bimport\s*\(\s*"(\.{1,2}\/[^"]+)"/g),
    ...code.matchAll(/^import\s+"(\.{1,2}\/[^"]+)"/gm),
    ...code.matchAll(/new URL\(\s*"(\.{1,2}\/[^"]+)",\s*import\.meta\.url/g),
  ];
  return found.map((match) => posix.join(posix.dirname(path), match[1] ?? ""));
}

/** `import type` alone makes nothing run: a module that is only spoken of is not wired. Such edges are taken out before the walk. */
const withoutTypes = (text: string): string => text.replace(/^(?:import|export) type [^;]*?from\s+"[^"]+";?$/gms, "");

function reachedFrom(start: string, tree: Tree): Set<string> {
  const texts = new Map(tree.map(({ path, text }) => [path, text]));
  const reached = new Set<string>();
  const next = [start];
  for (let path = next.pop(); path !== undefined; path = next.pop()) {
    const text = texts.get(path);
    if (text === undefined || reached.has(path)) continue;
    reached.add(path);
    next.push(...namedBy(path, withoutTypes(text)));
  }
  return reached;
}

/** Modules of the house that hold something that runs. One of types alone needs no wire: it is gone when the program runs. */
const holdsCode = (text: string): boolean => /^export (?:default |async |abstract )*(?:function|const|let|class)\b/m.test(text) || !/^export /m.test(text);

function unwired(tree: Tree): string[] {
  const reached = reachedFrom("main.ts", tree);
  return tree
    .filter(({ path, text }) => HOUSE.some((room) => path.startsWith(`${room}/`)) && isModule(path) && holdsCode(text))
    .filter(({ path }) => !reached.has(path) && REACHED_OTHERWISE[path] === undefined)
    .map(({ path }) => `${path} is reached by nothing that runs from main.ts`);
}

const tree = readTree(ROOT);

test("every module of the house is reached from main.ts", () => {
  expect(unwired(tree)).toEqual([]);
});

test("the walk was not empty: it reaches every room, also through import()", () => {
  const reached = reachedFrom("main.ts", tree);
  expect(HOUSE.filter((room) => ![...reached].some((path) => path.startsWith(`${room}/`)))).toEqual([]);
  expect(reached.size).toBeGreaterThan(100);
  expect(reached.has("state-machines/draw.ts")).toBe(true);
});

test("what stands there with a reason is there, and is not reached by imports", () => {
  const reached = reachedFrom("main.ts", tree);
  for (const [path, reason] of Object.entries(REACHED_OTHERWISE)) {
    expect(existsSync(join(ROOT, path)), `${path}: ${reason}`).toBe(true);
    expect(reached.has(path), `${path} needs no reason`).toBe(false);
  }
});

test("a module that nobody imports, that only a test imports, or that is only imported as a type, is found", () => {
  const planted: Tree = [
    { path: "main.ts", text: 'import { a } from "./actors/a.ts";\nconst b = await import("./bus/b.ts");' },
    {
      path: "actors/a.ts",
      text: 'import type { T } from "./only-types.ts";\nimport {\n  type C,\n  c,\n} from "./c.ts";\nexport { d } from "./d.ts";\nexport const a = 1;',
    },
    { path: "actors/only-types.ts", text: "export interface T {}" },
    { path: "actors/c.ts", text: 'import type { Forgotten } from "./spoken-of.ts";\nexport const c = 1;' },
    { path: "actors/d.ts", text: "// import { x } from './nobody.ts'\nexport const d = 1;" },
    { path: "actors/spoken-of.ts", text: "export class Forgotten {}" },
    { path: "actors/nobody.ts", text: "export function nobody() {}" },
    { path: "bus/b.ts", text: "export const b = 1;" },
    { path: "test/nobody.test.ts", text: 'import { nobody } from "../actors/nobody.ts";' },
  ];
  expect(unwired(planted)).toEqual([
    "actors/spoken-of.ts is reached by nothing that runs from main.ts",
    "actors/nobody.ts is reached by nothing that runs from main.ts",
  ]);
});
