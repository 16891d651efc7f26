// model-server: a model provider on 127.0.0.1 that speaks Anthropic's Messages, OpenAI's Chat Completions and Responses, and Google's
// streamGenerateContent (all streaming) from a scenario. For the provider contract, for integration tests and for benchmarks ("100 tokens at 5 ms"). It has no model in it: it says what it is told to say.
//
//   const server = await startModelServer({ answer: { tokens: 100, token_ms: 5 } });
//   Anthropic's and Google's base URL is server.url, OpenAI's is `${server.url}/v1`.
//
// Two layers: encodeAnswer turns an answer into the events of a dialect (pure), and the server sends them at their times, in the slices
// and up to the byte that the scenario names.
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo, Socket } from "node:net";
import type { Json, JsonObject } from "../../protocol/json.ts";

export type Dialect = "anthropic" | "openai" | "openai-responses" | "google";

export interface AnswerToolCall {
  readonly id?: string;
  readonly name: string;
  /** An object, or raw text to be sent as it is. */
  readonly args: JsonObject | string;
}

/** What the server says to one request. Everything is optional; the empty answer is an empty text. */
export interface ModelAnswer {
  /** Sent a word at a time. */
  readonly text?: string;
  /** Instead of `text`: this many words ("w0 w1 …"). */
  readonly tokens?: number;
  readonly first_token_ms?: number;
  readonly token_ms?: number;
  readonly thinking?: string;
  /** Anthropic: after the thinking. Google: on the first call, else on the last text. OpenAI Responses: the encrypted reasoning. */
  readonly signature?: string;
  readonly redacted_thinking?: string;
  readonly tool_calls?: readonly AnswerToolCall[];
  /** Characters of the arguments in one delta. Default 5. */
  readonly args_characters?: number;
  readonly stop?: string;
  /** Counts in our disjoint classes; the server nests them as its dialect does. Default: input 10, output by words. */
  readonly usage?: { input?: number; output?: number; cache_read?: number; cache_write?: number; reasoning?: number };

  /** Answers with this status and body and no stream. */
  readonly refusal?: { readonly status: number; readonly body: Json; readonly headers?: Readonly<Record<string, string>> };
  /** An error event inside the 200 stream, after this many words (0: as the first event of all). */
  readonly stream_error?: { readonly after_words: number; readonly type: string; readonly message: string; readonly code?: string | number };
  /** These bytes and nothing else, as a recording has them. */
  readonly raw?: Uint8Array;

  /** The connection is cut after this many bytes of the body. */
  readonly cut_after_bytes?: number;
  /** The body ends properly after this many bytes: a server that gives up without saying so. */
  readonly end_after_bytes?: number;
  /** The body goes out in slices of this many bytes, each its own chunk, so that a character may lie across two. */
  readonly slice_bytes?: number;
  /** Lines end in CRLF. */
  readonly crlf?: boolean;
  /** Nothing comes after the last word: the stream stays open until the client leaves. */
  readonly hang?: boolean;

  /** OpenAI: a call comes whole in one chunk, as other servers send it. */
  readonly whole_tool_calls?: boolean;
  /** OpenAI: all calls come under index 0. */
  readonly same_index?: boolean;
  readonly no_usage?: boolean;
  readonly no_done?: boolean;
  /** OpenAI: the field in which `thinking` is shown. Default `reasoning_content`. */
  readonly reasoning_field?: "reasoning_content" | "reasoning";
  /** OpenAI: the text is a refusal. */
  readonly refuses?: boolean;
  /** Google: the prompt is blocked for this reason, and there is no answer. */
  readonly block_reason?: string;
}

export interface ModelServerRequest {
  readonly dialect: Dialect;
  readonly path: string;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  readonly body: JsonObject;
  /** As the body says it, or the path. */
  readonly model: string;
  /** Counts all requests of the server, from 0. */
  readonly index: number;
}

export interface ModelServerOptions {
  /** What to say: always the same, or decided for each request. */
  readonly answer: ModelAnswer | ((request: ModelServerRequest) => ModelAnswer);
  /** Requests kept in `requests`, the first ones. Benchmarks set 0. Default 10,000. */
  readonly requests_kept_max?: number;
}

export interface ModelServer {
  readonly url: string;
  readonly requests: readonly ModelServerRequest[];
  readonly requests_count: number;
  /** Words of text that were written to the socket. */
  readonly tokens_sent: number;
  /** Streams that are open now. */
  readonly open_streams: number;
  close(): Promise<void>;
}

