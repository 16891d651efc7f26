// log: what rooms say of themselves. The facade; telemetry/ makes the real one.
import type { Json } from "./json.ts";

export type LogFields = { readonly [key: string]: Json | undefined };

/** One line per fact. `what` is a constant sentence; everything that varies goes into fields. Never a secret, never a customer's text. */
export interface Log {
  debug(what: string, fields?: LogFields): void;
  info(what: string, fields?: LogFields): void;
  warn(what: string, fields?: LogFields): void;
  error(what: string, fields?: LogFields): void;
  with(fields: LogFields): Log;
}

/** For tests and tools that do not listen. */
export const silentLog: Log = { debug() {}, info() {}, warn() {}, error() {}, with: () => silentLog };

/** An error as fields of a log line. */
export function errorFields(error: unknown): { error: string; stack?: string } {
  if (!(error instanceof Error)) return { error: String(error) };
  const cause = error.cause === undefined ? "" : ` (cause: ${error.cause instanceof Error ? error.cause.message : String(error.cause)})`;
  return { error: `${error.name}: ${error.message}${cause}`, ...(error.stack === undefined ? {} : { stack: error.stack }) };
}
