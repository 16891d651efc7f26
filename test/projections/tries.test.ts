// tries: Goal: each call of a model has its own usage row, and the rows of an attempt sum to what the budget settled for it, whatever of them was known.
// Method: journals written by the real session and budget machines, a real Postgres; stories first, then drawn attempts that end in every way.
import { beforeAll, describe, expect, test } from "vitest";
import { createMoneyCheck } from "../../actors/verify-money.ts";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { createQueries } from "../../projections/queries.ts";
import { decodeJournal, type Entry } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { coreOf } from "../../state-machines/step.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { callMade, callOfBefore } from "../state-machines/session-drive.ts";
import { answered, claimed, command, createEventStream, type Journal, journalOf, readySession, realWorld, seeded } from "./event-stream.ts";

const SEED = Number(process.env["SEED"] ?? 4);
const USAGE = { input_tokens: 7, output_tokens: 5, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
const budgetCore = coreOf(budgetDefinition);

const stream = createEventStream();
const clock = { ms: Date.parse("2026-11-21T05:00:00.000Z") };
const budget = journalOf(stream, { tenant: "acme", kind: "budget", id: "main" }, budgetCore, clock);
let database: Database;

const good = (number: number, cost_usd_micros: number, more: JsonObject = {}): JsonObject =>
  callMade(number, { outcome: "completed", code: null, usage: USAGE, cost_usd_micros, price_version: "p1", first_token_ms: 40, ...more });
const judge = (number: number, cost_usd_micros: number): JsonObject =>
  good(number, cost_usd_micros, { purpose: "guardrail", rule: "kind", model: "anthropic/a" });

const done = (inst: string, attempts: readonly JsonObject[], cost_usd_micros: number | null): Entry => {
  const entry = answered(inst, "fine") as Extract<Entry, { t: "done" }>;
  return { ...entry, output: { ...(entry.output as JsonObject), cost_usd_micros, attempts } };
};
const progress = (inst: string, attempts: readonly JsonObject[]): Entry => ({
  t: "progress",
  inst,
  told: { attempts, skipped: [], next: { model: "openai/b", try: 2, wait_ms: 500, code: "overloaded", message: "", purpose: "answer", left: [] } },
});
const holdOf = (journal: Journal, attempt = 1): string => `acme/session/${journal.actor.id}/${journal.inst("model")}/${attempt}`;
const reserve = (hold: string, amount_usd_micros: number): void => {
  const [, , session = ""] = hold.split("/");
  const body = { hold, session, agent: "assistant", model: "openai/b", amount_usd_micros, minimum_usd_micros: 0 };
  budget.commit({ t: "command", type: "budget.reserve", channel: "control", body });
};
/** The budget hears what the sessions' journals sent to it. */
let heard = 0;
function deliver(): void {
  for (const stored of stream.messages.slice(heard)) {
    const { actor, out } = decodeJournal(stored.data);
    if (actor.kind !== "session") continue;
    for (const { type, body } of out) budget.commit({ t: "command", type, channel: "control", body });
  }
  heard = stream.messages.length;
}

function begun(id: string): Journal {
  const journal = readySession(stream, "acme", id, {}, clock);
  journal.commit(command("message.send", { content: "hello" }));
  return journal;
}

async function projected(): Promise<void> {
  deliver();
  const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_wait_ms: 1 });
  expect(await projector.reached(stream.messages.at(-1)?.sequence ?? 0, 60_000), JSON.stringify(projector.status())).toBe(true);
  await projector.stop();
}
async function rowsOf(id: string) {
  await projected();
  const { items } = await createQueries(database).usage("acme", { session: id });
  return [...items].reverse();
}

beforeAll(async () => {
  database = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => database.close());
  await database.migrate();
  budget.commit({ t: "init", type: "budget.create", channel: "control", body: {} });
});

