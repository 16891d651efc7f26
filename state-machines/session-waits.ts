// session-waits: what a session waits for, in words for people, and for programs. A session that works waits for nothing (A6).
import type { JsonObject } from "../protocol/json.ts";
import { timestamp } from "../protocol/world.ts";
import type { ActorView } from "./definition.ts";
import { noWait, waitsForParents } from "./dependency.ts";
import { waitShown, waitWords } from "./model-wait.ts";
import { type ModelRetry, sessionContextOf } from "./session-context.ts";

function waiting(count: number): string {
  return count === 0 ? "" : `; ${count} message${count === 1 ? " waits" : "s wait"}`;
}

/** Why a call that failed is made again, in words for people. */
const RETRY_REASONS: Readonly<Record<string, string>> = {
  rate_limited: "it answered 429",
  overloaded: "it is overloaded",
  circuit_open: "its circuit breaker is open",
  provider_unavailable: "it cannot be reached",
};

function waitsForProvider(retry: ModelRetry | null | undefined, at_ms: number | undefined): string | undefined {
  if (retry === undefined || retry === null || retry.wait_ms === 0 || (at_ms !== undefined && at_ms >= retry.until_ms)) return undefined;
  const { provider, model, try: number, wait_ms, until_ms, code } = retry;
  const when = at_ms === undefined ? `${wait_ms} ms after ${timestamp(until_ms - wait_ms)}` : `in ${until_ms - at_ms} ms`;
  return `waits for provider ${provider}: try ${number} of ${model} ${when}, because ${RETRY_REASONS[code] ?? "the last one failed"} (${code})`;
}

/** In words for people; undefined while it works. */
export function waits(view: ActorView, at_ms?: number): string | undefined {
  const { reason, queue, turn, turn_state, init, wait, retry, dependency } = sessionContextOf(view);
  const because = reason === null ? "" : ` (${reason})`;
  const halfway = turn_state === "open" ? `; turn ${turn} goes on then` : "";
  switch (view.state) {
    case "idle":
      return "waits for a message";
    case "awaiting_dependency":
      return view.running.length > 0 ? undefined : `${waitsForParents(dependency ?? noWait(0))}${waiting(queue.length - 1)}`;
    case "paused":
      return `paused${because}: waits for session.resume${halfway}${waiting(queue.length)}`;
    case "hibernated":
      return `hibernated${because}: waits for a message or session.resume${halfway}${waiting(queue.length)}`;
    case "unhealthy":
      return `could not begin${because}: waits for session.resume, which tries again${waiting(queue.length)}`;
    case "parked":
      return `parked${because}: waits for an operator's session.unpark${halfway}${waiting(queue.length)}`;
    case "terminated":
      return `ended${because}`;
    case "initializing":
      return init === null || init.failed === null
        ? undefined
        : `step '${init.step}' of its initialisation failed (${init.failed.code}); it is tried again${waiting(queue.length)}`;
    case "thinking":
      return waitWords(wait) ?? waitsForProvider(retry, at_ms);
    default:
      return undefined; // initializing, thinking and acting work: SE6
  }
}

/** The same for programs, where something in particular is waited for. */
export function waitsFor(view: ActorView, at_ms?: number): JsonObject | undefined {
  const { retry, wait, dependency } = sessionContextOf(view);
  if (view.state === "awaiting_dependency" && view.running.length === 0) {
    const waiting_for = dependency ?? noWait(0);
    return { for: "dependency", parents: waiting_for.open.map((parent) => ({ ...parent })), message: waitsForParents(waiting_for) };
  }
  if (view.state !== "thinking") return undefined;
  if (wait !== undefined && wait !== null) return waitShown(wait);
  const message = waitsForProvider(retry, at_ms);
  if (message === undefined || retry === undefined || retry === null) return undefined;
  const { provider, until_ms, wait_ms, code } = retry;
  return { for: "provider", provider, code, since: timestamp(until_ms - wait_ms), until: timestamp(until_ms), message };
}