/** One event on the wire and how long after the one before it comes. */
interface WireEvent {
  readonly event?: string;
  readonly data: string;
  readonly after_ms: number;
  readonly words?: number;
}

const REQUEST_BYTES_MAX = 64 * 1024 * 1024;

export async function startModelServer(options: ModelServerOptions): Promise<ModelServer> {
  const requests: ModelServerRequest[] = [];
  const counts = { requests: 0, tokens: 0, open: 0 };
  const requests_kept_max = options.requests_kept_max ?? 10_000;
  const sockets = new Set<Socket>();

  const server = createServer((incoming, response) => {
    serve(incoming, response).catch((error: unknown) => {
      // A client that leaves in the middle is part of the game; anything else must be seen by whoever runs the test.
      if (!response.destroyed) {
        process.stderr.write(`model-server: ${error instanceof Error ? error.stack : String(error)}\n`);
        response.destroy();
      }
    });
  });

  async function serve(incoming: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = incoming.url ?? "/";
    const dialect = dialectOf(incoming.method, path);
    const body = await readBody(incoming);
    if (dialect === undefined || body === undefined)
      return sendJson(response, 404, { error: { type: "not_found_error", message: `no such endpoint ${path}` } });
    const model = dialect === "google" ? googleModel(path) : String(body["model"]);
    const request = { dialect, path, headers: incoming.headers, body, model, index: counts.requests++ };
    if (requests.length < requests_kept_max) requests.push(request);
    if (dialect !== "google" && body["stream"] !== true)
      return sendJson(response, 400, { error: { type: "invalid_request_error", message: "this server only streams" } });

    const answer = typeof options.answer === "function" ? options.answer(request) : options.answer;
    if (answer.refusal !== undefined) return sendJson(response, answer.refusal.status, answer.refusal.body, answer.refusal.headers);
    response.writeHead(200, { "content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache", "request-id": `req_${request.index}` });
    response.flushHeaders();
    counts.open += 1;
    try {
      await stream(response, answer, request);
    } finally {
      counts.open -= 1;
    }
  }

  async function stream(response: ServerResponse, answer: ModelAnswer, request: ModelServerRequest): Promise<void> {
    const limit_bytes = answer.cut_after_bytes ?? answer.end_after_bytes ?? Number.POSITIVE_INFINITY;
    let sent_bytes = 0;
    const send = async (bytes: Uint8Array) => {
      const allowed = bytes.subarray(0, Math.max(0, limit_bytes - sent_bytes));
      sent_bytes += allowed.length;
      const slice_bytes = answer.slice_bytes ?? Math.max(1, allowed.length);
      for (let at = 0; at < allowed.length; at += slice_bytes) await write(response, allowed.subarray(at, at + slice_bytes));
      return allowed.length === bytes.length;
    };
    // Times count from the beginning, so that late timers do not add up.
    let due_ms = performance.now();
    let whole = true;
    for (const event of answer.raw === undefined ? encodeAnswer(request.dialect, answer, request.model) : [answer.raw]) {
      if (event instanceof Uint8Array) whole = await send(event);
      else {
        due_ms += event.after_ms;
        if (event.after_ms > 0) await sleepUntil(due_ms, response);
        if (response.destroyed) return;
        whole = await send(wireBytes(event, answer.crlf === true));
        if (whole) counts.tokens += event.words ?? 0;
      }
      if (!whole) break;
    }
    if (answer.hang === true) await new Promise<void>((resolve) => void response.once("close", resolve));
    else if (answer.cut_after_bytes === undefined) response.end();
    else await cut(response);
  }

  server.on("connection", (socket) => {
    sockets.add(socket);
    socket.setNoDelay(true);
    socket.on("close", () => sockets.delete(socket));
  });
  await new Promise<void>((resolve, reject) => {
    server.once("error", reject);
    server.listen(0, "127.0.0.1", resolve);
  });

  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    requests,
    get requests_count() {
      return counts.requests;
    },
    get tokens_sent() {
      return counts.tokens;
    },
    get open_streams() {
      return counts.open;
    },
    async close() {
      const closed = new Promise<void>((resolve) => server.close(() => resolve()));
      for (const socket of sockets) socket.destroy();
      await closed;
    },
  };
}

