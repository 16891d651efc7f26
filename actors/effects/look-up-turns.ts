// look-up-turns: what became of the turns that a message comes after, all of its own tenant.
import { BusUnavailable } from "../../bus/fence.ts";
import type { Json } from "../../protocol/json.ts";
import { actorPath } from "../../protocol/ids.ts";
import type { LookInput, LookOutput, ParentFound } from "../../state-machines/dependency.ts";
import { EffectFailure, type Performer } from "../performer.ts";
import type { TurnFinder } from "../turn-finder.ts";

/** `turns` absent: nobody can look, and what comes after others waits. */
export function lookUpTurns(turns: TurnFinder | undefined): Performer {
  return async ({ parents }: LookInput, { actor }): Promise<Json> => {
    if (turns === undefined) throw new EffectFailure("unavailable", "this process cannot read other sessions");
    const found = await Promise.all(
      parents.map(async ({ session, message }): Promise<ParentFound> => {
        const turn = await turns.find({ tenant: actor.tenant, kind: "session", id: session }, message).catch((error: unknown) => {
          throw error instanceof BusUnavailable ? new EffectFailure("unavailable", "other sessions cannot be read now") : error;
        });
        return { session, message, end: turn.kind === "found" ? turn.end : "gone" };
      }),
    );
    const output: LookOutput = { me: actorPath(actor), parents: found };
    return output as unknown as Json;
  };
}
