// Goal: what the virtual cluster shows holds on a real broker too: leases, table, journals and commands as JetStream keeps them.
// Method: a supervisor and two workers over real connections; join, a broker killed for longer than a renewal, drain.
import { expect, test } from "vitest";
import { connectJetStream } from "../../bus/jetstream.ts";
import type { Bus } from "../../bus/port.ts";
import { createRestorer } from "../../actors/restore.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld } from "../../roles/real-world.ts";
import { cores } from "../../state-machines/kinds.ts";
import { Leader } from "../../supervisors/leader.ts";
import { Member } from "../../supervisors/member.ts";
import { createWorkerCells } from "../../supervisors/worker-cell.ts";
import { startNatsServer } from "../contract/nats-server.ts";
import { RecordingHost } from "./cluster.ts";

const world = realWorld();

async function until(what: string, condition: () => boolean, patience_ms = 60_000): Promise<void> {
  const give_up_ms = world.monotonic_ms() + patience_ms;
  while (!condition() && world.monotonic_ms() < give_up_ms) await new Promise((resolve) => setTimeout(resolve, 5));
  expect(condition(), what).toBe(true);
}

test("shards are placed, survive a broker killed for two seconds without changing hands, and are handed over by a drain", async () => {
  const server = await startNatsServer();
  const open: Bus[] = [];
  const connect = async (name: string): Promise<Bus> => {
    const bus = await connectJetStream({ servers: server.url, name, shards: 16, replicas: 1, log: silentLog, world });
    open.push(bus);
    return bus;
  };
  try {
    const bus = await connect("supervisor");
    let commits = 0;
    const open_cell = createWorkerCells({
      bus,
      world,
      log: silentLog,
      core: cores.worker,
      restorer: createRestorer({ bus, cores, log: silentLog }),
      supervisor: "s1",
      next_commit_id: () => `s1.${commits++}`,
    });
    const leader = new Leader({ bus, world, log: silentLog, id: "s1", open_cell });
    leader.start();
    const worker = async (id: string) => {
      const host = new RecordingHost(world);
      const member = new Member({ bus: await connect(id), world, log: silentLog, id, versions: ["session@1"], host });
      const beat = (): void => void world.after(250, () => member.phase !== "stopped" && void member.tick().finally(beat));
      await member.start();
      beat();
      const owning = (): number => [...host.shards.values()].filter(({ phase }) => phase === "owning").length;
      return { host, member, owning };
    };
    const w1 = await worker("w1");
    await until("w1 owns everything", () => w1.owning() === 16);
    const w2 = await worker("w2");
    await until("each owns half", () => w1.owning() === 8 && w2.owning() === 8);
    const histories = [[...w1.host.history], [...w2.host.history]];
    await server.restart({ down_ms: 2_000 });
    await until("both act and one leads", () => w1.member.may_act() && w2.member.may_act() && leader.role === "leading");
    expect([w1.host.history, w2.host.history]).toEqual(histories);
    await w1.member.drain();
    await w1.member.stop();
    await until("w2 owns everything", () => w2.owning() === 16);
    expect(w1.host.history.filter((line) => line.startsWith("drop"))).toEqual([]);
    await w2.member.drain(); // alone: it releases
    await w2.member.stop();
    expect(w2.owning()).toBe(0);
    await leader.stop();
  } finally {
    for (const bus of open) await bus.close();
    await server.stop();
  }
});
