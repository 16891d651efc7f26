// Goal: whatever step a host dies at, a budget that is asked before every model call, and before every call of a tool that has a price, pays for all
// that was called and never above its limit, and every hold comes back.
// Method: hosts on the in-memory bus in virtual time, as in host-crashes.test.ts, but with the real performers of model and tool calls, the simulated
// models and the budget actors of two tenants in the same shards. A seed draws limits, messages, cancellations and the operations at which the
// owner dies. A provider's own count, kept beside everything else, is compared with the ledger; then the verifier reads the streams.
import { describe, expect, test } from "vitest";
import { createBreakerBoard } from "../../actors/breaker-board.ts";
import type { Performer } from "../../actors/performer.ts";
import { createCallAccount } from "../../actors/call-account.ts";
import { createCommandClient } from "../../actors/client.ts";
import { callModel } from "../../actors/effects/call-model.ts";
import { callTool } from "../../actors/effects/call-tool.ts";
import { createModelMoney, noHold } from "../../actors/model-money.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost } from "../../actors/shard-host.ts";
import { createTimedCalls, type TimedCalls } from "../../actors/timed-calls.ts";
import { verifyAll, type Violation } from "../../actors/verify.ts";
import { createMemoryBroker, type Operation } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { type ActorAddress, budgetActor } from "../../protocol/ids.ts";
import { decodeJournal, type ActorEvent } from "../../protocol/journal.ts";
import type { Json } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { pause } from "../../protocol/world.ts";
import { createProviders } from "../../providers/registry.ts";
import { budgetContextOf, TENANT_LEVEL } from "../../state-machines/budget-context.ts";
import { tableGet, tableRows } from "../../state-machines/budget-table.ts";
import { cores } from "../../state-machines/kinds.ts";
import { viewOf } from "../../state-machines/step.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";

const SHARDS = 2;
const RUNS = 60;
const TENANTS = ["acme", "other"] as const;
const OUTPUT_TOKENS_MAX = 12;
const PRICE = { usd_micros: 15, category: "retrieval" } as const;

interface Met {
  crashes: number;
  completed: number;
  refused: number;
  assumed: number;
  stopped: number;
  degraded: number;
  tools: number;
}

