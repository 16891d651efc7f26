// tool-args: the arguments of a tool call as the model wrote them, which is a string that ought to be a JSON object.
import type { Json, JsonObject } from "../protocol/json.ts";
import { INVALID_ARGS_CHARACTERS_MAX, type ToolCall } from "./provider.ts";

/** A call from the raw text of its arguments (P6). No text at all means no arguments. */
export function toolCall(id: string, name: string, raw_args: string): ToolCall {
  if (raw_args.trim() === "") return { id, name, args: {} };
  const args = jsonObject(raw_args);
  return args === undefined ? { id, name, args: {}, invalid_args: raw_args.slice(0, INVALID_ARGS_CHARACTERS_MAX) } : { id, name, args };
}

function jsonObject(text: string): JsonObject | undefined {
  try {
    const value = JSON.parse(text) as Json;
    return value !== null && typeof value === "object" && !Array.isArray(value) ? (value as JsonObject) : undefined;
  } catch {
    return undefined; // Not JSON: the caller marks it for the model to see.
  }
}

/** Calls with ids that differ within the answer: some servers repeat one id, or send none. */
export function withOwnIds(calls: readonly ToolCall[], prefix: string): ToolCall[] {
  const taken = new Set<string>();
  return calls.map((call, index) => {
    let id = call.id === "" ? `${prefix}_${index}` : call.id;
    for (let n = 2; taken.has(id); n++) id = `${call.id === "" ? prefix : call.id}_${index}_${n}`;
    taken.add(id);
    return id === call.id ? call : { ...call, id };
  });
}
