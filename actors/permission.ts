// permission: the one gate that every effect passes before it is performed. What an effect does is declared here, by its name; what has no
// declaration is not performed, so a new effect cannot forget to ask.
//
//   effect ──▶ declared actions ──▶ the tenant's present policy and the agent's roles ──▶ performed, or refused
//
// The session decides by what it froze (tools that are denied are not even offered); this gate decides by what holds now, so a denial is felt
// by the next action of every running session, before it takes its configuration up anew at its next turn.
//
// Invariants:
//   G1. Every effect of every machine has a declaration; the table is compared with the machines by a test, and with the performers here.
//   G2. What cannot be known is not permitted: no record, no policy, no frozen configuration means no. A bus that is away is waited for, with
//       an end, and then means no too.
//   G3. A refusal is the effect's failure, and so an entry of the journal (and a row of the audit) before anybody hears of it.
import { assert } from "../protocol/assert.ts";
import type { AgentConfig } from "../protocol/commands.ts";
import type { Entry } from "../protocol/journal.ts";
import type { Json, JsonObject } from "../protocol/json.ts";
import { pause, type World } from "../protocol/world.ts";
import { type Action, allowed, permissionsOf } from "../state-machines/permission.ts";
import type { ConfigurationOutput } from "../state-machines/session-effects.ts";
import type { Directory, TenantRecord } from "./directory.ts";
import { EffectFailure, type EffectScope, type Performer, type Performers } from "./performer.ts";

/** What an effect does to the world beyond the runtime. */
export type EffectDeclaration =
  | { readonly kind: "none"; readonly why: string }
  | {
      readonly kind: "actions";
      of(input: JsonObject, frozen: ConfigurationOutput): readonly Action[];
      /** The code under which the machine hears of a denial. */
      readonly code: string;
    };

/** Every model that a call may come to ask. */
function modelsOf(config: AgentConfig): string[] {
  const { model, fallbacks = {}, degrade, guardrails = [] } = config;
  const judges = guardrails.flatMap((rule) => (rule.kind === "judge" ? [rule.model] : []));
  const others = [
    ...(fallbacks.models ?? []),
    ...(fallbacks.context_overflow ?? []),
    ...(fallbacks.content_policy ?? []),
    ...(degrade?.model === undefined ? [] : [degrade.model]),
  ];
  return [...new Set([model, ...others, ...judges])];
}

/** G1. By the effect's `src`. */
export const EFFECT_DECLARATIONS: Readonly<Record<string, EffectDeclaration>> = {
  load_configuration: { kind: "none", why: "it reads what the tenant configured, permissions among it, and acts on nothing" },
  call_model: { kind: "actions", code: "forbidden", of: (_, { config }) => modelsOf(config).map((name) => ({ kind: "model", name })) },
  look_up_turns: { kind: "none", why: "it reads how turns of the tenant's own sessions ended, and acts on nothing" },
  deliver_webhook: {
    kind: "none",
    why: "it tells an address that the tenant's administrators named what happened; which addresses may be called is judged there",
  },
  call_tool: { kind: "actions", code: "denied", of: ({ name }) => [{ kind: "tool", name: String(name) }] },
};

/** An election of the broker lasts up to 8 s; a tenant whose record cannot be read for longer gets no. */
const RECORD_PATIENCE_MS = 15_000;
const RECORD_RETRY_MS = 200;
/** What a call that was not made tells of its cost. */
const NOTHING_SPENT: JsonObject = { attempts: [], usage: null, cost_usd_micros: 0, price_version: null };

/** How far the tenant's configuration of an agent has moved on: a session that froze a lower epoch must take it up anew. */
export function configEpochOf(record: TenantRecord, agent: string): number {
  return record.config_epoch + (Object.hasOwn(record.agents, agent) ? (record.agents[agent]?.config_epoch ?? 0) : 0);
}

function frozenIn(entry: Entry | undefined): ConfigurationOutput | undefined {
  return entry?.t === "done" ? (entry.output as unknown as ConfigurationOutput) : undefined;
}

/** Permission data as a component of /readyz: red while it is being read, and while a tenant's cannot be. */
export interface PermissionHealth {
  status(): Promise<{ readonly ok: boolean; readonly detail: string }>;
}

