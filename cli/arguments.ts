// arguments: what people type, read to values. What does not fit is wrong usage (exit code 2), said before anything is connected.
import { InvalidArgumentError } from "commander";
import type { ActorFilter } from "../actors/verify.ts";
import { ACTOR_KINDS, type ActorAddress, isActorKind, isId, parseActorPath } from "../protocol/ids.ts";
import { parseParent, type SessionParent } from "../protocol/session-parent.ts";

const ID_WORDS = "1 to 64 of A-Z a-z 0-9 _ -";

export function idArgument(text: string): string {
  if (!isId(text)) throw new InvalidArgumentError(`An id is ${ID_WORDS}.`);
  return text;
}

/** `TENANT/KIND/ID` */
export function actorArgument(text: string): ActorAddress {
  const actor = parseActorPath(text);
  if (actor === undefined) throw new InvalidArgumentError(`An actor is TENANT/KIND/ID, the kind one of ${ACTOR_KINDS.join(", ")}, each id ${ID_WORDS}.`);
  return actor;
}

/** `TENANT/session/ID` */
export function sessionArgument(text: string): ActorAddress {
  const actor = actorArgument(text);
  if (actor.kind !== "session") throw new InvalidArgumentError(`It must be a session: TENANT/session/ID.`);
  return actor;
}

/** `TENANT`, `TENANT/KIND` or `TENANT/KIND/ID` */
export function filterArgument(text: string): ActorFilter {
  const [tenant, kind, id, ...rest] = text.split("/");
  if (rest.length > 0 || !isId(tenant) || (kind !== undefined && !isActorKind(kind)) || (id !== undefined && !isId(id)))
    throw new InvalidArgumentError(`It is TENANT, TENANT/KIND or TENANT/KIND/ID, the kind one of ${ACTOR_KINDS.join(", ")}.`);
  return { tenant, kind, id };
}

/** `SESSION/MESSAGE`, given again for more. */
export function parentArgument(text: string, before: readonly SessionParent[] | undefined): readonly SessionParent[] {
  const parent = parseParent(text);
  if (parent === undefined) throw new InvalidArgumentError(`It is SESSION/MESSAGE as s1/m3, the message as \`message_id\` of its answer has it.`);
  return [...(before ?? []), parent];
}

/** RFC 3339. */
export function instantArgument(text: string): string {
  if (!/^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d{1,9})?)?(Z|[+-]\d{2}:\d{2})$/i.test(text) || Number.isNaN(Date.parse(text)))
    throw new InvalidArgumentError("It is a time as 2026-11-21T08:00:00Z.");
  return text;
}

/** A whole number between two, both included. */
export function wholeNumber(min: number, max = Number.MAX_SAFE_INTEGER): (text: string) => number {
  const range = max === Number.MAX_SAFE_INTEGER ? `from ${min} on` : `from ${min} to ${max}`;
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < min || value > max) throw new InvalidArgumentError(`It is a whole number ${range}.`);
    return value;
  };
}

/** Options that may be given again: each value is kept. */
export function collected(value: string, before: readonly string[] | undefined): readonly string[] {
  return [...(before ?? []), value];
}
