// Goal:   a child that dies is started again: at once where it was alone, and after the others of its role have had time to take its work over.
// Method: real processes that do nothing, in virtual time.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { sendSignal } from "../../deploy/local/server-process.ts";
import { createChildren } from "../../roles/children.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { eventually } from "../harness/troupe.ts";
import { freshFolder } from "../harness/servers.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

test("the only one of its role comes back at once, one of several when the others went first", async () => {
  const home = freshFolder("children");
  const main = join(home, "idle.mjs");
  writeFileSync(main, "setInterval(() => undefined, 1000);\n");
  const world = new VirtualWorld(1);
  const said: string[] = [];
  const children = createChildren({
    program: process.execPath,
    main,
    log_directory: join(home, "logs"),
    world,
    say: (line) => void said.push(line),
    on_change: () => undefined,
    on_given_up: () => undefined,
  });
  atEndOfFile(() => children.stop("SIGKILL", 1_000));
  const names = (): string[] => children.running().map(({ id }) => id);
  for (const [role, id] of [
    ["gateway", "g1"],
    ["worker", "w1"],
    ["worker", "w2"],
  ] as const)
    children.start({ role, id, args: [], env: {} });
  const kill = async (id: string): Promise<void> => {
    const before = said.length;
    sendSignal(children.running().find((one) => one.id === id)!.pid, "SIGKILL");
    await eventually(
      async () => said.length,
      (count) => count > before,
    );
  };

  await kill("g1");
  await world.advance(0);
  expect(names().sort()).toEqual(["g1", "w1", "w2"]);
  await kill("w1");
  await world.advance(400);
  expect(names().sort(), "the other worker takes its shards first").toEqual(["g1", "w2"]);
  await kill("w2");
  await world.advance(0);
  expect(names().sort(), "nobody is left who could").toEqual(["g1", "w2"]);
  await world.advance(100);
  expect(names().sort()).toEqual(["g1", "w1", "w2"]);
});
