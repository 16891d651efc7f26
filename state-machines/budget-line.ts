// budget-line: the calls that may run at once: who has a slot, who stands in line for one, and whose turn it is when one comes free.
//
//   asks ──fewer stand before it than slots are free──▶ has one ──given back──▶ the next are called (slot.free)
//     └──else──▶ refused, and in line if it says its priority ──asks again, at the latest after LINE_ASK_MS──▶ …
//
// Invariants (of budget.ts):
//   B9. A slot goes to whose turn it is (protocol/priority.ts): nobody is granted one while more stand before him than are free.
import { assert } from "../protocol/assert.ts";
import type { ErrorCode } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";
import { type Priority, PRIORITY_DEFAULT, turnAt } from "../protocol/priority.ts";
import { HOLD_LIFE_MS, HOLDS_MAX, type InLine, SLOTS_MAX } from "./budget-context.ts";
import type { Page } from "./budget-page.ts";
import { emptyTable, tableDrop, tableGet, tablePut, tableRows } from "./budget-table.ts";

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

/** Does one in line go before a call whose turn is then, and that joined as that number (absent: it has not joined)? */
function isBefore(one: InLine, turn_at_ms: number, number = Number.POSITIVE_INFINITY): boolean {
  const at_ms = turnAt(one.priority, one.since_ms);
  return at_ms < turn_at_ms || (at_ms === turn_at_ms && one.number < number);
}

/** The slots of one page, and the line for them. */
export class SlotLine {
  readonly #page: Page;

  constructor(page: Page) {
    this.#page = page;
  }

  get concurrency(): number {
    return this.#page.now.holds_open + Object.keys(this.#page.now.slots).length;
  }

  /** Who is refused stands in line no more. */
  refuse(hold: string, code: ErrorCode, message: string, details: JsonObject): void {
    this.leaveLine(hold);
    this.#page.told.push({ type: "budget.refused", hold, code, ...details });
    this.#page.answer = { refused: { code, message, details } };
  }

  /** B9. With a priority, who finds no room stands in line. */
  roomForOne(what: string, priority?: Priority): boolean {
    const { concurrency_max, holds_open, now } = this.#page.now;
    const running = this.concurrency;
    const free = Math.min(HOLDS_MAX - holds_open, (concurrency_max ?? Number.POSITIVE_INFINITY) - running);
    const line = this.#line(what);
    const mine = this.#inLine(what);
    const turn_at_ms = turnAt(mine?.priority ?? priority ?? PRIORITY_DEFAULT, mine?.since_ms ?? now.at_ms);
    const ahead = line.filter(([, other]) => isBefore(other, turn_at_ms, mine?.number)).length;
    if (free > ahead) {
      this.leaveLine(what);
      return true;
    }
    const max = Math.min(HOLDS_MAX, concurrency_max ?? HOLDS_MAX);
    const message = free > 0 ? "others of this tenant were there before" : `${running} of ${max} calls of this tenant run already`;
    if (priority === undefined || (mine === undefined && line.length >= LINE_MAX)) {
      this.refuse(what, "overloaded", message, { concurrency: running, concurrency_max: max, retry_after_ms: SLOT_RETRY_MS });
      return false;
    }
    const details = { concurrency: running, concurrency_max: max, priority: mine?.priority ?? priority, ahead, retry_after_ms: LINE_ASK_MS };
    if (mine === undefined) this.refuse(what, "overloaded", message, details);
    this.#joinLine(what, priority, mine);
    // It has been told that this one waits; asking again changes nothing that the world should hear.
    this.#page.answer = { refused: { code: "overloaded", message, details } };
    return false;
  }

  /** Who else waits for a slot, and has asked lately. Those who went silent leave it. */
  #line(but?: string): readonly (readonly [string, InLine])[] {
    const { line, now } = this.#page.now;
    if (line === undefined) return [];
    const rows = [...tableRows(line)];
    for (const [hold, { asked_ms }] of rows) if (asked_ms + LINE_SILENT_MS <= now.at_ms) this.leaveLine(hold);
    return rows.filter(([hold, { asked_ms }]) => hold !== but && asked_ms + LINE_SILENT_MS > now.at_ms);
  }

  #joinLine(hold: string, priority: Priority, mine: InLine | undefined): void {
    const { line = emptyTable<InLine>(), now } = this.#page.now;
    const last = mine === undefined ? Math.max(0, ...[...tableRows(line)].map(([, { number }]) => number)) : 0;
    const next = mine === undefined ? { priority, since_ms: now.at_ms, number: last + 1 } : mine;
    this.#page.set({ line: tablePut(line, hold, { ...next, asked_ms: now.at_ms }) });
  }

  /** Only holds stand in line; slots that are taken by name, and rates, do not. */
  #inLine(what: string): InLine | undefined {
    const { line } = this.#page.now;
    return line === undefined || !what.includes("/") ? undefined : tableGet(line, what);
  }

  leaveLine(what: string): void {
    const { line } = this.#page.now;
    if (line !== undefined && this.#inLine(what) !== undefined) this.#page.set({ line: tableDrop(line, what) });
  }

  /** Tells those whose turn it is, when something came free. */
  callNext(): void {
    const line = this.#line();
    const { concurrency_max, holds_open } = this.#page.now;
    const free = Math.min(HOLDS_MAX - holds_open, (concurrency_max ?? Number.POSITIVE_INFINITY) - this.concurrency, CALLED_MAX);
    if (line.length === 0 || free <= 0) return;
    const order = line.toSorted(([, a], [, b]) => (isBefore(a, turnAt(b.priority, b.since_ms), b.number) ? -1 : 1));
    this.#page.told.push({ type: "slot.free", next: order.slice(0, free).map(([hold]) => hold), waiting: line.length });
  }

  acquireSlot(slot: string): void {
    if (Object.hasOwn(this.#page.now.slots, slot)) {
      this.#page.answer = { granted: true, repeated: true };
      return;
    }
    const named = Object.keys(this.#page.now.slots).length;
    if (named >= SLOTS_MAX) {
      this.refuse(slot, "overloaded", `${named} slots are held already`, { concurrency_max: SLOTS_MAX, retry_after_ms: SLOT_RETRY_MS });
      return;
    }
    if (!this.roomForOne(slot)) return;
    const { at_ms } = this.#page.now.now;
    this.#page.set({ slots: { ...this.#page.now.slots, [slot]: at_ms } });
    this.#page.wakeBy(at_ms + HOLD_LIFE_MS);
    this.#page.told.push({ type: "slot.acquired", slot, concurrency: this.concurrency });
    this.#page.answer = { granted: true, concurrency: this.concurrency };
  }

  releaseSlot(slot: string): void {
    if (!Object.hasOwn(this.#page.now.slots, slot)) {
      this.#page.answer = { released: false };
      return;
    }
    const { [slot]: _, ...slots } = this.#page.now.slots;
    this.#page.set({ slots });
    this.#page.told.push({ type: "slot.released", slot, concurrency: this.concurrency });
    this.callNext();
    this.#page.answer = { released: true };
  }
}
