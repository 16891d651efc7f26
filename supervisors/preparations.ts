// preparations: which shards their next owners know already. A planned move begins when its target has read what it will need, so that the shard
// changes hands when both are ready; until then the owner goes on as ever.
//
//   wanted ──asks the target to prepare──▶ asking ──answered, or PREPARE_PATIENCE_MS──▶ ready ──the move begins, or is wanted no more──▶ forgotten
//
// A target that does not answer holds nothing up for longer than the patience: the move then goes on as it would have without.
import type { Bus } from "../bus/port.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { askHost } from "./host-service.ts";

/** Some hundred actors are read in it. The owner's own deadline for a move is a minute. */
const PREPARE_PATIENCE_MS = 2_000;

interface Preparation {
  /** Who is to have it: a worker in one of its lives. */
  readonly target: string;
  ready: boolean;
}

export class Preparations {
  readonly #bus: Bus;
  readonly #log: Log;
  readonly #on_ready: () => void;
  readonly #shards = new Map<number, Preparation>();

  constructor({ bus, log, on_ready }: { bus: Bus; log: Log; on_ready: () => void }) {
    this.#bus = bus;
    this.#log = log;
    this.#on_ready = on_ready;
  }

  /** Is the worker ready to have the shard? Asks it once to get ready when it was not asked yet; `on_ready` is called when that is over. */
  ready(shard: number, worker: string, incarnation: string): boolean {
    const target = `${worker}/${incarnation}`;
    const known = this.#shards.get(shard);
    if (known?.target === target) return known.ready;
    const preparation: Preparation = { target, ready: false };
    this.#shards.set(shard, preparation);
    askHost(this.#bus, worker, "prepare", { shard }, { patience_ms: PREPARE_PATIENCE_MS })
      .then((answer) => {
        if (!answer.ok) this.#log.debug("a worker takes a shard without preparing", { shard, worker, code: answer.error.code });
      })
      .catch((error: unknown) => this.#log.warn("a worker could not be asked to prepare", { shard, worker, ...errorFields(error) }))
      .finally(() => {
        preparation.ready = true;
        if (this.#shards.get(shard) === preparation) this.#on_ready();
      });
    return false;
  }

  /** Forgets all moves but these. */
  keep(wanted: ReadonlySet<number>): void {
    for (const shard of this.#shards.keys()) if (!wanted.has(shard)) this.#shards.delete(shard);
  }
}
