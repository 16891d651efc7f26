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
import type { AgentConfig, MessageContent } from "../protocol/commands.ts";
import { errorBody } from "../protocol/errors.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { CALL_TIMEOUT_MS, LOOPS_DEFAULT, SESSION_QUEUE_MAX } from "../protocol/limits.ts";
import { type SessionParent, parentName } from "../protocol/session-parent.ts";
import { timestamp } from "../protocol/world.ts";
import type { Permissions } from "./permission.ts";
import {
  type ActorDefinition,
  type ActorView,
  type BaseContext,
  type CommandEvent,
  type CreationInput,
  effect,
  type EffectError,
  type Emitted,
  groupDone,
  groupFailed,
  type GroupResult,
  progressOf,
} from "./definition.ts";
import {
  allCompleted,
  asked,
  type Askers,
  failedParent,
  looked,
  lookAgainMs,
  type LookInput,
  type LookOutput,
  noWait,
  type Send,
  toldOfEnds,
  type Waiting,
  waitsForParents,
} from "./dependency.ts";
import { modelCallDues } from "./model-dues.ts";
import { type ModelWait, modelWaits, type ToldWait, waitOver, waitShown, waitWords } from "./model-wait.ts";
import { BUILT_IN_TOOLS, type ToolTable, WAIT_MS_MAX } from "./tools.ts";

/** How long an idle session lives when its agent says nothing (AR-F50). */
export const IDLE_TTL_MS = 24 * 60 * 60 * 1000;
/** How long a paused or hibernated one does. */
export const SUSPENDED_TTL_MS = 7 * 24 * 60 * 60 * 1000;

/** The steps of initialisation, in their order (AR-F08). */
export const INIT_STEPS = ["agent", "configuration", "guardrails", "tools", "permissions"] as const;
export type InitStep = (typeof INIT_STEPS)[number];
/** A step that fails is tried again after these, then the session is unhealthy (AR-F10). */
export const INIT_RETRY_MS = [100, 200, 500] as const;
/** One try. Reading one journal takes milliseconds; this outlasts a broker's election twice, and all tries together a minute. */
export const CONFIGURATION_PATIENCE_MS = 15_000;
/** The longest answers of reasoning models take minutes; past ten the call, with its wait for a place, is stuck. An agent whose calls get longer adds that. */
export const MODEL_PATIENCE_MS = 600_000;
/** A minute more than the longest wait that a tool may be asked for. */
export const TOOLS_PATIENCE_MS = WAIT_MS_MAX + 60_000;

/** Tool calls of one model answer. Above it the answer is a fault of the model and ends the turn. */
export const TOOL_CALLS_MAX = 128;
/**
 * Messages in one prompt. Above it whole turns leave, oldest first; if the open turn alone is larger, its oldest steps leave, never the
 * message that began it. What left is still in the journal.
 */
export const TRANSCRIPT_ITEMS_MAX = 512;
/** And they leave down to here, so that the beginning of the prompt, which providers cache, changes seldom. */
export const TRANSCRIPT_ITEMS_KEPT = 384;
assert(TRANSCRIPT_ITEMS_KEPT >= TOOL_CALLS_MAX + 2, "a message and one whole step always fit the transcript");

/** A failure's text in a context: enough for a person and a model. */
const FAILURE_CHARACTERS_MAX = 1000;
const NAME_CHARACTERS_MAX = 128;

export type SessionMode = "multi" | "single";

/** A message that waits for its turn. */
export interface Queued {
  /** seq of the entry that bears its text. */
  readonly at: number;
  readonly turn: number;
  readonly message_id: string;
  /** The turns it comes after, until they are known to have completed. */
  readonly after?: readonly SessionParent[];
}

/** How a call ended that has no output. */
export interface Failed {
  readonly code: string;
  readonly message: string;
}

/** One message of the prompt, by the position of its text. A tool's that has `failed` has no text in its entry. */
export type TranscriptItem =
  | { readonly role: "user"; readonly at: number; readonly turn: number }
  | { readonly role: "assistant"; readonly at: number; readonly turn: number }
  | { readonly role: "tool"; readonly at: number; readonly turn: number; readonly call_id: string; readonly name: string; readonly failed?: Failed };

/** A tool call of the present step. */
export interface PendingTool {
  /** Its place in the answer that made it; the effect's id is `tool.{index}`. */
  readonly index: number;
  readonly call_id: string;
  readonly name: string;
  readonly outcome:
    | { readonly kind: "pending" }
    | { readonly kind: "done"; readonly at: number }
    | { readonly kind: "failed"; readonly at: number; readonly failed: Failed };
}

/** What of the frozen configuration a machine decides by; the whole of it is the output of the `done` entry at `seq`. */
export interface SessionConfig {
  readonly seq: number;
  readonly hash: string;
  readonly agent_version: number;
  readonly model: string;
  readonly tools: readonly string[];
  /** Those of the agent's tools that it may not use: not offered, and refused by name. */
  readonly denied_tools: readonly string[];
  readonly max_loops: number;
  readonly max_output_tokens: number | null;
  readonly temperature: number | null;
  readonly idle_ttl_ms: number;
  readonly suspended_ttl_ms: number;
  /** Absent where the agent says nothing of it. */
  readonly call_timeout_ms?: number;
}

