// projecting-process: a projector in a process of its own, so that a test can kill it. Makes the stream from the seed, tells that it is
// ready, projects slowly enough to be caught, and ends when it is through.
import { createDatabase } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { silentLog } from "../../protocol/log.ts";
import { livedStream, realWorld } from "./event-stream.ts";

const [url = "", seed = "", sessions = "", happenings = ""] = process.argv.slice(2);
const { stream } = livedStream(Number(seed), Number(sessions), Number(happenings));
const database = createDatabase({ url, application_name: "projecting-process", log: silentLog });
process.stdout.write("ready\n");
const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_messages_max: 5, batch_wait_ms: 0 });
await projector.reached(stream.messages.length, 60_000);
await projector.stop();
await database.close();
