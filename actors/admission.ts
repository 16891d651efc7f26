// admission: what an actor's own state cannot judge of a command: is its tenant active, does the agent exist, can the model be had, may
// there be one more session, is there money left at all?
import type { AgentConfig, Command } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { seqOfMessage, type SessionParent } from "../protocol/session-parent.ts";
import type { Providers } from "../providers/registry.ts";
import type { ActorView } from "../state-machines/definition.ts";
import { allowed, permissionsOf } from "../state-machines/permission.ts";
import { sessionContextOf } from "../state-machines/session-context.ts";
import { BUILT_IN_TOOLS, type ToolTable, unknownTools } from "../state-machines/tools.ts";
import type { BudgetStanding } from "./budget-standing.ts";
import type { CallPool } from "./call-pool.ts";
import type { Directory, TenantRecord } from "./directory.ts";
import type { SessionPlaces } from "./session-places.ts";
import { refusalOfModel } from "./tenant-models.ts";
import type { TurnFinder } from "./turn-finder.ts";

/** Answers the refusal, or undefined. Rejects when it cannot be known now; what is asked about may have been stored already, and waits then. */
export type Admit = (actor: ActorAddress, command: Command, view?: ActorView) => Promise<ErrorBody | undefined>;

/** What ends or sets something is never turned away at the door: a settlement that is refused is money that nobody counted. */
const ALWAYS_OF_BUDGETS = ["budget.settle", "budget.release", "slot.release", "session.release"];

/** A budget tells its alerts to webhooks of its own tenant (A4). */
function refuseForeign(actor: ActorAddress, { body }: Command): ErrorBody | undefined {
  const { add = [] } = (body["alerts_to"] ?? {}) as { add?: readonly string[] };
  const foreign = add.find((path) => !path.startsWith(`${actor.tenant}/`));
  return foreign === undefined ? undefined : errorBody("invalid", `alerts go to webhooks of '${actor.tenant}', not to '${foreign}'`, { alerts_to: foreign });
}

/** Told to whoever writes the agent, and not only to whoever first needs it: its sessions would be unhealthy (step `tools`). */
function refuseTools({ body }: Command, table: ToolTable): ErrorBody | undefined {
  const { tools } = body["config"] as unknown as AgentConfig;
  const unknown = unknownTools(tools, table);
  if (unknown.length === 0) return undefined;
  const known = Object.keys(table);
  return errorBody("invalid", `there is no tool '${unknown.join("', '")}'; there are ${known.join(", ")}`, {
    errors: unknown.map((name) => ({ pointer: `/config/tools/${tools.indexOf(name)}`, message: "there is no such tool" })),
    tools: known,
  });
}

/** The models that a tenant lets its agent use: what the agent's roles are granted, and what nobody may (AR-F66). */
export function refuseModel({ policy, grants }: TenantRecord, roles: readonly string[], model: string): ErrorBody | undefined {
  const verdict = allowed(permissionsOf(policy, grants, roles), { kind: "model", name: model });
  return verdict.kind === "allowed" ? undefined : errorBody("forbidden", verdict.message, { model });
}

/** None of an agent's models can be had, with whatever key: said when a session is created, and not at its first message. One that can be had is enough. */
function refuseAgentsModels(providers: Providers, tenant: TenantRecord, agent: string): ErrorBody | undefined {
  const config = tenant.agents[agent]?.config;
  if (config === undefined) return undefined;
  const refusals = [config.model, ...(config.fallbacks?.models ?? [])].map((model) => refusalOfModel(providers, tenant, model));
  const [first] = refusals;
  return first === undefined || refusals.includes(undefined) ? undefined : errorBody("model_unknown", first.message, { model: config.model });
}

/** A key is kept for a provider that can be called with one: for another name it would lie there and never serve. */
function refuseProvider(providers: Providers, { body }: Command): ErrorBody | undefined {
  const { takes_keys } = providers;
  const provider = String(body["provider"]);
  if (takes_keys.includes(provider)) return undefined;
  return errorBody("invalid", `'${provider}' is no provider that takes a key of a tenant's own; those are ${takes_keys.join(", ") || "none"}`, {
    errors: [{ pointer: "/provider", message: "takes no key" }],
    providers: takes_keys,
  });
}

