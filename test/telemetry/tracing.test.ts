// tracing: Goal: spans reach a collector with their attributes and parents, nothing else leaves, and tracing that is off costs nothing.
// Method: a collector on 127.0.0.1 that keeps what it is sent; the loaded modules of a fresh process.
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import { expect, test } from "vitest";
import { silentLog } from "../../protocol/log.ts";
import { formatTraceparent, newTraceparent, noTracing, parseTraceparent, startTracing } from "../../telemetry/tracing.ts";
import { attributesOf, type CollectedSpan, startSpanCollector } from "../harness/span-collector.ts";

const TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

test("a traceparent is read and written as it is, and anything else is none", () => {
  const parsed = parseTraceparent(TRACE);
  expect(parsed).toEqual({ trace_id: "0af7651916cd43dd8448eb211c80319c", span_id: "b7ad6b7169203331", sampled: true });
  expect(parsed && formatTraceparent(parsed)).toBe(TRACE);
  expect(parseTraceparent(TRACE.replace(/-01$/, "-00"))?.sampled).toBe(false);
  expect(parseTraceparent(`cc${TRACE.slice(2)}-more`)?.sampled).toBe(true);
  for (const text of [
    undefined,
    "",
    "00",
    `${TRACE}-more`,
    `ff${TRACE.slice(2)}`,
    TRACE.toUpperCase(),
    `00-${"0".repeat(32)}-b7ad6b7169203331-01`,
    TRACE.replace("b7ad6b7169203331", "0".repeat(16)),
  ])
    expect(parseTraceparent(text)).toBeUndefined();
  expect(parseTraceparent(newTraceparent())?.sampled).toBe(true);
});

test("without an endpoint the work runs, the trace is handed on, and nothing is started", async () => {
  const tracing = await startTracing({ endpoint: undefined, service_name: "troupe-test", instance: "1", log: silentLog });
  expect(tracing).toBe(noTracing);
  expect(await tracing.withSpan("turn", { trace: TRACE, attributes: { tenant: "acme" } }, async (span) => span.trace)).toBe(TRACE);
  expect(await tracing.withSpan("turn", { trace: "rubbish", attributes: { tenant: "acme" } }, async (span) => span.trace)).toBeUndefined();
  await expect(tracing.withSpan("turn", { attributes: { tenant: "acme" } }, () => Promise.reject(new Error("thrown")))).rejects.toThrow("thrown");
});

test("importing telemetry loads nothing of OpenTelemetry", () => {
  const script = `
    import { registerHooks } from "node:module";
    registerHooks({ load(url, context, next) { if (url.includes("opentelemetry")) throw new Error("loaded " + url); return next(url, context); } });
    const began = performance.now();
    await import(${JSON.stringify(join(import.meta.dirname, "../../telemetry/tracing.ts"))});
    console.log((performance.now() - began).toFixed(1));`;
  const child = spawnSync(process.execPath, ["--input-type=module", "-e", script], { encoding: "utf8" });
  expect(child.stderr).not.toContain("loaded");
  expect(child.status).toBe(0);
  console.log(`  import of tracing: ${child.stdout.trim()} ms`);
});

test("spans arrive with attributes, parents and marks; errors by name only; nothing but spans is sent", async () => {
  const collector = await startSpanCollector();
  const began_ms = performance.now();
  const tracing = await startTracing({
    endpoint: collector.url,
    service_name: "troupe-test",
    instance: "w1",
    log: silentLog,
  });
  console.log(`  start of tracing: ${Math.round(performance.now() - began_ms)} ms`);
  const handed = await tracing.withSpan("turn", { trace: TRACE, attributes: { tenant: "acme", session: "s1", agent: "a1" } }, async (turn) => {
    turn.mark("first_token");
    turn.set("attempt", 2);
    const failing = tracing.withSpan("model", { attributes: { tenant: "acme", session: "s1" } }, () => Promise.reject(new TypeError("CUSTOMER TEXT")));
    await expect(failing).rejects.toThrow("CUSTOMER TEXT");
    return turn.trace;
  });
  await tracing.withSpan("elsewhere", { trace: handed, attributes: { tenant: "acme" } }, async () => undefined);
  await tracing.stop();

  const spans = collector.spans();
  const span = (name: string): CollectedSpan => spans.find((one) => one.name === name) as CollectedSpan;
  expect(spans.map(({ name }) => name).sort()).toEqual(["elsewhere", "model", "turn"]);
  expect(new Set(spans.map(({ traceId }) => traceId))).toEqual(new Set(["0af7651916cd43dd8448eb211c80319c"]));
  expect(span("turn").parentSpanId).toBe("b7ad6b7169203331");
  expect(span("model").parentSpanId).toBe(span("turn").spanId);
  expect(span("elsewhere").parentSpanId).toBe(span("turn").spanId);
  for (const one of spans) expect(one.attributes.map(({ key }) => key)).toContain("tenant");
  expect(attributesOf(span("turn"))).toMatchObject({
    tenant: "acme",
    session: "s1",
    agent: "a1",
    attempt: 2,
    instance: "w1",
  });
  expect(span("turn").events?.map(({ name }) => name)).toEqual(["first_token"]);
  expect(span("model").status).toMatchObject({ code: 2, message: "TypeError" });
  expect(collector.received.join("")).not.toContain("CUSTOMER TEXT");
  expect(collector.received.join("")).not.toContain("process.command");
  expect([...collector.paths]).toEqual(["/v1/traces"]);
});
