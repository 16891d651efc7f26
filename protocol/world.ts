// world: time, timers, randomness and ids as parameters. main.ts makes the real one; tests and the simulation make theirs.

export interface World {
  /** Wall clock, milliseconds since 1970. May jump. Only for stamping what people read. */
  now_ms(): number;
  /** Never falls and never jumps. For leases, patience and durations. */
  monotonic_ms(): number;
  /** Calls back once after `delay_ms`; the answer cancels. Delays above a day are fine. */
  after(delay_ms: number, callback: () => void): () => void;
  /** In [0, 1). */
  random(): number;
  /** A fresh id of the alphabet of ids, unguessable in the real world. */
  id(): string;
}

/** Waits in the given world. */
export function pause(world: World, ms: number): Promise<void> {
  return new Promise((resolve) => void world.after(ms, resolve));
}

/** RFC 3339 UTC with milliseconds, as every time on the wire is written. */
export function timestamp(ms: number): string {
  return new Date(ms).toISOString();
}
