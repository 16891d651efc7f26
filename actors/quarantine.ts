// quarantine: an actor that lost worker after worker is suspected to be why: its effects wait until no other suspect of this process is being tried.
//
//   claimed, SUSPECT_TRIES losses in a row ──▶ held ──its turn in this process──▶ tried ──SUSPECT_SURVIVES_MS without harm, or its work is over──▶ free
import type { World } from "../protocol/world.ts";

/** From this many lost attempts in a row on, an actor is a suspect. Two: the first loss is anybody's, the second a coincidence at most. */
const SUSPECT_TRIES = 2;
/** A suspect whose effects run this long without harm lets the next one begin. Poison acts at once, as a rule. */
const SUSPECT_SURVIVES_MS = 3_000;

export interface QuarantineOptions {
  readonly world: World;
  /** Resolves when it is this suspect's turn; the answer is called when it has shown that it does no harm, or has left. */
  readonly quarantine: ((tries: number) => Promise<() => void>) | undefined;
  /** Has the actor left this process? */
  stopped(): boolean;
  /** Its effects may begin. */
  on_over(): void;
}

export class Quarantine {
  readonly #options: QuarantineOptions;
  #holds = false;
  #leave: (() => void) | undefined;

  constructor(options: QuarantineOptions) {
    this.#options = options;
  }

  /** The actor's effects may not begin yet. */
  get holds(): boolean {
    return this.#holds;
  }

  /** Is an actor that lost so many attempts in a row, and would work now, a suspect? Holds it then. */
  suspects(tries: number, works: boolean): boolean {
    this.#holds = this.#options.quarantine !== undefined && tries >= SUSPECT_TRIES && works;
    return this.#holds;
  }

  enter(tries: number): void {
    const { world, quarantine, stopped, on_over } = this.#options;
    void quarantine?.(tries).then((leave) => {
      if (stopped()) {
        leave();
        return;
      }
      this.#leave = leave;
      this.#holds = false;
      on_over();
      void world.after(SUSPECT_SURVIVES_MS, () => this.end());
    });
  }

  end(): void {
    this.#leave?.();
    this.#leave = undefined;
  }
}
