// Goal:   a service that knows nothing but NATS and WIRE does everything over subjects, and nothing that is not its tenant's.
// Method: the older npm client `nats` 2.29 with the users of dev.json, against the real `up`. Nothing of ours is used to speak or to listen.
import { connect, headers, JSONCodec, type JsMsg, type Msg, type NatsConnection, StringCodec } from "nats";
import { pack, unpack } from "msgpackr";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

interface ServiceReply {
  readonly ok: boolean;
  readonly actor: string;
  readonly seq?: number;
  readonly state?: string;
  readonly result?: { readonly [name: string]: unknown };
  readonly error?: { readonly code: string; readonly message: string; readonly details?: { readonly [name: string]: unknown } };
}
interface LiveEvent {
  readonly subject: string;
  readonly sequence: number;
  readonly previous: number;
  readonly message: { readonly seq: number; readonly state: string; readonly events: readonly { readonly type: string; readonly content?: string }[] };
}
interface LiveToken {
  readonly turn: number;
  readonly step: number;
  readonly attempt: number;
  readonly index: number;
  readonly text: string;
  readonly end?: boolean;
}

const REPLY_PATIENCE_MS = 60_000;
const json = JSONCodec();
const text = StringCodec();
/** Others may be at work on the machine; what is waited for is bounded one by one. */
vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
let demo: NatsConnection;

beforeAll(async () => {
  troupe = await startTroupe();
  demo = await asTenant("demo");
}, 120_000);
afterAll(async () => {
  await demo?.close();
});

async function asTenant(tenant: string): Promise<NatsConnection> {
  const { nats_url, tenants } = troupe.dev();
  const login = tenants.find(({ id }) => id === tenant)?.nats;
  return connect({ servers: nats_url, user: login?.user ?? "", pass: login?.password ?? "", inboxPrefix: `_INBOX_${tenant}` });
}
async function asOperator(): Promise<NatsConnection> {
  const { nats_url, nats_operator } = troupe.dev();
  return connect({ servers: nats_url, user: nats_operator.user, pass: nats_operator.password });
}

let asked = 0;
/** Publishes a command as WIRE says, and reads the one reply. */
async function command(
  connection: NatsConnection,
  subject: string,
  data: Uint8Array,
  { tenant = "demo", inbox = `_INBOX_${tenant}.replies.${asked++}`, ...extra }: { tenant?: string; inbox?: string; key?: string; content_type?: string } = {},
): Promise<ServiceReply> {
  const subscription = connection.subscribe(inbox, { max: 1 });
  const reply = (async () => {
    for await (const message of subscription) return json.decode(message.data) as ServiceReply;
    return undefined;
  })();
  const head = headers();
  head.set("Troupe-Reply-To", inbox);
  if (extra.key !== undefined) head.set("Idempotency-Key", extra.key);
  if (extra.content_type !== undefined) head.set("Content-Type", extra.content_type);
  const stored = await connection.jetstream().publish(subject, data, { headers: head });
  expect(stored).toMatchObject({ stream: "COMMANDS", duplicate: false });
  const heard = await Promise.race([reply, later(REPLY_PATIENCE_MS, undefined)]);
  subscription.unsubscribe();
  if (heard === undefined) throw new Error(`no reply to ${subject} within ${REPLY_PATIENCE_MS} ms`);
  return heard;
}
const say = (id: string, type: string, body: object, extra: { key?: string } = {}): Promise<ServiceReply> =>
  command(demo, `tenant.demo.session.${id}.command`, json.encode({ type, body }), extra);

/** Listens as a service does: what the streams stored. */
function listen(connection: NatsConnection, id: string): { events: LiveEvent[]; tokens: LiveToken[]; ended(): Promise<boolean>; stop(): void } {
  const events: LiveEvent[] = [];
  const tokens: LiveToken[] = [];
  const heard = connection.subscribe(`live.tenant.demo.session.${id}.event`, {
    callback(_error, message: Msg) {
      events.push({
        subject: message.subject,
        sequence: Number(message.headers?.get("Nats-Sequence")),
        previous: Number(message.headers?.get("Nats-Last-Sequence")),
        message: json.decode(message.data) as LiveEvent["message"],
      });
    },
  });
  const said = connection.subscribe(`live.tenant.demo.session.${id}.token`, {
    callback: (_error, message: Msg) => void tokens.push(json.decode(message.data) as LiveToken),
  });
  return {
    events,
    tokens,
    ended: () => until(() => events.some(({ message }) => message.events.some(({ type }) => type === "turn.completed")), REPLY_PATIENCE_MS),
    stop() {
      heard.unsubscribe();
      said.unsubscribe();
    },
  };
}

