// chaos-scenarios: what is done to a running system, and what must hold while it is done. Each scenario runs its trials under load; whatever it
// does, the audit comes after it (chaos.ts).
//
//   settled ──the blow──▶ measured until everybody goes on ──mended──▶ settled ──▶ the next trial
//
// Times are counted from the blow, by the clock of this process, until word of it arrives here: `detect` the verdict in the worker's journal,
// `assign` the last of its shards given away, `claim` the new owner's entry in a session's journal, `effect` the model's provider asked again,
// `token` the first chunk of the new attempt at a client of the gateway.
import { join } from "node:path";
import { until } from "../deploy/local/server-process.ts";
import type { JsonObject } from "../protocol/json.ts";
import { createDatabase } from "../projections/database.ts";
import { PROJECTION_NAME } from "../projections/rows.ts";
import { createQueries } from "../projections/queries.ts";
import { silentLog } from "../protocol/log.ts";
import { createAuditView } from "../cli/audit-view.ts";
import { type Ground, type GroundOptions, now, setClock, wait } from "./chaos-ground.ts";
import { type AuditReport, auditLoad } from "./chaos-audit.ts";
import { type Load, type LoadOptions, startLoad } from "./chaos-load.ts";
import { startProxy } from "./chaos-proxy.ts";
import { quantiles } from "./cluster.ts";

/** How long everybody has to go on after a blow. The slowest way is a lease that ends, 5 s, and a model call behind it. */
const RECOVERY_PATIENCE_MS = 30_000;
const SETTLE_PATIENCE_MS = 60_000;
/** Nobody is judged within one lease of a beginning or an outage. */
export const CALM_MS = 5_500;
const NOISE_EVERY_MS = 20;

export interface Trouble {
  readonly ground: Ground;
  readonly load: Load;
  readonly trials: number;
  /** How long what is away stays away, where a scenario has such a time. */
  readonly away_ms: number;
  /** Of a hundred commands to sessions that nothing is done to, ninety-nine are acknowledged within this. */
  readonly acknowledged_within_ms: number;
  readonly random: () => number;
  measured(phase: string, ms: number): void;
  fault(what: string): void;
  note(what: string): void;
  say(what: string): void;
}

export interface Scenario {
  readonly name: string;
  readonly what: string;
  readonly ground: GroundOptions;
  readonly load: LoadOptions;
  readonly away_ms?: number;
  /** In a whole run, when nobody says how many. */
  readonly trials: number;
  run(trouble: Trouble): Promise<void>;
  /** Is the journal's projection to be checked too? */
  readonly projections?: boolean;
}

export interface ScenarioResult {
  readonly scenario: string;
  readonly trials: number;
  readonly phases: ReadonlyMap<string, number[]>;
  readonly faults: readonly string[];
  readonly notes: readonly string[];
  readonly audit: AuditReport;
  /** How late timers of the measuring process were: what the machine itself adds to every time here. */
  readonly timer_late_ms: readonly number[];
  /** Of sessions that nothing was done to. */
  readonly acknowledgement_ms: { readonly p50: number; readonly p99: number; readonly max: number; readonly count: number };
}

export interface RunOptions {
  readonly trials: number;
  readonly random: () => number;
  readonly load?: Partial<LoadOptions>;
  readonly away_ms?: number;
  /** A second by default; where the machine is not the measured one, what tells a delay from a stand-still. */
  readonly acknowledged_within_ms?: number;
  say?(what: string): void;
}

/** Runs one scenario on a ground that stands, and audits what it left. */
export async function runScenario(
  ground: Ground,
  scenario: Scenario,
  { trials, random, load: more, away_ms, acknowledged_within_ms = 1_000, say = () => undefined }: RunOptions,
): Promise<ScenarioResult> {
  const phases = new Map<string, number[]>();
  const faults: string[] = [];
  const notes: string[] = [];
  const load = await startLoad(ground, { ...scenario.load, ...more });
  const trouble: Trouble = {
    ground,
    load,
    trials,
    away_ms: away_ms ?? scenario.away_ms ?? 0,
    acknowledged_within_ms,
    random,
    measured: (phase, ms) => void phases.set(phase, [...(phases.get(phase) ?? []), ms]),
    fault: (what) => void (faults.length < 50 && faults.push(what)),
    note: (what) => void notes.push(what),
    say,
  };
  const timer_late_ms: number[] = [];
  let due_ms = now() + NOISE_EVERY_MS;
  const noise = setInterval(() => {
    timer_late_ms.push(Math.max(0, now() - due_ms));
    due_ms = now() + NOISE_EVERY_MS;
  }, NOISE_EVERY_MS);
  try {
    await settled(trouble);
    await scenario.run(trouble);
    faults.push(...(await load.finish(SETTLE_PATIENCE_MS)));
  } finally {
    clearInterval(noise);
    await load.stop();
  }
  const audit = scenario.projections === true ? await withProjections(trouble) : await auditLoad(ground, load);
  const times = load.ack_times.map(({ ms }) => ms);
  const { p50_ms, p99_ms } = quantiles(times);
  for (const [refusal, count] of load.refusals) notes.push(`${count} × ${refusal}`);
  return {
    scenario: scenario.name,
    trials,
    phases,
    faults,
    notes,
    audit,
    timer_late_ms,
    acknowledgement_ms: { p50: p50_ms, p99: p99_ms, max: Math.max(0, ...times), count: times.length },
  };
}

