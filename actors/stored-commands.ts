// stored-commands: how much of each tenant waits in COMMANDS, and who has so much there that more is refused where commands enter: all tenants of a cell
// share the stream's bytes, and whoever filled them would lock out the others.
//
//   little there ──▶ nobody is counted ──a tenth of a bound──▶ counted by tenant, each look ──pressure.ts: a share of a bound──▶ crowded ──a fifth below──▶ not any more
//
// The dispatch of the workers (dispatch.ts) bounds what they have taken and not decided; this bounds what lies before them, also while no worker is there.
// Messages are counted by the broker; bytes are estimated, by the size of the last message of one of the tenant's actors at each look.
//
// Invariants:
//   SC1. Nobody is refused for what others have stored: a tenant is judged by its own messages and bytes.
//   SC2. What cannot be counted refuses nobody: the stream's own bound is still there.
//   SC3. A look costs one question while little is stored, and one more while much is; sizes are asked of SAMPLED_MAX tenants at most.
import type { Bus } from "../bus/port.ts";
import { type ErrorBody, errorBody } from "../protocol/errors.ts";
import { TENANT_COMMANDS_BYTES_MAX, TENANT_COMMANDS_STORED_MAX } from "../protocol/limits.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { World } from "../protocol/world.ts";
import { Pressure } from "./pressure.ts";

/** By then a tenant that publishes as fast as a broker takes it has stored some thousand more. */
const LOOK_MS = 500;
/** Below this share of a tenant's bound in the whole stream nobody can be near it. */
const COUNT_FROM = 0.1;
/** Tenants whose sizes are asked for in one look, those with most messages. */
const SAMPLED_MAX = 16;
/** The newest size counts so much. */
const NEWEST_WEIGHT = 0.3;
/** When who was refused should come again. Thousands of commands take seconds. */
const RETRY_MS = 2_000;

export interface StoredCommands {
  /** Why no more commands of this tenant are taken now. */
  refusal(tenant: string): ErrorBody | undefined;
  stop(): void;
}

export interface StoredCommandsOptions {
  readonly bus: Pick<Bus, "bounds" | "counts" | "last">;
  readonly world: World;
  readonly log: Log;
  readonly messages_max?: number;
  readonly bytes_max?: number;
  /** actors/pressure.ts */
  readonly refuse_percent?: number;
  /** A tenant has become crowded, or is not any more. */
  on_change?(tenant: string, crowded: boolean): void;
}

interface Stored {
  readonly messages: Pressure;
  readonly bytes: Pressure;
  waiting: number;
  mean_bytes: number | undefined;
  crowded: boolean;
}

export function createStoredCommands({
  bus,
  world,
  log,
  messages_max = TENANT_COMMANDS_STORED_MAX,
  bytes_max = TENANT_COMMANDS_BYTES_MAX,
  refuse_percent,
  on_change,
}: StoredCommandsOptions): StoredCommands {
  const tenants = new Map<string, Stored>();
  let stopped = false;

  function judge(tenant: string, stored: Stored, waiting: number): void {
    stored.waiting = waiting;
    const crowded = [stored.messages.at(waiting), stored.bytes.at(Math.round(waiting * (stored.mean_bytes ?? 0)))].includes("refusing");
    if (crowded !== stored.crowded) {
      stored.crowded = crowded;
      log.warn(crowded ? "a tenant has so much waiting that more is refused" : "a tenant's commands are taken again", { tenant, waiting });
      on_change?.(tenant, crowded);
    }
    if (waiting === 0) tenants.delete(tenant);
  }

  /** Messages by tenant, and one subject of each. */
  async function count(): Promise<Map<string, { messages: number; subject: string }>> {
    const counted = new Map<string, { messages: number; subject: string }>();
    for (const { subject, messages } of await bus.counts("COMMANDS", "shard.*.tenant.>")) {
      const parsed = parseActorSubject(subject);
      if (parsed.kind === "malformed") continue;
      const { tenant } = parsed.actor;
      const before = counted.get(tenant);
      counted.set(tenant, { messages: (before?.messages ?? 0) + messages, subject: before === undefined || world.random() < 0.1 ? subject : before.subject });
    }
    return counted;
  }

  async function look(): Promise<void> {
    const { messages, bytes } = await bus.bounds("COMMANDS");
    const little = messages < COUNT_FROM * messages_max && bytes < COUNT_FROM * bytes_max;
    const counted = little ? new Map<string, { messages: number; subject: string }>() : await count();
    const most = [...counted].sort(([, a], [, b]) => b.messages - a.messages).slice(0, SAMPLED_MAX);
    if (bytes >= COUNT_FROM * bytes_max)
      await Promise.all(
        most.map(async ([tenant, { subject }]) => {
          const size = (await bus.last("COMMANDS", subject))?.data.byteLength;
          if (size === undefined) return; // decided meanwhile
          const stored = of(tenant);
          stored.mean_bytes = stored.mean_bytes === undefined ? size : stored.mean_bytes * (1 - NEWEST_WEIGHT) + size * NEWEST_WEIGHT;
        }),
      );
    for (const [tenant, { messages: waiting }] of counted) judge(tenant, of(tenant), waiting);
    for (const [tenant, stored] of tenants) if (!counted.has(tenant)) judge(tenant, stored, 0);
  }

  function of(tenant: string): Stored {
    const known = tenants.get(tenant);
    if (known !== undefined) return known;
    const fresh: Stored = {
      messages: new Pressure(messages_max, refuse_percent),
      bytes: new Pressure(bytes_max, refuse_percent),
      waiting: 0,
      mean_bytes: undefined,
      crowded: false,
    };
    tenants.set(tenant, fresh);
    return fresh;
  }

  let cancel = (): void => {};
  const lookLater = (): void => {
    cancel = world.after(LOOK_MS, () => {
      void look()
        .catch((error: unknown) => log.debug("what waits in the stream of commands cannot be counted now", errorFields(error))) // SC2
        .finally(() => {
          if (!stopped) lookLater();
        });
    });
  };
  lookLater();

  return {
    refusal(tenant) {
      const stored = tenants.get(tenant);
      if (stored === undefined || !stored.crowded) return undefined;
      const { waiting } = stored;
      return errorBody("overloaded", `${waiting} commands of this tenant wait in the stream already`, {
        waits_for: "stream",
        waiting,
        retry_after_ms: RETRY_MS,
      });
    },
    stop() {
      stopped = true;
      cancel();
    },
  };
}
