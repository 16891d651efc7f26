// Goal:   with a tenant's credential and a plain client of NATS nothing of another tenant's, of the runtime's or of the broker's can be reached,
//         changed or heard, whatever a message says; and the operator sees who tried.
// Method: the whole of Troupe, two tenants that are twins, the client that services have (nats 2.x); before and after each attack everything
//         that is stored is looked at, and everything that the other tenant and the runtime hear is collected.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { connect, headers, type Msg, type NatsConnection, StringCodec } from "nats";
import pg from "pg";
import { beforeAll, describe, expect, test } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import type { StreamName } from "../../bus/port.ts";
import { typed } from "../harness/typed-command.ts";
import { canaryOf, SESSION, startTwoTenants, type TwoTenants } from "./two-tenants.ts";

const text = StringCodec();
let ground: TwoTenants;
let acme: NatsConnection;
let rival: NatsConnection;
/** All that the rival's client hears that it did not ask for. */
const heard_by_rival: string[] = [];

beforeAll(async () => {
  ground = await startTwoTenants();
  acme = await ground.client(ground.keys.acme, "acme");
  rival = await ground.client(ground.keys.rival, "rival");
  for (const subject of ["_INBOX_rival.>", "live.tenant.rival.>"])
    rival.subscribe(subject, { callback: (_error, message) => void heard_by_rival.push(`${message.subject} ${text.decode(message.data)}`) });
  await rival.flush();
}, 120_000);

const bytes = (value: unknown): Uint8Array => text.encode(JSON.stringify(value));
const pauseMs = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

/** What the broker said of a publish: an answer, or the refusal. */
async function ask(
  connection: NatsConnection,
  subject: string,
  data: Uint8Array,
  more: Record<string, string> = {},
  patience_ms = 20_000,
): Promise<{ answer?: string; refused?: string }> {
  const head = headers();
  for (const [name, value] of Object.entries(more)) head.set(name, value);
  try {
    return { answer: text.decode((await connection.request(subject, data, { timeout: patience_ms, headers: head })).data) };
  } catch (error) {
    return { refused: error instanceof Error ? error.message : String(error) };
  }
}

/** How many messages each subject of others has, but for what the runtime by itself does with actors that fell idle. More than before is a break-in. */
async function storedOfOthers(): Promise<Record<string, number>> {
  const bus = await ground.troupe.bus();
  const found: Record<string, number> = {};
  for (const stream of ["COMMANDS", "EVENTS", "TIMERS", "TOKENS"] as StreamName[])
    for await (const { subject } of bus.read(stream, ">", 1)) {
      const name = `${stream} ${subject}`;
      if (!/tenant\.acme\.|TIMERS timer\./.test(name)) found[name] = (found[name] ?? 0) + 1;
    }
  return found;
}

/** What the rival heard since it was last asked; and it was there to hear, for a word of the runtime's own came through. */
async function heardByRival(): Promise<string[]> {
  const bus = await ground.troupe.bus();
  bus.send("reply._INBOX_rival.still-here", text.encode("?"));
  expect(await until(() => heard_by_rival.includes("_INBOX_rival.still-here ?"), 30_000)).toBe(true);
  return heard_by_rival.splice(0).filter((one) => !one.startsWith("_INBOX_rival.still-here"));
}

const COMMAND = `tenant.acme.session.${SESSION}.command`;
const pause_of = (n: number): Uint8Array => bytes({ type: "turn.cancel", body: { reason: `attack ${n}` } });

