// Goal: a tenant that floods a gateway is told when to come again, and its neighbour notices nothing (Q17).
// Method: the bucket in virtual time, over drawn floods; then a real gateway with a small rate and two tenants.
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createRequestLimiter } from "../../gateway/request-limiter.ts";
import { seededRandom, VirtualWorld } from "../simulation/virtual-world.ts";
import { bearer, keyOf, type SmallCell, startSmallCell } from "./small-cell.ts";

test("RL1, RL3: no span holds more than its seconds and the burst allow, and what is told to wait is served after the wait", async () => {
  const world = new VirtualWorld(3);
  const limiter = createRequestLimiter({ requests_per_s: 10, world });
  const draw = seededRandom(5);
  const served: number[] = [];
  let waited = 0;
  for (let n = 0; n < 3000; n++) {
    const refusal = limiter.refusal("acme");
    if (refusal === undefined) served.push(world.monotonic_ms());
    else if (draw() < 0.1) {
      waited++;
      await world.advance(Number(refusal.details?.["retry_after_ms"]));
      expect(limiter.refusal("acme"), `ask ${n}`).toBeUndefined();
      served.push(world.monotonic_ms());
    }
    await world.advance(Math.floor(draw() * 60));
  }
  expect(waited).toBeGreaterThan(20);
  for (const from of served) {
    const span = served.filter((at) => at >= from && at < from + 1000);
    expect(span.length).toBeLessThanOrEqual(3 * 10 + 1);
  }
});

describe("a gateway", () => {
  let cell: SmallCell;
  beforeAll(async () => {
    cell = await startSmallCell({ tenants: ["acme", "other"], overrides: { requests_per_s: 5 } });
  });
  afterAll(() => cell.end());

  test("RL2: refuses a flood with 429 and retry-after, and serves the neighbour", async () => {
    const ask = (tenant: string): Promise<Response> => fetch(`${cell.gateway.url}/v1/agents`, { headers: bearer(keyOf(tenant)) });
    const flood = await Promise.all(Array.from({ length: 40 }, () => ask("acme")));
    const refused = flood.filter(({ status }) => status === 429);
    expect(flood.filter(({ status }) => status === 200).length).toBeGreaterThanOrEqual(10);
    expect(refused.length).toBeGreaterThan(10);
    expect(refused[0]?.headers.get("retry-after")).toBe("1");
    expect(await refused[0]?.json()).toMatchObject({ code: "rate_limited", details: { requests_per_s: 5 } });
    expect((await ask("other")).status).toBe(200);
    await expect.poll(async () => (await ask("acme")).status, { timeout: 3000 }).toBe(200);
  });
});
