// Goal:   a rate is exact whatever asks and whatever dies, its refusal is the same over HTTP and NATS, and nobody else feels it.
// Method: the real `up` with two workers; a thousand askers over two clients while the budget's owner is killed; then a session of the tenant whose
//         window is full, asked over HTTP and over NATS, beside another tenant with equal ids.
import { beforeAll, expect, test } from "vitest";
import { type CommandClient, createCommandClient } from "../../actors/client.ts";
import { budgetActor } from "../../protocol/ids.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { realWorld } from "../../roles/real-world.ts";
import { eventually, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

const WINDOW_S = 600;
const PERMITS = 100;
const ASKERS = 1000;

let troupe: Troupe;
let other_key: string;

async function cli(args: readonly string[], code = 0): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code });
  return ran.stdout;
}

beforeAll(async () => {
  troupe = await startTroupe();
  await cli(["tenants", "create", "other"]);
  other_key = (await cli(["keys", "create", "--tenant", "other"])).trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/echo" });
  for (const tenant of ["demo", "other"]) expect(await typed(troupe, ["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 120_000);

/** The worker that appended last to an actor's journal. */
const ownerOf = async (path: string): Promise<string> => (await troupe.journal(path)).at(-1)?.worker ?? "";

test(`${ASKERS} askers of ${PERMITS} permits over two workers get ${PERMITS}, though the budget's owner is killed among them`, async () => {
  await cli(["budget", "set", "--tenant", "demo", "--rate", `simulated=${PERMITS}/-/${WINDOW_S}`]);
  const clients: CommandClient[] = [];
  for (let n = 0; n < 2; n++) clients.push(createCommandClient({ bus: await troupe.bus(), world: realWorld() }));
  let answered = 0;
  const ask = async (n: number): Promise<JsonObject> => {
    const request = { type: "rate.acquire", body: { provider: "simulated", requests: 1, tokens: 10 }, channel: "control" as const, key: `asker-${n}` };
    for (;;) {
      const outcome = await (clients[n % 2] as CommandClient).command(budgetActor("demo"), request, { patience_ms: 20_000 });
      if (outcome.kind === "decided" && outcome.reply.ok) {
        answered += 1;
        return outcome.reply.result;
      }
      await later(100, undefined); // a worker that is gone: asked again under the same key
    }
  };
  const owner = await ownerOf("demo/budget/main");
  const first = Array.from({ length: 60 }, (_, n) => ask(n));
  await Promise.all(first.slice(0, 30));
  const rest = Array.from({ length: ASKERS - 60 }, (_, n) => ask(n + 60));
  const killed = await troupe.kill9("worker", owner);
  const results = await Promise.all([...first, ...rest]);
  await Promise.all(clients.map((client) => client.stop()));
  expect(answered).toBe(ASKERS);
  expect(results.filter((result) => result["granted"] === true)).toHaveLength(PERMITS);
  const refused = results.filter((result) => result["granted"] !== true);
  for (const result of refused) expect(result).toMatchObject({ refused: { code: "rate_limited", details: { requests: PERMITS, requests_max: PERMITS } } });
  expect(new Set((await troupe.journal("demo/budget/main")).map(({ worker }) => worker)).size).toBeGreaterThan(1);
  const view = JSON.parse(await cli(["budget", "show", "--tenant", "demo", "--json"])) as { rates: object[] };
  expect(view.rates).toMatchObject([{ provider: "simulated", requests: PERMITS, requests_remaining: 0 }]);
  await troupe.replaced(killed);
}, 120_000);

test("a session under a full window hears 429 with when to come again, over HTTP and over NATS alike, and another tenant with its ids hears nothing", async () => {
  for (const key of [troupe.key, other_key]) await troupe.json(201, "/v1/sessions", { json: { id: "s1", agent: "assistant" }, key });
  const send = (key: string): Promise<Response> => troupe.api("/v1/sessions/s1/messages", { json: { content: "hello" }, key });
  // The first call finds the window full; from then on the door knows, as soon as it has heard.
  let answer = await send(troupe.key);
  for (const give_up_ms = performance.now() + 60_000; answer.status === 202 && performance.now() < give_up_ms; answer = await send(troupe.key))
    await later(200, undefined);
  expect(answer.status).toBe(429);
  const wait_s = Number(answer.headers.get("retry-after"));
  expect(wait_s).toBeGreaterThan(30);
  expect(wait_s).toBeLessThanOrEqual(WINDOW_S + WINDOW_S / 60 + 1);
  const problem = (await answer.json()) as { code: string; details: JsonObject };
  expect(problem).toMatchObject({
    code: "rate_limited",
    details: { provider: "simulated", requests: PERMITS, requests_max: PERMITS, window_ms: WINDOW_S * 1000 },
  });
  // The worker that was killed came back, and shards go to it: one that has just got the session has heard of no window yet.
  let over_nats = await typed(troupe, ["send", "demo/session/s1", "hello", "--json"]);
  for (const give_up_ms = performance.now() + 60_000; over_nats.code === 0 && performance.now() < give_up_ms; await later(200, undefined))
    over_nats = await typed(troupe, ["send", "demo/session/s1", "hello", "--json"]);
  expect(over_nats.code).toBe(1);
  expect(JSON.parse(over_nats.stdout.trim().split("\n")[0] ?? "")).toMatchObject({
    ok: false,
    error: { code: "rate_limited", details: { provider: "simulated" } },
  });
  // The turn that was taken before the door knew fails with the same code.
  const failed = await eventually(
    async () => (await troupe.journal("demo/session/s1")).flatMap(({ events }) => events).find(({ type }) => type === "turn.failed"),
    (event) => event !== undefined,
  );
  expect(failed).toMatchObject({ reason: "rate_limited" });

  expect((await send(other_key)).status).toBe(202);
  for (const give_up_ms = performance.now() + 60_000; performance.now() < give_up_ms; await later(100, undefined)) {
    const ends = (await troupe.journal("other/session/s1")).flatMap(({ events }) => events).filter(({ type }) => /^turn\.(completed|failed)$/.test(type));
    if (ends.length === 0) continue;
    expect(ends).toMatchObject([{ type: "turn.completed" }]);
    break;
  }
  // What a call reserved in a window of tokens and did not use is there for the next one: four thousand are held for each answer of one word.
  await cli(["budget", "set", "--tenant", "other", "--rate", `simulated=-/5000/${WINDOW_S}`]);
  const settlements = async (): Promise<JsonObject[]> =>
    (await troupe.journal("other/budget/main"))
      .flatMap(({ events }) => events)
      .filter((event) => event.type === "budget.settled" && event["rates_unused"] !== undefined);
  for (let turn = 2; turn <= 5; turn++) {
    const talk = await troupe.api("/v1/sessions/s1/messages", { json: { content: "hello" }, key: other_key, headers: { accept: "text/event-stream" } });
    expect(await talk.text(), `turn ${turn}`).toContain("event: turn.completed");
    // It is given back a moment after the turn's end.
    for (const give_up_ms = performance.now() + 60_000; (await settlements()).length < turn - 1 && performance.now() < give_up_ms;) await later(100, undefined);
  }
  const window = (JSON.parse(await cli(["budget", "show", "--tenant", "other", "--json"])) as { rates: { requests: number; tokens: number }[] }).rates;
  expect(window).toMatchObject([{ provider: "simulated", requests: 4, tokens: expect.any(Number) }]);
  expect(window[0]?.tokens, "only what was used").toBeLessThan(500);
  expect((await settlements()).at(-1)).toMatchObject({ rates_unused: [{ provider: "simulated", requests: 0, tokens: expect.any(Number) }] });

  // A rate that is taken away is felt at once.
  await cli(["budget", "set", "--tenant", "demo", "--rate", "simulated=none"]);
  let again = await send(troupe.key);
  for (const give_up_ms = performance.now() + 60_000; again.status === 429 && performance.now() < give_up_ms; again = await send(troupe.key))
    await later(100, undefined);
  expect(again.status).toBe(202);
}, 120_000);
