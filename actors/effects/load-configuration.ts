// load-configuration: freezes what a session will be: the agent's present version, with the session's own overrides laid over it.
//
// The output is journaled, so the session keeps this configuration whatever happens to the agent afterwards; its hash is the same for any order
// of keys, and of tools, whose order bears no meaning (AR-F09).
import type { AgentConfig } from "../../protocol/commands.ts";
import { hashOf, type JsonObject } from "../../protocol/json.ts";
import { LOOPS_DEFAULT } from "../../protocol/limits.ts";
import type { Directory } from "../directory.ts";
import { EffectFailure, type Performer } from "../performer.ts";

interface Input {
  readonly agent: string;
  readonly overrides: JsonObject;
  readonly mode: "multi" | "single" | null;
}

export function frozenConfig(config: AgentConfig, overrides: JsonObject, mode: "multi" | "single" | null): JsonObject {
  const laid = { ...config, ...overrides, ...(mode === null ? {} : { mode }) } as AgentConfig;
  return { ...laid, tools: laid.tools.toSorted(), max_loops: laid.max_loops ?? LOOPS_DEFAULT } as unknown as JsonObject;
}

export function loadConfiguration(directory: Directory): Performer {
  return async ({ agent, overrides, mode }: Input, { actor }) => {
    const tenant = await directory.tenant(actor.tenant);
    const found = tenant !== undefined && Object.hasOwn(tenant.agents, agent) ? tenant.agents[agent] : undefined;
    if (found === undefined) throw new EffectFailure("agent_unknown", `the tenant has no agent '${agent}'`);
    const config = frozenConfig(found.config, overrides, mode);
    return { config, hash: hashOf(config), agent_version: found.version };
  };
}
