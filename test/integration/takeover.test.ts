// Goal:   any process may be killed at any moment, and whoever listens hears every answer whole and once; nothing acknowledged is lost.
// Method: the real `up`; kill -9 of each of its processes in mid-stream, with clients that read server-sent events as careful clients do
//         (test/harness/event-stream.ts names every gap and repeat). The tests use one system one after the other, as life does.
import { beforeAll, expect, test, vi } from "vitest";
import { sendSignal, until } from "../../deploy/local/server-process.ts";
import type { Entry, JournalMessage } from "../../protocol/journal.ts";
import { hear, type StreamMessage } from "../harness/event-stream.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

/** Others may be at work on the machine; what is waited for is bounded one by one. */
vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
beforeAll(async () => {
  troupe = await startTroupe();
}, 120_000);

/** So long that what is done to it in its middle is done in its middle on a slow machine too. */
const slow = (tokens: number, token_ms: number): string => JSON.stringify([{ say: "one two three four five six seven ", tokens, token_ms }]);
const isEnd = ({ event }: StreamMessage): boolean => event === "turn.completed" || event === "turn.failed" || event === "turn.cancelled";
const tokensOf = (messages: readonly StreamMessage[]): number => messages.filter(({ event }) => event === "token").length;
const entriesOf = (journal: readonly JournalMessage[]): Entry[] => journal.flatMap(({ entries }) => entries);
const wholly = (tokens: number): { text: unknown; faults: string[] } => ({
  text: expect.toSatisfy((text: string) => text.trim().split(" ").length === tokens),
  faults: [],
});

async function session(id: string): Promise<string> {
  await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant", overrides: { model: "simulated/script" } } });
  return id;
}

/** Sends a message and reads its turn, taking it up from the last id as often as the connection breaks. */
function listen(
  id: string,
  content: string,
): { readonly messages: StreamMessage[]; readonly ended: Promise<StreamMessage[]>; broke(): number; heardTokens(count: number): Promise<void> } {
  const messages: StreamMessage[] = [];
  let broke = 0;
  let broken_by: unknown;
  const take = async (stream: AsyncIterable<StreamMessage>): Promise<boolean> => {
    for await (const message of stream) {
      messages.push(message);
      if (isEnd(message)) return true;
    }
    return false;
  };
  const ended = (async () => {
    const key = { "idempotency-key": `listen-${id}` };
    for (const give_up_at_ms = performance.now() + 90_000; performance.now() < give_up_at_ms; await later(100, undefined)) {
      const last_event_id = messages.findLast((message) => message.id !== undefined)?.id;
      try {
        const stream =
          last_event_id === undefined
            ? troupe.sse(`/v1/sessions/${id}/messages`, { json: { content }, headers: key })
            : troupe.sse(`/v1/sessions/${id}/events`, { last_event_id });
        if (await take(stream)) return messages;
      } catch (error) {
        broken_by = error; // a broken connection or a gateway that is not there: what was heard stays, the rest is asked for
      }
      broke += 1;
    }
    throw new Error(`the turn of ${id} did not end; the last heard is ${JSON.stringify(messages.slice(-3))}`, { cause: broken_by });
  })();
  ended.catch(() => undefined); // whoever awaits it hears of it
  return {
    messages,
    ended,
    broke: () => broke,
    async heardTokens(count) {
      if (!(await until(() => tokensOf(messages) >= count, 60_000, 5))) throw new Error(`${id}: only ${tokensOf(messages)} of ${count} tokens came`);
    },
  };
}

const workerOf = async (id: string): Promise<string> => (await troupe.json<{ worker: string }>(200, `/v1/sessions/${id}`)).worker;

async function verified(): Promise<void> {
  // What the projections have not read yet is no violation; so this may be asked at any time.
  const { code, stdout, stderr } = await typed(troupe, ["verify", "--json"]);
  expect({ code, stdout, stderr }).toMatchObject({ code: 0, stdout: expect.stringContaining('"violations":0') });
}

test("kill -9 of the worker that streams: the turn completes on the other one, and the client hears the answer whole and once", async () => {
  await session("streamed");
  const turn = listen("streamed", slow(100, 40));
  await turn.heardTokens(10);
  const killed = await troupe.kill9("worker", await workerOf("streamed"));
  const messages = await turn.ended;

  expect(turn.broke()).toBe(0);
  const heard = hear(messages, 1);
  expect(heard).toMatchObject({ ...wholly(100), finished: heard.text, attempts: 2, voided: 1 });
  const journal = await troupe.journal("demo/session/streamed");
  const claim = entriesOf(journal).filter((entry) => entry.t === "claim");
  expect(claim).toMatchObject([{ from: killed.id, lost: [expect.stringMatching(/:model$/)] }]);
  expect(journal.flatMap(({ events }) => events).map(({ type }) => type)).toEqual(expect.arrayContaining(["session.claimed", "superseded"]));
  expect(journal.at(-1)?.worker).not.toBe(killed.id);
  await troupe.replaced(killed);
  await verified();
});

