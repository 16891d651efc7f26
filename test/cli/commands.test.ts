// Goal: the commands that work on the streams do what they say, on a broker in memory with a worker that runs real actors.
// Method: one ground for the file; each test types commands and reads exit codes, stdout, stderr and the journals.
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { parseKey } from "../../protocol/api-key.ts";
import { decodeJournal, encodeJournal } from "../../protocol/journal.ts";
import { encodeRecord } from "../../supervisors/tables.ts";
import { encodeSnapshot, createRestorer } from "../../actors/restore.ts";
import { silentLog } from "../../protocol/log.ts";
import { cores } from "../../state-machines/kinds.ts";
import { type Ground, startGround } from "./ground.ts";

let ground: Ground;
let directory: string;

beforeAll(async () => {
  ground = await startGround();
  directory = await mkdtemp(join(tmpdir(), "troupe-cli-"));
  expect((await ground.cli(["tenants", "create", "acme", "--name", "Acme Inc."])).code).toBe(0);
  await writeFile(join(directory, "echo.json"), JSON.stringify({ agent: "echo", model: "simulated/echo", system: "repeat" }));
  expect((await ground.cli(["agents", "put", "--tenant", "acme", "echo.json"], { working_directory: directory })).code).toBe(0);
});
afterAll(async () => {
  await ground.stop();
  await rm(directory, { recursive: true, force: true });
});

describe("tenants, keys and agents", () => {
  test("a tenant that is created again is left as it is", async () => {
    const again = await ground.cli(["tenants", "create", "acme", "--name", "Acme Inc.", "--json"]);
    expect(again.code).toBe(0);
    expect(JSON.parse(again.stdout)).toMatchObject({ tenant: "acme", created: false });
    const list = JSON.parse((await ground.cli(["tenants", "list", "--json"])).stdout);
    expect(list.tenants).toMatchObject([{ tenant: "acme", state: "active", name: "Acme Inc.", agents: 1 }]);
  });

  test("a key is printed alone on stdout, once, and only its hash is stored", async () => {
    const made = await ground.cli(["keys", "create", "--tenant", "acme", "--scope", "a", "--scope", "b", "--label", "ci"]);
    expect(made.code).toBe(0);
    const key = made.stdout.trim();
    const parsed = parseKey(key);
    expect(parsed).toMatchObject({ tenant: "acme" });
    const listed = JSON.parse((await ground.cli(["keys", "list", "--tenant", "acme", "--json"])).stdout);
    expect(listed.keys).toMatchObject([{ key_id: parsed?.key_id, label: "ci", scopes: ["a", "b"], revoked_at: null }]);
    let journal = "";
    for await (const stored of ground.bus.read("EVENTS", "tenant.acme.tenant.main.event", 1)) journal += new TextDecoder().decode(stored.data);
    expect(journal).toContain(parsed?.hash);
    expect(journal).not.toContain(key.split(".")[3]);
    expect((await ground.cli(["keys", "revoke", "--tenant", "acme", parsed?.key_id as string])).code).toBe(0);
    expect(JSON.parse((await ground.cli(["keys", "list", "--tenant", "acme", "--json"])).stdout).keys[0].revoked_at).toMatch(/Z$/);
  });

  test("an agent is put, listed and shown, and one that is not there is refused by name", async () => {
    const shown = await ground.cli(["agents", "show", "--tenant", "acme", "echo"]);
    expect(JSON.parse(shown.stdout)).toMatchObject({ agent: "echo", version: 1, config: { model: "simulated/echo", instructions: "repeat" } });
    expect((await ground.cli(["agents", "list", "--tenant", "acme"])).stdout).toMatch(/echo +1 +simulated\/echo/);
    const absent = await ground.cli(["agents", "show", "--tenant", "acme", "nobody", "--json"]);
    expect(absent.code).toBe(1);
    expect(JSON.parse(absent.stdout)).toMatchObject({ ok: false, error: { code: "agent_unknown" } });
  });

  test("an agent from stdin is put; a faulty one is refused with every fault's pointer", async () => {
    const put = await ground.cli(["agents", "put", "--tenant", "acme", "-", "--json"], { input: '{"name":"second","config":{"model":"simulated/echo"}}' });
    expect(JSON.parse(put.stdout)).toMatchObject({ agent: "second", version: 1 });
    const faulty = await ground.cli(["agents", "put", "--tenant", "acme", "-", "--json"], { input: '{"id":"a b","max_loops":0,"color":"red"}' });
    expect(faulty.code).toBe(1);
    const pointers = JSON.parse(faulty.stdout).error.details.errors.map((one: { pointer: string }) => one.pointer);
    expect(pointers.sort()).toEqual(["/color", "/id", "/max_loops", "/model"]);
  });

  test("a tenant that is not there is not found", async () => {
    expect(await ground.cli(["keys", "list", "--tenant", "nobody"])).toMatchObject({ code: 1, stderr: expect.stringContaining("not_found") });
  });
});

