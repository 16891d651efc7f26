// memory-bucket: a bucket of the in-memory broker, as one connection sees it.
import type { MemoryStream, StoreOutcome } from "./memory-stream.ts";
import { BucketTold, entryOf, HEADER_OPERATION, isGone } from "./bucket-told.ts";
import type { Bucket, BucketChange, BucketEntry, BucketName, CasOutcome, Headers, StoredMessage, Subscription } from "./port.ts";
import { bucketStream, bucketSubject } from "./streams.ts";

const WRITE_PATIENCE_MS = 3_000;

type Reached<T> = { readonly kind: "answer"; readonly value: T } | { readonly kind: "not_sent" | "silence"; readonly reason: string };

/** What a bucket needs of the connection it is seen through. */
export interface BucketConnection {
  readonly broker: { stream(name: string): MemoryStream };
  reach<T>(kind: "bucket_write", subject: string, patience_ms: number, act: () => T): Promise<Reached<T>>;
  readFrom<T>(kind: "bucket_read", subject: string, act: () => T): Promise<T>;
  guard(what: string, call: () => unknown): void;
  followStream(
    name: string,
    filter: string,
    start: { from_sequence: number; on_connected?: () => number },
    on_message: (message: StoredMessage) => Promise<void> | void,
  ): Subscription;
}

export class MemoryBucket implements Bucket {
  #connection: BucketConnection;
  #name: BucketName;

  constructor(connection: BucketConnection, name: BucketName) {
    this.#connection = connection;
    this.#name = name;
  }

  async get(key: string): Promise<BucketEntry | undefined> {
    const message = await this.#connection.readFrom("bucket_read", bucketSubject(this.#name, key), () => this.#stream().last(bucketSubject(this.#name, key)));
    return message === undefined || isGone(message) ? undefined : entryOf(this.#name, message);
  }

  async all(): Promise<BucketEntry[]> {
    return this.#connection.readFrom("bucket_read", bucketSubject(this.#name, ">"), () => this.#present().map((message) => entryOf(this.#name, message)));
  }

  create(key: string, value: Uint8Array): Promise<CasOutcome> {
    return this.#write(key, () => {
      // A marker of an expired or deleted key is a message, and the one to build on.
      const last = this.#stream().last(bucketSubject(this.#name, key));
      return this.#store(key, value, last !== undefined && isGone(last) ? last.sequence : 0, {});
    });
  }
  update(key: string, value: Uint8Array, revision: number): Promise<CasOutcome> {
    return this.#write(key, () => this.#store(key, value, revision, {}));
  }
  delete(key: string, revision: number): Promise<CasOutcome> {
    return this.#write(key, () => this.#store(key, new Uint8Array(0), revision, { [HEADER_OPERATION]: "DEL" }));
  }

  async watch(listener: (change: BucketChange) => void): Promise<Subscription> {
    const told = new BucketTold(this.#name, (change) => this.#connection.guard("a bucket's watcher threw", () => listener(change)));
    const compare = (): number => {
      const { last_sequence } = this.#stream();
      told.compare(this.#present(), last_sequence);
      return last_sequence + 1;
    };
    await this.#connection.readFrom("bucket_read", bucketSubject(this.#name, ">"), () => undefined);
    const start = { from_sequence: 1, on_connected: compare };
    return this.#connection.followStream(bucketStream(this.#name), bucketSubject(this.#name, ">"), start, (message) => told.hear(message));
  }

  async #write(key: string, store: () => StoreOutcome): Promise<CasOutcome> {
    const outcome = await this.#connection.reach("bucket_write", bucketSubject(this.#name, key), WRITE_PATIENCE_MS, store);
    if (outcome.kind !== "answer") return { kind: "unavailable", reason: outcome.reason };
    if (outcome.value.kind === "stored") return { kind: "ok", revision: outcome.value.sequence };
    return outcome.value.kind === "conflict" ? { kind: "conflict" } : { kind: "unavailable", reason: outcome.value.kind };
  }

  #store(key: string, value: Uint8Array, revision: number, headers: Headers): StoreOutcome {
    return this.#stream().store(bucketSubject(this.#name, key), value, headers, revision);
  }
  #stream(): MemoryStream {
    return this.#connection.broker.stream(bucketStream(this.#name));
  }
  #present(): StoredMessage[] {
    return this.#stream()
      .lastOfEach(bucketSubject(this.#name, ">"))
      .filter((message) => !isGone(message));
  }
}
