// budget-routes: a tenant's money over HTTP: its administrators look, operators look and set.
//
//   GET /v1/budget                         admin            levels, rates and what their windows have left
//   GET /v1/operator/tenants/{id}/budget   operator:read    the same of any tenant
//   PUT /v1/operator/tenants/{id}/budget   operator:write   {level?, id?, limit_usd_micros?, period?, concurrency_max?, rates?, tier?,
//                                                          sessions_max?, projection?}
//
// Invariants:
//   BR1. What limits a tenant is set by operators alone; no tenant's credential reaches a route that writes.
//   BR2. What is read is the budget's own journal, so it is true while Postgres is away.
import type { FastifyRequest } from "fastify";
import { budgetView } from "../actors/budget-view.ts";
import type { CommandClient } from "../actors/client.ts";
import type { Directory } from "../actors/directory.ts";
import type { Restorer } from "../actors/restore.ts";
import { checkCommand } from "../protocol/commands.ts";
import { errorBody, isErrorCode, TroupeError } from "../protocol/errors.ts";
import { budgetActor, isId, SYSTEM_TENANT } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { RATE_TIER_NAMES, rateTier } from "../protocol/rate-tiers.ts";
import type { Scope } from "../protocol/scopes.ts";
import type { World } from "../protocol/world.ts";
import { budgetContextOf } from "../state-machines/budget-context.ts";
import { viewOf } from "../state-machines/step.ts";
import type { Handler, RouteInfo } from "./route.ts";

interface BudgetDeps {
  readonly route: (method: RouteInfo["method"], url: string, scope: Scope, handler: Handler) => void;
  readonly directory: Pick<Directory, "tenant">;
  readonly restorer: Restorer;
  readonly client: Pick<CommandClient, "command">;
  readonly world: World;
  readonly bodyOf: (request: FastifyRequest) => JsonObject;
  readonly idempotencyKeyOf: (request: FastifyRequest) => string | undefined;
  /** Says that the bus is away when it is. */
  readonly available: <T>(what: string, work: () => Promise<T>) => Promise<T>;
}

export function declareBudgetRoutes({ route, directory, restorer, client, world, bodyOf, idempotencyKeyOf, available }: BudgetDeps): void {
  async function view(tenant: string): Promise<JsonObject> {
    const restored = await available("the budget", () => restorer.restore(budgetActor(tenant)));
    return { tenant, ...budgetView(restored === undefined ? undefined : budgetContextOf(viewOf(restored.state)), world.now_ms()) };
  }

  async function tenantOf(request: FastifyRequest): Promise<string> {
    const { id } = request.params as { id?: string };
    if (!isId(id) || id === SYSTEM_TENANT || (await available("the tenant", () => directory.tenant(id))) === undefined)
      throw new TroupeError(errorBody("not_found", "there is no such tenant"));
    return id;
  }

  /** A tier is said by its name; the budget keeps its numbers. */
  function configureBody({ level = "tenant", tier, ...body }: JsonObject): JsonObject {
    if (tier === undefined) return { level, ...body };
    const named = typeof tier === "string" ? rateTier(tier) : undefined;
    if (tier !== null && named === undefined) {
      const message = `is one of ${RATE_TIER_NAMES.join(", ")}, or null`;
      throw new TroupeError(errorBody("invalid", `/tier ${message}`, { errors: [{ pointer: "/tier", message }] }));
    }
    return { level, ...body, tier: (named ?? null) as unknown as JsonObject };
  }

  async function configure(tenant: string, body: JsonObject, key: string | undefined): Promise<void> {
    const checked = checkCommand("budget", "control", "budget.configure", body);
    if (checked.kind === "refused") throw new TroupeError(checked.error);
    // A budget that is not there yet is made first.
    for (const create of [false, true]) {
      if (create) await client.command(budgetActor(tenant), { type: "budget.create", body: {}, channel: "control" });
      const outcome = await client.command(budgetActor(tenant), { type: "budget.configure", body: checked.command.body, channel: "control", key });
      if (outcome.kind === "refused") throw new TroupeError(outcome.error);
      if (outcome.reply.ok) return;
      const { error } = outcome.reply;
      if (create || error.code !== "not_found")
        throw new TroupeError(isErrorCode(error.code) ? error : errorBody("internal", "the budget answered with an unknown code"));
    }
  }

  route("GET", "/v1/budget", "admin", async (_request, _reply, { principal }) => view(principal.tenant));

  route("GET", "/v1/operator/tenants/:id/budget", "operator:read", async (request) => view(await tenantOf(request)));

  route("PUT", "/v1/operator/tenants/:id/budget", "operator:write", async (request) => {
    const tenant = await tenantOf(request);
    await configure(tenant, configureBody(bodyOf(request)), idempotencyKeyOf(request)); // BR1
    return view(tenant);
  });
}
