// model-error: what a provider's failure means to us. SDKs tell failures apart by class, status, `type` and `code`, none of which is always
// there; the adapters gather what there is into FailureFacts, and this file alone decides.
//
// Order of trust: the provider's own `code` and `type` (an error inside a 200 stream has no status), then the status, then the phase.
// Two providers say "the prompt is too long" and "this content is refused" in nothing but a sentence, so for a refused request (400, 413, 422)
// the sentence is looked at as well. It can only move an error between codes that are not transient.
import { ERROR_TEXT_CHARACTERS_MAX, MODEL_ERRORS, type ModelError, type ModelErrorCode } from "./provider.ts";

export interface FailureFacts {
  readonly status?: number | undefined;
  readonly type?: string | undefined;
  readonly code?: string | undefined;
  readonly message: string;
  readonly headers?: Headers | undefined;
  /** How long to stay away, where the body says it. */
  readonly retry_after_ms?: number;
  /** For lack of everything else: the transport failed before the answer began, or after. */
  readonly transport?: "unreachable" | "broken" | "timeout" | undefined;
}

/** No provider's limit lasts longer than its daily one; a header that says more is a mistake. */
const RETRY_AFTER_MS_MAX = 24 * 60 * 60 * 1000;

const BY_NAME: Readonly<Record<string, ModelErrorCode>> = {
  overloaded_error: "overloaded",
  rate_limit_error: "rate_limited",
  rate_limit_exceeded: "rate_limited",
  api_error: "provider_unavailable",
  server_error: "provider_unavailable",
  timeout_error: "timeout",
  authentication_error: "provider_auth",
  permission_error: "provider_auth",
  billing_error: "provider_auth",
  invalid_api_key: "provider_auth",
  // OpenAI sends it with 429, but no waiting helps an account without credit.
  insufficient_quota: "provider_auth",
  not_found_error: "model_unknown",
  model_not_found: "model_unknown",
  context_length_exceeded: "context_overflow",
  request_too_large: "context_overflow",
  content_filter: "content_policy",
  content_policy_violation: "content_policy",
  // OpenAI's word for a prompt that was flagged.
  invalid_prompt: "content_policy",
  // Google's names. INVALID_ARGUMENT is not among them: it may be anything that comes with 400.
  RESOURCE_EXHAUSTED: "rate_limited",
  UNAVAILABLE: "overloaded",
  INTERNAL: "provider_unavailable",
  DEADLINE_EXCEEDED: "timeout",
  UNAUTHENTICATED: "provider_auth",
  PERMISSION_DENIED: "provider_auth",
  API_KEY_INVALID: "provider_auth",
  NOT_FOUND: "model_unknown",
};

/** The code of FailureFacts; undefined when nothing is recognised. */
function codeOf(facts: FailureFacts): ModelErrorCode | undefined {
  for (const name of [facts.code, facts.type]) {
    if (name !== undefined && Object.hasOwn(BY_NAME, name)) return BY_NAME[name];
  }
  // Proxies such as OpenRouter put the status of the provider behind them into `code`, also inside a 200 stream.
  const status = facts.status ?? (facts.code !== undefined && /^[45]\d\d$/.test(facts.code) ? Number(facts.code) : undefined);
  if (status !== undefined) return codeOfStatus(status, facts.message);
  if (facts.type === "invalid_request_error") return codeOfRefusedRequest(facts.message);
  switch (facts.transport) {
    case "unreachable":
      return "provider_unavailable";
    case "broken":
      return "stream_broken";
    case "timeout":
      return "timeout";
    default:
      return undefined;
  }
}

function codeOfStatus(status: number, message: string): ModelErrorCode | undefined {
  if (status === 400 || status === 422) return codeOfRefusedRequest(message);
  if (status === 401 || status === 402 || status === 403) return "provider_auth";
  if (status === 404) return "model_unknown";
  if (status === 408 || status === 504) return "timeout";
  if (status === 413) return "context_overflow";
  if (status === 429) return "rate_limited";
  if (status === 503 || status === 529) return "overloaded";
  // 409 is a lock on the provider's side; both SDKs would have retried it.
  if (status === 409 || status >= 500) return "provider_unavailable";
  return undefined;
}

