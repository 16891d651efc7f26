// Goal:   a worker that is asked to go does so without harm: no command lost, no model call cut, exit code 0; and `troupe drain` empties one that stays.
// Method: the real `up`; twenty sessions in calls of five seconds, SIGTERM to the worker that has the most of them, messages sent all the while.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, expect, test, vi } from "vitest";
import { beganAt, sendSignal, until } from "../../deploy/local/server-process.ts";
import { shardOf } from "../../protocol/subjects.ts";
import { askHost } from "../../supervisors/host-service.ts";
import { collect, hear } from "../harness/event-stream.ts";
import { startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

/** Others may be at work on the machine; what is waited for is bounded one by one. */
vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
beforeAll(async () => {
  troupe = await startTroupe();
}, 120_000);

const SESSIONS = 20;
/** Long enough that all of them still run when the worker is asked to go. */
const CALL_MS = 5_000;
const TOKENS = 30;
const call = (words: string, ms = CALL_MS): string => JSON.stringify([{ say: words, tokens: TOKENS, token_ms: ms / TOKENS }]);

interface Placed {
  readonly shard: number;
  readonly worker: string;
}
const placement = async (): Promise<Placed[]> => (JSON.parse((await typed(troupe, ["shards", "--json"])).stdout) as { shards: Placed[] }).shards;
const owns = async (worker: string): Promise<number> => (await placement()).filter((one) => one.worker === worker).length;

async function sessions(prefix: string): Promise<string[]> {
  const ids = Array.from({ length: SESSIONS }, (_, n) => `${prefix}${n}`);
  await Promise.all(ids.map((id) => troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant", overrides: { model: "simulated/script" } } })));
  return ids;
}

async function allThink(ids: readonly string[]): Promise<boolean> {
  const states = await Promise.all(ids.map((id) => troupe.json<{ state: string }>(200, `/v1/sessions/${id}`)));
  return states.every(({ state }) => state === "thinking");
}

/** What the leading supervisor tells scrapers, of one gauge or counter: its labels but the role's, and the value. */
async function told(instrument: string): Promise<Record<string, number>> {
  const log = readFileSync(join(troupe.home, "logs", "supervisor-s1.log"), "utf8");
  const url = [...log.matchAll(/"http":"([^"]+)"/g)].at(-1)?.[1] ?? "";
  const lines = (await (await fetch(`${url}/metrics`)).text()).split("\n").filter((line) => line.startsWith(`${instrument}{`));
  return Object.fromEntries(
    lines.map((line) => [
      [...line.matchAll(/(\w+)="([^"]*)"/g)].flatMap(([, name, value]) => (name === "role" ? [] : [value])).join(" "),
      Number(line.split(" ").at(-1)),
    ]),
  );
}

/** Every attempt that each model call of a session made, by what the journal says. */
async function attempts(id: string): Promise<{ started: number; completed: number; highest_attempt: number; lost: string[]; turns: number }> {
  const journal = await troupe.journal(`demo/session/${id}`);
  const events = journal.flatMap((message) => message.events);
  const of = (type: string): typeof events => events.filter((event) => event.type === type);
  return {
    started: of("model.started").length,
    completed: of("model.completed").length,
    highest_attempt: Math.max(0, ...of("model.completed").map((event) => Number(event["attempt"]))),
    // A planned move is a claim too, and loses nothing: what the old owner decided and did not begin, the new one begins.
    lost: journal.flatMap(({ entries }) => entries).flatMap((entry) => (entry.t === "claim" ? entry.lost : [])),
    turns: of("turn.completed").length,
  };
}

test("SIGTERM of a worker in the midst of twenty calls: none is cut, no command is lost, it ends with code 0", async () => {
  const ids = await sessions("busy");
  const first = ids.map((id) => collect(troupe.sse(`/v1/sessions/${id}/messages`, { json: { content: call("a long answer ") } })));
  expect(await until(() => allThink(ids), 30_000)).toBe(true);
  const owners = await Promise.all(ids.map(async (id) => (await troupe.json<{ worker: string }>(200, `/v1/sessions/${id}`)).worker));
  const leaving = owners.filter((owner) => owner === "w1").length * 2 >= SESSIONS ? "w1" : "w2";
  expect(owners.filter((owner) => owner === leaving).length).toBeGreaterThan(3);

  const pid = troupe.processOf("worker", leaving);
  const began = beganAt(pid);
  sendSignal(pid, "SIGTERM");
  // While it drains, more is said to every session: it waits behind the running call, wherever the session goes.
  const log = (): string => readFileSync(join(troupe.home, "logs", `worker-${leaving}.log`), "utf8");
  expect(await until(() => log().includes("worker drains"), 30_000)).toBe(true);
  const second = await Promise.all(
    ids.map((id) => troupe.json<{ turn: number }>(202, `/v1/sessions/${id}/messages`, { json: { content: call("a second answer ", 600) } })),
  );
  expect(second.map(({ turn }) => turn)).toEqual(ids.map(() => 2));

  const heard = (await Promise.all(first)).map((messages) => hear(messages, 1));
  heard.forEach((one) => expect(one).toMatchObject({ faults: [], voided: 0, attempts: 1, text: one.finished }));
  heard.forEach(({ text }) => expect(text.trim().split(" ")).toHaveLength(TOKENS));
  // It ends when its last call has, not at the deadline of a minute.
  expect(await until(() => beganAt(pid) !== began, 45_000)).toBe(true);
  const over = await until(
    async () => {
      const states = await Promise.all(ids.map((id) => troupe.json<{ state: string; turn: number; queue_length: number }>(200, `/v1/sessions/${id}`)));
      return states.every(({ state, queue_length }) => state === "idle" && queue_length === 0);
    },
    60_000,
    100,
  );
  expect(over).toBe(true);
  for (const id of ids) expect({ id, ...(await attempts(id)) }).toEqual({ id, started: 2, completed: 2, highest_attempt: 1, lost: [], turns: 2 });

  // `up` says how it ended, and starts it again.
  expect(await until(() => troupe.output().includes(`worker-${leaving} ended (exit code 0); starting it again`), 30_000)).toBe(true);
  expect(log()).toContain("worker ended");
  expect(await until(async () => (await owns(leaving)) > 0, 60_000, 100)).toBe(true);
});

test("troupe drain empties a worker whose calls run to their end, keeps it empty, and --undo lets it work again", async () => {
  const ids = await sessions("moved");
  const turns = ids.map((id) => collect(troupe.sse(`/v1/sessions/${id}/messages`, { json: { content: call("while moving ") } })));
  expect(await until(() => allThink(ids), 30_000)).toBe(true);
  expect(await owns("w2")).toBeGreaterThan(0);
  const drained = await typed(troupe, ["drain", "w2", "--wait", "--patience", "90", "--reason", "a test"]);
  expect(drained).toMatchObject({ code: 0 });
  expect(await owns("w2")).toBe(0);
  await until(async () => (await told("troupe_workers"))["draining"] === 1, 30_000, 100);
  expect(await told("troupe_workers")).toEqual({ joining: 0, ready: 1, draining: 1, suspected: 0, dead: 0, left: 0 });
  expect((await told("troupe_shard_changes_total"))["moving draining"]).toBeGreaterThan(0);
  const heard = (await Promise.all(turns)).map((messages) => hear(messages, 1));
  heard.forEach((one) => expect(one).toMatchObject({ faults: [], voided: 0, attempts: 1, text: one.finished }));

  // Everything is served by the other one, and the process stays.
  const pid = troupe.processOf("worker", "w2");
  await Promise.all(ids.slice(0, 4).map((id) => collect(troupe.sse(`/v1/sessions/${id}/messages`, { json: { content: JSON.stringify([{ say: "there" }]) } }))));
  const where = await Promise.all(ids.slice(0, 4).map(async (id) => (await troupe.json<{ worker: string }>(200, `/v1/sessions/${id}`)).worker));
  expect(where).toEqual(["w1", "w1", "w1", "w1"]);
  // It reads beforehand what it will be given again, as the leader asks before each planned move, and has nothing of it.
  const bus = await troupe.bus();
  const prepared = await askHost(bus, "w2", "prepare", { shard: shardOf({ tenant: "demo", kind: "session", id: ids[0]! }, bus.shards) });
  expect(prepared).toMatchObject({ ok: true, result: { actors: expect.toSatisfy((actors: number) => actors > 0) } });
  expect(await owns("w2")).toBe(0);
  expect(troupe.processOf("worker", "w2")).toBe(pid);

  expect((await typed(troupe, ["drain", "w2", "--undo"])).code).toBe(0);
  expect(await until(async () => (await owns("w2")) > 0, 60_000, 100)).toBe(true);
  expect((await typed(troupe, ["drain", "nobody"])).code).toBe(1);
});

test("after both moves no promise is broken and nothing is left", async () => {
  const verified = await typed(troupe, ["verify", "--json"]);
  expect(verified).toMatchObject({ code: 0, stdout: expect.stringContaining('"violations":0') });
  expect(await troupe.stop()).toBe(0);
});
