// public-address: which addresses a deployment may be made to call by those who use it. Whoever names a URL to us must not reach what only we
// can reach: this machine, the network it stands in, a cloud's own metadata service.
//
// Invariants:
//   PA1. What is not known to be public is refused. An address is judged as a number, in whatever form it was written.
//   PA2. A name is judged by every address it has, and what is called is the very address that was judged.
import { BlockList, isIP } from "node:net";

/** Not of the public internet: IANA's special-purpose registries. */
const NOT_PUBLIC: readonly (readonly [string, number, "ipv4" | "ipv6"])[] = [
  ["0.0.0.0", 8, "ipv4"],
  ["10.0.0.0", 8, "ipv4"],
  ["100.64.0.0", 10, "ipv4"],
  ["127.0.0.0", 8, "ipv4"],
  ["169.254.0.0", 16, "ipv4"],
  ["172.16.0.0", 12, "ipv4"],
  ["192.0.0.0", 24, "ipv4"],
  ["192.0.2.0", 24, "ipv4"],
  ["192.88.99.0", 24, "ipv4"],
  ["192.168.0.0", 16, "ipv4"],
  ["198.18.0.0", 15, "ipv4"],
  ["198.51.100.0", 24, "ipv4"],
  ["203.0.113.0", 24, "ipv4"],
  ["224.0.0.0", 3, "ipv4"],
  // Of IPv6 only 2000::/3 is public; within it, what leads back into IPv4 or is for documents.
  ["::", 3, "ipv6"],
  ["4000::", 2, "ipv6"],
  ["8000::", 1, "ipv6"],
  ["2001::", 23, "ipv6"],
  ["2001:db8::", 32, "ipv6"],
  ["2002::", 16, "ipv6"],
  ["3fff::", 20, "ipv6"],
];

// A list of each family: one list takes an IPv4 address for the IPv6 one that it maps to, and ::/3 would hold them all.
const blocked = { ipv4: new BlockList(), ipv6: new BlockList() };
for (const [address, prefix, family] of NOT_PUBLIC) blocked[family].addSubnet(address, prefix, family);

export function isPublicAddress(address: string): boolean {
  const version = isIP(address);
  if (version === 0) return false; // PA1
  const family = version === 4 ? "ipv4" : "ipv6";
  return !blocked[family].check(address, family);
}

/** What is wrong with a URL that we are to call, as far as its text says; a name is judged again when it is resolved. */
export function urlFault(text: string, { private_addresses }: { readonly private_addresses: boolean }): string | undefined {
  if (!URL.canParse(text)) return "is no URL";
  const { protocol, hostname, username, password, hash } = new URL(text);
  if (protocol !== "https:" && !(private_addresses && protocol === "http:")) return "is not https";
  if (username !== "" || password !== "") return "bears a credential";
  if (hash !== "") return "bears a fragment";
  if (private_addresses) return undefined;
  const host = hostname.replace(/^\[|\]$/g, "").replace(/\.$/, "");
  if (isIP(host) !== 0) return isPublicAddress(host) ? undefined : "names an address that is not public";
  if (!host.includes(".") || /(^|\.)(localhost|local|internal|home\.arpa)$/i.test(host)) return "names a host that is not public";
  return undefined;
}
