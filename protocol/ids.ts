// ids: who an actor is. An actor is named by (tenant, kind, id), and nothing else names one.

/** Tenants and ids: 1 to 64 letters, digits, underscores and hyphens. They stand in subjects, so nothing else may. */
export const ID_PATTERN = /^[A-Za-z0-9_-]{1,64}$/;

/** The tenant that is ours: workers and the runtime's own acts live under it. No credential of a tenant names it. */
export const SYSTEM_TENANT = "system";

export const ACTOR_KINDS = ["session", "workflow", "tenant", "budget", "webhook", "worker"] as const;
export type ActorKind = (typeof ACTOR_KINDS)[number];

export interface ActorAddress {
  readonly tenant: string;
  readonly kind: ActorKind;
  readonly id: string;
}

export function isId(text: unknown): text is string {
  return typeof text === "string" && ID_PATTERN.test(text);
}

export function isActorKind(text: unknown): text is ActorKind {
  return typeof text === "string" && (ACTOR_KINDS as readonly string[]).includes(text);
}

/** The one tenant actor of a tenant. */
export function tenantActor(tenant: string): ActorAddress {
  return { tenant, kind: "tenant", id: "main" };
}

/** The one budget of a tenant. */
export function budgetActor(tenant: string): ActorAddress {
  return { tenant, kind: "budget", id: "main" };
}

/** One of the addresses that a tenant wants called. */
export function webhookActor(tenant: string, id: string): ActorAddress {
  return { tenant, kind: "webhook", id };
}

/** `acme/session/s1`: how people and logs name an actor. */
export function actorPath(actor: ActorAddress): string {
  return `${actor.tenant}/${actor.kind}/${actor.id}`;
}

/** Reads `acme/session/s1`, or answers undefined when it names no actor. */
export function parseActorPath(path: string): ActorAddress | undefined {
  const [tenant, kind, id, ...rest] = path.split("/");
  if (rest.length > 0 || !isId(tenant) || !isActorKind(kind) || !isId(id)) return undefined;
  return { tenant, kind, id };
}
