// dev-home: what `up` writes into $TROUPE_HOME for people and tools: dev.json says what runs; keys.json keeps the keys that `up` itself made.
import { chmodSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export interface DevProcess {
  readonly role: string;
  readonly id: string;
  readonly pid: number;
}

/** WIRE §6. */
export interface DevFile {
  readonly gateway_url: string;
  readonly nats_url: string;
  readonly nats_monitor_url: string;
  readonly nats_operator: { readonly user: string; readonly password: string };
  readonly postgres_url: string;
  /** What the secrets of webhooks are derived from. */
  readonly webhook_key: string;
  readonly tenants: readonly { readonly id: string; readonly key?: string; readonly nats: { readonly user: string; readonly password: string } }[];
  readonly processes: readonly DevProcess[];
}

function writeSecret(file: string, value: unknown): void {
  writeFileSync(`${file}.new`, `${JSON.stringify(value, null, 2)}\n`, { mode: 0o600 });
  chmodSync(`${file}.new`, 0o600);
  renameSync(`${file}.new`, file);
}

export function writeDevFile(home: string, dev: DevFile): void {
  mkdirSync(home, { recursive: true });
  writeSecret(join(home, "dev.json"), dev);
}

/** Removes it if it tells of the `up` with this process id: another one may run on this home, and its file stays. */
export function removeDevFile(home: string, pid: number): void {
  const file = join(home, "dev.json");
  if (!existsSync(file)) return;
  const { processes } = JSON.parse(readFileSync(file, "utf8")) as DevFile;
  if (processes.some((one) => one.role === "up" && one.pid === pid)) rmSync(file, { force: true });
}

/** tenant → key, for the tenants that `up` made itself. */
export function readOwnKeys(home: string): Record<string, string> {
  const file = join(home, "keys.json");
  return existsSync(file) ? (JSON.parse(readFileSync(file, "utf8")) as Record<string, string>) : {};
}

export function keepOwnKey(home: string, tenant: string, key: string): void {
  mkdirSync(home, { recursive: true });
  writeSecret(join(home, "keys.json"), { ...readOwnKeys(home), [tenant]: key });
}
