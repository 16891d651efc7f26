// event-stream: server-sent events as a client of ours reads them, and the answer of a turn put together out of them as a careful client does.
//
// The reader is eventsource-parser, which many clients use: that it understands us is part of what is tested.
import { createParser, type EventSourceMessage } from "eventsource-parser";

/** `data` is what the JSON says. */
export interface StreamMessage {
  readonly id: string | undefined;
  readonly event: string;
  readonly data: StreamData;
}

export interface StreamData {
  readonly type?: string;
  readonly turn?: number;
  readonly step?: number;
  readonly attempt?: number;
  readonly index?: number;
  readonly text?: string;
  readonly content?: string;
  readonly seq?: number;
  readonly [field: string]: unknown;
}

export async function* readEventStream(body: ReadableStream<Uint8Array>): AsyncGenerator<StreamMessage> {
  const waiting: EventSourceMessage[] = [];
  const decoder = new TextDecoder();
  const parser = createParser({
    onEvent: (message) => void waiting.push(message),
    onError: (error) => {
      throw error;
    },
  });
  for await (const bytes of body) {
    parser.feed(decoder.decode(bytes, { stream: true }));
    for (let message = waiting.shift(); message !== undefined; message = waiting.shift())
      yield { id: message.id, event: message.event ?? "message", data: JSON.parse(message.data) as StreamData };
  }
}

/** Everything until the stream ends. */
export async function collect(messages: AsyncIterable<StreamMessage>): Promise<StreamMessage[]> {
  const all: StreamMessage[] = [];
  for await (const message of messages) all.push(message);
  return all;
}

/** What a client shows of a turn: the text of each step, of its last attempt. `faults` says what a careful client must not see. */
export interface Heard {
  readonly text: string;
  /** The finished messages of the turn, run together. */
  readonly finished: string;
  readonly attempts: number;
  readonly voided: number;
  readonly faults: readonly string[];
}

/** Puts together what was heard of one turn: no chunk missing, none twice, none of a void attempt after it was declared void. */
export function hear(messages: readonly StreamMessage[], turn: number): Heard {
  const steps = new Map<number, { attempt: number; next_index: number; text: string; void_up_to: number }>();
  const faults: string[] = [];
  const seen = new Set<string>();
  let finished = "";
  let attempts = 0;
  let voided = 0;
  for (const { id, event, data } of messages) {
    if (id !== undefined) {
      if (seen.has(id)) faults.push(`cursor ${id} came twice (${event})`);
      seen.add(id);
    }
    if (data.turn !== turn || data.step === undefined) continue;
    const step = steps.get(data.step) ?? { attempt: 0, next_index: 0, text: "", void_up_to: 0 };
    steps.set(data.step, step);
    if (event === "superseded") {
      voided += 1;
      step.void_up_to = Math.max(step.void_up_to, data.attempt ?? 0);
      step.text = "";
      step.next_index = 0;
      step.attempt = 0;
    } else if (event === "message.completed") finished += data.content ?? "";
    else if (event === "token" && data["channel"] === undefined) {
      const { attempt = 0, index = -1, text = "" } = data;
      if (attempt <= step.void_up_to) faults.push(`a chunk of attempt ${attempt} after it was void`);
      if (step.attempt !== attempt) {
        if (step.attempt !== 0) faults.push(`attempt ${attempt} began though attempt ${step.attempt} was not declared void`);
        step.attempt = attempt;
        step.next_index = 0;
        attempts += 1;
      }
      if (index !== step.next_index) faults.push(`chunk ${index} of attempt ${attempt} came where ${step.next_index} was due`);
      step.next_index = index + 1;
      step.text += text;
    }
  }
  return {
    text: [...steps.entries()]
      .sort(([a], [b]) => a - b)
      .map(([, { text }]) => text)
      .join(""),
    finished,
    attempts,
    voided,
    faults,
  };
}
