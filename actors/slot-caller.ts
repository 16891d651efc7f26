// slot-caller: hears in the budgets' live journals whose turn it is for a slot, and wakes the call of this process that waits for it.
//
// What is not heard costs time and nothing else: who stands in line asks again by itself (LINE_ASK_MS of state-machines/budget.ts).
import type { Bus } from "../bus/port.ts";
import { decodeJournal } from "../protocol/journal.ts";

export interface SlotCaller {
  /** `wake` is called whenever it is this hold's turn, until the answer is called. */
  listen(hold: string, wake: () => void): () => void;
  stop(): Promise<void>;
}

export function createSlotCaller(bus: Pick<Bus, "subscribe">): SlotCaller {
  const waiting = new Map<string, () => void>();
  const subscription = bus.subscribe("live.tenant.*.budget.main.event", ({ data }) => {
    // While nobody here waits, no budget's journal is read at all.
    if (waiting.size === 0) return;
    for (const event of decodeJournal(data).events)
      if (event.type === "slot.free") for (const hold of event["next"] as readonly string[]) waiting.get(hold)?.();
  });
  return {
    listen(hold, wake) {
      waiting.set(hold, wake);
      return () => {
        if (waiting.get(hold) === wake) waiting.delete(hold);
      };
    },
    stop: () => subscription.stop(),
  };
}