describe("send", () => {
  test("creates the session, shows the turn, and ends with it", async () => {
    const sent = await ground.cli(["send", "acme/session/s1", "hello my world", "--agent", "echo", "--wait"]);
    expect(sent.stderr).toBe("");
    expect(sent).toMatchObject({ code: 0, stdout: "hello my world\n" });
  });

  test("prints the reply without --wait, and sends once under one key", async () => {
    const first = await ground.cli(["send", "acme/session/s1", "again", "--key", "k1", "--json"]);
    const repeat = await ground.cli(["send", "acme/session/s1", "again", "--key", "k1", "--json"]);
    expect(first.lines()).toMatchObject([{ reply: { ok: true, actor: "acme/session/s1", result: { turn: 2 } } }]);
    // The outcome is the same; where the journal stood before it is told only the first time.
    const { after_sequence: _, ...reply } = (JSON.parse(first.stdout) as { reply: { after_sequence: number } }).reply;
    expect(JSON.parse(repeat.stdout)).toEqual({ reply });
    expect(await ground.cli(["send", "acme/session/s1", "other", "--key", "k1"])).toMatchObject({ code: 1, stderr: expect.stringMatching(/^conflict: /) });
  });

  test("--wait under a key that was used before shows the turn that was", async () => {
    const repeat = await ground.cli(["send", "acme/session/s1", "again", "--key", "k1", "--wait"]);
    expect(repeat).toMatchObject({ code: 0, stdout: "again\n" });
  });

  test("with --json tells reply, tokens and events as lines", async () => {
    const sent = await ground.cli(["send", "acme/session/s2", "one two", "--agent", "echo", "--wait", "--json"]);
    const kinds = sent.lines().map((line) => Object.keys(line)[0]);
    expect(kinds[0]).toBe("reply");
    expect(new Set(kinds)).toEqual(new Set(["reply", "token", "event"]));
    expect(sent.lines().at(-1)).toMatchObject({ event: { type: "turn.completed", turn: 1 } });
  });

  test("a turn that fails is exit code 1, with the reason", async () => {
    const script = JSON.stringify([{ fail: "invalid_request" }]);
    await writeFile(join(directory, "script.json"), JSON.stringify({ agent: "script", model: "simulated/script" }));
    await ground.cli(["agents", "put", "--tenant", "acme", "script.json"], { working_directory: directory });
    const sent = await ground.cli(["send", "acme/session/s3", script, "--agent", "script", "--wait"]);
    expect(sent).toMatchObject({ code: 1, stderr: expect.stringContaining("turn.failed") });
  });

  test("to a session that is not there is refused", async () => {
    expect((await ground.cli(["send", "acme/session/nobody", "hello"])).code).toBe(1);
    expect(await ground.cli(["send", "acme/session/nobody", "hello", "--agent", "nobody"])).toMatchObject({
      code: 1,
      stderr: expect.stringContaining("agent_unknown"),
    });
  });
});

