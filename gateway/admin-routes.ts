// admin-routes: a tenant's own keys and agents for its administrators, and tenants for operators.
//
//   GET  /v1/keys                        admin            the tenant's keys, without their hashes, each with when it was last used
//   POST /v1/keys                        admin            a new key, shown this once {scopes?, label?, expires_at?}
//   POST /v1/keys/{id}/rotate            admin            a new key like it, shown this once; the old one ends after {grace_s?}
//   POST /v1/keys/{id}/revoke            admin            it ends now {reason?}
//   PUT  /v1/agents/{id}                 admin            the agent's configuration
//   GET  /v1/operator/tenants/{id}       operator:read    state, name, agents' ids, keys without their hashes
//   POST /v1/operator/tenants            operator:write   {id, name?}
//   POST /v1/operator/tenants/{id}/keys  operator:write   as /v1/keys, for that tenant
//   POST /v1/operator/tenants/{id}/{suspend,resume}  operator:write
//
// Invariants:
//   A1. A secret leaves in the answer that made it and is nowhere else: what is stored is its hash.
//   A2. A tenant's administrator reaches its own tenant alone; the system tenant's keys are made on the bus alone, by who runs it.
import type { FastifyRequest } from "fastify";
import type { CommandClient } from "../actors/client.ts";
import type { Directory, TenantRecord } from "../actors/directory.ts";
import { createKey } from "../protocol/api-key.ts";
import { checkCommand } from "../protocol/commands.ts";
import { errorBody, isErrorCode, TroupeError } from "../protocol/errors.ts";
import { isId, SYSTEM_TENANT, tenantActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Scope } from "../protocol/scopes.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { type KeyUse, type LastUsed, lastUsedAt } from "../actors/key-use.ts";
import type { Handler, RouteInfo } from "./route.ts";

/** How long the old key of a rotation goes on: services are deployed anew within a day. */
const GRACE_S_DEFAULT = 24 * 60 * 60;
const GRACE_S_MAX = 30 * GRACE_S_DEFAULT;

interface AdminDeps {
  readonly route: (method: RouteInfo["method"], url: string, scope: Scope, handler: Handler) => void;
  readonly directory: Pick<Directory, "tenant">;
  readonly client: Pick<CommandClient, "command">;
  readonly key_use: Pick<KeyUse, "lastUsed">;
  readonly world: World;
  readonly random_bytes: (count: number) => Uint8Array;
  readonly bodyOf: (request: FastifyRequest) => JsonObject;
  readonly idempotencyKeyOf: (request: FastifyRequest) => string | undefined;
  /** Says that the bus is away when it is. */
  readonly available: <T>(what: string, work: () => Promise<T>) => Promise<T>;
}

const noSuch = (what: string): TroupeError => new TroupeError(errorBody("not_found", `there is no such ${what}`));