/** The whole body of an answer as bytes, for those who want to know where to cut it. */
export function answerBytes(dialect: Dialect, answer: ModelAnswer, model = "m"): Uint8Array {
  return Buffer.concat(encodeAnswer(dialect, answer, model).map((event) => wireBytes(event, answer.crlf === true)));
}

/** An answer as the events of its dialect. */
export function encodeAnswer(dialect: Dialect, answer: ModelAnswer, model: string): WireEvent[] {
  switch (dialect) {
    case "anthropic":
      return anthropicEvents(answer, model);
    case "openai":
      return openaiEvents(answer, model);
    case "openai-responses":
      return responsesEvents(answer, model);
    case "google":
      return googleEvents(answer, model);
  }
}

function wireBytes(event: WireEvent, crlf: boolean): Uint8Array {
  const line_end = crlf ? "\r\n" : "\n";
  const head = event.event === undefined ? "" : `event: ${event.event}${line_end}`;
  return Buffer.from(`${head}data: ${event.data}${line_end}${line_end}`);
}

/** The words of an answer's text with their delays. */
function timedWords(answer: ModelAnswer): { word: string; after_ms: number }[] {
  const words =
    answer.tokens === undefined
      ? ((answer.text ?? "").match(/\s*\S+\s*$|\s*\S+|\s+$/g) ?? [])
      : Array.from({ length: answer.tokens }, (_, n) => `${n === 0 ? "" : " "}w${n}`);
  return words.map((word, n) => ({ word, after_ms: n === 0 ? (answer.first_token_ms ?? 0) : (answer.token_ms ?? 0) }));
}

function argsPieces(call: AnswerToolCall, characters: number): string[] {
  const text = typeof call.args === "string" ? call.args : JSON.stringify(call.args);
  const pieces: string[] = [];
  for (let at = 0; at < text.length; at += characters) pieces.push(text.slice(at, at + characters));
  return pieces;
}

function anthropicEvents(answer: ModelAnswer, model: string): WireEvent[] {
  const events: WireEvent[] = [];
  const say = (data: JsonObject, after_ms = 0, words = 0) => events.push({ event: String(data["type"]), data: JSON.stringify(data), after_ms, words });
  const fail = () => say({ type: "error", error: { type: answer.stream_error?.type ?? "", message: answer.stream_error?.message ?? "" } });
  if (answer.stream_error?.after_words === 0) {
    fail();
    return events;
  }
  const words = timedWords(answer);
  const { input = 10, output = Math.max(1, words.length), cache_read = 0, cache_write = 0, reasoning = 0 } = answer.usage ?? {};
  const prompt = { input_tokens: input, cache_creation_input_tokens: cache_write, cache_read_input_tokens: cache_read };
  say({
    type: "message_start",
    message: {
      id: "msg_1",
      type: "message",
      role: "assistant",
      model,
      content: [],
      stop_reason: null,
      stop_sequence: null,
      usage: { ...prompt, output_tokens: 1 },
    },
  });
  let index = 0;
  const block = (content_block: JsonObject, deltas: readonly { delta: JsonObject; after_ms?: number; words?: number }[]) => {
    say({ type: "content_block_start", index, content_block });
    if (index === 0) say({ type: "ping" });
    for (const { delta, after_ms, words: said } of deltas) say({ type: "content_block_delta", index, delta }, after_ms, said);
    say({ type: "content_block_stop", index });
    index += 1;
  };
  if (answer.thinking !== undefined) {
    block({ type: "thinking", thinking: "", signature: "" }, [
      ...(answer.thinking.match(/\s*\S+/g) ?? []).map((thinking) => ({ delta: { type: "thinking_delta", thinking } })),
      { delta: { type: "signature_delta", signature: answer.signature ?? "sig" } },
    ]);
  }
  if (answer.redacted_thinking !== undefined) block({ type: "redacted_thinking", data: answer.redacted_thinking }, []);
  if (words.length > 0) {
    const fails_after = answer.stream_error?.after_words ?? Number.POSITIVE_INFINITY;
    const said = words.slice(0, fails_after);
    block(
      { type: "text", text: "" },
      said.map(({ word, after_ms }) => ({ delta: { type: "text_delta", text: word }, after_ms, words: 1 })),
    );
    if (fails_after <= words.length) {
      events.pop(); // The block does not end.
      fail();
      return events;
    }
  }
  for (const [n, call] of (answer.tool_calls ?? []).entries()) {
    block(
      { type: "tool_use", id: call.id ?? `toolu_${n}`, name: call.name, input: {} },
      argsPieces(call, answer.args_characters ?? 5).map((partial_json) => ({ delta: { type: "input_json_delta", partial_json } })),
    );
  }
  if (answer.hang === true) return events;
  const stop_reason = answer.stop ?? ((answer.tool_calls ?? []).length > 0 ? "tool_use" : "end_turn");
  const details = reasoning === 0 ? {} : { output_tokens_details: { thinking_tokens: reasoning } };
  say({ type: "message_delta", delta: { stop_reason, stop_sequence: null }, usage: { ...prompt, output_tokens: output + reasoning, ...details } });
  say({ type: "message_stop" });
  return events;
}

