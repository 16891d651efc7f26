// tenant: what people configured for a tenant: its keys, its agents, and whether it may work at all. `tenant.{t}.tenant.main`.
//
//   tenant.create ──▶ active ◀── tenant.suspend / tenant.resume ──▶ suspended
//
//   in both: key.create, key.expire, key.revoke, agent.put, tenant.configure, grant.put, config.updated,
//            provider_key.put, provider_key.remove, provider_key.reseal
//
// Gateways and workers read it from its journal (actors/directory.ts); what suspension forbids is theirs to refuse.
//
// Invariants:
//   T1. A key's id names one key for ever as long as it is listed; its secret never comes here, only the hash.
//   T2. A revoked key stays revoked, and the end of a key only comes nearer.
//   T3. An agent's version counts its different configurations: it rises exactly when the configuration's hash changes.
//   T4. Everything kept has a bound: TENANT_KEYS_MAX, TENANT_AGENTS_MAX, TENANT_ROLES_MAX, TENANT_PROVIDER_KEYS_MAX, TENANT_BYTES_MAX.
//   T5. The configuration epoch of an agent rises with each change that running sessions must take up, and with nothing else. What is
//       permitted is such a change. A session compares it with the one it froze.
//   T6. Of a provider's key only what is sealed comes here (protocol/key-ring.ts). Sealing it anew changes nothing else about it, and is refused when
//       the key was put or removed since it was opened: a rotation of master keys never brings an older key back.
import { enqueueActions, setup } from "xstate";
import { assert } from "../protocol/assert.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import { hashOf } from "../protocol/json.ts";
import type { SealedSecret } from "../protocol/key-ring.ts";
import { COMMAND_BYTES_MAX, PAYLOAD_BYTES_MAX } from "../protocol/limits.ts";
import type { Grant, Policy } from "./permission.ts";
import {
  type ActorDefinition,
  type ActorView,
  type BaseContext,
  type Change as ChangeOf,
  type CommandEvent,
  type CreationInput,
  type Emitted,
  perform,
} from "./definition.ts";

/** Keys that work. A tenant's services are fewer; revoked keys are listed as long as there is room. */
export const TENANT_KEYS_MAX = 1000;
export const TENANT_AGENTS_MAX = 1000;
/** Roles that have grants. */
export const TENANT_ROLES_MAX = 200;
/** Providers at which a tenant has a key of its own. There are a handful, and compatible servers have names of their own. */
export const TENANT_PROVIDER_KEYS_MAX = 32;
/** Keys and agents as JSON: what rests in one snapshot and is read by every process that caches the tenant. */
export const TENANT_BYTES_MAX = 3 * 1024 * 1024;
assert(
  TENANT_BYTES_MAX >= COMMAND_BYTES_MAX && TENANT_BYTES_MAX + COMMAND_BYTES_MAX <= PAYLOAD_BYTES_MAX,
  "a tenant holds any one agent, and its snapshot fits a message",
);

export interface TenantKey {
  /** SHA-256 of the whole key, in hex. */
  readonly hash: string;
  readonly scopes: readonly string[];
  readonly label: string | null;
  readonly created_at_ms: number;
  readonly revoked_at_ms: number | null;
  /** Absent: it has no end. Who reads it compares with a clock; nothing is journaled when it passes. */
  readonly expires_at_ms?: number;
}

/** A key of the tenant's own at a model provider. */
export interface ProviderKey {
  readonly sealed: SealedSecret;
  /** By which people tell it apart; null for one that is too short to show any of it. */
  readonly last_four: string | null;
  readonly label: string | null;
  /** How often a key was put for this provider since there was none. */
  readonly version: number;
  readonly created_at_ms: number;
  /** When the present one was put. */
  readonly rotated_at_ms: number;
}

