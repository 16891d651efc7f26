// Goal:   every call of a model is accounted for on the real thing: tried again, fallen back, judged, cancelled, lost with its worker; each is a usage row
//         with its own outcome, tokens and cost, the rows sum to the ledger, and who waits for a provider can be asked why.
// Method: the real `up` with two providers behind a local server that says what a scenario wants of each request: 429, overloaded inside a 200, down.
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import type { ActorEvent } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { type ModelAnswer, type ModelServer, type ModelServerRequest, startModelServer } from "../contract/model-server.ts";
import { eventually, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

const CLAUDE = "anthropic/claude-sonnet-5";
const GPT = "openai/gpt-5.6-luna";
const RATE_LIMITED = (seconds: number): ModelAnswer => ({
  refusal: {
    status: 429,
    headers: { "retry-after": String(seconds) },
    body: { type: "error", error: { type: "rate_limit_error", message: "too many requests of yours" } },
  },
});
const OVERLOADED: ModelAnswer = { stream_error: { after_words: 0, type: "overloaded_error", message: "too much to do" } };
const DOWN: ModelAnswer = { refusal: { status: 503, body: { type: "error", error: { type: "api_error", message: "nobody here" } } } };
const USAGE = { input: 100, output: 20 };

let troupe: Troupe;
let server: ModelServer;
/** What each model says next: each request takes one, the last one stays. */
const says = new Map<string, ModelAnswer[]>();
const say = (model: string, ...answers: ModelAnswer[]): void => void says.set(model, answers);

interface Row {
  readonly inst: string;
  readonly attempt: number;
  readonly try: number;
  readonly purpose: string;
  readonly rule: string | null;
  readonly model: string;
  readonly provider: string;
  readonly outcome: string;
  readonly code: string | null;
  readonly input_tokens: number | null;
  readonly output_tokens: number | null;
  readonly cost_usd_micros: number | null;
  readonly estimated: boolean;
  readonly latency_ms: number;
}

beforeAll(async () => {
  const answer = (request: ModelServerRequest): ModelAnswer => {
    const model = `${request.dialect === "anthropic" ? "anthropic" : "openai"}/${request.model}`;
    const list = says.get(model) ?? [];
    return (list.length > 1 ? list.shift() : list[0]) ?? { text: "ALLOW", usage: USAGE };
  };
  server = await startModelServer({ answer });
  troupe = await startTroupe({
    env: { ANTHROPIC_API_KEY: "a", ANTHROPIC_BASE_URL: server.url, OPENAI_API_KEY: "o", OPENAI_BASE_URL: `${server.url}/v1` },
  });
  const agents: JsonObject[] = [
    { agent: "alone", model: CLAUDE, max_output_tokens: 1000 },
    { agent: "careful", model: CLAUDE, max_output_tokens: 1000, fallbacks: { models: [GPT] } },
    {
      agent: "judged",
      model: GPT,
      max_output_tokens: 1000,
      guardrails: [
        { name: "kind", on: "input", kind: "judge", model: CLAUDE, policy: "be kind" },
        { name: "true", on: "output", kind: "judge", model: CLAUDE, policy: "be true" },
      ],
    },
  ];
  for (const agent of agents)
    expect(await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], { stdin: JSON.stringify(agent) }), String(agent["agent"])).toMatchObject({
      code: 0,
    });
  expect(await typed(troupe, ["budget", "set", "--tenant", "demo", "--limit-usd-micros", "500000000"])).toMatchObject({ code: 0 });
}, 120_000);
afterAll(() => server?.close());

const eventsOf = async (session: string): Promise<ActorEvent[]> => (await troupe.journal(`demo/session/${session}`)).flatMap(({ events }) => events);
const TURN_ENDS = ["turn.completed", "turn.failed", "turn.cancelled"];

async function begin(session: string, agent: string, content = "hello over there"): Promise<void> {
  await troupe.json(201, "/v1/sessions", { json: { id: session, agent } });
  await troupe.json(202, `/v1/sessions/${session}/messages`, { json: { content } });
}
async function ended(session: string): Promise<ActorEvent[]> {
  const events = await eventually(
    () => eventsOf(session),
    (all) => all.some(({ type }) => TURN_ENDS.includes(type)),
    60_000,
  );
  expect(events.filter(({ type }) => TURN_ENDS.includes(type))).toHaveLength(1);
  return events;
}

