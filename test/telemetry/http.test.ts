// http: Goal: liveness never hangs on others, readiness names what is not well, metrics are text. Method: a real server on 127.0.0.1.
import { afterEach, expect, test } from "vitest";
import { silentLog } from "../../protocol/log.ts";
import { type Readiness, startStatusServer, type StatusServer } from "../../telemetry/http.ts";
import { createMetrics } from "../../telemetry/metrics.ts";

let server: StatusServer | undefined;
afterEach(async () => server?.stop());

async function serving(ready: () => Readiness | Promise<Readiness>): Promise<string> {
  server = await startStatusServer({ port: 0, ready, metrics: createMetrics("projector"), log: silentLog });
  return server.url;
}

test("readiness is 200 when all components are well, else 503 with the names", async () => {
  let postgres = { ok: true } as Readiness[string];
  const url = await serving(() => ({ bus: { ok: true }, postgres }));
  const well = await fetch(`${url}/readyz`);
  expect([well.status, await well.json()]).toEqual([200, { ok: true, components: { bus: { ok: true }, postgres: { ok: true } } }]);
  postgres = { ok: false, detail: "connection refused" };
  const unwell = await fetch(`${url}/readyz?verbose`);
  expect([unwell.status, await unwell.json()]).toEqual([503, { ok: false, components: { bus: { ok: true }, postgres } }]);
  expect(unwell.headers.get("cache-control")).toBe("no-store");
});

test("readiness that throws or never answers is 503, and liveness does not care", async () => {
  const throwing = await serving(() => {
    throw new Error("broken");
  });
  const broken = await fetch(`${throwing}/readyz`);
  expect([broken.status, JSON.stringify(await broken.json())]).toEqual([503, expect.stringContaining("broken")]);
  expect((await fetch(`${throwing}/healthz`)).status).toBe(200);
  await server?.stop();
  const silent = await serving(() => new Promise(() => {}));
  const waits = fetch(`${silent}/readyz`);
  expect((await fetch(`${silent}/healthz`)).status).toBe(200);
  expect((await waits).status).toBe(503);
});

test("metrics are told, other paths are 404, other methods 405, and HEAD has no body", async () => {
  const url = await serving(() => ({}));
  const metrics = await fetch(`${url}/metrics`);
  expect(metrics.headers.get("content-type")).toContain("text/plain");
  expect(await metrics.text()).toContain("# TYPE troupe_bus_connected gauge");
  expect((await fetch(`${url}/`)).status).toBe(404);
  expect((await fetch(`${url}/healthz`, { method: "POST", body: "x" })).status).toBe(405);
  const head = await fetch(`${url}/healthz`, { method: "HEAD" });
  expect([head.status, await head.text()]).toEqual([200, ""]);
});

test("a port that is taken is a rejection, not a crash", async () => {
  await serving(() => ({}));
  await expect(startStatusServer({ port: server?.port ?? 0, ready: () => ({}), metrics: createMetrics("worker"), log: silentLog })).rejects.toThrow(
    "EADDRINUSE",
  );
});