export interface TenantAgent {
  readonly version: number;
  /** Of the configuration. */
  readonly hash: string;
  readonly config: AgentConfig;
  readonly at_ms: number;
  /** T5: changes of this agent alone. */
  readonly config_epoch: number;
}

export interface TenantContext extends BaseContext {
  readonly name: string | null;
  readonly keys: Readonly<Record<string, TenantKey>>;
  readonly agents: Readonly<Record<string, TenantAgent>>;
  readonly policy: Policy;
  /** By role. */
  readonly grants: Readonly<Record<string, Grant>>;
  /** By provider. Absent until the first is put, as in all journals from before there were any. */
  readonly provider_keys?: Readonly<Record<string, ProviderKey>>;
  /** T5: changes that concern all agents. */
  readonly config_epoch: number;
  /** Why it is suspended. */
  readonly reason: string | null;
  readonly created_at_ms: number;
}

interface KeyCreate {
  readonly key_id: string;
  readonly hash: string;
  readonly scopes: readonly string[];
  readonly label?: string;
  readonly expires_at?: string;
}
interface KeyExpire {
  readonly key_id: string;
  readonly expires_at: string;
}
interface KeyRevoke {
  readonly key_id: string;
  readonly reason?: string;
}
interface AgentPut {
  readonly agent: string;
  readonly config: AgentConfig;
  readonly critical?: boolean;
}
type PolicyPut = Partial<Policy>;
interface GrantPut extends Grant {
  readonly role: string;
}
interface ConfigUpdated {
  readonly agent?: string;
  readonly reason?: string;
}
interface ProviderKeyPut {
  readonly provider: string;
  readonly sealed: SealedSecret;
  readonly last_four: string | null;
  readonly label?: string;
}
interface ProviderKeyRemove {
  readonly provider: string;
  readonly reason?: string;
}
interface ProviderKeyReseal {
  readonly provider: string;
  readonly sealed: SealedSecret;
  readonly replaces: string;
}
interface ReasonBody {
  readonly reason?: string;
}

type TenantEvent =
  | CommandEvent<"key.create", KeyCreate>
  | CommandEvent<"key.expire", KeyExpire>
  | CommandEvent<"key.revoke", KeyRevoke>
  | CommandEvent<"agent.put", AgentPut>
  | CommandEvent<"tenant.configure", PolicyPut>
  | CommandEvent<"grant.put", GrantPut>
  | CommandEvent<"config.updated", ConfigUpdated>
  | CommandEvent<"provider_key.put", ProviderKeyPut>
  | CommandEvent<"provider_key.remove", ProviderKeyRemove>
  | CommandEvent<"provider_key.reseal", ProviderKeyReseal>
  | CommandEvent<"tenant.suspend" | "tenant.resume", ReasonBody>;

type Change = ChangeOf<TenantContext>;

/** Room for one more key: the keys that were revoked first make it. */
function withRoom(keys: TenantContext["keys"]): TenantContext["keys"] {
  const ids = Object.keys(keys);
  if (ids.length < TENANT_KEYS_MAX) return keys;
  const revoked = ids.filter((id) => keys[id]?.revoked_at_ms !== null).sort((a, b) => (keys[a]?.revoked_at_ms ?? 0) - (keys[b]?.revoked_at_ms ?? 0));
  const leaving = new Set(revoked.slice(0, ids.length - TENANT_KEYS_MAX + 1));
  return Object.fromEntries(Object.entries(keys).filter(([id]) => !leaving.has(id)));
}

function keyCreated({ keys, now }: TenantContext, { key_id, hash, scopes, label, expires_at }: KeyCreate): Change {
  const key: TenantKey = {
    hash,
    scopes,
    label: label ?? null,
    created_at_ms: now.at_ms,
    revoked_at_ms: null,
    ...(expires_at === undefined ? {} : { expires_at_ms: Date.parse(expires_at) }),
  };
  const told: ActorEvent = { type: "key.created", key_id, scopes, label: key.label, ...(expires_at === undefined ? {} : { expires_at }) };
  return { context: { keys: { ...withRoom(keys), [key_id]: key } }, tell: [told], answer: { key_id } };
}