/** History as WIRE §1 gives it: message after message, the last one empty. */
async function history(question: object): Promise<{ sequence: number; data: unknown }[]> {
  const inbox = `_INBOX_demo.history.${asked++}`;
  const subscription = demo.subscribe(inbox);
  demo.publish("tenant.demo.replay", json.encode(question), { reply: inbox });
  const found: { sequence: number; data: unknown }[] = [];
  for await (const message of subscription) {
    if (message.headers?.get("Troupe-Error")) throw new Error(text.decode(message.data));
    if (message.headers?.get("Troupe-Done") === "true") break;
    found.push({ sequence: Number(message.headers?.get("Nats-Sequence")), data: json.decode(message.data) });
  }
  subscription.unsubscribe();
  return found;
}

test("a service creates a session and sends a message by publishing JSON, and hears reply, events and tokens", async () => {
  const live = listen(demo, "svc");
  await demo.flush();
  expect(await say("svc", "session.create", { agent: "assistant" })).toMatchObject({ ok: true, actor: "demo/session/svc", result: { created: true } });
  expect(await say("svc", "message.send", { content: "alpha beta gamma" })).toMatchObject({
    ok: true,
    state: "thinking",
    result: { turn: 1, message_id: expect.any(String) },
  });
  expect(await live.ended()).toBe(true);
  live.stop();

  // The live tail is the journal: in order, each naming the one before it, so that a gap would show itself.
  const sequences = live.events.map(({ sequence }) => sequence);
  expect(sequences).toEqual([...sequences].sort((a, b) => a - b));
  expect(live.events.slice(1).map(({ previous }) => previous)).toEqual(sequences.slice(0, -1));
  const finished = live.events.flatMap(({ message }) => message.events).find(({ type }) => type === "message.completed");
  expect(finished?.content).toBe("alpha beta gamma");
  expect(live.tokens.map(({ index }) => index)).toEqual(live.tokens.map((_, index) => index));
  expect(live.tokens.map((token) => token.text).join("")).toBe("alpha beta gamma");
  expect(live.tokens.at(-1)?.end).toBe(true);

  const events = await history({ kind: "session", id: "svc", channel: "event" });
  expect(events).toEqual(live.events.map(({ sequence, message }) => ({ sequence, data: message })));
  expect((await history({ kind: "session", id: "svc", channel: "token" })).map(({ data }) => data)).toEqual(live.tokens);
  const [first] = events;
  expect(await history({ kind: "session", id: "svc", channel: "event", from_sequence: (first?.sequence ?? 0) + 1, limit: 1 })).toEqual(events.slice(1, 2));
});

test("a body in msgpack says the same as one in JSON", async () => {
  const content_type = "application/msgpack";
  const subject = "tenant.demo.session.packed.command";
  expect(await command(demo, subject, pack({ type: "session.create", body: { agent: "assistant" } }), { content_type })).toMatchObject({ ok: true });
  const live = listen(demo, "packed");
  expect(await command(demo, subject, pack({ type: "message.send", body: { content: "grüße, 世界" } }), { content_type })).toMatchObject({ ok: true });
  expect(await live.ended()).toBe(true);
  live.stop();
  expect(live.tokens.map((token) => token.text).join("")).toBe("grüße, 世界");
  // Said to be JSON, it is not readable; said again as what it is, it is.
  const bytes = pack({ type: "message.send", body: { content: "again" } });
  expect((unpack(bytes) as { type: string }).type).toBe("message.send");
  expect(await command(demo, subject, bytes)).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await command(demo, subject, bytes, { content_type })).toMatchObject({ ok: true });
});

