// Goal: journals of every released version still end as they ended.
// Method: each recorded journal is replayed commit by commit; state, events and outgoing messages must be those that it says (A5).
import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { replayMessage } from "../../actors/verify.ts";
import { decodeJournal } from "../../protocol/journal.ts";
import { cores, type HostedKind } from "../../state-machines/kinds.ts";
import type { ActorState } from "../../state-machines/step.ts";

const recorded = readdirSync(import.meta.dirname).filter((name) => name.endsWith(".jsonl"));

test("there are recorded journals of each machine, and one of a session whose calls were tried again before each try was told", () => {
  expect(recorded).toEqual(expect.arrayContaining(["session-1.jsonl", "session-1-tries.jsonl", "tenant-1.jsonl", "budget-1.jsonl"]));
});

test.each(recorded)("%s replays to what it says, commit by commit", (name) => {
  const lines = readFileSync(`${import.meta.dirname}/${name}`, "utf8")
    .trimEnd()
    .split("\n");
  let state: ActorState | undefined;
  for (const line of lines) {
    const message = decodeJournal(new TextEncoder().encode(line));
    const core = cores[message.actor.kind as HostedKind];
    const replayed = replayMessage(core, state, message);
    expect(replayed.differences, `${name} at ${message.seq}`).toEqual([]);
    state = replayed.state;
  }
  expect(lines.length).toBeGreaterThan(3);
});

test.each(recorded)("%s ends in the same state when its commands say who said them: no machine sees it", (name) => {
  const messages = readFileSync(`${import.meta.dirname}/${name}`, "utf8")
    .trimEnd()
    .split("\n")
    .map((line) => decodeJournal(new TextEncoder().encode(line)));
  const core = cores[messages[0]!.actor.kind as HostedKind];
  const end = (signed: boolean): unknown => {
    let state: ActorState | undefined;
    for (const message of messages) {
      const entries = message.entries.map((entry) => (signed && "type" in entry ? { ...entry, principal: "key:k1" } : entry));
      state = replayMessage(core, state, { ...message, entries }).state;
    }
    return core.save(state!);
  };
  expect(end(true)).toEqual(end(false));
});
