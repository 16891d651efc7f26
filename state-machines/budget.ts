// budget: a tenant's money, the calls that may run at once, and its rates at each provider. `tenant.{t}.budget.main`. One actor decides for
// all sessions of the tenant, so a limit is a limit: every question is one step of it.
//
//   budget.create ──▶ healthy ◀─▶ warning ◀─▶ critical ◀─▶ exceeded       the worst status of any level, by (settled + reserved) / limit
//
//   one hold:   reserve ──granted──▶ open ──settle──▶ closed      settled: what the call cost, or the whole hold where nobody knows
//                  │                  ├──release──▶ closed      nothing was spent
//                  └──refused         └──a day─────▶ closed      nobody said anything: settled whole
//
// Levels: the tenant, and under it each agent, user and session that has a limit (agents are counted without one too). A call counts in
// all that apply. A level without a limit counts and never refuses.
//
// It leaves to others: prices and estimates (providers/), asking before a call (actors/model-money.ts), telling what a call came to
// (state-machines/step.ts sends it with the commit that ends the attempt).
//
// Invariants:
//   B1. No grant takes settled + reserved of any level above its limit. A limit admits what equals it; a limit of 0 admits nothing.
//   B2. Whoever asks for at least `minimum` where every level has that much left is granted, unless concurrency or a rate forbids it.
//   B3. reserved of a level = the sum of the open holds that count in it.
//   B4. A hold is settled or released once. A hold that was closed, or whose closing came before its reservation, is never opened again.
//   B5. settled of a level only rises within a period; what a period came to is told when it closes, and the next one begins at 0.
//   B6. Nothing here is a fraction: money is whole micro-dollars, and no sum leaves the safe integers.
//   B7. A settlement above the hold is counted in full and told as `budget.overrun`: it is never cut down to what was reserved.
//   B8. Everything kept has a bound: LEVELS_MAX, HOLDS_MAX, CLOSED_MAX, SLOTS_MAX, RATES_MAX, LINE_MAX.
//   B11. Parts of a cost by category are kept apart only where they are within it: categories sum to what is settled.
//   B10. An agent begins no more actions in a period than the limit that it is asked with (budget-actions.ts).
//   B9. A slot goes to whose turn it is (protocol/priority.ts): nobody is granted one while more stand before him than are free.
import { enqueueActions, setup } from "xstate";
import { assert } from "../protocol/assert.ts";
import { type Priority, PRIORITY_DEFAULT, turnAt } from "../protocol/priority.ts";
import { type BudgetLevelKind, HOLD_PATTERN, MONEY_USD_MICROS_MAX } from "../protocol/commands.ts";
import { type ErrorBody, type ErrorCode, errorBody } from "../protocol/errors.ts";
import { actorPath } from "../protocol/ids.ts";
import type { CostProjection } from "../protocol/cost-projection.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { RateTier } from "../protocol/rate-tiers.ts";
import { type ActionCounts, actionCounted, type ActionKind, type ActionLimits, actionsIn } from "./budget-actions.ts";
import { type BudgetStatus, decide, type Decision, type DecisionInputs, headroom, STATUSES, statusOf, utilisation } from "./budget-decision.ts";
import { type BudgetPeriod, periodEnd, periodStart } from "./budget-period.ts";
import { project } from "./budget-projection.ts";
import { type RateLimit, rateRelaid, rateSlice, type RateWindow, rateTaken, rateUsed, rateWait } from "./budget-rate.ts";
import { placeHeard, placeLeft, placesWith, placeTaken, type SessionPlaces } from "./budget-sessions.ts";
import { emptyTable, type Table, tableDrop, tableGet, tablePut, tableRemember, tableRows } from "./budget-table.ts";
import { givenBack, type HoldUse, type RateUse, type Taken, takenWith } from "./budget-windows.ts";
import type { ActorDefinition, ActorView, BaseContext, CommandEvent, CreationInput, Emitted } from "./definition.ts";

/** Agents are at most 1,000 (tenant.ts); three times as many users and sessions can have a limit of their own. */
export const LEVELS_MAX = 4_000;
/** Calls in flight of one tenant. More than a deployment of workers runs; as JSON they fit a snapshot with room. */
export const HOLDS_MAX = 5_000;
/**
 * Senders (an effect of an actor) whose last closed attempt is remembered. It is needed while a reservation of that attempt may still
 * arrive: one that waits in COMMANDS, or in the hands of a worker that was lost and is not quite dead. By then fewer than this many others
 * have ended; for the one in a million that comes later still, HOLD_LIFE_MS closes what it opens.
 */
export const CLOSED_MAX = 2_048;
/** A hold that nobody closes. No call lasts as long (a session gives one up after minutes), and a lost one is settled when it is recovered. */
export const HOLD_LIFE_MS = 24 * 60 * 60 * 1000;
/**
 * Outcomes of keyed commands that are remembered beside the holds. Few, because they are most of a snapshot: a repeat that comes later still
 * finds its hold open (the same grant) or closed (nothing changes).
 */
export const KEYS_MAX = 128;
/** Slots that were taken by name, beside the calls in flight. */
export const SLOTS_MAX = 1_000;
/** Providers with a rate of their own. There are a dozen. */
export const RATES_MAX = 64;
/** Kinds of cost a report tells apart. */
export const CATEGORIES_MAX = 32;
/** Webhooks that hear a budget's alerts. */
export const ALERTS_TO_MAX = 16;
/** What a refusal for want of a session's place says when to come again: sessions last long. */
const SESSION_RETRY_MS = 30_000;
/** What a refusal for want of a slot says when to ask again. */
const SLOT_RETRY_MS = 250;
/** Calls that wait in line for a slot. More are refused without a place in it, and may come again. */
export const LINE_MAX = 1_000;
/** Who stands in line asks again this often. Whose turn it is, is told at once (`slot.free`); the asking only makes up for what was not heard. */
export const LINE_ASK_MS = 5_000;
/** Who has not asked for so long stands in line no more: its process died, and the next attempt stands there under a name of its own. */
export const LINE_SILENT_MS = 12_000;
assert(LINE_SILENT_MS > 2 * LINE_ASK_MS, "who misses one asking keeps its place");
/** Whose turn it is, in one event. More slots than that do not come free at once; those behind are told by their own asking. */
const CALLED_MAX = 32;
const ALERTS_PERCENT: Readonly<Record<BudgetStatus, number>> = { healthy: 0, warning: 80, critical: 90, exceeded: 100 };
assert(HOLDS_MAX * MONEY_USD_MICROS_MAX < Number.MAX_SAFE_INTEGER, "B6: what is reserved is always a safe integer");

export interface Level {
  readonly limit_usd_micros: number | null;
  readonly period: BudgetPeriod;
  /** When what is settled began to count. */
  readonly period_started_at_ms: number;
  readonly settled_usd_micros: number;
  readonly reserved_usd_micros: number;
  readonly status: BudgetStatus;
  /** The highest alert (80, 90, 100 percent) told in this period under this limit. */
  readonly alerted_percent: number;
}

export interface Hold {
  readonly session: string;
  readonly agent: string;
  readonly user: string | null;
  readonly model: string;
  readonly category: string;
  /** Of all its parts. */
  readonly amount_usd_micros: number;
  /** A call that tries again after a try that cost something asks for one more part. The newest, and its grant. */
  readonly part: number;
  readonly granted_usd_micros: number;
  readonly choice: "wanted" | "degraded";
  readonly levels: readonly string[];
  readonly at_ms: number;
  /** It is counted as an action of its agent; absent where its agent has no limit of them. */
  readonly acts?: true;
  /** In the windows of rates; absent where its caller does not say what it used, or where nothing was taken. */
  readonly taken?: readonly Taken[];
}

