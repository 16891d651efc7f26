// explain: why an actor waits, who had it, and what happened to it: one story out of its own journal, the workers' journals (what the leading
// supervisor decided), and the placement table. unpark: an operator's word that a parked session may try again.
//
// Everything stands in one stream, so the order of the story is the order in which things were stored, whatever the clocks said.
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, SYSTEM_TENANT } from "../protocol/ids.ts";
import { type ActorEvent, decodeJournal, type JournalMessage } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { actorSubject, shardOf } from "../protocol/subjects.ts";
import { timestamp } from "../protocol/world.ts";
import type { ActorDefinition } from "../state-machines/definition.ts";
import { viewOf } from "../state-machines/step.ts";
import { decodePlacementEntry, type PlacementEntry, placementKey } from "../supervisors/tables.ts";
import type { Context } from "./context.ts";
import { coreFor } from "./look.ts";
import { EXIT } from "./ports.ts";
import { ago } from "./printer.ts";
import { byWords, entryWords } from "./replay.ts";
import { callWaitOf } from "./waits.ts";

/** One thing that happened. */
interface Chapter {
  readonly at: string;
  /** In the stream. */
  readonly sequence: number;
  /** Whose doing: the actor's owner, or the supervisors'. */
  readonly by: "owner" | "supervisor";
  readonly worker: string;
  readonly what: string;
  readonly text: string;
}

interface Told {
  readonly sequence: number;
  readonly message: JournalMessage;
}

const isObject = (value: Json | undefined): value is JsonObject => typeof value === "object" && value !== null && !Array.isArray(value);
const ms = (value: Json | undefined): string => (typeof value === "number" ? `${Math.round(value)} ms` : "an unknown time");

/** What a judgement rests on, in words. */
function evidenceWords(evidence: Json | undefined): string {
  if (!isObject(evidence)) return "";
  const { kind, silent_ms, main, life, which, reason, by } = evidence;
  const closed = (end: Json | undefined): string => (isObject(end) ? `${String(end["at"]).slice(11, 23)}, ${String(end["reason"])}` : "unknown");
  switch (kind) {
    case "connections_closed":
      return `both connections closed (the working one ${closed(main)}; the idle one ${closed(life)}), and nobody answered; noticed after ${ms(silent_ms)}`;
    case "connection_not_back":
      return `its connection closed (${closed(main)}) and was not back after ${ms(silent_ms)}`;
    case "connection_closed":
      return `its ${which === "life" ? "idle" : "working"} connection closed (${String(reason)})`;
    case "lease_expired":
      return `its lease expired; it was last heard ${ms(silent_ms)} before`;
    case "new_incarnation":
      return `another process joined under its name (${String(by)})`;
    case "silent":
      return `it was silent for ${ms(silent_ms)}`;
    default:
      return typeof reason === "string" ? reason : JSON.stringify(evidence).slice(0, 200);
  }
}

/** `2:xstate.after.idle_ttl.idle` is the delay `idle_ttl` of the state `idle`; other timers have a name. */
function timerWords(inst: string): string {
  const [, delay, state] = /^\d+:xstate\.after\.([^.]+)\.(.+)$/.exec(inst) ?? [];
  return delay === undefined ? inst.replace(/^\d+:/, "") : `${delay} of ${state}`;
}

