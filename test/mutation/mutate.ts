// mutate: would a test notice if a guard were gone? `npm run mutate [-- NAME…]` breaks one guard after another in a copy of the tree, runs the tests
// that must fail then, and says which survived. Exit code 1 when one did, or when a guard is no longer where this list says.
//
// Never in place: the copy is made in the system's temporary folder, with this tree's packages, and removed at the end.
import { spawnSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { fileURLToPath } from "node:url";

interface Mutation {
  /** The invariant, and what is broken. */
  readonly name: string;
  readonly file: string;
  readonly from: string;
  readonly to: string;
  readonly tests: readonly string[];
}

const CRASHES = "test/actors/host-crashes.test.ts";
const SESSION = "test/state-machines/session.test.ts";
const STEP = "test/state-machines/step.test.ts";

const MUTATIONS: readonly Mutation[] = [
  {
    name: "A1: answered before the append",
    file: "actors/cell.ts",
    from: "    const outcome = await this.#append(data);",
    to: "    this.#tell(decided, after_sequence);\n    const outcome = await this.#append(data);",
    tests: [CRASHES],
  },
  {
    name: "A2: the fence expects nothing",
    file: "bus/memory.ts",
    from: "append.expected_last_sequence",
    to: "undefined as unknown as number",
    tests: [CRASHES, "test/contract/bus.test.ts"],
  },
  {
    name: "A3: a result stays in the ledger",
    file: "state-machines/step.ts",
    from: "        const running = { ...state.running };\n        delete running[id];\n        const event",
    to: "        const running = { ...state.running };\n        const event",
    tests: [STEP, SESSION],
  },
  {
    name: "A3: what is live is started again",
    file: "actors/effect-runner.ts",
    from: "if (!live.has(inst)) start(effect); // E2",
    to: "start(effect); // E2",
    tests: [CRASHES],
  },
  {
    name: "A5: a snapshot forgets what runs",
    file: "state-machines/step.ts",
    from: "        running: state.running,",
    to: "        running: {},",
    tests: [STEP, SESSION],
  },
  {
    name: "C5: no claim on taking over",
    file: "actors/cell.ts",
    from: "    if (inFlight.length > 0) {",
    to: "    if (inFlight.length > 1000) {",
    tests: [CRASHES],
  },
  {
    name: "C3: no mark before a debt",
    file: "actors/shard-host.ts",
    from: "      mark: () => ensureMark(shard, resident),",
    to: "      mark: () => Promise.resolve(),",
    tests: [CRASHES],
  },
  {
    name: "H2: marked actors are not restored",
    file: "actors/shard-host.ts",
    from: "residentOf(shard, { tenant, kind, id }, shard.taken_ms)?.cell.load()",
    to: "(undefined as Promise<void> | undefined)",
    tests: [CRASHES],
  },
  {
    name: "S3: a finished actor keeps its timers",
    file: "state-machines/step.ts",
    from: "timers: over ? {} : state.timers",
    to: "timers: state.timers",
    tests: [STEP, SESSION],
  },
  {
    name: "keys are not remembered",
    file: "state-machines/step.ts",
    from: "if (known.hash !== identity.hash)",
    to: "if (known.hash === identity.hash)",
    tests: [STEP],
  },
  {
    name: "recovery is never exhausted",
    file: "state-machines/step.ts",
    from: "spent.tries >= RECOVERY_TRIES_MAX",
    to: "spent.tries >= 1e9",
    tests: [SESSION],
  },
  {
    name: "L1: a lease lasts from its answer",
    file: "supervisors/lease.ts",
    from: "valid_until_ms: sent_ms + this.#ttl_ms",
    to: "valid_until_ms: this.#options.world.monotonic_ms() + 2 * this.#ttl_ms",
    tests: ["test/supervisors/lease.test.ts"],
  },
];

const root = fileURLToPath(new URL("../..", import.meta.url));
const asked = process.argv.slice(2);
const chosen = MUTATIONS.filter(({ name }) => asked.length === 0 || asked.some((part) => name.includes(part)));
const copy = mkdtempSync(join(tmpdir(), "troupe-mutate-"));
let survivors = 0;
try {
  cpSync(root, copy, { recursive: true, filter: (path) => !["node_modules", ".git", ".troupe"].includes(basename(path)) });
  symlinkSync(join(root, "node_modules"), join(copy, "node_modules"));
  writeFileSync(join(copy, "mutate.config.ts"), `export default { test: { pool: "forks", bail: 1, testTimeout: 120_000 } };\n`);
  for (const { name, file, from, to, tests } of chosen) {
    const path = join(copy, file);
    const text = readFileSync(path, "utf8");
    if (text.split(from).length !== 2) {
      survivors++;
      console.log(`✗ ${name}: the guard is not where it was, once, in ${file}`);
      continue;
    }
    writeFileSync(path, text.replace(from, to));
    const run = spawnSync(process.execPath, [join(root, "node_modules/vitest/vitest.mjs"), "run", "--config", "mutate.config.ts", ...tests], {
      cwd: copy,
      encoding: "utf8",
      timeout: 300_000,
      env: { ...process.env, MUTATED: "1" },
    });
    writeFileSync(path, text);
    const caught = run.status !== 0;
    if (!caught) survivors++;
    console.log(`${caught ? "✓" : "✗"} ${name}${caught ? "" : ": survived"}`);
  }
} finally {
  rmSync(copy, { recursive: true, force: true });
}
console.log(`${chosen.length - survivors} of ${chosen.length} caught`);
process.exitCode = survivors === 0 ? 0 : 1;
