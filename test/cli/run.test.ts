// Goal: what is typed is understood or refused before anything is touched, and the exit code says which of four things happened.
// Method: the command with ports that have nothing behind them; what is reached for is told.
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { INVARIANTS } from "../../actors/verify.ts";
import type { CliPorts, TextOutput } from "../../cli/ports.ts";
import { createProgram } from "../../cli/run.ts";
import type { Database } from "../../projections/database.ts";
import { run } from "./ground.ts";

/** A database that answers each statement by its first matching word. */
function databaseOf(answers: Readonly<Record<string, readonly object[]>>, seen: { sql: string; values: unknown }[] = []): Database {
  const query = async <R>(sql: string, values: unknown = []): Promise<R[]> => {
    seen.push({ sql, values });
    const [, rows] = Object.entries(answers).find(([word]) => sql.includes(word)) ?? [];
    return (rows ?? []) as R[];
  };
  return {
    query,
    read: (_reader, sql, values) => query(sql, values),
    transaction: (work) => work({ query }),
    migrate: async () => ["0001_projections"],
    close: async () => {},
  };
}

describe("wrong usage", () => {
  test.each([
    [[]],
    [["nothing"]],
    [["send", "acme/session/s1"]],
    [["send", "acme/budget/main", "hello"]],
    [["send", "a b/session/s1", "hello"]],
    [["show", "acme/nothing/s1"]],
    [["sessions"]],
    [["sessions", "--tenant", "a.b"]],
    [["sessions", "--tenant", "acme", "--limit", "0"]],
    [["replay", "acme/session/s1", "--to", "-1"]],
    [["verify", "acme/session/s1/more"]],
    [["verify", "--colour"]],
    [["keys", "create"]],
    [["worker", "--http-port", "99999"]],
    [["machines", "--format", "png"]],
    [["tenants"]],
    [["drain"]],
    [["migrate", "now"]],
  ])("%j is exit code 2, said on stderr, and reaches for nothing", async (argv) => {
    let reached = 0;
    const reach = () => {
      reached += 1;
      return Promise.reject(new Error("reached"));
    };
    const ran = await run(argv, { connectBus: reach, openDatabase: reach, fetch: reach });
    expect(ran.code).toBe(2);
    expect(ran.stdout).toBe("");
    expect(ran.stderr).not.toBe("");
    expect(reached).toBe(0);
  });
});