describe("the way in", () => {
  test("a key opens the bus as token and as password of any user, and a command by plain JetStream publish is acknowledged and decided", async () => {
    for (const as of ["token", "password"] as const) {
      const client = await ground.client(ground.keys.acme, "acme", { as });
      const reply = new Promise<string>((resolve) =>
        client.subscribe(`_INBOX_acme.decided.${as}`, { max: 1, callback: (_error, message) => resolve(text.decode(message.data)) }),
      );
      const head = headers();
      head.set("Troupe-Reply-To", `_INBOX_acme.decided.${as}`);
      const ack = await client
        .jetstream()
        .publish(`tenant.acme.session.by-${as}.command`, bytes({ type: "session.create", body: { agent: "assistant" } }), { headers: head });
      expect(ack).toMatchObject({ stream: "COMMANDS", seq: expect.any(Number) });
      expect(JSON.parse(await reply)).toMatchObject({ ok: true, actor: `acme/session/by-${as}`, result: { created: true } });
    }
  });

  test("the logins of dev.json are placed and bound alike", async () => {
    const { nats_url, tenants } = ground.troupe.dev();
    const login = tenants.find(({ id }) => id === "demo")?.nats;
    const stand_in = await connect({ servers: nats_url, user: login?.user ?? "", pass: login?.password ?? "", inboxPrefix: "_INBOX_demo", reconnect: false });
    expect(await ask(stand_in, "tenant.demo.session.x.command", bytes({ type: "turn.cancel", body: {} }))).toMatchObject({
      answer: expect.stringContaining("COMMANDS"),
    });
    expect((await ask(stand_in, COMMAND, pause_of(0))).refused).toMatch(/permission/i);
    await stand_in.close();
    const stranger = connect({ servers: nats_url, user: "tenant-acme", pass: login?.password ?? "", reconnect: false });
    await expect(stranger).rejects.toThrow(/authorization/i);
  });

  test.each([
    ["no credential", {}],
    ["a word", { token: "nonsense" }],
    ["a key that was never made", { token: `troupe.acme.000000000000.${"A".repeat(43)}` }],
    ["another tenant's name before one's own secret", { token: "rename" }],
    ["the runtime's name", { user: "runtime", pass: "guess" }],
    ["the authenticator's name", { user: "authenticator", pass: "guess" }],
  ])("refused by the broker, and told to the operator: %s", async (_, shown: { token?: string; user?: string; pass?: string }) => {
    const token = shown.token === "rename" ? ground.keys.rival.replace(".rival.", ".acme.") : shown.token;
    await expect(connect({ servers: ground.troupe.dev().nats_url, ...shown, ...(token === undefined ? {} : { token }), reconnect: false })).rejects.toThrow(
      /authorization/i,
    );
  });

  test("who was refused stands in the gateway's metrics and the broker's log, without what they showed", async () => {
    const metrics = await (await ground.troupe.api("/metrics", { key: null })).text();
    expect(metrics).toMatch(/troupe_nats_logins_total\{[^}]*outcome="unauthenticated"[^}]*\} [1-9]/);
    const log = readFileSync(join(ground.troupe.home, "nats", "nats-server.log"), "utf8");
    expect(log).toMatch(/authentication error/);
    expect(log).not.toContain("A".repeat(43));
    expect(log).not.toContain(ground.keys.acme);
  });
});

