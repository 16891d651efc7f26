// simulation: a whole cluster in one thread and in virtual time, on the in-memory bus, going through one plan.
//
//   two supervisors, three workers and more, a gateway with readers, services that say commands, a projector ── cluster.ts, services.ts
//      plan ──▶ acts, one after another ──▶ heal: every fault ends, everybody runs ──▶ settle: everything must come to rest ── settling.ts
//                  └── the watch compares every append, start, answer and item with the journals, and keeps books of the money ──┘
//
// What must hold at each moment is in watch.ts, money.ts and reader.ts, what must hold in the end in settling.ts, services.ts and postgres.ts.
import type { ShardHost } from "../../actors/shard-host.ts";
import { Broker, type Operation } from "../../bus/memory.ts";
import type { Bus } from "../../bus/port.ts";
import { bucketSubject } from "../../bus/streams.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { Cluster, SHARDS, simulationCores } from "./cluster.ts";
import { SimulatedModels } from "./models.ts";
import { Money } from "./money.ts";
import { type Act, AGENTS, describeAct, isFault, type Plan, TENANTS } from "./plan.ts";
import { SimulatedPostgres } from "./postgres.ts";
import { Services } from "./services.ts";
import { Settling } from "./settling.ts";
import { Story } from "./story.ts";
import { Trouble } from "./trouble.ts";
import { VirtualWorld } from "./virtual-world.ts";
import { Watch } from "./watch.ts";

export interface RunResult {
  /** What broke, in the order in which it was seen; empty for a good run. */
  readonly failures: readonly string[];
  /** The last lines of what happened. */
  readonly trace: readonly string[];
  readonly trace_hash: string;
  readonly counts: Readonly<Record<string, number>>;
  readonly virtual_ms: number;
  readonly broker: Broker;
}

export interface RunOptions {
  /** Changes what a process is made of, to see that the watch sees it. */
  readonly break_host?: (host: ShardHost) => ShardHost;
  readonly break_bus?: (bus: Bus, process: string) => Bus;
}

export async function runPlan(plan: Plan, options: RunOptions = {}): Promise<RunResult> {
  // A run never lets go of the loop; between two of them timers, signals and messages are heard.
  await new Promise((resolve) => setImmediate(resolve));
  return new Simulation(plan, options).run();
}

class Simulation {
  readonly plan: Plan;
  readonly world: VirtualWorld;
  readonly broker: Broker;
  readonly story: Story;
  readonly watch: Watch;
  readonly money: Money;
  readonly models: SimulatedModels;
  readonly postgres: SimulatedPostgres;
  readonly cluster: Cluster;
  readonly services: Services;
  readonly trouble: Trouble;

  constructor(plan: Plan, { break_host, break_bus }: RunOptions) {
    const world = new VirtualWorld(plan.seed ^ 0x7e11, plan.begin_ms);
    const story = new Story(() => world.monotonic_ms());
    const end = (connection: string, why: string): void => {
      const slot = this.cluster.slotOf(connection);
      if (slot !== undefined) this.cluster.end(slot, why);
    };
    this.plan = plan;
    this.world = world;
    this.story = story;
    this.trouble = new Trouble({
      plan,
      world,
      story,
      end,
      stop: (connection, ms) => this.cluster.stop(this.cluster.slotOf(connection)!, ms),
      isThere: (connection) => this.cluster.slotOf(connection) !== undefined,
    });
    this.broker = new Broker({
      world,
      shards: SHARDS,
      faults: { before: (operation) => this.trouble.before(operation), after: (operation) => this.#after(operation) },
    });
    const broker = (): Broker => this.broker;
    const { fail, count, trace } = story;
    const now_ms = (): number => world.monotonic_ms();
    this.watch = new Watch({
      broker,
      shards: SHARDS,
      cores: simulationCores,
      fail,
      trace,
      count,
      on_append: (journal, message) => this.money.appended(journal, message),
    });
    this.money = new Money({ journals: this.watch.journals, now_ms, fail, count });
    this.models = new SimulatedModels(plan, story);
    this.postgres = new SimulatedPostgres({ world, story, end });
    this.cluster = new Cluster({ world, broker, watch: this.watch, story, models: this.models, postgres: this.postgres, break_host, break_bus });
    this.services = new Services({ story, speaker: (service) => this.cluster.speaker(service) });
  }

  async run(): Promise<RunResult> {
    const { story, world, broker } = this;
    this.cluster.begin();
    await this.#prepare();
    for (const act of this.plan.acts) {
      if (story.broke) break;
      await this.#perform(act);
    }
    const settling = new Settling(this);
    if (!story.broke) await settling.heal();
    if (!story.broke) await settling.judge();
    return { failures: story.failures, ...story.end(), counts: story.counts, virtual_ms: world.monotonic_ms(), broker };
  }

  /** Tenants, agents and money, before anything goes wrong. */
  async #prepare(): Promise<void> {
    const say = (actor: string, type: string, body: JsonObject, key: string): void =>
      this.services.say({ service: "svc1", actor, channel: "control", type, body, key, fast: false, repeats: 0 });
    for (const tenant of TENANTS) {
      const main = `${tenant}/tenant/main`;
      say(main, "tenant.create", {}, "create");
      for (const agent of this.plan.agents[tenant] ?? []) say(main, "agent.put", { agent, config: AGENTS[agent]! }, `agent-${agent}`);
    }
    const decided = (): Promise<boolean> => this.world.until(() => this.services.pending === 0, 60_000);
    let undisturbed = await decided();
    this.plan.budgets.forEach(({ tenant, ...body }, index) => {
      const budget = `${tenant}/budget/main`;
      say(budget, "budget.create", {}, `budget-${index}`);
      say(budget, "budget.configure", body, `limit-${index}`);
    });
    undisturbed &&= await decided();
    if (!undisturbed) this.story.fail("liveness: an undisturbed cluster takes no commands within a minute");
  }