export interface SessionUsage {
  readonly input_tokens: number;
  readonly output_tokens: number;
  readonly cache_read_tokens: number;
  readonly cache_write_tokens: number;
  readonly reasoning_tokens: number;
  readonly cost_usd_micros: number;
  readonly model_calls: number;
}

export interface SessionContext extends BaseContext {
  readonly agent: string;
  readonly external_id: string | null;
  readonly user: string | null;
  /** Until the configuration is known: as asked for, or `multi`. */
  readonly mode: SessionMode;
  readonly metadata: Readonly<Record<string, string>>;
  /** What the creator asked for beyond the agent; null once it is part of the frozen configuration. */
  readonly requested: { readonly overrides: JsonObject | null; readonly mode: SessionMode | null } | null;
  readonly config: SessionConfig | null;
  /** While initializing: the step it stands at as far as is known, the tries that were made again, and how the last one failed. */
  readonly init: { readonly step: InitStep; readonly retries: number; readonly failed: Failed | null } | null;
  /** The next model call begins a turn, or goes on after a sleep: there the configuration may be taken up anew. */
  readonly at_boundary: boolean;
  /** The turn that runs or ran last; 0 before the first. */
  readonly turn: number;
  readonly turn_state: "none" | "open" | "completed" | "failed" | "cancelled";
  /** Counts the model calls of the turn, from 0. */
  readonly step: number;
  /** Steps of the turn in which no model was asked. */
  readonly steps_void: number;
  readonly turns_assigned: number;
  readonly queue: readonly Queued[];
  readonly transcript: readonly TranscriptItem[];
  readonly tools: readonly PendingTool[];
  /** A pause was asked for while tools ran. */
  readonly pausing: boolean;
  readonly usage: SessionUsage;
  /** Why it is in a state that somebody or something put it in: unhealthy, paused, hibernated, terminated. */
  readonly reason: string | null;
  readonly created_at_ms: number;
  /** The model call in flight waits before it tries again; absent until one has done so, null when it is over. */
  readonly retry?: ModelRetry | null;
  /** What the model call in flight waits for before it is made; absent until one has waited, null when it is over. */
  readonly wait?: ModelWait | null;
  /** While the message whose turn is next waits for other turns; absent until one has done so, null when none does. */
  readonly dependency?: Waiting | null;
  /** Who wants to hear when a turn of this session ends; absent until somebody asked. */
  readonly askers?: Askers;
}

/** Why a model call waits, and until when. */
export interface ModelRetry {
  readonly provider: string;
  readonly model: string;
  /** The try that comes, of this model. */
  readonly try: number;
  readonly wait_ms: number;
  readonly until_ms: number;
  readonly code: string;
}

// ── effects ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface ConfigurationInput {
  readonly agent: string;
  readonly overrides: JsonObject | null;
  readonly mode: SessionMode | null;
  /** The overrides and the mode are those of the entry that created the session. */
  readonly again?: true;
}
/** What a session freezes: immutable until a critical change, and equal in hash exactly when equal in meaning. */
export interface ConfigurationOutput {
  /** The agent's configuration with the overrides and the mode in it; its tools are those that it may use. */
  readonly config: AgentConfig;
  /** Of everything here but the hash itself, the version's number and the epoch. */
  readonly hash: string;
  readonly agent?: string;
  readonly agent_version: number;
  /** Tools of the agent's that it may not use. */
  readonly denied_tools?: readonly string[];
  /** Fallbacks and cheaper models of the agent's that it may not use; absent when it may use all. */
  readonly denied_models?: readonly string[];
  /** SHA-256 of each tool's declaration as it was then; null for a tool that there is not. */
  readonly tool_hashes?: Readonly<Record<string, string | null>>;
  readonly guardrail_hashes?: Readonly<Record<string, string>>;
  readonly roles?: readonly string[];
  readonly permissions?: Permissions;
  readonly price_version?: string;
  /** Of the tenant and the agent, as it was then. */
  readonly config_epoch?: number;
}

export interface ModelInput {
  readonly turn: number;
  readonly step: number;
  /** seq of the `done` entry whose output is the ConfigurationOutput. */
  readonly config_seq: number;
  readonly messages: readonly TranscriptItem[];
  /** May find that the configuration must be taken up anew, and fail as `configuration_changed`. */
  readonly boundary?: true;
}
export interface ModelUsage {
  readonly input_tokens: number;
  readonly output_tokens: number;
  readonly cache_read_tokens: number;
  readonly cache_write_tokens: number;
  readonly reasoning_tokens: number;
}
export interface ModelOutput {
  readonly text: string;
  readonly tool_calls: readonly { readonly id: string; readonly name: string; readonly args: JsonObject; readonly invalid_args?: string }[];
  readonly stop: string;
  readonly usage: ModelUsage & { readonly estimated?: true };
  readonly cost_usd_micros: number | null;
  readonly price_version: string | null;
  /** `{provider}/{model}` that answered. */
  readonly model: string;
  readonly continuation?: Json;
  readonly key_source?: KeySource;
  readonly attempts?: readonly ToldCall[];
  readonly skipped?: readonly ToldSkip[];
}

