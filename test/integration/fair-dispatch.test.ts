// Goal:   on the real thing, calls wait in line by priority, a tenant of which too much waits is told so with the same code over HTTP and over NATS,
//         can see why, and nobody else feels any of it: neither the line for slots nor thousands of commands.
// Method: the real `up` with one worker and small bounds, two tenants, simulated models that take their time: a call that must still be going on while
//         the test looks takes minutes, and is cancelled when it has looked.
import { beforeAll, expect, test } from "vitest";
import type { ConcurrencyReport } from "../../actors/concurrency-report.ts";
import type { ActorEvent } from "../../protocol/journal.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { eventually, startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

let troupe: Troupe;
let other_key: string;

const script = (token_ms: number): string => JSON.stringify([{ say: "one", tokens: 20, token_ms }]);
/** A hundred seconds: whoever says it cancels it. */
const HELD = script(5_000);

async function cli(args: readonly string[]): Promise<string> {
  const ran = await typed(troupe, args);
  expect(ran, args.join(" ")).toMatchObject({ code: 0 });
  return ran.stdout;
}
const send = (id: string, body: object, key?: string): Promise<Response> =>
  troupe.api(`/v1/sessions/${id}/messages`, { json: body, ...(key === undefined ? {} : { key }) });
const eventsOf = async (path: string): Promise<ActorEvent[]> => (await troupe.journal(path)).flatMap(({ events }) => events);
const completed = async (path: string): Promise<number> => (await eventsOf(path)).filter(({ type }) => type === "turn.completed").length;
const ended = async (path: string): Promise<boolean> => (await completed(path)) > 0;
const cancel = (id: string): Promise<unknown> => troupe.json(200, `/v1/sessions/${id}/cancel`, { json: {} });
/** The sessions that were given a slot, in the order of their calls. */
const granted = async (): Promise<unknown[]> =>
  (await eventsOf("demo/budget/main")).flatMap((event) => (event.type === "budget.reserved" ? [event["session"]] : []));
interface Waits {
  readonly workers: readonly { readonly calls: { readonly running: number; readonly waiting: number; readonly refusing: number } }[];
}
/** How long the first call certainly had the only slot. */
let held_ms = 0;

/** Said again until the broker has said that it is stored: beside thousands of others it may be busy. */
async function stored(subject: string, data: Uint8Array, inbox: string): Promise<void> {
  const bus = await troupe.bus();
  const outcome = await eventually(
    () => bus.publish(subject, data, { headers: { "Troupe-Reply-To": inbox } }),
    ({ kind }) => kind !== "unavailable",
  );
  expect(outcome).toMatchObject({ kind: "stored" });
}

/** As a service on the bus says a command: stored, and one answer to its own inbox. */
async function overNats(tenant: string, id: string, type: string, body: object, on_stored = (): void => {}): Promise<Reply | undefined> {
  const bus = await troupe.bus();
  const inbox = bus.inbox();
  const answer = new Promise<Reply | undefined>((resolve) => {
    bus.subscribe(inbox, ({ data }) => resolve(decodeReply(data)));
    setTimeout(() => resolve(undefined), 60_000);
  });
  await bus.flush();
  const data = new TextEncoder().encode(JSON.stringify({ type, body }));
  await stored(`tenant.${tenant}.session.${id}.command`, data, inbox);
  on_stored();
  return answer;
}

beforeAll(async () => {
  troupe = await startTroupe({ workers: 1, env: { TROUPE_TENANT_CALLS_WAITING_MAX: "10", TROUPE_TENANT_COMMANDS_WAITING_MAX: "500" } });
  await cli(["tenants", "create", "other"]);
  other_key = (await cli(["keys", "create", "--tenant", "other"])).trim();
  const agent = JSON.stringify({ agent: "assistant", model: "simulated/script", max_output_tokens: 25 });
  for (const tenant of ["demo", "other"]) expect(await typed(troupe, ["agents", "put", "--tenant", tenant, "-"], { stdin: agent })).toMatchObject({ code: 0 });
}, 120_000);

