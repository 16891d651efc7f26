// Goal: every shard has one owner, whoever dies, pauses, joins or leaves; and nobody is judged for what the bus did.
// Method: whole supervisors and workers in virtual time on the in-memory bus, with the real worker machine. Each test says
// what happens and looks at what the hosts own, what the table says, and what the journals tell.
import { describe, expect, test } from "vitest";
import { silentLog } from "../../protocol/log.ts";
import { decodeReply } from "../../protocol/reply.ts";
import { actorSubject, hostSubject, RESUMED_SUBJECT } from "../../protocol/subjects.ts";
import { tellResumed } from "../../supervisors/resumed.ts";
import { encodeRecord, placementKey } from "../../supervisors/tables.ts";
import { workerActor } from "../../supervisors/worker-cell.ts";
import { Cluster } from "./cluster.ts";

const running = async (workers: string[], options: ConstructorParameters<typeof Cluster>[0] = {}) => {
  const cluster = new Cluster(options);
  const supervisors = [cluster.supervisor("s1")];
  const [first, ...others] = workers.map((id) => cluster.worker(id));
  await cluster.until("all shards are placed evenly", () => cluster.balanced());
  // Past the time in which a supervisor that just began judges nobody.
  await cluster.world.advance(6_000);
  return { cluster, supervisors, supervisor: supervisors[0]!, workers: [first!, ...others] };
};

describe("placing", () => {
  test("a first worker gets every shard, within a second of joining", async () => {
    const cluster = new Cluster();
    cluster.supervisor("s1");
    await cluster.world.advance(1_000);
    cluster.worker("w1");
    await cluster.until("all shards are placed", () => cluster.placed(), 1_000);
    expect(await cluster.events("w1")).toEqual(["state null→joining", "state joining→ready", ...Array.from({ length: 8 }, () => "shard.assigned")]);
  });

  test("a worker that joins is given half by planned moves: the owner leaves each shard before the other takes it", async () => {
    const { cluster, workers } = await running(["w1"]);
    cluster.worker("w2");
    await cluster.until("balanced", () => cluster.balanced());
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect(workers[0]!.host.history.filter((line) => line.startsWith("leave"))).toHaveLength(4);
    expect(workers[0]!.host.history.filter((line) => line.startsWith("drop"))).toEqual([]);
    await cluster.world.advance(1_000);
    const table = await cluster.table();
    expect([...table.values()].filter((entry) => entry.worker === "w2").map((entry) => [entry.epoch, entry.from, entry.reason])).toEqual(
      Array.from({ length: 4 }, () => [2, "w1", "moved"]),
    );
    // The journals follow what the owner wrote.
    expect((await cluster.events("w1")).filter((type) => type === "shard.released")).toHaveLength(4);
    expect((await cluster.events("w2")).filter((type) => type === "shard.assigned")).toHaveLength(4);
  });

  test("a planned move begins when its target has prepared the shard, and the owner has it until then", async () => {
    const { cluster, workers } = await running(["w1"]);
    const asked: number[] = [];
    const answers: (() => void)[] = [];
    const bus = cluster.broker.connect("prepares");
    bus.subscribe(hostSubject("w2", "prepare"), ({ data, reply }) => {
      const { shard } = JSON.parse(new TextDecoder().decode(data)) as { shard: number };
      asked.push(shard);
      answers.push(() => bus.send(reply ?? "", new TextEncoder().encode(JSON.stringify({ ok: true, result: { shard, actors: 3 } }))));
    });
    cluster.worker("w2");
    await cluster.world.advance(1_500);
    expect(asked).toHaveLength(4);
    expect(cluster.counts()).toEqual({ w1: 8, w2: 0 });
    expect(workers[0]!.host.history.filter((line) => line.startsWith("leave"))).toEqual([]);
    for (const answer of answers) answer();
    await cluster.world.advance(200);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect(asked).toHaveLength(4);
  });

  test("a target that does not get ready holds a move up for two seconds, and nothing else", async () => {
    const { cluster, workers } = await running(["w1", "w3"]);
    cluster.broker.connect("silent").subscribe(hostSubject("w2", "prepare"), () => undefined);
    cluster.worker("w2");
    await cluster.world.advance(1_000);
    expect(cluster.counts()["w2"]).toBe(0);
    expect(cluster.placed()).toBe(true);
    await cluster.until("it has its part", () => cluster.balanced() && (cluster.counts()["w2"] ?? 0) > 0, 2_500);
    expect(workers).toHaveLength(2);
  });

  test("what is as it should be is left alone: no append and no table write in a quiet minute", async () => {
    const { cluster } = await running(["w1", "w2", "w3"]);
    const before = [await cluster.observer.bounds("EVENTS"), [...(await cluster.table()).entries()]];
    await cluster.world.advance(60_000);
    expect([await cluster.observer.bounds("EVENTS"), [...(await cluster.table()).entries()]]).toEqual(before);
  });
});

