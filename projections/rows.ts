// rows: what one journal message means for the tables. Pure: (rows in hand, message) → rows; no clock, no database.
//
//   message ──▶ one audit row an entry, and those of the tools that its session called
//           ──▶ the session's row, and a usage row for each try of each attempt of a model call that ended here
//           ──▶ the tenant's row, its keys, the versions of its agents
//
// Invariants:
//   R1. Equal messages in equal order give equal rows: a rebuild from the first message gives the tables that were there.
//   R2. Every entry has exactly one audit row; its hash is computed over the entry, so the stream can be held against it. Rows of tools come after
//       those of their message's entries, and bear the hash of the entry that began or ended the call.
//   R3. An attempt of a model call has a usage row for each call of a model that was made for it, and one if none was, whatever ended it. What
//       nobody knows is null, until the budget has settled it: the costs of an attempt's rows sum to the ledger's.
//   R4. No customer's text leaves the journal here: of a message's body only what configures a session or a tenant is taken.
import { assert } from "../protocol/assert.ts";
import { HOLD_PATTERN } from "../protocol/commands.ts";
import { type ActorAddress, parseActorPath } from "../protocol/ids.ts";
import { type Entry, entrySeq, type JournalMessage } from "../protocol/journal.ts";
import { hashOf, type Json, type JsonObject } from "../protocol/json.ts";
import { type OpenTool, toolRows } from "./tool-audit.ts";

/** Under which name the projection keeps its position. */
export const PROJECTION_NAME = "troupe";
/** What it is made of. */
export const PROJECTION_STREAM = "EVENTS";

/** The model call in flight, kept in the session's row until it ends. */
export interface OpenCall {
  readonly inst: string;
  readonly turn: number;
  readonly step: number;
  readonly attempt: number;
  readonly model: string;
  readonly started_at: string;
  /** Calls that this attempt had made when it last said so; its end tells them again, unless it is lost. */
  readonly tried?: readonly JsonObject[];
}

/** Rows as they stand in the tables: the keys are the columns. */
export interface SessionRecord {
  readonly tenant: string;
  readonly session: string;
  readonly agent: string;
  readonly agent_version: number | null;
  readonly config_hash: string | null;
  readonly external_id: string | null;
  readonly user_id: string | null;
  readonly mode: string | null;
  readonly metadata: JsonObject;
  readonly model: string | null;
  readonly state: string;
  readonly reason: string | null;
  readonly turn: number;
  readonly created_at: string;
  readonly updated_at: string;
  readonly seq: number;
  readonly epoch: number;
  readonly worker: string;
  readonly machine: string;
  readonly stream_sequence: number;
  readonly open_call: OpenCall | null;
  readonly open_tools: readonly OpenTool[];
}

export interface AuditRecord {
  readonly tenant: string;
  readonly kind: string;
  readonly actor: string;
  readonly stream_sequence: number;
  /** Its place among the message's rows: its entries in their order, then what it says of tools. */
  readonly entry_index: number;
  readonly seq: number;
  readonly at: string;
  readonly epoch: number;
  readonly worker: string;
  readonly machine: string;
  /** The entry's `t`, or `tool.intent` or `tool.outcome` (tool-audit.ts). */
  readonly entry_type: string;
  readonly command_type: string | null;
  readonly channel: string | null;
  readonly key: string | null;
  readonly source: JsonObject | null;
  readonly inst: string | null;
  readonly code: string | null;
  /** Of the last entry of a commit; null for those before it. */
  readonly state_after: string | null;
  readonly events: readonly string[];
  readonly trace: string | null;
  /** Who said it (protocol/principal.ts); null for the runtime itself, and for what is no command. */
  readonly principal: string | null;
  readonly hash: string;
  /** Of rows of tools; null in all others. */
  readonly tool: string | null;
  readonly args_hash: string | null;
  readonly result_hash: string | null;
  readonly decision: string | null;
  readonly duration_ms: number | null;
  readonly cost_usd_micros: number | null;
  readonly attempts: number | null;
}

