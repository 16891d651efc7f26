// Goal:   nothing that is sent breaks anything: every answer is below 500, comes within its time, and the gateway serves the next request; reading a
//         command answers with a command or a refusal of a known code, whatever the bytes.
// Method: fast-check; the seed of a failing run is printed by it. 8,000 commands and 2,200 requests.
import fc from "fast-check";
import { pack } from "msgpackr";
import { afterAll, beforeAll, expect, test } from "vitest";
import { COMMANDS, decodeCommand } from "../../protocol/commands.ts";
import { isErrorCode } from "../../protocol/errors.ts";
import { ACTOR_KINDS } from "../../protocol/ids.ts";
import { keyOf, type SmallCell, startSmallCell } from "../gateway/small-cell.ts";

const RUNS = { shapes: 5_000, bytes: 3_000, requests: 2_200 };
const CASES_MIN = 10_000;
/** What was really tried: a run that ends early is no run. */
let tried = 0;
/** An answer that takes longer counts as a hang. */
const ANSWER_PATIENCE_MS = 5_000;

const types = fc.constantFrom(...Object.values(COMMANDS).flatMap((known) => Object.keys(known)));
const hostileText = fc.oneof(
  fc.string({ unit: "binary", maxLength: 64 }),
  fc.constantFrom(
    "",
    "\u0000",
    "\ud800",
    "__proto__",
    "constructor",
    "toString",
    "../../etc/passwd",
    "'; drop table sessions; --",
    "${jndi:ldap://x}",
    "\r\nSet-Cookie: a=b",
    "*",
    ">",
    "tenant.rival.session.s.command",
    "a".repeat(70_000),
  ),
);
const hostileValue = fc.oneof(
  { weight: 3, arbitrary: hostileText },
  { weight: 2, arbitrary: fc.jsonValue({ maxDepth: 6 }) },
  { weight: 1, arbitrary: fc.constantFrom(null, true, -0, 1e308, -1, 2 ** 53, 0.1, [], {}, [[[[]]]]) },
  { weight: 1, arbitrary: fc.integer({ min: 1, max: 400 }).map((depth) => Array.from({ length: depth }).reduce<unknown>((inner) => [inner], "deep")) },
);
const fields = fc.constantFrom(
  "agent",
  "external_id",
  "user",
  "mode",
  "overrides",
  "metadata",
  "content",
  "on_busy",
  "reason",
  "id",
  "key_id",
  "hash",
  "scopes",
  "expires_at",
  "config",
  "type",
  "body",
  "__proto__",
  "constructor",
  "tenant",
);
const hostileBody = fc
  .array(fc.tuple(fields, hostileValue), { maxLength: 8 })
  .map(
    (pairs) => Object.defineProperties({}, Object.fromEntries(pairs.map(([name, value]) => [name, { value, enumerable: true, configurable: true }]))) as object,
  );
const plausibleBody = fc.record(
  {
    agent: fc.constantFrom("assistant", "nobody", 7),
    content: fc.oneof(fc.constant("hello"), hostileValue, fc.array(fc.record({ type: fc.constant("text"), text: hostileText }), { maxLength: 4 })),
    metadata: fc.dictionary(hostileText, hostileText, { maxKeys: 90 }),
    reason: hostileText,
  },
  { requiredKeys: [] },
);
const headerText = fc.oneof(
  fc.constantFrom(
    "application/json",
    "application/msgpack",
    "text/plain",
    "application/json; charset=utf-16",
    "",
    "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
  ),
  fc.string({ maxLength: 300 }),
);
const commandHeaders = fc.record({ "Content-Type": headerText, "Idempotency-Key": headerText, traceparent: headerText }, { requiredKeys: [] });
const headerOf = (headers: Partial<Record<string, string>>) => (name: string) => headers[name];

