// openai-responses: GPT models over OpenAI's Responses API, through the official SDK, streaming. Keeps the promises of provider.ts; what is its own:
//
// - Who is called through it: `openai-responses/{model}` always, `openai/{model}` when the model exists nowhere else (onlyInResponses below).
//   Everything else under `openai/` goes through Chat Completions (openai.ts), which compatible servers speak as well.
// - Nothing is stored at OpenAI (`store: false`): the conversation is ours and goes out whole each time. So that a reasoning model does not lose its
//   thread between a tool call and the result, its reasoning comes back encrypted and is kept in `continuation` as the list of output items, where
//   text and calls stand as references ({text_chars}, {tool_call}). It is only ever sent to the model that made it.
// - An answer is complete with `response.completed` or `response.incomplete`; `response.failed` is an error with a code of its own.
// - Usage nests as in Chat Completions and comes with the end.
import type OpenAiSdk from "openai";
import { asObject, hashOf, type Json, type JsonObject } from "../protocol/json.ts";
import { type Attempt, runAttempt } from "./attempt.ts";
import { estimateCallHeadTokens } from "./estimate.ts";
import { type FailureFacts, modelError } from "./model-error.ts";
import { clientLoader, factsOf, OPENAI_BASE_URL, usageOf } from "./openai-client.ts";
import type { ChatMessage, ModelOutcome, ModelRequest, Provider, StopReason, ToolCall, Usage } from "./provider.ts";
import { streamAnswer } from "./stream-answer.ts";
import { toolCall, withOwnIds } from "./tool-args.ts";
import { wellFormed } from "./transcript.ts";
import { contextOf, type SdkProviderSettings } from "./transport.ts";

type Responses = typeof OpenAiSdk.Responses;
type StreamEvent = OpenAiSdk.Responses.ResponseStreamEvent;
type InputItem = OpenAiSdk.Responses.ResponseInputItem;

/** OpenAI serves these in the Responses API alone: the pro and codex lines, deep research, computer use. */
export function onlyInResponses(model: string): boolean {
  return /^(o\d+(-mini)?-pro|o\d+(-mini)?-deep-research|gpt-\d+(\.\d+)?-pro|gpt-\d+(\.\d+)?-codex|codex-|computer-use-)/.test(model);
}

export function openaiResponsesProvider(settings: SdkProviderSettings): Provider {
  const base_url = settings.base_url ?? OPENAI_BASE_URL;
  const context = contextOf("openai-responses", settings);
  const load = clientLoader(settings.api_key, base_url, context.patience);
  return {
    name: "openai-responses",
    call: (request, io) =>
      runAttempt(context, request, io, async (attempt) => {
        const { sdk, client } = await load();
        return streamAnswer(context, attempt, {
          answer: new Answer(attempt, request),
          open: () => client.responses.create(bodyOf(request), { signal: attempt.signal }),
          facts_of: (error, has_head) => factsOf(sdk, error, has_head),
          // An error as the very first event was never billed.
          is_heard: (event) => event.type !== "error",
        });
      }),
  };
}

// --- the request ---

function bodyOf(request: ModelRequest): Parameters<InstanceType<Responses>["create"]>[0] & { readonly stream: true } {
  return {
    model: request.model,
    stream: true,
    store: false,
    ...(reasons(request.model) ? { include: ["reasoning.encrypted_content" as const] } : {}),
    max_output_tokens: request.max_output_tokens,
    ...(request.temperature === undefined ? {} : { temperature: request.temperature }),
    ...(request.instructions.trim() === "" ? {} : { instructions: request.instructions }),
    input: wellFormed(request.messages).flatMap((message) => inputItems(message, request.model)),
    ...(request.tools.length === 0
      ? {}
      : {
          tools: request.tools.map((tool) => ({
            type: "function" as const,
            name: tool.name,
            description: tool.description,
            parameters: { type: "object", ...(tool.parameters as { readonly [key: string]: unknown }) },
            // Strict schemas allow no optional field: ours are the tools' own.
            strict: false,
          })),
        }),
  };
}

/** Models without reasoning refuse to be asked for it. */
function reasons(model: string): boolean {
  return /^(o\d|codex-|gpt-([5-9]|\d\d))/.test(model) && !/-chat(-|$)/.test(model);
}

