// tool-audit: Goal: every call of a tool is in the audit as an intent and an outcome, whatever ends it, and nothing is there that was no call. Method:
// drawn lives of sessions through their own machine, with tools that answer, fail, are refused, are lost with their worker, are cancelled and time
// out, over a real Postgres in small batches; what the machine's ledger of effects says is the truth that the rows are held against.
import { beforeAll, describe, expect, test } from "vitest";
import { verifyAudit, type AuditFinding } from "../../projections/audit-chain.ts";
import { createDatabase, type Database } from "../../projections/database.ts";
import { postgresRows } from "../../projections/postgres-rows.ts";
import { createProjector } from "../../projections/projector.ts";
import { type AuditRow, createQueries, type Queries } from "../../projections/queries.ts";
import { decodeJournal, type Entry, type JournalMessage } from "../../protocol/journal.ts";
import { hashOf, type Json } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import { outerState } from "../../state-machines/step.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshDatabase } from "../harness/servers.ts";
import { sessionCore } from "../state-machines/session-drive.ts";
import { claimed, command, createEventStream, type EventStream, init, type Journal, journalOf, realWorld, seeded } from "./event-stream.ts";

const SECRET = "SENTINEL-TOOL-TEXT";
const IDEMPOTENT = ["now", "wait_ms"];

/** What the ledger said of one effect. */
interface Truth {
  readonly tool: string;
  readonly args: Json;
  attempts: number;
  ended: boolean;
}

const told: Entry["t"][] = [];

function configuration(inst: string): Entry {
  const config = { model: "simulated/echo", mode: "multi", tools: ["now", "wait_ms", "pay", "rm"], instructions: "" };
  return { t: "done", inst, output: { config, hash: "c".repeat(64), agent_version: 1, denied_tools: ["rm"] } };
}