function keyExpires({ keys }: TenantContext, { key_id, expires_at }: KeyExpire): Change {
  const key = Object.hasOwn(keys, key_id) ? keys[key_id] : undefined;
  const expires_at_ms = Date.parse(expires_at);
  // T2.
  if (key === undefined || key.revoked_at_ms !== null || (key.expires_at_ms ?? Number.MAX_SAFE_INTEGER) <= expires_at_ms) return { answer: { key_id } };
  return { context: { keys: { ...keys, [key_id]: { ...key, expires_at_ms } } }, tell: [{ type: "key.expiring", key_id, expires_at }], answer: { key_id } };
}

function keyRevoked({ keys, now }: TenantContext, { key_id, reason }: KeyRevoke): Change {
  const key = Object.hasOwn(keys, key_id) ? keys[key_id] : undefined;
  // T2. Again is no news.
  if (key === undefined || key.revoked_at_ms !== null) return { answer: { key_id } };
  return {
    context: { keys: { ...keys, [key_id]: { ...key, revoked_at_ms: now.at_ms } } },
    tell: [{ type: "key.revoked", key_id, reason: reason ?? null }],
    answer: { key_id },
  };
}

function agentPut(context: TenantContext, { agent, config, critical }: AgentPut): Change {
  const { agents, now } = context;
  const hash = hashOf(config);
  const known = Object.hasOwn(agents, agent) ? agents[agent] : undefined;
  if (known?.hash === hash) {
    const answer = { agent, version: known.version, hash };
    return critical === true ? { ...configUpdated(context, { agent }), answer } : { answer };
  }
  const version = (known?.version ?? 0) + 1; // T3
  // T5. Of an agent that is new no session can have an older one.
  const config_epoch = (known?.config_epoch ?? 0) + (critical === true && known !== undefined ? 1 : 0);
  const updated: ActorEvent[] =
    config_epoch === (known?.config_epoch ?? 0)
      ? []
      : [{ type: "config.updated", agent, config_epoch: context.config_epoch + config_epoch, reason: "agent.put" }];
  return {
    context: { agents: { ...agents, [agent]: { version, hash, config, at_ms: now.at_ms, config_epoch } } },
    tell: [{ type: "agent.put", agent, version, hash }, ...updated],
    answer: { agent, version, hash },
  };
}

/** T5 for one agent, or for all. */
function configUpdated({ agents, config_epoch }: TenantContext, { agent, reason }: ConfigUpdated): Change {
  const known = agent !== undefined && Object.hasOwn(agents, agent) ? agents[agent] : undefined;
  if (agent === undefined || known === undefined)
    return {
      context: { config_epoch: config_epoch + 1 },
      tell: [{ type: "config.updated", agent: null, config_epoch: config_epoch + 1, reason: reason ?? null }],
      answer: { config_epoch: config_epoch + 1 },
    };
  const mine = { ...known, config_epoch: known.config_epoch + 1 };
  const epoch = config_epoch + mine.config_epoch;
  return {
    context: { agents: { ...agents, [agent]: mine } },
    tell: [{ type: "config.updated", agent, config_epoch: epoch, reason: reason ?? null }],
    answer: { config_epoch: epoch },
  };
}

/** What is permitted changes for running sessions too: T5. */
function permissionsChanged(context: TenantContext, change: Partial<TenantContext>, told: ActorEvent): Change {
  const updated = configUpdated(context, { reason: told.type });
  return { context: { ...change, ...updated.context }, tell: [told, ...(updated.tell ?? [])], answer: updated.answer ?? {} };
}

