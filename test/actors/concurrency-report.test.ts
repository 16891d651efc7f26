// Goal: the report on concurrency is a function of the journals: what ran side by side, for how long the bound was reached, who waited for what; equal
// journals give equal bytes, and the times by how many ran sum to the window.
// Method: journals written by hand, a line a message, with the numbers beside them; then drawn ones, compared with a count millisecond by millisecond.
import { expect, test } from "vitest";
import { type ConcurrencyReport, createConcurrencyFold, LONGEST, type ReportWindow, SLICES, type WaitReason } from "../../actors/concurrency-report.ts";
import type { ActorEvent, Entry } from "../../protocol/journal.ts";
import { seededRandom } from "../simulation/virtual-world.ts";

const T0 = Date.UTC(2026, 10, 21, 8);
const at = (ms: number): string => new Date(T0 + ms).toISOString();
/** [ms, actor, event or entry…] */
type Line = readonly [number, string, ...(ActorEvent | Entry)[]];

function reportOf(lines: readonly Line[], window: Partial<ReportWindow> = {}): ConcurrencyReport {
  const fold = createConcurrencyFold({ tenant: "acme", ...window });
  for (const [ms, id, ...told] of lines)
    fold.add({
      actor: { tenant: "acme", kind: id === "budget" ? "budget" : "session", id: id === "budget" ? "main" : id },
      at: at(ms),
      events: told.filter((one): one is ActorEvent => "type" in one && !("t" in one)),
      entries: told.filter((one): one is Entry => "t" in one),
    });
  return fold.report();
}
const hold = (session: string, attempt = 1): string => `acme/session/${session}/3:model/${attempt}`;
const reserved = (session: string, attempt = 1): ActorEvent => ({ type: "budget.reserved", hold: hold(session, attempt), session });
const settled = (session: string, attempt = 1): ActorEvent => ({ type: "budget.settled", hold: hold(session, attempt), session });
const refused = (session: string, code: string, more = {}): ActorEvent => ({ type: "budget.refused", hold: hold(session), code, ...more });
const bound = (concurrency_max: number | null): ActorEvent => ({ type: "budget.configured", level: "tenant", concurrency_max });
const tool = (type: string, index: number): ActorEvent => ({ type, turn: 1, step: 0, index });
const settle = (session: string): Entry => ({ t: "command", channel: "control", type: "budget.settle", body: { hold: hold(session), cost_usd_micros: 0 } });
const waitsOf = ({ waits }: ConcurrencyReport): [WaitReason, number, number, number][] =>
  waits.map(({ reason, waits: count, ms, given_up }) => [reason, count, ms, given_up]);

test("calls side by side, the peak, and the time at the tenant's bound, which may change", () => {
  const report = reportOf([
    [0, "budget", bound(2)],
    [100, "budget", reserved("a")],
    [200, "budget", reserved("b")], // 2 of 2
    [500, "budget", settled("a")], // 300 at the bound
    [600, "budget", bound(1)], // 1 of 1
    [700, "budget", settled("b")], // 100 more
    [800, "budget", bound(null)],
    [900, "budget", reserved("a", 2), { ...reserved("a", 2), part: 2 }],
    [1000, "budget", { type: "budget.released", hold: hold("a", 2) }],
  ]);
  expect(report).toMatchObject({ tenant: "acme", session: null, from: at(0), to: at(1000), tools: { count: 0, peak: 0, busy_ms: 0 }, waits: [], longest: [] });
  expect(report.models).toMatchObject({ count: 3, peak: 2, peak_at: at(200), busy_ms: 700, at_limit_ms: 400, concurrency_max: null });
  expect(report.models.ms_by_running).toEqual([
    { running: 0, ms: 300 },
    { running: 1, ms: 400 },
    { running: 2, ms: 300 },
  ]);
  expect(report.models.slices).toHaveLength(SLICES);
});

const WAITS: readonly (readonly [string, readonly Line[], [WaitReason, number, number, number][]])[] = [
  [
    "a slot",
    [
      [0, "budget", refused("a", "overloaded", { ahead: 0 })],
      [40, "budget", refused("a", "overloaded")],
      [90, "budget", reserved("a")],
    ],
    [["slot", 1, 90, 0]],
  ],
  [
    "first a slot, then the window",
    [
      [0, "budget", refused("a", "overloaded")],
      [30, "budget", refused("a", "rate_limited")],
      [90, "budget", reserved("a")],
    ],
    [
      ["slot", 1, 30, 0],
      ["window", 1, 60, 0],
    ],
  ],
  [
    "money that came back",
    [
      [0, "budget", refused("a", "budget_exceeded", { may_return: true })],
      [10, "budget", reserved("a")],
    ],
    [["money", 1, 10, 0]],
  ],
  [
    "money that will not",
    [
      [0, "budget", refused("a", "budget_exceeded", { may_return: false })],
      [10, "budget"],
    ],
    [],
  ],
  [
    "a slot that never came",
    [
      [0, "budget", refused("a", "overloaded")],
      [70, "budget", settle("a")],
    ],
    [["slot", 1, 70, 1]],
  ],
  [
    "a slot, and the journal ends",
    [
      [0, "budget", refused("a", "overloaded")],
      [70, "budget"],
    ],
    [["slot", 1, 70, 0]],
  ],
  [
    "nothing: granted in the same commit",
    [
      [0, "budget", refused("a", "overloaded"), reserved("a")],
      [10, "budget"],
    ],
    [],
  ],
  [
    "the turn before",
    [
      [0, "a", { type: "message.received", turn: 2 }],
      [50, "a", { type: "turn.started", turn: 2 }],
    ],
    [["turn", 1, 50, 0]],
  ],
  [
    "the turn before, in vain",
    [
      [0, "a", { type: "message.received", turn: 2 }],
      [50, "a", { type: "turn.cancelled", turn: 2 }],
    ],
    [["turn", 1, 50, 1]],
  ],
  [
    "another session's turn, then its own",
    [
      [0, "a", { type: "message.received", turn: 2, after: ["b/m3"] }],
      [30, "a", { type: "dependency.met", turn: 2 }],
      [50, "a", { type: "turn.started", turn: 2 }],
    ],
    [
      ["turn", 1, 20, 0],
      ["dependency", 1, 30, 0],
    ],
  ],
  [
    "a provider",
    [
      [0, "a", { type: "model.retrying", turn: 1, wait_ms: 25 }],
      [50, "a"],
    ],
    [["provider", 1, 25, 0]],
  ],
  [
    "a place in the worker",
    [
      [0, "budget", reserved("a")],
      [400, "a", { t: "done", inst: "3:model", output: { attempt: 1, attempts: [{ started_at: at(150) }] } }],
    ],
    [["place", 1, 150, 0]],
  ],
  [
    "no place: the way there alone",
    [
      [0, "budget", reserved("a")],
      [400, "a", { t: "done", inst: "3:model", output: { attempt: 1, attempts: [{ started_at: at(20) }] } }],
    ],
    [],
  ],
];

