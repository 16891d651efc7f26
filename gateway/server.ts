// server: the HTTP gateway. It turns requests into commands and journals into answers; it owns no state of any session.
//
// Every gateway serves every session. Sessions are read by restoring them from the streams, so they are served while Postgres is away;
// only lists come from projections.
//
// Invariants:
//   G1. Every route under /v1 has passed authenticate.ts; a route cannot be declared there without it.
//   G2. The tenant of every actor that is read or told something is the principal's. Nothing in a path, a body or a header names one.
//   G3. What is not the tenant's answers exactly as what does not exist.
//   G4. Bad input is refused with a 4xx and a stable code. A 5xx is ours: 503 passes, 500 is logged as a bug.
//   G6. A route names the one scope it needs. Tenants' scopes are never an operator's and the other way round (protocol/scopes.ts), so an operator's
//       credential reaches no tenant's session and a tenant's no operator's route.
//   G5. Ending a connection ends nothing but the connection (F3).
//   G7. What is said to an actor while a route is served is said in the name of its credential: the client that routes are given adds it, so no route
//       can forget it, and none can name another.
import { AsyncLocalStorage } from "node:async_hooks";
import { createHash } from "node:crypto";
import type { IncomingMessage, ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import { fastify, type FastifyInstance, type FastifyReply, type FastifyRequest } from "fastify";
import type { CommandClient } from "../actors/client.ts";
import { createDailyReports, type DailyRow } from "../actors/daily-report.ts";
import type { Directory } from "../actors/directory.ts";
import type { Restorer } from "../actors/restore.ts";
import { createWebhooks } from "../actors/webhooks.ts";
import type { Bus } from "../bus/port.ts";
import { BrokenPromise } from "../protocol/assert.ts";
import { decodeCommand, HEADER_IDEMPOTENCY_KEY, HEADER_TRACEPARENT } from "../protocol/commands.ts";
import { type ErrorBody, errorBody, isErrorCode, TroupeError } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, isId } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { MasterKey } from "../protocol/key-ring.ts";
import { COMMAND_BYTES_MAX } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { principalWord } from "../protocol/principal.ts";
import type { Scope } from "../protocol/scopes.ts";
import { actorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import type { UsageFilter } from "../protocol/usage-filter.ts";
import type { ActorDefinition } from "../state-machines/definition.ts";
import { cores } from "../state-machines/kinds.ts";
import { outerStates } from "../state-machines/step.ts";
import { type Attribution, withAttribution } from "../telemetry/log.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import { declareAdminRoutes } from "./admin-routes.ts";
import { declareBudgetRoutes } from "./budget-routes.ts";
import { authenticate, bearerOf, refuseScope } from "./authenticate.ts";
import { type Cursor, CURSOR_START, cursorAfter, decodeCursor, encodeCursor } from "./cursor.ts";
import { EVENT_STREAM_MEDIA_TYPE, turnOnly, writeEventStream } from "./event-stream.ts";
import { createFeedHub } from "./feed-hub.ts";
import type { KeyUse } from "../actors/key-use.ts";
import type { Oidc } from "./oidc.ts";
import { PROBLEM_MEDIA_TYPE, problemOf, retryAfterSeconds } from "./problem.ts";
import { declareProviderKeyRoutes } from "./provider-key-routes.ts";
import { startReplay } from "./replay.ts";
import { declareReportRoutes } from "./report-routes.ts";
import { createRequestLimiter } from "./request-limiter.ts";
import type { Handler, RouteInfo, Visitor } from "./route.ts";
import { cursorBefore, type EarlyFeed, earlySessionFeed, type FeedItem, readEventPage } from "./session-feed.ts";
import { sessionView } from "./session-view.ts";
import { declareWebhookRoutes } from "./webhook-routes.ts";

/** Lists of sessions. Rejects when its database cannot answer; a TroupeError says what was wrong with the question. */
export interface SessionLists {
  list(
    tenant: string,
    request: { state?: string; agent?: string; limit: number; after?: string },
  ): Promise<{ readonly items: readonly object[]; readonly next?: string | null }>;
}

export interface Readiness {
  readonly ready: boolean;
  readonly components: { readonly [name: string]: { readonly ok: boolean; readonly detail?: string } };
}

export interface GatewayDeps {
  readonly bus: Bus;
  readonly restorer: Restorer;
  readonly directory: Pick<Directory, "tenant">;
  readonly client: Pick<CommandClient, "command">;
  readonly sessions: SessionLists;
  /** Sums of a tenant's calls by day. Rejects when the database cannot answer. */
  readonly usage_daily: (tenant: string, filter: UsageFilter) => Promise<readonly DailyRow[]>;
  /** Says why a session waits. */
  readonly definition: Pick<ActorDefinition, "waits">;
  /** Absent: only API keys are taken. */
  readonly oidc?: Oidc;
  /** When keys were used. */
  readonly key_use: KeyUse;
  /** Unguessable bytes, for keys. */
  readonly random_bytes: (count: number) => Uint8Array;
  /** What tenants' own provider keys are sealed with, as they are now. Absent: none is taken. */
  readonly master_keys?: () => readonly MasterKey[];
  /** What the secrets of webhooks are derived from (absent: none is shown), and whether addresses may be named that are not public. */
  readonly webhook_key?: string;
  readonly private_addresses?: boolean;
  readonly readiness: () => Promise<Readiness>;
  readonly metrics: Metrics;
  readonly world: World;
  readonly log: Log;
  readonly host: string;
  /** 0 for any. */
  readonly port: number;
  /** Open streams in this process; above it a new one is `overloaded`. A stream costs some 100 KiB when its reader is slow. */
  readonly streams_max?: number;
  /** Why no more commands of a tenant are taken now. Absent: they are always taken. */
  readonly crowded?: (tenant: string) => ErrorBody | undefined;
  /** Of one tenant, here; above it `rate_limited`. Absent: as many as there are. */
  readonly requests_per_s?: number;
}

export interface Gateway {
  readonly url: string;
  readonly routes: readonly RouteInfo[];
  /** Takes nothing new, ends the open streams (their clients go on elsewhere from their cursors), and answers when all is closed. */
  close(): Promise<void>;
}

const STREAMS_MAX = 10_000;
const LIST_LIMIT_DEFAULT = 50;
const LIST_LIMIT_MAX = 100;
const SESSION_STATES = outerStates(cores.session.definition);
const EVENTS_LIMIT_DEFAULT = 100;
const EVENTS_LIMIT_MAX = 1000;
const AFTER_CHARACTERS_MAX = 1024;
/** Requests under way when the gateway closes get this long; then their connections are cut off. */
const CLOSE_PATIENCE_MS = 10_000;
const SWEEP_MS = 50;
/** Above it a request that dribbles in is let go. */
const REQUEST_PATIENCE_MS = 60_000;
const IDEMPOTENCY_KEY_PATTERN = /^[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?$/;

const NOT_FOUND = errorBody("not_found", "there is no such session");
/** G3: one answer for all that is not there. */
const notFound = (): TroupeError => new TroupeError(NOT_FOUND);
const invalid = (message: string, pointer?: string): TroupeError =>
  new TroupeError(errorBody("invalid", message, pointer === undefined ? undefined : { errors: [{ pointer, message }] }));

const SESSION_VERBS = {
  cancel: "turn.cancel",
  pause: "session.pause",
  resume: "session.resume",
  hibernate: "session.hibernate",
  terminate: "session.terminate",
  unpark: "session.unpark",
} as const;
/** Verbs whose command only our own channel takes. What they need of a credential is looked at here: a scope above writing. */
const CONTROL_VERBS: ReadonlySet<string> = new Set(["session.unpark"]);

/** Passes refusals and bugs on, and says of everything else that the bus (or the database) is away. */
async function available<T>(what: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof TroupeError || error instanceof BrokenPromise) throw error;
    throw new TroupeError(errorBody("unavailable", `${what} cannot be read now`, { retry_after_ms: 1000 }), { cause: error });
  }
}

