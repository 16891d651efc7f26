// edge-accounts: which account of the broker a tenant's clients live in. The broker has a fixed number of them, EDGE_0 … EDGE_{n-1}, all alike and
// empty; a tenant is given one when its first client comes, and keeps it for ever.
//
// One account for each tenant, because the broker does not check the *reply* subject of a publish: in a shared account one tenant's
// acknowledgements and history could be sent to another's inbox, or as another's live events (docs/decisions/0004-edge-accounts.md).
//
// Invariants:
//   E1. Two tenants never have the same account: an account's owner is written by compare-and-set, once, and never changed.
//   E2. Whoever gives takes the lowest free account, so two gateways that serve a tenant's first two clients meet at the same one.
import type { Bus } from "../bus/port.ts";
import { isId } from "../protocol/ids.ts";

export interface EdgeAccounts {
  /** The account of a tenant. `full`: all are given; the cell needs more, or the tenant a cell of its own. Rejects when the bus cannot answer. */
  accountOf(tenant: string): Promise<{ readonly kind: "account"; readonly name: string } | { readonly kind: "full" }>;
  /** The account, if it was given one already. Rejects when the bus cannot answer. */
  givenAccountOf(tenant: string): Promise<string | undefined>;
}

export const edgeAccountName = (index: number): string => `EDGE_${index}`;
const keyOf = (index: number): string => String(index);

export function createEdgeAccounts({ bus, count }: { bus: Pick<Bus, "bucket">; count: number }): EdgeAccounts {
  const known = new Map<string, number>();
  const bucket = bus.bucket("EDGE");

  async function read(): Promise<Set<number>> {
    const taken = new Set<number>();
    for (const { key, value } of await bucket.all()) {
      const index = Number(key);
      const tenant = new TextDecoder().decode(value);
      taken.add(index);
      if (isId(tenant) && Number.isInteger(index)) known.set(tenant, index);
    }
    return taken;
  }

  async function give(tenant: string): Promise<number | undefined> {
    for (;;) {
      const taken = await read();
      const has = known.get(tenant);
      if (has !== undefined) return has;
      let index = 0;
      while (taken.has(index)) index += 1; // E2
      if (index >= count) return undefined;
      const outcome = await bucket.create(keyOf(index), new TextEncoder().encode(tenant)); // E1
      if (outcome.kind === "unavailable") throw new Error(`no account can be given now: ${outcome.reason}`);
      // Won or lost, what stands there now is read before it is believed.
    }
  }

  return {
    async accountOf(tenant) {
      const index = known.get(tenant) ?? (await give(tenant));
      return index === undefined || index >= count ? { kind: "full" } : { kind: "account", name: edgeAccountName(index) };
    },
    async givenAccountOf(tenant) {
      if (!known.has(tenant)) await read();
      const index = known.get(tenant);
      return index === undefined ? undefined : edgeAccountName(index);
    },
  };
}
