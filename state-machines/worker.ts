// worker: one worker process as the supervisors see it, and which shards it owns. `tenant.system.worker.{id}`.
//
//   worker.join ──▶ joining ──ready──▶ ready ◀──undrain / drain──▶ draining ──leave──▶ left
//                                       │ ▲                           │ ▲
//                              suspect  ▼ │ clear             suspect ▼ │ clear
//                                      suspected ────declare_dead────▶ dead
//
//   left, dead ── worker.join with another incarnation ──▶ joining
//
//   drain and undrain while joining or suspected are remembered; declare_dead and leave are possible from joining to suspected. A worker
//   that is joining is not suspected but declared dead: it has nothing to lose, and clearing it would call it ready.
//
// Its host is the leading supervisor: what it decides about a worker is appended here first, and that append is its fence. The placement
// table follows. Commands that name facts only the leader knows are `internal`: no message can bring them.
//
// Invariants:
//   W1. A shard is assigned only to a ready worker, and with a higher epoch than it ever had here.
//   W2. Every shard.assigned is followed by one shard.released before the shard is assigned again, unless the same worker keeps it
//       under a higher epoch.
//   W3. An incarnation that was declared dead, or left, never comes back; another one may, without shards.
import { enqueueActions, setup } from "xstate";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorEvent } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import {
  type ActorDefinition,
  type ActorView,
  type BaseContext,
  type Change as ChangeOf,
  type CommandEvent,
  type CreationInput,
  type Emitted,
  perform,
} from "./definition.ts";

export interface WorkerContext extends BaseContext {
  readonly incarnation: string;
  readonly pid: number | null;
  readonly host: string | null;
  /** Machines it can host: kind → version. */
  readonly versions: JsonObject;
  /** An operator wants it empty. Kept over a suspicion. */
  readonly draining: boolean;
  /** shard → the epoch it holds it under. */
  readonly shards: Readonly<Record<string, number>>;
  /** The highest epoch a shard was ever assigned under here. */
  readonly epochs: Readonly<Record<string, number>>;
  /** What the last judgement rests on. */
  readonly evidence: Json;
  readonly joined_at_ms: number;
}

export interface WorkerJoin {
  readonly incarnation: string;
  readonly pid?: number;
  readonly host?: string;
  readonly versions: JsonObject;
}
export interface WorkerEvidence {
  readonly evidence: Json;
}
export interface ShardAssign {
  readonly shard: number;
  readonly epoch: number;
  readonly from: string | null;
}
export interface ShardRelease {
  readonly shard: number;
  readonly epoch: number;
  readonly to: string | null;
  readonly reason: string;
}
export interface ActorResumed {
  readonly actor: string;
  readonly entries: number;
  readonly detect_ms: number;
  readonly assign_ms: number;
  readonly replay_ms: number;
  readonly first_token_ms?: number;
}
interface ReasonBody {
  readonly reason?: string;
}

type WorkerEvent =
  | CommandEvent<"worker.join", WorkerJoin>
  | CommandEvent<"worker.ready" | "worker.clear", JsonObject>
  | CommandEvent<"worker.suspect" | "worker.declare_dead", WorkerEvidence>
  | CommandEvent<"worker.leave" | "worker.drain" | "worker.undrain", ReasonBody>
  | CommandEvent<"shard.assign", ShardAssign>
  | CommandEvent<"shard.release", ShardRelease>
  | CommandEvent<"actor.resumed", ActorResumed>;

type Change = ChangeOf<WorkerContext>;

const joined = ({ incarnation, pid, host, versions }: WorkerJoin, at_ms: number) => ({
  incarnation,
  pid: pid ?? null,
  host: host ?? null,
  versions,
  draining: false,
  evidence: null,
  joined_at_ms: at_ms,
});

/** W3: what the former incarnation still held is released, for a process that begins holds nothing. */
function rejoined(context: WorkerContext, body: WorkerJoin): Change {
  const released = Object.entries(context.shards).map(([shard, epoch]): ActorEvent => ({
    type: "shard.released",
    shard: Number(shard),
    epoch,
    to: null,
    reason: "joined again",
  }));
  return { context: { ...joined(body, context.now.at_ms), shards: {} }, tell: released };
}