/** The rows of a session in the order of their calls, once their sum is what the ledger settled for it. */
async function rowsOf(session: string, count: number): Promise<Row[]> {
  const read = async (): Promise<Row[]> => {
    const { stdout } = await typed(troupe, ["usage", "--tenant", "demo", "--session", session, "--json"]);
    return stdout.split("\n").flatMap((line) => (line === "" ? [] : [JSON.parse(line) as Row]));
  };
  const settled = async (): Promise<number> =>
    (await troupe.journal("demo/budget/main"))
      .flatMap(({ events }) => events)
      .filter((event) => event.type === "budget.settled" && event["session"] === session)
      .reduce((sum, event) => sum + Number(event["cost_usd_micros"]), 0);
  const sumOf = (rows: readonly Row[]): number => rows.reduce((sum, row) => sum + (row.cost_usd_micros ?? 0), 0);
  const both = await eventually(
    async () => ({ rows: await read(), ledger: await settled() }),
    ({ rows, ledger }) => rows.length >= count && rows.every((row) => row.cost_usd_micros !== null) && sumOf(rows) === ledger,
  );
  expect(both.rows, session).toHaveLength(count);
  expect(sumOf(both.rows), `the rows of ${session} sum to its ledger`).toBe(both.ledger);
  return both.rows.sort((a, b) => a.attempt - b.attempt || a.try - b.try);
}

test("429 and then an answer: whoever asks hears what it waits for, and both calls have their rows", async () => {
  say(CLAUDE, RATE_LIMITED(6), { text: "now it goes", usage: USAGE });
  await begin("limited", "alone");
  const told = await eventually(
    async () => JSON.parse((await typed(troupe, ["explain", "demo/session/limited", "--json"])).stdout) as { wait_reason: string | null },
    ({ wait_reason }) => wait_reason !== null && wait_reason.includes("provider"),
    5_500,
  );
  expect(told.wait_reason).toMatch(/^waits for provider anthropic: try 2 of anthropic\/claude-sonnet-5 in \d+ ms, because .*\(rate_limited\)$/);
  const view = (await troupe.json(200, "/v1/sessions/limited")) as { wait_reason: string | null; state: string };
  expect(view).toMatchObject({ state: "thinking", wait_reason: expect.stringContaining("waits for provider anthropic") });
  const events = await ended("limited");
  expect(events.find(({ type }) => type === "model.retrying")).toMatchObject({ model: CLAUDE, try: 2, code: "rate_limited" });
  expect(events.find(({ type }) => type === "model.tried")).toMatchObject({ try: 1, outcome: "failed", code: "rate_limited", model: CLAUDE });
  expect(await rowsOf("limited", 2)).toMatchObject([
    { try: 1, outcome: "failed", code: "rate_limited", model: CLAUDE, provider: "anthropic", cost_usd_micros: 0 },
    { try: 2, outcome: "completed", code: null, input_tokens: 100, output_tokens: 20 },
  ]);
  expect(await troupe.json(200, "/v1/sessions/limited")).toMatchObject({ state: "idle", usage: { model_calls: 2 }, wait_reason: "waits for a message" });
});

test("overloaded inside a 200: the try that failed has its row, its error class and what it may have cost", async () => {
  say(CLAUDE, OVERLOADED, OVERLOADED, { text: "at last", usage: USAGE });
  await begin("busy", "alone");
  await ended("busy");
  const rows = await rowsOf("busy", 3);
  expect(rows).toMatchObject([
    { try: 1, outcome: "failed", code: "overloaded" },
    { try: 2, outcome: "failed", code: "overloaded" },
    { try: 3, outcome: "completed", code: null },
  ]);
  const total = await typed(troupe, ["usage", "--tenant", "demo", "--session", "busy"]);
  expect(total.stdout).toContain("3 attempts");
});

test("a call is judged before and after: each judge's call is reserved, and has its row with the rule's name", async () => {
  say(CLAUDE, { text: "ALLOW", usage: { input: 50, output: 2 } });
  say(GPT, { text: "a true word", usage: USAGE });
  await begin("judged", "judged");
  expect((await ended("judged")).find(({ type }) => type === "turn.completed")).toBeDefined();
  expect(await rowsOf("judged", 3)).toMatchObject([
    { try: 1, purpose: "guardrail", rule: "kind", model: CLAUDE, input_tokens: 50, cost_usd_micros: expect.any(Number) },
    { try: 2, purpose: "answer", rule: null, model: GPT },
    { try: 3, purpose: "guardrail", rule: "true", model: CLAUDE },
  ]);
  const books = (await troupe.journal("demo/budget/main")).flatMap(({ events }) => events).filter((event) => event["session"] === "judged");
  const reserved = books.filter(({ type }) => type === "budget.reserved");
  expect(reserved.map((event) => event["model"])).toEqual([CLAUDE, GPT, CLAUDE]);
  expect(new Set(reserved.map((event) => event["hold"])).size).toBe(1);
  const settled = books.filter(({ type }) => type === "budget.settled");
  expect(settled).toMatchObject([{ assumed: false }]);
  expect(Number(settled[0]?.["cost_usd_micros"])).toBeLessThanOrEqual(Number(settled[0]?.["reserved_usd_micros"]));
});