const headerText = (request: FastifyRequest, name: string): string | undefined => {
  const value = request.headers[name];
  return Array.isArray(value) ? value[0] : value;
};

function queryOf(request: FastifyRequest): Record<string, string | undefined> {
  const query: Record<string, string | undefined> = {};
  for (const [name, value] of Object.entries(request.query as Record<string, unknown>)) {
    if (typeof value !== "string") throw invalid(`?${name.slice(0, 64)}= stands once`);
    query[name] = value;
  }
  return query;
}

function limitOf(text: string | undefined, fallback: number, max: number): number {
  if (text === undefined) return fallback;
  const limit = /^\d{1,6}$/.test(text) ? Number(text) : 0;
  if (limit < 1 || limit > max) throw invalid(`?limit= is a whole number from 1 to ${max}`);
  return limit;
}

function cursorOf(request: FastifyRequest): Cursor {
  // A browser that reconnects repeats its first URL and says in the header how far it came.
  const text = headerText(request, "last-event-id") ?? queryOf(request)["cursor"];
  if (text === undefined || text === "") return CURSOR_START;
  const cursor = decodeCursor(text);
  if (cursor === undefined) throw invalid("the cursor is none of ours");
  return cursor;
}

function bodyOf(request: FastifyRequest): JsonObject {
  const body = request.body ?? {};
  if (typeof body !== "object" || Array.isArray(body)) throw invalid("the body is a JSON object", "");
  return body as JsonObject;
}

