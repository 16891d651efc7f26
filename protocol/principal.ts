// principal: who said a command, in one word: it stands in the command's journal entry and in its audit row.
//
//   key:{key_id}      an API key of the tenant's (or, under an operator's route, an operator's)
//   jwt:{subject}     a token of an issuer that was configured
//   nats              a client of the tenant's own, on the bus
//   login:{user}      somebody with one of the broker's own logins: an operator at the command line
//   (none)            the runtime itself, or somebody with its credentials who did not say
//
// Invariants:
//   PR1. A word is printable ASCII without blanks and at most PRINCIPAL_CHARACTERS_MAX long, so that it stands in headers, logs and tables alike.
//   PR2. Two names never make one word.
//   PR3. Only our own processes say one: what a tenant's client puts into the header counts for nothing (actors/shard-host.ts).
import { createHash } from "node:crypto";

/** A subject of 256 characters that are not ASCII is longer; it is cut, and a hash of the whole stands at its end. */
export const PRINCIPAL_CHARACTERS_MAX = 512;
const HASH_CHARACTERS = 64;
const WORD = /^[\x21-\x7e]+$/;

/** Of a tenant's client on the bus: the broker knows which credential it showed, and does not say so with a message. */
export const PRINCIPAL_ON_BUS = "nats";

/** The name of a principal (`key:k1`, `jwt:alice@example.com`) as a word. */
export function principalWord(name: string): string {
  // The percent sign too, so that no name looks like another one's encoding (PR2).
  const word = name.toWellFormed().replace(/[^\x21-\x24\x26-\x7e]/gu, (character) => encodeURIComponent(character));
  if (word.length <= PRINCIPAL_CHARACTERS_MAX && word !== "") return word;
  const hash = createHash("sha256").update(name).digest("hex");
  return `${word.slice(0, PRINCIPAL_CHARACTERS_MAX - HASH_CHARACTERS - 2)}%~${hash}`;
}

export function isPrincipal(text: string | undefined): text is string {
  return text !== undefined && text.length <= PRINCIPAL_CHARACTERS_MAX && WORD.test(text);
}
