// session-turns: the turns of a session: a message is received, waits, has its turn, and the turn ends once.
//
//   received ──▶ queued ──begun──▶ open ──▶ completed | failed | cancelled
//                  └──dropped, when the session ends──▶ cancelled
//
// Invariants (of session.ts):
//   SE1. Every message received gets a turn number, rising from 1, and every number gets exactly one end. At most one turn is open.
//   SE2. A turn makes at most max_loops model calls; one in which no model was asked does not count.
//   SE8. What a guardrail blocked on its way to the model is not in the prompt of a later turn.
import { assert } from "../protocol/assert.ts";
import type { MessageContent } from "../protocol/commands.ts";
import { errorBody } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";
import { LOOPS_DEFAULT, SESSION_QUEUE_MAX } from "../protocol/limits.ts";
import { parentName, type SessionParent } from "../protocol/session-parent.ts";
import type { ActorView, EffectError } from "./definition.ts";
import { after, type Change } from "./session-change.ts";
import { type Queued, type SessionContext, sessionContextOf } from "./session-context.ts";
import type { ModelOutput } from "./session-effects.ts";
import { FAILURE_CHARACTERS_MAX } from "./session-failure.ts";
import { callOf, modelFailed } from "./session-model-calls.ts";
import { stepClosed, toolsGivenUp } from "./session-tool-calls.ts";
import { windowed } from "./session-transcript.ts";

export interface MessageBody {
  readonly content: MessageContent;
  readonly on_busy?: "enqueue" | "reject" | "interrupt";
  readonly after?: readonly SessionParent[];
}

const BUSY_STATES = ["thinking", "acting", "awaiting_dependency"];

/** Refuses: a second message in mode single, `busy` to those who do not want to wait, `overloaded` when too many do. */
export function refuseMessage(view: ActorView, { on_busy }: MessageBody) {
  const context = sessionContextOf(view);
  if (view.final || view.state === "unhealthy") return undefined;
  if (context.mode === "single" && context.turns_assigned > 0) {
    return errorBody("illegal_transition", "a session of mode single takes one message, and has it", { state: view.state, command: "message.send" });
  }
  const open = context.turn_state === "open";
  if (on_busy === "reject" && (open || context.queue.length > 0)) {
    return errorBody("busy", open ? `turn ${context.turn} is running` : "another message waits already", { state: view.state, turn: context.turn });
  }
  // An interrupting message does not wait: it leaves the queue as it found it. Behind a pause it would wait.
  const begins_at_once = on_busy === "interrupt" && BUSY_STATES.includes(view.state) && !context.pausing;
  if (context.queue.length >= SESSION_QUEUE_MAX && !begins_at_once) {
    return errorBody("overloaded", `${SESSION_QUEUE_MAX} messages wait in this session already`, { queue: context.queue.length, queue_max: SESSION_QUEUE_MAX });
  }
  return undefined;
}

/** SE1: a number for every message. An interrupting one goes before those that wait. */
export function received(context: SessionContext, place: "front" | "back", { after: parents }: MessageBody): Change {
  const turn = context.turns_assigned + 1;
  const message_id = `m${context.now.seq}`;
  const message: Queued = { at: context.now.seq, turn, message_id, ...(parents === undefined ? {} : { after: parents }) };
  const comes_after = parents === undefined ? {} : { after: parents.map(parentName) };
  return {
    context: { turns_assigned: turn, queue: place === "front" ? [message, ...context.queue] : [...context.queue, message] },
    tell: [{ type: "message.received", turn, message_id, ...(context.user === null ? {} : { user: context.user }), ...comes_after }],
    answer: { message_id, turn },
  };
}

export function turnBegun(context: SessionContext): Change {
  const [message, ...queue] = context.queue;
  assert(message !== undefined && context.turn_state !== "open", "a turn begins with a message that waits, when no turn is open");
  const { turn, message_id, at } = message;
  return {
    context: {
      queue,
      turn,
      turn_state: "open",
      step: 0,
      steps_void: 0,
      at_boundary: true,
      reason: null,
      transcript: windowed([...context.transcript, { role: "user", at, turn }]),
    },
    tell: [{ type: "turn.started", turn, message_id }],
  };
}

