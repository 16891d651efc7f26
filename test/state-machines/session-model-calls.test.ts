// Goal:   each call that a model call took is told and counted once, and each attempt settles its hold once, however it ended.
// Method: short stories, each step through drive.ts, which repeats it on the state loaded from its snapshot.
import { describe, expect, test } from "vitest";
import type { JsonObject } from "../../protocol/json.ts";
import { answer, callMade, callOfBefore, expectInvariants, type SessionDrive, thinking } from "./session-drive.ts";

describe("the calls of a model call", () => {
  const usage = { input_tokens: 5, output_tokens: 2, cache_read_tokens: 0, cache_write_tokens: 0, reasoning_tokens: 0 };
  const answered = (number: number): JsonObject =>
    callMade(number, { outcome: "completed", code: null, message: null, usage, cost_usd_micros: 25, model: "simulated/echo" });
  const judged = (number: number): JsonObject => ({ ...answered(number), purpose: "guardrail", rule: "kind", cost_usd_micros: 3 });
  const next = (more: JsonObject = {}): JsonObject => ({
    model: "openai/b",
    try: 2,
    wait_ms: 4_000,
    code: "rate_limited",
    message: "too many",
    purpose: "answer",
    left: ["simulated/echo"],
    ...more,
  });
  const says = (drive: SessionDrive, attempts: readonly JsonObject[], more: JsonObject = {}): SessionDrive => {
    drive.apply({ t: "progress", inst: drive.instOf("model"), told: { attempts, skipped: [], next: next(more) } });
    return drive;
  };
  const settlements = (drive: SessionDrive): JsonObject[] => drive.out.filter(({ type }) => type === "budget.settle").map(({ body }) => body);

  test("are told one by one before the end, which tells the one that answered; all of them count", () => {
    const drive = thinking();
    const skipped = [{ model: "anthropic/a", code: "circuit_open", message: "it is open", purpose: "answer" }];
    drive.done("model", { ...answer("fine"), attempts: [judged(1), callMade(2), answered(3)], skipped });
    expect(drive.told.slice(0, 4)).toMatchObject([
      { type: "model.skipped", turn: 1, step: 0, attempt: 1, model: "anthropic/a", code: "circuit_open" },
      { type: "model.tried", try: 1, purpose: "guardrail", rule: "kind", outcome: "completed", cost_usd_micros: 3 },
      { type: "model.tried", try: 2, purpose: "answer", model: "openai/b", outcome: "failed", code: "overloaded", usage: null },
      { type: "model.completed", model: "simulated/echo", cost_usd_micros: 25 },
    ]);
    expect(drive.context.usage).toMatchObject({ model_calls: 3, cost_usd_micros: 28, input_tokens: 10 });
    expect(settlements(drive).at(-1)).toMatchObject({ cost_usd_micros: 28 });
    expectInvariants(drive);
  });

  test("of a failure are told too, the last of them by the failure itself", () => {
    const drive = thinking();
    drive.fail("model", { code: "models_exhausted", message: "none", details: { model: "openai/b", attempts: [callMade(1), callMade(2)], usage: null } });
    expect(drive.types.slice(0, 3)).toEqual(["model.tried", "model.failed", "turn.failed"]);
    expect(drive.context.usage.model_calls).toBe(2);
    expectInvariants(drive);
  });

  test("of journals from before they were told are not told now, and count as they did", () => {
    const drive = thinking();
    drive.done("model", {
      ...answer("fine"),
      attempts: [callOfBefore(callMade(1)), callOfBefore(answered(2))],
      skipped: [{ model: "anthropic/a", code: "circuit_open", message: "it is open" }],
    });
    expect(drive.types).toEqual(["model.completed", "message.completed", "turn.completed", "session.state"]);
    expect(drive.context.usage).toMatchObject({ model_calls: 1, cost_usd_micros: 25 });
  });

  test("that are made again say for whom the session waits, until when and why; then it works, and nothing of it is left at the end", () => {
    const drive = says(thinking(), [callMade(1)]);
    const { waits } = drive.core.definition;
    expect(drive.told).toMatchObject([
      { type: "model.retrying", turn: 1, step: 0, attempt: 1, model: "openai/b", try: 2, wait_ms: 4_000, code: "rate_limited" },
    ]);
    expect(waits(drive.view, drive.at_ms + 1_500)).toBe("waits for provider openai: try 2 of openai/b in 2500 ms, because it answered 429 (rate_limited)");
    expect(waits(drive.view)).toContain("4000 ms after 1970-01-01T00:16:40.000Z");
    expect(waits(drive.view, drive.at_ms + 4_000)).toBeUndefined();
    says(drive, [callMade(1), callMade(2)], { wait_ms: 0, model: "simulated/echo", try: 1 });
    expect(waits(drive.view, drive.at_ms)).toBeUndefined();
    says(drive, [callMade(1), callMade(2)], { code: "circuit_open" });
    expect(waits(drive.view, drive.at_ms)).toContain("its circuit breaker is open (circuit_open)");
    drive.done("model", answer("fine"));
    expect(drive.context.retry).toBeNull();
    expectInvariants(drive);
  });

  test("S6: what they said changes no input, and is forgotten with the attempt that said it", () => {
    const drive = thinking();
    const { input, inst } = drive.state.running["model"]!;
    says(drive, [callMade(1)]);
    expect(drive.state.running["model"]).toMatchObject({ inst, input, attempt: 1, told: { next: { try: 2 } } });
    drive.claim();
    expect(drive.state.running["model"]).toEqual({ inst, input, src: "call_model", attempt: 2 });
    drive.apply({ t: "progress", inst: "1:model", told: { next: {} } });
    expect([drive.told, drive.state.running["model"]?.told]).toEqual([[], undefined]);
  });

  test("that are lost settle the hold, and at least what had ended before", () => {
    const drive = says(thinking(), [callMade(1, { usage, cost_usd_micros: 30 })]);
    drive.claim();
    expect(settlements(drive)).toMatchObject([{ hold: expect.stringMatching(/model\/1$/), cost_usd_micros: null, spent_usd_micros: 30 }]);
    drive.claim();
    expect(settlements(drive)[1]).toEqual({ hold: expect.stringMatching(/model\/2$/), cost_usd_micros: null });
  });

  test.each<[string, (drive: SessionDrive, stopped: Record<string, JsonObject>) => unknown]>([
    ["turn.cancel", (drive, stopped) => drive.apply({ t: "command", type: "turn.cancel", body: {}, channel: "control", stopped })],
    ["session.pause", (drive, stopped) => drive.apply({ t: "command", type: "session.pause", body: {}, channel: "control", stopped })],
    ["session.terminate", (drive, stopped) => drive.apply({ t: "command", type: "session.terminate", body: {}, channel: "control", stopped })],
    [
      "an interrupting message",
      (drive, stopped) => drive.apply({ t: "command", type: "message.send", body: { content: "no", on_busy: "interrupt" }, channel: "command", stopped }),
    ],
    [
      "its patience",
      (drive, stopped) => {
        const inst = Object.values(drive.state.timers).find((timer) => timer.inst.includes("model_patience"))?.inst ?? "";
        return drive.apply({ t: "timer", inst, stopped });
      },
    ],
  ])("that are stopped by %s are settled by what they had used, and told with it", (_, stop) => {
    const drive = thinking();
    const cancelled = callMade(2, { code: "cancelled", usage, cost_usd_micros: 12 });
    stop(drive, { [drive.instOf("model")]: { model: "openai/b", attempts: [callMade(1), cancelled], usage, cost_usd_micros: 12, price_version: "v" } });
    expect(drive.told.find(({ type }) => type === "model.failed")).toMatchObject({ model: "openai/b", usage, cost_usd_micros: 12 });
    expect(drive.told.find(({ type }) => type === "model.tried")).toMatchObject({ try: 1, code: "overloaded" });
    expect(settlements(drive)).toEqual([{ hold: expect.stringMatching(/model\/1$/), cost_usd_micros: 12, model: "openai/b" }]);
    expect(drive.context.usage).toMatchObject({ model_calls: 2, cost_usd_micros: 12 });
    expectInvariants(drive);
  });

  test("that were stopped before any was made cost nothing, and that nobody knows of, their hold", () => {
    const known = thinking();
    const stopped = { [known.instOf("model")]: { attempts: [], usage: null, cost_usd_micros: 0, price_version: null } };
    known.apply({ t: "command", type: "turn.cancel", body: {}, channel: "control", stopped });
    const unknown = thinking();
    unknown.tell("turn.cancel");
    expect([settlements(known)[0]?.["cost_usd_micros"], settlements(unknown)[0]?.["cost_usd_micros"]]).toEqual([0, null]);
  });
});