// ── what scenarios are made of ───────────────────────────────────────────────────────────────────────────────────────

/** Every worker that runs is ready and owns something, nothing moves, somebody leads, and a lane is at work. */
async function settled({ ground, load }: Trouble, workers_min = 2): Promise<void> {
  const { watch } = ground;
  const calm = (): boolean => {
    const workers = ground.workers();
    const owned = workers.every((id) => watch.stateOf(id) === "ready" && watch.shardsOf(id).length > 0);
    const moving = [...watch.placement().values()].some((entry) => entry.moving_to !== undefined || !workers.includes(entry.worker));
    return workers.length >= workers_min && owned && !moving && watch.leader() !== undefined && load.waiting().length > 0;
  };
  if (!(await until(calm, SETTLE_PATIENCE_MS, 20))) {
    const states = ground.workers().map((id) => `${id} ${watch.stateOf(id)} owns ${watch.shardsOf(id).length}`);
    throw new Error(`the system did not settle: ${states.join(", ")}; leader ${watch.leader()}; ${load.waiting().length} lanes at work`);
  }
}

/** The worker on which most model calls run now, and those calls. */
function busiest({ ground }: Trouble): { worker: string; sessions: Map<string, { turn: number; step: number }> } | undefined {
  const by_worker = new Map<string, Map<string, { turn: number; step: number }>>();
  for (const { session, turn, step } of ground.watch.running()) {
    const worker = ground.watch.ownerOf(session)?.worker;
    if (worker === undefined || worker === "") continue;
    const sessions = by_worker.get(worker) ?? new Map<string, { turn: number; step: number }>();
    sessions.set(session, { turn, step });
    by_worker.set(worker, sessions);
  }
  const [found] = [...by_worker].sort(([, a], [, b]) => b.size - a.size);
  return found === undefined ? undefined : { worker: found[0], sessions: found[1] };
}

interface Recovery {
  /** The slowest of each phase, for the line of a trial. */
  slowest(): string;
  /** Resolves when every session that was hit goes on, or the patience is over; answers those that do not. */
  over(): Promise<string[]>;
  /** Resolves when the calls that were hit have ended, so that the next blow hits no session twice. */
  ended(): Promise<void>;
}

/** Watches what becomes of the sessions of a worker that is about to be hit. To be called just before the blow. */
function watchRecovery(trouble: Trouble, victim: string, sessions: ReadonlyMap<string, { turn: number; step: number }>): { blow(at_ms: number): Recovery } {
  const { ground, load } = trouble;
  return {
    blow(blow_ms) {
      const claimed = new Map<string, number>();
      const called = new Set<string>();
      const heard = new Set<string>();
      const slowest = new Map<string, number>();
      const measured = (phase: string, ms: number): void => {
        slowest.set(phase, Math.max(ms, slowest.get(phase) ?? 0));
        trouble.measured(phase, ms);
      };
      const completed = new Set<string>();
      let detected = false;
      let assigned_ms = 0;
      const stops = [
        ground.watch.onJournal(({ actor, message, at_ms }) => {
          if (actor.kind === "worker") {
            if (actor.id === victim && message.state === "dead" && !detected) {
              detected = true;
              measured("detect", at_ms - blow_ms);
            }
            if (message.events.some((event) => event.type === "shard.assigned" && event["from"] === victim)) assigned_ms = at_ms - blow_ms;
            return;
          }
          const wanted = sessions.get(actor.id);
          if (wanted === undefined) return;
          for (const event of message.events)
            if (event.type === "model.completed" && event["turn"] === wanted.turn && event["step"] === wanted.step) completed.add(actor.id);
          for (const entry of message.entries)
            if (entry.t === "claim" && entry.lost.length > 0 && !completed.has(actor.id) && !claimed.has(actor.id)) {
              claimed.set(actor.id, at_ms);
              measured("claim", at_ms - blow_ms);
            }
        }),
        ground.onCall(({ tag, at_ms }) => {
          const session = tag.split("/")[0]!;
          if (!sessions.has(session) || completed.has(session) || called.has(session)) return;
          called.add(session);
          measured("effect", at_ms - blow_ms);
        }),
        load.onToken(({ session, turn, step, attempt, at_ms }) => {
          const wanted = sessions.get(session);
          if (wanted === undefined || attempt < 2 || turn !== wanted.turn || step !== wanted.step || heard.has(session)) return;
          heard.add(session);
          measured("token", at_ms - blow_ms);
        }),
      ];
      // A call whose answer had been journaled when the blow came is nobody's loss.
      const goesOn = (session: string): boolean => completed.has(session) || (claimed.has(session) && called.has(session) && heard.has(session));
      return {
        slowest: () => [...slowest].map(([phase, ms]) => `${phase} ${Math.round(ms)}`).join(", "),
        async over() {
          await until(() => [...sessions.keys()].every(goesOn), RECOVERY_PATIENCE_MS, 5);
          if (assigned_ms > 0) trouble.measured("assign", assigned_ms);
          return [...sessions.keys()]
            .filter((session) => !goesOn(session))
            .map((session) => `${session} (claimed ${claimed.has(session)}, effect ${called.has(session)}, token ${heard.has(session)})`);
        },
        async ended() {
          await until(() => [...sessions.keys()].every((session) => completed.has(session)), RECOVERY_PATIENCE_MS, 20);
          for (const stop of stops) stop();
        },
      };
    },
  };
}

