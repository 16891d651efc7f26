// performers: who carries out each effect of each machine, all behind one gate. A machine whose effect has nobody here does not start (lint), and
// neither does one whose effect has not declared what it does (permission.ts).
import { silentLog } from "../protocol/log.ts";
import type { BreakerBoard } from "../providers/breaker.ts";
import { createBreakerBoard } from "./breaker-board.ts";
import type { Directory } from "./directory.ts";
import { callModel, type CallModelDeps } from "./effects/call-model.ts";
import { callTool } from "./effects/call-tool.ts";
import { type DeliveryDeps, deliverWebhook } from "./effects/deliver-webhook.ts";
import { type CountsSessions, initSteps, loadConfiguration } from "./effects/load-configuration.ts";
import { lookUpTurns } from "./effects/look-up-turns.ts";
import { withGuardrails } from "./guardrails.ts";
import { createPatternMatcher, type PatternMatcher } from "./pattern-matcher.ts";
import type { Performers } from "./performer.ts";
import { createGate, gated } from "./permission.ts";
import type { TimedCalls } from "./timed-calls.ts";
import type { TurnFinder } from "./turn-finder.ts";

export interface PerformersDeps extends Omit<CallModelDeps, "breakers"> {
  readonly directory: Directory;
  /** Absent: breakers of its own that are shared with nobody. */
  readonly breakers?: BreakerBoard;
  /** Absent: one of its own, whose thread ends with the process. */
  readonly patterns?: PatternMatcher;
  /** Absent: what comes after other turns waits until a worker can look them up. */
  readonly turns?: TurnFinder;
  /** Absent: sessions do not say when they end. */
  readonly counts_sessions?: CountsSessions;
  /** Counts the calls of tools. Absent: nobody looks. */
  readonly tool_calls?: Pick<TimedCalls, "run">;
  /** Absent: events are kept and tried again until a worker can sign them. */
  readonly webhooks?: DeliveryDeps;
}

export function createPerformers({ directory, breakers, patterns, webhooks, tool_calls, turns, counts_sessions, ...rest }: PerformersDeps): Performers {
  const model = { ...rest, breakers: breakers ?? createBreakerBoard({ world: rest.world, log: silentLog, worker: "alone" }) };
  const { world } = rest;
  return gated(createGate({ directory, world }), {
    load_configuration: loadConfiguration(directory, world, initSteps(directory, world, undefined, counts_sessions)),
    call_model: withGuardrails({ ...model, patterns: patterns ?? createPatternMatcher(world) }, callModel(model)),
    call_tool: callTool(world, tool_calls, rest.money),
    deliver_webhook: deliverWebhook(world, webhooks),
    look_up_turns: lookUpTurns(turns),
  });
}
