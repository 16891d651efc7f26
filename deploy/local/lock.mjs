// lock: one process at a time does a piece of installing; the others wait and say so.
// Plain JavaScript without dependencies: it runs before anything is installed, on any Node ≥ 20.
//
// The lock is a file that names its holder. The holder touches it every second, so a lock is dead when its process is gone
// from this machine, or when nobody touched it for half a minute (a holder in another container, whose pid means nothing here).
//
// Invariants:
//   L1. The file is made with `wx`: of any number of processes exactly one makes it.
//   L2. A dead lock is moved aside before a new one is made, and moved back when what was moved turns out to be alive.
import { mkdirSync, readFileSync, renameSync, rmSync, statSync, utimesSync, writeFileSync } from "node:fs";
import { randomBytes } from "node:crypto";
import { hostname } from "node:os";
import { dirname } from "node:path";

const TOUCH_MS = 1_000;
/** Thirty missed touches: a holder is busy waiting for child processes, so its own loop is free. */
const DEAD_AFTER_MS = 30 * TOUCH_MS;
/** Longer than any install over a slow line should take; then a person must look. */
const PATIENCE_MS = 20 * 60_000;

/**
 * Runs `work` while this process alone holds the lock.
 *
 * Promises: the lock is given back however `work` ends.
 * Limits:   waits 20 minutes at most, then throws.
 *
 * @template T
 * @param {string} path
 * @param {(line: string) => void} say
 * @param {() => Promise<T>} work
 * @returns {Promise<T>}
 */
export async function withLock(path, say, work) {
  mkdirSync(dirname(path), { recursive: true });
  const mine = JSON.stringify({ pid: process.pid, host: hostname(), nonce: randomBytes(8).toString("hex") });
  const began_ms = Date.now();
  for (let waited = false; !take(path, mine); waited = true) {
    const theirs = read(path);
    if (theirs === undefined) continue;
    if (isDead(theirs)) {
      moveAside(path, theirs.text);
      continue;
    }
    if (!waited) say(`another process (pid ${theirs.pid}) is installing; waiting for it`);
    if (Date.now() - began_ms > PATIENCE_MS)
      throw new Error(`${path} has been held by pid ${theirs.pid} for too long; if that process is stuck, end it and delete the file`);
    await new Promise((resolve) => setTimeout(resolve, 200));
  }
  const touching = setInterval(() => touch(path), TOUCH_MS);
  try {
    return await work();
  } finally {
    clearInterval(touching);
    if (read(path)?.text === mine) rmSync(path, { force: true });
  }
}

/** L1 */
function take(path, mine) {
  try {
    writeFileSync(path, mine, { flag: "wx" });
    return true;
  } catch (error) {
    if (error.code === "EEXIST") return false;
    throw error;
  }
}

function read(path) {
  try {
    const text = readFileSync(path, "utf8");
    const touched_at_ms = statSync(path).mtimeMs;
    let holder = {};
    try {
      holder = JSON.parse(text);
    } catch {
      // Made, not yet written: its age decides.
      holder = {};
    }
    return { text, touched_at_ms, pid: holder.pid, host: holder.host };
  } catch (error) {
    if (error.code === "ENOENT") return undefined;
    throw error;
  }
}

function isDead(lock) {
  if (Date.now() - lock.touched_at_ms > DEAD_AFTER_MS) return true;
  if (lock.host !== hostname() || !Number.isInteger(lock.pid)) return false;
  try {
    process.kill(lock.pid, 0);
    return false;
  } catch (error) {
    return error.code === "ESRCH";
  }
}

/** L2 */
function moveAside(path, dead_text) {
  const aside = `${path}.${randomBytes(4).toString("hex")}`;
  try {
    renameSync(path, aside);
    if (readFileSync(aside, "utf8") === dead_text) rmSync(aside, { force: true });
    else renameSync(aside, path);
  } catch (error) {
    if (error.code !== "ENOENT") throw error;
  }
}

function touch(path) {
  try {
    const now = new Date();
    utimesSync(path, now, now);
  } catch (error) {
    if (error.code !== "ENOENT") throw error;
  }
}
