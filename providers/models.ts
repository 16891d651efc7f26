// models: the registry of models: what can be had, what it can do, what it costs, which to take for what.
//
//   seeded from the bundled price table ──refresh: a table that passes the gates──▶ the new table
//                                       └──refresh: one that does not──────────▶ the old table stays, and the reason is told
//
// Invariants, each a test in test/providers/models.test.ts:
//   R1. Same units for all: US dollars per million tokens, tokens, RFC 3339 days. What is not known is null, never 0 and never a guess.
//   R2. A price row holds from its `effective_from` on (null: from the beginning), so that what was paid can be computed again.
//   R3. A recommendation is a function of the table, the question and the day. It never names a deprecated model, one without a price, or one outside
//       `allowed`, and never more than `limit`. With the goal `cost` no model comes before a cheaper one.
//   R4. A refresh changes everything or nothing. It is refused when the new table is unreadable, has fewer than MODELS_MIN models, or lost more than half.
//
// Real models are those of @pydantic/genai-prices for Anthropic, OpenAI and Google; other providers' models (compatible servers) have no entry, for
// nobody here knows them. prices.ts computes costs from the same table.
import { findProvider } from "@pydantic/genai-prices";
import { z } from "zod";
import { assert } from "../protocol/assert.ts";
import { hashOf, type Json } from "../protocol/json.ts";
import { traitsOf } from "./model-traits.ts";
import { PRICE_VERSION_BUNDLED, SIMULATED_USD_PER_MTOK } from "./prices.ts";

/** US dollars per million tokens. Null: the class has no price of its own (it is billed as the class it belongs to), or none is known. */
export interface Rates {
  readonly input_usd_per_mtok: number | null;
  readonly output_usd_per_mtok: number | null;
  readonly cache_read_usd_per_mtok: number | null;
  readonly cache_write_usd_per_mtok: number | null;
}

export interface PriceRow extends Rates {
  /** A day, included. Null: from the beginning. */
  readonly effective_from: string | null;
  /** Prices for prompts longer than so many tokens. */
  readonly tiers: readonly (Rates & { readonly above_tokens: number })[];
}

export interface Capabilities {
  readonly tools: boolean | null;
  readonly vision: boolean | null;
  readonly reasoning: boolean | null;
  readonly json: boolean | null;
}
export type Capability = keyof Capabilities;

export interface ModelEntry {
  /** As an agent's configuration names it. */
  readonly id: string;
  readonly provider: string;
  /** `text` answers conversations; `other` is for something else and is never recommended. */
  readonly kind: "text" | "other";
  readonly context_tokens: number | null;
  readonly output_tokens_max: number | null;
  /** Oldest first. Empty: no price is known. */
  readonly prices: readonly PriceRow[];
  readonly capabilities: Capabilities;
  /** The day from which it is deprecated. Null: it is not, as far as is known. */
  readonly deprecated_at: string | null;
  /** An ordinal of ours, 0 to 100. Null: unknown. */
  readonly quality: number | null;
}

export interface ModelTable {
  readonly version: string;
  readonly models: readonly ModelEntry[];
}

/** What a part of work asks of a model. */
export const ROLES = {
  general: { needs: ["tools"], quality_min: 50, about: "an agent with tools" },
  coding: { needs: ["tools"], quality_min: 75, about: "writes and changes programs" },
  reasoning: { needs: ["reasoning"], quality_min: 75, about: "plans, proves, judges" },
  vision: { needs: ["vision"], quality_min: 50, about: "reads pictures" },
  extraction: { needs: ["json"], quality_min: 40, about: "turns text into fields" },
  summary: { needs: [], quality_min: 30, about: "shortens, titles, routes" },
} as const satisfies Record<string, { needs: readonly Capability[]; quality_min: number; about: string }>;
export type ModelRole = keyof typeof ROLES;
export type Goal = "quality" | "cost" | "balanced";

export interface Question {
  readonly role: ModelRole;
  readonly goal: Goal;
  /** At most so many answers. */
  readonly limit: number;
  /** Ids, or `{provider}/*`. Absent: all. */
  readonly allowed?: readonly string[];
  readonly at_ms: number;
}

export interface Recommendation {
  readonly id: string;
  readonly quality: number;
  readonly blended_usd_per_mtok: number;
}

/** A model in a comparison, at one day. */
export interface ComparedModel extends Rates, Capabilities {
  readonly id: string;
  readonly context_tokens: number | null;
  readonly output_tokens_max: number | null;
  readonly blended_usd_per_mtok: number | null;
  readonly deprecated: boolean;
  readonly quality: number | null;
}

