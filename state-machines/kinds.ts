// kinds: the kinds of actors that exist, each with its pure core.
import type { ActorKind } from "../protocol/ids.ts";
import type { ActorDefinition } from "./definition.ts";
import { budgetDefinition } from "./budget.ts";
import { sessionDefinition } from "./session.ts";
import { type Core, coreOf } from "./step.ts";
import { tenantDefinition } from "./tenant.ts";
import { webhookDefinition } from "./webhook.ts";
import { workerDefinition } from "./worker.ts";

export const definitions = {
  budget: budgetDefinition,
  session: sessionDefinition,
  tenant: tenantDefinition,
  webhook: webhookDefinition,
  worker: workerDefinition,
} as const satisfies Partial<Record<ActorKind, ActorDefinition>>;

export type HostedKind = keyof typeof definitions;

/** One core per kind and process. */
export const cores: Readonly<Record<HostedKind, Core>> = {
  budget: coreOf(definitions.budget),
  session: coreOf(definitions.session),
  tenant: coreOf(definitions.tenant),
  webhook: coreOf(definitions.webhook),
  worker: coreOf(definitions.worker),
};
