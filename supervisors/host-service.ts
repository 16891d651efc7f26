// host-service: the host protocol, version 1: what a worker answers to our own processes.
//
//   system.worker.{id}.v1.start    {actor}             → {actor, shard}       restores the actor now
//   system.worker.{id}.v1.stop     {actor}             → {actor, stopped}     lets an idle actor leave memory
//   system.worker.{id}.v1.status   {}                  → the worker's shards, each with its epoch, phase and counts
//   system.worker.{id}.v1.list     {after?, limit?}    → {actors, next?, total}, a page in the order of paths
//   system.worker.{id}.v1.waits    {actor?, calls_max?} → what waits here, by tenant, and why that actor's call does; sets the calls at once
//   system.worker.{id}.v1.prepare  {shard}             → {shard, actors}      reads what it will need when the shard comes, and touches nothing
//   system.worker.{id}.v1.health   {}                  → {draining, may_act, …}
//
// One request, one reply, at most once: a request that got no answer may be sent again, for all of them may be repeated.
// Requests and replies are JSON, checked at both ends; unknown fields are passed over.
//
// Invariants:
//   N1. Every request that has a reply subject gets exactly one reply, whatever is in it.
//   N2. Nothing here decides who owns an actor: `start` at a worker that does not own it is refused with `not_found`.
import { z } from "zod";
import type { Bus, CoreMessage, Subscription } from "../bus/port.ts";
import type { CallPool } from "../actors/call-pool.ts";
import type { Dispatch } from "../actors/dispatch.ts";
import { PRESSURE_STATES } from "../actors/pressure.ts";
import type { ShardHost } from "../actors/shard-host.ts";
import type { TimedCalls } from "../actors/timed-calls.ts";
import { type ErrorBody, errorBody, isErrorCode } from "../protocol/errors.ts";
import { invalidBody } from "../protocol/commands.ts";
import { type ActorAddress, actorPath, parseActorPath } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { CALLS_MAX_MAX } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { PRIORITIES } from "../protocol/priority.ts";
import { type HostOperation, hostFilter, hostSubject, parseHostSubject, shardOf } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";

/** A request names one actor or a place in a list. */
const REQUEST_BYTES_MAX = 4 * 1024;
/** Actors of a page: their paths fit a message many times over. */
const LIST_LIMIT_MAX = 1000;
const LIST_LIMIT_DEFAULT = 100;

const noRequest = z.object({});
const actorRequest = z.object({ actor: z.string().max(256) });
const listRequest = z.object({ after: z.string().max(256).optional(), limit: z.int().min(1).max(LIST_LIMIT_MAX).optional() });

const prepareRequest = z.object({ shard: z.int().min(0).max(65_535) });
const prepareReply = z.object({ shard: z.int(), actors: z.int() });
const startReply = z.object({ actor: z.string(), shard: z.int() });
const stopReply = z.object({ actor: z.string(), stopped: z.boolean() });
const statusReply = z.object({
  worker: z.string(),
  shards: z.array(z.object({ shard: z.int(), epoch: z.int(), phase: z.enum(["taking", "owning", "leaving"]), resident: z.int(), running: z.int() })),
});
const listReply = z.object({ actors: z.array(z.string()), next: z.string().optional(), total: z.int() });
const pressure = z.enum(PRESSURE_STATES);
const waitsRequest = z.object({ actor: z.string().max(256).optional(), calls_max: z.int().min(1).max(CALLS_MAX_MAX).optional() });
const callCounts = z.object({ running: z.int(), done: z.int(), failed: z.int(), timed_out: z.int(), cancelled: z.int() });
const waitsReply = z.object({
  worker: z.string(),
  calls: z.object({
    calls_max: z.int(),
    running: z.int(),
    waiting: z.int(),
    refusing: z.int(),
    tenants: z.array(z.object({ tenant: z.string(), running: z.int(), waiting: z.int(), state: pressure })),
  }),
  commands: z.object({
    deciding: z.int(),
    waiting: z.int(),
    refusing: z.int(),
    flows: z.array(z.object({ tenant: z.string(), kind: z.string(), waiting: z.int(), state: pressure, hurried: pressure })),
  }),
  /** What became of all calls since the worker began. Absent: a worker of an older version. */
  ended: z.object({ models: callCounts, tools: callCounts }).optional(),
  /** Of the call of the actor that was asked about, when it waits here. */
  call: z.object({ for: z.enum(["slot", "pool"]), priority: z.enum(PRIORITIES), waited_ms: z.number(), ahead: z.int() }).optional(),
});
const healthReply = z.object({
  worker: z.string(),
  draining: z.boolean(),
  may_act: z.boolean(),
  bus: z.enum(["connected", "disconnected"]),
  owned: z.int(),
  resident: z.int(),
  running: z.int(),
  up_ms: z.number(),
});

