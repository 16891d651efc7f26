// nats-auth: whether a client may come onto the bus, and what it may do there. The policy; the wire is bus/jetstream-auth.ts.
//
//   knock {token | password} ──authenticate──▶ principal ──scopes──▶ permissions in the tenant's own account ──▶ in
//   the tenant's record changes ──▶ who of its clients may not stay is shown out
//
// A client shows its credential as `token`, or as the password of any user name.
//
// Invariants:
//   N1. A client is put into its tenant's account and no other, with permissions on subjects that name its tenant and no other.
//   N2. A scope that is not granted is a permission that is not given: without sessions:read nothing is heard but answers,
//       without sessions:write no command is taken.
//   N3. A credential that was revoked, has expired or belongs to a suspended tenant loses its connections: at once when a gateway hears of
//       it, with the token's end (TOKEN_LIFE_MS) at the latest.
//   N4. Operators come in with the broker's own logins; no operator's key opens the bus here.
//   N5. Of a tenant with so much waiting that more is refused no commands are taken: its clients come in without the permission to say any.
import { timingSafeEqual } from "node:crypto";
import type { TenantRecord } from "../actors/directory.ts";
import type { Admission, Knock } from "../bus/jetstream-auth.ts";
import type { Warden } from "../bus/jetstream-warden.ts";
import type { Bus, Subscription } from "../bus/port.ts";
import { standInPassword, standInTenant } from "../protocol/api-key.ts";
import { isId } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { grantedByKey, type Scope } from "../protocol/scopes.ts";
import { parseActorSubject, replaySubject, tenantCommandFilters, tenantInboxPrefix, tenantLiveFilter, tenantOwnLiveFilter } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import { authenticate, type AuthenticationDeps } from "./authenticate.ts";
import type { EdgeAccounts } from "./edge-accounts.ts";

/** A connection that nobody heard to show out ends after this and comes again with the same credential, if it still counts. */
const TOKEN_LIFE_MS = 60 * 60_000;
/** One more look after the first: a client that was admitted while the change was on its way connects a moment later. */
const ROUNDS_MIN = 2;
/** Connections are shown out page by page; after this many pages somebody connects faster than we show out, and the next change goes on. */
const ROUNDS_MAX = 20;

export interface NatsAuthDeps extends AuthenticationDeps {
  readonly accounts: EdgeAccounts;
  readonly metrics: Metrics;
  readonly log: Log;
  /** Has this tenant so much waiting that no more commands are taken? Absent: nobody has. */
  readonly crowded?: (tenant: string) => boolean;
  /** Of a development machine: its logins `tenant-{t}` are admitted too. */
  readonly stand_in_secret?: string;
}

/** What the principal of a tenant may do on the bus. */
export function tenantPermissions(tenant: string, scopes: ReadonlySet<Scope>): { publish: string[]; subscribe: string[]; unheard: string[] } {
  const reads = scopes.has("sessions:read");
  return {
    publish: [...(scopes.has("sessions:write") ? tenantCommandFilters(tenant) : []), ...(reads ? [replaySubject(tenant)] : [])],
    subscribe: [...(reads ? [tenantLiveFilter(tenant)] : []), `${tenantInboxPrefix(tenant)}>`],
    unheard: reads && !scopes.has("admin") ? [tenantOwnLiveFilter(tenant)] : [],
  };
}

/** The decision of N1, N2, N4 for one client. */
export function createNatsAuth(deps: NatsAuthDeps): (knock: Knock) => Promise<Admission> {
  const { accounts, metrics, log, now_ms, stand_in_secret } = deps;

  function refuse(outcome: "unauthenticated" | "forbidden" | "unavailable" | "full", host: string, tenant?: string): Admission {
    metrics.add("troupe_nats_logins_total", { outcome });
    log.warn("a client was not let onto the bus", { reason: outcome, host, ...(tenant === undefined ? {} : { tenant }) });
    return { kind: "refused", reason: outcome };
  }

  async function admit(tenant: string, name: string, scopes: ReadonlySet<Scope>, ends_at_ms: number | null, host: string): Promise<Admission> {
    const account = await accounts.accountOf(tenant);
    if (account.kind === "full") {
      log.error("every account of the edge is given: configure more, or give the tenant a cell of its own", { tenant });
      return refuse("full", host, tenant);
    }
    metrics.add("troupe_nats_logins_total", { outcome: "admitted" });
    const may = deps.crowded?.(tenant) === true ? new Set([...scopes].filter((scope) => scope !== "sessions:write")) : scopes; // N5
    const expires_at_ms = Math.min(ends_at_ms ?? Number.MAX_SAFE_INTEGER, now_ms() + TOKEN_LIFE_MS);
    return { kind: "admitted", account: account.name, name, ...tenantPermissions(tenant, may), expires_at_ms };
  }

  async function standIn({ user, password, host }: Knock): Promise<Admission | undefined> {
    const tenant = user === undefined ? undefined : standInTenant(user);
    if (stand_in_secret === undefined || tenant === undefined || password === undefined) return undefined;
    const wanted = Buffer.from(standInPassword(stand_in_secret, tenant));
    const shown = Buffer.from(password);
    if (shown.length !== wanted.length || !timingSafeEqual(shown, wanted)) return undefined;
    const record = await deps.tenantOf(tenant);
    if (record === undefined || record.state === "closed") return refuse("unauthenticated", host);
    if (record.state !== "active") return refuse("forbidden", host, tenant);
    return admit(tenant, STAND_IN_NAME, grantedByKey([], "tenant"), null, host);
  }

  return async (knock) => {
    try {
      const stand_in = await standIn(knock);
      if (stand_in !== undefined) return stand_in;
      const authentication = await authenticate(knock.token ?? knock.password, deps);
      if (authentication.kind === "refused") {
        const { code } = authentication.error;
        return refuse(code === "forbidden" || code === "unavailable" ? code : "unauthenticated", knock.host);
      }
      const { kind, tenant, name, scopes, expires_at_ms } = authentication.principal;
      if (kind !== "tenant") return refuse("forbidden", knock.host, tenant); // N4
      return await admit(tenant, name, scopes, expires_at_ms, knock.host);
    } catch (error) {
      log.warn("a client's credential cannot be judged now", errorFields(error));
      return refuse("unavailable", knock.host);
    }
  };
}

