// Goal:   what a newcomer does in the first quarter of an hour comes out as promised: start, paste, talk, look, stop, start again.
// Method: the real `up` with all its processes; HTTP, a shell and the command line. One start, then a stop and a second start on the same data.
//         The tests build on one another, in their order.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { beforeAll, describe, expect, test, vi } from "vitest";
import { freePort, until } from "../../deploy/local/server-process.ts";
import { collect, hear, readEventStream, type StreamMessage } from "../harness/event-stream.ts";
import { type CliOutcome, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

/** Others may be at work on the machine; what is waited for is bounded one by one. */
vi.setConfig({ testTimeout: 120_000 });

let troupe: Troupe;
beforeAll(async () => {
  troupe = await startTroupe();
}, 120_000);

/** A word of the person and its answer. */
async function say(session: string, content: string, headers: Record<string, string> = {}): Promise<StreamMessage[]> {
  return collect(troupe.sse(`/v1/sessions/${session}/messages`, { json: { content }, headers }));
}

const document = (outcome: CliOutcome): unknown => {
  expect(outcome.stderr).toBe("");
  expect(outcome.code).toBe(0);
  return JSON.parse(outcome.stdout);
};
const lines = <Shape>(outcome: CliOutcome): Shape[] => {
  expect(outcome.code).toBe(0);
  return outcome.stdout
    .trimEnd()
    .split("\n")
    .map((line) => JSON.parse(line) as Shape);
};

/** Types the printed line into a shell and notes when each message came. */
function paste(line: string): Promise<{ code: number | null; messages: StreamMessage[]; at_ms: number[] }> {
  const shell = spawn("sh", ["-c", line], { stdio: ["ignore", "pipe", "ignore"] });
  const ended = new Promise<number | null>((resolve) => shell.once("close", resolve));
  return (async () => {
    const messages: StreamMessage[] = [];
    const at_ms: number[] = [];
    for await (const message of readEventStream(shell.stdout as unknown as ReadableStream<Uint8Array>)) {
      messages.push(message);
      at_ms.push(performance.now());
    }
    return { code: await ended, messages, at_ms };
  })();
}

const printedLine = (): string =>
  troupe
    .output()
    .split("\n")
    .findLast((line) => line.startsWith("curl ")) ?? "";

test("the printed curl line, pasted into a shell, streams an answer word by word", async () => {
  const { code, messages, at_ms } = await paste(printedLine());
  expect(code).toBe(0);
  expect(messages.map(({ event }) => event)).toEqual(
    expect.arrayContaining(["message.received", "turn.started", "model.started", "token", "model.completed", "message.completed", "turn.completed"]),
  );
  const heard = hear(messages, 1);
  expect(heard).toMatchObject({ text: "Hello, Troupe! What do you remember of me?", finished: "Hello, Troupe! What do you remember of me?", faults: [] });
  const first = messages.findIndex(({ event }) => event === "token");
  // Eight words, 25 ms apart: they came as they were said, not all at the end. Whoever reads may be late for some of them.
  expect((at_ms.at(-1) ?? 0) - (at_ms[first] ?? 0)).toBeGreaterThan(25);
});

test("a session is made once: the same again answers with it, other words are a conflict", async () => {
  const made = await troupe.json<{ id: string; state: string }>(201, "/v1/sessions", { json: { id: "s1", agent: "assistant" } });
  expect(made.id).toBe("s1");
  await troupe.json(200, "/v1/sessions", { json: { id: "s1", agent: "assistant" } });
  expect(await troupe.json(409, "/v1/sessions", { json: { id: "s1", agent: "assistant", user: "other" } })).toMatchObject({ code: "conflict" });
  const derived = await troupe.json<{ id: string }>(201, "/v1/sessions", { json: { agent: "assistant", external_id: "order 7" } });
  expect(await troupe.json(200, "/v1/sessions", { json: { agent: "assistant", external_id: "order 7" } })).toMatchObject({ id: derived.id });
});

test("a message that is only posted is accepted with a turn and a cursor, from which the turn is heard", async () => {
  const accepted = await troupe.json<{ message_id: string; turn: number; cursor: string }>(202, "/v1/sessions/s1/messages", {
    json: { content: "one two three" },
  });
  expect(accepted).toMatchObject({ turn: 1, message_id: expect.any(String) });
  const abort = new AbortController();
  const messages: StreamMessage[] = [];
  for await (const message of troupe.sse(`/v1/sessions/s1/events?cursor=${accepted.cursor}`, { signal: abort.signal })) {
    messages.push(message);
    if (message.event === "turn.completed") break;
  }
  abort.abort();
  expect(messages[0]?.event).toBe("message.received");
  expect(hear(messages, 1)).toMatchObject({ text: "one two three", finished: "one two three", faults: [] });
});

test("a repeat with the same Idempotency-Key is answered with the first outcome, with other words it is a conflict", async () => {
  const headers = { "idempotency-key": "k-1" };
  interface Accepted {
    readonly message_id: string;
    readonly turn: number;
    readonly cursor: string;
  }
  const first = await troupe.json<Accepted>(202, "/v1/sessions/s1/messages", { json: { content: "said once" }, headers });
  const repeat = await troupe.json<Accepted>(202, "/v1/sessions/s1/messages", { json: { content: "said once" }, headers });
  expect({ ...repeat, cursor: "" }).toEqual({ ...first, cursor: "" });
  // The two may name the place before the turn in different words; what follows is the same.
  const after = ({ cursor }: Accepted): Promise<{ items: object[] }> =>
    troupe.json(200, `/v1/sessions/s1/events?limit=1&cursor=${cursor}`, { headers: { accept: "application/json" } });
  const [from_first, from_repeat] = await Promise.all([after(first), after(repeat)]);
  expect(from_repeat.items).toEqual(from_first.items);
  expect(from_first.items).toMatchObject([{ type: "message.received", turn: first.turn }]);
  expect(await troupe.json(409, "/v1/sessions/s1/messages", { json: { content: "said otherwise" }, headers })).toMatchObject({ code: "conflict" });
  expect(await until(async () => (await troupe.json<{ state: string }>(200, "/v1/sessions/s1")).state === "idle", 60_000)).toBe(true);
  const said = (await troupe.journal("demo/session/s1"))
    .flatMap(({ entries }) => entries)
    .filter((entry) => entry.t === "command" && entry.type === "message.send");
  expect(said.map((entry) => entry.t === "command" && entry.body["content"])).toEqual(["one two three", "said once"]);
});

test("the built-in tools are called and their answers reach the model", async () => {
  await troupe.json(201, "/v1/sessions", { json: { id: "tools", agent: "assistant", overrides: { model: "simulated/script" } } });
  const script = [{ say: "Let me look. " }, { call: "now" }, { call: "wait_ms", args: { ms: 30 } }, { say: "It is late." }];
  const messages = await say("tools", JSON.stringify(script));
  expect(messages.map(({ event }) => event).filter((event) => event.startsWith("tool."))).toHaveLength(4);
  expect(hear(messages, 1)).toMatchObject({ text: "Let me look. It is late.", faults: [] });
  const [completed] = messages.filter(({ event }) => event === "turn.completed");
  expect(completed).toBeDefined();
});

test("a terminated session refuses what is said to it with 409 and its state", async () => {
  await troupe.json(201, "/v1/sessions", { json: { id: "over", agent: "assistant" } });
  await say("over", "last words");
  expect(await troupe.json(200, "/v1/sessions/over/terminate", { json: { reason: "done" } })).toMatchObject({ state: "terminated" });
  expect(await troupe.json(409, "/v1/sessions/over/messages", { json: { content: "more" } })).toMatchObject({
    code: "illegal_transition",
    details: { state: "terminated" },
  });
});

/** A session of more than 64 entries, so that it has a snapshot. */
async function longSession(id: string): Promise<void> {
  await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" } });
  for (let n = 0; n < 36; n++) await troupe.json(202, `/v1/sessions/${id}/messages`, { json: { content: `m${n}` } });
  const idle = await until(
    async () => {
      const { state, turn } = await troupe.json<{ state: string; turn: number }>(200, `/v1/sessions/${id}`);
      return state === "idle" && turn === 36;
    },
    60_000,
    100,
  );
  expect(idle).toBe(true);
}

test("a journal replays entry by entry to the state it names, and from its snapshot to the same", async () => {
  await longSession("long");
  const [whole, from_snapshot, stepped] = await Promise.all([
    typed(troupe, ["replay", "demo/session/long", "--json"]),
    typed(troupe, ["replay", "demo/session/long", "--from-snapshot", "--json"]),
    troupe.cli(["replay", "demo/session/tools", "--step"]),
  ]);
  const all = lines<{
    seq?: number;
    state?: string;
    replayed?: { entries: number; seq: number; differences: string[]; snapshot?: { equal: boolean; seq: number } };
  }>(whole);
  const entries = all.slice(0, -1);
  expect(entries.length).toBeGreaterThan(64);
  expect(entries.map(({ seq }) => seq)).toEqual(entries.map((_, index) => index + 1));
  expect(entries.at(-1)?.state).toBe("idle");
  expect(all.at(-1)?.replayed).toMatchObject({ entries: entries.length, differences: [] });
  expect(lines<{ replayed?: object }>(from_snapshot).at(-1)?.replayed).toMatchObject({ differences: [], snapshot: { equal: true } });
  expect(stepped.code).toBe(0);
  for (const word of [
    "init session.create",
    "message.send",
    "→ thinking",
    "→ acting",
    "tool.started",
    "wait_ms",
    "→ idle",
    "turn.completed",
    "the journal says what the replay gives",
  ])
    expect(stepped.stdout).toContain(word);
});

describe("the command line", () => {
  test("send waits for the answer, and a repeated key shows the same turn again", async () => {
    const first = await troupe.cli(["send", "demo/session/typed", "alpha beta", "--agent", "assistant", "--wait", "--key", "t1"]);
    expect(first).toMatchObject({ code: 0, stdout: "alpha beta\n" });
    const again = await troupe.cli(["send", "demo/session/typed", "alpha beta", "--wait", "--key", "t1", "--json"]);
    const said = lines<{ reply?: { ok: boolean; result: object }; event?: { type: string } }>(again);
    expect(said[0]?.reply).toMatchObject({ ok: true, result: { turn: 1 } });
    expect(said.at(-1)?.event?.type).toBe("turn.completed");
  });

  test("chat takes lines from a pipe and prints each finished answer", async () => {
    const talked = await troupe.cli(["chat", "--session", "piped"], { stdin: "hello there\nand again\n" });
    expect(talked).toMatchObject({ code: 0, stdout: "hello there\nand again\n" });
    const json = lines<{ session?: string; token?: { text: string }; event?: { type: string } }>(
      await troupe.cli(["chat", "--session", "piped", "--json"], { stdin: "third\n" }),
    );
    expect(json.at(-1)).toEqual({ session: "piped" });
    expect(json.flatMap(({ token }) => (token === undefined ? [] : [token.text])).join("")).toBe("third");
  });

  test("tail prints what is stored and takes its own cursor", async () => {
    interface Line {
      cursor: string;
      actor: string;
      event: { type: string };
    }
    const all = lines<Line>(await troupe.cli(["tail", "demo/session/typed", "--from", "start", "--no-follow", "--json"]));
    expect(all[0]?.event.type).toBe("session.created");
    expect(all.map(({ event }) => event.type)).toEqual(expect.arrayContaining(["message.received", "message.completed", "turn.completed"]));
    const middle = all[0]?.cursor ?? "";
    const rest = lines<Line>(await troupe.cli(["tail", "demo/session/typed", "--from", middle, "--no-follow", "--json"]));
    expect(rest).toEqual(all.filter(({ cursor }) => Number(cursor) > Number(middle)));
    expect(rest.length).toBeGreaterThan(0);
  });

  test("what it lists is what there is", async () => {
    // The projections follow within moments.
    const caught_up = async (): Promise<boolean> => {
      const { items } = document(await typed(troupe, ["sessions", "--tenant", "demo", "--json"])) as { items: { session: string; turn: number }[] };
      return items.some(({ session }) => session === "piped");
    };
    expect(await until(caught_up, 60_000, 100)).toBe(true);
    const asked = (args: string[]): Promise<CliOutcome> => typed(troupe, [...args, "--json"]);
    const [shown, doctor, tenants, keys] = await Promise.all([
      asked(["show", "demo/session/typed"]),
      troupe.cli(["doctor", "--json"]),
      asked(["tenants", "list"]),
      asked(["keys", "list", "--tenant", "demo"]),
    ]);
    expect(document(shown)).toMatchObject({ actor: "demo/session/typed", state: "idle", wait_reason: expect.any(String), context: { turn: 1 } });
    const { findings } = document(doctor) as { findings: { level: string; what: string; detail: string }[] };
    expect(findings.filter(({ level }) => level !== "ok")).toEqual([]);
    expect(findings.map(({ what }) => what)).toEqual(
      expect.arrayContaining(["node", "nats substrate", "stream EVENTS", "migrations", "projection", "gateway ready"]),
    );
    expect(document(tenants)).toMatchObject({ tenants: [{ tenant: "demo", state: "active", agents: 1, keys: 1 }] });
    expect((document(keys) as { keys: object[] }).keys).toHaveLength(1);
    const [agents, machines, usage, audit, workers, shards] = await Promise.all([
      asked(["agents", "list", "--tenant", "demo"]),
      asked(["machines"]),
      asked(["usage", "--tenant", "demo", "--session", "typed"]),
      asked(["audit", "--tenant", "demo", "--actor", "typed"]),
      asked(["workers"]),
      asked(["shards"]),
    ]);
    expect(document(agents)).toMatchObject({ agents: [{ agent: "assistant", model: "simulated/echo" }] });
    expect((document(machines) as { machines: { name: string }[] }).machines.map(({ name }) => name)).toEqual(
      expect.arrayContaining(["session", "tenant", "worker"]),
    );
    expect(lines(usage)).toEqual([
      expect.objectContaining({ session: "typed", model: "simulated/echo", attempt: 1, output_tokens: 2, cost_usd_micros: expect.any(Number) }),
    ]);
    const entries = lines<{ entry_type: string; seq: number }>(audit);
    expect(entries.map(({ seq }) => seq)).toEqual(entries.map((_, index) => entries.length - index));
    expect((document(workers) as { workers: { id?: string; worker?: string }[] }).workers).toHaveLength(2);
    const { shards: placed } = document(shards) as { shards: { worker: string }[] };
    expect(new Set(placed.map(({ worker }) => worker))).toEqual(new Set(["w1", "w2"]));
    expect(placed).toHaveLength(16);
  });

  test("a tenant that an operator makes gets its key and agent, and its own sessions alone", async () => {
    document(await troupe.cli(["tenants", "create", "acme", "--json"]));
    const folder = mkdtempSync(join(tmpdir(), "troupe-agent-"));
    try {
      writeFileSync(join(folder, "helper.json"), JSON.stringify({ agent: "helper", model: "simulated/echo", system: "Help." }));
      document(await troupe.cli(["agents", "put", "--tenant", "acme", join(folder, "helper.json"), "--json"]));
    } finally {
      rmSync(folder, { recursive: true });
    }
    const made = await troupe.cli(["keys", "create", "--tenant", "acme"]);
    const key = made.stdout.trim();
    await troupe.json(201, "/v1/sessions", { json: { id: "s1", agent: "helper" }, key });
    expect(await troupe.json(404, "/v1/sessions/typed", { key })).toMatchObject({ code: "not_found" });
    expect(await troupe.json(422, "/v1/sessions", { json: { id: "s2", agent: "assistant" }, key })).toMatchObject({ code: "agent_unknown" });
    const key_id = key.split(".")[2] ?? "";
    expect((await troupe.cli(["keys", "revoke", "--tenant", "acme", key_id])).code).toBe(0);
    expect(await until(async () => (await troupe.api("/v1/sessions/s1", { key })).status === 401, 60_000)).toBe(true);
  });

  test("exit codes say done, refused, wrong usage and unreachable", async () => {
    const port = await freePort();
    const nowhere = { TROUPE_NATS_URL: `nats://127.0.0.1:${port}`, TROUPE_HOME: join(troupe.home, "elsewhere") };
    const codes = await Promise.all([
      troupe.cli(["show", "demo/session/typed"]),
      troupe.cli(["show", "demo/session/nobody"]),
      troupe.cli(["send", "demo/session/over", "more", "--json"]),
      troupe.cli(["show", "no actor"]),
      troupe.cli(["frobnicate"]),
      troupe.cli(["show", "demo/session/typed"], { env: nowhere }),
      troupe.cli(["chat"], { env: { TROUPE_GATEWAY_URL: `http://127.0.0.1:${port}` }, stdin: "hello\n" }),
    ]);
    expect(codes.map(({ code }) => code)).toEqual([0, 1, 1, 2, 2, 3, 3]);
    expect(JSON.parse(codes[2]?.stdout ?? "")).toMatchObject({ ok: false, error: { code: "illegal_transition" } });
  });
});

test("verify finds no promise broken, on the streams and in the projections", async () => {
  const verified = await troupe.cli(["verify", "--json"]);
  const report = lines<{ report?: { violations: number; actors: number; projections: string } }>(verified).at(-1)?.report;
  expect(report).toMatchObject({ violations: 0, projections: "checked" });
  expect(report?.actors).toBeGreaterThan(8);
});

test("Ctrl-C, told twice as a terminal and a parent may, ends every process with exit code 0, also in the middle of a turn", async () => {
  await troupe.json(201, "/v1/sessions", { json: { id: "cut", agent: "assistant", overrides: { model: "simulated/script" } } });
  await troupe.json(202, "/v1/sessions/cut/messages", { json: { content: JSON.stringify([{ say: "word", tokens: 40, token_ms: 100 }]) } });
  const { pid } = troupe;
  const code = await troupe.stop(() => {
    process.kill(-pid, "SIGINT"); // to the whole group, as a terminal does
    setTimeout(() => process.kill(pid, "SIGINT"), 30);
  });
  expect(code).toBe(0);
  expect(troupe.output()).toMatch(/\nended\n$/);
  expect(troupe.processes()).toEqual([]);
});

test("started again, it is ready quickly, and the same session goes on with all that was said in it", async () => {
  await troupe.start();
  // 5 s are promised on a quiet machine; others may be at work on this one. A start that had to wait for a lease or a lock would take longer.
  expect(troupe.start_ms).toBeLessThan(30_000);
  const { code, messages } = await paste(printedLine());
  expect(code).toBe(0);
  expect(hear(messages, 2)).toMatchObject({ text: "Hello, Troupe! What do you remember of me?", faults: [] });
  const shown = document(await troupe.cli(["show", "demo/session/hello", "--json"])) as { context: { transcript: { role: string; turn: number }[] } };
  expect(shown.context.transcript.map(({ role, turn }) => `${role} ${turn}`)).toEqual(["user 1", "assistant 1", "user 2", "assistant 2"]);
  // The model was given the first turn too: the echo's input is counted in words, of which the first turn has sixteen more.
  const used = messages.find(({ event }) => event === "model.completed")?.data["usage"] as { input_tokens: number };
  expect(used.input_tokens).toBe(15 + 16);
});

test("the turn that the stop cut off was taken up by itself and is complete", async () => {
  const ended = await until(async () => (await troupe.json<{ state: string }>(200, "/v1/sessions/cut")).state === "idle", 60_000, 100);
  expect(ended).toBe(true);
  const abort = new AbortController();
  const messages: StreamMessage[] = [];
  for await (const message of troupe.sse("/v1/sessions/cut/events", { signal: abort.signal })) {
    messages.push(message);
    if (message.event === "turn.completed") break;
  }
  abort.abort();
  const heard = hear(messages, 1);
  expect(heard).toMatchObject({ faults: [], voided: 1, text: heard.finished });
  expect(heard.finished.split(" ")).toHaveLength(40);
  expect((await typed(troupe, ["verify", "--no-projections"])).code).toBe(0);
});
