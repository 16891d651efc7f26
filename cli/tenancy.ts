// tenancy: tenants, keys and agents: an operator's acts on a tenant's own actor, and what its journal says of them.
import { readFile } from "node:fs/promises";
import { isAbsolute, join } from "node:path";
import type { TenantRecord } from "../actors/directory.ts";
import { lastUsedAt, readKeyUse } from "../actors/key-use.ts";
import { createKey as freshKey } from "../protocol/api-key.ts";
import { agentConfig, invalidBody } from "../protocol/commands.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { isId, tenantActor } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Reply } from "../protocol/reply.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import { timestamp } from "../protocol/world.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";

/** Says a command to the tenant's actor. Throws what it refuses. */
export async function tell(context: Context, tenant: string, type: string, body: JsonObject): Promise<Reply & { ok: true }> {
  const outcome = await (await context.commands()).command(tenantActor(tenant), { type, body, channel: "control" });
  if (outcome.kind === "refused") throw new TroupeError(outcome.error);
  if (!outcome.reply.ok) throw new TroupeError(outcome.reply.error);
  return outcome.reply;
}

export async function recordOf(context: Context, tenant: string): Promise<TenantRecord> {
  const record = await (await context.directory()).tenant(tenant);
  if (record === undefined) throw new TroupeError(errorBody("not_found", `there is no tenant '${tenant}'`));
  return record;
}

// ── tenants ────────────────────────────────────────────────────────────────────────────────────────────────────────

export async function listTenants(context: Context): Promise<number> {
  const { printer } = context;
  const lasts = await (await context.bus()).last_of_each("EVENTS", "tenant.*.tenant.main.event");
  const directory = await context.directory();
  const tenants: { tenant: string; state: string; name: string | null; agents: number; keys: number; changed_at: string }[] = [];
  for (const stored of lasts) {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "malformed") continue;
    const { tenant } = parsed.actor;
    const record = await directory.tenant(tenant);
    if (record === undefined) continue;
    const keys = Object.values(record.keys).filter((key) => key.revoked_at_ms === null).length;
    tenants.push({
      tenant,
      state: record.state,
      name: record.name,
      agents: Object.keys(record.agents).length,
      keys,
      changed_at: decodeJournal(stored.data).at,
    });
  }
  tenants.sort((a, b) => (a.tenant < b.tenant ? -1 : 1));
  if (printer.json) printer.document({ tenants });
  else
    printer.table(
      ["tenant", "state", "name", "agents", "keys", "changed"],
      tenants.map((one) => [one.tenant, one.state, one.name, one.agents, one.keys, one.changed_at]),
    );
  if (tenants.length === 0) printer.note("there is no tenant yet: troupe tenants create ID");
  return EXIT.done;
}

export async function createTenant(context: Context, { name }: { name?: string }, tenant: string): Promise<number> {
  const { printer } = context;
  const reply = await tell(context, tenant, "tenant.create", name === undefined ? {} : { name });
  const created = reply.result["created"] === true;
  if (printer.json) printer.document({ tenant, created, state: reply.state });
  else printer.line(created ? `tenant ${tenant} created` : `tenant ${tenant} exists`);
  return EXIT.done;
}

// ── keys ───────────────────────────────────────────────────────────────────────────────────────────────────────────

export async function createKey(
  context: Context,
  { tenant, scope = [], label, expiresAt }: { tenant: string; scope?: readonly string[]; label?: string; expiresAt?: string },
): Promise<number> {
  const { printer, ports } = context;
  const { key_id, key, hash } = freshKey(tenant, ports.random_bytes);
  await tell(context, tenant, "key.create", {
    key_id,
    hash,
    scopes: scope,
    ...(label === undefined ? {} : { label }),
    ...(expiresAt === undefined ? {} : { expires_at: expiresAt }),
  });
  if (printer.json) printer.document({ tenant, key_id, key, scopes: scope, label: label ?? null, expires_at: expiresAt ?? null });
  else {
    // The key alone on stdout, so that KEY=$(troupe keys create …) works.
    printer.line(key);
    printer.note(`key ${key_id} of ${tenant}; it is shown this once`);
  }
  return EXIT.done;
}

export async function listKeys(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  const record = await recordOf(context, tenant);
  const used = await readKeyUse(await context.bus(), tenant);
  // The hash stays out: nobody needs it, and what is not shown is not copied.
  const keys = Object.entries(record.keys).map(([key_id, key]) => ({
    key_id,
    label: key.label,
    scopes: key.scopes,
    created_at: timestamp(key.created_at_ms),
    last_used_at: lastUsedAt(used, key_id),
    expires_at: key.expires_at_ms === undefined ? null : timestamp(key.expires_at_ms),
    revoked_at: key.revoked_at_ms === null ? null : timestamp(key.revoked_at_ms),
  }));
  if (printer.json) printer.document({ tenant, keys });
  else
    printer.table(
      ["key", "label", "scopes", "created", "last used", "expires", "revoked"],
      keys.map((key) => [
        key.key_id,
        key.label,
        key.scopes.length === 0 ? "sessions:read sessions:write" : key.scopes.join(" "),
        key.created_at,
        key.last_used_at,
        key.expires_at,
        key.revoked_at,
      ]),
    );
  if (keys.length === 0) printer.note(`'${tenant}' has no key: troupe keys create --tenant ${tenant}`);
  return EXIT.done;
}

export async function revokeKey(context: Context, { tenant, reason }: { tenant: string; reason?: string }, key_id: string): Promise<number> {
  const { printer } = context;
  await tell(context, tenant, "key.revoke", { key_id, ...(reason === undefined ? {} : { reason }) });
  if (printer.json) printer.document({ tenant, key_id, revoked: true });
  else printer.line(`key ${key_id} revoked`);
  return EXIT.done;
}