describe("death", () => {
  test("a killed worker's shards are owned by the others within seven seconds, under higher epochs, and the journal says why", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const before = await cluster.table();
    workers[0]!.kill();
    await cluster.until("the others own everything", () => cluster.placed(), 7_000);
    await cluster.world.advance(1_000);
    for (const [shard, entry] of await cluster.table()) {
      expect(entry.worker).toBe("w2");
      expect(entry.epoch).toBe(before.get(shard)!.worker === "w1" ? before.get(shard)!.epoch + 1 : before.get(shard)!.epoch);
    }
    const events = await cluster.events("w1");
    expect(events.slice(-6)).toEqual(["state ready→suspected", "state suspected→dead", ...Array.from({ length: 4 }, () => "shard.released")]);
    const verdict = (await cluster.journal("w1"))
      .flatMap(({ entries }) => entries)
      .find((entry) => entry.t === "command" && entry.type === "worker.declare_dead");
    expect(verdict).toMatchObject({ body: { evidence: { kind: "lease_expired" } } });
  });

  test("an actor that goes on elsewhere is told in the new owner's journal, with the time it took to notice, to decide and to replay", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [shard] = [...workers[0]!.host.shards.keys()];
    workers[0]!.kill();
    await cluster.until("the other owns everything", () => cluster.placed(), 7_000);
    const { epoch } = workers[1]!.host.shards.get(shard!)!;
    tellResumed(cluster.observer, { worker: "w2", actor: "acme/session/s1", shard: shard!, epoch, entries: 12, replay_ms: 3.4 });
    tellResumed(cluster.observer, { worker: "unknown", actor: "acme/session/s1", shard: shard!, epoch, entries: 12, replay_ms: 3.4 });
    cluster.observer.send(RESUMED_SUBJECT, new TextEncoder().encode("{"));
    await cluster.world.advance(500);
    const told = (await cluster.journal("w2")).flatMap(({ events }) => events).filter(({ type }) => type === "actor.resumed");
    expect(told).toEqual([
      { type: "actor.resumed", actor: "acme/session/s1", entries: 12, detect_ms: expect.any(Number), assign_ms: expect.any(Number), replay_ms: 3 },
    ]);
    expect(told[0]!["detect_ms"]).toBeGreaterThanOrEqual(4_000);
    expect(told[0]!["detect_ms"]).toBeLessThan(6_500);
    expect(await cluster.journal("unknown")).toEqual([]);
  });

  test("a worker that is killed and started again under its name is another incarnation and owns nothing of the earlier one's", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    workers[0]!.kill();
    const again = cluster.worker("w1");
    await cluster.until("balanced again", () => cluster.balanced(), 15_000);
    expect(again.host.history.every((line) => !line.startsWith("take") || !line.includes("@1 "))).toBe(true);
  });

  test("a worker that pauses for 2 s keeps everything, and is not even declared suspected", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const before = await cluster.table();
    const history = [...workers[0]!.host.history];
    workers[0]!.sleeper.asleep = true;
    await cluster.world.advance(2_000);
    workers[0]!.sleeper.wake();
    await cluster.world.advance(10_000);
    expect(await cluster.table()).toEqual(before);
    expect(workers[0]!.host.history).toEqual(history);
    expect(workers[0]!.member.may_act()).toBe(true);
    expect((await cluster.events("w1")).filter((type) => type.includes("suspected"))).toEqual([]);
  });

  test("a worker that pauses for 10 s has lost everything, may not act when it wakes, and joins again as another incarnation", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [slow] = workers;
    const incarnation = slow!.member.incarnation;
    slow!.sleeper.asleep = true;
    await cluster.world.advance(10_000);
    expect([...(await cluster.table()).values()].every((entry) => entry.worker === "w2")).toBe(true);
    expect(slow!.host.shards.size).toBe(4);
    expect(slow!.member.may_act()).toBe(false); // M1, before any of its code ran
    slow!.sleeper.wake();
    await cluster.world.settle();
    expect([...slow!.host.shards.values()].filter(({ epoch }) => epoch === 1)).toEqual([]);
    await cluster.until("balanced again", () => cluster.balanced());
    expect(slow!.member.incarnation).not.toBe(incarnation);
  });

  test("when no supervisor runs nobody is judged; the next one to lead finds the dead", async () => {
    const { cluster, supervisor, workers } = await running(["w1", "w2"]);
    supervisor.kill();
    workers[0]!.kill();
    const before = await cluster.table();
    await cluster.world.advance(20_000);
    expect(await cluster.table()).toEqual(before);
    cluster.supervisor("s2");
    await cluster.until("placed again", () => cluster.placed());
  });
});

