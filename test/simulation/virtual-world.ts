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
  /** Undefined: it was called off. */
  callback: (() => void) | undefined;
}

const isSooner = (one: Alarm, other: Alarm): boolean => one.at_ms < other.at_ms || (one.at_ms === other.at_ms && one.order < other.order);

/** Alarms, the next one first. Most are called off before they ring, so that costs nothing: they leave when they come up, or when they are most. */
class Alarms {
  #heap: Alarm[] = [];
  #off = 0;

  add(alarm: Alarm): void {
    this.#heap.push(alarm);
    this.#rise(this.#heap.length - 1);
  }

  callOff(alarm: Alarm): void {
    if (alarm.callback === undefined) return;
    alarm.callback = undefined;
    if (++this.#off > 64 && this.#off * 2 > this.#heap.length) {
      const standing = this.#heap.filter(({ callback }) => callback !== undefined);
      // In order is in heap order.
      this.#heap = standing.sort((one, other) => (isSooner(one, other) ? -1 : 1));
      this.#off = 0;
    }
  }

  get standing(): number {
    return this.#heap.length - this.#off;
  }

  get next(): Alarm | undefined {
    while (this.#heap[0] !== undefined && this.#heap[0].callback === undefined) {
      this.#shift();
      this.#off--;
    }
    return this.#heap[0];
  }

  /** The next one rings. */
  ring(): () => void {
    const alarm = this.#shift();
    const { callback } = alarm!;
    alarm!.callback = undefined;
    return callback!;
  }

  #shift(): Alarm | undefined {
    const [first] = this.#heap;
    const last = this.#heap.pop();
    if (last !== undefined && last !== first) {
      this.#heap[0] = last;
      this.#sink();
    }
    return first;
  }

  #rise(from: number): void {
    const heap = this.#heap;
    const alarm = heap[from]!;
    let at = from;
    while (at > 0) {
      const parent = (at - 1) >>> 1;
      if (!isSooner(alarm, heap[parent]!)) break;
      heap[at] = heap[parent]!;
      at = parent;
    }
    heap[at] = alarm;
  }

  #sink(): void {
    const heap = this.#heap;
    const alarm = heap[0]!;
    let at = 0;
    for (;;) {
      let child = 2 * at + 1;
      if (child >= heap.length) break;
      if (child + 1 < heap.length && isSooner(heap[child + 1]!, heap[child]!)) child += 1;
      if (!isSooner(heap[child]!, alarm)) break;
      heap[at] = heap[child]!;
      at = child;
    }
    heap[at] = alarm;
  }
}

export const BEGIN_MS = Date.UTC(2026, 0, 1);

export class VirtualWorld implements World {
  readonly random: () => number;
  #elapsed_ms = 0;
  #order = 0;
  #ids = 0;
  readonly #alarms = new Alarms();

  readonly #begin_ms: number;

  constructor(seed: number, begin_ms = BEGIN_MS) {
    this.random = seededRandom(seed);
    this.#begin_ms = begin_ms;
  }

  now_ms(): number {
    return this.#begin_ms + this.#elapsed_ms;
  }
  monotonic_ms(): number {
    return this.#elapsed_ms;
  }
  id(): string {
    return `id${(this.#ids++).toString(36)}`;
  }
  after(delay_ms: number, callback: () => void): () => void {
    const alarm: Alarm = { at_ms: this.#elapsed_ms + Math.max(0, delay_ms), order: this.#order++, callback };
    this.#alarms.add(alarm);
    return () => this.#alarms.callOff(alarm);
  }

  /** How many callbacks wait for their time, at whatever distance. */
  get pending(): number {
    return this.#alarms.standing;
  }

  /** Lets everything that needs no time happen: a tick comes when no promise has anything left to do. The loop itself does not turn. */
  async settle(): Promise<void> {
    await new Promise<void>((resolve) => process.nextTick(resolve));
  }

  /** Lets time pass up to `ms` from now, alarm by alarm. */
  async advance(ms: number): Promise<void> {
    const until_ms = this.#elapsed_ms + ms;
    await this.settle();
    for (let next = this.#alarms.next; next !== undefined && next.at_ms <= until_ms; next = this.#alarms.next) {
      this.#elapsed_ms = Math.max(this.#elapsed_ms, next.at_ms);
      this.#alarms.ring()();
      await this.settle();
    }
    this.#elapsed_ms = until_ms;
  }

  /** Advances until the condition holds; answers false when it does not within the virtual patience. */
  async until(condition: () => boolean, patience_ms: number): Promise<boolean> {
    const until_ms = this.#elapsed_ms + patience_ms;
    await this.settle();
    while (!condition()) {
      const next = this.#alarms.next;
      if (next === undefined || next.at_ms > until_ms) {
        await this.advance(Math.max(0, until_ms - this.#elapsed_ms));
        return condition();
      }
      await this.advance(next.at_ms - this.#elapsed_ms);
    }
    return true;
  }
}
