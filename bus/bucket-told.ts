// bucket-told: what a bucket's watcher has been told, so that it converges on the truth however often it is told again. Shared by
// both adapters.
//
// Invariants:
//   K2. After a cut the watcher is told the difference between what it knows and all keys as the leader has them, nothing else.
//   K3. A key is told `gone` once, however often the broker marks it.
import { type BucketChange, type BucketEntry, type BucketName, headerOf, type StoredMessage } from "./port.ts";
import { bucketKey } from "./streams.ts";

export const HEADER_OPERATION = "KV-Operation";
export const HEADER_MARKER = "Nats-Marker-Reason";

/** An expired or deleted key leaves a marker; a marker is no entry. */
export function isGone(message: StoredMessage): boolean {
  return headerOf(message.headers, HEADER_OPERATION) !== undefined || headerOf(message.headers, HEADER_MARKER) !== undefined;
}

export function entryOf(bucket: BucketName, message: StoredMessage): BucketEntry {
  return { key: bucketKey(bucket, message.subject), value: message.data, revision: message.sequence };
}

export class BucketTold {
  #bucket: BucketName;
  #tell: (change: BucketChange) => void;
  /** Revision of each present key as it was told. */
  #revisions = new Map<string, number>();

  /** `tell` does not throw. */
  constructor(bucket: BucketName, tell: (change: BucketChange) => void) {
    this.#bucket = bucket;
    this.#tell = tell;
  }

  /** One message of the bucket's stream, in order. */
  hear(message: StoredMessage): void {
    if (isGone(message)) this.#gone(bucketKey(this.#bucket, message.subject), message.sequence);
    else this.#put(entryOf(this.#bucket, message));
  }

  /** The last message of every key, when the stream was at least at `last_sequence` (K2). */
  compare(messages: readonly StoredMessage[], last_sequence: number): void {
    const present = new Set<string>();
    for (const message of messages) {
      if (isGone(message)) continue;
      const entry = entryOf(this.#bucket, message);
      present.add(entry.key);
      this.#put(entry);
    }
    for (const [key, revision] of [...this.#revisions]) if (!present.has(key)) this.#gone(key, Math.max(revision, last_sequence));
  }

  #put(entry: BucketEntry): void {
    if ((this.#revisions.get(entry.key) ?? 0) >= entry.revision) return;
    this.#revisions.set(entry.key, entry.revision);
    this.#tell({ kind: "put", entry });
  }

  #gone(key: string, revision: number): void {
    if ((this.#revisions.get(key) ?? Infinity) > revision) return;
    this.#revisions.delete(key);
    this.#tell({ kind: "gone", key, revision });
  }
}