describe("what the broker itself refuses a tenant", () => {
  const FOREIGN_PUBLISH = [
    `tenant.rival.session.${SESSION}.command`,
    `tenant.rival.replay`,
    `tenant.acme.session.${SESSION}.control`,
    `tenant.acme.session.${SESSION}.edge`,
    `tenant.rival.session.${SESSION}.edge`,
    `tenant.acme.session.${SESSION}.event`,
    `tenant.acme.session.${SESSION}.token`,
    `tenant.acme.session.${SESSION}.snapshot`,
    "tenant.acme.budget.main.command",
    "tenant.acme.budget.main.control",
    "tenant.acme.tenant.main.control",
    "tenant.system.worker.w1.control",
    `live.tenant.rival.session.${SESSION}.event`,
    `live.tenant.acme.session.${SESSION}.event`,
    "_INBOX_rival.x",
    "_INBOX.x",
    "reply._INBOX_rival.x",
    "system.shard.0.command",
    "shard.0.tenant.rival.session.x.command",
    `timer.acme.session.${SESSION}`,
    "due.tenant.rival.session.x",
    `resident.0.rival.session.${SESSION}`,
    "$KV.EDGE.0",
    "$KV.LEADER.leader",
    "$SYS.REQ.USER.AUTH",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.INFO.EVENTS",
    "$JS.API.STREAM.PURGE.COMMANDS",
    "$JS.API.STREAM.DELETE.EVENTS",
    "$JS.API.STREAM.MSG.GET.EVENTS",
    "$JS.API.STREAM.CREATE.MINE",
    `$JS.API.DIRECT.GET.EVENTS.tenant.rival.session.${SESSION}.event`,
    "$JS.API.DIRECT.GET.EVENTS",
    "$JS.API.CONSUMER.CREATE.EVENTS",
    "$JS.API.CONSUMER.DURABLE.CREATE.EVENTS.mine",
    "$JS.API.CONSUMER.MSG.NEXT.COMMANDS.shard-0",
    "$JS.API.CONSUMER.LIST.COMMANDS",
    "$JS.ACK.COMMANDS.shard-0.1.1.1.1.1",
  ];
  test.each(FOREIGN_PUBLISH)("publishing to %s", async (subject) => {
    expect((await ask(acme, subject, bytes({ type: "turn.cancel", body: {} }))).refused).toMatch(/permission/i);
  });

  const FOREIGN_SUBSCRIBE = [
    ">",
    "*",
    "tenant.>",
    "tenant.acme.>",
    "live.>",
    "live.tenant.>",
    "live.tenant.rival.>",
    "live.tenant.*.session.>",
    "_INBOX.>",
    "_INBOX_rival.>",
    "reply.>",
    "$JS.API.>",
    "$JS.EVENT.>",
    "$SYS.>",
    "$KV.>",
    "system.>",
    "shard.>",
  ];
  test.each(FOREIGN_SUBSCRIBE)("listening to %s", async (subject) => {
    const refused = new Promise<string>((resolve) => {
      acme.subscribe(subject, { callback: (error, message) => resolve(error === null ? `heard ${message.subject}` : error.message) });
    });
    await acme.flush();
    expect(await Promise.race([refused, pauseMs(30_000).then(() => "nothing")])).toMatch(/permission/i);
  });

  test("JetStream itself, as the client's own manager speaks to it", async () => {
    const manager = await acme.jetstreamManager({ checkAPI: false, timeout: 400 });
    const attempts: readonly (() => Promise<unknown>)[] = [
      () => manager.streams.info("EVENTS"),
      () => manager.streams.purge("COMMANDS"),
      () => manager.streams.getMessage("EVENTS", { last_by_subj: `tenant.rival.session.${SESSION}.event` }),
      () => manager.consumers.add("EVENTS", { durable_name: "mine", filter_subject: "tenant.rival.>" }),
      () => manager.consumers.info("COMMANDS", "shard-0"),
    ];
    for (const attempt of attempts) await expect(attempt()).rejects.toThrow(/permission|timeout|503/i);
  });

  test("each attempt stands in the broker's log with who made it and where it was aimed", async () => {
    const log = readFileSync(join(ground.troupe.home, "nats", "nats-server.log"), "utf8");
    for (const subject of [...FOREIGN_PUBLISH, ...FOREIGN_SUBSCRIBE].filter((one) => !one.startsWith("$JS.ACK")))
      expect(log).toMatch(new RegExp(`EDGE_\\d+/user:key:.*Violation.*"${subject.replace(/[.$*>]/g, "\\$&")}"`));
  });

  test("a wide subscription to one's own live subjects does not bring the tenant's own actor, whose journal has keys in it", async () => {
    const heard: string[] = [];
    const mine = acme.subscribe("live.tenant.acme.>", { callback: (_error, message) => void heard.push(message.subject) });
    const admin = await ground.client((await ground.key("acme", { scopes: ["admin"] })).key, "acme");
    const by_admin: string[] = [];
    admin.subscribe("live.tenant.acme.>", { callback: (_error, message) => void by_admin.push(message.subject) });
    await Promise.all([acme.flush(), admin.flush()]);
    await ground.key("acme");
    await acme.jetstream().publish(COMMAND, bytes({ type: "session.hibernate", body: {} }));
    await until(() => heard.length > 0 && by_admin.length > 1, 30_000);
    mine.unsubscribe();
    expect(new Set(heard)).toEqual(new Set([`live.tenant.acme.session.${SESSION}.event`]));
    expect(by_admin).toContain("live.tenant.acme.tenant.main.event");
  });
});

