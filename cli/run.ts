// run: the `troupe` command: reads what was typed, does it, and answers an exit code.
//
//   argv ──commander──▶ one command ──▶ its work, with a context of lazy connections ──▶ exit code
//
// Invariants:
//   L1. Nothing is connected, read or written before the whole line was understood: wrong usage is exit code 2 and nothing else.
//   L2. Every command that answers has --json; its help says whether that is one document or lines.
//   L3. Every refusal has its code on stderr, and with --json also on stdout as {"ok": false, "error"}.
//   L4. What was opened is closed, however the command ends.
import { Command, CommanderError, Option } from "commander";
import { errorBody, TroupeError } from "../protocol/errors.ts";
import { CALLS_MAX_MAX } from "../protocol/limits.ts";
import { errorFields } from "../protocol/log.ts";
import { PRIORITIES } from "../protocol/priority.ts";
import { COST_PROJECTIONS } from "../protocol/cost-projection.ts";
import { SESSIONS_COUNTED_MAX } from "../protocol/limits.ts";
import { RATE_TIER_NAMES, RATE_TIERS } from "../protocol/rate-tiers.ts";
import { ROLES } from "../providers/models.ts";
import { cores } from "../state-machines/kinds.ts";
import { outerStates } from "../state-machines/step.ts";
import { actorArgument, collected, filterArgument, idArgument, instantArgument, parentArgument, sessionArgument, wholeNumber } from "./arguments.ts";
import { setBudget, showBudget } from "./budget.ts";
import { machines, replayCommand, verifyCommand } from "./checks.ts";
import { drain, shards, workers } from "./cluster.ts";
import { concurrency } from "./concurrency.ts";
import { type Context, createContext, Unreachable } from "./context.ts";
import { doctor } from "./doctor.ts";
import { explain, unpark } from "./explain.ts";
import { show } from "./look.ts";
import { compareModels, listBreakers, listModels, recommendModels, refreshModels, showModel } from "./models.ts";
import { grantPermissions, refreshAgents, setPermissions, showPermissions } from "./permissions.ts";
import { type CliPorts, EXIT } from "./ports.ts";
import { createPrinter, type Printer } from "./printer.ts";
import { auditExport, auditVerify } from "./audit.ts";
import { listProviderKeys, removeProviderKey, rotateProviderKeys, setProviderKey } from "./provider-keys.ts";
import { audit, migrate, sessions, usage } from "./records.ts";
import { chat, send, tail } from "./talk.ts";
import { createWebhook, listWebhooks, rotateWebhook, setWebhook, testWebhook } from "./webhooks.ts";
import { createKey, createTenant, listAgents, listKeys, listTenants, putAgent, revokeKey, showAgent } from "./tenancy.ts";
import { waits } from "./waits.ts";

type JsonForm = "document" | "lines" | "none";
type Work = (context: Context, options: never, ...args: never[]) => Promise<number>;

interface CommandSpec {
  readonly name: string;
  readonly summary: string;
  /** What --help says beyond the summary. */
  readonly about?: string;
  /** What its group does when no verb is given. */
  readonly isDefault?: boolean;
  readonly json: JsonForm;
  readonly examples: readonly string[];
  readonly work: Work;
}

const JSON_WORDS = { document: "print one JSON document", lines: "print JSON lines: one object a line" } as const;

/** Says what went wrong, and with which code the process ends. */
export function exitCodeOf(error: unknown, context: Context, printer: Printer): number {
  if (error instanceof TroupeError) {
    printer.refused(error.body);
    return error.body.code === "unavailable" ? EXIT.unreachable : EXIT.refused;
  }
  if (error instanceof Unreachable) {
    printer.refused(errorBody("unavailable", error.message));
    return EXIT.unreachable;
  }
  const { error: what } = errorFields(error);
  if (context.lost() || (error instanceof Error && error.name === "BusUnavailable")) {
    printer.refused(errorBody("unavailable", `the connection to NATS was lost: ${what}`));
    return EXIT.unreachable;
  }
  printer.refused(errorBody("internal", what));
  context.ports.log.debug("a command broke", errorFields(error));
  return EXIT.refused;
}

