// openai: GPT models and everything that speaks OpenAI's Chat Completions, over the official SDK, streaming. Keeps the promises of
// provider.ts; what is this dialect's own:
//
// - Usage comes in one last chunk, because it is asked for (`stream_options.include_usage`). A server that sends none, or a connection that
//   breaks between the finish reason and that chunk, leaves a completed answer whose usage is estimated and marked so.
// - Tool calls arrive in pieces by `index`. Other servers send a call whole in one chunk, all calls under index 0, or no ids: a new id begins a
//   new call, and a missing one is made from the request's idempotency key.
// - An answer is complete when its finish reason has come. `[DONE]` adds nothing.
// - The bound on output is `max_completion_tokens` at OpenAI and for its models, `max_tokens` for other models elsewhere: OpenAI's newer models
//   refuse the old name, and several compatible servers do not know the new one.
// - A refusal is text that the model says, with the stop reason `refusal`.
// - Servers that show reasoning do so as `reasoning_content` (DeepSeek, vLLM) or `reasoning` (OpenRouter). The former must come back
//   with an answer that called tools, and must not with others.
import type OpenAiSdk from "openai";
import { asObject, hashOf, type Json } from "../protocol/json.ts";
import { type Attempt, runAttempt } from "./attempt.ts";
import { estimateCallHeadTokens } from "./estimate.ts";
import { modelError } from "./model-error.ts";
import { clientLoader, factsOf, OPENAI_BASE_URL, usageOf } from "./openai-client.ts";
import type { ChatMessage, ModelOutcome, ModelRequest, Provider, StopReason, ToolCall, Usage } from "./provider.ts";
import { streamAnswer } from "./stream-answer.ts";
import { toolCall, withOwnIds } from "./tool-args.ts";
import { wellFormed } from "./transcript.ts";
import { contextOf, type SdkProviderSettings } from "./transport.ts";

type Chunk = OpenAiSdk.Chat.Completions.ChatCompletionChunk;
type MessageParam = OpenAiSdk.Chat.Completions.ChatCompletionMessageParam;

/** `name` is the provider's, where it is not OpenAI itself but one that speaks like it. */
export function openaiProvider(settings: SdkProviderSettings & { readonly name?: string }): Provider {
  const base_url = settings.base_url ?? OPENAI_BASE_URL;
  const name = settings.name ?? "openai";
  const context = contextOf(name, settings);
  const load = clientLoader(settings.api_key, base_url, context.patience);
  return {
    name,
    call: (request, io) =>
      runAttempt(context, request, io, async (attempt) => {
        const { sdk, client } = await load();
        return streamAnswer(context, attempt, {
          answer: new Answer(attempt, request),
          open: () => client.chat.completions.create(bodyOf(request, base_url), { signal: attempt.signal }),
          facts_of: (error, has_head) => factsOf(sdk, error, has_head),
        });
      }),
  };
}

// --- the request ---

function bodyOf(request: ModelRequest, base_url: string): OpenAiSdk.Chat.Completions.ChatCompletionCreateParamsStreaming {
  return {
    model: request.model,
    stream: true,
    stream_options: { include_usage: true },
    ...(wantsCompletionTokens(request.model, base_url) ? { max_completion_tokens: request.max_output_tokens } : { max_tokens: request.max_output_tokens }),
    ...(request.temperature === undefined ? {} : { temperature: request.temperature }),
    messages: [
      ...(request.instructions.trim() === "" ? [] : [{ role: "system" as const, content: request.instructions }]),
      ...wellFormed(request.messages).flatMap(messageParams),
    ],
    ...(request.tools.length === 0
      ? {}
      : {
          tools: request.tools.map((tool) => ({
            type: "function" as const,
            function: {
              name: tool.name,
              description: tool.description,
              parameters: { type: "object", ...(tool.parameters as { readonly [key: string]: unknown }) },
            },
          })),
        }),
  };
}

function wantsCompletionTokens(model: string, base_url: string): boolean {
  return new URL(base_url).hostname === new URL(OPENAI_BASE_URL).hostname || /^(openai\/)?(gpt-|chatgpt-|o\d)/.test(model);
}

function messageParams(message: ChatMessage): MessageParam[] {
  switch (message.role) {
    case "user":
      return [{ role: "user", content: message.text }];
    case "tool":
      // The dialect has no mark for an error, so the text says it.
      return [{ role: "tool", tool_call_id: message.call_id, content: message.is_error ? `ERROR: ${message.text}` : message.text }];
    case "assistant": {
      if (message.tool_calls.length === 0) return message.text === "" ? [] : [{ role: "assistant", content: message.text }];
      const tool_calls = message.tool_calls.map((call) => ({
        id: call.id,
        type: "function" as const,
        function: { name: call.name, arguments: call.invalid_args ?? JSON.stringify(call.args) },
      }));
      return [{ role: "assistant", content: message.text === "" ? null : message.text, tool_calls, ...reasoningOf(message.continuation) }];
    }
  }
}

