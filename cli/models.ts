// models: which models there are, what they can do and cost, which to take, and which providers are left alone now.
//
// The table is the bundled one, or $TROUPE_HOME/models.json when `models refresh` has put one there; workers read the same file when they start.
import { mkdir, readFile, rename, writeFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { decodeBreaker, parseBreakerKey } from "../actors/breaker-board.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import {
  blendedUsdPerMtok,
  type Capability,
  createModelRegistry,
  type Goal,
  isDeprecated,
  type ModelEntry,
  type ModelRegistry,
  type ModelRole,
  MODELS_FILE,
  priceAt,
} from "../providers/models.ts";
import { PRICES_URL } from "../providers/prices.ts";
import type { Context } from "./context.ts";
import { homeDirectory } from "./dev-file.ts";
import { EXIT } from "./ports.ts";

/** Fifteen times the size of today's table. */
const TABLE_BYTES_MAX = 64 * 1024 * 1024;

const fileOf = ({ ports }: Context): string => join(homeDirectory(ports.env, ports.working_directory), MODELS_FILE);

async function contentOf(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, "utf8");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** The table in use. A file that does not pass the gates is as if it were not there, and that is said. */
async function registryOf(context: Context): Promise<ModelRegistry> {
  const registry = createModelRegistry();
  const text = await contentOf(fileOf(context));
  if (text === undefined) return registry;
  const outcome = registry.refresh(parsed(text));
  if (outcome.kind === "refused") context.printer.note(`${fileOf(context)} is not used: ${outcome.reason}`);
  return registry;
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined; // Not JSON: the gate says that it is no table.
  }
}

/** For people: what is unknown is a dash, as the printer shows null. */
const yes = (value: boolean | null): string | null => (value === null ? null : value ? "yes" : "no");

export interface ListOptions {
  readonly provider?: string;
  readonly capability?: Capability;
  readonly contextMin?: number;
  readonly all?: boolean;
}

export async function listModels(context: Context, { provider, capability, contextMin, all }: ListOptions): Promise<number> {
  const { printer, ports } = context;
  const at_ms = ports.world.now_ms();
  const registry = await registryOf(context);
  const models = registry.list({ provider, capability, context_tokens_min: contextMin, all, at_ms });
  if (printer.json) {
    printer.document({ version: registry.table.version, models });
    return EXIT.done;
  }
  printer.table(
    ["model", "quality", "context", "input $/M", "output $/M", "tools", "vision", "reasoning", "deprecated"],
    models.map((model) => {
      const row = priceAt(model, at_ms);
      const { tools, vision, reasoning } = model.capabilities;
      const prices = [row?.input_usd_per_mtok ?? null, row?.output_usd_per_mtok ?? null];
      return [
        model.id,
        model.quality,
        model.context_tokens,
        ...prices,
        yes(tools),
        yes(vision),
        yes(reasoning),
        isDeprecated(model, at_ms) ? model.deprecated_at : "",
      ];
    }),
  );
  printer.note(`${models.length} of ${registry.table.models.length} models; prices of ${registry.table.version}`);
  return EXIT.done;
}

export async function showModel(context: Context, _options: object, id: string): Promise<number> {
  const { printer, ports } = context;
  const model = found(await registryOf(context), id);
  const at_ms = ports.world.now_ms();
  if (printer.json) {
    printer.document({ ...model, blended_usd_per_mtok: blendedUsdPerMtok(model, at_ms), deprecated: isDeprecated(model, at_ms) });
    return EXIT.done;
  }
  const { tools, vision, reasoning, json } = model.capabilities;
  printer.pairs([
    ["model", model.id],
    ["kind", model.kind],
    ["quality", model.quality],
    ["context tokens", model.context_tokens],
    ["output tokens", model.output_tokens_max],
    ["tools", yes(tools)],
    ["vision", yes(vision)],
    ["reasoning", yes(reasoning)],
    ["json", yes(json)],
    ["deprecated", model.deprecated_at],
    ["blended $/M", blendedUsdPerMtok(model, at_ms)],
  ]);
  printer.table(
    ["from", "prompts above", "input $/M", "output $/M", "cache read $/M", "cache write $/M"],
    model.prices.flatMap((row) =>
      [{ above_tokens: 0, ...row }, ...row.tiers].map((rates) => [
        row.effective_from ?? "the beginning",
        rates.above_tokens,
        rates.input_usd_per_mtok,
        rates.output_usd_per_mtok,
        rates.cache_read_usd_per_mtok,
        rates.cache_write_usd_per_mtok,
      ]),
    ),
  );
  return EXIT.done;
}

function found(registry: ModelRegistry, id: string): ModelEntry {
  const model = registry.get(id);
  if (model === undefined) throw new TroupeError(errorBody("model_unknown", `the registry has no model '${id}'`, { model: id }));
  return model;
}

