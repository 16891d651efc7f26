// refused-twins: which durable commands were refused here lately, by the inbox of their sender.
//
//   fast lane ── still on its way ──────────────────────────▶ too late: whoever said it was told no
//   durable ──refused, and told so──┘
//
// A process of ours asks on the fast lane first, and makes the command durable when it hears nothing. When the durable twin overtakes the fast
// one and is refused with what may end (`busy`), the fast one would be decided anew, and done after all. A sender who tries again asks with
// another inbox, and is heard.
import { FAST_REPLY_SUFFIX } from "../protocol/reply.ts";

export interface RefusedTwins {
  add(reply_to: string): void;
  /** Was the durable twin of what came by the fast lane with this reply subject refused? */
  has_twin(fast_reply: string): boolean;
}

/** What a connection can hold back of the fast lane is gone with it; this many refusals are minutes' worth even of a flood. */
const KEPT_MAX = 10_000;

export function createRefusedTwins(kept_max = KEPT_MAX): RefusedTwins {
  const refused = new Set<string>();
  return {
    add(reply_to) {
      refused.add(reply_to);
      if (refused.size <= kept_max) return;
      const [oldest] = refused;
      refused.delete(oldest as string);
    },
    has_twin: (fast_reply) => fast_reply.endsWith(FAST_REPLY_SUFFIX) && refused.has(fast_reply.slice(0, -FAST_REPLY_SUFFIX.length)),
  };
}
