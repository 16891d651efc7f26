// budget-holds: what is held for a call before it is made, and what becomes of it.
//
//   reserve ──granted──▶ open ──settle──▶ closed      settled: what the call cost, or the whole hold where nobody knows
//     │                  ├──release──▶ closed      nothing was spent
//     └──refused         └──a day─────▶ closed      nobody said anything: settled whole
//
// Invariants (of budget.ts):
//   B1. No grant takes settled + reserved of any level above its limit. A limit admits what equals it; a limit of 0 admits nothing.
//   B2. Whoever asks for at least `minimum` where every level has that much left is granted, unless concurrency or a rate forbids it.
//   B4. A hold is settled or released once. A hold that was closed, or whose closing came before its reservation, is never opened again.
//   B7. A settlement above the hold is counted in full and told as `budget.overrun`: it is never cut down to what was reserved.
import { assert } from "../protocol/assert.ts";
import { HOLD_PATTERN } from "../protocol/commands.ts";
import { actorPath } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Autonomy } from "./budget-autonomy.ts";
import type { Ask, ReserveBody, SettleBody } from "./budget-commands.ts";
import { CATEGORIES_MAX, type Closed, type Hold, HOLD_LIFE_MS, type Level, levelName } from "./budget-context.ts";
import { decide, type Decision, type DecisionInputs, headroom, utilisation } from "./budget-decision.ts";
import type { Levels } from "./budget-levels.ts";
import type { SlotLine } from "./budget-line.ts";
import type { Page } from "./budget-page.ts";
import { project } from "./budget-projection.ts";
import type { ProviderRates } from "./budget-provider-rates.ts";
import { placeHeard } from "./budget-sessions.ts";
import { tableDrop, tableGet, tablePut, tableRemember } from "./budget-table.ts";

/**
 * Senders (an effect of an actor) whose last closed attempt is remembered. It is needed while a reservation of that attempt may still
 * arrive: one that waits in COMMANDS, or in the hands of a worker that was lost and is not quite dead. By then fewer than this many others
 * have ended; for the one in a million that comes later still, HOLD_LIFE_MS closes what it opens.
 */
export const CLOSED_MAX = 2_048;

/** Whose hold it is: two holds of one sender are attempts of which the later one follows the earlier. */
function senderOf(hold: string): { sender: string } & Closed {
  const [, actor, seq, effect, attempt] = HOLD_PATTERN.exec(hold) ?? [];
  assert(actor !== undefined && seq !== undefined && effect !== undefined && attempt !== undefined, "a hold's id has passed its schema");
  return { sender: `${actor}:${effect}`, seq: Number(seq), attempt: Number(attempt) };
}

interface Verdict {
  readonly decision: Decision;
  readonly inputs: DecisionInputs;
  readonly key: string;
}
const SEVERITY = { continue: 0, degrade: 1, terminate: 2 } as const;

/** The holds of one page. */
export class Holds {
  readonly #page: Page;
  readonly #levels: Levels;
  readonly #line: SlotLine;
  readonly #rates: ProviderRates;
  readonly #autonomy: Autonomy;

  constructor(page: Page, levels: Levels, line: SlotLine, rates: ProviderRates, autonomy: Autonomy) {
    this.#page = page;
    this.#levels = levels;
    this.#line = line;
    this.#rates = rates;
    this.#autonomy = autonomy;
  }

  #isClosed(hold: string): boolean {
    const { sender, seq, attempt } = senderOf(hold);
    const mark = tableGet(this.#page.now.closed, sender);
    return mark !== undefined && (seq < mark.seq || (seq === mark.seq && attempt <= mark.attempt));
  }

