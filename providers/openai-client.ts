// openai-client: what both of OpenAI's dialects share: the SDK's client, what its errors say, and how usage nests.
import type OpenAiSdk from "openai";
import { asObject, type Json, type JsonObject } from "../protocol/json.ts";
import type { Patience } from "./attempt.ts";
import type { FailureFacts } from "./model-error.ts";
import type { Usage } from "./provider.ts";
import { factsOfTransport, sdkPatience, withRequestId } from "./transport.ts";

type Sdk = typeof import("openai");

export const OPENAI_BASE_URL = "https://api.openai.com/v1";

/** The client, made when it is first asked for. Loading the SDK takes 150 ms; a process that never calls it does not pay. */
export function clientLoader(api_key: string, base_url: string, patience: Patience): () => Promise<{ sdk: Sdk; client: OpenAiSdk }> {
  let loading: Promise<{ sdk: Sdk; client: OpenAiSdk }> | undefined;
  return () => (loading ??= import("openai").then((sdk) => ({ sdk, client: clientOf(sdk, api_key, base_url, patience) })));
}

function clientOf(sdk: Sdk, api_key: string, base_url: string, patience: Patience): OpenAiSdk {
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

/** P7: cached tokens are nested in the input's count and reasoning in the output's, under the names that the dialect has for the two. */
export function usageOf(usage: JsonObject, { input: input_name, output: output_name }: { readonly input: string; readonly output: string }): Usage {
  const count = (value: Json | undefined) => (typeof value === "number" && value > 0 ? value : 0);
  const input = count(usage[input_name]);
  const output = count(usage[output_name]);
  const input_details = asObject(usage[`${input_name}_details`]);
  const cache_read = Math.min(count(input_details?.["cached_tokens"]), input);
  const cache_write = Math.min(count(input_details?.["cache_write_tokens"]), input - cache_read);
  const reasoning = Math.min(count(asObject(usage[`${output_name}_details`])?.["reasoning_tokens"]), output);
  return {
    input_tokens: input - cache_read - cache_write,
    output_tokens: output - reasoning,
    cache_read_tokens: cache_read,
    cache_write_tokens: cache_write,
    reasoning_tokens: reasoning,
  };
}
