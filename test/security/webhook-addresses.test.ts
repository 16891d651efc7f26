// Goal: whoever names an address to be called cannot make us call what only we can reach, and a receiver can know that a call is ours.
// Method: a table of addresses in every form; real calls to a server of this process, under both settings; a signature that is checked as
// standardwebhooks.com says, by other code than ours.
import { createHmac } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { isPublicAddress, urlFault } from "../../protocol/public-address.ts";
import { webhookHeaders, webhookSecret } from "../../protocol/webhook-signature.ts";
import { createPost } from "../../roles/webhook-post.ts";

const PRIVATE =
  "0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.0.9 169.254.169.254 172.16.0.1 172.31.255.255 192.168.1.1 198.18.0.1 203.0.113.9 224.0.0.1 255.255.255.255 " +
  ":: ::1 ::ffff:127.0.0.1 ::ffff:a00:1 64:ff9b::a00:1 fc00::1 fd12::1 fe80::1 ff02::1 2001:db8::1 2002:7f00:1:: 2001::1 localhost 2130706433";
test.each(PRIVATE.split(" "))("PA1: %s is not public", (address) => expect(isPublicAddress(address)).toBe(false));
test.each("1.1.1.1 8.8.8.8 100.63.0.1 172.15.0.1 172.32.0.1 2606:4700::1111 2a00:1450::8a".split(" "))("%s is public", (address) =>
  expect(isPublicAddress(address)).toBe(true),
);

const REFUSED_URLS =
  "http://example.com/ ftp://example.com/ https://user:pass@example.com/ https://example.com/#x https://127.0.0.1/ https://2130706433/ https://0x7f000001/ " +
  "https://0177.0.0.1/ https://127.1/ https://[::1]/ https://[::ffff:127.0.0.1]/ https://169.254.169.254/latest https://localhost/ https://a.localhost/ " +
  "https://nats/ https://db.internal/ https://printer.local/ https://LOCALHOST./ nonsense";
test.each(REFUSED_URLS.split(" "))("the URL %s may not be named", (url) => expect(urlFault(url, { private_addresses: false })).toEqual(expect.any(String)));
test("an https URL of a public name may, and a development machine's own where that is allowed", () => {
  expect(urlFault("https://ops.example.com:8443/a?b=c", { private_addresses: false })).toBeUndefined();
  expect(urlFault("http://127.0.0.1:9999/", { private_addresses: true })).toBeUndefined();
  expect(urlFault("file:///etc/passwd", { private_addresses: true })).toBeDefined();
});

describe("a call", () => {
  let server: Server;
  let base: string;
  const heard: IncomingMessage[] = [];
  let answer: (response: ServerResponse) => void = (response) => void response.end();
  beforeAll(async () => {
    server = createServer((request, response) => {
      heard.push(request);
      request.resume().on("end", () => answer(response));
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    base = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
  });
  afterAll(() => {
    server.closeAllConnections();
    server.close();
  });
  const order = (url: string) => ({ url, headers: { "x-test": "1" }, body: "{}", patience_ms: 500, signal: new AbortController().signal });
  const [open, strict] = [createPost({ private_addresses: true }), createPost({ private_addresses: false })];

  test("answers the receiver's status, and follows no redirect", async () => {
    answer = (response) => void response.writeHead(307, { location: `${base}elsewhere` }).end();
    const before = heard.length;
    expect(await open(order(base))).toEqual({ kind: "answered", status: 307 });
    expect(heard.slice(before).map(({ url }) => url)).toEqual(["/"]);
  });

  test("ends with its patience, and says that nobody is there", async () => {
    answer = () => undefined;
    expect(await open(order(base))).toMatchObject({ kind: "failed" });
    expect(await open(order("http://127.0.0.1:1/"))).toMatchObject({ kind: "failed" });
  });

  test("WP1: of a name whose address is not public connects to nothing", async () => {
    const before = heard.length;
    const { port } = server.address() as AddressInfo;
    // The text of the URL is what a public name's would be; only its resolution says where it leads.
    const resolve = ((_name: string, _options: object, done: (error: null, found: object[]) => void) =>
      done(null, [
        { address: "1.1.1.1", family: 4 },
        { address: "127.0.0.1", family: 4 },
      ])) as never;
    const named = createPost({ private_addresses: false, resolve });
    expect(await named(order(`https://ops.example.com:${port}/`))).toEqual({
      kind: "refused",
      message: "ops.example.com has an address that is not public",
    });
    expect(await strict(order(`https://localhost:${port}/`))).toMatchObject({ kind: "refused" });
    expect(await strict(order(base))).toMatchObject({ kind: "refused" });
    expect(heard.length).toBe(before);
  });
});

test("a call is signed as the standard says, with the secret that was shown, and another generation, webhook or tenant has another secret", () => {
  const key = "k".repeat(32);
  const call = { actor: "acme/webhook/ops", generation: 1, id: "acme-ops-7", at_ms: 1_700_000_000_999, body: '{"type":"budget.alert"}' };
  const headers = webhookHeaders(key, call);
  const secret = Buffer.from(webhookSecret(key, call.actor, 1).replace(/^whsec_/, ""), "base64");
  const expected = createHmac("sha256", secret).update(`${call.id}.1700000000.${call.body}`).digest("base64");
  expect(headers).toMatchObject({ "webhook-id": call.id, "webhook-timestamp": "1700000000", "webhook-signature": `v1,${expected}` });
  const secrets = [
    webhookSecret(key, call.actor, 1),
    webhookSecret(key, call.actor, 2),
    webhookSecret(key, "other/webhook/ops", 1),
    webhookSecret(`${key}x`, call.actor, 1),
  ];
  expect(new Set(secrets).size).toBe(4);
});
