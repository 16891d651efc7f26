// pattern-thread: matches one expression after another, in a thread of its own, which whoever waits for it may end: an expression that takes
// for ever takes it here, and holds up no actor.
import { parentPort } from "node:worker_threads";

parentPort?.on("message", ({ id, pattern, flags, text }: { id: number; pattern: string; flags: string; text: string }) => {
  parentPort?.postMessage({ id, matches: new RegExp(pattern, flags).test(text) }, []);
});
// An expression's time is counted from here on, and not from the start of its thread.
parentPort?.postMessage({ ready: true }, []);
