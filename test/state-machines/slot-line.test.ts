// Goal: where a tenant's calls of models wait for a slot, the next to begin is the one whose turn it is by priority and age, first come first
// served within; nobody starves; no slot stays empty for somebody who is gone; and what stands in a journal from before there was a line is as it was.
// Method: the budget's machine, driven by hand, then over virtual minutes of a full house, then from seeds against a list kept in another way.
import { describe, expect, test } from "vitest";
import { checkCommand } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { AGEING_SPAN_MS, AGEING_STEP_MS, PRIORITIES, type Priority, turnAt } from "../../protocol/priority.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { LINE_ASK_MS, LINE_MAX, LINE_SILENT_MS } from "../../state-machines/budget-line.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { tableRows } from "../../state-machines/budget-table.ts";
import { coreOf } from "../../state-machines/step.ts";
import { seededRandom } from "../simulation/virtual-world.ts";
import { Drive } from "./drive.ts";

const core = coreOf(budgetDefinition);
const T0 = Date.UTC(2026, 10, 18, 12);
const holdOf = (name: string): string => `acme/session/${name}/1:model/1`;

function house(concurrency_max: number, thorough = true): Drive {
  const drive = new Drive(core, { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = T0;
  drive.thorough = thorough;
  drive.create({});
  drive.tell("budget.configure", { level: "tenant", concurrency_max });
  return drive;
}
const ask = (drive: Drive, name: string, priority?: Priority): JsonObject =>
  drive.tell("budget.reserve", {
    hold: holdOf(name),
    session: name,
    agent: "a",
    model: "simulated/echo",
    amount_usd_micros: 1,
    minimum_usd_micros: 1,
    ...(priority === undefined ? {} : { priority }),
  });
const granted = (result: JsonObject): boolean => result["refused"] === undefined;
const ahead = (result: JsonObject): unknown => ((result["refused"] as JsonObject)["details"] as JsonObject)["ahead"];
const end = (drive: Drive, name: string): JsonObject => drive.tell("budget.settle", { hold: holdOf(name), cost_usd_micros: 0 });
const called = (drive: Drive): unknown => drive.told.findLast(({ type }) => type === "slot.free")?.["next"];
const standing = (drive: Drive): string[] => [...tableRows(budgetContextOf(drive.view).line ?? [])].map(([hold]) => hold.split("/")[2] ?? "");

describe("the line for a tenant's slots", () => {
  test("goes by priority, and by arrival among equals; who is called is told by name", () => {
    const drive = house(1);
    expect(granted(ask(drive, "first", "batch"))).toBe(true);
    for (const [name, priority] of [
      ["normal1", "normal"],
      ["normal2", "normal"],
      ["critical", "critical"],
      ["low", "low"],
    ] as const) {
      const refused = ask(drive, name, priority);
      expect(refused).toMatchObject({
        refused: { code: "overloaded", details: { concurrency: 1, concurrency_max: 1, priority, retry_after_ms: LINE_ASK_MS } },
      });
    }
    expect(["normal1", "normal2", "critical", "low"].map((name) => ahead(ask(drive, name, "normal")))).toEqual([1, 2, 0, 3]);
    for (const name of ["critical", "normal1", "normal2", "low"]) {
      end(drive, name === "critical" ? "first" : ({ normal1: "critical", normal2: "normal1", low: "normal2" }[name] ?? ""));
      expect(called(drive)).toEqual([holdOf(name)]);
      expect(granted(ask(drive, name, "normal")), name).toBe(true);
    }
    expect(standing(drive)).toEqual([]);
  });

  test("is not jumped: a slot that is free for somebody who stands there is refused to who just came", () => {
    const drive = house(1);
    ask(drive, "first", "normal");
    ask(drive, "waits", "normal");
    end(drive, "first");
    expect(granted(ask(drive, "comes", "normal"))).toBe(false);
    expect(granted(ask(drive, "without"))).toBe(false);
    expect(granted(ask(drive, "urgent", "critical")), "unless its priority goes before").toBe(true);
    end(drive, "urgent");
    expect(granted(ask(drive, "waits", "normal"))).toBe(true);
  });

  test("tells of a call that waits once, however often it asks", () => {
    const drive = house(1);
    ask(drive, "first", "normal");
    ask(drive, "waits", "normal");
    expect(drive.told.map(({ type }) => type)).toEqual(["budget.refused"]);
    ask(drive, "waits", "normal");
    expect(drive.told).toEqual([]);
  });

  test("is left by who went silent, was settled, or was refused for another reason, and then the next is called", () => {
    const drive = house(1);
    for (const name of ["first", "gone", "ended", "last"]) ask(drive, name, "normal");
    drive.at_ms += LINE_ASK_MS;
    for (const name of ["ended", "last"]) ask(drive, name, "normal");
    drive.at_ms += LINE_SILENT_MS - LINE_ASK_MS;
    end(drive, "ended");
    end(drive, "first");
    expect(called(drive)).toEqual([holdOf("last")]);
    expect(standing(drive)).toEqual(["last"]);
    drive.tell("budget.configure", { level: "tenant", limit_usd_micros: 0 });
    expect(ask(drive, "last", "normal")).toMatchObject({ refused: { code: "budget_exceeded" } });
    expect(standing(drive)).toEqual([]);
  });

  test("is called when the tenant may run more at once", () => {
    const drive = house(1);
    for (const name of ["first", "a", "b", "c"]) ask(drive, name, "normal");
    drive.tell("budget.configure", { level: "tenant", concurrency_max: 3 });
    expect(called(drive)).toEqual([holdOf("a"), holdOf("b")]);
    expect([granted(ask(drive, "c", "normal")), granted(ask(drive, "b", "normal")), granted(ask(drive, "a", "normal"))]).toEqual([false, true, true]);
  });

  test(`has room for ${LINE_MAX}; more are refused without a place in it`, () => {
    const drive = house(1, false);
    ask(drive, "first", "normal");
    for (let n = 0; n < LINE_MAX; n++) ask(drive, `s${n}`, "normal");
    expect(granted(ask(drive, "more", "critical"))).toBe(false);
    expect(standing(drive)).toHaveLength(LINE_MAX);
    expect(standing(drive)).not.toContain("more");
  }, 180_000);

  test("keeps out what is no priority", () => {
    const body = { hold: holdOf("a"), session: "a", agent: "a", model: "simulated/echo", amount_usd_micros: 1, minimum_usd_micros: 1 };
    expect(checkCommand("budget", "control", "budget.reserve", { ...body, priority: "highest" })).toMatchObject({ kind: "refused" });
    expect(checkCommand("session", "command", "message.send", { content: "x", priority: "urgent" })).toMatchObject({ kind: "refused" });
    expect(checkCommand("session", "command", "message.send", { content: "x", priority: "batch" })).toMatchObject({ kind: "command" });
  });
});

test("turns: the least call goes before the greatest that comes a whole span later, and not before one that comes within it", () => {
  expect(turnAt("batch", T0)).toBeLessThan(turnAt("critical", T0 + AGEING_SPAN_MS + 1));
  expect(turnAt("batch", T0)).toBeGreaterThan(turnAt("critical", T0 + AGEING_SPAN_MS - 1));
  for (const [index, priority] of PRIORITIES.entries()) expect(turnAt(priority, T0)).toBe(T0 + index * AGEING_STEP_MS);
});

test("nobody starves: in a house that critical calls keep full for ever, a call of each priority begins within the span of ageing", () => {
  const drive = house(2, false);
  const waiting = new Map<string, Priority>();
  const running: { name: string; until_ms: number }[] = [];
  const begun = new Map<string, number>();
  const queue = (name: string, priority: Priority): void => {
    if (granted(ask(drive, name, priority))) begin(name);
    else waiting.set(name, priority);
  };
  const begin = (name: string): void => {
    begun.set(name, drive.at_ms);
    running.push({ name, until_ms: drive.at_ms + 2_000 });
  };
  // Two slots of two seconds each, and one critical call a second and a bit: there is always one more than fits.
  for (let second = 0; second < 180; second++) {
    drive.at_ms = T0 + second * 1_000;
    while (running[0] !== undefined && running[0].until_ms <= drive.at_ms) {
      end(drive, running.shift()?.name ?? "");
      for (const hold of (called(drive) as string[] | undefined) ?? []) {
        const name = hold.split("/")[2] ?? "";
        if (!waiting.has(name) || !granted(ask(drive, name, waiting.get(name)))) continue;
        waiting.delete(name);
        begin(name);
      }
    }
    queue(`critical${second}`, "critical");
    if (second % 5 === 0) queue(`more${second}`, "critical");
    if (second === 20) for (const priority of PRIORITIES) queue(`one-${priority}`, priority);
    if (second % 5 === 0) for (const [name, priority] of waiting) ask(drive, name, priority);
  }
  expect(waiting.size).toBeGreaterThan(10);
  const after_ms = PRIORITIES.map((priority) => (begun.get(`one-${priority}`) ?? Number.POSITIVE_INFINITY) - (T0 + 20_000));
  expect(after_ms).toEqual(after_ms.toSorted((a, b) => a - b));
  // The span, and those who stood there before: some ten calls by then, at one a second.
  for (const ms of after_ms) expect(ms).toBeLessThanOrEqual(AGEING_SPAN_MS + 30_000);
  expect(after_ms.at(-1)).toBeGreaterThan(AGEING_STEP_MS);
});

test("from seeds: no call is granted while more stand before it than slots are free, and none is refused that nobody stands before", () => {
  let grants = 0;
  for (let seed = 1; seed <= 150; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const max = 1 + pick(4);
    const drive = house(max, seed <= 5);
    const line: { name: string; turn: number; asked: number }[] = [];
    const running: string[] = [];
    let count = 0;
    for (let step = 0; step < 80; step++) {
      drive.at_ms += pick(4_000);
      for (const one of [...line]) if (one.asked + LINE_SILENT_MS <= drive.at_ms) line.splice(line.indexOf(one), 1);
      if (pick(3) === 0 && running.length > 0) {
        end(drive, running.splice(pick(running.length), 1)[0] ?? "");
        continue;
      }
      const old = pick(2) === 0 ? line[pick(line.length)] : undefined;
      const priority = PRIORITIES[pick(PRIORITIES.length)] ?? "normal";
      const name = old?.name ?? `s${count++}`;
      const turn = old?.turn ?? turnAt(priority, drive.at_ms);
      const before = line.filter(
        (one) => one !== old && (one.turn < turn || (one.turn === turn && (old === undefined || line.indexOf(one) < line.indexOf(old)))),
      );
      const may = max - running.length > before.length;
      expect(granted(ask(drive, name, priority)), `seed ${seed}, step ${step}`).toBe(may);
      if (may) {
        grants += 1;
        running.push(name);
        if (old !== undefined) line.splice(line.indexOf(old), 1);
      } else if (old === undefined) line.push({ name, turn, asked: drive.at_ms });
      else old.asked = drive.at_ms;
    }
    expect(
      standing(drive)
        .toSorted()
        .filter((name) => line.some((one) => one.name === name)),
    ).toEqual(line.map(({ name }) => name).toSorted());
  }
  expect(grants).toBeGreaterThan(1_000);
});