export function stepBegun(context: SessionContext): Change {
  return { context: { step: context.step + 1, reason: null } };
}

/** No model was asked: the step is void, and the next one begins after the configuration was taken up. */
export function stepVoid(context: SessionContext): Change {
  return { context: { steps_void: context.steps_void + 1 } };
}

export const maxLoops = (context: SessionContext): number => context.config?.max_loops ?? LOOPS_DEFAULT;

export function turnCompleted(context: SessionContext, output: ModelOutput): Change {
  const { turn, step, now } = context;
  const message_id = `m${now.seq}`;
  return {
    context: { turn_state: "completed", transcript: windowed([...context.transcript, { role: "assistant", at: now.seq, turn }]) },
    tell: [
      { type: "message.completed", turn, step, message_id, role: "assistant", content: output.text },
      { type: "turn.completed", turn, message_id, stop: output.stop },
    ],
  };
}

/** `details` only of a refusal by the budget or a rate: its numbers tell a person what to do. Of other failures they stand in the entry. */
export function turnFailed(context: SessionContext, reason: string, message: string, details?: JsonObject): Change {
  const refusal = details?.["refusal"];
  return {
    context: { turn_state: "failed" },
    tell: [
      {
        type: "turn.failed",
        turn: context.turn,
        reason,
        message: message.slice(0, FAILURE_CHARACTERS_MAX),
        ...(refusal === undefined ? {} : { details: refusal }),
      },
    ],
  };
}

/** What ends a turn that a guardrail blocked: text that went out is void, and SE8. */
export function turnBlocked(context: SessionContext, { code, message, details }: EffectError): Change {
  const failed = turnFailed(context, code, message);
  const [rule, on] = [String(details?.["rule"] ?? ""), details?.["on"] === "output" ? "output" : "input"];
  return {
    context: { ...failed.context, ...(on === "input" ? { transcript: context.transcript.filter((item) => item.turn !== context.turn) } : {}) },
    tell: [...(on === "output" ? [{ type: "superseded", ...callOf(context) }] : []), ...(failed.tell ?? []).map((event) => ({ ...event, rule, on }))],
  };
}

/** Ends the open turn, if there is one, with whatever it has in flight. */
export function turnCancelled(context: SessionContext, reason: string): Change {
  if (context.turn_state !== "open") return {};
  const call: Change =
    context.now.attempts["model"] === undefined ? {} : modelFailed(context, { code: "cancelled", message: `the turn was cancelled: ${reason}` });
  const tools = after(context, call, (called) =>
    toolsGivenUp(called, { code: "cancelled", message: "the turn was cancelled while this ran; it may have acted" }),
  );
  return after(context, after(context, tools, stepClosed), () => ({
    context: { turn_state: "cancelled" },
    tell: [{ type: "turn.cancelled", turn: context.turn, reason }],
  }));
}

/** Recovering it is given up until somebody says otherwise: the call in flight ends, the step's tools are answered, the turn stays open. */
export function parked(context: SessionContext, { tries, cost_usd_micros }: { tries: number; cost_usd_micros: number }): Change {
  const reason = `its worker was lost ${tries} times in a row while it worked, at a cost of up to ${cost_usd_micros} micro-dollars`;
  const call: Change = context.now.attempts["model"] === undefined ? {} : modelFailed(context, { code: "lost", message: "the session was parked" });
  const tools = after(context, call, (called) => toolsGivenUp(called, { code: "lost", message: "the session was parked while this ran; it may have acted" }));
  return after(context, after(context, tools, stepClosed), () => ({
    context: { reason, init: null },
    tell: [{ type: "session.parked", reason, tries, cost_usd_micros }],
  }));
}

/** SE1: what still waits will not have its turn. Where sessions are counted, one more may come. */
export function ended({ queue, config }: SessionContext): Change {
  const place = config?.place;
  return {
    context: { queue: [] },
    tell: queue.map(({ turn }) => ({ type: "turn.cancelled", turn, reason: "terminated" })),
    send: place === undefined ? [] : [{ to: place.budget, command: "session.release", body: { session: place.session } }],
  };
}
