// memory-rows: the projection's rows in one thread and in any World's time: the same promises as postgres-rows.ts, for tests and the simulation.
//
// Nothing here uses a clock or a wait of its own. Whatever can go wrong with a database comes through `faults`: asked before each thing that is
// done, which may wait or throw, and after a commit, whose answer may be lost.
//
// Invariants:
//   MW1. One transaction at a time holds the position; who asks meanwhile waits until it ends, or is refused after his patience.
//   MW2. What a transaction wrote is taken back when it fails, when its connection dies, and when its owner forgot it.
import { pause, type World } from "../protocol/world.ts";
import type { ChainedRow } from "./audit-chain.ts";
import type { Position, RowStore, RowTransaction, TenantHead } from "./row-store.ts";
import type { AgentRecord, KeyRecord, SessionRecord, TenantRecord, UsageRecord } from "./rows.ts";

export interface RowFaults {
  /** Before a connection is opened, a statement is run, a commit is done. What it throws is the failure. */
  before?(step: "connect" | "statement" | "commit"): Promise<void>;
  /** It was committed; what this throws is all that its owner hears. */
  after_commit?(): Promise<void>;
}

export interface MemoryRowsOptions {
  readonly world: World;
  /** As lock_timeout and idle_in_transaction_session_timeout of the database. */
  readonly lock_patience_ms?: number;
  readonly forgotten_ms?: number;
}

/** A failure as the database's client tells it: by a code. */
export class RowFailure extends Error {
  override readonly name = "RowFailure";
  readonly code: string;
  constructor(code: string, message: string) {
    super(message);
    this.code = code;
  }
}

const NOBODY: RowFaults = {};

/** One table: rows by their key, and how what was done to them is taken back. */
class Table<Row> {
  readonly rows = new Map<string, Row>();
  readonly #name: string;
  readonly #key: (row: Row) => string;

  constructor(name: string, key: (row: Row) => string) {
    this.#name = name;
    this.#key = key;
  }
  put(row: Row, undo: (() => void)[]): void {
    const key = this.#key(row);
    const before = this.rows.get(key);
    this.rows.set(key, row);
    undo.push(() => (before === undefined ? this.rows.delete(key) : this.rows.set(key, before)));
  }
  has(row: Row): boolean {
    return this.rows.has(this.#key(row));
  }
  add(row: Row, undo: (() => void)[]): void {
    if (this.has(row)) throw new RowFailure("23505", `duplicate key ${this.#key(row)} in ${this.#name}`);
    this.put(row, undo);
  }
}

const callKey = ({ tenant, session, inst, attempt, try: number }: Pick<UsageRecord, "tenant" | "session" | "inst" | "attempt" | "try">): string =>
  `${tenant}/${session}/${inst}/${attempt}/${number}`;

interface Open {
  readonly connection: object;
  readonly undo: (() => void)[];
  over: boolean;
  /** When it did something last. */
  at_ms: number;
}

export class MemoryRows {
  readonly sessions = new Table<SessionRecord>("sessions", ({ tenant, session }) => `${tenant}/${session}`);
  readonly tenants = new Table<TenantRecord>("tenants", ({ tenant }) => tenant);
  readonly keys = new Table<KeyRecord>("keys", ({ tenant, key_id }) => `${tenant}/${key_id}`);
  readonly agents = new Table<AgentRecord>("agents", ({ tenant, agent, version }) => `${tenant}/${agent}/${version}`);
  readonly audit = new Table<ChainedRow>("audit", ({ tenant, stream_sequence, entry_index }) => `${tenant}/${stream_sequence}/${entry_index}`);
  readonly heads = new Table<TenantHead>("audit_heads", ({ tenant }) => tenant);
  readonly usage = new Table<UsageRecord>("llm_usage_events", callKey);
  readonly #world: World;
  readonly #lock_patience_ms: number;
  readonly #forgotten_ms: number;
  #position: Position | undefined;
  #committed: Position | undefined;
  #holder: Open | undefined;
  readonly #waiting = new Set<() => void>();

  constructor({ world, lock_patience_ms = 5_000, forgotten_ms = 15_000 }: MemoryRowsOptions) {
    this.#world = world;
    this.#lock_patience_ms = lock_patience_ms;
    this.#forgotten_ms = forgotten_ms;
  }

  /** What is committed. */
  get position(): number {
    return this.#committed?.position ?? 0;
  }

