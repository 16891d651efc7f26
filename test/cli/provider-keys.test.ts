// Goal:   `troupe provider-keys` takes a key from stdin alone, shows none, and seals everything anew with the newest master key, saying what it did; a
//         file of master keys is read again when it changes, and a bad one changes nothing (MK1).
// Method: a whole Troupe in this thread; master keys in a file of this test, through what the processes use.
import { randomBytes } from "node:crypto";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import type { CliPorts } from "../../cli/ports.ts";
import { drawMasterKey } from "../../protocol/key-ring.ts";
import { silentLog } from "../../protocol/log.ts";
import { addMasterKey, openMasterKeys } from "../../roles/master-keys.ts";
import { freshFolder } from "../harness/servers.ts";
import { type Ground, type Ran, startGround } from "./ground.ts";

const SECRET = "sk-proj-0123456789abcdefWXYZ";
const file = join(freshFolder("master-keys"), "master-keys");
const random_bytes = (count: number): Uint8Array => randomBytes(count);
const master_keys: CliPorts["master_keys"] = {
  read: () => openMasterKeys({ TROUPE_MASTER_KEYS_FILE: file }, silentLog)(),
  add: () => addMasterKey(file, random_bytes),
};

let ground: Ground;
const troupe = (words: string, input?: string): Promise<Ran> =>
  ground.cli(words.split(" "), { master_keys, random_bytes, ...(input === undefined ? {} : { input }) });

const documentOf = ({ stdout }: Ran): Record<string, unknown> => JSON.parse(stdout) as Record<string, unknown>;

beforeAll(async () => {
  writeFileSync(file, `${drawMasterKey(random_bytes).line}\n`);
  ground = await startGround();
  for (const tenant of ["acme", "rival"]) expect((await troupe(`tenants create ${tenant}`)).code).toBe(0);
});
afterAll(() => ground.stop());

test("a key is read from stdin, set, listed by its last four characters, and never printed", async () => {
  const set = await troupe("provider-keys set --tenant acme openai --label team --json", `${SECRET}\n`);
  expect(set).toMatchObject({ code: 0 });
  expect(documentOf(set)).toMatchObject({ tenant: "acme", provider: "openai", last_four: "WXYZ", version: 1 });
  const people = await troupe("provider-keys set --tenant rival openai", SECRET);
  const listed = await troupe("provider-keys list --tenant acme");
  expect(listed.stdout).toMatch(/openai +team +…WXYZ +1/);
  for (const { stdout, stderr } of [set, people, listed, await troupe("show acme/tenant/main"), await troupe("replay acme/tenant/main --json")])
    expect(stdout + stderr).not.toMatch(/sk-proj|0123456789abcdefWXYZ/);
});

test("what is no key, and a machine without master keys, are refused by name and nothing is said", async () => {
  for (const input of ["", "short", `${SECRET} ${SECRET}`, "x".repeat(5000)]) {
    const ran = await troupe("provider-keys set --tenant acme google", input);
    expect(ran.code).toBe(1);
    expect(ran.stderr).toMatch(/^invalid: no key was read from stdin/m);
    expect(ran.stderr).not.toContain(SECRET);
  }
  const bare = await ground.cli(["provider-keys", "set", "--tenant", "acme", "google"], { input: SECRET });
  expect(bare).toMatchObject({ code: 1, stderr: expect.stringContaining("no master keys here") });
  expect(documentOf(await troupe("provider-keys list --tenant acme --json"))).toMatchObject({ provider_keys: [{ provider: "openai" }] });
  expect(await troupe("provider-keys remove --tenant acme google")).toMatchObject({ code: 1, stderr: expect.stringContaining("not_found") });
});

test("rotate seals every tenant's keys with the newest master key, once, and names what it could not open", async () => {
  const [old] = readFileSync(file, "utf8").split(":");
  const first = documentOf(await troupe("provider-keys rotate --new --json"));
  expect(first).toMatchObject({ resealed: 2, unopened: 0, unused_master_keys: [old] });
  expect(documentOf(await troupe("provider-keys rotate --json"))).toMatchObject({ resealed: 0, unopened: 0 });
  expect(documentOf(await troupe("provider-keys rotate --tenant acme --new --json"))).toMatchObject({ resealed: 1, unused_master_keys: [] });
  const lines = readFileSync(file, "utf8").trim().split("\n");
  expect(lines).toHaveLength(3);
  // Only the newest is left: the other tenant's key rests under the one before.
  writeFileSync(file, `${lines[0]}\n`);
  const lost = await troupe("provider-keys rotate");
  expect(lost).toMatchObject({ code: 1, stderr: expect.stringContaining("0 of 2 provider keys sealed anew") });
  expect(lost.stdout).toMatch(/rival +openai .*unknown_master_key/);
  writeFileSync(file, lines.join("\n"));
  expect(documentOf(await troupe("provider-keys rotate --json"))).toMatchObject({ resealed: 1, unopened: 0, unused_master_keys: [expect.any(String), old] });
});

test("MK1: a file of master keys is read again when it changes, and one with a fault changes nothing", () => {
  const place = join(freshFolder("master-keys"), "keys");
  const [one, two] = [drawMasterKey(random_bytes), drawMasterKey(random_bytes)];
  writeFileSync(place, one.line);
  const faults: unknown[] = [];
  const keys = openMasterKeys({ TROUPE_MASTER_KEYS_FILE: place }, { ...silentLog, error: (_what, fields) => void faults.push(fields) });
  const ids = (): readonly string[] => keys().map(({ id }) => id);
  expect(ids()).toEqual([one.id]);
  writeFileSync(place, `${two.line}\n${one.line}\n`);
  expect(ids()).toEqual([two.id, one.id]);
  writeFileSync(place, "what is this?\n");
  expect([ids(), ids(), faults.length]).toEqual([[two.id, one.id], [two.id, one.id], 1]);
  expect(JSON.stringify(faults)).not.toContain("what is this");
  writeFileSync(place, `${one.line}\n`);
  expect(ids()).toEqual([one.id]);
  expect(() => openMasterKeys({ TROUPE_MASTER_KEYS_FILE: join(place, "..", "absent") }, silentLog)).toThrow(/absent/);
});
