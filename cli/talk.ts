// talk: send, chat and tail: the commands with which a person speaks to a session and listens to it.
import { createInterface } from "node:readline";
import type { Writable } from "node:stream";
import type { ActorFilter } from "../actors/verify.ts";
import type { StoredMessage, Subscription } from "../bus/port.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { type ActorAddress, actorPath } from "../protocol/ids.ts";
import { type ActorEvent, decodeJournal } from "../protocol/journal.ts";
import type { JsonObject } from "../protocol/json.ts";
import type { Priority } from "../protocol/priority.ts";
import type { SessionParent } from "../protocol/session-parent.ts";
import { actorSubject, parseActorSubject } from "../protocol/subjects.ts";
import { decodeToken, type TokenChunk } from "../protocol/tokens.ts";
import { pause } from "../protocol/world.ts";
import { type Context, Unreachable } from "./context.ts";
import { createGatewayClient, type GatewayClient } from "./gateway-client.ts";
import { EXIT } from "./ports.ts";
import { plain, type Printer } from "./printer.ts";
import type { ServerEvent } from "./sse.ts";
import { createTurnText, type TurnText } from "./turn-text.ts";

const TURN_ENDS = new Set(["turn.completed", "turn.failed", "turn.cancelled"]);

/** Text as it comes on the terminal; where nobody looks, only what is finished. */
function createSpeech(printer: Printer): { readonly text: TurnText; flush(): void } {
  let open = "";
  // A pipe cannot take back what it has given: it gets each turn's text when the turn is over (see `flush`).
  const direct = printer.terminal;
  const flush = (): void => {
    if (open !== "") printer.line(direct ? "" : plain(open, true));
    open = "";
  };
  const text = createTurnText({
    began: flush,
    text(piece) {
      open += piece;
      if (direct) printer.text(plain(piece, true));
    },
    voided(why) {
      open = "";
      if (direct) printer.line(`\n${printer.style("yellow", `⟲ void: ${plain(why)}; it begins again`)}`);
    },
  });
  return { text, flush };
}

// ── send ───────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface SendOptions {
  readonly agent?: string;
  readonly onBusy?: "enqueue" | "reject" | "interrupt";
  readonly priority?: Priority;
  readonly after?: readonly SessionParent[];
  readonly key?: string;
  readonly wait?: boolean;
  readonly patience?: number;
}

export async function send(context: Context, options: SendOptions, session: ActorAddress, text: string): Promise<number> {
  const { printer } = context;
  const bus = await context.bus();
  const commands = await context.commands();
  const patience = { patience_ms: (options.patience ?? 10) * 1000 };
  if (options.agent !== undefined) {
    const created = await commands.command(session, { type: "session.create", body: { agent: options.agent } }, patience);
    const error = created.kind === "refused" ? created.error : created.reply.ok ? undefined : created.reply.error;
    // It exists with other words of its creation: that it exists is all that was asked for.
    if (error !== undefined && error.code !== "conflict") throw new TroupeError(error);
  }
  // A repeat of a key may find its turn over: then it is shown from the journal.
  const begin = options.wait
    ? { events: options.key === undefined ? (await bus.bounds("EVENTS")).last_sequence + 1 : 1, tokens: (await bus.bounds("TOKENS")).last_sequence + 1 }
    : undefined;
  const { onBusy, priority, after } = options;
  const body: JsonObject = {
    content: text,
    ...(onBusy === undefined ? {} : { on_busy: onBusy }),
    ...(priority === undefined ? {} : { priority }),
    ...(after === undefined ? {} : { after: after.map((parent) => ({ ...parent })) }),
  };
  const sent = await commands.command(session, { type: "message.send", body, key: options.key }, patience);
  if (sent.kind === "refused") throw new TroupeError(sent.error);
  const { reply } = sent;
  if (!reply.ok) throw new TroupeError(reply.error);
  if (begin === undefined) {
    if (printer.json) printer.json_line({ reply });
    else printer.pairs([["session", reply.actor], ["state", reply.state], ["seq", reply.seq], ...Object.entries(reply.result)]);
    return EXIT.done;
  }
  if (printer.json) printer.json_line({ reply });
  const { turn } = reply.result;
  return followTurn(context, session, Number(turn), begin);
}

