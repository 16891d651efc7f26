// Goal: over drawn graphs of messages that come after one another, in any sessions of a tenant and while owners of the shards die: every turn has its one
// end, none begins before those it comes after have completed, one that is skipped names a parent that did not complete; nobody waits for ever, since a
// cycle cannot be made; and what is unknown, of another tenant, or of later is refused.
// Method: hosts on the in-memory bus in virtual time; models that take drawn times and fail by chance; a host is dropped in the middle and another takes
// its shards. The journals say what began when.
import { expect, test } from "vitest";
import { createAdmission } from "../../actors/admission.ts";
import { createCommandClient } from "../../actors/client.ts";
import { lookUpTurns } from "../../actors/effects/look-up-turns.ts";
import { EffectFailure, type EffectScope, type Performers } from "../../actors/performer.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost } from "../../actors/shard-host.ts";
import { createTurnFinder } from "../../actors/turn-finder.ts";
import { verifyAll, type Violation } from "../../actors/verify.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { type ActorEvent, decodeJournal } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import type { SessionParent } from "../../protocol/session-parent.ts";
import { pause } from "../../protocol/world.ts";
import { createProviders } from "../../providers/registry.ts";
import { cores } from "../../state-machines/kinds.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";

const SHARDS = 2;
const RUNS = 150;
const MESSAGES = 24;
const TENANTS = ["acme", "globex"] as const;
const session = (tenant: string, id: string): ActorAddress => ({ tenant, kind: "session", id });

interface Accepted extends SessionParent {
  readonly tenant: string;
  readonly after: readonly SessionParent[];
}
interface Seen {
  begun?: number;
  ended?: { readonly at: number; readonly event: ActorEvent };
}

