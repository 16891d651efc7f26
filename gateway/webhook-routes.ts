// webhook-routes: a tenant's administrators say which of their addresses hear its alerts.
//
//   GET  /v1/webhooks               admin   each with its state, what waits and how the last delivery failed
//   POST /v1/webhooks               admin   {url, id?}; answers the secret, this once
//   PUT  /v1/webhooks/{id}          admin   {url?, enabled?}
//   POST /v1/webhooks/{id}/rotate   admin   another secret; the former one is void
//   POST /v1/webhooks/{id}/test     admin   an event to try it with
import type { FastifyRequest } from "fastify";
import type { Webhooks } from "../actors/webhooks.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { isId } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Scope } from "../protocol/scopes.ts";
import type { World } from "../protocol/world.ts";
import type { Handler, RouteInfo } from "./route.ts";

interface WebhookRoutesDeps {
  readonly route: (method: RouteInfo["method"], url: string, scope: Scope, handler: Handler) => void;
  readonly webhooks: Webhooks;
  readonly world: World;
  readonly bodyOf: (request: FastifyRequest) => JsonObject;
  readonly available: <T>(what: string, work: () => Promise<T>) => Promise<T>;
}

export function declareWebhookRoutes({ route, webhooks, world, bodyOf, available }: WebhookRoutesDeps): void {
  const idOf = (request: FastifyRequest): string => {
    const { id } = request.params as { id?: string };
    if (!isId(id)) throw new TroupeError(errorBody("not_found", "there is no such webhook"));
    return id;
  };
  /** Another tenant's answers as one that is not there. */
  async function own<T>(work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      if (error instanceof TroupeError && error.body.code === "not_found")
        throw new TroupeError(errorBody("not_found", "there is no such webhook"), { cause: error });
      throw error;
    }
  }

  route("GET", "/v1/webhooks", "admin", async (_request, _reply, { principal }) => ({
    items: await available("the webhooks", () => webhooks.list(principal.tenant)),
  }));

  route("POST", "/v1/webhooks", "admin", async (request, reply, { principal }) => {
    const { url, id = `wh_${world.id().replaceAll("-", "").slice(0, 24)}` } = bodyOf(request);
    if (!isId(id)) throw new TroupeError(errorBody("invalid", "/id: 1 to 64 of A-Z a-z 0-9 _ -", { errors: [{ pointer: "/id", message: "no id" }] }));
    const { created, ...webhook } = await available("the webhook", () => webhooks.create(principal.tenant, { id, url }));
    reply.code(created ? 201 : 200);
    return webhook;
  });

  route("PUT", "/v1/webhooks/:id", "admin", async (request, _reply, { principal }) =>
    own(available("the webhook", () => webhooks.configure(principal.tenant, idOf(request), bodyOf(request)))),
  );

  for (const verb of ["rotate", "test"] as const)
    route("POST", `/v1/webhooks/:id/${verb}`, "admin", async (request, reply, { principal }) => {
      if (verb === "test") reply.code(202);
      return own(available("the webhook", () => webhooks[verb](principal.tenant, idOf(request))));
    });
}
