// Goal:   the tree keeps the rules that no other tool knows.
// Method: every rule runs on the tree as it is, and on a small tree with the fault it must find; a rule that finds nothing there is blind.
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { ERRORS } from "../../protocol/errors.ts";
import {
  brokenLinks,
  copies,
  documentedErrors,
  localKnowledge,
  packagesLeftOut,
  readTree,
  shapelessNames,
  silentFiles,
  switchedOffTests,
  type Tree,
  unannouncedWorlds,
  unfinishedWork,
  untestedRooms,
  wishfulTitles,
  xstateNames,
} from "./tree.ts";

const ROOT = join(import.meta.dirname, "..", "..");
const tree = readTree(ROOT);

const twelve_lines = Array.from({ length: 12 }, (_, index) => `const line_${index} = ${index};`).join("\n");

/** Each rule with a tree that breaks it, and one next to it that does not. */
const RULES: readonly { readonly says: string; readonly rule: (tree: Tree) => string[]; readonly broken: Tree; readonly kept: Tree }[] = [
  {
    says: "no file is named after nothing",
    rule: shapelessNames,
    broken: [
      { path: "bus/utils.ts", text: "" },
      { path: "actors/helpers/x.ts", text: "" },
    ],
    kept: [{ path: "bus/port.ts", text: "" }],
  },
  {
    says: "no test is switched off, and none runs alone",
    rule: switchedOffTests,
    broken: ["test.skip(", "describe.only(", "test.concurrent.skip(", "it.todo(", "xit(", "test.runIf(x)("].map((text, index) => ({
      path: `test/a${index}.test.ts`,
      text,
    })),
    kept: [{ path: "test/a.test.ts", text: 'test("a skipped entry is only read once", () => only.skip(1));' }],
  },
  {
    says: "every title is a statement",
    rule: wishfulTitles,
    broken: [
      { path: "test/a.test.ts", text: 'test("should work", () => {})' },
      { path: "test/b.test.ts", text: 'describe.each(x)("works", () => {})' },
    ],
    kept: [{ path: "test/a.test.ts", text: 'test("a budget of 0 blocks what should cost", () => {})' }],
  },
  {
    says: "XState's own names stay where machines are read from the inside",
    rule: xstateNames,
    broken: ["actors/host.ts", "state-machines/session.ts"].map((path) => ({ path, text: 'if (action.type === "xstate.raise") {}' })),
    kept: [{ path: "state-machines/step.ts", text: 'case "xstate.raise":' }],
  },
  {
    says: "rooms take clock, chance and environment through the door",
    rule: unannouncedWorlds,
    broken: ["Date.now()", "new Date()", "Math.random()", "process.env.HOME", "randomUUID()", "setTimeout(f, 1)", "performance.now()"].map((text, index) => ({
      path: `actors/a${index}.ts`,
      text,
    })),
    kept: [
      { path: "actors/a.ts", text: "world.after(1, f); new Date(ms); world.random(); world.setTimeout(1);" },
      { path: "roles/world.ts", text: "Date.now()" },
    ],
  },
  {
    says: "no work is left lying about",
    rule: unfinishedWork,
    broken: [
      { path: "bus/a.ts", text: "// TODO later" },
      { path: "bus/b.ts", text: 'throw new Error("not implemented")' },
    ],
    kept: [{ path: "bus/a.ts", text: "// implemented in b.ts" }],
  },
  {
    says: "every file says what it is",
    rule: silentFiles,
    broken: [{ path: "bus/a.ts", text: "export const a = 1;" }],
    kept: [
      { path: "bus/a.ts", text: "// a: the first letter.\n" },
      { path: "cli/a.mjs", text: "#!/usr/bin/env node\n// a: the first letter.\n" },
    ],
  },
  {
    says: "nothing names what only one machine has",
    rule: localKnowledge,
    broken: [
      // In parts, so that this file does not name them either.
      { path: "docs/a.md", text: ["cd /wo", "rk/main"].join("") },
      { path: "deploy/a.ts", text: ["http://deb", "debian", "org/debian"].join(".") },
      { path: "a.json", text: "/home/jane/x" },
    ],
    kept: [{ path: "docs/a.md", text: "the network of workers" }],
  },
  {
    says: "every room has a test that imports from it",
    rule: untestedRooms,
    broken: [
      { path: "bus/port.ts", text: "" },
      { path: "test/bus/a.test.ts", text: 'import { a } from "../../protocol/a.ts";' },
    ],
    kept: [
      { path: "bus/port.ts", text: "" },
      { path: "test/contract/a.test.ts", text: 'import { a } from "../../bus/port.ts";' },
    ],
  },
  {
    says: "nothing of a dozen lines stands in two places",
    rule: copies,
    broken: [
      { path: "bus/a.ts", text: twelve_lines },
      { path: "bus/b.ts", text: `// b\n${twelve_lines}` },
    ],
    kept: [
      { path: "bus/a.ts", text: twelve_lines },
      { path: "bus/b.ts", text: twelve_lines.replace("line_5", "other") },
    ],
  },
];

describe.each(RULES)("$says", ({ rule, broken, kept }) => {
  test("in this tree", () => expect(rule(tree)).toEqual([]));
  test("and the rule sees every fault that is planted, and only faults", () => {
    const found = rule(broken);
    const is_about_pairs = rule === copies || rule === untestedRooms;
    expect(found).toHaveLength(is_about_pairs ? 1 : broken.length);
    expect(rule(kept)).toEqual([]);
  });
});

test("the tree that was looked at is the whole one", () => {
  expect(tree.length).toBeGreaterThan(60);
  expect(tree.map(({ path }) => path)).toEqual(
    expect.arrayContaining(["package.json", ".ci/run", "protocol/errors.ts", "docs/errors.md", "test/tidy/tree.ts"]),
  );
});

test("links of documents lead somewhere", () => {
  expect(brokenLinks(tree, (path) => existsSync(join(ROOT, path)))).toEqual([]);
  const planted: Tree = [{ path: "docs/a.md", text: "[x](gone.md) [y](../here.md#part) [z](https://example.test/x)" }];
  expect(brokenLinks(planted, (path) => path === "here.md")).toEqual(["docs/a.md links to gone.md, which is not there"]);
});

test("every error that leaves the process has a row in docs/errors.md with its status, and no row has another", () => {
  const documented = documentedErrors(readFileSync(join(ROOT, "docs", "errors.md"), "utf8"));
  expect(documented).toEqual(Object.fromEntries(Object.entries(ERRORS).map(([code, { status }]) => [code, status])));
  expect(documentedErrors("| `gone` | 410 | it was |\n| code | HTTP | x |\n|---|---|---|\n")).toEqual({ gone: 410 });
});

test("the lock file names what each package may need on any platform", () => {
  expect(packagesLeftOut(JSON.parse(readFileSync(join(ROOT, "package-lock.json"), "utf8")) as Parameters<typeof packagesLeftOut>[0])).toEqual([]);
  const packages = {
    "node_modules/a": { optionalDependencies: { "a-darwin": "1.0.0", "a-linux": "1.0.0", "a-nested": "1.0.0" } },
    "node_modules/a-linux": {},
    "node_modules/a/node_modules/a-nested": {},
  };
  expect(packagesLeftOut({ packages })).toEqual(["package-lock.json leaves out a-darwin, which node_modules/a may need"]);
});
