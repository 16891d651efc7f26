// anthropic: Claude over the official SDK, Messages API, streaming. Keeps the promises of provider.ts; what is Anthropic's own:
//
// - Thinking must come back with its signature, at its place between text and tool calls. It is kept in `continuation` as the list of blocks,
//   where text and tool calls stand as references ({text_chars}, {tool_call}), so that no text is stored twice. It is only ever sent to the
//   model that made it. An answer without thinking has no continuation.
// - `message_delta` carries the final usage, cumulative, which replaces what `message_start` said. When the server worked in several
//   iterations, each is billed and the top-level counts are only the last one's, so the iterations are added.
// - An answer is complete when its stop reason has come. `message_stop` adds nothing, so a connection cut before it loses nothing.
// - `temperature` is no longer in the SDK's types, as the newest models refuse it. It is sent when an agent asks for it; a model that
//   refuses it answers `invalid_request`, which is better than an agent that silently runs at another temperature.
import type AnthropicSdk from "@anthropic-ai/sdk";
import { asObject, type Json, type JsonObject } from "../protocol/json.ts";
import { type Attempt, type Patience, runAttempt } from "./attempt.ts";
import { estimateCallHeadTokens } from "./estimate.ts";
import { type FailureFacts, modelError } from "./model-error.ts";
import type { ChatMessage, ModelOutcome, ModelRequest, Provider, StopReason, ToolCall, Usage } from "./provider.ts";
import { streamAnswer } from "./stream-answer.ts";
import { toolCall, withOwnIds } from "./tool-args.ts";
import { wellFormed } from "./transcript.ts";
import { contextOf, factsOfTransport, sdkPatience, type SdkProviderSettings, withRequestId } from "./transport.ts";

type Sdk = typeof import("@anthropic-ai/sdk");
type StreamEvent = AnthropicSdk.Messages.RawMessageStreamEvent;

const ANTHROPIC_BASE_URL = "https://api.anthropic.com";

export function anthropicProvider(settings: SdkProviderSettings): Provider {
  const context = contextOf("anthropic", settings);
  // Loading the SDK takes a quarter of a second; a process that never calls Claude does not pay it.
  let loading: Promise<{ sdk: Sdk; client: AnthropicSdk }> | undefined;
  const load = () => {
    loading ??= import("@anthropic-ai/sdk").then((sdk) => ({ sdk, client: clientOf(sdk, settings, context.patience) }));
    return loading;
  };
  return {
    name: "anthropic",
    call: (request, io) =>
      runAttempt(context, request, io, async (attempt) => {
        const { sdk, client } = await load();
        return streamAnswer(context, attempt, {
          answer: new Answer(attempt, request.model),
          open: () => client.messages.create(bodyOf(request), { signal: attempt.signal }),
          facts_of: (error, has_head) => factsOf(sdk, error, has_head),
        });
      }),
  };
}

function clientOf(sdk: Sdk, settings: SdkProviderSettings, patience: Patience): AnthropicSdk {
  return new sdk.default({
    apiKey: settings.api_key,
    baseURL: settings.base_url ?? ANTHROPIC_BASE_URL,
    maxRetries: 0, // P5
    timeout: sdkPatience(patience),
    // A redirect would carry the key to wherever it points.
    fetchOptions: { redirect: "error" },
    // The SDK would print what it cannot parse, which is a customer's text.
    logLevel: "off",
    openTelemetry: false,
  });
}

function factsOf(sdk: Sdk, error: unknown, has_head: boolean): FailureFacts {
  if (error instanceof sdk.APIError && (error.status !== undefined || error.type !== null)) {
    const message = error.apiMessage ?? error.message;
    return { status: error.status, type: error.type ?? undefined, message: withRequestId(message, error.requestID), headers: error.headers };
  }
  const timed_out = error instanceof sdk.APIConnectionTimeoutError;
  // The SDK wraps a connection cut within a stream into its bare base class.
  return factsOfTransport(error, { timed_out, is_transport: error instanceof sdk.AnthropicError, has_head });
}

// --- the request ---

function bodyOf(request: ModelRequest): AnthropicSdk.Messages.MessageCreateParamsStreaming {
  const sampling = request.temperature === undefined ? {} : { temperature: request.temperature };
  return {
    model: request.model,
    max_tokens: request.max_output_tokens,
    stream: true,
    messages: messagesOf(request),
    ...(request.instructions.trim() === "" ? {} : { system: request.instructions }),
    ...(request.tools.length === 0
      ? {}
      : {
          tools: request.tools.map((tool) => ({
            name: tool.name,
            description: tool.description,
            input_schema: { type: "object" as const, ...(tool.parameters as { readonly [key: string]: unknown }) },
          })),
        }),
    ...sampling,
  };
}

type Blocks = AnthropicSdk.Messages.ContentBlockParam[];

