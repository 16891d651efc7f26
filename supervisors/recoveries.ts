// recoveries: how long it took from a worker's death until its actors went on: to notice, to decide, to replay, and to the first token. Told in the
// journal of the worker where each actor goes on.
//
//   a worker is dead ──detect_ms──▶ its shard has another owner ──assign_ms──▶ an actor with work in flight goes on there (resumed.ts) ──▶ actor.resumed
//
// It is a history and decides nothing: news that comes too much at once is thinned.
import { errorFields, type Log } from "../protocol/log.ts";
import type { Assigned } from "./assignments.ts";
import { decodeResumed } from "./resumed.ts";
import type { Term } from "./term.ts";
import type { WorkerJournals } from "./worker-journals.ts";

/** News of resumed actors waiting for their append. A worker's death is some hundred of them; above it the history is thinned, not the work. */
const RESUMING_MAX = 1_000;

/** An actor with work in flight goes on; the times follow one another, and `first_token_ms` is absent when none came soon. */
export interface ResumedTimes {
  readonly detect_ms: number;
  readonly assign_ms: number;
  readonly replay_ms: number;
  readonly first_token_ms?: number;
}

export interface RecoveriesOptions {
  readonly log: Log;
  readonly term: Term;
  readonly journals: WorkerJournals;
  on_resumed(times: ResumedTimes): void;
}

export class Recoveries {
  readonly #options: RecoveriesOptions;
  /** For how long each dead worker had been silent when it was declared dead. */
  readonly #detected_ms = new Map<string, number>();
  /** How each shard came to its present owner after a death. */
  readonly #shards = new Map<number, { readonly epoch: number; readonly detect_ms: number; readonly assign_ms: number }>();
  /** News on its way into a journal. */
  #resuming = 0;

  constructor(options: RecoveriesOptions) {
    this.#options = options;
  }

  died(worker: string, silent_ms: number): void {
    this.#detected_ms.set(worker, silent_ms);
  }

  assigned({ shard, epoch, from, reason, assign_ms }: Assigned): void {
    const detect_ms = reason === "owner_gone" && from !== null ? this.#detected_ms.get(from) : undefined;
    this.#shards.set(shard, { epoch, detect_ms: detect_ms ?? 0, assign_ms: Math.round(assign_ms) });
  }

  /** A worker's news of one actor. */
  hear(data: Uint8Array): void {
    const { log, term, journals, on_resumed } = this.#options;
    const news = decodeResumed(data);
    if (news === undefined || term.over || journals.record(news.worker) === undefined) {
      log.debug("news of a resumed actor is set aside", { worker: news?.worker });
      return;
    }
    if (this.#resuming >= RESUMING_MAX) {
      log.warn("too many actors resume at once for all to be told", { worker: news.worker, actor: news.actor });
      return;
    }
    const recovery = this.#shards.get(news.shard);
    const { detect_ms, assign_ms } = recovery?.epoch === news.epoch ? recovery : { detect_ms: 0, assign_ms: 0 };
    const { actor, entries, replay_ms, first_token_ms } = news;
    this.#resuming += 1;
    if (recovery?.epoch === news.epoch) on_resumed({ detect_ms, assign_ms, replay_ms, ...(first_token_ms === undefined ? {} : { first_token_ms }) });
    journals
      .say(news.worker, "actor.resumed", {
        actor,
        entries,
        detect_ms,
        assign_ms,
        replay_ms: Math.round(replay_ms),
        ...(first_token_ms === undefined ? {} : { first_token_ms: Math.round(first_token_ms) }),
      })
      .catch((error: unknown) => log.warn("a resumed actor could not be told", { actor, ...errorFields(error) }))
      .finally(() => {
        this.#resuming -= 1;
      });
  }
}
