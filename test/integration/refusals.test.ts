// Goal:   who is refused for money, for a rate, for want of a session's place or because too much waits hears the same over HTTP and over NATS: one code, the same numbers in the
//         details; over HTTP the status and the header that a client's own retries go by: 402 with `x-should-retry: false`, 429 and 503 with `retry-after`.
// Method: the real `up` with one worker and small bounds; a tenant for each refusal, asked through both doors one after the other.
import { beforeAll, expect, test, vi } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
const keys: Record<string, string> = {};

async function cli(args: readonly string[], stdin?: string): Promise<string> {
  const ran = await typed(troupe, args, stdin === undefined ? {} : { stdin });
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
const answer = (token_ms: number): string => JSON.stringify([{ say: "one", tokens: 20, token_ms }]);
const create = (tenant: string, id: string): Promise<unknown> => troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" }, key: keys[tenant]! });
const send = (tenant: string, id: string, content = answer(1)): Promise<Response> =>
  troupe.api(`/v1/sessions/${id}/messages`, { json: { content }, key: keys[tenant]! });

/** As a service on the bus says a command: stored, and one answer to its own inbox. */
async function overNats(tenant: string, id: string, type = "message.send", body: JsonObject = { content: answer(1) }): Promise<Reply | undefined> {
  const bus = await troupe.bus();
  const inbox = bus.inbox();
  const reply = new Promise<Reply | undefined>((resolve) => {
    bus.subscribe(inbox, ({ data }) => resolve(decodeReply(data)));
    setTimeout(() => resolve(undefined), 60_000);
  });
  await bus.flush();
  const data = new TextEncoder().encode(JSON.stringify({ type, body }));
  expect(await bus.publish(`tenant.${tenant}.session.${id}.command`, data, { headers: { "Troupe-Reply-To": inbox } })).toMatchObject({ kind: "stored" });
  return reply;
}

/** Until the door knows: the answer, and what the same question hears over NATS. */
async function refusedBoth(tenant: string, status: number, id: string): Promise<{ http: Response; problem: JsonObject; nats: JsonObject | undefined }> {
  let http = await send(tenant, id);
  for (const give_up_ms = performance.now() + 60_000; http.status !== status && performance.now() < give_up_ms; http = await send(tenant, id))
    await later(200, undefined);
  const nats = await overNats(tenant, id);
  return { http, problem: (await http.json()) as JsonObject, nats: nats?.ok === false ? (nats.error as unknown as JsonObject) : undefined };
}

beforeAll(async () => {
  troupe = await startTroupe({ workers: 1, env: { TROUPE_TENANT_CALLS_WAITING_MAX: "10", TROUPE_REFUSE_FROM_PERCENT: "90" } });
  for (const tenant of ["poor", "fast", "busy", "full"]) {
    await cli(["tenants", "create", tenant]);
    keys[tenant] = (await cli(["keys", "create", "--tenant", tenant])).trim();
    await cli(["agents", "put", "--tenant", tenant, "-"], JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 }));
  }
}, 120_000);

test("402: the budget's numbers, and a client that repeats by itself is told not to", async () => {
  await cli(["budget", "set", "--tenant", "poor", "--limit-usd-micros", "0", "--period", "month"]);
  await create("poor", "s");
  const { http, problem, nats } = await refusedBoth("poor", 402, "s");
  expect([http.status, http.headers.get("x-should-retry"), http.headers.get("content-type")]).toEqual([
    402,
    "false",
    expect.stringContaining("application/problem+json"),
  ]);
  const details = { level: "tenant", limit_usd_micros: 0, settled_usd_micros: 0, reserved_usd_micros: 0, remaining_usd_micros: 0, period: "month" };
  expect(problem).toMatchObject({ code: "budget_exceeded", status: 402, details });
  expect(nats).toEqual({ code: problem["code"], message: problem["detail"], details: problem["details"] });
});

