// run: `npm run bench`: every benchmark after another, printed and written to bench/RESULTS.md with the machine's description.
// `npm run bench -- command turn memory` runs those named.
import { readFileSync, writeFileSync } from "node:fs";
import { cpus, loadavg, release, totalmem } from "node:os";
import { fileURLToPath } from "node:url";
import { benchAgentTurn } from "./agent-turn.ts";
import { benchBudget } from "./budget.ts";
import type { Latencies } from "./cluster.ts";
import { benchDurableCommand } from "./durable-command.ts";
import { benchLatencies } from "./latencies.ts";
import { benchMemory } from "./memory.ts";
import { benchSessionStart } from "./session-start.ts";
import { script } from "./script.ts";

const RESULTS = fileURLToPath(new URL("./RESULTS.md", import.meta.url));
const ms = (value: number): string => value.toFixed(2);
const times = (value: number): string => `×${value.toFixed(2)}`;

async function commandSection(): Promise<string> {
  const rows = await benchDurableCommand();
  const cell = ({ per_s, p50_ms, p99_ms }: Latencies): string => `${per_s.toFixed(0)} | ${ms(p50_ms)} | ${ms(p99_ms)}`;
  return [
    "## (a) Durable command",
    "",
    "A command to one of 1,000 sessions, answered to its caller once it is journaled (fsync), one worker. The floor is a JetStream publish with an",
    "expected last subject sequence, singly, on the same broker with the same settings, in turn with it.",
    "",
    "| callers | floor /s | p50 ms | p99 ms | command /s | p50 ms | p99 ms | throughput | p50 |",
    "|---|---|---|---|---|---|---|---|---|",
    ...rows.map(
      ({ concurrency, floor, command }) =>
        `| ${concurrency} | ${cell(floor)} | ${cell(command)} | ${times(command.per_s / floor.per_s)} | ${times(command.p50_ms / floor.p50_ms)} |`,
    ),
  ].join("\n");
}

async function turnSection(): Promise<string> {
  const rows = await benchAgentTurn();
  if (rows[0] !== undefined) added.turn_ms = rows[0].added_first_ms;
  return [
    "## (b) Agent turn",
    "",
    "A turn of 100 tokens from a local server of OpenAI's format, seen by an SSE client of the gateway, beside calling that server directly; two workers.",
    "Added times are medians of pairs, one turn at a time.",
    "",
    "| ms between tokens | direct first token | ours | added to first token | added to the end | turns/s at 64 | direct turns/s at 64 | CPU s per 1,000 turns |",
    "|---|---|---|---|---|---|---|---|",
    ...rows.map(
      (row) =>
        `| ${row.token_ms} | ${ms(row.direct_first_ms)} ms | ${ms(row.ours_first_ms)} ms | ${ms(row.added_first_ms)} ms | ${ms(row.added_end_ms)} ms | ${row.turns_per_s_at_64.toFixed(1)} | ${row.direct_turns_per_s_at_64.toFixed(1)} | ${row.cpu_s_per_1000_turns.toFixed(1)} |`,
    ),
  ].join("\n");
}

async function memorySection(): Promise<string> {
  const row = await benchMemory();
  return [
    "## (c) Memory",
    "",
    `${row.sessions} sessions in one worker: what is still held after a collection, divided. The aim is 10 KB for a resident one.`,
    "",
    `- an idle session in memory: ${(row.live_bytes_per_session / 1000).toFixed(1)} KB`,
    `- at the same moment the system counts ${(row.process_bytes_per_session / 1000).toFixed(1)} KB a session for the process, with garbage and free pages`,
    `- a hibernated session that has left memory: ${(Math.max(0, row.gone_bytes_per_session) / 1000).toFixed(1)} KB`,
    `- waking one by a command: p50 ${ms(row.wake_p50_ms)} ms, p99 ${ms(row.wake_p99_ms)} ms`,
  ].join("\n");
}

