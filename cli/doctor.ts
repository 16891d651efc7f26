// doctor: looks at everything Troupe stands on and says what is wrong with it. It changes nothing.
//
// A finding is `ok`, `warning` (it works, and somebody should look), `refused` (it must not be used like this) or `unreachable`.
import { readdir } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { STREAMS } from "../bus/port.ts";
import { isolationFaults } from "../projections/isolation.ts";
import { PROJECTION_NAME } from "../projections/rows.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { bytes, type Style } from "./printer.ts";

export type DoctorLevel = "ok" | "warning" | "refused" | "unreachable";
export interface DoctorFinding {
  readonly level: DoctorLevel;
  readonly what: string;
  readonly detail: string;
}

/** The first Node that runs TypeScript without a flag. The launcher brings it along. */
const NODE_MAJOR_MIN = 24;
/** Clocks of one machine differ by nothing, of a data centre by milliseconds. Entries are stamped with them. */
const CLOCK_DIFFERENCE_MAX_MS = 2_000;
/** Any day before this program was written. */
const CLOCK_EARLIEST_MS = Date.UTC(2025, 0, 1);
/** Messages that a projection may be behind while everything is well. */
const LAG_MAX = 10_000;
const PATIENCE_MS = 5_000;

const MIGRATIONS = fileURLToPath(new URL("../migrations", import.meta.url));
const PROVIDERS = { anthropic: ["ANTHROPIC_API_KEY"], openai: ["OPENAI_API_KEY"], google: ["GEMINI_API_KEY", "GOOGLE_API_KEY"] } as const;

const reasonOf = (error: unknown): string => {
  if (!(error instanceof Error)) return String(error);
  const cause = error.cause instanceof Error ? error.cause.message : "";
  return error.message || cause || error.name;
};

