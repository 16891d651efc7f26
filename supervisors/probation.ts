// probation: which workers died so often of late that they get nothing while another can take it: a restart loop moves no shards.
// Kept by each supervisor over its leaderships; a supervisor that just began trusts everybody.
import type { World } from "../protocol/world.ts";

/** A worker that died this often within the window is on probation until the window has passed. */
const DEATHS_MAX = 3;
const DEATHS_WINDOW_MS = 5 * 60_000;

export class Probation {
  readonly #world: World;
  readonly #deaths = new Map<string, number[]>();

  constructor(world: World) {
    this.#world = world;
  }

  died(worker: string, at_ms: number): void {
    this.#deaths.set(worker, [...this.#lately(worker), at_ms].slice(-DEATHS_MAX - 1));
  }

  has(worker: string): boolean {
    return this.#lately(worker).length >= DEATHS_MAX;
  }

  /** Nobody asks for it now: it leaves memory, unless what is known of it still counts. */
  forget(worker: string): void {
    if (this.#lately(worker).length === 0) this.#deaths.delete(worker);
  }

  #lately(worker: string): number[] {
    const now_ms = this.#world.monotonic_ms();
    return (this.#deaths.get(worker) ?? []).filter((at_ms) => now_ms - at_ms < DEATHS_WINDOW_MS);
  }
}
