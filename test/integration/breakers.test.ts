// Goal:   a provider that is down is felt once: a turn falls back within one attempt; the breaker opens at its threshold for all workers at once; when
//         its time is over one call of all sessions on all workers goes out as the probe; all of it is visible to who asks; and one tenant's key at
//         the same provider is one tenant's trouble.
// Method: the real `up` with two workers behind a local server that says, by the key it is shown, that it is down, that it takes its time, or the
//         answer, and counts what it was really asked.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { decodeBreaker } from "../../actors/breaker-board.ts";
import { sendSignal } from "../../deploy/local/server-process.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { COOLDOWN_MS_MIN } from "../../providers/breaker.ts";
import { type ModelAnswer, type ModelServer, type ModelServerRequest, startModelServer } from "../contract/model-server.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

const CLAUDE = "anthropic/claude-sonnet-5";
const GPT = "openai/gpt-5.6-luna";
const PLATFORM_KEY = "platform-0123456789abcdefghij";
const ACME_KEY = "acme-anthropic-0123456789abcdefghij";
const DOWN: ModelAnswer = { refusal: { status: 503, body: { type: "error", error: { type: "api_error", message: "nobody here" } } } };
const SESSIONS = 8;

let troupe: Troupe;
let server: ModelServer;
const tenants: Record<string, string> = {};
/** What each key hears at Anthropic. */
const says: Record<string, ModelAnswer> = {};
const asked: { readonly key: string; readonly at_ms: number }[] = [];
const askedWith = (key: string): number => asked.filter((one) => one.key === key).length;

async function cli(args: readonly string[], stdin?: string): Promise<string> {
  const ran = await typed(troupe, args, stdin === undefined ? {} : { stdin });
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
async function eventually<T>(read: () => Promise<T>, good: (value: T) => boolean, patience_ms = 60_000): Promise<T> {
  for (const give_up_ms = performance.now() + patience_ms; ; await later(50, undefined)) {
    const value = await read();
    if (good(value) || performance.now() > give_up_ms) return value;
  }
}
const events = async (path: string): Promise<JsonObject[]> => (await troupe.journal(path)).flatMap((message) => message.events);
const make = (tenant: string, id: string, agent: string): Promise<unknown> => troupe.json(201, "/v1/sessions", { json: { id, agent }, key: tenants[tenant]! });
const say = (tenant: string, id: string): Promise<unknown> =>
  troupe.json(202, `/v1/sessions/${id}/messages`, { json: { content: "hello over there" }, key: tenants[tenant]! });
async function begin(tenant: string, id: string, agent: string): Promise<void> {
  await make(tenant, id, agent);
  await say(tenant, id);
}
const ended = (tenant: string, id: string): Promise<JsonObject[]> =>
  eventually(
    () => events(`${tenant}/session/${id}`),
    (all) => all.some(({ type }) => type === "turn.completed" || type === "turn.failed"),
    60_000,
  );
const breakers = async (): Promise<JsonObject[]> => (JSON.parse(await cli(["models", "breakers", "--json"])) as { breakers: JsonObject[] }).breakers;
/** By worker. */
async function metric(line: RegExp): Promise<number[]> {
  const urls = troupe
    .dev()
    .processes.filter(({ role }) => role === "worker")
    .map(({ id }) => [...readFileSync(join(troupe.home, "logs", `worker-${id}.log`), "utf8").matchAll(/"http":"([^"]+)"/g)].at(-1)?.[1] ?? "");
  const texts = await Promise.all(urls.map(async (url) => (await fetch(`${url}/metrics`)).text()));
  return texts.map((text) => Number(line.exec(text)?.[1] ?? 0));
}
/** Of Anthropic's breaker, by worker, once it is so. */
const states = (wanted: string): Promise<number[]> =>
  eventually(
    () => metric(/^troupe_breaker_state\{[^}]*provider="anthropic"[^}]*\} (\d+)$/m),
    (all) => all.join() === wanted,
  );

