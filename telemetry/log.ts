// log: protocol/log.ts made real: one JSON line per fact, on standard error; on a terminal a line for people.
//
// Invariants:
//   L1. No line bears a credential: fields named like one are masked at any depth, and so is text that looks like one wherever it stands.
//   L2. A line is bounded: long texts are cut, deep values too. A log that can be filled by a message is a way to stop a process.
//   L3. Logging never throws into the room that logs.
//   L4. A line of an actor's, and every line that is said while work for one is done, names its tenant, and its session where it is one.
import { AsyncLocalStorage } from "node:async_hooks";
import { destination, type DestinationStream, type Logger, pino } from "pino";
import { parseActorPath } from "../protocol/ids.ts";
import type { Log, LogFields } from "../protocol/log.ts";

export const LOG_LEVELS = ["debug", "info", "warn", "error", "silent"] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export interface LogOptions {
  readonly level: LogLevel;
  /** On every line: role, id, and what else names the process. */
  readonly fields: LogFields;
  /** For a terminal: `05:00:00.000 warn  what  name=value`. */
  readonly for_people?: boolean;
  /** Where lines go; standard error unless told otherwise. */
  readonly write?: (line: string) => void;
}

/** A stack of twenty frames fits; a message of a megabyte does not. */
const TEXT_CHARACTERS_MAX = 4_000;
const DEPTH_MAX = 6;
const ITEMS_MAX = 100;
const MASK = "[redacted]";

/** Names of fields that hold credentials. `input_tokens` is a count, `key_id` names a key, `key_source` says whose: they stay. */
const SECRET_NAME = /(^|[_-])(authorization|cookie|password|passwd|secret|token|key|credential|credentials|pass|jwt)$/i;
/** Texts that are credentials wherever they stand; what comes before the secret part is kept, so that a person knows which it was. */
// Each repetition has a bound or ends at a character that it cannot contain, so no text makes the search long.
const SECRET_TEXTS: readonly (readonly [RegExp, string])[] = [
  [/\b(troupe\.[A-Za-z0-9_-]{1,64}\.[a-z0-9]{1,64}\.)[A-Za-z0-9_-]{16,}/g, `$1${MASK}`],
  [/\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}/gi, `$1${MASK}`],
  [/\b((?:sk|pk|rk)-)[A-Za-z0-9_-]{12,}/g, `$1${MASK}`],
  [/\b(AIza)[A-Za-z0-9_-]{20,}/g, `$1${MASK}`],
  [/\b(eyJ)[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*/g, `$1${MASK}`],
  [/([a-z][a-z0-9+.-]{0,20}:\/\/[^\s:/@]{0,256}:)[^\s@]{1,512}@/gi, `$1${MASK}@`],
];

function cleanText(text: string): string {
  let clean = text.length > TEXT_CHARACTERS_MAX ? `${text.slice(0, TEXT_CHARACTERS_MAX)}… (${text.length} characters)` : text;
  for (const [pattern, replacement] of SECRET_TEXTS) clean = clean.replace(pattern, replacement);
  return clean;
}

/** A value as it may stand in a line. L1, L2 */
export function clean(value: unknown, depth = 0): unknown {
  if (typeof value === "string") return cleanText(value);
  if (value === null || typeof value !== "object") return typeof value === "bigint" ? String(value) : value;
  if (depth >= DEPTH_MAX) return "[deeper]";
  if (Array.isArray(value)) {
    const items = value.slice(0, ITEMS_MAX).map((item) => clean(item, depth + 1));
    return value.length > ITEMS_MAX ? [...items, `… (${value.length} items)`] : items;
  }
  const fields = Object.entries(value).slice(0, ITEMS_MAX);
  return Object.fromEntries(
    fields.map(([name, item]) => [name, SECRET_NAME.test(name) && item !== null && item !== undefined ? MASK : clean(item, depth + 1)]),
  );
}

/** A line of JSON as a line for people. */
export function lineForPeople(line: string): string {
  const { at, level, what, ...fields } = JSON.parse(line) as { at: string; level: string; what: string } & Record<string, unknown>;
  const { stack, ...rest } = fields;
  const told = Object.entries(rest).map(([name, value]) => `${name}=${typeof value === "string" && !/[\s"=]/.test(value) ? value : JSON.stringify(value)}`);
  return `${at.slice(11, 23)} ${level.padEnd(5)} ${what}${told.length === 0 ? "" : `  ${told.join(" ")}`}${typeof stack === "string" ? `\n${stack}` : ""}\n`;
}

export function createLog({ level, fields, for_people = false, write }: LogOptions): Log {
  // Written at once: a process that dies has said what it had to say.
  const target: DestinationStream = write === undefined ? destination({ dest: 2, sync: true }) : { write };
  const stream: DestinationStream = for_people ? { write: (line) => target.write(lineForPeople(line)) } : target;
  const root = pino(
    {
      level,
      base: clean(fields) as Record<string, unknown>,
      messageKey: "what",
      timestamp: () => `,"at":"${new Date().toISOString()}"`,
      formatters: { level: (label) => ({ level: label }) },
    },
    stream,
  );
  return facade(root);
}

/** Names that a line has of its own; a field of the same name would stand in it twice. */
const TAKEN = new Set(["level", "at", "what"]);

/** For whom the work is that goes on. */
export interface Attribution {
  readonly tenant: string;
  readonly session?: string;
  readonly agent?: string;
}
const working_for = new AsyncLocalStorage<Attribution>();

/** Lines that are said within the work, by whatever room, say for whom it is. L4 */
export function withAttribution<T>(attribution: Attribution, work: () => T): T {
  return working_for.run(attribution, work);
}

/** What a line says of whom it is for: what it names itself, then what its actor's path names, then the work within which it is said. */
function attributed(fields: LogFields): LogFields {
  const its = typeof fields["actor"] === "string" ? parseActorPath(fields["actor"]) : undefined;
  const named = { ...(its === undefined ? {} : { tenant: its.tenant, ...(its.kind === "session" ? { session: its.id } : {}) }), ...fields };
  const work = working_for.getStore();
  // What goes on within somebody's work may be about somebody else.
  if (work === undefined || its !== undefined || (named["tenant"] !== undefined && named["tenant"] !== work.tenant)) return named;
  return { ...work, ...named };
}

function own(fields: LogFields): Record<string, unknown> {
  const cleaned = clean(fields) as Record<string, unknown>;
  return Object.fromEntries(Object.entries(cleaned).map(([name, value]) => [TAKEN.has(name) ? `${name}_` : name, value]));
}

function facade(logger: Logger): Log {
  const say = (level: "debug" | "info" | "warn" | "error") => (what: string, fields?: LogFields) => {
    if (!logger.isLevelEnabled(level)) return;
    try {
      logger[level](own(attributed(fields ?? {})), "%s", cleanText(what));
    } catch {
      // L3. Standard error is gone (a closed pipe): there is nobody left to tell.
    }
  };
  return { debug: say("debug"), info: say("info"), warn: say("warn"), error: say("error"), with: (fields) => facade(logger.child(own(fields))) };
}