function assigned({ shards, epochs }: WorkerContext, { shard, epoch, from }: ShardAssign): Change {
  return {
    context: { shards: { ...shards, [shard]: epoch }, epochs: { ...epochs, [shard]: epoch } },
    tell: [{ type: "shard.assigned", shard, epoch, from: from ?? null }],
  };
}

function released({ shards }: WorkerContext, { shard, epoch, to, reason }: ShardRelease): Change {
  return {
    context: { shards: Object.fromEntries(Object.entries(shards).filter(([held]) => held !== String(shard))) },
    tell: [{ type: "shard.released", shard, epoch, to: to ?? null, reason }],
  };
}

function resumed({ actor, entries, detect_ms, assign_ms, replay_ms, first_token_ms }: ActorResumed): Change {
  const event: ActorEvent = { type: "actor.resumed", actor, entries, detect_ms, assign_ms, replay_ms };
  return { tell: [first_token_ms === undefined ? event : { ...event, first_token_ms }] };
}

export const workerMachine = setup({
  types: {} as { context: WorkerContext; events: WorkerEvent; emitted: Emitted; input: CreationInput; meta: { group: string } },
  guards: {
    draining: ({ context }) => context.draining,
  },
  actions: {
    tell_joined: enqueueActions((args) => perform(args, { tell: [{ type: "worker.state", from: null, to: "joining", evidence: null }] })),
    rejoin: enqueueActions((args, body: WorkerJoin) => perform(args, rejoined(args.context, body))),
    judge: enqueueActions((args, { evidence }: WorkerEvidence) => perform(args, { context: { evidence: evidence ?? null } })),
    absolve: enqueueActions((args) => perform(args, { context: { evidence: null } })),
    give_reason: enqueueActions((args, { reason }: ReasonBody) => perform(args, { context: { evidence: reason === undefined ? null : { reason } } })),
    drain: enqueueActions((args) => perform(args, { context: { draining: true } })),
    undrain: enqueueActions((args) => perform(args, { context: { draining: false } })),
    assign_shard: enqueueActions((args, body: ShardAssign) => perform(args, assigned(args.context, body))),
    release_shard: enqueueActions((args, body: ShardRelease) => perform(args, released(args.context, body))),
    tell_resumed: enqueueActions((args, body: ActorResumed) => perform(args, resumed(body))),
  },
}).createMachine({
  id: "worker",
  version: "1",
  context: ({ input: { body, now } }) => ({ now, ...joined({ versions: {}, incarnation: "", ...body } as WorkerJoin, now.at_ms), shards: {}, epochs: {} }),
  entry: "tell_joined",
  initial: "joining",
  on: {
    // Also of the dead: that is how their shards are moved.
    "shard.release": { actions: { type: "release_shard", params: ({ event }) => event.body } },
    "actor.resumed": { actions: { type: "tell_resumed", params: ({ event }) => event.body } },
  },
  states: {
    joining: {
      id: "joining",
      meta: { group: "alive" },
      description: "has begun, hosts nothing yet",
      on: {
        "worker.ready": [{ guard: "draining", target: "draining" }, { target: "ready" }],
        "worker.drain": { actions: "drain" },
        "worker.undrain": { actions: "undrain" },
        "worker.declare_dead": { target: "dead", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.leave": { target: "left", actions: { type: "give_reason", params: ({ event }) => event.body } },
      },
    },
    ready: {
      id: "ready",
      meta: { group: "alive" },
      description: "takes shards",
      on: {
        "shard.assign": { actions: { type: "assign_shard", params: ({ event }) => event.body } },
        "worker.drain": { target: "draining", actions: ["drain", { type: "give_reason", params: ({ event }) => event.body }] },
        "worker.suspect": { target: "suspected", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.declare_dead": { target: "dead", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.leave": { target: "left", actions: { type: "give_reason", params: ({ event }) => event.body } },
      },
    },
    draining: {
      id: "draining",
      meta: { group: "alive" },
      description: "its shards move away",
      on: {
        "worker.undrain": { target: "ready", actions: ["undrain", { type: "give_reason", params: ({ event }) => event.body }] },
        "worker.suspect": { target: "suspected", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.declare_dead": { target: "dead", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.leave": { target: "left", actions: { type: "give_reason", params: ({ event }) => event.body } },
      },
    },
    suspected: {
      id: "suspected",
      meta: { group: "alive" },
      description: "one sign of life is missing",
      on: {
        "worker.clear": [
          { guard: "draining", target: "draining", actions: "absolve" },
          { target: "ready", actions: "absolve" },
        ],
        "worker.drain": { actions: "drain" },
        "worker.undrain": { actions: "undrain" },
        "worker.declare_dead": { target: "dead", actions: { type: "judge", params: ({ event }) => event.body } },
        "worker.leave": { target: "left", actions: { type: "give_reason", params: ({ event }) => event.body } },
      },
    },
    dead: {
      id: "dead",
      description: "its shards go to others",
      on: { "worker.join": { target: "joining", actions: { type: "rejoin", params: ({ event }) => event.body } } },
    },
    left: {
      id: "left",
      description: "ended in order",
      on: { "worker.join": { target: "joining", actions: { type: "rejoin", params: ({ event }) => event.body } } },
    },
  },
});

export function workerContextOf(view: Pick<ActorView, "context">): WorkerContext {
  return view.context as unknown as WorkerContext;
}

function refuseAssign({ shards, epochs }: WorkerContext, state: string, { shard, epoch }: ShardAssign): ErrorBody | undefined {
  if (state !== "ready") return undefined; // illegal_transition says it
  const highest = epochs[shard] ?? 0;
  return epoch > highest
    ? undefined
    : errorBody("conflict", `shard ${shard} had epoch ${highest} here already`, { shard, epoch, held: shards[shard] ?? null, highest }); // W1
}

function refuseRelease({ shards }: WorkerContext, { shard, epoch }: ShardRelease): ErrorBody | undefined {
  const held = shards[shard];
  if (held === undefined) return errorBody("not_found", `shard ${shard} is not held here`, { shard });
  return held === epoch ? undefined : errorBody("conflict", `shard ${shard} is held under epoch ${held}, not ${epoch}`, { shard, epoch, held });
}

export const workerDefinition: ActorDefinition = {
  kind: "worker",
  machine: workerMachine,
  creates: "worker.join",
  internal: [
    "worker.join",
    "worker.ready",
    "worker.suspect",
    "worker.clear",
    "worker.declare_dead",
    "worker.leave",
    "shard.assign",
    "shard.release",
    "actor.resumed",
  ],
  effects: {},
  refuse(view, { type, body }) {
    const context = workerContextOf(view);
    switch (type) {
      case "worker.join":
        if ((view.state !== "dead" && view.state !== "left") || body.incarnation !== context.incarnation) return undefined;
        return errorBody("conflict", `this incarnation is ${view.state}; it never comes back`, { incarnation: context.incarnation }); // W3
      case "shard.assign":
        return refuseAssign(context, view.state, body as unknown as ShardAssign);
      case "shard.release":
        return refuseRelease(context, body as unknown as ShardRelease);
      default:
        return undefined;
    }
  },
  waits(view) {
    const held = Object.keys(workerContextOf(view).shards).length;
    const shards = `${held} shard${held === 1 ? "" : "s"}`;
    switch (view.state) {
      case "joining":
        return "waits for the worker to say that it is ready";
      case "ready":
        return `at work with ${shards}: waits for shards, a drain, or a sign that something is wrong`;
      case "draining":
        return `waits until ${shards} have moved away`;
      case "suspected":
        return `waits for a sign of life, or for the end of the grace period; holds ${shards}`;
      case "dead":
        return held === 0 ? "waits for the process to join again" : `waits until ${shards} have another owner`;
      default:
        return "waits for the process to join again";
    }
  },
  moved: ({ before, after }) => ({ type: "worker.state", from: before.state, to: after.state, evidence: workerContextOf(after).evidence }),
};
