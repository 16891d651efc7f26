// Goal: no machine of ours has a fault that XState would accept without a word, and the lint sees each such fault.
// Method: the real definitions are linted; then each rule's fault is planted in a small machine.
import { assign, createMachine, fromCallback, setup } from "xstate";
import { describe, expect, test } from "vitest";
import type { JsonObject } from "../../protocol/json.ts";
import { type ActorDefinition, effect } from "../../state-machines/definition.ts";
import { definitions } from "../../state-machines/kinds.ts";
import { lint, notJson } from "../../state-machines/lint.ts";

const SAMPLES: Record<keyof typeof definitions, JsonObject> = {
  budget: {},
  session: { agent: "a" },
  tenant: {},
  webhook: { url: "https://example.com/" },
  worker: { incarnation: "i", versions: {} },
};

test.each(Object.entries(definitions))("the definition of a %s has no fault", (kind, definition) => {
  expect(lint(definition, SAMPLES[kind as keyof typeof definitions])).toEqual([]);
});

const NOW = { seq: 1, at_ms: 1, attempts: {} };

/** A worker with one fault, given as states, implementations, or parts of the definition. */
function planted(
  config: object,
  implementations: { actions?: object; actors?: object; delays?: object } = {},
  more: Partial<ActorDefinition> = {},
): ActorDefinition {
  const made = setup({ types: {} as never, ...implementations } as never).createMachine({
    id: "worker",
    version: "1",
    context: { now: NOW },
    initial: "a",
    on: { "worker.drain": {}, "worker.undrain": {} },
    states: { a: config },
  } as never);
  return {
    kind: "worker",
    machine: made as unknown as ActorDefinition["machine"],
    creates: "worker.join",
    internal: ["worker.join"],
    effects: {},
    waits: () => "x",
    ...more,
  };
}
const work = effect<null, null>();
const withWork = { effects: { work: { lost: () => "retry" as const } } };
const invoke = { id: "work", src: "work", onDone: {}, onError: {} };

describe("a planted fault is found", () => {
  test.each<{ rule: string; definition: ActorDefinition }>([
    { rule: "L1", definition: planted({ entry: "act" }, { actions: { act: () => undefined } }) },
    { rule: "L1", definition: planted({ exit: () => undefined }) },
    { rule: "L1", definition: planted({ on: { "worker.drain": { actions: "nowhere" } } }) },
    { rule: "L2", definition: planted({ invoke: { ...invoke, id: undefined } }, { actors: { work } }, withWork) },
    { rule: "L2", definition: planted({ invoke: { ...invoke, src: fromCallback(() => undefined) } }) },
    { rule: "L3", definition: planted({ invoke: { ...invoke, onError: undefined } }, { actors: { work } }, withWork) },
    { rule: "L4", definition: planted({ id: "a", after: { nodelay: "a" } }) },
    { rule: "L4", definition: planted({ id: "a", after: { 1000: "a" } }) },
    { rule: "L4", definition: planted({ after: { soon: "a" } }, { delays: { soon: 5 } }) },
    { rule: "L5", definition: planted({ invoke: { ...invoke, systemId: "s" } }, { actors: { work } }, withWork) },
    { rule: "L5", definition: planted({ invoke }, { actors: { work: createMachine({ context: {} }) } }, withWork) },
    { rule: "L6", definition: planted({ on: { "*": {} } }) },
    { rule: "L7", definition: planted({ invoke }, { actors: { work } }) },
    { rule: "L7", definition: planted({}, {}, withWork) },
    { rule: "L8", definition: planted({ on: { "worker.dance": {} } }) },
    { rule: "L8", definition: planted({}, {}, { internal: ["worker.join", "worker.sing"] }) },
    { rule: "L8", definition: planted({}, {}, { internal: ["worker.join", "worker.drain"] }) },
    { rule: "L8", definition: planted({}, {}, { internal: [] }) },
    { rule: "L9", definition: planted({ entry: assign({ missing: undefined } as never) }) },
    { rule: "L10", definition: planted({}, {}, { kind: "tenant" }) },
  ])("$rule", ({ rule, definition }) => {
    const faults = lint(definition);
    expect(faults.map((fault) => fault.split(" ")[0])).toContain(rule);
  });

  test("and a machine without one passes", () => {
    const sound = planted({ id: "a", invoke, after: { soon: "a" }, entry: assign({ n: 1 } as never) }, { actors: { work }, delays: { soon: 5 } }, withWork);
    expect(lint(sound)).toEqual([]);
  });
});

test("only plain JSON is JSON", () => {
  expect(notJson({ a: [1, "x", null, true, { b: {} }] })).toBeUndefined();
  for (const value of [undefined, Number.NaN, -0, 1n, Symbol("s"), () => 1, new Date(0), new Map(), new Error("e")])
    expect(notJson({ a: [value] }), String(value)).toMatch(/^context\/a\/0 is /);
});
