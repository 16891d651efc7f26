// settings: everything a process of ours can be told from outside, read once from its environment and checked.
import { resolve } from "node:path";
import { z } from "zod";
import { type OidcIssuer, readOidc } from "../gateway/oidc-issuers.ts";
import { readMasterKeys } from "../protocol/key-ring.ts";
import {
  CALLS_MAX,
  CALLS_MAX_MAX,
  EDGE_ACCOUNTS_DEFAULT,
  GATEWAY_REQUESTS_PER_S,
  LEASE_TTL_MS,
  PASSIVATE_AFTER_MS,
  SHARDS_EMBEDDED,
  TENANT_CALLS_WAITING_MAX,
  TENANT_COMMANDS_BYTES_MAX,
  TENANT_COMMANDS_STORED_MAX,
  TENANT_COMMANDS_WAITING_MAX,
} from "../protocol/limits.ts";
import { REFUSE_PERCENT_MIN } from "../actors/pressure.ts";
import { UNDECIDED_MODES } from "../actors/undecided-rates.ts";
import { WEBHOOK_KEY_CHARACTERS_MIN } from "../protocol/webhook-signature.ts";
import type { CompatibleServer, ProvidersOptions } from "../providers/registry.ts";

const port = z.coerce.number().int().min(0).max(65_535);
const filled = z.string().min(1);