describe("one attempt", () => {
  test("that was judged, failed once and answered leaves a row for each call, with its own outcome, model, tokens, cost and times", async () => {
    const journal = begun("s1");
    const inst = journal.inst("model") ?? "";
    reserve(holdOf(journal), 100);
    journal.commit(done(inst, [judge(1, 3), callMade(2), good(3, 25)], 25));
    expect(await rowsOf("s1")).toMatchObject([
      { try: 1, purpose: "guardrail", rule: "kind", model: "anthropic/a", provider: "anthropic", outcome: "completed", cost_usd_micros: 3, first_token_ms: 40 },
      { try: 2, purpose: "answer", rule: null, outcome: "failed", code: "overloaded", input_tokens: null, cost_usd_micros: 0, latency_ms: 250 },
      { try: 3, purpose: "answer", outcome: "completed", code: null, output_tokens: 5, cost_usd_micros: 25, estimated: false },
    ]);
  });

  test("that was lost after a try leaves that try as it was, and what was lost at the rest of the hold", async () => {
    const journal = begun("s2");
    const inst = journal.inst("model") ?? "";
    reserve(holdOf(journal), 100);
    journal.commit(progress(inst, [callMade(1, { usage: USAGE, cost_usd_micros: 30, price_version: "p1" })]));
    journal.commit(claimed([inst]));
    journal.commit(done(inst, [good(1, 25, { attempt: 2 })], 25));
    expect(await rowsOf("s2")).toMatchObject([
      { attempt: 1, try: 1, outcome: "failed", cost_usd_micros: 30, estimated: false },
      { attempt: 1, try: 2, outcome: "superseded", cost_usd_micros: 70, estimated: true },
      { attempt: 2, try: 1, outcome: "completed", cost_usd_micros: 25 },
    ]);
  });

  test("that was stopped leaves its calls with what they had used", async () => {
    const journal = begun("s3");
    const inst = journal.inst("model") ?? "";
    reserve(holdOf(journal), 100);
    const attempts = [callMade(1), callMade(2, { code: "cancelled", usage: { ...USAGE, estimated: true }, cost_usd_micros: 12, price_version: "p1" })];
    const stopped = { [inst]: { model: "openai/b", attempts, usage: USAGE, cost_usd_micros: 12, price_version: "p1" } };
    journal.commit({ t: "command", type: "turn.cancel", channel: "command", body: {}, stopped });
    expect(await rowsOf("s3")).toMatchObject([
      { try: 1, outcome: "failed", code: "overloaded", cost_usd_micros: 0 },
      { try: 2, outcome: "cancelled", code: "cancelled", input_tokens: 7, output_tokens: 5, estimated: true, cost_usd_micros: 12 },
    ]);
  });

  test("whose answer a guardrail dropped says so in the answer's own row", async () => {
    const journal = begun("s4");
    reserve(holdOf(journal), 100);
    const details = { model: "openai/b", usage: USAGE, cost_usd_micros: 25, attempts: [good(1, 25), judge(2, 3)], rule: "kind", on: "output" };
    journal.commit({ t: "fail", inst: journal.inst("model") ?? "", error: { code: "guardrail", message: "blocked", details } });
    expect(await rowsOf("s4")).toMatchObject([
      { try: 1, outcome: "failed", code: "guardrail", cost_usd_micros: 25 },
      { try: 2, purpose: "guardrail", outcome: "completed", code: null, cost_usd_micros: 3 },
    ]);
  });

  test("that the budget refused before any call leaves one row that cost nothing", async () => {
    const journal = begun("s5");
    const details = { model: "openai/b", usage: null, cost_usd_micros: 0, attempts: [] };
    journal.commit({ t: "fail", inst: journal.inst("model") ?? "", error: { code: "budget_exceeded", message: "no", details } });
    expect(await rowsOf("s5")).toMatchObject([{ try: 1, outcome: "failed", code: "budget_exceeded", input_tokens: null, cost_usd_micros: 0 }]);
  });

  test("that said nothing of its calls, as journals of before do not, leaves one row", async () => {
    const journal = begun("s6");
    reserve(holdOf(journal), 100);
    journal.commit(answered(journal.inst("model") ?? "", "fine"));
    expect(await rowsOf("s6")).toMatchObject([{ try: 1, purpose: "answer", outcome: "completed", cost_usd_micros: 57 }]);
  });

  test("whose settlement is below what its calls said, as one of before may be, has rows that sum to the settlement all the same", async () => {
    const journal = begun("s7");
    reserve(holdOf(journal), 40);
    journal.commit(done(journal.inst("model") ?? "", [good(1, 30), good(2, 25), callMade(3, { usage: USAGE })].map(callOfBefore), null));
    expect((await rowsOf("s7")).map(({ cost_usd_micros }) => cost_usd_micros)).toEqual([30, 10, 0]);
  });

  test("pages tell each row once, also within an attempt", async () => {
    const queries = createQueries(database);
    const seen: string[] = [];
    let after: string | undefined;
    do {
      const page = await queries.usage("acme", { limit: 2, after });
      seen.push(...page.items.map((row) => `${row.session} ${row.inst} ${row.attempt} ${row.try}`));
      after = page.next ?? undefined;
    } while (after !== undefined);
    expect(new Set(seen).size).toBe(seen.length);
    expect(seen).toHaveLength(15);
  });
});

