// master-keys: the keys under which tenants' secrets rest, as this process was given them: in its environment, or in a file that is read anew
// whenever it changes, so that a new master key needs no restart.
//
// Invariants:
//   MK1. A file that cannot be read any more, or has a fault, changes nothing: what was known stays, and the log says so once for each change.
//   MK2. A process that was given none runs; tenants' own keys can then be neither taken nor used, and each asking says why.
import { readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { drawMasterKey, type MasterKey, readMasterKeys } from "../protocol/key-ring.ts";
import { errorFields, type Log } from "../protocol/log.ts";
import type { Settings } from "./settings.ts";

type MasterKeySettings = Pick<Settings, "TROUPE_MASTER_KEYS" | "TROUPE_MASTER_KEYS_FILE">;

/** The master keys as they are at each call, the one that seals first. Throws at once for a file that has a fault when the process begins. */
export function openMasterKeys({ TROUPE_MASTER_KEYS: text, TROUPE_MASTER_KEYS_FILE: file }: MasterKeySettings, log: Log): () => readonly MasterKey[] {
  if (text !== undefined) {
    const keys = parsed(text, "TROUPE_MASTER_KEYS");
    return () => keys;
  }
  if (file === undefined) return () => []; // MK2
  let known = parsed(readFileSync(file, "utf8"), file);
  let seen = stampOf(file);
  return () => {
    const stamp = stampOf(file);
    if (stamp === seen) return known;
    seen = stamp;
    try {
      known = parsed(readFileSync(file, "utf8"), file);
    } catch (error) {
      log.error("the master keys cannot be read again; those that were known stay", errorFields(error)); // MK1
    }
    return known;
  };
}

/** Draws a master key and puts it before the others of a file: from now on it seals. Answers its id. */
export function addMasterKey(file: string, random_bytes: (count: number) => Uint8Array): string {
  const text = readFileSync(file, "utf8");
  parsed(text, file);
  const { id, line } = drawMasterKey(random_bytes);
  writeFileSync(`${file}.new`, `${line}\n${text}`, { mode: 0o600 });
  renameSync(`${file}.new`, file);
  return id;
}

function parsed(text: string, where: string): readonly MasterKey[] {
  const reading = readMasterKeys(text);
  if (reading.kind === "invalid") throw new Error(`${where}: ${reading.fault}`);
  return reading.keys;
}

/** Changes with the file; a mount that swaps a link shows another inode. */
function stampOf(file: string): string {
  const stats = statSync(file, { throwIfNoEntry: false });
  return stats === undefined ? "absent" : `${stats.ino} ${stats.mtimeMs} ${stats.size}`;
}
