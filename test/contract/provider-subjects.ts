// provider-subjects: the adapters under the contract, each with a way to make it answer as a scenario says: the real SDKs against the local
// model server, the simulated model by a script that says the same.
import { silentLog } from "../../protocol/log.ts";
import type { World } from "../../protocol/world.ts";
import { anthropicProvider } from "../../providers/anthropic.ts";
import type { Patience } from "../../providers/attempt.ts";
import { googleProvider } from "../../providers/google.ts";
import { openaiResponsesProvider } from "../../providers/openai-responses.ts";
import { openaiProvider } from "../../providers/openai.ts";
import type { CallIo, ModelDelta, ModelOutcome, ModelRequest, Provider } from "../../providers/provider.ts";
import { simulatedProvider } from "../../providers/simulated.ts";
import { type Dialect, type ModelAnswer, type ModelServer, type ModelServerRequest, startModelServer } from "./model-server.ts";

/** Without the shape of any provider's keys, so that only knowing it hides it. */
export const API_KEY = "SENTINEL_KEY_XYZ_0123456789";

export const world: World = {
  now_ms: () => Date.now(),
  monotonic_ms: () => performance.now(),
  after(delay_ms, callback) {
    const timer = setTimeout(callback, delay_ms);
    return () => clearTimeout(timer);
  },
  random: () => 0.5,
  id: () => "id",
};

export interface Subject {
  readonly name: Dialect | "simulated";
  /** Absent for the simulated one. */
  readonly server?: ModelServer;
  /** The provider, and a request that it will answer as told. */
  tell(
    answer: ModelAnswer,
    options?: { readonly patience?: Patience; readonly request?: Partial<ModelRequest> },
  ): { provider: Provider; request: ModelRequest };
  close(): Promise<void>;
}

export const REQUEST: ModelRequest = {
  model: "m",
  instructions: "Be brief.",
  messages: [{ role: "user", text: "Hello" }],
  tools: [{ name: "look", description: "Looks", parameters: { type: "object", properties: { at: { type: "string" } } } }],
  max_output_tokens: 1000,
  idempotency_key: "acme/session/s1/12:model",
};

const ADAPTERS = {
  anthropic: anthropicProvider,
  openai: openaiProvider,
  "openai-responses": openaiResponsesProvider,
  google: googleProvider,
} as const satisfies Record<Dialect, unknown>;

export async function sdkSubject(dialect: Dialect): Promise<Subject & { readonly server: ModelServer }> {
  const answers = new Map<string, ModelAnswer>();
  // Calls overlap: each request names its answer by its model.
  const server = await startModelServer({ answer: (request: ModelServerRequest) => answers.get(request.model) ?? {} });
  const providers = new Map<string, Provider>();
  let told = 0;
  return {
    name: dialect,
    server,
    tell(answer, options = {}) {
      const model = options.request?.model ?? `m${told++}`;
      answers.set(model, answer);
      const key = JSON.stringify(options.patience ?? null);
      const settings = { api_key: API_KEY, world, log: silentLog, ...(options.patience === undefined ? {} : { patience: options.patience }) };
      const provider = providers.get(key) ?? ADAPTERS[dialect]({ ...settings, base_url: dialect.startsWith("openai") ? `${server.url}/v1` : server.url });
      providers.set(key, provider);
      return { provider, request: { ...REQUEST, ...options.request, model } };
    },
    close: () => server.close(),
  };
}

export function simulatedSubject(): Subject {
  return {
    name: "simulated",
    tell(answer, options = {}) {
      const provider = simulatedProvider({ world, log: silentLog, ...(options.patience === undefined ? {} : { patience: options.patience }) });
      const messages = [{ role: "user" as const, text: JSON.stringify(scriptOf(answer)) }];
      return { provider, request: { ...REQUEST, messages, ...options.request, model: "script" } };
    },
    close: () => Promise.resolve(),
  };
}

function scriptOf(answer: ModelAnswer): object[] {
  const times = { first_token_ms: answer.first_token_ms ?? 0, token_ms: answer.token_ms ?? 0 };
  const error = answer.stream_error;
  const text = error === undefined ? (answer.text ?? "") : ((answer.text ?? "").match(/\s*\S+/g) ?? []).slice(0, error.after_words).join("");
  return [
    ...(answer.thinking === undefined ? [] : [{ think: answer.thinking }]),
    ...(answer.tokens === undefined ? (text === "" ? [] : [{ say: text, ...times }]) : [{ say: "w", tokens: answer.tokens, ...times }]),
    ...(error === undefined ? [] : [{ fail: "overloaded" }]),
    ...(answer.hang === true ? [{ say: "never", first_token_ms: 3_600_000 }] : []),
    ...(answer.tool_calls ?? []).map((call) => ({ call: call.name, args: call.args })),
  ];
}

/** One call, with everything it said and when. */
export async function callOnce(
  told: { provider: Provider; request: ModelRequest },
  io: Partial<CallIo> = {},
): Promise<{ outcome: ModelOutcome; deltas: ModelDelta[]; text: string }> {
  const deltas: ModelDelta[] = [];
  const outcome = await told.provider.call(told.request, {
    signal: io.signal ?? new AbortController().signal,
    on_delta(delta) {
      deltas.push(delta);
      io.on_delta?.(delta);
    },
  });
  return { outcome, deltas, text: textOf(deltas) };
}

export function textOf(deltas: readonly ModelDelta[], kind: ModelDelta["kind"] = "text"): string {
  return deltas
    .filter((delta) => delta.kind === kind)
    .map((delta) => delta.text)
    .join("");
}
