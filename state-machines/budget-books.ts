// budget-books: one command's work on a budget, with all its parts at hand: whatever is due by now is done first, then the command.
import { assert } from "../protocol/assert.ts";
import type { JsonObject } from "../protocol/json.ts";
import { Autonomy } from "./budget-autonomy.ts";
import type { ConfigureBody } from "./budget-commands.ts";
import { type BudgetContext, HOLD_LIFE_MS, type Level, levelKey, levelName, moneyOf } from "./budget-context.ts";
import { Holds } from "./budget-holds.ts";
import { Levels } from "./budget-levels.ts";
import { SlotLine } from "./budget-line.ts";
import { Page } from "./budget-page.ts";
import { periodEnd, periodStart } from "./budget-period.ts";
import { ProviderRates } from "./budget-provider-rates.ts";
import { rateRelaid } from "./budget-rate.ts";
import { placeLeft, placesWith, placeTaken } from "./budget-sessions.ts";
import { tableRows } from "./budget-table.ts";

/** What a refusal for want of a session's place says when to come again: sessions last long. */
const SESSION_RETRY_MS = 30_000;

/** Who hears alerts after this change. */
export function heardBy({ alerts_to = [] }: BudgetContext, { add = [], remove = [] }: NonNullable<ConfigureBody["alerts_to"]>): readonly string[] {
  return [...new Set([...alerts_to, ...add])].filter((path) => !remove.includes(path)).sort();
}

/** One command's work on a budget. */
export class Books {
  readonly page: Page;
  readonly #levels: Levels;
  readonly line: SlotLine;
  readonly rates: ProviderRates;
  readonly autonomy: Autonomy;
  readonly holds: Holds;

  constructor(context: BudgetContext) {
    this.page = new Page(context);
    this.#levels = new Levels(this.page);
    this.line = new SlotLine(this.page);
    this.rates = new ProviderRates(this.page, this.line);
    this.autonomy = new Autonomy(this.page, this.line);
    this.holds = new Holds(this.page, this.#levels, this.line, this.rates, this.autonomy);
    if (context.alarm_at_ms !== null && context.alarm_at_ms <= context.now.at_ms) this.#tick();
    this.page.answer = undefined; // What was due is nobody's question.
  }

  get alerts_to(): readonly string[] {
    return this.page.now.alerts_to ?? [];
  }

  /** B5 and the life of holds: whatever is due by now. */
  #tick(): void {
    const { at_ms } = this.page.now.now;
    this.page.set({ alarm_at_ms: null });
    for (const [key, level] of [...tableRows(this.page.now.levels)]) {
      const to_ms = periodEnd(level.period, level.period_started_at_ms);
      if (to_ms !== null && to_ms <= at_ms) this.#levels.closePeriod(key, level, to_ms, periodStart(level.period, at_ms));
      this.page.wakeBy(periodEnd(level.period, at_ms));
    }
    for (const [hold, { at_ms: since_ms }] of [...tableRows(this.page.now.holds)]) {
      if (since_ms + HOLD_LIFE_MS <= at_ms) this.holds.settle({ hold, cost_usd_micros: null }, "expired");
      else this.page.wakeBy(since_ms + HOLD_LIFE_MS);
    }
    for (const [slot, since_ms] of Object.entries(this.page.now.slots)) {
      if (since_ms + HOLD_LIFE_MS <= at_ms) this.line.releaseSlot(slot);
      else this.page.wakeBy(since_ms + HOLD_LIFE_MS);
    }
  }

  configure({ level: kind, id, limit_usd_micros, period, concurrency_max, rates, tier, alerts_to, projection, sessions_max }: ConfigureBody): void {
    const key = levelKey(kind, id);
    const { at_ms } = this.page.now.now;
    const known = this.#levels.level(key);
    if (known === undefined) this.#levels.open(key);
    const level = this.#levels.level(key);
    assert(level !== undefined, "it was there or has been opened");
    const next_period = period ?? level.period;
    const begins_ms = periodStart(next_period, at_ms);
    let next = { ...level, period: next_period };
    // What was settled goes on counting where all of it lies in the new period; else that much would be asked of today which was spent before.
    if (next_period !== level.period && level.period_started_at_ms < begins_ms) {
      if (level.settled_usd_micros > 0) this.#levels.closePeriod(key, level, at_ms, begins_ms);
      next = { ...(this.#levels.level(key) ?? level), period: next_period, period_started_at_ms: begins_ms };
    }
    const limit = limit_usd_micros === undefined ? level.limit_usd_micros : limit_usd_micros;
    this.#levels.put(key, { ...next, limit_usd_micros: limit, alerted_percent: limit === level.limit_usd_micros ? next.alerted_percent : 0 });
    this.page.wakeBy(periodEnd(next_period, at_ms));
    if (concurrency_max !== undefined) this.page.set({ concurrency_max });
    for (const [provider, rate] of Object.entries(rates ?? {})) {
      const { [provider]: before, ...others } = this.page.now.rates;
      const window = before === undefined || rate === null ? [] : rateRelaid(before.limit, rate, before.window);
      this.page.set({ rates: rate === null ? others : { ...others, [provider]: { limit: rate, window } } });
    }
    if (tier !== undefined) this.rates.setTier(tier);
    if (rates !== undefined || tier !== undefined) this.rates.forgetTaken();
    if (alerts_to !== undefined) this.page.set({ alerts_to: heardBy(this.page.now, alerts_to) });
    if (projection !== undefined) this.page.set({ projection });
    if (sessions_max !== undefined) this.page.set({ session_places: placesWith(this.page.now.session_places ?? undefined, sessions_max) ?? null });
    const now = this.#levels.level(key) as Level;
    const told = {
      limit_usd_micros: now.limit_usd_micros,
      period: now.period,
      concurrency_max: this.page.now.concurrency_max,
      ...(rates === undefined ? {} : { rates: rates as unknown as JsonObject }),
      ...(tier === undefined ? {} : { tier: tier as unknown as JsonObject }),
      ...(alerts_to === undefined ? {} : { alerts_to: this.page.now.alerts_to ?? [] }),
      ...(projection === undefined ? {} : { projection }),
      ...(sessions_max === undefined ? {} : { sessions_max }),
    };
    this.page.told.push({ type: "budget.configured", ...levelName(key), ...told });
    if (concurrency_max !== undefined) this.line.callNext();
    this.page.answer = { ...levelName(key), ...moneyOf(now), period: now.period, status: now.status };
  }

  /** SP1 of budget-sessions.ts. Without a bound there is nothing to count. */
  acquireSession(session: string): void {
    const places = this.page.now.session_places ?? null;
    if (places === null) {
      this.page.answer = { granted: true };
      return;
    }
    const { max, taken } = places;
    const place = placeTaken(places, session, this.page.now.now.at_ms);
    if (place.kind === "full") {
      const details = { sessions: taken, sessions_max: max, retry_after_ms: SESSION_RETRY_MS };
      this.line.refuse(`session/${session}`, "sessions_exceeded", `the tenant has ${taken} sessions, and may have ${max}`, details);
      this.page.answer = { ...this.page.answer, doubted: place.doubted };
      return;
    }
    this.page.set({ session_places: place.places });
    this.page.answer = { granted: true, sessions: place.places.taken, sessions_max: max, ...(place.repeated ? { repeated: true } : {}) };
  }

  releaseSession(session: string): void {
    const places = this.page.now.session_places ?? null;
    const left = places === null ? undefined : placeLeft(places, session);
    if (left !== undefined) this.page.set({ session_places: left });
    this.page.answer = { released: left !== undefined };
  }
}
