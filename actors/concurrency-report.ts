// concurrency-report: how many calls of a tenant ran side by side, and who waited how long for what, folded from the journals of its budget and its
// sessions and from nothing else: the same journals give the same report, byte for byte.
//
//   budget.reserved ──▶ a call runs ──▶ budget.settled, budget.released          (of models; the limit is the tenant's `concurrency_max` then)
//   tool.started ─────▶ a call runs ──▶ tool.completed, tool.failed, tool.denied (of tools, in their session's journal)
//
// What was waited for, by name:
//   slot       a call, until its tenant might run one more      budget.refused overloaded … budget.reserved
//   window     a call, for the provider's rate                  budget.refused rate_limited … budget.reserved
//   money      a call, for money that others held               budget.refused budget_exceeded (may_return) … budget.reserved
//   place      a call, among those that its worker makes        budget.reserved … the first call's `started_at`, from PLACE_MS_MIN on
//   provider   a call, before the next try                      model.retrying
//   turn       a message, behind the turns before it            message.received … turn.started
//   dependency a message, for the turns that it comes after     message.received … dependency.met, or its turn's end
//
// Invariants:
//   CR1. Everything told is a function of the messages, in the order in which they were added, and of the window: no clock, no order of tables.
//   CR2. What runs is never below 0, and the times by how many ran sum to the whole of the window.
//   CR3. What is told has a bound, however long the journals are: SLICES, LONGEST.
import type { ActorEvent, Entry, JournalMessage } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import { timestamp } from "../protocol/world.ts";

/** Parts of the window whose peaks are told. A terminal has room for as many lines. */
export const SLICES = 24;
/** Waits that are told one by one, the longest first. */
export const LONGEST = 20;
/** The way from the budget's grant to the provider takes some milliseconds by itself. */
const PLACE_MS_MIN = 100;

export const WAIT_REASONS = ["slot", "window", "money", "place", "provider", "turn", "dependency"] as const;
export type WaitReason = (typeof WAIT_REASONS)[number];

export interface Load {
  readonly count: number;
  readonly peak: number;
  readonly peak_at: string | null;
  /** In which at least one ran. */
  readonly busy_ms: number;
  /** Milliseconds by how many ran, from none on. */
  readonly ms_by_running: readonly { readonly running: number; readonly ms: number }[];
  /** The window in equal parts. */
  readonly slices: readonly { readonly from: string; readonly peak: number; readonly mean: number }[];
}

export interface Wait {
  readonly session: string;
  readonly reason: WaitReason;
  readonly from: string;
  readonly ms: number;
  /** `open`: it waited still when the journals ended. */
  readonly ended: "began" | "given_up" | "open";
}

export interface ConcurrencyReport {
  readonly tenant: string;
  readonly session: string | null;
  readonly from: string | null;
  readonly to: string | null;
  readonly models: Load & {
    /** The tenant's bound at the end of the window. */
    readonly concurrency_max: number | null;
    /** In which as many calls of the tenant ran as might, of whichever session. */
    readonly at_limit_ms: number;
  };
  readonly tools: Load;
  readonly waits: readonly {
    readonly reason: WaitReason;
    readonly waits: number;
    readonly ms: number;
    readonly longest_ms: number;
    readonly given_up: number;
  }[];
  readonly longest: readonly Wait[];
}

export interface ReportWindow {
  readonly tenant: string;
  /** Only what is of this session; the tenant's bound is judged by all. */
  readonly session?: string | undefined;
  readonly since_ms?: number | undefined;
  readonly until_ms?: number | undefined;
}

export interface ConcurrencyFold {
  /** The messages of the tenant's budget and sessions, in the order of the stream. */
  add(message: Pick<JournalMessage, "actor" | "at" | "entries" | "events">): void;
  report(): ConcurrencyReport;
}

interface Change {
  readonly at_ms: number;
  /** In which order it was read. */
  readonly index: number;
  readonly by: 1 | -1;
}
interface OpenWait {
  readonly session: string;
  readonly reason: WaitReason;
  readonly from_ms: number;
}
type ClosedWait = OpenWait & { readonly to_ms: number; readonly ended: Wait["ended"] };

