// reply: what a sender that named a Troupe-Reply-To hears when its command has been decided.
import { z } from "zod";
import type { ErrorBody } from "./errors.ts";
import type { JsonObject } from "./json.ts";

export type Reply =
  | {
      readonly ok: true;
      readonly actor: string;
      readonly seq: number;
      readonly state: string;
      readonly result: JsonObject;
      /** Where in EVENTS the actor's journal ended before this was decided: read on from there. Absent for a repeat. */
      readonly after_sequence?: number;
    }
  | { readonly ok: false; readonly actor: string; readonly error: ErrorBody };

const replyShape = z.union([
  z.object({
    ok: z.literal(true),
    actor: z.string(),
    seq: z.number(),
    state: z.string(),
    result: z.record(z.string(), z.unknown()),
    after_sequence: z.number().optional(),
  }),
  z.object({
    ok: z.literal(false),
    actor: z.string(),
    error: z.object({ code: z.string(), message: z.string(), details: z.record(z.string(), z.unknown()).optional() }),
  }),
]);

/** A process of ours asks on the fast lane with the inbox that it will name when it makes the command durable, and this behind it. */
export const FAST_REPLY_SUFFIX = "-fast";

const ENCODER = new TextEncoder();
const DECODER = new TextDecoder();

export function encodeReply(reply: Reply): Uint8Array {
  return ENCODER.encode(JSON.stringify(reply));
}
/** Reads a reply; throws on bytes that are none, since only our own hosts send them. */
export function decodeReply(data: Uint8Array): Reply {
  return replyShape.parse(JSON.parse(DECODER.decode(data))) as Reply;
}