export interface ModelFilter {
  readonly provider?: string | undefined;
  readonly capability?: Capability | undefined;
  readonly context_tokens_min?: number | undefined;
  /** Also deprecated ones, and those of other kinds. Default: no. */
  readonly all?: boolean | undefined;
  readonly at_ms: number;
}

export type RefreshOutcome =
  | { readonly kind: "refreshed"; readonly before: number; readonly after: number; readonly version: string }
  | { readonly kind: "refused"; readonly gate: "unreadable" | "too_few" | "shrunk"; readonly reason: string };

export interface ModelRegistry {
  readonly table: ModelTable;
  list(filter: ModelFilter): readonly ModelEntry[];
  get(id: string): ModelEntry | undefined;
  /** In the order asked for; ids that are not there are told apart. */
  compare(ids: readonly string[], at_ms: number): { readonly models: readonly ComparedModel[]; readonly unknown: readonly string[] };
  recommend(question: Question): readonly Recommendation[];
  /** `data` is a table in the form of genai-prices' data.json: a list of providers. */
  refresh(data: unknown): RefreshOutcome;
}

/** A table with fewer is a fragment: three providers alone have more. */
export const MODELS_MIN = 50;
/** Providers retire models, but never half of them in a day. */
export const SHRINK_RATIO_MIN = 0.5;
/** Under $TROUPE_HOME: the table that `troupe models refresh` took, in the form of genai-prices' data.json. */
export const MODELS_FILE = "models.json";
/** What reads a lot and says little: the mix of an agent's calls. */
const INPUT_SHARE = 0.75;

export function createModelRegistry(seed: ModelTable = bundledTable()): ModelRegistry {
  let table = seed;
  let by_id = new Map(table.models.map((model) => [model.id, model]));
  assert(by_id.size === table.models.length, "each model has one entry");
  return {
    get table() {
      return table;
    },
    list: ({ provider, capability, context_tokens_min, all = false, at_ms }) =>
      table.models.filter(
        (model) =>
          (provider === undefined || model.provider === provider) &&
          (capability === undefined || model.capabilities[capability] === true) &&
          (context_tokens_min === undefined || (model.context_tokens !== null && model.context_tokens >= context_tokens_min)) &&
          (all || (model.kind === "text" && !isDeprecated(model, at_ms))),
      ),
    get: (id) => by_id.get(id),
    compare(ids, at_ms) {
      const found = ids.flatMap((id) => by_id.get(id) ?? []);
      return { models: found.map((model) => compared(model, at_ms)), unknown: ids.filter((id) => !by_id.has(id)) };
    },
    recommend: (question) => recommend(table.models, question),
    refresh(data) {
      const read = readTable(data);
      if (typeof read === "string") return { kind: "refused", gate: "unreadable", reason: read };
      const [before, after] = [table.models.length, read.models.length];
      if (after < MODELS_MIN) return { kind: "refused", gate: "too_few", reason: `${after} models are fewer than ${MODELS_MIN}` };
      if (after < before * SHRINK_RATIO_MIN)
        return { kind: "refused", gate: "shrunk", reason: `${after} models are less than half of the ${before} there are` };
      table = read;
      by_id = new Map(read.models.map((model) => [model.id, model]));
      return { kind: "refreshed", before, after, version: read.version };
    },
  };
}

export function isDeprecated(model: ModelEntry, at_ms: number): boolean {
  return model.deprecated_at !== null && Date.parse(model.deprecated_at) <= at_ms;
}

/** The row that holds at a time; undefined when none is known. */
export function priceAt(model: ModelEntry, at_ms: number): PriceRow | undefined {
  return model.prices.findLast((row) => row.effective_from === null || Date.parse(row.effective_from) <= at_ms);
}

/** Three tokens in for one out, at the prices of a short prompt. Null when either is unknown. */
export function blendedUsdPerMtok(model: ModelEntry, at_ms: number): number | null {
  const row = priceAt(model, at_ms);
  if (row === undefined || row.input_usd_per_mtok === null || row.output_usd_per_mtok === null) return null;
  return Number((row.input_usd_per_mtok * INPUT_SHARE + row.output_usd_per_mtok * (1 - INPUT_SHARE)).toPrecision(12));
}

