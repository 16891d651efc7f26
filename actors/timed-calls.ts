// timed-calls: a call of a model or of a tool gets so much time and no more, and always ends: with what it came to, or by name.
//
//   run ──▶ the work ──settles in time──────────────────────────────▶ its own result
//              ├─ its time is over ─▶ told by its signal (CallTimeout) ──▶ its own result, if it ends within GRACE_MS
//              └─ called off ───────▶ told by its signal ──────────────┤
//                                                                      └─▶ failure `timeout` or `cancelled`: nobody waits any longer
//
// It leaves to others: places among the calls of a process (call-pool.ts), what a call cost by then (call-account.ts).
//
// Invariants:
//   TC1. `run` settles GRACE_MS after the call's end of time or after it was called off at the latest, whatever the work does: throws at once, never
//        settles, does not listen to its signal. So who frees a place when `run` settles never loses one.
//   TC2. Every call is counted once, as running until it settles, then as exactly one of done, failed, timed out, cancelled.
import { assert } from "../protocol/assert.ts";
import type { World } from "../protocol/world.ts";
import { EffectFailure } from "./performer.ts";

/** What is told to stop gets this long to say what it came to. Adapters answer their signal within a turn of the loop. */
export const GRACE_MS = 1_000;

/** The reason of a signal that was aborted because the call's time was over. */
export class CallTimeout extends Error {
  override readonly name = "CallTimeout";
  constructor(ms: number) {
    super(`the call took longer than ${ms} ms`);
  }
}

/** How a call that was stopped by this signal failed. */
export function stoppedBy(signal: AbortSignal): { readonly code: "timeout" | "cancelled"; readonly message: string } {
  const reason: unknown = signal.reason;
  return reason instanceof CallTimeout ? { code: "timeout", message: reason.message } : { code: "cancelled", message: "the call was cancelled" };
}

export interface CallCounts {
  readonly running: number;
  readonly done: number;
  readonly failed: number;
  readonly timed_out: number;
  readonly cancelled: number;
}
export type CallEnd = Exclude<keyof CallCounts, "running">;

export interface TimedCalls {
  /** `failed` says of a result whether the call failed. Rejects with what the work rejects with, or with EffectFailure when it did not end (TC1). */
  run<T>(time_ms: number, signal: AbortSignal, work: (signal: AbortSignal) => Promise<T>, failed?: (result: T) => boolean): Promise<T>;
  report(): CallCounts;
}

export function createTimedCalls({ world, on_end }: { readonly world: Pick<World, "after">; on_end?(how: CallEnd): void }): TimedCalls {
  const counts = { running: 0, done: 0, failed: 0, timed_out: 0, cancelled: 0 };
  return {
    run(time_ms, signal, work, failed = () => false) {
      assert(Number.isFinite(time_ms) && time_ms > 0, "a call gets some time");
      counts.running += 1;
      return new Promise((resolve, reject) => {
        const inner = new AbortController();
        let stopGrace: (() => void) | undefined;
        let settled = false;
        const settle = (good: boolean, tell: () => void): void => {
          if (settled) return;
          settled = true;
          stopTime();
          stopGrace?.();
          signal.removeEventListener("abort", calledOff);
          const stopped = inner.signal.aborted ? stoppedBy(inner.signal).code : undefined;
          const how: CallEnd = good ? "done" : stopped === "timeout" ? "timed_out" : stopped === "cancelled" ? "cancelled" : "failed";
          counts.running -= 1;
          counts[how] += 1; // TC2
          on_end?.(how);
          tell();
        };
        const stop = (reason: unknown): void => {
          if (settled || inner.signal.aborted) return;
          inner.abort(reason);
          // TC1
          stopGrace = world.after(GRACE_MS, () => {
            const { code, message } = stoppedBy(inner.signal);
            settle(false, () => reject(new EffectFailure(code, message)));
          });
        };
        const calledOff = (): void => stop(signal.reason);
        const stopTime = world.after(time_ms, () => stop(new CallTimeout(time_ms)));
        signal.addEventListener("abort", calledOff, { once: true });
        if (signal.aborted) calledOff();
        Promise.try(() => work(inner.signal)).then(
          (result) => settle(!failed(result), () => resolve(result)),
          (error: unknown) => settle(false, () => reject(error as Error)),
        );
      });
    },
    report: () => ({ ...counts }),
  };
}
