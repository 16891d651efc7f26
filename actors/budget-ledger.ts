// budget-ledger: what a tenant's budget did, day by day of UTC, folded from its own journal: the report can be made again from the stream at any
// time, and a closed day never changes.
//
// Calibration: a projection says what a level comes to when the call and those that run beside it have ended. It is held against what the level
// had come to when exactly those had ended. Kept apart by its rule, and by the confidence that was given to it, so that both can be judged.
//
// Invariants:
//   BL1. The categories of a day sum to its settled money; the days sum to everything ever settled.
//   BL2. Each projection is judged at most once, and only after all that it was made about has ended.
import { COST_PROJECTION_DEFAULT, type CostProjection } from "../protocol/cost-projection.ts";
import type { ActorEvent, JournalMessage } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";

export interface Calibration {
  /** By which it was foreseen (state-machines/budget-projection.ts). */
  readonly rule: CostProjection;
  readonly confidence: number;
  readonly projections: number;
  /** Those that were not exceeded. */
  readonly held: number;
  readonly projected_usd_micros: number;
  readonly actual_usd_micros: number;
}

export interface LedgerDay {
  /** `2026-11-18` */
  readonly day: string;
  readonly settled_usd_micros: number;
  /** Of it, what nobody knows and was settled whole. */
  readonly assumed_usd_micros: number;
  readonly by_category: Readonly<Record<string, number>>;
  readonly settled: number;
  readonly released: number;
  /** By code. */
  readonly refused: Readonly<Record<string, number>>;
  /** Calls that were made cheaper, by reason; and those that should have been and had no plan. */
  readonly degraded: Readonly<Record<string, number>>;
  readonly degraded_without_plan: number;
  /** By percent. */
  readonly alerts: Readonly<Record<string, number>>;
  readonly overruns: number;
  readonly overrun_usd_micros: number;
  readonly unreserved_usd_micros: number;
  readonly periods_closed: readonly JsonObject[];
  readonly calibration: readonly Calibration[];
}

/** With more calls at once their projections are not judged: each would wait for all the others. */
const SAMPLED_HOLDS_MAX = 256;

type Mutable<T> = { -readonly [K in keyof T]: T[K] };
type Day = Mutable<Omit<LedgerDay, "by_category" | "refused" | "degraded" | "alerts" | "periods_closed" | "calibration">> & {
  by_category: Record<string, number>;
  refused: Record<string, number>;
  degraded: Record<string, number>;
  alerts: Record<string, number>;
  periods_closed: JsonObject[];
  calibration: Map<string, Mutable<Calibration>>;
};

/** A projection whose calls still run. */
interface Sample {
  readonly day: Day;
  readonly key: string;
  /** What the level had when it was made, and what the journal had counted for it by then. */
  readonly settled_usd_micros: number;
  readonly counted_usd_micros: number;
  readonly projected_usd_micros: number;
  readonly confidence: number;
  readonly rule: CostProjection;
  waits_for: number;
}

const numberOf = (event: ActorEvent, name: string): number => (typeof event[name] === "number" ? event[name] : 0);
const textOf = (event: ActorEvent, name: string): string => (typeof event[name] === "string" ? event[name] : "");
const count = (into: Record<string, number>, name: string, by = 1): void => void (into[name] = (into[name] ?? 0) + by);

function freshDay(day: string): Day {
  return {
    day,
    settled_usd_micros: 0,
    assumed_usd_micros: 0,
    by_category: {},
    settled: 0,
    released: 0,
    refused: {},
    degraded: {},
    degraded_without_plan: 0,
    alerts: {},
    overruns: 0,
    overrun_usd_micros: 0,
    unreserved_usd_micros: 0,
    periods_closed: [],
    calibration: new Map(),
  };
}

export interface Ledger {
  /** The messages of one budget's journal, in order from its first. */
  add(message: Pick<JournalMessage, "at" | "events">): void;
  /** The days on which anything happened, oldest first. */
  days(): LedgerDay[];
}

