// simulate: goes through seeds and stops at the first that breaks a promise, which it makes small and prints.
//
//   npm run simulate -- --seed 7 --steps 60        one run, its story
//   npm run simulate -- --from 1 --count 1000      many
//   npm run simulate -- --soak --from 1            until told (Ctrl-C)
import { parseArgs } from "node:util";
import { describeAct, drawPlan, isFault, type Plan } from "./plan.ts";
import { type RunResult, runPlan } from "./simulation.ts";
import { shrink } from "./shrink.ts";

const { values } = parseArgs({
  options: {
    seed: { type: "string" },
    steps: { type: "string", default: "60" },
    from: { type: "string", default: "1" },
    count: { type: "string", default: "100" },
    soak: { type: "boolean", default: false },
    "keep-going": { type: "boolean", default: false },
    "no-shrink": { type: "boolean", default: false },
    trace: { type: "string", default: "60" },
    verbose: { type: "boolean", default: false },
  },
});

const steps = Number(values.steps);
const single = values.seed !== undefined;
const first = Number(values.seed ?? values.from);
const count = single ? 1 : values.soak ? Number.POSITIVE_INFINITY : Number(values.count);
const trace_lines = Number(values.trace);
const total: Record<string, number> = {};
const began_ms = performance.now();
let runs = 0;
let failed = 0;
let interrupted = false;
process.on("SIGINT", () => (interrupted = true));
process.on("SIGTERM", () => (interrupted = true));

for (let seed = first; seed < first + count && !interrupted; seed++) {
  if (values.verbose) console.log(`seed ${seed}`);
  const plan = drawPlan(seed, steps);
  const result = await runPlan(plan);
  runs++;
  for (const [what, times] of Object.entries(result.counts)) total[what] = (total[what] ?? 0) + times;
  if (result.failures.length > 0) {
    failed++;
    await tell(plan, result);
    if (!values["keep-going"]) break;
  } else if (single) {
    console.log(lastOf(result.trace).join("\n"));
  }
  if (runs % 500 === 0) progress();
}
progress();
if (single || runs >= 100)
  console.log(
    Object.entries(total)
      .sort(([a], [b]) => a.localeCompare(b))
      .map(([what, times]) => `${what} ${times}`)
      .join(", "),
  );
process.exitCode = failed > 0 ? 1 : 0;

function lastOf(trace: readonly string[]): readonly string[] {
  return trace_lines === 0 ? [] : trace.slice(-trace_lines);
}

function progress(): void {
  const seconds = (performance.now() - began_ms) / 1000;
  console.log(
    `${runs} runs of ${steps} steps from seed ${first} in ${seconds.toFixed(1)} s, ${failed} failed; ${total["crashes"] ?? 0} crashes, ${total["takeovers"] ?? 0} take-overs, ${total["entry claim"] ?? 0} claims, ${total["entries"] ?? 0} entries`,
  );
}

async function tell(plan: Plan, result: RunResult): Promise<void> {
  console.log(`seed ${plan.seed} (--steps ${steps}) broke:\n${result.failures.map((what) => `  ${what}`).join("\n")}`);
  if (values["no-shrink"]) {
    console.log(lastOf(result.trace).join("\n"));
    return;
  }
  const small = await shrink(plan, result, { deadline_ms: performance.now() + 60_000, now_ms: () => performance.now() });
  console.log(`It also breaks with ${small.plan.acts.filter(isFault).length} faults and ${small.plan.acts.length} acts (${small.runs} runs to find out):`);
  console.log(small.result.failures.map((what) => `  ${what}`).join("\n"));
  console.log(small.plan.acts.map((act) => `  ${describeAct(act)}`).join("\n"));
  console.log(lastOf(small.result.trace).join("\n"));
}
