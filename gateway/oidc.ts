// oidc: JWTs of issuers that an operator configured → tenant, subject and roles.
//
//   TROUPE_OIDC = [{ "issuer", "audience", "tenant_claim", "roles_claim"?, "jwks_uri"?, "operators"? }, …]   (one object stands for a list of one)
//
// The issuer's keys are fetched when the first token comes, kept, and fetched again when a token names one that is not among them
// (rotation), at most once in JWKS_COOLDOWN_MS.
//
// Invariants:
//   O1. Only asymmetric signatures count: with a shared secret, or none, anybody who knows the issuer could sign.
//   O2. A token counts for the issuer and audience that were configured together, and only with an end (`exp`) and a subject.
//   O3. The tenant stands in the claim that was configured. Only an issuer that may name operators can name the system tenant.
//   O4. Absent roles are no roles.
import { createRemoteJWKSet, customFetch, decodeJwt, errors, type JWTPayload, jwtVerify, type JWTVerifyGetKey } from "jose";
import { z } from "zod";
import { isId, SYSTEM_TENANT } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { isTrustworthy, type OidcIssuer } from "./oidc-issuers.ts";

export type Verification =
  | { readonly kind: "verified"; readonly tenant: string; readonly subject: string; readonly roles: readonly string[]; readonly expires_at_ms: number }
  | { readonly kind: "refused" }
  | { readonly kind: "unavailable" };

export interface Oidc {
  verify(token: string): Promise<Verification>;
}

/** Clocks of two machines that are kept by NTP differ by less. */
const CLOCK_SKEW_S = 30;
const ALGORITHMS = ["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]; // O1
/** Tokens with made-up key ids must not make us ask the issuer each time. */
const JWKS_COOLDOWN_MS = 10_000;
const JWKS_AGE_MAX_MS = 10 * 60_000;
const FETCH_PATIENCE_MS = 5_000;
const SUBJECT_CHARACTERS_MAX = 256;

export function createOidc({ issuers, world, log, fetch }: { issuers: readonly OidcIssuer[]; world: World; log: Log; fetch: typeof globalThis.fetch }): Oidc {
  const keysOf = new Map<OidcIssuer, Promise<JWTVerifyGetKey>>();

  async function keySet({ issuer, jwks_uri }: OidcIssuer): Promise<JWTVerifyGetKey> {
    let url = jwks_uri;
    if (url === undefined) {
      const answer = await fetch(`${issuer.replace(/\/$/, "")}/.well-known/openid-configuration`, { signal: AbortSignal.timeout(FETCH_PATIENCE_MS) });
      const document = z.object({ jwks_uri: z.url() }).parse(await answer.json());
      url = document.jwks_uri;
      if (!isTrustworthy(new URL(url))) throw new Error("the issuer's discovery document names keys that are not behind https");
    }
    return createRemoteJWKSet(new URL(url), {
      cooldownDuration: JWKS_COOLDOWN_MS,
      cacheMaxAge: JWKS_AGE_MAX_MS,
      timeoutDuration: FETCH_PATIENCE_MS,
      [customFetch]: fetch,
    });
  }

  function keysFor(issuer: OidcIssuer): Promise<JWTVerifyGetKey> {
    const known = keysOf.get(issuer);
    if (known !== undefined) return known;
    const asked = keySet(issuer);
    keysOf.set(issuer, asked);
    asked.catch(() => keysOf.delete(issuer));
    return asked;
  }

  return {
    async verify(token) {
      let claimed: JWTPayload;
      try {
        claimed = decodeJwt(token);
      } catch {
        return { kind: "refused" };
      }
      const audiences = typeof claimed.aud === "string" ? [claimed.aud] : (claimed.aud ?? []);
      const issuer = issuers.find((one) => one.issuer === claimed.iss && audiences.includes(one.audience)); // O2
      if (issuer === undefined) return { kind: "refused" };
      try {
        const { payload } = await jwtVerify(token, await keysFor(issuer), {
          issuer: issuer.issuer,
          audience: issuer.audience,
          algorithms: ALGORITHMS,
          clockTolerance: CLOCK_SKEW_S,
          requiredClaims: ["exp", "sub"],
          currentDate: new Date(world.now_ms()),
        });
        const tenant = at(payload, issuer.tenant_claim);
        const { sub: subject, exp } = payload;
        if (!isId(tenant) || (tenant === SYSTEM_TENANT && !issuer.operators)) return { kind: "refused" }; // O3
        if (subject === undefined || subject === "" || subject.length > SUBJECT_CHARACTERS_MAX || exp === undefined) return { kind: "refused" }; // O2
        return { kind: "verified", tenant, subject, roles: rolesIn(at(payload, issuer.roles_claim)), expires_at_ms: (exp + CLOCK_SKEW_S) * 1000 };
      } catch (error) {
        // Only a failure to fetch is an outage. What the token itself caused is a refusal, whoever is to blame.
        const outage = error instanceof errors.JWKSTimeout || !(error instanceof errors.JOSEError);
        log.debug("a token is refused", { issuer: issuer.issuer, ...(outage ? errorFields(error) : { code: (error as errors.JOSEError).code }) });
        if (outage) log.warn("the keys of an issuer cannot be fetched", { issuer: issuer.issuer });
        return { kind: outage ? "unavailable" : "refused" };
      }
    },
  };
}

function at(payload: JWTPayload, path: string): unknown {
  if (Object.hasOwn(payload, path)) return payload[path];
  let value: unknown = payload;
  for (const name of path.split(".")) {
    if (value === null || typeof value !== "object" || !Object.hasOwn(value, name)) return undefined;
    value = (value as Record<string, unknown>)[name];
  }
  return value;
}

/** O4. */
function rolesIn(value: unknown): string[] {
  if (typeof value === "string") return value.split(/\s+/).filter((word) => word !== "");
  return Array.isArray(value) ? value.filter((word): word is string => typeof word === "string") : [];
}
