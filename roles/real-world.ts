// real-world: the World of a real process.
import { randomBytes } from "node:crypto";
import type { World } from "../protocol/world.ts";

/** Node fires a longer timer at once; longer waits are walked in steps of this. */
const TIMEOUT_MAX_MS = 2 ** 31 - 1;

export function realWorld(): World {
  function after(delay_ms: number, callback: () => void): () => void {
    if (delay_ms <= TIMEOUT_MAX_MS) {
      const timer = setTimeout(callback, Math.max(0, delay_ms));
      return () => clearTimeout(timer);
    }
    let cancel: () => void = () => undefined;
    const timer = setTimeout(() => (cancel = after(delay_ms - TIMEOUT_MAX_MS, callback)), TIMEOUT_MAX_MS);
    cancel = () => clearTimeout(timer);
    return () => cancel();
  }
  return {
    now_ms: () => Date.now(),
    monotonic_ms: () => performance.now(),
    after,
    random: () => Math.random(),
    id: () => randomBytes(15).toString("base64url"),
  };
}
