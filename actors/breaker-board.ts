// breaker-board: the breakers of one worker, and what workers tell each other of theirs.
//
// Each worker counts its own calls. What it concludes goes to the bucket BREAKERS, key `{provider}.{owner}`: present is open or half-open, absent is closed.
//   trip                 create {open, cooldown_ms}       others hear it and stop calling at once
//   the cool-down over   update to {half_open}            compare-and-set: of all workers one sends the probe
//   the probe's end      delete, or update to {open, …}
// Entries hold durations: each worker counts them from when it heard, by its own clock, so clocks need not agree.
//
//   BB1. A probe goes out only after the bucket took its half_open; who lost the race waits.
//   BB2. Without the broker a worker goes by its own breakers alone: no call waits for the board longer than BOARD_PATIENCE_MS.
//   BB3. At most BREAKERS_MAX closed breakers are kept; one that is not closed is never forgotten.
import type { Bucket, Bus, CasOutcome, Subscription } from "../bus/port.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import {
  type Admission,
  BREAKER_CLOSED,
  type BreakerBoard,
  type BreakerKey,
  type BreakerReading,
  type BreakerState,
  countsOf,
  COOLDOWN_MS_MAX,
  COOLDOWN_MS_MIN,
  ended,
  leaveToCall,
  probeEnded,
  probing,
  type Verdict,
} from "../providers/breaker.ts";

/** A broker answers in milliseconds; a model call that waits longer than this for one would be felt. */
const BOARD_PATIENCE_MS = 500;
/** One a provider for the platform, and for each tenant with a key of its own that called from here. */
const BREAKERS_MAX = 10_000;

/** What is stored for one breaker that is not closed. */
export interface SharedBreaker {
  readonly state: "open" | "half_open";
  readonly cooldown_ms: number;
  /** The worker that said it. */
  readonly by: string;
  /** For people. */
  readonly at: string;
}

export function decodeBreaker(value: Uint8Array): SharedBreaker | undefined {
  try {
    const { state, cooldown_ms, by, at } = JSON.parse(new TextDecoder().decode(value)) as Partial<SharedBreaker>;
    if ((state !== "open" && state !== "half_open") || typeof cooldown_ms !== "number") return undefined;
    return { state, cooldown_ms: Math.min(Math.max(cooldown_ms, COOLDOWN_MS_MIN), COOLDOWN_MS_MAX), by: String(by), at: String(at) };
  } catch {
    return undefined; // Not ours: as if it were not there.
  }
}

export const breakerKeyOf = ({ provider, owner }: BreakerKey): string => `${provider}.${owner}`;

export function parseBreakerKey(key: string): BreakerKey {
  const dot = key.indexOf(".");
  return { provider: key.slice(0, Math.max(dot, 0)), owner: key.slice(dot + 1) };
}

export interface BreakerBoardOptions {
  readonly world: World;
  readonly log: Log;
  /** This worker's name. */
  readonly worker: string;
  /** Absent: nothing is shared. */
  readonly bus?: Bus;
  /** Told of each change of a breaker's state. */
  on_change?(reading: BreakerReading): void;
}

interface Entry {
  readonly key: BreakerKey;
  state: BreakerState;
  /** The bucket's last word on it; undefined when it has none. */
  revision: number | undefined;
}

export interface RunningBoard extends BreakerBoard {
  /** Listens to the other workers; without it, or without a bus, the board knows what this process did. Never rejects. */
  start(): Promise<void>;
  stop(): Promise<void>;
}