/** The whole command line as commander has it. `finish` hears the exit code of the command that ran. */
export function createProgram(ports: CliPorts, finish: (code: number) => void): Command {
  const program = new Command("troupe");
  // Parsing answers by throwing instead of ending the process, and speaks through the given streams.
  program.exitOverride();
  program.configureOutput({
    writeOut: (text) => void ports.stdout.write(text),
    writeErr: (text) => void ports.stderr.write(text),
    getOutHelpWidth: () => ports.stdout.columns ?? 100,
    getErrHelpWidth: () => ports.stderr.columns ?? 100,
    getOutHasColors: () => ports.stdout.isTTY === true,
    getErrHasColors: () => ports.stderr.isTTY === true,
  });
  program.showHelpAfterError("(--help says how)");
  program.description("Runs AI agents for many tenants as durable actors on NATS JetStream.");
  program.addHelpText(
    "after",
    `
Where things are is read from TROUPE_NATS_URL, TROUPE_NATS_USER, TROUPE_NATS_PASSWORD, TROUPE_NATS_MONITOR_URL, TROUPE_POSTGRES_URL,
TROUPE_GATEWAY_URL and TROUPE_API_KEY, else from $TROUPE_HOME/dev.json (default .troupe/dev.json), which \`troupe up\` writes.

Exit codes: 0 done, 1 refused or found a violation, 2 wrong usage, 3 unreachable.`,
  );

  function add(parent: Command, spec: CommandSpec): Command {
    const command = parent.command(spec.name, { isDefault: spec.isDefault === true }).summary(spec.summary);
    command.description(spec.about === undefined ? `${spec.summary}.` : `${spec.summary}.\n\n${spec.about}`);
    if (spec.json !== "none") command.option("--json", JSON_WORDS[spec.json]);
    command.addHelpText("after", `\nExamples:\n${spec.examples.map((example) => `  $ ${example}`).join("\n")}`);
    command.action(async (...args: unknown[]) => {
      const options = command.opts<{ json?: boolean }>();
      const { json = false, ...rest } = options;
      const printer = createPrinter(ports.stdout, ports.stderr, { json, env: ports.env });
      const context = createContext(ports, printer);
      const work = spec.work as unknown as (context: Context, options: object, ...args: unknown[]) => Promise<number>;
      let code: number;
      try {
        code = await work(context, rest, ...args.slice(0, -2));
      } catch (error) {
        code = exitCodeOf(error, context, printer);
      }
      // L4. What does not close is no reason to say that the command failed: what it did is done.
      await context.close().catch((error: unknown) => ports.log.debug("a connection did not close", errorFields(error)));
      finish(code);
    });
    return command;
  }
  const tenantOption = (): Option => new Option("--tenant <id>", "the tenant").argParser(idArgument).makeOptionMandatory();
  const limitOption = (what: string): Option => new Option("--limit <n>", what).argParser(wholeNumber(1, 500));

  addRoles(program, ports, add);

  // ── sessions ─────────────────────────────────────────────────────────────────────────────────────────────────────
  program.commandsGroup("Sessions:");
  add(program, {
    name: "send",
    summary: "send a message to a session",
    about: "With --agent the session is created when it does not exist. Prints the reply; with --wait the turn as it goes, until it ends.",
    json: "lines",
    examples: [
      "troupe send demo/session/s1 'hello' --agent assistant --wait",
      "troupe send demo/session/s1 'stop that' --on-busy interrupt --key 42",
      "troupe send demo/session/s2 'sum it up' --after s1/m3 --priority high",
    ],
    work: send,
  })
    .argument("<session>", "TENANT/session/ID", sessionArgument)
    .argument("<text>", "what to say")
    .addOption(new Option("--agent <id>", "create the session with this agent when it does not exist").argParser(idArgument))
    .addOption(new Option("--on-busy <how>", "what to do while a turn runs").choices(["enqueue", "reject", "interrupt"]))
    .addOption(new Option("--priority <level>", "where its model calls wait among the tenant's own").choices([...PRIORITIES]))
    .addOption(
      new Option("--after <session/message>", "its turn begins when that message's has completed, and fails when it does not; may be given again").argParser(
        parentArgument,
      ),
    )
    .option("--key <key>", "Idempotency-Key: a repeat with the same key is answered with the first outcome")
    .option("--wait", "show the turn until it ends; exit code 1 when it fails or is cancelled")
    .addOption(new Option("--patience <seconds>", "how long to wait for the answer").argParser(wholeNumber(1, 3600)).default(10));
  add(program, {
    name: "chat",
    summary: "talk with an agent at the terminal",
    about:
      "Goes through the gateway with the tenant's key. Text streams as it comes; text of an attempt that was lost is marked void and begins again.\n" +
      "Ctrl-C cancels the running turn first, then leaves. From a pipe, each line is a message, and each finished answer is printed.",
    json: "lines",
    examples: ["troupe chat", "troupe chat --tenant demo --agent assistant", "printf 'hello\\nand again\\n' | troupe chat --session s1"],
    work: chat,
  })
    .addOption(new Option("--tenant <id>", "whose key of dev.json to use; the first that has one by default").argParser(idArgument))
    .addOption(new Option("--agent <id>", "the agent of a new session").argParser(idArgument).default("assistant"))
    .addOption(new Option("--session <id>", "go on with this session; it is created when it does not exist").argParser(idArgument))
    .option("--gateway <url>", "the gateway (else TROUPE_GATEWAY_URL, else dev.json)")
    .option("--key <key>", "the tenant's key (else TROUPE_API_KEY, else dev.json)");
  add(program, {
    name: "tail",
    summary: "listen to events and tokens as they are stored",
    about: "Lines begin with their cursor, which --from takes. Tokens come live only, by default when one actor is listened to.",
    json: "lines",
    examples: ["troupe tail demo", "troupe tail demo/session/s1 --from start", "troupe tail demo --from 1200 --no-follow --json"],
    work: ((context: Context, options: Parameters<typeof tail>[1], filter: Parameters<typeof tail>[2]) => tail(context, options, filter)) as Work,
  })
    .argument("<what>", "TENANT, TENANT/KIND or TENANT/KIND/ID", filterArgument)
    .option("--from <where>", "'start', 'now' or a cursor: what comes after it", "now")
    .option("--tokens", "show tokens of more than one actor too")
    .option("--no-tokens", "show no tokens")
    .option("--no-follow", "end with what is stored");
  add(program, {
    name: "sessions",
    summary: "list a tenant's sessions, newest first",
    about: "Read from the projection in Postgres; `show` reads the journal.",
    json: "document",
    examples: ["troupe sessions --tenant demo", "troupe sessions --tenant demo --state thinking --limit 10 --json"],
    work: sessions,
  })
    .addOption(tenantOption())
    .addOption(new Option("--state <state>", "only those in this state").choices([...outerStates(cores.session.definition)]))
    .option("--agent <id>", "only those of this agent")
    .addOption(limitOption("at most so many (default 50, at most 500)"))
    .option("--after <cursor>", "go on after an earlier page");
  add(program, {
    name: "show",
    summary: "show an actor: its state, why it waits, what it does, who owns it",
    json: "document",
    examples: ["troupe show demo/session/s1", "troupe show demo/tenant/main --entries 0 --json"],
    work: show,
  })
    .argument("<actor>", "TENANT/KIND/ID", actorArgument)
    .addOption(new Option("--entries <n>", "how many of its last entries").argParser(wholeNumber(0, 10_000)).default(10));

  add(program, {
    name: "explain",
    summary: "tell an actor's story: why it waits, who had it, what happened",
    about: "Told from its own journal, the supervisors' decisions about its workers, and the placement table, in the order in which they were stored.",
    json: "document",
    examples: ["troupe explain demo/session/s1", "troupe explain demo/session/s1 --last 200 --json"],
    work: explain,
  })
    .argument("<actor>", "TENANT/KIND/ID", actorArgument)
    .addOption(new Option("--last <n>", "how many of the last things that happened").argParser(wholeNumber(1, 1_000_000)).default(40));
  add(program, {
    name: "unpark",
    summary: "let a parked session try again",
    about: "A session is parked when it lost its worker too often, or too expensively, without getting anywhere. Its budget for recovery begins anew.",
    json: "document",
    examples: ["troupe unpark demo/session/s1 --reason 'the tool is mended'"],
    work: unpark,
  })
    .argument("<session>", "TENANT/session/ID", sessionArgument)
    .option("--reason <text>", "why, for the audit");

  // ── checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
  program.commandsGroup("Audit:");
  add(program, {
    name: "replay",
    summary: "rebuild an actor from the stream, entry by entry",
    about:
      "Prints each entry with the state it led to, and compares what the journal says with what the replay gives; a difference is exit code 1.\n" +
      "With --step it stops after each entry at a terminal (Enter goes on, q ends) and prints events, outgoing messages and context.\n" +
      "--from-snapshot proves that the stored snapshot, and the entries after it, give the same state as the whole journal.",
    json: "lines",
    examples: ["troupe replay demo/session/s1", "troupe replay demo/session/s1 --to 12 --step", "troupe replay demo/session/s1 --from-snapshot --json"],
    work: replayCommand,
  })
    .argument("<actor>", "TENANT/KIND/ID", actorArgument)
    .addOption(new Option("--to <seq>", "the last entry to apply").argParser(wholeNumber(1, Number.MAX_SAFE_INTEGER)))
    .option("--step", "stop after each entry and print everything")
    .option("--from-snapshot", "replay a second time from the snapshot, and compare");
  add(program, {
    name: "verify",
    summary: "check every invariant on the streams and the projections",
    about: "Names each violation by its invariant, actor and place. Exit code 1 when there is one; 3 when the projections could not be asked.",
    json: "lines",
    examples: ["troupe verify", "troupe verify demo", "troupe verify demo/session/s1 --json", "troupe verify --no-projections --passes 8"],
    work: ((context: Context, options: Parameters<typeof verifyCommand>[1], filter: Parameters<typeof verifyCommand>[2]) =>
      verifyCommand(context, options, filter)) as Work,
  })
    .argument("[what]", "TENANT, TENANT/KIND or TENANT/KIND/ID; everything by default", filterArgument)
    .option("--no-projections", "leave Postgres out")
    .addOption(
      new Option("--passes <n>", "read the stream so often, each time for one part of the actors, to need less memory")
        .argParser(wholeNumber(1, 1024))
        .default(1),
    );
  const audits = program.command("audit").summary("list, verify and export what was done in a tenant's name").description("The audit of a tenant.");
  add(audits, {
    name: "list",
    isDefault: true,
    summary: "list what was done in a tenant's name, newest first",
    about: "What `troupe audit` without a verb does.",
    json: "lines",
    examples: ["troupe audit --tenant demo", "troupe audit --tenant demo --actor s1 --command message.send --json"],
    work: audit,
  })
    .addOption(tenantOption())
    .option("--kind <kind>", "only actors of this kind")
    .option("--actor <id>", "only this actor")
    .option("--entry <type>", "only entries of this type (command, refused, done, fail, timer, claim, …)")
    .option("--command <type>", "only commands of this type")
    .option("--principal <who>", "only what they said (key:…, jwt:…, nats, login:…)")
    .option("--tool <name>", "only calls of this tool: each has an entry `tool.intent` and an entry `tool.outcome`")
    .option("--since <time>", "RFC 3339, included")
    .option("--until <time>", "RFC 3339, not included")
    .addOption(limitOption("at most so many (default 50, at most 500)"))
    .option("--after <cursor>", "go on after an earlier page");
  add(audits, {
    name: "verify",
    summary: "recompute the audit's chain from the table and from the stream",
    about:
      "Finds any row that was changed, taken out, put in or moved, and a head that was changed; each by its place. Exit code 1 when there is one.\n" +
      "With --file it checks an export, without broker or database.",
    json: "lines",
    examples: ["troupe audit verify", "troupe audit verify --tenant demo --json", "troupe audit verify --tenant demo --file audit.jsonl"],
    work: auditVerify,
  })
    .addOption(new Option("--tenant <id>", "only this tenant; all by default").argParser(idArgument))
    .option("--file <path>", "an export of one tenant; - for stdin")
    .option("--no-stream", "the table and its head alone");
  add(audits, {
    name: "export",
    summary: "print a tenant's audit as JSON lines, oldest first, each row with its chain",
    json: "lines",
    examples: ["troupe audit export --tenant demo > audit.jsonl"],
    work: auditExport,
  }).addOption(tenantOption());
  add(program, {
    name: "usage",
    summary: "what a tenant's model calls used and cost",
    about: "Sums by agent and model; with --json one object per model attempt, and per call of a tool that has a price, newest first.",
    json: "lines",
    examples: [
      "troupe usage --tenant demo",
      "troupe usage --tenant demo --session s1 --json",
      "troupe usage --tenant demo --since 2026-11-01T00:00:00Z",
      "troupe usage --tenant demo --daily --since 2026-11-01T00:00:00Z",
    ],
    work: usage,
  })
    .addOption(tenantOption())
    .option("--session <id>", "only this session")
    .option("--agent <id>", "only this agent")
    .option("--user <id>", "only this user")
    .option("--model <model>", "only this model")
    .option("--since <time>", "RFC 3339, included; by the end of the attempt")
    .option("--until <time>", "RFC 3339, not included")
    .option("--daily", "the report day by day: costs by agent, model and key; refusals, degraded calls, alerts, closed periods, how projections came true")
    .addOption(new Option("--limit <n>", "with --json: at most so many attempts (default all)").argParser(wholeNumber(1, Number.MAX_SAFE_INTEGER)));
  add(program, {
    name: "concurrency",
    summary: "how many calls of a tenant ran side by side, and who waited how long for what",
    about:
      "Computed from the journals of the tenant's budget and sessions alone: the same journals give the same report. Waits are told by what for: slot (its tenant\n" +
      "may run one more), window (the provider's rate), money (that others held), place (among a worker's calls), provider (before the next try), turn (those\n" +
      "before it), dependency (turns it comes after).",
    json: "document",
    examples: ["troupe concurrency demo", "troupe concurrency demo --session s1 --json", "troupe concurrency demo --since 2026-11-21T08:00:00Z"],
    work: ((context: Context, options: Parameters<typeof concurrency>[1], tenant: string) => concurrency(context, options, tenant)) as Work,
  })
    .argument("<tenant>", "its id", idArgument)
    .addOption(new Option("--session <id>", "only what is of this session").argParser(idArgument))
    .addOption(new Option("--since <time>", "RFC 3339; from the beginning by default").argParser(instantArgument))
    .addOption(new Option("--until <time>", "RFC 3339; to the end of the journals by default").argParser(instantArgument));
  add(program, {
    name: "machines",
    summary: "list or draw the state machines",
    about: "Without a name and --out it lists them. With a name it prints the drawing; with --out it writes files.",
    json: "document",
    examples: ["troupe machines", "troupe machines session", "troupe machines --format svg --out docs/machines"],
    work: ((context: Context, options: Parameters<typeof machines>[1], name: string | undefined) => machines(context, options, name)) as Work,
  })
    .argument("[name]", "session, tenant, worker, …")
    .addOption(new Option("--format <format>", "how to draw").choices(["svg", "mermaid", "dot"]).default("mermaid"))
    .option("--out <directory>", "write NAME.svg, NAME.mmd or NAME.dot there");

  // ── tenants ──────────────────────────────────────────────────────────────────────────────────────────────────────
  program.commandsGroup("Tenants:");
  const tenants = program.command("tenants").summary("list and create tenants").description("Tenants.");
  add(tenants, { name: "list", summary: "list all tenants", json: "document", examples: ["troupe tenants list"], work: listTenants });
  add(tenants, {
    name: "create",
    summary: "create a tenant",
    about: "One that exists is left as it is.",
    json: "document",
    examples: ["troupe tenants create acme --name 'Acme Inc.'"],
    work: createTenant,
  })
    .argument("<id>", "1 to 64 of A-Z a-z 0-9 _ -", idArgument)
    .option("--name <text>", "what people call it");
  const keys = program.command("keys").summary("list, create and revoke a tenant's keys").description("Keys of a tenant.");
  add(keys, { name: "list", summary: "list a tenant's keys", json: "document", examples: ["troupe keys list --tenant acme"], work: listKeys }).addOption(
    tenantOption(),
  );
  add(keys, {
    name: "create",
    summary: "create a key and print it, this once",
    about: "Only the key is printed on stdout. What is stored is its hash.",
    json: "document",
    examples: ["KEY=$(troupe keys create --tenant acme --label ci)", "troupe keys create --tenant acme --scope sessions:read --json"],
    work: createKey,
  })
    .addOption(tenantOption())
    .addOption(
      new Option("--scope <scope...>", "what it may do (sessions:read, sessions:write, admin); reading and writing sessions when none is given").argParser(
        collected,
      ),
    )
    .option("--label <text>", "what people call it")
    .option("--expires-at <time>", "when it ends, as 2027-01-31T00:00:00Z; never when not given");
  add(keys, { name: "revoke", summary: "revoke a key", json: "document", examples: ["troupe keys revoke --tenant acme 3f9a0c21d4e8"], work: revokeKey })
    .argument("<key_id>", "as `keys list` names it", idArgument)
    .addOption(tenantOption())
    .option("--reason <text>", "why, for the audit");
  const providerKeys = program
    .command("provider-keys")
    .summary("set, list, remove and rotate a tenant's own keys at model providers")
    .description("A tenant's own keys at model providers. They rest encrypted under a master key that processes are given (docs/security.md).");
  add(providerKeys, {
    name: "list",
    summary: "list a tenant's own provider keys, without the keys",
    json: "document",
    examples: ["troupe provider-keys list --tenant acme"],
    work: listProviderKeys,
  }).addOption(tenantOption());
  add(providerKeys, {
    name: "set",
    summary: "set a tenant's own key at a provider, read from stdin",
    about: "It is used from the tenant's next call of that provider on, instead of the platform's. A key that was there before is replaced.",
    json: "document",
    examples: ["troupe provider-keys set --tenant acme openai < key.txt", 'printf %s "$KEY" | troupe provider-keys set --tenant acme anthropic --label team'],
    work: setProviderKey,
  })
    .argument("<provider>", "anthropic, openai, google, or the name of a compatible server", idArgument)
    .addOption(tenantOption())
    .option("--label <text>", "what people call it");
  add(providerKeys, {
    name: "remove",
    summary: "remove a tenant's own key at a provider",
    about: "From the next call on the platform's key is used, where there is one. The key itself still works at the provider until it is withdrawn there.",
    json: "document",
    examples: ["troupe provider-keys remove --tenant acme openai --reason 'it leaked'"],
    work: removeProviderKey,
  })
    .argument("<provider>", "as `provider-keys list` names it", idArgument)
    .addOption(tenantOption())
    .option("--reason <text>", "why, for the audit");
  add(providerKeys, {
    name: "rotate",
    summary: "encrypt all provider keys anew with the newest master key, and say what was done",
    about:
      "Each key is opened with the master key it rests under and sealed with the first of the list; the tenant's own key stays as it is.\n" +
      "With --new a fresh master key is put first into the file of master keys before. Exit code 1 when a key could not be opened.",
    json: "document",
    examples: ["troupe provider-keys rotate", "troupe provider-keys rotate --new --json"],
    work: rotateProviderKeys,
  })
    .addOption(new Option("--tenant <id>", "only this tenant; all by default").argParser(idArgument))
    .option("--new", "draw a master key and put it first");
  const agents = program.command("agents").summary("list, show and put a tenant's agents").description("Agents of a tenant.");
  add(agents, {
    name: "list",
    summary: "list a tenant's agents",
    json: "document",
    examples: ["troupe agents list --tenant acme"],
    work: listAgents,
  }).addOption(tenantOption());
  add(agents, {
    name: "show",
    summary: "print an agent's configuration as JSON",
    json: "document",
    examples: ["troupe agents show --tenant acme helper"],
    work: showAgent,
  })
    .argument("<agent>", "its id", idArgument)
    .addOption(tenantOption());
  add(agents, {
    name: "put",
    summary: "create an agent, or a new version of it, from a file",
    about:
      "FILE is a JSON object: the id under `agent`, `id` or `name`; the configuration beside it or under `config`: `model` (required), `instructions` (or\n" +
      "`system`, `system_prompt`), `tools`, `mode`, `max_loops`, `max_output_tokens`, `temperature`, `priority`, `call_timeout_ms`, `fallbacks`, `guardrails`, `roles`,\n" +
      "`idle_ttl_ms`, `suspended_ttl_ms`.\n" +
      "Every fault is named with its JSON pointer. Sessions that run keep the version they began with. `-` reads from stdin.",
    json: "document",
    examples: ["troupe agents put --tenant acme helper.json", `echo '{"agent":"echo","model":"simulated/echo"}' | troupe agents put --tenant acme -`],
    work: putAgent,
  })
    .argument("<file>", "a JSON file, or - for stdin")
    .addOption(tenantOption())
    .option("--critical", "running sessions take it up at their next turn, sleeping ones on waking");
  add(agents, {
    name: "refresh",
    summary: "let running sessions take their agent's present version up at their next turn",
    about: "Sessions keep the version they began with until they are told. What is permitted reaches them without this.",
    json: "document",
    examples: ["troupe agents refresh --tenant acme helper --reason 'the old instructions were wrong'", "troupe agents refresh --tenant acme"],
    work: ((context: Context, options: Parameters<typeof refreshAgents>[1], agent: string | undefined) => refreshAgents(context, options, agent)) as Work,
  })
    .argument("[agent]", "its id; all agents by default", idArgument)
    .addOption(tenantOption())
    .option("--reason <text>", "why, for the audit");
  const permissions = program.command("permissions").summary("show and set what a tenant's agents may do").description("Permissions of a tenant.");
  const RULES =
    "A rule is `model:NAME`, `tool:NAME` or `memory:NAME`, or the beginning of a name and `*`: `model:openai/*`, `tool:*`. A denial wins over every allowance.\n" +
    "Running sessions feel a denial at their next action, and take the rest up at their next turn.";
  add(permissions, {
    name: "show",
    summary: "show the default, what is denied to all, and the grants by role",
    json: "document",
    examples: ["troupe permissions show --tenant acme"],
    work: showPermissions,
  }).addOption(tenantOption());
  add(permissions, {
    name: "set",
    summary: "set the default and what is denied to all agents",
    about: `${RULES} What is not given stays as it is.`,
    json: "document",
    examples: [
      "troupe permissions set --tenant acme --default deny",
      "troupe permissions set --tenant acme --deny tool:pay --deny 'model:openai/*'",
      "troupe permissions set --tenant acme --deny none",
    ],
    work: setPermissions,
  })
    .addOption(tenantOption())
    .addOption(new Option("--default <what>", "what holds where no rule speaks").choices(["allow", "deny"]))
    .addOption(new Option("--deny <rule...>", "the whole list of what is denied, or none").argParser(collected));
  add(permissions, {
    name: "grant",
    summary: "set what agents with a role may and may not",
    about: `${RULES} The grant replaces the role's former one; one without rules takes it away. An agent's roles stand in its configuration.`,
    json: "document",
    examples: [
      "troupe permissions grant --tenant acme --role reader --allow tool:now --allow 'model:simulated/*'",
      "troupe permissions grant --tenant acme --role reader",
    ],
    work: grantPermissions,
  })
    .addOption(tenantOption())
    .addOption(new Option("--role <id>", "the role").argParser(idArgument).makeOptionMandatory())
    .addOption(new Option("--allow <rule...>", "what it may").argParser(collected))
    .addOption(new Option("--deny <rule...>", "what it may not, whoever allows it").argParser(collected));

  // ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────
  program.commandsGroup("Models:");
  addModels(program, add);

  const budget = program.command("budget").summary("set and show what a tenant may spend").description("Budgets of a tenant.");
  const orNone = (max: number) => (text: string) => (text === "none" ? text : wholeNumber(0, max)(text));
  add(budget, {
    name: "set",
    summary: "set a limit for a tenant, or for one agent, user or session of it, and the tenant's rates",
    about:
      "Money is whole micro-dollars: 1000000 is a dollar. A limit of 0 blocks, `none` takes a limit away. Periods end at UTC boundaries, weeks on Mondays.\n" +
      "A limit of a user or session counts from when it is first set. What is not given stays as it is.\n" +
      `A rate is of one provider, over a sliding window. A tier is the rate of every provider without one of its own: ${RATE_TIERS.map(
        ({ name, requests_max, tokens_max }) => `${name} (${requests_max} requests, ${tokens_max} tokens a minute)`,
      ).join(", ")}.\n` +
      "Sessions count from their creation to their end; those that are older than the bound with their next call of a model, and none is ever stopped for it.\n" +
      "A projection says what a level comes to: beside_twice (what is settled and held, and what others hold once more), held (what is settled and held),\n" +
      "run_rate (what the period comes to if it goes on as it began). The daily report tells how well each did.",
    json: "document",
    examples: [
      "troupe budget set --tenant acme --limit-usd-micros 5000000 --period day",
      "troupe budget set --tenant acme --agent helper --limit-usd-micros 0",
      "troupe budget set --tenant acme --tier standard --rate anthropic=1000/2000000/60 --rate openai=none",
      "troupe budget set --tenant acme --sessions 200 --projection run_rate",
    ],
    work: setBudget,
  })
    .addOption(tenantOption())
    .addOption(new Option("--agent <id>", "only what this agent spends").argParser(idArgument))
    .option("--user <id>", "only what is spent for this user")
    .addOption(new Option("--session <id>", "only what this session spends").argParser(idArgument))
    .addOption(new Option("--limit-usd-micros <n>", "the limit in micro-dollars, or none").argParser(orNone(Number.MAX_SAFE_INTEGER)))
    .addOption(new Option("--period <period>", "what the limit is for").choices(["day", "week", "month", "none"]))
    .addOption(new Option("--concurrency <n>", "how many calls of the tenant may run at once, or none").argParser(orNone(1_000_000)))
    .addOption(new Option("--sessions <n>", "how many sessions that have not ended the tenant may have, or none").argParser(orNone(SESSIONS_COUNTED_MAX)))
    .addOption(new Option("--projection <rule>", "how it is foreseen what a level comes to").choices([...COST_PROJECTIONS]))
    .addOption(new Option("--rate <rate...>", "PROVIDER=REQUESTS/TOKENS/SECONDS, - for what is not limited; or PROVIDER=none").argParser(collected))
    .addOption(new Option("--tier <tier>", "the rate at every other provider").choices([...RATE_TIER_NAMES, "none"]));
  add(budget, {
    name: "show",
    summary: "show what a tenant may spend, has spent and has reserved, level by level",
    about: "Read from the budget's own journal.",
    json: "document",
    examples: ["troupe budget show --tenant acme", "troupe budget show --tenant acme --json"],
    work: showBudget,
  }).addOption(tenantOption());

  const webhooks = program
    .command("webhooks")
    .summary("say which addresses hear a tenant's alerts")
    .description("Webhooks of a tenant: addresses that hear its budget's alerts (80, 90 and 100 percent), signed, at least once.");
  add(webhooks, {
    name: "list",
    isDefault: true,
    summary: "list a tenant's webhooks, and how their deliveries went",
    json: "document",
    examples: ["troupe webhooks list --tenant acme"],
    work: listWebhooks,
  }).addOption(tenantOption());
  add(webhooks, {
    name: "create",
    summary: "let an address hear a tenant's alerts, and print the secret, this once",
    about:
      "Calls are signed as standardwebhooks.com has it. One that is not taken is repeated for twelve hours. The address must be https and public;\n" +
      "TROUPE_PRIVATE_ADDRESSES=allow admits others, on a development machine alone.",
    json: "document",
    examples: ["troupe webhooks create --tenant acme --id ops https://ops.example.com/troupe"],
    work: createWebhook,
  })
    .argument("<url>", "what is called")
    .addOption(tenantOption())
    .addOption(new Option("--id <id>", "its name").argParser(idArgument).makeOptionMandatory());
  add(webhooks, {
    name: "set",
    summary: "change a webhook's address, or disable it; without --disable it is enabled",
    json: "document",
    examples: ["troupe webhooks set --tenant acme ops --url https://ops.example.com/other", "troupe webhooks set --tenant acme ops --disable"],
    work: setWebhook,
  })
    .argument("<webhook>", "its id", idArgument)
    .addOption(tenantOption())
    .option("--url <url>", "what is called from now on")
    .option("--disable", "deliver nothing until it is set again");
  add(webhooks, {
    name: "rotate",
    summary: "give a webhook another secret, and print it, this once; the former one is void",
    json: "document",
    examples: ["troupe webhooks rotate --tenant acme ops"],
    work: rotateWebhook,
  })
    .argument("<webhook>", "its id", idArgument)
    .addOption(tenantOption());
  add(webhooks, {
    name: "test",
    summary: "send a webhook an event to try it with",
    json: "document",
    examples: ["troupe webhooks test --tenant acme ops"],
    work: testWebhook,
  })
    .argument("<webhook>", "its id", idArgument)
    .addOption(tenantOption());

  // ── cluster ──────────────────────────────────────────────────────────────────────────────────────────────────────
  program.commandsGroup("Cluster:");
  add(program, {
    name: "workers",
    summary: "list the workers that hold a lease",
    about:
      "Calls are those of models and tools: in flight, waiting for a slot of their tenant or a place in the worker, and since the worker began: done, failed,\n" +
      "and timed out (their agent's `call_timeout_ms` was over). A worker that does not answer is listed without.",
    json: "document",
    examples: ["troupe workers"],
    work: workers,
  });
  add(program, {
    name: "waits",
    summary: "tell what waits in the workers, by tenant, and set how many calls of models run at once",
    about:
      "Commands wait for their tenant's turn, calls of models for a slot of their tenant or a place in the worker. `refusing` says that so much of a tenant " +
      "waits there that more is refused as overloaded; why one session waits, `troupe explain` says. What --calls-max sets lasts until the worker ends.",
    json: "document",
    examples: ["troupe waits", "troupe waits --worker w1 --calls-max 50"],
    work: waits,
  })
    .addOption(new Option("--worker <id>", "of this worker alone").argParser(idArgument))
    .addOption(new Option("--calls-max <n>", "calls of models that a worker makes at once, from now on").argParser(wholeNumber(1, CALLS_MAX_MAX)));
  add(program, { name: "shards", summary: "list which worker owns which shard", json: "document", examples: ["troupe shards --json"], work: shards });
  add(program, {
    name: "drain",
    summary: "move everything off a worker, so that it can be stopped",
    about:
      "Running effects end first, for at most a minute; then its shards move to other workers. With --wait, exit code 1 when it still owns some after --patience.",
    json: "document",
    examples: ["troupe drain w1 --wait", "troupe drain w1 --undo"],
    work: drain,
  })
    .argument("<worker>", "its id", idArgument)
    .option("--undo", "let it take shards again")
    .option("--reason <text>", "why, for the audit")
    .option("--wait", "until it owns no shard any more")
    .addOption(new Option("--patience <seconds>", "how long --wait waits").argParser(wholeNumber(1, 3600)).default(120));
  add(program, {
    name: "migrate",
    summary: "bring the database's schema to the newest version",
    json: "document",
    examples: ["TROUPE_POSTGRES_URL=postgres://… troupe migrate"],
    work: migrate,
  });
  add(program, {
    name: "doctor",
    summary: "check everything Troupe stands on",
    about:
      "Node, dev.json, clocks, NATS and its streams, Postgres and its migrations, the gateway, the providers' names. Exit code 1 when something is refused.",
    json: "document",
    examples: ["troupe doctor", "troupe doctor --json"],
    work: doctor,
  });
  return program;
}

