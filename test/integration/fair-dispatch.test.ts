// Goal:   on the real thing, calls wait in line by priority, a tenant of which too much waits is told so with the same code over HTTP and over NATS,
//         can see why, and nobody else feels any of it: neither the line for slots nor ten thousand commands.
// Method: the real `up` with one worker and small bounds, two tenants, simulated models that take their time.
import { beforeAll, expect, test } from "vitest";
import type { ConcurrencyReport } from "../../actors/concurrency-report.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { later, startTroupe, type Troupe } from "../harness/troupe.ts";

let troupe: Troupe;
let other_key: string;

const script = (token_ms: number): string => JSON.stringify([{ say: "one", tokens: 20, token_ms }]);

async function cli(args: readonly string[]): Promise<string> {
  const ran = await troupe.cli(args);
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
const send = (id: string, body: object, key?: string): Promise<Response> =>
  troupe.api(`/v1/sessions/${id}/messages`, { json: body, ...(key === undefined ? {} : { key }) });
async function eventually<T>(read: () => Promise<T>, good: (value: T) => boolean, patience_ms = 30_000): Promise<T> {
  for (const give_up_ms = performance.now() + patience_ms; ; await later(100, undefined)) {
    const value = await read();
    if (good(value) || performance.now() > give_up_ms) return value;
  }
}
const ended = async (path: string): Promise<boolean> => (await troupe.journal(path)).some(({ events }) => events.some(({ type }) => type === "turn.completed"));

/** As a service on the bus says a command: stored, and one answer to its own inbox. */
async function overNats(tenant: string, id: string, type: string, body: object, on_stored = (): void => {}): Promise<Reply | undefined> {
  const bus = await troupe.bus();
  const inbox = bus.inbox();
  const answer = new Promise<Reply | undefined>((resolve) => {
    bus.subscribe(inbox, ({ data }) => resolve(decodeReply(data)));
    setTimeout(() => resolve(undefined), 20_000);
  });
  await bus.flush();
  const data = new TextEncoder().encode(JSON.stringify({ type, body }));
  expect(await bus.publish(`tenant.${tenant}.session.${id}.command`, data, { headers: { "Troupe-Reply-To": inbox } })).toMatchObject({ kind: "stored" });
  on_stored();
  return answer;
}

beforeAll(async () => {
  troupe = await startTroupe({ workers: 1, env: { TROUPE_TENANT_CALLS_WAITING_MAX: "10", TROUPE_TENANT_COMMANDS_WAITING_MAX: "500" } });
  await cli(["tenants", "create", "other"]);
  other_key = (await cli(["keys", "create", "--tenant", "other"])).trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 });
  for (const tenant of ["demo", "other"]) expect(await troupe.cli(["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 120_000);

test("calls wait in line for the tenant's slots and go by priority; when too many wait, both doors say overloaded; another tenant's do not wait", async () => {
  await cli(["budget", "set", "--tenant", "demo", "--concurrency", "1"]);
  const ids = Array.from({ length: 11 }, (_, n) => `s${n}`);
  for (const id of ids) await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" } });
  await troupe.json(201, "/v1/sessions", { json: { id: "s0", agent: "assistant" }, key: other_key });

  expect((await send("s0", { content: script(400) })).status).toBe(202);
  await later(500, undefined); // it has the slot
  for (let n = 1; n <= 8; n++) {
    expect((await send(`s${n}`, { content: script(5), priority: n === 8 ? "critical" : n === 1 ? "low" : "normal" })).status).toBe(202);
    await later(60, undefined);
  }
  interface Waits {
    readonly workers: readonly { readonly calls: { readonly waiting: number; readonly refusing: number } }[];
  }
  const seen = await eventually(
    async () => JSON.parse(await cli(["waits", "--json"])) as Waits,
    ({ workers }) => workers[0]?.calls.waiting === 8,
  );
  expect(seen.workers[0]?.calls).toMatchObject({ waiting: 8, refusing: 1 });

  const refused = await send("s9", { content: script(5) });
  expect(refused.status).toBe(503);
  expect(Number(refused.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  expect(await refused.json()).toMatchObject({ code: "overloaded", details: { waits_for: "slot", waiting: 8 } });
  expect(await overNats("demo", "s10", "message.send", { content: script(5) })).toMatchObject({
    ok: false,
    error: { code: "overloaded", details: { waits_for: "slot" } },
  });
  // What was stored is not answered away: its journal has it.
  const entries = (await troupe.journal("demo/session/s10")).flatMap((message) => message.entries);
  expect(entries.at(-1)).toMatchObject({ t: "refused", type: "message.send", error: { code: "overloaded" } });

  expect(await cli(["explain", "demo/session/s1"])).toMatch(
    /its model call waits for a slot of its tenant for .*1 of 1 calls run, 7 of 8 that wait go before it \(priority low\)/,
  );

  const began_ms = performance.now();
  expect((await send("s0", { content: script(5) }, other_key)).status).toBe(202);
  expect(await eventually(() => ended("other/session/s0"), Boolean)).toBe(true);
  expect(performance.now() - began_ms).toBeLessThan(3_000);
  expect(await ended("demo/session/s0"), "the slot was taken all the while").toBe(false);

  for (let n = 0; n <= 8; n++) expect(await eventually(() => ended(`demo/session/s${n}`), Boolean), `s${n}`).toBe(true);
  const granted = (await troupe.journal("demo/budget/main")).flatMap(({ events }) => events).filter(({ type }) => type === "budget.reserved");
  expect(granted.map((event) => event["session"])).toEqual(["s0", "s8", "s2", "s3", "s4", "s5", "s6", "s7", "s1"]);
  expect((await send("s9", { content: script(5) })).status, "the door is open again").toBe(202);
  await cli(["budget", "set", "--tenant", "demo", "--concurrency", "none"]);
}, 120_000);

test("the report on concurrency tells from the journals alone who stood in line, and for how long the bound was reached; twice, in the same bytes", async () => {
  const typed = ["concurrency", "demo", "--until", new Date().toISOString()];
  const [first, second] = [await cli([...typed, "--json"]), await cli([...typed, "--json"])];
  expect(second).toBe(first);
  const report = JSON.parse(first) as ConcurrencyReport;
  expect(report.models).toMatchObject({ peak: 1, concurrency_max: null });
  const slot = report.waits.find(({ reason }) => reason === "slot");
  expect(slot?.waits).toBeGreaterThanOrEqual(8);
  expect(
    report.longest.find(({ session, reason }) => session === "s1" && reason === "slot"),
    "the lowest waited longest",
  ).toMatchObject({ ended: "began" });
  // Nine calls ran one after another, and the first took eight seconds.
  expect(report.models.at_limit_ms).toBeGreaterThan(7_000);
  expect(report.models.at_limit_ms).toBeLessThanOrEqual(report.models.busy_ms);
  const own = JSON.parse(await cli([...typed, "--session", "s8", "--json"])) as ConcurrencyReport;
  expect(own).toMatchObject({ session: "s8", models: { count: 1, peak: 1 }, waits: [{ reason: "slot", waits: 1 }] });
  const said = await cli(typed);
  expect(said).toMatch(/calls of models {2}\d+, at most 1 at once/);
  expect(said).toMatch(/as many as might ran for/);
  expect(JSON.parse(await cli(["concurrency", "nobody", "--json"]))).toMatchObject({ from: null, waits: [] });
  expect(await troupe.cli(["concurrency", "demo", "--since", "yesterday"])).toMatchObject({ code: 2 });
}, 60_000);

test("a worker makes no more calls at once than it may, and may be told another number while it runs", async () => {
  await cli(["waits", "--calls-max", "1"]);
  const began_ms = performance.now();
  for (const id of ["s1", "s2", "s3"]) expect((await send(id, { content: script(40) })).status).toBe(202);
  await later(300, undefined);
  expect(await cli(["explain", "demo/session/s3"])).toMatch(/its model call waits for a place at .* \(1 of 1 calls run\)/);
  await cli(["waits", "--calls-max", "10"]);
  const turns = async (): Promise<number> =>
    (await Promise.all(["s1", "s2", "s3"].map((id) => troupe.journal(`demo/session/${id}`))))
      .flat()
      .flatMap(({ events }) => events)
      .filter(({ type }) => type === "turn.completed").length;
  expect(await eventually(turns, (count) => count === 6)).toBe(6);
  expect(performance.now() - began_ms).toBeLessThan(15_000);
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
}, 60_000);

test("beside thousands of stored commands of one tenant, another's are answered at once, and none of the thousands is lost", async () => {
  const bus = await troupe.bus();
  const inbox = bus.inbox();
  const codes = new Map<string, number>();
  let replies = 0;
  bus.subscribe(inbox, ({ data }) => {
    const reply = decodeReply(data);
    const code = reply === undefined ? "unreadable" : reply.ok ? "ok" : reply.error.code;
    codes.set(code, (codes.get(code) ?? 0) + 1);
    replies += 1;
  });
  const COMMANDS = 10_000;
  let published = 0;
  const flood = async (): Promise<void> => {
    for (let n = published++; n < COMMANDS; n = published++) {
      const data = new TextEncoder().encode(JSON.stringify({ type: "session.create", body: { agent: "assistant" } }));
      const stored = await bus.publish(`tenant.demo.session.flood${n % 2_000}.command`, data, { headers: { "Troupe-Reply-To": inbox } });
      if (stored.kind !== "stored") throw new Error(stored.kind);
    }
  };
  const flooding = Promise.all(Array.from({ length: 500 }, flood));
  const latencies: number[] = [];
  const over_http: number[] = [];
  let demo_refused: Response | undefined;
  while (published < COMMANDS || replies < COMMANDS) {
    // From when it is stored: before that it stands in the line of the disk, with every other publish.
    let stored_ms = 0;
    const answered = await overNats("other", `beside${latencies.length}`, "session.create", { agent: "assistant" }, () => (stored_ms = performance.now()));
    expect(answered).toMatchObject({ ok: true });
    latencies.push(Math.max(0, performance.now() - stored_ms));
    const asked_ms = performance.now();
    expect((await troupe.api(`/v1/sessions/beside0/pause`, { method: "POST", json: {}, key: other_key })).status).toBeLessThan(500);
    over_http.push(performance.now() - asked_ms);
    if (demo_refused === undefined && published > 2_000) {
      const answer = await send("s1", { content: script(5) });
      if (answer.status === 503) demo_refused = answer;
    }
    if (latencies.length > 500) break;
  }
  await flooding;
  expect(
    await eventually(
      async () => replies,
      (count) => count >= COMMANDS,
      60_000,
    ),
  ).toBe(COMMANDS);
  const most = (all: readonly number[]): string => `${all.length} answered, at most ${Math.max(...all).toFixed(0)} ms`;
  console.log(`flood: ${JSON.stringify([...codes])}; another's over NATS: ${most(latencies)}; over HTTP: ${most(over_http)}`);
  expect(Math.max(...latencies)).toBeLessThan(3_000);
  expect(Math.max(...over_http)).toBeLessThan(2_000);
  expect([...codes.keys()].filter((code) => code !== "ok" && code !== "overloaded")).toEqual([]);
  expect(codes.get("overloaded") ?? 0, "a bound of 500 was reached").toBeGreaterThan(0);
  if (demo_refused !== undefined) {
    expect(await demo_refused.json()).toMatchObject({ code: "overloaded" });
    expect(Number(demo_refused.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  }
}, 180_000);
