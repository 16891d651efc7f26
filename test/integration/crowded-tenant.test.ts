// Goal:   a tenant with ten thousand commands waiting in the stream is refused more where commands enter, over HTTP with 503 and a time, on the bus by having no
//         permission to publish; another tenant's are stored and decided meanwhile; and when the ten thousand are decided, the first is taken again.
// Method: the real `up`, its workers stopped by SIGSTOP so that nothing is decided, and clients of two tenants, one of them the npm client `nats`.
import { connect, type NatsConnection } from "nats";
import { beforeAll, expect, test, vi } from "vitest";
import { sendSignal } from "../../deploy/local/server-process.ts";
import { decodeReply } from "../../protocol/reply.ts";
import { eventually, later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 180_000 });

let troupe: Troupe;
let other_key: string;

const bytes = (type: string, body: object): Uint8Array => new TextEncoder().encode(JSON.stringify({ type, body }));
const workers = (): number[] =>
  troupe
    .dev()
    .processes.filter(({ role }) => role === "worker")
    .map(({ pid }) => pid);
/** Is a command of this client's stored? */
async function stores(client: NatsConnection, subject: string): Promise<boolean> {
  try {
    const ack = await client.request(subject, bytes("session.create", { agent: "assistant" }), { timeout: 2_000 });
    return ack.string().includes('"stream":"COMMANDS"');
  } catch {
    return false; // refused by its permissions, or on its way back onto the bus
  }
}
const send = (session: string, key?: string): Promise<Response> =>
  troupe.api(`/v1/sessions/${session}/messages`, { json: { content: "hello" }, ...(key === undefined ? {} : { key }) });

beforeAll(async () => {
  troupe = await startTroupe({ workers: 2, env: { TROUPE_TENANT_COMMANDS_STORED_MAX: "10000", TROUPE_TENANT_COMMANDS_WAITING_MAX: "100000" } });
  expect(await typed(troupe, ["tenants", "create", "other"])).toMatchObject({ code: 0 });
  other_key = (await typed(troupe, ["keys", "create", "--tenant", "other"])).stdout.trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/echo" });
  for (const tenant of ["demo", "other"]) expect(await typed(troupe, ["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
  await troupe.json(201, "/v1/sessions", { json: { id: "s1", agent: "assistant" } });
  await troupe.json(201, "/v1/sessions", { json: { id: "s1", agent: "assistant" }, key: other_key });
}, 120_000);

test("ten thousand waiting commands of one tenant close the door to it, and to nobody else", async () => {
  const bus = await troupe.bus();
  const { nats_url } = troupe.dev();
  const mine = await connect({ servers: nats_url, token: troupe.key, inboxPrefix: "_INBOX_demo", reconnectTimeWait: 200, maxReconnectAttempts: -1 });
  const theirs = await connect({ servers: nats_url, token: other_key, inboxPrefix: "_INBOX_other", reconnectTimeWait: 200, maxReconnectAttempts: -1 });
  expect(await stores(mine, "tenant.demo.session.before.command")).toBe(true);

  const stopped = workers();
  expect(stopped).toHaveLength(2);
  for (const pid of stopped) sendSignal(pid, "SIGSTOP");
  const decided = bus.inbox();
  let replies = 0;
  bus.subscribe(decided, ({ data }) => void (decodeReply(data) === undefined ? 0 : (replies += 1)));
  let published = 0;
  const flood = async (): Promise<void> => {
    for (let n = published++; n < 10_000; n = published++) {
      const outcome = await bus.publish(`tenant.demo.session.flood${n % 500}.command`, bytes("session.create", { agent: "assistant" }), {
        headers: { "Troupe-Reply-To": decided },
      });
      if (outcome.kind !== "stored") throw new Error(outcome.kind);
    }
  };
  await Promise.all(Array.from({ length: 400 }, flood));

  // The door of the gateway, and the bus.
  const refused = await eventually(
    () => send("s1"),
    ({ status, headers }) => status === 503 && headers.get("retry-after") === "2",
  );
  expect(refused.status).toBe(503);
  expect(await refused.json()).toMatchObject({
    code: "overloaded",
    details: { waits_for: "stream", waiting: expect.toSatisfy((waiting: number) => waiting >= 8_000) },
  });
  expect(refused.headers.get("retry-after")).toBe("2");
  expect(
    await eventually(
      () => stores(mine, "tenant.demo.session.during.command"),
      (stored) => !stored,
    ),
    "its client may publish no more",
  ).toBe(false);
  expect((await bus.bounds("COMMANDS")).messages).toBeGreaterThanOrEqual(10_000);

  // The other tenant gets through: stored now, and decided as soon as anybody decides.
  const answers = theirs.subscribe("_INBOX_other.answers", { max: 1 });
  const answered = (async () => {
    for await (const message of answers) return decodeReply(message.data);
    return undefined;
  })();
  const { headers } = await import("nats");
  const said = headers();
  said.set("Troupe-Reply-To", "_INBOX_other.answers");
  const ack = await theirs.request("tenant.other.session.s2.command", bytes("session.create", { agent: "assistant" }), { timeout: 30_000, headers: said });
  expect(ack.string()).toContain('"stream":"COMMANDS"');
  expect(replies, "nothing of the ten thousand is decided").toBe(0);

  for (const pid of stopped) sendSignal(pid, "SIGCONT");
  const began_ms = performance.now();
  expect(await Promise.race([answered, later(60_000, undefined)])).toMatchObject({ ok: true });
  const waited_ms = performance.now() - began_ms;
  const before = replies;
  expect(
    await eventually(
      () => send("s1", other_key),
      ({ status }) => status === 202,
    ),
  ).toMatchObject({ status: 202 });
  console.log(`the other tenant's command was decided ${waited_ms.toFixed(0)} ms after the workers went on, beside ${before} of 10,000`);

  // None of the ten thousand is lost, and the door opens again.
  expect(
    await eventually(
      async () => (await bus.counts("COMMANDS", "shard.*.tenant.demo.>")).length,
      (left) => left === 0,
      90_000,
    ),
  ).toBe(0);
  const made = (await bus.last_of_each("EVENTS", "tenant.demo.session.*.event")).filter(({ subject }) => subject.includes(".flood"));
  expect(made).toHaveLength(500);
  expect(
    await eventually(
      () => send("s1"),
      ({ status }) => status === 202,
    ),
  ).toMatchObject({ status: 202 });
  expect(await eventually(() => stores(mine, "tenant.demo.session.after.command"), Boolean)).toBe(true);
  await Promise.all([mine.close(), theirs.close()]);
});