const READ_RETRY_MS = 500;

/** Reads what every tenant permits, until it could be read once; a process that does not know it is not ready. */
export function watchPermissions({ directory, world }: { directory: Directory; world: World }): PermissionHealth {
  let known = false;
  const read = async (): Promise<void> => {
    while (!known) {
      known = await directory.readAll().then(
        () => true,
        () => false,
      );
      if (!known) await pause(world, READ_RETRY_MS);
    }
  };
  void read();
  return {
    async status() {
      if (!known) return { ok: false, detail: "what tenants permit has not been read yet" };
      const [first, ...others] = await directory.unreadable();
      if (first === undefined) return { ok: true, detail: "read" };
      return {
        ok: false,
        detail: `what tenant '${first.tenant}' permits cannot be read${others.length === 0 ? "" : ` (and ${others.length} more)`}: ${first.reason}`,
      };
    },
  };
}

export interface Gate {
  /** Passes, or throws the EffectFailure that the machine hears. */
  pass(declaration: Extract<EffectDeclaration, { kind: "actions" }>, input: JsonObject, scope: EffectScope): Promise<void>;
}

export function createGate({ directory, world }: { directory: Directory; world: World }): Gate {
  /** G2 */
  async function recordOf(scope: EffectScope, code: string): Promise<TenantRecord> {
    const until_ms = world.monotonic_ms() + RECORD_PATIENCE_MS;
    for (;;) {
      try {
        const record = await directory.tenant(scope.actor.tenant);
        if (record === undefined) throw new EffectFailure(code, "there is no such tenant", NOTHING_SPENT);
        return record;
      } catch (error) {
        if (error instanceof EffectFailure) throw error;
        if (scope.signal.aborted || world.monotonic_ms() >= until_ms)
          throw new EffectFailure(code, "what is permitted cannot be read now, so nothing is", NOTHING_SPENT);
        await pause(world, RECORD_RETRY_MS);
      }
    }
  }

  return {
    async pass({ of, code }, input, scope) {
      const config_seq = typeof input["config_seq"] === "number" ? input["config_seq"] : 0;
      const [record, entries] = await Promise.all([recordOf(scope, code), config_seq === 0 ? new Map<number, Entry>() : scope.entries([config_seq])]);
      const frozen = frozenIn(entries.get(config_seq));
      const refuse = (message: string): never => {
        throw new EffectFailure(code, message, { ...NOTHING_SPENT, ...(frozen === undefined ? {} : { model: frozen.config.model }) });
      };
      if (frozen === undefined) return refuse("the session has no configuration, so nothing is permitted");
      if (record.state !== "active") return refuse(`the tenant is ${record.state}`);
      // A session that is at a boundary takes up what changed before anything is judged by what it froze.
      if (input["boundary"] === true && frozen.agent !== undefined && configEpochOf(record, frozen.agent) > (frozen.config_epoch ?? 0))
        throw new EffectFailure("configuration_changed", "the configuration changed and is taken up before the turn goes on", {
          ...NOTHING_SPENT,
          model: frozen.config.model,
        });
      const { policy, grants } = record as Partial<TenantRecord>;
      const permissions = policy === undefined || grants === undefined ? undefined : permissionsOf(policy, grants, frozen.roles ?? []);
      for (const action of of(input, frozen)) {
        const verdict = allowed(permissions, action);
        if (verdict.kind === "denied") return refuse(verdict.message);
      }
    },
  };
}

/** The performers behind the gate. G1: asserts that each of them is declared. */
export function gated(gate: Gate, performers: Performers): Performers {
  return Object.fromEntries(
    Object.entries(performers).map(([src, perform]): [string, Performer] => {
      const declaration = Object.hasOwn(EFFECT_DECLARATIONS, src) ? EFFECT_DECLARATIONS[src] : undefined;
      assert(declaration !== undefined, `G1: the effect '${src}' declares in actors/permission.ts what it does`);
      if (declaration.kind === "none") return [src, perform];
      return [
        src,
        async (input: never, scope: EffectScope): Promise<Json> => {
          await gate.pass(declaration, input as JsonObject, scope);
          return perform(input, scope);
        },
      ];
    }),
  );
}