describe("what a message says gives no power over what is another's", () => {
  const soon = (): string => new Date(Date.now() + 300).toISOString();
  const WEAPONS: readonly [string, (n: number) => Record<string, string>][] = [
    [
      "a schedule aimed at the rival's command",
      () => ({ "Nats-Schedule": `@at ${soon()}`, "Nats-Schedule-Target": `tenant.rival.session.${SESSION}.command` }),
    ],
    ["a schedule aimed at the rival's journal", () => ({ "Nats-Schedule": `@at ${soon()}`, "Nats-Schedule-Target": `tenant.rival.session.${SESSION}.event` })],
    ["a repeating schedule", () => ({ "Nats-Schedule": "@every 1s", "Nats-Schedule-Target": COMMAND, "Nats-Schedule-TTL": "1s" })],
    ["rollup of all", () => ({ "Nats-Rollup": "all" })],
    ["rollup of the subject", () => ({ "Nats-Rollup": "sub" })],
    ["a batch", (n) => ({ "Nats-Batch-Id": `b${n}`, "Nats-Batch-Sequence": "1" })],
    ["a batch that commits", (n) => ({ "Nats-Batch-Id": `c${n}`, "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1" })],
    ["a time to live", () => ({ "Nats-TTL": "1s" })],
    ["a counter", () => ({ "Nats-Incr": "+1" })],
    [
      "an expected last sequence on the rival's subject",
      () => ({ "Nats-Expected-Last-Subject-Sequence": "1", "Nats-Expected-Last-Subject-Sequence-Subject": `tenant.rival.session.${SESSION}.event` }),
    ],
    ["an expected stream", () => ({ "Nats-Expected-Stream": "EVENTS" })],
    ["a marker of deletion", () => ({ "Nats-Marker-Reason": "Purge", "KV-Operation": "PURGE" })],
    ["a trace sent to the rival's inbox", () => ({ "Nats-Trace-Dest": "_INBOX_rival.trace" })],
    ["a trace sent into the rival's journal", () => ({ "Nats-Trace-Dest": `tenant.rival.session.${SESSION}.event` })],
    ["a trace instead of delivery", () => ({ "Nats-Trace-Dest": "_INBOX_acme.trace", "Nats-Trace-Only": "true" })],
    ["a forged origin", () => ({ "Nats-Request-Info": '{"acc":"RT","user":"runtime"}', "Nats-Stream-Source": "EVENTS 1" })],
    ["a commit of the runtime's", () => ({ "Troupe-Commit": "x.1" })],
    ["a fast-lane subject of the rival's", () => ({ "Troupe-Subject": `tenant.rival.session.${SESSION}.command` })],
    ["Troupe-Reply-To into the rival's journal", () => ({ "Troupe-Reply-To": `tenant.rival.session.${SESSION}.event` })],
    ["Troupe-Reply-To as the rival's command", () => ({ "Troupe-Reply-To": `tenant.rival.session.${SESSION}.command` })],
    ["Troupe-Reply-To into the rival's inbox", () => ({ "Troupe-Reply-To": "_INBOX_rival.x" })],
    ["Troupe-Reply-To as the rival's live event", () => ({ "Troupe-Reply-To": `live.tenant.rival.session.${SESSION}.event` })],
    ["Troupe-Reply-To on the way to the rival's inbox", () => ({ "Troupe-Reply-To": "reply._INBOX_rival.x" })],
    ["Troupe-Reply-To onto the fast lane", () => ({ "Troupe-Reply-To": "system.shard.0.command" })],
    ["Troupe-Reply-To to the broker's API", () => ({ "Troupe-Reply-To": "$JS.API.STREAM.PURGE.COMMANDS" })],
    ["Troupe-Reply-To with a wildcard", () => ({ "Troupe-Reply-To": "_INBOX_acme.*" })],
    ["Troupe-Reply-To of the broker's own crossing", () => ({ "Troupe-Reply-To": "_R_.abc.def" })],
    ["Troupe-Reply-To into the runtime's own inboxes", () => ({ "Troupe-Reply-To": "_INBOX.abc.def" })],
    ["somebody else's name", () => ({ "Troupe-Principal": "login:operator" })],
    ["somebody else's name in other letters", () => ({ "troupe-principal": "login:operator" })],
  ];
  test.each(WEAPONS.map(([what, head], index) => ({ what, head, index })))("$what", async ({ head, index }) => {
    const before = await storedOfOthers();
    heard_by_rival.length = 0;
    await ask(acme, COMMAND, pause_of(index), head(index), 400); // some are answered by nobody
    await pauseMs(index < 3 ? 700 : 60);
    expect(await storedOfOthers()).toEqual(before);
    expect(await heardByRival()).toEqual([]);
  });

  test("a command whose reply subject may not be is refused, and the refusal stands in the sender's own journal", async () => {
    const journal = await ground.troupe.journal(`acme/session/${SESSION}`);
    const refused = journal.flatMap((message) => message.entries).filter((entry) => entry.t === "refused" && JSON.stringify(entry).includes("Troupe-Reply-To"));
    expect(refused.length).toBeGreaterThan(5);
  });

  /** The refused entries of this body's reason in the sender's journal. */
  async function entriesOf(reason: string): Promise<{ t: string; principal?: string; error?: { code: string } }[]> {
    const journal = await ground.troupe.journal(`acme/session/${SESSION}`);
    return journal.flatMap((message) => message.entries as never[]).filter((entry) => JSON.stringify(entry).includes(reason));
  }

  test("an answer under the runtime's own prefix is refused to a tenant's client, and given to who holds the runtime's credentials", async () => {
    const bus = await ground.troupe.bus();
    const id = "answers";
    expect((await ground.troupe.api("/v1/sessions", { key: ground.keys.acme, json: { id, agent: "assistant" } })).status).toBe(201);
    const inbox = bus.inbox();
    const heard: string[] = [];
    const mine = bus.subscribe(`${inbox}.*`, ({ data }) => void heard.push(new TextDecoder().decode(data)));
    await bus.flush();
    const head = { "Troupe-Reply-To": `${inbox}.x` };
    const subject = `tenant.acme.session.${id}.command`;
    expect((await ask(acme, subject, bytes({ type: "session.pause", body: { reason: "by a client" } }), head)).answer).toContain("COMMANDS");
    const journal = async (): Promise<object[]> => (await ground.troupe.journal(`acme/session/${id}`)).flatMap((message) => [...message.entries]);
    expect(await until(async () => (await journal()).some((entry) => "t" in entry && entry.t === "refused"), 30_000, 50)).toBe(true);
    expect(heard).toEqual([]);
    expect((await journal()).at(-1)).toMatchObject({ t: "refused", principal: "nats", error: { code: "forbidden" } });
    await bus.publish(subject, bytes({ type: "session.pause", body: { reason: "by an operator" } }), { headers: head });
    expect(await until(() => heard.length === 1, 30_000)).toBe(true);
    expect(JSON.parse(heard[0]!)).toMatchObject({ ok: true, actor: `acme/session/${id}`, state: "paused" });
    await mine.stop();
  });

  test("who said it stands in the journal and the audit: a key over HTTP, `nats` for a client on the bus whatever it says of itself, a login at the command line", async () => {
    const id = "signed";
    const key_id = ground.keys.acme.split(".")[2];
    expect(
      (await ground.troupe.api("/v1/sessions", { key: ground.keys.acme, json: { id, agent: "assistant" }, headers: { "troupe-principal": "key:forged" } }))
        .status,
    ).toBe(201);
    const forged = { "Troupe-Principal": "key:forged" };
    expect((await ask(acme, `tenant.acme.session.${id}.command`, bytes({ type: "session.pause", body: {} }), forged)).answer).toContain("COMMANDS");
    const entries = async (): Promise<unknown[]> =>
      (await ground.troupe.journal(`acme/session/${id}`)).flatMap((message) =>
        message.entries.flatMap((entry) => (entry.t === "init" || entry.t === "command" ? [[entry.type, entry.principal]] : [])),
      );
    const expected = [
      ["session.create", `key:${key_id}`],
      ["session.pause", "nats"],
    ];
    await until(async () => (await entries()).length === 2, 30_000, 50);
    expect(await entries()).toEqual(expected);
    expect(await typed(ground.troupe, ["keys", "create", "--tenant", "acme", "--label", "by the command line"])).toMatchObject({ code: 0 });
    const rows = async (args: string[]): Promise<{ command_type: string; principal: string | null }[]> => {
      const { stdout } = await typed(ground.troupe, ["audit", "--tenant", "acme", "--json", ...args]);
      return stdout
        .split("\n")
        .filter((line) => line !== "")
        .map((line) => JSON.parse(line) as never);
    };
    await until(async () => (await rows(["--actor", id, "--command", "session.pause"])).length === 1, 60_000, 50);
    const audited = (await rows(["--actor", id])).filter(({ command_type }) => command_type !== null);
    expect(audited.map(({ command_type, principal }) => [command_type, principal]).reverse()).toEqual(expected);
    await until(async () => (await rows(["--principal", "login:operator"])).length > 0, 60_000, 50);
    expect((await rows(["--principal", "login:operator"]))[0]).toMatchObject({ command_type: "key.create", principal: "login:operator" });
    for (const args of [
      ["replay", `acme/session/${id}`],
      ["explain", `acme/session/${id}`],
    ]) {
      const { stdout } = await typed(ground.troupe, args);
      expect(stdout).toMatch(new RegExp(`session\\.create by key:${key_id}`));
      expect(stdout).toMatch(/session\.pause by nats/);
      expect(stdout).not.toContain("forged");
    }
    expect((await entriesOf("forged")).length).toBe(0);
    expect(await typed(ground.troupe, ["audit", "verify", "--tenant", "acme"])).toMatchObject({ code: 0 });
  });

  test.each([
    `tenant.rival.session.${SESSION}.command`,
    `tenant.rival.session.${SESSION}.event`,
    `live.tenant.rival.session.${SESSION}.event`,
    "_INBOX_rival.x",
    "_INBOX.x",
    "reply._INBOX_rival.x",
    "system.shard.0.command",
    "$JS.API.STREAM.PURGE.COMMANDS",
    "$KV.EDGE.0",
    `tenant.acme.session.${SESSION}.event`,
  ])("an acknowledgement, or one's own history, sent to %s lands nowhere", async (reply) => {
    const before = await storedOfOthers();
    const bus = await ground.troupe.bus();
    const heard: string[] = [];
    const spies = [reply, `tenant.acme.session.${SESSION}.event`].map((subject) =>
      bus.subscribe(subject, (message) => void heard.push(new TextDecoder().decode(message.data))),
    );
    await bus.flush();
    heard_by_rival.length = 0;
    acme.publish(COMMAND, bytes({ type: "message.send", body: { content: "" } }), { reply }); // refused as invalid, so that the journal does not move for other reasons
    acme.publish("tenant.acme.replay", bytes({ kind: "session", id: SESSION, channel: "event" }), { reply });
    await acme.flush();
    await pauseMs(250);
    for (const spy of spies) await spy.stop();
    expect(await heardByRival()).toEqual([]);
    // The refusal itself is an append of our own to the sender's journal; an acknowledgement or somebody's history would be other bytes.
    expect(heard.filter((one) => one.startsWith('{"stream":') || !one.includes('"t":"refused"'))).toEqual([]);
    expect(await storedOfOthers()).toEqual(before);
  });

  test("the rival's message ids and idempotency keys take nothing from the rival", async () => {
    const create = (id: string): Uint8Array => bytes({ type: "session.create", body: { agent: "assistant", metadata: { id } } });
    const first = await ask(acme, "tenant.acme.session.same.command", create("a"), { "Nats-Msg-Id": "same-id", "Idempotency-Key": "same-key" });
    // The broker's window is one for all, and the shortest that it has: after it a message id is nobody's, and a command needs none.
    await pauseMs(400);
    const second = await ask(rival, "tenant.rival.session.same.command", create("r"), { "Nats-Msg-Id": "same-id", "Idempotency-Key": "same-key" });
    expect(first.answer).toContain("COMMANDS");
    expect(second.answer).toContain("COMMANDS");
    expect(second.answer).not.toContain("duplicate");
    const made = async (): Promise<boolean> => (await ground.troupe.api("/v1/sessions/same", { key: ground.keys.rival })).status === 200;
    await until(made, 30_000, 50);
    expect(await (await ground.troupe.api("/v1/sessions/same", { key: ground.keys.rival })).json()).toMatchObject({ metadata: { id: "r" } });
  });
});