test("calls wait in line for the tenant's slots and go by priority; when too many wait, both doors say overloaded; another tenant's do not wait", async () => {
  await cli(["budget", "set", "--tenant", "demo", "--concurrency", "1"]);
  const ids = Array.from({ length: 11 }, (_, n) => `s${n}`);
  for (const id of ids) await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant" } });
  await troupe.json(201, "/v1/sessions", { json: { id: "s0", agent: "assistant" }, key: other_key });

  const waiting = (count: number): Promise<Waits> =>
    eventually(
      async () => JSON.parse(await cli(["waits", "--json"])) as Waits,
      ({ workers }) => workers[0]?.calls.waiting === count,
    );
  expect((await send("s0", { content: HELD })).status).toBe(202);
  expect(await eventually(granted, (all) => all.length === 1)).toEqual(["s0"]);
  const began_ms = performance.now();
  // Each stands in line before the next one comes.
  let seen: Waits | undefined;
  for (let n = 1; n <= 8; n++) {
    expect((await send(`s${n}`, { content: script(5), priority: n === 8 ? "critical" : n === 1 ? "low" : "normal" })).status).toBe(202);
    seen = await waiting(n);
  }
  expect(seen?.workers[0]?.calls).toMatchObject({ waiting: 8, refusing: 1 });

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

  expect((await send("s0", { content: script(5) }, other_key)).status).toBe(202);
  expect(await eventually(() => ended("other/session/s0"), Boolean)).toBe(true);
  expect(await granted(), "nobody of the first tenant got a slot all the while").toEqual(["s0"]);

  held_ms = performance.now() - began_ms;
  await cancel("s0");
  for (let n = 1; n <= 8; n++) expect(await eventually(() => ended(`demo/session/s${n}`), Boolean), `s${n}`).toBe(true);
  expect(await granted()).toEqual(["s0", "s8", "s2", "s3", "s4", "s5", "s6", "s7", "s1"]);
  expect((await send("s9", { content: script(5) })).status, "the door is open again").toBe(202);
  expect(await eventually(() => ended("demo/session/s9"), Boolean)).toBe(true);
  await cli(["budget", "set", "--tenant", "demo", "--concurrency", "none"]);
}, 120_000);

test("the report on concurrency tells from the journals alone who stood in line, and for how long the bound was reached; twice, in the same bytes", async () => {
  const asked = ["concurrency", "demo", "--until", new Date().toISOString()];
  const [first, second] = [await cli([...asked, "--json"]), await cli([...asked, "--json"])];
  expect(second).toBe(first);
  const report = JSON.parse(first) as ConcurrencyReport;
  expect(report.models).toMatchObject({ peak: 1, concurrency_max: null });
  const slot = report.waits.find(({ reason }) => reason === "slot");
  expect(slot?.waits).toBeGreaterThanOrEqual(8);
  expect(
    report.longest.find(({ session, reason }) => session === "s1" && reason === "slot"),
    "the lowest waited longest",
  ).toMatchObject({ ended: "began" });
  // Nine calls ran one after another, and the first had the slot all the while that the others came and stood in line.
  expect(report.models.at_limit_ms).toBeGreaterThan(0.9 * held_ms);
  expect(report.models.at_limit_ms).toBeLessThanOrEqual(report.models.busy_ms);
  const own = JSON.parse(await cli([...asked, "--session", "s8", "--json"])) as ConcurrencyReport;
  expect(own).toMatchObject({ session: "s8", models: { count: 1, peak: 1 }, waits: [{ reason: "slot", waits: 1 }] });
  const said = await cli(asked);
  expect(said).toMatch(/calls of models {2}\d+, at most 1 at once/);
  expect(said).toMatch(/as many as might ran for/);
  expect(JSON.parse(await cli(["concurrency", "nobody", "--json"]))).toMatchObject({ from: null, waits: [] });
  expect(await typed(troupe, ["concurrency", "demo", "--since", "yesterday"])).toMatchObject({ code: 2 });
}, 120_000);

test("a worker makes no more calls at once than it may, and may be told another number while it runs", async () => {
  await cli(["waits", "--calls-max", "1"]);
  expect((await send("s1", { content: HELD })).status).toBe(202);
  const running = async (): Promise<number | undefined> => (JSON.parse(await cli(["waits", "--json"])) as Waits).workers[0]?.calls.running;
  expect(await eventually(running, (count) => count === 1)).toBe(1);
  for (const id of ["s2", "s3"]) expect((await send(id, { content: script(5) })).status).toBe(202);
  const PLACE = /its model call waits for a place at .* \(1 of 1 calls run\)/;
  for (const id of ["s2", "s3"])
    expect(
      await eventually(
        () => cli(["explain", `demo/session/${id}`]),
        (said) => PLACE.test(said),
      ),
    ).toMatch(PLACE);
  expect([await completed("demo/session/s2"), await completed("demo/session/s3")], "each has the turn of the test before").toEqual([1, 1]);
  await cli(["waits", "--calls-max", "10"]);
  for (const id of ["s2", "s3"])
    expect(
      await eventually(
        () => completed(`demo/session/${id}`),
        (count) => count === 2,
      ),
      id,
    ).toBe(2);
  expect(await completed("demo/session/s1"), "they did not wait for its end").toBe(1);
  await cancel("s1");
  expect(await cli(["verify", "--json"])).toContain('"violations":0');
}, 120_000);

