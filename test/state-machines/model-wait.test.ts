// Goal: MW1 of state-machines/model-wait.ts: a session whose model call waits says for what, since when and until when, over take-overs, and no
// longer than it waits; and CA3 of actors/call-account.ts: what is over before anybody could notice is not told.
// Method: the session machine, told by hand; the account in virtual time.
import { expect, test } from "vitest";
import { createCallAccount, WAIT_TOLD_AFTER_MS } from "../../actors/call-account.ts";
import type { ModelAttempt } from "../../actors/model-attempt.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { answer, SessionDrive, thinking } from "./session-drive.ts";

const slot = (drive: SessionDrive, more: JsonObject = {}): JsonObject => ({
  for: "slot",
  since_ms: drive.at_ms,
  until_ms: drive.at_ms + 60_000,
  message: "1 of 1 calls of this tenant run already",
  numbers: { concurrency: 1 },
  ...more,
});
function says(drive: SessionDrive, wait: JsonObject | null): SessionDrive {
  drive.apply({ t: "progress", inst: drive.instOf("model"), told: { attempts: [], skipped: [], wait } });
  return drive;
}
const { waits, waitsFor } = new SessionDrive().core.definition;

test("for what it waits stands in its state and in an event, with the numbers for who listens; then it works, and says how long it waited", () => {
  const drive = thinking();
  expect([waits(drive.view, drive.at_ms), waitsFor?.(drive.view, drive.at_ms)]).toEqual([undefined, undefined]);
  says(drive, slot(drive));
  expect(drive.told).toMatchObject([
    { type: "model.waiting", turn: 1, step: 0, attempt: 1, for: "slot", since: expect.any(String), until: expect.any(String), details: { concurrency: 1 } },
  ]);
  expect(waits(drive.view, drive.at_ms)).toMatch(
    /^its model call waits for a slot of its tenant since .*Z, until .*Z at the latest: 1 of 1 calls of this tenant run already$/,
  );
  expect(waitsFor?.(drive.view, drive.at_ms)).toMatchObject({ for: "slot", since: expect.any(String), until: expect.any(String) });
  drive.later(1_500);
  says(drive, null);
  expect(drive.told).toMatchObject([{ type: "model.waited", for: "slot", waited_ms: 1_500 }]);
  expect([drive.context.wait, waits(drive.view, drive.at_ms)]).toEqual([null, undefined]);
  says(drive, null);
  expect(drive.told).toEqual([]);
});

test("it says one thing after another, each since it began", () => {
  const drive = says(thinking(), null);
  says(drive, slot(drive));
  drive.later(1_000);
  says(drive, slot(drive, { for: "rate", provider: "p", again_ms: drive.at_ms + 5_000 }));
  expect(waitsFor?.(drive.view)).toMatchObject({ for: "rate", provider: "p", since: new Date(drive.at_ms).toISOString(), again: expect.any(String) });
  expect(waits(drive.view)).toContain("the rate window of p");
});

test("a take-over loses the call and not the reason: the next attempt knows it, and when it waits for the same, has waited since the first did", () => {
  const drive = says(thinking(), null);
  const since_ms = drive.at_ms;
  says(drive, slot(drive));
  drive.later(2_000);
  drive.claim();
  expect(drive.state.running["model"]).toMatchObject({ attempt: 2, told: { wait: { for: "slot", since_ms } } });
  expect(waitsFor?.(drive.view)).toMatchObject({ for: "slot", since: new Date(since_ms).toISOString() });
  says(drive, slot(drive));
  expect(waitsFor?.(drive.view)).toMatchObject({ since: new Date(since_ms).toISOString(), until: new Date(drive.at_ms + 60_000).toISOString() });
  drive.done("model", answer("fine"));
  expect(drive.context.wait).toBeNull();
  // What an attempt that waited for nothing told is forgotten, as ever.
  drive.send("again");
  says(drive, slot(drive));
  says(drive, null);
  drive.claim();
  expect(drive.state.running["model"]).not.toHaveProperty("told");
});

test.each(["turn.cancel", "session.pause"])("%s ends the wait with the call", (command) => {
  const drive = thinking();
  says(drive, slot(drive));
  drive.tell(command, {});
  expect(drive.context.wait).toBeNull();
  expect(waitsFor?.(drive.view)).toBeUndefined();
});

function account(waited?: JsonObject) {
  const world = new VirtualWorld(1);
  const told: JsonObject[] = [];
  const scope = { attempt: 1, progress: (one: JsonObject) => void told.push(one), so_far: () => undefined, ...(waited === undefined ? {} : { waited }) };
  return { world, told, account: createCallAccount(scope, world) };
}
const call = {} as ModelAttempt;
const wait = { for: "slot", until_ms: 60_000, message: "full" } as const;

test("CA3: what is waited for is told after a moment, once, and its end when the call begins", async () => {
  const { world, told, account: mine } = account();
  mine.waits(wait);
  await world.advance(WAIT_TOLD_AFTER_MS - 10);
  expect(told).toEqual([]);
  mine.waits(wait);
  await world.advance(20);
  expect(told).toMatchObject([{ attempts: [], skipped: [], wait: { for: "slot", until_ms: 60_000 } }]);
  mine.waits(wait);
  await world.advance(1_000);
  expect(told).toHaveLength(1);
  mine.begun(() => call);
  mine.begun(() => call);
  expect(told.slice(1)).toMatchObject([{ wait: null }]);
});

test("CA3: what is over at once is never told, nor what an attempt that has ended still waited for", async () => {
  const first = account();
  first.account.waits(wait);
  first.account.begun(() => call);
  const second = account();
  second.account.waits(wait);
  second.account.close();
  const third = account();
  third.account.waits(wait);
  third.account.goesOn();
  for (const { world } of [first, second, third]) await world.advance(5_000);
  expect([first.told, second.told, third.told]).toEqual([[], [], []]);
});

test("CA3: an attempt whose forerunner was lost at waiting says that it is over when its own call begins, though it did not wait itself", () => {
  const { told, account: mine } = account({ for: "slot" });
  mine.begun(() => call);
  expect(told).toMatchObject([{ wait: null }]);
});
