// trouble: one scenario of chaos in its short form, and what every one of them must leave behind.
import { expect } from "vitest";
import { type Ground, type GroundOptions, startGround, wait } from "../../bench/chaos-ground.ts";
import { CALM_MS, runScenario, type ScenarioResult, scenarioNamed } from "../../bench/chaos-scenarios.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshFolder } from "../harness/servers.ts";

/** A second and a half of streaming, so that a trial is over soon. */
const CALL = { tokens: 30, token_ms: 50, first_token_ms: 20 };

/** A ground on which workers may be judged already; it ends with the file. */
export async function calmGround(options: GroundOptions): Promise<Ground> {
  const ground = await startGround({ ...options, home: freshFolder("chaos") });
  atEndOfFile(() => ground.stop());
  await wait(CALM_MS);
  return ground;
}

/** Runs it and holds it to every promise: nothing lost, nothing repeated, every stream whole, `verify` content, nothing out of order. */
export async function survives(
  ground: Ground,
  name: string,
  { trials = 1, lanes = 10, wish = CALL, ...more }: { trials?: number; lanes?: number; wish?: typeof CALL; away_ms?: number } = {},
): Promise<ScenarioResult> {
  let drawn = 0;
  const result = await runScenario(ground, scenarioNamed(name), {
    trials,
    // Two processors are starting and ending workers all the while. What stood still would wait for a lease, five seconds, or for a drain, a minute.
    acknowledged_within_ms: 4_000,
    // Blows fall at other places of a call with every trial, and at the same ones with every run.
    random: () => (drawn = (drawn + 0.382) % 1),
    load: { lanes, wish },
    ...more,
  });
  const { faults, audit } = result;
  expect({ faults, lost: audit.lost, repeated: audit.repeated, streams: audit.stream_faults, violations: audit.violations }).toEqual({
    faults: [],
    lost: [],
    repeated: [],
    streams: [],
    violations: [],
  });
  // An audit of nothing finds nothing.
  expect(audit.acknowledged).toBeGreaterThan(lanes);
  expect(audit.ears_whole).toBeGreaterThan(0);
  return result;
}
