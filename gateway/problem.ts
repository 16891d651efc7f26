// problem: how a refusal leaves over HTTP: RFC 9457, `application/problem+json`.
//
// `type` is `urn:troupe:error:{code}`: a name that means the same in every deployment; docs/errors.md says what to do about each.
// One code has one status, that of protocol/errors.ts. Two statuses are HTTP's own words about a request that named no content
// to refuse, and stand beside the nearest code: 405 (`not_found`) and 415 (`invalid`).
import { type ErrorBody, ERRORS } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";

export interface Problem {
  readonly type: string;
  readonly title: string;
  readonly status: number;
  readonly code: string;
  readonly detail: string;
  readonly details?: JsonObject;
}

export const PROBLEM_MEDIA_TYPE = "application/problem+json";

export function problemOf(error: ErrorBody, status: number = ERRORS[error.code].status): Problem {
  const { code, message, details } = error;
  return { type: `urn:troupe:error:${code}`, title: ERRORS[code].title, status, code, detail: message, ...(details === undefined ? {} : { details }) };
}

/** Seconds for `retry-after` on what may end: as long as the refusal says, at least one. */
export function retryAfterSeconds(error: ErrorBody): number | undefined {
  const { status } = ERRORS[error.code];
  if (status !== 429 && status !== 503) return undefined;
  const ms = error.details?.["retry_after_ms"];
  return Math.max(1, Math.ceil((typeof ms === "number" && Number.isFinite(ms) ? ms : 1000) / 1000));
}
