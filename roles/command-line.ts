// command-line: what the `troupe` command goes by where a person types it: the environment first, else what `up` wrote down in $TROUPE_HOME.
import { existsSync } from "node:fs";
import { join } from "node:path";
import { readDevFile } from "../cli/dev-file.ts";
import { MASTER_KEYS_FILE } from "../deploy/local/secrets.ts";
import type { Settings } from "./settings.ts";

/** Where it finds the broker and the database. */
export async function commandLineSettings(settings: Settings): Promise<Settings> {
  const dev = await readDevFile(settings.TROUPE_HOME);
  if (dev.kind !== "read" || settings.TROUPE_NATS_URL !== undefined) return settings;
  const { nats_url, nats_operator, nats_monitor_url, postgres_url } = dev.file;
  return {
    ...settings,
    TROUPE_NATS_URL: nats_url,
    TROUPE_NATS_USER: nats_operator?.user,
    TROUPE_NATS_PASSWORD: nats_operator?.password,
    TROUPE_NATS_MONITOR_URL: settings.TROUPE_NATS_MONITOR_URL ?? nats_monitor_url,
    TROUPE_POSTGRES_URL: settings.TROUPE_POSTGRES_URL ?? postgres_url,
  };
}

/** The file of master keys; undefined when there is none, or they stand in the environment. */
export function commandLineMasterKeysFile(settings: Settings): string | undefined {
  const kept = join(settings.TROUPE_HOME, MASTER_KEYS_FILE);
  if (settings.TROUPE_MASTER_KEYS !== undefined || settings.TROUPE_MASTER_KEYS_FILE !== undefined) return settings.TROUPE_MASTER_KEYS_FILE;
  return existsSync(kept) ? kept : undefined;
}