/** Shows one turn until it ends; Ctrl-C stops the showing and leaves the turn running. */
async function followTurn(context: Context, session: ActorAddress, turn: number, begin: { events: number; tokens: number }): Promise<number> {
  const { printer, ports } = context;
  const bus = await context.bus();
  const speech = createSpeech(printer);
  let end: ((code: number) => void) | undefined;
  const ended = new Promise<number>((resolve) => (end = resolve));
  const onEvent = (event: ActorEvent): void => {
    if (event["turn"] !== turn) return;
    if (printer.json) printer.json_line({ event });
    else if (event.type === "superseded") speech.text.superseded(event as unknown as { turn: number; step: number; attempt: number });
    else if (event.type === "message.completed") speech.text.completed(event as unknown as { turn: number; step: number; content: string });
    else if (event.type.startsWith("tool.") && printer.terminal) showEvent(printer, event, speech);
    if (!TURN_ENDS.has(event.type)) return;
    speech.flush();
    if (event.type !== "turn.completed")
      printer.note(`${event.type}: ${plain(event["reason"])}${event["message"] === undefined ? "" : `: ${plain(event["message"])}`}`);
    end?.(event.type === "turn.completed" ? EXIT.done : EXIT.refused);
  };
  const subscriptions = [
    await bus.follow("TOKENS", actorSubject(session, "token"), begin.tokens, (stored) => {
      const chunk = decodeToken(stored.data);
      if (chunk.turn !== turn) return;
      if (printer.json) printer.json_line({ token: chunk });
      else speech.text.chunk(chunk);
    }),
    await bus.follow("EVENTS", actorSubject(session, "event"), begin.events, (stored) => {
      for (const event of decodeJournal(stored.data, session).events) onEvent(event);
    }),
  ];
  const unhear = ports.on_interrupt(() => {
    printer.note("\nno longer shown; the turn goes on (troupe tail shows it, turn.cancel ends it)");
    end?.(EXIT.refused);
  });
  const code = await ended;
  unhear();
  await Promise.all(subscriptions.map((one) => one.stop()));
  return code;
}

function showEvent(printer: Printer, event: ActorEvent, speech?: { flush(): void }): void {
  speech?.flush();
  const { type, ...fields } = event;
  const words = Object.entries(fields).map(([name, value]) => {
    const text = plain(value);
    return `${printer.style("dim", `${name}=`)}${text.length <= 120 ? text : `${text.slice(0, 119)}…`}`;
  });
  printer.line(`${printer.style("cyan", plain(type))} ${words.join(" ")}`.trimEnd());
}

// ── tail ───────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface TailOptions {
  readonly from?: string;
  readonly tokens?: boolean;
  readonly follow: boolean;
}

/** `start`, `now`, or a cursor that an earlier tail printed. */
export function tailStart(from: string, last_sequence: number): number | undefined {
  if (from === "start") return 1;
  if (from === "now") return last_sequence + 1;
  return /^\d{1,15}$/.test(from) ? Number(from) + 1 : undefined;
}

export async function tail(context: Context, options: TailOptions, filter: ActorFilter): Promise<number> {
  const { printer, ports } = context;
  const bus = await context.bus();
  const { last_sequence } = await bus.bounds("EVENTS");
  const start = tailStart(options.from ?? "now", last_sequence);
  if (start === undefined) throw new TroupeError(errorBody("invalid", "--from is 'start', 'now' or the cursor of an earlier tail"));
  const subject = (channel: string): string => `tenant.${filter.tenant ?? "*"}.${filter.kind ?? "*"}.${filter.id ?? "*"}.${channel}`;
  const one = filter.id !== undefined;
  const speech = one && !printer.json ? createSpeech(printer) : undefined;

  const onJournal = (stored: StoredMessage): void => {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "malformed") return;
    const message = decodeJournal(stored.data, parsed.actor);
    for (const event of message.events) {
      if (printer.json) {
        printer.json_line({ cursor: String(stored.sequence), actor: actorPath(parsed.actor), seq: message.seq, at: message.at, event });
        continue;
      }
      if (speech !== undefined && event.type === "superseded") speech.text.superseded(event as unknown as { turn: number; step: number; attempt: number });
      if (speech !== undefined && event.type === "message.completed")
        speech.text.completed(event as unknown as { turn: number; step: number; content: string });
      speech?.flush();
      printer.text(`${printer.style("dim", `${stored.sequence}  ${message.at}`)}  ${one ? "" : `${printer.style("bold", actorPath(parsed.actor))}  `}`);
      showEvent(printer, event);
    }
  };
  const onChunk = (stored: StoredMessage): void => {
    const parsed = parseActorSubject(stored.subject);
    if (parsed.kind === "malformed") return;
    const chunk: TokenChunk = decodeToken(stored.data);
    if (printer.json) printer.json_line({ actor: actorPath(parsed.actor), token: chunk });
    else if (speech !== undefined) speech.text.chunk(chunk);
    else
      printer.line(
        `${printer.style("bold", actorPath(parsed.actor))}  ${printer.style("dim", `token ${chunk.turn}.${chunk.step}/${chunk.attempt}#${chunk.index}`)} ${plain(chunk.text)}`,
      );
  };

  if (!options.follow) {
    for await (const stored of bus.read("EVENTS", subject("event"), start)) onJournal(stored);
    speech?.flush();
    return EXIT.done;
  }
  const subscriptions: Subscription[] = [];
  // Tokens of a whole tenant are a flood nobody reads: they come when asked for.
  if (options.tokens ?? one) subscriptions.push(await bus.follow("TOKENS", subject("token"), (await bus.bounds("TOKENS")).last_sequence + 1, onChunk));
  subscriptions.push(await bus.follow("EVENTS", subject("event"), start, onJournal));
  await new Promise<void>((resolve) => {
    const unhear = ports.on_interrupt(() => {
      unhear();
      resolve();
    });
  });
  speech?.flush();
  await Promise.all(subscriptions.map((subscription) => subscription.stop()));
  return EXIT.done;
}

