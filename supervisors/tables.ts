// tables: what rests in the three buckets of supervision, and how it is read back.
//
//   WORKERS   {worker id}  → WorkerLease     expires; each worker renews its own
//   LEADER    leader       → LeaderLease     expires; the leading supervisor renews it
//   PLACEMENT {shard}      → PlacementEntry  kept; who owns the shard, under which epoch
//
// All are JSON, checked when read; unknown fields are passed over, so that a newer process may add some. A value that
// cannot be read is answered as undefined: another version's mistake must not stop a supervisor.
import { z } from "zod";
import { ID_PATTERN } from "../protocol/ids.ts";

const id = z.string().regex(ID_PATTERN);

const workerLease = z.object({
  id,
  /** Fresh at every start and after every stall: shards belong to an incarnation, not to a name. */
  incarnation: z.string().min(1).max(64),
  /** `{machine}@{version}` of every kind of actor this process can run. */
  versions: z.array(z.string().max(64)).max(256),
  draining: z.boolean(),
  owned: z.int().min(0),
  resident: z.int().min(0),
  running: z.int().min(0),
  started_at: z.string(),
});
export type WorkerLease = Readonly<z.infer<typeof workerLease>>;

const leaderLease = z.object({ id, incarnation: z.string().min(1).max(64), started_at: z.string() });
export type LeaderLease = Readonly<z.infer<typeof leaderLease>>;

const placementEntry = z.object({
  /** Empty when nobody owns the shard: its owner released it. */
  worker: z.union([id, z.literal("")]),
  /** The incarnation of the worker that the shard was given to. Of a shard that a leaving worker released: that worker's, so that it is not given back. */
  incarnation: z.string().max(64),
  /** Rises with every change of owner, and only rises. */
  epoch: z.int().min(0),
  /** A planned move: the owner is to leave and write the next entry itself. */
  moving_to: id.optional(),
  /** Who had it before, and why it changed hands: stands in the claims of the actors. */
  from: id.nullable().optional(),
  reason: z.string().max(256).optional(),
  /** When this owner got it. */
  since: z.string(),
});
export type PlacementEntry = Readonly<z.infer<typeof placementEntry>>;

export const LEADER_KEY = "leader";
export const placementKey = (shard: number): string => String(shard);
/** The shard of a key of PLACEMENT, or undefined for a key that names none of `shards`. */
export function shardOfKey(key: string, shards: number): number | undefined {
  if (!/^\d{1,6}$/.test(key)) return undefined;
  const shard = Number(key);
  return shard < shards ? shard : undefined;
}

const ENCODER = new TextEncoder();
const DECODER = new TextDecoder();

export function encodeRecord(record: WorkerLease | LeaderLease | PlacementEntry): Uint8Array {
  return ENCODER.encode(JSON.stringify(record));
}

function decodeWith<T>(schema: z.ZodType<T>, data: Uint8Array): T | undefined {
  let value: unknown;
  try {
    value = JSON.parse(DECODER.decode(data));
  } catch {
    return undefined; // not JSON: the same as a record of the wrong shape, and the caller names the key in its log
  }
  const read = schema.safeParse(value);
  return read.success ? read.data : undefined;
}
export const decodeWorkerLease = (data: Uint8Array): WorkerLease | undefined => decodeWith(workerLease, data);
export const decodeLeaderLease = (data: Uint8Array): LeaderLease | undefined => decodeWith(leaderLease, data);
export const decodePlacementEntry = (data: Uint8Array): PlacementEntry | undefined => decodeWith(placementEntry, data);