export interface UsageRecord {
  readonly tenant: string;
  readonly session: string;
  readonly inst: string;
  readonly attempt: number;
  readonly turn: number;
  readonly step: number;
  readonly agent: string;
  readonly user_id: string | null;
  readonly model: string;
  readonly provider: string;
  readonly key_source: "platform" | "tenant";
  readonly input_tokens: number | null;
  readonly output_tokens: number | null;
  readonly cache_read_tokens: number | null;
  readonly cache_write_tokens: number | null;
  readonly reasoning_tokens: number | null;
  readonly cost_usd_micros: number | null;
  readonly price_version: string | null;
  readonly estimated: boolean;
  readonly outcome: "completed" | "failed" | "cancelled" | "superseded";
  readonly code: string | null;
  readonly started_at: string;
  readonly ended_at: string;
  readonly stream_sequence: number;
  readonly try: number;
  readonly purpose: "answer" | "guardrail" | "tool";
  readonly rule: string | null;
  readonly first_token_ms: number | null;
}

/** Of one attempt of a model call; its usage rows are there already, because the budget hears of it after the session's commit. */
export interface SettlementRecord {
  readonly tenant: string;
  readonly session: string;
  readonly inst: string;
  readonly attempt: number;
  readonly cost_usd_micros: number;
  /** Nobody knew: it is what was reserved. */
  readonly assumed: boolean;
}

export interface TenantRecord {
  readonly tenant: string;
  readonly name: string | null;
  readonly state: string;
  readonly created_at: string;
  readonly updated_at: string;
  readonly seq: number;
  readonly stream_sequence: number;
  /** Providers at which it has a key of its own. */
  readonly own_keys: readonly string[];
}

export interface KeyRecord {
  readonly tenant: string;
  readonly key_id: string;
  readonly hash: string;
  readonly scopes: readonly string[];
  readonly label: string | null;
  readonly created_at: string;
  readonly revoked_at: string | null;
}

export interface AgentRecord {
  readonly tenant: string;
  readonly agent: string;
  readonly version: number;
  readonly hash: string;
  readonly config: JsonObject;
  readonly created_at: string;
}

/** A message whose meaning cannot be told. The projection stops at it; passing over it would be a hole that nobody sees. */
export class Unprojectable extends Error {
  override readonly name = "Unprojectable";
}

const textOf = (value: Json | undefined): string | null => (typeof value === "string" ? value : null);
const wholeOf = (value: Json | undefined): number | null => (typeof value === "number" && Number.isSafeInteger(value) && value >= 0 ? value : null);
const objectOf = (value: Json | undefined): JsonObject | null =>
  value !== null && typeof value === "object" && !Array.isArray(value) ? (value as JsonObject) : null;
/** `anthropic/claude-x` is served by anthropic. */
const providerOf = (model: string): string => model.split("/", 1)[0] ?? model;
/** The effect id of a model call; the inst is `{seq}:{effect id}`. */
const TOOL_EFFECT = /^tool\.\d+$/;
const MODEL_INST = /^\d+:model$/;
const CONFIGURATION_INST = /^\d+:configuration$/;

/** What the audit row of an entry has as its hash. The journal's side of the comparison that `troupe verify` makes. */
export function auditHash(entry: Entry): string {
  return hashOf(entry);
}

/** Columns that the rows of entries leave empty. */
const NO_TOOL = { tool: null, args_hash: null, result_hash: null, decision: null, duration_ms: null, cost_usd_micros: null, attempts: null };

