// Lease: the right to a name for a while, held in a bucket whose keys expire.
//
//   free ──acquire──▶ held ──renew──▶ held ──own clock: ttl since the last renewal was SENT──▶ expired ──acquire──▶ held
//                      └──a rival's value stands there, or ours was deleted──▶ free
//
// It arms no timer. Whoever holds it renews it from its own loop, so that a loop that is stuck loses it.
//
// Invariants:
//   L1. By the holder's clock the lease ends before the broker can end it: validity counts from the moment the renewal
//       was sent, the broker's time to live from the later moment at which it was stored.
//   L2. At most one call to the bucket is under way.
//   L3. An answer that got lost is never taken for a success: validity moves only by an answer, or by finding our own
//       value at the leader, and then counts from the earliest sending that can have stored it.
//   L4. A name is taken from another only over the very value that was seen of it: a holder that renewed since then keeps it,
//       and of two that take it one gets it.
import type { Bucket, BucketEntry, CasOutcome } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { LEASE_TTL_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";

export type AcquireOutcome =
  | { readonly kind: "held" }
  /** Somebody else's value stands there. */
  | { readonly kind: "taken"; readonly value: Uint8Array; readonly revision: number }
  | { readonly kind: "unavailable"; readonly reason: string };

export type RenewOutcome =
  | { readonly kind: "held" }
  /** By our own clock it ended, or the bucket says so: everything done under it must be dropped. */
  | { readonly kind: "lost"; readonly reason: "expired" | "taken" | "deleted" }
  /** Nothing is known; it stays valid for as long as the last success lasts. */
  | { readonly kind: "unavailable"; readonly reason: string };

export interface LeaseOptions {
  readonly bucket: Bucket;
  readonly key: string;
  readonly world: World;
  readonly log: Log;
  /** Is this value in the bucket ours? Values of one holder are told by its incarnation. */
  is_mine(value: Uint8Array): boolean;
  /** Of the bucket's keys. */
  readonly ttl_ms?: number;
}

type Holding =
  | { readonly kind: "free" }
  | {
      readonly kind: "held";
      readonly revision: number;
      readonly valid_until_ms: number;
      /** When the first renewal since then was sent whose answer is not known. */
      readonly unsure_since_ms: number | undefined;
    };

export class Lease {
  readonly #options: LeaseOptions;
  readonly #ttl_ms: number;
  #holding: Holding = { kind: "free" };
  #busy = false;

  constructor(options: LeaseOptions) {
    this.#options = options;
    this.#ttl_ms = options.ttl_ms ?? LEASE_TTL_MS;
  }

  /** L1. To be asked before each act that the lease permits. */
  is_valid(): boolean {
    return this.#holding.kind === "held" && this.#options.world.monotonic_ms() < this.#holding.valid_until_ms;
  }
  /** The bucket's revision of our last write; it rises from holder to holder. */
  get revision(): number | undefined {
    return this.#holding.kind === "held" ? this.#holding.revision : undefined;
  }
  /** A call is under way; acquire and renew may not be called. */
  get busy(): boolean {
    return this.#busy;
  }

  /**
   * Takes the name when it is free, or when the value that stands there is our own.
   * Not while it is valid.
   */
  async acquire(value: Uint8Array): Promise<AcquireOutcome> {
    assert(!this.is_valid(), "a lease that is valid is renewed, not acquired");
    return this.#alone(async () => {
      const { bucket, key, is_mine } = this.#options;
      const sent_ms = this.#options.world.monotonic_ms();
      this.#holding = { kind: "free" };
      const created = await bucket.create(key, value);
      if (created.kind === "ok") return this.#hold(created.revision, sent_ms);
      if (created.kind === "unavailable") return created;
      const standing = await this.#read();
      if (standing.kind === "unavailable") return standing;
      if (standing.entry === undefined) return { kind: "unavailable", reason: "it ended between two looks" };
      if (!is_mine(standing.entry.value)) return { kind: "taken", ...valueOf(standing.entry) };
      const again_ms = this.#options.world.monotonic_ms();
      const updated = await bucket.update(key, value, standing.entry.revision);
      if (updated.kind === "ok") return this.#hold(updated.revision, again_ms);
      return updated.kind === "unavailable" ? updated : { kind: "unavailable", reason: "it changed between two looks" };
    });
  }

  /** Takes the name from a holder that is gone, over the value that was seen of it at `revision` (L4). Not while it is valid. */
  async take_over(value: Uint8Array, revision: number): Promise<AcquireOutcome> {
    assert(!this.is_valid(), "nobody takes a name from itself");
    return this.#alone(async () => {
      const sent_ms = this.#options.world.monotonic_ms();
      this.#holding = { kind: "free" };
      const written = await this.#options.bucket.update(this.#options.key, value, revision);
      if (written.kind === "ok") return this.#hold(written.revision, sent_ms);
      if (written.kind === "unavailable") return written;
      const standing = await this.#read();
      if (standing.kind === "unavailable") return standing;
      return standing.entry === undefined ? { kind: "unavailable", reason: "it ended between two looks" } : { kind: "taken", ...valueOf(standing.entry) };
    });
  }

  /** Makes it last from now on, with a new value. */
  async renew(value: Uint8Array): Promise<RenewOutcome> {
    return this.#alone(async () => {
      const before = this.#holding;
      if (before.kind === "free") return { kind: "lost", reason: "deleted" };
      if (!this.is_valid()) return this.#lose("expired");
      const sent_ms = this.#options.world.monotonic_ms();
      const outcome = await this.#options.bucket.update(this.#options.key, value, before.revision);
      if (outcome.kind === "ok") return this.#hold(outcome.revision, sent_ms);
      if (outcome.kind === "unavailable") {
        this.#holding = { ...before, unsure_since_ms: before.unsure_since_ms ?? sent_ms };
        return outcome;
      }
      const standing = await this.#read();
      if (standing.kind === "unavailable") return standing;
      if (standing.entry === undefined) return this.#lose("deleted");
      if (!this.#options.is_mine(standing.entry.value)) return this.#lose("taken");
      // L3: a renewal of ours was stored although its answer got lost.
      return this.#hold(standing.entry.revision, before.unsure_since_ms ?? before.valid_until_ms - this.#ttl_ms);
    });
  }

  /** Gives the name back at once. Once it is lost there is nothing to give. */
  async release(): Promise<CasOutcome> {
    return this.#alone(async () => {
      if (this.#holding.kind === "free") return { kind: "conflict" };
      const { revision } = this.#holding;
      this.#holding = { kind: "free" };
      return this.#options.bucket.delete(this.#options.key, revision);
    });
  }

  #hold(revision: number, sent_ms: number): { kind: "held" } {
    this.#holding = { kind: "held", revision, valid_until_ms: sent_ms + this.#ttl_ms, unsure_since_ms: undefined };
    return { kind: "held" };
  }

  #lose(reason: "expired" | "taken" | "deleted"): RenewOutcome {
    this.#holding = { kind: "free" };
    return { kind: "lost", reason };
  }

  async #read(): Promise<{ kind: "read"; entry: BucketEntry | undefined } | { kind: "unavailable"; reason: string }> {
    try {
      return { kind: "read", entry: await this.#options.bucket.get(this.#options.key) };
    } catch (error) {
      this.#options.log.warn("a lease could not be read", { key: this.#options.key, ...errorFields(error) });
      return { kind: "unavailable", reason: "it could not be read" };
    }
  }

  async #alone<T>(call: () => Promise<T>): Promise<T> {
    assert(!this.#busy, "L2: at most one call of a lease is under way");
    this.#busy = true;
    try {
      return await call();
    } finally {
      this.#busy = false;
    }
  }
}

const valueOf = ({ value, revision }: BucketEntry): { value: Uint8Array; revision: number } => ({ value, revision });
