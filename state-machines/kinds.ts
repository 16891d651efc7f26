// kinds: the kinds of actors that exist, each with its pure core.
import type { ActorKind } from "../protocol/ids.ts";
import type { ActorDefinition } from "./definition.ts";
import { sessionDefinition } from "./session.ts";
import { type Core, coreOf } from "./step.ts";

export const definitions = { session: sessionDefinition } as const satisfies Partial<Record<ActorKind, ActorDefinition>>;

export type HostedKind = keyof typeof definitions;

/** One core per kind and process. */
export const cores: Readonly<Record<HostedKind, Core>> = { session: coreOf(definitions.session) };
