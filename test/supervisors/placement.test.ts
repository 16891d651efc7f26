// Goal: the planner never gives a shard to who may not have it, never moves one without need, and always ends.
// Method: draw histories of joining, dying, draining, coming back and finished moves; after every step plan, check the plan
// against the invariants P1 to P4, and carry it out on a table.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { leastLoaded, type PlacementInput, type PlacementStrategy, type PlacementWorker, planPlacement, roundRobin } from "../../supervisors/placement.ts";
import type { PlacementEntry } from "../../supervisors/tables.ts";

const since = "2026-01-01T00:00:00.000Z";
const worker = (id: string, condition: PlacementWorker["condition"] = "ready", incarnation = `${id}-1`, versions = ["session@1"]): PlacementWorker => ({
  id,
  incarnation,
  condition,
  versions,
});
const owned = (id: string, epoch = 1, more: Partial<PlacementEntry> = {}): PlacementEntry => ({ worker: id, incarnation: `${id}-1`, epoch, since, ...more });
const input = (workers: PlacementWorker[], table: [number, PlacementEntry][], more: Partial<PlacementInput> = {}): PlacementInput => ({
  shards: 8,
  workers,
  table: new Map(table),
  epochs: new Map(),
  required_versions: [],
  ...more,
});

/** Carries a plan out as leader and owners would, with every planned move finished. */
function carryOut(table: Map<number, PlacementEntry>, plan: ReturnType<typeof planPlacement>, workers: readonly PlacementWorker[], finish: boolean): void {
  for (const decision of plan.decisions) {
    const entry = table.get(decision.shard);
    if (decision.kind === "assign") table.set(decision.shard, { worker: decision.worker, incarnation: decision.incarnation, epoch: decision.epoch, since });
    else if (entry !== undefined && decision.kind === "stay") {
      const { moving_to: _, ...stays } = entry;
      table.set(decision.shard, stays);
    } else if (entry !== undefined && decision.kind === "move") table.set(decision.shard, { ...entry, moving_to: decision.to });
  }
  if (!finish) return;
  for (const [shard, entry] of table) {
    const target = workers.find(({ id }) => id === entry.moving_to);
    if (target !== undefined) table.set(shard, { worker: target.id, incarnation: target.incarnation, epoch: entry.epoch + 1, since });
  }
}

