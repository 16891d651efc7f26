// drive: takes an actor through its life in a test, as a host would: refusal first, then the step. Nothing here knows what is right;
// it checks only what must hold at every step of every machine:
//   - S1: the same entry on the state as it is and on the state as it came back from a snapshot gives the same outputs and states;
//   - the context is plain JSON and nobody writes into the former one;
//   - S3: a finished actor has no effects and no timers.
import { expect } from "vitest";
import type { ErrorBody } from "../../protocol/errors.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import type { ActorEvent, EffectError, Entry, OutMessage } from "../../protocol/journal.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import type { ActorDefinition, ActorView } from "../../state-machines/definition.ts";
import { notJson } from "../../state-machines/lint.ts";
import { type ActorState, type Core, coreOf, type EntryFrame, type Outcome, type SavedState, type Step, viewOf } from "../../state-machines/step.ts";

export interface Committed {
  readonly entry: Entry;
  readonly at_ms: number;
  readonly epoch: number;
  readonly worker: string;
}

export function frozen<T>(value: T): T {
  if (value !== null && typeof value === "object" && !Object.isFrozen(value)) {
    Object.freeze(value);
    Object.values(value).forEach(frozen);
  }
  return value;
}

const throughJson = <T>(value: T): T => JSON.parse(JSON.stringify(value)) as T;

export class Drive {
  readonly core: Core;
  readonly actor: ActorAddress;
  readonly entries: Committed[] = [];
  readonly events: ActorEvent[] = [];
  readonly out: OutMessage[] = [];
  /** What the last entry told. */
  told: readonly ActorEvent[] = [];
  outcome: Outcome | undefined;
  at_ms = 1_000_000;
  epoch = 1;
  worker = "w1";
  /** Off for lives of thousands of steps: then only the step itself is taken. */
  thorough = true;
  #state: ActorState | undefined;

  constructor(core: Core | ActorDefinition, actor?: ActorAddress) {
    this.core = "apply" in core ? core : coreOf(core);
    this.actor = actor ?? { tenant: "acme", kind: this.core.definition.kind, id: "a1" };
  }

  get state(): ActorState {
    if (this.#state === undefined) throw new Error("not created yet");
    return this.#state;
  }
  get view(): ActorView {
    return viewOf(this.state);
  }
  get at(): string {
    return this.view.state;
  }
  get saved(): SavedState {
    return this.core.save(this.state);
  }
  get running(): string[] {
    return Object.keys(this.state.running);
  }
  get seq(): number {
    return this.#state?.seq ?? 0;
  }

  #check(former: ActorState | undefined, entry: Entry, frame: EntryFrame, step: Step): void {
    const saved = this.core.save(step.state);
    if (former !== undefined) {
      const again = this.core.apply(this.core.load(throughJson(this.core.save(former))), this.actor, entry, frame);
      expect(again.events, "S1: the same events from a loaded state").toEqual(step.events);
      expect([again.out, again.outcome]).toEqual([step.out, step.outcome]);
      expect(this.core.save(again.state), "S1: the same state from a loaded state").toEqual(saved);
    }
    expect(throughJson(saved), "a saved state is plain JSON").toEqual(saved);
    expect(this.core.save(this.core.load(throughJson(saved))), "what is loaded saves the same").toEqual(saved);
    expect(notJson(step.state.snapshot.context)).toBeUndefined();
    for (const event of step.events) expect(notJson(event, "event")).toBeUndefined();
    if (viewOf(step.state).final) expect([step.state.running, step.state.timers]).toEqual([{}, {}]); // S3
  }

  apply(entry: Entry): Step {
    const former = this.#state;
    const frame = { seq: this.seq + 1, at_ms: this.at_ms, epoch: this.epoch, worker: this.worker };
    if (former !== undefined) frozen(former.snapshot.context);
    const step = this.core.apply(former, this.actor, frozen(entry), frame);
    if (this.thorough) this.#check(former, entry, frame, step);
    this.#state = step.state;
    this.entries.push({ entry, ...frame });
    this.told = step.events;
    this.events.push(...step.events);
    this.out.push(...step.out);
    this.outcome = step.outcome;
    return step;
  }

