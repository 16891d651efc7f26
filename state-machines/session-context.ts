// session-context: what a session remembers between two entries. Everything in it is small and has a bound (SE5 of session.ts); what was said
// stands in the journal, and here by its position.
import type { JsonObject } from "../protocol/json.ts";
import type { SessionParent } from "../protocol/session-parent.ts";
import type { ActorView, BaseContext, CreationInput } from "./definition.ts";
import type { Askers, Waiting } from "./dependency.ts";
import type { ModelWait } from "./model-wait.ts";
import type { Failed } from "./session-failure.ts";
import type { TranscriptItem } from "./session-transcript.ts";
import type { ToolPrice } from "./tool-dues.ts";

export type SessionMode = "multi" | "single";

/** The steps of initialisation, in their order (AR-F08). */
export const INIT_STEPS = ["agent", "configuration", "guardrails", "tools", "permissions"] as const;
export type InitStep = (typeof INIT_STEPS)[number];

/** A message that waits for its turn. */
export interface Queued {
  /** seq of the entry that bears its text. */
  readonly at: number;
  readonly turn: number;
  readonly message_id: string;
  /** The turns it comes after, until they are known to have completed. */
  readonly after?: readonly SessionParent[];
}

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

/** The budget that hears when a session ends, and by what name it knows it (budget-sessions.ts). */
export interface SessionPlace {
  readonly budget: string;
  readonly session: string;
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
  /** By tool; absent where none costs anything. */
  readonly tool_prices?: Readonly<Record<string, ToolPrice>>;
  /** Absent where its tenant has no bound of sessions. */
  readonly place?: SessionPlace;
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

interface CreationBody {
  readonly agent: string;
  readonly external_id?: string;
  readonly user?: string;
  readonly mode?: SessionMode;
  readonly overrides?: JsonObject;
  readonly metadata?: Readonly<Record<string, string>>;
}

export function created({ now, body }: CreationInput): SessionContext {
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

/** A view's context, typed. */
export function sessionContextOf(view: Pick<ActorView, "context">): SessionContext {
  return view.context as unknown as SessionContext;
}
