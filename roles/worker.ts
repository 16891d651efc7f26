// worker: the process that hosts actors: shard host, membership, effects.
//
//   start ──▶ joined ──▶ owns shards ──SIGTERM──▶ draining: hands each shard over at its first gap ──▶ exit 0
import { createAdmission } from "../actors/admission.ts";
import { type CallPoolReport, createCallPool } from "../actors/call-pool.ts";
import { createDispatch, type DispatchReport } from "../actors/dispatch.ts";
import { createUndecidedRates } from "../actors/undecided-rates.ts";
import { createSessionPlaces } from "../actors/session-places.ts";
import { createSlotCaller } from "../actors/slot-caller.ts";
import { createBudgetStanding } from "../actors/budget-standing.ts";
import { createCommandClient } from "../actors/client.ts";
import { createModelMoney } from "../actors/model-money.ts";
import { createBreakerBoard } from "../actors/breaker-board.ts";
import type { CellObserver } from "../actors/cell.ts";
import { createDirectory } from "../actors/directory.ts";
import { assumedCost } from "../actors/effects/assumed-cost.ts";
import type { ModelAttempt } from "../actors/model-attempt.ts";
import type { EffectScope, Performers } from "../actors/performer.ts";
import { createPerformers } from "../actors/performers.ts";
import { watchPermissions } from "../actors/permission.ts";
import { createRestorer } from "../actors/restore.ts";
import { createShardHost, type ShardHost } from "../actors/shard-host.ts";
import { createTenantModels, type TenantModels } from "../actors/tenant-models.ts";
import { createTimedCalls, type TimedCalls } from "../actors/timed-calls.ts";
import { createTurnFinder } from "../actors/turn-finder.ts";
import { assert } from "../protocol/assert.ts";
import { actorPath } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { HANDOVER_DEADLINE_MS, LEASE_RENEW_MS, REFUSE_PERCENT_DISTRIBUTED } from "../protocol/limits.ts";
import { createProviders, PLATFORM_OWNER } from "../providers/registry.ts";
import { cores, definitions, type HostedKind } from "../state-machines/kinds.ts";
import { lint } from "../state-machines/lint.ts";
import { connectionOf } from "../supervisors/connections.ts";
import { startHostService } from "../supervisors/host-service.ts";
import { Member } from "../supervisors/member.ts";
import { createResumedTeller } from "../supervisors/resumed.ts";
import { startStatusServer } from "../telemetry/http.ts";
import { withAttribution } from "../telemetry/log.ts";
import type { Metrics } from "../telemetry/metrics.ts";
import { noTracing, type Tracing } from "../telemetry/tracing.ts";
import { adoptPriceTable } from "./price-table.ts";
import { openMasterKeys } from "./master-keys.ts";
import { connect, lifeline, observeBus, type Runtime } from "./runtime.ts";
import { providerCredentials } from "./settings.ts";
import { createPost } from "./webhook-post.ts";

/** A quick end (Ctrl-C on everything) does not wait for model calls: they are resumed at the next start. */
const QUICK_DEADLINE_MS = 500;

/** Bodies that create one of each kind, for the lint of what a machine makes of them. */
const CREATION_SAMPLES: Readonly<Record<HostedKind, JsonObject>> = {
  budget: {},
  session: { agent: "a" },
  tenant: {},
  webhook: { url: "https://example.com/" },
  worker: { incarnation: "i", versions: [] },
};

export interface WorkerRoleOptions {
  readonly id: string;
  readonly http_port: number;
}

/** What an actor waits for while an effect works. */
const WAITS_FOR: Readonly<Record<string, string>> = { call_model: "provider", call_tool: "tool" };