function openaiEvents(answer: ModelAnswer, model: string): WireEvent[] {
  const events: WireEvent[] = [];
  const say = (data: JsonObject, after_ms = 0, words = 0) => events.push({ data: JSON.stringify(data), after_ms, words });
  const chunk = (delta: JsonObject, finish_reason: string | null = null, after_ms = 0, words = 0) =>
    say({ id: "chatcmpl-1", object: "chat.completion.chunk", created: 0, model, choices: [{ index: 0, delta, finish_reason }] }, after_ms, words);
  const fail = () => {
    const { type = "", message = "", code = null } = answer.stream_error ?? {};
    say({ error: { type, message, code } });
  };
  if (answer.stream_error?.after_words === 0) {
    fail();
    return events;
  }
  chunk({ role: "assistant", content: "" });
  for (const thought of answer.thinking?.match(/\s*\S+/g) ?? []) chunk({ [answer.reasoning_field ?? "reasoning_content"]: thought });
  const words = timedWords(answer);
  for (const [n, { word, after_ms }] of words.entries()) {
    chunk(answer.refuses === true ? { refusal: word } : { content: word }, null, after_ms, 1);
    if (answer.stream_error?.after_words === n + 1) {
      fail();
      return events;
    }
  }
  for (const [n, call] of (answer.tool_calls ?? []).entries()) {
    const index = answer.same_index === true ? 0 : n;
    const id = call.id === "" ? {} : { id: call.id ?? `call_${n}` };
    const pieces = argsPieces(call, answer.args_characters ?? 5);
    if (answer.whole_tool_calls === true) {
      chunk({ tool_calls: [{ index, ...id, type: "function", function: { name: call.name, arguments: pieces.join("") } }] });
      continue;
    }
    chunk({ tool_calls: [{ index, ...id, type: "function", function: { name: call.name, arguments: "" } }] });
    for (const piece of pieces) chunk({ tool_calls: [{ index, function: { arguments: piece } }] });
  }
  if (answer.hang === true) return events;
  chunk({}, answer.stop ?? ((answer.tool_calls ?? []).length > 0 ? "tool_calls" : "stop"));
  if (answer.no_usage !== true) {
    const { input = 10, output = Math.max(1, words.length), cache_read = 0, cache_write = 0, reasoning = 0 } = answer.usage ?? {};
    const prompt_tokens = input + cache_read + cache_write;
    const usage = {
      prompt_tokens,
      completion_tokens: output + reasoning,
      total_tokens: prompt_tokens + output + reasoning,
      prompt_tokens_details: { cached_tokens: cache_read, cache_write_tokens: cache_write },
      completion_tokens_details: { reasoning_tokens: reasoning },
    };
    say({ id: "chatcmpl-1", object: "chat.completion.chunk", created: 0, model, choices: [], usage });
  }
  if (answer.no_done !== true) events.push({ data: "[DONE]", after_ms: 0 });
  return events;
}

