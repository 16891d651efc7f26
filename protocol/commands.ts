// commands: what may be asked of an actor, and how a command is read off a message.
//
// The tenant and the actor come from the subject, never from the body. A message is decoded to a value or to a refusal;
// nothing in it can make decoding throw.
import { unpack } from "msgpackr";
import { z } from "zod";
import { COST_PROJECTIONS } from "./cost-projection.ts";
import { type ErrorBody, errorBody } from "./errors.ts";
import { type ActorKind, ID_PATTERN } from "./ids.ts";
import type { Json } from "./json.ts";
import { CIPHERTEXT_CHARACTERS_MAX } from "./key-ring.ts";
import { CALL_TIMEOUT_MS_MAX, COMMAND_BYTES_MAX, IDEMPOTENCY_KEY_BYTES_MAX, LOOPS_MAX, METADATA_KEYS_MAX, SESSIONS_COUNTED_MAX } from "./limits.ts";
import { isPrincipal } from "./principal.ts";
import { PRIORITIES } from "./priority.ts";
import { AFTER_MAX, MESSAGE_ID_PATTERN } from "./session-parent.ts";
import type { CommandChannel } from "./subjects.ts";

export const HEADER_IDEMPOTENCY_KEY = "Idempotency-Key";
export const HEADER_REPLY_TO = "Troupe-Reply-To";
export const HEADER_CONTENT_TYPE = "Content-Type";
export const HEADER_TRACEPARENT = "traceparent";
/** Who said it, as a process of ours knows (protocol/principal.ts). From a tenant's client it counts for nothing. */
export const HEADER_PRINCIPAL = "Troupe-Principal";
/** On the fast lane: the actor's subject that the command is meant for. */
export const HEADER_SUBJECT = "Troupe-Subject";
/** Keys that our own clients make for senders that gave none; remembered only as long as such a client may still repeat. */
export const AUTOMATIC_KEY_PREFIX = "auto:";
/** `{process nonce}.{n}` on every append: tells one's own write from a rival's. */
export const HEADER_COMMIT = "Troupe-Commit";
/** On the last, empty message of a replay. */
export const HEADER_DONE = "Troupe-Done";

const id = z.string().regex(ID_PATTERN, "1 to 64 of A-Z a-z 0-9 _ -");
const reason = z.object({ reason: z.string().max(1000).optional() });

const textPart = z.object({ type: z.literal("text"), text: z.string() });
export const messageContent = z.union([z.string().min(1), z.array(textPart).min(1).max(100)]);
export type MessageContent = z.infer<typeof messageContent>;

/** The text of a message, its parts run together. */
export function contentText(content: MessageContent): string {
  return typeof content === "string" ? content : content.map((part) => part.text).join("");
}

const modelName = z.string().regex(/^[a-z0-9_-]{1,32}\/[\x21-\x7e]{1,128}$/, "{provider}/{model}");

/** Models to ask in order when the one before gave no answer; a chain of its own for prompts that do not fit and for prompts that are refused. */
const fallbacks = z.object({
  models: z.array(modelName).max(5).optional(),
  context_overflow: z.array(modelName).max(5).optional(),
  content_policy: z.array(modelName).max(5).optional(),
});

/** What a call becomes when money or slots run short. An agent without a plan goes on as it is: it is critical. */
const degrade = z.object({
  model: modelName.optional(),
  max_output_tokens: z.int().min(1).max(1_000_000).optional(),
  /** The tools it keeps; the others are not critical and are left out. */
  tools: z.array(id).max(128).optional(),
});

/** A regular expression that compiles. How long it may run is bounded where it runs. */
const expression = z
  .string()
  .min(1)
  .max(500)
  .refine((text) => {
    try {
      return new RegExp(text, "u") instanceof RegExp;
    } catch {
      return false;
    }
  }, "is no regular expression (of the Unicode kind)");