/** `open` are the calls of tools that the session's messages before this one left in flight, and after it those that it leaves. */
export function auditRecords(
  message: JournalMessage,
  stream_sequence: number,
  open: readonly OpenTool[],
): { readonly rows: readonly AuditRecord[]; readonly open: readonly OpenTool[] } {
  const { actor, at, epoch, worker, machine } = message;
  const last = message.entries.length - 1;
  const tools = toolRows(open, message);
  const place = { tenant: actor.tenant, kind: actor.kind, actor: actor.id, stream_sequence, at, epoch, worker, machine };
  const entries = message.entries.map((entry, index): AuditRecord => {
    const command = entry.t === "init" || entry.t === "command" || entry.t === "refused" ? entry : undefined;
    const source = command?.source;
    return {
      ...place,
      entry_index: index,
      seq: entrySeq(message, index),
      entry_type: entry.t,
      command_type: command?.type ?? null,
      channel: command?.channel ?? null,
      key: command?.key ?? null,
      source: source === undefined ? null : { stream: source.stream, incarnation: source.incarnation, seq: source.seq },
      inst: entry.t === "done" || entry.t === "fail" || entry.t === "timer" ? entry.inst : null,
      code: entry.t === "refused" || entry.t === "fail" ? entry.error.code : null,
      state_after: index === last ? message.state : null,
      events: index === last ? message.events.map((event) => event.type) : [],
      trace: command?.trace ?? null,
      principal: command?.principal ?? null,
      hash: auditHash(entry),
      ...NO_TOOL,
    };
  });
  const of_tools = tools.rows.map(({ entry_index: by, ...row }, index): AuditRecord => {
    const entry = message.entries[by];
    assert(entry !== undefined, "a row of a tool is of an entry of its message");
    return {
      ...place,
      ...row,
      entry_index: message.entries.length + index,
      seq: entrySeq(message, by),
      command_type: null,
      channel: null,
      key: null,
      source: null,
      state_after: null,
      events: [],
      trace: null,
      principal: null,
      hash: auditHash(entry),
    };
  });
  return { rows: [...entries, ...of_tools], open: tools.open };
}

/**
 * Which effect the `nth` of a message's `model.started` tells of, when the event does not say it.
 *
 * A commit of several entries does not say which of them began a call. A done, fail or claim entry says it later, and is believed
 * over this; of a call that was cancelled before, this name is all there is. No two starts of a message get the same one.
 */
function instOfStart(message: JournalMessage, nth: number, starts: number): string {
  const begins = (entry: Entry): boolean =>
    entry.t === "done" ||
    entry.t === "fail" ||
    entry.t === "timer" ||
    (entry.t === "command" && (entry.type !== "message.send" || entry.body.on_busy === "interrupt"));
  const likely = message.entries.flatMap((entry, index) => (begins(entry) ? [index] : []));
  const messages = message.entries.flatMap((entry, index) => (entry.t === "command" && entry.type === "message.send" ? [index] : []));
  const fitting = [likely, messages, message.entries.map((_, index) => index)].find((indexes) => indexes.length >= starts) ?? [];
  // Of results the last one that was awaited begins the call; of plain messages the first, since the others wait.
  const index = fitting === messages ? fitting[nth] : fitting.at(nth - starts);
  return `${entrySeq(message, index ?? nth)}:model`;
}

interface Spent {
  readonly usage: JsonObject | null;
  readonly cost_usd_micros: number | null;
  readonly price_version: string | null;
  /** Null: nobody said. */
  readonly key_source: "platform" | "tenant" | null;
  /** Every call that was made, in order; empty where nothing was called, or where it is not known. */
  readonly calls: readonly JsonObject[];
}

const callsIn = (fields: JsonObject | null | undefined): readonly JsonObject[] => {
  const calls = fields?.["attempts"];
  return Array.isArray(calls) ? calls.map((call: Json) => objectOf(call)).filter((call) => call !== null) : [];
};

/** Providers whose key is kept under the name of another. */
const KEY_NAMES: Readonly<Record<string, string>> = { "openai-responses": "openai" };

function spentIn(fields: JsonObject | null): Spent {
  return {
    usage: objectOf(fields?.usage),
    cost_usd_micros: wholeOf(fields?.cost_usd_micros),
    price_version: textOf(fields?.price_version),
    key_source: fields?.key_source === "tenant" || fields?.key_source === "platform" ? fields.key_source : null,
    calls: callsIn(fields),
  };
}

/** What an entry that stopped a model call from outside says it had come to. */
function stoppedIn(message: JournalMessage, inst: string): JsonObject | undefined {
  for (const entry of message.entries) if ((entry.t === "command" || entry.t === "timer") && entry.stopped?.[inst] !== undefined) return entry.stopped[inst];
  return undefined;
}