function codeOfRefusedRequest(message: string): ModelErrorCode {
  if (/prompt is too long|context (length|window|limit)|maximum context|too many (input )?tokens|exceeds the maximum number of tokens/i.test(message))
    return "context_overflow";
  if (/content (filter|management|policy)|safety system/i.test(message)) return "content_policy";
  if (/credit balance/i.test(message)) return "provider_auth";
  return "invalid_request";
}

/** An error in our words. `secrets` never appear in it (P4). */
export function modelError(code: ModelErrorCode, message: string, secrets: readonly string[] = [], retry_after_ms?: number): ModelError {
  const text = redacted(message, secrets);
  return { code, message: text, transient: MODEL_ERRORS[code].transient, ...(retry_after_ms === undefined ? {} : { retry_after_ms }) };
}

/** FailureFacts as an error; `provider_error` when nothing is recognised. */
export function modelErrorOf(facts: FailureFacts, secrets: readonly string[], now_ms: number): ModelError {
  const code = codeOf(facts) ?? "provider_error";
  const said_ms = facts.retry_after_ms === undefined ? retryAfterMs(facts.headers, now_ms) : Math.min(facts.retry_after_ms, RETRY_AFTER_MS_MAX);
  const retry_after_ms = MODEL_ERRORS[code].transient ? said_ms : undefined;
  return modelError(code, facts.message, secrets, retry_after_ms);
}

/** Without the given secrets and without anything that has the shape of a key, and no longer than ERROR_TEXT_CHARACTERS_MAX. */
function redacted(text: string, secrets: readonly string[]): string {
  // A megabyte of a proxy's HTML is cut before the patterns run; twice the length, so that what is cut later was still looked at whole.
  let clean = text.slice(0, 2 * ERROR_TEXT_CHARACTERS_MAX);
  for (const secret of secrets) if (secret !== "") clean = clean.replaceAll(secret, "[key]");
  // Providers quote a mistyped key back, partly starred out.
  clean = clean.replace(/\b(?:sk|pk|rk|xai|gsk|key)-[\w*.-]{4,}|\bAIza[\w-]{8,}|\bBearer\s+\S+/gi, "[key]");
  // A secret that the first cut went through would survive the replacement; its beginning does not.
  for (const secret of secrets) clean = withoutBeginningAtEnd(clean, secret);
  return clean.length <= ERROR_TEXT_CHARACTERS_MAX ? clean : `${clean.slice(0, ERROR_TEXT_CHARACTERS_MAX - 1)}…`;
}

function withoutBeginningAtEnd(text: string, secret: string): string {
  for (let length = Math.min(secret.length - 1, text.length); length >= 4; length--) {
    if (text.endsWith(secret.slice(0, length))) return `${text.slice(0, -length)}[key]`;
  }
  return text;
}

/**
 * How long the provider asks us to stay away: `retry-after-ms`, else `retry-after` (seconds or a date), else the latest reset among
 * Anthropic's limits that are used up (it does not always send `retry-after`). Undefined when it says nothing.
 */
function retryAfterMs(headers: Headers | undefined, now_ms: number): number | undefined {
  if (headers === undefined) return undefined;
  const bounded = (ms: number) => (Number.isFinite(ms) ? Math.min(Math.max(Math.ceil(ms), 0), RETRY_AFTER_MS_MAX) : undefined);

  const milliseconds = headers.get("retry-after-ms");
  if (milliseconds !== null && milliseconds.trim() !== "") return bounded(Number(milliseconds));
  const after = headers.get("retry-after");
  if (after !== null && after.trim() !== "") return bounded(/^[\d.]+$/.test(after.trim()) ? Number(after) * 1000 : Date.parse(after) - now_ms);

  let latest: number | undefined;
  for (const limit of ["requests", "tokens", "input-tokens", "output-tokens"]) {
    if (headers.get(`anthropic-ratelimit-${limit}-remaining`) !== "0") continue;
    const reset_ms = Date.parse(headers.get(`anthropic-ratelimit-${limit}-reset`) ?? "");
    if (Number.isFinite(reset_ms)) latest = Math.max(latest ?? reset_ms, reset_ms);
  }
  return latest === undefined ? undefined : bounded(latest - now_ms);
}
