// database: the local database made ready for the processes of `up`: tables as declared, and a login for each role that has no more power than
// its work needs. Only `up` itself holds the owner's credential.
import { createDatabase } from "../projections/database.ts";
import { type DatabaseRole, letIn, urlAs } from "../projections/isolation.ts";
import type { Log } from "../protocol/log.ts";

export interface DatabaseLogins {
  readonly app: string;
  readonly projector: string;
}

export async function prepareDatabase({ url, secret, log }: { url: string; secret: (name: string) => string; log: Log }): Promise<DatabaseLogins> {
  const database = createDatabase({ url, application_name: "troupe-up", log, pool_size_max: 1 });
  try {
    await database.migrate();
    const login = async (role: DatabaseRole): Promise<string> => {
      const password = secret(`postgres.${role}`);
      await letIn(database, role, password);
      return urlAs(url, role, password);
    };
    return { app: await login("app"), projector: await login("projector") };
  } finally {
    await database.close();
  }
}
