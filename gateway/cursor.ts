// cursor: where a reader of a session's feed stands, as one opaque word.
//
// It names the journal's position (the stream sequence of a message and how many of its events were given) and the place in
// the model call that is open there. Nothing of it lives in a gateway, so any gateway takes it, for as long as the journal lives.
//
// Invariants:
//   U1. decodeCursor(encodeCursor(cursor)) is that cursor.
//   U2. No text makes decodeCursor throw; what is no cursor is undefined.

/** The model call that is open at a cursor, and how much of it was given. */
export interface StepPlace {
  readonly turn: number;
  /** Counts the model calls of a turn, from 0. */
  readonly step: number;
  readonly attempt: number;
  /** Chunks of an older epoch than this are of an owner that lost the actor. */
  readonly epoch: number;
  /** The next chunk of this attempt. */
  readonly index: number;
  /** Of the answer's text, given so far; counted as JavaScript counts. */
  readonly characters: number;
}

export interface Cursor {
  /** Stream sequence of the journal message it stands in; 0 before the first. */
  readonly sequence: number;
  /** How many events of that message were given. */
  readonly events: number;
  readonly place?: StepPlace;
}

export const CURSOR_START: Cursor = { sequence: 0, events: 0 };
/** Past every event of a message: none has as many. */
const ALL_EVENTS = 1_000_000;
/** After everything of the journal message at `sequence`. */
export const cursorAfter = (sequence: number): Cursor => ({ sequence, events: ALL_EVENTS });

/** The first number of every cursor, so that another shape can be told apart. */
const CURSOR_VERSION = 1;
/** Nine numbers of at most 16 digits, with commas and brackets, in base64. */
const CURSOR_CHARACTERS_MAX = 256;

export function encodeCursor({ sequence, events, place }: Cursor): string {
  const numbers = [CURSOR_VERSION, sequence, events];
  if (place) numbers.push(place.turn, place.step, place.attempt, place.epoch, place.index, place.characters);
  return Buffer.from(JSON.stringify(numbers)).toString("base64url");
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 0;

/** Reads a cursor, or answers undefined for a text that is none. */
export function decodeCursor(text: string): Cursor | undefined {
  if (text.length === 0 || text.length > CURSOR_CHARACTERS_MAX || !/^[A-Za-z0-9_-]+$/.test(text)) return undefined;
  let numbers: unknown;
  try {
    numbers = JSON.parse(Buffer.from(text, "base64url").toString("utf8"));
  } catch {
    return undefined; // U2: not JSON is one of the ways of being no cursor.
  }
  if (!Array.isArray(numbers) || !numbers.every(isCount)) return undefined;
  const [version, sequence, events, turn, step, attempt, epoch, index, characters] = numbers as number[];
  if (version !== CURSOR_VERSION || sequence === undefined || events === undefined) return undefined;
  if (numbers.length === 3) return { sequence, events };
  if (numbers.length !== 9 || turn === undefined || step === undefined || attempt === undefined) return undefined;
  if (epoch === undefined || index === undefined || characters === undefined) return undefined;
  return { sequence, events, place: { turn, step, attempt, epoch, index, characters } };
}