test("a repeat of the same Idempotency-Key is answered with the first outcome and done once", async () => {
  await say("keyed", "session.create", { agent: "assistant" });
  const first = await say("keyed", "message.send", { content: "once" }, { key: "order-1" });
  const { ok, actor, seq, state, result } = first;
  expect(ok).toBe(true);
  expect(await say("keyed", "message.send", { content: "once" }, { key: "order-1" })).toMatchObject({ ok, actor, seq, state, result });
  expect(await say("keyed", "message.send", { content: "twice" }, { key: "order-1" })).toMatchObject({ ok: false, error: { code: "conflict" } });
  expect(await say("keyed", "message.send", { content: "once" }, { key: "order-2" })).toMatchObject({ ok: true, result: { turn: 2 } });
  const accepted = (await troupe.journal("demo/session/keyed"))
    .flatMap(({ entries }) => entries)
    .filter((entry) => entry.t === "command" && entry.type === "message.send");
  expect(accepted).toHaveLength(2);
});

test("creating again with the same body answers with what is there, with another body it is a conflict", async () => {
  expect(await say("twice", "session.create", { agent: "assistant", user: "u1" })).toMatchObject({ ok: true, result: { created: true } });
  expect(await say("twice", "session.create", { agent: "assistant", user: "u1" })).toMatchObject({ ok: true, result: { created: false } });
  expect(await say("twice", "session.create", { agent: "assistant", user: "u2" })).toMatchObject({ ok: false, error: { code: "conflict" } });
});

test("a tenant's user is refused everything that is not its own", async () => {
  await typed(troupe, ["tenants", "create", "acme"]);
  expect(await until(() => troupe.dev().tenants.some(({ id }) => id === "acme"), 60_000)).toBe(true);
  const before = (await troupe.journal("demo/session/svc")).length;
  const stranger = await asTenant("demo");
  const refusals: string[] = [];
  void (async () => {
    for await (const status of stranger.status())
      if (status.type === "error") refusals.push(`${status.permissionContext?.operation} ${status.permissionContext?.subject}`);
  })();
  const forbidden = [
    "tenant.acme.session.s1.command",
    "tenant.acme.replay",
    "tenant.demo.session.svc.event",
    "tenant.demo.session.svc.control",
    "tenant.demo.session.svc.token",
    "tenant.demo.tenant.main.control",
    "tenant.demo.budget.main.control",
    "live.tenant.demo.session.svc.event",
    "_INBOX_acme.x",
    "$JS.API.STREAM.INFO.EVENTS",
    "$JS.API.CONSUMER.CREATE.EVENTS",
    "system.worker.w1.v1.status",
    "shard.0.tenant.demo.session.svc.command",
    "timer.demo.session.svc",
  ];
  for (const subject of forbidden) stranger.publish(subject, json.encode({ type: "session.terminate", body: {} }));
  const unheard = [">", "tenant.>", "live.>", "live.tenant.acme.>", "tenant.demo.session.*.command", "_INBOX.>", "_INBOX_acme.>", "$SYS.>"];
  for (const subject of unheard) stranger.subscribe(subject, { callback: () => undefined });
  await stranger.flush();
  expect(await until(() => refusals.length === forbidden.length + unheard.length, 60_000)).toBe(true);
  expect(refusals).toEqual([...forbidden.map((subject) => `publish ${subject}`), ...unheard.map((subject) => `subscription ${subject}`)]);
  await stranger.close();
  expect(await troupe.journal("demo/session/svc")).toHaveLength(before);
  expect(await troupe.journal("acme/session/s1")).toEqual([]);
});

test("a reply subject or a history that is another's is refused", async () => {
  await say("mine", "session.create", { agent: "assistant" });
  const operator = await asOperator();
  const heard: Msg[] = [];
  operator.subscribe("_INBOX_acme.>", { callback: (_error, message) => void heard.push(message) });
  await operator.flush();
  const head = headers();
  head.set("Troupe-Reply-To", "_INBOX_acme.stolen");
  await demo.jetstream().publish("tenant.demo.session.mine.command", json.encode({ type: "message.send", body: { content: "x" } }), { headers: head });
  // Commands are decided in order: the next one's reply says that the one before was decided.
  expect(await say("mine", "message.send", { content: "y" })).toMatchObject({ ok: true, result: { turn: 1 } });
  demo.publish("tenant.demo.replay", json.encode({ kind: "session", id: "mine", channel: "event" }), { reply: "_INBOX_acme.stolen" });
  await expect(history({ kind: "tenant", id: "main", channel: "event" })).rejects.toThrow(/invalid/);
  await operator.flush();
  expect(heard).toEqual([]);
  const refused = (await troupe.journal("demo/session/mine")).flatMap(({ entries }) => entries).filter((entry) => entry.t === "refused");
  expect(refused).toMatchObject([{ error: { code: "forbidden" } }]);
  await operator.close();
});