/** The contract, operation by operation. */
export const HOST_PROTOCOL = {
  start: { request: actorRequest, reply: startReply },
  stop: { request: actorRequest, reply: stopReply },
  status: { request: noRequest, reply: statusReply },
  list: { request: listRequest, reply: listReply },
  health: { request: noRequest, reply: healthReply },
  waits: { request: waitsRequest, reply: waitsReply },
  prepare: { request: prepareRequest, reply: prepareReply },
} as const satisfies Record<HostOperation, { request: z.ZodType; reply: z.ZodType }>;

export type HostRequest<O extends HostOperation> = z.input<(typeof HOST_PROTOCOL)[O]["request"]>;
export type HostReply<O extends HostOperation> = z.output<(typeof HOST_PROTOCOL)[O]["reply"]>;
export type HostOutcome<O extends HostOperation> = { readonly ok: true; readonly result: HostReply<O> } | { readonly ok: false; readonly error: ErrorBody };

export interface HostServiceDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly worker: string;
  readonly host: Pick<ShardHost, "load" | "passivate" | "resident" | "owned" | "prepare">;
  draining(): boolean;
  /** Is the worker's lease good? Without it the worker answers for itself as if it were. */
  may_act?(): boolean;
  readonly pool: Pick<CallPool, "report" | "resize" | "waitOf">;
  readonly dispatch: Pick<Dispatch, "report">;
  /** What becomes of the calls of this process, by what is called. Absent: nobody counts. */
  readonly ended?: { readonly models: Pick<TimedCalls, "report">; readonly tools: Pick<TimedCalls, "report"> };
}

type Answers = { readonly [O in HostOperation]: (request: z.output<(typeof HOST_PROTOCOL)[O]["request"]>) => Promise<HostOutcome<O>> | HostOutcome<O> };

const ok = <T>(result: T): { ok: true; result: T } => ({ ok: true, result });
const no = (error: ErrorBody): { ok: false; error: ErrorBody } => ({ ok: false, error });

function answersOf(deps: HostServiceDeps): Answers {
  const { bus, world, worker, host, pool, dispatch, ended } = deps;
  const began_ms = world.monotonic_ms();
  const named = (path: string): ActorAddress | ErrorBody =>
    parseActorPath(path) ?? errorBody("invalid", "/actor: not tenant/kind/id", { errors: [{ pointer: "/actor", message: "not tenant/kind/id" }] });
  return {
    async start({ actor: path }) {
      const actor = named(path);
      if ("code" in actor) return no(actor);
      if (!(await host.load(actor))) return no(errorBody("not_found", `worker '${worker}' does not own ${path}`)); // N2
      return ok({ actor: path, shard: shardOf(actor, bus.shards) });
    },
    async stop({ actor: path }) {
      const actor = named(path);
      if ("code" in actor) return no(actor);
      return ok({ actor: path, stopped: await host.passivate(actor) });
    },
    status: () => ok({ worker, shards: host.owned().map(({ shard, epoch, phase, resident, running }) => ({ shard, epoch, phase, resident, running })) }),
    list({ after, limit = LIST_LIMIT_DEFAULT }) {
      const paths = host.resident().map(actorPath).sort();
      const first = after === undefined ? 0 : paths.findIndex((path) => path > after);
      const actors = first < 0 ? [] : paths.slice(first, first + limit);
      const next = first >= 0 && first + limit < paths.length ? actors.at(-1) : undefined;
      return ok({ actors, total: paths.length, ...(next === undefined ? {} : { next }) });
    },
    waits({ actor, calls_max }) {
      if (calls_max !== undefined) pool.resize(calls_max);
      const call = actor === undefined ? undefined : pool.waitOf(actor);
      const { calls_max: max, running, waiting, refusing, tenants } = pool.report();
      const commands = dispatch.report();
      return ok({
        worker,
        calls: { calls_max: max, running, waiting, refusing, tenants: [...tenants] },
        commands: { ...commands, flows: [...commands.flows] },
        ...(ended === undefined ? {} : { ended: { models: ended.models.report(), tools: ended.tools.report() } }),
        ...(call === undefined
          ? {}
          : { call: { for: call.for, priority: call.priority, ahead: call.ahead, waited_ms: Math.round(world.monotonic_ms() - call.since_ms) } }),
      });
    },
    async prepare({ shard }) {
      if (shard >= bus.shards) return no(errorBody("not_found", `there are ${bus.shards} shards, and no ${shard}`));
      return ok({ shard, actors: await host.prepare(shard) });
    },
    health() {
      const owned = host.owned();
      return ok({
        worker,
        draining: deps.draining(),
        may_act: deps.may_act?.() ?? true,
        bus: bus.state,
        owned: owned.length,
        resident: owned.reduce((sum, shard) => sum + shard.resident, 0),
        running: owned.reduce((sum, shard) => sum + shard.running, 0),
        up_ms: world.monotonic_ms() - began_ms,
      });
    },
  };
}

