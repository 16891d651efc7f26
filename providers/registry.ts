// registry: which providers this process can call, and the name of a model read as provider and model. Made once by main.ts, which alone
// reads the environment.
//
// `openai/…` goes through Chat Completions, except for the models that OpenAI serves in its Responses API alone (openai-responses.ts says which);
// `openai-responses/…` forces the latter. Both use the same key. Any other server that speaks Chat Completions (Ollama, vLLM, a proxy) gets a name of its
// own in the configuration, and its models are `{name}/{model}`.
//
// A provider can be called with the platform's key, which is given here, or with a key of somebody's own (`withKey`), also where the platform has none.
import { assert } from "../protocol/assert.ts";
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { anthropicProvider } from "./anthropic.ts";
import type { Patience } from "./attempt.ts";
import { googleProvider } from "./google.ts";
import { modelError } from "./model-error.ts";
import { OPENAI_BASE_URL } from "./openai-client.ts";
import { onlyInResponses, openaiResponsesProvider } from "./openai-responses.ts";
import { openaiProvider } from "./openai.ts";
import type { ModelError, Provider } from "./provider.ts";
import { SIMULATED_MODELS, simulatedProvider } from "./simulated.ts";
import type { SdkProviderSettings } from "./transport.ts";

export interface ProviderCredential {
  readonly api_key: string;
  /** The provider's own when absent or empty. The SDKs' usual variables: ANTHROPIC_BASE_URL (without /v1), OPENAI_BASE_URL (with /v1), GOOGLE_GEMINI_BASE_URL (without /v1beta). */
  readonly base_url?: string;
}

/** A server that speaks OpenAI's Chat Completions. */
export interface CompatibleServer {
  /** What its models' names begin with: a lower-case word that no provider of ours has. */
  readonly name: string;
  /** With /v1, as OpenAI's own. */
  readonly base_url: string;
  /** Servers of one's own mostly want none. */
  readonly api_key?: string;
}

export interface ProvidersOptions {
  /** Absent, or with an empty key: not configured. */
  readonly anthropic?: ProviderCredential;
  readonly openai?: ProviderCredential;
  readonly google?: ProviderCredential;
  readonly compatible?: readonly CompatibleServer[];
  readonly world: World;
  readonly log: Log;
  readonly patience?: Patience;
}

/** Whose key a call is made with. */
export type KeySource = "platform" | "tenant";

/** The owner of the platform's keys, for breakers. No tenant is called so: a tenant's is `tenant.{id}`. */
export const PLATFORM_OWNER = "platform";

export type Resolution =
  | {
      readonly kind: "resolved";
      readonly provider: Provider;
      readonly model: string;
      readonly key_source: KeySource;
      /** Whose key it is: PLATFORM_OWNER, or a tenant's. */
      readonly owner: string;
    }
  | { readonly kind: "refused"; readonly error: ModelError };

export interface Providers {
  /**
   * Reads `{provider}/{model}`. Refuses with `model_unknown` a name without a provider, a provider that does not exist or is not configured, and a
   * simulated model that does not exist. Whether a real provider has the model, only its answer tells.
   */
  resolve(model: string): Resolution;
  /** Names of the providers that can be called with the platform's keys, sorted. `simulated` is always among them. */
  readonly configured: readonly string[];
  /** Names of the providers that can be called with a key of somebody's own, sorted. */
  readonly takes_keys: readonly string[];
  /** Under which of these names the key for a model is kept: both of OpenAI's dialects have one. Undefined where none is taken. */
  keyNameOf(model: string): string | undefined;
  /** The provider of a model that takes keys, as a client with this one. It keeps the key as long as it lives. */
  withKey(model: string, api_key: string): Provider;
}

const SDK_PROVIDERS = { anthropic: anthropicProvider, openai: bothDialects, google: googleProvider } as const satisfies Record<
  string,
  (settings: SdkProviderSettings) => Provider
>;

const RESERVED: ReadonlySet<string> = new Set([...Object.keys(SDK_PROVIDERS), "openai-responses", "simulated"]);
const NAME_PATTERN = /^[a-z0-9][a-z0-9_-]{0,31}$/;
/** The SDK wants a key; a server that wants none does not look at it. */
const NO_KEY = "none";

/** Elsewhere than at OpenAI itself, a model's name says nothing about which dialect it is served in. */
function bothDialects(settings: SdkProviderSettings): Provider {
  const chat = openaiProvider(settings);
  const at_openai = new URL(settings.base_url ?? OPENAI_BASE_URL).hostname === new URL(OPENAI_BASE_URL).hostname;
  if (!at_openai) return chat;
  const responses = openaiResponsesProvider(settings);
  return { name: chat.name, call: (request, io) => (onlyInResponses(request.model) ? responses : chat).call(request, io) };
}