test.each(WAITS)("waited for: %s", (_, lines, expected) => {
  expect(waitsOf(reportOf(lines))).toEqual(expected);
});

test("tools of one step run side by side; of a session only its own is told, and its calls are judged by the bound of the tenant", () => {
  const lines: Line[] = [
    [0, "budget", bound(2)],
    [10, "budget", reserved("a")],
    [20, "budget", reserved("b")],
    [50, "budget", settled("a"), settled("b")],
    [60, "a", tool("tool.started", 0), tool("tool.started", 1), tool("tool.started", 2)],
    [70, "a", tool("tool.completed", 1)],
    [80, "b", tool("tool.started", 0)],
    [90, "a", tool("tool.failed", 0), tool("tool.denied", 2)],
    [95, "b", tool("tool.completed", 0), tool("tool.completed", 7)],
    [100, "b"],
  ];
  expect(reportOf(lines)).toMatchObject({ models: { count: 2, peak: 2, at_limit_ms: 30 }, tools: { count: 4, peak: 3, busy_ms: 35 } });
  expect(reportOf(lines, { session: "a" })).toMatchObject({
    session: "a",
    models: { count: 1, peak: 1, busy_ms: 40, at_limit_ms: 30 },
    tools: { count: 3, peak: 3, busy_ms: 30 },
  });
  expect(reportOf(lines, { session: "b" })).toMatchObject({ models: { count: 1 }, tools: { count: 1, peak: 1, busy_ms: 15 } });
});

test("a window tells what lies in it, and what ran when it began", () => {
  const lines: Line[] = [
    [0, "budget", bound(1), reserved("a")],
    [10, "budget", refused("b", "overloaded")],
    [100, "budget", settled("a")],
    [150, "budget", reserved("b")],
    [300, "budget", settled("b")],
  ];
  expect(reportOf(lines, { since_ms: T0 + 50, until_ms: T0 + 200 })).toMatchObject({
    from: at(50),
    to: at(200),
    models: { count: 2, peak: 1, busy_ms: 100, at_limit_ms: 100 },
    waits: [{ reason: "slot", ms: 140 }],
  });
  expect(reportOf(lines, { since_ms: T0 + 200 })).toMatchObject({ models: { count: 1, busy_ms: 100 }, waits: [] });
  expect(reportOf(lines, { since_ms: T0 + 1_000 })).toMatchObject({ from: null, to: null, models: { count: 0, slices: [] }, waits: [] });
  expect(reportOf([])).toMatchObject({ from: null, to: null, models: { peak: 0, peak_at: null } });
});

test("CR1, CR2, CR3 from a seed: the same bytes each time, the sums of a count by the millisecond, and no longer than it may be", () => {
  for (let seed = 1; seed <= 40; seed++) {
    const draw = seededRandom(seed);
    const pick = (below: number): number => Math.floor(draw() * below);
    const lines: Line[] = [[0, "budget", bound(1 + pick(4))]];
    const open = new Set<string>();
    const running: number[] = [];
    let ms = 0;
    for (let n = 0; n < 80; n++) {
      const next_ms = ms + pick(4);
      while (ms < next_ms) running[ms++] = open.size;
      const session = `s${pick(9)}`;
      if (open.delete(session))
        lines.push([ms, "budget", settled(session, n)], [ms, "budget", { ...settled(session), hold: `acme/session/${session}/3:model/1` }]);
      else {
        open.add(session);
        lines.push([ms, "budget", refused(session, "overloaded")], [ms + 1, "budget", reserved(session)]);
        running[ms++] = open.size - 1;
      }
    }
    const report = reportOf(lines);
    expect(JSON.stringify(reportOf(lines)), `seed ${seed}`).toBe(JSON.stringify(report));
    const total = running.slice(0, Date.parse(report.to ?? "") - T0);
    expect(
      report.models.ms_by_running.reduce((sum, one) => sum + one.ms, 0),
      `seed ${seed}`,
    ).toBe(total.length);
    for (const { running: level, ms: spent } of report.models.ms_by_running)
      expect(spent, `seed ${seed}, ${level}`).toBe(total.filter((one) => one === level).length);
    expect(report.models.peak, `seed ${seed}`).toBe(Math.max(0, ...total));
    expect(report.models.slices.length).toBeLessThanOrEqual(SLICES);
    expect(report.longest.length).toBeLessThanOrEqual(LONGEST);
  }
});