function responsesEvents(answer: ModelAnswer, model: string): WireEvent[] {
  const events: WireEvent[] = [];
  const say = (data: JsonObject, after_ms = 0, words = 0) =>
    events.push({ event: String(data["type"]), data: JSON.stringify({ ...data, sequence_number: events.length }), after_ms, words });
  const response = (status: string, more: JsonObject = {}) => ({
    id: "resp_1",
    object: "response",
    created_at: 0,
    status,
    error: null,
    model,
    output: [],
    ...more,
  });
  const fail = () => {
    const { type = "", message = "", code } = answer.stream_error ?? {};
    say({ type: "error", code: code ?? type, message, param: null });
  };
  if (answer.stream_error?.after_words === 0) {
    fail();
    return events;
  }
  say({ type: "response.created", response: response("in_progress") });
  say({ type: "response.in_progress", response: response("in_progress") });
  let output_index = 0;
  const item = (id: string, begun: JsonObject, done: JsonObject, deltas: () => void) => {
    say({ type: "response.output_item.added", output_index, item: { id, status: "in_progress", ...begun } });
    deltas();
    say({ type: "response.output_item.done", output_index, item: { id, status: "completed", ...done } });
    output_index += 1;
  };
  if (answer.thinking !== undefined) {
    const { thinking } = answer;
    const encrypted = answer.signature === undefined ? {} : { encrypted_content: answer.signature };
    const done = { type: "reasoning", summary: [{ type: "summary_text", text: thinking }], ...encrypted };
    item("rs_1", { type: "reasoning", summary: [] }, done, () => {
      for (const delta of thinking.match(/\s*\S+/g) ?? [])
        say({ type: "response.reasoning_summary_text.delta", item_id: "rs_1", output_index, summary_index: 0, delta });
    });
  }
  const words = timedWords(answer);
  if (words.length > 0) {
    const text = words.map(({ word }) => word).join("");
    const part = answer.refuses === true ? { type: "refusal", refusal: text } : { type: "output_text", text, annotations: [] };
    const kind = answer.refuses === true ? "refusal" : "output_text";
    say({ type: "response.output_item.added", output_index, item: { id: "msg_1", type: "message", status: "in_progress", role: "assistant", content: [] } });
    for (const [n, { word, after_ms }] of words.entries()) {
      say({ type: `response.${kind}.delta`, item_id: "msg_1", output_index, content_index: 0, delta: word }, after_ms, 1);
      if (answer.stream_error?.after_words === n + 1) {
        fail();
        return events;
      }
    }
    if (answer.hang === true) return events;
    say({ type: "response.output_item.done", output_index, item: { id: "msg_1", type: "message", status: "completed", role: "assistant", content: [part] } });
    output_index += 1;
  }
  for (const [n, call] of (answer.tool_calls ?? []).entries()) {
    const pieces = argsPieces(call, answer.args_characters ?? 5);
    const head = { type: "function_call", call_id: call.id ?? `call_${n}`, name: call.name };
    item(`fc_${n}`, { ...head, arguments: "" }, { ...head, arguments: pieces.join("") }, () => {
      if (answer.whole_tool_calls === true) return;
      for (const delta of pieces) say({ type: "response.function_call_arguments.delta", item_id: `fc_${n}`, output_index, delta });
    });
  }
  if (answer.hang === true) return events;
  const { input = 10, output = Math.max(1, words.length), cache_read = 0, cache_write = 0, reasoning = 0 } = answer.usage ?? {};
  const input_tokens = input + cache_read + cache_write;
  const counted = {
    input_tokens,
    input_tokens_details: { cached_tokens: cache_read, cache_write_tokens: cache_write },
    output_tokens: output + reasoning,
    output_tokens_details: { reasoning_tokens: reasoning },
    total_tokens: input_tokens + output + reasoning,
  };
  const usage = answer.no_usage === true ? {} : { usage: counted };
  if (answer.stop === "failed")
    say({ type: "response.failed", response: response("failed", { error: { code: "server_error", message: "it broke" }, ...usage }) });
  else if (answer.stop === undefined || answer.stop === "completed") say({ type: "response.completed", response: response("completed", usage) });
  else say({ type: "response.incomplete", response: response("incomplete", { incomplete_details: { reason: answer.stop }, ...usage }) });
  return events;
}