/** Who is declared dead, and which actors are claimed, from now on. */
function watchMoves({ ground }: Trouble): { readonly dead: string[]; readonly claims: string[]; stop(): void } {
  const dead: string[] = [];
  const claims: string[] = [];
  const stop = ground.watch.onJournal(({ actor, message }) => {
    if (actor.kind === "worker" && message.state === "dead" && message.events.some(({ type }) => type === "worker.state")) dead.push(actor.id);
    if (actor.kind === "session")
      for (const entry of message.entries) if (entry.t === "claim" && entry.lost.length > 0) claims.push(`${actor.id} from ${entry.from}: ${entry.reason}`);
  });
  return { dead, claims, stop };
}

/** Waits for a moment at which the busiest worker has calls to lose, somewhere within them. */
async function streaming(trouble: Trouble): Promise<{ worker: string; sessions: Map<string, { turn: number; step: number }> }> {
  await settled(trouble);
  await wait(trouble.random() * 1_000);
  for (let waits = 0; waits < 500; waits++) {
    const found = busiest(trouble);
    if (found !== undefined && found.sessions.size > 0) return found;
    await wait(20);
  }
  const { load, ground } = trouble;
  const told = load
    .waiting()
    .slice(0, 5)
    .map(({ tag, since_ms }) => `${tag} for ${Math.round(now() - since_ms)} ms`);
  const stuck = `${load.waiting().length} lanes wait (${told.join(", ")}); ${ground.model.open_streams} streams at the provider; refusals ${JSON.stringify([...load.refusals])}`;
  throw new Error(`no model call runs: ${stuck}`);
}

// ── workers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

async function killWorkers(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  for (let trial = 1; trial <= trouble.trials; trial++) {
    const { worker, sessions } = await streaming(trouble);
    const shards = ground.watch.shardsOf(worker).length;
    const recovery = watchRecovery(trouble, worker, sessions).blow(ground.signal("worker", worker, "SIGKILL"));
    const stuck = await recovery.over();
    for (const one of stuck) trouble.fault(`trial ${trial}: ${one} did not go on after ${worker} was killed`);
    trouble.say(
      `trial ${trial}: ${worker} with ${shards} shards killed under ${sessions.size} calls${stuck.length === 0 ? "" : `, ${stuck.length} stuck`}; ms at most: ${recovery.slowest()}`,
    );
    // Its start would be measured instead of the recovery, on a small machine.
    ground.startWorker();
    await recovery.ended();
  }
}

async function stopBriefly(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  for (let trial = 1; trial <= trouble.trials; trial++) {
    const { worker } = await streaming(trouble);
    const before = JSON.stringify([...ground.watch.placement()].map(([shard, { worker: owner, epoch }]) => [shard, owner, epoch]));
    const moves = watchMoves(trouble);
    const stopped_ms = ground.signal("worker", worker, "SIGSTOP");
    await wait(2_000);
    const woken_ms = ground.signal("worker", worker, "SIGCONT");
    trouble.measured("stopped", woken_ms - stopped_ms);
    // Longer than whatever was on its way needs.
    await wait(1_500);
    moves.stop();
    const after = JSON.stringify([...ground.watch.placement()].map(([shard, { worker: owner, epoch }]) => [shard, owner, epoch]));
    if (before !== after) trouble.fault(`trial ${trial}: shards moved while ${worker} paused for 2 s`);
    for (const id of moves.dead) trouble.fault(`trial ${trial}: ${id} was declared dead while ${worker} paused for 2 s`);
    for (const claim of moves.claims) trouble.fault(`trial ${trial}: ${claim}`);
    trouble.say(`trial ${trial}: ${worker} paused for ${Math.round(woken_ms - stopped_ms)} ms, ${moves.dead.length} dead, ${moves.claims.length} claims`);
  }
}

