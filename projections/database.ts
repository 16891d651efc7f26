// database: Postgres as the projections use it: a bounded pool, transactions, and the migrations of its schema.
//
// Invariants:
//   D1. SQL is constant text; everything that varies travels as a parameter.
//   D2. No wait is without end: connecting, a statement, a lock, and a transaction that its owner forgot all have a limit.
//   D3. A failure says by its kind what to do next: wait, or stop and look. Nobody reads a message text to decide.
//   D4. A tenant's rows are read as a role that row-level security binds, with that one tenant set, whoever the connection belongs to.
import { fileURLToPath } from "node:url";
import pg from "pg";
import { assert } from "../protocol/assert.ts";
import { errorFields, type Log } from "../protocol/log.ts";

const MIGRATIONS = fileURLToPath(new URL("../migrations", import.meta.url));
const MIGRATIONS_TABLE = "schema_migrations";

/** A first connection to a Postgres on another continent takes under a second; five mean that it is away. */
const CONNECT_PATIENCE_MS = 5_000;
/** The largest statement of ours, a batch of 500 messages, takes under 100 ms. A minute means that something is stuck. */
const STATEMENT_PATIENCE_MS = 60_000;
/** The server ends a transaction whose owner went quiet (stopped, cut off), so that its locks come free for the next one. */
const FORGOTTEN_TRANSACTION_MS = 15_000;
/** Readers of one gateway, at once; more wait their turn. */
const POOL_SIZE_DEFAULT = 8;

export type Value = string | number | boolean | null | readonly string[];

export interface Transaction {
  query<R>(sql: string, values?: readonly Value[]): Promise<R[]>;
}

/** As whom a transaction reads: for one tenant, or as an operator, who looks at every tenant's rows. */
export type Reader = { readonly kind: "tenant"; readonly tenant: string } | { readonly kind: "operator" };

export interface Database extends Transaction {
  /**
   * Runs `work` between BEGIN and COMMIT. When it throws, or the commit fails, the error comes back as it is.
   *
   * Promises: after an answer all of it is stored; after an error none of it is, except that a connection lost during COMMIT leaves
   *           it open which. Callers that must know read it back.
   */
  transaction<T>(work: (transaction: Transaction) => Promise<T>): Promise<T>;
  /** Runs one query as this reader, in a transaction of its own that cannot write. D4 */
  read<R>(reader: Reader, sql: string, values?: readonly Value[]): Promise<R[]>;
  /** Brings the schema to the newest version under an advisory lock. Answers the names of the migrations it ran. */
  migrate(): Promise<string[]>;
  close(): Promise<void>;
}

export interface DatabaseOptions {
  /** `postgres://user:password@host:port/database` */
  readonly url: string;
  /** What Postgres shows in pg_stat_activity. */
  readonly application_name: string;
  readonly log: Log;
  readonly pool_size_max?: number;
}

/** 20 is int8, 1184 is timestamptz. Sequences and micro-dollars stay far below 2^53; times leave as they stand on the wire. */
function parserOf(oid: number): (text: string) => unknown {
  if (oid === 20) return safeInteger;
  const parse = pg.types.getTypeParser(oid, "text") as (text: string) => unknown;
  if (oid === 1184) return (text) => (parse(text) as Date).toISOString();
  return parse;
}

function safeInteger(text: string): number {
  const value = Number(text);
  assert(Number.isSafeInteger(value), "a stored integer is below 2^53");
  return value;
}

