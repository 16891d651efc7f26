// plan: what will happen to a simulated cluster, drawn from a seed before anything happens: what services say, and what goes wrong.
//
// A plan is data: it can be printed, run again, and run with some of its acts left out, which is how a failing one is made small.
// What models and tools do is not in it: that is drawn from the seed and the effect's own name, so it stays the same when acts are left out.
import type { Operation } from "../../bus/memory.ts";
import type { JsonObject } from "../../protocol/json.ts";
import type { CommandChannel } from "../../protocol/subjects.ts";
import { BEGIN_MS, seededRandom } from "./virtual-world.ts";

export type StrikeEffect =
  | { readonly kind: "crash" }
  | { readonly kind: "stop"; readonly ms: number }
  /** Before: it never arrives. After: it was done, and nobody is told. */
  | { readonly kind: "lose" }
  | { readonly kind: "delay"; readonly ms: number };

export type Act =
  | { readonly kind: "pass"; readonly ms: number }
  /** A command, by the client of ours, repeated until it is decided. */
  | {
      readonly kind: "say";
      readonly service: string;
      readonly actor: string;
      readonly channel: CommandChannel;
      readonly type: string;
      readonly body: JsonObject;
      readonly key: string;
      readonly fast: boolean;
      readonly repeats: number;
    }
  /** A command as a stranger publishes it, once: with a key or without, perhaps twice the same. */
  | {
      readonly kind: "publish";
      readonly service: string;
      readonly actor: string;
      readonly type: string;
      readonly body: JsonObject;
      readonly key?: string;
      readonly copies: number;
    }
  | { readonly kind: "garbage"; readonly service: string; readonly actor: string; readonly text: string }
  /** The nth operation of this kind from now on is struck. */
  | {
      readonly kind: "strike";
      readonly process: string;
      readonly operation: Operation["kind"];
      readonly side: "before" | "after";
      readonly nth: number;
      readonly effect: StrikeEffect;
    }
  | { readonly kind: "crash"; readonly process: string }
  | { readonly kind: "stop"; readonly process: string; readonly ms: number }
  | { readonly kind: "cut"; readonly process: string; readonly ms: number }
  /** Nobody reaches the broker. */
  | { readonly kind: "away"; readonly ms: number }
  /** The broker ends and comes back without its memory streams. */
  | { readonly kind: "restart"; readonly ms: number }
  /** As SIGTERM does it; somebody starts it again afterwards. */
  | { readonly kind: "drain"; readonly process: string; readonly deadline_ms: number }
  | { readonly kind: "join"; readonly process: string }
  /** A second process under the name of one that may be running. */
  | { readonly kind: "twin"; readonly process: string }
  /** For a while, operations are late by chance, so that they overtake each other. */
  | { readonly kind: "weather"; readonly process: string; readonly ms: number; readonly chance: number; readonly late_ms_max: number }
  | { readonly kind: "clock"; readonly process: string; readonly jump_ms: number }
  /** The database ends, and is back later. Who asks meanwhile hears so at once, or (silent) hears nothing until he gives up. */
  | { readonly kind: "postgres_away"; readonly ms: number; readonly silent: boolean }
  /** The nth commit of rows from now on is struck. Before: it is lost. After: it was done, and nobody is told. */
  | { readonly kind: "commit"; readonly side: "before" | "after"; readonly nth: number; readonly effect: "crash" | "lose" }
  /** Somebody begins to read a session, from its beginning or from where a reader of it stands. */
  | { readonly kind: "read"; readonly actor: string; readonly slow_ms: number }
  /** A reader's connection is lost; it comes back with its cursor. */
  | { readonly kind: "reconnect"; readonly reader: number };