const callOutcome = (call: JsonObject): UsageRecord["outcome"] =>
  call["outcome"] === "completed" ? "completed" : call["code"] === "cancelled" ? "cancelled" : "failed";

/** The rows that the messages of one batch read and make. Loaded before, written after; in between all is in memory. */
export interface Batch {
  readonly audit: AuditRecord[];
  readonly usage: UsageRecord[];
  /** What the budget settled: the ledger's word on what an attempt cost. */
  readonly settlements: SettlementRecord[];
  /** Present rows and new ones alike; `changed` names those to write. */
  readonly sessions: Map<string, SessionRecord>;
  readonly tenants: Map<string, TenantRecord>;
  readonly keys: Map<string, KeyRecord>;
  /** The newest version of each agent. */
  readonly agents: Map<string, AgentRecord>;
  readonly agent_versions: AgentRecord[];
  readonly changed: { readonly sessions: Set<string>; readonly tenants: Set<string>; readonly keys: Set<string> };
}

export function emptyBatch(): Batch {
  return {
    audit: [],
    usage: [],
    settlements: [],
    sessions: new Map(),
    tenants: new Map(),
    keys: new Map(),
    agents: new Map(),
    agent_versions: [],
    changed: { sessions: new Set(), tenants: new Set(), keys: new Set() },
  };
}

/** Ids have no slash, so no two keys meet. */
export const rowKey = (tenant: string, id: string): string => `${tenant}/${id}`;
export const sessionKey = (actor: ActorAddress): string => rowKey(actor.tenant, actor.id);

/** Applies one message to the rows in hand. The rows of its session and tenant must have been loaded if they exist. */
export function projectMessage(batch: Batch, message: JournalMessage, stream_sequence: number): void {
  const before = message.actor.kind === "session" ? batch.sessions.get(sessionKey(message.actor)) : undefined;
  const { rows, open } = auditRecords(message, stream_sequence, before?.open_tools ?? []);
  batch.audit.push(...rows); // R2
  if (message.actor.kind === "session") projectSession(batch, message, stream_sequence, open);
  else if (message.actor.kind === "tenant") projectTenant(batch, message, stream_sequence);
  else if (message.actor.kind === "budget") projectBudget(batch, message);
}

function createdSession(message: JournalMessage): SessionRecord {
  const init = message.entries[0];
  if (init?.t !== "init") throw new Unprojectable("a session's journal begins with its init entry");
  const { body } = init;
  return {
    tenant: message.actor.tenant,
    session: message.actor.id,
    agent: textOf(body.agent) ?? "",
    agent_version: null,
    config_hash: null,
    external_id: textOf(body.external_id),
    user_id: textOf(body.user),
    mode: textOf(body.mode),
    metadata: objectOf(body.metadata) ?? {},
    model: null,
    state: message.state,
    reason: null,
    turn: 0,
    created_at: message.at,
    updated_at: message.at,
    seq: 0,
    epoch: 0,
    worker: "",
    machine: message.machine,
    stream_sequence: 0,
    open_call: null,
    open_tools: [],
  };
}

