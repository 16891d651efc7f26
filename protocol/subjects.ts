// subjects: the only file that builds or parses a NATS subject.
//
//   tenant.{tenant}.{kind}.{id}.{channel}     what services and tenants see
//   tenant.{tenant}.{kind}.{id}.edge          what a tenant's client said on `….command`, as it arrives in the runtime's account
//   live.tenant.…                             what the streams stored, as it is stored
//   shard.{n}.tenant.…  shard.{n}.due.…       COMMANDS and TIMERS after their subject transform: a shard's inbox
//   timer.…  due.…                            a schedule, and where it is aimed
//   resident.{n}.{tenant}.{kind}.{id}         an actor that owes something
//   reply._INBOX_{tenant}.…                   an answer on its way to a tenant's client
//   system.…                                  between our own processes
import { assert } from "./assert.ts";
import { type ActorAddress, isActorKind, isId } from "./ids.ts";

export const CHANNELS = ["command", "control", "event", "token", "snapshot"] as const;
export type Channel = (typeof CHANNELS)[number];
export type CommandChannel = Extract<Channel, "command" | "control">;

export function isChannel(text: unknown): text is Channel {
  return typeof text === "string" && (CHANNELS as readonly string[]).includes(text);
}

export function actorSubject(actor: ActorAddress, channel: Channel): string {
  assert(isId(actor.tenant) && isId(actor.id), "a subject is built from well-formed ids");
  return `tenant.${actor.tenant}.${actor.kind}.${actor.id}.${channel}`;
}

/** The last word of a subject under which the broker hands on what came from a tenant's client. No client can name such a subject, and no process of ours does. */
const EDGE_WORD = "edge";
/** Kinds to which a tenant's clients may say commands on the bus. */
export const EDGE_KINDS = ["session", "workflow"] as const;
/** Where commands of tenants' clients arrive in the runtime's account. */
export const edgeCommandFilter = (kind: (typeof EDGE_KINDS)[number]): string => `tenant.*.${kind}.*.${EDGE_WORD}`;
/** Was it said by a tenant's client? Everything else on an actor's subject was said with the runtime's credentials. */
export function isFromEdge(subject: string): boolean {
  return subject.endsWith(`.${EDGE_WORD}`);
}

/** Where the live copy of what EVENTS or TOKENS stored is heard. */
export function liveSubject(actor: ActorAddress, channel: "event" | "token"): string {
  return `live.${actorSubject(actor, channel)}`;
}

export type SubjectParse =
  | { readonly kind: "actor"; readonly actor: ActorAddress; readonly channel: Channel }
  /** `tenant`: whose subject it is, when that much can be read. */
  | { readonly kind: "malformed"; readonly reason: string; readonly tenant?: string };

/** Parses `tenant.…`, `live.tenant.…` and `shard.{n}.tenant.…` alike. What came from the edge is a command like another; isFromEdge tells it. */
export function parseActorSubject(subject: string): SubjectParse {
  let tokens = subject.split(".");
  if (tokens[0] === "live") tokens = tokens.slice(1);
  else if (tokens[0] === "shard") tokens = tokens.slice(2);
  const [root, tenant, kind, id, channel, ...rest] = tokens;
  if (root !== "tenant" || rest.length > 0) return { kind: "malformed", reason: "not tenant.{tenant}.{kind}.{id}.{channel}" };
  if (!isId(tenant)) return { kind: "malformed", reason: "the tenant is not 1 to 64 of A-Z a-z 0-9 _ -" };
  if (!isActorKind(kind)) return { kind: "malformed", tenant, reason: `unknown kind of actor '${String(kind).slice(0, 64)}'` };
  if (!isId(id)) return { kind: "malformed", tenant, reason: "the id is not 1 to 64 of A-Z a-z 0-9 _ -" };
  if (channel === EDGE_WORD && (EDGE_KINDS as readonly string[]).includes(kind)) return { kind: "actor", actor: { tenant, kind, id }, channel: "command" };
  if (!isChannel(channel)) return { kind: "malformed", tenant, reason: `unknown channel '${String(channel).slice(0, 64)}'` };
  return { kind: "actor", actor: { tenant, kind, id }, channel };
}

/**
 * The shard of an actor: FNV-1a (32 bit) over tenant, kind and id run together, modulo the number of shards.
 * This is what nats-server's `{{partition(n,1,2,3)}}` computes; a contract test holds the two equal.
 */
export function shardOf(actor: ActorAddress, shards: number): number {
  let hash = 0x811c9dc5;
  for (const byte of Buffer.from(actor.tenant + actor.kind + actor.id)) {
    hash ^= byte;
    hash = Math.imul(hash, 0x01000193);
  }
  return (hash >>> 0) % shards;
}

/** Kinds that live in shards. Workers do not: the leading supervisor hosts them itself. */
export const SHARDED_KINDS = ["session", "workflow", "tenant", "budget", "webhook"] as const;

/** What the owner of shard n reads from COMMANDS. One filter a kind, because workers' commands are the leader's. */
export function shardCommandFilters(shard: number): string[] {
  return SHARDED_KINDS.map((kind) => `shard.${shard}.tenant.*.${kind}.*.*`);
}
/** What the owner of shard n reads from TIMERS. */
export const shardDueFilter = (shard: number): string => `shard.${shard}.due.>`;
/**
 * Where the owner of a shard takes commands by core request: one append instead of two durable writes. Only our own processes may say
 * something there; the actor's own subject travels in HEADER_SUBJECT.
 */
export const fastLaneSubject = (shard: number): string => `system.shard.${shard}.command`;
/** What the leading supervisor reads from COMMANDS. */
export const WORKER_COMMAND_FILTER = "shard.*.tenant.*.worker.*.*";

