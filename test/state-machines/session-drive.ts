// session-drive: a session in a test: outputs of its effects in short, ways into each of its states, and its invariants as one checker.
import { expect } from "vitest";
import type { AgentConfig } from "../../protocol/commands.ts";
import type { ActorEvent, EffectError } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { SESSION_QUEUE_MAX } from "../../protocol/limits.ts";
import { type SessionContext, sessionContextOf } from "../../state-machines/session-context.ts";
import type { ConfigurationOutput, ModelOutput } from "../../state-machines/session-effects.ts";
import { TOOL_CALLS_MAX } from "../../state-machines/session-tool-calls.ts";
import { TRANSCRIPT_ITEMS_MAX } from "../../state-machines/session-transcript.ts";
import { sessionDefinitionOver } from "../../state-machines/session.ts";
import type { LookOutput, ParentEnd } from "../../state-machines/dependency.ts";
import { coreOf } from "../../state-machines/step.ts";
import { BUILT_IN_TOOLS } from "../../state-machines/tools.ts";
import { Drive } from "./drive.ts";

/** The built-in tools, and one that must not be called twice. */
const TOOLS = { ...BUILT_IN_TOOLS, pay: { description: "Pays.", parameters: { type: "object" }, idempotent: false } };
export const sessionCore = coreOf(sessionDefinitionOver(TOOLS));

export const configuration = (more: Partial<AgentConfig> = {}): ConfigurationOutput => ({
  config: { model: "simulated/echo", instructions: "be brief", tools: ["now", "wait_ms", "pay"], mode: "multi", ...more },
  hash: "a".repeat(64),
  agent_version: 3,
});

export const answer = (text: string, ...tools: string[]): ModelOutput => ({
  text,
  tool_calls: tools.map((name, index) => ({ id: `call-${index}`, name, args: {} })),
  stop: tools.length > 0 ? "tool_calls" : "end",
  usage: { input_tokens: 5, output_tokens: 2, cache_read_tokens: 3, cache_write_tokens: 1, reasoning_tokens: 4 },
  cost_usd_micros: 25,
  price_version: "v1",
  model: "simulated/echo",
});

/** A call of a model as its effect tells of it: one that failed and cost nothing, unless told otherwise. */
export const callMade = (number: number, more: JsonObject = {}): JsonObject => ({
  model: "openai/b",
  attempt: 1,
  try: number,
  purpose: "answer",
  rule: null,
  outcome: "failed",
  stop: null,
  code: "overloaded",
  message: "too much to do",
  usage: null,
  cost_usd_micros: null,
  price_version: null,
  started_at: "2026-11-21T05:00:01.000Z",
  ended_at: "2026-11-21T05:00:01.250Z",
  first_token_ms: null,
  ...more,
});

/** The same as journals of before calls were told one by one have it. */
export const callOfBefore = (call: JsonObject): JsonObject =>
  Object.fromEntries(Object.entries(call).filter(([name]) => name !== "purpose" && name !== "rule"));

export const observed = { text: "observed", is_error: false };
/** As the performer of a model call says that the configuration must be taken up anew. */
export const changed = {
  code: "configuration_changed",
  message: "it changed",
  details: { attempts: [], usage: null, cost_usd_micros: 0, price_version: null },
};
export const lost = { code: "provider_unavailable", message: "away" };

export class SessionDrive extends Drive {
  constructor() {
    super(sessionCore);
  }
  get context(): SessionContext {
    return sessionContextOf(this.view);
  }
  send(text = "hello", more: JsonObject = {}): JsonObject {
    return this.tell("message.send", { content: text, ...more });
  }
  /** What the present model call gets to read. */
  get prompt(): unknown {
    return (this.state.running["model"]?.input as JsonObject | undefined)?.messages;
  }
}

export function session(body: JsonObject = {}): SessionDrive {
  const drive = new SessionDrive();
  drive.create({ agent: "assistant", ...body });
  return drive;
}