beforeAll(async () => {
  server = await startModelServer({
    answer: ({ dialect, headers }: ModelServerRequest): ModelAnswer => {
      if (dialect !== "anthropic") return { text: "from the other one" };
      const key = String(headers["x-api-key"] ?? headers["authorization"]).replace("Bearer ", "");
      asked.push({ key, at_ms: performance.now() });
      return says[key] ?? { text: "well said" };
    },
  });
  troupe = await startTroupe({
    env: {
      ANTHROPIC_API_KEY: PLATFORM_KEY,
      ANTHROPIC_BASE_URL: server.url,
      OPENAI_API_KEY: "o",
      OPENAI_BASE_URL: `${server.url}/v1`,
      TROUPE_RATES_UNDECIDED: "open",
      // A worker that is made to stand still keeps what it has until it goes on.
      TROUPE_LEASE_TTL_MS: "60000",
    },
  });
  for (const tenant of ["acme", "rival"]) {
    await cli(["tenants", "create", tenant]);
    tenants[tenant] = (await cli(["keys", "create", "--tenant", tenant])).trim();
    for (const agent of [
      { agent: "alone", model: CLAUDE, max_output_tokens: 100 },
      { agent: "careful", model: CLAUDE, max_output_tokens: 100, fallbacks: { models: [GPT] } },
    ])
      await cli(["agents", "put", "--tenant", tenant, "-"], JSON.stringify(agent));
  }
  const admin = (await cli(["keys", "create", "--tenant", "acme", "--scope", "admin"])).trim();
  await troupe.json(201, "/v1/provider-keys/anthropic", { method: "PUT", key: admin, json: { key: ACME_KEY } });
}, 120_000);
afterAll(() => server?.close());

test("one tenant's bad key: its own breaker opens for both workers, its turns fall back within one attempt, and nobody else's calls are kept from the provider", async () => {
  says[ACME_KEY] = DOWN;
  await begin("acme", "first", "careful");
  const first = await ended("acme", "first");
  expect(
    first.find(({ type }) => type === "model.completed"),
    "the other model answered, in the first attempt",
  ).toMatchObject({ model: GPT, attempt: 1 });
  expect(first.filter(({ type }) => type === "model.tried").map(({ model, outcome }) => [model, outcome])).toEqual([
    [CLAUDE, "failed"],
    [CLAUDE, "failed"],
    [CLAUDE, "failed"],
  ]);
  // Sessions of both workers until the threshold; then the breaker is open for all of them, and nobody asks any more.
  for (let n = 0; (await breakers()).length === 0 && n < 20; n++) {
    await begin("acme", `more${n}`, "careful");
    await ended("acme", `more${n}`);
  }
  expect(await breakers()).toMatchObject([{ provider: "anthropic", owner: "tenant.acme", state: "open" }]);
  const [before, open_ms] = [askedWith(ACME_KEY), performance.now()];
  for (let n = 0; n < 4; n++) await begin("acme", `spared${n}`, "careful");
  let skipped = 0;
  for (let n = 0; n < 4; n++) {
    const story = await ended("acme", `spared${n}`);
    const passed_over = story.filter(({ type }) => type === "model.skipped");
    for (const one of passed_over) expect(one).toMatchObject({ model: CLAUDE, code: "circuit_open" });
    skipped += passed_over.length;
    expect(story.find(({ type }) => type === "model.completed")).toMatchObject({ model: GPT, attempt: 1 });
  }
  const probes = askedWith(ACME_KEY) - before;
  expect(probes, "at most a probe each time that the time is over").toBeLessThanOrEqual(1 + Math.floor((performance.now() - open_ms) / COOLDOWN_MS_MIN));
  expect(skipped + probes, "everybody else passes it over").toBe(4);
  expect(skipped).toBeGreaterThan(0);
  const workers = new Set((await Promise.all([0, 1, 2, 3].map((n) => troupe.journal(`acme/session/spared${n}`)))).map((all) => all.at(-1)?.worker));
  expect(workers.size, "they ran on both workers").toBe(2);
  const told = (await Promise.all([0, 1, 2, 3].map((n) => cli(["explain", `acme/session/spared${n}`])))).join("\n");
  expect(told).toMatch(/model call 1\.0: anthropic\/claude-sonnet-5 passed over, circuit_open/);
  await begin("rival", "beside", "alone");
  expect((await ended("rival", "beside")).find(({ type }) => type === "model.completed")).toMatchObject({ model: CLAUDE });
  expect(askedWith(PLATFORM_KEY)).toBe(1);
  expect(Math.max(...(await metric(/^troupe_breaker_changes_total\{[^}]*to="open"[^}]*\} (\d+)$/m)))).toBeGreaterThanOrEqual(1);
});

