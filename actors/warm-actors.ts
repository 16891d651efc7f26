// WarmActors: actors of shards that are about to move here, restored beforehand from their snapshots and journals, so that taking the shard reads only
// what was appended since.
//
//   prepare(shard) ──marks, snapshots, journals──▶ warm ──take(actor), by its new owner──▶ gone
//                                                   └──KEPT_MS, or stop()──▶ gone
//
// Read-only: nothing is claimed, marked or appended; another process owns these actors and goes on with them. What is kept is a prefix of the
// journal, and a prefix stays one: who takes it reads on from there, and has what a restore from nothing would have given (R1).
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import type { JournalMessage } from "../protocol/journal.ts";
import { HANDOVER_DEADLINE_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseResidentSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import type { Restored, Restorer } from "./restore.ts";

/** A move that the owner does not end by its deadline is ended by the leader soon after. */
const KEPT_MS = HANDOVER_DEADLINE_MS + 15_000;
/** Of one process, over all shards: some hundred megabytes at most. Above it the rest is restored when the shard comes. */
const WARM_MAX = 5_000;
/** Read at once, over all shards: the broker is not waited for, and the actors that live here already are not kept waiting. */
const READS_AT_ONCE = 8;

export interface WarmActors {
  /** Restores the actors of the shard that have a resident mark; again: reads on where it stopped. Answers how many are warm: none while the bus is away. */
  prepare(shard: number): Promise<number>;
  /** What is known of the actor, once. */
  take(actor: ActorAddress): Restored | undefined;
  /** Keeps nothing any more, so that no timer of it outlives its host. */
  stop(): void;
}

export interface WarmActorsDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly restorer: Restorer;
  /** Told each journal message that was read. */
  heard(actor: ActorAddress, message: JournalMessage): void;
  /** An actor that was not taken in time is warm no more. */
  forgot(actor: ActorAddress): void;
}

export function createWarmActors({ bus, world, log, restorer, heard, forgot }: WarmActorsDeps): WarmActors {
  const warm = new Map<string, { readonly restored: Restored; readonly cancel: () => void }>();
  let reading = 0;
  let stopped = false;
  const waiting: (() => void)[] = [];

  function keep(actor: ActorAddress, restored: Restored): void {
    const path = actorPath(actor);
    warm.get(path)?.cancel();
    const cancel = world.after(KEPT_MS, () => {
      warm.delete(path);
      forgot(actor);
    });
    warm.set(path, { restored, cancel });
  }

  async function read(actor: ActorAddress): Promise<void> {
    reading += 1;
    if (reading > READS_AT_ONCE) await new Promise<void>((resolve) => waiting.push(resolve));
    try {
      if (warm.size >= WARM_MAX && !warm.has(actorPath(actor))) return;
      const restored = await restorer.restore(actor, (message) => heard(actor, message), warm.get(actorPath(actor))?.restored);
      if (restored !== undefined && !stopped) keep(actor, restored);
    } catch (error) {
      // It is restored when the shard comes, or told of then.
      log.debug("an actor cannot be prepared", { actor: actorPath(actor), ...errorFields(error) });
    } finally {
      reading -= 1;
      waiting.shift()?.();
    }
  }

  return {
    async prepare(shard) {
      let actors: ActorAddress[];
      try {
        actors = (await bus.last_of_each("RESIDENT", `resident.${shard}.>`)).flatMap((mark) => parseResidentSubject(mark.subject)?.actor ?? []);
      } catch (error) {
        log.debug("a shard cannot be prepared", { shard, ...errorFields(error) });
        return 0;
      }
      await Promise.all(actors.map(read));
      return actors.filter((actor) => warm.has(actorPath(actor))).length;
    },
    take(actor) {
      const path = actorPath(actor);
      const one = warm.get(path);
      warm.delete(path);
      one?.cancel();
      return one?.restored;
    },
    stop() {
      stopped = true;
      for (const { cancel } of warm.values()) cancel();
      warm.clear();
    },
  };
}
