// settling: the end of a run. Every fault ends, everybody runs, and from then on everything must come to rest: every command is decided, every session
// rests, nobody is in memory, every reader and every row is where the journals are. Then the streams are verified.
import { verifyAll } from "../../actors/verify.ts";
import type { Broker } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { type Cluster, SHARDS, simulationCores } from "./cluster.ts";
import type { SimulatedModels } from "./models.ts";
import { type Money, TOLD_WITHIN_MS } from "./money.ts";
import { type Plan, SESSIONS, SLOTS, TENANTS } from "./plan.ts";
import type { SimulatedPostgres } from "./postgres.ts";
import type { Services } from "./services.ts";
import type { Story } from "./story.ts";
import type { Trouble } from "./trouble.ts";
import type { VirtualWorld } from "./virtual-world.ts";
import type { Watch } from "./watch.ts";

const SETTLE_PATIENCE_MS = 15 * 60_000;

export interface SettlingDeps {
  readonly plan: Plan;
  readonly world: VirtualWorld;
  readonly broker: Broker;
  readonly story: Story;
  readonly watch: Watch;
  readonly money: Money;
  readonly cluster: Cluster;
  readonly services: Services;
  readonly models: SimulatedModels;
  readonly postgres: SimulatedPostgres;
  readonly trouble: Trouble;
}

/** Everything is at rest, so the streams are read as they lie there. */
function readOf(broker: Broker): Pick<Bus, "read" | "bounds"> {
  return {
    async *read(stream, filter, from_sequence, to_sequence = Number.MAX_SAFE_INTEGER) {
      for (let next = from_sequence; ;) {
        const message = broker.stream(stream).next([filter], next);
        if (message === undefined || message.sequence > to_sequence) return;
        next = message.sequence + 1;
        yield message;
      }
    },
    bounds: (stream) => Promise.resolve(broker.stream(stream)),
  };
}

export class Settling {
  readonly #deps: SettlingDeps;

  constructor(deps: SettlingDeps) {
    this.#deps = deps;
  }

  async heal(): Promise<void> {
    const { story, world, cluster, broker, services, models, plan, trouble, postgres, money, watch } = this.#deps;
    story.trace("every fault ends");
    trouble.heal();
    postgres.heal();
    if (!models.poisoned) money.healed();
    for (const slot of cluster.slots.values()) {
      broker.mend(slot.connection);
      cluster.goOn(slot);
    }
    // A broker that is away, and cuts that were to end later, end by themselves.
    await this.#until("every command that was sent is decided", () => services.pending === 0);
    if (money.stands()) await world.advance(TOLD_WITHIN_MS + 2_000);
    money.judgeWaits();
    // Where no call may run, or those that hold the slots never give them back, nothing would ever end but by patience.
    for (const tenant of money.closed()) this.#say(`${tenant}/budget/main`, "budget.configure", { level: "tenant", concurrency_max: 2 });
    // Whoever holds a slot of his own gives it back: for it others may be waiting.
    if (plan.names_slots) for (const tenant of TENANTS) for (const slot of SLOTS) this.#say(`${tenant}/budget/main`, "slot.release", { slot });
    await this.#until("every budget gives room", () => services.pending === 0);
    await this.#until("a poisoned session is parked", () => !models.poisoned || !this.#works(plan.poison ?? ""));
    models.poisoned = false;
    // A process that is ended right after its call was refused says nothing.
    money.healed();
    // Whatever state it was left in, it can go on: an answer is liveness.
    for (const path of SESSIONS) {
      if (watch.journals.get(path)?.state === undefined) continue;
      this.#say(path, "session.unpark", {});
      this.#say(path, "session.resume", {}, true);
    }
    await this.#until("every last command is decided", () => services.pending === 0);
    await this.#until("every session comes to rest", () => SESSIONS.every((path) => !this.#works(path)));
    await this.#until("COMMANDS is empty", () => broker.stream("COMMANDS").messages === 0);
    await this.#until("everybody leaves memory", () => cluster.isEmpty());
    await this.#until("every reader has everything", () => cluster.readers.every((reader) => reader.given === reader.deps.journal().events.length));
    await this.#until("every row is there", () => postgres.rows.position === broker.stream("EVENTS").last_sequence);
    await this.#until("every shard has one owner", () => cluster.isPlaced());
  }

  async judge(): Promise<void> {
    const { story, broker, services, watch, money, postgres, cluster } = this.#deps;
    const { entries, snapshots } = await verifyAll({
      bus: readOf(broker),
      cores: simulationCores,
      replay: watch.replay,
      report: ({ invariant, actor, seq, what }) => story.fail(`verify ${invariant}: ${actor} ${seq ?? ""}: ${what}`),
    });
    story.count("entries", entries);
    story.count("snapshots", snapshots);
    services.judge(watch.journals);
    money.judge();
    postgres.judge(watch.told);
    for (const reader of cluster.readers) story.count("tokens read", reader.tokens);
  }

  #say(actor: string, type: string, body: Parameters<Services["say"]>[0]["body"], fast = false): void {
    const channel = type === "session.resume" ? "command" : "control";
    const key = `last-${type.slice(type.indexOf(".") + 1)}${Object.values(body).join("")}`;
    this.#deps.services.say({ service: "svc1", actor, channel, type, body, key, fast, repeats: 0 });
  }

  #works(path: string): boolean {
    const state = this.#deps.watch.journals.get(path)?.state;
    return state !== undefined && Object.keys(state.running).length > 0;
  }

  async #until(what: string, holds: () => boolean): Promise<void> {
    const { story, world } = this.#deps;
    if (story.broke) return;
    const came = await world.until(() => holds() || story.broke, SETTLE_PATIENCE_MS);
    if (!came) story.fail(`liveness: ${what}, within ${SETTLE_PATIENCE_MS / 60_000} minutes after the last fault: ${this.#standing()}`);
  }

  #standing(): string {
    const { watch, cluster, broker, services, postgres } = this.#deps;
    const sessions = SESSIONS.map((path) => {
      const journal = watch.journals.get(path);
      const running = Object.values(journal?.state?.running ?? {}).map(({ inst }) => inst);
      return `${path} ${journal?.head?.state ?? "-"} [${running.join(" ")}]`;
    });
    const rest = [`COMMANDS ${broker.stream("COMMANDS").messages}`, `pending ${services.pending}`, `rows to ${postgres.rows.position}`, `shards ${SHARDS}`];
    return [...sessions, ...cluster.describe(), ...rest].join("; ");
  }
}