// ── chat ───────────────────────────────────────────────────────────────────────────────────────────────────────────

export interface ChatOptions {
  readonly tenant?: string;
  readonly agent: string;
  readonly session?: string;
  readonly gateway?: string;
  readonly key?: string;
}

/** A stream that breaks is taken up where it was, this often without a sign of life: half a minute of waiting in all. */
const RECONNECTS_MAX = 10;
const RECONNECT_MS = [200, 500, 1000, 2000, 4000, 5000] as const;

/** Where the gateway is, and with whose key: given, from the environment, or from dev.json. */
export async function gatewayOf(context: Context, options: { tenant?: string; gateway?: string; key?: string }): Promise<GatewayClient> {
  const { env, fetch } = context.ports;
  const dev = await context.dev();
  const file = dev.kind === "read" ? dev.file : undefined;
  const tenant = options.tenant === undefined ? file?.tenants.find((one) => one.key !== undefined) : file?.tenants.find((one) => one.id === options.tenant);
  const url = options.gateway ?? env["TROUPE_GATEWAY_URL"] ?? file?.gateway_url;
  const key = options.key ?? env["TROUPE_API_KEY"] ?? tenant?.key;
  if (url === undefined)
    throw new Unreachable(
      "the gateway",
      `no --gateway, no TROUPE_GATEWAY_URL, and ${dev.path} ${dev.kind === "absent" ? "does not exist" : "names none"}; is Troupe running (npm start)?`,
    );
  if (key === undefined)
    throw new TroupeError(
      errorBody(
        "unauthenticated",
        `no --key, no TROUPE_API_KEY, and ${dev.path} has no key${options.tenant === undefined ? "" : ` of tenant '${options.tenant}'`}`,
      ),
    );
  return createGatewayClient(fetch, url, key);
}

/** The session that was named, made when it is not there yet; else a fresh one. */
async function openSession(gateway: GatewayClient, { session, agent }: ChatOptions): Promise<JsonObject> {
  if (session === undefined) return gateway.call("POST", "/v1/sessions", { agent });
  try {
    return await gateway.call("GET", `/v1/sessions/${encodeURIComponent(session)}`);
  } catch (error) {
    if (!(error instanceof TroupeError) || error.body.code !== "not_found") throw error;
    return gateway.call("POST", "/v1/sessions", { agent, id: session });
  }
}

export async function chat(context: Context, options: ChatOptions): Promise<number> {
  const { ports, printer } = context;
  const gateway = await gatewayOf(context, options);
  const opened = await openSession(gateway, options);
  const session = String(opened["id"]);
  const path = `/v1/sessions/${encodeURIComponent(session)}`;
  const terminal = printer.terminal && ports.stdin.isTTY === true;
  if (terminal) printer.note(printer.style("dim", `session ${session}, agent ${plain(opened["agent"])}. Ctrl-C cancels a turn, then leaves.`));
  const lines = createInterface({
    input: ports.stdin,
    ...(terminal ? { output: ports.stdout as unknown as Writable } : {}),
    terminal,
    prompt: printer.style("bold", "› "),
  });

  // What Ctrl-C does now: it cancels the turn that runs, else it leaves.
  let turn: { readonly abort: AbortController; cancelling: boolean } | undefined;
  let leaving = false;
  const onInterrupt = (): void => {
    if (turn === undefined || turn.cancelling) {
      leaving = true;
      turn?.abort.abort();
      lines.close();
      return;
    }
    turn.cancelling = true;
    printer.note(printer.style("yellow", "\ncancelling (again to leave)"));
    gateway
      .call("POST", `${path}/cancel`, {})
      .catch((error: unknown) => printer.note(`the turn was not cancelled: ${error instanceof Error ? error.message : String(error)}`));
  };
  const unhear = ports.on_interrupt(onInterrupt);
  lines.on("SIGINT", onInterrupt);

  let code: number = EXIT.done;
  try {
    if (terminal) lines.prompt();
    for await (const line of lines) {
      if (line.trim() !== "") {
        turn = { abort: new AbortController(), cancelling: false };
        const ended = await showTurn(context, gateway, path, line, turn.abort.signal);
        turn = undefined;
        if (!terminal && ended !== "turn.completed") code = EXIT.refused;
      }
      if (leaving) break;
      if (terminal) lines.prompt();
    }
  } finally {
    lines.close();
    unhear();
  }
  if (printer.json) printer.json_line({ session });
  else if (terminal) printer.note(printer.style("dim", `\nto go on: troupe chat --session ${session}`));
  return code;
}

