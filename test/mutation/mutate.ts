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
const LOST_ANSWERS = "test/actors/lost-answers.test.ts";
const STEP = "test/state-machines/step.test.ts";

const MUTATIONS: readonly Mutation[] = [
  {
    name: "A1: answered before the append",
    file: "actors/cell.ts",
    from: "    const [outcome] = await Promise.all([this.#append(data), marked]);",
    to: "    this.#tell(decided, after_sequence);\n    const [outcome] = await Promise.all([this.#append(data), marked]);",
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
    name: "C3: the world does not wait for the mark",
    file: "actors/cell.ts",
    from: "await Promise.all([this.#append(data), marked]);",
    to: "await Promise.all([this.#append(data)]);",
    tests: ["test/simulation/cluster.test.ts"],
  },
  {
    name: "C6: what cannot be judged is answered away",
    file: "actors/cell.ts",
    from: "      this.#mailbox.unshift(item);\n",
    to: '      return no(errorBody("unavailable", "it cannot be judged"));\n',
    tests: [LOST_ANSWERS],
  },
  {
    name: "W1: a late no of the fast lane counts",
    file: "actors/client.ts",
    from: "(lane === FAST && asked.durable && !reply.ok)",
    to: "false",
    tests: [LOST_ANSWERS],
  },
  {
    name: "D3: leases that could not be renewed are judged",
    file: "supervisors/leader.ts",
    from: "now_ms - this.#leases_calm_since_ms >= this.#ttl_ms",
    to: "true",
    tests: ["test/supervisors/supervision.test.ts"],
  },
  {
    name: "F4: the first of what follows is waited for without an end",
    file: "gateway/session-feed.ts",
    from: "let waits_for_first = expected;",
    to: "let waits_for_first = false;",
    tests: ["test/gateway/session-feed.test.ts"],
  },
  {
    name: "H2: marked actors are not restored",
    file: "actors/shard-host.ts",
    from: "        const loaded = resident?.cell.load();",
    to: "        const loaded = undefined as Promise<void> | undefined;",
    tests: [CRASHES],
  },
  {
    name: "B1: what others hold counts as free",
    file: "state-machines/budget-decision.ts",
    from: "limit_usd_micros - settled_usd_micros - reserved_usd_micros;",
    to: "limit_usd_micros - settled_usd_micros;",
    tests: ["test/state-machines/budget-decision.test.ts"],
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
  {
    name: "L4: a name is taken whatever its holder did since",
    file: "supervisors/lease.ts",
    from: "const written = await this.#options.bucket.update(this.#options.key, value, revision);",
    to: "const written = await this.#options.bucket.update(this.#options.key, value, (await this.#options.bucket.get(this.#options.key))?.revision ?? revision);",
    tests: ["test/supervisors/lease.test.ts"],
  },
  {
    name: "U1: a leader is succeeded right after an outage",
    file: "supervisors/succession.ts",
    from: "    if (!this.#options.may_judge()) return undefined; // U1\n",
    to: "",
    tests: ["test/supervisors/succession.test.ts"],
  },
  {
    name: "U2: a leader that answers is succeeded",
    file: "supervisors/succession.ts",
    from: "if (answer !== undefined || ",
    to: "if (",
    tests: ["test/supervisors/succession.test.ts"],
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
