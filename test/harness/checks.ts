// checks: everything `npm test` checks, in one list. The quick ones first, side by side; the tests, which watch the clock, last and alone.
//
//   npm test                    all of it
//   npm test -- lint types      only these
//
// The last line says `N passed, N failed`: each check counts one, each test counts one. A test that did not run counts as failed.
import { spawn } from "node:child_process";
import type { ChildProcess } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = join(import.meta.dirname, "..", "..");
const BIN = join(ROOT, "node_modules");

interface Tally {
  readonly passed: number;
  readonly failed: number;
}
interface CheckResult extends Tally {
  /** What a person must see when it failed; empty when it was shown already. */
  readonly output: string;
}
interface Check {
  readonly name: string;
  readonly question: string;
  /** Watches the clock: nothing runs beside it. */
  readonly alone?: boolean;
  readonly run: () => Promise<CheckResult>;
}

const CHECKS: readonly Check[] = [
  { name: "format", question: "is every file formatted? (npm run format does it)", run: () => tool("oxfmt/bin/oxfmt", ["--check", "."]) },
  { name: "lint", question: "does the linter find nothing?", run: () => tool("oxlint/bin/oxlint", ["--type-aware", "--deny-warnings", "--format=unix"]) },
  { name: "types", question: "do the types hold?", run: () => tool("typescript/bin/tsc", ["-p", "."]) },
  { name: "layers", question: "do imports point downward only?", run: layers },
  { name: "dead", question: "is every file, export and dependency used?", run: () => tool("knip/bin/knip.js", ["--no-progress"]) },
  { name: "tests", question: "do the tests pass?", alone: true, run: tests },
];

const running = new Set<ChildProcess>();
let interrupted = false;
for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.on(signal, () => {
    interrupted = true;
    for (const child of running) child.kill(signal);
  });
}

process.exitCode = await checkAll(process.argv.slice(2));

async function checkAll(names: readonly string[]): Promise<number> {
  const unknown = names.filter((name) => !CHECKS.some((check) => check.name === name));
  if (unknown.length > 0) {
    console.error(`no such check: ${unknown.join(", ")}; there are ${CHECKS.map((check) => check.name).join(", ")}`);
    return 2;
  }
  const wanted = CHECKS.filter((check) => names.length === 0 || names.includes(check.name));
  let passed = 0;
  let failed = 0;
  const failures: string[] = [];
  const runOne = async (check: Check): Promise<void> => {
    if (interrupted) return;
    const began_ms = performance.now();
    console.log(`▸ ${check.name}: ${check.question}`);
    const result = await check.run();
    if (interrupted) return;
    passed += result.passed;
    failed += result.failed;
    const seconds = ((performance.now() - began_ms) / 1000).toFixed(1);
    if (result.failed > 0) failures.push(check.name);
    if (result.failed > 0 && result.output !== "") console.log(indented(result.output));
    console.log(`  ${result.failed === 0 ? "✓" : "✗"} ${check.name} (${seconds} s)`);
  };
  await Promise.all(wanted.filter(({ alone }) => alone !== true).map(runOne));
  for (const check of wanted.filter(({ alone }) => alone === true)) await runOne(check);
  if (interrupted) {
    console.log("interrupted");
    return 130;
  }
  console.log(failures.length === 0 ? "\nEverything passed." : `\nFailed: ${failures.join(", ")}`);
  console.log(`${passed} passed, ${failed} failed`);
  if (process.env.TROUPE_TALLY_FILE !== undefined) writeFileSync(process.env.TROUPE_TALLY_FILE, JSON.stringify({ passed, failed }));
  return failed === 0 ? 0 : 1;
}

async function tool(script: string, args: readonly string[]): Promise<CheckResult> {
  const { code, output } = await runScript(script, args, "collect");
  return code === 0 ? { passed: 1, failed: 0, output } : { passed: 0, failed: 1, output };
}

/** A cruiser that understands no file finds no violation either, and is content: so the files are counted. */
async function layers(): Promise<CheckResult> {
  const { code, output } = await runScript("dependency-cruiser/bin/dependency-cruiser.mjs", [".", "--config", "--output-type", "json"], "collect");
  let report: { summary: { totalCruised: number; violations: { from: string; to: string; rule: { name: string } }[]; error: number } };
  try {
    report = JSON.parse(output) as typeof report;
  } catch {
    return { passed: 0, failed: 1, output: output === "" ? `the cruiser ended with ${code}` : output };
  }
  const { totalCruised, violations, error } = report.summary;
  const lines = violations.map(({ from, to, rule }) => `${from} → ${to}: ${rule.name}`);
  if (totalCruised < 20) lines.push(`only ${totalCruised} files were looked at: the cruiser does not understand them`);
  return lines.length === 0 && error === 0 ? { passed: 1, failed: 0, output: "" } : { passed: 0, failed: 1, output: lines.join("\n") };
}

async function tests(): Promise<CheckResult> {
  const directory = mkdtempSync(join(tmpdir(), "troupe-checks-"));
  try {
    const report_file = join(directory, "report.json");
    const { code } = await runScript("vitest/vitest.mjs", ["run", "--reporter=default", "--reporter=json", `--outputFile.json=${report_file}`], "show");
    return testTally(code, report_file);
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

interface TestReport {
  readonly numPassedTests: number;
  readonly numFailedTests: number;
  readonly numPendingTests: number;
  readonly numTodoTests: number;
  readonly testResults: readonly { readonly status: string; readonly assertionResults: readonly { readonly status: string }[] }[];
}

function testTally(code: number, report_file: string): CheckResult {
  let report: TestReport;
  try {
    report = JSON.parse(readFileSync(report_file, "utf8")) as TestReport;
  } catch {
    return { passed: 0, failed: 1, output: `vitest ended with ${code} and left no report` };
  }
  const not_run = report.numPendingTests + report.numTodoTests;
  // A file that could not be loaded has no failed test of its own; it counts one.
  const broken_files = report.testResults.filter((file) => file.status === "failed" && !file.assertionResults.some((one) => one.status === "failed")).length;
  const counted = report.numFailedTests + not_run + broken_files;
  const failed = counted === 0 && (code !== 0 || report.numPassedTests === 0) ? 1 : counted;
  return { passed: report.numPassedTests, failed, output: not_run > 0 ? `${not_run} tests did not run` : "" };
}

function runScript(script: string, args: readonly string[], output: "collect" | "show"): Promise<{ code: number; output: string }> {
  return new Promise((resolve) => {
    const child = spawn(process.execPath, [join(BIN, script), ...args], {
      cwd: ROOT,
      stdio: output === "show" ? ["ignore", "inherit", "inherit"] : ["ignore", "pipe", "pipe"],
      env: { ...process.env, NODE_ENV: "test" },
    });
    running.add(child);
    let text = "";
    for (const stream of [child.stdout, child.stderr]) stream?.on("data", (data: Buffer) => (text += data.toString()));
    child.once("error", (error) => resolve({ code: 1, output: error.message }));
    child.once("close", (code) => {
      running.delete(child);
      resolve({ code: code ?? 1, output: text });
    });
  });
}

function indented(text: string): string {
  return text
    .trimEnd()
    .split("\n")
    .map((line) => `    ${line}`)
    .join("\n");
}