/** Sends one message and shows its turn. Answers the type of the event that ended it, or why it was not seen to end. */
async function showTurn(context: Context, gateway: GatewayClient, path: string, content: string, signal: AbortSignal): Promise<string> {
  const { ports, printer } = context;
  const speech = createSpeech(printer);
  // The same key with each repeat: whatever happens to the connection, the message is sent once.
  const idempotency_key = ports.world.id();
  let last_event_id: string | undefined;
  let turn: number | undefined;
  for (let fruitless = 0; ;) {
    try {
      // The answer to the POST is the turn from its beginning; once something of it was heard, it is taken up from there.
      const events =
        last_event_id === undefined
          ? gateway.stream({ method: "POST", path: `${path}/messages`, body: { content }, idempotency_key }, signal)
          : gateway.stream({ method: "GET", path: `${path}/events`, last_event_id }, signal);
      for await (const message of events) {
        last_event_id = message.id ?? last_event_id;
        fruitless = 0;
        const event = eventOf(message);
        if (event === undefined) continue;
        if (message.event === "session.state") {
          if (event["to"] !== "idle" && event["to"] !== "thinking" && event["to"] !== "acting")
            printer.note(`the session is ${plain(event["to"])}${event["reason"] ? `: ${plain(event["reason"])}` : ""}`);
          if (event["to"] === "terminated") return "session.terminated";
          continue;
        }
        turn ??=
          message.event === "turn.started" || message.event === "message.received" || message.event === "token"
            ? (event["turn"] as number | undefined)
            : undefined;
        if (turn !== undefined && event["turn"] !== undefined && event["turn"] !== turn) continue;
        showChatEvent(printer, speech, message.event, event);
        if (!TURN_ENDS.has(message.event)) continue;
        speech.flush();
        if (message.event !== "turn.completed")
          printer.note(
            printer.style("red", `${message.event}: ${plain(event["reason"])}${event["message"] === undefined ? "" : `: ${plain(event["message"])}`}`),
          );
        return message.event;
      }
    } catch (error) {
      if (signal.aborted) return "left";
      // What the gateway refuses is an answer; what it cannot do now, and broken connections, are tried again.
      if (error instanceof TroupeError && error.body.code !== "unavailable" && error.body.code !== "overloaded") {
        printer.refused(error.body);
        return "refused";
      }
      if (fruitless >= RECONNECTS_MAX) throw error;
    }
    if (fruitless >= RECONNECTS_MAX) throw new Unreachable("the gateway", "the stream ended again and again before the turn did");
    await pause(ports.world, RECONNECT_MS[Math.min(fruitless, RECONNECT_MS.length - 1)] as number);
    fruitless += 1;
  }
}

function eventOf(message: ServerEvent): JsonObject | undefined {
  try {
    const value: unknown = JSON.parse(message.data);
    return value !== null && typeof value === "object" && !Array.isArray(value) ? (value as JsonObject) : undefined;
  } catch {
    return undefined; // not JSON, so not an event: a newer gateway may say more than we know
  }
}

function showChatEvent(printer: Printer, speech: { readonly text: TurnText; flush(): void }, type: string, event: JsonObject): void {
  if (printer.json) {
    printer.json_line(type === "token" ? { token: event } : { event: { type, ...event } });
    return;
  }
  if (type === "token") speech.text.chunk(event as unknown as TokenChunk);
  else if (type === "superseded") speech.text.superseded(event as unknown as { turn: number; step: number; attempt: number });
  else if (type === "message.completed") speech.text.completed(event as unknown as { turn: number; step: number; content: string });
  else if (type.startsWith("tool.") && printer.terminal) showEvent(printer, { type, ...event } as ActorEvent, speech);
}