/** What a worker that lost its shards must not do any more: append under an epoch that it held before. */
function watchZombie(trouble: Trouble, worker: string): { readonly stored: string[]; readonly tried: number; stop(): void } {
  const { watch } = trouble.ground;
  const held = new Map(watch.shardsOf(worker).map((shard) => [shard, watch.placement().get(shard)?.epoch ?? 0]));
  const highest = Math.max(0, ...held.values());
  const stored: string[] = [];
  let tried = 0;
  const stops = [
    watch.onTry(
      (message) =>
        void (message.worker === worker && message.epoch <= highest && held.get(shardOfSession(trouble, message.actor.id)) === message.epoch && (tried += 1)),
    ),
    watch.onJournal(({ actor, message, sequence }) => {
      if (actor.kind !== "session" || message.worker !== worker || held.get(shardOfSession(trouble, actor.id)) !== message.epoch) return;
      stored.push(`${actor.id} at ${sequence} under epoch ${message.epoch}`);
    }),
  ];
  return {
    stored,
    get tried() {
      return tried;
    },
    stop: () => stops.forEach((stop) => stop()),
  };
}

function shardOfSession({ ground }: Trouble, session: string): number {
  const owner = ground.watch.ownerOf(session);
  for (const [shard, entry] of ground.watch.placement()) if (entry === owner) return shard;
  return -1;
}

async function stopLong(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  let tried = 0;
  for (let trial = 1; trial <= trouble.trials; trial++) {
    const { worker, sessions } = await streaming(trouble);
    const watching = watchRecovery(trouble, worker, sessions);
    const zombie_of = watchZombie(trouble, worker);
    const stopped_ms = ground.signal("worker", worker, "SIGSTOP");
    const recovery = watching.blow(stopped_ms);
    await wait(10_000);
    if (ground.watch.stateOf(worker) !== "dead") trouble.fault(`trial ${trial}: ${worker} was still ${ground.watch.stateOf(worker)} after 10 s`);
    const stored_before = zombie_of.stored.length;
    ground.signal("worker", worker, "SIGCONT");
    for (const one of await recovery.over()) trouble.fault(`trial ${trial}: ${one} did not go on after ${worker} stood still`);
    await wait(1_500);
    zombie_of.stop();
    for (const what of zombie_of.stored.slice(stored_before)) trouble.fault(`trial ${trial}: the woken ${worker} appended ${what}`);
    tried += zombie_of.tried;
    trouble.say(`trial ${trial}: ${worker} stood still under ${sessions.size} calls; woken it stored ${zombie_of.stored.length - stored_before}`);
    await recovery.ended();
    if (!(await until(() => ground.watch.stateOf(worker) === "ready", SETTLE_PATIENCE_MS, 50)))
      trouble.fault(`trial ${trial}: the woken ${worker} did not come back`);
    // A name that dies again and again is given nothing: it leaves in good order, and another takes its place.
    ground.startWorker();
    ground.signal("worker", worker, "SIGTERM");
    await ground.ended("worker", worker);
  }
  trouble.note(`${tried} appends of woken workers under an old epoch were seen to be tried`);
}

async function cutConnections(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  const proxies = [await startProxy(ground.brokers.nodes[0]!.url), await startProxy(ground.brokers.nodes[0]!.url)];
  const wires = new Map(proxies.map((proxy) => [ground.startWorker({ nats_url: proxy.url }), proxy]));
  try {
    await until(() => [...wires.keys()].every((id) => ground.watch.stateOf(id) === "ready"), SETTLE_PATIENCE_MS, 50);
    for (const id of ground.workers()) if (!wires.has(id)) ground.signal("worker", id, "SIGTERM");
    for (const id of ground.workers()) if (!wires.has(id)) await ground.ended("worker", id);
    for (let trial = 1; trial <= trouble.trials; trial++) {
      const { worker } = await streaming(trouble);
      const moves = watchMoves(trouble);
      const which = trial % 2 === 1 ? `worker-${worker}` : `worker-${worker}.life`;
      if (wires.get(worker)?.cut((name) => name === which) !== 1) trouble.fault(`trial ${trial}: ${which} was not there to be cut`);
      await wait(2_500);
      moves.stop();
      for (const id of moves.dead) trouble.fault(`trial ${trial}: ${id} was declared dead though it came back at once after ${which} was cut`);
      for (const claim of moves.claims) trouble.fault(`trial ${trial}: after ${which} was cut: ${claim}`);
    }
    // Cut off for long: somebody else's by then, and what it finds when it is back is not its own any more.
    const { worker, sessions } = await streaming(trouble);
    const watching = watchRecovery(trouble, worker, sessions);
    const zombie_of = watchZombie(trouble, worker);
    const cut_ms = now();
    wires.get(worker)?.sever();
    const recovery = watching.blow(cut_ms);
    for (const one of await recovery.over()) trouble.fault(`${one} did not go on after ${worker} was cut off`);
    const stored_before = zombie_of.stored.length;
    wires.get(worker)?.mend();
    await wait(2_000);
    zombie_of.stop();
    for (const what of zombie_of.stored.slice(stored_before)) trouble.fault(`${worker}, back after a cut, appended ${what}`);
    await recovery.ended();
    if (!(await until(() => ground.watch.stateOf(worker) === "ready", SETTLE_PATIENCE_MS, 50))) trouble.fault(`${worker} did not come back after the cut`);
    // The wires end with this scenario: workers without them take over first.
    ground.startWorker();
    ground.startWorker();
    await until(() => ground.workers().every((id) => ground.watch.stateOf(id) === "ready"), SETTLE_PATIENCE_MS, 50);
    for (const id of wires.keys()) ground.signal("worker", id, "SIGTERM");
    for (const id of wires.keys()) await ground.ended("worker", id);
    await settled(trouble);
  } finally {
    for (const proxy of proxies) await proxy.close();
  }
}

