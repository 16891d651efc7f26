// queries: what gateways and the command line read from Postgres. Every query of a tenant's rows takes the tenant first.
//
// Invariants:
//   Q1. A tenant's query names the tenant in its where clause, and is made for that tenant alone: were the clause forgotten, the database
//       would still show no other's row. The tenant comes from the credential, never from the request.
//   Q2. Pages continue by a key that never changes for a row, so no row is told twice or left out while others arrive.
//   Q3. Cursors are opaque; a forged one can only name a place in the asking tenant's own rows.
import { createHash } from "node:crypto";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { UsageFilter } from "../protocol/usage-filter.ts";
import { type AuditRecord, PROJECTION_NAME } from "./rows.ts";
import type { AuditHead, ChainedRow } from "./audit-chain.ts";
import { type Database, faultOf, type Value } from "./database.ts";

/** A page a person reads without scrolling for a day. */
export const PAGE_LIMIT_DEFAULT = 50;
export const PAGE_LIMIT_MAX = 500;

export interface Page<T> {
  readonly items: readonly T[];
  /** Give it as `after` for the next page; null when this was the last. */
  readonly next: string | null;
}

export interface PageRequest {
  readonly limit?: number | undefined;
  readonly after?: string | undefined;
}

export interface SessionRow {
  readonly session: string;
  readonly agent: string;
  readonly agent_version: number | null;
  readonly config_hash: string | null;
  readonly external_id: string | null;
  readonly user: string | null;
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
}

export type UsageOutcome = "completed" | "failed" | "cancelled" | "superseded";

/** One call of a model. */
export interface UsageRow {
  readonly session: string;
  readonly inst: string;
  readonly attempt: number;
  /** Counts the calls of one attempt, from 1: again, or of another model. */
  readonly try: number;
  readonly purpose: "answer" | "guardrail" | "tool";
  /** Of a guardrail that had something judged: its name. */
  readonly rule: string | null;
  readonly turn: number;
  readonly step: number;
  readonly agent: string;
  readonly user: string | null;
  readonly model: string;
  readonly provider: string;
  readonly key_source: "platform" | "tenant";
  /** Token counts and cost are null when nobody knows them: a call that was cut off, a provider that does not say. */
  readonly input_tokens: number | null;
  readonly output_tokens: number | null;
  readonly cache_read_tokens: number | null;
  readonly cache_write_tokens: number | null;
  readonly reasoning_tokens: number | null;
  readonly cost_usd_micros: number | null;
  /** 0 of a call with the tenant's own key: the provider bills it to the tenant. */
  readonly billed_usd_micros: number | null;
  readonly price_version: string | null;
  /** The provider did not say; the counts are ours. */
  readonly estimated: boolean;
  readonly outcome: UsageOutcome;
  readonly code: string | null;
  readonly started_at: string;
  readonly ended_at: string;
  readonly latency_ms: number;
  readonly first_token_ms: number | null;
  readonly stream_sequence: number;
}

export interface UsageTotal {
  readonly agent: string;
  readonly model: string;
  /** Calls of models: each try counts. */
  readonly attempts: number;
  /** Those whose cost is unknown; `cost_usd_micros` leaves them out. */
  readonly attempts_unpriced: number;
  readonly input_tokens: number;
  readonly output_tokens: number;
  readonly cache_read_tokens: number;
  readonly cache_write_tokens: number;
  readonly reasoning_tokens: number;
  readonly cost_usd_micros: number;
}

/** One day's calls (of UTC, by their end) of an agent on a model under one kind of key. */
export interface UsageDay {
  readonly day: string;
  readonly agent: string;
  readonly model: string;
  readonly provider: string;
  readonly key_source: "platform" | "tenant";
  readonly calls: number;
  /** Those that did not complete: failed, cancelled, or lost with their worker. */
  readonly failed: number;
  readonly unpriced: number;
  readonly input_tokens: number;
  readonly output_tokens: number;
  readonly cache_read_tokens: number;
  readonly cache_write_tokens: number;
  readonly reasoning_tokens: number;
  readonly cost_usd_micros: number;
}

/** As the projector wrote it; `chain` is of the tenant's row before it and of this one: audit-chain.ts. */
export type AuditRow = Omit<AuditRecord, "tenant"> & { readonly chain: string };

