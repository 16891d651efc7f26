// metrics: every instrument of Troupe, declared in one table, behind a facade small enough that the library under it can be changed
// in this file alone.
//
// Invariants:
//   T1. An instrument is declared here or does not exist; its labels are the declared ones, checked by the compiler.
//   T2. No label has a tenant, an actor, a key or a text in it: what is without bound goes into logs and traces.
//   T3. Values have their unit in the name: `_seconds`, `_usd_micros`; a count of things that only rises ends in `_total`.
import { collectDefaultMetrics, Counter, Gauge, Histogram, Registry } from "prom-client";
import { unreachable } from "../protocol/assert.ts";

/** What a step on fsynced storage can take: 0.3 ms alone on a good disk, seconds while the broker elects. */
const APPEND_SECONDS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5];
/** What a person or a provider takes. */
const CALL_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300];
/** From a kill seen at once (4 ms) to a lease that had to expire. */
const RECOVERY_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30];
const DELAY_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5, 30, 300];
/** One append folds at most 64 entries, one group commit at most a thousand appends. */
const BATCH_SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000];

interface Declared {
  readonly type: "counter" | "gauge" | "histogram";
  readonly help: string;
  readonly labels: readonly string[];
  readonly buckets?: readonly number[];
}

export const INSTRUMENTS = {
  troupe_commands_decided_total: {
    type: "counter",
    help: "Commands decided, by outcome: ok, repeat, or the code of the refusal.",
    labels: ["kind", "outcome"],
  },
  troupe_appends_total: { type: "counter", help: "Appends to journals, by outcome: committed, superseded, unavailable.", labels: ["outcome"] },
  troupe_append_seconds: { type: "histogram", help: "From an append's call to its answer.", labels: [], buckets: APPEND_SECONDS },
  troupe_append_batch_size: {
    type: "histogram",
    help: "Appends that travelled in one group commit; 1 where one went alone.",
    labels: [],
    buckets: BATCH_SIZES,
  },
  troupe_entries_total: { type: "counter", help: "Journal entries written, by their tag.", labels: ["kind", "entry"] },
  troupe_effects_started_total: { type: "counter", help: "Attempts of effects begun.", labels: ["effect"] },
  troupe_effects_finished_total: { type: "counter", help: "Attempts of effects ended, by outcome: done, fail, stopped.", labels: ["effect", "outcome"] },
  troupe_effect_seconds: { type: "histogram", help: "From an attempt's begin to its end.", labels: ["effect"], buckets: CALL_SECONDS },
  troupe_effects_running: { type: "gauge", help: "Attempts of effects going on in this process.", labels: ["effect"] },
  troupe_model_tokens_total: {
    type: "counter",
    help: "Tokens of model calls, by class: input, output, cache_read, cache_write, reasoning.",
    labels: ["provider", "model", "class"],
  },
  troupe_model_attempts_total: {
    type: "counter",
    help: "Calls made of models, by outcome: the stop reason, or the code of the failure.",
    labels: ["provider", "model", "outcome"],
  },
  troupe_model_skipped_total: {
    type: "counter",
    help: "Models of a chain that were passed over without a call, by the reason.",
    labels: ["provider", "reason"],
  },
  troupe_breaker_state: { type: "gauge", help: "A provider's circuit breaker: 0 closed, 1 half-open, 2 open.", labels: ["provider", "owner"] },
  troupe_rates_undecided_total: {
    type: "counter",
    help: "Calls that went on though their rate could not be decided (TROUPE_RATES_UNDECIDED).",
    labels: ["provider"],
  },
  troupe_breaker_changes_total: { type: "counter", help: "Changes of a provider's circuit breaker, by the state it came to.", labels: ["provider", "to"] },
  troupe_model_cost_usd_micros_total: { type: "counter", help: "Cost of model calls whose price is known, in micro-dollars.", labels: ["provider", "model"] },
  troupe_model_first_token_seconds: {
    type: "histogram",
    help: "From a model call's begin to its first token.",
    labels: ["provider", "model"],
    buckets: CALL_SECONDS,
  },
  troupe_actors_resident: { type: "gauge", help: "Actors in this process's memory.", labels: ["kind"] },
  troupe_shards_owned: { type: "gauge", help: "Shards this process owns.", labels: [] },
  troupe_workers: {
    type: "gauge",
    help: "Workers by state (joining, ready, draining, suspected, dead, left), as the leading supervisor sees them; 0 at one that stands by. The dead are counted until their shards have other owners.",
    labels: ["state"],
  },
  troupe_shard_changes_total: {
    type: "counter",
    help: "Decisions of the leading supervisor about shards, by what (assigned: to a new owner; moving: the owner is asked to hand it over) and why.",
    labels: ["what", "reason"],
  },
  troupe_leading: { type: "gauge", help: "1 while this supervisor leads.", labels: [] },
  troupe_recoveries_total: { type: "counter", help: "Actors that were taken over with something owed.", labels: ["reason"] },
  troupe_recovery_detect_seconds: { type: "histogram", help: "From a worker's last sign of life to the verdict.", labels: [], buckets: RECOVERY_SECONDS },
  troupe_recovery_assign_seconds: { type: "histogram", help: "From the verdict to the new owner's shard.", labels: [], buckets: RECOVERY_SECONDS },
  troupe_recovery_replay_seconds: { type: "histogram", help: "From the shard's arrival to the actor's restored state.", labels: [], buckets: RECOVERY_SECONDS },
  troupe_recovery_first_token_seconds: {
    type: "histogram",
    help: "From the verdict to the first token of the resumed call.",
    labels: [],
    buckets: RECOVERY_SECONDS,
  },
  troupe_wait_ms_total: {
    type: "counter",
    help:
      "Milliseconds waited, by what for: dispatch (a command, until its tenant's turn), mailbox (a command, until it is taken out to be decided), slot " +
      "(a call, until its tenant may run one more), pool (a call, until this worker may make one more), provider (an actor, for a model), tool (an actor, for " +
      "a tool), placement (a shard, for an owner), recovery (an actor with work in flight, from its shard's arrival until it goes on).",
    labels: ["reason"],
  },
  troupe_waiting: { type: "gauge", help: "Commands that wait for their turn in this process, and calls of models for a slot or a place.", labels: ["what"] },
  troupe_calls_running: { type: "gauge", help: "Calls of models that this process makes right now, of TROUPE_MODEL_CALLS_MAX.", labels: [] },
  troupe_calls_ended_total: {
    type: "counter",
    help: "Calls that this process made of models and tools, by how they ended: done, failed, timed_out (call_timeout_ms was over), cancelled.",
    labels: ["what", "how"],
  },
  troupe_tenants_refused: {
    type: "gauge",
    help: "Tenants of which so much waits that more is refused as overloaded, by what waits: commands and calls in this process, and at gateways what lies in the stream of commands (stored).",
    labels: ["what"],
  },
  troupe_gateway_requests_total: { type: "counter", help: "HTTP requests answered, by route pattern and status.", labels: ["method", "route", "status"] },
  troupe_gateway_request_seconds: {
    type: "histogram",
    help: "From a request's arrival to the end of its answer; streams up to their head.",
    labels: ["route"],
    buckets: CALL_SECONDS,
  },
  troupe_gateway_subscribers: { type: "gauge", help: "Open streams to clients.", labels: ["transport"] },
  troupe_gateway_gaps_repaired_total: { type: "counter", help: "Gaps in a live feed that were read again from the stream.", labels: ["channel"] },
  troupe_nats_logins_total: {
    type: "counter",
    help: "Clients that asked to come onto the bus, by outcome: admitted, unauthenticated, forbidden, unavailable, full.",
    labels: ["outcome"],
  },
  troupe_nats_connections_ended_total: {
    type: "counter",
    help: "Connections to the bus that were ended because their credential counted no more.",
    labels: [],
  },
  troupe_projection_messages_total: { type: "counter", help: "Journal messages projected.", labels: [] },
  troupe_projection_rows_total: { type: "counter", help: "Rows written by the projector.", labels: ["table"] },
  troupe_projection_batch_size: { type: "histogram", help: "Journal messages in one transaction.", labels: [], buckets: BATCH_SIZES },
  troupe_projection_delay_seconds: { type: "histogram", help: "From a message's storing to the commit of its rows.", labels: [], buckets: DELAY_SECONDS },
  troupe_projection_lag_messages: { type: "gauge", help: "Messages in EVENTS that are not projected yet.", labels: [] },
  troupe_projection_stopped: { type: "gauge", help: "1 when the projector met a message it cannot project and stopped.", labels: [] },
  troupe_bus_connected: { type: "gauge", help: "1 while the connection to the broker stands.", labels: [] },
} as const satisfies Record<string, Declared>;