function projectSession(batch: Batch, message: JournalMessage, stream_sequence: number, open_tools: readonly OpenTool[]): void {
  const key = sessionKey(message.actor);
  const before = batch.sessions.get(key) ?? createdSession(message);
  if (message.seq !== before.seq + message.entries.length)
    throw new Unprojectable(`the session's row is at seq ${before.seq}, its next message at ${message.seq} with ${message.entries.length} entries`);
  let { agent, agent_version, config_hash, mode, model, reason, turn, open_call: open } = before;
  batch.usage.push(...paidTools(message, before, stream_sequence));
  const starts = message.events.filter((event) => event.type === "model.started").length;
  let started = 0;
  const ends = message.entries.filter((entry) => (entry.t === "done" || entry.t === "fail") && MODEL_INST.test(entry.inst)) as Extract<
    Entry,
    { t: "done" | "fail" }
  >[];

  /** Those whose call no event has told of yet. */
  const untold = [...ends];

  /** Of a call that was lost, and of those from before calls said it: the tenant's, where it has a key of its own. */
  const keySourceOf = (called: string): UsageRecord["key_source"] => {
    const provider = providerOf(called);
    const { own_keys = [] } = batch.tenants.get(message.actor.tenant) ?? {};
    return own_keys.includes(KEY_NAMES[provider] ?? provider) ? "tenant" : "platform";
  };

  /** R3: every end of an attempt comes through here. */
  const end = (call: OpenCall, outcome: UsageRecord["outcome"], code: string | null, spent: Spent): void => {
    const row = (own: Spent, more: Pick<UsageRecord, "try" | "model" | "outcome" | "code" | "started_at" | "ended_at"> & Partial<UsageRecord>): void => {
      const tokens = (name: string): number | null => wholeOf(own.usage?.[name]);
      batch.usage.push({
        tenant: message.actor.tenant,
        session: message.actor.id,
        inst: call.inst,
        attempt: call.attempt,
        turn: call.turn,
        step: call.step,
        agent,
        user_id: before.user_id,
        provider: providerOf(more.model),
        key_source: own.key_source ?? keySourceOf(more.model),
        input_tokens: tokens("input_tokens"),
        output_tokens: tokens("output_tokens"),
        cache_read_tokens: tokens("cache_read_tokens"),
        cache_write_tokens: tokens("cache_write_tokens"),
        reasoning_tokens: tokens("reasoning_tokens"),
        cost_usd_micros: own.cost_usd_micros,
        price_version: own.price_version,
        estimated: own.usage?.estimated === true,
        stream_sequence,
        purpose: "answer",
        rule: null,
        first_token_ms: null,
        ...more,
      });
    };
    // Of what ended without a word of its calls, those are known that it told of while it went on.
    const calls = spent.calls.length > 0 ? spent.calls : (call.tried ?? []);
    const answer = calls.findLastIndex((one) => one["purpose"] !== "guardrail");
    calls.forEach((one, index) => {
      // A guardrail that dropped the answer ended it: that is no fault of the call's own.
      const dropped = index === answer && code === "guardrail";
      row(spentIn({ key_source: spent.key_source, ...one }), {
        try: index + 1,
        model: textOf(one["model"]) ?? call.model,
        outcome: dropped ? outcome : callOutcome(one),
        code: dropped ? code : textOf(one["code"]),
        started_at: textOf(one["started_at"]) ?? call.started_at,
        ended_at: textOf(one["ended_at"]) ?? message.at,
        purpose: one["purpose"] === "guardrail" ? "guardrail" : "answer",
        rule: textOf(one["rule"]),
        first_token_ms: wholeOf(one["first_token_ms"]),
      });
    });
    // Nothing was called, or nobody knows what was; and of what was lost, whatever went on then.
    if (spent.calls.length === 0) {
      row(spent, { try: calls.length + 1, model: call.model, outcome, code, started_at: call.started_at, ended_at: message.at });
    }
  };

  /** The call is over and nothing told so: it was stopped from outside. Its result may stand in this commit after the stop. */
  const endUntold = (): void => {
    if (open === null) return;
    const call = open;
    const late = ends.find((entry) => entry.inst === call.inst);
    const lateTold = late?.t === "done" ? objectOf(late.output) : late?.t === "fail" ? (late.error.details ?? null) : null;
    end(call, "cancelled", null, spentIn(stoppedIn(message, call.inst) ?? lateTold));
    open = null;
  };

  /** What a call said of itself while it went on: of a call that a message before this one began. */
  for (const entry of message.entries) if (entry.t === "progress" && open?.inst === entry.inst) open = { ...open, tried: callsIn(entry.told) };

  for (const event of message.events) {
    switch (event.type) {
      case "session.created":
        agent = textOf(event.agent) ?? agent;
        mode = textOf(event.mode) ?? mode;
        break;
      case "session.state":
        reason = textOf(event.reason);
        if (event.to === "terminated") endUntold();
        break;
      case "turn.started":
        turn = wholeOf(event.turn) ?? turn;
        break;
      case "model.started": {
        endUntold();
        model = textOf(event.model) ?? model;
        open = {
          inst: textOf(event.inst) ?? instOfStart(message, started++, starts),
          turn: wholeOf(event.turn) ?? turn,
          step: wholeOf(event.step) ?? 0,
          attempt: wholeOf(event.attempt) ?? 1,
          model: model ?? "",
          started_at: message.at,
        };
        break;
      }
      case "superseded": {
        // Its text is void. Where a model.failed told the end before (a pause), there is no more to count.
        if (open === null) break;
        const claim = message.entries.find((entry) => entry.t === "claim");
        const lost = claim?.lost.find((inst) => MODEL_INST.test(inst)) ?? open.inst;
        const attempt = wholeOf(event.attempt) ?? open.attempt;
        const { tried: _, ...call }: OpenCall = open;
        end({ ...open, inst: lost, attempt }, "superseded", null, spentIn(event));
        open = { ...call, inst: lost, attempt: attempt + 1, started_at: message.at };
        break;
      }
      case "model.completed":
      case "model.failed": {
        const told = spentIn(event);
        const entry: Extract<Entry, { t: "done" | "fail" }> | undefined = untold.find((candidate) => candidate.inst === open?.inst) ?? untold[0];
        // An entry ends one call: another that this commit began and called off at once ended without one.
        if (entry !== undefined) untold.splice(untold.indexOf(entry), 1);
        const stopped = open === null ? undefined : stoppedIn(message, open.inst);
        const output = spentIn(stopped ?? (entry?.t === "done" ? objectOf(entry.output) : entry?.t === "fail" ? (entry.error.details ?? null) : null));
        const inst = stopped === undefined ? (entry?.inst ?? open?.inst) : open?.inst;
        if (inst === undefined) throw new Unprojectable("a model call that ended had begun");
        end(
          {
            inst,
            turn: wholeOf(event.turn) ?? open?.turn ?? turn,
            step: wholeOf(event.step) ?? open?.step ?? 0,
            attempt: wholeOf(event.attempt) ?? open?.attempt ?? 1,
            model: textOf(event.model) ?? open?.model ?? "",
            started_at: open?.started_at ?? message.at,
            ...(open?.tried === undefined ? {} : { tried: open.tried }),
          },
          event.type === "model.completed" ? "completed" : event.code === "cancelled" ? "cancelled" : "failed",
          event.type === "model.failed" ? textOf(event.code) : null,
          {
            usage: told.usage ?? output.usage,
            cost_usd_micros: told.cost_usd_micros ?? output.cost_usd_micros,
            price_version: told.price_version ?? output.price_version,
            key_source: told.key_source ?? output.key_source,
            calls: output.calls,
          },
        );
        open = null;
        break;
      }
      case "turn.completed":
      case "turn.failed":
      case "turn.cancelled":
        endUntold();
        break;
      default:
        break;
    }
  }
  for (const entry of message.entries) {
    if (entry.t !== "done" || !CONFIGURATION_INST.test(entry.inst)) continue;
    const output = objectOf(entry.output);
    const config = objectOf(output?.config);
    agent_version = wholeOf(output?.agent_version) ?? agent_version;
    config_hash = textOf(output?.hash) ?? config_hash;
    mode = textOf(config?.mode) ?? mode;
    model = model ?? textOf(config?.model);
  }

  batch.sessions.set(key, {
    ...before,
    agent,
    agent_version,
    config_hash,
    mode,
    model,
    reason,
    turn,
    state: message.state,
    updated_at: message.at,
    seq: message.seq,
    epoch: message.epoch,
    worker: message.worker,
    machine: message.machine,
    stream_sequence,
    open_call: open,
    open_tools,
  });
  batch.changed.sessions.add(key);
}

