// Goal: the registry of models says only what is known, in the same units for all, recommends by rules (R3) and takes no bad table (R4).
// Method: the bundled table as it is, against the price arithmetic that bills; recommendations and refreshes over drawn tables.
import { findProvider } from "@pydantic/genai-prices";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  type Capability,
  createModelRegistry,
  type Goal,
  isDeprecated,
  type ModelEntry,
  MODELS_MIN,
  type ModelRole,
  type ModelTable,
  priceAt,
  ROLES,
} from "../../providers/models.ts";
import { costOf } from "../../providers/prices.ts";
import { NO_USAGE } from "../../providers/provider.ts";

const NOW_MS = Date.UTC(2026, 10, 21);
const BUNDLED = ["anthropic", "openai", "google"].map((providerId) => findProvider({ providerId }));

describe("the bundled table", () => {
  const registry = createModelRegistry();

  test("has models of every provider and the simulated ones, each once, sorted", () => {
    const { models } = registry.table;
    expect(models.length).toBeGreaterThan(2 * MODELS_MIN);
    expect(new Set(models.map((model) => model.provider))).toEqual(new Set(["anthropic", "google", "openai", "simulated"]));
    expect(models.map((model) => model.id)).toEqual([...new Set(models.map((model) => model.id))].sort());
    expect(models.filter((model) => model.id.startsWith("google/claude"))).toEqual([]);
  });

  test("its prices are those that calls are billed at, on every day of a change (R2)", () => {
    let checked = 0;
    // Entries of other kinds may stand for a family, such as fine-tuned models, whose members alone have a price.
    for (const model of registry.table.models.filter((one) => one.kind === "text")) {
      for (const row of model.prices) {
        if (row.input_usd_per_mtok === null || row.output_usd_per_mtok === null) continue;
        const at_ms = row.effective_from === null ? Date.UTC(2020, 0, 1) : Date.parse(row.effective_from);
        const cost = costOf(model.id, { ...NO_USAGE, input_tokens: 1_000, output_tokens: 2_000 }, at_ms);
        expect([model.id, row.effective_from, cost.kind === "priced" && cost.cost_usd_micros]).toEqual([
          model.id,
          row.effective_from,
          Math.ceil(Number((row.input_usd_per_mtok * 1_000 + row.output_usd_per_mtok * 2_000).toFixed(6))),
        ]);
        checked += 1;
      }
    }
    expect(checked).toBeGreaterThan(MODELS_MIN);
  });

  test("what is unknown is null, never 0 (R1)", () => {
    for (const model of registry.table.models) {
      if (model.provider === "simulated") continue;
      for (const value of [model.context_tokens, model.output_tokens_max, model.quality]) expect(value === null || value > 0).toBe(true);
    }
    const { models, unknown } = registry.compare(["google/gemma-3", "openai/gpt-5.6-luna", "x/y"], NOW_MS);
    expect(unknown).toEqual(["x/y"]);
    expect(models[0]).toMatchObject({ input_usd_per_mtok: null, blended_usd_per_mtok: null, context_tokens: null, tools: null, quality: null });
    expect(models[1]).toMatchObject({ input_usd_per_mtok: 0.2, output_usd_per_mtok: 1.2, blended_usd_per_mtok: 0.45, tools: true });
    expect(Object.keys(models[0]!)).toEqual(Object.keys(models[1]!));
  });

  test("a price of the future holds from its day, and the old one until then", () => {
    const model = registry.get("openai/gpt-5.6-luna")!;
    expect(priceAt(model, Date.UTC(2026, 6, 29))).toMatchObject({ effective_from: null, input_usd_per_mtok: 1 });
    expect(priceAt(model, Date.UTC(2026, 6, 30))).toMatchObject({ effective_from: "2026-07-30", input_usd_per_mtok: 0.2 });
    expect(model.prices[0]?.tiers).toMatchObject([{ above_tokens: 271_999, input_usd_per_mtok: 2, output_usd_per_mtok: 9 }]);
  });

  test("list filters by provider, capability and context, and leaves out what is deprecated or of another kind", () => {
    const listed = registry.list({ provider: "anthropic", capability: "tools", context_tokens_min: 500_000, at_ms: NOW_MS });
    expect(listed.length).toBeGreaterThan(3);
    for (const model of listed) expect(model).toMatchObject({ provider: "anthropic", kind: "text", capabilities: { tools: true } });
    const ids = registry.list({ at_ms: NOW_MS }).map((model) => model.id);
    for (const gone of ["anthropic/claude-2", "openai/whisper-1", "openai/text-embedding-3-small", "google/gemini-1.5-pro"]) expect(ids).not.toContain(gone);
    expect(registry.list({ all: true, at_ms: NOW_MS }).length).toBe(registry.table.models.length);
  });
});

// --- recommendations ---

const entry = fc.record({
  n: fc.integer({ min: 0, max: 400 }),
  provider: fc.constantFrom("anthropic", "openai"),
  kind: fc.constantFrom<"text" | "other">("text", "text", "text", "other"),
  price: fc.constantFrom(null, 0.1, 0.5, 1, 5, 5, 20),
  quality: fc.constantFrom(null, 20, 50, 75, 75, 90),
  deprecated_at: fc.constantFrom(null, null, "2025-01-01", "2027-01-01"),
  tools: fc.constantFrom(null, true, true, false),
});
const table: fc.Arbitrary<ModelTable> = fc
  .uniqueArray(entry, { minLength: 10, maxLength: 40, selector: (one) => `${one.provider}/${one.n}` })
  .map((entries) => ({
    version: "drawn",
    models: entries.map(({ n, provider, kind, price, quality, deprecated_at, tools }): ModelEntry => ({
      id: `${provider}/m${n}`,
      provider,
      kind,
      context_tokens: null,
      output_tokens_max: null,
      prices:
        price === null
          ? []
          : [
              {
                effective_from: null,
                input_usd_per_mtok: price,
                output_usd_per_mtok: price,
                cache_read_usd_per_mtok: null,
                cache_write_usd_per_mtok: null,
                tiers: [],
              },
            ],
      capabilities: { tools, vision: true, reasoning: true, json: true },
      deprecated_at,
      quality,
    })),
  }));