export interface AuditFilter {
  readonly kind?: string | undefined;
  readonly actor?: string | undefined;
  readonly entry_type?: string | undefined;
  readonly command_type?: string | undefined;
  readonly principal?: string | undefined;
  readonly tool?: string | undefined;
  readonly since?: string | undefined;
  readonly until?: string | undefined;
}

export interface PositionRow {
  readonly name: string;
  readonly stream: string;
  readonly incarnation: string | null;
  readonly position: number;
  readonly updated_at: string;
}

/** What the projection holds of one actor's entries, for `troupe verify` to compare with the journal. */
export interface AuditHash {
  readonly stream_sequence: number;
  readonly entry_index: number;
  readonly seq: number;
  readonly hash: string;
}
export interface AuditSummary {
  readonly rows: number;
  readonly stream_sequence_max: number;
  readonly seq_max: number;
  /** digestOf its hashes in order. */
  readonly digest: string;
}

export interface AuditEnd {
  readonly position: number;
  /** Rows that stand where nothing is projected yet: nobody of ours wrote them. */
  readonly beyond: number;
  readonly head: AuditHead | undefined;
}

export interface Queries {
  readonly sessions: {
    /** Newest first. */
    list(tenant: string, request?: PageRequest & { state?: string | undefined; agent?: string | undefined }): Promise<Page<SessionRow>>;
    get(tenant: string, session: string): Promise<SessionRow | undefined>;
  };
  /** Attempts, newest first. */
  usage(tenant: string, request?: PageRequest & UsageFilter): Promise<Page<UsageRow>>;
  /** Sums by agent and model, dearest first. */
  usage_totals(tenant: string, filter?: UsageFilter): Promise<UsageTotal[]>;
  /** The same day by day, oldest first, and by whose key was used. */
  usage_daily(tenant: string, filter?: UsageFilter): Promise<UsageDay[]>;
  /** Entries, newest first. */
  audit(tenant: string, request?: PageRequest & AuditFilter): Promise<Page<AuditRow>>;
  /** Every audit row of a tenant with its chain, in the stream's order up to `through`, read in pages. */
  audit_chain(tenant: string, through?: number): AsyncIterable<ChainedRow>;
  /** Up to where everything is projected, and where the tenant's chain ended at that very moment. */
  audit_end(tenant: string): Promise<AuditEnd>;
  /** What each tenant's usage rows sum to, and how far the projection is, of one moment. An operator's. */
  usage_costs(): Promise<{ position: number; tenants: readonly { tenant: string; cost_usd_micros: number }[] }>;
  /** The tenants that have rows in the audit or a head. An operator's. */
  audit_tenants(): Promise<string[]>;
  /** How far each projector is; compare with `bus.bounds("EVENTS")` for its lag. */
  positions(): Promise<PositionRow[]>;
  audit_summary(actor: ActorAddress): Promise<AuditSummary>;
  /** The audit row of each of an actor's entries, in order, read in pages. */
  audit_hashes(actor: ActorAddress): AsyncIterable<AuditHash>;
}

/** One text for many hashes: equal exactly when all are equal and in the same order. */
export function digestOf(hashes: Iterable<string>): string {
  const sum = createHash("sha256");
  for (const hash of hashes) sum.update(hash);
  return sum.digest("hex");
}

const invalid = (message: string, pointer: string): TroupeError => new TroupeError(errorBody("invalid", message, { errors: [{ pointer, message }] }));

/** A cursor is a row's key: base64url of a JSON array of strings and numbers, of the length and types that are expected. */
function cursorOf(key: readonly (string | number)[]): string {
  return Buffer.from(JSON.stringify(key)).toString("base64url");
}
function keyOf(cursor: string, types: readonly ("string" | "number")[]): (string | number)[] {
  let key: unknown;
  try {
    key = JSON.parse(Buffer.from(cursor, "base64url").toString("utf8"));
  } catch (error) {
    throw new TroupeError(errorBody("invalid", "'after' is not a cursor of ours"), { cause: error });
  }
  const fits =
    Array.isArray(key) &&
    key.length === types.length &&
    key.every((part, index) => typeof part === types[index] && (typeof part === "number" ? Number.isSafeInteger(part) : !part.includes("\u0000")));
  if (!fits) throw invalid("'after' is not a cursor of ours", "/after");
  return key as (string | number)[];
}

