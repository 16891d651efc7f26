// Goal:   a provider's key (the platform's, and a tenant's own), the master keys, and a tenant's key are nowhere but where they are used: in no stream,
//         bucket, table, log, metric, trace, error, answer, crash report, file, command line, and in the surroundings of no process but the workers.
// Method: the whole of Troupe with keys that are unmistakable, and providers on this machine that repeat the key they were shown in every way a
//         provider does: in errors of every status, in a stream that breaks, in headers. Turns fail, retry and succeed; then everything is searched,
//         for the key as it is and as it may be encoded. Traces go to a collector here; every process writes Node's report of itself, and a worker
//         breaks on an error that has its keys in it.
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import pg from "pg";
import { afterAll, beforeAll, expect, test } from "vitest";
import { BUCKETS, STREAMS } from "../../bus/port.ts";
import { MASTER_KEYS_FILE } from "../../deploy/local/secrets.ts";
import { sendSignal, until } from "../../deploy/local/server-process.ts";
import { freshFolder } from "../harness/servers.ts";
import { type CollectedSpan, type SpanCollector, startSpanCollector } from "../harness/span-collector.ts";
import { typed } from "../harness/typed-command.ts";
import { startTwoTenants, type TwoTenants } from "./two-tenants.ts";

const SENTINELS = {
  ANTHROPIC_API_KEY: "SENTINELanthropic0123456789abcdef",
  OPENAI_API_KEY: "SENTINELopenai0123456789abcdef",
  GEMINI_API_KEY: "SENTINELgemini0123456789abcdef",
  TROUPE_OPENAI_COMPATIBLE_KEY_LOCAL: "SENTINELcompatible0123456789abcdef",
};
const SHOWN = "SENTINEL";
/** The keys of one tenant's own, given while it runs: the first two over HTTP, the others at the command line. */
const OWN = {
  anthropic: "SENTINELown-anthropic0123456789abcdef",
  openai: "SENTINELown-openai0123456789abcdef",
  google: "SENTINELown-google0123456789abcdef",
  local: "SENTINELown-compatible0123456789abcdef",
};
/** The word as it may be written by something that encodes it: base64 at its three places, and hex. */
const WRITTEN = [
  SHOWN,
  ...["", "x", "xx"].map((before) =>
    Buffer.from(before + SHOWN)
      .toString("base64")
      .slice(before === "" ? 0 : 4, before === "" ? 10 : 12),
  ),
  Buffer.from(SHOWN).toString("hex"),
];

let provider: Server;
let ground: TwoTenants;
let shown_keys = 0;
/** Of them, a tenant's own. */
let shown_own_keys = 0;
/** What the tenant's own keys rest under. */
let master_key = "";
const answers: string[] = [];
let collector: SpanCollector;
let reports = "";
let crashed = "";

/** Breaks a process on request, with an error that bears all that it was told. */
const BREAKS = `process.on("SIGWINCH", () => { throw new Error("broke on purpose, knowing " + Object.values(process.env).join(" ")); });`;

/** Repeats the key in what it answers, in the way that the model's name asks for. */
function repeat(request: IncomingMessage, response: ServerResponse, body: string): void {
  const url = request.url ?? "";
  const key =
    `${String(request.headers["authorization"] ?? "")} ${String(request.headers["x-api-key"] ?? "")} ${String(request.headers["x-goog-api-key"] ?? "")} ${url.includes("key=") ? url : ""}`.trim();
  if (key.includes(SHOWN)) shown_keys += 1;
  if (key.includes(`${SHOWN}own`)) shown_own_keys += 1;
  const how = /(auth|broken|limit|html|stream)-please/.exec(url + body)?.[1] ?? "auth";
  const error = JSON.stringify({
    type: "error",
    error: { type: "authentication_error", code: "invalid_api_key", status: "UNAUTHENTICATED", message: `Incorrect API key provided: ${key}` },
  });
  if (how === "auth") response.writeHead(401, { "content-type": "application/json", "x-key": key }).end(error);
  else if (how === "broken") response.writeHead(500, { "content-type": "application/json" }).end(error);
  else if (how === "limit") response.writeHead(429, { "content-type": "application/json", "retry-after": "1" }).end(error);
  else if (how === "html") response.writeHead(502, { "content-type": "text/html" }).end(`<html>Bad gateway for ${key}</html>`);
  else
    response
      .writeHead(200, { "content-type": "text/event-stream" })
      .end(`data: {"error":{"message":"the key ${key} is not welcome","code":"invalid_api_key"}}\n\n`);
}