async function jumpClock(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  const file = join(ground.home, "clock");
  setClock(file, 0);
  const jumper = ground.startWorker({ clock_file: file });
  await settled(trouble);
  const moves = watchMoves(trouble);
  const jumps = [3_600_000, -3_600_000, 86_400_000, -600_000];
  let stamped = 0;
  const stop = ground.watch.onJournal(({ message }) => {
    if (message.worker === jumper && Math.abs(Date.parse(message.at) - Date.now()) > 60_000) stamped += 1;
  });
  for (let trial = 1; trial <= trouble.trials; trial++) {
    setClock(file, jumps[(trial - 1) % jumps.length]!);
    await wait(2_000);
    setClock(file, 0);
    await wait(1_000);
  }
  stop();
  moves.stop();
  if (stamped === 0) trouble.fault("no entry bears the jumped clock: nothing was tried");
  for (const id of moves.dead) trouble.fault(`${id} was declared dead because a clock jumped`);
  for (const claim of moves.claims) trouble.fault(`because a clock jumped: ${claim}`);
  trouble.note(`${stamped} journal messages bear a time that is more than a minute off`);
  ground.signal("worker", jumper, "SIGTERM");
  await ground.ended("worker", jumper);
  await settled(trouble);
}

async function restartAll(trouble: Trouble): Promise<void> {
  const { ground, load } = trouble;
  const began_ms = now();
  const moves = watchMoves(trouble);
  for (let trial = 1; trial <= trouble.trials; trial++) {
    const old = ground.workers();
    for (const id of old) {
      const fresh = ground.startWorker();
      if (!(await until(() => ground.watch.stateOf(fresh) === "ready", SETTLE_PATIENCE_MS, 20))) trouble.fault(`${fresh} did not become ready`);
      const asked_ms = ground.signal("worker", id, "SIGTERM");
      await ground.ended("worker", id);
      trouble.measured("drain", now() - asked_ms);
      trouble.say(`${id} left after ${Math.round(now() - asked_ms)} ms`);
    }
    await settled(trouble);
  }
  moves.stop();
  for (const id of moves.dead) trouble.fault(`${id} was declared dead in a rolling restart`);
  for (const claim of moves.claims) trouble.fault(`a call was lost in a rolling restart: ${claim}`);
  const times = load.ack_times.filter(({ at_ms }) => at_ms >= began_ms).map(({ ms }) => ms);
  const { p99_ms } = quantiles(times);
  for (const ms of times) trouble.measured("acknowledgement", ms);
  if (p99_ms >= trouble.acknowledged_within_ms) trouble.fault(`other sessions' commands were acknowledged within ${Math.round(p99_ms)} ms at p99`);
}

// ── supervisors and gateways ─────────────────────────────────────────────────────────────────────────────────────────

async function killSupervisors(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  for (let trial = 1; trial <= trouble.trials; trial++) {
    const { worker, sessions } = await streaming(trouble);
    const leader = ground.watch.leader();
    if (leader === undefined) throw new Error("nobody leads");
    // Every second time a worker dies with its judge.
    const both = trial % 2 === 0;
    const moves = watchMoves(trouble);
    const watching = watchRecovery(trouble, worker, sessions);
    const blow_ms = ground.signal("supervisor", leader, "SIGKILL");
    if (both) ground.signal("worker", worker, "SIGKILL");
    const recovery = both ? watching.blow(blow_ms) : undefined;
    if (await until(() => ground.watch.leader() !== undefined && ground.watch.leader() !== leader, RECOVERY_PATIENCE_MS, 5))
      trouble.measured("new leader", now() - blow_ms);
    else trouble.fault(`trial ${trial}: nobody leads after ${leader} was killed`);
    if (recovery !== undefined)
      for (const one of await recovery.over()) trouble.fault(`trial ${trial}: ${one} did not go on after supervisor and worker were killed`);
    ground.start("supervisor", leader);
    if (both) ground.startWorker();
    await wait(2_000);
    moves.stop();
    for (const id of moves.dead) if (!both || id !== worker) trouble.fault(`trial ${trial}: ${id} was declared dead because a supervisor died`);
    await recovery?.ended();
    // The standby must have been calm for a lease before it may judge.
    await wait(CALM_MS);
  }
}

