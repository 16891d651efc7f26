// secrets: passwords of the local broker and database, drawn once and kept in $TROUPE_HOME/secrets.json, readable by its owner alone.
import { chmodSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { randomBytes } from "node:crypto";
import { join } from "node:path";

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