const textOf = (event: ActorEvent, name: string): string => (typeof event[name] === "string" ? event[name] : "");
const sessionOfHold = (hold: string): string => hold.split("/")[2] ?? "";

/** Why a call that was refused waits; undefined when it does not. */
function reasonOf(refused: ActorEvent): WaitReason | undefined {
  switch (refused["code"]) {
    case "overloaded":
      return "slot";
    case "rate_limited":
      return "window";
    case "budget_exceeded":
      return refused["may_return"] === true ? "money" : undefined;
    default:
      return undefined;
  }
}

const TOOL_ENDS: ReadonlySet<string> = new Set(["tool.completed", "tool.failed", "tool.denied"]);

export function createConcurrencyFold({ tenant, session, since_ms, until_ms }: ReportWindow): ConcurrencyFold {
  let index = 0;
  let first_ms: number | undefined;
  let last_ms: number | undefined;
  const models: Change[] = [];
  /** Of all sessions, for the bound. */
  const all_models: Change[] = [];
  const tools: Change[] = [];
  const limits: { readonly at_ms: number; readonly concurrency_max: number | null }[] = [];
  /** hold → since when it runs. */
  const running = new Map<string, number>();
  /** `{session}/{turn}/{step}/{index}` */
  const tools_running = new Set<string>();
  const waiting = new Map<string, OpenWait>();
  const waits: ClosedWait[] = [];

  const isWanted = (id: string): boolean => session === undefined || session === id;
  const change = (into: Change[], at_ms: number, by: 1 | -1): void => void into.push({ at_ms, index: index++, by });

  function wait(key: string, id: string, reason: WaitReason, at_ms: number): void {
    // Asked again, and refused for the same: it goes on waiting.
    if (waiting.get(key)?.reason === reason) return;
    endWait(key, at_ms, "began");
    waiting.set(key, { session: id, reason, from_ms: at_ms });
  }
  function endWait(key: string, at_ms: number, ended: Wait["ended"]): void {
    const open = waiting.get(key);
    if (open === undefined) return;
    waiting.delete(key);
    if (at_ms > open.from_ms) waits.push({ ...open, to_ms: at_ms, ended });
  }

  function takeOfBudget(event: ActorEvent, at_ms: number): void {
    const hold = textOf(event, "hold");
    const id = sessionOfHold(hold);
    switch (event.type) {
      case "budget.reserved":
        endWait(hold, at_ms, "began");
        if (running.has(hold)) return; // one more part of the same call
        running.set(hold, at_ms);
        change(all_models, at_ms, 1);
        if (isWanted(id)) change(models, at_ms, 1);
        return;
      case "budget.settled":
      case "budget.released":
        if (!running.delete(hold)) return;
        change(all_models, at_ms, -1);
        if (isWanted(id)) change(models, at_ms, -1);
        return;
      case "budget.refused": {
        const reason = reasonOf(event);
        if (reason === undefined) endWait(hold, at_ms, "given_up");
        else wait(hold, id, reason, at_ms);
        return;
      }
      case "budget.configured":
        if (event["level"] === "tenant") limits.push({ at_ms, concurrency_max: (event["concurrency_max"] ?? null) as number | null });
        return;
      default:
        return;
    }
  }

  function takeOfSession(id: string, event: ActorEvent, at_ms: number): void {
    const turn = `${id}/turn/${String(event["turn"])}`;
    switch (event.type) {
      case "message.received":
        return wait(turn, id, event["after"] === undefined ? "turn" : "dependency", at_ms);
      // What it came after has ended; from now on it only stands behind the turns before it.
      case "dependency.met":
        return wait(turn, id, "turn", at_ms);
      case "turn.started":
        return endWait(turn, at_ms, "began");
      case "turn.cancelled":
      case "turn.failed":
        return endWait(turn, at_ms, "given_up");
      case "model.retrying": {
        const wait_ms = Number(event["wait_ms"]);
        if (wait_ms > 0) waits.push({ session: id, reason: "provider", from_ms: at_ms, to_ms: at_ms + wait_ms, ended: "began" });
        return;
      }
      default: {
        const tool = `${id}/${String(event["turn"])}/${String(event["step"])}/${String(event["index"])}`;
        if (event.type === "tool.started") {
          tools_running.add(tool);
          change(tools, at_ms, 1);
        } else if (TOOL_ENDS.has(event.type) && tools_running.delete(tool)) change(tools, at_ms, -1);
      }
    }
  }

  /** What a model's effect came to says when its first call was made: what lies between that and the grant it waited for a place. */
  function takePlace(id: string, path: string, entry: Entry): void {
    if (entry.t !== "done" && entry.t !== "fail") return;
    const told = (entry.t === "done" ? entry.output : entry.error.details) as JsonObject | null | undefined;
    const [call] = Array.isArray(told?.["attempts"]) ? (told["attempts"] as readonly JsonObject[]) : [];
    if (call === undefined) return;
    const from_ms = running.get(`${path}/${entry.inst}/${String(told?.["attempt"])}`);
    const to_ms = Date.parse(String(call["started_at"]));
    if (from_ms !== undefined && to_ms - from_ms >= PLACE_MS_MIN) waits.push({ session: id, reason: "place", from_ms, to_ms, ended: "began" });
  }

  return {
    add({ actor, at, entries, events }) {
      const at_ms = Date.parse(at);
      if (until_ms !== undefined && at_ms > until_ms) return;
      first_ms ??= at_ms;
      last_ms = Math.max(last_ms ?? at_ms, at_ms);
      if (actor.kind === "budget") {
        // A hold that is closed without having been granted waits no more: its call was given up.
        for (const event of events) takeOfBudget(event, at_ms);
        for (const entry of entries)
          if (entry.t === "command" && (entry.type === "budget.settle" || entry.type === "budget.release"))
            endWait(String(entry.body["hold"]), at_ms, "given_up");
      } else if (actor.kind === "session" && isWanted(actor.id)) {
        for (const entry of entries) takePlace(actor.id, `${actor.tenant}/session/${actor.id}`, entry);
        for (const event of events) takeOfSession(actor.id, event, at_ms);
      }
    },
    report() {
      const from_ms = since_ms ?? first_ms;
      const to_ms = until_ms ?? last_ms;
      const window = from_ms === undefined || to_ms === undefined || to_ms < from_ms ? undefined : { from_ms, to_ms };
      const open = [...waiting.values()].map((one): ClosedWait => ({ ...one, to_ms: Math.max(one.from_ms, to_ms ?? one.from_ms), ended: "open" }));
      const inWindow = [...waits, ...open]
        .filter(({ session: id }) => isWanted(id))
        .filter(({ from_ms: a, to_ms: b }) => window !== undefined && a <= window.to_ms && b >= window.from_ms);
      inWindow.sort((a, b) => b.to_ms - b.from_ms - (a.to_ms - a.from_ms) || a.from_ms - b.from_ms || (a.session < b.session ? -1 : 1));
      return {
        tenant,
        session: session ?? null,
        from: window === undefined ? null : timestamp(window.from_ms),
        to: window === undefined ? null : timestamp(window.to_ms),
        models: { ...loadOf(models, window), concurrency_max: limits.at(-1)?.concurrency_max ?? null, at_limit_ms: atLimit(all_models, limits, window) },
        tools: loadOf(tools, window),
        waits: WAIT_REASONS.flatMap((reason) => {
          const mine = inWindow.filter((one) => one.reason === reason);
          if (mine.length === 0) return [];
          const lengths = mine.map(({ from_ms: a, to_ms: b }) => b - a);
          const given_up = mine.filter(({ ended }) => ended === "given_up").length;
          return [{ reason, waits: mine.length, ms: lengths.reduce((sum, ms) => sum + ms, 0), longest_ms: Math.max(...lengths), given_up }];
        }),
        longest: inWindow
          .slice(0, LONGEST)
          .map(({ session: id, reason, from_ms: a, to_ms: b, ended }) => ({ session: id, reason, from: timestamp(a), ms: b - a, ended })),
      };
    },
  };
}