export type InstrumentName = keyof typeof INSTRUMENTS;
type OfType<T extends Declared["type"]> = { [N in InstrumentName]: (typeof INSTRUMENTS)[N]["type"] extends T ? N : never }[InstrumentName];
export type CounterName = OfType<"counter">;
export type GaugeName = OfType<"gauge">;
export type HistogramName = OfType<"histogram">;
export type LabelsOf<N extends InstrumentName> = { readonly [L in (typeof INSTRUMENTS)[N]["labels"][number]]: string };

export type Role = "worker" | "supervisor" | "gateway" | "projector" | "all";

export interface Metrics {
  add<N extends CounterName>(name: N, labels: LabelsOf<N>, by?: number): void;
  set<N extends GaugeName>(name: N, labels: LabelsOf<N>, value: number): void;
  observe<N extends HistogramName>(name: N, labels: LabelsOf<N>, value: number): void;
  /** What /metrics answers, and its content type. */
  text(): Promise<string>;
  readonly content_type: string;
}

/** For tests and tools that nobody measures. */
export const silentMetrics: Metrics = { add() {}, set() {}, observe() {}, text: () => Promise.resolve(""), content_type: "text/plain" };

/** A process's instruments. `role` is on every line, since one machine may run several processes. */
export function createMetrics(role: Role): Metrics {
  const registry = new Registry();
  registry.setDefaultLabels({ role });
  collectDefaultMetrics({ register: registry });
  const counters = new Map<string, Counter>();
  const gauges = new Map<string, Gauge>();
  const histograms = new Map<string, Histogram>();
  for (const [name, { type, help, labels, ...rest }] of Object.entries(INSTRUMENTS) as [InstrumentName, Declared][]) {
    const common = { name, help, labelNames: [...labels], registers: [registry] };
    if (type === "counter") counters.set(name, new Counter(common));
    else if (type === "gauge") gauges.set(name, new Gauge(common));
    else if (type === "histogram") histograms.set(name, new Histogram({ ...common, ...(rest.buckets === undefined ? {} : { buckets: [...rest.buckets] }) }));
    else unreachable(type, "an instrument's type");
  }
  return {
    add: (name, labels, by = 1) => counters.get(name)?.inc(labels, by),
    set: (name, labels, value) => gauges.get(name)?.set(labels, value),
    observe: (name, labels, value) => histograms.get(name)?.observe(labels, value),
    text: () => registry.metrics(),
    content_type: registry.contentType,
  };
}
