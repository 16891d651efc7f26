// Goal:   what the audit and the ears of chaos are to detect, they detect: a lost command, a repeated model call, a stream with a gap, a repeat or a
//         wrong text.
// Method: a short load on a real ground, audited as it is and then with each fault planted; and an ear at a server that streams wrongly.
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { auditLoad } from "../../bench/chaos-audit.ts";
import { openEar } from "../../bench/chaos-ear.ts";
import { type Ground, type ModelCall, startGround } from "../../bench/chaos-ground.ts";
import { type Load, startLoad } from "../../bench/chaos-load.ts";
import { until } from "../../deploy/local/server-process.ts";
import { atEndOfFile } from "../harness/endings.ts";
import { freshFolder } from "../harness/servers.ts";

describe("the audit", () => {
  let ground: Ground;
  let load: Load;
  beforeAll(async () => {
    ground = await startGround({ home: freshFolder("chaos"), workers: 1 });
    atEndOfFile(() => ground.stop());
    load = await startLoad(ground, { lanes: 3, quiet: 1, wish: { tokens: 5, token_ms: 20, first_token_ms: 5 } });
    expect(await until(() => load.acknowledged.length > 10 && load.turns_ended() > 6, 60_000)).toBe(true);
    expect(await load.finish(60_000)).toEqual([]);
    await load.stop();
  }, 120_000);

  test("finds nothing where nothing is wrong", async () => {
    const report = await auditLoad(ground, load);
    expect(report).toMatchObject({ lost: [], repeated: [], stream_faults: [], violations: [] });
    expect(report.acknowledged).toBeGreaterThan(5);
    expect(report.ears_whole).toBeGreaterThan(2);
  });

  test("names an acknowledged command that is not in the journal", async () => {
    const [one] = load.acknowledged;
    const planted = { ...load, acknowledged: [...load.acknowledged, { ...one!, key: "never-stored" }] };
    expect((await auditLoad(ground, planted)).lost).toEqual([expect.stringContaining("never-stored")]);
  });

  test("names a model call that was made again after its answer was journaled", async () => {
    const [call] = ground.calls;
    const again: ModelCall = { ...call!, at_ms: performance.now(), at_wall_ms: Date.now() };
    const { repeated } = await auditLoad({ ...ground, calls: [...ground.calls, again] }, load);
    expect(repeated).toEqual([expect.stringMatching(/asked for .* 1 times after its answer/), expect.stringMatching(/asked 2 times .* counts 1/)]);
  });

  test("names a model call that was made oftener than the journal counts attempts, though before its answer", async () => {
    const [call] = ground.calls;
    const { repeated } = await auditLoad({ ...ground, calls: [...ground.calls, call!] }, load);
    expect(repeated).toEqual([expect.stringMatching(/asked 2 times .* counts 1/)]);
  });

  test("names an event that an ear was not given, and a text that is not the journal's", async () => {
    const [ear] = load.ears;
    const { events, texts } = ear!;
    const gap = { ...ear!, events: events.toSpliced(2, 1) };
    const [place] = [...texts.keys()];
    const wrong = { ...ear!, texts: new Map([...texts, [place!, `${texts.get(place!)}!`]]) };
    expect((await auditLoad(ground, { ...load, ears: [gap] })).stream_faults).toEqual([expect.stringMatching(/event 2 was/)]);
    expect((await auditLoad(ground, { ...load, ears: [wrong] })).stream_faults).toEqual([expect.stringMatching(/characters were heard/)]);
  });
});

describe("an ear", () => {
  let frames: string[] = [];
  const server = createServer((_, response) => {
    response.writeHead(200, { "content-type": "text/event-stream" });
    for (const frame of frames) response.write(frame);
  });
  let url = "";
  beforeAll(async () => {
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    url = `http://127.0.0.1:${(server.address() as AddressInfo).port}`;
  });
  afterAll(() => {
    server.closeAllConnections();
    server.close();
  });

  const frame = (id: string, event: string, data: object): string => `id: ${id}\nevent: ${event}\ndata: ${JSON.stringify(data)}\n\n`;
  const token = (id: string, attempt: number, index: number, text = "x"): string => frame(id, "token", { turn: 1, step: 0, attempt, index, text });

  async function faultsOf(...streamed: string[]): Promise<{ faults: readonly string[]; text: string | undefined }> {
    frames = [...streamed, frame("end", "turn.completed", { type: "turn.completed", turn: 1, seq: 9 })];
    let over = false;
    const ear = openEar({ session: "s", urls: [url], key: "k", on_event: (type) => void (over ||= type === "turn.completed") });
    expect(await until(() => over, 30_000)).toBe(true);
    ear.close();
    return { faults: ear.record.faults, text: ear.record.texts.get("1.0") };
  }

  test("puts chunks together, and begins again after superseded", async () => {
    const superseded = frame("c", "superseded", { type: "superseded", turn: 1, step: 0, attempt: 1, seq: 5 });
    expect(await faultsOf(token("a", 1, 0, "He"), token("b", 1, 1, "l"), superseded, token("d", 2, 0, "Hel"), token("e", 2, 1, "lo"))).toEqual({
      faults: [],
      text: "Hello",
    });
  });

  test("names a chunk that is missing, one that comes twice, and a cursor that comes twice", async () => {
    expect((await faultsOf(token("a", 1, 0), token("b", 1, 2))).faults).toEqual([expect.stringMatching(/chunk 2 .* where 1 was due/)]);
    expect((await faultsOf(token("a", 1, 0), token("b", 1, 0))).faults).toEqual([expect.stringMatching(/chunk 0 .* where 1 was due/)]);
    expect((await faultsOf(token("a", 1, 0), token("a", 1, 1))).faults).toEqual([expect.stringMatching(/cursor a came twice/)]);
  });

  test("names an attempt that began though the one before was not void, and a chunk of a void one", async () => {
    expect((await faultsOf(token("a", 1, 0), token("b", 2, 0))).faults).toEqual([expect.stringMatching(/attempt 2 began though attempt 1/)]);
    const superseded = frame("c", "superseded", { type: "superseded", turn: 1, step: 0, attempt: 1, seq: 5 });
    expect((await faultsOf(token("a", 1, 0), superseded, token("d", 1, 1))).faults).toContainEqual(
      expect.stringMatching(/a chunk of attempt 1 after it was void/),
    );
  });
});
