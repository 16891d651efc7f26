// dependency: a message that comes after others: its turn begins when the turns it names have ended well, and is skipped by name when one did not.
//
//   message.send {after} ──▶ queued ──its turn is next──▶ awaiting_dependency: looking ──all completed──▶ the turn begins
//                                                            ▲        │  ├─one failed, was cancelled, is gone──▶ turn.failed dependency_failed
//                                         told, or a while ──┘        └──one is open──▶ asked to tell ──▶ waiting
//
// What became of a turn is read from its own session's journal, and from nowhere else (actors/turn-finder.ts). Messages between sessions only say when to
// look: the child asks to be told (`dependency.ask`), the parent tells (`dependency.told`) in the commit that ends the turn, or at once. So one that comes
// twice or late changes nothing, and one that never comes (a parent that was finished before it was asked takes no question) costs time alone.
//
// It leaves to others: refusing what names nothing (actors/admission.ts); there, a message can name only messages that were accepted before it.
//
// Invariants:
//   DP1. No turn begins before every turn its message comes after has completed.
//   DP2. A turn that cannot begin any more has one end like any other, and it names the parent.
//   DP3. Nobody waits for ever on anybody: a message comes after messages accepted before it, and stands in line behind such alone. Of any that wait, the
//        one that was accepted first waits for nothing that waits. (An interrupting message goes before others, so it may name none.)
//   DP4. Everything kept has a bound: AFTER_MAX parents of a message, ASKERS_MAX who asked.
import type { ActorEvent } from "../protocol/journal.ts";
import { type SessionParent, parentName } from "../protocol/session-parent.ts";

/** Sessions that a session will tell of the ends of its turns. Who asks beyond that looks again by itself. */
export const ASKERS_MAX = 1_000;
/** When it is looked again without having been told; the last one repeats. What is told comes within milliseconds: this is for what is not. */
export const LOOK_AGAIN_MS = [2_000, 10_000, 60_000, 600_000] as const;

/** What became of a parent's turn. `gone`: there is no such session, or no such message in it. */
export type ParentEnd = "open" | "completed" | "failed" | "cancelled" | "gone";
export interface ParentFound extends SessionParent {
  readonly end: ParentEnd;
}

export interface LookInput {
  readonly parents: readonly SessionParent[];
}
export interface LookOutput {
  /** Whose look it was: `tenant/session/id`. */
  readonly me: string;
  readonly parents: readonly ParentFound[];
}

/** Of the message whose turn is next. */
export interface Waiting {
  readonly turn: number;
  readonly looks: number;
  /** Who was asked to tell, by name. */
  readonly asked: readonly string[];
  /** Those that were open at the last look. */
  readonly open: readonly SessionParent[];
}

/** Turn → who wants to hear of its end. */
export type Askers = Readonly<Record<string, readonly Asker[]>>;
export interface Asker {
  readonly from: string;
  readonly session: string;
  readonly message: string;
}

export interface Send {
  readonly to: string;
  readonly command: string;
  readonly body: { readonly [key: string]: string };
}

export const noWait = (turn: number): Waiting => ({ turn, looks: 0, asked: [], open: [] });

export const lookAgainMs = (waiting: Waiting | null | undefined): number =>
  LOOK_AGAIN_MS[Math.min(waiting?.looks ?? 0, LOOK_AGAIN_MS.length) - 1] ?? LOOK_AGAIN_MS[0];

/** The first parent that did not end well. */
export const failedParent = ({ parents }: LookOutput): ParentFound | undefined => parents.find(({ end }) => end !== "open" && end !== "completed");
export const allCompleted = ({ parents }: LookOutput): boolean => parents.every(({ end }) => end === "completed");

/** A look that found some open: each of them is asked once to tell. */
export function looked(before: Waiting, { me, parents }: LookOutput): { readonly waiting: Waiting; readonly send: readonly Send[] } {
  const open = parents.filter(({ end }) => end === "open").map(({ session, message }) => ({ session, message }));
  const [tenant = "", , own = ""] = me.split("/");
  const unasked = open.filter((parent) => parent.session !== own && !before.asked.includes(parentName(parent)));
  return {
    waiting: { ...before, looks: before.looks + 1, open, asked: [...before.asked, ...unasked.map(parentName)] },
    send: unasked.map(({ session, message }) => ({ to: `${tenant}/session/${session}`, command: "dependency.ask", body: { session, message, from: me } })),
  };
}

const tell = ({ from, session, message }: Asker): Send => ({ to: from, command: "dependency.told", body: { session, message } });

/** Somebody asks to be told when a turn ends; undefined: it has ended, or never was here. */
export function asked(askers: Askers, turn: number | undefined, asker: Asker): { readonly askers: Askers; readonly send: readonly Send[] } {
  const count = Object.values(askers).reduce((sum, all) => sum + all.length, 0);
  const known = turn === undefined ? [] : (askers[turn] ?? []);
  if (known.some(({ from, message }) => from === asker.from && message === asker.message)) return { askers, send: [] };
  if (turn === undefined || count >= ASKERS_MAX) return { askers, send: [tell(asker)] };
  return { askers: { ...askers, [turn]: [...known, asker] }, send: [] };
}

const TURN_ENDS: ReadonlySet<string> = new Set(["turn.completed", "turn.failed", "turn.cancelled"]);

/** Who hears of the turns that end with these events. */
export function toldOfEnds(askers: Askers, events: readonly ActorEvent[]): { readonly askers: Askers; readonly send: readonly Send[] } | undefined {
  const ended = events.filter(({ type }) => TURN_ENDS.has(type)).map((event) => String(event["turn"]));
  const heard = ended.flatMap((turn) => askers[turn] ?? []);
  if (heard.length === 0) return undefined;
  return { askers: Object.fromEntries(Object.entries(askers).filter(([turn]) => !ended.includes(turn))), send: heard.map(tell) };
}

/** In words for people. */
export function waitsForParents({ open }: Waiting): string {
  const [first] = open;
  const others = open.length > 1 ? ` and ${open.length - 1} more` : "";
  return first === undefined
    ? "waits for dependency: it could not be looked, and will be again"
    : `waits for dependency: message ${first.message} of session ${first.session}${others}`;
}
