// registry: which providers this process can call, and the name of a model read as provider and model. Made once by main.ts, which alone
// reads the environment.
import type { Log } from "../protocol/log.ts";
import type { World } from "../protocol/world.ts";
import { anthropicProvider } from "./anthropic.ts";
import type { Patience } from "./attempt.ts";
import { modelError } from "./model-error.ts";
import { openaiProvider } from "./openai.ts";
import type { ModelError, Provider } from "./provider.ts";
import { SIMULATED_MODELS, simulatedProvider } from "./simulated.ts";
import type { SdkProviderSettings } from "./transport.ts";

export interface ProviderCredential {
  readonly api_key: string;
  /** The provider's own when absent or empty. The SDKs' usual variables: ANTHROPIC_BASE_URL (without /v1), OPENAI_BASE_URL (with /v1). */
  readonly base_url?: string;
}

export interface ProvidersOptions {
  /** Absent, or with an empty key: not configured. */
  readonly anthropic?: ProviderCredential;
  readonly openai?: ProviderCredential;
  readonly world: World;
  readonly log: Log;
  readonly patience?: Patience;
}

export type Resolution =
  | { readonly kind: "resolved"; readonly provider: Provider; readonly model: string }
  | { readonly kind: "refused"; readonly error: ModelError };

export interface Providers {
  /**
   * Reads `{provider}/{model}`. Refuses with `model_unknown` a name without a provider, a provider that does not exist or is not configured, and a
   * simulated model that does not exist. Whether a real provider has the model, only its answer tells.
   */
  resolve(model: string): Resolution;
  /** Names of the providers that can be called, sorted. `simulated` is always among them. */
  readonly configured: readonly string[];
}

const SDK_PROVIDERS = { anthropic: anthropicProvider, openai: openaiProvider } as const satisfies Record<string, (settings: SdkProviderSettings) => Provider>;

export function createProviders(options: ProvidersOptions): Providers {
  const { world, log } = options;
  const patience = options.patience === undefined ? {} : { patience: options.patience };
  const providers = new Map<string, Provider>([["simulated", simulatedProvider({ world, log, ...patience })]]);
  const absences = new Map<string, string>();

  for (const name of ["anthropic", "openai"] as const) {
    const api_key = options[name]?.api_key.trim() ?? "";
    const base_url = options[name]?.base_url?.trim() ?? "";
    if (api_key === "") {
      absences.set(name, `the provider ${name} has no key here`);
    } else if (base_url !== "" && !isHttpUrl(base_url)) {
      absences.set(name, `the base URL of the provider ${name} is not an http URL, or holds a password`);
      log.error("a provider's base URL is not an http URL without a password; the provider is off", { provider: name });
    } else {
      providers.set(name, SDK_PROVIDERS[name]({ api_key, world, log, ...patience, ...(base_url === "" ? {} : { base_url }) }));
    }
  }

  return {
    configured: [...providers.keys()].sort(),
    resolve(model) {
      const slash = model.indexOf("/");
      const name = model.slice(0, Math.max(slash, 0));
      const rest = model.slice(slash + 1);
      if (name === "" || rest === "") return refused(`a model is named {provider}/{model}, and ${JSON.stringify(model)} is not`);
      const provider = providers.get(name);
      if (provider === undefined) return refused(absences.get(name) ?? `there is no provider ${JSON.stringify(name)}`);
      if (name === "simulated" && !(SIMULATED_MODELS as readonly string[]).includes(rest)) {
        return refused(`simulated models are ${SIMULATED_MODELS.join(" and ")}, not ${JSON.stringify(rest)}`);
      }
      return { kind: "resolved", provider, model: rest };
    },
  };
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
