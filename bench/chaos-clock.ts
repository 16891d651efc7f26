// chaos-clock: loaded before a process whose wall clock is to jump (`node --import`). It adds to the time of day what the file
// $CHAOS_CLOCK_FILE says, in milliseconds, and leaves the monotonic clock alone: what a corrected system clock looks like from inside.
import { readFileSync, watchFile } from "node:fs";

const file = process.env["CHAOS_CLOCK_FILE"];
if (file !== undefined) {
  const RealDate = Date;
  let offset_ms = 0;
  const read = (): void => {
    offset_ms = Number(readFileSync(file, "utf8")) || 0;
  };
  read();
  // A process must not be kept alive by its clock.
  watchFile(file, { interval: 50, persistent: false }, read);
  const now = (): number => RealDate.now() + offset_ms;
  globalThis.Date = new Proxy(RealDate, {
    construct: (target, args: [], as) => Reflect.construct(target, args.length === 0 ? [now()] : args, as) as object,
    apply: () => new RealDate(now()).toString(),
    get: (target, name) => (name === "now" ? now : (Reflect.get(target, name) as unknown)),
  });
}
