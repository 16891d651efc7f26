// prices: what an attempt costs, from a versioned table, in integer micro-dollars.
//
//   M1. The same model, usage, time and version always give the same cost: there is no floating point on the way, and no clock.
//   M2. A cost is never below what the provider asks: it is rounded up, once per attempt, at the end. Rounding each class of tokens
//       would add up to four micro-dollars more to every attempt; rounding down would let a tenant make small calls for nothing.
//   M3. A model that the table does not know is `unknown`, never free.
//
// The prices of real models are those of @pydantic/genai-prices, which are bundled with it; nothing is fetched. They know dates (a price that
// changes on a day) and tiers (a price that is higher for a long prompt). Classes of tokens for which a model has no price of its own are priced
// as the class they belong to: cached input as input, reasoning as output.
import { calcPrice, type Provider as PriceProvider, REMOTE_DATA_JSON_URL, updatePrices } from "@pydantic/genai-prices";
import { assert } from "../protocol/assert.ts";
import { NO_USAGE, type Usage } from "./provider.ts";

/** The table that is installed with us. Changes whenever any price in it may have changed. */
export const PRICE_VERSION_BUNDLED = "genai-prices@0.1.8+simulated@1";

let version_in_use = PRICE_VERSION_BUNDLED;

/** The version of the table in use: the bundled one, unless a process was given another at its start. */
export function priceVersion(): string {
  return version_in_use;
}

/**
 * Replaces the bundled table of real models' prices, once, at the start of a process: before anything is priced, so that a version always means
 * one table. The caller has checked it (models.ts, refresh). Throws when the data has not the form of genai-prices' data.json.
 */
export function usePriceTable(data: readonly PriceProvider[], version: string): void {
  updatePrices(({ setProviderData }) => setProviderData([...data]));
  version_in_use = `${version}+simulated@1`;
  kept_rates.clear();
}

/** Where the makers of the table publish its newest state. Asked only when somebody types `troupe models refresh`. */
export const PRICES_URL = REMOTE_DATA_JSON_URL;

/** As the simulated models are priced, here and in models.ts. */
export const SIMULATED_USD_PER_MTOK = { input: 1, output: 10 } as const;
/** The day of the table, at which prices are read unless a caller says when. */
const PRICES_AS_OF_MS = Date.UTC(2026, 8, 23);

export type Cost = { readonly kind: "priced"; readonly cost_usd_micros: number; readonly price_version: string } | { readonly kind: "unknown" };

/** Micro-dollars per token are dollars per million tokens. Held times 10^9, which every published price has room in. */
const SCALE_DIGITS = 9;
const SCALE = 10n ** BigInt(SCALE_DIGITS);

/** A price that may rise with the length of the prompt. Sorted by `above_tokens`, the first from 0. */
type Rate = readonly { readonly above_tokens: number; readonly scaled: bigint }[];

interface Rates {
  readonly input: Rate;
  readonly cache_read: Rate;
  readonly cache_write: Rate;
  readonly output: Rate;
}

const flat = (usd_micros_per_token: number): Rate => [{ above_tokens: 0, scaled: scaled(usd_micros_per_token) }];
const SIMULATED: Rates = {
  input: flat(SIMULATED_USD_PER_MTOK.input),
  cache_read: flat(SIMULATED_USD_PER_MTOK.input),
  cache_write: flat(SIMULATED_USD_PER_MTOK.input),
  output: flat(SIMULATED_USD_PER_MTOK.output),
};

/**
 * What an attempt costs.
 *
 * `model` is the whole name, `{provider}/{model}`. `at_ms` is when the attempt began, milliseconds since 1970; it decides between prices of
 * different days. Without it the prices of the table's own day hold.
 */
export function costOf(model: string, usage: Usage, at_ms: number = PRICES_AS_OF_MS): Cost {
  const rates = ratesOf(model, at_ms);
  return rates === undefined ? { kind: "unknown" } : { kind: "priced", cost_usd_micros: costAt(rates, usage), price_version: version_in_use };
}

/**
 * The most that an attempt can cost: the prompt at the dearest class of input and the whole of the output bound. For a reservation.
 * Promises: with at most these tokens of any classes, costOf is not more.
 */
export function costAtMost(
  model: string,
  tokens: { readonly input_tokens: number; readonly max_output_tokens: number },
  at_ms: number = PRICES_AS_OF_MS,
): Cost {
  const rates = ratesOf(model, at_ms);
  if (rates === undefined) return { kind: "unknown" };
  return { kind: "priced", cost_usd_micros: worstAt(rates, tokens.input_tokens, tokens.max_output_tokens), price_version: version_in_use };
}

/**
 * How many output tokens a head-room pays for, after the prompt: the largest number up to `max_output_tokens` for which costAtMost is within it.
 * Undefined when not even one is (or none was asked for), or the price is unknown.
 */
