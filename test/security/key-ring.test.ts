// Goal:   a sealed secret keeps KR1 to KR3: it opens for its owner alone, under the master key it names, and only unchanged.
// Method: secrets are sealed and then shown to the wrong tenant, provider, master key, and with each byte changed in turn; files of master keys with
//         each fault; a rotation from the first key to the last.
import { randomBytes } from "node:crypto";
import { inspect } from "node:util";
import { describe, expect, test } from "vitest";
import {
  drawMasterKey,
  faultOfSecret,
  lastFourOf,
  type MasterKey,
  MASTER_KEYS_MAX,
  openSecret,
  readMasterKeys,
  SECRET_CHARACTERS_MAX,
  sealSecret,
} from "../../protocol/key-ring.ts";

const SECRET = "sk-proj-0123456789abcdefghijklmnopqrstuv";
const ACME = { tenant: "acme", provider: "openai" };

function keysOf(...lines: readonly string[]): readonly MasterKey[] {
  const reading = readMasterKeys(lines.join("\n"));
  if (reading.kind === "invalid") throw new Error(reading.fault);
  return reading.keys;
}
const [first, second] = [drawMasterKey(randomBytes), drawMasterKey(randomBytes)];
const keys = keysOf(first.line);

describe("KR1: what is sealed", () => {
  const sealed = sealSecret(keys, SECRET, ACME, randomBytes);

  test("opens for its owner, and shows nothing of the secret while it is closed", () => {
    expect(openSecret(keys, sealed, ACME)).toEqual({ kind: "opened", secret: SECRET });
    const shown = JSON.stringify(sealed);
    for (const encoded of [SECRET, Buffer.from(SECRET).toString("base64url"), Buffer.from(SECRET).toString("hex")])
      expect(shown).not.toContain(encoded.slice(8, 24));
  });

  test.each([
    ["another tenant", { tenant: "rival", provider: "openai" }],
    ["another provider", { tenant: "acme", provider: "anthropic" }],
    ["two names whose letters run together to the same", { tenant: "acm", provider: "eopenai" }],
  ])("does not open for %s", (_who, owner) => {
    expect(openSecret(keys, sealed, owner)).toEqual({ kind: "refused", reason: "damaged", master_key_id: first.id });
  });

  test("does not open with any byte of nonce or ciphertext changed, nor cut short", () => {
    for (const field of ["nonce", "ciphertext"] as const) {
      const bytes = Buffer.from(sealed[field], "base64url");
      for (let at = 0; at < bytes.byteLength; at++) {
        const changed = Buffer.from(bytes);
        changed[at] = changed[at]! ^ 1;
        expect(openSecret(keys, { ...sealed, [field]: changed.toString("base64url") }, ACME).kind).toBe("refused");
        expect(openSecret(keys, { ...sealed, [field]: bytes.subarray(0, at).toString("base64url") }, ACME).kind).toBe("refused");
      }
    }
  });

  test("does not open under another master key of the same id, and says of an unknown one that it is unknown", () => {
    const impostor = keysOf(`${first.id}:${randomBytes(32).toString("base64")}`);
    expect(openSecret(impostor, sealed, ACME)).toEqual({ kind: "refused", reason: "damaged", master_key_id: first.id });
    expect(openSecret(keysOf(second.line), sealed, ACME)).toEqual({ kind: "refused", reason: "unknown_master_key", master_key_id: first.id });
    const renamed = { ...sealed, master_key_id: second.id };
    expect(openSecret(keysOf(second.line, first.line), renamed, ACME).kind).toBe("refused");
  });

  test("is another text each time, though the secret is the same", () => {
    const all = Array.from({ length: 50 }, () => sealSecret(keys, SECRET, ACME, randomBytes));
    expect(new Set(all.map((one) => one.nonce)).size).toBe(50);
    expect(new Set(all.map((one) => one.ciphertext)).size).toBe(50);
  });
});

test("KR2: the first master key seals, each one listed opens, and after sealing anew the old one is not needed", () => {
  const before = sealSecret(keys, SECRET, ACME, randomBytes);
  const both = keysOf(second.line, first.line);
  expect(openSecret(both, before, ACME)).toEqual({ kind: "opened", secret: SECRET });
  const after = sealSecret(both, SECRET, ACME, randomBytes);
  expect([before.master_key_id, after.master_key_id]).toEqual([first.id, second.id]);
  expect(openSecret(keysOf(second.line), after, ACME)).toEqual({ kind: "opened", secret: SECRET });
});

describe("a list of master keys", () => {
  const key = (id: string): string => `${id}:${randomBytes(32).toString("base64")}`;

  test("may stand in lines, with commas, in either base64, with remarks", () => {
    const url = `c:${randomBytes(32).toString("base64url")}`;
    expect(keysOf(`# ours, of May\n${key("a")},${key("b")}  # the old one, soon gone\n\n  ${url}`).map((one) => one.id)).toEqual(["a", "b", "c"]);
  });

  const twice = key("twice");
  test.each([
    ["nothing", "  \n# only a remark\n"],
    ["a key without an id", randomBytes(32).toString("base64")],
    ["31 bytes", `a:${randomBytes(31).toString("base64")}`],
    ["33 bytes", `a:${randomBytes(33).toString("base64")}`],
    ["an id with a blank in it", `a b:${randomBytes(32).toString("base64")}`],
    ["an id twice", `${twice}\n${twice}`],
    ["too many", Array.from({ length: MASTER_KEYS_MAX + 1 }, (_, n) => key(`k${n}`)).join("\n")],
  ])("with %s is refused", (_what, text) => {
    expect(readMasterKeys(text).kind).toBe("invalid");
  });

  test("KR3: is refused, and printed, without any of its keys", () => {
    const secret = randomBytes(32).toString("base64");
    for (const text of [`bad id:${secret}`, `a:${secret}x`, `a:${secret}\na:${secret}`]) {
      const reading = readMasterKeys(text);
      expect(reading.kind).toBe("invalid");
      expect(JSON.stringify(reading)).not.toContain(secret.slice(0, 12));
    }
    const printed = inspect(keysOf(`a:${secret}`), { depth: 9, showHidden: true }) + JSON.stringify(keysOf(`a:${secret}`));
    for (const shown of [secret, Buffer.from(secret, "base64").toString("hex")]) expect(printed).not.toContain(shown.slice(0, 12));
  });
});

test("a provider's key is a text that fits a header, and its fault is told without it", () => {
  expect(["x".repeat(8), SECRET, "y".repeat(SECRET_CHARACTERS_MAX)].map(faultOfSecret)).toEqual([undefined, undefined, undefined]);
  for (const wrong of ["", "short", "a key with blanks", `${SECRET}\n`, "schlüssel-äöü", "y".repeat(SECRET_CHARACTERS_MAX + 1), 12345678, null, {}]) {
    const fault = faultOfSecret(wrong);
    expect(fault).toMatch(/printable ASCII/);
    if (typeof wrong === "string" && wrong.length > 5) expect(fault).not.toContain(wrong);
  }
});

test("people tell a key by its last four characters, unless they would be much of it", () => {
  expect(lastFourOf(SECRET)).toBe("stuv");
  expect(lastFourOf("short-key-12345")).toBeNull();
});