/** The API wants roles to alternate and refuses blank texts; both would make one odd message fatal for the whole conversation. */
function messagesOf(request: ModelRequest): AnthropicSdk.Messages.MessageParam[] {
  const params: { role: "user" | "assistant"; content: Blocks }[] = [];
  const add = (role: "user" | "assistant", blocks: Blocks) => {
    const last = params.at(-1);
    if (last?.role === role) last.content.push(...blocks);
    else if (blocks.length > 0) params.push({ role, content: [...blocks] });
  };
  for (const message of wellFormed(request.messages)) {
    switch (message.role) {
      case "user":
        add("user", [{ type: "text", text: message.text.trim() === "" ? "(blank message)" : message.text }]);
        break;
      case "assistant":
        add("assistant", assistantBlocks(message, request.model));
        break;
      case "tool":
        add("user", [{ type: "tool_result", tool_use_id: safeId(message.call_id), content: message.text, is_error: message.is_error }]);
        break;
    }
  }
  return params;
}

/** Ids of other providers may hold characters that this one refuses. */
function safeId(id: string): string {
  return id.replace(/[^A-Za-z0-9_-]/g, "_");
}

function assistantBlocks(message: Extract<ChatMessage, { role: "assistant" }>, model: string): Blocks {
  const toolUse = (call: ToolCall): Blocks[number] => ({ type: "tool_use", id: safeId(call.id), name: call.name, input: call.args });
  return (
    continued(message, model, toolUse) ?? [
      ...(message.text.trim() === "" ? [] : [{ type: "text" as const, text: message.text }]),
      ...message.tool_calls.map(toolUse),
    ]
  );
}

/** The blocks as the model made them; undefined when the continuation is not of this model or does not fit the message. */
function continued(message: Extract<ChatMessage, { role: "assistant" }>, model: string, toolUse: (call: ToolCall) => Blocks[number]): Blocks | undefined {
  const continuation = asObject(message.continuation);
  if (continuation?.["provider"] !== "anthropic" || continuation["model"] !== model || !Array.isArray(continuation["blocks"])) return undefined;
  const blocks: Blocks = [];
  let characters = 0;
  let calls = 0;
  for (const kept of continuation["blocks"] as readonly Json[]) {
    const block = asObject(kept);
    const text_chars = block?.["text_chars"];
    if (typeof text_chars === "number") {
      const text = message.text.slice(characters, characters + text_chars);
      characters += text_chars;
      if (text.trim() !== "") blocks.push({ type: "text", text });
    } else if (block?.["tool_call"] !== undefined) {
      const call = message.tool_calls[calls++];
      if (call === undefined || call.id !== block["tool_call"]) return undefined;
      blocks.push(toolUse(call));
    } else if (block?.["type"] === "thinking" || block?.["type"] === "redacted_thinking") {
      blocks.push(block as unknown as Blocks[number]);
    }
  }
  return characters === message.text.length && calls === message.tool_calls.length ? blocks : undefined;
}

// --- the answer ---

type OpenBlock =
  | { readonly kind: "text"; characters: number }
  | { readonly kind: "tool"; readonly id: string; readonly name: string; readonly start_input: string; json: string }
  | { readonly kind: "thinking"; thinking: string; signature: string }
  | { readonly kind: "redacted"; readonly data: string }
  | { readonly kind: "other" };

/** The answer as its events build it up. */
class Answer {
  readonly #attempt: Attempt;
  readonly #model: string;
  /** By the provider's index, in the order in which they began. */
  readonly #blocks = new Map<number, OpenBlock>();
  #stop: string | undefined;
  #usage: Usage | undefined;

  constructor(attempt: Attempt, model: string) {
    this.#attempt = attempt;
    this.#model = model;
  }

  /** The provider has said how the answer ends (P8). */
  get is_complete(): boolean {
    return this.#stop !== undefined;
  }

  take(event: StreamEvent): void {
    switch (event.type) {
      case "message_start":
        this.#report(event.message.usage);
        break;
      case "content_block_start":
        this.#begin(event.index, event.content_block);
        break;
      case "content_block_delta":
        this.#grow(event.index, event.delta);
        break;
      case "message_delta":
        this.#report(event.usage);
        if (event.delta.stop_reason !== null) {
          this.#stop = event.delta.stop_reason;
          this.#usage = this.#reported;
        }
        break;
      default:
        break; // content_block_stop, message_stop, and whatever is invented later.
    }
  }

