// client: says a command to an actor from a process of ours, and waits for what becomes of it.
//
//   fast lane: a core request to the shard's owner ──answer──▶ decided (one append)
//        │ nobody there, or no answer in time
//        ▼
//   durable: the same command, under the same key, on the actor's own subject ──answer──▶ decided, once, whichever came first
//
// A sender that gave no key gets one made here, so that the two ways are one command. What the fast lane took is journaled, and its durable
// twin is recognised; what it did not answer is either nowhere or will be recognised.
//
// Invariants:
//   W1. Once a command is durable, only a yes of the fast lane still counts: its no may be followed by the yes of the durable twin.
import type { Bus } from "../bus/port.ts";
import { AUTOMATIC_KEY_PREFIX, HEADER_IDEMPOTENCY_KEY, HEADER_PRINCIPAL, HEADER_REPLY_TO, HEADER_SUBJECT, HEADER_TRACEPARENT } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { COMMAND_BYTES_MAX } from "../protocol/limits.ts";
import { decodeReply, FAST_REPLY_SUFFIX, type Reply } from "../protocol/reply.ts";
import { actorSubject, type CommandChannel, fastLaneSubject, SHARDED_KINDS, shardOf } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";

export type CommandOutcome =
  | { readonly kind: "decided"; readonly reply: Reply }
  /** It did not get that far. With `details.accepted: true` it is stored and will be decided; only the answer did not come in time. */
  | { readonly kind: "refused"; readonly error: ErrorBody };

export interface CommandRequest {
  readonly type: string;
  readonly body: JsonObject;
  readonly key?: string | undefined;
  readonly trace?: string | undefined;
  readonly channel?: CommandChannel;
  /** In whose name (protocol/principal.ts). */
  readonly principal?: string | undefined;
}

export interface CommandClient {
  command(actor: ActorAddress, request: CommandRequest, options?: { patience_ms?: number }): Promise<CommandOutcome>;
  stop(): Promise<void>;
}

/** Longer than a take-over, shorter than a person's patience. */
const PATIENCE_MS = 10_000;

/** How long the owner gets before the command is made durable beside it: several appends' time, a fraction of a take-over's. */
const FAST_PATIENCE_MS = 250;

/**
 * `fast_lane: false` makes every command durable first: for callers that wait long, and for tests of that way.
 * `principal`: in whose name is spoken where a request names nobody.
 */
export function createCommandClient({
  bus,
  world,
  fast_lane = true,
  principal: own,
}: {
  bus: Bus;
  world: World;
  fast_lane?: boolean;
  principal?: string;
}): CommandClient {
  const nonce = world.id();
  // One subscription for all answers; the last token tells whose it is.
  const inbox = bus.inbox();
  const waiting = new Map<string, { settle(reply: Reply): void; durable: boolean }>();
  /** Ends the wait on the fast lane, by token. */
  const unowned = new Map<string, () => void>();
  let count = 0;
  const subscription = bus.subscribe(`${inbox}.*`, (message) => {
    const fast = message.subject.endsWith(FAST_REPLY_SUFFIX);
    const token = message.subject.slice(inbox.length + 1, fast ? -FAST_REPLY_SUFFIX.length : undefined);
    // Empty is the broker's word that nobody listens on the fast lane.
    if (message.data.byteLength === 0) return unowned.get(token)?.();
    const asked = waiting.get(token);
    const reply = asked === undefined ? undefined : decodeReply(message.data);
    if (asked === undefined || reply === undefined || (fast && asked.durable && !reply.ok)) return; // W1
    asked.settle(reply);
  });

  /** Asks the owner. Resolves when it answered, when nobody is there, or when it is time to make the command durable. */
  function fastLane(actor: ActorAddress, subject: string, data: Uint8Array, headers: Record<string, string>, token: string, reply: string): Promise<void> {
    return new Promise((resolve) => {
      const go_on = (): void => {
        cancel();
        unowned.delete(token);
        resolve();
      };
      const cancel = world.after(FAST_PATIENCE_MS, go_on);
      unowned.set(token, go_on);
      bus.send(fastLaneSubject(shardOf(actor, bus.shards)), data, { headers: { ...headers, [HEADER_SUBJECT]: subject }, reply });
    });
  }

  return {
    async command(actor, { type, body, key, trace, channel = "command", principal = own }, { patience_ms = PATIENCE_MS } = {}) {
      const data = new TextEncoder().encode(JSON.stringify({ type, body }));
      if (data.byteLength > COMMAND_BYTES_MAX)
        return {
          kind: "refused",
          error: errorBody("too_large", `a command is at most ${COMMAND_BYTES_MAX} bytes`, { bytes: data.byteLength, bytes_max: COMMAND_BYTES_MAX }),
        };
      const token = (count++).toString(36);
      let got: Reply | undefined;
      const answered = new Promise<Reply | undefined>((resolve) => {
        const cancel = world.after(patience_ms, () => settle(undefined));
        const settle = (reply: Reply | undefined): void => {
          cancel();
          waiting.delete(token);
          got = reply;
          unowned.get(token)?.();
          resolve(reply);
        };
        waiting.set(token, { settle, durable: false });
      });
      const reply_to = `${inbox}.${token}`;
      const subject = actorSubject(actor, channel);
      const headers = {
        [HEADER_IDEMPOTENCY_KEY]: key ?? `${AUTOMATIC_KEY_PREFIX}${nonce}.${token}`,
        ...(trace === undefined ? {} : { [HEADER_TRACEPARENT]: trace }),
        ...(principal === undefined ? {} : { [HEADER_PRINCIPAL]: principal }),
      };
      if (fast_lane && (SHARDED_KINDS as readonly string[]).includes(actor.kind))
        await fastLane(actor, subject, data, headers, token, `${reply_to}${FAST_REPLY_SUFFIX}`);
      if (got !== undefined) return { kind: "decided", reply: got };

      const asked = waiting.get(token);
      if (asked !== undefined) asked.durable = true;
      const published = await bus.publish(subject, data, { headers: { ...headers, [HEADER_REPLY_TO]: reply_to }, patience_ms });
      const refuse = (error: ErrorBody): CommandOutcome => {
        waiting.get(token)?.settle({ ok: false, actor: "", error });
        return { kind: "refused", error };
      };
      if (published.kind === "overloaded") return refuse(errorBody("overloaded", "too many commands wait", { retry_after_ms: 1000 }));
      if (published.kind === "too_large") return refuse(errorBody("too_large", "the broker refuses a message of this size"));
      if (published.kind === "conflict") return refuse(errorBody("internal", "a command carries no expectation"));
      // Unavailable: it may have been stored all the same, so the answer is still waited for.
      const reply = await answered;
      if (reply !== undefined) return { kind: "decided", reply };
      const accepted = published.kind === "stored";
      const message = accepted ? "it is stored and will be decided; the answer did not come in time" : "the bus cannot take it now";
      return { kind: "refused", error: errorBody("unavailable", message, { accepted, retry_after_ms: 1000 }) };
    },
    async stop() {
      await subscription.stop();
    },
  };
}