function policyPut(context: TenantContext, body: PolicyPut): Change {
  const policy: Policy = { default: body.default ?? context.policy.default, deny: [...new Set(body.deny ?? context.policy.deny)].sort() };
  if (hashOf(policy) === hashOf(context.policy)) return { answer: { config_epoch: context.config_epoch } };
  return permissionsChanged(context, { policy }, { type: "tenant.configured", default: policy.default, deny: policy.deny });
}

function grantPut(context: TenantContext, { role, allow, deny }: GrantPut): Change {
  const known = Object.hasOwn(context.grants, role) ? context.grants[role] : undefined;
  const others = Object.fromEntries(Object.entries(context.grants).filter(([name]) => name !== role));
  const grant: Grant = { allow: [...new Set(allow)].sort(), deny: [...new Set(deny)].sort() };
  const empty = grant.allow.length + grant.deny.length === 0;
  if (empty ? known === undefined : hashOf(known ?? null) === hashOf(grant)) return { answer: { config_epoch: context.config_epoch } };
  return permissionsChanged(context, { grants: empty ? others : { ...others, [role]: grant } }, { type: "grant.put", role, ...grant });
}

/** The tenant's own key at a provider. */
export function providerKeyOf({ provider_keys }: Pick<TenantContext, "provider_keys">, provider: string): ProviderKey | undefined {
  return provider_keys !== undefined && Object.hasOwn(provider_keys, provider) ? provider_keys[provider] : undefined;
}

function providerKeyPut(context: TenantContext, { provider, sealed, last_four, label }: ProviderKeyPut): Change {
  const { now } = context;
  const known = providerKeyOf(context, provider);
  const key: ProviderKey = {
    sealed,
    last_four,
    label: label ?? known?.label ?? null,
    version: (known?.version ?? 0) + 1,
    created_at_ms: known?.created_at_ms ?? now.at_ms,
    rotated_at_ms: now.at_ms,
  };
  const told = { provider, version: key.version, last_four, label: key.label, master_key_id: sealed.master_key_id };
  return {
    context: { provider_keys: { ...context.provider_keys, [provider]: key } },
    tell: [{ type: "provider_key.put", ...told }],
    answer: { provider, version: key.version },
  };
}

function providerKeyRemoved(context: TenantContext, { provider, reason }: ProviderKeyRemove): Change {
  const others = Object.fromEntries(Object.entries(context.provider_keys ?? {}).filter(([name]) => name !== provider));
  return { context: { provider_keys: others }, tell: [{ type: "provider_key.removed", provider, reason: reason ?? null }], answer: { provider } };
}

/** T6. What may be said of it was judged before: `refuseReseal`. */
function providerKeyResealed(context: TenantContext, { provider, sealed }: ProviderKeyReseal): Change {
  const known = providerKeyOf(context, provider);
  assert(known !== undefined, "what is sealed anew is there");
  return {
    context: { provider_keys: { ...context.provider_keys, [provider]: { ...known, sealed } } },
    tell: [{ type: "provider_key.resealed", provider, master_key_id: sealed.master_key_id, from: known.sealed.master_key_id }],
    answer: { provider, version: known.version },
  };
}

