// budget-table: a table of many rows that is changed by copying little of it: the rows lie in buckets, and a change copies one bucket.
//
// A context is never written into. Copying an object of some thousand rows for every reservation would cost more than all the rest of the
// step; copying one of BUCKETS parts of it does not. Plain JSON, so that it rests in a snapshot as it is. Within a bucket the rows keep
// the order in which they were put, which is how the oldest are found.
import { assert } from "../protocol/assert.ts";
import type { Json, JsonObject } from "../protocol/json.ts";

const BUCKETS = 32;

/** Always BUCKETS long. Keys hold a slash, so none is a number (numbers would lose their order) or a name of Object's own. */
export type Table<T> = readonly Readonly<Record<string, T>>[];

export function emptyTable<T>(): Table<T> {
  return Array.from({ length: BUCKETS }, () => ({}));
}

/** FNV-1a over UTF-16 units: the same in every process, for ever: it is part of what rests in snapshots. */
function bucketOf(key: string): number {
  assert(key.includes("/"), "a key of a table holds a slash");
  let hash = 0x811c9dc5;
  for (let at = 0; at < key.length; at++) hash = Math.imul(hash ^ key.charCodeAt(at), 0x01000193);
  return (hash >>> 0) % BUCKETS;
}

export function tableGet<T>(table: Table<T>, key: string): T | undefined {
  const bucket = table[bucketOf(key)];
  return bucket !== undefined && Object.hasOwn(bucket, key) ? bucket[key] : undefined;
}

/** Puts a row in the place it has, or as the newest. */
export function tablePut<T>(table: Table<T>, key: string, row: T): Table<T> {
  const at = bucketOf(key);
  return table.map((bucket, index) => (index === at ? { ...bucket, [key]: row } : bucket));
}

export function tableDrop<T>(table: Table<T>, key: string): Table<T> {
  const at = bucketOf(key);
  return table.map((bucket, index) => {
    if (index !== at || !Object.hasOwn(bucket, key)) return bucket;
    const { [key]: _, ...others } = bucket;
    return others;
  });
}

/** Puts a row as the newest; the oldest rows of its bucket leave when it has more than `rows_max / BUCKETS`. */
export function tableRemember<T>(table: Table<T>, key: string, row: T, rows_max: number): Table<T> {
  const at = bucketOf(key);
  return table.map((bucket, index) => {
    if (index !== at) return bucket;
    const { [key]: _, ...others } = bucket;
    const kept = Object.entries(others);
    return Object.fromEntries([...kept.slice(Math.max(0, kept.length + 1 - Math.ceil(rows_max / BUCKETS))), [key, row]]);
  });
}

export function* tableRows<T>(table: Table<T>): Generator<readonly [string, T]> {
  for (const bucket of table) for (const key in bucket) yield [key, bucket[key] as T];
}

/** How many rows, if the value is a table; else undefined. */
export function tableSize(value: Json): number | undefined {
  const isBucket = (bucket: Json): boolean =>
    typeof bucket === "object" && bucket !== null && !Array.isArray(bucket) && Object.keys(bucket).every((key) => key.includes("/"));
  if (!Array.isArray(value) || value.length !== BUCKETS || !value.every(isBucket)) return undefined;
  return value.reduce((sum: number, bucket) => sum + Object.keys(bucket as JsonObject).length, 0);
}
