// tools: what a model may call without anybody having brought a tool along, as data. actors/effects/ performs them.
import type { JsonObject } from "../protocol/json.ts";

export interface ToolDeclaration {
  readonly description: string;
  /** A JSON schema of type `object`. */
  readonly parameters: JsonObject;
  /** A call that was lost with its worker may simply be made again. Otherwise it comes back as `ambiguous`, and is never made twice. */
  readonly idempotent: boolean;
}

export type ToolTable = Readonly<Record<string, ToolDeclaration>>;

/** Those of the names that no tool has. */
export function unknownTools(names: readonly string[], table: ToolTable): string[] {
  return names.filter((name) => !Object.hasOwn(table, name));
}

/** The longest wait of one `wait_ms`: the patience of a step with its tools. */
export const WAIT_MS_MAX = 600_000;

export const BUILT_IN_TOOLS = {
  now: {
    description: "The present date and time, in UTC, as RFC 3339.",
    parameters: { type: "object", properties: {}, additionalProperties: false },
    idempotent: true,
  },
  wait_ms: {
    description: "Waits for a number of milliseconds, then answers.",
    parameters: {
      type: "object",
      properties: { ms: { type: "integer", minimum: 0, maximum: WAIT_MS_MAX, description: "How long to wait, in milliseconds." } },
      required: ["ms"],
      additionalProperties: false,
    },
    idempotent: true,
  },
} as const satisfies ToolTable;
