// Goal:   a budget holds on the real thing: many sessions, workers killed in mid-call, two tenants with equal ids; what was spent is in the
//         ledger once, the usage rows say the same, and nothing goes above the limit.
// Method: the real `up`; simulated models that are priced; kill -9 of workers; the numbers are read by the commands that operators type.
import { beforeAll, expect, test } from "vitest";
import type { ActorEvent } from "../../protocol/journal.ts";
import { eventually, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

let troupe: Troupe;
let other_key: string;

/** Simulated models cost 1 for a word in and 10 for a word out. */
const TURN = { tokens: 20, cost: (words_in: number): number => words_in + 20 * 10 };
const script = (token_ms = 15): string => JSON.stringify([{ say: "one", tokens: TURN.tokens, token_ms }]);

interface Shown {
  readonly limit_usd_micros: number | null;
  readonly settled_usd_micros: number;
  readonly reserved_usd_micros: number;
  readonly settled_ever_usd_micros: number;
  readonly status: string;
  readonly calls_in_flight: number;
  readonly children: readonly { readonly level: string; readonly id: string; readonly settled_usd_micros: number }[];
}

async function cli(args: readonly string[], code = 0): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code });
  return ran.stdout;
}
const shown = async (tenant: string): Promise<Shown> => JSON.parse(await cli(["budget", "show", "--tenant", tenant, "--json"])) as Shown;

async function usageOf(tenant: string): Promise<{ cost_usd_micros: number | null; outcome: string; inst: string; attempt: number; session: string }[]> {
  const lines = (await cli(["usage", "--tenant", tenant, "--json"])).trim();
  return lines === "" ? [] : lines.split("\n").map((line) => JSON.parse(line) as never);
}
const eventsOf = async (path: string): Promise<ActorEvent[]> => (await troupe.journal(path)).flatMap(({ events }) => events);

/** Rows come when the projector has read them; the sum is compared once it stands where the ledger does. */
async function agrees(tenant: string): Promise<Shown> {
  const ledger = await eventually(
    () => shown(tenant),
    ({ calls_in_flight }) => calls_in_flight === 0,
  );
  const sum = async (): Promise<number> => (await usageOf(tenant)).reduce((total, row) => total + (row.cost_usd_micros ?? 0), 0);
  expect(await eventually(sum, (total) => total === ledger.settled_ever_usd_micros), `the usage rows of ${tenant} sum to its ledger`).toBe(
    ledger.settled_ever_usd_micros,
  );
  return ledger;
}

