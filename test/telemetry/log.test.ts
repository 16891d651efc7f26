// log: Goal: a line is one fact, bounded, and bears no credential. Method: lines caught and searched for planted secrets.
import { describe, expect, test } from "vitest";
import { createLog, lineForPeople, type LogOptions, withAttribution } from "../../telemetry/log.ts";

function listening(options: Partial<LogOptions> = {}) {
  const lines: string[] = [];
  const log = createLog({ level: "debug", fields: { role: "worker", id: "w1" }, write: (line) => void lines.push(line), ...options });
  return { log, lines, last: () => JSON.parse(lines.at(-1) ?? "{}") as Record<string, unknown> };
}

test("a line is JSON with its level, its time, what happened, and the fields of the process, the room and the fact", () => {
  const { log, last, lines } = listening();
  log.with({ room: "projections" }).warn("the projection waits", { position: 7, reason: "away" });
  expect(last()).toMatchObject({ level: "warn", what: "the projection waits", role: "worker", id: "w1", room: "projections", position: 7, reason: "away" });
  expect(last().at).toMatch(/^\d{4}-\d\d-\d\dT[\d:.]+Z$/);
  expect(lines[0]?.endsWith("\n")).toBe(true);
});

test("levels below the chosen one say nothing", () => {
  const { log, lines } = listening({ level: "warn" });
  log.debug("a");
  log.info("b");
  log.warn("c");
  log.error("d");
  expect(lines.length).toBe(2);
});

describe("credentials", () => {
  const SECRET = "S3CRETsentinelS3CRETsentinelS3CRETsentinelx";
  const planted: Record<string, unknown>[] = [
    { authorization: SECRET },
    { Authorization: SECRET },
    { headers: { authorization: SECRET, "x-api-key": SECRET } },
    { a: { b: { c: [{ password: SECRET }] } } },
    { api_key: SECRET, provider_token: SECRET, client_secret: SECRET, cookie: SECRET },
    { text: `the key troupe.acme.abcdef123456.${SECRET} was refused` },
    { text: `Authorization: Bearer ${SECRET}` },
    { text: `postgres://troupe:${SECRET}@127.0.0.1:5432/troupe is away` },
    { text: `sk-${SECRET} and AIza${SECRET}` },
    { text: `eyJ${SECRET}.${SECRET}.${SECRET}` },
  ];
  test("stand in no line, whatever field or text they are planted in", () => {
    const { log, lines } = listening();
    for (const fields of planted) {
      log.error("planted", fields as never);
      log.with(fields as never).info("planted in a child");
    }
    log.info(`in the sentence: Bearer ${SECRET}`);
    createLog({ level: "info", fields: { token: SECRET, url: `nats://u:${SECRET}@h` }, write: (line) => void lines.push(line) }).info(
      "in the process's own fields",
    );
    expect(lines.length).toBe(planted.length * 2 + 2);
    expect(lines.filter((line) => line.includes(SECRET))).toEqual([]);
    expect(lines.join("")).toContain("troupe.acme.abcdef123456.[redacted]");
  });

  test("counts and names that only sound like one stay", () => {
    const { log, last } = listening();
    log.info("a", { input_tokens: 5, key_id: "k1", key_source: "platform", tokens: 3, monkey: "m" });
    expect(last()).toMatchObject({ input_tokens: 5, key_id: "k1", key_source: "platform", tokens: 3, monkey: "m" });
  });
});

test("a line is bounded however large, deep or long its fields are, and written quickly", () => {
  const { log, lines } = listening();
  let deep: unknown = "end";
  for (let depth = 0; depth < 100_000; depth += 1) deep = { deep };
  const began_ms = performance.now();
  log.info("large", { text: "a".repeat(5_000_000), deep: deep as never, many: Array.from({ length: 100_000 }, (_, index) => index) });
  log.info("hostile", { text: "a://:".repeat(100_000), other: "eyJ".repeat(100_000), third: "Bearer ".repeat(100_000) });
  expect(performance.now() - began_ms).toBeLessThan(10_000);
  expect(lines.length).toBe(2);
  expect(Math.max(...lines.map((line) => line.length))).toBeLessThan(20_000);
});

test("a field cannot take the place of the level, the time or the sentence, and odd fields do not throw", () => {
  const { log, last, lines } = listening();
  log.info("true %s %d", { what: "false", level: "error", at: "never" } as never);
  expect(last()).toMatchObject({ what: "true %s %d", level: "info", what_: "false", level_: "error", at_: "never" });
  expect(lines[0]?.match(/"what"/g)?.length).toBe(1);
  log.info("a newline \n in it", { number: 1n, nothing: undefined, date: new Date(0), fail: () => 1 } as never);
  expect(lines.length).toBe(2);
  expect(lines[1]?.trimEnd().includes("\n")).toBe(false);
});

test("a stream that throws does not throw into the room", () => {
  const { log } = listening({
    write: () => {
      throw new Error("EPIPE");
    },
  });
  expect(() => log.error("nobody hears")).not.toThrow();
});

test("for people a line is time, level, sentence and fields", () => {
  const { log, lines } = listening({ for_people: true });
  log.warn("it waits", { reason: "Postgres is away", position: 7 });
  expect(lines[0]).toMatch(/^\d\d:\d\d:\d\d\.\d{3} warn {2}it waits {2}role=worker id=w1 reason="Postgres is away" position=7\n$/);
  expect(lineForPeople('{"level":"info","at":"2026-11-21T05:00:00.000Z","what":"x"}')).toBe("05:00:00.000 info  x\n");
});

test("a line names its tenant and session by its actor, or by the work within which it is said; what it names itself counts", async () => {
  const lines: string[] = [];
  const log = createLog({ level: "debug", fields: { role: "test" }, write: (line) => void lines.push(line) });
  const last = (): Record<string, unknown> => JSON.parse(lines.at(-1) ?? "{}") as Record<string, unknown>;
  log.info("x", { actor: "acme/session/s1" });
  expect(last()).toMatchObject({ actor: "acme/session/s1", tenant: "acme", session: "s1" });
  log.info("x", { actor: "acme/budget/main" });
  expect([last()["tenant"], last()["session"]]).toEqual(["acme", undefined]);
  await withAttribution({ tenant: "acme", session: "s1" }, async () => {
    await Promise.resolve();
    log.info("x");
    expect(last()).toMatchObject({ tenant: "acme", session: "s1" });
    log.info("x", { tenant: "acme", inst: "3:model" });
    expect(last()).toMatchObject({ tenant: "acme", session: "s1", inst: "3:model" });
    log.info("x", { tenant: "rival" });
    expect([last()["tenant"], last()["session"]]).toEqual(["rival", undefined]);
    log.info("x", { actor: "rival/session/s2" });
    expect([last()["tenant"], last()["session"]]).toEqual(["rival", "s2"]);
  });
  log.info("x", { actor: "no actor" });
  expect(last()["tenant"]).toBeUndefined();
});
