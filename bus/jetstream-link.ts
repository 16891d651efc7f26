// link: one connection to the broker, and questions over it. Everything else of the JetStream adapter asks through here.
//
//   connected ──socket lost──▶ disconnected ──dialled again──▶ connected      (for ever; only close() ends it)
//
// Invariants:
//   L1. A question ends: answered, refused by name, nobody listens, or silence within its patience. It never throws.
//   L2. Losing the connection ends every open question at once: its answer can no longer arrive.
//   L3. Nothing of ours throws inside a callback of the client: it would stop its read loop without a word.
//   L4. While disconnected nothing is handed to the client, which would send it whenever it is back; questions wait instead.
import { readFileSync } from "node:fs";
import {
  type Authenticator,
  connect,
  createInbox,
  credsAuthenticator,
  headers as newHeaders,
  type Msg,
  type MsgHdrs,
  type NatsConnection,
  nkeyAuthenticator,
} from "@nats-io/transport-node";
import { errorFields, type Log } from "../protocol/log.ts";
import { pause, type World } from "../protocol/world.ts";
import type { ConnectionState, Headers, Subscription } from "./port.ts";

/** Files in PEM: the authorities that vouch for the broker, and our own certificate where the broker asks for one. */
export interface LinkTls {
  readonly ca_file?: string;
  readonly cert_file?: string;
  readonly key_file?: string;
}

export interface LinkOptions {
  readonly servers: string | readonly string[];
  readonly user?: string;
  readonly password?: string;
  readonly token?: string;
  /** A file with a user's JWT and its key (`.creds`), or with the seed of an nkey alone; instead of user and password. Read anew at every connection. */
  readonly creds_file?: string;
  /** The connection is encrypted, and the broker is who one of these authorities says. */
  readonly tls?: LinkTls;
  /** The connection's name, as the broker's events and monitoring show it. */
  readonly name: string;
  /** Answers come to subjects under it. Default `_INBOX`. */
  readonly inbox_prefix?: string;
  /** How long the first connection is tried before it is an error. Default 30 s. */
  readonly first_connection_patience_ms?: number;
  readonly log: Log;
  readonly world: World;
}

/** What came of a question. */
export type Answer =
  | { readonly kind: "answer"; readonly message: Msg }
  /** The broker knows of no listener: it was not taken. */
  | { readonly kind: "nobody" }
  /** Larger than the broker's `max_payload`: it was not sent. */
  | { readonly kind: "too_large" }
  /** It was not sent at all. */
  | { readonly kind: "not_sent"; readonly reason: string }
  /** It was sent, and no answer will come: it may have been done. */
  | { readonly kind: "silence"; readonly reason: string };

export interface ApiError {
  readonly code: number;
  readonly err_code: number;
  readonly description: string;
}
export type ApiAnswer<T> =
  | { readonly kind: "ok"; readonly value: T }
  | { readonly kind: "error"; readonly error: ApiError }
  | { readonly kind: "unavailable"; readonly reason: string };

interface Question {
  readonly resolve: (answer: Answer) => void;
  readonly expires_at_ms: number;
}

export const REQUEST_PATIENCE_MS = 5_000;
const FLUSH_PATIENCE_MS = 2_000;
/** Finer than anybody waits, coarser than it costs. */
const SWEEP_EVERY_MS = 50;
/** Two of these missed and the connection is dialled anew: a broker that hangs is noticed in 15 s. */
const PING_EVERY_MS = 5_000;
const PINGS_MISSED_MAX = 2;
const RECONNECT_WAIT_MS = 100;
const FIRST_CONNECTION_PATIENCE_MS = 30_000;
/** One attempt. A broker that misses our certificate says so after the handshake, where the client does not hear it and waits out its time (20 s by itself). */
const DIAL_PATIENCE_MS = 5_000;
/** Between repeats of a question to a broker that is starting or electing. */
const RETRY_FIRST_MS = 25;
const RETRY_MAX_MS = 400;

