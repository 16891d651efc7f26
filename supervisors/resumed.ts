// resumed: the news that an actor with work in flight goes on at another worker, as workers tell it to the leader, which adds
// how long it took to notice and to decide, and writes it into the worker's journal.
//
// A core message: news that is lost is missing from a history, and harms nothing else.
import { z } from "zod";
import type { Bus } from "../bus/port.ts";
import { ID_PATTERN } from "../protocol/ids.ts";
import { RESUMED_SUBJECT } from "../protocol/subjects.ts";

const resumedNews = z.object({
  worker: z.string().regex(ID_PATTERN),
  /** `tenant/kind/id` */
  actor: z.string().max(256),
  shard: z.int().min(0),
  epoch: z.int().min(0),
  entries: z.int().min(0),
  replay_ms: z.number().min(0),
  first_token_ms: z.number().min(0).optional(),
});
export type ResumedNews = Readonly<z.infer<typeof resumedNews>>;

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
