// trouble: what goes wrong between a process and the broker in one run: operations that are struck, that are late by chance, and those that come
// without end.
import type { FaultAfter, FaultBefore, Operation } from "../../bus/memory.ts";
import { type Act, describeAct, type Plan } from "./plan.ts";
import { hashOfText, type Story } from "./story.ts";
import { seededRandom, type VirtualWorld } from "./virtual-world.ts";

const OPERATIONS_IN_AN_INSTANT_MAX = 20_000;

interface Strike {
  readonly act: Extract<Act, { kind: "strike" }>;
  left: number;
}
interface Weather {
  readonly act: Extract<Act, { kind: "weather" }>;
  readonly random: () => number;
  readonly until_ms: number;
}

export interface TroubleDeps {
  readonly plan: Plan;
  readonly world: VirtualWorld;
  readonly story: Story;
  /** Ends the process of this connection. */
  end(connection: string, why: string): void;
  stop(connection: string, ms: number): void;
  /** Is this connection that of a process which is there? */
  isThere(connection: string): boolean;
}

export class Trouble {
  readonly #deps: TroubleDeps;
  readonly #strikes: Strike[] = [];
  readonly #weathers: Weather[] = [];
  readonly #latency: () => number;
  #instant = { at_ms: 0, operations: 0 };
  #frozen = false;
  healed = false;

  constructor(deps: TroubleDeps) {
    this.#deps = deps;
    this.#latency = seededRandom(deps.plan.seed ^ 0x1a7e);
  }

  strike(act: Extract<Act, { kind: "strike" }>): void {
    this.#strikes.push({ act, left: act.nth });
  }
  weather(act: Extract<Act, { kind: "weather" }>): void {
    const { world, plan } = this.#deps;
    this.#weathers.push({ act, random: seededRandom(hashOfText(describeAct(act)) ^ plan.seed), until_ms: world.monotonic_ms() + act.ms });
  }
  heal(): void {
    this.healed = true;
    this.#strikes.length = 0;
    this.#weathers.length = 0;
  }

  before(operation: Operation): FaultBefore | undefined {
    if (this.#livelocked()) return { kind: "delay", ms: 1_000_000 };
    if (this.healed) return undefined;
    const effect = this.#struck(operation, "before");
    const { connection } = operation;
    if (effect === undefined || !this.#deps.isThere(connection)) return this.#late(operation);
    if (effect.kind === "delay") return { kind: "delay", ms: effect.ms };
    if (effect.kind === "stop") {
      this.#deps.stop(connection, effect.ms);
      return undefined;
    }
    if (effect.kind === "crash") this.#deps.end(connection, `before ${operation.kind}`);
    return { kind: "unavailable" };
  }

  after(operation: Operation): FaultAfter | undefined {
    if (this.healed) return undefined;
    const effect = this.#struck(operation, "after");
    const { connection } = operation;
    if (effect === undefined || !this.#deps.isThere(connection)) return undefined;
    if (effect.kind === "delay") return { kind: "delay", ms: effect.ms };
    if (effect.kind === "stop") {
      this.#deps.stop(connection, effect.ms);
      return undefined;
    }
    if (effect.kind === "crash") this.#deps.end(connection, `after ${operation.kind}`);
    return { kind: "lose_answer" };
  }

  #struck(operation: Pick<Operation, "connection" | "kind" | "subject">, side: "before" | "after"): Strike["act"]["effect"] | undefined {
    if (this.#strikes.length === 0) return undefined;
    const { story } = this.#deps;
    const name = operation.connection.slice(0, operation.connection.indexOf("#"));
    for (const [index, strike] of this.#strikes.entries()) {
      const { act } = strike;
      if (act.process !== name || act.operation !== operation.kind || act.side !== side || --strike.left > 0) continue;
      this.#strikes.splice(index, 1);
      story.count(`${act.effect.kind} ${side} ${operation.kind}`);
      if (act.effect.kind === "crash") story.count("crashes");
      story.trace(`${operation.connection} is struck ${side} ${operation.kind} ${operation.subject}: ${act.effect.kind}`);
      return act.effect;
    }
    return undefined;
  }

  /** What happens without end in one instant would never let the simulation look: from here on everything takes time. */
  #livelocked(): boolean {
    const now_ms = this.#deps.world.monotonic_ms();
    if (this.#instant.at_ms !== now_ms) this.#instant = { at_ms: now_ms, operations: 0 };
    if (++this.#instant.operations > OPERATIONS_IN_AN_INSTANT_MAX && !this.#frozen) {
      this.#frozen = true;
      this.#deps.story.fail(`liveness: more than ${OPERATIONS_IN_AN_INSTANT_MAX} operations in one instant`);
    }
    return this.#frozen;
  }

  #late({ connection }: Operation): FaultBefore | undefined {
    const { world, story, plan } = this.#deps;
    if (this.#weathers.length > 0) {
      const name = connection.slice(0, connection.indexOf("#"));
      for (const { act, random, until_ms } of this.#weathers) {
        if (act.process !== name || world.monotonic_ms() > until_ms || random() >= act.chance) continue;
        story.count("late operations");
        return { kind: "delay", ms: Math.ceil(random() * act.late_ms_max) };
      }
    }
    const { latency_ms_max } = plan;
    return latency_ms_max === 0 ? undefined : { kind: "delay", ms: this.#latency() * latency_ms_max };
  }
}