async function run(seed: number): Promise<{ waits: number; skips: number; refused: Record<string, number>; deaths: number }> {
  const draw = seededRandom(seed);
  const pick = (below: number): number => Math.floor(draw() * below);
  const any = <T>(list: readonly T[]): T => list[pick(list.length)] as T;
  const world = new VirtualWorld(seed ^ 0xdeb);
  const broker = createMemoryBroker({ world, shards: SHARDS });
  const providers = createProviders({ world, log: silentLog });
  const agents = { assistant: { version: 1, hash: "h", config: { model: "simulated/echo" } } };
  const directory = { tenant: async () => ({ state: "active", agents, policy: { default: "allow", deny: [] }, grants: {} }) } as never;

  let generation = 0;
  let host: ShardHost | undefined;
  const succeed = async (): Promise<void> => {
    generation += 1;
    const name = `w${generation}`;
    const bus = broker.connect(name);
    const restorer = createRestorer({ bus, cores, log: silentLog });
    const turns = createTurnFinder({ bus, restorer });
    const performers: Performers = {
      load_configuration: (async () => ({
        config: { model: "simulated/echo", instructions: "", tools: [], mode: "multi" },
        hash: "h",
        agent_version: 1,
      })) as never,
      call_model: (async (_: never, { signal }: EffectScope) => {
        await pause(world, 5 + Math.floor(world.random() * 400));
        if (signal.aborted || world.random() < 0.12) throw new EffectFailure("provider_unavailable", "away");
        return {
          text: "there",
          tool_calls: [],
          stop: "end",
          usage: { input_tokens: 1, output_tokens: 1, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 },
          cost_usd_micros: 1,
          price_version: null,
          model: "simulated/echo",
        };
      }) as never,
      look_up_turns: lookUpTurns(turns),
    };
    let commits = 0;
    host = createShardHost({
      bus,
      world,
      log: silentLog,
      cores,
      restorer,
      performers,
      worker: name,
      next_commit_id: () => `${name}.${commits++}`,
      may_act: () => true,
      on_conflict: async () => "lost",
      admit: createAdmission({ directory, providers, turns }),
    });
    for (let shard = 0; shard < SHARDS; shard += 1)
      await host.take(shard, generation, { worker: generation === 1 ? null : `w${generation - 1}`, reason: "declared dead" });
  };
  const until = async <T>(promise: Promise<T>): Promise<T> => {
    let over = false;
    const ended = (): void => void (over = true);
    promise.then(ended, ended); // how it ended, also with an error, is what this answers
    if (!(await world.until(() => over, 600_000))) throw new Error(`seed ${seed}: nothing came`);
    return promise;
  };
  await until(succeed());

  const client = createCommandClient({ bus: broker.connect("svc"), world, fast_lane: draw() < 0.5 });
  const say = async (actor: ActorAddress, type: string, body: JsonObject): Promise<JsonObject | { code: string }> => {
    const key = world.id();
    for (;;) {
      const outcome = await client.command(actor, { type, body, key }, { patience_ms: 5_000 });
      if (outcome.kind === "decided") return outcome.reply.ok ? outcome.reply.result : { code: outcome.reply.error.code };
    }
  };
  const ids = ["a", "b", "c", "d"];
  for (const tenant of TENANTS)
    for (const id of ids) await until(say(session(tenant, id), "session.create", { agent: "assistant", ...(draw() < 0.15 ? { mode: "single" } : {}) }));

  const accepted: Accepted[] = [];
  const refused: Record<string, number> = {};
  let deaths = 0;
  for (let n = 0; n < MESSAGES; n++) {
    const tenant = draw() < 0.8 ? "acme" : "globex";
    const id = any(ids);
    const mine = accepted.filter((one) => one.tenant === tenant);
    const others = accepted.filter((one) => one.tenant !== tenant && !mine.some(({ session: a, message }) => a === one.session && message === one.message));
    const chance = draw();
    const named = (list: readonly Accepted[]): SessionParent[] =>
      Array.from({ length: 1 + pick(3) }, () => any(list)).map(({ session: of, message }) => ({ session: of, message }));
    const bad = chance < 0.05 ? [{ session: any(ids), message: "m9999" }] : chance < 0.1 && others.length > 0 ? named(others) : undefined;
    const after = bad ?? (chance < 0.75 && mine.length > 0 ? named(mine) : []);
    const on_busy = after.length === 0 && draw() < 0.3 ? { on_busy: "interrupt" } : {};
    const answered = await until(
      say(session(tenant, id), "message.send", { content: `${n}`, ...(after.length === 0 ? {} : { after: after as never }), ...on_busy }),
    );
    if ("code" in answered) {
      refused[String(answered["code"])] = (refused[String(answered["code"])] ?? 0) + 1;
      if (bad !== undefined) expect(["dependency_unknown", "dependency_cycle", "illegal_transition"], `seed ${seed}`).toContain(answered["code"]);
    } else {
      expect(bad, `seed ${seed}: what is not there is refused`).toBeUndefined();
      accepted.push({ tenant, session: id, message: String((answered as JsonObject)["message_id"]), after });
    }
    if (draw() < 0.06) await until(say(session(tenant, any(ids)), any(["turn.cancel", "session.terminate", "session.pause"]), {}));
    if (draw() < 0.08 && host !== undefined) {
      deaths += 1;
      broker.kill(`w${generation}`);
      await world.advance(pick(80));
      void host.stop();
      await until(succeed());
    }
    await world.advance(pick(150));
  }
  for (const tenant of TENANTS) for (const id of ids) await until(say(session(tenant, id), "session.resume", {}));

  // ── what the journals say, in the order of the stream ──
  const reader = broker.connect("reader");
  const read = async (): Promise<{ seen: Map<string, Seen>; waits: number }> => {
    const seen = new Map<string, Seen>();
    const turns = new Map<string, string>();
    let [at, waits] = [0, 0];
    for await (const { data } of reader.read("EVENTS", "tenant.*.session.*.event", 1)) {
      const { actor, events } = decodeJournal(data);
      for (const event of events) {
        at += 1;
        const turn = `${actor.tenant}/${actor.id}/${String(event["turn"])}`;
        if (event.type === "message.received") {
          const name = `${actor.tenant}/${actor.id}/${String(event["message_id"])}`;
          turns.set(turn, name);
          seen.set(name, {});
        }
        const one = seen.get(turns.get(turn) ?? "");
        if (event.type === "session.state" && event["to"] === "awaiting_dependency") waits += 1;
        if (one === undefined) continue;
        if (event.type === "turn.started") one.begun = at;
        if (/^turn\.(completed|failed|cancelled)$/.test(event.type)) {
          expect(one.ended, `seed ${seed}: one end`).toBeUndefined();
          one.ended = { at, event };
        }
      }
    }
    return { seen, waits };
  };
  let journals = await until(read());
  for (let looks = 0; looks < 400 && [...journals.seen.values()].some(({ ended }) => ended === undefined); looks++) {
    await world.advance(1_000);
    journals = await until(read());
  }
  const { seen, waits } = journals;
  let skips = 0;
  for (const { tenant, session: id, message, after } of accepted) {
    const name = `${tenant}/${id}/${message}`;
    const { begun, ended } = seen.get(name) ?? {};
    expect(ended, `seed ${seed}: DP3, ${name} has its end`).toBeDefined();
    const parents = after.map((parent) => ({ ...parent, ended: seen.get(`${tenant}/${parent.session}/${parent.message}`)?.ended }));
    if (begun !== undefined)
      for (const parent of parents) {
        expect(parent.ended?.event.type, `seed ${seed}: DP1, ${name} after ${parent.session}/${parent.message}`).toBe("turn.completed");
        expect(parent.ended?.at, `seed ${seed}: DP1`).toBeLessThan(begun);
      }
    if (ended?.event["reason"] !== "dependency_failed") continue;
    skips += 1;
    expect(begun, `seed ${seed}: what is skipped never began`).toBeUndefined();
    const { parent } = ended.event["details"] as unknown as { parent: SessionParent };
    const named = parents.find((one) => one.session === parent.session && one.message === parent.message);
    expect(named?.ended?.event.type, `seed ${seed}: DP2, ${name} names a parent that did not complete`).toMatch(/^turn\.(failed|cancelled)$/);
  }
  const violations: Violation[] = [];
  await until(verifyAll({ bus: reader, cores, report: (violation) => violations.push(violation) }));
  expect(violations, `seed ${seed}`).toEqual([]);
  await host?.stop();
  return { waits, skips, refused, deaths };
}

test(`${RUNS} drawn graphs: each message has its end in time, none begins too early, none is skipped without a reason`, async () => {
  const total = { waits: 0, skips: 0, deaths: 0 };
  const refused: Record<string, number> = {};
  for (let seed = 1; seed <= RUNS; seed++) {
    const ran = await run(seed);
    for (const name of ["waits", "skips", "deaths"] as const) total[name] += ran[name];
    for (const [code, count] of Object.entries(ran.refused)) refused[code] = (refused[code] ?? 0) + count;
  }
  console.log(JSON.stringify({ ...total, refused }));
  expect(total.waits).toBeGreaterThan(RUNS);
  expect(total.skips).toBeGreaterThan(RUNS / 2);
  expect(total.deaths).toBeGreaterThan(RUNS / 2);
  expect(refused["dependency_unknown"]).toBeGreaterThan(RUNS / 2);
  expect(refused["dependency_cycle"]).toBeGreaterThan(0);
}, 300_000);
