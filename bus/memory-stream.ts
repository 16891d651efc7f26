// memory-stream: one stream of the in-memory broker: messages by sequence, the fence, limits, schedules, expiry, republishing. It
// decides and stores; who hears of it is told through hooks. Nothing in it waits.
//
// Invariants:
//   M1. Sequences rise by one with every message stored and are never used again, whatever is removed.
//   M2. What is stored is a copy: the writer cannot change it afterwards.
import { shardOf } from "../protocol/subjects.ts";
import type { ActorKind } from "../protocol/ids.ts";
import { timestamp, type World } from "../protocol/world.ts";
import { headerOf, type Headers, type StoredMessage, type StreamName } from "./port.ts";
import { HEADER_MARKER } from "./bucket-told.ts";
import { covers, isLiteral, type StreamDeclaration } from "./streams.ts";

export type StoreOutcome =
  | { readonly kind: "stored"; readonly sequence: number }
  | { readonly kind: "conflict"; readonly last_sequence: number }
  | { readonly kind: "overloaded" }
  | { readonly kind: "too_large" };

export interface StreamHooks {
  /** A message was stored. */
  on_stored(message: StoredMessage): void;
  /** What a republishing stream says to core subscribers. */
  on_republish(subject: string, headers: Headers, data: Uint8Array): void;
}

export const HEADER_SCHEDULE = "Nats-Schedule";
export const HEADER_SCHEDULE_TARGET = "Nats-Schedule-Target";
/** What a header costs beside its name and value, as the broker counts it. */
const HEADER_FRAME_BYTES = 4;
const HEADERS_FRAME_BYTES = 12;
const RECORD_FRAME_BYTES = 30;

export class MemoryStream {
  readonly declared: StreamDeclaration;
  readonly incarnation: string;
  #world: World;
  #hooks: StreamHooks;
  #messages = new Map<number, StoredMessage>();
  #by_subject = new Map<string, number[]>();
  #last_sequence = 0;
  #bytes = 0;

  constructor(declared: StreamDeclaration, world: World, hooks: StreamHooks) {
    this.declared = declared;
    this.#world = world;
    this.#hooks = hooks;
    this.incarnation = timestamp(world.now_ms());
  }