async function run(seed: number): Promise<Met> {
  const draw = seededRandom(seed);
  const pick = (below: number): number => Math.floor(draw() * below);
  const world = new VirtualWorld(seed ^ 0xb0d6e7);
  let crashes = 0;
  let countdown = 1 + pick(70);
  let deaths_left = 2 + pick(9);
  let generation = 0;
  let owner: { name: string; host: ShardHost; bus: Bus; alive: boolean } | undefined;
  const broker = createMemoryBroker({
    world,
    shards: SHARDS,
    faults: {
      before: (operation) => (strike(operation) ? { kind: "unavailable" } : undefined),
      after: (operation) => (strike(operation) ? { kind: "lose_answer" } : undefined),
    },
  });
  function strike(operation: Operation): boolean {
    if (owner === undefined || operation.connection !== owner.name || !owner.alive) return false;
    if (deaths_left === 0 || --countdown > 0) return false;
    deaths_left--;
    crashes++;
    owner.alive = false;
    broker.kill(owner.name);
    countdown = 1 + pick(70);
    void world.after(pick(50), () => void succeed());
    return true;
  }

  /** What the providers would send a bill for: every call that was made, also by processes that nobody hears any more. */
  const billed = new Map<string, number>();
  async function succeed(): Promise<void> {
    const before = owner?.name ?? null;
    const epoch = ++generation;
    const name = `p${epoch}`;
    const bus = broker.connect(name);
    const me = { name, bus, alive: true, host: undefined as unknown as ShardHost };
    const providers = createProviders({ world, log: silentLog });
    const billing: typeof providers = {
      ...providers,
      resolve(model) {
        const resolved = providers.resolve(model);
        if (resolved.kind === "refused") return resolved;
        const call: typeof resolved.provider.call = async (request, io) => {
          const tenant = request.idempotency_key.split("/")[0] ?? "";
          const outcome = await resolved.provider.call(request, io);
          const { input_tokens = 0, output_tokens = 0, reasoning_tokens = 0 } = outcome.usage ?? {};
          billed.set(tenant, (billed.get(tenant) ?? 0) + input_tokens + 10 * (output_tokens + reasoning_tokens));
          return outcome;
        };
        return { ...resolved, provider: { ...resolved.provider, call } };
      },
    };
    const client = createCommandClient({ bus, world });
    const money = createModelMoney({ client, world, providers });
    const call = callModel({ world, providers: billing, breakers: createBreakerBoard({ world, log: silentLog, worker: name }), money });
    const timed = createTimedCalls({ world });
    const call_tool: Performer = (input, scope) => {
      const { tenant } = scope.actor;
      const counting: Pick<TimedCalls, "run"> = {
        run: (ms, signal, work, ...more) =>
          timed.run(
            ms,
            signal,
            async (stop) => {
              const answer = await work(stop);
              billed.set(tenant, (billed.get(tenant) ?? 0) + PRICE.usd_micros);
              await pause(world, pick(100));
              return answer;
            },
            ...more,
          ),
      };
      return callTool(world, counting, money)(input, scope);
    };
    const call_model: Performer = (input, scope) => call(input, scope, createCallAccount(scope), noHold());
    let commits = 0;
    me.host = createShardHost({
      bus,
      world,
      log: silentLog,
      cores,
      restorer: createRestorer({ bus, cores, log: silentLog }),
      performers: {
        call_model,
        call_tool,
        load_configuration: (async () => ({
          config: {
            model: "simulated/script",
            instructions: "",
            tools: ["now"],
            tool_prices: { now: PRICE },
            mode: "multi",
            max_loops: 4,
            max_output_tokens: OUTPUT_TOKENS_MAX,
            degrade: { max_output_tokens: 3 },
          } as unknown as Json,
          hash: "h",
          agent_version: 1,
        })) as never,
      },
      worker: name,
      next_commit_id: () => `${name}.${commits++}`,
      may_act: () => me.alive,
      on_conflict: async () => (owner === me ? "mine" : "lost"),
      passivate_after_ms: 300,
    });
    owner = me;
    await Promise.all(
      Array.from({ length: SHARDS }, (_, shard) => me.host.take(shard, epoch, { worker: before, reason: before === null ? "first" : "crash" })),
    );
  }
  void succeed();

  const service = broker.connect("service");
  const client = createCommandClient({ bus: service, world });
  async function say(actor: ActorAddress, type: string, body: { [key: string]: Json }, key: string): Promise<void> {
    const channel = actor.kind === "budget" ? "control" : "command";
    while ((await client.command(actor, { type, body, key, channel }, { patience_ms: 400 })).kind !== "decided");
  }

  // The same ids under two tenants; one of them may be poor.
  const limits = new Map(TENANTS.map((tenant) => [tenant, 100 + pick(800)] as const));
  const pending: Promise<void>[] = [];
  for (const tenant of TENANTS) {
    pending.push(
      (async () => {
        await say(budgetActor(tenant), "budget.create", {}, "create");
        await say(budgetActor(tenant), "budget.configure", { level: "tenant", limit_usd_micros: limits.get(tenant) ?? 0, period: "none" }, "configure");
        await Promise.all(
          Array.from({ length: 3 }, async (_, index) => {
            const session: ActorAddress = { tenant, kind: "session", id: `s${index}` };
            await say(session, "session.create", { agent: "a" }, `${session.id}-create`);
            for (let n = 0; n < 3 + pick(4); n++) {
              const words = 1 + pick(10);
              const tools = Array.from({ length: Math.max(0, pick(5) - 2) }, () => ({ call: "now", args: {} }));
              const script = [...tools, { say: "word", tokens: words, first_token_ms: pick(40), token_ms: pick(30) }];
              await say(session, "message.send", { content: JSON.stringify(script) }, `${session.id}-${n}`);
              if (draw() < 0.2) await say(session, "turn.cancel", {}, `${session.id}-${n}-cancel`);
              await pause(world, pick(600));
            }
          }),
        );
      })(),
    );
  }
  let sent = false;
  void Promise.all(pending).then(() => (sent = true));
  await world.until(() => sent, 240_000);
  expect(sent, `seed ${seed}: every command is decided in the end`).toBe(true);
  deaths_left = 0;
  await world.advance(400_000); // money that others held was waited for, turns have ended

  // ── what must hold ──
  const observer = broker.connect("observer");
  const violations: Violation[] = [];
  await verifyAll({ bus: observer, cores, report: (violation) => violations.push(violation) });
  expect(violations, `seed ${seed}`).toEqual([]);
  const met: Met = { crashes, completed: 0, refused: 0, assumed: 0, stopped: 0, degraded: 0, tools: 0 };
  const restorer = createRestorer({ bus: observer, cores, log: silentLog });
  for (const tenant of TENANTS) {
    const events: ActorEvent[] = [];
    for await (const stored of observer.read("EVENTS", `tenant.${tenant}.*.*.event`, 1)) events.push(...decodeJournal(stored.data).events);
    const restored = await restorer.restore(budgetActor(tenant));
    if (restored === undefined) throw new Error(`seed ${seed}: there is a budget`);
    const context = budgetContextOf(viewOf(restored.state));
    const own = tableGet(context.levels, TENANT_LEVEL);
    const ledger = events.filter(({ type }) => type === "budget.settled").reduce((sum, event) => sum + Number(event["cost_usd_micros"]), 0);
    expect([context.holds_open, own?.reserved_usd_micros, [...tableRows(context.holds)]], `seed ${seed} ${tenant}: all holds came back`).toEqual([0, 0, []]);
    expect(own?.settled_usd_micros, `seed ${seed} ${tenant}: the journal is the ledger`).toBe(ledger);
    expect(ledger, `seed ${seed} ${tenant}: within the limit`).toBeLessThanOrEqual(limits.get(tenant) ?? 0);
    expect(billed.get(tenant) ?? 0, `seed ${seed} ${tenant}: what was called is paid`).toBeLessThanOrEqual(ledger);
    expect(events.some(({ type }) => type === "budget.overrun" || type === "budget.unreserved")).toBe(false);
    const categories = Object.values(context.categories).reduce((sum, one) => sum + one, 0);
    expect(categories, `seed ${seed} ${tenant}: the categories sum to what is settled`).toBe(ledger);
    met.tools += events.filter((event) => event.type === "budget.settled" && event["category"] === PRICE.category && event["cost_usd_micros"] !== 0).length;
    const opened = events.filter(({ type }) => type === "turn.started").length;
    const ended = events.filter(({ type }) => type === "turn.completed" || type === "turn.failed" || type === "turn.cancelled").length;
    expect(ended, `seed ${seed} ${tenant}: every turn has ended`).toBeGreaterThanOrEqual(opened);
    const failures = events.filter(({ type }) => type === "turn.failed");
    for (const failure of failures)
      expect(failure, `seed ${seed} ${tenant}`).toMatchObject({ reason: "budget_exceeded", details: { limit_usd_micros: limits.get(tenant) } });
    met.refused += failures.length;
    met.completed += events.filter(({ type }) => type === "turn.completed").length;
    met.assumed += events.filter((event) => event.type === "budget.settled" && event["assumed"] === true).length;
    // A call that was cancelled is settled by what it had used.
    met.stopped += events.filter((event) => event.type === "model.failed" && event["code"] === "cancelled" && event["cost_usd_micros"] !== null).length;
    met.degraded += events.filter((event) => event.type === "budget.decision" && event["kind"] === "degrade" && event["applied"] === true).length;
  }
  return met;
}

describe("budgets of two tenants under a host that dies at any step", () => {
  test(`pay for every call and stay within their limits in ${RUNS} runs`, { timeout: 900_000 }, async () => {
    const only = process.env["SEED"];
    const seeds = only === undefined ? Array.from({ length: RUNS }, (_, index) => index + 1) : [Number(only)];
    const total: Met = { crashes: 0, completed: 0, refused: 0, assumed: 0, stopped: 0, degraded: 0, tools: 0 };
    for (const seed of seeds) {
      const one = await run(seed);
      for (const name of Object.keys(total) as (keyof Met)[]) total[name] += one[name];
    }
    console.log(
      `${seeds.length} runs: ${Object.entries(total)
        .map(([name, count]) => `${count} ${name}`)
        .join(", ")}`,
    );
    if (only !== undefined) return;
    for (const [name, count] of Object.entries(total)) expect(count, `the walk met ${name}`).toBeGreaterThan(RUNS / 10);
  });
});
