// Goal: `troupe models` answers from the table in use, takes a new one only through its gates, and shows which providers are left alone.
// Method: the command over a temporary home; breakers over the in-memory bus, opened by a board as a worker has it.
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { findProvider } from "@pydantic/genai-prices";
import { afterEach, beforeEach, expect, test } from "vitest";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld } from "../../roles/real-world.ts";
import { run } from "./ground.ts";

let home: string;
beforeEach(async () => {
  home = await mkdtemp(join(tmpdir(), "troupe-models-"));
});
afterEach(() => rm(home, { recursive: true, force: true }));

const models = (argv: readonly string[], more: Parameters<typeof run>[1] = {}) =>
  run(["models", ...argv], { env: { TROUPE_HOME: home }, working_directory: home, ...more });
const document = (ran: Awaited<ReturnType<typeof run>>) => JSON.parse(ran.stdout);
const published = () => JSON.parse(JSON.stringify(["anthropic", "openai", "google"].map((providerId) => findProvider({ providerId }))));

test("list, show, compare and recommend answer without anything running", async () => {
  const listed = document(await models(["list", "--provider", "google", "--capability", "tools", "--json"]));
  expect(listed.version).toContain("genai-prices");
  expect(listed.models.length).toBeGreaterThan(3);
  for (const model of listed.models) expect(model).toMatchObject({ provider: "google", capabilities: { tools: true } });
  const shown = await models(["show", "openai/gpt-5.6-luna"]);
  expect(shown.stdout).toMatch(/2026-07-30 +0 +0\.2 +1\.2/);
  const compared = document(await models(["compare", "simulated/echo", "google/gemma-3", "--json"]));
  expect(compared.models).toMatchObject([
    { id: "simulated/echo", input_usd_per_mtok: 1, output_usd_per_mtok: 10 },
    { id: "google/gemma-3", input_usd_per_mtok: null },
  ]);
  const asked = ["recommend", "--role", "coding", "--goal", "cost", "--limit", "2", "--allowed", "anthropic/*", "--json"];
  const recommended = document(await models(asked));
  expect(recommended.models.length).toBe(2);
  expect(recommended.models.every((model: { id: string }) => model.id.startsWith("anthropic/"))).toBe(true);
  expect(document(await models(asked))).toEqual(recommended);
});

test("for people what is unknown is a dash, not a zero", async () => {
  const { stdout } = await models(["compare", "google/gemma-3"]);
  expect(stdout).toMatch(/^input \$\/M +–$/m);
  expect(stdout).not.toContain(" 0");
});

test("a model that is not there is refused by its code", async () => {
  for (const argv of [
    ["show", "openai/of-tomorrow"],
    ["compare", "simulated/echo", "openai/of-tomorrow"],
  ]) {
    const ran = await models([...argv, "--json"]);
    expect(ran.code).toBe(1);
    expect(ran.lines().at(-1)).toMatchObject({ ok: false, error: { code: "model_unknown" } });
  }
});

test("a refresh from a file or an address is taken whole, and answers come from it at once", async () => {
  const table = published();
  table[0].models.push({ id: "claude-of-tomorrow", match: { equals: "claude-of-tomorrow" }, prices: { input_mtok: 7, output_mtok: 9 } });
  await writeFile(join(home, "table.json"), JSON.stringify(table));
  const refreshed = document(await models(["refresh", "--from", "table.json", "--json"]));
  expect(refreshed).toMatchObject({ kind: "refreshed", file: join(home, "models.json") });
  expect(document(await models(["show", "anthropic/claude-of-tomorrow", "--json"]))).toMatchObject({ prices: [{ input_usd_per_mtok: 7 }], quality: null });
  expect(document(await models(["list", "--json"])).version).toBe(refreshed.version);
  expect((await readdir(home)).sort()).toEqual(["models.json", "table.json"]);

  const asked: string[] = [];
  const fetched = await models(["refresh", "--from", "http://prices.test/data.json"], {
    fetch: (url) => {
      asked.push(url);
      return Promise.resolve(new Response(JSON.stringify(published())));
    },
  });
  expect([fetched.code, asked]).toEqual([0, ["http://prices.test/data.json"]]);
  expect((await models(["show", "anthropic/claude-of-tomorrow"])).code).toBe(1);
});

test("a bad table is refused with its gate, and the file of before stays", async () => {
  await writeFile(join(home, "good.json"), JSON.stringify(published()));
  expect((await models(["refresh", "--from", "good.json"])).code).toBe(0);
  const before = await readFile(join(home, "models.json"), "utf8");
  for (const [text, gate] of [
    ["not json", "unreadable"],
    [JSON.stringify([]), "too_few"],
    [JSON.stringify([published()[1]].map((one) => ({ ...one, models: one.models.slice(0, 60) }))), "shrunk"],
  ] as const) {
    await writeFile(join(home, "bad.json"), text);
    const ran = await models(["refresh", "--from", "bad.json", "--json"]);
    expect(ran.code).toBe(1);
    expect(ran.lines().at(-1)).toMatchObject({ ok: false, error: { code: "invalid", details: { gate } } });
    expect(await readFile(join(home, "models.json"), "utf8")).toBe(before);
  }
  const gone = await models(["refresh", "--from", "http://prices.test/"], { fetch: () => Promise.reject(new Error("no network")) });
  expect(gone.code).toBe(3);
});

test("a table in the home that is broken is told and not used", async () => {
  await writeFile(join(home, "models.json"), "{");
  const ran = await models(["list", "--json"]);
  expect(ran.stderr).toContain("is not used");
  expect(document(ran).version).toContain("genai-prices");
});

test("breakers shows the providers that workers leave alone", async () => {
  const world = realWorld();
  const broker = createMemoryBroker({ world, shards: 1 });
  const connectBus = () => Promise.resolve(broker.connect("cli"));
  expect(document(await models(["breakers", "--json"], { connectBus }))).toEqual({ breakers: [] });
  const board = createBreakerBoard({ world, log: silentLog, worker: "w1", bus: broker.connect("w1") });
  await board.start();
  for (let n = 0; n < 5; n++) {
    const admission = await board.admit({ provider: "openai", owner: "platform" });
    if (admission.kind === "admitted") admission.ended("failed");
  }
  await expect
    .poll(async () => document(await models(["breakers", "--json"], { connectBus })).breakers)
    .toMatchObject([{ provider: "openai", owner: "platform", state: "open", cooldown_ms: 5_000, by: "w1" }]);
  expect((await models(["breakers"])).code).toBe(3);
  await board.stop();
});
