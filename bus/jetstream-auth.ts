// auth: the broker's question "who is this?", answered by us. For every client that no login of the configuration admits, the broker asks
// on $SYS.REQ.USER.AUTH of the account made for it; the answer is a user token signed with the deployment's issuer key.
//
//   client ──token or password──▶ broker ──sealed question──▶ one of the gateways ──decide──▶ sealed answer ──▶ in, with exactly these permissions
//
// Invariants:
//   U1. A question that cannot be opened, is not from a broker, or whose decision fails is answered with a refusal, or not at all: never with a yes.
//   U2. What the client showed is handed to `decide` and to nobody else: not logged, not kept.
//   U3. At most QUESTIONS_AT_ONCE_MAX are being decided; the broker refuses by itself what gets no answer in time.
import { decode, encodeAuthorizationResponse, encodeUser, type User } from "@nats-io/jwt";
import { createAccount, createCurve, fromPublic, fromSeed, type KeyPair } from "@nats-io/nkeys";
import { z } from "zod";
import { errorFields } from "../protocol/log.ts";
import { guarded, type LinkOptions, openLink } from "./jetstream-link.ts";

const AUTH_SUBJECT = "$SYS.REQ.USER.AUTH";
const AUTH_QUEUE = "auth";
const EXCHANGE_KEY_HEADER = "Nats-Server-Xkey";
/** Ed25519 and a cached record decide thousands a second; above this the broker's own time limit is the better queue. */
const QUESTIONS_AT_ONCE_MAX = 256;
/** Live subscriptions of one connection. A client that listens to thousands of sessions subscribes with wildcards. */
const SUBSCRIPTIONS_MAX = 1_000;

/** Who wants to connect, as far as the client says. */
export interface Knock {
  readonly user?: string;
  readonly password?: string;
  readonly token?: string;
  readonly host: string;
}

export type Admission =
  | {
      readonly kind: "admitted";
      /** The broker's account that the client is put into. */
      readonly account: string;
      /** What the broker's events and monitoring call the user. */
      readonly name: string;
      readonly publish: readonly string[];
      readonly subscribe: readonly string[];
      /** Not heard, though `subscribe` covers it. */
      readonly unheard: readonly string[];
      /** Then the broker closes the connection. */
      readonly expires_at_ms: number;
    }
  | { readonly kind: "refused"; readonly reason: string };

export interface AuthKeys {
  /** Signs the answers; the broker's configuration names its public half. */
  readonly issuer_seed: string;
  /** Seals question and answer. */
  readonly exchange_seed: string;
}

export interface AuthOptions extends AuthKeys, LinkOptions {
  /** Who answers for logins. */
  readonly user: string;
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** Fresh keys of a deployment. */
export function createAuthKeys(): AuthKeys {
  const seedOf = (pair: KeyPair): string => decoder.decode(pair.getSeed());
  return { issuer_seed: seedOf(createAccount()), exchange_seed: seedOf(createCurve()) };
}

/** What the broker's configuration says of the keys. Throws on a seed that is none. */
export function publicAuthKeys({ issuer_seed, exchange_seed }: AuthKeys): { issuer: string; exchange: string } {
  const publicOf = (seed: string): string => fromSeed(encoder.encode(seed)).getPublicKey();
  return { issuer: publicOf(issuer_seed), exchange: publicOf(exchange_seed) };
}

const question = z.object({
  aud: z.literal("nats-authorization-request"),
  nats: z.object({
    server_id: z.object({ id: z.string().min(1) }),
    user_nkey: z.string().min(1),
    client_info: z.object({ host: z.string().default("") }).default({ host: "" }),
    connect_opts: z.object({ user: z.string().optional(), pass: z.string().optional(), auth_token: z.string().optional() }).default({}),
  }),
});

/** Answers the broker's questions until it is closed. Rejects when it cannot connect. */
export async function answerAuth(options: AuthOptions, decide: (knock: Knock) => Promise<Admission>): Promise<{ close(): Promise<void> }> {
  const { log, world } = options;
  const issuer = fromSeed(encoder.encode(options.issuer_seed));
  const exchange = fromSeed(encoder.encode(options.exchange_seed));
  const link = await openLink(options);
  let deciding = 0;

  async function answer(data: Uint8Array, reply: string, server_key: string): Promise<void> {
    const opened = exchange.open(data, server_key);
    if (opened === null) return log.error("a question about a login cannot be opened: the broker's configuration has another exchange key", {}); // U1
    const read = question.safeParse(decode(decoder.decode(opened)));
    if (!read.success) return log.error("a question about a login cannot be read", {}); // U1
    const { server_id, user_nkey, client_info, connect_opts } = read.data.nats;
    const { user, pass, auth_token } = connect_opts;
    let admission: Admission;
    try {
      admission = await decide({
        host: client_info.host,
        ...(user === undefined || user === "" ? {} : { user }),
        ...(pass === undefined || pass === "" ? {} : { password: pass }),
        ...(auth_token === undefined || auth_token === "" ? {} : { token: auth_token }),
      });
    } catch (error) {
      log.warn("a login cannot be decided", errorFields(error)); // U1
      admission = { kind: "refused", reason: "it cannot be decided now" };
    }
    const who = fromPublic(user_nkey);
    const said =
      admission.kind === "refused"
        ? { error: admission.reason }
        : {
            jwt: await encodeUser(admission.name, who, issuer, permissionsOf(admission), {
              aud: admission.account,
              exp: Math.floor(admission.expires_at_ms / 1000),
            }),
          };
    const response = await encodeAuthorizationResponse(who, fromPublic(server_id.id), issuer, said, {});
    link.send(reply, exchange.seal(encoder.encode(response), server_key));
  }

  link.listen(
    AUTH_SUBJECT,
    (message) => {
      const { reply, data } = message;
      const server_key = message.headers?.get(EXCHANGE_KEY_HEADER) ?? "";
      if (reply === undefined || server_key === "")
        return log.error("a question about a login is not sealed: the broker's configuration has no exchange key", {});
      if (deciding >= QUESTIONS_AT_ONCE_MAX) return log.warn("too many logins at once; one was left to the broker's time limit", {}); // U3
      deciding += 1;
      guarded(log, "a login met a bug of ours", {}, () => answer(data, reply, server_key).finally(() => (deciding -= 1)));
    },
    AUTH_QUEUE,
  );
  await link.flush();
  log.debug("answers the broker's questions about logins", { at_ms: world.now_ms() });
  return { close: () => link.close() };
}

function permissionsOf({ publish, subscribe, unheard }: Admission & { kind: "admitted" }): Partial<User> {
  // An empty list would mean "everything" to the broker, so nothing is said as a list that forbids all.
  const allowing = (allow: readonly string[], deny: readonly string[]): { allow?: string[]; deny?: string[] } =>
    allow.length === 0 ? { deny: [">"] } : { allow: [...allow], ...(deny.length === 0 ? {} : { deny: [...deny] }) };
  return {
    pub: allowing(publish, []),
    sub: allowing(subscribe, unheard),
    subs: SUBSCRIPTIONS_MAX,
    data: -1,
    payload: -1,
    allowed_connection_types: ["STANDARD", "WEBSOCKET"],
  } as Partial<User>;
}
