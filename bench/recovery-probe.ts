// recovery-probe: what a kill -9 costs, phase by phase. `node bench/recovery-probe.ts [kills] [sessions]`
//
// A whole Troupe (`up`: broker with fsync, Postgres, supervisor, two workers, gateway, projections) in a home of its own. Sessions stream all the
// time; the worker that streams for most of them is killed; one clock, here, takes the time at which each phase shows on the bus:
//   dead      the verdict stands in the worker's journal
//   placed    the last of its shards has another owner in the table
//   claimed   a session that was streaming there is claimed by the other worker
//   running   the first token of the new attempt (the simulated model says it at once)
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { decodeJournal } from "../protocol/journal.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import { createCommandClient } from "../actors/client.ts";
import type { DevFile } from "../roles/dev-home.ts";
import { realWorld } from "../roles/real-world.ts";
import { connectToUp } from "./up-bus.ts";
import { decodePlacementEntry } from "../supervisors/tables.ts";

const KILLS = Number(process.argv[2] ?? 20);
const SESSIONS = Number(process.argv[3] ?? 20);
const MAIN = join(import.meta.dirname, "..", "main.ts");
const SCRIPT = JSON.stringify([{ say: "word", tokens: 60, first_token_ms: 0, token_ms: 50 }]);
/** `up` gives a child up that dies more than twenty times a minute. */
const BETWEEN_KILLS_MS = 4_500;
const PATIENCE_MS = 15_000;

const world = realWorld();
const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));
const home = mkdtempSync(join(tmpdir(), "troupe-recovery-"));
const up = spawn(process.execPath, [MAIN, "up"], {
  env: { ...process.env, TROUPE_HOME: home, TROUPE_PORT: "0", TROUPE_LOG_LEVEL: "info" },
  stdio: ["ignore", "pipe", "inherit"],
});
let said = "";
up.stdout.on("data", (data: Buffer) => (said += data.toString()));
const ended = new Promise((resolve) => up.once("exit", resolve));
const dev = (): DevFile => JSON.parse(readFileSync(join(home, "dev.json"), "utf8")) as DevFile;

interface Lost {
  claimed_ms?: number;
  running_ms?: number;
}
interface Trial {
  readonly killed: string;
  readonly at_ms: number;
  dead_ms?: number;
  placed_ms?: number;
  /** Sessions that streamed there → when they were claimed, and spoke again. */
  readonly lost: Map<string, Lost>;
}

