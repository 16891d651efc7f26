// supervisor: one of those that stand by to lead. The leader decides which worker owns which shard; its journal of decisions is the workers' own.
import { createRestorer } from "../actors/restore.ts";
import { cores } from "../state-machines/kinds.ts";
import { workerDefinition } from "../state-machines/worker.ts";
import { connectionOf } from "../supervisors/connections.ts";
import { Leader } from "../supervisors/leader.ts";
import { createWorkerCells } from "../supervisors/worker-cell.ts";
import { startStatusServer } from "../telemetry/http.ts";
import { connect, connectionWatch, lifeline, observeBus, type Runtime } from "./runtime.ts";

const WORKER_STATES = Object.keys(workerDefinition.machine.states);

export interface SupervisorRoleOptions {
  readonly id: string;
  readonly http_port: number;
}

export async function runSupervisor(runtime: Runtime, { id, http_port }: SupervisorRoleOptions): Promise<number> {
  const { world, settings, metrics } = runtime;
  const log = runtime.log.with({ supervisor: id });
  const name = connectionOf("supervisor", id);
  const [bus, life] = await Promise.all([connect(runtime, name), lifeline(runtime, name)]);
  observeBus(bus, metrics);
  const connections = await connectionWatch({ ...runtime, log }, `${name}-watch`);
  if (connections === undefined) log.info("no login of the broker's system account: a killed worker or leader is noticed when its lease ends");
  const nonce = world.id();
  let commits = 0;
  const restorer = createRestorer({ bus, cores, log });
  const leader = new Leader({
    bus,
    world,
    log,
    id,
    open_cell: createWorkerCells({ bus, world, log, core: cores.worker, restorer, supervisor: id, next_commit_id: () => `${nonce}.${commits++}` }),
    ttl_ms: settings.TROUPE_LEASE_TTL_MS,
    ...(connections === undefined ? {} : { connections }),
    observer: {
      role: (role) => metrics.set("troupe_leading", {}, role === "leading" ? 1 : 0),
      died: (_worker, detect_ms) => metrics.observe("troupe_recovery_detect_seconds", {}, detect_ms / 1000),
      workers: (count_by_state) => {
        for (const state of WORKER_STATES) metrics.set("troupe_workers", { state }, count_by_state.get(state) ?? 0);
      },
      moved: ({ reason }) => metrics.add("troupe_shard_changes_total", { what: "moving", reason }),
      assigned({ reason, assign_ms }) {
        metrics.add("troupe_shard_changes_total", { what: "assigned", reason });
        metrics.observe("troupe_recovery_assign_seconds", {}, assign_ms / 1000);
        metrics.add("troupe_wait_ms_total", { reason: "placement" }, assign_ms);
      },
      resumed({ assign_ms, replay_ms, first_token_ms }) {
        if (first_token_ms !== undefined) metrics.observe("troupe_recovery_first_token_seconds", {}, (assign_ms + replay_ms + first_token_ms) / 1000);
      },
    },
  });
  leader.start();
  const http = await startStatusServer({ port: http_port, metrics, log, ready: async () => ({ bus: { ok: bus.state === "connected" } }) });
  log.info("supervisor runs", { http: http.url });
  await runtime.asked_to_end;
  await leader.stop();
  await connections?.close();
  await http.stop();
  await Promise.all([bus.close(), life.close()]);
  log.info("supervisor ended");
  return 0;
}
