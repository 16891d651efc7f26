// simulate: goes through seeds and stops at the first that breaks a promise, which it makes small and prints.
//
//   npm run simulate -- --seed 7 --steps 60        one run, its story
//   npm run simulate -- --from 1 --count 1000      many; --jobs 2 goes through them on two threads
//   npm run simulate -- --soak --from 1            until told (Ctrl-C)
import { isMainThread, parentPort, Worker, workerData } from "node:worker_threads";
import { script } from "../../bench/script.ts";
import { wholeNumber } from "../../cli/arguments.ts";
import { describeAct, drawPlan, isFault, type Plan } from "./plan.ts";
import { type RunResult, runPlan } from "./simulation.ts";
import { shrink } from "./shrink.ts";

const values = script(
  "npm run simulate --",
  "A whole cluster in one thread and in virtual time, under faults drawn from a seed. Stops at the first run that breaks a promise.",
)
  .option("--seed <n>", "one run, and its story", wholeNumber(0))
  .option("--steps <n>", "acts of a run", wholeNumber(1), 60)
  .option("--from <n>", "the first seed of many", wholeNumber(0), 1)
  .option("--count <n>", "how many seeds", wholeNumber(1), 100)
  .option("--jobs <n>", "threads that share them", wholeNumber(1), 1)
  .option("--soak", "go on until told (Ctrl-C)")
  .option("--keep-going", "go on after a run that broke")
  .option("--no-shrink", "do not make a run that broke smaller")
  .option("--trace <n>", "lines of the story that are printed; 0 for none", wholeNumber(0), 60)
  .option("--verbose", "print each seed")
  .parse()
  .opts<{
    seed?: number;
    steps: number;
    from: number;
    count: number;
    jobs: number;
    soak?: true;
    keepGoing?: true;
    shrink: boolean;
    trace: number;
    verbose?: true;
  }>();

const PROGRESS_EACH = 500;
const { steps, trace: trace_lines } = values;
const single = values.seed !== undefined;
const first = values.seed ?? values.from;
const count = single ? 1 : values.soak ? Number.POSITIVE_INFINITY : values.count;
const jobs = single ? 1 : values.jobs;

/** What a thread tells of one seed. */
interface Told {
  readonly counts: Readonly<Record<string, number>>;
  /** The story of the failure, if it failed. */
  readonly broke?: string;
}

/** One thread's share: every `jobs`th seed. */
async function goThrough(job: number, tell: (told: Told) => boolean): Promise<void> {
  for (let seed = first + job; seed < first + count; seed += jobs) {
    if (values.verbose) console.log(`seed ${seed}`);
    const plan = drawPlan(seed, steps);
    const result = await runPlan(plan);
    if (single && result.failures.length === 0) console.log(lastOf(result.trace).join("\n"));
    if (!tell({ counts: result.counts, ...(result.failures.length === 0 ? {} : { broke: await story(plan, result) }) })) return;
  }
}

async function main(): Promise<void> {
  const total: Record<string, number> = {};
  const began_ms = performance.now();
  let runs = 0;
  let failed = 0;
  let interrupted = false;
  process.on("SIGINT", () => (interrupted = true));
  process.on("SIGTERM", () => (interrupted = true));

  const progress = (): void => {
    const seconds = (performance.now() - began_ms) / 1000;
    console.log(
      `${runs} runs of ${steps} steps from seed ${first} in ${seconds.toFixed(1)} s, ${failed} failed; ${total["crashes"] ?? 0} crashes, ${total["takeovers"] ?? 0} take-overs, ${total["entry claim"] ?? 0} claims, ${total["entries"] ?? 0} entries`,
    );
  };
  const hear = ({ counts, broke }: Told): boolean => {
    runs++;
    for (const [what, times] of Object.entries(counts)) total[what] = (total[what] ?? 0) + times;
    if (broke !== undefined) {
      failed++;
      console.log(broke);
    }
    if (runs % PROGRESS_EACH === 0) progress();
    return !interrupted && (broke === undefined || values.keepGoing === true);
  };

  if (jobs === 1) {
    await goThrough(0, hear);
  } else {
    const threads = Array.from({ length: jobs }, (_, job) => new Worker(import.meta.filename, { workerData: { job }, argv: process.argv.slice(2) }));
    const end = (): void => threads.forEach((thread) => thread.postMessage("end"));
    await Promise.all(
      threads.map(
        (thread) =>
          new Promise<void>((resolve, reject) => {
            thread.on("message", (told: Told) => {
              if (!hear(told)) end();
            });
            thread.on("error", reject);
            thread.on("exit", () => resolve());
          }),
      ),
    );
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
}

function lastOf(trace: readonly string[]): readonly string[] {
  return trace_lines === 0 ? [] : trace.slice(-trace_lines);
}

async function story(plan: Plan, result: RunResult): Promise<string> {
  const lines = [`seed ${plan.seed} (--steps ${steps}) broke:`, ...result.failures.map((what) => `  ${what}`)];
  if (!values.shrink) return [...lines, ...lastOf(result.trace)].join("\n");
  const small = await shrink(plan, result, { deadline_ms: performance.now() + 60_000, now_ms: () => performance.now() });
  lines.push(
    `It also breaks with ${small.plan.acts.filter(isFault).length} faults and ${small.plan.acts.length} acts (${small.runs} runs to find out):`,
    ...small.result.failures.map((what) => `  ${what}`),
    ...small.plan.acts.map((act) => `  ${describeAct(act)}`),
    ...lastOf(small.result.trace),
  );
  return lines.join("\n");
}

if (isMainThread) await main();
else {
  let ended = false;
  parentPort?.on("message", () => (ended = true));
  await goThrough((workerData as { job: number }).job, (told) => {
    parentPort?.postMessage(told);
    return !ended;
  });
  parentPort?.close();
}