const question = fc.record({
  role: fc.constantFrom(...(Object.keys(ROLES) as ModelRole[])),
  goal: fc.constantFrom<Goal>("quality", "cost", "balanced"),
  limit: fc.integer({ min: 0, max: 5 }),
  allowed: fc.option(fc.constantFrom<readonly string[]>(["anthropic/*"], ["openai/m1", "openai/m2", "anthropic/m3"], []), { nil: undefined, freq: 1 }),
});

test("a recommendation is never deprecated, unpriced, unfit or not allowed, never more than the limit, and the same for any order of the table (R3)", () => {
  let recommended = 0;
  fc.assert(
    fc.property(table, question, fc.infiniteStream(fc.nat()), (drawn, { allowed, ...rest }, shuffle) => {
      const asked = { ...rest, ...(allowed === undefined ? {} : { allowed }), at_ms: NOW_MS };
      const registry = createModelRegistry(drawn);
      const answers = registry.recommend(asked);
      recommended += answers.length;
      expect(answers.length).toBeLessThanOrEqual(asked.limit);
      for (const { id, quality } of answers) {
        const model = registry.get(id)!;
        expect(isDeprecated(model, NOW_MS)).toBe(false);
        expect(model.kind).toBe("text");
        expect(model.prices.length).toBeGreaterThan(0);
        expect(quality).toBeGreaterThanOrEqual(ROLES[asked.role].quality_min);
        for (const need of ROLES[asked.role].needs as readonly Capability[]) expect(model.capabilities[need]).toBe(true);
        if (allowed !== undefined) expect(allowed.includes(id) || allowed.includes(`${model.provider}/*`)).toBe(true);
      }
      const ordered = (of: (one: (typeof answers)[number]) => number) => answers.every((one, n) => n === 0 || of(answers[n - 1]!) <= of(one));
      if (asked.goal === "cost") expect(ordered((one) => one.blended_usd_per_mtok)).toBe(true);
      if (asked.goal === "quality") expect(ordered((one) => -one.quality)).toBe(true);
      // Nobody who was left out would have been better.
      const everybody = registry.recommend({ ...asked, limit: 1_000 });
      expect(everybody.slice(0, asked.limit)).toEqual(answers);
      for (const first of answers.slice(0, 1))
        for (const other of everybody) {
          if (asked.goal === "cost") expect(first.blended_usd_per_mtok).toBeLessThanOrEqual(other.blended_usd_per_mtok);
          if (other.quality === first.quality) expect(first.blended_usd_per_mtok).toBeLessThanOrEqual(other.blended_usd_per_mtok);
        }
      const keys = new Map(drawn.models.map((model) => [model.id, shuffle.next().value]));
      const shuffled = { ...drawn, models: drawn.models.toSorted((a, b) => Number(keys.get(a.id)) - Number(keys.get(b.id))) };
      expect(createModelRegistry(shuffled).recommend(asked)).toEqual(answers);
    }),
    { numRuns: 500 },
  );
  expect(recommended).toBeGreaterThan(500);
});

// --- refreshes ---

const rows = (count: number, provider = "openai") => [
  { id: provider, models: Array.from({ length: count }, (_, n) => ({ id: `gpt-x${n}`, prices: { input_mtok: 1, output_mtok: 2 } })) },
];

describe("a refresh", () => {
  test("takes the table that is published, whole, under a version of its own", () => {
    const registry = createModelRegistry();
    const before = registry.table;
    const outcome = registry.refresh(JSON.parse(JSON.stringify(BUNDLED)));
    expect(outcome).toMatchObject({
      kind: "refreshed",
      before: before.models.length,
      after: before.models.length,
      version: expect.stringMatching(/^refreshed@[0-9a-f]{12}$/),
    });
    expect(registry.table.models).toEqual(before.models);
    expect(createModelRegistry().refresh(rows(100))).toMatchObject({ kind: "refreshed" });
  });

  test.each<[string, unknown, string]>([
    ["nothing", undefined, "unreadable"],
    ["an object", { models: [] }, "unreadable"],
    ["a negative price", [{ id: "openai", models: [{ id: "gpt-x", prices: { input_mtok: -1 } }] }], "unreadable"],
    ["a price that is text", [{ id: "openai", models: [{ id: "gpt-x", prices: { input_mtok: "1" } }] }], "unreadable"],
    ["a model twice", [...rows(60), ...rows(60)], "unreadable"],
    ["an empty table", [], "too_few"],
    ["one too few (two are simulated)", rows(MODELS_MIN - 3), "too_few"],
    ["less than half of what there is", rows(70), "shrunk"],
  ])("refuses %s, and the old table stays", (_what, data, gate) => {
    const registry = createModelRegistry();
    const before = registry.table;
    const outcome = registry.refresh(data);
    expect(outcome).toMatchObject({ kind: "refused", gate });
    expect(registry.table).toBe(before);
    expect(registry.get("openai/gpt-5.6-luna")).toBeDefined();
  });

  test("never throws, whatever it is given, and keeps the old table unless it says otherwise", () => {
    const registry = createModelRegistry();
    const before = registry.table;
    fc.assert(
      fc.property(fc.anything(), (data) => {
        expect(registry.refresh(data).kind).toBe("refused");
        expect(registry.table).toBe(before);
      }),
    );
  });
});