function compared(model: ModelEntry, at_ms: number): ComparedModel {
  const row = priceAt(model, at_ms);
  return {
    id: model.id,
    context_tokens: model.context_tokens,
    output_tokens_max: model.output_tokens_max,
    input_usd_per_mtok: row?.input_usd_per_mtok ?? null,
    output_usd_per_mtok: row?.output_usd_per_mtok ?? null,
    cache_read_usd_per_mtok: row?.cache_read_usd_per_mtok ?? null,
    cache_write_usd_per_mtok: row?.cache_write_usd_per_mtok ?? null,
    blended_usd_per_mtok: blendedUsdPerMtok(model, at_ms),
    ...model.capabilities,
    deprecated: isDeprecated(model, at_ms),
    quality: model.quality,
  };
}

/** R3. */
function recommend(models: readonly ModelEntry[], { role, goal, limit, allowed, at_ms }: Question): Recommendation[] {
  const { needs, quality_min } = ROLES[role];
  const candidates = models.flatMap((model) => {
    const blended_usd_per_mtok = blendedUsdPerMtok(model, at_ms);
    const fits =
      model.kind === "text" &&
      !isDeprecated(model, at_ms) &&
      needs.every((need) => model.capabilities[need] === true) &&
      (allowed === undefined || allowed.some((one) => one === model.id || one === `${model.provider}/*`));
    if (!fits || blended_usd_per_mtok === null || model.quality === null || model.quality < quality_min) return [];
    return [{ id: model.id, quality: model.quality, blended_usd_per_mtok }];
  });
  const by_id = (a: Recommendation, b: Recommendation) => (a.id < b.id ? -1 : 1);
  const orders: Readonly<Record<Goal, (a: Recommendation, b: Recommendation) => number>> = {
    quality: (a, b) => b.quality - a.quality || a.blended_usd_per_mtok - b.blended_usd_per_mtok || by_id(a, b),
    cost: (a, b) => a.blended_usd_per_mtok - b.blended_usd_per_mtok || b.quality - a.quality || by_id(a, b),
    balanced: (a, b) => balance(b) - balance(a) || a.blended_usd_per_mtok - b.blended_usd_per_mtok || by_id(a, b),
  };
  return candidates.sort(orders[goal]).slice(0, Math.max(0, limit));
}

/** Ten times the price must buy this many points of quality. */
const POINTS_PER_DECADE = 15;
/** Below this the price of a model no longer matters beside everything else a turn costs. */
const USD_PER_MTOK_FLOOR = 0.05;

function balance({ quality, blended_usd_per_mtok }: Recommendation): number {
  return quality - POINTS_PER_DECADE * Math.log10(Math.max(blended_usd_per_mtok, USD_PER_MTOK_FLOOR));
}

// --- tables ---

const NOTHING_KNOWN: Capabilities = { tools: null, vision: null, reasoning: null, json: null };

function simulatedModels(): ModelEntry[] {
  const { input, output } = SIMULATED_USD_PER_MTOK;
  const row: PriceRow = {
    effective_from: null,
    input_usd_per_mtok: input,
    output_usd_per_mtok: output,
    cache_read_usd_per_mtok: null,
    cache_write_usd_per_mtok: null,
    tiers: [],
  };
  const entry = (name: string, capabilities: Capabilities): ModelEntry => ({
    id: `simulated/${name}`,
    provider: "simulated",
    kind: "text",
    context_tokens: null,
    output_tokens_max: null,
    prices: [row],
    capabilities,
    deprecated_at: null,
    quality: 0,
  });
  return [
    entry("echo", { tools: false, vision: false, reasoning: false, json: false }),
    entry("script", { tools: true, vision: false, reasoning: true, json: false }),
  ];
}

const PROVIDERS = ["anthropic", "google", "openai"] as const;
/** The table has also what others serve under a provider's roof. */
const OWN_MODELS: Readonly<Record<string, RegExp>> = { google: /^gem(ini|ma)-/ };

const rate = z.union([
  z.number().min(0),
  z.object({ base: z.number().min(0), tiers: z.array(z.object({ start: z.number().min(0), price: z.number().min(0) })).max(16) }),
]);
const rates = z.object({ input_mtok: rate.optional(), output_mtok: rate.optional(), cache_read_mtok: rate.optional(), cache_write_mtok: rate.optional() });
const conditional = z.object({ constraint: z.record(z.string(), z.unknown()).optional(), prices: rates });
const providerData = z.array(
  z.object({
    id: z.string().min(1).max(64),
    models: z
      .array(
        z.object({
          id: z.string().min(1).max(200),
          context_window: z.number().int().positive().optional(),
          deprecated: z.boolean().optional(),
          prices: z.union([z.array(conditional).max(64), rates]),
        }),
      )
      .max(5_000),
  }),
);
type ProviderData = z.infer<typeof providerData>;
type RateData = z.infer<typeof rate>;