function reasoningOf(continuation: Json | undefined): { reasoning_content?: string } {
  const kept = asObject(continuation);
  return kept?.["provider"] === "openai" && typeof kept["reasoning_content"] === "string" ? { reasoning_content: kept["reasoning_content"] } : {};
}

// --- the answer ---

interface OpenCall {
  id: string;
  name: string;
  args: string;
}

/** The answer as its chunks build it up. */
class Answer {
  readonly #attempt: Attempt;
  readonly #request: ModelRequest;
  /** In the order in which they began. */
  readonly #calls: OpenCall[] = [];
  /** The call that grows under an index now. */
  readonly #by_index = new Map<number, OpenCall>();
  #reasoning_content = "";
  #finish: string | undefined;
  #refused = false;
  #usage: Usage | undefined;

  constructor(attempt: Attempt, request: ModelRequest) {
    this.#attempt = attempt;
    this.#request = request;
  }

  /** The provider has said how the answer ends (P8). */
  get is_complete(): boolean {
    return this.#finish !== undefined;
  }

  take(chunk: Chunk): void {
    const usage = asObject(chunk.usage);
    if (usage !== undefined) {
      this.#usage = usageOf(usage, { input: "prompt_tokens", output: "completion_tokens" });
      this.#attempt.report(this.#usage);
    }
    // `choices` is empty in the usage chunk, and absent in keep-alives of some servers.
    const choice = chunk.choices?.[0];
    if (choice === undefined) return;
    const delta = choice.delta as (typeof choice)["delta"] & { reasoning_content?: string | null; reasoning?: string | null };
    if (delta !== undefined && delta !== null) {
      if (typeof delta.reasoning_content === "string") {
        this.#reasoning_content += delta.reasoning_content;
        this.#attempt.deliver("reasoning", delta.reasoning_content);
      } else if (typeof delta.reasoning === "string") {
        this.#attempt.deliver("reasoning", delta.reasoning);
      }
      if (typeof delta.content === "string") this.#attempt.deliver("text", delta.content);
      if (typeof delta.refusal === "string" && delta.refusal !== "") {
        this.#refused = true;
        this.#attempt.deliver("text", delta.refusal);
      }
      for (const piece of delta.tool_calls ?? []) this.#grow(piece);
    }
    if (typeof choice.finish_reason === "string") this.#finish = choice.finish_reason;
  }

  #grow(piece: OpenAiSdk.Chat.Completions.ChatCompletionChunk.Choice.Delta.ToolCall): void {
    const index = typeof piece.index === "number" ? piece.index : Math.max(0, this.#calls.length - 1);
    let call = this.#by_index.get(index);
    const begins_another = call !== undefined && piece.id !== undefined && piece.id !== "" && call.id !== "" && piece.id !== call.id;
    if (call === undefined || begins_another) {
      call = { id: "", name: "", args: "" };
      this.#calls.push(call);
      this.#by_index.set(index, call);
    }
    if (piece.id !== undefined && piece.id !== null && piece.id !== "") call.id = piece.id;
    // Servers repeat the name in every piece, or send it once; none sends it in parts.
    if (piece.function?.name) {
      if (call.name === "") this.#attempt.countHidden(estimateCallHeadTokens(piece.function.name));
      call.name = piece.function.name;
    }
    if (piece.function?.arguments) {
      call.args += piece.function.arguments;
      this.#attempt.deliver("tool_call", piece.function.arguments);
    }
  }

  outcome(): ModelOutcome {
    if (this.#finish === undefined) {
      return this.#attempt.failed(modelError("stream_broken", "the stream ended before the answer did"));
    }
    const prefix = `call_${hashOf(this.#request.idempotency_key).slice(0, 16)}`;
    const tool_calls: ToolCall[] = withOwnIds(
      this.#calls.map((call) => toolCall(call.id, call.name, call.args)),
      prefix,
    );
    const keeps_reasoning = this.#reasoning_content !== "" && tool_calls.length > 0;
    return {
      kind: "completed",
      text: this.#attempt.delivered.text,
      tool_calls,
      stop: this.#refused ? "refusal" : stopOf(this.#finish, tool_calls.length > 0),
      usage: this.#usage ?? this.#attempt.usageSoFar(),
      ...(keeps_reasoning ? { continuation: { provider: "openai", reasoning_content: this.#reasoning_content } } : {}),
    };
  }
}

function stopOf(finish: string, has_calls: boolean): StopReason {
  switch (finish) {
    case "length":
      return "length";
    case "content_filter":
      return "content_filter";
    default:
      // Some servers end an answer that calls tools with `stop`.
      return has_calls ? "tool_calls" : "end";
  }
}