/** DP3: only what was accepted before can be named. Another tenant's sessions are not there, like those that never were. */
async function refuseAfter(turns: TurnFinder, actor: ActorAddress, parents: readonly SessionParent[]): Promise<ErrorBody | undefined> {
  for (const [index, { session, message }] of parents.entries()) {
    const found = await turns.find({ tenant: actor.tenant, kind: "session", id: session }, message);
    if (found.kind === "found") continue;
    const own = found.kind === "no_message" && session === actor.id && seqOfMessage(message) > found.seq;
    const what = own ? "this message cannot come after itself or a later one" : `there is no message ${message} of a session '${session}'`;
    return errorBody(own ? "dependency_cycle" : "dependency_unknown", what, { session, message, errors: [{ pointer: `/after/${index}`, message: what }] });
  }
  return undefined;
}

/** Who asks to be told is told, so he must be of the tenant. */
const refuseAsker = (actor: ActorAddress, { body }: Command): ErrorBody | undefined =>
  String(body["from"]).startsWith(`${actor.tenant}/`) ? undefined : errorBody("forbidden", "only sessions of the tenant are told of its turns");

export function createAdmission({
  directory,
  providers,
  standing,
  pool,
  turns,
  places,
  tools = BUILT_IN_TOOLS,
}: {
  directory: Directory;
  providers: Providers;
  standing?: BudgetStanding;
  /** Says when so many calls of a tenant wait that no message can be taken. */
  pool?: Pick<CallPool, "refusal">;
  /** Looks for the messages that others come after. Absent: none may. */
  turns?: TurnFinder;
  /** Asks for a place where a tenant may have only so many sessions. Absent: nobody counts them. */
  places?: SessionPlaces;
  /** The tools there are. */
  tools?: ToolTable;
}): Admit {
  function refuseSessionsModel(tenant: TenantRecord, agent: string, { body }: Command, view: ActorView | undefined): ErrorBody | undefined {
    const model = (body["overrides"] as JsonObject | undefined)?.["model"];
    if (typeof model !== "string") return view === undefined ? refuseAgentsModels(providers, tenant, agent) : undefined;
    const refused = refusalOfModel(providers, tenant, model);
    if (refused !== undefined) return errorBody("model_unknown", refused.message, { model });
    return refuseModel(tenant, tenant.agents[agent]?.config.roles ?? [], model);
  }

  return async (actor, command, view) => {
    if (command.type === "provider_key.put") return refuseProvider(providers, command);
    if (command.type === "agent.put") return refuseTools(command, tools);
    if (actor.kind === "tenant") return undefined; // said by operators only, and about the very thing that is asked here
    if (actor.kind === "budget" && command.type === "budget.configure") return refuseForeign(actor, command);
    if (actor.kind === "budget" && ALWAYS_OF_BUDGETS.includes(command.type)) return undefined;
    if (command.type === "dependency.ask") return refuseAsker(actor, command);
    if (command.type === "dependency.told") return undefined;
    // Not knowing is neither a yes nor a no: this rejects for a tenant whose state cannot be read.
    const tenant = await directory.tenant(actor.tenant);
    if (tenant === undefined) return errorBody("not_found", `there is no tenant '${actor.tenant}'`);
    if (tenant.state !== "active") return errorBody("forbidden", `the tenant is ${tenant.state}`);
    const crowded = command.type === "message.send" ? pool?.refusal(actor.tenant) : undefined;
    if (crowded !== undefined) return crowded;
    if (command.type === "message.send" && actor.kind === "session" && view !== undefined) {
      const parents = command.body["after"] as unknown as readonly SessionParent[] | undefined;
      if (parents !== undefined && turns === undefined) return errorBody("unavailable", "this process cannot read other sessions");
      const unknown = parents === undefined || turns === undefined ? undefined : await refuseAfter(turns, actor, parents);
      if (unknown !== undefined) return unknown;
      const { agent, user, config } = sessionContextOf(view);
      return standing?.refusal(actor.tenant, { session: actor.id, agent, user, model: config?.model ?? null });
    }
    if (command.type !== "session.create") return undefined;
    const agent = String(command.body["agent"]);
    if (!Object.hasOwn(tenant.agents, agent)) return errorBody("agent_unknown", `the tenant has no agent '${agent}'`, { agent });
    const refused = refuseSessionsModel(tenant, agent, command, view);
    // Last: who is refused for anything else takes no place. A session that is there has one, or is older than the bound.
    return refused ?? (view === undefined ? places?.refusal(actor.tenant, actor.id) : undefined);
  };
}
