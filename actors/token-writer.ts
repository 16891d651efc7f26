// token-writer: publishes what a model says, as it says it, to the actor's token subject.
//
// The first chunk goes at once; later ones coalesce for TOKEN_COALESCE_MS. Each is stored with its acknowledgement awaited in the
// background and repeated when it fails: a publish into a stream without one is lost under load. A chunk that cannot be stored
// within its patience is given up: the finished message stands in the journal, and gateways give the rest out of it.
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { TOKEN_COALESCE_MS } from "../protocol/limits.ts";
import type { Log } from "../protocol/log.ts";
import { actorSubject } from "../protocol/subjects.ts";
import { encodeToken, type TokenChunk } from "../protocol/tokens.ts";
import type { World } from "../protocol/world.ts";

export type TokenChannel = "text" | "reasoning" | "tool_call";

export interface TokenWriter {
  write(channel: TokenChannel, text: string): void;
  /** Sends what is left, marked as the attempt's last chunk. Nothing may be written afterwards. */
  end(): void;
}

export interface TokenWriterDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  /** Told once, when the first chunk goes out. */
  on_first?(): void;
}

/** Repeats of a chunk that was not acknowledged: together about four seconds, the time of a broker's restart. */
const PUBLISH_ATTEMPTS_MAX = 5;

export function createTokenWriter(
  actor: ActorAddress,
  place: { turn: number; step: number; attempt: number; epoch: number },
  { bus, world, log, on_first }: TokenWriterDeps,
): TokenWriter {
  const subject = actorSubject(actor, "token");
  let index = 0;
  let waiting: { channel: TokenChannel; text: string } | undefined;
  let cancelTimer: (() => void) | undefined;
  let ended = false;

  async function store(data: Uint8Array): Promise<void> {
    for (let attempt = 1; attempt <= PUBLISH_ATTEMPTS_MAX; attempt++) {
      const outcome = await bus.publish(subject, data, { patience_ms: 1000 });
      if (outcome.kind === "stored") return;
      if (outcome.kind !== "unavailable") break;
      await new Promise<void>((resolve) => void world.after(50 * attempt, resolve));
    }
    log.warn("token chunk given up; readers get it from the finished message", { actor: actorPath(actor) });
  }

  function flush(end: boolean): void {
    cancelTimer?.();
    cancelTimer = undefined;
    const { channel, text } = waiting ?? { channel: "text" as const, text: "" };
    waiting = undefined;
    if (text === "" && !end) return;
    const chunk: TokenChunk = { ...place, index: index++, text, ...(channel === "text" ? {} : { channel }), ...(end ? { end: true as const } : {}) };
    void store(encodeToken(chunk));
  }

  return {
    write(channel, text) {
      if (ended || text === "") return;
      if (index === 0 && waiting === undefined) {
        on_first?.();
        waiting = { channel, text };
        flush(false);
        return;
      }
      if (waiting !== undefined && waiting.channel !== channel) flush(false);
      waiting = { channel, text: (waiting?.text ?? "") + text };
      cancelTimer ??= world.after(TOKEN_COALESCE_MS, () => flush(false));
    },
    end() {
      if (ended) return;
      ended = true;
      flush(true);
    },
  };
}