describe("single cases", () => {
  test("with no ready worker nothing is decided and every shard is named as unplaced", () => {
    expect(planPlacement(input([], []))).toEqual({ decisions: [], unplaced: [0, 1, 2, 3, 4, 5, 6, 7] });
    expect(planPlacement(input([worker("w1", "leaving"), worker("w2", "suspected")], [])).unplaced).toHaveLength(8);
  });

  test("of workers with equally few shards the first by name is chosen", () => {
    const { decisions } = planPlacement(input([worker("b"), worker("a")], []));
    expect(decisions.map((decision) => decision.kind === "assign" && decision.worker)).toEqual(["a", "b", "a", "b", "a", "b", "a", "b"]);
  });

  test("a shard that a leaving worker released is not given back to it, only to its next life or to another", () => {
    const released = new Map([[0, { worker: "", incarnation: "w1-a", epoch: 3, from: "w1", reason: "released", since: "" }]]);
    const plan = (...ready: PlacementWorker[]) => planPlacement({ shards: 1, workers: ready, table: released, epochs: new Map(), required_versions: [] });
    const w1 = (incarnation: string): PlacementWorker => ({ id: "w1", incarnation, condition: "ready", versions: [] });
    const w2: PlacementWorker = { id: "w2", incarnation: "w2-a", condition: "ready", versions: [] };
    expect(plan(w1("w1-a"))).toEqual({ decisions: [], unplaced: [0] });
    expect(plan(w1("w1-a"), w2).decisions).toMatchObject([{ kind: "assign", shard: 0, worker: "w2", epoch: 4 }]);
    expect(plan(w1("w1-b")).decisions).toMatchObject([{ kind: "assign", shard: 0, worker: "w1", epoch: 4 }]);
  });

  test("a shard of an earlier incarnation is nobody's, though a worker of that name lives", () => {
    const { decisions } = planPlacement(input([worker("w1", "ready", "w1-2")], [[0, owned("w1", 4)]], { shards: 1 }));
    expect(decisions).toEqual([{ kind: "assign", shard: 0, worker: "w1", incarnation: "w1-2", epoch: 5, from: "w1", reason: "owner_gone" }]);
  });

  test("an epoch that a journal knows and the table does not is never given again", () => {
    const { decisions } = planPlacement(input([worker("w1")], [[0, owned("dead", 4)]], { shards: 1, epochs: new Map([[0, 9]]) }));
    expect(decisions).toMatchObject([{ epoch: 10 }]);
  });

  test("when the owner of a moving shard dies the shard goes where it was going", () => {
    const { decisions } = planPlacement(input([worker("w1"), worker("w2")], [[0, owned("dead", 4, { moving_to: "w2" })]], { shards: 1 }));
    expect(decisions).toMatchObject([{ kind: "assign", worker: "w2", epoch: 5 }]);
  });

  test("a move whose target is gone is aimed elsewhere, or withdrawn when there is nobody else", () => {
    const moving: [number, PlacementEntry][] = [[0, owned("w1", 4, { moving_to: "gone" })]];
    expect(planPlacement(input([worker("w1", "leaving"), worker("w2")], moving, { shards: 1 })).decisions).toMatchObject([{ kind: "move", to: "w2" }]);
    expect(planPlacement(input([worker("w1", "leaving")], moving, { shards: 1 })).decisions).toEqual([{ kind: "stay", shard: 0 }]);
    expect(planPlacement(input([worker("w1")], moving, { shards: 1 })).decisions).toEqual([{ kind: "stay", shard: 0 }]);
  });

  test("a worker that does not know a required version gets nothing and gives away what it has", () => {
    const old = worker("old", "ready", "old-1", ["session@1"]);
    const fresh = worker("new", "ready", "new-1", ["session@1", "session@2"]);
    const { decisions } = planPlacement(input([old, fresh], [[0, owned("old")]], { shards: 2, required_versions: ["session@2"] }));
    expect(decisions).toMatchObject([
      { kind: "assign", shard: 1, worker: "new" },
      { kind: "move", shard: 0, from: "old", to: "new", reason: "versions" },
    ]);
  });

  test("a worker that joins gets exactly its share, and only from those with more", () => {
    const table = Array.from({ length: 8 }, (_, shard): [number, PlacementEntry] => [shard, owned(shard < 4 ? "w1" : "w2")]);
    const { decisions } = planPlacement(input([worker("w1"), worker("w2"), worker("w3")], table));
    expect(decisions.map((decision) => decision.kind === "move" && [decision.from, decision.to])).toEqual([
      ["w1", "w3"],
      ["w2", "w3"],
    ]);
  });

  test("shards that are on their way count where they are going: the same plan is not made twice", () => {
    const table = new Map(Array.from({ length: 8 }, (_, shard): [number, PlacementEntry] => [shard, owned("w1")]));
    const workers = [worker("w1"), worker("w2")];
    const first = planPlacement({ ...input(workers, []), table });
    expect(first.decisions).toHaveLength(4);
    carryOut(table, first, workers, false);
    expect(planPlacement({ ...input(workers, []), table }).decisions).toEqual([]);
  });

  test("round robin gives by number", () => {
    const { decisions } = planPlacement(input([worker("a"), worker("b")], [], { shards: 4 }), roundRobin);
    expect(decisions.map((decision) => decision.kind === "assign" && decision.worker)).toEqual(["a", "b", "a", "b"]);
  });
});

type Event =
  | { kind: "join" | "die" | "drain" | "undrain" | "suspect" | "clear" | "return"; worker: number }
  | { kind: "finish" }
  | { kind: "release"; shard: number };

const event: fc.Arbitrary<Event> = fc.oneof(
  fc.record({ kind: fc.constantFrom("join", "die", "drain", "undrain", "suspect", "clear", "return"), worker: fc.integer({ min: 0, max: 5 }) }),
  fc.record({ kind: fc.constant("finish" as const) }),
  fc.record({ kind: fc.constant("release" as const), shard: fc.integer({ min: 0, max: 15 }) }),
) as fc.Arbitrary<Event>;

function happen(workers: Map<string, PlacementWorker>, births: Map<string, number>, event: Exclude<Event, { kind: "finish" | "release" }>): void {
  const id = `w${event.worker}`;
  const present = workers.get(id);
  if (event.kind === "join" || event.kind === "return") {
    if (present !== undefined && event.kind === "join") return;
    births.set(id, (births.get(id) ?? 0) + 1); // a return without a death seen: killed and started again
    workers.set(id, worker(id, "ready", `${id}-${births.get(id)}`));
  } else if (present !== undefined) {
    if (event.kind === "die") workers.delete(id);
    else workers.set(id, { ...present, condition: event.kind === "drain" ? "leaving" : event.kind === "suspect" ? "suspected" : "ready" });
  }
}