describe("names that come back", () => {
  test("without a leader a worker that was killed and started again takes nothing; the next leader gives it everything under higher epochs", async () => {
    const { cluster, workers, supervisor } = await running(["w1"]);
    supervisor.kill();
    workers[0]!.kill();
    const again = cluster.worker("w1");
    await cluster.world.advance(10_000);
    expect([again.member.phase, again.host.history]).toEqual(["present", []]);
    cluster.supervisor("s2");
    await cluster.until("placed", () => cluster.placed());
    expect([...again.host.shards.values()].map(({ epoch }) => epoch)).toEqual(Array.from({ length: 8 }, () => 2));
    expect((await cluster.events("w1")).filter((type) => type.startsWith("state"))).toEqual([
      "state null→joining",
      "state joining→ready",
      "state ready→dead",
      "state dead→joining",
      "state joining→ready",
    ]);
  });

  test("a worker that died three times in five minutes gets nothing while another can take it", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    let [flapping] = workers;
    for (let deaths = 0; deaths < 3; deaths++) {
      flapping!.kill();
      await cluster.until("the other owns everything", () => cluster.placed());
      await cluster.world.advance(1_000);
      flapping = cluster.worker("w1");
      await cluster.world.advance(3_000);
      expect(flapping.host.shards.size).toBe(deaths < 2 ? 4 : 0);
    }
    await cluster.world.advance(5 * 60_000);
    await cluster.until("it is trusted again", () => cluster.balanced());
  });

  test("what the watch says of a lease is not believed before the leader has read the lease itself", async () => {
    const { cluster, supervisor } = await running(["w1", "w2"]);
    const before = await cluster.table();
    for (const listener of supervisor.sleeper.worker_listeners) listener({ kind: "gone", key: "w1", revision: 1_000_000 });
    await cluster.world.advance(10_000);
    expect(await cluster.table()).toEqual(before);
    expect((await cluster.events("w1")).filter((type) => type.includes("dead"))).toEqual([]);
  });
});