/** Codes by which the broker says "not now": no leader, starting, catching up. */
const NOT_NOW_CODES: ReadonlySet<number> = new Set([10008, 10009, 10039, 10076, 10118, 10119]);

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** Connects, or rejects with a sentence when that fails for `first_connection_patience_ms` or the credentials are refused. */
export async function openLink(options: LinkOptions): Promise<Link> {
  const { world, log } = options;
  const give_up_at_ms = world.monotonic_ms() + (options.first_connection_patience_ms ?? FIRST_CONNECTION_PATIENCE_MS);
  const authenticator = options.creds_file === undefined ? undefined : signing(options.creds_file);
  for (;;) {
    try {
      const connection = await connect({
        servers: typeof options.servers === "string" ? options.servers.split(",") : [...options.servers],
        name: options.name,
        ...(options.user === undefined ? {} : { user: options.user }),
        ...(options.password === undefined ? {} : { pass: options.password }),
        ...(options.token === undefined ? {} : { token: options.token }),
        ...(authenticator === undefined ? {} : { authenticator }),
        ...(options.tls === undefined ? {} : { tls: tlsOf(options.tls) }),
        timeout: DIAL_PATIENCE_MS,
        inboxPrefix: options.inbox_prefix ?? "_INBOX",
        maxReconnectAttempts: -1,
        reconnectTimeWait: RECONNECT_WAIT_MS,
        reconnectJitter: RECONNECT_WAIT_MS,
        pingInterval: PING_EVERY_MS,
        maxPingOut: PINGS_MISSED_MAX,
        // Traces of every request cost a third of the publish rate, and show only the client's own code.
        noAsyncTraces: true,
        // A user whose password is changed while we run is an outage to be reported, not a reason to stop for ever.
        ignoreAuthErrorAbort: true,
      });
      return new Link(connection, options);
    } catch (error) {
      const refused = error instanceof Error && error.name === "AuthorizationError";
      if (refused || world.monotonic_ms() >= give_up_at_ms)
        throw new Error(`cannot connect to NATS at ${String(options.servers)} as '${options.name}'`, { cause: error });
      log.debug("NATS does not answer yet", errorFields(error));
      await pause(world, RECONNECT_WAIT_MS);
    }
  }
}

/** Signs the broker's nonce with the key of a file. While the file cannot be read, with what it last held: it may be being replaced. */
function signing(file: string): Authenticator {
  let held = readFileSync(file);
  return (nonce) => {
    try {
      held = readFileSync(file);
    } catch {
      // What it held counts until the broker says otherwise.
    }
    const bears_jwt = held.includes("BEGIN NATS USER JWT");
    return (bears_jwt ? credsAuthenticator(held) : nkeyAuthenticator(encoder.encode(decoder.decode(held).trim())))(nonce);
  };
}

function tlsOf({ ca_file, cert_file, key_file }: LinkTls): { caFile?: string; certFile?: string; keyFile?: string } {
  return {
    ...(ca_file === undefined ? {} : { caFile: ca_file }),
    ...(cert_file === undefined ? {} : { certFile: cert_file }),
    ...(key_file === undefined ? {} : { keyFile: key_file }),
  };
}

export class Link {
  readonly connection: NatsConnection;
  readonly world: World;
  readonly log: Log;
  readonly inbox_prefix: string;
  #state: ConnectionState = "connected";
  #closed = false;
  #answers_prefix: string;
  #questions = new Map<string, Question>();
  #question_count = 0;
  #stop_sweep: (() => void) | undefined;
  #state_listeners = new Set<(state: ConnectionState) => unknown>();

