// Goal:   the broker and the database of `npm start` keep what they acknowledged, keep others out, and come back.
// Method: real servers through the harness; the same code that `npm start` runs.
import { spawn } from "node:child_process";
import { once } from "node:events";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";
import type { NatsConnection } from "@nats-io/transport-node";
import pg from "pg";
import { expect, test } from "vitest";
import { startLocalPostgres } from "../../deploy/local/postgres.ts";
import { freshDatabase, freshFolder, freshNats, freshPostgres } from "../harness/servers.ts";
import type { FreshNats } from "../harness/servers.ts";

const open = (nats: FreshNats, login: { user: string; password: string }, inbox = "_INBOX"): Promise<NatsConnection> =>
  connect({ servers: nats.url, user: login.user, pass: login.password, inboxPrefix: inbox, maxReconnectAttempts: -1, reconnectTimeWait: 50 });

test("a message that the broker acknowledged is there after kill -9 and a start", async () => {
  const nats = await freshNats();
  const connection = await open(nats, nats.operator);
  await (await jetstreamManager(connection)).streams.add({ name: "EVENTS", subjects: ["kept.*"] });
  const { seq } = await jetstream(connection).publish("kept.one", "word");
  await connection.close();
  await nats.kill9();
  await nats.start();
  const again = await open(nats, nats.operator);
  const message = await (await jetstreamManager(again)).streams.getMessage("EVENTS", { seq });
  expect(message?.string()).toBe("word");
  await again.close();
});

test("the runtime's user cannot delete or purge the journals", async () => {
  const nats = await freshNats();
  const connection = await open(nats, nats.runtime);
  const manager = await jetstreamManager(connection);
  await manager.streams.add({ name: "EVENTS", subjects: ["kept.*"] });
  await jetstream(connection).publish("kept.one", "word");
  await expect(manager.streams.purge("EVENTS")).rejects.toThrow(/Permissions Violation/);
  await expect(manager.streams.delete("EVENTS")).rejects.toThrow(/Permissions Violation/);
  await expect(manager.streams.deleteMessage("EVENTS", 1)).rejects.toThrow(/Permissions Violation/);
  expect((await manager.streams.info("EVENTS")).state.messages).toBe(1);
  await connection.close();
});

test("a tenant's stand-in user reaches its own commands and live subjects, and nothing else", async () => {
  const nats = await freshNats({ tenants: ["acme"] });
  const runtime = await open(nats, nats.runtime);
  const heard: string[] = [];
  runtime.subscribe(">", { callback: (_, message) => void (message.subject.startsWith("_INBOX") || heard.push(message.subject)) });
  await runtime.flush();
  const tenant = await open(nats, nats.tenantLogin("acme"), "_INBOX_acme");
  for (const subject of ["tenant.acme.session.s1.command", "tenant.acme.workflow.w1.command", "tenant.acme.replay"]) tenant.publish(subject);
  for (const subject of [
    "tenant.acme.session.s1.control",
    "tenant.acme.session.s1.event",
    "tenant.acme.budget.main.command",
    "tenant.other.session.s1.command",
  ])
    tenant.publish(subject);
  for (const subject of ["$JS.API.INFO", "shard.0.tenant.acme.session.s1.command", "live.tenant.acme.session.s1.event", "_INBOX_other.x", "timer.x"])
    tenant.publish(subject);
  await tenant.flush();
  await runtime.flush();
  // Commands arrive as what a tenant's client said (docs/decisions/0008-who-said-it.md).
  expect(heard).toEqual(["tenant.acme.session.s1.edge", "tenant.acme.workflow.w1.edge", "tenant.acme.replay"]);

  const refused: string[] = [];
  const live: string[] = [];
  for (const subject of ["live.tenant.acme.>", "live.tenant.other.>", "tenant.acme.>", "live.>", "_INBOX.>", "_INBOX_other.>", "$SYS.>"]) {
    tenant.subscribe(subject, { callback: (error, message) => void (error === null ? live.push(message.subject) : refused.push(subject)) });
  }
  await tenant.flush();
  runtime.publish("live.tenant.acme.session.s1.token");
  runtime.publish("live.tenant.other.session.s1.token");
  await runtime.flush();
  await tenant.flush();
  expect(live).toEqual(["live.tenant.acme.session.s1.token"]);
  expect(refused.sort()).toEqual(["$SYS.>", "_INBOX.>", "_INBOX_other.>", "live.>", "live.tenant.other.>", "tenant.acme.>"]);
  await Promise.all([tenant.close(), runtime.close()]);
});

