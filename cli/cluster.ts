// cluster: workers, shards and drain: who runs where, as the leases and the placement table say, and an operator's word to a worker.
import { TroupeError } from "../protocol/errors.ts";
import { SYSTEM_TENANT } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { pause } from "../protocol/world.ts";
import { askHost } from "../supervisors/host-service.ts";
import {
  decodeLeaderLease,
  decodePlacementEntry,
  decodeWorkerLease,
  LEADER_KEY,
  type PlacementEntry,
  shardOfKey,
  type WorkerLease,
} from "../supervisors/tables.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { ago } from "./printer.ts";

/** A worker that is there answers in a millisecond; one that holds a lease and does not answer is listed without. */
const ASK_MS = 1_000;

export async function leases(context: Context): Promise<WorkerLease[]> {
  const entries = await (await context.bus()).bucket("WORKERS").all();
  const found = entries.flatMap(({ key, value }) => {
    const lease = decodeWorkerLease(value);
    if (lease === undefined) context.printer.note(`the lease of '${key}' cannot be read by this version`);
    return lease ?? [];
  });
  return found.sort((a, b) => (a.id < b.id ? -1 : 1));
}

async function placement(context: Context): Promise<Map<number, PlacementEntry>> {
  const bus = await context.bus();
  const table = new Map<number, PlacementEntry>();
  for (const { key, value } of await bus.bucket("PLACEMENT").all()) {
    const shard = shardOfKey(key, bus.shards);
    const entry = decodePlacementEntry(value);
    if (shard !== undefined && entry !== undefined) table.set(shard, entry);
    else context.printer.note(`the placement under '${key}' cannot be read by this version`);
  }
  return table;
}

/** Calls of models and tools, as the worker itself counts them since it began. */
interface CallsOfWorker {
  readonly in_flight: number;
  /** For a slot of their tenant, or a place in the worker. */
  readonly waiting: number;
  readonly done: number;
  readonly failed: number;
  readonly timed_out: number;
  readonly cancelled: number;
}

/** Of a worker that has an answer for it. */
async function callsOf(context: Context, worker: string): Promise<CallsOfWorker | undefined> {
  const told = await askHost(await context.bus(), worker, "waits", {}, { patience_ms: ASK_MS });
  const ended = told.ok ? told.result.ended : undefined;
  if (!told.ok || ended === undefined) return undefined;
  const sum = (of: keyof typeof ended.models): number => ended.models[of] + ended.tools[of];
  const { waiting } = told.result.calls;
  return { in_flight: sum("running"), waiting, done: sum("done"), failed: sum("failed"), timed_out: sum("timed_out"), cancelled: sum("cancelled") };
}

export async function workers(context: Context): Promise<number> {
  const { printer, ports } = context;
  const all = await leases(context);
  const leader = await (await context.bus()).bucket("LEADER").get(LEADER_KEY);
  // What the leading supervisor thinks of them stands in their journals; a lease says only what a worker says of itself.
  const states = new Map<string, string>();
  for (const stored of await (await context.bus()).last_of_each("EVENTS", `tenant.${SYSTEM_TENANT}.worker.*.event`)) {
    const { actor, state } = decodeJournal(stored.data);
    states.set(actor.id, state);
  }
  const stateOf = (lease: WorkerLease): string => states.get(lease.id) ?? (lease.draining ? "draining" : "joining");
  const leading = leader === undefined ? undefined : decodeLeaderLease(leader.value);
  const calls = new Map(await Promise.all(all.map(async ({ id }) => [id, await callsOf(context, id)] as const)));
  if (printer.json) {
    printer.document({ leader: leading ?? null, workers: all.map((lease) => ({ ...lease, state: stateOf(lease), calls: calls.get(lease.id) ?? null })) });
    return EXIT.done;
  }
  const told = (one: WorkerLease, of: keyof CallsOfWorker): string | number => calls.get(one.id)?.[of] ?? "-";
  printer.table(
    ["worker", "state", "shards", "actors", "effects", "calls", "waiting", "done", "failed", "timed out", "up", "machines"],
    all.map((one) => [
      one.id,
      stateOf(one),
      one.owned,
      one.resident,
      one.running,
      told(one, "in_flight"),
      told(one, "waiting"),
      told(one, "done"),
      told(one, "failed"),
      told(one, "timed_out"),
      ago(ports.world.now_ms() - Date.parse(one.started_at)),
      one.versions.join(" "),
    ]),
  );
  if (all.length === 0) printer.note("no worker holds a lease");
  printer.note(leading === undefined ? "no supervisor leads" : `supervisor ${leading.id} leads`);
  return EXIT.done;
}

