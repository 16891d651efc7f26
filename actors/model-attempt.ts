// model-attempt: one call of a model as outputs, events and usage rows have it, and a model that was passed over.
import type { StopReason, Usage } from "../providers/provider.ts";
import type { KeySource } from "../providers/registry.ts";

/** One call that was made. */
export interface ModelAttempt {
  readonly model: string;
  /** Of the effect. With `try` it names the attempt within the effect. */
  readonly attempt: number;
  /** Counts the calls of this attempt of the effect, from 1. */
  readonly try: number;
  /** An answer of the agent, or a judgement for one of its guardrails. Machines tell of each call by it; journals from before it was there have none. */
  readonly purpose: "answer" | "guardrail";
  /** Where reports count its cost. Journals from before it was there have none, and all of it is counted with the call. */
  readonly category?: "llm" | "guardrail";
  /** Of a guardrail: its name. */
  readonly rule: string | null;
  /** Whose key it was made with; journals from before it was there have none, and knew the platform's alone. */
  readonly key_source: KeySource;
  readonly outcome: "completed" | "failed";
  readonly stop: StopReason | null;
  readonly code: string | null;
  readonly message: string | null;
  readonly usage: Usage | null;
  readonly cost_usd_micros: number | null;
  /** What it counts in its provider's window of tokens; null where nobody knows exactly. Journals from before it was there have none. */
  readonly rate_tokens: number | null;
  readonly price_version: string | null;
  readonly started_at: string;
  readonly ended_at: string;
  readonly first_token_ms: number | null;
}

/** A model that was not called, and why. */
export interface SkippedModel {
  readonly model: string;
  readonly code: string;
  readonly message: string;
  readonly purpose: ModelAttempt["purpose"];
}