/** What calls of tools with a price came to: told to the budget in the commit that ended them. */
function paidTools(message: JournalMessage, before: SessionRecord, stream_sequence: number): UsageRecord[] {
  return message.out.flatMap((out): UsageRecord[] => {
    const [, , seq, effect, attempt] = HOLD_PATTERN.exec(textOf(out.body["hold"]) ?? "") ?? [];
    if (out.type !== "budget.settle" || effect === undefined || !TOOL_EFFECT.test(effect)) return [];
    const inst = `${seq}:${effect}`;
    const call = before.open_tools.find((open) => open.inst === inst);
    const end = message.events.find(
      ({ type, turn, step, index }) => /^tool\.(completed|failed|denied)$/.test(type) && turn === call?.turn && step === call?.step && index === call?.index,
    );
    const outcome = end === undefined ? "superseded" : end.type === "tool.completed" ? "completed" : end["code"] === "cancelled" ? "cancelled" : "failed";
    return [
      {
        tenant: message.actor.tenant,
        session: message.actor.id,
        inst,
        attempt: Number(attempt),
        turn: call?.turn ?? before.turn,
        step: call?.step ?? 0,
        agent: before.agent,
        user_id: before.user_id,
        model: textOf(out.body["model"]) ?? "tool/unknown",
        provider: "tool",
        key_source: "platform",
        input_tokens: null,
        output_tokens: null,
        cache_read_tokens: null,
        cache_write_tokens: null,
        reasoning_tokens: null,
        cost_usd_micros: wholeOf(out.body["cost_usd_micros"]),
        price_version: null,
        estimated: false,
        outcome,
        code: textOf(end?.["code"]),
        started_at: call?.started_at ?? message.at,
        ended_at: message.at,
        stream_sequence,
        try: 1,
        purpose: "tool",
        rule: null,
        first_token_ms: null,
      },
    ];
  });
}

