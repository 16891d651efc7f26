// gateway-client: the gateway as a person at a terminal uses it: HTTP and server-sent events, with one tenant's key.
import type { CliPorts } from "./ports.ts";
import type { ErrorBody, ErrorCode } from "../protocol/errors.ts";
import { errorBody, isErrorCode, TroupeError } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";
import { Unreachable } from "./context.ts";
import { serverEvents, type ServerEvent } from "./sse.ts";

export interface GatewayClient {
  /** Throws TroupeError for what the gateway refuses and Unreachable when there is none. */
  call(method: "GET" | "POST", path: string, body?: JsonObject): Promise<JsonObject>;
  /** Ends when the gateway ends it. `signal` ends it at once. */
  stream(
    request: { method: "GET" | "POST"; path: string; body?: JsonObject; last_event_id?: string | undefined; idempotency_key?: string },
    signal: AbortSignal,
  ): AsyncGenerator<ServerEvent>;
}

/** problem+json as our own error; anything else that is no success as what it most likely means. */
async function problemOf(response: Response): Promise<ErrorBody> {
  const text = await response.text();
  try {
    const problem = JSON.parse(text) as { code?: unknown; detail?: unknown; title?: unknown; errors?: unknown };
    const code: ErrorCode = isErrorCode(problem.code) ? problem.code : "internal";
    const details = Array.isArray(problem.errors) ? { errors: problem.errors } : undefined;
    return errorBody(code, String(problem.detail ?? problem.title ?? `HTTP ${response.status}`), details);
  } catch {
    return errorBody(response.status >= 500 ? "unavailable" : "internal", `the gateway answered ${response.status}: ${text.slice(0, 200)}`);
  }
}

export function createGatewayClient(fetch: CliPorts["fetch"], url: string, key: string): GatewayClient {
  async function request(path: string, init: RequestInit): Promise<Response> {
    let response: Response;
    try {
      response = await fetch(new URL(path, url).href, init);
    } catch (error) {
      if (init.signal?.aborted) throw error;
      const cause = error instanceof Error && error.cause !== undefined ? error.cause : error;
      throw new Unreachable(`the gateway at ${url}`, cause);
    }
    if (!response.ok) throw new TroupeError(await problemOf(response));
    return response;
  }
  const headers = (extra: Record<string, string>, body: JsonObject | undefined): Record<string, string> => ({
    authorization: `Bearer ${key}`,
    ...(body === undefined ? {} : { "content-type": "application/json" }),
    ...extra,
  });
  const bodyOf = (body: JsonObject | undefined): { body?: string } => (body === undefined ? {} : { body: JSON.stringify(body) });

  return {
    async call(method, path, body) {
      const response = await request(path, { method, headers: headers({ accept: "application/json" }, body), ...bodyOf(body) });
      const text = await response.text();
      return text === "" ? {} : (JSON.parse(text) as JsonObject);
    },
    async *stream({ method, path, body, last_event_id, idempotency_key }, signal) {
      const extra = {
        accept: "text/event-stream",
        ...(last_event_id === undefined ? {} : { "last-event-id": last_event_id }),
        ...(idempotency_key === undefined ? {} : { "idempotency-key": idempotency_key }),
      };
      const response = await request(path, { method, headers: headers(extra, body), ...bodyOf(body), signal });
      if (response.body !== null) yield* serverEvents(response.body as unknown as AsyncIterable<Uint8Array>);
    },
  };
}
