// budget-page: one command's work on a budget: a copy of what it remembers, what is told of the work, and the answer to it.
import type { ActorEvent } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { BudgetContext } from "./budget-context.ts";

/** Works on a copy; what it comes to is `patch`, `told` and `answer`. Never kept beyond one command. */
export class Page {
  readonly #before: BudgetContext;
  now: BudgetContext;
  readonly told: ActorEvent[] = [];
  answer: JsonObject | undefined;

  constructor(context: BudgetContext) {
    this.#before = context;
    this.now = context;
  }

  /** What changed. */
  get patch(): Partial<BudgetContext> {
    return Object.fromEntries(Object.entries(this.now).filter(([name, value]) => value !== this.#before[name as keyof BudgetContext]));
  }

  /** The delay to arm the alarm with, when it moved. */
  get alarm_ms(): number | undefined {
    const { alarm_at_ms, now } = this.now;
    return alarm_at_ms === null || alarm_at_ms === this.#before.alarm_at_ms ? undefined : Math.max(0, alarm_at_ms - now.at_ms);
  }

  set(patch: Partial<BudgetContext>): void {
    this.now = { ...this.now, ...patch };
  }

  /** The alarm rings at `at_ms` at the latest. */
  wakeBy(at_ms: number | null): void {
    const { alarm_at_ms } = this.now;
    if (at_ms !== null && (alarm_at_ms === null || at_ms < alarm_at_ms)) this.set({ alarm_at_ms: at_ms });
  }
}
