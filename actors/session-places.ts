// session-places: asks a tenant's budget for a place before a session is created, where the tenant may have only so many sessions.
//
//   session.create ──no bound──▶ created                      (nobody is asked)
//        └──a bound──session.acquire──▶ a place: created      its end gives it back (state-machines/session.ts)
//                          └─ none ──▶ the longest unheard are looked up: those that ended, or never came to be, leave ──▶ asked once more ──▶ refused
//
// Invariants:
//   SA1. Where there is a bound nothing is created that has no place: a budget that cannot be asked is `unavailable`.
//   SA3. What was created, or is being created, keeps its place: looked up is only who was not heard of for a minute (SP3 of budget-sessions.ts).
//   SA2. A tenant's places are looked up once in LOOK_MS at most, however many are refused meanwhile.
import type { ErrorBody } from "../protocol/errors.ts";
import { errorBody } from "../protocol/errors.ts";
import { budgetActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { viewOf } from "../state-machines/step.ts";
import type { BudgetStanding } from "./budget-standing.ts";
import type { CommandClient } from "./client.ts";
import type { Restorer } from "./restore.ts";

export interface SessionPlaces {
  /** Of a session that is not there yet. Rejects when it cannot be known whether there is a bound. */
  refusal(tenant: string, session: string): Promise<ErrorBody | undefined>;
}

/** A look reads some dozen snapshots. */
const LOOK_MS = 10_000;
/** Tenants that were looked up; one more forgets the oldest, which may then be looked up early. */
const LOOKED_MAX = 10_000;

type Answer = { readonly kind: "granted" } | { readonly kind: "refused"; readonly error: ErrorBody; readonly doubted: readonly string[] };

export function createSessionPlaces({
  client,
  standing,
  restorer,
  world,
  log,
}: {
  readonly client: Pick<CommandClient, "command">;
  readonly standing: Pick<BudgetStanding, "counts_sessions">;
  readonly restorer: Pick<Restorer, "restore">;
  readonly world: Pick<World, "monotonic_ms">;
  readonly log: Log;
}): SessionPlaces {
  const looked = new Map<string, number>();

  async function say(tenant: string, type: "session.acquire" | "session.release", session: string): Promise<JsonObject | ErrorBody> {
    const outcome = await client.command(budgetActor(tenant), { type, body: { session }, channel: "control" });
    if (outcome.kind === "decided" && outcome.reply.ok) return { result: outcome.reply.result };
    const why = outcome.kind === "refused" ? outcome.error.message : outcome.reply.ok ? "" : outcome.reply.error.message;
    return errorBody("unavailable", `the tenant's sessions cannot be counted now: ${why}`);
  }

  /** SA1 */
  async function ask(tenant: string, session: string): Promise<Answer> {
    const said = await say(tenant, "session.acquire", session);
    if (!("result" in said)) return { kind: "refused", error: said as ErrorBody, doubted: [] };
    const { refused, doubted = [] } = said.result as { refused?: ErrorBody; doubted?: readonly string[] };
    return refused === undefined ? { kind: "granted" } : { kind: "refused", error: refused, doubted };
  }

  /** Has this one ended, or never come to be? Who cannot be read keeps its place. */
  async function isGone(tenant: string, session: string): Promise<boolean> {
    try {
      const restored = await restorer.restore({ tenant, kind: "session", id: session });
      return restored === undefined || viewOf(restored.state).final;
    } catch (error) {
      log.debug("a session's place cannot be looked up", { tenant, session, ...errorFields(error) });
      return false;
    }
  }

  /** SA2. Was any place free after all? Those that are taken rightly are asked for again, so that the next look is at others. */
  async function look(tenant: string, doubted: readonly string[], asker: string): Promise<boolean> {
    const now_ms = world.monotonic_ms();
    if (now_ms - (looked.get(tenant) ?? Number.NEGATIVE_INFINITY) < LOOK_MS) return false;
    looked.delete(tenant);
    looked.set(tenant, now_ms);
    if (looked.size > LOOKED_MAX) looked.delete(looked.keys().next().value!);
    let left = 0;
    for (const session of doubted) {
      if (session === asker) continue;
      const gone = await isGone(tenant, session);
      await say(tenant, gone ? "session.release" : "session.acquire", session);
      left += gone ? 1 : 0;
    }
    if (left > 0) log.info("places of sessions that are no more were given back", { tenant, places: left });
    return left > 0;
  }

  return {
    async refusal(tenant, session) {
      if (!(await standing.counts_sessions(tenant))) return undefined;
      const first = await ask(tenant, session);
      if (first.kind === "granted") return undefined;
      if (first.doubted.length === 0 || !(await look(tenant, first.doubted, session))) return first.error;
      const second = await ask(tenant, session);
      return second.kind === "granted" ? undefined : second.error;
    },
  };
}