  create(body: JsonObject, identity: { key?: string } = {}): this {
    this.apply({ t: "init", type: this.core.definition.creates, body, channel: "control", ...identity });
    return this;
  }

  refusal(type: string, body: JsonObject = {}): ErrorBody | undefined {
    return this.core.refusal(this.state, type, body, "control");
  }

  /** A command as a host takes it: refused without an entry, or applied. Answers the refusal. */
  command(type: string, body: JsonObject = {}, identity: { key?: string } = {}): ErrorBody | undefined {
    const refusal = this.refusal(type, body);
    if (refusal === undefined) this.apply({ t: "command", type, body, channel: "control", ...identity });
    return refusal;
  }

  /** A command that must be taken; answers its result. */
  tell(type: string, body: JsonObject = {}, identity: { key?: string } = {}): JsonObject {
    expect(this.command(type, body, identity), `${type} is taken while ${this.at}`).toBeUndefined();
    if (this.outcome?.ok !== true) throw new Error("a command that was taken has an outcome");
    return this.outcome.result;
  }

  instOf(effectId: string): string {
    const effect = this.state.running[effectId];
    if (effect === undefined) throw new Error(`no effect '${effectId}' in flight, only ${this.running.join()}`);
    return effect.inst;
  }
  done(effectId: string, output: unknown): this {
    this.apply({ t: "done", inst: this.instOf(effectId), output: output as Json });
    return this;
  }
  fail(effectId: string, error: EffectError): this {
    this.apply({ t: "fail", inst: this.instOf(effectId), error });
    return this;
  }

  /** Lets the timer whose name contains `part` fire when it is due. */
  fire(part: string): this {
    const timer = Object.values(this.state.timers).find(({ inst }) => inst.includes(part));
    if (timer === undefined) throw new Error(`no timer '${part}', only ${Object.keys(this.state.timers).join()}`);
    this.at_ms = Math.max(this.at_ms, timer.due_ms);
    this.apply({ t: "timer", inst: timer.inst });
    return this;
  }

  /** Another owner takes over; `lost` are effect ids whose attempt may have begun. */
  claim(lost: readonly string[] = this.running, reason = "declared dead"): this {
    const insts = lost.map((id) => this.instOf(id));
    const from = this.worker;
    this.epoch += 1;
    this.worker = `w${this.epoch}`;
    this.apply({ t: "claim", from, reason, lost: insts });
    return this;
  }

  later(ms: number): this {
    this.at_ms += ms;
    return this;
  }

  /** A5: the same entries from the first one. */
  replayed(): { saved: SavedState; events: ActorEvent[] } {
    let state: ActorState | undefined;
    const events: ActorEvent[] = [];
    this.entries.forEach(({ entry, at_ms, epoch, worker }, index) => {
      const step = this.core.apply(state, this.actor, entry, { seq: index + 1, at_ms, epoch, worker });
      state = step.state;
      events.push(...step.events);
    });
    if (state === undefined) throw new Error("nothing to replay");
    return { saved: this.core.save(state), events };
  }

  /** How often an event type was told. */
  count(type: string): number {
    return this.events.filter((event) => event.type === type).length;
  }
  /** The types the last entry told, in order. */
  get types(): string[] {
    return this.told.map(({ type }) => type);
  }
  /** Brings `other` to the same point; the two go on apart. */
  copyTo<D extends Drive>(other: D): D {
    const copy: Drive = other;
    copy.#state = this.#state;
    copy.at_ms = this.at_ms;
    copy.epoch = this.epoch;
    copy.worker = this.worker;
    copy.entries.push(...this.entries);
    copy.events.push(...this.events);
    copy.out.push(...this.out);
    return other;
  }
}
