// permission: may this action be done? One pure answer for model calls, tool calls and writes to memory, out of what the tenant configured.
//
//   denied by the tenant or by a grant of one of the agent's roles ──▶ no
//   allowed by a grant of one of its roles                          ──▶ yes
//   otherwise                                                       ──▶ the tenant's default
//
// An action is named `{kind}:{name}`: `model:anthropic/claude-x`, `tool:pay`, `memory:notes`. A rule is such a name, or the beginning of one
// followed by `*`: `model:openai/*`, `tool:*`.
//
// Invariants:
//   PE1. A denial wins over every allowance, whoever said it.
//   PE2. What is not known is not permitted: without a policy there is no answer but no.
//   PE3. The order in which rules were said does not matter: equal permissions have equal text.

export const ACTION_KINDS = ["model", "tool", "memory"] as const;
export type ActionKind = (typeof ACTION_KINDS)[number];
export interface Action {
  readonly kind: ActionKind;
  readonly name: string;
}

/** What a role may and may not, as rules. */
export interface Grant {
  readonly allow: readonly string[];
  readonly deny: readonly string[];
}

/** What a tenant configured for all its agents. */
export interface Policy {
  readonly default: "allow" | "deny";
  readonly deny: readonly string[];
}

/** The part of it that concerns one agent: what a session freezes. */
export interface Permissions {
  readonly default: "allow" | "deny";
  readonly allow: readonly string[];
  readonly deny: readonly string[];
}

export type Verdict = { readonly kind: "allowed" } | { readonly kind: "denied"; readonly message: string };

const sorted = (rules: Iterable<string>): string[] => [...new Set(rules)].sort();

/** PE3. A role that nobody granted anything has nothing to say. */
export function permissionsOf(policy: Policy, grants: Readonly<Record<string, Grant>>, roles: readonly string[]): Permissions {
  const mine = roles.flatMap((role) => (Object.hasOwn(grants, role) ? [grants[role] as Grant] : []));
  return {
    default: policy.default,
    allow: sorted(mine.flatMap((grant) => grant.allow)),
    deny: sorted([...policy.deny, ...mine.flatMap((grant) => grant.deny)]),
  };
}

const covers = (rule: string, name: string): boolean => (rule.endsWith("*") ? name.startsWith(rule.slice(0, -1)) : rule === name);

export function allowed(permissions: Permissions | undefined, { kind, name }: Action): Verdict {
  const action = `${kind}:${name}`;
  if (permissions === undefined) return { kind: "denied", message: `what is permitted is not known, so ${action} is not` }; // PE2
  const denied = permissions.deny.find((rule) => covers(rule, action));
  if (denied !== undefined) return { kind: "denied", message: `${action} is denied by the rule '${denied}'` }; // PE1
  if (permissions.default === "allow" || permissions.allow.some((rule) => covers(rule, action))) return { kind: "allowed" };
  return { kind: "denied", message: `${action} is allowed by no grant, and the tenant's default is to deny` };
}
