// session-dependency: the message whose turn is next comes after turns of other sessions, or of this one: it waits for them, has its turn, or is
// skipped. And the other way round: who comes after a turn of this session is told of its end. The rules are in dependency.ts.
import { assert } from "../protocol/assert.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import { asked, failedParent, looked, type LookOutput, noWait } from "./dependency.ts";
import type { Change } from "./session-change.ts";
import type { Queued, SessionContext } from "./session-context.ts";

export type AskBody = { readonly session: string; readonly message: string; readonly from: string };

const headOf = ({ queue }: SessionContext): Queued => {
  const [head] = queue;
  assert(head !== undefined, "what waits for other turns is the message whose turn is next");
  return head;
};

export function waitingBegun(context: SessionContext): Change {
  const { turn } = headOf(context);
  return context.dependency?.turn === turn ? {} : { context: { dependency: noWait(turn) } };
}

export function parentsLooked(context: SessionContext, output: LookOutput): Change {
  const { waiting, send } = looked(context.dependency ?? noWait(headOf(context).turn), output);
  return { context: { dependency: waiting }, send };
}

/** It could not be looked. */
export function lookFailed(context: SessionContext): Change {
  const before = context.dependency ?? noWait(headOf(context).turn);
  return { context: { dependency: { ...before, looks: before.looks + 1 } } };
}

/** DP1 */
export function parentsMet(context: SessionContext): Change {
  const { after: _, ...head } = headOf(context);
  return { context: { dependency: null, queue: [head, ...context.queue.slice(1)] }, tell: [{ type: "dependency.met", turn: head.turn }] };
}

/** The message whose turn is next does not get one. */
export function headGivenUp(context: SessionContext, turn_state: "failed" | "cancelled", end: ActorEvent): Change {
  const { turn } = headOf(context);
  return { context: { dependency: null, queue: context.queue.slice(1), turn, turn_state, step: 0, steps_void: 0 }, tell: [{ ...end, turn }] };
}

/** DP2 */
export function turnSkipped(context: SessionContext, output: LookOutput): Change {
  const parent = failedParent(output);
  assert(parent !== undefined, "DP2: a turn is skipped for a parent that did not end well");
  const { session, message, end } = parent;
  const why = end === "gone" ? "is gone" : end === "cancelled" ? "was cancelled" : "failed";
  return headGivenUp(context, "failed", {
    type: "turn.failed",
    turn: 0,
    reason: "dependency_failed",
    message: `it comes after message ${message} of session ${session}, whose turn ${why}`,
    details: { parent: { session, message, end } },
  });
}

export function parentAsked(context: SessionContext, asker: { session: string; message: string; from: string }): Change {
  const { queue, turn, turn_state, transcript, askers = {} } = context;
  const open = turn_state === "open" ? transcript.findLast((item) => item.role === "user" && item.turn === turn) : undefined;
  const found = open !== undefined && `m${open.at}` === asker.message ? turn : queue.find(({ message_id }) => message_id === asker.message)?.turn;
  const next = asked(askers, found, asker);
  return { ...(next.askers === askers ? {} : { context: { askers: next.askers } }), send: next.send };
}
