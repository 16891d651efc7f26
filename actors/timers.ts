// timers: an actor's timers, as its state names them: near ones keep the time in this process, the earliest far one rests in TIMERS.
//
//   named by the state ──near, or its effects run──▶ a clock of this process ──▶ an entry `timer`
//                      ──far, and the actor is quiet──▶ armed in TIMERS ──came due──▶ an entry `timer`
//
// Invariants (of cell.ts):
//   C7. The schedule of an actor in TIMERS is compared and set, and never over that of a later owner: what a former owner asked late does
//       not put his hour over the hour of who has the actor now.
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { TIMER_IN_PROCESS_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { timerSubject } from "../protocol/subjects.ts";
import { timestamp, type World } from "../protocol/world.ts";
import type { ActorState } from "../state-machines/step.ts";

export interface TimersOptions {
  readonly actor: ActorAddress;
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** Of the ownership this process acts under. */
  readonly epoch: number;
  /** It is due. */
  fire(inst: string): void;
}

export class Timers {
  readonly #options: TimersOptions;
  readonly #clocks = new Map<string, () => void>();
  #armed_due_ms: number | undefined;
  /** Of our schedule in TIMERS, as far as we know; undefined when it must be read. */
  #armed_sequence: number | undefined;

  constructor(options: TimersOptions) {
    this.#options = options;
  }

  /** Makes the clocks of this process agree with the state. */
  reconcile(state: ActorState): void {
    const { world, fire } = this.#options;
    const wanted = new Map(Object.values(state.timers).map((timer) => [timer.inst, timer]));
    for (const [inst, cancel] of this.#clocks) {
      if (wanted.has(inst)) continue;
      this.#clocks.delete(inst);
      cancel();
    }
    for (const [inst, timer] of wanted) {
      if (this.#clocks.has(inst)) continue;
      const delay_ms = Math.max(0, timer.due_ms - world.now_ms());
      // A far one is armed in TIMERS once the actor is quiet; while its effects run it is not quiet, and the process keeps the time.
      if (delay_ms > TIMER_IN_PROCESS_MS && Object.keys(state.running).length === 0) continue;
      this.#clocks.set(
        inst,
        world.after(delay_ms, () => {
          this.#clocks.delete(inst);
          fire(inst);
        }),
      );
    }
  }

  stop(): void {
    for (const cancel of this.#clocks.values()) cancel();
    this.#clocks.clear();
  }

  /** What stands in TIMERS must be read again: another may have armed it, or it came due. */
  forget_schedule(): void {
    this.#armed_due_ms = undefined;
    this.#armed_sequence = undefined;
  }

  /** The actor's schedule in TIMERS came due: fires what is due by now. */
  due(state: ActorState | undefined): void {
    this.forget_schedule();
    const now_ms = this.#options.world.now_ms();
    for (const timer of Object.values(state?.timers ?? {})) if (timer.due_ms <= now_ms && !this.#clocks.has(timer.inst)) this.#options.fire(timer.inst);
  }

  /** The earliest of the state's timers is armed in TIMERS; answers whether it is for sure, or there is none. */
  async arm(state: ActorState | undefined): Promise<boolean> {
    const dues = Object.values(state?.timers ?? {}).map((timer) => timer.due_ms);
    if (dues.length === 0) return true;
    const due_ms = Math.min(...dues);
    return due_ms === this.#armed_due_ms || this.#schedule(due_ms);
  }

  /** C7 */
  async #schedule(due_ms: number): Promise<boolean> {
    const { bus, actor, epoch, log } = this.#options;
    try {
      if (this.#armed_sequence === undefined) {
        const stored = await bus.last("TIMERS", timerSubject(actor));
        if (stored !== undefined && armedEpoch(stored.data) > epoch) return false;
        this.#armed_sequence = stored?.sequence ?? 0;
      }
    } catch (error) {
      log.debug("the schedule of an actor cannot be read yet", { actor: actorPath(actor), ...errorFields(error) });
      return false;
    }
    const armed = await bus.schedule(actor, due_ms, new TextEncoder().encode(JSON.stringify({ due: timestamp(due_ms), epoch })), this.#armed_sequence);
    this.#armed_sequence = armed.kind === "stored" ? armed.sequence : undefined;
    if (armed.kind === "stored") this.#armed_due_ms = due_ms;
    return armed.kind === "stored";
  }
}

/** Whose schedule it is; those of before there were epochs in them are everybody's. */
function armedEpoch(data: Uint8Array): number {
  const { epoch } = JSON.parse(new TextDecoder().decode(data)) as { epoch?: number };
  return epoch ?? 0;
}