export function declareAdminRoutes({ route, directory, client, key_use, world, random_bytes, bodyOf, idempotencyKeyOf, available }: AdminDeps): void {
  /** Says a command to a tenant's own actor. Throws the refusal. */
  async function tell(tenant: string, type: string, body: JsonObject, key?: string): Promise<{ state: string; result: JsonObject }> {
    const checked = checkCommand("tenant", "control", type, body);
    if (checked.kind === "refused") throw new TroupeError(checked.error);
    const outcome = await client.command(tenantActor(tenant), { type, body: checked.command.body, channel: "control", key });
    if (outcome.kind === "refused") throw new TroupeError(outcome.error);
    if (outcome.reply.ok) return outcome.reply;
    const { error } = outcome.reply;
    throw new TroupeError(isErrorCode(error.code) ? error : errorBody("internal", "the tenant answered with an unknown code"));
  }

  async function makeKey(tenant: string, { scopes, label, expires_at }: JsonObject, key: string | undefined): Promise<JsonObject> {
    const made = createKey(tenant, random_bytes);
    const asked = {
      ...(scopes === undefined ? {} : { scopes }),
      ...(label === undefined ? {} : { label }),
      ...(expires_at === undefined ? {} : { expires_at }),
    };
    await tell(tenant, "key.create", { key_id: made.key_id, hash: made.hash, ...asked }, key);
    return { key_id: made.key_id, key: made.key, ...asked }; // A1
  }

  const keysOf = async (tenant: string, record: TenantRecord): Promise<JsonObject[]> =>
    viewOfKeys(record, await available("when keys were used", () => key_use.lastUsed(tenant)));

  const idOf = (request: FastifyRequest, what: string): string => {
    const { id } = request.params as { id?: string };
    if (!isId(id)) throw noSuch(what);
    return id;
  };

  route("GET", "/v1/keys", "admin", async (_request, _reply, { principal, record }) => ({ items: await keysOf(principal.tenant, record) }));

  route("POST", "/v1/keys", "admin", async (request, reply, { principal }) => {
    reply.code(201);
    return makeKey(principal.tenant, bodyOf(request), idempotencyKeyOf(request));
  });

  route("POST", "/v1/keys/:id/rotate", "admin", async (request, reply, { principal, record }) => {
    const key_id = idOf(request, "key");
    const { grace_s = GRACE_S_DEFAULT } = bodyOf(request);
    const old = Object.hasOwn(record.keys, key_id) ? record.keys[key_id] : undefined;
    if (old === undefined || old.revoked_at_ms !== null) throw noSuch("key");
    if (typeof grace_s !== "number" || !Number.isInteger(grace_s) || grace_s < 0 || grace_s > GRACE_S_MAX)
      throw new TroupeError(
        errorBody("invalid", `/grace_s is a whole number from 0 to ${GRACE_S_MAX}`, { errors: [{ pointer: "/grace_s", message: "out of range" }] }),
      );
    const made = await makeKey(principal.tenant, { scopes: [...old.scopes], ...(old.label === null ? {} : { label: old.label }) }, idempotencyKeyOf(request));
    const ends_at = timestamp(world.now_ms() + grace_s * 1000);
    await tell(principal.tenant, "key.expire", { key_id, expires_at: ends_at });
    reply.code(201);
    return { ...made, replaces: key_id, old_expires_at: ends_at };
  });

  route("POST", "/v1/keys/:id/revoke", "admin", async (request, _reply, { principal }) => {
    const key_id = idOf(request, "key");
    await tell(principal.tenant, "key.revoke", { ...bodyOf(request), key_id }, idempotencyKeyOf(request));
    return { key_id, revoked: true };
  });

  route("PUT", "/v1/agents/:id", "admin", async (request, _reply, { principal }) => {
    const agent = idOf(request, "agent");
    const { result } = await tell(principal.tenant, "agent.put", { agent, config: bodyOf(request) }, idempotencyKeyOf(request));
    return { id: agent, ...result };
  });

  // ── operators ────────────────────────────────────────────────────────────────────────────────────────────────────

  /** A2. */
  const tenantOf = (id: unknown): string => {
    if (!isId(id) || id === SYSTEM_TENANT) throw noSuch("tenant");
    return id;
  };
  async function known(id: unknown): Promise<{ tenant: string; record: TenantRecord }> {
    const tenant = tenantOf(id);
    const record = await directory.tenant(tenant);
    if (record === undefined) throw noSuch("tenant");
    return { tenant, record };
  }

  route("GET", "/v1/operator/tenants/:id", "operator:read", async (request) => {
    const { tenant, record } = await known(idOf(request, "tenant"));
    return { id: tenant, state: record.state, name: record.name, agents: Object.keys(record.agents), keys: await keysOf(tenant, record) };
  });

  route("POST", "/v1/operator/tenants", "operator:write", async (request, reply) => {
    const { id, ...body } = bodyOf(request);
    if (!isId(id) || id === SYSTEM_TENANT)
      throw new TroupeError(
        errorBody("invalid", "/id: 1 to 64 of A-Z a-z 0-9 _ -, and not the system's", { errors: [{ pointer: "/id", message: "no id of a tenant" }] }),
      );
    const { state, result } = await tell(id, "tenant.create", body, idempotencyKeyOf(request));
    reply.code(result["created"] === true ? 201 : 200);
    return { id, state };
  });

  route("POST", "/v1/operator/tenants/:id/keys", "operator:write", async (request, reply) => {
    const { tenant } = await known(idOf(request, "tenant"));
    reply.code(201);
    return makeKey(tenant, bodyOf(request), idempotencyKeyOf(request));
  });

  for (const verb of ["suspend", "resume"] as const) {
    route("POST", `/v1/operator/tenants/:id/${verb}`, "operator:write", async (request) => {
      const { tenant } = await known(idOf(request, "tenant"));
      const { state } = await tell(tenant, `tenant.${verb}`, bodyOf(request), idempotencyKeyOf(request));
      return { id: tenant, state };
    });
  }
}

function viewOfKeys(record: TenantRecord, used: LastUsed): JsonObject[] {
  return Object.entries(record.keys).map(([key_id, { label, scopes, created_at_ms, revoked_at_ms, expires_at_ms }]) => ({
    key_id,
    label,
    scopes: [...scopes],
    created_at: timestamp(created_at_ms),
    last_used_at: lastUsedAt(used, key_id),
    expires_at: expires_at_ms === undefined ? null : timestamp(expires_at_ms),
    revoked_at: revoked_at_ms === null ? null : timestamp(revoked_at_ms),
  }));
}
