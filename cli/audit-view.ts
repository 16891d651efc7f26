// audit-view: the audit projection as the verifier sees it.
import type { AuditView } from "../actors/verify.ts";
import type { Queries } from "../projections/queries.ts";
import { auditHash, PROJECTION_NAME } from "../projections/rows.ts";

export function createAuditView(queries: Queries): AuditView {
  return {
    async position() {
      const rows = await queries.positions();
      return rows.find((row) => row.name === PROJECTION_NAME)?.position ?? 0;
    },
    // Those of entries; rows of tools are compared with the chain (audit.ts).
    rows_of: (message) => message.entries.map(auditHash),
    async *rows(actor, through) {
      for await (const { stream_sequence, hash } of queries.audit_hashes(actor)) {
        if (stream_sequence > through) return;
        yield { stream_sequence, digest: hash };
      }
    },
    async usage_costs() {
      const { position, tenants } = await queries.usage_costs();
      return { position, by_tenant: new Map(tenants.map(({ tenant, cost_usd_micros }) => [tenant, cost_usd_micros])) };
    },
  };
}
