// plain-host: a worker's host of actors on the in-memory bus and nothing around it: nobody judges it, nobody takes from it.
import type { Performers } from "../../actors/performer.ts";
import { createRestorer } from "../../actors/restore.ts";
import { createShardHost, type ShardHost, type ShardHostDeps } from "../../actors/shard-host.ts";
import type { Bus } from "../../bus/port.ts";
import { silentLog } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import { cores } from "../../state-machines/kinds.ts";

export function plainHost(place: {
  bus: Bus;
  world: World;
  name: string;
  performers: Performers;
  admit?: ShardHostDeps["admit"];
  on_conflict?: ShardHostDeps["on_conflict"];
  may_act?: () => boolean;
}): ShardHost {
  const { bus, world, name, performers, admit, on_conflict = async () => "mine", may_act = () => true } = place;
  let commits = 0;
  return createShardHost({
    bus,
    world,
    log: silentLog,
    cores,
    restorer: createRestorer({ bus, cores, log: silentLog }),
    performers,
    worker: name,
    next_commit_id: () => `${name}.${commits++}`,
    may_act,
    on_conflict,
    ...(admit === undefined ? {} : { admit }),
  });
}
