// worker-commands: what operators say to a worker actor (drain, undrain, …), decided by whoever leads, one after the other.
//
//   delivered ──no worker of ours, or no command──▶ refused
//     └──said to the worker's journal──▶ decided ──▶ answered, acknowledged
//                          └──the term ended──▶ unacknowledged: the next leader decides it, and recognises it if it was decided
import { type Bus, type Delivery, headerOf, type Subscription } from "../bus/port.ts";
import { decodeCommand, HEADER_REPLY_TO } from "../protocol/commands.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { type ActorAddress, actorPath, SYSTEM_TENANT } from "../protocol/ids.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { encodeReply } from "../protocol/reply.ts";
import { isReplyAllowed, parseActorSubject, WORKER_COMMAND_FILTER } from "../protocol/subjects.ts";
import type { Outcome } from "../state-machines/step.ts";
import type { Term } from "./term.ts";
import type { Verdicts } from "./verdicts.ts";
import { workerActor } from "./worker-cell.ts";
import type { WorkerJournals } from "./worker-journals.ts";

export interface WorkerCommandsOptions {
  readonly bus: Bus;
  readonly log: Log;
  readonly term: Term;
  readonly journals: WorkerJournals;
  readonly verdicts: Verdicts;
  /** A command was decided. */
  on_change(): void;
}

export class WorkerCommands {
  readonly #options: WorkerCommandsOptions;
  readonly #waiting: Delivery[] = [];
  #deciding = false;

  constructor(options: WorkerCommandsOptions) {
    this.#options = options;
  }

  consume(): Promise<Subscription> {
    return this.#options.bus.consume(
      { stream: "COMMANDS", durable: "workers", filters: [WORKER_COMMAND_FILTER] },
      { on_delivery: (delivery) => this.#onDelivery(delivery), on_reset: () => void this.#waiting.splice(0) },
    );
  }

  #onDelivery(delivery: Delivery): void {
    if (this.#options.term.over) return;
    this.#waiting.push(delivery); // bounded by what the consumer leaves unacknowledged
    if (!this.#deciding) void this.#decideAll();
  }

  async #decideAll(): Promise<void> {
    this.#deciding = true;
    for (let delivery = this.#waiting.shift(); delivery !== undefined && !this.#options.term.over; delivery = this.#waiting.shift()) {
      try {
        await this.#decide(delivery);
      } catch (error) {
        // Unacknowledged: it comes again with the next reset, or to the next leader.
        this.#options.log.error("a worker's command could not be decided", { subject: delivery.message.subject, ...errorFields(error) });
      }
    }
    this.#deciding = false;
  }

  async #decide(delivery: Delivery): Promise<void> {
    const { term, journals, verdicts, on_change } = this.#options;
    const { message, source } = delivery;
    const parsed = parseActorSubject(message.subject);
    if (parsed.kind === "malformed" || (parsed.channel !== "command" && parsed.channel !== "control")) {
      delivery.ack();
      return;
    }
    const { actor, channel } = parsed;
    const refuse = (error: ErrorBody): Promise<void> => this.#refuse(actor, delivery, error);
    // A tenant's subject names no worker of ours: it is answered as if there were none.
    if (actor.tenant !== SYSTEM_TENANT) return refuse(errorBody("not_found", `there is no worker '${actor.id}'`));
    const decoding = decodeCommand("worker", channel, message.data, (name) => headerOf(message.headers, name));
    if (decoding.kind === "refused") return refuse(decoding.error);
    const { type, body, key, trace, principal } = decoding.command;
    const cell = journals.open(actor.id);
    await journals.loaded(actor.id);
    if (term.over) return;
    if (cell.record() === undefined) {
      if (verdicts.lease(actor.id) === undefined) verdicts.forget(actor.id);
      return refuse(errorBody("not_found", `there is no worker '${actor.id}'`));
    }
    const outcome = await journals.say(actor.id, type, body, {
      source,
      ...(key === undefined ? {} : { key }),
      ...(principal === undefined ? {} : { principal }),
      ...(trace === undefined ? {} : { trace }),
    });
    if (outcome === undefined) return; // unacknowledged: the next leader decides it, and recognises it if it was decided
    if (!outcome.ok) return refuse(outcome.error);
    this.#answer(actor, delivery, outcome);
    delivery.ack();
    on_change();
  }

  /** A refusal may stand in no journal: it is told once the command is gone for sure, for it may be taken if it comes again (C8 of actors/cell.ts). */
  async #refuse(actor: ActorAddress, delivery: Delivery, error: ErrorBody): Promise<void> {
    if (!(await delivery.settle())) this.#waiting.splice(0);
    else if ((await this.#options.term.conflict()) === "mine") this.#answer(actor, delivery, { ok: false, error });
  }

  #answer(actor: ActorAddress, delivery: Delivery, outcome: Outcome): void {
    const reply_to = headerOf(delivery.message.headers, HEADER_REPLY_TO);
    if (reply_to === undefined || !isReplyAllowed(actor.tenant, reply_to, "runtime")) return;
    const path = actorPath(actor.tenant === SYSTEM_TENANT ? workerActor(actor.id) : actor);
    const data = outcome.ok
      ? encodeReply({ ok: true, actor: path, seq: outcome.seq, state: outcome.state, result: outcome.result })
      : encodeReply({ ok: false, actor: path, error: outcome.error });
    this.#options.bus.send(reply_to, data);
  }
}