export interface Plan {
  readonly seed: number;
  readonly acts: readonly Act[];
  /** A session that ends every process it works in, until it is parked. */
  readonly poison: string | undefined;
  /** One model call in so many never ends; 0: none. */
  readonly hang_one_in: number;
  /** Every operation takes up to this long to arrive, so that they overlap; 0: an instant. */
  readonly latency_ms_max: number;
  /** What is set of each tenant's budget before anything begins: bodies of `budget.configure`. */
  readonly budgets: readonly BudgetSetting[];
  /** The agents that each tenant has. */
  readonly agents: Readonly<Record<string, readonly string[]>>;
  /** Services take slots by name. */
  readonly names_slots: boolean;
  /** When it begins: some runs see midnight, when periods end. */
  readonly begin_ms: number;
}

export interface BudgetSetting extends JsonObject {
  readonly tenant: string;
  readonly level: string;
}

export const WORKERS = ["w1", "w2", "w3"] as const;
export const SUPERVISORS = ["s1", "s2"] as const;
export const SERVICES = ["svc1", "svc2"] as const;
export const GATEWAY = "g1";
export const PROJECTOR = "p1";
/** Slots that services take by name. */
export const SLOTS = ["s0", "s1"] as const;
export const USERS = ["ann", "bob"] as const;
export const SESSIONS = ["acme/session/a0", "acme/session/a1", "acme/session/a2", "globex/session/b0", "globex/session/b1"] as const;
export const TENANTS = ["acme", "globex"] as const;

/** Few output tokens, so that what a call holds and what it costs are of one size. */
const CONFIG = { model: "simulated/echo", instructions: "", tools: ["now", "wait_ms", "charge"], mode: "multi", max_loops: 4, max_output_tokens: 14 } as const;
export const AGENTS: Readonly<Record<string, JsonObject>> = {
  assistant: { ...CONFIG },
  // Its timers are far enough to rest in the broker, and near enough to come due within a run.
  brief: { ...CONFIG, idle_ttl_ms: 70_000, suspended_ttl_ms: 90_000 },
  // It has another model to ask, and says less when money is short.
  thrifty: { ...CONFIG, priority: "low", fallbacks: { models: ["simulated/script"] }, degrade: { model: "simulated/script", max_output_tokens: 3 } },
  // Its answers are judged by one more call, which is paid for as they are.
  guarded: { ...CONFIG, guardrails: [{ name: "judge", on: "output", kind: "judge", model: "simulated/script", policy: "be kind" }] },
};

/** Faults of every kind that a plan can have; each is seen in a walk of some hundred seeds. */
export const isFault = (act: Act): boolean => !["pass", "say", "publish", "garbage", "read"].includes(act.kind);

type Draw = ReturnType<typeof drawing>;

function drawing(seed: number) {
  const random = seededRandom(seed);
  const below = (count: number): number => Math.floor(random() * count);
  return {
    below,
    chance: (share: number): boolean => random() < share,
    between: (from: number, to: number): number => from + below(to - from + 1),
    any: <T>(list: readonly T[]): T => list[below(list.length)] as T,
    /** Mostly short, sometimes up to `to`. */
    skewed: (from: number, to: number): number => Math.round(from + (to - from) * random() ** 3),
  };
}

const WORKER_OPERATIONS: readonly Operation["kind"][] = [
  ...([
    "append",
    "append",
    "append",
    "publish",
    "publish",
    "read",
    "clear",
    "clear",
    "schedule",
    "ack",
    "ack",
    "deliver",
    "deliver",
    "send",
    "bucket_write",
    "bucket_read",
  ] as const),
];
/** Those that go one way: there is no answer to be lost. */
const ONE_WAY: ReadonlySet<string> = new Set(["ack", "deliver", "hear", "send"]);