function idempotencyKeyOf(request: FastifyRequest): string | undefined {
  const key = headerText(request, HEADER_IDEMPOTENCY_KEY.toLowerCase());
  if (key !== undefined && !IDEMPOTENCY_KEY_PATTERN.test(key)) throw invalid("Idempotency-Key is 1 to 255 printable ASCII characters");
  return key;
}

/** Pointers of a command's body, as seen from the request's body, which is the command's body. */
function withoutEnvelope(error: ErrorBody): ErrorBody {
  const errors = error.details?.["errors"];
  if (!Array.isArray(errors)) return error;
  const seen = (errors as { pointer: string; message: string }[]).map(({ pointer, message }) => ({ pointer: pointer.replace(/^\/body(?=\/|$)/, ""), message }));
  const message = seen.map((one) => `${one.pointer || "/"}: ${one.message}`).join("; ");
  return errorBody(error.code, message.slice(0, 500), { ...error.details, errors: seen });
}

/** The same outside word gives the same session, from any gateway. */
const derivedId = (prefix: string, word: string): string => `${prefix}${createHash("sha256").update(word).digest("hex").slice(0, 40)}`;

function sessionIdFor(body: JsonObject, key: string | undefined, world: World): string {
  const { id, external_id } = body;
  if (id !== undefined) {
    if (!isId(id)) throw invalid("/id: 1 to 64 of A-Z a-z 0-9 _ -", "/id");
    return id;
  }
  if (typeof external_id === "string" && external_id !== "") return derivedId("x", external_id);
  if (key !== undefined) return derivedId("k", key);
  return world.id();
}

const wantsEventStream = (request: FastifyRequest): boolean => (headerText(request, "accept") ?? "").toLowerCase().includes(EVENT_STREAM_MEDIA_TYPE);

function sendProblem(reply: FastifyReply, error: ErrorBody, status?: number): FastifyReply {
  const problem = problemOf(error, status);
  const retry_after = retryAfterSeconds(error);
  if (retry_after !== undefined) reply.header("retry-after", String(retry_after));
  if (error.code === "unauthenticated") reply.header("www-authenticate", "Bearer");
  // SDKs repeat what they do not know; money does not come back by asking again.
  if (error.code === "budget_exceeded") reply.header("x-should-retry", "false");
  return reply
    .code(problem.status)
    .type(PROBLEM_MEDIA_TYPE)
    .send(Buffer.from(JSON.stringify(problem))); // Bytes: to text fastify adds a charset, which this type does not have.
}

