// call-tool: runs one tool that a model asked for. The arguments are read from the journal; the input only names where they stand.
import type { AgentConfig } from "../../protocol/commands.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { CALL_TIMEOUT_MS } from "../../protocol/limits.ts";
import { pause, timestamp, type World } from "../../protocol/world.ts";
import { type BUILT_IN_TOOLS, WAIT_MS_MAX } from "../../state-machines/tools.ts";
import type { ToolPrice } from "../../state-machines/tool-dues.ts";
import type { ModelMoney } from "../model-money.ts";
import { EffectFailure, type EffectScope, type Performer } from "../performer.ts";
import { createTimedCalls, stoppedBy, type TimedCalls } from "../timed-calls.ts";

interface Input {
  readonly call_seq: number;
  readonly index: number;
  readonly call_id: string;
  readonly name: string;
  /** The entry that holds the frozen configuration. */
  readonly config_seq: number;
  /** Of a tool that costs something. */
  readonly price?: ToolPrice;
}

type BuiltIn = (args: JsonObject, scope: EffectScope) => Promise<string>;

/** The tools of state-machines/tools.ts, performed. A tool without a performer does not compile. */
function builtInTools(world: World): Record<keyof typeof BUILT_IN_TOOLS, BuiltIn> {
  return {
    now: () => Promise.resolve(timestamp(world.now_ms())),
    async wait_ms({ ms }, { signal }) {
      if (typeof ms !== "number" || !Number.isInteger(ms) || ms < 0 || ms > WAIT_MS_MAX)
        throw new EffectFailure("invalid_args", `ms is a whole number from 0 to ${WAIT_MS_MAX}`);
      await Promise.race([pause(world, ms), new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }))]);
      return `waited ${ms} ms`;
    },
  };
}

export function callTool(
  world: World,
  tool_calls: Pick<TimedCalls, "run"> = createTimedCalls({ world }),
  /** Absent: nobody counts what an agent does by itself. */
  money?: Pick<ModelMoney, "act" | "spend">,
): Performer {
  const tools = builtInTools(world);
  return async ({ call_seq, index, name, config_seq, price }: Input, scope): Promise<Json> => {
    const run = Object.hasOwn(tools, name) ? tools[name as keyof typeof tools] : undefined;
    if (run === undefined) throw new EffectFailure("tool_unknown", `there is no tool '${name}'`);
    const entries = await scope.entries([call_seq, config_seq]);
    const entry = entries.get(call_seq);
    const call = entry?.t === "done" ? ((entry.output as JsonObject)["tool_calls"] as readonly JsonObject[] | undefined)?.[index] : undefined;
    if (call === undefined) throw new EffectFailure("internal", "the journal holds no such tool call");
    if (call["invalid_args"] !== undefined) throw new EffectFailure("invalid_args", "the arguments are not a JSON object");
    const frozen = entries.get(config_seq);
    const config = frozen?.t === "done" ? ((frozen.output as JsonObject)["config"] as unknown as AgentConfig | undefined) : undefined;
    if (config !== undefined) await money?.act({ scope, config });
    // What it has cost so far: its price from the moment it is begun (state-machines/tool-dues.ts).
    let spent: JsonObject = {};
    if (price !== undefined) {
      spent = { cost_usd_micros: 0 };
      scope.so_far(() => spent);
      if (config !== undefined) await money?.spend({ scope, config, name, price });
    }
    const call_it = tool_calls.run(config?.call_timeout_ms ?? CALL_TIMEOUT_MS, scope.signal, async (signal) => {
      if (!(await scope.permitted())) throw new EffectFailure("cancelled", "the actor went to another owner before the tool was run");
      if (price !== undefined) spent = { cost_usd_micros: price.usd_micros };
      const answer = await run((call["args"] ?? {}) as JsonObject, { ...scope, signal });
      // What it says after it was told to stop is not its answer.
      if (!signal.aborted) return answer;
      const { code, message } = stoppedBy(signal);
      throw new EffectFailure(code, code === "timeout" ? `${message}; it may have acted` : message);
    });
    const text = await call_it.catch((error: unknown): never => {
      if (price === undefined || !(error instanceof EffectFailure)) throw error;
      const { code, message, details } = error.effect_error;
      throw new EffectFailure(code, message, { ...details, ...spent });
    });
    return { text, is_error: false, ...spent };
  };
}