export const idle = (more: Partial<AgentConfig> = {}, body: JsonObject = {}): SessionDrive => {
  const drive = session(body);
  drive.done("configuration", configuration(more));
  return drive;
};
export const thinking = (more: Partial<AgentConfig> = {}, body: JsonObject = {}): SessionDrive => {
  const drive = idle(more, body);
  drive.send();
  return drive;
};
export const acting = (more: Partial<AgentConfig> = {}, body: JsonObject = {}): SessionDrive => {
  const drive = thinking(more, body);
  drive.done("model", answer("", "now", "wait_ms"));
  return drive;
};

const after = (drive: SessionDrive, ...commands: string[]): SessionDrive => {
  for (const command of commands) drive.tell(command);
  return drive;
};

const parked = (drive: SessionDrive): SessionDrive => {
  while (drive.at !== "parked") drive.claim();
  return drive;
};

/** Fails every try of the initialisation that is left. */
export const unbegun = (drive: SessionDrive, error: EffectError = { code: "agent_unknown", message: "there is no agent 'assistant'" }): SessionDrive => {
  for (;;) {
    drive.fail("configuration", error);
    if (drive.at !== "initializing") return drive;
    drive.fire("init_retry");
  }
};

/** A turn that found the configuration changed, and has not been given the new one yet. */
export const updating = (): SessionDrive => {
  const drive = thinking();
  drive.fail("model", changed);
  return drive;
};

export const PARENT = { session: "parent", message: "m3" };
/** What a look at the one parent says. */
export const found = (end: ParentEnd): LookOutput => ({ me: "acme/session/a1", parents: [{ ...PARENT, end }] });
/** Its first message comes after another session's. */
export const comingAfter = (body: JsonObject = {}): SessionDrive => {
  const drive = idle({}, body);
  drive.send("then", { after: [PARENT] });
  return drive;
};

/** A way into every state, and into each of those that differ in what they take. */
export const WAYS = {
  initializing: () => session(),
  idle: () => idle(),
  thinking: () => thinking(),
  acting: () => acting(),
  "acting, to be paused": () => after(acting(), "session.pause"),
  "awaiting_dependency, looking": () => comingAfter(),
  awaiting_dependency: () => {
    const drive = comingAfter();
    drive.done("parents", found("open"));
    return drive;
  },
  paused: () => after(idle(), "session.pause"),
  "paused within a turn": () => after(thinking(), "session.pause"),
  hibernated: () => after(idle(), "session.hibernate"),
  "hibernated within a turn": () => after(thinking(), "session.pause", "session.hibernate"),
  "initializing, a step failed": () => {
    const drive = session();
    drive.fail("configuration", lost);
    return drive;
  },
  "initializing within a turn": () => updating(),
  unhealthy: () => unbegun(session()),
  "unhealthy within a turn": () => unbegun(updating()),
  parked: () => parked(thinking()),
  "parked before its configuration": () => parked(session()),
  terminated: () => after(idle(), "session.terminate"),
} as const satisfies Record<string, () => SessionDrive>;

const TURN_ENDS = ["turn.completed", "turn.failed", "turn.cancelled"];
const idOfCall = ({ turn, step, call_id }: ActorEvent): string => `${turn}.${step}.${call_id ?? ""}`;

function endsOf(events: readonly ActorEvent[], types: readonly string[], id: (event: ActorEvent) => string): Map<string, number> {
  const ends = new Map<string, number>();
  for (const event of events) if (types.includes(event.type)) ends.set(id(event), (ends.get(id(event)) ?? 0) + 1);
  return ends;
}

