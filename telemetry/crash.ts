// crash: what a process leaves behind that breaks on something nobody caught: one line of its log, without the secrets that it was given.
//
// Invariants:
//   C1. No value of a variable of the environment that is named like a secret stands in the line, wherever the error got it from.
import { errorFields, type LogFields } from "../protocol/log.ts";

const SECRET_VARIABLE = /(KEY|KEYS|PASSWORD|SECRET|SEED|TOKEN|URL)(_[A-Z0-9_]+)?$/;
/** A shorter text is a word like any other. */
const SECRET_CHARACTERS_MIN = 8;

/** What must not be told of an environment: its secrets, and of its addresses the passwords. */
export function secretsOf(env: Readonly<Record<string, string | undefined>>): string[] {
  const secrets = Object.entries(env).flatMap(([name, value = ""]) => {
    if (!SECRET_VARIABLE.test(name)) return [];
    if (/URL/.test(name)) return [/^[a-z0-9+.-]+:\/\/[^:/@]*:([^@/]+)@/i.exec(value)?.[1] ?? ""];
    // Several of them may stand in one variable: `id:base64,id:base64`.
    return [value, ...value.split(/[\s,:=]+/)];
  });
  return [...new Set(secrets)].filter((secret) => secret.length >= SECRET_CHARACTERS_MIN).sort((one, other) => other.length - one.length);
}

export function crashFields(error: unknown, secrets: readonly string[]): LogFields {
  const clean = (text: string): string => secrets.reduce((sum, secret) => sum.replaceAll(secret, "[redacted]"), text);
  return Object.fromEntries(Object.entries(errorFields(error)).map(([name, text]) => [name, clean(String(text))]));
}