function addModels(program: Command, add: (parent: Command, spec: CommandSpec) => Command): void {
  const models = program.command("models").summary("list, compare and choose models").description("Models: what they can do, what they cost, which to take.");
  add(models, {
    name: "list",
    summary: "list models with their prices and capabilities",
    about: "Without --all only those that answer in text and are not deprecated. Prices are US dollars per million tokens; what is unknown is a dash.",
    json: "document",
    examples: ["troupe models list", "troupe models list --provider anthropic --capability tools --context-min 500000"],
    work: listModels as Work,
  })
    .option("--provider <name>", "only this provider's")
    .addOption(new Option("--capability <name>", "only those that have it").choices(["tools", "vision", "reasoning", "json"]))
    .addOption(new Option("--context-min <tokens>", "only those whose context is known to hold so many").argParser(wholeNumber(1, Number.MAX_SAFE_INTEGER)))
    .option("--all", "also deprecated ones and those for speech, pictures, embeddings");
  add(models, {
    name: "show",
    summary: "show one model, with its prices since when",
    json: "document",
    examples: ["troupe models show openai/gpt-5.6-luna"],
    work: showModel as unknown as Work,
  }).argument("<model>", "{provider}/{model}");
  add(models, {
    name: "compare",
    summary: "put models side by side, in the same units",
    json: "document",
    examples: ["troupe models compare anthropic/claude-sonnet-5 openai/gpt-5.6-terra google/gemini-3.8-flash"],
    work: compareModels as unknown as Work,
  }).argument("<models...>", "{provider}/{model}, two or more");
  add(models, {
    name: "recommend",
    summary: "say which models to take for a role",
    about: `Never a deprecated one, nor one whose price is unknown. Roles: ${Object.entries(ROLES)
      .map(([name, { about }]) => `${name} (${about})`)
      .join(", ")}.`,
    json: "document",
    examples: ["troupe models recommend --role coding --goal balanced", "troupe models recommend --goal cost --allowed 'openai/*' --limit 1 --json"],
    work: recommendModels as Work,
  })
    .addOption(new Option("--role <role>", "what it is to do").choices(Object.keys(ROLES)).default("general"))
    .addOption(new Option("--goal <goal>", "what matters most").choices(["quality", "cost", "balanced"]).default("balanced"))
    .addOption(new Option("--limit <n>", "at most so many").argParser(wholeNumber(1, 50)).default(3))
    .addOption(new Option("--allowed <model...>", "only these; {provider}/* for all of a provider").argParser(collected));
  add(models, {
    name: "refresh",
    summary: "take a newer table of models and prices",
    about:
      "The table is refused, and the old one stays, when it cannot be read, has fewer than 50 models, or lost more than half of them. It is kept in\n" +
      "$TROUPE_HOME/models.json; workers use it when they start next. To go back, delete the file.",
    json: "document",
    examples: ["troupe models refresh", "troupe models refresh --from prices.json"],
    work: refreshModels as Work,
  }).option("--from <source>", "a file, or a URL (default: where genai-prices publishes its table)");
  add(models, {
    name: "breakers",
    summary: "list the providers that workers leave alone now",
    about: "A circuit breaker opens when more than half of at least five calls in a minute failed, and lets one probe through after a cool-down.",
    json: "document",
    examples: ["troupe models breakers"],
    work: listBreakers,
  });
}

