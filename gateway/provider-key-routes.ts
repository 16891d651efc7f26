// provider-key-routes: a tenant's administrators give, list and take away the tenant's own keys at model providers.
//
//   GET  /v1/provider-keys                     admin   each with its provider, label, last four characters and times; never the key
//   PUT  /v1/provider-keys/{provider}          admin   {key, label?}: the key that is used from the next call on
//   POST /v1/provider-keys/{provider}/remove   admin   {reason?}: from the next call on the platform's key is used, where there is one
//
// Invariants:
//   PK1. A key is sealed before it is said to anybody: no command, journal, log, error or answer has it. It cannot be had back.
import type { FastifyRequest } from "fastify";
import type { CommandClient } from "../actors/client.ts";
import { providerKeysOf } from "../actors/tenant-models.ts";
import { checkCommand } from "../protocol/commands.ts";
import { errorBody, isErrorCode, TroupeError } from "../protocol/errors.ts";
import { tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { faultOfSecret, lastFourOf, type MasterKey, sealSecret } from "../protocol/key-ring.ts";
import type { Scope } from "../protocol/scopes.ts";
import type { Handler, RouteInfo } from "./route.ts";

interface ProviderKeyRoutesDeps {
  readonly route: (method: RouteInfo["method"], url: string, scope: Scope, handler: Handler) => void;
  readonly client: Pick<CommandClient, "command">;
  readonly master_keys: () => readonly MasterKey[];
  readonly random_bytes: (count: number) => Uint8Array;
  readonly bodyOf: (request: FastifyRequest) => JsonObject;
  readonly idempotencyKeyOf: (request: FastifyRequest) => string | undefined;
}

const invalid = (message: string, pointer: string): TroupeError =>
  new TroupeError(errorBody("invalid", `${pointer}: ${message}`, { errors: [{ pointer, message }] }));

export function declareProviderKeyRoutes({ route, client, master_keys, random_bytes, bodyOf, idempotencyKeyOf }: ProviderKeyRoutesDeps): void {
  async function tell(tenant: string, type: string, body: JsonObject, key?: string): Promise<JsonObject> {
    const checked = checkCommand("tenant", "control", type, body);
    if (checked.kind === "refused") throw new TroupeError(checked.error);
    const outcome = await client.command(tenantActor(tenant), { type, body: checked.command.body, channel: "control", key });
    if (outcome.kind === "refused") throw new TroupeError(outcome.error);
    if (outcome.reply.ok) return outcome.reply.result;
    const { error } = outcome.reply;
    throw new TroupeError(isErrorCode(error.code) ? error : errorBody("internal", "the tenant answered with an unknown code"));
  }

  const providerOf = (request: FastifyRequest): string => {
    const { provider } = request.params as { provider?: string };
    if (provider === undefined || !/^[a-z0-9_-]{1,32}$/.test(provider)) throw new TroupeError(errorBody("not_found", "there is no such provider"));
    return provider;
  };

  route("GET", "/v1/provider-keys", "admin", async (_request, _reply, { record }) => ({ items: providerKeysOf(record) }));

  // Without an Idempotency-Key: sealing draws a nonce, so a repeat would look like another body. It is safe to repeat as it is.
  route("PUT", "/v1/provider-keys/:provider", "admin", async (request, reply, { principal }) => {
    const provider = providerOf(request);
    const { key, label } = bodyOf(request);
    const fault = faultOfSecret(key);
    if (fault !== undefined) throw invalid(fault, "/key");
    if (label !== undefined && (typeof label !== "string" || label.length > 256)) throw invalid("it is a text of at most 256 characters", "/label");
    const keys = master_keys();
    if (keys.length === 0) throw new TroupeError(errorBody("unavailable", "this gateway was given no master key, so it takes no provider's key"));
    const secret = key as string;
    const sealed = sealSecret(keys, secret, { tenant: principal.tenant, provider }, random_bytes); // PK1
    const told = { provider, last_four: lastFourOf(secret), ...(label === undefined ? {} : { label }) };
    const { version } = await tell(principal.tenant, "provider_key.put", { ...told, sealed: { ...sealed } });
    reply.code(version === 1 ? 201 : 200);
    return { ...told, version: version ?? null };
  });

  route("POST", "/v1/provider-keys/:provider/remove", "admin", async (request, _reply, { principal }) => {
    const provider = providerOf(request);
    const { reason } = bodyOf(request);
    await tell(principal.tenant, "provider_key.remove", { provider, ...(reason === undefined ? {} : { reason }) }, idempotencyKeyOf(request));
    return { provider, removed: true };
  });
}