async function killGateways(trouble: Trouble): Promise<void> {
  const { ground, load } = trouble;
  const ids = ground.gateway_urls.map((_, index) => `g${index + 1}`);
  for (let trial = 1; trial <= trouble.trials; trial++) {
    await settled(trouble);
    const id = ids[trial % ids.length]!;
    const waiting = new Set(load.waiting().map(({ session }) => session));
    const connections = new Map(load.ears.map((ear) => [ear.session, ear.connections]));
    const heard = new Set<string>();
    const blow_ms = ground.signal("gateway", id, "SIGKILL");
    const stop = load.onToken(({ session, at_ms }) => {
      if (!waiting.has(session) || heard.has(session)) return;
      heard.add(session);
      const now_connected = load.ears.find((ear) => ear.session === session)?.connections ?? 0;
      // The others hang on the other gateway, and felt nothing.
      if (now_connected > (connections.get(session) ?? 0)) trouble.measured("token", at_ms - blow_ms);
    });
    if (
      !(await until(
        () => [...waiting].every((session) => heard.has(session) || !load.waiting().some((one) => one.session === session)),
        RECOVERY_PATIENCE_MS,
        10,
      ))
    )
      trouble.fault(`trial ${trial}: some streams heard nothing more after ${id} was killed`);
    stop();
    ground.start("gateway", id);
    await until(async () => (await fetch(`${ground.gateway_urls[ids.indexOf(id)]}/readyz`).catch(() => undefined))?.status === 200, SETTLE_PATIENCE_MS, 100);
  }
}

// ── brokers ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** How long it takes after a blow until a session's command is decided, an entry is journaled, and a token is heard. */
function watchProgress(trouble: Trouble, blow_ms: number): { over(): Promise<boolean> } {
  const { ground, load } = trouble;
  const seen = { append: false, token: false, acknowledged: false };
  // What was on its way when the blow came says nothing.
  const from_ms = blow_ms + 20;
  const stops = [
    ground.watch.onJournal(({ actor, at_ms }) => {
      if (seen.append || actor.kind !== "session" || at_ms < from_ms) return;
      seen.append = true;
      trouble.measured("append", at_ms - blow_ms);
    }),
    load.onToken(({ at_ms }) => {
      if (seen.token || at_ms < from_ms) return;
      seen.token = true;
      trouble.measured("token", at_ms - blow_ms);
    }),
  ];
  return {
    async over() {
      const count = load.acknowledged.length;
      const over = await until(
        () => {
          const found = load.acknowledged.slice(count).find(({ at_ms }) => at_ms >= from_ms);
          if (!seen.acknowledged && found !== undefined) {
            seen.acknowledged = true;
            trouble.measured("acknowledged", found.at_ms - blow_ms);
          }
          return seen.append && seen.token && seen.acknowledged;
        },
        RECOVERY_PATIENCE_MS,
        10,
      );
      for (const stop of stops) stop();
      return over;
    },
  };
}

async function killBroker(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  const [node] = ground.brokers.nodes;
  if (node === undefined) throw new Error("a ground has a broker");
  for (let trial = 1; trial <= trouble.trials; trial++) {
    await settled(trouble);
    await wait(trouble.random() * 500);
    const moves = watchMoves(trouble);
    const blow_ms = now();
    await node.kill9();
    await wait(trouble.away_ms);
    await node.start();
    trouble.measured("broker back", now() - blow_ms);
    const progress = watchProgress(trouble, now() - 20);
    if (!(await progress.over())) trouble.fault(`trial ${trial}: nothing went on after the broker was back`);
    // Long enough for every lease that the outage might have ended.
    await wait(CALM_MS + 1_000);
    moves.stop();
    for (const id of moves.dead) trouble.fault(`trial ${trial}: ${id} was declared dead because the broker died`);
    for (const claim of moves.claims) trouble.fault(`trial ${trial}: because the broker died: ${claim}`);
  }
}

async function killStreamLeader(trouble: Trouble): Promise<void> {
  const { ground } = trouble;
  for (let trial = 1; trial <= trouble.trials; trial++) {
    await settled(trouble);
    await wait(trouble.random() * 500);
    const name = await streamLeader(ground, "EVENTS");
    const node = ground.brokers.nodes.find((one) => one.name === name);
    if (node === undefined) throw new Error(`the stream EVENTS is led by ${name}, which is none of ours`);
    const moves = watchMoves(trouble);
    const blow_ms = now();
    await node.kill9();
    if (!(await watchProgress(trouble, blow_ms).over())) trouble.fault(`trial ${trial}: nothing went on after ${name} was killed`);
    await wait(CALM_MS + 1_000);
    await node.start();
    await wait(2_000);
    moves.stop();
    for (const id of moves.dead) trouble.fault(`trial ${trial}: ${id} was declared dead because ${name} died`);
    for (const claim of moves.claims) trouble.fault(`trial ${trial}: because ${name} died: ${claim}`);
    trouble.say(`trial ${trial}: ${name} led EVENTS and was killed; ${moves.dead.length} dead, ${moves.claims.length} claims`);
  }
}