  /** Whatever was done, the watch looks at it before anybody hears of it. */
  #after(operation: Operation): ReturnType<Trouble["after"]> {
    const { kind, connection, subject } = operation;
    if (kind === "append") {
      this.watch.look();
      this.cluster.checkOwners();
    } else if (kind === "clear") {
      this.story.trace(`${connection} clears ${subject}`);
      this.watch.cleared(subject);
    } else if (kind === "publish" && subject.startsWith("resident.")) {
      this.story.trace(`${connection} marks ${subject}`);
    } else if (kind === "bucket_write" && subject.startsWith(bucketSubject("PLACEMENT", ""))) {
      this.watch.placed(subject);
    }
    return this.trouble.after(operation);
  }

  async #perform(act: Act): Promise<void> {
    const { cluster, services, story, trouble } = this;
    if (act.kind === "pass") {
      await this.world.advance(act.ms);
      return;
    }
    if (isFault(act)) story.trace(`act ${describeAct(act)}`);
    story.count(`act ${act.kind}`);
    const slot = "process" in act ? cluster.slots.get(act.process) : undefined;
    switch (act.kind) {
      case "say":
        services.say(act);
        break;
      case "publish":
        services.publish(act);
        break;
      case "garbage":
        services.garbage(act);
        break;
      case "strike":
        trouble.strike(act);
        break;
      case "crash":
        if (slot === undefined || slot.process.state === "dead") break;
        story.count("crashes");
        cluster.end(slot, "killed");
        break;
      case "stop":
        if (slot !== undefined) cluster.stop(slot, act.ms);
        break;
      case "cut":
        if (slot !== undefined) cluster.cut(slot, act.ms);
        break;
      case "away":
        for (const one of cluster.slots.values()) cluster.cut(one, act.ms);
        break;
      case "restart":
        void this.broker.restart(act.ms);
        break;
      case "drain":
        if (slot !== undefined) cluster.drain(slot, act.deadline_ms);
        break;
      case "join":
        cluster.join(act.process, act.process);
        break;
      case "twin":
        cluster.join(act.process, `${act.process}'`);
        break;
      case "weather":
        trouble.weather(act);
        break;
      case "clock":
        if (slot !== undefined) slot.process.clock_skew_ms += act.jump_ms;
        break;
      case "postgres_away":
        this.postgres.goAway(act);
        break;
      case "commit":
        this.postgres.strike(act);
        break;
      case "read":
        cluster.read(act.actor, act.slow_ms);
        break;
      case "reconnect": {
        const reader = cluster.readers[act.reader];
        if (reader !== undefined) cluster.attach(reader);
        break;
      }
      default:
        act satisfies never;
    }
  }
}
