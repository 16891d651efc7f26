// session-parent: a message of a session of the same tenant, as another message names it that comes after it: `{"session": "s1", "message": "m3"}`, and
// `s1/m3` in one word.
import { isId } from "./ids.ts";

export interface SessionParent {
  readonly session: string;
  readonly message: string;
}

/** A message comes after so many others at most. Each is looked for in its session's journal. */
export const AFTER_MAX = 16;
/** `m{seq}`: the entry by which the message was accepted. */
export const MESSAGE_ID_PATTERN = /^m[1-9]\d{0,14}$/;

export const parentName = ({ session, message }: SessionParent): string => `${session}/${message}`;

export function parseParent(text: string): SessionParent | undefined {
  const [session, message, ...rest] = text.split("/");
  return rest.length === 0 && isId(session) && message !== undefined && MESSAGE_ID_PATTERN.test(message) ? { session, message } : undefined;
}

/** The seq of the entry by which it was accepted. */
export const seqOfMessage = (message: string): number => Number(message.slice(1));
