// authenticate: a credential → whose it is and what it may do. The tenant comes from the credential and from nothing else.
//
//   troupe.{tenant}.{key_id}.{secret}      an API key; its tenant's journal has the SHA-256 of it, its scopes and its end
//   troupe.system.{key_id}.{secret}        an operator's key: another identity, with scopes of its own and no tenant's sessions
//   {header}.{claims}.{signature}          a JWT of an issuer that was configured (oidc.ts)
//
// The same credential opens HTTP (Authorization: Bearer …) and the bus (nats-auth.ts).
//
// Invariants:
//   K1. A credential is never logged, stored or put into an error.
//   K2. Hashes are compared in constant time, also where there is no such tenant or key.
//   K3. Missing data refuses: no record, no hash, no claim, an unknown state of the tenant.
//   K4. A tenant's credential never names an operator, and an operator's never a tenant.
import { timingSafeEqual } from "node:crypto";
import type { TenantRecord } from "../actors/directory.ts";
import { parseKey } from "../protocol/api-key.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { SYSTEM_TENANT } from "../protocol/ids.ts";
import { grantedBy, grantedByKey, type Scope } from "../protocol/scopes.ts";
import type { Oidc } from "./oidc.ts";

/** Who asks. */
export interface Principal {
  /** An operator's tenant is SYSTEM_TENANT. */
  readonly kind: "tenant" | "operator";
  readonly tenant: string;
  /** Who it is within the tenant: `key:{key_id}` or `jwt:{subject}`. */
  readonly name: string;
  readonly scopes: ReadonlySet<Scope>;
  /** When the credential ends, or null for never. */
  readonly expires_at_ms: number | null;
}

export type Authentication =
  | { readonly kind: "principal"; readonly principal: Principal; readonly record: TenantRecord }
  | { readonly kind: "refused"; readonly error: ErrorBody };

export interface AuthenticationDeps {
  /** Rejects when the record cannot be had. */
  readonly tenantOf: (id: string) => Promise<TenantRecord | undefined>;
  /** Wall clock: ends of credentials are dates. */
  readonly now_ms: () => number;
  /** Absent: no JWT is taken. */
  readonly oidc?: Oidc;
  /** Hears of each key that was let in. */
  readonly key_used?: (tenant: string, key_id: string) => void;
}

/** A JWT with a person's groups in it is a few KiB. A longer credential is not looked at. */
const CREDENTIAL_CHARACTERS_MAX = 8 * 1024;
const NO_HASH = "0".repeat(64);

const UNAUTHENTICATED: Authentication = { kind: "refused", error: errorBody("unauthenticated", "an API key is needed: Authorization: Bearer troupe.…") };

function sameHash(hash: string, wanted: string): boolean {
  const a = Buffer.from(hash);
  const b = Buffer.from(wanted);
  return a.length === b.length && timingSafeEqual(a, b);
}

/** What an Authorization header carries. */
export function bearerOf(authorization: string | undefined): string | undefined {
  if (authorization === undefined || authorization.length > CREDENTIAL_CHARACTERS_MAX + 16) return undefined;
  return /^bearer +(\S+)$/i.exec(authorization)?.[1];
}

/**
 * Refuses: `unauthenticated` for a missing, malformed, unknown, revoked or expired credential and for a tenant that is closed;
 *          `forbidden` for a valid one of a tenant that is suspended; `unavailable` when an issuer's keys cannot be had.
 * Rejects: as `tenantOf` does, when the tenant's record cannot be had.
 */
export async function authenticate(credential: string | undefined, deps: AuthenticationDeps): Promise<Authentication> {
  if (credential === undefined || credential.length > CREDENTIAL_CHARACTERS_MAX) return UNAUTHENTICATED;
  if (!credential.startsWith("troupe.") && credential.split(".").length === 3) return byToken(credential, deps);
  const parsed = parseKey(credential);
  if (parsed === undefined) return UNAUTHENTICATED;
  const { tenant, key_id, hash } = parsed;
  const record = await deps.tenantOf(tenant);
  const known = record !== undefined && Object.hasOwn(record.keys, key_id) ? record.keys[key_id] : undefined;
  const matches = sameHash(known?.hash ?? NO_HASH, hash); // K2
  if (record === undefined || known === undefined || !matches || known.revoked_at_ms !== null) return UNAUTHENTICATED; // K3
  const expires_at_ms = known.expires_at_ms ?? null;
  if (expires_at_ms !== null && expires_at_ms <= deps.now_ms()) return UNAUTHENTICATED;
  const kind = tenant === SYSTEM_TENANT ? "operator" : "tenant"; // K4
  const admitted = admit({ kind, tenant, name: `key:${key_id}`, scopes: grantedByKey(known.scopes, kind), expires_at_ms }, record);
  if (admitted.kind === "principal") deps.key_used?.(tenant, key_id);
  return admitted;
}

async function byToken(token: string, { oidc, tenantOf }: AuthenticationDeps): Promise<Authentication> {
  if (oidc === undefined) return UNAUTHENTICATED;
  const verified = await oidc.verify(token);
  if (verified.kind === "unavailable")
    return { kind: "refused", error: errorBody("unavailable", "the issuer's keys cannot be had now", { retry_after_ms: 1000 }) };
  if (verified.kind === "refused") return UNAUTHENTICATED;
  const { tenant, subject, roles, expires_at_ms } = verified;
  const record = await tenantOf(tenant);
  if (record === undefined) return UNAUTHENTICATED; // K3
  const kind = tenant === SYSTEM_TENANT ? "operator" : "tenant"; // K4
  return admit({ kind, tenant, name: `jwt:${subject}`, scopes: grantedBy(roles, kind), expires_at_ms }, record);
}

function admit(principal: Principal, record: TenantRecord): Authentication {
  if (record.state === "suspended") return { kind: "refused", error: errorBody("forbidden", "the tenant is suspended") };
  if (record.state !== "active") return UNAUTHENTICATED; // K3
  return { kind: "principal", principal, record };
}

/** `forbidden` when the principal lacks the scope. */
export function refuseScope({ scopes }: Principal, scope: Scope): ErrorBody | undefined {
  return scopes.has(scope) ? undefined : errorBody("forbidden", `this needs the scope '${scope}', which the credential does not have`, { scope });
}
