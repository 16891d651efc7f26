// request-limiter: how many requests of one tenant a gateway serves in a second. It protects the gateway and its other tenants, not money or
// providers: those rates are exact, and are decided by the tenant's budget.
//
//   a bucket per tenant: refilled at `requests_per_s`, at most BURST_S seconds of it; a request takes one, and without one is told when there is
//
// Invariants:
//   RL1. In any span of s seconds a tenant is served at most (s + BURST_S) × requests_per_s requests here.
//   RL2. What one tenant asks takes nothing from another.
//   RL3. A refusal says after how long the next request is served.
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { World } from "../protocol/world.ts";

/** A client that opens many streams at once, after being away, is no flood. */
const BURST_S = 2;
/** Buckets kept; above it the one that was asked longest ago begins anew, full. */
const TENANTS_MAX = 10_000;

export interface RequestLimiter {
  /** Takes one request of the tenant's, or answers the refusal. */
  refusal(tenant: string): ErrorBody | undefined;
}

export function createRequestLimiter({ requests_per_s, world }: { readonly requests_per_s: number; readonly world: World }): RequestLimiter {
  /** Least lately asked first. */
  const buckets = new Map<string, { left: number; at_ms: number }>();
  const most = BURST_S * requests_per_s;
  return {
    refusal(tenant) {
      const now_ms = world.monotonic_ms();
      const known = buckets.get(tenant);
      const left = known === undefined ? most : Math.min(most, known.left + ((now_ms - known.at_ms) * requests_per_s) / 1000);
      buckets.delete(tenant);
      buckets.set(tenant, { left: left >= 1 ? left - 1 : left, at_ms: now_ms });
      if (buckets.size > TENANTS_MAX) buckets.delete(buckets.keys().next().value!);
      if (left >= 1) return undefined;
      const retry_after_ms = Math.floor(((1 - left) * 1000) / requests_per_s) + 1; // a whole millisecond more than the fraction needs
      return errorBody("rate_limited", `a gateway serves ${requests_per_s} requests a second of one tenant`, { requests_per_s, retry_after_ms });
    },
  };
}
