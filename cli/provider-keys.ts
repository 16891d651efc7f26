// provider-keys: a tenant's own keys at model providers, as an operator gives, lists, takes away and seals them anew. A key is read from stdin,
// because what stands on a command line can be seen by others of the machine, and it is sealed before it is said to anybody.
import { providerKeysOf } from "../actors/tenant-models.ts";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import type { JsonObject } from "../protocol/json.ts";
import { faultOfSecret, lastFourOf, type MasterKey, openSecret, sealSecret } from "../protocol/key-ring.ts";
import { parseActorSubject } from "../protocol/subjects.ts";
import type { Context } from "./context.ts";
import { EXIT } from "./ports.ts";
import { recordOf, tell } from "./tenancy.ts";

function masterKeys(context: Context): readonly MasterKey[] {
  try {
    return context.ports.master_keys.read();
  } catch (error) {
    throw new TroupeError(errorBody("invalid", error instanceof Error ? error.message : String(error)), { cause: error });
  }
}

/** A key and the end of its line fit; whatever else is piped in is not read to its end. */
const INPUT_BYTES_MAX = 4096;

async function readSecret({ ports, printer }: Context): Promise<string> {
  if (ports.stdin.isTTY === true) printer.note("the key, and Enter (it shows while it is typed; better pipe it in):");
  const parts: Buffer[] = [];
  let bytes = 0;
  for await (const part of ports.stdin) {
    const data = Buffer.from(part as Uint8Array | string);
    parts.push(data);
    bytes += data.byteLength;
    if (bytes > INPUT_BYTES_MAX || (ports.stdin.isTTY === true && data.includes(0x0a))) break;
  }
  const secret = Buffer.concat(parts).toString("utf8").trim();
  const fault = faultOfSecret(secret);
  if (fault !== undefined) throw new TroupeError(errorBody("invalid", `no key was read from stdin: ${fault}`));
  return secret;
}

export async function setProviderKey(context: Context, { tenant, label }: { tenant: string; label?: string }, provider: string): Promise<number> {
  const { printer, ports } = context;
  const keys = masterKeys(context);
  const secret = await readSecret(context);
  const sealed = sealSecret(keys, secret, { tenant, provider }, ports.random_bytes);
  const told = { provider, last_four: lastFourOf(secret), ...(label === undefined ? {} : { label }) };
  const { result } = await tell(context, tenant, "provider_key.put", { ...told, sealed: { ...sealed } });
  if (printer.json) printer.document({ tenant, ...told, version: result["version"] ?? null, master_key_id: sealed.master_key_id });
  else
    printer.line(
      `${tenant}'s own key for ${provider} is used from the next call on (version ${String(result["version"])}, sealed with ${sealed.master_key_id})`,
    );
  return EXIT.done;
}

export async function listProviderKeys(context: Context, { tenant }: { tenant: string }): Promise<number> {
  const { printer } = context;
  const keys = providerKeysOf(await recordOf(context, tenant));
  if (printer.json) printer.document({ tenant, provider_keys: keys });
  else
    printer.table(
      ["provider", "label", "key", "version", "created", "rotated", "master key"],
      keys.map((key) => [
        String(key["provider"]),
        key["label"] as string | null,
        key["last_four"] === null ? null : `…${String(key["last_four"])}`,
        Number(key["version"]),
        String(key["created_at"]),
        String(key["rotated_at"]),
        String(key["master_key_id"]),
      ]),
    );
  if (keys.length === 0) printer.note(`'${tenant}' has no key of its own: troupe provider-keys set --tenant ${tenant} PROVIDER < FILE`);
  return EXIT.done;
}

export async function removeProviderKey(context: Context, { tenant, reason }: { tenant: string; reason?: string }, provider: string): Promise<number> {
  const { printer } = context;
  await tell(context, tenant, "provider_key.remove", { provider, ...(reason === undefined ? {} : { reason }) });
  if (printer.json) printer.document({ tenant, provider, removed: true });
  else printer.line(`${tenant}'s own key for ${provider} is removed; withdraw it at the provider too`);
  return EXIT.done;
}