const guardrailBase = { name: id, on: z.enum(["input", "output"]) };
/** A rule that what the model hears, or what it says, must keep; breaking it ends the turn with the rule's name. */
const guardrail = z.discriminatedUnion("kind", [
  /** Blocks text in which the expression matches. */
  z.object({ ...guardrailBase, kind: z.literal("pattern"), pattern: expression, ignore_case: z.boolean().optional() }),
  z.object({ ...guardrailBase, kind: z.literal("size"), characters_max: z.int().min(1).max(10_000_000) }),
  /** Blocks text that holds what looks like a credential. */
  z.object({ ...guardrailBase, kind: z.literal("secret") }),
  /** Asks a model whether the text keeps to `policy`; anything but a clear yes blocks. */
  z.object({ ...guardrailBase, kind: z.literal("judge"), model: modelName, policy: z.string().min(1).max(8000) }),
]);
export type Guardrail = z.infer<typeof guardrail>;

const guardrails = z
  .array(guardrail)
  .max(32)
  .refine((rules) => new Set(rules.map((rule) => rule.name)).size === rules.length, "has two guardrails of one name");

/** `{kind}:{name}` or the beginning of one and `*` (state-machines/permission.ts). */
const permissionRule = z
  .string()
  .regex(/^(model|tool|memory):[\x21-\x29\x2b-\x7e]{0,160}\*?$/, "is {model|tool|memory}:{name}, or the beginning of a name and *");
const permissionRules = z.array(permissionRule).max(256);

const priority = z.enum(PRIORITIES);

/** A message of a session of the same tenant. */
const sessionParent = z.object({ session: id, message: z.string().regex(MESSAGE_ID_PATTERN, "m and a number, as message_id has it") });
const sessionPath = z.string().regex(/^[A-Za-z0-9_-]{1,64}\/session\/[A-Za-z0-9_-]{1,64}$/, "{tenant}/session/{id}");

/** Calls that an agent may make by itself in a calendar period (UTC); its money is a level of its tenant's budget. Strict, over all workers. */
const actionLimits = z.object({
  model_calls: z.int().min(0).max(1_000_000_000).optional(),
  tool_calls: z.int().min(0).max(1_000_000_000).optional(),
  period: z.enum(["day", "week", "month", "none"]).default("day"),
});

/** The most that one amount of money may be: a million dollars. Sums of thousands of them are still safe integers. */
export const MONEY_USD_MICROS_MAX = 1_000_000_000_000;
const money = z.int().min(0).max(MONEY_USD_MICROS_MAX);
/** A kind of cost, as reports tell them apart. */
const categoryName = z.string().regex(/^[a-z][a-z_]{0,31}$/, "lower-case letters and _");

/** What an agent is. A version of it is frozen into each session that is created from it. */
export const agentConfig = z.object({
  model: modelName,
  instructions: z.string().max(200_000).default(""),
  tools: z.array(id).max(128).default([]),
  mode: z.enum(["multi", "single"]).default("multi"),
  max_loops: z.int().min(1).max(LOOPS_MAX).optional(),
  max_output_tokens: z.int().min(1).max(1_000_000).optional(),
  temperature: z.number().min(0).max(2).optional(),
  /** Of its model calls among the tenant's own, where they wait; `normal` when absent. */
  priority: priority.optional(),
  /** What one of its calls, of a model or a tool, may take from when it begins; CALL_TIMEOUT_MS when absent. */
  call_timeout_ms: z.int().min(1000).max(CALL_TIMEOUT_MS_MAX).optional(),
  fallbacks: fallbacks.optional(),
  degrade: degrade.optional(),
  guardrails: guardrails.optional(),
  /** What one call of a tool costs, in whole micro-dollars, and where reports count it. A tool that is not here costs nothing. */
  tool_prices: z.record(id, z.object({ usd_micros: money, category: categoryName.default("tool") })).optional(),
  /** What it may do by itself. */
  limits: z.object({ actions: actionLimits.optional() }).optional(),
  /** Whose grants it has. */
  roles: z.array(id).max(16).optional(),
  /** How long an idle session lives, and a paused or hibernated one (AR-F50). Milliseconds. */
  idle_ttl_ms: z.int().min(1000).optional(),
  suspended_ttl_ms: z.int().min(1000).optional(),
});
export type AgentConfig = z.infer<typeof agentConfig>;

