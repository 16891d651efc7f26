// Goal:   the check of the layers finds what it is for.
// Method: a small house with faults planted, looked at with the repository's own rules. (The repository itself is looked at by `npm run layers`.)
import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync, symlinkSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { expect, test } from "vitest";
import { freshFolder } from "../harness/servers.ts";

const ROOT = join(import.meta.dirname, "..", "..");

function violationsIn(files: Readonly<Record<string, string>>): string[] {
  const house = freshFolder("house");
  for (const name of [".dependency-cruiser.cjs", "tsconfig.json", "package.json"]) copyFileSync(join(ROOT, name), join(house, name));
  symlinkSync(join(ROOT, "node_modules"), join(house, "node_modules"));
  for (const [path, text] of Object.entries(files)) {
    mkdirSync(join(house, dirname(path)), { recursive: true });
    writeFileSync(join(house, path), text);
  }
  const cruiser = join(ROOT, "node_modules", "dependency-cruiser", "bin", "dependency-cruiser.mjs");
  let output: string;
  try {
    output = execFileSync(process.execPath, [cruiser, ".", "--config", "--output-type", "json"], { cwd: house, encoding: "utf8", maxBuffer: 64 << 20 });
  } catch (error) {
    output = (error as { stdout: string }).stdout; // its exit code counts the violations
  }
  const report = JSON.parse(output) as { summary: { totalCruised: number; violations: { from: string; to: string; rule: { name: string } }[] } };
  expect(report.summary.totalCruised).toBeGreaterThanOrEqual(Object.keys(files).length);
  return report.summary.violations.map(({ from, to, rule }) => `${rule.name}: ${from} → ${to.replace(/^.*node_modules\//, "")}`).sort();
}

test("imports that point upward or sideways are found, also of types alone", () => {
  const found = violationsIn({
    "protocol/a.ts": 'import { b } from "../bus/b.ts";\nexport const a = b;\n',
    "bus/b.ts": "export const b = 1;\nexport type B = number;\n",
    "providers/c.ts": 'import type { B } from "../bus/b.ts";\nexport const c: B = 1;\n',
    "actors/d.ts": 'import { b } from "../bus/b.ts";\nimport { c } from "../providers/c.ts";\nexport const d = b + c;\n',
    "gateway/e.ts": 'import { d } from "../actors/d.ts";\nimport { m } from "../main.ts";\nexport const e = d + m;\n',
    "main.ts": "export const m = 1;\n",
  });
  expect(found).toEqual([
    "gateway-imports-downward: gateway/e.ts → main.ts",
    "protocol-imports-downward: protocol/a.ts → bus/b.ts",
    "providers-imports-downward: providers/c.ts → bus/b.ts",
  ]);
});

test("packages that belong to one room are found in another", () => {
  const nats = 'import { connect } from "@nats-io/transport-node";\nexport const use = connect;\n';
  const found = violationsIn({
    "bus/jetstream-link.ts": nats,
    "bus/memory.ts": nats,
    "gateway/live.ts": nats,
    "actors/model.ts": 'import OpenAI from "openai";\nexport const use = OpenAI;\n',
    "providers/openai.ts": 'import OpenAI from "openai";\nexport const use = OpenAI;\n',
    "gateway/query.ts": 'import pg from "pg";\nexport const use = pg;\n',
    "projections/query.ts": 'import pg from "pg";\nexport const use = pg;\n',
    "supervisors/machine.ts": 'import { setup } from "xstate";\nexport const use = setup;\n',
  }).map((line) => line.replace(/ → .*/, ""));
  expect(found).toEqual([
    "nats-only-in-the-bus: bus/memory.ts",
    "nats-only-in-the-bus: gateway/live.ts",
    "pg-only-in-projections: gateway/query.ts",
    "provider-sdks-only-in-providers: actors/model.ts",
    "xstate-not-above-actors: supervisors/machine.ts",
  ]);
});

test("circles and imports that lead nowhere are found", () => {
  const found = violationsIn({
    "bus/a.ts": 'import { b } from "./b.ts";\nexport const a = (): number => b();\n',
    "bus/b.ts": 'import { a } from "./a.ts";\nexport const b = (): number => a();\n',
    "bus/c.ts": 'import { d } from "./gone.ts";\nexport const c = d;\n',
  });
  expect(found.map((line) => line.replace(/:.*/, ""))).toEqual(["no-cycles", "no-unresolvable"]);
});
