// google: Gemini over the official SDK, Gemini API (v1beta), streaming. Keeps the promises of provider.ts; what is Google's own:
//
// - The key travels in the header `x-goog-api-key`, never in a URL: URLs end up in logs.
// - The SDK can retry, run tools by itself, and continue an answer with requests of its own. All three are off (P5).
// - The SDK's errors are a status and the body's JSON as a message; headers are lost. So the request goes out through a fetch of ours that remembers
//   the answer's status and headers. How long to stay away stands in the body (`RetryInfo.retryDelay`), or in `retry-after`.
// - Function calls come whole, with arguments as an object, and mostly without an id; a missing id is made from the request's idempotency key.
// - `thoughtSignature` may sit on any part and must come back on the same part, or Gemini 3 refuses the request. It is kept in `continuation` as the
//   list of parts, where text and calls stand as references ({text_chars}, {tool_call}). It is only ever sent to the model that made it.
//   A first call of a step that another model made has none: Gemini 3 then takes the documented word SIGNATURE_OF_ANOTHER.
// - Usage comes with every chunk, cumulative. `promptTokenCount` includes cached tokens; `candidatesTokenCount` does not include thoughts.
// - A prompt that is blocked is an answer without candidates (`promptFeedback.blockReason`): it is `content_policy`.
// - An answer is complete when its finish reason has come. MALFORMED_FUNCTION_CALL and its like mean that the model's answer broke off.
import type { Content, GenerateContentParameters, GenerateContentResponse, GoogleGenAI, Part } from "@google/genai";
import { asObject, hashOf, type Json, type JsonObject } from "../protocol/json.ts";
import { type Attempt, runAttempt } from "./attempt.ts";
import { estimateCallHeadTokens } from "./estimate.ts";
import { type FailureFacts, modelError } from "./model-error.ts";
import type { ChatMessage, ModelOutcome, ModelRequest, Provider, StopReason, ToolCall, Usage } from "./provider.ts";
import { streamAnswer } from "./stream-answer.ts";
import { toolCall, withOwnIds } from "./tool-args.ts";
import { wellFormed } from "./transcript.ts";
import { contextOf, factsOfTransport, type SdkProviderSettings } from "./transport.ts";

type Sdk = typeof import("@google/genai");

const GOOGLE_BASE_URL = "https://generativelanguage.googleapis.com";
/** What proxies and recordings of others know; the SDK itself has moved on to v1, which lacks what is in beta. */
const API_VERSION = "v1beta";
/** The model becomes part of the URL's path. */
const MODEL_PATTERN = /^(tunedModels\/)?[A-Za-z0-9][A-Za-z0-9._-]*$/;
/** Instead of a signature, where a call was made by another model: see ai.google.dev/gemini-api/docs/thought-signatures. */
const SIGNATURE_OF_ANOTHER = "skip_thought_signature_validator";

export function googleProvider(settings: SdkProviderSettings): Provider {
  const context = contextOf("google", settings);
  // Loading the SDK takes a tenth of a second; a process that never calls Gemini does not pay.
  let loading: Promise<{ sdk: Sdk; client: GoogleGenAI }> | undefined;
  const load = () => {
    loading ??= import("@google/genai").then((sdk) => ({ sdk, client: clientOf(sdk, settings) }));
    return loading;
  };
  return {
    name: "google",
    call: (request, io) =>
      runAttempt(context, request, io, async (attempt) => {
        if (!MODEL_PATTERN.test(request.model))
          return attempt.failed(modelError("model_unknown", `a Gemini model is not named ${JSON.stringify(request.model)}`));
        const { sdk, client } = await load();
        const head: Head = { status: undefined, headers: undefined, unreachable: false };
        return streamAnswer(context, attempt, {
          answer: new Answer(attempt, request),
          open: () => client.models.generateContentStream(bodyOf(request, attempt.signal, head)),
          facts_of: (error, has_head) => factsOf(sdk, error, head, has_head),
        });
      }),
  };
}

function clientOf(sdk: Sdk, settings: SdkProviderSettings): GoogleGenAI {
  return new sdk.GoogleGenAI({
    apiKey: settings.api_key,
    // Said outright, so that the SDK does not look for it in the environment.
    vertexai: false,
    apiVersion: API_VERSION,
    // No `timeout`: it would go out as a header that limits the server. No `retryOptions`: without them there is one request (P5).
    httpOptions: { baseUrl: settings.base_url ?? GOOGLE_BASE_URL, apiVersion: API_VERSION },
  });
}

