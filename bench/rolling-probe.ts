// rolling-probe: what a rolling restart of all workers costs those who use them. `node bench/rolling-probe.ts [call_s] [long] [short]`
//
// A whole Troupe (`up`) in a home of its own. `long` sessions make model calls of `call_s` seconds one after another; `short` ones are created and
// send messages all the time. Each worker in turn is asked to end (SIGTERM) and is started again by `up`. Afterwards: how long commands waited for
// their acknowledgement, and which model calls were lost with a worker, and so would be paid twice.
import { spawn } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createCommandClient } from "../actors/client.ts";
import { decodeJournal } from "../protocol/journal.ts";
import type { DevFile } from "../roles/dev-home.ts";
import { realWorld } from "../roles/real-world.ts";
import { connectToUp } from "./up-bus.ts";

const CALL_S = Number(process.argv[2] ?? 20);
const LONG = Number(process.argv[3] ?? 8);
const SHORT = Number(process.argv[4] ?? 10);
const MAIN = join(import.meta.dirname, "..", "main.ts");
const TOKEN_MS = 100;
const PATIENCE_MS = 30_000;
const RESTART_PATIENCE_MS = 120_000;

const world = realWorld();
const wait = (ms: number): Promise<void> => new Promise((resolve) => void setTimeout(resolve, ms));
const home = mkdtempSync(join(tmpdir(), "troupe-rolling-"));
const up = spawn(process.execPath, [MAIN, "up"], { env: { ...process.env, TROUPE_HOME: home, TROUPE_PORT: "0" }, stdio: ["ignore", "pipe", "inherit"] });
let said = "";
up.stdout.on("data", (data: Buffer) => (said += data.toString()));
const ended = new Promise((resolve) => up.once("exit", resolve));
const dev = (): DevFile => JSON.parse(readFileSync(join(home, "dev.json"), "utf8")) as DevFile;
const pidOf = (id: string): number | undefined => dev().processes.find((one) => one.role === "worker" && one.id === id)?.pid;

try {
  while (!said.includes("Troupe is ready")) {
    if (up.exitCode !== null) throw new Error(said);
    await wait(50);
  }
  const bus = await connectToUp(home);
  const client = createCommandClient({ bus, world });
  const script = (tokens: number): string => JSON.stringify([{ say: "word", tokens, first_token_ms: 0, token_ms: TOKEN_MS }]);
  await client.command(
    { tenant: "demo", kind: "tenant", id: "main" },
    { type: "agent.put", body: { agent: "script", config: { model: "simulated/script", mode: "multi" } }, channel: "control" },
  );

  const states = new Map<string, string>();
  let lost = 0;
  let completed = 0;
  bus.subscribe("live.tenant.demo.session.*.event", ({ data }) => {
    const { actor, state, entries, events } = decodeJournal(data);
    states.set(actor.id, state);
    for (const entry of entries) if (entry.t === "claim") lost += entry.lost.length;
    completed += events.filter(({ type }) => type === "model.completed").length;
  });
  let over = false;
  let restarting = false;
  const times: Record<"before" | "while restarting", number[]> = { before: [], "while restarting": [] };
  const refused: string[] = [];
  const say = async (id: string, type: string, body: Record<string, string>): Promise<void> => {
    const began_ms = performance.now();
    const outcome = await client.command({ tenant: "demo", kind: "session", id }, { type, body, key: world.id() }, { patience_ms: PATIENCE_MS });
    times[restarting ? "while restarting" : "before"].push(performance.now() - began_ms);
    if (outcome.kind === "refused" || !outcome.reply.ok) refused.push(JSON.stringify(outcome).slice(0, 200));
  };
  const talk = async (id: string, tokens: number, pause_ms: number): Promise<void> => {
    await say(id, "session.create", { agent: "script" });
    while (!over) {
      await say(id, "message.send", { content: script(tokens) });
      // Long ones wait for their turn's end, short ones only for a moment: what they send meanwhile is queued.
      const until_ms = performance.now() + pause_ms;
      while (!over && (pause_ms === 0 ? states.get(id) !== "idle" : performance.now() < until_ms || states.get(id) !== "idle")) {
        await wait(20);
        if (pause_ms > 0 && performance.now() >= until_ms + 2_000) break;
      }
    }
  };
  const talks = [
    ...Array.from({ length: LONG }, (_, i) => talk(`long${i}`, Math.round((CALL_S * 1000) / TOKEN_MS), 0)),
    ...Array.from({ length: SHORT }, (_, i) => talk(`short${i}`, 2, 200)),
  ];
  await wait(8_000);
  restarting = true;
  for (const id of ["w1", "w2"]) {
    const pid = pidOf(id);
    if (pid === undefined) throw new Error(`${id} does not run`);
    const began_ms = performance.now();
    process.kill(pid, "SIGTERM");
    while (pidOf(id) === pid || pidOf(id) === undefined) {
      if (performance.now() - began_ms > RESTART_PATIENCE_MS) throw new Error(`${id} was not replaced`);
      await wait(50);
    }
    console.log(`${id} ended in good order and was replaced after ${((performance.now() - began_ms) / 1000).toFixed(1)} s`);
    await wait(CALL_S * 1000 + 5_000);
  }
  over = true;
  await Promise.all(talks);
  console.log(
    `\n${LONG} sessions with calls of ${CALL_S} s, ${SHORT} others; ${completed} model calls completed, ${lost} lost with a worker, ${refused.length} commands refused\n`,
  );
  console.log("| acknowledgement of a command | count | p50 | p99 | max |\n|---|---|---|---|---|");
  for (const [when, values] of Object.entries(times)) {
    const sorted = values.toSorted((a, b) => a - b);
    const at = (part: number): string => `${(sorted[Math.min(sorted.length - 1, Math.ceil(part * sorted.length) - 1)] ?? 0).toFixed(0)} ms`;
    console.log(`| ${when} | ${sorted.length} | ${at(0.5)} | ${at(0.99)} | ${at(1)} |`);
  }
  if (refused.length > 0) console.log(`\nfirst refusal: ${refused[0]}`);
  await client.stop();
  await bus.close();
} finally {
  up.kill("SIGINT");
  await ended;
  if (process.env["KEEP"]) console.log(home);
  else rmSync(home, { recursive: true, force: true });
}