test("a tenant that is added while the broker runs gets in, and nobody else's connection breaks", async () => {
  const nats = await freshNats({ tenants: ["acme"] });
  const present = await Promise.all([open(nats, nats.runtime), open(nats, nats.tenantLogin("acme"), "_INBOX_acme"), open(nats, nats.system)]);
  const statuses: string[] = [];
  for (const connection of present)
    void (async () => {
      for await (const status of connection.status()) statuses.push(status.type);
    })();
  await expect(open(nats, nats.tenantLogin("late"))).rejects.toThrow(/authorization/i);
  await nats.setTenants(["acme", "late"]);
  const late = await open(nats, nats.tenantLogin("late"), "_INBOX_late");
  await late.flush();
  for (const connection of present) await connection.flush();
  expect(statuses).toEqual([]);
  await Promise.all([late, ...present].map((connection) => connection.close()));
});

test("the system user hears of a lost connection of the runtime", async () => {
  const nats = await freshNats();
  const [system, runtime] = await Promise.all([open(nats, nats.system), open(nats, nats.runtime)]);
  const heard = new Promise<string>((resolve) => {
    system.subscribe(`$SYS.ACCOUNT.${nats.account}.DISCONNECT`, {
      callback: (_, message) => resolve(message.json<{ client: { user: string } }>().client.user),
    });
  });
  await system.flush();
  await runtime.close();
  expect(await heard).toBe("runtime");
  await system.close();
});

const query = async (url: string, sql: string): Promise<unknown[]> => {
  const client = new pg.Client({ connectionString: url });
  client.on("error", () => undefined); // the server is killed in some of these tests
  await client.connect();
  try {
    return (await client.query(sql)).rows;
  } finally {
    await client.end();
  }
};

test("a row that the database committed is there after kill -9 and a start", async () => {
  const postgres = await freshPostgres();
  await query(postgres.url, "CREATE TABLE kept AS SELECT 'word' AS text");
  await postgres.kill9();
  await postgres.start();
  expect(await query(postgres.url, "SELECT text FROM kept")).toEqual([{ text: "word" }]);
});

test("a second start on the same folder finds the data", async () => {
  const home = freshFolder("home");
  const first = await startLocalPostgres({ home, say: () => undefined });
  await query(first.url, "CREATE TABLE kept AS SELECT 'word' AS text");
  await first.stop();
  const second = await startLocalPostgres({ home, say: () => undefined });
  expect(await query(second.url, "SELECT text FROM kept")).toEqual([{ text: "word" }]);
  await second.stop();
});

test("a database whose owner lives is left alone; one whose owner was killed is taken over", async () => {
  const home = freshFolder("home");
  const starter = new URL("../../deploy/local/postgres.ts", import.meta.url).href;
  const script = `import { startLocalPostgres } from ${JSON.stringify(starter)};
    const server = await startLocalPostgres({ home: ${JSON.stringify(home)}, say: () => undefined });
    console.log(server.pid());
    setInterval(() => undefined, 1000);`;
  const owner = spawn(process.execPath, ["--input-type=module", "-e", script], { stdio: ["ignore", "pipe", "inherit"] });
  const [answer] = (await once(owner.stdout, "data")) as [Buffer];
  const pid = Number(answer.toString());

  await expect(startLocalPostgres({ home, say: () => undefined })).rejects.toThrow(new RegExp(`process ${owner.pid} owns`));
  process.kill(pid, 0); // it still runs
  owner.kill("SIGKILL");
  await once(owner, "exit");

  const said: string[] = [];
  const taken = await startLocalPostgres({ home, say: (line) => said.push(line) });
  expect(said).toEqual([`ending the Postgres that an earlier run left behind (pid ${pid})`]);
  expect(await query(taken.url, "SELECT 1 AS one")).toEqual([{ one: 1 }]);
  await taken.stop();
});

test("the database keeps the promises that projections rely on", async () => {
  const postgres = await freshPostgres();
  const [row] = (await query(
    postgres.url,
    "SELECT current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS commit, current_setting('listen_addresses') AS listen",
  )) as [unknown];
  expect(row).toEqual({ fsync: "on", commit: "on", listen: "127.0.0.1" });
  expect(await query(postgres.url, "SELECT upper('ä') AS upper, pg_encoding_to_char(encoding) AS encoding FROM pg_database WHERE datname = 'troupe'")).toEqual([
    { upper: "Ä", encoding: "UTF8" },
  ]);
});

test("two fresh databases do not see each other", async () => {
  const [one, other] = await Promise.all([freshDatabase(), freshDatabase()]);
  await query(one.url, "CREATE TABLE mine (a int)");
  expect(await query(other.url, "SELECT to_regclass('mine') AS found")).toEqual([{ found: null }]);
});
