// chunk: reads a token chunk off a message that anybody with a worker's rights may have sent.
import { decodeToken, type TokenChunk } from "../protocol/tokens.ts";

const isCount = (value: unknown): boolean => Number.isSafeInteger(value) && (value as number) >= 0;

/** The chunk, or undefined for bytes that are none: one bad chunk costs its text's smoothness, never the feed. */
export function readChunk(data: Uint8Array): TokenChunk | undefined {
  let chunk: Partial<TokenChunk> | null;
  try {
    chunk = decodeToken(data);
  } catch {
    return undefined; // The finished message has the text.
  }
  if (chunk === null || typeof chunk !== "object" || typeof chunk.text !== "string") return undefined;
  const counts = [chunk.turn, chunk.step, chunk.attempt, chunk.epoch, chunk.index];
  const channelled = chunk.channel === undefined || chunk.channel === "reasoning" || chunk.channel === "tool_call";
  return counts.every(isCount) && channelled ? (chunk as TokenChunk) : undefined;
}
