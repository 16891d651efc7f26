// http: what every process tells of itself: /healthz, /readyz, /metrics. A small server of its own for processes without a gateway;
// the gateway answers the same paths with statusAnswer.
//
// Invariants:
//   H1. /healthz says that the process runs and its loop turns; it depends on nothing else, so an outage elsewhere restarts nobody.
//   H2. /readyz names each component and answers 503 unless all are well. A component that cannot say is not well.
//   H3. Nothing here tells a secret or a tenant's data, and nothing can be changed here.
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { errorFields, type Log } from "../protocol/log.ts";
import type { Metrics } from "./metrics.ts";

export interface ComponentState {
  readonly ok: boolean;
  /** For people: why not, or what it is at. */
  readonly detail?: string;
}
export type Readiness = Readonly<Record<string, ComponentState>>;

export interface StatusSource {
  /** Asked at every /readyz. */
  readonly ready: () => Readiness | Promise<Readiness>;
  readonly metrics: Pick<Metrics, "text" | "content_type">;
}

export interface StatusAnswer {
  readonly status: number;
  readonly content_type: string;
  readonly body: string;
}

/** A probe that takes longer has its answer: not ready. Probers wait 1 s by default; ours waits longer only to log the reason. */
const READY_PATIENCE_MS = 2_000;
/** Probers and scrapers are a handful. */
const CONNECTIONS_MAX = 64;

const json = (status: number, value: unknown): StatusAnswer => ({
  status,
  content_type: "application/json; charset=utf-8",
  body: `${JSON.stringify(value)}\n`,
});

async function readiness(source: StatusSource): Promise<Readiness> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<Readiness>((resolve) => {
    timer = setTimeout(() => resolve({ readiness: { ok: false, detail: `no answer within ${READY_PATIENCE_MS} ms` } }), READY_PATIENCE_MS);
  });
  try {
    return await Promise.race([Promise.resolve(source.ready()), late]);
  } catch (error) {
    return { readiness: { ok: false, detail: errorFields(error).error } }; // H2
  } finally {
    clearTimeout(timer);
  }
}

/** The answer to GET `path`, or undefined when it is none of ours. */
export async function statusAnswer(path: string, source: StatusSource): Promise<StatusAnswer | undefined> {
  switch (path) {
    case "/healthz":
      return json(200, { ok: true });
    case "/readyz": {
      const components = await readiness(source);
      const ok = Object.values(components).every((component) => component.ok);
      return json(ok ? 200 : 503, { ok, components });
    }
    case "/metrics":
      return { status: 200, content_type: source.metrics.content_type, body: await source.metrics.text() };
    default:
      return undefined;
  }
}

export interface StatusServer {
  readonly port: number;
  readonly url: string;
  stop(): Promise<void>;
}

/** Serves the three paths. `host` is 127.0.0.1 unless a deployment's probers come from elsewhere; port 0 is any. Rejects when it cannot listen. */
export function startStatusServer(options: StatusSource & { readonly port: number; readonly host?: string; readonly log: Log }): Promise<StatusServer> {
  const { port, host = "127.0.0.1", log } = options;
  const server = createServer({ requestTimeout: 5_000, headersTimeout: 5_000, maxHeaderSize: 8_192 }, (request, response) => {
    const answer = async (): Promise<StatusAnswer> => {
      if (request.method !== "GET" && request.method !== "HEAD") return json(405, { ok: false, detail: "GET only" });
      const path = (request.url ?? "/").split("?", 1)[0] ?? "/";
      return (await statusAnswer(path, options)) ?? json(404, { ok: false, detail: "there are /healthz, /readyz and /metrics" });
    };
    answer()
      .catch((error: unknown) => {
        log.error("a status request failed", errorFields(error));
        return json(500, { ok: false, detail: "see the log" });
      })
      .then(({ status, content_type, body }) => {
        response.writeHead(status, { "content-type": content_type, "content-length": Buffer.byteLength(body), "cache-control": "no-store" });
        response.end(request.method === "HEAD" ? undefined : body);
      })
      .catch((error: unknown) => log.debug("a status answer was not taken", errorFields(error)));
  });
  server.maxConnections = CONNECTIONS_MAX;
  return new Promise((resolve, reject) => {
    server.once("error", reject);
    server.listen(port, host, () => {
      server.off("error", reject);
      server.on("error", (error) => log.warn("the status server had a fault", errorFields(error)));
      const bound = (server.address() as AddressInfo).port;
      resolve({
        port: bound,
        url: `http://${host.includes(":") ? `[${host}]` : host}:${bound}`,
        stop: () =>
          new Promise((stopped) => {
            server.close(() => stopped());
            server.closeAllConnections();
          }),
      });
    });
  });
}
