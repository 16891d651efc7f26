// warden: who is connected in an account of the broker, and the way to end such a connection. Speaks with the broker's system account.
import { z } from "zod";
import { pause } from "../protocol/world.ts";
import { type LinkOptions, openLink, parseJson } from "./jetstream-link.ts";

export interface Warden {
  /** Who is connected in an account, on every server that answers in time. Pages of CONNECTIONS_MAX a server: kick and ask again. */
  connections(account: string): Promise<readonly WardenedConnection[]>;
  /** Ends one connection; it may be gone already. Answers when its server has heard, or does not answer. */
  kick(connection: WardenedConnection): Promise<void>;
  close(): Promise<void>;
}

export interface WardenedConnection {
  readonly server: string;
  readonly id: number;
  /** As the broker was told when it was admitted. */
  readonly name: string;
}

/** What one server lists at once. */
const CONNECTIONS_MAX = 1024;
/** All servers of a cluster answer within this, or are cut off from it. */
const ROLL_CALL_MS = 500;

const listing = z.object({
  server: z.object({ id: z.string() }),
  data: z.object({ connections: z.array(z.object({ cid: z.number(), authorized_user: z.string().default("") })).default([]) }),
});

/** `user` is one of the system account. Rejects when it cannot connect. */
export async function openWarden(options: LinkOptions & { readonly user: string }): Promise<Warden> {
  const link = await openLink({ ...options, inbox_prefix: "_INBOX_warden" });
  let calls = 0;
  const bytes = (value: object): Uint8Array => new TextEncoder().encode(JSON.stringify(value));
  return {
    async connections(account) {
      const found: WardenedConnection[] = [];
      const reply = `_INBOX_warden.roll.${(calls += 1)}`;
      const listening = link.listen(reply, ({ data }) => {
        const read = listing.safeParse(parseJson(data));
        if (!read.success) return;
        const { server, data: page } = read.data;
        for (const { cid, authorized_user } of page.connections) found.push({ server: server.id, id: cid, name: authorized_user });
      });
      link.send("$SYS.REQ.SERVER.PING.CONNZ", bytes({ acc: account, auth: true, limit: CONNECTIONS_MAX }), undefined, reply);
      await pause(options.world, ROLL_CALL_MS);
      listening.stop();
      return found;
    },
    async kick({ server, id }) {
      // Asked, not told: the broker does nothing about a request that nobody waits for.
      await link.ask(`$SYS.REQ.SERVER.${server}.KICK`, bytes({ cid: id }), { patience_ms: ROLL_CALL_MS });
    },
    close: () => link.close(),
  };
}
