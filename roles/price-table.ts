// price-table: a process prices by the table that `troupe models refresh` took, when there is one; else by the bundled one. Read once, at the start:
// a process that is running keeps the version it says.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { errorFields, type Log } from "../protocol/log.ts";
import { createModelRegistry, MODELS_FILE } from "../providers/models.ts";
import { usePriceTable } from "../providers/prices.ts";

/** Never rejects: a table that cannot be used is told, and the bundled one stays. */
export async function adoptPriceTable(home: string, log: Log): Promise<void> {
  const file = join(home, MODELS_FILE);
  try {
    const data: unknown = JSON.parse(await readFile(file, "utf8"));
    const outcome = createModelRegistry().refresh(data);
    if (outcome.kind === "refused") {
      log.error("the table of prices is not used, the bundled one stays", { file, reason: outcome.reason });
      return;
    }
    usePriceTable(data as Parameters<typeof usePriceTable>[0], outcome.version);
    log.info("prices of a refreshed table", { version: outcome.version, models: outcome.after });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return; // The usual case: nobody refreshed.
    log.error("the table of prices is not used, the bundled one stays", { file, ...errorFields(error) });
  }
}
