// shard-host: the shards this process owns, their inboxes, and the actors of theirs that are in memory.
//
//   take(shard) ──▶ taking ──▶ owning ──leave──▶ leaving ──▶ gone
//                     └───────────┴─────drop───────┴──▶ gone
//
// Owns: the pull consumers of a shard on COMMANDS and TIMERS, its actors' resident marks, passivation.
// Leaves to supervisors: who owns what. The journal is the fence; ownership here only says who should try.
//
// Invariants:
//   H1. An actor's cell exists at most once in this process.
//   H2. A taken shard restores every actor that has a resident mark: those and only those may owe something.
//   H3. A mark is cleared only by compare-and-set on the very message, after the actor settled what it owed.
//   H4. What a tenant's client says of itself in headers gives it no power: not who it is, and an answer goes to its own inbox or nowhere.
//   H5. What no journal remembers (a refusal of an actor that does not exist, or one too many) is told only once the stored command is gone for
//       sure: it would be decided anew if it came again, and may be taken then.
import { type Bus, type CoreMessage, type Delivery, headerOf, type StoredMessage, type Subscription } from "../bus/port.ts";
import { assert } from "../protocol/assert.ts";
import { decodeCommand, HEADER_IDEMPOTENCY_KEY, HEADER_PRINCIPAL, HEADER_REPLY_TO, HEADER_SUBJECT } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { PASSIVATE_AFTER_MS } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { isPrincipal, PRINCIPAL_ON_BUS } from "../protocol/principal.ts";
import { encodeReply } from "../protocol/reply.ts";
import {
  type CommandChannel,
  fastLaneSubject,
  isFromEdge,
  isReplyAllowed,
  parseActorSubject,
  parseDueSubject,
  parseResidentSubject,
  replyRoute,
  residentSubject,
  RUNTIME_INBOX_PREFIX,
  shardCommandFilters,
  shardDueFilter,
  shardOf,
} from "../protocol/subjects.ts";
import { pause, type World } from "../protocol/world.ts";
import type { Outcome } from "../state-machines/step.ts";
import { ActorCell, type CellDeps, type CellObserver } from "./cell.ts";
import { createRefusedTwins } from "./refused-twins.ts";
import { createEntryCache } from "./entry-cache.ts";
import { createDispatch, type Dispatch, type Lane } from "./dispatch.ts";
import type { Decide, MailItem } from "./mailbox.ts";
import type { Performers } from "./performer.ts";
import type { Cores, Restorer } from "./restore.ts";
import { createWarmActors } from "./warm-actors.ts";

export interface Resumed {
  readonly actor: ActorAddress;
  readonly shard: number;
  readonly epoch: number;
  readonly from: string | null;
  readonly reason: string;
  /** Journal entries replayed. */
  readonly entries: number;
  /** From taking the shard to the actor being claimed. */
  readonly replay_ms: number;
}

export interface ShardHostDeps {
  readonly bus: Bus;
  readonly world: World;
  readonly log: Log;
  readonly cores: Cores;
  readonly restorer: Restorer;
  readonly performers: Performers;
  readonly worker: string;
  readonly next_commit_id: () => string;
  may_act(): boolean;
  /** A fence refused us under this epoch: asks the leader's placement. */
  on_conflict(shard: number, epoch: number): Promise<"mine" | "lost">;
  readonly admit?: (actor: ActorAddress, ...asked: Parameters<NonNullable<CellDeps["admit"]>>) => ReturnType<NonNullable<CellDeps["admit"]>>;
  on_resumed?(resumed: Resumed): void;
  readonly assume_cost?: CellDeps["assume_cost"];
  readonly observer?: CellObserver;
  readonly passivate_after_ms?: number;
  /** Whose command goes next. Absent: one of its own, with the usual bounds. */
  readonly dispatch?: Dispatch;
}

export interface ShardStatus {
  readonly shard: number;
  readonly epoch: number;
  readonly phase: "taking" | "owning" | "leaving";
  readonly resident: number;
  /** Actors with effects working. */
  readonly running: number;
}