/** Fastify's own refusals, in our words. */
function refusalOf(error: unknown): { error: ErrorBody; status?: number } | undefined {
  if (error instanceof TroupeError) return { error: error.body };
  if (error === null || typeof error !== "object" || error instanceof BrokenPromise) return undefined;
  const { statusCode, code } = error as { statusCode?: unknown; code?: unknown };
  if (typeof statusCode !== "number" || statusCode < 400 || statusCode > 499 || typeof code !== "string" || !code.startsWith("FST_")) return undefined;
  if (statusCode === 413) return { error: errorBody("too_large", `a request is at most ${COMMAND_BYTES_MAX} bytes`, { bytes_max: COMMAND_BYTES_MAX }) };
  if (statusCode === 415) return { error: errorBody("invalid", "the body is application/json"), status: 415 };
  return { error: errorBody("invalid", error instanceof Error ? error.message.slice(0, 300) : "the request cannot be read") };
}

/** JSON.parse quotes what it was given, which may be somebody's key: of its words those about the place remain. */
function faultOfJson(message: string): string {
  return message.replace(/(,? ?)(\.\.\.)?"[\s\S]*"(\.\.\.)? is not valid JSON/, " is not valid JSON").slice(0, 200);
}

function parseJson(_request: FastifyRequest, data: Buffer, done: (error: Error | null, body?: unknown) => void): void {
  if (data.byteLength === 0) return done(null, {});
  try {
    done(null, JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data)));
  } catch (error) {
    done(invalid(`the body is not JSON in UTF-8: ${error instanceof Error ? faultOfJson(error.message) : "unreadable"}`, ""));
  }
}

/** The bytes of a command, for the same reading that commands from anywhere get. */
function commandBytes(type: string, body: JsonObject): Uint8Array {
  try {
    return new TextEncoder().encode(JSON.stringify({ type, body }));
  } catch (error) {
    // Reading JSON takes any depth, writing it does not: 1 MiB can nest half a million deep.
    if (error instanceof RangeError) throw invalid("the body is nested too deep", "");
    throw error;
  }
}

/** `/v1/sessions/:id` as a pattern of concrete paths. */
const pathPattern = (url: string): RegExp => new RegExp(`^${url.replace(/:[a-z_]+/g, "[^/]+")}/?$`);

