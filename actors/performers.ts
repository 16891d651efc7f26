// performers: who carries out each effect of each machine. A machine whose effect has nobody here does not start (lint).
import type { World } from "../protocol/world.ts";
import type { Providers } from "../providers/registry.ts";
import type { Directory } from "./directory.ts";
import { callModel } from "./effects/call-model.ts";
import { callTool } from "./effects/call-tool.ts";
import { loadConfiguration } from "./effects/load-configuration.ts";
import type { Performers } from "./performer.ts";

export function createPerformers({ world, directory, providers, on_model }: { world: World; directory: Directory; providers: Providers; on_model?: Parameters<typeof callModel>[0]["on_model"] }): Performers {
  return {
    load_configuration: loadConfiguration(directory),
    call_model: callModel({ world, providers, ...(on_model === undefined ? {} : { on_model }) }),
    call_tool: callTool(world),
  };
}