test("what the broker does with headers of its own gives a tenant no power over what is stored", async () => {
  await say("heads", "session.create", { agent: "assistant" });
  const subject = "tenant.demo.session.heads.command";
  for (const [name, value] of [
    ["Nats-Rollup", "all"],
    ["Nats-Schedule", "@at 2030-01-01T00:00:00Z"],
    ["Nats-TTL", "1"],
  ] as const) {
    const head = headers();
    head.set(name, value);
    await expect(demo.jetstream().publish(subject, json.encode({ type: "message.send", body: { content: name } }), { headers: head })).rejects.toThrow(/.+/);
  }
  // The same message id in two sessions is two commands.
  await say("heads2", "session.create", { agent: "assistant" });
  for (const id of ["heads", "heads2"]) {
    const live = listen(demo, id);
    await demo.flush();
    await demo.jetstream().publish(`tenant.demo.session.${id}.command`, json.encode({ type: "message.send", body: { content: "both" } }), { msgID: `m-${id}` });
    expect(await live.ended()).toBe(true);
    live.stop();
  }
  expect(await say("heads", "message.send", { content: "well" })).toMatchObject({ ok: true, result: { turn: 2 } });
});

test("an operator's user reads the journals with JetStream itself and speaks where only the runtime may", async () => {
  const operator = await asOperator();
  const inbox = `_INBOX.services.${asked++}`;
  const config = { model: "simulated/echo", instructions: "Short." };
  const put = await command(operator, "tenant.demo.tenant.main.control", json.encode({ type: "agent.put", body: { agent: "second", config } }), { inbox });
  expect(put).toMatchObject({ ok: true, actor: "demo/tenant/main" });
  expect(await say("by-second", "session.create", { agent: "second" })).toMatchObject({ ok: true });
  // A tenant's own key in front of the same command does nothing: the subject is not its to publish on, and the command is not a session's.
  expect(await say("by-second", "agent.put", { agent: "third", config })).toMatchObject({ ok: false, error: { code: "invalid" } });
  expect(await say("by-second", "session.unpark", {})).toMatchObject({ ok: false, error: { code: "forbidden" } });

  const consumer = await operator.jetstream().consumers.get("EVENTS", { filterSubjects: "tenant.demo.session.svc.event" });
  const stored: JsMsg[] = [];
  for await (const message of await consumer.fetch({ max_messages: 100, expires: 30_000 })) {
    stored.push(message);
    if (message.info.pending === 0) break;
  }
  expect(stored.map(({ seq }) => seq)).toEqual((await history({ kind: "session", id: "svc", channel: "event" })).map(({ sequence }) => sequence));
  await operator.close();
});

test("a tenant's key opens the bus as a token, for that tenant alone, and a key of nobody opens nothing", async () => {
  const servers = troupe.dev().nats_url;
  const keyed = await connect({ servers, token: troupe.key, inboxPrefix: "_INBOX_demo" });
  const subject = "tenant.demo.session.by-token.command";
  expect(await command(keyed, subject, json.encode({ type: "session.create", body: { agent: "assistant" } }))).toMatchObject({
    ok: true,
    actor: "demo/session/by-token",
  });
  await expect(
    keyed.jetstream().publish("tenant.acme.session.s1.command", json.encode({ type: "session.create", body: {} }), { timeout: 1_000 }),
  ).rejects.toThrow(/.+/);
  await keyed.close();
  for (const token of [`${troupe.key}x`, "troupe.nobody.abcdef012345.c2VjcmV0", ""])
    await expect(connect({ servers, token, reconnect: false })).rejects.toThrow(/authorization/i);
});

test("nothing of all this breaks a promise", async () => {
  const verified = await typed(troupe, ["verify", "--json"]);
  expect(verified.stdout).toContain('"violations":0');
  expect(verified.code).toBe(0);
});