export async function shards(context: Context): Promise<number> {
  const { printer, ports } = context;
  const { shards: count } = await context.bus();
  const table = await placement(context);
  const rows = Array.from({ length: count }, (_, shard) => ({ shard, entry: table.get(shard) }));
  if (printer.json) {
    const listed = rows.map(({ shard, entry }) => ({
      shard,
      worker: entry?.worker || null,
      epoch: entry?.epoch ?? 0,
      moving_to: entry?.moving_to ?? null,
      since: entry?.since ?? null,
      from: entry?.from ?? null,
      reason: entry?.reason ?? null,
    }));
    printer.document({ shards: listed });
    return EXIT.done;
  }
  printer.table(
    ["shard", "worker", "epoch", "moving to", "for", "from", "reason"],
    rows.map(({ shard, entry }) => [
      shard,
      entry?.worker || null,
      entry?.epoch ?? null,
      entry?.moving_to,
      entry === undefined ? null : ago(ports.world.now_ms() - Date.parse(entry.since)),
      entry?.from,
      entry?.reason,
    ]),
  );
  const orphans = rows.filter(({ entry }) => !entry?.worker).length;
  if (orphans > 0) printer.note(`${orphans} of ${count} shards have no owner`);
  return EXIT.done;
}

export interface DrainOptions {
  readonly undo?: boolean;
  readonly reason?: string;
  readonly wait?: boolean;
  readonly patience: number;
}

/** How often a drain that is waited for is looked at. */
const LOOK_MS = 500;

export async function drain(context: Context, { undo, reason, wait, patience }: DrainOptions, worker: string): Promise<number> {
  const { printer, ports } = context;
  const type = undo ? "worker.undrain" : "worker.drain";
  const commands = await context.commands();
  const outcome = await commands.command(
    { tenant: SYSTEM_TENANT, kind: "worker", id: worker },
    { type, body: reason === undefined ? {} : { reason }, channel: "control" },
  );
  if (outcome.kind === "refused") throw new TroupeError(outcome.error);
  if (!outcome.reply.ok) throw new TroupeError(outcome.reply.error);
  const { state } = outcome.reply;
  if (!wait || undo) {
    if (printer.json) printer.document({ worker, state });
    else printer.line(`${worker} is ${state}`);
    return EXIT.done;
  }
  const until_ms = ports.world.monotonic_ms() + patience * 1000;
  for (let owned = Number.POSITIVE_INFINITY; ; await pause(ports.world, LOOK_MS)) {
    const lease = (await leases(context)).find((one) => one.id === worker);
    const owns = [...(await placement(context)).values()].filter((entry) => entry.worker === worker).length;
    if (lease === undefined || owns === 0) {
      if (printer.json) printer.document({ worker, state: "drained", shards: 0 });
      else printer.line(`${worker} owns no shard any more`);
      return EXIT.done;
    }
    if (owns < owned && !printer.json) printer.note(`${worker} still owns ${owns} shards, ${lease.running} effects run`);
    owned = Math.min(owned, owns);
    if (ports.world.monotonic_ms() >= until_ms) {
      if (printer.json) printer.document({ worker, state, shards: owns });
      printer.note(`after ${patience} s ${worker} still owns ${owns} shards; it goes on draining`);
      return EXIT.refused;
    }
  }
}