function projectBudget(batch: Batch, message: JournalMessage): void {
  for (const event of message.events) {
    if (event.type !== "budget.settled") continue;
    const [, actor, seq, effect, attempt] = HOLD_PATTERN.exec(textOf(event.hold) ?? "") ?? [];
    const session = actor === undefined ? undefined : parseActorPath(actor);
    const cost_usd_micros = wholeOf(event.cost_usd_micros);
    if (
      session?.kind !== "session" ||
      session.tenant !== message.actor.tenant ||
      (effect !== "model" && !TOOL_EFFECT.test(effect ?? "")) ||
      cost_usd_micros === null
    )
      continue;
    batch.settlements.push({
      tenant: session.tenant,
      session: session.id,
      inst: `${seq}:${effect}`,
      attempt: Number(attempt),
      cost_usd_micros,
      assumed: event.assumed === true,
    });
  }
}

function projectTenant(batch: Batch, message: JournalMessage, stream_sequence: number): void {
  const { tenant } = message.actor;
  let row = batch.tenants.get(tenant);
  for (const entry of message.entries) {
    if (entry.t !== "init" && entry.t !== "command") continue;
    const { body } = entry;
    if (entry.t === "init")
      row = { tenant, name: textOf(body.name), state: message.state, created_at: message.at, updated_at: message.at, seq: 0, stream_sequence, own_keys: [] };
    if (entry.type === "key.create") {
      const key_id = textOf(body.key_id);
      const hash = textOf(body.hash);
      if (key_id === null || hash === null) throw new Unprojectable("a key has an id and a hash");
      const scopes = Array.isArray(body.scopes) ? body.scopes.filter((scope): scope is string => typeof scope === "string") : [];
      // The tenant refuses an id that it has listed; one that is taken again is a new key.
      const key = rowKey(tenant, key_id);
      batch.keys.set(key, { tenant, key_id, hash, scopes, label: textOf(body.label), created_at: message.at, revoked_at: null });
      batch.changed.keys.add(key);
    } else if (entry.type === "key.revoke") {
      const key = rowKey(tenant, textOf(body.key_id) ?? "");
      const known = batch.keys.get(key);
      if (known !== undefined && known.revoked_at === null) {
        batch.keys.set(key, { ...known, revoked_at: message.at });
        batch.changed.keys.add(key);
      }
    } else if (row !== undefined && (entry.type === "provider_key.put" || entry.type === "provider_key.remove")) {
      const provider = textOf(body.provider) ?? "";
      const others = row.own_keys.filter((one) => one !== provider);
      row = { ...row, own_keys: entry.type === "provider_key.put" ? [...others, provider].sort() : others };
    } else if (entry.type === "agent.put") {
      const agent = textOf(body.agent);
      const config = objectOf(body.config);
      if (agent === null || config === null) throw new Unprojectable("an agent has an id and a configuration");
      const hash = hashOf(config);
      const known = batch.agents.get(rowKey(tenant, agent));
      // The same configuration again is the same version.
      if (known?.hash !== hash) {
        const version: AgentRecord = { tenant, agent, version: (known?.version ?? 0) + 1, hash, config, created_at: message.at };
        batch.agents.set(rowKey(tenant, agent), version);
        batch.agent_versions.push(version);
      }
    }
  }
  if (row === undefined) throw new Unprojectable("a tenant's journal begins with its init entry");
  batch.tenants.set(tenant, { ...row, state: message.state, updated_at: message.at, seq: message.seq, stream_sequence });
  batch.changed.tenants.add(tenant);
}

