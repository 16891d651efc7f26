// webhook: an address of a tenant's that hears what happens: each event is delivered at least once, in order, until its receiver takes it or
// the tries are over. `tenant.{t}.webhook.{id}`.
//
//   webhook.create ──▶ idle ──webhook.deliver──▶ delivering ──taken──▶ idle, or the next one
//                                                 │    ▲
//                                          failed ▼    │ later and later, half a day in all
//                                                waiting ──the last try failed──▶ given up, and told; then the next one
//
//   the receiver says that it is gone, or webhook.configure {enabled: false} ──▶ disabled ──webhook.configure──▶ idle
//
// A delivery is a command like any other, so it is durable when it is sent: senders put it out with the commit in which the thing happened.
// It owns what waits, as positions of entries. It leaves to others: the call itself, its signature, and which addresses may be called
// (actors/effects/deliver-webhook.ts).
//
// Invariants:
//   WH1. Every event that was taken in gets one end: webhook.delivered, or webhook.given_up with the reason.
//   WH2. They are delivered in the order in which they came; one is called at a time.
//   WH3. What waits has a bound; above it the oldest that is not under way is given up, and told. The sender's own journal still has it.
//   WH4. No secret is here: what signs is derived from the deployment's key, this actor's name and `generation`.
import { enqueueActions, setup } from "xstate";
import { assert } from "../protocol/assert.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";
import {
  type ActorDefinition,
  type ActorView,
  type BaseContext,
  type Change as ChangeOf,
  type CommandEvent,
  type CreationInput,
  effect,
  type EffectError,
  type Emitted,
  perform,
} from "./definition.ts";

/** A receiver that is away for half a day at a busy hour; as positions they are a few kilobytes. */
export const WAITING_MAX = 256;
/** After each failed try; past the last the event is given up. Twelve hours in all, which outlasts a night's outage. */
export const RETRY_MS = [5_000, 30_000, 120_000, 600_000, 1_800_000, 7_200_000, 14_400_000, 18_000_000] as const;
/** Ten times what the call itself is given (DELIVERY_PATIENCE_MS of the performer): past it the performer is stuck. */
export const DELIVERY_STUCK_MS = 100_000;
const REASON_CHARACTERS_MAX = 500;
/** What repeating does not mend: the address may not be called, or the receiver says that it is gone for good. */
const FINAL_CODES: ReadonlySet<string> = new Set(["address_refused", "gone"]);

/** One event that waits, or is under way. */
interface Waiting {
  /** seq of the command that bears it. */
  readonly at: number;
  readonly event: string;
}

export interface WebhookContext extends BaseContext {
  readonly url: string;
  /** Raised by each rotation: another generation, another secret. */
  readonly generation: number;
  /** The first is under way. */
  readonly waiting: readonly Waiting[];
  /** Failed tries of the first. */
  readonly tries: number;
  readonly failed: { readonly code: string; readonly message: string } | null;
  readonly delivered: number;
  readonly given_up: number;
  readonly enabled: boolean;
  readonly created_at_ms: number;
}

export interface DeliveryInput {
  /** seq of the command whose body is sent. */
  readonly at: number;
  readonly url: string;
  readonly generation: number;
}
export interface DeliveryOutput {
  readonly status: number;
}
export const webhookEffects = { deliver_webhook: effect<DeliveryInput, DeliveryOutput>() };

interface ConfigureBody {
  readonly url?: string;
  readonly enabled?: boolean;
}
type WebhookEvent =
  | CommandEvent<"webhook.deliver", { readonly event: { readonly type: string }; readonly from: string }>
  | CommandEvent<"webhook.configure", ConfigureBody>
  | CommandEvent<"webhook.rotate">;

type Change = ChangeOf<WebhookContext>;

const endedOf = ({ waiting, tries }: WebhookContext): JsonObject => ({ delivery: waiting[0]?.at ?? 0, event: waiting[0]?.event ?? "", tries: tries + 1 });

function taken({ waiting, given_up, now }: WebhookContext, event: string): Change {
  const one: Waiting = { at: now.seq, event };
  if (waiting.length < WAITING_MAX) return { context: { waiting: [...waiting, one] }, answer: { delivery: now.seq } };
  const [first, oldest, ...others] = waiting;
  assert(first !== undefined && oldest !== undefined, "what is full holds more than one");
  return {
    context: { waiting: [first, ...others, one], given_up: given_up + 1 },
    tell: [{ type: "webhook.given_up", delivery: oldest.at, event: oldest.event, tries: 0, code: "overloaded", message: `${WAITING_MAX} events waited` }],
    answer: { delivery: now.seq },
  }; // WH3
}

function delivered(context: WebhookContext, { status }: DeliveryOutput): Change {
  return {
    context: { waiting: context.waiting.slice(1), tries: 0, failed: null, delivered: context.delivered + 1 },
    tell: [{ type: "webhook.delivered", ...endedOf(context), status }],
  };
}

const failure = ({ code, message }: EffectError): { code: string; message: string } => ({ code, message: message.slice(0, REASON_CHARACTERS_MAX) });

function failedOnce(context: WebhookContext, error: EffectError): Change {
  const failed = failure(error);
  const retry_in_ms = RETRY_MS[context.tries] ?? null;
  return { context: { tries: context.tries + 1, failed }, tell: [{ type: "webhook.failed", ...endedOf(context), ...failed, retry_in_ms }] };
}

function givenUp(context: WebhookContext, error: EffectError): Change {
  const failed = failure(error);
  return {
    context: { waiting: context.waiting.slice(1), tries: 0, failed, given_up: context.given_up + 1, ...(error.code === "gone" ? { enabled: false } : {}) },
    tell: [{ type: "webhook.given_up", ...endedOf(context), ...failed }],
  };
}