/** What the connection saw of the answer, which the SDK does not hand on. */
interface Head {
  status: number | undefined;
  headers: Headers | undefined;
  unreachable: boolean;
}

function fetchInto(head: Head): typeof fetch {
  return async (input, init) => {
    try {
      // A redirect would carry the key to wherever it points.
      const response = await fetch(input, { ...init, redirect: "error" });
      head.status = response.status;
      head.headers = response.headers;
      return response;
    } catch (error) {
      head.unreachable = true;
      throw error;
    }
  };
}

function factsOf(sdk: Sdk, error: unknown, head: Head, has_head: boolean): FailureFacts {
  if (error instanceof sdk.ApiError) {
    const body = errorBodyOf(error.message);
    const text = (value: unknown) => (typeof value === "string" && value !== "" ? value : undefined);
    const details = Array.isArray(body?.["details"]) ? (body["details"] as readonly Json[]).map(asObject) : [];
    const reason = details.map((detail) => text(detail?.["reason"])).find((one) => one !== undefined);
    const delay = details.map((detail) => text(detail?.["retryDelay"])).find((one) => one !== undefined);
    const retry_after_ms = delay === undefined ? undefined : durationMs(delay);
    return {
      status: error.status,
      code: reason,
      type: text(body?.["status"]) ?? text(body?.["type"]),
      message: text(body?.["message"]) ?? error.message,
      headers: head.headers,
      ...(retry_after_ms === undefined ? {} : { retry_after_ms }),
    };
  }
  // An answer that was refused and whose body could not be read is still refused.
  if (!has_head && head.status !== undefined && head.status >= 400) {
    return { status: head.status, message: error instanceof Error ? error.message : String(error), headers: head.headers };
  }
  return factsOfTransport(error, { timed_out: false, is_transport: head.unreachable, has_head });
}

/** The `error` of a body that the SDK made a message of, with or without words before it. */
function errorBodyOf(message: string): JsonObject | undefined {
  const begin = message.indexOf("{");
  if (begin < 0) return undefined;
  try {
    return asObject(asObject(JSON.parse(message.slice(begin)) as Json)?.["error"]);
  } catch {
    return undefined; // Not JSON: the message is shown as it is.
  }
}

/** A protobuf Duration in JSON: "34.4s". */
function durationMs(text: string): number | undefined {
  const seconds = /^(\d+(?:\.\d+)?)s$/.exec(text)?.[1];
  return seconds === undefined ? undefined : Math.ceil(Number(seconds) * 1000);
}

// --- the request ---

function bodyOf(request: ModelRequest, signal: AbortSignal, head: Head): GenerateContentParameters {
  return {
    model: request.model,
    contents: contentsOf(request),
    config: {
      abortSignal: signal,
      httpOptions: { fetch: fetchInto(head) },
      automaticFunctionCalling: { disable: true },
      automaticContinuation: false,
      maxOutputTokens: request.max_output_tokens,
      ...(request.temperature === undefined ? {} : { temperature: request.temperature }),
      ...(request.instructions.trim() === "" ? {} : { systemInstruction: { parts: [{ text: request.instructions }] } }),
      ...(request.tools.length === 0
        ? {}
        : {
            tools: [
              {
                functionDeclarations: request.tools.map((tool) => ({
                  name: tool.name,
                  description: tool.description,
                  parametersJsonSchema: { type: "object", ...(tool.parameters as { readonly [key: string]: unknown }) },
                })),
              },
            ],
          }),
    },
  };
}

/** Results of parallel calls stand together in one content, as the API insists. */
function contentsOf(request: ModelRequest): Content[] {
  const contents: { role: "user" | "model"; parts: Part[]; results: boolean }[] = [];
  for (const message of wellFormed(request.messages)) {
    switch (message.role) {
      case "user":
        contents.push({ role: "user", parts: [{ text: message.text.trim() === "" ? "(blank message)" : message.text }], results: false });
        break;
      case "assistant": {
        const parts = modelParts(message, request.model);
        if (parts.length > 0) contents.push({ role: "model", parts, results: false });
        break;
      }
      case "tool": {
        const response = message.is_error ? { error: message.text } : { output: message.text };
        const part: Part = { functionResponse: { id: message.call_id, name: message.name, response } };
        const last = contents.at(-1);
        if (last?.results === true) last.parts.push(part);
        else contents.push({ role: "user", parts: [part], results: true });
        break;
      }
    }
  }
  return contents.map(({ role, parts }) => ({ role, parts }));
}