async function budgetSection(): Promise<string> {
  const rows = await benchBudget();
  const alone = rows.find(({ what }) => what === "one tenant, 1 caller");
  if (alone !== undefined) added.budget_ms = alone.reserve_p50_ms;
  return [
    "## Budgets",
    "",
    "A reservation and its settlement, each answered once it is journaled (fsync), one worker. The aims: a reserve's p99 under 5 ms at 100 calls a second,",
    "500 pairs a second for one tenant.",
    "",
    "| | pairs/s | reserve p50 ms | p99 ms | settle p50 ms | p99 ms | CPU ms a pair |",
    "|---|---|---|---|---|---|---|",
    ...rows.map(
      (row) =>
        `| ${row.what} | ${row.pairs_per_s.toFixed(0)} | ${ms(row.reserve_p50_ms)} | ${ms(row.reserve_p99_ms)} | ${ms(row.settle_p50_ms)} | ${ms(row.settle_p99_ms)} | ${ms(row.cpu_ms_per_pair)} |`,
    ),
  ].join("\n");
}

async function startSection(): Promise<string> {
  const { cold, bare_us, gated_us, verdict_us } = await benchSessionStart();
  return [
    "## Cold starts, and what the gates cost",
    "",
    `A session created and initialised, ${cold.count} of them at 20 a second, each of its own: p50 ${ms(cold.p50_ms)} ms, p95 ${ms(cold.p95_ms)} ms, p99 ${ms(cold.p99_ms)} ms. The aim is p95 ≤ 50 ms.`,
    "",
    `The permission gate of an effect takes ${gated_us.toFixed(1)} µs (${bare_us.toFixed(1)} µs without it), one verdict over 200 rules ${verdict_us.toFixed(2)} µs.`,
  ].join("\n");
}

/** Of this run: what a turn adds before its first token, and what asking the budget takes of it. */
const added: { turn_ms?: number; budget_ms?: number } = {};

async function latencySection(): Promise<string> {
  const rows = await benchLatencies();
  const { turn_ms, budget_ms } = added;
  const share =
    turn_ms === undefined || budget_ms === undefined
      ? []
      : [
          "",
          `Asking the budget is ${((budget_ms / turn_ms) * 100).toFixed(0)} % of what a turn adds before its first token (${ms(budget_ms)} of ${ms(turn_ms)} ms).`,
        ];
  return [
    "## Latencies",
    "",
    "What one call feels: one worker, one caller, through NATS with file storage and fsync. The aims (T23) were those of a design that kept all of it in the",
    "memory of one process, and whose answers a crash took back.",
    "",
    "| | aim ms | p50 ms | p95 ms | p99 ms | within the aim | calls |",
    "|---|---|---|---|---|---|---|",
    ...rows.map(
      (row) =>
        `| ${row.what} | < ${row.aim_ms} | ${ms(row.p50_ms)} | ${ms(row.p95_ms)} | ${ms(row.p99_ms)} | ${(row.within_aim * 100).toFixed(1)} % | ${row.count} |`,
    ),
    ...share,
  ].join("\n");
}

const SECTIONS = {
  command: commandSection,
  turn: turnSection,
  memory: memorySection,
  budget: budgetSection,
  start: startSection,
  latency: latencySection,
} as const;

function machine(): string {
  const [cpu] = cpus();
  const version = /PRETTY_NAME="([^"]+)"/.exec(readFileSync("/etc/os-release", "utf8"))?.[1] ?? "unknown";
  return `${cpus().length} × ${cpu?.model.trim()}, ${(totalmem() / 2 ** 30).toFixed(0)} GiB, ${version}, Linux ${release()}, Node ${process.version}; load average at the start ${loadavg()
    .map((load) => load.toFixed(1))
    .join(" ")}`;
}

const named = script("npm run bench --", "Measures, and writes bench/RESULTS.md when all of it was measured.")
  .argument("[name...]", `only these: ${Object.keys(SECTIONS).join(", ")}`)
  .parse().args;
for (const name of named) {
  if (Object.hasOwn(SECTIONS, name)) continue;
  console.error(`there is no benchmark '${name}'; there are ${Object.keys(SECTIONS).join(", ")}`);
  process.exit(2);
}
const head = [
  "# Results",
  "",
  `Written by \`npm run bench\` on ${new Date().toISOString().slice(0, 10)}.`,
  "",
  `Machine: ${machine()}.`,
  "Broker, workers, gateway and clients share it. Read ratios, not absolute times.",
];
const sections: string[] = [];
for (const [name, run] of Object.entries(SECTIONS)) {
  if (named.length > 0 && !named.includes(name)) continue;
  const section = await run();
  console.log(`${section}\n`);
  sections.push(section);
}
if (named.length === 0) writeFileSync(RESULTS, `${[head.join("\n"), ...sections].join("\n\n")}\n`);