const sessionOverrides = z.object({
  model: modelName.optional(),
  instructions: z.string().max(200_000).optional(),
  max_loops: z.int().min(1).max(LOOPS_MAX).optional(),
  max_output_tokens: z.int().min(1).max(1_000_000).optional(),
  temperature: z.number().min(0).max(2).optional(),
  priority: priority.optional(),
});

/** A limit may be any sum that can be counted. */
const moneyLimit = z.int().min(0).max(Number.MAX_SAFE_INTEGER);
/** `{tenant/kind/id}/{seq}:{effect}/{attempt}`: the hold of one attempt of one effect. */
export const HOLD_PATTERN = /^([A-Za-z0-9_-]{1,64}\/[a-z]{1,16}\/[A-Za-z0-9_-]{1,64})\/(\d{1,15}):([A-Za-z0-9_.-]{1,64})\/(\d{1,9})$/;
const hold = z.string().regex(HOLD_PATTERN, "{tenant/kind/id}/{seq}:{effect}/{attempt}");
const userName = z.string().min(1).max(256);
const providerName = z.string().regex(/^[a-z0-9_-]{1,32}$/);
export const BUDGET_LEVELS = ["tenant", "agent", "user", "session"] as const;
export type BudgetLevelKind = (typeof BUDGET_LEVELS)[number];
/** How much a call may cost, and how little is enough to make it at all. null: its price is not known. */
const ask = { model: modelName, amount_usd_micros: money.nullable(), minimum_usd_micros: money };
/** Of one call at a provider. `returns`: its settlement will say what was used. */
const rateOfCall = z.object({ provider: providerName, tokens: z.int().min(0).max(1_000_000_000), returns: z.literal(true).optional() });
const rateUse = z.object({ provider: providerName, requests: z.int().min(0).max(1_000_000), tokens: z.int().min(0).max(1_000_000_000_000).nullable() });
const rateBounds = {
  requests_max: z.int().min(1).max(1_000_000_000).nullable(),
  tokens_max: z.int().min(1).max(1_000_000_000_000).nullable(),
  window_ms: z.int().min(1000).max(86_400_000),
};