export const tenantMachine = setup({
  types: {} as { context: TenantContext; events: TenantEvent; emitted: Emitted; input: CreationInput },
  actions: {
    tell_created: enqueueActions((args) => perform(args, { tell: [{ type: "tenant.created", name: args.context.name }] })),
    create_key: enqueueActions((args, body: KeyCreate) => perform(args, keyCreated(args.context, body))),
    expire_key: enqueueActions((args, body: KeyExpire) => perform(args, keyExpires(args.context, body))),
    revoke_key: enqueueActions((args, body: KeyRevoke) => perform(args, keyRevoked(args.context, body))),
    put_agent: enqueueActions((args, body: AgentPut) => perform(args, agentPut(args.context, body))),
    put_policy: enqueueActions((args, body: PolicyPut) => perform(args, policyPut(args.context, body))),
    put_grant: enqueueActions((args, body: GrantPut) => perform(args, grantPut(args.context, body))),
    update_config: enqueueActions((args, body: ConfigUpdated) => perform(args, configUpdated(args.context, body))),
    put_provider_key: enqueueActions((args, body: ProviderKeyPut) => perform(args, providerKeyPut(args.context, body))),
    remove_provider_key: enqueueActions((args, body: ProviderKeyRemove) => perform(args, providerKeyRemoved(args.context, body))),
    reseal_provider_key: enqueueActions((args, body: ProviderKeyReseal) => perform(args, providerKeyResealed(args.context, body))),
    give_reason: enqueueActions((args, { reason }: ReasonBody) => perform(args, { context: { reason: reason ?? null } })),
  },
}).createMachine({
  id: "tenant",
  version: "1",
  context: ({ input: { body, now } }) => ({
    now,
    name: typeof body.name === "string" ? body.name : null,
    keys: {},
    agents: {},
    policy: { default: "allow", deny: [] },
    grants: {},
    config_epoch: 0,
    reason: null,
    created_at_ms: now.at_ms,
  }),
  entry: "tell_created",
  initial: "active",
  on: {
    "key.create": { actions: { type: "create_key", params: ({ event }) => event.body } },
    "key.expire": { actions: { type: "expire_key", params: ({ event }) => event.body } },
    "key.revoke": { actions: { type: "revoke_key", params: ({ event }) => event.body } },
    "agent.put": { actions: { type: "put_agent", params: ({ event }) => event.body } },
    "tenant.configure": { actions: { type: "put_policy", params: ({ event }) => event.body } },
    "grant.put": { actions: { type: "put_grant", params: ({ event }) => event.body } },
    "config.updated": { actions: { type: "update_config", params: ({ event }) => event.body } },
    "provider_key.put": { actions: { type: "put_provider_key", params: ({ event }) => event.body } },
    "provider_key.remove": { actions: { type: "remove_provider_key", params: ({ event }) => event.body } },
    "provider_key.reseal": { actions: { type: "reseal_provider_key", params: ({ event }) => event.body } },
  },
  states: {
    active: {
      id: "active",
      description: "its sessions work",
      on: { "tenant.suspend": { target: "suspended", actions: { type: "give_reason", params: ({ event }) => event.body } } },
    },
    suspended: {
      id: "suspended",
      description: "nothing of its begins",
      on: { "tenant.resume": { target: "active", actions: { type: "give_reason", params: {} } } },
    },
  },
});

const bytesOf = (value: unknown): number => Buffer.byteLength(JSON.stringify(value));

/** T4 for bytes, after a change that adds `bytes`. */
function refuseBytes({ keys, agents, policy, grants, provider_keys }: TenantContext, bytes: number): ErrorBody | undefined {
  const sum = bytesOf({ keys, agents, policy, grants, provider_keys }) + bytes;
  return sum <= TENANT_BYTES_MAX
    ? undefined
    : errorBody("too_large", `the keys, agents and grants of a tenant are at most ${TENANT_BYTES_MAX} bytes together`, {
        bytes: sum,
        bytes_max: TENANT_BYTES_MAX,
      });
}

function refuseKey(context: TenantContext, { key_id, hash }: KeyCreate): ErrorBody | undefined {
  if (Object.hasOwn(context.keys, key_id)) return errorBody("conflict", `there is a key '${key_id}' already`, { key_id }); // T1
  const keys = Object.values(context.keys);
  if (keys.some((key) => key.hash === hash)) return errorBody("conflict", "this key is listed under another id already", { key_id });
  if (keys.filter((key) => key.revoked_at_ms === null).length >= TENANT_KEYS_MAX) {
    return errorBody("invalid", `a tenant has at most ${TENANT_KEYS_MAX} keys; revoke one`, { keys_max: TENANT_KEYS_MAX });
  }
  return undefined;
}