  constructor(connection: NatsConnection, options: LinkOptions) {
    this.connection = connection;
    this.world = options.world;
    this.log = options.log;
    this.inbox_prefix = options.inbox_prefix ?? "_INBOX";
    this.#answers_prefix = `${createInbox(this.inbox_prefix)}.`;
    this.listen(`${this.#answers_prefix}*`, (message) => this.#hear(message));
    void this.#watchState();
  }

  get state(): ConnectionState {
    return this.#state;
  }
  get closed(): boolean {
    return this.#closed;
  }

  onState(listener: (state: ConnectionState) => unknown): Subscription {
    this.#state_listeners.add(listener);
    return { stop: async () => void this.#state_listeners.delete(listener) };
  }

  /** Answers whether it is connected, at the latest after `patience_ms`. */
  async connectedWithin(patience_ms: number): Promise<boolean> {
    if (this.#state === "connected" || this.#closed || patience_ms <= 0) return this.#state === "connected" && !this.#closed;
    return new Promise((resolve) => {
      const finish = (): void => {
        cancel();
        this.#state_listeners.delete(finish);
        resolve(this.#state === "connected" && !this.#closed);
      };
      const cancel = this.world.after(patience_ms, finish);
      this.#state_listeners.add(finish);
    });
  }

  /** A raw subscription whose listener cannot hurt the connection (L3). */
  listen(subject: string, listener: (message: Msg) => void, queue?: string): { stop(): void } {
    const subscription = this.connection.subscribe(subject, {
      ...(queue === undefined ? {} : { queue }),
      callback: (error, message) => {
        if (error !== null) return this.log.error("the broker refused a subscription", { subject, ...errorFields(error) });
        guarded(this.log, "a listener threw", { subject }, () => listener(message));
      },
    });
    return { stop: () => void (subscription.isClosed() || subscription.unsubscribe()) };
  }

  /** Hands a message to the client. False when it did not take it; then it was not sent. */
  send(subject: string, data: Uint8Array, headers?: MsgHdrs, reply?: string): boolean {
    if (this.#closed || this.#state === "disconnected") return false;
    try {
      this.connection.publish(subject, data, { ...(headers === undefined ? {} : { headers }), ...(reply === undefined ? {} : { reply }) });
      return true;
    } catch (error) {
      this.log.warn("a message was not sent", { subject, ...errorFields(error) });
      return false;
    }
  }

  fits(bytes: number): boolean {
    const limit = this.connection.info?.max_payload;
    return limit === undefined || bytes <= limit;
  }

  /** A subject for one answer, and the answer. For a caller that sends by itself. */
  expectAnswer(patience_ms: number): { reply: string; answer: Promise<Answer>; cancel(answer: Answer): void } {
    this.#question_count += 1;
    const token = this.#question_count.toString(36);
    let settle!: (answer: Answer) => void;
    const answer = new Promise<Answer>((resolve) => (settle = resolve));
    this.#questions.set(token, { resolve: settle, expires_at_ms: this.world.monotonic_ms() + patience_ms });
    this.#stop_sweep ??= this.world.after(SWEEP_EVERY_MS, () => this.#sweep());
    return {
      reply: this.#answers_prefix + token,
      answer,
      cancel: (outcome) => {
        if (this.#questions.delete(token)) settle(outcome);
      },
    };
  }

  /** Sends once and waits for one answer. While disconnected it waits to be connected first, within the same patience. */
  async ask(subject: string, data: Uint8Array, options: { headers?: MsgHdrs; patience_ms?: number } = {}): Promise<Answer> {
    const patience_ms = options.patience_ms ?? REQUEST_PATIENCE_MS;
    const begun_at_ms = this.world.monotonic_ms();
    if (this.#state === "disconnected" && !(await this.connectedWithin(patience_ms)))
      return { kind: "not_sent", reason: "there is no connection to the broker" };
    if (this.#closed) return { kind: "not_sent", reason: "the connection is closed" };
    if (!this.fits(data.length)) return { kind: "too_large" };
    const question = this.expectAnswer(patience_ms - (this.world.monotonic_ms() - begun_at_ms));
    if (!this.send(subject, data, options.headers, question.reply)) question.cancel({ kind: "not_sent", reason: "the client did not take the message" });
    return question.answer;
  }

  /** One call of the JetStream API. Repeats it while the broker says "not now", within its patience: for calls that may be repeated. */
  async api<T>(verb: string, body: object | undefined, patience_ms: number = REQUEST_PATIENCE_MS): Promise<ApiAnswer<T>> {
    const data = body === undefined ? new Uint8Array(0) : encoder.encode(JSON.stringify(body));
    const give_up_at_ms = this.world.monotonic_ms() + patience_ms;
    let wait_ms = RETRY_FIRST_MS;
    for (;;) {
      const left_ms = give_up_at_ms - this.world.monotonic_ms();
      const answer = await this.ask(`$JS.API.${verb}`, data, { patience_ms: Math.max(left_ms, 1) });
      const outcome = readApi<T>(answer);
      if (outcome.kind !== "unavailable" && !(outcome.kind === "error" && isNotNow(outcome.error))) return outcome;
      if (this.#closed || this.world.monotonic_ms() + wait_ms >= give_up_at_ms) {
        return outcome.kind === "error" ? { kind: "unavailable", reason: outcome.error.description } : outcome;
      }
      await pause(this.world, wait_ms);
      wait_ms = Math.min(2 * wait_ms, RETRY_MAX_MS);
    }
  }

  /** Ends when the broker has seen everything sent so far, or within its patience: a broker that hangs answers no flush. */
  async flush(): Promise<void> {
    if (this.#closed || this.#state === "disconnected") return;
    let cancel = (): void => {};
    const patience = new Promise<void>((resolve) => (cancel = this.world.after(FLUSH_PATIENCE_MS, resolve)));
    const flushed = this.connection.flush().catch((error: unknown) => this.log.debug("a flush was cut off", errorFields(error)));
    await Promise.race([flushed, patience]);
    cancel();
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    await this.flush();
    this.#closed = true;
    this.#stop_sweep?.();
    this.#endQuestions("the connection was closed");
    await this.connection.close();
    this.#tell("disconnected");
  }

  #hear(message: Msg): void {
    const token = message.subject.slice(this.#answers_prefix.length);
    const question = this.#questions.get(token);
    if (question === undefined) return;
    this.#questions.delete(token);
    question.resolve(message.data.length === 0 && message.headers?.code === 503 ? { kind: "nobody" } : { kind: "answer", message });
  }

  #sweep(): void {
    const now_ms = this.world.monotonic_ms();
    for (const [token, question] of this.#questions) {
      if (question.expires_at_ms > now_ms) continue;
      this.#questions.delete(token);
      question.resolve({ kind: "silence", reason: "no answer within the patience" });
    }
    this.#stop_sweep = this.#questions.size === 0 ? undefined : this.world.after(SWEEP_EVERY_MS, () => this.#sweep());
  }

  #endQuestions(reason: string): void {
    const open = [...this.#questions.values()];
    this.#questions.clear();
    for (const question of open) question.resolve({ kind: "silence", reason });
  }

  #tell(state: ConnectionState): void {
    if (this.#state === state) return;
    this.#state = state;
    if (state === "disconnected") this.#endQuestions("the connection was lost");
    for (const listener of [...this.#state_listeners]) guarded(this.log, "a listener of the connection's state threw", {}, () => listener(state));
  }

  async #watchState(): Promise<void> {
    for await (const status of this.connection.status()) {
      switch (status.type) {
        case "disconnect":
          this.log.warn("lost the connection to the broker", { server: status.server });
          this.#tell("disconnected");
          break;
        case "reconnect":
          this.log.info("connected to the broker again", { server: status.server });
          this.#tell("connected");
          break;
        case "error":
          this.log.error("the broker reported an error", errorFields(status.error));
          break;
        case "staleConnection":
        case "slowConsumer":
          this.log.warn("the connection is in trouble", { trouble: status.type });
          break;
        default:
          break;
      }
    }
    if (this.#closed) return;
    // Only close() ends the attempts, so this is a broken promise of the client; say so and stay honest about the state.
    this.log.error("the client gave the connection up", {});
    this.#tell("disconnected");
  }
}

function readApi<T>(answer: Answer): ApiAnswer<T> {
  switch (answer.kind) {
    case "answer": {
      const value = parseJson(answer.message.data) as (T & { error?: ApiError }) | undefined;
      if (value === undefined) return { kind: "unavailable", reason: "the broker's answer is not JSON" };
      return value.error === undefined ? { kind: "ok", value } : { kind: "error", error: value.error };
    }
    case "nobody":
      return { kind: "unavailable", reason: "JetStream does not answer: it is off, starting, or has no leader" };
    case "too_large":
      return { kind: "unavailable", reason: "the question is larger than the broker takes" };
    default:
      return { kind: "unavailable", reason: answer.reason };
  }
}

/** The broker is there but cannot say yet; the same question may be asked again. */
export function isNotNow(error: ApiError): boolean {
  return NOT_NOW_CODES.has(error.err_code);
}

export function parseJson(data: Uint8Array): unknown {
  try {
    return JSON.parse(decoder.decode(data));
  } catch {
    return undefined;
  }
}

/** Calls somebody else's code and logs what it throws, at once or later. */
export function guarded(log: Log, what: string, fields: Record<string, string | number>, call: () => unknown): void {
  const report = (error: unknown): void => log.error(what, { ...fields, ...errorFields(error) });
  try {
    const result = call();
    if (result instanceof Promise) result.catch(report);
  } catch (error) {
    report(error);
  }
}

export function toWire(headers: Headers): MsgHdrs {
  const wire = newHeaders();
  for (const [name, value] of Object.entries(headers)) wire.set(name, value);
  return wire;
}

const NO_HEADERS: Headers = Object.freeze({});
export function fromWire(wire: MsgHdrs | undefined): Headers {
  if (wire === undefined) return NO_HEADERS;
  const headers: Record<string, string> = {};
  for (const [name, values] of wire) headers[name] = values[0] ?? "";
  return headers;
}

/** Headers as the leader's reads give them: the protocol's own text. */
export function parseHeaderText(text: string): Headers {
  const headers: Record<string, string> = {};
  for (const line of text.split("\r\n").slice(1)) {
    const colon = line.indexOf(":");
    if (colon > 0) headers[line.slice(0, colon)] ??= line.slice(colon + 1).trim();
  }
  return headers;
}

const NANOS_PER_MS = 1_000_000;
/** The broker counts durations in nanoseconds; nothing else of ours does. */
export const toNanos = (ms: number): number => Math.round(ms * NANOS_PER_MS);
