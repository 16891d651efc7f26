// report-routes: a tenant's daily report over HTTP: its administrators their own, operators any tenant's.
//
//   GET /v1/usage/daily                          admin           ?since=&until=&agent=&user=&session=&model=
//   GET /v1/operator/tenants/{id}/usage/daily    operator:read   the same of any tenant
//
// Invariants:
//   RR1. A tenant's credential sees its own days and nobody else's; what a query names narrows them and names no tenant.
import type { FastifyRequest } from "fastify";
import type { DailyReports, DailyRow } from "../actors/daily-report.ts";
import type { Directory } from "../actors/directory.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { isId, SYSTEM_TENANT } from "../protocol/ids.ts";
import type { Scope } from "../protocol/scopes.ts";
import type { UsageFilter } from "../protocol/usage-filter.ts";
import type { Handler, RouteInfo } from "./route.ts";

interface ReportDeps {
  readonly route: (method: RouteInfo["method"], url: string, scope: Scope, handler: Handler) => void;
  readonly directory: Pick<Directory, "tenant">;
  readonly reports: DailyReports<DailyRow>;
  readonly queryOf: (request: FastifyRequest) => Record<string, string | undefined>;
  /** Says that the bus or the database is away when it is. */
  readonly available: <T>(what: string, work: () => Promise<T>) => Promise<T>;
}

const INSTANT = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})$/i;
const WORD_CHARACTERS_MAX = 256;
const NARROWED_BY = ["session", "agent", "user", "model"] as const;

const invalid = (message: string): TroupeError => new TroupeError(errorBody("invalid", message));

function filterOf(query: Record<string, string | undefined>): UsageFilter {
  for (const name of ["since", "until"] as const) {
    const text = query[name];
    if (text !== undefined && (!INSTANT.test(text) || Number.isNaN(Date.parse(text)))) throw invalid(`?${name}= is a time as 2026-11-21T00:00:00Z`);
  }
  for (const name of NARROWED_BY) {
    const text = query[name];
    if (text !== undefined && (text === "" || text.length > WORD_CHARACTERS_MAX || text.includes("\u0000")))
      throw invalid(`?${name}= is 1 to ${WORD_CHARACTERS_MAX} characters`);
  }
  const { session, agent, user, model, since, until } = query;
  return { session, agent, user, model, since, until };
}

export function declareReportRoutes({ route, directory, reports, queryOf, available }: ReportDeps): void {
  const daily = async (tenant: string, request: FastifyRequest): Promise<object> => {
    const filter = filterOf(queryOf(request));
    return { tenant, items: await available("the report", () => reports.of(tenant, filter)) };
  };

  route("GET", "/v1/usage/daily", "admin", async (request, _reply, { principal }) => daily(principal.tenant, request)); // RR1

  route("GET", "/v1/operator/tenants/:id/usage/daily", "operator:read", async (request) => {
    const { id } = request.params as { id?: string };
    if (!isId(id) || id === SYSTEM_TENANT || (await available("the tenant", () => directory.tenant(id))) === undefined)
      throw new TroupeError(errorBody("not_found", "there is no such tenant"));
    return daily(id, request);
  });
}
