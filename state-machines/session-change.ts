// session-change: what one transition of a session changes, tells, begins, ends and sends, as a value. The pure parts of a session answer such
// values; the machine performs them.
import type { Change as ChangeOf, Emitted } from "./definition.ts";
import { type Send, toldOfEnds } from "./dependency.ts";
import type { SessionContext } from "./session-context.ts";
import type { ToolInput } from "./session-effects.ts";

export interface Change extends ChangeOf<SessionContext> {
  /** Tool calls that begin. */
  readonly start?: readonly ToolInput[];
  /** Ids of effects that end. */
  readonly stop?: readonly string[];
  readonly send?: readonly Send[];
}

/** One change after another. */
export function after(context: SessionContext, first: Change, next: (context: SessionContext) => Change): Change {
  const second = next({ ...context, ...first.context });
  return {
    context: { ...first.context, ...second.context },
    tell: [...(first.tell ?? []), ...(second.tell ?? [])],
    start: [...(first.start ?? []), ...(second.start ?? [])],
    stop: [...(first.stop ?? []), ...(second.stop ?? [])],
    send: [...(first.send ?? []), ...(second.send ?? [])],
  };
}

/** What enqueueActions offers, as far as it is used here. */
interface Enqueue {
  assign(patch: Partial<SessionContext>): void;
  emit(emitted: Emitted): void;
  spawnChild(src: "call_tool", options: { id: string; input: ToolInput }): void;
  stopChild(id: string): void;
}

/** A change as XState's actions. XState's own type of `enqueue` depends on the machine that is not made yet; hence the cast. */
export function perform({ context, enqueue }: { context: SessionContext; enqueue: unknown }, change: Change): void {
  const actions = enqueue as Enqueue;
  // Whoever comes after a turn hears of its end in the commit that ends it.
  const told = context.askers === undefined ? undefined : toldOfEnds(context.askers, change.tell ?? []);
  if (change.context !== undefined) actions.assign(change.context);
  for (const id of change.stop ?? []) actions.stopChild(id);
  for (const event of change.tell ?? []) actions.emit({ type: "tell", event });
  for (const input of change.start ?? []) actions.spawnChild("call_tool", { id: `tool.${input.index}`, input });
  if (told !== undefined) actions.assign({ askers: told.askers });
  for (const message of [...(change.send ?? []), ...(told?.send ?? [])]) actions.emit({ type: "send", ...message });
  if (change.answer !== undefined) actions.emit({ type: "answer", result: change.answer });
}
