// authenticate: an API key → whose it is. The tenant comes from the credential and from nothing else.
//
//   Authorization: Bearer troupe.{tenant}.{key_id}.{secret}      hash = SHA-256 of the whole key, in hex
//
// Invariants:
//   K1. The key is never logged, stored or put into an error.
//   K2. Hashes are compared in constant time, also where there is no such tenant or key.
//   K3. Missing data refuses: no record, no hash, an unknown state of the tenant.
import { createHash, timingSafeEqual } from "node:crypto";
import type { TenantRecord } from "../actors/directory.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { isId, SYSTEM_TENANT } from "../protocol/ids.ts";

/** Who asks. */
export interface Principal {
  readonly tenant: string;
  readonly key_id: string;
  readonly scopes: readonly string[];
}

export type Authentication =
  | { readonly kind: "principal"; readonly principal: Principal; readonly record: TenantRecord }
  | { readonly kind: "refused"; readonly error: ErrorBody };

/** Two ids of 64, a secret of 43, and room. A longer one is not hashed. */
const KEY_CHARACTERS_MAX = 512;
const NO_HASH = "0".repeat(64);

const UNAUTHENTICATED: Authentication = { kind: "refused", error: errorBody("unauthenticated", "an API key is needed: Authorization: Bearer troupe.…") };

interface ParsedKey {
  readonly tenant: string;
  readonly key_id: string;
  readonly hash: string;
}

function parseKey(authorization: string | undefined): ParsedKey | undefined {
  if (authorization === undefined || authorization.length > KEY_CHARACTERS_MAX) return undefined;
  const key = /^bearer +(\S+)$/i.exec(authorization)?.[1];
  if (key === undefined) return undefined;
  const [word, tenant, key_id, secret, ...rest] = key.split(".");
  if (word !== "troupe" || rest.length > 0 || !isId(tenant) || tenant === SYSTEM_TENANT || !isId(key_id) || secret === undefined || secret === "")
    return undefined;
  return { tenant, key_id, hash: createHash("sha256").update(key).digest("hex") };
}

function sameHash(hash: string, wanted: string): boolean {
  const a = Buffer.from(hash);
  const b = Buffer.from(wanted);
  return a.length === b.length && timingSafeEqual(a, b);
}

/**
 * Refuses: `unauthenticated` for a missing, malformed, unknown or revoked key and for a tenant that is closed;
 *          `forbidden` for a valid key of a tenant that is suspended.
 * Rejects: as `tenantOf` does, when the tenant's record cannot be had.
 */
export async function authenticate(authorization: string | undefined, tenantOf: (id: string) => Promise<TenantRecord | undefined>): Promise<Authentication> {
  const parsed = parseKey(authorization);
  if (parsed === undefined) return UNAUTHENTICATED;
  const record = await tenantOf(parsed.tenant);
  const known = record !== undefined && Object.hasOwn(record.keys, parsed.key_id) ? record.keys[parsed.key_id] : undefined;
  const matches = sameHash(known?.hash ?? NO_HASH, parsed.hash); // K2
  if (record === undefined || known === undefined || !matches || known.revoked_at_ms !== null) return UNAUTHENTICATED; // K3
  if (record.state === "suspended") return { kind: "refused", error: errorBody("forbidden", "the tenant is suspended") };
  if (record.state !== "active") return UNAUTHENTICATED; // K3
  return { kind: "principal", principal: { tenant: parsed.tenant, key_id: parsed.key_id, scopes: known.scopes }, record };
}
