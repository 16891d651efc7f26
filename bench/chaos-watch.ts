// chaos-watch: what an operator sees of a running system, with the moment at which it arrived here: what the streams stored, who owns which
// shard, who leads, and which model calls run.
import { decodeJournal, type JournalMessage } from "../protocol/journal.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import { parseActorSubject, shardOf } from "../protocol/subjects.ts";
import { type Bus, headerOf, type Subscription } from "../bus/port.ts";
import { decodeLeaderLease, decodePlacementEntry, LEADER_KEY, type PlacementEntry, shardOfKey } from "../supervisors/tables.ts";

const now = (): number => performance.now();

/** A journal message as it was stored. */
export interface Heard {
  readonly actor: ActorAddress;
  readonly message: JournalMessage;
  readonly sequence: number;
  readonly at_ms: number;
}

export interface RunningCall {
  readonly session: string;
  readonly turn: number;
  readonly step: number;
}

export interface Watch {
  /** Every journal message that was stored, of any actor. */
  onJournal(listener: (heard: Heard) => void): () => void;
  /** Appends of sessions as they were tried, also those that the fence refused. */
  onTry(listener: (message: JournalMessage, at_ms: number) => void): () => void;
  ownerOf(session: string): PlacementEntry | undefined;
  shardsOf(worker: string): number[];
  placement(): ReadonlyMap<number, PlacementEntry>;
  leader(): string | undefined;
  /** As the workers' journals say. */
  stateOf(worker: string): string | undefined;
  /** Sessions whose model call stands in the journal as begun and not as ended. */
  running(): RunningCall[];
  stop(): Promise<void>;
}

export async function startWatch(bus: Bus): Promise<Watch> {
  const placement = new Map<number, PlacementEntry>();
  const states = new Map<string, string>();
  const running = new Map<string, RunningCall>();
  const journal_listeners = new Set<(heard: Heard) => void>();
  const try_listeners = new Set<(message: JournalMessage, at_ms: number) => void>();
  let leader: string | undefined;
  const subscriptions: Subscription[] = [];

  const follow = ({ actor, message }: Heard): void => {
    if (actor.kind === "worker") states.set(actor.id, message.state);
    if (actor.kind !== "session") return;
    for (const event of message.events) {
      if (event.type === "model.started") running.set(actor.id, { session: actor.id, turn: Number(event["turn"]), step: Number(event["step"]) });
      else if (event.type === "model.completed" || event.type === "model.failed" || event.type.startsWith("turn.")) running.delete(actor.id);
    }
  };
  subscriptions.push(
    bus.subscribe("live.tenant.*.*.*.event", ({ subject, data, headers }) => {
      const at_ms = now();
      const parsed = parseActorSubject(subject);
      if (parsed.kind === "malformed") return;
      const heard = { actor: parsed.actor, message: decodeJournal(data), sequence: Number(headerOf(headers, "Nats-Sequence")), at_ms };
      follow(heard);
      for (const listener of [...journal_listeners]) listener(heard);
    }),
    await bus.bucket("PLACEMENT").watch((change) => {
      const key = change.kind === "put" ? change.entry.key : change.key;
      const shard = shardOfKey(key, bus.shards);
      if (shard === undefined) return;
      const entry = change.kind === "put" ? decodePlacementEntry(change.entry.value) : undefined;
      if (entry === undefined) placement.delete(shard);
      else placement.set(shard, entry);
    }),
    await bus.bucket("LEADER").watch((change) => {
      if (change.kind === "put" && change.entry.key === LEADER_KEY) leader = decodeLeaderLease(change.entry.value)?.id;
      else if (change.kind === "gone") leader = undefined;
    }),
  );
  let tries: Subscription | undefined;
  return {
    onJournal(listener) {
      journal_listeners.add(listener);
      return () => void journal_listeners.delete(listener);
    },
    onTry(listener) {
      try_listeners.add(listener);
      // The bare subject bears every append once more; it is listened to only when somebody wants it.
      tries ??= bus.subscribe("tenant.*.session.*.event", ({ data }) => {
        if (data.byteLength === 0) return;
        const message = decodeJournal(data);
        for (const one of [...try_listeners]) one(message, now());
      });
      return () => void try_listeners.delete(listener);
    },
    ownerOf: (session) => placement.get(shardOf({ tenant: "bench", kind: "session", id: session }, bus.shards)),
    shardsOf: (worker) => [...placement].flatMap(([shard, entry]) => (entry.worker === worker ? [shard] : [])),
    placement: () => placement,
    leader: () => leader,
    stateOf: (worker) => states.get(worker),
    running: () => [...running.values()],
    async stop() {
      await Promise.all([...subscriptions, ...(tries === undefined ? [] : [tries])].map((subscription) => subscription.stop()));
    },
  };
}
