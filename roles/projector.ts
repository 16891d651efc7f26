// projector: streams → Postgres. The only process that writes there, with a credential that may add to the audit and not change it; so it
// does not migrate: `up` does, or `troupe migrate` with the owner's credential, and until then it waits and says so. --rebuild empties the
// tables, the audit among them: it too takes the owner's.
import { createDatabase } from "../projections/database.ts";
import { postgresRows } from "../projections/postgres-rows.ts";
import { createProjector, rebuild } from "../projections/projector.ts";
import { startStatusServer } from "../telemetry/http.ts";
import { connect, observeBus, type Runtime } from "./runtime.ts";

export interface ProjectorRoleOptions {
  readonly id: string;
  readonly http_port: number;
  readonly rebuild: boolean;
}

export async function runProjector(runtime: Runtime, options: ProjectorRoleOptions): Promise<number> {
  const { world, settings, metrics } = runtime;
  const log = runtime.log.with({ projector: options.id });
  if (settings.TROUPE_POSTGRES_URL === undefined) {
    log.error("TROUPE_POSTGRES_URL is not set, so there is nothing to project into");
    return 2;
  }
  const bus = await connect(runtime, `projector-${options.id}`);
  observeBus(bus, metrics);
  const database = createDatabase({ url: settings.TROUPE_POSTGRES_URL, application_name: `troupe-projector-${options.id}`, log });
  const parts = { bus, world, log, metrics };
  if (options.rebuild) {
    const outcome = await rebuild({ ...parts, database });
    log.info("rebuilt", { outcome: outcome.kind });
    await database.close();
    await bus.close();
    return outcome.kind === "rebuilt" ? 0 : 1;
  }
  const projector = createProjector({ ...parts, rows: postgresRows(database) });
  const http = await startStatusServer({
    port: options.http_port,
    metrics,
    log,
    ready: async () => {
      const status = projector.status();
      return {
        bus: { ok: bus.state === "connected" },
        projection: { ok: status.kind === "following", detail: status.kind === "stopped" ? `${status.fault.name}: ${status.fault.message}` : status.kind },
      };
    },
  });
  log.info("projector runs", { http: http.url });
  const first = await Promise.race([runtime.asked_to_end, projector.ended.then((status) => status)]);
  const failed = typeof first === "object" && first.kind === "stopped";
  if (failed) await runtime.asked_to_end; // stays up, red and readable: starting again would stop at the same message
  await projector.stop();
  await http.stop();
  await database.close();
  await bus.close();
  log.info("projector ended");
  return failed ? 1 : 0;
}
