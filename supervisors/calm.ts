// calm: for how long the bus has been well, as one supervisor sees it, so that nobody is judged for what the bus did (D3 of leader.ts).
//
//   all is well ──a call failed, the connection was lost, the notices began anew──▶ troubled ──one TTL without any of these──▶ all is well
//
// The workers' leases have a calm of their own: their bucket has a leader of its own in the broker, which may be away while everything
// else is there. It is asked for anything, once in the time of a renewal.
//
// Owns: what is known of outages. Leaves to others: what follows from it (verdicts.ts, succession.ts).
import type { Bus } from "../bus/port.ts";
import { LEASE_RENEW_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";

/** Nothing need stand under it: any answer will do. */
const PROBED_KEY = "leader";

export interface CalmOptions {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** Of a lease: who could not renew during an outage has had the time to do it after that. */
  readonly ttl_ms: number;
}

export class Calm {
  readonly #options: CalmOptions;
  /** When the bus was last seen to fail, or when we began to look. */
  #since_ms: number;
  /** The same of the workers' leases alone. */
  #leases_since_ms: number;
  #probing_since_ms: number | undefined;
  #probed_ms = Number.NEGATIVE_INFINITY;

  constructor(options: CalmOptions) {
    this.#options = options;
    this.#since_ms = options.world.monotonic_ms();
    this.#leases_since_ms = this.#since_ms;
  }

  /** The bus failed just now. */
  outage(): void {
    this.#since_ms = this.#options.world.monotonic_ms();
  }

  /** Has the bus been well for as long as a lease lasts? */
  may_judge(): boolean {
    const { bus, world, ttl_ms } = this.#options;
    return bus.state === "connected" && world.monotonic_ms() - this.#since_ms >= ttl_ms;
  }

  /** By the leases' silence: only while they could have been renewed. */
  may_judge_leases(): boolean {
    const now_ms = this.#options.world.monotonic_ms();
    if (this.#probing_since_ms !== undefined && now_ms - this.#probing_since_ms >= LEASE_RENEW_MS) return false;
    return this.may_judge() && now_ms - this.#leases_since_ms >= this.#options.ttl_ms;
  }

  /** Asks the workers' bucket for anything, once in the time of a renewal: what it answers late or not at all, it did not take either. */
  async probe_leases(now_ms: number): Promise<void> {
    const { bus, world, log } = this.#options;
    if (this.#probing_since_ms !== undefined || now_ms - this.#probed_ms < LEASE_RENEW_MS) return;
    this.#probing_since_ms = this.#probed_ms = now_ms;
    try {
      await bus.bucket("WORKERS").get(PROBED_KEY);
      if (world.monotonic_ms() - now_ms >= LEASE_RENEW_MS) this.#leases_since_ms = world.monotonic_ms();
    } catch (error) {
      this.#leases_since_ms = world.monotonic_ms();
      log.debug("the workers' leases cannot be read", errorFields(error));
    }
    this.#probing_since_ms = undefined;
  }

  /** Reads from the bus; undefined, and an outage noted, when it cannot answer. */
  async attempt<T>(what: string, read: () => Promise<T>): Promise<T | undefined> {
    try {
      return await read();
    } catch (error) {
      this.outage();
      this.#options.log.warn("the supervisor could not read", { what, ...errorFields(error) });
      return undefined;
    }
  }
}