const shape = z.object({
  /** Where local state lives. */
  TROUPE_HOME: filled.default(".troupe"),
  /** The gateway's port; 0 takes any. */
  TROUPE_PORT: port.default(8787),
  TROUPE_NATS_URL: filled.optional(),
  TROUPE_NATS_USER: z.string().optional(),
  TROUPE_NATS_PASSWORD: z.string().optional(),
  /** A file instead of user and password: a user's JWT with its key (`.creds`), or the seed of an nkey. Read anew at every connection. */
  TROUPE_NATS_CREDS: filled.optional(),
  /** A login of the broker's system account, for supervisors: they see a killed worker at once. Without it the leases alone decide. */
  TROUPE_NATS_SYSTEM_USER: z.string().optional(),
  TROUPE_NATS_SYSTEM_PASSWORD: z.string().optional(),
  TROUPE_NATS_SYSTEM_CREDS: filled.optional(),
  /** The runtime's account, as the broker names it. */
  TROUPE_NATS_ACCOUNT: z
    .string()
    .regex(/^[A-Za-z0-9_-]+$/)
    .default("RT"),
  /** Files in PEM. With an authority the broker is spoken to under TLS and must show a certificate of it. */
  TROUPE_NATS_TLS_CA: filled.optional(),
  TROUPE_NATS_TLS_CERT: filled.optional(),
  TROUPE_NATS_TLS_KEY: filled.optional(),
  /** For gateways: the login that answers the broker's questions about tenants' clients, and the keys that its answers are signed and sealed with. */
  TROUPE_NATS_AUTH_USER: z.string().optional(),
  TROUPE_NATS_AUTH_PASSWORD: z.string().optional(),
  TROUPE_NATS_AUTH_ISSUER_SEED: z.string().optional(),
  TROUPE_NATS_AUTH_EXCHANGE_SEED: z.string().optional(),
  /** For gateways: a login of the broker's system account that may list and end connections. */
  TROUPE_NATS_WARDEN_USER: z.string().optional(),
  TROUPE_NATS_WARDEN_PASSWORD: z.string().optional(),
  /** As many accounts EDGE_0 … as the broker's configuration has; each tenant that comes onto the bus takes one. */
  TROUPE_NATS_EDGE_ACCOUNTS: z.coerce.number().int().min(0).max(100_000).default(EDGE_ACCOUNTS_DEFAULT),
  /** Of a development machine alone: admits the logins of dev.json. */
  TROUPE_NATS_STAND_IN_SECRET: z.string().optional(),
  /** Issuers whose JWTs count, as JSON: gateway/oidc.ts. */
  TROUPE_OIDC: filled.optional(),
  TROUPE_NATS_MONITOR_URL: filled.optional(),
  TROUPE_NATS_PORT: port.optional(),
  TROUPE_NATS_MONITOR_PORT: port.optional(),
  TROUPE_POSTGRES_URL: filled.optional(),
  TROUPE_POSTGRES_PORT: port.optional(),
  TROUPE_SHARDS: z.coerce.number().int().min(1).max(1024).default(SHARDS_EMBEDDED),
  TROUPE_REPLICAS: z.coerce.number().int().min(1).max(5).default(1),
  TROUPE_WORKERS: z.coerce.number().int().min(1).max(64).default(2),
  /** Calls of models that one worker makes at once. It can be changed while the worker runs: `troupe waits --calls-max N`. */
  TROUPE_MODEL_CALLS_MAX: z.coerce.number().int().min(1).max(CALLS_MAX_MAX).default(CALLS_MAX),
  /** Of one tenant, in one worker: calls that wait, and commands. TROUPE_REFUSE_FROM_PERCENT says from when on more are refused as `overloaded`. */
  TROUPE_TENANT_CALLS_WAITING_MAX: z.coerce.number().int().min(1).max(1_000_000).default(TENANT_CALLS_WAITING_MAX),
  TROUPE_TENANT_COMMANDS_WAITING_MAX: z.coerce.number().int().min(1).max(1_000_000).default(TENANT_COMMANDS_WAITING_MAX),
  /** Of one tenant, in the stream of commands, before any worker has them: messages and bytes. Refused is where they enter. */
  TROUPE_TENANT_COMMANDS_STORED_MAX: z.coerce.number().int().min(1).max(100_000_000).default(TENANT_COMMANDS_STORED_MAX),
  TROUPE_TENANT_COMMANDS_BYTES_MAX: z.coerce.number().int().min(1).max(1_000_000_000_000).default(TENANT_COMMANDS_BYTES_MAX),
  /** The share of these bounds from which on more is refused: 90 by default, and 80 under `up`; taken again 20 below. */
  TROUPE_REFUSE_FROM_PERCENT: z.coerce.number().int().min(REFUSE_PERCENT_MIN).max(100).optional(),
  /** Whether a call goes on whose rate cannot be decided, because its tenant's budget cannot be asked: actors/undecided-rates.ts. Money is always closed. */
  TROUPE_RATES_UNDECIDED: z.enum(UNDECIDED_MODES).default("closed"),
  TROUPE_LOG_LEVEL: z.enum(["debug", "info", "warn", "error"]).default("info"),
  TROUPE_HTTP_PORT: port.default(0),
  TROUPE_PASSIVATE_AFTER_MS: z.coerce.number().int().min(100).default(PASSIVATE_AFTER_MS),
  /**
   * Master keys under which tenants' own provider keys rest, for gateways and workers: `id:base64` of 32 bytes each, the one that seals first, separated
   * by commas or lines. A file is read anew when it changes. One of the two, or none: then tenants have no keys of their own.
   */
  TROUPE_MASTER_KEYS: filled.optional(),
  TROUPE_MASTER_KEYS_FILE: filled.optional(),
  /** Requests of one tenant that a gateway serves in a second. More than one process can serve of one tenant; lower it where tenants are many. */
  TROUPE_GATEWAY_REQUESTS_PER_S: z.coerce.number().int().min(1).max(1_000_000).default(GATEWAY_REQUESTS_PER_S),
  /** What the secrets of webhooks are derived from: the same for every worker and gateway. Without it events wait. */
  TROUPE_WEBHOOK_KEY: z.string().min(WEBHOOK_KEY_CHARACTERS_MIN).optional(),
  /** `allow` on a development machine alone: webhooks may then reach it and its network, and need no TLS. */
  TROUPE_PRIVATE_ADDRESSES: z.enum(["refuse", "allow"]).default("refuse"),
  TROUPE_LEASE_TTL_MS: z.coerce.number().int().min(1000).default(LEASE_TTL_MS),
  ANTHROPIC_API_KEY: z.string().optional(),
  ANTHROPIC_BASE_URL: z.string().optional(),
  OPENAI_API_KEY: z.string().optional(),
  OPENAI_BASE_URL: z.string().optional(),
  GEMINI_API_KEY: z.string().optional(),
  /** The older name of the same key. */
  GOOGLE_API_KEY: z.string().optional(),
  GOOGLE_GEMINI_BASE_URL: z.string().optional(),
  /** Servers that speak OpenAI's Chat Completions: `name=url[,name=url]`. The key of one, where it wants any: OPENAI_COMPATIBLE_KEY_{NAME}. */
  TROUPE_OPENAI_COMPATIBLE: filled.optional(),
  OTEL_EXPORTER_OTLP_ENDPOINT: z.string().optional(),
});

export interface Settings extends z.infer<typeof shape> {
  readonly compatible_servers: readonly CompatibleServer[];
  readonly oidc: readonly OidcIssuer[];
}