/** What a usage row costs after its attempt was settled. */
export type UsageCost = Pick<UsageRecord, "tenant" | "session" | "inst" | "attempt" | "try" | "cost_usd_micros" | "estimated">;

const attemptKey = ({ tenant, session, inst, attempt }: Pick<UsageRecord, "tenant" | "session" | "inst" | "attempt">): string =>
  `${tenant}/${session}/${inst}/${attempt}`;

/**
 * R3. What the budget settled for an attempt, shared out over its calls: each costs what it said, as far as the sum goes; what is left over is that
 * of the call whose cost nobody knew, the last one of several. So the rows of an attempt sum to the ledger, whatever was known of them.
 * `rows` are all rows of these attempts; answers those that change.
 */
export function settledCosts(settlements: readonly SettlementRecord[], rows: readonly UsageRecord[]): UsageCost[] {
  const calls = new Map<string, UsageRecord[]>();
  for (const row of rows) calls.set(attemptKey(row), [...(calls.get(attemptKey(row)) ?? []), row]);
  return settlements.flatMap((settled) => {
    const of_attempt = (calls.get(attemptKey(settled)) ?? []).toSorted((a, b) => a.try - b.try);
    const known_all = of_attempt.reduce((sum, row) => sum + (row.cost_usd_micros ?? 0), 0);
    const takes_rest = of_attempt.findLast((row) => row.cost_usd_micros === null) ?? of_attempt.at(-1);
    let known_before = 0;
    return of_attempt.flatMap((row): UsageCost[] => {
      const known = row.cost_usd_micros ?? 0;
      const rest = row === takes_rest ? Math.max(settled.cost_usd_micros - known_all, 0) : 0;
      const cost_usd_micros = Math.min(known, Math.max(settled.cost_usd_micros - known_before, 0)) + rest;
      known_before += known;
      const estimated = row.estimated || (settled.assumed && row === takes_rest);
      if (cost_usd_micros === row.cost_usd_micros && estimated === row.estimated) return [];
      const { tenant, session, inst, attempt, try: number } = row;
      return [{ tenant, session, inst, attempt, try: number, cost_usd_micros, estimated }];
    });
  });
}

/** A text as it can rest in Postgres: no NUL, no half of a character. Commands with such text are refused; what others write is mended. */
function storableText(text: string): string {
  return text.replaceAll("\u0000", "\ufffd").toWellFormed();
}

export function storable(value: unknown): unknown {
  if (typeof value === "string") return storableText(value);
  if (Array.isArray(value)) return value.map(storable);
  if (value !== null && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [storableText(key), storable(item)]));
  return value;
}

/**
 * Has this JSON nothing that Postgres cannot hold? JSON writes both kinds as escapes. The answer may be no for an innocent text (a backslash before
 * "u0000"); then mending changes nothing.
 */
export const isStorable = (json: string): boolean => !/\\u(0000|d[89a-f])/i.test(json);

/** Rows as the one parameter of a bulk insert. */
export function rowsJson(rows: Iterable<unknown>): string {
  const all = [...rows];
  const json = JSON.stringify(all);
  assert(json !== undefined, "rows are JSON");
  return isStorable(json) ? json : JSON.stringify(storable(all));
}