function inputItems(message: ChatMessage, model: string): InputItem[] {
  switch (message.role) {
    case "user":
      return [{ role: "user", content: message.text }];
    case "tool":
      // The dialect has no mark for an error, so the text says it.
      return [{ type: "function_call_output", call_id: message.call_id, output: message.is_error ? `ERROR: ${message.text}` : message.text }];
    case "assistant":
      return continued(message, model) ?? [...textItems(message.text), ...message.tool_calls.map(callItem)];
  }
}

const textItems = (text: string): InputItem[] => (text === "" ? [] : [{ role: "assistant", content: text }]);
const callItem = (call: ToolCall): InputItem => ({
  type: "function_call",
  call_id: call.id,
  name: call.name,
  arguments: call.invalid_args ?? JSON.stringify(call.args),
});

/** The items as the model made them; undefined when the continuation is not of this model or does not fit the message. */
function continued(message: Extract<ChatMessage, { role: "assistant" }>, model: string): InputItem[] | undefined {
  const continuation = asObject(message.continuation);
  if (continuation?.["provider"] !== "openai-responses" || continuation["model"] !== model || !Array.isArray(continuation["items"])) return undefined;
  const items: InputItem[] = [];
  let characters = 0;
  let calls = 0;
  for (const kept of continuation["items"] as readonly Json[]) {
    const item = asObject(kept);
    const text_chars = item?.["text_chars"];
    if (typeof text_chars === "number") {
      items.push(...textItems(message.text.slice(characters, characters + text_chars)));
      characters += text_chars;
    } else if (item?.["type"] === "reasoning") {
      items.push(item as unknown as InputItem);
    } else {
      const call = message.tool_calls[calls++];
      if (call === undefined || call.id !== item?.["tool_call"]) return undefined;
      items.push(callItem(call));
    }
  }
  return characters === message.text.length && calls === message.tool_calls.length ? items : undefined;
}

// --- the answer ---

type OpenItem =
  | { readonly kind: "text"; characters: number }
  | { readonly kind: "call"; readonly id: string; readonly name: string; args: string }
  | { readonly kind: "reasoning"; item: JsonObject }
  | { readonly kind: "other" };

/** The answer as its events build it up. */
class Answer {
  readonly #attempt: Attempt;
  readonly #request: ModelRequest;
  /** By the provider's index, in the order in which they began. */
  readonly #items = new Map<number, OpenItem>();
  #end: { readonly reason: string | undefined } | undefined;
  #failure: FailureFacts | undefined;
  #refused = false;
  #usage: Usage | undefined;

  constructor(attempt: Attempt, request: ModelRequest) {
    this.#attempt = attempt;
    this.#request = request;
  }

  /** The provider has said how the answer ends (P8). */
  get is_complete(): boolean {
    return this.#end !== undefined;
  }

  get failure(): FailureFacts | undefined {
    return this.#failure;
  }

  take(event: StreamEvent): void {
    switch (event.type) {
      case "response.output_item.added":
        this.#begin(event.output_index, event.item);
        break;
      case "response.output_text.delta":
        this.#text(event.output_index, event.delta);
        break;
      case "response.refusal.delta":
        this.#refused = true;
        this.#text(event.output_index, event.delta);
        break;
      case "response.reasoning_summary_text.delta":
      case "response.reasoning_text.delta":
        this.#attempt.deliver("reasoning", event.delta);
        break;
      case "response.function_call_arguments.delta": {
        const call = this.#items.get(event.output_index);
        if (call?.kind !== "call") break;
        call.args += event.delta;
        this.#attempt.deliver("tool_call", event.delta);
        break;
      }
      case "response.output_item.done":
        this.#finish(event.output_index, event.item);
        break;
      case "response.completed":
      case "response.incomplete":
        this.#report(event.response);
        this.#end = { reason: event.response.incomplete_details?.reason };
        break;
      case "response.failed": {
        this.#report(event.response);
        const { code, message } = event.response.error ?? { code: undefined, message: "the provider says that it failed" };
        this.#failure = { code, message };
        break;
      }
      case "error":
        this.#failure = { code: event.code ?? undefined, message: event.message };
        break;
      default:
        break; // Created, in progress, parts, annotations, and whatever is invented later.
    }
  }