function readRequest(data: Uint8Array): { value: unknown } | ErrorBody {
  if (data.byteLength > REQUEST_BYTES_MAX) return errorBody("too_large", `a request is at most ${REQUEST_BYTES_MAX} bytes`);
  if (data.byteLength === 0) return { value: {} };
  try {
    return { value: JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data)) };
  } catch (error) {
    return errorBody("invalid", `the request is not JSON: ${error instanceof Error ? error.message.slice(0, 200) : "unreadable"}`);
  }
}

/** Answers the host protocol for one worker until it is stopped. */
export function startHostService(deps: HostServiceDeps): Subscription {
  const { bus, log, worker } = deps;
  const answers = answersOf(deps);

  async function answer(message: CoreMessage): Promise<HostOutcome<HostOperation>> {
    const parsed = parseHostSubject(message.subject);
    if (parsed === undefined) return no(errorBody("invalid", "there is no such operation in version 1 of the host protocol"));
    const request = readRequest(message.data);
    if ("code" in request) return no(request);
    const checked = HOST_PROTOCOL[parsed.operation].request.safeParse(request.value);
    if (!checked.success) return no(invalidBody(checked.error, ""));
    // The schema of this very operation has passed; the table's type cannot say that the two belong together.
    return (answers[parsed.operation] as (request: unknown) => Promise<HostOutcome<HostOperation>>)(checked.data);
  }

  return bus.subscribe(hostFilter(worker), (message) => {
    const { reply } = message;
    if (reply === undefined) return;
    answer(message)
      .catch((error: unknown) => {
        log.error("a request to the worker broke", { subject: message.subject, ...errorFields(error) });
        return no(errorBody("internal", "the worker could not answer"));
      })
      .then((outcome) => bus.send(reply, new TextEncoder().encode(JSON.stringify(outcome)))) // N1
      .catch((error: unknown) => log.error("an answer of the worker could not be sent", { subject: message.subject, ...errorFields(error) }));
  });
}

const envelope = z.union([
  z.object({ ok: z.literal(true), result: z.record(z.string(), z.unknown()) }),
  z.object({ ok: z.literal(false), error: z.object({ code: z.string(), message: z.string(), details: z.record(z.string(), z.unknown()).optional() }) }),
]);

/** Asks one worker. `unavailable` when no worker of that name answers in time, or with what this version does not understand. */
export async function askHost<O extends HostOperation>(
  bus: Bus,
  worker: string,
  operation: O,
  request: HostRequest<O>,
  options: { patience_ms?: number } = {},
): Promise<HostOutcome<O>> {
  const message = await bus.request(hostSubject(worker, operation), new TextEncoder().encode(JSON.stringify(request)), options);
  if (message === undefined) return no(errorBody("unavailable", `worker '${worker}' did not answer`));
  const read = readReply(message.data);
  if (read === undefined) return no(errorBody("unavailable", `worker '${worker}' answered what is no reply of version 1`));
  if (!read.ok) {
    const { code, message: text, details } = read.error;
    return no(errorBody(isErrorCode(code) ? code : "internal", text, details as JsonObject | undefined));
  }
  const checked = HOST_PROTOCOL[operation].reply.safeParse(read.result);
  if (!checked.success) return no(errorBody("unavailable", `worker '${worker}' answered '${operation}' in another shape`));
  return ok(checked.data as HostReply<O>);
}

function readReply(data: Uint8Array): z.output<typeof envelope> | undefined {
  let value: unknown;
  try {
    value = JSON.parse(new TextDecoder().decode(data));
  } catch {
    return undefined; // the caller says that it is no reply
  }
  return envelope.safeParse(value).data;
}
