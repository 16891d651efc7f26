// model-dues: what the end of one attempt of a model call owes to its tenant's budget: the settlement of its hold, in whatever way it ended.
//
//   done, failed with its calls    what its calls cost together
//   stopped where it ran           what its calls cost together, the one in flight with what it had used by then
//   lost, no word of it            null: nobody knows, and the provider may have billed it; the budget settles the whole hold, and at least
//                                  what the calls cost that had ended before (`spent_usd_micros`)
//
// It goes out with the commit that ends the attempt, so it is said exactly once and no crash forgets it. A call that never reserved anything
// settles a hold that is not there, which only closes its id.
import type { ActorEvent } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { actorPath, budgetActor } from "../protocol/ids.ts";
import { holdId } from "./budget-holds.ts";
import type { RateUse } from "./budget-windows.ts";
import type { Emitted, EndedAttempt } from "./definition.ts";

interface Call {
  /** Absent in journals of before calls were told one by one: their settlements are as they were. */
  readonly purpose?: string;
  readonly usage: Json;
  readonly cost_usd_micros: number | null;
  readonly model: string;
  /** Absent in journals of before what is not used came back to its window: their settlements are as they were. */
  readonly rate_tokens?: number | null;
  /** Absent in journals of before judges were counted apart: their settlements are as they were. */
  readonly category?: string;
}

/** What the calls of an attempt cost together; null when that is not known. A call that the provider never began to answer cost nothing. */
function costOfCalls(told: JsonObject | undefined): number | null {
  const calls = told?.["attempts"] as unknown as readonly Call[] | undefined;
  if (!Array.isArray(calls)) return typeof told?.["cost_usd_micros"] === "number" ? told["cost_usd_micros"] : null;
  let sum = 0;
  for (const { usage, cost_usd_micros } of calls as readonly Call[]) {
    if (cost_usd_micros === null && usage !== null) return null;
    sum += cost_usd_micros ?? 0;
  }
  return sum;
}

/** What of it is known where the whole is not. */
function spentOnCalls(told: JsonObject | undefined): number {
  const calls = told?.["attempts"] as unknown as readonly Call[] | undefined;
  if (!Array.isArray(calls)) return 0;
  return (calls as readonly Call[]).reduce((sum, { purpose, cost_usd_micros }) => sum + (purpose === undefined ? 0 : (cost_usd_micros ?? 0)), 0);
}

/** What of it was spent on something else than the agent's own calls. */
function costsApart(told: JsonObject | undefined): { readonly by_category?: JsonObject } {
  const calls = told?.["attempts"] as unknown as readonly Call[] | undefined;
  if (!Array.isArray(calls)) return {};
  const by: Record<string, number> = {};
  for (const { category = "llm", cost_usd_micros } of calls as readonly Call[])
    if (category !== "llm" && cost_usd_micros !== null && cost_usd_micros > 0) by[category] = (by[category] ?? 0) + cost_usd_micros;
  return Object.keys(by).length === 0 ? {} : { by_category: by };
}

/** What its calls used in the windows of their providers; undefined where nobody knows, or nothing was called. */
function usedIn(told: JsonObject | undefined): readonly RateUse[] | undefined {
  const calls = told?.["attempts"] as unknown as readonly Call[] | undefined;
  if (!Array.isArray(calls) || calls.length === 0) return undefined;
  const by = new Map<string, RateUse>();
  for (const { model, rate_tokens } of calls as readonly Call[]) {
    if (rate_tokens === undefined) return undefined;
    const provider = model.slice(0, Math.max(0, model.indexOf("/")));
    const { requests, tokens } = by.get(provider) ?? { requests: 0, tokens: 0 };
    by.set(provider, { provider, requests: requests + 1, tokens: tokens === null || rate_tokens === null ? null : tokens + rate_tokens });
  }
  return [...by.values()];
}

export function modelCallDues({ actor, inst, attempt, input, progress, end }: EndedAttempt): readonly Exclude<Emitted, { type: "answer" }>[] {
  const told = end.kind === "done" ? (end.output as JsonObject) : end.kind === "failed" ? end.error.details : end.kind === "stopped" ? end.told : undefined;
  const cost_usd_micros = costOfCalls(told);
  const spent_usd_micros = cost_usd_micros === null ? spentOnCalls(told ?? progress) : 0;
  const model = typeof told?.["model"] === "string" ? { model: told["model"] } : {};
  const used = usedIn(told);
  const body = {
    hold: holdId(actor, inst, attempt),
    cost_usd_micros,
    ...(spent_usd_micros === 0 ? {} : { spent_usd_micros }),
    ...costsApart(told ?? progress),
    ...model,
    ...(used === undefined ? {} : { used: used.map((one) => ({ ...one })) }),
  };
  const { turn = 0, step = 0 } = (input ?? {}) as { turn?: number; step?: number };
  const decision = told?.["decision"];
  const decided: ActorEvent[] =
    decision === undefined || decision === null ? [] : [{ type: "budget.decision", turn, step, attempt, ...(decision as JsonObject) } as ActorEvent];
  return [
    ...decided.map((event) => ({ type: "tell", event }) as const),
    { type: "send", to: actorPath(budgetActor(actor.tenant)), command: "budget.settle", body },
  ];
}