function observerOf(metrics: Metrics, first_token: NonNullable<CellObserver["first_token"]>): CellObserver {
  return {
    first_token,
    waited: (ms) => metrics.add("troupe_wait_ms_total", { reason: "mailbox" }, ms),
    committed(entries, ms) {
      metrics.add("troupe_appends_total", { outcome: "committed" });
      metrics.observe("troupe_append_seconds", {}, ms / 1000);
      metrics.add("troupe_entries_total", { kind: "all", entry: "all" }, entries);
    },
    decided: (outcome, _type) => metrics.add("troupe_commands_decided_total", { kind: "all", outcome: outcome.ok ? "ok" : outcome.error.code }),
    effect(what, src) {
      if (what === "started") metrics.add("troupe_effects_started_total", { effect: src });
      else metrics.add("troupe_effects_finished_total", { effect: src, outcome: what === "done" ? "done" : what === "failed" ? "fail" : "stopped" });
    },
  };
}

/** How much waits in this process, and how many tenants are refused more. */
function observeWaiting(metrics: Metrics, calls: CallPoolReport, commands: DispatchReport): void {
  metrics.set("troupe_waiting", { what: "calls" }, calls.waiting);
  metrics.set("troupe_waiting", { what: "commands" }, commands.waiting);
  metrics.set("troupe_calls_running", {}, calls.running);
  metrics.set("troupe_tenants_refused", { what: "calls" }, calls.refusing);
  metrics.set("troupe_tenants_refused", { what: "commands" }, commands.refusing);
}

function splitModel(model: string): { provider: string; model: string } {
  const slash = model.indexOf("/");
  return { provider: model.slice(0, Math.max(slash, 0)), model: model.slice(slash + 1) };
}

function attemptsInto(metrics: Metrics): (attempt: ModelAttempt) => void {
  return ({ model: name, outcome, stop, code, usage, cost_usd_micros, first_token_ms }) => {
    const labels = splitModel(name);
    metrics.add("troupe_model_attempts_total", { ...labels, outcome: stop ?? code ?? outcome });
    for (const kind of ["input", "output", "cache_read", "cache_write", "reasoning"] as const)
      metrics.add("troupe_model_tokens_total", { ...labels, class: kind }, usage?.[`${kind}_tokens`] ?? 0);
    metrics.add("troupe_model_cost_usd_micros_total", labels, cost_usd_micros ?? 0);
    if (first_token_ms !== null) metrics.observe("troupe_model_first_token_seconds", labels, first_token_ms / 1000);
  };
}

/** How long each effect kept its actor waiting, however it ended. */
function timed({ world, metrics }: Runtime, performers: Performers): Performers {
  const running = new Map<string, number>();
  const count = (effect: string, by: number): void => {
    running.set(effect, (running.get(effect) ?? 0) + by);
    metrics.set("troupe_effects_running", { effect }, running.get(effect) ?? 0);
  };
  return Object.fromEntries(
    Object.entries(performers).map(([src, perform]) => [
      src,
      async (input: never, scope: EffectScope) => {
        const began_ms = world.monotonic_ms();
        const reason = WAITS_FOR[src];
        count(src, 1);
        try {
          return await perform(input, scope);
        } finally {
          count(src, -1);
          metrics.observe("troupe_effect_seconds", { effect: src }, (world.monotonic_ms() - began_ms) / 1000);
          if (reason !== undefined) metrics.add("troupe_wait_ms_total", { reason }, world.monotonic_ms() - began_ms);
        }
      },
    ]),
  );
}

/** Whose agent an effect works for: named in what it was given, or in the frozen configuration that it points at. */
async function agentOf(input: { readonly agent?: unknown; readonly config_seq?: unknown }, scope: EffectScope): Promise<string | undefined> {
  if (typeof input.agent === "string") return input.agent;
  if (typeof input.config_seq !== "number" || input.config_seq === 0) return undefined;
  const entry = (await scope.entries([input.config_seq])).get(input.config_seq);
  const agent = entry?.t === "done" ? (entry.output as JsonObject)["agent"] : undefined;
  return typeof agent === "string" ? agent : undefined;
}

