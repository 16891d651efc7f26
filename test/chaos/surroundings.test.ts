// Goal:   a database that is away, a clock that is wrong and a deploy are no reason to stop, to lose anything or to pay twice.
// Method: the scenarios of `npm run chaos` in their short form, on one ground with Postgres and a projector.
import { beforeAll, expect, test } from "vitest";
import type { Ground } from "../../bench/chaos-ground.ts";
import { calmGround, survives } from "./trouble.ts";

let ground: Ground;
beforeAll(async () => {
  ground = await calmGround({ postgres: true });
}, 120_000);

test("without Postgres sessions go on, and projections that catch up hold what the journals say", async () => {
  const { phases, audit } = await survives(ground, "postgres_away", { away_ms: 4_000 });
  expect(phases.get("caught up")).toHaveLength(1);
  expect(audit.messages).toBeGreaterThan(0);
});

test("a worker whose wall clock jumps by hours is not judged by it, and time in no journal runs backwards", async () => {
  await survives(ground, "clock_jump", { trials: 2 });
});

test("every worker can be replaced while model calls run: none is paid twice, and neighbours go on hearing", async () => {
  const { audit } = await survives(ground, "rolling_restart", { lanes: 6, wish: { tokens: 80, token_ms: 50, first_token_ms: 20 } });
  expect(audit.model_calls_again).toBe(0);
});