describe("history and live text", () => {
  async function replay(connection: NatsConnection, tenant: string, question: object): Promise<Msg[]> {
    const inbox = `_INBOX_${tenant}.replay.${Math.random().toString(36).slice(2)}`;
    const got: Msg[] = [];
    const done = new Promise<void>((resolve) => {
      connection.subscribe(inbox, {
        callback: (_error, message) => {
          got.push(message);
          if (message.headers?.get("Troupe-Done") === "true") resolve();
        },
      });
    });
    connection.publish(`tenant.${tenant}.replay`, bytes(question), { reply: inbox });
    await Promise.race([done, pauseMs(30_000)]);
    return got;
  }

  test("each twin reads its own history to the end and no byte of the other's", async () => {
    for (const [connection, tenant, other] of [
      [acme, "acme", "rival"],
      [rival, "rival", "acme"],
    ] as const) {
      for (const channel of ["event", "token"]) {
        const got = await replay(connection, tenant, { kind: "session", id: SESSION, channel });
        const all = got.map((message) => `${message.headers?.get("Nats-Subject") ?? ""} ${text.decode(message.data)}`).join("\n");
        expect(got.at(-1)?.headers?.get("Troupe-Done")).toBe("true");
        expect(all).toContain(canaryOf(tenant));
        expect(all).not.toContain(canaryOf(other));
        expect(all).not.toContain(`tenant.${other}.`);
      }
    }
  });

  test("a tenant's own actor, whose journal has keys' hashes in it, has no replay", async () => {
    const [answer] = await replay(acme, "acme", { kind: "tenant", id: "main", channel: "event" });
    expect(answer?.headers?.get("Troupe-Error")).toBe("invalid");
  });

  test("two connections of one tenant live in one account, of two tenants in two", async () => {
    const accounts = (await (await fetch(`${ground.troupe.dev().nats_monitor_url}/connz?auth=1&limit=1000`)).json()) as {
      connections: { account: string; authorized_user?: string }[];
    };
    const of = (tenant: string): Set<string> =>
      new Set(
        accounts.connections
          .filter(({ authorized_user }) => authorized_user?.includes(ground.keys[tenant as "acme"].split(".")[2] ?? "?"))
          .map(({ account }) => account),
      );
    expect([of("acme").size, of("rival").size]).toEqual([1, 1]);
    expect([...of("acme")][0]).not.toBe([...of("rival")][0]);
  });
});