export function createLedger(): Ledger {
  const days = new Map<string, Day>();
  /** hold → the projections that wait for its end. */
  const open = new Map<string, Sample[]>();
  /** level → everything settled in it, over all periods. */
  const counted = new Map<string, number>();

  function reserved(day: Day, event: ActorEvent): void {
    const hold = textOf(event, "hold");
    const decision = event["decision"] as JsonObject | undefined;
    if (decision?.["kind"] === "degrade") {
      if (decision["applied"] === true) count(day.degraded, String(decision["reason"]));
      else day.degraded_without_plan += 1;
    }
    if (open.has(hold)) return; // a further part of a call that was judged with its first
    open.set(hold, []);
    const inputs = decision?.["inputs"] as JsonObject | undefined;
    const projection = inputs?.["projection"] as JsonObject | undefined;
    if (decision === undefined || inputs === undefined || projection === undefined || open.size > SAMPLED_HOLDS_MAX) return;
    const key = decision["level"] === "tenant" ? "tenant" : `${String(decision["level"])}/${String(decision["id"])}`;
    const sample: Sample = {
      day,
      key,
      settled_usd_micros: Number(inputs["settled_usd_micros"]),
      counted_usd_micros: counted.get(key) ?? 0,
      projected_usd_micros: Number(projection["usd_micros"]),
      confidence: Number(projection["confidence"]),
      rule: (projection["rule"] as CostProjection | undefined) ?? COST_PROJECTION_DEFAULT,
      waits_for: open.size,
    };
    for (const samples of open.values()) samples.push(sample);
  }

  /** BL2 */
  function ended(hold: string): void {
    const samples = open.get(hold) ?? [];
    open.delete(hold);
    for (const sample of samples) {
      sample.waits_for -= 1;
      if (sample.waits_for > 0) continue;
      const { day, confidence, rule, projected_usd_micros } = sample;
      const actual_usd_micros = sample.settled_usd_micros + (counted.get(sample.key) ?? 0) - sample.counted_usd_micros;
      const name = `${rule} ${confidence}`;
      const row = day.calibration.get(name) ?? { rule, confidence, projections: 0, held: 0, projected_usd_micros: 0, actual_usd_micros: 0 };
      row.projections += 1;
      row.held += actual_usd_micros <= projected_usd_micros ? 1 : 0;
      row.projected_usd_micros += projected_usd_micros;
      row.actual_usd_micros += actual_usd_micros;
      day.calibration.set(name, row);
    }
  }

  function take(day: Day, event: ActorEvent): void {
    switch (event.type) {
      case "budget.reserved":
        return reserved(day, event);
      case "budget.settled": {
        const cost = numberOf(event, "cost_usd_micros");
        day.settled += 1;
        day.settled_usd_micros += cost;
        if (event["assumed"] === true) day.assumed_usd_micros += cost;
        const by = (event["by_category"] as Readonly<Record<string, number>> | undefined) ?? { [textOf(event, "category")]: cost };
        for (const [category, part] of Object.entries(by)) count(day.by_category, category, part); // BL1
        const keys = ["tenant", `agent/${textOf(event, "agent")}`, `user/${textOf(event, "user")}`, `session/${textOf(event, "session")}`];
        for (const key of keys) counted.set(key, (counted.get(key) ?? 0) + cost);
        return ended(textOf(event, "hold"));
      }
      case "budget.released":
        day.released += 1;
        return ended(textOf(event, "hold"));
      case "budget.refused":
        return count(day.refused, textOf(event, "code"));
      case "budget.alert":
        return count(day.alerts, String(event["percent"]));
      case "budget.overrun":
        day.overruns += 1;
        day.overrun_usd_micros += numberOf(event, "over_usd_micros");
        return undefined;
      case "budget.unreserved":
        day.unreserved_usd_micros += numberOf(event, "cost_usd_micros");
        return undefined;
      case "budget.period_closed": {
        const { type: _, ...closed } = event;
        day.periods_closed.push(closed);
        return undefined;
      }
      default:
        return undefined;
    }
  }

  return {
    add({ at, events }) {
      const name = at.slice(0, 10);
      for (const event of events) {
        const day = days.get(name) ?? freshDay(name);
        days.set(name, day);
        take(day, event);
      }
    },
    days() {
      return [...days.values()].map((day) => ({
        ...day,
        calibration: [...day.calibration.values()]
          .sort((a, b) => (a.rule === b.rule ? a.confidence - b.confidence : a.rule < b.rule ? -1 : 1))
          .map((row) => ({ ...row })),
      }));
    },
  };
}
