// Goal:   the ear of the integration tests hears every fault that a careful client must not see, and no other.
// Method: one good turn with a takeover in it, and each fault planted into it.
import { expect, test } from "vitest";
import { hear, readEventStream, type StreamMessage } from "./event-stream.ts";

let ids = 0;
const message = (event: string, data: object): StreamMessage => ({ id: `c${ids++}`, event, data: { turn: 1, step: 0, ...data } });
const token = (attempt: number, index: number, text: string): StreamMessage => message("token", { attempt, index, text });

const good: readonly StreamMessage[] = [
  message("turn.started", {}),
  token(1, 0, "one "),
  token(1, 1, "two "),
  message("superseded", { attempt: 1 }),
  token(2, 0, "one "),
  token(2, 1, "two "),
  token(2, 2, "three"),
  message("message.completed", { content: "one two three" }),
];
const at = (index: number): StreamMessage => good[index]!;
const without = (index: number): StreamMessage[] => good.filter((_, n) => n !== index);

test("a turn that was taken over is heard as its last attempt, without a fault", () => {
  expect(hear(good, 1)).toEqual({ text: "one two three", finished: "one two three", attempts: 2, voided: 1, faults: [] });
  expect(hear(good, 2)).toEqual({ text: "", finished: "", attempts: 0, voided: 0, faults: [] });
});

test.each([
  { fault: "a chunk that is missing", heard: without(5), says: /chunk 2 of attempt 2 came where 1 was due/ },
  { fault: "a chunk that comes twice", heard: [...good.slice(0, 6), token(2, 1, "two "), ...good.slice(6)], says: /chunk 1 of attempt 2 came where 2 was due/ },
  { fault: "a message that comes twice", heard: [...good, at(7)], says: /came twice/ },
  { fault: "an attempt that nobody declared void", heard: without(3), says: /attempt 1 was not declared void/ },
  {
    fault: "a chunk of an attempt that is void",
    heard: [...good.slice(0, 4), token(1, 2, "three"), ...good.slice(4)],
    says: /a chunk of attempt 1 after it was void/,
  },
])("$fault is a fault", ({ heard, says }) => {
  expect(hear(heard, 1).faults.join("\n")).toMatch(says);
});

test("a stream that is cut in the middle of a character and of a message is read whole", async () => {
  const bytes = new TextEncoder().encode(
    'retry: 1000\n\n: awake\n\nid: a\nevent: token\ndata: {"text":"grüße 世界"}\n\nid: b\nevent: token\ndata: {"text":"half',
  );
  const slices = Array.from({ length: bytes.length }, (_, index) => bytes.slice(index, index + 1));
  const read: StreamMessage[] = [];
  for await (const one of readEventStream(ReadableStream.from(slices))) read.push(one);
  expect(read).toEqual([{ id: "a", event: "token", data: { text: "grüße 世界" } }]);
});
