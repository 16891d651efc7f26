// postgres-rows: the projection's rows in Postgres: one statement for each thing that is read or written, and nothing decided here.
import { assert } from "../protocol/assert.ts";
import type { Database, Transaction } from "./database.ts";
import type { Position, RowStore, RowTransaction, TenantHead } from "./row-store.ts";
import {
  type AgentRecord,
  type KeyRecord,
  PROJECTION_NAME,
  PROJECTION_STREAM,
  rowsJson,
  type SessionRecord,
  type TenantRecord,
  type UsageRecord,
} from "./rows.ts";

/** Another projector holds the position at most for one batch; the server ends a forgotten transaction after 15 s. */
const LOCK_PATIENCE_MS = 5_000;

const UPSERT_HEADS = `
  insert into audit_heads select * from json_populate_recordset(null::audit_heads, $1::json)
  on conflict (tenant) do update set rows = excluded.rows, stream_sequence = excluded.stream_sequence, chain = excluded.chain`;
const UPSERT_SESSIONS = `
  insert into sessions select * from json_populate_recordset(null::sessions, $1::json)
  on conflict (tenant, session) do update set
    agent = excluded.agent, agent_version = excluded.agent_version, config_hash = excluded.config_hash, mode = excluded.mode, model = excluded.model,
    state = excluded.state, reason = excluded.reason, turn = excluded.turn, updated_at = excluded.updated_at, seq = excluded.seq, epoch = excluded.epoch,
    worker = excluded.worker, machine = excluded.machine, stream_sequence = excluded.stream_sequence, open_call = excluded.open_call,
    open_tools = excluded.open_tools`;
const UPSERT_TENANTS = `
  insert into tenants select * from json_populate_recordset(null::tenants, $1::json)
  on conflict (tenant) do update set state = excluded.state, updated_at = excluded.updated_at, seq = excluded.seq, stream_sequence = excluded.stream_sequence,
    own_keys = excluded.own_keys`;
const UPSERT_KEYS = `
  insert into keys select * from json_populate_recordset(null::keys, $1::json)
  on conflict (tenant, key_id) do update set hash = excluded.hash, scopes = excluded.scopes, label = excluded.label, created_at = excluded.created_at,
    revoked_at = excluded.revoked_at`;
const SET_COSTS = `
  update llm_usage_events as used set cost_usd_micros = costs.cost_usd_micros, estimated = costs.estimated
  from json_to_recordset($1::json)
    as costs (tenant text, session text, inst text, attempt integer, try integer, cost_usd_micros bigint, estimated boolean)
  where used.tenant = costs.tenant and used.session = costs.session and used.inst = costs.inst and used.attempt = costs.attempt and used.try = costs.try`;

export function postgresRows(database: Database): RowStore {
  return {
    position: () => readPosition(database),
    transaction: (work) =>
      database.transaction(async (transaction) => {
        // Rows and position are lost together when Postgres dies with its last milliseconds unwritten, and P2 reads them again: waiting
        // for the disk here would protect nothing and take the disk from the journal.
        // As a role that may add to the audit and not change it, whoever the connection belongs to.
        await transaction.query(
          "select set_config('role', 'troupe_projector', true), set_config('synchronous_commit', 'off', true), set_config('lock_timeout', $1, true)",
          [String(LOCK_PATIENCE_MS)],
        );
        return work(rowsWithin(transaction));
      }),
  };
}

function rowsWithin(transaction: Transaction): RowTransaction {
  const put =
    (statement: string) =>
    async (rows: readonly object[]): Promise<void> => {
      await transaction.query(statement, [rowsJson(rows)]);
    };
  return {
    async position() {
      const [row] = await transaction.query<Position>("select position, incarnation from projection_positions where name = $1 for update", [PROJECTION_NAME]);
      return row;
    },
    async moveTo({ position, incarnation }) {
      const statement = "update projection_positions set position = $2, incarnation = $3, updated_at = now() where name = $1";
      await transaction.query(statement, [PROJECTION_NAME, position, incarnation]);
    },

    sessions: (wanted) =>
      transaction.query<SessionRecord>(
        "select sessions.* from json_to_recordset($1::json) as wanted (tenant text, session text) join sessions using (tenant, session)",
        [JSON.stringify(wanted)],
      ),
    tenants: (tenants) => transaction.query<TenantRecord>("select * from tenants where tenant = any($1::text[])", [tenants]),
    keys: (tenants) => transaction.query<KeyRecord>("select * from keys where tenant = any($1::text[])", [tenants]),
    newestAgents: (tenants) =>
      transaction.query<AgentRecord>("select distinct on (tenant, agent) * from agents where tenant = any($1::text[]) order by tenant, agent, version desc", [
        tenants,
      ]),
    auditHeads: (tenants) =>
      transaction.query<TenantHead>("select tenant, rows, stream_sequence, chain from audit_heads where tenant = any($1::text[])", [tenants]),
    usageOf: (attempts) =>
      transaction.query<UsageRecord>(
        `select used.* from json_to_recordset($1::json) as wanted (tenant text, session text, inst text, attempt integer)
         join llm_usage_events as used using (tenant, session, inst, attempt)`,
        [rowsJson(attempts.map(({ tenant, session, inst, attempt }) => ({ tenant, session, inst, attempt })))],
      ),

    putSessions: put(UPSERT_SESSIONS),
    putTenants: put(UPSERT_TENANTS),
    putKeys: put(UPSERT_KEYS),
    putAuditHeads: put(UPSERT_HEADS),
    addAgents: put("insert into agents select * from json_populate_recordset(null::agents, $1::json)"),
    addAudit: put("insert into audit select * from json_populate_recordset(null::audit, $1::json)"),
    async addUsage(rows) {
      const written = await transaction.query(
        "insert into llm_usage_events select * from json_populate_recordset(null::llm_usage_events, $1::json) on conflict do nothing returning attempt",
        [rowsJson(rows)],
      );
      return written.length;
    },
    setCosts: put(SET_COSTS),
  };
}

async function readPosition(database: Database): Promise<Position> {
  await database.query("insert into projection_positions (name, stream) values ($1, $2) on conflict do nothing", [PROJECTION_NAME, PROJECTION_STREAM]);
  const [row] = await database.query<Position>("select position, incarnation from projection_positions where name = $1", [PROJECTION_NAME]);
  assert(row !== undefined, "the position that was made is there");
  return row;
}

const PROJECTED_TABLES = "tenants, keys, agents, sessions, audit, audit_heads, llm_usage_events";

/**
 * Empties the projected tables and sets the position before the first message. Running projectors begin anew by themselves.
 * With the credential of the tables' owner: those that project may not empty the audit.
 */
export async function resetProjection(database: Database): Promise<void> {
  await readPosition(database);
  await database.transaction(async (transaction) => {
    // The position first, as every projector does: so nobody writes between the emptying and the commit.
    await transaction.query("select 1 from projection_positions where name = $1 for update", [PROJECTION_NAME]);
    await transaction.query(`truncate ${PROJECTED_TABLES}`);
    await transaction.query("update projection_positions set position = 0, incarnation = null, updated_at = now() where name = $1", [PROJECTION_NAME]);
  });
}