test("kill -9 of a worker with many turns at once: each completes, none twice", async () => {
  const ids = Array.from({ length: 12 }, (_, n) => `many${n}`);
  await Promise.all(ids.map(session));
  const turns = ids.map((id) => listen(id, slow(60, 100)));
  await Promise.all(turns.map((turn) => turn.heardTokens(3)));
  const owners = await Promise.all(ids.map(workerOf));
  const killed = await troupe.kill9("worker", owners[0]);
  const heard = (await Promise.all(turns.map(({ ended }) => ended))).map((messages) => hear(messages, 1));
  heard.forEach((one) => expect(one).toMatchObject({ ...wholly(60), finished: one.text }));
  const lost = owners.filter((owner) => owner === killed.id).length;
  expect(lost).toBeGreaterThan(0);
  expect(heard.filter(({ attempts }) => attempts === 2)).toHaveLength(lost);
  await troupe.replaced(killed);
});

test("kill -9 of a worker in the middle of a tool call: the audit has its intent before, its outcome after, and a pair for every tool effect", async () => {
  const agent = JSON.stringify({ agent: "handy", model: "simulated/script", tools: ["now", "wait_ms"] });
  expect((await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], { stdin: agent })).code).toBe(0);
  await troupe.json(201, "/v1/sessions", { json: { id: "handy", agent: "handy" } });
  interface Row {
    readonly seq: number;
    readonly entry_type: string;
    readonly tool: string | null;
    readonly inst: string;
    readonly decision: string;
    readonly code: string | null;
    readonly args_hash: string;
    readonly result_hash: string | null;
    readonly duration_ms: number | null;
    readonly attempts: number | null;
  }
  const rows = async (): Promise<Row[]> => {
    const { stdout } = await typed(troupe, ["audit", "--tenant", "demo", "--actor", "handy", "--limit", "500", "--json"]);
    return stdout
      .trim()
      .split("\n")
      .filter((line) => line !== "")
      .map((line) => JSON.parse(line) as Row)
      .filter(({ tool }) => tool !== null)
      .reverse();
  };
  const steps = [{ call: "wait_ms", args: { ms: 6_000 } }, { call: "now", args: {} }, { call: "rm", args: { all: true } }, { say: "all done" }];
  const turn = listen("handy", JSON.stringify(steps));
  const of_wait = async (): Promise<string[]> => (await rows()).filter(({ tool }) => tool === "wait_ms").map(({ entry_type }) => entry_type);
  let began: string[] = [];
  await until(async () => (began = await of_wait()).length > 0, 60_000, 20);
  expect(began).toEqual(["tool.intent"]);
  const killed = await troupe.kill9("worker", await workerOf("handy"));
  expect(hear(await turn.ended, 1)).toMatchObject({ finished: "all done", faults: [] });
  await troupe.replaced(killed);

  const journal = await troupe.journal("demo/session/handy");
  const started = journal.flatMap(({ events }) => events).filter(({ type }) => type === "tool.started").length;
  const ended = async (): Promise<boolean> => (await rows()).filter(({ entry_type }) => entry_type === "tool.outcome").length === started + 1;
  expect(await until(ended, 60_000, 100)).toBe(true);
  const all = await rows();
  const intents = all.filter(({ entry_type }) => entry_type === "tool.intent");
  const outcomes = all.filter(({ entry_type }) => entry_type === "tool.outcome");
  expect(intents.filter(({ decision }) => decision === "allowed")).toHaveLength(started);
  expect(started).toBe(2);
  expect(outcomes.map(({ inst }) => inst).sort()).toEqual(intents.map(({ inst }) => inst).sort());
  const of = (list: readonly Row[], name: string): Row => list.find(({ tool }) => tool === name)!;
  // Its worker was lost and the call is safe to repeat: one call, begun twice, by the first worker's clock from its begin to its end.
  expect(of(outcomes, "wait_ms")).toMatchObject({ decision: "allowed", code: null, attempts: 2, result_hash: expect.stringMatching(/^[0-9a-f]{64}$/) });
  expect(of(outcomes, "wait_ms").duration_ms).toBeGreaterThan(6_000);
  expect(of(outcomes, "wait_ms").args_hash).toBe(of(intents, "wait_ms").args_hash);
  expect(of(outcomes, "now")).toMatchObject({ decision: "allowed", attempts: 1 });
  expect(of(outcomes, "rm")).toMatchObject({ decision: "unknown", code: "tool_unknown", attempts: 0 });
  const { code, stdout } = await typed(troupe, ["audit", "verify", "--tenant", "demo"]);
  expect({ code, stdout }).toMatchObject({ code: 0, stdout: expect.stringContaining("the chain is whole") });
});

test("kill -9 of the gateway in mid-stream: the client goes on from its last id at the next one without a gap or a repeat", async () => {
  await session("resumed");
  const turn = listen("resumed", slow(150, 60));
  await turn.heardTokens(10);
  const killed = await troupe.kill9("gateway");
  const heard_then = tokensOf(turn.messages);
  await troupe.replaced(killed);
  const messages = await turn.ended;
  expect(turn.broke()).toBeGreaterThan(0);
  const heard = hear(messages, 1);
  expect(heard).toMatchObject({ ...wholly(150), finished: heard.text, attempts: 1, voided: 0 });
  // It was taken up in the middle, not told at the end.
  expect(tokensOf(messages) - heard_then).toBeGreaterThan(5);
  expect(messages.filter(({ event }) => event === "turn.started")).toHaveLength(1);
});

