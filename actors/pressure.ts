// pressure: whether more may be put where something waits, with hysteresis, so that the answer does not flicker.
//
//   accepting ──something waits──▶ queueing ──80 % of the bound──▶ refusing
//       ▲                            │  ▲                             │
//       └──────nothing waits─────────┘  └──────below 60 %─────────────┘
//
// 80 % where everything runs on one machine (`up`); 90 % where each role is a process of its own: what is on its way there is divided among many of them,
// and each sees a part. TROUPE_REFUSE_FROM_PERCENT says another share.
//
// Invariants:
//   PS1. `refusing` begins at `refuse_percent` of the bound and ends REFUSE_GAP_PERCENT below that; in between it stays as it was.
import { assert } from "../protocol/assert.ts";
import { REFUSE_PERCENT_EMBEDDED } from "../protocol/limits.ts";

export const PRESSURE_STATES = ["accepting", "queueing", "refusing"] as const;
export type PressureState = (typeof PRESSURE_STATES)[number];

/** So far below where it began that who was refused and comes again, as told, finds room. */
const REFUSE_GAP_PERCENT = 20;
/** With less nothing would ever be taken again. */
export const REFUSE_PERCENT_MIN = REFUSE_GAP_PERCENT + 10;

export class Pressure {
  #max: number;
  #percent: number;
  #refusing = false;

  constructor(max: number, refuse_percent = REFUSE_PERCENT_EMBEDDED) {
    assert(Number.isInteger(max) && max > 0, "a bound is a whole number above 0");
    assert(refuse_percent >= REFUSE_PERCENT_MIN && refuse_percent <= 100, "more is refused from a share of the bound on, and taken again somewhere below");
    this.#max = max;
    this.#percent = refuse_percent;
  }

  /** With so many waiting now. */
  at(waiting: number): PressureState {
    this.#refusing = waiting * 100 >= (this.#refusing ? this.#percent - REFUSE_GAP_PERCENT : this.#percent) * this.#max;
    if (this.#refusing) return "refusing";
    return waiting > 0 ? "queueing" : "accepting";
  }
}
