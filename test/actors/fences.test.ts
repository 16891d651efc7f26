// Goal: an owner that is none any more appends nothing, one that was only overtaken decides anew, and no message, answer or name crosses from one
//       tenant to another.
// Method: one host on the in-memory bus in virtual time; a rival's messages are put into the journal by hand.
import { expect, test } from "vitest";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost } from "../../actors/shard-host.ts";
import { Broker } from "../../bus/memory.ts";
import { HEADER_PRINCIPAL, HEADER_REPLY_TO } from "../../protocol/commands.ts";
import { decodeJournal, encodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { type Log, silentLog } from "../../protocol/log.ts";
import { PRINCIPAL_ON_BUS } from "../../protocol/principal.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { cores } from "../../state-machines/kinds.ts";
import type { Core } from "../../state-machines/step.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const session = { tenant: "acme", kind: "session", id: "s1" } as const;
const journal = actorSubject(session, "event");

function ground({ verdict = "mine", core = cores.session }: { verdict?: "mine" | "lost"; core?: Core } = {}) {
  const world = new VirtualWorld(1);
  const broker = new Broker({ world, shards: 1 });
  const service = broker.connect("service");
  const replies: Reply[] = [];
  service.subscribe("_INBOX.mine", (message) => void replies.push(decodeReply(message.data)));
  const errors: string[] = [];
  const log: Log = { ...silentLog, error: (what) => void errors.push(what) };
  const known = { ...cores, session: core };
  let commits = 0;
  const bus = broker.connect("w1");
  const host: ShardHost = createShardHost({
    bus,
    world,
    log,
    cores: known,
    restorer: createRestorer({ bus, cores: known, log: silentLog }),
    performers: {
      load_configuration: (async () => ({
        config: { model: "simulated/echo", instructions: "", tools: [], mode: "multi", max_loops: 4 },
        hash: "h",
        agent_version: 1,
      })) as never,
    },
    worker: "w1",
    next_commit_id: () => `w1.${commits++}`,
    may_act: () => true,
    on_conflict: async () => verdict,
    passivate_after_ms: 1_000,
  });
  const say = async (
    type: string,
    body: object,
    headers: Record<string, string> = { [HEADER_REPLY_TO]: "_INBOX.mine" },
    subject = actorSubject(session, "command"),
  ) => {
    void service.publish(subject, new TextEncoder().encode(JSON.stringify({ type, body })), { headers });
    await world.advance(100);
  };
  const messages = (): JournalMessage[] => {
    const events = broker.stream("EVENTS");
    return Array.from({ length: events.last_sequence }, (_, index) => decodeJournal(events.get(index + 1)!.data));
  };
  /** What another owner would append now. */
  const rival = async (change: Partial<JournalMessage>): Promise<void> => {
    const last = messages().at(-1)!;
    const entry = { t: "refused", type: "session.resume", hash: "h", error: { code: "busy", message: "later" }, channel: "command" } as const;
    const message: JournalMessage = { ...last, seq: last.seq + 1, entries: [entry], events: [], out: [], worker: "w2", ...change };
    void service.append({ subject: journal, data: encodeJournal(message), expected_last_sequence: messages().length, commit_id: "w2.0" });
    await world.advance(10);
  };
  return { world, broker, service, host, replies, errors, say, messages, rival };
}
const begin = { worker: null, reason: "first" };

test("C2: an owner that finds the epoch of a later one in the journal, and has lost the shard, appends nothing", async () => {
  const { world, host, errors, say, messages, rival } = ground({ verdict: "lost" });
  await host.take(0, 1, begin);
  await say("session.create", { agent: "a" });
  await world.advance(30_000); // it leaves memory
  expect(host.resident()).toEqual([]);
  await rival({ epoch: 5 });
  await say("session.pause", {});
  await world.advance(5_000);
  expect(messages().map(({ epoch }) => epoch)).toEqual([1, 1, 5]);
  expect(errors).toEqual([]);
});

test("C4: what a fence refused is decided anew against the journal as it is, and answered", async () => {
  const { world, host, say, messages, rival, replies } = ground();
  await host.take(0, 1, begin);
  await say("session.create", { agent: "a" });
  await rival({});
  await say("session.pause", {});
  await world.advance(2_000);
  expect(replies.at(-1)).toMatchObject({ ok: true, seq: 4, state: "paused" });
  expect(messages().map(({ seq }) => seq)).toEqual([1, 2, 3, 4]);
});

test("A4: a machine that would send to another tenant sends nothing", async () => {
  const sends: Core = {
    ...cores.session,
    apply: (...step) => ({
      ...cores.session.apply(...step),
      out: [{ id: "1.0", to: "globex/session/theirs", type: "message.send", body: { content: "hello" } }],
    }),
  };
  const { world, broker, host, say } = ground({ core: sends });
  await host.take(0, 1, begin);
  await say("session.create", { agent: "a" });
  await world.advance(5_000);
  const commands = broker.stream("COMMANDS");
  const subjects = Array.from({ length: commands.last_sequence }, (_, index) => commands.get(index + 1)?.subject ?? "");
  expect(subjects.filter((subject) => subject.includes("globex"))).toEqual([]);
  expect(broker.stream("EVENTS").last_sequence).toBe(0);
});

test("A4: an answer goes to the tenant's own inbox or to ours, and to no other tenant's", async () => {
  const { service, host, say } = ground();
  const heard: string[] = [];
  service.subscribe("_INBOX_globex.>", ({ subject }) => void heard.push(subject));
  service.subscribe("reply.>", ({ subject }) => void heard.push(subject));
  await host.take(0, 1, begin);
  await say("session.create", { agent: "a" }, { [HEADER_REPLY_TO]: "_INBOX_globex.theirs" });
  await say("session.create", { agent: "a" }, { [HEADER_REPLY_TO]: "_INBOX_acme.own" });
  expect(heard).toEqual(["reply._INBOX_acme.own"]);
});

test("H4: a tenant's client is known as one, whoever it says it is", async () => {
  const { host, say, messages } = ground();
  await host.take(0, 1, begin);
  await say("session.create", { agent: "a" }, { [HEADER_PRINCIPAL]: "key:k1" });
  await say("session.pause", {}, { [HEADER_PRINCIPAL]: "login:root" }, "tenant.acme.session.s1.edge");
  const said = messages().flatMap(({ entries }) => entries.flatMap((entry) => ("principal" in entry ? [entry.principal] : [])));
  expect(said).toEqual(["key:k1", PRINCIPAL_ON_BUS]);
});