/** Actors `{tenant}/webhook/{id}` that hear a tenant's alerts. */
const webhookPath = z.string().regex(/^[A-Za-z0-9_-]{1,64}\/webhook\/[A-Za-z0-9_-]{1,64}$/, "{tenant}/webhook/{id}");
/** Where it may be called is judged by who calls it (protocol/public-address.ts). */
const webhookUrl = z
  .string()
  .max(2000)
  .refine((text) => /^https?:\/\//.test(text) && URL.canParse(text), "is no http(s) URL");
/** What is told of an event beyond its type stays small: a delivery waits in a journal, and receivers take little. */
const EVENT_CHARACTERS_MAX = 16_384;

/** RFC 3339 UTC. */
const instant = z.iso.datetime();

/** SHA-256 in hex. */
const sha256 = z.string().regex(/^[0-9a-f]{64}$/);

/** A secret as it rests (key-ring.ts). Whoever says it has sealed it: no command ever bears the secret itself. */
const sealed = z.object({
  v: z.literal(1),
  master_key_id: id,
  nonce: z.string().regex(/^[A-Za-z0-9_-]{16}$/, "12 bytes in base64url"),
  ciphertext: z
    .string()
    .regex(/^[A-Za-z0-9_-]+$/, "base64url")
    .max(CIPHERTEXT_CHARACTERS_MAX),
});

/** Every command type: where it may be said, and its body. Unknown fields of a body are dropped; unknown types are refused by name. */
export const COMMANDS = {
  session: {
    "session.create": {
      channels: ["command", "control"],
      body: z.object({
        agent: id,
        external_id: z.string().min(1).max(256).optional(),
        user: z.string().min(1).max(256).optional(),
        mode: z.enum(["multi", "single"]).optional(),
        overrides: sessionOverrides.optional(),
        metadata: z
          .record(z.string().max(64), z.string().max(1024))
          .refine((labels) => Object.keys(labels).length <= METADATA_KEYS_MAX, `at most ${METADATA_KEYS_MAX} labels`)
          .optional(),
      }),
    },
    "message.send": {
      channels: ["command", "control"],
      body: z
        .object({
          content: messageContent,
          on_busy: z.enum(["enqueue", "reject", "interrupt"]).optional(),
          priority: priority.optional(),
          /** Its turn begins when the turns of these messages have completed, and fails when one did not. */
          after: z.array(sessionParent).min(1).max(AFTER_MAX).optional(),
        })
        .refine(({ after, on_busy }) => after === undefined || on_busy !== "interrupt", {
          path: ["after"],
          message: "a message that interrupts comes after none",
        }),
    },
    /** From a session with a message that comes after one of this session's: it wants to hear when that turn has ended. */
    "dependency.ask": { channels: ["control"], body: sessionParent.extend({ from: sessionPath }) },
    "dependency.told": { channels: ["control"], body: sessionParent },
    "turn.cancel": { channels: ["command", "control"], body: reason },
    "session.pause": { channels: ["command", "control"], body: reason },
    "session.resume": { channels: ["command", "control"], body: reason },
    "session.hibernate": { channels: ["command", "control"], body: reason },
    "session.terminate": { channels: ["command", "control"], body: reason },
    "session.unpark": { channels: ["control"], body: reason },
  },
  tenant: {
    "tenant.create": { channels: ["control"], body: z.object({ name: z.string().max(256).optional() }) },
    "tenant.suspend": { channels: ["control"], body: reason },
    "tenant.resume": { channels: ["control"], body: reason },
    "key.create": {
      channels: ["control"],
      body: z.object({
        key_id: id,
        hash: sha256,
        scopes: z.array(z.string().max(64)).max(32).default([]),
        label: z.string().max(256).optional(),
        expires_at: instant.optional(),
      }),
    },
    /** Gives a key an end, or an earlier one. */
    "key.expire": { channels: ["control"], body: z.object({ key_id: id, expires_at: instant }) },
    "key.revoke": { channels: ["control"], body: z.object({ key_id: id, reason: z.string().max(1000).optional() }) },
    /** `critical`: running sessions of the agent take it up at their next turn, instead of keeping the version they began with. */
    "agent.put": { channels: ["control"], body: z.object({ agent: id, config: agentConfig, critical: z.boolean().optional() }) },
    /** What may be done by default, and what never; absent fields stay as they are. */
    "tenant.configure": { channels: ["control"], body: z.object({ default: z.enum(["allow", "deny"]).optional(), deny: permissionRules.optional() }) },
    /** What agents with this role may and may not; empty lists take the grant away. */
    "grant.put": { channels: ["control"], body: z.object({ role: id, allow: permissionRules.default([]), deny: permissionRules.default([]) }) },
    /** Sessions of the agent, or of all, load their configuration anew at their next turn. */
    "config.updated": { channels: ["control"], body: z.object({ agent: id.optional(), reason: z.string().max(1000).optional() }) },
    /** The tenant's own key at a model provider, or another one in its place. */
    "provider_key.put": {
      channels: ["control"],
      body: z.object({
        provider: providerName,
        sealed,
        last_four: z.string().length(4).nullable(),
        label: z.string().max(256).optional(),
      }),
    },
    "provider_key.remove": { channels: ["control"], body: z.object({ provider: providerName, reason: z.string().max(1000).optional() }) },
    /** The same key under another master key. `replaces` is the nonce of what was opened for it. */
    "provider_key.reseal": { channels: ["control"], body: z.object({ provider: providerName, sealed, replaces: z.string().max(64) }) },
  },
  worker: {
    "worker.drain": { channels: ["control"], body: reason },
    "worker.undrain": { channels: ["control"], body: reason },
  },
  webhook: {
    "webhook.create": { channels: ["control"], body: z.object({ url: webhookUrl }) },
    "webhook.configure": { channels: ["control"], body: z.object({ url: webhookUrl.optional(), enabled: z.boolean().optional() }) },
    /** Another secret; the former one is void at once. */
    "webhook.rotate": { channels: ["control"], body: z.object({}) },
    "webhook.deliver": {
      channels: ["control"],
      body: z.object({
        event: z
          .looseObject({ type: z.string().min(1).max(64) })
          .refine((event) => JSON.stringify(event).length <= EVENT_CHARACTERS_MAX, `is at most ${EVENT_CHARACTERS_MAX} characters`),
        from: z.string().max(200),
        at: instant,
      }),
    },
  },
  budget: {
    "budget.create": { channels: ["control"], body: z.object({}) },
    "budget.configure": {
      channels: ["control"],
      body: z.object({
        level: z.enum(BUDGET_LEVELS),
        id: userName.optional(),
        limit_usd_micros: moneyLimit.nullable().optional(),
        period: z.enum(["day", "week", "month", "none"]).optional(),
        concurrency_max: z.int().min(0).max(1_000_000).nullable().optional(),
        /** By provider; null takes the rate away. */
        rates: z.record(providerName, z.object(rateBounds).nullable()).optional(),
        /** The rate at every provider that has none of its own (protocol/rate-tiers.ts); null takes it away. */
        tier: z
          .object({ name: id, ...rateBounds })
          .nullable()
          .optional(),
        /** Webhooks of the same tenant that are to hear its alerts, and that are no longer to. */
        alerts_to: z.object({ add: z.array(webhookPath).max(16).optional(), remove: z.array(webhookPath).max(16).optional() }).optional(),
        /** By which rule it is foreseen what a level comes to. */
        projection: z.enum(COST_PROJECTIONS).optional(),
        /** How many sessions that have not ended it may have; null takes the bound away. */
        sessions_max: z.int().min(0).max(SESSIONS_COUNTED_MAX).nullable().optional(),
      }),
    },
    "budget.reserve": {
      channels: ["control"],
      body: z
        .object({
          hold,
          session: id,
          agent: id,
          user: userName.optional(),
          category: categoryName.optional(),
          part: z.int().min(1).max(1000).optional(),
          ...ask,
          degraded: z.object({ ...ask, rate: rateOfCall.optional() }).optional(),
          rate: rateOfCall.optional(),
          actions: actionLimits.optional(),
          priority: priority.optional(),
        })
        .refine(
          (body) => body.amount_usd_micros === null || body.minimum_usd_micros <= body.amount_usd_micros,
          "minimum_usd_micros is at most amount_usd_micros",
        ),
    },
    "budget.settle": {
      channels: ["control"],
      body: z.object({
        hold,
        cost_usd_micros: money.nullable(),
        spent_usd_micros: money.optional(),
        model: modelName.optional(),
        used: z.array(rateUse).max(64).optional(),
        /** Parts of the cost that are of another category than the hold. */
        by_category: z.record(categoryName, money).optional(),
      }),
    },
    "budget.release": { channels: ["control"], body: z.object({ hold }) },
    "slot.acquire": { channels: ["control"], body: z.object({ slot: z.string().min(1).max(256) }) },
    "slot.release": { channels: ["control"], body: z.object({ slot: z.string().min(1).max(256) }) },
    "session.acquire": { channels: ["control"], body: z.object({ session: id }) },
    "session.release": { channels: ["control"], body: z.object({ session: id }) },
    "action.acquire": {
      channels: ["control"],
      body: z.object({ action: hold, agent: id, kind: z.enum(["model_calls", "tool_calls"]), limits: actionLimits }),
    },
    "rate.acquire": {
      channels: ["control"],
      body: z.object({
        provider: providerName,
        requests: z.int().min(0).max(1_000_000),
        tokens: z.int().min(0).max(1_000_000_000),
        hold: hold.optional(),
      }),
    },
  },
  workflow: {},
} as const satisfies Record<ActorKind, Record<string, { channels: readonly CommandChannel[]; body: z.ZodType }>>;

/** A command as an actor's mailbox takes it. `body` has passed its schema. */
export interface Command {
  readonly channel: CommandChannel;
  readonly type: string;
  readonly body: { readonly [key: string]: Json };
  /** The sender's Idempotency-Key, if any. */
  readonly key?: string;
  readonly trace?: string;
  /** Who said it; absent for the runtime itself. */
  readonly principal?: string;
}

export type CommandDecoding =
  | { readonly kind: "command"; readonly command: Command }
  | { readonly kind: "refused"; readonly error: ErrorBody; readonly type?: string };

/** How deep a body may nest. Ours nest four deep; JSON of 1 MiB can nest half a million deep. */
const DEPTH_MAX = 32;

/** The JSON pointer and fault of the first string that cannot rest everywhere (NUL, lone surrogates), or of nesting too deep. */
function faultIn(value: unknown): { pointer: string; fault: string } | undefined {
  const pending: { value: unknown; pointer: string; depth: number }[] = [{ value, pointer: "", depth: 0 }];
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    const { value: item, pointer, depth } = next;
    if (depth > DEPTH_MAX) return { pointer: pointer.slice(0, 200), fault: `nested deeper than ${DEPTH_MAX}` };
    if (typeof item === "string") {
      if (item.includes("\u0000")) return { pointer, fault: "contains a NUL character" };
      if (!item.isWellFormed()) return { pointer, fault: "contains a lone surrogate" };
    } else if (typeof item === "number") {
      if (!Number.isFinite(item)) return { pointer, fault: "is not a finite number" };
    } else if (Array.isArray(item)) {
      item.forEach((child, index) => pending.push({ value: child, pointer: `${pointer}/${index}`, depth: depth + 1 }));
    } else if (item !== null && typeof item === "object") {
      if (Object.getPrototypeOf(item) !== Object.prototype && Object.getPrototypeOf(item) !== null) return { pointer, fault: "is not plain data" };
      for (const [key, child] of Object.entries(item)) {
        const at = `${pointer}/${key.slice(0, 64).replaceAll("~", "~0").replaceAll("/", "~1")}`;
        if (key.includes("\u0000") || !key.isWellFormed()) return { pointer: at, fault: "has a key that is not well-formed text" };
        pending.push({ value: child, pointer: at, depth: depth + 1 });
      }
    } else if (item !== null && typeof item !== "boolean" && item !== undefined) {
      return { pointer, fault: "is not JSON" };
    }
  }
  return undefined;
}

