// budget-levels: the tenant's money, and under it that of each agent, user and session that has a limit. Status and alerts follow from the numbers,
// in the one place where a level changes.
//
// Invariants (of budget.ts):
//   B3. reserved of a level = the sum of the open holds that count in it.
//   B5. settled of a level only rises within a period; what a period came to is told when it closes, and the next one begins at 0.
//   B6. Nothing here is a fraction: money is whole micro-dollars, and no sum leaves the safe integers.
import { assert } from "../protocol/assert.ts";
import { freshLevel, type Level, levelName, LEVELS_MAX, moneyOf, TENANT_LEVEL } from "./budget-context.ts";
import { type BudgetStatus, statusOf } from "./budget-decision.ts";
import type { Page } from "./budget-page.ts";
import { tableGet, tablePut, tableRows } from "./budget-table.ts";

const ALERTS_PERCENT: Readonly<Record<BudgetStatus, number>> = { healthy: 0, warning: 80, critical: 90, exceeded: 100 };

/** The levels of one page. */
export class Levels {
  readonly #page: Page;

  constructor(page: Page) {
    this.#page = page;
  }

  level(key: string): Level | undefined {
    return tableGet(this.#page.now.levels, key);
  }

  /** The one place where a level changes: status and alerts follow from the numbers. */
  put(key: string, next: Omit<Level, "status">): void {
    assert(Number.isSafeInteger(next.settled_usd_micros) && next.settled_usd_micros >= 0, "B6: what is settled is a safe integer, not below 0");
    assert(Number.isSafeInteger(next.reserved_usd_micros) && next.reserved_usd_micros >= 0, "B3: what is reserved is a safe integer, not below 0");
    const before = this.level(key)?.status ?? "healthy";
    const status = statusOf(next);
    const percent = ALERTS_PERCENT[status];
    const level: Level = { ...next, status, alerted_percent: Math.max(next.alerted_percent, percent) };
    this.#page.set({ levels: tablePut(this.#page.now.levels, key, level) });
    if (status !== before) {
      const { in_status } = this.#page.now;
      this.#page.set({ in_status: { ...in_status, [before]: Math.max(0, in_status[before] - 1), [status]: in_status[status] + 1, healthy: 0 } });
      this.#page.told.push({ type: "budget.status", ...levelName(key), from: before, to: status, ...moneyOf(level) });
    }
    for (const alert of [80, 90, 100])
      if (alert > next.alerted_percent && alert <= percent)
        this.#page.told.push({ type: "budget.alert", ...levelName(key), percent: alert, ...moneyOf(level) });
  }

  add(keys: readonly string[], settled_usd_micros: number, reserved_usd_micros: number): void {
    for (const key of keys) {
      const level = this.level(key);
      assert(level !== undefined, "a level that a hold counts in is there: none is ever dropped");
      this.put(key, {
        ...level,
        settled_usd_micros: level.settled_usd_micros + settled_usd_micros,
        reserved_usd_micros: level.reserved_usd_micros + reserved_usd_micros,
      });
    }
  }

  /** The levels that a call of these counts in. An agent's begins to count with its first call. */
  levelsOf({ session, agent, user }: { session: string; agent: string; user?: string | null }): string[] {
    const { at_ms } = this.#page.now.now;
    if (this.level(`agent/${agent}`) === undefined && this.#count() < LEVELS_MAX)
      this.#page.set({ levels: tablePut(this.#page.now.levels, `agent/${agent}`, freshLevel(at_ms)) });
    const keys = [TENANT_LEVEL, `agent/${agent}`, ...(user === undefined || user === null ? [] : [`user/${user}`]), `session/${session}`];
    return keys.filter((key) => this.level(key) !== undefined);
  }

  #count(): number {
    return this.#page.now.levels.reduce((sum, bucket) => sum + Object.keys(bucket).length, 0);
  }

  closePeriod(key: string, level: Level, to_ms: number, next_started_at_ms: number): void {
    const { period, period_started_at_ms, settled_usd_micros, limit_usd_micros } = level;
    const categories = key === TENANT_LEVEL ? { categories: this.#page.now.categories } : {};
    const [from, to] = [new Date(period_started_at_ms).toISOString(), new Date(to_ms).toISOString()];
    this.#page.told.push({ type: "budget.period_closed", ...levelName(key), period, from, to, settled_usd_micros, limit_usd_micros, ...categories });
    if (key === TENANT_LEVEL) this.#page.set({ categories: {} });
    this.put(key, { ...level, settled_usd_micros: 0, period_started_at_ms: next_started_at_ms, alerted_percent: 0 });
  }

  /** A new level counts what is in flight already: a limit that is set now holds for what runs now (B3). */
  open(key: string): void {
    let reserved_usd_micros = 0;
    let { holds } = this.#page.now;
    for (const [id, hold] of [...tableRows(holds)]) {
      if (key !== `agent/${hold.agent}` && key !== `user/${hold.user ?? ""}` && key !== `session/${hold.session}`) continue;
      reserved_usd_micros += hold.amount_usd_micros;
      holds = tablePut(holds, id, { ...hold, levels: [...hold.levels, key] });
    }
    this.#page.set({ holds });
    this.put(key, { ...freshLevel(this.#page.now.now.at_ms), reserved_usd_micros });
  }
}