interface Resealing {
  readonly tenant: string;
  readonly provider: string;
  readonly from: string;
  readonly to: string;
  /** `changed`: somebody put or removed the key meanwhile, which is as good. */
  readonly outcome: "resealed" | "already" | "changed" | "unknown_master_key" | "damaged";
}

async function reseal(context: Context, keys: readonly MasterKey[], tenant: string): Promise<Resealing[]> {
  const { ports } = context;
  const to = keys[0]?.id ?? "";
  const done: Resealing[] = [];
  for (const [provider, { sealed }] of Object.entries((await recordOf(context, tenant)).provider_keys ?? {})) {
    const from = sealed.master_key_id;
    const opened = openSecret(keys, sealed, { tenant, provider });
    if (opened.kind === "refused" || from === to) {
      done.push({ tenant, provider, from, to, outcome: opened.kind === "refused" ? opened.reason : "already" });
      continue;
    }
    const anew = sealSecret(keys, opened.secret, { tenant, provider }, ports.random_bytes);
    const body: JsonObject = { provider, sealed: { ...anew }, replaces: sealed.nonce };
    const outcome = await tell(context, tenant, "provider_key.reseal", body).then(
      () => "resealed" as const,
      (error: unknown) => {
        if (error instanceof TroupeError && (error.body.code === "conflict" || error.body.code === "not_found")) return "changed" as const;
        throw error;
      },
    );
    done.push({ tenant, provider, from, to, outcome });
  }
  return done;
}

async function allTenants(context: Context): Promise<string[]> {
  const lasts = await (await context.bus()).last_of_each("EVENTS", "tenant.*.tenant.main.event");
  return lasts.flatMap(({ subject }) => {
    const parsed = parseActorSubject(subject);
    return parsed.kind === "actor" ? [parsed.actor.tenant] : [];
  });
}

export async function rotateProviderKeys(context: Context, { tenant, new: fresh }: { tenant?: string; new?: boolean }): Promise<number> {
  const { printer, ports } = context;
  masterKeys(context); // Nothing is begun that cannot be ended.
  if (fresh === true) {
    try {
      printer.note(`master key ${ports.master_keys.add()} is new, and seals from now on`);
    } catch (error) {
      throw new TroupeError(errorBody("invalid", error instanceof Error ? error.message : String(error)), { cause: error });
    }
  }
  const keys = masterKeys(context);
  const done: Resealing[] = [];
  for (const one of tenant === undefined ? (await allTenants(context)).sort() : [tenant]) done.push(...(await reseal(context, keys, one)));
  const count = (outcome: Resealing["outcome"]): number => done.filter((one) => one.outcome === outcome).length;
  const unopened = count("unknown_master_key") + count("damaged");
  const idle = keys.slice(1).filter((key) => tenant === undefined && !done.some((one) => one.from === key.id && one.outcome !== "resealed"));
  if (printer.json) {
    printer.document({
      master_key_id: keys[0]?.id ?? null,
      resealed: count("resealed"),
      unopened,
      unused_master_keys: idle.map((key) => key.id),
      provider_keys: done,
    });
  } else {
    printer.table(
      ["tenant", "provider", "from", "to", "outcome"],
      done.map((one) => [one.tenant, one.provider, one.from, one.to, one.outcome]),
    );
    const [resealed, already] = [count("resealed"), count("already")];
    printer.note(`${resealed} of ${done.length} provider keys sealed anew with ${keys[0]?.id ?? ""}, ${already} were already, ${unopened} could not be opened`);
    if (idle.length > 0 && unopened === 0)
      printer.note(`nothing rests under ${idle.map((key) => key.id).join(", ")} any more; it can be taken out of the list`);
  }
  return unopened > 0 ? EXIT.refused : EXIT.done;
}