const ENVELOPE = z.object({ type: z.string().min(1).max(64), body: z.record(z.string(), z.unknown()).default({}) });
const UTF8 = new TextDecoder("utf-8", { fatal: true });

const refused = (error: ErrorBody, type?: string): CommandDecoding => (type === undefined ? { kind: "refused", error } : { kind: "refused", error, type });

function parseBytes(data: Uint8Array, contentType: string): { value: unknown } | { fault: string } {
  const media = contentType.split(";")[0]?.trim().toLowerCase() ?? "";
  try {
    if (media === "application/msgpack") return { value: unpack(data) };
    if (media !== "application/json" && media !== "")
      return { fault: `content type '${media.slice(0, 64)}' is neither application/json nor application/msgpack` };
    return { value: JSON.parse(UTF8.decode(data)) };
  } catch (error) {
    return {
      fault: `the body is not ${media === "application/msgpack" ? "msgpack" : "JSON in UTF-8"}: ${error instanceof Error ? error.message.slice(0, 200) : "unreadable"}`,
    };
  }
}

/**
 * Reads a command off a message that arrived on a subject of `kind` and `channel`.
 *
 * Refuses: `too_large` over COMMAND_BYTES_MAX; `invalid` for unreadable bytes, wrong shapes (with JSON pointers in
 * `details.errors`), unknown types, hostile text; `forbidden` for a type that may not be said on this channel.
 */
