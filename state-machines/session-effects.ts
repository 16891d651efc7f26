// session-effects: what a session has its host do, with what goes in and what comes back. The performers are in actors/effects/.
//
//   load_configuration   reads what the session is to freeze            (session-configuration.ts)
//   call_model           asks a model, tells of each call that it took  (session-model-calls.ts)
//   call_tool            runs one tool                                  (session-tool-calls.ts)
//   look_up_turns        looks at turns of other sessions               (session-dependency.ts)
import type { AgentConfig } from "../protocol/commands.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { effect } from "./definition.ts";
import type { LookInput, LookOutput } from "./dependency.ts";
import type { ToldWait } from "./model-wait.ts";
import type { Permissions } from "./permission.ts";
import type { SessionMode, SessionPlace } from "./session-context.ts";
import type { TranscriptItem } from "./session-transcript.ts";
import type { ToolPrice } from "./tool-dues.ts";

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
  /** Where its tenant may have only so many sessions. */
  readonly place?: SessionPlace;
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
export type KeySource = "platform" | "tenant";

/** One call of a model among those that an effect made. */
export interface ToldCall {
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
export interface ToldSkip {
  readonly purpose?: "answer" | "guardrail";
  readonly model: string;
  readonly code: string;
  readonly message: string;
}
export interface ToldCalls {
  readonly attempts?: readonly ToldCall[];
  readonly skipped?: readonly ToldSkip[];
}
/** What a model call says while it goes on: what it does next after a failure, or what it waits for. */
export type ModelProgress = ModelNext | { readonly wait: ToldWait | null };
export interface ModelNext {
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
  /** Absent where a call costs nothing. */
  readonly price?: ToolPrice;
}
export interface ToolOutput {
  readonly text: string;
  readonly cost_usd_micros?: number;
  readonly is_error: boolean;
}

/** The effects of a session; a host's table of performers is checked against it. */
export const sessionEffects = {
  load_configuration: effect<ConfigurationInput, ConfigurationOutput>(),
  call_model: effect<ModelInput, ModelOutput>(),
  call_tool: effect<ToolInput, ToolOutput>(),
  look_up_turns: effect<LookInput, LookOutput>(),
};
