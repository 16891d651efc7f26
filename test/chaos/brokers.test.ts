// Goal:   three brokers lose the one that leads the journals, and nothing that was acknowledged goes with it.
// Method: the scenario of `npm run chaos`, once: a cluster on 127.0.0.1, every stream in three replicas.
import { beforeAll, expect, test } from "vitest";
import type { Ground } from "../../bench/chaos-ground.ts";
import { calmGround, survives } from "./trouble.ts";

let ground: Ground;
beforeAll(async () => {
  ground = await calmGround({ brokers: 3 });
}, 150_000);

test("the death of the broker that leads EVENTS costs no acknowledged command and no worker, and everything proceeds after the election", async () => {
  const { phases } = await survives(ground, "broker_leader_kill");
  expect(phases.get("append")).toHaveLength(1);
});
