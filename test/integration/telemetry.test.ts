// Goal:   what a deployment tells of itself is whole: every span and every line of a session's path says for whom; tokens by metric and by usage rows
//         are one sum; every instrument that is declared moves; and no id that has no bound is in a label.
// Method: the whole of Troupe with a collector of traces, scraped all the while; turns that answer, call tools, fail, fall back, are cancelled and
//         judged; then trouble of every kind that has an instrument: a killed worker, a client that does not read, a tenant with too much
//         waiting, a revoked key, and at the end a message that nobody can project.
import { once } from "node:events";
import { readdirSync, readFileSync } from "node:fs";
import { createServer, type Server } from "node:http";
import { type AddressInfo, connect as dial, type Socket } from "node:net";
import { join } from "node:path";
import { connect } from "nats";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { sendSignal, until } from "../../deploy/local/server-process.ts";
import { INSTRUMENTS } from "../../telemetry/metrics.ts";
import { attributesOf, type SpanCollector, startSpanCollector } from "../harness/span-collector.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

vi.setConfig({ testTimeout: 120_000 });

/** The spans that are a process's own, and nobody's in particular: none so far. */
const PROCESS_SPANS: readonly string[] = [];
const TENANT = "demo";
const TOKEN_CLASSES = ["input", "output", "cache_read", "cache_write", "reasoning"] as const;

let troupe: Troupe;
let collector: SpanCollector;
let broken: Server;
let scraping = true;
let scraped: Promise<void>;
const pages: string[] = [];
/** The largest that any process told, by instrument. */
const moved = new Map<string, number>();
const roles = new Set<string>();