export interface ShardHost {
  /** Reads beforehand what will be needed when the shard comes, and touches nothing of it: another owns it. Answers how many actors are known now. */
  prepare(shard: number): Promise<number>;
  /** Restores what owes anything and begins to consume the shard's inbox, as its owner under `epoch`. Resolves when consuming. */
  take(shard: number, epoch: number, from: { worker: string | null; reason: string }): Promise<void>;
  /** Planned leaving: goes on appending, starts no new effects; resolves once no effect of the shard works or the deadline passed, everything stopped. */
  leave(shard: number, deadline_ms: number): Promise<{ gap: boolean }>;
  /** Drops the shard at once: ownership is lost. */
  drop(shard: number): Promise<void>;
  owned(): readonly ShardStatus[];
  resident(): ActorAddress[];
  /** Restores an actor of an owned shard now; false when its shard is not ours. */
  load(actor: ActorAddress): Promise<boolean>;
  /** Lets an idle actor leave memory; false when it is not here or not idle. */
  passivate(actor: ActorAddress): Promise<boolean>;
  stop(): Promise<void>;
}

/**
 * How often idle actors are looked at. Also the time after which a quiet actor's mark is cleared: whoever takes over restores all that are
 * marked, so those that owe nothing should not be among them for long. (With 5 s they were more than those that did.)
 */
const REST_EVERY_MS = 1_000;
/** And how often those that have settled everything: only their snapshots grow old. */
const RESTED_EVERY_MS = 5_000;
/** What a refusal for want of room says when to come again: by then some thousand commands have been decided. */
const OVERLOADED_RETRY_MS = 1_000;
/**
 * Restores at once in a process: enough that the broker is never waited for, few enough that the first actors go on while the last are
 * still read. All at once they would share the processor, and all be as late as the last.
 */
const RESTORES_AT_ONCE = 8;
/** An actor that cannot be restored in this time goes on trying beside the others, and holds up nobody. */
const RESTORE_PATIENCE_MS = 1_000;
/** An append that is under way when a shard leaves gets this long to be answered; the journal knows its fate in any case. */
const SETTLE_MS = 1_000;
/** How long a suspect waits at least: the restores of one take-over are over by then. */
const QUARANTINE_MS = 200;
/** Looks for a gap this often while leaving. */
const LEAVE_POLL_MS = 10;

/** A resident mark: none, stored at a sequence, on its way out, or perhaps out: the answer got lost. */
type Mark =
  | { readonly kind: "none" }
  | { readonly kind: "set"; readonly sequence: number }
  | { readonly kind: "clearing"; readonly done: Promise<void> }
  | { readonly kind: "doubtful"; readonly sequence: number };

interface Resident {
  readonly cell: ActorCell;
  mark: Mark;
  rested_ms: number;
}

interface Shard {
  readonly number: number;
  readonly epoch: number;
  readonly from: { worker: string | null; reason: string };
  phase: ShardStatus["phase"] | "gone";
  readonly taken_ms: number;
  readonly residents: Map<string, Resident>;
  readonly subscriptions: Subscription[];
  /** What its inbox delivered, and what came by the fast lane, on the way to mailboxes. */
  readonly inbox: Lane;
  readonly fast: Lane;
  /** Marks found on taking, by actor path. */
  readonly found_marks: Map<string, number>;
}

