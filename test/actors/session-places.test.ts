// Goal: SA1 to SA3: where a tenant may have only so many sessions none is created without a place; a place that nobody gave back is found when places run
// out, one that is rightly taken is not, and a tenant without a bound is asked nothing.
// Method: session-places over the real budget machine, without a bus; which sessions there are is what the test says.
import { expect, test } from "vitest";
import { createSessionPlaces } from "../../actors/session-places.ts";
import { errorBody } from "../../protocol/errors.ts";
import { silentLog } from "../../protocol/log.ts";
import { budgetContextOf } from "../../state-machines/budget-context.ts";
import { budgetDefinition } from "../../state-machines/budget.ts";
import { DOUBTED_AFTER_MS } from "../../state-machines/budget-sessions.ts";
import { sessionDefinition } from "../../state-machines/session.ts";
import { coreOf } from "../../state-machines/step.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";
import { Drive } from "../state-machines/drive.ts";

function ground(sessions_max: number | null) {
  const world = new VirtualWorld(1);
  const drive = new Drive(coreOf(budgetDefinition), { tenant: "acme", kind: "budget", id: "main" });
  drive.at_ms = world.now_ms();
  drive.create({}).tell("budget.configure", { level: "tenant", sessions_max });
  const there = new Map<string, "idle" | "terminated">();
  const said: string[] = [];
  const away = { budget: false, sessions: false };
  const session = (state: "idle" | "terminated"): Drive => {
    const one = new Drive(coreOf(sessionDefinition)).create({ agent: "a" });
    if (state === "terminated") one.tell("session.terminate", {});
    return one;
  };
  const places = createSessionPlaces({
    client: {
      async command(_actor, { type, body }) {
        said.push(`${type} ${String(body["session"])}`);
        if (away.budget) return { kind: "refused", error: errorBody("unavailable", "nobody answers") };
        drive.at_ms = world.now_ms();
        return { kind: "decided", reply: { ok: true, actor: "", seq: drive.seq, state: drive.at, result: drive.tell(type, body) } };
      },
    },
    standing: { counts_sessions: () => Promise.resolve((budgetContextOf(drive.view).session_places ?? null) !== null) },
    restorer: {
      async restore({ id }) {
        if (away.sessions) throw new Error("no broker");
        const state = there.get(id);
        return state === undefined ? undefined : ({ state: session(state).state } as never);
      },
    },
    world,
    log: silentLog,
  });
  const create = async (id: string): Promise<string> => {
    const refused = await places.refusal("acme", id);
    if (refused === undefined) there.set(id, "idle");
    return refused?.code ?? "created";
  };
  return { world, create, there, said, away, taken: () => budgetContextOf(drive.view).session_places?.taken };
}

test("without a bound nobody is asked", async () => {
  const { create, said } = ground(null);
  expect(await create("s1")).toBe("created");
  expect(said).toEqual([]);
});

test("SA1: beyond the bound nothing is created, nor where the budget cannot be asked", async () => {
  const { create, away } = ground(2);
  expect([await create("s1"), await create("s2"), await create("s3"), await create("s1")]).toEqual(["created", "created", "sessions_exceeded", "created"]);
  away.budget = true;
  expect(await create("s4")).toBe("unavailable");
});

test("SA2, SA3: places of sessions that ended untold, or never came to be, are found after a minute, once in a while; others keep theirs", async () => {
  const { create, there, said, world, taken, away } = ground(3);
  for (const id of ["ended", "never", "alive"]) await create(id);
  there.set("ended", "terminated");
  there.delete("never");
  expect(await create("s1"), "they may be about to be created").toBe("sessions_exceeded");
  await world.advance(DOUBTED_AFTER_MS);
  away.sessions = true;
  expect(await create("s1"), "who cannot be read keeps its place").toBe("sessions_exceeded");
  away.sessions = false;
  await world.advance(DOUBTED_AFTER_MS);
  said.length = 0;
  expect(await create("s1")).toBe("created");
  expect(said.filter((one) => one.startsWith("session.release")).sort()).toEqual(["session.release ended", "session.release never"]);
  expect(taken()).toBe(2);
  expect(await create("s2")).toBe("created");
  await world.advance(DOUBTED_AFTER_MS);
  said.length = 0;
  for (let n = 3; n < 20; n++) expect(await create(`s${n}`)).toBe("sessions_exceeded");
  expect(
    said.filter((one) => one === "session.acquire alive"),
    "one look for all who were refused",
  ).toHaveLength(1);
});
