// rate-tiers: the rates at each provider that a tenant can be given by one word. What a tenant was given rests in its budget as numbers, so a
// change of this table changes nobody's rates before they are set anew, and no replay.

/** For every provider that has no rate of its own, each with a window of its own. */
export interface RateTier {
  readonly name: string;
  readonly requests_max: number | null;
  readonly tokens_max: number | null;
  readonly window_ms: number;
}

const MINUTE_MS = 60_000;

/** Cheapest first. Sized after what providers give to their own customers, from a trial to a large production account. */
export const RATE_TIERS = [
  { name: "trial", requests_max: 20, tokens_max: 40_000, window_ms: MINUTE_MS },
  { name: "standard", requests_max: 600, tokens_max: 1_000_000, window_ms: MINUTE_MS },
  { name: "scale", requests_max: 6_000, tokens_max: 10_000_000, window_ms: MINUTE_MS },
] as const satisfies readonly RateTier[];

export const RATE_TIER_NAMES: readonly string[] = RATE_TIERS.map(({ name }) => name);

export function rateTier(name: string): RateTier | undefined {
  return RATE_TIERS.find((tier) => tier.name === name);
}
