// memory-probe: loaded into a worker beside its program (`--import`). On SIGUSR2 it collects what nobody holds and writes what is left, in bytes,
// to MEMORY_PROBE_FILE: { live_bytes: heap in use and buffers, resident_bytes: as the system counts }.
import { renameSync, writeFileSync } from "node:fs";

process.on("SIGUSR2", () => {
  if (globalThis.gc === undefined) throw new Error("the probe needs --expose-gc");
  // Twice: what a first collection finds out about finalizers, the second one takes away.
  globalThis.gc();
  globalThis.gc();
  const { heapUsed, external, rss } = process.memoryUsage();
  const file = process.env["MEMORY_PROBE_FILE"];
  if (file === undefined) throw new Error("the probe needs MEMORY_PROBE_FILE");
  writeFileSync(`${file}.new`, JSON.stringify({ live_bytes: heapUsed + external, resident_bytes: rss }));
  renameSync(`${file}.new`, file);
});
