// services: those who say commands to a simulated cluster: by the client of ours until they are decided, and as strangers who publish once. In the
// end each is asked what it was told, and that is held against the journals.
import { type CommandClient } from "../../actors/client.ts";
import type { Bus } from "../../bus/port.ts";
import { HEADER_IDEMPOTENCY_KEY, HEADER_REPLY_TO } from "../../protocol/commands.ts";
import { ERRORS } from "../../protocol/errors.ts";
import { type ActorAddress, parseActorPath } from "../../protocol/ids.ts";
import { decodeReply, type Reply } from "../../protocol/reply.ts";
import { actorSubject } from "../../protocol/subjects.ts";
import { pause, type World } from "../../protocol/world.ts";
import type { Act } from "./plan.ts";
import type { Story } from "./story.ts";
import type { Journal } from "./watch.ts";

/** A service, as its process is now. */
export interface Speaker {
  readonly bus: Bus;
  readonly world: World;
  readonly clients: { readonly fast: CommandClient; readonly durable: CommandClient };
}

interface Said {
  readonly actor: string;
  readonly key: string;
  readonly type: string;
  readonly replies: Reply[];
  sends: number;
}
interface Published {
  readonly actor: string;
  readonly type: string;
  readonly key: string | undefined;
  /** Sequences in COMMANDS of the copies that are known to be stored. */
  readonly sequences: number[];
  copies: number;
  readonly replies: Reply[];
}

export function addressOf(path: string): ActorAddress {
  const actor = parseActorPath(path);
  if (actor === undefined) throw new RangeError(`${path} names no actor`);
  return actor;
}

export interface ServicesDeps {
  readonly story: Story;
  speaker(service: string): Speaker;
}

export class Services {
  /** Commands that are not decided yet. */
  pending = 0;
  readonly #deps: ServicesDeps;
  readonly #said: Said[] = [];
  readonly #published: Published[] = [];
  readonly #queues = new Map<string, Promise<void>>();

  constructor(deps: ServicesDeps) {
    this.#deps = deps;
  }

  /** One after another per service and actor, until decided. */
  say(act: Omit<Extract<Act, { kind: "say" }>, "kind">): void {
    const { service, actor: path, key, type, body, channel, fast, repeats } = act;
    const { story, speaker } = this.#deps;
    const actor = addressOf(path);
    const { clients, world } = speaker(service);
    const said: Said = { actor: path, key, type, replies: [], sends: 0 };
    this.#said.push(said);
    this.pending++;
    const line = `${service} ${path}`;
    const before = this.#queues.get(line) ?? Promise.resolve();
    const saying = before.then(async () => {
      const client = fast ? clients.fast : clients.durable;
      for (let again = repeats; ;) {
        said.sends++;
        const outcome = await client.command(actor, { type, body, key, channel }, { patience_ms: 2_500 });
        if (outcome.kind === "refused") {
          await pause(world, 100);
          continue;
        }
        const { reply } = outcome;
        story.trace(`${service} hears of ${path} ${type} ${key}: ${reply.ok ? `ok ${reply.seq} ${reply.state}` : reply.error.code}`);
        story.count(reply.ok ? "answered ok" : `answered ${reply.error.code}`);
        said.replies.push(reply);
        // Trouble that will pass is tried again; who is told that it is busy may give up.
        if (!reply.ok && ERRORS[reply.error.code].transient && reply.error.code !== "busy") {
          await pause(world, 300);
          continue;
        }
        if (again-- <= 0) break;
      }
      this.pending--;
    });
    this.#queues.set(line, saying);
  }

  publish({ service, actor: path, type, body, key, copies }: Extract<Act, { kind: "publish" }>): void {
    const { bus } = this.#deps.speaker(service);
    const actor = addressOf(path);
    const published: Published = { actor: path, type, key, sequences: [], copies, replies: [] };
    this.#published.push(published);
    const inbox = bus.inbox();
    bus.subscribe(inbox, (message) => void published.replies.push(decodeReply(message.data)));
    for (let copy = 0; copy < copies; copy++) {
      this.pending++;
      const headers = { [HEADER_REPLY_TO]: inbox, ...(key === undefined ? {} : { [HEADER_IDEMPOTENCY_KEY]: key }) };
      void bus.publish(actorSubject(actor, "command"), new TextEncoder().encode(JSON.stringify({ type, body })), { headers }).then((outcome) => {
        this.pending--;
        if (outcome.kind === "stored") published.sequences.push(outcome.sequence);
        this.#deps.story.count(`published ${outcome.kind}`);
      });
    }
  }