describe.each([leastLoaded, roundRobin])("whatever happens, by $name", (strategy: PlacementStrategy) => {
  test("P1 to P4 hold in every step, plans are the same for the same input, and planning comes to rest", () => {
    let plans = 0;
    let moves = 0;
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 16 }), fc.array(event, { minLength: 1, maxLength: 40 }), (shards, events) => {
        const table = new Map<number, PlacementEntry>();
        const workers = new Map<string, PlacementWorker>();
        const births = new Map<string, number>();
        const highest = new Map<number, number>();
        const plan = (): ReturnType<typeof planPlacement> =>
          planPlacement({ shards, workers: [...workers.values()], table, epochs: new Map(), required_versions: [] }, strategy);
        const check = (): ReturnType<typeof planPlacement> => {
          const made = plan();
          plans += 1;
          expect(
            planPlacement(
              { shards, workers: [...workers.values()].toReversed(), table: new Map([...table].toReversed()), epochs: new Map(), required_versions: [] },
              strategy,
            ),
          ).toEqual(made);
          expect(new Set(made.decisions.map(({ shard }) => shard)).size).toBe(made.decisions.length); // each shard in one place
          for (const decision of made.decisions) {
            const entry = table.get(decision.shard);
            const owner = entry === undefined ? undefined : workers.get(entry.worker);
            const living = owner !== undefined && owner.incarnation === entry?.incarnation;
            if (decision.kind === "stay") continue;
            const target = workers.get(decision.kind === "assign" ? decision.worker : decision.to)!;
            expect(target.condition).toBe("ready"); // P1
            if (decision.kind === "assign") {
              expect(living).toBe(false); // P2
              expect(decision.epoch).toBeGreaterThan(highest.get(decision.shard) ?? 0); // P4
              expect(decision.incarnation).toBe(target.incarnation);
            } else {
              moves += 1;
              expect(living).toBe(true);
              expect(decision.from).toBe(entry!.worker);
              expect(decision.to).not.toBe(decision.from);
            }
          }
          const ready = [...workers.values()].some(({ condition }) => condition === "ready");
          expect(made.unplaced.length === 0 || !ready).toBe(true);
          return made;
        };
        for (const happened of events) {
          if (happened.kind === "release") {
            const entry = table.get(happened.shard);
            if (entry !== undefined) table.set(happened.shard, { worker: "", incarnation: "", epoch: entry.epoch, since });
          } else if (happened.kind !== "finish") happen(workers, births, happened);
          carryOut(table, check(), [...workers.values()], happened.kind === "finish");
          for (const [shard, { epoch }] of table) {
            expect(epoch).toBeGreaterThanOrEqual(highest.get(shard) ?? 0);
            highest.set(shard, epoch);
          }
        }
        // Left alone it comes to rest: at most two rounds of moves, then nothing, and even.
        for (let rounds = 0; rounds < 3; rounds++) carryOut(table, check(), [...workers.values()], true);
        expect(plan().decisions).toEqual([]);
        const ready = [...workers.values()].filter(({ condition }) => condition === "ready");
        if (ready.length === 0) return;
        const counts = ready.map(({ id }) => [...table.values()].filter((entry) => entry.worker === id).length);
        expect(Math.max(...counts) - Math.min(...counts)).toBeLessThanOrEqual(1);
      }),
      { numRuns: 400 },
    );
    expect(plans).toBeGreaterThan(1_000);
    expect(moves).toBeGreaterThan(100);
  });
});

test("balancing moves the fewest shards: as many as stand above the shares, the odd ones staying with who has most", () => {
  fc.assert(
    fc.property(fc.array(fc.integer({ min: 0, max: 8 }), { minLength: 1, maxLength: 6 }), (loads) => {
      const table = new Map<number, PlacementEntry>();
      loads.forEach((load, index) => Array.from({ length: load }, () => table.set(table.size, owned(`w${index}`))));
      const workers = loads.map((_, index) => worker(`w${index}`));
      const { decisions } = planPlacement({ shards: table.size, workers, table, epochs: new Map(), required_versions: [] });
      const [share, odd] = [Math.floor(table.size / loads.length), table.size % loads.length];
      const least = loads.toSorted((a, b) => b - a).reduce((sum, load, rank) => sum + Math.max(0, load - share - (rank < odd ? 1 : 0)), 0);
      expect(decisions).toHaveLength(least);
    }),
  );
});
