// metrics: Goal: the table is the truth, its names follow the rules, and what is counted is told. Method: the table walked, the text parsed.
import { describe, expect, test } from "vitest";
import { createMetrics, INSTRUMENTS, type InstrumentName, type Metrics } from "../../telemetry/metrics.ts";

const all = Object.entries(INSTRUMENTS);

describe("the table", () => {
  test("every name begins with troupe_, counters end in _total, histograms in their unit or size", () => {
    for (const [name, { type }] of all) {
      expect(name).toMatch(/^troupe_[a-z_]+$/);
      if (type === "counter") expect(name).toMatch(/_total$/);
      else expect(name).not.toMatch(/_total$/);
      if (type === "histogram") expect(name).toMatch(/_(seconds|size)$/);
    }
  });
  test("no label names what is without bound", () => {
    for (const [, { labels }] of all)
      for (const label of labels) expect(["tenant", "session", "actor", "id", "key", "user", "agent", "trace"]).not.toContain(label);
  });
  test("every help is a sentence", () => {
    for (const [, { help }] of all) expect(help).toMatch(/^[A-Z0-9].+\.$/);
  });
});

test("every declared instrument moves and is told with its labels, and Prometheus' text format is kept", async () => {
  const metrics = createMetrics("worker") as Metrics &
    Record<"add" | "set" | "observe", (name: InstrumentName, labels: Record<string, string>, value?: number) => void>;
  for (const [name, { type, labels }] of all as [InstrumentName, { type: string; labels: readonly string[] }][]) {
    const values = Object.fromEntries(labels.map((label) => [label, 'a"b\\c\nd']));
    if (type === "counter") metrics.add(name, values, 2);
    else if (type === "gauge") metrics.set(name, values, 2);
    else metrics.observe(name, values, 2);
  }
  const text = await metrics.text();
  for (const [name, { type }] of all) expect(text).toMatch(new RegExp(`^${name}${type === "histogram" ? "_sum" : ""}\\{.*role="worker".*\\} 2$`, "m"));
  for (const line of text.split("\n")) expect(line).toMatch(/^(|# (HELP|TYPE) .+|[a-z_]+[a-z0-9_]*(\{.*\})? (\S+))$/);
  expect(text).toContain("nodejs_eventloop_lag");
  expect(metrics.content_type).toContain("text/plain");
});

test("two processes' instruments in one process do not meet", async () => {
  const [one, other] = [createMetrics("gateway"), createMetrics("worker")];
  one.add("troupe_appends_total", { outcome: "committed" });
  expect(await one.text()).toMatch(/troupe_appends_total\{.*\} 1/);
  expect(await other.text()).not.toMatch(/troupe_appends_total\{/);
});
