// api-key: the form of a tenant's key, `troupe.{tenant}.{key_id}.{secret}`. It names its tenant, so that nothing else has to;
// the secret is 32 random bytes, and only the SHA-256 of the whole key is ever stored.
import { createHash, createHmac } from "node:crypto";
import { ID_PATTERN, isId } from "./ids.ts";

const PREFIX = "troupe";
const KEY_ID_BYTES = 8;
const SECRET_BYTES = 32;
/** Longer is no key of ours: prefix, two ids and the secret. */
const KEY_CHARACTERS_MAX = 256;

export interface ParsedKey {
  readonly tenant: string;
  readonly key_id: string;
  /** SHA-256 of the whole key, hex. */
  readonly hash: string;
}

export function hashKey(key: string): string {
  return createHash("sha256").update(key).digest("hex");
}

/** Reads a key, or answers undefined when it has not the form of one. Says nothing about whether it is valid. */
export function parseKey(key: string): ParsedKey | undefined {
  if (key.length > KEY_CHARACTERS_MAX) return undefined;
  const [prefix, tenant, key_id, secret, ...rest] = key.split(".");
  if (prefix !== PREFIX || rest.length > 0 || !isId(tenant) || !isId(key_id) || secret === undefined || !ID_PATTERN.test(secret)) return undefined;
  return { tenant, key_id, hash: hashKey(key) };
}

/** A fresh key, to be shown once. */
export function createKey(
  tenant: string,
  randomBytes: (count: number) => Uint8Array,
): { readonly key: string; readonly key_id: string; readonly hash: string } {
  const key_id = Buffer.from(randomBytes(KEY_ID_BYTES)).toString("hex").slice(0, 12);
  const secret = Buffer.from(randomBytes(SECRET_BYTES)).toString("base64url");
  const key = `${PREFIX}.${tenant}.${key_id}.${secret}`;
  return { key, key_id, hash: hashKey(key) };
}

/** The password of the stand-in login `tenant-{tenant}` of a development machine: whoever holds the machine's secret can tell it. */
export function standInPassword(secret: string, tenant: string): string {
  return createHmac("sha256", secret).update(tenant).digest("base64url");
}
export const standInUser = (tenant: string): string => `${STAND_IN_PREFIX}${tenant}`;
/** The tenant of a stand-in login's name, or undefined when it is none. */
export function standInTenant(user: string): string | undefined {
  const tenant = user.startsWith(STAND_IN_PREFIX) ? user.slice(STAND_IN_PREFIX.length) : undefined;
  return isId(tenant) ? tenant : undefined;
}
const STAND_IN_PREFIX = "tenant-";