export function decodeCommand(kind: ActorKind, channel: CommandChannel, data: Uint8Array, header: (name: string) => string | undefined): CommandDecoding {
  if (data.byteLength > COMMAND_BYTES_MAX)
    return refused(errorBody("too_large", `a command is at most ${COMMAND_BYTES_MAX} bytes`, { bytes: data.byteLength, bytes_max: COMMAND_BYTES_MAX }));
  const parsed = parseBytes(data, header(HEADER_CONTENT_TYPE) ?? "application/json");
  if ("fault" in parsed) return refused(errorBody("invalid", parsed.fault));
  const fault = faultIn(parsed.value);
  if (fault)
    return refused(errorBody("invalid", `${fault.pointer || "the message"} ${fault.fault}`, { errors: [{ pointer: fault.pointer, message: fault.fault }] }));
  const envelope = ENVELOPE.safeParse(parsed.value);
  if (!envelope.success) return refused(invalidBody(envelope.error, ""));
  const key = header(HEADER_IDEMPOTENCY_KEY);
  if (key !== undefined && (key.length === 0 || Buffer.byteLength(key) > IDEMPOTENCY_KEY_BYTES_MAX))
    return refused(errorBody("invalid", `${HEADER_IDEMPOTENCY_KEY} is 1 to ${IDEMPOTENCY_KEY_BYTES_MAX} bytes`), envelope.data.type);
  return checkCommand(kind, channel, envelope.data.type, envelope.data.body, { key, trace: header(HEADER_TRACEPARENT), principal: header(HEADER_PRINCIPAL) });
}