test("429: the window's numbers, and when to come again", async () => {
  await cli(["budget", "set", "--tenant", "fast", "--rate", "simulated=1/-/600"]);
  await create("fast", "s");
  const { http, problem, nats } = await refusedBoth("fast", 429, "s");
  expect([http.status, Number(http.headers.get("retry-after"))]).toEqual([429, Math.ceil(Number((problem["details"] as JsonObject)["retry_after_ms"]) / 1000)]);
  const details = { provider: "simulated", requests: 1, requests_max: 1, tokens: expect.any(Number), tokens_max: null, window_ms: 600_000 };
  expect(problem).toMatchObject({ code: "rate_limited", details });
  // Only the time that is left has gone on meanwhile.
  const { retry_after_ms: over_http, ...rest } = problem["details"] as JsonObject;
  expect(nats).toMatchObject({ code: "rate_limited", message: problem["detail"], details: rest });
  expect(Number((nats?.["details"] as JsonObject | undefined)?.["retry_after_ms"])).toBeLessThanOrEqual(Number(over_http));
});

test("503: how much waits for what, and when to come again", async () => {
  await cli(["budget", "set", "--tenant", "busy", "--concurrency", "1"]);
  await create("busy", "first");
  expect((await send("busy", "first", answer(10_000))).status).toBe(202);
  const calls = async (): Promise<{ running: number; waiting: number } | undefined> =>
    (JSON.parse(await cli(["waits", "--json"])) as { workers: { calls: { running: number; waiting: number } }[] }).workers[0]?.calls;
  // It has the slot, and each of the others stands in line before the next one comes.
  expect(await until(async () => (await calls())?.running === 1, 60_000)).toBe(true);
  for (let n = 0; n < 9; n++) {
    await create("busy", `line${n}`);
    expect((await send("busy", `line${n}`)).status).toBe(202);
    expect(await until(async () => (await calls())?.waiting === n + 1, 60_000)).toBe(true);
  }
  await create("busy", "s");
  const { http, problem, nats } = await refusedBoth("busy", 503, "s");
  expect([http.status, Number(http.headers.get("retry-after"))]).toEqual([503, expect.toSatisfy((seconds: number) => seconds >= 1)]);
  expect(problem).toMatchObject({ code: "overloaded", details: { waits_for: "slot", waiting: expect.any(Number), retry_after_ms: expect.any(Number) } });
  expect(nats).toEqual({ code: "overloaded", message: problem["detail"], details: problem["details"] });
  // It was asked for 90 % of ten. `up` by itself refuses from 80 %.
  expect(Number((problem["details"] as JsonObject)["waiting"])).toBeGreaterThanOrEqual(9);
});

test("429: as many sessions as the bound says of many that come at once, then the numbers through both doors, until one ends", async () => {
  await cli(["budget", "set", "--tenant", "full", "--sessions", "3"]);
  const begin = (id: string): Promise<Response> => troupe.api("/v1/sessions", { json: { id, agent: "assistant" }, key: keys["full"]! });
  const answers = await Promise.all(Array.from({ length: 12 }, (_, n) => begin(`s${n}`)));
  expect(answers.map(({ status }) => status).sort()).toEqual([201, 201, 201, ...Array.from({ length: 9 }, () => 429)]);
  const there = answers.flatMap(({ status }, n) => (status === 201 ? [`s${n}`] : []));
  expect((await begin(there[0]!)).status, "one that is there is there").toBe(200);

  const http = await begin("more");
  const problem = (await http.json()) as JsonObject;
  expect([http.status, Number(http.headers.get("retry-after"))]).toEqual([429, 30]);
  expect(problem).toMatchObject({ code: "sessions_exceeded", details: { sessions: 3, sessions_max: 3 } });
  const nats = await overNats("full", "more", "session.create", { agent: "assistant" });
  expect(nats).toMatchObject({ ok: false, error: { code: "sessions_exceeded", message: problem["detail"], details: problem["details"] } });
  expect(JSON.parse(await cli(["budget", "show", "--tenant", "full", "--json"]))).toMatchObject({ sessions: 3, sessions_max: 3 });
  expect((await typed(troupe, ["budget", "show", "--tenant", "full"])).stderr).toContain("3 sessions of at most 3");

  // An end gives its place back with the commit that ends it.
  const begun = async (id: string): Promise<number> => {
    let answer = await begin(id);
    for (const give_up_ms = performance.now() + 40_000; answer.status !== 201 && performance.now() < give_up_ms; answer = await begin(id))
      await later(300, undefined);
    return answer.status;
  };
  await troupe.json(200, `/v1/sessions/${there[0]!}/terminate`, { json: {}, key: keys["full"]! });
  expect(await begun("more")).toBe(201);
  // Under no bound nobody is asked.
  await cli(["budget", "set", "--tenant", "full", "--sessions", "none"]);
  expect(await begun("free")).toBe(201);
});
