// ensure: makes a broker's streams agree with the declaration. Creates what is missing, updates what differs, and refuses by
// name what a running stream cannot become.
//
// Invariants:
//   E1. It may run in many processes at once and at every start: it ends in the same streams.
//   E2. It never deletes a stream or a message, and never changes the number of shards.
import { type ApiAnswer, type ApiError, type Link, toNanos } from "./jetstream-link.ts";
import { allDeclarations, type Declarations, type StreamDeclaration } from "./streams.ts";

/** One setting that is not as declared. */
export interface Difference {
  readonly stream: string;
  readonly what: string;
  readonly have: string;
  readonly want: string;
}

export type EnsureOutcome =
  | { readonly kind: "ready"; readonly created: readonly string[]; readonly updated: readonly string[] }
  /** What stands in the broker cannot become what is declared. Nothing was changed for these streams. */
  | { readonly kind: "refused"; readonly differences: readonly Difference[] }
  | { readonly kind: "unavailable"; readonly reason: string };

type WireConfig = Readonly<Record<string, unknown>>;
export interface WireStreamInfo {
  readonly config: WireConfig;
  readonly created: string;
  readonly state: {
    readonly messages: number;
    readonly bytes: number;
    readonly first_seq: number;
    readonly last_seq: number;
    readonly subjects?: Readonly<Record<string, number>>;
  };
  readonly cluster?: { readonly leader?: string; readonly replicas?: readonly { readonly name: string; readonly current: boolean }[] };
}

const NOT_FOUND = 10059;
const NAME_IN_USE = 10058;
/** Creating a stream in a cluster that is still forming takes an election. */
const ENSURE_PATIENCE_MS = 15_000;
/** Two processes that start together may each meet the other's half: look again, a bounded number of times. */
const ROUNDS_MAX = 5;

/** Settings that a stream keeps from its creation on, and why. */
const FIXED: Readonly<Record<string, string>> = {
  storage: "a stream's storage is fixed when it is created",
  retention: "a stream's retention is fixed when it is created",
};

/** A declaration in the broker's words. */
export function wireConfig(declared: StreamDeclaration): WireConfig {
  return {
    name: declared.name,
    description: declared.purpose,
    subjects: [...declared.subjects],
    retention: declared.kept === "always" ? "limits" : "workqueue",
    storage: declared.storage,
    num_replicas: declared.replicas,
    discard: declared.when_full === "refuse_new" ? "new" : "old",
    max_msgs: -1,
    max_bytes: declared.bytes_max ?? -1,
    max_msg_size: declared.message_bytes_max ?? -1,
    max_msgs_per_subject: declared.messages_per_subject_max ?? -1,
    max_age: toNanos(declared.age_max_ms ?? 0),
    max_consumers: declared.consumers_max,
    duplicate_window: toNanos(declared.duplicate_window_ms),
    ...(declared.transform === undefined ? {} : { subject_transform: { src: declared.transform.from, dest: declared.transform.to } }),
    ...(declared.republish === undefined ? {} : { republish: { src: declared.republish.from, dest: declared.republish.to } }),
    allow_atomic: declared.atomic_batches,
    allow_msg_schedules: declared.schedules,
    allow_direct: declared.direct_reads,
    // The broker needs rollups to take a schedule back and to mark an expired key; elsewhere they stay off (S1).
    allow_rollup_hdrs: declared.schedules || declared.expiry_marker_ms !== undefined,
    allow_msg_ttl: declared.expiry_marker_ms !== undefined,
    ...(declared.expiry_marker_ms === undefined ? {} : { subject_delete_marker_ttl: toNanos(declared.expiry_marker_ms) }),
    deny_delete: false,
    deny_purge: false,
    sealed: false,
  };
}

/** Every declared setting that a broker's stream has otherwise. Absent and "off" are the same. */
export function differencesOf(declared: StreamDeclaration, have: WireConfig): Difference[] {
  const want = wireConfig(declared);
  const optional = ["subject_transform", "republish", "subject_delete_marker_ttl"];
  return [...new Set([...Object.keys(want), ...optional])]
    .filter((what) => inWords(have[what]) !== inWords(want[what]))
    .map((what) => ({ stream: declared.name, what, have: inWords(have[what]), want: inWords(want[what]) }));
}

function inWords(value: unknown): string {
  if (value === undefined || value === false || value === 0 || value === "" || value === null) return "off";
  if (Array.isArray(value)) return JSON.stringify([...value].sort());
  return typeof value === "object" ? JSON.stringify(Object.entries(value).sort()) : String(value);
}

