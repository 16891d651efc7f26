// json: the only kind of data that crosses a wire or rests in a journal, and one canonical way to write it down.
import { hash } from "node:crypto";

export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };
export type JsonObject = { readonly [key: string]: Json };

/** The value where it is an object: what came from elsewhere may be anything. */
export function asObject(value: unknown): JsonObject | undefined {
  return value !== null && typeof value === "object" && !Array.isArray(value) ? (value as JsonObject) : undefined;
}

/**
 * JSON with object keys sorted at every depth, so that equal values have equal text.
 * Array order is kept: it bears meaning. Keys whose value is undefined are left out, as in JSON.stringify.
 */
export function canonicalJson(value: unknown): string {
  if (value === null || typeof value !== "object") return JSON.stringify(value) ?? "null";
  if (Array.isArray(value)) return `[${value.map((item) => canonicalJson(item ?? null)).join(",")}]`;
  const fields = value as Record<string, unknown>;
  let text = "";
  for (const key of sorted(Object.keys(fields))) {
    const item = fields[key];
    if (item !== undefined) text += `${text === "" ? "" : ","}${quoted(key)}:${canonicalJson(item)}`;
  }
  return `{${text}}`;
}

/** Most objects have few keys, and many of them in order already. */
function sorted(keys: string[]): string[] {
  for (let at = 1; at < keys.length; at++) if (keys[at - 1]! > keys[at]!) return keys.sort();
  return keys;
}

/** A name of ours needs no escapes. */
const quoted = (key: string): string => (/^\w+$/.test(key) ? `"${key}"` : JSON.stringify(key));

/** SHA-256 of the canonical JSON, in hex: the same for any order of keys. */
export function hashOf(value: unknown): string {
  return hash("sha256", canonicalJson(value), "hex");
}