export type SettingsOutcome = { readonly kind: "settings"; readonly settings: Settings } | { readonly kind: "invalid"; readonly faults: readonly string[] };

/** Empty variables count as unset. */
export function readSettings(env: Readonly<Record<string, string | undefined>>, directory: string): SettingsOutcome {
  const present = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== undefined && value !== ""));
  const parsed = shape.safeParse(present);
  if (!parsed.success) return { kind: "invalid", faults: parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`) };
  const compatible = compatibleServers(parsed.data.TROUPE_OPENAI_COMPATIBLE ?? "", present);
  if (typeof compatible === "string") return { kind: "invalid", faults: [compatible] };
  const oidc = parsed.data.TROUPE_OIDC === undefined ? undefined : readOidc(parsed.data.TROUPE_OIDC);
  if (oidc?.kind === "invalid") return { kind: "invalid", faults: [`TROUPE_OIDC: ${oidc.fault}`] };
  const { TROUPE_MASTER_KEYS: master_keys, TROUPE_MASTER_KEYS_FILE: master_keys_file } = parsed.data;
  if (master_keys !== undefined && master_keys_file !== undefined)
    return { kind: "invalid", faults: ["TROUPE_MASTER_KEYS and TROUPE_MASTER_KEYS_FILE are both set, and one of them would be ignored"] };
  const reading = master_keys === undefined ? undefined : readMasterKeys(master_keys);
  if (reading?.kind === "invalid") return { kind: "invalid", faults: [`TROUPE_MASTER_KEYS: ${reading.fault}`] };
  return {
    kind: "settings",
    settings: {
      ...parsed.data,
      ...(master_keys_file === undefined ? {} : { TROUPE_MASTER_KEYS_FILE: resolve(directory, master_keys_file) }),
      TROUPE_HOME: resolve(directory, parsed.data.TROUPE_HOME),
      compatible_servers: compatible,
      oidc: oidc?.issuers ?? [],
    },
  };
}

/** The servers of TROUPE_OPENAI_COMPATIBLE with their keys, or what is wrong with it. */
function compatibleServers(text: string, env: Readonly<Record<string, string | undefined>>): CompatibleServer[] | string {
  const servers: CompatibleServer[] = [];
  for (const part of text.split(",").map((one) => one.trim())) {
    if (part === "") continue;
    const equals = part.indexOf("=");
    const [name, base_url] = [part.slice(0, Math.max(equals, 0)).trim(), part.slice(equals + 1).trim()];
    // The URL is not repeated: somebody may have written a password into it.
    if (!/^[a-z0-9][a-z0-9_-]{0,31}$/.test(name) || base_url === "") return "TROUPE_OPENAI_COMPATIBLE: it is name=url[,name=url], the names lower-case words";
    const api_key = env[`OPENAI_COMPATIBLE_KEY_${name.toUpperCase().replaceAll("-", "_")}`];
    servers.push({ name, base_url, ...(api_key === undefined ? {} : { api_key }) });
  }
  return servers;
}

/** Keys and addresses of the providers, as the registry of providers wants them. */
export function providerCredentials(settings: Settings): Pick<ProvidersOptions, "anthropic" | "openai" | "google" | "compatible"> {
  const google_key = settings.GEMINI_API_KEY ?? settings.GOOGLE_API_KEY;
  // Without a key too: a tenant may have one of its own, and it goes to the same address.
  return {
    anthropic: { api_key: settings.ANTHROPIC_API_KEY ?? "", base_url: settings.ANTHROPIC_BASE_URL ?? "" },
    openai: { api_key: settings.OPENAI_API_KEY ?? "", base_url: settings.OPENAI_BASE_URL ?? "" },
    google: { api_key: google_key ?? "", base_url: settings.GOOGLE_GEMINI_BASE_URL ?? "" },
    compatible: settings.compatible_servers,
  };
}

/** Which agent the demonstration gets: a real model when there is a key for one, else the simulated one. */
export function demonstrationModel(settings: Settings): { readonly model: string; readonly session: string } {
  if (settings.ANTHROPIC_API_KEY) return { model: "anthropic/claude-sonnet-5", session: "hello-anthropic" };
  if (settings.OPENAI_API_KEY) return { model: "openai/gpt-5.6-luna", session: "hello-openai" };
  if (settings.GEMINI_API_KEY ?? settings.GOOGLE_API_KEY) return { model: "google/gemini-3.5-flash", session: "hello-google" };
  return { model: "simulated/echo", session: "hello" };
}