try {
  while (!said.includes("Troupe is ready")) {
    if (up.exitCode !== null) throw new Error(said);
    await wait(50);
  }
  const bus = await connectToUp(home);
  const client = createCommandClient({ bus, world });
  await client.command(
    { tenant: "demo", kind: "tenant", id: "main" },
    { type: "agent.put", body: { agent: "script", config: { model: "simulated/script", mode: "multi" } }, channel: "control" },
  );

  let trial: Trial | undefined;
  const now = (): number => performance.now();
  /** Who runs each session's model call now. */
  const streaming = new Map<string, string>();
  const attempts = new Map<string, number>();
  bus.subscribe("live.tenant.system.worker.*.event", ({ data }) => {
    const message = decodeJournal(data);
    if (trial !== undefined && message.actor.id === trial.killed && message.state === "dead") trial.dead_ms ??= now() - trial.at_ms;
  });
  await bus.bucket("PLACEMENT").watch((change) => {
    if (trial === undefined || change.kind !== "put") return;
    const entry = decodePlacementEntry(change.entry.value);
    // Shards that were on the move when it died follow a good second later; they are not its own any more.
    if (entry?.from === trial.killed && entry.reason === "owner_gone" && now() - trial.at_ms < 1_000) trial.placed_ms = now() - trial.at_ms;
  });
  bus.subscribe("live.tenant.demo.session.*.event", ({ data }) => {
    const message = decodeJournal(data);
    const { id } = message.actor;
    for (const entry of message.entries) {
      const lost = trial?.lost.get(id);
      if (entry.t === "claim" && lost !== undefined && trial !== undefined) lost.claimed_ms ??= now() - trial.at_ms;
    }
    if (message.events.some(({ type }) => type === "model.started" || type === "superseded")) streaming.set(id, message.worker);
    if (!message.events.some(({ type }) => type === "model.completed")) return;
    streaming.delete(id);
    // Its end was journaled in the moment of the kill: it was not lost.
    if (trial?.lost.get(id)?.claimed_ms === undefined) trial?.lost.delete(id);
  });
  bus.subscribe("live.tenant.demo.session.*.token", ({ subject, data }) => {
    const parsed = parseActorSubject(subject);
    if (parsed.kind !== "actor") return;
    const { attempt, turn } = JSON.parse(new TextDecoder().decode(data)) as { attempt: number; turn: number };
    const { id } = parsed.actor;
    const place = turn * 1000 + attempt;
    if (place === attempts.get(id)) return;
    attempts.set(id, place);
    const lost = trial?.lost.get(id);
    if (attempt > 1 && lost !== undefined && trial !== undefined) lost.running_ms ??= now() - trial.at_ms;
  });

  let over = false;
  const failures: string[] = [];
  const talks = Array.from({ length: SESSIONS }, async (_, index) => {
    const actor = { tenant: "demo", kind: "session" as const, id: `p${index}` };
    await client.command(actor, { type: "session.create", body: { agent: "script" } }, { patience_ms: PATIENCE_MS });
    while (!over) {
      const outcome = await client.command(actor, { type: "message.send", body: { content: SCRIPT }, key: world.id() }, { patience_ms: PATIENCE_MS });
      if (outcome.kind === "refused" || !outcome.reply.ok) failures.push(JSON.stringify(outcome).slice(0, 200));
      await wait(50);
      while (streaming.has(actor.id) && !over) await wait(20);
    }
  });

  const trials: Trial[] = [];
  for (let kill = 0; kill < KILLS; kill++) {
    await wait(BETWEEN_KILLS_MS);
    while (dev().processes.filter(({ role }) => role === "worker").length < 2) await wait(50);
    const counts = new Map<string, number>();
    for (const worker of streaming.values()) counts.set(worker, (counts.get(worker) ?? 0) + 1);
    const killed = [...counts].sort((a, b) => b[1] - a[1])[0]?.[0];
    const pid = dev().processes.find(({ role, id }) => role === "worker" && id === killed)?.pid;
    if (killed === undefined || pid === undefined) throw new Error("nobody streams");
    const lost = new Map<string, Lost>([...streaming].filter(([, worker]) => worker === killed).map(([id]) => [id, {}]));
    const cpu_before = cpuByRole(killed);
    const mine: Trial = { killed, at_ms: now(), lost };
    process.kill(pid, "SIGKILL");
    trial = mine;
    const until_ms = now() + PATIENCE_MS;
    const waits = (): boolean => [...mine.lost.values()].some((one) => one.running_ms === undefined);
    while ((waits() || mine.placed_ms === undefined) && now() < until_ms) await wait(5);
    const cpu = Object.entries(cpuByRole(killed)).map(([role, used]) => `${role} ${((used - (cpu_before[role] ?? 0)) * 1000).toFixed(0)}`);
    await wait(100);
    trials.push(mine);
    const runnings = [...mine.lost.values()].flatMap((one) => one.running_ms ?? []);
    console.log(
      `${kill + 1}. ${killed}, ${lost.size} streaming: dead ${ms(mine.dead_ms)}, placed ${ms(mine.placed_ms)}, claimed ${span([...mine.lost.values()].flatMap((one) => one.claimed_ms ?? []))}, running ${span(runnings)}${waits() ? " NOT ALL" : ""}; cpu ms: ${cpu.join(", ")}`,
    );
  }
  over = true;
  await Promise.all(talks);
  const all = (pick: (trial: Trial) => number | readonly number[]): number[] => trials.flatMap(pick);
  console.log(`\n${trials.length} kills, ${SESSIONS} sessions\n\n| from kill -9 to | p50 | p95 | max |\n|---|---|---|---|`);
  row(
    "declared dead",
    all((one) => one.dead_ms ?? []),
  );
  row(
    "all its shards placed",
    all((one) => one.placed_ms ?? []),
  );
  row(
    "claimed",
    all((one) => [...one.lost.values()].flatMap((lost) => lost.claimed_ms ?? [])),
  );
  row(
    "running again: first token",
    all((one) => [...one.lost.values()].flatMap((lost) => lost.running_ms ?? [])),
  );
  if (failures.length > 0) console.log(`\n${failures.length} commands were not taken: ${failures[0]}`);
  await client.stop();
  await bus.close();
} finally {
  up.kill("SIGINT");
  await ended;
  if (process.env["KEEP"]) console.log(home);
  else rmSync(home, { recursive: true, force: true });
}

/** Processor time of those that live on, in seconds: what the times would be made of on a machine that does nothing else. Linux only. */
function cpuByRole(but: string): Record<string, number> {
  const used: Record<string, number> = {};
  for (const { role, id, pid } of dev().processes) {
    if (id === but || pid === 0) continue;
    try {
      const fields = readFileSync(`/proc/${pid}/stat`, "utf8").split(") ")[1]?.split(" ") ?? [];
      used[role] = (used[role] ?? 0) + (Number(fields[11]) + Number(fields[12])) / 100;
    } catch {
      // it has ended since, or this system has no /proc: it is left out
    }
  }
  return used;
}

function ms(value: number | undefined): string {
  return value === undefined ? "never" : `${value.toFixed(0)} ms`;
}
function span(values: readonly number[]): string {
  return values.length === 0 ? "none" : `${Math.min(...values).toFixed(0)}–${Math.max(...values).toFixed(0)} ms`;
}
function row(what: string, values: readonly number[]): void {
  const sorted = values.toSorted((a, b) => a - b);
  const at = (part: number): string => ms(sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1)]);
  console.log(`| ${what} (${sorted.length}) | ${at(0.5)} | ${at(0.95)} | ${at(1)} |`);
}
