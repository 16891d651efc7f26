// event-stream: EVENTS in memory, as far as a projector uses the bus: follow, bounds, on_state. And journals to put on it, written by
// the machines of the product itself, so that what is projected here is what workers write.
import { setTimeout as sleep } from "node:timers/promises";
import type { Bus, ConnectionState, StoredMessage } from "../../bus/port.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { encodeJournal, type Entry, type JournalMessage } from "../../protocol/journal.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { timestamp, type World } from "../../protocol/world.ts";
import { realWorld as createRealWorld } from "../../roles/real-world.ts";
import { sessionDefinition } from "../../state-machines/session.ts";
import { type ActorState, type Core, coreOf, outerState } from "../../state-machines/step.ts";

export const realWorld: World = createRealWorld();

/** mulberry32: a small seeded generator. */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

export interface EventStream {
  readonly bus: Pick<Bus, "follow" | "bounds" | "on_state">;
  readonly messages: StoredMessage[];
  append(subject: string, data: Uint8Array): number;
  /** Another stream under the same name. */
  recreate(): void;
  /** Forgets everything before this sequence. */
  cut(first_sequence: number): void;
  set(state: ConnectionState): void;
}

export function createEventStream(first_incarnation = "2026-11-21T05:00:00.000Z"): EventStream {
  let incarnation = first_incarnation;
  let first = 1;
  let generation = 0;
  const messages: StoredMessage[] = [];
  const wakes = new Set<() => void>();
  const listeners = new Set<(state: ConnectionState) => void>();
  let away = false;
  const last = (): number => messages.at(-1)?.sequence ?? 0;
  const bus: EventStream["bus"] = {
    async follow(_stream, _filter, from_sequence, on_message) {
      if (away) throw new Error("the broker is away");
      let stopped = false;
      let next = from_sequence;
      let mine = generation;
      let wake = (): void => {};
      const nudge = (): void => wake();
      wakes.add(nudge);
      const run = async (): Promise<void> => {
        while (!stopped) {
          if (mine !== generation) {
            mine = generation;
            next = 1;
          }
          const message = away ? undefined : messages.find((one) => one.sequence >= next);
          if (message === undefined) {
            await new Promise<void>((resolve) => (wake = resolve));
            continue;
          }
          next = message.sequence + 1;
          await on_message(message);
        }
      };
      void run();
      return {
        async stop() {
          stopped = true;
          wakes.delete(nudge);
          nudge();
        },
      };
    },
    async bounds() {
      if (away) throw new Error("the broker is away");
      return { first_sequence: first, last_sequence: last(), incarnation, messages: messages.length, bytes: 0 };
    },
    on_state(listener) {
      listeners.add(listener);
      return {
        async stop() {
          listeners.delete(listener);
        },
      };
    },
  };
  const nudgeAll = (): void => wakes.forEach((nudge) => nudge());
  return {
    bus,
    messages,
    append(subject, data) {
      const sequence = Math.max(last(), first - 1) + 1;
      messages.push({ stream: "EVENTS", subject, sequence, headers: {}, data, stored_at_ms: Date.now() });
      nudgeAll();
      return sequence;
    },
    recreate() {
      messages.length = 0;
      first = 1;
      generation += 1;
      incarnation = timestamp(Date.parse(incarnation) + 3_600_000);
    },
    cut(first_sequence) {
      messages.splice(
        0,
        messages.findIndex((message) => message.sequence >= first_sequence),
      );
      first = first_sequence;
    },
    set(state) {
      away = state === "disconnected";
      for (const listener of listeners) listener(state);
      nudgeAll();
    },
  };
}

export const sessionCore: Core = coreOf(sessionDefinition);
const EPOCH_MS = Date.parse("2026-11-21T05:00:00.000Z");

/** What an attempt of a model call came to, read off the ledger of effects: the truth that usage rows are held against. */
export interface Attempt {
  readonly session: string;
  readonly inst: string;
  readonly attempt: number;
  readonly outcome: "completed" | "failed" | "cancelled" | "superseded";
}

export interface Journal {
  readonly actor: ActorAddress;
  state(): ActorState | undefined;
  readonly attempts: Attempt[];
  /** One commit. Answers its stream sequence. */
  commit(...entries: Entry[]): number;
  /** The inst of an effect in flight. */
  inst(id: string): string | undefined;
}

/** Writes the journal of one actor onto the stream, through the actor's own machine. */
export function journalOf(stream: EventStream, actor: ActorAddress, core: Core = sessionCore, clock: { ms: number } = { ms: EPOCH_MS }): Journal {
  let state: ActorState | undefined;
  let epoch = 1;
  const attempts: Attempt[] = [];
  const settle = (before: ActorState | undefined, after: ActorState, entry: Entry): void => {
    const was = before?.running["model"];
    const is = after.running["model"];
    if (was === undefined) return;
    const known = { session: actor.id, inst: was.inst, attempt: was.attempt };
    if (is?.inst === was.inst) {
      if (is.attempt > was.attempt) attempts.push({ ...known, outcome: "superseded" });
    } else if (entry.t === "done" && entry.inst === was.inst) attempts.push({ ...known, outcome: "completed" });
    else if ((entry.t === "fail" && entry.inst === was.inst && entry.error.code !== "cancelled") || entry.t === "timer")
      attempts.push({ ...known, outcome: "failed" });
    else attempts.push({ ...known, outcome: "cancelled" });
  };
  return {
    actor,
    attempts,
    state: () => state,
    inst: (id) => state?.running[id]?.inst,
    commit(...entries) {
      clock.ms += 10;
      if (entries.some((entry) => entry.t === "claim")) epoch += 1;
      const events: JournalMessage["events"][number][] = [];
      const out: JournalMessage["out"][number][] = [];
      for (const entry of entries) {
        const before = state;
        const step = core.apply(before, actor, entry, { seq: (before?.seq ?? 0) + 1, at_ms: clock.ms, epoch, worker: `w${epoch}` });
        settle(before, step.state, entry);
        events.push(...step.events);
        out.push(...step.out);
        state = step.state;
      }
      const now = state as ActorState;
      const message: JournalMessage = {
        v: 1,
        actor,
        seq: now.seq,
        epoch,
        worker: `w${epoch}`,
        machine: core.machine_name,
        at: timestamp(clock.ms),
        entries,
        state: outerState(now.snapshot),
        events,
        out,
        out_confirmed_seq: 0,
      };
      return stream.append(actorSubject(actor, "event"), encodeJournal(message));
    },
  };
}