/** An event of an actor in words; undefined for what says nothing to somebody who asks what happened. */
function eventWords({ type, ...event }: ActorEvent): string | undefined {
  const step = `${String(event["turn"])}.${String(event["step"])}`;
  switch (type) {
    case "superseded":
      return `attempt ${String(event["attempt"])} of model call ${step} void`;
    case "model.started":
      return `model call ${step} began (${String(event["model"])})`;
    case "model.completed":
      return `model call ${step} done in attempt ${String(event["attempt"])} (${String(event["stop"])})`;
    case "model.failed":
      return `model call ${step} failed in attempt ${String(event["attempt"])}: ${String(event["code"])}${event["message"] ? `, ${String(event["message"])}` : ""}`;
    case "model.tried": {
      const { try: number, purpose, rule, model, outcome, code, message } = event;
      const what = purpose === "guardrail" ? `a judge of the guardrail ${String(rule)}` : "a try";
      const how = outcome === "completed" ? "answered" : `failed: ${String(code)}${message ? `, ${String(message)}` : ""}`;
      return `model call ${step}, call ${String(number)} (${what}, ${String(model)}) ${how}`;
    }
    case "model.retrying":
      return `model call ${step}: try ${String(event["try"])} of ${String(event["model"])}${event["wait_ms"] === 0 ? "" : ` in ${ms(event["wait_ms"])}`}, because ${String(event["code"])}`;
    case "model.waiting":
      return `model call ${step} waits for ${String(event["for"])}${event["provider"] === undefined ? "" : ` of ${String(event["provider"])}`}, until ${String(event["until"])} at the latest: ${String(event["message"])}`;
    case "model.waited":
      return `model call ${step} waited ${ms(event["waited_ms"])} for ${String(event["for"])}`;
    case "model.skipped":
      return `model call ${step}: ${String(event["model"])} passed over, ${String(event["code"])}`;
    case "message.completed":
    case "message.received":
    case "session.claimed":
    case "session.parked":
      return undefined; // the command, the turn's end, the claim, and the new state tell it
    case "session.state":
      return `${String(event["from"] ?? "new")} → ${String(event["to"])}${event["reason"] ? `: ${String(event["reason"])}` : ""}`;
    default: {
      const fields = Object.entries(event).filter(([, value]) => typeof value !== "object" && value !== undefined);
      return `${type}${fields.map(([name, value]) => ` ${name} ${String(value).slice(0, 80)}`).join("")}`;
    }
  }
}

function ownChapters({ sequence, message }: Told, before: JournalMessage | undefined): Chapter[] {
  const { at, worker } = message;
  const chapter = (what: string, text: string): Chapter => ({ at, sequence, by: "owner", worker, what, text });
  const chapters: Chapter[] = [];
  if (before !== undefined && before.epoch !== message.epoch && !message.entries.some(({ t }) => t === "claim"))
    chapters.push(chapter("owner", `goes on at ${worker}, epoch ${message.epoch} (before: ${before.worker}, epoch ${before.epoch}); nothing was in flight`));
  for (const entry of message.entries) {
    if (entry.t === "claim") {
      const cost = Object.values(entry.assumed ?? {}).reduce((sum, one) => sum + one, 0);
      const lost =
        entry.lost.length === 0
          ? "nothing that had begun was lost"
          : `lost: ${entry.lost.join(" ")}${cost === 0 ? "" : `, which may have cost $${(cost / 1e6).toFixed(6)}`}`;
      chapters.push(chapter("claim", `claimed by ${worker}, epoch ${message.epoch}, from ${entry.from ?? "nobody"} (${entry.reason}); ${lost}`));
    } else if (entry.t === "done") {
      if (message.events.length === 0) chapters.push(chapter("done", `${entry.inst} done`));
    } else chapters.push(chapter(entry.t, entry.t === "command" || entry.t === "init" ? `${entry.type}${byWords(entry)}` : entryWords(entry)));
  }
  for (const event of message.events) {
    const text = eventWords(event);
    if (text !== undefined) chapters.push(chapter(event.type, text));
  }
  return chapters;
}