function configured(context: WebhookContext, { url = context.url, enabled = true }: ConfigureBody): Change {
  return {
    context: { url, enabled, tries: 0, failed: null },
    tell: [{ type: "webhook.configured", url, enabled }],
    answer: { url, enabled, generation: context.generation },
  };
}

const TIMEOUT: EffectError = { code: "timeout", message: "the call was not over in time" };

export const webhookMachine = setup({
  types: {} as { context: WebhookContext; events: WebhookEvent; emitted: Emitted; input: CreationInput },
  actors: webhookEffects,
  delays: { retry: ({ context }) => RETRY_MS[context.tries - 1] ?? 0, delivery_stuck: DELIVERY_STUCK_MS },
  guards: {
    enabled: ({ context }) => context.enabled,
    something_waits: ({ context }) => context.waiting.length > 0,
    last_try: ({ context }) => context.tries >= RETRY_MS.length,
    final: (_, { code }: { code: string }) => FINAL_CODES.has(code),
    disables: ({ event }) => event.type === "webhook.configure" && event.body.enabled === false,
  },
  actions: {
    tell_created: enqueueActions((args) => perform(args, { tell: [{ type: "webhook.created", url: args.context.url }], answer: { url: args.context.url } })),
    take: enqueueActions((args, { event }: { event: string }) => perform(args, taken(args.context, event))),
    deliver: enqueueActions((args, output: DeliveryOutput) => perform(args, delivered(args.context, output))),
    fail: enqueueActions((args, error: EffectError) => perform(args, failedOnce(args.context, error))),
    give_up: enqueueActions((args, error: EffectError) => perform(args, givenUp(args.context, error))),
    configure: enqueueActions((args, body: ConfigureBody) => perform(args, configured(args.context, body))),
    rotate: enqueueActions((args) => {
      const generation = args.context.generation + 1;
      perform(args, { context: { generation }, tell: [{ type: "webhook.rotated", generation }], answer: { generation } });
    }),
  },
}).createMachine({
  id: "webhook",
  version: "1",
  context: ({ input: { body, now } }) => ({
    now,
    url: String(body["url"]),
    generation: 1,
    waiting: [],
    tries: 0,
    failed: null,
    delivered: 0,
    given_up: 0,
    enabled: true,
    created_at_ms: now.at_ms,
  }),
  entry: "tell_created",
  initial: "idle",
  on: {
    "webhook.deliver": { actions: { type: "take", params: ({ event }) => ({ event: event.body.event.type }) } },
    "webhook.rotate": { actions: "rotate" },
    "webhook.configure": [
      { guard: "disables", target: ".disabled", actions: { type: "configure", params: ({ event }) => event.body } },
      { target: ".choosing", actions: { type: "configure", params: ({ event }) => event.body } },
    ],
  },
  states: {
    choosing: {
      id: "choosing",
      description: "what is next",
      always: [{ guard: ({ context }) => !context.enabled, target: "disabled" }, { guard: "something_waits", target: "delivering" }, { target: "idle" }],
    },
    idle: { id: "idle", description: "nothing waits", always: { guard: "something_waits", target: "delivering" } },
    delivering: {
      id: "delivering",
      description: "the oldest event is being delivered",
      invoke: {
        id: "delivery",
        src: "deliver_webhook",
        input: ({ context }) => ({ at: context.waiting[0]?.at ?? 0, url: context.url, generation: context.generation }),
        onDone: { target: "choosing", actions: { type: "deliver", params: ({ event }) => event.output } },
        onError: [
          {
            guard: { type: "final", params: ({ event }) => ({ code: (event.error as EffectError).code }) },
            target: "choosing",
            actions: { type: "give_up", params: ({ event }) => event.error as EffectError },
          },
          { guard: "last_try", target: "choosing", actions: { type: "give_up", params: ({ event }) => event.error as EffectError } },
          { target: "waiting", actions: { type: "fail", params: ({ event }) => event.error as EffectError } },
        ],
      },
      after: {
        delivery_stuck: [
          { guard: "last_try", target: "choosing", actions: { type: "give_up", params: TIMEOUT } },
          { target: "waiting", actions: { type: "fail", params: TIMEOUT } },
        ],
      },
    },
    waiting: { id: "waiting", description: "the receiver did not take it; it is called again later", after: { retry: "delivering" } },
    disabled: { id: "disabled", description: "nothing is delivered until it is configured again" },
  },
});

export function webhookContextOf(view: Pick<ActorView, "context">): WebhookContext {
  return view.context as unknown as WebhookContext;
}

export const webhookDefinition: ActorDefinition = {
  kind: "webhook",
  machine: webhookMachine,
  creates: "webhook.create",
  // Receivers know a repeat by its id, so a lost call is made again.
  effects: { deliver_webhook: { lost: () => "retry" } },
  refuse(view, { type }): ErrorBody | undefined {
    return type === "webhook.deliver" && view.state === "disabled"
      ? errorBody("illegal_transition", "the webhook is disabled", { state: view.state })
      : undefined;
  },
  waits(view) {
    const { waiting, tries, failed } = webhookContextOf(view);
    if (view.state === "delivering") return undefined;
    if (view.state === "disabled") return `disabled${failed === null ? "" : ` (${failed.message})`}: waits for webhook.configure`;
    return view.state === "waiting" ? `${waiting.length} events wait; try ${tries + 1} comes after ${failed?.code ?? "a failure"}` : "waits for an event";
  },
};