/** One schedule per actor: arming again replaces it. */
export function timerSubject(actor: ActorAddress): string {
  return `timer.${actor.tenant}.${actor.kind}.${actor.id}`;
}
/** Where an actor's schedule is aimed; the stream's transform puts the shard before it. */
export function dueSubject(actor: ActorAddress): string {
  return `due.tenant.${actor.tenant}.${actor.kind}.${actor.id}`;
}
export function parseDueSubject(subject: string): ActorAddress | undefined {
  const tokens = subject.split(".");
  const [root, of, tenant, kind, id] = tokens[0] === "shard" ? tokens.slice(2) : tokens;
  if (root !== "due" || of !== "tenant" || !isId(tenant) || !isActorKind(kind) || !isId(id)) return undefined;
  return { tenant, kind, id };
}

export function residentSubject(shard: number, actor: ActorAddress): string {
  return `resident.${shard}.${actor.tenant}.${actor.kind}.${actor.id}`;
}
export function parseResidentSubject(subject: string): { shard: number; actor: ActorAddress } | undefined {
  const [root, shard, tenant, kind, id] = subject.split(".");
  if (root !== "resident" || !/^\d+$/.test(shard ?? "") || !isId(tenant) || !isActorKind(kind) || !isId(id)) return undefined;
  return { shard: Number(shard), actor: { tenant, kind, id } };
}

/** Where a tenant asks for history, and what gateways listen on. */
export const replaySubject = (tenant: string): string => `tenant.${tenant}.replay`;
export const REPLAY_FILTER = "tenant.*.replay";
export function parseReplaySubject(subject: string): string | undefined {
  const [root, tenant, verb, ...rest] = subject.split(".");
  return root === "tenant" && isId(tenant) && verb === "replay" && rest.length === 0 ? tenant : undefined;
}

/** Where answers to a tenant's clients may go. */
export const tenantInboxPrefix = (tenant: string): string => `_INBOX_${tenant}.`;
/** Where answers to our own processes go; no tenant may subscribe there. */
export const RUNTIME_INBOX_PREFIX = "_INBOX.";

/** Where an answer to a tenant's client is put in the runtime's account; the broker hands what is under `reply.` on to the accounts of tenants without it. */
const REPLY_PREFIX = "reply.";
/** What carries an answer to the subject that the sender named: a tenant's clients live in accounts of their own. */
export function replyRoute(tenant: string, subject: string): string {
  return subject.startsWith(tenantInboxPrefix(tenant)) ? REPLY_PREFIX + subject : subject;
}

/** Where the broker itself collects an answer that has to cross accounts; no client can name such a subject as its reply. */
const CROSSING_REPLY_PREFIX = "_R_.";

/** May history of `tenant` be sent to `reply`? It is the reply of a NATS message, not a header: one that came across accounts is the broker's own. */
export function isReplayReplyAllowed(tenant: string, reply: string): boolean {
  return isReplyAllowed(tenant, reply, "runtime") || (isLiteralSubject(reply) && reply.startsWith(CROSSING_REPLY_PREFIX));
}

/** Where a tenant's clients say commands. */
export const tenantCommandFilters = (tenant: string): string[] => [`tenant.${tenant}.session.*.command`, `tenant.${tenant}.workflow.*.command`];
/** All that is live of a tenant, and what of it only its administrators hear: its own actor's journal has keys' hashes and agents in it. */
export const tenantLiveFilter = (tenant: string): string => `live.tenant.${tenant}.>`;
export const tenantOwnLiveFilter = (tenant: string): string => `live.tenant.${tenant}.tenant.>`;

/** A literal subject: no wildcard, no empty token, no white space, of a length that fits a header. */
export function isLiteralSubject(subject: string): boolean {
  return subject.length <= 255 && /^[^\s.*>]+(\.[^\s.*>]+)*$/.test(subject);
}

/** May a command for `tenant` be answered on `subject`? Only under that tenant's own inbox prefix, or, when it was not a tenant's client that said it, our own. */
export function isReplyAllowed(tenant: string, subject: string, said_by: "runtime" | "client"): boolean {
  if (!isLiteralSubject(subject)) return false;
  return subject.startsWith(tenantInboxPrefix(tenant)) || (said_by === "runtime" && subject.startsWith(RUNTIME_INBOX_PREFIX));
}

/** What a worker can be asked by our own processes, one request and one reply each. */
export const HOST_OPERATIONS = ["start", "stop", "status", "list", "health", "waits", "prepare"] as const;
export type HostOperation = (typeof HOST_OPERATIONS)[number];

export function hostSubject(worker: string, operation: HostOperation): string {
  assert(isId(worker), "a subject is built from well-formed ids");
  return `system.worker.${worker}.v1.${operation}`;
}
/** All that one worker answers to. */
export function hostFilter(worker: string): string {
  assert(isId(worker), "a subject is built from well-formed ids");
  return `system.worker.${worker}.v1.*`;
}
export function parseHostSubject(subject: string): { worker: string; operation: HostOperation } | undefined {
  const [root, of, worker, version, operation, ...rest] = subject.split(".");
  if (root !== "system" || of !== "worker" || !isId(worker) || version !== "v1" || rest.length > 0) return undefined;
  if (!(HOST_OPERATIONS as readonly unknown[]).includes(operation)) return undefined;
  return { worker, operation: operation as HostOperation };
}

/** Where workers tell the leading supervisor that an actor with work in flight goes on with them. */
export const RESUMED_SUBJECT = "system.supervisor.v1.resumed";
/** Where one life of a supervisor answers that it is there: to those that would lead in its place. */
export function supervisorSubject(id: string, incarnation: string): string {
  assert(isId(id) && isId(incarnation), "a subject is built from well-formed ids");
  return `system.supervisor.${id}.v1.${incarnation}`;
}