const STAND_IN_NAME = "stand-in";

/** May a connection that was admitted under this name stay, as the tenant's record stands now? A JWT's end is the broker's to keep. */
function mayStay(name: string, record: TenantRecord | undefined, now_ms: number): boolean {
  if (record === undefined || record.state !== "active") return false;
  if (!name.startsWith("key:")) return true;
  const key_id = name.slice("key:".length);
  const key = isId(key_id) && Object.hasOwn(record.keys, key_id) ? record.keys[key_id] : undefined;
  return key !== undefined && key.revoked_at_ms === null && (key.expires_at_ms ?? Number.MAX_SAFE_INTEGER) > now_ms;
}

/** N3: shows clients out when their tenant's record says so. Every gateway does; showing out twice is showing out once. */
export function keepOutWhoMayNotStay(deps: {
  readonly bus: Bus;
  readonly tenantOf: (id: string) => Promise<TenantRecord | undefined>;
  readonly accounts: EdgeAccounts;
  readonly warden: Warden;
  readonly world: World;
  readonly metrics: Metrics;
  readonly log: Log;
}): Subscription & {
  /** Ends the connections of a tenant: they come again, and may do what they may then. */
  admitAnew(tenant: string): Promise<void>;
} {
  const { bus, tenantOf, accounts, warden, world, metrics, log } = deps;
  const waiting = new Set<string>();
  let working: Promise<void> | undefined;
  let stopped = false;

  async function showOut(tenant: string): Promise<void> {
    const account = await accounts.givenAccountOf(tenant);
    if (account === undefined) return;
    for (let round = 0; round < ROUNDS_MAX && !stopped; round += 1) {
      const record = await tenantOf(tenant);
      const leaving = (await warden.connections(account)).filter(({ name }) => !mayStay(name, record, world.now_ms()));
      if (leaving.length === 0 && round + 1 >= ROUNDS_MIN) return;
      if (leaving.length === 0) continue;
      await Promise.all(leaving.map((connection) => warden.kick(connection)));
      metrics.add("troupe_nats_connections_ended_total", {}, leaving.length);
      log.info("connections of a tenant were ended: their credential counts no more", { tenant, connections: leaving.length });
    }
  }

  async function work(): Promise<void> {
    for (const tenant of waiting) {
      waiting.delete(tenant);
      try {
        await showOut(tenant);
      } catch (error) {
        log.warn("the connections of a tenant cannot be looked through now", { tenant, ...errorFields(error) });
      }
    }
    working = undefined;
  }

  const heard = bus.subscribe("live.tenant.*.tenant.main.event", ({ subject }) => {
    const parsed = parseActorSubject(subject);
    // A tenant that never came has no account here, and nobody to show out.
    if (parsed.kind !== "actor" || stopped) return;
    waiting.add(parsed.actor.tenant);
    working ??= work();
  });
  return {
    async admitAnew(tenant) {
      try {
        const account = stopped ? undefined : await accounts.givenAccountOf(tenant);
        // Twice: who was admitted before the change may have connected after the first look.
        for (let round = 0; account !== undefined && round < ROUNDS_MIN && !stopped; round += 1) {
          const leaving = await warden.connections(account);
          await Promise.all(leaving.map((connection) => warden.kick(connection)));
          metrics.add("troupe_nats_connections_ended_total", {}, leaving.length);
        }
      } catch (error) {
        log.warn("the connections of a tenant cannot be ended now", { tenant, ...errorFields(error) });
      }
    },
    async stop() {
      stopped = true;
      await heard.stop();
      await working;
    },
  };
}
