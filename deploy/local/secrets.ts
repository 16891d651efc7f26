// secrets: passwords of the local broker and database, drawn once and kept in $TROUPE_HOME/secrets.json, readable by its owner alone; and the file
// of master keys beside it, which gateways and workers read themselves.
import { chmodSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { randomBytes } from "node:crypto";
import { join } from "node:path";
import { drawMasterKey } from "../../protocol/key-ring.ts";

export interface LocalSecrets {
  /** The secret of this name; drawn when it is asked for the first time. `draw` makes one of another form than 24 random bytes. */
  of(name: string, draw?: () => string): string;
}

export function localSecrets(home: string): LocalSecrets {
  const file = join(home, "secrets.json");
  return {
    of(name, draw = () => randomBytes(24).toString("base64url")) {
      // Read each time: several rooms of one process keep their secrets in the same file.
      const known: Record<string, string> = existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as Record<string, string>) : {};
      const present = known[name];
      if (present !== undefined) return present;
      const drawn = draw();
      mkdirSync(home, { recursive: true });
      writeFileSync(`${file}.new`, `${JSON.stringify({ ...known, [name]: drawn }, null, 2)}\n`, { mode: 0o600 });
      chmodSync(`${file}.new`, 0o600);
      renameSync(`${file}.new`, file);
      return drawn;
    },
  };
}

/** Under $TROUPE_HOME: the master keys of tenants' own provider keys. Whoever loses it loses those keys. */
export const MASTER_KEYS_FILE = "master-keys";

/** The file of master keys, with one in it when there was none. */
export function localMasterKeys(home: string): string {
  const file = join(home, MASTER_KEYS_FILE);
  if (!existsSync(file)) {
    mkdirSync(home, { recursive: true });
    writeFileSync(`${file}.new`, `${drawMasterKey(randomBytes).line}\n`, { mode: 0o600 });
    renameSync(`${file}.new`, file);
  }
  return file;
}
