// chaos-load: the services whose work must survive. Each lane holds one session after another: it creates it, listens to it, says a message,
// waits for the turn to end, says the next one. Lanes speak over NATS (as a tenant, with an older client), over HTTP, or as a process of ours,
// and repeat a command under its key until it is acknowledged. What was acknowledged is written down: the audit asks the journal for each.
//
//   lane:  create ──acknowledged──▶ say ──acknowledged──▶ turn ends ──▶ say … TURNS_PER_SESSION ──▶ the next session
//
// Beside them some sessions that no model works for are paused and resumed without a pause: how long their acknowledgements take is what
// a neighbour feels.
import { randomUUID } from "node:crypto";
import { connect, headers, type NatsConnection } from "nats";
import type { JsonObject } from "../protocol/json.ts";
import { type Ear, type EarRecord, type EarToken, openEar } from "./chaos-ear.ts";
import { AGENT, type Ground, now, TENANT, wait, type Wish } from "./chaos-ground.ts";

export type Way = "nats" | "http" | "client";
const WAYS: readonly Way[] = ["nats", "http", "client"];
const TURNS_PER_SESSION = 4;
/** Between repeats of a command that was not acknowledged. */
const REPEAT_MS = 100;
const ACK_PATIENCE_MS = 10_000;

export interface Acknowledged {
  readonly session: string;
  readonly key: string;
  readonly way: Way;
  readonly at_ms: number;
  /** The command was decided, not only stored: nothing may still be waiting. */
  readonly decided: boolean;
}

/** How long a command of a quiet session took from its first sending to its acknowledgement. */
export interface AckTime {
  readonly at_ms: number;
  readonly ms: number;
}

export interface LoadOptions {
  readonly lanes: number;
  /** Sessions that are only paused and resumed. Default 4. */
  readonly quiet?: number;
  /** Between two commands of one quiet session. Default 100. */
  readonly quiet_every_ms?: number;
  readonly wish: Omit<Wish, "tag" | "tool">;
  /** Every so many turns use a tool; 0 for none. Default 3. */
  readonly tool_every?: number;
}

export interface Load {
  readonly acknowledged: readonly Acknowledged[];
  readonly ack_times: readonly AckTime[];
  /** Times commands were answered with this instead of being taken. */
  readonly refusals: ReadonlyMap<string, number>;
  readonly ears: readonly EarRecord[];
  turns_ended(): number;
  /** Sessions of the lanes that are waiting for a turn to end, and since when. */
  waiting(): { session: string; tag: string; since_ms: number }[];
  onToken(listener: (token: EarToken) => void): () => void;
  onEvent(listener: (session: string, type: string, data: Readonly<Record<string, unknown>>, at_ms: number) => void): () => void;
  /** Says one more command as a service and writes it down; answers `acknowledged`, or how it was refused. */
  say(way: Way, session: string, type: string, body: JsonObject, key: string): Promise<string>;
  /** No new turns; resolves when those that run have ended, and answers what has not within the patience. */
  finish(patience_ms: number): Promise<string[]>;
  stop(): Promise<void>;
}

let loads = 0;