export function createProviders(options: ProvidersOptions): Providers {
  const { world, log } = options;
  const patience = options.patience === undefined ? {} : { patience: options.patience };
  const providers = new Map<string, Provider>([["simulated", simulatedProvider({ world, log, ...patience })]]);
  const absences = new Map<string, string>();
  /** For each that takes keys, by the name in a model's name: how a client is made of one. */
  const makers = new Map<string, { readonly key_name: string; make(api_key: string): Provider }>();

  for (const name of ["anthropic", "openai", "google"] as const) {
    const api_key = options[name]?.api_key.trim() ?? "";
    const base_url = options[name]?.base_url?.trim() ?? "";
    if (base_url !== "" && !isHttpUrl(base_url)) {
      absences.set(name, `the base URL of the provider ${name} is not an http URL, or holds a password`);
      log.error("a provider's base URL is not an http URL without a password; the provider is off", { provider: name });
      continue;
    }
    const settings = { world, log, ...patience, ...(base_url === "" ? {} : { base_url }) };
    makers.set(name, { key_name: name, make: (key) => SDK_PROVIDERS[name]({ ...settings, api_key: key }) });
    if (name === "openai") makers.set("openai-responses", { key_name: name, make: (key) => openaiResponsesProvider({ ...settings, api_key: key }) });
    if (api_key === "") absences.set(name, `the provider ${name} has no key here`);
  }
  for (const [name, { key_name, make }] of makers) {
    const api_key = options[key_name as keyof typeof SDK_PROVIDERS]?.api_key.trim() ?? "";
    if (api_key !== "") providers.set(name, make(api_key));
  }
  if (!providers.has("openai")) absences.set("openai-responses", absences.get("openai") ?? "the provider openai has no key here");
  for (const { name, base_url, api_key = "" } of options.compatible ?? []) {
    const url = base_url.trim();
    if (!NAME_PATTERN.test(name) || RESERVED.has(name) || providers.has(name)) {
      log.error("the name of an OpenAI-compatible server is taken or no lower-case word; it is off", { provider: name });
    } else if (!isHttpUrl(url)) {
      absences.set(name, `the base URL of the provider ${name} is not an http URL, or holds a password`);
      log.error("a provider's base URL is not an http URL without a password; the provider is off", { provider: name });
    } else {
      const make = (key: string): Provider => openaiProvider({ name, api_key: key, base_url: url, world, log, ...patience });
      makers.set(name, { key_name: name, make });
      providers.set(name, make(api_key.trim() === "" ? NO_KEY : api_key.trim()));
    }
  }

  return {
    configured: [...providers.keys()].sort(),
    takes_keys: [...new Set([...makers.values()].map(({ key_name }) => key_name))].sort(),
    keyNameOf: (model) => makers.get(nameAndRest(model).name)?.key_name,
    withKey(model, api_key) {
      const maker = makers.get(nameAndRest(model).name);
      assert(maker !== undefined, "a client is made for a provider that takes keys");
      return maker.make(api_key);
    },
    resolve(model) {
      const { name, rest } = nameAndRest(model);
      if (name === "" || rest === "") return refused(`a model is named {provider}/{model}, and ${JSON.stringify(model)} is not`);
      const provider = providers.get(name);
      if (provider === undefined) return refused(absences.get(name) ?? `there is no provider ${JSON.stringify(name)}`);
      if (name === "simulated" && !(SIMULATED_MODELS as readonly string[]).includes(rest)) {
        return refused(`simulated models are ${SIMULATED_MODELS.join(" and ")}, not ${JSON.stringify(rest)}`);
      }
      return { kind: "resolved", provider, model: rest, key_source: "platform", owner: PLATFORM_OWNER };
    },
  };
}

function nameAndRest(model: string): { readonly name: string; readonly rest: string } {
  const slash = model.indexOf("/");
  return { name: model.slice(0, Math.max(slash, 0)), rest: model.slice(slash + 1) };
}

function refused(message: string): Resolution {
  return { kind: "refused", error: modelError("model_unknown", message) };
}

/** One that holds a name and a password is none: fetch refuses it, and quotes the password in its refusal. */
function isHttpUrl(text: string): boolean {
  if (!URL.canParse(text)) return false;
  const url = new URL(text);
  return /^https?:$/.test(url.protocol) && url.username === "" && url.password === "";
}
