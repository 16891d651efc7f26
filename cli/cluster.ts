// cluster: workers, shards and drain: who runs where, as the leases and the placement table say, and an operator's word to a worker.
import { TroupeError } from "../protocol/errors.ts";
import { SYSTEM_TENANT } from "../protocol/ids.ts";
import { decodeJournal } from "../protocol/journal.ts";
import { pause } from "../protocol/world.ts";
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
  if (printer.json) {
    printer.document({ leader: leading ?? null, workers: all.map((lease) => ({ ...lease, state: stateOf(lease) })) });
    return EXIT.done;
  }
  printer.table(
    ["worker", "state", "shards", "actors", "effects", "up", "machines"],
    all.map((one) => [
      one.id,
      stateOf(one),
      one.owned,
      one.resident,
      one.running,
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