  garbage({ service, actor: path, text }: Extract<Act, { kind: "garbage" }>): void {
    void this.#deps.speaker(service).bus.publish(actorSubject(addressOf(path), "command"), new TextEncoder().encode(text));
  }

  /** What was answered is what was done. */
  judge(journals: ReadonlyMap<string, Journal>): void {
    for (const said of this.#said) this.#judgeSaid(said, journals);
    for (const published of this.#published) this.#judgePublished(published, journals);
  }

  #judgeSaid({ actor, key, replies, sends, type }: Said, journals: ReadonlyMap<string, Journal>): void {
    const { fail } = this.#deps.story;
    const decided = journals.get(actor)?.decided.filter((one) => one.entry.key === key && one.entry.type === type) ?? [];
    const done = decided.filter((one) => one.entry.t !== "refused");
    if (done.length > 1) fail(`A3: ${key} is done ${done.length} times in ${actor}`);
    const seqs = new Set(replies.flatMap((reply) => (reply.ok ? [reply.seq] : [])));
    const created = replies.some((reply) => reply.ok && reply.result["created"] === false);
    if (seqs.size > 1 && !created) fail(`${actor} ${key} is answered with different outcomes: ${[...seqs].join(", ")}`);
    for (const reply of replies) {
      if (reply.ok && !created && !done.some((one) => one.seq === reply.seq))
        fail(`A1: ${actor} ${key} was answered ok at ${reply.seq}, where the journal has no such command`);
      if (!reply.ok && !ERRORS[reply.error.code].transient && reply.error.code !== "not_found" && done.length > 0)
        fail(`${actor} ${key} was answered ${reply.error.code}, and it was done at ${done[0]?.seq ?? 0}`);
    }
    const gaveUp = replies.at(-1);
    if (sends === 1 && gaveUp?.ok === false && done.length > 0)
      fail(`${actor} ${key} was sent once and answered ${gaveUp.error.code}, and it was done at ${done[0]?.seq ?? 0}`);
  }

  #judgePublished({ actor, key, sequences, copies, replies, type }: Published, journals: ReadonlyMap<string, Journal>): void {
    const { fail, count } = this.#deps.story;
    const journal = journals.get(actor);
    const created_at = journal?.messages[0];
    const decided = journal?.decided ?? [];
    const bySource = sequences.map((seq) => decided.find((one) => one.entry.source?.seq === seq));
    if (key !== undefined) {
      const done = decided.filter((one) => one.entry.key === key && one.entry.t !== "refused");
      if (done.length > 1) fail(`A3: ${key}, published ${copies} times, is done ${done.length} times in ${actor}`);
    }
    const refused = replies.some((reply) => !reply.ok);
    sequences.forEach((seq, index) => {
      const one = bySource[index];
      // Refused before it reached a journal, recognised as a repeat, or refused too often to be journaled: then its sender was told.
      if (one === undefined && key === undefined && !refused && created_at !== undefined && replies.length < copies && type !== "session.create")
        count("unanswered publishes");
      if (one === undefined && key === undefined && replies.some((reply) => reply.ok && reply.result["created"] !== false) && copies === 1)
        fail(`A1: ${actor} ${type} (COMMANDS ${seq}) was answered ok, and no journal has it`);
      if (one !== undefined && key === undefined && copies === 1) {
        for (const reply of replies) {
          if (reply.ok && one.entry.t === "refused")
            fail(`${actor} ${type} (COMMANDS ${seq}) was answered ok at ${reply.seq}, the journal refused it at ${one.seq}`);
          if (!reply.ok && one.entry.t !== "refused")
            fail(`${actor} ${type} (COMMANDS ${seq}) was answered ${reply.error.code}, and it was done at ${one.seq}`);
        }
      }
    });
  }
}