function drawStrike(draw: Draw): Act {
  const process = draw.chance(0.75) ? draw.any(WORKERS) : draw.chance(0.5) ? draw.any(SUPERVISORS) : draw.chance(0.6) ? GATEWAY : draw.any(SERVICES);
  const isWorker = process.startsWith("w");
  const operation = isWorker
    ? draw.any(WORKER_OPERATIONS)
    : process.startsWith("s") && !process.startsWith("svc")
      ? draw.any(["append", "bucket_write", "bucket_read", "read"] as const)
      : process === GATEWAY
        ? draw.any(["hear", "hear", "read"] as const)
        : draw.any(["publish", "publish", "hear", "send"] as const);
  const side = ONE_WAY.has(operation) || draw.chance(0.5) ? "before" : "after";
  const roll = draw.below(10);
  const effect: StrikeEffect =
    roll < 4 && !process.startsWith("svc")
      ? { kind: "crash" }
      : roll < 5
        ? { kind: "stop", ms: draw.skewed(200, 14_000) }
        : roll < 8
          ? { kind: "lose" }
          : { kind: "delay", ms: draw.skewed(5, 3_000) };
  return { kind: "strike", process, operation, side, nth: 1 + draw.below(draw.chance(0.6) ? 3 : 15), effect };
}

function drawFault(draw: Draw, readers: number): Act {
  const roll = draw.below(100);
  const anybody = (): string => draw.any([...WORKERS, ...WORKERS, ...SUPERVISORS, GATEWAY, ...SERVICES, PROJECTOR]);
  if (roll < 46) return drawStrike(draw);
  if (roll < 49) return { kind: "postgres_away", ms: draw.skewed(200, 30_000), silent: draw.chance(0.3) };
  if (roll < 52) return { kind: "commit", side: draw.any(["before", "after", "after"]), nth: draw.between(1, 6), effect: draw.any(["crash", "lose", "lose"]) };
  if (roll < 58) return { kind: "crash", process: draw.any([...WORKERS, ...WORKERS, ...SUPERVISORS, GATEWAY, PROJECTOR]) };
  if (roll < 66)
    return {
      kind: "stop",
      process: draw.any([...WORKERS, ...WORKERS, ...WORKERS, ...SUPERVISORS, GATEWAY, PROJECTOR]),
      ms: draw.any([500, 2_000, 4_000, 7_000, 11_000, 20_000]),
    };
  if (roll < 74) return { kind: "cut", process: anybody(), ms: draw.skewed(100, 15_000) };
  if (roll < 76) return { kind: "away", ms: draw.skewed(300, 9_000) };
  if (roll < 79) return { kind: "restart", ms: draw.skewed(300, 7_000) };
  if (roll < 83) return { kind: "drain", process: draw.any(WORKERS), deadline_ms: draw.any([500, 3_000, 20_000]) };
  if (roll < 85) return { kind: "join", process: "w4" };
  if (roll < 87) return { kind: "twin", process: draw.any([...WORKERS, PROJECTOR]) };
  if (roll < 94)
    return { kind: "weather", process: anybody(), ms: draw.between(500, 8_000), chance: draw.any([0.05, 0.2, 0.5]), late_ms_max: draw.any([20, 150, 1_200]) };
  if (roll < 97) return { kind: "clock", process: draw.any(WORKERS), jump_ms: draw.between(-5_000, 5_000) };
  return readers > 0 ? { kind: "reconnect", reader: draw.below(readers) } : { kind: "pass", ms: 50 };
}

/** Messages that a session may have accepted by now; many are not there, and refused. */
function drawAfter(draw: Draw, actor: string): JsonObject {
  const [tenant = ""] = actor.split("/");
  const siblings = SESSIONS.filter((one) => one.startsWith(`${tenant}/`)).map((one) => one.split("/")[2] ?? "");
  const parent = (): JsonObject => ({ session: draw.any(siblings), message: `m${draw.between(2, 14)}` });
  return { after: Array.from({ length: draw.between(1, 2) }, parent) };
}

