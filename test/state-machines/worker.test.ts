// Goal: a worker's journal keeps W1 to W3, whatever the leader says in whatever order.
// Method: every state crossed with every command; stories for shards; random orders of commands, with the shards counted from the events.
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { COMMANDS } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { coreOf } from "../../state-machines/step.ts";
import { workerContextOf, workerDefinition } from "../../state-machines/worker.ts";
import { Drive } from "./drive.ts";

const core = coreOf(workerDefinition);
const joining = (): Drive =>
  new Drive(core, { tenant: "system", kind: "worker", id: "w1" }).create({ incarnation: "i1", pid: 42, host: "h", versions: { session: "1" } });
const way =
  (...commands: string[]) =>
  (): Drive => {
    const drive = joining();
    for (const command of commands) drive.tell(command, BODIES[command] ?? {});
    return drive;
  };
const BODIES: Record<string, JsonObject> = {
  "worker.join": { incarnation: "i2", versions: { session: "1" } },
  "worker.suspect": { evidence: { connections: 1 } },
  "worker.declare_dead": { evidence: { lease: "expired" } },
  "worker.leave": { reason: "SIGTERM" },
  "worker.drain": { reason: "deploy" },
  "shard.assign": { shard: 3, epoch: 7, from: null },
  "shard.release": { shard: 3, epoch: 7, to: "w2", reason: "rebalance" },
  "actor.resumed": { actor: "acme/session/s1", entries: 4, detect_ms: 5, assign_ms: 6, replay_ms: 7 },
};
const ready = way("worker.ready");
const holding = way("worker.ready", "shard.assign");
const WAYS: Record<string, () => Drive> = {
  joining,
  ready,
  draining: way("worker.ready", "worker.drain"),
  suspected: way("worker.ready", "worker.suspect"),
  "suspected while draining": way("worker.ready", "worker.drain", "worker.suspect"),
  dead: way("worker.ready", "worker.declare_dead"),
  left: way("worker.ready", "worker.leave"),
};

const no = "illegal_transition";
/** In the order of the columns below. */
const COLUMNS = [
  "worker.join",
  "worker.ready",
  "worker.suspect",
  "worker.clear",
  "worker.declare_dead",
  "worker.leave",
  "worker.drain",
  "worker.undrain",
  "shard.assign",
  "shard.release",
  "actor.resumed",
];
const TABLE: Record<string, readonly string[]> = {
  joining: [no, "ready", no, no, "dead", "left", "joining", "joining", no, "not_found", "joining"],
  ready: [no, no, "suspected", no, "dead", "left", "draining", no, "ready", "not_found", "ready"],
  draining: [no, no, "suspected", no, "dead", "left", no, "ready", no, "not_found", "draining"],
  suspected: [no, no, no, "ready", "dead", "left", "suspected", "suspected", no, "not_found", "suspected"],
  "suspected while draining": [no, no, no, "draining", "dead", "left", "suspected", "suspected", no, "not_found", "suspected"],
  dead: ["joining", no, no, no, no, no, no, no, no, "not_found", "dead"],
  left: ["joining", no, no, no, no, no, no, no, no, "not_found", "left"],
};

describe("every state crossed with every command", () => {
  const cases = Object.entries(TABLE).flatMap(([state, row]) => row.map((leads_to, column) => ({ state, command: COLUMNS[column] ?? "", leads_to })));
  test("the table is whole", () => {
    expect([...COLUMNS].sort()).toEqual([...new Set([...Object.keys(COMMANDS.worker), ...(workerDefinition.internal ?? [])])].sort());
    expect([...new Set(Object.values(WAYS).map((make) => make().at))].sort()).toEqual(Object.keys(workerDefinition.machine.states).sort());
    expect(cases).toHaveLength(7 * 11);
  });
  test.each(cases)("$state takes $command to $leads_to", ({ state, command, leads_to }) => {
    const drive = WAYS[state]?.() ?? joining();
    const before = drive.at;
    const refusal = drive.command(command, BODIES[command] ?? {});
    expect(refusal?.code ?? drive.at).toBe(leads_to);
    if (refusal === undefined && before !== drive.at) expect(drive.told.at(-1)).toMatchObject({ type: "worker.state", from: before, to: drive.at });
    expect(workerDefinition.waits(drive.view)).toMatch(/wait/);
  });
});

test("a judgement stands in the event with its evidence, and being cleared takes it back", () => {
  const drive = ready();
  drive.tell("worker.suspect", BODIES["worker.suspect"]);
  expect(drive.told).toEqual([{ type: "worker.state", from: "ready", to: "suspected", evidence: { connections: 1 } }]);
  drive.tell("worker.clear");
  expect(drive.told).toEqual([{ type: "worker.state", from: "suspected", to: "ready", evidence: null }]);
});

test("a drain that came while joining or suspected is kept", () => {
  const early = joining();
  early.tell("worker.drain");
  early.tell("worker.ready");
  expect(early.at).toBe("draining");
  const suspected = ready();
  suspected.tell("worker.suspect", { evidence: null });
  suspected.tell("worker.drain");
  suspected.tell("worker.clear");
  expect(suspected.at).toBe("draining");
  suspected.tell("worker.undrain");
  expect(suspected.at).toBe("ready");
});