/** Opens no connection before the first query. */
export function createDatabase({ url, application_name, log, pool_size_max = POOL_SIZE_DEFAULT }: DatabaseOptions): Database {
  const pool = new pg.Pool({
    connectionString: url,
    application_name,
    max: pool_size_max,
    connectionTimeoutMillis: CONNECT_PATIENCE_MS,
    query_timeout: STATEMENT_PATIENCE_MS + 5_000,
    statement_timeout: STATEMENT_PATIENCE_MS,
    idle_in_transaction_session_timeout: FORGOTTEN_TRANSACTION_MS,
    keepAlive: true,
    allowExitOnIdle: false,
    types: { getTypeParser: parserOf as typeof pg.types.getTypeParser },
  });
  // An idle connection that breaks has nobody waiting for it; the pool forgets it and makes another when asked.
  pool.on("error", (error) => log.warn("an idle database connection was lost", errorFields(error)));

  const run = async <R>(client: pg.Pool | pg.PoolClient, sql: string, values: readonly Value[]): Promise<R[]> => {
    const result = await client.query(sql, values as unknown[]);
    return result.rows as R[];
  };

  /** Runs `work` between `begin` and COMMIT. */
  async function within<T>(begin: string, work: (transaction: Transaction) => Promise<T>): Promise<T> {
    const client = await pool.connect();
    // Between two statements a lost connection is told by an event, which nobody hears would end the process.
    const lost = (error: Error): void => log.debug("a database connection was lost inside a transaction", errorFields(error));
    client.on("error", lost);
    try {
      await client.query(begin);
      const answer = await work({ query: (sql, values = []) => run(client, sql, values) });
      await client.query("commit");
      client.off("error", lost);
      client.release();
      return answer;
    } catch (error) {
      // Only a connection on which ROLLBACK was answered is known to be clean; any other is thrown away.
      const clean = await client.query("rollback").then(
        () => true,
        () => false,
      );
      client.off("error", lost);
      client.release(!clean);
      throw error;
    }
  }

  return {
    query: (sql, values = []) => run(pool, sql, values),
    transaction: (work) => within("begin", work),

    read: (reader, sql, values = []) =>
      within("begin read only", async (transaction) => {
        const [role, tenant] = reader.kind === "tenant" ? ["troupe_app", reader.tenant] : ["troupe_operator", ""];
        await transaction.query("select set_config('role', $1, true), set_config('troupe.tenant', $2, true)", [role, tenant]); // D4
        return transaction.query(sql, values);
      }),

    async migrate() {
      // Loaded here because it brings a TypeScript loader with it, which costs every other start 80 ms.
      const { runner } = await import("node-pg-migrate");
      const quiet = {
        debug: undefined,
        info: () => {},
        warn: (text: string) => log.warn("a migration warns", { text }),
        error: (text: string) => log.error("a migration fails", { text }),
      };
      // Its own connection: the advisory lock belongs to a session, and a long migration must not meet the pool's statement limit.
      // Made here, because the runner's own has nobody who hears its errors (one of them ends the process) and is left half closed.
      const client = new pg.Client({ connectionString: url, application_name: `${application_name} migrations`, connectionTimeoutMillis: CONNECT_PATIENCE_MS });
      client.on("error", (error) => log.debug("the migrations' connection was lost", errorFields(error)));
      await client.connect();
      try {
        const applied = await runner({
          dbClient: client,
          dir: MIGRATIONS,
          migrationsTable: MIGRATIONS_TABLE,
          direction: "up",
          singleTransaction: true,
          advisoryLockMode: "wait",
          logger: quiet as never,
        });
        for (const { name } of applied) log.info("a migration was applied", { name });
        return applied.map(({ name }) => name);
      } finally {
        await client.end();
      }
    },

    async close() {
      await pool.end();
    },
  };
}

/**
 * What a failure of the database means for whoever wrote to it:
 * `content`      these very values cannot be stored; a repeat fails the same way
 * `unavailable`  it is away, busy, or not migrated yet; a repeat may succeed
 */
export function faultOf(error: unknown): { readonly kind: "content" | "unavailable"; readonly reason: string } {
  const code = error instanceof Error && "code" in error && typeof error.code === "string" ? error.code : "";
  const reason = error instanceof Error && error.message !== "" ? error.message : code || String(error);
  if (code === "22023" && reason.includes("troupe_"))
    return { kind: "unavailable", reason: `${reason}: the roles of the database are not there; run \`troupe migrate\`` };
  // 22 data exception, 23 integrity constraint violation, 54 program limit exceeded.
  if (/^(22|23|54)[0-9A-Z]{3}$/.test(code)) return { kind: "content", reason: `${reason} (${code})` };
  if (code === "42P01" || code === "42703") return { kind: "unavailable", reason: `${reason}: the schema is older than this program; run \`troupe migrate\`` };
  return { kind: "unavailable", reason: code === "" ? reason : `${reason} (${code})` };
}
