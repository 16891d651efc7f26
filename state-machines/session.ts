// session: one conversation or task of an agent: it thinks, acts and observes until it answers, and ends when somebody or a limit ends it.
//
//   session.create
//        │
//        ▼          a step fails, again after 100, 200 and 500 ms
//   initializing ─────────▶ unhealthy          (session.resume: initializing again)
//        │ agent, configuration, guardrails, tools, permissions are known
//        ▼    message.send                 the model calls tools
//      idle ───────────────▶ thinking ─────────────────────────────▶ acting        (or first awaiting_dependency, where it comes after other turns)
//       │ ▲                   │   ▲  ▲                                 │
//       │ └──── turn ended ◀──┘   │  └───────── all are back ──────────┘
//       │       nothing waits     └─ turn ended, the next message waits
//       │
//       ├─ at a turn's beginning, when its configuration is no longer what it must be ─▶ initializing, then the turn goes on
//       │
//       ├─ session.pause (also from thinking; from acting when the tools are back) ─▶ paused ──┐
//       └─ session.hibernate (also from paused) ──────────────────────────────▶ hibernated ────┤
//                                                                                              ▼
//                                     session.resume, or a message while hibernated: goes on where it was
//
//   every state ── session.terminate; idle or suspended for too long; mode single and its turn over ──▶ terminated
//
// It owns: which turn runs, what waits, which entries make the prompt. It keeps positions of entries, never their text.
// It leaves to others: performing calls and tools, retries within a call, money, and reading text by position.
//
// Here is the machine: its states, and what leads from one to another. What happens on the way stands beside it, as pure functions from what the
// session remembers (session-context.ts) to what changes (session-change.ts):
//   session-configuration.ts   initialisation, and what is frozen     session-turns.ts       messages, turns and their ends
//   session-model-calls.ts     what is told and counted of calls      session-tool-calls.ts  the tools of one step
//   session-transcript.ts      the prompt, and its bound              session-dependency.ts  turns that come after others
//   session-effects.ts         what the host performs                 session-waits.ts       what it waits for, in words
//
// Invariants:
//   SE1. Every message received gets a turn number, rising from 1, and every number gets exactly one end: turn.completed, turn.failed or
//        turn.cancelled. At most one turn is open.
//   SE2. A turn makes at most max_loops model calls. `step` is in the context, so no crash forgets one. A call that found the configuration
//        changed asked no model, and does not count.
//   SE3. Every model.started gets exactly one end: model.completed or model.failed. Every tool.started too: tool.completed, tool.failed
//        or tool.denied.
//   SE4. A transcript is a prompt at any time between steps: each call that an assistant's message made has one answer in it.
//   SE5. Everything kept has a bound: queue ≤ SESSION_QUEUE_MAX (+1 within an interrupted pause), transcript ≤ TRANSCRIPT_ITEMS_MAX,
//        tools ≤ TOOL_CALLS_MAX.
//   SE6. A model call is in flight exactly while thinking, tool calls only while acting, the configuration only while initializing, where
//        nothing else is waited for but the next try; and a look at other sessions' turns only while awaiting_dependency.
//   SE7. A model chooses only among the tools its agent has and may use. Any other name is answered as an error, without an effect; one that is
//        denied is told as tool.denied, in the commit before the model hears of it.
//   SE8. What a guardrail blocked on its way to the model never reaches it: not in this turn, which ends, and not in the prompt of a later one.
import { enqueueActions, setup } from "xstate";
import { assert } from "../protocol/assert.ts";
import {
  type ActorDefinition,
  type CommandEvent,
  type CreationInput,
  type EffectError,
  type Emitted,
  groupDone,
  groupFailed,
  type GroupResult,
  progressOf,
} from "./definition.ts";
import { allCompleted, failedParent, lookAgainMs, type LookOutput } from "./dependency.ts";
import { modelCallDues } from "./model-dues.ts";
import { after, type Change, perform } from "./session-change.ts";
import {
  CONFIGURATION_PATIENCE_MS,
  configurationInput,
  configured,
  IDLE_TTL_MS,
  INIT_RETRY_MS,
  initBegun,
  initFailed,
  initGivenUp,
  SUSPENDED_TTL_MS,
} from "./session-configuration.ts";
import { created, type SessionContext, sessionContextOf } from "./session-context.ts";
import { type AskBody, headGivenUp, lookFailed, parentAsked, parentsLooked, parentsMet, turnSkipped, waitingBegun } from "./session-dependency.ts";
import {
  type ConfigurationOutput,
  type ModelInput,
  type ModelOutput,
  type ModelProgress,
  sessionEffects,
  type ToolInput,
  type ToolOutput,
} from "./session-effects.ts";
import { longerCalls, MODEL_PATIENCE_MS, modelCompleted, modelFailed, modelStarted, modelSuperseded, modelTold } from "./session-model-calls.ts";
import { isPending, stepClosed, TOOL_CALLS_MAX, toolCompleted, toolFailed, TOOLS_PATIENCE_MS, toolsCalled, toolsGivenUp } from "./session-tool-calls.ts";
import {
  ended,
  maxLoops,
  type MessageBody,
  parked,
  received,
  refuseMessage,
  stepBegun,
  stepVoid,
  turnBegun,
  turnBlocked,
  turnCancelled,
  turnCompleted,
  turnFailed,
} from "./session-turns.ts";
import { waits, waitsFor } from "./session-waits.ts";
import { toolCallDues } from "./tool-dues.ts";
import { BUILT_IN_TOOLS, type ToolTable } from "./tools.ts";