/** A call that waits for a slot. */
export interface InLine {
  readonly priority: Priority;
  readonly since_ms: number;
  readonly asked_ms: number;
  /** Counts those who joined, so that equal turns go in the order they came. */
  readonly number: number;
}

/** The newest closed attempt of a sender: it and all before it are closed. */
interface Closed {
  readonly seq: number;
  readonly attempt: number;
}

export interface BudgetContext extends BaseContext {
  /** `tenant/main`, `agent/{id}`, `user/{id}`, `session/{id}` */
  readonly levels: Table<Level>;
  /** How many levels are in each status but healthy: the outer state is the worst one that is not 0. */
  readonly in_status: Readonly<Record<BudgetStatus, number>>;
  /** By hold id. */
  readonly holds: Table<Hold>;
  readonly holds_open: number;
  /** By sender: the actor's path and the effect's id. */
  readonly closed: Table<Closed>;
  readonly concurrency_max: number | null;
  /** slot → since when. */
  readonly slots: Readonly<Record<string, number>>;
  /** Who waits for a slot, by hold id; absent while nobody ever did. */
  readonly line?: Table<InLine>;
  readonly rates: Readonly<Record<string, { readonly limit: RateLimit; readonly window: RateWindow }>>;
  /** The rate at every provider without one of its own, and what was taken there; absent where none was ever set. */
  readonly tier?: RateTier | null;
  readonly tier_windows?: Readonly<Record<string, RateWindow>>;
  /** By `agent/{id}`, of those that have a limit of actions; absent where none ever had one. */
  readonly actions?: Table<ActionCounts>;
  /** Webhooks that hear each alert; absent where none was ever named. */
  readonly alerts_to?: readonly string[];
  /** By which rule a period's end is foreseen; absent where none was ever named. */
  readonly projection?: CostProjection;
  /** Its sessions, where it may have only so many; absent where that was never said, null where it is said no longer. */
  readonly session_places?: SessionPlaces | null;
  /** Of the tenant's running period. */
  readonly categories: Readonly<Record<string, number>>;
  /** Everything ever settled. */
  readonly settled_ever_usd_micros: number;
  /** The next moment at which a period ends or a hold has lived too long; may be early, never late. */
  readonly alarm_at_ms: number | null;
  readonly created_at_ms: number;
}

// ── commands ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface ConfigureBody {
  readonly level: BudgetLevelKind;
  readonly id?: string;
  readonly limit_usd_micros?: number | null;
  readonly period?: BudgetPeriod;
  readonly concurrency_max?: number | null;
  readonly rates?: Readonly<Record<string, RateLimit | null>>;
  readonly tier?: RateTier | null;
  readonly alerts_to?: { readonly add?: readonly string[]; readonly remove?: readonly string[] };
  readonly projection?: CostProjection;
  readonly sessions_max?: number | null;
}

interface Ask {
  readonly model: string;
  /** null: its price is not known. */
  readonly amount_usd_micros: number | null;
  readonly minimum_usd_micros: number;
}

/** Of one call: one request, and tokens at most. */
interface RateOfCall {
  readonly provider: string;
  readonly tokens: number;
  /** Its settlement says what was used, so the rest can come back. Callers of before do not say it, and nothing comes back. */
  readonly returns?: true;
}

export interface ReserveBody extends Ask {
  /** `{actor path}/{inst}/{attempt}` */
  readonly hold: string;
  readonly session: string;
  readonly agent: string;
  readonly user?: string;
  readonly category?: string;
  readonly part?: number;
  /** What the caller would do if it must be cheaper. */
  readonly degraded?: Ask & { readonly rate?: RateOfCall };
  readonly rate?: RateOfCall;
  /** Its agent's: the hold is one of its model calls. */
  readonly actions?: ActionLimits;
  /** With it, who is refused for want of a slot stands in line: the next slots go by it and by the time that was waited. */
  readonly priority?: Priority;
}

export interface SettleBody {
  readonly hold: string;
  /** null: nobody knows, so the whole hold. */
  readonly cost_usd_micros: number | null;
  /** Where the cost is not known: what of it is, because it ended before. */
  readonly spent_usd_micros?: number;
  readonly model?: string;
  /** What its calls used in windows; absent where nobody knows, or nothing was called. */
  readonly used?: readonly RateUse[];
  /** Parts of the cost that are of another category than the hold. */
  readonly by_category?: Readonly<Record<string, number>>;
}

interface RateBody {
  readonly provider: string;
  readonly requests: number;
  readonly tokens: number;
  /** The hold whose calls these are: what they do not use comes back with it. */
  readonly hold?: string;
}

interface ActionBody {
  /** As holds are named: of one attempt. */
  readonly action: string;
  readonly agent: string;
  readonly kind: ActionKind;
  readonly limits: ActionLimits;
}

type BudgetEvent =
  | CommandEvent<"budget.configure", ConfigureBody>
  | CommandEvent<"budget.reserve", ReserveBody>
  | CommandEvent<"budget.settle", SettleBody>
  | CommandEvent<"budget.release", { readonly hold: string }>
  | CommandEvent<"slot.acquire" | "slot.release", { readonly slot: string }>
  | CommandEvent<"session.acquire" | "session.release", { readonly session: string }>
  | CommandEvent<"rate.acquire", RateBody>
  | CommandEvent<"action.acquire", ActionBody>
  | { readonly type: "budget.alarm" };

// ── the books: one command's work on a context ───────────────────────────────────────────────────────────────────────────────────────

export const TENANT_LEVEL = "tenant/main";
export const levelKey = (kind: BudgetLevelKind, id: string | undefined): string => (kind === "tenant" ? TENANT_LEVEL : `${kind}/${id ?? ""}`);

/** A level's name as the wire has it: `level` and, under the tenant, `id`. */
export function levelName(key: string): { level: string; id?: string } {
  if (key === TENANT_LEVEL) return { level: "tenant" };
  const slash = key.indexOf("/");
  return { level: key.slice(0, slash), id: key.slice(slash + 1) };
}

/** Whose hold it is: two holds of one sender are attempts of which the later one follows the earlier. */
function senderOf(hold: string): { sender: string } & Closed {
  const [, actor, seq, effect, attempt] = HOLD_PATTERN.exec(hold) ?? [];
  assert(actor !== undefined && seq !== undefined && effect !== undefined && attempt !== undefined, "a hold's id has passed its schema");
  return { sender: `${actor}:${effect}`, seq: Number(seq), attempt: Number(attempt) };
}

function freshLevel(at_ms: number): Level {
  return {
    limit_usd_micros: null,
    period: "none",
    period_started_at_ms: at_ms,
    settled_usd_micros: 0,
    reserved_usd_micros: 0,
    status: "healthy",
    alerted_percent: 0,
  };
}

/** Who hears alerts after this change. */
function heardBy({ alerts_to = [] }: BudgetContext, { add = [], remove = [] }: NonNullable<ConfigureBody["alerts_to"]>): readonly string[] {
  return [...new Set([...alerts_to, ...add])].filter((path) => !remove.includes(path)).sort();
}

const moneyOf = ({ limit_usd_micros, settled_usd_micros, reserved_usd_micros }: Level): JsonObject => ({
  limit_usd_micros,
  settled_usd_micros,
  reserved_usd_micros,
});

