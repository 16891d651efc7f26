// postgres: the database of a simulated cluster: the projection's rows as one connection after another sees them, and what can go wrong with it. The
// projector that writes there is the product's own.
//
// In the end the rows are held against the journals: projected anew from the first message on, in one go, and compared row by row.
import { type AuditHead, type ChainedRow, chained } from "../../projections/audit-chain.ts";
import { MemoryRows, type RowFaults, RowFailure, unreachable } from "../../projections/memory-rows.ts";
import type { RowStore, RowTransaction } from "../../projections/row-store.ts";
import { emptyBatch, projectMessage, settledCosts } from "../../projections/rows.ts";
import { createMoneyCheck } from "../../actors/verify-money.ts";
import type { JournalMessage } from "../../protocol/journal.ts";
import { canonicalJson } from "../../protocol/json.ts";
import { pause } from "../../protocol/world.ts";
import type { Act } from "./plan.ts";
import type { SimulatedProcess } from "./process.ts";
import type { Story } from "./story.ts";
import type { VirtualWorld } from "./virtual-world.ts";

/** What a commit takes: others happen meanwhile. */
const COMMIT_MS = 2;
/** What a client waits for a server that does not answer. */
const SILENCE_MS = 5_000;

type Commit = Extract<Act, { kind: "commit" }>;

/** A journal message, and where it stands in EVENTS. */
export interface Told {
  readonly message: JournalMessage;
  readonly sequence: number;
}

export interface PostgresDeps {
  readonly world: VirtualWorld;
  readonly story: Story;
  /** Ends the process of this connection. */
  end(connection: string, why: string): void;
}

export class SimulatedPostgres {
  readonly rows: MemoryRows;
  readonly #deps: PostgresDeps;
  readonly #strikes: { readonly act: Commit; left: number }[] = [];
  #away_until_ms = 0;
  #silent = false;
  #ends: (() => void)[] = [];
  #healed = false;

  constructor(deps: PostgresDeps) {
    this.#deps = deps;
    this.rows = new MemoryRows({ world: deps.world });
  }

