// shrink: makes a failing plan small: leaves out one act after another, faults first, for as long as the same kind of promise breaks.
import { isFault, type Plan } from "./plan.ts";
import { type RunOptions, type RunResult, runPlan } from "./simulation.ts";

export interface Shrunk {
  readonly plan: Plan;
  readonly result: RunResult;
  readonly runs: number;
}

/** What broke, without whom it happened to: the words before the first colon. */
const kindOf = (result: RunResult): string | undefined => result.failures[0]?.split(":")[0];

export async function shrink(plan: Plan, result: RunResult, limits: { deadline_ms: number; now_ms(): number }, options: RunOptions = {}): Promise<Shrunk> {
  let best: Shrunk = { plan, result, runs: 0 };
  let runs = 0;
  const kind = kindOf(result);
  const attempt = async (candidate: Plan): Promise<boolean> => {
    runs++;
    const tried = await runPlan(candidate, options);
    if (tried.failures.length === 0 || kindOf(tried) !== kind) return false;
    best = { plan: candidate, result: tried, runs };
    return true;
  };
  const without = async (from: number, count: number): Promise<boolean> => attempt({ ...best.plan, acts: best.plan.acts.toSpliced(from, count) });
  if (plan.poison !== undefined) await attempt({ ...best.plan, poison: undefined });
  // Large pieces from the end, then smaller ones, then one at a time.
  for (let size = Math.ceil(plan.acts.length / 2); size >= 1; size = size === 1 ? 0 : Math.ceil(size / 2)) {
    for (let from = best.plan.acts.length - size; from > -size; from -= size) {
      if (limits.now_ms() > limits.deadline_ms) return { ...best, runs };
      await without(Math.max(0, from), size);
    }
  }
  for (let index = best.plan.acts.length - 1; index >= 0; index--) {
    if (limits.now_ms() > limits.deadline_ms) return { ...best, runs };
    const act = best.plan.acts[index];
    if (act !== undefined && isFault(act)) await without(index, 1);
  }
  return { ...best, runs };
}