/** Checks a command's type, channel and body. For senders that already hold a value, and for decodeCommand. */
export function checkCommand(
  kind: ActorKind,
  channel: CommandChannel,
  type: string,
  body: unknown,
  extra: { key?: string | undefined; trace?: string | undefined; principal?: string | undefined } = {},
): CommandDecoding {
  const known: Record<string, { channels: readonly CommandChannel[]; body: z.ZodType }> = COMMANDS[kind];
  const declared = Object.hasOwn(known, type) ? known[type] : undefined;
  if (declared === undefined) return refused(errorBody("invalid", `unknown command '${type}' for a ${kind}`, { type, known: Object.keys(known) }), type);
  if (!declared.channels.includes(channel)) return refused(errorBody("forbidden", `'${type}' cannot be said on .${channel}`, { type, channel }), type);
  const checked = declared.body.safeParse(body);
  if (!checked.success) return refused(invalidBody(checked.error, "/body"), type);
  const command: Command = {
    channel,
    type,
    body: checked.data as { [key: string]: Json },
    ...(extra.key === undefined ? {} : { key: extra.key }),
    ...(extra.trace !== undefined && /^[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}$/.test(extra.trace) ? { trace: extra.trace } : {}),
    ...(isPrincipal(extra.principal) ? { principal: extra.principal } : {}),
  };
  return { kind: "command", command };
}

/** `invalid` with one JSON pointer per fault. */
export function invalidBody(error: z.ZodError, root: string): ErrorBody {
  const errors = error.issues
    .slice(0, 20)
    .map((issue) => ({ pointer: `${root}/${issue.path.map(String).join("/")}`.replace(/\/$/, ""), message: issue.message.slice(0, 300) }));
  return errorBody(
    "invalid",
    errors
      .map((one) => `${one.pointer || "/"}: ${one.message}`)
      .join("; ")
      .slice(0, 500),
    { errors },
  );
}
