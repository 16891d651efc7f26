// errors: every error that leaves the process, declared once. docs/errors.md has a row for each; a test holds them equal.
import type { JsonObject } from "./json.ts";

/** code → HTTP status, title, and whether a repeat of the same command is decided anew. */
export const ERRORS = {
  unauthenticated: { status: 401, title: "The credential is missing or not valid", transient: false },
  budget_exceeded: { status: 402, title: "The budget does not cover this", transient: false },
  autonomy_exceeded: { status: 403, title: "The agent may do no more by itself", transient: false },
  forbidden: { status: 403, title: "The credential does not allow this", transient: false },
  not_found: { status: 404, title: "There is no such thing here", transient: false },
  conflict: { status: 409, title: "It exists with different content", transient: false },
  illegal_transition: { status: 409, title: "The actor's state does not allow this", transient: false },
  busy: { status: 409, title: "A turn is running", transient: true },
  too_large: { status: 413, title: "The message is too large", transient: false },
  invalid: { status: 422, title: "The content is not valid", transient: false },
  agent_unknown: { status: 422, title: "There is no such agent", transient: false },
  dependency_unknown: { status: 422, title: "There is no such message to come after", transient: false },
  dependency_cycle: { status: 422, title: "A message cannot come after itself or a later one", transient: false },
  runtime_unsupported: { status: 422, title: "There is no such runtime", transient: false },
  model_unknown: { status: 422, title: "There is no such model", transient: false },
  price_unknown: { status: 422, title: "The model has no known price", transient: false },
  rate_limited: { status: 429, title: "Too many requests", transient: true },
  sessions_exceeded: { status: 429, title: "The tenant has as many sessions as it may have", transient: true },
  overloaded: { status: 503, title: "Too much is waiting", transient: true },
  unavailable: { status: 503, title: "It cannot be taken now", transient: true },
  internal: { status: 500, title: "Something broke on our side", transient: true },
} as const satisfies Record<string, { status: number; title: string; transient: boolean }>;

export type ErrorCode = keyof typeof ERRORS;

/** What a reply or a problem+json body says of an error. `message` is for people; callers branch on `code`. */
export interface ErrorBody {
  readonly code: ErrorCode;
  readonly message: string;
  readonly details?: JsonObject;
}

export function errorBody(code: ErrorCode, message: string, details?: JsonObject): ErrorBody {
  return details === undefined ? { code, message } : { code, message, details };
}

export function isErrorCode(text: unknown): text is ErrorCode {
  return typeof text === "string" && Object.hasOwn(ERRORS, text);
}

/** Thrown at an edge (gateway, CLI) to end a request with a stable code. Inside, refusals are values. */
export class TroupeError extends Error {
  override readonly name = "TroupeError";
  readonly body: ErrorBody;
  constructor(body: ErrorBody, options?: { cause?: unknown }) {
    super(`${body.code}: ${body.message}`, options);
    this.body = body;
  }
}
