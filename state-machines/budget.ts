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
// Here is the machine. One command's work is done by budget-books.ts, on a copy of what the budget remembers (budget-context.ts, budget-page.ts), by
//   budget-holds.ts            money held for calls          budget-levels.ts    the levels that it counts in
//   budget-line.ts             slots, and the line for them  budget-autonomy.ts  actions that an agent may begin by itself
//   budget-provider-rates.ts   what providers' windows take  budget-sessions.ts  how many sessions there may be
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
import { MONEY_USD_MICROS_MAX } from "../protocol/commands.ts";
import { errorBody, type ErrorBody } from "../protocol/errors.ts";
import { Books, heardBy } from "./budget-books.ts";
import type { ActionBody, ConfigureBody, RateBody, ReserveBody, SettleBody } from "./budget-commands.ts";
import { type BudgetContext, budgetContextOf, created, HOLDS_MAX, levelKey, LEVELS_MAX, RATES_MAX, worstStatus } from "./budget-context.ts";
import { type BudgetStatus, STATUSES } from "./budget-decision.ts";
import { tableGet, tableRows } from "./budget-table.ts";
import type { ActorDefinition, CommandEvent, CreationInput, Emitted } from "./definition.ts";

/**
 * Outcomes of keyed commands that are remembered beside the holds. Few, because they are most of a snapshot: a repeat that comes later still
 * finds its hold open (the same grant) or closed (nothing changes).
 */
export const KEYS_MAX = 128;
/** Webhooks that hear a budget's alerts. */
export const ALERTS_TO_MAX = 16;

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

// ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

interface Enqueue {
  assign(patch: Partial<BudgetContext>): void;
  emit(emitted: Emitted): void;
  raise(event: { type: "budget.alarm" }, options: { id: string; delay: number }): void;
}

/** What somebody should hear of: a threshold that was crossed, and money that was spent above what was held for it, or without any hold. */
const ALARMS: ReadonlySet<string> = new Set(["budget.alert", "budget.overrun", "budget.unreserved"]);

/** Each alarm to each webhook that hears them, with the commit in which it was crossed: once per crossing, whatever dies afterwards. */
function deliveriesOf({ now }: BudgetContext, { page: { told }, alerts_to }: Books): Exclude<Emitted, { type: "answer" }>[] {
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
  actions.assign(books.page.patch);
  for (const event of books.page.told) actions.emit({ type: "tell", event });
  for (const delivery of deliveriesOf(context, books)) actions.emit(delivery);
  if (books.page.answer !== undefined) actions.emit({ type: "answer", result: books.page.answer });
  if (books.page.alarm_ms !== undefined) actions.raise({ type: "budget.alarm" }, { id: "alarm", delay: books.page.alarm_ms });
}

const toOthers = (own: BudgetStatus) =>
  STATUSES.filter((status) => status !== own).map((status) => ({ guard: { type: "worst_is" as const, params: { status } }, target: status }));

export const budgetMachine = setup({
  types: {} as { context: BudgetContext; events: BudgetEvent; emitted: Emitted; input: CreationInput },
  guards: { worst_is: ({ context }, { status }: { status: BudgetStatus }) => worstStatus(context) === status },
  actions: {
    tell_created: enqueueActions(({ enqueue }) => (enqueue as unknown as Enqueue).emit({ type: "tell", event: { type: "budget.created" } })),
    configure: enqueueActions((args, body: ConfigureBody) => keep(args, (books) => books.configure(body))),
    reserve: enqueueActions((args, body: ReserveBody) => keep(args, (books) => books.holds.reserve(body))),
    settle: enqueueActions((args, body: SettleBody) => keep(args, (books) => books.holds.settle(body))),
    release: enqueueActions((args, { hold }: { hold: string }) => keep(args, (books) => books.holds.release(hold))),
    acquire_slot: enqueueActions((args, { slot }: { slot: string }) => keep(args, (books) => books.line.acquireSlot(slot))),
    release_slot: enqueueActions((args, { slot }: { slot: string }) => keep(args, (books) => books.line.releaseSlot(slot))),
    acquire_session: enqueueActions((args, { session }: { session: string }) => keep(args, (books) => books.acquireSession(session))),
    release_session: enqueueActions((args, { session }: { session: string }) => keep(args, (books) => books.releaseSession(session))),
    acquire_action: enqueueActions((args, body: ActionBody) => keep(args, (books) => books.autonomy.acquireAction(body))),
    acquire_rate: enqueueActions((args, body: RateBody) => keep(args, (books) => books.rates.acquireRate(body))),
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
