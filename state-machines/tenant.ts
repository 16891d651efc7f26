// tenant: what people configured for a tenant: its keys, its agents, and whether it may work at all. `tenant.{t}.tenant.main`.
//
//   tenant.create ──▶ active ◀── tenant.suspend / tenant.resume ──▶ suspended
//
//   in both: key.create, key.revoke, agent.put
//
// Gateways and workers read it from its journal (actors/directory.ts); what suspension forbids is theirs to refuse.
//
// Invariants:
//   T1. A key's id names one key for ever as long as it is listed; its secret never comes here, only the hash.
//   T2. A revoked key stays revoked.
//   T3. An agent's version counts its different configurations: it rises exactly when the configuration's hash changes.
//   T4. Everything kept has a bound: TENANT_KEYS_MAX, TENANT_AGENTS_MAX, TENANT_BYTES_MAX.
import { enqueueActions, setup } from "xstate";
import { assert } from "../protocol/assert.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import { hashOf, type JsonObject } from "../protocol/json.ts";
import { COMMAND_BYTES_MAX, PAYLOAD_BYTES_MAX } from "../protocol/limits.ts";
import type { ActorDefinition, ActorView, BaseContext, CommandEvent, CreationInput, Emitted } from "./definition.ts";

/** Keys that work. A tenant's services are fewer; revoked keys are listed as long as there is room. */
export const TENANT_KEYS_MAX = 1000;
export const TENANT_AGENTS_MAX = 1000;
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
}

export interface TenantAgent {
  readonly version: number;
  /** Of the configuration. */
  readonly hash: string;
  readonly config: AgentConfig;
  readonly at_ms: number;
}

export interface TenantContext extends BaseContext {
  readonly name: string | null;
  readonly keys: Readonly<Record<string, TenantKey>>;
  readonly agents: Readonly<Record<string, TenantAgent>>;
  /** Why it is suspended. */
  readonly reason: string | null;
  readonly created_at_ms: number;
}

interface KeyCreate {
  readonly key_id: string;
  readonly hash: string;
  readonly scopes: readonly string[];
  readonly label?: string;
}
interface KeyRevoke {
  readonly key_id: string;
  readonly reason?: string;
}
interface AgentPut {
  readonly agent: string;
  readonly config: AgentConfig;
}
interface ReasonBody {
  readonly reason?: string;
}

type TenantEvent =
  | CommandEvent<"key.create", KeyCreate>
  | CommandEvent<"key.revoke", KeyRevoke>
  | CommandEvent<"agent.put", AgentPut>
  | CommandEvent<"tenant.suspend" | "tenant.resume", ReasonBody>;

interface Change {
  readonly context?: Partial<TenantContext>;
  readonly tell?: readonly ActorEvent[];
  readonly answer?: JsonObject;
}

/** Room for one more key: the keys that were revoked first make it. */
function withRoom(keys: TenantContext["keys"]): TenantContext["keys"] {
  const ids = Object.keys(keys);
  if (ids.length < TENANT_KEYS_MAX) return keys;
  const revoked = ids.filter((id) => keys[id]?.revoked_at_ms !== null).sort((a, b) => (keys[a]?.revoked_at_ms ?? 0) - (keys[b]?.revoked_at_ms ?? 0));
  const leaving = new Set(revoked.slice(0, ids.length - TENANT_KEYS_MAX + 1));
  return Object.fromEntries(Object.entries(keys).filter(([id]) => !leaving.has(id)));
}

function keyCreated({ keys, now }: TenantContext, { key_id, hash, scopes, label }: KeyCreate): Change {
  const key: TenantKey = { hash, scopes, label: label ?? null, created_at_ms: now.at_ms, revoked_at_ms: null };
  return { context: { keys: { ...withRoom(keys), [key_id]: key } }, tell: [{ type: "key.created", key_id, scopes, label: key.label }], answer: { key_id } };
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

function agentPut({ agents, now }: TenantContext, { agent, config }: AgentPut): Change {
  const hash = hashOf(config);
  const known = Object.hasOwn(agents, agent) ? agents[agent] : undefined;
  if (known?.hash === hash) return { answer: { agent, version: known.version, hash } };
  const version = (known?.version ?? 0) + 1; // T3
  return {
    context: { agents: { ...agents, [agent]: { version, hash, config, at_ms: now.at_ms } } },
    tell: [{ type: "agent.put", agent, version, hash }],
    answer: { agent, version, hash },
  };
}

interface Enqueue {
  assign(patch: Partial<TenantContext>): void;
  emit(emitted: Emitted): void;
}
/** A change as XState's actions; the cast because XState's own type of `enqueue` depends on the machine that is not made yet. */
function perform({ enqueue }: { enqueue: unknown }, change: Change): void {
  const actions = enqueue as Enqueue;
  if (change.context !== undefined) actions.assign(change.context);
  for (const event of change.tell ?? []) actions.emit({ type: "tell", event });
  if (change.answer !== undefined) actions.emit({ type: "answer", result: change.answer });
}

export const tenantMachine = setup({
  types: {} as { context: TenantContext; events: TenantEvent; emitted: Emitted; input: CreationInput },
  actions: {
    tell_created: enqueueActions((args) => perform(args, { tell: [{ type: "tenant.created", name: args.context.name }] })),
    create_key: enqueueActions((args, body: KeyCreate) => perform(args, keyCreated(args.context, body))),
    revoke_key: enqueueActions((args, body: KeyRevoke) => perform(args, keyRevoked(args.context, body))),
    put_agent: enqueueActions((args, body: AgentPut) => perform(args, agentPut(args.context, body))),
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
    reason: null,
    created_at_ms: now.at_ms,
  }),
  entry: "tell_created",
  initial: "active",
  on: {
    "key.create": { actions: { type: "create_key", params: ({ event }) => event.body } },
    "key.revoke": { actions: { type: "revoke_key", params: ({ event }) => event.body } },
    "agent.put": { actions: { type: "put_agent", params: ({ event }) => event.body } },
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
function refuseBytes({ keys, agents }: TenantContext, bytes: number): ErrorBody | undefined {
  const sum = bytesOf({ keys, agents }) + bytes;
  return sum <= TENANT_BYTES_MAX
    ? undefined
    : errorBody("too_large", `the keys and agents of a tenant are at most ${TENANT_BYTES_MAX} bytes together`, { bytes: sum, bytes_max: TENANT_BYTES_MAX });
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
      case "key.revoke":
        return Object.hasOwn(context.keys, String(body.key_id)) ? undefined : errorBody("not_found", `there is no key '${String(body.key_id)}'`);
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