export function createShardHost(deps: ShardHostDeps): ShardHost {
  const { bus, world, log, cores, worker } = deps;
  const shards = new Map<number, Shard>();
  const entries = createEntryCache(bus);
  const warm = createWarmActors({
    bus,
    world,
    log,
    restorer: deps.restorer,
    heard: (actor, message) => entries.add(actor, message),
    forgot(actor) {
      if (shards.get(shardOf(actor, bus.shards))?.residents.has(actorPath(actor)) !== true) entries.forget(actor);
    },
  });
  const dispatch = deps.dispatch ?? createDispatch({ world });
  const refused_durably = createRefusedTwins();
  const passivateAfterMs = deps.passivate_after_ms ?? PASSIVATE_AFTER_MS;
  let stopped = false;

  // ── actors ───────────────────────────────────────────────────────────────────────────────────────────────────────

  async function ensureMark(shard: Shard, resident: Resident): Promise<void> {
    for (let tries = 0; shard.phase !== "gone"; tries++) {
      if (resident.mark.kind === "set") return;
      if (resident.mark.kind === "clearing") {
        await resident.mark.done;
        continue;
      }
      const stored = await bus.publish(residentSubject(shard.number, resident.cell.actor), new Uint8Array());
      if (stored.kind === "stored") resident.mark = { kind: "set", sequence: stored.sequence };
      else await pause(world, Math.min(1000, 20 * 2 ** tries));
    }
  }

  async function clearMark(shard: Shard, resident: Resident): Promise<void> {
    if (resident.mark.kind !== "set" && resident.mark.kind !== "doubtful") return;
    const { sequence } = resident.mark;
    const clearing = bus.clear("RESIDENT", residentSubject(shard.number, resident.cell.actor), sequence).then((outcome) => {
      // A conflict means that somebody marked it again: theirs stands, and ours is gone either way.
      // Without an answer it may be gone: it counts as a mark no more, and is cleared again when there is nothing owed.
      resident.mark = outcome.kind === "unavailable" ? { kind: "doubtful", sequence } : { kind: "none" };
    });
    resident.mark = { kind: "clearing", done: clearing };
    await clearing;
  }

  /** `began_ms`: since when it is waited for, for the history of what resumed. */
  function residentOf(shard: Shard, actor: ActorAddress, began_ms = world.monotonic_ms()): Resident | undefined {
    const path = actorPath(actor);
    const present = shard.residents.get(path);
    if (present !== undefined) return present; // H1
    const core = cores[actor.kind];
    if (core === undefined) return undefined;
    const { admit } = deps;
    const cell: ActorCell = new ActorCell({
      actor,
      core,
      bus,
      world,
      log,
      restorer: deps.restorer,
      performers: deps.performers,
      entries,
      worker,
      epoch: shard.epoch,
      next_commit_id: deps.next_commit_id,
      may_act: () => deps.may_act() && shard.phase !== "gone",
      holding: () => shard.phase === "leaving",
      conflict: () => deps.on_conflict(shard.number, shard.epoch),
      mark: () => ensureMark(shard, resident),
      unmarking: () => resident.mark.kind === "clearing",
      claim_reason: shard.from.reason,
      warm: () => warm.take(actor),
      resumed: (resumed) =>
        deps.on_resumed?.({
          ...resumed,
          shard: shard.number,
          epoch: shard.epoch,
          from: shard.from.worker,
          reason: shard.from.reason,
          replay_ms: world.monotonic_ms() - began_ms,
        }),
      ...(admit === undefined ? {} : { admit: (command, view) => admit(actor, command, view) }),
      ...(deps.observer === undefined ? {} : { observer: deps.observer }),
      ...(deps.assume_cost === undefined ? {} : { assume_cost: deps.assume_cost }),
      quarantine,
    });
    // The owner before us may have asked for it to be cleared, and the asking may still arrive: what we owe needs a mark of our own.
    const found = shard.found_marks.get(path);
    shard.found_marks.delete(path);
    const resident: Resident = { cell, mark: found === undefined ? { kind: "none" } : { kind: "doubtful", sequence: found }, rested_ms: 0 };
    shard.residents.set(path, resident);
    return resident;
  }

  /** Suspects begin one after another, those that lost most first: so the guilty one is found before it costs the others their tries. */
  const suspects: { readonly tries: number; readonly begin: (leave: () => void) => void }[] = [];
  let suspect_out = false;
  function quarantine(tries: number): Promise<() => void> {
    return new Promise((resolve) => {
      suspects.push({ tries, begin: resolve });
      suspects.sort((a, b) => b.tries - a.tries);
      // A moment for the others of the same loss to arrive, so that the order means something.
      void world.after(QUARANTINE_MS, nextSuspect);
    });
  }
  function nextSuspect(): void {
    if (suspect_out) return;
    const next = suspects.shift();
    if (next === undefined) return;
    suspect_out = true;
    next.begin(() => {
      suspect_out = false;
      nextSuspect();
    });
  }

  // ── the inbox ────────────────────────────────────────────────────────────────────────────────────────────────────

  function onCommand(shard: Shard, delivery: Delivery): void {
    const { message } = delivery;
    const parsed = parseActorSubject(message.subject);
    if (parsed.kind === "malformed" || (parsed.channel !== "command" && parsed.channel !== "control")) {
      log.warn("a message on no actor's subject is set aside", { subject: message.subject.slice(0, 200) });
      // There is no mailbox for it and no journal; whoever sent it is told all the same.
      const reply = replyTo(parsed.kind === "malformed" ? parsed.tenant : parsed.actor.tenant, message);
      const reason = parsed.kind === "malformed" ? parsed.reason : `'${parsed.channel}' takes no commands`;
      if (reply.kind === "to") bus.send(reply.subject, encodeReply({ ok: false, actor: "", error: errorBody("invalid", reason) }));
      delivery.ack();
      return;
    }
    const { actor, channel } = parsed;
    const overloaded = overload(actor, channel, false);
    shard.inbox.put(actor.tenant, actor.kind, actorPath(actor), (done) => hand(shard, delivery, actor, channel, overloaded, done));
  }

  /** It is the turn of a command from the inbox: it goes to its actor's mailbox. */
  function hand(shard: Shard, delivery: Delivery, actor: ActorAddress, channel: CommandChannel, overloaded: ErrorBody | undefined, done: () => void): void {
    const { message, source } = delivery;
    const reply = replyTo(actor.tenant, message);
    let settled = false;
    const said_no = headerOf(message.headers, HEADER_REPLY_TO);
    const decided: Decide = (outcome, after_sequence) => {
      if (!outcome.ok && said_no !== undefined) refused_durably.add(said_no);
      if (reply.kind === "to") bus.send(reply.subject, answerOf(actor, outcome, after_sequence));
      if (!settled) delivery.ack();
      done();
    };
    const settle = async (): Promise<boolean> => {
      settled = await settleFor(shard, delivery);
      return settled;
    };
    const resident = residentOf(shard, actor);
    if (resident === undefined) {
      const error = errorBody("invalid", `this runtime hosts no actors of kind '${actor.kind}'`);
      void settle().then((gone) => gone && decided({ ok: false, error }));
      return;
    }
    const { principal } = whoSaid(message);
    const decoding = decodeCommand(actor.kind, channel, message.data, (name) => (name === HEADER_PRINCIPAL ? principal : headerOf(message.headers, name)));
    const item: MailItem =
      reply.kind === "forbidden"
        ? {
            kind: "refused",
            error: errorBody("forbidden", `${HEADER_REPLY_TO} must lie under the sender's own inbox prefix`),
            type: "?",
            channel,
            source,
            decided,
            settle,
          }
        : decoding.kind === "command"
          ? { kind: "command", command: decoding.command, source, decided, settle, ...(overloaded === undefined ? {} : { overloaded }) }
          : { kind: "refused", error: decoding.error, type: decoding.type ?? "?", channel, source, decided, settle };
    resident.cell.push(item.kind === "refused" ? { ...item, ...whoSaid(message) } : item);
  }

  /** H5. Answers whether the stored command is gone, and was ours to the end. When that is not known, all that is undecided begins anew with it. */
  async function settleFor(shard: Shard, delivery: Delivery): Promise<boolean> {
    if (await delivery.settle()) return (await deps.on_conflict(shard.number, shard.epoch)) === "mine"; // another owner may have had it before it was gone
    startOver(shard);
    return false;
  }

  /** The inbox begins again from its first unacknowledged message: what waits here of it comes again. */
  function startOver(shard: Shard): void {
    shard.inbox.clear();
    for (const { cell } of shard.residents.values()) cell.forget_commands();
  }

  /** What is told to a tenant that has more waiting here than it may. What the runtime itself says (`control`) is never refused for that. */
  function overload(actor: ActorAddress, channel: CommandChannel, hurried: boolean): ErrorBody | undefined {
    if (channel === "control" || dispatch.pressure(actor.tenant, actor.kind, hurried) !== "refusing") return undefined;
    return errorBody("overloaded", "too many commands of this tenant wait to be decided", { waits_for: "dispatch", retry_after_ms: OVERLOADED_RETRY_MS });
  }

  /** A command by core request, from a process of ours: the same mailbox, the same decision; its answer is its only acknowledgement. */
  function onFast(shard: Shard, message: CoreMessage): void {
    const parsed = parseActorSubject(headerOf(message.headers, HEADER_SUBJECT) ?? "");
    const { reply } = message;
    if (parsed.kind === "malformed" || (parsed.channel !== "command" && parsed.channel !== "control")) return;
    const { actor, channel } = parsed;
    // Without a key it could not be told from its durable twin; at the wrong shard it is not ours to decide.
    if (
      reply === undefined ||
      !reply.startsWith(RUNTIME_INBOX_PREFIX) ||
      headerOf(message.headers, HEADER_IDEMPOTENCY_KEY) === undefined ||
      shardOf(actor, bus.shards) !== shard.number
    )
      return;
    if (cores[actor.kind] === undefined) return; // the durable way has the refusal
    const answer: Decide = (outcome, after_sequence) => bus.send(reply, answerOf(actor, outcome, after_sequence));
    const overloaded = overload(actor, channel, true);
    if (overloaded !== undefined) return answer({ ok: false, error: overloaded }); // stored nowhere, so nothing is answered away
    shard.fast.put(actor.tenant, actor.kind, actorPath(actor), (done) => {
      const decided: Decide = (outcome, after_sequence) => {
        answer(outcome, after_sequence);
        done();
      };
      const decoding = decodeCommand(actor.kind, channel, message.data, (name) => headerOf(message.headers, name));
      residentOf(shard, actor)?.cell.push(
        decoding.kind === "command"
          ? { kind: "command", command: decoding.command, decided, given_up: done, late: () => refused_durably.has_twin(reply) }
          : { kind: "refused", error: decoding.error, type: decoding.type ?? "?", channel, decided, ...whoSaid(message) },
      );
    });
  }

  function answerOf(actor: ActorAddress, outcome: Outcome, after_sequence: number | undefined): Uint8Array {
    const path = actorPath(actor);
    if (!outcome.ok) return encodeReply({ ok: false, actor: path, error: outcome.error });
    const { seq, state, result } = outcome;
    return encodeReply({ ok: true, actor: path, seq, state, result, ...(after_sequence === undefined ? {} : { after_sequence }) });
  }

  function replyTo(tenant: string | undefined, message: StoredMessage): { kind: "none" } | { kind: "to"; subject: string } | { kind: "forbidden" } {
    const subject = headerOf(message.headers, HEADER_REPLY_TO);
    if (subject === undefined || subject === "") return { kind: "none" };
    const said_by = isFromEdge(message.subject) ? "client" : "runtime";
    return tenant !== undefined && isReplyAllowed(tenant, subject, said_by) ? { kind: "to", subject: replyRoute(tenant, subject) } : { kind: "forbidden" };
  }

  /** Of a tenant's client only that it was one, whatever its headers say (H4). */
  function whoSaid({ subject, headers }: Pick<StoredMessage, "subject" | "headers">): { principal?: string } {
    const said = isFromEdge(subject) ? PRINCIPAL_ON_BUS : headerOf(headers, HEADER_PRINCIPAL);
    return isPrincipal(said) ? { principal: said } : {};
  }

  function onDue(shard: Shard, delivery: Delivery): void {
    const actor = parseDueSubject(delivery.message.subject);
    const resident = actor === undefined ? undefined : residentOf(shard, actor);
    if (resident === undefined) {
      delivery.ack();
      return;
    }
    // The timer entry is in the mailbox, or the state has none due any more; either way the actor's ledger remembers, not the message.
    void resident.cell.load().then(async () => {
      if (resident.cell.phase === "stopped") return;
      if (Object.keys(resident.cell.state?.timers ?? {}).length > 0) await ensureMark(shard, resident);
      resident.cell.due();
      delivery.ack();
    });
  }

  // ── shards ───────────────────────────────────────────────────────────────────────────────────────────────────────

  async function marksOf(shard: Shard): Promise<void> {
    for (let tries = 0; shard.phase !== "gone"; tries++) {
      try {
        for (const mark of await bus.last_of_each("RESIDENT", `resident.${shard.number}.>`)) {
          const parsed = parseResidentSubject(mark.subject);
          if (parsed === undefined) continue;
          const path = actorPath(parsed.actor);
          const resident = shard.residents.get(path);
          // A command was faster: the mark is this resident's, and not of a later one that would trust it when it is long cleared.
          if (resident === undefined) shard.found_marks.set(path, mark.sequence);
          else if (resident.mark.kind === "none") resident.mark = { kind: "doubtful", sequence: mark.sequence };
        }
        return;
      } catch (error) {
        log.warn("resident marks cannot be read yet", { shard: shard.number, ...errorFields(error) });
        await pause(world, Math.min(1000, 20 * 2 ** tries));
      }
    }
  }

  let restoring = 0;
  const restores_waiting: (() => void)[] = [];
  function restoreSlot(): Promise<void> {
    restoring += 1;
    return restoring <= RESTORES_AT_ONCE ? Promise.resolve() : new Promise((resolve) => restores_waiting.push(resolve));
  }
  function restoreDone(): void {
    restoring -= 1;
    restores_waiting.shift()?.();
  }

  /** H2 */
  async function restoreMarked(shard: Shard): Promise<void> {
    // Budgets first: what goes on with a model call asks them.
    const marked = [...shard.found_marks.keys()]
      .map((path) => path.split("/") as [string, ActorAddress["kind"], string])
      .sort(([, a], [, b]) => Number(b === "budget") - Number(a === "budget"));
    await Promise.all(
      marked.map(async ([tenant, kind, id]) => {
        await restoreSlot();
        const resident = shard.phase === "gone" ? undefined : residentOf(shard, { tenant, kind, id }, shard.taken_ms);
        // What it owes will need a mark of our own: that is on its way while the journal is read.
        if (resident !== undefined) void ensureMark(shard, resident);
        if (resident !== undefined) await Promise.race([resident.cell.read(), pause(world, RESTORE_PATIENCE_MS)]);
        restoreDone();
      }),
    );
  }

  async function consume(shard: Shard): Promise<void> {
    shard.subscriptions.push(
      bus.subscribe(fastLaneSubject(shard.number), (message) => {
        if (shard.phase !== "gone") onFast(shard, message);
      }),
    );
    const specs = [
      { stream: "COMMANDS" as const, durable: `shard-${shard.number}`, filters: shardCommandFilters(shard.number), take: onCommand },
      { stream: "TIMERS" as const, durable: `due-${shard.number}`, filters: [shardDueFilter(shard.number)], take: onDue },
    ];
    for (const { stream, durable, filters, take } of specs) {
      const subscription = await bus.consume(
        { stream, durable, filters },
        {
          on_delivery: (delivery) => {
            if (shard.phase !== "gone") take(shard, delivery);
          },
          on_reset: () => {
            if (stream === "COMMANDS") startOver(shard);
          },
        },
      );
      if ((shard.phase as string) === "gone") await subscription.stop();
      else shard.subscriptions.push(subscription);
    }
  }

  async function end(shard: Shard): Promise<void> {
    if (shard.phase === "gone") return;
    shard.phase = "gone";
    if (shards.get(shard.number) === shard) shards.delete(shard.number);
    shard.inbox.clear();
    shard.fast.clear();
    for (const { cell } of shard.residents.values()) {
      cell.stop();
      entries.forget(cell.actor);
    }
    await Promise.all(shard.subscriptions.map((subscription) => subscription.stop()));
  }

  async function restOnce(shard: Shard, path: string, resident: Resident): Promise<void> {
    const { cell } = resident;
    if (cell.phase === "stopped") {
      shard.residents.delete(path);
      return;
    }
    if (cell.idle_ms() < Math.min(REST_EVERY_MS, passivateAfterMs) || !cell.idle) return;
    const now_ms = world.monotonic_ms();
    if (resident.mark.kind === "none" && now_ms - resident.rested_ms < Math.min(RESTED_EVERY_MS, passivateAfterMs)) return;
    resident.rested_ms = now_ms;
    if (!(await cell.rest())) return;
    await clearMark(shard, resident);
    if (cell.idle && cell.idle_ms() >= passivateAfterMs && resident.mark.kind === "none") {
      shard.residents.delete(path);
      cell.stop();
      entries.forget(cell.actor);
    }
  }

  function restLater(): void {
    void world.after(Math.min(REST_EVERY_MS, passivateAfterMs), () => {
      if (stopped) return;
      const due = [...shards.values()].flatMap((shard) =>
        shard.phase === "owning" ? [...shard.residents].map(([path, resident]) => ({ shard, path, resident })) : [],
      );
      const next = async (): Promise<void> => {
        for (let one = due.pop(); one !== undefined; one = due.pop()) await restOnce(one.shard, one.path, one.resident);
      };
      Promise.all(Array.from({ length: 16 }, next))
        .catch((error: unknown) => log.error("resting broke", errorFields(error)))
        .finally(restLater);
    });
  }
  restLater();

  const shardOfActor = (actor: ActorAddress): Shard | undefined => shards.get(shardOf(actor, bus.shards));

  return {
    prepare: (number) => (stopped || shards.has(number) ? Promise.resolve(0) : warm.prepare(number)),

    async take(number, epoch, from) {
      assert(!stopped, "a stopped host takes nothing");
      const before = shards.get(number);
      if (before !== undefined && before.epoch >= epoch) return;
      if (before !== undefined) await end(before);
      const shard: Shard = {
        number,
        epoch,
        from,
        phase: "taking",
        taken_ms: world.monotonic_ms(),
        residents: new Map(),
        subscriptions: [],
        inbox: dispatch.lane(),
        fast: dispatch.lane(),
        found_marks: new Map(),
      };
      shards.set(number, shard);
      // Who was cut off in the middle of something goes on first: the broker answers one connection's questions in their order.
      const restored = marksOf(shard).then(() => restoreMarked(shard));
      restored.catch((error: unknown) => log.error("restoring marked actors broke", { shard: number, ...errorFields(error) }));
      await consume(shard);
      if (shard.phase === "taking") shard.phase = "owning";
    },

    async leave(number, deadline_ms) {
      const shard = shards.get(number);
      if (shard === undefined) return { gap: true };
      shard.phase = "leaving";
      const until_ms = world.monotonic_ms() + deadline_ms;
      const working = (): boolean => [...shard.residents.values()].some(({ cell }) => cell.working > 0 || cell.phase === "loading");
      while (working() && world.monotonic_ms() < until_ms && (shard.phase as string) === "leaving") await pause(world, LEAVE_POLL_MS);
      const gap = !working();
      // No more commands from here on; what is deciding right now ends its append, so that the result of the last effect is journaled.
      await Promise.all(shard.subscriptions.splice(0).map((subscription) => subscription.stop()));
      const loops = [...shard.residents.values()].map(({ cell }) => cell.settled());
      await Promise.race([Promise.all(loops), pause(world, SETTLE_MS)]);
      await end(shard);
      return { gap };
    },

    async drop(number) {
      const shard = shards.get(number);
      if (shard !== undefined) await end(shard);
    },

    owned: () =>
      [...shards.values()].flatMap((shard) =>
        shard.phase === "gone"
          ? []
          : [
              {
                shard: shard.number,
                epoch: shard.epoch,
                phase: shard.phase,
                resident: shard.residents.size,
                running: [...shard.residents.values()].filter(({ cell }) => cell.working > 0).length,
              },
            ],
      ),

    resident: () => [...shards.values()].flatMap((shard) => [...shard.residents.values()].map(({ cell }) => cell.actor)),

    async load(actor) {
      const shard = shardOfActor(actor);
      const resident = shard === undefined ? undefined : residentOf(shard, actor);
      if (resident === undefined) return false;
      await resident.cell.load();
      return true;
    },

    async passivate(actor) {
      const shard = shardOfActor(actor);
      const resident = shard?.residents.get(actorPath(actor));
      if (shard === undefined || resident === undefined || !(await resident.cell.rest())) return false;
      await clearMark(shard, resident);
      if (!resident.cell.idle) return false;
      shard.residents.delete(actorPath(actor));
      resident.cell.stop();
      entries.forget(actor);
      return true;
    },

    async stop() {
      stopped = true;
      warm.stop();
      await Promise.all([...shards.values()].map(end));
    },
  };
}