describe("leading", () => {
  test("D1: a decision that the worker's journal did not take does not reach the table", async () => {
    const cluster = new Cluster();
    cluster.supervisor("s1", {
      change_cell: (cell) => ({
        ...cell,
        say: (type, body, origin) =>
          type === "shard.assign" ? Promise.resolve({ ok: false, error: { code: "conflict", message: "another epoch" } }) : cell.say(type, body, origin),
      }),
    });
    cluster.worker("w1");
    await cluster.world.advance(3_000);
    expect((await cluster.events("w1")).at(-1)).toBe("state joining→ready");
    expect(await cluster.table()).toEqual(new Map());
  });

  test("D5: a leader whose pass makes no progress gives way to another", async () => {
    const cluster = new Cluster();
    const stuck = cluster.supervisor("s1", { change_cell: (cell) => ({ ...cell, load: () => new Promise(() => {}) }) });
    await cluster.world.advance(1_000);
    const second = cluster.supervisor("s2");
    cluster.worker("w1");
    await cluster.world.advance(9_000);
    expect([stuck.leader.role, second.leader.role, cluster.placed()]).toEqual(["leading", "standby", false]);
    await cluster.until("the other leads and places", () => second.leader.role === "leading" && cluster.placed(), 5_000);
    expect(stuck.leader.role).toBe("standby");
  });

  test("two supervisors that both think they lead: the fence of a worker's journal shows the older one that it does not", async () => {
    let unheard = false;
    const cluster = new Cluster({
      faults: {
        before: ({ kind, connection, subject }) =>
          unheard && kind === "bucket_write" && connection.startsWith("supervisor-s1") && subject.includes("LEADER") ? { kind: "unavailable" } : undefined,
      },
    });
    const first = cluster.supervisor("s1");
    cluster.worker("w1");
    await cluster.until("placed", () => cluster.placed());
    await cluster.world.advance(6_000);
    unheard = true;
    const leaders = cluster.observer.bucket("LEADER");
    await leaders.delete("leader", (await leaders.get("leader"))!.revision);
    const second = cluster.supervisor("s2");
    await cluster.until("the second leads", () => second.leader.role === "leading", 400);
    first.sleeper.asleep = true;
    cluster.worker("w2");
    await cluster.world.advance(1_000);
    expect([first.leader.role, first.leader.may_decide()]).toEqual(["leading", true]); // by its own clock
    first.sleeper.wake();
    await cluster.world.settle();
    expect(first.leader.role).toBe("standby");
    await cluster.until("balanced", () => cluster.balanced());
    for (const worker of ["w1", "w2"]) {
      const epochs = (await cluster.journal(worker)).map(({ epoch }) => epoch);
      expect(epochs).toEqual(epochs.toSorted((a, b) => a - b));
    }
  });

  test("of three supervisors one leads; when it is killed another leads within the lease and its time to live", async () => {
    const cluster = new Cluster();
    const supervisors = ["s1", "s2", "s3"].map((id) => cluster.supervisor(id));
    await cluster.world.advance(1_000);
    const first = supervisors.filter(({ leader }) => leader.role === "leading");
    expect(first).toHaveLength(1);
    const epoch = first[0]!.leader.epoch!;
    cluster.worker("w1");
    await cluster.until("placed", () => cluster.placed());
    first[0]!.kill();
    const others = supervisors.filter((one) => one !== first[0]);
    await cluster.until("another leads", () => others.some(({ leader }) => leader.role === "leading"), 5_500);
    expect(others.filter(({ leader }) => leader.role === "leading")).toHaveLength(1);
    expect(others.find(({ leader }) => leader.role === "leading")!.leader.epoch).toBeGreaterThan(epoch);
    cluster.worker("w2");
    await cluster.until("the new leader balances", () => cluster.balanced());
  });

  test("a supervisor that stops gives the leadership back: a standby leads at once", async () => {
    const cluster = new Cluster();
    const first = cluster.supervisor("s1");
    await cluster.world.advance(1_000);
    const second = cluster.supervisor("s2");
    await cluster.world.advance(1_000);
    await first.leader.stop();
    await cluster.until("the standby leads", () => second.leader.role === "leading", 20);
  });

  test("a leader that slept through its lease decides nothing when it wakes, and epochs of the workers' journals only rise", async () => {
    const { cluster, supervisor, workers } = await running(["w1", "w2"]);
    const second = cluster.supervisor("s2");
    await cluster.world.advance(1_000);
    supervisor.sleeper.asleep = true;
    await cluster.world.advance(7_000);
    expect(second.leader.role).toBe("leading");
    workers[1]!.kill();
    await cluster.until("the new leader gives the shards to who is left", () => cluster.placed());
    const journals = async () => [await cluster.journal("w1"), await cluster.journal("w2")].flat();
    const before = await journals();
    const table = await cluster.table();
    supervisor.sleeper.wake();
    await cluster.world.settle();
    expect(supervisor.leader.role).toBe("standby");
    await cluster.world.advance(5_000);
    expect(await cluster.table()).toEqual(table);
    expect((await journals()).filter(({ worker }) => worker === "s1")).toEqual(before.filter(({ worker }) => worker === "s1"));
    for (const worker of ["w1", "w2"]) {
      const epochs = (await cluster.journal(worker)).map(({ epoch }) => epoch);
      expect(epochs).toEqual(epochs.toSorted((a, b) => a - b));
    }
  });

  test("D4: what a leader hears as it wakes from a sleep longer than its lease is decided under a new leadership, not under the old one", async () => {
    const { cluster, supervisor } = await running(["w1"]);
    const epoch = supervisor.leader.epoch!;
    supervisor.sleeper.asleep = true;
    cluster.worker("w2"); // heard before the beat that would notice
    await cluster.world.advance(7_000);
    supervisor.sleeper.wake();
    await cluster.until("balanced", () => cluster.balanced());
    const epochs = (await cluster.journal("w2")).map((message) => message.epoch);
    expect(epochs.length).toBeGreaterThan(4);
    expect(Math.min(...epochs)).toBeGreaterThan(epoch);
  });

  test("D4: from the end of its lease by its own clock a leader decides nothing, before it has noticed", async () => {
    const { cluster, supervisor } = await running(["w1"]);
    expect(supervisor.leader.may_decide()).toBe(true);
    supervisor.sleeper.asleep = true;
    await cluster.world.advance(6_000);
    expect(supervisor.leader.role).toBe("leading");
    expect(supervisor.leader.may_decide()).toBe(false);
  });

  test("D2: what an owner wrote into the table unheard by the leader stands, and the leader goes on from it", async () => {
    const cluster = new Cluster();
    const { sleeper } = cluster.supervisor("s1", { connections: cluster.connections });
    const [first, , third] = ["w1", "w2", "w3"].map((id) => cluster.worker(id));
    await cluster.until("all shards are placed evenly", () => cluster.balanced());
    await cluster.world.advance(6_000);
    const shard = [...first!.host.shards.keys()][0]!;
    sleeper.deaf = true;
    const placement = cluster.observer.bucket("PLACEMENT");
    const finish = async <T>(call: Promise<T>): Promise<T> => {
      let outcome: { value: T } | undefined;
      void call.then((value) => (outcome = { value }));
      await cluster.world.until(() => outcome !== undefined, 1_000);
      return outcome!.value;
    };
    const before = (await finish(cluster.table())).get(shard)!;
    const read = (await finish(placement.get(placementKey(shard))))!;
    // As w1 itself would, at the end of a planned move.
    const moved = { worker: "w3", incarnation: third!.member.incarnation, epoch: before.epoch + 1, from: "w1", reason: "moved", since: before.since };
    await finish(placement.update(placementKey(shard), encodeRecord(moved), read.revision));
    first!.kill();
    for (const which of ["main", "life"] as const) cluster.tellClosed("w1", which, `w1-${which}-1`);
    await cluster.world.advance(200);
    expect((await finish(cluster.table())).get(shard)).toEqual(moved);
    sleeper.deaf = false;
  });

  test("a write of the table that nobody answered is no reason to release the shard: nothing is said of it before the table was read", async () => {
    let lost = 0;
    let unread = 2;
    const cluster: Cluster = new Cluster({
      faults: {
        before: ({ kind, subject }) =>
          lost > 0 && unread > 0 && kind === "bucket_read" && subject === "$KV.PLACEMENT.3" && unread-- > 0 ? { kind: "unavailable" } : undefined,
        after: ({ kind, connection, subject }) => {
          if (lost > 0 || kind !== "bucket_write" || !connection.startsWith("supervisor-s1") || subject !== "$KV.PLACEMENT.3") return undefined;
          lost++;
          sleeper.deaf = true; // nor does its watch tell it what was stored
          return { kind: "lose_answer" };
        },
      },
    });
    const { sleeper } = cluster.supervisor("s1");
    cluster.worker("w1");
    await cluster.until("the read of what stands there failed, and came again", () => unread === 0, 15_000);
    await cluster.world.advance(500);
    sleeper.deaf = false;
    expect((await cluster.table()).get(3)).toMatchObject({ worker: "w1", epoch: 1 });
    expect(cluster.placed()).toBe(true);
    expect((await cluster.events("w1")).filter((type) => type.startsWith("shard"))).toEqual(Array.from({ length: 8 }, () => "shard.assigned"));
    expect([lost, unread]).toEqual([1, 0]);
  });

  test("a leader whose lease was taken while it still trusts it is fenced by the journal's append and steps down", async () => {
    const { cluster, supervisor } = await running(["w1"]);
    const leaders = cluster.observer.bucket("LEADER");
    const standing = (await leaders.get("leader"))!;
    await leaders.delete("leader", standing.revision);
    const second = cluster.supervisor("s2");
    await cluster.until("the second leads", () => second.leader.role === "leading", 400);
    // The first one has not renewed since, and thinks that it leads.
    await cluster.until("the first steps down", () => supervisor.leader.role === "standby", 1_500);
    cluster.worker("w2");
    await cluster.until("balanced", () => cluster.balanced());
    expect(second.leader.role).toBe("leading");
  });
});