function drawCommand(draw: Draw, actor: string): { type: string; body: JsonObject; channel: CommandChannel } {
  const roll = draw.below(100);
  const channel = "command";
  if (roll < 62) {
    const on_busy = draw.any([undefined, undefined, undefined, undefined, "interrupt", "reject", "reject"] as const);
    const content = `say ${draw.below(1_000)}`;
    if (on_busy !== "interrupt" && draw.chance(0.2)) return { type: "message.send", channel, body: { content, ...drawAfter(draw, actor) } };
    return { type: "message.send", channel, body: { content, ...(on_busy === undefined ? {} : { on_busy }) } };
  }
  if (roll < 70) return { type: "turn.cancel", channel, body: {} };
  if (roll < 78) return { type: "session.pause", channel, body: { reason: "by hand" } };
  if (roll < 90) return { type: "session.resume", channel, body: {} };
  if (roll < 94) return { type: "session.hibernate", channel, body: {} };
  if (roll < 96) return { type: "session.unpark", channel: "control", body: {} };
  if (roll < 97) return { type: "session.terminate", channel, body: {} };
  return { type: "session.create", channel, body: { agent: "assistant" } };
}

/** Limits of about as much as some calls cost (a hundred micro-dollars and more), or of few calls at once. */
function drawLimit(draw: Draw, level: string): JsonObject {
  switch (level) {
    case "tenant":
      return draw.chance(0.5) ? { concurrency_max: draw.any([0, 1, 1, 2, 3, null]) } : { limit_usd_micros: draw.any([0, null, draw.between(300, 6_000)]) };
    case "agent":
      return { id: draw.any(Object.keys(AGENTS)), limit_usd_micros: draw.any([null, draw.between(150, 3_000)]) };
    case "user":
      return { id: draw.any(USERS), limit_usd_micros: draw.any([null, draw.between(150, 3_000)]) };
    default:
      return { id: draw.any(SESSIONS).split("/")[2] ?? "", limit_usd_micros: draw.any([null, draw.between(0, 1_500)]) };
  }
}

const LEVELS = ["tenant", "agent", "user", "session"] as const;

function drawBudgets(draw: Draw): BudgetSetting[] {
  return TENANTS.flatMap((tenant): BudgetSetting[] => {
    const kind = draw.any(["free", "free", "tight", "tight", "crowded", "counted"]);
    const period = draw.any(["none", "none", "day"]);
    switch (kind) {
      case "tight":
        return [
          { tenant, level: "tenant", limit_usd_micros: draw.between(400, 9_000), period },
          ...Array.from({ length: draw.below(3) }, () => draw.any(["agent", "user", "session"])).map((level) => ({ tenant, level, ...drawLimit(draw, level) })),
        ];
      case "crowded":
        return [{ tenant, level: "tenant", concurrency_max: draw.between(1, 2) }];
      case "counted":
        return [{ tenant, level: "tenant", limit_usd_micros: 1_000_000, period, concurrency_max: 3 }];
      default:
        return [];
    }
  });
}

/** Somebody turns at a budget while it is used. */
function drawBudgeting(draw: Draw, step: number, names_slots: boolean): Act {
  const slot = names_slots && draw.chance(0.4);
  const level = draw.any(LEVELS);
  return {
    kind: "say",
    service: draw.any(SERVICES),
    actor: `${draw.any(TENANTS)}/budget/main`,
    channel: "control",
    type: slot ? draw.any(["slot.acquire", "slot.release"]) : "budget.configure",
    body: slot ? { slot: draw.any(SLOTS) } : { level, ...drawLimit(draw, level) },
    key: `k${step}`,
    fast: draw.chance(0.5),
    repeats: 0,
  };
}