interface Window {
  readonly from_ms: number;
  readonly to_ms: number;
}
/** So many ran from then until then. */
interface Stretch extends Window {
  readonly running: number;
}

/** CR2: the whole window, stretch by stretch. Changes at one moment take effect together. */
function stretchesOf(changes: readonly Change[], { from_ms, to_ms }: Window): Stretch[] {
  const ordered = changes.toSorted((a, b) => a.at_ms - b.at_ms || a.index - b.index);
  const stretches: Stretch[] = [];
  let [running, since_ms] = [0, from_ms];
  for (const { at_ms, by } of ordered) {
    const until_ms = Math.min(Math.max(at_ms, from_ms), to_ms);
    if (until_ms > since_ms) stretches.push({ from_ms: since_ms, to_ms: until_ms, running });
    since_ms = Math.max(since_ms, until_ms);
    running += by;
  }
  if (to_ms > since_ms) stretches.push({ from_ms: since_ms, to_ms, running });
  return stretches;
}

function loadOf(changes: readonly Change[], window: Window | undefined): Load {
  if (window === undefined) return { count: 0, peak: 0, peak_at: null, busy_ms: 0, ms_by_running: [], slices: [] };
  const stretches = stretchesOf(changes, window);
  let peak: Stretch | undefined;
  const by = new Map<number, number>();
  for (const stretch of stretches) {
    if (stretch.running > (peak?.running ?? 0)) peak = stretch;
    by.set(stretch.running, (by.get(stretch.running) ?? 0) + stretch.to_ms - stretch.from_ms);
  }
  const before = changes.filter(({ at_ms }) => at_ms < window.from_ms).reduce((sum, one) => sum + one.by, 0);
  const begun = changes.filter(({ at_ms, by: one }) => one === 1 && at_ms >= window.from_ms && at_ms <= window.to_ms).length;
  const ms_by_running = [...by].sort(([a], [b]) => a - b).map(([running, ms]) => ({ running, ms }));
  return {
    count: before + begun,
    peak: peak?.running ?? 0,
    peak_at: peak === undefined ? null : timestamp(peak.from_ms),
    busy_ms: ms_by_running.filter(({ running }) => running > 0).reduce((sum, { ms }) => sum + ms, 0),
    ms_by_running,
    slices: slicesOf(stretches, window),
  };
}

