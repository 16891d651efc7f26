// mailbox: what an actor was told and has not decided yet, in the order in which it came.
//
//   put in ──▶ waits ──taken──▶ decided               (cell.ts: unacknowledged until then)
//               ▲  └──its inbox begins again──▶ forgotten: it comes again
//               └──put back, to be decided anew──┘
//
// Invariants (of cell.ts):
//   C4. An item leaves it decided, or stays unacknowledged; none is dropped.
//   C6. While a stored command cannot be judged, no command passes it; news of effects and timers does.
import type { Command } from "../protocol/commands.ts";
import type { ErrorBody } from "../protocol/errors.ts";
import type { CommandSource, Entry } from "../protocol/journal.ts";
import type { Outcome } from "../state-machines/step.ts";

/** `after_sequence`: where in EVENTS the actor's journal ended before the commit that decided it; absent for what was decided before. */
export type Decide = (outcome: Outcome, after_sequence?: number) => void;

/**
 * Of a stored command: sees to it that it never comes again. False: it may, and everything after it too, in its order; what waits of the inbox has been
 * forgotten then.
 */
export type Settle = () => Promise<boolean>;

/** What the mailbox holds: a command or its refusal at the door, or news of the actor's own effects and timers. */
export type MailItem =
  | {
      readonly kind: "command";
      readonly command: Command;
      readonly source?: CommandSource;
      /** Its tenant has more waiting than it may: unless it was decided before, it is refused with this, in its turn. */
      readonly overloaded?: ErrorBody;
      /** Told exactly once when the command has been decided and that is durable. */
      readonly decided: Decide;
      /** Told instead, when nobody stored it and it cannot be judged now, or comes too late. */
      readonly given_up?: () => void;
      /** Its durable twin was refused before it: what its sender was told stands. */
      readonly late?: () => boolean;
      readonly settle?: Settle;
    }
  | {
      readonly kind: "refused";
      readonly error: ErrorBody;
      readonly type: string;
      readonly channel: Command["channel"];
      readonly principal?: string;
      readonly source?: CommandSource;
      readonly decided: Decide;
      readonly settle?: Settle;
    }
  | { readonly kind: "entry"; readonly entry: Extract<Entry, { t: "done" | "fail" | "timer" | "claim" | "progress" }> };

export class Mailbox {
  readonly #items: MailItem[] = [];
  readonly #arrived_ms = new WeakMap<MailItem, number>();
  /** C6. Only news is taken. */
  commands_wait = false;

  get empty(): boolean {
    return this.#items.length === 0;
  }
  /** Is there an item that may be taken now? */
  has_work(): boolean {
    return this.commands_wait ? this.#items.some((item) => item.kind === "entry") : this.#items.length > 0;
  }

  put(item: MailItem, now_ms: number): void {
    if (item.kind === "command") this.#arrived_ms.set(item, now_ms);
    this.#items.push(item);
  }
  /** Before everything else, in this order. */
  put_back(...items: readonly MailItem[]): void {
    this.#items.unshift(...items);
  }

  /** The first item that may be taken now. */
  take(): MailItem | undefined {
    if (!this.commands_wait) return this.#items.shift();
    const index = this.#items.findIndex((item) => item.kind === "entry");
    return index < 0 ? undefined : this.#items.splice(index, 1)[0];
  }
  /** When a command was first put in. */
  arrived_ms(item: MailItem): number | undefined {
    return this.#arrived_ms.get(item);
  }

  /** The inbox begins again from its first unacknowledged message: what waits here of it will come again. */
  forget_commands(): void {
    const kept = this.#items.filter((item) => item.kind === "entry" || item.source === undefined);
    this.#items.splice(0, this.#items.length, ...kept);
  }
  clear(): void {
    this.#items.length = 0;
  }
}
