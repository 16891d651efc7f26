// record: `npm run record` writes journals of the present machine versions into test/replay/, one file per actor, a journal message a line. Done once
// for each released version; what is recorded is never recorded again under the same name.
import { writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { createCommandClient } from "../../actors/client.ts";
import { EffectFailure, type EffectScope, type Performers } from "../../actors/performer.ts";
import type { ShardHost } from "../../actors/shard-host.ts";
import { createMemoryBroker } from "../../bus/memory.ts";
import { type ActorAddress, tenantActor } from "../../protocol/ids.ts";
import type { JsonObject } from "../../protocol/json.ts";
import { pause } from "../../protocol/world.ts";
import { cores } from "../../state-machines/kinds.ts";
import { plainHost } from "../harness/plain-host.ts";
import { VirtualWorld } from "../simulation/virtual-world.ts";

const world = new VirtualWorld(7);
const broker = createMemoryBroker({ world, shards: 1 });
const observer = broker.connect("observer");
const client = createCommandClient({ bus: observer, world });
let fails = false;
const performers: Performers = {
  load_configuration: (async () => ({
    config: { model: "simulated/echo", instructions: "be brief", tools: ["now", "wait_ms"], mode: "multi", max_loops: 4 },
    hash: "a".repeat(64),
    agent_version: 1,
  })) as never,
  call_model: (async ({ step }: { step: number }, scope: EffectScope) => {
    await pause(world, 50);
    if (fails) throw new EffectFailure("overloaded", "too much to do", { usage: null });
    const tool_calls = step === 0 ? [{ id: "c0", name: "now", args: {} }] : [];
    const usage = { input_tokens: 5, output_tokens: 3, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
    return {
      text: "an answer that is long enough to be shared with its event",
      tool_calls,
      stop: "end",
      usage,
      model: "simulated/echo",
      attempt: scope.attempt,
      cost_usd_micros: 35,
      price_version: "t",
    };
  }) as never,
  call_tool: (async () => ({ text: "2026-01-01T00:00:00.000Z", is_error: false })) as never,
};
const begin = async (name: string, epoch: number, from: string | null): Promise<ShardHost> => {
  const host = plainHost({ bus: broker.connect(name), world, name, performers });
  const taken = host.take(0, epoch, { worker: from, reason: from === null ? "first" : `${from} was declared dead` });
  await world.advance(500);
  await taken;
  return host;
};
const say = async (actor: ActorAddress, type: string, body: JsonObject, channel: "command" | "control" = "command"): Promise<void> => {
  let done = false;
  void client.command(actor, { type, body, channel }).then(() => (done = true));
  await world.until(() => done, 20_000);
};
const session: ActorAddress = { tenant: "acme", kind: "session", id: "s1" };

await begin("w1", 1, null);
await say(tenantActor("acme"), "tenant.create", { name: "Acme" }, "control");
await say(tenantActor("acme"), "agent.put", { agent: "a", config: { model: "simulated/echo" } }, "control");
await say(tenantActor("acme"), "key.create", { key_id: "k1", hash: "b".repeat(64) }, "control");
await say(tenantActor("acme"), "key.revoke", { key_id: "k1" }, "control");
await say(session, "session.create", { agent: "a", user: "u1" });
await world.advance(1_000);
await say(session, "message.send", { content: "with a tool" });
await world.advance(1_000);
await say(session, "message.send", { content: "to be cancelled" });
await say(session, "turn.cancel", { reason: "changed my mind" });
await say(session, "session.pause", {});
await say(session, "message.send", { content: "waits" });
await say(session, "session.resume", {});
broker.kill("w1");
await begin("w2", 2, "w1");
await world.advance(2_000);
fails = true;
await say(session, "message.send", { content: "fails" });
await world.advance(1_000);
await say(session, "approval.decide", {});
await say(session, "session.hibernate", {});
await say(session, "session.terminate", { reason: "enough" });
await world.advance(1_000);

for (const actor of [session, tenantActor("acme")]) {
  const lines: string[] = [];
  for await (const stored of observer.read("EVENTS", `tenant.${actor.tenant}.${actor.kind}.${actor.id}.event`, 1))
    lines.push(new TextDecoder().decode(stored.data));
  const core = cores[actor.kind as "session" | "tenant"];
  const file = fileURLToPath(new URL(`./${core.machine_name.replace("@", "-")}.jsonl`, import.meta.url));
  writeFileSync(file, `${lines.join("\n")}\n`);
  console.log(`${file}: ${lines.length} commits`);
}
process.exit(0);
