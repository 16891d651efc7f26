// session-view: what a session looks like from outside, made of its restored state.
import type { Restored } from "../actors/restore.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { timestamp } from "../protocol/world.ts";
import type { ActorDefinition } from "../state-machines/definition.ts";
import { viewOf } from "../state-machines/step.ts";

const fieldOf = (value: Json | undefined, field: string): Json => {
  if (value === null || value === undefined || typeof value !== "object" || Array.isArray(value)) return null;
  return (value as JsonObject)[field] ?? null;
};

/** `at_ms`: now, for what a wait has left. */
export function sessionView(restored: Restored, definition: Pick<ActorDefinition, "waits" | "waitsFor">, at_ms: number): JsonObject {
  const { state, last } = restored;
  const view = viewOf(state);
  const { context } = view;
  const { config, queue } = context;
  const created_at_ms = context["created_at_ms"];
  return {
    id: state.actor.id,
    state: view.state,
    wait_reason: definition.waits(view, at_ms) ?? null,
    waits_for: definition.waitsFor?.(view, at_ms) ?? null,
    turn: context["turn"] ?? null,
    usage: context["usage"] ?? null,
    agent: context["agent"] ?? null,
    mode: context["mode"] ?? null,
    user: context["user"] ?? null,
    external_id: context["external_id"] ?? null,
    metadata: context["metadata"] ?? null,
    config_hash: fieldOf(config, "hash"),
    agent_version: fieldOf(config, "agent_version"),
    denied_tools: fieldOf(config, "denied_tools"),
    init_step: fieldOf(context["init"], "step"),
    model: fieldOf(config, "model"),
    epoch: last.epoch,
    worker: last.worker,
    seq: state.seq,
    created_at: typeof created_at_ms === "number" ? timestamp(created_at_ms) : null,
    updated_at: last.at,
    queue_length: Array.isArray(queue) ? queue.length : 0,
  };
}