function drawSaying(draw: Draw, step: number, names_slots: boolean): Act {
  const service = draw.any(SERVICES);
  if (draw.chance(0.04)) return drawBudgeting(draw, step, names_slots);
  if (draw.chance(0.06)) {
    const body: JsonObject = draw.chance(0.5)
      ? { key_id: `k${draw.below(4)}`, hash: "0123456789abcdef".repeat(4), scopes: [] }
      : { key_id: `k${draw.below(4)}` };
    const type = "hash" in body ? "key.create" : "key.revoke";
    return {
      kind: "say",
      service,
      actor: `${draw.any(TENANTS)}/tenant/main`,
      channel: "control",
      type,
      body,
      key: `k${step}`,
      fast: draw.chance(0.5),
      repeats: 0,
    };
  }
  const actor = draw.any(SESSIONS);
  if (draw.chance(0.03))
    return { kind: "garbage", service, actor, text: draw.any(["{", "[]", '{"type":"message.sing"}', '{"type":"message.send","body":{"content":7}}']) };
  const { type, body, channel } = drawCommand(draw, actor);
  if (channel === "command" && draw.chance(0.2))
    return { kind: "publish", service, actor, type, body, copies: draw.chance(0.2) ? 2 : 1, ...(draw.chance(0.4) ? { key: `p${step}` } : {}) };
  return { kind: "say", service, actor, channel, type, body, key: `k${step}`, fast: draw.chance(0.5), repeats: draw.chance(0.15) ? draw.between(1, 2) : 0 };
}

/** `assistant` always: sessions of it are created later too. */
function agentsOf(acts: readonly Act[], tenant: string): string[] {
  const named = acts.flatMap((act) =>
    act.kind === "say" && act.type === "session.create" && act.actor.startsWith(`${tenant}/`) ? [String(act.body["agent"])] : [],
  );
  return [...new Set(["assistant", ...named])];
}

/** Draws what happens in `steps` steps. Equal arguments give equal plans. */
export function drawPlan(seed: number, steps: number): Plan {
  const draw = drawing(seed);
  const acts: Act[] = [];
  let readers = 0;
  const budgets = drawBudgets(draw);
  const names_slots = draw.chance(0.3);
  for (const actor of SESSIONS) {
    const agent = draw.any(["assistant", "assistant", "assistant", "brief", "brief", "thrifty", "guarded"]);
    acts.push({
      kind: "say",
      service: draw.any(SERVICES),
      actor,
      channel: "command",
      type: "session.create",
      body: { agent, ...(draw.chance(0.1) ? { mode: "single" } : {}), ...(draw.chance(0.4) ? { user: draw.any(USERS) } : {}) },
      key: `create-${actor}`,
      fast: draw.chance(0.5),
      repeats: 0,
    });
    if (draw.chance(0.4)) {
      acts.push({ kind: "read", actor, slow_ms: draw.chance(0.3) ? draw.between(20, 400) : 0 });
      readers++;
    }
  }
  // Some runs are calm with one fault, others a storm.
  const faults = draw.any([0.05, 0.2, 0.35, 0.5]);
  for (let step = 0; step < steps; step++) {
    const act = draw.chance(faults)
      ? drawFault(draw, readers)
      : draw.chance(0.04)
        ? ({ kind: "read", actor: draw.any(SESSIONS), slow_ms: 0 } as const)
        : drawSaying(draw, step, names_slots);
    if (act.kind === "read") readers++;
    acts.push(act);
    acts.push({ kind: "pass", ms: draw.chance(0.06) ? draw.between(1_000, 9_000) : draw.skewed(0, 600) });
  }
  return {
    seed,
    acts,
    poison: draw.chance(0.08) ? draw.any(SESSIONS) : undefined,
    hang_one_in: draw.chance(0.04) ? 12 : 0,
    latency_ms_max: draw.any([0, 0, 2, 12]),
    budgets,
    agents: Object.fromEntries(TENANTS.map((tenant) => [tenant, agentsOf(acts, tenant)])),
    names_slots,
    begin_ms: BEGIN_MS - (draw.chance(0.15) ? draw.between(5_000, 40_000) : 0),
  };
}

export function describeAct(act: Act): string {
  const { kind, ...rest } = act;
  return `${kind} ${JSON.stringify(rest)}`;
}
