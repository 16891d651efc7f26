// fence: how an append whose answer is missing or a refusal becomes a decision. Shared by both adapters, because this is where a
// mistake would either lose a turn or store it twice.
//
//   send ─┬─ acknowledged ────────▶ committed
//         ├─ surely not stored ───▶ send again
//         └─ refused or silent ───▶ the message after the expected one:  ours: committed · another's: superseded · none: send again
//
// Invariants:
//   G3. `superseded` is only said with a rival's message seen where ours should stand: next after `expected_last_sequence`. The
//       tail alone would not do: a rival may have built on top of our own write whose answer was lost.
//   G5. Sending again is safe: the same expected sequence lets at most one of the sendings in.
import { HEADER_COMMIT } from "../protocol/commands.ts";
import { pause, type World } from "../protocol/world.ts";
import { type Append, type AppendOutcome, headerOf, type StoredMessage } from "./port.ts";

/** An append that waited this long for certainty answers `unavailable`. */
export const APPEND_PATIENCE_MS = 5_000;
/** A broker that has not answered by then is asked what it has. */
export const ANSWER_PATIENCE_MS = 2_000;
const RETRY_FIRST_MS = 20;
const RETRY_MAX_MS = 500;

/** The broker could not answer a read. Reads reject with it, since an absent answer must not look like an absent message. */
export class BusUnavailable extends Error {
  override readonly name = "BusUnavailable";
}

/** What one sending of one append came to. */
export type Sending =
  | { readonly kind: "committed"; readonly sequence: number }
  /** Refused by the fence: a message stands there, a rival's or our own. */
  | { readonly kind: "fenced" }
  /** Surely not stored. */
  | { readonly kind: "not_stored"; readonly reason: string }
  /** It may have been stored. */
  | { readonly kind: "unknown"; readonly reason: string };

/** What a decision needs of the broker. Reads are the leader's, and reject with BusUnavailable. */
export interface FenceReads {
  next_after(subject: string, sequence: number, patience_ms: number): Promise<StoredMessage | undefined>;
  last(subject: string, patience_ms: number): Promise<StoredMessage | undefined>;
  is_closed(): boolean;
}

/** Sends until it is known what stands after the expected sequence, or the patience ends. */
export async function decideAppend(
  world: World,
  reads: FenceReads,
  append: Append,
  give_up_at_ms: number,
  send: () => Promise<Sending>,
): Promise<AppendOutcome> {
  let wait_ms = RETRY_FIRST_MS;
  for (;;) {
    const sending = await send();
    if (sending.kind === "committed") return sending;
    let reason = sending.kind === "fenced" ? "the broker refused the expected sequence, and nothing stands there yet" : sending.reason;
    const left_ms = give_up_at_ms - world.monotonic_ms();
    if (sending.kind !== "not_stored" && left_ms > 0) {
      try {
        const outcome = await whatStands(reads, append, sending.kind === "fenced", left_ms);
        if (outcome !== undefined) return outcome;
      } catch (error) {
        if (!(error instanceof BusUnavailable)) throw error;
        reason = error.message;
      }
    }
    if (reads.is_closed() || world.monotonic_ms() + wait_ms >= give_up_at_ms) return { kind: "unavailable", reason };
    await pause(world, wait_ms);
    wait_ms = Math.min(2 * wait_ms, RETRY_MAX_MS);
  }
}

/** G3. Undefined: nothing stands there. */
async function whatStands(reads: FenceReads, append: Append, fenced: boolean, patience_ms: number): Promise<AppendOutcome | undefined> {
  const next = await reads.next_after(append.subject, append.expected_last_sequence, patience_ms);
  if (next !== undefined) {
    const ours = headerOf(next.headers, HEADER_COMMIT) === append.commit_id;
    return ours ? { kind: "committed", sequence: next.sequence } : { kind: "superseded", by_sequence: next.sequence };
  }
  if (!fenced) return undefined;
  // Refused, and nothing follows: the writer believes in a message that the stream does not have. It is not behind but wrong.
  const last_sequence = (await reads.last(append.subject, patience_ms))?.sequence ?? 0;
  return last_sequence < append.expected_last_sequence ? { kind: "superseded", by_sequence: last_sequence } : undefined;
}