export async function startGateway(deps: GatewayDeps): Promise<Gateway> {
  const { bus, restorer, directory, sessions, definition, readiness, metrics, world, log, host, port, streams_max = STREAMS_MAX } = deps;
  /** G7: whose request is being served. */
  const acting = new AsyncLocalStorage<string>();
  const client: GatewayDeps["client"] = {
    command: (actor, request, options) => deps.client.command(actor, { ...request, principal: acting.getStore() }, options),
  };
  const hub = createFeedHub({ bus, world, log, on_behind: () => metrics.add("troupe_gateway_gaps_repaired_total", { channel: "reader" }) });
  const feedDeps = { bus, hub, world, log };
  const replay = startReplay({ bus, log });
  const streams = new Set<AbortController>();
  const routes: RouteInfo[] = [];
  let closing = false;

  const app: FastifyInstance = fastify({
    logger: false,
    bodyLimit: COMMAND_BYTES_MAX,
    exposeHeadRoutes: false,
    requestTimeout: REQUEST_PATIENCE_MS,
    routerOptions: { maxParamLength: 1024 },
    frameworkErrors: (_error, _request, reply) => void sendProblem(reply, errorBody("not_found", "there is no such route")),
    clientErrorHandler(_error, socket) {
      if (!socket.writable) return void socket.destroy();
      const text = JSON.stringify(problemOf(errorBody("invalid", "this is not HTTP")));
      socket.end(
        `HTTP/1.1 400 Bad Request\r\ncontent-type: ${PROBLEM_MEDIA_TYPE}\r\ncontent-length: ${Buffer.byteLength(text)}\r\nconnection: close\r\n\r\n${text}`,
      );
    },
  });
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", { parseAs: "buffer" }, parseJson as never);

  /** For whom a request is, for the lines of the log that tell of it. */
  const whoAsked = new WeakMap<FastifyRequest, Attribution>();

  app.setErrorHandler((error: unknown, request, reply) => {
    const refusal = refusalOf(error);
    if (refusal) {
      if (refusal.error.code === "unavailable")
        log.warn("answered unavailable", { ...whoAsked.get(request), route: request.routeOptions.url, ...errorFields((error as Error).cause ?? error) });
      return sendProblem(reply, refusal.error, refusal.status);
    }
    log.error("a request met a bug of ours", { ...whoAsked.get(request), route: request.routeOptions.url, ...errorFields(error) }); // G4
    return sendProblem(reply, errorBody("internal", "something broke on our side; it is logged"));
  });

  app.setNotFoundHandler((request, reply) => {
    const path = request.url.split("?")[0] ?? "";
    const allowed = routes.filter((route) => pathPattern(route.url).test(path)).map((route) => route.method);
    if (allowed.length === 0) return sendProblem(reply, errorBody("not_found", "there is no such route"));
    reply.header("allow", [...new Set(allowed)].join(", "));
    return sendProblem(reply, errorBody("not_found", `there is no ${request.method.slice(0, 16)} here`), 405);
  });

  app.addHook("onResponse", (request, reply, done) => {
    const route = request.routeOptions.url ?? "none";
    metrics.add("troupe_gateway_requests_total", { method: request.method, route, status: String(reply.raw.statusCode) });
    const streamed = String(reply.raw.getHeader("content-type") ?? "").startsWith(EVENT_STREAM_MEDIA_TYPE);
    if (!streamed) metrics.observe("troupe_gateway_request_seconds", { route }, reply.elapsedTime / 1000);
    done();
  });

  // ── what handlers share ────────────────────────────────────────────────────────────────────────────────────────────────────────

  const limiter = deps.requests_per_s === undefined ? undefined : createRequestLimiter({ requests_per_s: deps.requests_per_s, world });
  const authentication_deps = {
    tenantOf: (id: string) => directory.tenant(id),
    now_ms: () => world.now_ms(),
    ...(deps.oidc === undefined ? {} : { oidc: deps.oidc }),
    key_used: (tenant: string, key_id: string) => deps.key_use.used(tenant, key_id),
  };

  async function visitorOf(request: FastifyRequest, scope: Scope): Promise<Visitor> {
    const authentication = await available("the tenant", () => authenticate(bearerOf(headerText(request, "authorization")), authentication_deps));
    if (authentication.kind === "refused") throw new TroupeError(authentication.error);
    const lacking = refuseScope(authentication.principal, scope);
    if (lacking !== undefined) throw new TroupeError(lacking);
    const flooding = limiter?.refusal(authentication.principal.tenant);
    if (flooding !== undefined) throw new TroupeError(flooding);
    return authentication;
  }

  /** G1, G2, G6: the only way a route comes into being under /v1. */
  function route(method: RouteInfo["method"], url: string, scope: Scope, handler: Handler): void {
    routes.push({ method, url, authenticated: true, scope });
    const visitors = new WeakMap<FastifyRequest, Visitor>();
    app.route({
      method,
      url,
      // Before the body is read.
      onRequest: async (request, reply) => {
        reply.header("cache-control", "private, no-store");
        const visitor = await visitorOf(request, scope);
        visitors.set(request, visitor);
        const { id } = request.params as { id?: string };
        whoAsked.set(request, { tenant: visitor.principal.tenant, ...(url.startsWith("/v1/sessions/") && isId(id) ? { session: id } : {}) });
      },
      handler: async (request, reply) => {
        const visitor = visitors.get(request);
        if (visitor === undefined) throw new TroupeError(errorBody("unauthenticated", "no credential was seen")); // G1
        const { tenant } = visitor.principal;
        return withAttribution(whoAsked.get(request) ?? { tenant }, () =>
          acting.run(principalWord(visitor.principal.name), () => handler(request, reply, visitor)),
        ); // G7
      },
    });
  }

  function openRoute(url: string, handler: (reply: FastifyReply) => Promise<unknown>): void {
    routes.push({ method: "GET", url, authenticated: false, scope: null });
    app.get(url, async (_request, reply) => {
      reply.header("cache-control", "no-store");
      return handler(reply);
    });
  }

  function sessionOf(request: FastifyRequest, visitor: Visitor): ActorAddress {
    const { id } = request.params as { id?: string };
    if (!isId(id)) throw notFound();
    return { tenant: visitor.principal.tenant, kind: "session", id }; // G2
  }

  async function viewOfSession(session: ActorAddress): Promise<JsonObject> {
    const restored = await available("the session", () => restorer.restore(session));
    if (restored === undefined) throw notFound();
    return sessionView(restored, definition, world.now_ms());
  }

  /** Where a session's journal ends now. Refuses: not_found. */
  async function endOf(session: ActorAddress): Promise<{ cursor: Cursor; seq: number }> {
    const stored = await available("the session", () => bus.last("EVENTS", actorSubject(session, "event")));
    if (stored === undefined) throw notFound();
    const message = decodeJournal(stored.data, session);
    return { cursor: { sequence: stored.sequence, events: message.events.length }, seq: message.seq };
  }

  /** Says a command to a session and answers what was decided; throws the refusal. */
  async function say(
    request: FastifyRequest,
    session: ActorAddress,
    type: string,
    body: JsonObject,
    key: string | undefined,
  ): Promise<{ seq: number; result: JsonObject; after_sequence: number | undefined }> {
    const trace = headerText(request, HEADER_TRACEPARENT);
    const header = (name: string): string | undefined => (name === HEADER_TRACEPARENT ? trace : name === HEADER_IDEMPOTENCY_KEY ? key : undefined);
    const channel = CONTROL_VERBS.has(type) ? "control" : "command";
    const decoding = decodeCommand("session", channel, commandBytes(type, body), header);
    if (decoding.kind === "refused") throw new TroupeError(withoutEnvelope(decoding.error));
    const { command } = decoding;
    const crowded = channel === "command" ? deps.crowded?.(session.tenant) : undefined;
    if (crowded !== undefined) throw new TroupeError(crowded);
    // A key of our own when the client has none: should the answer not come in time, a repeat with it is done once.
    const idempotency_key = key ?? world.id();
    const outcome = await client.command(session, { type, body: command.body, channel, key: idempotency_key, trace: command.trace });
    if (outcome.kind === "refused") {
      const { code, message, details } = outcome.error;
      throw new TroupeError(errorBody(code, message, details?.["accepted"] === true ? { ...details, idempotency_key } : details));
    }
    const { reply } = outcome;
    if (reply.ok) return { seq: reply.seq, result: reply.result, after_sequence: reply.after_sequence };
    if (reply.error.code === "not_found") throw notFound(); // G3
    throw new TroupeError(isErrorCode(reply.error.code) ? reply.error : errorBody("internal", "the session answered with an unknown code"));
  }

  /**
   * Answers with a feed as SSE. Until `choose` has answered a refusal is still an ordinary one; from then on the response is ours, not
   * fastify's.
   */
  async function stream(reply: FastifyReply, session: ActorAddress, choose: (feed: EarlyFeed) => Promise<AsyncIterable<FeedItem>>): Promise<void> {
    if (closing || streams.size >= streams_max)
      throw new TroupeError(errorBody("overloaded", "this gateway serves as many streams as it can", { retry_after_ms: 1000 }));
    const abort = new AbortController();
    streams.add(abort);
    const onClose = (): void => abort.abort();
    reply.raw.once("close", onClose); // G5
    if (reply.raw.destroyed) onClose();
    metrics.set("troupe_gateway_subscribers", { transport: "sse" }, streams.size);
    try {
      const chosen = await choose(earlySessionFeed(feedDeps, session, abort.signal));
      reply.hijack();
      await writeEventStream(reply.raw, chosen, {
        world,
        signal: abort.signal,
        problem(error) {
          log.error("a feed broke", { actor: actorPath(session), ...errorFields(error) });
          return problemOf(errorBody("internal", "the journal cannot be read; it is logged"));
        },
      });
    } finally {
      abort.abort();
      streams.delete(abort);
      metrics.set("troupe_gateway_subscribers", { transport: "sse" }, streams.size);
    }
  }

  // ── routes ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

  route("GET", "/v1/agents", "sessions:read", async (_request, _reply, { record }) => ({
    items: Object.entries(record.agents).map(([id, { version, hash, config }]) => ({ id, version, hash, config })),
  }));

  route("POST", "/v1/sessions", "sessions:write", async (request, reply, { principal, record }) => {
    const { id: _, ...body } = bodyOf(request);
    const key = idempotencyKeyOf(request);
    const session: ActorAddress = { tenant: principal.tenant, kind: "session", id: sessionIdFor(bodyOf(request), key, world) };
    const { agent } = body;
    if (isId(agent) && !Object.hasOwn(record.agents, agent)) throw new TroupeError(errorBody("agent_unknown", `there is no agent '${agent}'`, { agent }));
    const { result } = await say(request, session, "session.create", body, key);
    reply.code(result["created"] === true ? 201 : 200).header("location", `/v1/sessions/${session.id}`);
    return viewOfSession(session);
  });

  route("GET", "/v1/sessions", "sessions:read", async (request, _reply, { principal }) => {
    const { state, agent, limit, after } = queryOf(request);
    if (state !== undefined && !SESSION_STATES.includes(state)) throw invalid(`?state= is one of ${SESSION_STATES.join(", ")}`);
    if (agent !== undefined && !isId(agent)) throw invalid("?agent= is the id of an agent");
    if (after !== undefined && (after.length > AFTER_CHARACTERS_MAX || after.includes("\u0000"))) throw invalid("?after= is the `next` of a page");
    const question = {
      limit: limitOf(limit, LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX),
      ...(state === undefined ? {} : { state }),
      ...(agent === undefined ? {} : { agent }),
      ...(after === undefined ? {} : { after }),
    };
    const page = await available("the list of sessions", () => sessions.list(principal.tenant, question));
    return { items: page.items, next: page.next ?? null };
  });

  route("GET", "/v1/sessions/:id", "sessions:read", async (request, _reply, visitor) => viewOfSession(sessionOf(request, visitor)));

  route("POST", "/v1/sessions/:id/messages", "sessions:write", async (request, reply, visitor) => {
    const session = sessionOf(request, visitor);
    const key = idempotencyKeyOf(request);
    const body = bodyOf(request);
    const send = async (): Promise<{ turn: number; message_id: string; after_sequence: number | undefined; place: () => Promise<Cursor> }> => {
      const { seq, result, after_sequence } = await say(request, session, "message.send", body, key);
      const { turn, message_id } = result;
      if (typeof turn !== "number" || typeof message_id !== "string") throw new TroupeError(errorBody("internal", "a message was taken without a turn"));
      // A repeat is answered with the first outcome, which may lie anywhere before.
      const place = async (): Promise<Cursor> =>
        after_sequence === undefined ? cursorBefore(bus, session, CURSOR_START, seq).catch(() => CURSOR_START) : cursorAfter(after_sequence);
      return { turn, message_id, after_sequence, place };
    };
    if (!wantsEventStream(request)) {
      const { turn, message_id, place } = await send();
      reply.code(202);
      return { message_id, turn, cursor: encodeCursor(await place()) };
    }
    // What comes live is heard from before the command on, so that the first token waits for nothing of ours.
    await stream(reply, session, async (feed) => {
      const { turn, after_sequence, place } = await send();
      if (after_sequence !== undefined) return turnOnly(feed.after(after_sequence), turn);
      const start = await place();
      return turnOnly(await available("the session's events", () => feed.from(start)), turn);
    });
    return reply;
  });

  route("GET", "/v1/sessions/:id/events", "sessions:read", async (request, reply, visitor) => {
    const session = sessionOf(request, visitor);
    const cursor = cursorOf(request);
    const limit = limitOf(queryOf(request)["limit"], EVENTS_LIMIT_DEFAULT, EVENTS_LIMIT_MAX);
    const end = await endOf(session);
    if (cursor.sequence > end.cursor.sequence) throw invalid("the cursor is after the end of this session");
    const accept = (headerText(request, "accept") ?? "").toLowerCase();
    if (!accept.includes(EVENT_STREAM_MEDIA_TYPE) && accept.includes("application/json")) {
      const { items, more } = await available("the session's events", () => readEventPage(bus, session, cursor, limit));
      const last = items.at(-1);
      return {
        items: items.map(({ cursor: at_cursor, event, seq, at, state }) => ({ cursor: encodeCursor(at_cursor), ...event, seq, at, state })),
        next: more && last ? encodeCursor(last.cursor) : null,
      };
    }
    await stream(reply, session, (feed) => available("the session's events", () => feed.from(cursor)));
    return reply;
  });

  for (const [verb, type] of Object.entries(SESSION_VERBS)) {
    route("POST", `/v1/sessions/:id/${verb}`, "sessions:write", async (request, _reply, visitor) => {
      const session = sessionOf(request, visitor);
      const body = bodyOf(request);
      const key = idempotencyKeyOf(request);
      await endOf(session);
      await say(request, session, type, body, key);
      return viewOfSession(session);
    });
  }

  const { key_use, random_bytes } = deps;
  declareAdminRoutes({ route, directory, client, key_use, world, random_bytes, bodyOf, idempotencyKeyOf, available });
  declareBudgetRoutes({ route, directory, restorer, client, world, bodyOf, idempotencyKeyOf, available });
  declareReportRoutes({ route, directory, reports: createDailyReports({ bus, usage_daily: deps.usage_daily }), queryOf, available });
  declareProviderKeyRoutes({
    route,
    client,
    master_keys: deps.master_keys ?? (() => []),
    random_bytes: deps.random_bytes,
    bodyOf,
    idempotencyKeyOf,
  });
  const { webhook_key: webhooks_key, private_addresses = false } = deps;
  const webhooks = createWebhooks({ bus, restorer, client, world, key: webhooks_key, private_addresses });
  declareWebhookRoutes({ route, webhooks, world, bodyOf, available });

  openRoute("/healthz", async () => ({ status: "ok" }));
  openRoute("/readyz", async (reply) => {
    const report = closing ? { ready: false, components: { gateway: { ok: false, detail: "is closing" } } } : await readiness();
    return reply.code(report.ready ? 200 : 503).send(report);
  });
  openRoute("/metrics", async (reply) => reply.type(metrics.content_type).send(await metrics.text()));

  // Every connection with its requests under way. Node's closeIdleConnections leaves those that have not asked anything yet, which
  // clients open ahead of need, and so a close would wait for their next request.
  const connections = new Map<Socket, number>();
  app.server.on("connection", (socket: Socket) => {
    connections.set(socket, 0);
    socket.once("close", () => connections.delete(socket));
  });
  app.server.on("request", ({ socket }: IncomingMessage, response: ServerResponse) => {
    connections.set(socket, (connections.get(socket) ?? 0) + 1);
    response.once("close", () => {
      const busy = connections.get(socket);
      if (busy !== undefined) connections.set(socket, busy - 1);
    });
  });

  await app.listen({ host, port });
  const address = app.server.address() as AddressInfo;
  const named = address.family === "IPv6" ? `[${address.address}]` : address.address;

  return {
    url: `http://${named}:${address.port}`,
    routes,
    async close() {
      closing = true;
      for (const abort of streams) abort.abort();
      const closed = app.close();
      let waited_ms = 0;
      let cancelSweep = (): void => {};
      const sweep = (): void => {
        for (const [socket, busy] of connections) if (busy === 0 || waited_ms >= CLOSE_PATIENCE_MS) socket.destroy();
        waited_ms += SWEEP_MS;
        cancelSweep = world.after(SWEEP_MS, sweep);
      };
      sweep();
      await closed;
      cancelSweep();
      await replay.stop();
      await hub.stop();
    },
  };
}
