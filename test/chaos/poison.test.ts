// Goal:   a session that kills its worker each time is parked after its budget, with its cost known; its neighbours finish unharmed; the story can
//         be told; and an operator's unpark lets it go on once the poison is gone.
// Method: the real `up` with three workers. Whenever the poisoned session's model call begins, on whichever worker, that worker is killed with -9.
//         Neighbours run whole turns all the while, some of them on the very workers that die.
import { beforeAll, expect, test } from "vitest";
import { RECOVERY_TRIES_MAX } from "../../state-machines/step.ts";
import { sendSignal, until } from "../../deploy/local/server-process.ts";
import { decodeJournal, type JournalMessage } from "../../protocol/journal.ts";
import { startTroupe, type Troupe } from "../harness/troupe.ts";
import { typed } from "../harness/typed-command.ts";

const NEIGHBOURS = 8;
const POISONED = "demo/session/poisoned";
const script = (tokens: number, token_ms: number): string => JSON.stringify([{ say: "one two three four five", tokens, token_ms }]);

let troupe: Troupe;
beforeAll(async () => {
  troupe = await startTroupe({ workers: 3 });
}, 120_000);

async function session(id: string): Promise<void> {
  await troupe.json(201, "/v1/sessions", { json: { id, agent: "assistant", overrides: { model: "simulated/script" } } });
}
const state = async (id: string): Promise<string> => (await troupe.json<{ state: string }>(200, `/v1/sessions/${id}`)).state;
const entriesOf = (journal: readonly JournalMessage[]) => journal.flatMap(({ entries }) => entries);
const eventsOf = (journal: readonly JournalMessage[], type: string) => journal.flatMap(({ events }) => events.filter((event) => event.type === type));

test("a session that kills its worker each time is parked, its neighbours finish, explain tells why, and unpark lets it go on", async () => {
  const neighbours = Array.from({ length: NEIGHBOURS }, (_, index) => `neighbour${index}`);
  await Promise.all(["poisoned", ...neighbours].map(session));

  let poison = true;
  let kills = 0;
  const bus = await troupe.bus();
  const killed = new Set<number>();
  const watching = bus.subscribe("live.tenant.demo.session.poisoned.event", ({ data }) => {
    const { worker, entries, state, held = [] } = decodeJournal(data);
    if (!poison || state !== "thinking" || held.length > 0) return;
    // A claim that waits in quarantine has begun nothing; everything else that is thinking has its call under way.
    if (!entries.some(({ t }) => t === "claim" || t === "command" || t === "done")) return;
    const pid = troupe.processOf("worker", worker);
    if (killed.has(pid)) return;
    killed.add(pid);
    kills += 1;
    sendSignal(pid, "SIGKILL");
  });

  let over = false;
  const turns = new Map(neighbours.map((id) => [id, 0]));
  const talks = neighbours.map(async (id) => {
    while (!over) {
      const turn = (turns.get(id) ?? 0) + 1;
      await troupe.json(202, `/v1/sessions/${id}/messages`, { json: { content: script(20, 30) }, headers: { "idempotency-key": `${id}-${turn}` } });
      if (!(await until(async () => (await state(id)) === "idle", 60_000, 50))) throw new Error(`${id} stays ${await state(id)}`);
      turns.set(id, turn);
    }
  });

  await troupe.json(202, "/v1/sessions/poisoned/messages", { json: { content: script(100, 50) } });
  expect(await until(async () => (await state("poisoned")) === "parked", 120_000, 50), `parked after ${kills} kills`).toBe(true);
  poison = false;
  over = true;
  await Promise.all(talks);

  const journal = await troupe.journal(POISONED);
  const lost = entriesOf(journal).filter((entry) => entry.t === "claim" && entry.lost.length > 0);
  expect(lost.length).toBe(kills);
  expect(kills).toBe(RECOVERY_TRIES_MAX);
  const cost = lost.reduce((sum, entry) => sum + Object.values((entry.t === "claim" && entry.assumed) || {}).reduce((one, other) => one + other, 0), 0);
  expect(cost).toBeGreaterThan(0);
  expect(eventsOf(journal, "session.parked")).toMatchObject([{ tries: RECOVERY_TRIES_MAX, cost_usd_micros: cost }]);

  for (const id of neighbours) {
    const theirs = await troupe.journal(`demo/session/${id}`);
    expect([id, eventsOf(theirs, "turn.completed").length]).toEqual([id, turns.get(id)]);
    expect([id, eventsOf(theirs, "turn.failed").length]).toEqual([id, 0]);
    expect([id, theirs.filter((message) => message.state === "parked").length]).toEqual([id, 0]);
  }

  const explained = await typed(troupe, ["explain", POISONED, "--last", "200"]);
  expect(explained.code).toBe(0);
  expect(explained.stdout).toMatch(/is parked/);
  expect(explained.stdout).toMatch(/declared dead: both connections closed/);
  expect(explained.stdout).toMatch(/claimed by w\d, epoch \d+, from w\d \(owner_gone\); lost: \S+:model/);
  expect(explained.stdout).toMatch(/attempt 1 of model call 1\.0 void/);

  const unparked = await typed(troupe, ["unpark", POISONED, "--reason", "the poison is gone"]);
  expect([unparked.code, unparked.stderr]).toEqual([0, ""]);
  expect(await until(async () => (await state("poisoned")) === "idle", 60_000, 50)).toBe(true);
  expect(eventsOf(await troupe.journal(POISONED), "turn.completed")).toHaveLength(1);
  const again = await typed(troupe, ["unpark", POISONED]);
  expect(again.code).toBe(1);
  expect(again.stderr).toContain("illegal_transition");
  const verified = await typed(troupe, ["verify", "demo"]);
  expect(verified.code, verified.stdout).toBe(0);
  await watching.stop();
}, 300_000);
