// tables: the whole of what is projected, as text that two runs can be compared by.
import type { Database } from "../../projections/database.ts";

export const PROJECTED = ["tenants", "keys", "agents", "sessions", "audit", "audit_heads", "llm_usage_events"] as const;

export async function dump(database: Database): Promise<Record<string, string[]>> {
  const all: Record<string, string[]> = {};
  for (const table of PROJECTED) {
    const rows = await database.query<{ row: string }>(`select to_jsonb(${table})::text as row from ${table} order by 1`);
    all[table] = rows.map(({ row }) => row);
  }
  return all;
}
