// Goal:   on the real thing a message waits for the turns it comes after, visibly; begins when they have completed, though the workers of both sessions are
//         killed meanwhile; is skipped by name with all that come after it when one fails; and what is not there, is another tenant's, or is later is refused by
//         the same code over HTTP and over NATS.
// Method: the real `up` with two workers, simulated models that take their time, kill -9.
import { beforeAll, expect, test, vi } from "vitest";
import type { ActorEvent } from "../../protocol/journal.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { eventually, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
let other_key: string;

const script = (...steps: object[]): string => JSON.stringify(steps);
const SLOW = script({ say: "one two three", tokens: 100, token_ms: 80 });
const QUICK = script({ say: "done" });

async function session(id: string, more: object = {}, key?: string): Promise<string> {
  await troupe.json(201, "/v1/sessions", {
    json: { id, agent: "assistant", overrides: { model: "simulated/script" }, ...more },
    ...(key === undefined ? {} : { key }),
  });
  return id;
}
/** Retried as a service does while a worker is being replaced. */
async function say(id: string, content: string, more: object = {}, key?: string): Promise<string> {
  const { message_id } = await troupe.json<{ message_id: string }>(202, `/v1/sessions/${id}/messages`, {
    json: { content, ...more },
    ...(key === undefined ? {} : { key }),
  });
  return message_id;
}
const refusal = async (id: string, body: object): Promise<{ status: number; code: string }> => {
  const answer = await troupe.api(`/v1/sessions/${id}/messages`, { json: body });
  return { status: answer.status, code: ((await answer.json()) as { code: string }).code };
};
const eventsOf = async (id: string): Promise<ActorEvent[]> => (await troupe.journal(`demo/session/${id}`)).flatMap(({ events }) => events);
const END = /^turn\.(completed|failed|cancelled)$/;
const endsOf = (id: string, count = 1): Promise<ActorEvent[]> =>
  eventually(
    async () => (await eventsOf(id)).filter(({ type }) => END.test(type)),
    (ends) => ends.length >= count,
  );
interface View {
  readonly state: string;
  readonly wait_reason: string | null;
  readonly waits_for: unknown;
  readonly worker: string;
}
const viewOf = (id: string): Promise<View> => troupe.json<View>(200, `/v1/sessions/${id}`);
const awaiting = (id: string): Promise<View> =>
  eventually(
    () => viewOf(id),
    ({ state, wait_reason }) => state === "awaiting_dependency" && wait_reason !== null,
  );
/** Where in EVENTS the first message lies that told this. */
async function placeOf(id: string, type: string): Promise<number> {
  for await (const { sequence, data } of (await troupe.bus()).read("EVENTS", `tenant.demo.session.${id}.event`, 1))
    if (new TextDecoder().decode(data).includes(`"type":"${type}"`)) return sequence;
  return Number.NaN;
}