export function affordableOutputTokens(
  model: string,
  tokens: { readonly input_tokens: number; readonly max_output_tokens: number },
  headroom_usd_micros: number,
  at_ms: number = PRICES_AS_OF_MS,
): number | undefined {
  const rates = ratesOf(model, at_ms);
  if (rates === undefined) return undefined;
  const fits = (output: number) => worstAt(rates, tokens.input_tokens, output) <= headroom_usd_micros;
  if (tokens.max_output_tokens < 1 || !fits(1)) return undefined;
  let [low, high] = [1, tokens.max_output_tokens];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (fits(middle)) low = middle;
    else high = middle - 1;
  }
  return low;
}

function worstAt(rates: Rates, input_tokens: number, output_tokens: number): number {
  const as = (usage: Partial<Usage>) => costAt(rates, { ...NO_USAGE, output_tokens, ...usage });
  return Math.max(as({ input_tokens }), as({ cache_read_tokens: input_tokens }), as({ cache_write_tokens: input_tokens }));
}

function costAt(rates: Rates, usage: Usage): number {
  // Tiers go by the whole prompt, cached or not, and hold for every token of the attempt.
  const prompt = usage.input_tokens + usage.cache_read_tokens + usage.cache_write_tokens;
  const part = (tokens: number, rate: Rate) => {
    assert(Number.isSafeInteger(tokens) && tokens >= 0, "a count of tokens is a whole number, not below zero");
    return BigInt(tokens) * rateAt(rate, prompt);
  };
  const total =
    part(usage.input_tokens, rates.input) +
    part(usage.cache_read_tokens, rates.cache_read) +
    part(usage.cache_write_tokens, rates.cache_write) +
    part(usage.output_tokens, rates.output) +
    part(usage.reasoning_tokens, rates.output);
  const cost = Number((total + SCALE - 1n) / SCALE);
  assert(Number.isSafeInteger(cost), "a cost fits a safe integer");
  return cost;
}

function rateAt(rate: Rate, prompt_tokens: number): bigint {
  let scaled_price = 0n;
  for (const tier of rate) if (tier.above_tokens === 0 || prompt_tokens > tier.above_tokens) scaled_price = tier.scaled;
  return scaled_price;
}

/** Looking a model up in the library takes milliseconds, and each call of a model asks several times. No price changes within a minute. */
const RATES_KEPT_MAX = 1_000;
const MINUTE_MS = 60_000;
const kept_rates = new Map<string, Rates | undefined>();

function ratesOf(model: string, at_ms: number): Rates | undefined {
  const key = `${Math.floor(at_ms / MINUTE_MS)} ${model}`;
  const kept = kept_rates.get(key);
  if (kept !== undefined || kept_rates.has(key)) return kept;
  const rates = lookUpRates(model, at_ms);
  if (kept_rates.size >= RATES_KEPT_MAX) kept_rates.clear();
  kept_rates.set(key, rates);
  return rates;
}

function lookUpRates(model: string, at_ms: number): Rates | undefined {
  const slash = model.indexOf("/");
  if (slash < 0) return undefined;
  const named = model.slice(0, slash);
  // The same models in another dialect.
  const provider = named === "openai-responses" ? "openai" : named;
  const name = model.slice(slash + 1);
  if (provider === "simulated") return name === "echo" || name === "script" ? SIMULATED : undefined;
  if (provider !== "anthropic" && provider !== "openai" && provider !== "google") return undefined;
  // Without tokens the library only looks the model up; the arithmetic is ours (M1).
  const found = calcPrice({}, name, { providerId: provider, timestamp: new Date(at_ms) });
  if (found === null || found.provider.id !== provider) return undefined;
  const { input_mtok, output_mtok, cache_read_mtok, cache_write_mtok } = found.model_price;
  const input = rateOf(input_mtok);
  const output = rateOf(output_mtok);
  // A model that is priced by anything but tokens (audio, images) is not one whose cost we know.
  if (input === undefined || output === undefined) return undefined;
  return { input, output, cache_read: rateOf(cache_read_mtok) ?? input, cache_write: rateOf(cache_write_mtok) ?? input };
}

function rateOf(
  price: number | { readonly base: number; readonly tiers: readonly { readonly start: number; readonly price: number }[] } | undefined,
): Rate | undefined {
  if (price === undefined) return undefined;
  if (typeof price === "number") return flat(price);
  const tiers = price.tiers.map((tier) => ({ above_tokens: tier.start, scaled: scaled(tier.price) }));
  return [{ above_tokens: 0, scaled: scaled(price.base) }, ...tiers.sort((a, b) => a.above_tokens - b.above_tokens)];
}

/** A decimal number as written, times 10^SCALE_DIGITS, without going through binary fractions. */
function scaled(price: number): bigint {
  const digits = price.toFixed(SCALE_DIGITS);
  assert(price >= 0 && Number(digits) === price, "a price has no more decimals than the table keeps");
  return BigInt(digits.replace(".", ""));
}