test("beside thousands of stored commands of one tenant, another's are answered at once, and none of the thousands is lost", async () => {
  const bus = await troupe.bus();
  const inbox = bus.inbox();
  const codes = new Map<string, number>();
  const COMMANDS = 3_000;
  const SESSIONS = 1_000;
  const floodOf = (n: number): string => `flood${n % SESSIONS}`;
  const replied = new Set<string>();
  const made = new Set<string>();
  bus.subscribe(`${inbox}.*`, ({ subject, data }) => {
    const reply = decodeReply(data);
    const code = reply === undefined ? "unreadable" : reply.ok ? "ok" : reply.error.code;
    codes.set(code, (codes.get(code) ?? 0) + 1);
    replied.add(subject);
    if (code === "ok") made.add(floodOf(Number(subject.split(".").at(-1))));
  });
  let published = 0;
  const undecided = async (): Promise<number> => (await bus.counts("COMMANDS", "shard.*.tenant.demo.>")).length;
  const flood = async (): Promise<void> => {
    for (let n = published++; n < COMMANDS; n = published++) {
      const data = new TextEncoder().encode(JSON.stringify({ type: "session.create", body: { agent: "assistant" } }));
      await stored(`tenant.demo.session.${floodOf(n)}.command`, data, `${inbox}.${n}`);
    }
  };
  const began_ms = performance.now();
  const flooding = Promise.all(Array.from({ length: 500 }, flood));
  const latencies: number[] = [];
  const over_http: number[] = [];
  let demo_refused: Response | undefined;
  while (published < COMMANDS || (await undecided()) > 0) {
    // From when it is stored: before that it stands in the line of the disk, with every other publish.
    let stored_ms = 0;
    const ask = (): Promise<Reply | undefined> =>
      overNats("other", `beside${latencies.length}`, "session.create", { agent: "assistant" }, () => (stored_ms = performance.now()));
    const answered = (await ask()) ?? (await ask());
    expect(answered).toMatchObject({ ok: true });
    latencies.push(Math.max(0, performance.now() - stored_ms));
    const asked_ms = performance.now();
    const paused = await troupe.api(`/v1/sessions/beside0/pause`, { method: "POST", json: {}, key: other_key });
    // A broker that cannot take it just now is not what this is about; that too much waits is the other tenant's alone.
    if (paused.status >= 500) expect(await paused.json()).toMatchObject({ code: "unavailable" });
    over_http.push(performance.now() - asked_ms);
    if (demo_refused === undefined && published > 1_000) {
      const answer = await send("s1", { content: script(5) });
      if (answer.status === 503) demo_refused = answer;
    }
    if (latencies.length > 500) break;
  }
  await flooding;
  // None is lost: the stream lets go of a command when it is decided.
  expect(await eventually(undecided, (left) => left === 0, 200_000)).toBe(0);
  const flood_ms = performance.now() - began_ms;
  // A reply is said once and kept nowhere: who was not there to hear it, or whose worker's inbox was opened anew meanwhile, asks again under a key.
  await eventually(
    async () => replied.size,
    (count) => count === COMMANDS,
    5_000,
  );
  expect(replied.size).toBeGreaterThan(COMMANDS / 2);
  const there = new Set((await bus.last_of_each("EVENTS", "tenant.demo.session.*.event")).map(({ subject }) => subject));
  expect(
    [...made].filter((id) => !there.has(`tenant.demo.session.${id}.event`)),
    "what was answered with ok is there",
  ).toEqual([]);
  expect(made.size).toBeGreaterThan(0);
  const most = (all: readonly number[]): string => `${all.length} answered, at most ${Math.max(...all).toFixed(0)} ms`;
  console.log(`flood of ${flood_ms.toFixed(0)} ms: ${JSON.stringify([...codes])}; another's over NATS: ${most(latencies)}; over HTTP: ${most(over_http)}`);
  // Whoever stood behind the thousands would wait for about as long as they take; how long that is, is the machine's.
  const bound_ms = Math.max(3_000, flood_ms / 3);
  expect(Math.max(...latencies)).toBeLessThan(bound_ms);
  expect(Math.max(...over_http)).toBeLessThan(bound_ms);
  expect([...codes.keys()].filter((code) => code !== "ok" && code !== "overloaded")).toEqual([]);
  expect(codes.get("overloaded") ?? 0, "a bound of 500 was reached").toBeGreaterThan(0);
  if (demo_refused !== undefined) {
    expect(await demo_refused.json()).toMatchObject({ code: "overloaded" });
    expect(Number(demo_refused.headers.get("retry-after"))).toBeGreaterThanOrEqual(1);
  }
}, 300_000);
