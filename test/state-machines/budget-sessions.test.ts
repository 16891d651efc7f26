// Goal: AR-F61, SP1, SP2: where a tenant may have only so many sessions, no interleaving gives one more a place, whoever is refused was refused because
// all places were taken, and what runs is counted and never stopped. Without a bound nothing is counted.
// Method: stories with the numbers written out; and drawn runs of askers beside a plain set of who has a place.
import { expect, test } from "vitest";
import { checkCommand } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { DOUBTED_AFTER_MS } from "../../state-machines/budget-sessions.ts";
import { coreOf } from "../../state-machines/step.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "./drive.ts";

const core = coreOf(budgetDefinition);
const fresh = (sessions_max?: number): Drive => {
  const drive = new Drive(core, { tenant: "acme", kind: "budget", id: "main" });
  drive.create({});
  if (sessions_max !== undefined) drive.tell("budget.configure", { level: "tenant", sessions_max });
  return drive;
};
const said = (drive: Drive, type: string, body: JsonObject): JsonObject => {
  expect(checkCommand("budget", "control", type, body)).toMatchObject({ kind: "command" });
  return drive.tell(type, body);
};
const acquire = (drive: Drive, session: string): JsonObject => said(drive, "session.acquire", { session });
const release = (drive: Drive, session: string): JsonObject => said(drive, "session.release", { session });
const call = (drive: Drive, session: string, n: number): JsonObject =>
  said(drive, "budget.reserve", {
    hold: `acme/session/${session}/${n}:model/1`,
    session,
    agent: "a",
    model: "simulated/echo",
    amount_usd_micros: 1,
    minimum_usd_micros: 1,
  });
const placesOf = (drive: Drive) => budgetContextOf(drive.view).session_places ?? null;

test("so many sessions as the bound says, then a refusal with the numbers; a place that is left is given again", () => {
  const drive = fresh(2);
  expect(drive.told).toMatchObject([{ type: "budget.configured", sessions_max: 2 }]);
  expect(acquire(drive, "s1")).toEqual({ granted: true, sessions: 1, sessions_max: 2 });
  expect(acquire(drive, "s2")).toEqual({ granted: true, sessions: 2, sessions_max: 2 });
  expect(acquire(drive, "s1"), "asking again changes nothing").toEqual({ granted: true, sessions: 2, sessions_max: 2, repeated: true });
  drive.later(5);
  const refused = acquire(drive, "s3");
  expect(refused).toMatchObject({
    refused: { code: "sessions_exceeded", details: { sessions: 2, sessions_max: 2, retry_after_ms: 30_000 } },
    doubted: [],
  });
  drive.later(DOUBTED_AFTER_MS);
  expect(acquire(drive, "s3"), "SP3: those that nobody heard of for a minute may be looked up").toMatchObject({ doubted: ["s2", "s1"] });
  expect(drive.told).toMatchObject([{ type: "budget.refused", code: "sessions_exceeded" }]);
  expect(release(drive, "s1")).toEqual({ released: true });
  expect(release(drive, "s1"), "once").toEqual({ released: false });
  expect(acquire(drive, "s3")).toMatchObject({ granted: true, sessions: 2 });
  expect(said(drive, "budget.configure", { level: "tenant", sessions_max: 3 })).toBeDefined();
  expect(acquire(drive, "s4"), "a raised bound is felt at once").toMatchObject({ granted: true, sessions: 3 });
  said(drive, "budget.configure", { level: "tenant", sessions_max: 1 });
  expect(acquire(drive, "s5"), "under a lowered one nobody is sent away, and nobody comes").toMatchObject({
    refused: { details: { sessions: 3, sessions_max: 1 } },
  });
});

test("a bound of none admits all and counts nobody, and one of an agent is refused", () => {
  const drive = fresh();
  expect(acquire(drive, "s1")).toEqual({ granted: true });
  expect(placesOf(drive)).toBeNull();
  said(drive, "budget.configure", { level: "tenant", sessions_max: 0 });
  expect(acquire(drive, "s1")).toMatchObject({ refused: { code: "sessions_exceeded" } });
  said(drive, "budget.configure", { level: "tenant", sessions_max: null });
  expect(placesOf(drive)).toBeNull();
  expect(drive.refusal("budget.configure", { level: "agent", id: "a", sessions_max: 5 })).toMatchObject({ code: "invalid" });
});

test("a session that is older than the bound is counted with its next call, and is not stopped", () => {
  const drive = fresh(1);
  acquire(drive, "s1");
  expect(call(drive, "old", 1)).toMatchObject({ granted_usd_micros: 1 });
  expect(placesOf(drive)).toMatchObject({ taken: 2, max: 1 });
  expect(acquire(drive, "s2")).toMatchObject({ refused: { details: { sessions: 2, sessions_max: 1 } } });
  // Who was heard of lately is doubted last.
  drive.later(2 * 60 * 60 * 1000);
  call(drive, "s1", 2);
  expect(acquire(drive, "s2")["doubted"]).toEqual(["old"]);
  drive.later(DOUBTED_AFTER_MS);
  expect(acquire(drive, "s2")["doubted"]).toEqual(["old", "s1"]);
});

test("SP1 in 50 drawn lives: never more than the bound by asking, and nobody refused while a place was free", () => {
  let refused = 0;
  let granted = 0;
  for (let seed = 1; seed <= 50; seed++) {
    const random = seededRandom(seed);
    const drive = fresh(1 + Math.floor(random() * 4));
    drive.thorough = false;
    const has = new Set<string>();
    for (let step = 0; step < 60; step++) {
      const session = `s${Math.floor(random() * 8)}`;
      const before = placesOf(drive);
      if (before === null) throw new Error("there is a bound");
      const what = random();
      if (what < 0.5) {
        const answer = acquire(drive, session);
        const may = has.has(session) || has.size < before.max;
        expect(answer["granted"] === true, `seed ${seed}, step ${step}`).toBe(may);
        if (may) has.add(session);
        granted += may ? 1 : 0;
        refused += may ? 0 : 1;
      } else if (what < 0.8) {
        expect(release(drive, session)["released"]).toBe(has.delete(session));
      } else if (what < 0.9) {
        call(drive, session, 100 + step);
        has.add(session);
      } else drive.tell("budget.configure", { level: "tenant", sessions_max: Math.floor(random() * 5) });
      expect(placesOf(drive)?.taken).toBe(has.size);
    }
  }
  expect(granted).toBeGreaterThan(200);
  expect(refused).toBeGreaterThan(200);
});
