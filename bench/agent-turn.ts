// agent-turn: (b) a turn of 100 tokens from a local server of OpenAI's format, through gateway, worker, journal and back as SSE, beside calling
// that server directly: what we add to the first token and to the end, turns a second, and processor time per 1,000 turns.
import { createParser } from "eventsource-parser";
import { startModelServer } from "../test/contract/model-server.ts";
import { type BenchCluster, quantiles, startCluster } from "./cluster.ts";

const TOKENS = 100;
const TURNS = Number(process.env["BENCH_TURNS"] ?? 60);
const WARM_UP_TURNS = 320;
const LOAD_MS = Number(process.env["BENCH_MS"] ?? 8000);

interface Times {
  readonly first_ms: number;
  readonly end_ms: number;
}

/** Reads a stream of server-sent events; tells when the first text came and when it ended. */
async function readStream(response: Response, began_ms: number, isText: (event: string | undefined, data: string) => boolean): Promise<Times> {
  if (response.status !== 200 || response.body === null) throw new Error(`answered ${response.status}: ${await response.text()}`);
  let first_ms: number | undefined;
  const parser = createParser({
    onEvent(event) {
      if (first_ms === undefined && isText(event.event, event.data)) first_ms = performance.now() - began_ms;
    },
  });
  const decoder = new TextDecoder();
  for await (const chunk of response.body) parser.feed(decoder.decode(chunk, { stream: true }));
  if (first_ms === undefined) throw new Error("no text came");
  return { first_ms, end_ms: performance.now() - began_ms };
}

async function directTurn(url: string): Promise<Times> {
  const began_ms = performance.now();
  const body = JSON.stringify({ model: "m", stream: true, stream_options: { include_usage: true }, messages: [{ role: "user", content: "go" }] });
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: "Bearer x" },
    body,
  });
  return readStream(response, began_ms, (_event, data) => /"content":"[^"]/.test(data));
}

async function ourTurn(cluster: BenchCluster, session: string): Promise<Times> {
  const began_ms = performance.now();
  const response = await fetch(`${cluster.gateway_url}/v1/sessions/${session}/messages`, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream", authorization: `Bearer ${cluster.key}` },
    body: JSON.stringify({ content: "go" }),
  });
  return readStream(response, began_ms, (event) => event === "token");
}

/** Code that has run some hundred times is what a service runs; compiling it is not what a turn costs. */
async function warmUp(cluster: BenchCluster, url: string): Promise<void> {
  await Promise.all(
    Array.from({ length: 8 }, async (_, n) => {
      await createSession(cluster, `w${n}`);
      for (let turn = 0; turn < WARM_UP_TURNS / 8; turn++) {
        await directTurn(url);
        await ourTurn(cluster, `w${n}`);
      }
    }),
  );
}

async function createSession(cluster: BenchCluster, id: string): Promise<void> {
  const response = await fetch(`${cluster.gateway_url}/v1/sessions`, {
    method: "POST",
    headers: { "content-type": "application/json", authorization: `Bearer ${cluster.key}` },
    body: JSON.stringify({ id, agent: "a" }),
  });
  if (response.status !== 201) throw new Error(`the session was not created: ${await response.text()}`);
  await response.body?.cancel();
}

export interface TurnRow {
  readonly token_ms: number;
  /** Medians of one turn at a time, ours minus direct, pair by pair. */
  readonly added_first_ms: number;
  readonly added_end_ms: number;
  readonly direct_first_ms: number;
  readonly ours_first_ms: number;
  readonly turns_per_s_at_64: number;
  readonly direct_turns_per_s_at_64: number;
  readonly cpu_s_per_1000_turns: number;
}

const median = (values: number[]): number => quantiles(values).p50_ms;

async function atOnce(concurrency: number, turn: (n: number) => Promise<unknown>): Promise<number> {
  let turns = 0;
  const until_ms = performance.now() + LOAD_MS;
  const began_ms = performance.now();
  await Promise.all(
    Array.from({ length: concurrency }, async (_, n) => {
      while (performance.now() < until_ms) {
        await turn(n);
        turns++;
      }
    }),
  );
  return (turns / (performance.now() - began_ms)) * 1000;
}

export async function benchAgentTurn(): Promise<TurnRow[]> {
  const rows: TurnRow[] = [];
  for (const token_ms of [0, 5]) {
    const server = await startModelServer({ answer: { tokens: TOKENS, token_ms }, requests_kept_max: 0 });
    const cluster = await startCluster({
      workers: 2,
      gateway: true,
      agent: { model: "openai/m" },
      env: { OPENAI_API_KEY: "x", OPENAI_BASE_URL: `${server.url}/v1` },
    });
    try {
      // A fresh session a turn, made before the clock runs, so that prompts stay as long as the direct call's.
      const ids = Array.from({ length: TURNS + 5 }, (_, n) => `t${n}`);
      for (const id of ids) await createSession(cluster, id);
      await warmUp(cluster, server.url);
      for (const id of ids.slice(TURNS)) await ourTurn(cluster, id);
      const ours: Times[] = [];
      const direct: Times[] = [];
      for (const id of ids.slice(0, TURNS)) {
        direct.push(await directTurn(server.url));
        ours.push(await ourTurn(cluster, id));
      }
      const sessions = Array.from({ length: 64 }, (_, n) => `l${n}`);
      await Promise.all(sessions.map((id) => createSession(cluster, id)));
      const direct_turns_per_s_at_64 = await atOnce(64, () => directTurn(server.url));
      const cpu_before = cluster.cpu_s();
      const began_ms = performance.now();
      const turns_per_s_at_64 = await atOnce(64, (n) => ourTurn(cluster, sessions[n]!));
      const turns = (turns_per_s_at_64 * (performance.now() - began_ms)) / 1000;
      rows.push({
        token_ms,
        added_first_ms: median(ours.map((one, n) => one.first_ms - direct[n]!.first_ms)),
        added_end_ms: median(ours.map((one, n) => one.end_ms - direct[n]!.end_ms)),
        direct_first_ms: median(direct.map((one) => one.first_ms)),
        ours_first_ms: median(ours.map((one) => one.first_ms)),
        turns_per_s_at_64,
        direct_turns_per_s_at_64,
        cpu_s_per_1000_turns: ((cluster.cpu_s() - cpu_before) / turns) * 1000,
      });
    } finally {
      await cluster.stop();
      await server.close();
    }
  }
  return rows;
}

if (import.meta.main) console.table(await benchAgentTurn());