  /** As one connection sees it; `die` is its end, with what it has begun. */
  connect(faults: RowFaults = NOBODY): RowStore & { die(): void } {
    const connection = {};
    return {
      position: async () => {
        await faults.before?.("statement");
        return (this.#committed ??= this.#position = { position: 0, incarnation: null });
      },
      transaction: async (work) => {
        await faults.before?.("connect");
        const open: Open = { connection, undo: [], over: false, at_ms: this.#world.monotonic_ms() };
        try {
          const answer = await work(this.#within(open, faults));
          await faults.before?.("commit");
          this.#alive(open);
          this.#end(open, true);
          await faults.after_commit?.();
          return answer;
        } catch (error) {
          this.#end(open, false);
          throw error;
        }
      },
      die: () => {
        if (this.#holder?.connection === connection) this.#end(this.#holder, false);
      },
    };
  }

  #alive(open: Open): void {
    if (open.over) throw new RowFailure("57P01", "the server has ended this transaction");
    open.at_ms = this.#world.monotonic_ms();
  }

  /** MW2 */
  #end(open: Open, keep: boolean): void {
    if (open.over) return;
    open.over = true;
    if (!keep) for (const undo of open.undo.toReversed()) undo();
    if (this.#holder !== open) return;
    if (keep) this.#committed = this.#position;
    this.#holder = undefined;
    const [next] = this.#waiting;
    next?.();
  }

  /** MW1 */
  async #lock(open: Open): Promise<void> {
    const give_up_at_ms = this.#world.monotonic_ms() + this.#lock_patience_ms;
    while (this.#holder !== undefined && this.#holder !== open) {
      const { at_ms } = this.#holder;
      if (at_ms + this.#forgotten_ms <= this.#world.monotonic_ms()) {
        this.#end(this.#holder, false);
        continue;
      }
      const left_ms = Math.min(at_ms + this.#forgotten_ms, give_up_at_ms) - this.#world.monotonic_ms();
      if (give_up_at_ms <= this.#world.monotonic_ms()) throw new RowFailure("55P03", "the position is held by another transaction");
      await new Promise<void>((resolve) => {
        const done = (): void => {
          this.#waiting.delete(done);
          cancel();
          resolve();
        };
        const cancel = this.#world.after(left_ms, done);
        this.#waiting.add(done);
      });
    }
    this.#alive(open);
    this.#holder = open;
  }

  #within(open: Open, faults: RowFaults): RowTransaction {
    const { undo } = open;
    const statement = async <T>(act: () => T): Promise<T> => {
      await faults.before?.("statement");
      this.#alive(open);
      return act();
    };
    const of = <Row extends { readonly tenant: string }>(table: Table<Row>, tenants: readonly string[]): Row[] =>
      [...table.rows.values()].filter(({ tenant }) => tenants.includes(tenant));
    const put =
      <Row>(table: Table<Row>) =>
      (rows: readonly Row[]): Promise<void> =>
        statement(() => rows.forEach((row) => table.put(row, undo)));
    const add =
      <Row>(table: Table<Row>) =>
      (rows: readonly Row[]): Promise<void> =>
        statement(() => rows.forEach((row) => table.add(row, undo)));
    return {
      position: async () => {
        await statement(() => undefined);
        await this.#lock(open);
        return this.#position;
      },
      moveTo: (position) =>
        statement(() => {
          const before = this.#position;
          this.#position = position;
          undo.push(() => (this.#position = before));
        }),
      sessions: (wanted) =>
        statement(() => wanted.map(({ tenant, session }) => this.sessions.rows.get(`${tenant}/${session}`)).filter((row) => row !== undefined)),
      tenants: (tenants) => statement(() => of(this.tenants, tenants)),
      keys: (tenants) => statement(() => of(this.keys, tenants)),
      newestAgents: (tenants) =>
        statement(() => {
          const newest = new Map<string, AgentRecord>();
          for (const row of of(this.agents, tenants)) {
            const name = `${row.tenant}/${row.agent}`;
            if ((newest.get(name)?.version ?? 0) < row.version) newest.set(name, row);
          }
          return [...newest.values()];
        }),
      auditHeads: (tenants) => statement(() => of(this.heads, tenants)),
      usageOf: (attempts) =>
        statement(() => {
          const found: UsageRecord[] = [];
          for (const attempt of attempts) {
            // Calls of an attempt are numbered from 1 without gaps.
            for (let number = 1; ; number++) {
              const row = this.usage.rows.get(callKey({ ...attempt, try: number }));
              if (row === undefined) break;
              found.push(row);
            }
          }
          return found;
        }),
      putSessions: put(this.sessions),
      putTenants: put(this.tenants),
      putKeys: put(this.keys),
      putAuditHeads: put(this.heads),
      addAgents: add(this.agents),
      addAudit: add(this.audit),
      addUsage: (rows) =>
        statement(() => {
          let added = 0;
          for (const row of rows) {
            if (this.usage.has(row)) continue;
            this.usage.add(row, undo);
            added += 1;
          }
          return added;
        }),
      setCosts: (costs) =>
        statement(() => {
          for (const { cost_usd_micros, estimated, ...cost } of costs) {
            const row = this.usage.rows.get(callKey(cost));
            if (row !== undefined) this.usage.put({ ...row, cost_usd_micros, estimated }, undo);
          }
        }),
    };
  }
}

/** A database that cannot be reached for a while: what is asked of it meanwhile fails at once, or after a wait, as the network has it. */
export async function unreachable(world: World, wait_ms: number): Promise<never> {
  if (wait_ms > 0) await pause(world, wait_ms);
  throw new RowFailure("ECONNREFUSED", "connect ECONNREFUSED");
}