function googleEvents(answer: ModelAnswer, model: string): WireEvent[] {
  const events: WireEvent[] = [];
  const words = timedWords(answer);
  const { input = 10, output = Math.max(1, words.length), cache_read = 0, cache_write = 0, reasoning = 0 } = answer.usage ?? {};
  const cached = cache_read === 0 ? {} : { cachedContentTokenCount: cache_read };
  const prompt = { promptTokenCount: input + cache_read + cache_write, ...cached };
  const say = (data: JsonObject, after_ms = 0, said = 0) =>
    events.push({ data: JSON.stringify({ ...data, modelVersion: model, responseId: "r1" }), after_ms, words: said });
  const part = (one: JsonObject, after_ms = 0, said = 0) =>
    say({ candidates: [{ content: { parts: [one], role: "model" }, index: 0 }], usageMetadata: prompt }, after_ms, said);
  const fail = () => {
    const { type = "", message = "", code = 503 } = answer.stream_error ?? {};
    events.push({ data: JSON.stringify({ error: { code, message, status: type } }), after_ms: 0 });
  };
  if (answer.stream_error?.after_words === 0) {
    fail();
    return events;
  }
  if (answer.block_reason !== undefined) {
    say({ promptFeedback: { blockReason: answer.block_reason }, usageMetadata: prompt });
    return events;
  }
  const calls = answer.tool_calls ?? [];
  const signed = answer.signature === undefined ? {} : { thoughtSignature: answer.signature };
  for (const text of answer.thinking?.match(/\s*\S+/g) ?? []) part({ text, thought: true });
  for (const [n, { word, after_ms }] of words.entries()) {
    part({ text: word, ...(n === words.length - 1 && calls.length === 0 ? signed : {}) }, after_ms, 1);
    if (answer.stream_error?.after_words === n + 1) {
      fail();
      return events;
    }
  }
  for (const [n, call] of calls.entries()) {
    const id = call.id === undefined || call.id === "" ? {} : { id: call.id };
    part({ functionCall: { ...id, name: call.name, args: call.args }, ...(n === 0 ? signed : {}) });
  }
  if (answer.hang === true) return events;
  const counts =
    answer.no_usage === true
      ? {}
      : { usageMetadata: { ...prompt, candidatesTokenCount: output, ...(reasoning === 0 ? {} : { thoughtsTokenCount: reasoning }) } };
  say({ candidates: [{ content: { parts: [{ text: "" }], role: "model" }, finishReason: answer.stop ?? "STOP", index: 0 }], ...counts });
  return events;
}

function dialectOf(method: string | undefined, path: string): Dialect | undefined {
  if (method !== "POST") return undefined;
  if (/^\/v1\/messages(\?|$)/.test(path)) return "anthropic";
  if (/^(\/v1)?\/responses(\?|$)/.test(path)) return "openai-responses";
  if (/^\/v1beta\/models\/[^/:?]+:streamGenerateContent\?alt=sse$/.test(path)) return "google";
  return /^(\/v1)?\/chat\/completions(\?|$)/.test(path) ? "openai" : undefined;
}

function googleModel(path: string): string {
  return decodeURIComponent(/models\/([^/:?]+):/.exec(path)?.[1] ?? "");
}

async function readBody(incoming: IncomingMessage): Promise<JsonObject | undefined> {
  const chunks: Buffer[] = [];
  let bytes = 0;
  for await (const chunk of incoming as AsyncIterable<Buffer>) {
    bytes += chunk.length;
    if (bytes > REQUEST_BYTES_MAX) return undefined;
    chunks.push(chunk);
  }
  try {
    return JSON.parse(Buffer.concat(chunks).toString("utf8")) as JsonObject;
  } catch {
    return undefined; // Not a request of either dialect; the caller answers 404.
  }
}

function sendJson(response: ServerResponse, status: number, body: Json, headers: Readonly<Record<string, string>> = {}): void {
  response.writeHead(status, { "content-type": "application/json", ...headers });
  response.end(JSON.stringify(body));
}

/** Writes, and waits while the client does not keep up. */
async function write(response: ServerResponse, bytes: Uint8Array): Promise<void> {
  if (response.destroyed || response.write(bytes)) return;
  await new Promise<void>((resolve) => {
    const end = () => {
      response.off("drain", end);
      response.off("close", end);
      resolve();
    };
    response.once("drain", end);
    response.once("close", end);
  });
}

/** Cuts the connection behind what was written: the writes leave in the next tick, and the socket closes when they have. */
async function cut(response: ServerResponse): Promise<void> {
  await new Promise((resolve) => setImmediate(resolve));
  response.socket?.destroySoon();
}

function sleepUntil(due_ms: number, response: ServerResponse): Promise<void> {
  const delay_ms = due_ms - performance.now();
  if (delay_ms <= 0 || response.destroyed) return Promise.resolve();
  return new Promise((resolve) => {
    const end = () => {
      clearTimeout(timer);
      response.off("close", end);
      resolve();
    };
    const timer = setTimeout(end, delay_ms);
    response.once("close", end);
  });
}
