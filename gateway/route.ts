// route: what a route of the gateway is: its name for whoever lists them, and what its handler is given.
import type { FastifyReply, FastifyRequest } from "fastify";
import type { TenantRecord } from "../actors/directory.ts";
import type { Scope } from "../protocol/scopes.ts";
import type { Principal } from "./authenticate.ts";

export interface RouteInfo {
  readonly method: "GET" | "POST" | "PUT";
  readonly url: string;
  readonly authenticated: boolean;
  /** What a credential needs to be answered there; null where none is asked for. */
  readonly scope: Scope | null;
}

/** What an authenticated request carries. */
export interface Visitor {
  readonly principal: Principal;
  readonly record: TenantRecord;
}

export type Handler = (request: FastifyRequest, reply: FastifyReply, visitor: Visitor) => Promise<unknown>;
