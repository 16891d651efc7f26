// client: says a command to an actor from a process of ours, and waits for what becomes of it.
import type { Bus } from "../bus/port.ts";
import { HEADER_IDEMPOTENCY_KEY, HEADER_REPLY_TO, HEADER_TRACEPARENT } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { ActorAddress } from "../protocol/ids.ts";
import type { JsonObject } from "../protocol/json.ts";
import { COMMAND_BYTES_MAX } from "../protocol/limits.ts";
import { decodeReply, type Reply } from "../protocol/reply.ts";
import { actorSubject, type CommandChannel } from "../protocol/subjects.ts";
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
}

export interface CommandClient {
  command(actor: ActorAddress, request: CommandRequest, options?: { patience_ms?: number }): Promise<CommandOutcome>;
  stop(): Promise<void>;
}

/** Longer than a take-over, shorter than a person's patience. */
const PATIENCE_MS = 10_000;

export function createCommandClient({ bus, world }: { bus: Bus; world: World }): CommandClient {
  // One subscription for all answers; the last token tells whose it is.
  const inbox = bus.inbox();
  const waiting = new Map<string, (reply: Reply) => void>();
  let count = 0;
  const subscription = bus.subscribe(`${inbox}.*`, (message) => {
    const token = message.subject.slice(inbox.length + 1);
    const resolve = waiting.get(token);
    waiting.delete(token);
    resolve?.(decodeReply(message.data));
  });

  return {
    async command(actor, { type, body, key, trace, channel = "command" }, { patience_ms = PATIENCE_MS } = {}) {
      const data = new TextEncoder().encode(JSON.stringify({ type, body }));
      if (data.byteLength > COMMAND_BYTES_MAX) return { kind: "refused", error: errorBody("too_large", `a command is at most ${COMMAND_BYTES_MAX} bytes`, { bytes: data.byteLength, bytes_max: COMMAND_BYTES_MAX }) };
      const token = (count++).toString(36);
      const answered = new Promise<Reply | undefined>((resolve) => {
        const cancel = world.after(patience_ms, () => {
          waiting.delete(token);
          resolve(undefined);
        });
        waiting.set(token, (reply) => {
          cancel();
          resolve(reply);
        });
      });
      const headers = {
        [HEADER_REPLY_TO]: `${inbox}.${token}`,
        ...(key === undefined ? {} : { [HEADER_IDEMPOTENCY_KEY]: key }),
        ...(trace === undefined ? {} : { [HEADER_TRACEPARENT]: trace }),
      };
      const published = await bus.publish(actorSubject(actor, channel), data, { headers, patience_ms });
      const refuse = (error: ErrorBody): CommandOutcome => {
        waiting.get(token)?.({ ok: false, actor: "", error });
        waiting.delete(token);
        return { kind: "refused", error };
      };
      if (published.kind === "overloaded") return refuse(errorBody("overloaded", "too many commands wait", { retry_after_ms: 1000 }));
      if (published.kind === "too_large") return refuse(errorBody("too_large", "the broker refuses a message of this size"));
      if (published.kind === "conflict") return refuse(errorBody("internal", "a command carries no expectation"));
      // Unavailable: it may have been stored all the same, so the answer is still waited for.
      const reply = await answered;
      if (reply !== undefined) return { kind: "decided", reply };
      const accepted = published.kind === "stored";
      return { kind: "refused", error: errorBody("unavailable", accepted ? "it is stored and will be decided; the answer did not come in time" : "the bus cannot take it now", { accepted, retry_after_ms: 1000 }) };
    },
    async stop() {
      await subscription.stop();
    },
  };
}