export async function compareModels(context: Context, _options: object, ids: readonly string[]): Promise<number> {
  const { printer, ports } = context;
  const registry = await registryOf(context);
  for (const id of ids) found(registry, id);
  const { models } = registry.compare(ids, ports.world.now_ms());
  if (printer.json) {
    printer.document({ version: registry.table.version, models });
    return EXIT.done;
  }
  const rows: [string, (model: (typeof models)[number]) => unknown][] = [
    ["quality", (model) => model.quality],
    ["context tokens", (model) => model.context_tokens],
    ["output tokens", (model) => model.output_tokens_max],
    ["input $/M", (model) => model.input_usd_per_mtok],
    ["output $/M", (model) => model.output_usd_per_mtok],
    ["cache read $/M", (model) => model.cache_read_usd_per_mtok],
    ["cache write $/M", (model) => model.cache_write_usd_per_mtok],
    ["blended $/M", (model) => model.blended_usd_per_mtok],
    ["tools", (model) => yes(model.tools)],
    ["vision", (model) => yes(model.vision)],
    ["reasoning", (model) => yes(model.reasoning)],
    ["json", (model) => yes(model.json)],
    ["deprecated", (model) => yes(model.deprecated)],
  ];
  printer.table(
    ["", ...models.map((model) => model.id)],
    rows.map(([name, of]) => [name, ...models.map(of)]),
  );
  return EXIT.done;
}

export interface RecommendOptions {
  readonly role: ModelRole;
  readonly goal: Goal;
  readonly limit: number;
  readonly allowed?: readonly string[];
}

export async function recommendModels(context: Context, { role, goal, limit, allowed }: RecommendOptions): Promise<number> {
  const { printer, ports } = context;
  const registry = await registryOf(context);
  const models = registry.recommend({ role, goal, limit, at_ms: ports.world.now_ms(), ...(allowed === undefined ? {} : { allowed }) });
  if (printer.json) printer.document({ version: registry.table.version, role, goal, models });
  else
    printer.table(
      ["model", "quality", "blended $/M"],
      models.map((model) => [model.id, model.quality, model.blended_usd_per_mtok]),
    );
  if (models.length === 0) printer.note("no model fits");
  return EXIT.done;
}

export async function refreshModels(context: Context, { from = PRICES_URL }: { readonly from?: string }): Promise<number> {
  const { printer, ports } = context;
  const registry = await registryOf(context);
  const text = await tableText(context, from);
  const outcome = registry.refresh(parsed(text));
  if (outcome.kind === "refused")
    throw new TroupeError(errorBody("invalid", `the table is not taken, the old one stays: ${outcome.reason}`, { gate: outcome.gate }));
  const file = fileOf(context);
  await mkdir(homeDirectory(ports.env, ports.working_directory), { recursive: true });
  // Renamed into its place, so that a worker that starts now reads the old table or the new one.
  const written = `${file}.${ports.world.id()}`;
  await writeFile(written, text, { mode: 0o600 });
  await rename(written, file);
  if (printer.json) printer.document({ ...outcome, file });
  else printer.line(`${outcome.after} models (before: ${outcome.before}), ${outcome.version}; workers use it when they start next`);
  return EXIT.done;
}

async function tableText({ ports }: Context, from: string): Promise<string> {
  if (!/^https?:\/\//.test(from)) {
    const text = await contentOf(resolve(ports.working_directory, from));
    if (text === undefined) throw new TroupeError(errorBody("not_found", `there is no file ${from}`));
    return text;
  }
  const answer = await ports.fetch(from, { signal: AbortSignal.timeout(30_000) }).catch((error: unknown): never => {
    throw new TroupeError(errorBody("unavailable", `${from} cannot be reached: ${error instanceof Error ? error.message : String(error)}`));
  });
  if (!answer.ok) throw new TroupeError(errorBody("unavailable", `${from} answered ${answer.status}`));
  const bytes = await answer.arrayBuffer();
  if (bytes.byteLength > TABLE_BYTES_MAX) throw new TroupeError(errorBody("too_large", `a table has at most ${TABLE_BYTES_MAX} bytes`));
  return new TextDecoder().decode(bytes);
}

export async function listBreakers(context: Context): Promise<number> {
  const { printer } = context;
  const entries = await (await context.bus()).bucket("BREAKERS").all();
  const breakers = entries.flatMap(({ key, value }) => {
    const said = decodeBreaker(value);
    return said === undefined ? [] : [{ ...parseBreakerKey(key), ...said }];
  });
  if (printer.json) {
    printer.document({ breakers });
    return EXIT.done;
  }
  printer.table(
    ["provider", "owner", "state", "cool-down ms", "by", "at"],
    breakers.map((one) => [one.provider, one.owner, one.state, one.cooldown_ms, one.by, one.at]),
  );
  if (breakers.length === 0) printer.note("every breaker is closed");
  return EXIT.done;
}