/** What the supervisors decided about a worker, as far as it touches the shard or the actor. `holder` had the shard until then. */
function decisionChapters(
  { sequence, message }: Told,
  actor: ActorAddress,
  shard: number,
  holder: string | undefined,
): { chapters: Chapter[]; holder: string | undefined } {
  const {
    at,
    actor: { id: worker },
  } = message;
  const chapters: Chapter[] = [];
  const chapter = (what: string, text: string): void => void chapters.push({ at, sequence, by: "supervisor", worker, what, text });
  let now = holder;
  for (const event of message.events) {
    if (event.type === "worker.state" && worker === now) {
      const words = evidenceWords(event["evidence"] as Json | undefined);
      const why = words === "" ? "" : `: ${words}`;
      const to = String(event["to"]);
      if (to === "dead") chapter("declared_dead", `${worker} was declared dead${why}`);
      else chapter("worker_state", `${worker} is ${to}${why}`);
    } else if (event.type === "shard.assigned" && event["shard"] === shard) {
      const from = event["from"];
      chapter("shard_assigned", `shard ${shard} → ${worker}, epoch ${String(event["epoch"])}${typeof from === "string" ? ` (from ${from})` : ""}`);
      now = worker;
    } else if (event.type === "actor.resumed" && event["actor"] === actorPath(actor)) {
      const first = event["first_token_ms"] === undefined ? "" : `, first token ${ms(event["first_token_ms"])} after that`;
      chapter(
        "resumed",
        `goes on at ${worker}: ${String(event["entries"])} entries replayed; noticed in ${ms(event["detect_ms"])}, assigned in ${ms(event["assign_ms"])}, claimed ${ms(event["replay_ms"])} after the shard came${first}`,
      );
    }
  }
  return { chapters, holder: now };
}

async function tellAll(context: Context, filter: string, from_sequence: number): Promise<Told[]> {
  const told: Told[] = [];
  for await (const stored of (await context.bus()).read("EVENTS", filter, from_sequence))
    told.push({ sequence: stored.sequence, message: decodeJournal(stored.data) });
  return told;
}

/** The whole story, in the order of the stream. */
async function storyOf(context: Context, actor: ActorAddress, shard: number): Promise<Chapter[]> {
  const own = await tellAll(context, actorSubject(actor, "event"), 1);
  const first = own[0];
  if (first === undefined) return [];
  const decisions = await tellAll(context, `tenant.${SYSTEM_TENANT}.worker.*.event`, first.sequence);
  const chapters: Chapter[] = [];
  let holder: string | undefined = actor.kind === "worker" ? actor.id : first.message.worker;
  let before: JournalMessage | undefined;
  // A worker's own journal is where the supervisors' decisions about it stand.
  const others = decisions.filter(({ message }) => actorPath(message.actor) !== actorPath(actor));
  for (const told of [...own, ...others].sort((a, b) => a.sequence - b.sequence)) {
    if (actorPath(told.message.actor) === actorPath(actor)) {
      chapters.push(...ownChapters(told, before));
      before = told.message;
      continue;
    }
    const decided = decisionChapters(told, actor, shard, holder);
    chapters.push(...decided.chapters);
    holder = decided.holder;
  }
  return chapters;
}

/** What happened several times at one moment is told once. */
function folded(story: readonly Chapter[]): { at: string; text: string; times: number }[] {
  const lines: { at: string; text: string; times: number }[] = [];
  for (const { at, text } of story) {
    const before = lines.at(-1);
    if (before !== undefined && before.at === at && before.text === text) before.times += 1;
    else lines.push({ at, text, times: 1 });
  }
  return lines;
}

async function placementOf(context: Context, shard: number): Promise<PlacementEntry | undefined> {
  const read = await (await context.bus()).bucket("PLACEMENT").get(placementKey(shard));
  return read === undefined ? undefined : decodePlacementEntry(read.value);
}