async function streamLeader(ground: Ground, stream: string): Promise<string> {
  const info = await streamInfo(ground, stream);
  const { leader } = info["cluster"] as { leader?: string };
  return leader ?? "";
}

async function streamInfo({ bus }: Ground, stream: string): Promise<JsonObject> {
  for (let tries = 0; tries < 50; tries++) {
    const answer = await bus.request(`$JS.API.STREAM.INFO.${stream}`, new Uint8Array(), { patience_ms: 2_000 });
    const info = answer === undefined || answer.data.byteLength === 0 ? undefined : (JSON.parse(new TextDecoder().decode(answer.data)) as JsonObject);
    if (info !== undefined && info["config"] !== undefined) return info;
    await wait(200);
  }
  throw new Error(`the broker tells nothing of ${stream}`);
}

/** COMMANDS holds no more: every worker stands still for a moment, and services go on publishing. */
async function fillStream(trouble: Trouble): Promise<void> {
  const { ground, load } = trouble;
  const { config } = await streamInfo(ground, "COMMANDS");
  const limit = async (max_bytes: number): Promise<void> => {
    const answer = await ground.bus.request(
      "$JS.API.STREAM.UPDATE.COMMANDS",
      new TextEncoder().encode(JSON.stringify({ ...(config as JsonObject), max_bytes })),
      { patience_ms: 5_000 },
    );
    const text = answer === undefined ? "no answer" : new TextDecoder().decode(answer.data);
    if ((JSON.parse(text) as { error?: unknown }).error !== undefined) throw new Error(`the limit could not be set: ${text}`);
  };
  const before = Number((config as JsonObject)["max_bytes"]);
  const body = (tag: string): JsonObject => ({
    content: JSON.stringify({ tag, tokens: 1, token_ms: 0, first_token_ms: 0, tool: false, fill: "x".repeat(8_000) }),
  });
  for (let trial = 1; trial <= trouble.trials; trial++) {
    await settled(trouble);
    const session = `full-${Math.floor(trouble.random() * 1e9)}`;
    if ((await load.say("client", session, "session.create", { agent: "a" }, `${session}-create`)) !== "acknowledged")
      throw new Error("a session could not be created");
    await limit(128 * 1024);
    for (const id of ground.workers()) ground.signal("worker", id, "SIGSTOP");
    let taken = 0;
    const refused: string[] = [];
    // Well within what a pause may last; 40 of these do not fit.
    for (let count = 0; count < 40; count++) {
      const answer = await load.say("nats", session, "message.send", body(`${session}/${count}`), `${session}-${count}`);
      if (answer === "acknowledged") taken += 1;
      else refused.push(answer);
    }
    const asked = await ground.client.command(
      { tenant: "bench", kind: "session", id: session },
      { type: "message.send", body: body(`${session}/ours`) },
      { patience_ms: 1_000 },
    );
    const code = asked.kind === "refused" ? asked.error.code : "decided";
    for (const id of ground.workers()) ground.signal("worker", id, "SIGCONT");
    if (taken === 0 || refused.length === 0) trouble.fault(`trial ${trial}: ${taken} were taken and ${refused.length} refused: the stream was not filled`);
    if (code !== "overloaded") trouble.fault(`trial ${trial}: a sender of ours heard '${code}', not 'overloaded'`);
    const began_ms = now();
    const again = await until(
      async () => (await load.say("nats", session, "message.send", body(`${session}/again`), `${session}-again`)) === "acknowledged",
      RECOVERY_PATIENCE_MS,
      50,
    );
    if (again) trouble.measured("takes again", now() - began_ms);
    else trouble.fault(`trial ${trial}: it never took commands again`);
    trouble.say(`trial ${trial}: ${taken} taken, ${refused.length} refused (${refused[0]}), ours ${code}`);
    await limit(before);
  }
}

// ── Postgres ─────────────────────────────────────────────────────────────────────────────────────────────────────────

async function losePostgres(trouble: Trouble): Promise<void> {
  const { ground, load } = trouble;
  const { postgres } = ground;
  if (postgres === undefined) throw new Error("this scenario needs Postgres");
  for (let trial = 1; trial <= trouble.trials; trial++) {
    await settled(trouble);
    const moves = watchMoves(trouble);
    await postgres.kill9();
    const blow_ms = now();
    const turns_before = load.turns_ended();
    await wait(trouble.away_ms);
    const times = load.ack_times.filter(({ at_ms }) => at_ms >= blow_ms).map(({ ms }) => ms);
    for (const ms of times) trouble.measured("acknowledgement", ms);
    if (times.length === 0 || load.turns_ended() === turns_before) trouble.fault(`trial ${trial}: nothing went on without Postgres`);
    moves.stop();
    for (const id of moves.dead) trouble.fault(`trial ${trial}: ${id} was declared dead because Postgres died`);
    await postgres.start();
    const back_ms = now();
    const { last_sequence } = await ground.bus.bounds("EVENTS");
    if (await projectedUpTo(ground, last_sequence)) trouble.measured("caught up", now() - back_ms);
    else trouble.fault(`trial ${trial}: the projections did not catch up`);
    trouble.say(`trial ${trial}: Postgres was away for ${trouble.away_ms} ms, ${load.turns_ended() - turns_before} turns ended meanwhile`);
  }
}

