// effect-scope: what one attempt of an effect may see and say of its actor, built for each attempt that begins.
import { BusUnavailable } from "../bus/fence.ts";
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import type { Entry } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import type { Running } from "../state-machines/step.ts";
import type { EntryCache } from "./entry-cache.ts";
import type { EffectScope } from "./performer.ts";
import { createTokenWriter } from "./token-writer.ts";

/** The actor, as far as its effects have to do with it. */
export interface ScopeHost {
  readonly actor: ActorAddress;
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly epoch: number;
  readonly entries: EntryCache;
  /** Of the command that the actor works for. */
  trace(): string | undefined;
  /** Waits while the actor's lease is not good; false when it has left this process. */
  permitted(): Promise<boolean>;
  /** Has the actor left this process? */
  stopped(): boolean;
  back_off(tries: number): Promise<void>;
  post(entry: Extract<Entry, { t: "progress" }>): void;
  first_token(): void;
}

/** `so_far` is given to the effect, to say how it can be asked what it has come to. */
export function scopeOf(host: ScopeHost, effect: Running, signal: AbortSignal, so_far: EffectScope["so_far"] = () => undefined): EffectScope {
  const { actor, bus, world, log, epoch } = host;
  const waited = effect.told?.["wait"];
  return {
    actor,
    inst: effect.inst,
    attempt: effect.attempt,
    ...(waited === undefined || waited === null ? {} : { waited: waited as JsonObject }),
    epoch,
    idempotency_key: `${actorPath(actor)}/${effect.inst}`,
    signal,
    permitted: async () => (await host.permitted()) && !signal.aborted,
    trace: host.trace(),
    entries: (seqs) => entriesOf(host, seqs, signal),
    progress: (told) => {
      if (!signal.aborted) host.post({ t: "progress", inst: effect.inst, told });
    },
    so_far,
    tokens: (place) => createTokenWriter(actor, { ...place, attempt: effect.attempt, epoch }, { bus, world, log, on_first: () => host.first_token() }),
  };
}

/** Waits for a bus that is away: a turn does not fail because a broker was restarted while its prompt was read. */
async function entriesOf(host: ScopeHost, seqs: readonly number[], signal: AbortSignal): Promise<ReadonlyMap<number, Entry>> {
  for (let tries = 0; ; tries++) {
    try {
      return await host.entries.get(host.actor, seqs);
    } catch (error) {
      if (!(error instanceof BusUnavailable) || signal.aborted || host.stopped()) throw error;
      await host.back_off(tries);
    }
  }
}
