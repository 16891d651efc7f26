// Goal:   a session answers every command in every state as its page says.
// Method: a table of every state, and of each way into one that differs in what it takes, crossed with every command.
import { describe, expect, test } from "vitest";
import { COMMANDS } from "../../protocol/commands.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { sessionDefinition } from "../../state-machines/session.ts";
import { expectInvariants, WAYS } from "./session-drive.ts";

type Way = keyof typeof WAYS;
const ILLEGAL = "illegal_transition";

/** Every command in every state: the state it leads to, or the code it is refused with. */
const AWAITING = {
  "message.send": "awaiting_dependency",
  "message.send reject": "busy",
  "message.send interrupt": "thinking",
  "turn.cancel": "idle",
  "session.pause": "paused",
  "session.resume": ILLEGAL,
  "session.hibernate": "hibernated",
  "session.terminate": "terminated",
  "session.create": ILLEGAL,
  "session.unpark": ILLEGAL,
} as const;
const TABLE: Readonly<Record<Way, Readonly<Record<string, string>>>> = {
  initializing: {
    "message.send": "initializing",
    "message.send reject": "initializing",
    "message.send interrupt": "initializing",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "initializing, a step failed": {
    "message.send": "initializing",
    "message.send reject": "initializing",
    "message.send interrupt": "initializing",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "initializing within a turn": {
    "message.send": "initializing",
    "message.send reject": "busy",
    "message.send interrupt": "initializing",
    "turn.cancel": "initializing",
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  idle: {
    "message.send": "thinking",
    "message.send reject": "thinking",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": "paused",
    "session.resume": ILLEGAL,
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  thinking: {
    "message.send": "thinking",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": "idle",
    "session.pause": "paused",
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  acting: {
    "message.send": "acting",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": "idle",
    "session.pause": "acting",
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "acting, to be paused": {
    "message.send": "acting",
    "message.send reject": "busy",
    "message.send interrupt": "paused",
    "turn.cancel": "paused",
    "session.pause": ILLEGAL,
    "session.resume": "acting",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  awaiting_dependency: AWAITING,
  "awaiting_dependency, looking": AWAITING,
  paused: {
    "message.send": "paused",
    "message.send reject": "paused",
    "message.send interrupt": "paused",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "idle",
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "paused within a turn": {
    "message.send": "paused",
    "message.send reject": "busy",
    "message.send interrupt": "paused",
    "turn.cancel": "paused",
    "session.pause": ILLEGAL,
    "session.resume": "thinking",
    "session.hibernate": "hibernated",
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  hibernated: {
    "message.send": "thinking",
    "message.send reject": "thinking",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "idle",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "hibernated within a turn": {
    "message.send": "thinking",
    "message.send reject": "busy",
    "message.send interrupt": "thinking",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "thinking",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  unhealthy: {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": "initializing",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  "unhealthy within a turn": {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": "unhealthy",
    "session.pause": ILLEGAL,
    "session.resume": "initializing",
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  terminated: {
    "message.send": ILLEGAL,
    "message.send reject": ILLEGAL,
    "message.send interrupt": ILLEGAL,
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": ILLEGAL,
    "session.create": ILLEGAL,
    "session.unpark": ILLEGAL,
  },
  parked: {
    "message.send": "parked",
    "message.send reject": "busy",
    "message.send interrupt": "parked",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": "thinking",
  },
  "parked before its configuration": {
    "message.send": "parked",
    "message.send reject": "parked",
    "message.send interrupt": "parked",
    "turn.cancel": ILLEGAL,
    "session.pause": ILLEGAL,
    "session.resume": ILLEGAL,
    "session.hibernate": ILLEGAL,
    "session.terminate": "terminated",
    "session.create": ILLEGAL,
    "session.unpark": "initializing",
  },
};

const BODIES: Readonly<Record<string, JsonObject>> = {
  "message.send": { content: "x" },
  "dependency.ask": { session: "a1", message: "m1", from: "acme/session/child" },
  "dependency.told": { session: "parent", message: "m3" },
};

describe("every state crossed with every command", () => {
  // What sessions tell one another leaves each where it is.
  const told = (way: string): string => (way === "terminated" ? ILLEGAL : WAYS[way as Way]().at);
  const rows = Object.entries(TABLE).map(([way, row]) => [way, { ...row, "dependency.ask": told(way), "dependency.told": told(way) }] as const);
  const cases = rows.flatMap(([way, row]) => Object.entries(row).map(([command, leads_to]) => ({ way: way as Way, command, leads_to })));

  test("the table names every command of the wire, and its ways reach every state of the machine", () => {
    for (const [, row] of rows)
      expect([...new Set(Object.keys(row).map((command) => command.split(" ")[0]))].sort()).toEqual(Object.keys(COMMANDS.session).sort());
    const states = Object.keys(sessionDefinition.machine.states).filter((name) => name !== "choosing");
    expect([...new Set(Object.values(WAYS).map((way) => way().at))].sort()).toEqual(states.sort());
    expect(cases).toHaveLength(18 * 12);
  });

  test.each(cases)("$way takes $command to $leads_to", ({ way, command, leads_to }) => {
    const drive = WAYS[way]();
    expectInvariants(drive);
    const before = drive.at;
    const entries = drive.entries.length;
    const [type = "", on_busy] = command.split(" ");
    const refusal = drive.command(type, { ...BODIES[type], ...(on_busy === undefined ? {} : { on_busy }) });
    expect(refusal?.code ?? drive.at).toBe(leads_to);
    expect(drive.entries.length - entries, "a refused command is not applied").toBe(refusal === undefined ? 1 : 0);
    const moved = drive.told.filter(({ type }) => type === "session.state");
    if (refusal === undefined && before !== drive.at) expect(moved).toMatchObject([{ from: before, to: drive.at }]);
    else if (refusal === undefined) expect(moved).toEqual([]);
    else expect(refusal.details).toMatchObject({ state: before });
    expectInvariants(drive);
  });
});