export async function examine(context: Context): Promise<DoctorFinding[]> {
  const { ports } = context;
  const { world, env } = ports;
  const findings: DoctorFinding[] = [];
  const say = (level: DoctorLevel, what: string, detail: string): void => void findings.push({ level, what, detail });

  /** Bounded, so that one thing that hangs does not hide the others. */
  async function within<T>(work: Promise<T>): Promise<T> {
    let cancel: (() => void) | undefined;
    const late = new Promise<never>((_, reject) => (cancel = world.after(PATIENCE_MS, () => reject(new Error(`no answer within ${PATIENCE_MS / 1000} s`)))));
    try {
      return await Promise.race([work, late]);
    } finally {
      cancel?.();
    }
  }
  async function get(url: string): Promise<{ status: number; text: string; date: string | null }> {
    const response = await ports.fetch(url);
    return { status: response.status, text: await response.text(), date: response.headers.get("date") };
  }
  function sayClock(whose: string, their_ms: number, precision_ms: number): void {
    const difference_ms = Math.round(Math.abs(their_ms - world.now_ms()));
    say(
      difference_ms > CLOCK_DIFFERENCE_MAX_MS + precision_ms ? "warning" : "ok",
      "clock",
      `${difference_ms <= precision_ms ? "equal to" : `${difference_ms} ms from`} ${whose}'s`,
    );
  }

  const major = Number(/^v?(\d+)/.exec(ports.node_version)?.[1] ?? 0);
  say(major >= NODE_MAJOR_MIN ? "ok" : "refused", "node", `${ports.node_version}${major >= NODE_MAJOR_MIN ? "" : `; ${NODE_MAJOR_MIN} or newer is needed`}`);
  if (world.now_ms() < CLOCK_EARLIEST_MS) say("refused", "clock", `it says ${new Date(world.now_ms()).toISOString()}, before this program was written`);

  const dev = await context.dev();
  const file = dev.kind === "read" ? dev.file : undefined;
  if (dev.kind === "read")
    say("ok", "dev.json", `${dev.path}: ${dev.file.processes.length} processes, tenants ${dev.file.tenants.map((one) => one.id).join(" ") || "none"}`);
  else if (dev.kind === "absent")
    say(
      env["TROUPE_NATS_URL"] ? "ok" : "warning",
      "dev.json",
      `${dev.path} does not exist${env["TROUPE_NATS_URL"] ? "; TROUPE_NATS_URL is set" : ": nothing runs here (npm start), or TROUPE_HOME is another"}`,
    );
  else say("refused", "dev.json", `${dev.path}: ${dev.reason}`);

  const monitor_url = env["TROUPE_NATS_MONITOR_URL"] ?? file?.nats_monitor_url;
  let events_last = 0;
  try {
    const bus = await within(context.bus());
    say("ok", "nats", "reachable");
    if (monitor_url !== undefined) {
      try {
        const varz = JSON.parse((await within(get(new URL("/varz", monitor_url).href))).text) as { version?: unknown; now?: unknown };
        say("ok", "nats version", String(varz.version ?? "unknown"));
        if (typeof varz.now === "string" && !Number.isNaN(Date.parse(varz.now))) sayClock("NATS", Date.parse(varz.now), 500);
      } catch (error) {
        say("warning", "nats version", `its monitoring port at ${monitor_url} does not answer: ${reasonOf(error)}`);
      }
    }
    const audit = await within(ports.auditSubstrate(bus, monitor_url === undefined ? {} : { monitor_url }));
    for (const { level, what, have, want } of audit) say(level === "refuse" ? "refused" : "warning", `nats ${what}`, `is ${have}, wanted ${want}`);
    if (audit.length === 0) say("ok", "nats substrate", "as declared");
    for (const stream of STREAMS) {
      try {
        const bounds = await within(bus.bounds(stream));
        if (stream === "EVENTS") events_last = bounds.last_sequence;
        say("ok", `stream ${stream}`, `${bounds.messages} messages, ${bytes(bounds.bytes)}, up to ${bounds.last_sequence}`);
      } catch (error) {
        say("refused", `stream ${stream}`, reasonOf(error));
      }
    }
  } catch (error) {
    say("unreachable", "nats", reasonOf(error));
  }

  try {
    const database = await within(context.database());
    const [row] = await within(database.query<{ version: string; now: string }>("select split_part(version(), ' ', 2) as version, clock_timestamp() as now"));
    say("ok", "postgres", `reachable, version ${row?.version ?? "unknown"}`);
    if (row !== undefined) sayClock("Postgres", Date.parse(row.now), 500);
    const wanted = (await readdir(MIGRATIONS)).filter((name) => name.endsWith(".sql")).map((name) => name.replace(/\.sql$/, ""));
    const [table] = await within(database.query<{ there: boolean }>("select to_regclass('schema_migrations') is not null as there"));
    const applied = table?.there === true ? (await within(database.query<{ name: string }>("select name from schema_migrations"))).map((one) => one.name) : [];
    const missing = wanted.filter((name) => !applied.includes(name));
    const unknown = applied.filter((name) => !wanted.includes(name));
    if (missing.length > 0) say("refused", "migrations", `not applied: ${missing.join(" ")}; run \`troupe migrate\``);
    else if (unknown.length > 0) say("warning", "migrations", `applied by a newer program: ${unknown.join(" ")}`);
    else say("ok", "migrations", `current (${wanted.at(-1) ?? "none"})`);
    if (missing.length === 0) {
      const faults = await within(isolationFaults(database));
      for (const fault of faults) say("refused", "tenants apart", fault);
      if (faults.length === 0)
        say("ok", "tenants apart", "every tenant table forces row-level security, no role of ours steps around it, the audit is only added to");
      const position = (await within((await context.queries()).positions())).find((one) => one.name === PROJECTION_NAME);
      const lag = events_last - (position?.position ?? 0);
      if (position === undefined) say("warning", "projection", "nothing has been projected yet: is a projector running?");
      else say(lag > LAG_MAX ? "warning" : "ok", "projection", `at ${position.position}, ${Math.max(0, lag)} messages behind`);
    }
  } catch (error) {
    say("unreachable", "postgres", reasonOf(error));
  }

  const gateway_url = env["TROUPE_GATEWAY_URL"] ?? file?.gateway_url;
  if (gateway_url === undefined) say("warning", "gateway", "none is known: no TROUPE_GATEWAY_URL, none in dev.json");
  else {
    try {
      const health = await within(get(new URL("/healthz", gateway_url).href));
      const ready = await within(get(new URL("/readyz", gateway_url).href));
      say(health.status === 200 ? "ok" : "refused", "gateway", `${gateway_url} is ${health.status === 200 ? "alive" : `ill: ${health.status}`}`);
      say(ready.status === 200 ? "ok" : "refused", "gateway ready", ready.status === 200 ? "yes" : `no (${ready.status}): ${ready.text.slice(0, 300)}`);
    } catch (error) {
      say("unreachable", "gateway", `${gateway_url}: ${reasonOf(error)}`);
    }
  }

  // Names only: a key's text is nobody's business here.
  const configured = Object.entries(PROVIDERS).flatMap(([name, variables]) => (variables.some((variable) => env[variable]) ? [name] : []));
  say("ok", "providers", configured.length === 0 ? "simulated (no provider's key is set here)" : `simulated ${configured.join(" ")}`);
  return findings;
}

const STYLES: Readonly<Record<DoctorLevel, Style>> = { ok: "green", warning: "yellow", refused: "red", unreachable: "red" };

export async function doctor(context: Context): Promise<number> {
  const { printer } = context;
  const findings = await examine(context);
  if (printer.json) printer.document({ findings });
  else {
    const width = Math.max(...findings.map((one) => one.what.length));
    for (const { level, what, detail } of findings) printer.line(`${printer.style(STYLES[level], level.padEnd(11))}  ${what.padEnd(width)}  ${detail}`);
  }
  if (findings.some((one) => one.level === "refused")) return EXIT.refused;
  return findings.some((one) => one.level === "unreachable") ? EXIT.unreachable : EXIT.done;
}