describe("scopes and ends", () => {
  test("a key that may only read publishes no command, one that may only write hears nothing live", async () => {
    const reader = await ground.client((await ground.key("acme", { scopes: ["sessions:read"] })).key, "acme");
    expect((await ask(reader, COMMAND, pause_of(1))).refused).toMatch(/permission/i);
    const writer = await ground.client((await ground.key("acme", { scopes: ["sessions:write"] })).key, "acme");
    expect((await ask(writer, COMMAND, pause_of(2))).answer).toContain("COMMANDS");
    expect((await ask(writer, "tenant.acme.replay", bytes({}))).refused).toMatch(/permission/i);
    const refused = new Promise<string>((resolve) =>
      writer.subscribe("live.tenant.acme.>", { callback: (error) => resolve(error === null ? "heard" : error.message) }),
    );
    await writer.flush();
    expect(await refused).toMatch(/permission/i);
  });

  async function endsWithin(connection: NatsConnection, ms: number): Promise<boolean> {
    return Promise.race([connection.closed().then(() => true), pauseMs(ms).then(() => false)]);
  }

  test("a revoked key loses its connections at once and does not come back; the tenant's other keys stay", async () => {
    const { key, key_id } = await ground.key("acme");
    const gone = await ground.client(key, "acme");
    await ground.tell("acme", "key.revoke", { key_id });
    expect(await endsWithin(gone, 30_000)).toBe(true);
    await expect(ground.client(key, "acme")).rejects.toThrow(/authorization/i);
    expect((await ask(acme, COMMAND, pause_of(3))).answer).toContain("COMMANDS");
    expect(await (await ground.troupe.api("/metrics", { key: null })).text()).toMatch(/troupe_nats_connections_ended_total\{[^}]*\} [1-9]/);
  });

  test("a key ends when it was said to: its connection is closed, HTTP and bus refuse it", async () => {
    const { key } = await ground.key("acme", { expires_at: new Date(Date.now() + 4_000).toISOString() });
    const short = await ground.client(key, "acme");
    expect((await ground.troupe.api("/v1/agents", { key })).status).toBe(200);
    expect(await endsWithin(short, 30_000)).toBe(true);
    // The broker counts ends in whole seconds and closes within the last one.
    expect(await until(async () => (await ground.troupe.api("/v1/agents", { key })).status === 401, 30_000, 50)).toBe(true);
    await expect(ground.client(key, "acme")).rejects.toThrow(/authorization/i);
  });

  test("a suspended tenant loses all its connections and gets them back with its resumption; an operator's key does not open the bus", async () => {
    await ground.tell("third", "tenant.create", {});
    const { key } = await ground.key("third");
    const client = await ground.client(key, "third");
    await ground.tell("third", "tenant.suspend", {});
    expect(await endsWithin(client, 30_000)).toBe(true);
    await expect(ground.client(key, "third")).rejects.toThrow(/authorization/i);
    await ground.tell("third", "tenant.resume", {});
    const back = await until(
      () =>
        ground.client(key, "third").then(
          () => true,
          () => false,
        ),
      30_000,
      100,
    );
    expect(back).toBe(true);
    await ground.tell("system", "tenant.create", {});
    await expect(ground.client((await ground.key("system", { scopes: ["operator:write"] })).key, "system")).rejects.toThrow(/authorization/i);
  });

  test("the command line with a tenant's key speaks in the tenant's own twin of a session, and shows nothing of the other's", async () => {
    for (const [tenant, other] of [
      ["acme", "rival"],
      ["rival", "acme"],
    ] as const) {
      const { code, stdout, stderr } = await typed(ground.troupe, ["chat", "--session", SESSION, "--key", ground.keys[tenant]], {
        stdin: `words of ${canaryOf(tenant)}\n`,
      });
      expect(code).toBe(0);
      expect(stdout).toContain(canaryOf(tenant));
      expect(stdout + stderr).not.toContain(canaryOf(other));
    }
    const refused = await typed(ground.troupe, ["chat", "--session", SESSION, "--key", ground.keys.rival.replace(".rival.", ".acme.")], { stdin: "x\n" });
    expect(refused.code).toBe(1);
    expect(refused.stdout + refused.stderr).not.toMatch(new RegExp(`${canaryOf("acme")}|${canaryOf("rival")}`));
  });

  test("nothing that was tried broke a promise of the journals", async () => {
    expect(await typed(ground.troupe, ["verify", "rival"])).toMatchObject({ code: 0 });
    expect(await typed(ground.troupe, ["verify", "acme"])).toMatchObject({ code: 0 });
  });

  test("verify finds a row of the audit that a superuser changed where no hash stands, and doctor a table that keeps tenants apart no more", async () => {
    const database = new pg.Client({ connectionString: ground.troupe.dev().postgres_url });
    await database.connect();
    try {
      const row = "tenant = 'rival' and stream_sequence = (select min(stream_sequence) from audit where tenant = 'rival') and entry_index = 0";
      await database.query(`update audit set principal = 'key:somebody' where ${row}`);
      const { code, stdout } = await typed(ground.troupe, ["verify", "rival", "--json"]);
      expect([code, stdout]).toEqual([1, expect.stringMatching(/"invariant":"P1","actor":"rival".*changed: it differs from its journal entry in principal/)]);
      await database.query(`update audit set principal = null where ${row}`);
      expect(await typed(ground.troupe, ["verify", "rival", "--json"])).toMatchObject({ code: 0, stdout: expect.stringContaining('"audit_chains":1') });

      const apart = async (): Promise<unknown> =>
        (JSON.parse((await typed(ground.troupe, ["doctor", "--json"])).stdout) as { findings: { what: string }[] }).findings.filter(
          ({ what }) => what === "tenants apart",
        );
      expect(await apart()).toMatchObject([{ level: "ok" }]);
      await database.query("alter table sessions no force row level security");
      expect(await apart()).toMatchObject([{ level: "refused", detail: "sessions does not force row-level security" }]);
      await database.query("alter table sessions force row level security");
      expect(await apart()).toMatchObject([{ level: "ok" }]);
    } finally {
      await database.end();
    }
  });
});
