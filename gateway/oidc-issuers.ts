// oidc-issuers: TROUPE_OIDC, the issuers whose JWTs count, read and checked at start. Apart from oidc.ts so that no process loads what verifies
// tokens only to learn that there are none.
import { z } from "zod";

const issuerShape = z.object({
  issuer: z.url(),
  audience: z.string().min(1),
  /** A claim's name, or a path into claims: `org.id`. */
  tenant_claim: z.string().min(1).default("tenant"),
  /** A list, or words with spaces between; those that are scopes count. */
  roles_claim: z.string().min(1).default("roles"),
  /** Default: what the issuer's discovery document names. */
  jwks_uri: z.url().optional(),
  /** May its tokens name operators? */
  operators: z.boolean().default(false),
});
export type OidcIssuer = z.infer<typeof issuerShape>;

/** Reads TROUPE_OIDC, or says what is wrong with it. */
export function readOidc(
  text: string,
): { readonly kind: "issuers"; readonly issuers: readonly OidcIssuer[] } | { readonly kind: "invalid"; readonly fault: string } {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch {
    return { kind: "invalid", fault: "it is not JSON" };
  }
  const parsed = z
    .array(issuerShape)
    .min(1)
    .safeParse(Array.isArray(value) ? value : [value]);
  if (!parsed.success) return { kind: "invalid", fault: parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`).join("; ") };
  const insecure = parsed.data.flatMap(({ issuer, jwks_uri }) => [issuer, jwks_uri ?? issuer]).find((url) => !isTrustworthy(new URL(url)));
  if (insecure !== undefined) return { kind: "invalid", fault: "keys are fetched over https only, or from this machine" };
  return { kind: "issuers", issuers: parsed.data };
}

/** Keys come over a connection that shows who answers, or from this machine. */
export const isTrustworthy = ({ protocol, hostname }: URL): boolean => protocol === "https:" || ["localhost", "127.0.0.1", "[::1]"].includes(hostname);
