// load-configuration: initialises a session in five steps and freezes what it will be. One effect takes them all, so that a session costs one
// append; the step that fails is named in the failure (`details.step`), and the session tries again or gives up.
//
//   agent ──▶ configuration ──▶ guardrails ──▶ tools ──▶ permissions ──▶ frozen
//
// The output is journaled, so the session keeps it whatever happens to the agent afterwards, until a change that is critical. It names tools
// and guardrails by hash too: a declaration that changes under a session shows.
//
// Invariants:
//   LC1. Equal in meaning is equal in hash: keys, tools, roles and guardrails come in any order (AR-F09).
//   LC2. A step has an end: what hangs is a failure of that step.
//   LC3. Nothing secret is frozen: only what the tenant's journal says, and hashes.
//   LC4. A name that no tool has is not frozen: nothing could be pinned for it, and the tool that takes the name one day would be nobody's choice.
//   LC5. No fallback and no plan for hard times leads to a model that the agent may not use (AR-F66).
import { BusUnavailable } from "../../bus/fence.ts";
import { type AgentConfig, agentConfig } from "../../protocol/commands.ts";
import { actorPath, budgetActor } from "../../protocol/ids.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { hashOf } from "../../protocol/json.ts";
import { LOOPS_DEFAULT } from "../../protocol/limits.ts";
import { pause, type World } from "../../protocol/world.ts";
import { priceVersion } from "../../providers/prices.ts";
import { allowed, permissionsOf, type Permissions } from "../../state-machines/permission.ts";
import type { InitStep, SessionMode } from "../../state-machines/session-context.ts";
import type { ConfigurationInput, ConfigurationOutput } from "../../state-machines/session-effects.ts";
import { BUILT_IN_TOOLS, type ToolTable, unknownTools } from "../../state-machines/tools.ts";
import type { Directory, TenantRecord } from "../directory.ts";
import { EffectFailure, type EffectScope, type Performer } from "../performer.ts";
import { configEpochOf } from "../permission.ts";

/** Shorter than the session's patience with a try (CONFIGURATION_PATIENCE_MS), so that the step is named. */
const STEP_PATIENCE_MS = 10_000;
const AWAY_RETRY_MS = 100;

/** What the steps have found so far. */
interface Draft {
  readonly input: ConfigurationInput;
  readonly scope: EffectScope;
  record?: TenantRecord;
  agent?: TenantRecord["agents"][string];
  config?: AgentConfig;
  guardrail_hashes?: Record<string, string>;
  tool_hashes?: Record<string, string>;
  permissions?: Permissions;
  place?: NonNullable<ConfigurationOutput["place"]>;
}

export type InitSteps = Readonly<Record<InitStep, (draft: Draft) => Promise<void> | void>>;

export function frozenConfig(config: AgentConfig, overrides: JsonObject | null, mode: SessionMode | null): AgentConfig {
  const laid = { ...config, ...overrides, ...(mode === null ? {} : { mode }) } as AgentConfig;
  return {
    ...laid,
    tools: [...new Set(laid.tools)].sort(),
    max_loops: laid.max_loops ?? LOOPS_DEFAULT,
    ...(laid.roles === undefined ? {} : { roles: [...new Set(laid.roles)].sort() }),
    ...(laid.guardrails === undefined ? {} : { guardrails: laid.guardrails.toSorted((a, b) => (a.name < b.name ? -1 : 1)) }),
  };
}

/** What was asked for at creation, when the session no longer keeps it. */
async function wishesOf({ input, scope }: Draft): Promise<{ overrides: JsonObject | null; mode: SessionMode | null }> {
  if (input.again !== true) return input;
  const init = (await scope.entries([1])).get(1);
  if (init?.t !== "init") throw new EffectFailure("internal", "a session's first entry says what was asked for");
  return { overrides: (init.body["overrides"] as JsonObject | undefined) ?? null, mode: (init.body["mode"] as SessionMode | undefined) ?? null };
}

/** A step is taken after those before it, so what they found is there. */
function found<T>(value: T | undefined): T {
  if (value === undefined) throw new EffectFailure("internal", "a step was taken before the one that it needs");
  return value;
}

/** A bus that is away is waited for: a session is not unhealthy because a broker was restarted while it began. */
async function recordOf(directory: Directory, world: World | undefined, { actor, signal }: EffectScope): Promise<TenantRecord | undefined> {
  for (;;) {
    try {
      return await directory.tenant(actor.tenant);
    } catch (error) {
      if (world === undefined || signal.aborted || !(error instanceof BusUnavailable)) throw error;
      await pause(world, AWAY_RETRY_MS);
    }
  }
}

/** May a tenant have only so many sessions? */
export type CountsSessions = (tenant: string) => Promise<boolean>;

