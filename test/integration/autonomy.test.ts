// Goal:   an agent does by itself no more than its limits say, however many of its sessions ask at once, on however many workers, and though one of
//         them is killed meanwhile; beyond, it is told with one code that names the rule, and another tenant's agent of the same name feels nothing.
// Method: the real `up` with two workers; sessions whose model calls tools, side by side; kill -9 of the budget's owner among them; the count of what
//         really ran is the sessions' own journals'.
import { beforeAll, expect, test, vi } from "vitest";
import type { JsonObject } from "../../protocol/json.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

const TOOLS_MAX = 10;
const SESSIONS = 24;

let troupe: Troupe;
let other_key: string;

async function cli(args: readonly string[], stdin?: string): Promise<string> {
  const ran = await typed(troupe, args, stdin === undefined ? {} : { stdin });
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
const events = async (path: string): Promise<JsonObject[]> => (await troupe.journal(path)).flatMap((message) => message.events);
async function turn(id: string, content: string, key = troupe.key): Promise<void> {
  await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" }, key });
  await troupe.json(202, `/v1/sessions/${id}/messages`, { json: { content }, key });
}
async function ended(path: string): Promise<JsonObject[]> {
  for (const give_up_ms = performance.now() + 60_000; ; await later(100, undefined)) {
    const all = await events(path);
    if (performance.now() > give_up_ms || all.some(({ type }) => type === "turn.completed" || type === "turn.failed")) return all;
  }
}
const agent = (limits: JsonObject): string => JSON.stringify({ agent: "assistant", model: "simulated/script", tools: ["now"], max_output_tokens: 50, limits });
const calling = JSON.stringify([{ call: "now", args: {} }, { say: "done" }]);

beforeAll(async () => {
  troupe = await startTroupe();
  await cli(["tenants", "create", "other"]);
  other_key = (await cli(["keys", "create", "--tenant", "other"])).trim();
  for (const tenant of ["demo", "other"]) await cli(["agents", "put", "--tenant", tenant, "-"], agent({ actions: { tool_calls: TOOLS_MAX, period: "none" } }));
}, 120_000);

test(`of ${SESSIONS} sessions that call a tool at once, ${TOOLS_MAX} do, though a worker is killed; the others' models hear why, and so does who reads the budget`, async () => {
  const ids = Array.from({ length: SESSIONS }, (_, n) => `s${n}`);
  const started = Promise.all(ids.map((id) => turn(id, calling)));
  let owner = "";
  for (const give_up_ms = performance.now() + 60_000; owner === "" && performance.now() < give_up_ms; await later(5, undefined))
    owner = (await troupe.journal("demo/budget/main")).find((message) => message.events.some(({ type }) => type === "budget.action"))?.worker ?? "";
  const killed = await troupe.kill9("worker", owner);
  await started;
  const stories = await Promise.all(ids.map((id) => ended(`demo/session/${id}`)));
  for (const story of stories) expect(story.some(({ type }) => type === "turn.completed")).toBe(true);
  const all = stories.flat();
  const ran = all.filter(({ type }) => type === "tool.completed");
  const denied = all.filter(({ type }) => type === "tool.denied");
  // An attempt that was lost with its worker may have acted: it counts, and its repeat counts anew.
  const attempts = (await events("demo/budget/main")).filter(({ type }) => type === "budget.action");
  expect(attempts).toHaveLength(TOOLS_MAX);
  expect(ran.length).toBeLessThanOrEqual(TOOLS_MAX);
  // Nobody was denied a permit it had: whose attempt was not lost with the worker did run.
  for (const [n, story] of stories.entries()) {
    const permits = attempts.filter(({ action }) => String(action).startsWith(`demo/session/${ids[n]}/`)).length;
    const lost = story.some(({ type }) => type === "session.claimed");
    if (permits > 0 && !lost) expect(story.filter(({ type }) => type === "tool.completed")).toHaveLength(1);
  }
  expect(ran.length + denied.length).toBe(SESSIONS);
  for (const one of denied)
    expect(one).toMatchObject({ name: "now", code: "autonomy_exceeded", message: expect.stringContaining("limits.actions.tool_calls") });
  const refused = (await events("demo/budget/main")).filter((event) => event["code"] === "autonomy_exceeded");
  expect(refused[0]).toMatchObject({
    type: "budget.refused",
    rule: "limits.actions.tool_calls",
    agent: "assistant",
    limit: TOOLS_MAX,
    used: TOOLS_MAX,
    period: "none",
  });
  const view = JSON.parse(await cli(["budget", "show", "--tenant", "demo", "--json"])) as { actions: JsonObject[] };
  expect(view.actions).toMatchObject([{ agent: "assistant", none: { tool_calls: TOOLS_MAX, model_calls: 0 } }]);
  expect(await cli(["budget", "show", "--tenant", "demo"])).toMatch(/assistant +tool calls +10 +10 +10 +10/);
  await turn("s1", calling, other_key);
  expect((await ended("other/session/s1")).filter(({ type }) => type === "tool.completed")).toHaveLength(1);
  await troupe.replaced(killed);
});

test("beyond its model calls a turn ends with the same code and the rule's numbers, and one that is left as it is asks nobody", async () => {
  await cli(["agents", "put", "--tenant", "other", "-"], agent({ actions: { model_calls: 1 } }));
  await turn("m1", "[]", other_key);
  expect((await ended("other/session/m1")).some(({ type }) => type === "turn.completed")).toBe(true);
  await turn("m2", "[]", other_key);
  const story = await ended("other/session/m2");
  expect(story.find(({ type }) => type === "turn.failed")).toMatchObject({
    reason: "autonomy_exceeded",
    details: { rule: "limits.actions.model_calls", agent: "assistant", limit: 1, used: 1, period: "day", period_ends_at: expect.any(String) },
  });
  await cli(["agents", "put", "--tenant", "other", "-"], agent({}));
  await turn("m3", "[]", other_key);
  expect((await ended("other/session/m3")).some(({ type }) => type === "turn.completed")).toBe(true);
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
  const wrong = await typed(troupe, ["agents", "put", "--tenant", "other", "-"], { stdin: agent({ actions: { tool_calls: -1 } }) });
  expect(wrong).toMatchObject({ code: 1 });
  expect(wrong.stderr + wrong.stdout).toMatch(/invalid/);
});

test("a tool that has a price is paid for out of the budget before it runs: its category, its usage row and the ledger agree, and what does not fit is not run", async () => {
  const price = { usd_micros: 1_500, category: "retrieval" };
  await cli(
    ["agents", "put", "--tenant", "demo", "-"],
    JSON.stringify({ agent: "assistant", model: "simulated/script", tools: ["now"], max_output_tokens: 20, tool_prices: { now: price } }),
  );
  await cli(["budget", "set", "--tenant", "demo", "--user", "ann", "--limit-usd-micros", "2000", "--period", "none"]);
  for (const [n, outcome] of [
    [1, "tool.completed"],
    [2, "tool.failed"],
  ] as const) {
    await troupe.json(201, "/v1/sessions", { json: { id: `paid${n}`, agent: "assistant", user: "ann" } });
    await troupe.json(202, `/v1/sessions/paid${n}/messages`, { json: { content: calling } });
    const story = await ended(`demo/session/paid${n}`);
    expect(
      story.find(({ type }) => type === "turn.completed"),
      JSON.stringify(story.slice(-3)),
    ).toBeDefined();
    expect(story.filter(({ type }) => /^tool\.(completed|failed|denied)$/.test(String(type)))).toMatchObject([
      outcome === "tool.completed" ? { type: outcome, cost_usd_micros: 1_500 } : { type: outcome, code: "budget_exceeded" },
    ]);
  }
  const view = JSON.parse(await cli(["budget", "show", "--tenant", "demo", "--json"])) as { by_category: Record<string, number>; settled_usd_micros: number };
  expect(view.by_category).toMatchObject({ retrieval: 1_500, llm: expect.any(Number) });
  expect(Object.values(view.by_category).reduce((sum, one) => sum + one, 0)).toBe(view.settled_usd_micros);
  const rows = async (): Promise<JsonObject[]> =>
    (await cli(["usage", "--tenant", "demo", "--json"]))
      .trim()
      .split("\n")
      .map((line) => JSON.parse(line) as JsonObject)
      .filter((row) => row["purpose"] === "tool");
  let tools = await rows();
  for (const give_up_ms = performance.now() + 30_000; tools.length < 2 && performance.now() < give_up_ms; tools = await rows()) await later(200, undefined);
  expect(tools.sort((a, b) => (String(a["session"]) < String(b["session"]) ? -1 : 1))).toMatchObject([
    { session: "paid1", model: "tool/now", user: "ann", agent: "assistant", outcome: "completed", cost_usd_micros: 1_500 },
    { session: "paid2", model: "tool/now", outcome: "failed", code: "budget_exceeded", cost_usd_micros: 0 },
  ]);
  expect((await typed(troupe, ["verify", "demo"])).code).toBe(0);
});
