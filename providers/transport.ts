// transport: what the adapters over an SDK share: their settings, and what the connection under the SDK does to a call.
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { type AttemptContext, type Patience, PATIENCE_DEFAULT } from "./attempt.ts";
import type { FailureFacts } from "./model-error.ts";

export interface SdkProviderSettings {
  readonly api_key: string;
  /** The provider's own when absent. */
  readonly base_url?: string;
  readonly world: World;
  readonly log: Log;
  readonly patience?: Patience;
}

/** What every attempt of a provider has around it. */
export function contextOf(provider: string, { api_key, world, log, patience = PATIENCE_DEFAULT }: SdkProviderSettings): AttemptContext {
  return { provider, world, log, patience, secrets: [api_key] };
}

/** The SDK's own time-out must never be the one that ends a call: ours knows what was delivered until then. */
export function sdkPatience(patience: Patience): number {
  return patience.first_event_ms + 60_000;
}

export function withRequestId(message: string, request_id: string | null | undefined): string {
  return request_id === null || request_id === undefined ? message : `${message} (request ${request_id})`;
}

/**
 * Facts of an error that is not an answer of the provider. Once the head of a response has come, whatever goes wrong broke the answer: the SDKs
 * throw a TypeError or a bare base class with the word "terminated" for a connection that was cut, and a SyntaxError for an event that was cut.
 * Before it, only what the SDK itself made (`is_transport`) says that there is no connection; of anything else nothing is claimed.
 */
export function factsOfTransport(error: unknown, seen: { timed_out: boolean; is_transport: boolean; has_head: boolean }): FailureFacts {
  const cause = deepestCause(error);
  const message = messageOf(error, cause);
  const code = (cause as { code?: unknown } | undefined)?.code;
  if (seen.timed_out || (typeof code === "string" && /^UND_ERR_(HEADERS|BODY|CONNECT)_TIMEOUT$/.test(code))) return { message, transport: "timeout" };
  if (seen.has_head) return { message, transport: "broken" };
  return seen.is_transport ? { message, transport: "unreachable" } : { message };
}

/** An AggregateError (one refused connection per address) speaks through its first error. */
function deepestCause(error: unknown): unknown {
  let cause = error;
  for (let depth = 0; depth < 5; depth++) {
    const next: unknown = cause instanceof AggregateError ? cause.errors[0] : cause instanceof Error ? cause.cause : undefined;
    if (next === undefined) break;
    cause = next;
  }
  return cause;
}

function messageOf(error: unknown, cause: unknown): string {
  const own = error instanceof Error ? error.message : String(error);
  return cause instanceof Error && cause !== error && cause.message !== "" ? `${own} (${cause.message})` : own;
}
