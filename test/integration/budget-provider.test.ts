// Goal:   what a provider would bill, what the ledger says, what the usage rows say and the limit stand in this order and agree, though workers are killed
//         in mid-call: the provider's count ≤ ledger = rows ≤ limit, and for every call whose one attempt ended the provider's count is the ledger's.
// Method: the real `up` and a provider behind its official SDK, whose server counts every request by the question in it; 64 sessions of one tenant that has
//         money for ten turns; kill -9 at drawn moments. BUDGET_SESSIONS, BUDGET_KILLS and SEED make it longer or another.
import { afterAll, beforeAll, expect, test } from "vitest";
import type { ActorEvent } from "../../protocol/journal.ts";
import { costAtMost, costOf } from "../../providers/prices.ts";
import { type ModelServer, startModelServer } from "../contract/model-server.ts";
import { eventually, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";
import { seededRandom } from "../simulation/virtual-world.ts";

const MODEL = "anthropic/claude-sonnet-5";
const SESSIONS = Number(process.env["BUDGET_SESSIONS"] ?? 64);
const KILLS = Number(process.env["BUDGET_KILLS"] ?? 3);
const SEED = Number(process.env["SEED"] ?? 7);
const TURNS = 10;
const OUTPUT_MAX = 25;
const USAGE = { input: 5, output: 20 };

const microsOf = (cost: ReturnType<typeof costOf>): number => {
  if (cost.kind !== "priced") throw new Error("the model has a price");
  return cost.cost_usd_micros;
};
/** What the provider bills for a request with so many words of answer: all of it, also when nobody heard the answer's end. */
const billOf = (output_tokens: number): number =>
  microsOf(costOf(MODEL, { input_tokens: USAGE.input, output_tokens, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 }));
const LIMIT = TURNS * microsOf(costAtMost(MODEL, { input_tokens: 30, max_output_tokens: OUTPUT_MAX }));

let troupe: Troupe;
let server: ModelServer;
/** Micro-dollars by session. */
const billed = new Map<string, number>();

async function cli(args: readonly string[]): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
const eventsOf = async (path: string): Promise<ActorEvent[]> => (await troupe.journal(path)).flatMap(({ events }) => events);

beforeAll(async () => {
  server = await startModelServer({
    answer({ body }) {
      const session = /question-of-(s\d+)/.exec(JSON.stringify(body))?.[1] ?? "nobody";
      // As any provider it says no more than it is allowed to.
      const tokens = Math.min(USAGE.output, Number(body["max_tokens"]));
      billed.set(session, (billed.get(session) ?? 0) + billOf(tokens));
      return { tokens, token_ms: 20, usage: { ...USAGE, output: tokens }, stop: tokens < USAGE.output ? "max_tokens" : "end_turn" };
    },
  });
  troupe = await startTroupe({ env: { ANTHROPIC_API_KEY: "a", ANTHROPIC_BASE_URL: server.url } });
  const agent = JSON.stringify({ agent: "assistant", model: MODEL, max_output_tokens: OUTPUT_MAX });
  expect(await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], { stdin: agent })).toMatchObject({ code: 0 });
  await cli(["budget", "set", "--tenant", "demo", "--limit-usd-micros", String(LIMIT), "--period", "month", "--concurrency", "4"]);
}, 120_000);
afterAll(() => server?.close());