/** Does one in line go before a call whose turn is then, and that joined as that number (absent: it has not joined)? */
function isBefore(one: InLine, turn_at_ms: number, number = Number.POSITIVE_INFINITY): boolean {
  const at_ms = turnAt(one.priority, one.since_ms);
  return at_ms < turn_at_ms || (at_ms === turn_at_ms && one.number < number);
}

interface Verdict {
  readonly decision: Decision;
  readonly inputs: DecisionInputs;
  readonly key: string;
}
const SEVERITY = { continue: 0, degrade: 1, terminate: 2 } as const;

/** Works on a copy; what it comes to is `patch`, `told` and `answer`. Never kept beyond one command. */
class Books {
  readonly #before: BudgetContext;
  #now: BudgetContext;
  readonly told: ActorEvent[] = [];
  answer: JsonObject | undefined;

  constructor(context: BudgetContext) {
    this.#before = context;
    this.#now = context;
    if (context.alarm_at_ms !== null && context.alarm_at_ms <= context.now.at_ms) this.#tick();
    this.answer = undefined; // What was due is nobody's question.
  }

  /** What changed. */
  get patch(): Partial<BudgetContext> {
    return Object.fromEntries(Object.entries(this.#now).filter(([name, value]) => value !== this.#before[name as keyof BudgetContext]));
  }
  get alerts_to(): readonly string[] {
    return this.#now.alerts_to ?? [];
  }
  /** The delay to arm the alarm with, when it moved. */
  get alarm_ms(): number | undefined {
    const { alarm_at_ms, now } = this.#now;
    return alarm_at_ms === null || alarm_at_ms === this.#before.alarm_at_ms ? undefined : Math.max(0, alarm_at_ms - now.at_ms);
  }

  #set(patch: Partial<BudgetContext>): void {
    this.#now = { ...this.#now, ...patch };
  }

  /** The alarm rings at `at_ms` at the latest. */
  #wakeBy(at_ms: number | null): void {
    const { alarm_at_ms } = this.#now;
    if (at_ms !== null && (alarm_at_ms === null || at_ms < alarm_at_ms)) this.#set({ alarm_at_ms: at_ms });
  }

  // ── levels ──

  #level(key: string): Level | undefined {
    return tableGet(this.#now.levels, key);
  }