beforeAll(async () => {
  troupe = await startTroupe({ workers: 2 });
  expect(await typed(troupe, ["tenants", "create", "other"])).toMatchObject({ code: 0 });
  other_key = (await typed(troupe, ["keys", "create", "--tenant", "other"])).stdout.trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script" });
  expect(await typed(troupe, ["agents", "put", "--tenant", "other", "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 120_000);

test("it waits visibly, and begins when its parents have completed though the workers of all of them were killed", async () => {
  for (const id of ["left", "right", "child"]) await session(id);
  const [left, right] = [await say("left", SLOW), await say("right", SLOW)];
  const after = [
    { session: "left", message: left },
    { session: "right", message: right },
  ];
  await say("child", QUICK, { after });
  const view = await awaiting("child");
  expect(view).toMatchObject({
    state: "awaiting_dependency",
    wait_reason: `waits for dependency: message ${left} of session left and 1 more`,
    waits_for: { for: "dependency" },
  });
  expect((await typed(troupe, ["explain", "demo/session/child"])).stdout).toContain("waits for dependency: message");
  expect((await typed(troupe, ["show", "demo/session/child"])).stdout).toContain("awaiting_dependency");

  await troupe.replaced(await troupe.kill9("worker", view.worker));
  await troupe.replaced(await troupe.kill9("worker", (await viewOf("left")).worker));
  expect(await endsOf("child")).toMatchObject([{ type: "turn.completed" }]);
  const began = await placeOf("child", "turn.started");
  for (const parent of ["left", "right"]) {
    expect((await endsOf(parent)).map(({ type }) => type)).toEqual(["turn.completed"]);
    expect(await placeOf(parent, "turn.completed")).toBeLessThan(began);
  }
  expect(await typed(troupe, ["verify", "--json"])).toMatchObject({ code: 0, stdout: expect.stringContaining('"violations":0') });
});

test("one that fails skips all that come after it, each naming its parent; what is finished and what has ended long ago can be named", async () => {
  await session("task", { mode: "single" });
  for (const id of ["next", "last", "glad"]) await session(id);
  const first = await say("task", script({ say: "a", tokens: 20, token_ms: 50 }, { fail: "provider_error" }));
  const second = await say("next", QUICK, { after: [{ session: "task", message: first }] });
  await say("last", QUICK, { after: [{ session: "next", message: second }] });
  expect(await endsOf("next")).toMatchObject([
    { type: "turn.failed", reason: "dependency_failed", details: { parent: { session: "task", message: first, end: "failed" } } },
  ]);
  expect(await endsOf("last")).toMatchObject([{ type: "turn.failed", reason: "dependency_failed", details: { parent: { session: "next", message: second } } }]);
  expect((await eventsOf("last")).some(({ type }) => type === "turn.started")).toBe(false);
  expect(
    (
      await eventually(
        () => viewOf("task"),
        ({ state }) => state === "terminated",
      )
    ).state,
  ).toBe("terminated");
  await say("glad", QUICK, { after: [{ session: "task", message: first }] });
  expect(await endsOf("glad")).toMatchObject([{ reason: "dependency_failed" }]);
  const good = await say("next", QUICK);
  expect(await endsOf("next", 2)).toMatchObject([{}, { type: "turn.completed" }]);
  await say("glad", QUICK, { after: [{ session: "next", message: good }] });
  expect(await endsOf("glad", 2)).toMatchObject([{}, { type: "turn.completed" }]);
});

test("what is not there, another tenant's, oneself and later ones are refused; the same over NATS; nothing of it begins to wait", async () => {
  await session("asker");
  await session("theirs", {}, other_key);
  const foreign = await say("theirs", QUICK, {}, other_key);
  const own = await say("asker", QUICK);
  await endsOf("asker");
  const unknown = { status: 422, code: "dependency_unknown" };
  expect(await refusal("asker", { content: QUICK, after: [{ session: "nobody", message: "m2" }] })).toEqual(unknown);
  expect(await refusal("asker", { content: QUICK, after: [{ session: "theirs", message: foreign }] })).toEqual(unknown);
  expect(
    await refusal("asker", {
      content: QUICK,
      after: [
        { session: "asker", message: own },
        { session: "asker", message: "m1" },
      ],
    }),
  ).toEqual(unknown);
  expect(await refusal("asker", { content: QUICK, after: [{ session: "asker", message: "m900" }] })).toEqual({ status: 422, code: "dependency_cycle" });
  const invalid = { status: 422, code: "invalid" };
  expect(await refusal("asker", { content: QUICK, after: [] })).toEqual(invalid);
  expect(await refusal("asker", { content: QUICK, after: [{ session: "asker", message: "3" }] })).toEqual(invalid);
  expect(await refusal("asker", { content: QUICK, after: Array.from({ length: 17 }, () => ({ session: "asker", message: own })) })).toEqual(invalid);
  expect(await refusal("asker", { content: QUICK, on_busy: "interrupt", after: [{ session: "asker", message: own }] })).toEqual(invalid);

  const bus = await troupe.bus();
  const overNats = async (type: string, body: object): Promise<Reply | undefined> => {
    const inbox = bus.inbox();
    const answer = new Promise<Reply | undefined>((resolve) => void bus.subscribe(inbox, ({ data }) => resolve(decodeReply(data))));
    await bus.flush();
    await bus.publish("tenant.demo.session.asker.command", new TextEncoder().encode(JSON.stringify({ type, body })), { headers: { "Troupe-Reply-To": inbox } });
    return Promise.race([answer, later(60_000, undefined)]);
  };
  expect(await overNats("message.send", { content: QUICK, after: [{ session: "nobody", message: "m2" }] })).toMatchObject({
    ok: false,
    error: { code: "dependency_unknown" },
  });
  expect(await overNats("dependency.told", { session: "asker", message: own }), "what sessions tell one another").toMatchObject({
    ok: false,
    error: { code: "forbidden" },
  });
  expect(await overNats("message.send", { content: QUICK, after: [{ session: "asker", message: own }] })).toMatchObject({ ok: true });
  expect(await endsOf("asker", 2)).toMatchObject([{}, { type: "turn.completed" }]);
});

test("typed at the command line, with a priority", async () => {
  await session("typed");
  const sent = await typed(troupe, ["send", "demo/session/typed", QUICK, "--priority", "high", "--wait"]);
  expect(sent).toMatchObject({ code: 0 });
  const [first] = (await eventsOf("typed")).filter(({ type }) => type === "message.received");
  const child = await typed(troupe, ["send", "demo/session/typed", QUICK, "--after", `typed/${String(first?.["message_id"])}`, "--wait"]);
  expect(child).toMatchObject({ code: 0 });
  const bodies = (await troupe.journal("demo/session/typed")).flatMap(({ entries }) => entries).flatMap((entry) => (entry.t === "command" ? [entry.body] : []));
  expect(bodies).toMatchObject([{ priority: "high" }, { after: [{ session: "typed", message: first?.["message_id"] }] }]);
  expect(await typed(troupe, ["send", "demo/session/typed", "x", "--after", "typed"])).toMatchObject({ code: 2 });
  expect(await typed(troupe, ["send", "demo/session/typed", "x", "--priority", "urgent"])).toMatchObject({ code: 2 });
});