function answer(inst: string, tools: readonly { name: string; args: Json }[]): Entry {
  const usage = { input_tokens: 1, output_tokens: 1, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
  const tool_calls = tools.map(({ name, args }, index) => ({ id: `c${index}`, name, args }));
  const output = {
    text: "",
    tool_calls,
    stop: tools.length > 0 ? "tool_calls" : "end",
    usage,
    cost_usd_micros: 11,
    price_version: "p",
    model: "simulated/echo",
  };
  return { t: "done", inst, output };
}

const outcomes: ((inst: string) => Entry)[] = [
  (inst) => ({ t: "done", inst, output: { text: `${SECRET} ok`, is_error: false, cost_usd_micros: 7 } }),
  (inst) => ({ t: "done", inst, output: { text: `${SECRET} no`, is_error: true } }),
  (inst) => ({ t: "fail", inst, error: { code: "denied", message: "not permitted" } }),
  (inst) => ({ t: "fail", inst, error: { code: "invalid_args", message: SECRET, details: { cost_usd_micros: 3 } } }),
];

/** Sessions of two tenants, with equal ids, and what their effects came to. */
function lived(seed: number, happenings: number): { stream: EventStream; truth: Map<string, Truth>; journals: Journal[] } {
  const random = seeded(seed);
  const pick = <T>(...choices: T[]): T => choices[Math.floor(random() * choices.length)] as T;
  const stream = createEventStream();
  const clock = { ms: Date.parse("2026-11-21T05:00:00.000Z") };
  const truth = new Map<string, Truth>();
  const journals = ["one", "other"].flatMap((tenant) => ["s1", "s2"].map((id) => journalOf(stream, { tenant, kind: "session", id }, sessionCore, clock)));
  const commit = (journal: Journal, ...entries: Entry[]): void => {
    journal.commit(...entries);
    told.push(...entries.map(({ t }) => t));
    const running = Object.values(journal.state()?.running ?? {});
    for (const [key, known] of truth) if (key.startsWith(`${journal.actor.tenant}/${journal.actor.id}/`)) known.ended = true;
    for (const { inst, src, input, attempt } of running) {
      if (src !== "call_tool") continue;
      const { name, call_seq, index } = input as { name: string; call_seq: number; index: number };
      const key = `${journal.actor.tenant}/${journal.actor.id}/${inst}`;
      const args = argsOf.get(`${journal.actor.tenant}/${journal.actor.id}/${call_seq}`)?.[index] ?? null;
      truth.set(key, { tool: name, args, attempts: attempt, ended: false });
    }
  };
  const argsOf = new Map<string, readonly Json[]>();
  for (const journal of journals) {
    commit(journal, init({ agent: "a" }));
    commit(journal, configuration(journal.inst("configuration") ?? ""));
  }
  for (let count = 0; count < happenings; count += 1) {
    const journal = journals[Math.floor(random() * journals.length)] as Journal;
    const state = journal.state();
    if (state === undefined) continue;
    const outer = outerState(state.snapshot);
    const model = journal.inst("model");
    if (outer === "idle") commit(journal, command("message.send", { content: SECRET }));
    else if (outer === "paused") commit(journal, command("session.resume"));
    else if (outer === "thinking" && model !== undefined) {
      if (random() < 0.15) {
        commit(journal, answer(model, []));
        continue;
      }
      const names = Array.from({ length: 1 + Math.floor(random() * 4) }, () => pick("now", "wait_ms", "pay", "pay", "rm", "not there", "missing"));
      const calls = names.map((name) => ({ name, args: { secret: SECRET, n: Math.floor(random() * 100) } }));
      argsOf.set(
        `${journal.actor.tenant}/${journal.actor.id}/${state.seq + 1}`,
        calls.map(({ args }) => args),
      );
      // Sometimes given up in the very commit that began them.
      commit(journal, answer(model, calls), ...(random() < 0.1 ? [command("turn.cancel")] : []));
    } else if (outer === "acting") {
      const running = Object.values(state.running).map(({ inst }) => inst);
      const first = pick(...running);
      const timer = Object.values(state.timers)[0]?.inst;
      const happening = pick<Entry[]>(
        [pick(...outcomes)(first)],
        [pick(...outcomes)(first)],
        running.map((inst) => pick(...outcomes)(inst)),
        [claimed(running)],
        [claimed([first])],
        [command("turn.cancel")],
        [command("turn.cancel"), pick(...outcomes)(first)],
        [command("message.send", { content: SECRET, on_busy: "interrupt" })],
        timer === undefined ? [] : [{ t: "timer", inst: timer }],
      );
      if (happening.length > 0) commit(journal, ...happening);
    } else if (outer === "parked") commit(journal, command("session.unpark"));
  }
  return { stream, truth, journals };
}

describe("rows of tools", () => {
  let database: Database;
  let queries: Queries;
  let stream: EventStream;
  let truth: Map<string, Truth>;
  let rows: (AuditRow & { tenant: string })[];

  beforeAll(async () => {
    ({ stream, truth } = lived(7, 450));
    const { url, drop } = await freshDatabase();
    database = createDatabase({ url, application_name: "test", log: silentLog });
    atEndOfFile(() => database.close());
    atEndOfFile(drop);
    await database.migrate();
    queries = createQueries(database);
    const projector = createProjector({ bus: stream.bus, rows: postgresRows(database), world: realWorld, log: silentLog, batch_messages_max: 5 });
    expect(await projector.reached(stream.messages.length, 60_000)).toBe(true);
    await projector.stop();
    rows = [];
    for (const tenant of ["one", "other"]) for await (const row of queries.audit_chain(tenant)) if (row.tool !== null) rows.push(row);
  }, 120_000);

  const of = (type: string): (AuditRow & { tenant: string })[] => rows.filter((row) => row.entry_type === type);
  const keyOf = (row: AuditRow & { tenant: string }): string => `${row.tenant}/${row.actor}/${row.inst ?? ""}`;
  const place = (row: AuditRow): number => row.stream_sequence * 1_000 + row.entry_index;

  test("the walk was not empty: calls ended in every way", () => {
    const codes = new Set(of("tool.outcome").map(({ code }) => code));
    for (const code of [null, "tool_error", "denied", "invalid_args", "ambiguous", "cancelled", "timeout", "tool_unknown"]) expect(codes).toContain(code);
    expect(told).toContain("claim");
    expect(truth.size).toBeGreaterThan(50);
    expect([...truth.values()].some(({ attempts }) => attempts > 1)).toBe(true);
  });

  test("the intents that were allowed are the tool effects, one each, with what the ledger says of them", () => {
    const began = of("tool.intent").filter(({ decision }) => decision === "allowed");
    // An effect that was given up in the commit that began it was in no ledger after it.
    const at_once = began.filter((row) => !truth.has(keyOf(row)));
    for (const row of at_once) {
      const outcome = of("tool.outcome").find((one) => keyOf(one) === keyOf(row));
      expect([outcome?.stream_sequence, outcome?.code]).toEqual([row.stream_sequence, "cancelled"]);
    }
    expect(at_once.length).toBeGreaterThan(0);
    expect(
      began
        .filter((row) => truth.has(keyOf(row)))
        .map(keyOf)
        .sort(),
    ).toEqual([...truth.keys()].sort());
    for (const row of began) {
      const known = truth.get(keyOf(row));
      if (known !== undefined) expect([row.tool, row.args_hash]).toEqual([known.tool, hashOf(known.args)]);
    }
  });

  test("each call has one intent, and one outcome after it once it has ended", () => {
    const intents = new Map(of("tool.intent").map((row) => [keyOf(row), row]));
    expect(intents.size).toBe(of("tool.intent").length);
    const ends = of("tool.outcome");
    expect(new Set(ends.map(keyOf)).size).toBe(ends.length);
    for (const end of ends) {
      const intent = intents.get(keyOf(end));
      expect(intent === undefined ? -1 : place(end) - place(intent)).toBeGreaterThan(0);
      expect([end.tool, end.args_hash]).toEqual([intent?.tool, intent?.args_hash]);
      expect(end.duration_ms).toBe(Date.parse(end.at) - Date.parse(intent?.at ?? ""));
    }
    const open = [...intents.keys()].filter((key) => !ends.some((end) => keyOf(end) === key));
    expect(open.sort()).toEqual([...truth].flatMap(([key, { ended }]) => (ended ? [] : [key])).sort());
  });

  test("an outcome says what came back, what it cost, who refused it, and how often it was begun", () => {
    for (const row of of("tool.outcome")) {
      const lost = row.code === "ambiguous" || row.code === "cancelled" || row.code === "timeout";
      if (row.code === null) expect([row.result_hash, row.cost_usd_micros, row.decision]).toEqual([expect.stringMatching(/^[0-9a-f]{64}$/), 7, "allowed"]);
      if (row.code === "invalid_args") expect([row.result_hash, row.cost_usd_micros]).toEqual([expect.stringMatching(/^[0-9a-f]{64}$/), 3]);
      if (row.code === "denied") expect(row.decision).toBe("denied");
      if (row.code === "tool_unknown") expect([row.decision, row.attempts, row.tool === "?" || row.tool === "missing"]).toEqual(["unknown", 0, true]);
      if (lost) expect([row.result_hash, row.decision]).toEqual([null, "allowed"]);
      const known = truth.get(keyOf(row));
      if (known !== undefined) expect(row.attempts).toBe(known.attempts);
      if (known !== undefined && !IDEMPOTENT.includes(known.tool)) expect(row.attempts).toBe(1);
    }
    expect(JSON.stringify(rows)).not.toContain(SECRET);
  });

  const findings = async (tenant: string): Promise<AuditFinding[]> => {
    const found: AuditFinding[] = [];
    async function* journal(): AsyncGenerator<{ message: JournalMessage; sequence: number }> {
      for (const { subject, data, sequence } of stream.messages) if (subject.split(".")[1] === tenant) yield { message: decodeJournal(data), sequence };
    }
    const { head, beyond, position } = await queries.audit_end(tenant);
    await verifyAudit({ tenant, rows: queries.audit_chain(tenant, position), head, beyond, journal: journal(), report: (one) => void found.push(one) });
    return found;
  };

  test("the stream alone gives the same rows, and one that was changed or taken out is found", async () => {
    expect([await findings("one"), await findings("other")]).toEqual([[], []]);
    const [victim] = of("tool.outcome").filter((row) => row.tenant === "one" && row.decision === "allowed");
    const where = `tenant = 'one' and stream_sequence = ${victim?.stream_sequence ?? 0} and entry_index = ${victim?.entry_index ?? 0}`;
    for (const column of ["decision = 'denied'", "duration_ms = duration_ms + 1"]) {
      const [before] = await database.query<{ row: string }>(`select to_jsonb(audit)::text as row from audit where ${where}`);
      await database.query(`update audit set ${column} where ${where}`);
      expect((await findings("one")).map(({ fault, what }) => `${fault} ${what}`)).toEqual([expect.stringMatching(`changed .* ${column.split(" ")[0] ?? ""}`)]);
      await database.query(`delete from audit where ${where}`);
      expect((await findings("one")).map(({ fault }) => fault)).toContain("removed");
      await database.query("insert into audit select * from jsonb_populate_record(null::audit, $1::jsonb)", [before?.row ?? ""]);
      expect(await findings("one")).toEqual([]);
    }
  });

  test("they are listed by their tool", async () => {
    const page = await queries.audit("one", { tool: "pay", limit: 500 });
    expect(page.items.length).toBeGreaterThan(10);
    expect(page.items.every(({ tool }) => tool === "pay")).toBe(true);
    expect((await queries.audit("one", { entry_type: "tool.intent", limit: 500 })).items.every(({ args_hash }) => args_hash !== null)).toBe(true);
  });
});
