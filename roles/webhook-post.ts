// webhook-post: the real sockets under actors/effects/deliver-webhook.ts: one POST to a public address.
//
// Invariants:
//   WP1. The address that is connected to is one that was judged: the name is resolved here, every address of it must be public, and the
//        connection is made to those and to no other, so a name that changes its mind between two look-ups gains nothing.
//   WP2. No redirect is followed, no body is read: what a receiver answers beyond its status reaches nobody.
import { lookup as resolveName, type LookupAddress } from "node:dns";
import { request as requestHttp } from "node:http";
import { request as requestHttps } from "node:https";
import type { LookupFunction } from "node:net";
import type { Post, PostOutcome } from "../actors/effects/deliver-webhook.ts";
import { isPublicAddress, urlFault } from "../protocol/public-address.ts";

class AddressRefused extends Error {
  override readonly name = "AddressRefused";
}

type Resolve = typeof resolveName;

/** WP1 */
const publicLookup =
  (resolve: Resolve): LookupFunction =>
  (hostname, options, done) => {
    resolve(hostname, { ...options, all: true }, (error: NodeJS.ErrnoException | null, addresses: LookupAddress[]) => {
      if (error !== null) return done(error, "", 4);
      const [first] = addresses;
      if (first === undefined || !addresses.every(({ address }) => isPublicAddress(address)))
        return done(new AddressRefused(`${hostname} has an address that is not public`), "", 4);
      return options.all === true ? done(null, addresses) : done(null, first.address, first.family);
    });
  };

export function createPost({ private_addresses, resolve: resolver = resolveName }: { readonly private_addresses: boolean; readonly resolve?: Resolve }): Post {
  return ({ url, headers, body, patience_ms, signal }) =>
    new Promise<PostOutcome>((resolve) => {
      const fault = urlFault(url, { private_addresses });
      if (fault !== undefined) return resolve({ kind: "refused", message: `the URL ${fault}` });
      const secure = new URL(url).protocol === "https:";
      const request = (secure ? requestHttps : requestHttp)(
        url,
        {
          method: "POST",
          headers: { ...headers, "content-length": String(Buffer.byteLength(body)) },
          agent: false,
          signal: AbortSignal.any([signal, AbortSignal.timeout(patience_ms)]),
          ...(private_addresses ? {} : { lookup: publicLookup(resolver) }),
        },
        (response) => {
          resolve({ kind: "answered", status: response.statusCode ?? 0 });
          response.destroy(); // WP2
        },
      );
      request.on("error", (error) => {
        if (error instanceof AddressRefused) return resolve({ kind: "refused", message: error.message });
        const late = error.name === "AbortError" || error.name === "TimeoutError";
        return resolve({ kind: "failed", message: late ? `no answer within ${patience_ms / 1000} s` : error.message });
      });
      request.end(body);
    });
}
