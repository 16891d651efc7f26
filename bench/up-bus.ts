// up-bus: the bus of an `up` that runs in the given home, as its operator.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { connectJetStream } from "../bus/jetstream.ts";
import type { Bus } from "../bus/port.ts";
import { silentLog } from "../protocol/log.ts";
import type { DevFile } from "../roles/dev-home.ts";
import { realWorld } from "../roles/real-world.ts";

export const readDev = (home: string): DevFile => JSON.parse(readFileSync(join(home, "dev.json"), "utf8")) as DevFile;

export function connectToUp(home: string): Promise<Bus> {
  const { nats_url, nats_operator } = readDev(home);
  return connectJetStream({
    servers: nats_url,
    user: nats_operator.user,
    password: nats_operator.password,
    name: "probe",
    shards: 16,
    replicas: 1,
    log: silentLog,
    world: realWorld(),
    ensure: false,
  });
}
