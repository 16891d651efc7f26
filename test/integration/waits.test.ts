// Goal:   nobody has to ask why a turn waits: for a slot, for a provider's window, or for money, the session itself says for what, since when and
//         until when at the latest, over HTTP, in its events and to `troupe explain`; and still does when its worker was killed while it waited.
// Method: the real `up` with two workers; a tenant for each reason, whose only slot, permit or money another session of it has; kill -9 in the wait.
import { beforeAll, expect, test, vi } from "vitest";
import type { JsonObject } from "../../protocol/json.ts";
import { eventually, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
const keys = new Map<string, string>();

async function cli(args: readonly string[]): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
interface View extends JsonObject {
  readonly state: string;
  readonly wait_reason: string | null;
  readonly waits_for: JsonObject | null;
}
const view = (tenant: string, id: string): Promise<View> => troupe.json<View>(200, `/v1/sessions/${id}`, { key: keys.get(tenant) ?? null });
const events = async (tenant: string, id: string): Promise<JsonObject[]> =>
  (await troupe.journal(`${tenant}/session/${id}`)).flatMap((message) => message.events);
const answer = (tokens: number, token_ms: number): string => JSON.stringify([{ say: "one", tokens, token_ms }]);
async function say(tenant: string, id: string, content: string): Promise<void> {
  const key = keys.get(tenant) ?? null;
  await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" }, key });
  await troupe.json(202, `/v1/sessions/${id}/messages`, { json: { content }, key });
}
/** What is held that another waits for: given back when it was looked at, not when a time is over. */
const HELD = answer(20, 10_000);
const letGo = (tenant: string, id: string): Promise<unknown> =>
  troupe.json(200, `/v1/sessions/${id}/cancel`, { method: "POST", key: keys.get(tenant) ?? null });
const hasSlotAndMoney = async (tenant: string): Promise<boolean> =>
  (await troupe.journal(`${tenant}/budget/main`)).some((message) => message.events.some(({ type }) => type === "budget.reserved"));
const hasEnded = (all: readonly JsonObject[]): boolean => all.some(({ type }) => type === "turn.completed" || type === "turn.failed");

beforeAll(async () => {
  troupe = await startTroupe();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 });
  for (const tenant of ["slots", "windows", "money"]) {
    await cli(["tenants", "create", tenant]);
    keys.set(tenant, (await cli(["keys", "create", "--tenant", tenant])).trim());
    expect(await typed(troupe, ["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
  }
}, 120_000);

test("for a slot: told while it waits, and by the state that the next worker takes over when the first is killed", async () => {
  await cli(["budget", "set", "--tenant", "slots", "--concurrency", "1"]);
  await say("slots", "first", HELD);
  expect(await eventually(() => hasSlotAndMoney("slots"), Boolean)).toBe(true);
  await say("slots", "second", answer(2, 5));
  const waits = await eventually(
    () => view("slots", "second"),
    ({ waits_for }) => waits_for !== null,
  );
  expect(waits).toMatchObject({ state: "thinking", waits_for: { for: "slot", message: "1 of 1 calls of this tenant run already" } });
  expect(waits.wait_reason).toMatch(/^its model call waits for a slot of its tenant since \d{4}-.*Z, until \d{4}-.*Z at the latest: 1 of 1 calls/);
  const { since, until } = waits.waits_for as { since: string; until: string };
  expect(Date.parse(until) - Date.parse(since)).toBeGreaterThan(60_000);
  expect((await events("slots", "second")).find(({ type }) => type === "model.waiting")).toMatchObject({
    for: "slot",
    turn: 1,
    step: 0,
    attempt: 1,
    since,
    until,
    details: { concurrency: 1, concurrency_max: 1 },
  });
  const told = JSON.parse(await cli(["explain", "slots/session/second", "--json"])) as View;
  expect(told).toMatchObject({ waits_for: { for: "slot", since } });
  // The journal's reason, and beside it how many go before it, which only the line knows.
  expect(told.wait_reason).toMatch(/waits for a slot of its tenant since .*; its model call waits .*0 of 1 that wait go before it/);

  const owner = (await troupe.journal("slots/session/second")).at(-1)?.worker ?? "";
  const killed = await troupe.kill9("worker", owner);
  await eventually(
    () => events("slots", "second"),
    (all) => all.some(({ type }) => type === "session.claimed"),
  );
  const after = await view("slots", "second");
  expect(after, "the reason stands in the state that was taken over").toMatchObject({ state: "thinking", waits_for: { for: "slot", since } });
  expect(JSON.parse(await cli(["explain", "slots/session/second", "--json"])) as View).toMatchObject({ waits_for: { for: "slot", since } });
  // The next attempt stands in line itself, and has waited since the first one did; what it waits for then ends.
  const waited_at_least_ms = Date.now() - Date.parse(since);
  await letGo("slots", "first");
  const all = await eventually(() => events("slots", "second"), hasEnded);
  expect(all.filter(({ type }) => type === "turn.completed")).toHaveLength(1);
  const waited = all.filter(({ type }) => type === "model.waited");
  expect(waited).toMatchObject([{ for: "slot", attempt: 2 }]);
  expect(waited[0]?.["waited_ms"]).toBeGreaterThanOrEqual(waited_at_least_ms);
  expect(await view("slots", "second")).toMatchObject({ state: "idle", wait_reason: "waits for a message", waits_for: null });
  await troupe.replaced(killed);
});

test("for a provider's window: with when it asks again, and until when at the latest", async () => {
  await cli(["budget", "set", "--tenant", "windows", "--rate", "simulated=1/-/12"]);
  await say("windows", "first", answer(2, 5));
  await eventually(() => events("windows", "first"), hasEnded);
  await say("windows", "second", answer(2, 5));
  const waits = await eventually(
    () => view("windows", "second"),
    ({ waits_for, state }) => waits_for !== null || state === "idle",
  );
  expect(waits).toMatchObject({ state: "thinking", waits_for: { for: "rate", provider: "simulated", message: "the window of simulated is full" } });
  const { since, again, until } = waits.waits_for as { since: string; again: string; until: string };
  expect(Date.parse(again)).toBeGreaterThan(Date.parse(since));
  expect(Date.parse(until)).toBeGreaterThanOrEqual(Date.parse(again));
  expect(await cli(["explain", "windows/session/second"])).toMatch(/waits for the rate window of simulated since .* asks again at /);
  const all = await eventually(() => events("windows", "second"), hasEnded);
  expect(all.map(({ type }) => type).filter((type) => /^(model\.wait|turn\.(completed|failed))/.test(String(type)))).toEqual([
    "model.waiting",
    "model.waited",
    "turn.completed",
  ]);
  expect(await cli(["explain", "windows/session/second"])).toMatch(/model call 1\.0 waited \d+ ms for rate/);
});

test("for money that another call holds and gives back", async () => {
  await cli(["budget", "set", "--tenant", "money", "--limit-usd-micros", "255", "--period", "none"]);
  await say("money", "first", HELD);
  expect(await eventually(() => hasSlotAndMoney("money"), Boolean)).toBe(true);
  await say("money", "second", answer(2, 5));
  const waits = await eventually(
    () => view("money", "second"),
    ({ waits_for, state }) => waits_for !== null || state === "idle",
  );
  expect(waits).toMatchObject({ state: "thinking", waits_for: { for: "money", message: expect.stringContaining("the tenant's budget has") } });
  expect(await cli(["explain", "money/session/second"])).toMatch(/waits for money that other calls hold since .* until .* at the latest/);
  await letGo("money", "first");
  const all = await eventually(() => events("money", "second"), hasEnded);
  expect(all.find(({ type }) => type === "model.waiting")).toMatchObject({ details: { limit_usd_micros: 255, may_return: true } });
  expect(all.filter(({ type }) => type === "turn.completed")).toHaveLength(1);
  expect(await view("money", "second")).toMatchObject({ waits_for: null });
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
});
