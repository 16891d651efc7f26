// key-ring: how a secret that is a tenant's own (the key of a model provider) rests: encrypted by a master key that only processes are given.
//
//   the secret ──sealSecret, with the first master key──▶ sealed: in the tenant's journal ──openSecret, with the key it names──▶ the secret
//
// AES-256-GCM with a nonce drawn for each sealing. Tenant and provider are authenticated with it, so what is sealed opens for its owner alone.
//
// Invariants, each a test in test/security/key-ring.test.ts:
//   KR1. A sealed secret opens only under the master key it names, for the tenant and the provider it was sealed for, and only unchanged.
//   KR2. The first master key seals; each that is listed opens. So a new one is added, everything is sealed anew, and the old one is taken away.
//   KR3. Neither a secret nor a master key is in anything that is told: not in a fault, not in a refusal.
import { createCipheriv, createDecipheriv, createSecretKey, type KeyObject } from "node:crypto";
import { assert } from "./assert.ts";

const CIPHER = "aes-256-gcm";
const MASTER_KEY_BYTES = 32;
const NONCE_BYTES = 12;
const TAG_BYTES = 16;
/** A key is replaced once in months and its predecessor goes when everything is sealed anew; more is a file that nobody tends. */
export const MASTER_KEYS_MAX = 16;
/** Of a provider's key, as it goes into a header. Today's longest are under 200. */
export const SECRET_CHARACTERS_MAX = 512;
/** Sealed: as many bytes and the tag, in base64url. */
export const CIPHERTEXT_CHARACTERS_MAX = Math.ceil(((SECRET_CHARACTERS_MAX + TAG_BYTES) * 4) / 3);
/** The end of a shorter one would say too much of it. */
const LAST_FOUR_FROM_CHARACTERS = 20;

export interface MasterKey {
  readonly id: string;
  /** Kept where it does not show when something that holds it is printed. */
  readonly key: KeyObject;
}

export interface SealedSecret {
  readonly v: 1;
  readonly master_key_id: string;
  /** base64url, and different for each sealing: it names one. */
  readonly nonce: string;
  /** base64url; the tag stands at its end. */
  readonly ciphertext: string;
}

/** Whose secret it is, and for what. */
export interface SecretOwner {
  readonly tenant: string;
  readonly provider: string;
}

export type MasterKeysReading = { readonly kind: "keys"; readonly keys: readonly MasterKey[] } | { readonly kind: "invalid"; readonly fault: string };

export type OpenedSecret =
  | { readonly kind: "opened"; readonly secret: string }
  /** `unknown_master_key`: it is not listed here (any more). `damaged`: it is not what was sealed, or not for this owner. */
  | { readonly kind: "refused"; readonly reason: "unknown_master_key" | "damaged"; readonly master_key_id: string };

/**
 * Reads master keys, the one that seals first: `{id}:{32 bytes in base64}`, one a line or separated by commas; what follows a # is a remark.
 * Refuses an empty list, two keys of one id, and anything that is no key.
 */
export function readMasterKeys(text: string): MasterKeysReading {
  const invalid = (fault: string): MasterKeysReading => ({ kind: "invalid", fault });
  const keys: MasterKey[] = [];
  const written = text.split("\n").flatMap((line) => line.replace(/#.*$/, "").split(","));
  for (const one of written) {
    if (one.trim() === "") continue;
    // KR3: the place is named, never what stands there.
    const place = `master key ${keys.length + 1}`;
    const [, id, encoded] = /^([A-Za-z0-9_-]{1,64})\s*:\s*([A-Za-z0-9+/_-]{43}=?)$/.exec(one.trim()) ?? [];
    if (id === undefined || encoded === undefined) return invalid(`${place} is not {id}:{32 bytes in base64}`);
    const bytes = Buffer.from(encoded, "base64");
    if (bytes.byteLength !== MASTER_KEY_BYTES) return invalid(`${place} is not 32 bytes long`);
    if (keys.some((key) => key.id === id)) return invalid(`${place} has the id '${id}' of one before it`);
    keys.push({ id, key: createSecretKey(bytes) });
  }
  if (keys.length === 0) return invalid("there is no master key in it");
  if (keys.length > MASTER_KEYS_MAX) return invalid(`there are more than ${MASTER_KEYS_MAX} master keys in it`);
  return { kind: "keys", keys };
}

/** A fresh master key, as readMasterKeys reads it. */
export function drawMasterKey(randomBytes: (count: number) => Uint8Array): { readonly id: string; readonly line: string } {
  const id = `k${Buffer.from(randomBytes(4)).toString("hex")}`;
  return { id, line: `${id}:${Buffer.from(randomBytes(MASTER_KEY_BYTES)).toString("base64")}` };
}

/** What is authenticated beside the secret. Ids have no slash, so no two owners are written alike. */
function ownerBytes({ tenant, provider }: SecretOwner, master_key_id: string): Buffer {
  return Buffer.from(`troupe/secret/1/${master_key_id}/${tenant}/${provider}`);
}

export function sealSecret(keys: readonly MasterKey[], secret: string, owner: SecretOwner, randomBytes: (count: number) => Uint8Array): SealedSecret {
  const master = keys[0]; // KR2
  assert(master !== undefined, "there is a master key to seal with");
  assert(secret.length > 0 && secret.length <= SECRET_CHARACTERS_MAX, "a secret that is sealed has been checked");
  const nonce = randomBytes(NONCE_BYTES);
  const cipher = createCipheriv(CIPHER, master.key, nonce).setAAD(ownerBytes(owner, master.id));
  const ciphertext = Buffer.concat([cipher.update(secret, "utf8"), cipher.final(), cipher.getAuthTag()]);
  return { v: 1, master_key_id: master.id, nonce: Buffer.from(nonce).toString("base64url"), ciphertext: ciphertext.toString("base64url") };
}

/** KR1 */
export function openSecret(keys: readonly MasterKey[], sealed: SealedSecret, owner: SecretOwner): OpenedSecret {
  const { master_key_id } = sealed;
  const master = keys.find((key) => key.id === master_key_id);
  if (master === undefined) return { kind: "refused", reason: "unknown_master_key", master_key_id };
  const [nonce, bytes] = [Buffer.from(sealed.nonce, "base64url"), Buffer.from(sealed.ciphertext, "base64url")];
  const damaged: OpenedSecret = { kind: "refused", reason: "damaged", master_key_id };
  if (nonce.byteLength !== NONCE_BYTES || bytes.byteLength <= TAG_BYTES) return damaged;
  try {
    const decipher = createDecipheriv(CIPHER, master.key, nonce).setAAD(ownerBytes(owner, master_key_id));
    decipher.setAuthTag(bytes.subarray(-TAG_BYTES));
    return { kind: "opened", secret: Buffer.concat([decipher.update(bytes.subarray(0, -TAG_BYTES)), decipher.final()]).toString("utf8") };
  } catch {
    return damaged; // The tag does not fit: another owner, another key under the same id, or other bytes.
  }
}

/** What is wrong with a text that should be a provider's key; undefined when nothing is. KR3 */
export function faultOfSecret(secret: unknown): string | undefined {
  return typeof secret === "string" && new RegExp(`^[\\x21-\\x7e]{8,${SECRET_CHARACTERS_MAX}}$`).test(secret)
    ? undefined
    : `it is a text of 8 to ${SECRET_CHARACTERS_MAX} printable ASCII characters without a space`;
}

/** By which people tell their keys apart; null where it would say too much. */
export function lastFourOf(secret: string): string | null {
  return secret.length >= LAST_FOUR_FROM_CHARACTERS ? secret.slice(-4) : null;
}
