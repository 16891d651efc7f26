// judge: what becomes of one item of an actor's mailbox, by the actor's state: an entry to append, or only an answer.
//
//   repeated ──▶ answered as the first time        may not, by the state or by who admits ──▶ an entry that refuses it
//   stale news ──▶ nothing                         may ──▶ an entry that takes it
//
// An actor journals refusals in a burst, and then one in a second: above that they are answered only.
import type { Command } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { Entry } from "../protocol/journal.ts";
import type { World } from "../protocol/world.ts";
import type { ActorView } from "../state-machines/definition.ts";
import { type ActorState, commandHash, type Core, outerState, recognise, type Outcome, viewOf } from "../state-machines/step.ts";
import type { MailItem } from "./mailbox.ts";

/** Refusals an actor journals in a burst, and then per second: enough for an audit, too few to fill a disk. */
const REFUSED_BURST = 20;
const REFUSED_PER_S = 1;

export type Verdict =
  | { readonly kind: "entry"; readonly entry: Entry }
  /** `journaled`: it is the answer of an entry before. */
  | { readonly kind: "answer"; readonly outcome: Outcome; readonly journaled: boolean }
  /** News that nobody waits for any more. */
  | { readonly kind: "stale" }
  /** Stored nowhere, and it cannot be judged now or comes too late: its sender is told nothing, and makes it durable. */
  | { readonly kind: "given_up" }
  /** A stored command that cannot be judged now, for the `tries`-th time in a row. */
  | { readonly kind: "unjudged"; readonly error: unknown; readonly tries: number };

export interface JudgeOptions {
  readonly actor: ActorAddress;
  readonly core: Core;
  readonly world: World;
  /** A command that the actor's own state cannot judge: is the tenant active, does the agent exist? Rejects when that cannot be known now. */
  admit(command: Command, view: ActorView | undefined): Promise<ErrorBody | undefined>;
}

export class Judge {
  readonly #options: JudgeOptions;
  /** How often in a row the first command could not be judged. */
  #unjudged = 0;
  #refused_tokens = REFUSED_BURST;
  #refused_at_ms: number;

  constructor(options: JudgeOptions) {
    this.#options = options;
    this.#refused_at_ms = options.world.monotonic_ms();
  }

  async judge(item: MailItem, state: ActorState | undefined): Promise<Verdict> {
    const { core, actor, admit } = this.#options;
    if (item.kind === "entry") {
      const wanted = state !== undefined && core.awaits(state, item.entry) && (item.entry.t !== "claim" || Object.keys(state.running).length > 0);
      return wanted ? { kind: "entry", entry: item.entry } : { kind: "stale" };
    }
    const no = (error: ErrorBody): Verdict => ({ kind: "answer", outcome: { ok: false, error }, journaled: false });
    if (item.kind === "refused") {
      if (state === undefined) return no(item.error);
      const hash = commandHash(item.type, { error: item.error.message });
      // The same message again: its refusal stands in the journal.
      if (recognise(state, { channel: item.channel, source: item.source, type: item.type, hash }).kind === "repeat")
        return { kind: "answer", outcome: { ok: false, error: item.error }, journaled: true };
      if (!this.#mayJournalRefusal()) return no(item.error);
      const { type, error, channel, source, principal } = item;
      const who = principal === undefined ? {} : { principal };
      return { kind: "entry", entry: { t: "refused", type, hash, error, channel, ...(source === undefined ? {} : { source }), ...who } };
    }
    const { command, source } = item;
    const identity = {
      channel: command.channel,
      ...(command.key === undefined ? {} : { key: command.key }),
      ...(source === undefined ? {} : { source }),
      ...(command.trace === undefined ? {} : { trace: command.trace }),
      ...(command.principal === undefined ? {} : { principal: command.principal }),
    };
    const hash = commandHash(command.type, command.body);
    if (state !== undefined) {
      const known = recognise(state, { ...identity, type: command.type, hash });
      if (known.kind === "conflict") return no(known.error);
      if (known.kind === "repeat")
        return {
          kind: "answer",
          outcome: known.outcome ?? { ok: true, seq: state.seq, state: outerState(state.snapshot), result: { repeated: true } },
          journaled: true,
        };
    }
    if (item.late?.() === true) return { kind: "given_up" };
    let refused = item.overloaded;
    try {
      refused ??= await admit(command, state === undefined ? undefined : viewOf(state));
    } catch (error) {
      // What came on the fast lane is stored nowhere: its sender makes it durable when he hears nothing, and it waits then.
      return source === undefined ? { kind: "given_up" } : { kind: "unjudged", error, tries: this.#unjudged++ };
    }
    this.#unjudged = 0;
    if (refused !== undefined && state !== undefined && this.#mayJournalRefusal())
      return { kind: "entry", entry: { t: "refused", type: command.type, hash, error: refused, ...identity } };
    if (refused !== undefined) return no(refused);
    if (state === undefined) {
      if (command.type !== core.definition.creates) return no(errorBody("not_found", `there is no ${actor.kind} '${actor.id}'`));
      return { kind: "entry", entry: { t: "init", type: command.type, body: command.body, ...identity } };
    }
    // A kind may take its creating command again later (a worker that died joins again); else it is a repeat or a conflict.
    if (command.type === core.definition.creates && core.refusal(state, command.type, command.body, command.channel) !== undefined) {
      if (hash === state.created_hash)
        return { kind: "answer", outcome: { ok: true, seq: state.seq, state: outerState(state.snapshot), result: { created: false } }, journaled: false };
      return no(errorBody("conflict", `the ${actor.kind} '${actor.id}' exists with another body`));
    }
    const refusal = core.refusal(state, command.type, command.body, command.channel);
    if (refusal === undefined) return { kind: "entry", entry: { t: "command", type: command.type, body: command.body, ...identity } };
    if (!this.#mayJournalRefusal()) return no(refusal);
    return { kind: "entry", entry: { t: "refused", type: command.type, hash, error: refusal, ...identity } };
  }

  #mayJournalRefusal(): boolean {
    const now_ms = this.#options.world.monotonic_ms();
    this.#refused_tokens = Math.min(REFUSED_BURST, this.#refused_tokens + ((now_ms - this.#refused_at_ms) / 1000) * REFUSED_PER_S);
    this.#refused_at_ms = now_ms;
    if (this.#refused_tokens < 1) return false;
    this.#refused_tokens -= 1;
    return true;
  }
}
