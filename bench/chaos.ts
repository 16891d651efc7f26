// chaos: `npm run chaos` (`-- --help` lists what can be chosen): trouble on the real thing, and the proof that it cost nothing.
//
// Each scenario gets a ground of its own (chaos-ground.ts), services at work on it (chaos-load.ts), its trials (chaos-scenarios.ts), and at
// its end the audit (chaos-audit.ts). Prints a table; exits 1 when anything was lost, repeated, or not as it must be. `--json` prints one
// object a scenario instead.
import { cpus, loadavg, totalmem } from "node:os";
import { join } from "node:path";
import { Option } from "commander";
import { wholeNumber } from "../cli/arguments.ts";
import { startGround, wait } from "./chaos-ground.ts";
import { script } from "./script.ts";
import { CALM_MS, runScenario, type ScenarioResult, SCENARIOS, scenarioNamed } from "./chaos-scenarios.ts";

/** Small, fast, and the same numbers for the same seed everywhere (mulberry32). */
function drawFrom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/** The smallest time that this share of them does not exceed. */
const quantile = (sorted: readonly number[], share: number): number => sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)] ?? 0;

export function phaseLine(times: readonly number[]): string {
  const sorted = [...times].sort((a, b) => a - b);
  const [p50, p95, max] = [0.5, 0.95, 1].map((share) => Math.round(quantile(sorted, share)));
  return `${p50} / ${p95} / ${max}`;
}

/** The rows of one scenario in a table of Markdown. */
export function rowsOf({ scenario, trials, phases, faults, audit, acknowledgement_ms, timer_late_ms }: ScenarioResult): string[] {
  const problems = faults.length + audit.violations.length + audit.stream_faults.length;
  const head = `| ${scenario} | ${trials} | ${audit.acknowledged} | ${audit.lost.length} | ${audit.repeated.length} | ${problems} |`;
  const rows = [...phases].map(([phase, times]) => `${phase} (${times.length}) | ${phaseLine(times)} |`);
  const { p50, p99, max } = acknowledgement_ms;
  rows.push(`neighbours' acknowledgements (${acknowledgement_ms.count}), p50 / p99 / max | ${Math.round(p50)} / ${Math.round(p99)} / ${Math.round(max)} |`);
  rows.push(`how late a timer of the measuring process was (${timer_late_ms.length}) | ${phaseLine(timer_late_ms)} |`);
  return rows.map((row, index) => `${index === 0 ? head : "| | | | | | |"} ${row}`);
}

export const TABLE_HEAD = [
  "| scenario | trials | commands acknowledged | lost | repeated | other faults | phase (count) | ms p50 / p95 / max |",
  "|---|---:|---:|---:|---:|---:|---|---:|",
];

async function main(): Promise<number> {
  const values = script(
    "npm run chaos --",
    "Trouble on real processes, a real broker and a real database, with services at work on them; then the audit of every promise.",
  )
    .addOption(new Option("--scenario <name...>", "only these").choices(SCENARIOS.map(({ name }) => name)))
    .option("--trials <n>", "how often each is done (default: each scenario's own)", wholeNumber(1))
    .option("--seed <n>", "what is drawn: victims, moments (default: the clock)", wholeNumber(0))
    .option("--lanes <n>", "sessions that stream at once (default 50)", wholeNumber(1))
    .option("--workers <n>", "worker processes (default: each scenario's own)", wholeNumber(1))
    .option("--away-ms <ms>", "how long what is taken away stays away", wholeNumber(1))
    .option("--home <folder>", "keep logs and data there")
    .option("--json", "print one JSON object a scenario")
    .parse()
    .opts<{ scenario?: string[]; trials?: number; seed?: number; lanes?: number; workers?: number; awayMs?: number; home?: string; json?: true }>();
  const scenarios = values.scenario === undefined ? SCENARIOS : values.scenario.map(scenarioNamed);
  const seed = values.seed ?? Date.now() % 1_000_000;
  const say = (line: string): void => void process.stderr.write(`${line}\n`);
  say(
    `seed ${seed}; ${cpus().length} × ${cpus()[0]?.model ?? "?"}, ${Math.round(totalmem() / 2 ** 30)} GiB; node ${process.version}; load before ${loadavg()
      .map((one) => one.toFixed(1))
      .join(" ")}`,
  );
  const results: ScenarioResult[] = [];
  let broken = false;
  for (const scenario of scenarios) {
    say(`── ${scenario.name}: ${scenario.what}`);
    const ground = await startGround({
      ...scenario.ground,
      ...(values.workers === undefined ? {} : { workers: values.workers }),
      ...(values.home === undefined ? {} : { home: join(values.home, scenario.name) }),
    });
    try {
      await wait(CALM_MS);
      const result = await runScenario(ground, scenario, {
        trials: values.trials ?? scenario.trials,
        random: drawFrom(seed),
        ...(values.lanes === undefined ? {} : { load: { lanes: values.lanes } }),
        ...(values.awayMs === undefined ? {} : { away_ms: values.awayMs }),
        say: (line) => say(`   ${line}`),
      });
      results.push(result);
      const { audit, faults, notes } = result;
      const problems = [...faults, ...audit.lost, ...audit.repeated, ...audit.stream_faults, ...audit.violations];
      for (const problem of problems.slice(0, 40)) say(`   ✗ ${problem}`);
      for (const note of notes) say(`   · ${note}`);
      say(
        `   ${audit.acknowledged} commands, ${audit.sessions} sessions, ${audit.messages} journal messages, ${audit.model_calls} model calls (${audit.model_calls_again} again after a loss), ${audit.ears_whole} streams heard whole; load ${loadavg()[0]?.toFixed(1)}`,
      );
      if (problems.length > 0) broken = true;
      if (values.json) process.stdout.write(`${JSON.stringify({ ...result, phases: Object.fromEntries(result.phases) })}\n`);
    } finally {
      await ground.stop();
    }
  }
  if (!values.json) process.stdout.write(`${[...TABLE_HEAD, ...results.flatMap(rowsOf)].join("\n")}\n`);
  return broken ? 1 : 0;
}

for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => process.exit(130));
process.exitCode = await main();
