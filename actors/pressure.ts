// pressure: whether more may be put where something waits, with hysteresis, so that the answer does not flicker.
//
//   accepting ──something waits──▶ queueing ──80 % of the bound──▶ refusing
//       ▲                            │  ▲                             │
//       └──────nothing waits─────────┘  └──────below 60 %─────────────┘
//
// Invariants:
//   PS1. `refusing` begins at REFUSE_FROM of the bound and ends below REFUSE_UNTIL of it; in between it stays as it was.
import { assert } from "../protocol/assert.ts";

export const PRESSURE_STATES = ["accepting", "queueing", "refusing"] as const;
export type PressureState = (typeof PRESSURE_STATES)[number];

/** A fifth is left for what is on its way already. */
export const REFUSE_FROM = 0.8;
/** So far below that who was refused and comes again, as told, finds room. */
export const REFUSE_UNTIL = 0.6;

export class Pressure {
  #max: number;
  #refusing = false;

  constructor(max: number) {
    assert(Number.isInteger(max) && max > 0, "a bound is a whole number above 0");
    this.#max = max;
  }

  /** With so many waiting now. */
  at(waiting: number): PressureState {
    this.#refusing = waiting >= (this.#refusing ? REFUSE_UNTIL : REFUSE_FROM) * this.#max;
    if (this.#refusing) return "refusing";
    return waiting > 0 ? "queueing" : "accepting";
  }
}