function slicesOf(stretches: readonly Stretch[], { from_ms, to_ms }: Window): Load["slices"] {
  const length_ms = Math.max(1, Math.ceil((to_ms - from_ms) / SLICES));
  const slices: { from: string; peak: number; mean: number }[] = [];
  let at = 0;
  for (let begin_ms = from_ms; begin_ms < to_ms; begin_ms += length_ms) {
    const end_ms = Math.min(begin_ms + length_ms, to_ms);
    while (at < stretches.length && (stretches[at]?.to_ms ?? 0) <= begin_ms) at += 1;
    let [peak, area] = [0, 0];
    for (let next = at; next < stretches.length; next++) {
      const stretch = stretches[next];
      if (stretch === undefined || stretch.from_ms >= end_ms) break;
      peak = Math.max(peak, stretch.running);
      area += stretch.running * (Math.min(stretch.to_ms, end_ms) - Math.max(stretch.from_ms, begin_ms));
    }
    slices.push({ from: timestamp(begin_ms), peak, mean: Math.round((area / (end_ms - begin_ms)) * 100) / 100 });
  }
  return slices;
}

function atLimit(
  changes: readonly Change[],
  limits: readonly { readonly at_ms: number; readonly concurrency_max: number | null }[],
  window: Window | undefined,
): number {
  if (window === undefined) return 0;
  let sum_ms = 0;
  limits.forEach(({ at_ms, concurrency_max }, index) => {
    if (concurrency_max === null) return;
    const from_ms = Math.max(window.from_ms, at_ms);
    const to_ms = Math.min(window.to_ms, limits[index + 1]?.at_ms ?? window.to_ms);
    if (to_ms <= from_ms) return;
    for (const stretch of stretchesOf(changes, { from_ms, to_ms })) if (stretch.running >= concurrency_max) sum_ms += stretch.to_ms - stretch.from_ms;
  });
  return sum_ms;
}