test("however attempts end and whatever of them is known: no row is negative, each attempt's rows sum to its settlement, and at every point of the stream verify agrees", async () => {
  const random = seeded(SEED);
  const upTo = (n: number): number => Math.floor(random() * n);
  const drawn = (): JsonObject[] =>
    Array.from({ length: 1 + upTo(4) }, (_, index) => {
      const fate = upTo(4);
      if (fate === 0) return callMade(index + 1);
      if (fate === 1) return callMade(index + 1, { usage: USAGE }); // Its price is not known.
      return fate === 2 ? judge(index + 1, upTo(50)) : good(index + 1, upTo(200));
    });
  const ends = { done: 0, failed: 0, stopped: 0, unheard: 0, lost: 0 };
  for (let n = 0; n < 60; n++) {
    const journal = begun(`d${n}`);
    const inst = journal.inst("model") ?? "";
    // Some holds are too small for what the calls came to.
    reserve(holdOf(journal), upTo(400));
    const attempts = drawn();
    const told = { model: "openai/b", attempts, usage: null, cost_usd_micros: null, price_version: null };
    if (random() < 0.5) journal.commit(progress(inst, attempts.slice(0, upTo(attempts.length + 1))));
    const way = (["done", "failed", "stopped", "unheard", "lost"] as const)[upTo(5)] ?? "done";
    ends[way] += 1;
    const cancel = { t: "command", type: "turn.cancel", channel: "command", body: {} } as const;
    if (way === "done") journal.commit(done(inst, attempts, null));
    else if (way === "failed") journal.commit({ t: "fail", inst, error: { code: "models_exhausted", message: "none", details: told } });
    else if (way === "stopped") journal.commit({ ...cancel, stopped: { [inst]: told } });
    else if (way === "unheard") journal.commit(cancel);
    else {
      journal.commit(claimed([inst]));
      reserve(holdOf(journal, 2), upTo(400));
      journal.commit(done(inst, drawn(), null));
    }
    if (random() < 0.5) deliver();
  }
  expect(Math.min(...Object.values(ends))).toBeGreaterThan(3);
  await projected();
  const sums = await database.query<{ hold: string; cost: number; least: number }>(
    `select 'acme/session/' || session || '/' || inst || '/' || attempt as hold, sum(cost_usd_micros)::bigint as cost, min(cost_usd_micros) as least
     from llm_usage_events where session like 'd%' group by session, inst, attempt`,
  );
  const settled = new Map(
    stream.messages
      .flatMap(({ data }) => decodeJournal(data).events)
      .filter(({ type }) => type === "budget.settled")
      .map((event) => [String(event["hold"]), Number(event["cost_usd_micros"])]),
  );
  expect(sums.length).toBeGreaterThan(60);
  for (const { hold, cost, least } of sums) {
    expect(least, hold).toBeGreaterThanOrEqual(0);
    expect(cost, hold).toBe(settled.get(hold));
  }

  // M1 with the projection at any position: the stream is projected anew message by message in a database of its own, and held against the ledger.
  const step = createDatabase({ url: (await freshDatabase()).url, application_name: "test", log: silentLog });
  atEndOfFile(() => step.close());
  await step.migrate();
  const partial = createEventStream();
  const projector = createProjector({ bus: partial.bus, rows: postgresRows(step), world: realWorld, log: silentLog, batch_wait_ms: 0 });
  const places = new Set(Array.from({ length: 40 }, () => 1 + upTo(stream.messages.length)));
  let checked = 0;
  for (const [index, stored] of stream.messages.entries()) {
    partial.append(stored.subject, stored.data);
    if (!places.has(index + 1)) continue;
    expect(await projector.reached(index + 1, 60_000)).toBe(true);
    const { position, tenants } = await createQueries(step).usage_costs();
    const faults: string[] = [];
    const check = createMoneyCheck({ position, by_tenant: new Map(tenants.map((one) => [one.tenant, one.cost_usd_micros])) }, ({ what }) => faults.push(what));
    stream.messages.forEach(({ data }, at) => check.message(decodeJournal(data), at + 1));
    check.end();
    expect(faults, `with the projection at ${index + 1}`).toEqual([]);
    checked += 1;
  }
  await projector.stop();
  expect(checked).toBeGreaterThan(20);
}, 180_000);