describe("show, tail, replay and verify", () => {
  test("show tells the state, the wait reason and the last entries", async () => {
    const shown = JSON.parse((await ground.cli(["show", "acme/session/s1", "--entries", "3", "--json"])).stdout);
    expect(shown).toMatchObject({
      actor: "acme/session/s1",
      state: "idle",
      worker: "w1",
      epoch: 1,
      running: [],
      wait_reason: expect.any(String),
      context: { agent: "echo" },
    });
    expect(shown.last_entries).toHaveLength(3);
    expect(shown.last_entries.at(-1).seq).toBe(shown.seq);
    const words = (await ground.cli(["show", "acme/session/s1"])).stdout;
    expect(words).toContain("last entries");
    expect(words).toMatch(/why +waits for a message/);
    expect((await ground.cli(["show", "acme/session/nobody"])).code).toBe(1);
  });

  test("tail from the start tells every event with its cursor, and goes on from one", async () => {
    const all = (await ground.cli(["tail", "acme/session/s1", "--from", "start", "--no-follow", "--json"])).lines();
    expect(all.map((line) => (line["event"] as unknown as { type: string }).type)).toEqual(
      expect.arrayContaining(["session.created", "message.received", "message.completed", "turn.completed"]),
    );
    const middle = all[3] as unknown as { cursor: string };
    const rest = (await ground.cli(["tail", "acme/session/s1", "--from", middle.cursor, "--no-follow", "--json"])).lines();
    expect(rest).toEqual(all.filter((line) => Number(line["cursor"]) > Number(middle.cursor)));
    expect(await ground.cli(["tail", "acme", "--from", "yesterday"])).toMatchObject({ code: 1, stderr: expect.stringContaining("invalid") });
  });

  test("a live tail tells what happens while it listens, until it is interrupted", async () => {
    let interrupt: () => void = () => {};
    let stdout = "";
    const tailing = ground.cli(["tail", "acme/session/s4"], {
      on_interrupt: (listener) => ((interrupt = listener), () => {}),
      stdout: { write: (text) => void (stdout += text) },
    });
    await ground.cli(["send", "acme/session/s4", "live text", "--agent", "echo", "--wait"]);
    await expect.poll(() => stdout, { timeout: 20_000 }).toContain("turn.completed");
    interrupt();
    expect((await tailing).code).toBe(0);
    expect(stdout).toContain("live text\n");
    expect(stdout).toContain("turn.completed");
  });

  test("replay prints every entry with the state it led to", async () => {
    const replayed = await ground.cli(["replay", "acme/session/s1", "--json"]);
    expect(replayed.code).toBe(0);
    const lines = replayed.lines();
    const { replayed: end } = lines.pop() as unknown as { replayed: { entries: number; seq: number; differences: string[] } };
    expect(end).toMatchObject({ seq: lines.length, entries: lines.length, differences: [] });
    expect(lines.map((line) => line["seq"])).toEqual(lines.map((_, index) => index + 1));
    expect(lines[0]).toMatchObject({ entry: { t: "init" }, state: "initializing" });
    expect(lines.at(-1)).toMatchObject({ state: "idle", running: [] });
    expect((await ground.cli(["replay", "acme/session/s1", "--to", "2", "--json"])).lines()).toHaveLength(3);
    const words = await ground.cli(["replay", "acme/session/s1", "--step"]);
    expect(words.stdout).toContain("→ thinking  in flight");
    expect(words.stdout).toContain("the journal says what the replay gives");
    expect(await ground.cli(["replay", "acme/session/nobody"])).toMatchObject({ code: 1, stderr: expect.stringContaining("not_found") });
  });

  test("--from-snapshot proves that the snapshot and the tail give the same, and finds one that does not", async () => {
    expect(await ground.cli(["replay", "acme/session/s1", "--from-snapshot"])).toMatchObject({ code: 1, stderr: expect.stringContaining("no snapshot") });
    const restored = await createRestorer({ bus: ground.bus, cores, log: silentLog }).restore({ tenant: "acme", kind: "session", id: "s1" });
    if (restored === undefined) throw new Error("s1 is there");
    await ground.bus.publish("tenant.acme.session.s1.snapshot", encodeSnapshot(cores.session, restored.state, restored.last_sequence, restored.last));
    await ground.cli(["send", "acme/session/s1", "after the snapshot", "--wait"]);
    const proven = await ground.cli(["replay", "acme/session/s1", "--from-snapshot", "--json"]);
    expect(proven.code).toBe(0);
    expect(proven.lines().at(-1)).toMatchObject({ replayed: { snapshot: { seq: restored.state.seq, equal: true } } });
    const { state } = restored;
    const changed = { ...state, snapshot: { ...state.snapshot, context: { ...(state.snapshot.context as object), turn: 77 } } } as typeof state;
    await ground.bus.publish("tenant.acme.session.s1.snapshot", encodeSnapshot(cores.session, changed, restored.last_sequence, restored.last));
    const planted = await ground.cli(["replay", "acme/session/s1", "--from-snapshot"]);
    expect(planted).toMatchObject({ code: 1, stdout: expect.stringContaining(`differs from the replay at seq ${state.seq} in context`) });
    await ground.bus.publish("tenant.acme.session.s1.snapshot", encodeSnapshot(cores.session, state, restored.last_sequence, restored.last));
  });

  test("verify finds nothing in what the worker wrote, and says that the projections were not asked", async () => {
    const clean = await ground.cli(["verify", "--no-projections", "--json"]);
    expect(clean.code).toBe(0);
    expect(clean.lines()).toMatchObject([{ report: { violations: 0, snapshots: 1, projections: "not checked: not asked for" } }]);
    expect(await ground.cli(["verify", "acme/session/s1"])).toMatchObject({ code: 3, stderr: expect.stringContaining("the projections were not checked") });
    expect((await ground.cli(["verify", "acme/session/nobody", "--no-projections"])).code).toBe(1);
  });

  test("verify names what was planted, and is exit code 1; replay stops there", async () => {
    const stored = await ground.bus.last("EVENTS", "tenant.acme.session.s2.event");
    if (stored === undefined) throw new Error("s2 is there");
    const message = decodeJournal(stored.data);
    const forged = encodeJournal({ ...message, seq: message.seq + 1, entries: [{ t: "done", inst: "1:model", output: null }], events: [], out: [] });
    await ground.bus.append({ subject: stored.subject, data: forged, expected_last_sequence: stored.sequence, commit_id: "forged.1" });
    const found = await ground.cli(["verify", "acme", "--no-projections", "--json"]);
    expect(found.code).toBe(1);
    expect(found.lines()).toMatchObject([{ violation: { invariant: "A3", actor: "acme/session/s2", seq: message.seq + 1 } }, { report: { violations: 1 } }]);
    expect((await ground.cli(["verify", "acme/session/s2", "--no-projections"])).stdout).toContain("A3: 1 × not kept");
    expect((await ground.cli(["replay", "acme/session/s2"])).code).toBe(0);
    const gap = encodeJournal({ ...message, seq: message.seq + 5, entries: [{ t: "timer", inst: "1:x" }], events: [], out: [] });
    const last = await ground.bus.last("EVENTS", "tenant.acme.session.s2.event");
    await ground.bus.append({ subject: stored.subject, data: gap, expected_last_sequence: last?.sequence ?? 0, commit_id: "forged.2" });
    expect(await ground.cli(["replay", "acme/session/s2"])).toMatchObject({ code: 1, stderr: expect.stringContaining("cannot be replayed further") });
  });
});

