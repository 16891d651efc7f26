// Goal: what is stopped by an entry says what it came to, once, and neither goes on nor begins again before the ledger has forgotten it: E2 to E4.
// Method: one effect in a ledger that never ends by itself, or ends when it is told to.
import { expect, test } from "vitest";
import { createEffectRunner, type EffectRunner } from "../../actors/effect-runner.ts";
import type { EffectScope } from "../../actors/performer.ts";
import type { Json, JsonObject } from "../../protocol/json.ts";
import { silentLog } from "../../protocol/log.ts";
import type { Running } from "../../state-machines/step.ts";

const LEDGER: Readonly<Record<string, Running>> = { model: { inst: "3:model", src: "call", input: null, attempt: 1 } };

function ground(says?: () => JsonObject) {
  const posted: string[] = [];
  const started: AbortSignal[] = [];
  let finish: (output: Json) => void = () => undefined;
  const runner: EffectRunner = createEffectRunner({
    performers: {
      call: (_input, scope) => {
        started.push(scope.signal);
        if (says !== undefined) scope.so_far(says);
        return new Promise((resolve) => (finish = resolve));
      },
    },
    log: silentLog,
    scope: (_effect, signal, so_far) => ({ signal, so_far }) as unknown as EffectScope,
    post: (entry) => posted.push(entry.t),
  });
  return { runner, posted, started, finish: (output: Json) => finish(output) };
}
const soon = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));

test("E4: what is ended tells what it came to, is aborted at once, and its result is not heard", async () => {
  const { runner, posted, started, finish } = ground(() => ({ used: 3 }));
  runner.reconcile(LEDGER, false);
  await soon();
  expect(runner.end("3:model")).toEqual({ used: 3 });
  expect(started[0]?.aborted).toBe(true);
  finish("too late");
  await soon();
  expect([posted, runner.working()]).toEqual([[], 0]);
});

test("E2: between its end and the commit that says so, a ledger that still names it does not begin it again; the next one may", async () => {
  const { runner, started } = ground(() => ({}));
  runner.reconcile(LEDGER, false);
  await soon();
  runner.end("3:model");
  runner.reconcile(LEDGER, false);
  expect(started).toHaveLength(1);
  runner.reconcile({}, false);
  runner.reconcile(LEDGER, false);
  expect(started).toHaveLength(2);
});

test("one whose result waits to be journaled tells what it came to as well", async () => {
  const { runner, posted, finish } = ground(() => ({ used: 5 }));
  runner.reconcile(LEDGER, false);
  await soon();
  finish("done");
  await soon();
  expect([posted, runner.end("3:model")]).toEqual([["done"], { used: 5 }]);
});

test("one that has nothing to say is left to the commit, and one that is not here is nobody", async () => {
  const { runner, started } = ground();
  runner.reconcile(LEDGER, false);
  await soon();
  expect([runner.end("3:model"), runner.end("9:model"), started[0]?.aborted]).toEqual([undefined, undefined, false]);
  runner.reconcile({}, false);
  expect(started[0]?.aborted).toBe(true);
});
