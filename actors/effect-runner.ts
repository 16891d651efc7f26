// effect-runner: makes what is going on agree with an actor's ledger of effects.
//
// Invariants:
//   E1. An effect starts only after the append that began it (the caller reconciles with committed states only).
//   E2. An effect whose result is not yet journaled stays known here, so reconciling again never starts it twice (A3).
//   E3. What the ledger no longer names is aborted, and its result is dropped.
//   E4. What is stopped by an entry says what it came to before that entry is appended, and is not heard again.
import { actorPath } from "../protocol/ids.ts";
import type { EffectError, Entry } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { Running } from "../state-machines/step.ts";
import { EffectFailure, type EffectScope, type Performers } from "./performer.ts";

/** What an effect that is going on can say of itself. */
export type SoFar = () => JsonObject;

interface Live {
  so_far?: SoFar;
  readonly abort: AbortController;
  readonly attempt: number;
  settled: boolean;
}

export interface EffectRunnerDeps {
  readonly performers: Performers;
  readonly log: Log;
  /** `so_far` is given to the effect, to say how it can be asked. */
  scope(effect: Running, signal: AbortSignal, so_far: (read: SoFar) => void): EffectScope;
  /** The result, to be journaled. */
  post(entry: Extract<Entry, { t: "done" | "fail" }>): void;
  observe?(what: "started" | "done" | "failed" | "aborted", src: string): void;
}

export interface EffectRunner {
  /** Starts what the ledger names and is not live, aborts what is live and not named. With `hold` nothing new is started. */
  reconcile(ledger: Readonly<Record<string, Running>>, hold: boolean): void;
  /** E4: ends it at once, and answers what it came to; undefined where it does not run here or has nothing to say. */
  end(inst: string): JsonObject | undefined;
  /** insts that have been started here and are not yet journaled. */
  live(): ReadonlySet<string>;
  /** How many are still working (not merely waiting to be journaled). */
  working(): number;
  stop(): void;
}

export function createEffectRunner({ performers, log, scope, post, observe }: EffectRunnerDeps): EffectRunner {
  const live = new Map<string, Live>();
  let stopped = false;

  function start(effect: Running): void {
    const abort = new AbortController();
    const me: Live = { abort, attempt: effect.attempt, settled: false };
    live.set(effect.inst, me);
    observe?.("started", effect.src);
    const settle = (entry: Extract<Entry, { t: "done" | "fail" }>): void => {
      if (stopped || abort.signal.aborted) return; // E3
      me.settled = true;
      observe?.(entry.t === "done" ? "done" : "failed", effect.src);
      post(entry);
    };
    const perform = performers[effect.src];
    if (perform === undefined) {
      settle({ t: "fail", inst: effect.inst, error: { code: "internal", message: `nobody performs '${effect.src}'` } });
      return;
    }
    const its = scope(effect, abort.signal, (read) => (me.so_far = read));
    Promise.try(() => perform(effect.input as never, its)).then(
      (output: Json) => settle({ t: "done", inst: effect.inst, output }),
      (error: unknown) => {
        if (!(error instanceof EffectFailure) && !abort.signal.aborted)
          log.error("effect broke", { actor: actorPath(its.actor), inst: effect.inst, src: effect.src, ...errorFields(error) });
        const told: EffectError =
          error instanceof EffectFailure ? error.effect_error : { code: "internal", message: error instanceof Error ? error.message : String(error) };
        settle({ t: "fail", inst: effect.inst, error: told });
      },
    );
  }

  return {
    reconcile(ledger, hold) {
      if (stopped) return;
      const wanted = new Map(Object.values(ledger).map((effect) => [effect.inst, effect]));
      for (const [inst, mine] of live) {
        if (wanted.has(inst)) continue;
        live.delete(inst);
        if (!mine.settled) {
          mine.abort.abort();
          observe?.("aborted", inst.slice(inst.indexOf(":") + 1));
        }
      }
      if (hold) return;
      for (const [inst, effect] of wanted) if (!live.has(inst)) start(effect); // E2
    },
    end(inst) {
      const mine = live.get(inst);
      if (mine?.so_far === undefined) return undefined;
      const told = mine.so_far();
      if (mine.settled) return told; // Its result waits to be journaled, and comes too late.
      mine.settled = true; // It stays known until the ledger no longer names it: E2.
      mine.abort.abort();
      observe?.("aborted", inst.slice(inst.indexOf(":") + 1));
      return told;
    },
    live: () => new Set(live.keys()),
    working: () => [...live.values()].filter((mine) => !mine.settled).length,
    stop() {
      stopped = true;
      for (const mine of live.values()) if (!mine.settled) mine.abort.abort();
      live.clear();
    },
  };
}