describe("workers, shards, drain and machines", () => {
  test("workers and shards tell what leases and placement say", async () => {
    const started_at = new Date().toISOString();
    await ground.bus
      .bucket("WORKERS")
      .create("w1", encodeRecord({ id: "w1", incarnation: "i", versions: ["session@1"], draining: true, owned: 2, resident: 3, running: 0, started_at }));
    await ground.bus
      .bucket("PLACEMENT")
      .create("1", encodeRecord({ worker: "w1", incarnation: "i", epoch: 4, since: started_at, moving_to: "w2", from: null, reason: "new" }));
    const workers = JSON.parse((await ground.cli(["workers", "--json"])).stdout);
    expect(workers).toMatchObject({ leader: null, workers: [{ id: "w1", draining: true, resident: 3, state: "draining" }] });
    expect((await ground.cli(["workers"])).stdout).toMatch(/w1 +draining +2 +3 +0/);
    // What the leader wrote into the worker's journal counts more than what the worker says of itself.
    const w1 = { tenant: "system", kind: "worker", id: "w1" } as const;
    const suspected = {
      v: 1,
      actor: w1,
      seq: 1,
      epoch: 1,
      worker: "s1",
      machine: "worker@1",
      at: started_at,
      entries: [],
      state: "suspected",
      events: [],
      out: [],
      out_confirmed_seq: 0,
    } as const;
    await ground.bus.append({ subject: "tenant.system.worker.w1.event", data: encodeJournal(suspected), expected_last_sequence: 0, commit_id: "leader.1" });
    expect((await ground.cli(["workers"])).stdout).toMatch(/w1 +suspected +2 +3 +0/);
    const shards = JSON.parse((await ground.cli(["shards", "--json"])).stdout);
    expect(shards.shards).toMatchObject([
      { shard: 0, worker: null },
      { shard: 1, worker: "w1", epoch: 4, moving_to: "w2" },
    ]);
    expect((await ground.cli(["shards"])).stderr).toContain("1 of 2 shards have no owner");
  });

  test("machines lists, prints and writes them", async () => {
    expect(JSON.parse((await ground.cli(["machines", "--json"])).stdout).machines.map((one: { name: string }) => one.name)).toEqual(
      expect.arrayContaining(["session", "tenant", "worker"]),
    );
    expect((await ground.cli(["machines", "session"])).stdout).toMatch(/^stateDiagram-v2/);
    expect((await ground.cli(["machines", "session", "--format", "dot"])).stdout).toMatch(/^digraph/);
    const written = await ground.cli(["machines", "tenant", "--format", "svg", "--out", "drawn"], { working_directory: directory });
    expect(written.stdout.trim()).toBe(join(directory, "drawn", "tenant.svg"));
    expect(await readFile(join(directory, "drawn", "tenant.svg"), "utf8")).toContain("<svg");
    expect((await ground.cli(["machines", "nobody"])).code).toBe(1);
  });
});
