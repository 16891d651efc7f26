// Goal:   a session keeps SE1 to SE6 whatever happens to it.
// Method: every point that can be reached with two messages is walked (breadth first), and longer lives are drawn at random. Each step goes
// through drive.ts, which repeats it on the state loaded from its snapshot.
import fc from "fast-check";
import { expect, test } from "vitest";
import { COMMANDS } from "../../protocol/commands.ts";
import { answer, changed, configuration, expectInvariants, lost, observed, session, SessionDrive } from "./session-drive.ts";

/** One thing that may happen to a session next. */
interface Happening {
  readonly name: string;
  run(drive: SessionDrive): void;
}

/** Everything that may happen now, without regard to whether it is refused. */
function happenings(drive: SessionDrive, tools: readonly string[]): Happening[] {
  const next: Happening[] = [];
  for (const type of Object.keys(COMMANDS.session)) {
    if (type !== "message.send") next.push({ name: type, run: (now) => void now.command(type) });
  }
  for (const on_busy of ["enqueue", "reject", "interrupt"])
    next.push({ name: `message.send ${on_busy}`, run: (now) => void now.command("message.send", { content: "x", on_busy }) });
  for (const id of drive.running) {
    if (id === "configuration") next.push({ name: "configured", run: (now) => void now.done(id, configuration({ max_loops: 2, mode: now.context.mode })) });
    else if (id === "model") {
      next.push({ name: "answers", run: (now) => void now.done(id, answer("yes")) });
      if (drive.context.at_boundary) next.push({ name: "model finds a change", run: (now) => void now.fail(id, changed) });
      next.push({ name: "model is blocked", run: (now) => void now.fail(id, { code: "guardrail", message: "blocked", details: { rule: "r", on: "input" } }) });
      next.push({ name: "calls tools", run: (now) => void now.done(id, answer("", ...tools)) });
    } else next.push({ name: `${id} done`, run: (now) => void now.done(id, observed) });
    next.push({ name: `${id} fails`, run: (now) => void now.fail(id, lost) });
    next.push({ name: `${id} lost`, run: (now) => void now.claim([id]) });
  }
  for (const id of Object.keys(drive.state.timers)) next.push({ name: `timer ${id}`, run: (now) => void now.fire(id) });
  return next;
}

/** Points that differ in nothing a decision rests on are the same point. */
function pointOf({ context, view }: SessionDrive): string {
  const { turn_state, step, steps_void, queue, tools, pausing, mode, config, turns_assigned, init, at_boundary } = context;
  return JSON.stringify([
    view.state,
    view.running,
    turn_state,
    step - steps_void,
    init === null ? null : [init.retries, init.failed !== null],
    at_boundary,
    queue.length,
    tools.map(({ outcome }) => outcome.kind),
    pausing,
    mode,
    config !== null,
    Math.min(turns_assigned, 2),
  ]);
}

test("every point that two messages and two loops can lead to keeps the invariants, and every transition of the machine is taken on the way", () => {
  const seen = new Set<string>();
  const taken = new Set<string>();
  let steps = 0;
  const begin = [session(), session({ mode: "single" })];
  const pending: SessionDrive[] = [...begin];
  for (const drive of begin) seen.add(pointOf(drive));
  for (let drive = pending.shift(); drive !== undefined; drive = pending.shift()) {
    for (const happening of happenings(drive, ["now", "pay", "nonsense"])) {
      const next = drive.copyTo(new SessionDrive());
      const before = next.entries.length;
      happening.run(next);
      if (next.entries.length === before) continue;
      steps += 1;
      taken.add(`${drive.at} · ${happening.name.replace(/^timer .*/, "timer")} · ${next.at}`);
      expectInvariants(next);
      const point = pointOf(next);
      if (next.context.turns_assigned > 2 || seen.has(point)) continue;
      seen.add(point);
      pending.push(next);
    }
  }
  expect(seen.size).toBeGreaterThan(150);
  expect(steps).toBeGreaterThan(1_000);
  // Not by chance: each of these is one transition of the machine, and the walk must have gone through it.
  for (const one of [
    "initializing · timer · unhealthy",
    "initializing · timer · initializing",
    "initializing · configuration fails · unhealthy",
    "initializing · configuration fails · initializing",
    "thinking · model finds a change · initializing",
    "thinking · model is blocked · idle",
    "initializing · turn.cancel · initializing",
    "unhealthy · turn.cancel · unhealthy",
    "initializing · configured · thinking",
    "idle · timer · terminated",
    "paused · timer · terminated",
    "hibernated · timer · terminated",
    "thinking · timer · idle",
    "acting · timer · thinking",
    "acting · timer · idle",
    "acting · timer · paused",
    "acting · tool.1 lost · thinking",
    "acting · tool.1 lost · paused",
    "acting · turn.cancel · paused",
    "acting · session.resume · acting",
    "paused · turn.cancel · paused",
    "hibernated · message.send enqueue · thinking",
    "thinking · answers · terminated",
    "thinking · message.send interrupt · thinking",
  ])
    expect([...taken]).toContain(one);
}, 180_000);

test("long random lives keep the invariants, end every turn once, and replay from the first entry to the same state", () => {
  let longest = 0;
  fc.assert(
    fc.property(fc.array(fc.noBias(fc.nat()), { minLength: 1, maxLength: 60, size: "max" }), fc.nat(9), (choices, mode) => {
      const drive = session(mode === 0 ? { mode: "single" } : {});
      for (const choice of choices) {
        // Terminating and expiring are always possible and would end most lives at once.
        const next = happenings(drive, choice % 2 === 0 ? ["now"] : ["pay", "now", "nonsense"]).filter(
          ({ name }) => name !== "session.terminate" && !name.includes("ttl"),
        );
        next[choice % next.length]?.run(drive.later(choice % 1000));
        expectInvariants(drive);
        if (drive.view.final) break;
      }
      if (!drive.view.final) drive.tell("session.terminate");
      expectInvariants(drive);
      expect(drive.replayed()).toEqual({ saved: drive.saved, events: drive.events }); // A5
      longest = Math.max(longest, drive.entries.length);
    }),
    { numRuns: 150 },
  );
  expect(longest).toBeGreaterThan(20);
}, 180_000);
