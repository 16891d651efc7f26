// Goal: an alert reaches the address that was named, once per crossing, signed, though the receiver fails at first and the workers are killed.
// Method: the real `up`; a receiver in this process that checks each signature by itself; budgets that are crossed by priced simulated calls.
import { createHmac } from "node:crypto";
import { createServer, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, beforeAll, expect, test } from "vitest";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

interface Heard {
  readonly id: string;
  readonly valid: boolean;
  readonly event: { readonly type: string; readonly tenant: string; readonly actor: string; readonly data: Record<string, unknown> };
}

let troupe: Troupe;
let receiver: Server;
let url: string;
let secret = "";
const heard: Heard[] = [];
/** How many calls are answered 500 before one is taken. */
let failing = 0;

async function eventually(good: () => boolean, patience_ms = 60_000): Promise<void> {
  for (const give_up_ms = performance.now() + patience_ms; !good() && performance.now() < give_up_ms;) await later(100, undefined);
}
async function cli(args: readonly string[], code = 0): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code });
  return ran.stdout;
}
const taken = (type: string): Heard[] => heard.filter(({ event }) => event.type === type);

beforeAll(async () => {
  receiver = createServer((request, response) => {
    let body = "";
    request.on("data", (data: Buffer) => (body += data.toString()));
    request.on("end", () => {
      if (failing > 0) {
        failing -= 1;
        response.writeHead(500).end();
        return;
      }
      const { "webhook-id": id, "webhook-timestamp": at, "webhook-signature": signature } = request.headers;
      const key = Buffer.from(secret.replace(/^whsec_/, ""), "base64");
      const valid =
        signature ===
        `v1,${createHmac("sha256", key)
          .update(`${String(id)}.${String(at)}.${body}`)
          .digest("base64")}`;
      heard.push({ id: String(id), valid, event: JSON.parse(body) as Heard["event"] });
      response.writeHead(204).end();
    });
  });
  await new Promise<void>((resolve) => receiver.listen(0, "127.0.0.1", resolve));
  url = `http://127.0.0.1:${(receiver.address() as AddressInfo).port}/troupe`;
  troupe = await startTroupe({ env: { TROUPE_PRIVATE_ADDRESSES: "allow" } });
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 });
  expect(await typed(troupe, ["agents", "put", "--tenant", "demo", "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 180_000);
afterAll(() => {
  receiver.closeAllConnections();
  receiver.close();
});

test("an address that may not be called is refused when it is named", async () => {
  const key = (await cli(["keys", "create", "--tenant", "demo", "--scope", "admin"])).trim();
  const refused = await troupe.api("/v1/webhooks", { json: { id: "bad", url: "ftp://127.0.0.1/" }, key });
  expect(refused.status).toBe(422);
  expect(await refused.json()).toMatchObject({ code: "invalid", details: { errors: [{ pointer: "/url" }] } });
  // Without the word of development, which this `up` was given and the command line here was not.
  const strict = await typed(troupe, ["webhooks", "create", "--tenant", "demo", "--id", "bad", url], { env: { TROUPE_PRIVATE_ADDRESSES: "refuse" } });
  expect(strict).toMatchObject({ code: 1 });
  expect((await troupe.json<{ items: unknown[] }>(200, "/v1/webhooks", { key })).items).toEqual([]);
});

test("each crossing of 80, 90 and 100 percent is heard once, signed, after a receiver that failed and workers that were killed", async () => {
  secret = (await cli(["webhooks", "create", "--tenant", "demo", "--id", "ops", url])).trim();
  expect(secret).toMatch(/^whsec_/);
  failing = 1;
  await cli(["webhooks", "test", "--tenant", "demo", "ops"]);
  await eventually(() => taken("webhook.test").length > 0);
  expect(taken("webhook.test")).toMatchObject([{ valid: true, event: { tenant: "demo", actor: "demo/webhook/ops" } }]);

  // Ten words of answer and one of question are 101: a limit of 1,010 is crossed at 80 percent with the eighth, whatever is reserved meanwhile.
  await cli(["budget", "set", "--tenant", "demo", "--limit-usd-micros", "1100", "--period", "month"]);
  failing = 1;
  await troupe.json(201, "/v1/sessions", { json: { id: "s1", agent: "assistant" } });
  const say = JSON.stringify([{ say: "one", tokens: 10, token_ms: 1 }]);
  let killed = false;
  for (let n = 0; n < 40 && taken("budget.alert").length < 3; n++) {
    const { status } = await troupe.api("/v1/sessions/s1/messages", { json: { content: say }, headers: { "idempotency-key": `n${n}` } });
    expect([202, 402, 503]).toContain(status);
    await later(250, undefined);
    const books = (await troupe.journal("demo/budget/main")).flatMap(({ events }) => events);
    if (!killed && books.some(({ type }) => type === "budget.alert")) {
      killed = true;
      for (const id of ["w1", "w2"]) await troupe.replaced(await troupe.kill9("worker", id));
    }
  }
  await eventually(() => taken("budget.alert").length >= 3);
  const told = (await troupe.journal("demo/budget/main")).flatMap(({ events }) => events).filter(({ type }) => type === "budget.alert");
  const once = new Map(taken("budget.alert").map((one) => [one.id, one]));
  expect([...once.values()].map(({ event }) => event.data["percent"])).toEqual(told.map((event) => event["percent"]));
  expect(told.length).toBeGreaterThanOrEqual(3);
  expect(killed).toBe(true);
  for (const one of once.values()) expect(one).toMatchObject({ valid: true, event: { actor: "demo/budget/main", data: { limit_usd_micros: 1100 } } });
  // The receiver hears of a delivery a moment before it is written down.
  let listed: { delivered?: number } | undefined;
  for (const give_up_ms = performance.now() + 60_000; listed?.delivered !== told.length + 1 && performance.now() < give_up_ms;)
    [listed] = (JSON.parse(await cli(["webhooks", "list", "--tenant", "demo", "--json"])) as { webhooks: { delivered: number }[] }).webhooks;
  expect(listed).toMatchObject({ id: "ops", given_up: 0, waiting: 0, delivered: told.length + 1 });
  expect(await cli(["verify", "demo", "--json"])).toContain('"violations":0');
}, 180_000);