interface ReasonBody {
  readonly reason?: string;
}

function tellCreated({ agent, external_id, user, requested, metadata }: SessionContext): Change {
  return { tell: [{ type: "session.created", agent, external_id, user, mode: requested?.mode ?? null, metadata }] };
}

// ── the machine ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

type SessionCommand =
  | CommandEvent<"dependency.ask", AskBody>
  | CommandEvent<"dependency.told", { readonly session: string; readonly message: string }>
  | CommandEvent<"message.send", MessageBody>
  | CommandEvent<"turn.cancel" | "session.pause" | "session.resume" | "session.hibernate" | "session.terminate" | "session.unpark", ReasonBody>;
/** Said by the host: this actor lost its worker too often, or too expensively, without getting anywhere. */
interface RecoveryExhausted {
  readonly type: "recovery.exhausted";
  readonly tries: number;
  readonly cost_usd_micros: number;
}
/** Said by the host: what the model call in flight told of itself. */
interface ModelToldProgress {
  readonly type: ReturnType<typeof progressOf<"model">>;
  readonly told: ModelProgress;
}
type SessionEvent = SessionCommand | ModelToldProgress | RecoveryExhausted | GroupResult<"tool", ToolOutput>;

function messageOf(event: SessionEvent): MessageBody {
  assert(event.type === "message.send", "only a message is received");
  return event.body;
}

