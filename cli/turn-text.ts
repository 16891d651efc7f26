// turn-text: the text of a session as it comes, out of chunks that may arrive twice, out of order, or not at all.
//
// Invariants:
//   X1. Chunks of one attempt are given in the order of their index, each once.
//   X2. When a higher attempt of a step speaks, or `superseded` says so, what lower attempts gave is void, and said to be.
//   X3. When a step's message is complete, what was not given of it is given; what was given and differs is void.
import type { TokenChunk } from "../protocol/tokens.ts";

export interface TextSink {
  /** A step begins; what was given of the one before is final. */
  began(): void;
  text(text: string): void;
  /** Everything given of the present step is void. */
  voided(why: string): void;
}

interface Step {
  readonly turn: number;
  readonly step: number;
  attempt: number;
  next_index: number;
  given: string;
  closed: boolean;
  /** Ahead of their turn. Bounded: an hour-old hole is filled by the finished message, not by waiting. */
  readonly waiting: Map<number, TokenChunk>;
}

const WAITING_MAX = 1000;

export function createTurnText(sink: TextSink) {
  let current: Step | undefined;

  /** The step a chunk belongs to; undefined when it is over. */
  function stepOf(turn: number, step: number): Step | undefined {
    if (current !== undefined && (turn < current.turn || (turn === current.turn && step < current.step))) return undefined;
    if (current !== undefined && turn === current.turn && step === current.step) return current;
    if (current !== undefined) sink.began();
    current = { turn, step, attempt: 0, next_index: 0, given: "", closed: false, waiting: new Map() };
    return current;
  }
  function restart(step: Step, attempt: number, why: string): void {
    if (step.given !== "") sink.voided(why);
    step.attempt = attempt;
    step.next_index = 0;
    step.given = "";
    step.waiting.clear();
  }
  function give(step: Step, text: string): void {
    step.given += text;
    if (text !== "") sink.text(text);
  }

  return {
    chunk(chunk: TokenChunk): void {
      const step = stepOf(chunk.turn, chunk.step);
      if (step === undefined || step.closed || chunk.attempt < step.attempt) return;
      if (chunk.attempt > step.attempt) restart(step, chunk.attempt, `attempt ${step.attempt} was lost`); // X2
      if (chunk.index < step.next_index || step.waiting.size >= WAITING_MAX) return; // X1
      step.waiting.set(chunk.index, chunk);
      for (let next = step.waiting.get(step.next_index); next !== undefined; next = step.waiting.get(step.next_index)) {
        step.waiting.delete(step.next_index);
        step.next_index += 1;
        // Reasoning and tool calls count in the same row, and are not the answer's text.
        if (next.channel === undefined) give(step, next.text);
      }
    },
    superseded(event: { turn: number; step: number; attempt: number }): void {
      const step = stepOf(event.turn, event.step);
      if (step === undefined || step.closed || event.attempt < step.attempt) return;
      restart(step, event.attempt + 1, `attempt ${event.attempt} was lost`);
    },
    /** The whole text of a step, as the journal has it. */
    completed(event: { turn: number; step: number; content: string }): void {
      const step = stepOf(event.turn, event.step);
      if (step === undefined || step.closed) return;
      step.closed = true;
      if (event.content.startsWith(step.given)) give(step, event.content.slice(step.given.length)); // X3
      else {
        restart(step, step.attempt, "the finished message differs");
        give(step, event.content);
      }
    },
  };
}
export type TurnText = ReturnType<typeof createTurnText>;
