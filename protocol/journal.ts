// journal: one JetStream message per commit on `….event`; the wire form of it, and how it is read back.
//
// `entries` are what went in. Replaying them through the machine of that version gives `state`, `events` and `out`
// again (A5). Text is stored once: where an event bears the text that the output of a `done` entry also bears, the entry
// has `refs: {"text": "#/events/0/content"}` instead of the field, and decodeJournal puts the text back.
//
// Invariants of one journal (checked by journal/verify and by every restore):
//   J1. seq counts entries without gaps; a message's seq is that of its last entry.
//   J2. epoch never falls; at never falls.
//   J3. the actor in the message is the actor of the subject.
import { assert } from "./assert.ts";
import type { ErrorBody } from "./errors.ts";
import { type ActorAddress, actorPath } from "./ids.ts";
import type { Json, JsonObject } from "./json.ts";
import type { CommandChannel } from "./subjects.ts";

/** Where a command stood: the stream, the stream's incarnation (its creation time), and the sequence in it. */
export interface CommandSource {
  readonly stream: string;
  readonly incarnation: string;
  readonly seq: number;
}

/** What identifies a command: its key, kept apart per channel, else its source. */
interface CommandIdentity {
  readonly channel: CommandChannel;
  readonly key?: string;
  readonly source?: CommandSource;
  readonly trace?: string;
  /** Who said it (protocol/principal.ts); absent for the runtime itself, and in journals from before it was noted. No machine sees it. */
  readonly principal?: string;
}

export interface EffectError {
  /** A stable code: ours, or the kind of failure (`provider_error`, `timeout`, `ambiguous`, `tool_failed`, …). */
  readonly code: string;
  readonly message: string;
  readonly details?: JsonObject;
}

/** An entry that ends effects from outside. */
interface Stopping {
  /** inst → what that effect had come to when it was stopped; absent where nobody ran it here, or it had nothing to say. */
  readonly stopped?: Readonly<Record<string, JsonObject>>;
}

export type Entry =
  | ({ readonly t: "init"; readonly type: string; readonly body: JsonObject } & CommandIdentity)
  | ({ readonly t: "command"; readonly type: string; readonly body: JsonObject } & CommandIdentity & Stopping)
  | ({ readonly t: "refused"; readonly type: string; readonly hash: string; readonly error: ErrorBody } & CommandIdentity)
  | { readonly t: "done"; readonly inst: string; readonly output: Json }
  | { readonly t: "fail"; readonly inst: string; readonly error: EffectError }
  | ({ readonly t: "timer"; readonly inst: string } & Stopping)
  /** An effect that is still going on says how far it has come: what a take-over would otherwise not know. */
  | { readonly t: "progress"; readonly inst: string; readonly told: JsonObject }
  /** A new owner took the actor over while effects were in flight; `lost` are the insts whose attempt may have begun elsewhere. */
  | {
      readonly t: "claim";
      readonly from: string | null;
      readonly reason: string;
      readonly lost: readonly string[];
      /** inst → what its lost attempt may have cost, in micro-dollars: the provider may have billed it. */
      readonly assumed?: Readonly<Record<string, number>>;
    }
  | { readonly t: "upgrade"; readonly to: string };

/** What the world may care about. The types are those of WIRE §3. */
export interface ActorEvent {
  readonly type: string;
  readonly [key: string]: Json;
}

/** A message to another actor, published after the commit that holds it. */
export interface OutMessage {
  /** `{seq}.{index}` under the sending actor; receivers keep one rising mark per sender. */
  readonly id: string;
  /** `tenant/kind/id` */
  readonly to: string;
  readonly type: string;
  readonly body: JsonObject;
}

export interface JournalMessage {
  readonly v: 1;
  readonly actor: ActorAddress;
  readonly seq: number;
  readonly epoch: number;
  readonly worker: string;
  /** `{machine}@{version}` */
  readonly machine: string;
  readonly at: string;
  readonly entries: readonly Entry[];
  readonly state: string;
  readonly events: readonly ActorEvent[];
  readonly out: readonly OutMessage[];
  /** Every `out` of entries up to this seq is known to be published. */
  readonly out_confirmed_seq: number;
  /** Effects decided here that this owner will not start, because the actor is about to move: no attempt of theirs has begun. */
  readonly held?: readonly string[];
}

/** seq of the first entry in a message. */
export function firstSeq(message: JournalMessage): number {
  return message.seq - message.entries.length + 1;
}

/** The seq of entry `index` of a message. */
export function entrySeq(message: JournalMessage, index: number): number {
  return firstSeq(message) + index;
}

/** Texts shorter than a pointer to them are not worth pointing at. */
const SHARED_TEXT_MIN = 48;

function textsOf(events: readonly ActorEvent[]): Map<string, string> {
  const found = new Map<string, string>();
  events.forEach((event, index) => {
    for (const [key, value] of Object.entries(event))
      if (typeof value === "string" && value.length >= SHARED_TEXT_MIN && !found.has(value)) found.set(value, `#/events/${index}/${key}`);
  });
  return found;
}

/** A `done` entry as it rests: fields of its output whose text stands in an event are named in `refs` instead. */
type RestingEntry = Entry & { readonly refs?: Readonly<Record<string, string>> };

function shareTexts(entry: Entry, texts: ReadonlyMap<string, string>): RestingEntry {
  if (entry.t !== "done" || entry.output === null || typeof entry.output !== "object" || Array.isArray(entry.output)) return entry;
  const output: Record<string, Json> = {};
  const refs: Record<string, string> = {};
  for (const [key, value] of Object.entries(entry.output as JsonObject)) {
    const ref = typeof value === "string" ? texts.get(value) : undefined;
    if (ref === undefined) output[key] = value;
    else refs[key] = ref;
  }
  return Object.keys(refs).length === 0 ? entry : { ...entry, output, refs };
}

/** The bytes that rest in EVENTS. */
export function encodeJournal(message: JournalMessage): Uint8Array {
  const texts = textsOf(message.events);
  const entries = texts.size === 0 ? message.entries : message.entries.map((entry) => shareTexts(entry, texts));
  return JOURNAL_BYTES.encode(JSON.stringify({ ...message, entries }));
}

function restoreTexts(entry: RestingEntry, events: readonly ActorEvent[]): Entry {
  if (entry.t !== "done" || entry.refs === undefined) return entry;
  const { refs, ...resting } = entry;
  const output: Record<string, Json> = { ...(resting.output as JsonObject) };
  for (const [field, ref] of Object.entries(refs)) {
    const [, index, key] = /^#\/events\/(\d+)\/(\w+)$/.exec(ref) ?? [];
    const text = events[Number(index)]?.[key ?? ""];
    assert(typeof text === "string", "a shared text stands in the event it points to");
    output[field] = text;
  }
  return { ...resting, output };
}

const JOURNAL_TEXT = new TextDecoder();
const JOURNAL_BYTES = new TextEncoder();

/**
 * Reads a journal message back.
 * Asserts J3 against the subject's actor, and the version: these bytes are ours, so what does not fit is a broken promise.
 */
export function decodeJournal(data: Uint8Array, actor?: ActorAddress): JournalMessage {
  const message = JSON.parse(JOURNAL_TEXT.decode(data)) as JournalMessage;
  assert(message.v === 1, "a journal message is of version 1");
  if (actor) assert(actorPath(message.actor) === actorPath(actor), "A4: a journal message keeps the actor of its subject");
  if (!message.entries.some((entry) => "refs" in entry)) return message;
  return { ...message, entries: message.entries.map((entry) => restoreTexts(entry, message.events)) };
}