/** The session machine over a table of tools. */
export function sessionMachineOver(table: ToolTable) {
  return setup({
    types: {} as { context: SessionContext; events: SessionEvent; emitted: Emitted; input: CreationInput; meta: { group: string } },
    actors: sessionEffects,
    delays: {
      configuration_patience: CONFIGURATION_PATIENCE_MS,
      init_retry: ({ context }) => INIT_RETRY_MS[context.init?.retries ?? 0] ?? 0,
      model_patience: ({ context }) => MODEL_PATIENCE_MS + longerCalls(context),
      tools_patience: ({ context }) => TOOLS_PATIENCE_MS + longerCalls(context),
      look_again: ({ context }) => lookAgainMs(context.dependency),
      idle_ttl: ({ context }) => context.config?.idle_ttl_ms ?? IDLE_TTL_MS,
      suspended_ttl: ({ context }) => context.config?.suspended_ttl_ms ?? SUSPENDED_TTL_MS,
    },
    guards: {
      interrupts: ({ event }) => event.type === "message.send" && event.body.on_busy === "interrupt",
      calls_tools: (_, { calls }: { calls: number }) => calls > 0,
      calls_too_many: (_, { calls }: { calls: number }) => calls > TOOL_CALLS_MAX,
      all_back: ({ context }) => !context.tools.some(isPending),
      pausing: ({ context }) => context.pausing,
      not_pausing: ({ context }) => !context.pausing,
      not_configured: ({ context }) => context.config === null,
      turn_open: ({ context }) => context.turn_state === "open",
      loops_used: ({ context }) => context.turn_state === "open" && context.step + 1 - context.steps_void >= maxLoops(context),
      init_tries_left: ({ context }) => (context.init?.retries ?? 0) < INIT_RETRY_MS.length,
      configuration_changed: (_, { code }: { code: string }) => code === "configuration_changed",
      blocked: (_, { code }: { code: string }) => code === "guardrail",
      single_over: ({ context }) => context.mode === "single" && context.turn > 0 && context.turn_state !== "open",
      message_waits: ({ context }) => context.queue.length > 0,
      message_comes_after: ({ context }) => context.queue[0]?.after !== undefined,
      parents_completed: (_, output: LookOutput) => allCompleted(output),
      parent_failed: (_, output: LookOutput) => failedParent(output) !== undefined,
    },
    actions: {
      // session-configuration.ts
      begin_init: enqueueActions((args) => perform(args, initBegun(args.context))),
      fail_init: enqueueActions((args, error: EffectError) => perform(args, initFailed(args.context, error))),
      give_init_up: enqueueActions((args) => perform(args, initGivenUp(args.context))),
      configure: enqueueActions((args, output: ConfigurationOutput) => perform(args, configured(args.context, output))),
      reach_boundary: enqueueActions((args) => perform(args, { context: { at_boundary: true } })),
      // session-turns.ts
      receive: enqueueActions((args) => perform(args, received(args.context, "back", messageOf(args.event)))),
      receive_first: enqueueActions((args) => perform(args, received(args.context, "front", messageOf(args.event)))),
      begin_turn: enqueueActions((args) => perform(args, turnBegun(args.context))),
      begin_step: enqueueActions((args) => perform(args, stepBegun(args.context))),
      void_step: enqueueActions((args) => perform(args, stepVoid(args.context))),
      complete_turn: enqueueActions((args, output: ModelOutput) => perform(args, turnCompleted(args.context, output))),
      fail_turn: enqueueActions((args, { code, message, details }: EffectError) => perform(args, turnFailed(args.context, code, message, details))),
      end_loop: enqueueActions((args) =>
        perform(args, turnFailed(args.context, "loop_limit", `the turn made ${args.context.step + 1} model calls, and ${maxLoops(args.context)} is its limit`)),
      ),
      block_turn: enqueueActions((args, error: EffectError) => perform(args, turnBlocked(args.context, error))),
      cancel_turn: enqueueActions((args, { reason }: { reason: string }) => perform(args, turnCancelled(args.context, reason))),
      park: enqueueActions((args, spent: { tries: number; cost_usd_micros: number }) => perform(args, parked(args.context, spent))),
      end: enqueueActions((args) => perform(args, ended(args.context))),
      // session-model-calls.ts
      tell_model_started: enqueueActions((args) => perform(args, modelStarted(args.context))),
      hear_model: enqueueActions((args, told: ModelProgress) => perform(args, modelTold(args.context, told))),
      complete_model: enqueueActions((args, output: ModelOutput) => perform(args, modelCompleted(args.context, output))),
      fail_model: enqueueActions((args, error: EffectError) => perform(args, modelFailed(args.context, error))),
      supersede_model: enqueueActions((args) => perform(args, modelSuperseded(args.context, "the session was paused"))),
      // session-tool-calls.ts
      call_tools: enqueueActions((args, output: ModelOutput) => perform(args, toolsCalled(args.context, output, table))),
      complete_tool: enqueueActions((args, { id, output }: { id: string; output: ToolOutput }) => perform(args, toolCompleted(args.context, id, output))),
      fail_tool: enqueueActions((args, { id, error }: { id: string; error: EffectError }) => perform(args, toolFailed(args.context, id, error))),
      time_tools_out: enqueueActions((args) =>
        perform(args, toolsGivenUp(args.context, { code: "timeout", message: "the tool did not answer in time; it may have acted" })),
      ),
      close_step: enqueueActions((args) => perform(args, stepClosed(args.context))),
      // session-dependency.ts
      begin_waiting: enqueueActions((args) => perform(args, waitingBegun(args.context))),
      ask_parents: enqueueActions((args, output: LookOutput) => perform(args, parentsLooked(args.context, output))),
      count_look: enqueueActions((args) => perform(args, lookFailed(args.context))),
      meet_parents: enqueueActions((args) => perform(args, parentsMet(args.context))),
      skip_turn: enqueueActions((args, output: LookOutput) => perform(args, turnSkipped(args.context, output))),
      give_head_up: enqueueActions((args, { reason }: { reason: string }) =>
        perform(args, headGivenUp(args.context, "cancelled", { type: "turn.cancelled", turn: 0, reason })),
      ),
      hear_asker: enqueueActions((args, asker: AskBody) => perform(args, parentAsked(args.context, asker))),
      /** Told when it waits for nobody: it has looked by itself. */
      pass_over: enqueueActions(() => undefined),
      // the session itself
      tell_created: enqueueActions((args) => perform(args, tellCreated(args.context))),
      ask_for_pause: enqueueActions((args, { reason }: ReasonBody) => perform(args, { context: { pausing: true, reason: reason ?? null } })),
      withdraw_pause: enqueueActions((args) => perform(args, { context: { pausing: false, reason: null } })),
      paused: enqueueActions((args) => perform(args, { context: { pausing: false } })),
      give_reason: enqueueActions((args, { reason }: { reason: string | null }) => perform(args, { context: { reason } })),
      expire: enqueueActions((args, { state }: { state: string }) =>
        perform(
          args,
          after(args.context, turnCancelled(args.context, "expired"), () => ({ context: { reason: "expired" }, tell: [{ type: "session.expired", state }] })),
        ),
      ),
    },
  }).createMachine({
    id: "session",
    version: "1",
    context: ({ input }) => created(input),
    entry: "tell_created",
    initial: "initializing",
    on: {
      "recovery.exhausted": {
        target: ".parked",
        actions: { type: "park", params: ({ event }) => ({ tries: event.tries, cost_usd_micros: event.cost_usd_micros }) },
      },
      "dependency.ask": { actions: { type: "hear_asker", params: ({ event }) => event.body } },
      "dependency.told": { actions: "pass_over" },
      "session.terminate": {
        target: ".terminated",
        actions: [
          { type: "cancel_turn", params: { reason: "terminated" } },
          { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? "terminated by command" }) },
        ],
      },
    },
    states: {
      initializing: {
        id: "initializing",
        description: "its configuration is being read",
        initial: "loading",
        states: {
          loading: {
            id: "initializing_loading",
            description: "its five steps are being taken",
            entry: "begin_init",
            invoke: {
              id: "configuration",
              src: "load_configuration",
              input: ({ context }) => configurationInput(context),
              onDone: { target: "#choosing", actions: { type: "configure", params: ({ event }) => event.output } },
              onError: { target: "deciding", actions: { type: "fail_init", params: ({ event }) => event.error as EffectError } },
            },
            after: {
              configuration_patience: { target: "deciding", actions: { type: "fail_init", params: { code: "timeout", message: "it did not come in time" } } },
            },
          },
          deciding: {
            always: [
              { guard: "init_tries_left", target: "waiting" },
              { target: "#unhealthy", actions: "give_init_up" },
            ],
          },
          waiting: {
            id: "initializing_waiting",
            description: "a step failed; it is tried again",
            after: { init_retry: "loading" },
          },
        },
        on: {
          "message.send": { actions: "receive" },
          // A turn that waits for its configuration can be given up.
          "turn.cancel": { guard: "turn_open", actions: { type: "cancel_turn", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
        },
      },

      // Never rests here: what is next, in this order.
      choosing: {
        id: "choosing",
        always: [
          {
            guard: "single_over",
            target: "terminated",
            actions: { type: "give_reason", params: ({ context }) => ({ reason: `single turn ${context.turn_state}` }) },
          },
          { guard: "pausing", target: "paused" },
          { guard: "loops_used", target: "choosing", reenter: true, actions: "end_loop" }, // SE2
          { guard: "turn_open", target: "thinking", actions: "begin_step" },
          { guard: "message_comes_after", target: "awaiting_dependency", actions: "begin_waiting" },
          { guard: "message_waits", target: "thinking", actions: "begin_turn" },
          { target: "idle", actions: { type: "give_reason", params: { reason: null } } },
        ],
      },

      idle: {
        id: "idle",
        description: "waits for a message",
        on: {
          "message.send": { target: "choosing", actions: "receive" },
          "session.pause": { target: "paused", actions: { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) } },
          "session.hibernate": { target: "hibernated", actions: { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) } },
        },
        after: { idle_ttl: { target: "terminated", actions: { type: "expire", params: { state: "idle" } } } },
      },

      awaiting_dependency: {
        id: "awaiting_dependency",
        description: "the next message comes after turns that have not ended",
        initial: "looking",
        states: {
          looking: {
            id: "awaiting_dependency_looking",
            description: "what became of them is being read",
            invoke: {
              id: "parents",
              src: "look_up_turns",
              input: ({ context }) => ({ parents: context.queue[0]?.after ?? [] }),
              onDone: [
                {
                  guard: { type: "parent_failed", params: ({ event }) => event.output },
                  target: "#choosing",
                  actions: { type: "skip_turn", params: ({ event }) => event.output },
                },
                { guard: { type: "parents_completed", params: ({ event }) => event.output }, target: "#choosing", actions: "meet_parents" },
                { target: "waiting", actions: { type: "ask_parents", params: ({ event }) => event.output } },
              ],
              onError: { target: "waiting", actions: "count_look" },
            },
            on: { "dependency.told": { target: "looking", reenter: true } },
          },
          waiting: {
            id: "awaiting_dependency_waiting",
            description: "it will be told, or looks again after a while",
            on: { "dependency.told": { target: "looking" } },
            after: { look_again: { target: "looking" } },
          },
        },
        on: {
          "message.send": [{ guard: "interrupts", target: "choosing", actions: "receive_first" }, { actions: "receive" }],
          "turn.cancel": { target: "choosing", actions: { type: "give_head_up", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
          "session.pause": { target: "paused", actions: { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) } },
          "session.hibernate": { target: "hibernated", actions: { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) } },
        },
        after: { suspended_ttl: { target: "terminated", actions: { type: "expire", params: { state: "awaiting_dependency" } } } },
      },

      thinking: {
        id: "thinking",
        meta: { group: "a turn" },
        description: "a model call is in flight",
        entry: "tell_model_started",
        invoke: {
          id: "model",
          src: "call_model",
          input: ({ context }) => ({
            turn: context.turn,
            step: context.step,
            config_seq: context.config?.seq ?? 0,
            messages: context.transcript,
            ...(context.at_boundary ? { boundary: true as const } : {}),
          }),
          onDone: [
            {
              guard: { type: "calls_too_many", params: ({ event }) => ({ calls: event.output.tool_calls.length }) },
              target: "choosing",
              actions: [
                { type: "complete_model", params: ({ event }) => event.output },
                { type: "fail_turn", params: { code: "too_many_tool_calls", message: `one answer may call at most ${TOOL_CALLS_MAX} tools` } },
              ],
            },
            {
              guard: { type: "calls_tools", params: ({ event }) => ({ calls: event.output.tool_calls.length }) },
              target: "acting",
              actions: [
                { type: "complete_model", params: ({ event }) => event.output },
                { type: "call_tools", params: ({ event }) => event.output },
              ],
            },
            {
              target: "choosing",
              actions: [
                { type: "complete_model", params: ({ event }) => event.output },
                { type: "complete_turn", params: ({ event }) => event.output },
              ],
            },
          ],
          onError: [
            {
              guard: { type: "configuration_changed", params: ({ event }) => event.error as EffectError },
              target: "initializing",
              actions: [{ type: "fail_model", params: ({ event }) => event.error as EffectError }, "void_step"],
            },
            {
              guard: { type: "blocked", params: ({ event }) => event.error as EffectError },
              target: "choosing",
              actions: [
                { type: "fail_model", params: ({ event }) => event.error as EffectError },
                { type: "block_turn", params: ({ event }) => event.error as EffectError },
              ],
            },
            {
              target: "choosing",
              actions: [
                { type: "fail_model", params: ({ event }) => event.error as EffectError },
                { type: "fail_turn", params: ({ event }) => event.error as EffectError },
              ],
            },
          ],
        },
        after: {
          model_patience: {
            target: "choosing",
            actions: [
              { type: "fail_model", params: { code: "timeout", message: "the model did not answer in time" } },
              { type: "fail_turn", params: { code: "timeout", message: "the model did not answer in time" } },
            ],
          },
        },
        on: {
          [progressOf("model")]: { actions: { type: "hear_model", params: ({ event }) => event.told } },
          "message.send": [
            { guard: "interrupts", target: "choosing", actions: ["receive_first", { type: "cancel_turn", params: { reason: "interrupted" } }] },
            { actions: "receive" },
          ],
          "turn.cancel": { target: "choosing", actions: { type: "cancel_turn", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
          "session.pause": {
            target: "paused",
            actions: ["supersede_model", { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) }],
          },
        },
      },

      acting: {
        id: "acting",
        meta: { group: "a turn" },
        description: "tool calls are in flight, side by side",
        always: { guard: "all_back", target: "choosing", actions: "close_step" },
        after: { tools_patience: { actions: "time_tools_out" } },
        on: {
          [groupDone("tool")]: { actions: { type: "complete_tool", params: ({ event }) => ({ id: event.actorId, output: event.output }) } },
          [groupFailed("tool")]: { actions: { type: "fail_tool", params: ({ event }) => ({ id: event.actorId, error: event.error }) } },
          "message.send": [
            { guard: "interrupts", target: "choosing", actions: ["receive_first", { type: "cancel_turn", params: { reason: "interrupted" } }] },
            { actions: "receive" },
          ],
          "turn.cancel": { target: "choosing", actions: { type: "cancel_turn", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
          "session.pause": { guard: "not_pausing", actions: { type: "ask_for_pause", params: ({ event }) => event.body } },
          "session.resume": { guard: "pausing", actions: "withdraw_pause" },
        },
      },

      paused: {
        id: "paused",
        meta: { group: "suspended" },
        description: "stands still until it is resumed",
        entry: "paused",
        exit: "reach_boundary",
        on: {
          "message.send": { actions: "receive" },
          // A turn that was paused can be given up without paying for another call first.
          "turn.cancel": { guard: "turn_open", actions: { type: "cancel_turn", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
          "session.resume": { target: "choosing" },
          "session.hibernate": { target: "hibernated", actions: { type: "give_reason", params: ({ event }) => ({ reason: event.body.reason ?? null }) } },
        },
        after: { suspended_ttl: { target: "terminated", actions: { type: "expire", params: { state: "paused" } } } },
      },

      hibernated: {
        id: "hibernated",
        meta: { group: "suspended" },
        description: "sleeps until a message or session.resume",
        exit: "reach_boundary",
        on: {
          "message.send": { target: "choosing", actions: "receive" },
          "session.resume": { target: "choosing" },
        },
        after: { suspended_ttl: { target: "terminated", actions: { type: "expire", params: { state: "hibernated" } } } },
      },

      unhealthy: {
        id: "unhealthy",
        description: "its configuration could not be read",
        on: {
          "session.resume": { target: "initializing", actions: { type: "give_reason", params: { reason: null } } },
          "turn.cancel": { guard: "turn_open", actions: { type: "cancel_turn", params: ({ event }) => ({ reason: event.body.reason ?? "cancelled" }) } },
        },
      },

      parked: {
        id: "parked",
        meta: { group: "suspended" },
        description: "lost too many workers; waits for an operator",
        on: {
          "message.send": { actions: "receive" },
          "session.unpark": [
            { guard: "not_configured", target: "initializing", actions: { type: "give_reason", params: { reason: null } } },
            { target: "choosing", actions: { type: "give_reason", params: { reason: null } } },
          ],
        },
        after: { suspended_ttl: { target: "terminated", actions: { type: "expire", params: { state: "parked" } } } },
      },

      terminated: { id: "terminated", type: "final", entry: "end" },
    },
  });
}

/** The definition of sessions over a table of tools. Tests bring their own; everybody else takes sessionDefinition. */
export function sessionDefinitionOver(table: ToolTable): ActorDefinition {
  return {
    kind: "session",
    machine: sessionMachineOver(table),
    creates: "session.create",
    internal: ["recovery.exhausted", progressOf("model")],
    effects: {
      load_configuration: { lost: () => "retry" },
      call_model: {
        lost: () => "retry",
        superseded: (input, attempt) => {
          const { turn, step } = input as unknown as ModelInput;
          return { type: "superseded", turn, step, attempt };
        },
        owes: modelCallDues,
      },
      look_up_turns: { lost: () => "retry" },
      call_tool: { lost: (input) => ((input as unknown as ToolInput).idempotent ? "retry" : "ambiguous"), owes: toolCallDues },
    },
    refuse(view, command) {
      return command.type === "message.send" ? refuseMessage(view, command.body as unknown as MessageBody) : undefined;
    },
    waits,
    waitsFor,
    moved({ before, after: now }) {
      const { reason } = sessionContextOf(now);
      return { type: "session.state", from: before.state, to: now.state, ...(reason === null ? {} : { reason }) };
    },
    claimed: ({ epoch, from, to, reason }) => ({ type: "session.claimed", epoch, from, to, reason }),
  };
}

export const sessionDefinition: ActorDefinition = sessionDefinitionOver(BUILT_IN_TOOLS);
