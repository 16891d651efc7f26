// virtual-world: time that passes only when a test lets it, randomness from a seed, ids that count. One thread, no waiting.
import type { World } from "../../protocol/world.ts";

/** A small generator of good quality (mulberry32): the same seed gives the same run on every machine. */
export function seededRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296;
  };
}

interface Alarm {
  readonly at_ms: number;
  readonly order: number;
  readonly callback: () => void;
}

const BEGIN_MS = Date.UTC(2026, 0, 1);

export class VirtualWorld implements World {
  readonly random: () => number;
  #elapsed_ms = 0;
  #order = 0;
  #ids = 0;
  #alarms: Alarm[] = [];

  constructor(seed: number) {
    this.random = seededRandom(seed);
  }

  now_ms(): number {
    return BEGIN_MS + this.#elapsed_ms;
  }
  monotonic_ms(): number {
    return this.#elapsed_ms;
  }
  id(): string {
    return `id${(this.#ids++).toString(36)}`;
  }
  after(delay_ms: number, callback: () => void): () => void {
    const alarm: Alarm = { at_ms: this.#elapsed_ms + Math.max(0, delay_ms), order: this.#order++, callback };
    // Sorted insertion: earliest last, so that the next one is popped.
    let low = 0;
    let high = this.#alarms.length;
    while (low < high) {
      const middle = (low + high) >>> 1;
      const other = this.#alarms[middle]!;
      if (other.at_ms > alarm.at_ms || (other.at_ms === alarm.at_ms && other.order > alarm.order)) low = middle + 1;
      else high = middle;
    }
    this.#alarms.splice(low, 0, alarm);
    return () => {
      const index = this.#alarms.indexOf(alarm);
      if (index >= 0) this.#alarms.splice(index, 1);
    };
  }

  /** How many callbacks wait for their time, at whatever distance. */
  get pending(): number {
    return this.#alarms.length;
  }

  /** Lets everything that needs no time happen: a tick comes when no promise has anything left to do. The loop itself does not turn. */
  async settle(): Promise<void> {
    await new Promise<void>((resolve) => process.nextTick(resolve));
  }

  /** Lets time pass up to `ms` from now, alarm by alarm. */
  async advance(ms: number): Promise<void> {
    const until_ms = this.#elapsed_ms + ms;
    await this.settle();
    for (let next = this.#alarms.at(-1); next !== undefined && next.at_ms <= until_ms; next = this.#alarms.at(-1)) {
      this.#alarms.pop();
      this.#elapsed_ms = Math.max(this.#elapsed_ms, next.at_ms);
      next.callback();
      await this.settle();
    }
    this.#elapsed_ms = until_ms;
  }

  /** Advances until the condition holds; answers false when it does not within the virtual patience. */
  async until(condition: () => boolean, patience_ms: number): Promise<boolean> {
    const until_ms = this.#elapsed_ms + patience_ms;
    await this.settle();
    while (!condition()) {
      const next = this.#alarms.at(-1);
      if (next === undefined || next.at_ms > until_ms) {
        await this.advance(Math.max(0, until_ms - this.#elapsed_ms));
        return condition();
      }
      await this.advance(next.at_ms - this.#elapsed_ms);
    }
    return true;
  }
}