export async function startLoad(ground: Ground, options: LoadOptions): Promise<Load> {
  const { wish, tool_every = 3, quiet = 4, quiet_every_ms = 100 } = options;
  // Sessions of one load never meet those of another on the same ground.
  const load_id = ++loads;
  const acknowledged: Acknowledged[] = [];
  const ack_times: AckTime[] = [];
  const refusals = new Map<string, number>();
  const ears: Ear[] = [];
  const records: EarRecord[] = [];
  const token_listeners = new Set<(token: EarToken) => void>();
  const event_listeners = new Set<(session: string, type: string, data: Readonly<Record<string, unknown>>, at_ms: number) => void>();
  const waiting = new Map<string, { session: string; tag: string; since_ms: number }>();
  let turns_ended = 0;
  let finishing = false;
  let stopped = false;
  const service: NatsConnection = await connect({
    servers: ground.brokers.nodes.map((node) => node.url),
    user: `tenant-${TENANT}`,
    pass: ground.password,
    inboxPrefix: `_INBOX_${TENANT}`,
    maxReconnectAttempts: -1,
    reconnectTimeWait: 100,
    reconnectJitter: 50,
    pingInterval: 5_000,
  });
  const jetstream = service.jetstream({ timeout: 3_000 });

  function refused(way: Way, code: string): string {
    refusals.set(`${way} ${code}`, (refusals.get(`${way} ${code}`) ?? 0) + 1);
    return code;
  }

  async function sayOnce(way: Way, session: string, type: string, body: JsonObject, key: string): Promise<string> {
    if (way === "nats") {
      const head = headers();
      head.set("Idempotency-Key", key);
      try {
        await jetstream.publish(`tenant.${TENANT}.session.${session}.command`, JSON.stringify({ type, body }), { headers: head });
      } catch (error) {
        return refused(way, error instanceof Error ? error.message.slice(0, 60) : "?");
      }
      acknowledged.push({ session, key, way, at_ms: now(), decided: false });
      return "acknowledged";
    }
    if (way === "client") {
      const outcome = await ground.client.command({ tenant: TENANT, kind: "session", id: session }, { type, body, key }, { patience_ms: ACK_PATIENCE_MS });
      const error = outcome.kind === "refused" ? outcome.error : outcome.reply.ok ? undefined : outcome.reply.error;
      const stored = outcome.kind === "refused" && (outcome.error.details as { accepted?: boolean } | undefined)?.accepted === true;
      if (error !== undefined && !stored) return refused(way, error.code);
      acknowledged.push({ session, key, way, at_ms: now(), decided: error === undefined });
      return "acknowledged";
    }
    const [path, json] =
      type === "session.create"
        ? ["/v1/sessions", { id: session, ...body }]
        : type === "message.send"
          ? [`/v1/sessions/${session}/messages`, body]
          : [`/v1/sessions/${session}/${type.slice("session.".length)}`, body];
    const url = ground.gateway_urls[Math.floor(Math.random() * ground.gateway_urls.length)]!;
    try {
      const answer = await fetch(`${url}${path}`, {
        method: "POST",
        headers: { authorization: `Bearer ${ground.key}`, "content-type": "application/json", "idempotency-key": key },
        body: JSON.stringify(json),
        signal: AbortSignal.timeout(ACK_PATIENCE_MS),
      });
      const text = await answer.text();
      if (!answer.ok) return refused(way, `${answer.status} ${(JSON.parse(text) as { code?: string }).code ?? ""}`);
    } catch (error) {
      return refused(way, error instanceof Error ? error.name : "?");
    }
    acknowledged.push({ session, key, way, at_ms: now(), decided: true });
    return "acknowledged";
  }

  /** Under one key until it is taken. */
  async function say(way: Way, session: string, type: string, body: JsonObject, key: string): Promise<void> {
    while (!stopped && (await sayOnce(way, session, type, body, key)) !== "acknowledged") await wait(REPEAT_MS);
  }

  function listen(session: string): { ended(turn_tag: string): Promise<void>; ear: Ear } {
    let end: (() => void) | undefined;
    const ear = openEar({
      session,
      urls: ground.gateway_urls,
      key: ground.key,
      on_event(type, data, at_ms) {
        for (const listener of [...event_listeners]) listener(session, type, data, at_ms);
        if (type === "turn.completed" || type === "turn.failed" || type === "turn.cancelled") {
          turns_ended += 1;
          waiting.delete(session);
          end?.();
        }
      },
      on_token(token) {
        for (const listener of [...token_listeners]) listener(token);
      },
    });
    ears.push(ear);
    records.push(ear.record);
    return {
      ear,
      ended: (tag) => {
        waiting.set(session, { session, tag, since_ms: now() });
        return new Promise((resolve) => (end = resolve));
      },
    };
  }

  async function lane(index: number): Promise<void> {
    const way = WAYS[index % WAYS.length]!;
    for (let generation = 0; !finishing && !stopped; generation++) {
      // With a part that is drawn, as real ids have: the broker's partition puts names that only count upwards onto few shards.
      const session = `l${load_id}-${index}-${generation}-${randomUUID().slice(0, 8)}`;
      await say(way, session, "session.create", { agent: AGENT }, `${session}-create`);
      const { ear, ended } = listen(session);
      for (let turn = 0; turn < TURNS_PER_SESSION && !finishing && !stopped; turn++) {
        const tag = `${session}/${turn}`;
        const tool = tool_every > 0 && (index + turn) % tool_every === 0;
        const over = ended(tag);
        await say(way, session, "message.send", { content: JSON.stringify({ ...wish, tag, tool }) }, `${session}-${turn}`);
        await over;
      }
      // The last events of the last turn may still be on their way to it.
      setTimeout(() => ear.close(), 2_000);
    }
  }

  async function quietSession(index: number): Promise<void> {
    const way: Way = index % 2 === 0 ? "http" : "client";
    const session = `q${load_id}-${index}`;
    await say(way, session, "session.create", { agent: AGENT }, `${session}-create`);
    for (let count = 0; !finishing && !stopped; count++) {
      const began_ms = now();
      await say(way, session, count % 2 === 0 ? "session.pause" : "session.resume", {}, `${session}-${count}`);
      ack_times.push({ at_ms: began_ms, ms: now() - began_ms });
      await wait(quiet_every_ms);
    }
  }

  const faults: unknown[] = [];
  const running = [
    ...Array.from({ length: options.lanes }, (_, index) => lane(index)),
    ...Array.from({ length: quiet }, (_, index) => quietSession(index)),
  ].map((work) => work.catch((error: unknown) => void faults.push(error)));

  return {
    acknowledged,
    ack_times,
    refusals,
    ears: records,
    turns_ended: () => turns_ended,
    waiting: () => [...waiting.values()],
    onToken(listener) {
      token_listeners.add(listener);
      return () => void token_listeners.delete(listener);
    },
    onEvent(listener) {
      event_listeners.add(listener);
      return () => void event_listeners.delete(listener);
    },
    say: sayOnce,
    async finish(patience_ms) {
      finishing = true;
      const late = wait(patience_ms).then(() => "late" as const);
      await Promise.race([Promise.all(running), late]);
      if (faults.length > 0) throw faults[0];
      return [...waiting.values()].map(({ session, tag, since_ms }) => `${session}: the turn of ${tag} has not ended after ${Math.round(now() - since_ms)} ms`);
    },
    async stop() {
      stopped = true;
      // What ears were given last must be whole before they are held against the journal.
      await wait(500);
      for (const ear of ears) ear.close();
      await service.close();
    },
  };
}
