// permissions: what a tenant's agents may do: its default, its denials and its grants by role; and the word that running sessions take up what
// changed.
import type { JsonObject } from "../protocol/json.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { recordOf, tell } from "./tenancy.ts";

const NONE = "none";
/** `none` alone takes everything away; a list is as it is. */
const rulesOf = (rules: readonly string[] | undefined): readonly string[] => (rules === undefined || (rules.length === 1 && rules[0] === NONE) ? [] : rules);
const listed = (rules: readonly string[]): string => (rules.length === 0 ? "–" : rules.join(" "));

export async function showPermissions(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  const { policy, grants, config_epoch } = await recordOf(context, tenant);
  if (printer.json) {
    printer.document({ tenant, ...policy, grants, config_epoch });
    return EXIT.done;
  }
  printer.line(`by default ${policy.default === "allow" ? "everything is allowed" : "nothing is allowed"}; denied to all: ${listed(policy.deny)}`);
  printer.table(
    ["role", "allow", "deny"],
    Object.entries(grants).map(([role, grant]) => [role, listed(grant.allow), listed(grant.deny)]),
  );
  return EXIT.done;
}

export async function setPermissions(
  context: Context,
  { tenant, default: by_default, deny }: { tenant: string; default?: "allow" | "deny"; deny?: readonly string[] },
): Promise<number> {
  const body: JsonObject = { ...(by_default === undefined ? {} : { default: by_default }), ...(deny === undefined ? {} : { deny: rulesOf(deny) }) };
  await tell(context, tenant, "tenant.configure", body);
  return showPermissions(context, { tenant });
}

export async function grantPermissions(
  context: Context,
  { tenant, role, allow, deny }: { tenant: string; role: string; allow?: readonly string[]; deny?: readonly string[] },
): Promise<number> {
  await tell(context, tenant, "grant.put", { role, allow: rulesOf(allow), deny: rulesOf(deny) });
  return showPermissions(context, { tenant });
}

export async function refreshAgents(context: Context, { tenant, reason }: { tenant: string; reason?: string }, agent: string | undefined): Promise<number> {
  const { printer } = context;
  const reply = await tell(context, tenant, "config.updated", { ...(agent === undefined ? {} : { agent }), ...(reason === undefined ? {} : { reason }) });
  if (printer.json) printer.document({ tenant, agent: agent ?? null, ...reply.result });
  else
    printer.line(
      `sessions of ${agent === undefined ? `all agents of ${tenant}` : `${agent} of ${tenant}`} take their configuration up anew at their next turn`,
    );
  return EXIT.done;
}
