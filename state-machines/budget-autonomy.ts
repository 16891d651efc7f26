// budget-autonomy: what an agent may do by itself in a period: its actions are counted, and refused above the limit that it is asked with.
//
// Invariants (of budget.ts):
//   B10. An agent begins no more actions in a period than the limit that it is asked with (budget-actions.ts).
import { actionCounted, type ActionCounts, type ActionKind, type ActionLimits, actionsIn } from "./budget-actions.ts";
import type { ActionBody } from "./budget-commands.ts";
import { LEVELS_MAX } from "./budget-context.ts";
import type { SlotLine } from "./budget-line.ts";
import type { Page } from "./budget-page.ts";
import { periodEnd } from "./budget-period.ts";
import { emptyTable, tableGet, tablePut, tableRows } from "./budget-table.ts";

/** The counted actions of one page. */
export class Autonomy {
  readonly #page: Page;
  readonly #line: SlotLine;

  constructor(page: Page, line: SlotLine) {
    this.#page = page;
    this.#line = line;
  }

  /** B10; false, and the refusal told, when the agent has done so many already, or nobody could count one more. */
  mayAct(what: string, agent: string, kind: ActionKind, limits: ActionLimits): boolean {
    const { actions, now } = this.#page.now;
    const { [kind]: limit, period } = limits;
    const counts = actions === undefined ? undefined : tableGet(actions, `agent/${agent}`);
    if (counts === undefined && actions !== undefined && [...tableRows(actions)].length >= LEVELS_MAX) {
      this.#line.refuse(what, "overloaded", `the actions of ${LEVELS_MAX} agents are counted already`, { agents_max: LEVELS_MAX });
      return false;
    }
    const used = actionsIn(counts, period, now.at_ms)[kind];
    if (limit === undefined || used < limit) return true;
    const ends_ms = periodEnd(period, now.at_ms);
    const [rule, per] = [`limits.actions.${kind}`, period === "none" ? "in all" : `a ${period}`];
    this.#line.refuse(
      what,
      "autonomy_exceeded",
      `the agent ${agent} may make ${limit} ${kind.replace("_", " ")} ${per} by itself, and has made them (${rule})`,
      {
        rule,
        agent,
        limit,
        used,
        period,
        period_ends_at: ends_ms === null ? null : new Date(ends_ms).toISOString(),
      },
    );
    return false;
  }

  countAction(agent: string, kind: ActionKind): void {
    const { actions = emptyTable<ActionCounts>(), now } = this.#page.now;
    this.#page.set({ actions: tablePut(actions, `agent/${agent}`, actionCounted(tableGet(actions, `agent/${agent}`), kind, now.at_ms)) });
  }

  acquireAction({ action, agent, kind, limits }: ActionBody): void {
    if (!this.mayAct(action, agent, kind, limits)) return;
    this.countAction(agent, kind);
    const { [kind]: limit = null, period } = limits;
    const counts = this.#page.now.actions === undefined ? undefined : tableGet(this.#page.now.actions, `agent/${agent}`);
    const used = actionsIn(counts, period, this.#page.now.now.at_ms)[kind];
    this.#page.told.push({ type: "budget.action", action, agent, kind, used, limit, period });
    this.#page.answer = { granted: true, used, limit, period };
  }
}