function modelParts(message: Extract<ChatMessage, { role: "assistant" }>, model: string): Part[] {
  const call = ({ id, name, args }: ToolCall): Part => ({ functionCall: { id, name, args: args as Record<string, unknown> } });
  const kept = continued(message, model, call);
  if (kept !== undefined) return kept;
  const parts: Part[] = [...(message.text.trim() === "" ? [] : [{ text: message.text }]), ...message.tool_calls.map(call)];
  const first = parts.find((part) => part.functionCall !== undefined);
  if (first !== undefined && wantsSignatures(model)) first.thoughtSignature = SIGNATURE_OF_ANOTHER;
  return parts;
}

function wantsSignatures(model: string): boolean {
  const generation = /^gemini-(\d+)/.exec(model)?.[1];
  return generation !== undefined && Number(generation) >= 3;
}

/** The parts as the model made them; undefined when the continuation is not of this model or does not fit the message. */
function continued(message: Extract<ChatMessage, { role: "assistant" }>, model: string, callPart: (call: ToolCall) => Part): Part[] | undefined {
  const continuation = asObject(message.continuation);
  if (continuation?.["provider"] !== "google" || continuation["model"] !== model || !Array.isArray(continuation["parts"])) return undefined;
  const parts: Part[] = [];
  let characters = 0;
  let calls = 0;
  for (const kept of continuation["parts"] as readonly Json[]) {
    const part = asObject(kept);
    const signature = part?.["signature"];
    const signed = typeof signature === "string" ? { thoughtSignature: signature } : {};
    const text_chars = part?.["text_chars"];
    const thought = part?.["thought"];
    if (typeof text_chars === "number") {
      const text = message.text.slice(characters, characters + text_chars);
      characters += text_chars;
      if (text !== "" || typeof signature === "string") parts.push({ text, ...signed });
    } else if (typeof thought === "string") {
      parts.push({ text: thought, thought: true, ...signed });
    } else {
      const call = message.tool_calls[calls++];
      if (call === undefined || call.id !== part?.["tool_call"]) return undefined;
      parts.push({ ...callPart(call), ...signed });
    }
  }
  return characters === message.text.length && calls === message.tool_calls.length ? parts : undefined;
}

// --- the answer ---

type AnswerPart =
  | { readonly kind: "text"; characters: number; signature?: string }
  | { readonly kind: "thought"; text: string; signature?: string }
  | { readonly kind: "call"; readonly id: string; readonly name: string; readonly args: string; signature?: string };

/** The answer as its chunks build it up. */
class Answer {
  readonly #attempt: Attempt;
  readonly #request: ModelRequest;
  readonly #parts: AnswerPart[] = [];
  #finish: string | undefined;
  #blocked: string | undefined;
  /** As it was said with the end or after it: what came before counts only what was generated until then. */
  #usage: Usage | undefined;

  constructor(attempt: Attempt, request: ModelRequest) {
    this.#attempt = attempt;
    this.#request = request;
  }

  /** The provider has said how the answer ends (P8). */
  get is_complete(): boolean {
    return this.#finish !== undefined || this.#blocked !== undefined;
  }

  take(chunk: GenerateContentResponse): void {
    const block_reason = chunk.promptFeedback?.blockReason;
    if (typeof block_reason === "string" && block_reason !== "BLOCKED_REASON_UNSPECIFIED") this.#blocked = block_reason;
    const candidate = chunk.candidates?.[0];
    for (const part of candidate?.content?.parts ?? []) this.#grow(part);
    if (typeof candidate?.finishReason === "string" && candidate.finishReason !== "FINISH_REASON_UNSPECIFIED") this.#finish = candidate.finishReason;
    const counts = asObject(chunk.usageMetadata);
    if (counts === undefined) return;
    const usage = usageOf(counts);
    this.#attempt.report(usage);
    if (this.is_complete) this.#usage = usage;
  }