/** Whose key a call was made with. */
type KeySource = "platform" | "tenant";

/** One call of a model among those that an effect made. */
interface ToldCall {
  /** Of a call for a guardrail, or of the agent's own. Absent in journals of before calls were told one by one. */
  readonly purpose?: "answer" | "guardrail";
  readonly rule?: string | null;
  readonly try: number;
  readonly model: string;
  readonly outcome: string;
  readonly code: string | null;
  readonly message: string | null;
  readonly usage: ModelUsage | null;
  readonly cost_usd_micros: number | null;
  readonly price_version: string | null;
  /** Whose key it was made with. Absent in journals of before tenants had keys of their own. */
  readonly key_source?: KeySource;
}
interface ToldSkip {
  readonly purpose?: "answer" | "guardrail";
  readonly model: string;
  readonly code: string;
  readonly message: string;
}
interface ToldCalls {
  readonly attempts?: readonly ToldCall[];
  readonly skipped?: readonly ToldSkip[];
}
/** What a model call says while it goes on: what it does next after a failure, or what it waits for. */
type ModelProgress = ModelNext | { readonly wait: ToldWait | null };
interface ModelNext {
  readonly next: { readonly model: string; readonly try: number; readonly wait_ms: number; readonly code: string; readonly message: string };
}

export interface ToolInput {
  readonly turn: number;
  readonly step: number;
  /** seq of the `done` entry whose output made the call: `tool_calls[index]` has its arguments. */
  readonly call_seq: number;
  readonly index: number;
  readonly call_id: string;
  readonly name: string;
  readonly idempotent: boolean;
  readonly config_seq: number;
}
export interface ToolOutput {
  readonly text: string;
  readonly is_error: boolean;
}

/** The effects of a session; a host's table of performers is checked against it. */
export const sessionEffects = {
  load_configuration: effect<ConfigurationInput, ConfigurationOutput>(),
  call_model: effect<ModelInput, ModelOutput>(),
  call_tool: effect<ToolInput, ToolOutput>(),
  look_up_turns: effect<LookInput, LookOutput>(),
};

// ── decisions: pure functions from the context to what changes, what is told, what begins and what ends ────────────────────────────────

interface Change {
  readonly context?: Partial<SessionContext>;
  readonly tell?: readonly ActorEvent[];
  readonly answer?: JsonObject;
  readonly start?: readonly ToolInput[];
  /** Ids of effects. */
  readonly stop?: readonly string[];
  readonly send?: readonly Send[];
}

interface CreationBody {
  readonly agent: string;
  readonly external_id?: string;
  readonly user?: string;
  readonly mode?: SessionMode;
  readonly overrides?: JsonObject;
  readonly metadata?: Readonly<Record<string, string>>;
}

interface MessageBody {
  readonly content: MessageContent;
  readonly on_busy?: "enqueue" | "reject" | "interrupt";
  readonly after?: readonly SessionParent[];
}

type AskBody = { readonly session: string; readonly message: string; readonly from: string };

interface ReasonBody {
  readonly reason?: string;
}

function created({ now, body }: CreationInput): SessionContext {
  const asked = body as unknown as CreationBody;
  return {
    now,
    agent: asked.agent,
    external_id: asked.external_id ?? null,
    user: asked.user ?? null,
    mode: asked.mode ?? "multi",
    metadata: asked.metadata ?? {},
    requested: { overrides: asked.overrides ?? null, mode: asked.mode ?? null },
    config: null,
    init: null,
    at_boundary: true,
    turn: 0,
    turn_state: "none",
    step: 0,
    steps_void: 0,
    turns_assigned: 0,
    queue: [],
    transcript: [],
    tools: [],
    pausing: false,
    usage: { input_tokens: 0, output_tokens: 0, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0, cost_usd_micros: 0, model_calls: 0 },
    reason: null,
    created_at_ms: now.at_ms,
  };
}

function tellCreated({ agent, external_id, user, requested, metadata }: SessionContext): Change {
  return { tell: [{ type: "session.created", agent, external_id, user, mode: requested?.mode ?? null, metadata }] };
}

/** A try of the initialisation begins, at its first step. */
function initBegun(context: SessionContext): Change {
  const retries = context.init === null ? 0 : context.init.retries + 1;
  return { context: { init: { step: INIT_STEPS[0], retries, failed: null } }, tell: [{ type: "session.initializing", step: INIT_STEPS[0], retries }] };
}

function initFailed(context: SessionContext, { code, message, details }: EffectError): Change {
  const step = INIT_STEPS.find((one) => one === details?.["step"]) ?? context.init?.step ?? INIT_STEPS[0];
  const retries = context.init?.retries ?? 0;
  const failed: Failed = { code, message: message.slice(0, FAILURE_CHARACTERS_MAX) };
  const retry_in_ms = INIT_RETRY_MS[retries] ?? null;
  return { context: { init: { step, retries, failed } }, tell: [{ type: "session.initializing", step, retries, code, message: failed.message, retry_in_ms }] };
}

