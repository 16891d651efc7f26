// tracing: spans over OpenTelemetry, behind one function. Without an endpoint nothing of the SDK is loaded (it costs half a second) and
// withSpan only calls its work.
//
// Invariants:
//   S1. Every span names its tenant, and its agent and session where there are any.
//   S2. A trace goes from hand to hand as a `traceparent` text: through headers, journal entries and effects. What is not one is dropped.
//   S3. No span bears a customer's text or an error's message; it bears names and codes.
//   S4. Tracing that fails costs traces, never work.
import { randomBytes } from "node:crypto";
import { errorFields, type Log } from "../protocol/log.ts";

export interface Traceparent {
  /** 32 hex digits, not all 0. */
  readonly trace_id: string;
  /** 16 hex digits, not all 0. */
  readonly span_id: string;
  readonly sampled: boolean;
}

/** W3C trace context, version 00; of later versions what is there in 00. */
export function parseTraceparent(text: string | undefined): Traceparent | undefined {
  const [, version, trace_id, span_id, flags, more] = /^([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?$/.exec(text ?? "") ?? [];
  if (version === undefined || trace_id === undefined || span_id === undefined || flags === undefined) return undefined;
  if (version === "ff" || (version === "00" && more !== undefined) || /^0+$/.test(trace_id) || /^0+$/.test(span_id)) return undefined;
  return { trace_id, span_id, sampled: (Number.parseInt(flags, 16) & 1) === 1 };
}

export function formatTraceparent({ trace_id, span_id, sampled }: Traceparent): string {
  return `00-${trace_id}-${span_id}-${sampled ? "01" : "00"}`;
}

/** A fresh trace, for a request that brought none. */
export function newTraceparent(bytes: (count: number) => Uint8Array = randomBytes): string {
  return formatTraceparent({ trace_id: Buffer.from(bytes(16)).toString("hex"), span_id: Buffer.from(bytes(8)).toString("hex"), sampled: true });
}

/** Whom the work is for (S1), and what else is worth knowing of it. */
export interface SpanAttributes {
  readonly tenant: string;
  readonly agent?: string;
  readonly session?: string;
  readonly [name: string]: string | number | boolean | undefined;
}

export interface SpanOptions {
  readonly attributes: SpanAttributes;
  /** The traceparent it came with. Without one the span is a child of the span around it, else the first of its trace. */
  readonly trace?: string | undefined;
}

export interface Span {
  /** To hand on; what came in, when tracing is off. */
  readonly trace: string | undefined;
  set(name: string, value: string | number | boolean): void;
  /** A moment within the span: `first_token`. */
  mark(name: string): void;
}

export interface Tracing {
  /** Runs `work` within a span; it ends with the work. What work throws is thrown. */
  withSpan<T>(name: string, options: SpanOptions, work: (span: Span) => Promise<T>): Promise<T>;
  /** Sends what is waiting, for at most two seconds. */
  stop(): Promise<void>;
}

/** Spans go nowhere; traces are still handed on. */
export const noTracing: Tracing = {
  withSpan: (_name, { trace }, work) => work({ trace: parseTraceparent(trace) === undefined ? undefined : trace, set() {}, mark() {} }),
  stop: () => Promise.resolve(),
};

export interface TracingOptions {
  /** OTLP over HTTP: `http://collector:4318`. Undefined or empty: off. */
  readonly endpoint: string | undefined;
  /** `troupe-worker` */
  readonly service_name: string;
  /** Which of its like. */
  readonly instance: string;
  readonly log: Log;
}

/** A collector that is away must not hold up a process that ends. */
const STOP_PATIENCE_MS = 2_000;

/** Loads the SDK only when there is an endpoint. */
export async function startTracing({ endpoint, service_name, instance, log }: TracingOptions): Promise<Tracing> {
  if (endpoint === undefined || endpoint === "") return noTracing;
  try {
    return await openTelemetry(endpoint, service_name, instance, log);
  } catch (error) {
    log.error("tracing could not be started; the process runs without", errorFields(error)); // S4
    return noTracing;
  }
}

async function openTelemetry(endpoint: string, service_name: string, instance: string, log: Log): Promise<Tracing> {
  const [api, { NodeSDK }, { OTLPTraceExporter }] = await Promise.all([
    import("@opentelemetry/api"),
    import("@opentelemetry/sdk-node"),
    import("@opentelemetry/exporter-trace-otlp-http"),
  ]);
  const url = new URL(endpoint);
  if (url.pathname === "/" || url.pathname === "") url.pathname = "/v1/traces";
  const sdk = new NodeSDK({
    serviceName: service_name,
    // The detectors would send the command line and the user along.
    autoDetectResources: false,
    traceExporter: new OTLPTraceExporter({ url: url.href }),
    // Metrics are scraped and logs are lines; the SDK would otherwise send both by itself.
    metricReaders: [],
    logRecordProcessors: [],
    instrumentations: [],
  });
  sdk.start();
  log.info("tracing is on", { endpoint: url.origin });
  const tracer = api.trace.getTracer("troupe");

  return {
    withSpan(name, { attributes, trace }, work) {
      const came = parseTraceparent(trace);
      const around =
        came === undefined
          ? api.context.active()
          : api.trace.setSpanContext(api.ROOT_CONTEXT, {
              traceId: came.trace_id,
              spanId: came.span_id,
              traceFlags: came.sampled ? api.TraceFlags.SAMPLED : api.TraceFlags.NONE,
              isRemote: true,
            });
      const known = Object.fromEntries(Object.entries({ ...attributes, instance }).filter(([, value]) => value !== undefined)) as Record<string, string>;
      return tracer.startActiveSpan(name, { attributes: known }, around, async (span) => {
        const { traceId: trace_id, spanId: span_id, traceFlags } = span.spanContext();
        const handle: Span = {
          trace: formatTraceparent({ trace_id, span_id, sampled: (traceFlags & api.TraceFlags.SAMPLED) !== 0 }),
          set: (key, value) => void span.setAttribute(key, value),
          mark: (mark) => void span.addEvent(mark),
        };
        try {
          return await work(handle);
        } catch (error) {
          span.setStatus({ code: api.SpanStatusCode.ERROR, message: error instanceof Error ? error.name : "error" }); // S3
          throw error;
        } finally {
          span.end();
        }
      });
    },
    async stop() {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<void>((resolve) => (timer = setTimeout(resolve, STOP_PATIENCE_MS)));
      try {
        await Promise.race([sdk.shutdown(), late]);
      } catch (error) {
        log.warn("the last spans were not taken", errorFields(error));
      } finally {
        clearTimeout(timer);
      }
    },
  };
}
