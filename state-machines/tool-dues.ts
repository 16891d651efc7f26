// tool-dues: what the end of one attempt of a tool call owes to its tenant's budget, where its agent says what a call of the tool costs.
//
//   done, or failed after it was begun    its price: it ran
//   failed before                         nothing: refused, denied, or called off
//   stopped where it ran                  as far as it had come: its price, or nothing
//   lost with its worker                  null: it may have run; the budget settles the whole hold
//
// As with calls of models (model-dues.ts) it goes out with the commit that ends the attempt: said once, whatever dies. A tool without a price owes nothing.
import { actorPath, budgetActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { holdId } from "./budget-holds.ts";
import type { Emitted, EndedAttempt } from "./definition.ts";

/** What a call of a tool costs, and in which category it is counted. */
export interface ToolPrice {
  readonly usd_micros: number;
  readonly category: string;
}

/** A tool as budgets and usage rows name what was paid for. */
export const toolAsModel = (name: string): string => `tool/${name}`;

function costOf({ end }: EndedAttempt): number | null {
  const told = end.kind === "done" ? (end.output as JsonObject) : end.kind === "failed" ? end.error.details : end.kind === "stopped" ? end.told : undefined;
  const cost = told?.["cost_usd_micros"];
  if (typeof cost === "number") return cost;
  return end.kind === "failed" ? 0 : null;
}

export function toolCallDues(ended: EndedAttempt): readonly Exclude<Emitted, { type: "answer" }>[] {
  const { actor, inst, attempt, input } = ended;
  const { name, price } = input as unknown as { readonly name: string; readonly price?: ToolPrice };
  if (price === undefined) return [];
  const body = { hold: holdId(actor, inst, attempt), cost_usd_micros: costOf(ended), model: toolAsModel(name) };
  return [{ type: "send", to: actorPath(budgetActor(actor.tenant)), command: "budget.settle", body }];
}