  #begin(index: number, item: OpenAiSdk.Responses.ResponseOutputItem): void {
    switch (item.type) {
      case "message":
        this.#items.set(index, { kind: "text", characters: 0 });
        break;
      case "function_call":
        this.#attempt.countHidden(estimateCallHeadTokens(item.name));
        this.#items.set(index, { kind: "call", id: item.call_id, name: item.name, args: "" });
        break;
      case "reasoning":
        this.#items.set(index, { kind: "reasoning", item: {} });
        break;
      default:
        this.#items.set(index, { kind: "other" });
    }
  }

  /** The item as it is in the end. Some servers send it whole, without deltas, or without having begun it. */
  #finish(index: number, item: OpenAiSdk.Responses.ResponseOutputItem): void {
    if (!this.#items.has(index)) this.#begin(index, item);
    const open = this.#items.get(index);
    if (open?.kind === "call" && item.type === "function_call" && open.args === "") {
      open.args = item.arguments;
      this.#attempt.deliver("tool_call", item.arguments);
    } else if (open?.kind === "text" && item.type === "message" && open.characters === 0) {
      for (const part of item.content) {
        if (part.type === "refusal") this.#refused = true;
        this.#text(index, part.type === "refusal" ? part.refusal : part.text);
      }
    } else if (open?.kind === "reasoning" && item.type === "reasoning") {
      // `status` is the answer's, not to be sent back.
      const { id, summary, encrypted_content } = item;
      if (typeof encrypted_content === "string") open.item = { type: "reasoning", id, summary: summary as unknown as Json, encrypted_content };
    }
  }

  #text(index: number, text: string): void {
    let open = this.#items.get(index);
    if (open?.kind !== "text") {
      open = { kind: "text", characters: 0 };
      this.#items.set(index, open);
    }
    open.characters += text.length;
    this.#attempt.deliver("text", text);
  }

  #report(response: OpenAiSdk.Responses.Response): void {
    const usage = asObject(response.usage);
    if (usage === undefined) return;
    this.#usage = usageOf(usage, { input: "input_tokens", output: "output_tokens" });
    this.#attempt.report(this.#usage);
  }

  outcome(): ModelOutcome {
    if (this.#end === undefined) return this.#attempt.failed(modelError("stream_broken", "the stream ended before the answer did"));
    const prefix = `call_${hashOf(this.#request.idempotency_key).slice(0, 16)}`;
    const items = [...this.#items.values()];
    const tool_calls = withOwnIds(
      items.flatMap((item) => (item.kind === "call" ? [toolCall(item.id, item.name, item.args)] : [])),
      prefix,
    );
    const continuation = this.#continuation(items, tool_calls);
    return {
      kind: "completed",
      text: this.#attempt.delivered.text,
      tool_calls,
      stop: this.#refused ? "refusal" : stopOf(this.#end, tool_calls.length > 0),
      usage: this.#usage ?? this.#attempt.usageSoFar(),
      ...(continuation === undefined ? {} : { continuation }),
    };
  }

  #continuation(items: readonly OpenItem[], tool_calls: readonly ToolCall[]): JsonObject | undefined {
    if (!items.some((item) => item.kind === "reasoning" && item.item["type"] !== undefined)) return undefined;
    let calls = 0;
    const kept = items.flatMap((item): JsonObject[] => {
      switch (item.kind) {
        case "text":
          return [{ text_chars: item.characters }];
        case "call":
          return [{ tool_call: tool_calls[calls++]?.id ?? "" }];
        case "reasoning":
          return item.item["type"] === undefined ? [] : [item.item];
        case "other":
          return [];
      }
    });
    return { provider: "openai-responses", model: this.#request.model, items: kept };
  }
}

function stopOf(end: { readonly reason: string | undefined }, has_calls: boolean): StopReason {
  if (end.reason === "max_output_tokens") return "length";
  if (end.reason === "content_filter") return "content_filter";
  return has_calls ? "tool_calls" : "end";
}