describe("leaving", () => {
  test("a worker that drains gives everything to the others and is recorded as left, not as dead", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [leaving] = workers;
    let done = false;
    void leaving!.member
      .drain()
      .then(() => leaving!.member.stop())
      .then(() => (done = true));
    await cluster.until("it has left", () => done, 3_000);
    cluster.workers.delete("w1");
    await cluster.until("the other owns everything", () => cluster.placed());
    expect(leaving!.host.history.filter((line) => line.startsWith("drop"))).toEqual([]);
    await cluster.world.advance(7_000);
    const events = await cluster.events("w1");
    expect(events.filter((type) => type.startsWith("state"))).toEqual([
      "state null→joining",
      "state joining→ready",
      "state ready→draining",
      "state draining→left",
    ]);
  });

  test("a draining worker waits for its running effects until the deadline, and hands over when they end before it", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [leaving] = workers;
    leaving!.host.busy = true;
    let done = false;
    void leaving!.member.drain({ deadline_ms: 30_000 }).then(() => (done = true));
    await cluster.world.advance(10_000);
    expect([done, leaving!.host.shards.size]).toEqual([false, 4]);
    leaving!.host.busy = false;
    await cluster.until("it has drained", () => done, 1_000);
    await cluster.until("the other owns everything", () => workers[1]!.host.shards.size === 8);
  });

  test("a drain ends at its deadline though effects run on", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [leaving] = workers;
    leaving!.host.busy = true;
    let done = false;
    void leaving!.member.drain({ deadline_ms: 3_000 }).then(() => (done = true));
    await cluster.until("it has drained", () => done, 3_500);
    await cluster.until("the other owns everything", () => workers[1]!.host.shards.size === 8);
  });

  test("a worker that is alone drains by releasing its shards to nobody, and the next worker gets them under higher epochs", async () => {
    const { cluster, workers } = await running(["w1"]);
    let done = false;
    void workers[0]!.member
      .drain()
      .then(() => workers[0]!.member.stop())
      .then(() => (done = true));
    await cluster.until("it has drained", () => done, 2_000);
    expect([...(await cluster.table()).values()].map(({ worker, epoch }) => [worker, epoch])).toEqual(Array.from({ length: 8 }, () => ["", 1]));
    cluster.workers.delete("w1");
    cluster.worker("w2");
    await cluster.until("placed again", () => cluster.placed());
    expect([...(await cluster.table()).values()].map(({ worker, epoch, from }) => [worker, epoch, from])).toEqual(
      Array.from({ length: 8 }, () => ["w2", 2, "w1"]),
    );
  });

  test("a worker that was cut off as it had drained, was recorded as left and is back, is another incarnation and ends again in order", async () => {
    const errors: string[] = [];
    const cluster = new Cluster();
    cluster.supervisor("s1", { log: { ...silentLog, error: (what) => void errors.push(what) } });
    const first = cluster.worker("w1");
    cluster.worker("w2");
    await cluster.until("all shards are placed evenly", () => cluster.balanced());
    await cluster.world.advance(6_000);
    const before = first.member.incarnation;
    void first.member.drain();
    await cluster.until("w2 has all", () => cluster.counts()["w2"] === 8);
    cluster.broker.cut(first.connection);
    await cluster.world.advance(10_000);
    expect((await cluster.events("w1")).at(-1)).toBe("state draining→left");
    cluster.broker.mend(first.connection);
    await cluster.world.advance(3_000);
    expect(first.member.incarnation).not.toBe(before);
    expect((await cluster.events("w1")).slice(-3)).toEqual(["state left→joining", "state joining→ready", "state ready→draining"]);
    await first.member.stop();
    await cluster.world.advance(1_000);
    expect((await cluster.events("w1")).at(-1)).toBe("state draining→left");
    expect(cluster.counts()).toEqual({ w1: 0, w2: 8 });
    expect(errors).toEqual([]);
  });

  test("two workers that drain at once both end", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    let done = 0;
    for (const { member } of workers) void member.drain().then(() => done++);
    await cluster.until("both have drained", () => done === 2, 2_000);
    expect(cluster.counts()).toEqual({ w1: 0, w2: 0 });
  });

  test("without any supervisor a drain waits two leases for one, and then releases", async () => {
    const { cluster, workers, supervisor } = await running(["w1", "w2"]);
    supervisor.kill();
    let done = false;
    void workers[0]!.member.drain().then(() => (done = true));
    await cluster.world.advance(10_000);
    expect([done, workers[0]!.host.shards.size]).toEqual([false, 4]);
    await cluster.until("it has drained", () => done, 3_000);
    cluster.supervisor("s2");
    await cluster.until("the other owns everything", () => workers[1]!.host.shards.size === 8);
  });

  test("M3: a shard that was left is not taken again under the same epoch, though its new owner died before it got it", async () => {
    const { cluster, workers } = await running(["w1"]);
    const [owner] = workers;
    owner!.host.busy = true;
    const second = cluster.worker("w2");
    await cluster.world.advance(2_000);
    second.kill();
    await cluster.world.advance(8_000);
    expect([...(await cluster.table()).values()].every((entry) => entry.moving_to === undefined)).toBe(true);
    owner!.host.busy = false;
    await cluster.until("four shards came back", () => owner!.host.history.length === 16);
    const takes = owner!.host.history.filter((line) => line.startsWith("take")).map((line) => line.split(" from")[0]);
    expect(new Set(takes).size).toBe(takes.length);
    expect(takes).toHaveLength(12);
  });

  test("a move that its owner does not end in time is ended by the leader, and the owner drops the shard", async () => {
    const cluster = new Cluster();
    cluster.supervisor("s1", { handover_deadline_ms: 2_000 });
    const stuck = cluster.worker("w1"); // waits for its effects a minute
    await cluster.until("placed", () => cluster.placed());
    stuck.host.busy = true;
    const second = cluster.worker("w2");
    await cluster.world.advance(5_000);
    expect(second.host.shards.size).toBe(0);
    await cluster.until("the leader moved them", () => second.host.shards.size === 4, 5_000);
    await cluster.until("the owner dropped them", () => cluster.placed(), 1_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
  });

  test("an operator's drain moves everything away and undrain brings shards back; both are answered, once", async () => {
    const { cluster } = await running(["w1", "w2"]);
    const replies: unknown[] = [];
    const inbox = cluster.observer.inbox();
    cluster.observer.subscribe(inbox, ({ data }) => void replies.push(decodeReply(data)));
    const say = (type: string, id = "w1") =>
      cluster.observer.publish(actorSubject(workerActor(id), "control"), new TextEncoder().encode(JSON.stringify({ type, body: {} })), {
        headers: { "Troupe-Reply-To": inbox },
      });
    await say("worker.drain");
    await cluster.until("everything is at w2", () => cluster.counts()["w2"] === 8 && cluster.placed());
    expect(cluster.counts()).toEqual({ w1: 0, w2: 8 });
    await say("worker.undrain");
    await cluster.until("balanced again", () => cluster.balanced());
    await say("worker.drain", "nobody");
    await say("worker.declare_dead");
    await cluster.world.advance(500);
    expect(replies).toMatchObject([
      { ok: true, actor: "system/worker/w1", state: "draining" },
      { ok: true, actor: "system/worker/w1", state: "ready" },
      { ok: false, error: { code: "not_found" } },
      { ok: false, error: { code: "invalid" } },
    ]);
    expect((await cluster.observer.bounds("COMMANDS")).messages).toBe(0);
  });

  test("a tenant cannot command a worker through a subject of its own", async () => {
    const { cluster } = await running(["w1", "w2"]);
    await cluster.observer.publish("tenant.acme.worker.w1.control", new TextEncoder().encode(JSON.stringify({ type: "worker.drain", body: {} })));
    await cluster.world.advance(3_000);
    expect(cluster.counts()).toEqual({ w1: 4, w2: 4 });
    expect((await cluster.observer.bounds("COMMANDS")).messages).toBe(0);
  });
});