test("a turn that is cancelled while its answer streams is settled by what was used, not by what was held", async () => {
  say(CLAUDE, { tokens: 400, token_ms: 25, usage: { input: 300, output: 400 } });
  const sent_before = server.tokens_sent;
  await begin("cancelled", "alone");
  await eventually(
    async () => server.tokens_sent,
    (sent) => sent > sent_before + 30,
  );
  await troupe.json(200, "/v1/sessions/cancelled/cancel", { json: {} });
  const events = await ended("cancelled");
  const failed = events.find(({ type }) => type === "model.failed");
  expect(failed).toMatchObject({ code: "cancelled", model: CLAUDE, usage: { input_tokens: 300, output_tokens: expect.any(Number) } });
  const [row] = await rowsOf("cancelled", 1);
  expect(row).toMatchObject({ outcome: "cancelled", input_tokens: 300, estimated: true, try: 1 });
  expect(row?.output_tokens).toBeGreaterThan(5);
  expect(row?.output_tokens).toBeLessThan(300);
  const settled = (await troupe.journal("demo/budget/main"))
    .flatMap(({ events: all }) => all)
    .find((event) => event.type === "budget.settled" && event["session"] === "cancelled");
  expect(settled).toMatchObject({ assumed: false, cost_usd_micros: row?.cost_usd_micros });
  expect(Number(settled?.["cost_usd_micros"])).toBeLessThan(Number(settled?.["reserved_usd_micros"]) / 2);
});

test("a provider that is down: its tries and the fallback's answer have a row each, and then its breaker is open and said to be", async () => {
  say(CLAUDE, DOWN);
  say(GPT, { text: "from the other one", usage: USAGE });
  await begin("fallen", "careful");
  await ended("fallen");
  expect(await rowsOf("fallen", 4)).toMatchObject([
    { try: 1, model: CLAUDE, outcome: "failed", code: "provider_unavailable" },
    { try: 2, model: CLAUDE, outcome: "failed" },
    { try: 3, model: CLAUDE, outcome: "failed" },
    { try: 4, model: GPT, provider: "openai", outcome: "completed" },
  ]);
  // Whoever has nothing else waits for it.
  await begin("shut", "alone");
  const waits = await eventually(
    async () => (await troupe.json(200, "/v1/sessions/shut")) as { wait_reason: string | null; state: string },
    ({ wait_reason }) => wait_reason?.includes("circuit breaker is open") === true,
    60_000,
  );
  expect(waits.wait_reason).toMatch(/waits for provider anthropic: try \d of .* because its circuit breaker is open \(circuit_open\)/);
  say(CLAUDE, { text: "here again", usage: USAGE });
  const events = await ended("shut");
  expect(events.filter(({ type }) => type === "model.skipped")[0]).toMatchObject({ model: CLAUDE, code: "circuit_open" });
  await rowsOf("shut", events.filter(({ type }) => type === "model.tried").length + 1);
});

test("a worker that is killed while it tries again: what had ended is known, what was lost is settled at the rest of its hold", async () => {
  say(CLAUDE, OVERLOADED, { tokens: 200, token_ms: 50, usage: USAGE }, { text: "after all", usage: USAGE });
  const sent_before = server.tokens_sent;
  await begin("lost", "alone");
  await eventually(
    () => eventsOf("lost"),
    (all) => all.some(({ type }) => type === "model.retrying"),
  );
  await eventually(
    async () => server.tokens_sent,
    (sent) => sent > sent_before + 5,
  );
  const owner = (await troupe.journal("demo/session/lost")).at(-1)?.worker;
  await troupe.replaced(await troupe.kill9("worker", owner));
  await ended("lost");
  const rows = await rowsOf("lost", 3);
  expect(rows).toMatchObject([
    { attempt: 1, try: 1, outcome: "failed", code: "overloaded" },
    { attempt: 1, try: 2, outcome: "superseded", estimated: true },
    { attempt: 2, try: 1, outcome: "completed" },
  ]);
  expect(rows[1]?.cost_usd_micros).toBeGreaterThan(rows[2]?.cost_usd_micros ?? Number.POSITIVE_INFINITY);
});

test("the books agree to the micro-dollar, and every journal replays", async () => {
  expect((await typed(troupe, ["verify", "--json"])).stdout).toContain('"violations":0');
});