  /** It ends, with every transaction that is open, and is back later. */
  goAway({ ms, silent }: Extract<Act, { kind: "postgres_away" }>): void {
    this.#away_until_ms = Math.max(this.#away_until_ms, this.#deps.world.monotonic_ms() + ms);
    this.#silent = silent;
    for (const end of this.#ends) end();
  }
  strike(act: Commit): void {
    this.#strikes.push({ act, left: act.nth });
  }
  heal(): void {
    this.#healed = true;
    this.#away_until_ms = 0;
    this.#strikes.length = 0;
  }

  /** As a process sees it: its answers come through the process's gate, and what it has begun ends with it. */
  connect(process: SimulatedProcess, connection: string): { readonly rows: RowStore; die(): void } {
    const store = this.rows.connect(this.#faults(connection));
    const end = (): void => store.die();
    this.#ends.push(end);
    const gated = <T>(coming: Promise<T>): Promise<T> => process.answer(coming);
    const rows: RowStore = {
      position: () => gated(store.position()),
      transaction: (work) => gated(store.transaction((transaction) => work(throughGate(transaction, gated)))),
    };
    return {
      rows,
      die: () => {
        end();
        this.#ends = this.#ends.filter((other) => other !== end);
      },
    };
  }

  #faults(connection: string): RowFaults {
    const { world, story } = this.#deps;
    const reach = async (): Promise<void> => {
      if (world.monotonic_ms() >= this.#away_until_ms) return;
      story.count("asked while postgres is away");
      await unreachable(world, this.#silent ? SILENCE_MS : 0);
    };
    const struck = (side: Commit["side"]): Commit["effect"] | undefined => {
      if (this.#healed) return undefined;
      const at = this.#strikes.findIndex((strike) => strike.act.side === side && --strike.left <= 0);
      if (at < 0) return undefined;
      const [strike] = this.#strikes.splice(at, 1);
      const { effect } = strike!.act;
      story.count(`${effect} ${side} commit`);
      story.trace(`${connection} is struck ${side} commit: ${effect}`);
      return effect;
    };
    const happens = (effect: Commit["effect"] | undefined, side: Commit["side"]): void => {
      if (effect === undefined) return;
      if (effect === "crash") this.#deps.end(connection, `${side} commit`);
      throw new RowFailure("08006", "the connection was lost");
    };
    return {
      async before(step) {
        await reach();
        if (step !== "commit") return;
        await pause(world, COMMIT_MS);
        await reach();
        happens(struck("before"), "before");
      },
      after_commit: () => Promise.try(() => happens(struck("after"), "after")),
    };
  }

  /** Rows are what the journals say: each entry one row, and Σ usage rows = the ledger. */
  judge(told: readonly Told[]): void {
    const { fail, count } = this.#deps.story;
    const batch = emptyBatch();
    for (const { message, sequence } of told) projectMessage(batch, message, sequence);
    const costs = new Map(
      settledCosts(batch.settlements, batch.usage).map(({ tenant, session, inst, attempt, try: number, ...cost }) => [
        `${tenant}/${session}/${inst}/${attempt}/${number}`,
        cost,
      ]),
    );
    const usage = batch.usage.map((row) => ({ ...row, ...costs.get(`${row.tenant}/${row.session}/${row.inst}/${row.attempt}/${row.try}`) }));
    const heads = new Map<string, AuditHead>();
    // A row's chain is of all that it says, and of every row before it.
    const place = ({ tenant, stream_sequence, entry_index, chain }: ChainedRow): string => `${tenant}/${stream_sequence}/${entry_index} ${chain}`;
    this.#same("audit", [...this.rows.audit.rows.values()].map(place), chained(heads, batch.audit).map(place));
    this.#same(
      "audit_heads",
      this.rows.heads.rows.values(),
      [...heads].map(([tenant, head]) => ({ tenant, ...head })),
    );
    this.#same("sessions", this.rows.sessions.rows.values(), batch.sessions.values());
    this.#same("tenants", this.rows.tenants.rows.values(), batch.tenants.values());
    this.#same("keys", this.rows.keys.rows.values(), batch.keys.values());
    this.#same("agents", this.rows.agents.rows.values(), batch.agent_versions);
    this.#same("llm_usage_events", this.rows.usage.rows.values(), usage);
    const entries = told.reduce((sum, { message }) => sum + message.entries.length, 0);
    const rows = [...this.rows.audit.rows.values()].filter(({ tool }) => tool === null).length;
    if (rows !== entries) fail(`P1: the journals have ${entries} entries, the audit ${rows} rows of entries`);
    count("audit rows", rows);
    count("usage rows", usage.length);
    const by_tenant = new Map<string, number>();
    for (const { tenant, cost_usd_micros } of this.rows.usage.rows.values()) by_tenant.set(tenant, (by_tenant.get(tenant) ?? 0) + (cost_usd_micros ?? 0));
    const check = createMoneyCheck({ position: this.rows.position, by_tenant }, ({ actor, seq, what }) => fail(`M1: ${actor} ${seq ?? ""}: ${what}`));
    for (const { message, sequence } of told) check.message(message, sequence);
    check.end();
  }

  #same(table: string, is: Iterable<unknown>, should_be: Iterable<unknown>): void {
    const [rows, wanted] = [[...is].map((row) => canonicalJson(row as never)), [...should_be].map((row) => canonicalJson(row as never))];
    const there = new Set(rows);
    const missing = wanted.find((row) => !there.has(row));
    if (missing !== undefined) this.#deps.story.fail(`P1: ${table} has no row as the journals say: ${missing.slice(0, 300)}`);
    else if (rows.length !== wanted.length) this.#deps.story.fail(`P1: ${table} has ${rows.length} rows, the journals say ${wanted.length}`);
  }
}

/** Each answer of a transaction as its process hears it. */
function throughGate(transaction: RowTransaction, gated: <T>(coming: Promise<T>) => Promise<T>): RowTransaction {
  const through =
    <Arguments extends unknown[], T>(ask: (...of: Arguments) => Promise<T>) =>
    (...of: Arguments): Promise<T> =>
      gated(ask(...of));
  return {
    position: through(transaction.position),
    moveTo: through(transaction.moveTo),
    sessions: through(transaction.sessions),
    tenants: through(transaction.tenants),
    keys: through(transaction.keys),
    newestAgents: through(transaction.newestAgents),
    auditHeads: through(transaction.auditHeads),
    usageOf: through(transaction.usageOf),
    putSessions: through(transaction.putSessions),
    putTenants: through(transaction.putTenants),
    putKeys: through(transaction.putKeys),
    putAuditHeads: through(transaction.putAuditHeads),
    addAgents: through(transaction.addAgents),
    addAudit: through(transaction.addAudit),
    addUsage: through(transaction.addUsage),
    setCosts: through(transaction.setCosts),
  };
}