export const init = (body: JsonObject): Entry => ({ t: "init", channel: "command", type: "session.create", body });
export const command = (type: string, body: JsonObject = {}): Entry => ({ t: "command", channel: "command", type, body });
export const configured = (inst: string): Entry => ({
  t: "done",
  inst,
  output: { config: { model: "simulated/echo", mode: "multi", tools: [], instructions: "" }, hash: "c".repeat(64), agent_version: 3 },
});
export const answered = (inst: string, text: string, input_tokens = 7, output_tokens = 5): Entry => ({
  t: "done",
  inst,
  output: {
    text,
    tool_calls: [],
    stop: "end",
    usage: { input_tokens, output_tokens, cache_read_tokens: 1, cache_write_tokens: 2, reasoning_tokens: 3 },
    cost_usd_micros: input_tokens + 10 * output_tokens,
    price_version: "p1",
    model: "simulated/echo",
  },
});
export const failed = (inst: string, code = "provider_error"): Entry => ({ t: "fail", inst, error: { code, message: "the provider broke" } });
export const claimed = (lost: readonly string[]): Entry => ({ t: "claim", from: "w1", reason: "dead", lost });

/** A session that has its configuration and waits. */
export function readySession(stream: EventStream, tenant: string, id: string, body: JsonObject = {}, clock?: { ms: number }): Journal {
  const journal = journalOf(stream, { tenant, kind: "session", id }, sessionCore, clock);
  journal.commit(init({ agent: "assistant", ...body }));
  journal.commit(configured(journal.inst("configuration") ?? ""));
  return journal;
}

/** The secret of every message here: it must be in no row. */
export const CUSTOMER_TEXT = "SENTINEL-CUSTOMER-TEXT";

/** One random thing that can happen to a session now; several of them folded into one commit at times. */
export function live(journal: Journal, random: () => number): void {
  const pick = <T>(...choices: T[]): T => choices[Math.floor(random() * choices.length)] as T;
  const state = journal.state();
  if (state === undefined || state.snapshot.status !== "active") return;
  const outer = outerState(state.snapshot);
  const model = journal.inst("model");
  const send = command("message.send", { content: `${CUSTOMER_TEXT} ${random()}` });
  const interrupt = command("message.send", { content: CUSTOMER_TEXT, on_busy: "interrupt" });
  if (outer === "thinking" && model !== undefined) {
    const answer = answered(model, `${CUSTOMER_TEXT} ${"a long answer ".repeat(5)}`, Math.floor(random() * 100), Math.floor(random() * 100));
    const happening = pick<Entry[]>(
      [answer],
      [answer],
      [send, answer],
      [answer, send],
      [failed(model)],
      [command("turn.cancel")],
      [send, command("turn.cancel")],
      [send, command("turn.cancel"), command("turn.cancel")],
      [claimed([model])],
      [interrupt],
      [interrupt, interrupt],
      [command("session.pause")],
      [send],
    );
    // A command that would not be taken in the state that those before it lead to is refused by the host; here it is left out.
    const taken: Entry[] = [];
    let probe = state;
    for (const entry of happening) {
      if (entry.t === "command" && sessionCore.refusal(probe, entry.type, entry.body, "command") !== undefined) continue;
      probe = sessionCore.apply(probe, journal.actor, entry, {
        seq: probe.seq + 1,
        at_ms: probe.at_ms,
        epoch: probe.epoch + (entry.t === "claim" ? 1 : 0),
        worker: "probe",
      }).state;
      taken.push(entry);
    }
    journal.commit(...taken);
  } else if (outer === "idle") journal.commit(...pick([send], [send, send], [send]));
  else if (outer === "paused" || outer === "hibernated") journal.commit(command("session.resume"));
  else if (outer === "initializing") journal.commit(configured(journal.inst("configuration") ?? ""));
}

/** A stream of many sessions' lives, the same for the same seed. */
export function livedStream(seed: number, sessions: number, happenings: number): { stream: EventStream; journals: Journal[] } {
  const random = seeded(seed);
  const stream = createEventStream();
  const clock = { ms: EPOCH_MS };
  const journals = Array.from({ length: sessions }, (_, index) =>
    journalOf(stream, { tenant: `t${index % 3}`, kind: "session", id: `s${index}` }, sessionCore, clock),
  );
  for (const [index, journal] of journals.entries()) journal.commit(init({ agent: `agent${index % 2}`, user: `u${index % 4}` }));
  for (let count = 0; count < happenings; count += 1) live(journals[Math.floor(random() * sessions)] as Journal, random);
  return { stream, journals };
}

export async function eventually(condition: () => Promise<boolean> | boolean, patience_ms = 60_000): Promise<boolean> {
  const deadline = performance.now() + patience_ms;
  while (performance.now() < deadline) {
    if (await condition()) return true;
    await sleep(5);
  }
  return false;
}
