// settings: everything a process of ours can be told from outside, read once from its environment and checked.
import { resolve } from "node:path";
import { z } from "zod";
import { LEASE_TTL_MS, PASSIVATE_AFTER_MS, SHARDS_EMBEDDED } from "../protocol/limits.ts";

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
  TROUPE_NATS_MONITOR_URL: filled.optional(),
  TROUPE_NATS_PORT: port.optional(),
  TROUPE_NATS_MONITOR_PORT: port.optional(),
  TROUPE_POSTGRES_URL: filled.optional(),
  TROUPE_POSTGRES_PORT: port.optional(),
  TROUPE_SHARDS: z.coerce.number().int().min(1).max(1024).default(SHARDS_EMBEDDED),
  TROUPE_REPLICAS: z.coerce.number().int().min(1).max(5).default(1),
  TROUPE_WORKERS: z.coerce.number().int().min(1).max(64).default(2),
  TROUPE_LOG_LEVEL: z.enum(["debug", "info", "warn", "error"]).default("info"),
  TROUPE_HTTP_PORT: port.default(0),
  TROUPE_PASSIVATE_AFTER_MS: z.coerce.number().int().min(100).default(PASSIVATE_AFTER_MS),
  TROUPE_LEASE_TTL_MS: z.coerce.number().int().min(1000).default(LEASE_TTL_MS),
  ANTHROPIC_API_KEY: z.string().optional(),
  ANTHROPIC_BASE_URL: z.string().optional(),
  OPENAI_API_KEY: z.string().optional(),
  OPENAI_BASE_URL: z.string().optional(),
  OTEL_EXPORTER_OTLP_ENDPOINT: z.string().optional(),
});

export type Settings = z.infer<typeof shape>;

export type SettingsOutcome = { readonly kind: "settings"; readonly settings: Settings } | { readonly kind: "invalid"; readonly faults: readonly string[] };

/** Empty variables count as unset. */
export function readSettings(env: Readonly<Record<string, string | undefined>>, directory: string): SettingsOutcome {
  const present = Object.fromEntries(Object.entries(env).filter(([, value]) => value !== undefined && value !== ""));
  const parsed = shape.safeParse(present);
  if (!parsed.success) return { kind: "invalid", faults: parsed.error.issues.map((issue) => `${issue.path.join(".")}: ${issue.message}`) };
  return { kind: "settings", settings: { ...parsed.data, TROUPE_HOME: resolve(directory, parsed.data.TROUPE_HOME) } };
}

/** Which agent the demonstration gets: a real model when there is a key for one, else the simulated one. */
export function demonstrationModel(settings: Settings): { readonly model: string; readonly session: string } {
  if (settings.ANTHROPIC_API_KEY) return { model: "anthropic/claude-sonnet-5", session: "hello-anthropic" };
  if (settings.OPENAI_API_KEY) return { model: "openai/gpt-5.6-luna", session: "hello-openai" };
  return { model: "simulated/echo", session: "hello" };
}