/** It is given up: why stands in the reason, with the step's name. */
function initGivenUp(context: SessionContext): Change {
  const { step, failed } = context.init ?? { step: INIT_STEPS[0], failed: null };
  return { context: { init: null, reason: `step '${step}': ${failed?.code ?? "internal"}: ${failed?.message ?? ""}`.slice(0, FAILURE_CHARACTERS_MAX) } };
}

function configured(context: SessionContext, { config, hash, agent_version, denied_tools }: ConfigurationOutput): Change {
  return {
    context: {
      // What a session is does not change with its agent.
      mode: context.requested === null ? context.mode : (context.requested.mode ?? config.mode),
      requested: null,
      init: null,
      at_boundary: true,
      config: {
        seq: context.now.seq,
        hash,
        agent_version,
        model: config.model,
        tools: config.tools,
        denied_tools: denied_tools ?? [],
        max_loops: config.max_loops ?? LOOPS_DEFAULT,
        max_output_tokens: config.max_output_tokens ?? null,
        temperature: config.temperature ?? null,
        idle_ttl_ms: config.idle_ttl_ms ?? IDLE_TTL_MS,
        suspended_ttl_ms: config.suspended_ttl_ms ?? SUSPENDED_TTL_MS,
        ...(config.call_timeout_ms === undefined ? {} : { call_timeout_ms: config.call_timeout_ms }),
      },
    },
  };
}