function expectReadable(kind: (typeof ACTOR_KINDS)[number], channel: "command" | "control", data: Uint8Array, headers: Partial<Record<string, string>>): void {
  tried += 1;
  const decoding = decodeCommand(kind, channel, data, headerOf(headers));
  if (decoding.kind === "refused") {
    expect(isErrorCode(decoding.error.code)).toBe(true);
    JSON.stringify(decoding.error); // it can be sent
    expect(decoding.error.message.length).toBeLessThan(1_000);
  } else {
    expect(Object.hasOwn(COMMANDS[kind], decoding.command.type)).toBe(true);
    expect(decoding.command.channel).toBe(channel);
    JSON.stringify(decoding.command.body);
  }
  expect(({} as Record<string, unknown>)["polluted"]).toBe(undefined);
}

test("a command of any shape is read or refused", () => {
  const envelope = fc.oneof(
    { weight: 4, arbitrary: fc.record({ type: types, body: fc.oneof(hostileBody, plausibleBody) }) },
    { weight: 1, arbitrary: fc.record({ type: hostileValue, body: hostileValue }, { requiredKeys: [] }) },
    { weight: 1, arbitrary: hostileValue },
  );
  fc.assert(
    fc.property(
      fc.constantFrom(...ACTOR_KINDS),
      fc.constantFrom("command", "control"),
      envelope,
      fc.boolean(),
      commandHeaders,
      (kind, channel, value, packed, headers) => {
        const data = packed ? pack(value) : new TextEncoder().encode(JSON.stringify(value) ?? "");
        expectReadable(kind, channel, new Uint8Array(data), { ...(packed ? { "Content-Type": "application/msgpack" } : {}), ...(packed ? {} : headers) });
      },
    ),
    { numRuns: RUNS.shapes },
  );
}, 120_000);

test("bytes that are no command, and commands with some bytes changed, are read or refused", () => {
  const mangled = fc
    .tuple(fc.record({ type: types, body: plausibleBody }), fc.boolean(), fc.array(fc.tuple(fc.nat(), fc.nat(255)), { maxLength: 6 }))
    .map(([value, packed, changes]) => {
      const data = new Uint8Array(packed ? pack(value) : new TextEncoder().encode(JSON.stringify(value)));
      for (const [at, byte] of changes) data[at % Math.max(data.length, 1)] = byte;
      return data;
    });
  fc.assert(
    fc.property(
      fc.constantFrom(...ACTOR_KINDS),
      fc.oneof(fc.uint8Array({ maxLength: 200 }), mangled),
      fc.constantFrom("application/json", "application/msgpack"),
      (kind, data, type) => {
        expectReadable(kind, "command", data, { "Content-Type": type });
      },
    ),
    { numRuns: RUNS.bytes },
  );
}, 120_000);

let cell: SmallCell;
let admin = "";
let operator = "";
beforeAll(async () => {
  cell = await startSmallCell({ tenants: ["acme"] });
  const { createKey } = await import("../../protocol/api-key.ts");
  const made = createKey("acme", (count) => new Uint8Array(count).fill(7));
  await cell.tell("acme", "key.create", { key_id: made.key_id, hash: made.hash, scopes: ["admin"] });
  admin = made.key;
  await cell.tell("system", "tenant.create", {});
  const looks = createKey("system", (count) => new Uint8Array(count).fill(9));
  await cell.tell("system", "key.create", { key_id: looks.key_id, hash: looks.hash, scopes: ["operator:write"] });
  operator = looks.key;
  for (const id of ["s1", "s2"])
    await fetch(`${cell.gateway.url}/v1/sessions`, {
      method: "POST",
      headers: { authorization: `Bearer ${admin}`, "content-type": "application/json" },
      body: JSON.stringify({ id, agent: "assistant" }),
    });
});
afterAll(() => cell.end());

