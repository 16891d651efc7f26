// budget-sessions: how many sessions a tenant has, where it may have only so many: each has a place, by its id, from its creation to its end.
//
//   session.create ──session.acquire──▶ a place is free: taken     ──terminated: session.release──▶ free
//                          └──────────▶ none is: `sessions_exceeded`
//   a call of a session without one (it is older than the bound) takes one, whether one is free or not: what runs is counted, never stopped
//
// Counted only while there is a bound: else a budget would grow with everything that ever was. A place whose session never came to be, or whose end was
// not told, is found when places run out: the refusal names those that were not heard of for longest, and who asked looks them up
// (actors/session-places.ts). Pure.
//
// Invariants:
//   SP1. A session that asks for a place is given one only where fewer than the bound are taken; asking again changes nothing.
//   SP3. Nobody is doubted who was heard of in the last DOUBTED_AFTER_MS.
//   SP2. At most SESSIONS_COUNTED_MAX places are kept, whatever the bound says.
import { SESSIONS_COUNTED_MAX } from "../protocol/limits.ts";
import { emptyTable, type Table, tableDrop, tableGet, tablePut, tableRows } from "./budget-table.ts";

/** Looked up by who was refused: some milliseconds each. */
const DOUBTED_MAX = 32;
/**
 * Who took a place so lately may be about to be created: nobody doubts it, or its place would be given twice. A worker that stands still between the two
 * has lost its shard long before, and whoever creates the session then asks anew.
 */
export const DOUBTED_AFTER_MS = 60_000;
/** A call of a session says that it lives; one that said so lately need not be written down again. */
const HEARD_AGAIN_MS = 60 * 60 * 1000;

export interface SessionPlaces {
  readonly max: number;
  readonly taken: number;
  /** `session/{id}` → when it was heard of. */
  readonly by: Table<number>;
}

const keyOf = (session: string): string => `session/${session}`;

/** What is taken stays taken under another bound. */
export function placesWith(before: SessionPlaces | undefined, max: number | null): SessionPlaces | undefined {
  if (max === null) return undefined;
  return before === undefined ? { max, taken: 0, by: emptyTable() } : { ...before, max };
}

const put = (places: SessionPlaces, key: string, at_ms: number, more: 0 | 1): SessionPlaces => ({
  ...places,
  taken: places.taken + more,
  by: tablePut(places.by, key, at_ms),
});

export type PlaceTaken =
  | { readonly kind: "taken"; readonly places: SessionPlaces; readonly repeated: boolean }
  /** SP3. `doubted`: those that were not heard of for longest. */
  | { readonly kind: "full"; readonly doubted: readonly string[] };

/** SP1 */
export function placeTaken(places: SessionPlaces, session: string, at_ms: number): PlaceTaken {
  const key = keyOf(session);
  if (tableGet(places.by, key) !== undefined) return { kind: "taken", places: put(places, key, at_ms, 0), repeated: true };
  if (places.taken < Math.min(places.max, SESSIONS_COUNTED_MAX)) return { kind: "taken", places: put(places, key, at_ms, 1), repeated: false };
  const old = [...tableRows(places.by)].filter(([, heard_ms]) => at_ms - heard_ms >= DOUBTED_AFTER_MS);
  const oldest = old.sort(([, a], [, b]) => a - b).slice(0, DOUBTED_MAX);
  return { kind: "full", doubted: oldest.map(([name]) => name.slice(name.indexOf("/") + 1)) };
}

/** A call of this session: it is there. SP2 */
export function placeHeard(places: SessionPlaces | undefined, session: string, at_ms: number): SessionPlaces | undefined {
  if (places === undefined) return undefined;
  const key = keyOf(session);
  const heard_ms = tableGet(places.by, key);
  if (heard_ms === undefined) return places.taken < SESSIONS_COUNTED_MAX ? put(places, key, at_ms, 1) : places;
  return at_ms - heard_ms < HEARD_AGAIN_MS ? places : put(places, key, at_ms, 0);
}

/** Undefined: it had none. */
export function placeLeft(places: SessionPlaces, session: string): SessionPlaces | undefined {
  const key = keyOf(session);
  if (tableGet(places.by, key) === undefined) return undefined;
  return { ...places, taken: places.taken - 1, by: tableDrop(places.by, key) };
}