export async function explain(context: Context, { last }: { last: number }, actor: ActorAddress): Promise<number> {
  const { printer, ports } = context;
  const core = coreFor(actor.kind);
  if (core === undefined) throw new TroupeError(errorBody("not_found", `there is no machine for the kind '${actor.kind}' in this program`));
  const restored = await (await context.restorer()).restore(actor);
  if (restored === undefined) throw new TroupeError(errorBody("not_found", `${actorPath(actor)} was never created`));
  const definition: ActorDefinition = core.definition;
  const view = viewOf(restored.state);
  const running = Object.values(restored.state.running);
  const timers = Object.values(restored.state.timers).sort((a, b) => a.due_ms - b.due_ms);
  const shard = actor.kind === "worker" ? null : shardOf(actor, (await context.bus()).shards);
  const placed = shard === null ? undefined : await placementOf(context, shard);
  const story = await storyOf(context, actor, shard ?? -1);
  const now_ms = ports.world.now_ms();
  const orphan = shard !== null && !view.final && (placed === undefined || placed.worker === "");
  const calls = running.some(({ src }) => src === "call_model");
  const waits_for = view.final ? undefined : definition.waitsFor?.(view, now_ms);
  const told = view.final ? undefined : definition.waits(view, now_ms);
  // The journal says for what and how long; how many go before it only the line itself knows.
  const line =
    calls && (told === undefined || waits_for?.["for"] === "slot" || waits_for?.["for"] === "place")
      ? await callWaitOf(context, actor, placed?.worker)
      : undefined;
  const wait_reason = told === undefined || line === undefined ? (told ?? line ?? null) : `${told}; ${line}`;
  if (printer.json) {
    printer.document({
      actor: actorPath(actor),
      state: view.state,
      final: view.final,
      wait_reason,
      waits_for: waits_for ?? null,
      shard,
      owner:
        placed === undefined || placed.worker === ""
          ? null
          : {
              worker: placed.worker,
              epoch: placed.epoch,
              since: placed.since,
              from: placed.from ?? null,
              reason: placed.reason ?? null,
              moving_to: placed.moving_to ?? null,
            },
      last_owner: { worker: restored.last.worker, epoch: restored.last.epoch, at: restored.last.at },
      running: running.map(({ inst, src, attempt }) => ({ inst, src, attempt })),
      timers: timers.map(({ inst, due_ms }) => ({ inst, due: timestamp(due_ms) })),
      story: story.slice(-last),
      left_out: Math.max(0, story.length - last),
    });
    return EXIT.done;
  }
  printer.line(printer.style("bold", `${actorPath(actor)} is ${view.state}${view.final ? ", finished" : ""}`));
  const works = running.map(({ inst, src, attempt }) => `${src} ${inst}, attempt ${attempt}`).join("; ");
  const next = timers[0];
  printer.pairs([
    ["why", view.final ? "it is finished" : (wait_reason ?? (works === "" ? "it works" : `it works: ${works}`))],
    ...(wait_reason !== null && works !== "" ? [["in flight", works] as const] : []),
    ...(next === undefined ? [] : [["timer", `${timerWords(next.inst)} ${next.due_ms <= now_ms ? "is due" : `in ${ago(next.due_ms - now_ms)}`}`] as const]),
    ...(shard === null
      ? []
      : [
          [
            "owner",
            orphan
              ? `nobody: shard ${shard} waits for a worker`
              : `${placed?.worker ?? "?"}, shard ${shard}, epoch ${placed?.epoch ?? "?"}${placed?.moving_to === undefined ? "" : `, moving to ${placed.moving_to}`}, for ${ago(now_ms - Date.parse(placed?.since ?? ""))}`,
          ] as const,
        ]),
  ]);
  const shown = story.slice(-last);
  if (shown.length < story.length) printer.note(`${story.length - shown.length} earlier happenings are left out; --last ${story.length} shows all`);
  let day = "";
  for (const { at, text, times } of folded(shown)) {
    if (at.slice(0, 10) !== day) printer.line(`\n${printer.style("bold", (day = at.slice(0, 10)))}`);
    printer.line(`${at.slice(11, 23)}  ${text}${times === 1 ? "" : ` (${times} times)`}`);
  }
  return EXIT.done;
}

export async function unpark(context: Context, { reason }: { reason?: string }, session: ActorAddress): Promise<number> {
  const { printer } = context;
  const outcome = await (
    await context.commands()
  ).command(session, { type: "session.unpark", body: reason === undefined ? {} : { reason }, channel: "control" });
  if (outcome.kind === "refused") throw new TroupeError(outcome.error);
  if (!outcome.reply.ok) throw new TroupeError(outcome.reply.error);
  const { state } = outcome.reply;
  if (printer.json) printer.document({ actor: actorPath(session), state });
  else printer.line(`${actorPath(session)} is ${state}`);
  return EXIT.done;
}