/** SE1 to SE6 of a session, as it stands and by all it has told. */
export function expectInvariants(drive: SessionDrive): void {
  const { context, view, events } = drive;

  // SE1
  const received = events.filter(({ type }) => type === "message.received").map(({ turn }) => turn);
  expect(received, "SE1: turn numbers rise from 1").toEqual(received.map((_, index) => index + 1));
  const turnEnds = endsOf(events, TURN_ENDS, ({ turn }) => String(turn));
  const unended = received.filter((turn) => !turnEnds.has(String(turn)));
  expect(
    [...turnEnds.values()].every((count) => count === 1),
    `SE1: one end per turn, not ${JSON.stringify([...turnEnds])}`,
  ).toBe(true);
  const alive = [...(context.turn_state === "open" ? [context.turn] : []), ...context.queue.map(({ turn }) => turn)].sort((a, b) => a - b);
  expect(unended, "SE1: a turn without an end is open or waits").toEqual(alive);

  // SE2
  const calls = events.filter(({ type }) => type === "model.started");
  const unasked = new Set(events.filter(({ type, code }) => type === "model.failed" && code === "configuration_changed").map(idOfCall));
  const perTurn = Map.groupBy(
    calls.filter((call) => !unasked.has(idOfCall(call))),
    ({ turn }) => turn,
  );
  for (const [turn, made] of perTurn) expect(made.length, `SE2: calls of turn ${String(turn)}`).toBeLessThanOrEqual(context.config?.max_loops ?? 0);

  // SE3
  const inFlight = view.state === "thinking" ? [`${context.turn}.${context.step}.`] : [];
  const callEnds = endsOf(events, ["model.completed", "model.failed"], idOfCall);
  expect(
    [...callEnds.values()].every((count) => count === 1),
    "SE3: one end per model call",
  ).toBe(true);
  expect(
    calls.map(idOfCall).filter((id) => !callEnds.has(id)),
    "SE3: a call without an end is in flight",
  ).toEqual(inFlight);
  const toolEnds = endsOf(events, ["tool.completed", "tool.failed", "tool.denied"], idOfCall);
  expect(
    [...toolEnds.values()].every((count) => count === 1),
    "SE3: one end per tool call",
  ).toBe(true);
  const toolsOpen = events.filter((event) => event.type === "tool.started" && !toolEnds.has(idOfCall(event))).length;
  const pending = context.tools.filter(({ outcome }) => outcome.kind === "pending").map(({ index }) => `tool.${index}`);
  expect(toolsOpen, "SE3: a tool without an end is in flight").toBe(pending.length);

  // SE4
  const answers = context.transcript.filter(({ role }) => role === "tool").length;
  const called = context.transcript
    .filter(({ role }) => role === "assistant")
    .map(({ at }) => drive.entries[at - 1]?.entry)
    .reduce((sum, entry) => sum + (entry?.t === "done" ? (entry.output as unknown as ModelOutput).tool_calls.length : Number.NaN), 0);
  expect(answers + context.tools.length, "SE4: every call in the transcript has its answer").toBe(called);
  const positions = context.transcript.filter(({ role }) => role === "user").map(({ at }) => drive.entries[at - 1]?.entry);
  expect(
    positions.every((entry) => entry?.t === "command" && entry.type === "message.send"),
    "a user's position names a message",
  ).toBe(true);

  // SE5
  expect(context.queue.length).toBeLessThanOrEqual(SESSION_QUEUE_MAX + 1);
  expect(context.transcript.length).toBeLessThanOrEqual(TRANSCRIPT_ITEMS_MAX);
  expect(context.tools.length).toBeLessThanOrEqual(TOOL_CALLS_MAX);

  // SE6
  const expected: Record<string, readonly string[]> = {
    initializing: context.init?.failed === null ? ["configuration"] : [],
    thinking: ["model"],
    acting: pending,
    awaiting_dependency: JSON.stringify(drive.saved.value).includes("looking") ? ["parents"] : [],
  };
  expect([...view.running].sort(), `SE6: in flight while ${view.state}`).toEqual([...(expected[view.state] ?? [])].sort());
  if (view.state === "acting") expect(pending.length).toBeGreaterThan(0);
  expect(Object.keys(drive.state.snapshot.children).sort(), "XState's children are the effects in flight").toEqual([...view.running].sort());

  // A6
  if (view.running.length === 0) expect(drive.core.definition.waits(view)).toMatch(/\w+/);
  else expect(drive.core.definition.waits(view)).toBeUndefined();
}
