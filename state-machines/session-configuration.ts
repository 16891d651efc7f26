// session-configuration: how a session comes to its configuration: the steps of its initialisation, its tries, and what it freezes.
//
//   begun ──all steps taken──▶ configured
//     └──one failed──▶ failed ──tries are left: after 100, 200 and 500 ms──▶ begun
//                         └──none is──▶ given up, with the step's name
import { LOOPS_DEFAULT } from "../protocol/limits.ts";
import type { EffectError } from "./definition.ts";
import type { Change } from "./session-change.ts";
import { INIT_STEPS, type SessionContext } from "./session-context.ts";
import type { ConfigurationInput, ConfigurationOutput } from "./session-effects.ts";
import { type Failed, FAILURE_CHARACTERS_MAX } from "./session-failure.ts";

/** A step that fails is tried again after these, then the session is unhealthy (AR-F10). */
export const INIT_RETRY_MS = [100, 200, 500] as const;
/** One try. Reading one journal takes milliseconds; this outlasts a broker's election twice, and all tries together a minute. */
export const CONFIGURATION_PATIENCE_MS = 15_000;

/** How long an idle session lives when its agent says nothing (AR-F50). */
export const IDLE_TTL_MS = 24 * 60 * 60 * 1000;
/** How long a paused or hibernated one does. */
export const SUSPENDED_TTL_MS = 7 * 24 * 60 * 60 * 1000;

/** The second time what was asked for at creation is read from its entry: the context keeps it only as long as it is needed. */
export function configurationInput({ agent, requested }: SessionContext): ConfigurationInput {
  return requested === null ? { agent, overrides: null, mode: null, again: true } : { agent, overrides: requested.overrides, mode: requested.mode };
}

/** A try of the initialisation begins, at its first step. */
export function initBegun(context: SessionContext): Change {
  const retries = context.init === null ? 0 : context.init.retries + 1;
  return { context: { init: { step: INIT_STEPS[0], retries, failed: null } }, tell: [{ type: "session.initializing", step: INIT_STEPS[0], retries }] };
}

export function initFailed(context: SessionContext, { code, message, details }: EffectError): Change {
  const step = INIT_STEPS.find((one) => one === details?.["step"]) ?? context.init?.step ?? INIT_STEPS[0];
  const retries = context.init?.retries ?? 0;
  const failed: Failed = { code, message: message.slice(0, FAILURE_CHARACTERS_MAX) };
  const retry_in_ms = INIT_RETRY_MS[retries] ?? null;
  return { context: { init: { step, retries, failed } }, tell: [{ type: "session.initializing", step, retries, code, message: failed.message, retry_in_ms }] };
}

/** It is given up: why stands in the reason, with the step's name. */
export function initGivenUp(context: SessionContext): Change {
  const { step, failed } = context.init ?? { step: INIT_STEPS[0], failed: null };
  return { context: { init: null, reason: `step '${step}': ${failed?.code ?? "internal"}: ${failed?.message ?? ""}`.slice(0, FAILURE_CHARACTERS_MAX) } };
}

export function configured(context: SessionContext, { config, hash, agent_version, denied_tools, place }: ConfigurationOutput): Change {
  return {
    context: {
      // What a session is does not change with its agent.
      mode: context.requested === null ? context.mode : (context.requested.mode ?? config.mode),
      requested: null,
      init: null,
      at_boundary: true,
      config: {
        seq: context.now.seq,
        hash,
        agent_version,
        model: config.model,
        tools: config.tools,
        denied_tools: denied_tools ?? [],
        max_loops: config.max_loops ?? LOOPS_DEFAULT,
        max_output_tokens: config.max_output_tokens ?? null,
        temperature: config.temperature ?? null,
        idle_ttl_ms: config.idle_ttl_ms ?? IDLE_TTL_MS,
        suspended_ttl_ms: config.suspended_ttl_ms ?? SUSPENDED_TTL_MS,
        ...(config.call_timeout_ms === undefined ? {} : { call_timeout_ms: config.call_timeout_ms }),
        ...(config.tool_prices === undefined ? {} : { tool_prices: config.tool_prices }),
        ...(place === undefined ? {} : { place }),
      },
    },
  };
}
