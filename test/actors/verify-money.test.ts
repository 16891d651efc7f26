// Goal: troupe verify misses no micro-dollar: each way in which the three books can differ is seen, and equal books are not accused.
// Method: a few journal messages by hand, right first, then each with one fault planted.
import { describe, expect, test } from "vitest";
import { createMoneyCheck, type UsageCosts } from "../../actors/verify-money.ts";
import type { ActorEvent, Entry, JournalMessage, OutMessage } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";

const hold = (n: number): string => `acme/session/s1/${n}:model/1`;
const message = (kind: "session" | "budget", at_s: number, more: { entries?: Entry[]; events?: ActorEvent[]; out?: OutMessage[] }): JournalMessage => ({
  v: 1,
  actor: { tenant: "acme", kind, id: kind === "budget" ? "main" : "s1" },
  seq: at_s,
  epoch: 1,
  worker: "w1",
  machine: `${kind}@1`,
  at: new Date(Date.UTC(2026, 0, 1) + at_s * 1000).toISOString(),
  entries: more.entries ?? [],
  state: "idle",
  events: more.events ?? [],
  out: more.out ?? [],
  out_confirmed_seq: 0,
});
const ended = (at_s: number, n: number, cost_usd_micros: number | null): JournalMessage =>
  message("session", at_s, { out: [{ id: `${at_s}.0`, to: "acme/budget/main", type: "budget.settle", body: { hold: hold(n), cost_usd_micros } }] });
const decided = (at_s: number, n: number, said: number | null, settled: JsonObject | undefined): JournalMessage =>
  message("budget", at_s, {
    entries: [{ t: "command", type: "budget.settle", body: { hold: hold(n), cost_usd_micros: said }, channel: "control" }],
    events: settled === undefined ? [] : [{ type: "budget.settled", hold: hold(n), assumed: false, ...settled } as ActorEvent],
  });
const GOOD = [
  ended(1, 1, 70),
  decided(2, 1, 70, { cost_usd_micros: 70 }),
  ended(3, 2, null),
  decided(4, 2, null, { cost_usd_micros: 30, assumed: true }),
  ended(5, 3, null),
  decided(6, 3, null, undefined), // it had reserved nothing
];

function faults(messages: readonly JournalMessage[], usage?: UsageCosts): string[] {
  const found: string[] = [];
  const check = createMoneyCheck(usage, ({ what }) => found.push(what));
  messages.forEach((one, index) => check.message(one, index + 1));
  check.end();
  return found;
}
const rows = (sum: number, position: number): UsageCosts => ({ position, by_tenant: new Map([["acme", sum]]) });

describe("the three books of a tenant's money", () => {
  test("that agree are not accused, wherever the projection stands", () => {
    expect(faults(GOOD)).toEqual([]);
    // After 1 the row is there and its settlement is not; an assumed cost is in the rows when the budget has said it.
    for (const [position, sum] of [
      [0, 0],
      [1, 70],
      [2, 70],
      [3, 70],
      [4, 100],
      [6, 100],
    ] as const)
      expect(faults(GOOD, rows(sum, position)), `at ${position}`).toEqual([]);
  });

  test.each<[string, JournalMessage[], UsageCosts | undefined, RegExp]>([
    ["usage rows that sum to one micro-dollar less", GOOD, rows(99, 6), /sum to 99 micro-dollars, the ledger to 100 \(drift -1\)/],
    ["usage rows that sum to more", GOOD, rows(101, 6), /drift 1/],
    ["no usage rows at all", GOOD, { position: 6, by_tenant: new Map() }, /sum to 0/],
    ["a settlement at another cost than was said", [ended(1, 1, 70), decided(2, 1, 70, { cost_usd_micros: 60 })], undefined, /cost 70 and is settled at 60/],
    [
      "a settlement that the budget heard otherwise",
      [ended(1, 1, 70), decided(2, 1, 60, { cost_usd_micros: 60 })],
      undefined,
      /said that .* cost 70, the budget heard 60/,
    ],
    ["a known cost that was assumed", [ended(1, 1, 70), decided(2, 1, 70, { cost_usd_micros: 70, assumed: true })], undefined, /settled as assumed/],
    ["an unknown cost that was not", [ended(1, 1, null), decided(2, 1, null, { cost_usd_micros: 70 })], undefined, /settled as known/],
    ["an attempt that is settled twice", [ended(1, 1, 70), ended(2, 1, 70)], undefined, /a second time/],
    ["a settlement that never came to the budget", [...GOOD, ended(7, 4, 5), ended(200, 5, 0)], undefined, /never reached the budget/],
  ])("%s: seen", (_, messages, usage, what) => {
    expect(faults(messages, usage).join("; ")).toMatch(what);
  });

  test("a settlement that is still under way is not missed yet", () => {
    expect(faults([...GOOD, ended(7, 4, 5), ended(30, 5, 0)])).toEqual([]);
  });
});
