// Goal:   both adapters of the bus keep what bus/port.ts promises of buckets and of core messages.
// Method: each promise is written once and run on both grounds.
import { setTimeout as sleep } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type BucketChange, type Bus, headerOf } from "../../bus/port.ts";
import { residentSubject } from "../../protocol/subjects.ts";
import { type Ground, LEASE_TTL_MS } from "./bus-grounds.ts";
import { bytes, eventually, grounds, newTenant, openGround, session, text } from "./bus-words.ts";

describe.each(grounds)("buckets and core messages on %s", (_name, makeGround) => {
  let ground: Ground;
  let bus: Bus;
  beforeAll(async () => {
    ({ ground, bus } = await openGround(makeGround));
  });
  afterAll(() => ground.stop());

  describe("buckets", () => {
    test("a key is created once, updated and deleted only behind its last revision, and created again after", async () => {
      const key = newTenant();
      const bucket = bus.bucket("PLACEMENT");
      const created = await bucket.create(key, bytes("1"));
      if (created.kind !== "ok") throw new Error("the first creation wins");
      expect(await bucket.create(key, bytes("2"))).toEqual({ kind: "conflict" });
      const updated = await bucket.update(key, bytes("3"), created.revision);
      if (updated.kind !== "ok") throw new Error("an update behind the last revision wins");
      expect(await bucket.update(key, bytes("4"), created.revision)).toEqual({ kind: "conflict" });
      const entry = await bucket.get(key);
      expect([entry?.key, text(entry?.value as Uint8Array), entry?.revision]).toEqual([key, "3", updated.revision]);
      expect((await bucket.all()).filter((other) => other.key === key)).toHaveLength(1);
      expect(await bucket.delete(key, created.revision)).toEqual({ kind: "conflict" });
      expect((await bucket.delete(key, updated.revision)).kind).toBe("ok");
      expect(await bucket.get(key)).toBeUndefined();
      expect((await bucket.all()).filter((other) => other.key === key)).toHaveLength(0);
      expect((await bucket.create(key, bytes("5"))).kind).toBe("ok");
    });

    test("a lease that is renewed lives, one that is not is told as gone soon after its time, once, and can be taken again", async () => {
      const key = newTenant();
      const bucket = bus.bucket("WORKERS");
      const changes: { change: BucketChange; at_ms: number }[] = [];
      const subscription = await bucket.watch((change) => {
        if ((change.kind === "put" ? change.entry.key : change.key) === key) changes.push({ change, at_ms: Date.now() });
      });
      let lease = await bucket.create(key, bytes("0"));
      for (let index = 1; index <= 4; index += 1) {
        await sleep(LEASE_TTL_MS / 4);
        lease = await bucket.update(key, bytes(String(index)), lease.kind === "ok" ? lease.revision : -1);
        expect(lease.kind).toBe("ok");
      }
      const renewed_at_ms = Date.now();
      await eventually(
        () => changes.map(({ change }) => change.kind),
        (kinds) => kinds.includes("gone"),
        10 * LEASE_TTL_MS,
      );
      const gone = changes.at(-1);
      expect((gone?.at_ms ?? 0) - renewed_at_ms).toBeGreaterThan(LEASE_TTL_MS - 50);
      expect((gone?.at_ms ?? 0) - renewed_at_ms).toBeLessThan(6 * LEASE_TTL_MS);
      expect(changes.map(({ change }) => change.kind)).toEqual(["put", "put", "put", "put", "put", "gone"]);
      expect(await bucket.get(key)).toBeUndefined();
      expect(await bucket.update(key, bytes("late"), lease.kind === "ok" ? lease.revision : -1)).toEqual({ kind: "conflict" });
      expect((await bucket.create(key, bytes("again"))).kind).toBe("ok");
      await eventually(
        () => changes.length,
        (length) => length === 7,
      );
      await subscription.stop();
    });

    test("a lease that was given back is told as gone once, though its marker expires too", async () => {
      const key = newTenant();
      const bucket = bus.bucket("WORKERS");
      const told: string[] = [];
      const subscription = await bucket.watch((change) => {
        if ((change.kind === "put" ? change.entry.key : change.key) === key) told.push(change.kind);
      });
      const lease = await bucket.create(key, bytes("1"));
      await bucket.delete(key, lease.kind === "ok" ? lease.revision : -1);
      await sleep(LEASE_TTL_MS + 500);
      expect(told).toEqual(["put", "gone"]);
      await subscription.stop();
    });

    test("a watcher is told the present entries before the watch is answered, and a throwing one is still told the rest", async () => {
      const prefix = newTenant();
      const bucket = bus.bucket("PLACEMENT");
      for (const name of ["a", "b"]) await bucket.create(`${prefix}-${name}`, bytes(name));
      const told: string[] = [];
      const subscription = await bucket.watch((change) => {
        const key = change.kind === "put" ? change.entry.key : change.key;
        if (!key.startsWith(prefix)) return;
        told.push(`${change.kind} ${key.slice(prefix.length)}`);
        throw new Error("a watcher breaks");
      });
      expect(told).toEqual(["put -a", "put -b"]);
      const created = await bucket.create(`${prefix}-c`, bytes("c"));
      await bucket.delete(`${prefix}-c`, created.kind === "ok" ? created.revision : 0);
      await eventually(
        () => told,
        (all) => all.length === 4,
      );
      expect(told.slice(2)).toEqual(["put -c", "gone -c"]);
      await subscription.stop();
    });
  });

  describe("core messages", () => {
    test("a request is answered by its responder, and one of a queue group hears it", async () => {
      const subject = `system.${newTenant()}.ask`;
      let heard = 0;
      const answer = (): void => void (heard += 1);
      const responders = [1, 2, 3].map(() =>
        bus.subscribe(
          subject,
          (message) => {
            answer();
            bus.send(message.reply as string, bytes(`re: ${text(message.data)} ${headerOf(message.headers, "X-Test")}`), { headers: { "X-Back": "yes" } });
          },
          { queue: "responders" },
        ),
      );
      await bus.flush();
      const reply = await bus.request(subject, bytes("you"), { headers: { "X-Test": "there" } });
      expect([text(reply?.data as Uint8Array), headerOf(reply?.headers ?? {}, "X-Back"), heard]).toEqual(["re: you there", "yes", 1]);
      await Promise.all(responders.map((responder) => responder.stop()));
    });

    test("a request nobody listens to is answered with nothing, long before its patience ends", async () => {
      const begun = Date.now();
      expect(await bus.request(`system.${newTenant()}.nobody`, bytes(""), { patience_ms: 30_000 })).toBeUndefined();
      expect(Date.now() - begun).toBeLessThan(10_000);
    });

    test("a request that is heard and not answered ends with its patience", async () => {
      const subject = `system.${newTenant()}.mute`;
      const mute = bus.subscribe(subject, () => undefined);
      await bus.flush();
      const begun = Date.now();
      expect(await bus.request(subject, bytes(""), { patience_ms: 200 })).toBeUndefined();
      expect(Date.now() - begun).toBeGreaterThanOrEqual(190);
      await mute.stop();
    });

    test("a listener that throws, now or later, is logged and hears the next message, and so does everybody else", async () => {
      const tenant = newTenant();
      const heard: string[] = [];
      const throwing = bus.subscribe(`system.${tenant}.*`, (message) => {
        heard.push(text(message.data));
        throw new Error(`broken listener of ${tenant}`);
      });
      const rejection = (): Promise<never> => Promise.reject(new Error(`rejecting listener of ${tenant}`));
      const rejecting = bus.subscribe(`system.${tenant}.*`, rejection as () => void);
      const calm: string[] = [];
      const other = bus.subscribe(`system.${tenant}.>`, (message) => void calm.push(text(message.data)));
      await bus.flush();
      for (const body of ["a", "b"]) bus.send(`system.${tenant}.x`, bytes(body));
      await eventually(
        () => [heard.length, calm.length],
        ([throws, calms]) => throws === 2 && calms === 2,
      );
      expect((await bus.publish(residentSubject(0, session(tenant, "s")), bytes(""))).kind).toBe("stored");
      expect(ground.complaints.filter((line) => line.includes(`broken listener of ${tenant}`))).toHaveLength(2);
      expect(ground.complaints.filter((line) => line.includes(`rejecting listener of ${tenant}`))).toHaveLength(2);
      await Promise.all([throwing.stop(), rejecting.stop(), other.stop()]);
    });

    test("a fresh inbox hears what is sent to it, and nothing once it is stopped", async () => {
      const inbox = bus.inbox();
      const heard: string[] = [];
      const subscription = bus.subscribe(inbox, (message) => void heard.push(text(message.data)));
      await bus.flush();
      bus.send(inbox, bytes("one"));
      await eventually(
        () => heard.length,
        (length) => length === 1,
      );
      await subscription.stop();
      bus.send(inbox, bytes("two"));
      await bus.flush();
      await sleep(30);
      expect(heard).toEqual(["one"]);
    });
  });
});