const logsOf = (): { name: string; text: string }[] => {
  const logs = join(troupe.home, "logs");
  return readdirSync(logs).map((name) => ({ name, text: readFileSync(join(logs, name), "utf8") }));
};
/** Where each process of ours tells of itself now. */
const statusUrls = (): string[] => [
  ...logsOf().flatMap(({ text }) => [...(text.split("tracing is on").at(-1) ?? "").matchAll(/"(?:http|url)":"(http:[^"]+)"/g)].map((match) => match[1]!)),
];

interface Sample {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}
function samplesOf(page: string): Sample[] {
  return page.split("\n").flatMap((line) => {
    const [, name, labels = "", value] = /^(troupe_[a-z_]+)\{(.*)\} (\S+)$/.exec(line) ?? [];
    if (name === undefined) return [];
    return [{ name, labels: Object.fromEntries([...labels.matchAll(/([a-z_]+)="([^"]*)"/g)].map(([, key, text]) => [key!, text!])), value: Number(value) }];
  });
}

async function scrape(): Promise<string[]> {
  const found = await Promise.all(
    statusUrls().map((url) =>
      fetch(`${url}/metrics`, { signal: AbortSignal.timeout(2_000) }).then(
        (answer) => answer.text(),
        () => "",
      ),
    ),
  );
  for (const page of found) {
    pages.push(page);
    for (const { name, labels, value } of samplesOf(page)) {
      roles.add(labels["role"] ?? "");
      const instrument = name.replace(/_(bucket|sum|count)$/, "");
      const key = Object.hasOwn(INSTRUMENTS, name) ? name : instrument;
      moved.set(key, Math.max(moved.get(key) ?? 0, value));
    }
  }
  if (pages.length > 400) pages.splice(0, 200);
  return found;
}

async function put(agent: Record<string, unknown>): Promise<void> {
  const { code, stderr } = await typed(troupe, ["agents", "put", "--tenant", TENANT, "-"], { stdin: JSON.stringify(agent) });
  expect(code, stderr).toBe(0);
}
const sessions: string[] = [];
async function session(id: string, agent: string): Promise<void> {
  await troupe.json(201, "/v1/sessions", { json: { id, agent } });
  sessions.push(id);
}
/** Says it and reads the turn to its end. */
async function turn(id: string, steps: unknown): Promise<string> {
  const content = typeof steps === "string" ? steps : JSON.stringify(steps);
  const answer = await troupe.api(`/v1/sessions/${id}/messages`, { json: { content }, headers: { accept: "text/event-stream" } });
  return answer.text();
}

beforeAll(async () => {
  collector = await startSpanCollector();
  broken = createServer((_request, response) => void response.writeHead(500, { "content-type": "application/json" }).end(`{"error":{"message":"down"}}`));
  broken.listen(0, "127.0.0.1");
  await once(broken, "listening");
  troupe = await startTroupe({
    env: {
      OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
      OTEL_BSP_SCHEDULE_DELAY: "200",
      TROUPE_LOG_LEVEL: "debug",
      TROUPE_OPENAI_COMPATIBLE: `broken=http://127.0.0.1:${(broken.address() as AddressInfo).port}/v1`,
      TROUPE_TENANT_CALLS_WAITING_MAX: "4",
      TROUPE_MODEL_CALLS_MAX: "6",
      TROUPE_RATES_UNDECIDED: "open",
      // Longer than a call waits for its budget: who stands still for that long keeps its shards.
      TROUPE_LEASE_TTL_MS: "20000",
    },
  });
  scraped = (async () => {
    while (scraping) {
      await scrape();
      await later(150, undefined);
    }
  })();
  await put({ agent: "player", model: "simulated/script", tools: ["now", "wait_ms"] });
  await put({
    agent: "judged",
    model: "simulated/script",
    guardrails: [{ name: "kind", on: "input", kind: "judge", model: "simulated/echo", policy: "be kind" }],
  });
  await put({ agent: "unlucky", model: "broken/model", fallbacks: { models: ["simulated/echo"] } });
}, 120_000);
afterAll(async () => {
  scraping = false;
  await scraped;
  broken.close();
});

test("what the metrics of the workers count in tokens is what the usage rows sum to, by model and class, whatever became of the calls", async () => {
  await Promise.all([
    session("plain", "assistant"),
    session("tools", "player"),
    session("judge", "judged"),
    session("failing", "player"),
    session("cancel", "player"),
  ]);
  await Promise.all([
    turn("plain", "repeat this after me"),
    turn("tools", [{ say: "let me see" }, { call: "now", args: {} }, { call: "wait_ms", args: { ms: 20 } }, { think: "hm hm" }, { say: "it is late" }]),
    turn("judge", [{ say: "thank you" }]),
    turn("failing", [{ say: "this much and" }, { fail: "invalid_request" }]),
    (async () => {
      const said = turn("cancel", [{ say: "word", tokens: 400, token_ms: 25 }]);
      await later(800, undefined);
      await troupe.json(200, "/v1/sessions/cancel/cancel", { method: "POST", json: {} });
      await said;
    })(),
  ]);
  for (let n = 0; n < 3; n += 1) {
    await session(`unlucky${n}`, "unlucky");
    expect(await turn(`unlucky${n}`, "is anybody there")).toContain("turn.completed");
  }

  interface Row {
    readonly model: string;
    readonly [field: string]: unknown;
  }
  const usage = async (): Promise<Map<string, number>> => {
    const { stdout } = await typed(troupe, ["usage", "--tenant", TENANT, "--json"]);
    const sums = new Map<string, number>();
    for (const line of stdout
      .trim()
      .split("\n")
      .filter((text) => text !== "")) {
      const row = JSON.parse(line) as Row;
      for (const kind of TOKEN_CLASSES) {
        const key = `${row.model} ${kind}`;
        sums.set(key, (sums.get(key) ?? 0) + Number(row[`${kind}_tokens`] ?? 0));
      }
    }
    return sums;
  };
  const counted = async (): Promise<Map<string, number>> => {
    const sums = new Map<string, number>();
    for (const { name, labels, value } of (await scrape()).flatMap(samplesOf)) {
      if (name !== "troupe_model_tokens_total") continue;
      const key = `${labels["provider"]}/${labels["model"]} ${labels["class"]}`;
      sums.set(key, (sums.get(key) ?? 0) + value);
    }
    return sums;
  };
  const known = (sums: Map<string, number>): [string, number][] => [...sums].filter(([, sum]) => sum > 0).sort();
  let [rows, metric] = [await usage(), await counted()];
  // The rows come a moment after the turn.
  await until(
    async () => {
      [rows, metric] = [await usage(), await counted()];
      return JSON.stringify(known(rows)) === JSON.stringify(known(metric));
    },
    60_000,
    200,
  );
  expect(known(metric)).toEqual(known(rows));
  expect(known(rows).map(([key]) => key)).toEqual(
    expect.arrayContaining([
      "simulated/echo input",
      "simulated/echo output",
      "simulated/script input",
      "simulated/script output",
      "simulated/script reasoning",
    ]),
  );
});

test("every instrument that is declared moves in a deployment, and every kind of process serves them", async () => {
  // A tenant has too much waiting: one call more than are made at once, and most of those that may wait.
  const many = Array.from({ length: 30 }, (_, index) => `many${index}`);
  await Promise.all(many.map((id) => session(id, "player")));
  const crowd = many.map((id) => turn(id, [{ say: "slowly now", tokens: 20, token_ms: 100 }]));
  expect(await until(() => (moved.get("troupe_tenants_refused") ?? 0) > 0, 60_000, 100)).toBe(true);
  await Promise.all(crowd);

  // A budget's owner stands still, and a call at the other worker goes on without a place in its window.
  const owner = (await troupe.journal(`${TENANT}/budget/main`)).at(-1)?.worker ?? "";
  const views = await Promise.all(many.map((id) => troupe.json<{ id: string; worker: string }>(200, `/v1/sessions/${id}`)));
  const neighbour = views.find(({ worker }) => worker !== owner);
  const pid = troupe.processOf("worker", owner);
  sendSignal(pid, "SIGSTOP");
  try {
    await troupe.json(202, `/v1/sessions/${neighbour?.id}/messages`, { json: { content: JSON.stringify([{ say: "by myself" }]) } });
    expect(await until(() => (moved.get("troupe_rates_undecided_total") ?? 0) > 0, 60_000, 100)).toBe(true);
  } finally {
    sendSignal(pid, "SIGCONT");
  }

  // A worker is killed in the middle of a call.
  await session("taken", "player");
  const taken = turn("taken", [{ say: "on and on", tokens: 120, token_ms: 50 }]);
  await later(1_000, undefined);
  const { worker } = await troupe.json<{ worker: string }>(200, "/v1/sessions/taken");
  const killed = await troupe.kill9("worker", worker);
  expect(await taken).toContain("turn.completed");
  await troupe.replaced(killed);

  // A client comes onto the bus, and its key is revoked.
  const made = await typed(troupe, ["keys", "create", "--tenant", TENANT, "--json"]);
  const { key, key_id } = JSON.parse(made.stdout) as { key: string; key_id: string };
  const client = await connect({ servers: troupe.dev().nats_url, token: key, inboxPrefix: `_INBOX_${TENANT}`, reconnect: false });
  expect((await typed(troupe, ["keys", "revoke", key_id, "--tenant", TENANT])).code).toBe(0);
  await client.closed();

  // A client that does not read what it asked for.
  await session("flood", "player");
  const { hostname, port } = new URL(troupe.gateway_url);
  const deaf: Socket = dial(Number(port), hostname);
  deaf.write(`GET /v1/sessions/flood/events HTTP/1.1\r\nhost: x\r\nauthorization: Bearer ${troupe.key}\r\naccept: text/event-stream\r\n\r\n`);
  deaf.pause();
  const large = "x".repeat(700_000);
  for (let n = 0; n < 40 && (moved.get("troupe_gateway_gaps_repaired_total") ?? 0) === 0; n += 1) {
    const answer = await troupe.api("/v1/sessions/flood/messages", { json: { content: JSON.stringify([{ say: large }]) } });
    expect(answer.status, await answer.text()).toBe(202);
    const idle = async (): Promise<boolean> => (await troupe.json<{ state: string }>(200, "/v1/sessions/flood")).state === "idle";
    expect(await until(idle, 60_000, 20)).toBe(true);
  }
  deaf.destroy();

  // What nobody can project.
  const { user, password } = troupe.dev().nats_operator;
  const operator = await connect({ servers: troupe.dev().nats_url, user, pass: password });
  await operator.jetstream().publish(`tenant.${TENANT}.session.nonsense.event`, "no journal message");
  await operator.close();

  const unmoved = (): string[] => Object.keys(INSTRUMENTS).filter((name) => (moved.get(name) ?? 0) === 0);
  await until(() => unmoved().length === 0, 60_000, 200);
  expect(unmoved()).toEqual([]);
  expect([...roles].sort()).toEqual(expect.arrayContaining(["gateway", "projector", "supervisor", "worker"]));
});

test("no label of any instrument bears a tenant, a session, a user, a key or an actor", () => {
  const unbounded = [TENANT, ...sessions, ...troupe.dev().tenants.map(({ id }) => id)];
  const values = new Set(pages.flatMap(samplesOf).flatMap(({ labels }) => Object.values(labels)));
  expect(values.size).toBeGreaterThan(20);
  for (const value of values) for (const id of unbounded) expect(value === id || value.includes(`${id}/`) ? `${value} bears ${id}` : "").toBe("");
});

test("every span that was exported says for which tenant, session and agent it is", async () => {
  const counted = (): number => collector.received.length;
  for (let before = -1; before !== counted(); await until(() => counted() > before, 1_000, 50)) before = counted();
  const spans = collector.spans().filter(({ name }) => !PROCESS_SPANS.includes(name));
  expect(new Set(spans.map(({ name }) => name))).toEqual(new Set(["load_configuration", "call_model", "call_tool"]));
  expect(spans.length).toBeGreaterThan(40);
  for (const span of spans) {
    const { tenant, session: id, agent } = attributesOf(span);
    expect([span.name, tenant, typeof id, typeof agent]).toEqual([span.name, TENANT, "string", "string"]);
    expect([...sessions, "hello"]).toContain(id);
  }
  expect(new Set(spans.map((span) => attributesOf(span)["agent"]))).toEqual(new Set(["assistant", "player", "judged", "unlucky"]));
});

test("every line of a log that has to do with a session says for which tenant and session it is", () => {
  let lines = 0;
  for (const { name, text } of logsOf())
    for (const line of text.split("\n").filter((one) => one.startsWith("{"))) {
      const told = JSON.parse(line) as Record<string, unknown>;
      const about = sessions.find((id) => JSON.stringify(told).match(new RegExp(`["./]${id}["./:]`)) !== null);
      if (about === undefined) continue;
      lines += 1;
      expect([name, told["what"], told["tenant"], told["session"]]).toEqual([name, told["what"], TENANT, about]);
    }
  expect(lines).toBeGreaterThan(0);
});