// ── agents ─────────────────────────────────────────────────────────────────────────────────────────────────────────

export async function listAgents(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  const { agents } = await recordOf(context, tenant);
  const rows = Object.entries(agents).map(([agent, { version, hash, config }]) => ({ agent, version, hash, model: config.model, tools: config.tools }));
  if (printer.json) printer.document({ tenant, agents: rows });
  else
    printer.table(
      ["agent", "version", "model", "tools", "hash"],
      rows.map((row) => [row.agent, row.version, row.model, row.tools.join(" ") || null, row.hash.slice(0, 12)]),
    );
  if (rows.length === 0) printer.note(`'${tenant}' has no agent: troupe agents put --tenant ${tenant} FILE.json`);
  return EXIT.done;
}

export async function showAgent(context: Context, { tenant }: { tenant: string }, agent: string): Promise<number> {
  const { agents } = await recordOf(context, tenant);
  const found = Object.hasOwn(agents, agent) ? agents[agent] : undefined;
  if (found === undefined) throw new TroupeError(errorBody("agent_unknown", `'${tenant}' has no agent '${agent}'`));
  context.printer.document({ agent, version: found.version, hash: found.hash, config: found.config });
  return EXIT.done;
}

export type AgentFile =
  | { readonly kind: "agent"; readonly agent: string; readonly config: JsonObject }
  | { readonly kind: "invalid"; readonly error: ReturnType<typeof errorBody> };

/**
 * Reads an agent as people write it: the id under `agent`, `id` or `name`; the rest, or what stands under `config`, is its
 * configuration, whose instructions may also be called `system` or `system_prompt`. Every fault is told, with its JSON pointer.
 */
export function readAgent(text: string): AgentFile {
  const invalid = (errors: readonly { pointer: string; message: string }[]): AgentFile => {
    const message = errors.map((one) => `${one.pointer || "/"}: ${one.message}`).join("; ");
    return { kind: "invalid", error: errorBody("invalid", message.slice(0, 500), { errors }) };
  };
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return invalid([{ pointer: "", message: `it is not JSON: ${error instanceof Error ? error.message : String(error)}` }]);
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) return invalid([{ pointer: "", message: "it is not a JSON object" }]);
  const { agent: byAgent, id: byId, name: byName, config: nested, ...rest } = value as Record<string, unknown>;
  const errors: { pointer: string; message: string }[] = [];
  const agent = byAgent ?? byId ?? byName;
  const idPointer = byAgent !== undefined ? "/agent" : byId !== undefined ? "/id" : byName !== undefined ? "/name" : "/agent";
  if (!isId(agent)) errors.push({ pointer: idPointer, message: agent === undefined ? "the agent's id is missing" : "an id is 1 to 64 of A-Z a-z 0-9 _ -" });
  const isNested = nested !== undefined;
  const root = isNested ? "/config" : "";
  if (isNested && (nested === null || typeof nested !== "object" || Array.isArray(nested)))
    return invalid([...errors, { pointer: "/config", message: "it is not a JSON object" }]);
  const { system, system_prompt, ...config } = { ...(isNested ? (nested as Record<string, unknown>) : rest) };
  const spelled = Object.entries({ instructions: config["instructions"], system, system_prompt }).filter(([, given]) => given !== undefined);
  const [first, second] = spelled;
  if (second !== undefined)
    errors.push({ pointer: `${root}/${second[0]}`, message: `the instructions are given twice, as '${spelled.map(([name]) => name).join("', '")}'` });
  if (first !== undefined) config["instructions"] = first[1];
  // A word that is no setting is a mistake of the writer: dropping it in silence would hide that it has no effect.
  for (const name of Object.keys(config))
    if (!Object.hasOwn(agentConfig.shape, name)) errors.push({ pointer: `${root}/${name}`, message: "there is no such setting" });
  const checked = agentConfig.safeParse(config);
  if (!checked.success) {
    const found = invalidBody(checked.error, root).details?.["errors"] as readonly { pointer: string; message: string }[];
    errors.push(...found.map((one) => (one.pointer === `${root}/instructions` && first !== undefined ? { ...one, pointer: `${root}/${first[0]}` } : one)));
  }
  if (errors.length > 0 || !checked.success) return invalid(errors);
  return { kind: "agent", agent: agent as string, config: checked.data as unknown as JsonObject };
}

export async function putAgent(context: Context, { tenant, critical }: { tenant: string; critical?: boolean }, file: string): Promise<number> {
  const { printer, ports } = context;
  let text: string;
  try {
    text = file === "-" ? await readAll(ports.stdin) : await readFile(isAbsolute(file) ? file : join(ports.working_directory, file), "utf8");
  } catch (error) {
    throw new TroupeError(errorBody("invalid", `${file} cannot be read: ${error instanceof Error ? error.message : String(error)}`), { cause: error });
  }
  const read = readAgent(text);
  if (read.kind === "invalid") throw new TroupeError(read.error);
  const reply = await tell(context, tenant, "agent.put", { agent: read.agent, config: read.config, ...(critical === true ? { critical } : {}) });
  if (printer.json) printer.document({ tenant, agent: read.agent, ...reply.result });
  else printer.line(`agent ${read.agent} of ${tenant}${reply.result["version"] === undefined ? "" : `, version ${JSON.stringify(reply.result["version"])}`}`);
  return EXIT.done;
}

async function readAll(input: AsyncIterable<Uint8Array | string>): Promise<string> {
  const parts: Buffer[] = [];
  for await (const part of input) parts.push(Buffer.from(part));
  return Buffer.concat(parts).toString("utf8");
}
