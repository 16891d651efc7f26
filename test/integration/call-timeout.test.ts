// Goal:   a call of a model or a tool that takes longer than its agent allows is ended by name on the real thing: the provider's stream is closed, the hold
//         settled by what was used, the turn (or the tool) says `timeout`, the place is free for the next; and `troupe workers` counts it.
// Method: the real `up` with one worker that makes one call at a time, and a provider that says three words and then nothing.
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import type { ActorEvent } from "../../protocol/journal.ts";
import { type ModelAnswer, type ModelServer, startModelServer } from "../contract/model-server.ts";
import { eventually, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

/** Long enough to be looked at while it runs; whoever answers at all answers sooner. */
const HASTY_MS = 6_000;
const HANDY_MS = 2_000;

let troupe: Troupe;
let server: ModelServer;
let answer: ModelAnswer = { text: "well", usage: { input: 10, output: 1 } };

const eventsOf = async (path: string): Promise<ActorEvent[]> => (await troupe.journal(path)).flatMap(({ events }) => events);
const END = /^turn\.(completed|failed|cancelled)$/;
const turnOf = (session: string): Promise<ActorEvent[]> =>
  eventually(
    () => eventsOf(`demo/session/${session}`),
    (events) => events.some(({ type }) => END.test(type)),
  );
async function say(session: string, agent: string, content: string): Promise<ActorEvent[]> {
  await troupe.json(201, "/v1/sessions", { json: { id: session, agent } });
  await troupe.json(202, `/v1/sessions/${session}/messages`, { json: { content } });
  return turnOf(session);
}
interface Workers {
  readonly workers: readonly { readonly calls: Readonly<Record<string, number>> | null }[];
}
const callsOf = async (): Promise<Readonly<Record<string, number>>> =>
  (JSON.parse((await typed(troupe, ["workers", "--json"])).stdout) as Workers).workers[0]?.calls ?? {};

beforeAll(async () => {
  server = await startModelServer({ answer: () => answer });
  troupe = await startTroupe({ workers: 1, env: { ANTHROPIC_API_KEY: "a", ANTHROPIC_BASE_URL: server.url, TROUPE_MODEL_CALLS_MAX: "1" } });
  for (const agent of [
    { agent: "hasty", model: "anthropic/claude-sonnet-5", max_output_tokens: 50, call_timeout_ms: HASTY_MS },
    { agent: "handy", model: "simulated/script", tools: ["wait_ms"], call_timeout_ms: HANDY_MS },
  ])
    expect(await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], { stdin: JSON.stringify(agent) })).toMatchObject({ code: 0 });
  expect(await typed(troupe, ["budget", "set", "--tenant", "demo", "--limit-usd-micros", "50000000", "--concurrency", "1"])).toMatchObject({ code: 0 });
}, 120_000);
afterAll(() => server?.close());

test("a provider that falls silent: its stream is closed, the turn failed as timeout, the hold settled, and the next turn has the place", async () => {
  answer = { text: "one two three", usage: { input: 200, output: 3 }, hang: true };
  const began_ms = performance.now();
  await troupe.json(201, "/v1/sessions", { json: { id: "silent", agent: "hasty" } });
  await troupe.json(202, "/v1/sessions/silent/messages", { json: { content: "hello over there" } });
  expect(
    await eventually(
      async () => server.open_streams,
      (open) => open === 1,
    ),
  ).toBe(1);
  expect(await eventually(callsOf, (calls) => calls["in_flight"] === 1)).toMatchObject({ in_flight: 1, timed_out: 0 });
  const events = await turnOf("silent");
  expect(performance.now() - began_ms).toBeGreaterThan(HASTY_MS);
  expect(events.find(({ type }) => type === "model.failed")).toMatchObject({ code: "timeout", usage: { input_tokens: 200 } });
  expect(events.find(({ type }) => type === "turn.failed")).toMatchObject({ reason: "timeout", message: `the call took longer than ${HASTY_MS} ms` });
  expect(
    await eventually(
      async () => server.open_streams,
      (open) => open === 0,
    ),
    "the provider's stream is closed",
  ).toBe(0);
  expect(server.requests_count, "nobody asks again").toBe(1);

  const settled = await eventually(
    async () => (await eventsOf("demo/budget/main")).filter(({ type }) => type === "budget.settled"),
    (all) => all.length === 1,
  );
  expect(settled).toEqual([expect.objectContaining({ session: "silent", assumed: false })]);
  expect(Number(settled[0]?.["cost_usd_micros"])).toBeGreaterThan(0);
  expect(JSON.parse((await typed(troupe, ["budget", "show", "--tenant", "demo", "--json"])).stdout)).toMatchObject({ reserved_usd_micros: 0 });

  answer = { text: "well", usage: { input: 10, output: 1 } };
  expect((await say("next", "hasty", "and you?")).at(-1)?.type === "turn.failed").toBe(false);
  expect((await eventsOf("demo/session/next")).some(({ type }) => type === "turn.completed")).toBe(true);
  expect(await eventually(callsOf, ({ in_flight, done }) => in_flight === 0 && done === 1)).toMatchObject({
    in_flight: 0,
    waiting: 0,
    done: 1,
    failed: 0,
    timed_out: 1,
  });
  expect((await typed(troupe, ["workers"])).stdout).toMatch(/timed out/);
});

test("a tool that takes too long is told to the model as timeout, and the turn goes on", async () => {
  const events = await say("tool", "handy", JSON.stringify([{ call: "wait_ms", args: { ms: 60_000 } }, { say: "enough" }]));
  expect(events.find(({ type }) => type === "tool.failed")).toMatchObject({
    code: "timeout",
    message: `the call took longer than ${HANDY_MS} ms; it may have acted`,
  });
  expect(events.find(({ type }) => END.test(type))).toMatchObject({ type: "turn.completed" });
  expect(await eventually(callsOf, ({ in_flight }) => in_flight === 0)).toMatchObject({ in_flight: 0, timed_out: 2 });
  expect(await typed(troupe, ["verify", "--json"])).toMatchObject({ code: 0, stdout: expect.stringContaining('"violations":0') });
});

test("a time that is no time is refused with its place", async () => {
  for (const call_timeout_ms of [0, 999, 3_600_001, 1.5, "soon"]) {
    const ran = await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], {
      stdin: JSON.stringify({ agent: "a", model: "simulated/echo", call_timeout_ms }),
    });
    expect(ran).toMatchObject({ code: 1 });
    expect(ran.stderr).toContain("/call_timeout_ms");
  }
});