  #grow(part: Part): void {
    const { thoughtSignature: signature, functionCall } = part;
    const signed = typeof signature === "string" && signature !== "" ? { signature } : {};
    if (functionCall !== undefined && functionCall !== null) {
      const name = functionCall.name ?? "";
      const raw: unknown = functionCall.args ?? {};
      const args = typeof raw === "string" ? raw : JSON.stringify(raw);
      this.#attempt.countHidden(estimateCallHeadTokens(name));
      this.#attempt.deliver("tool_call", args);
      this.#parts.push({ kind: "call", id: functionCall.id ?? "", name, args, ...signed });
      return;
    }
    if (typeof part.text !== "string") return; // Code, files and whatever is invented later: not asked for.
    const is_thought = part.thought === true;
    const last = this.#parts.at(-1);
    // A signature ends its part: what follows is another one.
    if (is_thought) {
      if (last?.kind === "thought" && last.signature === undefined) Object.assign(last, { text: last.text + part.text, ...signed });
      else this.#parts.push({ kind: "thought", text: part.text, ...signed });
    } else if (last?.kind === "text" && last.signature === undefined) {
      Object.assign(last, { characters: last.characters + part.text.length, ...signed });
    } else if (part.text !== "" || "signature" in signed) {
      this.#parts.push({ kind: "text", characters: part.text.length, ...signed });
    }
    this.#attempt.deliver(is_thought ? "reasoning" : "text", part.text);
  }

  outcome(): ModelOutcome {
    if (this.#blocked !== undefined) return this.#attempt.failed(modelError("content_policy", `the prompt was blocked: ${this.#blocked}`));
    if (this.#finish === undefined) return this.#attempt.failed(modelError("stream_broken", "the stream ended before the answer did"));
    if (BROKEN_OFF.has(this.#finish)) return this.#attempt.failed(modelError("stream_broken", `the model's answer broke off: ${this.#finish}`));
    const prefix = `call_${hashOf(this.#request.idempotency_key).slice(0, 16)}`;
    const tool_calls = withOwnIds(
      this.#parts.flatMap((part) => (part.kind === "call" ? [toolCall(part.id, part.name, part.args)] : [])),
      prefix,
    );
    const continuation = this.#continuation(tool_calls);
    return {
      kind: "completed",
      text: this.#attempt.delivered.text,
      tool_calls,
      stop: stopOf(this.#finish, tool_calls.length > 0),
      usage: this.#usage ?? this.#attempt.usageSoFar(),
      ...(continuation === undefined ? {} : { continuation }),
    };
  }

  #continuation(tool_calls: readonly ToolCall[]): JsonObject | undefined {
    if (!this.#parts.some((part) => part.signature !== undefined)) return undefined;
    let calls = 0;
    const parts = this.#parts.map((part): JsonObject => {
      const signed = part.signature === undefined ? {} : { signature: part.signature };
      switch (part.kind) {
        case "text":
          return { text_chars: part.characters, ...signed };
        case "thought":
          return { thought: part.text, ...signed };
        case "call":
          return { tool_call: tool_calls[calls++]?.id ?? "", ...signed };
      }
    });
    return { provider: "google", model: this.#request.model, parts };
  }
}

/** P7: cached tokens are nested in the prompt's, thoughts stand beside the candidates'. What tools of the server read is prompt too. */
function usageOf(usage: JsonObject): Usage {
  const count = (value: Json | undefined) => (typeof value === "number" && value > 0 ? value : 0);
  const prompt = count(usage["promptTokenCount"]);
  const cache_read = Math.min(count(usage["cachedContentTokenCount"]), prompt);
  return {
    input_tokens: prompt - cache_read + count(usage["toolUsePromptTokenCount"]),
    output_tokens: count(usage["candidatesTokenCount"]),
    cache_read_tokens: cache_read,
    cache_write_tokens: 0,
    reasoning_tokens: count(usage["thoughtsTokenCount"]),
  };
}

const BROKEN_OFF: ReadonlySet<string> = new Set(["MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL", "TOO_MANY_TOOL_CALLS", "MALFORMED_RESPONSE"]);
const FILTERED: ReadonlySet<string> = new Set(["SAFETY", "RECITATION", "LANGUAGE", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII"]);

function stopOf(finish: string, has_calls: boolean): StopReason {
  if (finish === "MAX_TOKENS") return "length";
  if (FILTERED.has(finish)) return "content_filter";
  return has_calls ? "tool_calls" : "end";
}
