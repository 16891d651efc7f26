// span-collector: what an operator's collector of traces would be sent: OTLP over HTTP on this machine, kept as it came and as spans.
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { atEndOfFile } from "./endings.ts";

export interface CollectedSpan {
  readonly name: string;
  readonly traceId: string;
  readonly spanId: string;
  readonly parentSpanId?: string;
  readonly attributes: readonly { readonly key: string; readonly value: Readonly<Record<string, unknown>> }[];
  readonly events?: readonly { readonly name: string }[];
  readonly status?: { readonly code?: number; readonly message?: string };
  /** Of the process that sent it. */
  readonly service: string;
}

export interface SpanCollector {
  readonly url: string;
  /** Every request's head and body, as they came. */
  readonly received: string[];
  readonly paths: Set<string>;
  spans(): CollectedSpan[];
}

interface Exported {
  readonly resourceSpans: readonly {
    readonly resource?: { readonly attributes?: CollectedSpan["attributes"] };
    readonly scopeSpans: readonly { readonly spans: readonly Omit<CollectedSpan, "service">[] }[];
  }[];
}

export const attributesOf = ({ attributes }: Pick<CollectedSpan, "attributes">): Record<string, unknown> =>
  Object.fromEntries(attributes.map(({ key, value }) => [key, Object.values(value)[0]]));

/** Ends with the test file. */
export async function startSpanCollector(): Promise<SpanCollector> {
  const received: string[] = [];
  const bodies: string[] = [];
  const paths = new Set<string>();
  const server = createServer((request, response) => {
    paths.add(request.url ?? "");
    const chunks: Buffer[] = [];
    request.on("data", (chunk: Buffer) => chunks.push(chunk));
    request.on("end", () => {
      const body = Buffer.concat(chunks).toString("utf8");
      bodies.push(body);
      received.push(`${request.url ?? ""} ${JSON.stringify(request.headers)} ${body}`);
      response.writeHead(200, { "content-type": "application/json" }).end("{}");
    });
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  atEndOfFile(async () => {
    server.closeAllConnections();
    server.close();
  });
  return {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}`,
    received,
    paths,
    spans: () =>
      bodies.flatMap((body) =>
        (JSON.parse(body) as Exported).resourceSpans.flatMap(({ resource, scopeSpans }) => {
          const service = String(attributesOf({ attributes: resource?.attributes ?? [] })["service.name"] ?? "");
          return scopeSpans.flatMap(({ spans }) => spans.map((span) => ({ ...span, service })));
        }),
      ),
  };
}