  #begin(index: number, block: AnthropicSdk.Messages.RawContentBlockStartEvent["content_block"]): void {
    switch (block.type) {
      case "text":
        this.#blocks.set(index, { kind: "text", characters: block.text.length });
        this.#attempt.deliver("text", block.text);
        break;
      case "tool_use": {
        // The API starts with {} and sends the input in pieces; some proxies send it whole, here.
        const start_input = JSON.stringify(block.input ?? {});
        this.#attempt.countHidden(estimateCallHeadTokens(block.name));
        this.#blocks.set(index, { kind: "tool", id: block.id, name: block.name, start_input, json: "" });
        break;
      }
      case "thinking":
        this.#blocks.set(index, { kind: "thinking", thinking: block.thinking, signature: block.signature });
        this.#attempt.deliver("reasoning", block.thinking);
        break;
      case "redacted_thinking":
        this.#blocks.set(index, { kind: "redacted", data: block.data });
        break;
      default:
        this.#blocks.set(index, { kind: "other" });
    }
  }

  #grow(index: number, delta: AnthropicSdk.Messages.RawContentBlockDelta): void {
    const block = this.#blocks.get(index);
    if (block?.kind === "text" && delta.type === "text_delta") {
      block.characters += delta.text.length;
      this.#attempt.deliver("text", delta.text);
    } else if (block?.kind === "tool" && delta.type === "input_json_delta") {
      block.json += delta.partial_json;
      this.#attempt.deliver("tool_call", delta.partial_json);
    } else if (block?.kind === "thinking" && delta.type === "thinking_delta") {
      block.thinking += delta.thinking;
      this.#attempt.deliver("reasoning", delta.thinking);
    } else if (block?.kind === "thinking" && delta.type === "signature_delta") {
      block.signature += delta.signature;
    }
  }

  #reported: Usage = { input_tokens: 0, output_tokens: 0, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };

  #report(usage: AnthropicSdk.Messages.Usage | AnthropicSdk.Messages.MessageDeltaUsage | undefined): void {
    if (usage === undefined || usage === null) return;
    this.#reported = usageOf(usage as unknown as JsonObject, this.#reported);
    this.#attempt.report(this.#reported);
  }

  outcome(): ModelOutcome {
    const { text } = this.#attempt.delivered;
    if (this.#stop === undefined) {
      return this.#attempt.failed(modelError("stream_broken", "the stream ended before the answer did"));
    }
    const blocks = [...this.#blocks.values()];
    const tool_calls = withOwnIds(
      blocks.flatMap((block) => (block.kind === "tool" ? [toolCall(block.id, block.name, block.json === "" ? block.start_input : block.json)] : [])),
      "call",
    );
    const continuation = this.#continuation(blocks, tool_calls);
    return {
      kind: "completed",
      text,
      tool_calls,
      stop: stopOf(this.#stop, tool_calls.length > 0),
      usage: this.#usage ?? this.#attempt.usageSoFar(),
      ...(continuation === undefined ? {} : { continuation }),
    };
  }

  #continuation(blocks: readonly OpenBlock[], tool_calls: readonly ToolCall[]): JsonObject | undefined {
    if (!blocks.some((block) => block.kind === "thinking" || block.kind === "redacted")) return undefined;
    let calls = 0;
    const kept = blocks.flatMap((block): JsonObject[] => {
      switch (block.kind) {
        case "text":
          return [{ text_chars: block.characters }];
        case "tool":
          return [{ tool_call: tool_calls[calls++]?.id ?? "" }];
        case "thinking":
          return [{ type: "thinking", thinking: block.thinking, signature: block.signature }];
        case "redacted":
          return [{ type: "redacted_thinking", data: block.data }];
        case "other":
          return [];
      }
    });
    return { provider: "anthropic", model: this.#model, blocks: kept };
  }
}

/** P7: `output_tokens` of the API includes thinking. Counts that are absent or null keep what an earlier event said. */
function usageOf(usage: JsonObject, before: Usage): Usage {
  const iterations = usage["iterations"];
  if (Array.isArray(iterations) && iterations.length > 0) {
    const none: Usage = { input_tokens: 0, output_tokens: 0, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
    return (iterations as readonly Json[]).reduce<Usage>((sum, iteration) => {
      const one = usageOf({ ...asObject(iteration), iterations: null }, none);
      return {
        input_tokens: sum.input_tokens + one.input_tokens,
        output_tokens: sum.output_tokens + one.output_tokens,
        cache_read_tokens: sum.cache_read_tokens + one.cache_read_tokens,
        cache_write_tokens: sum.cache_write_tokens + one.cache_write_tokens,
        reasoning_tokens: sum.reasoning_tokens + one.reasoning_tokens,
      };
    }, none);
  }
  const count = (value: Json | undefined, otherwise: number) => (typeof value === "number" && value >= 0 ? value : otherwise);
  const output = count(usage["output_tokens"], before.output_tokens + before.reasoning_tokens);
  const reasoning = Math.min(count(asObject(usage["output_tokens_details"])?.["thinking_tokens"], before.reasoning_tokens), output);
  return {
    input_tokens: count(usage["input_tokens"], before.input_tokens),
    cache_read_tokens: count(usage["cache_read_input_tokens"], before.cache_read_tokens),
    cache_write_tokens: count(usage["cache_creation_input_tokens"], before.cache_write_tokens),
    output_tokens: output - reasoning,
    reasoning_tokens: reasoning,
  };
}

function stopOf(reason: string, has_calls: boolean): StopReason {
  switch (reason) {
    case "max_tokens":
    case "model_context_window_exceeded":
      return "length";
    case "refusal":
      return "refusal";
    default:
      return has_calls ? "tool_calls" : "end";
  }
}