/** The roles: processes that run until they are told to stop. main.ts makes them. */
function addRoles(program: Command, ports: CliPorts, add: (parent: Command, spec: CommandSpec) => Command): void {
  const { roles } = ports;
  const stopping = "Ctrl-C (SIGINT) and SIGTERM stop it cleanly.";
  const numberIn = (name: string): number | undefined => (/^\d+$/.test(ports.env[name] ?? "") ? Number(ports.env[name]) : undefined);
  const role = (command: Command, http_port = numberIn("TROUPE_HTTP_PORT") ?? 0): Command =>
    command
      .addOption(new Option("--id <id>", "its name among its like; a fresh one by default").argParser(idArgument))
      .addOption(
        new Option("--http-port <port>", "where /healthz, /readyz and /metrics are served; 0 for any").argParser(wholeNumber(0, 65_535)).default(http_port),
      );
  const common = (options: { id?: string; httpPort: number }): { id: string | undefined; http_port: number } => ({
    id: options.id,
    http_port: options.httpPort,
  });

  program.commandsGroup("Run:");
  add(program, {
    name: "up",
    summary: "run everything on this machine: NATS, Postgres, supervisor, workers, gateway, projections",
    about: `What \`npm start\` runs. Data lives in $TROUPE_HOME (default .troupe). ${stopping}`,
    json: "none",
    examples: ["troupe up", "troupe up --workers 4 --port 0"],
    work: ((_context: Context, options: { port?: number; workers: number; shards?: number }) =>
      roles.up({ port: options.port, workers: options.workers, shards: options.shards })) as Work,
  })
    .addOption(new Option("--port <port>", "the gateway's port, 0 for any (default TROUPE_PORT, else 8787)").argParser(wholeNumber(0, 65_535)))
    .addOption(new Option("--workers <n>", "how many workers").argParser(wholeNumber(1, 64)).default(numberIn("TROUPE_WORKERS") ?? 2))
    .addOption(new Option("--shards <n>", "partitions of the actors; fixed with the first start").argParser(wholeNumber(1, 1024)));
  role(
    add(program, {
      name: "worker",
      summary: "run one worker: it owns shards and runs their actors",
      about: `SIGTERM drains it first: running effects end, then its shards move. Ctrl-C (SIGINT) does so with little patience.`,
      json: "none",
      examples: ["troupe worker --id w1"],
      work: ((_context: Context, options: { id?: string; httpPort: number }) => roles.worker(common(options))) as Work,
    }),
  );
  role(
    add(program, {
      name: "supervisor",
      summary: "run one supervisor: one leads, the others stand by",
      about: stopping,
      json: "none",
      examples: ["troupe supervisor --id s1"],
      work: ((_context: Context, options: { id?: string; httpPort: number }) => roles.supervisor(common(options))) as Work,
    }),
  );
  role(
    add(program, {
      name: "gateway",
      summary: "run one gateway: HTTP, server-sent events, WebSocket",
      about: `It serves on --http-port (else TROUPE_HTTP_PORT, else TROUPE_PORT, else 8787). ${stopping}`,
      json: "none",
      examples: ["troupe gateway --host 0.0.0.0 --http-port 8787"],
      work: ((_context: Context, options: { id?: string; httpPort: number; host: string }) =>
        roles.gateway({ ...common(options), host: options.host })) as Work,
    }),
    numberIn("TROUPE_HTTP_PORT") ?? numberIn("TROUPE_PORT") ?? 8787,
  ).option("--host <address>", "the address to listen on", "127.0.0.1");
  role(
    add(program, {
      name: "projector",
      summary: "run the projections: streams to Postgres",
      about: stopping,
      json: "none",
      examples: ["troupe projector", "troupe projector --rebuild"],
      work: ((_context: Context, options: { id?: string; httpPort: number; rebuild?: boolean }) =>
        roles.projector({ ...common(options), rebuild: options.rebuild === true })) as Work,
    }),
  ).option("--rebuild", "empty what was projected and project the streams from their beginning");
}

/** Does what `argv` (without the program's own name) says, and answers the exit code. Never throws. */
export async function runCli(argv: readonly string[], ports: CliPorts): Promise<number> {
  let code: number = EXIT.done;
  const program = createProgram(ports, (finished) => (code = finished));
  try {
    await program.parseAsync([...argv], { from: "user" });
    return code;
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    // Help that was asked for is exit code 0; everything else that commander ends is wrong usage.
    return error.exitCode === 0 ? EXIT.done : EXIT.usage;
  }
}