export function createBreakerBoard({ world, log, worker, bus, on_change }: BreakerBoardOptions): RunningBoard {
  const entries = new Map<string, Entry>();
  const bucket: Bucket | undefined = bus?.bucket("BREAKERS");

  function entryOf(key: BreakerKey): Entry {
    const name = breakerKeyOf(key);
    let entry = entries.get(name);
    if (entry === undefined) {
      if (entries.size >= BREAKERS_MAX) forgetOne();
      entry = { key, state: BREAKER_CLOSED, revision: undefined };
      entries.set(name, entry);
    }
    return entry;
  }

  /** BB3. The oldest that is closed for everybody: what it counted is worth a minute, and is counted anew. */
  function forgetOne(): void {
    for (const [name, { state, revision }] of entries) {
      if (state.kind !== "closed" || revision !== undefined) continue;
      entries.delete(name);
      return;
    }
  }

  function readingOf(entry: Entry): BreakerReading {
    const now_ms = world.monotonic_ms();
    const leave = leaveToCall(entry.state, now_ms);
    return { ...entry.key, state: entry.state.kind, ...countsOf(entry.state, now_ms), retry_after_ms: leave.kind === "wait" ? leave.retry_after_ms : null };
  }

  function become(entry: Entry, state: BreakerState): void {
    const before = entry.state.kind;
    entry.state = state;
    if (state.kind === before) return;
    log.warn("a circuit breaker changed its state", { provider: entry.key.provider, owner: entry.key.owner, from: before, to: state.kind });
    on_change?.(readingOf(entry));
  }

  const encoded = (state: "open" | "half_open", cooldown_ms: number): Uint8Array => {
    const said: SharedBreaker = { state, cooldown_ms, by: worker, at: new Date(world.now_ms()).toISOString() };
    return new TextEncoder().encode(JSON.stringify(said));
  };

  /** The bucket's answer, or undefined when it does not come in time (BB2). */
  async function asked(what: Promise<CasOutcome>): Promise<CasOutcome | undefined> {
    let stop = (): void => undefined;
    const late = new Promise<undefined>((resolve) => (stop = world.after(BOARD_PATIENCE_MS, () => resolve(undefined))));
    const answer = await Promise.race([what.catch((error: unknown) => ({ kind: "unavailable" as const, reason: String(errorFields(error)["error"]) })), late]);
    stop();
    return answer?.kind === "unavailable" ? undefined : answer;
  }

  /** Tells the others what an end has led to. Whoever does not hear it has a breaker of its own. */
  async function share(entry: Entry): Promise<void> {
    if (bucket === undefined) return;
    const name = breakerKeyOf(entry.key);
    const { state, revision } = entry;
    const outcome =
      state.kind === "closed"
        ? revision === undefined
          ? undefined
          : await asked(bucket.delete(name, revision))
        : revision === undefined
          ? await asked(bucket.create(name, encoded("open", state.cooldown_ms)))
          : await asked(bucket.update(name, encoded("open", state.cooldown_ms), revision));
    if (outcome?.kind === "ok") entry.revision = state.kind === "closed" ? undefined : outcome.revision;
  }

  function heard(name: string, value: Uint8Array | undefined, revision: number): void {
    const said = value === undefined ? undefined : decodeBreaker(value);
    const entry = entryOf(parseBreakerKey(name));
    if (entry.revision !== undefined && revision <= entry.revision) return; // One's own word, come back.
    if (said === undefined) {
      entry.revision = undefined;
      if (entry.state.kind !== "closed") become(entry, BREAKER_CLOSED);
      return;
    }
    entry.revision = revision;
    const since_ms = world.monotonic_ms();
    become(entry, { kind: said.state, since_ms, cooldown_ms: said.cooldown_ms });
  }

  let watching: Subscription | undefined;

  function admitted(entry: Entry, is_probe: boolean): Admission {
    let said = false;
    return {
      kind: "admitted",
      ended(verdict: Verdict) {
        if (said) return;
        said = true;
        const before = entry.state;
        const now_ms = world.monotonic_ms();
        become(entry, is_probe ? probeEnded(before, verdict, now_ms) : ended(before, verdict, now_ms));
        if (entry.state.kind !== before.kind) void share(entry);
      },
    };
  }

  return {
    async admit(key) {
      const entry = entryOf(key);
      const leave = leaveToCall(entry.state, world.monotonic_ms());
      if (leave.kind === "wait") return { kind: "refused", retry_after_ms: leave.retry_after_ms };
      if (leave.kind === "free" || entry.state.kind === "closed") return admitted(entry, false);
      const { cooldown_ms } = entry.state;
      // Taken here before it is taken there, so that a second call of this worker waits.
      become(entry, probing(entry.state, world.monotonic_ms()));
      if (bucket !== undefined) {
        // What was never stored here (its trip was not heard, or another's came first) is created: of those who do so, too, one comes first.
        const [name, said] = [breakerKeyOf(key), encoded("half_open", cooldown_ms)];
        const outcome = await asked(entry.revision === undefined ? bucket.create(name, said) : bucket.update(name, said, entry.revision));
        if (outcome?.kind === "conflict") return { kind: "refused", retry_after_ms: COOLDOWN_MS_MIN }; // BB1
        if (outcome?.kind === "ok") entry.revision = outcome.revision;
      }
      return admitted(entry, true);
    },
    readings: () => [...entries.values()].map(readingOf).sort((a, b) => (breakerKeyOf(a) < breakerKeyOf(b) ? -1 : 1)),
    async start() {
      if (bucket === undefined) return;
      try {
        watching = await bucket.watch((change) => {
          if (change.kind === "put") heard(change.entry.key, change.entry.value, change.entry.revision);
          else heard(change.key, undefined, change.revision);
        });
      } catch (error) {
        log.warn("circuit breakers are not shared with other workers", errorFields(error));
      }
    },
    async stop() {
      await watching?.stop();
    },
  };
}