test("a request of any shape to any route is answered below 500 and within its time, and the gateway goes on", async () => {
  const asciiHeader = (text: string): string => text.replaceAll(/[^\x20-\x7e]/g, "?").trim();
  const segment = fc.oneof(
    fc.constantFrom("s1", "s2", "none", "..", ".", "%00", "%ff", "a%2fb", "constructor", "__proto__"),
    fc.webSegment(),
    hostileText.map((text) => encodeURIComponent(text.isWellFormed() ? text.slice(0, 2_000) : "x")),
  );
  const query = fc.oneof(
    fc.constant(""),
    fc
      .array(
        fc.tuple(
          fc.constantFrom("limit", "cursor", "state", "agent", "after", "x", "__proto__"),
          fc.oneof(fc.webQueryParameters(), fc.constantFrom("0", "-1", "1e9", "99999999999", "", "%", "%00")),
        ),
        { maxLength: 4 },
      )
      .map((pairs) => `?${pairs.map(([name, value]) => `${name}=${value}`).join("&")}`),
  );
  const credential = fc.oneof(
    { weight: 5, arbitrary: fc.constant("admin") },
    { weight: 1, arbitrary: fc.constant("plain") },
    { weight: 2, arbitrary: fc.constant("operator") },
    { weight: 1, arbitrary: hostileText },
  );
  const body = fc.oneof(
    { weight: 2, arbitrary: plausibleBody.map((value) => JSON.stringify(value)) },
    { weight: 2, arbitrary: hostileBody.map((value) => JSON.stringify(value)) },
    { weight: 1, arbitrary: fc.string({ maxLength: 200 }) },
    { weight: 1, arbitrary: fc.uint8Array({ maxLength: 200 }) },
  );
  const request = fc.record({
    route: fc.nat(),
    method: fc.oneof(
      { weight: 6, arbitrary: fc.constant(undefined) },
      { weight: 1, arbitrary: fc.constantFrom("DELETE", "PATCH", "OPTIONS", "HEAD", "PUT", "GET", "POST") },
    ),
    segment,
    query,
    credential,
    type: fc.oneof({ weight: 5, arbitrary: fc.constant("application/json") }, { weight: 1, arbitrary: headerText }),
    key: fc.option(headerText, { nil: undefined }),
    trace: fc.option(headerText, { nil: undefined }),
    last: fc.option(headerText, { nil: undefined }),
    body,
  });
  const statuses = new Map<number, number>();
  await fc.assert(
    fc.asyncProperty(request, async ({ route: index, method: other, segment: id, query: asked, credential: shown, type, key, trace, last, body: content }) => {
      const { method: own, url } = cell.gateway.routes[index % cell.gateway.routes.length]!;
      const method = other ?? own;
      tried += 1;
      const ours: Record<string, string> = { admin, operator, plain: keyOf("acme") };
      const bearer = Object.hasOwn(ours, shown) ? ours[shown]! : asciiHeader(shown);
      const headers: Record<string, string> = { authorization: `Bearer ${bearer}`.slice(0, 4_000), accept: "application/json" };
      for (const [name, value] of [
        ["content-type", type],
        ["idempotency-key", key],
        ["traceparent", trace],
        ["last-event-id", last],
      ] as const)
        if (value !== undefined) headers[name] = asciiHeader(value);
      const bare = method === "GET" || method === "HEAD";
      const answer = await fetch(cell.gateway.url + url.replace(/:[a-z_]+/, id || "x") + asked, {
        method,
        headers,
        redirect: "manual",
        signal: AbortSignal.timeout(ANSWER_PATIENCE_MS),
        ...(bare ? {} : { body: typeof content === "string" ? content : new Uint8Array(content) }),
      });
      const text = await answer.text();
      statuses.set(answer.status, (statuses.get(answer.status) ?? 0) + 1);
      expect(answer.status).toBeLessThan(500);
      if (answer.status >= 400 && method !== "HEAD") {
        expect(answer.headers.get("content-type")).toBe("application/problem+json");
        expect(isErrorCode((JSON.parse(text) as { code: string }).code)).toBe(true);
      }
      expect(text).not.toMatch(/node_modules|at .*\.ts:\d+/);
    }),
    { numRuns: RUNS.requests },
  );
  // It reached the handlers, and was not turned away at the door each time.
  expect([...statuses].filter(([status]) => status < 300).reduce((sum, [, count]) => sum + count, 0)).toBeGreaterThan(RUNS.requests / 20);
  expect(statuses.get(422) ?? 0).toBeGreaterThan(RUNS.requests / 50);
  expect(tried).toBeGreaterThanOrEqual(CASES_MIN);
  expect((await fetch(`${cell.gateway.url}/healthz`)).status).toBe(200);
  expect(cell.logged.filter((line) => line.includes("a bug of ours") || line.includes(admin))).toEqual([]);
}, 240_000);
