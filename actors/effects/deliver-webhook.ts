// deliver-webhook: calls a tenant's address with one event, signed. One try: when and how often there is another is the machine's
// (state-machines/webhook.ts).
//
// Invariants:
//   DW1. Every try of one event bears the same id, so a receiver that took it and could not say so is not told twice what it cannot tell apart.
//   DW2. An address is judged where it is called (`post`), each time; nothing here trusts what was said of it before.
import type { JsonObject } from "../../protocol/json.ts";
import { actorPath } from "../../protocol/ids.ts";
import { timestamp, type World } from "../../protocol/world.ts";
import { webhookHeaders } from "../../protocol/webhook-signature.ts";
import type { DeliveryInput, DeliveryOutput } from "../../state-machines/webhook.ts";
import { EffectFailure, type Performer } from "../performer.ts";

/** What a receiver has to answer: providers of webhooks give between 5 and 30 s. */
export const DELIVERY_PATIENCE_MS = 10_000;

export type PostOutcome =
  | { readonly kind: "answered"; readonly status: number }
  /** It may not be called, now or later. */
  | { readonly kind: "refused"; readonly message: string }
  | { readonly kind: "failed"; readonly message: string };

/** One POST. Follows no redirect, reads no answer's body, calls no address that is not public unless it was told to. Never rejects. */
export type Post = (order: {
  readonly url: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
  readonly patience_ms: number;
  readonly signal: AbortSignal;
}) => Promise<PostOutcome>;

export interface DeliveryDeps {
  /** What secrets are derived from. */
  readonly key: string;
  readonly post: Post;
}

/** Without `deps` this deployment has no key: nothing is sent unsigned. */
export function deliverWebhook(world: World, deps: DeliveryDeps | undefined): Performer {
  return async ({ at, url, generation }: DeliveryInput, { actor, entries, signal }): Promise<JsonObject> => {
    if (deps === undefined) throw new EffectFailure("unavailable", "this worker has no key for webhooks (TROUPE_WEBHOOK_KEY)");
    const entry = (await entries([at])).get(at);
    if (entry?.t !== "command") throw new EffectFailure("internal", "the journal holds no such event");
    const { event, from, at: happened_at } = entry.body as { event: JsonObject & { type: string }; from: string; at: string };
    const { type, ...data } = event;
    const body = JSON.stringify({ type, timestamp: happened_at, tenant: actor.tenant, actor: from, data });
    const id = `${actor.tenant}-${actor.id}-${at}`; // DW1
    const now_ms = world.now_ms();
    const headers = webhookHeaders(deps.key, { actor: actorPath(actor), generation, id, at_ms: now_ms, body });
    const outcome = await deps.post({ url, headers: { ...headers, "user-agent": "troupe-webhook/1" }, body, patience_ms: DELIVERY_PATIENCE_MS, signal });
    if (outcome.kind === "refused") throw new EffectFailure("address_refused", outcome.message);
    if (outcome.kind === "failed") throw new EffectFailure("unreachable", outcome.message);
    const { status } = outcome;
    if (status >= 200 && status < 300) return { status, sent_at: timestamp(now_ms) } satisfies DeliveryOutput & JsonObject;
    if (status === 410) throw new EffectFailure("gone", "the receiver answered 410: it is gone", { status });
    throw new EffectFailure("not_taken", `the receiver answered ${status}`, { status });
  };
}
