// dev-file: `$TROUPE_HOME/dev.json`, which says what runs on this machine (WIRE §6). Written by `troupe up`, read by everybody.
//
// Tolerant: fields it does not know are kept out, fields that are missing are absent. Who needs one says so.
import { readFile } from "node:fs/promises";
import { isAbsolute, join } from "node:path";
import { z } from "zod";

const login = z.object({ user: z.string(), password: z.string() });

const devFile = z.object({
  gateway_url: z.string().optional(),
  nats_url: z.string().optional(),
  nats_monitor_url: z.string().optional(),
  nats_operator: login.optional(),
  postgres_url: z.string().optional(),
  webhook_key: z.string().optional(),
  tenants: z.array(z.object({ id: z.string(), key: z.string().optional(), nats: login.optional() })).default([]),
  processes: z.array(z.object({ role: z.string(), id: z.string(), pid: z.int() })).default([]),
});
export type DevFile = z.infer<typeof devFile>;

export type DevFileReading =
  | { readonly kind: "read"; readonly path: string; readonly file: DevFile }
  | { readonly kind: "absent"; readonly path: string }
  | { readonly kind: "unreadable"; readonly path: string; readonly reason: string };

/** `$TROUPE_HOME`, else `.troupe` where the command runs. */
export function homeDirectory(env: Readonly<Record<string, string | undefined>>, working_directory: string): string {
  const home = env["TROUPE_HOME"] || ".troupe";
  return isAbsolute(home) ? home : join(working_directory, home);
}

export async function readDevFile(home: string): Promise<DevFileReading> {
  const path = join(home, "dev.json");
  let text: string;
  try {
    text = await readFile(path, "utf8");
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "ENOENT") return { kind: "absent", path };
    return { kind: "unreadable", path, reason: error instanceof Error ? error.message : String(error) };
  }
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return { kind: "unreadable", path, reason: `it is not JSON: ${error instanceof Error ? error.message : String(error)}` };
  }
  const parsed = devFile.safeParse(value);
  if (parsed.success) return { kind: "read", path, file: parsed.data };
  return { kind: "unreadable", path, reason: z.prettifyError(parsed.error).replaceAll("\n", " ") };
}
