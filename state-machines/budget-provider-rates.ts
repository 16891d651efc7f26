// budget-provider-rates: what may be asked of each provider in a window of time, what was taken there, and what comes back of it. The windows
// themselves are budget-rate.ts, what comes back is reckoned by budget-windows.ts.
import type { JsonObject } from "../protocol/json.ts";
import type { RateTier } from "../protocol/rate-tiers.ts";
import type { RateBody } from "./budget-commands.ts";
import { type Hold, RATES_MAX } from "./budget-context.ts";
import type { SlotLine } from "./budget-line.ts";
import type { Page } from "./budget-page.ts";
import { rateRelaid, rateSlice, rateTaken, rateUsed, rateWait, type RateWindow } from "./budget-rate.ts";
import { tableGet, tablePut, tableRows } from "./budget-table.ts";
import { givenBack, type HoldUse, type Taken, takenWith } from "./budget-windows.ts";

/** The windows of one page. */
export class ProviderRates {
  readonly #page: Page;
  readonly #line: SlotLine;

  constructor(page: Page, line: SlotLine) {
    this.#page = page;
    this.#line = line;
  }

  setTier(tier: RateTier | null): void {
    const { tier: before, tier_windows = {} } = this.#page.now;
    const relaid = (window: RateWindow): RateWindow => (before && tier ? rateRelaid(before, tier, window) : []);
    const windows = Object.fromEntries(Object.entries(tier_windows).map(([provider, window]) => [provider, relaid(window)]));
    this.#page.set({ tier, tier_windows: tier === null ? {} : windows });
  }

  /** B8: the window under the tier that a provider's calls count in. Beyond RATES_MAX names, which no deployment has, all others share one. */
  #tierWindow(tier: RateTier, provider: string): { readonly name: string; readonly windows: Readonly<Record<string, RateWindow>> } {
    const { tier_windows = {}, now } = this.#page.now;
    if (Object.hasOwn(tier_windows, provider) || Object.keys(tier_windows).length < RATES_MAX) return { name: provider, windows: tier_windows };
    const isUsed = ({ requests, tokens }: { requests: number; tokens: number }): boolean => requests + tokens > 0;
    const windows = Object.fromEntries(Object.entries(tier_windows).filter(([, window]) => isUsed(rateUsed(tier, window, now.at_ms))));
    return { name: Object.keys(windows).length < RATES_MAX ? provider : "*", windows };
  }

  /** Does any window count at all? */
  get isRated(): boolean {
    const { rates, tier } = this.#page.now;
    return (tier ?? null) !== null || Object.keys(rates).length > 0;
  }

  remember(hold: string, taken: Taken): void {
    const open = tableGet(this.#page.now.holds, hold);
    if (open !== undefined) this.#page.set({ holds: tablePut(this.#page.now.holds, hold, { ...open, taken: takenWith(open.taken ?? [], taken) }) });
  }

  /** Windows were laid anew: what was taken in the former ones stays until they have moved on. */
  forgetTaken(): void {
    for (const [id, { taken, ...hold }] of [...tableRows(this.#page.now.holds)])
      if (taken !== undefined) this.#page.set({ holds: tablePut(this.#page.now.holds, id, hold) });
  }

  /** BW2; what came back, for the event. */
  giveBack({ taken = [] }: Hold, use: HoldUse): { readonly rates_unused?: JsonObject[] } {
    if (taken.length === 0) return {};
    const { rates, tier = null, tier_windows = {}, now } = this.#page.now;
    const { windows, unused } = givenBack({ rates, tier, tier_windows }, taken, use, now.at_ms);
    if (windows.rates !== rates) this.#page.set({ rates: windows.rates });
    if (windows.tier_windows !== undefined && windows.tier_windows !== tier_windows) this.#page.set({ tier_windows: windows.tier_windows });
    return unused.length === 0 ? {} : { rates_unused: unused.map((one) => ({ ...one })) };
  }

  /** What was taken; `refused`, and the refusal told, when the provider's window is full. Without a rate or a tier there is no window. */
  takeRate(what: string, { provider, requests, tokens }: RateBody): Taken | "refused" | undefined {
    const { rates, tier, now } = this.#page.now;
    const own = Object.hasOwn(rates, provider) ? rates[provider] : undefined;
    const shared = own === undefined && tier ? this.#tierWindow(tier, provider) : undefined;
    const rate = own ?? (tier && shared ? { limit: tier, window: shared.windows[shared.name] ?? [] } : undefined);
    if (rate === undefined) return undefined;
    const wait = rateWait(rate.limit, rate.window, now.at_ms, { requests, tokens });
    if (wait.kind === "free") {
      const window = rateTaken(rate.limit, rate.window, now.at_ms, { requests, tokens });
      if (shared !== undefined) this.#page.set({ tier_windows: { ...shared.windows, [shared.name]: window } });
      else this.#page.set({ rates: { ...rates, [provider]: { limit: rate.limit, window } } });
      const slice = rateSlice(rate.limit, now.at_ms);
      return { provider, of: shared === undefined ? "rate" : "tier", name: shared?.name ?? provider, slice, requests, tokens };
    }
    const { requests_max, tokens_max, window_ms } = rate.limit;
    const details = { provider, requests_max, tokens_max, window_ms, requests: wait.requests, tokens: wait.tokens };
    if (wait.kind === "never") this.#line.refuse(what, "invalid", `no window of ${provider} takes so much at once`, details);
    else this.#line.refuse(what, "rate_limited", `the window of ${provider} is full`, { ...details, retry_after_ms: wait.retry_after_ms });
    return "refused";
  }

  acquireRate(body: RateBody): void {
    const { hold } = body;
    if (hold !== undefined && tableGet(this.#page.now.holds, hold) === undefined) {
      this.#line.refuse(hold, "conflict", "this attempt has ended; nothing can be taken for it any more", { ended: true });
      return;
    }
    const taken = this.takeRate(hold ?? `rate/${body.provider}`, body);
    if (taken === "refused") return;
    if (taken !== undefined && hold !== undefined) this.remember(hold, taken);
    this.#page.answer = { granted: true };
  }
}