  /** The one place where a level changes: status and alerts follow from the numbers. */
  #put(key: string, next: Omit<Level, "status">): void {
    assert(Number.isSafeInteger(next.settled_usd_micros) && next.settled_usd_micros >= 0, "B6: what is settled is a safe integer, not below 0");
    assert(Number.isSafeInteger(next.reserved_usd_micros) && next.reserved_usd_micros >= 0, "B3: what is reserved is a safe integer, not below 0");
    const before = this.#level(key)?.status ?? "healthy";
    const status = statusOf(next);
    const percent = ALERTS_PERCENT[status];
    const level: Level = { ...next, status, alerted_percent: Math.max(next.alerted_percent, percent) };
    this.#set({ levels: tablePut(this.#now.levels, key, level) });
    if (status !== before) {
      const { in_status } = this.#now;
      this.#set({ in_status: { ...in_status, [before]: Math.max(0, in_status[before] - 1), [status]: in_status[status] + 1, healthy: 0 } });
      this.told.push({ type: "budget.status", ...levelName(key), from: before, to: status, ...moneyOf(level) });
    }
    for (const alert of [80, 90, 100])
      if (alert > next.alerted_percent && alert <= percent) this.told.push({ type: "budget.alert", ...levelName(key), percent: alert, ...moneyOf(level) });
  }

  #add(keys: readonly string[], settled_usd_micros: number, reserved_usd_micros: number): void {
    for (const key of keys) {
      const level = this.#level(key);
      assert(level !== undefined, "a level that a hold counts in is there: none is ever dropped");
      this.#put(key, {
        ...level,
        settled_usd_micros: level.settled_usd_micros + settled_usd_micros,
        reserved_usd_micros: level.reserved_usd_micros + reserved_usd_micros,
      });
    }
  }

  /** The levels that a call of these counts in. An agent's begins to count with its first call. */
  #levelsOf({ session, agent, user }: { session: string; agent: string; user?: string | null }): string[] {
    const { at_ms } = this.#now.now;
    if (this.#level(`agent/${agent}`) === undefined && this.#count() < LEVELS_MAX)
      this.#set({ levels: tablePut(this.#now.levels, `agent/${agent}`, freshLevel(at_ms)) });
    const keys = [TENANT_LEVEL, `agent/${agent}`, ...(user === undefined || user === null ? [] : [`user/${user}`]), `session/${session}`];
    return keys.filter((key) => this.#level(key) !== undefined);
  }

  #count(): number {
    return this.#now.levels.reduce((sum, bucket) => sum + Object.keys(bucket).length, 0);
  }

  /** B5 and the life of holds: whatever is due by now. */
  #tick(): void {
    const { at_ms } = this.#now.now;
    this.#set({ alarm_at_ms: null });
    for (const [key, level] of [...tableRows(this.#now.levels)]) {
      const to_ms = periodEnd(level.period, level.period_started_at_ms);
      if (to_ms !== null && to_ms <= at_ms) this.#closePeriod(key, level, to_ms, periodStart(level.period, at_ms));
      this.#wakeBy(periodEnd(level.period, at_ms));
    }
    for (const [hold, { at_ms: since_ms }] of [...tableRows(this.#now.holds)]) {
      if (since_ms + HOLD_LIFE_MS <= at_ms) this.settle({ hold, cost_usd_micros: null }, "expired");
      else this.#wakeBy(since_ms + HOLD_LIFE_MS);
    }
    for (const [slot, since_ms] of Object.entries(this.#now.slots)) {
      if (since_ms + HOLD_LIFE_MS <= at_ms) this.releaseSlot(slot);
      else this.#wakeBy(since_ms + HOLD_LIFE_MS);
    }
  }

  #closePeriod(key: string, level: Level, to_ms: number, next_started_at_ms: number): void {
    const { period, period_started_at_ms, settled_usd_micros, limit_usd_micros } = level;
    const categories = key === TENANT_LEVEL ? { categories: this.#now.categories } : {};
    const [from, to] = [new Date(period_started_at_ms).toISOString(), new Date(to_ms).toISOString()];
    this.told.push({ type: "budget.period_closed", ...levelName(key), period, from, to, settled_usd_micros, limit_usd_micros, ...categories });
    if (key === TENANT_LEVEL) this.#set({ categories: {} });
    this.#put(key, { ...level, settled_usd_micros: 0, period_started_at_ms: next_started_at_ms, alerted_percent: 0 });
  }

  configure({ level: kind, id, limit_usd_micros, period, concurrency_max, rates, tier, alerts_to, projection, sessions_max }: ConfigureBody): void {
    const key = levelKey(kind, id);
    const { at_ms } = this.#now.now;
    const known = this.#level(key);
    if (known === undefined) this.#open(key);
    const level = this.#level(key);
    assert(level !== undefined, "it was there or has been opened");
    const next_period = period ?? level.period;
    const begins_ms = periodStart(next_period, at_ms);
    let next = { ...level, period: next_period };
    // What was settled goes on counting where all of it lies in the new period; else that much would be asked of today which was spent before.
    if (next_period !== level.period && level.period_started_at_ms < begins_ms) {
      if (level.settled_usd_micros > 0) this.#closePeriod(key, level, at_ms, begins_ms);
      next = { ...(this.#level(key) ?? level), period: next_period, period_started_at_ms: begins_ms };
    }
    const limit = limit_usd_micros === undefined ? level.limit_usd_micros : limit_usd_micros;
    this.#put(key, { ...next, limit_usd_micros: limit, alerted_percent: limit === level.limit_usd_micros ? next.alerted_percent : 0 });
    this.#wakeBy(periodEnd(next_period, at_ms));
    if (concurrency_max !== undefined) this.#set({ concurrency_max });
    for (const [provider, rate] of Object.entries(rates ?? {})) {
      const { [provider]: before, ...others } = this.#now.rates;
      const window = before === undefined || rate === null ? [] : rateRelaid(before.limit, rate, before.window);
      this.#set({ rates: rate === null ? others : { ...others, [provider]: { limit: rate, window } } });
    }
    if (tier !== undefined) this.#setTier(tier);
    if (rates !== undefined || tier !== undefined) this.#forgetTaken();
    if (alerts_to !== undefined) this.#set({ alerts_to: heardBy(this.#now, alerts_to) });
    if (projection !== undefined) this.#set({ projection });
    if (sessions_max !== undefined) this.#set({ session_places: placesWith(this.#now.session_places ?? undefined, sessions_max) ?? null });
    const now = this.#level(key) as Level;
    const told = {
      limit_usd_micros: now.limit_usd_micros,
      period: now.period,
      concurrency_max: this.#now.concurrency_max,
      ...(rates === undefined ? {} : { rates: rates as unknown as JsonObject }),
      ...(tier === undefined ? {} : { tier: tier as unknown as JsonObject }),
      ...(alerts_to === undefined ? {} : { alerts_to: this.#now.alerts_to ?? [] }),
      ...(projection === undefined ? {} : { projection }),
      ...(sessions_max === undefined ? {} : { sessions_max }),
    };
    this.told.push({ type: "budget.configured", ...levelName(key), ...told });
    if (concurrency_max !== undefined) this.#callNext();
    this.answer = { ...levelName(key), ...moneyOf(now), period: now.period, status: now.status };
  }

  /** A new level counts what is in flight already: a limit that is set now holds for what runs now (B3). */
  #open(key: string): void {
    let reserved_usd_micros = 0;
    let { holds } = this.#now;
    for (const [id, hold] of [...tableRows(holds)]) {
      if (key !== `agent/${hold.agent}` && key !== `user/${hold.user ?? ""}` && key !== `session/${hold.session}`) continue;
      reserved_usd_micros += hold.amount_usd_micros;
      holds = tablePut(holds, id, { ...hold, levels: [...hold.levels, key] });
    }
    this.#set({ holds });
    this.#put(key, { ...freshLevel(this.#now.now.at_ms), reserved_usd_micros });
  }

  // ── holds ──

  #isClosed(hold: string): boolean {
    const { sender, seq, attempt } = senderOf(hold);
    const mark = tableGet(this.#now.closed, sender);
    return mark !== undefined && (seq < mark.seq || (seq === mark.seq && attempt <= mark.attempt));
  }

  #close(hold: string): void {
    const { sender, seq, attempt } = senderOf(hold);
    this.#leaveLine(hold);
    if (!this.#isClosed(hold)) this.#set({ closed: tableRemember(this.#now.closed, sender, { seq, attempt }, CLOSED_MAX) });
    if (tableGet(this.#now.holds, hold) === undefined) return;
    this.#set({ holds: tableDrop(this.#now.holds, hold), holds_open: this.#now.holds_open - 1 });
  }

  get #concurrency(): number {
    return this.#now.holds_open + Object.keys(this.#now.slots).length;
  }

  /** By every level that applies; the gravest word counts. */
  #judge(keys: readonly string[], { amount_usd_micros, minimum_usd_micros }: Ask): Verdict {
    const { concurrency_max } = this.#now;
    let worst: Verdict | undefined;
    for (const key of keys) {
      const level = this.#level(key);
      assert(level !== undefined, "only levels that are there are judged");
      const { settled_usd_micros, reserved_usd_micros, limit_usd_micros, period, period_started_at_ms } = level;
      const concurrency = this.#concurrency;
      const projection = project(this.#now.projection, {
        settled_usd_micros,
        others_usd_micros: reserved_usd_micros,
        amount_usd_micros: amount_usd_micros ?? 0,
        others: this.#now.holds_open,
        period,
        period_started_at_ms,
        at_ms: this.#now.now.at_ms,
      });
      const inputs = { settled_usd_micros, reserved_usd_micros, limit_usd_micros, minimum_usd_micros, concurrency, concurrency_max, projection };
      const decision = decide(inputs);
      const graver = worst === undefined || SEVERITY[decision.kind] > SEVERITY[worst.decision.kind];
      const tighter =
        worst !== undefined &&
        decision.kind === worst.decision.kind &&
        (headroom(inputs) < headroom(worst.inputs) || (headroom(inputs) === headroom(worst.inputs) && utilisation(inputs) > utilisation(worst.inputs)));
      if (graver || tighter) worst = { decision, inputs, key };
    }
    assert(worst !== undefined, "the tenant's own level always applies");
    return worst;
  }

  #refuse(hold: string, code: ErrorCode, message: string, details: JsonObject): void {
    this.#leaveLine(hold);
    this.told.push({ type: "budget.refused", hold, code, ...details });
    this.answer = { refused: { code, message, details } };
  }

  reserve(body: ReserveBody): void {
    const { hold, session, agent, user, part = 1, category = "llm", degraded, rate } = body;
    const open = tableGet(this.#now.holds, hold);
    if (open === undefined ? this.#isClosed(hold) : part < open.part) {
      this.#refuse(hold, "conflict", "this attempt has ended; nothing can be reserved for it any more", { ended: true }); // B4
      return;
    }
    if (open !== undefined && part === open.part) {
      const rated = rate?.returns === true ? { rated: this.#isRated } : {};
      this.answer = { granted_usd_micros: open.granted_usd_micros, choice: open.choice, model: open.model, repeated: true, ...rated };
      return;
    }
    const keys = open?.levels ?? this.#levelsOf({ session, agent, ...(user === undefined ? {} : { user }) });
    const limited = keys.some((key) => this.#level(key)?.limit_usd_micros !== null);
    if (limited && body.amount_usd_micros === null) {
      this.#refuse(hold, "price_unknown", `the price of ${body.model} is not known, and a limit applies`, { model: body.model });
      return;
    }
    const wanted = this.#judge(keys, body);
    const cheaper =
      degraded === undefined || (limited && degraded.amount_usd_micros === null) || wanted.decision.kind === "continue"
        ? undefined
        : this.#judge(keys, degraded);
    const takes_cheaper = cheaper !== undefined && cheaper.decision.kind !== "terminate";
    if (wanted.decision.kind === "terminate" && !takes_cheaper) {
      this.#refuseMoney(hold, wanted, body, open?.amount_usd_micros ?? 0);
      return;
    }
    const acts = open?.acts === true || body.actions === undefined ? undefined : body.actions;
    if (acts !== undefined && !this.#mayAct(hold, agent, "model_calls", acts)) return;
    if (open === undefined && !this.#roomForOne(hold, body.priority)) return;
    const ask: Ask = takes_cheaper && degraded !== undefined ? degraded : body;
    const counts = (takes_cheaper ? degraded?.rate : undefined) ?? rate;
    const taken = counts === undefined ? undefined : this.#takeRate(hold, { ...counts, requests: 1 });
    if (taken === "refused") return;
    const asked = ask.amount_usd_micros ?? 0;
    const room = Math.min(...keys.map((key) => headroom(this.#level(key) as Level)));
    const granted = Math.min(asked, Math.max(room, 0)); // B1: never more than the tightest level has left
    assert(granted >= Math.min(asked, ask.minimum_usd_micros), "B2: what was not refused is granted at least its minimum");
    const choice = takes_cheaper ? "degraded" : "wanted";
    const decision = this.#decisionOf(wanted, takes_cheaper, cheaper);
    const next: Hold = {
      session,
      agent,
      user: user ?? null,
      model: ask.model,
      category,
      amount_usd_micros: (open?.amount_usd_micros ?? 0) + granted,
      part,
      granted_usd_micros: granted,
      choice,
      levels: keys,
      at_ms: open?.at_ms ?? this.#now.now.at_ms,
      ...(open?.taken === undefined ? {} : { taken: open.taken }),
      ...(open?.acts === undefined && acts === undefined ? {} : { acts: true as const }),
    };
    if (acts !== undefined) this.#countAction(agent, "model_calls");
    const places = placeHeard(this.#now.session_places ?? undefined, session, this.#now.now.at_ms);
    if (places !== undefined && places !== this.#now.session_places) this.#set({ session_places: places });
    this.#set({ holds: tablePut(this.#now.holds, hold, next), holds_open: this.#now.holds_open + (open === undefined ? 1 : 0) });
    const returns = counts?.returns === true;
    if (taken !== undefined && returns) this.#remember(hold, taken);
    this.told.push({
      type: "budget.reserved",
      hold,
      session,
      agent,
      user: next.user,
      model: ask.model,
      amount_usd_micros: granted,
      asked_usd_micros: asked,
      ...(part === 1 ? {} : { part }),
      decision,
    });
    this.#add(keys, 0, granted);
    this.#wakeBy(next.at_ms + HOLD_LIFE_MS);
    // Who will say what it used hears whether anybody counts: then each further call of the hold asks for its place in the window.
    this.answer = { granted_usd_micros: granted, choice, model: ask.model, limited, decision, ...(returns ? { rated: this.#isRated } : {}) };
  }

  /** What was decided, with everything it was decided by (T12). */
  #decisionOf(wanted: Verdict, takes_cheaper: boolean, cheaper: Verdict | undefined): JsonObject {
    const { inputs, key, decision } = wanted;
    // A call that does not fit as it was wanted, and does as its plan has it, is degraded and goes on.
    const kind = decision.kind === "terminate" ? "degrade" : decision.kind;
    return {
      kind,
      ...(decision.kind === "continue" ? {} : { reason: decision.reason }),
      ...(kind === "degrade" ? { applied: takes_cheaper, has_plan: cheaper !== undefined } : {}),
      ...levelName(key),
      inputs: { ...inputs, projection: { ...inputs.projection } },
    };
  }

  #refuseMoney(hold: string, { inputs, key }: Verdict, { minimum_usd_micros, amount_usd_micros }: Ask, own_usd_micros: number): void {
    const { limit_usd_micros, settled_usd_micros, reserved_usd_micros } = inputs;
    const remaining_usd_micros = headroom(inputs);
    const { level, id } = levelName(key);
    const where = id === undefined ? "the tenant's budget" : `the budget of ${level} ${id}`;
    this.#refuse(hold, "budget_exceeded", `${where} has ${Math.max(0, remaining_usd_micros)} micro-dollars left, and the call needs ${minimum_usd_micros}`, {
      ...levelName(key),
      limit_usd_micros,
      settled_usd_micros,
      reserved_usd_micros,
      remaining_usd_micros,
      asked_usd_micros: amount_usd_micros,
      minimum_usd_micros,
      // Others hold what is missing, and may give some of it back. What the asker holds itself will not come while it waits.
      may_return: limit_usd_micros !== null && limit_usd_micros > 0 && settled_usd_micros + own_usd_micros + minimum_usd_micros <= limit_usd_micros,
    });
  }

  /** B11 */
  #countCosts(cost_usd_micros: number, category: string, parts: Readonly<Record<string, number>>): { readonly by_category?: JsonObject } {
    const apart = Object.values(parts).reduce((sum, part) => sum + part, 0);
    const by = apart === 0 || apart > cost_usd_micros ? {} : parts;
    const rest = cost_usd_micros - (by === parts ? apart : 0);
    const all: Readonly<Record<string, number>> = by === parts ? { ...by, [category]: (by[category] ?? 0) + rest } : { [category]: rest };
    let { categories } = this.#now;
    for (const [wanted, part] of Object.entries(all)) {
      const name = Object.hasOwn(categories, wanted) || Object.keys(categories).length < CATEGORIES_MAX - 1 ? wanted : "other";
      categories = { ...categories, [name]: (categories[name] ?? 0) + part };
    }
    this.#set({ categories });
    return by === parts ? { by_category: all } : {};
  }

  settle({ hold, cost_usd_micros, spent_usd_micros = 0, model, used, by_category = {} }: SettleBody, why?: "expired"): void {
    const open = tableGet(this.#now.holds, hold);
    if (open === undefined) {
      const was_closed = this.#isClosed(hold);
      this.#close(hold); // B4: a reservation that comes later is refused
      this.#callNext();
      // Money that was spent without having been reserved is told, whatever else is true.
      const unreserved = cost_usd_micros ?? spent_usd_micros;
      if (!was_closed && unreserved > 0) this.told.push({ type: "budget.unreserved", hold, cost_usd_micros: unreserved });
      this.answer = { settled: false, reason: was_closed ? "closed" : "unknown" };
      return;
    }
    const cost = cost_usd_micros ?? Math.max(open.amount_usd_micros, spent_usd_micros);
    const assumed = cost_usd_micros === null;
    const { session, agent, user, category, amount_usd_micros } = open;
    this.#close(hold);
    // What cost nothing, and names no calls, called nobody.
    const back = this.#giveBack(open, used !== undefined ? { kind: "known", by: used } : { kind: cost_usd_micros === 0 ? "nothing" : "unknown" });
    const parts = this.#countCosts(cost, category, by_category);
    this.#set({ settled_ever_usd_micros: this.#now.settled_ever_usd_micros + cost });
    this.told.push({
      type: "budget.settled",
      hold,
      session,
      agent,
      user,
      model: model ?? open.model,
      category,
      ...parts,
      cost_usd_micros: cost,
      reserved_usd_micros: amount_usd_micros,
      assumed,
      ...back,
      ...(why === undefined ? {} : { reason: why }),
    });
    if (cost > amount_usd_micros)
      this.told.push({
        type: "budget.overrun",
        hold,
        session,
        agent,
        cost_usd_micros: cost,
        reserved_usd_micros: amount_usd_micros,
        over_usd_micros: cost - amount_usd_micros,
      }); // B7
    this.#add(open.levels, cost, -amount_usd_micros);
    this.#callNext();
    this.answer = { settled: true, cost_usd_micros: cost };
  }

  release(hold: string): void {
    const open = tableGet(this.#now.holds, hold);
    this.#close(hold);
    if (open === undefined) {
      this.#callNext();
      this.answer = { released: false };
      return;
    }
    const { session, agent, amount_usd_micros } = open;
    this.told.push({ type: "budget.released", hold, session, agent, amount_usd_micros, ...this.#giveBack(open, { kind: "nothing" }) });
    this.#add(open.levels, 0, -amount_usd_micros);
    this.#callNext();
    this.answer = { released: true, amount_usd_micros };
  }

  // ── concurrency and rates ──

  /** B9. With a priority, who finds no room stands in line. */
  #roomForOne(what: string, priority?: Priority): boolean {
    const { concurrency_max, holds_open, now } = this.#now;
    const running = this.#concurrency;
    const free = Math.min(HOLDS_MAX - holds_open, (concurrency_max ?? Number.POSITIVE_INFINITY) - running);
    const line = this.#line(what);
    const mine = this.#inLine(what);
    const turn_at_ms = turnAt(mine?.priority ?? priority ?? PRIORITY_DEFAULT, mine?.since_ms ?? now.at_ms);
    const ahead = line.filter(([, other]) => isBefore(other, turn_at_ms, mine?.number)).length;
    if (free > ahead) {
      this.#leaveLine(what);
      return true;
    }
    const max = Math.min(HOLDS_MAX, concurrency_max ?? HOLDS_MAX);
    const message = free > 0 ? "others of this tenant were there before" : `${running} of ${max} calls of this tenant run already`;
    if (priority === undefined || (mine === undefined && line.length >= LINE_MAX)) {
      this.#refuse(what, "overloaded", message, { concurrency: running, concurrency_max: max, retry_after_ms: SLOT_RETRY_MS });
      return false;
    }
    const details = { concurrency: running, concurrency_max: max, priority: mine?.priority ?? priority, ahead, retry_after_ms: LINE_ASK_MS };
    if (mine === undefined) this.#refuse(what, "overloaded", message, details);
    this.#joinLine(what, priority, mine);
    // It has been told that this one waits; asking again changes nothing that the world should hear.
    this.answer = { refused: { code: "overloaded", message, details } };
    return false;
  }

  /** B10; false, and the refusal told, when the agent has done so many already, or nobody could count one more. */
  #mayAct(what: string, agent: string, kind: ActionKind, limits: ActionLimits): boolean {
    const { actions, now } = this.#now;
    const { [kind]: limit, period } = limits;
    const counts = actions === undefined ? undefined : tableGet(actions, `agent/${agent}`);
    if (counts === undefined && actions !== undefined && [...tableRows(actions)].length >= LEVELS_MAX) {
      this.#refuse(what, "overloaded", `the actions of ${LEVELS_MAX} agents are counted already`, { agents_max: LEVELS_MAX });
      return false;
    }
    const used = actionsIn(counts, period, now.at_ms)[kind];
    if (limit === undefined || used < limit) return true;
    const ends_ms = periodEnd(period, now.at_ms);
    const [rule, per] = [`limits.actions.${kind}`, period === "none" ? "in all" : `a ${period}`];
    this.#refuse(what, "autonomy_exceeded", `the agent ${agent} may make ${limit} ${kind.replace("_", " ")} ${per} by itself, and has made them (${rule})`, {
      rule,
      agent,
      limit,
      used,
      period,
      period_ends_at: ends_ms === null ? null : new Date(ends_ms).toISOString(),
    });
    return false;
  }

  #countAction(agent: string, kind: ActionKind): void {
    const { actions = emptyTable<ActionCounts>(), now } = this.#now;
    this.#set({ actions: tablePut(actions, `agent/${agent}`, actionCounted(tableGet(actions, `agent/${agent}`), kind, now.at_ms)) });
  }

  acquireAction({ action, agent, kind, limits }: ActionBody): void {
    if (!this.#mayAct(action, agent, kind, limits)) return;
    this.#countAction(agent, kind);
    const { [kind]: limit = null, period } = limits;
    const counts = this.#now.actions === undefined ? undefined : tableGet(this.#now.actions, `agent/${agent}`);
    const used = actionsIn(counts, period, this.#now.now.at_ms)[kind];
    this.told.push({ type: "budget.action", action, agent, kind, used, limit, period });
    this.answer = { granted: true, used, limit, period };
  }

  // ── the line ──

  /** Who else waits for a slot, and has asked lately. Those who went silent leave it. */
  #line(but?: string): readonly (readonly [string, InLine])[] {
    const { line, now } = this.#now;
    if (line === undefined) return [];
    const rows = [...tableRows(line)];
    for (const [hold, { asked_ms }] of rows) if (asked_ms + LINE_SILENT_MS <= now.at_ms) this.#leaveLine(hold);
    return rows.filter(([hold, { asked_ms }]) => hold !== but && asked_ms + LINE_SILENT_MS > now.at_ms);
  }

  #joinLine(hold: string, priority: Priority, mine: InLine | undefined): void {
    const { line = emptyTable<InLine>(), now } = this.#now;
    const last = mine === undefined ? Math.max(0, ...[...tableRows(line)].map(([, { number }]) => number)) : 0;
    const next = mine === undefined ? { priority, since_ms: now.at_ms, number: last + 1 } : mine;
    this.#set({ line: tablePut(line, hold, { ...next, asked_ms: now.at_ms }) });
  }

  /** Only holds stand in line; slots that are taken by name, and rates, do not. */
  #inLine(what: string): InLine | undefined {
    const { line } = this.#now;
    return line === undefined || !what.includes("/") ? undefined : tableGet(line, what);
  }

  #leaveLine(what: string): void {
    const { line } = this.#now;
    if (line !== undefined && this.#inLine(what) !== undefined) this.#set({ line: tableDrop(line, what) });
  }

  /** Tells those whose turn it is, when something came free. */
  #callNext(): void {
    const line = this.#line();
    const { concurrency_max, holds_open } = this.#now;
    const free = Math.min(HOLDS_MAX - holds_open, (concurrency_max ?? Number.POSITIVE_INFINITY) - this.#concurrency, CALLED_MAX);
    if (line.length === 0 || free <= 0) return;
    const order = line.toSorted(([, a], [, b]) => (isBefore(a, turnAt(b.priority, b.since_ms), b.number) ? -1 : 1));
    this.told.push({ type: "slot.free", next: order.slice(0, free).map(([hold]) => hold), waiting: line.length });
  }

  acquireSlot(slot: string): void {
    if (Object.hasOwn(this.#now.slots, slot)) {
      this.answer = { granted: true, repeated: true };
      return;
    }
    const named = Object.keys(this.#now.slots).length;
    if (named >= SLOTS_MAX) {
      this.#refuse(slot, "overloaded", `${named} slots are held already`, { concurrency_max: SLOTS_MAX, retry_after_ms: SLOT_RETRY_MS });
      return;
    }
    if (!this.#roomForOne(slot)) return;
    const { at_ms } = this.#now.now;
    this.#set({ slots: { ...this.#now.slots, [slot]: at_ms } });
    this.#wakeBy(at_ms + HOLD_LIFE_MS);
    this.told.push({ type: "slot.acquired", slot, concurrency: this.#concurrency });
    this.answer = { granted: true, concurrency: this.#concurrency };
  }

  releaseSlot(slot: string): void {
    if (!Object.hasOwn(this.#now.slots, slot)) {
      this.answer = { released: false };
      return;
    }
    const { [slot]: _, ...slots } = this.#now.slots;
    this.#set({ slots });
    this.told.push({ type: "slot.released", slot, concurrency: this.#concurrency });
    this.#callNext();
    this.answer = { released: true };
  }

  /** SP1 of budget-sessions.ts. Without a bound there is nothing to count. */
  acquireSession(session: string): void {
    const places = this.#now.session_places ?? null;
    if (places === null) {
      this.answer = { granted: true };
      return;
    }
    const { max, taken } = places;
    const place = placeTaken(places, session, this.#now.now.at_ms);
    if (place.kind === "full") {
      const details = { sessions: taken, sessions_max: max, retry_after_ms: SESSION_RETRY_MS };
      this.#refuse(`session/${session}`, "sessions_exceeded", `the tenant has ${taken} sessions, and may have ${max}`, details);
      this.answer = { ...this.answer, doubted: place.doubted };
      return;
    }
    this.#set({ session_places: place.places });
    this.answer = { granted: true, sessions: place.places.taken, sessions_max: max, ...(place.repeated ? { repeated: true } : {}) };
  }

  releaseSession(session: string): void {
    const places = this.#now.session_places ?? null;
    const left = places === null ? undefined : placeLeft(places, session);
    if (left !== undefined) this.#set({ session_places: left });
    this.answer = { released: left !== undefined };
  }

  #setTier(tier: RateTier | null): void {
    const { tier: before, tier_windows = {} } = this.#now;
    const relaid = (window: RateWindow): RateWindow => (before && tier ? rateRelaid(before, tier, window) : []);
    const windows = Object.fromEntries(Object.entries(tier_windows).map(([provider, window]) => [provider, relaid(window)]));
    this.#set({ tier, tier_windows: tier === null ? {} : windows });
  }

  /** B8: the window under the tier that a provider's calls count in. Beyond RATES_MAX names, which no deployment has, all others share one. */
  #tierWindow(tier: RateTier, provider: string): { readonly name: string; readonly windows: Readonly<Record<string, RateWindow>> } {
    const { tier_windows = {}, now } = this.#now;
    if (Object.hasOwn(tier_windows, provider) || Object.keys(tier_windows).length < RATES_MAX) return { name: provider, windows: tier_windows };
    const isUsed = ({ requests, tokens }: { requests: number; tokens: number }): boolean => requests + tokens > 0;
    const windows = Object.fromEntries(Object.entries(tier_windows).filter(([, window]) => isUsed(rateUsed(tier, window, now.at_ms))));
    return { name: Object.keys(windows).length < RATES_MAX ? provider : "*", windows };
  }

  /** Does any window count at all? */
  get #isRated(): boolean {
    const { rates, tier } = this.#now;
    return (tier ?? null) !== null || Object.keys(rates).length > 0;
  }

  #remember(hold: string, taken: Taken): void {
    const open = tableGet(this.#now.holds, hold);
    if (open !== undefined) this.#set({ holds: tablePut(this.#now.holds, hold, { ...open, taken: takenWith(open.taken ?? [], taken) }) });
  }

  /** Windows were laid anew: what was taken in the former ones stays until they have moved on. */
  #forgetTaken(): void {
    for (const [id, { taken, ...hold }] of [...tableRows(this.#now.holds)]) if (taken !== undefined) this.#set({ holds: tablePut(this.#now.holds, id, hold) });
  }

  /** BW2; what came back, for the event. */
  #giveBack({ taken = [] }: Hold, use: HoldUse): { readonly rates_unused?: JsonObject[] } {
    if (taken.length === 0) return {};
    const { rates, tier = null, tier_windows = {}, now } = this.#now;
    const { windows, unused } = givenBack({ rates, tier, tier_windows }, taken, use, now.at_ms);
    if (windows.rates !== rates) this.#set({ rates: windows.rates });
    if (windows.tier_windows !== undefined && windows.tier_windows !== tier_windows) this.#set({ tier_windows: windows.tier_windows });
    return unused.length === 0 ? {} : { rates_unused: unused.map((one) => ({ ...one })) };
  }

  /** What was taken; `refused`, and the refusal told, when the provider's window is full. Without a rate or a tier there is no window. */
  #takeRate(what: string, { provider, requests, tokens }: RateBody): Taken | "refused" | undefined {
    const { rates, tier, now } = this.#now;
    const own = Object.hasOwn(rates, provider) ? rates[provider] : undefined;
    const shared = own === undefined && tier ? this.#tierWindow(tier, provider) : undefined;
    const rate = own ?? (tier && shared ? { limit: tier, window: shared.windows[shared.name] ?? [] } : undefined);
    if (rate === undefined) return undefined;
    const wait = rateWait(rate.limit, rate.window, now.at_ms, { requests, tokens });
    if (wait.kind === "free") {
      const window = rateTaken(rate.limit, rate.window, now.at_ms, { requests, tokens });
      if (shared !== undefined) this.#set({ tier_windows: { ...shared.windows, [shared.name]: window } });
      else this.#set({ rates: { ...rates, [provider]: { limit: rate.limit, window } } });
      const slice = rateSlice(rate.limit, now.at_ms);
      return { provider, of: shared === undefined ? "rate" : "tier", name: shared?.name ?? provider, slice, requests, tokens };
    }
    const { requests_max, tokens_max, window_ms } = rate.limit;
    const details = { provider, requests_max, tokens_max, window_ms, requests: wait.requests, tokens: wait.tokens };
    if (wait.kind === "never") this.#refuse(what, "invalid", `no window of ${provider} takes so much at once`, details);
    else this.#refuse(what, "rate_limited", `the window of ${provider} is full`, { ...details, retry_after_ms: wait.retry_after_ms });
    return "refused";
  }

  acquireRate(body: RateBody): void {
    const { hold } = body;
    if (hold !== undefined && tableGet(this.#now.holds, hold) === undefined) {
      this.#refuse(hold, "conflict", "this attempt has ended; nothing can be taken for it any more", { ended: true });
      return;
    }
    const taken = this.#takeRate(hold ?? `rate/${body.provider}`, body);
    if (taken === "refused") return;
    if (taken !== undefined && hold !== undefined) this.#remember(hold, taken);
    this.answer = { granted: true };
  }
}

// ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Enqueue {
  assign(patch: Partial<BudgetContext>): void;
  emit(emitted: Emitted): void;
  raise(event: { type: "budget.alarm" }, options: { id: string; delay: number }): void;
}

/** What somebody should hear of: a threshold that was crossed, and money that was spent above what was held for it, or without any hold. */
const ALARMS: ReadonlySet<string> = new Set(["budget.alert", "budget.overrun", "budget.unreserved"]);

/** Each alarm to each webhook that hears them, with the commit in which it was crossed: once per crossing, whatever dies afterwards. */
function deliveriesOf({ now }: BudgetContext, { told, alerts_to }: Books): Exclude<Emitted, { type: "answer" }>[] {
  const at = new Date(now.at_ms).toISOString();
  return told
    .filter(({ type }) => ALARMS.has(type))
    .flatMap((event) =>
      alerts_to.map((to) => ({
        type: "send" as const,
        to,
        command: "webhook.deliver",
        body: { event, from: `${to.slice(0, to.indexOf("/"))}/budget/main`, at },
      })),
    );
}

/** Does one command's work, as XState's actions; the cast because XState's own type of `enqueue` depends on the machine that is not made yet. */
function keep({ context, enqueue }: { context: BudgetContext; enqueue: unknown }, work: (books: Books) => void): void {
  const actions = enqueue as Enqueue;
  const books = new Books(context);
  work(books);
  actions.assign(books.patch);
  for (const event of books.told) actions.emit({ type: "tell", event });
  for (const delivery of deliveriesOf(context, books)) actions.emit(delivery);
  if (books.answer !== undefined) actions.emit({ type: "answer", result: books.answer });
  if (books.alarm_ms !== undefined) actions.raise({ type: "budget.alarm" }, { id: "alarm", delay: books.alarm_ms });
}

/** The worst status that any level has. */
export function worstStatus({ in_status }: Pick<BudgetContext, "in_status">): BudgetStatus {
  return STATUSES.findLast((status) => status !== "healthy" && in_status[status] > 0) ?? "healthy";
}

function created({ now }: CreationInput): BudgetContext {
  return {
    now,
    levels: tablePut(emptyTable<Level>(), TENANT_LEVEL, freshLevel(now.at_ms)),
    in_status: { healthy: 0, warning: 0, critical: 0, exceeded: 0 },
    holds: emptyTable(),
    holds_open: 0,
    closed: emptyTable(),
    concurrency_max: null,
    slots: {},
    rates: {},
    categories: {},
    settled_ever_usd_micros: 0,
    alarm_at_ms: null,
    created_at_ms: now.at_ms,
  };
}

const toOthers = (own: BudgetStatus) =>
  STATUSES.filter((status) => status !== own).map((status) => ({ guard: { type: "worst_is" as const, params: { status } }, target: status }));

export const budgetMachine = setup({
  types: {} as { context: BudgetContext; events: BudgetEvent; emitted: Emitted; input: CreationInput },
  guards: { worst_is: ({ context }, { status }: { status: BudgetStatus }) => worstStatus(context) === status },
  actions: {
    tell_created: enqueueActions(({ enqueue }) => (enqueue as unknown as Enqueue).emit({ type: "tell", event: { type: "budget.created" } })),
    configure: enqueueActions((args, body: ConfigureBody) => keep(args, (books) => books.configure(body))),
    reserve: enqueueActions((args, body: ReserveBody) => keep(args, (books) => books.reserve(body))),
    settle: enqueueActions((args, body: SettleBody) => keep(args, (books) => books.settle(body))),
    release: enqueueActions((args, { hold }: { hold: string }) => keep(args, (books) => books.release(hold))),
    acquire_slot: enqueueActions((args, { slot }: { slot: string }) => keep(args, (books) => books.acquireSlot(slot))),
    release_slot: enqueueActions((args, { slot }: { slot: string }) => keep(args, (books) => books.releaseSlot(slot))),
    acquire_session: enqueueActions((args, { session }: { session: string }) => keep(args, (books) => books.acquireSession(session))),
    release_session: enqueueActions((args, { session }: { session: string }) => keep(args, (books) => books.releaseSession(session))),
    acquire_action: enqueueActions((args, body: ActionBody) => keep(args, (books) => books.acquireAction(body))),
    acquire_rate: enqueueActions((args, body: RateBody) => keep(args, (books) => books.acquireRate(body))),
    // What is due is done by opening the books at all.
    look: enqueueActions((args) => keep(args, () => undefined)),
  },
}).createMachine({
  id: "budget",
  version: "1",
  context: ({ input }) => created(input),
  entry: "tell_created",
  initial: "healthy",
  on: {
    "budget.configure": { actions: { type: "configure", params: ({ event }) => event.body } },
    "budget.reserve": { actions: { type: "reserve", params: ({ event }) => event.body } },
    "budget.settle": { actions: { type: "settle", params: ({ event }) => event.body } },
    "budget.release": { actions: { type: "release", params: ({ event }) => event.body } },
    "slot.acquire": { actions: { type: "acquire_slot", params: ({ event }) => event.body } },
    "slot.release": { actions: { type: "release_slot", params: ({ event }) => event.body } },
    "session.acquire": { actions: { type: "acquire_session", params: ({ event }) => event.body } },
    "session.release": { actions: { type: "release_session", params: ({ event }) => event.body } },
    "rate.acquire": { actions: { type: "acquire_rate", params: ({ event }) => event.body } },
    "action.acquire": { actions: { type: "acquire_action", params: ({ event }) => event.body } },
    "budget.alarm": { actions: "look" },
  },
  states: {
    healthy: { id: "healthy", description: "every level has used less than 80 % of its limit", always: toOthers("healthy") },
    warning: { id: "warning", description: "some level is at 80 %", always: toOthers("warning") },
    critical: { id: "critical", description: "some level is at 90 %: calls are made cheaper", always: toOthers("critical") },
    exceeded: { id: "exceeded", description: "some level has nothing left: its calls are refused", always: toOthers("exceeded") },
  },
});

// ── the definition ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export function budgetContextOf(view: Pick<ActorView, "context">): BudgetContext {
  return view.context as unknown as BudgetContext;
}

/** B6 and B8 for what a command would add; a period that ends meanwhile only makes more room. */
function refuseConfigure(context: BudgetContext, body: ConfigureBody): ErrorBody | undefined {
  const { level, id, rates, tier, concurrency_max, alerts_to, projection, sessions_max } = body;
  if ((level === "tenant") !== (id === undefined))
    return errorBody("invalid", level === "tenant" ? "the tenant's level has no id" : `a level of a ${level} has its id`, { level });
  if (level !== "tenant" && [rates, tier, concurrency_max, alerts_to, projection, sessions_max].some((one) => one !== undefined))
    return errorBody("invalid", "rates, concurrency, sessions, the projection and who hears alerts are the tenant's", { level });
  if (alerts_to !== undefined && heardBy(context, alerts_to).length > ALERTS_TO_MAX)
    return errorBody("invalid", `a budget's alerts are heard by at most ${ALERTS_TO_MAX} webhooks`, { alerts_to_max: ALERTS_TO_MAX });
  const known = tableGet(context.levels, levelKey(level, id)) !== undefined;
  const count = context.levels.reduce((sum, bucket) => sum + Object.keys(bucket).length, 0);
  if (!known && count >= LEVELS_MAX) return errorBody("invalid", `a budget has at most ${LEVELS_MAX} levels`, { levels_max: LEVELS_MAX });
  const providers = new Set([...Object.keys(context.rates), ...Object.keys(rates ?? {})]);
  return providers.size > RATES_MAX ? errorBody("invalid", `a budget has at most ${RATES_MAX} rates`, { rates_max: RATES_MAX }) : undefined;
}

/** B6: everything ever settled, this included, is a safe integer; every level has settled less. */
function refuseMoney(context: BudgetContext, cost_usd_micros: number): ErrorBody | undefined {
  const sum = context.settled_ever_usd_micros + HOLDS_MAX * MONEY_USD_MICROS_MAX + cost_usd_micros;
  return Number.isSafeInteger(sum)
    ? undefined
    : errorBody("invalid", "the sum is larger than a budget can count", { settled_usd_micros: context.settled_ever_usd_micros });
}

export const budgetDefinition: ActorDefinition = {
  kind: "budget",
  machine: budgetMachine,
  creates: "budget.create",
  keys_max: KEYS_MAX,
  internal: ["budget.alarm"],
  effects: {},
  refuse(view, { type, body }) {
    const context = budgetContextOf(view);
    switch (type) {
      case "budget.configure":
        return refuseConfigure(context, body as unknown as ConfigureBody);
      case "budget.reserve":
        return refuseMoney(context, 0);
      case "budget.settle":
        return refuseMoney(context, (body as unknown as SettleBody).cost_usd_micros ?? (body as unknown as SettleBody).spent_usd_micros ?? 0);
      default:
        return undefined;
    }
  },
  waits(view) {
    const { holds_open, slots, line = [] } = budgetContextOf(view);
    const held = Object.keys(slots).length;
    const waiting = [...tableRows(line)].length;
    return `waits for calls; ${holds_open} in flight${held === 0 ? "" : `, ${held} slots held`}${waiting === 0 ? "" : `, ${waiting} in line for a slot`}`;
  },
};

/** The id of the hold of one attempt of an effect. */
export const holdId = (actor: Parameters<typeof actorPath>[0], inst: string, attempt: number): string => `${actorPath(actor)}/${inst}/${attempt}`;
