// budget-windows: what an open hold took in the windows of its tenant's rates, and what comes back of it when the hold is closed.
//
//   granted ──▶ taken: so many requests and tokens, in this slice of this window
//                  │ closed, and its calls say what they used ─▶ the rest comes back; what went beyond it counts from now
//                  │ closed before anything was called ────────▶ all of it comes back
//                  └ nobody knows what was used ───────────────▶ nothing does: it leaves with its slice
//
// Pure. Windows that are laid anew (another rate, another tier) forget whose what is: then it leaves with its slice, too.
//
// Invariants:
//   BW1. What a provider's window holds is at least what the calls of closed holds are known to have used and what open holds may use.
//   BW2. Each thing taken comes back once at most: with the closing of its hold, which happens once (B4 of budget.ts).
import { type RateAsk, rateGivenBack, type RateLimit, rateTaken, type RateWindow } from "./budget-rate.ts";

/** In one slice of one window. */
export interface Taken extends RateAsk {
  readonly provider: string;
  /** A rate of the provider's own, or the tenant's tier. */
  readonly of: "rate" | "tier";
  /** Of the window under the tier; beyond some providers it is shared. */
  readonly name: string;
  readonly slice: number;
}

/** What the calls of a hold used at one provider; tokens are null where nobody knows. */
export interface RateUse {
  readonly provider: string;
  readonly requests: number;
  readonly tokens: number | null;
}

/** The windows of a budget. */
export interface Windows {
  readonly rates: Readonly<Record<string, { readonly limit: RateLimit; readonly window: RateWindow }>>;
  readonly tier?: RateLimit | null;
  readonly tier_windows?: Readonly<Record<string, RateWindow>>;
}

/** One more thing taken: what lies in the same slice is one row, so that a hold has few. */
export function takenWith(before: readonly Taken[], more: Taken): readonly Taken[] {
  const isSame = ({ provider, of, name, slice }: Taken): boolean => provider === more.provider && of === more.of && name === more.name && slice === more.slice;
  const there = before.find(isSame);
  if (there === undefined) return [...before, more];
  return before.map((one) => (one === there ? { ...one, requests: one.requests + more.requests, tokens: one.tokens + more.tokens } : one));
}

/** `nothing`: no call was made. `unknown`: what the calls used is not known. */
export type HoldUse = { readonly kind: "nothing" } | { readonly kind: "unknown" } | { readonly kind: "known"; readonly by: readonly RateUse[] };

const none: RateAsk = { requests: 0, tokens: 0 };
const plus = (a: RateAsk, b: RateAsk): RateAsk => ({ requests: a.requests + b.requests, tokens: a.tokens + b.tokens });
const isSome = ({ requests, tokens }: RateAsk): boolean => requests > 0 || tokens > 0;

/** The windows after a hold that took this was closed, and what came back to each provider. */
export function givenBack(
  windows: Windows,
  taken: readonly Taken[],
  use: HoldUse,
  at_ms: number,
): { readonly windows: Windows; readonly unused: readonly RateUse[] } {
  if (use.kind === "unknown") return { windows, unused: [] };
  let now = windows;
  const unused: RateUse[] = [];
  for (const provider of new Set(taken.map((one) => one.provider))) {
    const mine = taken.filter((one) => one.provider === provider);
    const whole = mine.reduce<RateAsk>(plus, none);
    const known = use.kind === "known" ? use.by.find((one) => one.provider === provider) : undefined;
    const used: RateAsk = known === undefined ? none : { requests: known.requests, tokens: known.tokens ?? whole.tokens };
    let left: RateAsk = { requests: Math.max(0, whole.requests - used.requests), tokens: Math.max(0, whole.tokens - used.tokens) };
    if (isSome(left)) unused.push({ provider, ...left });
    // The oldest first: what was used is kept where it stays longest, so that no span holds more than it should (W1 of budget-rate.ts).
    for (const one of mine) {
      const back: RateAsk = { requests: Math.min(left.requests, one.requests), tokens: Math.min(left.tokens, one.tokens) };
      left = { requests: left.requests - back.requests, tokens: left.tokens - back.tokens };
      if (isSome(back)) now = changed(now, one, (_, window) => rateGivenBack(window, one.slice, back));
    }
    const beyond: RateAsk = { requests: Math.max(0, used.requests - whole.requests), tokens: Math.max(0, used.tokens - whole.tokens) };
    const last = mine.at(-1);
    if (isSome(beyond) && last !== undefined) now = changed(now, last, (limit, window) => rateTaken(limit, window, at_ms, beyond)); // BW1
  }
  return { windows: now, unused };
}

function changed(windows: Windows, { of, name }: Taken, change: (limit: RateLimit, window: RateWindow) => RateWindow): Windows {
  const { rates, tier, tier_windows = {} } = windows;
  if (of === "tier") {
    const window = tier_windows[name];
    if (!tier || window === undefined) return windows;
    return { ...windows, tier_windows: { ...tier_windows, [name]: change(tier, window) } };
  }
  const rate = Object.hasOwn(rates, name) ? rates[name] : undefined;
  if (rate === undefined) return windows;
  return { ...windows, rates: { ...rates, [name]: { limit: rate.limit, window: change(rate.limit, rate.window) } } };
}
