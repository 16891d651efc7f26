// connection-watch: who is connected to the broker, as the broker itself tells it. The port, and the same in memory for tests.
//
// Promises:
//   V1. An event is told at most once, in the order in which the broker told it; some may be missing, so it is a sign and never the truth.
//   V2. `reset` is told when events may have been missed (our own connection was away): what was known of connections counts no more.
//   V3. A listener that throws is logged and harms no other.
import type { Subscription } from "./port.ts";

/** Why a connection ended. `client`: its own side closed or broke it, as a process that dies does. `broker`: the broker let go of it. */
export type EndedBy = "client" | "broker";

export type ConnectionEvent =
  | { readonly kind: "connected"; readonly name: string; readonly client_id: string }
  /** `reason` in the broker's words. */
  | { readonly kind: "disconnected"; readonly name: string; readonly client_id: string; readonly reason: string; readonly by: EndedBy }
  | { readonly kind: "reset" };

export interface ConnectionWatch {
  on(listener: (event: ConnectionEvent) => void): Subscription;
  close(): Promise<void>;
}

/** The name of a process's second, idle connection: when both are gone, the process is. No id holds a dot, so no worker is called like it. */
export const lifelineName = (name: string): string => `${name}.life`;

export interface MemoryConnectionWatch extends ConnectionWatch {
  tell(event: ConnectionEvent): void;
}

export function createMemoryConnectionWatch(): MemoryConnectionWatch {
  const listeners = new Set<(event: ConnectionEvent) => void>();
  return {
    on(listener) {
      listeners.add(listener);
      return { stop: async () => void listeners.delete(listener) };
    },
    async close() {
      listeners.clear();
    },
    tell(event) {
      for (const listener of [...listeners]) listener(event);
    },
  };
}
