// bus-words: the words in which the contract of the bus is tested: addresses, appends, commands, and the two grounds on which each promise is kept.
// Every test has a tenant of its own, so that all of a file share one broker.
import { setTimeout as sleep } from "node:timers/promises";
import type { AppendOutcome, Bus, InboxSpec, StoredMessage } from "../../bus/port.ts";
import type { ActorAddress } from "../../protocol/ids.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { type Ground, jetStreamGround, memoryGround } from "./bus-grounds.ts";

export const bytes = (text: string): Uint8Array => new TextEncoder().encode(text);
export const text = (data: Uint8Array): string => new TextDecoder().decode(data);
let tenants = 0;
export const newTenant = (): string => `t${(tenants += 1)}`;
export const session = (tenant: string, id: string): ActorAddress => ({ tenant, kind: "session", id });
export const journal = (tenant: string, id = "s1"): string => actorSubject(session(tenant, id), "event");

let commits = 0;
export const append = (bus: Bus, subject: string, expected: number, data = "x", commit_id = `test.${(commits += 1)}`): Promise<AppendOutcome> =>
  bus.append({ subject, data: bytes(data), expected_last_sequence: expected, commit_id });

export async function committed(outcome: Promise<AppendOutcome>): Promise<number> {
  const is = await outcome;
  if (is.kind !== "committed") throw new Error(`not committed: ${JSON.stringify(is)}`);
  return is.sequence;
}

export async function collect(messages: AsyncIterable<StoredMessage>): Promise<StoredMessage[]> {
  const all: StoredMessage[] = [];
  for await (const message of messages) all.push(message);
  return all;
}

/** Waits until it holds, or fails with what was seen last. */
export async function eventually<T>(look: () => T | Promise<T>, holds: (seen: T) => boolean, patience_ms = 20_000): Promise<T> {
  const give_up_at = Date.now() + patience_ms;
  for (;;) {
    const seen = await look();
    if (holds(seen)) return seen;
    if (Date.now() > give_up_at) throw new Error(`not in time; seen last: ${JSON.stringify(seen)}`);
    await sleep(5);
  }
}

/** The inbox of one tenant, so that tests do not share one. */
export const inboxOf = (tenant: string, shard = "*"): InboxSpec => ({
  stream: "COMMANDS",
  durable: `inbox-${tenant}`,
  filters: [`shard.${shard}.tenant.${tenant}.session.*.*`],
});

export async function command(bus: Bus, tenant: string, body: string, id = "s1"): Promise<number> {
  const outcome = await bus.publish(actorSubject(session(tenant, id), "command"), bytes(body));
  if (outcome.kind !== "stored") throw new Error(`not stored: ${JSON.stringify(outcome)}`);
  return outcome.sequence;
}

export const grounds: [string, () => Promise<Ground>][] = [
  ["memory", memoryGround],
  ["jetstream", jetStreamGround],
];

export async function openGround(make: () => Promise<Ground>): Promise<{ ground: Ground; bus: Bus }> {
  const ground = await make();
  return { ground, bus: await ground.connect("main") };
}
