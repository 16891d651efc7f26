// row-store: where the projection's rows rest, as a list of promises. The projector says what to read and what to write; a store only keeps it.
// postgres-rows.ts is the store; memory-rows.ts keeps the same promises in one thread and any World's time.
//
// Promises of every store, each a test in test/contract/row-store.test.ts:
//   RS1. What a transaction wrote is there as a whole, or not at all. After an error nobody knows which: the answer to a commit may be lost.
//   RS2. Who has asked a transaction for the position has it to himself until the end; others wait for it, or hear of a failure.
//   RS3. A row has its key once: one more of it is refused as `content` (database.ts, `faultOf`), but for usage, where the first one stands.
//   RS4. A transaction reads what it has written itself.
import type { AuditHead, ChainedRow } from "./audit-chain.ts";
import type { AgentRecord, KeyRecord, SessionRecord, TenantRecord, UsageCost, UsageRecord } from "./rows.ts";

export interface Position {
  /** Of the last message whose rows are there. */
  readonly position: number;
  /** Of the stream that they were made from; null before the first one. */
  readonly incarnation: string | null;
}

export type TenantHead = AuditHead & { readonly tenant: string };

export interface RowTransaction {
  /** RS2. Undefined where nobody ever asked the store for it. */
  position(): Promise<Position | undefined>;
  moveTo(position: Position): Promise<void>;

  sessions(wanted: readonly Pick<SessionRecord, "tenant" | "session">[]): Promise<readonly SessionRecord[]>;
  tenants(tenants: readonly string[]): Promise<readonly TenantRecord[]>;
  keys(tenants: readonly string[]): Promise<readonly KeyRecord[]>;
  /** The newest version of each agent. */
  newestAgents(tenants: readonly string[]): Promise<readonly AgentRecord[]>;
  auditHeads(tenants: readonly string[]): Promise<readonly TenantHead[]>;
  /** All rows of these attempts. */
  usageOf(attempts: readonly Pick<UsageRecord, "tenant" | "session" | "inst" | "attempt">[]): Promise<readonly UsageRecord[]>;

  /** `put` is in place of the row that has the key, if one has; `add` is one more. */
  putSessions(rows: readonly SessionRecord[]): Promise<void>;
  putTenants(rows: readonly TenantRecord[]): Promise<void>;
  putKeys(rows: readonly KeyRecord[]): Promise<void>;
  putAuditHeads(rows: readonly TenantHead[]): Promise<void>;
  addAgents(rows: readonly AgentRecord[]): Promise<void>;
  addAudit(rows: readonly ChainedRow[]): Promise<void>;
  /** Answers how many were added: those whose key was there are left out. RS3 */
  addUsage(rows: readonly UsageRecord[]): Promise<number>;
  setCosts(costs: readonly UsageCost[]): Promise<void>;
}

export interface RowStore {
  /** Where the rows stand; from the first message on where nobody asked before. */
  position(): Promise<Position>;
  /** Runs `work`, and keeps what it wrote when it answers. RS1 */
  transaction<T>(work: (transaction: RowTransaction) => Promise<T>): Promise<T>;
}
