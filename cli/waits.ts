// waits: what waits in the workers, by tenant, and why a session's call of a model does. The numbers are each worker's own, asked of it by the
// host protocol; a tenant's line for its slots stands in its budget, over all workers.
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, budgetActor } from "../protocol/ids.ts";
import { turnAt } from "../protocol/priority.ts";
import { budgetContextOf, type InLine } from "../state-machines/budget-context.ts";
import { tableRows } from "../state-machines/budget-table.ts";
import { viewOf } from "../state-machines/step.ts";
import { askHost, type HostReply } from "../supervisors/host-service.ts";
import { leases } from "./cluster.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { ago } from "./printer.ts";

/** A place in the line for a tenant's slots, as its budget has it. */
interface SlotPlace {
  readonly priority: InLine["priority"];
  readonly waited_ms: number;
  readonly ahead: number;
  readonly waiting: number;
  readonly concurrency: number;
  readonly concurrency_max: number | null;
}

async function slotPlaceOf(context: Context, actor: ActorAddress): Promise<SlotPlace | undefined> {
  const restored = await (await context.restorer()).restore(budgetActor(actor.tenant));
  if (restored === undefined) return undefined;
  const { line = [], holds_open, slots, concurrency_max } = budgetContextOf(viewOf(restored.state));
  const order = [...tableRows(line)].sort(([, a], [, b]) => turnAt(a.priority, a.since_ms) - turnAt(b.priority, b.since_ms) || a.number - b.number);
  const ahead = order.findIndex(([hold]) => hold.startsWith(`${actorPath(actor)}/`));
  const row = order[ahead]?.[1];
  if (row === undefined) return undefined;
  const { priority, since_ms } = row;
  const concurrency = holds_open + Object.keys(slots).length;
  return { priority, waited_ms: Math.max(0, context.ports.world.now_ms() - since_ms), ahead, waiting: order.length, concurrency, concurrency_max };
}

/** Why the model call of an actor that is at work has not begun, in words; undefined when it has, or when nobody knows. */
export async function callWaitOf(context: Context, actor: ActorAddress, worker: string | undefined): Promise<string | undefined> {
  const place = await slotPlaceOf(context, actor);
  if (place !== undefined) {
    const { priority, waited_ms, ahead, waiting, concurrency, concurrency_max } = place;
    const room = concurrency_max === null ? `${concurrency} calls run` : `${concurrency} of ${concurrency_max} calls run`;
    return `its model call waits for a slot of its tenant for ${ago(waited_ms)}: ${room}, ${ahead} of ${waiting} that wait go before it (priority ${priority})`;
  }
  if (worker === undefined || worker === "") return undefined;
  const told = await askHost(await context.bus(), worker, "waits", { actor: actorPath(actor) }, { patience_ms: 1_000 });
  const call = told.ok ? told.result.call : undefined;
  if (!told.ok || call === undefined) return undefined;
  const { running, calls_max } = told.result.calls;
  const what = call.for === "pool" ? `a place at ${worker} (${running} of ${calls_max} calls run)` : "a slot of its tenant";
  return `its model call waits for ${what} for ${ago(call.waited_ms)}: ${call.ahead} of its tenant go before it (priority ${call.priority})`;
}

export async function waits(context: Context, { worker, callsMax }: { worker?: string; callsMax?: number }): Promise<number> {
  const { printer } = context;
  const bus = await context.bus();
  const ids = (await leases(context)).map(({ id }) => id).filter((id) => worker === undefined || id === worker);
  if (worker !== undefined && ids.length === 0) throw new TroupeError(errorBody("not_found", `no worker '${worker}' holds a lease`));
  const told = await Promise.all(ids.map((id) => askHost(bus, id, "waits", callsMax === undefined ? {} : { calls_max: callsMax })));
  const all = told.flatMap((one): HostReply<"waits">[] => (one.ok ? [one.result] : []));
  const silent = told.find((one) => !one.ok);
  if (silent !== undefined && !silent.ok && (worker !== undefined || all.length === 0)) throw new TroupeError(silent.error);
  if (printer.json) {
    printer.document({ workers: all });
    return EXIT.done;
  }
  printer.table(
    ["worker", "calls", "at most", "calls waiting", "commands waiting", "refusing"],
    all.map(({ worker: id, calls, commands }) => [id, calls.running, calls.calls_max, calls.waiting, commands.waiting, calls.refusing + commands.refusing]),
  );
  const tenants = all.flatMap(({ worker: id, calls, commands }) => [
    ...calls.tenants.filter(({ waiting }) => waiting > 0).map(({ tenant, waiting, state }) => [tenant, id, "calls", waiting, state]),
    ...commands.flows.map(({ tenant, kind, waiting, state, hurried }) => [
      tenant,
      id,
      `commands of ${kind}s`,
      waiting,
      hurried === "refusing" ? hurried : state,
    ]),
  ]);
  if (tenants.length > 0) printer.table(["tenant", "worker", "what waits", "how many", "more is"], tenants);
  else printer.note("nothing waits");
  return EXIT.done;
}