function refuseAgent({ agents }: TenantContext, { agent }: AgentPut): ErrorBody | undefined {
  if (Object.hasOwn(agents, agent) || Object.keys(agents).length < TENANT_AGENTS_MAX) return undefined;
  return errorBody("invalid", `a tenant has at most ${TENANT_AGENTS_MAX} agents`, { agents_max: TENANT_AGENTS_MAX });
}

function refuseGrant({ grants }: TenantContext, { role }: GrantPut): ErrorBody | undefined {
  if (Object.hasOwn(grants, role) || Object.keys(grants).length < TENANT_ROLES_MAX) return undefined;
  return errorBody("invalid", `a tenant has grants for at most ${TENANT_ROLES_MAX} roles`, { roles_max: TENANT_ROLES_MAX });
}

function refuseProviderKey({ provider_keys = {} }: TenantContext, { provider }: ProviderKeyPut): ErrorBody | undefined {
  if (Object.hasOwn(provider_keys, provider) || Object.keys(provider_keys).length < TENANT_PROVIDER_KEYS_MAX) return undefined;
  return errorBody("invalid", `a tenant has its own key at at most ${TENANT_PROVIDER_KEYS_MAX} providers`, { provider_keys_max: TENANT_PROVIDER_KEYS_MAX });
}

/** T6 */
function refuseReseal(context: TenantContext, { provider, replaces }: ProviderKeyReseal): ErrorBody | undefined {
  const known = providerKeyOf(context, provider);
  if (known === undefined) return noProviderKey(provider);
  return known.sealed.nonce === replaces ? undefined : errorBody("conflict", `the key for '${provider}' was changed meanwhile`, { provider });
}

const noProviderKey = (provider: string): ErrorBody => errorBody("not_found", `there is no key for the provider '${provider}'`, { provider });

export function tenantContextOf(view: Pick<ActorView, "context">): TenantContext {
  return view.context as unknown as TenantContext;
}

export const tenantDefinition: ActorDefinition = {
  kind: "tenant",
  machine: tenantMachine,
  creates: "tenant.create",
  effects: {},
  refuse(view, { type, body }) {
    const context = tenantContextOf(view);
    switch (type) {
      case "key.create":
        return refuseKey(context, body as unknown as KeyCreate) ?? refuseBytes(context, bytesOf(body));
      case "key.expire":
      case "key.revoke":
        return Object.hasOwn(context.keys, String(body.key_id)) ? undefined : errorBody("not_found", `there is no key '${String(body.key_id)}'`);
      case "config.updated":
        return body.agent === undefined || Object.hasOwn(context.agents, String(body.agent))
          ? undefined
          : errorBody("not_found", `there is no agent '${String(body.agent)}'`);
      case "provider_key.put":
        return refuseProviderKey(context, body as unknown as ProviderKeyPut) ?? refuseBytes(context, bytesOf(body));
      case "provider_key.remove":
        return providerKeyOf(context, String(body.provider)) === undefined ? noProviderKey(String(body.provider)) : undefined;
      case "provider_key.reseal":
        return refuseReseal(context, body as unknown as ProviderKeyReseal);
      case "tenant.configure":
        return refuseBytes(context, bytesOf(body));
      case "grant.put":
        return refuseGrant(context, body as unknown as GrantPut) ?? refuseBytes(context, bytesOf(body));
      case "agent.put":
        return refuseAgent(context, body as unknown as AgentPut) ?? refuseBytes(context, bytesOf(body));
      default:
        return undefined;
    }
  },
  waits(view) {
    const { reason } = tenantContextOf(view);
    return view.state === "suspended"
      ? `suspended${reason === null ? "" : ` (${reason})`}: waits for tenant.resume`
      : "waits for a change of its keys or agents";
  },
  moved({ before, after }) {
    const { reason } = tenantContextOf(after);
    return { type: "tenant.state", from: before.state, to: after.state, ...(reason === null ? {} : { reason }) };
  },
};