function limitOf(limit: number | undefined): number {
  if (limit === undefined) return PAGE_LIMIT_DEFAULT;
  if (!Number.isInteger(limit) || limit < 1 || limit > PAGE_LIMIT_MAX) throw invalid(`'limit' is 1 to ${PAGE_LIMIT_MAX}`, "/limit");
  return limit;
}

/** A time as a parameter, or null. Postgres would take 'now' and 'infinity' too. */
function timeOf(text: string | undefined, name: string): string | null {
  if (text === undefined) return null;
  const ms = Date.parse(text);
  if (Number.isNaN(ms) || !/^\d{4}-\d\d-\d\d/.test(text)) throw invalid(`'${name}' is not an RFC 3339 time`, `/${name}`);
  return new Date(ms).toISOString();
}

/** No stored text has a NUL, so a filter with one finds nothing; Postgres would refuse the parameter instead. */
const filterOf = (text: string | undefined): string | null => (text === undefined ? null : text.replaceAll("\u0000", "\ufffd"));

const SESSION_COLUMNS = `session, agent, agent_version, config_hash, external_id, user_id as "user", mode, metadata, model, state, reason, turn,
  created_at, updated_at, seq, epoch, worker`;
/** What is the platform's to bill: a call with the tenant's own key is metered, and billed by the provider to the tenant. */
const BILLED = "case when key_source = 'tenant' then 0 else cost_usd_micros end";
const USAGE_COLUMNS = `session, inst, attempt, try, purpose, rule, turn, step, agent, user_id as "user", model, provider, key_source, input_tokens, output_tokens,
  cache_read_tokens, cache_write_tokens, reasoning_tokens, cost_usd_micros, ${BILLED} as billed_usd_micros, price_version, estimated, outcome, code,
  started_at, ended_at, (extract(epoch from ended_at - started_at) * 1000)::bigint as latency_ms, first_token_ms, stream_sequence`;
const AUDIT_COLUMNS = `kind, actor, stream_sequence, entry_index, seq, at, epoch, worker, machine, entry_type, command_type, channel, key, source, inst, code,
  state_after, events, trace, principal, hash, tool, args_hash, result_hash, decision, duration_ms, cost_usd_micros, attempts, chain`;
const USAGE_FILTER = `tenant = $1 and ($2::text is null or session = $2) and ($3::text is null or agent = $3) and ($4::text is null or user_id = $4)
  and ($5::text is null or model = $5) and ($6::timestamptz is null or ended_at >= $6) and ($7::timestamptz is null or ended_at < $7)`;

const usageFilterValues = (tenant: string, filter: UsageFilter): [string, ...Value[]] => [
  tenant,
  filterOf(filter.session),
  filterOf(filter.agent),
  filterOf(filter.user),
  filterOf(filter.model),
  timeOf(filter.since, "since"),
  timeOf(filter.until, "until"),
];