beforeAll(async () => {
  provider = createServer((request, response) => {
    let body = "";
    request.on("data", (data: Buffer) => (body += data.toString()));
    request.on("end", () => repeat(request, response, body));
  });
  await new Promise<void>((resolve) => provider.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${(provider.address() as AddressInfo).port}`;
  collector = await startSpanCollector();
  const folder = freshFolder("crash");
  reports = join(folder, "reports");
  mkdirSync(reports);
  writeFileSync(join(folder, "breaks.mjs"), BREAKS);
  ground = await startTwoTenants({
    env: {
      ...SENTINELS,
      OTEL_EXPORTER_OTLP_ENDPOINT: collector.url,
      OTEL_BSP_SCHEDULE_DELAY: "200",
      NODE_OPTIONS: `--import ${join(folder, "breaks.mjs")} --report-on-signal --report-uncaught-exception --report-directory=${reports}`,
      ANTHROPIC_BASE_URL: url,
      OPENAI_BASE_URL: `${url}/v1`,
      GOOGLE_GEMINI_BASE_URL: url,
      TROUPE_OPENAI_COMPATIBLE: `local=${url}/v1`,
      TROUPE_LOG_LEVEL: "debug",
    },
  });
  const { troupe, keys } = ground;
  master_key = /:(\S+)/.exec(readFileSync(join(troupe.home, MASTER_KEYS_FILE), "utf8"))![1]!;
  const admin = await ground.key("rival", { scopes: ["admin"] });
  const put = async (provider: string, body: object | string): Promise<void> => {
    const text = typeof body === "string" ? body : JSON.stringify(body);
    const headers = { "content-type": "application/json" };
    answers.push(await (await troupe.api(`/v1/provider-keys/${provider}`, { method: "PUT", key: admin.key, body: text, headers })).text());
  };
  await put("anthropic", { key: OWN.anthropic, label: "own" });
  await put("openai", { key: OWN.openai });
  // As people get it wrong: no JSON, the wrong field, a word too many, a provider that there is not.
  for (const wrong of [`{"key": ${OWN.openai}}`, `{"key": "${OWN.openai}",}`, { api_key: OWN.openai }, { key: `Bearer ${OWN.openai}` }, { key: [OWN.openai] }])
    await put("openai", wrong);
  await put("opnai", { key: OWN.openai });
  for (const provider of ["google", "local"] as const) {
    const { code, stdout, stderr } = await troupe.cli(["provider-keys", "set", "--tenant", "rival", provider], { stdin: OWN[provider] });
    expect(code, stderr).toBe(0);
    answers.push(stdout, stderr);
  }
  const models = ["anthropic/claude-sonnet-5", "openai/gpt-5.6-luna", "google/gemini-3.5-flash", "local/some-model"];
  await Promise.all(
    models.flatMap((model, index) =>
      (["auth", "html", "stream", "own-auth", "own-broken", "own-stream"] as const).map(async (wanted) => {
        const key = wanted.startsWith("own") ? keys.rival : keys.acme;
        const how = wanted.replace("own-", "");
        const id = `m${index}-${how}`;
        const made = await troupe.api("/v1/sessions", { key, json: { id, agent: "assistant", overrides: { model } } });
        answers.push(await made.text());
        if (made.status !== 201) return;
        const end = new AbortController();
        const patience = setTimeout(() => end.abort(), 12_000);
        try {
          const said = await troupe.api(`/v1/sessions/${id}/messages`, {
            key,
            json: { content: `${how}-please` },
            headers: { accept: "text/event-stream" },
            signal: end.signal,
          });
          answers.push(await said.text());
        } catch (error) {
          if (!end.signal.aborted) throw error; // a turn that is still being retried is cut off: what it left is searched all the same
        }
        clearTimeout(patience);
        answers.push(await (await troupe.api(`/v1/sessions/${id}`, { key })).text());
      }),
    ),
  );
  for (const args of [
    ["show", "acme/session/m0-auth"],
    ["explain", "acme/session/m0-auth"],
    ["doctor"],
    ["models"],
    ["keys", "list", "--tenant", "acme", "--json"],
    ["show", "rival/session/m0-auth"],
    ["show", "rival/tenant/main", "--entries", "40"],
    ["replay", "rival/tenant/main", "--json"],
    ["usage", "--tenant", "rival", "--json"],
    ["audit", "export", "--tenant", "rival"],
    ["provider-keys", "list", "--tenant", "rival"],
    ["provider-keys", "rotate", "--tenant", "rival", "--json"],
    ["provider-keys", "remove", "--tenant", "rival", "local"],
  ]) {
    // What a process of its own says besides (its log) is looked at where the secrets are handled.
    const { stdout, stderr } = await (args[0] === "doctor" || args[1] === "rotate" ? troupe.cli(args) : typed(troupe, args));
    answers.push(stdout, stderr);
  }
  const ours = troupe.dev().processes.filter(({ role }) => ["up", "worker", "supervisor", "gateway", "projector"].includes(role));
  for (const { pid } of ours) sendSignal(pid, "SIGUSR2");
  if (!(await until(() => readdirSync(reports).length >= ours.length, 60_000, 100))) throw new Error(`only ${readdirSync(reports).length} reports came`);
  const worker = ours.find(({ role }) => role === "worker")!;
  crashed = worker.id;
  sendSignal(worker.pid, "SIGWINCH");
  await troupe.replaced(worker);
  const runs = (): number => readFileSync(join(troupe.home, "logs", `worker-${crashed}.log`), "utf8").split('"worker runs"').length - 1;
  if (!(await until(() => runs() === 2, 60_000, 50))) throw new Error("the worker that broke did not run again");
  // What was begun is told within the delay that was set.
  const counted = (): number => collector.received.length;
  for (let before = -1; before !== counted();) {
    before = counted();
    await until(() => counted() > before, 1_000, 50);
  }
}, 180_000);
afterAll(() => void provider.close());

function expectClean(where: string, text: string): void {
  for (const word of [...WRITTEN, ground.keys.acme, ground.keys.rival, master_key, Buffer.from(master_key, "base64").toString("hex")]) {
    const at = text.indexOf(word);
    expect(at < 0 ? "" : `${where}: …${text.slice(Math.max(0, at - 120), at + 40)}…`).toBe("");
  }
}

test("the providers were shown the keys and repeated them, and turns told of failures: there was something to leak", () => {
  expect(shown_keys).toBeGreaterThan(5);
  expect(shown_own_keys).toBeGreaterThan(5);
  expect(answers.join("\n")).toContain('"last_four":"cdef"');
  expect(answers.join("\n")).toMatch(/provider_key.put/);
  expect(master_key).toMatch(/^[A-Za-z0-9+/]{43}=$/);
  expect(answers.join("\n")).toMatch(/turn\.failed/);
  expect(answers.join("\n")).toMatch(/\[redacted\]|redacted|…|\*\*\*/i);
});

test("the search finds a key as it is and as it may be encoded", () => {
  const key = SENTINELS.OPENAI_API_KEY;
  const hidden = [
    key,
    Buffer.from(key).toString("hex"),
    ...["", "a", "ab"].map((before) => Buffer.from(`${before}${key}`).toString("base64")),
    `x${ground.keys.acme}x`,
    master_key,
  ];
  for (const text of hidden) expect(() => expectClean("planted", `before ${text} after`)).toThrow();
});

test("no answer, event stream or command's output has a key in it", () => {
  for (const answer of answers) expectClean("an answer", answer);
});

test("no stream and no bucket has a key in it", async () => {
  const bus = await ground.troupe.bus();
  let messages = 0;
  for (const stream of STREAMS)
    for await (const { subject, headers, data } of bus.read(stream, ">", 1)) {
      messages += 1;
      expectClean(`${stream} ${subject}`, `${JSON.stringify(headers)} ${Buffer.from(data).toString("latin1")}`);
    }
  for (const name of BUCKETS)
    for (const { key, value } of await bus.bucket(name).all()) expectClean(`${name} ${key}`, `${key} ${Buffer.from(value).toString("latin1")}`);
  expect(messages).toBeGreaterThan(50);
});

test("no table has a key in it", async () => {
  const client = new pg.Client({ connectionString: ground.troupe.dev().postgres_url });
  await client.connect();
  try {
    const { rows: tables } = await client.query<{ name: string }>(
      `select format('%I.%I', schemaname, tablename) as name from pg_tables where schemaname not in ('pg_catalog', 'information_schema')`,
    );
    expect(tables.length).toBeGreaterThan(4);
    for (const { name } of tables) {
      const { rows } = await client.query<{ row: string }>(`select t::text as row from ${name} t`);
      for (const { row } of rows) expectClean(name, row);
    }
  } finally {
    await client.end();
  }
});

test("no trace has a key in it, as a name, an attribute, an event or a header", () => {
  const spans = collector.spans();
  for (const name of ["load_configuration", "call_model"]) expect(spans.filter((span) => span.name === name).length).toBeGreaterThan(5);
  expect([...collector.paths]).toEqual(["/v1/traces"]);
  for (const body of collector.received) expectClean("a trace", body);
  // The very search that was just made finds one that is planted.
  const planted: CollectedSpan = { ...spans[0]!, attributes: [{ key: "model", value: { stringValue: SENTINELS.OPENAI_API_KEY } }] };
  expect(() => expectClean("a trace", JSON.stringify(planted))).toThrow();
});

test("no report that a process wrote of itself has a key in it, and one that broke on its keys told of it without them", () => {
  const names = readdirSync(reports);
  expect(names.length).toBeGreaterThan(5);
  for (const name of names) {
    const report = readFileSync(join(reports, name), "utf8");
    expect(Object.keys(JSON.parse(report) as object)).toContain("javascriptStack");
    expectClean(name, report);
  }
  const log = readFileSync(join(ground.troupe.home, "logs", `worker-${crashed}.log`), "utf8");
  expect(log).toMatch(/broke on purpose, knowing .*\[redacted\].*"what":"the process broke"/);
  expectClean("the log of the worker that broke", log);
});

test("no metric of any process has a key in it", async () => {
  const logs = join(ground.troupe.home, "logs");
  const urls = readdirSync(logs).flatMap((name) =>
    // One of them began a second time, at another address.
    [...(readFileSync(join(logs, name), "utf8").split("tracing is on").at(-1) ?? "").matchAll(/"(?:http|url)":"(http:[^"]+)"/g)].map((match) => match[1]!),
  );
  expect(urls.length).toBeGreaterThan(3);
  for (const url of urls) for (const path of ["/metrics", "/readyz", "/healthz"]) expectClean(url + path, await (await fetch(url + path)).text());
});

test("no file of $TROUPE_HOME has a provider's key in it, and none but the development machine's own notes a tenant's", () => {
  let files = 0;
  const walk = (directory: string): void => {
    for (const name of readdirSync(directory)) {
      const path = join(directory, name);
      if (path === join(ground.troupe.home, "cache")) continue; // compiled code, shared by all runs
      if (path === join(ground.troupe.home, MASTER_KEYS_FILE)) {
        expect(statSync(path).mode & 0o077, "the file of master keys is its owner's alone").toBe(0);
        expect(readFileSync(path, "utf8")).not.toContain(SHOWN);
        continue;
      }
      const stats = statSync(path, { throwIfNoEntry: false });
      if (stats?.isDirectory()) walk(path);
      else if (stats?.isFile() && stats.size > 0) {
        files += 1;
        expectClean(path, readFileSync(path).toString("latin1"));
      }
    }
  };
  walk(ground.troupe.home);
  expect(files).toBeGreaterThan(20);
});

test("no command line has a key in it, and no process but `up` and the workers is told one", () => {
  for (const { role, pid } of ground.troupe.dev().processes) {
    expectClean(`${role}'s command line`, execFileSync("ps", ["-o", "command=", "-p", String(pid)], { encoding: "latin1" }));
    // What a process was told can be seen where the system shows it.
    const surroundings = `/proc/${pid}/environ`;
    if (!existsSync(surroundings)) continue;
    const told = readFileSync(surroundings, "latin1");
    if (role === "up" || role === "worker") expect(told).toContain(SHOWN);
    else expectClean(`${role}'s surroundings`, told);
  }
});
