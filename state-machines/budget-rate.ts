// budget-rate: a sliding window of requests and tokens at one provider.
//
// The window is kept in slices. A slice counts whole until all of it has left the window, so no span of `window_ms`, wherever it is laid,
// ever holds more than the limit; in return a permit comes back up to one slice late. Pure.
//
// What a call takes is taken when it is granted, in the slice of that moment, and what it did not use is given back to that very slice when it
// has ended (`rateGivenBack`): the window then holds what was used, as of when it was granted.
//
// Invariants:
//   W1. In any span of window_ms the granted requests are at most requests_max, the granted tokens at most tokens_max.
//   W2. What is refused with a wait is granted after it, if nobody else was.
//   W3. Nothing is given back that is not in the window: a slice never holds less than what the others took in it.

import { assert } from "../protocol/assert.ts";

const SLICES = 60;

export interface RateLimit {
  readonly requests_max: number | null;
  readonly tokens_max: number | null;
  readonly window_ms: number;
}

/** Oldest first, at most SLICES + 1. */
export type RateWindow = readonly { readonly slice: number; readonly requests: number; readonly tokens: number }[];

export interface RateAsk {
  readonly requests: number;
  readonly tokens: number;
}

export type RateWait =
  | { readonly kind: "free" }
  | ({ readonly kind: "wait"; readonly retry_after_ms: number } & RateAsk)
  /** More than a whole window has. */
  | ({ readonly kind: "never" } & RateAsk);

const sliceMs = ({ window_ms }: RateLimit): number => Math.max(1, Math.ceil(window_ms / SLICES));

/** Slices that may still hold something of the window that ends at `at_ms`. */
function within(limit: RateLimit, window: RateWindow, at_ms: number): RateWindow {
  const slice_ms = sliceMs(limit);
  return window.filter(({ slice }) => (slice + 1) * slice_ms > at_ms - limit.window_ms);
}

const fits = ({ requests_max, tokens_max }: RateLimit, used: RateAsk, ask: RateAsk): boolean =>
  (requests_max === null || used.requests + ask.requests <= requests_max) && (tokens_max === null || used.tokens + ask.tokens <= tokens_max);

const sumOf = (window: RateWindow): RateAsk =>
  window.reduce((sum, one) => ({ requests: sum.requests + one.requests, tokens: sum.tokens + one.tokens }), { requests: 0, tokens: 0 });

/** What the window holds at `at_ms`. */
export const rateUsed = (limit: RateLimit, window: RateWindow, at_ms: number): RateAsk => sumOf(within(limit, window, at_ms));

/** The window under a limit of another length: its slices are counted anew, each as late as anything in it can have been (W1). */
export function rateRelaid(before: RateLimit, after: RateLimit, window: RateWindow): RateWindow {
  const [before_ms, after_ms] = [sliceMs(before), sliceMs(after)];
  if (before_ms === after_ms) return window;
  const relaid = new Map<number, RateAsk>();
  for (const { slice, requests, tokens } of window) {
    const place = Math.floor(((slice + 1) * before_ms - 1) / after_ms);
    const there = relaid.get(place) ?? { requests: 0, tokens: 0 };
    relaid.set(place, { requests: there.requests + requests, tokens: there.tokens + tokens });
  }
  return [...relaid].map(([slice, sum]) => ({ slice, ...sum }));
}

/** May this be had now, or when? */
export function rateWait(limit: RateLimit, window: RateWindow, at_ms: number, ask: RateAsk): RateWait {
  const live = within(limit, window, at_ms);
  const used = sumOf(live);
  if (fits(limit, used, ask)) return { kind: "free" };
  if (!fits(limit, { requests: 0, tokens: 0 }, ask)) return { kind: "never", ...used };
  let left = used;
  for (const { slice, requests, tokens } of live) {
    left = { requests: left.requests - requests, tokens: left.tokens - tokens };
    if (fits(limit, left, ask)) return { kind: "wait", retry_after_ms: (slice + 1) * sliceMs(limit) + limit.window_ms - at_ms, ...used };
  }
  return { kind: "never", ...used };
}

/** The slice in which what is granted at `at_ms` counts. */
export const rateSlice = (limit: RateLimit, at_ms: number): number => Math.floor(at_ms / sliceMs(limit));

/** The window after something that was taken in `slice` came back unused. Where the slice has left the window there is nothing to give back. */
export function rateGivenBack(window: RateWindow, slice: number, unused: RateAsk): RateWindow {
  return window.map((one) => {
    if (one.slice !== slice) return one;
    assert(unused.requests <= one.requests && unused.tokens <= one.tokens, "W3: what comes back was taken in this slice");
    return { slice, requests: one.requests - unused.requests, tokens: one.tokens - unused.tokens };
  });
}

/** The window with this taken from it. */
export function rateTaken(limit: RateLimit, window: RateWindow, at_ms: number, ask: RateAsk): RateWindow {
  const slice = rateSlice(limit, at_ms);
  const live = within(limit, window, at_ms);
  const last = live.at(-1);
  if (last?.slice !== slice) return [...live, { slice, ...ask }];
  return [...live.slice(0, -1), { slice, requests: last.requests + ask.requests, tokens: last.tokens + ask.tokens }];
}