export function createQueries(database: Database): Queries {
  /** Readers stand at an edge: there a database that is away is an error of the request, with its stable code. */
  async function ask<R>(reading: Promise<R[]>): Promise<R[]> {
    try {
      return await reading;
    } catch (error) {
      throw new TroupeError(errorBody("unavailable", `what was projected cannot be read now: ${faultOf(error).reason}`), { cause: error });
    }
  }

  /** For the tenant of the first parameter. Q1 */
  function read<R>(sql: string, values: readonly [string, ...Value[]]): Promise<R[]> {
    return ask(database.read<R>({ kind: "tenant", tenant: values[0] }, sql, values));
  }

  /** Asks for one row more than the page holds: that there is one tells that there is a next page. */
  async function page<R>(sql: string, values: readonly [string, ...Value[]], limit: number, keyOfRow: (row: R) => (string | number)[]): Promise<Page<R>> {
    const rows = await read<R>(sql, [...values, limit + 1]);
    const items = rows.slice(0, limit);
    const last = items.at(-1);
    return { items, next: rows.length > limit && last !== undefined ? cursorOf(keyOfRow(last)) : null };
  }

  return {
    sessions: {
      list(tenant, { state, agent, limit, after } = {}) {
        const [created_at = null, session = null] = after === undefined ? [] : keyOf(after, ["string", "string"]);
        return page<SessionRow>(
          `select ${SESSION_COLUMNS} from sessions
           where tenant = $1 and ($2::text is null or state = $2) and ($3::text is null or agent = $3)
             and ($4::timestamptz is null or (created_at, session) < ($4, $5))
           order by created_at desc, session desc limit $6`,
          [tenant, filterOf(state), filterOf(agent), created_at === null ? null : timeOf(String(created_at), "after"), session],
          limitOf(limit),
          (row) => [row.created_at, row.session],
        );
      },
      async get(tenant, session) {
        const [row] = await read<SessionRow>(`select ${SESSION_COLUMNS} from sessions where tenant = $1 and session = $2`, [tenant, filterOf(session)]);
        return row;
      },
    },

    usage(tenant, request = {}) {
      const [sequence = null, inst = null, attempt = null, number = null] =
        request.after === undefined ? [] : keyOf(request.after, ["number", "string", "number", "number"]);
      return page<UsageRow>(
        `select ${USAGE_COLUMNS} from llm_usage_events
         where ${USAGE_FILTER} and ($8::bigint is null or (stream_sequence, inst, attempt, try) < ($8, $9, $10, $11))
         order by stream_sequence desc, inst desc, attempt desc, try desc limit $12`,
        [...usageFilterValues(tenant, request), sequence, inst, attempt, number],
        limitOf(request.limit),
        (row) => [row.stream_sequence, row.inst, row.attempt, row.try],
      );
    },

    usage_totals(tenant, filter = {}) {
      return read<UsageTotal>(
        `select agent, model, count(*) as attempts, count(*) filter (where cost_usd_micros is null) as attempts_unpriced,
           coalesce(sum(input_tokens), 0)::bigint as input_tokens, coalesce(sum(output_tokens), 0)::bigint as output_tokens,
           coalesce(sum(cache_read_tokens), 0)::bigint as cache_read_tokens, coalesce(sum(cache_write_tokens), 0)::bigint as cache_write_tokens,
           coalesce(sum(reasoning_tokens), 0)::bigint as reasoning_tokens, coalesce(sum(cost_usd_micros), 0)::bigint as cost_usd_micros
         from llm_usage_events where ${USAGE_FILTER}
         group by agent, model order by cost_usd_micros desc, agent, model`,
        usageFilterValues(tenant, filter),
      );
    },

    usage_daily(tenant, filter = {}) {
      return read<UsageDay>(
        `select to_char(ended_at at time zone 'UTC', 'YYYY-MM-DD') as day, agent, model, provider, key_source, count(*) as calls,
           count(*) filter (where outcome <> 'completed') as failed, count(*) filter (where cost_usd_micros is null) as unpriced,
           coalesce(sum(input_tokens), 0)::bigint as input_tokens, coalesce(sum(output_tokens), 0)::bigint as output_tokens,
           coalesce(sum(cache_read_tokens), 0)::bigint as cache_read_tokens, coalesce(sum(cache_write_tokens), 0)::bigint as cache_write_tokens,
           coalesce(sum(reasoning_tokens), 0)::bigint as reasoning_tokens, coalesce(sum(cost_usd_micros), 0)::bigint as cost_usd_micros
         from llm_usage_events where ${USAGE_FILTER}
         group by day, agent, model, provider, key_source order by day, cost_usd_micros desc, agent, model, key_source`,
        usageFilterValues(tenant, filter),
      );
    },

    audit(tenant, request = {}) {
      const [sequence = null, index = null] = request.after === undefined ? [] : keyOf(request.after, ["number", "number"]);
      return page<AuditRow>(
        `select ${AUDIT_COLUMNS} from audit
         where tenant = $1 and ($2::text is null or kind = $2) and ($3::text is null or actor = $3) and ($4::text is null or entry_type = $4)
           and ($5::text is null or command_type = $5) and ($6::timestamptz is null or at >= $6) and ($7::timestamptz is null or at < $7)
           and ($8::bigint is null or (stream_sequence, entry_index) < ($8, $9)) and ($10::text is null or principal = $10)
           and ($11::text is null or tool = $11)
         order by stream_sequence desc, entry_index desc limit $12`,
        [
          tenant,
          filterOf(request.kind),
          filterOf(request.actor),
          filterOf(request.entry_type),
          filterOf(request.command_type),
          timeOf(request.since, "since"),
          timeOf(request.until, "until"),
          sequence,
          index,
          filterOf(request.principal),
          filterOf(request.tool),
        ],
        limitOf(request.limit),
        (row) => [row.stream_sequence, row.entry_index],
      );
    },

    async *audit_chain(tenant, through = Number.MAX_SAFE_INTEGER) {
      let sequence = 0;
      let index = -1;
      for (;;) {
        const rows = await read<ChainedRow>(
          `select tenant, ${AUDIT_COLUMNS} from audit
           where tenant = $1 and (stream_sequence, entry_index) > ($2, $3) and stream_sequence <= $4
           order by stream_sequence, entry_index limit 1000`,
          [tenant, sequence, index, through],
        );
        yield* rows;
        const last = rows.at(-1);
        if (last === undefined || rows.length < 1000) return;
        sequence = last.stream_sequence;
        index = last.entry_index;
      }
    },

    async audit_end(tenant) {
      const [end] = await read<{ position: number; beyond: number; rows: number | null; stream_sequence: number | null; chain: string | null }>(
        `select position, (select count(*) from audit where tenant = $1 and stream_sequence > position) as beyond, rows, stream_sequence, chain
         from projection_positions left join audit_heads on tenant = $1 where name = $2`,
        [tenant, PROJECTION_NAME],
      );
      if (end === undefined) return { position: 0, beyond: 0, head: undefined };
      const { position, beyond, rows, stream_sequence, chain } = end;
      return { position, beyond, head: rows === null || stream_sequence === null || chain === null ? undefined : { rows, stream_sequence, chain } };
    },

    async usage_costs() {
      const rows = await ask(
        database.read<{ position: number; tenant: string | null; cost_usd_micros: number }>(
          { kind: "operator" },
          `select position, tenant, cost_usd_micros from projection_positions
           left join (select tenant, coalesce(sum(cost_usd_micros), 0)::bigint as cost_usd_micros from llm_usage_events group by tenant) as sums on true
           where name = $1`,
          [PROJECTION_NAME],
        ),
      );
      const tenants = rows.flatMap(({ tenant, cost_usd_micros }) => (tenant === null ? [] : [{ tenant, cost_usd_micros }]));
      return { position: rows[0]?.position ?? 0, tenants };
    },

    async audit_tenants() {
      const rows = await ask(
        database.read<{ tenant: string }>({ kind: "operator" }, "select tenant from audit_heads union select distinct tenant from audit order by tenant"),
      );
      return rows.map(({ tenant }) => tenant);
    },

    positions() {
      return ask(database.query<PositionRow>("select name, stream, incarnation, position, updated_at from projection_positions order by name"));
    },

    async audit_summary(actor) {
      const [row] = await read<AuditSummary>(
        `select count(*) as rows, coalesce(max(stream_sequence), 0)::bigint as stream_sequence_max, coalesce(max(seq), 0)::bigint as seq_max,
           encode(sha256(coalesce(string_agg(hash, '' order by stream_sequence, entry_index), '')::bytea), 'hex') as digest
         from audit where tenant = $1 and kind = $2 and actor = $3 and tool is null`,
        [actor.tenant, actor.kind, actor.id],
      );
      return row as AuditSummary;
    },

    async *audit_hashes(actor) {
      let sequence = 0;
      let index = -1;
      for (;;) {
        const rows = await read<AuditHash>(
          `select stream_sequence, entry_index, seq, hash from audit
           where tenant = $1 and kind = $2 and actor = $3 and tool is null and (stream_sequence, entry_index) > ($4, $5)
           order by stream_sequence, entry_index limit 1000`,
          [actor.tenant, actor.kind, actor.id, sequence, index],
        );
        yield* rows;
        const last = rows.at(-1);
        if (last === undefined || rows.length < 1000) return;
        sequence = last.stream_sequence;
        index = last.entry_index;
      }
    },
  };
}