/** SE1: a number for every message. An interrupting one goes before those that wait. */
function received(context: SessionContext, place: "front" | "back", { after: parents }: MessageBody): Change {
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

/** SE5: what of a transcript stays in the prompt. Turns, and steps of a turn, stand together in it. */
function windowed(items: readonly TranscriptItem[]): readonly TranscriptItem[] {
  if (items.length <= TRANSCRIPT_ITEMS_MAX) return items;
  const newest = items.at(-1)?.turn;
  let kept = items;
  while (kept.length > TRANSCRIPT_ITEMS_KEPT) {
    const oldest = kept[0]?.turn;
    if (oldest !== newest) {
      kept = kept.filter((item) => item.turn !== oldest);
      continue;
    }
    // Item 0 is the message that began the turn, item 1 the answer of its oldest step.
    const next = kept.findIndex((item, index) => index > 1 && item.role === "assistant");
    if (next < 0) break;
    kept = [...kept.slice(0, 1), ...kept.slice(next)];
  }
  return kept;
}

function turnBegun(context: SessionContext): Change {
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

// ── turns that come after others (dependency.ts) ──

const headOf = ({ queue }: SessionContext): Queued => {
  const [head] = queue;
  assert(head !== undefined, "what waits for other turns is the message whose turn is next");
  return head;
};

function waitingBegun(context: SessionContext): Change {
  const { turn } = headOf(context);
  return context.dependency?.turn === turn ? {} : { context: { dependency: noWait(turn) } };
}

function parentsLooked(context: SessionContext, output: LookOutput): Change {
  const { waiting, send } = looked(context.dependency ?? noWait(headOf(context).turn), output);
  return { context: { dependency: waiting }, send };
}

/** It could not be looked. */
function lookFailed(context: SessionContext): Change {
  const before = context.dependency ?? noWait(headOf(context).turn);
  return { context: { dependency: { ...before, looks: before.looks + 1 } } };
}

/** DP1 */
function parentsMet(context: SessionContext): Change {
  const { after: _, ...head } = headOf(context);
  return { context: { dependency: null, queue: [head, ...context.queue.slice(1)] }, tell: [{ type: "dependency.met", turn: head.turn }] };
}

/** The message whose turn is next does not get one. */
function headGivenUp(context: SessionContext, turn_state: "failed" | "cancelled", end: ActorEvent): Change {
  const { turn } = headOf(context);
  return { context: { dependency: null, queue: context.queue.slice(1), turn, turn_state, step: 0, steps_void: 0 }, tell: [{ ...end, turn }] };
}

/** DP2 */
function turnSkipped(context: SessionContext, output: LookOutput): Change {
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

function parentAsked(context: SessionContext, asker: { session: string; message: string; from: string }): Change {
  const { queue, turn, turn_state, transcript, askers = {} } = context;
  const open = turn_state === "open" ? transcript.findLast((item) => item.role === "user" && item.turn === turn) : undefined;
  const found = open !== undefined && `m${open.at}` === asker.message ? turn : queue.find(({ message_id }) => message_id === asker.message)?.turn;
  const next = asked(askers, found, asker);
  return { ...(next.askers === askers ? {} : { context: { askers: next.askers } }), send: next.send };
}

function stepBegun(context: SessionContext): Change {
  return { context: { step: context.step + 1, reason: null } };
}

const modelOf = (context: SessionContext): string => context.config?.model ?? "";
/** turn and step of the present call, and its attempt. */
const callOf = (context: SessionContext): { turn: number; step: number; attempt: number } => ({
  turn: context.turn,
  step: context.step,
  attempt: context.now.attempts["model"] ?? 1,
});

function modelStarted(context: SessionContext): Change {
  return { tell: [{ type: "model.started", turn: context.turn, step: context.step, model: modelOf(context), inst: `${context.now.seq}:model` }] };
}

/** The calls that are told one by one. */
const toldOneByOne = ({ attempts }: ToldCalls): readonly ToldCall[] =>
  Array.isArray(attempts) ? (attempts as readonly ToldCall[]).filter(({ purpose }) => purpose !== undefined) : [];

const keyOf = (key_source: KeySource | undefined): { readonly key_source?: KeySource } => (key_source === undefined ? {} : { key_source });

/** Each call but the one that the end itself tells of, and each model that was passed over. */
function callsTold(context: SessionContext, told: ToldCalls): ActorEvent[] {
  const calls = toldOneByOne(told);
  const own = calls.findLast(({ purpose }) => purpose === "answer");
  const skipped = Array.isArray(told.skipped) ? (told.skipped as readonly ToldSkip[]).filter(({ purpose }) => purpose !== undefined) : [];
  return [
    ...skipped.map(({ model, code, message }): ActorEvent => ({ type: "model.skipped", ...callOf(context), model, code, message })),
    ...calls
      .filter((call) => call !== own)
      .map(
        ({ purpose = "answer", rule = null, model, outcome, code, message, usage, cost_usd_micros, price_version, key_source, try: number }): ActorEvent => ({
          type: "model.tried",
          ...callOf(context),
          try: number,
          purpose,
          ...(rule === null ? {} : { rule }),
          model,
          outcome,
          code,
          message: message === null ? null : message.slice(0, FAILURE_CHARACTERS_MAX),
          usage: usage === null ? null : { ...usage },
          cost_usd_micros,
          price_version,
          ...keyOf(key_source),
        }),
      ),
  ];
}

/** Usage of everything that was called, or of the one call that is known of. */
function withCalls(before: SessionUsage, told: ToldCalls, usage: ModelUsage | null, cost_usd_micros: number | null): SessionUsage {
  const calls = toldOneByOne(told);
  return calls.length === 0 ? withCall(before, usage, cost_usd_micros) : calls.reduce((sum, call) => withCall(sum, call.usage, call.cost_usd_micros), before);
}

const retryOver = ({ retry, ...context }: SessionContext): Partial<SessionContext> => ({
  ...(retry === undefined || retry === null ? {} : { retry: null }),
  ...waitOver(context),
});

/** A call that failed is made again, now or after a while, there or elsewhere. */
function modelRetried(context: SessionContext, { next }: ModelNext): Change {
  const { model, try: number, wait_ms, code, message } = next;
  const provider = model.slice(0, Math.max(0, model.indexOf("/")));
  return {
    context: { retry: { provider, model, try: number, wait_ms, until_ms: context.now.at_ms + wait_ms, code } },
    tell: [{ type: "model.retrying", ...callOf(context), model, try: number, wait_ms, code, message: message.slice(0, FAILURE_CHARACTERS_MAX) }],
  };
}

const modelTold = (context: SessionContext, told: ModelProgress): Change =>
  "wait" in told ? modelWaits(context.wait, told.wait, callOf(context), context.now.at_ms) : modelRetried(context, told);

/** Usage of one more call. What is not known counts as nothing here; projections settle it. */
function withCall(usage: SessionUsage, call: ModelUsage | null, cost_usd_micros: number | null): SessionUsage {
  return {
    input_tokens: usage.input_tokens + (call?.input_tokens ?? 0),
    output_tokens: usage.output_tokens + (call?.output_tokens ?? 0),
    cache_read_tokens: usage.cache_read_tokens + (call?.cache_read_tokens ?? 0),
    cache_write_tokens: usage.cache_write_tokens + (call?.cache_write_tokens ?? 0),
    reasoning_tokens: usage.reasoning_tokens + (call?.reasoning_tokens ?? 0),
    cost_usd_micros: usage.cost_usd_micros + (cost_usd_micros ?? 0),
    model_calls: usage.model_calls + 1,
  };
}

function modelCompleted(context: SessionContext, output: ModelOutput): Change {
  const { usage, cost_usd_micros, price_version, key_source, model, stop } = output;
  const completed = { type: "model.completed", ...callOf(context), model, usage: { ...usage }, cost_usd_micros, price_version, ...keyOf(key_source), stop };
  return {
    context: { usage: withCalls(context.usage, output, usage, cost_usd_micros), at_boundary: false, ...retryOver(context) },
    tell: [...callsTold(context, output), completed],
  };
}

/** A call without an answer. What it cost stands in the error's details, when its performer knows; of one that was stopped, in the entry that did it. */
function modelFailed(context: SessionContext, error: EffectError): Change {
  const details = (error.details ?? context.now.stopped?.["model"] ?? {}) as ToldCalls & {
    usage?: ModelUsage | null;
    cost_usd_micros?: number | null;
    price_version?: string | null;
    key_source?: KeySource;
    model?: string;
  };
  const usage = details.usage ?? null;
  const cost_usd_micros = details.cost_usd_micros ?? null;
  return {
    context: { usage: withCalls(context.usage, details, usage, cost_usd_micros), ...retryOver(context) },
    tell: [
      ...callsTold(context, details),
      {
        type: "model.failed",
        ...callOf(context),
        model: details.model ?? modelOf(context),
        code: error.code,
        message: error.message.slice(0, FAILURE_CHARACTERS_MAX),
        usage: usage === null ? null : { ...usage },
        cost_usd_micros,
        price_version: details.price_version ?? null,
        ...keyOf(details.key_source),
      },
    ],
  };
}

/** The call in flight is given up: its text is void, and the step begins anew as the next one. */
function modelSuperseded(context: SessionContext, why: string): Change {
  const failed = modelFailed(context, { code: "cancelled", message: why });
  return { ...failed, tell: [...(failed.tell ?? []), { type: "superseded", ...callOf(context) }] };
}

function turnCompleted(context: SessionContext, output: ModelOutput): Change {
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
function turnFailed(context: SessionContext, reason: string, message: string, details?: JsonObject): Change {
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

/** No model was asked: the step is void, and the next one begins after the configuration was taken up. */
function stepVoid(context: SessionContext): Change {
  return { context: { steps_void: context.steps_void + 1 } };
}

/** What ends a turn that a guardrail blocked: text that went out is void, and SE8. */
function turnBlocked(context: SessionContext, { code, message, details }: EffectError): Change {
  const failed = turnFailed(context, code, message);
  const [rule, on] = [String(details?.["rule"] ?? ""), details?.["on"] === "output" ? "output" : "input"];
  return {
    context: { ...failed.context, ...(on === "input" ? { transcript: context.transcript.filter((item) => item.turn !== context.turn) } : {}) },
    tell: [...(on === "output" ? [{ type: "superseded", ...callOf(context) }] : []), ...(failed.tell ?? []).map((event) => ({ ...event, rule, on }))],
  };
}

const toolEvent = (context: SessionContext, type: string, { index, call_id, name }: PendingTool, more: JsonObject = {}): ActorEvent => ({
  type,
  turn: context.turn,
  step: context.step,
  index,
  call_id,
  name,
  ...more,
});

const isPending = (tool: PendingTool): boolean => tool.outcome.kind === "pending";
const effectOf = (tool: PendingTool): string => `tool.${tool.index}`;

const TOOL_DENIED = "denied";
/** What its agent may do by itself is used up (limits.actions of its configuration): nothing ran. */
const AUTONOMY_EXCEEDED = "autonomy_exceeded";
const failureEvent = ({ code }: Failed): "tool.denied" | "tool.failed" => (code === TOOL_DENIED || code === AUTONOMY_EXCEEDED ? "tool.denied" : "tool.failed");

/** The model's calls, side by side. SE7: those that the agent does not have are answered at once. */
function toolsCalled(context: SessionContext, output: ModelOutput, table: ToolTable): Change {
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

function toolCompleted(context: SessionContext, effectId: string, output: ToolOutput): Change {
  const tool = toolOfEffect(context, effectId);
  const told = output.is_error
    ? toolEvent(context, "tool.failed", tool, { code: "tool_error", message: "the tool answered with an error" })
    : toolEvent(context, "tool.completed", tool);
  return { context: { tools: withOutcome(context, tool, { kind: "done", at: context.now.seq }) }, tell: [told], stop: [effectId] };
}

function toolFailed(context: SessionContext, effectId: string, error: EffectError): Change {
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
function toolsGivenUp(context: SessionContext, failed: Failed): Change {
  const pending = context.tools.filter(isPending);
  return {
    context: { tools: context.tools.map((tool) => (isPending(tool) ? { ...tool, outcome: { kind: "failed", at: context.now.seq, failed } } : tool)) },
    tell: pending.map((tool) => toolEvent(context, "tool.failed", tool, { ...failed })),
    stop: pending.map(effectOf),
  };
}

/** SE4: the answers to the step's calls join the transcript together, in the order of the calls. */
function stepClosed(context: SessionContext): Change {
  const answers = context.tools.map(({ call_id, name, outcome }): TranscriptItem => {
    assert(outcome.kind !== "pending", "a step closes when all its tools have ended");
    const item = { role: "tool", at: outcome.at, turn: context.turn, call_id, name } as const;
    return outcome.kind === "failed" ? { ...item, failed: outcome.failed } : item;
  });
  return { context: { tools: [], transcript: windowed([...context.transcript, ...answers]) } };
}

/** One change after another. */
function after(context: SessionContext, first: Change, next: (context: SessionContext) => Change): Change {
  const second = next({ ...context, ...first.context });
  return {
    context: { ...first.context, ...second.context },
    tell: [...(first.tell ?? []), ...(second.tell ?? [])],
    start: [...(first.start ?? []), ...(second.start ?? [])],
    stop: [...(first.stop ?? []), ...(second.stop ?? [])],
    send: [...(first.send ?? []), ...(second.send ?? [])],
  };
}

/** Ends the open turn, if there is one, with whatever it has in flight. */
function turnCancelled(context: SessionContext, reason: string): Change {
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
function parked(context: SessionContext, { tries, cost_usd_micros }: { tries: number; cost_usd_micros: number }): Change {
  const reason = `its worker was lost ${tries} times in a row while it worked, at a cost of up to ${cost_usd_micros} micro-dollars`;
  const call: Change = context.now.attempts["model"] === undefined ? {} : modelFailed(context, { code: "lost", message: "the session was parked" });
  const tools = after(context, call, (called) => toolsGivenUp(called, { code: "lost", message: "the session was parked while this ran; it may have acted" }));
  return after(context, after(context, tools, stepClosed), () => ({
    context: { reason, init: null },
    tell: [{ type: "session.parked", reason, tries, cost_usd_micros }],
  }));
}

/** SE1: what still waits will not have its turn. */
function queueDropped(context: SessionContext): Change {
  return { context: { queue: [] }, tell: context.queue.map(({ turn }) => ({ type: "turn.cancelled", turn, reason: "terminated" })) };
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

/** What enqueueActions offers, as far as it is used here. */
interface Enqueue {
  assign(patch: Partial<SessionContext>): void;
  emit(emitted: Emitted): void;
  spawnChild(src: "call_tool", options: { id: string; input: ToolInput }): void;
  stopChild(id: string): void;
}

/** A change as XState's actions. XState's own type of `enqueue` depends on the machine that is not made yet; hence the cast. */
function perform({ context, enqueue }: { context: SessionContext; enqueue: unknown }, change: Change): void {
  const actions = enqueue as Enqueue;
  // Whoever comes after a turn hears of its end in the commit that ends it.
  const told = context.askers === undefined ? undefined : toldOfEnds(context.askers, change.tell ?? []);
  if (change.context !== undefined) actions.assign(change.context);
  for (const id of change.stop ?? []) actions.stopChild(id);
  for (const event of change.tell ?? []) actions.emit({ type: "tell", event });
  for (const input of change.start ?? []) actions.spawnChild("call_tool", { id: `tool.${input.index}`, input });
  if (told !== undefined) actions.assign({ askers: told.askers });
  for (const message of [...(change.send ?? []), ...(told?.send ?? [])]) actions.emit({ type: "send", ...message });
  if (change.answer !== undefined) actions.emit({ type: "answer", result: change.answer });
}

/** The second time what was asked for at creation is read from its entry: the context keeps it only as long as it is needed. */
function configurationInput({ agent, requested }: SessionContext): ConfigurationInput {
  return requested === null ? { agent, overrides: null, mode: null, again: true } : { agent, overrides: requested.overrides, mode: requested.mode };
}

/** What the agent's calls may take beyond what calls get anyhow. The process that makes a call ends it in time; the machine's patience is for one that does not. */
const longerCalls = ({ config }: SessionContext): number => Math.max(0, (config?.call_timeout_ms ?? CALL_TIMEOUT_MS) - CALL_TIMEOUT_MS);

function messageOf(event: SessionEvent): MessageBody {
  assert(event.type === "message.send", "only a message is received");
  return event.body;
}

const maxLoops = (context: SessionContext): number => context.config?.max_loops ?? LOOPS_DEFAULT;

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
      tell_created: enqueueActions((args) => perform(args, tellCreated(args.context))),
      begin_init: enqueueActions((args) => perform(args, initBegun(args.context))),
      fail_init: enqueueActions((args, error: EffectError) => perform(args, initFailed(args.context, error))),
      give_init_up: enqueueActions((args) => perform(args, initGivenUp(args.context))),
      void_step: enqueueActions((args) => perform(args, stepVoid(args.context))),
      block_turn: enqueueActions((args, error: EffectError) => perform(args, turnBlocked(args.context, error))),
      reach_boundary: enqueueActions((args) => perform(args, { context: { at_boundary: true } })),
      configure: enqueueActions((args, output: ConfigurationOutput) => perform(args, configured(args.context, output))),
      receive: enqueueActions((args) => perform(args, received(args.context, "back", messageOf(args.event)))),
      receive_first: enqueueActions((args) => perform(args, received(args.context, "front", messageOf(args.event)))),
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
      begin_turn: enqueueActions((args) => perform(args, turnBegun(args.context))),
      begin_step: enqueueActions((args) => perform(args, stepBegun(args.context))),
      tell_model_started: enqueueActions((args) => perform(args, modelStarted(args.context))),
      complete_model: enqueueActions((args, output: ModelOutput) => perform(args, modelCompleted(args.context, output))),
      fail_model: enqueueActions((args, error: EffectError) => perform(args, modelFailed(args.context, error))),
      hear_model: enqueueActions((args, told: ModelProgress) => perform(args, modelTold(args.context, told))),
      supersede_model: enqueueActions((args) => perform(args, modelSuperseded(args.context, "the session was paused"))),
      call_tools: enqueueActions((args, output: ModelOutput) => perform(args, toolsCalled(args.context, output, table))),
      complete_tool: enqueueActions((args, { id, output }: { id: string; output: ToolOutput }) => perform(args, toolCompleted(args.context, id, output))),
      fail_tool: enqueueActions((args, { id, error }: { id: string; error: EffectError }) => perform(args, toolFailed(args.context, id, error))),
      time_tools_out: enqueueActions((args) =>
        perform(args, toolsGivenUp(args.context, { code: "timeout", message: "the tool did not answer in time; it may have acted" })),
      ),
      close_step: enqueueActions((args) => perform(args, stepClosed(args.context))),
      complete_turn: enqueueActions((args, output: ModelOutput) => perform(args, turnCompleted(args.context, output))),
      fail_turn: enqueueActions((args, { code, message, details }: EffectError) => perform(args, turnFailed(args.context, code, message, details))),
      end_loop: enqueueActions((args) =>
        perform(args, turnFailed(args.context, "loop_limit", `the turn made ${args.context.step + 1} model calls, and ${maxLoops(args.context)} is its limit`)),
      ),
      cancel_turn: enqueueActions((args, { reason }: { reason: string }) => perform(args, turnCancelled(args.context, reason))),
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
      park: enqueueActions((args, spent: { tries: number; cost_usd_micros: number }) => perform(args, parked(args.context, spent))),
      drop_queue: enqueueActions((args) => perform(args, queueDropped(args.context))),
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

      terminated: { id: "terminated", type: "final", entry: "drop_queue" },
    },
  });
}

// ── the definition ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A view's context, typed. */
export function sessionContextOf(view: Pick<ActorView, "context">): SessionContext {
  return view.context as unknown as SessionContext;
}

const BUSY_STATES = ["thinking", "acting", "awaiting_dependency"];

/** Refuses: a second message in mode single, `busy` to those who do not want to wait, `overloaded` when too many do. */
function refuseMessage(view: ActorView, { on_busy }: MessageBody) {
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

function waiting(count: number): string {
  return count === 0 ? "" : `; ${count} message${count === 1 ? " waits" : "s wait"}`;
}

/** Why a call that failed is made again, in words for people. */
const RETRY_REASONS: Readonly<Record<string, string>> = {
  rate_limited: "it answered 429",
  overloaded: "it is overloaded",
  circuit_open: "its circuit breaker is open",
  provider_unavailable: "it cannot be reached",
};

function waitsForProvider(retry: ModelRetry | null | undefined, at_ms: number | undefined): string | undefined {
  if (retry === undefined || retry === null || retry.wait_ms === 0 || (at_ms !== undefined && at_ms >= retry.until_ms)) return undefined;
  const { provider, model, try: number, wait_ms, until_ms, code } = retry;
  const when = at_ms === undefined ? `${wait_ms} ms after ${timestamp(until_ms - wait_ms)}` : `in ${until_ms - at_ms} ms`;
  return `waits for provider ${provider}: try ${number} of ${model} ${when}, because ${RETRY_REASONS[code] ?? "the last one failed"} (${code})`;
}

function waits(view: ActorView, at_ms?: number): string | undefined {
  const { reason, queue, turn, turn_state, init, wait, retry, dependency } = sessionContextOf(view);
  const because = reason === null ? "" : ` (${reason})`;
  const halfway = turn_state === "open" ? `; turn ${turn} goes on then` : "";
  switch (view.state) {
    case "idle":
      return "waits for a message";
    case "awaiting_dependency":
      return view.running.length > 0 ? undefined : `${waitsForParents(dependency ?? noWait(0))}${waiting(queue.length - 1)}`;
    case "paused":
      return `paused${because}: waits for session.resume${halfway}${waiting(queue.length)}`;
    case "hibernated":
      return `hibernated${because}: waits for a message or session.resume${halfway}${waiting(queue.length)}`;
    case "unhealthy":
      return `could not begin${because}: waits for session.resume, which tries again${waiting(queue.length)}`;
    case "parked":
      return `parked${because}: waits for an operator's session.unpark${halfway}${waiting(queue.length)}`;
    case "terminated":
      return `ended${because}`;
    case "initializing":
      return init === null || init.failed === null
        ? undefined
        : `step '${init.step}' of its initialisation failed (${init.failed.code}); it is tried again${waiting(queue.length)}`;
    case "thinking":
      return waitWords(wait) ?? waitsForProvider(retry, at_ms);
    default:
      return undefined; // initializing, thinking and acting work: SE6
  }
}

/** The same for programs, where something in particular is waited for. */
function waitsFor(view: ActorView, at_ms?: number): JsonObject | undefined {
  const { retry, wait, dependency } = sessionContextOf(view);
  if (view.state === "awaiting_dependency" && view.running.length === 0) {
    const waiting_for = dependency ?? noWait(0);
    return { for: "dependency", parents: waiting_for.open.map((parent) => ({ ...parent })), message: waitsForParents(waiting_for) };
  }
  if (view.state !== "thinking") return undefined;
  if (wait !== undefined && wait !== null) return waitShown(wait);
  const message = waitsForProvider(retry, at_ms);
  if (message === undefined || retry === undefined || retry === null) return undefined;
  const { provider, until_ms, wait_ms, code } = retry;
  return { for: "provider", provider, code, since: timestamp(until_ms - wait_ms), until: timestamp(until_ms), message };
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
      call_tool: { lost: (input) => ((input as unknown as ToolInput).idempotent ? "retry" : "ambiguous") },
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
