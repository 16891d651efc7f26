// Goal: a webhook keeps WH1 to WH3: every event it takes in gets one end, in order, whatever the receiver answers.
// Method: stories with the receiver's answers given; then a drawn receiver over hundreds of events, whose ends are counted.
import { describe, expect, test } from "vitest";
import { coreOf } from "../../state-machines/step.ts";
import { RETRY_MS, WAITING_MAX, webhookContextOf, webhookDefinition } from "../../state-machines/webhook.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "./drive.ts";

const core = coreOf(webhookDefinition);
const url = "https://ops.example.com/hook";
const fresh = (): Drive => new Drive(core, { tenant: "acme", kind: "webhook", id: "ops" }).create({ url });
const hear = (drive: Drive, n: number): number =>
  Number(drive.tell("webhook.deliver", { event: { type: "budget.alert", percent: n }, from: "acme/budget/main", at: "2026-11-18T00:00:00.000Z" })["delivery"]);
const inputOf = (drive: Drive): unknown => drive.state.running["delivery"]?.input;
const ends = (drive: Drive): (readonly [string, unknown])[] =>
  drive.events.filter(({ type }) => type === "webhook.delivered" || type === "webhook.given_up").map((event) => [event.type, event["delivery"]]);

describe("an event", () => {
  test("is delivered by its position, and the next one after it", () => {
    const drive = fresh();
    expect(drive.at).toBe("idle");
    const [first, second] = [hear(drive, 80), hear(drive, 90)];
    expect([drive.at, inputOf(drive)]).toEqual(["delivering", { at: first, url, generation: 1 }]);
    drive.done("delivery", { status: 200 });
    expect(inputOf(drive)).toEqual({ at: second, url, generation: 1 });
    drive.done("delivery", { status: 204 });
    expect([drive.at, ends(drive)]).toEqual([
      "idle",
      [
        ["webhook.delivered", first],
        ["webhook.delivered", second],
      ],
    ]);
  });

  test("that is not taken is tried again later and later, and given up after the last try", () => {
    const drive = fresh();
    const first = hear(drive, 80);
    const second = hear(drive, 90);
    for (const wait_ms of RETRY_MS) {
      drive.fail("delivery", { code: "not_taken", message: "the receiver answered 500" });
      expect(drive.at).toBe("waiting");
      expect(drive.told.at(-1)).toMatchObject({ type: "webhook.failed", delivery: first, retry_in_ms: wait_ms });
      expect(core.definition.waits(drive.view)).toContain("2 events wait");
      drive.later(wait_ms);
      drive.fire("retry");
      expect(inputOf(drive)).toMatchObject({ at: first });
    }
    drive.fail("delivery", { code: "unreachable", message: "x".repeat(5000) });
    expect(ends(drive)).toEqual([["webhook.given_up", first]]);
    expect(String(drive.told.find(({ type }) => type === "webhook.given_up")?.["message"]).length).toBeLessThanOrEqual(500);
    expect(inputOf(drive)).toMatchObject({ at: second });
  });

  test("for an address that may not be called is given up at once, and one whose receiver is gone disables the webhook", () => {
    const drive = fresh();
    const first = hear(drive, 80);
    drive.fail("delivery", { code: "address_refused", message: "not public" });
    expect([drive.at, ends(drive)]).toEqual(["idle", [["webhook.given_up", first]]]);
    hear(drive, 90);
    drive.fail("delivery", { code: "gone", message: "410" });
    expect(drive.at).toBe("disabled");
    expect(drive.refusal("webhook.deliver", { event: { type: "x" }, from: "acme/budget/main", at: "2026-11-18T00:00:00.000Z" })?.code).toBe(
      "illegal_transition",
    );
    drive.tell("webhook.configure", { url: "https://ops.example.com/other" });
    hear(drive, 100);
    expect(inputOf(drive)).toMatchObject({ url: "https://ops.example.com/other" });
  });

  test("that waits while it is disabled is delivered when it is enabled again, under the address and the secret of then", () => {
    const drive = fresh();
    const first = hear(drive, 80);
    drive.tell("webhook.configure", { enabled: false });
    expect([drive.at, drive.running]).toEqual(["disabled", []]);
    expect(drive.tell("webhook.rotate")).toEqual({ generation: 2 });
    drive.tell("webhook.configure", { enabled: true });
    expect(inputOf(drive)).toEqual({ at: first, url, generation: 2 });
  });
});

test("WH3: above the bound the oldest that is not under way is given up, and told", () => {
  const drive = fresh();
  drive.thorough = false;
  const first = hear(drive, 0);
  const second = hear(drive, 1);
  for (let n = 2; n < WAITING_MAX; n++) hear(drive, n);
  expect(ends(drive)).toEqual([]);
  hear(drive, WAITING_MAX);
  expect(ends(drive)).toEqual([["webhook.given_up", second]]);
  expect(webhookContextOf(drive.view).waiting).toHaveLength(WAITING_MAX);
  expect(inputOf(drive)).toMatchObject({ at: first });
});

test("WH1, WH2: under a receiver that answers as it likes every event gets one end, in the order in which they came", () => {
  for (let seed = 1; seed <= 30; seed++) {
    const draw = seededRandom(seed);
    const drive = fresh();
    drive.thorough = seed === 1;
    const heard: number[] = [];
    while (heard.length < 40 || drive.at !== "idle") {
      if (heard.length < 40 && draw() < 0.4) heard.push(hear(drive, heard.length));
      else if (drive.at === "waiting") {
        drive.later(RETRY_MS.at(-1) ?? 0);
        drive.fire("retry");
      } else if (drive.at === "delivering") {
        if (draw() < 0.5) drive.done("delivery", { status: 200 });
        else drive.fail("delivery", { code: draw() < 0.1 ? "address_refused" : "not_taken", message: "no" });
      }
    }
    expect(
      ends(drive).map(([, delivery]) => delivery),
      `seed ${seed}`,
    ).toEqual(heard);
  }
});
