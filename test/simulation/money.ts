// money: books of every tenant's money, kept from what the budgets' journals say happened and never from what a budget believes, and held against it
// at each append. So a grant above a limit, a hold that is lost or closed twice, and a refusal for which there was no reason show at once.
//
//   budget.reserved ──▶ open ──settled, released──▶ closed        each change of the books: is every level within its limit, is every hold one hold?
//   budget.refused ───▶ is there no head-room, or no slot? ──▶ does the session that waits for it say so?
//
// Invariants, as they are named in a failure:
//   B1  no grant takes settled + reserved of a level above its limit, nor more calls than may run at once
//   B2  nobody is refused who had head-room (as far as the journal tells)
//   B3  what a budget believes of its levels and holds is what its journal says
//   B4  a hold is opened once and closed once, and nothing is spent that was not held; at the end none is open
//   MW1 a session that waits for money or a slot says so
import { budgetContextOf, levelKey, TENANT_LEVEL } from "../../state-machines/budget-context.ts";
import { holdId } from "../../state-machines/budget-holds.ts";
import { tableRows } from "../../state-machines/budget-table.ts";
import { sessionContextOf } from "../../state-machines/session-context.ts";
import { viewOf } from "../../state-machines/step.ts";
import { HOLD_PATTERN } from "../../protocol/commands.ts";
import { type ActorAddress, actorPath } from "../../protocol/ids.ts";
import type { ActorEvent, JournalMessage } from "../../protocol/journal.ts";
import type { Journal } from "./watch.ts";

interface Level {
  limit: number | null;
  settled: number;
  reserved: number;
  /** When it had nothing left, last. */
  spent_at_ms: number;
}
interface Hold {
  readonly levels: readonly string[];
  readonly amount: number;
}
interface Refusal {
  readonly code: string;
  readonly at_ms: number;
  readonly may_end: boolean;
}
interface Books {
  readonly actor: ActorAddress;
  readonly levels: Map<string, Level>;
  readonly holds: Map<string, Hold & { readonly session: string; readonly agent: string; readonly user: string | null }>;
  readonly closed: Set<string>;
  readonly slots: Set<string>;
  concurrency_max: number | null;
  /** Of holds that have not been granted since. */
  readonly refused: Map<string, Refusal>;
}

/** The door reads a budget that it keeps for ten seconds; and what it decided may stand still before it is appended. */
const DOOR_MS = 40_000;
/** A wait is told after a quarter of a second, and an append takes a while. */
export const TOLD_WITHIN_MS = 5_000;
/** Sums are compared at each append, every level of them only at some. */
const COMPARE_EACH = 8;

const numberOf = (event: ActorEvent, field: string): number => Number(event[field] ?? 0);
const levelOf = (event: ActorEvent): string => levelKey(event["level"] as "tenant", event["id"] as string | undefined);

export interface MoneyDeps {
  journals: ReadonlyMap<string, Journal>;
  now_ms(): number;
  fail(what: string): void;
  count(what: string): void;
}

export class Money {
  readonly #deps: MoneyDeps;
  readonly #books = new Map<string, Books>();
  #appends = 0;
  #healed_at_ms: number | undefined;

  constructor(deps: MoneyDeps) {
    this.#deps = deps;
  }

  /** From now on nothing goes wrong any more, and nothing but the sessions themselves delays what they say. */
  healed(): void {
    this.#healed_at_ms ??= this.#deps.now_ms();
  }

  appended(journal: Journal, message: JournalMessage): void {
    if (message.actor.kind === "budget") this.#budget(journal, message);
    else if (message.actor.kind === "session") this.#session(message);
    if (this.#healed_at_ms !== undefined && this.#appends++ % COMPARE_EACH === 0) this.#waits(this.#healed_at_ms);
  }

  // ── a budget's own journal ──

  #booksOf({ tenant }: ActorAddress): Books | undefined {
    return this.#books.get(tenant);
  }

