// stream-answer: reads the answer of one attempt off an SDK's stream, to its end or to what broke it. What a break means is decided here for all dialects:
//
//   before the head of a response      nothing was begun; the error says why
//   after it, before the answer's end  the connection broke under an answer, which may have cost something
//   after the answer's end             the provider had said how it ends; what broke is only the connection
import type { Attempt, AttemptContext } from "./attempt.ts";
import { type FailureFacts, modelErrorOf } from "./model-error.ts";
import type { ModelOutcome } from "./provider.ts";

/** An answer as the events of its dialect build it up. */
export interface StreamedAnswer<Event> {
  /** The provider has said how the answer ends (P8). */
  readonly is_complete: boolean;
  /** What the provider said within the stream of its own failure. */
  readonly failure?: FailureFacts | undefined;
  take(event: Event): void;
  outcome(): ModelOutcome;
}

export interface AnswerStream<Event> {
  readonly answer: StreamedAnswer<Event>;
  /** Sends the request; resolves with the head of the response. */
  open(): Promise<AsyncIterable<Event>>;
  /** What an error of the SDK says. */
  facts_of(error: unknown, has_head: boolean): FailureFacts;
  /** Does this event say that the provider began to answer? All do, when absent. */
  is_heard?(event: Event): boolean;
}

/** A mistake of ours within the loop over a stream, so that it is not taken for a broken stream. */
class AnswerMistake extends Error {
  override readonly name = "AnswerMistake";
}

export async function streamAnswer<Event>(
  { secrets, world }: AttemptContext,
  attempt: Attempt,
  { answer, open, facts_of, is_heard }: AnswerStream<Event>,
): Promise<ModelOutcome> {
  const failed = (facts: FailureFacts): ModelOutcome => attempt.failed(modelErrorOf(facts, secrets, world.now_ms()));
  let has_head = false;
  try {
    const stream = await open();
    has_head = true;
    for await (const event of stream) {
      if (is_heard === undefined || is_heard(event)) attempt.heard();
      take(answer, event);
      if (answer.failure !== undefined) return failed(answer.failure);
    }
  } catch (error) {
    if (error instanceof AnswerMistake) throw error.cause;
    if (!answer.is_complete) {
      const facts = facts_of(error, has_head);
      // A connection that broke under an answer may have cost something, even before its first event.
      if (has_head && facts.transport !== undefined) attempt.heard();
      return failed(facts);
    }
  }
  return answer.outcome();
}

function take<Event>(answer: StreamedAnswer<Event>, event: Event): void {
  try {
    answer.take(event);
  } catch (error) {
    throw new AnswerMistake("an event of the stream was not understood", { cause: error });
  }
}
