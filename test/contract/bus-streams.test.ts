// Goal:   the streams on a real broker are what this version declares, or the start says by name what differs; and what somebody else takes from an
//         inbox is missed.
// Method: real nats-servers, each with a fault of its own.
import { describe, expect, test } from "vitest";
import { auditSubstrate, connectJetStream, ensureStreams } from "../../bus/jetstream.ts";
import { silentLog } from "../../protocol/log.ts";
import { realWorld, SHARDS } from "./bus-grounds.ts";
import { bytes, command, eventually, inboxOf, text } from "./bus-words.ts";
import { startNatsServer } from "./nats-server.ts";

describe("streams on a real broker", () => {
  const options = { name: "tool", shards: SHARDS, replicas: 1, log: silentLog, world: realWorld };

  test("another number of shards is refused by name, another limit is migrated, and the audit names what differs", async () => {
    const server = await startNatsServer();
    try {
      const first = await connectJetStream({ ...options, servers: server.url });
      expect(await auditSubstrate(first, { monitor_url: server.monitor_url })).toEqual([]);
      await expect(connectJetStream({ ...options, shards: 32, servers: server.url })).rejects.toThrow(/COMMANDS: shards .*have 16, want 32/);
      const looking = await connectJetStream({ ...options, shards: 32, commands_bytes_max: 5_000_000, servers: server.url, ensure: false });
      const findings = await auditSubstrate(looking, { monitor_url: server.monitor_url });
      expect(findings.map(({ level, what }) => `${level} ${what}`).sort()).toEqual([
        "refuse stream COMMANDS: subject_transform",
        "refuse stream TIMERS: subject_transform",
        "warn stream COMMANDS: max_bytes",
      ]);
      const migrated = await connectJetStream({ ...options, commands_bytes_max: 5_000_000, servers: server.url });
      expect(await auditSubstrate(migrated, { monitor_url: server.monitor_url })).toEqual([]);
      expect(await ensureStreams(migrated)).toMatchObject({ created: [], updated: [] });
      expect((await ensureStreams(first)).updated).toEqual(["COMMANDS"]);
      for (const bus of [first, looking, migrated]) await bus.close();
    } finally {
      await server.stop();
    }
  });

  test("the audit refuses a broker that does not sync each write or takes too small messages, and warns where it cannot look", async () => {
    const server = await startNatsServer({ sync: false, max_payload: "2MB" });
    try {
      const bus = await connectJetStream({ ...options, servers: server.url });
      const findings = await auditSubstrate(bus, { monitor_url: server.monitor_url });
      expect(findings.map(({ level, what, have }) => [level, what, have])).toEqual([
        ["refuse", "max_payload", String(2 * 1024 * 1024)],
        ["refuse", "sync_interval", "120 s"],
      ]);
      expect((await auditSubstrate(bus)).map(({ level, what }) => [level, what])).toContainEqual(["warn", "sync_interval"]);
      await bus.close();
    } finally {
      await server.stop();
    }
  });

  test.each([
    ["last", "with the next heartbeat", 2],
    ["middle", "with the next delivery", 3],
  ])("the %s message, taken from the inbox by somebody else, is missed %s, and all comes again in order", async (_which, _when, count) => {
    const server = await startNatsServer();
    try {
      const bus = await connectJetStream({ ...options, servers: server.url });
      const told: string[] = [];
      const spec = inboxOf("acme");
      const subscription = await bus.consume(spec, {
        on_delivery: ({ message }) => void told.push(text(message.data)),
        on_reset: () => void told.push("reset"),
      });
      const stolen: string[] = [];
      const thief = bus.inbox();
      bus.subscribe(thief, ({ data }) => void (data.length > 0 && stolen.push(text(data))));
      bus.send(`$JS.API.CONSUMER.MSG.NEXT.COMMANDS.${spec.durable}`, bytes(JSON.stringify({ batch: 1, expires: 5_000_000_000 })), { reply: thief });
      await bus.flush();
      const all = Array.from({ length: count }, (_, index) => `c${index}`);
      for (const body of all) await command(bus, "acme", body);
      await eventually(
        () => told.slice(told.indexOf("reset")).length,
        (length) => told.includes("reset") && length > count,
        3_000,
      );
      expect(stolen).toEqual(["c1"]);
      expect(told.slice(told.indexOf("reset"))).toEqual(["reset", ...all]);
      await subscription.stop();
      await bus.close();
    } finally {
      await server.stop();
    }
  });

  test("a broker that is not there is a rejection that names it", async () => {
    await expect(connectJetStream({ ...options, servers: "nats://127.0.0.1:1", first_connection_patience_ms: 200 })).rejects.toThrow(
      "cannot connect to NATS at nats://127.0.0.1:1 as 'tool'",
    );
  });
});
