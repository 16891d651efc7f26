// turn-finder: what became of the turn of a message, as its session's own journal says. Read-only, by any process.
//
// Invariants:
//   TF1. `completed`, `failed` and `cancelled` stand in the journal and will not change; `open` may have changed since.
import type { Bus } from "../bus/port.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { seqOfMessage } from "../protocol/session-parent.ts";
import { actorSubject } from "../protocol/subjects.ts";
import type { ParentEnd } from "../state-machines/dependency.ts";
import { sessionContextOf } from "../state-machines/session-context.ts";
import { viewOf } from "../state-machines/step.ts";
import type { Restorer } from "./restore.ts";

export type TurnFound =
  | { readonly kind: "no_session" }
  /** `seq`: of the last entry of the session. */
  | { readonly kind: "no_message"; readonly seq: number }
  | { readonly kind: "found"; readonly end: Exclude<ParentEnd, "gone"> };

export interface TurnFinder {
  /** Rejects when the bus cannot answer. */
  find(session: ActorAddress, message: string): Promise<TurnFound>;
}

const ENDS: Readonly<Record<string, "completed" | "failed" | "cancelled">> = {
  "turn.completed": "completed",
  "turn.failed": "failed",
  "turn.cancelled": "cancelled",
};

export function createTurnFinder({ bus, restorer }: { bus: Pick<Bus, "read">; restorer: Restorer }): TurnFinder {
  return {
    async find(session, message) {
      const restored = await restorer.restore(session);
      if (restored === undefined) return { kind: "no_session" };
      const { queue, transcript, turn, turn_state } = sessionContextOf(viewOf(restored.state));
      const asked = turn_state === "open" ? transcript.findLast((item) => item.role === "user" && item.turn === turn) : undefined;
      if (queue.some(({ message_id }) => message_id === message) || (asked !== undefined && `m${asked.at}` === message)) return { kind: "found", end: "open" };
      if (seqOfMessage(message) > restored.state.seq) return { kind: "no_message", seq: restored.state.seq };
      // It has ended, or was never accepted: which, only the journal knows.
      let its_turn: unknown;
      for await (const { data } of bus.read("EVENTS", actorSubject(session, "event"), 1))
        for (const event of decodeJournal(data, session).events) {
          if (event.type === "message.received" && event["message_id"] === message) its_turn = event["turn"];
          const end = its_turn !== undefined && event["turn"] === its_turn ? ENDS[event.type] : undefined;
          if (end !== undefined) return { kind: "found", end };
        }
      return its_turn === undefined ? { kind: "no_message", seq: restored.state.seq } : { kind: "found", end: "open" };
    },
  };
}
