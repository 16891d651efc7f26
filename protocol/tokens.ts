// tokens: model output as it comes, on `….token`. Never in the journal; the finished message is.

/** One chunk of one attempt of one model call. `index` counts chunks of an attempt from 0, without gaps. */
export interface TokenChunk {
  readonly turn: number;
  /** Counts the model calls of a turn, from 0. */
  readonly step: number;
  readonly attempt: number;
  readonly epoch: number;
  readonly index: number;
  readonly text: string;
  /** Absent for the answer's own text. */
  readonly channel?: "reasoning" | "tool_call";
  /** On the last chunk of an attempt. */
  readonly end?: true;
}

export function encodeToken(chunk: TokenChunk): Uint8Array {
  return new TextEncoder().encode(JSON.stringify(chunk));
}
export function decodeToken(data: Uint8Array): TokenChunk {
  return JSON.parse(new TextDecoder().decode(data)) as TokenChunk;
}