  get last_sequence(): number {
    return this.#last_sequence;
  }
  /** The first that is still there; one after the last when there is none. */
  get first_sequence(): number {
    for (const sequence of this.#messages.keys()) return sequence;
    return this.#last_sequence + 1;
  }
  get messages(): number {
    return this.#messages.size;
  }
  get bytes(): number {
    return this.#bytes;
  }

  store(published: string, data: Uint8Array, headers: Headers, expected_last_sequence: number | undefined): StoreOutcome {
    const { declared } = this;
    const size = sizeOf(data, headers);
    if (declared.message_bytes_max !== undefined && size > declared.message_bytes_max) return { kind: "too_large" };
    this.#dropOld();
    const subject = this.subjectOf(published);
    const last_sequence = this.last(subject)?.sequence ?? 0;
    if (expected_last_sequence !== undefined && expected_last_sequence !== last_sequence) return { kind: "conflict", last_sequence };
    const resting = restingBytes(subject, size);
    if (declared.bytes_max !== undefined && this.#bytes + resting > declared.bytes_max) {
      if (declared.when_full === "refuse_new") return { kind: "overloaded" };
      while (this.#messages.size > 0 && this.#bytes + resting > declared.bytes_max) this.remove(this.first_sequence);
    }
    this.#last_sequence += 1;
    const message: StoredMessage = {
      stream: declared.name as StreamName,
      subject,
      sequence: this.#last_sequence,
      headers: { ...headers },
      data: data.slice(),
      stored_at_ms: this.#world.now_ms(),
    };
    this.#put(message, resting);
    const schedule = declared.schedules ? headerOf(headers, HEADER_SCHEDULE) : undefined;
    const kept_max = schedule === undefined ? declared.messages_per_subject_max : 1;
    if (kept_max !== undefined) for (const old of (this.#by_subject.get(subject) as number[]).slice(0, -kept_max)) this.remove(old);
    if (schedule !== undefined) this.#arm(message, schedule);
    if (declared.expiry_marker_ms !== undefined) this.#expire(message, declared.expiry_marker_ms);
    this.#republish(published, message, last_sequence);
    this.#hooks.on_stored(message);
    return { kind: "stored", sequence: message.sequence };
  }

  /** The subject as it is stored. */
  subjectOf(published: string): string {
    const { transform } = this.declared;
    return transform !== undefined && covers(transform.from, published) ? rewrite(transform.from, transform.to, published) : published;
  }

  /** The message with this sequence leaves, if it is there. */
  remove(sequence: number): boolean {
    const message = this.#messages.get(sequence);
    if (message === undefined) return false;
    this.#messages.delete(sequence);
    this.#bytes -= restingBytes(message.subject, sizeOf(message.data, message.headers));
    const sequences = this.#by_subject.get(message.subject) as number[];
    sequences.splice(sequences.indexOf(sequence), 1);
    if (sequences.length === 0) this.#by_subject.delete(message.subject);
    return true;
  }

  get(sequence: number): StoredMessage | undefined {
    return this.#messages.get(sequence);
  }

  last(subject: string): StoredMessage | undefined {
    const sequence = this.#by_subject.get(subject)?.at(-1);
    return sequence === undefined ? undefined : this.#messages.get(sequence);
  }

  lastOfEach(filter: string): StoredMessage[] {
    this.#dropOld();
    const found: StoredMessage[] = [];
    for (const [subject, sequences] of this.#by_subject) {
      if (covers(filter, subject)) found.push(this.#messages.get(sequences.at(-1) as number) as StoredMessage);
    }
    return found.sort((a, b) => a.sequence - b.sequence);
  }

  countsOf(filter: string): { subject: string; messages: number }[] {
    this.#dropOld();
    return [...this.#by_subject].filter(([subject]) => covers(filter, subject)).map(([subject, { length }]) => ({ subject, messages: length }));
  }

  /** The first message under any of the filters at or after a sequence. */
  next(filters: readonly string[], from_sequence: number): StoredMessage | undefined {
    this.#dropOld();
    const [only] = filters;
    if (filters.length === 1 && only !== undefined && isLiteral(only)) {
      const sequence = this.#by_subject.get(only)?.find((candidate) => candidate >= from_sequence);
      return sequence === undefined ? undefined : this.#messages.get(sequence);
    }
    for (let sequence = Math.max(from_sequence, this.first_sequence); sequence <= this.#last_sequence; sequence += 1) {
      const message = this.#messages.get(sequence);
      if (message !== undefined && filters.some((filter) => covers(filter, message.subject))) return message;
    }
    return undefined;
  }

  #put(message: StoredMessage, resting_bytes: number): void {
    this.#messages.set(message.sequence, message);
    this.#bytes += resting_bytes;
    const sequences = this.#by_subject.get(message.subject);
    if (sequences === undefined) this.#by_subject.set(message.subject, [message.sequence]);
    else sequences.push(message.sequence);
  }

  /** Age, where no marker tells of it: looked at whenever somebody looks. */
  #dropOld(): void {
    const { age_max_ms, expiry_marker_ms } = this.declared;
    if (age_max_ms === undefined || expiry_marker_ms !== undefined) return;
    const oldest_ms = this.#world.now_ms() - age_max_ms;
    for (const message of this.#messages.values()) {
      if (message.stored_at_ms > oldest_ms) return;
      this.remove(message.sequence);
    }
  }

  /** A key's last message becomes a marker when its time is over, and the marker leaves later. */
  #expire(message: StoredMessage, marker_ms: number): void {
    const is_marker = headerOf(message.headers, HEADER_MARKER) !== undefined;
    const life_ms = is_marker ? marker_ms : (this.declared.age_max_ms as number);
    this.#world.after(life_ms, () => {
      if (!this.#messages.has(message.sequence)) return;
      this.remove(message.sequence);
      if (!is_marker) this.store(message.subject, new Uint8Array(0), { [HEADER_MARKER]: "MaxAge" }, undefined);
    });
  }

  #arm(message: StoredMessage, schedule: string): void {
    const at_ms = Date.parse(schedule.replace(/^@at /, ""));
    const target = headerOf(message.headers, HEADER_SCHEDULE_TARGET) ?? "";
    this.#world.after(Math.max(0, at_ms - this.#world.now_ms()), () => {
      // A schedule that was replaced or taken back is no longer there.
      if (!this.remove(message.sequence)) return;
      this.store(target, message.data, { "Nats-Scheduler": message.subject, "Nats-Schedule-Next": "purge" }, undefined);
    });
  }

  #republish(published: string, message: StoredMessage, previous_sequence: number): void {
    const { republish, name } = this.declared;
    if (republish === undefined || !covers(republish.from, published)) return;
    this.#hooks.on_republish(
      rewrite(republish.from, republish.to, published),
      {
        ...message.headers,
        "Nats-Stream": name,
        "Nats-Subject": message.subject,
        "Nats-Sequence": String(message.sequence),
        "Nats-Last-Sequence": String(previous_sequence),
        "Nats-Time-Stamp": timestamp(message.stored_at_ms),
      },
      message.data,
    );
  }
}

function sizeOf(data: Uint8Array, headers: Headers): number {
  let bytes = data.length;
  const entries = Object.entries(headers);
  for (const [name, value] of entries) bytes += name.length + value.length + HEADER_FRAME_BYTES;
  return entries.length === 0 ? bytes : bytes + HEADERS_FRAME_BYTES;
}

/** A message on disk has its subject and a record around it. */
function restingBytes(subject: string, bytes: number): number {
  return bytes + subject.length + RECORD_FRAME_BYTES;
}

/** Fills `{{wildcard(n)}}` and `{{partition(n,1,2,3)}}` from the tokens that the pattern's stars stand for. */
function rewrite(from: string, to: string, subject: string): string {
  const tokens = subject.split(".");
  const stars = from.split(".").flatMap((token, index) => (token === "*" ? [tokens[index] as string] : []));
  return to.replace(/\{\{(wildcard|partition)\((\d+)[^)]*\)\}\}/g, (_whole, what: string, number: string) => {
    if (what === "wildcard") return stars[Number(number) - 1] as string;
    const [tenant, kind, id] = stars as [string, ActorKind, string];
    return String(shardOf({ tenant, kind, id }, Number(number)));
  });
}
