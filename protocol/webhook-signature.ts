// webhook-signature: how a receiver knows that a call is ours: as standardwebhooks.com has it, so that its libraries verify them.
//
//   webhook-id         the same for every try of one event: receivers drop repeats by it
//   webhook-timestamp  seconds since 1970, of this try
//   webhook-signature  v1,{base64 of HMAC-SHA256 over "{id}.{timestamp}.{body}"}
//
// The secret of a webhook is derived from the deployment's own key, the actor's name and its generation: it is stored nowhere, and a rotation
// needs no secret to travel. It is shown as `whsec_{base64}`.
import { createHmac } from "node:crypto";

/** The shortest key that is taken: 24 random bytes in base64url. */
export const WEBHOOK_KEY_CHARACTERS_MIN = 32;

const secretBytes = (key: string, actor: string, generation: number): Buffer => createHmac("sha256", key).update(`webhook/${actor}/${generation}`).digest();

/** As a receiver's library wants it. */
export function webhookSecret(key: string, actor: string, generation: number): string {
  return `whsec_${secretBytes(key, actor, generation).toString("base64")}`;
}

export function webhookHeaders(
  key: string,
  call: { readonly actor: string; readonly generation: number; readonly id: string; readonly at_ms: number; readonly body: string },
): Record<string, string> {
  const timestamp = String(Math.floor(call.at_ms / 1000));
  const signature = createHmac("sha256", secretBytes(key, call.actor, call.generation))
    .update(`${call.id}.${timestamp}.${call.body}`)
    .digest("base64");
  return { "content-type": "application/json", "webhook-id": call.id, "webhook-timestamp": timestamp, "webhook-signature": `v1,${signature}` };
}