describe("shards", () => {
  test("are told when they come and go", () => {
    const drive = holding();
    expect(drive.told).toEqual([{ type: "shard.assigned", shard: 3, epoch: 7, from: null }]);
    expect(workerContextOf(drive.view).shards).toEqual({ 3: 7 });
    expect(workerDefinition.waits(drive.view)).toBe("at work with 1 shard: waits for shards, a drain, or a sign that something is wrong");
    drive.tell("shard.release", BODIES["shard.release"]);
    expect(drive.told).toEqual([{ type: "shard.released", shard: 3, epoch: 7, to: "w2", reason: "rebalance" }]);
    expect(workerContextOf(drive.view).shards).toEqual({});
  });

  test("W1: come only with a higher epoch than ever, also after they went", () => {
    const drive = holding();
    expect(drive.refusal("shard.assign", { shard: 3, epoch: 7, from: null })).toMatchObject({ code: "conflict", details: { held: 7 } });
    drive.tell("shard.release", BODIES["shard.release"]);
    expect(drive.refusal("shard.assign", { shard: 3, epoch: 7, from: null })).toMatchObject({ code: "conflict", details: { held: null, highest: 7 } });
    expect(drive.refusal("shard.assign", { shard: 3, epoch: 8, from: "w2" })).toBeUndefined();
  });

  test("W2: go only under the epoch they are held", () => {
    expect(holding().refusal("shard.release", { shard: 3, epoch: 6, to: null, reason: "x" })).toMatchObject({ code: "conflict", details: { held: 7 } });
    expect(holding().refusal("shard.release", { shard: 4, epoch: 7, to: null, reason: "x" })).toMatchObject({ code: "not_found" });
  });

  test("of a dead worker are moved one by one, and what is left goes when it joins again", () => {
    const drive = holding();
    drive.tell("shard.assign", { shard: 4, epoch: 9, from: "w2" });
    drive.tell("worker.declare_dead", { evidence: "two connections gone" });
    expect(workerDefinition.waits(drive.view)).toBe("waits until 2 shards have another owner");
    drive.tell("shard.release", BODIES["shard.release"]);
    drive.tell("worker.join", { incarnation: "i2", versions: { session: "2" } });
    expect(drive.told).toEqual([
      { type: "shard.released", shard: 4, epoch: 9, to: null, reason: "joined again" },
      { type: "worker.state", from: "dead", to: "joining", evidence: null },
    ]);
    expect(workerContextOf(drive.view)).toMatchObject({ incarnation: "i2", versions: { session: "2" }, pid: null, shards: {}, epochs: { 3: 7, 4: 9 } });
  });
});

test("W3: an incarnation that died or left never comes back", () => {
  for (const end of ["dead", "left"]) expect(WAYS[end]?.().refusal("worker.join", { incarnation: "i1", versions: {} })).toMatchObject({ code: "conflict" });
});

test("a resumed actor is told with its times", () => {
  const drive = ready();
  drive.tell("actor.resumed", { ...BODIES["actor.resumed"], first_token_ms: 8 });
  expect(drive.told).toEqual([{ type: "actor.resumed", actor: "acme/session/s1", entries: 4, detect_ms: 5, assign_ms: 6, replay_ms: 7, first_token_ms: 8 }]);
});

test("in any order of commands, what the events say of shards is what is held, and it replays to the same state", () => {
  let assignments = 0;
  const command = fc.oneof(
    {
      weight: 2,
      arbitrary: fc.record({
        type: fc.constant("shard.assign"),
        body: fc.record({ shard: fc.nat(2), epoch: fc.integer({ min: 1, max: 30 }), from: fc.constant(null) }),
      }),
    },
    {
      weight: 1,
      arbitrary: fc.record({
        type: fc.constant("shard.release"),
        body: fc.record({ shard: fc.nat(2), epoch: fc.integer({ min: 1, max: 30 }), to: fc.constant("w2"), reason: fc.constant("r") }),
      }),
    },
    {
      weight: 3,
      arbitrary: fc
        .constantFrom("worker.ready", "worker.drain", "worker.undrain", "worker.suspect", "worker.clear", "worker.leave", "worker.declare_dead")
        .map((type) => ({ type, body: { evidence: null } })),
    },
    { weight: 1, arbitrary: fc.nat(5).map((n) => ({ type: "worker.join", body: { incarnation: `i${n}`, versions: {} } })) },
  );
  fc.assert(
    fc.property(fc.array(command, { maxLength: 40, size: "max" }), (commands) => {
      const drive = ready();
      for (const { type, body } of commands) drive.command(type, body as JsonObject);
      const held = new Map<number, number>();
      const highest = new Map<number, number>();
      for (const event of drive.events) {
        const { shard, epoch } = event as unknown as { shard: number; epoch: number };
        if (event.type === "shard.assigned") {
          expect(epoch).toBeGreaterThan(highest.get(shard) ?? 0); // W1
          held.set(shard, epoch);
          highest.set(shard, epoch);
          assignments += 1;
        } else if (event.type === "shard.released") {
          expect(held.get(shard)).toBe(epoch); // W2
          held.delete(shard);
        }
      }
      expect(workerContextOf(drive.view).shards).toEqual(Object.fromEntries(held));
      expect(drive.replayed()).toEqual({ saved: drive.saved, events: drive.events });
    }),
    { numRuns: 100 },
  );
  expect(assignments).toBeGreaterThan(20);
});
