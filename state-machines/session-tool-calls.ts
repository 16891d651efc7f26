// session-tool-calls: the tool calls of one step of a turn, side by side.
//
//   called by the model ──▶ pending ──came back──▶ done ─────────────────────────┐
//     │                        └──failed, given up, timed out──▶ failed ─────────┼──all have ended──▶ the step closes: their answers join the transcript
//     └──not its agent's, or not permitted──────────────────▶ failed ────────────┘
//
// Invariants (of session.ts):
//   SE3. Every tool.started gets exactly one end: tool.completed, tool.failed or tool.denied.
//   SE4. The answers to a step's calls join the transcript together, in the order of the calls.
//   SE5. A step has at most TOOL_CALLS_MAX of them.
//   SE7. A model chooses only among the tools its agent has and may use.
import { assert } from "../protocol/assert.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { EffectError } from "./definition.ts";
import type { Change } from "./session-change.ts";
import type { PendingTool, SessionContext } from "./session-context.ts";
import type { ModelOutput, ToolOutput } from "./session-effects.ts";
import { type Failed, FAILURE_CHARACTERS_MAX } from "./session-failure.ts";
import { TRANSCRIPT_ITEMS_KEPT, type TranscriptItem, windowed } from "./session-transcript.ts";
import { type ToolTable, WAIT_MS_MAX } from "./tools.ts";
import type { ToolPrice } from "./tool-dues.ts";

/** A minute more than the longest wait that a tool may be asked for. */
export const TOOLS_PATIENCE_MS = WAIT_MS_MAX + 60_000;

/** Tool calls of one model answer. Above it the answer is a fault of the model and ends the turn. */
export const TOOL_CALLS_MAX = 128;
assert(TRANSCRIPT_ITEMS_KEPT >= TOOL_CALLS_MAX + 2, "a message and one whole step always fit the transcript");
const NAME_CHARACTERS_MAX = 128;

const toolEvent = (context: SessionContext, type: string, { index, call_id, name }: PendingTool, more: JsonObject = {}): ActorEvent => ({
  type,
  turn: context.turn,
  step: context.step,
  index,
  call_id,
  name,
  ...more,
});

export const isPending = (tool: PendingTool): boolean => tool.outcome.kind === "pending";
const effectOf = (tool: PendingTool): string => `tool.${tool.index}`;

const TOOL_DENIED = "denied";
/** What its agent may do by itself is used up (limits.actions of its configuration): nothing ran. */
const AUTONOMY_EXCEEDED = "autonomy_exceeded";
const failureEvent = ({ code }: Failed): "tool.denied" | "tool.failed" => (code === TOOL_DENIED || code === AUTONOMY_EXCEEDED ? "tool.denied" : "tool.failed");

function priceOf({ config }: SessionContext, name: string): { readonly price?: ToolPrice } {
  const price = config?.tool_prices !== undefined && Object.hasOwn(config.tool_prices, name) ? config.tool_prices[name] : undefined;
  return price === undefined ? {} : { price };
}

/** The model's calls, side by side. SE7: those that the agent does not have are answered at once. */
export function toolsCalled(context: SessionContext, output: ModelOutput, table: ToolTable): Change {
  const { turn, step, now } = context;
  const tools = output.tool_calls.map((call, index): PendingTool => {
    const name = call.name.slice(0, NAME_CHARACTERS_MAX);
    const known = Object.hasOwn(table, call.name) && context.config?.tools.includes(call.name) === true;
    if (context.config?.denied_tools.includes(call.name) === true)
      return {
        index,
        call_id: call.id,
        name,
        outcome: { kind: "failed", at: now.seq, failed: { code: TOOL_DENIED, message: `the tool '${name}' is not permitted here` } },
      };
    if (known) return { index, call_id: call.id, name, outcome: { kind: "pending" } };
    return {
      index,
      call_id: call.id,
      name,
      outcome: { kind: "failed", at: now.seq, failed: { code: "tool_unknown", message: `there is no tool '${name}' here` } },
    };
  });
  return {
    context: { tools, transcript: windowed([...context.transcript, { role: "assistant", at: now.seq, turn }]) },
    tell: tools.map((tool) =>
      tool.outcome.kind === "failed"
        ? toolEvent(context, failureEvent(tool.outcome.failed), tool, { ...tool.outcome.failed })
        : toolEvent(context, "tool.started", tool),
    ),
    start: tools.filter(isPending).map(({ index, call_id, name }) => ({
      turn,
      step,
      call_seq: now.seq,
      index,
      call_id,
      name,
      idempotent: table[name]?.idempotent === true,
      config_seq: context.config?.seq ?? 0,
      ...priceOf(context, name),
    })),
  };
}

const withOutcome = (context: SessionContext, tool: PendingTool, outcome: PendingTool["outcome"]): readonly PendingTool[] =>
  context.tools.map((one) => (one.index === tool.index ? { ...one, outcome } : one));

function toolOfEffect(context: SessionContext, effectId: string): PendingTool {
  const tool = context.tools.find((one) => effectOf(one) === effectId);
  assert(tool !== undefined && isPending(tool), "a tool's result comes once, in the step that called it");
  return tool;
}

export function toolCompleted(context: SessionContext, effectId: string, output: ToolOutput): Change {
  const tool = toolOfEffect(context, effectId);
  const told = output.is_error
    ? toolEvent(context, "tool.failed", tool, { code: "tool_error", message: "the tool answered with an error" })
    : toolEvent(context, "tool.completed", tool, output.cost_usd_micros === undefined ? {} : { cost_usd_micros: output.cost_usd_micros });
  return { context: { tools: withOutcome(context, tool, { kind: "done", at: context.now.seq }) }, tell: [told], stop: [effectId] };
}

export function toolFailed(context: SessionContext, effectId: string, error: EffectError): Change {
  const tool = toolOfEffect(context, effectId);
  const message = error.code === "ambiguous" ? "the tool was interrupted and may have acted; find out before calling it again" : error.message;
  const failed: Failed = { code: error.code, message: message.slice(0, FAILURE_CHARACTERS_MAX) };
  return {
    context: { tools: withOutcome(context, tool, { kind: "failed", at: context.now.seq, failed }) },
    tell: [toolEvent(context, failureEvent(failed), tool, { ...failed })],
    stop: [effectId],
  };
}

/** Whatever of the step's tools is not back ends as `failed`. */
export function toolsGivenUp(context: SessionContext, failed: Failed): Change {
  const pending = context.tools.filter(isPending);
  return {
    context: { tools: context.tools.map((tool) => (isPending(tool) ? { ...tool, outcome: { kind: "failed", at: context.now.seq, failed } } : tool)) },
    tell: pending.map((tool) => toolEvent(context, "tool.failed", tool, { ...failed })),
    stop: pending.map(effectOf),
  };
}

/** SE4: the answers to the step's calls join the transcript together, in the order of the calls. */
export function stepClosed(context: SessionContext): Change {
  const answers = context.tools.map(({ call_id, name, outcome }): TranscriptItem => {
    assert(outcome.kind !== "pending", "a step closes when all its tools have ended");
    const item = { role: "tool", at: outcome.at, turn: context.turn, call_id, name } as const;
    return outcome.kind === "failed" ? { ...item, failed: outcome.failed } : item;
  });
  return { context: { tools: [], transcript: windowed([...context.transcript, ...answers]) } };
}
