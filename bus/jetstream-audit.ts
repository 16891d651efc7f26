// audit: is the ground we stand on what we believe it is? Compares a running broker with what is declared and with what durability
// needs. `refuse` is what loses or mixes up messages; `warn` is what could not be seen, or only costs.
import { PAYLOAD_BYTES_MAX } from "../protocol/limits.ts";
import { differencesOf, type WireStreamInfo } from "./jetstream-ensure.ts";
import type { Link } from "./jetstream-link.ts";
import { allDeclarations, type Declarations } from "./streams.ts";

export interface Finding {
  readonly level: "refuse" | "warn";
  readonly what: string;
  readonly have: string;
  readonly want: string;
}

/** The first version with message schedules, atomic batches and expiry markers together. */
const VERSION_MIN = [2, 12] as const;
/** The first that resets a consumer; before it a durable is made anew, which is slower on a cluster. */
const VERSION_OF_RESET = [2, 14] as const;
const MONITOR_PATIENCE_MS = 3_000;
const STREAM_NOT_FOUND = 10059;

/** Settings whose difference only changes how much is kept or seen, not what is promised. */
const HARMLESS: ReadonlySet<string> = new Set(["description", "max_bytes", "max_consumers", "max_msgs"]);

export async function auditLink(link: Link, declarations: Declarations, monitor_url?: string): Promise<Finding[]> {
  const findings: Finding[] = [];
  const info = link.connection.info;
  const version = info?.version ?? "unknown";
  if (!isAtLeast(version, VERSION_MIN)) findings.push({ level: "refuse", what: "server version", have: version, want: `${VERSION_MIN.join(".")} or newer` });
  else if (!isAtLeast(version, VERSION_OF_RESET))
    findings.push({ level: "warn", what: "server version", have: version, want: `${VERSION_OF_RESET.join(".")} or newer, for quick take-overs` });
  const max_payload = info?.max_payload ?? 0;
  if (max_payload < PAYLOAD_BYTES_MAX)
    findings.push({ level: "refuse", what: "max_payload", have: String(max_payload), want: `at least ${PAYLOAD_BYTES_MAX}` });

  const account = await link.api("INFO", undefined);
  if (account.kind !== "ok") {
    findings.push({
      level: "refuse",
      what: "JetStream",
      have: account.kind === "error" ? account.error.description : account.reason,
      want: "on, for this account",
    });
    return findings;
  }
  for (const declared of allDeclarations(declarations)) {
    const stream = await link.api<WireStreamInfo>(`STREAM.INFO.${declared.name}`, undefined);
    if (stream.kind === "ok") {
      for (const difference of differencesOf(declared, stream.value.config)) {
        findings.push({
          level: HARMLESS.has(difference.what) ? "warn" : "refuse",
          what: `stream ${declared.name}: ${difference.what}`,
          have: difference.have,
          want: difference.want,
        });
      }
      const behind = (stream.value.cluster?.replicas ?? []).filter((replica) => !replica.current).map((replica) => replica.name);
      if (behind.length > 0)
        findings.push({ level: "warn", what: `stream ${declared.name}: replicas`, have: `behind: ${behind.join(", ")}`, want: "all current" });
    } else if (stream.kind === "error" && stream.error.err_code === STREAM_NOT_FOUND) {
      findings.push({ level: "refuse", what: `stream ${declared.name}`, have: "absent", want: "present" });
    } else {
      findings.push({
        level: "refuse",
        what: `stream ${declared.name}`,
        have: stream.kind === "error" ? stream.error.description : stream.reason,
        want: "readable",
      });
    }
  }
  findings.push(...(await auditSync(monitor_url)));
  return findings;
}

/** `sync_interval` is a setting of the server, not of a stream; only its monitoring port tells it. */
async function auditSync(monitor_url: string | undefined): Promise<Finding[]> {
  const want = "always: with the default of two minutes, acknowledged messages are lost when power is";
  const unseen = (have: string): Finding[] => [{ level: "warn", what: "sync_interval", have, want }];
  if (monitor_url === undefined) return unseen("not seen: no monitoring url was given");
  try {
    const answer = await fetch(`${monitor_url.replace(/\/$/, "")}/jsz`, { signal: AbortSignal.timeout(MONITOR_PATIENCE_MS) });
    const body = (await answer.json()) as { config?: { sync_always?: boolean; sync_interval?: number } };
    if (body.config?.sync_always === true) return [];
    return [{ level: "refuse", what: "sync_interval", have: `${(body.config?.sync_interval ?? 0) / 1e9} s`, want }];
  } catch (error) {
    return unseen(`not seen: ${error instanceof Error ? error.message : String(error)}`);
  }
}

function isAtLeast(version: string, min: readonly [number, number]): boolean {
  const [major = 0, minor = 0] = version.split(".").map(Number);
  return major > min[0] || (major === min[0] && minor >= min[1]);
}
