// resumed: the news that an actor with work in flight goes on at another worker, as workers tell it to the leader, which adds
// how long it took to notice and to decide, and writes it into the worker's journal.
//
// A core message: news that is lost is missing from a history, and harms nothing else.
import { z } from "zod";
import type { Bus } from "../bus/port.ts";
import { type ActorAddress, actorPath, ID_PATTERN } from "../protocol/ids.ts";
import { RESUMED_SUBJECT } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";

const resumedNews = z.object({
  worker: z.string().regex(ID_PATTERN),
  /** `tenant/kind/id` */
  actor: z.string().max(256),
  shard: z.int().min(0),
  epoch: z.int().min(0),
  entries: z.int().min(0),
  /** From the shard's arrival to the actor's claim. */
  replay_ms: z.number().min(0),
  /** From the claim to the first token of the resumed call. */
  first_token_ms: z.number().min(0).optional(),
});
export type ResumedNews = Readonly<z.infer<typeof resumedNews>>;

/** How long the news of an actor waits for the first token. A model that is slower than this is told of without. */
const FIRST_TOKEN_PATIENCE_MS = 10_000;
/** Actors whose first token is waited for; above it they are told of at once. */
const WAITING_MAX = 1_000;

export interface ResumedTeller {
  resumed(resumed: { actor: ActorAddress; shard: number; epoch: number; entries: number; replay_ms: number }): void;
  /** A model call of this actor said its first word. */
  firstToken(actor: ActorAddress): void;
  /** Tells what still waits. */
  stop(): void;
}

/** Tells each resumed actor once: with the time to its first token, when that comes soon enough. */
export function createResumedTeller({ bus, world, worker }: { bus: Bus; world: World; worker: string }): ResumedTeller {
  const waiting = new Map<string, { tell: (first_token_ms?: number) => void; readonly since_ms: number }>();
  return {
    resumed({ actor, shard, epoch, entries, replay_ms }) {
      const path = actorPath(actor);
      waiting.get(path)?.tell();
      const tell = (first_token_ms?: number): void => {
        cancel();
        if (waiting.get(path)?.tell === tell) waiting.delete(path);
        tellResumed(bus, { worker, actor: path, shard, epoch, entries, replay_ms, ...(first_token_ms === undefined ? {} : { first_token_ms }) });
      };
      const cancel = world.after(FIRST_TOKEN_PATIENCE_MS, () => tell());
      if (waiting.size >= WAITING_MAX) tell();
      else waiting.set(path, { tell, since_ms: world.monotonic_ms() });
    },
    firstToken(actor) {
      const one = waiting.get(actorPath(actor));
      one?.tell(world.monotonic_ms() - one.since_ms);
    },
    stop() {
      for (const { tell } of [...waiting.values()]) tell();
    },
  };
}

/** Tells whoever leads, if anybody does. */
export function tellResumed(bus: Bus, news: ResumedNews): void {
  bus.send(RESUMED_SUBJECT, new TextEncoder().encode(JSON.stringify(news)));
}

export function decodeResumed(data: Uint8Array): ResumedNews | undefined {
  try {
    return resumedNews.safeParse(JSON.parse(new TextDecoder().decode(data))).data;
  } catch {
    return undefined; // not JSON: no news, and the listener says so in its log
  }
}