test("kill -9 of the supervisor and of a worker at once: the next leader finds the dead one, and the turn completes", async () => {
  await session("led");
  const turn = listen("led", slow(100, 40));
  await turn.heardTokens(10);
  const owner = await workerOf("led");
  const [supervisor, worker] = await Promise.all([troupe.kill9("supervisor"), troupe.kill9("worker", owner)]);
  const heard = hear(await turn.ended, 1);
  expect(heard).toMatchObject({ ...wholly(100), finished: heard.text });
  await Promise.all([troupe.replaced(supervisor), troupe.replaced(worker)]);
  const everyone = async (): Promise<boolean> => {
    const { shards } = JSON.parse((await typed(troupe, ["shards", "--json"])).stdout) as { shards: { worker: string }[] };
    return shards.length === 16 && new Set(shards.map(({ worker: one }) => one)).size === 2;
  };
  expect(await until(everyone, 60_000, 200)).toBe(true);
});

test("kill -9 of the broker under load: what was acknowledged is in the journal once, and the answer being streamed is heard whole", async () => {
  await session("outlived");
  const ids = ["load0", "load1", "load2", "load3"];
  await Promise.all(ids.map(session));
  const turn = listen("outlived", slow(150, 25));
  await turn.heardTokens(10);

  let loading = true;
  const acknowledged = new Map<string, string[]>(ids.map((id) => [id, []]));
  const senders = ids.map(async (id) => {
    for (let n = 0; loading; n++) {
      const content = JSON.stringify([{ say: `answer ${n} of ${id}` }]);
      // Until it is acknowledged, with one key: that is what a client may rely on.
      for (let done = false; !done;) {
        const answer = await troupe
          .api(`/v1/sessions/${id}/messages`, { json: { content }, headers: { "idempotency-key": `${id}-${n}` } })
          .catch(() => undefined);
        if (answer !== undefined && answer.status !== 202 && answer.status !== 503) throw new Error(`${answer.status}: ${await answer.text()}`);
        await answer?.body?.cancel();
        done = answer?.status === 202;
        if (!done) await later(50, undefined);
      }
      acknowledged.get(id)?.push(content);
    }
  });
  await later(700, undefined);
  const killed = await troupe.kill9("nats-server");
  await troupe.replaced(killed);
  const at_the_kill = [...acknowledged.values()].flat().length;
  expect(await until(() => [...acknowledged.values()].flat().length > at_the_kill + 20, 60_000, 20)).toBe(true);
  loading = false;
  await Promise.all(senders);

  const heard = hear(await turn.ended, 1);
  expect(heard).toMatchObject({ ...wholly(150), finished: heard.text });
  for (const id of ids) {
    const sent = acknowledged.get(id) ?? [];
    const idle = await until(async () => (await troupe.json<{ state: string }>(200, `/v1/sessions/${id}`)).state === "idle", 60_000, 100);
    expect(idle).toBe(true);
    const journal = await troupe.journal(`demo/session/${id}`);
    const received = entriesOf(journal).flatMap((entry) => (entry.t === "command" && entry.type === "message.send" ? [String(entry.body["content"])] : []));
    expect(received).toEqual(sent);
    expect(journal.flatMap(({ events }) => events).filter(({ type }) => type === "turn.completed")).toHaveLength(sent.length);
  }
  await verified();
});

test("Postgres killed: sessions run on meanwhile, and the projections catch up", async () => {
  await session("unprojected");
  const killed = await troupe.kill9("postgres");
  const turn = listen("unprojected", JSON.stringify([{ say: "without a database" }]));
  const heard = hear(await turn.ended, 1);
  expect(heard).toMatchObject({ finished: "without a database", faults: [] });
  await troupe.replaced(killed);
  const projected = async (): Promise<boolean> =>
    (await typed(troupe, ["usage", "--tenant", "demo", "--session", "unprojected", "--json"])).stdout.includes('"unprojected"');
  expect(await until(projected, 60_000, 100)).toBe(true);
  await verified();
});

test("kill -9 of up itself: the next start ends what was left and goes on with the data", async () => {
  await session("orphaned");
  const turn = listen("orphaned", slow(40, 20));
  await turn.heardTokens(5);
  const before = troupe.dev().processes.filter(({ role }) => role !== "up");
  sendSignal(troupe.pid, "SIGKILL");
  await later(300, undefined);
  await troupe.start();
  expect(await until(() => before.every(({ pid }) => !troupe.processes().includes(pid)), 60_000, 100)).toBe(true);
  const heard = hear(await turn.ended, 1);
  expect(heard).toMatchObject({ ...wholly(40), finished: heard.text });
  await verified();
});

test("at the end everything ends, though so much was killed", async () => {
  expect(await troupe.stop("SIGINT")).toBe(0);
});
