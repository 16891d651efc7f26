// term: one leadership's right to decide, from winning the LEADER lease to losing it. It ends once, and nothing begins it again.
//
//   running ──lost by own clock, by the bucket, or by a fenced append──▶ over
//
// Invariants (of leader.ts):
//   D4. Nothing is decided unless the LEADER lease is valid by our own clock.
import type { Bus } from "../bus/port.ts";
import { pause, type World } from "../protocol/world.ts";
import type { Calm } from "./calm.ts";
import type { Lease } from "./lease.ts";
import { decodeLeaderLease, LEADER_KEY } from "./tables.ts";

/** Between two looks at a lease that the bus could not answer. */
const RETRY_MS = 250;

export interface TermOptions {
  /** Of everything that is appended in it; above every earlier term's. */
  readonly epoch: number;
  /** Of the supervisor that leads. */
  readonly incarnation: string;
  readonly lease: Lease;
  readonly bus: Bus;
  readonly world: World;
  readonly calm: Calm;
  /** Another supervisor's value stands in the LEADER bucket. */
  on_taken(): void;
}

export class Term {
  readonly epoch: number;
  /** Resolves when it is over. */
  readonly ended: Promise<"ended">;
  readonly #options: TermOptions;
  readonly #resolve: (value: "ended") => void;
  #over = false;

  constructor(options: TermOptions) {
    this.#options = options;
    this.epoch = options.epoch;
    const { promise, resolve } = Promise.withResolvers<"ended">();
    this.ended = promise;
    this.#resolve = resolve;
  }

  get over(): boolean {
    return this.#over;
  }

  may_act(): boolean {
    return !this.#over && this.#options.lease.is_valid(); // D4
  }

  /** Another's append stands in a worker's journal: do we still lead? */
  async conflict(): Promise<"mine" | "lost"> {
    const { bus, world, calm, incarnation, on_taken } = this.#options;
    for (;;) {
      if (!this.may_act()) return "lost";
      const read = await calm.attempt("the leader's lease", async () => ({ entry: await bus.bucket("LEADER").get(LEADER_KEY) }));
      if (read !== undefined) {
        const standing = read.entry === undefined ? undefined : decodeLeaderLease(read.entry.value);
        if (standing?.incarnation === incarnation) return "mine";
        on_taken();
        return "lost";
      }
      await pause(world, RETRY_MS);
    }
  }

  end(): void {
    this.#over = true;
    this.#resolve("ended");
  }
}
