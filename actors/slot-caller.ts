// slot-caller: hears in the budgets' live journals whose turn it is for a slot, and that something came back to a provider's window, and wakes
// the call of this process that waits for it.
//
// What is not heard costs time and nothing else: who stands in line asks again by itself (LINE_ASK_MS of state-machines/budget-line.ts), and who waits
// for a window when it was told to.
import type { Bus } from "../bus/port.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { parseActorSubject } from "../protocol/subjects.ts";

export interface SlotCaller {
  /** `wake` is called whenever it is this hold's turn, until the answer is called. */
  listen(hold: string, wake: () => void): () => void;
  /** `wake` is called when something came back to the window, until the answer is called. Of those that wait here, the first: the next hears the next. */
  listenWindow(tenant: string, provider: string, wake: () => void): () => void;
  stop(): Promise<void>;
}

export function createSlotCaller(bus: Pick<Bus, "subscribe">): SlotCaller {
  const waiting = new Map<string, () => void>();
  const windows = new Map<string, Set<() => void>>();
  const subscription = bus.subscribe("live.tenant.*.budget.main.event", ({ subject, data }) => {
    // While nobody here waits, no budget's journal is read at all.
    if (waiting.size === 0 && windows.size === 0) return;
    const parsed = parseActorSubject(subject);
    for (const event of decodeJournal(data).events) {
      if (event.type === "slot.free") for (const hold of event["next"] as readonly string[]) waiting.get(hold)?.();
      if (parsed.kind !== "actor") continue;
      for (const { provider } of (event["rates_unused"] ?? []) as readonly JsonObject[]) {
        const [first] = windows.get(`${parsed.actor.tenant}/${String(provider)}`) ?? [];
        first?.();
      }
    }
  });
  return {
    listen(hold, wake) {
      waiting.set(hold, wake);
      return () => {
        if (waiting.get(hold) === wake) waiting.delete(hold);
      };
    },
    listenWindow(tenant, provider, wake) {
      const name = `${tenant}/${provider}`;
      const here = windows.get(name) ?? new Set();
      windows.set(name, here.add(wake));
      return () => {
        here.delete(wake);
        if (here.size === 0 && windows.get(name) === here) windows.delete(name);
      };
    },
    stop: () => subscription.stop(),
  };
}
