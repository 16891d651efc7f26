// session-transcript: the prompt of a session's model calls, as positions of entries: the text itself stays in the journal.
//
//   user ──▶ assistant, with calls ──▶ tool, tool, … ──▶ assistant ──▶ user of the next turn ──▶ …
//
// Invariants (of session.ts):
//   SE4. A transcript is a prompt at any time between steps: each call that an assistant's message made has one answer in it. Turns, and steps of a
//        turn, leave it whole.
//   SE5. It has a bound.
import type { Failed } from "./session-failure.ts";

/**
 * Messages in one prompt. Above it whole turns leave, oldest first; if the open turn alone is larger, its oldest steps leave, never the
 * message that began it. What left is still in the journal.
 */
export const TRANSCRIPT_ITEMS_MAX = 512;
/** And they leave down to here, so that the beginning of the prompt, which providers cache, changes seldom. */
export const TRANSCRIPT_ITEMS_KEPT = 384;

/** One message of the prompt, by the position of its text. A tool's that has `failed` has no text in its entry. */
export type TranscriptItem =
  | { readonly role: "user"; readonly at: number; readonly turn: number }
  | { readonly role: "assistant"; readonly at: number; readonly turn: number }
  | { readonly role: "tool"; readonly at: number; readonly turn: number; readonly call_id: string; readonly name: string; readonly failed?: Failed };

/** SE5: what of a transcript stays in the prompt. Turns, and steps of a turn, stand together in it. */
export function windowed(items: readonly TranscriptItem[]): readonly TranscriptItem[] {
  if (items.length <= TRANSCRIPT_ITEMS_MAX) return items;
  const newest = items.at(-1)?.turn;
  let kept = items;
  while (kept.length > TRANSCRIPT_ITEMS_KEPT) {
    const oldest = kept[0]?.turn;
    if (oldest !== newest) {
      kept = kept.filter((item) => item.turn !== oldest);
      continue;
    }
    // Item 0 is the message that began the turn, item 1 the answer of its oldest step.
    const next = kept.findIndex((item, index) => index > 1 && item.role === "assistant");
    if (next < 0) break;
    kept = [...kept.slice(0, 1), ...kept.slice(next)];
  }
  return kept;
}
