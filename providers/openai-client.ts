// openai-client: what both of OpenAI's dialects share: the SDK's client, and what its errors say.
import type OpenAiSdk from "openai";
import type { Patience } from "./attempt.ts";
import type { FailureFacts } from "./model-error.ts";
import { factsOfTransport, sdkPatience, withRequestId } from "./transport.ts";

export type Sdk = typeof import("openai");

export const OPENAI_BASE_URL = "https://api.openai.com/v1";

export function clientOf(sdk: Sdk, api_key: string, base_url: string, patience: Patience): OpenAiSdk {
  return new sdk.default({
    apiKey: api_key,
    // Given as null, so that the SDK does not look for them in the environment.
    adminAPIKey: null,
    organization: null,
    project: null,
    webhookSecret: null,
    baseURL: base_url,
    maxRetries: 0, // P5
    timeout: sdkPatience(patience),
    // A redirect would carry the key to wherever it points.
    fetchOptions: { redirect: "error" },
    logLevel: "off",
  });
}

export function factsOf(sdk: Sdk, error: unknown, has_head: boolean): FailureFacts {
  if (error instanceof sdk.APIError && (error.status !== undefined || error.error !== undefined)) {
    const text = (value: unknown) => (typeof value === "string" || typeof value === "number" ? String(value) : undefined);
    const message = withRequestId(error.message, error.requestID);
    return { status: error.status, type: text(error.type), code: text(error.code), message, headers: error.headers };
  }
  const timed_out = error instanceof sdk.APIConnectionTimeoutError;
  return factsOfTransport(error, { timed_out, is_transport: error instanceof sdk.OpenAIError, has_head });
}
