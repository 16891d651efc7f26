// webhooks: what administrators and operators do with a tenant's webhooks, for the gateway and the command line alike: an address is made, hears
// the budget's alerts, is changed, rotated, tried, and looked at.
//
// Invariants:
//   WB1. An address that may not be called is refused when it is named, as far as its text says; it is judged again at every call.
//   WB2. A secret is answered to who makes or rotates a webhook, and is written nowhere.
import type { Bus } from "../bus/port.ts";
import { type ErrorBody, errorBody, TroupeError } from "../protocol/errors.ts";
import { actorPath, type ActorAddress, budgetActor, webhookActor } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { urlFault } from "../protocol/public-address.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { webhookSecret } from "../protocol/webhook-signature.ts";
import { viewOf } from "../state-machines/step.ts";
import { webhookContextOf } from "../state-machines/webhook.ts";
import type { CommandClient } from "./client.ts";
import type { Restorer } from "./restore.ts";

export interface WebhooksDeps {
  readonly bus: Pick<Bus, "last_of_each">;
  readonly restorer: Restorer;
  readonly client: Pick<CommandClient, "command">;
  readonly world: World;
  /** What secrets are derived from; absent where this process was not told, and then it answers none. */
  readonly key: string | undefined;
  /** May addresses be called that are not public? */
  readonly private_addresses: boolean;
}

/** All of it throws TroupeError for what is refused. */
export interface Webhooks {
  list(tenant: string): Promise<JsonObject[]>;
  create(tenant: string, webhook: { readonly id: string; readonly url: unknown }): Promise<JsonObject & { readonly created: boolean }>;
  configure(tenant: string, id: string, body: JsonObject): Promise<JsonObject>;
  rotate(tenant: string, id: string): Promise<JsonObject>;
  /** Sends `webhook.test`, as any event is sent. */
  test(tenant: string, id: string): Promise<JsonObject>;
}

export function createWebhooks({ bus, restorer, client, world, key, private_addresses }: WebhooksDeps): Webhooks {
  async function say(
    actor: ActorAddress,
    type: string,
    body: JsonObject,
  ): Promise<{ kind: "done"; result: JsonObject } | { kind: "refused"; error: ErrorBody }> {
    const outcome = await client.command(actor, { type, body, channel: "control" });
    if (outcome.kind === "refused") return outcome;
    return outcome.reply.ok ? { kind: "done", result: outcome.reply.result } : { kind: "refused", error: outcome.reply.error };
  }
  async function tell(actor: ActorAddress, type: string, body: JsonObject): Promise<JsonObject> {
    const said = await say(actor, type, body);
    if (said.kind === "refused") throw new TroupeError(said.error);
    return said.result;
  }

  /** WB1 */
  function judged(url: unknown): string {
    const fault = typeof url === "string" ? urlFault(url, { private_addresses }) : "is missing";
    if (fault !== undefined) throw new TroupeError(errorBody("invalid", `/url ${fault}`, { errors: [{ pointer: "/url", message: fault }] }));
    return url as string;
  }

  const secretOf = (actor: ActorAddress, generation: number): JsonObject =>
    key === undefined ? {} : { secret: webhookSecret(key, actorPath(actor), generation) };

  async function shown(actor: ActorAddress): Promise<JsonObject | undefined> {
    const restored = await restorer.restore(actor);
    if (restored === undefined) return undefined;
    const view = viewOf(restored.state);
    const { url, generation, waiting, tries, failed, delivered, given_up, enabled, created_at_ms } = webhookContextOf(view);
    const last_failure = failed === null ? null : { ...failed };
    return {
      id: actor.id,
      url,
      state: view.state,
      enabled,
      generation,
      waiting: waiting.length,
      tries,
      delivered,
      given_up,
      last_failure,
      created_at: timestamp(created_at_ms),
    };
  }

  return {
    async list(tenant) {
      const ids = (await bus.last_of_each("EVENTS", `tenant.${tenant}.webhook.*.event`)).flatMap(({ subject }) => {
        const parsed = parseActorSubject(subject);
        return parsed.kind === "actor" ? [parsed.actor.id] : [];
      });
      const found = await Promise.all(ids.sort().map((id) => shown(webhookActor(tenant, id))));
      return found.filter((one) => one !== undefined);
    },

    async create(tenant, { id, url }) {
      const actor = webhookActor(tenant, id);
      const { created } = await tell(actor, "webhook.create", { url: judged(url) });
      const body = { level: "tenant", alerts_to: { add: [actorPath(actor)] } };
      // A budget that is not there yet is made first.
      const hears = await say(budgetActor(tenant), "budget.configure", body);
      if (hears.kind === "refused" && hears.error.code === "not_found") {
        await tell(budgetActor(tenant), "budget.create", {});
        await tell(budgetActor(tenant), "budget.configure", body);
      } else if (hears.kind === "refused") throw new TroupeError(hears.error);
      return { ...(await shown(actor)), ...secretOf(actor, 1), created: created === true };
    },

    async configure(tenant, id, { url, enabled }) {
      const actor = webhookActor(tenant, id);
      await tell(actor, "webhook.configure", { ...(url === undefined ? {} : { url: judged(url) }), ...(enabled === undefined ? {} : { enabled }) });
      return (await shown(actor)) ?? {};
    },

    async rotate(tenant, id) {
      const actor = webhookActor(tenant, id);
      const { generation } = await tell(actor, "webhook.rotate", {});
      return { id, generation: generation ?? null, ...secretOf(actor, Number(generation)) };
    },

    async test(tenant, id) {
      const at = timestamp(world.now_ms());
      const { delivery } = await tell(webhookActor(tenant, id), "webhook.deliver", {
        event: { type: "webhook.test", sent_at: at },
        from: `${tenant}/webhook/${id}`,
        at,
      });
      return { id, delivery: delivery ?? null };
    },
  };
}