async function projectedUpTo({ postgres }: Ground, sequence: number): Promise<boolean> {
  const database = createDatabase({ url: postgres?.url ?? "", application_name: "chaos", log: silentLog });
  const queries = createQueries(database);
  try {
    return await until(
      async () => {
        try {
          return ((await queries.positions()).find(({ name }) => name === PROJECTION_NAME)?.position ?? 0) >= sequence;
        } catch {
          return false; // Postgres is on its way back
        }
      },
      SETTLE_PATIENCE_MS,
      50,
    );
  } finally {
    await database.close();
  }
}

async function withProjections({ ground, load, fault }: Trouble): Promise<AuditReport> {
  const { last_sequence } = await ground.bus.bounds("EVENTS");
  if (!(await projectedUpTo(ground, last_sequence))) fault("the projections did not reach the end of the journals");
  const database = createDatabase({ url: ground.postgres?.url ?? "", application_name: "chaos", log: silentLog });
  try {
    return await auditLoad(ground, load, { audit: createAuditView(createQueries(database)) });
  } finally {
    await database.close();
  }
}

// ── the list ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Two and a half seconds of streaming: long enough to be hit in the middle, short enough for many trials. */
const CALL = { tokens: 25, token_ms: 100, first_token_ms: 20 };

export const SCENARIOS: readonly Scenario[] = [
  {
    name: "kill9_worker",
    what: "the worker that streams most is killed with kill -9",
    ground: {},
    load: { lanes: 50, wish: CALL },
    trials: 20,
    run: killWorkers,
  },
  { name: "sigstop_2s", what: "a worker stands still for 2 s: nobody moves", ground: {}, load: { lanes: 50, wish: CALL }, trials: 5, run: stopBriefly },
  {
    name: "sigstop_10s",
    what: "a worker stands still for 10 s: its work moves, and woken it appends nothing",
    ground: {},
    load: { lanes: 50, wish: CALL },
    trials: 3,
    run: stopLong,
  },
  {
    name: "worker_connection_cut",
    what: "one of a worker's connections is cut and comes back; then both, for long",
    ground: {},
    load: { lanes: 20, wish: CALL },
    trials: 4,
    run: cutConnections,
  },
  {
    name: "kill_supervisor",
    what: "the leading supervisor is killed, every second time with a worker",
    ground: { supervisors: 2 },
    load: { lanes: 20, wish: CALL },
    trials: 2,
    run: killSupervisors,
  },
  {
    name: "kill_gateway",
    what: "a gateway is killed; its clients go on at another",
    ground: { gateways: 2 },
    load: { lanes: 20, wish: CALL },
    trials: 4,
    run: killGateways,
  },
  {
    name: "broker_kill_restart",
    what: "the only broker is killed and started again",
    ground: {},
    load: { lanes: 20, wish: CALL },
    away_ms: 300,
    trials: 3,
    run: killBroker,
  },
  {
    name: "broker_leader_kill",
    what: "of three brokers the one that leads EVENTS is killed, and comes back",
    ground: { brokers: 3 },
    load: { lanes: 20, wish: CALL },
    trials: 3,
    run: killStreamLeader,
  },
  {
    name: "stream_full",
    what: "COMMANDS is full: publishers hear it, and it takes again",
    ground: {},
    load: { lanes: 10, wish: CALL },
    trials: 2,
    run: fillStream,
  },
  {
    name: "clock_jump",
    what: "the wall clock of one worker jumps by hours, forward and back",
    ground: {},
    load: { lanes: 20, wish: CALL },
    trials: 4,
    run: jumpClock,
  },
  {
    name: "rolling_restart",
    what: "every worker is replaced under model calls of 20 s",
    ground: { workers: 3 },
    load: { lanes: 12, wish: { tokens: 200, token_ms: 100, first_token_ms: 20 }, tool_every: 0, quiet: 8 },
    trials: 1,
    run: restartAll,
  },
  {
    name: "postgres_away",
    what: "Postgres is killed and stays away for a minute",
    ground: { postgres: true },
    load: { lanes: 20, wish: CALL },
    away_ms: 60_000,
    trials: 1,
    run: losePostgres,
    projections: true,
  },
];

export function scenarioNamed(name: string): Scenario {
  const found = SCENARIOS.find((scenario) => scenario.name === name);
  if (found === undefined) throw new Error(`there is no scenario '${name}'; there are ${SCENARIOS.map((scenario) => scenario.name).join(", ")}`);
  return found;
}