test("the platform's: open at the fifth failure, seen in the metrics; of eight sessions on two workers that wait for it one sends the probe, and its answer lets all in", async () => {
  says[PLATFORM_KEY] = DOWN;
  const open = async (): Promise<boolean> => (await breakers()).some(({ owner, state }) => owner === "platform" && state === "open");
  const waiting = Array.from({ length: SESSIONS }, (_, n) => `waits${n}`);
  await Promise.all(waiting.map((id) => make("rival", id, "alone")));
  const before = askedWith(PLATFORM_KEY);
  for (let n = 0; !(await open()) && n < 20; n++) {
    await begin("rival", `trip${n}`, "careful");
    await ended("rival", `trip${n}`);
  }
  expect(await open()).toBe(true);
  const failures = askedWith(PLATFORM_KEY) - before;
  expect(failures).toBeGreaterThanOrEqual(5);
  expect(failures, "a worker's threshold is five of its own calls; a turn makes three").toBeLessThanOrEqual(2 * 5 + 3);
  expect(await states("2,2"), "both workers know it").toEqual([2, 2]);

  // Another failed probe may have doubled the time; whatever it is, when it is over there is one.
  const PROBE_MS = 3_500;
  says[PLATFORM_KEY] = { text: "here again", first_token_ms: PROBE_MS };
  const from = asked.length;
  await Promise.all(waiting.map((id) => say("rival", id)));
  // All of them, or all but the one that is the probe by then.
  const waits = await eventually(
    async () => {
      const views = await Promise.all(
        waiting.map((id) => troupe.json<{ waits_for: JsonObject | null }>(200, `/v1/sessions/${id}`, { key: tenants["rival"]! })),
      );
      return views.flatMap(({ waits_for }) => (waits_for === null ? [] : [waits_for]));
    },
    (all) => all.length > 0,
  );
  expect(waits[0]).toMatchObject({ for: "provider", provider: "anthropic", code: "circuit_open", since: expect.any(String), until: expect.any(String) });
  await eventually(
    async () => asked.length,
    (count) => count > from,
  );
  const probe_ms = asked[from]?.at_ms ?? 0;
  const shared = await (await troupe.bus()).bucket("BREAKERS").get("anthropic.platform");
  expect(shared === undefined ? undefined : decodeBreaker(shared.value)).toMatchObject({ state: "half_open" });
  const stories = await Promise.all(Array.from({ length: SESSIONS }, (_, n) => ended("rival", `waits${n}`)));
  for (const story of stories) expect(story.find(({ type }) => type === "turn.completed")).toBeDefined();
  const workers = new Set((await Promise.all(stories.map((_, n) => troupe.journal(`rival/session/waits${n}`)))).map((all) => all.at(-1)?.worker));
  expect(workers.size, "they waited on both workers").toBe(2);
  expect(askedWith(PLATFORM_KEY) - before - failures).toBe(SESSIONS);
  const after_ms = asked.slice(from + 1).map(({ at_ms }) => at_ms - probe_ms);
  expect(Math.min(...after_ms), "while the probe was out, nobody else called").toBeGreaterThanOrEqual(PROBE_MS - 5);
  expect((await breakers()).filter(({ owner }) => owner === "platform")).toEqual([]);
  expect(await states("0,0")).toEqual([0, 0]);
});

test("while a budget's owner stands still, a call goes on where no limit applies and rates may stay undecided; the budget counts it afterwards", async () => {
  const [budget, tenant] = ["rival/budget/main", { key: tenants["rival"]! }];
  const owner = (await troupe.journal(budget)).at(-1)?.worker ?? "";
  // A session that lives on the other worker, and has its configuration before anything stands still.
  let session = "";
  for (let n = 0; session === "" && n < 64; n++) {
    await troupe.json(201, "/v1/sessions", { json: { id: `still${n}`, agent: "alone" }, ...tenant });
    const all = await eventually(
      () => troupe.journal(`rival/session/still${n}`),
      (journal) => journal.at(-1)?.state === "idle",
    );
    if (all.at(-1)?.worker !== owner) session = `still${n}`;
  }
  const settled = async (): Promise<number> =>
    (await troupe.journal(budget)).flatMap(({ events }) => events).filter(({ type }) => type === "budget.settled").length;
  const before = await settled();
  const pid = troupe.processOf("worker", owner);
  sendSignal(pid, "SIGSTOP");
  try {
    await troupe.json(202, `/v1/sessions/${session}/messages`, { json: { content: "hello" }, ...tenant });
    expect((await ended("rival", session)).find(({ type }) => type === "turn.completed")).toBeDefined();
    const entries = (await troupe.journal(`rival/session/${session}`)).flatMap((message) => message.entries);
    expect(entries.filter((entry) => entry.t === "done").at(-1)).toMatchObject({ output: { rate_undecided: true } });
    expect(await settled(), "the budget stood still all the while").toBe(before);
  } finally {
    sendSignal(pid, "SIGCONT");
  }
  expect(await eventually(settled, (count) => count > before)).toBe(before + 1);
  expect((await typed(troupe, ["verify", "rival"])).code).toBe(0);
});
