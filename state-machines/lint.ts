// lint: what the compiler cannot check of a definition. Run over every kind at start-up and in the tests.
//
// Each rule stands for something XState accepts without a word and that would break an actor later:
//   L1.  Actions are data: assign, raise, cancel, emit, log, enqueueActions, spawnChild with an id, stopChild. Anything else would act in
//        the pure step.
//   L2.  An invoke has an explicit id and a named src: the id is in the journal, as part of an inst.
//   L3.  An invoke has onError: else one failed effect ends the actor.
//   L4.  Delays are named and known: an unknown name fires at once. A state with `after` has an explicit id: it is part of a timer's inst.
//   L5.  No systemId, no nested machines: their actions never reach the step.
//   L6.  No wildcard `*`: it would match results and timers too.
//   L7.  The table of effects names exactly the machine's effects.
//   L8.  Every event is a command that the wire declares for the kind, or is listed as internal; and every declared one is taken somewhere.
//   L9.  A fresh context is plain JSON without undefined: it must come back equal from a snapshot.
//   L10. Version and id are there: they name the machine in every journal message.
import type { AnyActorLogic, AnyStateNode } from "xstate";
import { COMMANDS } from "../protocol/commands.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { ActorDefinition } from "./definition.ts";
import { coreOf } from "./step.ts";

/** Every node of a machine, the root first. */
export function* nodesOf(node: AnyStateNode): Generator<AnyStateNode> {
  yield node;
  for (const child of Object.values(node.states) as AnyStateNode[]) yield* nodesOf(child);
}

const DATA_ACTIONS = new Set(["assign", "raise", "cancel", "emit", "log", "enqueueActions", "spawnChild", "stopChild"].map((name) => `xstate.${name}`));

/** Where a value is not plain JSON, or undefined when it is. */
export function notJson(value: unknown, path = "context"): string | undefined {
  if (value === null || typeof value === "string" || typeof value === "boolean") return undefined;
  if (typeof value === "number") return Number.isFinite(value) && !Object.is(value, -0) ? undefined : `${path} is ${value}, which JSON does not keep`;
  if (typeof value !== "object") return `${path} is ${value === undefined ? "undefined" : `a ${typeof value}`}`;
  if (Array.isArray(value)) {
    for (let index = 0; index < value.length; index++) {
      const fault = notJson(value[index], `${path}/${index}`);
      if (fault !== undefined) return fault;
    }
    return undefined;
  }
  const prototype: unknown = Object.getPrototypeOf(value);
  if (prototype !== Object.prototype && prototype !== null) return `${path} is a ${value.constructor?.name ?? "foreign object"}`;
  for (const [key, item] of Object.entries(value)) {
    const fault = notJson(item, `${path}/${key}`);
    if (fault !== undefined) return fault;
  }
  return undefined;
}

const listOf = <T>(value: T | readonly T[] | undefined): readonly T[] =>
  value === undefined ? [] : Array.isArray(value) ? (value as readonly T[]) : [value as T];

/** XState's description of an action, reduced to what is looked at here. */
interface ActionShape {
  readonly type?: string;
  readonly name?: string;
  readonly id?: unknown;
}

function lintActions(definition: ActorDefinition, where: string, actions: readonly unknown[], faults: string[]): void {
  for (const action of actions) {
    const named = typeof action === "function" ? undefined : typeof action === "string" ? action : (action as ActionShape).type;
    const made = (named === undefined ? action : definition.machine.implementations.actions[named]) as ActionShape | undefined;
    if (made === undefined) {
      faults.push(`L1 ${where}: action '${named}' is not defined`);
    } else if (!DATA_ACTIONS.has(made.type ?? "")) {
      faults.push(`L1 ${where}: action '${named ?? made.type ?? made.name}' is not data`);
    } else if (made.type === "xstate.spawnChild" && made.id === undefined) {
      faults.push(`L1 ${where}: spawnChild without an id`);
    }
  }
}

function lintInvokes(node: AnyStateNode, faults: string[]): void {
  listOf(node.config.invoke).forEach((raw: { id?: unknown; src?: unknown; onError?: unknown; systemId?: unknown }) => {
    const name = typeof raw.src === "string" ? raw.src : "inline";
    if (typeof raw.id !== "string") faults.push(`L2 ${node.id}: invoke of '${name}' without an explicit id`);
    if (typeof raw.src !== "string") faults.push(`L2 ${node.id}: an inline invoke`);
    if (raw.onError === undefined) faults.push(`L3 ${node.id}: invoke of '${name}' without onError`);
    if (raw.systemId !== undefined) faults.push(`L5 ${node.id}: invoke of '${name}' with a systemId`);
  });
}

