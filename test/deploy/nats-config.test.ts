// Goal:   the configuration that is written is one that the broker takes, in each of its forms, and a cell of one tenant's own is walled off.
// Method: the broker's own check of a configuration; a broker with a second cell in it.
import { execFileSync } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { jetstreamManager } from "@nats-io/jetstream";
import { connect } from "@nats-io/transport-node";
import { expect, test } from "vitest";
import { createAuthKeys, publicAuthKeys } from "../../bus/jetstream-auth.ts";
import { dedicatedCellAccount, natsConfig } from "../../deploy/local/nats.ts";
import { freshFolder, natsServerOf, natsServerProgram } from "../harness/servers.ts";

const login = (user: string): { user: string; password: string } => ({ user, password: `password-of-${user}` });
const base = (home: string, ports: { port: number; monitor_port: number }) => ({
  ...ports,
  store_directory: join(home, "jetstream"),
  log_file: join(home, "log"),
  operator: login("operator"),
  runtime: login("runtime"),
  system: login("system"),
  tenants: [],
});

function written(home: string, text: string): string {
  mkdirSync(home, { recursive: true });
  const file = join(home, "nats.conf");
  writeFileSync(file, text, { mode: 0o600 });
  return file;
}

test("with and without gateways that answer for logins, the broker takes what is written", async () => {
  const program = await natsServerProgram();
  const home = freshFolder("nats-config");
  const { issuer, exchange } = publicAuthKeys(createAuthKeys());
  const ports = { port: 4222, monitor_port: 8222 };
  const configs = [
    natsConfig(base(home, ports)),
    natsConfig({ ...base(home, ports), tenants: [{ tenant: "acme", login: login("tenant-acme") }], edge_accounts: 1 }),
    natsConfig({ ...base(home, ports), auth: { issuer, exchange, authenticator: login("authenticator"), warden: login("warden") } }),
  ];
  for (const text of configs) execFileSync(program, ["-t", "-c", written(home, text)], { stdio: "pipe" });
  expect(() =>
    execFileSync(program, ["-t", "-c", written(home, configs[0]!.replace("system_account: SYS", "system_account: {"))], { stdio: "pipe" }),
  ).toThrow();
});

test("a tenant with a cell of its own has all of JetStream there but the journals' deletion, and nothing of the other cell", async () => {
  const home = freshFolder("nats-cell");
  const cell = {
    name: "ACME",
    operator: login("acme-operator"),
    runtime: login("acme-runtime"),
    tenant: login("acme"),
    memory_bytes: 2 ** 24,
    file_bytes: 2 ** 26,
  };
  const { port } = await natsServerOf(home, (ports) => natsConfig(base(home, ports)).replace("\n  RT {", `\n${dedicatedCellAccount(cell)}  RT {`));
  const open = ({ user, password }: { user: string; password: string }) => connect({ servers: `127.0.0.1:${port}`, user, pass: password });
  const [shared, tenant] = await Promise.all([open(login("operator")), open(cell.tenant)]);
  await (await jetstreamManager(shared)).streams.add({ name: "EVENTS", subjects: ["tenant.*.*.*.event"] });
  const mine = await jetstreamManager(tenant);
  expect(await mine.streams.names().next()).toEqual([]);
  await mine.streams.add({ name: "EVENTS", subjects: ["tenant.*.*.*.event"] });
  await expect(mine.streams.purge("EVENTS")).rejects.toThrow(/permission/i);
  await expect(mine.streams.delete("EVENTS")).rejects.toThrow(/permission/i);
  const heard: string[] = [];
  tenant.subscribe(">", { callback: (_error, message) => void heard.push(message.subject) });
  await tenant.flush();
  shared.publish("tenant.other.session.s.event", "x");
  shared.publish("live.tenant.acme.session.s.event", "x");
  await shared.flush();
  await tenant.flush();
  expect(heard.filter((subject) => !subject.startsWith("_INBOX"))).toEqual([]);
  await Promise.all([shared.close(), tenant.close()]);
});