beforeAll(async () => {
  troupe = await startTroupe();
  await cli(["tenants", "create", "other"]);
  other_key = (await cli(["keys", "create", "--tenant", "other"])).trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 });
  for (const tenant of ["demo", "other"]) expect(await typed(troupe, ["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 120_000);

test("64 turns of 16 sessions over a budget for some ten, workers killed at random: the ledger is the usage rows, and within the limit", async () => {
  const limit = 10 * TURN.cost(8);
  await cli(["budget", "set", "--tenant", "demo", "--limit-usd-micros", String(limit), "--period", "month"]);
  const ids = Array.from({ length: 16 }, (_, n) => `s${n}`);
  const turn = async (id: string, n: number): Promise<void> => {
    // A gateway or worker that goes away is asked again under the same key; 402 is an answer.
    for (;;) {
      const answer = await troupe
        .api(`/v1/sessions/${id}/messages`, { json: { content: script(), on_busy: "enqueue" }, headers: { "idempotency-key": `${id}-${n}` } })
        .catch(() => undefined);
      if (answer !== undefined && answer.status !== 503) {
        expect([202, 402]).toContain(answer.status);
        if (answer.status === 402) expect(answer.headers.get("x-should-retry")).toBe("false");
        return;
      }
      await later(200, undefined);
    }
  };
  for (const id of ids) await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" } });
  const sending = Promise.all(
    ids.map(async (id) => {
      for (let n = 0; n < 4; n++) await turn(id, n);
    }),
  );
  for (let kills = 0; kills < 2; kills++) {
    await later(700, undefined);
    const victims = troupe.dev().processes.filter(({ role }) => role === "worker");
    await troupe.replaced(await troupe.kill9("worker", victims[kills % victims.length]?.id));
  }
  await sending;

  const ended = async (): Promise<{ begun: number; ended: number; events: ActorEvent[] }> => {
    const events = (await Promise.all(ids.map((id) => eventsOf(`demo/session/${id}`)))).flat();
    const count = (...types: string[]): number => events.filter(({ type }) => types.includes(type)).length;
    return { begun: count("message.received"), ended: count("turn.completed", "turn.failed", "turn.cancelled"), events };
  };
  const { begun, ended: over, events } = await eventually(ended, (one) => one.begun === one.ended, 90_000);
  expect(over).toBe(begun);
  const completed = events.filter(({ type }) => type === "turn.completed").length;
  const failed = events.filter(({ type }) => type === "turn.failed");
  for (const failure of failed) expect(failure).toMatchObject({ reason: "budget_exceeded", details: { limit_usd_micros: limit } });
  // A last call or two may have been clamped to what was left, and cost less than a whole turn.
  expect(completed).toBeGreaterThan(3);
  expect(completed).toBeLessThan(20);

  const ledger = await agrees("demo");
  expect(ledger).toMatchObject({ limit_usd_micros: limit, reserved_usd_micros: 0, calls_in_flight: 0 });
  expect(ledger.settled_usd_micros).toBeLessThanOrEqual(limit);
  expect(ledger.children.find(({ level, id }) => level === "agent" && id === "assistant")?.settled_usd_micros).toBe(ledger.settled_usd_micros);
  // What answered is paid for at its price; what was lost, at what was held for it.
  const answered = events.filter(({ type }) => type === "model.completed").reduce((sum, event) => sum + Number(event["cost_usd_micros"]), 0);
  expect(answered).toBeLessThanOrEqual(ledger.settled_usd_micros);
  const books = await eventsOf("demo/budget/main");
  expect(books.some(({ type }) => type === "budget.overrun" || type === "budget.unreserved")).toBe(false);
  const assumed = books
    .filter((event) => event.type === "budget.settled" && event["assumed"] === true)
    .reduce((sum, event) => sum + Number(event["cost_usd_micros"]), 0);
  expect(answered + assumed).toBe(ledger.settled_usd_micros);
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
}, 240_000);

test("the daily report says the same from the usage rows and from the ledger, and counts who was refused", async () => {
  const ledger = await agrees("demo");
  const lines = (await cli(["usage", "--tenant", "demo", "--daily", "--json"])).trim().split("\n");
  interface Day {
    readonly day: string;
    readonly usage_usd_micros: number;
    readonly rows: readonly { readonly agent: string; readonly model: string; readonly key_source: string; readonly calls: number; readonly failed: number }[];
    readonly ledger: {
      readonly settled_usd_micros: number;
      readonly by_category: Readonly<Record<string, number>>;
      readonly refused: Readonly<Record<string, number>>;
    };
  }
  const days = lines.map((line) => JSON.parse(line) as Day);
  const sum = (of: (day: Day) => number): number => days.reduce((total, day) => total + of(day), 0);
  expect([sum((day) => day.usage_usd_micros), sum((day) => day.ledger.settled_usd_micros), sum((day) => day.ledger.by_category["llm"] ?? 0)]).toEqual(
    Array.from({ length: 3 }, () => ledger.settled_ever_usd_micros),
  );
  expect(days.flatMap(({ rows }) => rows)[0]).toMatchObject({ agent: "assistant", model: "simulated/script", key_source: "platform" });
  expect(sum((day) => day.ledger.refused["budget_exceeded"] ?? 0)).toBeGreaterThan(0);
  expect(await cli(["usage", "--tenant", "demo", "--daily"])).toMatch(/projections by beside_twice of confidence 0\.\d+: \d+ of \d+ held/);

  // Over HTTP the same days: to the tenant's administrators its own, to operators any tenant's.
  const admin = (await cli(["keys", "create", "--tenant", "demo", "--scope", "admin"])).trim();
  await cli(["tenants", "create", "system"]);
  const operator = (await cli(["keys", "create", "--tenant", "system", "--scope", "operator:read"])).trim();
  const report = { tenant: "demo", items: days };
  expect(await troupe.json(200, "/v1/usage/daily", { key: admin })).toEqual(report);
  expect(await troupe.json(200, "/v1/operator/tenants/demo/usage/daily", { key: operator })).toEqual(report);
  expect(await troupe.json(200, "/v1/usage/daily?since=2999-01-01T00:00:00Z", { key: admin })).toEqual({ tenant: "demo", items: [] });
  expect((await troupe.api("/v1/usage/daily", { key: other_key })).status).toBe(403);
  expect((await troupe.api("/v1/operator/tenants/demo/usage/daily", { key: admin })).status).toBe(403);
});

test("another tenant with the same ids of everything works on, and its books are its own", async () => {
  const spent = await shown("demo");
  await cli(["budget", "set", "--tenant", "demo", "--limit-usd-micros", "0"]);
  await troupe.json(201, "/v1/sessions", { json: { id: "s0", agent: "assistant" }, key: other_key });
  // The door knows as soon as it has heard.
  const ours = await eventually(
    () => troupe.api("/v1/sessions/s0/messages", { json: { content: script(1) } }),
    ({ status }) => status === 402,
  );
  expect(ours.status).toBe(402);
  expect(await ours.json()).toMatchObject({ code: "budget_exceeded", details: { limit_usd_micros: 0, settled_usd_micros: spent.settled_usd_micros } });
  await troupe.json(202, "/v1/sessions/s0/messages", { json: { content: script(1) }, key: other_key });
  const events = await eventually(
    () => eventsOf("other/session/s0"),
    (all) => all.some(({ type }) => type === "turn.completed"),
  );
  expect(events.filter(({ type }) => type === "turn.completed")).toHaveLength(1);
  expect((await agrees("other")).settled_usd_micros).toBe(Number(events.find(({ type }) => type === "model.completed")?.["cost_usd_micros"]));
});

test("the same code over NATS, and a raised limit lets the session go on", async () => {
  const refused = await typed(troupe, ["send", "demo/session/s0", script(1), "--json"]);
  expect(refused.code).toBe(1);
  expect(refused.stdout).toContain('"budget_exceeded"');
  await cli(["budget", "set", "--tenant", "demo", "--limit-usd-micros", "none"]);
  const sent = await eventually(
    () => typed(troupe, ["send", "demo/session/s0", script(1), "--wait"]),
    ({ code }) => code === 0,
  );
  expect(sent).toMatchObject({ code: 0 });
});

test("limits of a user and of a session refuse their own, and nobody else's", async () => {
  await cli(["budget", "set", "--tenant", "other", "--user", "ann", "--limit-usd-micros", "0"]);
  await cli(["budget", "set", "--tenant", "other", "--session", "poor", "--limit-usd-micros", "50"]);
  const create = (id: string, user?: string) =>
    troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant", ...(user === undefined ? {} : { user }) }, key: other_key });
  await Promise.all([create("of-ann", "ann"), create("of-bob", "bob"), create("poor")]);
  const send = (id: string) => troupe.api(`/v1/sessions/${id}/messages`, { json: { content: script(1) }, key: other_key });
  const ann = await eventually(
    () => send("of-ann"),
    ({ status }) => status === 402,
  );
  expect(await ann.json()).toMatchObject({ code: "budget_exceeded", details: { level: "user", id: "ann" } });
  expect((await send("of-bob")).status).toBe(202);
  expect((await send("poor")).status).toBe(202);
  // Fifty micro-dollars pay for the words of the question and four of the answer: the call is clamped, not refused.
  const events = await eventually(
    () => eventsOf("other/session/poor"),
    (all) => all.some(({ type }) => type === "turn.completed" || type === "turn.failed"),
  );
  const answer = events.find(({ type }) => type === "model.completed");
  expect(answer).toMatchObject({ stop: "length" });
  expect(Number(answer?.["cost_usd_micros"])).toBeLessThanOrEqual(50);
  expect(events.find(({ type }) => type === "budget.decision")).toMatchObject({ level: "session", id: "poor" });
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
});
