// Goal:   whoever has a tenant's key and our command line gets nowhere but where the key leads: every command, aimed at another tenant, shows none of its
//         bytes and changes nothing of it.
// Method: the commands that the program itself lists, so that a new one is tried without this file knowing of it; each with the key of one tenant for
//         the bus and for the gateway, and no file of the deployment's, aimed at its twin; some of them as processes of their own.
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { beforeAll, expect, test, vi } from "vitest";
import { until } from "../../deploy/local/server-process.ts";
import { createProgram } from "../../cli/run.ts";
import type { CliPorts } from "../../cli/ports.ts";
import { freshFolder } from "../harness/servers.ts";
import { typed } from "../harness/typed-command.ts";
import { canaryOf, SESSION, startTwoTenants, type TwoTenants } from "./two-tenants.ts";

vi.setConfig({ testTimeout: 300_000 });

/** Processes of a deployment: the first starts servers of its own, whose owner it then is; the others are given the runtime's login or end. */
const NOT_TRIED = new Set(["up", "worker", "supervisor", "gateway", "projector"]);
/** Say what this program is, and ask nobody. */
const asksNobody = (name: string): boolean => /^(machines|models)( |$)/.test(name);
/** Commands at once: most of each one's time is waiting for a broker that does not answer it. */
const AT_ONCE = 25;
/** Those that are started as people start them: what reads, what writes, what asks the gateway. */
const AS_PROCESSES = new Set(["show", "budget set", "chat", "verify"]);

let ground: TwoTenants;
let home = "";
beforeAll(async () => {
  ground = await startTwoTenants();
  home = freshFolder("strange");
  writeFileSync(join(home, "agent.json"), JSON.stringify({ agent: "assistant", model: "simulated/echo", instructions: "taken over" }));
}, 120_000);

/** What stands for an argument or an option's value, by its name: the twin's, wherever one is asked for. */
function valueOf(name: string): string {
  if (/tenant/i.test(name)) return "rival";
  if (/file/i.test(name)) return join(home, "agent.json");
  if (/actor|what|target|address/i.test(name)) return `rival/session/${SESSION}`;
  if (/session/i.test(name)) return SESSION;
  if (/limit|micros|seq|number|max|percent|shard|_s$|count/i.test(name)) return "1";
  if (/worker/i.test(name)) return "w1";
  if (/provider/i.test(name)) return "anthropic";
  if (/period/i.test(name)) return "day";
  if (/url/i.test(name)) return "https://example.com/hook";
  if (/text|message|content|words/i.test(name)) return "words";
  return "assistant";
}

interface Tried {
  readonly name: string;
  readonly code: number;
  readonly said: string;
}

function attempts(): { name: string; args: string[] }[] {
  const leaves = createProgram({ env: {} } as unknown as CliPorts, () => {}).commands.flatMap((command) =>
    command.commands.length > 0 ? command.commands.map((sub) => ({ name: `${command.name()} ${sub.name()}`, sub })) : [{ name: command.name(), sub: command }],
  );
  return leaves
    .filter(({ name }) => !NOT_TRIED.has(name))
    .map(({ name, sub }) => {
      const positional = sub.registeredArguments.map((one) => valueOf(one.name() === "session" ? "actor" : one.name()));
      const wanted = sub.options.filter((one) => one.long === "--tenant" || one.mandatory);
      const json = sub.options.some((one) => one.long === "--json") ? ["--json"] : [];
      return { name, args: [...name.split(" "), ...positional, ...wanted.flatMap((one) => [one.long ?? "", valueOf(one.attributeName())]), ...json] };
    });
}

test("every command of the program, with one tenant's key and aimed at another, shows nothing of it and changes nothing of it", async () => {
  const { troupe, keys } = ground;
  const bus = await troupe.bus();
  const kept = async (): Promise<string[]> => {
    const found: string[] = [];
    for await (const { subject, sequence, data } of bus.read("EVENTS", "tenant.>", 1)) {
      // A budget also settles by itself what its sessions spent.
      const by_itself = subject.includes(".budget.") && !Buffer.from(data).includes("budget.configure");
      if (/^tenant\.(rival\.|system\.(?!worker))/.test(subject) && !by_itself) found.push(`${subject} ${sequence}`);
    }
    return found;
  };
  let before = await kept();
  // What its own turn still owed is paid by then.
  const stands = async (): Promise<boolean> => {
    const then = before;
    before = await kept();
    return then.length === before.length;
  };
  expect(await until(stands, 60_000, 1_000)).toBe(true);
  expect(before.length).toBeGreaterThan(5);
  // With the operator's credential the word is shown: there is something to look for.
  expect((await typed(troupe, ["show", `rival/session/${SESSION}`, "--entries", "40"])).stdout).toContain(canaryOf("rival"));

  const waiting = attempts();
  expect(waiting.length).toBeGreaterThan(40);
  expect(waiting.filter(({ name }) => AS_PROCESSES.has(name))).toHaveLength(AS_PROCESSES.size);
  const tried: Tried[] = [];
  await Promise.all(
    Array.from({ length: AT_ONCE }, async () => {
      for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
        const env = {
          TROUPE_HOME: home,
          TROUPE_NATS_URL: troupe.dev().nats_url,
          TROUPE_NATS_USER: "acme",
          TROUPE_NATS_PASSWORD: keys.acme,
          TROUPE_API_KEY: keys.acme,
        };
        const options = { env, stdin: "words\n" };
        const { code, stdout, stderr } = await (AS_PROCESSES.has(next.name) ? troupe.cli(next.args, options) : typed(troupe, next.args, options));
        tried.push({ name: next.name, code, said: stdout + stderr });
      }
    }),
  );
  for (const { name, said } of tried) expect(said.includes(canaryOf("rival")) ? `${name} shows ${said.slice(0, 300)}` : "").toBe("");
  // 2 would mean that the command was not even tried: this file does not know what to give it.
  const known = tried.filter(({ name }) => !asksNobody(name));
  expect(known.filter(({ code }) => code !== 1 && code !== 3).map(({ name, code, said }) => `${name}: ${code} ${said.slice(0, 200)}`)).toEqual([]);
  expect(await kept()).toEqual(before);
});

test("what the gateway's own commands say with a tenant's key is said to that tenant's twin, whatever tenant is named", async () => {
  const { troupe, keys } = ground;
  for (const args of [
    ["chat", "--session", SESSION],
    ["chat", "--session", SESSION, "--tenant", "rival"],
  ]) {
    const { stdout, stderr } = await troupe.cli([...args, "--key", keys.acme, "--gateway", troupe.gateway_url], { stdin: `words of ${canaryOf("acme")}\n` });
    expect(stdout + stderr).toContain(canaryOf("acme"));
    expect(stdout + stderr).not.toContain(canaryOf("rival"));
  }
});
