// system: what the broker tells in its own account of the connections to it, and a process's lifeline. The adapter of connection-watch.ts.
//
// A process that is killed loses its sockets with it: the broker says so about 4 ms later. A process that is stopped or stuck keeps
// them, and only its lease tells.
import { z } from "zod";
import type { ConnectionEvent, ConnectionWatch, EndedBy } from "./connection-watch.ts";
import { guarded, type LinkOptions, openLink, parseJson } from "./jetstream-link.ts";

const notice = z.object({
  server: z.object({ id: z.string().default("") }).default({ id: "" }),
  client: z.object({ id: z.number(), name: z.string().default("") }),
  reason: z.string().default(""),
});

/** The broker's words for an end that began at the client's side. All others are the broker's own doing, and say nothing of the process. */
const ENDED_BY_CLIENT: ReadonlySet<string> = new Set(["Client Closed", "Read Error", "Write Error"]);

/** Listens to the connections of one account. `user` must be one of the system account. Rejects when it cannot connect. */
export async function watchConnections(options: LinkOptions & { readonly account: string }): Promise<ConnectionWatch> {
  const { log, account } = options;
  const link = await openLink(options);
  const listeners = new Set<(event: ConnectionEvent) => void>();
  const tell = (event: ConnectionEvent): void => {
    for (const listener of [...listeners]) guarded(log, "a listener of connections threw", { kind: event.kind }, () => listener(event));
  };
  const hear = (kind: "connected" | "disconnected", data: Uint8Array): void => {
    const read = notice.safeParse(parseJson(data));
    if (!read.success) {
      log.warn("a notice of the broker cannot be read", { kind });
      return;
    }
    const { server, client, reason } = read.data;
    const client_id = `${server.id}/${client.id}`;
    const by: EndedBy = ENDED_BY_CLIENT.has(reason) ? "client" : "broker";
    tell(kind === "connected" ? { kind, name: client.name, client_id } : { kind, name: client.name, client_id, reason, by });
  };
  link.listen(`$SYS.ACCOUNT.${account}.CONNECT`, ({ data }) => hear("connected", data));
  link.listen(`$SYS.ACCOUNT.${account}.DISCONNECT`, ({ data }) => hear("disconnected", data));
  link.onState(() => tell({ kind: "reset" }));
  await link.flush();
  return {
    on(listener) {
      listeners.add(listener);
      return { stop: async () => void listeners.delete(listener) };
    },
    close: () => link.close(),
  };
}

/** An idle connection that stands for as long as this process does. */
export async function holdLifeline(options: LinkOptions): Promise<{ close(): Promise<void> }> {
  const link = await openLink(options);
  return { close: () => link.close() };
}
