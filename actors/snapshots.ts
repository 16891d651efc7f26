// snapshots: when an actor's state is written beside its journal, so that whoever restores it need not replay the whole.
//
// A large snapshot is written seldom: what is written of snapshots stays below what is written of the journal. One that is not stored costs time at
// the next restoring, and nothing else.
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { SNAPSHOT_ENTRIES_MAX, SNAPSHOT_EVERY_ENTRIES, SNAPSHOT_EVERY_MS } from "../protocol/limits.ts";
import type { Log } from "../protocol/log.ts";
import { actorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import type { ActorState, Core } from "../state-machines/step.ts";
import { type CommitHead, encodeSnapshot } from "./restore.ts";

export interface SnapshotsOptions {
  readonly actor: ActorAddress;
  readonly core: Core;
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
}

export class Snapshots {
  readonly #options: SnapshotsOptions;
  /** Of the last one. */
  #seq = 0;
  #bytes = 0;
  #at_ms: number;
  /** Appended since the last one. */
  #journal_bytes = 0;
  /** Under way; at most one. */
  #writing: Promise<void> | undefined;

  constructor(options: SnapshotsOptions) {
    this.#options = options;
    this.#at_ms = options.world.monotonic_ms();
  }

  /** The actor was restored from a snapshot at `seq`; 0 without one. */
  restored(seq: number): void {
    this.#seq = seq;
  }
  appended(bytes: number): void {
    this.#journal_bytes += bytes;
  }
  /** The one under way is over. */
  async written(): Promise<void> {
    await this.#writing;
  }

  /**
   * Begins to write one, when it is time. Only when every outgoing message up to it is published, which the commit has awaited. It is written beside
   * the commits that follow, one at a time: an actor that commits without pause (a budget) would keep one in sixty of its callers waiting for a
   * second fsync.
   */
  maybe_write(state: ActorState | undefined, last_sequence: number, head: CommitHead | undefined): void {
    if (state === undefined || head === undefined || this.#writing !== undefined) return;
    const { world, core } = this.#options;
    const entries = state.seq - this.#seq;
    const old = world.monotonic_ms() - this.#at_ms >= SNAPSHOT_EVERY_MS;
    const worth = entries >= SNAPSHOT_EVERY_ENTRIES && (this.#journal_bytes >= this.#bytes || entries >= SNAPSHOT_ENTRIES_MAX);
    if (entries === 0 || (!worth && !old)) return;
    const data = encodeSnapshot(core, state, last_sequence, head);
    this.#bytes = data.byteLength;
    this.#journal_bytes = 0;
    this.#seq = state.seq;
    this.#at_ms = world.monotonic_ms();
    this.#writing = this.#write(data).finally(() => (this.#writing = undefined));
  }

  async #write(data: Uint8Array): Promise<void> {
    const { actor, bus, log } = this.#options;
    const outcome = await bus.publish(actorSubject(actor, "snapshot"), data);
    if (outcome.kind !== "stored")
      log.warn("snapshot not stored; the journal is replayed from the one before", { actor: actorPath(actor), outcome: outcome.kind });
  }
}