test(
  `${SESSIONS} sessions with money for ${TURNS} turns, ${KILLS} workers killed at drawn moments (seed ${SEED})`,
  async () => {
    const draw = seededRandom(SEED);
    const ids = Array.from({ length: SESSIONS }, (_, n) => `s${n}`);
    /** A gateway's 503 is asked again under the same key; 402 at the door is an answer. */
    const ask = async (id: string): Promise<boolean> => {
      for (;;) {
        const made = await troupe.api("/v1/sessions", { json: { id, agent: "assistant" } }).catch(() => undefined);
        if (made?.status === 201 || made?.status === 200) break;
        if (made !== undefined && made.status !== 503) throw new Error(`${made.status}: ${await made.text()}`);
        await later(100, undefined);
      }
      for (;;) {
        const answer = await troupe
          .api(`/v1/sessions/${id}/messages`, { json: { content: `question-of-${id}` }, headers: { "idempotency-key": id } })
          .catch(() => undefined);
        if (answer?.status === 202 || answer?.status === 402) return answer.status === 202;
        if (answer !== undefined && answer.status !== 503) throw new Error(`${answer.status}: ${await answer.text()}`);
        await later(100, undefined);
      }
    };
    const asking = Promise.all(ids.map(async (id) => ((await ask(id)) ? id : undefined)));
    let lost = 0;
    for (let kill = 0; kill < KILLS; kill++) {
      await later(Math.floor(draw() * 400), undefined);
      // While something is being answered, so that a kill has something to lose.
      await eventually(
        async () => server.open_streams,
        (open) => open > 0,
        5_000,
      );
      lost += server.open_streams;
      const workers = troupe.dev().processes.filter(({ role }) => role === "worker");
      await troupe.replaced(await troupe.kill9("worker", workers[Math.floor(draw() * workers.length)]?.id));
    }
    const taken = (await asking).filter((id) => id !== undefined);
    const read = async () => Promise.all(taken.map(async (id) => ({ id, events: await eventsOf(`demo/session/${id}`) })));
    const isOver = ({ events }: { events: readonly ActorEvent[] }): boolean => events.some(({ type }) => /^turn\.(completed|failed|cancelled)$/.test(type));
    const sessions = await eventually(read, (all) => all.every(isOver), 60_000);
    expect(sessions.filter((one) => !isOver(one)).map(({ id }) => id)).toEqual([]);

    const shown = async () =>
      JSON.parse(await cli(["budget", "show", "--tenant", "demo", "--json"])) as {
        settled_usd_micros: number;
        reserved_usd_micros: number;
        calls_in_flight: number;
      };
    const ledger = await eventually(shown, ({ calls_in_flight }) => calls_in_flight === 0, 60_000);
    const rows = async (): Promise<number> =>
      (await cli(["usage", "--tenant", "demo", "--json"]))
        .trim()
        .split("\n")
        .reduce((sum, line) => sum + (line === "" ? 0 : ((JSON.parse(line) as { cost_usd_micros: number | null }).cost_usd_micros ?? 0)), 0);
    expect(await eventually(rows, (sum) => sum === ledger.settled_usd_micros, 60_000), "usage rows = ledger").toBe(ledger.settled_usd_micros);

    const provider_usd_micros = [...billed.values()].reduce((sum, one) => sum + one, 0);
    expect(provider_usd_micros, "the provider's count ≤ ledger").toBeLessThanOrEqual(ledger.settled_usd_micros);
    expect(ledger.settled_usd_micros, "ledger ≤ limit").toBeLessThanOrEqual(LIMIT);
    expect(ledger.reserved_usd_micros).toBe(0);

    const books = await eventsOf("demo/budget/main");
    expect(books.filter(({ type }) => type === "budget.overrun" || type === "budget.unreserved")).toEqual([]);
    const settled = new Map<string, ActorEvent[]>();
    for (const event of books) {
      if (event.type !== "budget.settled") continue;
      const id = String(event["session"]);
      settled.set(id, [...(settled.get(id) ?? []), event]);
    }
    let ended = 0;
    for (const { id } of sessions) {
      const mine = settled.get(id) ?? [];
      const sum = mine.reduce((total, event) => total + Number(event["cost_usd_micros"]), 0);
      expect(billed.get(id) ?? 0, `${id}: the provider's count ≤ ledger`).toBeLessThanOrEqual(sum);
      if (mine.length !== 1 || mine[0]?.["assumed"] === true || sum === 0) continue;
      ended += 1;
      expect(sum, `${id}: its one attempt ended, and the provider counted the same`).toBe(billed.get(id) ?? 0);
    }
    expect(ended, "calls whose one attempt ended").toBeGreaterThan(2);
    expect(lost, "calls that were lost with their worker").toBeGreaterThan(0);
    expect(
      sessions.some(({ events }) => events.some((event) => event.type === "turn.failed" && event["reason"] === "budget_exceeded")) || taken.length < SESSIONS,
    ).toBe(true);
    expect(await cli(["verify", "--json"])).toContain('"violations":0');
  },
  180_000 + KILLS * 20_000,
);
