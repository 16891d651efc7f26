// scopes: what a credential may do. A credential names its tenant; its scopes say how much of what is the tenant's it reaches.
//
//   sessions:read     see sessions, events, tokens, agents; replay; listen on the bus
//   sessions:write    create sessions, send, cancel, pause …; publish commands on the bus
//   admin             both, and the tenant's own keys and agents, and unpark
//   operator:read     see any tenant's record          (operators only, and no tenant's sessions)
//   operator:write    create, suspend and resume tenants, and make their keys
//
// Invariants:
//   S1. A word that is no scope grants nothing.
//   S2. No list of scopes makes an operator out of a tenant's credential, or gives an operator a tenant's sessions.

export const TENANT_SCOPES = ["sessions:read", "sessions:write", "admin"] as const;
export type TenantScope = (typeof TENANT_SCOPES)[number];

export const OPERATOR_SCOPES = ["operator:read", "operator:write"] as const;
export type OperatorScope = (typeof OPERATOR_SCOPES)[number];

export type Scope = TenantScope | OperatorScope;

/** What an API key that lists no scopes may do: everything but administer. An operator's key may then only look. */
const TENANT_KEY_DEFAULT: readonly Scope[] = ["sessions:read", "sessions:write"];
const OPERATOR_KEY_DEFAULT: readonly Scope[] = ["operator:read"];

const IMPLIED: Partial<Record<Scope, readonly Scope[]>> = { admin: TENANT_KEY_DEFAULT, "operator:write": OPERATOR_KEY_DEFAULT };

/** What the listed words grant to a credential of this kind. */
export function grantedBy(listed: readonly string[], kind: "tenant" | "operator"): ReadonlySet<Scope> {
  const known: readonly Scope[] = kind === "tenant" ? TENANT_SCOPES : OPERATOR_SCOPES; // S2
  const granted = new Set<Scope>();
  for (const scope of known) {
    if (!listed.includes(scope)) continue; // S1
    granted.add(scope);
    for (const implied of IMPLIED[scope] ?? []) granted.add(implied);
  }
  return granted;
}

/** The same for an API key, where listing nothing means the usual. */
export function grantedByKey(listed: readonly string[], kind: "tenant" | "operator"): ReadonlySet<Scope> {
  if (listed.length > 0) return grantedBy(listed, kind);
  return new Set(kind === "tenant" ? TENANT_KEY_DEFAULT : OPERATOR_KEY_DEFAULT);
}