/** Each effect within a span of its own, a child of the command's trace that began it; what is logged meanwhile says for whom. */
function traced(tracing: Tracing, performers: Performers): Performers {
  return Object.fromEntries(
    Object.entries(performers).map(([src, perform]) => [
      src,
      (input: never, scope: EffectScope) => {
        const { tenant, kind, id } = scope.actor;
        const whose = { tenant, ...(kind === "session" ? { session: id } : {}) };
        const attributes = { ...whose, "troupe.actor": actorPath(scope.actor), "troupe.inst": scope.inst, "troupe.attempt": scope.attempt };
        return withAttribution(whose, () =>
          tracing.withSpan(src, { attributes, trace: scope.trace }, async (span) => {
            const named = tracing === noTracing ? undefined : agentOf(input, scope).catch(() => undefined);
            try {
              return await perform(input, scope);
            } finally {
              const agent = await named;
              if (agent !== undefined) span.set("agent", agent);
            }
          }),
        );
      },
    ]),
  );
}

export async function runWorker(runtime: Runtime, { id, http_port }: WorkerRoleOptions): Promise<number> {
  const { world, settings, metrics } = runtime;
  const log = runtime.log.with({ worker: id });
  for (const definition of Object.values(definitions)) {
    const faults = lint(definition, CREATION_SAMPLES[definition.kind as HostedKind]);
    assert(faults.length === 0, `machines are data and complete: ${faults.join("; ")}`);
  }
  const name = connectionOf("worker", id);
  await adoptPriceTable(settings.TROUPE_HOME, log);
  const [bus, life] = await Promise.all([connect(runtime, name), lifeline(runtime, name)]);
  observeBus(bus, metrics);
  const restorer = createRestorer({ bus, cores, log });
  // The directory tells what it hears; what was made of a tenant's keys is made of the directory.
  const made: { models?: TenantModels } = {};
  const directory = createDirectory({ bus, restorer, world, log, on_change: (tenant) => made.models?.forget(tenant) });
  const permissions = watchPermissions({ directory, world });
  const standing = createBudgetStanding({ bus, restorer, world, log });
  const commands = createCommandClient({ bus, world });
  const providers = createProviders({ world, log, ...providerCredentials(settings) });
  const models = createTenantModels({ providers, directory, master_keys: openMasterKeys(settings, log), world, log });
  made.models = models;
  const waited = (reason: string, ms: number): void => metrics.add("troupe_wait_ms_total", { reason }, ms);
  const refuse_percent = settings.TROUPE_REFUSE_FROM_PERCENT ?? REFUSE_PERCENT_DISTRIBUTED;
  const pool = createCallPool({
    world,
    calls_max: settings.TROUPE_MODEL_CALLS_MAX,
    tenant_waiting_max: settings.TROUPE_TENANT_CALLS_WAITING_MAX,
    refuse_percent,
    on_waited: waited,
  });
  const turns = createTurnFinder({ bus, restorer });
  const timedCalls = (what: string): TimedCalls => createTimedCalls({ world, on_end: (how) => metrics.add("troupe_calls_ended_total", { what, how }) });
  const ended = { models: timedCalls("model"), tools: timedCalls("tool") };
  const dispatch = createDispatch({
    world,
    tenant_waiting_max: settings.TROUPE_TENANT_COMMANDS_WAITING_MAX,
    refuse_percent,
    on_begin: (ms) => waited("dispatch", ms),
  });
  const slots = createSlotCaller(bus);
  const places = createSessionPlaces({ client: commands, standing, restorer, world, log });
  const breakers = createBreakerBoard({
    world,
    log,
    worker: id,
    bus,
    on_change({ provider, owner, state }) {
      // Of tenants' own keys there may be thousands; `troupe models breakers` lists those that are not closed.
      if (owner === PLATFORM_OWNER) metrics.set("troupe_breaker_state", { provider, owner }, { closed: 0, half_open: 1, open: 2 }[state]);
      metrics.add("troupe_breaker_changes_total", { provider, to: state });
    },
  });
  await breakers.start();
  const undecided = createUndecidedRates({
    mode: settings.TROUPE_RATES_UNDECIDED,
    models,
    standing,
    log,
    on_went_on: (provider) => metrics.add("troupe_rates_undecided_total", { provider }),
  });
  const nonce = world.id();
  let commits = 0;
  const teller = createResumedTeller({ bus, world, worker: id });
  // Host and member need each other: the host asks the member whether it may act, the member tells the host what it owns.
  const late: { member?: Member } = {};
  const host: ShardHost = createShardHost({
    bus,
    world,
    log,
    cores,
    restorer,
    performers: timed(
      runtime,
      traced(
        runtime.tracing,
        createPerformers({
          world,
          directory,
          providers,
          models,
          breakers,
          ...(settings.TROUPE_WEBHOOK_KEY === undefined
            ? {}
            : {
                webhooks: {
                  key: settings.TROUPE_WEBHOOK_KEY,
                  post: createPost({ private_addresses: settings.TROUPE_PRIVATE_ADDRESSES === "allow" }),
                },
              }),
          money: createModelMoney({ client: commands, world, providers, slots, pool, undecided }),
          pool,
          turns,
          counts_sessions: (tenant) => standing.counts_sessions(tenant),
          model_calls: ended.models,
          tool_calls: ended.tools,
          on_attempt: attemptsInto(metrics),
          on_skipped: ({ model, code }) => metrics.add("troupe_model_skipped_total", { provider: splitModel(model).provider, reason: code }),
        }),
      ),
    ),
    worker: id,
    next_commit_id: () => `${nonce}.${commits++}`,
    may_act: () => late.member?.may_act() ?? false,
    on_conflict: (shard, epoch) => late.member?.on_conflict(shard, epoch) ?? Promise.resolve("lost"),
    admit: createAdmission({ directory, providers, standing, pool, turns, places }),
    dispatch,
    on_resumed(resumed) {
      teller.resumed(resumed);
      metrics.add("troupe_wait_ms_total", { reason: "recovery" }, resumed.replay_ms);
      metrics.add("troupe_recoveries_total", { reason: resumed.reason });
      metrics.observe("troupe_recovery_replay_seconds", {}, resumed.replay_ms / 1000);
      log.info("actor goes on here", {
        actor: actorPath(resumed.actor),
        from: resumed.from,
        reason: resumed.reason,
        entries: resumed.entries,
        replay_ms: Math.round(resumed.replay_ms),
      });
    },
    assume_cost: assumedCost,
    observer: observerOf(metrics, (actor) => teller.firstToken(actor)),
    passivate_after_ms: settings.TROUPE_PASSIVATE_AFTER_MS,
  });
  const versions = Object.values(cores).map((core) => core.machine_name);
  const me = new Member({ bus, world, log, id, versions, host, ttl_ms: settings.TROUPE_LEASE_TTL_MS });
  late.member = me;
  await me.start();
  const service = startHostService({ bus, world, log, worker: id, host, draining: () => me.draining, may_act: () => me.may_act(), pool, dispatch, ended });

  let ending = false;
  const beat = (): void => {
    void world.after(LEASE_RENEW_MS / 4, () => {
      if (ending) return;
      const owned = host.owned();
      metrics.set("troupe_shards_owned", {}, owned.length);
      metrics.set(
        "troupe_actors_resident",
        { kind: "all" },
        owned.reduce((sum, shard) => sum + shard.resident, 0),
      );
      observeWaiting(metrics, pool.report(), dispatch.report());
      void me.tick().finally(beat);
    });
  };
  beat();
  const http = await startStatusServer({
    port: http_port,
    metrics,
    log,
    ready: async () => ({
      bus: { ok: bus.state === "connected" },
      lease: { ok: me.phase === "present", detail: me.phase },
      permissions: await permissions.status(),
    }),
  });
  log.info("worker runs", { http: http.url, providers: [...providers.configured] });

  const how = await runtime.asked_to_end;
  log.info("worker drains", { how });
  await me.drain({ deadline_ms: how === "drain" ? HANDOVER_DEADLINE_MS : QUICK_DEADLINE_MS });
  ending = true;
  teller.stop();
  await me.stop();
  await host.stop();
  await service.stop();
  await Promise.all([slots.stop(), breakers.stop(), standing.stop(), commands.stop()]);
  await directory.stop();
  models.stop();
  await http.stop();
  await Promise.all([bus.close(), life.close()]);
  log.info("worker ended");
  return 0;
}