function lintDelays(definition: ActorDefinition, node: AnyStateNode, faults: string[]): void {
  if (node.after.length > 0 && node.config.id === undefined) faults.push(`L4 ${node.id}: a state with 'after' without an explicit id`);
  for (const { delay } of node.after) {
    if (typeof delay !== "string") faults.push(`L4 ${node.id}: the delay ${String(delay)} has no name`);
    else if (!Object.hasOwn(definition.machine.implementations.delays, delay)) faults.push(`L4 ${node.id}: unknown delay '${delay}'`);
  }
}

function lintEffects({ machine, effects }: ActorDefinition, faults: string[]): void {
  const logic = machine.implementations.actors as Record<string, AnyActorLogic>;
  for (const [src, made] of Object.entries(logic)) {
    if ("states" in made) faults.push(`L5 effect '${src}' is a machine: host it as an actor of its own`);
    if (!Object.hasOwn(effects, src)) faults.push(`L7 effect '${src}' has no row in the table of effects`);
  }
  for (const src of Object.keys(effects)) if (!Object.hasOwn(logic, src)) faults.push(`L7 the table names an effect '${src}' that the machine does not have`);
}

function lintEvents(definition: ActorDefinition, faults: string[]): void {
  const declared = Object.keys(COMMANDS[definition.kind]);
  const internal = definition.internal ?? [];
  const taken = new Set<string>();
  for (const node of nodesOf(definition.machine.root)) {
    for (const type of node.transitions.keys()) {
      if (type === "*") faults.push(`L6 ${node.id}: the wildcard '*'`);
      else if (type !== "" && !type.startsWith("xstate.")) taken.add(type);
    }
  }
  for (const type of taken)
    if (!declared.includes(type) && !internal.includes(type))
      faults.push(`L8 event '${type}' is neither a declared command of a ${definition.kind} nor internal`);
  for (const type of internal) if (declared.includes(type)) faults.push(`L8 '${type}' is internal and declared at once`);
  for (const type of [...declared, ...internal]) if (!taken.has(type) && type !== definition.creates) faults.push(`L8 command '${type}' is taken in no state`);
  if (!declared.includes(definition.creates) && !internal.includes(definition.creates))
    faults.push(`L8 '${definition.creates}', which creates a ${definition.kind}, is no command`);
}

/** A fresh actor from `body`, saved: L9. */
function lintContext(definition: ActorDefinition, body: JsonObject, faults: string[]): void {
  const core = coreOf(definition);
  const actor = { tenant: "lint", kind: definition.kind, id: "lint" };
  const { state } = core.apply(
    undefined,
    actor,
    { t: "init", type: definition.creates, body, channel: "control" },
    { seq: 1, at_ms: 1, epoch: 1, worker: "lint" },
  );
  const fault = notJson(state.snapshot.context);
  if (fault !== undefined) faults.push(`L9 ${fault}`);
}

/**
 * The faults of a definition, each with its rule; none for a good one.
 * `sample` is the body of a command that creates such an actor.
 */
export function lint(definition: ActorDefinition, sample: JsonObject = {}): string[] {
  const faults: string[] = [];
  const { machine } = definition;
  if (machine.version === undefined) faults.push("L10 the machine has no version");
  if (machine.id !== definition.kind) faults.push(`L10 the machine of a ${definition.kind} has the id '${machine.id}'`);
  for (const node of nodesOf(machine.root)) {
    lintActions(definition, `${node.id} entry`, node.entry, faults);
    lintActions(definition, `${node.id} exit`, node.exit, faults);
    for (const transition of [...[...node.transitions.values()].flat(), ...(node.always ?? [])])
      lintActions(definition, `${node.id} on ${transition.eventType}`, transition.actions, faults);
    lintInvokes(node, faults);
    lintDelays(definition, node, faults);
  }
  lintEffects(definition, faults);
  lintEvents(definition, faults);
  if (faults.length === 0) lintContext(definition, sample, faults);
  return faults;
}
