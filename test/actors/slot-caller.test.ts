// Goal: a call that stands in line for a slot goes on the moment the budget calls it, by its next asking when the call was not heard, and not at all
// when it is called off or the line does not move; while it stands there it counts as waiting, and afterwards nothing of it is left.
// Method: the real budget machine behind a client, its events told on an in-memory bus as the broker tells them, in virtual time.
import { expect, test } from "vitest";
import { createCallPool } from "../../actors/call-pool.ts";
import type { CommandClient } from "../../actors/client.ts";
import { createModelMoney } from "../../actors/model-money.ts";
import { EffectFailure, type EffectScope } from "../../actors/performer.ts";
import { createSlotCaller } from "../../actors/slot-caller.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { agentConfig } from "../../protocol/commands.ts";
import { encodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { createProviders } from "../../providers/registry.ts";
import { LINE_ASK_MS } from "../../state-machines/budget-line.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { coreOf } from "../../state-machines/step.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { Drive } from "../state-machines/drive.ts";

const other = "acme/session/other/1:model/1";

async function ground({ deaf = false } = {}) {
  const world = new VirtualWorld(5);
  const bus = createMemoryBroker({ world, shards: 1 }).connect("w1");
  const drive = new Drive(coreOf(budgetDefinition), { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = world.now_ms();
  drive.create({});
  let asked = 0;
  /** The budget decides, and its journal is stored: who listens hears it live. */
  const tell = async (type: string, body: JsonObject): Promise<JsonObject> => {
    drive.at_ms = world.now_ms();
    const result = drive.tell(type, body);
    const message = { v: 1, actor: drive.state.actor, seq: drive.seq, epoch: 1, worker: "w2", machine: "budget@1", at: new Date(drive.at_ms).toISOString() };
    const journal = { ...message, entries: [], state: drive.at, events: drive.told, out: [], out_confirmed_seq: 0 } as unknown as JournalMessage;
    if (!deaf) await bus.publish("tenant.acme.budget.main.event", encodeJournal(journal));
    return result;
  };
  await tell("budget.configure", { level: "tenant", concurrency_max: 1 });
  const client: CommandClient = {
    async command(_, { type, body }) {
      if (type === "budget.create") return { kind: "decided", reply: { ok: true, actor: "", seq: 1, state: "healthy", result: { created: false } } };
      asked += 1;
      return { kind: "decided", reply: { ok: true, actor: "", seq: 1, state: "healthy", result: await tell(type, body) } };
    },
    stop: () => Promise.resolve(),
  };
  const slots = createSlotCaller(bus);
  const waited: [string, number][] = [];
  const pool = createCallPool({ world, on_waited: (reason, ms) => void waited.push([reason, ms]) });
  const money = createModelMoney({ client, world, providers: createProviders({ world, log: silentLog }), slots, pool });
  const abort = new AbortController();
  const scope = {
    actor: { tenant: "acme", kind: "session", id: "s1" },
    inst: "5:model",
    attempt: 1,
    signal: abort.signal,
    trace: undefined,
    entries: () => Promise.resolve(new Map([[1, { t: "init", type: "session.create", body: { agent: "a" }, channel: "command" }]])),
  } as unknown as EffectScope;
  const request = { instructions: "", messages: [{ role: "user", text: "hello" }], tools: [], max_output_tokens: 5, idempotency_key: "k" };
  let ended: "granted" | { readonly code: string } | undefined;
  const begin = (): void =>
    void money.begin({ scope, config: agentConfig.parse({ model: "simulated/echo" }), request: request as never, priority: "high" }).then(
      () => (ended = "granted"),
      (error: unknown) => (ended = error instanceof EffectFailure ? { code: error.effect_error.code } : { code: String(error) }),
    );
  const take = { hold: other, session: "other", agent: "a", model: "simulated/echo", amount_usd_micros: 1, minimum_usd_micros: 1 };
  await tell("budget.reserve", take);
  return { world, tell, pool, abort, begin, waited, slots, asked: () => asked, ended: () => ended };
}

test("who is called goes on at once, and counts as waiting until then", async () => {
  const { world, tell, pool, begin, ended, waited, slots } = await ground();
  begin();
  await world.advance(1_000);
  expect(ended()).toBeUndefined();
  expect(pool.waitOf("acme/session/s1")).toMatchObject({ for: "slot", priority: "high", ahead: 0 });
  await tell("budget.settle", { hold: other, cost_usd_micros: 0 });
  await world.advance(1);
  expect(ended()).toBe("granted");
  expect(pool.report()).toMatchObject({ waiting: 0, tenants: [] });
  expect(waited).toEqual([["slot", expect.closeTo(1_000, -2)]]);
  await slots.stop();
});

test("a call that was not heard costs one asking's time and no more", async () => {
  const { world, tell, begin, ended } = await ground({ deaf: true });
  begin();
  await world.advance(1_000);
  await tell("budget.settle", { hold: other, cost_usd_micros: 0 });
  await world.advance(LINE_ASK_MS - 1_100);
  expect(ended()).toBeUndefined();
  await world.advance(200);
  expect(ended()).toBe("granted");
});

test("who is called off stands in line no more, and is heard of no more", async () => {
  const { world, pool, begin, abort, ended, asked } = await ground();
  begin();
  await world.advance(1_000);
  abort.abort();
  await world.settle();
  expect(ended()).toEqual({ code: "cancelled" });
  expect(pool.report().tenants).toEqual([]);
  const before = asked();
  await world.advance(60_000);
  expect(asked()).toBe(before);
});

test("who waits for a window goes on when something came back to it, long before it would have moved on", async () => {
  const { world, tell, begin, ended, asked, slots } = await ground();
  await tell("budget.settle", { hold: other, cost_usd_micros: 0 });
  await tell("budget.configure", { level: "tenant", rates: { simulated: { requests_max: null, tokens_max: 100, window_ms: 20_000 } } });
  const held = "acme/session/other/2:model/1";
  const take = { hold: held, session: "other", agent: "a", model: "simulated/echo", amount_usd_micros: 1, minimum_usd_micros: 1 };
  await tell("budget.reserve", { ...take, rate: { provider: "simulated", tokens: 100, returns: true } });
  await tell("budget.configure", { level: "tenant", concurrency_max: null });
  begin();
  await world.advance(2_000);
  expect([ended(), asked()]).toEqual([undefined, 1]);
  await tell("budget.settle", { hold: held, cost_usd_micros: 1, used: [{ provider: "simulated", requests: 1, tokens: 40 }] });
  await world.advance(1);
  expect([ended(), asked()]).toEqual(["granted", 2]);
  await slots.stop();
});

test("a line that does not move for five minutes ends the call as overloaded, having asked once in five seconds", async () => {
  const { world, begin, ended, asked, pool } = await ground();
  begin();
  await world.advance(290_000);
  expect(ended()).toBeUndefined();
  await world.advance(20_000);
  expect(ended()).toEqual({ code: "overloaded" });
  expect(asked()).toBeGreaterThan(55);
  expect(asked()).toBeLessThan(65);
  expect(pool.report().tenants).toEqual([]);
});
