// story: what a run tells: the lines of what happened, a hash over all of them, what broke, and how often what was met.
import { createHash } from "node:crypto";

const LINES_KEPT = 400;
const FAILURES_KEPT = 20;

export class Story {
  /** What broke, in the order in which it was seen. */
  readonly failures: string[] = [];
  readonly counts: Record<string, number> = {};
  readonly #now_ms: () => number;
  readonly #lines: string[] = [];
  readonly #hash = createHash("sha256");
  /** Lines that are not in the hash yet: many at once are hashed sooner than one after another. */
  #unhashed = "";
  #over = false;

  constructor(now_ms: () => number) {
    this.#now_ms = now_ms;
  }

  get broke(): boolean {
    return this.failures.length > 0;
  }

  readonly fail = (what: string): void => {
    this.trace(`BROKEN ${what}`);
    if (this.failures.length < FAILURES_KEPT) this.failures.push(what);
  };

  readonly trace = (line: string): void => {
    if (this.#over) return;
    const whole = `${(this.#now_ms() / 1000).toFixed(3).padStart(9)} ${line}`;
    this.#unhashed += whole;
    this.#lines.push(whole);
    if (this.#lines.length <= 2 * LINES_KEPT) return;
    this.#lines.splice(0, LINES_KEPT);
    this.#absorb();
  };

  #absorb(): void {
    this.#hash.update(this.#unhashed);
    this.#unhashed = "";
  }

  readonly count = (what: string, times = 1): void => {
    this.counts[what] = (this.counts[what] ?? 0) + times;
  };

  /** Nothing more is told. */
  end(): { readonly trace: readonly string[]; readonly trace_hash: string } {
    this.#over = true;
    this.#absorb();
    return { trace: this.#lines.slice(-LINES_KEPT), trace_hash: this.#hash.digest("hex") };
  }
}

/** FNV-1a, well mixed: what a name's fate is drawn from. */
export function hashOfText(text: string): number {
  let hash = 2_166_136_261;
  for (let at = 0; at < text.length; at++) hash = Math.imul(hash ^ text.charCodeAt(at), 16_777_619);
  return (hash ^ (hash >>> 15)) >>> 0;
}