export function initSteps(directory: Directory, world?: World, table: ToolTable = BUILT_IN_TOOLS, counts_sessions?: CountsSessions): InitSteps {
  return {
    async agent(draft) {
      const record = await recordOf(directory, world, draft.scope);
      if (record === undefined) throw new EffectFailure("not_found", "there is no such tenant");
      const { agent } = draft.input;
      if (!Object.hasOwn(record.agents, agent)) throw new EffectFailure("agent_unknown", `the tenant has no agent '${agent}'`);
      draft.record = record;
      const { actor } = draft.scope;
      // Where it cannot be known, the place is found free when places run out (actors/session-places.ts).
      const counted = (await counts_sessions?.(actor.tenant).catch(() => false)) === true;
      if (counted) draft.place = { budget: actorPath(budgetActor(actor.tenant)), session: actor.id };
      draft.agent = found(record.agents[agent]);
    },
    async configuration(draft) {
      const { overrides, mode } = await wishesOf(draft);
      const checked = agentConfig.safeParse(frozenConfig(found(draft.agent).config, overrides, mode));
      if (!checked.success) throw new EffectFailure("invalid", `the agent's configuration is not valid: ${checked.error.issues[0]?.message ?? ""}`);
      draft.config = checked.data;
    },
    guardrails(draft) {
      draft.guardrail_hashes = Object.fromEntries((found(draft.config).guardrails ?? []).map((rule) => [rule.name, hashOf(rule)]));
    },
    tools(draft) {
      const { tools } = found(draft.config);
      // LC4
      const unknown = unknownTools(tools, table);
      if (unknown.length > 0) throw new EffectFailure("tool_unknown", `there is no tool '${unknown.join("', '")}'`);
      draft.tool_hashes = Object.fromEntries(tools.map((name) => [name, hashOf(table[name] ?? null)]));
    },
    permissions(draft) {
      const { policy, grants } = found(draft.record) as Partial<TenantRecord>;
      // Not knowing is not a yes (G2 of actors/permission.ts).
      if (policy === undefined || grants === undefined) throw new EffectFailure("unavailable", "what the tenant permits is not known");
      draft.permissions = permissionsOf(policy, grants, found(draft.config).roles ?? []);
    },
  };
}

/** LC5: the other models that a call may come to, without those that the agent may not use. Its own model stays, and is refused when it is called. */
function withoutDenied(config: AgentConfig, permissions: Permissions): { readonly config: AgentConfig; readonly denied_models: readonly string[] } {
  const denied = new Set<string>();
  const permitted = (name: string): boolean => {
    if (allowed(permissions, { kind: "model", name }).kind === "allowed") return true;
    denied.add(name);
    return false;
  };
  const { fallbacks, degrade, ...rest } = config;
  const chains = Object.entries(fallbacks ?? {}).map(([cause, models]) => [cause, models?.filter(permitted)]);
  const { model, ...plan } = degrade ?? {};
  const cheaper = model === undefined || permitted(model) ? degrade : plan;
  return {
    config: {
      ...rest,
      ...(fallbacks === undefined ? {} : { fallbacks: Object.fromEntries(chains) as AgentConfig["fallbacks"] }),
      ...(cheaper === undefined ? {} : { degrade: cheaper }),
    },
    denied_models: [...denied].sort(),
  };
}

/** LC1 */
function frozen(draft: Draft): ConfigurationOutput {
  const permissions = found(draft.permissions);
  const { config, denied_models } = withoutDenied(found(draft.config), permissions);
  const denied_tools = config.tools.filter((name) => allowed(permissions, { kind: "tool", name }).kind === "denied");
  const content = {
    config: { ...config, tools: config.tools.filter((name) => !denied_tools.includes(name)) },
    denied_tools,
    ...(denied_models.length === 0 ? {} : { denied_models }),
    tool_hashes: found(draft.tool_hashes),
    guardrail_hashes: found(draft.guardrail_hashes),
    roles: config.roles ?? [],
    permissions,
    price_version: priceVersion(),
  };
  const { agent } = draft.input;
  const { place } = draft;
  return {
    ...content,
    ...(place === undefined ? {} : { place }),
    hash: hashOf(content),
    agent,
    agent_version: found(draft.agent).version,
    config_epoch: configEpochOf(found(draft.record), agent),
  };
}

/** LC2 */
async function within(world: World | undefined, work: Promise<void> | void): Promise<void> {
  if (world === undefined || work === undefined) return work;
  let stop = (): void => {};
  const late = new Promise<never>((_, reject) => {
    stop = world.after(STEP_PATIENCE_MS, () => reject(new EffectFailure("timeout", `it did not come within ${STEP_PATIENCE_MS / 1000} s`)));
  });
  try {
    await Promise.race([work, late]);
  } finally {
    stop();
  }
}

/** Without a world no step has an end of its own; the session's patience with the whole remains. */
export function loadConfiguration(directory: Directory, world?: World, steps: InitSteps = initSteps(directory, world)): Performer {
  return async (input: ConfigurationInput, scope): Promise<Json> => {
    const draft: Draft = { input, scope };
    for (const [step, take] of Object.entries(steps)) {
      try {
        await within(world, take(draft));
      } catch (error) {
        const { code, message } =
          error instanceof EffectFailure ? error.effect_error : { code: "unavailable", message: error instanceof Error ? error.message : String(error) };
        throw new EffectFailure(code, message, { step });
      }
    }
    return frozen(draft) as unknown as Json;
  };
}