describe("outages", () => {
  test("a broker that is away for 12 s costs nobody anything: the same owners go on under the same epochs", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const before = await cluster.table();
    const histories = workers.map(({ host }) => [...host.history]);
    void cluster.broker.restart(12_000);
    await cluster.world.advance(11_000);
    expect(workers.map(({ member }) => [member.phase, member.may_act()])).toEqual([
      ["cut_off", false],
      ["cut_off", false],
    ]);
    await cluster.world.advance(3_000);
    expect(workers.map(({ member }) => [member.phase, member.may_act()])).toEqual([
      ["present", true],
      ["present", true],
    ]);
    await cluster.world.advance(20_000);
    expect(await cluster.table()).toEqual(before);
    expect(workers.map(({ host }) => host.history)).toEqual(histories);
  });

  test("D3: nobody is judged by leases that could not be renewed: their bucket is away for 6 s while all else is there", async () => {
    let until_ms = 0;
    const now = { ms: (): number => 0 };
    const { cluster, workers } = await running(["w1", "w2"], {
      faults: {
        // As in an election of its own: renewals fail, and what is asked is answered when it is over.
        before: ({ kind, subject }) => {
          const left_ms = until_ms - now.ms();
          if (left_ms <= 0 || !subject.startsWith("$KV.WORKERS.")) return undefined;
          return kind === "bucket_write" ? { kind: "unavailable" } : kind === "bucket_read" ? { kind: "delay", ms: left_ms } : undefined;
        },
      },
    });
    now.ms = () => cluster.world.monotonic_ms();
    const before = await cluster.table();
    until_ms = now.ms() + 6_000;
    await cluster.world.advance(20_000);
    expect(workers.map(({ member }) => [member.phase, member.may_act()])).toEqual([
      ["present", true],
      ["present", true],
    ]);
    expect(await cluster.table()).toEqual(before);
    workers[0]!.kill();
    await cluster.until("the other owns everything", () => cluster.placed(), 10_000);
  });

  test("a worker that died during the outage is found one lease after it", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    void cluster.broker.restart(12_000);
    await cluster.world.advance(6_000);
    workers[0]!.kill();
    await cluster.world.advance(10_000);
    expect([...(await cluster.table()).values()].filter((entry) => entry.worker === "w1")).toHaveLength(4);
    await cluster.until("the other owns everything", () => cluster.placed(), 10_000);
  });

  test("a worker that alone is cut off loses its shards, holds its work while it may not act, and drops what went to others when it is back", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [lonely] = workers;
    cluster.broker.cut(lonely!.connection);
    await cluster.world.advance(9_000);
    expect([lonely!.member.may_act(), lonely!.host.shards.size]).toEqual([false, 4]);
    expect([...(await cluster.table()).values()].every((entry) => entry.worker === "w2")).toBe(true);
    cluster.broker.mend(lonely!.connection);
    await cluster.until("balanced again", () => cluster.balanced());
    expect(lonely!.host.history.filter((line) => line.startsWith("drop"))).toHaveLength(4);
  });

  test("M4: a worker that comes back reads the table itself: what went to others is dropped though its watch is deaf", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [lonely] = workers;
    lonely!.sleeper.deaf = true;
    cluster.broker.cut(lonely!.connection);
    await cluster.world.advance(9_000);
    cluster.broker.mend(lonely!.connection);
    await cluster.until("it may act again", () => lonely!.member.may_act());
    await cluster.world.settle();
    expect([...lonely!.host.shards.values()].filter(({ epoch }) => epoch === 1)).toEqual([]);
  });

  test("a worker that slept through its lease drops everything as it wakes, even with the bus away", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    const [slow] = workers;
    slow!.sleeper.asleep = true;
    await cluster.world.advance(10_000);
    cluster.broker.cut(slow!.connection);
    slow!.sleeper.deaf = true;
    slow!.sleeper.wake();
    await cluster.world.advance(500);
    expect([slow!.host.shards.size, slow!.member.phase]).toEqual([0, "joining"]);
  });

  test("a worker that is cut off for longer than its hold drops everything by itself", async () => {
    const { cluster, workers } = await running(["w1", "w2"]);
    cluster.broker.cut(workers[0]!.connection);
    await cluster.world.advance(40_000);
    expect([workers[0]!.host.shards.size, workers[0]!.member.phase]).toEqual([0, "joining"]);
  });
});

test("a fenced append asks the leader's table: still ours is ours, another's is dropped", async () => {
  const { cluster, workers } = await running(["w1", "w2"]);
  const [first] = workers;
  const shard = [...first!.host.shards.keys()][0]!;
  expect(await first!.member.on_conflict(shard, 1)).toBe("mine");
  const bucket = cluster.observer.bucket("PLACEMENT");
  const standing = (await bucket.get(String(shard)))!;
  const entry = (await cluster.table()).get(shard)!;
  const other = workers[1]!.member.incarnation;
  first!.sleeper.asleep = true; // it does not hear of it by itself
  await bucket.update(String(shard), new TextEncoder().encode(JSON.stringify({ ...entry, worker: "w2", incarnation: other, epoch: 2 })), standing.revision);
  expect(await first!.member.on_conflict(shard, 1)).toBe("lost");
  await cluster.world.settle();
  expect(first!.host.shards.has(shard)).toBe(false);
});
