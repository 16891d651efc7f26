// isolation: whether the database keeps tenants apart beneath our queries: looked at in its own catalogue, table by table.
//
// Invariants:
//   N1. Every table with a column `tenant` forces row-level security, also on its owner, and `tenant` leads its primary key.
//   N2. None of our roles can step around it: no superuser, no BYPASSRLS, no ownership of a tenant's table.
//   N3. The roles that serve cannot change, remove or empty the audit.
import type { Database } from "./database.ts";

/** What gateways, the projector and operators connect as; the migrations make them, `letIn` lets them log in. */
export const DATABASE_ROLES = { app: "troupe_app", projector: "troupe_projector", operator: "troupe_operator" } as const;
export type DatabaseRole = keyof typeof DATABASE_ROLES;

/** Everything that is not as it must be, a sentence each; empty when tenants are kept apart. */
export async function isolationFaults(database: Pick<Database, "query">): Promise<string[]> {
  const tables = await database.query<{ name: string; forced: boolean; policies: number; leads: boolean }>(
    `select tables.relname::text as name, tables.relrowsecurity and tables.relforcerowsecurity as forced,
       (select count(*) from pg_policy where polrelid = tables.oid and 'troupe_app'::regrole = any(polroles)
          and pg_get_expr(polqual, polrelid) like '%current_setting(''troupe.tenant''%') as policies,
       coalesce((select indkey[0] = columns.attnum from pg_index where indrelid = tables.oid and indisprimary), false) as leads
     from pg_class tables join pg_attribute columns on columns.attrelid = tables.oid and columns.attname = 'tenant' and not columns.attisdropped
     where tables.relkind in ('r', 'p') and tables.relnamespace = 'public'::regnamespace order by name`,
  );
  const faults: string[] = [];
  for (const { name, forced, policies, leads } of tables) {
    if (!forced) faults.push(`${name} does not force row-level security`);
    if (policies === 0) faults.push(`${name} has no policy that binds ${DATABASE_ROLES.app} to one tenant`);
    if (!leads) faults.push(`${name} does not have tenant as the first column of its primary key`);
  }
  const roles = await database.query<{ name: string; strong: boolean; owns: number; audit: boolean }>(
    `select rolname::text as name, rolsuper or rolbypassrls or rolcreaterole as strong,
       (select count(*) from pg_class where relowner = roles.oid and relnamespace = 'public'::regnamespace) as owns,
       has_table_privilege(rolname, 'audit', 'update, delete, truncate') or has_any_column_privilege(rolname, 'audit', 'update') as audit
     from pg_roles roles where rolname = any($1::text[]) order by name`,
    [Object.values(DATABASE_ROLES)],
  );
  for (const { name, strong, owns, audit } of roles) {
    if (strong) faults.push(`${name} can step around row-level security`);
    if (owns > 0) faults.push(`${name} owns ${owns} tables, and owners can lift what binds them`);
    if (audit) faults.push(`${name} may change, remove or empty the audit`);
  }
  const missing = Object.values(DATABASE_ROLES).filter((name) => !roles.some((role) => role.name === name));
  faults.push(...missing.map((name) => `there is no role ${name}`));
  return faults;
}

/** Whether this connection itself could see every tenant's rows: fine for a person who looks after the database, not for a process that serves. */
export async function bypassesIsolation(database: Pick<Database, "query">): Promise<boolean> {
  const [row] = await database.query<{ strong: boolean }>("select rolsuper or rolbypassrls as strong from pg_roles where rolname = current_user");
  return row?.strong !== false;
}

/** Gives a role of ours a password and lets it log in. With an owner's connection. The password stands in no statement's text. */
export async function letIn(database: Database, role: DatabaseRole, password: string): Promise<void> {
  await database.transaction(async (transaction) => {
    await transaction.query("select set_config('troupe.role', $1, true), set_config('troupe.password', $2, true)", [DATABASE_ROLES[role], password]);
    await transaction.query(
      "do $$ begin execute format('alter role %I login password %L', current_setting('troupe.role'), current_setting('troupe.password')); end $$",
    );
  });
}

/** The same database, as this role. */
export function urlAs(url: string, role: DatabaseRole, password: string): string {
  const its = new URL(url);
  its.username = DATABASE_ROLES[role];
  its.password = encodeURIComponent(password);
  return its.href;
}
