// webhooks: list, create, set, rotate and test a tenant's webhooks.
import { createWebhooks, type Webhooks } from "../actors/webhooks.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";

async function webhooksOf(context: Context): Promise<Webhooks> {
  const { env, world } = context.ports;
  const dev = await context.dev();
  return createWebhooks({
    bus: await context.bus(),
    restorer: await context.restorer(),
    client: await context.commands(),
    world,
    key: env["TROUPE_WEBHOOK_KEY"] || (dev.kind === "read" ? dev.file.webhook_key : undefined),
    private_addresses: env["TROUPE_PRIVATE_ADDRESSES"] === "allow",
  });
}

/** The secret alone on stdout, so that it can be piped to where it is kept. */
function tellSecret({ printer }: Context, id: string, secret: unknown): void {
  if (typeof secret === "string") {
    printer.line(secret);
    printer.note(`what the webhook ${id} is signed with; it is shown this once`);
  } else printer.note(`webhook ${id}: its secret is shown where TROUPE_WEBHOOK_KEY is set`);
}

export async function listWebhooks(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  const webhooks = await (await webhooksOf(context)).list(tenant);
  if (printer.json) printer.document({ tenant, webhooks });
  else
    printer.table(
      ["webhook", "state", "url", "delivered", "wait", "given up", "last failure"],
      webhooks.map((one) => [
        String(one["id"]),
        String(one["state"]),
        String(one["url"]),
        one["delivered"] as number,
        one["waiting"] as number,
        one["given_up"] as number,
        ((one["last_failure"] as JsonObject | null)?.["message"] ?? null) as string | null,
      ]),
    );
  if (webhooks.length === 0) printer.note(`'${tenant}' has no webhook: troupe webhooks create --tenant ${tenant} URL`);
  return EXIT.done;
}

export async function createWebhook(context: Context, { tenant, id }: { tenant: string; id: string }, url: string): Promise<number> {
  const { printer } = context;
  const webhook = await (await webhooksOf(context)).create(tenant, { id, url });
  if (printer.json) printer.document({ tenant, ...webhook });
  else tellSecret(context, id, webhook["secret"]);
  return EXIT.done;
}

export async function setWebhook(context: Context, { tenant, url, disable }: { tenant: string; url?: string; disable?: boolean }, id: string): Promise<number> {
  const { printer } = context;
  const webhook = await (await webhooksOf(context)).configure(tenant, id, { ...(url === undefined ? {} : { url }), enabled: disable !== true });
  if (printer.json) printer.document({ tenant, ...webhook });
  else printer.line(`webhook ${id} of ${tenant}: ${String(webhook["url"])}, ${String(webhook["state"])}`);
  return EXIT.done;
}

export async function rotateWebhook(context: Context, { tenant }: { tenant: string }, id: string): Promise<number> {
  const { printer } = context;
  const rotated = await (await webhooksOf(context)).rotate(tenant, id);
  if (printer.json) printer.document({ tenant, ...rotated });
  else tellSecret(context, id, rotated["secret"]);
  return EXIT.done;
}

export async function testWebhook(context: Context, { tenant }: { tenant: string }, id: string): Promise<number> {
  const { printer } = context;
  const sent = await (await webhooksOf(context)).test(tenant, id);
  if (printer.json) printer.document({ tenant, ...sent });
  else printer.line(`webhook.test is on its way to ${id} of ${tenant}: troupe show ${tenant}/webhook/${id}`);
  return EXIT.done;
}