/** Makes the broker's streams agree with the declaration. Safe to repeat, and to run from several processes at once. */
export async function ensureStreams(link: Link, declarations: Declarations): Promise<EnsureOutcome> {
  const created: string[] = [];
  const updated: string[] = [];
  const refused: Difference[] = [];
  for (const declared of allDeclarations(declarations)) {
    const outcome = await ensureStream(link, declared, declarations.parameters.shards);
    if (outcome.kind === "unavailable") return outcome;
    if (outcome.kind === "created") created.push(declared.name);
    if (outcome.kind === "updated") updated.push(declared.name);
    if (outcome.kind === "refused") refused.push(...outcome.differences);
  }
  return refused.length > 0 ? { kind: "refused", differences: refused } : { kind: "ready", created, updated };
}

type StreamOutcome =
  | { readonly kind: "same" | "created" | "updated" }
  | { readonly kind: "refused"; readonly differences: readonly Difference[] }
  | { readonly kind: "unavailable"; readonly reason: string };

export async function ensureStream(link: Link, declared: StreamDeclaration, shards: number): Promise<StreamOutcome> {
  for (let round = 1; ; round += 1) {
    const info = await link.api<WireStreamInfo>(`STREAM.INFO.${declared.name}`, undefined, ENSURE_PATIENCE_MS);
    if (info.kind === "unavailable") return info;
    if (info.kind === "error") {
      if (info.error.err_code !== NOT_FOUND) return refusedBy(declared, info.error);
      const creation = await link.api(`STREAM.CREATE.${declared.name}`, wireConfig(declared), ENSURE_PATIENCE_MS);
      if (creation.kind === "ok") return { kind: "created" };
      if (isWorthAnotherLook(creation) && round < ROUNDS_MAX) continue;
      return creation.kind === "error" ? refusedBy(declared, creation.error) : creation;
    }
    const differences = differencesOf(declared, info.value.config);
    if (differences.length === 0) return { kind: "same" };
    const impossible = differences.filter((difference) => difference.what in FIXED || changesShards(difference));
    if (impossible.length > 0) return { kind: "refused", differences: impossible.map((difference) => explain(difference, shards)) };
    const update = await link.api(
      `STREAM.UPDATE.${declared.name}`,
      { ...info.value.config, ...withAbsent(info.value.config, wireConfig(declared)) },
      ENSURE_PATIENCE_MS,
    );
    if (update.kind === "ok") return { kind: "updated" };
    if (update.kind === "unavailable") return update;
    if (round >= ROUNDS_MAX || update.error.code < 500) return refusedBy(declared, update.error, differences);
  }
}

/** Somebody else created it meanwhile, or the answer is unknown: what stands there now decides. */
function isWorthAnotherLook(creation: ApiAnswer<unknown>): boolean {
  return creation.kind === "unavailable" || (creation.kind === "error" && (creation.error.err_code === NAME_IN_USE || creation.error.code >= 500));
}

/** An update states the whole configuration, so what is declared absent is said to be absent. */
function withAbsent(have: WireConfig, want: WireConfig): WireConfig {
  const absent = ["subject_transform", "republish", "subject_delete_marker_ttl"].filter((what) => what in have && !(what in want));
  return { ...want, ...Object.fromEntries(absent.map((what) => [what, undefined])) };
}

function refusedBy(declared: StreamDeclaration, error: ApiError, differences: readonly Difference[] = []): StreamOutcome {
  const have = differences.map((difference) => `${difference.what}=${difference.have}`).join(" ");
  const want = differences.map((difference) => `${difference.what}=${difference.want}`).join(" ");
  return { kind: "refused", differences: [{ stream: declared.name, what: `the broker: ${error.description} (${error.err_code})`, have, want }] };
}

const shardsIn = (text: string): string | undefined => /partition\((\d+),/.exec(text)?.[1];
function changesShards(difference: Difference): boolean {
  return difference.what === "subject_transform" && shardsIn(difference.have) !== undefined && shardsIn(difference.have) !== shardsIn(difference.want);
}

function explain(difference: Difference, shards: number): Difference {
  if (!changesShards(difference)) return { ...difference, what: `${difference.what} (${FIXED[difference.what]})` };
  return { ...difference, what: "shards (fixed with the first start of a deployment)", have: shardsIn(difference.have) ?? "?", want: String(shards) };
}