  #close(hold: string): void {
    const { sender, seq, attempt } = senderOf(hold);
    this.#line.leaveLine(hold);
    if (!this.#isClosed(hold)) this.#page.set({ closed: tableRemember(this.#page.now.closed, sender, { seq, attempt }, CLOSED_MAX) });
    if (tableGet(this.#page.now.holds, hold) === undefined) return;
    this.#page.set({ holds: tableDrop(this.#page.now.holds, hold), holds_open: this.#page.now.holds_open - 1 });
  }

  /** By every level that applies; the gravest word counts. */
  #judge(keys: readonly string[], { amount_usd_micros, minimum_usd_micros }: Ask): Verdict {
    const { concurrency_max } = this.#page.now;
    let worst: Verdict | undefined;
    for (const key of keys) {
      const level = this.#levels.level(key);
      assert(level !== undefined, "only levels that are there are judged");
      const { settled_usd_micros, reserved_usd_micros, limit_usd_micros, period, period_started_at_ms } = level;
      const concurrency = this.#line.concurrency;
      const projection = project(this.#page.now.projection, {
        settled_usd_micros,
        others_usd_micros: reserved_usd_micros,
        amount_usd_micros: amount_usd_micros ?? 0,
        others: this.#page.now.holds_open,
        period,
        period_started_at_ms,
        at_ms: this.#page.now.now.at_ms,
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

  reserve(body: ReserveBody): void {
    const { hold, session, agent, user, part = 1, category = "llm", degraded, rate } = body;
    const open = tableGet(this.#page.now.holds, hold);
    if (open === undefined ? this.#isClosed(hold) : part < open.part) {
      this.#line.refuse(hold, "conflict", "this attempt has ended; nothing can be reserved for it any more", { ended: true }); // B4
      return;
    }
    if (open !== undefined && part === open.part) {
      const rated = rate?.returns === true ? { rated: this.#rates.isRated } : {};
      this.#page.answer = { granted_usd_micros: open.granted_usd_micros, choice: open.choice, model: open.model, repeated: true, ...rated };
      return;
    }
    const keys = open?.levels ?? this.#levels.levelsOf({ session, agent, ...(user === undefined ? {} : { user }) });
    const limited = keys.some((key) => this.#levels.level(key)?.limit_usd_micros !== null);
    if (limited && body.amount_usd_micros === null) {
      this.#line.refuse(hold, "price_unknown", `the price of ${body.model} is not known, and a limit applies`, { model: body.model });
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
    if (acts !== undefined && !this.#autonomy.mayAct(hold, agent, "model_calls", acts)) return;
    if (open === undefined && !this.#line.roomForOne(hold, body.priority)) return;
    const ask: Ask = takes_cheaper && degraded !== undefined ? degraded : body;
    const counts = (takes_cheaper ? degraded?.rate : undefined) ?? rate;
    const taken = counts === undefined ? undefined : this.#rates.takeRate(hold, { ...counts, requests: 1 });
    if (taken === "refused") return;
    const asked = ask.amount_usd_micros ?? 0;
    const room = Math.min(...keys.map((key) => headroom(this.#levels.level(key) as Level)));
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
      at_ms: open?.at_ms ?? this.#page.now.now.at_ms,
      ...(open?.taken === undefined ? {} : { taken: open.taken }),
      ...(open?.acts === undefined && acts === undefined ? {} : { acts: true as const }),
    };
    if (acts !== undefined) this.#autonomy.countAction(agent, "model_calls");
    const places = placeHeard(this.#page.now.session_places ?? undefined, session, this.#page.now.now.at_ms);
    if (places !== undefined && places !== this.#page.now.session_places) this.#page.set({ session_places: places });
    this.#page.set({ holds: tablePut(this.#page.now.holds, hold, next), holds_open: this.#page.now.holds_open + (open === undefined ? 1 : 0) });
    const returns = counts?.returns === true;
    if (taken !== undefined && returns) this.#rates.remember(hold, taken);
    this.#page.told.push({
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
    this.#levels.add(keys, 0, granted);
    this.#page.wakeBy(next.at_ms + HOLD_LIFE_MS);
    // Who will say what it used hears whether anybody counts: then each further call of the hold asks for its place in the window.
    this.#page.answer = { granted_usd_micros: granted, choice, model: ask.model, limited, decision, ...(returns ? { rated: this.#rates.isRated } : {}) };
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
    this.#line.refuse(
      hold,
      "budget_exceeded",
      `${where} has ${Math.max(0, remaining_usd_micros)} micro-dollars left, and the call needs ${minimum_usd_micros}`,
      {
        ...levelName(key),
        limit_usd_micros,
        settled_usd_micros,
        reserved_usd_micros,
        remaining_usd_micros,
        asked_usd_micros: amount_usd_micros,
        minimum_usd_micros,
        // Others hold what is missing, and may give some of it back. What the asker holds itself will not come while it waits.
        may_return: limit_usd_micros !== null && limit_usd_micros > 0 && settled_usd_micros + own_usd_micros + minimum_usd_micros <= limit_usd_micros,
      },
    );
  }

  /** B11 */
  #countCosts(cost_usd_micros: number, category: string, parts: Readonly<Record<string, number>>): { readonly by_category?: JsonObject } {
    const apart = Object.values(parts).reduce((sum, part) => sum + part, 0);
    const by = apart === 0 || apart > cost_usd_micros ? {} : parts;
    const rest = cost_usd_micros - (by === parts ? apart : 0);
    const all: Readonly<Record<string, number>> = by === parts ? { ...by, [category]: (by[category] ?? 0) + rest } : { [category]: rest };
    let { categories } = this.#page.now;
    for (const [wanted, part] of Object.entries(all)) {
      const name = Object.hasOwn(categories, wanted) || Object.keys(categories).length < CATEGORIES_MAX - 1 ? wanted : "other";
      categories = { ...categories, [name]: (categories[name] ?? 0) + part };
    }
    this.#page.set({ categories });
    return by === parts ? { by_category: all } : {};
  }

  settle({ hold, cost_usd_micros, spent_usd_micros = 0, model, used, by_category = {} }: SettleBody, why?: "expired"): void {
    const open = tableGet(this.#page.now.holds, hold);
    if (open === undefined) {
      const was_closed = this.#isClosed(hold);
      this.#close(hold); // B4: a reservation that comes later is refused
      this.#line.callNext();
      // Money that was spent without having been reserved is told, whatever else is true.
      const unreserved = cost_usd_micros ?? spent_usd_micros;
      if (!was_closed && unreserved > 0) this.#page.told.push({ type: "budget.unreserved", hold, cost_usd_micros: unreserved });
      this.#page.answer = { settled: false, reason: was_closed ? "closed" : "unknown" };
      return;
    }
    const cost = cost_usd_micros ?? Math.max(open.amount_usd_micros, spent_usd_micros);
    const assumed = cost_usd_micros === null;
    const { session, agent, user, category, amount_usd_micros } = open;
    this.#close(hold);
    // What cost nothing, and names no calls, called nobody.
    const back = this.#rates.giveBack(open, used !== undefined ? { kind: "known", by: used } : { kind: cost_usd_micros === 0 ? "nothing" : "unknown" });
    const parts = this.#countCosts(cost, category, by_category);
    this.#page.set({ settled_ever_usd_micros: this.#page.now.settled_ever_usd_micros + cost });
    this.#page.told.push({
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
      this.#page.told.push({
        type: "budget.overrun",
        hold,
        session,
        agent,
        cost_usd_micros: cost,
        reserved_usd_micros: amount_usd_micros,
        over_usd_micros: cost - amount_usd_micros,
      }); // B7
    this.#levels.add(open.levels, cost, -amount_usd_micros);
    this.#line.callNext();
    this.#page.answer = { settled: true, cost_usd_micros: cost };
  }

  release(hold: string): void {
    const open = tableGet(this.#page.now.holds, hold);
    this.#close(hold);
    if (open === undefined) {
      this.#line.callNext();
      this.#page.answer = { released: false };
      return;
    }
    const { session, agent, amount_usd_micros } = open;
    this.#page.told.push({ type: "budget.released", hold, session, agent, amount_usd_micros, ...this.#rates.giveBack(open, { kind: "nothing" }) });
    this.#levels.add(open.levels, 0, -amount_usd_micros);
    this.#line.callNext();
    this.#page.answer = { released: true, amount_usd_micros };
  }
}

/** The id of the hold of one attempt of an effect. */
export const holdId = (actor: Parameters<typeof actorPath>[0], inst: string, attempt: number): string => `${actorPath(actor)}/${inst}/${attempt}`;