/** The table that is installed. */
export function bundledTable(): ModelTable {
  const data = PROVIDERS.flatMap((id) => findProvider({ providerId: id }) ?? []);
  const parsed = providerData.safeParse(JSON.parse(JSON.stringify(data)));
  assert(parsed.success, "the bundled price table has the form we read");
  return { version: PRICE_VERSION_BUNDLED, models: entriesOf(parsed.data) };
}

/** A table from data that came from outside, or what is wrong with it. */
export function readTable(data: unknown): ModelTable | string {
  const parsed = providerData.safeParse(data);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    return `it is not a table of prices: /${issue?.path.map(String).join("/") ?? ""} ${issue?.message ?? ""}`.slice(0, 300);
  }
  const models = entriesOf(parsed.data);
  if (new Set(models.map((model) => model.id)).size !== models.length) return "a model stands in it twice";
  return { version: tableVersion(data), models };
}

/** Names a table by its content. */
export function tableVersion(data: unknown): string {
  return `refreshed@${hashOf(data as Json).slice(0, 12)}`;
}

function entriesOf(data: ProviderData): ModelEntry[] {
  const entries = PROVIDERS.flatMap((provider) => {
    const models = data.filter((one) => one.id === provider).flatMap((one) => one.models);
    return models.filter((model) => OWN_MODELS[provider]?.test(model.id) ?? true).map((model) => entryOf(provider, model));
  });
  return [...entries, ...simulatedModels()].sort((a, b) => (a.id < b.id ? -1 : 1));
}

function entryOf(provider: string, model: ProviderData[number]["models"][number]): ModelEntry {
  const { quality, output_tokens_max, deprecated_at, other, ...capabilities } = traitsOf(provider, model.id);
  const prices = pricesOf(model.prices);
  return {
    id: `${provider}/${model.id}`,
    provider,
    kind: other === true ? "other" : "text",
    context_tokens: model.context_window ?? null,
    output_tokens_max: output_tokens_max ?? null,
    prices,
    capabilities: { ...NOTHING_KNOWN, ...capabilities },
    // A table that only says that it is so, does not say since when: since ever, as far as a choice of today goes.
    deprecated_at: deprecated_at ?? (model.deprecated === true ? "1970-01-01" : null),
    quality: quality ?? null,
  };
}

function pricesOf(prices: ProviderData[number]["models"][number]["prices"]): PriceRow[] {
  const conditions = Array.isArray(prices) ? prices : [{ prices }];
  const rows = conditions.flatMap(
    ({ constraint, prices: one }: { constraint?: Record<string, unknown> | undefined; prices: z.infer<typeof rates> }): PriceRow[] => {
      const start_date = constraint?.["start_date"];
      // A price by the hour of the day is none that a day has.
      if (constraint !== undefined && typeof start_date !== "string") return [];
      if (one.input_mtok === undefined && one.output_mtok === undefined) return [];
      const classes = [one.input_mtok, one.output_mtok, one.cache_read_mtok, one.cache_write_mtok];
      const marks = new Set(classes.flatMap((price) => (typeof price === "object" ? price.tiers.map((tier) => tier.start) : [])));
      const tiers = [...marks].sort((a, b) => a - b).map((above_tokens) => ({ above_tokens, ...ratesAt(one, above_tokens) }));
      return [{ effective_from: typeof start_date === "string" ? start_date : null, ...ratesAt(one, 0), tiers }];
    },
  );
  return rows.sort((a, b) => (a.effective_from ?? "").localeCompare(b.effective_from ?? ""));
}

/** The prices behind a mark. */
function ratesAt(prices: z.infer<typeof rates>, above_tokens: number): Rates {
  const at = (price: RateData | undefined): number | null => {
    if (price === undefined) return null;
    if (typeof price === "number") return price;
    const tier = price.tiers.filter((one) => above_tokens > 0 && one.start <= above_tokens).sort((a, b) => b.start - a.start)[0];
    return tier?.price ?? price.base;
  };
  return {
    input_usd_per_mtok: at(prices.input_mtok),
    output_usd_per_mtok: at(prices.output_mtok),
    cache_read_usd_per_mtok: at(prices.cache_read_mtok),
    cache_write_usd_per_mtok: at(prices.cache_write_mtok),
  };
}