  #budget(journal: Journal, message: JournalMessage): void {
    const { count } = this.#deps;
    let books = this.#booksOf(journal.actor);
    if (books === undefined) {
      books = { actor: journal.actor, levels: new Map(), holds: new Map(), closed: new Set(), slots: new Set(), concurrency_max: null, refused: new Map() };
      this.#books.set(journal.actor.tenant, books);
      this.#open(books, TENANT_LEVEL);
    }
    for (const event of message.events) {
      count(`money ${event.type}`);
      this.#event(books, event);
    }
    this.#compare(books, journal, this.#appends++ % COMPARE_EACH === 0);
  }

  /** A level counts what is in flight when it is first known. */
  #open(books: Books, key: string): Level {
    const counts = (hold: { session: string; agent: string; user: string | null }): boolean =>
      key === `agent/${hold.agent}` || key === `user/${hold.user ?? ""}` || key === `session/${hold.session}`;
    let reserved = 0;
    for (const [id, hold] of books.holds) {
      if (!counts(hold)) continue;
      reserved += hold.amount;
      books.holds.set(id, { ...hold, levels: [...hold.levels, key] });
    }
    const level = { limit: null, settled: 0, reserved, spent_at_ms: Number.NEGATIVE_INFINITY };
    books.levels.set(key, level);
    return level;
  }

  #event(books: Books, event: ActorEvent): void {
    const { fail } = this.#deps;
    const path = actorPath(books.actor);
    const hold = String(event["hold"] ?? "");
    switch (event.type) {
      case "budget.configured": {
        const level = books.levels.get(levelOf(event)) ?? this.#open(books, levelOf(event));
        this.#touch(level, () => (level.limit = event["limit_usd_micros"] as number | null));
        books.concurrency_max = event["concurrency_max"] as number | null;
        break;
      }
      case "budget.reserved":
        this.#reserved(books, event, hold);
        break;
      case "budget.settled": {
        const open = this.#closes(books, hold);
        const [cost, reserved] = [numberOf(event, "cost_usd_micros"), numberOf(event, "reserved_usd_micros")];
        if (open !== undefined && open.amount !== reserved) fail(`B4: ${path} settles ${hold} with ${reserved} reserved, and ${open.amount} was`);
        this.#add(books, open, cost);
        break;
      }
      case "budget.released":
        this.#add(books, this.#closes(books, hold), 0);
        break;
      case "budget.unreserved":
        fail(`B4: ${numberOf(event, "cost_usd_micros")} micro-dollars of ${hold} were spent and never held`);
        break;
      case "budget.overrun":
        fail(`B4: ${hold} cost ${numberOf(event, "cost_usd_micros")}, and ${numberOf(event, "reserved_usd_micros")} was held for it`);
        break;
      case "budget.period_closed": {
        const level = books.levels.get(levelOf(event));
        const settled = numberOf(event, "settled_usd_micros");
        if (level?.settled !== settled) fail(`B5: ${path} closes a period of ${levelOf(event)} with ${settled}, and ${level?.settled ?? 0} was settled`);
        if (level !== undefined) this.#touch(level, () => (level.settled = 0));
        break;
      }
      case "slot.acquired":
        books.slots.add(String(event["slot"]));
        this.#slotsWithin(books, String(event["slot"]));
        break;
      case "slot.released":
        books.slots.delete(String(event["slot"]));
        break;
      case "budget.refused":
        this.#refused(books, event, hold);
        break;
      default:
        break;
    }
  }

  #touch(level: Level, change: () => void): void {
    const isSpent = (): boolean => level.limit !== null && level.settled >= level.limit;
    if (isSpent()) level.spent_at_ms = this.#deps.now_ms();
    change();
    if (isSpent()) level.spent_at_ms = this.#deps.now_ms();
  }

  #reserved(books: Books, event: ActorEvent, id: string): void {
    const { fail } = this.#deps;
    const path = actorPath(books.actor);
    const [session, agent, user] = [String(event["session"]), String(event["agent"]), event["user"] as string | null];
    const amount = numberOf(event, "amount_usd_micros");
    if (!books.levels.has(`agent/${agent}`)) this.#open(books, `agent/${agent}`);
    const before = books.holds.get(id);
    if (books.closed.has(id)) fail(`B4: ${path} opens ${id} again`);
    if (before === undefined && numberOf(event, "part") > 1) fail(`B4: ${path} grants part ${numberOf(event, "part")} of ${id}, which is not open`);
    if (before !== undefined && event["part"] === undefined) fail(`B4: ${path} grants ${id} a second time`);
    const names = [TENANT_LEVEL, `agent/${agent}`, ...(user === null ? [] : [`user/${user}`]), `session/${session}`];
    const levels = before?.levels ?? names.filter((name) => books.levels.has(name));
    books.holds.set(id, { session, agent, user, levels, amount: (before?.amount ?? 0) + amount });
    books.refused.delete(id);
    for (const name of levels) {
      const level = books.levels.get(name);
      if (level === undefined) continue;
      level.reserved += amount;
      if (level.limit !== null && amount > 0 && level.settled + level.reserved > level.limit)
        fail(`B1: ${path} grants ${id} ${amount}, and ${name} is at ${level.settled} settled and ${level.reserved} reserved of ${level.limit}`);
      if (level.limit === 0) fail(`B1: ${path} grants ${id}, and the limit of ${name} is 0`);
    }
    if (before === undefined) this.#slotsWithin(books, id);
  }

  #slotsWithin(books: Books, what: string): void {
    const running = books.holds.size + books.slots.size;
    if (books.concurrency_max !== null && running > books.concurrency_max)
      this.#deps.fail(`B1: ${actorPath(books.actor)} lets ${what} run as number ${running} of ${books.concurrency_max}`);
  }

  #closes(books: Books, id: string): Hold | undefined {
    const open = books.holds.get(id);
    if (open === undefined) this.#deps.fail(`B4: ${actorPath(books.actor)} closes ${id}, which is ${books.closed.has(id) ? "closed" : "not open"}`);
    books.holds.delete(id);
    books.closed.add(id);
    return open;
  }

  #add(books: Books, open: Hold | undefined, cost: number): void {
    for (const name of open?.levels ?? []) {
      const level = books.levels.get(name);
      if (level === undefined || open === undefined) continue;
      this.#touch(level, () => {
        level.settled += cost;
        level.reserved -= open.amount;
      });
    }
  }

  /** B2 */
  #refused(books: Books, event: ActorEvent, id: string): void {
    const { fail, now_ms, count } = this.#deps;
    const path = actorPath(books.actor);
    const code = String(event["code"]);
    count(`money refused ${code}`);
    const may_end = code === "overloaded" || event["may_return"] === true;
    books.refused.set(id, { code, at_ms: now_ms(), may_end });
    if (code === "budget_exceeded") {
      const level = books.levels.get(levelOf(event));
      const needs = numberOf(event, "minimum_usd_micros");
      const left = level === undefined || level.limit === null ? Number.POSITIVE_INFINITY : level.limit - level.settled - level.reserved;
      if (left >= needs && level?.limit !== 0) fail(`B2: ${path} refuses ${id}, which needs ${needs}, and ${levelOf(event)} has ${left} left`);
    }
    if (code === "overloaded") {
      const free = (books.concurrency_max ?? Number.POSITIVE_INFINITY) - books.holds.size - books.slots.size;
      if (free > numberOf(event, "ahead")) fail(`B2: ${path} refuses ${id} a slot, ${free} are free and ${numberOf(event, "ahead")} stand before it`);
    }
    if (code === "conflict" && !this.#isOver(books, id)) fail(`B2: ${path} refuses ${id} as ended, and nothing says that it has`);
  }

  /** Its end came before it, or that of a later attempt: the session has no such call any more. */
  #isOver(books: Books, id: string): boolean {
    const [, actor = "", seq = "", effect = "", attempt = ""] = HOLD_PATTERN.exec(id) ?? [];
    const running = Object.values(this.#deps.journals.get(actor)?.state?.running ?? {}).find(({ inst }) => inst === `${seq}:${effect}`);
    return books.closed.has(id) || running === undefined || running.attempt !== Number(attempt);
  }

  /** B3 */
  #compare(books: Books, journal: Journal, whole: boolean): void {
    const { fail } = this.#deps;
    if (journal.state === undefined) return;
    const context = budgetContextOf(viewOf(journal.state));
    const path = actorPath(books.actor);
    if (context.holds_open !== books.holds.size) fail(`B3: ${path} counts ${context.holds_open} holds, its journal has ${books.holds.size}`);
    if (!whole) return;
    for (const [name, level] of tableRows(context.levels)) {
      const mine = books.levels.get(name);
      const says = `${level.settled_usd_micros} settled, ${level.reserved_usd_micros} reserved of ${level.limit_usd_micros}`;
      const is = `${mine?.settled ?? 0} settled, ${mine?.reserved ?? 0} reserved of ${mine?.limit ?? null}`;
      if (says !== is) fail(`B3: ${path} has ${name} at ${says}; its journal comes to ${is}`);
    }
    for (const [id] of tableRows(context.holds)) if (!books.holds.has(id)) fail(`B3: ${path} holds ${id}, which its journal has not`);
  }

  // ── sessions ──

  #session(message: JournalMessage): void {
    const { fail, now_ms } = this.#deps;
    const path = actorPath(message.actor);
    const books = this.#booksOf(message.actor);
    for (const entry of message.entries) {
      if (entry.t === "fail" && entry.error.code === "budget_exceeded") {
        const refused = [...(books?.refused ?? [])].some(([id, { code }]) => id.startsWith(`${path}/${entry.inst}/`) && code === "budget_exceeded");
        // One more part of a hold that is open is refused under the same name.
        if (!refused) fail(`B2: ${path} ${entry.inst} failed for money, and the budget never refused it`);
      }
      if (entry.t === "refused" && entry.error.code === "budget_exceeded") {
        this.#deps.count("money refused at the door");
        const { level, id } = (entry.error.details ?? {}) as { level?: "tenant"; id?: string };
        const known = level === undefined ? undefined : books?.levels.get(levelKey(level, id));
        if (known === undefined || known.spent_at_ms < now_ms() - DOOR_MS)
          fail(`B2: ${path} is refused at the door because ${level ?? ""} ${id ?? ""} is spent, and it was not`);
      }
    }
  }

  /** Does anybody wait for money or a slot? */
  stands(): boolean {
    return [...this.#books.values()].some(({ refused }) => [...refused].some(([id, { may_end }]) => may_end && this.#callOf(id) !== undefined));
  }
  judgeWaits(): void {
    if (this.#healed_at_ms !== undefined) this.#waits(this.#healed_at_ms);
  }
  /** Tenants none of whose calls may run. */
  closed(): string[] {
    return [...this.#books].flatMap(([tenant, { concurrency_max }]) => (concurrency_max === 0 ? [tenant] : []));
  }

  /** The session whose call asked for this hold, while it still asks. */
  #callOf(id: string): Journal | undefined {
    const [, path = ""] = HOLD_PATTERN.exec(id) ?? [];
    const journal = this.#deps.journals.get(path);
    const calls = Object.values(journal?.state?.running ?? {});
    return journal !== undefined && calls.some(({ inst, attempt }) => holdId(journal.actor, inst, attempt) === id) ? journal : undefined;
  }

  /** MW1 */
  #waits(healed_at_ms: number): void {
    const { now_ms, fail } = this.#deps;
    for (const { refused } of this.#books.values()) {
      for (const [id, { at_ms, may_end }] of refused) {
        if (!may_end || now_ms() - Math.max(at_ms, healed_at_ms) < TOLD_WITHIN_MS) continue;
        const journal = this.#callOf(id);
        if (journal?.state === undefined) continue;
        this.#deps.count("waits looked at");
        const { wait } = sessionContextOf(viewOf(journal.state));
        if (wait === undefined || wait === null) fail(`MW1: ${actorPath(journal.actor)} waits for what the budget refused ${id}, and does not say so`);
      }
    }
  }

  /** When everything has come to rest. */
  judge(): void {
    const { fail, journals } = this.#deps;
    for (const books of this.#books.values()) {
      const path = actorPath(books.actor);
      for (const id of books.holds.keys()) fail(`B4: ${path} still holds ${id} when everything is over`);
      for (const [name, { reserved }] of books.levels) if (reserved !== 0) fail(`B3: ${path} has ${reserved} reserved at ${name} when everything is over`);
      const journal = journals.get(path);
      if (journal !== undefined) this.#compare(books, journal, true);
    }
  }
}