describe("help", () => {
  const ports = { env: {}, stdout: { write() {} }, stderr: { write() {} }, roles: {} } as unknown as CliPorts;
  const commands = createProgram(ports, () => {}).commands.flatMap((command) =>
    command.commands.length > 0 ? command.commands.map((sub) => [command.name(), sub.name()]) : [[command.name()]],
  );

  test("every command of the wire contract that is built is there", () => {
    const built =
      "up worker supervisor gateway projector send chat tail sessions show explain unpark replay verify workers waits shards drain tenants keys provider-keys agents permissions budget webhooks models usage concurrency audit migrate doctor machines";
    expect(new Set(commands.map(([name]) => name))).toEqual(new Set(built.split(" ")));
  });

  test.each(commands.map((words) => [words]))("%j --help is exit code 0, shows an example, and says the form of its JSON", async (words) => {
    const ran = await run([...words, "--help"]);
    expect(ran.code).toBe(0);
    expect(ran.stdout).toMatch(/Examples:\n {2}\$ /);
    if (!["up", "worker", "supervisor", "gateway", "projector"].includes(words[0] as string))
      expect(ran.stdout).toMatch(/--json +print (one JSON document|JSON lines)/);
  });

  test("docs/cli.md tells every command, argument and option as the help does, every invariant, and no other", async () => {
    const doc = await readFile(new URL("../../docs/cli.md", import.meta.url), "utf8");
    const leaves = createProgram(ports, () => {}).commands.flatMap((command) =>
      command.commands.length > 0
        ? command.commands.map((sub) => ({ name: `${command.name()} ${sub.name()}`, sub }))
        : [{ name: command.name(), sub: command }],
    );
    const sections = new Map(
      doc
        .split("\n### troupe ")
        .slice(1)
        .map((section) => [section.split("\n")[0]?.replace(/ [<[].*/, ""), section]),
    );
    expect([...sections.keys()].sort()).toEqual(leaves.map(({ name }) => name).sort());
    for (const { name, sub } of leaves) {
      const section = sections.get(name);
      const rows = [...sub.registeredArguments.map((one) => [one.name(), one.description]), ...sub.options.map((one) => [one.flags, one.description])];
      for (const [word, says] of rows) expect(section).toContain(`| \`${word}\` | ${says}`);
      expect(section?.match(/^\| `/gm) ?? []).toHaveLength(rows.length);
    }
    for (const [invariant, says] of Object.entries(INVARIANTS)) expect(doc).toContain(`| ${invariant} | ${says}`);
  });

  test("the whole help names the exit codes and the environment", async () => {
    const { code, stdout } = await run(["--help"]);
    expect(code).toBe(0);
    expect(stdout).toContain("0 done, 1 refused or found a violation, 2 wrong usage, 3 unreachable");
    expect(stdout).toContain("TROUPE_NATS_URL");
  });
});

describe("unreachable", () => {
  test.each([
    [["workers"], "NATS cannot be reached: no broker here"],
    [["verify"], "NATS cannot be reached"],
    [["sessions", "--tenant", "acme"], "Postgres cannot be reached: no database here"],
    [["migrate"], "Postgres cannot be reached"],
    [["chat", "--gateway", "http://127.0.0.1:1", "--key", "k"], "the gateway at http://127.0.0.1:1 cannot be reached"],
    [["chat"], "dev.json does not exist"],
  ])("%j is exit code 3 and says what does not answer", async (argv, what) => {
    const ran = await run(argv);
    expect(ran.code).toBe(3);
    expect(ran.stderr).toContain(what);
  });

  test("with --json the refusal is on stdout too", async () => {
    const ran = await run(["workers", "--json"]);
    expect(ran.lines()).toMatchObject([{ ok: false, error: { code: "unavailable" } }]);
  });
});

describe("roles", () => {
  test("hear their options, with defaults from the environment that was given", async () => {
    expect((await run(["up", "--workers", "3", "--port", "0"])).stdout).toBe('up {"port":0,"workers":3}\n');
    expect((await run(["up"], { env: { TROUPE_WORKERS: "5" } })).stdout).toBe('up {"workers":5}\n');
    expect((await run(["worker", "--id", "w1"], { env: { TROUPE_HTTP_PORT: "9000" } })).stdout).toBe('worker {"id":"w1","http_port":9000}\n');
    expect((await run(["supervisor"])).stdout).toBe('supervisor {"http_port":0}\n');
    expect((await run(["gateway", "--host", "0.0.0.0"])).stdout).toBe('gateway {"http_port":8787,"host":"0.0.0.0"}\n');
    expect((await run(["gateway"], { env: { TROUPE_PORT: "1234" } })).stdout).toBe('gateway {"http_port":1234,"host":"127.0.0.1"}\n');
    expect((await run(["projector", "--rebuild"])).stdout).toBe('projector {"http_port":0,"rebuild":true}\n');
  });

  test("the role's exit code is the command's", async () => {
    const roles = { up: async () => 3 } as unknown as CliPorts["roles"];
    expect((await run(["up"], { roles })).code).toBe(3);
  });
});

describe("records", () => {
  const session = {
    session: "s1",
    state: "idle",
    reason: null,
    agent: "echo",
    model: "simulated/echo",
    turn: 2,
    worker: "w1",
    epoch: 1,
    created_at: "2026-11-21T00:00:00.000Z",
    updated_at: "2026-11-21T00:00:00.000Z",
  };

  test("sessions is a table for people and one document for machines", async () => {
    const openDatabase = async () => databaseOf({ "from sessions": [session] });
    expect((await run(["sessions", "--tenant", "acme"], { openDatabase })).stdout).toBe(
      "session  state  agent  model           turn  worker  epoch  updated\ns1       idle   echo   simulated/echo     2  w1          1  2026-11-21T00:00:00.000Z\n",
    );
    expect(JSON.parse((await run(["sessions", "--tenant", "acme", "--json"], { openDatabase })).stdout)).toEqual({ items: [session], next: null });
  });

  test("usage --json is one object per attempt; for people it is sums", async () => {
    const attempt = { session: "s1", inst: "4:model", attempt: 1, model: "simulated/echo", cost_usd_micros: 21, stream_sequence: 4 };
    const total = {
      agent: "echo",
      model: "simulated/echo",
      attempts: 2,
      attempts_unpriced: 1,
      input_tokens: 1,
      output_tokens: 2,
      cache_read_tokens: 0,
      cache_write_tokens: 0,
      reasoning_tokens: 0,
      cost_usd_micros: 42,
    };
    const openDatabase = async () => databaseOf({ "group by": [total], "order by stream_sequence": [attempt] });
    expect((await run(["usage", "--tenant", "acme", "--json"], { openDatabase })).lines()).toEqual([attempt]);
    expect((await run(["usage", "--tenant", "acme"], { openDatabase })).stdout).toContain("$0.000042 for 2 attempts, and 1 of unknown cost");
  });

  test("what the database refuses is a refusal with its code", async () => {
    const ran = await run(["audit", "--tenant", "acme", "--since", "yesterday"], { openDatabase: async () => databaseOf({}) });
    expect(ran).toMatchObject({ code: 1, stderr: expect.stringContaining("invalid: 'since' is not an RFC 3339 time") });
  });

  test("a database that breaks while it is asked is unreachable", async () => {
    const gone = (): Promise<never> => Promise.reject(new Error("gone"));
    const openDatabase = async () => ({ ...databaseOf({}), query: gone, read: gone });
    expect((await run(["audit", "--tenant", "acme"], { openDatabase })).code).toBe(3);
  });

  test("migrate names what it applied", async () => {
    expect((await run(["migrate"], { openDatabase: async () => databaseOf({}) })).stdout).toBe("applied 0001_projections\n");
  });
});

describe("what people see", () => {
  const terminal = () => {
    let text = "";
    const output: TextOutput = { isTTY: true, columns: 100, write: (more: string) => void (text += more) };
    return { output, text: () => text };
  };
  const openDatabase = async () =>
    databaseOf({
      "from sessions": [
        { session: "s1", state: "idle", reason: "\u001b[2J\u0007boo", agent: "a", model: "m", turn: 1, worker: "w1", epoch: 1, updated_at: "-" },
      ],
    });

  test("a customer's control characters do not reach the terminal", async () => {
    const { output, text } = terminal();
    await run(["sessions", "--tenant", "acme"], { openDatabase, stdout: output, env: { NO_COLOR: "1" } });
    expect(text()).toContain("idle ( boo)");
    // biome-ignore lint: control characters are what this is about.
    expect(text()).not.toMatch(/[\u0000-\u0009\u000b-\u001f]/);
  });

  test("colour is for terminals, and not with NO_COLOR", async () => {
    const { output, text } = terminal();
    await run(["sessions", "--tenant", "acme"], { openDatabase, stdout: output });
    expect(text()).toContain("\u001b[1m");
    expect((await run(["sessions", "--tenant", "acme"], { openDatabase })).stdout).not.toContain("\u001b");
  });
});

describe("doctor", () => {
  test("finds what is there, says the rest by name, and is exit code 3 when something does not answer", async () => {
    const ran = await run(["doctor", "--json"], { env: { OPENAI_API_KEY: "sk-secret-text" } });
    expect(ran.code).toBe(3);
    const { findings } = JSON.parse(ran.stdout) as { findings: { level: string; what: string; detail: string }[] };
    const of = (what: string) => findings.find((one) => one.what === what);
    expect(of("node")).toMatchObject({ level: "ok" });
    expect(of("nats")).toMatchObject({ level: "unreachable", detail: "NATS cannot be reached: no broker here" });
    expect(of("postgres")).toMatchObject({ level: "unreachable" });
    expect(of("dev.json")).toMatchObject({ level: "warning" });
    expect(of("providers")).toMatchObject({ level: "ok", detail: "simulated openai" });
    expect(ran.stdout).not.toContain("secret");
  });

  test("an old Node, missing migrations and a clock that is off are found, and refused is exit code 1", async () => {
    const openDatabase = async () =>
      databaseOf({ split_part: [{ version: "18.0", now: "2020-01-01T00:00:00.000Z" }], to_regclass: [{ there: true }], "name from schema_migrations": [] });
    const ran = await run(["doctor", "--json"], { node_version: "v20.1.0", openDatabase });
    expect(ran.code).toBe(1);
    const { findings } = JSON.parse(ran.stdout) as { findings: { level: string; what: string; detail: string }[] };
    expect(findings).toContainEqual({ level: "refused", what: "node", detail: "v20.1.0; 24 or newer is needed" });
    expect(findings).toContainEqual({ level: "refused", what: "migrations", detail: expect.stringContaining("not applied: 0001_projections") });
    expect(findings).toContainEqual({ level: "warning", what: "clock", detail: expect.stringMatching(/ms from Postgres's$/) });
  });

  test("what the substrate audit refuses is refused by name", async () => {
    const { startGround } = await import("./ground.ts");
    const ground = await startGround();
    const ran = await ground.cli(["doctor", "--json"], {
      auditSubstrate: async () => [{ level: "refuse", what: "sync_interval", have: "2m", want: "always" }],
    });
    await ground.stop();
    expect(ran.code).toBe(1);
    const { findings } = JSON.parse(ran.stdout) as { findings: object[] };
    expect(findings).toContainEqual({ level: "refused", what: "nats sync_interval", detail: "is 2m, wanted always" });
    expect(findings).toContainEqual({ level: "ok", what: "stream EVENTS", detail: expect.stringContaining("messages") });
  });

  test("a gateway that is alive and not ready is refused", async () => {
    const directory = await mkdtemp(join(tmpdir(), "troupe-doctor-"));
    await writeFile(
      join(directory, "dev.json"),
      JSON.stringify({ gateway_url: "http://gateway", tenants: [{ id: "demo", nats: { user: "u", password: "p" } }], processes: [], later: 1 }),
    );
    const fetch = async (url: string) => new Response(url.endsWith("readyz") ? "no bus" : "ok", { status: url.endsWith("readyz") ? 503 : 200 });
    const ran = await run(["doctor"], { env: { TROUPE_HOME: directory }, fetch });
    await rm(directory, { recursive: true });
    expect(ran.code).toBe(1);
    expect(ran.stdout).toMatch(/ok +gateway +http:\/\/gateway is alive/);
    expect(ran.stdout).toMatch(/refused +gateway ready +no \(503\): no bus/);
    expect(ran.stdout).toMatch(/ok +dev\.json +.*tenants demo/);
  });
});
