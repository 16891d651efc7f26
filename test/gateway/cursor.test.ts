// Goal: a cursor comes back as it went out, and nothing a client sends in its place can hurt.
// Method: any cursor and any text, drawn by fast-check.
import fc from "fast-check";
import { expect, test } from "vitest";
import { type Cursor, decodeCursor, encodeCursor } from "../../gateway/cursor.ts";

const count = fc.nat({ max: Number.MAX_SAFE_INTEGER });
const place = fc.record({ turn: count, step: count, attempt: count, epoch: count, index: count, characters: count });
const cursor: fc.Arbitrary<Cursor> = fc.oneof(fc.record({ sequence: count, events: count }), fc.record({ sequence: count, events: count, place }));

test("U1: every cursor is read back as it was written, in characters that need no escaping in a URL or an SSE id", () => {
  fc.assert(
    fc.property(cursor, (one) => {
      const text = encodeCursor(one);
      expect(text).toMatch(/^[A-Za-z0-9_-]{1,256}$/);
      expect(decodeCursor(text)).toEqual(one);
    }),
  );
});

test("U2: no text makes decoding throw, and what is no cursor is undefined", () => {
  const json = fc.json().map((text) => Buffer.from(text).toString("base64url"));
  fc.assert(
    fc.property(fc.oneof(fc.string(), fc.string({ unit: "binary" }), json), (text) => {
      const read = decodeCursor(text);
      if (read !== undefined) expect(decodeCursor(encodeCursor(read))).toEqual(read);
    }),
    { numRuns: 500 },
  );
});

test("a cursor of another version, of too few numbers, with a fraction, a negative or a text in it is none", () => {
  const encode = (value: unknown): string => Buffer.from(JSON.stringify(value)).toString("base64url");
  for (const value of [[2, 1, 1], [1, 1], [1, 1, 1, 1], [1, 1.5, 0], [1, -1, 0], [1, "1", 0], { 0: 1 }, null, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 2 ** 60, 0]])
    expect(decodeCursor(encode(value)), JSON.stringify(value)).toBeUndefined();
  expect(decodeCursor("A".repeat(257))).toBeUndefined();
});
